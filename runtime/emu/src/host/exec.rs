//! Handlers that run a stub.
//!
//! One per shape of memory operand, and per class of instruction (`G`: which [`guard`] bits keep it
//! from simply running). What a handler needs is packed into the [`Op`]:
//!
//! | field | |
//! |---|---|
//! | `extra` | the stub's offset |
//! | `imm` | byte offsets of the register operands ([`Stub::slots`]); x87: the low opcode bits |
//! | `src` | bytes of the memory operand |
//! | `aux` | alignment mask of the memory operand |

use std::cell::RefCell;
use std::mem::transmute;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, Ordering};

use iced_x86::{
    EncodingKind, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess,
    OpKind,
};

use super::arena;
use super::mem;
use super::state::guard;
use super::stub::{Stub, StubFn};
use super::{HostOp, fp};
use crate::block::Block;
use crate::cpu::Cpu;
use crate::fault::{Fault, vector};
use crate::mmu::{Access, Span};
use crate::op::{Flow, Handler, Op, reg};

/// Classes of instructions, as the [`guard`] bits that matter to them.
pub mod class {
    use super::guard;
    /// General registers only.
    pub const NONE: u8 = 0;
    /// SSE that neither reads nor writes MXCSR.
    pub const SSE: u8 = guard::SSE;
    /// SSE floating point.
    pub const SSE_FP: u8 = guard::SSE | guard::MXCSR;
    /// AVX that neither reads nor writes MXCSR.
    pub const AVX: u8 = guard::AVX;
    /// AVX floating point.
    pub const AVX_FP: u8 = guard::AVX | guard::MXCSR;
    /// MMX.
    pub const MMX: u8 = guard::MMX | guard::PENDING;
    /// MMX and XMM registers.
    pub const MMX_SSE: u8 = guard::MMX | guard::PENDING | guard::SSE;
    /// MMX and XMM registers, floating point.
    pub const MMX_SSE_FP: u8 = guard::MMX | guard::PENDING | guard::SSE | guard::MXCSR;
    /// x87 that waits for pending exceptions.
    pub const X87: u8 = guard::X87 | guard::PENDING;
    /// x87 that does not.
    pub const X87_NOWAIT: u8 = guard::X87;
}

/// Operands that an instruction has, at most.
const MAX_OPS: usize = 5;

/// Runs the stub of `op`.
///
/// # Safety
/// `op` was made by [`compile`] for this [`Cpu`] layout; `memory` is good for the access that the
/// instruction makes, with its alignment, or the instruction has no memory operand.
#[inline(always)]
pub unsafe fn run(cpu: &mut Cpu, op: &Op, memory: *mut u8) {
    // SAFETY: the offset is that of a finished stub (caller), which has this signature.
    let stub: StubFn = unsafe { transmute(arena::entry(op.extra)) };
    let cpu: *mut Cpu = cpu;
    let at = |i: u32| cpu.cast::<u8>().wrapping_add((op.imm >> (16 * i)) as usize & 0xffff);
    // SAFETY: the slots lie in `Cpu` (by `stub::slot`), the memory operand is the caller's.
    unsafe { stub(at(0), at(1), at(2), at(3), memory, cpu) }
}

/// Runs the stub of an op that `guard` bits concern.
///
/// # Safety
/// As [`run`]; `memory` is not written before all exceptions of the instruction are known, if the
/// caller passes a buffer for instructions that write memory and need MXCSR.
#[cold]
#[inline(never)]
unsafe fn run_special(cpu: &mut Cpu, op: &Op, memory: *mut u8, class: u8) -> Result<(), Fault> {
    // SAFETY: passed on.
    unsafe { run_careful(cpu, op, memory, class, false) }
}

