//! What an engine has for itself when its guest has come up and waits.

use std::fs;
use std::time::Duration;

use mvm_tests::{Running, World, eventually};
use nix::unistd::Pid;
use serde_json::Value;

use crate::ebench::{Ebench, MEBIBYTES};
use crate::qemu::{Machine, Qemu};

/// Longer than a guest takes to come up on a busy host.
const PATIENCE: Duration = Duration::from_secs(300);

/// Bytes of mvm's process besides the guest's memory; wants the busybox image in `world`.
pub fn of_mvm(world: &World) -> Option<u64> {
    let name = "bench-memory";
    let memory = format!("{MEBIBYTES}m");
    let run = ["run", "-d", "--name", name, "--memory", &memory, "busybox", "sh", "-c"];
    world.mvm(&[&run[..], &["echo @ready; sleep 1000"]].concat()).expect_code(0);
    eventually("a guest that is ready", || world.mvm(&["logs", name]).out().contains("@ready"));
    let stats = world.mvm(&["stats", "--format", "json", name]).expect_code(0).out();
    world.mvm(&["rm", "-f", name]).expect_code(0);
    serde_json::from_str::<Value>(&stats).ok()?["host"]["overhead"].as_u64()
}

/// Bytes of QEMU's process besides the guest's memory.
pub fn of_qemu(qemu: &Qemu, ebench: &Ebench<'_>) -> Option<u64> {
    let initramfs = ebench.initramfs();
    let machine = Machine {
        initramfs: &initramfs,
        words: String::new(),
        vcpus: 1,
        mebibytes: MEBIBYTES,
        disk: None,
    };
    let mut running = Running::conversation(qemu.command(&machine), PATIENCE);
    running.wait_for("@ready");
    let bytes = besides(running.pid(), u64::from(MEBIBYTES) << 10);
    running.say("\n");
    running.finish();
    bytes
}

/// What is resident of a process, in bytes, without its mapping of `guest` KiB.
fn besides(pid: Pid, guest: u64) -> Option<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let (mut size, mut sum) = (0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next().and_then(|kib| kib.parse::<u64>().ok())) {
            (Some("Size:"), Some(kib)) => size = kib,
            (Some("Rss:"), Some(kib)) if size != guest => sum += kib << 10,
            _ => {}
        }
    }
    Some(sum)
}
