//! Somebody else's system, unmodified: Debian's cloud kernel with an initrd by initramfs-tools and a root
//! file system of Debian's, which know of mvm what ACPI tells them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mvm_tests::{Finished, Running, World, run_with};
use tempfile::TempDir;

/// Longer than a system takes to boot and do something, on a slow and busy machine.
const DEADLINE: Duration = Duration::from_secs(1800);

/// The files of `images/debian-vm`, with a disk of this test's own.
struct Stock {
    kernel: PathBuf,
    initrd: PathBuf,
    disk: PathBuf,
    _place: TempDir,
}

impl Stock {
    fn new() -> Self {
        let images = World::small().images();
        let place = tempfile::Builder::new().prefix("disk-").tempdir_in(images).expect("a place");
        let disk = place.path().join("root.img");
        let made = images.join("debian-vm");
        host("cp", &["--sparse=always", "--reflink=auto"], &[&made.join("root.img"), &disk]);
        let (kernel, initrd) = (made.join("vmlinuz"), made.join("initrd.img"));
        Self { kernel, initrd, disk, _place: place }
    }

    /// Starts it as a user does.
    fn start(&self, flags: &[&str], words: &str) -> System {
        let path = |path: &Path| path.to_str().expect("a UTF-8 path").to_owned();
        let (kernel, initrd, disk) = (path(&self.kernel), path(&self.initrd), path(&self.disk));
        let files = ["--kernel", &kernel, "--initrd", &initrd, "--disk", &disk];
        let words = format!("root=/dev/vda rw {words}");
        let fixed = ["run", "--rm", "-i", "--engine", "emu", "--unikernel", "linux"];
        let args = [&fixed[..], &files, &["--cmdline", &words], flags].concat();
        let running = Running::conversation(World::small().command(&args), DEADLINE);
        System { running, asked: 0 }
    }
}

/// Runs a program of the host's on files.
#[track_caller]
fn host(program: &str, flags: &[&str], files: &[&Path]) -> Finished {
    let mut command = Command::new(program);
    // Where the tools for file systems are is not on every user's path.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).args(flags).args(files);
    run_with(command, b"", DEADLINE).expect_code(0)
}

/// A system that runs, at whose console somebody sits.
struct System {
    running: Running,
    asked: u32,
}

impl System {
    #[track_caller]
    fn log_in(&mut self) {
        self.running.hear("debian login: ");
        self.running.say("root\n");
    }

    /// What the shell answers to `command`.
    #[track_caller]
    fn ask(&mut self, command: &str) -> String {
        self.asked += 1;
        let n = self.asked;
        // What is typed comes back, and may not be taken for the answer.
        self.running.say(&format!("echo be''gin-{n}; {command}; echo en''d-{n}\n"));
        self.running.hear(&format!("begin-{n}\r\n"));
        self.running.hear(&format!("end-{n}\r\n")).replace("\r\n", "\n")
    }

    /// Its last words and exit code, after `command`.
    #[track_caller]
    fn end_by(mut self, command: &str) -> Finished {
        self.running.say(&format!("{command}\n"));
        self.running.finish()
    }
}

/// Spares the kernel the tests of its ciphers, in which most of a boot's instructions are.
const NO_CIPHER_TESTS: &str = "cryptomgr.notests";

/// What a kernel says when something is wrong with its machine.
const COMPLAINTS: &str = "unchecked MSR|Firmware Bug|ACPI (BIOS )?(Error|Warning|Exception)|BUG:|WARNING:|Call Trace|\
                          soft lockup|rcu.*stall|Spurious|nobody cared|I/O error|EXT4-fs (error|warning)";

#[test]
fn it_boots_on_two_processors_to_a_login_finds_its_devices_by_acpi_and_switches_off() {
    let stock = Stock::new();
    let mut system = stock.start(&["--cpus", "2"], NO_CIPHER_TESTS);
    system.log_in();
    assert!(system.ask("uname -r").ends_with("-cloud-amd64\n"));
    assert_eq!(system.ask("nproc"), "2\n");
    assert_eq!(system.ask("tty"), "/dev/ttyS0\n");
    let words = format!("console=ttyS0 panic=-1 quiet root=/dev/vda rw {NO_CIPHER_TESTS}\n");
    assert_eq!(system.ask("cat /proc/cmdline"), words);

    // The names of ACPI's devices are those of what hangs on them.
    let block = system.ask("readlink -f /sys/block/vda");
    assert!(block.contains("/LNRO0005:"), "{block}");
    assert_eq!(system.ask("lsblk -dno NAME,TYPE /dev/vda"), "vda  disk\n");
    let bound = system.ask("ls -d /sys/bus/platform/drivers/virtio-mmio/LNRO0005:*");
    assert_eq!(bound.lines().count(), 3, "disk, entropy and balloon: {bound}");
    let port = system.ask("readlink -f /sys/class/tty/ttyS0/device");
    assert!(port.contains("/pnp0/"), "{port}");
    assert_eq!(system.ask("cat /sys/class/tty/ttyS0/device/id"), "PNP0501\n");
    let lines = system.ask("dmesg");
    for want in ["ACPI: Using ACPI (MADT) for SMP configuration", "ttyS0 at I/O 0x3f8", "[vda]"] {
        assert!(lines.contains(want), "no {want:?} in\n{lines}");
    }
    let complaints = system.ask(&format!("dmesg | grep -E '{COMPLAINTS}'"));
    assert_eq!(complaints, "", "{lines}");

    system.ask("echo written >/root/mark");
    let end = system.end_by("poweroff").expect_code(0);
    assert!(end.out().contains("reboot: Power down"), "{}", end.out());
    assert_eq!(end.err(), "");
    // What it wrote is there, and whole.
    host("e2fsck", &["-fn"], &[&stock.disk]);
    assert_eq!(host("debugfs", &["-R", "cat /root/mark"], &[&stock.disk]).out(), "written\n");
}

#[test]
#[ignore = "one more boot of a whole system, with all that its kernel does on its own"]
fn it_boots_on_one_processor_and_a_restart_ends_the_machine() {
    let stock = Stock::new();
    // The file says by itself how it is entered.
    let mut system = stock.start(&["--boot", "auto"], "");
    system.log_in();
    assert_eq!(system.ask("nproc"), "1\n");
    let end = system.end_by("reboot").expect_code(0);
    assert!(end.out().contains("reboot: Restarting system"), "{}", end.out());
}

#[test]
#[ignore = "one more boot of a kernel with its initrd"]
fn a_panic_ends_the_machine() {
    let stock = Stock::new();
    let mut system = stock.start(&["--cpus", "2"], "init=/bin/sh");
    system.running.hear("# ");
    assert_eq!(system.ask("echo $$"), "1\n");
    let end = system.end_by("exit").expect_code(0);
    assert!(end.out().contains("Attempted to kill init!"), "{}", end.out());
}
