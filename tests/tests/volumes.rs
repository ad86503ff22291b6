//! Directories and files of the host in the container.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mvm_tests::hostmount::{FOLLOWS, HostMount, followed, is_followed};
use mvm_tests::{Chroot, World, eventually, is_running, run_with};
use nix::unistd::Pid;
use tempfile::TempDir;

const POSIX: &str = include_str!("volumes/posix.py");

fn dir() -> TempDir {
    let dir = tempfile::Builder::new().prefix("mvm-volume-").tempdir().expect("a directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("its mode");
    dir
}

fn bind(path: &Path, target: &str) -> String {
    format!("{}:{target}", path.display())
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The file servers of a container.
fn servers(id: &str) -> Vec<Pid> {
    let name = format!("mvm-files: {id}");
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = processes.filter_map(|p| p.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|b| *b == 0).next() == Some(name.as_bytes())
    })
    .map(Pid::from_raw)
    .collect()
}

#[test]
fn directories_are_shared_and_written() {
    let world = World::small();
    let dir = dir();
    fs::write(dir.path().join("in"), "from the host\n").expect("a file");
    let script = "cat /vol/in; echo from the guest > /vol/out; mkdir -p /vol/a/b; \
                  cp /bin/busybox /vol/busybox; /vol/busybox echo runs; ls /vol/..";
    let run = world
        .mvm(&["run", "--rm", "-v", &bind(dir.path(), "/vol"), "busybox", "sh", "-c", script])
        .expect_code(0);
    assert!(run.out().starts_with("from the host\nruns\n"), "{}", run.out());
    assert!(run.out().contains("bin") && run.out().contains("proc"), "the container's own root");
    let out = dir.path().join("out");
    assert_eq!(fs::read_to_string(&out).expect("a file"), "from the guest\n");
    let owner = fs::metadata(&out).expect("a file").uid();
    assert_eq!(owner, nix::unistd::geteuid().as_raw());
    assert!(dir.path().join("a/b").is_dir());
}

#[test]
fn read_only_volumes_are_not_written() {
    let world = World::small();
    let dir = dir();
    fs::write(dir.path().join("f"), "x").expect("a file");
    let script = "cat /v/f; touch /v/new; echo $?; echo y > /v/f; rm /v/f; mount -o remount,rw /v; touch /v/new";
    let ro = format!("{}:ro", bind(dir.path(), "/v"));
    let run = world.mvm(&["run", "--rm", "--privileged", "-v", &ro, "busybox", "sh", "-c", script]);
    assert!(run.out().starts_with("x1\n"), "{}{}", run.out(), run.err());
    assert!(run.err().contains("Read-only file system"), "{}", run.err());
    let mount = format!("type=bind,source={},target=/v,readonly", dir.path().display());
    let run = world.mvm(&["run", "--rm", "--mount", &mount, "busybox", "touch", "/v/new"]);
    assert_ne!(run.code, 0);
    assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1);
    assert_eq!(fs::read_to_string(dir.path().join("f")).expect("a file"), "x");
}

#[test]
fn what_the_host_mounts_later_is_seen() {
    let (world, dir) = (World::small(), dir());
    let follow = format!("{}:rslave", bind(dir.path(), "/v"));
    if !is_root() {
        let run = world.mvm(&["run", "--rm", "-v", &follow, "busybox", "true"]);
        assert!(run.code != 0 && run.err().contains("root alone"), "{}", run.err());
        return;
    }
    let plain = HostMount::private(dir.path());
    let run = world.mvm(&["run", "--rm", "-v", &follow, "busybox", "true"]);
    assert!(run.code != 0 && run.err().contains("neither shared nor a slave"), "{}", run.err());
    drop(plain);
    let mounts = followed(dir.path());
    let args = ["run", "-d", "--name", "f1", "-v", &follow, "busybox", "sh", "-c", FOLLOWS];
    world.mvm(&args).expect_code(0);
    is_followed(mounts, || world.mvm(&["logs", "f1"]).out());
    world.mvm(&["rm", "-f", "f1"]).expect_code(0);
}

