//! `process`: what the program is given and who it is.

use serde_json::json;

use crate::machine::{run, sh};

/// A field of /proc/self/status.
fn status(out: &str, key: &str) -> String {
    let line = out.lines().find(|l| l.starts_with(&format!("{key}:")));
    let line = line.unwrap_or_else(|| panic!("no {key} in {out}"));
    line.split_once(':').map(|(_, v)| v.split_whitespace().collect::<Vec<_>>().join(" ")).unwrap()
}

#[test]
fn args_are_passed_as_they_are() {
    let args = ["printf", "<%s>", "a b", "", "$HOME", "*", "ü\n"];
    assert_eq!(run(&args).out(), "<a b><><$HOME><*><ü\n>");
    let long = "x".repeat(100_000);
    assert_eq!(run(&["printf", "%s", &long]).out(), long, "an argument of 100 kB");
    let none = sh("true").with(json!({"process": {"args": []}})).refused();
    assert!(none.contains("process.args"), "{none}");
    let zero = sh("true").with(json!({"process": {"args": ["sh", "a\u{0}b"]}})).refused();
    assert!(zero.contains("process.args") && zero.contains("zero byte"), "{zero}");
}

#[test]
fn programs_are_found_by_the_path_of_the_process() {
    let path = |path: &str| json!({"process": {"env": [path]}});
    assert_eq!(sh("echo found").with(path("PATH=/nowhere:/bin")).out(), "found\n");
    let missing = sh("true").with(path("PATH=/nowhere")).refused();
    assert!(missing.starts_with("NOT_FOUND") && missing.contains("/nowhere"), "{missing}");
    let missing = run(&["/bin/none"]).refused();
    assert!(missing.starts_with("NOT_FOUND") && missing.contains("/bin/none"), "{missing}");
    for program in ["/etc/passwd", "/etc"] {
        let refused = run(&[program]).refused();
        assert!(refused.starts_with("NOT_EXECUTABLE") && refused.contains(program), "{refused}");
    }
}

#[test]
fn environment_is_the_specifications_and_home_is_added() {
    let env = |list: &[&str]| {
        let case = run(&["/bin/env"]).with(json!({"process": {"env": list}}));
        let mut lines: Vec<String> = case.out().lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(env(&["A=1", "B=x=y z", "HOME=/h"]), ["A=1", "B=x=y z", "HOME=/h"]);
    assert_eq!(env(&["A=1"]), ["A=1", "HOME=/root"], "HOME comes from /etc/passwd");
}

#[test]
fn working_directory_is_entered_and_made() {
    let cwd = |cwd: &str| sh("pwd").with(json!({"process": {"cwd": cwd}}));
    assert_eq!(cwd("/etc").out(), "/etc\n");
    assert_eq!(cwd("/made/by/the/agent").out(), "/made/by/the/agent\n");
    for bad in ["", "etc", "./etc"] {
        let refused = cwd(bad).refused();
        assert!(refused.contains("process.cwd"), "{bad:?}: {refused}");
    }
    let file = cwd("/etc/passwd/x").refused();
    assert!(file.contains("process.cwd") && file.contains("Not a directory"), "{file}");
}

#[test]
fn user_group_and_additional_groups() {
    let user = json!({"uid": 1234, "gid": 555, "additionalGids": [7, 4_000_000_000_u32]});
    let out = sh("id -u; id -g; id -G; grep Groups /proc/self/status")
        .with(json!({"process": {"user": user}}))
        .out();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..2], ["1234", "555"]);
    assert_eq!(status(&out, "Groups"), "7 4000000000");
    let by_name = sh("id -u; id -g").with(json!({"process": {"user": {"username": "daemon"}}}));
    assert_eq!(by_name.out(), "1\n1\n", "a name is looked up in the image");
}

