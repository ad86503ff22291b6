//! `linux` but for control groups and seccomp, and the top of the specification.

use serde_json::{Value, json};

use crate::machine::{run, sh};

#[test]
fn versions_of_the_specification() {
    for version in ["1.0.0", "1.2.1", "1.3.0-dev"] {
        sh("true").with(json!({"ociVersion": version})).out();
    }
    for version in ["2.0.0", "", "x"] {
        let refused = sh("true").with(json!({"ociVersion": version})).refused();
        assert!(refused.contains("ociVersion") && refused.contains("1.x"), "{refused}");
    }
}

#[test]
fn hostname_and_domainname() {
    let names = json!({"hostname": "somewhere", "domainname": "example"});
    let out = sh("hostname; cat /proc/sys/kernel/domainname").with(names.clone()).out();
    assert_eq!(out, "somewhere\nexample\n");
    let refused = sh("true").without_namespace("uts").refused();
    assert!(refused.contains("hostname") && refused.contains("uts namespace"), "{refused}");
    let refused = sh("true").with(json!({"hostname": "x".repeat(65)})).refused();
    assert!(refused.contains("hostname"), "{refused}");
    let none = json!({"hostname": null});
    assert_eq!(sh("hostname").with(none).without_namespace("uts").out(), "mvm\n");
}

#[test]
fn annotations_have_no_effect() {
    let outcome = sh("true").with(json!({"annotations": {"a.b/c": "d"}})).run();
    assert!(outcome.code == 0 && outcome.notices.is_empty(), "{outcome:?}");
}

/// What a container with the change says of its ignored parts.
fn notices(change: Value) -> Vec<String> {
    let outcome = sh("true").with(change).run();
    assert_eq!(outcome.code, 0, "{outcome:?}");
    outcome.notices
}

#[test]
fn hooks_of_the_container_are_run_before_its_program() {
    let hook = |script: &str| json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"], "timeout": 60});
    let hooks = |list: Value| json!({"hooks": {"startContainer": list}});
    // As the program's user, with what it may, and with no descriptor but three.
    let look = "id -u; id -g; pwd; grep CapEff /proc/self/status; grep Seccomp: /proc/self/status; ls /proc/self/fd";
    let script = format!("({look}) >/tmp/hook 2>&1");
    let user = json!({"process": {"user": {"uid": 1000, "gid": 1001}, "cwd": "/tmp"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                   {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]}],
        "linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls":
            [{"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"}]}}});
    let case = sh(&format!(
        "cat /tmp/hook >/tmp/mine; ({look}) >/tmp/own 2>&1; [ \"$(cat /tmp/mine)\" = \"$(cat /tmp/own)\" ] && cat /tmp/own"
    ));
    let out = case.with(user).with(hooks(json!([hook(&script)]))).out();
    assert!(out.starts_with("1000\n1001\n/tmp\n"), "{out}");
    assert!(out.contains("Seccomp:\t2"), "{out}");
    // What fails stops the start, and is told.
    for (script, want) in
        [("echo oops >&2; exit 7", "exit code 7: oops"), ("kill -9 $$", "SIGKILL")]
    {
        let refused = sh("true").with(hooks(json!([hook(script)]))).refused();
        assert!(refused.contains("startContainer") && refused.contains(want), "{refused}");
    }
    let mut slow = hook("exec sleep 1000");
    slow["timeout"] = 1.into();
    let refused = sh("true").with(hooks(json!([slow]))).refused();
    assert!(refused.contains("did not end in time"), "{refused}");
    let missing = sh("true").with(hooks(json!([{"path": "/no/such"}]))).refused();
    assert!(missing.contains("/no/such") && missing.contains("No such file"), "{missing}");
    let relative = sh("true").with(hooks(json!([{"path": "bin/true"}]))).refused();
    assert!(relative.contains("not absolute"), "{relative}");
}

