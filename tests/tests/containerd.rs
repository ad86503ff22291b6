//! containerd's front door: `ctr` of the distribution, with a daemon of the tests' own.

use std::fs;
use std::process::Stdio;
use std::thread;

use mvm_tests::{Containerd, IMAGE, Terminal, eventually, is_running, run_with};
use nix::sys::signal::{Signal, kill};

/// Starts containerd, or ends the test where the machine cannot run any.
macro_rules! containerd {
    () => {
        match Containerd::start() {
            Some(containerd) => containerd,
            None => return,
        }
    };
}

#[test]
fn output_input_and_exit_codes() {
    let ctd = containerd!();
    let run = ctd.sh(&[], "c1", "echo out; echo err >&2; exit 7").expect_code(7);
    assert_eq!((run.out().as_str(), run.err().as_str()), ("out\n", "err\n"));
    let run = ctd.run(&[], "c2", &["cat"], b"from the host\n").expect_code(0);
    assert_eq!(run.out(), "from the host\n");
    assert_eq!(ctd.sh(&[], "c3", "kill -TERM $$; sleep 100").code, 143);
    let missing = ctd.run(&[], "c4", &["no-such-program"], b"");
    assert_ne!(missing.code, 0);
    assert!(missing.err().contains("no-such-program"), "{}", missing.err());
    ctd.expect_nothing_left();
}

#[test]
fn the_specification_holds() {
    let ctd = containerd!();
    let flags =
        ["--env", "GREETING=hello", "--user", "65534:100", "--cwd", "/home", "--hostname", "box"];
    let run =
        ctd.sh(&flags, "c1", "echo $GREETING $(id -u):$(id -g) $(pwd) $(hostname)").expect_code(0);
    assert_eq!(run.out(), "hello 65534:100 /home box\n");
    let run = ctd.sh(&["--read-only"], "c2", "touch /x || echo refused").expect_code(0);
    assert_eq!(run.out(), "refused\n");
    // The root can be written otherwise, and nothing of that comes back to the host.
    assert_eq!(ctd.sh(&[], "c3", "echo y >/x; cat /x").expect_code(0).out(), "y\n");
    let limited = ["--memory-limit", "67108864"];
    let script =
        "cat /sys/fs/cgroup/memory.max 2>/dev/null; dd if=/dev/zero of=/dev/null bs=200M count=1";
    let mount = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";
    let run = ctd.sh(&[&limited[..], &["--mount", mount]].concat(), "c4", script);
    assert!(run.out().starts_with("67108864\n"), "{}", run.out());
    assert_eq!(run.code, 137, "{}", run.err());
    // What cannot be done is refused in words.
    let mount = "type=bind,src=/etc,dst=/host,options=rbind:ro";
    let run = ctd.sh(&["--mount", mount], "c5", "true");
    assert!(run.code != 0 && run.err().contains("/host"), "{}", run.err());
    ctd.expect_nothing_left();
}

#[test]
fn a_terminal() {
    let ctd = containerd!();
    let command = ctd.run_command(&["--rm", "-t"], "c1", &["sh"]);
    let mut terminal = Terminal::start(&command, 100, 40);
    terminal.wait_for("# ");
    terminal.press("tty; stty size\n");
    terminal.wait_for("/dev/");
    terminal.wait_for("40 100");
    terminal.press("exit 5\n");
    assert_eq!(terminal.wait(), 5);
    ctd.expect_nothing_left();
}

#[test]
fn a_long_life() {
    let ctd = containerd!();
    ctd.start_container("c1", "trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.1; done");
    eventually("its output", || ctd.output("c1") == "up\n");
    assert_eq!(ctd.status("c1"), "RUNNING");
    // The process that stands for it is in a network namespace of its own.
    let pid = ctd.pid("c1");
    let net = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).expect("a namespace");
    assert_ne!(net(&pid.to_string()), net("self"));
    assert!(ctd.mvm(&["ps"]).out().contains("default.c1"));

    let run = ctd.exec("c1", "e1", "cat; echo err >&2; exit 3", b"in\n").expect_code(3);
    assert_eq!((run.out().as_str(), run.err().as_str()), ("in\n", "err\n"));
    // By its name in mvm, too.
    assert_eq!(ctd.mvm(&["exec", "default.c1", "echo", "there"]).expect_code(0).out(), "there\n");

    let metrics = ctd.ctr(&["task", "metrics", "c1"]).expect_code(0).out();
    let used = metrics.lines().find(|line| line.contains("memory") && line.contains("usage"));
    let used = used.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    assert!(used.is_some_and(|bytes| bytes > 4096), "{metrics}");
    let processes = ctd.ctr(&["task", "ps", "c1"]).expect_code(0).out();
    assert!(processes.contains(&pid.to_string()), "{processes}");

    ctd.ctr(&["task", "pause", "c1"]).expect_code(0);
    assert_eq!(ctd.status("c1"), "PAUSED");
    assert_ne!(ctd.ctr(&["task", "pause", "c1"]).code, 0);
    assert_ne!(ctd.exec("c1", "e2", "true", b"").code, 0);
    ctd.ctr(&["task", "resume", "c1"]).expect_code(0);
    assert_eq!(ctd.status("c1"), "RUNNING");

    ctd.ctr(&["task", "kill", "-s", "SIGTERM", "c1"]).expect_code(0);
    ctd.remove("c1");
    assert_eq!(ctd.output("c1"), "up\nbye\n");
    assert!(!is_running(pid));
    ctd.expect_nothing_left();
}

