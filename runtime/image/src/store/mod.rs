//! The content store: blobs, names and unpacked root file systems under one directory.
//!
//! ```text
//! oci-layout, index.json   the store is itself an OCI layout: `skopeo inspect oci:DIR:NAME` works
//! blobs/sha256/HEX         manifests, configurations and layers
//! rootfs/HEX.erofs         root file systems, named by what they are made from
//! incoming/                what has come of images that are being pulled
//! tmp/                     what is being written; everything is renamed when it is complete
//! lock                     shared: somebody adds to the store; exclusive: somebody removes
//! index.lock               held while index.json is replaced
//! ```
//!
//! All locks are `flock` locks, so a crash releases them, and leaves nothing but files in `tmp/`
//! that the next one who has the store to himself removes.

mod import;
mod incoming;
mod index;
mod lock;
mod prune;
mod query;
mod rootfs;

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;
use thiserror::Error;

pub use self::import::ImportError;
pub use self::incoming::Incoming;
pub use self::prune::{PruneOptions, Pruned, Removed};
pub use self::query::{ImageSummary, Usage};
pub use self::rootfs::RootfsLease;
use crate::digest::Digest;
use crate::image::ImageError;
use crate::limits::Limits;
use crate::reference::ReferenceError;

/// What an OCI layout says it is.
const LAYOUT: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;

/// Why the store could not do something.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The disk is full.
    #[error(
        "no space left on the file system of {path}: free some (`mvm image prune` removes what no \
         image needs)"
    )]
    NoSpace {
        /// What was being written.
        path: PathBuf,
    },
    /// Some operation on the host failed.
    #[error("cannot {action} {path}: {error}")]
    Io {
        /// What was being done, as a verb.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// A name that is none.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// No image of that name.
    #[error(
        "no image `{name}` in the store; to get it in: `mvm pull {source_name}`, or `skopeo copy \
         docker://{source_name} oci-archive:image.tar:{name}` and `mvm image import image.tar`"
    )]
    NotFound {
        /// The name that was asked for.
        name: String,
        /// The name that a registry knows it by.
        source_name: String,
    },
    /// An abbreviated identity that several images have.
    #[error("`{prefix}` is the beginning of several image ids: give more of it")]
    Ambiguous {
        /// The beginning.
        prefix: String,
    },
    /// The image has more names than the one to be removed by its identity.
    #[error("image {id} has several names ({names}): remove them, or use --force")]
    SeveralNames {
        /// Short identity.
        id: String,
        /// The names.
        names: String,
    },
    /// The image's root file system is in use.
    #[error("image {name} is in use by a running sandbox: stop it first, or use --force")]
    InUse {
        /// The name or identity of the image.
        name: String,
    },
    /// The store is being added to.
    #[error("the store {path} is busy (an import or unpacking is running): try again when it ends")]
    Busy {
        /// The store.
        path: PathBuf,
    },
    /// A blob is gone.
    #[error("the store is damaged: blob {digest} is missing; import the image again")]
    BlobMissing {
        /// The blob.
        digest: Digest,
    },
    /// The list of images is not what it was.
    #[error(
        "the store's list of images is damaged: {path}: {reason}; move that file away and import or pull the images \
         again, of which all that is still there is used"
    )]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A blob is not what it was.
    #[error("the store is damaged: {path}: {reason}; remove and import the image again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The documents of an image in the store.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A root file system could not be made from its layers.
    #[error(transparent)]
    Unpack(#[from] crate::unpack::UnpackError),
}

impl StoreError {
    /// An I/O error with what it was about; a full disk is told from everything else.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |error| match is_full(&error) {
            true => Self::NoSpace { path },
            false => Self::Io { action, path, error },
        }
    }
}

/// True if an error means that the disk, or the user's share of it, is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// An open content store. Several processes may use one store at once.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    limits: Limits,
}

impl Store {
    /// Opens the store under `root`, which is created if it is missing, and removes what a crash
    /// may have left.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] or [`StoreError::NoSpace`] if the directories cannot be created.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        Self::open_with(root, Limits::default())
    }

    /// As [`Store::open`], with other bounds on what images may ask for.
    pub fn open_with(root: impl Into<PathBuf>, limits: Limits) -> Result<Self, StoreError> {
        let store = Self { root: root.into(), limits };
        // Layers may hold secrets: nobody else's business.
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for dir in [store.root.clone(), store.blobs(), store.rootfs_dir(), store.temporary_dir()] {
            builder.create(&dir).map_err(StoreError::io("create", &dir))?;
        }
        let layout = store.root.join("oci-layout");
        if !layout.exists() {
            let _adding = store.lock_for_adding()?;
            let mut file = store.temporary()?;
            file.write_all(LAYOUT.as_bytes()).map_err(StoreError::io("write", &layout))?;
            store.keep(file, &layout)?;
        }
        store.sweep()?;
        Ok(store)
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    fn rootfs_dir(&self) -> PathBuf {
        self.root.join("rootfs")
    }

    fn rootfs_path(&self, key: &Digest) -> PathBuf {
        self.rootfs_dir().join(format!("{}.erofs", key.hex()))
    }

    fn temporary_dir(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// A file that goes away unless it is kept. The caller holds the store's lock, so that nobody
    /// takes it for a crash's.
    fn temporary(&self) -> Result<NamedTempFile, StoreError> {
        let dir = self.temporary_dir();
        NamedTempFile::new_in(&dir).map_err(StoreError::io("create a file in", &dir))
    }

    /// A file with no name.
    fn unnamed(&self) -> io::Result<File> {
        tempfile::tempfile_in(self.temporary_dir())
    }

    /// Gives a complete file its name, in such an order that a power failure leaves either
    /// nothing or all of it.
    fn keep(&self, file: NamedTempFile, path: &Path) -> Result<(), StoreError> {
        file.as_file().sync_data().map_err(StoreError::io("write", path))?;
        file.persist(path).map_err(|e| StoreError::io("create", path)(e.error))?;
        Ok(())
    }

    /// The whole of a blob that is a document.
    fn read_blob(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let path = self.blob(digest);
        match fs::read(&path) {
            Ok(bytes) if Digest::of(&bytes) == *digest => Ok(bytes),
            Ok(_) => Err(StoreError::Damaged { path, reason: "its digest is wrong".into() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::BlobMissing { digest: *digest })
            }
            Err(e) => Err(StoreError::io("read", &path)(e)),
        }
    }
}
