//! Images and specifications that want to lead the agent astray. Whatever they say: a clear
//! error, nothing half there, and the agent lives.

use serde_json::{Value, json};

use crate::machine::{Case, sh, volume};

fn tmpfs(destination: &str) -> Value {
    json!({"destination": destination, "type": "tmpfs", "source": "tmpfs"})
}

/// The mounts of the guest itself, seen by a container without namespaces.
fn mounts_of_the_guest() -> Vec<String> {
    let case = sh("cut -d' ' -f5 /proc/1/mountinfo").without_namespace("pid");
    let out = case.capabilities(&["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]).out();
    // Those of containers come and go.
    let of_guest = |line: &&str| !line.starts_with("/run/mvm/");
    out.lines().filter(of_guest).map(str::to_owned).collect()
}

#[test]
fn mount_targets_through_links_stay_inside() {
    let before = mounts_of_the_guest();
    let mounted = |destination: &str, at: &str| {
        let case = sh("cat /proc/self/mountinfo").mount(tmpfs(destination));
        let out = case.out();
        assert!(out.lines().any(|l| l.split(' ').nth(4) == Some(at)), "{destination}: {out}");
    };
    mounted("/hostile/abs/below", "/etc/below");
    mounted("/hostile/up/tmp", "/tmp");
    mounted("/hostile/up/etc", "/etc");
    mounted("/hostile/dangling", "/made/by/a/link");
    mounted("/hostile/dangling/deeper", "/made/by/a/link/deeper");
    mounted("/../../../tmp/../tmp/x", "/tmp/x");
    let file = json!({"destination": "/hostile/file", "type": "bind", "source": volume("f"), "options": ["bind"]});
    assert_eq!(sh("cat /made/file").file("f", "text\n").mount(file).out(), "text\n");
    assert_eq!(mounts_of_the_guest(), before, "nothing has come out");
}

#[test]
fn mount_targets_that_lead_nowhere_are_refused() {
    for (destination, why) in [
        ("/hostile/loop", "symbolic links"),
        ("/hostile/loop/x", "symbolic links"),
        ("/hostile/magic/x", "symbolic links"),
        ("/hostile/cwd/x", "symbolic links"),
        ("/bin/busybox/x", "Not a directory"),
        ("/bin/busybox", "Not a directory"),
        ("/", "over the root"),
        ("", "over the root"),
        ("/hostile/up", "over the root"),
        ("/tmp/..", "over the root"),
    ] {
        let refused = sh("true").mount(tmpfs(destination)).refused();
        let named = refused.contains(&format!("mounts[{destination}]"));
        assert!(named && refused.contains(why), "{destination}: {refused}");
    }
    let long = format!("/{}", "x/".repeat(3000));
    assert!(sh("true").mount(tmpfs(&long[..900])).start().is_ok(), "deep, but possible");
    let mut case = sh("true").mount(tmpfs(&long));
    case.spec["linux"]["maskedPaths"] = json!([]);
    let refused = case.start().err().expect("too long a path");
    assert!(refused.contains("name too long"), "{}", &refused[refused.len().saturating_sub(80)..]);
}

#[test]
fn devices_directories_and_links_of_an_image_are_not_followed_out() {
    let node = json!({"path": "/hostile/abs/node", "type": "c", "major": 1, "minor": 3});
    let made = sh("stat -c %F /etc/node").with(json!({"linux": {"devices": [node]}}));
    assert_eq!(made.out(), "character special file\n");
    // Where a link is, the node takes its place.
    let node = json!({"path": "/hostile/file", "type": "c", "major": 1, "minor": 3});
    let made = sh("stat -c %F /hostile/file").with(json!({"linux": {"devices": [node]}}));
    assert_eq!(made.out(), "character special file\n");
    let cwd = json!({"process": {"cwd": "/hostile/dangling"}});
    assert_eq!(sh("pwd -P").with(cwd).out(), "/made/by/a/link\n");
    let cwd = json!({"process": {"cwd": "/hostile/loop"}});
    let refused = sh("true").with(cwd).refused();
    assert!(refused.contains("process.cwd"), "{refused}");
    let masked = json!({"linux": {"maskedPaths": ["/hostile/loop"]}});
    let refused = sh("true").with(masked).refused();
    assert!(refused.contains("/hostile/loop"), "{refused}");
}

#[test]
fn a_working_directory_is_no_way_out() {
    // Through a descriptor that the agent's process may have open (CVE-2024-21626).
    for fd in 0..12 {
        let cwd = json!({"process": {"cwd": format!("/proc/self/fd/{fd}")}});
        let refused = sh("pwd").with(cwd).refused();
        assert!(refused.contains("process.cwd"), "{refused}");
    }
    let mut running = sh("echo ready; read x").start().unwrap();
    running.until("ready");
    for fd in 0..12 {
        let cwd = format!("/proc/self/fd/{fd}");
        let refused = running.exec(json!({"args": ["pwd"], "cwd": cwd})).unwrap_err();
        assert!(refused.contains("process.cwd"), "{refused}");
    }
    // Nor is an executable or directory that leads back to the agent's own root.
    let exe = running.exec(json!({"args": ["/proc/1/exe", "sh", "-c", "ls /init"]})).unwrap();
    assert_ne!(exe.code, 0, "{exe:?}");
}

#[test]
fn the_guests_own_dev_is_left_alone() {
    let dev =
        json!({"destination": "/dev/", "type": "bind", "source": "/dev", "options": ["rbind"]});
    let replaces = |case: Case| {
        let mut case = case;
        case.spec["mounts"]
            .as_array_mut()
            .unwrap()
            .retain(|m| !m["destination"].as_str().unwrap().starts_with("/dev"));
        case.mount(dev.clone())
    };
    let list = "stat -c '%n %F' /dev/ptmx /dev/null /dev/kmsg";
    let out = replaces(sh(list)).out();
    assert!(out.starts_with("/dev/ptmx character special file\n"), "not a link of ours: {out}");
    assert_eq!(replaces(sh(list)).out(), out);
}

#[test]
fn malformed_specifications() {
    let mut case = sh("true");
    for (spec, word) in [
        (json!([]), "ociVersion"),
        (json!(null), "malformed"),
        (json!({"ociVersion": "1.0.0"}), "mount namespace"),
        (json!({"ociVersion": 5}), "malformed"),
        (json!({"ociVersion": "1.0.0", "linux": {"namespaces": [{"type": "mount"}]}}), "process"),
        (json!({"ociVersion": "1.0.0", "mounts": {"a": "b"}}), "malformed"),
        (json!({"ociVersion": "1.0.0", "hooks": [1]}), "malformed"),
    ] {
        case.spec = spec;
        let refused = case.clone().refused();
        assert!(refused.contains(word), "{word}: {refused}");
    }
    let nested = (0..200).fold(json!(1), |inner, _| json!([inner]));
    let refused = sh("true").with(json!({"x-unknown": nested})).refused();
    assert!(refused.contains("recursion"), "{refused}");
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    case = sh("true").with(json!({"annotations": {"a": deep}}));
    assert_eq!(case.run().code, 0, "an annotation is any text");
    let wrong = sh("true").with(json!({"process": {"terminal": "yes"}})).refused();
    assert!(wrong.contains("malformed") && wrong.contains("line"), "{wrong}");
}

#[test]
fn refused_containers_leave_nothing() {
    let before = mounts_of_the_guest();
    let groups = || {
        let case = sh("ls -d /all/fs/cgroup/mvm/*/").mount(
            json!({"destination": "/all", "type": "bind", "source": "/sys", "options": ["rbind"]}),
        );
        case.out().lines().count()
    };
    assert_eq!(groups(), 1);
    for round in 0..3 {
        // Refused at different depths: by the control group, the root, a mount, the process.
        for change in [
            json!({"linux": {"resources": {"unified": {"no.such": "1"}}}}),
            json!({"linux": {"sysctl": {"no.such": "1"}}}),
            json!({"mounts": [tmpfs("/a"), tmpfs("/hostile/loop")]}),
            json!({"process": {"user": {"username": "nobody-here"}}}),
            json!({"process": {"args": ["none"]}}),
        ] {
            // The same name each time: what was left of it would be in the way.
            let refused = sh("true").with(change.clone()).file("f", "x").start_as("again");
            assert!(refused.is_err(), "{change}");
        }
        let good = sh("true").file("f", "x").start_as("again");
        assert_eq!(good.expect("the name is free").finish().code, 0, "round {round}");
    }
    assert_eq!(groups(), 1);
    assert_eq!(mounts_of_the_guest(), before);
}

#[test]
fn huge_values_are_refused_by_number() {
    for change in [
        json!({"linux": {"resources": {"cpu": {"shares": u64::MAX, "quota": i64::MAX}}}}),
        json!({"linux": {"resources": {"cpu": {"period": u64::MAX}}}}),
        json!({"linux": {"resources": {"cpu": {"idle": i64::MAX}}}}),
        json!({"process": {"consoleSize": {"height": -1, "width": 1}}}),
        json!({"process": {"scheduler": {"policy": "SCHED_OTHER", "nice": 1_u64 << 40}}}),
        json!({"linux": {"devices": [{"path": "/dev/x", "type": "c", "major": 1_u64 << 40, "minor": 0}]}}),
    ] {
        let refused = sh("true").with(change).refused();
        assert!(refused.len() > 10, "{refused}");
    }
    let size = json!({"process": {"terminal": true, "consoleSize": {"height": u64::MAX, "width": u64::MAX}}});
    assert_eq!(sh("stty size").with(size).run().code, 0, "as much as a terminal has");
}
