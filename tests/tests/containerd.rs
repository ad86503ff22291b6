//! containerd's front door: `ctr` of the distribution, with a daemon of the tests' own.

use std::fs;
use std::io::{Read, Write};
use std::process::Stdio;
use std::thread;

use mvm_tests::{
    Chroot, Containerd, IMAGE, Running, Terminal, World, containerd, eventually, is_running,
};
use nix::sys::signal::{Signal, kill};

#[test]
fn output_input_and_exit_codes() {
    let ctd = containerd!();
    let run = ctd.sh(&[], "c1", "echo out; echo err >&2; exit 7").expect_code(7);
    assert_eq!((run.out().as_str(), run.err().as_str()), ("out\n", "err\n"));
    // Held open for a while: of an input that ends before the container is created ctr tells nobody,
    // whatever the shim.
    let (mut cat, mut input) =
        Running::start_with_input(ctd.run_command(&["--rm"], "c2", &["cat"]));
    input.write_all(b"from the host\n").expect("an input");
    cat.wait_for("from the host");
    drop(input);
    cat.finish().expect_code(0);
    assert_eq!(ctd.sh(&[], "c3", "sh -c 'kill -TERM $$'; exit $?").code, 143);
    let missing = ctd.run(&[], "c4", &["no-such-program"], b"");
    assert_ne!(missing.code, 0);
    assert!(missing.err().contains("no-such-program"), "{}", missing.err());
    ctd.expect_nothing_left();
}

#[test]
fn flags_and_limits_hold() {
    let ctd = containerd!();
    let flags = ["--env", "GREETING=hello", "--cwd", "/home", "--cpus", "1.5"];
    let run = ctd.sh(&flags, "c1", "echo $GREETING $(pwd) $(nproc)").expect_code(0);
    assert!(run.out().starts_with("hello /home "), "{}", run.out());
    let run = ctd.sh(&["--read-only"], "c2", "touch /x || echo refused").expect_code(0);
    assert_eq!(run.out(), "refused\n");
    // The root can be written otherwise.
    assert_eq!(ctd.sh(&[], "c3", "echo y >/x; cat /x").expect_code(0).out(), "y\n");
    let mount = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";
    let limited = ["--memory-limit", "67108864", "--mount", mount];
    // Without a namespace of its own for control groups it sees the guest's, with its own path.
    let script = "cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.max; \
                  dd if=/dev/zero of=/dev/null bs=100M count=1";
    let run = ctd.sh(&limited, "c4", script).expect_code(137);
    assert_eq!(run.out(), "67108864\n");
    ctd.expect_nothing_left();
}

#[test]
fn a_terminal() {
    let ctd = containerd!();
    let command = ctd.run_command(&["--rm", "-t"], "c1", &["sh"]);
    let mut terminal = Terminal::start(&command, 100, 40);
    terminal.wait_for("# ");
    // ctr sets the size when the process runs already.
    terminal
        .press("tty; until [ \"$(stty size)\" = '40 100' ]; do sleep 0.1; done; echo si''zed\n");
    terminal.wait_for("/dev/");
    terminal.wait_for("sized");
    terminal.resize(90, 30);
    terminal.press("until [ \"$(stty size)\" = '30 90' ]; do sleep 0.1; done; echo resi''zed\n");
    terminal.wait_for("resized");
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
    // Who reads the log finds what is about it by fields.
    let machine = ctd.mvm(&["ps", "-q"]).expect_code(0).out();
    let fields = format!(
        "msg=\"the machine is up\" namespace=default sandbox=c1 container=c1 machine={}",
        machine.trim()
    );
    let log = ctd.log();
    assert!(log.lines().any(|line| line.starts_with("time=") && line.ends_with(&fields)), "{log}");

    // Without input: ctr never tells of the end of one that ends before the process is there.
    let run = ctd.exec("c1", "e1", "echo in; echo err >&2; exit 3", b"").expect_code(3);
    assert_eq!((run.out().as_str(), run.err().as_str()), ("in\n", "err\n"));
    // By its name in mvm, too.
    assert_eq!(ctd.mvm(&["exec", "default.c1", "echo", "there"]).expect_code(0).out(), "there\n");

    // A console in its guest, where the agent is process 1.
    let settings = ctd.path("debug.toml");
    fs::write(&settings, "debug-console = true\n").expect("a file");
    let settings = settings.display().to_string();
    let debug = ["--config", &settings, "debug", "default.c1", "sh", "-c"];
    let seen = ctd.mvm(&[&debug[..], &["ps | grep -c '[w]hile :'"]].concat()).expect_code(0);
    assert_eq!(seen.out(), "1\n");
    assert!(ctd.mvm(&["debug", "default.c1"]).err().contains("debug-console = true"));

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
    in_a_row(&ctd, 5);
    ctd.expect_nothing_left();
}

