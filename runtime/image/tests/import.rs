//! Import in all the forms in which images come, and what is known of them afterwards.

mod common;

use std::collections::BTreeMap;
use std::fs;

use common::{Layer, Layout, Scratch, archive, config, fsck, gzip, zstd};
use mvm_image::{Digest, Silent};
use serde_json::json;

fn layers() -> Vec<Vec<u8>> {
    vec![
        Layer::new().dir("etc", 0o755).file("etc/a", b"lower").file("etc/b", b"b").tar(),
        Layer::new().file("etc/a", b"upper").file("etc/.wh.b", b"").tar(),
    ]
}

fn assert_is_ours(scratch: &Scratch, name: &str) {
    let image = scratch.store.resolve(name).unwrap();
    let lease = scratch.store.rootfs(&image, &Silent).unwrap();
    fsck(lease.path());
    let tree = common::tree(&scratch.reader(&image));
    let names: Vec<_> = tree.keys().map(String::as_str).collect();
    assert_eq!(names, ["", "/etc", "/etc/a"]);
    assert_eq!(tree["/etc/a"].text(), "upper");
}

#[test]
fn oci_layout_directory_and_archives_give_the_same_image() {
    let layout = Layout::simple(&layers(), Some("app:1"));
    let mut ids = Vec::new();
    for form in ["dir", "tar", "tar.gz", "tar.zst"] {
        let scratch = Scratch::new();
        let path = match form {
            "dir" => {
                let path = scratch.path("layout");
                layout.write_dir(&path);
                path
            }
            "tar" => scratch.write("x.tar", &layout.tar()),
            "tar.gz" => scratch.write("x.tar.gz", &gzip(&layout.tar())),
            _ => scratch.write("x.tar.zst", &zstd(&layout.tar())),
        };
        let images = scratch.store.import_path(&path, None, &Silent).unwrap();
        assert_eq!(images.len(), 1, "{form}");
        assert_is_ours(&scratch, "app:1");
        let lease = scratch.store.rootfs(&images[0], &Silent).unwrap();
        ids.push((images[0].id(), Digest::of(&fs::read(lease.path()).unwrap())));
    }
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
}

#[test]
fn layers_are_recognised_by_their_bytes() {
    let scratch = Scratch::new();
    let mut layout = Layout::default();
    let tars = layers();
    // One says gzip and is zstd, the other says plain and is gzip.
    let stored = vec![(zstd(&tars[0]), "tar+gzip"), (gzip(&tars[1]), "tar")];
    let manifest = layout.manifest(config(&tars, "amd64"), stored);
    layout.add(manifest, Some("mixed"));
    let path = scratch.write("x.tar", &layout.tar());
    scratch.store.import_path(&path, None, &Silent).unwrap();
    assert_is_ours(&scratch, "mixed");
}

#[test]
fn docker_save_of_the_old_style_is_imported() {
    let scratch = Scratch::new();
    let tars = layers();
    let config = config(&tars, "amd64");
    let config_name = format!("{}.json", Digest::of(&config).hex());
    let manifest = json!([{
        "Config": config_name, "RepoTags": ["old:1", "other:2"],
        "Layers": ["0123/layer.tar", "4567/layer.tar"],
    }]);
    let tar = Layer::new()
        .dir("0123", 0o755)
        .file("0123/layer.tar", &tars[0])
        // A layer that the archive has under another name already.
        .file("89ab/layer.tar", &tars[1])
        .symlink("4567/layer.tar", "../89ab/layer.tar")
        .file(&config_name, &config)
        .file("manifest.json", &serde_json::to_vec(&manifest).unwrap())
        .tar();
    let path = scratch.write("old.tar", &tar);
    let first = scratch.store.import_path(&path, None, &Silent).unwrap();
    assert_is_ours(&scratch, "old:1");
    assert_is_ours(&scratch, "other:2");
    assert_eq!(first[0].id(), Digest::of(&config));
    let again = scratch.store.import_path(&path, None, &Silent).unwrap();
    assert_eq!(first[0].manifest(), again[0].manifest());
}

