//! The x87 unit: instructions that do more than compute.
//!
//! Arithmetic runs as stubs. Here are the control instructions, which see or change what the engine keeps
//! virtual: the pointers to the last instruction and its operand.

use std::arch::asm;

use iced_x86::{Code, CpuidFeature as F, Encoder, Instruction, Mnemonic};

use super::exec::{self, class, guarded};
use super::state::{X87Pointers, guard};
use super::{HostOp, mem, stub};
use crate::block::Block;
use crate::cpu::{Cpu, Mode};
use crate::op::{Flow, Op};

/// Environment: control, status, tags, pointers (SDM vol. 1, 8.1.10).
const ENV: usize = 28;
/// Environment and registers.
const SAVE: usize = 108;

fn is_x87(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let x87 = insn.cpuid_features().iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387));
    // These are older than the feature bits: FWAIT, and what is a no-operation since the 387.
    x87 || matches!(insn.mnemonic(), M::Wait | M::Fndisi | M::Fneni | M::Fnsetpm)
}

/// For instructions that are no more than the host's own, if no bit of the class that is returned is set: that class, and
/// the opcode to note. FLDCW must leave all exceptions masked, besides.
pub fn in_place(insn: &Instruction) -> Option<(u8, Option<u16>)> {
    use Mnemonic as M;
    if !is_x87(insn) {
        return None;
    }
    match insn.mnemonic() {
        M::Wait => Some((guard::WAIT | guard::PENDING, None)),
        M::Fnclex | M::Fnstsw | M::Fnstcw => Some((class::X87_NOWAIT, None)),
        M::Fldcw => Some((class::X87, None)),
        M::Fninit | M::Fndisi | M::Fneni | M::Fnsetpm => None,
        M::Fnstenv | M::Fldenv | M::Fnsave | M::Frstor => None,
        _ => Some((class::X87, Some(opcode(insn)))),
    }
}

/// Compiles an x87 instruction.
pub fn decode(insn: &Instruction, mode: Mode) -> Option<HostOp> {
    use Mnemonic as M;
    if !is_x87(insn) {
        return None;
    }
    let real = u8::from(mode == Mode::Real);
    let image =
        |handler, size: usize| HostOp { src: size as u8, aux: real, ..HostOp::new(handler) };
    Some(match insn.mnemonic() {
        M::Wait => HostOp::new(wait),
        M::Fninit => HostOp::new(fninit),
        M::Fndisi | M::Fneni | M::Fnsetpm => HostOp::new(nothing),
        M::Fnclex => exec::compile_x87(insn, stub::get(insn)?, false, 0)?,
        M::Fnstsw if insn.code() == Code::Fnstsw_AX => HostOp::new(fnstsw_ax),
        M::Fnstsw => HostOp::new(fnstsw),
        M::Fnstcw => HostOp::new(fnstcw),
        M::Fldcw => HostOp::new(fldcw),
        M::Fnstenv => image(fnstenv, image_size(insn.code())?),
        M::Fldenv => image(fldenv, image_size(insn.code())?),
        M::Fnsave => image(fnsave, image_size(insn.code())?),
        M::Frstor => image(frstor, image_size(insn.code())?),
        _ => exec::compile_x87(insn, stub::get(insn)?, true, opcode(insn))?,
    })
}

fn image_size(code: Code) -> Option<usize> {
    Some(match code {
        Code::Fnstenv_m14byte | Code::Fldenv_m14byte => 14,
        Code::Fnstenv_m28byte | Code::Fldenv_m28byte => 28,
        Code::Fnsave_m94byte | Code::Frstor_m94byte => 94,
        Code::Fnsave_m108byte | Code::Frstor_m108byte => 108,
        _ => return None,
    })
}

/// The eleven opcode bits that FXSAVE shows as FOP.
fn opcode(insn: &Instruction) -> u16 {
    let bitness = match insn.code_size() {
        iced_x86::CodeSize::Code16 => 16,
        iced_x86::CodeSize::Code32 => 32,
        _ => 64,
    };
    let Ok(mut encoder) = Encoder::try_new(bitness) else { return 0 };
    if encoder.encode(insn, insn.ip()).is_err() {
        return 0;
    }
    let bytes = encoder.take_buffer();
    match bytes.iter().position(|b| (0xd8..=0xdf).contains(b)) {
        Some(at) if at + 1 < bytes.len() => {
            u16::from(bytes[at] & 7) << 8 | u16::from(bytes[at + 1])
        }
        _ => 0,
    }
}

fn wait(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    const G: u8 = guard::WAIT | guard::PENDING;
    guarded!(cpu, G);
    Flow::Next
}

fn nothing(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87_NOWAIT);
    Flow::Next
}

fn fninit(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87_NOWAIT);
    // SAFETY: never faults; the x87 registers are the guest's.
    unsafe { asm!("fninit", options(nomem, nostack)) };
    cpu.vec.pointers = X87Pointers::default();
    cpu.vec.control_word_changed();
    Flow::Next
}

fn fnstsw_ax(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87_NOWAIT);
    let value = super::state::fnstsw();
    cpu.gpr[0] = cpu.gpr[0] & !0xffff | u64::from(value);
    Flow::Next
}

fn fnstsw(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87_NOWAIT);
    mem::write(cpu, op, &super::state::fnstsw().to_le_bytes())
}

fn fnstcw(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87_NOWAIT);
    mem::write(cpu, op, &super::state::fnstcw().to_le_bytes())
}

