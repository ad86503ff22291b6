//! String instructions: MOVS, STOS, LODS, SCAS, CMPS, with and without repetition.
//!
//! A repetition works in slices, so that events are seen soon, and in pages where both sides are RAM.
//! Registers are up to date at every fault (SDM vol. 2, REP).

use super::alu::Alu;
use super::or_raise;
use crate::block::Block;
use crate::cpu::{Cpu, seg};
use crate::fault::Fault;
use crate::flags::{cc, rflags};
use crate::int::Int;
use crate::mmu::Wrote;
use crate::op::{Flow, Op, op_flags};

/// Bits of `aux`.
pub mod rep {
    #![allow(missing_docs)]
    /// REP or REPE.
    pub const REP: u8 = 1;
    /// REPNE.
    pub const REPNE: u8 = 2;
    pub const ANY: u8 = REP | REPNE;
}

/// Bytes handled before the dispatcher looks for events.
const SLICE: u64 = 64 << 10;
/// Elements handled one by one before the dispatcher looks for events.
const STEPS: u32 = 1024;

const CX: u8 = 1;
const SI: u8 = 6;
const DI: u8 = 7;

/// The registers of a string instruction at its address size.
#[inline(always)]
fn address_mask(op: &Op) -> u64 {
    if op.flags & op_flags::ADDR16 != 0 {
        0xffff
    } else if op.flags & op_flags::ADDR32 != 0 {
        0xffff_ffff
    } else {
        u64::MAX
    }
}

#[inline(always)]
fn put(cpu: &mut Cpu, register: u8, value: u64, mask: u64) {
    let old = cpu.reg(register);
    // 32-bit addresses clear the upper half as any 32-bit result does.
    let keep = if mask == 0xffff { old & !mask } else { 0 };
    cpu.set_reg(register, keep | value & mask);
}

#[inline(always)]
fn advance(cpu: &mut Cpu, register: u8, bytes: u64, mask: u64) {
    let step = if cpu.sysflags & rflags::DF != 0 { bytes.wrapping_neg() } else { bytes };
    let value = cpu.reg(register).wrapping_add(step);
    put(cpu, register, value, mask);
}

/// The linear address of the source: rSI in the op's segment.
#[inline(always)]
fn source(cpu: &Cpu, op: &Op, size: usize, mask: u64) -> Result<u64, Fault> {
    let offset = cpu.reg(SI) & mask;
    if op.flags & (op_flags::LEGACY | op_flags::SEG) == 0 {
        return Ok(offset);
    }
    cpu.linear(op.seg.into(), offset, size, false)
}

/// The linear address of the destination: rDI in ES.
#[inline(always)]
fn destination(cpu: &Cpu, op: &Op, size: usize, mask: u64, write: bool) -> Result<u64, Fault> {
    let offset = cpu.reg(DI) & mask;
    if op.flags & op_flags::LEGACY == 0 {
        return Ok(offset);
    }
    cpu.linear(seg::ES, offset, size, write)
}

/// How many elements at `linear` lie in its page, as far as `want`.
#[inline(always)]
fn in_page<T: Int>(linear: u64, want: u64) -> u64 {
    want.min((4096 - (linear & 0xfff)) / T::SIZE as u64)
}

/// May whole runs be taken? Legacy segments are checked element by element, and 32-bit offsets from a base that is not a
/// page's may wrap inside a page.
#[inline(always)]
fn runs(cpu: &Cpu, op: &Op) -> bool {
    const WRAPS: u8 = op_flags::ADDR32 | op_flags::SEG;
    cpu.sysflags & (rflags::DF | rflags::TF) == 0
        && op.flags & op_flags::LEGACY == 0
        && op.flags & WRAPS != WRAPS
}

/// A repetition of no element. ECX is written all the same, which clears the rest of RCX.
#[inline(always)]
fn nothing(cpu: &mut Cpu, mask: u64) -> Flow {
    put(cpu, CX, 0, mask);
    Flow::Next
}

/// After an element of a repetition: goes on, pauses, or ends.
#[inline(always)]
fn paced(cpu: &Cpu, wrote: Wrote, left: u64) -> Option<Flow> {
    if left == 0 {
        Some(wrote.into())
    } else if wrote == Wrote::Code || cpu.sysflags & rflags::TF != 0 {
        Some(Flow::Again)
    } else {
        None
    }
}

