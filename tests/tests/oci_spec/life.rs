//! From the start of a container to its end: exit codes, signals, further processes.

use mvm_tests::World;
use serde_json::json;

use crate::machine::{run, sh};

#[test]
fn exit_codes_are_exact() {
    for code in [0, 1, 42, 126, 127, 128, 137, 255] {
        let outcome = sh(&format!("exit {code}")).run();
        assert_eq!((outcome.code, outcome.signal), (code, 0));
    }
    for signal in [9, 15, 11, 34, 64] {
        let outcome = sh(&format!("sh -c 'kill -{signal} $$'; exit $?")).run();
        assert_eq!(outcome.code, 128 + signal, "a child killed by {signal}");
        let first = sh(&format!("kill -{signal} $$")).without_namespace("pid").run();
        assert_eq!((first.code, first.signal), (0, signal), "the first process killed by {signal}");
    }
}

#[test]
fn signals_reach_the_first_process() {
    for (signal, name) in
        [(1, "HUP"), (2, "INT"), (10, "USR1"), (15, "TERM"), (28, "WINCH"), (40, "40")]
    {
        let script = format!(
            "trap 'echo got {name}; exit 5' {name}; echo ready; while :; do read x || sleep 1; done"
        );
        let mut running = sh(&script).start().unwrap();
        running.until("ready");
        running.signal(signal);
        let outcome = running.finish();
        assert_eq!((outcome.code, outcome.out.as_str()), (5, format!("got {name}\n").as_str()));
    }
    let mut running = sh("echo ready; read x").start().unwrap();
    running.until("ready");
    running.signal(9);
    assert_eq!(running.finish().signal, 9);
}

/// Leaves ended processes to whoever collects orphans.
const ORPHANS: &str = "for i in 1 2 3 4 5; do sh -c 'true & true & exit'; done";

/// Writes how many are never collected, once they have had time to end.
const ZOMBIES_LEFT: &str = "sleep 0.3; for i in $(seq 100); do n=$(grep -l '^State:.*Z' /proc/[0-9]*/status 2>/dev/null | wc -l); \
                            [ $n = 0 ] && break; sleep 0.1; done; echo $n";

#[test]
fn the_agents_init_reaps_and_forwards() {
    // Orphans of an ended child: zombies if nobody collects them.
    let orphans = format!("{ORPHANS}; echo $$; {ZOMBIES_LEFT}");
    let mut case = sh(&orphans);
    case.init = true;
    let out = case.out();
    let lines: Vec<&str> = out.lines().collect();
    assert_ne!(lines[0], "1", "the program is not the first process");
    assert_eq!(lines[1], "0", "no zombies");

    let mut case = sh("trap 'exit 7' TERM; echo ready; while :; do read x || sleep 1; done");
    case.init = true;
    let mut running = case.start().unwrap();
    running.until("ready");
    running.signal(15);
    assert_eq!(running.finish().code, 7);

    let mut killed = sh("kill -9 $$");
    killed.init = true;
    assert_eq!(killed.run().code, 137);
    let mut missing = run(&["/etc/passwd"]);
    missing.init = true;
    assert!(missing.refused().starts_with("NOT_EXECUTABLE"));
}

#[test]
fn orphans_without_a_process_id_namespace_are_reaped_by_the_agent() {
    let script = format!("{ORPHANS}; {ZOMBIES_LEFT}");
    assert_eq!(sh(&script).without_namespace("pid").out(), "0\n");
}

