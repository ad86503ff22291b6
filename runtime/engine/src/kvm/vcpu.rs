//! One vCPU: the loop around KVM_RUN.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_enable_cap, kvm_mp_state,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::counters::Exits;
use super::fault;
use super::halt::Pace;
use super::kick::{INTR, KICK, KvmKick, Reach};
use super::state::{self, Access};
use super::sys::{self, RunPage, ThreadTimer};
use super::vm::{Machine, failed};
use crate::{CpuidEntry, Error, GuestFault, IoBus, Kick, Result, Vcpu, VcpuState, VmExit};

const RFLAGS_IF: u64 = 1 << 9;

/// A vCPU.
#[derive(Debug)]
pub(super) struct KvmVcpu {
    fd: VcpuFd,
    index: u32,
    machine: Arc<Machine>,
    reach: Arc<Reach>,
    exits: Arc<Exits>,
    /// What the guest sees.
    cpuid: Vec<CpuidEntry>,
    /// Interrupts runs, so that a dead guest is noticed; of the thread that ran last.
    timer: Option<ThreadTimer>,
    pace: Pace,
    /// It was stopped when it was looked at last.
    stopped: bool,
    /// KVM is asked to say when it takes an interrupt of the old controllers.
    window: bool,
}

/// An exit that the loop does not deal with by itself.
#[derive(Debug)]
enum Fatal {
    Shutdown,
    InternalError,
    FailEntry { reason: u64, cpu: u32 },
    MemoryFault { gpa: u64 },
    Unexpected,
}

