//! What a run is made with where more than one may say so: a flag, an environment variable, the
//! user's or the system's `mvm.toml`, or the default. The first of them that speaks is heard, and who
//! it was is remembered: for `mvm doctor`, and for the error if the value is no good.

mod file;
mod places;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::anyhow;
use mvm_sandbox::engine::{EmuTier, EngineChoice, Wish};
use mvm_sandbox::unikernel::Size;
use mvm_vmm::config::{CpuModel, HugePages};
use serde_json::json;

use crate::cli::{Engine, RunArgs};

pub use places::{Config, Places};

/// Memory of a machine if nobody says otherwise.
const MEMORY: &str = "512m";

/// What a container is connected to if nobody says otherwise.
const NETWORK: &str = "none";

/// Seconds until a machine that has not come up is given up.
const BOOT_TIMEOUT: u64 = 120;

/// Seconds between the signal that asks a process to stop and SIGKILL.
const STOP_TIMEOUT: u32 = 10;

/// A value and who gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Who gave it.
    pub origin: Origin,
}

/// Who gave a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody.
    Default,
    /// A line of a file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// An environment variable.
    Variable(&'static str),
    /// The command line.
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => f.write_str(name),
            Self::Flag => f.write_str("flag"),
        }
    }
}

impl<T> Setting<T> {
    /// How an error calls it: `--memory`, or `memory in FILE:LINE`.
    pub fn named(&self, key: &str) -> String {
        match &self.origin {
            Origin::Flag | Origin::Default => format!("--{key}"),
            Origin::Variable(name) => (*name).to_owned(),
            Origin::File { .. } => format!("{key} in {}", self.origin),
        }
    }
}

/// What one party says; `None` where it says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Values {
    engine: Option<Setting<EngineChoice>>,
    tier: Option<Setting<EmuTier>>,
    require_hardware: Option<Setting<bool>>,
    cpu: Option<Setting<CpuModel>>,
    cpus: Option<Setting<String>>,
    memory: Option<Setting<String>>,
    memory_max: Option<Setting<String>>,
    hugepages: Option<Setting<HugePages>>,
    kernel: Option<Setting<PathBuf>>,
    initrd: Option<Setting<PathBuf>>,
    cmdline: Option<Setting<String>>,
    boot_timeout: Option<Setting<u64>>,
    stop_timeout: Option<Setting<u32>>,
    network: Option<Setting<String>>,
    debug_console: Option<Setting<bool>>,
}

impl Values {
    /// What the command line says.
    fn of_flags(args: &RunArgs) -> Self {
        fn flag<T: Clone, U: From<T>>(value: &Option<T>) -> Option<Setting<U>> {
            value.clone().map(|v| Setting { value: v.into(), origin: Origin::Flag })
        }
        Self {
            engine: flag(&args.engine),
            tier: flag(&args.engine.and_then(Engine::tier)),
            require_hardware: flag(&args.require_hardware),
            cpu: flag(&args.cpu),
            cpus: flag(&args.cpus),
            memory: flag(&args.memory),
            memory_max: flag(&args.memory_max),
            hugepages: flag(&args.hugepages),
            kernel: flag(&args.kernel),
            initrd: flag(&args.initrd.first().cloned()),
            cmdline: flag(&args.cmdline),
            boot_timeout: flag(&args.boot_timeout),
            stop_timeout: flag(&args.stop_timeout),
            network: flag(&args.network),
            // Whoever runs a container does not decide that: see `mvm debug`.
            debug_console: None,
        }
    }

    /// What the environment says.
    fn of_environment() -> anyhow::Result<Self> {
        const ENGINE: &str = "MVM_ENGINE";
        let name = std::env::var(ENGINE).ok().filter(|v| !v.is_empty());
        let Some(name) = name else { return Ok(Self::default()) };
        let (engine, tier) = match name.split_once(':') {
            Some(("emu", tier)) => ("emu", Some(tier)),
            _ => (name.as_str(), None),
        };
        fn setting<T>(value: T) -> Setting<T> {
            Setting { value, origin: Origin::Variable(ENGINE) }
        }
        Ok(Self {
            engine: Some(setting(engine.parse().map_err(|e| anyhow!("{ENGINE}: {e}"))?)),
            tier: match tier {
                Some(tier) => Some(setting(tier.parse().map_err(|e| anyhow!("{ENGINE}: {e}"))?)),
                None => None,
            },
            ..Self::default()
        })
    }

    /// These, and what they leave open from `under`.
    fn over(self, under: Self) -> Self {
        Self {
            engine: self.engine.or(under.engine),
            tier: self.tier.or(under.tier),
            require_hardware: self.require_hardware.or(under.require_hardware),
            cpu: self.cpu.or(under.cpu),
            cpus: self.cpus.or(under.cpus),
            memory: self.memory.or(under.memory),
            memory_max: self.memory_max.or(under.memory_max),
            hugepages: self.hugepages.or(under.hugepages),
            kernel: self.kernel.or(under.kernel),
            initrd: self.initrd.or(under.initrd),
            cmdline: self.cmdline.or(under.cmdline),
            boot_timeout: self.boot_timeout.or(under.boot_timeout),
            stop_timeout: self.stop_timeout.or(under.stop_timeout),
            network: self.network.or(under.network),
            debug_console: self.debug_console.or(under.debug_console),
        }
    }
}

