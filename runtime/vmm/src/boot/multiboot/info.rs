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

/// What a module is called of which nothing is said.
const MODULE_NAME: &str = "initrd";

const LOADER_NAME: &[u8] = b"mvm\0";

/// Bytes of a memory map entry, without the size field that leads it.
const MAP_ENTRY: u32 = 20;

/// Writes the structure to `at`, where there are [`layout::BOOT_INFO_MAX`] bytes for it and for what it points to.
///
/// # Errors
/// It does not fit its place or guest memory.
pub fn write(placing: &Placing<'_>, at: u64) -> Result<(), Error> {
    let mut head = [0; SIZE];
    let mut set = |at: usize, value: u32| head[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let mut flags = has::MEMORY | has::CMDLINE | has::MEMORY_MAP | has::LOADER_NAME;
    // All that is pointed to lies below 4 GiB: RAM below the device hole.
    let mut area = Area::new(at, layout::BOOT_INFO_MAX, SIZE);

    let upper = memory_map::low_end(placing.ram).saturating_sub(layout::HIGH_RAM_START);
    set(4, (layout::LOW_RAM_END >> 10) as u32);
    set(8, (upper >> 10) as u32);
    set(16, layout::CMDLINE as u32);
    if !placing.modules.is_empty() {
        flags |= has::MODULES;
        let mut list = Vec::new();
        for module in placing.modules {
            let text = if module.text.is_empty() { MODULE_NAME } else { module.text };
            let text = area.put(&[text.as_bytes(), b"\0"].concat());
            let entry = [module.start, module.end(), text, 0];
            list.extend(entry.iter().flat_map(|word| (*word as u32).to_le_bytes()));
        }
        set(20, placing.modules.len() as u32);
        set(24, area.put(&list) as u32);
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