impl KvmVcpu {
    pub fn new(
        fd: VcpuFd,
        index: u32,
        machine: Arc<Machine>,
        reach: Arc<Reach>,
        exits: Arc<Exits>,
        cpuid: Vec<CpuidEntry>,
    ) -> Result<Self> {
        let leaves = state::to_kvm(&cpuid).ok_or_else(|| Error::BadState {
            vcpu: index,
            reason: format!("{} CPUID leaves are too many for KVM", cpuid.len()),
        })?;
        fd.set_cpuid2(&leaves).map_err(failed("show a vCPU its processor"))?;
        if machine.fd.check_extension_raw(KVM_CAP_ENFORCE_PV_FEATURE_CPUID.into()) > 0 {
            // What is not shown cannot be used: another engine would not have it.
            let mut cap =
                kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, ..Default::default() };
            cap.args[0] = 1;
            fd.enable_cap(&cap).map_err(failed("limit a vCPU to what it is shown"))?;
        }
        let pace = Pace::new();
        Ok(Self {
            fd,
            index,
            machine,
            reach,
            exits,
            cpuid,
            timer: None,
            pace,
            stopped: false,
            window: false,
        })
    }

    /// This thread runs the vCPU from now on.
    fn enter(&mut self) -> Result<()> {
        let thread = sys::this_thread();
        if self.timer.as_ref().is_none_or(|timer| timer.thread() != thread) {
            let host = |what| move |source| Error::Host { what, source };
            sys::unblock_kick().map_err(host("let a signal through"))?;
            self.timer = Some(ThreadTimer::new().map_err(host("make a timer"))?);
        }
        self.reach.enter();
        if self.intr() {
            // A processor that halts sleeps in KVM_RUN: that it takes interrupts has to be known before.
            self.reach.ask_self(INTR);
        }
        self.pace = Pace::new();
        self.set_timer(self.pace.interval());
        Ok(())
    }

    fn leave(&mut self) {
        self.set_timer(Duration::ZERO);
        self.reach.leave();
        self.mark_alive();
    }

    fn set_timer(&self, interval: Duration) {
        if let Some(timer) = &self.timer {
            timer.set(interval);
        }
    }

    fn mark_alive(&mut self) {
        if std::mem::take(&mut self.stopped) {
            self.machine.rendezvous.leave(self.index as usize);
        }
    }

    fn run_to_exit(&mut self) -> Result<VmExit> {
        loop {
            let intr = self.intr();
            if intr != self.window {
                self.window = intr;
                self.reach.page().request_interrupt_window(intr);
            }
            match self.fd.run() {
                Ok(exit) => {
                    let open = matches!(exit, VcpuExit::IrqWindowOpen);
                    let (io, page) = (&*self.machine.io, self.reach.page());
                    if let Some(fatal) = dispatch(exit, io, page, &self.exits) {
                        return Ok(self.fatal(&fatal));
                    }
                    if self.pace.on_exit() {
                        self.set_timer(self.pace.interval());
                    }
                    self.mark_alive();
                    if open {
                        self.take_external()?;
                    }
                }
                Err(e) if e.errno() == libc::EINTR => {
                    if let Some(exit) = self.interrupted()? {
                        return Ok(exit);
                    }
                    self.take_external()?;
                }
                // A processor that waited to be started has got something to look at.
                Err(e) if e.errno() == libc::EAGAIN => {}
                Err(e) => {
                    self.exits.failed.add();
                    let reason = format!("KVM_RUN failed: {e}");
                    return Ok(VmExit::InternalError(Box::new(self.describe(reason, None))));
                }
            }
        }
    }

    /// Whether the old controllers ask for an interrupt.
    fn intr(&self) -> bool {
        self.index == 0 && self.machine.intr.load(Ordering::SeqCst)
    }

    /// Takes the interrupt that the old controllers ask for, if KVM said that the vCPU does.
    ///
    /// Only where KVM_RUN has returned between two instructions, with no access left to finish. The interrupt becomes one
    /// that is being delivered, which KVM tells of: what KVM_INTERRUPT leaves with it is not part of any state.
    fn take_external(&mut self) -> Result<()> {
        if !self.intr() || !self.reach.page().takes_interrupts() {
            return Ok(());
        }
        let mut events = self.fd.get_vcpu_events().map_err(failed("read pending events"))?;
        if events.interrupt.injected | events.nmi.injected | events.exception.injected != 0 {
            return Ok(());
        }
        let Some(vector) = self.machine.io.acknowledge() else { return Ok(()) };
        // What comes meanwhile (NMIs) stays as it is.
        events.flags = 0;
        events.interrupt.injected = 1;
        events.interrupt.soft = 0;
        events.interrupt.nr = vector;
        self.fd.set_vcpu_events(&events).map_err(failed("interrupt a vCPU"))?;
        let activity = self.fd.get_mp_state().map_err(failed("read a vCPU's activity"))?;
        if activity.mp_state == KVM_MP_STATE_HALTED {
            let runs = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
            self.fd.set_mp_state(runs).map_err(failed("wake a vCPU"))?;
        }
        self.exits.external.add();
        Ok(())
    }

    /// A signal ended KVM_RUN: somebody wants something, or it is time to look.
    fn interrupted(&mut self) -> Result<Option<VmExit>> {
        let wanted = self.reach.take();
        if wanted & KICK != 0 {
            self.exits.kicks.add();
            return Ok(Some(VmExit::Kicked));
        }
        if wanted == INTR {
            return Ok(None);
        }
        self.exits.looks.add();
        if self.is_stopped()? {
            self.stopped = true;
            let (index, others) = (self.index as usize, self.machine.reaches());
            if self.machine.rendezvous.all_stopped(index, &self.reach, &others) {
                // The mark stays: each vCPU finds the others' when it is run again.
                self.stopped = false;
                return Ok(Some(VmExit::HaltedForever));
            }
        } else {
            self.mark_alive();
        }
        self.pace.on_look();
        self.set_timer(self.pace.interval());
        Ok(None)
    }

    /// Whether only another vCPU can make this one run.
    fn is_stopped(&self) -> Result<bool> {
        let activity = self.fd.get_mp_state().map_err(failed("read a vCPU's activity"))?;
        match activity.mp_state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Ok(true),
            KVM_MP_STATE_HALTED => {
                let flags = self.fd.get_regs().map_err(failed("read registers"))?.rflags;
                let nmi = self.fd.get_vcpu_events().map_err(failed("read pending events"))?.nmi;
                let nmi_comes = nmi.injected != 0 || nmi.pending != 0 && nmi.masked == 0;
                Ok(flags & RFLAGS_IF == 0 && !nmi_comes)
            }
            _ => Ok(false),
        }
    }

    fn fatal(&mut self, fatal: &Fatal) -> VmExit {
        let (reason, bytes) = match fatal {
            Fatal::Shutdown => {
                let reason = "triple fault (KVM_EXIT_SHUTDOWN)".to_owned();
                return VmExit::TripleFault(Box::new(self.describe(reason, None)));
            }
            Fatal::InternalError => {
                let (suberror, data) = sys::internal_error(&mut self.fd);
                fault::internal_error(suberror, &data)
            }
            Fatal::FailEntry { reason, cpu } => (
                format!(
                    "the processor does not enter the guest (KVM_EXIT_FAIL_ENTRY, hardware reason \
                     {reason:#x} on processor {cpu})"
                ),
                None,
            ),
            Fatal::MemoryFault { gpa } => {
                (format!("no memory behind guest address {gpa:#x} (KVM_EXIT_MEMORY_FAULT)"), None)
            }
            Fatal::Unexpected => {
                (format!("unexpected exit {} of KVM", sys::exit_reason(&mut self.fd)), None)
            }
        };
        VmExit::InternalError(Box::new(self.describe(reason, bytes)))
    }

    fn describe(&self, reason: String, bytes: Option<Vec<u8>>) -> GuestFault {
        fault::describe(self.index, &self.fd, self.machine.slots.ram(), reason, bytes)
    }

    fn access(&mut self) -> Access<'_> {
        Access {
            vm: &self.machine.fd,
            vcpu: &mut self.fd,
            reach: &self.reach,
            index: self.index,
            model: self.machine.model,
            tsc_khz: self.machine.tsc_khz,
            xsave: self.machine.xsave,
            known: &self.machine.known,
            cpuid: &mut self.cpuid,
        }
    }
}

