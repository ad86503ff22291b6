//! `mvm pull` and `mvm run` against a real registry.

use std::fs;
use std::time::Duration;

use mvm_tests::registry::{Demands, Registry};
use mvm_tests::{World, run_with};

const PATIENCE: Duration = Duration::from_secs(300);

fn registry(world: &World, demands: Demands) -> Registry {
    Registry::start(&world.image_file("busybox"), "team/app", "v1", demands)
}

#[test]
fn an_image_is_pulled_and_run() {
    let world = World::new();
    let registry = registry(&world, Demands::default());
    let name = format!("{}/team/app:v1", registry.host());
    assert_eq!(world.mvm(&["pull", &name]).expect_code(0).out(), format!("{name}\n"));
    let listed = world.mvm(&["image", "ls"]).expect_code(0).out();
    assert!(listed.contains(&format!("{}/team/app:v1", registry.host())), "{listed}");
    let said = world.mvm(&["run", "--rm", "--pull", "never", &name, "echo", "pulled"]);
    assert_eq!(said.expect_code(0).out(), "pulled\n");
}

#[test]
fn run_pulls_what_is_missing() {
    let world = World::new();
    let registry = registry(&world, Demands::default());
    let name = format!("{}/team/app:v1", registry.host());
    let never = world.mvm(&["run", "--rm", "--pull", "never", &name, "true"]).expect_code(125);
    assert!(never.err().contains("mvm pull"), "{}", never.err());
    let said = world.mvm(&["run", "--rm", &name, "echo", "pulled"]).expect_code(0);
    assert_eq!(said.out(), "pulled\n");
    drop(registry);
    // It is here now, and nobody need be asked; unless that is wished.
    world.mvm(&["run", "--rm", &name, "true"]).expect_code(0);
    let always = world.mvm(&["run", "--rm", "--pull", "always", &name, "true"]).expect_code(125);
    assert!(always.err().contains("cannot be reached"), "{}", always.err());
}

#[test]
fn what_is_not_there_is_one_line_and_no_trace() {
    let world = World::new();
    let registry = registry(&world, Demands::default());
    let name = format!("{}/team/other:v1", registry.host());
    let failed = world.mvm(&["pull", &name]).expect_code(125);
    assert!(failed.err().contains("has no image"), "{}", failed.err());
    assert_eq!(failed.err().lines().count(), 1, "{}", failed.err());
    assert_eq!(world.mvm(&["image", "ls", "-q"]).expect_code(0).out(), "");
    // The other one comes all the same.
    let there = format!("{}/team/app:v1", registry.host());
    let both = world.mvm(&["pull", &name, &there]).expect_code(125);
    assert_eq!(both.out(), format!("{there}\n"));
}

#[test]
fn logins_are_those_of_docker() {
    let world = World::new();
    let registry = registry(&world, Demands { login: true, tls: false });
    let name = format!("{}/team/app:v1", registry.host());
    let pull = |config: &str| {
        let dir = world.root().join("docker");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("config.json"), config).unwrap();
        let mut command = world.command(&["pull", &name]);
        command.env("DOCKER_CONFIG", dir);
        run_with(command, b"", PATIENCE)
    };
    let anonymous = pull("{}").expect_code(125);
    assert!(anonymous.err().contains("docker login"), "{}", anonymous.err());
    // In base 64: user:wrong and user:secret.
    let config =
        |auth: &str| format!(r#"{{"auths": {{"{}": {{"auth": "{auth}"}}}}}}"#, registry.host());
    pull(&config("dXNlcjp3cm9uZw==")).expect_code(125);
    assert_eq!(world.mvm(&["image", "ls", "-q"]).expect_code(0).out(), "");
    pull(&config("dXNlcjpzZWNyZXQ=")).expect_code(0);
}

#[test]
fn certificates_are_checked() {
    let world = World::new();
    let registry = registry(&world, Demands { login: false, tls: true });
    let name = format!("{}/team/app:v1", registry.host());
    let unknown = world.mvm(&["pull", &name]).expect_code(125);
    assert!(unknown.err().contains("SSL_CERT_FILE"), "{}", unknown.err());
    let mut command = world.command(&["pull", &name]);
    command.env("SSL_CERT_FILE", registry.certificate());
    run_with(command, b"", PATIENCE).expect_code(0);
}
