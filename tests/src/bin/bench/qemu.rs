//! QEMU's TCG as a peer: the same kernel, the same programs.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mvm_tests::{Finished, run_with};

/// QEMU, if it is installed, with the guest kernel that mvm carries.
#[derive(Debug)]
pub struct Qemu {
    kernel: PathBuf,
    calibration: String,
}

impl Qemu {
    /// Finds `qemu-system-x86_64` and the kernel beside the test images.
    pub fn find() -> Option<Self> {
        Command::new("qemu-system-x86_64").arg("--version").output().ok()?;
        let kernel = PathBuf::from(env::var_os("MVM_TEST_IMAGES")?).join("vmlinux");
        // TCG offers no kvmclock. Without these the kernel calibrates against an emulated PIT, which
        // takes long and fails on a busy host.
        let khz = tsc_khz();
        let calibration =
            format!("tsc_early_khz={khz} lpj={} no_timer_check", khz * 1000 / 250 / 2 * 2);
        kernel.exists().then_some(Self { kernel, calibration })
    }

    /// Boots with `initramfs` and the words `extra` on the command line, until the guest reboots. Returns what the
    /// console said, and the CPU seconds it took.
    pub fn boot(&self, initramfs: &Path, extra: &str, vcpus: u32) -> (Finished, f64) {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-M", "microvm,accel=tcg,rtc=on", "-cpu", "qemu64", "-m", "512", "-nodefaults"])
            .args(["-no-user-config", "-nographic", "-serial", "stdio", "-no-reboot", "-smp"])
            .arg(vcpus.to_string())
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(initramfs)
            .arg("-append")
            .arg(format!("console=ttyS0 reboot=t panic=-1 quiet {} {extra}", self.calibration));
        let before = children_cpu();
        let run = run_with(command, b"", Duration::from_secs(600));
        (run, children_cpu() - before)
    }
}

/// CPU seconds of all children waited for.
pub fn children_cpu() -> f64 {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("getrusage cannot fail");
    #[allow(clippy::cast_precision_loss)]
    let seconds =
        (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64;
    seconds / 1e6
}

/// The host's TSC frequency, as good as /proc/cpuinfo tells it.
fn tsc_khz() -> u64 {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz = info.lines().find(|l| l.starts_with("cpu MHz")).and_then(|l| l.rsplit(' ').next());
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    mhz.and_then(|m| m.parse::<f64>().ok()).map_or(2_000_000, |m| (m * 1000.0) as u64)
}
