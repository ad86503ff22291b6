//! The server against a synthetic driver.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;

use fuse_backend_rs::abi::fuse_abi::Opcode;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use vm_memory::bitmap::Bitmap;

use crate::protocol::{Cache, ShareOptions};
use crate::rig::{ROOT, Rig, with_nul};
use crate::tree::Extent;
use crate::{ShareClient, fuzz};

const READ_ONLY: ShareOptions = ShareOptions { read_only: true, cache: Cache::Exclusive };

fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("shared/d")).unwrap();
    fs::write(dir.path().join("shared/f"), b"content").unwrap();
    fs::write(dir.path().join("secret"), b"secret").unwrap();
    symlink("../secret", dir.path().join("shared/link")).unwrap();
    dir
}

fn rig(dir: &tempfile::TempDir, options: ShareOptions) -> (Rig, u64) {
    let mut rig = Rig::new(&[("s", &dir.path().join("shared"), options)], None);
    rig.init();
    let share = rig.lookup(ROOT, "s").unwrap();
    (rig, share)
}

#[test]
fn files_are_made_written_and_read() {
    let dir = tree();
    let (mut rig, share) = rig(&dir, ShareOptions::default());
    let (node, handle) = rig.create(share, "new", libc::O_RDWR).unwrap();
    assert_eq!(rig.write(node, handle, 3, b"hello").unwrap(), 5);
    assert_eq!(rig.read(node, handle, 0, 100).unwrap(), b"\0\0\0hello");
    assert_eq!(fs::read(dir.path().join("shared/new")).unwrap(), b"\0\0\0hello");
    rig.fuse(Opcode::Fsync, node, &[&handle.to_le_bytes()[..], &[0; 8]].concat()).unwrap();
    rig.fuse(Opcode::Unlink, share, &with_nul(&["new"])).unwrap();
    assert_eq!(rig.lookup(share, "new"), Err(libc::ENOENT));
    let open = rig.lookup(share, "f").unwrap();
    let handle = rig.open(open, libc::O_RDONLY).unwrap();
    assert_eq!(rig.read(open, handle, 0, 100).unwrap(), b"content");
}

#[test]
fn what_is_read_from_a_file_ends_code_that_was_there() {
    let dir = tree();
    let (mut rig, share) = rig(&dir, ShareOptions::default());
    let node = rig.lookup(share, "f").unwrap();
    let handle = rig.open(node, libc::O_RDONLY).unwrap();
    let ram = rig.guest.ram.clone();
    let tracker = &ram.regions()[0].tracker;
    let page = usize::try_from(rig.reply / 4096).unwrap();
    // The answer's header ends at byte 16, the content follows.
    let generation = tracker.code_page(page).unwrap().watch(0, 32);
    tracker.take_dirty();
    rig.read(node, handle, 0, 100).unwrap();
    assert_ne!(tracker.code_page(page).unwrap().generation(), generation);
    assert!(tracker.dirty_at(page * 4096));
    assert!(!tracker.dirty_at((page + 1) * 4096), "and nothing else");
}

#[test]
fn nothing_leads_out_of_a_share() {
    let dir = tree();
    let (mut rig, share) = rig(&dir, ShareOptions::default());
    let deep = rig.lookup(share, "d").unwrap();
    for name in ["..", ".", "", "../secret", "d/..", "/etc/passwd", "link/x"] {
        for parent in [ROOT, share, deep] {
            assert!(rig.lookup(parent, name).is_err(), "{name:?} below {parent:#x}");
            assert!(rig.create(parent, name, libc::O_RDWR).is_err(), "{name:?}");
            assert!(rig.fuse(Opcode::Rmdir, parent, &with_nul(&[name])).is_err());
        }
    }
    // A link is data: it is neither opened nor followed, whatever the flags say.
    let link = rig.lookup(share, "link").unwrap();
    assert!(rig.open(link, libc::O_RDONLY).is_err());
    assert_eq!(rig.fuse(Opcode::Readlink, link, &[]).unwrap(), b"../secret");
    for flags in [libc::O_PATH, libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC] {
        assert!(rig.create(share, "link", flags).is_err());
    }
    // Numbers that were never given out.
    for node in [0, 2, share + 12345, 200 << 56 | 1, u64::MAX] {
        assert!(rig.fuse(Opcode::Getattr, node, &[0; 16]).is_err(), "{node:#x}");
        assert!(rig.open(node, libc::O_RDONLY).is_err());
    }
    assert!(rig.read(link, 9999, 0, 10).is_err());
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"secret");
}

