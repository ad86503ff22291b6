//! Which engine runs a container, and who says so. What the host can do is asked of `mvm doctor`, so
//! that the tests hold on every host.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mvm_tests::{Finished, World, run_with};
use serde_json::Value;

/// For commands that end before anything is started: far more than a busy host needs.
const SOON: Duration = Duration::from_secs(30);

fn world() -> &'static World {
    World::small()
}

#[track_caller]
fn json(run: &Finished) -> Value {
    serde_json::from_str(&run.out()).unwrap_or_else(|e| panic!("{e}: {}", run.out()))
}

/// What `mvm doctor` says of the host.
#[track_caller]
fn doctor(world: &World) -> Value {
    json(&world.mvm(&["doctor", "--json"]).expect_code(0))
}

/// What stands in the way of kvm for a Linux guest, if anything, without the figure that was
/// measured: `doctor` measures anew, and no two measurements are the same.
fn obstacle() -> Option<String> {
    let doctor = doctor(world());
    let text = doctor["kvm"]["finding"]["text"].as_str().expect("a finding");
    let text = text.split(" at ").next().unwrap_or(text).to_owned();
    (doctor["kvm"]["verdict"] != "usable").then_some(text)
}

#[track_caller]
fn leaves_nothing(world: &World) {
    assert_eq!(world.mvm(&["ps", "-aq"]).expect_code(0).out(), "");
    let sandboxes = fs::read_dir(world.root().join("run/sandboxes")).expect("a directory");
    assert_eq!(sandboxes.count(), 0);
}

/// Runs a command that is refused with one line.
#[track_caller]
fn refused(world: &World, args: &[&str]) -> String {
    let run = run_with(world.command(args), b"", SOON).expect_code(125);
    assert_eq!((run.out().as_str(), run.err().lines().count()), ("", 1), "{}", run.err());
    leaves_nothing(world);
    run.err()
}

#[test]
fn a_fallback_is_one_line_and_a_field_and_a_metric() {
    let world = world();
    let outlook = doctor(world)["engine"]["linux"].clone();
    let fallback = outlook["fallback"].as_bool().unwrap();
    let run = world.mvm(&["run", "--rm", "busybox", "echo", "hi"]).expect_code(0);
    assert_eq!(run.out(), "hi\n");
    assert_eq!(run.err().lines().count(), usize::from(fallback), "{}", run.err());

    world.mvm(&["run", "-d", "--name", "choice", "busybox", "sleep", "1000"]).expect_code(0);
    let engine = world.inspect("choice")["engine"].clone();
    assert_eq!(engine["name"], outlook["engine"]);
    assert_eq!(engine["fallback"], fallback);
    let reason = engine["reason"].as_str().unwrap();
    assert!(!reason.is_empty());
    if let Some(obstacle) = obstacle() {
        assert!(reason.starts_with(&obstacle), "{reason}: {obstacle}");
        assert_eq!(
            run.err(),
            format!("mvm: {reason}: running on emu (slower; see `mvm doctor`)\n")
        );
    }
    let stats = json(&world.mvm(&["stats", "--format", "json", "choice"]).expect_code(0));
    assert_eq!(stats["engine"]["fallback"], u64::from(fallback));
    let ps = json(&world.mvm(&["ps", "--format", "json"]).expect_code(0));
    assert_eq!(ps["engine"], engine);
    let table = world.mvm(&["ps"]).expect_code(0).out();
    assert_eq!(table.contains("(fallback)"), fallback, "{table}");
    world.mvm(&["rm", "-f", "choice"]).expect_code(0);
}

#[test]
fn emulation_that_was_chosen_is_silent() {
    let world = world();
    let run = ["run", "--rm", "busybox", "true"];
    let flag = world.mvm(&["run", "--rm", "--engine", "emu", "busybox", "true"]).expect_code(0);
    assert_eq!(flag.err(), "");
    let mut command = world.command(&run);
    command.env("MVM_ENGINE", "emu");
    assert_eq!(run_with(command, b"", Duration::from_secs(120)).expect_code(0).err(), "");
    let config = written(world, "emu.toml", "engine = \"emu\"\n");
    let mut args = vec!["--config", &config];
    args.extend(run);
    assert_eq!(world.mvm(&args).expect_code(0).err(), "");
    world.mvm(&["--config", &config, "run", "-d", "--name", "emu", "busybox", "sleep", "99"]);
    let engine = world.inspect("emu")["engine"].clone();
    assert_eq!((engine["name"].as_str(), engine["fallback"].as_bool()), (Some("emu"), Some(false)));
    world.mvm(&["rm", "-f", "emu"]).expect_code(0);
}

