//! `mvm stats`: what containers cost the host and what they use in the guest.

use mvm_sandbox::Error;
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
    let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
    print(&table(&header, &cells))
}

fn gather(found: &Found) -> Result<Value, Error> {
    let machine = found.control()?.stats()?;
    let mut figures = json!({
        "id": found.state.id,
        "name": found.state.name,
        "memory": machine.memory.now,
        "host": on_host(&machine),
        "engine": machine.engine.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        "devices": machine.devices.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
    });
    // The guest of a paused container does not answer, and one without agent never.
    if found.state.status == Status::Running && !found.state.bare {
        let inside = found.guest()?.stats()?;
        figures["guest"] = json!({
            "cpu": inside.cpu,
            "memory_current": inside.memory_current,
            "memory_peak": inside.memory_peak,
            "memory_events": inside.memory_events,
            "pids": inside.pids_current,
        });
    }
    Ok(figures)
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

fn cells(figures: &Value) -> Vec<String> {
    let bytes =
        |pointer: &str| figures.pointer(pointer).and_then(Value::as_u64).map_or("-".into(), size);
    vec![
        figures["name"].as_str().unwrap_or_default().to_owned(),
        format!("{:.2}s", figures["host"]["cpu_seconds"].as_f64().unwrap_or_default()),
        bytes("/host/resident"),
        format!("{} of {}", bytes("/host/guest_resident"), bytes("/memory")),
        bytes("/host/overhead"),
        bytes("/guest/memory_current"),
        figures["guest"]["pids"].as_u64().map_or("-".into(), |n| n.to_string()),
    ]
}
