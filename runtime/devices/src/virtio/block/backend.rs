//! The file behind a block device.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};

use super::SECTOR;
use crate::virtio::GuestSlice;
use crate::virtio::iov::{self, Io};

/// Zeros written at a time where the file system cannot make them by itself.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

#[derive(Debug)]
pub(crate) struct Backend {
    file: File,
    sectors: u64,
}

impl Backend {
    pub fn new(file: File) -> io::Result<Self> {
        let mut backend = Self { file, sectors: 0 };
        backend.refresh()?;
        Ok(backend)
    }

    /// Looks at the size again. A part of a sector at the end is not shown.
    pub fn refresh(&mut self) -> io::Result<u64> {
        // Seeking knows the size of block devices too, where stat(2) says 0.
        self.sectors = self.file.seek(SeekFrom::End(0))? / SECTOR;
        Ok(self.sectors)
    }

    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether `[sector, sector + count)` is on the disk.
    pub fn covers(&self, sector: u64, count: u64) -> bool {
        sector.checked_add(count).is_some_and(|end| end <= self.sectors)
    }

    pub fn read(&self, mut to: Vec<GuestSlice<'_>>, mut offset: u64) -> io::Result<()> {
        while !to.is_empty() {
            match iov::read(self.file.as_fd(), &to, Io::At(offset)) {
                // The file has shrunk behind our back.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    iov::advance(&mut to, n);
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    pub fn write(&self, mut from: Vec<GuestSlice<'_>>, mut offset: u64) -> io::Result<()> {
        while !from.is_empty() {
            match iov::write(self.file.as_fd(), &from, Io::At(offset)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    iov::advance(&mut from, n);
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Frees the range if the file system can; it is a hint (5.2.6.2).
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len) {
            Err(e) if unsupported(&e) => Ok(()),
            done => done,
        }
    }

    /// Makes the range read as zeros; `unmap` allows to free it.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        } else {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        };
        match self.fallocate(how, offset, len) {
            Err(e) if unsupported(&e) => self.write_zero_bytes(offset, len),
            done => done,
        }
    }

    fn write_zero_bytes(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        while offset < end {
            let n = (end - offset).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..n as usize], offset)?;
            offset += n;
        }
        Ok(())
    }

    fn fallocate(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let range = |n: u64| i64::try_from(n).map_err(|_| io::ErrorKind::InvalidInput);
        let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, how, range(offset)?, range(len)?)?;
        Ok(())
    }
}

impl AsRawFd for Backend {
    fn as_raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }
}

fn unsupported(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV))
}