#[test]
fn kvm_runs_linux_or_says_at_once_why_not() {
    let world = world();
    let args = ["run", "--rm", "--engine", "kvm", "busybox", "echo", "hi"];
    match obstacle() {
        Some(obstacle) => {
            let error = refused(world, &args);
            assert!(error.contains(&obstacle) && error.contains("--engine emu"), "{error}");
        }
        None => assert_eq!(world.mvm(&args).expect_code(0).out(), "hi\n"),
    }
    // In the background the same, before there is a container.
    if obstacle().is_some() {
        refused(world, &["run", "-d", "--engine", "kvm", "busybox", "true"]);
    }
}

#[test]
fn force_goes_as_far_as_the_host_lets_it() {
    let world = world();
    let error = refused(world, &["run", "--force", "busybox", "true"]);
    assert!(error.contains("--engine kvm"), "{error}");
    let args =
        ["run", "--rm", "--engine", "kvm", "--force", "--boot-timeout", "30", "busybox", "true"];
    match doctor(world)["kvm"]["verdict"].as_str() {
        Some("usable") => assert_eq!(world.mvm(&args).expect_code(0).err(), ""),
        Some("interpreted") => {
            let run = world.mvm(&args).expect_code(125);
            assert!(run.err().contains("could not be started"), "{}", run.err());
        }
        _ => assert_eq!(world.mvm(&args).code, 125),
    }
    leaves_nothing(world);
}

#[test]
fn required_hardware_is_used_or_missed_by_name() {
    let world = world();
    let config = written(world, "hard.toml", "# policy\nrequire-hardware = true\n");
    let by_flag = ["run", "--rm", "--require-hardware", "busybox", "true"];
    let by_file = ["--config", &config, "run", "--rm", "busybox", "true"];
    match obstacle() {
        Some(obstacle) => {
            let error = refused(world, &by_flag);
            assert!(error.contains("--require-hardware") && error.contains(&obstacle), "{error}");
            let error = refused(world, &by_file);
            assert!(error.contains("hard.toml:2") && error.contains(&obstacle), "{error}");
            // The flag goes before the file.
            let off =
                ["--config", &config, "run", "--rm", "--require-hardware=false", "busybox", "true"];
            world.mvm(&off).expect_code(0);
            // Nothing runs by these settings, which doctor says too.
            let doctor = world.mvm(&["--config", &config, "doctor"]).expect_code(125).out();
            assert!(doctor.contains("hard.toml:2"), "{doctor}");
        }
        None => {
            world.mvm(&by_flag).expect_code(0);
            world.mvm(&by_file).expect_code(0);
        }
    }
    let error = refused(world, &["--config", &config, "run", "--engine=emu", "busybox", "true"]);
    assert!(error.contains("hard.toml:2") && error.contains("emu"), "{error}");
}

/// A settings file in the world's root.
fn written(world: &World, name: &str, text: &str) -> String {
    let path = world.root().join(name);
    fs::write(&path, text).expect("a file");
    path.to_str().expect("UTF-8").to_owned()
}

/// What `doctor --json` says of a setting: value and origin.
fn setting(doctor: &Value, key: &str) -> (Value, String) {
    let setting = &doctor["config"]["values"][key];
    (setting["value"].clone(), setting["origin"].as_str().expect("an origin").to_owned())
}

