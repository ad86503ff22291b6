//! `make bench`: what mvm costs, next to the host itself, to QEMU's TCG and to other runtimes of containers, where those are
//! installed.
//!
//! Everything is a ratio within one run, or CPU time: both stand a busy machine. Prints tables in
//! Markdown; `--json FILE` keeps the figures, `--plot FILE` draws them.

mod boot;
mod containers;
mod cpu;
mod ebench;
mod goals;
mod initramfs;
mod memory;
mod plot;
mod programs;
mod qemu;
mod start;
mod stats;

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use mvm_tests::World;
use serde_json::{Map, Value};

use crate::ebench::Ebench;
use crate::goals::{Memory, Parallel};
use crate::qemu::Qemu;

/// Names the starts of the unikernel.
const UNIKERNEL: &str = "unikernel";

/// Names the containers of containerd.
const CONTAINERS: &str = "containers";

/// Names the table of the engine's goals.
const GOALS: &str = "goals";

/// Names the real programs, which are left out unless named: they take a quarter of an hour, and a large image.
const PROGRAMS: &str = "programs";

/// Starts of the unikernel: each is short.
const STARTS: usize = 21;

/// Rounds of `ebench`, of which the best batches count.
const ROUNDS: usize = 3;

/// What the command line chooses.
#[derive(Debug, Default)]
struct Options {
    json: Option<PathBuf>,
    plot: Option<PathBuf>,
    runs: usize,
    seconds: f64,
    only: Vec<String>,
}

fn options() -> Result<Options, String> {
    let mut options = Options { runs: 5, seconds: 0.1, ..Options::default() };
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} wants a value"));
        match arg.as_str() {
            "--json" => options.json = Some(value()?.into()),
            "--plot" => options.plot = Some(value()?.into()),
            "--runs" => options.runs = value()?.parse().map_err(|e| format!("--runs: {e}"))?,
            "--seconds" => {
                options.seconds = value()?.parse().map_err(|e| format!("--seconds: {e}"))?;
            }
            name if !name.starts_with('-') => options.only.push(name.into()),
            other => {
                return Err(format!(
                    "{other} is not known; there are --json FILE (adds to it), --plot FILE, --runs N, --seconds S, {UNIKERNEL}, {GOALS}, \
                     {CONTAINERS}, {PROGRAMS}, PROGRAM..., TEST..."
                ));
            }
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let done = options().and_then(|options| {
        let mut figures = earlier(&options);
        measure(&options, &mut figures);
        keep(&options, &figures)
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::from(2)
        }
    }
}

/// The figures of earlier runs, of which this one's replace those that it measures again.
fn earlier(options: &Options) -> Map<String, Value> {
    let text = options.json.as_ref().and_then(|path| fs::read_to_string(path).ok());
    text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

fn keep(options: &Options, figures: &Map<String, Value>) -> Result<(), String> {
    let write = |path: &PathBuf, text: String| {
        fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
    };
    if let Some(path) = &options.json {
        write(path, Value::Object(figures.clone()).to_string())?;
    }
    if let Some(path) = &options.plot {
        write(path, plot::draw(figures))?;
    }
    Ok(())
}

/// Runs the parts that are named, or those that need no name.
#[allow(clippy::print_stdout)]
fn measure(options: &Options, figures: &mut Map<String, Value>) {
    let world = World::new();
    let qemu = Qemu::find();
    if qemu.is_none() {
        println!("qemu-system-x86_64 is not installed: no comparison with it.\n");
    }
    let named = |part: &str| options.only.iter().any(|name| name == part);
    let wanted = |part: &str| options.only.is_empty() || named(part);
    if wanted(UNIKERNEL) {
        figures.insert(UNIKERNEL.into(), start::measure(&world, STARTS.max(options.runs)));
    }
    if wanted(CONTAINERS) {
        figures.insert(CONTAINERS.into(), containers::measure(options.runs));
    }
    if wanted(GOALS) {
        measure_goals(options, &world, qemu.as_ref(), figures);
    }
    let programs = programs::names();
    let (programs, tests): (Vec<&String>, Vec<&String>) = if named(PROGRAMS) {
        (programs.iter().collect(), Vec::new())
    } else {
        let parts = [UNIKERNEL, CONTAINERS, GOALS];
        let others = options.only.iter().filter(|name| !parts.contains(&name.as_str()));
        others.partition(|name| programs.contains(name))
    };
    if !programs.is_empty() {
        let names: Vec<String> = programs.into_iter().cloned().collect();
        figures.insert(PROGRAMS.into(), programs::measure(qemu.as_ref(), &names, 1));
    }
    if !tests.is_empty() {
        let tests: Vec<&str> = tests.into_iter().map(String::as_str).collect();
        let ebench = Ebench::new(&world, qemu.as_ref());
        ebench.measure(&tests, 1, options.seconds, ROUNDS).table(&tests);
    }
}

/// Everything that the table of goals is made of.
fn measure_goals(
    options: &Options,
    world: &World,
    qemu: Option<&Qemu>,
    figures: &mut Map<String, Value>,
) {
    let boot = boot::measure(world, qemu, options.runs);
    let ebench = Ebench::new(world, qemu);
    let memory = Memory {
        mvm: memory::of_mvm(world),
        tcg: qemu.and_then(|qemu| memory::of_qemu(qemu, &ebench)),
    };
    let tests = goals::tests();
    let single = ebench.measure(&tests, 1, options.seconds, ROUNDS);
    let parallel = Parallel::measure(&ebench, options.seconds * 3.0, ROUNDS);
    figures.insert("ebench".into(), single.table(&tests));
    let (rows, classes) = goals::table(&single, &parallel, &boot, &memory);
    figures.insert("boot".into(), boot.figures);
    figures.insert(GOALS.into(), rows);
    figures.insert(plot::CLASSES.into(), classes);
}