/// Deals with an exit.
#[inline]
fn dispatch(exit: VcpuExit<'_>, io: &dyn IoBus, page: &RunPage, exits: &Exits) -> Option<Fatal> {
    match exit {
        VcpuExit::IoOut(port, data) => {
            exits.io_out.add();
            // String instructions come with all their elements at once.
            data.chunks(page.io_size().max(1)).for_each(|item| io.pio_write(port, item));
        }
        VcpuExit::IoIn(port, data) => {
            exits.io_in.add();
            data.chunks_mut(page.io_size().max(1)).for_each(|item| io.pio_read(port, item));
        }
        VcpuExit::MmioRead(gpa, data) => {
            exits.mmio_read.add();
            for (offset, len) in pieces(gpa, data.len()) {
                io.mmio_read(gpa.wrapping_add(offset as u64), &mut data[offset..offset + len]);
            }
        }
        VcpuExit::MmioWrite(gpa, data) => {
            exits.mmio_write.add();
            for (offset, len) in pieces(gpa, data.len()) {
                io.mmio_write(gpa.wrapping_add(offset as u64), &data[offset..offset + len]);
            }
        }
        VcpuExit::IoapicEoi(vector) => {
            exits.eoi.add();
            io.eoi(vector);
        }
        VcpuExit::IrqWindowOpen => exits.irq_window.add(),
        VcpuExit::Intr => exits.looks.add(),
        VcpuExit::Shutdown => {
            exits.shutdown.add();
            return Some(Fatal::Shutdown);
        }
        other => {
            if matches!(other, VcpuExit::Hlt) {
                exits.hlt.add()
            } else {
                exits.failed.add()
            }
            return Some(match other {
                VcpuExit::InternalError => Fatal::InternalError,
                VcpuExit::FailEntry(reason, cpu) => Fatal::FailEntry { reason, cpu },
                VcpuExit::MemoryFault { gpa, .. } => Fatal::MemoryFault { gpa },
                _ => Fatal::Unexpected,
            });
        }
    }
    None
}

/// An access as accesses of 1, 2, 4 and 8 bytes: KVM also reports what is left of one that crosses into
/// RAM. A device may have any alignment, so only lengths matter.
fn pieces(gpa: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let left = len - offset;
        if left == 0 {
            return None;
        }
        let whole = left.is_power_of_two() && left <= 8;
        let aligned = 1 << (gpa.wrapping_add(offset as u64)).trailing_zeros().min(3);
        let fits = 1 << left.ilog2();
        let piece = if whole { left } else { fits.min(aligned) };
        offset += piece;
        Some((offset - piece, piece))
    })
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<VmExit> {
        self.enter()?;
        let exit = self.run_to_exit();
        self.leave();
        exit
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        let (reach, rendezvous) = (self.reach.clone(), self.machine.rendezvous.clone());
        Arc::new(KvmKick { reach, rendezvous })
    }

    fn state(&mut self) -> Result<VcpuState> {
        self.access().get()
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        let before = self.access().get()?;
        let taken = self.access().set(state);
        if taken.is_err()
            && let Err(e) = self.access().set(&before)
        {
            tracing::error!("vCPU {}: its own state is refused: {e}", self.index);
        }
        self.stopped = false;
        self.machine.rendezvous.revive(self.index as usize);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn odd_accesses_are_cut_into_even_ones() {
        let cut = |gpa, len| pieces(gpa, len).collect::<Vec<_>>();
        assert_eq!(cut(0x1001, 4), [(0, 4)]);
        assert_eq!(cut(0x1000, 8), [(0, 8)]);
        assert_eq!(cut(0x1000, 3), [(0, 2), (2, 1)]);
        assert_eq!(cut(0x1001, 7), [(0, 1), (1, 2), (3, 4)]);
        assert_eq!(cut(0x1000, 6), [(0, 4), (4, 2)]);
        assert_eq!(cut(0x1000, 0), []);
    }
}