fn fldcw(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87);
    let mut word = [0u8; 2];
    if let Err(fault) = mem::read(cpu, op, 0, &mut word) {
        return cpu.raise(fault);
    }
    // SAFETY: reads two bytes; a pending exception was looked for above, so it does not fault.
    unsafe { asm!("fldcw [{}]", in(reg) word.as_ptr(), options(nostack, readonly)) };
    cpu.vec.control_word_changed();
    Flow::Next
}

fn fnstenv(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87_NOWAIT);
    let size = usize::from(op.src);
    if let Err(fault) = mem::probe(cpu, op, size, 0) {
        return cpu.raise(fault);
    }
    let mut native = [0u8; ENV];
    // SAFETY: stores 28 bytes; never faults.
    unsafe { asm!("fnstenv [{}]", in(reg) native.as_mut_ptr(), options(nostack)) };
    cpu.vec.control_word_changed();
    let mut image = [0u8; ENV];
    environment(&native, cpu.vec.pointers, size, op.aux != 0, &mut image);
    mem::write(cpu, op, &image[..size])
}

fn fnsave(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87_NOWAIT);
    let size = usize::from(op.src);
    if let Err(fault) = mem::probe(cpu, op, size, 0) {
        return cpu.raise(fault);
    }
    let mut native = [0u8; SAVE];
    // SAFETY: stores 108 bytes; never faults.
    unsafe { asm!("fnsave [{}]", in(reg) native.as_mut_ptr(), options(nostack)) };
    cpu.vec.control_word_changed();
    let env = size - 80;
    let mut image = [0u8; SAVE];
    environment(&native, cpu.vec.pointers, env, op.aux != 0, &mut image);
    image[env..size].copy_from_slice(&native[ENV..]);
    cpu.vec.pointers = X87Pointers::default();
    mem::write(cpu, op, &image[..size])
}

fn fldenv(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87);
    let size = usize::from(op.src);
    let mut image = [0u8; ENV];
    if let Err(fault) = mem::read(cpu, op, 0, &mut image[..size]) {
        return cpu.raise(fault);
    }
    let (native, pointers) = from_environment(&image, size, op.aux != 0);
    // SAFETY: reads 28 bytes; no exception is pending (checked above).
    unsafe { asm!("fldenv [{}]", in(reg) native.as_ptr(), options(nostack, readonly)) };
    cpu.vec.pointers = pointers;
    cpu.vec.control_word_changed();
    Flow::Next
}

fn frstor(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87);
    let size = usize::from(op.src);
    let mut image = [0u8; SAVE];
    if let Err(fault) = mem::read(cpu, op, 0, &mut image[..size]) {
        return cpu.raise(fault);
    }
    let env = size - 80;
    let (head, pointers) = from_environment(&image, env, op.aux != 0);
    let mut native = [0u8; SAVE];
    native[..ENV].copy_from_slice(&head);
    native[ENV..].copy_from_slice(&image[env..size]);
    // SAFETY: reads 108 bytes; no exception is pending (checked above).
    unsafe { asm!("frstor [{}]", in(reg) native.as_ptr(), options(nostack, readonly)) };
    cpu.vec.pointers = pointers;
    cpu.vec.control_word_changed();
    Flow::Next
}

/// Makes the guest's environment image of `size` (14 or 28) bytes from the host's 28, with the
/// guest's own pointers. Selectors are zero, as on processors that deprecate them.
fn environment(native: &[u8], pointers: X87Pointers, size: usize, real: bool, out: &mut [u8]) {
    let X87Pointers { fip, fdp, fop } = pointers;
    let (fip, fdp) = (fip as u32, fdp as u32);
    if size == ENV {
        out[..12].copy_from_slice(&native[..12]);
        let fields = if real {
            [
                fip & 0xffff | 0xffff_0000,
                u32::from(fop) | (fip >> 16) << 12,
                fdp & 0xffff | 0xffff_0000,
                (fdp >> 16) << 12,
            ]
        } else {
            [fip, u32::from(fop) << 16, fdp, 0xffff_0000]
        };
        for (to, field) in out[12..ENV].chunks_exact_mut(4).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
    } else {
        for i in 0..3 {
            out[i * 2..i * 2 + 2].copy_from_slice(&native[i * 4..i * 4 + 2]);
        }
        let fields = if real {
            [fip as u16, fop | (fip >> 4) as u16 & 0xf000, fdp as u16, (fdp >> 4) as u16 & 0xf000]
        } else {
            [fip as u16, 0, fdp as u16, 0]
        };
        for (to, field) in out[6..14].chunks_exact_mut(2).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
    }
}

/// The reverse of [`environment`]: an image for the host without pointers, and the pointers.
fn from_environment(image: &[u8], size: usize, real: bool) -> ([u8; ENV], X87Pointers) {
    let mut native = [0u8; ENV];
    let half = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
    let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
    let (fip, fdp, fop);
    if size == ENV {
        native[..12].copy_from_slice(&image[..12]);
        if real {
            fip = word(12) & 0xffff | (word(16) >> 12 & 0xffff) << 16;
            fop = half(16);
            fdp = word(20) & 0xffff | (word(24) >> 12 & 0xffff) << 16;
        } else {
            (fip, fop, fdp) = (word(12), half(18), word(20));
        }
    } else {
        for i in 0..3 {
            native[i * 4..i * 4 + 2].copy_from_slice(&image[i * 2..i * 2 + 2]);
        }
        if real {
            fip = u32::from(half(6)) | u32::from(half(8) & 0xf000) << 4;
            fop = half(8);
            fdp = u32::from(half(10)) | u32::from(half(12) & 0xf000) << 4;
        } else {
            (fip, fop, fdp) = (u32::from(half(6)), 0, u32::from(half(10)));
        }
    }
    (native, X87Pointers { fip: u64::from(fip), fdp: u64::from(fdp), fop: fop & 0x7ff })
}
