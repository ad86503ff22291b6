//! What layers can contain, and what becomes of it.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use common::{Layer, Layout, Scratch, config, zstd};
use mvm_image::Silent;
use mvm_image::erofs::reader::FileType;
use tar::EntryType;

fn names(tree: &BTreeMap<String, common::Node>) -> Vec<&str> {
    tree.keys().map(String::as_str).filter(|name| !name.is_empty()).collect()
}

#[test]
fn whiteouts_hide_older_layers_only() {
    let tree = Scratch::new().tree(&[
        Layer::new().file("gone", b"").file("dir/a", b"").file("stay", b"old").tar(),
        Layer::new()
            .file(".wh.gone", b"")
            .file("dir/b", b"new")
            .file(".wh.dir", b"")
            .file("stay", b"new")
            .file(".wh.stay", b"")
            .file(".wh.missing", b"")
            .file("missing/.wh.x", b"")
            .tar(),
    ]);
    assert_eq!(names(&tree), ["/dir", "/dir/b", "/stay"]);
    assert_eq!(tree["/stay"].text(), "new");
}

#[test]
fn opaque_directories_hide_older_layers_whatever_the_order() {
    for opaque_first in [true, false] {
        let upper = Layer::new().dir("d", 0o700);
        let upper = match opaque_first {
            true => upper.file("d/.wh..wh..opq", b"").file("d/new", b"").dir("d/sub", 0o755),
            false => upper.file("d/new", b"").dir("d/sub", 0o755).file("d/.wh..wh..opq", b""),
        };
        let tree = Scratch::new().tree(&[
            Layer::new().file("d/old", b"").file("d/sub/older", b"").tar(),
            upper.file("d/.wh..wh.plnk", b"").tar(),
        ]);
        assert_eq!(names(&tree), ["/d", "/d/new", "/d/sub"], "{opaque_first}");
        assert_eq!(tree["/d"].inode.mode, 0o700);
    }
}

#[test]
fn hard_links_share_an_inode_across_layers() {
    let tree = Scratch::new().tree(&[
        Layer::new().file("a", b"data").hard_link("b", "./a").symlink("l", "a").tar(),
        Layer::new().hard_link("c", "a").file("a", b"replaced").hard_link("m", "l").tar(),
    ]);
    assert_eq!(tree["/b"].inode.nid, tree["/c"].inode.nid);
    assert_eq!(tree["/b"].inode.links, 2);
    assert_eq!(tree["/b"].text(), "data");
    assert_eq!(tree["/a"].text(), "replaced");
    assert_eq!(tree["/a"].inode.links, 1);
    // A link to a symbolic link is a link to the link.
    assert_eq!(tree["/m"].inode.file_type, FileType::Symlink);
    assert_eq!(tree["/l"].inode.links, 2);
}

#[test]
fn files_and_directories_replace_each_other() {
    let tree = Scratch::new().tree(&[
        Layer::new().file("x/child", b"").file("y", b"").dir("z", 0o700).file("z/k", b"").tar(),
        Layer::new().file("x", b"file").dir("y", 0o711).file("y/n", b"").dir("z", 0o750).tar(),
    ]);
    assert_eq!(names(&tree), ["/x", "/y", "/y/n", "/z", "/z/k"]);
    assert_eq!(tree["/z"].inode.mode, 0o750);
    assert_eq!(tree["/y"].inode.mode, 0o711);
}

#[test]
fn entries_below_symbolic_links_land_in_their_targets() {
    let tree = Scratch::new().tree(&[
        Layer::new().dir("usr/lib", 0o755).symlink("lib", "usr/lib").symlink("out", "/../..").tar(),
        Layer::new().file("lib/a", b"1").file("out/b", b"2").file("lib/.wh.none", b"").tar(),
        Layer::new().file("lib/.wh.a", b"").tar(),
    ]);
    assert_eq!(names(&tree), ["/b", "/lib", "/out", "/usr", "/usr/lib"]);
    assert_eq!(tree["/lib"].text(), "usr/lib");
}

#[test]
fn root_entry_missing_parents_and_leading_slashes_are_as_with_docker() {
    let layer = Layer::new()
        .raw(b"./", b"", EntryType::Directory, b"")
        .raw(b"/abs/file", b"", EntryType::Regular, b"x")
        .raw(b"old/dir/", b"", EntryType::Regular, b"");
    let tree = Scratch::new().tree(&[layer.tar()]);
    assert_eq!(names(&tree), ["/abs", "/abs/file", "/old", "/old/dir"]);
    assert_eq!(tree[""].inode.mode, 0o644);
    assert_eq!(tree["/abs"].inode.mode, 0o755);
    assert_eq!(tree["/abs"].inode.mtime.0, 1_700_000_000);
    assert_eq!(tree["/old/dir"].inode.file_type, FileType::Directory);
}

