//! Odds and ends: cache control, fences, random numbers, VZEROUPPER.

use std::arch::asm;
use std::sync::atomic::{Ordering, fence};

use iced_x86::{Instruction, Mnemonic, Register};

use super::exec::guarded;
use super::state::guard;
use super::{HostFeatures, HostOp, mem, stub};
use crate::block::Block;
use crate::cpu::Cpu;
use crate::flags::cc;
use crate::mmu::Access;
use crate::op::{Flow, Handler, Op};

/// Compiles one of these.
pub fn decode(insn: &Instruction, features: &HostFeatures) -> Option<HostOp> {
    use Mnemonic as M;
    let handler: Handler = match insn.mnemonic() {
        M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchnta | M::Prefetchw => nop,
        M::Clflush | M::Clflushopt => clflush,
        M::Mfence | M::Lfence | M::Sfence => barrier,
        M::Vzeroupper => vzeroupper,
        M::Vzeroall => vzeroall,
        M::Rdrand if !features.rdrand => return random(insn),
        M::Rdseed if !features.rdseed => return random(insn),
        M::Rdrand | M::Rdseed => return super::exec::compile(insn, stub::get(insn)?),
        _ => return None,
    };
    Some(HostOp::new(handler))
}

fn nop(_: &mut Cpu, _: &Op, _: &Block) -> Flow {
    Flow::Next
}

/// Guest memory is coherent; what is left of CLFLUSH is its faults.
fn clflush(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    match mem::span(cpu, op, 1, 0, Access::Read) {
        Ok(_) => Flow::Next,
        Err(fault) => cpu.raise(fault),
    }
}

fn barrier(_: &mut Cpu, _: &Op, _: &Block) -> Flow {
    fence(Ordering::SeqCst);
    Flow::Next
}

fn vzeroupper(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    guarded!(cpu, guard::AVX);
    for ymm in &mut cpu.vec.ymm[..registers(cpu.mode)] {
        (ymm.0[2], ymm.0[3]) = (0, 0);
    }
    Flow::Next
}

fn vzeroall(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    guarded!(cpu, guard::AVX);
    for ymm in &mut cpu.vec.ymm[..registers(cpu.mode)] {
        ymm.0 = [0; 4];
    }
    Flow::Next
}

/// Vector registers that the mode has.
fn registers(mode: crate::cpu::Mode) -> usize {
    if mode == crate::cpu::Mode::Code64 { 16 } else { 8 }
}

/// RDRAND and RDSEED where the host has none: `dst` is the register, `aux` the operand's bytes.
fn random(insn: &Instruction) -> Option<HostOp> {
    let register: Register = insn.op0_register();
    Some(HostOp {
        dst: register.full_register().number() as u8,
        aux: register.size() as u8,
        ..HostOp::new(from_host)
    })
}

fn from_host(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let mut bytes = [0u8; 8];
    // SAFETY: writes at most eight bytes to a local.
    let got =
        unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    let good = got == bytes.len() as isize;
    let value = if good { u64::from_le_bytes(bytes) } else { 0 };
    let register = &mut cpu.gpr[usize::from(op.dst)];
    *register = match op.aux {
        2 => *register & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
    cpu.cc = 0x200 | if good { cc::CF } else { 0 };
    Flow::Next
}

/// An MMX register, read the way an MMX instruction does (which leaves the x87 tags valid).
pub fn mmx(number: u8) -> u64 {
    let value: u64;
    // SAFETY: the x87 unit holds the guest's registers; a pending exception was looked for.
    unsafe {
        match number & 7 {
            0 => asm!("movq {}, mm0", out(reg) value, options(nomem, nostack)),
            1 => asm!("movq {}, mm1", out(reg) value, options(nomem, nostack)),
            2 => asm!("movq {}, mm2", out(reg) value, options(nomem, nostack)),
            3 => asm!("movq {}, mm3", out(reg) value, options(nomem, nostack)),
            4 => asm!("movq {}, mm4", out(reg) value, options(nomem, nostack)),
            5 => asm!("movq {}, mm5", out(reg) value, options(nomem, nostack)),
            6 => asm!("movq {}, mm6", out(reg) value, options(nomem, nostack)),
            _ => asm!("movq {}, mm7", out(reg) value, options(nomem, nostack)),
        }
    }
    value
}
