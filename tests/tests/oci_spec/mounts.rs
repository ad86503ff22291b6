//! `root` and `mounts`.

use serde_json::{Value, json};

use crate::machine::{Case, sh, volume};

fn tmpfs(destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options})
}

fn bind(source: &str, destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

/// The options of the mount at `path` as the kernel shows them, propagation with them.
fn options_of(case: Case, path: &str) -> String {
    // mountinfo: id, parent, device, root, mount point, options, propagation...
    case.out().lines().find(|l| l.split(' ').nth(4) == Some(path)).expect(path).to_owned()
}

fn mountinfo() -> Case {
    sh("cat /proc/self/mountinfo")
}

#[test]
fn root_is_writable_or_read_only() {
    let readonly = |readonly: bool| json!({"root": {"path": "any", "readonly": readonly}});
    sh("echo x > /new && rm /bin/vi").with(readonly(false)).out();
    let case = sh("! echo x > /new && ! rm /bin/vi && echo x > /dev/shm/f && cd /cwd");
    let case = case.with(readonly(true)).with(json!({"process": {"cwd": "/cwd"}}));
    let outcome = case.run();
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert!(outcome.err.contains("Read-only file system"), "{}", outcome.err);
    let mut without_upper = sh("! echo x > /new && test -c /dev/null");
    without_upper.writable = false;
    assert_eq!(without_upper.run().code, 0, "no upper layer");
    sh("true").with(json!({"root": null})).out();
}

#[test]
fn root_is_the_image_below_and_memory_above() {
    let out =
        sh("stat -f -c %T /; stat -c '%a %u:%g' / /tmp /root; grep -c overlay /proc/mounts").out();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[1..], ["755 0:0", "1777 0:0", "700 0:0", "1"], "{out}");
    sh("test -e /bin/vi && ! test -e /new").out();
}

#[test]
fn default_file_systems_are_there() {
    let out = sh("cut -d' ' -f2,3 /proc/mounts").out();
    for mount in ["/proc proc", "/sys sysfs", "/dev/pts devpts", "/dev/shm tmpfs"] {
        assert!(out.lines().any(|l| l == mount), "{mount}: {out}");
    }
}

#[test]
fn mount_targets_are_made_and_mounted_in_order() {
    let case = sh("ls /data/deep; stat -c %F /data/file; cat /data/file; pwd -P")
        .file("f", "text\n")
        .mount(tmpfs("/data", &[]))
        .mount(tmpfs("/data/deep/down", &[]))
        .mount(bind(&volume("f"), "/data/file", &["bind"]))
        .mount(tmpfs("relative", &[]));
    assert_eq!(case.out(), "down\nregular file\ntext\n/\n");
    let found = options_of(mountinfo().mount(tmpfs("relative", &[])), "/relative");
    assert!(found.contains("tmpfs"), "{found}");
}

#[test]
fn mount_attributes() {
    let cases = [
        ("ro", "ro"),
        ("nosuid", "nosuid"),
        ("nodev", "nodev"),
        ("noexec", "noexec"),
        ("noatime", "noatime"),
        ("nodiratime", "nodiratime"),
        ("nosymfollow", "nosymfollow"),
        ("relatime", "relatime"),
    ];
    let mut case = mountinfo();
    for (option, _) in cases {
        case = case.mount(tmpfs(&format!("/m/{option}"), &[option]));
    }
    // The later word wins.
    case = case
        .mount(tmpfs("/m/rw", &["ro", "rw", "nosuid", "suid", "noexec", "exec", "nodev", "dev"]))
        .mount(tmpfs("/m/strict", &["noatime", "strictatime", "nodiratime", "diratime"]))
        .mount(tmpfs("/m/sync", &["sync", "dirsync", "silent", "loud", "defaults", "lazytime"]));
    let out = case.out();
    let of = |path: &str| {
        let line = out.lines().find(|l| l.split(' ').nth(4) == Some(path)).expect(path);
        line.split(' ').nth(5).unwrap().to_owned()
    };
    for (option, shown) in cases {
        let found = of(&format!("/m/{option}"));
        assert!(found.split(',').any(|o| o == shown), "{option}: {found}");
    }
    assert_eq!(of("/m/rw"), "rw,relatime");
    assert_eq!(of("/m/strict"), "rw", "neither noatime nor relatime nor nodiratime");
    let sync = out.lines().find(|l| l.contains(" /m/sync ")).unwrap();
    assert!(sync.contains("sync") && sync.contains("lazytime"), "{sync}");
}

