//! Images that are broken or mean harm: refused by name, and nothing of them stays.

mod common;

use std::fs;

use common::{Layer, Layout, Scratch, config, gzip};
use mvm_image::{Digest, Limits, Silent, Store};
use serde_json::json;
use tar::EntryType;

/// A layer, and what the refusal must say.
#[track_caller]
fn refused(layer: Layer, expected: &str) {
    let error = Scratch::new().refusal(layer.tar());
    assert!(error.contains(expected), "{error}");
    // Number and digest of the layer.
    assert!(error.starts_with("layer 1 of 1 (sha256:"), "{error}");
}

#[test]
fn paths_out_of_the_root_are_refused() {
    let file = EntryType::Regular;
    refused(
        Layer::new().raw(b"../evil", b"", file, b"x"),
        "entry `../evil`: the path contains `..`",
    );
    refused(Layer::new().raw(b"a/../../b", b"", file, b""), "entry `a/../../b`");
    refused(Layer::new().raw(b"..", b"", EntryType::Directory, b""), "entry `..`");
    refused(Layer::new().raw(b"/..", b"", EntryType::Symlink, b""), "entry `/..`");
    refused(Layer::new().raw(b"x/.wh...", b"", file, b""), "entry `x/.wh...`");
    refused(Layer::new().raw(b"x/.wh..", b"", file, b"").dir("x", 0o755), "whiteout with no name");
}

#[test]
fn hard_links_out_of_the_root_are_refused() {
    let link = |target: &[u8]| Layer::new().file("a", b"").raw(b"l", target, EntryType::Link, b"");
    refused(link(b"/etc/passwd"), "entry `l`: hard link to `/etc/passwd`: the path is absolute");
    refused(link(b"../../etc/passwd"), "hard link to `../../etc/passwd`: the path contains `..`");
    refused(link(b"missing"), "hard link to `missing`, which is not in the image");
    refused(link(b"a/b"), "hard link to `a/b`: `a` is not a directory");
    refused(link(b"."), "hard link to the directory `.`");
    refused(Layer::new().dir("d", 0o755).hard_link("l", "d"), "hard link to the directory `d`");
    refused(link(b""), "hard link to the directory");
}

#[test]
fn symbolic_links_do_not_lead_out_of_the_root() {
    // The same as any unpacker in a chroot would do: the link's target is inside.
    let scratch = Scratch::new();
    let tree = scratch.tree(&[Layer::new()
        .symlink("etc", "../../../../../../tmp/host")
        .file("etc/evil", b"x")
        .tar()]);
    assert_eq!(tree["/tmp/host/evil"].text(), "x");
    refused(
        Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", b""),
        "entry `a/x`: too many symbolic links on the way",
    );
}

#[test]
fn impossible_paths_are_refused() {
    refused(Layer::new().file("f", b"").file("f/x", b""), "entry `f/x`: `f` is not a directory");
    refused(
        Layer::new().pax(&[("path", b"a\0b")]).file("p", b""),
        "entry `a\\u{0}b`: the path contains a NUL",
    );
    let long = "n".repeat(256);
    refused(
        Layer::new().pax(&[("path", long.as_bytes())]).file("p", b""),
        "a name in the path has 256 bytes",
    );
    let long = "n/".repeat(2100);
    refused(
        Layer::new().pax(&[("path", long.as_bytes())]).file("p", b""),
        "the path has 4200 bytes",
    );
    let deep = "n/".repeat(1100);
    refused(
        Layer::new().pax(&[("path", deep.as_bytes())]).file("p", b""),
        "more than 1024 directories deep",
    );
    refused(
        Layer::new().raw(b".", b"", EntryType::Regular, b""),
        "only a directory can be the root",
    );
    refused(
        Layer::new().raw(b"", b"x", EntryType::Symlink, b""),
        "only a directory can be the root",
    );
}

#[test]
fn impossible_links_devices_and_owners_are_refused() {
    refused(Layer::new().raw(b"l", b"", EntryType::Symlink, b""), "symbolic link with an empty");
    let long = "t".repeat(4096);
    refused(
        Layer::new().pax(&[("linkpath", long.as_bytes())]).symlink("l", "x"),
        "symbolic link with a target of 4096 bytes",
    );
    refused(
        Layer::new().device("d", EntryType::Char, 5000, 1),
        "device major number 5000 is out of range",
    );
    refused(
        Layer::new().pax(&[("uid", b"4294967296")]).file("f", b""),
        "owner 4294967296 is out of range",
    );
    let value = vec![b'v'; 70_000];
    refused(
        Layer::new().pax(&[("SCHILY.xattr.user.a", &value[..])]).dir("d", 0o755),
        "entry `d`: the value of extended attribute user.a has 70000 bytes",
    );
}

