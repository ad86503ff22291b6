//! The file system that the host shares.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use mvm_devices::EventLoop;
use mvm_devices::packets::Packets;
use mvm_devices::virtio::fs::{Fs, FsConfig, FsError, Gone};

/// A file system that another process serves.
#[derive(Debug)]
pub struct SharedFiles {
    /// What the guest mounts it by.
    pub tag: String,
    /// The channel to the server.
    pub channel: OwnedFd,
}

/// Makes the device; `on_gone` is told when its server is gone.
pub(super) fn open(
    files: SharedFiles,
    on_gone: Gone,
    events: &EventLoop,
) -> Result<Arc<Fs>, FsError> {
    let SharedFiles { tag, channel } = files;
    let config = FsConfig { name: "mvm-fs".into(), tag, channel: Packets::from(channel), on_gone };
    Fs::new(config, events)
}
