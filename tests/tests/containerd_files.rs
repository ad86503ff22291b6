//! What containers of containerd see of the host's files: roots, bind mounts, disks.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mvm_tests::hostmount::{FOLLOWS, HostMount, followed, is_followed};
use mvm_tests::{
    Chroot, Containerd, IMAGE, LoopDevice, Shim, World, containerd, eventually, run_with,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

const POSIX: &str = include_str!("volumes/posix.py");

/// Enough for anything that the host does.
const HOST: Duration = Duration::from_secs(120);

/// Enough for much data in an emulated guest.
const LARGE: Duration = Duration::from_secs(3600);

fn dir() -> TempDir {
    tempfile::Builder::new().prefix("mvm-files-").tempdir().expect("a directory")
}

fn bind(source: &Path, target: &str, options: &str) -> String {
    format!("type=bind,src={},dst={target},options={options}", source.display())
}

/// Where containerd has the root of a container that exists.
fn root_of(ctd: &Containerd, id: &str) -> std::path::PathBuf {
    ctd.path(&format!("state/io.containerd.runtime.v2.task/default/{id}/rootfs"))
}

fn host(program: &str, args: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(args);
    run_with(command, b"", HOST).expect_code(0).out()
}

#[test]
fn a_root_is_the_snapshot_itself() {
    let ctd = containerd!();
    ctd.start_container(
        "c1",
        "rm /etc/group; echo mine >/etc/passwd; mkdir -p /a/b; echo x >/a/b/f; ln /a/b/f /a/hard; \
         ln -s b/f /a/soft; chown 1234:4321 /a/b/f; chmod 4751 /a/b/f; mkfifo /a/pipe; \
         grep ' / ' /proc/mounts; ls -ld /a/b/f | cut -c1-10; echo done; while :; do sleep 0.1; done",
    );
    eventually("its files", || ctd.output("c1").contains("done"));
    assert!(ctd.output("c1").contains("virtiofs"), "{}", ctd.output("c1"));
    assert!(ctd.output("c1").contains("-rwsr-x--x"), "{}", ctd.output("c1"));
    let root = root_of(&ctd, "c1");
    let about = fs::metadata(root.join("a/b/f")).expect("a file");
    assert_eq!((about.uid(), about.gid(), about.mode() & 0o7777), (1234, 4321, 0o4751));
    assert_eq!(about.nlink(), 2);
    assert_eq!(fs::read_to_string(root.join("a/soft")).expect("a link"), "x\n");
    assert_eq!(fs::read_to_string(root.join("etc/passwd")).expect("a file"), "mine\n");
    assert!(!root.join("etc/group").exists());
    // Another container has the image as it was.
    let other = ctd.sh(&[], "c2", "ls /a; wc -l </etc/group").expect_code(0);
    assert_eq!(other.out(), "4\n");
    ctd.ctr(&["task", "kill", "-s", "SIGKILL", "c1"]).expect_code(0);
    ctd.remove("c1");
    ctd.expect_nothing_left();
}

#[test]
fn snapshots_that_are_plain_directories() {
    let ctd = containerd!();
    let image = World::new().image_file("busybox");
    ctd.import(&image, IMAGE, "native");
    let flags = ["--snapshotter", "native"];
    let script = "rm /etc/group; echo x >/f; mv /home /house; ls -d /f /house; echo $(ls /etc)";
    let run = ctd.sh(&flags, "c1", script).expect_code(0);
    assert_eq!(run.out(), "/f\n/house\npasswd\n", "{}", run.err());
    ctd.expect_nothing_left();
}

#[test]
fn posix_behaviour_of_a_root_is_the_hosts_own() {
    let ctd = containerd!();
    let image = World::new().image_file("debian");
    let name = "docker.io/library/debian:latest";
    ctd.import(&image, name, ctd.snapshotter());
    let dir = dir();
    fs::write(dir.path().join("posix.py"), POSIX).expect("the script");
    let chroot = Chroot::new(&image);
    fs::create_dir(chroot.path().join("work")).expect("a directory");
    fs::write(chroot.path().join("work/posix.py"), POSIX).expect("the script");
    let host = chroot.sh("cd /work && python3 posix.py").expect_code(0).out();
    let mount = bind(dir.path(), "/script", "rbind:ro");
    let script = "mkdir /work && cd /work && cp /script/posix.py . && python3 posix.py";
    let flags = ["--rm", "--mount", &mount];
    let command = ctd.run_image_command(&flags, name, "c1", &["sh", "-c", script]);
    let guest = run_with(command, b"", Duration::from_secs(300)).expect_code(0).out();
    assert!(host.lines().count() > 60, "{host}");
    let differing: Vec<_> = host.lines().zip(guest.lines()).filter(|(h, g)| h != g).collect();
    assert!(differing.is_empty(), "host and guest differ: {differing:#?}");
    assert_eq!(host.lines().count(), guest.lines().count(), "{host}\n---\n{guest}");
    ctd.expect_nothing_left();
}

#[test]
fn a_root_of_mapped_users() {
    let ctd = containerd!();
    let flags = ["--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536"];
    let script = "id -u; stat -c %u:%g /bin/busybox; touch /new; chown 7:8 /new; stat -c %u:%g /new; \
                  cat /proc/self/uid_map | tr -s ' '";
    let run = ctd.sh(&flags, "c1", script).expect_code(0);
    assert_eq!(run.out(), "0\n0:0\n7:8\n 0 100000 65536\n", "{}", run.err());
    ctd.expect_nothing_left();
}

#[test]
fn directories_and_files_are_mounted() {
    let ctd = containerd!();
    let dir = dir();
    let at = |name: &str| dir.path().join(name);
    for name in ["rw", "ro"] {
        fs::create_dir(at(name)).expect("a directory");
        fs::write(at(name).join("f"), format!("{name}\n")).expect("a file");
    }
    fs::write(at("one"), "one\n").expect("a file");
    fs::write(at("two"), "two\n").expect("a file");
    let mounts = [
        bind(&at("rw"), "/rw", "rbind:rw"),
        bind(&at("ro"), "/deep/ro", "rbind:ro"),
        bind(&at("one"), "/etc/app/one", "bind:rw:rprivate"),
        bind(&at("two"), "/etc/passwd", "bind:ro"),
        "type=tmpfs,src=tmpfs,dst=/scratch,options=size=1m:mode=1777".into(),
    ];
    let flags: Vec<&str> = mounts.iter().flat_map(|m| ["--mount", m.as_str()]).collect();
    let script = "cat /rw/f /deep/ro/f /etc/app/one /etc/passwd; echo a >/rw/a; chown 5:6 /rw/a; \
                  echo b >/deep/ro/b; echo c >>/etc/app/one; echo d >>/etc/passwd; \
                  df -k /scratch | awk 'NR == 2 { print $2 }'; df -k /dev/shm | awk 'NR == 2 { print $2 }'";
    let run = ctd.sh(&flags, "c1", script).expect_code(0);
    assert_eq!(run.out(), "rw\nro\none\ntwo\n1024\n65536\n", "{}", run.err());
    assert_eq!(run.err().matches("Read-only file system").count(), 2, "{}", run.err());
    assert_eq!(fs::read_to_string(at("rw/a")).expect("a file"), "a\n");
    assert_eq!(fs::metadata(at("rw/a")).expect("a file").uid(), 5);
    assert!(!at("ro/b").exists());
    assert_eq!(fs::read_to_string(at("one")).expect("a file"), "one\nc\n");
    assert_eq!(fs::read_to_string(at("two")).expect("a file"), "two\n");
    ctd.expect_nothing_left();
}

#[test]
fn mounts_below_a_mount_are_seen_and_keep_their_own_access() {
    let ctd = containerd!();
    let dir = dir();
    let below = dir.path().join("below");
    fs::create_dir(&below).expect("a directory");
    fs::write(below.join("covered"), "covered\n").expect("a file");
    mount(Some("tmpfs"), &below, Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("a mount");
    let undo = Unmount(&below);
    fs::write(below.join("f"), "on top\n").expect("a file");
    let all = bind(dir.path(), "/v", "rbind:ro");
    let script =
        "cat /v/below/f; echo x >/v/below/new && echo written; echo x >/v/new || echo refused";
    let run = ctd.sh(&["--mount", &all], "c1", script).expect_code(0);
    assert_eq!(run.out(), "on top\nwritten\nrefused\n", "{}", run.err());
    assert!(below.join("new").exists() && !dir.path().join("new").exists());
    let whole = bind(dir.path(), "/v", "rbind:rro");
    let run = ctd.sh(&["--mount", &whole], "c2", "echo x >/v/below/two || echo refused");
    assert_eq!(run.out(), "refused\n", "{}", run.err());
    let top = bind(dir.path(), "/v", "bind:ro");
    let run = ctd.sh(&["--mount", &top], "c3", "cat /v/below/covered").expect_code(0);
    assert_eq!(run.out(), "covered\n");
    ctd.expect_nothing_left();
    drop(undo);
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn what_cannot_be_mounted_is_refused_in_words() {
    let ctd = containerd!();
    let dir = dir();
    let socket = dir.path().join("docker.sock");
    let _listener = UnixListener::bind(&socket).expect("a socket");
    for (n, (mount, want)) in [
        (bind(&socket, "/run/docker.sock", "bind"), "only directories and regular files"),
        (bind(dir.path(), "/v", "rbind:rshared"), "use rslave"),
        (bind(&dir.path().join("missing"), "/v", "bind"), "No such file"),
    ]
    .into_iter()
    .enumerate()
    {
        let run = ctd.sh(&["--mount", &mount], &format!("c{n}"), "true");
        assert!(run.code != 0 && run.err().contains(want), "{mount}: {}", run.err());
        ctd.ctr(&["container", "rm", &format!("c{n}")]);
    }
    ctd.expect_nothing_left();
}

#[test]
fn what_the_host_mounts_later_is_seen() {
    let ctd = containerd!();
    let dir = dir();
    let mounts = followed(dir.path());
    let log = format!("file://{}", ctd.path("c1.log").display());
    // Only the source's own mount cannot be written.
    let mount = bind(dir.path(), "/v", "rbind:rslave:ro");
    let flags = ["-d", "--log-uri", &log, "--mount", &mount];
    let command = ctd.run_command(&flags, "c1", &["sh", "-c", FOLLOWS]);
    run_with(command, b"", HOST).expect_code(0);
    is_followed(mounts, || ctd.output("c1"));
    ctd.ctr(&["task", "kill", "-s", "SIGKILL", "c1"]).expect_code(0);
    ctd.remove("c1");
    // Where nothing is told there is nothing to be seen, and no error, as with runc.
    let plain = HostMount::private(dir.path());
    fs::write(dir.path().join("f"), "plain\n").expect("a file");
    let mount = bind(dir.path(), "/v", "rbind:rslave");
    assert_eq!(ctd.sh(&["--mount", &mount], "c2", "cat /v/f").expect_code(0).out(), "plain\n");
    drop(plain);
    ctd.expect_nothing_left();
}

#[test]
fn swapped_links_are_followed() {
    let ctd = containerd!();
    let dir = dir();
    // As the kubelet writes config maps: a link to the data that is replaced in one step.
    let swap = |version: &str| {
        let data = dir.path().join(format!("..{version}"));
        fs::create_dir(&data).expect("a directory");
        fs::write(data.join("key"), format!("{version}\n")).expect("a file");
        symlink(format!("..{version}"), dir.path().join("..data_tmp")).expect("a link");
        fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).expect("a swap");
    };
    swap("one");
    symlink("..data/key", dir.path().join("key")).expect("a link");
    let mount = bind(dir.path(), "/config", "rbind:ro");
    let log = format!("file://{}", ctd.path("c1.log").display());
    let script = "cat /config/key; until [ \"$(cat /config/key)\" = two ]; do sleep 0.1; done; \
                  echo seen; while :; do sleep 0.1; done";
    let flags = ["-d", "--log-uri", &log, "--mount", &mount];
    let command = ctd.run_command(&flags, "c1", &["sh", "-c", script]);
    run_with(command, b"", HOST).expect_code(0);
    eventually("the first content", || ctd.output("c1") == "one\n");
    swap("two");
    eventually("the second content", || ctd.output("c1") == "one\nseen\n");
    ctd.ctr(&["task", "kill", "-s", "SIGKILL", "c1"]).expect_code(0);
    ctd.remove("c1");
    ctd.expect_nothing_left();
}

#[test]
fn data_comes_through_whole() {
    let ctd = containerd!();
    whole(&ctd, 64);
    ctd.expect_nothing_left();
}

#[test]
#[ignore = "a gibibyte"]
fn a_gibibyte_comes_through_whole() {
    let ctd = containerd!();
    whole(&ctd, 1024);
    ctd.expect_nothing_left();
}

/// So many mebibytes from a bind mount into the root, from there back, with digests on both sides.
fn whole(ctd: &Containerd, mebibytes: u64) {
    let dir = dir();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    let count = mebibytes.to_string();
    let of = format!("of={}", input.display());
    host("dd", &["if=/dev/urandom", &of, "bs=1M", &format!("count={count}"), "status=none"]);
    let mount = bind(dir.path(), "/v", "rbind:rw");
    let script = "dd if=/v/in of=/copy bs=1M 2>/dev/null; sync; echo 3 >/proc/sys/vm/drop_caches; \
                  sha256sum </copy; dd if=/copy of=/v/out bs=64k 2>/dev/null; \
                  dd if=/copy bs=4k count=500 2>/dev/null | sha256sum";
    let flags = ["--rm", "--privileged", "--mount", &mount];
    let command = ctd.run_command(&flags, "c1", &["sh", "-c", script]);
    let run = run_with(command, b"", LARGE).expect_code(0);
    let digest = |path: &Path| host("sha256sum", &[&path.display().to_string()]);
    let want = digest(&input);
    let want = want.split_whitespace().next().expect("a digest");
    let start = dir.path().join("start");
    let (from, to) = (format!("if={}", input.display()), format!("of={}", start.display()));
    host("dd", &[&from, &to, "bs=4k", "count=500", "status=none"]);
    let first = digest(&start);
    let first = first.split_whitespace().next().expect("a digest");
    let seen: Vec<_> =
        run.out().split_whitespace().filter(|w| *w != "-").map(String::from).collect();
    assert_eq!(seen, [want, first], "{}", run.err());
    assert!(digest(&output).starts_with(want));
}

#[test]
fn two_thousand_files_are_unpacked() {
    let ctd = containerd!();
    unpack(&ctd, 2000);
    ctd.expect_nothing_left();
}

#[test]
#[ignore = "many files"]
fn twenty_thousand_files_are_unpacked() {
    let ctd = containerd!();
    unpack(&ctd, 20_000);
    ctd.expect_nothing_left();
}

#[test]
#[ignore = "many files"]
fn a_repository_of_five_thousand_files_is_cloned() {
    let ctd = containerd!();
    let name = "docker.io/library/debian:latest";
    ctd.import(&World::new().image_file("debian"), name, ctd.snapshotter());
    let dir = dir();
    let mount = bind(dir.path(), "/v", "rbind:rw");
    let script = mvm_tests::clone_script(5000, "/three");
    let flags = ["--rm", "--mount", &mount];
    let command = ctd.run_image_command(&flags, name, "c1", &["bash", "-c", &script]);
    let run = run_with(command, b"", LARGE).expect_code(0);
    mvm_tests::expect_cloned(&run, 5000, &dir.path().join("two"));
    ctd.expect_nothing_left();
}

#[test]
fn data_on_a_disk_comes_through_whole() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: the shim mounts, and this is an ordinary user");
        return;
    }
    let shim = Shim::new();
    mvm_tests::data_on_a_disk(&shim, 64);
    shim.expect_nothing_left();
}

