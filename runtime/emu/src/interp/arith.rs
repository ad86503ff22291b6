//! Arithmetic, logic, shifts, multiplication, division and single bits.

use super::alu::{Alu, AluWide};
use super::or_raise;
use crate::block::Block;
use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::flags::{Cc, cc};
use crate::int::Int;
use crate::op::{Flow, Op};

/// Two-operand operations, numbered as in their opcodes, and TEST.
pub mod kind {
    #![allow(missing_docs)]
    pub const ADD: u8 = 0;
    pub const OR: u8 = 1;
    pub const ADC: u8 = 2;
    pub const SBB: u8 = 3;
    pub const AND: u8 = 4;
    pub const SUB: u8 = 5;
    pub const XOR: u8 = 6;
    pub const CMP: u8 = 7;
    pub const TEST: u8 = 8;
}

#[inline(always)]
pub fn alu<T: Alu, const K: u8>(a: T, b: T, flags: Cc) -> (T, Cc) {
    match K {
        kind::ADD => a.add(b),
        kind::OR => a.or(b),
        kind::ADC => a.adc(b, flags),
        kind::SBB => a.sbb(b, flags),
        kind::AND => a.and(b),
        kind::SUB => a.sub(b),
        kind::XOR => a.xor(b),
        kind::CMP => (a, a.sub(b).1),
        _ => (a, a.and(b).1),
    }
}

const fn writes(k: u8) -> bool {
    k < kind::CMP
}

pub fn alu_rr<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (r, flags) = alu::<T, K>(cpu.get(op.dst), cpu.get(op.src), cpu.cc);
    cpu.cc = flags;
    if writes(K) {
        cpu.set(op.dst, r);
    }
    Flow::Next
}

pub fn alu_ri<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (r, flags) = alu::<T, K>(cpu.get(op.dst), T::truncate(op.imm), cpu.cc);
    cpu.cc = flags;
    if writes(K) {
        cpu.set(op.dst, r);
    }
    Flow::Next
}

pub fn alu_rm<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let b = or_raise!(cpu, cpu.load::<T>(op));
    let (r, flags) = alu::<T, K>(cpu.get(op.dst), b, cpu.cc);
    cpu.cc = flags;
    if writes(K) {
        cpu.set(op.dst, r);
    }
    Flow::Next
}

#[inline(always)]
fn alu_mem<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, b: T) -> Flow {
    if writes(K) {
        cpu.modify::<T>(op, |a, flags| alu::<T, K>(a, b, flags))
    } else {
        let a = or_raise!(cpu, cpu.load::<T>(op));
        cpu.cc = alu::<T, K>(a, b, 0).1;
        Flow::Next
    }
}

pub fn alu_mr<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let b = cpu.get(op.src);
    alu_mem::<T, K>(cpu, op, b)
}

pub fn alu_mi<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    alu_mem::<T, K>(cpu, op, T::truncate(op.imm))
}

pub fn alu_mr_lock<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let b = cpu.get(op.src);
    cpu.modify_locked::<T>(op, |a, flags| alu::<T, K>(a, b, flags))
}

pub fn alu_mi_lock<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let b = T::truncate(op.imm);
    cpu.modify_locked::<T>(op, |a, flags| alu::<T, K>(a, b, flags))
}

/// One-operand operations.
pub mod unary {
    #![allow(missing_docs)]
    pub const INC: u8 = 0;
    pub const DEC: u8 = 1;
    pub const NEG: u8 = 2;
    pub const NOT: u8 = 3;
}

#[inline(always)]
fn one<T: Alu, const K: u8>(a: T, flags: Cc) -> (T, Cc) {
    match K {
        unary::INC => a.inc(flags),
        unary::DEC => a.dec(flags),
        unary::NEG => a.neg(),
        _ => (T::truncate(!a.zext()), flags),
    }
}

pub fn unary_r<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (r, flags) = one::<T, K>(cpu.get(op.dst), cpu.cc);
    cpu.cc = flags;
    cpu.set(op.dst, r);
    Flow::Next
}

pub fn unary_m<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    cpu.modify::<T>(op, one::<T, K>)
}

pub fn unary_m_lock<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    cpu.modify_locked::<T>(op, one::<T, K>)
}

/// Shifts and rotates, numbered as in their opcodes.
#[inline(always)]
fn shift<T: Alu, const K: u8>(a: T, count: u8, flags: Cc) -> (T, Cc) {
    match K {
        0 => a.rol(count, flags),
        1 => a.ror(count, flags),
        2 => a.rcl(count, flags),
        3 => a.rcr(count, flags),
        5 => a.shr(count, flags),
        7 => a.sar(count, flags),
        _ => a.shl(count, flags),
    }
}

