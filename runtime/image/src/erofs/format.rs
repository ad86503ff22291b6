//! Constants of the on-disk format (`fs/erofs/erofs_fs.h`). All integers are little-endian.

/// Where the superblock begins; the bytes before belong to boot loaders (`EROFS_SUPER_OFFSET`).
pub(crate) const SUPER_OFFSET: usize = 1024;
/// `EROFS_SUPER_MAGIC_V1`.
pub(crate) const SUPER_MAGIC: u32 = 0xE0F5_E1E2;
/// `sizeof(struct erofs_super_block)`.
pub(crate) const SUPER_SIZE: usize = 128;
/// Log2 of [`BLOCK`].
pub(crate) const BLOCK_BITS: u8 = 12;
/// Bytes of a block.
pub(crate) const BLOCK: usize = 1 << BLOCK_BITS;

/// `EROFS_FEATURE_COMPAT_SB_CHKSUM`: the superblock's block has a checksum.
pub(crate) const COMPAT_CHECKSUM: u32 = 0x1;
/// `EROFS_FEATURE_COMPAT_MTIME`: inode times are modification times, not change times.
pub(crate) const COMPAT_MTIME: u32 = 0x2;

/// Inode numbers ("nid") count slots of this size from the beginning of the metadata area.
pub(crate) const SLOT: usize = 32;
/// `sizeof(struct erofs_inode_extended)`.
pub(crate) const INODE: usize = 64;
/// `EROFS_INODE_LAYOUT_EXTENDED`, bit 0 of `i_format`.
pub(crate) const INODE_EXTENDED: u16 = 1;
/// `EROFS_INODE_FLAT_PLAIN`, from bit 1 of `i_format`.
pub(crate) const FLAT_PLAIN: u16 = 0;
/// `EROFS_INODE_FLAT_INLINE`: the last, partial block follows the inode.
pub(crate) const FLAT_INLINE: u16 = 2;

/// `sizeof(struct erofs_dirent)`.
pub(crate) const DIRENT: usize = 12;
/// `sizeof(struct erofs_xattr_ibody_header)`.
pub(crate) const XATTR_HEADER: usize = 12;
/// `sizeof(struct erofs_xattr_entry)`, also the unit in which `i_xattr_icount` counts.
pub(crate) const XATTR_ENTRY: usize = 4;

/// Bytes of a file name (`EROFS_NAME_LEN`).
pub(crate) const NAME_MAX: usize = 255;
/// Bytes of a symbolic link's target: `PATH_MAX` without the NUL.
pub(crate) const SYMLINK_MAX: usize = 4095;
/// `new_encode_dev` of the kernel has 12 bits of major number...
pub(crate) const DEVICE_MAJOR_MAX: u32 = 0xfff;
/// ...and 20 bits of minor number.
pub(crate) const DEVICE_MINOR_MAX: u32 = 0xf_ffff;

/// The file type bits of `i_mode`.
pub(crate) mod mode {
    pub(crate) const MASK: u16 = 0o170000;
    pub(crate) const FIFO: u16 = 0o010000;
    pub(crate) const CHARACTER: u16 = 0o020000;
    pub(crate) const DIRECTORY: u16 = 0o040000;
    pub(crate) const BLOCK: u16 = 0o060000;
    pub(crate) const FILE: u16 = 0o100000;
    pub(crate) const SYMLINK: u16 = 0o120000;
    pub(crate) const SOCKET: u16 = 0o140000;
}

/// The file type in a directory entry (`FT_REG_FILE` and so on) for the type bits of a mode.
pub(crate) fn dirent_type(mode: u16) -> u8 {
    match mode & mode::MASK {
        mode::FILE => 1,
        mode::DIRECTORY => 2,
        mode::CHARACTER => 3,
        mode::BLOCK => 4,
        mode::FIFO => 5,
        mode::SOCKET => 6,
        mode::SYMLINK => 7,
        _ => 0,
    }
}

/// `new_encode_dev` of the kernel. The caller has checked the ranges.
pub(crate) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & DEVICE_MAJOR_MAX) << 8 | (minor & !0xff) << 12
}

/// The inverse of [`encode_device`].
pub(crate) fn decode_device(device: u32) -> (u32, u32) {
    ((device >> 8) & DEVICE_MAJOR_MAX, (device & 0xff) | ((device >> 12) & 0xf_ff00))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(0, 0), (1, 3), (8, 0x12345), (DEVICE_MAJOR_MAX, DEVICE_MINOR_MAX)] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
        }
        assert_eq!(encode_device(5, 1), 0x501);
    }
}
