//! Near control transfers.
//!
//! `imm` of a direct transfer is its target, as an offset from the block's start. Outside 64-bit mode
//! `extra` masks the new instruction pointer to the operand size.

use super::alu::condition;
use super::or_raise;
use crate::block::Block;
use crate::cpu::{Cpu, Mode};
use crate::fault::Fault;
use crate::int::Int;
use crate::op::{Flow, Op, reg};

const BLOCK: usize = reg::BLOCK as usize;

#[inline(always)]
fn next(cpu: &Cpu, op: &Op) -> u64 {
    cpu.gpr[BLOCK].wrapping_add(op.end.into())
}

#[inline(always)]
fn target<const WIDE: bool>(cpu: &Cpu, op: &Op) -> u64 {
    let target = cpu.gpr[BLOCK].wrapping_add(op.imm);
    if WIDE { target } else { target & u64::from(op.extra) }
}

/// A branch target out of a register or memory must be canonical.
#[inline(always)]
fn canonical(target: u64) -> bool {
    (target << 16) as i64 >> 16 == target as i64
}

pub fn jmp<const WIDE: bool>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    cpu.rip = target::<WIDE>(cpu, op);
    Flow::Jump
}

pub fn jcc<const C: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let offset = if condition::<C>(cpu.cc) { op.imm } else { op.end.into() };
    cpu.rip = cpu.gpr[BLOCK].wrapping_add(offset);
    Flow::Jump
}

pub fn jcc_legacy<const C: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    cpu.rip = if condition::<C>(cpu.cc) { target::<false>(cpu, op) } else { next(cpu, op) };
    Flow::Jump
}

/// JCXZ and its kin: `aux` is the size of the counter.
pub fn jrcxz<const WIDE: bool>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let zero = counter(cpu, op.aux) == 0;
    cpu.rip = if zero { target::<WIDE>(cpu, op) } else { next(cpu, op) };
    Flow::Jump
}

fn counter(cpu: &Cpu, size: u8) -> u64 {
    match size {
        2 => cpu.gpr[1] & 0xffff,
        4 => cpu.gpr[1] & 0xffff_ffff,
        _ => cpu.gpr[1],
    }
}

/// LOOP (0), LOOPE (1), LOOPNE (2); `aux` is the size of the counter.
pub fn loop_cx<const WIDE: bool, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    match op.aux {
        2 => cpu.set(1, (cpu.gpr[1] as u16).wrapping_sub(1)),
        4 => cpu.set(1, (cpu.gpr[1] as u32).wrapping_sub(1)),
        _ => cpu.gpr[1] = cpu.gpr[1].wrapping_sub(1),
    }
    let zero = cpu.cc & crate::flags::cc::ZF != 0;
    let again = counter(cpu, op.aux) != 0
        && match K {
            0 => true,
            1 => zero,
            _ => !zero,
        };
    cpu.rip = if again { target::<WIDE>(cpu, op) } else { next(cpu, op) };
    Flow::Jump
}

pub fn call64(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let back = next(cpu, op);
    match cpu.push64(back) {
        Ok(_) => {
            cpu.rip = target::<true>(cpu, op);
            Flow::Jump
        }
        Err(fault) => cpu.raise(fault),
    }
}

/// CALL of a relative target outside 64-bit mode; `aux` is the operand size.
pub fn call_legacy(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let back = next(cpu, op);
    or_raise!(cpu, cpu.push_sized(back, op.aux.into()));
    cpu.rip = target::<false>(cpu, op);
    Flow::Jump
}

pub fn jmp_r64(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let target = cpu.reg(op.dst);
    jump_to(cpu, target)
}

pub fn jmp_m64(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let target = or_raise!(cpu, cpu.load::<u64>(op));
    jump_to(cpu, target)
}

#[inline(always)]
fn jump_to(cpu: &mut Cpu, target: u64) -> Flow {
    if !canonical(target) {
        return cpu.raise(Fault::GP0);
    }
    cpu.rip = target;
    Flow::Jump
}

pub fn call_r64(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let target = cpu.reg(op.dst);
    call_to(cpu, op, target)
}

pub fn call_m64(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let target = or_raise!(cpu, cpu.load::<u64>(op));
    call_to(cpu, op, target)
}

#[inline(always)]
fn call_to(cpu: &mut Cpu, op: &Op, target: u64) -> Flow {
    if !canonical(target) {
        return cpu.raise(Fault::GP0);
    }
    let back = next(cpu, op);
    or_raise!(cpu, cpu.push64(back));
    cpu.rip = target;
    Flow::Jump
}

/// RET in 64-bit mode; `imm` bytes of arguments go too.
pub fn ret64(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let sp = cpu.gpr[4];
    let target = or_raise!(cpu, cpu.pop64());
    if !canonical(target) {
        cpu.gpr[4] = sp;
        return cpu.raise(Fault::GP0);
    }
    cpu.gpr[4] = cpu.gpr[4].wrapping_add(op.imm);
    cpu.rip = target;
    Flow::Jump
}

/// Indirect transfers outside 64-bit mode, or with 16-bit operands.
pub fn jmp_r<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let target = cpu.get::<T>(op.dst).zext();
    land(cpu, target)
}

pub fn jmp_m<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let target = or_raise!(cpu, cpu.load::<T>(op)).zext();
    land(cpu, target)
}

pub fn call_r<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let target = cpu.get::<T>(op.dst).zext();
    call_legacy_to::<T>(cpu, op, target)
}

pub fn call_m<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let target = or_raise!(cpu, cpu.load::<T>(op)).zext();
    call_legacy_to::<T>(cpu, op, target)
}

fn call_legacy_to<T: Int>(cpu: &mut Cpu, op: &Op, target: u64) -> Flow {
    or_raise!(cpu, check_limit(cpu, target));
    let back = next(cpu, op);
    or_raise!(cpu, cpu.push_sized(back, T::SIZE));
    cpu.rip = target;
    Flow::Jump
}

pub fn ret<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let target = or_raise!(cpu, cpu.peek_sized(0, T::SIZE));
    or_raise!(cpu, check_limit(cpu, target));
    cpu.set_sp(cpu.gpr[4].wrapping_add(T::SIZE as u64).wrapping_add(op.imm));
    cpu.rip = target;
    Flow::Jump
}

fn land(cpu: &mut Cpu, target: u64) -> Flow {
    or_raise!(cpu, check_limit(cpu, target));
    cpu.rip = target;
    Flow::Jump
}

/// The new instruction pointer must lie in the code segment.
fn check_limit(cpu: &Cpu, target: u64) -> Result<(), Fault> {
    let limit = u64::from(cpu.seg[crate::cpu::seg::CS].limit);
    if cpu.mode != Mode::Code64 && target > limit { Err(Fault::GP0) } else { Ok(()) }
}
