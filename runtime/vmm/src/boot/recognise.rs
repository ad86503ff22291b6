//! From a file to the protocol by which it is booted.

use super::elf::{self, ElfFile};
use super::hvt::{self, HvtImage};
use super::linux::{self, LinuxImage};
use super::multiboot::{self, MultibootImage};
use super::pvh::{self, PvhImage};
use super::{BootImage, Error, Section};
use crate::config::BootProtocol;

/// Reads `file` as a kernel for `wanted`, or finds out for which.
///
/// A bzImage is Linux in any case, and what says that it is made for hvt runs nowhere else. Then a
/// multiboot header counts, since nobody puts one into a file by accident, then the other ELF notes:
/// Linux has a PVH note too, and is better off with its own protocol.
///
/// # Errors
/// It is none, or none of ours, or not one for `wanted`.
pub fn recognise(file: &Section, wanted: BootProtocol) -> Result<Box<dyn BootImage>, Error> {
    let mut head = vec![0; multiboot::SEARCHED];
    let got =
        file.read_at(&mut head, 0).map_err(|source| Error::Read { what: "the kernel", source })?;
    head.truncate(got);
    let is_elf = head.starts_with(&elf::MAGIC);
    let protocol = |reason: &str| Error::Protocol { wanted, reason: reason.into() };
    match wanted {
        BootProtocol::Auto => automatic(file, &head),
        BootProtocol::Linux if is_elf => {
            Ok(Box::new(LinuxImage::elf(ElfFile::open(file)?.high()?)?))
        }
        BootProtocol::Linux => match linux::bzimage(&head, file.size())? {
            Some(image) => Ok(Box::new(image)),
            None => Err(protocol("it is neither an ELF file nor a bzImage")),
        },
        BootProtocol::Multiboot => match multiboot(file, &head)? {
            Some(image) => Ok(image),
            None => Err(protocol("there is no multiboot header in its first 8 KiB")),
        },
        BootProtocol::Pvh if !is_elf => Err(protocol("it is no ELF file")),
        BootProtocol::Pvh => {
            let elf = ElfFile::open(file)?.high()?;
            match pvh::entry(&elf)? {
                Some(entry) => Ok(Box::new(PvhImage::new(elf, entry))),
                None => Err(protocol("it has no ELF note of Xen's with a PVH entry (type 18)")),
            }
        }
        BootProtocol::Hvt if !is_elf => Err(protocol("it is no ELF file")),
        BootProtocol::Hvt => {
            let elf = ElfFile::open(file)?.high()?;
            match hvt::target(&elf)? {
                target if hvt::is_hvt(target) => Ok(Box::new(HvtImage::new(elf)?)),
                Some(other) => Err(hvt::wrong_target(other)),
                None => Err(protocol("it has no ELF note of Solo5's (\"ABI1\")")),
            }
        }
    }
}

fn automatic(file: &Section, head: &[u8]) -> Result<Box<dyn BootImage>, Error> {
    if !head.starts_with(&elf::MAGIC) {
        if let Some(image) = linux::bzimage(head, file.size())? {
            return Ok(Box::new(image));
        }
        return multiboot(file, head)?.ok_or_else(|| not_a_kernel(head));
    }
    // Address fields count more than whatever the ELF headers say.
    if multiboot::find(head)?.is_some_and(|h| h.addresses.is_some())
        && let Some(image) = multiboot(file, head)?
    {
        return Ok(image);
    }
    let elf = ElfFile::open(file)?;
    let solo5 = hvt::target(&elf)?;
    if hvt::is_hvt(solo5) {
        return Ok(Box::new(HvtImage::new(elf.high()?)?));
    }
    if let Some(image) = multiboot(file, head)? {
        return Ok(image);
    }
    let elf = elf.high()?;
    if !linux::is_linux(&elf)
        && let Some(entry) = pvh::entry(&elf)?
    {
        return Ok(Box::new(PvhImage::new(elf, entry)));
    }
    match (solo5, elf.bits) {
        (Some(target), _) => Err(hvt::wrong_target(target)),
        (None, 64) => Ok(Box::new(LinuxImage::elf(elf)?)),
        (None, _) => Err(Error::NoEntry),
    }
}

fn multiboot(file: &Section, head: &[u8]) -> Result<Option<Box<dyn BootImage>>, Error> {
    let Some(header) = multiboot::find(head)? else { return Ok(None) };
    let elf = || head.starts_with(&elf::MAGIC).then(|| ElfFile::open(file)).transpose();
    Ok(Some(Box::new(MultibootImage::new(header, file, elf)?)))
}

/// Says what a file is that is no kernel.
fn not_a_kernel(head: &[u8]) -> Error {
    let hint = match head {
        [] => " (the file is empty)",
        [0x1f, 0x8b, ..] => " (gzip: unpack it first)",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => " (zstd: unpack it first)",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => " (xz: unpack it first)",
        [b'#', b'!', ..] => " (a script)",
        _ if head.get(56..60) == Some(b"ARM\x64") => " (a kernel for arm64)",
        _ if head.get(56..60) == Some(b"RSC\x05") => " (a kernel for riscv)",
        _ => "",
    };
    let first: Vec<String> = head.iter().take(8).map(|b| format!("{b:02x}")).collect();
    let first_bytes = if first.is_empty() { "nothing".into() } else { first.join(" ") };
    Error::NotAKernel { first_bytes, hint: hint.into() }
}
