//! Layers to root file system.

use std::fs::File;
use std::io::{self, Read};

use thiserror::Error;

use crate::compress::decoder;
use crate::digest::{Digest, Hashing};
use crate::erofs::{ImageWriter, WriteError};
use crate::layer::{EntryError, LayerError, Unpacker};
use crate::limits::Limits;
use crate::progress::{Progress, Watched};
use crate::store::is_full;
use crate::tarball::TarError;

/// Why layers could not be unpacked.
#[derive(Debug, Error)]
pub enum UnpackError {
    /// The disk is full.
    #[error(
        "no space left for the root file system: free some (`mvm image prune` removes what no \
         image needs)"
    )]
    NoSpace,
    /// A layer cannot be read or decompressed.
    #[error("layer {number} of {count} ({digest}) cannot be decompressed: {error}")]
    Decompress {
        /// Number of the layer, from 1.
        number: usize,
        /// Layers of the image.
        count: usize,
        /// Digest of the layer.
        digest: Digest,
        /// What is wrong.
        error: io::Error,
    },
    /// An entry of a layer is refused.
    #[error("layer {number} of {count} ({digest}): {error}")]
    Layer {
        /// Number of the layer, from 1.
        number: usize,
        /// Layers of the image.
        count: usize,
        /// Digest of the layer.
        digest: Digest,
        /// The entry and what is wrong with it.
        error: Box<LayerError>,
    },
    /// A layer's contents are not those that the configuration lists.
    #[error(
        "layer {number} of {count} ({digest}) is not the one that the image's configuration lists: \
         its contents have digest {found} instead of {expected}"
    )]
    DiffId {
        /// Number of the layer, from 1.
        number: usize,
        /// Layers of the image.
        count: usize,
        /// Digest of the layer.
        digest: Digest,
        /// Digest of its contents.
        found: Digest,
        /// What the configuration says.
        expected: Digest,
    },
    /// The image could not be written.
    #[error("the root file system could not be written: {0}")]
    Write(WriteError),
}

/// A layer to unpack.
pub(crate) struct Input<R> {
    /// The layer as it is stored.
    pub(crate) reader: R,
    pub(crate) size: u64,
    pub(crate) digest: Digest,
    pub(crate) diff_id: Digest,
}

/// Unpacks `layers`, lowest first, into `image`, an empty file. `spool` is another empty one.
pub(crate) fn unpack<R: Read>(
    layers: impl ExactSizeIterator<Item = io::Result<Input<R>>>,
    image: File,
    spool: File,
    seed: &Digest,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<(), UnpackError> {
    let count = layers.len();
    let mut left = limits.stream_bytes();
    let mut unpacker = Unpacker::new(ImageWriter::new(image, spool), limits);
    for (number, layer) in (1..).zip(layers) {
        let Input { reader, size, digest, diff_id } = layer.map_err(WriteError::Read)?;
        let unreadable = |error| UnpackError::Decompress { number, count, digest, error };
        progress.begin(&format!("unpack layer {number}/{count}"), Some(size));
        let watched = Watched { inner: reader, progress };
        let mut contents = Hashing::new(Bounded {
            inner: decoder(watched).map_err(unreadable)?,
            left,
            limit: limits.stream_bytes(),
        });
        unpacker.apply(&mut contents).map_err(|error| match error.error {
            EntryError::Write(WriteError::Write(e)) if is_full(&e) => UnpackError::NoSpace,
            // The stream below the archive: a damaged layer, not a hostile one.
            EntryError::Write(WriteError::Read(e)) => unreadable(e),
            EntryError::Tar(TarError::Io(e)) => unreadable(e),
            _ => UnpackError::Layer { number, count, digest, error: Box::new(error) },
        })?;
        left -= contents.count();
        let found = contents.finish();
        if found != diff_id {
            return Err(UnpackError::DiffId { number, count, digest, found, expected: diff_id });
        }
        progress.end();
    }
    let (tree, image) = unpacker.finish();
    image.finish(&tree, seed.bytes())?;
    Ok(())
}

/// Fails behind `left` bytes: whatever they are, no image needs that many.
struct Bounded<R> {
    inner: R,
    left: u64,
    limit: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        match self.left.checked_sub(n as u64) {
            Some(left) => self.left = left,
            None => {
                let limit = self.limit;
                return Err(io::Error::other(format!(
                    "the layers together decompress to more than {limit} bytes"
                )));
            }
        }
        Ok(n)
    }
}

impl From<WriteError> for UnpackError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Write(e) if is_full(&e) => Self::NoSpace,
            error => Self::Write(error),
        }
    }
}