#[test]
fn settings_come_from_files_and_flags_go_before_them() {
    let world = world();
    // The user's file, where XDG has it.
    let home = world.root().join("xdg");
    fs::create_dir_all(home.join("mvm")).unwrap();
    let user = home.join("mvm/mvm.toml");
    fs::write(&user, "engine = \"emu\"\nmemory = \"80m\"\ncpus = 2\n").unwrap();
    let with_user = |args: &[&str]| {
        let mut command = world.command(args);
        command.env_remove("MVM_CONFIG").env("XDG_CONFIG_HOME", &home);
        run_with(command, b"", Duration::from_secs(120))
    };
    let script = "nproc; grep MemTotal /proc/meminfo | tr -dc 0-9";
    let by_file = with_user(&["run", "--rm", "busybox", "sh", "-c", script]).expect_code(0);
    let by_flag =
        with_user(&["run", "--rm", "--memory=160m", "--cpus=1", "busybox", "sh", "-c", script]);
    let figures = |run: &Finished| {
        let out = run.out();
        let mut lines = out.lines().map(|line| line.parse::<u64>().expect("a number"));
        (lines.next().unwrap(), lines.next().unwrap() / 1024)
    };
    let (cpus, memory) = figures(&by_file);
    assert!(cpus == 2 && memory < 80, "{cpus} {memory}");
    let (cpus, memory) = figures(&by_flag);
    assert!(cpus == 1 && (80..160).contains(&memory), "{cpus} {memory}");
    let doctor = json(&with_user(&["doctor", "--json"]).expect_code(0));
    let user = user.to_str().unwrap();
    assert_eq!(setting(&doctor, "memory"), ("80m".into(), format!("{user}:2")));
    assert_eq!(setting(&doctor, "cpus"), ("2".into(), format!("{user}:3")));
    assert_eq!(setting(&doctor, "stop-timeout"), (10.into(), "default".into()));
    let files = doctor["config"]["files"].as_array().unwrap();
    assert_eq!((&files[0]["path"], &files[0]["read"]), (&user.into(), &true.into()));
    assert_eq!(files[1]["path"], "/etc/mvm/mvm.toml");

    // A given file replaces them; the environment's engine goes before it.
    let given = written(world, "given.toml", "engine = \"kvm\"\nmemory = 104857600\n");
    let mut command = world.command(&["--config", &given, "doctor", "--json"]);
    command.env("XDG_CONFIG_HOME", &home).env("MVM_ENGINE", "emu");
    let doctor = json(&run_with(command, b"", SOON).expect_code(0));
    assert_eq!(setting(&doctor, "memory"), ("104857600".into(), format!("{given}:2")));
    assert_eq!(setting(&doctor, "engine"), ("emu".into(), "MVM_ENGINE".into()));
    assert_eq!(setting(&doctor, "cpus").1, "default");
    assert_eq!(doctor["config"]["files"].as_array().unwrap().len(), 1);
}

#[test]
fn bad_settings_are_one_line_with_file_and_line() {
    let world = world();
    for (text, place, words) in [
        ("\nengin = \"emu\"\n", ":2: ", &["`engin`", "`engine`"][..]),
        ("memory = \"lots\"\n", ":1: ", &["memory", "lots"]),
        ("memory = \"8m\"\n", ":1", &["memory", "at least"]),
        ("engine = emu\n", ":1: ", &[]),
        ("require-hardware = 1\n", ":1: ", &["boolean"]),
    ] {
        let config = written(world, "bad.toml", text);
        let error = refused(world, &["--config", &config, "run", "busybox", "true"]);
        assert!(error.contains(&format!("bad.toml{place}")), "{error}");
        for word in words {
            assert!(error.contains(word), "no {word:?} in {error}");
        }
    }
    let config = written(world, "bad.toml", "nonsense = 1\n");
    let doctor = world.mvm(&["--config", &config, "doctor", "--json"]).expect_code(125);
    let error = json(&doctor)["config"]["error"].as_str().unwrap().to_owned();
    assert!(error.contains("bad.toml:1"), "{error}");
    // What needs no settings goes on.
    world.mvm(&["--config", &config, "ps"]).expect_code(0);
    let missing = world.root().join("missing.toml");
    let error = refused(world, &["--config", missing.to_str().unwrap(), "run", "busybox", "true"]);
    assert!(error.contains("missing.toml"), "{error}");
    // Nobody writes to it.
    let pipe = world.root().join("pipe.toml");
    let _ = fs::remove_file(&pipe);
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = refused(world, &["--config", pipe.to_str().unwrap(), "run", "busybox", "true"]);
    assert!(error.contains("pipe.toml"), "{error}");
}

