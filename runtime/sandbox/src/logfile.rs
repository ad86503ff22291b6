//! What a container wrote, kept for `mvm logs`.
//!
//! Two files of bounded size take turns, so that a talkative container cannot fill the disk. Each
//! is a sequence of records: one byte stream (1 or 2), three bytes zero, four bytes length and
//! eight bytes time (little-endian, milliseconds since 1970), then the bytes as they came.

use std::fs::{self, File};
use std::io::{self, IoSlice, Read, Write};
use std::path::{Path, PathBuf};

use crate::state::now_ms;

/// Name of the file that is written; the one before it has `.1` after it.
const LOG_FILE: &str = "output.log";

/// Size at which the files change turns.
const MAX_FILE: u64 = 16 << 20;

/// Bytes of a record before its data.
const HEADER: usize = 16;

/// Longest data of a record that is believed.
const MAX_RECORD: u32 = 4 << 20;

/// Which stream something was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Writes a container's log.
#[derive(Debug)]
pub struct LogWriter {
    dir: PathBuf,
    file: File,
    written: u64,
    max: u64,
}

impl LogWriter {
    /// A new log in `dir`.
    pub fn create(dir: &Path) -> io::Result<Self> {
        Self::with_limit(dir, MAX_FILE)
    }

    fn with_limit(dir: &Path, max: u64) -> io::Result<Self> {
        let file = File::create(dir.join(LOG_FILE))?;
        Ok(Self { dir: dir.to_owned(), file, written: 0, max })
    }

    /// Appends one record.
    pub fn write(&mut self, source: Source, data: &[u8]) -> io::Result<()> {
        if self.written >= self.max {
            let path = self.dir.join(LOG_FILE);
            fs::rename(&path, path.with_extension("log.1"))?;
            self.file = File::create(&path)?;
            self.written = 0;
        }
        for piece in data.chunks(MAX_RECORD as usize) {
            let mut header = [0; HEADER];
            header[0] = if source == Source::Stdout { 1 } else { 2 };
            let len = u32::try_from(piece.len()).unwrap_or(MAX_RECORD);
            header[4..8].copy_from_slice(&len.to_le_bytes());
            header[8..].copy_from_slice(&now_ms().to_le_bytes());
            let total = HEADER + piece.len();
            let mut done =
                self.file.write_vectored(&[IoSlice::new(&header), IoSlice::new(piece)])?;
            if done < HEADER {
                self.file.write_all(&header[done..])?;
                done = HEADER;
            }
            self.file.write_all(&piece[done - HEADER..])?;
            self.written += total as u64;
        }
        Ok(())
    }
}

/// Reads a container's log while it may still grow.
#[derive(Debug)]
pub struct LogReader {
    dir: PathBuf,
    older: Option<File>,
    current: Option<File>,
    pending: Vec<u8>,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it was written to.
    pub source: Source,
    /// When, milliseconds since 1970.
    pub time: u64,
    /// The bytes.
    pub data: Vec<u8>,
}

impl LogReader {
    /// The log in `dir`, from its beginning.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let open = |path: PathBuf| match File::open(path) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        };
        let path = dir.join(LOG_FILE);
        // The current one first: if they change turns in between, a part is read twice at worst
        // rather than lost, and the next line sees to that it is not.
        let current = open(path.clone())?;
        let older = open(path.with_extension("log.1"))?;
        let same = match (&current, &older) {
            (Some(a), Some(b)) => inode(a)? == inode(b)?,
            _ => false,
        };
        let (older, current) = if same { (older, None) } else { (older, current) };
        Ok(Self { dir: dir.to_owned(), older, current, pending: Vec::new() })
    }

    /// The next whole record, or `None` at the present end.
    pub fn next_record(&mut self) -> io::Result<Option<Record>> {
        loop {
            if let Some(record) = self.take_record()? {
                return Ok(Some(record));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    fn take_record(&mut self) -> io::Result<Option<Record>> {
        let Some((header, rest)) = self.pending.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let source = match header[0] {
            1 => Source::Stdout,
            2 => Source::Stderr,
            _ => return Err(damaged()),
        };
        let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        if len > MAX_RECORD {
            return Err(damaged());
        }
        let len = len as usize;
        if rest.len() < len {
            return Ok(None);
        }
        let mut time = [0; 8];
        time.copy_from_slice(&header[8..]);
        let data = rest[..len].to_vec();
        self.pending.drain(..HEADER + len);
        Ok(Some(Record { source, time: u64::from_le_bytes(time), data }))
    }

    /// Reads on; `false` at the present end.
    fn fill(&mut self) -> io::Result<bool> {
        if let Some(older) = &mut self.older {
            if read_some(older, &mut self.pending)? {
                return Ok(true);
            }
            self.older = None;
            self.pending.clear();
        }
        let path = self.dir.join(LOG_FILE);
        if let Some(current) = &mut self.current {
            if read_some(current, &mut self.pending)? {
                return Ok(true);
            }
            // At its end: has another taken its turn?
            match File::open(&path) {
                Ok(next) if inode(&next)? != inode(current)? => {
                    // What was appended between the last read and the change of turns.
                    if read_some(current, &mut self.pending)? {
                        return Ok(true);
                    }
                    self.current = Some(next);
                    self.pending.clear();
                    return Ok(true);
                }
                _ => return Ok(false),
            }
        }
        match File::open(&path) {
            Ok(file) => {
                self.current = Some(file);
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// The directory to watch for growth.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

fn read_some(file: &mut File, into: &mut Vec<u8>) -> io::Result<bool> {
    Ok(file.take(1 << 20).read_to_end(into)? > 0)
}

fn inode(file: &File) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the container's log is damaged")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(reader: &mut LogReader) -> Vec<(Source, String)> {
        let mut out = Vec::new();
        while let Some(record) = reader.next_record().unwrap() {
            out.push((record.source, String::from_utf8(record.data).unwrap()));
        }
        out
    }

    #[test]
    fn records_come_back_in_order_and_growth_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::create(dir.path()).unwrap();
        writer.write(Source::Stdout, b"one").unwrap();
        writer.write(Source::Stderr, b"two").unwrap();
        let mut reader = LogReader::open(dir.path()).unwrap();
        let want = [(Source::Stdout, "one".to_owned()), (Source::Stderr, "two".to_owned())];
        assert_eq!(text(&mut reader), want);
        writer.write(Source::Stdout, b"three").unwrap();
        assert_eq!(text(&mut reader), [(Source::Stdout, "three".to_owned())]);
    }

    #[test]
    fn size_is_bounded_and_a_follower_crosses_the_change() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::with_limit(dir.path(), 100).unwrap();
        let mut reader = LogReader::open(dir.path()).unwrap();
        let mut seen = Vec::new();
        for n in 0..50 {
            writer.write(Source::Stdout, format!("{n}").as_bytes()).unwrap();
            seen.extend(text(&mut reader).into_iter().map(|(_, s)| s));
        }
        assert_eq!(seen, (0..50).map(|n| n.to_string()).collect::<Vec<_>>());
        let size: u64 =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert!(size < 300, "{size}");
        let late = text(&mut LogReader::open(dir.path()).unwrap());
        assert_eq!(late.last().unwrap().1, "49");
        assert!(late.len() >= 6);
    }

    #[test]
    fn no_log_reads_as_empty_and_a_damaged_one_as_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(LogReader::open(dir.path()).unwrap().next_record().unwrap().is_none());
        fs::write(dir.path().join(LOG_FILE), [9; 64]).unwrap();
        assert!(LogReader::open(dir.path()).unwrap().next_record().is_err());
    }
}
