//! The boot processor as kernels find it: descriptor tables, page tables, registers.

use mvm_engine::{LapicState, Segment, Table, VcpuState};
use mvm_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::Error;
use crate::layout;

/// Access rights in the form of [`Segment::access`]: present, code or data, accessed.
const CODE64: u32 = 0xa09b;
const CODE32: u32 = 0xc09b;
const DATA: u32 = 0xc093;
const BUSY_TSS: u32 = 0x008b;
const UNUSABLE: u32 = 1 << 16;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
/// The bit of RFLAGS that is always set.
const RFLAGS_FIXED: u64 = 2;

const PAGE_PRESENT: u64 = 0b01;
const PAGE_WRITE: u64 = 0b10;
const PAGE_LARGE: u64 = 1 << 7;
const PAGE: u64 = 0x1000;
const LARGE_PAGE: u64 = 0x20_0000;

/// General registers by their place in the encoding.
pub mod reg {
    pub const RAX: usize = 0;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// The mode in which a kernel is entered, interrupts off in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit mode on [`write_identity_map`]'s tables, with the selectors of the Linux/x86 64-bit
    /// boot protocol: `__BOOT_CS` 0x10, `__BOOT_DS` 0x18.
    Linux64,
    /// 64-bit mode on [`write_solo5_map`]'s tables, SSE and protection of pages on, with the selectors
    /// of Solo5's tender: code 8, data 0x10.
    Solo5,
    /// 32-bit protected mode without paging: code 8, data 0x10.
    Protected,
}

/// Where the boot processor begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Instruction pointer.
    pub rip: u64,
    /// Mode.
    pub mode: Mode,
    /// General registers, in the order of their encoding.
    pub gpr: [u64; 16],
}

impl Entry {
    /// An entry at `rip` with these general registers, the others being 0.
    pub fn new(mode: Mode, rip: u64, registers: &[(usize, u64)]) -> Self {
        let mut gpr = [0; 16];
        for &(index, value) in registers {
            gpr[index] = value;
        }
        Self { rip, mode, gpr }
    }

    /// Sets the boot processor's registers; `state` is that after power-up, and all that is not set
    /// here stays as it is.
    pub fn apply(&self, state: &mut VcpuState) {
        state.regs.gpr = self.gpr;
        state.regs.rip = self.rip;
        state.regs.rflags = RFLAGS_FIXED;
        let gdt = self.mode.gdt();
        let sregs = &mut state.sregs;
        // Null descriptors: unusable.
        sregs.ldtr = Segment { access: UNUSABLE, ..Segment::default() };
        for (index, &(access, limit)) in gdt.iter().enumerate() {
            let selector = (index * 8) as u16;
            let limit = if access & DATA_OR_CODE == 0 { limit } else { u32::MAX };
            let segment = Segment { selector, base: 0, limit, access };
            match access {
                CODE64 | CODE32 => sregs.segments[1] = segment,
                DATA => [0, 2, 3, 4, 5].into_iter().for_each(|i| sregs.segments[i] = segment),
                BUSY_TSS => sregs.tr = segment,
                _ => {}
            }
        }
        sregs.gdtr = Table { base: layout::GDT, limit: (gdt.len() * 8 - 1) as u16 };
        sregs.idtr = match self.mode {
            // As a PC's firmware leaves it: kernels that go back to real mode need not load it.
            Mode::Protected => Table { base: 0, limit: REAL_MODE_VECTORS * 4 - 1 },
            Mode::Linux64 | Mode::Solo5 => Table::default(),
        };
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.efer = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        if self.mode != Mode::Protected {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        if self.mode == Mode::Solo5 {
            sregs.cr0 |= CR0_NE | CR0_WP;
            sregs.efer |= EFER_NXE;
            sregs.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT;
        }
    }
}

/// Connects the boot processor with the old interrupt controllers, as firmware does: its local APIC is on and lets INTR (LINT0)
/// and NMI (LINT1) through (MultiProcessor Specification 1.4, 3.6.2.2, "virtual wire mode").
pub fn connect_pic(lapic: &mut LapicState) {
    // Numbers of registers, and what firmware makes of them: enabled by software; ExtINT and NMI, not masked.
    const SPURIOUS: (usize, u32) = (0x0f, 0x1ff);
    const LINT0: (usize, u32) = (0x35, 0x700);
    const LINT1: (usize, u32) = (0x36, 0x400);
    for (register, value) in [SPURIOUS, LINT0, LINT1] {
        if let Some(slot) = lapic.regs.get_mut(register) {
            *slot = value;
        }
    }
}

/// Entries of real mode's vector table.
const REAL_MODE_VECTORS: u16 = 256;

/// The bit of the access rights that tells code and data from system segments.
const DATA_OR_CODE: u32 = 1 << 4;

/// Smallest limit of a task state segment.
const TSS_LIMIT: u32 = 0x67;

impl Mode {
    /// Access rights and limit of each descriptor, the limit of code and data in pages.
    fn gdt(self) -> &'static [(u32, u32)] {
        const FLAT: u32 = 0xf_ffff;
        match self {
            Mode::Linux64 => {
                &[(0, 0), (0, 0), (CODE64, FLAT), (DATA, FLAT), (BUSY_TSS, TSS_LIMIT), (0, 0)]
            }
            Mode::Solo5 => &[(0, 0), (CODE64, FLAT), (DATA, FLAT), (BUSY_TSS, TSS_LIMIT), (0, 0)],
            Mode::Protected => &[(0, 0), (CODE32, FLAT), (DATA, FLAT), (BUSY_TSS, TSS_LIMIT)],
        }
    }
}

