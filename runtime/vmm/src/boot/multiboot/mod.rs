//! Multiboot 1 (specification 0.6.96): a header in the file's first 8 KiB, an entry in 32-bit
//! protected mode, and a structure that tells of memory, modules and command line.
//!
//! The kernel is an ELF file (64-bit ones are loaded too and entered in 32-bit mode all the same, as
//! is common practice), or anything with address fields in its header. It may lie below 1 MiB, as kernels do that
//! go on in real mode.

mod header;
mod info;

use std::io::{Seek, SeekFrom};

use mvm_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::cpu::{self, Entry, Mode, reg};
use super::elf::ElfFile;
use super::{BootImage, Error, ModulePlace, Placing, Section};
use crate::config::BootProtocol;
use crate::layout;
use header::Addresses;

pub use header::{Header, SEARCHED, find};

/// What a kernel finds in EAX.
const BOOTED: u64 = 0x2bad_b002;

/// A kernel with a multiboot header.
#[derive(Debug)]
pub struct MultibootImage {
    form: Form,
    entry: u64,
}

#[derive(Debug)]
enum Form {
    Elf(ElfFile),
    /// By the header's address fields.
    Plain(Extent),
}

/// One piece of the file that goes to one piece of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    /// First byte in the file.
    offset: u64,
    /// Bytes in the file.
    len: u64,
    /// Physical address.
    start: u64,
    /// First address after it, zeroed bytes included.
    end: u64,
}

impl MultibootImage {
    /// A kernel with this header; `elf` reads the file as an ELF file, for headers without address
    /// fields.
    ///
    /// # Errors
    /// There is no telling where it goes, or it goes nowhere.
    pub fn new(
        header: Header,
        section: &Section,
        elf: impl FnOnce() -> Result<Option<ElfFile>, Error>,
    ) -> Result<Self, Error> {
        let failed = |reason: &str| Error::Multiboot { at: header.at, reason: reason.into() };
        if let Some(addresses) = header.addresses {
            let extent = extent(&header, addresses, section.size()).map_err(failed)?;
            return Ok(Self { form: Form::Plain(extent), entry: addresses.entry.into() });
        }
        let Some(elf) = elf()? else {
            return Err(failed("it has no address fields, and the file is no ELF file"));
        };
        if let Some(s) = elf.segments.iter().find(|s| !fits(s.start, s.end())) {
            return Err(Error::Segment { start: s.start, size: s.size });
        }
        let entry = elf.check_entry(elf.physical_entry())?;
        Ok(Self { form: Form::Elf(elf), entry })
    }

    /// Its first address.
    fn start(&self) -> u64 {
        match &self.form {
            Form::Elf(elf) => elf.segments.first().map_or(u64::MAX, |s| s.start),
            Form::Plain(extent) => extent.start,
        }
    }
}

/// May a kernel lie from `start` to `end`? Below 1 MiB there is what it is told, and the tables.
fn fits(start: u64, end: u64) -> bool {
    start >= layout::HIGH_RAM_START
        || layout::LOW_KERNEL.iter().any(|free| free.start <= start && end <= free.end)
}

/// Where a kernel goes by its address fields; the error is what is wrong with them.
fn extent(header: &Header, addresses: Addresses, size: u64) -> Result<Extent, &'static str> {
    let [head, start, load_end, bss_end, entry] =
        [addresses.header, addresses.load, addresses.load_end, addresses.bss_end, addresses.entry]
            .map(u64::from);
    let offset = head
        .checked_sub(start)
        .and_then(|before| header.at.checked_sub(before))
        .ok_or("the header lies before the kernel or further into it than in the file")?;
    let len = if load_end == 0 { size.checked_sub(offset) } else { load_end.checked_sub(start) };
    let len = len.ok_or("the kernel ends before it begins")?;
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err("the file is shorter than the address fields say");
    }
    let loaded_to = start + len;
    let end = if bss_end == 0 { loaded_to } else { bss_end };
    if end < loaded_to {
        return Err("the bytes to be zeroed end before they begin");
    }
    if !fits(start, end) {
        return Err(
            "the kernel is to lie where its loader's structures or the machine's tables are",
        );
    }
    if !(start..end).contains(&entry) {
        return Err("nothing is loaded at the entry point");
    }
    Ok(Extent { offset, len, start, end })
}

impl Extent {
    fn load(&self, file: &mut Section, ram: &GuestRam) -> Result<(), Error> {
        let failed = |source| Error::Read { what: "the kernel", source };
        file.seek(SeekFrom::Start(self.offset)).map_err(failed)?;
        // Less than 4 GiB, by the width of the address fields or by the size of RAM.
        let len = self.len as usize;
        ram.memory()
            .read_exact_volatile_from(GuestAddress(self.start), file, len)
            .map_err(|e| failed(std::io::Error::other(e)))
    }
}

impl BootImage for MultibootImage {
    fn protocol(&self) -> BootProtocol {
        BootProtocol::Multiboot
    }

