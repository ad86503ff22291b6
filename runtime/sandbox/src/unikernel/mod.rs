//! Unikernel containers: images and files whose content is a kernel of its own, with no Linux and no
//! agent around it.
//!
//! [`recognise`] looks at what an image says of itself, in the forms that unikernel builders use, and
//! says how it is booted ([`UnikernelPlan`]) or that it is an ordinary image. It opens nothing: files
//! of the image are read through [`Tree`]. Everything here is the image's word, which is not trusted:
//! keys that are not known are not looked at, values are checked, and nothing is passed on in a form
//! in which it could mean something else.
//!
//! Docs: `docs/unikernels.md`.

mod address;
mod cmdline;
mod hermit;
mod krun;
mod mounts;
mod tree;
mod unikraft;
mod urunc;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use mvm_vmm::config::{BootProtocol, CmdlineStyle};

pub use address::{Addressed, Addresses, Given, Told};
pub use cmdline::Words;
pub use krun::Size;
pub use mounts::{Mount, MountPoint};
pub use tree::{DirTree, ErofsTree, Files, Room};

/// Keys and values as labels and annotations have them.
pub type Pairs = BTreeMap<String, String>;

/// What kind of guest it is: that decides how its command line is put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A kernel that takes its words as they are.
    Rust,
    /// Unikraft: library parameters, `--`, the application's arguments.
    Unikraft,
    /// Nanos: words as they are; the program is on its disk.
    Nanos,
    /// A Solo5 guest, MirageOS for instance: words as they are.
    Hvt,
    /// Rumprun: a JSON document.
    Rumprun,
    /// Hermit: kernel arguments, `--`, the application's arguments.
    Hermit,
    /// A multiboot kernel that is told what PC emulators tell: its file's name before its words.
    Multiboot,
    /// A Linux kernel that is booted as it is.
    Linux,
}

impl Kind {
    /// Whether there is a place for environment variables on its command line.
    pub fn takes_environment(self) -> bool {
        matches!(self, Self::Unikraft | Self::Nanos | Self::Linux | Self::Rumprun)
    }

    /// Whether its machine has devices by virtio, sockets among them.
    pub fn has_sockets(self) -> bool {
        !matches!(self, Self::Hvt | Self::Rumprun)
    }

    /// Whether it can be typed at: Solo5's hypercalls have none that reads.
    pub fn takes_input(self) -> bool {
        !matches!(self, Self::Hvt | Self::Rumprun)
    }

    /// Whether it tells its exit code by port 0x501.
    pub fn tells_exit_status(self) -> bool {
        self == Self::Nanos
    }

    /// What it is told besides its words: where its devices are, if that is where it looks for them when it is entered
    /// by `boot`.
    pub fn style(self, boot: BootProtocol) -> CmdlineStyle {
        match self {
            Self::Nanos if boot != BootProtocol::Linux => CmdlineStyle::Bare,
            Self::Rust | Self::Unikraft | Self::Nanos => CmdlineStyle::Devices,
            Self::Hvt | Self::Rumprun | Self::Hermit | Self::Multiboot => CmdlineStyle::Bare,
            Self::Linux => CmdlineStyle::Stock,
        }
    }

    /// The boot protocol, where the kernel's file need not be asked.
    pub fn boot(self) -> BootProtocol {
        match self {
            Self::Hvt | Self::Rumprun => BootProtocol::Hvt,
            // Nanos looks for virtio devices on its command line only when it is entered by this one.
            Self::Linux | Self::Nanos => BootProtocol::Linux,
            Self::Multiboot => BootProtocol::Multiboot,
            _ => BootProtocol::Auto,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rust => "rust",
            Self::Unikraft => "unikraft",
            Self::Nanos => "nanos",
            Self::Hvt => "hvt",
            Self::Rumprun => "rumprun",
            Self::Hermit => "hermit",
            Self::Multiboot => "multiboot",
            Self::Linux => "linux",
        })
    }
}

