//! Removing images and what no image needs.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use serde::Serialize;

use super::lock::{Held, try_lock};
use super::query::on_disk;
use super::{Store, StoreError};
use crate::digest::Digest;
use crate::reference::Reference;

/// What [`Store::prune`] removes besides what no image needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PruneOptions {
    /// All images that no running sandbox uses, not only those without a name.
    pub all: bool,
}

/// What [`Store::prune`] removed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Pruned {
    /// Identities of images.
    pub images: Vec<Digest>,
    /// Files of all kinds.
    pub files: u64,
    /// Bytes of them on the host's disk.
    pub freed: u64,
    /// Root file systems that nothing but running sandboxes needs.
    pub in_use: u64,
}

/// What [`Store::remove`] removed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Removed {
    /// Names that the image no longer has.
    pub untagged: Vec<String>,
    /// The image, if it is gone.
    pub deleted: Option<Digest>,
    /// Bytes freed on the host's disk.
    pub freed: u64,
}

impl Store {
    /// Removes a name and, with its last name, the image. An identity removes an image that has
    /// one name at most. `force` removes all its names, and also an image in use: its running
    /// sandboxes keep what they have open.
    ///
    /// # Errors
    ///
    /// [`StoreError::NotFound`], [`StoreError::SeveralNames`] or [`StoreError::InUse`].
    pub fn remove(&self, name: &str, force: bool) -> Result<Removed, StoreError> {
        let mut removed = Removed::default();
        {
            let _adding = self.lock_for_adding()?;
            let index = self.lock_index()?;
            let mut records = self.records()?;
            let (record, reference) = self.find(&records, name)?;
            let manifest = record.manifest;
            // A damaged image can be removed all the same.
            let image = self.load(record);
            let names: Vec<_> = match &reference {
                Some(reference) => vec![reference.clone()],
                None => record.names.clone(),
            };
            if reference.is_none() && names.len() > 1 && !force {
                return Err(StoreError::SeveralNames {
                    id: image.map_or(manifest, |image| image.id()).short(),
                    names: names.iter().map(Reference::to_string).collect::<Vec<_>>().join(", "),
                });
            }
            if names.len() == record.names.len() {
                if let Ok(image) = &image {
                    let key = image.rootfs_key();
                    let shared = records.0.iter().any(|other| {
                        other.manifest != manifest
                            && self.load(other).is_ok_and(|other| other.rootfs_key() == key)
                    });
                    if !force && !shared && self.is_leased(&key)? {
                        return Err(StoreError::InUse { name: name.to_owned() });
                    }
                }
                removed.deleted = Some(image.map_or(manifest, |image| image.id()));
                records.0.retain(|record| record.manifest != manifest);
            } else if let Some(record) = records.get_mut(&manifest) {
                record.names.retain(|name| !names.contains(name));
            }
            removed.untagged = names.iter().map(Reference::to_string).collect();
            self.write_records(&records, &index)?;
        }
        removed.freed = self.collect_if_idle()?.freed;
        Ok(removed)
    }

    /// Removes images without a name (all, with [`PruneOptions::all`]), except those in use, and
    /// then everything that no image needs.
    ///
    /// # Errors
    ///
    /// [`StoreError::Busy`] while somebody adds to the store.
    pub fn prune(&self, options: PruneOptions) -> Result<Pruned, StoreError> {
        let busy = || StoreError::Busy { path: self.root.clone() };
        let removing = self.try_lock_for_removing()?.ok_or_else(busy)?;
        let mut pruned = Vec::new();
        {
            let index = self.lock_index()?;
            let mut records = self.records()?;
            let mut keep = Vec::new();
            for record in records.0 {
                let image = self.load(&record);
                let in_use = match &image {
                    Ok(image) => self.is_leased(&image.rootfs_key())?,
                    Err(_) => false,
                };
                if in_use || !(options.all || record.names.is_empty()) {
                    keep.push(record);
                } else {
                    pruned.push(image.map_or(record.manifest, |image| image.id()));
                }
            }
            records.0 = keep;
            if !pruned.is_empty() {
                self.write_records(&records, &index)?;
            }
        }
        let mut collected = self.collect(&removing)?;
        self.prune_incoming(&mut collected)?;
        Ok(Pruned { images: pruned, ..collected })
    }

