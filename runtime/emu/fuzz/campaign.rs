//! Many cases: which, how often each form ran, and what is told about one that differs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use iced_x86::{Code, Formatter, IntelFormatter};
use mvm_emu::Tier;
use mvm_emu::testing::UserMachine;

use super::case::{Case, Outcome, Rng};
use super::compare::{self, GPR};
use super::engine::Engine;
use super::forms::Form;
use super::generate::{self, Generated};
use super::native::{BATCH, Native};

/// When a campaign is over.
#[derive(Clone, Copy)]
pub enum Until {
    Cases(u64),
    Time(Instant),
}

/// What to run.
#[derive(Clone)]
pub struct Plan {
    pub seed: u64,
    pub bitness: u32,
    pub forms: Arc<Vec<Form>>,
    /// Codes that random bytes may be.
    pub allowed: Arc<HashSet<Code>>,
    pub until: Until,
    /// Differences, by instruction, after which to stop.
    pub failures: usize,
    pub threads: usize,
}

/// How often a form took part, and how often it ran to its end.
#[derive(Clone, Copy, Default)]
pub struct Count {
    pub tried: u64,
    pub done: u64,
}

/// What came out.
#[derive(Default)]
pub struct Summary {
    pub cases: u64,
    /// Exceptions that ended the cases, by vector.
    pub vectors: HashMap<u64, u64>,
    pub forms: HashMap<Form, Count>,
    /// Differences by the instruction at fault: how many, and a report.
    pub failures: BTreeMap<String, (u64, String)>,
    /// Time on the host's processor, in the engine, and making cases.
    pub times: [Duration; 3],
}

impl Summary {
    fn add(&mut self, other: Self) {
        self.cases += other.cases;
        for (vector, n) in other.vectors {
            *self.vectors.entry(vector).or_default() += n;
        }
        for (form, count) in other.forms {
            let mine = self.forms.entry(form).or_default();
            mine.tried += count.tried;
            mine.done += count.done;
        }
        for (key, (n, report)) in other.failures {
            self.failures.entry(key).or_insert((0, report)).0 += n;
        }
        for (mine, time) in self.times.iter_mut().zip(other.times) {
            *mine += time;
        }
    }

    /// One line: cases, forms that ran to their end, exceptions.
    pub fn line(&self, forms: &[Form]) -> String {
        let done = forms.iter().filter(|f| self.forms.get(f).is_some_and(|c| c.done > 0)).count();
        let mut vectors: Vec<_> = self.vectors.iter().collect();
        vectors.sort();
        let mut text = format!(
            "{} cases, {done} of {} forms ran to their end; ended by",
            self.cases,
            forms.len()
        );
        for (vector, n) in vectors {
            // Writing to a String cannot fail.
            let _ = write!(text, " {}:{n}", vector_name(*vector));
        }
        text
    }

    /// A line per form.
    pub fn table(&self, forms: &[Form]) -> String {
        let mut text = String::from("done tried form\n");
        for form in forms {
            let count = self.forms.get(form).copied().unwrap_or_default();
            let kind = if form.memory { " (memory)" } else { "" };
            let _ = writeln!(text, "{:6} {:6} {:?}{kind}", count.done, count.tried, form.code);
        }
        text
    }
}

fn vector_name(vector: u64) -> String {
    let name = match vector {
        0 => "#DE",
        1 => "#DB",
        3 => "#BP",
        4 => "#OF",
        5 => "#BR",
        6 => "#UD",
        12 => "#SS",
        13 => "#GP",
        14 => "#PF",
        16 => "#MF",
        17 => "#AC",
        19 => "#XM",
        super::native::HUNG => "(endless)",
        super::native::ESCAPED => "(system call)",
        _ => return format!("#{vector}"),
    };
    name.into()
}

/// The case that `seed` stands for.
pub fn generate(seed: u64, plan: &Plan, first: Option<usize>) -> Generated {
    let mut rng = Rng::new(seed);
    let any = rng.below(plan.forms.len() as u64) as usize;
    let primary = plan.forms[first.unwrap_or(any)];
    let mut wanted = Vec::new();
    let before = if rng.once_in(2) { 0 } else { rng.below(4) };
    for _ in 0..before {
        wanted.push(rng.pick(&plan.forms));
    }
    wanted.push(primary);
    for _ in 0..rng.below(4) {
        wanted.push(rng.pick(&plan.forms));
    }
    generate::case(&mut rng, plan.bitness, &wanted, &plan.allowed)
}