pub fn shift_ri<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (r, flags) = shift::<T, K>(cpu.get(op.dst), op.imm as u8, cpu.cc);
    cpu.cc = flags;
    cpu.set(op.dst, r);
    Flow::Next
}

pub fn shift_rc<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (r, flags) = shift::<T, K>(cpu.get(op.dst), cpu.gpr[1] as u8, cpu.cc);
    cpu.cc = flags;
    cpu.set(op.dst, r);
    Flow::Next
}

pub fn shift_mi<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let count = op.imm as u8;
    cpu.modify::<T>(op, |a, flags| shift::<T, K>(a, count, flags))
}

pub fn shift_mc<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let count = cpu.gpr[1] as u8;
    cpu.modify::<T>(op, |a, flags| shift::<T, K>(a, count, flags))
}

/// The count of SHLD and SHRD: an immediate, or CL (`aux` = 1).
#[inline(always)]
fn double_count(cpu: &Cpu, op: &Op) -> u8 {
    if op.aux != 0 { cpu.gpr[1] as u8 } else { op.imm as u8 }
}

pub fn double_r<T: AluWide, const RIGHT: bool>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (a, b, count) = (cpu.get::<T>(op.dst), cpu.get::<T>(op.src), double_count(cpu, op));
    let (r, flags) = if RIGHT { a.shrd(b, count, cpu.cc) } else { a.shld(b, count, cpu.cc) };
    cpu.cc = flags;
    cpu.set(op.dst, r);
    Flow::Next
}

pub fn double_m<T: AluWide, const RIGHT: bool>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (b, count) = (cpu.get::<T>(op.src), double_count(cpu, op));
    cpu.modify::<T>(op, |a, f| if RIGHT { a.shrd(b, count, f) } else { a.shld(b, count, f) })
}

pub fn imul_rr<T: AluWide>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (r, flags) = cpu.get::<T>(op.dst).imul(cpu.get(op.src), cpu.cc);
    cpu.cc = flags;
    cpu.set(op.dst, r);
    Flow::Next
}

pub fn imul_rm<T: AluWide>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let b = or_raise!(cpu, cpu.load::<T>(op));
    let (r, flags) = cpu.get::<T>(op.dst).imul(b, cpu.cc);
    cpu.cc = flags;
    cpu.set(op.dst, r);
    Flow::Next
}

pub fn imul_rri<T: AluWide>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (r, flags) = cpu.get::<T>(op.src).imul(T::truncate(op.imm), cpu.cc);
    cpu.cc = flags;
    cpu.set(op.dst, r);
    Flow::Next
}

pub fn imul_rmi<T: AluWide>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let a = or_raise!(cpu, cpu.load::<T>(op));
    let (r, flags) = a.imul(T::truncate(op.imm), cpu.cc);
    cpu.cc = flags;
    cpu.set(op.dst, r);
    Flow::Next
}

/// One-operand MUL and IMUL, DIV and IDIV.
pub mod wide {
    #![allow(missing_docs)]
    pub const MUL: u8 = 0;
    pub const IMUL: u8 = 1;
    pub const DIV: u8 = 2;
    pub const IDIV: u8 = 3;
}

pub fn wide_r<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let b = cpu.get::<T>(op.dst);
    wide_op::<T, K>(cpu, b)
}

pub fn wide_m<T: Alu, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let b = or_raise!(cpu, cpu.load::<T>(op));
    wide_op::<T, K>(cpu, b)
}

#[inline(always)]
fn wide_op<T: Alu, const K: u8>(cpu: &mut Cpu, b: T) -> Flow {
    if K == wide::MUL || K == wide::IMUL {
        let a = T::truncate(cpu.gpr[0]);
        let (low, high, flags) =
            if K == wide::MUL { a.mul(b, cpu.cc) } else { a.imul_wide(b, cpu.cc) };
        set_pair(cpu, low, high);
        cpu.cc = flags;
        return Flow::Next;
    }
    let (low, high) = if T::SIZE == 1 {
        (cpu.gpr[0] & 0xff, cpu.gpr[0] >> 8 & 0xff)
    } else {
        (cpu.gpr[0] & T::MASK, cpu.gpr[2] & T::MASK)
    };
    let divided = if K == wide::DIV {
        divide(high, low, b.zext(), T::BITS)
    } else {
        divide_signed(high, low, b.sext() as i64, T::BITS)
    };
    match divided {
        Some((quotient, remainder)) => {
            set_pair(cpu, T::truncate(quotient), T::truncate(remainder));
            Flow::Next
        }
        None => cpu.raise(Fault::DE),
    }
}

