//! What kernels are told about guest memory.

use mvm_memory::GuestRam;

use crate::layout;

/// Use of a range, numbered as BIOS interrupt 15h, E820h has it; all protocols took over its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Use {
    /// Free for the kernel.
    Ram = 1,
    /// To be left alone.
    Reserved = 2,
    /// ACPI tables; RAM when they have been read.
    Acpi = 3,
}

/// A range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Guest physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// What it is for.
    pub usage: Use,
}

/// The memory map: everything is RAM but the classic hole, in which only the tables are told as
/// reserved, those of ACPI if there are any. (The hole is RAM all the same, for kernels that use it
/// without asking.)
pub fn build(ram: &GuestRam, acpi: bool) -> Vec<Range> {
    let mut map = vec![Range { start: 0, size: layout::LOW_RAM_END, usage: Use::Ram }];
    if acpi {
        let (start, size) = (layout::ACPI_TABLES, layout::ACPI_TABLES_MAX);
        map.push(Range { start, size, usage: Use::Acpi });
    }
    let (start, size) = (layout::MP_TABLE, layout::MP_TABLE_MAX);
    map.push(Range { start, size, usage: Use::Reserved });
    for region in ram.boot_regions() {
        let start = region.start.max(layout::HIGH_RAM_START);
        let end = region.start + region.size;
        if start < end {
            map.push(Range { start, size: end - start, usage: Use::Ram });
        }
    }
    map
}

/// First address after the RAM that is contiguous from [`layout::HIGH_RAM_START`].
pub fn low_end(ram: &GuestRam) -> u64 {
    ram.size().min(layout::LOW_MEMORY_END)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_covers_ram_on_both_sides_of_the_hole() {
        let memory = layout::LOW_MEMORY_END + (1 << 30);
        let ram = GuestRam::new(&layout::ram_ranges(memory)).unwrap();
        let map = build(&ram, true);
        assert_eq!(map.last(), Some(&Range { start: 1 << 32, size: 1 << 30, usage: Use::Ram }));
        let usable: u64 = map.iter().filter(|r| r.usage == Use::Ram).map(|r| r.size).sum();
        assert_eq!(usable, (4 << 30) - (layout::HIGH_RAM_START - layout::LOW_RAM_END));
        assert!(map.windows(2).all(|w| w[0].start + w[0].size <= w[1].start));
        assert_eq!(build(&ram, false).len(), map.len() - 1);
        assert_eq!(low_end(&ram), layout::LOW_MEMORY_END);
    }

    #[test]
    fn memory_that_is_yet_to_come_is_not_in_the_map() {
        let (memory, backing) = (256 << 20, mvm_memory::Backing::Small);
        let growth = layout::growth(memory, 2 << 30);
        assert!(growth.is_some());
        let ram = GuestRam::growing(&layout::ram_ranges(memory), growth, backing).unwrap();
        let plain = GuestRam::new(&layout::ram_ranges(memory)).unwrap();
        assert_eq!(build(&ram, false), build(&plain, false));
        assert_eq!(low_end(&ram), memory);
    }
}
