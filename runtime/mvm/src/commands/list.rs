//! `mvm ps` and `mvm inspect`.

use mvm_sandbox::ops;
use mvm_sandbox::recover::refresh;
use mvm_sandbox::state::{State, human_duration, now_ms};
use serde_json::{Value, json};

use super::Context;
use crate::cli::{Format, NamesArgs, PsArgs};
use crate::output::{complain, line, print, table};

/// Longest command that the table shows.
const COMMAND: usize = 30;

pub fn ps(context: &Context, args: &PsArgs) -> anyhow::Result<()> {
    let registry = context.registry()?;
    registry.sweep_logs().map_err(mvm_sandbox::Error::from)?;
    let now = now_ms();
    let mut rows = Vec::new();
    for entry in registry.list().map_err(mvm_sandbox::Error::from)? {
        let id = entry.place.id.clone();
        let refreshed = entry
            .state
            .map_err(mvm_sandbox::Error::from)
            .and_then(|state| refresh(&entry.place, state));
        let state = match refreshed {
            Ok(state) => state,
            // Removed while we looked.
            Err(_) if !entry.place.dir.exists() => continue,
            Err(e) => {
                complain(&format!("container {id}: {e}"));
                continue;
            }
        };
        if !args.all && !state.is_live() {
            continue;
        }
        match (args.quiet, args.format) {
            (true, _) => line(&id)?,
            (false, Format::Json) => line(&with_status(&state, now)?.to_string())?,
            (false, Format::Table) => rows.push(row(&state, now)),
        }
    }
    if !args.quiet && args.format == Format::Table {
        let header = ["CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "ENGINE", "NAME"];
        print(&table(&header, &rows))?;
    }
    Ok(())
}

fn row(state: &State, now: u64) -> Vec<String> {
    let mut command: String = state.command.join(" ").chars().take(COMMAND + 1).collect();
    if command.chars().count() > COMMAND {
        command = command.chars().take(COMMAND - 1).collect();
        command.push('…');
    }
    vec![
        state.id.clone(),
        // The user's text, which must not move the cursor.
        state.image.replace(char::is_control, "?"),
        command.replace(char::is_control, "?"),
        format!("{} ago", human_duration(now.saturating_sub(state.created))),
        state.describe(now),
        match state.engine.fallback {
            true => format!("{} (fallback)", state.engine.name),
            false => state.engine.name.clone(),
        },
        state.name.clone(),
    ]
}

fn with_status(state: &State, now: u64) -> anyhow::Result<Value> {
    let mut value = serde_json::to_value(state)?;
    value["description"] = state.describe(now).into();
    Ok(value)
}

pub fn inspect(context: &Context, args: &NamesArgs) -> anyhow::Result<()> {
    let registry = context.registry()?;
    let mut all = Vec::new();
    for name in &args.containers {
        let found = ops::find(&registry, name)?;
        let mut value = with_status(&found.state, now_ms())?;
        value["directories"] = json!({ "state": found.place.dir, "logs": found.place.logs });
        // Of a machine that runs: it may have changed since it was started.
        if found.state.is_live()
            && let Ok(status) = found.control().and_then(|mut control| Ok(control.status()?))
        {
            value["memory_size"] = serde_json::to_value(status.memory)?;
        }
        value["spec"] = match found.spec() {
            Ok(spec) => serde_json::to_value(spec)?,
            Err(_) => Value::Null,
        };
        all.push(value);
    }
    line(&serde_json::to_string_pretty(&all)?)
}
