//! What becomes of a tree: numbers of inodes, sizes, and how many groups that takes.

use std::collections::HashMap;

use super::Ext2Error;
use super::format::*;
use crate::erofs::reader::{FileType, Inode, Reader};

/// Blocks that are left free, if there is room for them: 64 MiB.
const SPARE_BLOCKS: u64 = 16 << 10;
/// Inodes that are left free.
const SPARE_INODES: u64 = 1024;

/// Where what the checkers find without a name is put. They miss it if it is not there.
const LOST: &[u8] = b"lost+found";

/// An entry of a directory.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: Vec<u8>,
    pub(super) number: u32,
    /// `EXT2_FT_...`.
    pub(super) file_type: u8,
}

/// An inode to be written.
#[derive(Debug)]
pub(super) struct Node {
    /// The one in the image; `None` for [`LOST`].
    pub(super) inode: Option<Inode>,
    pub(super) links: u32,
    /// The directory's number that it is in, if it is one.
    pub(super) parent: u32,
    pub(super) entries: Vec<Entry>,
}

impl Node {
    pub(super) fn file_type(&self) -> FileType {
        self.inode.as_ref().map_or(FileType::Directory, |inode| inode.file_type)
    }

    /// Bytes of contents in blocks of their own.
    fn in_blocks(&self) -> u64 {
        let size = self.inode.as_ref().map_or(0, |inode| inode.size);
        match self.file_type() {
            FileType::Directory => directory_size(&self.entries) as u64,
            FileType::File => size,
            FileType::Symlink if size >= FAST_LINK as u64 => size,
            _ => 0,
        }
    }
}

/// All that is to be written, and where there is room for it.
#[derive(Debug)]
pub(super) struct Plan {
    /// In the order of their numbers: the root, then those from [`FIRST`] on.
    pub(super) nodes: Vec<Node>,
    pub(super) groups: u32,
    /// A multiple of [`BLOCK_INODES`].
    pub(super) group_inodes: u32,
}

/// The number of the node at `index`.
pub(super) fn number(index: usize) -> u32 {
    if index == 0 { ROOT } else { FIRST + index as u32 - 1 }
}

impl Plan {
    pub(super) fn new(image: &Reader, limit: u64) -> Result<Self, Ext2Error> {
        let nodes = walk(image)?;
        let too_large = Ext2Error::TooLarge { limit };
        let mut blocks = 0;
        for node in &nodes {
            let Some(own) = with_indirect(node.in_blocks().div_ceil(BLOCK as u64)) else {
                return Err(too_large);
            };
            blocks += own;
        }
        let inodes = nodes.len() as u64 + u64::from(FIRST);
        let most =
            u32::try_from(limit / (u64::from(GROUP_BLOCKS) * BLOCK as u64)).unwrap_or(u32::MAX);
        let mut plan = Self { nodes, groups: 0, group_inodes: 0 };
        while plan.groups < most {
            plan.groups += 1;
            let own = (inodes + SPARE_INODES).div_ceil(plan.groups.into());
            let Some(own) = u32::try_from(own).ok().filter(|own| *own <= GROUP_INODES_MAX) else {
                continue;
            };
            plan.group_inodes = own.next_multiple_of(BLOCK_INODES);
            let room: u64 = (0..plan.groups).map(|g| u64::from(plan.group_room(g))).sum();
            let enough = if plan.groups == most { blocks } else { blocks + SPARE_BLOCKS };
            if room >= enough {
                return Ok(plan);
            }
        }
        Err(too_large)
    }

    /// Bytes of the disk.
    pub(super) fn size(&self) -> u64 {
        u64::from(self.groups) * u64::from(GROUP_BLOCKS) * BLOCK as u64
    }

    /// Blocks of the descriptors of all groups.
    pub(super) fn descriptor_blocks(&self) -> u32 {
        (self.groups as usize * DESCRIPTOR).div_ceil(BLOCK) as u32
    }

    /// First block of a group, and how many there are of superblock and descriptors.
    pub(super) fn group_head(&self, group: u32) -> (u32, u32) {
        let head = if has_super(group) { 1 + self.descriptor_blocks() } else { 0 };
        (group * GROUP_BLOCKS, head)
    }

    /// Blocks at the beginning of a group that are not for contents.
    pub(super) fn group_overhead(&self, group: u32) -> u32 {
        self.group_head(group).1 + 2 + self.group_inodes / BLOCK_INODES
    }

    fn group_room(&self, group: u32) -> u32 {
        GROUP_BLOCKS.saturating_sub(self.group_overhead(group))
    }

    /// Where an inode is on the disk, in bytes.
    pub(super) fn inode_position(&self, number: u32) -> u64 {
        let (group, index) = ((number - 1) / self.group_inodes, (number - 1) % self.group_inodes);
        let (first, head) = self.group_head(group);
        u64::from(first + head + 2) * BLOCK as u64 + u64::from(index) * INODE as u64
    }
}

