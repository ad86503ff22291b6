//! Time-stamp counter and kvmclock.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, kvm_clock_data};
use kvm_ioctls::{VcpuFd, VmFd};

use super::super::sys;
use super::{failed, msrs};
use crate::tsc::host_tsc;
use crate::{ClockState, Result};

/// How far a time-stamp counter may be off after it was set, in seconds, before somebody is told.
const SLACK_SECONDS: u64 = 1;

/// The clocks of a vCPU.
#[derive(Debug)]
pub(super) struct Clocks<'a> {
    pub vm: &'a VmFd,
    pub vcpu: &'a VcpuFd,
    pub index: u32,
    pub tsc_khz: u64,
}

impl Clocks<'_> {
    pub fn get(&self) -> Result<ClockState> {
        let (tsc, at) = self.tsc()?;
        let before = host_tsc();
        let data = self.vm.get_clock().map_err(failed("read the clock"))?;
        let read_at = match data.flags & KVM_CLOCK_HOST_TSC {
            0 => middle(before, host_tsc()),
            _ => data.host_tsc,
        };
        let tsc_khz = self.tsc_khz;
        let clock = ClockState { tsc_khz, kvmclock_ns: data.clock, host_tsc: read_at, tsc: 0 };
        Ok(ClockState { tsc, ..clock.at(at) })
    }

    /// The guest's counter and the host's at one moment.
    fn tsc(&self) -> Result<(u64, u64)> {
        let before = host_tsc();
        let value = msrs::tsc(self.vcpu)?;
        let after = host_tsc();
        // The distance of the two is exact, but a KVM that cannot move the counter may tell of one that is not
        // kept.
        if let Ok(offset) = sys::tsc_offset(self.vcpu) {
            let counted = value.wrapping_sub(before.wrapping_add(offset));
            if counted <= after.wrapping_sub(before) {
                return Ok((before.wrapping_add(offset), before));
            }
        }
        Ok((value, middle(before, after)))
    }

    pub fn set(&self, clock: &ClockState) -> Result<()> {
        let clock = clock.now();
        if self.index == 0 && clock.kvmclock_ns != 0 {
            // One clock for all: the first vCPU brings it.
            let kvmclock_ns = clock.at(host_tsc()).kvmclock_ns;
            let data = kvm_clock_data { clock: kvmclock_ns, ..kvm_clock_data::default() };
            self.vm.set_clock(&data).map_err(failed("set the clock"))?;
        }
        if clock.tsc == 0 {
            return Ok(());
        }
        // By its offset where that can be set: a value that is written is taken for an attempt to
        // synchronize with another vCPU, and may be changed.
        let offset = clock.tsc.wrapping_sub(clock.host_tsc);
        let moved = sys::set_tsc_offset(self.vcpu, offset);
        // Where guests use the host's counter as it is KVM takes an offset and forgets it.
        if moved.and_then(|()| sys::tsc_offset(self.vcpu)) != Ok(offset) {
            msrs::set_tsc(self.vcpu, clock.at(host_tsc()).tsc)?;
        }
        let (tsc, at) = self.tsc()?;
        let off = tsc.wrapping_sub(clock.at(at).tsc).cast_signed().unsigned_abs();
        if off > self.tsc_khz.saturating_mul(1000 * SLACK_SECONDS) {
            tracing::warn!(
                vcpu = self.index,
                "this host's KVM cannot set a guest's time-stamp counter: it jumps by {off} ticks"
            );
        }
        Ok(())
    }
}

/// A moment between two others.
fn middle(before: u64, after: u64) -> u64 {
    before.wrapping_add(after.wrapping_sub(before) / 2)
}
