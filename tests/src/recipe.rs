//! Images made by hand, for tests of what they say of themselves.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use mvm_image::Digest;
use serde_json::{Value, json};

use crate::{World, run_with};

/// What an image is made of.
#[derive(Debug)]
pub struct Recipe<'a> {
    /// The platform's system.
    pub os: &'a str,
    /// The platform's processor.
    pub architecture: &'a str,
    /// The configuration's `config`.
    pub config: Value,
    /// Annotations of the layer.
    pub layer: Value,
    /// Annotations of the manifest's descriptor, in the index.
    pub descriptor: Value,
    /// Files by their paths.
    pub files: &'a [(&'a str, &'a [u8])],
    /// A link, and where it leads.
    pub link: Option<(&'a str, &'a str)>,
}

impl Default for Recipe<'_> {
    fn default() -> Self {
        let (os, architecture) = ("linux", "amd64");
        Self {
            os,
            architecture,
            config: json!({}),
            layer: json!({}),
            descriptor: json!({}),
            files: &[],
            link: None,
        }
    }
}

/// An OCI layout.
///
/// # Panics
/// If it cannot be made.
#[must_use]
pub fn image(world: &World, name: &str, recipe: &Recipe<'_>) -> String {
    let (layout, tree) = (world.root().join(name), world.root().join(format!("{name}.tree")));
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&tree).unwrap();
    for (path, bytes) in recipe.files {
        let path: PathBuf = tree.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        // They may be programs.
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    if let Some((path, target)) = recipe.link {
        std::os::unix::fs::symlink(target, tree.join(path.trim_start_matches('/'))).unwrap();
    }
    let tar = world.root().join(format!("{name}.layer"));
    let mut command = Command::new("tar");
    command.arg("-C").arg(&tree).arg("-cf").arg(&tar).arg(".");
    run_with(command, b"", Duration::from_secs(60)).expect_code(0);
    let blob = |bytes: &[u8], media_type: &str| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    };
    let mut layer = blob(&fs::read(tar).unwrap(), "application/vnd.oci.image.layer.v1.tar");
    let config = json!({
        "architecture": recipe.architecture,
        "os": recipe.os,
        "config": recipe.config,
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    });
    layer["annotations"] = recipe.layer.clone();
    let config = blob(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer]});
    let mut manifest = blob(manifest.to_string().as_bytes(), media_type);
    manifest["platform"] = json!({"os": recipe.os, "architecture": recipe.architecture});
    manifest["annotations"] = recipe.descriptor.clone();
    manifest["annotations"]["org.opencontainers.image.ref.name"] = name.into();
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    layout.to_str().unwrap().to_owned()
}
