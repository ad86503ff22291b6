//! Model-specific registers.
//!
//! A state has those that every engine knows, in the order in which they are taken over, and of the rest in
//! the host's list those that the guest has changed. What the other side does not have it names, and goes on.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::Result;

/// Indices of MSRs (SDM vol. 4; APM vol. 2, appendix A; Linux, Documentation/virt/kvm/x86/msr.rst).
mod index {
    pub const TSC: u32 = 0x10;
    pub const WALL_CLOCK_OLD: u32 = 0x11;
    pub const SYSTEM_TIME_OLD: u32 = 0x12;
    pub const APIC_BASE: u32 = 0x1b;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const PAT: u32 = 0x277;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_LAST: u32 = 0x8ff;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const WALL_CLOCK: u32 = 0x4b56_4d00;
    pub const SYSTEM_TIME: u32 = 0x4b56_4d01;
    pub const STEAL_TIME: u32 = 0x4b56_4d03;
}

/// What every engine knows.
const SHARED: &[u32] = &[
    index::STAR,
    index::LSTAR,
    index::CSTAR,
    index::FMASK,
    index::KERNEL_GS_BASE,
    index::SYSENTER_CS,
    index::SYSENTER_ESP,
    index::SYSENTER_EIP,
    index::PAT,
    index::TSC_AUX,
    index::TSC_ADJUST,
    index::MISC_ENABLE,
    index::WALL_CLOCK,
    index::SYSTEM_TIME,
    index::STEAL_TIME,
];

/// What a state has elsewhere, or under another index.
const ELSEWHERE: &[u32] = &[
    index::TSC,
    index::WALL_CLOCK_OLD,
    index::SYSTEM_TIME_OLD,
    index::APIC_BASE,
    index::TSC_DEADLINE,
    index::EFER,
    index::FS_BASE,
    index::GS_BASE,
];

/// The host's MSRs that a state may have, with their values after power-up.
#[derive(Debug, Default)]
pub(in super::super) struct KnownMsrs {
    shared: Vec<u32>,
    rest: Vec<(u32, u64)>,
}

impl KnownMsrs {
    /// What this host's KVM keeps for vCPUs; `fresh` is one that has not run.
    pub fn learn(kvm: &Kvm, fresh: &VcpuFd) -> Result<Self> {
        let list =
            kvm.get_msr_index_list().map_err(super::failed("ask KVM for its list of MSRs"))?;
        let (shared, rest): (Vec<u32>, Vec<u32>) = list
            .as_slice()
            .iter()
            .copied()
            .filter(|i| !ELSEWHERE.contains(i))
            .filter(|i| !(index::X2APIC_FIRST..=index::X2APIC_LAST).contains(i))
            .partition(|i| SHARED.contains(i));
        let shared = SHARED.iter().copied().filter(|i| shared.contains(i)).collect();
        Ok(Self { shared, rest: read(fresh, &rest)? })
    }

    /// The MSRs of a vCPU's state.
    pub(super) fn export(&self, vcpu: &VcpuFd) -> Result<Vec<(u32, u64)>> {
        let mut msrs = read(vcpu, &self.shared)?;
        let rest: Vec<u32> = self.rest.iter().map(|&(index, _)| index).collect();
        let changed = read(vcpu, &rest)?.into_iter().filter(|msr| !self.rest.contains(msr));
        msrs.extend(changed);
        Ok(msrs)
    }
}

/// Reads MSRs; those that the vCPU does not have, whatever the list says, are left out.
fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>> {
    let mut values = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let batch = left.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES);
        let mut msrs = entries(left[..batch].iter().map(|&index| (index, 0)))?;
        let done = vcpu.get_msrs(&mut msrs).map_err(super::failed("read MSRs"))?;
        values.extend(msrs.as_slice().iter().take(done).map(|e| (e.index, e.data)));
        // The first that was refused is where it stopped.
        left = &left[(done + usize::from(done < batch)).min(left.len())..];
    }
    Ok(values)
}

/// Writes MSRs in order. Those refused are returned.
pub(super) fn write(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<Vec<(u32, u64)>> {
    let mut refused = Vec::new();
    let mut left = values;
    while !left.is_empty() {
        let batch = left.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES);
        let msrs = entries(left[..batch].iter().copied())?;
        let done = vcpu.set_msrs(&msrs).map_err(super::failed("write MSRs"))?;
        if done < batch {
            refused.push(left[done]);
        }
        left = &left[(done + usize::from(done < batch)).min(left.len())..];
    }
    Ok(refused)
}

fn entries(values: impl Iterator<Item = (u32, u64)>) -> Result<Msrs> {
    let entries: Vec<kvm_msr_entry> =
        values.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| super::no_memory())
}

/// The vCPU's time-stamp counter.
pub(super) fn tsc(vcpu: &VcpuFd) -> Result<u64> {
    Ok(read(vcpu, &[index::TSC])?.first().map_or(0, |&(_, value)| value))
}

/// Sets it where its offset cannot be set.
pub(super) fn set_tsc(vcpu: &VcpuFd, value: u64) -> Result<()> {
    write(vcpu, &[(index::TSC, value)]).map(drop)
}

/// The deadline of the local APIC's timer, 0 if it is not armed.
pub(super) fn tsc_deadline(vcpu: &VcpuFd) -> Result<u64> {
    Ok(read(vcpu, &[index::TSC_DEADLINE])?.first().map_or(0, |&(_, value)| value))
}

/// Arms it; the local APIC must be in its mode already.
pub(super) fn set_tsc_deadline(vcpu: &VcpuFd, value: u64) -> Result<()> {
    write(vcpu, &[(index::TSC_DEADLINE, value)]).map(drop)
}