fn unpack(ctd: &Containerd, count: usize) {
    let dir = dir();
    let source = dir.path().join("source");
    for index in 0..count {
        let parent = source.join(format!("d{}", index % 50));
        if index < 50 {
            fs::create_dir_all(&parent).expect("a directory");
        }
        fs::write(parent.join(format!("f{index}")), format!("{index}\n")).expect("a file");
    }
    let archive = dir.path().join("x.tar").display().to_string();
    host("tar", &["-C", &source.display().to_string(), "-cf", &archive, "."]);
    let digest = "find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum";
    let want = host("sh", &["-c", &format!("cd {} && {digest}", source.display())]);
    let mount = bind(dir.path(), "/v", "rbind:ro");
    let script =
        format!("mkdir /x && cd /x && tar -xf /v/x.tar && find . -type f | wc -l && {digest}");
    let command = ctd.run_command(&["--rm", "--mount", &mount], "c1", &["sh", "-c", &script]);
    let run = run_with(command, b"", LARGE).expect_code(0);
    assert_eq!(run.out(), format!("{count}\n{want}"), "{}", run.err());
}

/// An image of the busybox tree, made by `mkfs` from the directory and the file it is given.
fn image(dir: &TempDir, name: &str, mkfs: impl FnOnce(&str, &str)) -> std::path::PathBuf {
    let tree = Chroot::new(&World::new().image_file("busybox"));
    let path = dir.path().join(name);
    mkfs(&tree.path().display().to_string(), &path.display().to_string());
    path
}

