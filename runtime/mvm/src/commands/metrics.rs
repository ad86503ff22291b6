//! `mvm metrics`: figures of this host's machines in the text form of Prometheus.
//!
//! The form: "Exposition formats" of Prometheus' documentation, version 0.0.4 of the text format.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use mvm_sandbox::Error;
use mvm_sandbox::metrics::{BOUNDS_MS, Counters};
use mvm_sandbox::ops::{self, Found};
use mvm_sandbox::state::Status;
use mvm_vmm::monitor::Stats;

use super::Context;
use crate::cli::MetricsArgs;
use crate::output::print;

pub fn metrics(context: &Context, args: &MetricsArgs) -> anyhow::Result<()> {
    let registry = context.registry()?;
    let counters = Counters::load(&context.layout).context("cannot read what was counted")?;
    let entries = registry.list().map_err(Error::from)?;
    let mut machines = Vec::new();
    for entry in entries {
        // One may have gone meanwhile.
        let Ok(found) = ops::find(&registry, &entry.place.id) else { continue };
        if found.state.is_live() {
            // One that does not answer is there all the same.
            let stats = found.control().and_then(|mut c| Ok(c.stats()?)).ok();
            machines.push((found, stats));
        }
    }
    let text = page(&counters, &machines);
    match &args.output {
        None => print(&text),
        Some(path) => {
            replace(path, &text).with_context(|| format!("cannot write {}", path.display()))
        }
    }
}

/// In one step: who reads the file sees the old or the new one.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    // Collectors read what ends like the file itself.
    name.push(".next");
    let next = path.with_file_name(name);
    File::create(&next)?.write_all(text.as_bytes())?;
    fs::rename(&next, path)
}

/// A page of metrics.
#[derive(Debug, Default)]
struct Page(String);

impl Page {
    /// Begins a metric.
    fn metric(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels: Vec<_> =
            labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
        let labels =
            if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }
}

/// Label values, which may be an image's or a user's words.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn page(counters: &Counters, machines: &[(Found, Option<Stats>)]) -> String {
    let mut page = Page::default();
    of_host(&mut page, counters);
    of_machines(&mut page, machines);
    page.0
}

#[allow(clippy::cast_precision_loss)] // Far below 2^52 microseconds.
fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

fn of_host(page: &mut Page, counters: &Counters) {
    let name = "mvm_boot_seconds";
    page.metric(name, "histogram", "Time from the start of a machine until its guest was ready.");
    for (engine, boots) in &counters.boots {
        let mut below = 0;
        let bucket = format!("{name}_bucket");
        for (bound, count) in BOUNDS_MS.iter().zip(boots.total.classes) {
            below += count;
            let bound = seconds(bound * 1000).to_string();
            page.sample(&bucket, &[("engine", engine), ("le", &bound)], below);
        }
        let sum = boots.total.sum;
        page.sample(&bucket, &[("engine", engine), ("le", "+Inf")], sum.count);
        page.sample(&format!("{name}_sum"), &[("engine", engine)], seconds(sum.micros));
        page.sample(&format!("{name}_count"), &[("engine", engine)], sum.count);
    }
    let name = "mvm_boot_phase_seconds";
    page.metric(
        name,
        "summary",
        "Time until a phase of the start was reached, since the one before.",
    );
    for (engine, boots) in &counters.boots {
        for (phase, sum) in &boots.phases {
            let labels = [("engine", engine.as_str()), ("phase", phase)];
            page.sample(&format!("{name}_sum"), &labels, seconds(sum.micros));
            page.sample(&format!("{name}_count"), &labels, sum.count);
        }
    }
    let name = "mvm_boot_failures_total";
    page.metric(name, "counter", "Machines that could not be started.");
    for (engine, boots) in &counters.boots {
        page.sample(name, &[("engine", engine)], boots.failed);
    }
    let name = "mvm_machines_ended_total";
    page.metric(
        name,
        "counter",
        "Machines that ended: finished, out_of_memory, or failed by themselves.",
    );
    for (how, count) in &counters.ends {
        page.sample(name, &[("how", how)], count);
    }
}

