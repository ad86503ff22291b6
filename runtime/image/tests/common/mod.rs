//! Makes layers and images for the tests.
#![allow(dead_code, reason = "each test uses a part")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use mvm_image::erofs::reader::{FileType, Inode, Reader};
use mvm_image::{Digest, Image, Silent, Store};
use serde_json::{Value, json};

/// A layer that is being made.
pub struct Layer(pub tar::Builder<Vec<u8>>);

impl Layer {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    pub fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(size);
        header
    }

    /// Adds an entry whose name the tar crate would not let through.
    pub fn raw(mut self, name: &[u8], link: &[u8], kind: tar::EntryType, data: &[u8]) -> Self {
        let mut header = Self::header(kind, 0o644, data.len() as u64);
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub fn file(mut self, path: &str, data: &[u8]) -> Self {
        let mut header = Self::header(tar::EntryType::Regular, 0o644, data.len() as u64);
        self.0.append_data(&mut header, path, data).unwrap();
        self
    }

    pub fn dir(mut self, path: &str, mode: u32) -> Self {
        let mut header = Self::header(tar::EntryType::Directory, mode, 0);
        self.0.append_data(&mut header, path, &b""[..]).unwrap();
        self
    }

    pub fn symlink(mut self, path: &str, target: &str) -> Self {
        let mut header = Self::header(tar::EntryType::Symlink, 0o777, 0);
        self.0.append_link(&mut header, path, target).unwrap();
        self
    }

    pub fn hard_link(mut self, path: &str, target: &str) -> Self {
        let mut header = Self::header(tar::EntryType::Link, 0o644, 0);
        self.0.append_link(&mut header, path, target).unwrap();
        self
    }

    pub fn device(mut self, path: &str, kind: tar::EntryType, major: u32, minor: u32) -> Self {
        let mut header = Self::header(kind, 0o600, 0);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        self.0.append_data(&mut header, path, &b""[..]).unwrap();
        self
    }

    /// PAX records for the next entry.
    pub fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    pub fn tar(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// A configuration for these uncompressed layers.
pub fn config(layers: &[Vec<u8>], architecture: &str) -> Vec<u8> {
    let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer)).collect();
    let config = json!({
        "created": "2026-01-02T03:04:05Z",
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Entrypoint": ["/bin/entry"],
            "Cmd": ["a", "b"],
            "Env": ["PATH=/bin"],
            "WorkingDir": "/work",
            "User": "1:2",
            "StopSignal": "SIGINT",
            "Labels": {"k": "v"},
            "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
            "Volumes": {"/data": {}},
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    serde_json::to_vec(&config).unwrap()
}

/// An OCI layout that is being made: names to contents.
#[derive(Default, Clone)]
pub struct Layout {
    pub files: BTreeMap<String, Vec<u8>>,
    pub manifests: Vec<Value>,
}

impl Layout {
    pub fn blob(&mut self, bytes: Vec<u8>, media_type: &str) -> Value {
        let digest = Digest::of(&bytes);
        let descriptor = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        self.files.insert(format!("blobs/sha256/{}", digest.hex()), bytes);
        descriptor
    }

    /// Adds a manifest and returns its descriptor.
    pub fn manifest(&mut self, config: Vec<u8>, layers: Vec<(Vec<u8>, &str)>) -> Value {
        let config = self.blob(config, "application/vnd.oci.image.config.v1+json");
        let layers: Vec<_> = layers
            .into_iter()
            .map(|(bytes, kind)| {
                self.blob(bytes, &format!("application/vnd.oci.image.layer.v1.{kind}"))
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        });
        let bytes = serde_json::to_vec(&manifest).unwrap();
        self.blob(bytes, "application/vnd.oci.image.manifest.v1+json")
    }

    /// A layout with one image of these layers, all of them gzip.
    pub fn simple(layers: &[Vec<u8>], name: Option<&str>) -> Self {
        let mut layout = Self::default();
        let compressed = layers.iter().map(|layer| (gzip(layer), "tar+gzip")).collect();
        let manifest = layout.manifest(config(layers, "amd64"), compressed);
        layout.add(manifest, name);
        layout
    }

    pub fn add(&mut self, mut descriptor: Value, name: Option<&str>) {
        if let Some(name) = name {
            descriptor["annotations"]["org.opencontainers.image.ref.name"] = name.into();
        }
        self.manifests.push(descriptor);
    }

    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = self.files.clone();
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        files.insert("index.json".into(), serde_json::to_vec(&index).unwrap());
        files.insert("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
        files
    }

    pub fn write_dir(&self, dir: &Path) {
        for (name, bytes) in self.files() {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }

    pub fn tar(&self) -> Vec<u8> {
        archive(&self.files())
    }
}

/// A tar of named files.
pub fn archive(files: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    files.iter().fold(Layer::new(), |tar, (name, bytes)| tar.file(name, bytes)).tar()
}

/// A store in a directory of its own.
pub struct Scratch {
    pub dir: tempfile::TempDir,
    pub store: Store,
}

impl Scratch {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        Self { dir, store }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Imports one image of these layers.
    pub fn import(&self, layers: &[Vec<u8>]) -> Image {
        let path = self.write("image.tar", &Layout::simple(layers, Some("test")).tar());
        self.store.import_path(&path, None, &Silent).unwrap().pop().unwrap()
    }

    /// What importing an image of one layer says.
    pub fn refusal(&self, layer: Vec<u8>) -> String {
        let path = self.write("hostile.tar", &Layout::simple(&[layer], Some("hostile")).tar());
        let error = self.store.import_path(&path, None, &Silent).unwrap_err().to_string();
        assert_eq!(self.leftovers(), Vec::<String>::new(), "{error}");
        error
    }

    /// Everything in the store except its frame.
    pub fn leftovers(&self) -> Vec<String> {
        let frame = ["oci-layout", "lock", "index.lock"];
        let mut found = Vec::new();
        walk(self.store.root(), &mut |path| {
            let name = path.strip_prefix(self.store.root()).unwrap().display().to_string();
            if path.is_file() && !frame.contains(&name.as_str()) {
                found.push(name);
            }
        });
        found
    }

    pub fn reader(&self, image: &Image) -> Reader {
        Reader::open(self.store.rootfs(image, &Silent).unwrap().into_file()).unwrap()
    }

    /// The tree of an image of these layers, checked by `fsck.erofs`, too.
    pub fn tree(&self, layers: &[Vec<u8>]) -> BTreeMap<String, Node> {
        let image = self.import(layers);
        let lease = self.store.rootfs(&image, &Silent).unwrap();
        fsck(lease.path());
        tree(&self.reader(&image))
    }
}

pub fn walk(dir: &Path, visit: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        visit(&path);
        if path.is_dir() && !path.is_symlink() {
            walk(&path, visit);
        }
    }
}

/// One inode as tests compare it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub inode: Inode,
    pub data: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Node {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.data).unwrap()
    }
}

