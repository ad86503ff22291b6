//! An engine without a processor, for tests of what lies above.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::cpuid::CpuModel;
use crate::{
    ClockState, CpuidEntry, DebugRegisters, Engine, EngineMetrics, Error, GeneralRegisters, IoBus,
    Kick, LapicState, MpState, MsiMessage, PendingEvents, Result, SystemRegisters, Vcpu, VcpuState,
    Vm, VmConfig, VmExit, XSAVE_AREA_SIZE,
};

/// What a scripted vCPU does, one step a [`Vcpu::run`].
pub enum Step {
    /// Does something with the machine (for instance, an access to its bus).
    Do(Box<dyn FnMut(&VmConfig) + Send>),
    /// Returns this from `run`.
    Exit(VmExit),
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Do(_) => f.write_str("Do(..)"),
            Step::Exit(exit) => f.debug_tuple("Exit").field(exit).finish(),
        }
    }
}

/// An engine whose vCPU 0 follows a script; when it ends, and on all other vCPUs, `run` waits for
/// a kick.
#[derive(Debug, Default)]
pub struct MockEngine {
    script: Mutex<VecDeque<Step>>,
}

impl MockEngine {
    /// An engine whose first machine plays `script`.
    pub fn new(script: impl IntoIterator<Item = Step>) -> Self {
        Self { script: Mutex::new(script.into_iter().collect()) }
    }
}

impl Engine for MockEngine {
    fn name(&self) -> &'static str {
        "mock"
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>> {
        let script = std::mem::take(&mut *lock(&self.script));
        Ok(Arc::new(MockVm { config, script: Mutex::new(script), messages: Mutex::default() }))
    }
}

/// The machine of a [`MockEngine`].
#[derive(Debug)]
pub struct MockVm {
    config: VmConfig,
    script: Mutex<VecDeque<Step>>,
    messages: Mutex<Vec<MsiMessage>>,
}

impl Vm for MockVm {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        if index >= self.config.vcpus {
            return Err(Error::TooManyVcpus { wanted: index + 1, max: self.config.vcpus });
        }
        let script =
            if index == 0 { std::mem::take(&mut *lock(&self.script)) } else { VecDeque::new() };
        Ok(Box::new(MockVcpu {
            config: self.config.clone(),
            script,
            kick: Arc::default(),
            state: blank_state(index),
        }))
    }

    fn signal_msi(&self, message: MsiMessage) {
        lock(&self.messages).push(message);
    }

    fn cpuid(&self, _index: u32) -> Vec<CpuidEntry> {
        Vec::new()
    }

    fn tsc_khz(&self) -> u64 {
        1_000_000
    }

    fn metrics(&self) -> EngineMetrics {
        EngineMetrics(vec![("messages".into(), lock(&self.messages).len() as u64)])
    }
}

#[derive(Debug, Default)]
struct MockKick {
    kicked: Mutex<bool>,
    changed: Condvar,
}

impl Kick for MockKick {
    fn kick(&self) {
        *lock(&self.kicked) = true;
        self.changed.notify_all();
    }
}

#[derive(Debug)]
struct MockVcpu {
    config: VmConfig,
    script: VecDeque<Step>,
    kick: Arc<MockKick>,
    state: VcpuState,
}

impl Vcpu for MockVcpu {
    fn run(&mut self) -> Result<VmExit> {
        while let Some(step) = self.script.pop_front() {
            match step {
                Step::Do(mut action) => action(&self.config),
                Step::Exit(exit) => return Ok(exit),
            }
        }
        let mut kicked = lock(&self.kick.kicked);
        while !*kicked {
            kicked = self.kick.changed.wait(kicked).unwrap_or_else(PoisonError::into_inner);
        }
        *kicked = false;
        Ok(VmExit::Kicked)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    fn state(&mut self) -> Result<VcpuState> {
        Ok(self.state.clone())
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        self.state = state.clone();
        Ok(())
    }
}

/// A state without content, but for what tells the boot processor from the others.
fn blank_state(index: u32) -> VcpuState {
    VcpuState {
        regs: GeneralRegisters::default(),
        sregs: SystemRegisters::default(),
        debug: DebugRegisters::default(),
        xsave: vec![0; XSAVE_AREA_SIZE],
        xcr0: 1,
        msrs: Vec::new(),
        lapic: LapicState { base: 0xfee0_0800, regs: vec![0; 64], tsc_deadline: 0 },
        events: PendingEvents::default(),
        mp_state: if index == 0 { MpState::Running } else { MpState::WaitForSipi },
        clock: ClockState::default(),
        model: CpuModel::default(),
        cpuid: Vec::new(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A bus without devices: reads are all ones.
#[derive(Debug)]
pub struct NoBus;

impl IoBus for NoBus {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn eoi(&self, _: u8) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use mvm_memory::GuestRam;

    #[test]
    fn a_kick_before_run_is_not_lost() {
        let ram = GuestRam::new(&[(0, 0x1000)]).unwrap();
        let engine = MockEngine::new([Step::Exit(VmExit::HaltedForever)]);
        let vm = engine
            .create_vm(VmConfig { vcpus: 1, cpu: Default::default(), ram, io: Arc::new(NoBus) })
            .unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!(vcpu.run().unwrap(), VmExit::HaltedForever);
        vcpu.kicker().kick();
        assert_eq!(vcpu.run().unwrap(), VmExit::Kicked);
        assert!(vm.create_vcpu(1).is_err());
    }
}
