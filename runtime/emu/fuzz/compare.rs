//! What counts as a difference between the two outcomes of a case.

use std::fmt::Write as _;
use std::ops::Range;
use std::sync::OnceLock;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic as M,
    OpAccess, Register, RflagsBits, UsedRegister,
};
use mvm_emu::cpu::Cpu;
use mvm_engine::cpuid::Vendor;

use super::case::{Case, DATA, DATA_SIZE, GS_BASE, Outcome};
use super::engine::Engine;

/// Flags that are compared: all but RF, whose value in a signal frame is the host kernel's affair.
const FLAGS: u64 = 0x24_7dd5;
/// OF, SF, ZF, AF, PF and CF.
const ARITHMETIC: u64 = 0x8d5;
/// Addresses from here on belong to the kernel, which hides whether they are mapped.
const KERNEL: u64 = (1 << 47) - 4096;

/// Names in the order of [`super::case::State::gpr`].
pub const GPR: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// Whether undefined flags are compared too (`FUZZ_STRICT=1`): a way to see what the masks hide.
fn is_strict() -> bool {
    static STRICT: OnceLock<bool> = OnceLock::new();
    *STRICT.get_or_init(|| std::env::var_os("FUZZ_STRICT").is_some())
}

/// The differences, as lines of a report. Empty: none.
pub fn differences(
    engine: &mut Engine,
    case: &Case,
    native: &Outcome,
    ours: &Outcome,
) -> Vec<String> {
    let mut lines = Vec::new();
    let mut note = |what: &str, native: u64, ours: u64| {
        lines.push(format!("{what}: host {native:#x}, engine {ours:#x}"));
    };
    let (a, b) = (&native.state, &ours.state);
    let apart = Apart::of(case, native, ours);
    // Operands around the end of a segment of 4 GiB.
    let around = case.compat != 0
        && native.vector == 14
        && matches!(ours.vector, 12 | 13)
        && (native.address as u32).wrapping_add(512) < 1024;
    // A push that begins below address 0, and ends there or not.
    let below = case.compat != 0
        && matches!(native.vector, 12 | 13)
        && ours.vector == 14
        && (ours.address as u32).wrapping_add(512) < 1024;
    if apart.all || around || below {
        return Vec::new();
    }
    if native.vector != ours.vector {
        note("vector", native.vector, ours.vector);
    } else {
        let mut ignored = 0;
        if native.vector == 14 {
            if native.address >= KERNEL {
                ignored = 1;
            }
            if apart.address > 0 {
                ignored |= 1;
            }
            let distance = native.address.wrapping_sub(ours.address);
            if distance.min(distance.wrapping_neg()) > apart.address {
                note("fault address", native.address, ours.address);
            }
        }
        if (native.error ^ ours.error) & !ignored != 0 {
            note("error code", native.error, ours.error);
        }
    }
    if a.rip != b.rip {
        note("rip", a.rip, b.rip);
    }
    for (i, name) in GPR.iter().enumerate() {
        if (a.gpr[i] ^ b.gpr[i]) & !apart.gpr[i] != 0 {
            note(name, a.gpr[i], b.gpr[i]);
        }
    }
    let mut flags = (a.rflags ^ b.rflags) & FLAGS;
    if apart.flags {
        flags &= !ARITHMETIC;
    }
    if flags != 0 && (is_strict() || flags & !undefined_flags(case, a.rip) != 0) {
        note("rflags", a.rflags & FLAGS, b.rflags & FLAGS);
    }
    vectors(&a.xsave, &b.xsave, &apart, &mut lines);
    if native.data != ours.data {
        memory(engine, case, native, ours, &apart, &mut lines);
    }
    lines
}

/// What processors may do differently where a case ended with an exception.
#[derive(Default)]
struct Apart {
    /// All of it.
    all: bool,
    /// How far the addresses of a page fault may be from each other (and then also tell of different
    /// pages): instructions that make several accesses, in an order of their own.
    address: u64,
    /// The x87 registers.
    x87: bool,
    /// Arithmetic flags: a string instruction that faults may have set them for what it has done.
    flags: bool,
    /// Flags of MXCSR.
    mxcsr: u8,
    /// Vector registers of which only so many bytes count.
    registers: Vec<(usize, usize)>,
    /// Bits of general registers.
    gpr: [u64; 16],
    /// Part of memory: start and size.
    memory: Option<(u64, u64)>,
}

