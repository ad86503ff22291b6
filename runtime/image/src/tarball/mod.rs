//! Reads tar streams: v7, ustar, GNU, PAX and star headers, GNU and PAX sparse files.
//!
//! A reader of our own because of what layers need and the common crates do not give: PAX records
//! with binary values (`SCHILY.xattr.security.capability` may contain a newline), all four sparse
//! formats, bounded memory whatever the headers say, and the same idea as Go's `archive/tar` (by
//! which images are built and unpacked everywhere else) of where the next header begins: an entry
//! of a kind that has no data has none, whatever size it states. Two readers that disagree there
//! see two different images in one layer.
//!
//! Formats: POSIX.1-2017 `pax`, "ustar Interchange Format" and "pax Extended Header"; GNU tar
//! manual, "Basic Tar Format" and "Storing Sparse Files".

mod header;
mod pax;
mod sparse;

use std::io::{self, Read};

use thiserror::Error;

use self::header::{Kind, RawHeader};
use self::pax::Pax;
use self::sparse::{Expand, Segment};
use crate::tree::Time;

/// Bytes of a tar block.
pub(crate) const BLOCK: usize = 512;

/// Why a stream is not a tar archive that can be read.
#[derive(Debug, Error)]
pub enum TarError {
    /// The stream ended in the middle of something.
    #[error("the archive is truncated: it ends within {0}")]
    Truncated(&'static str),
    /// A header's checksum is not the sum of its bytes.
    #[error("header at byte {position} has a wrong checksum (not a tar archive, or a damaged one)")]
    Checksum {
        /// Where the header begins.
        position: u64,
    },
    /// A number field holds no number.
    #[error("{field} is not a number that a tar header can hold")]
    Number {
        /// Which field.
        field: &'static str,
    },
    /// A PAX record is malformed.
    #[error("malformed PAX record")]
    Pax,
    /// A PAX record or a long name has a size that no sensible one has.
    #[error("a header extension of {size} bytes, the limit is {limit}")]
    Extension {
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A header extension that extends nothing.
    #[error("a header extension with no entry behind it")]
    Dangling,
    /// A sparse map that contradicts itself.
    #[error("malformed sparse map: {0}")]
    Sparse(&'static str),
    /// An entry type with no meaning in a layer.
    #[error("entry type `{}` is not supported", .0.escape_ascii())]
    EntryType(u8),
    /// A block of zeros, which ends an archive, with something else behind it.
    #[error("data behind the end-of-archive mark")]
    LoneZeroBlock,
    /// The underlying stream failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    HardLink,
    Symlink,
    Character,
    Block,
    Directory,
    Fifo,
}

/// An entry, all its headers taken together.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: EntryKind,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: Time,
    pub(crate) device: (u64, u64),
    /// Bytes of the contents, holes included.
    pub(crate) size: u64,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where in the stream the stored contents begin.
    pub(crate) position: u64,
    /// The stored parts, `None` if everything is.
    sparse: Option<Vec<Segment>>,
}

impl Entry {
    /// True if the contents are one run of bytes at [`Entry::position`].
    pub(crate) fn is_contiguous(&self) -> bool {
        self.sparse.is_none()
    }
}

/// A stream that can be skipped in.
pub(crate) trait Skip: Read {
    /// Passes over `count` bytes; an end of the stream within them may go unnoticed until the next
    /// read.
    fn skip(&mut self, count: u64) -> io::Result<()>;
}

/// Skips by reading.
pub(crate) struct Stream<R>(pub(crate) R);

impl<R: Read> Read for Stream<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl<R: Read> Skip for Stream<R> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        match io::copy(&mut self.0.by_ref().take(count), &mut io::sink())? {
            n if n == count => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Skips by seeking.
pub(crate) struct Seekable<R>(pub(crate) R);

impl<R: Read> Read for Seekable<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl<R: Read + io::Seek> Skip for Seekable<R> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let count = i64::try_from(count).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        self.0.seek_relative(count)
    }
}

/// Iterates over the entries of a stream.
pub(crate) struct TarReader<R> {
    input: R,
    position: u64,
    /// Bytes until the next header: what is left of the current entry, with its padding.
    pending: u64,
    /// Bytes of the current entry's stored contents that are not read yet.
    stored: u64,
    limit: u64,
    done: bool,
}

impl<R: Skip> TarReader<R> {
    /// Reads from `input`; no header extension and no sparse map may be larger than `limit` bytes.
    pub(crate) fn new(input: R, limit: u64) -> Self {
        Self { input, position: 0, pending: 0, stored: 0, limit, done: false }
    }

    /// Gives the stream back, positioned somewhere behind the last entry.
    pub(crate) fn into_inner(self) -> R {
        self.input
    }

    /// The next entry, `None` at the end. Unread contents of the last one are skipped.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut long_path = None;
        let mut long_link = None;
        let mut pax: Option<Pax> = None;
        let extended = |path: &Option<_>, link: &Option<_>, pax: &Option<_>| {
            path.is_some() || link.is_some() || pax.is_some()
        };
        loop {
            let Some(header) = self.next_header()? else {
                return match extended(&long_path, &long_link, &pax) {
                    true => Err(TarError::Dangling),
                    false => Ok(None),
                };
            };
            let size = header.size()?;
            match header.kind() {
                Kind::LongName => long_path = Some(text(self.extension(size)?)),
                Kind::LongLink => long_link = Some(text(self.extension(size)?)),
                Kind::Pax => pax = Some(Pax::parse(&self.extension(size)?)?),
                // Defaults for all entries: Docker ignores them (in practice a comment of git).
                Kind::PaxGlobal => {
                    Pax::parse(&self.extension(size)?)?;
                }
                Kind::Other(kind) => return Err(TarError::EntryType(kind)),
                Kind::Entry(kind) => {
                    let pax = pax.unwrap_or_default();
                    return self.entry(&header, kind, long_path, long_link, pax).map(Some);
                }
                Kind::GnuSparse => {
                    let pax = pax.unwrap_or_default();
                    return self
                        .entry(&header, EntryKind::File, long_path, long_link, pax)
                        .map(Some);
                }
            }
        }
    }

