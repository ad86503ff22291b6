//! Small files with what was measured on this host, kept until its next boot.
//!
//! Such a file is only a short cut: one that is damaged, belongs to somebody else or could have been
//! written by somebody else is as good as none. It may stand in a directory that others can write to.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Most bytes of a file: one of ours has a few hundred.
const MAX_SIZE: u64 = 16 << 10;

/// What this boot of the host is called.
pub(crate) fn boot_id() -> Option<String> {
    Some(fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned())
}

/// What is in the file, if it is one of ours.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&read_own(path).ok()?).ok()
}

/// Reads a file that only this user can have written.
fn read_own(path: &Path) -> io::Result<Vec<u8>> {
    let mut options = File::options();
    // Not through a link, and without waiting for whoever has the other end of a pipe.
    let file = options.read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    let own = metadata.is_file()
        && metadata.uid() == nix::unistd::geteuid().as_raw()
        && metadata.mode() & 0o022 == 0
        && metadata.len() <= MAX_SIZE;
    if !own {
        return Err(io::Error::other("it is not a file of ours"));
    }
    let mut text = Vec::new();
    file.take(MAX_SIZE).read_to_end(&mut text)?;
    Ok(text)
}

/// Replaces the file in one step: a reader sees the old or the new one.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn replace(path: &Path, entry: &impl Serialize) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let next = path.with_file_name(name);
    let text = serde_json::to_vec(entry)?;
    // One that a former process with our id left, or that somebody put there.
    let _ = fs::remove_file(&next);
    let mut options = File::options();
    let written = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&next)
        .and_then(|mut file| file.write_all(&text))
        .and_then(|()| fs::rename(&next, path));
    if written.is_err() {
        let _ = fs::remove_file(&next);
    }
    written
}
