//! `ebench` natively, in mvm, and in QEMU: nanoseconds per operation and whether the answers agree.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mvm_tests::{World, run_with};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::qemu::{Machine, Qemu};
use crate::stats::times;

/// Memory of the guests.
pub const MEBIBYTES: u32 = 512;

/// How long a run of all tests may take on a busy host.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Nanoseconds per operation in the best batch, and the value to check.
type Results = BTreeMap<String, (f64, String)>;

/// The program, and what brings it into guests.
#[derive(Debug)]
pub struct Ebench<'a> {
    world: &'a World,
    qemu: Option<&'a Qemu>,
    dir: TempDir,
}

/// What came out on as many processors as there are threads, or on one.
#[derive(Debug, Default)]
pub struct Measured {
    native: Results,
    mvm: Results,
    tcg: Results,
}

impl<'a> Ebench<'a> {
    /// Builds it.
    ///
    /// # Panics
    /// If that fails: there is no benchmark then.
    pub fn new(world: &'a World, qemu: Option<&'a Qemu>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let bench = Self { world, qemu, dir };
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/ebench.c");
        let mut cc = Command::new("cc");
        // Aligned, so that it is not chance which loop lies across the end of a page, where translators are slow.
        cc.args(["-O2", "-falign-functions=256", "-static", "-pthread", "-o"])
            .arg(bench.program())
            .arg(source)
            .arg("-lm");
        run_with(cc, b"", Duration::from_secs(120)).expect_code(0);
        bench.pack_image();
        if qemu.is_some() {
            pack_initramfs(&bench.dir.path().join("tree"), &bench.program(), &bench.initramfs());
        }
        bench
    }

    fn program(&self) -> PathBuf {
        self.dir.path().join("ebench")
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("ebench.tar")
    }

    /// Of busybox and ebench. Its words are those of ebench's command line after `ebench=`, with commas between them; without
    /// any it says `@ready` and waits for a line.
    pub fn initramfs(&self) -> PathBuf {
        self.dir.path().join("ebench.cpio")
    }

    /// An image of busybox and ebench, made with the recipes' own tool.
    fn pack_image(&self) {
        let script = r#". "$1"/../images/oci.sh; mkdir -p "$2/root/bin" "$2/root/tmp" "$2/root/proc" "$2/root/dev" "$2/root/sys"
            cp /bin/busybox "$2/root/bin/sh"; cp "$3" "$2/root/bin/ebench"; oci_pack "$2/root" "$4" ebench:latest '{"Env":["PATH=/bin"]}'"#;
        let mut pack = Command::new("bash");
        pack.args(["-c", script, "bash", env!("CARGO_MANIFEST_DIR")]).arg(self.dir.path());
        pack.arg(self.program()).arg(self.image());
        run_with(pack, b"", Duration::from_secs(60)).expect_code(0);
    }

    /// Runs the tests for `seconds` each, in `rounds` rounds, each natively, in mvm and in QEMU in turn. Everything has `processors`
    /// of them, natively as well: so what is measured has nothing to wait for but itself.
    pub fn measure(
        &self,
        tests: &[&str],
        processors: u32,
        seconds: f64,
        rounds: usize,
    ) -> Measured {
        let mut args = vec!["-t".to_owned(), seconds.to_string()];
        args.extend(tests.iter().map(|t| (*t).to_owned()));
        let mut measured = Measured::default();
        for _ in 0..rounds {
            keep_best(&mut measured.native, self.natively(&args, processors));
            keep_best(&mut measured.mvm, self.in_mvm(&args, processors));
            if let Some(qemu) = self.qemu {
                keep_best(&mut measured.tcg, self.in_qemu(qemu, &args, processors));
            }
        }
        measured
    }

    fn natively(&self, args: &[String], processors: u32) -> Results {
        let mut command = on_processors(processors);
        command.arg(self.program()).args(args);
        parse(&run_with(command, b"", PATIENCE).out())
    }

    fn in_mvm(&self, args: &[String], vcpus: u32) -> Results {
        let (memory, vcpus) = (format!("{MEBIBYTES}m"), vcpus.to_string());
        let mut command =
            self.world.command(&["run", "--rm", "--memory", &memory, "--cpus", &vcpus]);
        command.arg(self.image()).arg("ebench").args(args);
        let run = run_with(command, b"", PATIENCE);
        if run.code != 0 {
            eprintln!("bench: ebench in mvm ended with {}: {}", run.code, run.err());
        }
        parse(&run.out())
    }

