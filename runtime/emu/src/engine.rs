//! The engine as the machine above sees it.

use std::sync::Arc;

use mvm_engine::cpuid::CpuModel;
use mvm_engine::{Engine, Error, Result, Vm, VmConfig};

use crate::vm::EmuVm;

/// vCPUs of one machine, at most: what the local APICs' xAPIC mode can address.
pub const MAX_VCPUS: u32 = 32;

// A translator without a run word would never run anything.
const _: () = assert!(MAX_VCPUS as usize <= mvm_memory::RUN_WORDS);

/// How guest code is run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Tier {
    /// Decoded and interpreted.
    #[default]
    Interpreter,
    /// 64-bit code is translated, the rest interpreted.
    Translator,
}

/// The emulation engine. Needs nothing of the host but its processor.
#[derive(Debug, Default)]
pub struct EmuEngine {
    tier: Tier,
    tsc_khz: Option<u64>,
}

impl EmuEngine {
    /// The engine.
    ///
    /// # Errors
    /// The host forbids executable memory, which the stubs for SIMD instructions need.
    pub fn new() -> Result<Self> {
        crate::host::init().map_err(|source| Error::Host {
            what: "cannot make executable memory for the emulation engine",
            source,
        })?;
        Ok(Self::default())
    }

    /// The same, with `tier` for its machines.
    #[must_use]
    pub fn with_tier(self, tier: Tier) -> Self {
        Self { tier, ..self }
    }

    /// The same, told the frequency of the host's time-stamp counter in kHz. Without it the engine
    /// finds it out, which may take 10 ms.
    #[must_use]
    pub fn with_tsc_khz(self, khz: Option<u64>) -> Self {
        Self { tsc_khz: khz.filter(|khz| *khz != 0), ..self }
    }
}

impl Engine for EmuEngine {
    fn name(&self) -> &'static str {
        "emu"
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>> {
        if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
            return Err(Error::TooManyVcpus { wanted: config.vcpus, max: MAX_VCPUS });
        }
        if config.cpu == CpuModel::Host {
            return Err(Error::Model {
                engine: self.name(),
                model: config.cpu,
                reason: "it has a processor of its own; use v3".into(),
            });
        }
        Ok(Arc::new(EmuVm::new(config, self.tier, self.tsc_khz)))
    }
}