pub fn movs<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let mask = address_mask(op);
    if op.aux & rep::ANY == 0 {
        return or_raise!(cpu, movs_one::<T>(cpu, op, mask)).into();
    }
    let mut budget = SLICE;
    let mut steps = STEPS;
    loop {
        let count = cpu.reg(CX) & mask;
        if count == 0 {
            return nothing(cpu, mask);
        }
        if budget == 0 || steps == 0 {
            return Flow::Again;
        }
        let mut done = 0;
        let mut wrote = Wrote::Data;
        if runs(cpu, op) {
            let from = or_raise!(cpu, source(cpu, op, T::SIZE, mask));
            let to = or_raise!(cpu, destination(cpu, op, T::SIZE, mask, true));
            let run = in_page::<T>(to, in_page::<T>(from, count));
            if run > 0 {
                (done, wrote) =
                    or_raise!(cpu, cpu.copy_run(from, to, run * T::SIZE as u64, T::SIZE));
                done /= T::SIZE as u64;
                advance(cpu, SI, done * T::SIZE as u64, mask);
                advance(cpu, DI, done * T::SIZE as u64, mask);
                budget = budget.saturating_sub(done * T::SIZE as u64);
            }
        }
        if done == 0 {
            wrote = or_raise!(cpu, movs_one::<T>(cpu, op, mask));
            done = 1;
        }
        steps -= 1;
        put(cpu, CX, count - done, mask);
        if let Some(flow) = paced(cpu, wrote, count - done) {
            return flow;
        }
    }
}

fn movs_one<T: Int>(cpu: &mut Cpu, op: &Op, mask: u64) -> Result<Wrote, Fault> {
    let from = source(cpu, op, T::SIZE, mask)?;
    let value = cpu.read::<T>(from)?;
    let to = destination(cpu, op, T::SIZE, mask, true)?;
    let wrote = cpu.write(to, value)?;
    advance(cpu, SI, T::SIZE as u64, mask);
    advance(cpu, DI, T::SIZE as u64, mask);
    Ok(wrote)
}

pub fn stos<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let mask = address_mask(op);
    let value = T::truncate(cpu.gpr[0]);
    if op.aux & rep::ANY == 0 {
        return or_raise!(cpu, stos_one(cpu, op, value, mask)).into();
    }
    let mut budget = SLICE;
    let mut steps = STEPS;
    loop {
        let count = cpu.reg(CX) & mask;
        if count == 0 {
            return nothing(cpu, mask);
        }
        if budget == 0 || steps == 0 {
            return Flow::Again;
        }
        let mut done = 0;
        let mut wrote = Wrote::Data;
        if runs(cpu, op) {
            let to = or_raise!(cpu, destination(cpu, op, T::SIZE, mask, true));
            let run = in_page::<T>(to, count);
            if run > 0 {
                (done, wrote) = or_raise!(cpu, cpu.fill_run(to, value, run));
                advance(cpu, DI, done * T::SIZE as u64, mask);
                budget = budget.saturating_sub(done * T::SIZE as u64);
            }
        }
        if done == 0 {
            wrote = or_raise!(cpu, stos_one(cpu, op, value, mask));
            done = 1;
        }
        steps -= 1;
        put(cpu, CX, count - done, mask);
        if let Some(flow) = paced(cpu, wrote, count - done) {
            return flow;
        }
    }
}

fn stos_one<T: Int>(cpu: &mut Cpu, op: &Op, value: T, mask: u64) -> Result<Wrote, Fault> {
    let to = destination(cpu, op, T::SIZE, mask, true)?;
    let wrote = cpu.write(to, value)?;
    advance(cpu, DI, T::SIZE as u64, mask);
    Ok(wrote)
}