/// What a run is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The engine.
    pub engine: Setting<EngineChoice>,
    /// How the emulation engine runs guest code.
    pub tier: Setting<EmuTier>,
    /// Nothing but hardware virtualization will do.
    pub require_hardware: Setting<bool>,
    /// The processor that the guest sees.
    pub cpu: Setting<Option<CpuModel>>,
    /// Number of CPUs, as written.
    pub cpus: Setting<String>,
    /// Memory of the machine, as written.
    pub memory: Setting<String>,
    /// What it can grow to, as written.
    pub memory_max: Setting<Option<String>>,
    /// The host's pages that it is made of.
    pub hugepages: Setting<HugePages>,
    /// A kernel in place of the built-in one.
    pub kernel: Setting<Option<PathBuf>>,
    /// An initramfs in place of the built-in one.
    pub initrd: Setting<Option<PathBuf>>,
    /// Added to the kernel's command line.
    pub cmdline: Setting<Option<String>>,
    /// Seconds that the guest may take to start.
    pub boot_timeout: Setting<u64>,
    /// Seconds that `mvm stop` waits before SIGKILL.
    pub stop_timeout: Setting<u32>,
    /// What containers are connected to, as written.
    pub network: Setting<String>,
    /// `mvm debug` opens a console in guests.
    pub debug_console: Setting<bool>,
}

impl Settings {
    /// What holds for a run with these flags.
    ///
    /// # Errors
    /// The environment names something that is not there.
    pub fn of_run(args: &RunArgs, config: &Config) -> anyhow::Result<Self> {
        Ok(Self::of(Values::of_flags(args).over(Values::of_environment()?), config))
    }

    /// What holds for a run without flags.
    ///
    /// # Errors
    /// The environment names something that is not there.
    pub fn without_flags(config: &Config) -> anyhow::Result<Self> {
        Ok(Self::of(Values::of_environment()?, config))
    }

    fn of(values: Values, config: &Config) -> Self {
        fn or<T>(setting: Option<Setting<T>>, value: T) -> Setting<T> {
            setting.unwrap_or(Setting { value, origin: Origin::Default })
        }
        fn option<T>(setting: Option<Setting<T>>) -> Setting<Option<T>> {
            match setting {
                Some(Setting { value, origin }) => Setting { value: Some(value), origin },
                None => Setting { value: None, origin: Origin::Default },
            }
        }
        let values = values.over(config.values.clone());
        Self {
            engine: or(values.engine, EngineChoice::Auto),
            tier: or(values.tier, EmuTier::default()),
            require_hardware: or(values.require_hardware, false),
            cpu: option(values.cpu),
            cpus: or(values.cpus, "1".into()),
            memory: or(values.memory, MEMORY.into()),
            memory_max: option(values.memory_max),
            hugepages: or(values.hugepages, HugePages::None),
            kernel: option(values.kernel),
            initrd: option(values.initrd),
            cmdline: option(values.cmdline),
            boot_timeout: or(values.boot_timeout, BOOT_TIMEOUT),
            stop_timeout: or(values.stop_timeout, STOP_TIMEOUT),
            network: or(values.network, NETWORK.into()),
            debug_console: or(values.debug_console, false),
        }
    }

    /// Takes an image's word for the size of its machine where nobody else has said anything.
    pub fn suggest(&mut self, size: Size) {
        if let (Some(cpus), Origin::Default) = (size.cpus, &self.cpus.origin) {
            self.cpus.value = cpus.to_string();
        }
        if let (Some(memory), Origin::Default) = (size.memory, &self.memory.origin) {
            self.memory.value = format!("{}m", memory >> 20);
        }
    }

    /// How long a guest may take to start.
    pub fn boot_limit(&self) -> Duration {
        /// As good as no limit, and can be added to the time.
        const LONGEST: u64 = 365 * 24 * 60 * 60;
        Duration::from_secs(self.boot_timeout.value.min(LONGEST))
    }

    /// What is wanted of the engine.
    pub fn wish(&self, force: bool) -> Wish {
        let required = &self.require_hardware;
        Wish {
            choice: self.engine.value,
            tier: self.tier.value,
            force,
            require_hardware: required.value.then(|| required.named("require-hardware")),
        }
    }

    /// Every key with its value and origin, in the order of the documentation.
    pub fn list(&self) -> Vec<(&'static str, serde_json::Value, &Origin)> {
        vec![
            ("engine", json!(self.engine.value), &self.engine.origin),
            ("require-hardware", json!(self.require_hardware.value), &self.require_hardware.origin),
            ("cpu", json!(self.cpu.value), &self.cpu.origin),
            ("cpus", json!(self.cpus.value), &self.cpus.origin),
            ("memory", json!(self.memory.value), &self.memory.origin),
            ("memory-max", json!(self.memory_max.value), &self.memory_max.origin),
            ("hugepages", json!(self.hugepages.value), &self.hugepages.origin),
            ("kernel", json!(self.kernel.value), &self.kernel.origin),
            ("initrd", json!(self.initrd.value), &self.initrd.origin),
            ("cmdline", json!(self.cmdline.value), &self.cmdline.origin),
            ("boot-timeout", json!(self.boot_timeout.value), &self.boot_timeout.origin),
            ("stop-timeout", json!(self.stop_timeout.value), &self.stop_timeout.origin),
            ("network", json!(self.network.value), &self.network.origin),
            ("debug-console", json!(self.debug_console.value), &self.debug_console.origin),
            ("emu.tier", json!(self.tier.value), &self.tier.origin),
        ]
    }
}

#[cfg(test)]
mod tests;
