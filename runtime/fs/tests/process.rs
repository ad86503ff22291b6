//! The server as a process: confined, and still able to do everything that files need.
//!
//! The test is its own server: it runs itself again, as `mvm` does.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::Opcode;
use mvm_devices::packets::Packets;
use mvm_fs::follow::{self, can_be_followed, follow};
use mvm_fs::rig::{ROOT, Rig, create_body, io_body, listed_plus, number, with_nul};
use mvm_fs::tree::{Extent, ReadOnly};
use mvm_fs::{Cache, FileServer, Launch, NewShare, ShareClient, ShareOptions, Source, spawn};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use std::os::fd::AsRawFd;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(mvm_fs::SUBCOMMAND) {
        return mvm_fs::main();
    }
    if std::env::args().nth(1).as_deref() == Some(follow::SUBCOMMAND) {
        return follow::main();
    }
    a_confined_server_serves_everything();
    a_server_without_descriptors_waits_for_the_guest();
    what_the_host_mounts_is_followed();
    a_path_that_is_not_there_is_named();
    eprintln!("test result: ok");
    ExitCode::SUCCESS
}

fn listener(path: &Path) -> OwnedFd {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
        .expect("a socket");
    bind(fd.as_raw_fd(), &UnixAddr::new(path).expect("an address")).expect("a place for it");
    listen(&fd, Backlog::new(8).expect("a number")).expect("a listener");
    fd
}

fn share(name: &str, path: &Path, read_only: bool) -> NewShare {
    let options = ShareOptions { read_only, cache: Cache::Live };
    NewShare { name: name.into(), source: Source::Path(path.into()), options }
}

fn start(dir: &Path, shares: Vec<NewShare>) -> Result<(FileServer, OwnedFd), mvm_fs::SpawnError> {
    let log = fs::File::create(dir.join("log")).expect("a log");
    let _ = fs::remove_file(dir.join("sock"));
    spawn(Launch {
        id: "test".into(),
        shares,
        listener: listener(&dir.join("sock")),
        log: Some(log),
        program: "/proc/self/exe".into(),
    })
}

