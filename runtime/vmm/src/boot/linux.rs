//! The Linux/x86 64-bit boot protocol (Documentation/arch/x86/boot.rst), for bzImages and for ELF
//! files. Other kernels speak it too: their ELF files are entered the same way.

mod zero_page;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::cpu::{self, Entry, Mode, reg};
use super::elf::ElfFile;
use super::{BootImage, Error, ModulePlace, Placing, Section};
use crate::config::{BootProtocol, CmdlineStyle};
use crate::layout;
use zero_page::ZeroPage;

/// `header`: "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;

/// Where the setup header is in the file.
const HEADER_AT: usize = 0x1f1;

/// Oldest protocol version with `xloadflags`.
const VERSION_64: u16 = 0x020c;

/// `xloadflags`: there is a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;

/// Offset of the 64-bit entry from where a bzImage was loaded.
const BZIMAGE_ENTRY_64: u64 = 0x200;

/// What Linux needs beyond its own image and twice the initramfs (as archive and unpacked): page
/// descriptors, early allocations, the first processes.
pub const WORKING_MEMORY: u64 = 16 << 20;

/// A kernel that is entered by this protocol.
#[derive(Debug)]
pub struct LinuxImage {
    form: Form,
    is_linux: bool,
}

#[derive(Debug)]
enum Form {
    Elf(ElfFile),
    /// It unpacks itself.
    BzImage {
        header: Box<setup_header>,
        size: u64,
    },
}

/// Whether notes say that a kernel is Linux: build salt and LTO information are the kernel's own, and
/// Xen's notes name the guest.
pub fn is_linux(elf: &ElfFile) -> bool {
    const XEN_GUEST_OS: u32 = 6;
    elf.notes.iter().any(|n| n.owner == b"Linux")
        || elf.note(b"Xen", XEN_GUEST_OS).is_some_and(|n| n.content.starts_with(b"linux"))
}

/// Takes a file for a bzImage if it is one.
///
/// # Errors
/// It is one without a 64-bit entry.
pub fn bzimage(head: &[u8], size: u64) -> Result<Option<LinuxImage>, Error> {
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    let Some(from) = head.get(HEADER_AT..HEADER_AT + bytes.len()) else { return Ok(None) };
    bytes.copy_from_slice(from);
    if header.header != HEADER_MAGIC {
        return Ok(None);
    }
    if header.version < VERSION_64 || header.xloadflags & XLF_KERNEL_64 == 0 {
        let (major, minor) = (header.version >> 8, header.version & 0xff);
        return Err(Error::OldBzImage { major, minor });
    }
    let form = Form::BzImage { header: Box::new(header), size };
    Ok(Some(LinuxImage { form, is_linux: true }))
}

impl LinuxImage {
    /// A kernel in an ELF file.
    ///
    /// # Errors
    /// It is not for 64 bits, or its entry point is nowhere.
    pub fn elf(elf: ElfFile) -> Result<Self, Error> {
        if elf.bits != 64 {
            let reason = "its entry is in 64-bit mode, and the file is a 32-bit one".into();
            return Err(Error::Protocol { wanted: BootProtocol::Linux, reason });
        }
        elf.check_entry(elf.entry)?;
        let is_linux = is_linux(&elf);
        Ok(Self { form: Form::Elf(elf), is_linux })
    }
}

impl BootImage for LinuxImage {
    fn protocol(&self) -> BootProtocol {
        BootProtocol::Linux
    }

    fn cmdline_style(&self) -> CmdlineStyle {
        match self.form {
            // That is how distributions ship their kernels.
            Form::BzImage { .. } => CmdlineStyle::Stock,
            Form::Elf(_) if self.is_linux => CmdlineStyle::Linux,
            Form::Elf(_) => CmdlineStyle::Devices,
        }
    }

    fn end(&self) -> u64 {
        match &self.form {
            Form::Elf(elf) => elf.end(),
            Form::BzImage { header, size } => {
                let start = header.pref_address.max(u64::from(header.code32_start));
                start.saturating_add(u64::from(header.init_size).max(*size))
            }
        }
    }

    fn working_memory(&self, module: u64) -> u64 {
        if self.is_linux { WORKING_MEMORY.saturating_add(module) } else { 0 }
    }

    fn module_place(&self) -> ModulePlace {
        ModulePlace::High
    }

    fn place(&self, file: &mut Section, placing: &Placing<'_>) -> Result<Entry, Error> {
        let ram = placing.ram;
        let (header, rip) = match &self.form {
            Form::Elf(elf) => {
                elf.load(file, ram)?;
                (None, elf.entry)
            }
            Form::BzImage { .. } => {
                let at = GuestAddress(layout::HIGH_RAM_START);
                let loaded =
                    BzImage::load(ram.memory(), Some(at), file, None).map_err(Error::Load)?;
                (loaded.setup_header, at.0 + BZIMAGE_ENTRY_64)
            }
        };
        placing.write("command line", layout::CMDLINE, placing.cmdline.to_bytes_with_nul())?;
        let cmdline_size = placing.cmdline.to_bytes_with_nul().len();
        let ramdisk = placing.modules.first().map(|initramfs| (initramfs.start, initramfs.len));
        let rsdp = placing.rsdp;
        let page = ZeroPage { header, ramdisk, cmdline_size, rsdp, ram };
        ram.memory()
            .write_obj(page.build(), GuestAddress(layout::ZERO_PAGE))
            .map_err(|_| Error::Structure { what: "zero page", at: layout::ZERO_PAGE })?;
        cpu::write_gdt(ram, Mode::Linux64)?;
        cpu::write_identity_map(ram)?;
        let registers = [
            (reg::RSP, layout::BOOT_STACK),
            (reg::RBP, layout::BOOT_STACK),
            (reg::RSI, layout::ZERO_PAGE),
        ];
        Ok(Entry::new(Mode::Linux64, rip, &registers))
    }
}
