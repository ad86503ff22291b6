//! The trial machine's figures, kept for the boot of the host.
//!
//! The file is only a short cut: one that tells of another boot, kernel or device is as good as none.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::facts::{RunEnd, Trial};
use crate::kept;

/// Version of the file's form, and of what the trial does.
const VERSION: u32 = 1;

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
        let entry: Entry = kept::read(&self.path)?;
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
        if let Err(e) = kept::replace(&self.path, &entry) {
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
        let kernel = nix::sys::utsname::uname().ok()?;
        let metadata = device.metadata().ok()?;
        Some(Self {
            boot_id: kept::boot_id()?,
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

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
