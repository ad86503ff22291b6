//! How a kernel is entered and what its command line holds.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Error;

/// The agreement between loader and kernel: where the kernel lies, how it is entered, what it is
/// told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootProtocol {
    /// What the kernel's file says.
    #[default]
    Auto,
    /// Linux/x86 64-bit boot protocol: bzImage and 64-bit ELF files.
    Linux,
    /// Xen's PVH entry: ELF files with a note that names it.
    Pvh,
    /// Multiboot 1: files with its header.
    Multiboot,
    /// Solo5's hvt: ELF files with its notes.
    Hvt,
}

impl BootProtocol {
    const ALL: [(&'static str, Self); 5] = [
        ("auto", Self::Auto),
        ("linux", Self::Linux),
        ("pvh", Self::Pvh),
        ("multiboot", Self::Multiboot),
        ("hvt", Self::Hvt),
    ];
}

impl fmt::Display for BootProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(_, p)| p == self).map_or("", |(name, _)| name);
        f.write_str(name)
    }
}

impl std::str::FromStr for BootProtocol {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.iter().find(|(name, _)| *name == text).map(|(_, p)| *p);
        found.ok_or_else(|| Error::BootProtocol { name: text.to_owned() })
    }
}

/// What the command line holds besides the user's own words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CmdlineStyle {
    /// [`CmdlineStyle::Stock`] for a bzImage, which is how distributions ship their kernels;
    /// [`CmdlineStyle::Linux`] for a vmlinux; [`CmdlineStyle::Devices`] for another kernel that
    /// is entered as if it were Linux; [`CmdlineStyle::Bare`] for all others.
    #[default]
    Auto,
    /// What every Linux guest is told, the virtio devices, then the user's words.
    Linux,
    /// Where the console is and that a panic ends the machine, then the user's words: for any
    /// distribution's kernel, which finds the devices through ACPI.
    Stock,
    /// The user's words and a `virtio_mmio.device=SIZE@ADDRESS:IRQ` for each virtio device, before the
    /// first `--` if there is one and at the end otherwise.
    Devices,
    /// The user's words as they are.
    Bare,
}

impl CmdlineStyle {
    /// Whether the kernel is Linux.
    pub(crate) fn is_linux(self) -> bool {
        matches!(self, Self::Linux | Self::Stock)
    }

    /// Whether there are ACPI tables: our own guests' kernel does without.
    pub(crate) fn has_acpi(self) -> bool {
        !matches!(self, Self::Auto | Self::Linux)
    }

    /// Whether the command line tells where the virtio devices are. If it does not, ACPI does: a
    /// kernel that heeds both would find each device twice.
    pub(crate) fn announces_devices(self) -> bool {
        match self {
            Self::Auto | Self::Linux | Self::Devices => true,
            Self::Stock | Self::Bare => false,
        }
    }
}
