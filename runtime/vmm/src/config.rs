//! What a machine is made of: plain data that travels to the monitor process.
//!
//! Files and sockets are named by [`FdIndex`], their place in the list of descriptors that goes
//! with the config; nothing here is a path, since the monitor opens none. Sizes are bytes.

use std::fmt;

pub use mvm_engine::cpuid::CpuModel;
use serde::{Deserialize, Serialize};

use crate::layout;

pub use boot::{BootProtocol, CmdlineStyle};
pub use emu::{EmuConfig, EmuTier};
pub use fs::FsConfig;
pub use hugepages::{HugePages, UnknownHugePages};
pub use net::NetConfig;

mod boot;
mod emu;
mod fs;
mod hugepages;
mod net;

/// Place of a descriptor in the list that travels with the config.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u32);

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Name of the machine, for logs and the process list.
    pub id: String,
    /// Number of vCPUs, `1..=`[`layout::MAX_VCPUS`].
    pub vcpus: u32,
    /// Guest RAM in bytes, rounded up to whole pages.
    pub memory: u64,
    /// Guest RAM that it can grow to while it runs, in bytes; not more than `memory` where it cannot.
    #[serde(default)]
    pub memory_max: u64,
    /// The host's pages that it is made of.
    #[serde(default)]
    pub hugepages: HugePages,
    /// What runs it.
    pub engine: EngineConfig,
    /// How the emulation engine works, where it is that.
    #[serde(default)]
    pub emu: EmuConfig,
    /// Why it is not hardware virtualization although nothing else was asked for; at most
    /// [`MAX_REASON`] bytes, for status and statistics.
    pub fallback: Option<String>,
    /// The processor that the guest sees; `None` for the most that engine and host have in common.
    pub cpu: Option<CpuModel>,
    /// The kernel.
    pub kernel: ImageSource,
    /// How it is entered.
    pub boot: BootProtocol,
    /// The initramfs, or the first module of a kernel that has modules, if there is one.
    pub initramfs: Option<ImageSource>,
    /// Further modules, at most [`MAX_MODULES`].
    #[serde(default)]
    pub modules: Vec<ModuleConfig>,
    /// The user's part of the kernel command line.
    pub cmdline: String,
    /// What the command line holds besides it.
    pub cmdline_style: CmdlineStyle,
    /// Whether what the kernel writes to port 0x501 is its status.
    #[serde(default)]
    pub exit_status: bool,
    /// Whether the kernel tells of its progress on the serial console (slow: every character is an
    /// exit).
    pub verbose: bool,
    /// Block devices, in the order of their names in the guest (`/dev/vda`, ...).
    pub disks: Vec<DiskConfig>,
    /// Places for disks that come while the guest runs, after those that are there from the start.
    pub disk_slots: u32,
    /// Network devices, in the order of their names in the guest.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Sockets between host and guest.
    pub vsock: Option<VsockConfig>,
    /// The serial console.
    pub console: ConsoleConfig,
    /// A second console, the guest's `/dev/hvc0`.
    #[serde(default)]
    pub virtio_console: Option<VirtioConsoleConfig>,
    /// The file system that the host shares.
    #[serde(default)]
    pub fs: Option<FsConfig>,
    /// Listening unix socket of the control protocol.
    pub control: Option<FdIndex>,
    /// File that takes the [`Outcome`](crate::Outcome) as JSON when the machine has ended.
    pub outcome: Option<FdIndex>,
    /// What happens when the process that started the monitor goes away.
    pub owner_gone: OwnerGone,
}

impl MachineConfig {
    /// A machine of one vCPU with nothing but kernel, RAM and console.
    pub fn new(id: impl Into<String>, memory: u64, kernel: ImageSource) -> Self {
        Self {
            id: id.into(),
            vcpus: 1,
            memory,
            memory_max: 0,
            hugepages: HugePages::default(),
            engine: EngineConfig::Emu,
            emu: EmuConfig::default(),
            fallback: None,
            cpu: None,
            kernel,
            boot: BootProtocol::Auto,
            initramfs: None,
            modules: Vec::new(),
            cmdline: String::new(),
            cmdline_style: CmdlineStyle::Auto,
            exit_status: false,
            verbose: false,
            disks: Vec::new(),
            disk_slots: 0,
            nets: Vec::new(),
            vsock: None,
            console: ConsoleConfig::default(),
            virtio_console: None,
            fs: None,
            control: None,
            outcome: None,
            owner_gone: OwnerGone::Continue,
        }
    }

