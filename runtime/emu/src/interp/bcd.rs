//! Decimal adjustments, outside 64-bit mode only (SDM vol. 2, AAA to DAS).

use super::alu::Alu;
use crate::block::Block;
use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::flags::cc;
use crate::op::{Flow, Op};

/// SF, ZF and PF of AL, as any logical operation sets them.
fn result_flags(al: u8) -> u16 {
    al.or(al).1 & (cc::SF | cc::ZF | cc::PF) | 0x200
}

/// AAA, AAS.
pub fn ascii_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    let ax = cpu.gpr[0] as u16;
    let adjust = ax & 0xf > 9 || cpu.cc & cc::AF != 0;
    let ax = match (adjust, SUBTRACT) {
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(6).wrapping_sub(0x100),
        (false, _) => ax,
    };
    let ax = ax & 0xff0f;
    cpu.set(0, ax);
    cpu.cc = result_flags(ax as u8) | if adjust { cc::AF | cc::CF } else { 0 };
    Flow::Next
}

pub fn aam(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let base = op.imm as u8;
    if base == 0 {
        return cpu.raise(Fault::DE);
    }
    let al = cpu.gpr[0] as u8;
    let (high, low) = (al / base, al % base);
    cpu.set(0, u16::from(high) << 8 | u16::from(low));
    cpu.cc = result_flags(low);
    Flow::Next
}

pub fn aad(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let ax = cpu.gpr[0] as u16;
    let al = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(op.imm as u8));
    cpu.set(0, u16::from(al));
    cpu.cc = result_flags(al);
    Flow::Next
}

/// DAA, DAS.
pub fn decimal_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    let old = cpu.gpr[0] as u8;
    let (half, carry) = (cpu.cc & cc::AF != 0, cpu.cc & cc::CF != 0);
    let mut al = old;
    let mut flags = 0;
    if old & 0xf > 9 || half {
        al = if SUBTRACT { al.wrapping_sub(6) } else { al.wrapping_add(6) };
        let borrow = if SUBTRACT { old < 6 } else { old > 0xf9 };
        flags |= cc::AF | if carry || borrow { cc::CF } else { 0 };
    }
    if old > 0x99 || carry {
        al = if SUBTRACT { al.wrapping_sub(0x60) } else { al.wrapping_add(0x60) };
        flags |= cc::CF;
    }
    cpu.set(0, al);
    cpu.cc = result_flags(al) | flags;
    Flow::Next
}