/// As [`run_special`]. `tiny`: as in [`fp::run`].
///
/// # Safety
/// As [`run_special`].
unsafe fn run_careful(
    cpu: &mut Cpu,
    op: &Op,
    memory: *mut u8,
    class: u8,
    tiny: bool,
) -> Result<(), Fault> {
    let x87 = (class & guard::MMX != 0).then(|| cpu.vec.x87_image());
    // SAFETY: passed on.
    let result = unsafe { fp::run(cpu, op, memory, tiny) };
    if let (Err(_), Some(image)) = (&result, x87) {
        // The result went into an MMX register.
        cpu.vec.set_x87_image(&image);
    }
    result
}

/// What must be checked before anything else, if a guard bit is set: #UD, #NM, #MF.
#[cold]
#[inline(never)]
pub fn check(cpu: &Cpu, class: u8) -> Result<(), Fault> {
    if cpu.vec.guard & class & guard::DENY != 0 {
        return Err(cpu.vec.denial(class));
    }
    if class & guard::PENDING != 0 && cpu.vec.x87_pending() {
        return Err(Fault::new(vector::MF));
    }
    Ok(())
}

macro_rules! guarded {
    ($cpu:ident, $class:expr) => {
        if $class != 0 && $cpu.vec.guard & $class != 0 {
            if let Err(fault) = $crate::host::exec::check($cpu, $class) {
                return $cpu.raise(fault);
            }
        }
    };
}
pub(super) use guarded;

/// x87: remembers where the instruction is. `imm` has the opcode bits.
#[inline(always)]
fn note_x87(cpu: &mut Cpu, op: &Op) {
    cpu.vec.pointers.fip = cpu.gpr[reg::BLOCK as usize].wrapping_add(u64::from(op.start));
    cpu.vec.pointers.fop = op.imm as u16;
}

macro_rules! run_or_raise {
    ($cpu:ident, $op:ident, $memory:expr, $g:expr) => {
        if $g & guard::MXCSR != 0 && $cpu.vec.guard & guard::MXCSR != 0 {
            // SAFETY: the op is of this family; the memory operand was resolved for it.
            if let Err(fault) = unsafe { run_special($cpu, $op, $memory, $g) } {
                return $cpu.raise(fault);
            }
        } else {
            // SAFETY: as above.
            unsafe { run($cpu, $op, $memory) };
        }
    };
}

/// No memory operand.
fn registers<const G: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, G);
    run_or_raise!(cpu, op, std::ptr::null_mut(), G);
    Flow::Next
}

/// Reads `SIZE` bytes of memory (0: as many as `op.src` says).
fn load<const G: u8, const SIZE: usize>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, G);
    let size = if SIZE == 0 { usize::from(op.src) } else { SIZE };
    let span = match mem::span(cpu, op, size, op.aux, Access::Read) {
        Ok(span) => span,
        Err(fault) => return cpu.raise(fault),
    };
    run_or_raise!(cpu, op, span.ptr(), G);
    Flow::Next
}

/// Reads halves (VCVTPH2PS), whose alignment is never checked.
fn load_halves(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    const G: u8 = class::AVX_FP;
    guarded!(cpu, G);
    let span = match mem::span_any(cpu, op, op.src.into(), Access::Read) {
        Ok(span) => span,
        Err(fault) => return cpu.raise(fault),
    };
    run_or_raise!(cpu, op, span.ptr(), G);
    Flow::Next
}

/// Writes halves (VCVTPS2PH), whose alignment is never checked.
fn store_halves(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::AVX_FP);
    let span = mem::span_any(cpu, op, op.src.into(), Access::Write);
    let tiny = has_tiny_halves(cpu, op);
    store_to::<{ class::AVX_FP }>(cpu, op, span, tiny)
}

/// VCVTPS2PH between registers.
fn registers_halves(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    const G: u8 = class::AVX_FP;
    guarded!(cpu, G);
    if cpu.vec.guard & guard::MXCSR != 0 {
        let tiny = has_tiny_halves(cpu, op);
        // SAFETY: the op is of this family and has no memory operand.
        if let Err(fault) = unsafe { run_careful(cpu, op, std::ptr::null_mut(), G, tiny) } {
            return cpu.raise(fault);
        }
    } else {
        // SAFETY: as above.
        unsafe { run(cpu, op, std::ptr::null_mut()) };
    }
    Flow::Next
}

