//! `mvm run`: flags with docker's names and meanings, and a few of mvm's own.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use mvm_sandbox::unikernel::Kind;
use mvm_vmm::config::{CpuModel, EmuTier, EngineChoice, HugePages};

const EXAMPLES: &str = "\
Examples:
  mvm run --rm busybox echo hello
  mvm run -it --rm debian bash
  mvm run -d --name web --cpus 2 --memory 1g ./site.tar
  mvm run --rm --timings busybox true

An image may also be the path of an OCI layout directory or of an archive (`docker save`, \
`skopeo copy`), which is imported on the fly. A path contains a slash or exists.

Exit codes: that of the container's process; 128+n if signal n ended it; 125 if mvm failed; \
126 if the command cannot be executed; 127 if it does not exist.

Defaults of --engine, --require-hardware, --cpu, --cpus, --memory, --memory-max, --hugepages, --kernel, \
--initrd, --cmdline, --boot-timeout, --stop-timeout and --network may stand in /etc/mvm/mvm.toml and ~/.config/mvm/mvm.toml, \
by the same names; `mvm doctor` shows what holds.";

#[derive(Debug, Args)]
#[command(
    override_usage = "mvm run [OPTIONS] IMAGE [COMMAND] [ARG...]",
    after_help = EXAMPLES
)]
pub struct RunArgs {
    /// Keep standard input open and pass it to the container
    #[arg(short, long)]
    pub interactive: bool,

    /// Give the process a terminal
    #[arg(short, long)]
    pub tty: bool,

    /// Run in the background and print the container's id
    #[arg(short, long)]
    pub detach: bool,

    /// Remove the container when it ends
    #[arg(long)]
    pub rm: bool,

    /// Name the container; a name is made up otherwise
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Set a variable; without a value it is taken from mvm's own environment
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,

    /// Read variables from a file, one KEY=VALUE a line
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,

    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,

    /// User (and group), by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,

    /// Run this instead of the image's entry point; an empty value clears it
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,

    /// Host name in the container; its id otherwise
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,

    /// Put a label on the container
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,

    /// Put an annotation on the container's runtime specification
    #[arg(long, value_name = "KEY=VALUE")]
    pub annotation: Vec<String>,

    /// Run a small init process that reaps children and forwards signals
    #[arg(long)]
    pub init: bool,

    /// Signal that asks the process to stop [default: the image's, or TERM]
    #[arg(long, value_name = "SIGNAL")]
    pub stop_signal: Option<String>,

    /// Seconds that `mvm stop` waits before SIGKILL [default: 10]
    #[arg(long, value_name = "SECONDS")]
    pub stop_timeout: Option<u32>,

    /// When to pull the image from its registry
    #[arg(long, value_enum, default_value_t = Pull::Missing, value_name = "WHEN")]
    pub pull: Pull,

    /// What the container is connected to: none, ns:PATH (the interfaces of a network namespace) or
    /// cni:NAME (a network of the CNI configuration) [default: none]
    #[arg(long, visible_alias = "net", value_name = "NETWORK", help_heading = "Network")]
    pub network: Option<String>,

    /// Publish a port, with a network by CNI whose plugins do that
    #[arg(short, long, value_name = "[IP:]HOST:GUEST[/PROTOCOL]", help_heading = "Network")]
    pub publish: Vec<String>,

