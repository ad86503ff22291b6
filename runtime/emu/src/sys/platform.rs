//! What the vCPUs of one machine share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mvm_engine::IoBus;
use mvm_engine::cpuid::{CpuModel, CpuidTable, PHYSICAL_BITS};

use super::alarm::Alarm;
use super::attention::reason;
use super::clock::Clock;
use super::control::cr4_bits;
use crate::apic::ApicBus;

/// Instructions that are undefined on a processor whose CPUID does not show them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instructions {
    /// INVPCID.
    pub invpcid: bool,
    /// CLAC and STAC.
    pub smap: bool,
    /// RDPID.
    pub rdpid: bool,
}

impl Instructions {
    fn of(model: &CpuidTable) -> Self {
        Self { invpcid: model.has("invpcid"), smap: model.has("smap"), rdpid: model.has("rdpid") }
    }
}

/// Devices, local APICs, clock and processor model of one machine.
#[derive(Debug)]
pub struct Platform {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Where port and MMIO accesses go.
    pub io: Arc<dyn IoBus>,
    /// All local APICs.
    pub apics: ApicBus,
    /// The clock.
    pub clock: Clock,
    /// How much of a processor the guest sees.
    pub cpu: CpuModel,
    /// The processor that the guest sees.
    pub model: CpuidTable,
    /// Bits of CR4 that this processor has.
    pub(crate) cr4: u64,
    /// Which instructions it has of those that the engine could always do.
    pub(crate) instructions: Instructions,
    /// Width of its physical addresses.
    pub(crate) physical_bits: u32,
    /// Timers of vCPUs that run translated code.
    pub(super) alarm: Alarm,
    /// vCPUs that halted with interrupts off, or wait for a start-up IPI.
    stopped: AtomicU32,
}

impl Platform {
    /// A machine of `vcpus` processors of model `cpu` over `io`, with a TSC of `tsc_khz`.
    pub fn new(cpu: CpuModel, vcpus: u32, io: Arc<dyn IoBus>, tsc_khz: u64) -> Arc<Self> {
        let model = CpuidTable::new(cpu, vcpus, tsc_khz, None);
        let address_sizes = model.entries(0).iter().find(|e| e.leaf == 0x8000_0008);
        Arc::new(Self {
            vcpus,
            io,
            apics: ApicBus::new(vcpus),
            clock: Clock::new(tsc_khz),
            cpu,
            cr4: cr4_bits(&model),
            instructions: Instructions::of(&model),
            physical_bits: address_sizes.map_or(PHYSICAL_BITS, |e| e.eax & 0xff),
            model,
            alarm: Alarm::new(vcpus, tsc_khz),
            stopped: AtomicU32::new(0),
        })
    }

    /// Counts a vCPU that only others can wake.
    pub(crate) fn stop_one(&self) {
        self.stopped.fetch_add(1, Ordering::SeqCst);
    }

    /// Is nobody left to wake anybody? A counted vCPU takes its attention word only when it is not
    /// counted any more, so whatever was sent to it is either seen here or has uncounted it.
    pub(crate) fn all_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst) >= self.vcpus
            && !(0..self.vcpus).any(|i| self.apics.port(i).attention.waits(reason::WAKING))
    }

    /// Takes such a vCPU back.
    pub(crate) fn resume_one(&self) {
        self.stopped.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
impl Platform {
    /// A machine without devices.
    pub(crate) fn for_tests(vcpus: u32) -> Arc<Self> {
        Self::new(CpuModel::V3, vcpus, Arc::new(mvm_engine::mock::NoBus), 2_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stops_last(platform: &Platform) -> bool {
        platform.stop_one();
        platform.all_stopped()
    }

    #[test]
    fn only_the_last_stopped_vcpu_is_the_end() {
        let platform = Platform::for_tests(2);
        assert!(!stops_last(&platform));
        platform.resume_one();
        assert!(!stops_last(&platform));
        assert!(stops_last(&platform));
    }

    #[test]
    fn a_vcpu_that_was_woken_and_has_not_looked_yet_is_not_stopped() {
        let platform = Platform::for_tests(2);
        let first = &platform.apics.port(0).attention;
        assert!(!stops_last(&platform));
        first.raise(reason::UNHALT);
        assert!(!stops_last(&platform), "vCPU 0 is about to run and may wake vCPU 1");
        // It looks, finds nothing to do, and stops again: now it is the end.
        platform.resume_one();
        first.take();
        assert!(stops_last(&platform));
    }
}