/// Runs `step` once, or while rCX lasts and `step` says so. Where `run` may take several elements at once (as many as it gets, which
/// are some), it says how many it has; none leaves the next one to `step`. Both are told the address mask.
#[inline(always)]
fn repeat<T: Int>(
    cpu: &mut Cpu,
    op: &Op,
    mut run: impl FnMut(&mut Cpu, u64, u64) -> Result<u64, Fault>,
    mut step: impl FnMut(&mut Cpu, u64) -> Result<bool, Fault>,
) -> Flow {
    let mask = address_mask(op);
    if op.aux & rep::ANY == 0 {
        or_raise!(cpu, step(cpu, mask));
        return Flow::Next;
    }
    let flags = cpu.cc;
    let mut budget = SLICE;
    for _ in 0..STEPS {
        let count = cpu.reg(CX) & mask;
        if count == 0 {
            return nothing(cpu, mask);
        }
        let taken = if runs(cpu, op) { run(cpu, mask, count) } else { Ok(0) };
        let done = match taken {
            Ok(0) => step(cpu, mask).map(|go_on| (1, go_on)),
            taken => taken.map(|done| (done, goes_on(cpu, op))),
        };
        let (done, go_on) = match done {
            Ok(done) => done,
            Err(fault) => {
                // The registers tell of the progress, the flags do not (SDM vol. 2, REP).
                cpu.cc = flags;
                return cpu.raise(fault);
            }
        };
        put(cpu, CX, count - done, mask);
        if !go_on || count == done {
            return Flow::Next;
        }
        budget = budget.saturating_sub(done * T::SIZE as u64);
        if budget == 0 || cpu.sysflags & rflags::TF != 0 {
            break;
        }
    }
    // A fault in a later slice must find them, and a trap shows them: nothing depends on the last
    // comparison's.
    cpu.cc = flags;
    Flow::Again
}

pub fn lods<T: Int>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let one = |cpu: &mut Cpu, mask| {
        let from = source(cpu, op, T::SIZE, mask)?;
        let value = cpu.read::<T>(from)?;
        cpu.set(0, value);
        advance(cpu, SI, T::SIZE as u64, mask);
        Ok(true)
    };
    repeat::<T>(cpu, op, |_, _, _| Ok(0), one)
}

/// Does a comparison end with the first elements that are equal?
#[inline(always)]
fn until_equal(op: &Op) -> bool {
    op.aux & rep::REPNE != 0
}

/// Does a comparison with the current ZF go on?
#[inline(always)]
fn goes_on(cpu: &Cpu, op: &Op) -> bool {
    (cpu.cc & cc::ZF != 0) != until_equal(op)
}

pub fn scas<T: Alu>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let some = |cpu: &mut Cpu, mask, count| {
        let to = destination(cpu, op, T::SIZE, mask, false)?;
        let value = T::truncate(cpu.gpr[0]);
        let run = in_page::<T>(to, count);
        let found = if run > 0 { cpu.scan_run(to, value, run, until_equal(op))? } else { None };
        let Some((done, cc)) = found else { return Ok(0) };
        cpu.cc = cc;
        advance(cpu, DI, (done * T::SIZE) as u64, mask);
        Ok(done as u64)
    };
    let one = |cpu: &mut Cpu, mask| {
        let to = destination(cpu, op, T::SIZE, mask, false)?;
        let value = cpu.read::<T>(to)?;
        cpu.cc = T::truncate(cpu.gpr[0]).sub(value).1;
        advance(cpu, DI, T::SIZE as u64, mask);
        Ok(goes_on(cpu, op))
    };
    repeat::<T>(cpu, op, some, one)
}

pub fn cmps<T: Alu>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let some = |cpu: &mut Cpu, mask, count| {
        let from = source(cpu, op, T::SIZE, mask)?;
        let to = destination(cpu, op, T::SIZE, mask, false)?;
        let run = in_page::<T>(to, in_page::<T>(from, count));
        let found =
            if run > 0 { cpu.compare_run::<T>(from, to, run, until_equal(op))? } else { None };
        let Some((done, cc)) = found else { return Ok(0) };
        cpu.cc = cc;
        advance(cpu, SI, (done * T::SIZE) as u64, mask);
        advance(cpu, DI, (done * T::SIZE) as u64, mask);
        Ok(done as u64)
    };
    let one = |cpu: &mut Cpu, mask| {
        let from = source(cpu, op, T::SIZE, mask)?;
        let a = cpu.read::<T>(from)?;
        let to = destination(cpu, op, T::SIZE, mask, false)?;
        let b = cpu.read::<T>(to)?;
        cpu.cc = a.sub(b).1;
        advance(cpu, SI, T::SIZE as u64, mask);
        advance(cpu, DI, T::SIZE as u64, mask);
        Ok(goes_on(cpu, op))
    };
    repeat::<T>(cpu, op, some, one)
}