#[test]
fn events_come_in_containerds_order() {
    let ctd = containerd!();
    let file = fs::File::create(ctd.path("events")).expect("a file");
    let mut events =
        ctd.command(&["events"]).stdout(file).stdin(Stdio::null()).spawn().expect("ctr");
    let text = || fs::read_to_string(ctd.path("events")).unwrap_or_default();
    // It says nothing when it is ready: something is made until it is heard.
    eventually("the first event", || {
        ctd.ctr(&["image", "label", IMAGE, &format!("n={}", text().len())]);
        text().contains("/images/update")
    });
    ctd.start_container("c1", "while :; do sleep 0.1; done");
    ctd.exec("c1", "e1", "true", b"").expect_code(0);
    ctd.ctr(&["task", "kill", "-s", "SIGKILL", "c1"]).expect_code(0);
    ctd.remove("c1");
    eventually("the last event", || text().contains("/tasks/delete"));
    let _ = events.kill();
    let _ = events.wait();
    let topics: Vec<String> = text()
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("/tasks/"))
        .map(str::to_owned)
        .collect();
    let want = ["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"];
    assert_eq!(topics, want);
    ctd.expect_nothing_left();
}

#[test]
fn five_at_a_time_and_several_in_a_row() {
    let ctd = containerd!();
    thread::scope(|scope| {
        for n in 0..5 {
            let ctd = &ctd;
            scope.spawn(move || {
                let run = ctd.sh(&[], &format!("p{n}"), &format!("echo {n}; exit {n}"));
                assert_eq!(run.expect_code(n).out(), format!("{n}\n"));
            });
        }
    });
    for n in 0..5 {
        // The same id each time: nothing of the last one is in the way.
        assert_eq!(
            ctd.sh(&[], "again", &format!("echo {n}")).expect_code(0).out(),
            format!("{n}\n")
        );
    }
    ctd.expect_nothing_left();
}

#[test]
fn a_hook_of_the_host_finds_the_namespace() {
    let ctd = containerd!();
    let out = ctd.path("hook.out");
    let script = format!(
        "cat >{0}; pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/' {0}); readlink /proc/$pid/ns/net >>{0}",
        out.display()
    );
    let default = run_with(ctd.command(&["oci", "spec"]), b"", std::time::Duration::from_secs(60));
    let mut spec: serde_json::Value =
        serde_json::from_str(&default.expect_code(0).out()).expect("a specification");
    spec["process"]["args"] = serde_json::json!(["true"]);
    spec["hooks"] = serde_json::json!({
        "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] }],
    });
    fs::write(ctd.path("spec.json"), spec.to_string()).expect("a file");
    let config = ctd.path("spec.json").display().to_string();
    ctd.run(&["--config", &config], "c1", &[], b"").expect_code(0);
    let told = fs::read_to_string(out).expect("what the hook wrote");
    assert!(told.contains("\"status\":\"creating\"") && told.contains("net:["), "{told}");
    let own = fs::read_link("/proc/self/ns/net").expect("a namespace").display().to_string();
    assert!(!told.contains(&own), "{told}");
    ctd.expect_nothing_left();
}

#[test]
fn containerd_may_be_restarted() {
    let mut ctd = containerd!();
    ctd.start_container("c1", "echo up; while :; do sleep 0.1; done");
    eventually("its output", || ctd.output("c1") == "up\n");
    let (pid, shims) = (ctd.pid("c1"), ctd.shims());
    ctd.kill_daemon();
    ctd.run_daemon();
    assert_eq!((ctd.status("c1").as_str(), ctd.pid("c1"), ctd.shims()), ("RUNNING", pid, shims));
    assert_eq!(ctd.exec("c1", "e1", "echo still here", b"").expect_code(0).out(), "still here\n");
    ctd.ctr(&["task", "kill", "-s", "SIGKILL", "c1"]).expect_code(0);
    ctd.remove("c1");
    ctd.expect_nothing_left();
}

#[test]
fn a_killed_shim_leaves_nothing() {
    let ctd = containerd!();
    ctd.start_container("c1", "echo up; while :; do sleep 0.1; done");
    eventually("its output", || ctd.output("c1") == "up\n");
    let holder = ctd.pid("c1");
    for shim in ctd.shims() {
        kill(shim, Signal::SIGKILL).expect("a shim to be killed");
    }
    eventually("the end of the task", || ctd.status("c1") != "RUNNING");
    ctd.ctr(&["task", "rm", "c1"]);
    ctd.ctr(&["container", "rm", "c1"]).expect_code(0);
    eventually("the end of the machine", || ctd.mvm(&["ps", "-aq"]).out().is_empty());
    eventually("the end of its holder", || !is_running(holder));
    ctd.expect_nothing_left();
    // The id is free.
    assert_eq!(ctd.sh(&[], "c1", "echo anew").expect_code(0).out(), "anew\n");
}
