//! Reads images of the subset that this crate writes.
//!
//! For what has to be known about a root file system before it runs (which kernel it carries, for
//! instance) and for tests. The image is checked as it is read: whatever its bytes are, the reader
//! answers or ends in a [`ReadError`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use thiserror::Error;

use super::crc32c::crc32c;
use super::format::*;
use super::xattr;

/// Symbolic links followed in one [`Reader::lookup`], as many as Linux follows.
const LINKS_MAX: usize = 40;
/// Bytes of a directory that the reader takes into memory.
const DIRECTORY_MAX: u64 = 1 << 30;

/// Why an image could not be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The file could not be read.
    #[error("the EROFS image cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Some other file system, or features that this reader does not know.
    #[error("not an EROFS image of the supported kind: {0}")]
    Unsupported(&'static str),
    /// A structure contradicts itself.
    #[error("the EROFS image is damaged: {what} of inode {nid}")]
    Damaged {
        /// The structure.
        what: &'static str,
        /// Number of the inode.
        nid: u64,
    },
    /// More symbolic links than Linux would follow.
    #[error("{path}: too many levels of symbolic links")]
    Loop {
        /// The path that was looked up.
        path: String,
    },
}

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device with major and minor number.
    Character(u32, u32),
    /// Block device with major and minor number.
    Block(u32, u32),
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
}

/// An inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Its number.
    pub nid: u64,
    /// What it is.
    pub file_type: FileType,
    /// Permission bits, 0o7777 at most.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of its data.
    pub size: u64,
    /// Directory entries that refer to it.
    pub links: u32,
    /// Modification time: seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    inline: bool,
    payload: u32,
    xattr_size: usize,
}

/// An open image.
#[derive(Debug)]
pub struct Reader {
    file: File,
    meta: u64,
    root: u64,
    inodes: u64,
    blocks: u32,
    uuid: [u8; 16],
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

impl Reader {
    /// Reads and checks the superblock.
    pub fn open(file: File) -> Result<Self, ReadError> {
        let mut block = [0; BLOCK];
        file.read_exact_at(&mut block, 0)?;
        let checked = &mut block[SUPER_OFFSET..];
        let checksum = le32(checked, 4);
        checked[4..8].fill(0);
        if le32(checked, 0) != SUPER_MAGIC {
            return Err(ReadError::Unsupported("no magic number"));
        }
        if checked[12] != BLOCK_BITS || le32(checked, 80) != 0 {
            return Err(ReadError::Unsupported("block size or features"));
        }
        if le32(checked, 8) & COMPAT_CHECKSUM == 0 || crc32c(!0, checked) != checksum {
            return Err(ReadError::Unsupported("wrong checksum of the superblock"));
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&checked[48..64]);
        Ok(Self {
            meta: u64::from(le32(checked, 40)) * BLOCK as u64,
            root: u64::from(le16(checked, 14)),
            inodes: le64(checked, 16),
            blocks: le32(checked, 36),
            uuid,
            file,
        })
    }

    /// Identifier of the volume.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Number of inodes.
    pub fn inodes(&self) -> u64 {
        self.inodes
    }

    /// Bytes of the image.
    pub fn size(&self) -> u64 {
        u64::from(self.blocks) * BLOCK as u64
    }

    /// The root directory.
    pub fn root(&self) -> Result<Inode, ReadError> {
        self.inode(self.root)
    }

    fn position(&self, nid: u64) -> Result<u64, ReadError> {
        nid.checked_mul(SLOT as u64)
            .and_then(|offset| offset.checked_add(self.meta))
            .filter(|position| *position < self.size())
            .ok_or(ReadError::Damaged { what: "number", nid })
    }

    /// The inode with number `nid`.
    pub fn inode(&self, nid: u64) -> Result<Inode, ReadError> {
        let mut raw = [0; INODE];
        self.file.read_exact_at(&mut raw, self.position(nid)?)?;
        let format = le16(&raw, 0);
        if format & 1 != INODE_EXTENDED {
            return Err(ReadError::Unsupported("compact inodes"));
        }
        let inline = match format >> 1 {
            FLAT_PLAIN => false,
            FLAT_INLINE => true,
            _ => return Err(ReadError::Unsupported("data that is not flat")),
        };
        let payload = le32(&raw, 16);
        let (major, minor) = decode_device(payload);
        let file_type = match le16(&raw, 4) & mode::MASK {
            mode::FILE => FileType::File,
            mode::DIRECTORY => FileType::Directory,
            mode::SYMLINK => FileType::Symlink,
            mode::CHARACTER => FileType::Character(major, minor),
            mode::BLOCK => FileType::Block(major, minor),
            mode::FIFO => FileType::Fifo,
            mode::SOCKET => FileType::Socket,
            _ => return Err(ReadError::Damaged { what: "file type", nid }),
        };
        Ok(Inode {
            nid,
            file_type,
            mode: le16(&raw, 4) & !mode::MASK,
            uid: le32(&raw, 24),
            gid: le32(&raw, 28),
            size: le64(&raw, 8),
            links: le32(&raw, 44),
            mtime: (le64(&raw, 32) as i64, le32(&raw, 40)),
            inline,
            payload,
            xattr_size: xattr::size(le16(&raw, 2)),
        })
    }

