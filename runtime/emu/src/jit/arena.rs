//! Memory for translated code: one sealed memfd, mapped twice (J11).

use std::io;

use crate::host::arena::map_twice;

/// Bytes of address space for the code of one vCPU. Pages are touched as code is made.
pub const SIZE: usize = 64 << 20;
/// Where the part for code starts that seldom runs. What runs often is packed more closely without it.
pub const COLD: usize = 26 << 20;

/// The code memory of one vCPU.
#[derive(Debug)]
pub struct Arena {
    write: *mut u8,
    exec: *mut u8,
    /// Where the last code was put on either side of [`COLD`], as a multiple of [`PART`].
    parts: [usize; 2],
    /// Ends of what code was ever put in.
    touched: [usize; 2],
}

/// Bytes of the writable mapping that are let go at a time.
const PART: usize = 1 << 20;

// SAFETY: the mappings belong to this value alone.
unsafe impl Send for Arena {}

impl Arena {
    /// Maps a new arena.
    ///
    /// # Errors
    /// The host refuses a memfd or an executable mapping of it.
    pub fn new() -> io::Result<Self> {
        let (write, exec) = map_twice(c"mvm-emu-code", SIZE)?;
        Ok(Self { write, exec, parts: [0, COLD / PART], touched: [0, COLD] })
    }

    /// Address of the byte at `offset` where it is executed.
    pub fn entry(&self, offset: u32) -> u64 {
        self.exec as u64 + u64::from(offset)
    }

    /// Puts `code` at `offset`. By the vCPU's thread, while it executes nothing of the range (J6).
    ///
    /// # Panics
    /// If it does not fit: the callers look before they make code.
    pub fn write(&mut self, offset: usize, code: &[u8]) {
        let end = offset.saturating_add(code.len());
        assert!(end <= SIZE, "the arena's size");
        let touched = &mut self.touched[usize::from(offset >= COLD)];
        *touched = end.max(*touched);
        // SAFETY: the range lies in the writable mapping (checked above), which this value owns.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(offset), code.len()) };
    }

    /// Bytes of memory that the code takes, emptied or not.
    pub fn touched(&self) -> usize {
        self.touched[0] + (self.touched[1] - COLD)
    }

    /// Tells where code is put from now on. What is behind that is seldom written again: pages that are mapped
    /// a second time for it count twice wherever a process's memory is looked at.
    pub fn went_on_to(&mut self, offset: usize) {
        let part = (offset / PART).min(SIZE / PART - 1);
        let last = &mut self.parts[usize::from(offset >= COLD)];
        if part != *last {
            // SAFETY: the part lies in the writable mapping, which this value owns. The mapping is of a file and
            // shared, so its content stays.
            unsafe {
                let start = self.write.add(*last * PART);
                libc::madvise(start.cast(), PART, libc::MADV_DONTNEED);
            }
            *last = part;
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours, and nothing executes: the vCPU is being dropped.
        unsafe {
            libc::munmap(self.write.cast(), SIZE);
            libc::munmap(self.exec.cast(), SIZE);
        }
    }
}