    /// Places that the other devices leave for disks; `None` if they are too many themselves.
    fn places_for_disks(&self) -> Option<u64> {
        let nets = self.nets.len() as u64;
        let (places, others) = match self.boot {
            BootProtocol::Hvt => (MAX_HYPERCALL_DEVICES, nets),
            _ => {
                let others = FIXED_VIRTIO_DEVICES
                    + nets
                    + u64::from(layout::growth(self.memory, self.memory_max).is_some())
                    + u64::from(self.vsock.is_some())
                    + u64::from(self.virtio_console.is_some())
                    + u64::from(self.fs.is_some());
                (layout::MAX_VIRTIO_DEVICES.into(), others)
            }
        };
        places.checked_sub(others)
    }

    /// How many disks, or places for some, there can be besides those that it has.
    pub fn room_for_disks(&self) -> u32 {
        let places = self.places_for_disks().unwrap_or(0);
        let left = places.saturating_sub(self.disks.len() as u64);
        u32::try_from(left).unwrap_or(u32::MAX)
    }

    /// Checks everything that can be checked without opening a descriptor.
    ///
    /// # Errors
    /// The first field that no machine can have.
    pub fn validate(&self) -> Result<(), Error> {
        if self.id.is_empty() || self.id.len() > MAX_ID {
            return Err(Error::Id { len: self.id.len() });
        }
        if self.vcpus == 0 || self.vcpus > layout::MAX_VCPUS {
            return Err(Error::Vcpus { vcpus: self.vcpus });
        }
        if self.memory < layout::MIN_MEMORY || self.memory > layout::MAX_MEMORY {
            return Err(Error::Memory { bytes: self.memory });
        }
        if self.memory_max > layout::MAX_MEMORY {
            return Err(Error::Memory { bytes: self.memory_max });
        }
        let grows = layout::growth(self.memory, self.memory_max).is_some();
        if grows && self.hugepages == HugePages::Pool {
            return Err(Error::GrowthOfHugePages);
        }
        if let Some(reason) = self.fallback.as_ref().filter(|r| r.len() > MAX_REASON) {
            return Err(Error::Reason { len: reason.len() });
        }
        let disks = self.disks.len() as u64 + u64::from(self.disk_slots);
        let max = self.places_for_disks();
        if max.is_none_or(|max| disks > max) {
            return Err(Error::TooManyDisks { disks, max: max.unwrap_or(0) });
        }
        self.nets.iter().try_for_each(NetConfig::validate)?;
        if let Some(disk) = self.disks.iter().find(|d| d.serial.len() > MAX_SERIAL) {
            return Err(Error::DiskSerial { serial: disk.serial.clone() });
        }
        if self.modules.len() > MAX_MODULES {
            return Err(Error::TooManyModules { modules: self.modules.len() });
        }
        let fits = |text: &str| text.len() <= MAX_MODULE_TEXT && !text.contains('\0');
        if let Some(module) = self.modules.iter().find(|m| !fits(&m.text)) {
            return Err(Error::ModuleText { text: module.text.clone() });
        }
        let names =
            self.vsock.iter().filter_map(|vsock| vsock.dial.as_ref()).map(|dial| &dial.name);
        let is_name =
            |name: &str| (1..=MAX_DIAL_NAME).contains(&name.len()) && !name.contains(['/', '\0']);
        if let Some(name) = names.into_iter().find(|name| !is_name(name)) {
            return Err(Error::DialName { name: name.clone() });
        }
        match &self.vsock {
            Some(vsock) if vsock.cid < 3 || vsock.cid >= u64::from(u32::MAX) => {
                Err(Error::Cid { cid: vsock.cid })
            }
            _ => Ok(()),
        }
    }
}

