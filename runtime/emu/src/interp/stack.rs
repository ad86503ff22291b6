//! The stack: PUSH, POP, PUSHA, POPA, ENTER, LEAVE.

use super::or_raise;
use crate::block::Block;
use crate::cpu::{Cpu, Mode, seg};
use crate::fault::Fault;
use crate::int::Int;
use crate::mmu::{Access, Wrote};
use crate::op::{Flow, Op};

const SP: usize = 4;
const BP: usize = 5;

impl Cpu {
    /// Bits of rSP that the current stack uses.
    pub fn stack_mask(&self) -> u64 {
        if self.mode == Mode::Code64 {
            u64::MAX
        } else if self.seg[seg::SS].access & 1 << 14 != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Sets the bits of rSP that the current stack uses.
    pub fn set_sp(&mut self, value: u64) {
        match self.stack_mask() {
            0xffff => self.set(SP as u8, value as u16),
            mask => self.gpr[SP] = value & mask,
        }
    }

    /// The linear address of `size` bytes at stack offset `offset`.
    ///
    /// # Errors
    /// #SS(0).
    pub fn stack_address(&self, offset: u64, size: usize, write: bool) -> Result<u64, Fault> {
        if self.mode == Mode::Code64 {
            return Ok(offset);
        }
        self.linear(seg::SS, offset & self.stack_mask(), size, write)
    }

    /// Pushes the low `size` bytes (2, 4 or 8) of `value`, in any mode.
    ///
    /// # Errors
    /// #SS(0), #PF; rSP is then unchanged.
    pub fn push_sized(&mut self, value: u64, size: usize) -> Result<Wrote, Fault> {
        let sp = self.gpr[SP].wrapping_sub(size as u64) & self.stack_mask();
        let linear = self.stack_address(sp, size, true)?;
        let wrote = match size {
            2 => self.write(linear, value as u16),
            4 => self.write(linear, value as u32),
            _ => self.write(linear, value),
        }
        .map_err(to_stack)?;
        self.set_sp(sp);
        Ok(wrote)
    }

    /// Reads `size` bytes (2, 4 or 8) at `above` bytes over the stack's top.
    ///
    /// # Errors
    /// #SS(0), #PF.
    pub fn peek_sized(&mut self, above: u64, size: usize) -> Result<u64, Fault> {
        let sp = self.gpr[SP].wrapping_add(above) & self.stack_mask();
        let linear = self.stack_address(sp, size, false)?;
        match size {
            2 => self.read::<u16>(linear).map(Int::zext),
            4 => self.read::<u32>(linear).map(Int::zext),
            _ => self.read::<u64>(linear),
        }
        .map_err(to_stack)
    }

    /// Pops `size` bytes (2, 4 or 8), in any mode.
    ///
    /// # Errors
    /// #SS(0), #PF; rSP is then unchanged.
    pub fn pop_sized(&mut self, size: usize) -> Result<u64, Fault> {
        let value = self.peek_sized(0, size)?;
        self.set_sp(self.gpr[SP].wrapping_add(size as u64));
        Ok(value)
    }

    /// Pushes in 64-bit mode.
    #[inline(always)]
    pub(super) fn push64(&mut self, value: u64) -> Result<Wrote, Fault> {
        let sp = self.gpr[SP].wrapping_sub(8);
        match self.write(sp, value) {
            Ok(wrote) => {
                self.gpr[SP] = sp;
                Ok(wrote)
            }
            Err(fault) => Err(to_stack(fault)),
        }
    }

    /// Pops in 64-bit mode.
    #[inline(always)]
    pub(super) fn pop64(&mut self) -> Result<u64, Fault> {
        match self.read(self.gpr[SP]) {
            Ok(value) => {
                self.gpr[SP] = self.gpr[SP].wrapping_add(8);
                Ok(value)
            }
            Err(fault) => Err(to_stack(fault)),
        }
    }
}

/// A non-canonical stack address is #SS(0).
#[cold]
fn to_stack(fault: Fault) -> Fault {
    if fault == Fault::GP0 { Fault::SS0 } else { fault }
}

pub fn push64_r(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = cpu.reg(op.dst);
    or_raise!(cpu, cpu.push64(value)).into()
}

pub fn push64_i(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    or_raise!(cpu, cpu.push64(op.imm)).into()
}

pub fn push64_m(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = or_raise!(cpu, cpu.load::<u64>(op));
    or_raise!(cpu, cpu.push64(value)).into()
}

pub fn pop64_r(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = or_raise!(cpu, cpu.pop64());
    cpu.set_reg(op.dst, value);
    Flow::Next
}

/// PUSH of a register in any mode; `aux` is the operand size.
pub fn push_r(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = cpu.reg(op.dst);
    or_raise!(cpu, cpu.push_sized(value, op.aux.into())).into()
}

/// PUSH of an immediate in any mode.
pub fn push_i(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    or_raise!(cpu, cpu.push_sized(op.imm, op.aux.into())).into()
}

/// PUSH of memory in any mode.
pub fn push_m<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = or_raise!(cpu, cpu.load::<T>(op)).zext();
    or_raise!(cpu, cpu.push_sized(value, T::SIZE)).into()
}