#[test]
fn devices_fifos_and_owners_need_no_privilege() {
    let mut layer = Layer::new()
        .device("null", EntryType::Char, 1, 3)
        .device("sda", EntryType::Block, 8, 0x12345)
        .device("pipe", EntryType::Fifo, 0, 0);
    let mut header = Layer::header(EntryType::Regular, 0o4755, 1);
    header.set_uid(70_000);
    header.set_gid(0xffff_fffe);
    layer.0.append_data(&mut header, "su", &b"x"[..]).unwrap();
    let tree = Scratch::new().tree(&[layer.tar()]);
    assert_eq!(tree["/null"].inode.file_type, FileType::Character(1, 3));
    assert_eq!(tree["/sda"].inode.file_type, FileType::Block(8, 0x12345));
    assert_eq!(tree["/pipe"].inode.file_type, FileType::Fifo);
    let su = &tree["/su"].inode;
    assert_eq!((su.mode, su.uid, su.gid), (0o4755, 70_000, 0xffff_fffe));
}

#[test]
fn pax_records_give_times_names_and_attributes() {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(255));
    let capability = b"\x01\x00\x00\x02\n\n\x00\x0a=\x00";
    let layer = Layer::new()
        .pax(&[
            ("mtime", b"1234567890.123456789"),
            ("path", long.as_bytes()),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.user.empty", b""),
            ("SCHILY.xattr.system.posix_acl_access", b"acl"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.com.apple.provenance", b"?"),
        ])
        .file("placeholder", b"x")
        .pax(&[("mtime", b"-1.5"), ("uid", b"4000000000"), ("linkpath", b"some/where")])
        .symlink("link", "placeholder");
    let tree = Scratch::new().tree(&[layer.tar()]);
    let node = &tree[&format!("/{long}")];
    assert_eq!(node.inode.mtime, (1_234_567_890, 123_456_789));
    let xattrs: Vec<_> = node.xattrs.keys().map(|k| String::from_utf8_lossy(k)).collect();
    assert_eq!(xattrs, ["security.capability", "system.posix_acl_access", "user.empty"]);
    assert_eq!(node.xattrs[&b"security.capability"[..]], capability);
    assert_eq!(tree["/link"].inode.mtime, (-2, 500_000_000));
    assert_eq!(tree["/link"].inode.uid, 4_000_000_000);
    assert_eq!(tree["/link"].text(), "some/where");
}

#[test]
fn gnu_long_names_and_links_are_read() {
    let name = format!("{}/name", "n".repeat(150));
    let target = "t/".repeat(100);
    let tree = Scratch::new().tree(&[Layer::new().file(&name, b"x").symlink("l", &target).tar()]);
    assert_eq!(tree[&format!("/{name}")].text(), "x");
    assert_eq!(tree["/l"].text(), target);
}

#[test]
fn data_of_every_size_around_a_block_survives() {
    let sizes = [0, 1, 511, 4031, 4032, 4033, 4095, 4096, 4097, 8127, 8128, 8192, 300_000];
    let data = |size: usize| (0..size).map(|i| (i * 7 + i / 256) as u8).collect::<Vec<_>>();
    let mut layer = Layer::new();
    for size in sizes {
        layer = layer.file(&format!("plain-{size}"), &data(size));
        let value = vec![b'v'; size.min(60_000)];
        layer = layer.pax(&[("SCHILY.xattr.user.a", &value[..])]);
        layer = layer.file(&format!("attr-{size}"), &data(size));
    }
    // Targets that fit behind their inode, and some that do not.
    for size in [1, 59, 4031, 4033, 4095] {
        layer = layer.symlink(&format!("link-{size}"), &"s".repeat(size));
    }
    let tree = Scratch::new().tree(&[layer.tar()]);
    for size in sizes {
        assert_eq!(tree[&format!("/plain-{size}")].data, data(size), "{size}");
        assert_eq!(tree[&format!("/attr-{size}")].data, data(size), "{size}");
        assert_eq!(tree[&format!("/attr-{size}")].xattrs[&b"user.a"[..]].len(), size.min(60_000));
    }
    for size in [1, 59, 4031, 4033, 4095] {
        assert_eq!(tree[&format!("/link-{size}")].data.len(), size);
    }
}

#[test]
fn directories_of_many_blocks_are_sorted_and_complete() {
    let mut layer = Layer::new();
    for i in 0..3000 {
        // Before and behind `.` in byte order.
        layer = layer.file(&format!("big/+{i}"), b"").file(&format!("big/x{i}"), b"");
    }
    let tree = Scratch::new().tree(&[layer.tar()]);
    assert_eq!(tree.len(), 6002);
}

