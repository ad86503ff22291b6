//! `mvm stats`: what containers cost the host and what they use in the guest.

use std::collections::BTreeMap;

use mvm_agent_protocol::messages::StatsResponse;
use mvm_agent_protocol::rpc::Code;
use mvm_sandbox::Error;
use mvm_sandbox::guest::Guest;
use mvm_sandbox::ops::{self, Found};
use mvm_sandbox::state::Status;
use mvm_vmm::monitor::Stats;
use serde_json::{Value, json};

use super::Context;
use crate::cli::{Format, StatsArgs};
use crate::output::{complain, line, print, size, table};

pub fn stats(context: &Context, args: &StatsArgs) -> anyhow::Result<()> {
    let registry = context.registry()?;
    let all = args.containers.is_empty();
    let names = if all {
        let entries = registry.list().map_err(Error::from)?;
        entries.into_iter().map(|e| e.place.id).collect()
    } else {
        args.containers.clone()
    };
    let mut rows = Vec::new();
    for name in &names {
        let found = match ops::find(&registry, name) {
            Ok(found) => found,
            // Of those that were not asked for, one may have gone meanwhile.
            Err(_) if all => continue,
            Err(e) => return Err(e.into()),
        };
        if all && !matches!(found.state.status, Status::Running | Status::Paused) {
            continue;
        }
        match gather(&found) {
            Ok(figures) => rows.push(figures),
            Err(e) if all => complain(&format!("container {}: {e}", found.state.name)),
            Err(e) => return Err(e.into()),
        }
    }
    if args.format == Format::Json {
        for row in &rows {
            line(&row.to_string())?;
        }
        return Ok(());
    }
    let header =
        ["NAME", "CPU TIME", "HOST MEMORY", "GUEST RAM", "OVERHEAD", "MEMORY USED", "PIDS"];
    let cells: Vec<Vec<String>> = rows.iter().flat_map(cells).collect();
    print(&table(&header, &cells))
}

fn gather(found: &Found) -> Result<Value, Error> {
    let machine = found.control()?.stats()?;
    let mut figures = json!({
        "id": found.state.id,
        "name": found.state.name,
        "memory": memory(found, &machine),
        "host": on_host(&machine),
        "engine": machine.engine.into_iter().collect::<BTreeMap<_, _>>(),
        "devices": machine.devices.into_iter().collect::<BTreeMap<_, _>>(),
    });
    // The guest of a paused container does not answer, and one without agent never.
    if found.state.status == Status::Running && !found.state.bare {
        figures["guest"] = in_guest(&found.guest()?)?;
    }
    Ok(figures)
}

/// RAM that the guest has. One whose monitor does not say so, because it is of an older mvm, has as much as at its start.
pub fn memory(found: &Found, machine: &Stats) -> u64 {
    if machine.memory.now == 0 { found.state.memory } else { machine.memory.now }
}

/// What the guest says of what runs in it.
fn in_guest(guest: &Guest) -> Result<Value, Error> {
    if let Some(stats) = if_there(guest.stats())? {
        return Ok(of_group(&stats));
    }
    // A pod's machine: its containers have ids of their own.
    let mut containers = BTreeMap::new();
    for id in guest.containers()? {
        // One may have ended meanwhile.
        if let Some(stats) = if_there(guest.of(&id).stats())? {
            containers.insert(id, stats);
        }
    }
    let info = guest.info()?;
    let mut figures = of_pod(&containers);
    figures["memory_total"] = info.memory_total_bytes.into();
    figures["memory_available"] = info.memory_available_bytes.into();
    Ok(figures)
}

/// Nothing where the guest knows no such container.
fn if_there(stats: Result<StatsResponse, Error>) -> Result<Option<StatsResponse>, Error> {
    match stats {
        Err(Error::Agent(e)) if e.code() == Some(Code::NOT_FOUND) => Ok(None),
        other => other.map(Some),
    }
}

fn of_group(stats: &StatsResponse) -> Value {
    json!({
        "cpu": stats.cpu,
        "memory_current": stats.memory_current,
        "memory_peak": stats.memory_peak,
        "memory_events": stats.memory_events,
        "pids": stats.pids_current,
    })
}

