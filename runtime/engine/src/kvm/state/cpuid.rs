//! CPUID leaves to and from KVM.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::{CpuidEntry, Result};

/// Leaves that KVM may tell of.
const MAX_ENTRIES: usize = kvm_bindings::KVM_MAX_CPUID_ENTRIES;

/// CPUID 1 ECX: the local APIC's timer has the TSC-deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;

/// What this host's KVM can show.
pub(in super::super) fn supported(kvm: &Kvm) -> Result<Vec<CpuidEntry>> {
    let all = kvm
        .get_supported_cpuid(MAX_ENTRIES)
        .map_err(super::failed("ask KVM for the processor that it supports"))?;
    let mut entries: Vec<CpuidEntry> = all.as_slice().iter().map(from_kvm).collect();
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        // Older kernels tell of this one by the extension alone.
        entries.iter_mut().filter(|e| e.leaf == 1).for_each(|e| e.ecx |= TSC_DEADLINE);
    }
    Ok(entries)
}

fn from_kvm(e: &kvm_cpuid_entry2) -> CpuidEntry {
    let indexed = e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    CpuidEntry {
        leaf: e.function,
        subleaf: indexed.then_some(e.index),
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
    }
}

/// The leaves for KVM_SET_CPUID2; `None` if there are too many.
pub(in super::super) fn to_kvm(entries: &[CpuidEntry]) -> Option<CpuId> {
    let entries: Vec<kvm_cpuid_entry2> = entries
        .iter()
        .map(|e| kvm_cpuid_entry2 {
            function: e.leaf,
            index: e.subleaf.unwrap_or(0),
            flags: if e.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries).ok()
}
