//! Questions to a table of CPUID leaves.

use super::CpuModel;
use super::features::Reg::{self, Eax, Ebx, Ecx, Edx};
use super::features::{FEATURES, Feature, Level};
use super::paravirt;
use super::paravirt::LEAF as PARAVIRT;
use super::table::Vendor;
use crate::CpuidEntry;

/// The four registers of an answer: EAX, EBX, ECX, EDX.
pub type Answer = [u32; 4];

/// CR4.OSXSAVE, which leaf 1 shows.
const CR4_OSXSAVE: u64 = 1 << 18;
/// The component of XCR0 that makes the XSAVE area larger.
const XCR0_AVX: u64 = 1 << 2;

/// Answers a query from `entries`, for a processor with these control registers.
pub fn answer(
    entries: &[CpuidEntry],
    vendor: Vendor,
    (leaf, subleaf): (u32, u32),
    cr4_value: u64,
    xcr0_value: u64,
) -> Answer {
    let Some(mut answer) = lookup(entries, leaf, subleaf) else {
        // Beyond the last basic leaf Intel answers as for that leaf, AMD with zeros.
        let max_basic = lookup(entries, 0, 0).map_or(0, |a| a[0]);
        let beyond = match leaf >> 16 {
            0x4000 | 0x8000 => false,
            _ => leaf > max_basic,
        };
        return match vendor {
            Vendor::Intel if beyond => lookup(entries, max_basic, subleaf).unwrap_or_default(),
            _ if leaf == 0xb => [0, 0, subleaf & 0xff, 0],
            _ => [0; 4],
        };
    };
    match (leaf, subleaf) {
        (1, _) if cr4_value & CR4_OSXSAVE != 0 => answer[2] |= 1 << 27,
        (0xd, 0) => answer[1] = xsave_size(xcr0_value),
        (0xd, 1) => answer[1] = xsave_size(xcr0_value),
        _ => {}
    }
    answer
}

/// The registers of `leaf` and `subleaf`, if the table has them.
pub fn lookup(entries: &[CpuidEntry], leaf: u32, subleaf: u32) -> Option<Answer> {
    entries
        .iter()
        .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
        .map(|e| [e.eax, e.ebx, e.ecx, e.edx])
}

/// Does the table show this feature?
fn shows(entries: &[CpuidEntry], feature: &Feature) -> bool {
    lookup(entries, feature.leaf, feature.subleaf)
        .is_some_and(|answer| answer[feature.reg as usize] >> feature.bit & 1 != 0)
}

/// Does the table show the feature called `name`?
pub(super) fn has(entries: &[CpuidEntry], name: &str) -> bool {
    FEATURES.iter().any(|f| f.name == name && shows(entries, f))
}

/// Registers in which each bit is something that the processor can do. A state of [`CpuModel::Host`] may have bits there
/// that nobody here has heard of.
const FLAGS: &[(u32, u32, &[Reg])] = &[
    (1, 0, &[Ecx, Edx]),
    (6, 0, &[Eax]),
    (7, 0, &[Ebx, Ecx, Edx]),
    (7, 1, &[Eax, Ebx, Ecx, Edx]),
    (7, 2, &[Edx]),
    // Components of XCR0, and how they can be saved.
    (0xd, 0, &[Eax, Edx]),
    (0xd, 1, &[Eax]),
    (PARAVIRT, 0, &[Eax]),
    (0x8000_0001, 0, &[Ecx, Edx]),
    (0x8000_0007, 0, &[Edx]),
    (0x8000_0008, 0, &[Ebx]),
    (0x8000_0021, 0, &[Eax]),
];

/// Leaf 1, ECX: what the operating system has done, not what the processor can do.
const OSXSAVE: u32 = 1 << 27;

/// Names of what `theirs` shows and `ours` does not; a bit without a name is called by its place.
pub fn missing(ours: &[CpuidEntry], theirs: &[CpuidEntry]) -> Vec<String> {
    let mut names = Vec::new();
    for &(leaf, subleaf, regs) in FLAGS {
        let Some(theirs) = lookup(theirs, leaf, subleaf) else { continue };
        let ours = lookup(ours, leaf, subleaf).unwrap_or_default();
        for &reg in regs {
            let mut lost = theirs[reg as usize] & !ours[reg as usize];
            if (leaf, reg) == (1, Ecx) {
                lost &= !OSXSAVE;
            }
            names.extend((0..32).filter(|bit| lost >> bit & 1 != 0).map(|bit| {
                let known = FEATURES
                    .iter()
                    .find(|f| (f.leaf, f.subleaf, f.reg, f.bit) == (leaf, subleaf, reg, bit));
                match (known, leaf) {
                    (Some(feature), _) => feature.name.to_owned(),
                    (None, PARAVIRT) => paravirt::name(bit),
                    (None, _) => {
                        let reg = format!("{reg:?}").to_uppercase();
                        format!("CPUID.{leaf:X}h.{subleaf}:{reg}[{bit}]")
                    }
                }
            }));
        }
    }
    names
}

/// Why a processor that shows `ours` cannot take over from one that shows `theirs`; `None` if it can, or if
/// nothing is known of theirs.
pub fn incompatible(ours: &[CpuidEntry], theirs: &[CpuidEntry]) -> Option<String> {
    let their_vendor = &lookup(theirs, 0, 0)?[1..];
    if lookup(ours, 0, 0).is_some_and(|ours| &ours[1..] != their_vendor) {
        return Some("it was taken on a processor of another vendor".into());
    }
    let missing = missing(ours, theirs);
    let named = || format!("features that this engine or host lacks: {}", missing.join(" "));
    (!missing.is_empty()).then(named)
}

/// What the levels of the System V ABI demand beyond the first one.
const REQUIRED: &[(Level, &[&str])] = &[
    (Level::V2, &["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"]),
    (Level::V3, &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"]),
];

/// Names of the features that a program for `model` may take for granted and `entries` does not
/// show.
pub fn lacking(model: CpuModel, entries: &[CpuidEntry]) -> Vec<&'static str> {
    let needed = REQUIRED.iter().filter(|(level, _)| match model {
        CpuModel::V2 => *level == Level::V2,
        CpuModel::V3 => true,
        CpuModel::Host => false,
    });
    needed.flat_map(|(_, names)| names.iter().copied()).filter(|n| !has(entries, n)).collect()
}

/// Bytes of the XSAVE area for the components in `xcr0`.
pub(super) fn xsave_size(components: u64) -> u32 {
    if components & XCR0_AVX != 0 { 832 } else { 576 }
}
