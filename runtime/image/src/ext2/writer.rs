//! Writes the planned disk: contents and inodes first, then what counts them.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

use super::Ext2Error;
use super::format::*;
use super::plan::{Node, Plan, directory, number};
use crate::erofs::reader::{FileType, Reader};

/// Blocks read at a time.
const PIECE: usize = 64;

struct Writer<'a> {
    image: &'a Reader,
    plan: &'a Plan,
    disk: &'a File,
    /// The group that blocks are taken of, and how many of its blocks are used.
    group: u32,
    used: u32,
}

/// Writes `plan`, which was made of `image`, to `disk`.
pub(super) fn write(image: &Reader, plan: &Plan, disk: &File) -> Result<(), Ext2Error> {
    disk.set_len(plan.size()).map_err(Ext2Error::Write)?;
    let mut writer = Writer { image, plan, disk, group: 0, used: plan.group_overhead(0) };
    let mut large = false;
    for (index, node) in plan.nodes.iter().enumerate() {
        let own = number(index);
        let inode = writer.node(node, own)?;
        writer.put(plan.inode_position(own), &inode)?;
        large |= node.inode.as_ref().is_some_and(|inode| inode.size >= LARGE_FILE);
    }
    writer.finish(large)
}

impl Writer<'_> {
    fn put(&self, at: u64, bytes: &[u8]) -> Result<(), Ext2Error> {
        self.disk.write_all_at(bytes, at).map_err(Ext2Error::Write)
    }

    fn put_block(&self, block: u32, bytes: &[u8]) -> Result<(), Ext2Error> {
        self.put(u64::from(block) * BLOCK as u64, bytes)
    }

    /// The next free block.
    fn allocate(&mut self) -> Result<u32, Ext2Error> {
        while self.used >= GROUP_BLOCKS {
            self.group += 1;
            self.used = self.plan.group_overhead(self.group);
        }
        if self.group >= self.plan.groups {
            // The plan has counted them.
            return Err(Ext2Error::TooLarge { limit: self.plan.size() });
        }
        self.used += 1;
        Ok(self.group * GROUP_BLOCKS + self.used - 1)
    }

    /// Writes the contents of a node, and returns its inode.
    fn node(&mut self, node: &Node, own: u32) -> Result<[u8; INODE], Ext2Error> {
        let mut raw = [0; INODE];
        let (kind, mut size, mut blocks) = match (node.file_type(), &node.inode) {
            (FileType::Directory, _) => {
                let bytes = directory(node, own);
                let blocks = self.contents(&mut bytes.as_slice(), bytes.len() as u64)?;
                (0o040_000, bytes.len() as u64, blocks)
            }
            (FileType::File, Some(inode)) => {
                let blocks = self.contents(&mut self.image.data(inode)?, inode.size)?;
                (0o100_000, inode.size, blocks)
            }
            (FileType::Symlink, Some(inode)) => {
                let target = self.image.target(inode)?;
                let mut blocks = Vec::new();
                match target.len() < FAST_LINK {
                    true => raw[40..40 + target.len()].copy_from_slice(&target),
                    false => blocks = self.contents(&mut target.as_slice(), target.len() as u64)?,
                }
                (0o120_000, target.len() as u64, blocks)
            }
            (FileType::Character(major, minor), _) => {
                put_device(&mut raw, major, minor);
                (0o020_000, 0, Vec::new())
            }
            (FileType::Block(major, minor), _) => {
                put_device(&mut raw, major, minor);
                (0o060_000, 0, Vec::new())
            }
            (FileType::Fifo, _) => (0o010_000, 0, Vec::new()),
            (FileType::Socket, _) | (_, None) => (0o140_000, 0, Vec::new()),
        };
        let (mode, uid, gid, time) = match &node.inode {
            Some(inode) => (inode.mode, inode.uid, inode.gid, inode.mtime.0),
            None => (0o700, 0, 0, 0),
        };
        let time = u32::try_from(time.max(0)).unwrap_or(u32::MAX);
        put16(&mut raw, 0, kind | mode & 0o7777);
        put16(&mut raw, 2, uid as u16);
        for at in [8, 12, 16] {
            put32(&mut raw, at, time);
        }
        put16(&mut raw, 24, gid as u16);
        put16(&mut raw, 26, node.links as u16);
        put16(&mut raw, 120, (uid >> 16) as u16);
        put16(&mut raw, 122, (gid >> 16) as u16);
        if !blocks.is_empty() {
            let taken = self.name_blocks(&mut raw, &mut blocks)?;
            // In sectors.
            put32(&mut raw, 28, taken * (BLOCK as u32 / 512));
        }
        put32(&mut raw, 4, size as u32);
        size >>= 32;
        // `i_size_high` of files.
        put32(&mut raw, 108, size as u32);
        Ok(raw)
    }

    /// Copies `size` bytes to blocks of the disk, of which those of zeros stay holes of the file.
    fn contents(&mut self, input: &mut dyn Read, size: u64) -> Result<Vec<u32>, Ext2Error> {
        let mut blocks = Vec::new();
        let mut buffer = vec![0; PIECE * BLOCK];
        let mut left = size;
        while left > 0 {
            let piece = left.min(buffer.len() as u64) as usize;
            input.read_exact(&mut buffer[..piece]).map_err(Ext2Error::Contents)?;
            buffer[piece..].fill(0);
            for bytes in buffer[..piece.next_multiple_of(BLOCK)].chunks(BLOCK) {
                let block = self.allocate()?;
                if bytes.iter().any(|byte| *byte != 0) {
                    self.put_block(block, bytes)?;
                }
                blocks.push(block);
            }
            left -= piece as u64;
        }
        Ok(blocks)
    }

    /// Puts the numbers of blocks into an inode, and those for which it has no room into blocks of their own. Returns how
    /// many there are with these.
    fn name_blocks(&mut self, raw: &mut [u8; INODE], blocks: &mut [u32]) -> Result<u32, Ext2Error> {
        let mut taken = blocks.len() as u32;
        let (direct, rest) = blocks.split_at(blocks.len().min(DIRECT));
        for (index, block) in direct.iter().enumerate() {
            put32(raw, 40 + 4 * index, *block);
        }
        let (once, twice) = rest.split_at(rest.len().min(POINTERS));
        if !once.is_empty() {
            put32(raw, 40 + 4 * DIRECT, self.pointers(once)?);
            taken += 1;
        }
        if !twice.is_empty() {
            let middle = twice.chunks(POINTERS).map(|chunk| self.pointers(chunk));
            let middle = middle.collect::<Result<Vec<_>, _>>()?;
            put32(raw, 44 + 4 * DIRECT, self.pointers(&middle)?);
            taken += 1 + middle.len() as u32;
        }
        Ok(taken)
    }

    /// A block with numbers of blocks.
    fn pointers(&mut self, blocks: &[u32]) -> Result<u32, Ext2Error> {
        let mut bytes = [0; BLOCK];
        for (index, block) in blocks.iter().enumerate() {
            put32(&mut bytes, 4 * index, *block);
        }
        let own = self.allocate()?;
        self.put_block(own, &bytes)?;
        Ok(own)
    }

    /// Bitmaps, descriptors and superblocks.
    fn finish(&self, large: bool) -> Result<(), Ext2Error> {
        let plan = self.plan;
        let inodes = number(plan.nodes.len() - 1);
        let mut directories = vec![0_u16; plan.groups as usize];
        for (index, node) in plan.nodes.iter().enumerate() {
            if node.file_type() == FileType::Directory {
                directories[((number(index) - 1) / plan.group_inodes) as usize] += 1;
            }
        }
        let mut descriptors = vec![0; plan.descriptor_blocks() as usize * BLOCK];
        let (mut free_blocks, mut free_inodes) = (0, 0);
        for group in 0..plan.groups {
            let (first, head) = plan.group_head(group);
            let used = match group.cmp(&self.group) {
                std::cmp::Ordering::Less => GROUP_BLOCKS,
                std::cmp::Ordering::Equal => self.used,
                std::cmp::Ordering::Greater => plan.group_overhead(group),
            };
            let begun = inodes.saturating_sub(group * plan.group_inodes).min(plan.group_inodes);
            let (blocks, nodes) = (GROUP_BLOCKS - used, plan.group_inodes - begun);
            (free_blocks, free_inodes) = (free_blocks + blocks, free_inodes + nodes);
            self.put_block(first + head, &bitmap(used, GROUP_BLOCKS))?;
            self.put_block(first + head + 1, &bitmap(begun, plan.group_inodes))?;
            let own = &mut descriptors[group as usize * DESCRIPTOR..][..DESCRIPTOR];
            put32(own, 0, first + head);
            put32(own, 4, first + head + 1);
            put32(own, 8, first + head + 2);
            put16(own, 12, blocks as u16);
            put16(own, 14, nodes as u16);
            put16(own, 16, directories[group as usize]);
        }
        for group in (0..plan.groups).filter(|group| has_super(*group)) {
            let block = self.superblock(group, free_blocks, free_inodes, large);
            let (first, _) = plan.group_head(group);
            let at =
                u64::from(first) * BLOCK as u64 + if group == 0 { SUPER_OFFSET as u64 } else { 0 };
            self.put(at, &block)?;
            self.put_block(first + 1, &descriptors)?;
        }
        Ok(())
    }

    fn superblock(
        &self,
        group: u32,
        free_blocks: u32,
        free_inodes: u32,
        large: bool,
    ) -> [u8; 1024] {
        let plan = self.plan;
        let mut raw = [0; 1024];
        put32(&mut raw, 0, plan.groups * plan.group_inodes);
        put32(&mut raw, 4, plan.groups * GROUP_BLOCKS);
        put32(&mut raw, 12, free_blocks);
        put32(&mut raw, 16, free_inodes);
        // log2 of the block's size, and that of fragments, in KiB.
        put32(&mut raw, 24, 2);
        put32(&mut raw, 28, 2);
        put32(&mut raw, 32, GROUP_BLOCKS);
        put32(&mut raw, 36, GROUP_BLOCKS);
        put32(&mut raw, 40, plan.group_inodes);
        // No check because of the number of mounts.
        put16(&mut raw, 54, u16::MAX);
        put16(&mut raw, 56, MAGIC);
        // Unmounted as it should be; after errors, go on.
        put16(&mut raw, 58, 1);
        put16(&mut raw, 60, 1);
        put32(&mut raw, 76, 1);
        put32(&mut raw, 84, FIRST);
        put16(&mut raw, 88, INODE as u16);
        put16(&mut raw, 90, group as u16);
        put32(&mut raw, 96, INCOMPAT_FILETYPE);
        put32(&mut raw, 100, RO_COMPAT_SPARSE_SUPER | if large { RO_COMPAT_LARGE_FILE } else { 0 });
        raw[104..120].copy_from_slice(&self.image.uuid());
        raw
    }
}

/// A device's number as Linux has it in an inode: short if it fits, and else long.
fn put_device(raw: &mut [u8; INODE], major: u32, minor: u32) {
    match major < 256 && minor < 256 {
        true => put32(raw, 40, major << 8 | minor),
        false => put32(raw, 44, minor & 0xff | major << 8 | (minor & !0xff) << 12),
    }
}

/// A block whose first `set` bits are set, and those from `end` on.
fn bitmap(set: u32, end: u32) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    for (index, byte) in bytes.iter_mut().enumerate() {
        for bit in 0..8 {
            let at = index as u32 * 8 + bit;
            if at < set || at >= end {
                *byte |= 1 << bit;
            }
        }
    }
    bytes
}
