//! A block device of the host that is a file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device. It goes when this is dropped.
#[derive(Debug)]
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// One of so many bytes, kept in `file`; `None`, with the reason on standard error, where there can be none.
    ///
    /// # Panics
    /// If the file cannot be made.
    pub fn new(file: &Path, bytes: u64) -> Option<Self> {
        File::create(file).and_then(|f| f.set_len(bytes)).expect("a file");
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        match made {
            Ok(out) if out.status.success() => {
                Some(Self(String::from_utf8_lossy(&out.stdout).trim().into()))
            }
            Ok(out) => {
                let why = String::from_utf8_lossy(&out.stderr).trim().to_owned();
                eprintln!("\n*** SKIPPED: no loop device is to be had here: {why} ***\n");
                None
            }
            Err(e) => {
                eprintln!("\n*** SKIPPED: losetup(8) cannot be run: {e} ***\n");
                None
            }
        }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What is on it.
    ///
    /// # Panics
    /// If it cannot be read.
    pub fn content(&self) -> Vec<u8> {
        fs::read(&self.0).expect("a device")
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}
