//! What is fuzzed.

use std::fs::File;
use std::io::{Cursor, Write};
use std::sync::OnceLock;

use mvm_agent_protocol::{hello, stream};
use mvm_devices::testing::Rng;
use mvm_image::erofs::reader::{FileType, Inode, Reader};
use mvm_image::{Digest, Reference, Silent, Store};
use mvm_vmm::config::BootProtocol;
use mvm_vmm::{Disk, Machine, Module, Parts, Section, engines, layout};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::annotations;
use crate::random::{below, bytes, damage};

/// A function that takes bytes from outside.
pub struct Target {
    /// Its name on the command line.
    pub name: &'static str,
    /// Valid inputs to start from; none: random bytes.
    seeds: fn() -> &'static [Vec<u8>],
    longest: usize,
    /// Takes the input.
    pub run: fn(&[u8]),
}

impl Target {
    /// An input.
    pub fn input(&self, rng: &mut Rng) -> Vec<u8> {
        let seeds = (self.seeds)();
        if seeds.is_empty() || below(rng, 16) == 0 {
            return bytes(rng, self.longest);
        }
        let mut input = seeds[below(rng, seeds.len())].clone();
        damage(rng, &mut input);
        input
    }
}

const fn queue(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, seeds: || &[], longest: 4096, run }
}

/// All targets.
pub const TARGETS: &[Target] = &[
    queue("block", mvm_devices::fuzz::fuzz_block),
    queue("vsock", mvm_devices::fuzz::fuzz_vsock),
    queue("console", mvm_devices::fuzz::fuzz_console),
    queue("net", mvm_devices::fuzz::fuzz_net),
    queue("rng", mvm_devices::fuzz::fuzz_rng),
    queue("balloon", mvm_devices::fuzz::fuzz_balloon),
    queue("hvt", mvm_devices::fuzz::fuzz_hvt),
    queue("fw-cfg", mvm_devices::fuzz::fuzz_fw_cfg),
    queue("pic", mvm_devices::fuzz::fuzz_pic),
    queue("fs", mvm_fs::fuzz::fuzz_fs),
    Target { name: "layer", seeds: layers, longest: 4096, run: layer },
    Target { name: "archive", seeds: archives, longest: 4096, run: archive },
    Target { name: "erofs", seeds: erofs_images, longest: 4096, run: erofs },
    Target { name: "reference", seeds: references, longest: 64, run: reference },
    Target { name: "hello", seeds: hellos, longest: 256, run: greeting },
    Target { name: "annotations", seeds: descriptions, longest: 1024, run: annotations::run },
    Target { name: "kernel", seeds: kernels, longest: 1024, run: kernel },
];

macro_rules! seeds {
    ($name:ident, $make:expr) => {
        fn $name() -> &'static [Vec<u8>] {
            static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
            SEEDS.get_or_init(|| $make)
        }
    };
}