#[test]
fn further_processes_without_terminal() {
    let mut running =
        sh("hostname; echo ready; read x").with(json!({"hostname": "h"})).start().unwrap();
    running.until("ready");
    let exec = running
        .exec(json!({"args": ["sh", "-c", "echo out; echo err >&2; hostname; ls /proc | grep -c '^1$'; exit 9"]}))
        .unwrap();
    assert_eq!((exec.code, exec.out.as_str(), exec.err.as_str()), (9, "out\nh\n1\n", "err\n"));
    let own = json!({"args": ["sh", "-c", "pwd; id -u; echo $A; umask; grep CapEff /proc/self/status"],
        "cwd": "/etc", "env": ["PATH=/bin", "A=b"], "user": {"uid": 0, "gid": 0, "umask": 63},
        "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]}});
    let exec = running.exec(own).unwrap();
    assert_eq!(exec.out, "/etc\n0\nb\n0077\nCapEff:\t0000000000000020\n", "{exec:?}");
    let killed = running.exec(json!({"args": ["sh", "-c", "kill -9 $$"]})).unwrap();
    assert_eq!(killed.signal, 9);

    let refused = |process| running.exec(process).unwrap_err();
    assert!(refused(json!({"args": ["none"]})).starts_with("NOT_FOUND"));
    assert!(refused(json!({"args": ["/etc"]})).starts_with("NOT_EXECUTABLE"));
    assert!(refused(json!({})).contains("process.args"), "no second run of the first");
    assert!(refused(json!({"args": ["sh"], "cwd": "/none"})).contains("process.cwd /none"));
    assert!(refused(json!({"args": ["sh"], "cwd": "x"})).contains("process.cwd"));
    assert!(refused(json!([])).contains("malformed"));
}

#[test]
fn further_processes_with_terminal() {
    let mut running = sh("echo ready; read x").start().unwrap();
    running.until("ready");
    let size = json!({"height": 20, "width": 70});
    let process = json!({"args": ["sh", "-c", "tty; stty size; exit 3"], "terminal": true, "consoleSize": size});
    let exec = running.exec(process).unwrap();
    assert_eq!((exec.code, exec.out.as_str()), (3, "/dev/pts/0\r\n20 70\r\n"));
}

#[test]
fn exec_cpu_affinity() {
    let mut running = sh("echo ready; read x").start().unwrap();
    running.until("ready");
    let allowed = |affinity| {
        let args = ["sh", "-c", "grep Cpus_allowed_list /proc/self/status | cut -f2"];
        running.exec(json!({"args": args, "execCPUAffinity": affinity}))
    };
    assert_eq!(allowed(json!({"initial": "0", "final": "1"})).unwrap().out, "1\n");
    assert_eq!(allowed(json!({"initial": "0"})).unwrap().out, "0\n");
    assert_eq!(allowed(json!({})).unwrap().out, "0-1\n");
    for bad in ["x", "1-0", "5000"] {
        let refused = allowed(json!({"final": bad})).unwrap_err();
        assert!(refused.contains("process.execCPUAffinity") && refused.contains(bad), "{refused}");
    }
    let refused = allowed(json!({"final": "99"})).unwrap_err();
    assert!(refused.contains("process.execCPUAffinity"), "{refused}");
}

#[test]
fn further_processes_enter_a_divided_group() {
    // What a system manager in a container does: the top group may hold no process any more.
    let script = "mount -o remount,rw /sys/fs/cgroup && cd /sys/fs/cgroup && mkdir own && echo 1 > own/cgroup.procs \
                  && echo +memory > cgroup.subtree_control && echo ready && read x";
    let mut running = sh(script).capabilities(&["CAP_SYS_ADMIN"]).start().unwrap();
    running.until("ready");
    let exec = running.exec(json!({"args": ["cat", "/proc/self/cgroup"]})).unwrap();
    assert_eq!((exec.code, exec.out.as_str()), (0, "0::/own\n"), "{exec:?}");
}

#[test]
fn errors_reach_the_user_with_dockers_exit_codes() {
    let world = World::small();
    let fails = |args: &[&str], code: i32, words: &[&str]| {
        let mut line = vec!["run", "--rm", "--memory", "64m"];
        line.extend(args);
        let run = world.mvm(&line).expect_code(code);
        for word in words {
            assert!(run.err().contains(word), "no {word:?} in {}", run.err());
        }
    };
    fails(&["busybox", "no-such-program"], 127, &["no-such-program", "PATH"]);
    fails(&["busybox", "/etc/passwd"], 126, &["/etc/passwd", "Permission denied"]);
    fails(&["-w", "/etc/passwd/x", "busybox", "true"], 125, &["process.cwd", "Not a directory"]);
    fails(&["-u", "nobody-here", "busybox", "true"], 125, &["process.user", "nobody-here"]);
}
