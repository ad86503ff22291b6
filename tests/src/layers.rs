//! Images of several layers, made of one that there is.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

/// Writes an OCI archive to `to`: the image in the OCI archive `image`, with a layer more for each list of files (path and
/// content) in `layers`. A file called `.wh.NAME` takes away NAME of the layers below.
///
/// # Panics
/// If the image is not one, or a tool is missing.
pub fn add_layers(image: &Path, layers: &[&[(&str, &str)]], to: &Path) {
    let layout = tempfile::tempdir().expect("a directory");
    tar(&["-x", "-f"], image, layout.path(), &[]);
    let index = layout.path().join("index.json");
    let mut list = read(&index);
    let mut entry = list["manifests"][0].clone();
    let mut manifest = blob(layout.path(), &entry);
    if !manifest["manifests"].is_null() {
        entry = manifest["manifests"][0].clone();
        manifest = blob(layout.path(), &entry);
    }
    // Its name would be another one of the new image's.
    entry.as_object_mut().map(|entry| entry.remove("annotations"));
    let mut config = blob(layout.path(), &manifest["config"]);
    for files in layers {
        let tree = tempfile::tempdir().expect("a directory");
        for (path, content) in *files {
            fs::write(tree.path().join(path), content).expect("a file");
        }
        let archive = tempfile::NamedTempFile::new().expect("a file");
        let names: Vec<&str> = files.iter().map(|(path, _)| *path).collect();
        let owner = ["--owner=0", "--group=0", "--numeric-owner", "-c", "-f"];
        tar(&owner, archive.path(), tree.path(), &names);
        let layer = put(layout.path(), &fs::read(archive.path()).expect("the layer"));
        push(&mut config["rootfs"]["diff_ids"], layer["digest"].clone());
        push(&mut config["history"], json!({ "created_by": "a test" }));
        let kind = json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar" });
        push(&mut manifest["layers"], merged(&kind, &layer));
    }
    let config = put(layout.path(), config.to_string().as_bytes());
    manifest["config"] = merged(&manifest["config"], &config);
    let manifest = put(layout.path(), manifest.to_string().as_bytes());
    let kind = json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json" });
    list["manifests"] = json!([merged(&merged(&entry, &kind), &manifest)]);
    fs::write(index, list.to_string()).expect("the index");
    tar(&["-c", "-f"], to, layout.path(), &["oci-layout", "index.json", "blobs"]);
}

fn push(list: &mut Value, value: Value) {
    match list {
        Value::Array(all) => all.push(value),
        other => *other = json!([value]),
    }
}

/// `first` with the fields of `second`.
fn merged(first: &Value, second: &Value) -> Value {
    let (mut all, more) = (first.as_object().cloned().unwrap_or_default(), second.as_object());
    all.extend(more.cloned().unwrap_or_default());
    Value::Object(all)
}

fn tar(flags: &[&str], archive: &Path, dir: &Path, names: &[&str]) {
    let mut command = Command::new("tar");
    command.args(flags).arg(archive).arg("-C").arg(dir).args(names);
    assert!(command.status().expect("tar").success(), "{command:?}");
}

fn read(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn blob(layout: &Path, descriptor: &Value) -> Value {
    let digest = descriptor["digest"].as_str().expect("a digest");
    read(&layout.join("blobs").join(digest.replace(':', "/")))
}

/// Adds a blob; its digest and size.
fn put(layout: &Path, content: &[u8]) -> Value {
    let new = layout.join("blobs/sha256/new");
    fs::write(&new, content).expect("a blob");
    let sum = Command::new("sha256sum").arg(&new).output().expect("sha256sum");
    let sum = String::from_utf8_lossy(&sum.stdout).chars().take(64).collect::<String>();
    fs::rename(&new, layout.join("blobs/sha256").join(&sum)).expect("a blob");
    json!({ "digest": format!("sha256:{sum}"), "size": content.len() })
}
