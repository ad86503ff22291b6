//! Roots that are XFS: disks of a guest whose kernel gets the module for them when it needs it, and not before.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mvm_tests::{Chroot, Shim, World, eventually, run_with};
use tempfile::TempDir;

/// Enough for anything that the host does.
const HOST: Duration = Duration::from_secs(120);

/// The smallest that mkfs.xfs makes. Most of it is a hole.
const SIZE: u64 = 300 << 20;

/// What the root is, and how often it has been here.
const COUNT: &str = "grep ' / ' /proc/mounts | cut -d' ' -f1,3; cat /kept; echo $((1 + $(cat /kept || echo 0))) >/kept";

fn host(program: &str, args: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(args);
    run_with(command, b"", HOST).expect_code(0).out()
}

fn dir() -> TempDir {
    tempfile::Builder::new().prefix("mvm-xfs-").tempdir().expect("a directory")
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: the shim wants root, and this is an ordinary user");
    }
    root
}

/// An XFS image of the busybox tree.
fn image(dir: &TempDir) -> PathBuf {
    let tree = Chroot::new(&World::new().image_file("busybox"));
    let mut list = "none\n0 0\n".to_owned();
    describe(&tree.path(), None, &mut list);
    let prototype = dir.path().join("prototype");
    fs::write(&prototype, list).expect("a prototype");
    let path = dir.path().join("xfs");
    File::create(&path).and_then(|file| file.set_len(SIZE)).expect("a file");
    let arguments = [&prototype, &path].map(|path| path.display().to_string());
    host("mkfs.xfs", &["-q", "-p", &arguments[0], &arguments[1]]);
    path
}

/// Describes a file, and what is below it, as mkfs.xfs(8) wants it (`-p`): name, kind and permissions, owner and group, and
/// what makes it up.
fn describe(path: &Path, name: Option<&str>, list: &mut String) {
    let about = fs::symlink_metadata(path).expect("a file");
    let kind = about.file_type();
    let letter = match (kind.is_dir(), kind.is_symlink()) {
        (true, _) => 'd',
        (_, true) => 'l',
        _ => '-',
    };
    let mode = about.permissions().mode() & 0o777;
    let _ = write!(
        list,
        "{}{letter}--{mode:03o} 0 0",
        name.map(|n| format!("{n} ")).unwrap_or_default()
    );
    if kind.is_symlink() {
        let _ = writeln!(list, " {}", fs::read_link(path).expect("a link").display());
    } else if kind.is_file() {
        let _ = writeln!(list, " {}", path.display());
    } else {
        list.push('\n');
        for entry in fs::read_dir(path).expect("a directory").flatten() {
            let name = entry.file_name();
            describe(&entry.path(), name.to_str(), list);
        }
        list.push_str("$\n");
    }
}

/// A copy, its UUID included, as snapshotters make them.
fn clone(image: &Path, name: &str) -> PathBuf {
    let copy = image.with_file_name(name);
    let [from, to] = [image, &copy].map(|path| path.display().to_string());
    host("cp", &["--sparse=always", &from, &to]);
    copy
}

/// Whether it was taken out of use in good order.
fn is_clean(image: &Path) -> bool {
    let log = host("xfs_logprint", &["-t", &image.display().to_string()]);
    let (clean, dirty) = (log.contains("<CLEAN>"), log.contains("<DIRTY>"));
    assert!(clean != dirty, "{log}");
    clean
}

#[test]
fn xfs_is_a_disk_of_the_guest() {
    if !is_root() {
        return;
    }
    let dir = dir();
    let shim = Shim::new();
    let xfs = image(&dir);
    for n in 0..2 {
        let run = shim.run(&format!("w{n}"), "xfs", &xfs, &["loop", "rw"], COUNT);
        let want = if n == 0 { "/dev/vda xfs\n" } else { "/dev/vda xfs\n1\n" };
        assert_eq!((run.code, run.out().as_str()), (0, want), "{}", run.err());
        assert!(is_clean(&xfs));
    }
    host("xfs_repair", &["-n", "-f", &xfs.display().to_string()]);
    let script = "cat /kept; echo x >/new || echo refused";
    let run = shim.run("r", "xfs", &xfs, &["loop", "ro"], script);
    assert_eq!((run.code, run.out().as_str()), (0, "2\nrefused\n"), "{}", run.err());
    shim.expect_nothing_left();
}

