//! Applies layers to a tree (OCI image specification, "Image Layer Filesystem Changeset").
//!
//! Nothing of a layer touches the host's file system: paths are names in the tree in memory and
//! contents go into the image that is being written. So what an entry could do to a host (leave
//! the root by `..`, write through a link, create a device) it cannot even try. Entries that try
//! are refused all the same, with their names: the image is broken or hostile, and would be
//! unpacked differently elsewhere.

mod path;

use std::collections::BTreeMap;
use std::io::{self, Read};

use thiserror::Error;

pub use self::path::PathError;
use crate::erofs::{
    DEVICE_MAJOR_MAX, DEVICE_MINOR_MAX, ImageWriter, SYMLINK_MAX, WriteError, XattrError,
    check_xattrs, is_storable,
};
use crate::limits::Limits;
use crate::names::show;
use crate::tarball::{Entry, EntryKind, Stream, TarError, TarReader};
use crate::tree::{Children, Device, Kind, Meta, NodeId, Tree};

/// Prefix of a name that hides the rest of it in the layers below.
const WHITEOUT: &[u8] = b".wh.";
/// A whiteout of everything in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Prefix of the bookkeeping of AUFS, which layers may contain but do not mean.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// Attributes that would be commands to the overlay mounted over the image.
const OVERLAY: &[u8] = b"trusted.overlay.";

/// Why an entry cannot be applied.
#[derive(Debug, Error)]
pub enum EntryError {
    /// The path is none.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The root of the tree is not a directory.
    #[error("only a directory can be the root")]
    Root,
    /// A whiteout that would hide its own directory or more.
    #[error("a whiteout with no name")]
    Whiteout,
    /// The link's target is not in the tree.
    #[error("hard link to {target}, which is not in the image")]
    LinkMissing {
        /// The target.
        target: String,
    },
    /// Hard links to directories would be cycles.
    #[error("hard link to the directory {target}")]
    LinkDirectory {
        /// The target.
        target: String,
    },
    /// The link's target is not a path within the tree.
    #[error("hard link to {target}: {error}")]
    LinkTarget {
        /// The target.
        target: String,
        /// What is wrong with it.
        error: PathError,
    },
    /// Bytes of a symbolic link's target.
    #[error("symbolic link with a target of {0} bytes, the maximum is 4095")]
    SymlinkLength(usize),
    /// A symbolic link to nothing, or to a path with a NUL.
    #[error("symbolic link with an empty or malformed target")]
    SymlinkTarget,
    /// Owner, group or device number out of range.
    #[error("{what} {value} is out of range")]
    Range {
        /// What the number is.
        what: &'static str,
        /// The number.
        value: u64,
    },
    /// More entries than allowed.
    #[error("more than {0} entries in the image")]
    Entries(u64),
    /// More devices than allowed.
    #[error("more than {0} device nodes in the image")]
    Devices(u64),
    /// More data than allowed.
    #[error("more than {0} bytes in the image when unpacked")]
    Bytes(u64),
    /// More metadata than allowed.
    #[error("more than {0} bytes of names, links and extended attributes in the image")]
    Metadata(u64),
    /// Extended attributes that EROFS has no room for.
    #[error(transparent)]
    Xattr(#[from] XattrError),
    /// The archive is malformed.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// The image could not be written.
    #[error(transparent)]
    Write(WriteError),
}

/// Why a layer cannot be applied: the entry and what is wrong with it.
#[derive(Debug, Error)]
#[error("{}: {error}", .entry.as_ref().map_or_else(|| format!("behind entry {number}"), |entry| format!("entry {entry}")))]
pub struct LayerError {
    /// The entry's path as the layer has it; `None` if what is wrong is between entries.
    pub entry: Option<String>,
    /// Entries of the layer before it.
    pub number: u64,
    /// What is wrong.
    pub error: EntryError,
}

/// Applies layers, lowest first.
pub(crate) struct Unpacker<'a> {
    tree: Tree,
    image: ImageWriter,
    limits: &'a Limits,
    layer: u32,
    entries: u64,
    devices: u64,
    bytes: u64,
    metadata: u64,
}

