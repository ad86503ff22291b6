//! What happens between blocks: interrupts, IPIs, the timer, sleep.

use mvm_engine::{MpState, VmExit};

use super::attention::reason;
use super::clock::host_tsc;
use crate::apic::NMIS_MAX;
use crate::cpu::Cpu;
use crate::fault::vector;
use crate::flags::rflags;

/// What the block loop does next.
#[derive(Debug)]
pub enum Service {
    /// Runs blocks.
    Run,
    /// Calls [`Cpu::sleep`], then [`Cpu::service_events`] again.
    Sleep,
    /// Returns from `run`.
    Exit(VmExit),
}

impl Cpu {
    /// Looks at everything that came in, delivers at most one interrupt, and tells whether the
    /// vCPU runs on. To be called at an instruction boundary outside an interrupt shadow, when the
    /// attention word is not zero or the vCPU halts.
    pub fn service_events(&mut self) -> Service {
        // Before the word is taken: see `Platform::stop_one`.
        self.leave_stop();
        let reasons = self.take_messages();
        if reasons & reason::KICK != 0 {
            // Anything else that waits must be looked at by the next run.
            self.sys.attention().raise_self(reason::INTERRUPT);
            // Stays counted if it goes on as it was: it may not be run again soon.
            if self.only_others_wake() {
                self.count_stopped();
            }
            return Service::Exit(VmExit::Kicked);
        }
        if reasons & reason::INTERRUPT != 0 {
            self.sys.lapic.note_port_errors();
        }
        self.sys.lapic.poll_timer(host_tsc());
        match self.deliver_pending() {
            Ok(()) => {}
            Err(shutdown) => return Service::Exit(VmExit::TripleFault(shutdown.0)),
        }
        match self.sys.activity {
            MpState::Running => Service::Run,
            _ if self.only_others_wake() => self.stop(),
            _ => Service::Sleep,
        }
    }

    /// Brings what others have sent into the vCPU's state, so that the state is whole while nobody runs it. What
    /// remains is noted again.
    pub(crate) fn settle(&mut self) {
        // Counted as stopped or not, as before.
        let counted = self.sys.counted_stopped;
        self.leave_stop();
        let reasons = self.take_messages();
        self.sys.attention().raise_self(reasons & (reason::KICK | reason::INTERRUPT));
        self.sys.lapic.note_port_errors();
        self.sys.lapic.poll_timer(host_tsc());
        if counted && self.only_others_wake() {
            self.count_stopped();
        }
    }

    /// Takes all reasons for attention and does what INIT, start-up IPI, NMI and kicks ask for.
    fn take_messages(&mut self) -> u32 {
        let reasons = self.sys.attention().take();
        if reasons & reason::INIT != 0 {
            self.init();
        }
        if reasons & reason::SIPI != 0 && self.sys.activity == MpState::WaitForSipi {
            let vector = self.sys.lapic.port().sipi_vector();
            self.start_up(vector);
        }
        // A processor that waits for a SIPI ignores them (SDM vol. 3, 9.4.1).
        if reasons & reason::NMI != 0 {
            let came = self.sys.lapic.port().take_nmis();
            if self.sys.activity != MpState::WaitForSipi {
                let room = if self.sys.nmi_masked { 1 } else { NMIS_MAX };
                self.sys.nmis_pending = self.sys.nmis_pending.saturating_add(came).min(room);
            }
        }
        if reasons & reason::UNHALT != 0 {
            self.unhalt();
        }
        reasons
    }

    fn deliver_pending(&mut self) -> Result<(), super::deliver::Shutdown> {
        if self.sys.activity == MpState::WaitForSipi {
            return Ok(());
        }
        if let Some(vector) = self.sys.external.take() {
            self.deliver_interrupt(vector)?;
        } else if self.sys.nmis_pending > 0 && !self.sys.nmi_masked {
            self.wake();
            self.sys.nmis_pending -= 1;
            self.deliver_interrupt(vector::NMI)?;
            self.sys.nmi_masked = true;
        } else if self.sysflags & rflags::IF != 0
            && let Some(vector) = self.take_external()
        {
            self.wake();
            self.deliver_interrupt(vector)?;
        } else if self.sysflags & rflags::IF != 0
            && let Some(vector) = self.sys.lapic.deliverable()
        {
            self.wake();
            self.sys.lapic.accept(vector);
            self.deliver_interrupt(vector)?;
        }
        let waiting = self.sys.lapic.port().irr.highest().is_some();
        let external = self.sys.lapic.external_requested();
        self.sys.lapic.held = waiting || external;
        if (waiting && self.sys.lapic.deliverable().is_some() || external)
            && self.sysflags & rflags::IF != 0
        {
            // An NMI or trap gate came first: look again at the next boundary.
            self.sys.attention().raise_self(reason::INTERRUPT);
        }
        Ok(())
    }

    /// The interrupt that the old controllers ask for, acknowledged. It comes before those of the local APIC, as in KVM.
    fn take_external(&mut self) -> Option<u8> {
        self.sys.lapic.external_requested().then(|| self.sys.platform.io.acknowledge()).flatten()
    }

    pub(crate) fn wake(&mut self) {
        self.sys.activity = MpState::Running;
    }

    fn unhalt(&mut self) {
        if self.sys.activity == MpState::Halted {
            self.wake();
        } else {
            self.sys.pv.unhalted = true;
        }
    }

    /// Waits for a start-up IPI, or halted with interrupts off and no NMI to come.
    fn only_others_wake(&self) -> bool {
        match self.sys.activity {
            MpState::Running => false,
            MpState::WaitForSipi => true,
            MpState::Halted => {
                let nmi = self.sys.nmis_pending > 0 && !self.sys.nmi_masked;
                self.sysflags & rflags::IF == 0 && !nmi
            }
        }
    }

    /// Sleeps where only another vCPU can wake it. If all are such, it is the end, and each of them says so when it
    /// is run again.
    fn stop(&mut self) -> Service {
        self.count_stopped();
        if self.sys.platform.all_stopped() {
            Service::Exit(VmExit::HaltedForever)
        } else {
            Service::Sleep
        }
    }

    fn count_stopped(&mut self) {
        self.sys.counted_stopped = true;
        self.sys.platform.stop_one();
    }

    /// Is no longer counted among those that only others can wake.
    pub(crate) fn leave_stop(&mut self) {
        if std::mem::take(&mut self.sys.counted_stopped) {
            self.sys.platform.resume_one();
        }
    }

    /// Sleeps until something happens: an event from another thread, or the APIC timer.
    pub fn sleep(&mut self) {
        let timeout = match self.sys.activity {
            MpState::Halted => self.sys.lapic.time_left(),
            _ => None,
        };
        self.mark_preempted();
        self.sys.attention().sleep(timeout);
        self.clear_preempted();
    }

    /// Lets the APIC timer expire. The block loop calls this every few hundred blocks: it costs
    /// one RDTSC, and nothing has to run while a timer is armed.
    #[inline]
    pub fn poll_timer(&mut self) {
        let now = host_tsc();
        if now >= self.sys.lapic.deadline() {
            self.sys.lapic.poll_timer(now);
        }
    }

    /// IRET: NMIs may come again.
    pub(crate) fn unmask_nmi(&mut self) {
        if std::mem::take(&mut self.sys.nmi_masked) && self.sys.nmis_pending > 0 {
            self.sys.attention().raise_self(reason::INTERRUPT);
        }
    }
}