    /// Number of CPUs: 1.5 is two vCPUs of which one and a half may be used [default: 1]
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = "Resources")]
    pub cpus: Option<String>,

    /// Memory of the machine: b, k, m or g [default: 512m]
    #[arg(short, long, value_name = "SIZE", help_heading = "Resources")]
    pub memory: Option<String>,

    /// Memory that the machine can grow to by `mvm update`, not less than --memory; 0 for none [default: none, it stays as it is]
    #[arg(long, value_name = "SIZE", help_heading = "Resources")]
    pub memory_max: Option<String>,

    /// Mount the root file system read-only
    #[arg(long, help_heading = "Resources")]
    pub read_only: bool,

    /// Mount a memory file system, as in /run:size=64m,mode=755
    #[arg(long, value_name = "PATH[:OPTIONS]", help_heading = "Resources")]
    pub tmpfs: Vec<String>,

    /// Show a directory or file of the host in the container, `:ro` to be read only; a directory that
    /// is missing is made
    #[arg(short, long, value_name = "SOURCE:TARGET[:OPTIONS]", help_heading = "Resources")]
    pub volume: Vec<String>,

    /// The same in docker's longer form: type=bind,source=PATH,target=PATH[,readonly], or
    /// type=tmpfs,target=PATH[,tmpfs-size=SIZE]; a missing source is an error
    #[arg(long, value_name = "KEY=VALUE,...", help_heading = "Resources")]
    pub mount: Vec<String>,

    /// Set a limit, as in nofile=1024:2048
    #[arg(long, value_name = "NAME=SOFT[:HARD]", help_heading = "Resources")]
    pub ulimit: Vec<String>,

    /// Add a capability, or ALL
    #[arg(long, value_name = "CAPABILITY", help_heading = "Security")]
    pub cap_add: Vec<String>,

    /// Take a capability away, or ALL
    #[arg(long, value_name = "CAPABILITY", help_heading = "Security")]
    pub cap_drop: Vec<String>,

    /// Give every capability and hide nothing; the machine stays the boundary to the host
    #[arg(long, help_heading = "Security")]
    pub privileged: bool,

    /// no-new-privileges, seccomp=unconfined or seccomp=FILE (a runtime specification's
    /// linux.seccomp)
    #[arg(long, value_name = "OPTION", help_heading = "Security")]
    pub security_opt: Vec<String>,

    /// What runs the vCPUs; naming it spares the line about the choice [default: auto] [env:
    /// MVM_ENGINE]
    #[arg(long, value_enum, help_heading = "Machine")]
    pub engine: Option<Engine>,

    /// Fail where there is no usable hardware virtualization, instead of taking the emu engine
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Machine"
    )]
    pub require_hardware: Option<bool>,

    /// With --engine kvm: start even where `mvm doctor` says that it will not do, and see how far
    /// it comes
    #[arg(long, help_heading = "Machine")]
    pub force: bool,

    /// The processor that the guest sees [default: v3, or as much of it as the host has]
    #[arg(long, value_name = "MODEL", value_enum, help_heading = "Machine")]
    pub cpu: Option<Cpu>,

    /// Make the machine's memory of huge pages of the host [default: none]
    #[arg(long, value_name = "KIND", value_enum, help_heading = "Machine")]
    pub hugepages: Option<Pages>,

    /// Use this guest kernel (vmlinux or bzImage) instead of the built-in one
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    pub kernel: Option<PathBuf>,

    /// There is no image: run --kernel FILE as a machine of its own, without agent; the words after
    /// the flags are its arguments
    #[arg(
        long,
        value_name = "KIND",
        value_enum,
        requires = "kernel",
        help_heading = "Unikernels and systems of their own"
    )]
    pub unikernel: Option<UnikernelKind>,

    /// With --unikernel: how the kernel is entered, if not as its file says
    #[arg(
        long,
        value_name = "PROTOCOL",
        requires = "unikernel",
        value_parser = ["auto", "linux", "pvh", "multiboot", "hvt"],
        help_heading = "Unikernels and systems of their own"
    )]
    pub boot: Option<String>,

    /// For unikernels: a raw disk image or block device, with the place where the guest is to mount it if it can be told,
    /// `:ro` for one that is only read
    #[arg(
        long,
        value_name = "FILE[:/PATH][:ro]",
        help_heading = "Unikernels and systems of their own"
    )]
    pub disk: Vec<String>,

    /// For unikernels: a unix socket for host processes that want the guest's sockets (virtio-vsock). They write
    /// CONNECT PORT and a line break, and read OK; the guest's own connections go to PATH_PORT
    #[arg(long, value_name = "PATH", help_heading = "Unikernels and systems of their own")]
    pub vsock: Option<PathBuf>,

    /// Use this initramfs, which holds the agent, instead of the built-in one; with --unikernel its
    /// initrd (multiboot: its modules, FILE WORDS,FILE,...; also given more than once)
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    pub initrd: Vec<PathBuf>,

    /// Add to the guest kernel's command line
    #[arg(long, value_name = "ARGS", help_heading = "Machine", allow_hyphen_values = true)]
    pub cmdline: Option<String>,

    /// Write the guest's console to a file, and have the kernel tell what it does
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    pub console: Option<PathBuf>,

    /// Seconds that the guest may take to start [default: 120]
    #[arg(long, value_name = "SECONDS", help_heading = "Machine")]
    pub boot_timeout: Option<u64>,

    /// Show on standard error how long each phase took
    #[arg(
        long,
        value_name = "FORMAT",
        value_enum,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "text",
        help_heading = "Machine"
    )]
    pub timings: Option<TimingsFormat>,

    /// Set by `run --detach` for the process that stays
    #[arg(long, hide = true)]
    pub background: bool,

    /// The image, and the command to run in it instead of its own
    // One list, so that everything after the image belongs to the command, flags included.
    #[arg(
        required_unless_present = "unikernel",
        trailing_var_arg = true,
        value_names = ["IMAGE", "COMMAND"],
        num_args = 0..
    )]
    pub image_and_command: Vec<String>,
}

