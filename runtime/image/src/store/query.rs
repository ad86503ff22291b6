//! Finding images and telling about them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use super::index::{Record, Records};
use super::{Store, StoreError};
use crate::digest::Digest;
use crate::image::Image;
use crate::reference::Reference;

/// Digits of an identity that are enough to mean it.
const PREFIX_MIN: usize = 4;

/// A line of a list of images. An image with several names has several lines.
#[derive(Debug, Clone, Serialize)]
pub struct ImageSummary {
    /// The name, if the image has one.
    pub name: Option<String>,
    /// The image's identity.
    pub id: Digest,
    /// Bytes of the root file system on the host's disk; of the layers if it is not unpacked.
    pub size: u64,
    /// When the image was made (RFC 3339), as it says itself.
    pub created: Option<String>,
    /// When it came into the store, in seconds since 1970.
    pub imported: u64,
    /// What it is for.
    pub platform: String,
}

/// What the store takes on the host's disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Usage {
    /// Manifests, configurations and layers.
    pub blobs: u64,
    /// Unpacked root file systems.
    pub rootfs: u64,
    /// What is being written.
    pub temporary: u64,
}

impl Store {
    /// The image that `name` means: a name as Docker reads it, an identity (`sha256:...`) or the
    /// beginning of one.
    ///
    /// # Errors
    ///
    /// [`StoreError::NotFound`], which says how to get the image, or [`StoreError::Ambiguous`].
    pub fn resolve(&self, name: &str) -> Result<Image, StoreError> {
        let records = self.records()?;
        self.find(&records, name).and_then(|(record, _)| self.load(record))
    }

    /// The record that `name` means, and the name if it is one.
    pub(super) fn find<'a>(
        &self,
        records: &'a Records,
        name: &str,
    ) -> Result<(&'a Record, Option<Reference>), StoreError> {
        let reference = name.parse::<Reference>();
        if let Ok(reference) = &reference {
            if let Some(record) = records.by_name(reference) {
                return Ok((record, Some(reference.clone())));
            }
            if let Some(digest) = reference.digest()
                && let Some(record) = records.0.iter().find(|record| record.manifest == digest)
            {
                return Ok((record, None));
            }
        }
        if let Some(record) = self.find_by_id(records, name)? {
            return Ok((record, None));
        }
        let is_id = name.strip_prefix("sha256:").is_some_and(is_hex);
        let reference = if is_id { None } else { Some(reference?) };
        let source_name = reference.map_or_else(|| "NAME".to_owned(), |r| r.to_string());
        Err(StoreError::NotFound { name: name.to_owned(), source_name })
    }

    fn find_by_id<'a>(
        &self,
        records: &'a Records,
        name: &str,
    ) -> Result<Option<&'a Record>, StoreError> {
        let prefix = name.strip_prefix("sha256:").unwrap_or(name);
        if prefix.len() < PREFIX_MIN || !is_hex(prefix) {
            return Ok(None);
        }
        let mut found: Option<(&Record, Digest)> = None;
        for record in &records.0 {
            let id = self.load(record)?.id();
            if !id.hex().starts_with(prefix) && !record.manifest.hex().starts_with(prefix) {
                continue;
            }
            // The same image under two manifests (compressed in two ways) is one image.
            if found.is_some_and(|(_, other)| other != id) {
                return Err(StoreError::Ambiguous { prefix: prefix.to_owned() });
            }
            found = Some((record, id));
        }
        Ok(found.map(|(record, _)| record))
    }

    /// The image of a record.
    pub(super) fn load(&self, record: &Record) -> Result<Image, StoreError> {
        let manifest = self.read_blob(&record.manifest)?;
        let config = config_digest(&manifest).ok_or_else(|| StoreError::Damaged {
            path: self.blob(&record.manifest),
            reason: "not a manifest".into(),
        })?;
        let mut image = Image::new(&manifest, self.read_blob(&config)?, &self.limits)?;
        image.add_annotations(&record.annotations);
        image.names.clone_from(&record.names);
        image.imported = record.imported;
        Ok(image)
    }

    /// All images, the latest import first.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the index or an image cannot be read.
    pub fn list(&self) -> Result<Vec<ImageSummary>, StoreError> {
        let mut lines = Vec::new();
        for record in self.records()?.0 {
            let image = self.load(&record)?;
            let line = ImageSummary {
                name: None,
                id: image.id(),
                size: self.size(&image),
                created: image.created().map(str::to_owned),
                imported: record.imported,
                platform: image.platform().to_string(),
            };
            match record.names.is_empty() {
                true => lines.push(line),
                false => lines.extend(
                    record
                        .names
                        .iter()
                        .map(|name| ImageSummary { name: Some(name.to_string()), ..line.clone() }),
                ),
            }
        }
        lines.sort_by(|a, b| b.imported.cmp(&a.imported).then_with(|| a.name.cmp(&b.name)));
        Ok(lines)
    }

    /// What there is to know about an image, in the shape of `docker image inspect`.
    ///
    /// # Errors
    ///
    /// As [`Store::resolve`].
    pub fn inspect(&self, name: &str) -> Result<Value, StoreError> {
        let image = self.resolve(name)?;
        let config: Value = serde_json::from_slice(&image.raw_config)
            .map_err(|e| crate::image::ImageError::Config(e.to_string()))?;
        let field = |name: &str| config.get(name).cloned().unwrap_or(Value::Null);
        let names: Vec<_> = image.names.iter().map(Reference::to_string).collect();
        let diff_ids: Vec<_> = image.layers.iter().map(|layer| layer.diff_id).collect();
        let layers: Vec<_> = image
            .layers
            .iter()
            .map(|layer| {
                json!({"Digest": layer.digest, "Size": layer.size, "MediaType": layer.media_type})
            })
            .collect();
        Ok(json!({
            "Id": image.id(),
            "RepoTags": names,
            "Manifest": image.manifest,
            "Created": field("created"),
            "Imported": image.imported,
            "Author": field("author"),
            "Architecture": field("architecture"),
            "Variant": field("variant"),
            "Os": field("os"),
            "Size": self.size(&image),
            "Config": field("config"),
            "RootFS": {"Type": "layers", "Layers": diff_ids, "Erofs": self.rootfs_path(&image.rootfs_key())},
            "Layers": layers,
        }))
    }

    /// What the store takes on the host's disk.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] if a directory cannot be read.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        Ok(Usage {
            blobs: directory_size(&self.blobs())?,
            rootfs: directory_size(&self.rootfs_dir())?,
            temporary: directory_size(&self.temporary_dir())?,
        })
    }

    fn size(&self, image: &Image) -> u64 {
        match fs::metadata(self.rootfs_path(&image.rootfs_key())) {
            Ok(metadata) => on_disk(&metadata),
            Err(_) => image.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add),
        }
    }
}

fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Bytes that a file takes, holes excluded.
pub(super) fn on_disk(metadata: &fs::Metadata) -> u64 {
    metadata.blocks() * 512
}

fn directory_size(dir: &Path) -> Result<u64, StoreError> {
    let mut size = 0;
    for entry in fs::read_dir(dir).map_err(StoreError::io("read", dir))? {
        let entry = entry.map_err(StoreError::io("read", dir))?;
        // Files come and go while others import.
        size += entry.metadata().map_or(0, |metadata| on_disk(&metadata));
    }
    Ok(size)
}

/// The configuration that a manifest refers to.
fn config_digest(manifest: &[u8]) -> Option<Digest> {
    let manifest: Value = serde_json::from_slice(manifest).ok()?;
    manifest.get("config")?.get("digest")?.as_str()?.parse().ok()
}