#[test]
fn what_is_ignored_is_said() {
    assert!(notices(json!({})).is_empty());
    let hook = json!([{"path": "/bin/false"}]);
    let kinds = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];
    for kind in kinds {
        let all = notices(json!({"hooks": {kind: hook}}));
        assert!(matches!(&all[..], [n] if n.starts_with("hooks") && n.contains(kind)), "{all:?}");
    }
    assert!(notices(json!({"hooks": {"prestart": []}})).is_empty(), "no hooks");
    for (change, field) in [
        (json!({"vm": {"kernel": {"path": "/k"}}}), "vm"),
        (json!({"windows": {"layerFolders": ["x"]}}), "windows"),
        (json!({"solaris": {"milestone": "x"}}), "solaris"),
        (json!({"zos": {}}), "zos"),
        (json!({"linux": {"cgroupsPath": "/elsewhere"}}), "linux.cgroupsPath"),
        (json!({"linux": {"netDevices": {"eth7": {"name": "x"}}}}), "linux.netDevices"),
        (json!({"linux": {"intelRdt": {"closID": "x"}}}), "linux.intelRdt"),
        (
            json!({"linux": {"memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0"}}}),
            "linux.memoryPolicy",
        ),
    ] {
        let all = notices(change);
        assert!(matches!(&all[..], [n] if n.starts_with(field)), "{field}: {all:?}");
    }
}

#[test]
fn namespaces_new_and_none() {
    let list =
        "cd /proc/self/ns && for n in pid ipc uts mnt cgroup net time user; do readlink $n; done";
    let privileges = ["CAP_SYS_PTRACE", "CAP_SYS_ADMIN"];
    // A container without most namespaces sees the guest's own.
    let waiting = format!("{list}; echo ready; read x");
    let mut bare = sh(&waiting).with(json!({"hostname": null})).capabilities(&privileges);
    for kind in ["pid", "ipc", "uts", "cgroup"] {
        bare = bare.without_namespace(kind);
    }
    // It lives while the other one runs: the kernel gives the numbers of namespaces that ended to new ones.
    let mut bare = bare.start().unwrap();
    let outer = bare.until("ready");
    let outer: Vec<&str> = outer.lines().collect();
    let usual = sh(list).out();
    let usual: Vec<&str> = usual.lines().collect();
    drop(bare);
    for (at, kind) in ["pid", "ipc", "uts", "mnt", "cgroup"].iter().enumerate() {
        assert_ne!(outer[at], usual[at], "{kind}");
    }
    assert_eq!(outer[5..8], usual[5..], "network, time and user namespaces are not asked for");
    let network =
        sh("readlink /proc/self/ns/net; ip addr show lo | grep -c LOOPBACK,UP; ls /sys/class/net");
    let network = network.namespace(json!({"type": "network"})).out();
    let lines: Vec<&str> = network.lines().collect();
    assert_ne!(lines[0], outer[5]);
    assert_eq!(lines[1..], ["1", "lo"], "a new one has a loopback interface that is up");
    assert_eq!(sh("echo $$").out(), "1\n");
    assert_ne!(sh("echo $$").without_namespace("pid").out(), "1\n");
    let refused = sh("true").without_namespace("mount").refused();
    assert!(refused.contains("mount namespace"), "{refused}");
    let refused = sh("true").namespace(json!({"type": "pid"})).refused();
    assert!(refused.contains("twice"), "{refused}");
    let refused = sh("true").namespace(json!({"type": "galaxy"})).refused();
    assert!(refused.contains("galaxy"), "{refused}");
}

