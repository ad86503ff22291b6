//! Model-specific registers by name and number, and which of them are a vCPU's state.
//!
//! Numbers are those of SDM vol. 4 and of APM vol. 2, appendix A; those of the paravirtual interface are from Linux,
//! `Documentation/virt/kvm/x86/msr.rst`.

macro_rules! msrs {
    ($($name:ident = $index:literal;)*) => {
        $(#[allow(missing_docs)] pub const $name: u32 = $index;)*

        /// All that have a name here.
        const NAMES: &[(u32, &str)] = &[$(($index, stringify!($name)),)*];
    };
}

msrs! {
    TSC = 0x10;
    WALL_CLOCK_OLD = 0x11;
    SYSTEM_TIME_OLD = 0x12;
    PLATFORM_ID = 0x17;
    APIC_BASE = 0x1b;
    TSC_ADJUST = 0x3b;
    BIOS_SIGN_ID = 0x8b;
    MTRR_CAP = 0xfe;
    SYSENTER_CS = 0x174;
    SYSENTER_ESP = 0x175;
    SYSENTER_EIP = 0x176;
    MCG_CAP = 0x179;
    MCG_STATUS = 0x17a;
    MISC_ENABLE = 0x1a0;
    DEBUG_CTL = 0x1d9;
    PAT = 0x277;
    TSC_DEADLINE = 0x6e0;
    X2APIC_FIRST = 0x800;
    X2APIC_LAST = 0x8ff;
    WALL_CLOCK = 0x4b56_4d00;
    SYSTEM_TIME = 0x4b56_4d01;
    STEAL_TIME = 0x4b56_4d03;
    EFER = 0xc000_0080;
    STAR = 0xc000_0081;
    LSTAR = 0xc000_0082;
    CSTAR = 0xc000_0083;
    FMASK = 0xc000_0084;
    FS_BASE = 0xc000_0100;
    GS_BASE = 0xc000_0101;
    KERNEL_GS_BASE = 0xc000_0102;
    TSC_AUX = 0xc000_0103;
    AMD_PERF_FIRST = 0xc001_0000;
    AMD_PERF_LAST = 0xc001_0007;
    AMD_SYSCFG = 0xc001_0010;
    AMD_HWCR = 0xc001_0015;
    AMD_NB_CFG = 0xc001_001f;
    AMD_INT_PENDING = 0xc001_0055;
    AMD_DE_CFG = 0xc001_1029;
}

/// The MSRs of a state that every engine knows, in the order in which they are taken over.
pub const STATE: &[u32] = &[
    STAR,
    LSTAR,
    CSTAR,
    FMASK,
    KERNEL_GS_BASE,
    SYSENTER_CS,
    SYSENTER_ESP,
    SYSENTER_EIP,
    PAT,
    TSC_AUX,
    TSC_ADJUST,
    MISC_ENABLE,
    BIOS_SIGN_ID,
    WALL_CLOCK,
    SYSTEM_TIME,
    STEAL_TIME,
];

/// MSRs that a state has elsewhere, or under another number.
pub const ELSEWHERE: &[u32] =
    &[TSC, WALL_CLOCK_OLD, SYSTEM_TIME_OLD, APIC_BASE, TSC_DEADLINE, EFER, FS_BASE, GS_BASE];

/// The registers of the local APIC in x2APIC mode.
pub const X2APIC: std::ops::RangeInclusive<u32> = X2APIC_FIRST..=X2APIC_LAST;

/// MSR `index` for people: its number, and its name if it has one here.
pub fn describe(index: u32) -> String {
    match NAMES.iter().find(|(number, _)| *number == index) {
        Some((_, name)) => format!("{index:#x} ({name})"),
        None => format!("{index:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_msr_is_there_once_and_in_one_place_of_a_state() {
        assert!(NAMES.is_sorted_by(|a, b| a.0 < b.0), "by number, each once");
        for (n, index) in STATE.iter().enumerate() {
            assert!(!STATE[..n].contains(index) && !ELSEWHERE.contains(index), "{index:#x}");
            assert!(NAMES.iter().any(|(number, _)| number == index), "{index:#x}");
        }
        assert!(STATE.iter().chain(ELSEWHERE).all(|index| !X2APIC.contains(index)));
    }

    #[test]
    fn names_are_told() {
        assert_eq!(describe(0xc000_0082), "0xc0000082 (LSTAR)");
        assert_eq!(describe(0x4b56_4d02), "0x4b564d02");
    }
}