#[test]
fn the_id_that_means_no_change_is_refused() {
    for user in [
        json!({"uid": u32::MAX, "gid": 0}),
        json!({"uid": 0, "gid": u32::MAX}),
        json!({"uid": 1, "gid": 1, "additionalGids": [u32::MAX]}),
        json!({"username": "4294967295"}),
        json!({"username": "0:4294967295"}),
    ] {
        let refused = sh("id").with(json!({"process": {"user": user}})).refused();
        assert!(refused.contains("process.user") && refused.contains("4294967295"), "{refused}");
    }
    let huge =
        sh("id").with(json!({"process": {"user": {"uid": 1_u64 << 40, "gid": 0}}})).refused();
    assert!(huge.contains("1099511627776"), "{huge}");
    let many: Vec<u32> = (0..70_000).collect();
    let many = json!({"process": {"user": {"uid": 0, "gid": 0, "additionalGids": many}}});
    let many = sh("id").with(many).refused();
    assert!(many.contains("70000 groups"), "{many}");
}

#[test]
fn umask() {
    let mask = |mask: u32| json!({"process": {"user": {"uid": 0, "gid": 0, "umask": mask}}});
    assert_eq!(sh("umask; touch /f; stat -c %a /f").with(mask(0o077)).out(), "0077\n600\n");
    assert_eq!(sh("umask").out(), "0022\n", "0022 if the specification has none");
}

#[test]
fn rlimits() {
    let limit = |kind: &str, soft: u64, hard: u64| json!({"process": {"rlimits": [{"type": kind, "soft": soft, "hard": hard}]}});
    let kinds = [
        ("CPU", "Max cpu time"),
        ("FSIZE", "Max file size"),
        ("DATA", "Max data size"),
        ("STACK", "Max stack size"),
        ("CORE", "Max core file size"),
        ("RSS", "Max resident set"),
        ("NPROC", "Max processes"),
        ("NOFILE", "Max open files"),
        ("MEMLOCK", "Max locked memory"),
        ("AS", "Max address space"),
        ("LOCKS", "Max file locks"),
        ("SIGPENDING", "Max pending signals"),
        ("MSGQUEUE", "Max msgqueue size"),
        ("NICE", "Max nice priority"),
        ("RTPRIO", "Max realtime priority"),
        ("RTTIME", "Max realtime timeout"),
    ];
    // Large enough for a shell to live with, different for each.
    let value = |at: usize| (500_u64 << 20) + u64::try_from(at).unwrap() * 4096;
    let value = |kind: &str, at| if kind == "NOFILE" { 999 } else { value(at) };
    let all: Vec<_> = kinds
        .iter()
        .enumerate()
        .map(|(at, (kind, _))| {
            let soft = value(kind, at);
            json!({"type": format!("RLIMIT_{kind}"), "soft": soft, "hard": soft + 1})
        })
        .collect();
    let out = sh("cat /proc/self/limits").with(json!({"process": {"rlimits": all}})).out();
    for (at, (kind, title)) in kinds.iter().enumerate() {
        let line = out.lines().find(|l| l.starts_with(title)).expect(title);
        let words: Vec<&str> = line[title.len()..].split_whitespace().collect();
        let soft = value(kind, at);
        let of_line: Vec<u64> = words.iter().filter_map(|w| w.parse().ok()).collect();
        assert_eq!(of_line, [soft, soft + 1], "RLIMIT_{kind}: {line}");
    }
    assert_eq!(sh("ulimit -n").with(limit("RLIMIT_NOFILE", 10, u64::MAX >> 44)).out(), "10\n");

    let refused = sh("true").with(limit("RLIMIT_NOFILE", 2, 1)).refused();
    assert!(refused.contains("process.rlimits") && refused.contains("exceeds"), "{refused}");
    let refused = sh("true").with(limit("RLIMIT_NOPE", 1, 1)).refused();
    assert!(refused.contains("RLIMIT_NOPE"), "{refused}");
    let refused = sh("true").with(limit("RLIMIT_NOFILE", 1, 1 << 40)).refused();
    assert!(refused.contains("process.rlimits: RLIMIT_NOFILE"), "{refused}");
    let twice = json!({"type": "RLIMIT_CORE", "soft": 1, "hard": 1});
    let refused = sh("true").with(json!({"process": {"rlimits": [twice, twice]}})).refused();
    assert!(refused.contains("twice"), "{refused}");
}

const KILL: u64 = 1 << 5;
const SETUID: u64 = 1 << 7;
const NET_RAW: u64 = 1 << 13;