#[test]
fn absurd_lengths_are_errors() {
    let dir = tree();
    let (mut rig, share) = rig(&dir, ShareOptions::default());
    let node = rig.lookup(share, "f").unwrap();
    let handle = rig.open(node, libc::O_RDWR).unwrap();
    assert!(rig.read(node, handle, 0, u32::MAX).is_err());
    assert!(rig.read(node, handle, u64::MAX, 10).is_err());
    assert!(rig.fuse(Opcode::Readdir, share, &[0xff; 40]).is_err());
    let huge = [&u32::MAX.to_le_bytes()[..], &[0; 4], &with_nul(&["user.x"])].concat();
    assert!(rig.fuse(Opcode::Getxattr, node, &huge).is_err());
    rig.fuse(Opcode::Listxattr, node, &huge[..8]).unwrap();
    let long = "x".repeat(5000);
    assert_eq!(rig.lookup(share, &long), Err(libc::ENAMETOOLONG));
    // A message that is shorter than it says, one that is no message, one without room.
    let mut short = crate::rig::message(Opcode::Lookup as u32, share, b"f\0");
    short[0] = 200;
    assert_eq!(rig.send(&short, 4096).len(), 16);
    assert_eq!(rig.send(&[1, 2, 3], 4096).len(), 0);
    assert_eq!(rig.send(&crate::rig::message(Opcode::Getattr as u32, share, &[0; 16]), 8).len(), 0);
    assert_eq!(rig.lookup(share, "f").unwrap(), node, "and it goes on");
}

#[test]
fn a_read_only_share_is_not_changed() {
    let dir = tree();
    let (mut rig, share) = rig(&dir, READ_ONLY);
    let node = rig.lookup(share, "f").unwrap();
    let handle = rig.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(rig.read(node, handle, 0, 100).unwrap(), b"content");
    let refused = Err(libc::EROFS);
    assert_eq!(rig.create(share, "new", libc::O_RDWR).map(drop), refused);
    assert_eq!(rig.open(node, libc::O_WRONLY).map(drop), refused);
    assert_eq!(rig.open(node, libc::O_RDONLY | libc::O_TRUNC).map(drop), refused);
    assert_eq!(rig.write(node, handle, 0, b"x").map(drop), refused);
    for (opcode, body) in [
        (Opcode::Unlink, with_nul(&["f"])),
        (Opcode::Rmdir, with_nul(&["d"])),
        (Opcode::Mkdir, [&[0; 8][..], b"x\0"].concat()),
        (Opcode::Symlink, with_nul(&["x", "y"])),
        (Opcode::Link, [&node.to_le_bytes()[..], b"x\0"].concat()),
        (Opcode::Rename, [&share.to_le_bytes()[..], b"f\0x\0"].concat()),
        (Opcode::Setattr, vec![0; 88]),
        (Opcode::Mknod, [&[0; 16][..], b"x\0"].concat()),
    ] {
        assert_eq!(rig.fuse(opcode, share, &body).map(drop), refused, "{opcode:?}");
    }
    assert_eq!(fs::read_dir(dir.path().join("shared")).unwrap().count(), 3);
}

#[test]
fn shares_come_and_go_while_the_driver_works() {
    let dir = tree();
    let path = dir.path().join("sock");
    let listener: OwnedFd =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_NONBLOCK, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&listener, Backlog::new(8).unwrap()).unwrap();
    let mut rig = Rig::new(&[], Some(listener));
    rig.init();
    let mut client = ShareClient::connect(&path).unwrap();
    let open = |name: &str| crate::tree::plain(&dir.path().join(name)).unwrap();
    client.add("one", open("shared"), ShareOptions::default()).unwrap();
    client.add("two", open("shared/d"), READ_ONLY).unwrap();
    assert_eq!(client.list().unwrap(), ["one", "two"]);
    let taken = client.add("one", open("shared"), ShareOptions::default());
    assert!(taken.unwrap_err().to_string().contains("already"));
    let bad = client.add("../x", open("shared"), ShareOptions::default());
    assert!(bad.unwrap_err().to_string().contains("name"));
    let file = OwnedFd::from(fs::File::open(dir.path().join("secret")).unwrap());
    let file = client.add("file", file.into(), ShareOptions::default());
    assert!(file.unwrap_err().to_string().contains("no directory"));

    let one = rig.lookup(ROOT, "one").unwrap();
    let node = rig.lookup(one, "f").unwrap();
    let handle = rig.open(node, libc::O_RDONLY).unwrap();
    let two = rig.lookup(ROOT, "two").unwrap();
    // Not from one share to the other.
    let rename = [&two.to_le_bytes()[..], b"f\0f\0"].concat();
    assert_eq!(rig.fuse(Opcode::Rename, one, &rename), Err(libc::EXDEV));
    client.remove("one").unwrap();
    assert_eq!(rig.lookup(ROOT, "one"), Err(libc::ENOENT));
    assert_eq!(rig.read(node, handle, 0, 10), Err(libc::ESTALE));
    assert!(client.remove("one").is_err());
    // Nothing of the tree is kept open.
    let open_in_tree = fs::read_dir("/proc/self/fd").unwrap().flatten().filter(|entry| {
        fs::read_link(entry.path()).is_ok_and(|to| to == dir.path().join("shared/f"))
    });
    assert_eq!(open_in_tree.count(), 0);
    // A new share is another one, even where the old one was.
    client.add("one", open("shared"), ShareOptions::default()).unwrap();
    assert_ne!(rig.lookup(ROOT, "one").unwrap(), one);
    assert_eq!(rig.read(node, handle, 0, 10), Err(libc::ESTALE));
}