/// AX (8 bits), or the low and high accumulator.
#[inline(always)]
fn set_pair<T: Int>(cpu: &mut Cpu, low: T, high: T) {
    if T::SIZE == 1 {
        cpu.set::<u16>(0, (high.zext() << 8 | low.zext()) as u16);
    } else {
        cpu.set(0, low);
        cpu.set(2, high);
    }
}

/// Quotient and remainder of `high:low / divisor` in `bits`; `None` if #DE.
#[inline]
fn divide(high: u64, low: u64, divisor: u64, bits: u32) -> Option<(u64, u64)> {
    if high >= divisor {
        return None;
    }
    if bits < 64 {
        let dividend = high << bits | low;
        return Some((dividend / divisor, dividend % divisor));
    }
    if high == 0 {
        return Some((low / divisor, low % divisor));
    }
    let dividend = u128::from(high) << 64 | u128::from(low);
    let divisor = u128::from(divisor);
    Some(((dividend / divisor) as u64, (dividend % divisor) as u64))
}

#[inline]
fn divide_signed(high: u64, low: u64, divisor: i64, bits: u32) -> Option<(u64, u64)> {
    if divisor == 0 {
        return None;
    }
    if bits < 64 {
        let dividend = ((high << bits | low) << (64 - 2 * bits)) as i64 >> (64 - 2 * bits);
        let quotient = dividend.checked_div(divisor)?;
        let shift = 64 - bits;
        if quotient << shift >> shift != quotient {
            return None;
        }
        return Some((quotient as u64, (dividend % divisor) as u64));
    }
    if high as i64 == low as i64 >> 63 {
        let dividend = low as i64;
        return Some((dividend.checked_div(divisor)? as u64, (dividend % divisor) as u64));
    }
    let dividend = (u128::from(high) << 64 | u128::from(low)) as i128;
    let divisor = i128::from(divisor);
    let quotient = i64::try_from(dividend.checked_div(divisor)?).ok()?;
    Some((quotient as u64, (dividend % divisor) as u64))
}

pub fn scan_r<T: AluWide, const REVERSE: bool>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let b = cpu.get::<T>(op.src);
    scan::<T, REVERSE>(cpu, op, b)
}

pub fn scan_m<T: AluWide, const REVERSE: bool>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let b = or_raise!(cpu, cpu.load::<T>(op));
    scan::<T, REVERSE>(cpu, op, b)
}

#[inline(always)]
fn scan<T: AluWide, const REVERSE: bool>(cpu: &mut Cpu, op: &Op, b: T) -> Flow {
    let a = cpu.get::<T>(op.dst);
    let (r, flags) = if REVERSE { a.bsr(b, cpu.cc) } else { a.bsf(b, cpu.cc) };
    cpu.cc = flags;
    if b.zext() != 0 {
        cpu.set(op.dst, r);
    }
    Flow::Next
}

/// BT, BTS, BTR, BTC.
#[inline(always)]
fn bit<T: Int, const K: u8>(value: T, index: u64, flags: Cc) -> (T, Cc) {
    let mask = 1u64 << (index & u64::from(T::BITS - 1));
    let old = value.zext();
    let flags = if old & mask != 0 { flags | cc::CF } else { flags & !cc::CF };
    let new = match K {
        0 => old,
        1 => old | mask,
        2 => old & !mask,
        _ => old ^ mask,
    };
    (T::truncate(new), flags)
}

/// The bit number: an immediate (`aux` = 1) or a register.
#[inline(always)]
fn bit_index<T: Int>(cpu: &Cpu, op: &Op) -> u64 {
    if op.aux != 0 { op.imm & 0xff } else { cpu.get::<T>(op.src).sext() }
}

pub fn bit_r<T: Int, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (r, flags) = bit::<T, K>(cpu.get(op.dst), bit_index::<T>(cpu, op), cpu.cc);
    cpu.cc = flags;
    if K != 0 {
        cpu.set(op.dst, r);
    }
    Flow::Next
}

/// A register's bit number reaches beyond the operand: bit strings.
pub fn bit_m<T: Int, const K: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let index = bit_index::<T>(cpu, op);
    let mut op = *op;
    if op.aux == 0 {
        let element = (index as i64) >> T::BITS.trailing_zeros();
        op.disp = op.disp.wrapping_add(element.wrapping_mul(T::SIZE as i64));
    }
    if K == 0 {
        let value = or_raise!(cpu, cpu.load::<T>(&op));
        cpu.cc = bit::<T, 0>(value, index, cpu.cc).1;
        Flow::Next
    } else if op.flags & crate::op::op_flags::LOCK != 0 {
        cpu.modify_locked::<T>(&op, |v, flags| bit::<T, K>(v, index, flags))
    } else {
        cpu.modify::<T>(&op, |v, flags| bit::<T, K>(v, index, flags))
    }
}