fn a_confined_server_serves_everything() {
    let dir = tempfile::tempdir().expect("a directory");
    let (shared, more) = (dir.path().join("shared"), dir.path().join("more"));
    for path in [&shared, &more] {
        fs::create_dir(path).expect("a directory");
    }
    fs::write(shared.join("f"), b"content").expect("a file");
    let single = dir.path().join("single");
    fs::write(&single, b"one file").expect("a file");
    let shares = vec![
        share("rw", &shared, false),
        share("ro", &shared, true),
        share("file", &single, false),
    ];
    let (mut server, channel) = start(dir.path(), shares).expect("a server");
    eprintln!("layers: {:?}", server.layers());
    let mut rig = Rig::over(Packets::from(channel));
    rig.init();
    let rw = rig.lookup(ROOT, "rw").expect("the share");
    let root = nix::unistd::geteuid().is_root();

    let (node, handle) = rig.create(rw, "new", libc::O_RDWR).expect("a file");
    assert_eq!(rig.write(node, handle, 0, b"data").expect("a write"), 4);
    assert_eq!(rig.read(node, handle, 0, 9).expect("a read"), b"data");
    rig.fuse(Opcode::Fsync, node, &[&handle.to_le_bytes()[..], &[0; 8]].concat()).expect("fsync");
    rig.fuse(Opcode::Flush, node, &[&handle.to_le_bytes()[..], &[0; 16]].concat()).expect("flush");
    let fallocate = [&handle.to_le_bytes()[..], &[0; 8], &8192u64.to_le_bytes(), &[0; 8]].concat();
    rig.fuse(Opcode::Fallocate, node, &fallocate).expect("fallocate");
    assert_eq!(fs::metadata(shared.join("new")).expect("the file").size(), 8192);
    let lseek = [&handle.to_le_bytes()[..], &[0; 8], &4u32.to_le_bytes(), &[0; 4]].concat();
    rig.fuse(Opcode::Lseek, node, &lseek).expect("lseek");
    rig.fuse(Opcode::Mkdir, rw, &[&0o755u32.to_le_bytes()[..], &[0; 4], b"d\0"].concat())
        .expect("mkdir");
    rig.fuse(Opcode::Symlink, rw, &with_nul(&["s", "target"])).expect("symlink");
    let link = rig.lookup(rw, "s").expect("the link");
    assert_eq!(rig.fuse(Opcode::Readlink, link, &[]).expect("readlink"), b"target");
    rig.fuse(Opcode::Link, rw, &[&node.to_le_bytes()[..], b"hard\0"].concat()).expect("link");
    rig.fuse(Opcode::Rename, rw, &[&rw.to_le_bytes()[..], b"hard\0moved\0"].concat())
        .expect("rename");
    let mode = (libc::S_IFIFO | 0o600).to_le_bytes();
    rig.fuse(Opcode::Mknod, rw, &[&mode[..], &[0; 12], b"fifo\0"].concat()).expect("mknod");
    rig.fuse(Opcode::Statfs, rw, &[]).expect("statfs");
    let set = [&1u32.to_le_bytes()[..], &0u32.to_le_bytes(), b"user.k\0v"].concat();
    match rig.fuse(Opcode::Setxattr, node, &set) {
        Ok(_) => {
            let get = [&64u32.to_le_bytes()[..], &[0; 4], b"user.k\0"].concat();
            assert_eq!(rig.fuse(Opcode::Getxattr, node, &get).expect("getxattr"), b"v");
            rig.fuse(Opcode::Removexattr, node, b"user.k\0").expect("removexattr");
        }
        Err(libc::EOPNOTSUPP) => eprintln!("SKIPPED: no user xattrs on this file system"),
        Err(other) => panic!("setxattr: {other}"),
    }
    // Mode, size, times, and as root the owner.
    let setattr = |valid: u32, size: u64, mode: u32, uid: u32| {
        let mut body = vec![0; 88];
        body[..4].copy_from_slice(&valid.to_le_bytes());
        body[16..24].copy_from_slice(&size.to_le_bytes());
        body[68..72].copy_from_slice(&mode.to_le_bytes());
        body[76..80].copy_from_slice(&uid.to_le_bytes());
        body
    };
    rig.fuse(Opcode::Setattr, node, &setattr(1 | 8 | 16 | 32, 100, 0o640, 0)).expect("setattr");
    let metadata = fs::metadata(shared.join("new")).expect("the file");
    assert_eq!((metadata.size(), metadata.mode() & 0o777), (100, 0o640));
    let owned = rig.fuse(Opcode::Setattr, node, &setattr(2, 0, 0, 1234));
    if root {
        owned.expect("chown");
        assert_eq!(fs::metadata(shared.join("new")).expect("the file").uid(), 1234);
    } else {
        assert_eq!(owned, Err(libc::EPERM));
    }
    let opened = rig.fuse(Opcode::Opendir, rw, &[0; 8]).expect("opendir");
    let mut list = opened[..8].to_vec();
    list.extend([0; 8]);
    list.extend(8192u32.to_le_bytes());
    list.resize(40, 0);
    for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
        let listed = rig.fuse(opcode, rw, &list).expect("a list");
        assert!(listed.windows(5).any(|w| w == b"moved"), "{opcode:?}");
    }
    for name in ["moved", "s", "fifo"] {
        rig.fuse(Opcode::Unlink, rw, &with_nul(&[name])).expect("unlink");
    }
    rig.fuse(Opcode::Rmdir, rw, &with_nul(&["d"])).expect("rmdir");
    rig.fuse(Opcode::Release, node, &[&handle.to_le_bytes()[..], &[0; 16]].concat())
        .expect("release");

    let ro = rig.lookup(ROOT, "ro").expect("the share");
    assert_eq!(rig.create(ro, "x", libc::O_RDWR).map(drop), Err(libc::EROFS));
    let one = rig.lookup(ROOT, "file").expect("the share");
    let file = rig.lookup(one, mvm_fs::FILE).expect("the file");
    let handle = rig.open(file, libc::O_RDWR).expect("the file");
    assert_eq!(rig.read(file, handle, 0, 20).expect("a read"), b"one file");
    assert_eq!(rig.create(one, "beside", libc::O_RDWR).map(drop), Err(libc::EROFS));

    let mut client = ShareClient::connect(&dir.path().join("sock")).expect("a connection");
    if root {
        let tree = mvm_fs::tree::detach(&more, Extent::whole(false)).expect("a tree");
        client.add("more", tree, ShareOptions::default()).expect("a share");
        let share = rig.lookup(ROOT, "more").expect("the share");
        rig.create(share, "x", libc::O_RDWR).expect("a file");
        assert!(more.join("x").exists());
        client.remove("more").expect("an end");
    }
    assert_eq!(client.list().expect("names"), ["file", "ro", "rw"]);
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("its status");
    assert!(status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t1"), "{status}");
    // The device goes, and the server with it.
    drop(rig);
    server.finish();
    assert!(!Path::new(&format!("/proc/{}", server.pid())).exists());
    eprintln!("test a_confined_server_serves_everything ... ok");
}

