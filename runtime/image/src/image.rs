//! An image in the store: its documents, checked and understood.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use oci_spec::image::{ImageConfiguration, ImageManifest};
use serde::Serialize;
use thiserror::Error;

use crate::digest::{Digest, DigestError};
use crate::limits::Limits;
use crate::platform::{Platform, PlatformError};
use crate::reference::Reference;

/// Why the documents of an image do not make sense.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The configuration is malformed.
    #[error("the image's configuration is malformed: {0}")]
    Config(String),
    /// The manifest is malformed.
    #[error("the image's manifest is malformed: {0}")]
    Manifest(String),
    /// A digest is malformed.
    #[error("the image's configuration or manifest has a malformed digest: {0}")]
    Digest(#[from] DigestError),
    /// Manifest and configuration disagree.
    #[error("the image has {layers} layers, but its configuration lists {diff_ids}")]
    LayerCount {
        /// Layers of the manifest.
        layers: usize,
        /// Layers of the configuration.
        diff_ids: usize,
    },
    /// More layers than allowed.
    #[error("the image has {layers} layers, the limit is {limit}")]
    Layers {
        /// Layers of the image.
        layers: usize,
        /// The limit.
        limit: usize,
    },
    /// A kind of layer that cannot be unpacked.
    #[error("layer {number} is of type `{media_type}`, which is not supported")]
    LayerType {
        /// Number of the layer, from 1.
        number: usize,
        /// Its media type.
        media_type: String,
    },
    /// The image is for other machines.
    #[error(transparent)]
    Platform(#[from] PlatformError),
}

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Digest of the layer as it is stored.
    pub digest: Digest,
    /// Bytes of the layer as it is stored.
    pub size: u64,
    /// What the layer says it is.
    pub media_type: String,
    /// Digest of the layer when it is not compressed.
    pub diff_id: Digest,
    /// What the manifest says about the layer.
    pub annotations: BTreeMap<String, String>,
}

/// What an image says about how it is to be run. Empty where it says nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Defaults {
    /// First arguments, which a command given by the user does not replace.
    pub entrypoint: Vec<String>,
    /// Arguments that a command given by the user replaces.
    pub cmd: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// Working directory; empty means `/`.
    pub working_dir: String,
    /// `user`, `uid`, `user:group` and so on, to be looked up in the image; empty means root.
    pub user: String,
    /// Name or number of the signal that asks the process to end.
    pub stop_signal: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// `port` or `port/protocol`.
    pub exposed_ports: Vec<String>,
    /// Directories that are to be volumes.
    pub volumes: Vec<String>,
}

/// An image in the store.
#[derive(Clone)]
pub struct Image {
    pub(crate) manifest: Digest,
    pub(crate) config: Digest,
    pub(crate) names: Vec<Reference>,
    pub(crate) imported: u64,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) configuration: ImageConfiguration,
    pub(crate) raw_config: Vec<u8>,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("id", &self.config)
            .field("manifest", &self.manifest)
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

impl Image {
    /// Understands and checks the documents of an image.
    pub(crate) fn new(
        manifest: &[u8],
        raw_config: Vec<u8>,
        limits: &Limits,
    ) -> Result<Self, ImageError> {
        let digest = Digest::of(manifest);
        let manifest: ImageManifest =
            serde_json::from_slice(manifest).map_err(|e| ImageError::Manifest(e.to_string()))?;
        let configuration = parse_config(&raw_config)?;
        let diff_ids = diff_ids(&configuration)?;
        let count = manifest.layers().len();
        check_layers(count, &diff_ids, limits)?;
        let layers = manifest
            .layers()
            .iter()
            .zip(diff_ids)
            .enumerate()
            .map(|(i, (layer, diff_id))| {
                let media_type = layer.media_type().to_string();
                check_layer_type(i + 1, &media_type)?;
                let digest = layer.digest().to_string().parse()?;
                let annotations = sorted(layer.annotations());
                Ok(Layer { digest, size: layer.size(), media_type, diff_id, annotations })
            })
            .collect::<Result<_, ImageError>>()?;
        Ok(Self {
            manifest: digest,
            config: Digest::of(&raw_config),
            names: Vec::new(),
            imported: 0,
            annotations: sorted(manifest.annotations()),
            layers,
            configuration,
            raw_config,
        })
    }

    /// Adds what is said of the image outside its manifest; the manifest counts more.
    pub(crate) fn add_annotations(&mut self, said: &BTreeMap<String, String>) {
        for (key, value) in said {
            self.annotations.entry(key.clone()).or_insert_with(|| value.clone());
        }
    }

    /// The image's identity: the digest of its configuration, as with Docker.
    pub fn id(&self) -> Digest {
        self.config
    }