#[test]
#[ignore = "many containers"]
fn twenty_in_a_row() {
    let ctd = containerd!();
    in_a_row(&ctd, 20);
    ctd.expect_nothing_left();
}

/// So many containers, all of the same id: nothing of the last one is in the way.
fn in_a_row(ctd: &Containerd, count: usize) {
    for n in 0..count {
        let run = ctd.sh(&[], "again", &format!("echo {n}"));
        assert_eq!(run.expect_code(0).out(), format!("{n}\n"));
    }
}

#[test]
#[ignore = "a gibibyte"]
fn a_gibibyte_of_output_is_neither_lost_nor_kept() {
    const ALL: u64 = 1 << 30;
    let ctd = containerd!();
    let args = ["head", "-c", &ALL.to_string(), "/dev/zero"];
    let mut command = ctd.run_command(&["--rm"], "c1", &args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().expect("ctr");
    let mut output = child.stdout.take().expect("a pipe");
    let mut block = vec![0; 1 << 20];
    let (mut seen, mut most) = (0, 0);
    loop {
        let count = output.read(&mut block).expect("its output");
        assert!(block[..count].iter().all(|byte| *byte == 0));
        seen += count as u64;
        if count == 0 {
            break;
        }
        if seen > ALL / 2 && most == 0 {
            let memory = |pid| {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
                line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
            };
            most = ctd.shims().into_iter().map(memory).max().unwrap_or(0);
        }
    }
    assert!(child.wait().expect("ctr").success());
    assert_eq!(seen, ALL);
    assert!((1..128 << 10).contains(&most), "the shim has had {most} KiB");
    ctd.expect_nothing_left();
}

#[test]
fn a_specification_of_ones_own_with_a_hook_of_the_host() {
    let ctd = containerd!();
    let out = ctd.path("hook.out");
    let hook = format!(
        "cat >{0}; pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/' {0}); readlink /proc/$pid/ns/net >>{0}",
        out.display()
    );
    let default = ctd.ctr(&["oci", "spec"]).expect_code(0).out();
    let mut spec: serde_json::Value = serde_json::from_str(&default).expect("a specification");
    // Its root is a directory, not one of containerd's snapshots.
    let root = Chroot::new(&World::new().image_file("busybox"));
    spec["root"]["path"] = root.path().display().to_string().into();
    spec["hostname"] = "box".into();
    spec["process"]["user"] =
        serde_json::json!({ "uid": 65534, "gid": 100, "additionalGids": [1] });
    let script = "echo $(hostname) $(id -u):$(id -g) $(id -G)";
    spec["process"]["args"] = serde_json::json!(["sh", "-c", script]);
    spec["hooks"] = serde_json::json!({
        "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", hook], "env": ["PATH=/usr/bin:/bin"] }],
    });
    let run = ctd.run_spec("c1", &spec).expect_code(0);
    assert_eq!(run.out(), "box 65534:100 100 1\n");
    let told = fs::read_to_string(out).expect("what the hook wrote");
    assert!(told.contains("\"status\":\"creating\"") && told.contains("net:["), "{told}");
    let own = fs::read_link("/proc/self/ns/net").expect("a namespace").display().to_string();
    assert!(!told.contains(&own), "{told}");

    spec["hooks"]["createRuntime"][0]["args"][2] = "echo no way >&2; exit 1".into();
    let run = ctd.run_spec("c2", &spec);
    assert!(run.code != 0 && run.err().contains("no way"), "{}", run.err());
    ctd.expect_nothing_left();
}

