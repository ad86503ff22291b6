//! `mvm run` as docker's users know it.

use std::process::Command;
use std::time::Duration;

use mvm_tests::{Finished, Running, World, engine, run_with};
use nix::sys::signal::Signal;

fn world() -> &'static World {
    World::small()
}

#[test]
fn output_and_exit_code_are_the_programs_own() {
    let run = world().sh("busybox", "echo out; echo err >&2; exit 42").expect_code(42);
    assert_eq!(run.out(), "out\n");
    assert!(run.err().ends_with("err\n"), "{}", run.err());
}

#[test]
fn a_signal_ends_in_128_plus_its_number() {
    // The first process of a container takes no signal from inside that it does not catch.
    world().sh("busybox", "kill -9 $$; kill -TERM $$; exit 4").expect_code(4);
    world().sh("busybox", "sh -c 'kill -9 $$'; exit $?").expect_code(137);
    world()
        .mvm(&["run", "--rm", "--init", "busybox", "sh", "-c", "kill -TERM $$"])
        .expect_code(143);
}

#[test]
fn a_command_that_is_not_there_is_127_and_one_that_cannot_run_126() {
    let missing = world().mvm(&["run", "--rm", "busybox", "no-such-command"]).expect_code(127);
    assert!(missing.err().contains("no-such-command"), "{}", missing.err());
    world().mvm(&["run", "--rm", "busybox", "/etc/passwd"]).expect_code(126);
}

#[test]
fn input_reaches_the_program_and_its_end_too() {
    let run = world()
        .mvm_with(&["run", "--rm", "-i", "busybox", "cat"], b"through the VM")
        .expect_code(0);
    assert_eq!(run.stdout, b"through the VM");
    let without =
        world().mvm_with(&["run", "--rm", "busybox", "cat"], b"not for you").expect_code(0);
    assert!(without.stdout.is_empty());
}

#[test]
fn a_hundred_megabytes_pass_intact_both_ways() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let data: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .take(100 * 1024 * 1024 / 8)
    .flatten()
    .collect();
    let run = world().mvm_with(&["run", "--rm", "-i", "busybox", "cat"], &data).expect_code(0);
    assert!(
        run.stdout == data,
        "{} of {} bytes came back, or others",
        run.stdout.len(),
        data.len()
    );
}

#[test]
fn environment_directory_user_and_host_name() {
    let run = world()
        .mvm(&[
            "run",
            "--rm",
            "-e",
            "A=b c",
            "-w",
            "/tmp/deep/er",
            "-u",
            "daemon:users",
            "--hostname",
            "somewhere",
            "busybox",
            "sh",
            "-c",
            "echo \"$A\"; pwd; id; hostname",
        ])
        .expect_code(0);
    let lines: Vec<String> = run.out().lines().map(str::to_owned).collect();
    assert_eq!(lines[0], "b c");
    assert_eq!(lines[1], "/tmp/deep/er");
    assert!(lines[2].starts_with("uid=1(daemon) gid=100(users)"), "{}", lines[2]);
    assert_eq!(lines[3], "somewhere");
}

#[test]
fn root_file_system_is_writable_unless_asked_otherwise() {
    world().sh("busybox", "echo x > /new && grep -q x /new && rm /bin/vi").expect_code(0);
    world().sh("busybox", "test -e /bin/vi && ! test -e /new").expect_code(0);
    let ro = world()
        .mvm(&[
            "run",
            "--rm",
            "--read-only",
            "--tmpfs",
            "/scratch:size=1m",
            "busybox",
            "sh",
            "-c",
            "echo x > /scratch/f && ! echo x > /new",
        ])
        .expect_code(0);
    assert!(ro.err().contains("Read-only file system"), "{}", ro.err());
}

#[test]
fn capabilities_and_limits() {
    let caps = |args: &[&str]| {
        let mut line = vec!["run", "--rm"];
        line.extend(args);
        line.extend(["busybox", "sh", "-c", "grep CapEff /proc/self/status"]);
        let out = world().mvm(&line).expect_code(0).out();
        u64::from_str_radix(out.split_whitespace().last().unwrap(), 16).unwrap()
    };
    let default = caps(&[]);
    assert_eq!(default, 0xa804_25fb, "docker's default set");
    assert_eq!(caps(&["--cap-drop", "ALL"]), 0);
    assert_eq!(caps(&["--cap-drop", "all", "--cap-add", "NET_ADMIN"]), 1 << 12);
    let limits = world()
        .mvm(&[
            "run",
            "--rm",
            "--ulimit",
            "nofile=123:456",
            "busybox",
            "sh",
            "-c",
            "ulimit -n; ulimit -Hn",
        ])
        .expect_code(0);
    assert_eq!(limits.out(), "123\n456\n");
    let nnp = world()
        .mvm(&[
            "run",
            "--rm",
            "--security-opt",
            "no-new-privileges",
            "busybox",
            "grep",
            "NoNewPrivs",
            "/proc/self/status",
        ])
        .expect_code(0);
    assert_eq!(nnp.out().split_whitespace().last(), Some("1"));
}

