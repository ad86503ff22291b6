//! The engine against the host's processor: a fixed slice of what `make fuzz` does.
//!
//! Every form of instruction that the engine implements runs many times, to its end at least once; each
//! register, flag, byte of memory and exception is compared. The coverage by form is printed (see it with
//! `--nocapture`) and left in a file.

#![allow(clippy::print_stdout)]

use std::path::Path;
use std::sync::Arc;

use iced_x86::Code;

#[path = "../fuzz/mod.rs"]
#[allow(dead_code, missing_docs, missing_debug_implementations)]
mod fuzz;

use fuzz::campaign::{self, Plan, Until};
use fuzz::forms;
use fuzz::native::{ESCAPED, HUNG};

/// Runs `cases` cases, and checks that there are no differences and no gaps.
fn slice(bits: u32, cases: u64) {
    let (forms, left) = forms::all(bits);
    let plan = Plan {
        seed: 0x6d76_6d20_656d_7521,
        bitness: bits,
        allowed: Arc::new(forms::codes(bits)),
        forms: Arc::new(forms),
        until: Until::Cases(cases),
        failures: 20,
        threads: 1,
    };
    let summary = campaign::run(&plan).expect("a child process to run cases in");
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("coverage-{bits}.txt"));
    std::fs::write(&file, summary.table(&plan.forms)).expect("the coverage table");
    println!("{bits} bits: {}", summary.line(&plan.forms));
    println!("{}; by form: {}", forms::left_line(&left), file.display());
    for (n, report) in summary.failures.values() {
        println!("{n} times:\n{report}");
    }
    assert!(summary.failures.is_empty(), "{} kinds of differences", summary.failures.len());
    for vector in [HUNG, ESCAPED] {
        assert_eq!(summary.vectors.get(&vector), None, "cases that cannot be compared");
    }
    let gaps: Vec<_> = plan
        .forms
        .iter()
        .filter(|form| {
            let count = summary.forms.get(form).copied().unwrap_or_default();
            // UD2 ends in an exception by definition.
            if form.code == Code::Ud2 { count.tried == 0 } else { count.done == 0 }
        })
        .collect();
    assert!(gaps.is_empty(), "forms that never ran to their end: {gaps:?}");
}

#[test]
fn the_engine_does_what_the_processor_does_in_64_bit_mode() {
    slice(64, 300_000);
}

#[test]
fn the_engine_does_what_the_processor_does_in_compatibility_mode() {
    slice(32, 150_000);
}