#[test]
fn docker_save_of_the_new_style_is_imported() {
    let scratch = Scratch::new();
    let tars = layers();
    let config = config(&tars, "amd64");
    let blob = |bytes: &[u8]| format!("blobs/sha256/{}", Digest::of(bytes).hex());
    let manifest = json!([{
        "Config": blob(&config), "RepoTags": ["new:1"],
        "Layers": tars.iter().map(|tar| blob(tar)).collect::<Vec<_>>(),
    }]);
    let mut files: BTreeMap<_, _> = tars.iter().map(|tar| (blob(tar), tar.clone())).collect();
    files.insert(blob(&config), config);
    files.insert("manifest.json".into(), serde_json::to_vec(&manifest).unwrap());
    let path = scratch.write("new.tar.gz", &gzip(&archive(&files)));
    scratch.store.import_path(&path, None, &Silent).unwrap();
    assert_is_ours(&scratch, "new:1");
}

#[test]
fn names_come_from_caller_then_source_then_file() {
    let scratch = Scratch::new();
    let import = |file: &str, stated: Option<&str>, name: Option<&str>| {
        let path = scratch.write(file, &Layout::simple(&layers(), stated).tar());
        let images = scratch.store.import_path(&path, name, &Silent).unwrap();
        images[0].names().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(import("f.tar", Some("stated:1"), Some("caller")), ["caller:latest"]);
    assert_eq!(import("f.tar", Some("stated:1"), None), ["stated:1"]);
    assert_eq!(import("f.tar", Some("busybox"), None), ["busybox:latest"]);
    assert_eq!(import("f.tar", Some("1.36"), None), ["f:1.36"]);
    assert_eq!(import("My-App.tar", None, None), ["my-app:latest"]);
    assert!(import("_.tar", None, None).is_empty());
}

#[test]
fn platform_is_chosen_from_an_index() {
    let scratch = Scratch::new();
    let mut layout = Layout::default();
    let tars = layers();
    let mut manifests = Vec::new();
    for (arch, tar) in [("arm64", &tars[..1]), ("amd64", &tars[..])] {
        let stored = tar.iter().map(|tar| (tar.clone(), "tar")).collect();
        let mut manifest = layout.manifest(config(tar, arch), stored);
        manifest["platform"] = json!({"os": "linux", "architecture": arch});
        manifests.push(manifest);
    }
    // Attestations come as manifests, too.
    let mut attestation = manifests[0].clone();
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    manifests.push(attestation);
    let nested = |layout: &mut Layout, manifests: &[_]| {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": manifests,
        });
        layout.blob(serde_json::to_vec(&index).unwrap(), "application/vnd.oci.image.index.v1+json")
    };
    let mut both = layout.clone();
    let index = nested(&mut both, &manifests);
    both.add(index, Some("multi"));
    let path = scratch.write("multi.tar", &both.tar());
    scratch.store.import_path(&path, None, &Silent).unwrap();
    assert_is_ours(&scratch, "multi");

    let index = nested(&mut layout, &[manifests[0].clone(), manifests[2].clone()]);
    layout.add(index, Some("arm"));
    let path = scratch.write("arm.tar", &layout.tar());
    let error = scratch.store.import_path(&path, None, &Silent).unwrap_err().to_string();
    assert!(
        error.starts_with("the image is for linux/arm64; this host runs linux/amd64"),
        "{error}"
    );
}

#[test]
fn single_image_of_another_platform_is_refused_by_its_configuration() {
    let scratch = Scratch::new();
    let mut layout = Layout::default();
    let tars = layers();
    let stored = tars.iter().map(|tar| (tar.clone(), "tar")).collect();
    let manifest = layout.manifest(config(&tars, "arm64"), stored);
    layout.add(manifest, Some("arm"));
    let path = scratch.write("arm.tar", &layout.tar());
    let error = scratch.store.import_path(&path, None, &Silent).unwrap_err().to_string();
    assert!(error.contains("linux/arm64"), "{error}");
    assert!(scratch.leftovers().is_empty());
}

#[test]
fn defaults_are_what_the_configuration_says() {
    let scratch = Scratch::new();
    let defaults = scratch.import(&layers()).defaults();
    assert_eq!(defaults.entrypoint, ["/bin/entry"]);
    assert_eq!(defaults.cmd, ["a", "b"]);
    assert_eq!(defaults.env, ["PATH=/bin"]);
    assert_eq!(defaults.working_dir, "/work");
    assert_eq!(defaults.user, "1:2");
    assert_eq!(defaults.stop_signal.as_deref(), Some("SIGINT"));
    assert_eq!(defaults.labels["k"], "v");
    assert_eq!(defaults.exposed_ports, ["53/udp", "80/tcp"]);
    assert_eq!(defaults.volumes, ["/data"]);
}