/// Longest machine name in bytes.
pub const MAX_ID: usize = 128;

/// Longest reason for an engine in bytes.
pub const MAX_REASON: usize = 1024;

/// Most modules besides the initramfs: so many have a place in what a kernel is told.
pub const MAX_MODULES: usize = 15;

/// Longest text of a module in bytes.
pub const MAX_MODULE_TEXT: usize = 127;

/// Longest serial number of a disk in bytes (virtio 1.2, 5.2.6).
pub const MAX_SERIAL: usize = 20;

/// Longest name of sockets that a guest dials, in bytes: with a port and a way to the directory it fits the
/// address of a socket.
pub const MAX_DIAL_NAME: usize = 64;

/// Most devices of a Solo5 guest: the entries of a manifest but for the first, which is nobody's.
const MAX_HYPERCALL_DEVICES: u64 = 63;

/// Virtio devices that every machine has: entropy and balloon.
const FIXED_VIRTIO_DEVICES: u64 = 2;

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSource {
    /// The file.
    pub fd: FdIndex,
    /// First byte.
    pub offset: u64,
    /// Number of bytes; `None` takes everything up to the end of the file.
    pub len: Option<u64>,
}

impl ImageSource {
    /// A whole file.
    pub fn file(fd: FdIndex) -> Self {
        Self { fd, offset: 0, len: None }
    }
}

/// A file that is loaded beside a kernel which has modules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleConfig {
    /// What is loaded.
    pub content: ImageSource,
    /// What the kernel is told of it, at most [`MAX_MODULE_TEXT`] bytes.
    pub text: String,
}

/// What runs the guest. Whoever hands over a machine has chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineConfig {
    /// The emulation engine.
    #[default]
    Emu,
    /// Hardware virtualization.
    Kvm {
        /// The device of KVM, open for reading and writing.
        device: FdIndex,
    },
}

/// Which engine a user wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineChoice {
    /// The best one that this host can run.
    #[default]
    Auto,
    /// Hardware virtualization, or an error.
    Kvm,
    /// The emulation engine.
    Emu,
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineChoice::Auto => "auto",
            EngineChoice::Kvm => "kvm",
            EngineChoice::Emu => "emu",
        })
    }
}

impl std::str::FromStr for EngineChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "auto" => Ok(EngineChoice::Auto),
            "kvm" => Ok(EngineChoice::Kvm),
            "emu" => Ok(EngineChoice::Emu),
            _ => Err(Error::Engine { name: text.to_owned() }),
        }
    }
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Raw image: a file or a block device.
    pub fd: FdIndex,
    /// The guest may not write.
    pub read_only: bool,
    /// Serial number shown to the guest, at most [`MAX_SERIAL`] bytes.
    pub serial: String,
}

/// Sockets between host and guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Context id of the guest, 3 or more.
    pub cid: u64,
    /// Listening unix socket: who connects writes `CONNECT <port>\n` and then talks to that port
    /// of the guest.
    pub listener: Option<FdIndex>,
    /// What the guest may dial once each.
    pub guest_ports: Vec<GuestPort>,
    /// Where every other port leads; without it they are refused.
    #[serde(default)]
    pub dial: Option<DialConfig>,
}

/// Unix sockets that the guest may dial: port N is the one called `NAME_N` in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DialConfig {
    /// The directory, opened in any way.
    pub directory: FdIndex,
    /// What all names begin with, at most [`MAX_DIAL_NAME`] bytes.
    pub name: String,
}

/// A host port that the guest may dial, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestPort {
    /// Port on the host side.
    pub port: u32,
    /// Connected unix stream socket that the guest's first connection is joined to; later ones are
    /// refused.
    pub stream: FdIndex,
}

/// The serial console.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Where the output goes besides the ring.
    pub log: Option<FdIndex>,
    /// What is typed at it; the open file is made non-blocking.
    #[serde(default)]
    pub input: Option<FdIndex>,
    /// Bytes of the most recent output kept for error reports.
    pub ring: u32,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self { log: None, input: None, ring: 16 * 1024 }
    }
}

