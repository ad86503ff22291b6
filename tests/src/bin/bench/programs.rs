//! Real programs of Debian: on the host's processor in a chroot, in mvm, and in QEMU from the same image, one vCPU each.
//!
//! What counts is the CPU time of all that it took, seen from outside: of the processes natively, of the whole machine with its
//! devices for the guests. So neither a busy host nor a guest's idea of time matters. Each is a shell script in
//! `bench/programs`, which says where the measured part begins and ends (`prelude.sh`). What it prints must be the same everywhere.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mvm_tests::{Chroot, Running, World};
use nix::unistd::geteuid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::ebench::on_processors;
use crate::qemu::{Machine, Qemu};
use crate::stats::{geomean, median, times};
use crate::{cpu, initramfs};

const IMAGE: &str = "debian-full";
/// Its name in the store.
const REFERENCE: &str = "debian:full";
/// Memory of the guests.
const MEBIBYTES: u32 = 2048;
/// How long one may take, on a busy host.
const PATIENCE: Duration = Duration::from_secs(900);
/// Times of TCG's in those of mvm that are aimed at, in the geometric mean.
const GOAL: f64 = 3.0;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/programs")
}

fn script_of(name: &str) -> String {
    fs::read_to_string(directory().join(name).with_extension("sh")).expect("a script")
}

/// The names of all programs.
pub fn names() -> Vec<String> {
    let entries = fs::read_dir(directory()).into_iter().flatten().flatten();
    let names = entries.filter_map(|e| Some(e.path().file_stem()?.to_str()?.to_owned()));
    let mut names: Vec<String> = names.filter(|name| name != "prelude").collect();
    names.sort();
    names
}

/// A program's end.
#[derive(Debug)]
struct Outcome {
    /// CPU seconds for each time that the work was done.
    seconds: f64,
    /// What it printed.
    printed: String,
}

/// Whatever runs programs.
struct Peers<'a> {
    world: World,
    chroot: Chroot,
    qemu: Option<(&'a Qemu, TempDir, PathBuf)>,
}

impl<'a> Peers<'a> {
    fn new(qemu: Option<&'a Qemu>) -> Self {
        let world = World::with_images(&[IMAGE]);
        let chroot = Chroot::new(&world.image_file(IMAGE));
        let qemu = qemu.map(|qemu| {
            let dir = tempfile::tempdir().expect("a temporary directory");
            (qemu, dir, rootfs(&world))
        });
        Self { world, chroot, qemu }
    }

    fn natively(&self, script: &str) -> Result<Outcome, String> {
        let mut command = on_processors(1);
        // Its servers listen where nobody else does.
        command.args(["unshare", "--net", "sh", "-c", r#"ip link set lo up && exec "$@""#, "sh"]);
        let inside = self.chroot.command(script);
        command.arg(inside.get_program()).args(inside.get_args());
        converse(command)
    }

    fn in_mvm(&self, script: &str) -> Result<Outcome, String> {
        let memory = format!("{MEBIBYTES}m");
        let run = ["run", "--rm", "-i", "--memory", &memory, REFERENCE, "sh", "-c", script];
        converse(self.world.command(&run))
    }

    fn in_qemu(&self, script: &str) -> Option<Result<Outcome, String>> {
        let (qemu, dir, disk) = self.qemu.as_ref()?;
        let tree = dir.path().join("tree");
        for mountpoint in ["image", "writable", "root"] {
            fs::create_dir_all(tree.join(mountpoint)).expect("a directory");
        }
        fs::write(tree.join("script"), script).expect("a file");
        let initramfs = dir.path().join("initramfs.cpio");
        initramfs::pack(&tree, INIT, &initramfs);
        let machine = Machine {
            initramfs: &initramfs,
            words: String::new(),
            vcpus: 1,
            mebibytes: MEBIBYTES,
            disk: Some(disk),
        };
        Some(converse(qemu.command(&machine)))
    }
}

/// Mounts the image under an overlay as mvm's agent does, and runs the script in it.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t erofs -o ro /dev/vda /image
$b mount -t tmpfs tmpfs /writable && $b mkdir /writable/upper /writable/work
$b mount -t overlay -o lowerdir=/image,upperdir=/writable/upper,workdir=/writable/work overlay /root
$b mount -t proc proc /root/proc
$b mount -t devtmpfs dev /root/dev
$b mkdir -p /root/dev/shm && $b mount -t tmpfs tmpfs /root/dev/shm
$b mount -t tmpfs -o mode=1777 tmpfs /root/tmp
$b ip link set lo up
$b stty -echo -onlcr
$b chroot /root /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin sh -c "$($b cat /script)"
$b reboot -f
"#;

/// The file system that mvm made of the image.
fn rootfs(world: &World) -> PathBuf {
    let dir = world.root().join("data/images/rootfs");
    let files = fs::read_dir(&dir).into_iter().flatten().flatten().map(|e| e.path());
    let mut images = files.filter(|path| path.extension().is_some_and(|e| e == "erofs"));
    images.next().unwrap_or_else(|| panic!("no file system of the image in {}", dir.display()))
}

/// Runs a script by `command`, and answers it where it begins and ends.
fn converse(command: Command) -> Result<Outcome, String> {
    let mut running = Running::conversation(command, PATIENCE);
    let (mut begin, mut seconds, mut code) = (None, None, None);
    let mut printed = String::new();
    while let Some(line) = running.line() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("@begin") => begin = Some(cpu::of_tree(running.pid())),
            Some("@finish") => {
                let work = words.next().and_then(|count| count.parse::<f64>().ok());
                let took = begin.map(|begin| cpu::of_tree(running.pid()) - begin);
                seconds = took.zip(work).map(|(took, work)| took / work);
            }
            Some("@end") => {
                code = words.next().map(str::to_owned);
                continue;
            }
            // Afterwards QEMU's guest has its own last words.
            _ if code.is_some() => continue,
            _ => {
                printed += line.trim_end();
                printed.push('\n');
                continue;
            }
        }
        running.say("go on\n");
    }
    let errors = running.finish().err();
    match (code.as_deref(), seconds) {
        (Some("0"), Some(seconds)) => Ok(Outcome { seconds, printed }),
        (Some("0"), None) => Err("did not say how much it did".into()),
        (Some(code), _) => Err(format!("ended with {code}: {}", printed.trim())),
        (None, _) => Err(format!("did not come to its end: {} {}", printed.trim(), errors.trim())),
    }
}

