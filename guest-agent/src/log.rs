//! Messages to the kernel log, so that the console tail the host shows has them in order with the
//! kernel's own; to standard error where there is no kernel log to write. And what the kernel says there.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::OnceLock;

/// The kernel log: a read or write is a record (Linux: Documentation/ABI/testing/dev-kmsg).
const DEVICE: &str = "/dev/kmsg";

/// The longest record, bytes (PRINTK_MESSAGE_MAX).
const MAX_RECORD: usize = 2048;

/// The most records that are looked at after a failure, and that are told of it.
const MAX_LOOK: usize = 256;
const MAX_TOLD: usize = 4;

static KMSG: OnceLock<File> = OnceLock::new();

/// Opens the kernel log; before that, messages go to standard error.
pub fn use_kernel_log() {
    if let Ok(file) = OpenOptions::new().write(true).open(DEVICE) {
        let _ = KMSG.set(file);
    }
}

/// Writes one line at a kernel log level (3 error, 4 warning, 6 information).
pub fn write(level: u8, message: fmt::Arguments<'_>) {
    let line = match KMSG.get() {
        Some(_) => format!("<{level}>mvm-agent: {message}\n"),
        None => format!("mvm-agent: {message}\n"),
    };
    // The kernel log takes one record by one write. A log that cannot be written is no reason to stop.
    let _ = match KMSG.get() {
        Some(mut file) => file.write_all(line.as_bytes()),
        None => std::io::stderr().write_all(line.as_bytes()),
    };
}

/// A moment, after which the kernel may say why it refuses something: file systems tell their reasons to the log alone.
#[derive(Debug)]
pub struct Since(Option<File>);

impl Since {
    /// This moment.
    pub fn now() -> Self {
        let mut options = OpenOptions::new();
        let opened = options.read(true).custom_flags(libc::O_NONBLOCK).open(DEVICE);
        Self(opened.and_then(|mut log| log.seek(SeekFrom::End(0)).map(|_| log)).ok())
    }

    /// The last of what has been said of `subject` since then; nothing if that cannot be told.
    pub fn said_of(self, subject: &str) -> String {
        let Some(mut log) = self.0 else { return String::new() };
        let mut buffer = [0; MAX_RECORD];
        let mut told: Vec<String> = Vec::new();
        for _ in 0..MAX_LOOK {
            match log.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    let said = buffer.get(..n).and_then(text);
                    told.extend(said.filter(|text| text.contains(subject)));
                }
                // Some have been overwritten meanwhile.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        told.drain(..told.len().saturating_sub(MAX_TOLD));
        told.join("; ")
    }
}

/// What a record says: what follows a semicolon, up to the end of the line. Lines of data follow.
fn text(record: &[u8]) -> Option<String> {
    let start = record.iter().position(|b| *b == b';')?.checked_add(1)?;
    let text = record.get(start..)?.split(|b| *b == b'\n').next()?;
    Some(String::from_utf8_lossy(text).trim_end().to_owned())
}

macro_rules! error {
    ($($arg:tt)*) => { $crate::log::write(3, format_args!($($arg)*)) };
}
macro_rules! warning {
    ($($arg:tt)*) => { $crate::log::write(4, format_args!($($arg)*)) };
}
macro_rules! info {
    ($($arg:tt)*) => { $crate::log::write(6, format_args!($($arg)*)) };
}
pub(crate) use {error, info, warning};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_says_what_follows_its_head() {
        let record = b"5,123,4567,-;XFS (vda): a;b \n SUBSYSTEM=block\n DEVICE=b254:0\n";
        assert_eq!(text(record).unwrap(), "XFS (vda): a;b");
        assert_eq!(text(b"5,1,2,-;"), Some(String::new()));
        assert_eq!(text(b"no record"), None);
    }

    #[test]
    fn a_log_that_cannot_be_read_says_nothing() {
        assert_eq!(Since(None).said_of("x"), "");
        // Whatever this host's says, it is none of this.
        assert_eq!(Since::now().said_of("(nothing has this name)"), "");
    }
}
