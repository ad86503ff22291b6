//! `mvm doctor` on hosts made for it: mount namespaces whose `/dev` has another device of KVM, or
//! none. What the finding of each kind of host says is tested where it is judged; here the way from
//! the file to the words, in both forms. Wants root, and holds with and without KVM.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mvm_tests::{Finished, World, run_with};
use serde_json::Value;

/// Who is nobody in particular, and a group that every system has.
const NOBODY: u32 = 65534;
const GROUP: (&str, u32) = ("daemon", 1);

/// More than a busy host needs.
const SOON: Duration = Duration::from_secs(60);

/// A fresh world that anybody may use, with the binary in it.
fn world() -> World {
    let world = World::new();
    fs::copy(world.binary(), world.root().join("mvm")).unwrap();
    fs::create_dir(world.root().join("of-root")).unwrap();
    fs::create_dir(world.root().join("of-nobody")).unwrap();
    chown(world.root().join("of-nobody"), Some(NOBODY), Some(NOBODY)).unwrap();
    fs::set_permissions(world.root(), fs::Permissions::from_mode(0o755)).unwrap();
    world
}

/// Runs `doctor` where `/dev` is empty but for `null` and what `make` puts there.
fn doctor_where(world: &World, make: &str, user: &str, args: &[&str]) -> Finished {
    let script = r#"
        set -e
        mkdir -p "$1/dev"
        mount --bind /dev "$1/dev"
        mount -t tmpfs -o mode=755 tmpfs /dev
        touch /dev/null
        mount --bind "$1/dev/null" /dev/null
        eval "$2"
        user=$3
        root=$1
        shift 3
        exec $user "$root/mvm" "$@"
    "#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
    command.arg(world.root()).args([make, user]);
    let root = if user.is_empty() { "of-root" } else { "of-nobody" };
    command.arg("--root").arg(world.root().join(root)).arg("doctor").args(args);
    command.env("MVM_CONFIG", "/dev/null").env_remove("MVM_ENGINE").env_remove("MVM_ROOT");
    run_with(command, b"", SOON)
}

/// What it says of KVM: the JSON, and the lines of the text about it.
#[track_caller]
fn of_kvm(world: &World, make: &str, user: &str) -> (Value, String) {
    let json = doctor_where(world, make, user, &["--json"]).expect_code(0).out();
    let json: Value = serde_json::from_str(&json).unwrap_or_else(|e| panic!("{e}: {json}"));
    assert_eq!(json["usable"], true, "emu runs everything");
    assert_eq!(json["engine"]["linux"]["engine"], "emu");
    assert_eq!(json["engine"]["unikernel"]["fallback"], true);
    let text = doctor_where(world, make, user, &[]).expect_code(0).out();
    assert!(text.contains("ok    engine       emu "), "{text}");
    let mut lines = text.lines().skip_while(|line| !line.starts_with("note  kvm "));
    let about = [lines.next(), lines.next()].map(|line| line.expect("a line").to_owned());
    assert!(about[1].trim_start().starts_with("-> "), "{about:?}");
    // Both forms say the same.
    let said = |key: &str| json["kvm"]["finding"][key].as_str().expect("a text").to_owned();
    assert!(about[0].contains(&said("text")) && about[1].contains(&said("remedy")), "{about:?}");
    (json["kvm"].clone(), about.concat())
}

#[test]
fn a_device_that_is_not_there_is_said_to_be_missing() {
    let (kvm, about) = of_kvm(&world(), "", "");
    assert_eq!((&kvm["verdict"], &kvm["mips"]), (&"unusable".into(), &Value::Null));
    assert_eq!(kvm["facts"]["device"]["errno"], 2);
    assert!(about.contains("/dev/kvm") || about.contains("VT-x"), "{about}");
    if Path::new("/sys/class/misc/kvm").exists() {
        assert_eq!(kvm["finding"]["kind"], "device-hidden");
        assert!(about.contains("--device /dev/kvm"), "{about}");
    }
}

