//! SSE and AVX floating point under an MXCSR that is not the host's.
//!
//! The instruction runs under the guest's rounding and flushing, but with all exceptions masked and
//! no flag set. What it raises tells what would have happened: if an unmasked exception is among them,
//! the destination is put back and #XM (#UD without CR4.OSXMMEXCPT) is raised.

use super::exec;
use super::state::{MXCSR_FLAGS, MXCSR_RESET, host_mxcsr, set_host_mxcsr};
use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::op::Op;

/// The six mask bits of MXCSR.
const MASKS: u32 = 0x1f80;
/// Invalid operation, denormal operand, division by zero: found before the operation.
const BEFORE: u32 = 0x07;
/// Underflow.
const UNDERFLOW: u32 = 0x10;
const FLUSH_TO_ZERO: u32 = 1 << 15;

/// Runs the stub of `op`. `tiny`: it has exact tiny results, which the host does not tell.
///
/// # Safety
/// As [`exec::run`]; `memory` may be written even if an exception is returned.
pub unsafe fn run(cpu: &mut Cpu, op: &Op, memory: *mut u8, tiny: bool) -> Result<(), Fault> {
    let guest = cpu.vec.mxcsr();
    let unmasked = !(guest >> 7) & MXCSR_FLAGS;
    let mut control = guest & !MXCSR_FLAGS | MASKS;
    if unmasked & UNDERFLOW != 0 {
        // Unmasked, underflow is reported of tiny results even if they are exact. Masked, only flushing
        // to zero is like that; if it does not happen, it does not matter.
        control |= FLUSH_TO_ZERO;
    }
    let slot = op.imm as usize & 0xffff;
    let saved = destination(cpu, slot);
    let cc = cpu.cc;
    set_host_mxcsr(control);
    // SAFETY: passed on.
    unsafe { exec::run(cpu, op, memory) };
    let mut raised = host_mxcsr() & MXCSR_FLAGS;
    if tiny {
        raised |= unmasked & UNDERFLOW;
    } else if raised & unmasked & UNDERFLOW != 0 {
        // Flushing is off when underflow is unmasked (SDM vol. 1, 10.2.3.3): is the result inexact?
        restore(cpu, slot, saved);
        cpu.cc = cc;
        set_host_mxcsr(control & !FLUSH_TO_ZERO);
        // SAFETY: passed on; the operands are what they were.
        unsafe { exec::run(cpu, op, memory) };
        raised = host_mxcsr() & MXCSR_FLAGS | UNDERFLOW;
    }
    set_host_mxcsr(MXCSR_RESET);
    let hit = raised & unmasked;
    if hit & BEFORE != 0 {
        // No result was computed, so nothing was found out about it.
        raised &= BEFORE;
    }
    cpu.vec.raise_mxcsr_flags(raised);
    if hit == 0 {
        return Ok(());
    }
    restore(cpu, slot, saved);
    cpu.cc = cc;
    Err(cpu.vec.simd_fault())
}

/// Whether VCVTPS2PH of `singles` (their bits) has results that are tiny but exact: halves with less than all
/// their bits. It does not heed flushing to zero, so that masked underflow does not tell of them.
///
/// In integers, as floating point would leave flags in MXCSR.
pub fn has_tiny_half(mut singles: impl Iterator<Item = u32>) -> bool {
    // Exponents of the smallest half and of the smallest normal one, 2^-24 and 2^-14, as singles have them.
    const SMALLEST: u32 = 127 - 24;
    const NORMAL: u32 = 127 - 14;
    singles.any(|bits| {
        let exponent = bits >> 23 & 0xff;
        let mantissa = bits & 0x7f_ffff | 1 << 23;
        // Bits below 2^-24 must be zero.
        (SMALLEST..NORMAL).contains(&exponent)
            && mantissa.trailing_zeros() >= SMALLEST + 23 - exponent
    })
}

/// The first operand's bytes: 32 for a vector register, and no less for a general one.
fn destination(cpu: &Cpu, slot: usize) -> [u8; 32] {
    debug_assert!(slot + 32 <= size_of::<Cpu>());
    let cpu: *const Cpu = cpu;
    // SAFETY: slots are those of registers, which lie more than 32 bytes before the end of `Cpu`.
    unsafe { cpu.cast::<u8>().add(slot).cast::<[u8; 32]>().read_unaligned() }
}

fn restore(cpu: &mut Cpu, slot: usize, bytes: [u8; 32]) {
    let cpu: *mut Cpu = cpu;
    // SAFETY: as in `destination`; the bytes are those that were there, so every field is valid.
    unsafe { cpu.cast::<u8>().add(slot).cast::<[u8; 32]>().write_unaligned(bytes) }
}