    fn in_qemu(&self, qemu: &Qemu, args: &[String], vcpus: u32) -> Results {
        // Where the kernel trusts the TSC or not, the program does.
        let words = format!("ebench=-c,{},{}", qemu.tsc_hz(), args.join(","));
        let initramfs = self.initramfs();
        let machine =
            Machine { initramfs: &initramfs, words, vcpus, mebibytes: MEBIBYTES, disk: None };
        parse(&qemu.boot(&machine).0.out().replace('\r', ""))
    }
}

/// A command line that runs what is appended to it on the first `count` of the processors that we have.
pub fn on_processors(count: u32) -> Command {
    let ours = sched_getaffinity(Pid::from_raw(0)).expect("the processors of this process");
    let list = (0..CpuSet::count()).filter(|cpu| ours.is_set(*cpu) == Ok(true));
    let list: Vec<String> = list.take(count as usize).map(|cpu| cpu.to_string()).collect();
    let mut command = Command::new("taskset");
    command.args(["-c", &list.join(",")]);
    command
}

/// The best batch counts; a wrong answer in any of them stays.
fn keep_best(best: &mut Results, round: Results) {
    for (test, (ns, check)) in round {
        match best.get_mut(&test) {
            Some((least, first)) => {
                *least = least.min(ns);
                if *first != check {
                    "not always the same".clone_into(first);
                }
            }
            None => drop(best.insert(test, (ns, check))),
        }
    }
}

impl Measured {
    /// A test natively: nanoseconds.
    pub fn native(&self, test: &str) -> Option<f64> {
        self.native.get(test).map(|(ns, _)| *ns)
    }

    /// In mvm, as a multiple of the native time.
    pub fn mvm(&self, test: &str) -> Option<f64> {
        Some(self.mvm.get(test)?.0 / self.native(test)?)
    }

    /// In QEMU, as a multiple of the native time.
    pub fn tcg(&self, test: &str) -> Option<f64> {
        Some(self.tcg.get(test)?.0 / self.native(test)?)
    }

    /// Who gave another answer than the host's processor.
    pub fn wrong(&self, test: &str) -> Option<&'static str> {
        let (_, right) = self.native.get(test)?;
        let differs =
            |results: &Results| results.get(test).is_some_and(|(_, check)| check != right);
        if differs(&self.mvm) {
            return Some("WRONG in mvm");
        }
        differs(&self.tcg).then_some("WRONG in QEMU")
    }

    /// Prints a table of `tests`, returns its figures.
    #[allow(clippy::print_stdout)]
    pub fn table(&self, tests: &[&str]) -> Value {
        println!(
            "| test | native ns | mvm emu | QEMU TCG | emu / TCG |\n|---|---:|---:|---:|---:|"
        );
        let mut rows = Vec::new();
        for test in tests {
            let Some(ns) = self.native(test) else { continue };
            let (mvm, tcg) = (self.mvm(test), self.tcg(test));
            let versus = mvm.zip(tcg).map_or("-".into(), |(mvm, tcg)| format!("{:.2}", mvm / tcg));
            let wrong = self.wrong(test).map_or(String::new(), |who| format!(" {who}"));
            println!("| {test} | {ns:.1} | {} | {} | {versus}{wrong} |", times(mvm), times(tcg));
            rows.push(json!({ "test": test, "native_ns": ns, "emu": mvm, "tcg": tcg, "wrong": self.wrong(test) }));
        }
        println!();
        Value::Array(rows)
    }
}

fn parse(text: &str) -> Results {
    let mut results = Results::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["RESULT", name, _, ns, check] = words[..]
            && let Ok(ns) = ns.parse()
        {
            results.insert(name.to_owned(), (ns, check.to_owned()));
        }
    }
    results
}

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t tmpfs tmpfs /tmp
for word in $(/bin/busybox cat /proc/cmdline); do case $word in ebench=*) args=${word#ebench=};; esac; done
if [ "$args" ]; then /bin/ebench $(echo "$args" | /bin/busybox tr , ' '); else echo @ready; read -r _; fi
/bin/busybox reboot -f
"#;

fn pack_initramfs(tree: &Path, program: &Path, to: &Path) {
    let bin = tree.join("bin");
    fs::create_dir_all(&bin).expect("a directory");
    fs::copy(program, bin.join("ebench")).expect("a copy");
    crate::initramfs::pack(tree, INIT, to);
}
