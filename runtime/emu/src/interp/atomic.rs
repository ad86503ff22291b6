//! XCHG with memory, XADD, CMPXCHG and its wide forms.
//!
//! The memory forms are atomic with or without a LOCK prefix: that is allowed, and the plain forms are rare.

use super::alu::Alu;
use super::or_raise;
use crate::block::Block;
use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::flags::cc;
use crate::int::Int;
use crate::op::{Flow, Op};

pub fn xchg_m<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = cpu.get::<T>(op.src);
    let (flow, old) = cpu.exchange_locked::<T, T>(op, |old, flags| (value, flags, old));
    finish(cpu, op, flow, old)
}

pub fn xadd_m<T: Alu>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = cpu.get::<T>(op.src);
    let (flow, old) = cpu.exchange_locked::<T, T>(op, |old, _| {
        let (sum, flags) = old.add(value);
        (sum, flags, old)
    });
    finish(cpu, op, flow, old)
}

#[inline(always)]
fn finish<T: Int>(cpu: &mut Cpu, op: &Op, flow: Flow, old: Option<T>) -> Flow {
    if let (true, Some(old)) = (flow != Flow::Fault, old) {
        cpu.set(op.src, old);
    }
    flow
}

pub fn xadd_r<T: Alu>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (a, b) = (cpu.get::<T>(op.dst), cpu.get::<T>(op.src));
    let (sum, flags) = a.add(b);
    cpu.cc = flags;
    cpu.set(op.src, a);
    cpu.set(op.dst, sum);
    Flow::Next
}

pub fn cmpxchg_r<T: Alu>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let (old, new) = (cpu.get::<T>(op.dst), cpu.get::<T>(op.src));
    let accumulator = T::truncate(cpu.gpr[0]);
    cpu.cc = accumulator.sub(old).1;
    if accumulator == old {
        cpu.set(op.dst, new);
    } else {
        // The destination is not written at all: a 32-bit one keeps its upper half.
        cpu.set(0, old);
    }
    Flow::Next
}

pub fn cmpxchg_m<T: Alu>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let new = cpu.get::<T>(op.src);
    let accumulator = T::truncate(cpu.gpr[0]);
    let (flow, old) = cpu.exchange_locked::<T, T>(op, |old, _| {
        let stored = if old == accumulator { new } else { old };
        (stored, accumulator.sub(old).1, old)
    });
    if let (true, Some(old)) = (flow != Flow::Fault, old)
        && old != accumulator
    {
        cpu.set(0, old);
    }
    flow
}

pub fn cmpxchg8b(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let pair = |high: u64, low: u64| high << 32 | low & 0xffff_ffff;
    let expected = pair(cpu.gpr[2], cpu.gpr[0]);
    let new = pair(cpu.gpr[1], cpu.gpr[3]);
    let (flow, old) = cpu.exchange_locked::<u64, u64>(op, |old, flags| {
        if old == expected { (new, flags | cc::ZF, old) } else { (old, flags & !cc::ZF, old) }
    });
    if let (true, Some(old)) = (flow != Flow::Fault, old)
        && old != expected
    {
        cpu.set(0, old as u32);
        cpu.set(2, (old >> 32) as u32);
    }
    flow
}

pub fn cmpxchg16b(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let linear = or_raise!(cpu, cpu.ea_checked(op, 16, true));
    if linear & 15 != 0 {
        return cpu.raise(Fault::GP0);
    }
    let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let expected = pair(cpu.gpr[2], cpu.gpr[0]);
    let new = pair(cpu.gpr[1], cpu.gpr[3]);
    let (old, flow) = match or_raise!(cpu, cpu.locked_block(linear)) {
        Some((host, after)) => {
            let old = host.compare_exchange_16(expected, new);
            (old, after(cpu))
        }
        None => or_raise!(cpu, cpu.compare_exchange_16_on_bus(linear, expected, new)),
    };
    if old == expected {
        cpu.cc |= cc::ZF;
    } else {
        cpu.cc &= !cc::ZF;
        cpu.gpr[0] = old as u64;
        cpu.gpr[2] = (old >> 64) as u64;
    }
    flow
}