#[test]
fn single_files_are_volumes_too() {
    let world = World::small();
    let dir = dir();
    let (config, other) = (dir.path().join("config"), dir.path().join("hosts"));
    fs::write(&config, "one\n").expect("a file");
    fs::write(&other, "10.0.0.1 mine\n").expect("a file");
    let hosts = format!("{}:ro", bind(&other, "/etc/hosts"));
    let script = "cat /etc/app/config /etc/hosts; echo two >> /etc/app/config; \
                  echo no >> /etc/hosts; ls /etc/app";
    let config_bind = bind(&config, "/etc/app/config");
    let run = world.mvm(&[
        "run",
        "--rm",
        "-v",
        &config_bind,
        "-v",
        &hosts,
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(run.out(), "one\n10.0.0.1 mine\nconfig\n", "{}", run.err());
    assert_eq!(fs::read_to_string(&config).expect("a file"), "one\ntwo\n");
    assert_eq!(fs::read_to_string(&other).expect("a file"), "10.0.0.1 mine\n");
}

#[test]
fn missing_sources_are_dockers_business() {
    let world = World::small();
    let dir = dir();
    let made = dir.path().join("made/here");
    world
        .mvm(&["run", "--rm", "-v", &bind(&made, "/v"), "busybox", "touch", "/v/x"])
        .expect_code(0);
    assert!(made.join("x").exists());
    let missing = dir.path().join("missing");
    let mount = format!("type=bind,source={},target=/v", missing.display());
    let run = world.mvm(&["run", "--rm", "--mount", &mount, "busybox", "true"]).expect_code(125);
    assert!(run.err().contains("bind source path does not exist"), "{}", run.err());
    assert!(!missing.exists());
    let labelled = format!("{}:z", bind(dir.path(), "/v"));
    let run = world.mvm(&["run", "--rm", "-v", &labelled, "busybox", "true"]).expect_code(0);
    assert!(run.err().contains("note: ") && run.err().contains("\"z\""), "{}", run.err());
    let run = world.mvm(&["run", "--rm", "-v", "data:/v", "busybox", "true"]).expect_code(125);
    assert!(run.err().contains("named volumes"), "{}", run.err());
}

#[test]
fn posix_behaviour_is_the_hosts_own() {
    if !is_root() {
        eprintln!("SKIPPED: comparing owners and permissions with the host wants root");
        return;
    }
    let world = World::shared();
    let dir = dir();
    fs::write(dir.path().join("posix.py"), POSIX).expect("the script");
    let chroot = Chroot::new(&world.image_file("debian"));
    fs::create_dir(chroot.path().join("vol")).expect("a directory");
    fs::write(chroot.path().join("vol/posix.py"), POSIX).expect("the script");
    let host = chroot.sh("cd /vol && python3 posix.py").expect_code(0);
    let guest = world
        .mvm(&[
            "run",
            "--rm",
            "-v",
            &bind(dir.path(), "/vol"),
            "-w",
            "/vol",
            "debian",
            "python3",
            "posix.py",
        ])
        .expect_code(0);
    assert!(host.out().lines().count() > 60, "{}", host.out());
    let (host, guest) = (host.out(), guest.out());
    let differing: Vec<_> = host.lines().zip(guest.lines()).filter(|(h, g)| h != g).collect();
    assert!(differing.is_empty(), "host and guest differ: {differing:#?}");
    assert_eq!(host.lines().count(), guest.lines().count(), "{host}\n---\n{guest}");
}

#[test]
fn unnamed_files_are_refused_by_name() {
    let world = World::shared();
    let dir = dir();
    let script = "import os, errno\n\
                  try: os.open('/vol', os.O_TMPFILE | os.O_RDWR, 0o600)\n\
                  except OSError as e: print(e.errno == errno.EOPNOTSUPP)\n\
                  import tempfile\n\
                  with tempfile.TemporaryFile(dir='/vol') as f: f.write(b'x'); print('and done without')\n";
    let run = world
        .mvm(&["run", "--rm", "-v", &bind(dir.path(), "/vol"), "debian", "python3", "-c", script])
        .expect_code(0);
    assert_eq!(run.out(), "True\nand done without\n");
}

#[test]
fn data_comes_through_whole() {
    let world = World::small();
    let dir = dir();
    let mut state = 0x1234_5678_9abc_def1_u64;
    let data: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .take((32 << 20) / 8)
    .flatten()
    .collect();
    fs::write(dir.path().join("in"), &data).expect("a file");
    let script = "sha256sum < /vol/in; dd if=/vol/in of=/vol/out bs=1M 2>/dev/null; \
                  dd if=/vol/in of=/vol/small bs=4k count=500 2>/dev/null; sync; sha256sum < /vol/out";
    let run = world
        .mvm(&["run", "--rm", "-v", &bind(dir.path(), "/vol"), "busybox", "sh", "-c", script])
        .expect_code(0);
    let mut host = Command::new("sha256sum");
    host.arg(dir.path().join("in"));
    let host = run_with(host, b"", Duration::from_secs(60)).expect_code(0).out();
    let digest = host.split_whitespace().next().expect("a digest");
    let seen: Vec<_> =
        run.out().split_whitespace().filter(|w| *w != "-").map(str::to_owned).collect();
    assert_eq!(seen, [digest, digest]);
    assert!(fs::read(dir.path().join("out")).expect("a file") == data);
    assert!(fs::read(dir.path().join("small")).expect("a file") == data[..500 * 4096]);
}

#[test]
fn five_thousand_files_are_unpacked() {
    let world = World::small();
    let dir = dir();
    let source = dir.path().join("source");
    for index in 0..5000 {
        let parent = source.join(format!("d{}", index % 50));
        if index < 50 {
            fs::create_dir_all(&parent).expect("a directory");
        }
        fs::write(parent.join(format!("f{index}")), format!("{index}\n")).expect("a file");
    }
    let mut pack = Command::new("tar");
    pack.arg("-C").arg(&source).arg("-cf").arg(dir.path().join("x.tar")).arg(".");
    run_with(pack, b"", Duration::from_secs(60)).expect_code(0);
    let script = "mkdir /vol/x && tar -C /vol/x -xf /vol/x.tar && find /vol/x -type f | wc -l";
    let run = world
        .mvm(&["run", "--rm", "-v", &bind(dir.path(), "/vol"), "busybox", "sh", "-c", script])
        .expect_code(0);
    assert_eq!(run.out().trim(), "5000");
    let mut compare = Command::new("diff");
    compare.arg("-r").arg(&source).arg(dir.path().join("x"));
    run_with(compare, b"", Duration::from_secs(60)).expect_code(0);
}

#[test]
fn what_the_host_changes_is_seen() {
    let world = World::small();
    let dir = dir();
    let swap = |version: &str| {
        let data = dir.path().join(version);
        fs::create_dir(&data).expect("a directory");
        fs::write(data.join("key"), version).expect("a file");
        symlink(version, dir.path().join("..new")).expect("a link");
        fs::rename(dir.path().join("..new"), dir.path().join("..data")).expect("a swap");
    };
    swap("one");
    symlink("..data/key", dir.path().join("key")).expect("a link");
    let id = world
        .mvm(&[
            "run",
            "-d",
            "--name",
            "live",
            "-v",
            &bind(dir.path(), "/v"),
            "busybox",
            "sleep",
            "600",
        ])
        .expect_code(0)
        .out();
    let cat = || world.mvm(&["exec", "live", "cat", "/v/key"]).expect_code(0).out();
    assert_eq!(cat(), "one");
    swap("two");
    eventually("the new content", || cat() == "two");
    fs::write(dir.path().join("appears"), "x").expect("a file");
    eventually("the new file", || world.mvm(&["exec", "live", "cat", "/v/appears"]).code == 0);
    let server = servers(id.trim());
    assert_eq!(server.len(), 1, "one file server");
    if is_root() {
        confined(server[0]);
    } else {
        eprintln!("SKIPPED: looking at another process's confinement wants root");
    }
    world.mvm(&["rm", "-f", "live"]).expect_code(0);
    eventually("the end of the file server", || !is_running(server[0]));
}

/// The process has nothing but what it needs.
fn confined(server: Pid) {
    let status = fs::read_to_string(format!("/proc/{server}/status")).expect("its status");
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
    };
    assert_eq!((field("Seccomp").as_str(), field("NoNewPrivs").as_str()), ("2", "1"));
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
    let needed = [0, 1, 3, 4, 6, 7, 27, 31].iter().fold(0u64, |all, bit| all | 1 << bit);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        let caps = u64::from_str_radix(&field(set), 16).expect("a mask");
        assert_eq!(caps & !needed, 0, "{set}");
    }
    let root: Vec<PathBuf> = fs::read_dir(format!("/proc/{server}/root"))
        .expect("its root")
        .map(|entry| entry.expect("an entry").file_name().into())
        .collect();
    assert_eq!(root, [PathBuf::from("proc")], "nothing but the way to its own descriptors");
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).expect("a link");
        assert_ne!(of("self"), of(&server.to_string()), "{namespace}");
    }
}