#[test]
fn malformed_archives_are_refused() {
    refused(
        Layer::new().raw(b"v", b"", EntryType::new(b'V'), b""),
        "entry type `V` is not supported",
    );
    refused(Layer::new().raw(b"v", b"", EntryType::new(b'M'), b""), "entry type `M`");
    refused(Layer::new().raw(b"x", b"", EntryType::XHeader, b"nonsense"), "malformed PAX record");
    refused(Layer::new().pax(&[("path", b"x")]), "header extension with no entry behind it");
    refused(
        Layer::new().raw(b"x", b"", EntryType::GNULongName, &[b'x'; 2 << 20]),
        "a header extension of 2097152 bytes, the limit is 1048576",
    );
    refused(
        Layer::new()
            .pax(&[("GNU.sparse.size", b"10"), ("GNU.sparse.map", b"0,5,3,4")])
            .file("s", b"123456789"),
        "malformed sparse map",
    );
    refused(
        Layer::new()
            .pax(&[("GNU.sparse.size", b"9223372036854775807"), ("GNU.sparse.map", b"")])
            .file("s", b""),
        "entry `s`: more than 68719476736 bytes in the image",
    );
}

#[test]
fn truncated_layers_are_refused() {
    let whole = Layer::new().file("a", &[b'x'; 5000]).tar();
    for (cut, expected) in [
        (700, "entry `a`: the archive is truncated: it ends within the contents of a file"),
        (300, "the archive is truncated: it ends within a header"),
    ] {
        let error = Scratch::new().refusal(whole[..cut].to_vec());
        assert!(error.contains(expected), "{error}");
    }
    let scratch = Scratch::new();
    let compressed = gzip(&whole);
    let cut = compressed[..compressed.len() - 20].to_vec();
    let mut layout = Layout::default();
    let manifest = layout.manifest(config(&[whole], "amd64"), vec![(cut, "tar+gzip")]);
    layout.add(manifest, None);
    let path = scratch.write("x.tar", &layout.tar());
    let error = scratch.store.import_path(&path, None, &Silent).unwrap_err().to_string();
    assert!(error.contains("cannot be decompressed") || error.contains("truncated"), "{error}");
    assert!(scratch.leftovers().is_empty());
}

#[test]
fn wrong_digests_and_sizes_are_refused() {
    let tar = Layer::new().file("a", b"x").tar();
    let good = Layout::simple(std::slice::from_ref(&tar), Some("x"));
    let config_name =
        format!("blobs/sha256/{}", Digest::of(&config(std::slice::from_ref(&tar), "amd64")).hex());
    let manifest = good.manifests[0]["digest"].as_str().unwrap().replace(':', "/");
    let manifest_name = format!("blobs/{manifest}");
    let layer_name = format!("blobs/sha256/{}", Digest::of(&gzip(&tar)).hex());
    let import = |layout: &Layout| {
        let scratch = Scratch::new();
        let path = scratch.write("x.tar", &layout.tar());
        let error = scratch.store.import_path(&path, None, &Silent).unwrap_err().to_string();
        assert!(scratch.leftovers().is_empty(), "{error}");
        error
    };
    for name in [&config_name, &manifest_name] {
        let mut bad = good.clone();
        bad.files.get_mut(name).unwrap().push(b' ');
        assert!(import(&bad).contains(&format!("`{name}` is damaged")), "{}", import(&bad));
        bad.files.remove(name);
        assert!(import(&bad).contains(&format!("it has no `{name}`")), "{}", import(&bad));
    }
    let mut bad = good.clone();
    *bad.files.get_mut(&layer_name).unwrap().last_mut().unwrap() ^= 1;
    assert!(import(&bad).starts_with(&format!("layer 1 (`{layer_name}`) is damaged: its digest")));
    bad.files.get_mut(&layer_name).unwrap().push(0);
    assert!(import(&bad).contains("bytes instead of"), "{}", import(&bad));

    // The layer is the one of the manifest, but not the one of the configuration.
    let mut bad = Layout::default();
    let other = Layer::new().file("b", b"y").tar();
    let manifest = bad.manifest(config(&[tar], "amd64"), vec![(other, "tar")]);
    bad.add(manifest, None);
    assert!(import(&bad).contains("is not the one that the image's configuration lists"));
}

#[test]
fn inconsistent_documents_are_refused() {
    let tar = Layer::new().file("a", b"x").tar();
    let import = |layout: &Layout| {
        let scratch = Scratch::new();
        let path = scratch.write("x.tar", &layout.tar());
        let error = scratch.store.import_path(&path, None, &Silent).unwrap_err().to_string();
        assert!(scratch.leftovers().is_empty(), "{error}");
        error
    };
    let mut layout = Layout::default();
    let manifest = layout.manifest(config(&[], "amd64"), vec![(tar.clone(), "tar")]);
    layout.add(manifest, None);
    assert!(import(&layout).contains("the image has 1 layers, but its configuration lists 0"));

    let mut layout = Layout::default();
    let tars = vec![(tar.clone(), "tar+encrypted")];
    let manifest = layout.manifest(config(std::slice::from_ref(&tar), "amd64"), tars);
    layout.add(manifest, None);
    assert!(import(&layout).contains("tar+encrypted`, which is not supported"));

    let mut layout = Layout::default();
    let manifest = layout.manifest(b"{}".to_vec(), vec![(tar, "tar")]);
    layout.add(manifest, None);
    assert!(import(&layout).contains("configuration is malformed"));

    let mut layout = Layout::default();
    layout.add(json!({"mediaType": "x", "digest": "sha256:../../../etc/passwd", "size": 1}), None);
    let error = import(&layout);
    assert!(
        error.contains("index.json` is malformed") || error.contains("not a digest"),
        "{error}"
    );
}

