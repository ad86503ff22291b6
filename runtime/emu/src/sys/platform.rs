//! What the vCPUs of one machine share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
    /// vCPUs that halted with interrupts off, or wait for a start-up IPI; above [`RESUMED`], how often one of them
    /// went on.
    stopped: AtomicU64,
}

/// One more that went on, in [`Platform::stopped`].
const RESUMED: u64 = 1 << 32;

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
            stopped: AtomicU64::new(0),
        })
    }

    /// Counts a vCPU that only others can wake.
    pub(crate) fn stop_one(&self) {
        self.stopped.fetch_add(1, Ordering::SeqCst);
    }

    /// Is nobody left to wake anybody? A counted vCPU takes its attention word only when it is not
    /// counted any more, so whatever was sent to it is either seen here or has uncounted it, which is seen afterwards.
    pub(crate) fn all_stopped(&self) -> bool {
        let before = self.stopped.load(Ordering::SeqCst);
        before % RESUMED >= u64::from(self.vcpus)
            && !(0..self.vcpus).any(|i| self.apics.port(i).attention.waits(reason::WAKING))
            && self.stopped.load(Ordering::SeqCst) == before
    }

    /// Takes such a vCPU back.
    pub(crate) fn resume_one(&self) {
        self.stopped.fetch_add(RESUMED - 1, Ordering::SeqCst);
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

    #[test]
    fn a_vcpu_that_looks_while_it_is_looked_at_is_not_stopped() {
        let platform = Platform::for_tests(2);
        let [first, second] = [0, 1].map(|i| &platform.apics.port(i).attention);
        let rounds = 0..100_000;
        let wait = |attention: &crate::sys::attention::Attention| {
            while !attention.waits(reason::UNHALT) {
                std::thread::yield_now();
            }
            platform.resume_one();
            attention.take();
        };
        // By turns each stops and is woken by the other one, so somebody always goes on.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in rounds.clone() {
                    platform.stop_one();
                    wait(second);
                    first.raise(reason::UNHALT);
                }
            });
            for round in rounds.clone() {
                platform.stop_one();
                second.raise(reason::UNHALT);
                assert!(!platform.all_stopped(), "round {round}");
                wait(first);
            }
        });
    }
}