#[test]
fn a_lost_file_server_ends_the_machine_with_the_reason() {
    let world = World::small();
    let dir = dir();
    let id = world
        .mvm(&[
            "run",
            "-d",
            "--name",
            "lost",
            "-v",
            &bind(dir.path(), "/v"),
            "busybox",
            "sleep",
            "600",
        ])
        .expect_code(0)
        .out();
    let server = servers(id.trim());
    nix::sys::signal::kill(server[0], nix::sys::signal::Signal::SIGKILL).expect("it to be killed");
    assert_eq!(world.mvm(&["wait", "lost"]).expect_code(0).out().trim(), "125");
    let about = world.inspect("lost");
    let reason = about["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("file server"), "{about}");
    world.mvm(&["rm", "lost"]).expect_code(0);
}

#[test]
fn more_files_than_the_server_may_hold_open_are_unpacked_and_found() {
    let world = World::small();
    let dir = dir();
    let script = "i=0; while [ $i -lt 40 ]; do mkdir /vol/d$i; j=0; while [ $j -lt 60 ]; do echo $i $j >/vol/d$i/f$j; \
                  j=$((j + 1)); done; i=$((i + 1)); done; find /vol -type f | wc -l; cat /vol/d*/f* | wc -l";
    let mut command = Command::new("prlimit");
    let run = ["run", "--rm", "-v", &bind(dir.path(), "/vol"), "busybox", "sh", "-c", script];
    let mvm = world.command(&run);
    command.arg("--nofile=1600:1600").arg(mvm.get_program()).args(mvm.get_args());
    for (key, value) in mvm.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    let run = run_with(command, b"", Duration::from_secs(300)).expect_code(0);
    assert_eq!(run.out(), "2400\n2400\n", "{}", run.err());
}

#[test]
fn a_repository_is_cloned() {
    let world = World::shared();
    let dir = dir();
    let script = mvm_tests::clone_script(300, "/v/three");
    let volume = bind(dir.path(), "/v");
    let run = world.mvm(&["run", "--rm", "-v", &volume, "debian", "bash", "-c", &script]);
    mvm_tests::expect_cloned(&run.expect_code(0), 300, &dir.path().join("two"));
}
