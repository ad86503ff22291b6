//! A unikernel from the start of the command to its end on each engine, next to `/bin/true`, and
//! what the host needs for it beyond the guest's own memory.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use mvm_tests::{World, eventually};
use serde_json::{Value, json};

use crate::stats::median;

const ENGINES: [&str; 2] = ["kvm", "emu"];

/// Goals on the reference host when it is idle: milliseconds from start to exit, and bytes.
const START_MS: f64 = 25.0;
const MEMORY: u64 = 6 << 20;

/// A program that does nothing, whose start and end is in every other figure.
const NOTHING: &str = "/bin/true";

/// Measures `runs` starts of everything in turn, prints the table, returns the figures.
#[allow(clippy::print_stdout)]
pub fn measure(world: &World, runs: usize) -> Value {
    let kernel = world.images().join("hello-unikernel.elf");
    let engines: Vec<&str> =
        ENGINES.into_iter().filter(|engine| works(world, engine, &kernel)).collect();
    let mut times = vec![Vec::new(); engines.len() + 1];
    // In turn, so that whatever else the host does, it does to all of them.
    for round in 0..=runs {
        let mut commands = vec![Command::new(NOTHING)];
        commands.extend(engines.iter().map(|engine| hello(world, engine, &kernel, &["--rm"])));
        for (times, command) in times.iter_mut().zip(commands) {
            let ms = time(command);
            // The first of each warms the page cache.
            if round > 0 {
                times.push(ms);
            }
        }
    }
    println!(
        "| hello unikernel, start to exit | median ms | least ms | goal | memory above the guest's | goal |"
    );
    println!("|---|---:|---:|---:|---:|---:|");
    let mut rows = serde_json::Map::new();
    let mut row = |name: &str, times: &[f64], overhead: Option<u64>| {
        let (middle, least) = (median(times), times.iter().copied().fold(f64::NAN, f64::min));
        let goal = |has: bool, text: String| if has { text } else { "-".into() };
        let memory = overhead.map_or("-".into(), |bytes| format!("{} KiB", bytes >> 10));
        println!(
            "| {name} | {middle:.1} | {least:.1} | {} | {memory} | {} |",
            goal(name != NOTHING, format!("< {START_MS}")),
            goal(overhead.is_some(), format!("< {} KiB", MEMORY >> 10)),
        );
        let figures = json!({ "ms": times, "median_ms": middle, "overhead_bytes": overhead });
        rows.insert(name.to_owned(), figures);
    };
    row(NOTHING, &times[0], None);
    for (engine, times) in engines.iter().zip(&times[1..]) {
        row(&format!("mvm --engine {engine}"), times, overhead(world, engine, &kernel));
    }
    println!();
    Value::Object(rows)
}

/// The command that runs the unikernel.
fn hello(world: &World, engine: &str, kernel: &PathBuf, flags: &[&str]) -> Command {
    let mut command = world.command(&["run", "--engine", engine]);
    command.args(flags).args(["--unikernel", "rust", "--kernel"]).arg(kernel);
    command
}

/// Whether it runs here at all.
#[allow(clippy::print_stdout)]
fn works(world: &World, engine: &str, kernel: &PathBuf) -> bool {
    let output = hello(world, engine, kernel, &["--rm"]).output().expect("mvm");
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        println!("engine {engine} is left out: {}", said.trim_end());
    }
    output.status.success()
}

/// Milliseconds from the start of `command` to its end.
fn time(mut command: Command) -> f64 {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let start = Instant::now();
    let status = command.status().expect("a program");
    let ms = start.elapsed().as_secs_f64() * 1e3;
    assert!(status.success(), "{command:?}: {status}");
    ms
}

/// What the machine's process has for itself while the unikernel runs, in bytes.
fn overhead(world: &World, engine: &str, kernel: &PathBuf) -> Option<u64> {
    let name = format!("bench-{engine}");
    let status = hello(world, engine, kernel, &["-d", "--name", &name])
        .args(["hello", "spin"])
        .stdout(Stdio::null())
        .status()
        .expect("mvm");
    assert!(status.success(), "{status}");
    eventually("its last word", || world.mvm(&["logs", &name]).out().contains("spin"));
    let stats = world.mvm(&["stats", "--format", "json", &name]).expect_code(0).out();
    world.mvm(&["rm", "-f", &name]).expect_code(0);
    serde_json::from_str::<Value>(&stats).ok()?["host"]["overhead"].as_u64()
}