/// Runs `programs`, `rounds` times each, prints the table, returns the figures.
#[allow(clippy::print_stdout)]
pub fn measure(qemu: Option<&Qemu>, programs: &[String], rounds: usize) -> Value {
    if !geteuid().is_root() {
        println!("Programs are left out: a chroot to compare with wants root.\n");
        return Value::Null;
    }
    let peers = Peers::new(qemu);
    println!(
        "| program, CPU time | native | mvm emu | QEMU TCG | TCG / emu | |\n|---|---:|---:|---:|---:|---|"
    );
    let mut rows = serde_json::Map::new();
    let (mut all_mvm, mut all_tcg, mut gains) = (Vec::new(), Vec::new(), Vec::new());
    for name in programs {
        let row = Row::measure(&peers, name, rounds);
        let (mvm, tcg) = (row.ratio(&row.mvm), row.ratio(&row.tcg));
        all_mvm.extend(mvm);
        all_tcg.extend(tcg);
        let gain = mvm.zip(tcg).map(|(mvm, tcg)| tcg / mvm);
        gains.extend(gain);
        let verdict = match (&row.fault, gain) {
            (Some(fault), _) => fault,
            (None, Some(gain)) if gain < 1.0 => "**slower than TCG**",
            _ => "",
        };
        println!(
            "| {name} | {} | {} | {} | {} | {verdict} |",
            time(median(&row.native)),
            times(mvm),
            times(tcg),
            times(gain)
        );
        let figures = json!({ "native_s": row.native, "mvm_s": row.mvm, "tcg_s": row.tcg, "mvm": mvm, "tcg": tcg, "fault": row.fault });
        rows.insert(name.clone(), figures);
    }
    let mean = |all: &[f64]| (!all.is_empty()).then(|| geomean(all));
    let verdict = mean(&gains).map_or("", |g| if g >= GOAL { "met" } else { "**missed**" });
    println!(
        "| **geomean** (goal: TCG takes {GOAL}x as long, and none is slower) | | {} | {} | {} | {verdict} |\n",
        times(mean(&all_mvm)),
        times(mean(&all_tcg)),
        times(mean(&gains))
    );
    Value::Object(rows)
}

/// Seconds; what is counted by blocks takes microseconds each.
fn time(seconds: f64) -> String {
    if seconds < 1e-3 { format!("{:.1} us", seconds * 1e6) } else { format!("{seconds:.2} s") }
}

/// CPU seconds of a program, and what is wrong with it.
#[derive(Debug, Default)]
struct Row {
    native: Vec<f64>,
    mvm: Vec<f64>,
    tcg: Vec<f64>,
    fault: Option<String>,
}

impl Row {
    fn measure(peers: &Peers<'_>, name: &str, rounds: usize) -> Self {
        let script = script_of("prelude") + &script_of(name);
        let mut row = Self::default();
        for _ in 0..rounds {
            let native = match peers.natively(&script) {
                Ok(native) => native,
                Err(why) => {
                    row.fault = Some(format!("natively: {why}"));
                    return row;
                }
            };
            row.native.push(native.seconds);
            let outcomes = [("mvm", Some(peers.in_mvm(&script))), ("QEMU", peers.in_qemu(&script))];
            for ((who, outcome), times) in outcomes.into_iter().zip([&mut row.mvm, &mut row.tcg]) {
                match outcome {
                    None => {}
                    Some(Err(why)) => row.fault = Some(format!("in {who}: {why}")),
                    Some(Ok(outcome)) => {
                        times.push(outcome.seconds);
                        if outcome.printed != native.printed {
                            row.fault = Some(format!("prints something else in {who}"));
                            eprintln!(
                                "bench: {name}\n--- natively\n{}--- in {who}\n{}",
                                native.printed, outcome.printed
                            );
                        }
                    }
                }
            }
        }
        row
    }

    /// The median of `times` as a multiple of the native one.
    fn ratio(&self, times: &[f64]) -> Option<f64> {
        (!times.is_empty()).then(|| median(times) / median(&self.native))
    }
}