/// A tar archive of `(path, type, link or data)`.
fn tar(entries: &[(&str, u8, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (path, kind, content) in entries {
        let data: &[u8] = if matches!(kind, b'0' | b'x' | b'L') { content } else { b"" };
        let mut header = [0u8; 512];
        header[..path.len()].copy_from_slice(path.as_bytes());
        header[100..108].copy_from_slice(b"0000755\0");
        header[108..116].copy_from_slice(b"0000001\0");
        header[116..124].copy_from_slice(b"0000002\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
        header[136..148].copy_from_slice(b"14524770400\0");
        header[156] = *kind;
        if matches!(kind, b'1' | b'2') {
            header[157..157 + content.len()].copy_from_slice(content);
        }
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend(header);
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

seeds!(
    layers,
    vec![
        tar(&[
            ("bin/", b'5', b""),
            ("bin/a", b'0', b"hello"),
            ("bin/b", b'1', b"bin/a"),
            ("c", b'2', b"../bin/a"),
            ("bin/.wh.b", b'0', b""),
            ("dev", b'3', b""),
        ]),
        tar(&[
            ("x", b'x', b"30 path=a/long/name/in/a/pax\n45 SCHILY.xattr.user.k=some value or other v\n"),
            ("y", b'0', &[7; 3000]),
            ("d/.wh..wh..opq", b'0', b""),
            ("L", b'L', b"a/very/long/name/indeed\0"),
            ("z", b'0', b"z"),
        ]),
        tar(&[
            ("x", b'x', b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.name=holes\n29 GNU.sparse.realsize=9000\n"),
            ("s", b'0', b"1\n4096\n5\n"),
        ]),
    ]
);

/// An image of one layer, as a `docker save` archive.
fn save(layer: &[u8]) -> Vec<u8> {
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Env":["A=b"],"Cmd":["sh"]}},"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        Digest::of(layer)
    );
    let manifest =
        br#"[{"Config":"config.json","RepoTags":["fuzz:latest"],"Layers":["layer.tar"]}]"#;
    tar(&[
        ("config.json", b'0', config.as_bytes()),
        ("layer.tar", b'0', layer),
        ("manifest.json", b'0', manifest),
    ])
}

seeds!(archives, layers().iter().map(|layer| save(layer)).collect());

/// Imports an archive into a fresh store and unpacks what it holds.
fn import(archive: &[u8]) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("image.tar");
    std::fs::write(&path, archive).expect("room for the image");
    let store = Store::open(dir.path().join("store")).expect("a store");
    if let Ok(imported) = store.import_path(&path, None, &Silent) {
        for image in imported {
            let _ = store.rootfs(&image, &Silent);
        }
    }
}

fn layer(bytes: &[u8]) {
    import(&save(bytes));
}

fn archive(bytes: &[u8]) {
    import(bytes);
}

seeds!(erofs_images, {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("image.tar");
    std::fs::write(&path, &archives()[0]).expect("room for the image");
    let store = Store::open(dir.path().join("store")).expect("a store");
    let image = store.import_path(&path, None, &Silent).expect("a good image").remove(0);
    let lease = store.rootfs(&image, &Silent).expect("a good layer");
    vec![std::fs::read(lease.path()).expect("the image")]
});

fn memory(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    file.write_all(bytes).expect("room in memory");
    file
}

fn erofs(bytes: &[u8]) {
    let Ok(reader) = Reader::open(memory(bytes)) else { return };
    let Ok(root) = reader.root() else { return };
    visit(&reader, &root, 4);
}

fn visit(reader: &Reader, inode: &Inode, depth: u32) {
    let _ = reader.xattrs(inode);
    match inode.file_type {
        FileType::Directory if depth > 0 => {
            for (_, nid) in reader.entries(inode).unwrap_or_default().into_iter().take(50) {
                if let Ok(inode) = reader.inode(nid) {
                    visit(reader, &inode, depth - 1);
                }
            }
        }
        _ => {
            let _ = reader.read(inode, 1 << 20);
        }
    }
}

seeds!(
    references,
    [
        "busybox",
        "docker.io/library/debian:12-slim",
        "localhost:5000/a/b@sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
    ]
    .map(|s| s.as_bytes().to_vec())
    .to_vec()
);

fn reference(bytes: &[u8]) {
    if let Ok(reference) = String::from_utf8_lossy(bytes).parse::<Reference>() {
        let again = reference.canonical().parse::<Reference>();
        assert_eq!(again.map(|r| r.canonical()).ok(), Some(reference.canonical()));
    }
}

seeds!(descriptions, annotations::seeds());

seeds!(hellos, {
    let mut bytes = Vec::new();
    hello::send(&mut bytes, &Default::default()).expect("a vector takes everything");
    vec![bytes]
});

fn greeting(bytes: &[u8]) {
    let _ = hello::receive(&mut Cursor::new(bytes));
    let _ = hello::read_answer(&mut Cursor::new(bytes));
    let _ = stream::Request::read(&mut Cursor::new(bytes));
}

seeds!(kernels, mvm_vmm::testing::kernels());

/// Places a kernel in a machine of some size, by the protocol that it seems to have or by any other.
fn kernel(bytes: &[u8]) {
    const PROTOCOLS: [BootProtocol; 8] = [
        BootProtocol::Auto,
        BootProtocol::Auto,
        BootProtocol::Auto,
        BootProtocol::Auto,
        BootProtocol::Linux,
        BootProtocol::Pvh,
        BootProtocol::Multiboot,
        BootProtocol::Hvt,
    ];
    let engine = engines::emulation().expect("the emulation engine is always there");
    let Ok(section) = Section::new(memory(bytes), 0, None) else { return };
    let mut rng =
        Rng::new(bytes.iter().fold(0, |sum, b| u64::wrapping_mul(sum, 31) ^ u64::from(*b)));
    let size = match rng.below(3) {
        0 => layout::MIN_MEMORY + rng.below(64 << 20),
        1 => layout::LOW_MEMORY_END - (1 << 20) + rng.below(2 << 20),
        _ => 64 << 20,
    };
    let boot = PROTOCOLS[below(&mut rng, PROTOCOLS.len())];
    let file = Some(memory(&[0; 4096]));
    let disks = vec![Disk { file, read_only: false, serial: "storage".into() }];
    let initramfs = match rng.below(2) {
        0 => None,
        _ => Section::new(memory(&[7; 5000]), 0, None).ok(),
    };
    let modules = (0..rng.below(3)).filter_map(|_| Section::new(memory(&[8; 5000]), 0, None).ok());
    let modules = modules.map(Module::from).collect();
    let parts = Parts { boot, disks, initramfs, modules, ..Parts::new(size, section) };
    let _ = Machine::new(&*engine, parts);
}