#[test]
fn several_images_in_one_source_are_all_imported() {
    let scratch = Scratch::new();
    let mut layout = Layout::default();
    for name in ["one", "two"] {
        let tar = Layer::new().file(name, name.as_bytes()).tar();
        let config = config(std::slice::from_ref(&tar), "amd64");
        let manifest = layout.manifest(config, vec![(tar, "tar")]);
        layout.add(manifest, Some(name));
    }
    let path = scratch.write("both.tar", &layout.tar());
    let error = scratch.store.import_path(&path, Some("three"), &Silent).unwrap_err().to_string();
    assert!(error.contains("several images (one, two)"), "{error}");
    assert_eq!(scratch.store.import_path(&path, Some("two"), &Silent).unwrap().len(), 1);
    assert!(scratch.store.resolve("one").is_err());
    assert_eq!(scratch.store.import_path(&path, None, &Silent).unwrap().len(), 2);
    assert!(scratch.store.resolve("one").is_ok());
}

#[test]
fn what_is_no_image_is_refused() {
    let scratch = Scratch::new();
    let refused = |path: &std::path::Path| {
        let error = scratch.store.import_path(path, None, &Silent).unwrap_err().to_string();
        assert!(scratch.leftovers().is_empty());
        error
    };
    let text = scratch.write("text", b"this is not a tar file at all, not even nearly");
    assert!(refused(&text).contains("truncated"), "{}", refused(&text));
    let noise = scratch.write("noise", &[0x55; 2048]);
    assert!(refused(&noise).contains("wrong checksum"), "{}", refused(&noise));
    let rootfs = scratch.write("rootfs.tar", &layers()[0]);
    assert!(refused(&rootfs).contains("neither `index.json`"), "{}", refused(&rootfs));
    let cut = scratch.write("cut.tar.gz", &gzip(&Layout::simple(&layers(), None).tar())[..300]);
    assert!(refused(&cut).contains("cannot be decompressed"), "{}", refused(&cut));
    assert!(refused(&scratch.path("missing")).contains("No such file"));
}

#[test]
fn what_indexes_say_of_an_image_is_kept_but_counts_less_than_its_manifest() {
    let scratch = Scratch::new();
    let mut layout = Layout::default();
    let tars = layers();
    let stored = tars.iter().map(|tar| (tar.clone(), "tar")).collect();
    let plain = layout.manifest(config(&tars, "amd64"), stored);
    // The same manifest with a word of its own.
    let digest = plain["digest"].as_str().unwrap().trim_start_matches("sha256:");
    let bytes = layout.files()[&format!("blobs/sha256/{digest}")].clone();
    let mut manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    manifest["annotations"] = json!({"both": "manifest"});
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let mut descriptor = layout.blob(manifest.to_string().into_bytes(), media_type);
    descriptor["annotations"] =
        json!({"both": "descriptor", "near": "descriptor", "mvm.imported": "7"});
    let index = json!({
        "schemaVersion": 2, "manifests": [descriptor],
        "annotations": {"near": "index", "far": "index"},
    });
    let media_type = "application/vnd.oci.image.index.v1+json";
    let mut outer = layout.blob(index.to_string().into_bytes(), media_type);
    outer["annotations"] = json!({"far": "outer", "farthest": "outer"});
    layout.add(outer, Some("said:1"));
    let path = scratch.write("x.tar", &layout.tar());
    let imported = scratch.store.import_path(&path, None, &Silent).unwrap().remove(0);
    let want =
        [("both", "manifest"), ("near", "descriptor"), ("far", "index"), ("farthest", "outer")];
    let want: BTreeMap<_, _> = want.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    assert_eq!(*imported.annotations(), want);
    let again = scratch.store.resolve("said:1").unwrap();
    assert_eq!(*again.annotations(), want, "the store keeps them");
    assert!(again.imported() > 7, "and its own word");
}
