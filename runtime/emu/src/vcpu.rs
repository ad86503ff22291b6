//! One vCPU: the loop between blocks and everything else.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use mvm_engine::{Error, Kick, MpState, Result, Vcpu, VcpuState, VmExit};

use crate::block::{Dispatcher, Stop};
use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::flags::rflags;
use crate::sys::attention::reason;
use crate::sys::{Platform, Service};
use crate::vm::VcpuCounters;

/// Offset of XSTATE_BV's low byte, and of the upper halves of YMM registers, in an XSAVE area (SDM vol. 1, 13.4).
const XSTATE_BV: usize = 512;
const AVX_OFFSET: usize = 576;
/// Component of the upper halves of YMM registers.
const AVX: u64 = 1 << 2;

/// A vCPU of the emulation engine.
#[derive(Debug)]
pub struct EmuVcpu {
    cpu: Cpu,
    dispatcher: Dispatcher,
    platform: Arc<Platform>,
    counters: Arc<VcpuCounters>,
    events: u32,
}

/// Events (interrupts, mostly ticks of the timer) between two publications of the counters.
const EVENTS_PER_PUBLICATION: u32 = 16;

impl EmuVcpu {
    pub(crate) fn new(
        cpu: Cpu,
        dispatcher: Dispatcher,
        platform: Arc<Platform>,
        counters: Arc<VcpuCounters>,
    ) -> Self {
        let (nudged, index) = (platform.clone(), cpu.sys.index);
        if dispatcher.jit().is_some() {
            // Set once: the vCPU is the only one with these counters.
            let _ = counters.calls.set(cpu.jit.calls());
        }
        cpu.mmu.guard().on_request(move || nudged.apics.port(index).attention.raise(reason::SYNC));
        Self { cpu, dispatcher, platform, counters, events: 0 }
    }

