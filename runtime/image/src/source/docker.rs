//! `docker save` archives, old and new: `manifest.json` lists images by configuration and layers.

use serde::Deserialize;

use super::{Archive, BlobSource, Found, Named, SourceError, json};
use crate::annotations::Annotations;
use crate::digest::Digest;
use crate::limits::Limits;

/// The document that lists the images.
pub(super) const MANIFEST: &str = "manifest.json";

const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
/// What the manifest made for the image will say; whether it is compressed is seen in the bytes.
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    // Go writes an empty list as null.
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

/// All images of an archive.
pub(super) fn images(archive: &Archive, limits: &Limits) -> Result<Vec<Named>, SourceError> {
    let items: Vec<Item> = json(MANIFEST, &archive.document(MANIFEST, limits)?)?;
    if items.is_empty() {
        return Err(SourceError::NotAnImage { path: archive.path().to_owned() });
    }
    items.into_iter().map(|item| image(archive, item, limits)).collect()
}

fn image(archive: &Archive, item: Item, limits: &Limits) -> Result<Named, SourceError> {
    let config = archive.document(&item.config, limits)?;
    // Both styles name the configuration by its digest.
    if let Some(stated) = digest_in(&item.config) {
        let found = Digest::of(&config);
        if found != stated {
            return Err(SourceError::Mismatch { name: item.config, found });
        }
    }
    let layers = item
        .layers
        .unwrap_or_default()
        .into_iter()
        .map(|member| BlobSource {
            digest: digest_in(&member),
            size: None,
            media_type: LAYER_TYPE.to_owned(),
            member,
        })
        .collect();
    let found = Found {
        names: Vec::new(),
        manifest: None,
        config,
        config_type: CONFIG_TYPE.to_owned(),
        layers,
        annotations: Annotations::new(),
    };
    Ok(Named { names: item.repo_tags.unwrap_or_default(), found })
}

/// The digest in a name like `blobs/sha256/<hex>`, `<hex>.json` or `<hex>.tar`. The directories of
/// the old style (`<hex>/layer.tar`) are named by something else.
fn digest_in(member: &str) -> Option<Digest> {
    let name = member.rsplit('/').next()?;
    let hex = name.strip_suffix(".json").or_else(|| name.strip_suffix(".tar")).unwrap_or(name);
    Digest::from_hex(hex).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_in_knows_both_styles() {
        let hex = Digest::of(b"x").hex();
        for name in [format!("{hex}.json"), format!("blobs/sha256/{hex}"), format!("{hex}.tar")] {
            assert_eq!(digest_in(&name), Some(Digest::of(b"x")));
        }
        assert_eq!(digest_in(&format!("{hex}/layer.tar")), None);
    }
}