/// Name, kind, help and value of what each machine tells.
type Gauge = (&'static str, &'static str, &'static str, fn(&Stats) -> f64);

#[allow(clippy::cast_precision_loss)] // Bytes of memory are far below 2^52.
const GAUGES: [Gauge; 4] = [
    (
        "mvm_machine_cpu_seconds_total",
        "counter",
        "Processor time of the host that the machine used.",
        |s| s.cpu_time.as_secs_f64(),
    ),
    (
        "mvm_machine_resident_bytes",
        "gauge",
        "Memory of the host that the machine holds, its guest's RAM included.",
        |s| s.resident as f64,
    ),
    (
        "mvm_machine_guest_resident_bytes",
        "gauge",
        "RAM of the guest that the host has pages for.",
        |s| s.guest_resident as f64,
    ),
    (
        "mvm_machine_overhead_bytes",
        "gauge",
        "Memory that engine and devices need for themselves.",
        |s| s.overhead as f64,
    ),
];

fn of_machines(page: &mut Page, machines: &[(Found, Option<Stats>)]) {
    let mut by_state: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for (found, _) in machines {
        let status = match found.state.status {
            Status::Creating => "creating",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Exited => "exited",
        };
        *by_state.entry((found.state.engine.name.as_str(), status)).or_default() += 1;
    }
    page.metric("mvm_machines", "gauge", "Machines by engine and state.");
    for ((engine, status), count) in by_state {
        page.sample("mvm_machines", &[("engine", engine), ("state", status)], count);
    }
    let label = |found: &Found, key| found.state.labels.get(key).cloned().unwrap_or_default();
    page.metric("mvm_machine_info", "gauge", "What a machine is; the value is always 1.");
    for (found, _) in machines {
        let state = &found.state;
        let namespace = label(found, containerd_shim_mvm::vm::LABEL_NAMESPACE);
        let container = label(found, containerd_shim_mvm::vm::LABEL_ID);
        let fallback = if state.engine.fallback { "true" } else { "false" };
        let labels = [
            ("id", state.id.as_str()),
            ("name", &state.name),
            ("image", &state.image),
            ("engine", &state.engine.name),
            ("fallback", fallback),
            ("containerd_namespace", &namespace),
            ("containerd_id", &container),
        ];
        page.sample("mvm_machine_info", &labels, 1);
    }
    let name = "mvm_machine_memory_bytes";
    page.metric(name, "gauge", "RAM that the guest has.");
    for (found, stats) in machines {
        // One that has not answered had as much at its start.
        let memory = stats.as_ref().map_or(found.state.memory, |s| super::stats::memory(found, s));
        page.sample(name, &[("id", &found.state.id)], memory);
    }
    for (name, kind, help, value) in GAUGES {
        page.metric(name, kind, help);
        for (found, stats) in machines {
            if let Some(stats) = stats {
                page.sample(name, &[("id", &found.state.id)], value(stats));
            }
        }
    }
    for (name, help, counts) in [
        (
            "mvm_machine_engine",
            "What the engine counts, exits among it.",
            (|s: &Stats| s.engine.clone()) as fn(&Stats) -> Vec<(String, u64)>,
        ),
        ("mvm_machine_device", "What the devices count.", |s: &Stats| s.devices.clone()),
    ] {
        // Most only grow, some are sizes.
        page.metric(name, "untyped", help);
        for (found, stats) in machines {
            for (what, count) in stats.as_ref().map(counts).unwrap_or_default() {
                page.sample(name, &[("id", &found.state.id), ("counter", &what)], count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mvm_sandbox::metrics::End;

    use super::*;

    #[test]
    fn counters_are_worded_as_prometheus_wants_them() {
        let mut counters = Counters::default();
        for ms in [20, 20, 300_000] {
            counters.booted("emu", Duration::from_millis(ms), &[]);
        }
        counters.ended(End::OutOfMemory);
        let text = page(&counters, &[]);
        for want in [
            "# TYPE mvm_boot_seconds histogram\n",
            "mvm_boot_seconds_bucket{engine=\"emu\",le=\"0.01\"} 0\n",
            "mvm_boot_seconds_bucket{engine=\"emu\",le=\"0.025\"} 2\n",
            "mvm_boot_seconds_bucket{engine=\"emu\",le=\"60\"} 2\n",
            "mvm_boot_seconds_bucket{engine=\"emu\",le=\"+Inf\"} 3\n",
            "mvm_boot_seconds_sum{engine=\"emu\"} 300.04\n",
            "mvm_boot_failures_total{engine=\"emu\"} 0\n",
            "mvm_machines_ended_total{how=\"out_of_memory\"} 1\n",
        ] {
            assert!(text.contains(want), "no {want:?} in\n{text}");
        }
        assert!(text.lines().all(|l| l.starts_with("# ") || l.starts_with("mvm_")), "{text}");
    }

    #[test]
    fn hostile_names_stay_in_their_labels() {
        let mut page = Page::default();
        page.sample("x", &[("a", "b\"} 1\ny{c=\"\\")], 2);
        assert_eq!(page.0, "x{a=\"b\\\"} 1\\ny{c=\\\"\\\\\"} 2\n");
    }

    #[test]
    fn files_are_replaced_in_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mvm.prom");
        replace(&path, "old").unwrap();
        replace(&path, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
