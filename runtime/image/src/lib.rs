//! OCI images on this host: from archives and layouts to root file systems that a machine can
//! mount.
//!
//! A [`Store`] keeps images under one directory. [`Store::import_path`] takes an image in,
//! [`Store::resolve`] finds it by name, [`Image::defaults`] says how it wants to be run, and
//! [`Store::rootfs`] leases its root file system, a read-only EROFS image that all sandboxes of
//! the image share.
//!
//! ```no_run
//! use mvm_image::{Silent, Store};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let store = Store::open("/var/lib/mvm/images")?;
//! store.import_path("busybox.tar".as_ref(), None, &Silent)?;
//! let image = store.resolve("busybox")?;
//! let rootfs = store.rootfs(&image, &Silent)?;
//! println!("{:?} on {}", image.defaults().cmd, rootfs.path().display());
//! # Ok(())
//! # }
//! ```
//!
//! Everything here works as an ordinary user. Nothing of an image is ever unpacked into the host's
//! file system: owners, devices and attributes exist in the EROFS image only. Out of scope:
//! registries (`mvm-registry` fills an [`Incoming`] layout from them), and what a container is.

mod annotations;
mod compress;
mod digest;
mod directory;
pub mod erofs;
mod ext2;
mod image;
mod layer;
mod limits;
mod names;
mod platform;
mod progress;
mod reference;
mod source;
mod store;
mod tarball;
mod tree;
mod unpack;

pub use compress::Compression;
pub use digest::{Digest, DigestError};
pub use directory::{DirectoryError, Owners, from_directory, pack_directory};
pub use ext2::{Ext2Error, write_ext2};
pub use image::{Defaults, Image, ImageError, Layer};
pub use layer::{EntryError, LayerError, PathError};
pub use limits::Limits;
pub use platform::{Platform, PlatformError};
pub use progress::{Progress, Silent};
pub use reference::{Reference, ReferenceError};
pub use source::{Blob, ImageSource, SourceError, needed};
pub use store::{
    ImageSummary, ImportError, Incoming, PruneOptions, Pruned, Removed, RootfsLease, Store,
    StoreError, Usage,
};
pub use tarball::TarError;
pub use unpack::UnpackError;