impl Apart {
    fn of(case: &Case, native: &Outcome, ours: &Outcome) -> Self {
        let mut apart = Self::default();
        let mut info = InstructionInfoFactory::new();
        for insn in instructions(case) {
            // Whoever reads all of RCX behind that makes more of it.
            let used = info.info(&insn).used_registers();
            let reads = |r: &UsedRegister| {
                r.register() == Register::RCX && !matches!(r.access(), OpAccess::Write)
            };
            apart.all |= apart.gpr[1] != 0 && used.iter().any(reads);
            match insn.mnemonic() {
                // With a count of zero in ECX, the upper half of RCX may stay.
                _ if insn.is_string_instruction() && has_short_count(case, &insn) => {
                    apart.gpr[1] = 0xffff_ffff_0000_0000;
                }
                // NOP with REX.B is XCHG, and PAUSE with it is either.
                M::Pause if insn.len() > 2 => apart.all = true,
                _ => {}
            }
        }
        if apart.all {
            return apart;
        }
        let memory_fault = |outcome: &Outcome| matches!(outcome.vector, 12..=14 | 17);
        // Where they part: at the earlier end. A stray branch is later than anything in the code.
        let place = |outcome: &Outcome| {
            let offset = outcome.state.rip.wrapping_sub(case.state.rip);
            if offset <= case.len.into() { offset } else { u64::MAX }
        };
        // x87 stores: if an exception is unmasked, nothing is stored, and then it may be that nothing is
        // accessed. Whatever comes after it is another story.
        let at_store = instructions(case)
            .into_iter()
            .any(|i| i.ip() == ours.state.rip && format!("{:?}", i.mnemonic()).starts_with('F'));
        let unmasked = !ours.state.xsave[0] & 0x3f != 0;
        let same = (ours.state.rip, ours.vector) == (native.state.rip, native.vector);
        if at_store && unmasked && memory_fault(ours) && !same {
            apart.all = true;
            return apart;
        }
        if is_up_to_the_processor(case, native, ours) {
            apart.all = true;
            return apart;
        }
        let end = if place(ours) <= place(native) { ours } else { native };
        let single_step =
            [ours, native].iter().any(|o| o.vector == 1 && o.state.rip == end.state.rip);
        if !memory_fault(end) && end.vector != 19 && !single_step {
            return apart;
        }
        let rip = end.state.rip;
        let Some(insn) = instructions(case).into_iter().find(|i| i.ip() == rip) else {
            return apart;
        };
        if single_step {
            // Single-step traps in the middle of a gather are allowed.
            apart.all = format!("{:?}", insn.mnemonic()).contains("gather");
            return apart;
        }
        // Whether the host raised the exception and the engine went on.
        let native_only = memory_fault(native) && place(ours) > place(native);
        let has_mmx = (0..insn.op_count()).any(|i| insn.op_register(i).is_mm());
        let name = format!("{:?}", insn.mnemonic());
        let gpr = &ours.state.gpr;
        if insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix()) {
            // With 32-bit addresses the upper half may be cleared even if the first element faults.
            apart.gpr[1] = 0xffff_ffff_0000_0000;
            apart.flags = true;
        }
        match insn.mnemonic() {
            // Beyond the end of a segment, and not aligned either.
            _ if case.compat != 0 && native.vector == 13 && ours.vector == 12 => apart.all = true,
            // The host may look at the alignment before limits and types of segments.
            _ if case.compat != 0
                && native.vector == 17
                && matches!(ours.vector, 12 | 13)
                && (is_at_end(gpr, &insn) || name.starts_with("Xsave")) =>
            {
                apart.all = true;
            }
            // Whether the second bound is read if the first is enough.
            M::Bound => apart.all = native.vector == 5,
            // Which of two bad operands is found first.
            _ if name.starts_with("Cmps") && insn.is_string_instruction() => {
                apart.all = memory_fault(native) && memory_fault(ours);
            }
            // The return address may have been pushed before the target turns out to be bad.
            M::Call if ours.vector == 13 => {
                let size = if bitness(case) == 64 { 8 } else { 4 };
                apart.memory = Some((gpr[4].wrapping_sub(size), size));
                // And the push may fault.
                apart.all = native.vector != 13;
            }
            M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fnsave
            | M::Frstor
            | M::Fnstenv
            | M::Fldenv => {
                apart.address = 512;
                apart.all = native.vector == 14 && ours.vector == 13;
            }
            // Zen probes up to the end of the largest area.
            _ if name.starts_with("Xsave") || name.starts_with("Xrstor") => {
                apart.address = 4096;
                apart.all = native_only
                    || native.vector == 14 && ours.vector == 13
                    || native.vector == 13 && ours.vector == 17;
            }
            // With an empty mask, faults are the implementation's choice.
            M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu if native_only => apart.all = true,
            _ if name.contains("askmov") => {
                apart.address = 32;
                apart.x87 = has_mmx;
            }
            // The conversion may come before the store faults.
            M::Vcvtps2ph => {
                apart.mxcsr = 0x3f;
                apart.all = native.vector == 19 && memory_fault(ours);
            }
            // How far it came may be lost: then the registers are as before.
            _ if name.contains("gather") && Vendor::of_host() == Vendor::Amd => {
                apart.registers.push((insn.op0_register().number(), 0));
                apart.registers.push((insn.op2_register().number(), 0));
            }
            // What lies beyond the elements may be zero already, or a mask in full.
            _ if name.contains("gather") => {
                let index = if name.contains("gatherd") { 4 } else { 8 };
                let element = insn.memory_size().size().max(1);
                let count =
                    (insn.memory_index().size() / index).min(insn.op0_register().size() / element);
                let bytes = count * element;
                for register in [insn.op0_register(), insn.op2_register()] {
                    apart.registers.push((register.number(), bytes));
                }
            }
            // Across the end of the canonical addresses, in two halves or at once.
            _ if native.vector == 14
                && ours.vector == 13
                && native.address >= KERNEL
                && is_vector_access(&insn) =>
            {
                apart.all = true;
            }
            // Zen loses what PUSH and POP did to the stack pointer before a conversion to it that raises #XM: a small
            // program shows the same without any engine.
            _ if native.vector == 19
                && insn.op0_register().full_register() == Register::RSP
                && Vendor::of_host() == Vendor::Amd =>
            {
                apart.gpr[4] = u64::MAX;
            }
            // Several steps, each with exceptions.
            M::Dpps | M::Dppd | M::Vdpps | M::Vdppd => apart.mxcsr = 0x3f,
            // 80-bit operands are two accesses.
            M::Fld | M::Fbld if native.vector == 14 && ours.vector == 13 => apart.all = true,
            // The part in the first page may have been stored.
            M::Fstp | M::Fbstp if insn.memory_size().size() == 10 => {
                apart.memory = operand_address(gpr, &insn).map(|at| (at, 10));
            }
            // The transition to MMX may have happened.
            _ if has_mmx => apart.x87 = true,
            _ => {}
        }
        if end.vector == 19 && native.state.xsave[24] & 0x18 != 0 {
            // Whether a result that overflows or underflows is inexact as well.
            apart.mxcsr |= 0x20;
        }
        apart
    }

    /// Bytes that count of vector register `i`.
    fn bytes(&self, i: usize) -> usize {
        self.registers.iter().find(|(n, _)| *n == i).map_or(32, |(_, bytes)| *bytes)
    }
}

