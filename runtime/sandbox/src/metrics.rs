//! What is counted over all machines of this host: boots, how long their phases took, and ends.
//!
//! One small file in the run directory, which whoever starts or ends a machine brings up to date under a
//! lock. It is gone with the host's restart. What cannot be counted is no reason for a machine not to start.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::layout::{Layout, open_lock};
use crate::timings::Span;

/// Version of the file's form. A file of another one is begun anew.
const VERSION: u32 = 1;

/// Upper bounds of the classes of boot times, in milliseconds.
pub const BOUNDS_MS: [u64; 12] =
    [10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000];

/// What was counted since the host's start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    version: u32,
    /// By engine.
    #[serde(default)]
    pub boots: BTreeMap<String, Boots>,
    /// Machines that ended, by [`End`].
    #[serde(default)]
    pub ends: BTreeMap<String, u64>,
}

/// What one engine booted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boots {
    /// Starts that failed.
    pub failed: u64,
    /// How long the others took.
    pub total: Histogram,
    /// How long their phases took, by what was reached.
    pub phases: BTreeMap<String, Sum>,
}

/// Durations by class.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// How many were not longer than the bound of the same index and longer than the one before.
    pub classes: [u64; BOUNDS_MS.len()],
    /// All.
    pub sum: Sum,
}

/// Durations in sum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    /// How many.
    pub count: u64,
    /// In microseconds.
    pub micros: u64,
}

/// How a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// What ran in it was over, or somebody ended it.
    Finished,
    /// A memory limit ended its process.
    OutOfMemory,
    /// It ended by itself, for a reason of its own.
    Failed,
}

impl End {
    fn word(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::OutOfMemory => "out_of_memory",
            Self::Failed => "failed",
        }
    }
}

impl Default for Counters {
    fn default() -> Self {
        Self { version: VERSION, boots: BTreeMap::new(), ends: BTreeMap::new() }
    }
}

impl Sum {
    fn add(&mut self, took: Duration) {
        self.count = self.count.saturating_add(1);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.micros = self.micros.saturating_add(micros);
    }
}

impl Histogram {
    fn add(&mut self, took: Duration) {
        let class = BOUNDS_MS.iter().position(|bound| took <= Duration::from_millis(*bound));
        if let Some(count) = class.and_then(|class| self.classes.get_mut(class)) {
            *count = count.saturating_add(1);
        }
        self.sum.add(took);
    }
}

impl Counters {
    /// What was counted so far; nothing if nobody has counted, or not in this form.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn load(layout: &Layout) -> io::Result<Self> {
        match fs::read(layout.metrics_file()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            read => Ok(Self::parse(&read?)),
        }
    }

    fn parse(bytes: &[u8]) -> Self {
        let parsed = serde_json::from_slice::<Self>(bytes);
        parsed.ok().filter(|counters| counters.version == VERSION).unwrap_or_default()
    }

    fn save(&self, path: &Path) -> io::Result<()> {
        let next = path.with_extension("next");
        File::create(&next)?.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(&next, path)
    }

    /// A machine is ready after `took`; `spans` are its phases.
    pub fn booted(&mut self, engine: &str, took: Duration, spans: &[Span]) {
        let boots = self.boots.entry(engine.to_owned()).or_default();
        boots.total.add(took);
        for span in spans {
            let took = Duration::try_from_secs_f64(span.ms / 1e3).unwrap_or_default();
            boots.phases.entry(span.phase.replace(' ', "_")).or_default().add(took);
        }
    }

    /// A machine could not be started.
    pub fn failed(&mut self, engine: &str) {
        let failed = &mut self.boots.entry(engine.to_owned()).or_default().failed;
        *failed = failed.saturating_add(1);
    }

    /// A machine ended.
    pub fn ended(&mut self, end: End) {
        let count = self.ends.entry(end.word().to_owned()).or_default();
        *count = count.saturating_add(1);
    }
}

/// Counts something. Only the log hears of a failure.
pub fn count(layout: &Layout, change: impl FnOnce(&mut Counters)) {
    if let Err(e) = try_count(layout, change) {
        tracing::debug!("cannot count in {}: {e}", layout.metrics_file().display());
    }
}

fn try_count(layout: &Layout, change: impl FnOnce(&mut Counters)) -> io::Result<()> {
    let path = layout.metrics_file();
    let lock = open_lock(&path.with_extension("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
    let mut counters = Counters::load(layout)?;
    change(&mut counters);
    counters.save(&path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(dir: &tempfile::TempDir) -> Layout {
        let layout = Layout::at(dir.path());
        layout.prepare().unwrap();
        layout
    }

    #[test]
    fn what_several_count_at_once_adds_up() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(&dir);
        assert_eq!(Counters::load(&layout).unwrap(), Counters::default());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        try_count(&layout, |c| c.ended(End::Finished)).unwrap();
                    }
                });
            }
        });
        assert_eq!(Counters::load(&layout).unwrap().ends["finished"], 80);
    }

    #[test]
    fn boots_are_classed_by_time_and_phase() {
        let mut counters = Counters::default();
        let span = |phase, ms| Span { phase, ms, at_ms: ms, monitor_cpu_ms: None };
        for ms in [10, 11, 400, 70_000] {
            let spans = [span("kernel up", 2.5), span("agent ready", 1.0)];
            counters.booted("emu", Duration::from_millis(ms), &spans);
        }
        counters.failed("kvm");
        let emu = &counters.boots["emu"];
        assert_eq!(emu.total.classes[..6], [1, 1, 0, 0, 0, 1]);
        assert_eq!(emu.total.sum, Sum { count: 4, micros: 70_421_000 });
        assert_eq!(emu.phases["kernel_up"], Sum { count: 4, micros: 10_000 });
        assert_eq!((counters.boots["kvm"].failed, emu.failed), (1, 0));
        let bytes = serde_json::to_vec(&counters).unwrap();
        assert_eq!(Counters::parse(&bytes), counters);
        for other in ["", "{}", "{\"version\":9}"] {
            assert_eq!(Counters::parse(other.as_bytes()), Counters::default());
        }
    }
}
