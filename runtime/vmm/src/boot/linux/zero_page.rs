//! `struct boot_params`, the "zero page" (Documentation/arch/x86/zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use mvm_memory::GuestRam;
use vm_memory::ByteValued;

use super::super::memory_map;
use super::HEADER_MAGIC;
use crate::layout;

/// `boot_flag` of a kernel.
const BOOT_FLAG: u16 = 0xaa55;
/// Protocol version told where the kernel's file does not say its own.
const PROTOCOL_VERSION: u16 = 0x020f;
/// `type_of_loader`: none that is registered.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the kernel lies at 1 MiB or above.
const LOADED_HIGH: u8 = 1;

/// What the zero page tells.
#[derive(Debug)]
pub struct ZeroPage<'a> {
    /// Setup header from the kernel's file, if it has one.
    pub header: Option<setup_header>,
    /// Address and length of the initramfs.
    pub ramdisk: Option<(u64, u64)>,
    /// Length of the command line in bytes with its NUL.
    pub cmdline_size: usize,
    /// Address of ACPI's root pointer, if there are such tables.
    pub rsdp: Option<u64>,
    /// Guest RAM.
    pub ram: &'a GuestRam,
}

impl ZeroPage<'_> {
    /// The page.
    pub fn build(&self) -> Plain {
        let hdr = self.header.unwrap_or(setup_header {
            version: PROTOCOL_VERSION,
            loadflags: LOADED_HIGH,
            ..setup_header::default()
        });
        let mut page = boot_params { hdr, ..boot_params::default() };
        page.hdr.boot_flag = BOOT_FLAG;
        page.hdr.header = HEADER_MAGIC;
        page.hdr.type_of_loader = LOADER_UNDEFINED;
        page.hdr.cmd_line_ptr = layout::CMDLINE as u32;
        page.ext_cmd_line_ptr = (layout::CMDLINE >> 32) as u32;
        // Linux does not read it. Others take it for the bytes of the text with its NUL, which loaders of small
        // machines make it, and look for the NUL in so many.
        page.hdr.cmdline_size = self.cmdline_size as u32;
        if let Some((start, len)) = self.ramdisk {
            page.hdr.ramdisk_image = start as u32;
            page.ext_ramdisk_image = (start >> 32) as u32;
            page.hdr.ramdisk_size = len as u32;
            page.ext_ramdisk_size = (len >> 32) as u32;
        }
        page.acpi_rsdp_addr = self.rsdp.unwrap_or(0);
        let map = memory_map::build(self.ram, self.rsdp.is_some());
        page.e820_entries = map.len() as u8;
        for (entry, range) in page.e820_table.iter_mut().zip(map) {
            *entry =
                boot_e820_entry { addr: range.start, size: range.size, type_: range.usage as u32 };
        }
        Plain(page)
    }
}

/// `boot_params` as bytes.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Plain(boot_params);

// SAFETY: `boot_params` is `repr(C, packed)` and made of integers and arrays of them: no padding,
// every bit pattern valid.
unsafe impl ByteValued for Plain {}

#[cfg(test)]
mod tests {
    use super::*;

    fn dword(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_zero_page_has_its_fields_where_the_protocol_puts_them() {
        let ram = GuestRam::new(&layout::ram_ranges(64 << 20)).unwrap();
        let ramdisk = Some((0x3f0_0000, 0x1234));
        let page = ZeroPage { header: None, ramdisk, cmdline_size: 77, rsdp: None, ram: &ram };
        let built = page.build();
        let bytes = built.as_slice();
        assert_eq!(dword(bytes, 0x1fe) & 0xffff, 0xaa55);
        assert_eq!(dword(bytes, 0x202), HEADER_MAGIC);
        assert_eq!(bytes[0x210], 0xff);
        assert_eq!((dword(bytes, 0x218), dword(bytes, 0x21c)), (0x3f0_0000, 0x1234));
        assert_eq!((dword(bytes, 0x0c0), dword(bytes, 0x0c4)), (0, 0));
        assert_eq!((dword(bytes, 0x228), dword(bytes, 0x238)), (layout::CMDLINE as u32, 77));
        assert_eq!((dword(bytes, 0x70), bytes[0x1e8]), (0, 3));
        assert_eq!(dword(bytes, 0x2d0 + 40), 0x10_0000);
        assert_eq!(dword(bytes, 0x2d0 + 48), (64 << 20) - 0x10_0000);

        let built = ZeroPage { rsdp: Some(0xe_1230), ..page }.build();
        let bytes = built.as_slice();
        assert_eq!((dword(bytes, 0x70), dword(bytes, 0x74), bytes[0x1e8]), (0xe_1230, 0, 4));
        assert_eq!(dword(bytes, 0x2d0 + 20), layout::ACPI_TABLES as u32);
        assert_eq!(dword(bytes, 0x2d0 + 20 + 16), memory_map::Use::Acpi as u32);
    }
}
