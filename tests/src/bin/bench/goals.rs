//! What the emulation engine is meant to reach, what it does reach, and QEMU beside it: one table.

use serde_json::{Value, json};

use crate::boot::Boot;
use crate::ebench::{Ebench, Measured};
use crate::stats::{geomean, times};

/// User-mode kernels: integer, then floating point and SIMD.
pub const USER: [&str; 14] = [
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
const KERNEL: [&str; 7] = ["getpid", "rw1", "read64k", "fault", "mmap", "files", "segv"];

/// Those that are neither.
const OTHERS: [&str; 9] =
    ["repmovs", "repcmps", "avx2", "fork", "exec", "pingpong", "smc", "codedata", "coldcode"];

/// With two threads.
const PARALLEL: [&str; 4] = ["par_int", "par_getpid", "par_fault", "par_mutex"];

/// A goal in multiples of the native time, of the geometric mean over some tests.
struct Goal {
    work: &'static str,
    tests: &'static [&'static str],
    most: f64,
}

const GOALS: [Goal; 15] = [
    Goal { work: "14 user kernels, geomean", tests: &USER, most: 2.0 },
    Goal { work: "atomic", tests: &["atomic"], most: 1.3 },
    Goal { work: "scalar double", tests: &["float"], most: 1.3 },
    Goal { work: "SSE2 integer", tests: &["sse2int"], most: 1.3 },
    Goal { work: "SSE2 double", tests: &["sse2pd"], most: 1.3 },
    Goal { work: "AVX2 and FMA", tests: &["avx2"], most: 1.3 },
    Goal { work: "x87", tests: &["x87"], most: 1.3 },
    Goal { work: "memcpy of libc", tests: &["memcpy"], most: 2.0 },
    Goal { work: "rep movsb", tests: &["repmovs"], most: 2.0 },
    Goal {
        work: "getppid, read and write, fault, mmap, files, signal: geomean",
        tests: &KERNEL,
        most: 3.5,
    },
    Goal { work: "fork", tests: &["fork"], most: 10.0 },
    Goal { work: "fork and exec", tests: &["exec"], most: 8.0 },
    Goal { work: "pipe ping-pong", tests: &["pingpong"], most: 10.0 },
    Goal { work: "code patched and called", tests: &["smc"], most: 40.0 },
    Goal { work: "new code", tests: &["coldcode"], most: 60.0 },
];

/// Of TCG's CPU time from start to agent ready.
const BOOT: f64 = 0.25;
/// Bytes of the engine's own after boot.
const MEMORY: u64 = 24 << 20;
/// What two vCPUs do of what one does, on two idle processors.
const SPEEDUP: f64 = 1.7;

/// All tests of the table.
pub fn tests() -> Vec<&'static str> {
    [&USER[..], &KERNEL, &OTHERS].concat()
}

/// Two threads on one processor and on two.
#[derive(Debug)]
pub struct Parallel {
    one: Measured,
    two: Measured,
}

impl Parallel {
    /// Measures them, for `seconds` a test.
    pub fn measure(ebench: &Ebench<'_>, seconds: f64, rounds: usize) -> Self {
        let measure = |processors| ebench.measure(&PARALLEL, processors, seconds, rounds);
        Self { one: measure(1), two: measure(2) }
    }

    /// How much faster a test is on two: natively, in mvm, in QEMU.
    fn speedups(&self, test: &str) -> [Option<f64>; 3] {
        let native = self.one.native(test).zip(self.two.native(test)).map(|(one, two)| one / two);
        // These are multiples of the native times.
        let of = |ratio: fn(&Measured, &str) -> Option<f64>| {
            let (one, two) = ratio(&self.one, test).zip(ratio(&self.two, test))?;
            Some(native? * one / two)
        };
        [native, of(Measured::mvm), of(Measured::tcg)]
    }
}

/// Memory after boot, in bytes.
#[derive(Debug)]
pub struct Memory {
    pub mvm: Option<u64>,
    pub tcg: Option<u64>,
}

/// The table as it grows.
struct Table {
    rows: Vec<Value>,
}

