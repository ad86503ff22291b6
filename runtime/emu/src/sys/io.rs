//! Port I/O (SDM vol. 1, chapter 19).

use super::decode::{AUX_PORT_IMM, AUX_REP, operand_size};
use crate::block::Block;
use crate::cpu::{Cpu, Mode, seg};
use crate::fault::Fault;
use crate::mmu::Access;
use crate::op::{Flow, Op};

/// Iterations of REP INS and REP OUTS before other events are looked at.
const SLICE: u32 = 64;

impl Cpu {
    /// May the running code access `size` bytes from `port`?
    fn check_port(&mut self, port: u16, size: u8) -> Result<(), Fault> {
        // In virtual-8086 mode the bitmap alone decides.
        if !self.virtual_8086() && self.io_privileged() {
            return Ok(());
        }
        if self.io_bitmap_allows(port, size.into())? { Ok(()) } else { Err(Fault::GP0) }
    }

    fn port_read(&mut self, port: u16, size: u8) -> u32 {
        let mut data = [0; 4];
        self.sys.platform.io.pio_read(port, &mut data[..usize::from(size)]);
        self.note_port(port, size.into());
        u32::from_le_bytes(data)
    }

    fn port_write(&mut self, port: u16, size: u8, value: u32) {
        self.sys.platform.io.pio_write(port, &value.to_le_bytes()[..usize::from(size)]);
        self.note_port(port, size.into());
    }
}

fn port_of(cpu: &Cpu, op: &Op) -> u16 {
    if op.aux & AUX_PORT_IMM != 0 { op.imm as u16 & 0xff } else { cpu.gpr[2] as u16 }
}

/// IN.
pub(crate) fn input(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (port, size) = (port_of(cpu, op), operand_size(op));
    if let Err(fault) = cpu.check_port(port, size) {
        return cpu.raise(fault);
    }
    let value = u64::from(cpu.port_read(port, size));
    cpu.gpr[0] = match size {
        1 => cpu.gpr[0] & !0xff | value,
        2 => cpu.gpr[0] & !0xffff | value,
        _ => value,
    };
    Flow::Break
}

/// OUT.
pub(crate) fn output(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (port, size) = (port_of(cpu, op), operand_size(op));
    if let Err(fault) = cpu.check_port(port, size) {
        return cpu.raise(fault);
    }
    let value = cpu.gpr[0] as u32;
    cpu.port_write(port, size, value);
    Flow::Break
}

/// INS, with or without REP. `op.src` is the address size in bytes.
pub(crate) fn input_string(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    repeat(cpu, op, |cpu, size, port| {
        let (offset, address) = string_address(cpu, op, 7, seg::ES);
        // The device is asked only if its answer can be stored.
        cpu.host_span(address, size.into(), Access::Write)?;
        let value = cpu.port_read(port, size);
        let wrote = cpu.write_bytes(address, &value.to_le_bytes()[..usize::from(size)])?;
        advance(cpu, op, 7, offset, size);
        Ok(wrote.into())
    })
}

/// OUTS, with or without REP. `op.dst` is the segment.
pub(crate) fn output_string(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    repeat(cpu, op, |cpu, size, port| {
        let (offset, address) = string_address(cpu, op, 6, usize::from(op.dst));
        let mut data = [0; 4];
        cpu.check_alignment(address, size.into())?;
        cpu.read_bytes(address, &mut data[..usize::from(size)])?;
        cpu.port_write(port, size, u32::from_le_bytes(data));
        advance(cpu, op, 6, offset, size);
        Ok(Flow::Next)
    })
}

/// What an index register can hold at an address size of `bytes`.
const fn address_mask(bytes: u8) -> u64 {
    match bytes {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

fn string_address(cpu: &Cpu, op: &Op, register: usize, segment: usize) -> (u64, u64) {
    let offset = cpu.gpr[register] & address_mask(op.src);
    let linear = match cpu.mode {
        Mode::Code64 if segment != seg::FS && segment != seg::GS => offset,
        Mode::Code64 => cpu.seg[segment].base.wrapping_add(offset),
        _ => cpu.seg[segment].base.wrapping_add(offset) & 0xffff_ffff,
    };
    (offset, linear)
}

fn put(cpu: &mut Cpu, op: &Op, register: usize, value: u64) {
    let mask = address_mask(op.src);
    let kept = if op.src == 2 { cpu.gpr[register] & !mask } else { 0 };
    cpu.gpr[register] = kept | value & mask;
}

fn advance(cpu: &mut Cpu, op: &Op, register: usize, offset: u64, size: u8) {
    let backwards = cpu.sysflags & crate::flags::rflags::DF != 0;
    let step = u64::from(size);
    let value = if backwards { offset.wrapping_sub(step) } else { offset.wrapping_add(step) };
    put(cpu, op, register, value);
}

fn repeat(
    cpu: &mut Cpu,
    op: &Op,
    mut step: impl FnMut(&mut Cpu, u8, u16) -> Result<Flow, Fault>,
) -> Flow {
    let size = operand_size(op);
    let port = cpu.gpr[2] as u16;
    if let Err(fault) = cpu.check_port(port, size) {
        return cpu.raise(fault);
    }
    if op.aux & AUX_REP == 0 {
        return match step(cpu, size, port) {
            Ok(_) => Flow::Break,
            Err(fault) => cpu.raise(fault),
        };
    }
    for _ in 0..SLICE {
        let count = cpu.gpr[1] & address_mask(op.src);
        if count == 0 {
            return Flow::Break;
        }
        if let Err(fault) = step(cpu, size, port) {
            return cpu.raise(fault);
        }
        put(cpu, op, 1, count - 1);
    }
    Flow::Again
}
