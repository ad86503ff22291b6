//! `index.json`: which manifests the store has, and what they are called.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};

use oci_spec::image::{Descriptor, ImageIndex, ImageIndexBuilder, MediaType, Sha256Digest};
use std::str::FromStr;

use super::lock::Held;
use super::{Store, StoreError};
use crate::annotations::{self, Annotations};
use crate::digest::Digest;
use crate::reference::Reference;

/// The full name of an image.
const NAME: &str = "org.opencontainers.image.ref.name";
/// When the image was imported, in seconds since 1970.
const IMPORTED: &str = "mvm.imported";

/// A manifest in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) manifest: Digest,
    pub(super) size: u64,
    pub(super) names: Vec<Reference>,
    pub(super) imported: u64,
    /// What was said of the image outside its manifest.
    pub(super) annotations: Annotations,
}

/// All manifests in the store.
#[derive(Debug, Default)]
pub(super) struct Records(pub(super) Vec<Record>);

impl Records {
    /// The record of `manifest`.
    pub(super) fn get_mut(&mut self, manifest: &Digest) -> Option<&mut Record> {
        self.0.iter_mut().find(|record| record.manifest == *manifest)
    }

    pub(super) fn by_name(&self, name: &Reference) -> Option<&Record> {
        self.0.iter().find(|record| record.names.contains(name))
    }

    /// Adds a manifest, or more names for one that is there; other images lose these names.
    pub(super) fn add(&mut self, new: Record) {
        for record in &mut self.0 {
            record.names.retain(|name| !new.names.contains(name));
        }
        match self.get_mut(&new.manifest) {
            Some(record) => {
                record.names.extend(new.names);
                record.imported = new.imported;
                record.annotations = new.annotations;
            }
            None => self.0.push(new),
        }
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let index: ImageIndex = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let mut records = Self::default();
        for descriptor in index.manifests() {
            let text = descriptor.digest().to_string();
            let manifest = text.parse().map_err(|e: crate::DigestError| e.to_string())?;
            let annotation = |key| descriptor.annotations().as_ref()?.get(key).cloned();
            let name = annotation(NAME).map(|name: String| name.parse::<Reference>());
            let names = name.transpose().map_err(|e| e.to_string())?.into_iter();
            let imported = annotation(IMPORTED).and_then(|text| text.parse().ok()).unwrap_or(0);
            match records.get_mut(&manifest) {
                Some(record) => record.names.extend(names),
                None => records.0.push(Record {
                    manifest,
                    size: descriptor.size(),
                    names: names.collect(),
                    imported,
                    annotations: annotations::merged(&Annotations::new(), descriptor.annotations()),
                }),
            }
        }
        Ok(records)
    }

    fn to_json(&self) -> Result<Vec<u8>, String> {
        let mut manifests = Vec::new();
        for record in &self.0 {
            let digest =
                Sha256Digest::from_str(&record.manifest.hex()).map_err(|e| e.to_string())?;
            let descriptor = |name: Option<&Reference>| {
                let said = record.annotations.iter();
                let mut annotations: HashMap<_, _> =
                    said.map(|(key, value)| (key.clone(), value.clone())).collect();
                annotations.insert(IMPORTED.to_owned(), record.imported.to_string());
                annotations.extend(name.map(|name| (NAME.to_owned(), name.canonical())));
                let mut descriptor =
                    Descriptor::new(MediaType::ImageManifest, record.size, digest.clone());
                descriptor.set_annotations(Some(annotations));
                descriptor
            };
            match record.names.is_empty() {
                true => manifests.push(descriptor(None)),
                false => manifests.extend(record.names.iter().map(|name| descriptor(Some(name)))),
            }
        }
        let index = ImageIndexBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageIndex)
            .manifests(manifests)
            .build()
            .map_err(|e| e.to_string())?;
        serde_json::to_vec_pretty(&index).map_err(|e| e.to_string())
    }
}

impl Store {
    /// What the index says now.
    pub(super) fn records(&self) -> Result<Records, StoreError> {
        let path = self.root.join("index.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Records::default()),
            Err(e) => return Err(StoreError::io("read", &path)(e)),
        };
        Records::parse(&bytes).map_err(|reason| StoreError::Index { path, reason })
    }

    /// Replaces the index. `_lock` has been held since the records were read.
    pub(super) fn write_records(&self, records: &Records, _lock: &Held) -> Result<(), StoreError> {
        let path = self.root.join("index.json");
        let bytes =
            records.to_json().map_err(|reason| StoreError::Index { path: path.clone(), reason })?;
        let mut file = self.temporary()?;
        file.write_all(&bytes).map_err(StoreError::io("write", &path))?;
        self.keep(file, &path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(manifest: &[u8], names: &[&str]) -> Record {
        Record {
            manifest: Digest::of(manifest),
            size: 7,
            names: names.iter().map(|name| name.parse().unwrap()).collect(),
            imported: 5,
            annotations: [("com.example.key".to_owned(), "value".to_owned())].into(),
        }
    }

    #[test]
    fn records_survive_the_index() {
        let mut records = Records::default();
        records.add(record(b"a", &["a", "b:1"]));
        records.add(record(b"b", &[]));
        let again = Records::parse(&records.to_json().unwrap()).unwrap();
        assert_eq!(again.0, records.0);
    }

    #[test]
    fn add_moves_names_to_the_new_image() {
        let mut records = Records::default();
        records.add(record(b"a", &["a", "b"]));
        records.add(record(b"b", &["a"]));
        assert_eq!(records.0[0].names, [("b".parse().unwrap())]);
        assert_eq!(records.by_name(&"a".parse().unwrap()).unwrap().manifest, Digest::of(b"b"));
        records.add(record(b"a", &["c"]));
        assert_eq!(records.0.len(), 2);
        assert_eq!(records.0[0].names.len(), 2);
    }
}
