//! A directory of the host as a root file system, for recipes that make one without layers.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::digest::{Digest, Hashing};
use crate::erofs::{DEVICE_MAJOR_MAX, DEVICE_MINOR_MAX, ImageWriter, WriteError, is_storable};
use crate::tree::{Children, Device, Kind, Meta, NodeId, Time, Tree};

/// Bytes of one extended attribute, or of the list of their names (`XATTR_LIST_MAX`).
const XATTR_MAX: usize = 65536;

/// Who owns what in an image that is made from a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Owners {
    /// Who owns it on the host.
    #[default]
    Keep,
    /// Root owns everything: an ordinary user's tree as a system's.
    Root,
}

/// Why a directory could not be made into an image.
#[derive(Debug, Error)]
pub enum DirectoryError {
    /// Something in the directory cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// What.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// A device number that EROFS has no room for.
    #[error("{path}: device number {major}:{minor} is out of range")]
    Device {
        /// The device node.
        path: PathBuf,
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// Too much for who wants it.
    #[error("the files of the directory have more than {limit} bytes, which is the limit")]
    Large {
        /// Bytes.
        limit: u64,
    },
    /// Too many inodes.
    #[error("the directory has more than 2^32 files")]
    Many,
    /// The image cannot be written.
    #[error("the image cannot be written: {0}")]
    Write(#[from] WriteError),
    /// No temporary file next to the image.
    #[error("cannot create a temporary file in {path}: {error}")]
    Temporary {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
}

/// Writes the tree under `directory` to `image`, which is replaced when it is complete. Returns
/// the number of inodes.
///
/// The same tree gives the same image: times, owners and contents are the tree's, and nothing else
/// goes in.
///
/// # Errors
///
/// See [`DirectoryError`]; `image` is untouched then.
pub fn from_directory(
    directory: &Path,
    image: &Path,
    owners: Owners,
) -> Result<u64, DirectoryError> {
    let parent = match image.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let temporary = |error| DirectoryError::Temporary { path: parent.to_owned(), error };
    let file = tempfile::NamedTempFile::new_in(parent).map_err(temporary)?;
    let spool = tempfile::tempfile_in(parent).map_err(temporary)?;
    let packed = file.reopen().map_err(temporary)?;
    let inodes = pack_directory(directory, packed, spool, owners, u64::MAX)?;
    file.persist(image).map_err(|e| temporary(e.error))?;
    Ok(inodes)
}

/// As [`from_directory`], to `image`, which is empty, with `spool` for what is in between, and with at most `limit` bytes of
/// files.
///
/// # Errors
///
/// See [`DirectoryError`]; `image` is of no use then.
pub fn pack_directory(
    directory: &Path,
    image: File,
    spool: File,
    owners: Owners,
    limit: u64,
) -> Result<u64, DirectoryError> {
    let writer = ImageWriter::new(image, spool);
    let mut scan = Scan {
        tree: Tree::new(),
        writer,
        owners,
        links: HashMap::new(),
        contents: Vec::new(),
        left: limit,
        limit,
    };
    let (root, ..) = scan.metadata(directory)?;
    scan.tree.node_mut(Tree::ROOT).meta = root;
    scan.directories(directory)?;
    // The identity is that of the contents, in the order of the tree, and of the metadata.
    let seed = Digest::of(&scan.contents);
    let (_, written) = scan.writer.finish(&scan.tree, seed.bytes())?;
    Ok(written.inodes)
}

struct Scan {
    tree: Tree,
    writer: ImageWriter,
    owners: Owners,
    /// Nodes of files with several names, by device and inode on the host.
    links: HashMap<(u64, u64), NodeId>,
    /// Digests of all files.
    contents: Vec<u8>,
    /// Bytes of files that there is still room for.
    left: u64,
    limit: u64,
}

impl Scan {
    fn directories(&mut self, root: &Path) -> Result<(), DirectoryError> {
        let mut open = vec![(root.to_owned(), Tree::ROOT)];
        while let Some((path, node)) = open.pop() {
            let failed = |error| DirectoryError::Read { path: path.clone(), error };
            let mut names: Vec<_> = fs::read_dir(&path)
                .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
                .map_err(failed)?;
            names.sort();
            for name in names {
                let path = path.join(&name);
                let child = self.add(&path)?;
                self.tree.link(node, name.as_bytes(), child, 0);
                if self.tree.children(child).is_some() {
                    open.push((path, child));
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &Path) -> Result<NodeId, DirectoryError> {
        let failed = |error| DirectoryError::Read { path: path.to_owned(), error };
        let (meta, host) = self.metadata(path)?;
        let file_type = host.file_type();
        let identity = (host.dev(), host.ino());
        let has_names = !file_type.is_dir() && host.nlink() > 1;
        if let Some(node) = self.links.get(&identity).filter(|_| has_names) {
            return Ok(*node);
        }
        let kind = if file_type.is_dir() {
            Kind::Directory(Children::new())
        } else if file_type.is_symlink() {
            Kind::Symlink(fs::read_link(path).map_err(failed)?.as_os_str().as_bytes().into())
        } else if file_type.is_file() {
            let large = DirectoryError::Large { limit: self.limit };
            self.left = self.left.checked_sub(host.len()).ok_or(large)?;
            let mut input = Hashing::new(File::open(path).map_err(failed)?);
            let content =
                self.writer.append(&mut input, host.len(), &meta).map_err(|e| match e {
                    WriteError::Read(error) => failed(error),
                    e => e.into(),
                })?;
            self.contents.extend(input.finish().bytes());
            Kind::File(content)
        } else if file_type.is_char_device() {
            Kind::Character(device(path, &host)?)
        } else if file_type.is_block_device() {
            Kind::Block(device(path, &host)?)
        } else if file_type.is_fifo() {
            Kind::Fifo
        } else {
            Kind::Socket
        };
        let node = self.tree.add(meta, kind).ok_or(DirectoryError::Many)?;
        if has_names {
            self.links.insert(identity, node);
        }
        Ok(node)
    }

    fn metadata(&self, path: &Path) -> Result<(Meta, Metadata), DirectoryError> {
        let failed = |error| DirectoryError::Read { path: path.to_owned(), error };
        let host = fs::symlink_metadata(path).map_err(failed)?;
        let (uid, gid) = match self.owners {
            Owners::Keep => (host.uid(), host.gid()),
            Owners::Root => (0, 0),
        };
        let meta = Meta {
            mode: (host.mode() & 0o7777) as u16,
            uid,
            gid,
            mtime: Time { seconds: host.mtime(), nanos: host.mtime_nsec() as u32 },
            xattrs: xattrs(path).map_err(failed)?,
        };
        Ok((meta, host))
    }
}

fn device(path: &Path, host: &Metadata) -> Result<Device, DirectoryError> {
    let (major, minor) = (rustix::fs::major(host.rdev()), rustix::fs::minor(host.rdev()));
    match major <= DEVICE_MAJOR_MAX && minor <= DEVICE_MINOR_MAX {
        true => Ok(Device { major, minor }),
        false => Err(DirectoryError::Device { path: path.to_owned(), major, minor }),
    }
}

/// Extended attributes by name.
type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// The extended attributes of `path` itself, as far as this user sees them.
fn xattrs(path: &Path) -> io::Result<Xattrs> {
    use rustix::io::Errno;
    let mut list = vec![0u8; XATTR_MAX];
    let length = match rustix::fs::llistxattr(path, &mut list[..]) {
        Ok(length) => length,
        // File systems without attributes.
        Err(Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS) => 0,
        Err(e) => return Err(e.into()),
    };
    let mut xattrs = BTreeMap::new();
    for name in list[..length].split(|byte| *byte == 0).filter(|name| is_storable(name)) {
        let mut value = vec![0u8; XATTR_MAX];
        match rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]) {
            Ok(length) => {
                xattrs.insert(name.into(), value[..length].into());
            }
            Err(Errno::NODATA | Errno::PERM | Errno::ACCESS) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(xattrs)
}
