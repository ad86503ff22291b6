//! Layouts that are filled from elsewhere, piece by piece, before they are imported.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use oci_spec::image::{Descriptor, ImageIndexBuilder, MediaType, SCHEMA_VERSION, Sha256Digest};

use super::lock::{Held, lock};
use super::{ImportError, LAYOUT, Store, StoreError};
use crate::digest::{Digest, Hashing};
use crate::image::{Image, ImageError};
use crate::progress::{Progress, Watched};
use crate::reference::Reference;
use crate::source;

/// An OCI layout in the store that is being filled, by one process at a time. What has come stays
/// when that process fails, so that the next one need not begin anew; [`Store::prune`] removes it.
#[derive(Debug)]
pub struct Incoming<'a> {
    store: &'a Store,
    dir: PathBuf,
    _lock: Held,
}

impl Store {
    /// What has come of the image `name` so far. Waits while another process is filling it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] or [`StoreError::NoSpace`].
    pub fn incoming(&self, name: &Reference) -> Result<Incoming<'_>, StoreError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        let create = |dir: &Path| builder.create(dir).map_err(StoreError::io("create", dir));
        let all = self.incoming_dir();
        create(&all)?;
        let key = Digest::of(name.canonical().as_bytes()).hex();
        let lock = lock(&all.join(format!("{key}.lock")))?;
        let dir = all.join(key);
        create(&dir.join("blobs/sha256"))?;
        let layout = dir.join("oci-layout");
        fs::write(&layout, LAYOUT).map_err(StoreError::io("write", &layout))?;
        Ok(Incoming { store: self, dir, _lock: lock })
    }

    pub(super) fn incoming_dir(&self) -> PathBuf {
        self.root.join("incoming")
    }
}

impl Incoming<'_> {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// True if the blob is there, or in the store, from where it is linked.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn has(&self, digest: &Digest, size: u64) -> Result<bool, StoreError> {
        let path = self.blob(digest);
        let is_there = |path: &Path| path.metadata().is_ok_and(|found| found.len() == size);
        if is_there(&path) {
            return Ok(true);
        }
        let stored = self.store.blob(digest);
        if !is_there(&stored) {
            return Ok(false);
        }
        match fs::hard_link(&stored, &path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(true),
            // Removed in between.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(StoreError::io("link", &path)(e)),
        }
    }

    /// Keeps a document (a manifest or an index) by its digest.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] or [`StoreError::NoSpace`].
    pub fn put(&self, document: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(document);
        let mut file = self.partial(&digest)?;
        file.set_len(0).and_then(|()| file.write_all(document)).map_err(self.failed(&digest))?;
        self.keep(&digest)?;
        Ok(digest)
    }

    /// What has come of a blob, open for reading and for writing at its end.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] or [`StoreError::NoSpace`].
    pub fn partial(&self, digest: &Digest) -> Result<File, StoreError> {
        let path = self.partial_path(digest);
        OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(&path)
            .map_err(StoreError::io("create", &path))
    }

    /// Takes the partial blob for complete if it has this digest, and starts it anew if it has not.
    /// Returns the digest that it has.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn complete(&self, digest: &Digest, progress: &dyn Progress) -> Result<Digest, StoreError> {
        let file = File::open(self.partial_path(digest)).map_err(self.failed(digest))?;
        let mut reader = Hashing::new(Watched { inner: file, progress });
        io::copy(&mut reader, &mut io::sink()).map_err(self.failed(digest))?;
        let found = reader.finish();
        if found == *digest {
            self.keep(digest)?;
        } else {
            let path = self.partial_path(digest);
            fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
        }
        Ok(found)
    }

    /// Imports the image that the document `top` leads to as `name`, and removes what was kept of it
    /// here, whatever comes of that: what is complete and cannot be imported would fail again.
    ///
    /// # Errors
    ///
    /// See [`Store::import_path`].
    pub fn import(
        self,
        top: &Digest,
        name: &Reference,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>, ImportError> {
        let imported = self
            .write_index(top)
            .and_then(|()| self.store.import_path(&self.dir, Some(&name.canonical()), progress));
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            tracing::warn!(path = %self.dir.display(), %error, "cannot remove what was pulled");
        }
        imported
    }

    fn write_index(&self, top: &Digest) -> Result<(), ImportError> {
        let broken = |e: oci_spec::OciSpecError| ImageError::Manifest(e.to_string());
        let path = self.blob(top);
        let document = fs::read(&path).map_err(StoreError::io("read", &path))?;
        let kind = match source::is_index(&document) {
            true => MediaType::ImageIndex,
            false => MediaType::ImageManifest,
        };
        let digest = Sha256Digest::from_str(&top.hex()).map_err(broken)?;
        let index = ImageIndexBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .manifests(vec![Descriptor::new(kind, document.len() as u64, digest)])
            .build()
            .map_err(broken)?;
        let json = serde_json::to_vec(&index).map_err(|e| ImageError::Manifest(e.to_string()))?;
        let path = self.dir.join("index.json");
        Ok(fs::write(&path, json).map_err(StoreError::io("write", &path))?)
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    fn partial_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(format!("{}.part", digest.hex()))
    }

    fn keep(&self, digest: &Digest) -> Result<(), StoreError> {
        fs::rename(self.partial_path(digest), self.blob(digest)).map_err(self.failed(digest))
    }

    fn failed(&self, digest: &Digest) -> impl FnOnce(io::Error) -> StoreError + use<> {
        StoreError::io("write", &self.partial_path(digest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    #[test]
    fn pieces_stay_until_they_are_whole_and_right() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let name: Reference = "busybox".parse().unwrap();
        let digest = Digest::of(b"blob");
        let incoming = store.incoming(&name).unwrap();
        incoming.partial(&digest).unwrap().write_all(b"bl").unwrap();
        drop(incoming);

        let incoming = store.incoming(&name).unwrap();
        assert!(!incoming.has(&digest, 4).unwrap());
        let mut file = incoming.partial(&digest).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 2);
        file.write_all(b"ob").unwrap();
        assert_eq!(incoming.complete(&digest, &Silent).unwrap(), digest);
        assert!(incoming.has(&digest, 4).unwrap());
        assert!(!incoming.has(&digest, 5).unwrap());

        let other = Digest::of(b"other");
        incoming.partial(&other).unwrap().write_all(b"something else").unwrap();
        assert_ne!(incoming.complete(&other, &Silent).unwrap(), other);
        assert_eq!(incoming.partial(&other).unwrap().metadata().unwrap().len(), 0);
    }

    #[test]
    fn pruning_removes_what_nobody_is_filling() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let idle = store.incoming(&"idle".parse().unwrap()).unwrap();
        idle.put(b"document").unwrap();
        let (idle_path, _) = (idle.path().to_owned(), drop(idle));
        let busy = store.incoming(&"busy".parse().unwrap()).unwrap();
        let pruned = store.prune(Default::default()).unwrap();
        assert!(!idle_path.exists() && busy.path().exists());
        assert!(pruned.files >= 1 && pruned.freed > 0, "{pruned:?}");
    }
}
