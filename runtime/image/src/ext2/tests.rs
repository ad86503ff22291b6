use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use super::*;
use crate::{Owners, pack_directory};

const LIMIT: u64 = 4 << 30;

fn erofs(tree: &Path) -> Reader {
    let image = tempfile::tempfile().unwrap();
    let spool = tempfile::tempfile().unwrap();
    pack_directory(tree, image.try_clone().unwrap(), spool, Owners::Keep, u64::MAX).unwrap();
    Reader::open(image).unwrap()
}

/// The disk of a tree, which `e2fsck` has nothing against.
fn disk(tree: &Path) -> tempfile::NamedTempFile {
    let disk = tempfile::NamedTempFile::new().unwrap();
    let size = write_ext2(&erofs(tree), disk.as_file(), LIMIT).unwrap();
    assert_eq!(disk.as_file().metadata().unwrap().len(), size);
    match Command::new("e2fsck").arg("-fn").arg(disk.path()).output() {
        Ok(output) => assert!(
            output.status.success(),
            "e2fsck: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(e) => eprintln!("skipped e2fsck: {e}"),
    }
    disk
}

/// Reads a disk by the book, from its superblock on, with none of what wrote it.
struct Ext2<'a> {
    disk: &'a File,
    group_inodes: u32,
}

struct Found {
    mode: u16,
    links: u16,
    size: u64,
    owners: (u32, u32),
    time: u32,
    block: [u32; 15],
    raw: [u8; 128],
}

impl<'a> Ext2<'a> {
    fn open(disk: &'a File) -> Self {
        let mut raw = [0; 1024];
        disk.read_exact_at(&mut raw, 1024).unwrap();
        assert_eq!(raw[56..58], [0x53, 0xef]);
        Self { disk, group_inodes: u32_at(&raw, 40) }
    }