/// x87 and SIMD registers.
fn vectors(a: &[u8], b: &[u8], apart: &Apart, lines: &mut Vec<String>) {
    let mut field = |name: String, range: Range<usize>| {
        if a[range.clone()] != b[range.clone()] {
            lines.push(format!(
                "{name}: host {}, engine {}",
                hex(&a[range.clone()]),
                hex(&b[range])
            ));
        }
    };
    if !apart.x87 {
        field("fcw".into(), 0..2);
        field("fsw".into(), 2..4);
        field("ftw".into(), 4..5);
        for i in 0..8 {
            field(format!("st{i}"), 32 + i * 16..42 + i * 16);
        }
    }
    // Bytes 6 to 24 are the pointers to the last x87 instruction: AMD processors keep them in images only
    // while an exception is pending. FOP and FDP are not defined after instructions of every kind.
    if a[2] & 0x80 != 0 && !apart.x87 {
        field("fip".into(), 8..16);
    }
    if (a[24] ^ b[24]) & !apart.mxcsr != 0 || a[25..28] != b[25..28] {
        field("mxcsr".into(), 24..28);
    }
    for i in 0..16 {
        let bytes = apart.bytes(i);
        field(format!("xmm{i}"), 160 + i * 16..160 + i * 16 + bytes.min(16));
        if bytes > 16 {
            field(format!("ymm{i} high"), 576 + i * 16..560 + i * 16 + bytes);
        }
    }
}