/// Whether VCVTPS2PH, whose result has `src` bytes, has exact tiny results.
#[cold]
fn has_tiny_halves(cpu: &Cpu, op: &Op) -> bool {
    if cpu.vec.guard & guard::MXCSR == 0 {
        return false;
    }
    let slot = (op.imm >> 16) as usize & 0xffff;
    let first = std::mem::offset_of!(Cpu, vec) + std::mem::offset_of!(super::VectorState, ymm);
    let register = cpu.vec.ymm[(slot - first) / 32].0;
    let halves = usize::from(op.src) / 2;
    let single = |i: usize| (register[i / 2] >> (i % 2 * 32)) as u32;
    fp::has_tiny_half((0..halves).map(single))
}

/// Writes memory, or reads and writes it.
fn store<const G: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, G);
    let span = mem::span(cpu, op, op.src.into(), op.aux, Access::Write);
    store_to::<G>(cpu, op, span, false)
}

#[inline(always)]
fn store_to<const G: u8>(cpu: &mut Cpu, op: &Op, span: Result<Span, Fault>, tiny: bool) -> Flow {
    let size = usize::from(op.src);
    let span = match span {
        Ok(span) => span,
        Err(fault) => return cpu.raise(fault),
    };
    if G & guard::MXCSR != 0 && cpu.vec.guard & guard::MXCSR != 0 {
        // Nothing may be written if an exception turns out to be unmasked.
        let mut copy = Copy([0; MAX_OPERAND]);
        // SAFETY: the copy is as large and aligned as any operand.
        if let Err(fault) = unsafe { run_careful(cpu, op, copy.0.as_mut_ptr(), G, tiny) } {
            return cpu.raise(fault);
        }
        // SAFETY: the span has `size` bytes, at most `MAX_OPERAND`.
        unsafe { std::ptr::copy_nonoverlapping(copy.0.as_ptr(), span.ptr(), size) };
    } else {
        // SAFETY: the op is of this family; the memory operand was resolved for it.
        unsafe { run(cpu, op, span.ptr()) };
    }
    mem::commit(cpu, span)
}

/// Bytes of the largest memory operand of a stub.
const MAX_OPERAND: usize = 32;

#[repr(C, align(32))]
struct Copy([u8; MAX_OPERAND]);

/// x87 without memory operand.
fn x87_registers<const G: u8, const NOTE: bool>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, G);
    if NOTE {
        note_x87(cpu, op);
    }
    // SAFETY: the op is of this family and has no memory operand.
    unsafe { run(cpu, op, std::ptr::null_mut()) };
    Flow::Next
}

/// x87 that reads memory.
fn x87_load<const SIZE: usize>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87);
    let span = match mem::span(cpu, op, SIZE, 0, Access::Read) {
        Ok(span) => span,
        Err(fault) => return cpu.raise(fault),
    };
    note_x87(cpu, op);
    cpu.vec.pointers.fdp = cpu.offset(op);
    // SAFETY: the op is of this family; the memory operand was resolved for it.
    unsafe { run(cpu, op, span.ptr()) };
    Flow::Next
}

/// x87 that writes memory.
fn x87_store<const SIZE: usize>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87);
    let span = match mem::span(cpu, op, SIZE, 0, Access::Write) {
        Ok(span) => span,
        Err(fault) => return cpu.raise(fault),
    };
    note_x87(cpu, op);
    cpu.vec.pointers.fdp = cpu.offset(op);
    // SAFETY: the op is of this family; the memory operand was resolved for it.
    unsafe { run(cpu, op, span.ptr()) };
    mem::commit(cpu, span)
}

