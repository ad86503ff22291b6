//! A piece of a file that is read straight into guest memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// Bytes `[offset, offset + len)` of a file, with a position of its own: the file's is shared with
/// whoever handed the descriptor over, and is not touched.
#[derive(Debug)]
pub struct Section {
    file: File,
    offset: u64,
    len: u64,
    position: u64,
}

impl Section {
    /// A piece of `file`; without `len` everything from `offset` to the end.
    ///
    /// # Errors
    /// The file's size cannot be found out, or it has no such piece.
    pub fn new(file: File, offset: u64, len: Option<u64>) -> io::Result<Self> {
        let size = (&file).seek(SeekFrom::End(0))?;
        let available = size.checked_sub(offset);
        let len = len.or(available).filter(|&len| available.is_some_and(|a| len <= a));
        let Some(len) = len else {
            let what = format!("the file has {size} bytes; none or not enough after {offset}");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
        };
        Ok(Self { file, offset, len, position: 0 })
    }

    /// The same piece of the same file, from its beginning.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, position: 0, ..*self })
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Reads at `position` of the section as far as there is something, up to `buf.len()` bytes.
    ///
    /// # Errors
    /// The host cannot read the file.
    pub fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<usize> {
        let left = usize::try_from(self.len.saturating_sub(position)).unwrap_or(usize::MAX);
        let want = buf.len().min(left);
        let mut got = 0;
        while got < want {
            match self.file.read_at(&mut buf[got..want], self.offset + position + got as u64) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(got)
    }
}

impl Read for Section {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let got = self.read_at(buf, self.position)?;
        self.position += got as u64;
        Ok(got)
    }
}

impl Seek for Section {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(n) => Some(n),
            SeekFrom::End(n) => self.len.checked_add_signed(n),
            SeekFrom::Current(n) => self.position.checked_add_signed(n),
        };
        // Beyond the end is allowed, as with files; reads give nothing there.
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl ReadVolatile for Section {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let left = usize::try_from(self.len.saturating_sub(self.position)).unwrap_or(usize::MAX);
        let want = buf.len().min(left);
        let position =
            self.offset
                .checked_add(self.position)
                .and_then(|p| i64::try_from(p).ok())
                .ok_or_else(|| VolatileMemoryError::IOError(io::ErrorKind::InvalidInput.into()))?;
        let guard = buf.ptr_guard_mut();
        // SAFETY: the guard keeps `buf.len() >= want` bytes mapped and writable for the call; guest
        // memory is volatile and no reference to it exists.
        let got =
            unsafe { libc::pread(self.file.as_raw_fd(), guard.as_ptr().cast(), want, position) };
        let got = usize::try_from(got)
            .map_err(|_| VolatileMemoryError::IOError(io::Error::last_os_error()))?;
        buf.bitmap().mark_dirty(0, got);
        self.position += got as u64;
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mvm_memory::GuestRam;
    use std::io::Write;
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{Bytes, GuestAddress};

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn only_the_piece_is_seen() {
        let mut section = Section::new(file(b"0123456789"), 2, Some(5)).unwrap();
        let mut text = String::new();
        section.read_to_string(&mut text).unwrap();
        assert_eq!(text, "23456");
        assert_eq!(section.seek(SeekFrom::End(-2)).unwrap(), 3);
        assert_eq!(section.read(&mut [0; 9]).unwrap(), 2);
        assert!(section.seek(SeekFrom::Current(-6)).is_err());
        assert_eq!(Section::new(file(b"0123456789"), 4, None).unwrap().size(), 6);
        assert!(Section::new(file(b"0123"), 2, Some(3)).is_err());
        assert!(Section::new(file(b"0123"), 5, None).is_err());
    }

    #[test]
    fn guest_memory_is_filled_and_marked() {
        let ram = GuestRam::new(&[(0, 0x3000)]).unwrap();
        let mut section = Section::new(file(&[7; 0x1800]), 0, None).unwrap();
        let at = GuestAddress(0x1000);
        ram.memory().read_exact_volatile_from(at, &mut section, 0x1800).unwrap();
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x27ff)).unwrap(), 7);
        assert!(ram.regions()[0].tracker.dirty_at(0x2000));
        assert!(ram.memory().read_exact_volatile_from(at, &mut section, 1).is_err());
    }
}
