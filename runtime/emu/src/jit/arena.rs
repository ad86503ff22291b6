//! Memory for translated code: one sealed memfd, mapped twice (J11).

use std::io;
use std::os::fd::AsRawFd;

use crate::host::arena::{map, memfd};

/// Bytes of address space for the code of one vCPU. Pages are touched as code is made.
pub const SIZE: usize = 32 << 20;

/// The code memory of one vCPU.
#[derive(Debug)]
pub struct Arena {
    write: *mut u8,
    exec: *mut u8,
    /// Where the last code was put, as a multiple of [`PART`].
    part: usize,
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
        let file = memfd(c"mvm-emu-code")?;
        file.set_len(SIZE as u64)?;
        let write = map(&file, SIZE, libc::PROT_READ | libc::PROT_WRITE)?;
        let exec = match map(&file, SIZE, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(exec) => exec,
            Err(error) => {
                // SAFETY: mapped just above, used by nobody.
                unsafe { libc::munmap(write.cast(), SIZE) };
                return Err(error);
            }
        };
        let arena = Self { write, exec, part: 0 };
        let seals =
            libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
        // SAFETY: fcntl on a descriptor we own, with integer arguments.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(arena)
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
        assert!(offset.checked_add(code.len()).is_some_and(|end| end <= SIZE), "the arena's size");
        // SAFETY: the range lies in the writable mapping (checked above), which this value owns.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(offset), code.len()) };
    }

    /// Tells where code is put from now on. What is behind that is seldom written again: pages that are mapped
    /// a second time for it count twice wherever a process's memory is looked at.
    pub fn went_on_to(&mut self, offset: usize) {
        let part = (offset / PART).min(SIZE / PART - 1);
        if part != self.part {
            // SAFETY: the part lies in the writable mapping, which this value owns. The mapping is of a file and
            // shared, so its content stays.
            unsafe {
                let start = self.write.add(self.part * PART);
                libc::madvise(start.cast(), PART, libc::MADV_DONTNEED);
            }
            self.part = part;
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