    /// Digest of the image's manifest.
    pub fn manifest(&self) -> Digest {
        self.manifest
    }

    /// The names that refer to the image.
    pub fn names(&self) -> &[Reference] {
        &self.names
    }

    /// When the image came into the store, in seconds since 1970.
    pub fn imported(&self) -> u64 {
        self.imported
    }

    /// Annotations of the image's manifest, and where it says nothing those of the descriptor and
    /// indexes by which it was found at import.
    pub fn annotations(&self) -> &BTreeMap<String, String> {
        &self.annotations
    }

    /// The image's layers, lowest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The whole configuration.
    pub fn configuration(&self) -> &ImageConfiguration {
        &self.configuration
    }

    /// What the image is for.
    pub fn platform(&self) -> Platform {
        platform(&self.configuration)
    }

    /// When the image was made, as its configuration says (RFC 3339).
    pub fn created(&self) -> Option<&str> {
        self.configuration.created().as_deref()
    }

    /// How the image wants to be run.
    pub fn defaults(&self) -> Defaults {
        let Some(config) = self.configuration.config() else { return Defaults::default() };
        let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
        let sorted = |items: &Option<Vec<String>>| {
            let mut items = list(items);
            items.sort();
            items
        };
        Defaults {
            entrypoint: list(config.entrypoint()),
            cmd: list(config.cmd()),
            env: list(config.env()),
            working_dir: config.working_dir().clone().unwrap_or_default(),
            user: config.user().clone().unwrap_or_default(),
            stop_signal: config.stop_signal().clone().filter(|signal| !signal.is_empty()),
            labels: config.labels().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect(),
            exposed_ports: sorted(config.exposed_ports()),
            volumes: sorted(config.volumes()),
        }
    }

    /// The name under which the root file system of these layers is kept: what it depends on is
    /// the contents of the layers and the way in which images are written.
    pub(crate) fn rootfs_key(&self) -> Digest {
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| layer.diff_id).collect();
        rootfs_key(&diff_ids)
    }
}

/// Changes whenever the same layers would give another image.
const WRITER_VERSION: &str = "mvm-rootfs-1";

pub(crate) fn rootfs_key(diff_ids: &[Digest]) -> Digest {
    let text = diff_ids.iter().fold(WRITER_VERSION.to_owned(), |t, id| format!("{t}\n{id}"));
    Digest::of(text.as_bytes())
}

/// Reads a configuration and checks that it is for this kind of machine.
pub(crate) fn parse_config(bytes: &[u8]) -> Result<ImageConfiguration, ImageError> {
    let configuration: ImageConfiguration =
        serde_json::from_slice(bytes).map_err(|e| ImageError::Config(e.to_string()))?;
    let platform = platform(&configuration);
    match platform.rank() {
        Some(_) => Ok(configuration),
        None => Err(PlatformError { available: vec![platform] }.into()),
    }
}

pub(crate) fn diff_ids(configuration: &ImageConfiguration) -> Result<Vec<Digest>, ImageError> {
    configuration.rootfs().diff_ids().iter().map(|id| Ok(id.parse()?)).collect()
}

pub(crate) fn check_layers(
    layers: usize,
    diff_ids: &[Digest],
    limits: &Limits,
) -> Result<(), ImageError> {
    if layers != diff_ids.len() {
        return Err(ImageError::LayerCount { layers, diff_ids: diff_ids.len() });
    }
    if layers > limits.layers {
        return Err(ImageError::Layers { layers, limit: limits.layers });
    }
    Ok(())
}

/// Layers are tar archives, compressed or not; which, their bytes say better than their types.
pub(crate) fn check_layer_type(number: usize, media_type: &str) -> Result<(), ImageError> {
    let kind = media_type
        .strip_prefix("application/vnd.oci.image.layer.v1.")
        .or_else(|| media_type.strip_prefix("application/vnd.oci.image.layer.nondistributable.v1."))
        .or_else(|| media_type.strip_prefix("application/vnd.docker.image.rootfs.diff."))
        .or_else(|| media_type.strip_prefix("application/vnd.docker.image.rootfs.foreign.diff."));
    match kind {
        Some("tar" | "tar+gzip" | "tar+zstd" | "tar.gzip" | "tar.zstd") => Ok(()),
        _ => Err(ImageError::LayerType { number, media_type: media_type.to_owned() }),
    }
}

fn sorted(pairs: &Option<HashMap<String, String>>) -> BTreeMap<String, String> {
    pairs.iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn platform(configuration: &ImageConfiguration) -> Platform {
    let (os, architecture) =
        (configuration.os().to_string(), configuration.architecture().to_string());
    Platform::new(&os, &architecture, configuration.variant().as_deref())
}
