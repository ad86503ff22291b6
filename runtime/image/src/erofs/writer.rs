//! Writes an image: contents while they are read, then the tree around them.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;

use sha2::{Digest as _, Sha256};
use thiserror::Error;

use super::crc32c::crc32c;
use super::directory::{self, Target};
use super::format::*;
use super::layout::{Layout, Place, fits_inline};
use super::xattr::{self, XattrError};
use crate::tree::{Kind, Meta, NodeId, Tree};

/// Contents are read and written in pieces of this size, a multiple of [`BLOCK`].
const PIECE: usize = 256 << 10;

/// Why an image could not be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// 2^32 blocks.
    #[error("the image would have more than 16 TiB, which EROFS cannot address")]
    TooLarge,
    /// Attributes that EROFS has no room for.
    #[error(transparent)]
    Xattr(#[from] XattrError),
    /// What the contents are read from failed.
    #[error(transparent)]
    Read(io::Error),
    /// The image could not be written.
    #[error(transparent)]
    Write(io::Error),
}

/// Where the contents of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Content {
    /// Bytes of the file.
    pub(crate) size: u64,
    /// First block of those that are in the contents area.
    block: u32,
    /// Position of the tail in the spool, if there is one.
    tail: Option<u64>,
}

impl Content {
    pub(super) fn is_inline(&self) -> bool {
        self.tail.is_some()
    }

    fn blocks(&self) -> u64 {
        match self.tail {
            Some(_) => self.size / BLOCK as u64,
            None => self.size.div_ceil(BLOCK as u64),
        }
    }
}

/// An image that is being written to a file.
#[derive(Debug)]
pub(crate) struct ImageWriter {
    image: File,
    spool: BufWriter<File>,
    spool_size: u64,
    next_block: u32,
    buffer: Vec<u8>,
}

/// What became of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    /// Bytes of the image file.
    pub(crate) size: u64,
    /// Inodes in it.
    pub(crate) inodes: u64,
}

impl ImageWriter {
    /// Writes to `image`, which is empty; `spool` is an empty temporary file.
    pub(crate) fn new(image: File, spool: File) -> Self {
        Self {
            image,
            spool: BufWriter::new(spool),
            spool_size: 0,
            // Block 0 holds the superblock.
            next_block: 1,
            buffer: Vec::new(),
        }
    }

    /// Adds the contents of a file with metadata `meta`: the next `size` bytes of `input`.
    ///
    /// Blocks of zeros become holes of the image file.
    pub(crate) fn append(
        &mut self,
        input: &mut dyn Read,
        size: u64,
        meta: &Meta,
    ) -> Result<Content, WriteError> {
        let head = INODE + xattr::encode(&meta.xattrs)?.len();
        let tail = (size % BLOCK as u64) as usize;
        let inline = fits_inline(head, tail);
        let first = self.next_block;
        let blocks = if inline { size / BLOCK as u64 } else { size.div_ceil(BLOCK as u64) };
        let end = u32::try_from(u64::from(first) + blocks).map_err(|_| WriteError::TooLarge)?;

        let in_blocks = if inline { size - tail as u64 } else { size };
        self.copy_blocks(input, u64::from(first) * BLOCK as u64, in_blocks)?;
        self.next_block = end;
        let mut content = Content { size, block: if blocks == 0 { 0 } else { first }, tail: None };
        if inline {
            let mut bytes = [0; BLOCK];
            let bytes = &mut bytes[..tail];
            input.read_exact(bytes).map_err(WriteError::Read)?;
            self.spool.write_all(bytes).map_err(WriteError::Write)?;
            content.tail = Some(self.spool_size);
            self.spool_size += tail as u64;
        }
        Ok(content)
    }

    /// Copies `size` bytes of `input` to `offset` of the image, skipping blocks of zeros.
    fn copy_blocks(
        &mut self,
        input: &mut dyn Read,
        mut offset: u64,
        size: u64,
    ) -> Result<(), WriteError> {
        let mut left = size;
        while left > 0 {
            let piece = left.min(PIECE as u64) as usize;
            if self.buffer.len() < piece {
                self.buffer.resize(piece, 0);
            }
            let bytes = &mut self.buffer[..piece];
            input.read_exact(bytes).map_err(WriteError::Read)?;
            for (start, run) in data_runs(bytes) {
                self.image.write_all_at(run, offset + start as u64).map_err(WriteError::Write)?;
            }
            offset += piece as u64;
            left -= piece as u64;
        }
        Ok(())
    }