/// The containers, and what they use together.
fn of_pod(containers: &BTreeMap<String, StatsResponse>) -> Value {
    let mut cpu: BTreeMap<&str, u64> = BTreeMap::new();
    for (key, value) in containers.values().flat_map(|stats| &stats.cpu) {
        let sum = cpu.entry(key).or_default();
        *sum = sum.saturating_add(*value);
    }
    let sum = |figure: fn(&StatsResponse) -> u64| {
        containers.values().map(figure).fold(0u64, u64::saturating_add)
    };
    json!({
        "cpu": cpu,
        "memory_current": sum(|stats| stats.memory_current),
        "pids": sum(|stats| stats.pids_current),
        "containers": containers.iter().map(|(id, stats)| (id.clone(), of_group(stats))).collect::<BTreeMap<_, _>>(),
    })
}

/// What a machine costs the host.
pub fn on_host(machine: &Stats) -> Value {
    json!({
        "cpu_seconds": machine.cpu_time.as_secs_f64(),
        "vcpu_seconds":
            machine.vcpu_time.iter().map(std::time::Duration::as_secs_f64).collect::<Vec<_>>(),
        "resident": machine.resident,
        "guest_resident": machine.guest_resident,
        "overhead": machine.overhead,
    })
}

/// A line for the machine, and one for each container of a pod.
fn cells(figures: &Value) -> Vec<Vec<String>> {
    let bytes =
        |pointer: &str| figures.pointer(pointer).and_then(Value::as_u64).map_or("-".into(), size);
    let mut lines = vec![vec![
        figures["name"].as_str().unwrap_or_default().to_owned(),
        format!("{:.2}s", figures["host"]["cpu_seconds"].as_f64().unwrap_or_default()),
        bytes("/host/resident"),
        format!("{} of {}", bytes("/host/guest_resident"), bytes("/memory")),
        bytes("/host/overhead"),
        bytes("/guest/memory_current"),
        count(&figures["guest"]["pids"]),
    ]];
    let containers = figures["guest"]["containers"].as_object();
    for (id, inside) in containers.into_iter().flatten() {
        let nothing = || "-".to_owned();
        lines.push(vec![
            format!("  {}", short(id)),
            guest_time(&inside["cpu"]["usage_usec"]),
            nothing(),
            nothing(),
            nothing(),
            inside["memory_current"].as_u64().map_or_else(nothing, size),
            count(&inside["pids"]),
        ]);
    }
    lines
}

fn count(figure: &Value) -> String {
    figure.as_u64().map_or("-".into(), |n| n.to_string())
}

/// Microseconds as seconds.
#[allow(clippy::cast_precision_loss)] // Far below 2^52 microseconds.
fn guest_time(micros: &Value) -> String {
    micros.as_u64().map_or("-".into(), |micros| format!("{:.2}s", micros as f64 / 1e6))
}

/// As much of an id as `crictl` shows. It is the guest's word, which must not move the cursor.
fn short(id: &str) -> String {
    let whole = if id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()) { 13 } else { 128 };
    id.chars().take(whole).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(cpu: u64, memory: u64) -> StatsResponse {
        StatsResponse {
            cpu: [("usage_usec".to_owned(), cpu)].into(),
            memory_current: memory,
            pids_current: 2,
            ..StatsResponse::default()
        }
    }

    #[test]
    fn a_pod_is_its_containers_and_what_they_use_together() {
        let id = "0123456789abcdef".repeat(4);
        let all =
            [(id, stats(1_500_000, 1 << 20)), ("x\u{1b}[2J".into(), stats(u64::MAX, 2 << 20))];
        let guest = of_pod(&all.into());
        assert_eq!(guest["cpu"]["usage_usec"], u64::MAX, "hostile figures do no harm");
        assert_eq!(
            (guest["memory_current"].as_u64(), guest["pids"].as_u64()),
            (Some(3 << 20), Some(4))
        );
        let figures = json!({
            "name": "k8s.io.pod", "memory": 512 << 20, "guest": guest,
            "host": { "cpu_seconds": 2.5, "resident": 5 << 20, "guest_resident": 4 << 20, "overhead": 1 << 20 },
        });
        let lines = cells(&figures);
        assert_eq!(lines[0].join(" "), "k8s.io.pod 2.50s 5.0MiB 4.0MiB of 512MiB 1.0MiB 3.0MiB 4");
        assert_eq!(lines[1].join(" "), "  0123456789abc 1.50s - - - 1.0MiB 2");
        assert!(lines[2][0] == "  x?[2J" && lines.len() == 3, "{lines:?}");
    }

    #[test]
    fn a_machine_with_one_container_is_one_line() {
        let figures = json!({ "name": "web", "guest": of_group(&stats(1, 1 << 20)) });
        assert_eq!(cells(&figures).len(), 1);
        assert_eq!(cells(&json!({ "name": "bare" }))[0][5..], ["-", "-"]);
    }
}
