//! Who may add to the store and who may remove from it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::Path;

use super::{Store, StoreError};

/// A lock that is held until it is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Held(#[expect(dead_code, reason = "closing the file is what releases it")] File);

impl Store {
    /// Held while something is added: what is in the store stays, and so do temporary files.
    pub(super) fn lock_for_adding(&self) -> Result<Held, StoreError> {
        let path = self.root.join("lock");
        let file = open(&path)?;
        file.lock_shared().map_err(StoreError::io("lock", &path))?;
        Ok(Held(file))
    }

    /// Held while something is removed; `None` if somebody else is using the store.
    pub(super) fn try_lock_for_removing(&self) -> Result<Option<Held>, StoreError> {
        let path = self.root.join("lock");
        try_lock(open(&path)?, &path)
    }

    /// Held while the index is read and replaced.
    pub(super) fn lock_index(&self) -> Result<Held, StoreError> {
        lock(&self.root.join("index.lock"))
    }

    /// Removes what a crash left in `tmp/`, unless somebody is writing there just now.
    pub(super) fn sweep(&self) -> Result<(), StoreError> {
        let dir = self.temporary_dir();
        let read = || fs::read_dir(&dir).map_err(StoreError::io("read", &dir));
        if read()?.next().is_none() {
            return Ok(());
        }
        let Some(_lock) = self.try_lock_for_removing()? else { return Ok(()) };
        for entry in read()? {
            let path = entry.map_err(StoreError::io("read", &dir))?.path();
            fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
            tracing::debug!(path = %path.display(), "removed a file that a crash left");
        }
        Ok(())
    }
}

/// Waits for an exclusive lock on `path`.
pub(super) fn lock(path: &Path) -> Result<Held, StoreError> {
    let file = open(path)?;
    file.lock().map_err(StoreError::io("lock", path))?;
    Ok(Held(file))
}

/// Takes an exclusive lock if nobody else has any.
pub(super) fn try_lock(file: File, path: &Path) -> Result<Option<Held>, StoreError> {
    match file.try_lock() {
        Ok(()) => Ok(Some(Held(file))),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(e)) => Err(StoreError::io("lock", path)(e)),
    }
}

fn open(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(StoreError::io("open", path))
}
