//! Takes images from archives and directories into the store.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use oci_spec::image::{Descriptor, ImageManifestBuilder, MediaType, SCHEMA_VERSION, Sha256Digest};
use tempfile::NamedTempFile;
use thiserror::Error;

use super::index::Record;
use super::{Store, StoreError};
use crate::compress::Compression;
use crate::digest::{Digest, Hashing};
use crate::image::{self, Image, ImageError};
use crate::progress::{Progress, Watched};
use crate::source::{self, Archive, BlobSource, Found, SourceError};
use crate::unpack::Input;

/// Why an image could not be imported. Nothing of it is in the store then.
#[derive(Debug, Error)]
pub enum ImportError {
    /// The file or directory is not an image, or not one for this host.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The image contradicts itself.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A layer is not what its digest says.
    #[error("layer {number} (`{member}`) is damaged: its digest is {found} instead of {expected}")]
    Digest {
        /// Number of the layer, from 1.
        number: usize,
        /// Name in the source.
        member: String,
        /// Digest of what is there.
        found: Digest,
        /// Digest that the manifest states.
        expected: Digest,
    },
    /// A layer is not as large as its manifest says.
    #[error("layer {number} (`{member}`) is damaged: it has {found} bytes instead of {expected}")]
    Size {
        /// Number of the layer, from 1.
        number: usize,
        /// Name in the source.
        member: String,
        /// Bytes that are there.
        found: u64,
        /// Bytes that the manifest states.
        expected: u64,
    },
    /// The source cannot be read to its end.
    #[error("layer {number} (`{member}`) cannot be read: {error}")]
    Read {
        /// Number of the layer, from 1.
        number: usize,
        /// Name in the source.
        member: String,
        /// What the system says.
        error: io::Error,
    },
    /// The store failed, or a layer was refused ([`StoreError::Unpack`]).
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Blobs that are complete and checked but not yet in the store.
#[derive(Default)]
struct Staged(HashMap<Digest, NamedTempFile>);

impl Store {
    /// Imports what `path` holds: an OCI layout or a `docker save` archive, as a directory or tar
    /// file, compressed or not. `name` replaces the name that the source gives the image.
    ///
    /// Layers are checked and unpacked at once, so that an imported image is one that can be run.
    /// A source may hold several images; each is imported completely or not at all.
    ///
    /// # Errors
    ///
    /// See [`ImportError`].
    pub fn import_path(
        &self,
        path: &Path,
        name: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>, ImportError> {
        let adding = self.lock_for_adding()?;
        let imported = self.import_all(path, name, progress);
        drop(adding);
        if imported.is_err() {
            // What was complete but is not in the index (a disk that became full at the very end).
            if let Err(error) = self.collect_if_idle() {
                tracing::debug!(%error, "cannot clean up after a failed import");
            }
        }
        imported
    }

    fn import_all(
        &self,
        path: &Path,
        name: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>, ImportError> {
        let archive = source::open(path, &mut || self.unnamed(), &self.limits, progress).map_err(
            |error| match error {
                SourceError::Io { error, .. } if super::is_full(&error) => {
                    StoreError::NoSpace { path: self.temporary_dir() }.into()
                }
                error => ImportError::from(error),
            },
        )?;
        source::images(&archive, name, &self.limits)?
            .into_iter()
            .map(|found| self.import_one(&archive, found, progress))
            .collect()
    }

    fn import_one(
        &self,
        archive: &Archive,
        found: Found,
        progress: &dyn Progress,
    ) -> Result<Image, ImportError> {
        // Before anything large is copied: is this an image for us at all?
        let configuration = image::parse_config(&found.config)?;
        let diff_ids = image::diff_ids(&configuration)?;
        image::check_layers(found.layers.len(), &diff_ids, &self.limits)?;

        let mut staged = Staged::default();
        let mut layers = Vec::new();
        let count = found.layers.len();
        for (number, (layer, diff_id)) in (1..).zip(found.layers.iter().zip(&diff_ids)) {
            image::check_layer_type(number, &layer.media_type)?;
            progress.begin(&format!("copy layer {number}/{count}"), layer.size);
            layers.push(self.stage_layer(
                archive,
                layer,
                diff_id,
                number,
                &mut staged,
                progress,
            )?);
            progress.end();
        }
        let manifest = match found.manifest {
            Some(manifest) => manifest,
            None => self.make_manifest(&found.config, &found.config_type, &layers, &staged)?,
        };
        self.stage_bytes(&found.config, &mut staged)?;
        self.stage_bytes(&manifest, &mut staged)?;
        let mut image = Image::new(&manifest, found.config, &self.limits)?;
        image.add_annotations(&found.annotations);
        image.names = found.names;
        image.imported =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());

        let key = image.rootfs_key();
        let _building = self.lock_rootfs(&key)?;
        let rootfs = self.rootfs_path(&key);
        let built = if rootfs.exists() {
            None
        } else {
            let inputs = image.layers.iter().map(|layer| {
                let reader = match staged.0.get(&layer.digest) {
                    Some(file) => file.reopen()?,
                    None => File::open(self.blob(&layer.digest))?,
                };
                let image::Layer { digest, diff_id, size, .. } = *layer;
                Ok(Input { reader, size, digest, diff_id })
            });
            Some(self.build_rootfs(&key, inputs, progress)?)
        };

        for (digest, file) in staged.0 {
            self.keep(file, &self.blob(&digest))?;
        }
        if let Some(file) = built {
            self.keep(file, &rootfs)?;
        }
        let index = self.lock_index()?;
        let mut records = self.records()?;
        records.add(Record {
            manifest: image.manifest,
            size: manifest.len() as u64,
            names: image.names.clone(),
            imported: image.imported,
            annotations: found.annotations,
        });
        self.write_records(&records, &index)?;
        Ok(image)
    }

    /// Copies a layer next to the store's blobs and returns its digest.
    fn stage_layer(
        &self,
        archive: &Archive,
        layer: &BlobSource,
        diff_id: &Digest,
        number: usize,
        staged: &mut Staged,
        progress: &dyn Progress,
    ) -> Result<Digest, ImportError> {
        let member = || layer.member.clone();
        let (reader, size) = archive.open_member(&layer.member)?;
        if let Some(expected) = layer.size.filter(|expected| *expected != size) {
            return Err(ImportError::Size { number, member: member(), found: size, expected });
        }
        // Layers of `docker save` are named by nothing, but uncompressed: digest and diff-id are
        // the same, and the one that is in the store has been checked.
        for known in [layer.digest, Some(*diff_id)].into_iter().flatten() {
            let in_store = self.blob(&known).metadata().is_ok_and(|blob| blob.len() == size);
            let expected = layer.digest.is_none_or(|digest| digest == known);
            if expected && (in_store || staged.0.contains_key(&known)) {
                return Ok(known);
            }
        }
        let mut file = self.temporary()?;
        let mut reader = Hashing::new(Watched { inner: reader, progress });
        let mut buffer = vec![0; 256 << 10];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => file
                    .write_all(&buffer[..n])
                    .map_err(StoreError::io("write", &self.temporary_dir()))?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ImportError::Read { number, member: member(), error }),
            }
        }
        if reader.count() != size {
            let found = reader.count();
            return Err(ImportError::Size { number, member: member(), found, expected: size });
        }
        let found = reader.finish();
        if let Some(expected) = layer.digest.filter(|expected| *expected != found) {
            return Err(ImportError::Digest { number, member: member(), found, expected });
        }
        staged.0.insert(found, file);
        Ok(found)
    }

    fn stage_bytes(&self, bytes: &[u8], staged: &mut Staged) -> Result<(), StoreError> {
        let digest = Digest::of(bytes);
        if self.blob(&digest).exists() || staged.0.contains_key(&digest) {
            return Ok(());
        }
        let mut file = self.temporary()?;
        file.write_all(bytes).map_err(StoreError::io("write", &self.temporary_dir()))?;
        staged.0.insert(digest, file);
        Ok(())
    }

    /// The manifest of an image that came without one.
    fn make_manifest(
        &self,
        config: &[u8],
        config_type: &str,
        layers: &[Digest],
        staged: &Staged,
    ) -> Result<Vec<u8>, ImportError> {
        let broken = |e: oci_spec::OciSpecError| ImageError::Manifest(e.to_string());
        let descriptor = |media_type: &str, size, digest: &Digest| {
            let digest = Sha256Digest::from_str(&digest.hex()).map_err(broken)?;
            Ok::<_, ImportError>(Descriptor::new(MediaType::from(media_type), size, digest))
        };
        let layers = layers
            .iter()
            .map(|digest| {
                let path = match staged.0.get(digest) {
                    Some(file) => file.path().to_owned(),
                    None => self.blob(digest),
                };
                let read = || {
                    let mut start = Vec::new();
                    let file = File::open(&path)?;
                    (&file).take(4).read_to_end(&mut start)?;
                    Ok((file.metadata()?.len(), Compression::detect(&start)))
                };
                let (size, compression) = read().map_err(StoreError::io("read", &path))?;
                let media_type = match compression {
                    Compression::None => "application/vnd.oci.image.layer.v1.tar",
                    Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
                    Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
                };
                descriptor(media_type, size, digest)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let manifest = ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageManifest)
            .config(descriptor(config_type, config.len() as u64, &Digest::of(config))?)
            .layers(layers)
            .build()
            .map_err(broken)?;
        Ok(serde_json::to_vec(&manifest).map_err(|e| ImageError::Manifest(e.to_string()))?)
    }
}