impl Table {
    #[allow(clippy::print_stdout)]
    fn begin() -> Self {
        println!("| work | goal | mvm emu | QEMU TCG | |\n|---|---:|---:|---:|---|");
        Self { rows: Vec::new() }
    }

    #[allow(clippy::print_stdout)]
    fn row(&mut self, work: &str, goal: &str, mvm: &str, tcg: &str, verdict: &str) {
        println!("| {work} | {goal} | {mvm} | {tcg} | {verdict} |");
        self.rows.push(
            json!({ "work": work, "goal": goal, "mvm": mvm, "tcg": tcg, "verdict": verdict }),
        );
    }
}

fn verdict(met: Option<bool>) -> &'static str {
    match met {
        Some(true) => "met",
        Some(false) => "**missed**",
        None => "not measured",
    }
}

/// The geometric mean of `ratio` over `tests`, if all of them have one.
fn mean(tests: &[&str], ratio: impl Fn(&str) -> Option<f64>) -> Option<f64> {
    let all: Option<Vec<f64>> = tests.iter().map(|test| ratio(test)).collect();
    all.map(|all| geomean(&all))
}

/// Prints the table. Returns its rows, and what the plot shows of them.
#[allow(clippy::print_stdout, clippy::cast_precision_loss)]
pub fn table(
    single: &Measured,
    parallel: &Parallel,
    boot: &Boot,
    memory: &Memory,
) -> (Value, Value) {
    let mut table = Table::begin();
    let mut plotted = Vec::new();
    for goal in &GOALS {
        let mvm = mean(goal.tests, |test| single.mvm(test));
        let tcg = mean(goal.tests, |test| single.tcg(test));
        let wrong =
            goal.tests.iter().find_map(|test| Some(format!("{test} {}", single.wrong(test)?)));
        let met = verdict(mvm.map(|mvm| mvm <= goal.most));
        table.row(
            goal.work,
            &format!("<= {}", times(Some(goal.most))),
            &times(mvm),
            &times(tcg),
            wrong.as_deref().unwrap_or(met),
        );
        plotted.push(json!({ "name": goal.work, "mvm": mvm, "tcg": tcg }));
    }

    let slower =
        |test: &&&str| single.mvm(test).zip(single.tcg(test)).is_some_and(|(mvm, tcg)| mvm > tcg);
    let slower: Vec<&str> =
        USER.iter().filter(|t| **t != "atomic").filter(slower).copied().collect();
    let names = if slower.is_empty() { "none".to_owned() } else { slower.join(", ") };
    let compared = single.tcg(USER[0]).map(|_| slower.is_empty());
    table.row(
        "user kernels slower than TCG, but for atomic",
        "none",
        &names,
        "",
        verdict(compared),
    );

    let ratio = boot.tcg_ms.map(|tcg| boot.mvm_ms / tcg);
    table.row(
        "start to agent ready, CPU time",
        &format!("<= {BOOT} of TCG"),
        &format!("{:.0} ms{}", boot.mvm_ms, ratio.map_or(String::new(), |r| format!(", {r:.2}"))),
        &boot.tcg_ms.map_or("-".into(), |ms| format!("{ms:.0} ms")),
        verdict(ratio.map(|r| r <= BOOT)),
    );
    let mib = |bytes: Option<u64>| {
        bytes.map_or("-".into(), |b| format!("{:.1} MiB", b as f64 / f64::from(1 << 20)))
    };
    table.row(
        "the engine's own memory after boot",
        &format!("<= {} MiB", MEMORY >> 20),
        &mib(memory.mvm),
        &mib(memory.tcg),
        verdict(memory.mvm.map(|bytes| bytes <= MEMORY)),
    );
    for test in PARALLEL {
        let [native, mvm, tcg] = parallel.speedups(test);
        let wrong = parallel.one.wrong(test).or(parallel.two.wrong(test));
        table.row(
            &format!("{test}, two vCPUs instead of one (natively {})", times(native)),
            &format!(">= {}", times(Some(SPEEDUP))),
            &times(mvm),
            &times(tcg),
            wrong.unwrap_or(verdict(mvm.map(|mvm| mvm >= SPEEDUP))),
        );
    }
    println!();
    (Value::Array(table.rows), Value::Array(plotted))
}
