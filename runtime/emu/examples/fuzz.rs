//! `make fuzz`: the engine against the host's processor, for as long as one likes.

#![allow(clippy::print_stdout)]

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

#[path = "../fuzz/mod.rs"]
#[allow(dead_code, missing_docs, missing_debug_implementations)]
mod fuzz;

use fuzz::campaign::{self, Plan, Until};
use fuzz::forms;

const USAGE: &str = "\
fuzz [--seconds N] [--cases N] [--seed S] [--forms SUBSTRING[,SUBSTRING..]] [--bits 64|32]
     [--failures N] [--threads N] [--table] [--replay CASE_SEED [--form INDEX]]";

struct Arguments {
    seconds: u64,
    cases: Option<u64>,
    seed: u64,
    forms: Vec<String>,
    bits: Vec<u32>,
    failures: usize,
    threads: usize,
    table: bool,
    replay: Option<u64>,
    form: Option<usize>,
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn arguments() -> Option<Arguments> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut found = Arguments {
        seconds: 60,
        cases: None,
        seed: now.as_nanos() as u64,
        forms: Vec::new(),
        bits: vec![64, 32],
        failures: 10,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        table: false,
        replay: None,
        form: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--table" {
            found.table = true;
            continue;
        }
        let value = words.next()?;
        match word.as_str() {
            "--seconds" => found.seconds = number(&value)?,
            "--cases" => found.cases = Some(number(&value)?),
            "--seed" => found.seed = number(&value)?,
            "--forms" => found.forms = value.split(',').map(str::to_ascii_lowercase).collect(),
            "--bits" => found.bits = vec![number(&value)? as u32],
            "--failures" => found.failures = number(&value)? as usize,
            "--threads" => found.threads = number(&value)? as usize,
            "--replay" => found.replay = Some(number(&value)?),
            "--form" => found.form = Some(number(&value)? as usize),
            _ => return None,
        }
    }
    Some(found)
}

fn main() -> ExitCode {
    let Some(arguments) = arguments() else {
        println!("{USAGE}");
        return ExitCode::from(2);
    };
    println!("seed {:#x}", arguments.seed);
    let mut good = true;
    for bits in &arguments.bits {
        match run(&arguments, *bits) {
            Ok(fine) => good &= fine,
            Err(error) => {
                println!("{error}");
                return ExitCode::from(2);
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(arguments: &Arguments, bits: u32) -> std::io::Result<bool> {
    let (all, left) = forms::all(bits);
    let chosen: Vec<_> = all
        .into_iter()
        .filter(|form| {
            let name = format!("{:?}", form.code).to_ascii_lowercase();
            arguments.forms.is_empty() || arguments.forms.iter().any(|f| name.contains(f))
        })
        .collect();
    if chosen.is_empty() {
        println!("no form has such a name");
        return Ok(false);
    }
    let share = arguments.seconds as f64 / arguments.bits.len() as f64;
    let start = Instant::now();
    let plan = Plan {
        seed: arguments.seed,
        bitness: bits,
        allowed: Arc::new(forms::codes(bits)),
        forms: Arc::new(chosen),
        until: match arguments.cases {
            Some(n) => Until::Cases(n),
            None => Until::Time(start + Duration::from_secs_f64(share)),
        },
        failures: arguments.failures,
        threads: arguments.threads,
    };
    if let Some(seed) = arguments.replay {
        println!("{}", campaign::replay(&plan, seed, arguments.form)?);
        return Ok(true);
    }
    let summary = campaign::run(&plan)?;
    for (key, (n, failure)) in &summary.failures {
        println!("{n} x {key}\n{failure}");
    }
    if arguments.table {
        println!("{}", summary.table(&plan.forms));
    }
    let missing: Vec<_> = plan
        .forms
        .iter()
        .filter(|f| summary.forms.get(f).is_none_or(|c| c.done == 0))
        .map(|f| format!("{:?}{}", f.code, if f.memory { " m" } else { "" }))
        .collect();
    if !missing.is_empty() {
        let shown = &missing[..missing.len().min(40)];
        println!("{} never ran to their end: {} ..", missing.len(), shown.join(", "));
    }
    println!("{bits} bits: {}", summary.line(&plan.forms));
    println!("{}", forms::left_line(&left));
    let seconds = start.elapsed().as_secs_f64();
    let [native, engine, made] =
        summary.times.map(|t| t.as_secs_f64() / summary.cases as f64 * 1e6);
    println!(
        "{:.0} cases/s; per case {native:.1} us on the host, {engine:.1} us in the engine, {made:.1} us \
         to make; {} differences",
        summary.cases as f64 / seconds,
        summary.failures.len()
    );
    Ok(summary.failures.is_empty())
}