    fn end(&self) -> u64 {
        let end = match &self.form {
            Form::Elf(elf) => elf.end(),
            Form::Plain(extent) => extent.end,
        };
        // Modules follow it in extended memory.
        end.max(layout::HIGH_RAM_START)
    }

    fn module_place(&self) -> ModulePlace {
        ModulePlace::AfterKernel
    }

    fn takes_several_modules(&self) -> bool {
        true
    }

    fn place(&self, file: &mut Section, placing: &Placing<'_>) -> Result<Entry, Error> {
        match &self.form {
            Form::Elf(elf) => elf.load(file, placing.ram)?,
            Form::Plain(extent) => extent.load(file, placing.ram)?,
        }
        placing.write("command line", layout::CMDLINE, placing.cmdline.to_bytes_with_nul())?;
        let (info, stack) = if self.start() < layout::HIGH_RAM_START {
            (layout::LOW_KERNEL_BOOT_INFO, layout::LOW_KERNEL_STACK)
        } else {
            (layout::BOOT_INFO, layout::BOOT_STACK)
        };
        info::write(placing, info)?;
        cpu::write_gdt(placing.ram, Mode::Protected)?;
        let registers = [
            (reg::RAX, BOOTED),
            (reg::RBX, info),
            // The kernel has to make a stack of its own; some push before that.
            (reg::RSP, stack),
        ];
        Ok(Entry::new(Mode::Protected, self.entry, &registers))
    }
}

#[cfg(test)]
mod tests {
    use super::header::tests::header;
    use super::*;

    const MIB: u32 = 1 << 20;

    fn file(bytes: &[u8]) -> Section {
        use std::io::Write;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Section::new(file, 0, None).unwrap()
    }

    /// The extent of a file of 4 KiB with the header at 0x40 and these address fields.
    fn plain(addresses: [u32; 5]) -> Result<Extent, Error> {
        let mut bytes = vec![0; 4096];
        bytes[0x40..0x60].copy_from_slice(&header(1 << 16, addresses));
        let header = find(&bytes)?.unwrap();
        let image = MultibootImage::new(header, &file(&bytes), || panic!("no ELF is needed"))?;
        match image.form {
            Form::Plain(extent) => Ok(extent),
            Form::Elf(_) => panic!("it is no ELF file"),
        }
    }

    #[test]
    fn address_fields_say_what_goes_where() {
        let start = u64::from(MIB);
        let all = plain([MIB + 0x40, MIB, 0, 0, MIB + 0x60]).unwrap();
        assert_eq!(all, Extent { offset: 0, len: 4096, start, end: start + 4096 });
        let part = plain([MIB + 0x20, MIB, MIB + 0x100, MIB + 0x9000, MIB]).unwrap();
        assert_eq!(part, Extent { offset: 0x20, len: 0x100, start, end: start + 0x9000 });
    }

    #[test]
    fn address_fields_that_make_no_sense_are_refused() {
        for wrong in [
            [MIB - 1, MIB, 0, 0, MIB],               // header before the kernel
            [MIB + 0x44, MIB, 0, 0, MIB],            // before the file
            [MIB + 0x40, MIB, MIB - 4, 0, MIB],      // ends before it begins
            [MIB + 0x40, MIB, MIB + 0x1001, 0, MIB], // longer than the file
            [MIB + 0x40, MIB, MIB + 0x200, MIB + 0x1ff, MIB], // zeroed before loaded
            [0x540, 0x500, 0, 0, 0x500],             // where the descriptor table is
            [0x1_f040, 0x1_f000, 0, 0x2_0001, 0x1_f000], // across the command line
            [0x9_0040, 0x9_0000, 0, 0, 0x9_0000],    // in what it is told
            [0xf_0040, 0xf_0000, 0, 0, 0xf_0000],    // in the MP table
            [0x4_0040, 0x4_0000, 0, MIB + 1, 0x4_0000], // out of low memory
            [MIB + 0x40, MIB, 0, 0, MIB + 4096],     // entry after the end
            [MIB + 0x40, MIB, 0, 0, MIB - 1],
            [u32::MAX, 0, u32::MAX, u32::MAX, 0],
        ] {
            assert!(matches!(plain(wrong), Err(Error::Multiboot { at: 0x40, .. })), "{wrong:x?}");
        }
    }

    #[test]
    fn a_kernel_may_lie_below_1_mib() {
        for start in [0x1000, 0x8000, 0x1_f000, 0x2_2000, 0x8_e000] {
            let extent = plain([start + 0x40, start, 0, 0, start]).unwrap();
            assert_eq!((extent.start, extent.end), (start.into(), u64::from(start) + 0x1000));
        }
    }

    #[test]
    fn a_header_without_addresses_needs_an_elf_file() {
        let bytes = header(0, [0; 5]);
        let found = find(&bytes).unwrap().unwrap();
        let refused = MultibootImage::new(found, &file(&bytes), || Ok(None)).unwrap_err();
        assert!(refused.to_string().contains("no ELF file"), "{refused}");
    }
}