#[test]
fn doctor_answers_by_stable_keys() {
    let doctor = doctor(world());
    let kvm = &doctor["kvm"];
    assert!(["usable", "interpreted", "unusable"].iter().any(|v| kvm["verdict"] == *v), "{kvm}");
    for pointer in ["/finding/kind", "/finding/text", "/finding/detail", "/finding/remedy"] {
        assert!(kvm.pointer(pointer).is_some_and(Value::is_string), "{pointer} in {kvm}");
    }
    for pointer in ["/facts/host", "/facts/user", "/facts/device/path"] {
        assert!(kvm.pointer(pointer).is_some(), "{pointer} in {kvm}");
    }
    assert_eq!(kvm["verdict"] == "usable", kvm["finding"]["kind"] == "works");
    // No figure without a device.
    assert!(kvm["mips"].is_null() || kvm["facts"]["device"]["errno"].is_null());
    if kvm["verdict"] == "interpreted" {
        let text = kvm["finding"]["text"].as_str().unwrap();
        assert!(text.contains("MIPS") || text.contains("cannot"), "{text}");
    }
    assert_eq!(doctor["kvm_engine"]["verified_on_hardware"], false);
    for guest in ["linux", "unikernel"] {
        let outlook = &doctor["engine"][guest];
        assert!(outlook["fallback"].is_boolean() && outlook["error"].is_null(), "{outlook}");
        let fallback = outlook["engine"] == "emu";
        assert_eq!(outlook["fallback"], fallback, "auto takes kvm wherever it can");
    }
    assert!(doctor["usable"].as_bool().unwrap() && doctor["checks"].is_array());
    let text = world().mvm(&["doctor"]).expect_code(0).out();
    assert!(text.contains("not yet verified on hardware"), "{text}");
}

#[test]
fn the_tests_on_kvm_begin_where_doctor_finds_hardware_only() {
    let world = world();
    let doctor = doctor(world);
    let begin = |report: &Value| {
        let file = written(world, "doctor.json", &report.to_string());
        let mut check = Command::new(env!("CARGO_BIN_EXE_kvm-host"));
        check.arg(file);
        run_with(check, b"", SOON)
    };
    let usable = doctor["kvm"]["verdict"] == "usable";
    let text = doctor["kvm"]["finding"]["text"].as_str().unwrap();
    let here = begin(&doctor).expect_code(if usable { 0 } else { 1 });
    assert!(if usable { here.out() } else { here.err() }.contains(text), "{here:?}");
    let finding = serde_json::json!({
        "kind": "no-device", "text": "no device", "detail": "no such file", "remedy": "make one"
    });
    let report = |verdict| serde_json::json!({"kvm": {"verdict": verdict, "finding": finding}});
    let refused = begin(&report("unusable")).expect_code(1).err();
    for word in ["no-device", "no device", "no such file", "make one"] {
        assert!(refused.contains(word), "no {word:?} in {refused}");
    }
    begin(&report("usable")).expect_code(0);
    begin(&"nonsense".into()).expect_code(1);
}

#[test]
fn the_measurement_is_kept_privately_and_not_believed_from_others() {
    let world = World::with_images(&["busybox"]);
    let run = || world.mvm(&["run", "--rm", "busybox", "true"]).expect_code(0).err();
    let first = run();
    let file = world.root().join("run/probe.json");
    if !file.exists() {
        // There is no device to be measured, or no lasting answer.
        assert_ne!(doctor(&world)["kvm"]["verdict"], "usable");
        return;
    }
    assert_eq!(mode(&file), 0o600);
    let kept = fs::read(&file).unwrap();
    assert_eq!(run(), first, "the same figure, out of the file");
    assert_eq!(fs::read(&file).unwrap(), kept);

    for bad in [&b"{\"version\":1}"[..], b"\xff\xff", &[b' '; 100_000], b""] {
        fs::write(&file, bad).unwrap();
        run();
        assert_ne!(fs::read(&file).unwrap(), bad, "it is replaced");
    }
    // Through a link nothing is read or written.
    let victim = world.root().join("victim");
    fs::write(&victim, "precious").unwrap();
    fs::remove_file(&file).unwrap();
    symlink(&victim, &file).unwrap();
    run();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    assert!(file.symlink_metadata().unwrap().is_file());
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}
