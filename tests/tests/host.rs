//! One file on hosts of every kind, and what it costs them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use mvm_tests::{World, eventually, run_with};
use nix::unistd::Pid;

/// Who is nobody in particular.
const NOBODY: &str = "65534";

#[test]
fn one_file_runs_in_an_empty_chroot() {
    let world = World::new();
    let dir = world.root().join("empty");
    for sub in ["proc", "dev"] {
        fs::create_dir_all(dir.join(sub)).unwrap();
    }
    fs::copy(world.binary(), dir.join("mvm")).unwrap();
    fs::copy(world.image_file("busybox"), dir.join("busybox.tar")).unwrap();
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "sh",
        "-c",
        "mount -t proc proc \"$0/proc\" && mount --bind /dev \"$0/dev\" && \
         exec env -i /usr/sbin/chroot \"$0\" /mvm run --rm --engine emu /busybox.tar echo one file",
    ]);
    command.arg(&dir);
    let run = run_with(command, b"", Duration::from_secs(120)).expect_code(0);
    assert_eq!((run.out().as_str(), run.err().as_str()), ("one file\n", ""));
}

#[test]
fn the_file_needs_no_loader() {
    let file = fs::read(World::new().binary()).unwrap();
    // PT_INTERP in the program headers (elf(5)).
    let number = |at: usize, len: usize| {
        file[at..at + len].iter().rev().fold(0usize, |n, byte| n << 8 | usize::from(*byte))
    };
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    assert!((0..count).all(|i| number(table + i * size, 4) != 3), "it has an interpreter");
}

#[test]
fn anybody_can_run_it_under_their_own_directories() {
    let world = World::new();
    let home = world.root().join("home");
    fs::create_dir(&home).unwrap();
    fs::copy(world.binary(), home.join("mvm")).unwrap();
    fs::copy(world.image_file("busybox"), home.join("busybox.tar")).unwrap();
    fs::set_permissions(world.root(), fs::Permissions::from_mode(0o755)).unwrap();
    let owner = NOBODY.parse().ok();
    for path in [home.clone(), home.join("mvm"), home.join("busybox.tar")] {
        std::os::unix::fs::chown(path, owner, owner).unwrap();
    }
    let as_nobody = |variables: &[(&str, &str)], script: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--no-new-privs"]);
        command.args(["--inh-caps=-all", "--bounding-set=-all", "sh", "-ec", script]);
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", &home).current_dir(&home);
        command.envs(variables.iter().copied());
        run_with(command, b"", Duration::from_secs(120))
    };
    let run = as_nobody(
        &[],
        "./mvm run --rm --engine emu ./busybox.tar sh -c 'id -u; echo hi > /root/file; cat /root/file' && \
         ./mvm doctor --json && ./mvm run -d --engine emu --name bg busybox sleep 1000 >&2 && \
         ./mvm exec bg echo inside && ./mvm rm -f bg && ./mvm ps -aq && find .local -maxdepth 3 -type d | sort",
    )
    .expect_code(0);
    assert!(run.out().starts_with("0\nhi\n"), "{}", run.out());
    assert!(run.out().contains("\"usable\":true"), "{}", run.out());
    assert!(run.out().contains("inside\nbg\n"), "{}", run.out());
    assert!(run.out().contains(".local/share/mvm"), "{}", run.out());
    // The XDG variables say where.
    let (runtime, data) = (home.join("xdg-run"), home.join("xdg-data"));
    let variables =
        [("XDG_RUNTIME_DIR", runtime.to_str().unwrap()), ("XDG_DATA_HOME", data.to_str().unwrap())];
    let run = as_nobody(
        &variables,
        "mkdir -m 700 xdg-run && ./mvm run --rm --engine emu ./busybox.tar true && \
         test -d xdg-run/mvm/sandboxes && test -d xdg-data/mvm/images && \
         test $(stat -c %a xdg-run/mvm) = 700 && echo there",
    );
    assert_eq!(run.expect_code(0).out(), "there\n");
    // Nobody gets at what another has.
    let run = as_nobody(&[], &format!("./mvm --root {} ps", world.root().display()));
    assert!(run.expect_code(125).err().contains("--root DIR"));
}

/// Proportional share of a process's memory in KiB, from `/proc/PID/smaps_rollup`.
fn pss(pid: Pid) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find(|line| line.starts_with("Pss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn resident(pid: Pid) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn an_idle_guest_costs_less_than_80_mib() {
    let world = World::small();
    let line = ["run", "-d", "--name", "idle", "--memory", "256m", "busybox", "sleep", "100000"];
    world.mvm(&line).expect_code(0);
    let about = world.inspect("idle");
    let owner = Pid::from_raw(about["owner"]["pid"].as_i64().unwrap().try_into().unwrap());
    let monitor = world.monitor("idle");
    // The guest reports free pages a while after they have become free.
    eventually("an idle guest of less than 80 MiB", || {
        let figures = format!(
            "monitor: {} KiB resident, {} KiB proportional; front door: {} KiB resident, {} KiB \
             proportional; {}",
            resident(monitor),
            pss(monitor),
            resident(owner),
            pss(owner),
            world.mvm(&["stats", "--format", "json", "idle"]).out()
        );
        // Shown where the test fails, or by `--nocapture`.
        eprintln!("{figures}");
        pss(monitor) + pss(owner) < 80 * 1024 && resident(monitor) < 80 * 1024
    });
    world.mvm(&["rm", "-f", "idle"]).expect_code(0);
}

#[test]
fn doctor_version_and_completions_answer() {
    let world = World::new();
    let doctor = world.mvm(&["doctor"]).expect_code(0).out();
    for name in ["engine", "kvm", "guest", "memory"] {
        assert!(doctor.contains(name), "{doctor}");
    }
    let version = world.mvm(&["version", "--json"]).expect_code(0).out();
    let version: serde_json::Value = serde_json::from_str(&version).unwrap();
    assert!(version["version"].is_string(), "{version}");
    for shell in ["bash", "zsh", "fish"] {
        assert!(world.mvm(&["completions", shell]).expect_code(0).out().contains("mvm"));
    }
    let help = world.mvm(&["run", "--help"]).expect_code(0);
    assert!(help.out().contains("--read-only") && help.err().is_empty());
}