/// POP to a register in any mode.
pub fn pop_r<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = or_raise!(cpu, cpu.pop_sized(T::SIZE));
    cpu.set(op.dst, T::truncate(value));
    Flow::Next
}

/// POP to memory: an rSP base counts after the increment.
pub fn pop_m<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = or_raise!(cpu, cpu.peek_sized(0, T::SIZE));
    let before = cpu.gpr[SP];
    cpu.set_sp(before.wrapping_add(T::SIZE as u64));
    let flow = cpu.store(op, T::truncate(value));
    if flow == Flow::Fault {
        cpu.gpr[SP] = before;
    }
    flow
}

/// PUSHA and PUSHAD.
pub fn pusha<T: Int>(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    let before = cpu.gpr[SP];
    let mut wrote = Wrote::Data;
    for register in 0..8 {
        let value = if register == SP { before } else { cpu.gpr[register] };
        match cpu.push_sized(value, T::SIZE) {
            Ok(Wrote::Data) => {}
            Ok(Wrote::Code) => wrote = Wrote::Code,
            Err(fault) => {
                cpu.gpr[SP] = before;
                return cpu.raise(fault);
            }
        }
    }
    wrote.into()
}

/// POPA and POPAD.
pub fn popa<T: Int>(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    let mut values = [0; 8];
    for (i, value) in values.iter_mut().enumerate() {
        *value = or_raise!(cpu, cpu.peek_sized((i * T::SIZE) as u64, T::SIZE));
    }
    for register in (0..8u8).filter(|r| usize::from(*r) != SP) {
        cpu.set(register, T::truncate(values[usize::from(7 - register)]));
    }
    cpu.set_sp(cpu.gpr[SP].wrapping_add(8 * T::SIZE as u64));
    Flow::Next
}

/// LEAVE in 64-bit mode.
pub fn leave64(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    let bp = cpu.gpr[BP];
    let value = match cpu.read::<u64>(bp) {
        Ok(value) => value,
        Err(fault) => return cpu.raise(to_stack(fault)),
    };
    cpu.gpr[SP] = bp.wrapping_add(8);
    cpu.gpr[BP] = value;
    Flow::Next
}

/// LEAVE in any mode.
pub fn leave<T: Int>(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    let before = cpu.gpr[SP];
    cpu.set_sp(cpu.gpr[BP]);
    match cpu.pop_sized(T::SIZE) {
        Ok(value) => {
            cpu.set(BP as u8, T::truncate(value));
            Flow::Next
        }
        Err(fault) => {
            cpu.gpr[SP] = before;
            cpu.raise(fault)
        }
    }
}

/// ENTER: `imm` is the frame's size, `extra` the nesting level.
pub fn enter<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (sp, level) = (cpu.gpr[SP], op.extra & 31);
    let flow = enter_frame::<T>(cpu, op.imm & 0xffff, level);
    match flow {
        Ok((frame, wrote)) => {
            cpu.set(BP as u8, T::truncate(frame));
            wrote.into()
        }
        Err(fault) => {
            cpu.gpr[SP] = sp;
            cpu.raise(fault)
        }
    }
}

fn enter_frame<T: Int>(cpu: &mut Cpu, size: u64, level: u32) -> Result<(u64, Wrote), Fault> {
    let mut wrote = cpu.push_sized(cpu.gpr[BP], T::SIZE)?;
    let frame = cpu.gpr[SP];
    let mut push = |cpu: &mut Cpu, value| -> Result<(), Fault> {
        if cpu.push_sized(value, T::SIZE)? == Wrote::Code {
            wrote = Wrote::Code;
        }
        Ok(())
    };
    for outer in 1..u64::from(level) {
        let offset = cpu.gpr[BP].wrapping_sub(outer * T::SIZE as u64) & cpu.stack_mask();
        let linear = cpu.stack_address(offset, T::SIZE, false)?;
        let value = cpu.read::<T>(linear).map_err(to_stack)?.zext();
        push(cpu, value)?;
    }
    if level > 0 {
        push(cpu, frame)?;
    }
    let top = cpu.gpr[SP].wrapping_sub(size);
    // The frame must be writable at its end (SDM vol. 2, ENTER).
    let linear = cpu.stack_address(top & cpu.stack_mask(), T::SIZE, true)?;
    cpu.host_span(linear, T::SIZE, Access::Write).map_err(to_stack)?;
    cpu.set_sp(top);
    Ok((frame, wrote))
}
