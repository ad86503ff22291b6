//! Our own unikernel, as a guest for tests.

use std::path::PathBuf;
use std::process::Command;

use crate::World;
use crate::engine::{TEST_ENGINE, under_test};

/// Its file.
pub fn kernel() -> PathBuf {
    World::small().images().join("hello-unikernel.elf")
}

/// The command that runs it on `engine`.
///
/// # Panics
/// If the path of its file is not UTF-8.
pub fn command(engine: &str, flags: &[&str], words: &[&str]) -> Command {
    let kernel = kernel();
    let kernel = kernel.to_str().expect("a UTF-8 path");
    let fixed = ["run", "--engine", engine, "--unikernel", "rust", "--kernel", kernel];
    World::small().command(&[&fixed[..], flags, words].concat())
}

/// Whether kvm runs it here. Where it does not a line says so.
///
/// # Panics
/// If there is no `mvm`.
pub fn kvm_works() -> bool {
    let output = command("kvm", &["--rm"], &["hello"]).output().expect("mvm");
    if !output.status.success() {
        eprintln!("skipped on kvm: {}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    output.status.success()
}

/// The engines that a test of both is for: the one under test, or emu, and kvm where it runs unikernels.
pub fn engines() -> Vec<&'static str> {
    match under_test() {
        Some(engine) => vec![engine],
        None if kvm_works() => vec!["emu", "kvm"],
        None => {
            eprintln!("{TEST_ENGINE}=kvm makes it an error");
            vec!["emu"]
        }
    }
}