/// How a guest wants to be told of its network: its kind, and what is not the same in all guests of that kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dialect {
    /// Its kind.
    pub kind: Kind,
    /// It is a Unikraft before 0.16.1.
    pub old_unikraft: bool,
    /// The name of its network device in its own manifest, for guests of Solo5 that have another than `service`.
    pub solo5_net: Option<String>,
    /// It is a guest of Solo5 that has options for IPv6.
    pub ipv6: bool,
}

impl From<Kind> for Dialect {
    fn from(kind: Kind) -> Self {
        Self { kind, old_unikraft: false, solo5_net: None, ipv6: false }
    }
}

/// The name of MirageOS' option for a gateway of IPv6, as it stands in every kernel that has one.
const MIRAGE_IPV6: &[u8] = b"ipv6-gateway";

impl Dialect {
    /// Looks into the kernel for what it can be told. Nothing in it is interpreted.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn look_into(&mut self, kernel: &File) -> io::Result<()> {
        if self.kind != Kind::Hvt {
            return Ok(());
        }
        let mut window = vec![0; 1 << 20];
        let (mut kept, mut at) = (0, 0);
        while !self.ipv6 {
            let read = match kernel.read_at(&mut window[kept..], at) {
                Ok(0) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                read => read?,
            };
            at += read as u64;
            let have = kept + read;
            self.ipv6 = window[..have].windows(MIRAGE_IPV6.len()).any(|bytes| bytes == MIRAGE_IPV6);
            // What may be its beginning.
            kept = have.min(MIRAGE_IPV6.len() - 1);
            window.copy_within(have - kept..have, 0);
        }
        Ok(())
    }

    /// What MirageOS' options begin with.
    fn mirage_group(&self) -> String {
        match self.solo5_net.as_deref() {
            None | Some("" | "service") => String::new(),
            Some(name) => format!("{name}-"),
        }
    }
}

/// What an image and its user say.
#[derive(Debug, Clone, Copy)]
pub struct Packaging<'a> {
    /// Annotations of the runtime specification: the user's, so they win.
    pub annotations: &'a Pairs,
    /// Annotations of the manifest.
    pub manifest: &'a Pairs,
    /// Annotations of the layers, lowest layer first.
    pub layers: &'a [&'a Pairs],
    /// Labels of the image.
    pub labels: &'a Pairs,
    /// Variables, `NAME=VALUE`.
    pub env: &'a [String],
    /// First arguments.
    pub entrypoint: &'a [String],
    /// Arguments that the user's replace.
    pub cmd: &'a [String],
    /// The user's arguments.
    pub args: &'a [String],
    /// Words of the user's for the kernel itself.
    pub kernel_args: &'a str,
    /// Disks of the user's, which come after those of the image: where each is to be mounted.
    pub disks: &'a [Option<MountPoint>],
    /// The platform's system is one by which only unikernels go.
    pub unikernel_platform: bool,
    /// The image's files.
    pub tree: &'a dyn Tree,
}

impl Packaging<'_> {
    /// What would be executed if this were a container of processes.
    fn command(&self) -> Vec<String> {
        let rest = if self.args.is_empty() { self.cmd } else { self.args };
        self.entrypoint.iter().chain(rest).cloned().collect()
    }

    /// What a guest of this kind is told of the user's disks, of which the first has the number `first`.
    fn mounts(&self, kind: Kind, first: usize) -> Result<Vec<Mount>, Error> {
        let mut mounts = Vec::new();
        for (index, at) in self.disks.iter().enumerate() {
            let Some(at) = at.clone() else { continue };
            let mount = Mount { disk: first + index, at };
            if let Some(reason) = mount.untold(kind) {
                return Err(Error::Word {
                    what: format!("the mount point {} of --disk", mount.at),
                    reason,
                });
            }
            mounts.push(mount);
        }
        Ok(mounts)
    }
}