#[test]
fn capabilities_all_five_sets() {
    let sets = json!({"process": {"user": {"uid": 5, "gid": 5}, "capabilities": {
        "bounding": ["CAP_KILL", "CAP_SETUID", "CAP_NET_RAW"],
        "permitted": ["CAP_KILL", "CAP_SETUID"],
        "effective": ["CAP_KILL"],
        "inheritable": ["CAP_KILL", "CAP_NET_RAW"],
        "ambient": ["CAP_KILL"],
    }}});
    let outcome = run(&["cat", "/proc/self/status"]).with(sets).run();
    assert!(outcome.notices.is_empty(), "{:?}", outcome.notices);
    let set = |key| u64::from_str_radix(&status(&outcome.out, key), 16).unwrap();
    assert_eq!(set("CapBnd"), KILL | SETUID | NET_RAW, "bounding");
    assert_eq!(set("CapInh"), KILL | NET_RAW, "inheritable");
    // The program is executed by user 5: only ambient capabilities survive that.
    assert_eq!(set("CapAmb"), KILL, "ambient");
    assert_eq!(set("CapPrm"), KILL, "permitted");
    assert_eq!(set("CapEff"), KILL, "effective");

    let root = run(&["cat", "/proc/self/status"]).capabilities(&["CAP_KILL", "CAP_SETUID"]).out();
    for key in ["CapBnd", "CapPrm", "CapEff"] {
        assert_eq!(u64::from_str_radix(&status(&root, key), 16).unwrap(), KILL | SETUID, "{key}");
    }
    let none = json!({"process": {"capabilities": null}});
    let none = run(&["cat", "/proc/self/status"]).with(none).out();
    for key in ["CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"] {
        assert_eq!(status(&none, key), "0000000000000000", "no capabilities given: {key}");
    }
    sh("! chown 5 /etc/passwd 2>/dev/null").capabilities(&["CAP_KILL"]).out();
}

#[test]
fn capabilities_that_cannot_be_granted_are_a_notice() {
    let sets = json!({"process": {"capabilities": {
        "bounding": ["CAP_KILL", "CAP_FROM_THE_FUTURE"],
        "permitted": ["CAP_KILL"],
        "effective": ["CAP_KILL", "CAP_SETUID"],
        "inheritable": ["CAP_SETUID"],
        "ambient": ["CAP_KILL"],
    }}});
    let outcome = sh("true").with(sets).run();
    assert_eq!(outcome.code, 0);
    for what in [
        "CAP_FROM_THE_FUTURE",
        "effective: CAP_SETUID",
        "inheritable: CAP_SETUID",
        "ambient: CAP_KILL",
    ] {
        assert!(outcome.notices.iter().any(|n| n.contains(what)), "{what}: {:?}", outcome.notices);
    }
}

#[test]
fn no_new_privileges() {
    let flag = |flag: bool| {
        let case = sh("cat /proc/self/status").with(json!({"process": {"noNewPrivileges": flag}}));
        status(&case.out(), "NoNewPrivs")
    };
    assert_eq!((flag(true), flag(false)), ("1".into(), "0".into()));
}

#[test]
fn oom_score_adj() {
    let score = |score: i64| {
        sh("cat /proc/self/oom_score_adj").with(json!({"process": {"oomScoreAdj": score}}))
    };
    assert_eq!((score(500).out(), score(-999).out()), ("500\n".into(), "-999\n".into()));
    assert_eq!(sh("cat /proc/self/oom_score_adj").out(), "0\n", "0 if there is none");
    let refused = score(5000).refused();
    assert!(refused.contains("process.oomScoreAdj 5000"), "{refused}");
    let refused = score(1 << 40).refused();
    assert!(refused.contains("1099511627776"), "{refused}");
}

