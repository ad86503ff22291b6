//! QEMU's TCG as a peer: the same kernel, the same programs.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mvm_tests::{Finished, run_with};

use crate::cpu;

/// QEMU, if it is installed, with the guest kernel that mvm carries.
#[derive(Debug)]
pub struct Qemu {
    kernel: PathBuf,
    khz: u64,
}

/// A machine for it.
#[derive(Debug)]
pub struct Machine<'a> {
    pub initramfs: &'a Path,
    /// Words for the kernel's command line.
    pub words: String,
    pub vcpus: u32,
    pub mebibytes: u32,
    /// A file that the guest finds as /dev/vda, read-only.
    pub disk: Option<&'a Path>,
}

impl Qemu {
    /// Finds `qemu-system-x86_64` and the kernel beside the test images.
    pub fn find() -> Option<Self> {
        Command::new("qemu-system-x86_64").arg("--version").output().ok()?;
        let kernel = PathBuf::from(env::var_os("MVM_TEST_IMAGES")?).join("vmlinux");
        kernel.exists().then_some(Self { kernel, khz: tsc_khz() })
    }

    /// Its command line. The guest's console is its standard input and output, and it ends when the guest reboots.
    pub fn command(&self, machine: &Machine<'_>) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        // All that TCG can do, AVX2 and AES included, but for what makes programs choose the instruction that it is slowest at: `rep movsb`.
        command
            .args([
                "-M",
                "microvm,accel=tcg,rtc=on,acpi=off",
                "-cpu",
                "max,erms=off,fsrm=off",
                "-nodefaults",
            ])
            .args(["-no-user-config", "-nographic", "-serial", "stdio", "-no-reboot"])
            .args(["-smp", &machine.vcpus.to_string(), "-m", &machine.mebibytes.to_string()])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(machine.initramfs);
        if let Some(disk) = machine.disk {
            let drive = format!("if=none,id=disk,format=raw,readonly=on,file={}", disk.display());
            command.args(["-drive", &drive, "-device", "virtio-blk-device,drive=disk"]);
        }
        // TCG offers no kvmclock. Without these the kernel calibrates against an emulated PIT, which
        // takes long and fails on a busy host, and tells time in jiffies.
        let calibration = format!(
            "tsc_early_khz={} lpj={} no_timer_check tsc=reliable",
            self.khz,
            self.khz * 1000 / 250 / 2 * 2
        );
        let words = &machine.words;
        command.args([
            "-append",
            &format!("console=ttyS0 reboot=t panic=-1 quiet {calibration} {words}"),
        ]);
        command
    }

    /// Boots until the guest reboots. Returns what the console said, and the CPU seconds it took.
    pub fn boot(&self, machine: &Machine<'_>) -> (Finished, f64) {
        let before = cpu::of_children();
        let run = run_with(self.command(machine), b"", Duration::from_secs(600));
        (run, cpu::of_children() - before)
    }

    /// What a program can take for the frequency of the TSC, in Hz.
    pub fn tsc_hz(&self) -> u64 {
        self.khz * 1000
    }
}

/// The host's TSC frequency, as good as /proc/cpuinfo tells it.
fn tsc_khz() -> u64 {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz = info.lines().find(|l| l.starts_with("cpu MHz")).and_then(|l| l.rsplit(' ').next());
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    mhz.and_then(|m| m.parse::<f64>().ok()).map_or(2_000_000, |m| (m * 1000.0) as u64)
}
