//! A machine of the emulation engine.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use mvm_engine::{CpuidEntry, EngineMetrics, Error, MsiMessage, Result, Vcpu, Vm, VmConfig};

use crate::block::Dispatcher;
use crate::cpu::Cpu;
use crate::engine::Tier;
use crate::jit::{Calls, Counters, Store};
use crate::mmu::{Mmu, PhysMemory};
use crate::sys::clock::host_tsc_khz;
use crate::sys::{Platform, SystemState};
use crate::vcpu::EmuVcpu;

/// What a vCPU counts. Written by its thread between blocks, now and then.
#[derive(Debug, Default)]
pub struct VcpuCounters {
    /// Instructions executed.
    pub instructions: AtomicU64,
    /// Blocks decoded.
    pub blocks: AtomicU64,
    /// Bytes of decoded code in the cache.
    pub cache_bytes: AtomicU64,
    /// Times the block cache was full and emptied.
    pub cache_emptied: AtomicU64,
    /// Page walks.
    pub walks: AtomicU64,
    /// Exceptions delivered.
    pub exceptions: AtomicU64,
    /// Times it went to sleep.
    pub sleeps: AtomicU64,
    /// What its translator counts, if it has one.
    pub translator: Mutex<Counters>,
    /// The handlers that translated code called.
    pub calls: OnceLock<Calls>,
}

/// Opcodes whose calls are shown.
const OPCODES_SHOWN: usize = 16;

impl VcpuCounters {
    fn rows(&self) -> [(&'static str, &AtomicU64); 7] {
        [
            ("instructions", &self.instructions),
            ("blocks-decoded", &self.blocks),
            ("block-cache-bytes", &self.cache_bytes),
            ("block-cache-emptied", &self.cache_emptied),
            ("page-walks", &self.walks),
            ("exceptions", &self.exceptions),
            ("sleeps", &self.sleeps),
        ]
    }
}

/// A machine: what its vCPUs share.
#[derive(Debug)]
pub struct EmuVm {
    platform: Arc<Platform>,
    phys: Arc<PhysMemory>,
    counters: Vec<Arc<VcpuCounters>>,
    tier: Tier,
    made: Mutex<Vec<bool>>,
    /// Translated code, once there is a vCPU.
    code: OnceLock<Arc<Store>>,
}

impl EmuVm {
    pub(crate) fn new(config: VmConfig, tier: Tier, tsc_khz: Option<u64>) -> Self {
        let VmConfig { vcpus, cpu, ram, io } = config;
        Self {
            platform: Platform::new(cpu, vcpus, io.clone(), tsc_khz.unwrap_or_else(host_tsc_khz)),
            phys: Arc::new(PhysMemory::new(ram, io, vcpus)),
            counters: (0..vcpus).map(|_| Arc::default()).collect(),
            tier,
            made: Mutex::new(vec![false; vcpus as usize]),
            code: OnceLock::new(),
        }
    }
}

impl EmuVm {
    /// The machine's translated code, if there is any.
    #[cfg(test)]
    pub(crate) fn store(&self) -> Option<&Arc<Store>> {
        self.code.get()
    }

    /// What is counted under that name, if it is.
    #[cfg(test)]
    pub(crate) fn figure(&self, name: &str) -> Option<u64> {
        self.metrics().0.into_iter().find_map(|(row, value)| (row == name).then_some(value))
    }

    /// The machine's translated code, which is made by the first who asks, under the lock of `made`.
    fn code(&self, vcpus: u32) -> Result<Arc<Store>> {
        if let Some(code) = self.code.get() {
            return Ok(code.clone());
        }
        let code = Store::new(&self.phys, vcpus).map_err(|source| Error::Host {
            what: "cannot make executable memory for translated code",
            source,
        })?;
        Ok(self.code.get_or_init(|| Arc::new(code)).clone())
    }
}

impl Vm for EmuVm {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let max = made.len() as u32;
        let (Some(taken), Some(counters)) =
            (made.get_mut(index as usize), self.counters.get(index as usize))
        else {
            return Err(Error::TooManyVcpus { wanted: index.saturating_add(1), max });
        };
        if std::mem::replace(taken, true) {
            return Err(Error::BadState { vcpu: index, reason: "it exists already".into() });
        }
        let mmu = Mmu::new(self.phys.clone(), index);
        let mut cpu = Cpu::new(mmu, SystemState::new(self.platform.clone(), index));
        cpu.power_up();
        let dispatcher = match self.tier {
            Tier::Interpreter => Dispatcher::new(&cpu),
            Tier::Translator => Dispatcher::translating(&mut cpu, self.code(max)?),
        };
        let (platform, counters) = (self.platform.clone(), counters.clone());
        Ok(Box::new(EmuVcpu::new(cpu, dispatcher, platform, counters)))
    }

    fn signal_msi(&self, message: MsiMessage) {
        self.platform.apics.signal_msi(message);
    }

    fn set_intr(&self, asserted: bool) {
        self.platform.apics.port(0).set_intr(asserted);
    }

    fn cpuid(&self, index: u32) -> Vec<CpuidEntry> {
        self.platform.model.entries(index).to_vec()
    }

    fn tsc_khz(&self) -> u64 {
        self.platform.clock.khz()
    }

    fn code_memory(&self) -> u64 {
        self.code.get().map_or(0, |code| code.code_memory())
    }

    fn metrics(&self) -> EngineMetrics {
        let mut rows = Vec::new();
        if let Some(code) = self.code.get() {
            rows.extend(code.rows().map(|(name, value)| (name.to_owned(), value)));
        }
        for (index, counters) in self.counters.iter().enumerate() {
            for (name, value) in counters.rows() {
                rows.push((format!("vcpu{index}.{name}"), value.load(Ordering::Relaxed)));
            }
            let Some(calls) = counters.calls.get() else { continue };
            let translator = counters.translator.lock().unwrap_or_else(PoisonError::into_inner);
            for (name, value) in translator.rows() {
                rows.push((format!("vcpu{index}.{name}"), value));
            }
            rows.push((format!("vcpu{index}.jit-calls"), calls.total()));
            for (opcode, n) in calls.most(OPCODES_SHOWN) {
                rows.push((format!("vcpu{index}.jit-calls-{opcode:03x}"), n));
            }
        }
        EngineMetrics(rows)
    }
}
