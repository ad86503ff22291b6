//! `make fuzz`, second half: hostile bytes for every queue of every device and every parser of what comes
//! from outside. A panic is a finding, and so is an input that takes longer than a minute.
//!
//! Inputs are random, or valid ones with a few bytes changed. The seed of each round is enough to run it
//! again: `fuzz --target NAME --seed S --rounds 1`.

mod annotations;
mod random;
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mvm_devices::testing::Rng;
use targets::{TARGETS, Target};

/// One input may take this long.
const PATIENCE: Duration = Duration::from_secs(60);

struct Options {
    seconds: u64,
    rounds: u64,
    seed: u64,
    target: Option<String>,
}

fn options() -> Result<Options, String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut options = Options {
        seconds: 60,
        rounds: u64::MAX,
        seed: u64::from(now.subsec_nanos()),
        target: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args.next().ok_or(format!("{arg} wants a value"))?;
        let number = || value.parse::<u64>().map_err(|e| format!("{arg} {value}: {e}"));
        match arg.as_str() {
            "--seconds" => options.seconds = number()?,
            "--rounds" => options.rounds = number()?,
            "--seed" => options.seed = number()?,
            "--target" => options.target = Some(value),
            _ => {
                let names: Vec<_> = TARGETS.iter().map(|t| t.name).collect();
                return Err(format!(
                    "{arg} is not known; there are --seconds N, --rounds N, --seed N, --target {}",
                    names.join("|")
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
            eprintln!("fuzz: {message}");
            return ExitCode::from(2);
        }
    };
    let chosen: Vec<&'static Target> = TARGETS
        .iter()
        .filter(|t| options.target.as_ref().is_none_or(|name| name == t.name))
        .collect();
    if chosen.is_empty() {
        eprintln!("fuzz: there is no target {:?}", options.target.unwrap_or_default());
        return ExitCode::from(2);
    }
    let each = Duration::from_secs(options.seconds) / u32::try_from(chosen.len()).unwrap_or(1);
    for target in chosen {
        match campaign(target, options.seed, options.rounds, each) {
            Ok(rounds) => println!("{:11} {rounds} inputs, no finding", target.name),
            Err(seed) => {
                println!("{:11} FINDING: --target {0} --seed {seed} --rounds 1", target.name);
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// Runs rounds until the time or their number is up; the error is the seed of a round that went wrong.
fn campaign(target: &'static Target, seed: u64, rounds: u64, time: Duration) -> Result<u64, u64> {
    let (report, done) = mpsc::channel();
    let end = Instant::now() + time;
    // The thread of a hanging round is left behind: the process ends soon.
    thread::spawn(move || {
        let mut seeds = (0..rounds).map(|round| seed.wrapping_add(round));
        while let Some(seed) = seeds.next().filter(|_| rounds == 1 || Instant::now() < end) {
            let input = target.input(&mut Rng::new(seed));
            let fine = catch_unwind(AssertUnwindSafe(|| (target.run)(&input))).is_ok();
            if report.send((seed, fine)).is_err() || !fine {
                return;
            }
        }
    });
    let mut count = 0;
    loop {
        match done.recv_timeout(PATIENCE) {
            Ok((_, true)) => count += 1,
            Ok((seed, false)) => return Err(seed),
            Err(RecvTimeoutError::Timeout) => return Err(seed.wrapping_add(count)),
            Err(RecvTimeoutError::Disconnected) => return Ok(count),
        }
    }
}