/// A store with small bounds, and what it says of `layers`.
fn bounded(limits: Limits, layers: &[Vec<u8>]) -> String {
    let scratch = Scratch::new();
    let store = Store::open_with(scratch.store.root(), limits).unwrap();
    let path = scratch.write("x.tar", &Layout::simple(layers, None).tar());
    let error = store.import_path(&path, None, &Silent).unwrap_err().to_string();
    assert!(scratch.leftovers().is_empty());
    error
}

#[test]
fn bombs_are_refused_at_their_bounds() {
    let devices = (0..20)
        .fold(Layer::new(), |layer, i| layer.device(&format!("dev/{i}"), EntryType::Block, 8, i));
    let limits = Limits { devices: 10, ..Limits::default() };
    let error = bounded(limits, &[devices.tar()]);
    assert!(error.contains("entry `dev/10`: more than 10 device nodes"), "{error}");

    let limits = Limits { entries: 10, ..Limits::default() };
    let files = (0..20).fold(Layer::new(), |layer, i| layer.file(&format!("{i}"), b""));
    let error = bounded(limits.clone(), &[files.tar()]);
    assert!(error.contains("entry `10`: more than 10 entries"), "{error}");
    // One entry can ask for many directories.
    let error = bounded(limits, &[Layer::new().file(&"d/".repeat(20), b"").tar()]);
    assert!(error.contains("more than 10 entries"), "{error}");

    let limits = Limits { unpacked_bytes: 1 << 20, ..Limits::default() };
    let half = || Layer::new().file("zeros", &[0; 600 << 10]).tar();
    let error = bounded(limits, &[half(), half()]);
    assert!(error.starts_with("layer 2 of 2"), "{error}");
    assert!(error.contains("entry `zeros`: more than 1048576 bytes in the image"), "{error}");

    let limits = Limits { metadata_bytes: 1000, ..Limits::default() };
    let value = vec![b'v'; 600];
    let record = [("SCHILY.xattr.user.a", &value[..])];
    let layer = Layer::new().pax(&record).dir("a", 0o755).pax(&record).dir("b", 0o755);
    let error = bounded(limits, &[layer.tar()]);
    assert!(error.contains("entry `b`: more than 1000 bytes of names"), "{error}");

    // Archive overhead without entries.
    let limits =
        Limits { unpacked_bytes: 1 << 16, entries: 8, metadata_bytes: 0, ..Limits::default() };
    let global = (0..1000).fold(Layer::new(), |layer, _| {
        layer.raw(b"g", b"", EntryType::XGlobalHeader, b"11 a=bcdef\n")
    });
    let error = bounded(limits, &[global.tar()]);
    assert!(error.contains("decompress to more than"), "{error}");

    let limits = Limits { layers: 3, ..Limits::default() };
    let error = bounded(limits, &vec![Layer::new().tar(); 4]);
    assert!(error.contains("the image has 4 layers, the limit is 3"), "{error}");

    let limits = Limits { document_bytes: 100, ..Limits::default() };
    let error = bounded(limits, &[Layer::new().tar()]);
    assert!(error.contains("`index.json` has"), "{error}");
}

#[test]
fn indexes_that_refer_to_each_other_end() {
    let scratch = Scratch::new();
    let mut layout = Layout::default();
    let kind = "application/vnd.oci.image.index.v1+json";
    let mut below: Vec<serde_json::Value> = Vec::new();
    for level in 0..5 {
        below = (0..40)
            .map(|i| {
                let index = json!({"schemaVersion": 2, "manifests": below,
                    "annotations": {"n": format!("{level}-{i}")}});
                layout.blob(serde_json::to_vec(&index).unwrap(), kind)
            })
            .collect();
    }
    for descriptor in below {
        layout.add(descriptor, None);
    }
    let path = scratch.write("x.tar", &layout.tar());
    let error = scratch.store.import_path(&path, None, &Silent).unwrap_err().to_string();
    assert!(error.contains("manifests") || error.contains("nested"), "{error}");
    assert!(scratch.leftovers().is_empty());
}

#[test]
fn links_in_archives_that_go_round_end() {
    let scratch = Scratch::new();
    let tar = Layer::new()
        .symlink("manifest.json", "other.json")
        .symlink("other.json", "manifest.json")
        .tar();
    let path = scratch.write("x.tar", &tar);
    let error = scratch.store.import_path(&path, None, &Silent).unwrap_err().to_string();
    assert!(error.contains("it has no `manifest.json`"), "{error}");
    // In a directory the names are the host's, and the host's errors.
    let dir = scratch.path("dir");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("index.json"), "[]").unwrap();
    let error = scratch.store.import_path(&dir, None, &Silent).unwrap_err().to_string();
    assert!(error.contains("`index.json` is malformed"), "{error}");
}