macro_rules! by_class {
    ($class:expr, $handler:ident $(, $size:expr)?) => {{
        let handler: Option<Handler> = match $class {
            class::NONE => Some($handler::<{ class::NONE } $(, $size)?>),
            class::SSE => Some($handler::<{ class::SSE } $(, $size)?>),
            class::SSE_FP => Some($handler::<{ class::SSE_FP } $(, $size)?>),
            class::AVX => Some($handler::<{ class::AVX } $(, $size)?>),
            class::AVX_FP => Some($handler::<{ class::AVX_FP } $(, $size)?>),
            class::MMX => Some($handler::<{ class::MMX } $(, $size)?>),
            class::MMX_SSE => Some($handler::<{ class::MMX_SSE } $(, $size)?>),
            class::MMX_SSE_FP => Some($handler::<{ class::MMX_SSE_FP } $(, $size)?>),
            _ => None,
        };
        handler
    }};
}

/// Compiles an instruction whose stub is `stub`.
pub fn compile(insn: &Instruction, stub: Stub) -> Option<HostOp> {
    let mut op =
        HostOp { handler: registers::<0>, imm: stub.slots, extra: stub.offset, ..HostOp::EMPTY };
    let class = classify(insn);
    let Some(access) = memory_access(insn) else {
        op.handler = by_class!(class, registers)?;
        if insn.mnemonic() == Mnemonic::Vcvtps2ph {
            op.handler = registers_halves;
            op.src = insn.op1_register().size() as u8 / 2;
        }
        return Some(op);
    };
    let size = insn.memory_size().size();
    if size == 0 || size > MAX_OPERAND {
        return None;
    }
    op.src = u8::try_from(size).ok()?;
    op.aux = demanded_alignment(insn, size);
    op.handler = match (access, size) {
        _ if insn.mnemonic() == Mnemonic::Vcvtph2ps => load_halves,
        _ if insn.mnemonic() == Mnemonic::Vcvtps2ph => store_halves,
        (OpAccess::Read, 4) => by_class!(class, load, 4)?,
        (OpAccess::Read, 8) => by_class!(class, load, 8)?,
        (OpAccess::Read, 16) => by_class!(class, load, 16)?,
        (OpAccess::Read, 32) => by_class!(class, load, 32)?,
        (OpAccess::Read, _) => by_class!(class, load, 0)?,
        _ => by_class!(class, store)?,
    };
    Some(op)
}

/// Compiles an x87 instruction whose stub is `stub`. `waits`: it looks for pending exceptions first.
pub fn compile_x87(insn: &Instruction, stub: Stub, waits: bool, fop: u16) -> Option<HostOp> {
    let mut op = HostOp {
        handler: x87_registers::<{ class::X87 }, true>,
        imm: u64::from(fop),
        extra: stub.offset,
        ..HostOp::EMPTY
    };
    let Some(access) = memory_access(insn) else {
        if !waits {
            op.handler = x87_registers::<{ class::X87_NOWAIT }, false>;
        }
        return Some(op);
    };
    op.handler = match (access, insn.memory_size().size()) {
        (OpAccess::Read, 2) => x87_load::<2>,
        (OpAccess::Read, 4) => x87_load::<4>,
        (OpAccess::Read, 8) => x87_load::<8>,
        (OpAccess::Read, 10) => x87_load::<10>,
        (OpAccess::Write, 2) => x87_store::<2>,
        (OpAccess::Write, 4) => x87_store::<4>,
        (OpAccess::Write, 8) => x87_store::<8>,
        (OpAccess::Write, 10) => x87_store::<10>,
        _ => return None,
    };
    Some(op)
}

/// How `insn` accesses its memory operand, if it has one.
pub(super) fn memory_access(insn: &Instruction) -> Option<OpAccess> {
    let operand = (0..insn.op_count()).find(|i| insn.op_kind(*i) == OpKind::Memory)?;
    match op_accesses(insn)[operand as usize] {
        OpAccess::CondRead => Some(OpAccess::Read),
        access => Some(access),
    }
}

