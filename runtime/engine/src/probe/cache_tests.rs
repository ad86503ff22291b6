use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::super::facts::{Instruction, Loop, Measured};
use super::*;

fn trial(end: RunEnd) -> Trial {
    let integer = Loop { end, instructions: 1000, cpu_ns: 1_000_000 };
    let pxor = Instruction { name: "pxor".into(), end: RunEnd::InternalError { suberror: 1 } };
    Trial::Ran(Measured { integer, instructions: vec![pxor] })
}

/// A directory, a file in place of the device, and a cache.
fn place() -> (tempfile::TempDir, File, Cache) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("device"), "").unwrap();
    let device = File::open(dir.path().join("device")).unwrap();
    let cache = Cache::new(dir.path().join("probe.json"));
    (dir, device, cache)
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_kept_is_read_until_the_device_changes() {
    let (dir, device, cache) = place();
    assert_eq!(cache.read(&device), None);
    cache.keep(&device, &trial(RunEnd::Done));
    assert_eq!(cache.read(&device), Some(trial(RunEnd::Done)));
    assert_eq!(Cache::renewed(&cache.path).read(&device), None);
    assert_eq!(names(dir.path()), ["device", "probe.json"], "nothing else is left");
    assert_eq!(fs::metadata(&cache.path).unwrap().mode() & 0o777, 0o600);

    fs::set_permissions(dir.path().join("device"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(cache.read(&device), None, "its permissions have changed");
    fs::write(dir.path().join("other"), "").unwrap();
    assert_eq!(cache.read(&File::open(dir.path().join("other")).unwrap()), None);
}

#[test]
fn another_boot_or_kernel_or_form_is_not_believed() {
    let (_dir, device, cache) = place();
    cache.keep(&device, &trial(RunEnd::Done));
    let kept: serde_json::Value = serde_json::from_slice(&fs::read(&cache.path).unwrap()).unwrap();
    for (pointer, value) in [
        ("/key/boot_id", serde_json::json!("00000000-0000-0000-0000-000000000000")),
        ("/key/kernel", serde_json::json!("6.1")),
        ("/key/uid", serde_json::json!(4_000_000)),
        ("/version", serde_json::json!(VERSION + 1)),
        ("/trial", serde_json::json!({ "stuck": null })),
        ("/trial/ran/integer/cpu_ns", serde_json::json!(-1)),
        ("/trial/ran/integer", serde_json::json!({ "end": "done", "mips": 1e300 })),
    ] {
        let mut changed = kept.clone();
        *changed.pointer_mut(pointer).unwrap() = value;
        fs::write(&cache.path, changed.to_string()).unwrap();
        assert_eq!(cache.read(&device), None, "{pointer}");
    }
    for text in ["", "{", "null", "[[[[", "\u{0}\u{0}", &" ".repeat(20_000)] {
        fs::write(&cache.path, text).unwrap();
        assert_eq!(cache.read(&device), None);
    }
    // And is replaced.
    cache.keep(&device, &trial(RunEnd::Done));
    assert_eq!(cache.read(&device), Some(trial(RunEnd::Done)));
}

#[test]
fn a_file_that_others_could_have_written_is_not_believed() {
    let (dir, device, cache) = place();
    cache.keep(&device, &trial(RunEnd::Done));
    fs::set_permissions(&cache.path, fs::Permissions::from_mode(0o666)).unwrap();
    assert_eq!(cache.read(&device), None);
    // A link to one of ours.
    fs::set_permissions(&cache.path, fs::Permissions::from_mode(0o600)).unwrap();
    let elsewhere = dir.path().join("elsewhere");
    fs::rename(&cache.path, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &cache.path).unwrap();
    assert_eq!(cache.read(&device), None);
    // Keeping replaces the link, and does not write through it.
    cache.keep(&device, &trial(RunEnd::Shutdown));
    assert_eq!(cache.read(&device), Some(trial(RunEnd::Shutdown)));
    assert!(fs::read_to_string(&elsewhere).unwrap().contains("done"));
    // A pipe, which nobody writes to.
    fs::remove_file(&cache.path).unwrap();
    nix::unistd::mkfifo(&cache.path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(cache.read(&device), None);
}

#[test]
fn what_may_be_different_in_a_moment_is_not_kept() {
    let (dir, device, cache) = place();
    for trial in [
        trial(RunEnd::Overdue),
        trial(RunEnd::Refused { errno: libc::ENOMEM }),
        Trial::Stuck,
        Trial::NoVm { errno: libc::EBUSY },
        Trial::Failed { step: "x".into(), errno: 0 },
    ] {
        cache.keep(&device, &trial);
    }
    assert_eq!(names(dir.path()), ["device"]);
}

#[test]
fn no_place_is_no_error() {
    let (dir, device, _) = place();
    let cache = Cache::new(dir.path().join("no/such/dir/probe.json"));
    cache.keep(&device, &trial(RunEnd::Done));
    assert_eq!(cache.read(&device), None);
}