impl RunArgs {
    /// The image.
    pub fn image(&self) -> &str {
        self.image_and_command.first().map_or("", String::as_str)
    }

    /// The command given after it.
    pub fn command(&self) -> &[String] {
        self.image_and_command.get(1..).unwrap_or_default()
    }
}

impl From<UnikernelKind> for Kind {
    fn from(kind: UnikernelKind) -> Self {
        match kind {
            UnikernelKind::Rust => Kind::Rust,
            UnikernelKind::Unikraft => Kind::Unikraft,
            UnikernelKind::Nanos => Kind::Nanos,
            UnikernelKind::Hvt => Kind::Hvt,
            UnikernelKind::Hermit => Kind::Hermit,
            UnikernelKind::Multiboot => Kind::Multiboot,
            UnikernelKind::Linux => Kind::Linux,
        }
    }
}

/// What runs the vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// Hardware virtualization where the host has it, else mvm's own emulation
    Auto,
    /// Hardware virtualization
    Kvm,
    /// mvm's own emulation, which translates code unless mvm.toml says otherwise
    Emu,
    /// the same, translated
    #[value(name = "emu:jit")]
    EmuJit,
    /// the same, interpreted: slower by far, and for comparisons
    #[value(name = "emu:interp")]
    EmuInterp,
}

impl Engine {
    /// How emulation works, where the name says so.
    pub fn tier(self) -> Option<EmuTier> {
        match self {
            Engine::EmuInterp => Some(EmuTier::Interp),
            Engine::EmuJit => Some(EmuTier::Jit),
            Engine::Auto | Engine::Kvm | Engine::Emu => None,
        }
    }
}

impl From<Engine> for EngineChoice {
    fn from(engine: Engine) -> Self {
        match engine {
            Engine::Auto => EngineChoice::Auto,
            Engine::Kvm => EngineChoice::Kvm,
            Engine::Emu | Engine::EmuInterp | Engine::EmuJit => EngineChoice::Emu,
        }
    }
}

/// How much of the host's processor the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cpu {
    /// x86-64-v2 and no more
    V2,
    /// x86-64-v3, with vectors of 256 bits
    V3,
    /// everything of the host; kvm only, and a snapshot goes on nowhere else
    Host,
}

impl From<Cpu> for CpuModel {
    fn from(cpu: Cpu) -> Self {
        match cpu {
            Cpu::V2 => CpuModel::V2,
            Cpu::V3 => CpuModel::V3,
            Cpu::Host => CpuModel::Host,
        }
    }
}

/// The host's pages that guest memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pages {
    /// no huge ones
    None,
    /// transparent ones, where the host's kernel finds some
    Thp,
    /// pages of 2 MiB from the host's pool, all reserved at the start
    #[value(name = "2m", alias = "2M")]
    Pool,
}

impl From<Pages> for HugePages {
    fn from(pages: Pages) -> Self {
        match pages {
            Pages::None => HugePages::None,
            Pages::Thp => HugePages::Transparent,
            Pages::Pool => HugePages::Pool,
        }
    }
}

/// What kind of guest a bare kernel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum UnikernelKind {
    /// One in Rust, or in anything else that takes plain words
    Rust,
    /// Unikraft
    Unikraft,
    /// Nanos, with its disk image
    Nanos,
    /// Solo5 hvt: MirageOS and others
    Hvt,
    /// Hermit: the kernel is its loader, the initrd the application
    Hermit,
    /// A multiboot kernel with its modules, started as PC emulators do: test kernels
    Multiboot,
    /// A Linux of its own: any distribution's kernel with its own initrd and disk
    Linux,
}

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// If the store has none of that name
    Missing,
    /// Always, so that it is the newest one
    Always,
    /// Never
    Never,
}

/// A form of `--timings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TimingsFormat {
    /// A line for each phase
    Text,
    /// One JSON object
    Json,
}
