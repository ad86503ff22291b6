//! Bounds on what an image may ask of the host.

/// Bounds on what an image may ask of the host, checked while it is read, so that a hostile image
/// ends in an error that names the bound instead of in a full disk or an exhausted memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files of all layers together, holes and overwritten files included.
    pub unpacked_bytes: u64,
    /// Entries of all layers together.
    pub entries: u64,
    /// Bytes of names, link targets and extended attributes of all layers together, which are kept
    /// in memory until the image is written.
    pub metadata_bytes: u64,
    /// Device nodes of all layers together.
    pub devices: u64,
    /// Layers of one image.
    pub layers: usize,
    /// Directories below each other.
    pub depth: usize,
    /// Bytes of one JSON document (index, manifest, configuration).
    pub document_bytes: u64,
    /// Manifests and indexes that are read to find the images of one source.
    pub manifests: usize,
    /// Bytes of one tar header extension (long name, PAX record) and of one sparse map.
    pub header_bytes: u64,
}

impl Limits {
    /// Bytes of all layers together when they are decompressed: the contents, and what archives
    /// need around them.
    pub(crate) fn stream_bytes(&self) -> u64 {
        self.unpacked_bytes
            .saturating_add(self.entries.saturating_mul(4096))
            .saturating_add(self.metadata_bytes)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            unpacked_bytes: 64 << 30,
            entries: 2_000_000,
            metadata_bytes: 512 << 20,
            devices: 1_024,
            layers: 512,
            depth: 1_024,
            document_bytes: 8 << 20,
            manifests: 4_096,
            header_bytes: 1 << 20,
        }
    }
}
