//! Where each inode of a tree goes, decided before anything of the metadata is written: directory
//! entries carry inode numbers, and inode numbers are positions.

use super::directory;
use super::format::{BLOCK, INODE, SLOT};
use super::writer::WriteError;
use super::xattr;
use crate::tree::{Kind, NodeId, Tree};

/// The place of one inode.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) node: NodeId,
    /// Byte offset in the metadata area, a multiple of [`SLOT`].
    pub(super) offset: u64,
    /// Bytes of the data (directory, link target or file).
    pub(super) size: u64,
    /// The last partial block follows the inode.
    pub(super) inline: bool,
    /// First block of the data that is not inline, if the layout gave it one (directories, links).
    pub(super) block: u32,
    /// Encoded extended attributes.
    pub(super) xattrs: Vec<u8>,
    pub(super) links: u32,
}

impl Place {
    pub(super) fn nid(&self) -> u64 {
        self.offset / SLOT as u64
    }

    /// Bytes that follow the inode and its attributes.
    pub(super) fn tail(&self) -> usize {
        if self.inline { (self.size % BLOCK as u64) as usize } else { 0 }
    }
}

/// The places of all inodes.
#[derive(Debug)]
pub(super) struct Layout {
    /// In the order in which they are written.
    pub(super) places: Vec<Place>,
    /// Index in `places` by node; `u32::MAX` for nodes that nothing refers to.
    pub(super) index: Vec<u32>,
    /// Parent directory by node.
    pub(super) parents: Vec<NodeId>,
    /// First block of the metadata area.
    pub(super) meta_block: u32,
    /// Bytes of the metadata area.
    pub(super) meta_size: u64,
}

/// The metadata area begins with a free slot pair, so that no inode has number 0: to many programs
/// a directory entry with inode number 0 is a deleted one.
const FIRST_OFFSET: u64 = 2 * SLOT as u64;

impl Layout {
    pub(super) fn place(&self, node: NodeId) -> &Place {
        &self.places[self.index[node.index()] as usize]
    }

    /// Lays out what is reachable in `tree`; `next_block` is the first one that is free.
    pub(super) fn new(tree: &Tree, mut next_block: u32) -> Result<Self, WriteError> {
        let (order, links, parents) = survey(tree);
        let mut index = vec![u32::MAX; tree.len()];
        let mut places = Vec::with_capacity(order.len());
        let mut offset = FIRST_OFFSET;
        for node in order {
            let content = tree.node(node);
            let xattrs = xattr::encode(&content.meta.xattrs)?;
            let head = INODE + xattrs.len();
            let size = match &content.kind {
                Kind::File(content) => content.size,
                Kind::Symlink(target) => target.len() as u64,
                Kind::Directory(children) => directory::size(
                    directory::sorted(children.keys().map(|name| (&name[..], ())), (), ())
                        .iter()
                        .map(|(name, ())| name.len()),
                ),
                _ => 0,
            };
            let tail = (size % BLOCK as u64) as usize;
            let inline = match &content.kind {
                Kind::File(content) => content.is_inline(),
                Kind::Directory(_) | Kind::Symlink(_) => fits_inline(head, tail),
                _ => false,
            };
            let mut block = 0;
            if matches!(content.kind, Kind::Directory(_) | Kind::Symlink(_)) {
                let blocks = if inline { size / BLOCK as u64 } else { size.div_ceil(BLOCK as u64) };
                block = next_block;
                next_block = advance(next_block, blocks)?;
            }
            offset = position(offset, head, if inline { tail } else { 0 });
            index[node.index()] = places.len() as u32;
            let links = links[node.index()];
            let place = Place { node, offset, size, inline, block, xattrs, links };
            offset += (head + place.tail()) as u64;
            places.push(place);
        }
        let meta_blocks = offset.div_ceil(BLOCK as u64);
        advance(next_block, meta_blocks)?;
        Ok(Self {
            places,
            index,
            parents,
            meta_block: next_block,
            meta_size: meta_blocks * BLOCK as u64,
        })
    }

    /// Blocks of the whole image.
    pub(super) fn blocks(&self) -> u32 {
        self.meta_block + (self.meta_size / BLOCK as u64) as u32
    }
}

/// True if `tail` bytes of data can follow an inode of `head` bytes within one block.
pub(super) fn fits_inline(head: usize, tail: usize) -> bool {
    tail > 0 && head % BLOCK + tail <= BLOCK
}

/// The first offset from `offset` on where an inode does not cross a block boundary itself and its
/// tail does not either (the kernel refuses inline data that does).
fn position(offset: u64, head: usize, tail: usize) -> u64 {
    let offset = offset.next_multiple_of(SLOT as u64);
    let within = (offset % BLOCK as u64) as usize;
    let tail_within = (within + head) % BLOCK;
    let crosses = within + INODE > BLOCK || (tail > 0 && tail_within + tail > BLOCK);
    if crosses { offset.next_multiple_of(BLOCK as u64) } else { offset }
}

fn advance(block: u32, blocks: u64) -> Result<u32, WriteError> {
    u32::try_from(u64::from(block) + blocks).map_err(|_| WriteError::TooLarge)
}

/// The reachable nodes with the root first and the inodes of one directory side by side, their
/// link counts, and the parents of directories.
fn survey(tree: &Tree) -> (Vec<NodeId>, Vec<u32>, Vec<NodeId>) {
    let mut links = vec![0u32; tree.len()];
    let mut parents = vec![Tree::ROOT; tree.len()];
    let mut order = vec![Tree::ROOT];
    let mut open = vec![Tree::ROOT];
    links[Tree::ROOT.index()] = 2;
    while let Some(directory) = open.pop() {
        let first = open.len();
        for child in tree.children(directory).into_iter().flatten().map(|(_, child)| child.node) {
            let seen = &mut links[child.index()];
            if *seen == 0 {
                order.push(child);
            }
            if tree.children(child).is_some() {
                *seen = 2;
                links[directory.index()] += 1;
                parents[child.index()] = directory;
                open.push(child);
            } else {
                *seen += 1;
            }
        }
        open[first..].reverse();
    }
    (order, links, parents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_never_lets_inode_or_tail_cross_a_block() {
        for offset in (0..2 * BLOCK as u64).step_by(SLOT) {
            for head in [64, 76, 76 + 4000, 64 + 9000] {
                for tail in [0, 1, 500, 4000, 4032, 4095] {
                    if tail > 0 && !fits_inline(head, tail) {
                        continue;
                    }
                    let at = position(offset, head, tail) as usize;
                    assert!(at as u64 >= offset && at.is_multiple_of(SLOT));
                    assert!(at % BLOCK + INODE <= BLOCK);
                    assert!(
                        tail == 0 || (at + head) % BLOCK + tail <= BLOCK,
                        "{offset} {head} {tail}"
                    );
                }
            }
        }
    }
}
