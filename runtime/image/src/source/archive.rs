//! Named members, in a directory or in a tar file.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::SourceError;
use crate::compress::{Compression, decoder};
use crate::limits::Limits;
use crate::progress::{Progress, Watched};
use crate::tarball::{EntryKind, Seekable, TarReader};

/// Links that lead from one name in an archive to another.
const LINKS_MAX: usize = 16;

/// A directory or tar file with named members.
#[derive(Debug)]
pub(crate) struct Archive {
    path: PathBuf,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Directory,
    Tar { file: File, members: HashMap<String, Member> },
}

#[derive(Debug)]
enum Member {
    File {
        position: u64,
        size: u64,
    },
    /// `docker save` once wrote links for layers that images share.
    Link(String),
}

impl Archive {
    pub(super) fn open(
        path: &Path,
        temporary: &mut dyn FnMut() -> io::Result<File>,
        limits: &Limits,
        progress: &dyn Progress,
    ) -> Result<Self, SourceError> {
        let io = |error| SourceError::Io { path: path.to_owned(), error };
        let mut file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if metadata.is_dir() {
            return Ok(Self { path: path.to_owned(), content: Content::Directory });
        }
        let mut start = [0; 4];
        let detected = match metadata.is_file() {
            true => {
                let n = file.read_at(&mut start, 0).map_err(io)?;
                Some(Compression::detect(&start[..n]))
            }
            false => None,
        };
        if detected != Some(Compression::None) {
            // Compressed, or a pipe: members are read in another order than they are stored in.
            progress.begin("decompress", metadata.is_file().then_some(metadata.len()));
            file = spool(path, Watched { inner: file, progress }, temporary, limits)?;
            progress.end();
        }
        let members = index(&file, limits)
            .map_err(|error| SourceError::Tar { path: path.to_owned(), error })?;
        Ok(Self { path: path.to_owned(), content: Content::Tar { file, members } })
    }

    /// The directory or file itself.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        match &self.content {
            Content::Directory => self.path.join(name).is_file(),
            Content::Tar { members, .. } => members.contains_key(name),
        }
    }

    /// A reader of the member `name` and its size.
    pub(crate) fn open_member(&self, name: &str) -> Result<(Box<dyn Read + '_>, u64), SourceError> {
        let missing = || SourceError::Missing(name.to_owned());
        match &self.content {
            Content::Directory => {
                let path = self.path.join(name);
                let opened = File::open(&path).and_then(|file| {
                    let size = file.metadata()?.len();
                    Ok((file, size))
                });
                match opened {
                    Ok((file, size)) => Ok((Box::new(file), size)),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => Err(missing()),
                    Err(error) => Err(SourceError::Io { path, error }),
                }
            }
            Content::Tar { file, members } => {
                let mut name = name.to_owned();
                for _ in 0..LINKS_MAX {
                    match members.get(&name) {
                        Some(Member::File { position, size }) => {
                            let part = Part { file, position: *position, left: *size };
                            return Ok((Box::new(part), *size));
                        }
                        Some(Member::Link(target)) => name.clone_from(target),
                        None => break,
                    }
                }
                Err(missing())
            }
        }
    }

    /// The whole of a member that is a JSON document.
    pub(crate) fn document(&self, name: &str, limits: &Limits) -> Result<Vec<u8>, SourceError> {
        let (reader, size) = self.open_member(name)?;
        let limit = limits.document_bytes;
        let mut bytes = Vec::new();
        if size <= limit {
            reader
                .take(limit + 1)
                .read_to_end(&mut bytes)
                .map_err(|error| SourceError::Io { path: self.path.clone(), error })?;
        }
        let size = size.max(bytes.len() as u64);
        match size > limit {
            true => Err(SourceError::DocumentSize { name: name.to_owned(), size, limit }),
            false => Ok(bytes),
        }
    }
}

/// Decompresses `input` into a temporary file.
fn spool(
    path: &Path,
    input: impl Read,
    temporary: &mut dyn FnMut() -> io::Result<File>,
    limits: &Limits,
) -> Result<File, SourceError> {
    let io = |error| SourceError::Io { path: path.to_owned(), error };
    let damaged = |error| SourceError::Decompress { path: path.to_owned(), error };
    let mut file = temporary().map_err(io)?;
    let limit = limits.unpacked_bytes;
    let mut decoder = decoder(input).map_err(damaged)?.take(limit + 1);
    let mut buffer = vec![0; 256 << 10];
    let mut size = 0;
    // Not io::copy: which side failed decides what the message says.
    loop {
        let n = match decoder.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(damaged(e)),
        };
        size += n as u64;
        file.write_all(&buffer[..n]).map_err(io)?;
    }
    if size > limit {
        return Err(SourceError::Large { path: path.to_owned(), limit });
    }
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    Ok(file)
}

/// Finds the members of a tar file.
fn index(
    file: &File,
    limits: &Limits,
) -> Result<HashMap<String, Member>, crate::tarball::TarError> {
    use crate::tarball::TarError;
    let length = file.metadata()?.len();
    let mut tar = TarReader::new(Seekable(BufReader::new(file)), limits.header_bytes);
    let mut members = HashMap::new();
    let mut entries = 0;
    while let Some(entry) = tar.next_entry()? {
        entries += 1;
        if entries > limits.entries {
            break;
        }
        let Some(name) = member_name(b"", &entry.path) else { continue };
        let member = match entry.kind {
            EntryKind::File if entry.is_contiguous() => {
                if entry.position.checked_add(entry.size).is_none_or(|end| end > length) {
                    return Err(TarError::Truncated("the contents of a file"));
                }
                Member::File { position: entry.position, size: entry.size }
            }
            EntryKind::Symlink => {
                let parent = entry.path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                match member_name(&entry.path[..parent], &entry.link) {
                    Some(target) => Member::Link(target),
                    None => continue,
                }
            }
            EntryKind::HardLink => match member_name(b"", &entry.link) {
                Some(target) => Member::Link(target),
                None => continue,
            },
            _ => continue,
        };
        members.insert(name, member);
    }
    Ok(members)
}

/// `path` from directory `base` without `.` and `..`. Members with names that are not text are
/// nothing that an image refers to.
fn member_name(base: &[u8], path: &[u8]) -> Option<String> {
    let base = std::str::from_utf8(base).ok()?;
    let path = std::str::from_utf8(path).ok()?;
    let mut names: Vec<&str> = Vec::new();
    for name in base.split('/').chain(path.split('/')) {
        match name {
            "" | "." => {}
            ".." => {
                names.pop();
            }
            name => names.push(name),
        }
    }
    (!names.is_empty()).then(|| names.join("/"))
}

/// A run of bytes of a file.
struct Part<'a> {
    file: &'a File,
    position: u64,
    left: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let wanted = (buf.len() as u64).min(self.left) as usize;
        let n = self.file.read_at(&mut buf[..wanted], self.position)?;
        self.position += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn member_names_are_normalised() {
        assert_eq!(member_name(b"", b"./blobs//sha256/x").unwrap(), "blobs/sha256/x");
        assert_eq!(member_name(b"a/b", b"../c/layer.tar").unwrap(), "a/c/layer.tar");
        assert_eq!(member_name(b"", b"../../x").unwrap(), "x");
        assert_eq!(member_name(b"", b"./"), None);
        assert_eq!(member_name(b"", b"\xff"), None);
    }
}
