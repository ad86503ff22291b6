//! Memory for translated code: one sealed memfd, mapped twice (J11).

use std::io;

use crate::host::arena::map_twice;

/// The code memory of one vCPU.
#[derive(Debug)]
pub struct Arena {
    write: *mut u8,
    exec: *mut u8,
    /// Bytes of address space. Pages are touched as code is made.
    size: usize,
    /// Where the last code was put on either side of [`Arena::cold`], as a multiple of [`PART`].
    parts: [usize; 2],
    /// Ends of what code was ever put in.
    touched: [usize; 2],
}

/// Bytes of the writable mapping that are let go at a time.
const PART: usize = 1 << 20;

/// Code that seldom runs takes three parts in five.
fn cold(size: usize) -> usize {
    size / 64 * 26
}

// SAFETY: the mappings belong to this value alone.
unsafe impl Send for Arena {}

impl Arena {
    /// Maps a new arena of `size` bytes, a multiple of 64 MiB.
    ///
    /// # Errors
    /// The host refuses a memfd or an executable mapping of it.
    pub fn new(size: usize) -> io::Result<Self> {
        let (write, exec) = map_twice(c"mvm-emu-code", size)?;
        let cold = cold(size);
        Ok(Self { write, exec, size, parts: [0, cold / PART], touched: [0, cold] })
    }

    /// Bytes of it.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Where the part for code starts that seldom runs. What runs often is packed more closely without it.
    pub fn cold(&self) -> usize {
        cold(self.size)
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
        assert!(end <= self.size, "the arena's size");
        let side = usize::from(offset >= self.cold());
        let touched = &mut self.touched[side];
        *touched = end.max(*touched);
        // SAFETY: the range lies in the writable mapping (checked above), which this value owns.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(offset), code.len()) };
    }

    /// Bytes of memory that the code takes, emptied or not.
    pub fn touched(&self) -> usize {
        self.touched[0] + (self.touched[1] - self.cold())
    }

    /// Tells where code is put from now on. What is behind that is seldom written again: pages that are mapped
    /// a second time for it count twice wherever a process's memory is looked at.
    pub fn went_on_to(&mut self, offset: usize) {
        let side = usize::from(offset >= self.cold());
        let part = (offset / PART).min(self.size / PART - 1);
        let last = &mut self.parts[side];
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
            libc::munmap(self.write.cast(), self.size);
            libc::munmap(self.exec.cast(), self.size);
        }
    }
}