#[test]
fn processors() {
    let nproc = |cpus: &str| {
        world()
            .mvm(&[
                "run",
                "--rm",
                "--cpus",
                cpus,
                "busybox",
                "sh",
                "-c",
                "nproc; cat /sys/fs/cgroup/cpu.max",
            ])
            .expect_code(0)
            .out()
    };
    assert!(nproc("2").starts_with("2\n"));
    let partial = nproc("1.5");
    assert!(partial.starts_with("2\n") && partial.contains("150000 100000"), "{partial}");
}

#[test]
fn both_of_two_vcpus_do_work() {
    let run = world()
        .mvm(&[
            "run",
            "--rm",
            "--cpus",
            "2",
            "busybox",
            "sh",
            "-c",
            "work() { i=0; while [ $i -lt 30000 ]; do i=$((i + 1)); done; }
             work & work & wait; awk '/^cpu[01] / { print $2 + $4 }' /proc/stat; dmesg | grep -ciE 'stall|unstable|lockup|bug:'",
        ])
        .expect_code(1);
    let ticks: Vec<u64> = run.out().lines().map(|line| line.parse().unwrap()).collect();
    let [first, second, complaints] = ticks[..] else { panic!("{}", run.out()) };
    assert!(first > 5 && second > 5 && complaints == 0, "hundredths of a second: {ticks:?}");
}

#[test]
fn memory_is_what_was_asked_for_and_its_end_is_told() {
    let total = world()
        .mvm(&[
            "run",
            "--rm",
            "--memory",
            "256m",
            "busybox",
            "awk",
            "/MemTotal/ {print $2}",
            "/proc/meminfo",
        ])
        .expect_code(0);
    let kib: u64 = total.out().trim().parse().unwrap();
    assert!((200_000..=262_144).contains(&kib), "{kib} KiB");
    let oom = world()
        .mvm(&[
            "run",
            "--rm",
            "--memory",
            "128m",
            "busybox",
            "sh",
            "-c",
            "x=a; while :; do x=$x$x; done",
        ])
        .expect_code(137);
    assert!(oom.err().contains("memory"), "{}", oom.err());
}

#[test]
fn the_guest_looks_like_a_container() {
    let run = world().sh("busybox", "echo $$; ls /proc | grep -c '^[0-9]'; test -c /dev/null && test -c /dev/urandom && test -d /dev/pts && ls -l /proc/self/fd/0 >/dev/null; mount | grep -c ' / '; cat /proc/sys/kernel/ostype").expect_code(0);
    let lines: Vec<String> = run.out().lines().map(str::to_owned).collect();
    assert_eq!(lines[0], "1");
    assert_eq!(lines[2], "1");
    assert_eq!(lines[3], "Linux");
}

/// Starts `mvm run FLAGS busybox sh -c SCRIPT`, waits for the line `ready`, and sends it signals.
fn signalled(flags: &[&str], script: &str, signals: &[Signal]) -> Finished {
    let mut args = vec!["run", "--rm"];
    args.extend(flags);
    args.extend(["busybox", "sh", "-c", script]);
    let mut running = Running::start(world().command(&args));
    running.wait_for("ready");
    for signal in signals {
        running.signal(*signal);
        running.wait_for("got");
    }
    running.finish()
}

#[test]
fn signals_to_mvm_are_passed_on() {
    let script = "trap 'echo got int' INT; trap 'echo got usr1' USR1; trap 'echo got term; exit 6' TERM; \
                  echo ready; while :; do sleep 0.1; done";
    let run = signalled(&[], script, &[Signal::SIGINT, Signal::SIGUSR1, Signal::SIGTERM]);
    let run = run.expect_code(6);
    assert_eq!(run.out(), "ready\ngot int\ngot usr1\ngot term\n");
}

#[test]
fn a_signal_that_ends_the_process_is_the_exit_code_of_mvm_too() {
    let mut running = Running::start(world().command(&[
        "run",
        "--rm",
        "--init",
        "busybox",
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ]));
    running.wait_for("ready");
    running.signal(Signal::SIGTERM);
    running.finish().expect_code(143);
}

#[test]
fn a_signal_that_our_parent_ignores_is_not_passed_on() {
    // What nohup(1) does.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(world().binary());
    command.arg("--root").arg(world().root()).args(["run", "--rm", "busybox", "sh", "-c"]);
    command.arg(
        "trap 'echo hup' HUP; trap 'echo int; exit 8' INT; echo ready; while :; do sleep 0.1; done",
    );
    let mut running = Running::start(command);
    running.wait_for("ready");
    running.signal(Signal::SIGHUP);
    running.signal(Signal::SIGINT);
    assert_eq!(running.finish().expect_code(8).out(), "ready\nint\n");
}