/// Everything in an image by path; the root is the empty one.
pub fn tree(reader: &Reader) -> BTreeMap<String, Node> {
    let mut nodes = BTreeMap::new();
    let mut open = vec![(String::new(), reader.root().unwrap())];
    while let Some((path, inode)) = open.pop() {
        let mut data = Vec::new();
        match inode.file_type {
            FileType::Directory => {
                let entries = reader.entries(&inode).unwrap();
                assert!(entries.is_sorted(), "{path}: names are not sorted");
                for (name, nid) in entries {
                    let name = String::from_utf8_lossy(&name).into_owned();
                    if name != "." && name != ".." {
                        open.push((format!("{path}/{name}"), reader.inode(nid).unwrap()));
                    }
                }
            }
            FileType::File | FileType::Symlink => {
                reader.data(&inode).unwrap().read_to_end(&mut data).unwrap();
            }
            _ => {}
        }
        let xattrs = reader.xattrs(&inode).unwrap();
        nodes.insert(path, Node { inode, data, xattrs });
    }
    nodes
}

/// Checks an image with the tools of its inventors, if they are here.
pub fn fsck(image: &Path) {
    match Command::new("fsck.erofs").arg(image).output() {
        Ok(output) => assert!(
            output.status.success(),
            "fsck.erofs: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(e) => eprintln!("skipped fsck.erofs: {e}"),
    }
}

/// Checks an image without reading its contents.
pub fn fsck_superblock(image: &Path) {
    match Command::new("dump.erofs").arg("-s").arg(image).output() {
        Ok(output) => assert!(output.status.success()),
        Err(e) => eprintln!("skipped dump.erofs: {e}"),
    }
}

/// The first four and the last three bytes of a file, read through the image.
pub fn ends(reader: &Reader, inode: &Inode) -> (Vec<u8>, Vec<u8>) {
    let mut data = reader.data(inode).unwrap();
    let mut start = vec![0; 4];
    data.read_exact(&mut start).unwrap();
    let mut rest = data.take(inode.size - 7);
    std::io::copy(&mut rest, &mut std::io::sink()).unwrap();
    let mut end = Vec::new();
    rest.into_inner().read_to_end(&mut end).unwrap();
    (start, end)
}

/// Bytes that `file` takes on the disk.
pub fn on_disk(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}
