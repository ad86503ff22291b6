//! Where images come from: OCI layouts and `docker save` archives, as directories or tar files.

mod archive;
mod docker;
mod oci;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use thiserror::Error;

pub(crate) use self::archive::Archive;
pub(crate) use self::oci::is_index_document as is_index;
pub use self::oci::{Blob, needed};
use crate::annotations::Annotations;
use crate::compress::Compression;
use crate::digest::{Digest, DigestError};
use crate::limits::Limits;
use crate::platform::PlatformError;
use crate::progress::Progress;
use crate::reference::{Reference, ReferenceError};
use crate::tarball::TarError;

/// Why a file or directory is not a source of images.
#[derive(Debug, Error)]
pub enum SourceError {
    /// It cannot be read.
    #[error("{path}: {error}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// It is neither kind of image.
    #[error(
        "{path} is not an image: it has neither `index.json` (OCI layout) nor `manifest.json` \
         (`docker save`)"
    )]
    NotAnImage {
        /// The file or directory.
        path: PathBuf,
    },
    /// It is a tar file that cannot be read.
    #[error("{path} is not an image archive: {error}")]
    Tar {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: TarError,
    },
    /// It cannot be decompressed.
    #[error("{path} cannot be decompressed: {error}")]
    Decompress {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: io::Error,
    },
    /// It decompresses to more than allowed.
    #[error("{path} is larger than {limit} bytes when decompressed")]
    Large {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
    /// A part that another part refers to is not there.
    #[error("the image is incomplete: it has no `{0}`")]
    Missing(String),
    /// A JSON document is larger than allowed.
    #[error("`{name}` has {size} bytes, the limit is {limit}")]
    DocumentSize {
        /// Name of the document.
        name: String,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A JSON document is malformed.
    #[error("`{name}` is malformed: {reason}")]
    Document {
        /// Name of the document.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A digest is malformed.
    #[error("`{name}`: {error}")]
    Digest {
        /// Name of the document that has the digest.
        name: String,
        /// What is wrong with it.
        error: DigestError,
    },
    /// A document is not what its digest says.
    #[error("`{name}` is damaged: its digest is {found}")]
    Mismatch {
        /// Name of the document.
        name: String,
        /// The digest of what is there.
        found: Digest,
    },
    /// Indexes in indexes in indexes.
    #[error("indexes are nested too deeply")]
    Nested,
    /// More manifests and indexes than any image has.
    #[error("the image has more than {0} manifests and indexes")]
    Manifests(usize),
    /// None of the platforms runs here.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// The name that the caller or the archive gives the image is none.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// One name for several images.
    #[error("{path} holds several images ({names}): import it without a name, or name one of them")]
    Several {
        /// The file or directory.
        path: PathBuf,
        /// Their names.
        names: String,
    },
    /// Something that is stored as an image but is none.
    #[error("`{0}` is not a container image but an artifact of another kind")]
    Artifact(String),
}

/// What a path on the command line holds, if it is an image at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageSource {
    /// A directory with an OCI layout, or an unpacked `docker save`.
    Directory,
    /// A tar file, possibly compressed as a whole.
    Archive(Compression),
}

impl ImageSource {
    /// Looks at the beginning of `path`. `None` if nothing is there or it is nothing like an
    /// image, so that the argument may be taken for an image name.
    pub fn detect(path: &Path) -> Option<Self> {
        if path.is_dir() {
            let has = |name| path.join(name).is_file();
            return (has("index.json") || has("manifest.json")).then_some(Self::Directory);
        }
        let mut start = Vec::new();
        File::open(path).ok()?.take(512).read_to_end(&mut start).ok()?;
        match Compression::detect(&start) {
            Compression::None if start.get(257..262) == Some(b"ustar") => {
                Some(Self::Archive(Compression::None))
            }
            Compression::None => None,
            compressed => Some(Self::Archive(compressed)),
        }
    }
}

/// A blob of an image in its source.
#[derive(Debug, Clone)]
pub(crate) struct BlobSource {
    /// Name in the archive.
    pub(crate) member: String,
    /// What the blob must digest to; `docker save` does not say it of layers.
    pub(crate) digest: Option<Digest>,
    /// Bytes, where stated.
    pub(crate) size: Option<u64>,
    pub(crate) media_type: String,
}

/// An image in its source.
#[derive(Debug)]
pub(crate) struct Found {
    /// Names that it will have.
    pub(crate) names: Vec<Reference>,
    /// The manifest as it is; `docker save` has none of this kind.
    pub(crate) manifest: Option<Vec<u8>>,
    pub(crate) config: Vec<u8>,
    pub(crate) config_type: String,
    pub(crate) layers: Vec<BlobSource>,
    /// What is said of it outside its manifest.
    pub(crate) annotations: Annotations,
}

/// An image with the names that the source itself gives it.
struct Named {
    names: Vec<String>,
    found: Found,
}

/// All images of `archive` that run here. `name` replaces the name that the source gives.
pub(crate) fn images(
    archive: &Archive,
    name: Option<&str>,
    limits: &Limits,
) -> Result<Vec<Found>, SourceError> {
    let images = if archive.contains(oci::INDEX) {
        oci::images(archive, limits)?
    } else if archive.contains(docker::MANIFEST) {
        docker::images(archive, limits)?
    } else {
        return Err(SourceError::NotAnImage { path: archive.path().to_owned() });
    };
    match name {
        Some(name) => name_one(images, name.parse()?, archive.path()).map(|found| vec![found]),
        None => images.into_iter().map(|image| name_as_stated(image, archive.path())).collect(),
    }
}

/// Gives the only image, or the one that the source calls so, the name `name`.
fn name_one(mut images: Vec<Named>, name: Reference, path: &Path) -> Result<Found, SourceError> {
    if images.len() > 1 {
        let is_meant = |image: &Named| {
            image.names.iter().any(|n| n.parse::<Reference>().is_ok_and(|n| n == name))
        };
        if images.iter().filter(|image| is_meant(image)).count() != 1 {
            let names: Vec<_> = images.iter().flat_map(|image| image.names.clone()).collect();
            let names = if names.is_empty() { "without names".into() } else { names.join(", ") };
            return Err(SourceError::Several { path: path.to_owned(), names });
        }
        images.retain(is_meant);
    }
    match images.pop() {
        Some(image) => Ok(Found { names: vec![name], ..image.found }),
        None => Err(SourceError::NotAnImage { path: path.to_owned() }),
    }
}

/// Gives an image the names that the source has for it, or the file's.
fn name_as_stated(image: Named, path: &Path) -> Result<Found, SourceError> {
    let stem = stem(path);
    let mut names = Vec::new();
    for name in &image.names {
        // `docker buildx` and others state only the tag.
        let full = match (is_bare_tag(name), &stem) {
            (true, Some(stem)) => format!("{stem}:{name}"),
            _ => name.clone(),
        };
        let name: Reference = full.parse()?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if image.names.is_empty() {
        // A file name that is no image name leaves the image without one.
        names.extend(stem.and_then(|stem| stem.parse().ok()));
    }
    Ok(Found { names, ..image.found })
}

/// True for `latest`, `1.36` or `v2`, which are tags rather than names of images.
fn is_bare_tag(name: &str) -> bool {
    let numbered = name.strip_prefix('v').unwrap_or(name);
    !name.contains(['/', ':', '@'])
        && (name == "latest" || numbered.starts_with(|c: char| c.is_ascii_digit()))
}

/// The file's name without the endings that archives have.
fn stem(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let mut name = path.file_name()?.to_str()?;
    for ending in [".gz", ".zst", ".tgz", ".tar", ".oci", ".docker"] {
        name = name.strip_suffix(ending).unwrap_or(name);
    }
    Some(name.to_lowercase())
}

/// Opens `path`, decompressing it into `temporary()` if it is compressed as a whole.
pub(crate) fn open(
    path: &Path,
    temporary: &mut dyn FnMut() -> io::Result<File>,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<Archive, SourceError> {
    Archive::open(path, temporary, limits, progress)
}

/// Parses a JSON document.
fn json<T: serde::de::DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, SourceError> {
    serde_json::from_slice(bytes)
        .map_err(|e| SourceError::Document { name: name.to_owned(), reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_tags_are_told_from_names() {
        for (name, bare) in [
            ("latest", true),
            ("1.36", true),
            ("v2", true),
            ("busybox", false),
            ("vim", false),
            ("a:1", false),
        ] {
            assert_eq!(is_bare_tag(name), bare, "{name}");
        }
    }

    #[test]
    fn detect_knows_images_from_other_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        assert_eq!(ImageSource::detect(&file("text", b"hello")), None);
        assert_eq!(ImageSource::detect(&dir.path().join("missing")), None);
        assert_eq!(ImageSource::detect(dir.path()), None);
        let gzip = ImageSource::Archive(Compression::Gzip);
        assert_eq!(ImageSource::detect(&file("a.tgz", &[0x1f, 0x8b, 8])), Some(gzip));
        file("index.json", b"{}");
        assert_eq!(ImageSource::detect(dir.path()), Some(ImageSource::Directory));
    }
}