#[test]
fn namespaces_joined_by_path() {
    let own = "cd /proc/self/ns && readlink net uts ipc pid";
    let one = format!(
        "hostname joined; cd /proc/self/ns; for n in net uts ipc pid; do readlink $n; done; echo ready; read x; # {own}"
    );
    let mut first = sh(&one)
        .namespace(json!({"type": "network"}))
        .capabilities(&["CAP_SYS_ADMIN"])
        .start()
        .unwrap();
    let ids: Vec<String> = first.until("ready").lines().take(4).map(str::to_owned).collect();
    // In the guest's own numbers.
    let pid = first.call(|c, l| c.list_containers(&Default::default(), l)).unwrap();
    let pid = pid.containers.iter().find(|c| c.id == first.id()).unwrap().pid;
    let script = "cd /proc/self/ns; for n in net uts ipc pid; do readlink $n; done; hostname";
    let mut second = sh(script).with(json!({"hostname": null}));
    for kind in ["uts", "ipc", "pid"] {
        second = second.without_namespace(kind);
    }
    for (kind, file) in [("network", "net"), ("uts", "uts"), ("ipc", "ipc"), ("pid", "pid")] {
        second = second.namespace(json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")}));
    }
    let out = second.out();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..4], ids[..], "the namespaces of the other container");
    assert_eq!(lines[4], "joined");
    drop(first);

    for (path, why) in
        [("/proc/1/ns/none", "No such file"), ("/run", "Invalid argument"), ("/dev/kmsg", "")]
    {
        let refused = sh("true")
            .with(json!({"hostname": null}))
            .without_namespace("uts")
            .namespace(json!({"type": "uts", "path": path}))
            .refused();
        assert!(refused.contains(path) && refused.contains(why), "{refused}");
    }
    let mount = sh("true").without_namespace("mount");
    let refused = mount.namespace(json!({"type": "mount", "path": "/proc/1/ns/mnt"})).refused();
    assert!(refused.contains("mount namespace"), "{refused}");
}

#[test]
fn time_offsets() {
    let offsets = json!({"linux": {"timeOffsets": {
        "monotonic": {"secs": 1_000_000}, "boottime": {"secs": 2_000_000, "nanosecs": 5}}}});
    let time = json!({"type": "time"});
    let mut running = sh("cut -d. -f1 /proc/uptime; echo ready; read x")
        .with(offsets.clone())
        .namespace(time.clone())
        .start()
        .unwrap();
    let uptime: u64 = running.until("ready").lines().next().unwrap().parse().unwrap();
    assert!((2_000_000..2_100_000).contains(&uptime), "{uptime}");
    let exec = running.exec(json!({"args": ["cut", "-d.", "-f1", "/proc/uptime"]})).unwrap();
    assert!(exec.out.trim().parse::<u64>().unwrap() >= uptime, "exec'ed ones too: {exec:?}");
    drop(running);
    let refused = sh("true").with(offsets).refused();
    assert!(refused.contains("linux.timeOffsets") && refused.contains("time namespace"));
    let wrong = json!({"linux": {"timeOffsets": {"sundial": {"secs": 1}}}});
    let refused = sh("true").with(wrong).namespace(time).refused();
    assert!(refused.contains("linux.timeOffsets") && refused.contains("sundial"), "{refused}");
}

#[test]
fn user_namespace_and_id_mappings() {
    let map = |size: u32| json!([{"containerID": 0, "hostID": 100_000, "size": size}]);
    let maps = |size: u32| json!({"linux": {"uidMappings": map(size), "gidMappings": map(size)}});
    let user = json!({"type": "user"});
    let script = "cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; id -u; stat -c %u /etc/passwd; \
                  echo x > /new && stat -c %u /new; echo y > /dev/null && stat -c %F /dev/null";
    let case = sh(script).with(maps(65536)).namespace(user.clone());
    let out = case.out();
    assert_eq!(
        out, " 0 100000 65536\n 0 100000 65536\n0\n0\n0\ncharacter special file\n",
        "owners are shown mapped, the root is writable, devices are there"
    );
    let as_user = json!({"process": {"user": {"uid": 7, "gid": 8}}});
    let case = sh("id -u; id -g").with(maps(65536)).namespace(user.clone()).with(as_user.clone());
    assert_eq!(case.out(), "7\n8\n");
    let refused = sh("true").with(maps(6)).namespace(user.clone()).with(as_user).refused();
    assert!(refused.contains("process.user"), "{refused}");
    let refused = sh("true").with(maps(1)).refused();
    assert!(
        refused.contains("linux.uidMappings") && refused.contains("user namespace"),
        "{refused}"
    );
    let refused = sh("true").namespace(user).refused();
    assert!(refused.contains("linux.uidMappings"), "{refused}");
}

