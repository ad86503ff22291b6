//! Lock-step: random kernels with their processes on the translator and on the interpreter, from the same state.
//!
//! A program edits its own page tables, changes address spaces, control registers and privilege levels, faults, rewrites
//! its code, steps, breaks and interrupts itself. Its handlers keep a log of every exception, go on behind the instruction
//! that faulted, and everything ends in memory and registers, which must come out the same on both tiers. A program keeps
//! to what the architecture defines: it never depends on what is left in the TLB. So it must also come out the same when
//! interrupts from outside arrive at blocks of their own choice, whose handler drops translations.
//!
//! `cargo test` runs a slice with a fixed seed; `MVM_LOCKSTEP_SECONDS=n` runs on with other seeds (`make fuzz`), and
//! `MVM_LOCKSTEP_SEED=s` runs one program.

mod emit;
mod machine;
mod program;
mod steps;

use std::time::{Duration, Instant, SystemTime};

use crate::Tier;
use machine::{Run, outcome};
use program::Program;

/// Programs of the fixed slice.
const SLICE: u64 = 400;

/// The ways to run a program that are compared with the interpreter.
fn ways(seed: u64) -> [Run; 4] {
    let plain = Run { tier: Tier::Translator, ..REFERENCE };
    [
        plain,
        // In part interpreted, and with a cache that is full every now and then.
        Run { trials: (seed % 4) as u8, room: Some(2 << 10 << (seed % 5)), ..plain },
        Run { interrupts: true, ..plain },
        // Comparing its code, of all pages or of some.
        Run { compared: Some(1 + (seed % 3) as usize), trials: (seed / 3 % 2) as u8, ..plain },
    ]
}

const REFERENCE: Run =
    Run { tier: Tier::Interpreter, trials: 0, room: None, interrupts: false, compared: None };

/// What differs when `program` is run, if anything does.
fn difference(program: &Program, seed: u64) -> Option<String> {
    let reference = outcome(program, REFERENCE);
    if reference.is_by_force() {
        return None;
    }
    // The interpreter too must not depend on when interrupts come.
    let disturbed = Run { interrupts: true, ..REFERENCE };
    ways(seed).into_iter().chain([disturbed]).find_map(|run| {
        let lines = reference.differences(&outcome(program, run));
        (!lines.is_empty()).then(|| format!("{run:?}:\n  {}", lines.join("\n  ")))
    })
}

/// Runs the program of `seed`; a difference is told with the steps that are needed for it.
fn check(seed: u64) {
    let program = Program::random(seed);
    let Some(first) = difference(&program, seed) else { return };
    // What follows may take long.
    eprintln!("seed {seed:#x}: {first}");
    let mut small = program.clone();
    let mut index = 0;
    while index < small.steps.len() {
        let mut less = small.clone();
        less.steps.remove(index);
        if difference(&less, seed).is_some() {
            small = less;
        } else {
            index += 1;
        }
    }
    let last = difference(&small, seed).unwrap_or(first);
    panic!("seed {seed:#x}: {last}\n{}", small.describe());
}

fn seed_of(index: u64, start: u64) -> u64 {
    start.wrapping_add(index).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

#[test]
fn both_tiers_end_alike() {
    if let Ok(text) = std::env::var("MVM_LOCKSTEP_SEED") {
        let digits = text.trim_start_matches("0x");
        return check(u64::from_str_radix(digits, 16).expect("a seed in hex"));
    }
    for index in 0..SLICE {
        check(seed_of(index, 1));
    }
    let Some(seconds) = std::env::var("MVM_LOCKSTEP_SECONDS").ok().and_then(|s| s.parse().ok())
    else {
        return;
    };
    let start =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos()
            as u64;
    let (end, mut count) = (Instant::now() + Duration::from_secs(seconds), 0);
    while Instant::now() < end {
        check(seed_of(count, start));
        count += 1;
    }
    eprintln!("{count} more programs, from {start:#x}");
}

/// What the slice must have done to be worth something.
#[test]
fn the_programs_do_what_they_are_for() {
    let mut seen = [0u64; 256];
    let (mut exits, mut ends) = (0, 0);
    for index in 0..60 {
        let outcome = outcome(&Program::random(seed_of(index, 1)), REFERENCE);
        for vector in outcome.vectors() {
            seen[usize::from(vector)] += 1;
        }
        exits += u64::from(outcome.is_at_the_end());
        ends += 1;
    }
    // #DE #DB #BP #UD #GP #PF #AC, system calls by INT, interrupts that it sends itself.
    for vector in [0, 1, 3, 6, 13, 14, 17, 0x61] {
        assert!(seen[vector] > 0, "vector {vector:#x} was never seen: {seen:?}");
    }
    assert!(exits * 10 > ends * 8, "{exits} of {ends} programs came to their end");
}