/// The seed of case `index`, and the form it is for.
fn seed_of(plan: &Plan, index: u64) -> (u64, usize) {
    let mut rng = Rng::new(plan.seed ^ index.wrapping_mul(0xa076_1d64_78bd_642f));
    (rng.next(), (index % plan.forms.len() as u64) as usize)
}

struct Shared {
    plan: Plan,
    next: AtomicU64,
    stop: AtomicBool,
    failures: AtomicU64,
}

/// Runs `plan`.
///
/// # Errors
/// The child cannot be started.
pub fn run(plan: &Plan) -> io::Result<Summary> {
    let shared = Shared {
        plan: plan.clone(),
        next: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        failures: AtomicU64::new(0),
    };
    let total = Mutex::new(Summary::default());
    let mut natives = Vec::new();
    for _ in 0..plan.threads.max(1) {
        natives.push(Native::new()?);
    }
    let result: Vec<io::Result<()>> = std::thread::scope(|scope| {
        let workers: Vec<_> = natives
            .into_iter()
            .map(|native| {
                let (shared, total) = (&shared, &total);
                scope.spawn(move || {
                    let summary = work(shared, native);
                    shared.stop.fetch_or(summary.is_err(), Ordering::Relaxed);
                    total.lock().unwrap_or_else(PoisonError::into_inner).add(summary?);
                    Ok(())
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|w| w.join().unwrap_or_else(|_| Err(io::Error::other("a worker panicked"))))
            .collect()
    });
    result.into_iter().collect::<io::Result<()>>()?;
    Ok(total.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn work(shared: &Shared, mut native: Native) -> io::Result<Summary> {
    let plan = &shared.plan;
    let mut engine = Watched::new();
    let mut summary = Summary::default();
    let mut seeds = Vec::with_capacity(BATCH);
    let mut batch: Vec<Generated> = Vec::with_capacity(BATCH);
    let mut cases: Vec<Case> = Vec::with_capacity(BATCH);
    while !shared.stop.load(Ordering::Relaxed) {
        let first = shared.next.fetch_add(BATCH as u64, Ordering::Relaxed);
        let over = match plan.until {
            Until::Cases(n) => first >= n,
            Until::Time(end) => Instant::now() >= end,
        };
        if over {
            break;
        }
        let start = Instant::now();
        seeds.clear();
        batch.clear();
        cases.clear();
        for index in first..first + BATCH as u64 {
            let (seed, form) = seed_of(plan, index);
            let generated = generate(seed, plan, Some(form));
            seeds.push((seed, form));
            cases.push(generated.case);
            batch.push(generated);
        }
        let made = Instant::now();
        let outcomes = native.run(&cases)?;
        let native_done = Instant::now();
        for ((generated, (seed, form)), outcome) in batch.iter().zip(&seeds).zip(outcomes) {
            summary.cases += 1;
            let problem = match &outcome {
                None => vec!["the host's child died or hung".to_owned()],
                Some(outcome) => {
                    *summary.vectors.entry(outcome.vector).or_default() += 1;
                    count(&mut summary, generated, outcome);
                    judge(&mut engine, &generated.case, outcome)
                }
            };
            if !problem.is_empty() {
                let head = format!(
                    "case seed {seed:#x}, form {form} of {} ({} bits)",
                    plan.forms.len(),
                    plan.bitness
                );
                let outcome = outcome.as_ref();
                let (key, text) =
                    report(&head, &mut engine, &mut native, generated, outcome, problem);
                let entry = summary.failures.entry(key).or_insert((0, text));
                entry.0 += 1;
                let new = u64::from(entry.0 == 1);
                let failures = shared.failures.fetch_add(new, Ordering::Relaxed) + new;
                if failures >= plan.failures as u64 {
                    shared.stop.store(true, Ordering::Relaxed);
                }
            }
        }
        summary.times[0] += native_done - made;
        summary.times[1] += native_done.elapsed();
        summary.times[2] += made - start;
    }
    Ok(summary)
}

/// Runs the case `seed` alone and reports on it. Empty: no difference.
///
/// # Errors
/// The child cannot be started.
pub fn replay(plan: &Plan, seed: u64, form: Option<usize>) -> io::Result<String> {
    let mut native = Native::new()?;
    let mut engine = Watched::new();
    let generated = generate(seed, plan, form);
    let outcome = native.run(&[generated.case])?.into_iter().next().flatten();
    let problem = match &outcome {
        None => vec!["the host's child died or hung".to_owned()],
        Some(outcome) => judge(&mut engine, &generated.case, outcome),
    };
    let head = format!("case seed {seed:#x}: {} differences", problem.len());
    Ok(report(&head, &mut engine, &mut native, &generated, outcome.as_ref(), problem).1)
}

/// The differences of a case that ended with `outcome` on the host.
fn judge(engine: &mut Watched, case: &Case, outcome: &Outcome) -> Vec<String> {
    if matches!(outcome.vector, super::native::HUNG | super::native::ESCAPED) {
        return Vec::new();
    }
    match engine.run(case) {
        None => vec!["the engine does not end it, or shut down".to_owned()],
        Some(ours) => {
            let lines = compare::differences(&mut engine.engine, case, outcome, &ours);
            if lines.is_empty() { engine.consistent(case, &ours) } else { lines }
        }
    }
}

/// Counts the forms of a case, and which of them ran to their end: all before the end, as there are
/// only forward branches.
fn count(summary: &mut Summary, generated: &Generated, outcome: &Outcome) {
    let start = generated.case.state.rip;
    let inside = (start..start + u64::from(generated.case.len) + 1).contains(&outcome.state.rip);
    for (at, end, form) in &generated.forms {
        let count = summary.forms.entry(*form).or_default();
        count.tried += 1;
        // A branch with 16 bits of operand size ends outside.
        let cut = generated.case.compat != 0
            && [*end & 0xffff, (*end + 2) & 0xffff].contains(&outcome.state.rip);
        count.done += u64::from(inside && *at < outcome.state.rip || cut);
    }
}

/// The engine, and a thread that ends runs which take too long.
struct Watched {
    engine: Engine,
    translator: Engine,
    running: Arc<AtomicU64>,
}

impl Watched {
    fn new() -> Self {
        let engine = Engine::new();
        let translator = Engine::with_tier(Tier::Translator);
        let running = Arc::new(AtomicU64::new(0));
        let weak = Arc::downgrade(&running);
        let platforms = [engine.platform(), translator.platform()];
        let mut clock = 0;
        // SAFETY: the calling thread exists; stores the id of its processor-time clock.
        let known =
            unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) } == 0;
        std::thread::spawn(move || {
            let (mut last, mut since) = (0, 0);
            if !known {
                return;
            }
            loop {
                std::thread::sleep(Duration::from_secs(1));
                let Some(running) = weak.upgrade() else { return };
                let now = running.load(Ordering::Relaxed);
                let seconds = seconds_of(clock);
                if now != last {
                    (last, since) = (now, seconds);
                } else if now % 2 == 1 && seconds >= since + 5 {
                    // Odd: a case is running, and has been for five seconds of processor time.
                    platforms.iter().for_each(|platform| UserMachine::is_stuck(platform));
                    since = seconds;
                }
            }
        });
        Self { engine, translator, running }
    }

    /// The translator against the interpreter; where the code is still what it was, once more, from blocks that have
    /// been made and linked.
    fn translated(&mut self, case: &Case, ours: &Outcome) -> Vec<String> {
        if case.compat != 0 {
            return Vec::new();
        }
        for again in [false, true, true] {
            if again && !self.translator.is_intact(case) {
                break;
            }
            self.running.fetch_add(1, Ordering::Relaxed);
            let outcome =
                if again { self.translator.again(case) } else { self.translator.run(case) };
            self.running.fetch_add(1, Ordering::Relaxed);
            let mut lines = match outcome {
                None => vec!["the translator does not end it, or shut down".into()],
                Some(outcome) => compare::between_tiers(case, ours, &outcome),
            };
            if !lines.is_empty() {
                if again {
                    lines.push("from linked blocks".into());
                }
                return lines;
            }
        }
        Vec::new()
    }

    /// The engine against itself: other ways to run the same code.
    fn consistent(&mut self, case: &Case, ours: &Outcome) -> Vec<String> {
        let mut lines = self.translated(case, ours);
        // A few cases only; which ones does not matter as long as it is always the same.
        let again = case.data_seed.is_multiple_of(8) && self.engine.is_intact(case);
        if again {
            self.running.fetch_add(1, Ordering::Relaxed);
            let second = self.engine.again(case);
            self.running.fetch_add(1, Ordering::Relaxed);
            if !second.is_some_and(|second| second.same(ours)) {
                lines.push("the engine ends otherwise when it runs its decoded code again".into());
            }
        }
        // Single steps in the middle of instructions are a matter of TF.
        if case.data_seed % 32 == 1 {
            self.running.fetch_add(1, Ordering::Relaxed);
            let stepped = self.engine.trace(case, &mut |_| {});
            self.running.fetch_add(1, Ordering::Relaxed);
            if !stepped.is_some_and(|stepped| stepped.same(ours)) {
                lines.push(
                    "the engine ends otherwise when it runs one instruction at a time".into(),
                );
            }
        }
        lines
    }

    fn run(&mut self, case: &Case) -> Option<Outcome> {
        self.running.fetch_add(1, Ordering::Relaxed);
        let outcome = self.engine.run(case);
        self.running.fetch_add(1, Ordering::Relaxed);
        outcome
    }
}

/// Seconds on `clock`; 0 if it is gone.
fn seconds_of(clock: libc::clockid_t) -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: stores into a local.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec
}

/// Everything one needs to know about a case that differs: the last code that is needed to make it
/// differ, and a text.
fn report(
    head: &str,
    engine: &mut Watched,
    native: &mut Native,
    generated: &Generated,
    outcome: Option<&Outcome>,
    problem: Vec<String>,
) -> (String, String) {
    let mut text = format!("=== {head}\n");
    let first = problem.first().cloned();
    let small = minimise(engine, native, &generated.case);
    let (case, problem, outcome) = match &small {
        Some((case, problem, outcome)) => (case, problem, Some(outcome)),
        None => (&generated.case, &problem, outcome),
    };
    let mut formatter = IntelFormatter::new();
    let end = outcome.map(|o| o.state.rip);
    let mut key = String::from("nothing");
    for insn in compare::instructions(case) {
        if insn.code() == Code::Nopd && insn.len() == 1 {
            continue;
        }
        let mut line = String::new();
        formatter.format(&insn, &mut line);
        let at = (insn.ip() - case.state.rip) as usize;
        let bytes = &case.code[at..at + insn.len()];
        if insn.code() != Code::Int3 && end.is_none_or(|end| insn.ip() <= end) {
            key = format!("{:?}", insn.code());
        }
        let mark = if Some(insn.ip()) == end { ">" } else { " " };
        let _ = writeln!(text, "{mark} {:#x}  {line:40} {:?} {bytes:02x?}", insn.ip(), insn.code());
    }
    if small.is_some() {
        let _ = writeln!(text, "  (minimised; in full: {})", first.unwrap_or_default());
    }
    for line in problem {
        let _ = writeln!(text, "  {line}");
    }
    if let Some(outcome) = outcome {
        let _ = writeln!(
            text,
            "  host: {} error {:#x} at {:#x}, rip {:#x}",
            vector_name(outcome.vector),
            outcome.error,
            outcome.address,
            outcome.state.rip
        );
    }
    let x = &case.state.xsave;
    let word = |at: usize| u16::from_le_bytes([x[at], x[at + 1]]);
    let _ = writeln!(
        text,
        "  before: rflags {:#x} fcw {:#x} fsw {:#x} ftw {:#x} mxcsr {:#x}",
        case.state.rflags,
        word(0),
        word(2),
        x[4],
        word(24)
    );
    for (i, (name, value)) in GPR.iter().zip(case.state.gpr).enumerate() {
        let separator = if i % 4 == 3 { "\n" } else { "" };
        let _ = write!(text, "  {name}={value:#x}{separator}");
    }
    if std::env::var_os("FUZZ_VECTORS").is_some() {
        for i in 0..16 {
            let bytes = |at: usize, n: usize| {
                x[at..at + n].iter().rev().fold(String::new(), |s, b| s + &format!("{b:02x}"))
            };
            let st = if i < 8 { bytes(32 + i * 16, 10) } else { String::new() };
            let _ = writeln!(
                text,
                "  ymm{i} {} {} {st}",
                bytes(576 + i * 16, 16),
                bytes(160 + i * 16, 16)
            );
        }
    }
    (key, text)
}

/// Replaces instructions by NOPs as long as there is a difference.
fn minimise(
    engine: &mut Watched,
    native: &mut Native,
    case: &Case,
) -> Option<(Case, Vec<String>, Outcome)> {
    let mut best = None;
    let mut current = *case;
    for insn in compare::instructions(case) {
        let at = (insn.ip() - case.state.rip) as usize;
        let mut smaller = current;
        smaller.code[at..at + insn.len()].fill(0x90);
        let Ok(outcomes) = native.run(&[smaller]) else { return best };
        let Some(outcome) = outcomes.into_iter().next().flatten() else { continue };
        if outcome.vector == 17 {
            // Alignment checks are on now: what kept them off is gone.
            continue;
        }
        let problem = judge(engine, &smaller, &outcome);
        if !problem.is_empty() {
            current = smaller;
            best = Some((smaller, problem, outcome));
        }
    }
    best
}
