//! `make bench`: what mvm costs, next to the host itself, to QEMU's TCG and to other runtimes of containers, where those are
//! installed.
//!
//! Everything is a ratio within one run, or CPU time: both stand a busy machine. Prints tables in
//! Markdown; `--json FILE` keeps the figures.

mod boot;
mod containers;
mod ebench;
mod qemu;
mod start;
mod stats;

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use mvm_tests::World;

/// Names the starts of the unikernel among the tests.
const UNIKERNEL: &str = "unikernel";

/// Names the containers of containerd among the tests.
const CONTAINERS: &str = "containers";

/// Starts of the unikernel: each is short.
const STARTS: usize = 21;

/// What the command line chooses.
#[derive(Debug, Default)]
struct Options {
    json: Option<PathBuf>,
    runs: usize,
    seconds: f64,
    only: Vec<String>,
}

fn options() -> Result<Options, String> {
    let mut options = Options { runs: 5, seconds: 0.3, ..Options::default() };
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} wants a value"));
        match arg.as_str() {
            "--json" => options.json = Some(value()?.into()),
            "--runs" => options.runs = value()?.parse().map_err(|e| format!("--runs: {e}"))?,
            "--seconds" => {
                options.seconds = value()?.parse().map_err(|e| format!("--seconds: {e}"))?;
            }
            name if !name.starts_with('-') => options.only.push(name.into()),
            other => {
                return Err(format!(
                    "{other} is not known; there are --json FILE, --runs N, --seconds S, {UNIKERNEL}, {CONTAINERS}, TEST..."
                ));
            }
        }
    }
    Ok(options)
}

#[allow(clippy::print_stdout)]
fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(message) => {
            eprintln!("bench: {message}");
            return ExitCode::from(2);
        }
    };
    let world = World::new();
    let qemu = qemu::Qemu::find();
    if qemu.is_none() {
        println!("qemu-system-x86_64 is not installed: no comparison with it.\n");
    }
    let mut figures = serde_json::Map::new();
    let (starts, others): (Vec<_>, Vec<_>) =
        options.only.iter().cloned().partition(|name| name == UNIKERNEL);
    let (containers, tests): (Vec<_>, Vec<_>) =
        others.into_iter().partition(|name| name == CONTAINERS);
    let all = options.only.is_empty();
    if all || !starts.is_empty() {
        figures.insert(UNIKERNEL.into(), start::measure(&world, STARTS.max(options.runs)));
    }
    if all {
        figures.insert("boot".into(), boot::measure(&world, qemu.as_ref(), options.runs));
    }
    if all || !containers.is_empty() {
        figures.insert(CONTAINERS.into(), containers::measure(options.runs));
    }
    if all || !tests.is_empty() {
        let ebench = ebench::measure(&world, qemu.as_ref(), options.seconds, &tests);
        figures.insert("ebench".into(), ebench);
    }
    if let Some(path) = options.json {
        let text = serde_json::Value::Object(figures).to_string();
        if let Err(e) = fs::write(&path, text) {
            eprintln!("bench: cannot write {}: {e}", path.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
