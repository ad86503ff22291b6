//! What a guest may ask of its hypervisor (Linux, `Documentation/virt/kvm/x86/cpuid.rst`): the part of
//! KVM's interface that every engine has.

/// Bits of leaf 0x4000_0001 EAX.
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