    /// Writes `tree` around the contents and returns the finished file.
    ///
    /// The volume's UUID is derived from `seed` and the metadata: the same seed and tree give the
    /// same image.
    pub(crate) fn finish(
        mut self,
        tree: &Tree,
        seed: &[u8],
    ) -> Result<(File, Written), WriteError> {
        let layout = Layout::new(tree, self.next_block)?;
        self.spool.flush().map_err(WriteError::Write)?;
        self.discard_unreferenced(tree, &layout)?;

        let mut hasher = Sha256::new_with_prefix(seed);
        let mut meta = MetaWriter::new(&self.image, layout.meta_block, &mut hasher);
        for (number, place) in layout.places.iter().enumerate() {
            let data = match &tree.node(place.node).kind {
                Kind::Directory(_) => encode_directory(tree, &layout, place.node),
                Kind::Symlink(target) => target.to_vec(),
                Kind::File(content) => self.read_tail(content)?,
                _ => Vec::new(),
            };
            // What the layout gave blocks of their own (directories, links).
            let whole = data.len() - place.tail();
            if whole > 0 {
                self.image
                    .write_all_at(&data[..whole], u64::from(place.block) * BLOCK as u64)
                    .map_err(WriteError::Write)?;
            }
            meta.put(place.offset, &inode(tree, place, number as u32 + 1))?;
            meta.put(place.offset + INODE as u64, &place.xattrs)?;
            meta.put(place.offset + (INODE + place.xattrs.len()) as u64, &data[whole..])?;
        }
        meta.finish()?;

        let size = u64::from(layout.blocks()) * BLOCK as u64;
        self.image.set_len(size).map_err(WriteError::Write)?;
        let inodes = layout.places.len() as u64;
        let uuid = uuid(&hasher.finalize());
        let block = superblock(&layout, layout.place(Tree::ROOT).nid(), inodes, uuid);
        self.image.write_all_at(&block, 0).map_err(WriteError::Write)?;
        Ok((self.image, Written { size, inodes }))
    }

    fn read_tail(&self, content: &Content) -> Result<Vec<u8>, WriteError> {
        let Some(position) = content.tail else { return Ok(Vec::new()) };
        let mut bytes = vec![0; (content.size % BLOCK as u64) as usize];
        self.spool.get_ref().read_exact_at(&mut bytes, position).map_err(WriteError::Write)?;
        Ok(bytes)
    }

    /// Gives the blocks of files that later layers removed or replaced back to the host.
    fn discard_unreferenced(&self, tree: &Tree, layout: &Layout) -> Result<(), WriteError> {
        for id in tree.ids().filter(|id| layout.index[id.index()] == u32::MAX) {
            let Kind::File(content) = &tree.node(id).kind else { continue };
            if content.blocks() > 0 {
                punch(
                    &self.image,
                    u64::from(content.block) * BLOCK as u64,
                    content.blocks() * BLOCK as u64,
                )
                .map_err(WriteError::Write)?;
            }
        }
        Ok(())
    }
}

/// Makes a range read as zeros, freeing its space where the host's file system can.
fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    // Blocks of zeros at the end of the contents were never written: the range may lie behind the
    // end of the file, where there is nothing to do.
    let length = length.min(file.metadata()?.len().saturating_sub(offset));
    if length == 0 {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, offset, length) {
        Err(rustix::io::Errno::OPNOTSUPP) => {
            let zeros = vec![0; PIECE];
            let mut at = offset;
            while at < offset + length {
                let piece = (offset + length - at).min(PIECE as u64);
                file.write_all_at(&zeros[..piece as usize], at)?;
                at += piece;
            }
            Ok(())
        }
        other => Ok(other?),
    }
}

/// The runs of blocks in `bytes` that are not zero, with their offsets.
fn data_runs(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    // A comparison of slices is one call of memcmp.
    let is_zero = |block: &[u8]| *block == [0; BLOCK][..block.len()];
    let mut at = 0;
    std::iter::from_fn(move || {
        let skipped = bytes[at..].chunks(BLOCK).take_while(|block| is_zero(block)).count();
        let start = (at + skipped * BLOCK).min(bytes.len());
        let blocks = bytes[start..].chunks(BLOCK).take_while(|block| !is_zero(block)).count();
        let end = (start + blocks * BLOCK).min(bytes.len());
        at = end;
        (start < end).then(|| (start, &bytes[start..end]))
    })
}

/// Writes the metadata area from front to back, padding gaps with zeros.
struct MetaWriter<'a> {
    image: &'a File,
    hasher: &'a mut Sha256,
    buffer: Vec<u8>,
    /// Where in the image the buffer begins.
    base: u64,
    /// Offset in the metadata area where the buffer ends.
    end: u64,
}

impl<'a> MetaWriter<'a> {
    fn new(image: &'a File, block: u32, hasher: &'a mut Sha256) -> Self {
        let base = u64::from(block) * BLOCK as u64;
        Self { image, hasher, buffer: Vec::with_capacity(2 * PIECE), base, end: 0 }
    }

