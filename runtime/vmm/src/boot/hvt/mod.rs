//! Solo5's hvt (its `elf_abi.h`, `hvt_abi.h` and `mft_abi.h`): an ELF file whose notes name the ABI
//! and the devices that the kernel demands, entered in 64-bit mode, with hypercalls in place of
//! devices.
//!
//! The guest has one processor, no interrupts, and contiguous memory from 0. Of the low MiB it sees
//! what lies from [`layout::SOLO5_VISIBLE`] on, read-only.

mod manifest;
mod protection;

use super::area::Area;
use super::cpu::{self, Entry, Mode, reg};
use super::elf::{ElfFile, u32_at};
use super::{BootImage, Error, ModulePlace, Placing, Section, memory_map};
use crate::config::BootProtocol;
use crate::layout;

pub use manifest::{Attached, Entry as ManifestEntry, Kind, Manifest};

/// "ABI1".
const ABI_NOTE: u32 = 0x3149_4241;

/// Whose notes they are.
const OWNER: &[u8] = b"Solo5";

/// The hvt target, the first of Solo5's.
const HVT: u32 = 1;

/// All targets by number, from 1.
const TARGETS: [&str; 6] = ["hvt", "spt", "virtio", "muen", "genode", "xen"];

/// ABI versions that are served: their structures and calls are the same on x86-64.
const VERSIONS: std::ops::RangeInclusive<u32> = 1..=2;

/// The mapping is of pages of this size.
const LARGE_PAGE: u64 = 2 << 20;

/// Room for a stack, without which not even the first instruction is sure.
const STACK: u64 = 64 << 10;

/// Bytes of `struct hvt_boot_info`.
const BOOT_INFO_SIZE: usize = 40;

/// A kernel for hvt.
#[derive(Debug)]
pub struct HvtImage {
    elf: ElfFile,
    manifest: Manifest,
}

/// Which of Solo5's targets a kernel was built for, if it is Solo5's at all.
///
/// # Errors
/// Its note is damaged.
pub fn target(elf: &ElfFile) -> Result<Option<u32>, Error> {
    let Some(note) = elf.note(OWNER, ABI_NOTE) else { return Ok(None) };
    match note.content.len() {
        16 => Ok(Some(u32_at(&note.content, 0))),
        other => Err(Error::Hvt(format!("its ABI note has {other} bytes, not 16"))),
    }
}

/// Whether `target` is hvt.
pub fn is_hvt(target: Option<u32>) -> bool {
    target == Some(HVT)
}

/// Says that a kernel for `target` is one for another of Solo5's targets.
pub fn wrong_target(target: u32) -> Error {
    let name = target.checked_sub(1).and_then(|index| TARGETS.get(index as usize));
    let name = name.map_or_else(|| format!("number {target}"), |name| (*name).to_owned());
    Error::Hvt(format!("it was built for the target {name}; build it for hvt"))
}

impl HvtImage {
    /// A kernel for hvt.
    ///
    /// # Errors
    /// Its notes are missing, damaged or of another version, or its entry point is nowhere.
    pub fn new(elf: ElfFile) -> Result<Self, Error> {
        let Some(abi) = elf.note(OWNER, ABI_NOTE) else {
            return Err(Error::Hvt("it has no note of Solo5's that names its ABI".into()));
        };
        let version = u32_at(&abi.content, 4);
        if !VERSIONS.contains(&version) {
            return Err(Error::Hvt(format!(
                "it was built for version {version} of the hvt ABI; versions {} and {} are known",
                VERSIONS.start(),
                VERSIONS.end()
            )));
        }
        let Some(note) = elf.note(OWNER, Manifest::NOTE) else {
            return Err(Error::Hvt("it has no manifest (an ELF note of Solo5's, \"MFT1\")".into()));
        };
        let manifest = Manifest::parse(&note.content)?;
        if elf.bits != 64 {
            return Err(Error::Hvt("it is a 32-bit ELF file".into()));
        }
        elf.check_entry(elf.entry)?;
        Ok(Self { elf, manifest })
    }
}

impl BootImage for HvtImage {
    fn protocol(&self) -> BootProtocol {
        BootProtocol::Hvt
    }

    fn end(&self) -> u64 {
        self.elf.end()
    }

    fn working_memory(&self, _module: u64) -> u64 {
        STACK
    }

    fn module_place(&self) -> ModulePlace {
        ModulePlace::Nowhere
    }

    fn manifest(&self) -> Option<&Manifest> {
        Some(&self.manifest)
    }

    fn place(&self, file: &mut Section, placing: &Placing<'_>) -> Result<Entry, Error> {
        let ram = placing.ram;
        if ram.size() > layout::LOW_MEMORY_END {
            let most = crate::config::mib(layout::LOW_MEMORY_END);
            return Err(Error::Hvt(format!(
                "its memory must be contiguous, of which there can be {most} at most"
            )));
        }
        let memory = memory_map::low_end(ram) / LARGE_PAGE * LARGE_PAGE;
        let need = self.end().saturating_add(STACK);
        if memory < need {
            let need = need.next_multiple_of(LARGE_PAGE);
            return Err(Error::NotEnoughMemory { have: ram.size(), need });
        }
        self.elf.load(file, ram)?;
        placing.write("command line", layout::CMDLINE, placing.cmdline.to_bytes_with_nul())?;

        let (at, room) = (layout::SOLO5_BOOT_INFO, layout::SOLO5_BOOT_INFO_MAX);
        let mut area = Area::new(at, room, BOOT_INFO_SIZE);
        let manifest = area.put(&self.manifest.to_bytes(placing.attached));
        let kernel_end = self.end().next_multiple_of(mvm_memory::PAGE_SIZE as u64);
        let cycles = placing.tsc_khz.saturating_mul(1000);
        let info = [memory, kernel_end, cycles, layout::CMDLINE, manifest].map(u64::to_le_bytes);
        area.write("Solo5 boot information", &info.concat(), ram)?;

        cpu::write_gdt(ram, Mode::Solo5)?;
        cpu::write_solo5_map(ram, memory)?;
        protection::apply(ram, &self.elf.segments)?;
        // As if called: the stack's top is where a return address would be.
        let registers = [(reg::RDI, layout::SOLO5_BOOT_INFO), (reg::RSP, memory - 8)];
        Ok(Entry::new(Mode::Solo5, self.elf.entry, &registers))
    }
}
