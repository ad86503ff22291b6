//! EROFS, the read-only file system of Linux, written and read without privileges.
//!
//! The subset: uncompressed, 4 KiB blocks, extended inodes (64 bytes: 32-bit owners, 64-bit sizes,
//! times in nanoseconds), flat-plain and flat-inline data, inline extended attributes. Linux reads
//! all of it since 5.4. Nothing here compresses: the image lies in the host's page cache, shared
//! by all sandboxes, and reading it costs the guest no decompression.
//!
//! An image is laid out as
//!
//! ```text
//! block 0        superblock at byte 1024
//! block 1..      whole blocks of file contents, in the order in which they were added
//! ...            whole blocks of directories and long symbolic links
//! meta_blkaddr   inodes, each followed by its extended attributes and the tail of its data
//! ```
//!
//! Contents come first so that layers are streamed into the image once, without a copy elsewhere;
//! only tails (less than a block each) wait in a spool for the inode they are placed behind.
//!
//! The names and layouts are those of the kernel's `fs/erofs/erofs_fs.h`, the prose is in
//! `Documentation/filesystems/erofs.rst`.

mod crc32c;
mod directory;
mod format;
mod layout;
pub mod reader;
mod writer;
mod xattr;

pub(crate) use format::{DEVICE_MAJOR_MAX, DEVICE_MINOR_MAX, NAME_MAX, SYMLINK_MAX};
pub use writer::WriteError;
pub(crate) use writer::{Content, ImageWriter};
pub use xattr::XattrError;
pub(crate) use xattr::{check as check_xattrs, is_storable};
