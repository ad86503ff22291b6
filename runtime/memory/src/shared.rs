//! Anonymous memory that processes can share: a memory file, sealed against changes of its size, and
//! a mapping of it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// The seals of every file made here: nobody who maps it may find it shorter one day.
const SEALS: SealFlag =
    SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

/// A memory file of `size` bytes, zeros, whose size is fixed for good. `pages` are flags that say which
/// pages it is made of.
pub(crate) fn memory_file(name: &str, size: u64, pages: MFdFlags) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | pages;
    let file = File::from(memfd_create(name, flags)?);
    file.set_len(size)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS))?;
    Ok(file)
}

/// Refuses a file from another process that could change its size, or has another one.
pub(crate) fn check_sealed(file: &File, size: u64) -> io::Result<()> {
    let seals = SealFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GET_SEALS)?);
    if !seals.contains(SealFlag::F_SEAL_SHRINK) || file.metadata()?.len() != size {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the memory file can shrink, or is not of the size that it should have",
        ));
    }
    Ok(())
}

/// A shared, writable mapping of a whole memory file.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    file: Option<File>,
}

// SAFETY: the mapping belongs to nobody's stack; what is in it is accessed by atomics alone.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file`, which must be as long and sealed.
    pub fn of(file: File, len: usize) -> io::Result<Self> {
        if len == 0 {
            return Ok(Self { start: NonNull::dangling(), len, file: Some(file) });
        }
        let fd = file.as_raw_fd();
        Ok(Self { start: map(len, libc::MAP_SHARED, fd)?, len, file: Some(file) })
    }

    /// Memory of this process alone.
    pub fn private(len: usize) -> io::Result<Self> {
        if len == 0 {
            return Ok(Self { start: NonNull::dangling(), len, file: None });
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        Ok(Self { start: map(len, flags, -1)?, len, file: None })
    }

    /// Where it is; page-aligned unless empty.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// The file, if it is one.
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }
}

fn map(len: usize, flags: libc::c_int, fd: libc::c_int) -> io::Result<NonNull<u8>> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = flags | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address that the kernel chooses touches no memory of ours.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: the range was mapped by us, and whoever borrows from it borrows from `self`.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        }
    }
}
