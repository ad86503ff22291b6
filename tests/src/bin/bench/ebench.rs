//! `ebench` natively, in mvm, and in QEMU: nanoseconds per operation and whether the answers agree.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mvm_tests::{World, run_with};
use serde_json::{Value, json};

use crate::qemu::Qemu;
use crate::stats::geomean;

/// User-mode kernels: integer, then floating point and SIMD.
const USER: [&str; 14] = [
    "int",
    "branch",
    "sha256",
    "qsort",
    "memcpy",
    "chase_l1",
    "chase_64m",
    "fib",
    "interp",
    "atomic",
    "float",
    "sse2int",
    "sse2pd",
    "x87",
];
/// What enters the guest's kernel, or its MMU.
const KERNEL: [&str; 8] = ["getpid", "rw1", "read64k", "files", "mmap", "fault", "segv", "fork"];

/// Name -> (ns per operation, check value).
type Results = BTreeMap<String, (f64, String)>;

/// Runs everything (or the tests `only`), prints the table, returns it.
#[allow(clippy::print_stdout)]
pub fn measure(world: &World, qemu: Option<&Qemu>, seconds: f64, only: &[String]) -> Value {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let program = build(dir.path());
    let tests: Vec<&str> = if only.is_empty() {
        USER.into_iter().chain(KERNEL).collect()
    } else {
        only.iter().map(String::as_str).collect()
    };
    let mut args = vec!["-t".to_owned(), seconds.to_string()];
    args.extend(tests.iter().map(|t| (*t).to_owned()));

    let mut native = Command::new(&program);
    native.args(&args);
    let native = parse(&run_with(native, b"", Duration::from_secs(600)).expect_code(0).out());
    let emu = in_mvm(world, dir.path(), &program, &args);
    let tcg = qemu.map(|q| in_qemu(q, dir.path(), &program, &args)).unwrap_or_default();

    println!("| test | native ns | mvm emu | QEMU TCG | emu / TCG |\n|---|---:|---:|---:|---:|");
    let mut rows = Vec::new();
    for test in &tests {
        let Some((ns, check)) = native.get(*test) else { continue };
        let ratio =
            |results: &Results| results.get(*test).map(|(other, c)| (other / ns, c == check));
        let (emu, tcg) = (ratio(&emu), ratio(&tcg));
        let cell = |r: Option<(f64, bool)>| match r {
            None => "-".to_owned(),
            Some((x, true)) => format!("{x:.1}x"),
            Some((x, false)) => format!("{x:.1}x WRONG"),
        };
        let versus = match (emu, tcg) {
            (Some((e, _)), Some((t, _))) => format!("{:.2}", e / t),
            _ => "-".to_owned(),
        };
        println!("| {test} | {ns:.1} | {} | {} | {versus} |", cell(emu), cell(tcg));
        rows.push(json!({ "test": test, "native_ns": ns, "emu": emu.map(|r| r.0), "emu_right": emu.map(|r| r.1),
            "tcg": tcg.map(|r| r.0) }));
    }
    for (name, group) in [("user kernels", &USER[..]), ("kernel entry", &KERNEL[..])] {
        let mean = |results: &Results| {
            let ratios: Vec<f64> =
                group.iter().filter_map(|t| Some(results.get(*t)?.0 / native.get(*t)?.0)).collect();
            geomean(&ratios)
        };
        println!(
            "| **{name}, geomean** | | {:.1}x | {:.1}x | {:.2} |",
            mean(&emu),
            mean(&tcg),
            mean(&emu) / mean(&tcg)
        );
    }
    println!();
    Value::Array(rows)
}

fn build(dir: &Path) -> PathBuf {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/ebench.c");
    let program = dir.join("ebench");
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-static", "-pthread", "-o"]).arg(&program).arg(source).arg("-lm");
    run_with(cc, b"", Duration::from_secs(120)).expect_code(0);
    program
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

/// An image of busybox and ebench, made with the recipe's own tool.
fn in_mvm(world: &World, dir: &Path, program: &Path, args: &[String]) -> Results {
    let image = dir.join("ebench.tar");
    let script = r#". "$1"/../images/oci.sh; mkdir -p "$2/root/bin" "$2/root/tmp" "$2/root/proc" "$2/root/dev" "$2/root/sys"
        cp /bin/busybox "$2/root/bin/sh"; cp "$3" "$2/root/bin/ebench"; oci_pack "$2/root" "$4" ebench:latest '{"Env":["PATH=/bin"]}'"#;
    let mut pack = Command::new("bash");
    pack.args(["-c", script, "bash", env!("CARGO_MANIFEST_DIR")]).arg(dir).arg(program).arg(&image);
    run_with(pack, b"", Duration::from_secs(60)).expect_code(0);
    let mut command = world.command(&["run", "--rm", "--memory", "512m"]);
    command.arg(&image).arg("ebench").args(args);
    let run = run_with(command, b"", Duration::from_secs(1800));
    if run.code != 0 {
        eprintln!("bench: ebench in mvm ended with {}: {}", run.code, run.err());
    }
    parse(&run.out())
}

fn in_qemu(qemu: &Qemu, dir: &Path, program: &Path, args: &[String]) -> Results {
    let tree = dir.join("initramfs");
    let script = r#"mkdir -p "$1/bin" "$1/proc" "$1/tmp" "$1/dev" && cp /bin/busybox "$1/bin/" && cp "$2" "$1/bin/ebench" && cat > "$1/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t tmpfs tmpfs /tmp
for word in $(/bin/busybox cat /proc/cmdline); do case $word in ebench=*) args=${word#ebench=};; esac; done
/bin/ebench $(echo "$args" | /bin/busybox tr , ' ')
/bin/busybox reboot -f
INIT
chmod +x "$1/init" && cd "$1" && find . | /bin/busybox cpio -o -H newc > "$3""#;
    let initramfs = dir.join("ebench.cpio");
    let mut pack = Command::new("sh");
    pack.args(["-c", script, "sh"]).arg(&tree).arg(program).arg(&initramfs);
    run_with(pack, b"", Duration::from_secs(60)).expect_code(0);
    // Without a paravirtual clock the guest tells time in jiffies: let ebench read the TSC.
    let hz = fs::read_to_string("/proc/cpuinfo")
        .unwrap_or_default()
        .lines()
        .find(|l| l.starts_with("cpu MHz"))
        .and_then(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
        .map_or(2e9, |mhz| mhz * 1e6);
    let (run, _) = qemu.boot(&initramfs, &format!("ebench=-c,{hz:.0},{}", args.join(",")), 1);
    parse(&run.out().replace('\r', ""))
}