#[test]
fn clones_of_one_image_are_roots_of_a_pod_that_gets_the_module_for_them() {
    if !is_root() {
        return;
    }
    let dir = dir();
    let shim = Shim::new();
    let xfs = image(&dir);
    let clones = ["a", "b"].map(|name| clone(&xfs, name));
    let ext4 = dir.path().join("ext4").display().to_string();
    let tree = Chroot::new(&World::new().image_file("busybox"));
    host("mke2fs", &["-q", "-t", "ext4", "-d", &tree.path().display().to_string(), &ext4, "16M"]);
    let pod = shim.pod("pod1");
    let known = "grep -w xfs /proc/filesystems || echo none; cat /proc/modules | cut -d' ' -f1";
    pod.start("before", "ext4", Path::new(&ext4), &["loop", "rw"], known);
    let before = pod.finish("before");
    assert_eq!((before.code, before.out().as_str()), (0, "none\n"), "{}", before.err());
    // Both at a time: they have the same UUID, and in the kernel of one machine.
    let about = "grep ' / ' /proc/mounts | cut -d' ' -f3; grep ' / ' /proc/mounts | grep -o nouuid";
    for (n, clone) in clones.iter().enumerate() {
        let id = format!("c{n}");
        let script =
            format!("{about}; echo {id} >/kept; sync; echo done; while :; do sleep 0.1; done");
        pod.start(&id, "xfs", clone, &["loop", "rw", "nouuid"], &script);
        eventually("its root", || pod.output(&id).ends_with("done\n"));
        assert_eq!(pod.output(&id), "xfs\nnouuid\ndone\n");
    }
    // One goes, while the other stays.
    pod.kill("c0");
    assert_eq!(pod.finish("c0").code, 137);
    assert!(is_clean(&clones[0]) && !is_clean(&clones[1]));
    pod.start("again", "xfs", &clones[0], &["loop", "rw", "nouuid"], "cat /kept");
    let again = pod.finish("again");
    assert_eq!((again.code, again.out().as_str()), (0, "c0\n"), "{}", again.err());
    pod.start("after", "ext4", Path::new(&ext4), &["loop", "rw"], known);
    let after = pod.finish("after");
    assert_eq!((after.code, after.out().as_str()), (0, "\txfs\nxfs\n"), "{}", after.err());
    pod.end(&["c1"]);
    assert!(is_clean(&clones[1]));
    let run = shim.run("alone", "xfs", &clones[1], &["loop"], "cat /kept");
    assert_eq!((run.code, run.out().as_str()), (0, "c1\n"), "{}", run.err());
    shim.expect_nothing_left();
}

#[test]
fn xfs_that_was_not_taken_out_of_use_is_recovered_or_refused_with_the_reason() {
    if !is_root() {
        return;
    }
    let dir = dir();
    let shim = Shim::new();
    let xfs = image(&dir);
    let script = "echo kept >/kept; sync; echo done; while :; do sleep 0.1; done";
    let killed = shim.run_killed("k", "xfs", &xfs, &["loop", "rw"], script);
    assert_eq!(killed.out(), "done\n", "{}", killed.err());
    assert!(!is_clean(&xfs));
    // What may not be written cannot be recovered, as it could not be on the host.
    let refused = shim.run("r", "xfs", &xfs, &["loop", "ro"], "echo never");
    assert_eq!(refused.out(), "");
    let why = refused.err();
    for part in ["mount xfs of /dev/vda", "XFS (vda): ", "recovery required", "norecovery"] {
        assert!(why.contains(part), "no {part} in {why}");
    }
    let run = shim.run("n", "xfs", &xfs, &["loop", "ro", "norecovery"], "echo fine");
    assert_eq!((run.code, run.out().as_str()), (0, "fine\n"), "{}", run.err());
    assert!(!is_clean(&xfs), "nothing has written to it");
    let run = shim.run("w", "xfs", &xfs, &["loop", "rw"], "cat /kept");
    assert_eq!((run.code, run.out().as_str()), (0, "kept\n"), "{}", run.err());
    assert!(is_clean(&xfs));
    shim.expect_nothing_left();
}
