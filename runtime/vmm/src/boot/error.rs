//! Why a guest cannot be booted.

use std::io;

use crate::config::{BootProtocol, mib};
use crate::layout;

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {what}: {source}")]
    Read {
        /// Kernel or initramfs.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The file is something else.
    #[error(
        "this is not a kernel: neither an ELF file nor a bzImage, and without a multiboot header; \
         it begins with {first_bytes}{hint}"
    )]
    NotAKernel {
        /// The first bytes in hexadecimal.
        first_bytes: String,
        /// What it may be instead.
        hint: String,
    },
    /// Another protocol was asked for than the file has.
    #[error("the kernel cannot be booted by the protocol {wanted}: {reason}")]
    Protocol {
        /// What was asked for.
        wanted: BootProtocol,
        /// What the file lacks.
        reason: String,
    },
    /// An ELF file that says nothing of how it wants to be entered.
    #[error(
        "the kernel is a 32-bit ELF file with neither a multiboot header in its first 8 KiB nor a \
         PVH note: there is no telling how to enter it"
    )]
    NoEntry,
    /// An ELF file for another processor.
    #[error(
        "the kernel is a {bits}-bit ELF file for machine type {machine}; one for x86 (machine type \
         62, or 3 for 32 bits) is needed"
    )]
    WrongMachine {
        /// 32 or 64.
        bits: u32,
        /// `e_machine`.
        machine: u16,
    },
    /// The ELF file makes no sense as a kernel.
    #[error("the kernel's ELF file is damaged: {0}")]
    Elf(String),
    /// A segment lies where none can be.
    #[error("the kernel wants {size:#x} bytes at {start:#x}, which is no place for a kernel")]
    Segment {
        /// Physical address.
        start: u64,
        /// Bytes.
        size: u64,
    },
    /// A multiboot header asks for something that there is not, or makes no sense.
    #[error("the kernel's multiboot header at {at:#x} of its file cannot be served: {reason}")]
    Multiboot {
        /// Where the header is.
        at: u64,
        /// Why.
        reason: String,
    },
    /// The Solo5 notes cannot be served.
    #[error("the Solo5 kernel cannot be run: {0}")]
    Hvt(String),
    /// A bzImage without 64-bit entry or of an old protocol.
    #[error("the bzImage has no 64-bit entry (boot protocol {major}.{minor:02}); 2.12 is needed")]
    OldBzImage {
        /// Protocol version.
        major: u16,
        /// Protocol version.
        minor: u16,
    },
    /// The loader failed in the middle.
    #[error("cannot load the kernel: {0}")]
    Load(linux_loader::loader::Error),
    /// Kernel and initramfs do not fit.
    #[error(
        "{} of guest memory are not enough for this kernel and initramfs; give at least {}",
        mib(*have), mib(*need)
    )]
    NotEnoughMemory {
        /// Bytes of guest RAM.
        have: u64,
        /// Bytes needed at least.
        need: u64,
    },
    /// Kernel and initramfs are larger than the room below the device hole.
    #[error(
        "kernel and initramfs need {}; there are {} below the device hole",
        mib(*need), mib(layout::LOW_MEMORY_END)
    )]
    TooLarge {
        /// Bytes needed.
        need: u64,
    },
    /// The protocol has no place for an initramfs.
    #[error("an initramfs was given, but the protocol {protocol} has no place for one")]
    NoInitramfs {
        /// The kernel's protocol.
        protocol: BootProtocol,
    },
    /// The protocol has a place for one initramfs.
    #[error("{count} initrd files were given, and the protocol {protocol} has a place for one")]
    OneInitramfs {
        /// The kernel's protocol.
        protocol: BootProtocol,
        /// How many there are.
        count: usize,
    },
    /// The command line cannot be made.
    #[error(
        "the kernel command line cannot be made: {reason} (your part has {extra} bytes; there is \
         room for {max} in all)"
    )]
    Cmdline {
        /// Why.
        reason: String,
        /// Bytes given by the user.
        extra: usize,
        /// Bytes that it may have in all.
        max: usize,
    },
    /// A boot structure does not fit guest memory.
    #[error("the {what} does not fit guest memory at {at:#x}")]
    Structure {
        /// Which.
        what: &'static str,
        /// Guest physical address.
        at: u64,
    },
}

impl Error {
    /// Makes [`Error::Read`] of what the host says.
    pub(super) fn reading(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Read { what, source }
    }
}
