//! The file system that the host shares.

use serde::{Deserialize, Serialize};

use super::FdIndex;

/// A virtio-fs device. Another process serves it, which gets guest RAM over the channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// What the guest mounts it by, 1 to 36 bytes.
    pub tag: String,
    /// The device's end of the channel to the file server (`SOCK_SEQPACKET`).
    pub channel: FdIndex,
}
