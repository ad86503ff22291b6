//! What a multiboot kernel is told (specification 0.6.96, 3.3).

use super::super::area::Area;
use super::super::{Error, Placing, memory_map};
use crate::layout;

/// Bytes of the structure, whose fields from 88 on are about a screen.
const SIZE: usize = 88;

/// Which fields are there.
mod has {
    pub const MEMORY: u32 = 1 << 0;
    pub const CMDLINE: u32 = 1 << 2;
    pub const MODULES: u32 = 1 << 3;
    pub const MEMORY_MAP: u32 = 1 << 6;
    pub const LOADER_NAME: u32 = 1 << 9;
}

/// What a module is called.
const MODULE_NAME: &[u8] = b"initrd\0";

const LOADER_NAME: &[u8] = b"mvm\0";

/// Bytes of a memory map entry, without the size field that leads it.
const MAP_ENTRY: u32 = 20;

/// Writes the structure to [`layout::BOOT_INFO`], and what it points to.
///
/// # Errors
/// It does not fit its place or guest memory.
pub fn write(placing: &Placing<'_>) -> Result<(), Error> {
    let mut head = [0; SIZE];
    let mut set = |at: usize, value: u32| head[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let mut flags = has::MEMORY | has::CMDLINE | has::MEMORY_MAP | has::LOADER_NAME;
    // All that is pointed to lies below 4 GiB: RAM below the device hole.
    let mut area = Area::new(layout::BOOT_INFO, layout::BOOT_INFO_MAX, SIZE);

    let upper = memory_map::low_end(placing.ram).saturating_sub(layout::HIGH_RAM_START);
    set(4, (layout::LOW_RAM_END >> 10) as u32);
    set(8, (upper >> 10) as u32);
    set(16, layout::CMDLINE as u32);
    if let Some((start, len)) = placing.module {
        flags |= has::MODULES;
        let name = area.put(MODULE_NAME);
        let entry = [start, start + len, name, 0].map(|word| (word as u32).to_le_bytes());
        set(20, 1);
        set(24, area.put(&entry.concat()) as u32);
    }
    let mut map = Vec::new();
    for range in memory_map::build(placing.ram, placing.rsdp.is_some()) {
        map.extend(MAP_ENTRY.to_le_bytes());
        map.extend(range.start.to_le_bytes());
        map.extend(range.size.to_le_bytes());
        map.extend((range.usage as u32).to_le_bytes());
    }
    set(44, map.len() as u32);
    set(48, area.put(&map) as u32);
    set(64, area.put(LOADER_NAME) as u32);
    set(0, flags);
    area.write("multiboot information", &head, placing.ram)
}