/// Writes the descriptor table of `mode`.
///
/// # Errors
/// Guest memory does not reach there.
pub fn write_gdt(ram: &GuestRam, mode: Mode) -> Result<(), Error> {
    let words: Vec<u64> =
        mode.gdt().iter().map(|&(access, limit)| descriptor(access, limit.into())).collect();
    write(ram, "GDT", layout::GDT, &words)
}

/// A descriptor with base 0 (SDM vol. 3, 3.4.5).
fn descriptor(access: u32, limit: u64) -> u64 {
    limit & 0xffff | (limit >> 16 & 0xf) << 48 | u64::from(access & 0xf0ff) << 40
}

/// Writes page tables that map the low [`layout::IDENTITY_MAP_GIB`] GiB to themselves.
///
/// # Errors
/// Guest memory does not reach there.
pub fn write_identity_map(ram: &GuestRam) -> Result<(), Error> {
    write_map(ram, layout::IDENTITY_MAP_GIB << 30)
}

/// Writes page tables that map memory up to `end` to itself, but for what lies below
/// [`layout::SOLO5_VISIBLE`], which is not mapped, and from there to [`layout::HIGH_RAM_START`],
/// which is read-only.
///
/// # Errors
/// Guest memory does not reach there.
pub fn write_solo5_map(ram: &GuestRam, end: u64) -> Result<(), Error> {
    write_map(ram, end.min(layout::IDENTITY_MAP_GIB << 30))?;
    let small: Vec<u64> = (0..LARGE_PAGE)
        .step_by(PAGE as usize)
        .map(|at| match at {
            ..layout::SOLO5_VISIBLE => 0,
            layout::SOLO5_VISIBLE..layout::HIGH_RAM_START => at | PAGE_PRESENT,
            _ => at | PAGE_PRESENT | PAGE_WRITE,
        })
        .collect();
    let table = layout::SOLO5_FIRST_TABLE;
    write(ram, "page tables", table, &small)?;
    let first_directory = layout::PAGE_TABLES + 2 * PAGE;
    write(ram, "page tables", first_directory, &[table | PAGE_PRESENT | PAGE_WRITE])
}