    fn block(&self, number: u32) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        self.disk.read_exact_at(&mut bytes, u64::from(number) * 4096).unwrap();
        bytes
    }

    fn inode(&self, number: u32) -> Found {
        let (group, index) = ((number - 1) / self.group_inodes, (number - 1) % self.group_inodes);
        let table = u32_at(&self.block(1), group as usize * 32 + 8);
        let mut raw = [0; 128];
        self.disk
            .read_exact_at(&mut raw, u64::from(table) * 4096 + u64::from(index) * 128)
            .unwrap();
        let half = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let id = |low, high| u32::from(half(low)) | u32::from(half(high)) << 16;
        let mut block = [0; 15];
        for (index, block) in block.iter_mut().enumerate() {
            *block = u32_at(&raw, 40 + 4 * index);
        }
        Found {
            mode: half(0),
            links: half(26),
            size: u64::from(u32_at(&raw, 4)) | u64::from(u32_at(&raw, 108)) << 32,
            owners: (id(2, 120), id(24, 122)),
            time: u32_at(&raw, 16),
            block,
            raw,
        }
    }

    fn data(&self, inode: &Found) -> Vec<u8> {
        let pointers =
            |block: u32| self.block(block).chunks(4).map(|c| u32_at(c, 0)).collect::<Vec<_>>();
        let mut blocks = inode.block[..12].to_vec();
        if inode.block[12] != 0 {
            blocks.extend(pointers(inode.block[12]));
        }
        if inode.block[13] != 0 {
            blocks.extend(
                pointers(inode.block[13]).into_iter().filter(|b| *b != 0).flat_map(pointers),
            );
        }
        let count = inode.size.div_ceil(4096) as usize;
        let mut bytes: Vec<u8> =
            blocks[..count].iter().flat_map(|block| self.block(*block)).collect();
        bytes.truncate(inode.size as usize);
        bytes
    }

    fn target(&self, inode: &Found) -> Vec<u8> {
        match inode.size < 60 {
            true => inode.raw[40..40 + inode.size as usize].to_vec(),
            false => self.data(inode),
        }
    }

    fn entries(&self, directory: &Found) -> BTreeMap<String, u32> {
        let bytes = self.data(directory);
        let mut entries = BTreeMap::new();
        let mut at = 0;
        while at < bytes.len() {
            let len = usize::from(u16::from_le_bytes([bytes[at + 4], bytes[at + 5]]));
            let name = &bytes[at + 8..at + 8 + usize::from(bytes[at + 6])];
            entries.insert(String::from_utf8(name.to_vec()).unwrap(), u32_at(&bytes, at));
            at += len;
        }
        entries
    }

    fn find(&self, path: &str) -> (u32, Found) {
        path.split('/').filter(|part| !part.is_empty()).fold((2, self.inode(2)), |(_, at), part| {
            let number = self.entries(&at)[part];
            (number, self.inode(number))
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Bytes of which no two blocks are the same.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

#[test]
fn a_tree_is_on_the_disk_as_it_is_in_the_image() {
    let tree = tempfile::tempdir().unwrap();
    let at = |name: &str| tree.path().join(name);
    // Up to a block, all that an inode names, what takes one block of names, and more.
    let sizes =
        [0, 1, 4095, 4096, 12 * 4096, 12 * 4096 + 1, 1036 * 4096, 1036 * 4096 + 1, 9_000_000];
    for size in sizes {
        fs::write(at(&format!("f{size}")), pattern(size)).unwrap();
    }
    fs::create_dir_all(at("etc/deep/er")).unwrap();
    fs::write(at("etc/deep/er/file"), "here").unwrap();
    fs::set_permissions(at("etc/deep/er/file"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(at("etc/deep/er/file"), at("other")).unwrap();
    symlink("x".repeat(59), at("fast")).unwrap();
    symlink("y".repeat(60), at("slow")).unwrap();
    let fifo = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), rustix::fs::FileType::Fifo, fifo, 0).unwrap();
    // A directory of several blocks.
    fs::create_dir(at("many")).unwrap();
    for n in 0..2000 {
        fs::write(at(&format!("many/{n:03}-{}", "n".repeat(n % 200))), "").unwrap();
    }
    let disk = disk(tree.path());
    let read = Ext2::open(disk.as_file());
    for size in sizes {
        let (_, inode) = read.find(&format!("f{size}"));
        assert_eq!((inode.mode, inode.links), (0o100_644, 1));
        assert!(read.data(&inode) == pattern(size), "{size}");
    }
    let (number, file) = read.find("/etc/deep/er/file");
    assert_eq!((number, read.data(&file)), (read.find("other").0, b"here".to_vec()));
    assert_eq!((file.mode, file.links), (0o104_751, 2));
    let host = fs::metadata(at("other")).unwrap();
    assert_eq!(
        (file.owners, u64::from(file.time)),
        ((host.uid(), host.gid()), host.mtime() as u64)
    );
    let (_, directory) = read.find("/etc");
    assert_eq!((directory.mode & 0o170_000, directory.links), (0o040_000, 3));
    assert_eq!(read.entries(&directory)[".."], 2);
    assert_eq!(read.target(&read.find("fast").1), "x".repeat(59).as_bytes());
    assert_eq!(read.target(&read.find("slow").1), "y".repeat(60).as_bytes());
    assert_eq!(read.find("fifo").1.mode, 0o010_600);
    assert_eq!(read.entries(&read.find("many").1).len(), 2002);
    assert_eq!(read.find("lost+found").1.mode, 0o040_700);
}

#[test]
fn an_empty_image_is_an_empty_disk_and_its_own_lost_and_found_is_kept() {
    let tree = tempfile::tempdir().unwrap();
    let size = disk(tree.path()).as_file().metadata().unwrap().len();
    assert_eq!(size, 128 << 20);
    fs::create_dir(tree.path().join("lost+found")).unwrap();
    fs::write(tree.path().join("lost+found/x"), "kept").unwrap();
    let disk = disk(tree.path());
    let read = Ext2::open(disk.as_file());
    assert_eq!(read.data(&read.find("lost+found/x").1), b"kept");
}

#[test]
fn contents_go_over_groups_and_holes_stay_holes() {
    let tree = tempfile::tempdir().unwrap();
    let path = tree.path().join("sparse");
    let file = File::create(&path).unwrap();
    file.set_len(300 << 20).unwrap();
    for at in [0_u64, 127 << 20, (300 << 20) - 5] {
        file.write_all_at(b"here.", at).unwrap();
    }
    fs::write(tree.path().join("z"), "after it").unwrap();
    let disk = disk(tree.path());
    assert!(disk.as_file().metadata().unwrap().len() >= 384 << 20);
    assert!(disk.as_file().metadata().unwrap().blocks() * 512 < 8 << 20, "holes were filled");
    let read = Ext2::open(disk.as_file());
    let bytes = read.data(&read.find("sparse").1);
    assert_eq!(
        (&bytes[..5], &bytes[127 << 20..][..5], &bytes[bytes.len() - 5..]),
        (&b"here."[..], &b"here."[..], &b"here."[..])
    );
    assert_eq!(read.data(&read.find("z").1), b"after it");
}

#[test]
fn what_is_too_large_is_refused_before_anything_is_written() {
    let tree = tempfile::tempdir().unwrap();
    let file = File::create(tree.path().join("large")).unwrap();
    file.set_len(140 << 20).unwrap();
    let image = erofs(tree.path());
    let disk = tempfile::tempfile().unwrap();
    for limit in [0, 1 << 20, 128 << 20, 255 << 20] {
        let error = write_ext2(&image, &disk, limit).unwrap_err();
        assert!(error.to_string().contains(&limit.to_string()), "{error}");
        assert_eq!(disk.metadata().unwrap().len(), 0);
    }
    assert_eq!(write_ext2(&image, &disk, 256 << 20).unwrap(), 256 << 20);
    let spool = || tempfile::tempfile().unwrap();
    let error = pack_directory(tree.path(), spool(), spool(), Owners::Keep, 100 << 20).unwrap_err();
    assert!(error.to_string().contains("104857600"), "{error}");
}

/// Whatever is wrong with the image: a disk, or an error.
#[test]
fn damaged_images_give_an_error_or_a_disk() {
    let tree = tempfile::tempdir().unwrap();
    fs::create_dir_all(tree.path().join("a/b")).unwrap();
    fs::write(tree.path().join("a/b/c"), pattern(5000)).unwrap();
    symlink("a/b/c", tree.path().join("l")).unwrap();
    let image = tempfile::tempfile().unwrap();
    let spool = tempfile::tempfile().unwrap();
    pack_directory(tree.path(), image.try_clone().unwrap(), spool, Owners::Keep, u64::MAX).unwrap();
    let mut whole = vec![0; image.metadata().unwrap().len() as usize];
    image.read_exact_at(&mut whole, 0).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % bound as u64) as usize
    };
    let (mut disks, mut errors) = (0, 0);
    for _ in 0..400 {
        let damaged = tempfile::tempfile().unwrap();
        let mut bytes = whole.clone();
        // Behind the superblock, which has a checksum.
        for _ in 0..=below(4) {
            let at = 4096 + below(bytes.len() - 4096);
            bytes[at] ^= 1 << below(8);
        }
        damaged.write_all_at(&bytes, 0).unwrap();
        let disk = tempfile::tempfile().unwrap();
        match Reader::open(damaged)
            .map_err(Ext2Error::from)
            .and_then(|r| write_ext2(&r, &disk, 256 << 20))
        {
            Ok(_) => disks += 1,
            Err(_) => errors += 1,
        }
    }
    assert!(disks > 0 && errors > 0, "{disks} disks, {errors} errors");
}