    /// Reads the contents of the entry that [`TarReader::next_entry`] returned last.
    pub(crate) fn contents<'a>(&'a mut self, entry: &'a Entry) -> Expand<'a, Stored<'a, R>> {
        let segments = entry.sparse.as_deref();
        Expand::new(Stored(self), segments, entry.size)
    }

    fn entry(
        &mut self,
        header: &RawHeader,
        mut kind: EntryKind,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        pax: Pax,
    ) -> Result<Entry, TarError> {
        let sparse = if header.kind() == Kind::GnuSparse {
            let mut map = header.sparse_map()?;
            let mut more = header.sparse_continues();
            while more {
                let mut block = [0; BLOCK];
                self.read_exact(&mut block, "a sparse map")?;
                more = sparse::extend_gnu_map(&block, &mut map)?;
                if (map.len() * size_of::<Segment>()) as u64 > self.limit {
                    return Err(TarError::Sparse("too many parts"));
                }
            }
            Some((map, header.real_size()?))
        } else {
            pax.sparse_map()?.map(|map| (map, pax.sparse_size.unwrap_or(0)))
        };

        let path = long_path.or(pax.path).unwrap_or_else(|| header.path());
        if kind == EntryKind::File && path.ends_with(b"/") {
            kind = EntryKind::Directory;
        }
        let stored = match kind {
            EntryKind::File => pax.size.map_or_else(|| header.size(), Ok)?,
            _ => 0,
        };
        self.stored = stored;
        self.pending = padded(stored)?;

        let mut entry = Entry {
            path: pax.sparse_name.unwrap_or(path),
            link: long_link.or(pax.link).unwrap_or_else(|| header.link()),
            kind,
            mode: header.mode()?,
            uid: pax.uid.map_or_else(|| header.uid(), Ok)?,
            gid: pax.gid.map_or_else(|| header.gid(), Ok)?,
            mtime: pax.mtime.map_or_else(|| header.mtime(), Ok)?,
            device: match kind {
                EntryKind::Character | EntryKind::Block => header.device()?,
                _ => (0, 0),
            },
            size: stored,
            xattrs: pax.xattrs,
            position: self.position,
            sparse: None,
        };
        let (mut map, real_size) = match sparse {
            Some(sparse) => sparse,
            None if pax.sparse_in_data && kind == EntryKind::File => {
                let limit = self.limit;
                let map = sparse::read_map(&mut Stored(self), limit)?;
                (map, pax.sparse_size.ok_or(TarError::Sparse("no size"))?)
            }
            None => return Ok(entry),
        };
        if kind != EntryKind::File {
            return Err(TarError::Sparse("not a file"));
        }
        sparse::check(&mut map, real_size, self.stored)?;
        entry.size = real_size;
        entry.position = self.position;
        entry.sparse = Some(map);
        Ok(entry)
    }

    fn next_header(&mut self) -> Result<Option<RawHeader>, TarError> {
        if self.done {
            return Ok(None);
        }
        let pending = std::mem::take(&mut self.pending);
        self.stored = 0;
        self.input.skip(pending).map_err(|e| cut(e, "the contents of an entry"))?;
        self.position += pending;
        let position = self.position;
        let Some(block) = self.block()? else {
            // Many writers leave the end mark out.
            self.done = true;
            return Ok(None);
        };
        if block == [0; BLOCK] {
            self.done = true;
            return match self.block()? {
                Some(block) if block != [0; BLOCK] => Err(TarError::LoneZeroBlock),
                _ => Ok(None),
            };
        }
        RawHeader::new(block, position).map(Some)
    }

    /// The next block, `None` if the stream ends before it.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.input.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(TarError::Truncated("a header")),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(cut(e, "a header")),
            }
        }
        self.position += BLOCK as u64;
        Ok(Some(block))
    }

    fn read_exact(&mut self, bytes: &mut [u8], what: &'static str) -> Result<(), TarError> {
        self.input.read_exact(bytes).map_err(|e| cut(e, what))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// The contents of a header extension of `size` bytes.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > self.limit {
            return Err(TarError::Extension { size, limit: self.limit });
        }
        let mut bytes = vec![0; size as usize];
        self.read_exact(&mut bytes, "a header extension")?;
        self.pending = padded(size)? - size;
        Ok(bytes)
    }
}

/// The stored contents of the current entry.
pub(crate) struct Stored<'a, R>(&'a mut TarReader<R>);

impl<R: Read> Read for Stored<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let tar = &mut *self.0;
        let wanted = (buf.len() as u64).min(tar.stored) as usize;
        if wanted == 0 {
            return Ok(0);
        }
        let n = tar.input.read(&mut buf[..wanted])?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        tar.stored -= n as u64;
        tar.pending -= n as u64;
        tar.position += n as u64;
        Ok(n)
    }
}

fn padded(size: u64) -> Result<u64, TarError> {
    size.checked_next_multiple_of(BLOCK as u64).ok_or(TarError::Number { field: "size" })
}

/// A name field or extension ends at its first NUL.
fn text(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

fn cut(error: io::Error, what: &'static str) -> TarError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => TarError::Truncated(what),
        _ => TarError::Io(error),
    }
}

#[cfg(test)]
mod tests;