fn write_map(ram: &GuestRam, end: u64) -> Result<(), Error> {
    let table = PAGE_PRESENT | PAGE_WRITE;
    let pdpt = layout::PAGE_TABLES + PAGE;
    write(ram, "page tables", layout::PAGE_TABLES, &[pdpt | table])?;
    for gib in 0..layout::IDENTITY_MAP_GIB {
        let directory = pdpt + PAGE * (1 + gib);
        write(ram, "page tables", pdpt + gib * 8, &[directory | table])?;
        let start = gib << 30;
        let pages: Vec<u64> = (start..start + (1 << 30))
            .step_by(LARGE_PAGE as usize)
            .map(|at| if at < end { at | PAGE_LARGE | table } else { 0 })
            .collect();
        write(ram, "page tables", directory, &pages)?;
    }
    Ok(())
}

fn write(ram: &GuestRam, what: &'static str, at: u64, words: &[u64]) -> Result<(), Error> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    ram.memory().write_slice(&bytes, GuestAddress(at)).map_err(|_| Error::Structure { what, at })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> GuestRam {
        GuestRam::new(&layout::ram_ranges(16 << 20)).unwrap()
    }

    fn word(ram: &GuestRam, at: u64) -> u64 {
        ram.memory().read_obj(GuestAddress(at)).unwrap()
    }

    /// Where a linear address is mapped to, and the flags of the last level.
    fn walk(ram: &GuestRam, address: u64) -> Option<(u64, u64)> {
        let mut table = layout::PAGE_TABLES;
        for shift in [39, 30, 21, 12] {
            let entry = word(ram, table + (address >> shift & 511) * 8);
            if entry & PAGE_PRESENT == 0 {
                return None;
            }
            let offset = (1 << shift) - 1;
            if entry & PAGE_LARGE != 0 || shift == 12 {
                return Some((entry & !0xfff | address & offset, entry & 0xfff & !PAGE_LARGE));
            }
            table = entry & !0xfff;
        }
        None
    }

    #[test]
    fn the_identity_map_maps_each_address_to_itself() {
        let ram = ram();
        write_identity_map(&ram).unwrap();
        for address in [0u64, 0x1000_0000, 0x3fe0_0123, 0xfee0_0000] {
            assert_eq!(walk(&ram, address), Some((address, PAGE_PRESENT | PAGE_WRITE)));
        }
        assert_eq!(walk(&ram, 4 << 30), None);
    }

    #[test]
    fn solo5_guests_cannot_touch_what_is_not_theirs() {
        let ram = ram();
        write_solo5_map(&ram, 16 << 20).unwrap();
        for hidden in [0, layout::GDT, layout::PAGE_TABLES, layout::SOLO5_VISIBLE - 1, 16 << 20] {
            assert_eq!(walk(&ram, hidden), None, "{hidden:#x}");
        }
        for readable in [layout::SOLO5_VISIBLE, layout::CMDLINE, layout::HIGH_RAM_START - 1] {
            assert_eq!(walk(&ram, readable), Some((readable, PAGE_PRESENT)));
        }
        for writable in [layout::HIGH_RAM_START, 0x20_0000, (16 << 20) - 1] {
            assert_eq!(walk(&ram, writable), Some((writable, PAGE_PRESENT | PAGE_WRITE)));
        }
    }

    #[test]
    fn descriptors_have_the_form_of_the_manual() {
        let ram = ram();
        write_gdt(&ram, Mode::Linux64).unwrap();
        let gdt = |index: u64| word(&ram, layout::GDT + index * 8);
        assert_eq!(gdt(2), 0x00af_9b00_0000_ffff);
        assert_eq!(gdt(3), 0x00cf_9300_0000_ffff);
        assert_eq!(gdt(4), 0x0000_8b00_0000_0067);
        write_gdt(&ram, Mode::Protected).unwrap();
        assert_eq!(gdt(1), 0x00cf_9b00_0000_ffff);
    }
}
