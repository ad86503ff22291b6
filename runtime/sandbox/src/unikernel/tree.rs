//! Files of an image's root file system, read before anything of the image runs.

use std::fs::File;
use std::io::{self, Read, Seek};

use mvm_image::erofs::reader::{FileType, Inode, ReadError, Reader};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Error, Tree};

/// An image's root file system.
#[derive(Debug)]
pub struct ErofsTree(Reader);

impl ErofsTree {
    /// The one in `rootfs`, an EROFS image.
    ///
    /// # Errors
    /// It is none.
    pub fn open(rootfs: &File) -> Result<Self, Error> {
        let opened = rootfs.try_clone().map_err(ReadError::from).and_then(Reader::open);
        opened.map(Self).map_err(|e| unusable("/", &e))
    }

    /// A copy of a regular file in memory, of which nobody else has a name or descriptor.
    ///
    /// # Errors
    /// There is no such file, it is larger than `limit` bytes, or it cannot be copied.
    pub fn extract(&self, path: &str, limit: u64) -> Result<File, Error> {
        let fail = |reason: String| Error::File { path: path.into(), reason };
        let inode = self.find(path)?.ok_or_else(|| fail("does not exist".into()))?;
        if inode.file_type != FileType::File {
            return Err(fail("is not a regular file".into()));
        }
        if inode.size > limit {
            return Err(fail(format!("has {} bytes, the limit is {limit}", inode.size)));
        }
        let copy = || -> io::Result<File> {
            let mut file = File::from(memfd_create(c"mvm-unikernel", MFdFlags::MFD_CLOEXEC)?);
            io::copy(&mut self.0.data(&inode).map_err(io::Error::other)?, &mut file)?;
            file.rewind()?;
            Ok(file)
        };
        copy().map_err(|e| fail(format!("cannot be read: {e}")))
    }

    /// What is at a path, links followed within the image. A link that leads nowhere is nothing.
    fn find(&self, path: &str) -> Result<Option<Inode>, Error> {
        match self.0.lookup(path) {
            Err(ReadError::Loop { .. }) => Ok(None),
            other => other.map_err(|e| unusable(path, &e)),
        }
    }
}

impl Tree for ErofsTree {
    fn head(&self, path: &str, limit: usize) -> Result<Option<Vec<u8>>, Error> {
        let Some(inode) = self.find(path)?.filter(|i| i.file_type == FileType::File) else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        let data = self.0.data(&inode).map_err(|e| unusable(path, &e))?;
        data.take(limit as u64).read_to_end(&mut bytes).map_err(|e| unusable(path, &e))?;
        Ok(Some(bytes))
    }
}

fn unusable(path: &str, error: &dyn std::error::Error) -> Error {
    Error::File { path: path.into(), reason: format!("cannot be read: {error}") }
}