#[test]
fn file_system_options_reach_the_file_system() {
    let out = sh("df -k /t | tail -n 1 | awk '{print $2}'; stat -c '%a %u' /t")
        .mount(tmpfs("/t", &["size=1m", "mode=0711", "uid=5"]))
        .out();
    assert_eq!(out, "1024\n711 5\n");
    let refused = sh("true").mount(tmpfs("/t", &["bogus=1"])).refused();
    assert!(refused.contains("mounts[/t]") && refused.contains("bogus"), "{refused}");
    let unknown = json!({"destination": "/t", "type": "nofs", "source": "x"});
    let refused = sh("true").mount(unknown).refused();
    assert!(refused.contains("mounts[/t]") && refused.contains("nofs"), "{refused}");
    let none = json!({"destination": "/t", "source": "x"});
    let refused = sh("true").mount(none).refused();
    assert!(refused.contains("mounts[/t]") && refused.contains("type"), "{refused}");
}

#[test]
fn bind_mounts_of_files_and_trees() {
    let case = sh("cat /a/f /b; ! echo x > /a/f && ! echo x > /b && echo y > /c && cat /c")
        .file("f", "text\n")
        .mount(bind(&volume("f"), "/a/f", &["bind", "ro"]))
        .mount(bind(&volume("f"), "/b", &["rbind", "rro"]))
        .mount(bind(&volume("f"), "/c", &["bind", "rw"]));
    let outcome = case.run();
    assert_eq!((outcome.code, outcome.out.as_str()), (0, "text\ntext\ny\n"), "{}", outcome.err);
    // The guest's own /sys has mounts below it: "rbind" brings them along, "bind" does not, and
    // the recursive attributes hold for all of them.
    let case = mountinfo().mount(bind("/sys", "/one", &["bind"])).mount(bind(
        "/sys",
        "/all",
        &["rbind", "rro", "rnoexec"],
    ));
    let out = case.out();
    let at = |path: &str| out.lines().find(|l| l.split(' ').nth(4) == Some(path));
    assert!(at("/one/fs/cgroup").is_none());
    let below = at("/all/fs/cgroup").expect("the mount below").split(' ').nth(5).unwrap();
    assert!(below.starts_with("ro,") && below.contains("noexec"), "{below}");
    let refused = sh("true").mount(bind("/no/such", "/x", &["bind"])).refused();
    assert!(refused.contains("mounts[/x]") && refused.contains("/no/such"), "{refused}");
    let without = json!({"destination": "/x", "type": "bind"});
    let refused = sh("true").mount(without).refused();
    assert!(refused.contains("mounts[/x]") && refused.contains("source"), "{refused}");
}

#[test]
fn options_without_meaning_for_a_bind_are_a_notice() {
    let case = sh("true").file("f", "").mount(bind(&volume("f"), "/x", &["bind", "size=5", "z"]));
    let notices = case.run().notices;
    assert!(matches!(&notices[..], [n] if n.contains("mounts[/x]") && n.contains("size=5, z")));
}

#[test]
fn propagation_of_mounts() {
    let case = mountinfo()
        .mount(tmpfs("/private", &["private"]))
        .mount(tmpfs("/shared", &["shared"]))
        .mount(tmpfs("/slave", &["shared", "rslave"]))
        .mount(tmpfs("/unbindable", &["unbindable"]));
    let out = case.out();
    let at = |path: &str| out.lines().find(|l| l.split(' ').nth(4) == Some(path)).expect(path);
    assert!(at("/shared").contains("shared:"), "{out}");
    assert!(at("/unbindable").contains("unbindable"), "{out}");
    for path in ["/private", "/slave"] {
        // A slave without a master is private.
        assert!(!at(path).contains("shared:"), "{path}: {out}");
    }
}

