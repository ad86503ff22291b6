//! OCI image layouts (OCI image specification, "Image Layout").

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};

use super::{Archive, BlobSource, Found, Named, SourceError, json};
use crate::annotations::{self, Annotations};
use crate::digest::Digest;
use crate::limits::Limits;
use crate::platform::{Platform, PlatformError};

/// The document that makes a directory a layout.
pub(super) const INDEX: &str = "index.json";
/// Indexes that refer to indexes.
const NESTING_MAX: usize = 4;

/// The full name that containerd and Docker give an image.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// The name, or often only the tag.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Docker's mark of manifests that describe other manifests.
const ATTESTATION: &str = "vnd.docker.reference.type";

/// All images of a layout that run here.
pub(super) fn images(archive: &Archive, limits: &Limits) -> Result<Vec<Named>, SourceError> {
    let index: ImageIndex = json(INDEX, &archive.document(INDEX, limits)?)?;
    let mut source = Source { archive, limits, left: limits.manifests };
    source.count(index.manifests().len())?;
    // Descriptors with one name are one image for several platforms.
    let mut groups: Vec<(Option<String>, Vec<Descriptor>)> = Vec::new();
    for descriptor in index.manifests() {
        let name = annotation(descriptor, CONTAINERD_NAME)
            .or_else(|| annotation(descriptor, REF_NAME))
            .map(str::to_owned);
        match groups.iter_mut().find(|(other, _)| *other == name) {
            Some((_, group)) => group.push(descriptor.clone()),
            None => groups.push((name, vec![descriptor.clone()])),
        }
    }
    let said = annotations::merged(&Annotations::new(), index.annotations());
    let mut images: Vec<(Digest, Named)> = Vec::new();
    let mut refused = Vec::new();
    for (name, group) in groups {
        match source.resolve(&group, &said, 0) {
            Ok(found) => {
                for (digest, found) in found {
                    // Several names of one image come as several descriptors.
                    match images.iter_mut().find(|(other, _)| *other == digest) {
                        Some((_, image)) => image.names.extend(name.clone()),
                        None => {
                            let names = name.clone().into_iter().collect();
                            images.push((digest, Named { names, found }));
                        }
                    }
                }
            }
            Err(SourceError::Platform(e)) => refused.extend(e.available),
            Err(e) => return Err(e),
        }
    }
    if images.is_empty() {
        return Err(PlatformError { available: refused }.into());
    }
    Ok(images.into_iter().map(|(_, image)| image).collect())
}

/// A layout that is being searched.
struct Source<'a> {
    archive: &'a Archive,
    limits: &'a Limits,
    /// Manifests and indexes that may still be looked at: small indexes can refer to each other in
    /// very many ways.
    left: usize,
}

impl Source<'_> {
    fn count(&mut self, manifests: usize) -> Result<(), SourceError> {
        self.left = self
            .left
            .checked_sub(manifests)
            .ok_or(SourceError::Manifests(self.limits.manifests))?;
        Ok(())
    }

    /// The best of `descriptors` for this host; several if they are equally good. `said` is what is
    /// said of all of them.
    fn resolve(
        &mut self,
        descriptors: &[Descriptor],
        said: &Annotations,
        depth: usize,
    ) -> Result<Vec<(Digest, Found)>, SourceError> {
        if depth > NESTING_MAX {
            return Err(SourceError::Nested);
        }
        let best = best(descriptors)?;
        let mut images = Vec::new();
        for descriptor in best {
            let (digest, bytes) = self.document(descriptor, INDEX)?;
            let said = annotations::merged(said, descriptor.annotations());
            if is_index(descriptor) {
                let index: ImageIndex = json(&digest.to_string(), &bytes)?;
                self.count(index.manifests().len())?;
                let said = annotations::merged(&said, index.annotations());
                images.extend(self.resolve(index.manifests(), &said, depth + 1)?);
            } else {
                images.push((digest, self.image(digest, bytes, said)?));
            }
        }
        Ok(images)
    }

    fn image(
        &self,
        digest: Digest,
        bytes: Vec<u8>,
        said: Annotations,
    ) -> Result<Found, SourceError> {
        let name = digest.to_string();
        let manifest: ImageManifest = json(&name, &bytes)?;
        let config_type = manifest.config().media_type().to_string();
        if !is_image_config(&config_type) {
            return Err(SourceError::Artifact(name));
        }
        let (_, config) = self.document(manifest.config(), &name)?;
        let layers = manifest
            .layers()
            .iter()
            .map(|layer| {
                let digest = parse(layer, &name)?;
                Ok(BlobSource {
                    member: member(&digest),
                    digest: Some(digest),
                    size: Some(layer.size()),
                    media_type: layer.media_type().to_string(),
                })
            })
            .collect::<Result<_, SourceError>>()?;
        let (annotations, lost) = annotations::kept(said);
        if lost > 0 {
            tracing::warn!("{lost} annotations of the index are not kept: they are too long");
        }
        let manifest = Some(bytes);
        Ok(Found { names: Vec::new(), manifest, config, config_type, layers, annotations })
    }

    /// A JSON document, checked against the descriptor that `referrer` has of it.
    fn document(
        &self,
        descriptor: &Descriptor,
        referrer: &str,
    ) -> Result<(Digest, Vec<u8>), SourceError> {
        let digest = parse(descriptor, referrer)?;
        let bytes = self.archive.document(&member(&digest), self.limits)?;
        match Digest::of(&bytes) {
            found if found == digest => Ok((digest, bytes)),
            found => Err(SourceError::Mismatch { name: member(&digest), found }),
        }
    }
}