    /// The processor.
    #[cfg(test)]
    pub(crate) fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }

    /// What runs its blocks.
    #[cfg(test)]
    pub(crate) fn dispatcher_mut(&mut self) -> &mut Dispatcher {
        &mut self.dispatcher
    }

    /// Both.
    #[cfg(test)]
    pub(crate) fn parts(&self) -> (&Dispatcher, &Cpu) {
        (&self.dispatcher, &self.cpu)
    }

    fn run_to_exit(&mut self) -> VmExit {
        if let Some(fault) = self.cpu.fault.take()
            && let Err(exit) = self.deliver(fault)
        {
            return exit;
        }
        loop {
            // An exception that the first instruction of a new task would have, or whose delivery takes its time.
            if self.cpu.sys.deferred.is_some()
                && let Some(fault) = self.cpu.sys.deferred.take()
                && let Err(exit) = self.deliver(fault)
            {
                return exit;
            }
            // A trap by an instruction that was not stepped: SYSRET that sets TF, a switch to a task that asks for it.
            if !self.cpu.shadow
                && self.cpu.sys.hits != 0
                && let Some(trap) = self.cpu.take_trap()
                && let Err(exit) = self.deliver(trap)
            {
                return exit;
            }
            if !self.cpu.shadow
                && (self.cpu.sys.attention().any() || self.cpu.sys.activity != MpState::Running)
            {
                self.cpu.mmu.obey_if_asked();
                // One that never sleeps is looked at too.
                self.events = self.events.wrapping_add(1);
                if self.events.is_multiple_of(EVENTS_PER_PUBLICATION) {
                    self.publish_counters();
                }
                match self.cpu.service_events() {
                    Service::Run => {}
                    Service::Sleep => {
                        self.sleep();
                        continue;
                    }
                    Service::Exit(exit) => return exit,
                }
            }
            // One that another took the place of.
            if self.cpu.sys.deferred.is_some() {
                continue;
            }
            let stepped = if self.cpu.stepping() {
                self.step_with_traps()
            } else if self.cpu.shadow {
                self.cpu.shadow = false;
                let stop = self.dispatcher.step(&mut self.cpu);
                self.after(stop)
            } else {
                let stop = self.dispatcher.run(&mut self.cpu);
                self.after(stop)
            };
            if let Err(exit) = stepped {
                return exit;
            }
        }
    }

    /// What is to be done where the dispatcher stopped.
    fn after(&mut self, stop: Stop) -> std::result::Result<(), VmExit> {
        match stop {
            Stop::Fault => {
                let fault = self.cpu.fault.take().unwrap_or(Fault::UD);
                self.deliver(fault)
            }
            // Whoever halts has set the vCPU's activity, which the loop looks at.
            Stop::Attention | Stop::Halt | Stop::Stepped | Stop::Look => Ok(()),
        }
    }

    /// One instruction with breakpoints before and traps after it.
    fn step_with_traps(&mut self) -> std::result::Result<(), VmExit> {
        if let Some(fault) = self.cpu.before_step() {
            return self.deliver(fault);
        }
        let flags = self.cpu.sysflags;
        self.cpu.shadow = false;
        let stop = self.dispatcher.step(&mut self.cpu);
        if stop == Stop::Fault {
            self.cpu.sys.hits = 0;
            return self.after(stop);
        }
        // RF that was not there before comes from an IRET, for the next instruction.
        let restored = !flags & self.cpu.sysflags & rflags::RF != 0;
        match self.cpu.after_step(flags, restored) {
            Some(trap) => self.deliver(trap),
            None => Ok(()),
        }
    }

    fn deliver(&mut self, fault: Fault) -> std::result::Result<(), VmExit> {
        self.counters.exceptions.fetch_add(1, Ordering::Relaxed);
        self.cpu.shadow = false;
        // A trap after HLT comes at once: its handler runs.
        self.cpu.wake();
        self.cpu.deliver(fault).map_err(|shutdown| VmExit::TripleFault(shutdown.0))
    }

    fn sleep(&mut self) {
        self.counters.sleeps.fetch_add(1, Ordering::Relaxed);
        self.publish_counters();
        self.dispatcher.rest();
        self.cpu.mmu.leave();
        self.cpu.sleep();
        self.cpu.mmu.enter();
    }

    fn publish_counters(&self) {
        let c = &self.counters;
        c.instructions.store(self.dispatcher.instructions, Ordering::Relaxed);
        c.blocks.store(self.dispatcher.cache().decoded, Ordering::Relaxed);
        c.cache_bytes.store(self.dispatcher.cache().used() as u64, Ordering::Relaxed);
        c.cache_emptied.store(self.dispatcher.cache().emptied, Ordering::Relaxed);
        c.walks.store(self.cpu.mmu.walks, Ordering::Relaxed);
        if let Some(jit) = self.dispatcher.jit() {
            *c.translator.lock().unwrap_or_else(PoisonError::into_inner) = jit.figures(&self.cpu);
        }
    }
}

impl Vcpu for EmuVcpu {
    fn run(&mut self) -> Result<VmExit> {
        self.cpu.vec.enter();
        self.cpu.mmu.enter();
        let exit = self.run_to_exit();
        self.dispatcher.rest();
        self.cpu.mmu.leave();
        self.cpu.vec.leave();
        self.publish_counters();
        Ok(exit)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(EmuKick { platform: self.platform.clone(), index: self.cpu.sys.index })
    }

    fn state(&mut self) -> Result<VcpuState> {
        let mut xsave = self.cpu.vec.to_xsave().to_vec();
        if self.cpu.sys.xcr0 & AVX == 0 {
            // A processor without AVX, or where it was never switched on: others would not take its component.
            xsave[XSTATE_BV] &= !(AVX as u8);
            xsave[AVX_OFFSET..].fill(0);
        }
        Ok(self.cpu.export_state(xsave))
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        let before = self.cpu.vec.to_xsave();
        let bad =
            |reason: &str| Error::BadState { vcpu: self.cpu.sys.index, reason: reason.into() };
        if !state.xsave.is_empty() {
            self.cpu.vec.from_xsave(&state.xsave).map_err(bad)?;
        }
        let taken = self.cpu.import_state(state);
        if taken.is_err() && self.cpu.vec.from_xsave(&before).is_err() {
            tracing::error!("vCPU {}: its own vector state is refused", self.cpu.sys.index);
        }
        taken
    }
}

/// Ends a run.
#[derive(Debug)]
struct EmuKick {
    platform: Arc<Platform>,
    index: u32,
}

impl Kick for EmuKick {
    fn kick(&self) {
        self.platform.apics.port(self.index).attention.raise(reason::KICK);
    }
}
