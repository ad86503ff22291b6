//! `mvm debug`: a console in the guest itself.

use std::fs;

use mvm_tests::{Chroot, World};

/// What makes programs of the host's that are linked statically.
fn shell(tree: &Chroot) -> String {
    tree.path().join("bin/busybox").display().to_string()
}

#[test]
fn a_console_sees_the_guest_and_leaves_the_container_alone() {
    let world = World::small();
    world.mvm(&["run", "-d", "--name", "debugged", "busybox", "sleep", "100000"]).expect_code(0);
    let refused = world.mvm(&["debug", "debugged", "true"]).expect_code(125);
    assert!(refused.err().contains("debug-console = true"), "{}", refused.err());
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("mvm.toml");
    fs::write(&config, "debug-console = true\n").expect("a file");
    let config = config.display().to_string();
    let debug = |args: &[&str], input: &[u8]| {
        world.mvm_with(&[&["--config", &config, "debug"], args].concat(), input)
    };
    // The agent is process 1, not the container's program; nothing is forbidden; and its writes are its own.
    let script = "tr '\\0' ' ' </proc/1/cmdline | cut -d' ' -f1; ps | grep -c '[s]leep 100000'; \
                  grep CapEff /proc/self/status | tr -d '[:space:]'; echo; \
                  ls -d /guest/run/mvm/containers/*/rootfs/bin/busybox | wc -l; \
                  mkdir -p /mnt; mount -t tmpfs tmpfs /mnt && echo mounted; : >/left; exit 7";
    let seen = debug(&["debugged", "sh", "-c", script], b"").expect_code(7);
    let out = seen.out();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 5, "{out}{}", seen.err());
    assert!(lines[0].contains("init") || lines[0].contains("agent"), "{out}");
    assert_eq!((lines[1], lines[2]), ("1", "CapEff:000001ffffffffff"), "{out}");
    assert!(
        lines[3].parse::<u32>().is_ok_and(|roots| roots >= 2),
        "its own and the other's: {out}"
    );
    assert_eq!(lines[4], "mounted");
    world.mvm(&["exec", "debugged", "ls", "/left"]).expect_code(1);
    let mounts = world.mvm(&["exec", "debugged", "cat", "/proc/mounts"]).expect_code(0).out();
    assert!(!mounts.contains(" /mnt "), "{mounts}");
    // What is typed at it is a shell's.
    let typed = debug(&["debugged"], b"echo typed $((6 * 7)); exit 3\n").expect_code(3);
    assert!(typed.out().contains("typed 42\n"), "{}", typed.out());
    // A shell of the host's, for images without one.
    let tree = Chroot::new(&world.image_file("busybox"));
    let with = ["--shell", &shell(&tree), "debugged", "sh", "-c", "echo from $0; exit 4"];
    assert!(debug(&with, b"").expect_code(4).out().starts_with("from "));
    let unfit = debug(&["--shell", config.as_str(), "debugged"], b"").expect_code(125);
    assert!(unfit.err().contains("no 64-bit ELF program"), "{}", unfit.err());
    let missing = debug(&["debugged", "no-such-program"], b"");
    assert!(missing.code != 0 && missing.err().contains("--shell FILE"), "{}", missing.err());
    // All of them are gone, and the container is not.
    let left = debug(&["debugged", "sh", "-c", "ls /guest/run/mvm/containers | wc -l"], b"");
    assert_eq!(left.expect_code(0).out(), "2\n");
    assert_eq!(world.inspect("debugged")["status"], "running");
    world.mvm(&["rm", "-f", "debugged"]).expect_code(0);
}
