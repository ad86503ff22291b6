//! What the boot loader tells: PVH (Xen's docs/misc/pvh.pandoc) or multiboot 1 (0.6.96).

use core::ptr::read_unaligned;
use core::slice;

/// Longest command line in bytes.
const MAX_CMDLINE: usize = 8192;

/// Most pieces of memory that are looked at.
const MAX_PIECES: u32 = 128;

/// Memory that may be used, in both protocols' maps.
const USABLE: u32 = 1;

/// What the boot loader told.
#[derive(Debug, Clone, Copy)]
pub struct BootInfo {
    /// Name of the protocol.
    pub protocol: &'static str,
    /// The command line.
    pub cmdline: &'static str,
    /// Bytes of memory.
    pub memory: u64,
}

impl BootInfo {
    /// Reads what is at `info`.
    ///
    /// # Safety
    /// `protocol` and `info` are what the entry code in `ring0.s` found.
    pub unsafe fn read(protocol: u32, info: u64) -> Self {
        // SAFETY: so says the caller.
        unsafe { if protocol == 1 { pvh(info) } else { multiboot(info) } }
    }
}

/// # Safety
/// `info` is the address of a `struct hvm_start_info` of version 1.
unsafe fn pvh(info: u64) -> BootInfo {
    // SAFETY: so says the caller; places and sizes are the protocol's.
    unsafe {
        let map: u64 = read(info + 40);
        let count = read::<u32>(info + 48).min(MAX_PIECES);
        let pieces = (0..u64::from(count)).map(|n| map + n * 24);
        let memory = pieces.filter(|p| read::<u32>(p + 16) == USABLE).map(|p| read::<u64>(p + 8));
        BootInfo { protocol: "PVH", cmdline: text(read(info + 24)), memory: memory.sum() }
    }
}

/// # Safety
/// `info` is the address of a multiboot information structure.
unsafe fn multiboot(info: u64) -> BootInfo {
    // SAFETY: so says the caller; places and sizes are the protocol's.
    unsafe {
        let flags: u32 = read(info);
        let has = |bit: u32| flags & (1 << bit) != 0;
        let cmdline = if has(2) { text(read::<u32>(info + 16).into()) } else { "" };
        let mut memory = 0;
        if has(6) {
            let mut at = u64::from(read::<u32>(info + 48));
            let end = at + u64::from(read::<u32>(info + 44));
            while at < end {
                if read::<u32>(at + 20) == USABLE {
                    memory += read::<u64>(at + 12);
                }
                at += u64::from(read::<u32>(at)) + 4;
            }
        }
        BootInfo { protocol: "multiboot", cmdline, memory }
    }
}

/// The text at `address` up to its NUL; nothing if it is not UTF-8.
///
/// # Safety
/// There is one, or `address` is 0; it is never written again.
unsafe fn text(address: u64) -> &'static str {
    if address == 0 {
        return "";
    }
    let start = address as *const u8;
    // SAFETY: so says the caller: nothing after the NUL is read.
    let bytes = unsafe {
        let len = (0..MAX_CMDLINE).position(|at| *start.add(at) == 0).unwrap_or(MAX_CMDLINE);
        slice::from_raw_parts(start, len)
    };
    str::from_utf8(bytes).unwrap_or("")
}

/// # Safety
/// There is a `T` at this address.
pub(super) unsafe fn read<T: Copy>(address: u64) -> T {
    // SAFETY: so says the caller.
    unsafe { read_unaligned(address as *const T) }
}
