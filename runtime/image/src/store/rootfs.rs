//! Unpacked root file systems and who uses them.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::lock::lock;
use super::{Store, StoreError};
use crate::digest::Digest;
use crate::image::{Image, Layer};
use crate::progress::Progress;
use crate::unpack::{Input, unpack};

/// A root file system in use: an open, read-only EROFS image that stays in the store as long as
/// this or a duplicate of its descriptor is open, in whichever process.
///
/// The lock belongs to the open file, not to this process: hand the descriptor to the process that
/// runs the sandbox, and the lease is over when that process is.
#[derive(Debug)]
pub struct RootfsLease {
    file: File,
    path: PathBuf,
    size: u64,
}

impl RootfsLease {
    /// The image, opened for reading.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The image's file, with the lease.
    pub fn into_file(self) -> File {
        self.file
    }

    /// Where the image is. For messages: the path may be gone when it is used.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the image, a multiple of 4096.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl AsFd for RootfsLease {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Store {
    /// The root file system of `image`, unpacked again if it is not there.
    ///
    /// # Errors
    ///
    /// [`StoreError::BlobMissing`] if it has to be unpacked and layers are gone,
    /// [`StoreError::Unpack`] if they are damaged.
    pub fn rootfs(
        &self,
        image: &Image,
        progress: &dyn Progress,
    ) -> Result<RootfsLease, StoreError> {
        let key = image.rootfs_key();
        // With this lock nobody removes anything between the unpacking and the lease.
        let _adding = self.lock_for_adding()?;
        if let Some(lease) = self.lease(&key)? {
            return Ok(lease);
        }
        let _building = self.lock_rootfs(&key)?;
        if let Some(lease) = self.lease(&key)? {
            return Ok(lease);
        }
        let layers = image.layers.iter().map(|layer| {
            let reader = File::open(self.blob(&layer.digest))?;
            let Layer { digest, diff_id, size, .. } = *layer;
            Ok(Input { reader, size, digest, diff_id })
        });
        for layer in &image.layers {
            if !self.blob(&layer.digest).exists() {
                return Err(StoreError::BlobMissing { digest: layer.digest });
            }
        }
        let file = self.build_rootfs(&key, layers, progress)?;
        self.keep(file, &self.rootfs_path(&key))?;
        self.lease(&key)?.ok_or_else(|| StoreError::Busy { path: self.root.clone() })
    }

    /// Unpacks `layers` into a temporary file.
    pub(super) fn build_rootfs<R: io::Read>(
        &self,
        key: &Digest,
        layers: impl ExactSizeIterator<Item = io::Result<Input<R>>>,
        progress: &dyn Progress,
    ) -> Result<NamedTempFile, StoreError> {
        let file = self.temporary()?;
        let dir = self.temporary_dir();
        let image = file.reopen().map_err(StoreError::io("open", file.path()))?;
        let spool = self.unnamed().map_err(StoreError::io("create a file in", &dir))?;
        unpack(layers, image, spool, key, &self.limits, progress)?;
        Ok(file)
    }

    /// Held while the root file system `key` is made, so that others wait instead of making it too.
    pub(super) fn lock_rootfs(&self, key: &Digest) -> Result<super::lock::Held, StoreError> {
        lock(&self.rootfs_dir().join(format!("{}.lock", key.hex())))
    }

    /// A lease of the root file system `key`, `None` if it is not there.
    fn lease(&self, key: &Digest) -> Result<Option<RootfsLease>, StoreError> {
        let path = self.rootfs_path(key);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(StoreError::io("open", &path)(e)),
        };
        match file.try_lock_shared() {
            Ok(()) => {}
            // Somebody is looking whether it can be removed.
            Err(TryLockError::WouldBlock) => {
                file.lock_shared().map_err(StoreError::io("lock", &path))?;
            }
            Err(TryLockError::Error(e)) => return Err(StoreError::io("lock", &path)(e)),
        }
        let metadata = file.metadata().map_err(StoreError::io("read", &path))?;
        // Removed between the opening and the lock.
        if metadata.nlink() == 0 {
            return Ok(None);
        }
        Ok(Some(RootfsLease { size: metadata.len(), file, path }))
    }
}