#[test]
fn a_file_system_is_a_disk_of_the_guest() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: the shim mounts, and this is an ordinary user");
        return;
    }
    let dir = dir();
    let shim = Shim::new();
    let ext4 = image(&dir, "ext4", |tree, path| {
        host("mke2fs", &["-q", "-t", "ext4", "-d", tree, path, "32M"]);
    });
    let script = "grep ' / ' /proc/mounts | cut -d' ' -f1,3; cat /kept; echo $((1 + $(cat /kept || echo 0))) >/kept";
    for n in 0..2 {
        let run = shim.run(&format!("w{n}"), "ext4", &ext4, &["loop", "rw"], script);
        let want = if n == 0 { "/dev/vda ext4\n" } else { "/dev/vda ext4\n1\n" };
        assert_eq!((run.code, run.out().as_str()), (0, want), "{}", run.err());
    }
    // It was taken out of use in good order.
    let about = host("dumpe2fs", &["-h", &ext4.display().to_string()]);
    assert!(
        about.contains("Filesystem state:         clean") && !about.contains("needs_recovery"),
        "{about}"
    );
    let run =
        shim.run("r", "ext4", &ext4, &["loop", "ro"], "cat /kept; echo x >/new || echo refused");
    assert_eq!((run.code, run.out().as_str()), (0, "2\nrefused\n"), "{}", run.err());
    let erofs = image(&dir, "erofs", |tree, path| {
        host("mkfs.erofs", &[path, tree]);
    });
    let script = "grep ' / ' /proc/mounts | cut -d' ' -f3; echo x >/new || echo refused";
    let run = shim.run("e", "erofs", &erofs, &["loop", "ro"], script);
    assert_eq!(run.out(), "overlay\nrefused\n", "{}", run.err());
    shim.expect_nothing_left();
}