/// Bytes, most significant first.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().fold(String::from("0x"), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn memory(
    engine: &mut Engine,
    case: &Case,
    native: &Outcome,
    ours: &Outcome,
    apart: &Apart,
    lines: &mut Vec<String>,
) {
    let mut masked = vec![false; DATA_SIZE];
    if let Some((at, size)) = apart.memory
        && let Some(at) = at.checked_sub(DATA)
        && at < DATA_SIZE as u64
    {
        masked[at as usize..((at + size) as usize).min(DATA_SIZE)].fill(true);
    }
    for range in implementation_defined(engine, case, native, ours) {
        masked[range].fill(true);
    }
    let mut shown = 0;
    for at in (0..DATA_SIZE).step_by(8) {
        let differs = (at..at + 8).any(|i| !masked[i] && native.data[i] != ours.data[i]);
        if differs {
            shown += 1;
            if shown <= 12 {
                lines.push(format!(
                    "[{:#x}]: host {}, engine {}",
                    DATA + at as u64,
                    hex(&native.data[at..at + 8]),
                    hex(&ours.data[at..at + 8])
                ));
            }
        }
    }
    if shown > 12 {
        lines.push(format!("and {} more words of memory", shown - 12));
    }
}

/// A field of a state image.
type Field = (u64, u64);
/// FOP, FIP, FDP; the mask of MXCSR.
const LEGACY: [Field; 2] = [(6, 24), (28, 32)];
/// The pointers and selectors of an x87 environment of 28 bytes, and of 14.
const POINTERS: [Field; 1] = [(12, 28)];
const SMALL_POINTERS: [Field; 1] = [(6, 14)];

/// Where in the window state images leave what each processor has its own way with.
fn implementation_defined(
    engine: &mut Engine,
    case: &Case,
    native: &Outcome,
    ours: &Outcome,
) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let bits = bitness(case);
    let mut look = |cpu: &mut Cpu| {
        let Some(insn) = instruction_at(cpu, bits) else { return };
        let (fields, kind): (&[Field], _) = match insn.mnemonic() {
            M::Fxsave | M::Fxsave64 => (&LEGACY, 1),
            M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => {
                (&LEGACY, 2)
            }
            M::Fnstenv | M::Fnsave => match insn.memory_size().size() {
                14 | 94 => (&SMALL_POINTERS, 0),
                _ => (&POINTERS, 0),
            },
            _ => return,
        };
        let Some(base) = operand_address(&cpu.gpr, &insn) else { return };
        let mut add = |from: u64, to: u64| {
            let (from, to) = (base.wrapping_add(from), base.wrapping_add(to));
            if from < DATA + DATA_SIZE as u64 && to > DATA && from < to {
                let start = from.saturating_sub(DATA) as usize;
                let end = (to - DATA).min(DATA_SIZE as u64) as usize;
                ranges.push(start..end);
            }
        };
        for (start, end) in fields {
            add(*start, *end);
        }
        if kind > 0 {
            // The reserved bytes of ST registers.
            for st in 0..8 {
                add(32 + st * 16 + 10, 48 + st * 16);
            }
        }
        if kind == 2 {
            // XSTATE_BV: a component in its initial state may be said to be in use. If the two
            // say different things of such a component, its part of the area differs too.
            let at = base.wrapping_add(512).wrapping_sub(DATA) as usize;
            if at < DATA_SIZE {
                let bits = u64::from(native.data[at] ^ ours.data[at]);
                if bits & !initial_components(case, native) == 0 && bits != 0 {
                    add(512, 513);
                    for (bit, from, to) in [(1, 0, 24), (1, 32, 160), (2, 160, 416), (4, 576, 832)]
                    {
                        if bits & bit != 0 {
                            add(from, to);
                        }
                    }
                    if bits & 2 != 0 {
                        add(24, 32);
                    }
                }
            }
        }
    };
    engine.trace(case, &mut look);
    ranges
}

