//! containerd's shim, which this program is under the name `containerd-shim-mvm-v1`.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use containerd_shim_mvm::host::{Bare, Hardware, Host, Size};
use mvm_sandbox::engine;
use mvm_sandbox::layout::Layout;
use mvm_sandbox::spec::{CpuShare, parse_size};
use mvm_sandbox::unikernel::Kind;
use mvm_vmm::config::HugePages;

use super::layout;
use crate::embedded;
use crate::settings::{Config, Places, Settings};

/// The least memory with which the guest's kernel, agent and a small program live.
const MIN_MEMORY: u64 = 64 << 20;

/// Sizes are whole pieces of this: huge pages, if memory is made of them.
const PIECE: u64 = 2 << 20;

/// Sizes of machines without our guest are whole pages.
const PAGE: u64 = 4096;

/// Hands over to the shim.
pub fn main() -> ExitCode {
    containerd_shim_mvm::main(Arc::new(Program), std::env::args_os().skip(1))
}

/// Hands over to the process that stands for a container.
pub fn holder() -> ExitCode {
    containerd_shim_mvm::vm::holder::main(&Program)
}

/// This program, with the same settings and directories as its command line has; `MVM_ROOT` and
/// `MVM_CONFIG` in containerd's environment change them.
#[derive(Debug)]
struct Program;

impl Host for Program {
    fn layout(&self) -> anyhow::Result<Layout> {
        layout(None)
    }

    fn hardware(&self, size: Size) -> anyhow::Result<Hardware> {
        let settings = Settings::without_flags(&Config::load(&Places::current(None))?)?;
        let outlook = engine::look(&self.layout()?, settings.wish(false))?;
        let vcpus = vcpus(size, &settings)?;
        let memory = match size.memory {
            Some(bytes) => bytes,
            None => parse_size(&settings.memory.value)?,
        };
        let memory = memory.checked_next_multiple_of(PIECE).unwrap_or(u64::MAX);
        let memory = memory.clamp(MIN_MEMORY, mvm_vmm::layout::MAX_MEMORY);
        let memory_max = match super::run::memory_max(&settings)? {
            Some(bytes) => bytes,
            None if settings.hugepages.value == HugePages::Pool => 0,
            None => host_memory()?,
        };
        if let Some(short) = super::run::short_of(&settings, memory, memory_max) {
            tracing::warn!("{short}: it cannot grow");
        }
        Ok(Hardware {
            vcpus,
            memory,
            memory_max,
            hugepages: settings.hugepages.value,
            engine: outlook.decide(engine::Guest::Linux)?,
            cpu: settings.cpu.value,
            kernel: embedded::kernel(settings.kernel.value.as_deref())?,
            initramfs: embedded::initramfs(settings.initrd.value.as_deref())?,
            cmdline: settings.cmdline.value.clone().unwrap_or_default(),
            boot_limit: settings.boot_limit(),
            stop_timeout: settings.stop_timeout.value,
        })
    }

    fn file_system(&self, kind: &str) -> anyhow::Result<Option<&'static [u8]>> {
        let settings = Settings::without_flags(&Config::load(&Places::current(None))?)?;
        Ok(embedded::file_system(kind, settings.kernel.value.as_deref()))
    }

    fn bare(&self, size: Size, kind: Kind) -> anyhow::Result<Bare> {
        let settings = Settings::without_flags(&Config::load(&Places::current(None))?)?;
        let outlook = engine::look(&self.layout()?, settings.wish(false))?;
        let memory = match size.memory {
            // Whole pages; what is too little for this kernel the loader says.
            Some(bytes) => (bytes & !(PAGE - 1))
                .clamp(mvm_vmm::layout::MIN_MEMORY, mvm_vmm::layout::MAX_MEMORY),
            None => super::bare::memory(&settings, kind)?,
        };
        Ok(Bare {
            vcpus: vcpus(size, &settings)?,
            memory,
            hugepages: settings.hugepages.value,
            engine: outlook.decide(super::bare::guest(kind))?,
            cpu: settings.cpu.value,
            stop_timeout: settings.stop_timeout.value,
        })
    }
}

/// What machines can grow to where nobody says it: all that the host has, since it costs nothing until it is asked for.
fn host_memory() -> anyhow::Result<u64> {
    let info = nix::sys::sysinfo::sysinfo().context("cannot tell how much memory the host has")?;
    Ok(info.ram_total().min(mvm_vmm::layout::MAX_MEMORY))
}

/// Not more than the host has.
fn vcpus(size: Size, settings: &Settings) -> anyhow::Result<u32> {
    let cpus: CpuShare = super::run::cpus(settings)?;
    let available = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let most = available.clamp(1, u64::from(mvm_vmm::layout::MAX_VCPUS));
    let vcpus = u64::from(size.vcpus.unwrap_or_else(|| cpus.vcpus())).clamp(1, most);
    Ok(u32::try_from(vcpus)?)
}