#[test]
fn scheduler() {
    // Fields 18 (priority), 19 (nice), 40 (real-time priority) and 41 (policy) of proc(5)'s stat.
    let stat = |scheduler: serde_json::Value| {
        sh("cut -d' ' -f19,40,41 /proc/self/stat; true")
            .with(json!({"process": {"scheduler": scheduler}}))
    };
    assert_eq!(stat(json!({"policy": "SCHED_BATCH", "nice": 5})).out(), "5 0 3\n");
    assert_eq!(stat(json!({"policy": "SCHED_FIFO", "priority": 7})).out(), "0 7 1\n");
    let flags = json!({"policy": "SCHED_RR", "priority": 3, "flags": ["SCHED_FLAG_RESET_ON_FORK"]});
    assert!(stat(flags).refused().contains("SCHED_FLAG_RESET_ON_FORK"), "no such flag");
    let reset = json!({"policy": "SCHED_RR", "priority": 3, "flags": ["SCHED_RESET_ON_FORK"]});
    // The shell has it, cut, its child, does not.
    assert_eq!(stat(reset).out(), "0 0 0\n");
    let deadline = json!({"policy": "SCHED_DEADLINE", "runtime": 10_000_000, "deadline": 50_000_000,
        "period": 100_000_000});
    let own = sh("read -r line < /proc/self/stat; echo ${line##* 0 0 6 }; echo $line")
        .with(json!({"process": {"scheduler": deadline}}))
        .out();
    assert!(own.contains(" 6 "), "{own}");
    let refused = stat(json!({"policy": "SCHED_FIFO", "priority": 1000})).refused();
    assert!(refused.contains("process.scheduler"), "{refused}");
    let refused = stat(json!({"policy": "SCHED_ISO"})).refused();
    assert!(refused.contains("SCHED_ISO"), "{refused}");
}

#[test]
fn io_priority() {
    let class = |class: &str, priority: i64| {
        let io = json!({"process": {"ioPriority": {"class": class, "priority": priority}}});
        sh("ionice -p $$").with(io)
    };
    assert_eq!(class("IOPRIO_CLASS_BE", 6).out(), "best-effort: prio 6\n");
    assert_eq!(class("IOPRIO_CLASS_RT", 1).out(), "realtime: prio 1\n");
    assert!(class("IOPRIO_CLASS_IDLE", 0).out().starts_with("idle"));
    let refused = class("IOPRIO_CLASS_BE", 8).refused();
    assert!(refused.contains("process.ioPriority"), "{refused}");
}

#[test]
fn apparmor_and_selinux_are_ignored_with_a_notice() {
    let labels = json!({"process": {"apparmorProfile": "docker-default", "selinuxLabel": "u:r:t"},
        "linux": {"mountLabel": "u:r:m"}});
    let outcome = sh("echo runs").with(labels).run();
    assert_eq!((outcome.code, outcome.out.as_str()), (0, "runs\n"));
    for field in ["process.apparmorProfile", "process.selinuxLabel", "linux.mountLabel"] {
        assert!(outcome.notices.iter().any(|n| n.starts_with(field)), "{:?}", outcome.notices);
    }
    let unconfined = json!({"process": {"apparmorProfile": "unconfined", "selinuxLabel": ""}});
    assert!(sh("true").with(unconfined).run().notices.is_empty(), "unconfined is what there is");
}

#[test]
fn terminal_and_its_size() {
    let terminal =
        json!({"process": {"terminal": true, "consoleSize": {"height": 33, "width": 99}}});
    let script = "tty; stty size; test -t 2 && ls -l /dev/console; echo in:; read x; echo got $x";
    let mut running = sh(script).with(terminal.clone()).start().unwrap();
    let out = running.until("in:");
    assert!(out.starts_with("/dev/pts/0\r\n33 99\r\n"), "{out}");
    assert!(out.contains("/dev/console"), "{out}");
    running.write("text\n");
    assert!(running.finish().out.contains("got text"));
    let user = json!({"process": {"user": {"uid": 5, "gid": 5}}});
    let owner = sh("stat -c %u $(tty); echo ok > $(tty)").with(terminal.clone()).with(user);
    assert_eq!(owner.run().out, "5\r\nok\r\n", "the terminal is the user's");
    let mut without = sh("true").with(terminal);
    without.spec["mounts"].as_array_mut().unwrap().retain(|m| m["destination"] != "/dev/pts");
    let refused = without.refused();
    assert!(refused.contains("devpts"), "{refused}");
}