/// Blocks that `data` blocks of contents take with those that name them; `None` for more than there can be.
fn with_indirect(data: u64) -> Option<u64> {
    let pointers = POINTERS as u64;
    let once = data.saturating_sub(DIRECT as u64);
    let twice = once.saturating_sub(pointers);
    let double = if twice > 0 { 1 + twice.div_ceil(pointers) } else { 0 };
    (twice <= pointers * pointers).then(|| data + u64::from(once > 0) + double)
}

/// Finds all inodes, and numbers them.
fn walk(image: &Reader) -> Result<Vec<Node>, Ext2Error> {
    let node = |inode, parent| Node { inode, links: 0, parent, entries: Vec::new() };
    let root = image.root()?;
    let mut known = HashMap::from([(root.nid, 0)]);
    let mut nodes = vec![node(Some(root), ROOT)];
    nodes[0].links = 2;
    let mut open = vec![0];
    while let Some(at) = open.pop() {
        let Some(directory) = nodes[at].inode.clone() else { continue };
        for (name, nid) in image.entries(&directory)? {
            if matches!(name.as_slice(), b"." | b"..") {
                continue;
            }
            let child = match known.get(&nid) {
                Some(child) if nodes[*child].file_type() == FileType::Directory => {
                    return Err(Ext2Error::Tangled { nid });
                }
                Some(child) => *child,
                None => {
                    let child = nodes.len();
                    nodes.push(node(Some(image.inode(nid)?), number(at)));
                    known.insert(nid, child);
                    child
                }
            };
            nodes[child].links += 1;
            let file_type = nodes[child].file_type();
            if file_type == FileType::Directory {
                nodes[child].links += 1;
                nodes[at].links += 1;
                open.push(child);
            }
            nodes[at].entries.push(Entry {
                name,
                number: number(child),
                file_type: code(file_type),
            });
        }
    }
    if nodes[0].entries.iter().all(|entry| entry.name != LOST) {
        let lost = Entry {
            name: LOST.into(),
            number: number(nodes.len()),
            file_type: code(FileType::Directory),
        };
        nodes[0].entries.push(lost);
        nodes[0].links += 1;
        nodes.push(Node { links: 2, ..node(None, ROOT) });
    }
    let many = |node: &&Node| node.links > LINK_MAX;
    match nodes.iter().find(many) {
        Some(node) => {
            let nid = node.inode.as_ref().map_or(0, |inode| inode.nid);
            Err(Ext2Error::Links { nid, links: node.links })
        }
        None => Ok(nodes),
    }
}

/// `EXT2_FT_...`.
fn code(file_type: FileType) -> u8 {
    match file_type {
        FileType::File => 1,
        FileType::Directory => 2,
        FileType::Character(..) => 3,
        FileType::Block(..) => 4,
        FileType::Fifo => 5,
        FileType::Socket => 6,
        FileType::Symlink => 7,
    }
}

/// Bytes of an entry: its head, its name, and what makes them a multiple of four.
fn entry_size(name: &[u8]) -> usize {
    (8 + name.len()).next_multiple_of(4)
}

/// Bytes of a directory, whole blocks.
fn directory_size(entries: &[Entry]) -> usize {
    let (mut blocks, mut used) = (1, entry_size(b".") + entry_size(b".."));
    for entry in entries {
        let size = entry_size(&entry.name);
        if used + size > BLOCK {
            (blocks, used) = (blocks + 1, 0);
        }
        used += size;
    }
    blocks * BLOCK
}

/// The blocks of a directory. The last entry in each goes to its end.
pub(super) fn directory(node: &Node, own: u32) -> Vec<u8> {
    let directory = code(FileType::Directory);
    let fixed: [(&[u8], u32, u8); 2] = [(b".", own, directory), (b"..", node.parent, directory)];
    let named = node.entries.iter().map(|e| (e.name.as_slice(), e.number, e.file_type));
    let mut bytes = vec![0; BLOCK];
    let (mut at, mut last) = (0, 0);
    for (name, number, file_type) in fixed.into_iter().chain(named) {
        let size = entry_size(name);
        let end = bytes.len();
        if at + size > end {
            put16(&mut bytes, last + 4, (end - last) as u16);
            bytes.resize(end + BLOCK, 0);
            at = end;
        }
        put32(&mut bytes, at, number);
        put16(&mut bytes, at + 4, size as u16);
        bytes[at + 6] = name.len() as u8;
        bytes[at + 7] = file_type;
        bytes[at + 8..at + 8 + name.len()].copy_from_slice(name);
        last = at;
        at += size;
    }
    let end = bytes.len();
    put16(&mut bytes, last + 4, (end - last) as u16);
    bytes
}
