//! Commands that change what containers do: stop, kill, pause, unpause, wait, rm.

use std::time::Duration;

use mvm_sandbox::ops::{self, Found};
use mvm_sandbox::registry::Registry;
use mvm_sandbox::spec::{parse_size, signal_number};
use mvm_sandbox::{EXIT_FAILURE, Error};

use super::Context;
use crate::cli::{KillArgs, NamesArgs, RmArgs, StopArgs, UpdateArgs};
use crate::output::{complain, line};

/// Memory comes and goes in pieces of this many bytes.
const PIECE: u64 = 2 << 20;

/// Does the same to each, goes on after a failure, and prints the names of those that it was done
/// to.
fn each(
    registry: &Registry,
    names: &[String],
    mut act: impl FnMut(&str, Found) -> Result<(), Error>,
) -> anyhow::Result<i32> {
    let mut code = 0;
    for name in names {
        match ops::find(registry, name).and_then(|found| act(name, found)) {
            Ok(()) => line(name)?,
            Err(e) => {
                complain(&e.to_string());
                code = EXIT_FAILURE;
            }
        }
    }
    Ok(code)
}

pub fn stop(context: &Context, args: &StopArgs) -> anyhow::Result<i32> {
    each(&context.registry()?, &args.containers, |_, mut found| {
        let seconds = args.time.unwrap_or(found.state.stop_timeout);
        found.stop(Duration::from_secs(seconds.into()))
    })
}

pub fn kill(context: &Context, args: &KillArgs) -> anyhow::Result<i32> {
    let signal = signal_number(&args.signal).map_err(Error::from)?;
    each(&context.registry()?, &args.containers, |_, found| found.kill(signal))
}

pub fn pause(context: &Context, args: &NamesArgs) -> anyhow::Result<i32> {
    each(&context.registry()?, &args.containers, |_, mut found| found.pause())
}

pub fn unpause(context: &Context, args: &NamesArgs) -> anyhow::Result<i32> {
    each(&context.registry()?, &args.containers, |_, mut found| found.resume())
}

pub fn update(context: &Context, args: &UpdateArgs) -> anyhow::Result<i32> {
    let bytes = parse_size(&args.memory).map_err(Error::from)?;
    each(&context.registry()?, &args.containers, |_, found| {
        let now = found.resize(bytes)?.now;
        if now > bytes.next_multiple_of(PIECE) {
            let (has, asked) = (now >> 20, bytes >> 20);
            complain(&format!(
                "container {} keeps {has} MiB of memory for now, of which {asked} MiB were to be left: what it was started \
                 with stays, and of the rest what the guest cannot do without",
                found.state.name
            ));
        }
        Ok(())
    })
}

pub fn wait(context: &Context, args: &NamesArgs) -> anyhow::Result<i32> {
    let registry = context.registry()?;
    let mut code = 0;
    for name in &args.containers {
        match ops::find(&registry, name).and_then(|mut found| found.wait_until(None)) {
            Ok(Some(ending)) => line(&ending.exit_code.to_string())?,
            // Without a deadline there is always an end.
            Ok(None) => code = EXIT_FAILURE,
            Err(e) => {
                complain(&e.to_string());
                code = EXIT_FAILURE;
            }
        }
    }
    Ok(code)
}

pub fn rm(context: &Context, args: &RmArgs) -> anyhow::Result<i32> {
    let registry = context.registry()?;
    let mut code = 0;
    for name in &args.containers {
        match ops::remove(&registry, name, args.force) {
            Ok(()) => line(name)?,
            Err(e) => {
                complain(&e.to_string());
                code = EXIT_FAILURE;
            }
        }
    }
    Ok(code)
}
