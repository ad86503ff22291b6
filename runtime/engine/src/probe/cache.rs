//! The trial machine's figures, kept for the boot of the host.
//!
//! The file is only a short cut: one that is damaged, belongs to somebody else, could have been
//! written by somebody else, or tells of another boot, kernel or device is as good as none. It may
//! stand in a directory that others can write to.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use serde::{Deserialize, Serialize};

use super::facts::{RunEnd, Trial};

/// Version of the file's form, and of what the trial does.
const VERSION: u32 = 1;

/// Most bytes of the file: one of ours has a few hundred.
const MAX_SIZE: u64 = 16 << 10;

/// Where the figures are kept.
#[derive(Debug, Clone)]
pub struct Cache {
    path: PathBuf,
    read: bool,
}

/// What the figures hold for. Loading KVM's module anew makes a new device file, and so does what
/// changes its permissions in effect (`ctime`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Key {
    boot_id: String,
    kernel: String,
    uid: u32,
    /// Device number of the file system, inode, device number of the device.
    device: [u64; 3],
    mode: u32,
    owner: [u32; 2],
    /// Seconds and nanoseconds.
    modified: [i64; 2],
    changed: [i64; 2],
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    version: u32,
    key: Key,
    trial: Trial,
}

impl Cache {
    /// A cache in the file `path`, whose directory exists.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), read: true }
    }

    /// The same, but what is in the file is not believed, only replaced.
    pub fn renewed(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), read: false }
    }

    /// The trial of this open device, if it was made during this boot.
    pub(super) fn read(&self, device: &File) -> Option<Trial> {
        if !self.read {
            return None;
        }
        let text = read_own(&self.path).ok()?;
        let entry: Entry = serde_json::from_slice(&text).ok()?;
        let fits = entry.version == VERSION && Some(entry.key) == Key::of(device);
        (fits && lasts(&entry.trial)).then_some(entry.trial)
    }

    /// Keeps a trial, if it would go the same way again. That this fails is no reason to fail.
    pub(super) fn keep(&self, device: &File, trial: &Trial) {
        if !lasts(trial) || self.read(device).as_ref() == Some(trial) {
            return;
        }
        let Some(key) = Key::of(device) else { return };
        let entry = Entry { version: VERSION, key, trial: trial.clone() };
        if let Err(e) = replace(&self.path, &entry) {
            tracing::debug!("{}: {e}", self.path.display());
        }
    }
}

/// Whether a second trial would end as this one. What is for want of time or of a resource, or
/// because of another hypervisor, may be different in a moment.
fn lasts(trial: &Trial) -> bool {
    let Trial::Ran(measured) = trial else { return false };
    let ends = measured.instructions.iter().map(|i| &i.end).chain([&measured.integer.end]);
    let passing = |end: &RunEnd| matches!(end, RunEnd::Overdue | RunEnd::Refused { .. });
    !ends.into_iter().any(passing)
}

impl Key {
    fn of(device: &File) -> Option<Self> {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let kernel = nix::sys::utsname::uname().ok()?;
        let metadata = device.metadata().ok()?;
        Some(Self {
            boot_id: boot_id.trim().to_owned(),
            kernel: format!(
                "{} {}",
                kernel.release().to_string_lossy(),
                kernel.version().to_string_lossy()
            ),
            uid: nix::unistd::geteuid().as_raw(),
            device: [metadata.dev(), metadata.ino(), metadata.rdev()],
            mode: metadata.mode(),
            owner: [metadata.uid(), metadata.gid()],
            modified: [metadata.mtime(), metadata.mtime_nsec()],
            changed: [metadata.ctime(), metadata.ctime_nsec()],
        })
    }
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
fn replace(path: &Path, entry: &Entry) -> io::Result<()> {
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

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