#[test]
fn rootfs_propagation() {
    let root = |word: &str| {
        let case = mountinfo().with(json!({"linux": {"rootfsPropagation": word}}));
        options_of(case, "/")
    };
    assert!(root("shared").contains("shared:"));
    assert!(root("unbindable").contains("unbindable"));
    for word in ["private", "slave", "rprivate", "rslave", ""] {
        assert!(!root(word).contains("shared:"), "{word}");
    }
    let refused = sh("true").with(json!({"linux": {"rootfsPropagation": "public"}})).refused();
    assert!(refused.contains("linux.rootfsPropagation") && refused.contains("public"), "{refused}");
}

#[test]
fn remount_changes_attributes() {
    let case = mountinfo().mount(tmpfs("/t", &[])).mount(
        json!({"destination": "/t", "type": "none", "options": ["remount", "ro", "nosuid"]}),
    );
    let found = options_of(case, "/t");
    assert!(found.split(' ').nth(5).unwrap().starts_with("ro,nosuid"), "{found}");
    let missing = json!({"destination": "/missing", "options": ["remount", "ro"]});
    let refused = sh("true").mount(missing).refused();
    assert!(refused.contains("mounts[/missing]"), "{refused}");
}

#[test]
fn tmpcopyup_starts_with_what_was_there() {
    let script = "stat -c '%a' /etc; cat /etc/group | head -n 1; echo x > /etc/new; ls /etc";
    let case = sh(script).mount(tmpfs("/etc", &["tmpcopyup", "nodev"]));
    assert_eq!(case.out(), "755\nroot:x:0:\ngroup\nnew\npasswd\n");
    let links = sh("readlink /bin/vi; /bin/vi --help 2>&1 | head -n 1 | cut -c 1-7")
        .mount(tmpfs("/bin", &["tmpcopyup"]));
    assert_eq!(links.out(), "busybox\nBusyBox\n");
    let small = sh("true").mount(tmpfs("/bin", &["tmpcopyup", "size=64k"])).refused();
    assert!(small.contains("mounts[/bin]") && small.contains("No space"), "{small}");
    let wrong = json!({"destination": "/x", "type": "proc", "options": ["tmpcopyup"]});
    assert!(sh("true").mount(wrong).refused().contains("tmpcopyup"));
}

#[test]
fn id_mapped_mounts_are_refused() {
    let mapping = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
    let mut mount = bind("/sys", "/x", &["bind"]);
    mount["uidMappings"] = mapping;
    let refused = sh("true").mount(mount).refused();
    assert!(refused.contains("mounts[/x]") && refused.contains("uidMappings"), "{refused}");
    for option in ["idmap", "ridmap"] {
        let refused = sh("true").mount(bind("/sys", "/x", &["rbind", option])).refused();
        assert!(refused.contains("mounts[/x]") && refused.contains("id-mapped"), "{refused}");
    }
}

#[test]
fn masked_paths() {
    let paths = ["/proc/version", "/usr", "/proc/no-such", "/etc/group"];
    let script = "cat /proc/version | wc -c; ls /usr | wc -l; ! touch /usr/f; \
                  stat -c %t:%T /etc/group; ! grep . /etc/group";
    let outcome = sh(script).with(json!({"linux": {"maskedPaths": paths}})).run();
    assert_eq!(outcome.out, "0\n0\n1:3\n", "{outcome:?}");
    assert!(outcome.err.contains("Read-only"), "{}", outcome.err);
    let fake = json!({"destination": "/dev/null", "type": "bind", "source": volume("f"), "options": ["bind"]});
    let case = sh("true").file("f", "not null").mount(fake);
    let refused = case.with(json!({"linux": {"maskedPaths": ["/proc/version"]}}));
    // Our own node is made after the mounts and cannot take the place of a mount.
    let refused = refused.refused();
    assert!(refused.contains("/dev/null"), "{refused}");
}

#[test]
fn readonly_paths() {
    let paths =
        json!({"linux": {"readonlyPaths": ["/proc/sys", "/tmp", "/etc/passwd", "/no-such"]}});
    let script =
        "! echo 1 > /proc/sys/vm/swappiness; ! touch /tmp/x; ! echo >> /etc/passwd; touch /root/x";
    let outcome = sh(script).with(paths).run();
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(outcome.err.matches("Read-only").count(), 3, "{}", outcome.err);
}
