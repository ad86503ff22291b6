//! The traits that an engine implements.

use std::fmt;
use std::sync::Arc;

use mvm_memory::GuestRam;
use vmm_sys_util::eventfd::EventFd;

use crate::cpuid::CpuModel;
use crate::{CpuidEntry, IoBus, Result, VcpuState, VmExit};

/// What a machine is made of, for the engine.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// Number of vCPUs; their local APIC ids are `0..vcpus`.
    pub vcpus: u32,
    /// The processor that they show.
    pub cpu: CpuModel,
    /// Guest RAM.
    pub ram: GuestRam,
    /// Port and MMIO accesses outside RAM.
    pub io: Arc<dyn IoBus>,
}

/// A way to run guest instructions.
pub trait Engine: Send + Sync + fmt::Debug {
    /// Its name on the command line: `kvm` or `emu`.
    fn name(&self) -> &'static str;

    /// Makes a machine without vCPUs.
    ///
    /// # Errors
    /// The host refuses, or there are too many vCPUs.
    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>>;
}

/// A message-signalled interrupt as it is written on the system bus (SDM vol. 3, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// `0xFEEx_xxxx`: destination and its mode.
    pub address: u64,
    /// Vector, delivery mode, trigger mode.
    pub data: u32,
}

/// A machine of one engine.
pub trait Vm: Send + Sync + fmt::Debug {
    /// Makes vCPU `index`, in the state after power-up: vCPU 0 runs, the others wait for INIT and
    /// SIPI. Each index can be made once.
    ///
    /// # Errors
    /// The host refuses, or `index` is out of range or taken.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>>;

    /// Sends an interrupt message to the local APICs. Any thread; never blocks.
    fn signal_msi(&self, message: MsiMessage);

    /// INTR, the output of the old interrupt controllers, changes. It is wired to the first vCPU, which takes it while its
    /// local APIC says so (LINT0 in mode ExtINT, or the APIC disabled by IA32_APIC_BASE) and
    /// [acknowledges](IoBus::acknowledge). Any thread; never blocks. For engines that do not know of it there is none.
    fn set_intr(&self, _asserted: bool) {}

    /// Says what interrupt `gsi` of the I/O APIC sends from now on, `None` if it is masked. For engines
    /// that interrupt by themselves; others have nothing to note.
    ///
    /// # Errors
    /// There is no such interrupt, or the host failed.
    fn route(&self, _gsi: u32, _message: Option<MsiMessage>) -> Result<()> {
        Ok(())
    }

    /// Makes each write to `fd` an edge of `gsi`, as routed. False if this engine does not do that:
    /// the edge is then to be sent as a message ([`Vm::signal_msi`]).
    ///
    /// # Errors
    /// There is no such interrupt, or the host failed.
    fn attach_interrupt(&self, _gsi: u32, _fd: &EventFd) -> Result<bool> {
        Ok(false)
    }

    /// Makes each 4-byte store of `value` to guest physical address `gpa` a write to `fd`. False if this
    /// engine does not do that: the store then comes to the [`IoBus`].
    ///
    /// # Errors
    /// The place is taken, or the host failed.
    fn attach_doorbell(&self, _gpa: u64, _value: u32, _fd: &EventFd) -> Result<bool> {
        Ok(false)
    }

    /// More of a [growing](mvm_memory::RamRegion::growing) region may be used than before: for engines that do not look
    /// by themselves.
    ///
    /// # Errors
    /// The host failed; what was there before is there still.
    fn ram_grew(&self) -> Result<()> {
        Ok(())
    }

    /// Starts or stops logging what vCPUs write to guest RAM, for engines whose stores do not pass the
    /// RAM's [`PageTracker`](mvm_memory::PageTracker). What was written before it stops is in the tracker.
    ///
    /// # Errors
    /// The host failed.
    fn log_writes(&self, _on: bool) -> Result<()> {
        Ok(())
    }

    /// Brings the tracker up to date with what vCPUs have written since logging started or since the
    /// last call.
    ///
    /// # Errors
    /// The host failed.
    fn collect_writes(&self) -> Result<()> {
        Ok(())
    }

    /// The CPUID that a guest sees on vCPU `index`.
    fn cpuid(&self, index: u32) -> Vec<CpuidEntry>;

    /// Frequency of the guest's time-stamp counter in kHz.
    fn tsc_khz(&self) -> u64;

    /// What the engine counts.
    fn metrics(&self) -> EngineMetrics;

    /// Bytes of memory for code that the engine made. It is shared memory, which nobody else counts as the engine's.
    fn code_memory(&self) -> u64 {
        0
    }
}

/// Ends a [`Vcpu::run`] from another thread.
pub trait Kick: Send + Sync + fmt::Debug {
    /// Makes the current run return [`VmExit::Kicked`] soon, or the next one if none is under way.
    fn kick(&self);
}

/// One virtual processor. Lives on the thread that runs it.
pub trait Vcpu: Send + fmt::Debug {
    /// Runs guest code until something ends it. While the guest halts, the thread sleeps.
    ///
    /// # Errors
    /// The host failed; the guest's own faults are a [`VmExit`].
    fn run(&mut self) -> Result<VmExit>;

    /// A handle to end a run.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// The architectural state, exact between two instructions.
    ///
    /// # Errors
    /// The host failed.
    fn state(&mut self) -> Result<VcpuState>;

    /// Replaces the architectural state.
    ///
    /// # Errors
    /// The state is impossible or the host failed; the vCPU is then unchanged.
    fn set_state(&mut self, state: &VcpuState) -> Result<()>;
}

/// What an engine counts since its machine was made: name and value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EngineMetrics(pub Vec<(String, u64)>);
