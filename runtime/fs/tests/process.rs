//! The server as a process: confined, and still able to do everything that files need.
//!
//! The test is its own server: it runs itself again, as `mvm` does.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use fuse_backend_rs::abi::fuse_abi::Opcode;
use mvm_devices::packets::Packets;
use mvm_fs::rig::{ROOT, Rig, with_nul};
use mvm_fs::{Cache, FileServer, Launch, NewShare, ShareClient, ShareOptions, Source, spawn};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use std::os::fd::AsRawFd;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(mvm_fs::SUBCOMMAND) {
        return mvm_fs::main();
    }
    a_confined_server_serves_everything();
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
        let tree = mvm_fs::tree::detach(&more, mvm_fs::tree::Extent::whole(false)).expect("a tree");
        client.add("more", tree.into(), ShareOptions::default()).expect("a share");
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

fn a_path_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let missing = dir.path().join("missing");
    let error = start(dir.path(), vec![share("x", &missing, false)]).expect_err("an error");
    let text = error.to_string();
    assert!(text.contains("missing") && text.contains("No such file"), "{text}");
    eprintln!("test a_path_that_is_not_there_is_named ... ok");
}