/// How `insn` accesses each of its operands.
pub(super) fn op_accesses(insn: &Instruction) -> [OpAccess; MAX_OPS] {
    thread_local! {
        // Making one allocates.
        static FACTORY: RefCell<InstructionInfoFactory> =
            RefCell::new(InstructionInfoFactory::new());
    }
    const NOTHING_ELSE: u32 =
        InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
    FACTORY.with_borrow_mut(|factory| {
        let info = factory.info_options(insn, NOTHING_ELSE);
        std::array::from_fn(|i| info.op_access(i as u32))
    })
}

pub(super) fn classify(insn: &Instruction) -> u8 {
    let vex = insn.code().encoding() == EncodingKind::VEX;
    let mut mmx = insn.mnemonic() == Mnemonic::Emms;
    let mut vector = false;
    for i in 0..insn.op_count() {
        if insn.op_kind(i) == OpKind::Register {
            let register = insn.op_register(i);
            mmx |= register.is_mm();
            vector |= register.is_xmm() || register.is_ymm();
        }
    }
    // CVTSD2SI and its kind name no vector register if their source is in memory.
    let told = told_by_name(insn.mnemonic());
    vector |= told & name::CONVERTS != 0;
    let fp = if vector && told & name::INTEGER == 0 { guard::MXCSR } else { 0 };
    match (mmx, vector) {
        (true, true) => class::MMX_SSE | fp,
        (true, false) => class::MMX,
        (false, true) if vex => class::AVX | fp,
        (false, true) => class::SSE | fp,
        (false, false) => class::NONE,
    }
}

/// What the name of an instruction on vectors says of it.
mod name {
    /// That has been looked at.
    pub const KNOWN: u8 = 1;
    /// It converts.
    pub const CONVERTS: u8 = 2;
    /// It does not depend on MXCSR. Errs on the side of no.
    pub const INTEGER: u8 = 4;
}

/// [`name`] bits. Each is spelled once.
fn told_by_name(mnemonic: Mnemonic) -> u8 {
    static TOLD: LazyLock<Box<[AtomicU8]>> =
        LazyLock::new(|| Mnemonic::values().map(|_| AtomicU8::new(0)).collect());
    let told = &TOLD[mnemonic as usize];
    match told.load(Ordering::Relaxed) {
        0 => {
            let new = name::KNOWN | spelled(mnemonic);
            told.store(new, Ordering::Relaxed);
            new
        }
        known => known,
    }
}

fn spelled(mnemonic: Mnemonic) -> u8 {
    let name = format!("{mnemonic:?}").to_ascii_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    let integer = [
        "p",
        "mov",
        "aes",
        "sha",
        "unpck",
        "shuf",
        "and",
        "or",
        "xor",
        "blend",
        "insert",
        "extract",
        "lddqu",
        "broadcast",
        "test",
    ];
    let converts = if name.starts_with("cvt") { name::CONVERTS } else { 0 };
    let integer = integer.iter().any(|prefix| name.starts_with(prefix));
    converts | if integer { name::INTEGER } else { 0 }
}

/// Alignment mask of the memory operand (SDM vol. 2, 2.4 "Exception class" tables).
pub(super) fn demanded_alignment(insn: &Instruction, size: usize) -> u8 {
    use Mnemonic as M;
    let demanded = match insn.code().encoding() {
        EncodingKind::Legacy => {
            size == 16
                && !matches!(
                    insn.mnemonic(),
                    M::Movups
                        | M::Movupd
                        | M::Movdqu
                        | M::Lddqu
                        | M::Pcmpestri
                        | M::Pcmpestrm
                        | M::Pcmpistri
                        | M::Pcmpistrm
                        | M::Pcmpestri64
                        | M::Pcmpestrm64
                )
        }
        _ => matches!(
            insn.mnemonic(),
            M::Vmovaps
                | M::Vmovapd
                | M::Vmovdqa
                | M::Vmovntps
                | M::Vmovntpd
                | M::Vmovntdq
                | M::Vmovntdqa
        ),
    };
    if demanded { (size - 1) as u8 } else { 0 }
}
