//! Machines without agent: `mvm run --unikernel KIND --kernel FILE`.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use mvm_tests::{Finished, Running, World, engine, eventually};
use nix::sys::signal::Signal;

fn kernel() -> PathBuf {
    World::small().images().join("hello-unikernel.elf")
}

/// The command that runs our unikernel with `words` on emu, so that nothing is said of the choice.
fn command(flags: &[&str], words: &[&str]) -> Command {
    let kernel = kernel();
    let kernel = kernel.to_str().expect("a UTF-8 path");
    let fixed = ["run", "--engine", engine(), "--unikernel", "rust", "--kernel", kernel];
    World::small().command(&[&fixed[..], flags, words].concat())
}

fn run(flags: &[&str], words: &[&str]) -> Finished {
    mvm_tests::run_with(command(flags, words), b"", Duration::from_secs(120))
}

#[test]
fn output_is_what_it_prints_and_nothing_else() {
    let hello = run(&["--rm"], &["hello", "--word=x"]).expect_code(0);
    assert!(hello.out().starts_with("Hello from a unikernel!\n"), "{}", hello.out());
    assert!(hello.out().contains("hello --word=x"), "{}", hello.out());
    assert_eq!(hello.err(), "");
}

#[test]
fn ends_are_exit_codes() {
    run(&["--rm"], &["hello", "exit=3"]).expect_code(7);
    let halted = run(&["--rm"], &["halt"]).expect_code(134);
    assert!(halted.err().contains("halted all its processors"), "{}", halted.err());
    let crashed = run(&["--rm"], &["fault"]).expect_code(139);
    assert!(crashed.err().contains("triple fault"), "{}", crashed.err());
}

#[test]
fn little_memory_and_more_processors() {
    run(&["--rm", "--memory", "16m"], &["hello"]).expect_code(0);
    let refused = run(&["--rm", "--memory", "1m"], &["hello"]).expect_code(125);
    assert!(refused.err().contains("--memory 1m"), "{}", refused.err());
    let two = run(&["--rm", "--cpus", "2"], &["hello"]).expect_code(0);
    assert!(two.out().contains("processors: 2"), "{}", two.out());
}

#[test]
fn it_is_stopped_at_once_and_logged() {
    let world = World::small();
    let id = run(&["-d", "--name", "bare-stop"], &["spin"]).expect_code(0);
    assert_eq!(id.out().trim().len(), 12);
    eventually("its log", || world.mvm(&["logs", "bare-stop"]).out().starts_with("spin"));
    world.mvm(&["stats", "bare-stop"]).expect_code(0);
    let refused = world.mvm(&["exec", "bare-stop", "true"]).expect_code(125);
    assert!(refused.err().contains("without mvm's agent"), "{}", refused.err());
    world.mvm(&["kill", "-s", "USR1", "bare-stop"]).expect_code(125);
    world.mvm(&["pause", "bare-stop"]).expect_code(0);
    world.mvm(&["unpause", "bare-stop"]).expect_code(0);
    world.mvm(&["stop", "bare-stop"]).expect_code(0);
    assert_eq!(world.mvm(&["wait", "bare-stop"]).out(), "143\n");
    world.mvm(&["rm", "bare-stop"]).expect_code(0);
}

#[test]
fn interrupts_end_it() {
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let mut running = Running::start(command(&["--rm"], &["spin"]));
        running.wait_for("spin");
        running.signal(signal);
        running.finish().expect_code(code);
    }
}

#[test]
fn a_killed_monitor_and_a_killed_front_door() {
    let world = World::small();
    run(&["-d", "--name", "bare-victim"], &["spin"]).expect_code(0);
    world.kill_monitor("bare-victim");
    assert_eq!(world.mvm(&["wait", "bare-victim"]).out(), "137\n");
    world.mvm(&["rm", "bare-victim"]).expect_code(0);

    let mut child = command(&["--name", "bare-orphan"], &["spin"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("its log", || world.mvm(&["logs", "bare-orphan"]).out().starts_with("spin"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(world.mvm(&["ps"]).out().contains("unattended"));
    world.mvm(&["rm", "-f", "bare-orphan"]).expect_code(0);
    assert!(!world.mvm(&["ps", "-a"]).out().contains("bare-orphan"));
}

#[test]
fn what_cannot_be_is_one_line_and_leaves_nothing() {
    let world = World::with_images(&[]);
    let before = world.size();
    let kernel = kernel();
    let kernel = kernel.to_str().expect("a UTF-8 path");
    for (args, want) in [
        (&["-t", "--unikernel", "rust", "--kernel", kernel][..], "--tty cannot hold"),
        (&["--unikernel", "rust", "--kernel", "/etc/passwd"], "not a kernel"),
        (&["--unikernel", "rust", "--kernel", "/no/such"], "/no/such"),
        (&["--unikernel", "hvt", "--kernel", kernel], "hvt"),
        (&["--unikernel", "linux", "--kernel", kernel, "--disk", "/no/disk"], "/no/disk"),
        (&["--unikernel", "rust"], "--kernel"),
        (&["--unikernel", "dos", "--kernel", kernel], "dos"),
    ] {
        let run = world.mvm(&[&["run", "--engine", engine()], args].concat()).expect_code(125);
        assert!(run.err().contains(want), "{args:?}: {}", run.err());
        assert_eq!(run.out(), "");
    }
    assert_eq!(world.mvm(&["ps", "-a", "-q"]).out(), "");
    assert_eq!(world.size(), before);
}

#[test]
fn a_reader_that_goes_away_ends_it() {
    let mut child = command(&["--rm"], &["hello"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(141));
}