#[test]
fn replaced_files_take_no_space() {
    let scratch = Scratch::new();
    let noise: Vec<u8> =
        (0..4_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let image = scratch.import(&[
        Layer::new().file("big", &noise).tar(),
        Layer::new().file("big", b"small").tar(),
    ]);
    let lease = scratch.store.rootfs(&image, &Silent).unwrap();
    common::fsck(lease.path());
    assert!(lease.size() > 4_000_000);
    let on_disk = common::on_disk(lease.file());
    assert!(on_disk < 1_000_000, "{on_disk}");
}

/// All forms in which GNU tar stores holes.
#[test]
fn sparse_files_of_every_format_are_expanded() {
    let scratch = Scratch::new();
    let dir = scratch.path("in");
    fs::create_dir(&dir).unwrap();
    // Many parts, so that the old format needs continuation blocks; a hole at the end.
    let mut data = vec![0u8; 3_000_000];
    for part in 0..40 {
        let at = part * 70_000;
        data[at..at + 3000].fill(b'a' + (part % 26) as u8);
    }
    let path = dir.join("sparse");
    let file = fs::File::create(&path).unwrap();
    file.set_len(data.len() as u64).unwrap();
    for part in 0..40 {
        use std::os::unix::fs::FileExt;
        let at = part * 70_000;
        file.write_all_at(&data[at..at + 3000], at as u64).unwrap();
    }
    file.sync_all().unwrap();
    let formats: [&[&str]; 4] = [
        &["--format=gnu"],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ];
    for format in formats {
        let output = Command::new("tar")
            .args(["--sparse", "--hole-detection=seek", "-cf", "-", "-C"])
            .arg(&dir)
            .args(format)
            .arg("sparse")
            .output();
        let Ok(output) = output else {
            eprintln!("skipped: no tar");
            return;
        };
        assert!(output.status.success());
        assert!(output.stdout.len() < 1_000_000, "tar made no sparse entry");
        let tree = scratch.tree(&[output.stdout]);
        assert_eq!(names(&tree), ["/sparse"], "{format:?}");
        assert!(tree["/sparse"].data == data, "{format:?}");
    }
}

#[test]
fn files_beyond_four_gigabytes_keep_their_size_and_holes() {
    const SIZE: u64 = (5 << 30) + 3;
    let map = format!("0,4,{},3", SIZE - 3);
    let size = SIZE.to_string();
    let layer = Layer::new()
        .pax(&[
            ("GNU.sparse.size", size.as_bytes()),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.name", b"huge"),
            ("GNU.sparse.map", map.as_bytes()),
        ])
        .file("GNUSparseFile.0/huge", b"headend")
        .tar();
    let scratch = Scratch::new();
    let image = scratch.import(&[layer]);
    let reader = scratch.reader(&image);
    let inode = reader.lookup("/huge").unwrap().unwrap();
    assert_eq!(inode.size, SIZE);
    let lease = scratch.store.rootfs(&image, &Silent).unwrap();
    common::fsck_superblock(lease.path());
    let on_disk = common::on_disk(lease.file());
    assert!(on_disk < 1 << 20, "{on_disk}");
    let (start, end) = common::ends(&reader, &inode);
    assert_eq!(start, b"head");
    assert_eq!(end, b"end");
}

#[test]
fn sizes_beyond_eight_gigabytes_are_read_from_pax() {
    // The header says 0, the record says more than there is: what counts is the record.
    let layer = Layer::new().pax(&[("size", b"9000000000")]).file("f", b"").tar();
    let error = Scratch::new().refusal(layer);
    assert!(error.contains("entry `f`: the archive is truncated"), "{error}");
}

#[test]
fn unpacked_image_depends_on_nothing_but_the_layers() {
    let tar = Layer::new().dir("a", 0o755).file("a/b", b"c").symlink("l", "a").tar();
    let image = |compress: fn(&[u8]) -> Vec<u8>, kind| {
        let scratch = Scratch::new();
        let mut layout = Layout::default();
        let manifest = layout
            .manifest(config(std::slice::from_ref(&tar), "amd64"), vec![(compress(&tar), kind)]);
        layout.add(manifest, Some("x"));
        let path = scratch.write("x.tar", &layout.tar());
        let image = scratch.store.import_path(&path, None, &Silent).unwrap().pop().unwrap();
        fs::read(scratch.store.rootfs(&image, &Silent).unwrap().path()).unwrap()
    };
    assert!(image(zstd, "tar+zstd") == image(common::gzip, "tar+gzip"));
}
