//! ext2, written from an image's root file system: a disk for guests that mount one themselves.
//!
//! Many small kernels know ext2 and little else, and every Linux that knows ext4 mounts it. What a container's guest gets, the
//! EROFS image, is read-only, and unknown to most of them.
//!
//! The subset: 4 KiB blocks, inodes of 128 bytes, types in directories, few copies of the superblock; neither journal nor
//! indexed directories. Owners, modes, times in whole seconds, devices and hard links are those of the image; extended
//! attributes are left out. There is room for more files and contents: whoever mounts it may write.
//!
//! All groups are whole, and what is used in each is at its beginning:
//!
//! ```text
//! superblock, descriptors of the groups (in few groups), two bitmaps, inodes, contents
//! ```

mod format;
mod plan;
mod writer;

use std::fs::File;
use std::io;

use thiserror::Error;

use crate::erofs::reader::{ReadError, Reader};
use plan::Plan;

/// Why there is no such disk.
#[derive(Debug, Error)]
pub enum Ext2Error {
    /// Too much is in the image.
    #[error("a disk of its files would have more than {limit} bytes, which is the limit")]
    TooLarge {
        /// Bytes.
        limit: u64,
    },
    /// More than an inode can count.
    #[error("inode {nid} has {links} names or directories in it; ext2 takes 32000")]
    Links {
        /// The inode in the image.
        nid: u64,
        /// How many.
        links: u32,
    },
    /// A directory that is in two places.
    #[error("the image is damaged: directory {nid} is in more than one place")]
    Tangled {
        /// The inode in the image.
        nid: u64,
    },
    /// The image cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A file's contents cannot be read.
    #[error("the image cannot be read: {0}")]
    Contents(io::Error),
    /// The disk cannot be written.
    #[error("the disk cannot be written: {0}")]
    Write(io::Error),
}

/// Writes all that is in `image` to `disk`, an empty file, of which blocks of zeros stay holes. Returns its size in bytes.
///
/// # Errors
/// See [`Ext2Error`]; `disk` is of no use then.
pub fn write_ext2(image: &Reader, disk: &File, limit: u64) -> Result<u64, Ext2Error> {
    let plan = Plan::new(image, limit)?;
    writer::write(image, &plan, disk)?;
    Ok(plan.size())
}

#[cfg(test)]
mod tests;