/// Those of `descriptors` that suit this host best.
fn best(descriptors: &[Descriptor]) -> Result<Vec<&Descriptor>, PlatformError> {
    let candidates: Vec<_> = descriptors
        .iter()
        .filter(|descriptor| annotation(descriptor, ATTESTATION).is_none())
        .map(|descriptor| (platform(descriptor), descriptor))
        .collect();
    // A descriptor that does not say what it is for (the usual case for a single image) is
    // asked when its configuration is read.
    let rank = |platform: &Option<Platform>| platform.as_ref().map_or(Some(0), Platform::rank);
    let Some(best) = candidates.iter().filter_map(|(platform, _)| rank(platform)).min() else {
        let available = candidates.into_iter().filter_map(|(platform, _)| platform).collect();
        return Err(PlatformError { available });
    };
    let best = candidates.into_iter().filter(|(platform, _)| rank(platform) == Some(best));
    Ok(best.map(|(_, descriptor)| descriptor).collect())
}

/// What a document refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Its digest.
    pub digest: Digest,
    /// Bytes, as stated.
    pub size: u64,
    /// True for a manifest or index, which refers to more.
    pub is_document: bool,
}

/// Whether a document is an index rather than a manifest. It need not say so: what it is shows in
/// what it has.
pub(crate) fn is_index_document(document: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(document)
        .is_ok_and(|value| value.get("manifests").is_some())
}

/// What must be there besides `document`, a manifest or an index, for the image to be complete on
/// this host: the manifests that suit it best, or configuration and layers.
///
/// # Errors
///
/// [`SourceError`] if it is neither, or for another platform.
pub fn needed(document: &[u8], limits: &Limits) -> Result<Vec<Blob>, SourceError> {
    let name = Digest::of(document).to_string();
    let blob = |descriptor: &Descriptor, is_document| {
        let digest = parse(descriptor, &name)?;
        Ok(Blob { digest, size: descriptor.size(), is_document })
    };
    if is_index_document(document) {
        let index: ImageIndex = json(&name, document)?;
        if index.manifests().len() > limits.manifests {
            return Err(SourceError::Manifests(limits.manifests));
        }
        return best(index.manifests())?.into_iter().map(|d| blob(d, true)).collect();
    }
    let manifest: ImageManifest = json(&name, document)?;
    if !is_image_config(manifest.config().media_type().as_ref()) {
        return Err(SourceError::Artifact(name));
    }
    let config = std::iter::once(manifest.config());
    config.chain(manifest.layers()).map(|descriptor| blob(descriptor, false)).collect()
}

fn parse(descriptor: &Descriptor, document: &str) -> Result<Digest, SourceError> {
    let text = descriptor.digest().to_string();
    text.parse().map_err(|error| SourceError::Digest { name: document.to_owned(), error })
}

fn member(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn annotation<'a>(descriptor: &'a Descriptor, key: &str) -> Option<&'a str> {
    descriptor.annotations().as_ref()?.get(key).map(String::as_str).filter(|v| !v.is_empty())
}

fn platform(descriptor: &Descriptor) -> Option<Platform> {
    let platform = descriptor.platform().as_ref()?;
    let (os, architecture) = (platform.os().to_string(), platform.architecture().to_string());
    Some(Platform::new(&os, &architecture, platform.variant().as_deref()))
}

fn is_index(descriptor: &Descriptor) -> bool {
    matches!(
        descriptor.media_type().to_string().as_str(),
        "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json"
    )
}

fn is_image_config(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.config.v1+json"
            | "application/vnd.docker.container.image.v1+json"
    )
}