/// More files than the server may hold open: who wants one gets it when the guest forgets another, and all are listed.
fn a_server_without_descriptors_waits_for_the_guest() {
    const FILES: usize = 300;
    const DESCRIPTORS: u64 = 100;
    let dir = tempfile::tempdir().expect("a directory");
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).expect("a directory");
    for i in 0..FILES {
        fs::write(shared.join(format!("f{i}")), b"x").expect("a file");
    }
    let (mut server, channel) =
        start(dir.path(), vec![share("s", &shared, false)]).expect("a server");
    let limit = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
    prlimit(Pid::from_raw(server.pid().cast_signed()), Resource::Nofile, limit).expect("a limit");
    let mut rig = Rig::over(Packets::from(channel));
    rig.init();
    let share = rig.lookup(ROOT, "s").expect("the share");
    let opened = rig.fuse(Opcode::Opendir, share, &[0; 8]).expect("opendir");
    let handle = number(&opened, 0);

    let names: Vec<_> = (0..FILES).map(|i| format!("f{i}")).collect();
    let found: Vec<_> = names.iter().map(|name| rig.lookup(share, name)).collect();
    let mut known: Vec<u64> = found.iter().copied().map_while(Result::ok).collect();
    assert!((1..DESCRIPTORS as usize).contains(&known.len()), "{} are known", known.len());
    let full = &found[known.len()..];
    assert!(full.iter().all(|found| *found == Err(libc::EMFILE)), "nothing is forgotten: {full:?}");
    let exclusive = libc::O_RDWR | libc::O_EXCL;
    assert_eq!(rig.create(share, "new", exclusive).map(drop), Err(libc::EMFILE));
    assert!(!shared.join("new").exists(), "nothing half done");

    // A guest that forgets something is hoped to forget more: who waits goes on when it does.
    known.drain(..1).for_each(|node| rig.forget(node));
    known.push(rig.lookup(share, &names[FILES - 2]).expect("a file"));
    rig.begin(Opcode::Lookup, share, &with_nul(&[&names[FILES - 1]]));
    known.drain(..1).for_each(|node| rig.forget(node));
    rig.finish().expect("the file");
    rig.begin(Opcode::Create, share, &create_body("new", exclusive));
    known.drain(..5).for_each(|node| rig.forget(node));
    rig.finish().expect("a new file");
    assert!(shared.join("new").exists());
    let mut listed = BTreeSet::new();
    let mut offset = 0;
    loop {
        rig.begin(Opcode::Readdirplus, share, &io_body(handle, offset, 4096));
        known.drain(..known.len().min(20)).for_each(|node| rig.forget(node));
        let more = listed_plus(&rig.finish().expect("a list"));
        let Some((_, next, _)) = more.last() else { break };
        offset = *next;
        for (node, _, name) in more {
            known.push(node);
            assert!(listed.insert(name), "each once");
        }
    }
    assert_eq!(listed.len(), FILES + 1, "and the new one");
    drop(rig);
    server.finish();
    eprintln!("test a_server_without_descriptors_waits_for_the_guest ... ok");
}