/// Reads files of an image. Paths are absolute in the image, and links in it cannot lead out.
pub trait Tree: fmt::Debug {
    /// The first `limit` bytes of a regular file; `None` if there is no such file.
    ///
    /// # Errors
    /// The image cannot be read.
    fn head(&self, path: &str, limit: usize) -> Result<Option<Vec<u8>>, Error>;
}

/// Takes files out of an image.
pub trait Extract: Tree {
    /// A copy of a regular file, in a file without a name of which nobody else has a descriptor. What is zero in it takes no
    /// room.
    ///
    /// # Errors
    /// There is no such file, it is larger than `limit` bytes, or it cannot be copied.
    fn extract(&self, path: &str, limit: u64, room: Room<'_>) -> Result<File, Error>;

    /// A disk that holds all that is in the image, as ext2, in such a file.
    ///
    /// # Errors
    /// There is more than `limit` bytes of it, or it cannot be copied.
    fn whole(&self, limit: u64, room: Room<'_>) -> Result<File, Error>;
}

/// What a disk is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// A raw image in the image: its path.
    File(String),
    /// All that is in the image.
    Root,
}

/// How a unikernel is booted. Paths are absolute in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnikernelPlan {
    /// Path of the kernel.
    pub kernel: String,
    /// Path of the initrd.
    pub initrd: Option<String>,
    /// A disk.
    pub disk: Option<DiskSource>,
    /// How the kernel is entered, as far as the packaging says.
    pub boot: BootProtocol,
    /// The whole command line, but for the guest's addresses.
    pub cmdline: String,
    /// How it is told those.
    pub dialect: Dialect,
    /// What the image wants to be told and the guest is not, in sentences.
    pub left_out: Vec<String>,
    /// Whether the variables are on it.
    pub environment: bool,
    /// The application's arguments in it, for lists of containers.
    pub words: Vec<String>,
}

/// What an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recognised {
    /// A kernel of its own.
    Unikernel(UnikernelPlan),
    /// A root file system for Linux, with the size of machine that it asks for.
    Linux(Size),
}

/// Why an image that calls itself a unikernel cannot be run.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A key that is known has a value that is not.
    #[error("{key} in the image's {place}: {reason}")]
    Value {
        /// The key.
        key: String,
        /// Where it is.
        place: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A key has to be there and is not.
    #[error("{key} is missing in the image's {place}")]
    Missing {
        /// The key.
        key: &'static str,
        /// Where it should be.
        place: &'static str,
    },
    /// A word cannot be put on a command line.
    #[error("{what} cannot be put on the kernel's command line: {reason}")]
    Word {
        /// Which.
        what: String,
        /// Why.
        reason: &'static str,
    },
    /// There is no disk of all that is in the image.
    #[error("the image's files cannot be given to the guest as a disk: {reason}")]
    Disk {
        /// Why.
        reason: String,
    },
    /// A file of the image cannot be used.
    #[error("{path} in the image {reason}")]
    File {
        /// Its path.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl UnikernelPlan {
    /// What kind of guest it is.
    pub fn kind(&self) -> Kind {
        self.dialect.kind
    }
}

/// Says what an image is.
///
/// # Errors
/// It calls itself a unikernel, or asks for a machine, in a way that makes no sense.
pub fn recognise(packaging: &Packaging<'_>) -> Result<Recognised, Error> {
    let plan = match urunc::recognise(packaging)? {
        Some(plan) => Some(plan),
        None => match unikraft::recognise(packaging)? {
            Some(plan) => Some(plan),
            None => hermit::recognise(packaging)?,
        },
    };
    match plan {
        Some(plan) => Ok(Recognised::Unikernel(plan)),
        None => krun::size(packaging).map(Recognised::Linux),
    }
}

/// Whether annotations alone say that it is a unikernel.
pub fn is_annotated(annotations: &Pairs) -> bool {
    urunc::is_annotated(annotations)
}

#[cfg(test)]
mod tests;