    /// A reader of the data of a file (or of the raw data of a directory or link).
    pub fn data<'a>(&'a self, inode: &Inode) -> Result<Data<'a>, ReadError> {
        let damaged = ReadError::Damaged { what: "data", nid: inode.nid };
        let tail = if inode.inline { inode.size % BLOCK as u64 } else { 0 };
        let whole = inode.size - tail;
        let start = u64::from(inode.payload) * BLOCK as u64;
        let tail_at = self.position(inode.nid)? + (INODE + inode.xattr_size) as u64;
        let fits = start.checked_add(whole).is_some_and(|end| end <= self.size())
            && tail_at + tail <= self.size();
        if !fits {
            return Err(damaged);
        }
        Ok(Data { file: &self.file, at: start, whole, tail_at, tail })
    }

    /// The whole data of an inode, which must not be larger than `limit` bytes.
    pub fn read(&self, inode: &Inode, limit: u64) -> Result<Vec<u8>, ReadError> {
        if inode.size > limit {
            return Err(ReadError::Damaged { what: "size", nid: inode.nid });
        }
        let mut bytes = Vec::new();
        self.data(inode)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The names in a directory with the numbers of their inodes, `.` and `..` included.
    pub fn entries(&self, directory: &Inode) -> Result<Vec<(Vec<u8>, u64)>, ReadError> {
        let damaged = || ReadError::Damaged { what: "directory", nid: directory.nid };
        let bytes = self.read(directory, DIRECTORY_MAX)?;
        let mut entries = Vec::new();
        for block in bytes.chunks(BLOCK) {
            let first = block.get(8..10).map(|b| usize::from(le16(b, 0))).ok_or_else(damaged)?;
            if first == 0 || first % DIRENT != 0 || first > block.len() {
                return Err(damaged());
            }
            let offset = |i: usize| usize::from(le16(block, i * DIRENT + 8));
            let count = first / DIRENT;
            for i in 0..count {
                let end = if i + 1 < count { offset(i + 1) } else { block.len() };
                let name = block.get(offset(i)..end).ok_or_else(damaged)?;
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                if name.is_empty() || name.len() > NAME_MAX || name.contains(&b'/') {
                    return Err(damaged());
                }
                entries.push((name.to_vec(), le64(block, i * DIRENT)));
            }
        }
        Ok(entries)
    }

    /// The target of a symbolic link.
    pub fn target(&self, link: &Inode) -> Result<Vec<u8>, ReadError> {
        self.read(link, SYMLINK_MAX as u64)
    }

    /// The extended attributes of an inode by full name.
    pub fn xattrs(&self, inode: &Inode) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, ReadError> {
        let damaged = || ReadError::Damaged { what: "extended attribute", nid: inode.nid };
        let mut bytes = vec![0; inode.xattr_size];
        self.file.read_exact_at(&mut bytes, self.position(inode.nid)? + INODE as u64)?;
        let mut xattrs = BTreeMap::new();
        let mut at = XATTR_HEADER;
        while at + XATTR_ENTRY <= bytes.len() {
            let name_end = at + XATTR_ENTRY + usize::from(bytes[at]);
            let value_end = name_end + usize::from(le16(&bytes, at + 2));
            let rest = bytes.get(at + XATTR_ENTRY..name_end).ok_or_else(damaged)?;
            let value = bytes.get(name_end..value_end).ok_or_else(damaged)?;
            let name = xattr::full_name(bytes[at + 1], rest).ok_or_else(damaged)?;
            xattrs.insert(name, value.to_vec());
            at = value_end.next_multiple_of(XATTR_ENTRY);
        }
        Ok(xattrs)
    }

    /// The inode at `path` within the image, symbolic links followed as if the image were `/`.
    pub fn lookup(&self, path: &str) -> Result<Option<Inode>, ReadError> {
        let mut chain = vec![self.root()?];
        let mut todo: Vec<Vec<u8>> = components(path.as_bytes());
        let mut links = 0;
        while let Some(name) = todo.pop() {
            let Some(directory) = chain.last() else { return Ok(None) };
            if name == b".." {
                if chain.len() > 1 {
                    chain.pop();
                }
                continue;
            }
            if directory.file_type != FileType::Directory {
                return Ok(None);
            }
            let entries = self.entries(directory)?;
            let Some((_, nid)) = entries.iter().find(|(entry, _)| *entry == name) else {
                return Ok(None);
            };
            let inode = self.inode(*nid)?;
            if inode.file_type == FileType::Symlink {
                links += 1;
                if links > LINKS_MAX {
                    return Err(ReadError::Loop { path: path.to_owned() });
                }
                let target = self.target(&inode)?;
                if target.starts_with(b"/") {
                    chain.truncate(1);
                }
                todo.extend(components(&target));
            } else {
                chain.push(inode);
            }
        }
        Ok(chain.pop())
    }
}

/// The components of a path, last first, without the empty ones and `.`.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    let named = |part: &&[u8]| !part.is_empty() && *part != b".";
    path.split(|byte| *byte == b'/').filter(named).rev().map(<[u8]>::to_vec).collect()
}

/// Reads the data of an inode from front to back.
#[derive(Debug)]
pub struct Data<'a> {
    file: &'a File,
    at: u64,
    whole: u64,
    tail_at: u64,
    tail: u64,
}

impl Read for Data<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.whole == 0 {
            self.at = self.tail_at;
            self.whole = std::mem::take(&mut self.tail);
        }
        let wanted = (buf.len() as u64).min(self.whole) as usize;
        let n = self.file.read_at(&mut buf[..wanted], self.at)?;
        if n == 0 && wanted > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += n as u64;
        self.whole -= n as u64;
        Ok(n)
    }
}