#[test]
fn default_devices_and_links() {
    let script = "cd /dev; for d in null zero full random urandom tty; do stat -c '%n %t:%T %a' $d; done; \
                  for l in fd stdin stdout stderr ptmx; do readlink $l; done; \
                  head -c 4 /dev/zero | wc -c; ! echo x 2>/dev/null > /dev/full";
    let out = sh(script).out();
    let expected = "null 1:3 666\nzero 1:5 666\nfull 1:7 666\nrandom 1:8 666\nurandom 1:9 666\n\
                    tty 5:0 666\n/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\n\
                    pts/ptmx\n4\n";
    assert_eq!(out, expected);
}

#[test]
fn devices_of_the_specification() {
    let device = |device: Value| json!({"linux": {"devices": [device]}});
    let script = |path: &str| format!("stat -c '%F %t:%T %a %u:%g' {path}");
    let made = |path: &str, value: Value| sh(&script(path)).with(device(value)).out();
    let character = json!({"path": "/dev/x", "type": "c", "major": 10, "minor": 229,
        "fileMode": 0o640, "uid": 3, "gid": 4});
    assert_eq!(made("/dev/x", character), "character special file a:e5 640 3:4\n");
    let block = json!({"path": "/dev/disk/0", "type": "b", "major": 254, "minor": 0});
    assert_eq!(made("/dev/disk/0", block), "block special file fe:0 666 0:0\n");
    let fifo = json!({"path": "/run/pipe", "type": "p", "fileMode": 0o10600});
    assert_eq!(made("/run/pipe", fifo), "fifo 0:0 600 0:0\n");
    let own = json!({"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600});
    assert_eq!(made("/dev/null", own), "character special file 1:3 600 0:0\n");
    for (value, word) in [
        (json!({"path": "/dev/x", "type": "c", "major": -1, "minor": 0}), "major"),
        (json!({"path": "/dev/x", "type": "a", "major": 1, "minor": 0}), "\"a\""),
        (json!({"path": "/dev/x", "type": "z", "major": 1, "minor": 0}), "z"),
        (json!({"path": "/", "type": "c", "major": 1, "minor": 0}), "no path of a file"),
        (json!({"path": "/dev/shm", "type": "c", "major": 1, "minor": 0}), "/dev/shm"),
        (json!({"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "uid": u32::MAX}), "no id"),
    ] {
        let refused = sh("true").with(device(value)).refused();
        assert!(refused.contains(word), "{word}: {refused}");
    }
}

#[test]
fn sysctl() {
    let set = |key: &str, value: &str| json!({"linux": {"sysctl": {key: value}}});
    let case = sh("cat /proc/sys/kernel/msgmax; cat /proc/sys/net/ipv4/ip_forward")
        .with(set("kernel.msgmax", "12345"))
        .with(set("net/ipv4/ip_forward", "1"))
        .namespace(json!({"type": "network"}));
    assert_eq!(case.out(), "12345\n1\n");
    assert_ne!(sh("cat /proc/sys/kernel/msgmax").out(), "12345\n", "of the namespace only");
    for key in ["no.such.key", "kernel/../../etc/passwd", "", "kernel"] {
        let refused = sh("true").with(set(key, "1")).refused();
        assert!(refused.contains("linux.sysctl") && refused.contains(key), "{key}: {refused}");
        assert!(!refused.contains("Permission"), "{refused}");
    }
    let refused = sh("true").with(set("kernel.msgmax", "many")).refused();
    assert!(refused.contains("kernel.msgmax=many"), "{refused}");
}

#[test]
fn personality() {
    let domain = |name: &str| json!({"linux": {"personality": {"domain": name}}});
    assert_eq!(run(&["uname", "-m"]).with(domain("LINUX32")).out(), "i686\n");
    assert_eq!(run(&["uname", "-m"]).with(domain("LINUX")).out(), "x86_64\n");
    let flags = json!({"linux": {"personality": {"domain": "LINUX", "flags": ["X"]}}});
    assert!(notices(flags)[0].starts_with("linux.personality.flags"));
    assert!(sh("true").with(domain("MULTICS")).refused().contains("MULTICS"));
}