#[test]
fn a_device_that_one_may_not_open_is_shown_with_its_group_and_the_remedy() {
    let (group, gid) = GROUP;
    let make = format!(
        "mknod /dev/kvm c 10 232; chown 0:{gid} /dev/kvm; chmod 660 /dev/kvm; : >/dev/made"
    );
    let user = format!(
        "setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --no-new-privs --bounding-set=-all"
    );
    let world = world();
    if doctor_where(&world, "mknod /dev/probe c 10 232", "", &[]).err().contains("mknod") {
        eprintln!("skipped: no device can be made here");
        return;
    }
    let (kvm, about) = of_kvm(&world, &make, &user);
    assert_eq!(
        (&kvm["verdict"], &kvm["finding"]["kind"]),
        (&"unusable".into(), &"no-permission".into())
    );
    assert_eq!(kvm["facts"]["device"]["errno"], 13);
    assert_eq!(kvm["facts"]["device"]["file"]["group"], group);
    assert_eq!(kvm["facts"]["user"]["uid"], NOBODY);
    assert!(about.contains(&format!("group {group}")), "{about}");
    assert!(about.contains(&format!("usermod -aG {group} ")), "{about}");
}

#[test]
fn a_file_in_its_place_is_not_opened() {
    for make in ["echo x >/dev/kvm", "mkfifo /dev/kvm", "mkdir /dev/kvm"] {
        let (kvm, about) = of_kvm(&world(), make, "");
        assert_eq!(kvm["finding"]["kind"], "not-a-device", "{make}");
        assert!(about.contains("not the device of KVM"), "{about}");
    }
}

#[test]
fn what_was_measured_is_in_the_words() {
    let world = World::new();
    let json = world.mvm(&["doctor", "--json"]).expect_code(0).out();
    let json: Value = serde_json::from_str(&json).unwrap();
    let kvm = &json["kvm"];
    let text = world.mvm(&["doctor"]).expect_code(0).out();
    let line = text.lines().find(|line| line.get(6..10) == Some("kvm ")).expect("a line");
    match kvm["mips"].as_f64() {
        Some(mips) => {
            assert!(mips > 0.0);
            // Measured anew, so that it is another figure.
            let has_figure = line.contains(" MIPS") && line.contains(|c: char| c.is_ascii_digit());
            let is_fast = line.contains("cannot do ");
            assert!(has_figure || is_fast || kvm["verdict"] == "unusable", "{line}");
        }
        None => assert_ne!(kvm["verdict"], "usable", "{line}"),
    }
    let sign = if kvm["verdict"] == "usable" { "ok  " } else { "note" };
    assert!(line.starts_with(sign), "{line}");
}

#[test]
fn a_damaged_measurement_is_made_anew() {
    let world = World::new();
    let verdict = |world: &World| {
        let json = world.mvm(&["doctor", "--json"]).expect_code(0).out();
        let json: Value = serde_json::from_str(&json).unwrap();
        json["kvm"]["verdict"].as_str().expect("a verdict").to_owned()
    };
    let first = verdict(&world);
    let file = world.root().join("run/probe.json");
    let kept = file.exists();
    for bad in [&b"{\"version\":1}"[..], b"\xff\xff", &[b'['; 100_000], b""] {
        fs::write(&file, bad).unwrap();
        assert_eq!(verdict(&world), first);
        if kept {
            assert_ne!(fs::read(&file).unwrap(), bad, "it is replaced");
        }
    }
}

#[test]
fn settings_that_cannot_be_read_are_bad_and_say_where() {
    let world = World::new();
    let config = world.root().join("bad.toml");
    fs::write(&config, "memory = \"1g\"\nengin = \"emu\"\n").unwrap();
    let args = ["--config", config.to_str().unwrap(), "doctor"];
    let text = world.mvm(&args).expect_code(125).out();
    let line = text.lines().find(|line| line.starts_with("BAD   settings ")).expect("a line");
    assert!(line.contains("bad.toml:2") && line.contains("engin"), "{line}");
    assert!(text.contains("-> correct it"), "{text}");
    assert!(text.contains("unknown, since the settings cannot be read"), "{text}");
}
