//! What the kvm engine needs of the host's KVM: one list for the engine, which refuses to start
//! without, and for the probe, which says so before anything is started.

use kvm_ioctls::{Cap, Kvm};

/// The only version of the interface there is (Linux, Documentation/virt/kvm/api.rst, 4.1).
pub const API_VERSION: i32 = 12;

/// An extension without which the kvm engine does not work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// What KVM_CHECK_EXTENSION is asked for.
    pub cap: Cap,
    /// Its name in the kernel's documentation.
    pub name: &'static str,
}

const fn need(cap: Cap, name: &'static str) -> Need {
    Need { cap, name }
}

/// Every extension that the kvm engine needs. Each has been in Linux since 4.12 or longer.
pub const NEEDS: &[Need] = &[
    need(Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    need(Cap::DestroyMemoryRegionWorks, "KVM_CAP_DESTROY_MEMORY_REGION_WORKS"),
    need(Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    need(Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    // Local APICs in the kernel, our own I/O APIC.
    need(Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    need(Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    need(Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    need(Cap::Irqfd, "KVM_CAP_IRQFD"),
    need(Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    need(Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    // A vCPU's state, whole.
    need(Cap::MpState, "KVM_CAP_MP_STATE"),
    need(Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    need(Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    need(Cap::Xsave, "KVM_CAP_XSAVE"),
    // Time.
    need(Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    need(Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    // A vCPU leaves the guest when it is asked to, without a race.
    need(Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// The needs that `kvm` does not meet.
pub fn unmet(kvm: &Kvm) -> Vec<Need> {
    NEEDS.iter().copied().filter(|need| !kvm.check_extension(need.cap)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_needed_twice_and_names_fit() {
        for (at, need) in NEEDS.iter().enumerate() {
            assert!(NEEDS[at + 1..].iter().all(|n| n.cap != need.cap && n.name != need.name));
            let name: String = need.name["KVM_CAP_".len()..].replace('_', "").to_lowercase();
            assert_eq!(name, format!("{:?}", need.cap).to_lowercase());
        }
    }
}
