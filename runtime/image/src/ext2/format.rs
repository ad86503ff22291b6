//! Sizes and fields of ext2 (revision 1), named as in the kernel's `fs/ext2/ext2.h` and
//! `Documentation/filesystems/ext4/`.

/// Bytes of a block.
pub(super) const BLOCK: usize = 4096;
/// Where the superblock is in its block, in group 0.
pub(super) const SUPER_OFFSET: usize = 1024;
/// `EXT2_SUPER_MAGIC`.
pub(super) const MAGIC: u16 = 0xef53;
/// Blocks of a group: the bits of a block.
pub(super) const GROUP_BLOCKS: u32 = 8 * BLOCK as u32;
/// Most inodes of a group.
pub(super) const GROUP_INODES_MAX: u32 = 8 * BLOCK as u32;
/// Bytes of a group descriptor.
pub(super) const DESCRIPTOR: usize = 32;
/// Bytes of an inode: the size that every driver takes.
pub(super) const INODE: usize = 128;
/// Inodes in a block.
pub(super) const BLOCK_INODES: u32 = (BLOCK / INODE) as u32;
/// `EXT2_ROOT_INO`.
pub(super) const ROOT: u32 = 2;
/// `EXT2_GOOD_OLD_FIRST_INO`: those below have uses of their own.
pub(super) const FIRST: u32 = 11;
/// Blocks that an inode names itself.
pub(super) const DIRECT: usize = 12;
/// Block numbers in a block.
pub(super) const POINTERS: usize = BLOCK / 4;
/// Longest target of a symbolic link that stands in the inode, plus one.
pub(super) const FAST_LINK: usize = 60;
/// `EXT2_LINK_MAX`.
pub(super) const LINK_MAX: u32 = 32_000;

/// `EXT2_FEATURE_INCOMPAT_FILETYPE`: entries of directories tell types.
pub(super) const INCOMPAT_FILETYPE: u32 = 2;
/// `EXT2_FEATURE_RO_COMPAT_SPARSE_SUPER`: few groups have copies of the superblock.
pub(super) const RO_COMPAT_SPARSE_SUPER: u32 = 1;
/// `EXT2_FEATURE_RO_COMPAT_LARGE_FILE`: there is a file of 2 GiB or more.
pub(super) const RO_COMPAT_LARGE_FILE: u32 = 2;
/// Size of a file that needs it.
pub(super) const LARGE_FILE: u64 = 1 << 31;

/// Whether a group has copies of superblock and descriptors: 0, 1 and powers of 3, 5 and 7.
pub(super) fn has_super(group: u32) -> bool {
    let power = |base: u32| {
        let mut n = group;
        while n.is_multiple_of(base) {
            n /= base;
        }
        n == 1
    };
    group <= 1 || [3, 5, 7].into_iter().any(power)
}

pub(super) fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub(super) fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_where_others_look_for_them() {
        let with: Vec<u32> = (0..130).filter(|group| has_super(*group)).collect();
        assert_eq!(with, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }
}
