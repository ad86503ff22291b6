//! PVH (Xen's docs/misc/pvh.pandoc, "x86/HVM direct boot ABI"): an ELF note names a 32-bit entry
//! point, and a start-of-day structure tells of memory, modules and command line.

use super::area::Area;
use super::cpu::{self, Entry, Mode, reg};
use super::elf::{ElfFile, u32_at, u64_at};
use super::{BootImage, Error, ModulePlace, Placing, Section, linux, memory_map};
use crate::config::{BootProtocol, CmdlineStyle};
use crate::layout;

/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PHYS32_ENTRY: u32 = 18;

/// `XEN_HVM_START_MAGIC_VALUE`, "xEn3" with the highest bit of the E set.
const MAGIC: u32 = 0x336e_c578;

/// Version of the structure: with a memory map.
const VERSION: u32 = 1;

/// Bytes of `struct hvm_start_info`.
const START_INFO_SIZE: usize = 56;

/// A kernel with a PVH entry.
#[derive(Debug)]
pub struct PvhImage {
    elf: ElfFile,
    entry: u64,
    is_linux: bool,
}

/// The physical address of a kernel's PVH entry, if it has one.
///
/// # Errors
/// Its note is damaged, or nothing is loaded there.
pub fn entry(elf: &ElfFile) -> Result<Option<u64>, Error> {
    let Some(note) = elf.note(b"Xen", PHYS32_ENTRY) else { return Ok(None) };
    // As large as an address of the kernel's class, or always 4 bytes: both are found.
    let entry = match note.content.len() {
        4 => u32_at(&note.content, 0).into(),
        8 => u64_at(&note.content, 0),
        other => return Err(Error::Elf(format!("its PVH entry has {other} bytes, not 4 or 8"))),
    };
    elf.check_entry(entry).map(Some)
}

impl PvhImage {
    /// A kernel with a PVH entry at `entry`.
    pub fn new(elf: ElfFile, entry: u64) -> Self {
        let is_linux = linux::is_linux(&elf);
        Self { elf, entry, is_linux }
    }
}

impl BootImage for PvhImage {
    fn protocol(&self) -> BootProtocol {
        BootProtocol::Pvh
    }

    fn cmdline_style(&self) -> CmdlineStyle {
        if self.is_linux { CmdlineStyle::Linux } else { CmdlineStyle::Bare }
    }

    fn end(&self) -> u64 {
        self.elf.end()
    }

    fn working_memory(&self, module: u64) -> u64 {
        if self.is_linux { linux::WORKING_MEMORY.saturating_add(module) } else { 0 }
    }

    fn module_place(&self) -> ModulePlace {
        ModulePlace::High
    }

    fn takes_several_modules(&self) -> bool {
        // Linux looks at the first alone.
        !self.is_linux
    }

    fn place(&self, file: &mut Section, placing: &Placing<'_>) -> Result<Entry, Error> {
        self.elf.load(file, placing.ram)?;
        placing.write("command line", layout::CMDLINE, placing.cmdline.to_bytes_with_nul())?;
        write_start_info(placing)?;
        cpu::write_gdt(placing.ram, Mode::Protected)?;
        let registers = [(reg::RBX, layout::BOOT_INFO), (reg::RSP, layout::BOOT_STACK)];
        Ok(Entry::new(Mode::Protected, self.entry, &registers))
    }
}

/// `struct hvm_start_info`, and the tables that it points to.
fn write_start_info(placing: &Placing<'_>) -> Result<(), Error> {
    let mut area = Area::new(layout::BOOT_INFO, layout::BOOT_INFO_MAX, START_INFO_SIZE);
    let mut list = Vec::new();
    for module in placing.modules {
        let text = match module.text {
            "" => 0,
            text => area.put(&[text.as_bytes(), b"\0"].concat()),
        };
        // The last word is reserved.
        list.extend(words(&[module.start, module.len, text, 0]));
    }
    let modules = if list.is_empty() { 0 } else { area.put(&list) };
    let map = memory_map::build(placing.ram, placing.rsdp.is_some());
    let count = map.len() as u64;
    let map: Vec<u64> =
        map.into_iter().flat_map(|r| [r.start, r.size, u64::from(r.usage as u32)]).collect();
    let map = area.put(&words(&map));
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let flags = 0;
    let head = words(&[
        pair(MAGIC, VERSION),
        pair(flags, placing.modules.len() as u32),
        modules,
        layout::CMDLINE,
        placing.rsdp.unwrap_or(0),
        map,
        count,
    ]);
    area.write("PVH start information", &head, placing.ram)
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}