    /// Puts `bytes` at `offset` of the area, at or behind the end of what was put before.
    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let gap = (offset - self.end) as usize;
        self.buffer.resize(self.buffer.len() + gap, 0);
        self.buffer.extend(bytes);
        self.end = offset + bytes.len() as u64;
        if self.buffer.len() >= PIECE { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), WriteError> {
        self.hasher.update(&self.buffer);
        self.image.write_all_at(&self.buffer, self.base).map_err(WriteError::Write)?;
        self.base += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<(), WriteError> {
        self.flush()
    }
}

/// `struct erofs_inode_extended`.
fn inode(tree: &Tree, place: &Place, number: u32) -> [u8; INODE] {
    let node = tree.node(place.node);
    let (file_type, payload) = match &node.kind {
        Kind::File(content) => (mode::FILE, content.block),
        Kind::Directory(_) => (mode::DIRECTORY, place.block),
        Kind::Symlink(_) => (mode::SYMLINK, place.block),
        Kind::Character(device) => (mode::CHARACTER, encode_device(device.major, device.minor)),
        Kind::Block(device) => (mode::BLOCK, encode_device(device.major, device.minor)),
        Kind::Fifo => (mode::FIFO, 0),
        Kind::Socket => (mode::SOCKET, 0),
    };
    let layout = if place.inline { FLAT_INLINE } else { FLAT_PLAIN };
    let meta = &node.meta;
    let mut out = Fields::<INODE>::new();
    out.put(0, (INODE_EXTENDED | layout << 1).to_le_bytes());
    // The layout has checked that the attributes are few enough.
    out.put(2, xattr::count(place.xattrs.len()).unwrap_or(0).to_le_bytes());
    out.put(4, (file_type | meta.mode).to_le_bytes());
    out.put(8, place.size.to_le_bytes());
    out.put(16, payload.to_le_bytes());
    out.put(20, number.to_le_bytes());
    out.put(24, meta.uid.to_le_bytes());
    out.put(28, meta.gid.to_le_bytes());
    out.put(32, meta.mtime.seconds.to_le_bytes());
    out.put(40, meta.mtime.nanos.to_le_bytes());
    out.put(44, place.links.to_le_bytes());
    out.0
}

fn encode_directory(tree: &Tree, layout: &Layout, node: NodeId) -> Vec<u8> {
    let target = |node: NodeId| Target {
        nid: layout.place(node).nid(),
        file_type: dirent_type(type_bits(&tree.node(node).kind)),
    };
    let children = tree.children(node).into_iter().flatten();
    directory::encode(&directory::sorted(
        children.map(|(name, child)| (&name[..], target(child.node))),
        target(node),
        target(layout.parents[node.index()]),
    ))
}

fn type_bits(kind: &Kind) -> u16 {
    match kind {
        Kind::File(_) => mode::FILE,
        Kind::Directory(_) => mode::DIRECTORY,
        Kind::Symlink(_) => mode::SYMLINK,
        Kind::Character(_) => mode::CHARACTER,
        Kind::Block(_) => mode::BLOCK,
        Kind::Fifo => mode::FIFO,
        Kind::Socket => mode::SOCKET,
    }
}

/// The block with `struct erofs_super_block`.
fn superblock(layout: &Layout, root: u64, inodes: u64, uuid: [u8; 16]) -> [u8; BLOCK] {
    let mut out = Fields::<SUPER_SIZE>::new();
    out.put(0, SUPER_MAGIC.to_le_bytes());
    out.put(8, (COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
    out.put(12, [BLOCK_BITS]);
    // The root is placed first, so its number is small.
    out.put(14, (root as u16).to_le_bytes());
    out.put(16, inodes.to_le_bytes());
    out.put(36, layout.blocks().to_le_bytes());
    out.put(40, layout.meta_block.to_le_bytes());
    out.put(48, uuid);
    let mut block = [0; BLOCK];
    block[SUPER_OFFSET..][..SUPER_SIZE].copy_from_slice(&out.0);
    let checksum = crc32c(!0, &block[SUPER_OFFSET..]);
    block[SUPER_OFFSET + 4..][..4].copy_from_slice(&checksum.to_le_bytes());
    block
}

/// The first 16 bytes of a hash, marked as a UUID of version 8 (RFC 9562: vendor specific).
fn uuid(hash: &[u8]) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hash[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// A structure that is filled in by offset.
struct Fields<const N: usize>([u8; N]);

impl<const N: usize> Fields<N> {
    fn new() -> Self {
        Self([0; N])
    }

    fn put<const M: usize>(&mut self, offset: usize, bytes: [u8; M]) {
        self.0[offset..offset + M].copy_from_slice(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_runs_skip_blocks_of_zeros() {
        let mut bytes = vec![0; 5 * BLOCK + 10];
        bytes[BLOCK + 5] = 1;
        bytes[2 * BLOCK] = 1;
        *bytes.last_mut().unwrap() = 1;
        let runs: Vec<_> = data_runs(&bytes).map(|(at, run)| (at, run.len())).collect();
        assert_eq!(runs, [(BLOCK, 2 * BLOCK), (5 * BLOCK, 10)]);
        assert_eq!(data_runs(&[0; 3 * BLOCK]).count(), 0);
        assert_eq!(data_runs(&[]).count(), 0);
    }
}