/// A tmpfs of the host. Dropping it unmounts it.
struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn mount(path: &'a Path) -> nix::Result<Self> {
        let (kind, none) = (Some("tmpfs"), None::<&str>);
        mount(kind, path, kind, MsFlags::empty(), none)?;
        Ok(Self(path))
    }

    /// Unmounts it as long as nobody uses it.
    fn unmount(self) -> nix::Result<()> {
        let done = umount2(self.0, MntFlags::empty());
        if done.is_ok() {
            std::mem::forget(self);
        }
        done
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

/// Waits until it is so. Mounts are followed by another process.
fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    for _ in 0..600 {
        if so() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("never: {what}");
}

fn what_the_host_mounts_is_followed() {
    let dir = tempfile::tempdir().expect("a directory");
    let source = dir.path().join("source");
    fs::create_dir(&source).expect("a directory");
    let Ok(top) = Tmpfs::mount(&source) else {
        eprintln!("SKIPPED: cannot mount here");
        return;
    };
    let none = None::<&str>;
    mount(none, &source, none, MsFlags::MS_PRIVATE, none).expect("a private mount");
    assert!(!can_be_followed(&source).expect("an answer"));
    mount(none, &source, none, MsFlags::MS_SHARED, none).expect("a shared mount");
    for name in ["early", "late", "late/deep"] {
        fs::create_dir(source.join(name)).expect("a directory");
    }
    assert!(can_be_followed(&source.join("late/deep")).expect("an answer"));
    fs::write(source.join("late/under"), b"under").expect("a file");
    let (early, late) = (source.join("early"), source.join("late"));
    let deep = late.join("deep");
    let early = Tmpfs::mount(&early).expect("a mount");
    fs::write(source.join("early/f"), b"early").expect("a file");

    let extent = Extent { recursive: true, read_only: ReadOnly::Top };
    let tree = follow(&source, extent, Path::new("/proc/self/exe")).expect("a tree");
    let options = ShareOptions::default();
    let new = NewShare { name: "v".into(), source: Source::Tree(tree), options };
    let (mut server, channel) = start(dir.path(), vec![new]).expect("a server");
    let mut rig = Rig::over(Packets::from(channel));
    rig.init();
    let share = rig.lookup(ROOT, "v").expect("the share");
    let early_dir = rig.lookup(share, "early").expect("what was mounted before");
    assert!(rig.lookup(early_dir, "f").is_ok());
    // Only what was there at first cannot be written.
    assert_eq!(rig.create(share, "new", libc::O_RDWR).map(drop), Err(libc::EROFS));
    rig.create(early_dir, "new", libc::O_RDWR).expect("a file");

    let late_mount = Tmpfs::mount(&late).expect("a mount");
    fs::write(late.join("f"), b"late").expect("a file");
    fs::create_dir(&deep).expect("a directory");
    let deep_mount = Tmpfs::mount(&deep).expect("a mount");
    fs::write(deep.join("f"), b"deep").expect("a file");
    let mut at = |path: &[&str]| path.iter().try_fold(share, |node, name| rig.lookup(node, name));
    eventually("what is mounted is seen", || at(&["late", "deep", "f"]).is_ok());
    assert!(at(&["late", "f"]).is_ok() && at(&["late", "under"]).is_err());
    let node = at(&["late", "f"]).expect("a file");
    let handle = rig.open(node, libc::O_RDONLY).expect("the file");

    // What the host has mounted is not taken away with its place.
    assert_eq!(rig.fuse(Opcode::Rmdir, share, b"late\0").map(drop), Err(libc::EBUSY));
    let rename = [&share.to_le_bytes()[..], b"late\0later\0"].concat();
    assert_eq!(rig.fuse(Opcode::Rename, share, &rename).map(drop), Err(libc::EBUSY));
    // The guest has files of both open, or remembers them: the host unmounts them all the same.
    deep_mount.unmount().expect("not in use");
    late_mount.unmount().expect("not in use");
    let mut at = |path: &[&str]| path.iter().try_fold(share, |node, name| rig.lookup(node, name));
    eventually("what is unmounted is gone", || at(&["late", "under"]).is_ok());
    assert_eq!(at(&["late", "f"]), Err(libc::ENOENT));
    assert!(at(&["early", "f"]).is_ok(), "the other one is still there");
    assert_eq!(rig.read(node, handle, 0, 9).expect("what is open lives on"), b"late");
    // Two that come one after the other at one place are two.
    let again = Tmpfs::mount(&late).expect("a mount");
    fs::write(late.join("f"), b"again").expect("a file");
    let read = |rig: &mut Rig| {
        let node = ["late", "f"].iter().try_fold(share, |node, name| rig.lookup(node, name))?;
        let handle = rig.open(node, libc::O_RDONLY)?;
        rig.read(node, handle, 0, 9)
    };
    eventually("the second one is seen", || read(&mut rig).is_ok_and(|data| data == b"again"));
    again.unmount().expect("not in use");

    let follower = fs::read_dir("/proc").expect("processes").flatten().find(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        line.starts_with(format!("{}: {}", follow::PROCESS_NAME, source.display()).as_bytes())
    });
    let follower = follower.expect("the follower").path();
    drop(rig);
    server.finish();
    eventually("the follower ends with the server", || !follower.exists());
    early.unmount().expect("not in use");
    top.unmount().expect("not in use");
    eprintln!("test what_the_host_mounts_is_followed ... ok");
}

fn a_path_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let missing = dir.path().join("missing");
    let error = start(dir.path(), vec![share("x", &missing, false)]).expect_err("an error");
    let text = error.to_string();
    assert!(text.contains("missing") && text.contains("No such file"), "{text}");
    eprintln!("test a_path_that_is_not_there_is_named ... ok");
}