#[test]
fn the_root_directory_lists_the_shares_and_is_not_changed() {
    let dir = tree();
    let (mut rig, _) = rig(&dir, ShareOptions::default());
    let mut body = vec![0; 40];
    body[16..20].copy_from_slice(&4096u32.to_le_bytes());
    let listed = rig.fuse(Opcode::Readdir, ROOT, &body).unwrap();
    assert_eq!(&listed[24..25], b"s");
    assert!(rig.create(ROOT, "new", libc::O_RDWR).is_err());
    assert!(rig.fuse(Opcode::Rmdir, ROOT, &with_nul(&["s"])).is_err());
}

#[test]
fn a_driver_may_start_over() {
    let dir = tree();
    let (mut rig, share) = rig(&dir, ShareOptions::default());
    rig.lookup(share, "f").unwrap();
    rig.guest.reset();
    rig.queues = rig.guest.start();
    rig.init();
    let share = rig.lookup(ROOT, "s").unwrap();
    rig.lookup(share, "f").unwrap();
    // As when the guest unmounts: it gets an answer.
    assert_eq!(rig.fuse(Opcode::Destroy, 0, &[]), Ok(vec![]));
}

#[test]
fn pauses_lose_nothing() {
    let dir = tree();
    let (mut rig, share) = rig(&dir, ShareOptions::default());
    let device = rig.guest.mmio.device().clone();
    for _ in 0..20 {
        device.pause();
        let states = device.queue_states();
        assert!(states.iter().all(|s| s.is_some_and(|s| s.ready)));
        device.resume();
        rig.lookup(share, "f").unwrap();
    }
}

#[test]
fn a_few_inputs_of_the_fuzz_target() {
    fuzz::fuzz_fs(&[]);
    let mut seed = 1u32;
    for _ in 0..20 {
        let data: Vec<u8> = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        })
        .take(600)
        .collect();
        fuzz::fuzz_fs(&data);
    }
}

#[test]
fn a_detached_tree_has_nothing_above_it() {
    let dir = tree();
    let tree = match crate::tree::detach(&dir.path().join("shared"), Extent::whole(true)) {
        Ok(tree) => tree,
        Err(error) => {
            eprintln!("SKIPPED: cannot clone mounts here: {error}");
            return;
        }
    };
    let up =
        rustix::fs::openat(tree.as_fd(), "..", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty());
    let (here, up) =
        (rustix::fs::fstat(tree.as_fd()).unwrap(), rustix::fs::fstat(up.unwrap()).unwrap());
    assert_eq!((here.st_dev, here.st_ino), (up.st_dev, up.st_ino));
    let create = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    let made =
        rustix::fs::openat(tree.as_fd(), "new", create, rustix::fs::Mode::from_raw_mode(0o600));
    assert_eq!(made.unwrap_err(), rustix::io::Errno::ROFS);
    // Of a file, a directory with it alone.
    let tree = crate::tree::detach(&dir.path().join("secret"), Extent::whole(false)).unwrap();
    let tree = tree.as_fd();
    let inside = format!("/proc/self/fd/{}/{}", tree.as_raw_fd(), crate::FILE);
    assert_eq!(fs::read(&inside).unwrap(), b"secret");
    fs::write(&inside, b"changed").unwrap();
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"changed");
    assert!(fs::write(format!("/proc/self/fd/{}/other", tree.as_raw_fd()), b"").is_err());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&dir.path().display().to_string()), "nothing is left");
}
