//! `mvm install` and what it does to containerd's configuration, with containerd's own judgement.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mvm_tests::{Finished, World, run_with};

const CONFIG: &str = "# kept\nversion = 2\n\n[debug]\n  level = \"warn\" # and this\n";

fn install(world: &World, config: &Path, more: &[&str]) -> Finished {
    let prefix = world.root().join("usr");
    let mut args = vec!["install", "--prefix", prefix.to_str().unwrap(), "--containerd"];
    args.extend(["--containerd-config", config.to_str().unwrap()]);
    args.extend(more);
    world.mvm(&args)
}

#[test]
fn it_can_be_done_twice_and_undone() {
    let world = World::new();
    let config = world.root().join("config.toml");
    fs::write(&config, CONFIG).unwrap();
    install(&world, &config, &[]).expect_code(0);
    let again = install(&world, &config, &[]).expect_code(0);
    assert!(again.out().contains("is as it should be"), "{}", again.out());

    let shim = world.root().join("usr/bin/containerd-shim-mvm-v1");
    let mut command = Command::new(&shim);
    command.arg("-v");
    run_with(command, b"", Duration::from_secs(60)).expect_code(0);
    let mut command = Command::new("containerd");
    command.arg("--config").arg(&config).args(["config", "dump"]);
    let dumped = run_with(command, b"", Duration::from_secs(60)).expect_code(0).out();
    assert!(dumped.contains("io.containerd.mvm.v1"), "{dumped}");
    let changed = fs::read_to_string(&config).unwrap();
    assert!(changed.starts_with(CONFIG), "{changed}");

    install(&world, &config, &["--undo"]).expect_code(0);
    assert_eq!(fs::read_to_string(&config).unwrap(), CONFIG);
    let left: Vec<_> = fs::read_dir(world.root().join("usr/bin")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!world.root().join("config.toml.before-mvm").exists());
    install(&world, &config, &["--undo"]).expect_code(0);
}

#[test]
fn where_nothing_was_nothing_stays() {
    let world = World::new();
    let config = world.root().join("etc/containerd/config.toml");
    install(&world, &config, &[]).expect_code(0);
    assert!(config.exists());
    install(&world, &config, &["--undo"]).expect_code(0);
    assert!(!config.exists());
}

#[test]
fn what_containerd_does_not_accept_is_not_written() {
    let world = World::new();
    let config = world.root().join("config.toml");
    // TOML, and nothing that containerd could read.
    let wrong = "version = 2\noom_score = \"high\"\n";
    for text in [wrong, "version = 2\n[plugins", "root = \"/data\"\n"] {
        fs::write(&config, text).unwrap();
        let failed = install(&world, &config, &[]).expect_code(125);
        assert!(failed.err().contains("config.toml"), "{}", failed.err());
        assert_eq!(failed.err().lines().count(), 1, "{}", failed.err());
        assert_eq!(fs::read_to_string(&config).unwrap(), text);
    }
}

#[test]
fn the_installer_of_the_cluster_restarts_containerd_once() {
    let world = World::new();
    // In a mount namespace of its own, where the places that it writes to are others.
    let setup = "cp -a /etc \"$0/etc\" && rm -rf \"$0/etc/containerd\" && mkdir \"$0/local\" && \
                 mount --bind \"$0/etc\" /etc && mount --bind \"$0/local\" /usr/local && \
                 \"$1\" / && echo again && \"$1\" / && ls -A /usr/local/bin";
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/installer/install.sh");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", setup]).arg(world.root()).arg(script);
    command.env("MVM", std::env::var_os("MVM").expect("MVM")).env("RESTART", "echo RESTART");
    command.env("MVM_ROOT", world.root().join("state"));
    let run = run_with(command, b"", Duration::from_secs(120));
    if run.code != 0 && run.err().contains("unshare failed") {
        eprintln!("\n*** SKIPPED: no mount namespace is to be had here: {} ***\n", run.err());
        return;
    }
    let out = run.expect_code(0).out();
    let (first, second) = out.split_once("again\n").expect("two runs");
    assert!(first.contains("RESTART") && !second.contains("RESTART"), "{out}");
    assert!(second.ends_with("containerd-shim-mvm-v1\nmvm\n"), "{out}");
    assert!(world.root().join("etc/containerd/config.toml").exists());
}