/// A virtio console. Both open files are made non-blocking.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioConsoleConfig {
    /// Where its output goes, or nowhere. The guest waits while the other end takes nothing.
    pub output: Option<FdIndex>,
    /// Where its input comes from.
    pub input: Option<FdIndex>,
}

/// What happens when the process that started the monitor goes away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OwnerGone {
    /// The machine goes on; the control socket is there for the next owner.
    #[default]
    Continue,
    /// The machine ends.
    End,
}

/// A field that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The name is empty or too long.
    #[error("a machine's name has 1 to {MAX_ID} bytes, this one has {len}")]
    Id {
        /// Its length.
        len: usize,
    },
    /// No or too many vCPUs.
    #[error("{vcpus} vCPUs asked for; there can be 1 to {}", layout::MAX_VCPUS)]
    Vcpus {
        /// vCPUs asked for.
        vcpus: u32,
    },
    /// Too little or too much memory.
    #[error(
        "{} of guest memory asked for; there can be {} to {}",
        mib(*bytes), mib(layout::MIN_MEMORY), mib(layout::MAX_MEMORY)
    )]
    Memory {
        /// Bytes asked for.
        bytes: u64,
    },
    /// The host's pool has no pages that are there only when they are wanted.
    #[error(
        "memory from the host's pool of huge pages is reserved when the machine is made, and cannot grow: leave either out"
    )]
    GrowthOfHugePages,
    /// More disks than places.
    #[error("{disks} block devices asked for; there can be {max}")]
    TooManyDisks {
        /// Disks and empty slots asked for.
        disks: u64,
        /// Places for them.
        max: u64,
    },
    /// A serial number does not fit.
    #[error("the disk serial {serial:?} is longer than {MAX_SERIAL} bytes")]
    DiskSerial {
        /// The number.
        serial: String,
    },
    /// More modules than a kernel can be told of.
    #[error("{modules} further modules asked for; there can be {MAX_MODULES}")]
    TooManyModules {
        /// How many.
        modules: usize,
    },
    /// What is told of a module does not fit.
    #[error(
        "what is told of a module has no NUL and at most {MAX_MODULE_TEXT} bytes; this is {text:?}"
    )]
    ModuleText {
        /// What was to be told.
        text: String,
    },
    /// A reason for an engine is too long.
    #[error("the reason for the engine has {len} bytes; at most {MAX_REASON} are taken")]
    Reason {
        /// Its length.
        len: usize,
    },
    /// A network device that cannot be.
    #[error("a network device cannot be made: {what}")]
    Net {
        /// What is wrong with it.
        what: String,
    },
    /// A context id that is reserved or out of range.
    #[error("vsock context id {cid} is reserved; a guest has 3 to {}", u32::MAX - 1)]
    Cid {
        /// The id.
        cid: u64,
    },
    /// A name that no socket in a directory has, or that is too long.
    #[error(
        "sockets that the guest dials are files of one directory, whose names begin with at most \
         {MAX_DIAL_NAME} bytes; this is {name:?}"
    )]
    DialName {
        /// What they were to begin with.
        name: String,
    },
    /// No such boot protocol.
    #[error("there is no boot protocol {name:?}: choose auto, linux, pvh, multiboot or hvt")]
    BootProtocol {
        /// What was asked for.
        name: String,
    },
    /// No such engine.
    #[error("there is no engine {name:?}: choose auto, kvm or emu")]
    Engine {
        /// What was asked for.
        name: String,
    },
    /// The emulation engine has no such tier.
    #[error("the emulation engine has no tier {name:?}: choose interp or jit")]
    Tier {
        /// What was asked for.
        name: String,
    },
}

