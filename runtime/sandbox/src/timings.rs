//! When the phases of a run were reached.

use std::time::Duration;

use mvm_vmm::monitor::{Phase, PhaseMark};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use serde::Serialize;

/// The moments of one run, in nanoseconds of the host's CLOCK_MONOTONIC.
#[derive(Debug, Clone)]
pub struct Timings {
    begin: u64,
    marks: Vec<Mark>,
    /// CPU clock of the monitor, once there is one.
    monitor: Option<ClockId>,
}

#[derive(Debug, Clone, Copy)]
struct Mark {
    phase: &'static str,
    at_ns: u64,
    monitor_cpu_ns: Option<u64>,
}

/// One phase: the time from the phase before it until it was reached.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Span {
    /// What was reached.
    pub phase: &'static str,
    /// Milliseconds since the phase before it.
    pub ms: f64,
    /// Milliseconds since the beginning.
    pub at_ms: f64,
    /// CPU time of the monitor until then in milliseconds, where it could be read.
    pub monitor_cpu_ms: Option<f64>,
}

/// Now, in nanoseconds of CLOCK_MONOTONIC.
pub fn monotonic_ns() -> u64 {
    read(ClockId::CLOCK_MONOTONIC).unwrap_or(0)
}

/// A clock in nanoseconds.
fn read(clock: ClockId) -> Option<u64> {
    let now = Duration::from(nix::time::clock_gettime(clock).ok()?);
    u64::try_from(now.as_nanos()).ok()
}

impl Default for Timings {
    fn default() -> Self {
        Self::start()
    }
}

impl Timings {
    /// A run that begins now.
    pub fn start() -> Self {
        Self { begin: monotonic_ns(), marks: Vec::new(), monitor: None }
    }

    /// `phase` is reached now.
    pub fn mark(&mut self, phase: &'static str) {
        let monitor_cpu_ns = self.monitor.and_then(read);
        self.marks.push(Mark { phase, at_ns: monotonic_ns(), monitor_cpu_ns });
    }

    /// From now on phases carry the CPU time of the monitor `pid`.
    pub fn watch(&mut self, pid: Pid) {
        self.monitor = clock_getcpuclockid(pid).ok();
    }

    /// A phase that the monitor saw.
    pub fn mark_monitor(&mut self, mark: PhaseMark) {
        let name = match mark.phase {
            Phase::Monitor => "monitor",
            Phase::KernelPlaced => "kernel placed",
            Phase::KernelUp => "kernel up",
            // The agent is ready when it has said hello, which is marked here on the host.
            Phase::GuestHello | Phase::Ended => return,
        };
        let monitor_cpu_ns = Some(mark.cpu_ns);
        self.marks.push(Mark { phase: name, at_ns: mark.at_ns, monitor_cpu_ns });
    }

    /// All phases in the order of time.
    pub fn spans(&self) -> Vec<Span> {
        let mut marks = self.marks.clone();
        marks.sort_by_key(|mark| mark.at_ns);
        // Far below 2^52, so exact to the nanosecond.
        #[allow(clippy::cast_precision_loss)]
        let ms = |ns: u64| ns as f64 / 1e6;
        let mut before = self.begin;
        let mut spans = Vec::new();
        for Mark { phase, at_ns, monitor_cpu_ns } in marks {
            spans.push(Span {
                phase,
                ms: ms(at_ns.saturating_sub(before)),
                at_ms: ms(at_ns.saturating_sub(self.begin)),
                monitor_cpu_ms: monitor_cpu_ns.map(ms),
            });
            before = at_ns;
        }
        spans
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_come_in_the_order_of_time() {
        let mut timings = Timings { begin: 1_000_000, marks: Vec::new(), monitor: None };
        let ready = Mark { phase: "agent ready", at_ns: 9_000_000, monitor_cpu_ns: None };
        timings.marks.push(ready);
        let mark = |phase, at_ns| PhaseMark { phase, at_ns, cpu_ns: 500_000 };
        timings.mark_monitor(mark(Phase::KernelPlaced, 3_000_000));
        timings.mark_monitor(mark(Phase::Ended, 4_000_000));
        let spans = timings.spans();
        let short: Vec<_> =
            spans.iter().map(|s| (s.phase, s.ms, s.at_ms, s.monitor_cpu_ms)).collect();
        assert_eq!(
            short,
            [("kernel placed", 2.0, 2.0, Some(0.5)), ("agent ready", 6.0, 8.0, None)]
        );
    }
}