/// The components whose registers hold their initial values. In 32-bit code, those that it sees.
fn initial_components(case: &Case, outcome: &Outcome) -> u64 {
    let x = &outcome.state.xsave;
    let zero = |range: Range<usize>| x[range].iter().all(|b| *b == 0);
    let x87 = x[0..2] == [0x7f, 3] && zero(2..5) && (0..8).all(|i| zero(32 + i * 16..42 + i * 16));
    let size = if case.compat != 0 { 8 * 16 } else { 16 * 16 };
    u64::from(x87) | u64::from(zero(160..160 + size)) << 1 | u64::from(zero(576..576 + size)) << 2
}

fn instruction_at(cpu: &mut Cpu, bits: u32) -> Option<Instruction> {
    let bytes = cpu.peek(cpu.rip, 15);
    let mut decoder = Decoder::with_ip(bits, &bytes, cpu.rip, DecoderOptions::NONE);
    let insn = decoder.decode();
    (!insn.is_invalid()).then_some(insn)
}

fn operand_address(gpr: &[u64], insn: &Instruction) -> Option<u64> {
    let operand = (0..insn.op_count()).find(|i| insn.op_kind(*i) == iced_x86::OpKind::Memory)?;
    insn.virtual_address(operand, 0, |register: Register, _, _| {
        if register == Register::GS {
            Some(GS_BASE)
        } else if register.is_segment_register() {
            Some(0)
        } else {
            let full = gpr[register.full_register().number()];
            Some(if register.size() == 4 { full & 0xffff_ffff } else { full })
        }
    })
}

/// Whether `insn` is repeated as often as ECX says although there is RCX.
fn has_short_count(case: &Case, insn: &Instruction) -> bool {
    let start = (insn.ip() - case.state.rip) as usize;
    let bytes = &case.code[start..start + insn.len()];
    let repeated = insn.has_rep_prefix() || insn.has_repne_prefix();
    case.compat == 0 && repeated && bytes.contains(&0x67)
}

/// Exceptions that some processors raise and others do not.
fn is_up_to_the_processor(case: &Case, native: &Outcome, ours: &Outcome) -> bool {
    let code = instructions(case);
    let at = |outcome: &Outcome| code.iter().find(|insn| insn.ip() == outcome.state.rip);
    // Whether the alignment of vectors is checked: the first Zen does.
    if native.vector == 17 && at(native).is_some_and(is_vector_access) {
        return true;
    }
    // LOCK MOV CR0 is MOV CR8 on AMD's processors, and privileged.
    let bytes = &case.code[..case.len as usize];
    let start = ours.state.rip.wrapping_sub(case.state.rip);
    let here = usize::try_from(start).ok().and_then(|start| bytes.get(start..)).unwrap_or_default();
    let code_at = here.iter().position(|byte| *byte == 0x0f).unwrap_or_default();
    if (native.vector, ours.vector) == (13, 6)
        && here[..code_at].contains(&0xf0)
        && matches!(here.get(code_at + 1), Some(0x20 | 0x22))
    {
        return true;
    }
    // MOVSXD of 16 bits: AMD's processors read 32.
    if matches!(native.vector, 14 | 17)
        && at(native).is_some_and(|insn| insn.code() == Code::Movsxd_r16_rm16)
    {
        return true;
    }
    at(ours).is_some_and(|insn| match insn.mnemonic() {
        // The first Zen takes operands that are not aligned.
        M::Sha1msg1
        | M::Sha1msg2
        | M::Sha1nexte
        | M::Sha1rnds4
        | M::Sha256msg1
        | M::Sha256msg2
        | M::Sha256rnds2 => ours.vector == 13,
        // It does not look at what of the operand has no part in the result.
        M::Vmovddup => ours.vector == 14 && insn.memory_size().size() == 32,
        _ => false,
    })
}

/// Whether `insn` has a vector in memory, or half of one.
fn is_vector_access(insn: &Instruction) -> bool {
    let wide = |register: Register| register.is_xmm() || register.is_ymm();
    let vector = (0..insn.op_count()).any(|i| wide(insn.op_register(i)));
    let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == iced_x86::OpKind::Memory);
    vector && memory && insn.memory_size().size() >= 8
}

/// Is an operand of `insn` around the end of a segment of 4 GiB?
fn is_at_end(gpr: &[u64], insn: &Instruction) -> bool {
    let stack = insn.is_stack_instruction().then_some(gpr[4]);
    let string = insn.is_string_instruction().then_some([gpr[6], gpr[7]]);
    let operands = operand_address(gpr, insn).into_iter().chain(stack);
    operands.chain(string.into_iter().flatten()).any(|at| (at as u32).wrapping_add(512) < 1024)
}

