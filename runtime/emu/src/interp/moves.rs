//! Moves between registers and memory, with and without a change of width, and flags on their own.

use super::alu::condition;
use super::or_raise;
use crate::block::Block;
use crate::cpu::Cpu;
use crate::flags::{cc, rflags};
use crate::int::Int;
use crate::op::{Flow, Op};

pub fn mov_rr<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = cpu.get::<T>(op.src);
    cpu.set(op.dst, value);
    Flow::Next
}

pub fn mov_ri<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    cpu.set(op.dst, T::truncate(op.imm));
    Flow::Next
}

pub fn mov_rm<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = or_raise!(cpu, cpu.load::<T>(op));
    cpu.set(op.dst, value);
    Flow::Next
}

pub fn mov_mr<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = cpu.get::<T>(op.src);
    cpu.store(op, value)
}

pub fn mov_mi<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    cpu.store(op, T::truncate(op.imm))
}

pub fn movzx_r<T: Int, S: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = cpu.get::<S>(op.src).zext();
    cpu.set(op.dst, T::truncate(value));
    Flow::Next
}

pub fn movzx_m<T: Int, S: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = or_raise!(cpu, cpu.load::<S>(op)).zext();
    cpu.set(op.dst, T::truncate(value));
    Flow::Next
}

pub fn movsx_r<T: Int, S: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = cpu.get::<S>(op.src).sext();
    cpu.set(op.dst, T::truncate(value));
    Flow::Next
}

pub fn movsx_m<T: Int, S: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = or_raise!(cpu, cpu.load::<S>(op)).sext();
    cpu.set(op.dst, T::truncate(value));
    Flow::Next
}

pub fn lea<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let offset = cpu.offset(op);
    cpu.set(op.dst, T::truncate(offset));
    Flow::Next
}

pub fn xchg_rr<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (a, b) = (cpu.get::<T>(op.dst), cpu.get::<T>(op.src));
    cpu.set(op.dst, b);
    cpu.set(op.src, a);
    Flow::Next
}

pub fn bswap<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = cpu.get::<T>(op.dst).zext();
    match T::SIZE {
        8 => cpu.set(op.dst, value.swap_bytes()),
        4 => cpu.set(op.dst, (value as u32).swap_bytes()),
        // Undefined; processors give zero.
        _ => cpu.set(op.dst, 0u16),
    }
    Flow::Next
}

pub fn cmov_r<T: Int, const C: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = if condition::<C>(cpu.cc) { cpu.get::<T>(op.src) } else { cpu.get::<T>(op.dst) };
    cpu.set(op.dst, value);
    Flow::Next
}

pub fn cmov_m<T: Int, const C: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let loaded = or_raise!(cpu, cpu.load::<T>(op));
    let value = if condition::<C>(cpu.cc) { loaded } else { cpu.get::<T>(op.dst) };
    cpu.set(op.dst, value);
    Flow::Next
}

pub fn setcc_r<const C: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    cpu.set(op.dst, u8::from(condition::<C>(cpu.cc)));
    Flow::Next
}

pub fn setcc_m<const C: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    cpu.store(op, u8::from(condition::<C>(cpu.cc)))
}

/// CBW, CWDE, CDQE: the accumulator from half of `T` to `T`.
pub fn widen<T: Int>(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    let a = cpu.gpr[0];
    let value = match T::SIZE {
        2 => (a as u8).sext(),
        4 => (a as u16).sext(),
        _ => (a as u32).sext(),
    };
    cpu.set(0, T::truncate(value));
    Flow::Next
}

/// CWD, CDQ, CQO: the accumulator's sign into rDX.
pub fn sign<T: Int>(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    let sign = (T::truncate(cpu.gpr[0]).sext() as i64 >> 63) as u64;
    cpu.set(2, T::truncate(sign));
    Flow::Next
}

/// XLAT: the memory operand's base is rBX; AL is added here.
pub fn xlat(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let mut op = *op;
    op.disp = op.disp.wrapping_add(i64::from(cpu.gpr[0] as u8));
    let value = or_raise!(cpu, cpu.load::<u8>(&op));
    cpu.set(0, value);
    Flow::Next
}

pub fn nop(_: &mut Cpu, _: &Op, _: &Block) -> Flow {
    Flow::Next
}

pub fn lahf(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    let flags = (cpu.cc >> 8) as u8 & 0xd5 | 2;
    cpu.set(crate::regs::byte_reg(0, true), flags);
    Flow::Next
}

pub fn sahf(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    cpu.cc = cpu.cc & cc::OF | (cpu.gpr[0] as u16 & 0xd500) | 0x200;
    Flow::Next
}

pub fn salc(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    cpu.set(0, if cpu.cc & cc::CF != 0 { 0xffu8 } else { 0 });
    Flow::Next
}

pub fn clc(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    cpu.cc &= !cc::CF;
    Flow::Next
}

pub fn stc(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    cpu.cc |= cc::CF;
    Flow::Next
}

pub fn cmc(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    cpu.cc ^= cc::CF;
    Flow::Next
}

pub fn cld(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    cpu.sysflags &= !rflags::DF;
    Flow::Next
}

pub fn std(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    cpu.sysflags |= rflags::DF;
    Flow::Next
}
