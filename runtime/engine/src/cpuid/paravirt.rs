//! What a guest may ask of its hypervisor (Linux, `Documentation/virt/kvm/x86/cpuid.rst`): the part of
//! KVM's interface that every engine has.

/// Where the features are: its EAX.
pub(super) const LEAF: u32 = 0x4000_0001;

/// What feature `bit` is called.
pub(super) fn name(bit: u8) -> String {
    let name = match 1u32 << bit {
        feature::CLOCKSOURCE => "clocksource",
        feature::NOP_IO_DELAY => "nop_io_delay",
        feature::CLOCKSOURCE2 => "clocksource2",
        feature::STEAL_TIME => "steal_time",
        feature::PV_UNHALT => "pv_unhalt",
        feature::PV_TLB_FLUSH => "pv_tlb_flush",
        feature::CLOCKSOURCE_STABLE => "clocksource_stable",
        _ => return format!("kvm_feature_{bit}"),
    };
    format!("kvm_{name}")
}

/// Bits of it.
mod feature {
    pub const CLOCKSOURCE: u32 = 1 << 0;
    pub const NOP_IO_DELAY: u32 = 1 << 1;
    pub const CLOCKSOURCE2: u32 = 1 << 3;
    pub const STEAL_TIME: u32 = 1 << 5;
    pub const PV_UNHALT: u32 = 1 << 7;
    pub const PV_TLB_FLUSH: u32 = 1 << 9;
    pub const CLOCKSOURCE_STABLE: u32 = 1 << 24;
}

/// The features offered; `stable` if the host's TSC never changes its rate.
pub(super) fn features(stable: bool) -> u32 {
    feature::CLOCKSOURCE
        | feature::NOP_IO_DELAY
        | feature::CLOCKSOURCE2
        | feature::STEAL_TIME
        | feature::PV_UNHALT
        | feature::PV_TLB_FLUSH
        | if stable { feature::CLOCKSOURCE_STABLE } else { 0 }
}