#[test]
fn roots_of_a_pods_containers_are_disks_as_long_as_there_are_places() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: the shim mounts, and this is an ordinary user");
        return;
    }
    let dir = dir();
    let shim = Shim::new();
    let images: Vec<_> = (0..5)
        .map(|n| {
            image(&dir, &format!("ext4-{n}"), |tree, path| {
                host("mke2fs", &["-q", "-t", "ext4", "-d", tree, path, "16M"]);
            })
        })
        .collect();
    let pod = shim.pod("pod1");
    let script = "grep ' / ' /proc/mounts | cut -d' ' -f3; cat /kept; echo kept >/kept; echo done";
    let idle = format!("{script}; while :; do sleep 0.1; done");
    for (n, image) in images.iter().enumerate() {
        let id = format!("c{n}");
        pod.start(&id, "ext4", image, &["loop", "rw"], &idle);
        eventually("its root", || pod.output(&id).ends_with("done\n"));
        // The last one finds the places taken, and comes by the host's mount.
        let want = if n < 4 { "ext4" } else { "virtiofs" };
        assert_eq!(pod.output(&id), format!("{want}\ndone\n"), "{n}");
    }
    let state = |image: &Path| {
        let about = host("dumpe2fs", &["-h", &image.display().to_string()]);
        let kept = host("debugfs", &["-R", "cat /kept", &image.display().to_string()]);
        let clean =
            about.contains("Filesystem state:         clean") && !about.contains("needs_recovery");
        (clean, kept)
    };
    // One goes: it has been taken out of use in good order, and its place is another's.
    pod.kill("c0");
    assert_eq!(pod.finish("c0").code, 137);
    assert_eq!(state(&images[0]), (true, "kept\n".into()));
    pod.kill("c4");
    pod.finish("c4");
    assert_eq!(state(&images[4]), (true, "kept\n".into()));
    pod.start("again", "ext4", &images[4], &["loop", "rw"], script);
    let again = pod.finish("again");
    assert_eq!((again.code, again.out().as_str()), (0, "ext4\nkept\ndone\n"), "{}", again.err());
    let erofs = image(&dir, "erofs", |tree, path| {
        host("mkfs.erofs", &[path, tree]);
    });
    let script = "grep ' / ' /proc/mounts | cut -d' ' -f3; echo x >/new || echo refused";
    pod.start("e", "erofs", &erofs, &["loop", "ro"], script);
    let run = pod.finish("e");
    assert_eq!(run.out(), "overlay\nrefused\n", "{}", run.err());
    // The others end with the pod, and have been written out as well.
    pod.end(&["c1", "c2", "c3"]);
    for image in &images[1..4] {
        assert_eq!(state(image).1, "kept\n");
    }
    shim.expect_nothing_left();
}