#[test]
fn variables_come_from_flags_files_and_mvms_own_environment() {
    let file = world().root().join("variables");
    std::fs::write(&file, "# comment\n\nFILE=from the file\nBOTH=file\nOWN\nABSENT\n").unwrap();
    let mut command = world().command(&[
        "run",
        "--rm",
        "--env-file",
        file.to_str().unwrap(),
        "-e",
        "BOTH=flag",
        "-e",
        "PASSED",
        "-e",
        "EMPTY=",
        "--engine",
        engine(),
        "busybox",
        "sh",
        "-c",
        "echo \"$FILE|$BOTH|$OWN|$PASSED|${ABSENT-unset}|${EMPTY-unset}|$HOME\"",
    ]);
    command.env("OWN", "own").env("PASSED", "passed").env_remove("ABSENT");
    let run = run_with(command, b"", Duration::from_secs(60)).expect_code(0);
    assert_eq!(run.out(), "from the file|flag|own|passed|unset||/root\n");
    assert_eq!(run.err(), "");
}

#[test]
fn entry_points_are_replaced_and_cleared() {
    let run = |args: &[&str]| {
        let mut line = vec!["run", "--rm", "--entrypoint"];
        line.extend(args);
        world().mvm(&line).expect_code(0).out()
    };
    assert_eq!(run(&["echo", "busybox", "a", "b"]), "a b\n");
    assert_eq!(run(&["", "busybox", "echo", "c"]), "c\n");
}

#[test]
fn init_reaps_what_others_leave() {
    let script = "(true &); sleep 0.3; for i in $(seq 100); do n=$(ps -o stat,comm | grep -c '^Z'); \
                  [ $n = 0 ] && break; sleep 0.1; done; echo $n";
    let run = world().mvm(&["run", "--rm", "--init", "busybox", "sh", "-c", script]);
    assert_eq!(run.out(), "0\n", "{}", run.err());
}

#[test]
fn nothing_breaks_out_of_its_quotes() {
    let hostile = "a'b\"c $(reboot) `id` \\ \n\t{\"x\":1} -- init=/x \u{fffd}é";
    let variable = format!("X={hostile}");
    let label = format!("{hostile}={hostile}");
    let run = world()
        .mvm(&[
            "run",
            "--rm",
            "-e",
            &variable,
            "--annotation",
            &format!("k={hostile}"),
            "--label",
            &label,
            "--cmdline",
            "quoted=\"un closed init=/bin/nothing",
            "busybox",
            "sh",
            "-c",
            "printf %s \"$X\"; printf %s \"$1\"",
            "sh",
            hostile,
        ])
        .expect_code(0);
    assert_eq!(run.out(), format!("{hostile}{hostile}"));
    // The first of these is not the kernel's either: it ends at the machine's own parts.
    let line = world()
        .mvm(&["run", "--rm", "--cmdline", "extra=1 a\"b", "busybox", "cat", "/proc/cmdline"])
        .expect_code(0);
    assert!(line.out().trim_end().ends_with(" extra=1 a\"b"), "{}", line.out());
    assert!(line.out().starts_with("console=ttyS0 "), "{}", line.out());
}

#[test]
fn timings_name_every_phase() {
    const PHASES: [&str; 8] = [
        "image",
        "monitor",
        "kernel placed",
        "kernel up",
        "agent ready",
        "process started",
        "process ended",
        "teardown",
    ];
    let run =
        world().mvm(&["run", "--rm", "--engine", engine(), "--timings=json", "busybox", "true"]);
    let run = run.expect_code(0);
    let json: serde_json::Value = serde_json::from_str(&run.err()).unwrap();
    let phases: Vec<&str> =
        json["phases"].as_array().unwrap().iter().map(|p| p["phase"].as_str().unwrap()).collect();
    assert_eq!(phases, PHASES);
    // What the engine costs beside the guest's own memory.
    assert!(json["host"]["overhead"].as_u64().unwrap() > 0, "{json}");
    assert!(json["host"]["cpu_seconds"].as_f64().unwrap() > 0.0, "{json}");
    let text = world().mvm(&["run", "--rm", "--timings", "busybox", "true"]).expect_code(0).err();
    for phase in PHASES {
        assert!(text.lines().any(|line| line.starts_with(phase)), "no {phase} in\n{text}");
    }
}

#[test]
fn the_console_goes_to_a_file() {
    let file = world().root().join("console");
    let path = file.to_str().unwrap();
    world().mvm(&["run", "--rm", "--console", path, "busybox", "true"]).expect_code(0);
    let console = std::fs::read_to_string(&file).unwrap();
    assert!(console.contains("Linux version"), "{console}");
}

#[test]
fn a_kernel_and_an_initramfs_of_ones_own() {
    let kernel = world().images().join("vmlinux");
    let initramfs = world().images().join("initramfs.cpio");
    let (kernel, initramfs) = (kernel.to_str().unwrap(), initramfs.to_str().unwrap());
    let line = ["run", "--rm", "--kernel", kernel, "--initrd", initramfs, "busybox", "echo", "own"];
    assert_eq!(world().mvm(&line).expect_code(0).out(), "own\n");
}

#[test]
fn a_path_is_imported_on_the_fly() {
    let fresh = World::new();
    let file = fresh.image_file("busybox");
    let run = fresh.mvm(&["run", "--rm", file.to_str().unwrap(), "echo", "hi"]).expect_code(0);
    assert_eq!(run.out(), "hi\n");
}