#[test]
fn hooks_of_the_container_are_run_in_it() {
    let ctd = containerd!();
    let default = ctd.ctr(&["oci", "spec"]).expect_code(0).out();
    let mut spec: serde_json::Value = serde_json::from_str(&default).expect("a specification");
    let root = Chroot::new(&World::new().image_file("busybox"));
    spec["root"]["path"] = root.path().display().to_string().into();
    spec["root"]["readonly"] = false.into();
    spec["annotations"] = serde_json::json!({ "said": "by the annotations" });
    spec["process"]["args"] = serde_json::json!(["cat", "/told"]);
    let hook = |script: &str| {
        serde_json::json!({
            "path": "/bin/busybox", "args": ["sh", "-c", script, "hook"],
            "env": ["PATH=/bin", "A=b c"], "timeout": 100,
        })
    };
    // What the host has is not there, and the state is the container's.
    let first = "cat >/told; echo; echo $0 $A $(readlink /proc/self/exe) $(cat /proc/1/comm | wc -l) >>/told; echo noise";
    let second = "echo second >>/told; [ ! -e /usr/bin/containerd ]";
    spec["hooks"] = serde_json::json!({ "startContainer": [hook(first), hook(second)] });
    let run = ctd.run_spec("c1", &spec).expect_code(0);
    let out = run.out();
    let (state, rest) = out.split_at(out.rfind('}').expect("a state") + 1);
    let state: serde_json::Value = serde_json::from_str(state).expect("JSON");
    assert_eq!((&state["id"], &state["status"]), (&"c1".into(), &"created".into()), "{state}");
    assert_eq!(state["pid"], 1, "its number in the container: {state}");
    assert_eq!(state["annotations"]["said"], "by the annotations", "{state}");
    assert!(state["bundle"].as_str().is_some_and(|bundle| bundle.ends_with("/c1")), "{state}");
    assert_eq!(rest, "hook b c /bin/busybox 1\nsecond\n");

    spec["hooks"] = serde_json::json!({ "startContainer": [hook("echo no way >&2; exit 3"), hook("touch /ran")] });
    let run = ctd.run_spec("c2", &spec);
    let said = run.err();
    for want in ["startContainer hook /bin/busybox", "exit code 3", "no way"] {
        assert!(run.code != 0 && said.contains(want), "{said}");
    }
    assert!(!root.path().join("ran").exists(), "the second one is not run");
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
    // Others on this host may have containers of the usual names, whose control groups are no business of ours.
    let id = &format!("killed-{}", std::process::id());
    ctd.start_container(id, "echo up; while :; do sleep 0.1; done");
    eventually("its output", || ctd.output(id) == "up\n");
    let holder = ctd.pid(id);
    for shim in ctd.shims() {
        kill(shim, Signal::SIGKILL).expect("a shim to be killed");
    }
    // containerd notices and cleans up in its own time, and refuses to be asked twice at once.
    eventually("the end of the task", || {
        ctd.ctr(&["task", "rm", id]);
        ctd.status(id).is_empty()
    });
    eventually("the end of the container", || {
        ctd.ctr(&["container", "rm", id]);
        !ctd.ctr(&["container", "ls", "-q"]).out().lines().any(|other| other == id)
    });
    // The state goes last.
    eventually("the end of the machine", || ctd.mvm(&["ps", "-aq"]).out().is_empty());
    eventually("the end of its holder", || !is_running(holder));
    ctd.expect_nothing_left();
    // The id is free as soon as containerd has heard from the clean-up that it called.
    let mut anew = None;
    eventually("the id to be free", || {
        let run = ctd.sh(&[], id, "echo anew");
        let taken = run.code != 0 && run.err().contains("already exists");
        anew = Some(run);
        !taken
    });
    let anew = anew.expect("a run").expect_code(0);
    assert_eq!(anew.out(), "anew\n", "{}", anew.err());
    ctd.expect_nothing_left();
}
