//! Model-specific registers.
//!
//! A state has those that every engine knows, in the order in which they are taken over, and of the rest in
//! the host's list those that the guest has changed. What the other side does not have it names, and goes on.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::{Result, msr};

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
            .filter(|i| !msr::ELSEWHERE.contains(i))
            .filter(|i| !msr::X2APIC.contains(i))
            .partition(|i| msr::STATE.contains(i));
        let shared = msr::STATE.iter().copied().filter(|i| shared.contains(i)).collect();
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
    Ok(read(vcpu, &[msr::TSC])?.first().map_or(0, |&(_, value)| value))
}

/// Sets it where its offset cannot be set.
pub(super) fn set_tsc(vcpu: &VcpuFd, value: u64) -> Result<()> {
    write(vcpu, &[(msr::TSC, value)]).map(drop)
}

/// The deadline of the local APIC's timer, 0 if it is not armed.
pub(super) fn tsc_deadline(vcpu: &VcpuFd) -> Result<u64> {
    Ok(read(vcpu, &[msr::TSC_DEADLINE])?.first().map_or(0, |&(_, value)| value))
}

/// Arms it; the local APIC must be in its mode already.
pub(super) fn set_tsc_deadline(vcpu: &VcpuFd, value: u64) -> Result<()> {
    write(vcpu, &[(msr::TSC_DEADLINE, value)]).map(drop)
}
