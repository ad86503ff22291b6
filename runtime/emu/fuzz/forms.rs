//! The forms of instructions that cases are made of: iced's codes, times register or memory operand.

use std::collections::{BTreeMap, HashSet};

use iced_x86::{Code, CpuidFeature as F, EncodingKind, Mnemonic as M, OpCodeOperandKind as K};
use mvm_emu::host::HostFeatures;

/// A code with its modifiable operand in a register or in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Form {
    pub code: Code,
    pub memory: bool,
}

/// Why a code takes no part.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Left {
    /// Not an instruction of this mode, or of a feature that the engine does not offer.
    NotOffered,
    /// System instructions, tested by the tests of `sys`.
    System,
    /// The result is the machine's own affair: time, randomness, identity.
    Undetermined,
    /// Would change the child itself: system calls, segment bases.
    Escapes,
}

/// All forms for 64-bit mode, and the codes left out with the reason.
pub fn all(bitness: u32) -> (Vec<Form>, Vec<(Code, Left)>) {
    let features = HostFeatures::detect();
    let mut forms = Vec::new();
    let mut left = Vec::new();
    for code in Code::values() {
        match reason(code, bitness, features) {
            Some(reason) => left.push((code, reason)),
            None => {
                let kinds = code.op_code().op_kinds();
                let either = kinds.iter().any(|k| or_memory(*k));
                let only = kinds.iter().any(|k| only_memory(*k));
                if !only {
                    forms.push(Form { code, memory: false });
                }
                if either || only {
                    forms.push(Form { code, memory: true });
                }
            }
        }
    }
    (forms, left)
}

/// The codes of all forms.
pub fn codes(bitness: u32) -> HashSet<Code> {
    all(bitness).0.into_iter().map(|form| form.code).collect()
}

/// How many codes take no part, by reason.
pub fn left_line(left: &[(Code, Left)]) -> String {
    let mut counts = BTreeMap::new();
    for (_, reason) in left {
        *counts.entry(*reason).or_insert(0u32) += 1;
    }
    let parts: Vec<_> = counts.iter().map(|(reason, n)| format!("{n} {reason:?}")).collect();
    format!("codes left out: {}", parts.join(", "))
}

/// Register or memory.
pub fn or_memory(kind: K) -> bool {
    matches!(
        kind,
        K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
    )
}

/// Memory in any case.
pub fn only_memory(kind: K) -> bool {
    matches!(
        kind,
        K::mem | K::mem_offs | K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y
    )
}

fn reason(code: Code, bitness: u32, features: &HostFeatures) -> Option<Left> {
    let info = code.op_code();
    let mode = if bitness == 64 { info.mode64() } else { info.mode32() };
    if !info.is_instruction()
        || !mode
        || !matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        || info.fwait()
    {
        return Some(Left::NotOffered);
    }
    let system = |f: &F| {
        matches!(
            f,
            F::CX8
                | F::CMPXCHG16B
                | F::PAUSE
                | F::SYSCALL
                | F::SEP
                | F::TSC
                | F::RDTSCP
                | F::MSR
                | F::CPUID
                | F::FSGSBASE
                | F::INVPCID
                | F::SMAP
                | F::RDPMC
                | F::INTEL286_ONLY
        )
    };
    if !code.cpuid_features().iter().all(|f| features.has(*f) || system(f)) {
        return Some(Left::NotOffered);
    }
    let mnemonic = code.mnemonic();
    match mnemonic {
        // 0F 0D with a register: nothing on Intel's processors, undefined on AMD's.
        M::Reservednop if format!("{code:?}").ends_with("_0F0D") => {
            return Some(Left::Undetermined);
        }
        M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Cpuid | M::Xgetbv | M::Rdpmc => {
            return Some(Left::Undetermined);
        }
        M::Syscall
        | M::Sysenter
        | M::Sysexit
        | M::Sysret
        | M::Int
        | M::Wrfsbase
        | M::Wrgsbase
        | M::Rdfsbase
        | M::Rdgsbase
        | M::Swapgs => {
            return Some(Left::Escapes);
        }
        M::Sgdt
        | M::Sidt
        | M::Sldt
        | M::Str
        | M::Smsw
        | M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Lds
        | M::Les
        | M::Lfs
        | M::Lgs
        | M::Lss
        | M::Iret
        | M::Iretd
        | M::Iretq
        | M::Retf
        | M::Monitor
        | M::Mwait
        | M::Vmcall
        | M::Vmmcall
        | M::Cli
        | M::Sti => {
            return Some(Left::System);
        }
        M::Ud0 | M::Ud1 | M::Xsaves | M::Xrstors | M::Xsaves64 | M::Xrstors64 => {
            return Some(Left::NotOffered);
        }
        // Loads a selector, or is far.
        M::Mov | M::Pop | M::Push if info.op_kinds().contains(&K::seg_reg) => {
            return Some(Left::System);
        }
        M::Pop | M::Push
            if info
                .op_kinds()
                .iter()
                .any(|k| matches!(k, K::es | K::cs | K::ss | K::ds | K::fs | K::gs)) =>
        {
            return Some(Left::System);
        }
        M::Call | M::Jmp
            if code.is_call_far()
                || code.is_jmp_far()
                || code.is_call_far_indirect()
                || code.is_jmp_far_indirect() =>
        {
            return Some(Left::System);
        }
        _ => {}
    }
    // Operand-size prefixes on near branches differ between vendors in 64-bit mode.
    if bitness == 64
        && info
            .op_kinds()
            .iter()
            .any(|k| matches!(k, K::br16_1 | K::br16_2 | K::br32_1 | K::br32_4))
    {
        return Some(Left::NotOffered);
    }
    if bitness == 64 && info.operand_size() == 16 && matches!(mnemonic, M::Ret | M::Call | M::Jmp) {
        return Some(Left::NotOffered);
    }
    if !info.cpl3() || info.must_be_cpl0() || info.is_input_output() || info.may_require_cpl0() {
        return Some(Left::System);
    }
    None
}
