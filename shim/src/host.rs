//! What the program around the shim knows: where things are kept, what machines are made of.

use std::time::Duration;

use mvm_sandbox::engine::Selection;
use mvm_sandbox::layout::Layout;
use mvm_sandbox::machine::Payload;
use mvm_sandbox::unikernel::Kind;
use mvm_vmm::config::{CpuModel, HugePages};

/// How large a machine is to be, where somebody said it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Size {
    /// vCPUs.
    pub vcpus: Option<u32>,
    /// Memory in bytes, that of the guest's kernel included.
    pub memory: Option<u64>,
}

/// What a machine is made of.
#[derive(Debug)]
pub struct Hardware {
    /// vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Guest memory that it can grow to, in bytes; not more than `memory` where it cannot.
    pub memory_max: u64,
    /// The pages of the host that it is made of.
    pub hugepages: HugePages,
    /// What runs it.
    pub engine: Selection,
    /// The processor that the guest sees, if it matters.
    pub cpu: Option<CpuModel>,
    /// The kernel.
    pub kernel: Payload,
    /// The initramfs with the agent.
    pub initramfs: Payload,
    /// Appended to the kernel's command line.
    pub cmdline: String,
    /// How long the guest may take until its agent is ready.
    pub boot_limit: Duration,
    /// Seconds between the signal that asks a process to stop and SIGKILL, for `mvm stop`.
    pub stop_timeout: u32,
}

/// What a machine without our guest is made of: that of a unikernel.
#[derive(Debug)]
pub struct Bare {
    /// vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// The pages of the host that it is made of.
    pub hugepages: HugePages,
    /// What runs it.
    pub engine: Selection,
    /// The processor that the guest sees, if it matters.
    pub cpu: Option<CpuModel>,
    /// For `mvm stop`.
    pub stop_timeout: u32,
}

/// The program around the shim. The shim is started as `PROGRAM` under the name
/// [`NAME`](crate::NAME), and its holder as `PROGRAM` [`holder::SUBCOMMAND`](crate::vm::holder).
pub trait Host: Send + Sync {
    /// Where things are kept.
    ///
    /// # Errors
    /// Nobody says where.
    fn layout(&self) -> anyhow::Result<Layout>;

    /// What a machine of this size is made of; settings decide where the size is open.
    ///
    /// # Errors
    /// Settings are no good, or the host has no engine for it.
    fn hardware(&self, size: Size) -> anyhow::Result<Hardware>;

    /// The module that makes the kernel of [`Host::hardware`] mount file systems of the type `kind`; none if that kernel has
    /// no such module, whether it mounts them or not.
    ///
    /// # Errors
    /// Settings are no good.
    fn file_system(&self, kind: &str) -> anyhow::Result<Option<&'static [u8]>>;

    /// What a machine of this size is made of in which a unikernel of this kind runs.
    ///
    /// # Errors
    /// As [`Host::hardware`].
    fn bare(&self, size: Size, kind: Kind) -> anyhow::Result<Bare>;
}
