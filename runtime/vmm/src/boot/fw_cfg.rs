//! What a kernel made for PC emulators is told of its machine by the firmware configuration device.

use std::ffi::CStr;

use mvm_devices::fw_cfg::{Content, FwCfg, key};

use super::modules::Loaded;
use super::{Facts, Section, memory_map};
use crate::layout;

/// Fills the device; `acpi` says whether there are tables.
pub fn tell(
    device: &FwCfg,
    facts: &Facts<'_>,
    acpi: bool,
    cmdline: &CStr,
    initrd: Option<(Loaded<'_>, Section)>,
) {
    let (half, word) =
        (|n: u32| (n as u16).to_le_bytes().to_vec(), |n: u32| n.to_le_bytes().to_vec());
    device.item(key::RAM_SIZE, facts.ram.size().to_le_bytes().to_vec());
    device.item(key::NO_GRAPHIC, half(1));
    device.item(key::NB_CPUS, half(facts.vcpus));
    device.item(key::MAX_CPUS, half(facts.vcpus));
    let cmdline = cmdline.to_bytes_with_nul();
    device.item(key::CMDLINE_ADDRESS, word(layout::CMDLINE as u32));
    device.item(key::CMDLINE_SIZE, word(cmdline.len() as u32));
    device.item(key::CMDLINE_DATA, cmdline.to_vec());
    if let Some((place, content)) = initrd {
        // Modules lie below 4 GiB.
        device.item(key::INITRD_ADDRESS, word(place.start as u32));
        device.item(key::INITRD_SIZE, word(place.len as u32));
        device.item(key::INITRD_DATA, content);
    }
    let mut map = Vec::new();
    for range in memory_map::build(facts.ram, acpi) {
        map.extend(range.start.to_le_bytes());
        map.extend(range.size.to_le_bytes());
        map.extend((range.usage as u32).to_le_bytes());
    }
    // The first of its files.
    device.file("etc/e820", map);
}

impl Content for Section {
    fn size(&self) -> u64 {
        Section::size(self)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) {
        if let Err(e) = Section::read_at(self, buf, offset) {
            // It was readable when it was loaded.
            tracing::warn!(offset, "cannot read a file for the guest: {e}");
        }
    }
}