impl<'a> Unpacker<'a> {
    pub(crate) fn new(image: ImageWriter, limits: &'a Limits) -> Self {
        Self {
            tree: Tree::new(),
            image,
            limits,
            layer: 0,
            entries: 0,
            devices: 0,
            bytes: 0,
            metadata: 0,
        }
    }

    /// Applies the next layer and reads `input` to its end.
    pub(crate) fn apply(&mut self, input: &mut dyn Read) -> Result<(), LayerError> {
        let mut tar = TarReader::new(Stream(input), self.limits.header_bytes);
        for number in 0.. {
            let between = |error: EntryError| LayerError { entry: None, number, error };
            let Some(entry) = tar.next_entry().map_err(|e| between(e.into()))? else { break };
            self.entry(&entry, &mut tar).map_err(|error| LayerError {
                entry: Some(show(&entry.path)),
                number,
                error,
            })?;
        }
        // What follows the end mark belongs to the layer's digest all the same.
        io::copy(&mut tar.into_inner().0, &mut io::sink()).map_err(|e| LayerError {
            entry: None,
            number: self.entries,
            error: TarError::Io(e).into(),
        })?;
        self.layer += 1;
        Ok(())
    }

    /// The tree and the image its contents are in.
    pub(crate) fn finish(self) -> (Tree, ImageWriter) {
        (self.tree, self.image)
    }

    fn entry<R: Read>(
        &mut self,
        entry: &Entry,
        tar: &mut TarReader<Stream<R>>,
    ) -> Result<(), EntryError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(EntryError::Entries(self.limits.entries));
        }
        self.metadata = self.metadata.saturating_add(metadata_size(entry));
        if self.metadata > self.limits.metadata_bytes {
            return Err(EntryError::Metadata(self.limits.metadata_bytes));
        }
        let components = path::components(&entry.path, self.limits.depth)?;
        let Some((name, parents)) = components.split_last() else {
            return self.root(entry);
        };
        if name.starts_with(WHITEOUT) {
            return self.whiteout(name, parents);
        }
        let meta = meta(entry)?;
        let depth = self.limits.depth;
        let parent = path::create(&mut self.tree, parents, depth, meta.mtime, self.layer)
            .map_err(|e| self.path_error(e))?;
        // Directories that nobody described are nodes like any other.
        if self.tree.len() as u64 > self.limits.entries {
            return Err(EntryError::Entries(self.limits.entries));
        }

        let kind = match entry.kind {
            EntryKind::HardLink => return self.hard_link(entry, parent, name),
            EntryKind::Directory => return self.directory(meta, parent, name),
            EntryKind::File => {
                self.bytes = self.bytes.saturating_add(entry.size);
                if self.bytes > self.limits.unpacked_bytes {
                    return Err(EntryError::Bytes(self.limits.unpacked_bytes));
                }
                let contents = &mut tar.contents(entry);
                let content =
                    self.image.append(contents, entry.size, &meta).map_err(|e| match e {
                        WriteError::Read(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                            TarError::Truncated("the contents of a file").into()
                        }
                        e => EntryError::Write(e),
                    })?;
                Kind::File(content)
            }
            EntryKind::Symlink => Kind::Symlink(symlink_target(&entry.link)?),
            EntryKind::Character => Kind::Character(self.device(entry)?),
            EntryKind::Block => Kind::Block(self.device(entry)?),
            EntryKind::Fifo => Kind::Fifo,
        };
        self.add(meta, kind, parent, name)
    }

    fn add(
        &mut self,
        meta: Meta,
        kind: Kind,
        parent: NodeId,
        name: &[u8],
    ) -> Result<(), EntryError> {
        let node = self.tree.add(meta, kind).ok_or(EntryError::Entries(self.limits.entries))?;
        self.tree.link(parent, name, node, self.layer);
        Ok(())
    }

    /// `./`: what the root directory itself is like.
    fn root(&mut self, entry: &Entry) -> Result<(), EntryError> {
        if entry.kind != EntryKind::Directory {
            return Err(EntryError::Root);
        }
        self.tree.node_mut(Tree::ROOT).meta = meta(entry)?;
        Ok(())
    }

    fn directory(&mut self, meta: Meta, parent: NodeId, name: &[u8]) -> Result<(), EntryError> {
        match self.tree.child(parent, name) {
            // A directory that is there keeps what is in it. (A link to one is replaced: Docker
            // asks the name itself, too.)
            Some(child) if self.tree.children(child.node).is_some() => {
                self.tree.node_mut(child.node).meta = meta;
                self.tree.link(parent, name, child.node, self.layer);
                Ok(())
            }
            _ => self.add(meta, Kind::Directory(Children::new()), parent, name),
        }
    }

    fn hard_link(&mut self, entry: &Entry, parent: NodeId, name: &[u8]) -> Result<(), EntryError> {
        let target = || show(&entry.link);
        let wrong = |error| EntryError::LinkTarget { target: target(), error };
        if entry.link.starts_with(b"/") {
            return Err(wrong(PathError::Absolute));
        }
        let components = path::components(&entry.link, self.limits.depth).map_err(wrong)?;
        let found = path::find(&self.tree, &components).map_err(wrong)?;
        let node = found.ok_or_else(|| EntryError::LinkMissing { target: target() })?;
        if self.tree.children(node).is_some() {
            return Err(EntryError::LinkDirectory { target: target() });
        }
        self.tree.link(parent, name, node, self.layer);
        Ok(())
    }

    fn whiteout(&mut self, name: &[u8], parents: &[&[u8]]) -> Result<(), EntryError> {
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(EntryError::Whiteout);
        }
        // A whiteout below something that is no directory hides nothing.
        let Ok(Some(directory)) = path::find_directory(&self.tree, parents) else {
            return Ok(());
        };
        if name == OPAQUE {
            self.tree.hide_children(directory, self.layer);
        } else if !name.starts_with(WHITEOUT_META) {
            self.tree.hide(directory, hidden, self.layer);
        }
        Ok(())
    }

    fn device(&mut self, entry: &Entry) -> Result<Device, EntryError> {
        self.devices += 1;
        if self.devices > self.limits.devices {
            return Err(EntryError::Devices(self.limits.devices));
        }
        let part = |what, value, max: u32| match u32::try_from(value) {
            Ok(number) if number <= max => Ok(number),
            _ => Err(EntryError::Range { what, value }),
        };
        Ok(Device {
            major: part("device major number", entry.device.0, DEVICE_MAJOR_MAX)?,
            minor: part("device minor number", entry.device.1, DEVICE_MINOR_MAX)?,
        })
    }

    fn path_error(&self, error: path::CreateError) -> EntryError {
        match error {
            path::CreateError::Path(error) => error.into(),
            path::CreateError::Full => EntryError::Entries(self.limits.entries),
        }
    }
}