/// 64 or 32.
pub fn bitness(case: &Case) -> u32 {
    if case.compat != 0 { 32 } else { 64 }
}

/// The instructions of a case as they are before it runs, with their addresses.
pub fn instructions(case: &Case) -> Vec<Instruction> {
    let code = &case.code[..case.len as usize];
    Decoder::with_ip(bitness(case), code, case.state.rip, DecoderOptions::NONE)
        .into_iter()
        .collect()
}

/// Flags without defined value when the instruction at `rip` is about to run (or, for the trap that
/// ends a case, has run).
fn undefined_flags(case: &Case, rip: u64) -> u64 {
    let mut undefined = 0;
    let end = case.state.rip + u64::from(case.len);
    let astray = !(case.state.rip..=end).contains(&rip);
    for insn in instructions(case) {
        if insn.ip() >= rip && !astray {
            break;
        }
        // An instruction that a branch may skip defines nothing.
        let skipped = insn.mnemonic() == M::Inc && insn.op0_register() == Register::AL;
        if !skipped && !astray {
            undefined &= !defined_flags(&insn);
        }
        undefined |= flag_bits(insn.rflags_undefined());
    }
    undefined
}

/// The differences between the two tiers of the engine, in the same terms: none but flags that are undefined, or that
/// no instruction reads before it writes them, where an exception ended the case.
pub fn between_tiers(case: &Case, interpreted: &Outcome, translated: &Outcome) -> Vec<String> {
    let rip = interpreted.state.rip;
    let mask = FLAGS & (undefined_flags(case, rip) | dead_flags(case, rip));
    let mut ours = *translated;
    if (ours.state.rflags ^ interpreted.state.rflags) & !mask == 0 {
        ours.state.rflags = interpreted.state.rflags;
    }
    if interpreted.same(&ours) {
        return Vec::new();
    }
    let mut lines = vec!["the translator ends it otherwise (host: the interpreter):".to_owned()];
    let (a, b) = (&interpreted.state, &ours.state);
    let mut note = |what: &str, a: u64, b: u64| {
        if a != b {
            lines.push(format!("{what}: host {a:#x}, engine {b:#x}"));
        }
    };
    note("vector", interpreted.vector, ours.vector);
    note("error code", interpreted.error, ours.error);
    note("fault address", interpreted.address, ours.address);
    note("rip", a.rip, b.rip);
    note("rflags", a.rflags, b.rflags);
    for (name, (a, b)) in GPR.iter().zip(a.gpr.iter().zip(&b.gpr)) {
        note(name, *a, *b);
    }
    vectors(&a.xsave, &b.xsave, &Apart::default(), &mut lines);
    for (i, (a, b)) in interpreted.data.chunks_exact(8).zip(ours.data.chunks_exact(8)).enumerate() {
        if a != b && lines.len() < 24 {
            lines.push(format!("[{:#x}]: host {}, engine {}", DATA + i as u64 * 8, hex(a), hex(b)));
        }
    }
    lines
}

/// Flags that are written before anything reads them from `rip` on, as far as no branch comes.
fn dead_flags(case: &Case, rip: u64) -> u64 {
    let mut dead = 0;
    let mut read = 0;
    for insn in instructions(case).into_iter().skip_while(|i| i.ip() != rip) {
        read |= flag_bits(insn.rflags_read());
        dead |= flag_bits(insn.rflags_modified()) & !read;
        if insn.flow_control() != FlowControl::Next {
            break;
        }
    }
    dead
}

/// Flags that `insn` gives a value to, whatever its operands are.
pub fn defined_flags(insn: &Instruction) -> u64 {
    let counted = matches!(
        insn.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd | M::Rol | M::Ror | M::Rcl | M::Rcr
    );
    if counted || insn.has_rep_prefix() || insn.has_repne_prefix() {
        // A count of zero leaves the flags alone.
        return 0;
    }
    flag_bits(insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set())
}

/// iced's flag bits as RFLAGS.
pub fn flag_bits(bits: u32) -> u64 {
    [
        (RflagsBits::OF, 0x800),
        (RflagsBits::SF, 0x80),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::AF, 0x10),
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 4),
    ]
    .iter()
    .filter(|(iced, _)| bits & iced != 0)
    .map(|(_, flag)| flag)
    .sum()
}