    /// Removes what has come of images that nobody is pulling just now.
    fn prune_incoming(&self, pruned: &mut Pruned) -> Result<(), StoreError> {
        let dir = self.incoming_dir();
        let entries = match fs::read_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(StoreError::io("read", &dir))?,
        };
        for entry in entries {
            let lock_path = entry.map_err(StoreError::io("read", &dir))?.path();
            if lock_path.extension().is_none_or(|extension| extension != "lock") {
                continue;
            }
            let file = File::open(&lock_path).map_err(StoreError::io("open", &lock_path))?;
            // The lock file stays: somebody may be waiting for it.
            let Some(_lock) = try_lock(file, &lock_path)? else { continue };
            let layout = lock_path.with_extension("");
            let blobs = layout.join("blobs/sha256");
            if blobs.exists() {
                remove_others(&blobs, &HashSet::new(), pruned)?;
            }
            match fs::remove_dir_all(&layout) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(StoreError::io("remove", &layout)(e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// [`Store::collect`], unless somebody is using the store: the next one will do it.
    pub(super) fn collect_if_idle(&self) -> Result<Pruned, StoreError> {
        match self.try_lock_for_removing()? {
            Some(lock) => self.collect(&lock),
            None => Ok(Pruned::default()),
        }
    }

    /// Removes what no image needs.
    fn collect(&self, _removing: &Held) -> Result<Pruned, StoreError> {
        let mut blobs = HashSet::new();
        let mut rootfs = HashSet::new();
        for record in self.records()?.0 {
            blobs.insert(record.manifest.hex());
            // The blobs of a damaged image are removed with it, not before.
            let image = self.load(&record)?;
            blobs.insert(image.id().hex());
            blobs.extend(image.layers.iter().map(|layer| layer.digest.hex()));
            rootfs.insert(format!("{}.erofs", image.rootfs_key().hex()));
        }
        let mut pruned = Pruned::default();
        remove_others(&self.blobs(), &blobs, &mut pruned)?;
        remove_others(&self.temporary_dir(), &HashSet::new(), &mut pruned)?;

        // Lock files go too: with the store locked for removing nobody waits for one.
        let dir = self.rootfs_dir();
        for entry in fs::read_dir(&dir).map_err(StoreError::io("read", &dir))? {
            let path = entry.map_err(StoreError::io("read", &dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if rootfs.contains(&name) {
                continue;
            }
            let file = File::open(&path).map_err(StoreError::io("open", &path))?;
            match try_lock(file, &path)? {
                Some(_lock) => remove(&path, &mut pruned)?,
                None => {
                    rootfs.insert(name);
                    pruned.in_use += 1;
                }
            }
        }
        Ok(pruned)
    }

    /// True if a running sandbox uses the root file system `key`.
    fn is_leased(&self, key: &Digest) -> Result<bool, StoreError> {
        let path = self.rootfs_path(key);
        match File::open(&path) {
            Ok(file) => Ok(try_lock(file, &path)?.is_none()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(StoreError::io("open", &path)(e)),
        }
    }
}

fn remove_others(
    dir: &Path,
    keep: &HashSet<String>,
    pruned: &mut Pruned,
) -> Result<(), StoreError> {
    for entry in fs::read_dir(dir).map_err(StoreError::io("read", dir))? {
        let path = entry.map_err(StoreError::io("read", dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !keep.contains(name.as_ref()) {
            remove(&path, pruned)?;
        }
    }
    Ok(())
}

fn remove(path: &Path, pruned: &mut Pruned) -> Result<(), StoreError> {
    let size = fs::metadata(path).map_or(0, |metadata| on_disk(&metadata));
    fs::remove_file(path).map_err(StoreError::io("remove", path))?;
    pruned.files += 1;
    pruned.freed += size;
    Ok(())
}