/// A size for people.
pub(crate) fn mib(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    if bytes >= MIB && bytes.is_multiple_of(MIB) {
        format!("{} MiB", bytes / MIB)
    } else if bytes >= MIB {
        format!("{}.{} MiB", bytes / MIB, bytes % MIB * 10 / MIB)
    } else {
        format!("{bytes} bytes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig::new("vm", 256 << 20, ImageSource::file(FdIndex(0)))
    }

    #[test]
    fn a_plain_machine_is_valid_and_survives_json() {
        let config = config();
        config.validate().unwrap();
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<MachineConfig>(&json).unwrap(), config);
    }

    #[test]
    fn impossible_fields_are_named() {
        let check = |change: fn(&mut MachineConfig)| {
            let mut config = config();
            change(&mut config);
            config.validate().unwrap_err()
        };
        assert_eq!(check(|c| c.vcpus = 0), Error::Vcpus { vcpus: 0 });
        assert_eq!(check(|c| c.memory = 5), Error::Memory { bytes: 5 });
        let bytes = layout::MAX_MEMORY + 1;
        assert_eq!(check(|c| c.memory_max = layout::MAX_MEMORY + 1), Error::Memory { bytes });
        let pool = |c: &mut MachineConfig| {
            (c.hugepages, c.memory_max) = (HugePages::Pool, c.memory + 1);
        };
        assert_eq!(check(pool), Error::GrowthOfHugePages);
        assert_eq!(check(|c| c.id.clear()), Error::Id { len: 0 });
        let long = check(|c| c.fallback = Some("x".repeat(MAX_REASON + 1)));
        assert_eq!(long, Error::Reason { len: MAX_REASON + 1 });
        for name in ["", "a/b", "a\0b", &"x".repeat(MAX_DIAL_NAME + 1)] {
            let mut config = config();
            let dial = Some(DialConfig { directory: FdIndex(1), name: name.into() });
            config.vsock =
                Some(VsockConfig { cid: 3, listener: None, guest_ports: Vec::new(), dial });
            assert_eq!(config.validate().unwrap_err(), Error::DialName { name: name.into() });
        }
        assert!(matches!(check(|c| c.disk_slots = 100), Error::TooManyDisks { .. }));
        assert!(matches!(check(|c| c.disk_slots = u32::MAX), Error::TooManyDisks { .. }));
        let grows = MachineConfig { memory_max: 1 << 30, ..config() };
        assert_eq!(grows.room_for_disks() + 1, config().room_for_disks(), "a device of its own");
        let full = MachineConfig { disk_slots: config().room_for_disks(), ..config() };
        assert_eq!((full.validate(), full.disk_slots), (Ok(()), layout::MAX_VIRTIO_DEVICES - 2));
        let module = |text: &str| ModuleConfig {
            content: ImageSource::file(FdIndex(0)),
            text: text.to_owned(),
        };
        let with = |modules: Vec<ModuleConfig>| MachineConfig { modules, ..config() }.validate();
        assert_eq!(with(vec![module(&"x".repeat(127)); 15]), Ok(()));
        assert_eq!(with(vec![module(""); 16]), Err(Error::TooManyModules { modules: 16 }));
        for text in ["x".repeat(128), "\0".into()] {
            assert_eq!(with(vec![module(&text)]), Err(Error::ModuleText { text }));
        }
        let vsock = |cid| VsockConfig { cid, listener: None, guest_ports: Vec::new(), dial: None };
        let mut config = config();
        config.vsock = Some(vsock(2));
        assert_eq!(config.validate().unwrap_err(), Error::Cid { cid: 2 });
    }

    #[test]
    fn boot_protocols_are_called_by_the_same_name_everywhere() {
        for name in ["auto", "linux", "pvh", "multiboot", "hvt"] {
            let protocol: BootProtocol = name.parse().unwrap();
            assert_eq!(protocol.to_string(), name);
            assert_eq!(serde_json::to_value(protocol).unwrap(), name);
        }
        assert!(matches!("bios".parse::<BootProtocol>(), Err(Error::BootProtocol { .. })));
    }

    #[test]
    fn unknown_fields_are_refused() {
        let mut json = serde_json::to_value(config()).unwrap();
        json["surprise"] = 1.into();
        assert!(serde_json::from_value::<MachineConfig>(json).is_err());
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(mib(8 << 20), "8 MiB");
        assert_eq!(mib((8 << 20) + (1 << 19)), "8.5 MiB");
        assert_eq!(mib(12), "12 bytes");
    }
}