#[test]
fn what_the_guest_cannot_mount_the_host_does() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: the shim mounts, and this is an ordinary user");
        return;
    }
    let dir = dir();
    let shim = Shim::new();
    let ext4 = image(&dir, "ext4", |tree, path| {
        host("mke2fs", &["-q", "-t", "ext4", "-d", tree, path, "32M"]);
    });
    // An option that is none of the guest's.
    let script = "grep ' / ' /proc/mounts | cut -d' ' -f3; echo kept >/kept";
    let run = shim.run("h", "ext4", &ext4, &["loop", "noatime"], script);
    assert_eq!((run.code, run.out().as_str()), (0, "virtiofs\n"), "{}", run.err());
    let kept = host("debugfs", &["-R", "cat /kept", &ext4.display().to_string()]);
    assert_eq!(kept, "kept\n");
    shim.expect_nothing_left();
}

#[test]
fn a_block_device_of_the_host_is_the_containers() {
    let ctd = containerd!();
    let dir = dir();
    let Some(device) = LoopDevice::new(&dir.path().join("image"), 3 << 20) else { return };
    let path = device.path().display().to_string();
    let script = format!(
        "[ -b {path} ] && blockdev --getsize64 {path} || wc -c <{path}
         echo written by the guest | dd of={path} bs=512 seek=7 conv=sync 2>/dev/null && sync
         dd if={path} bs=512 skip=7 count=1 2>/dev/null | head -n 1"
    );
    let run = ctd.sh(&["--device", &path], "c1", &script).expect_code(0);
    assert_eq!(run.out(), "3145728\nwritten by the guest\n", "{}", run.err());
    let content = device.content();
    assert!(content[7 * 512..].starts_with(b"written by the guest\n"));
    assert!(content[..7 * 512].iter().all(|byte| *byte == 0));
    // Who is allowed everything is not given what the host happens to have.
    let run = ctd.sh(&["--privileged"], "c2", &format!("[ -b {path} ] || echo none"));
    assert_eq!(run.expect_code(0).out(), "none\n");
    ctd.expect_nothing_left();
}