fn symlink_target(link: &[u8]) -> Result<Box<[u8]>, EntryError> {
    match link.len() {
        0 => Err(EntryError::SymlinkTarget),
        _ if link.contains(&0) => Err(EntryError::SymlinkTarget),
        1..=SYMLINK_MAX => Ok(link.into()),
        length => Err(EntryError::SymlinkLength(length)),
    }
}

/// Bytes of an entry that stay in memory.
fn metadata_size(entry: &Entry) -> u64 {
    let xattrs = entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
    (entry.path.len() + entry.link.len() + xattrs) as u64
}

fn meta(entry: &Entry) -> Result<Meta, EntryError> {
    let id = |what, value| u32::try_from(value).map_err(|_| EntryError::Range { what, value });
    let xattrs: BTreeMap<Box<[u8]>, Box<[u8]>> = entry
        .xattrs
        .iter()
        .filter(|(name, _)| is_storable(name) && !name.starts_with(OVERLAY))
        .map(|(name, value)| (name[..].into(), value[..].into()))
        .collect();
    check_xattrs(&xattrs)?;
    Ok(Meta {
        mode: (entry.mode & 0o7777) as u16,
        uid: id("owner", entry.uid)?,
        gid: id("group", entry.gid)?,
        mtime: entry.mtime,
        xattrs,
    })
}

#[cfg(test)]
mod tests;
