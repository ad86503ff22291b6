//! `mvm debug`: a console in the guest itself.
//!
//! Nothing of it depends on what the containers allow: it has the guest's processes, network and devices before it, with
//! every capability. That is why the administrator has to allow it, in a file: no flag does.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use mvm_sandbox::guest::{Guest, Stdio, program};
use mvm_sandbox::ops;
use mvm_sandbox::spec::{Console, console};
use mvm_sandbox::{Error, random_id};

use super::Context;
use super::attach::{Attachment, End, stand_by};
use crate::cli::DebugArgs;
use crate::output::{EXIT_CLOSED, complain};
use crate::settings::{Config, Settings};
use crate::signals::Signals;
use crate::terminal::Raw;

/// As for `mvm exec`.
const GRACE: Duration = Duration::from_secs(2);

/// Largest shell in bytes: it travels in one message to the agent, which holds 4 MiB.
const MAX_SHELL: u64 = 7 << 19;

/// Runs a shell or a command in a guest and returns its exit code.
pub fn debug(context: &Context, args: &DebugArgs) -> anyhow::Result<i32> {
    let allowed = Settings::without_flags(&Config::load(&context.settings)?)?.debug_console;
    if !allowed.value {
        bail!(
            "debug consoles are not enabled on this host (debug-console is false: {}); an administrator \
             enables them with the line `debug-console = true` in /etc/mvm/mvm.toml",
            allowed.origin
        );
    }
    let found = ops::find(&context.registry()?, args.container())?;
    let guest = found.guest()?;
    let running = guest.containers()?;
    // A pod's machine has several, none of which has its own name.
    let own = running.iter().find(|id| **id == found.state.id).or(running.first());
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let wanted = Console {
        programs_of: own.map(String::as_str),
        shell: args.shell.as_deref().map(shell).transpose()?,
        command: args.command(),
        terminal,
    };
    let container = console(wanted).map_err(Error::from)?;
    let id = format!("debug-{}", random_id().context("cannot read /dev/urandom")?);
    let guest = guest.of(&id);
    let stdio = Stdio { stdin: true, output: true, terminal };
    let signals = Signals::catch()?;
    let made = guest.create(&container, stdio, false);
    let made = made.map_err(|e| match e {
        Error::NotFound { .. } if args.shell.is_none() => anyhow::Error::from(e).context(
            "the container has no such program; `--shell FILE` takes a statically linked shell from the host",
        ),
        e => e.into(),
    });
    for notice in made? {
        complain(&format!("note: {notice}"));
    }
    let ended = attend(&guest, &program(&container.spec), stdio, &signals);
    if let Err(e) = guest.remove() {
        tracing::debug!("the console {id} is not forgotten: {e}");
    }
    ended
}

fn attend(guest: &Guest, program: &str, stdio: Stdio, signals: &Signals) -> anyhow::Result<i32> {
    let streams = guest.attach("", stdio)?;
    let raw = if stdio.terminal { Some(Raw::enter()?) } else { None };
    guest.start("", program)?;
    let attachment = Attachment {
        guest,
        process: "",
        streams,
        tty: stdio.terminal,
        foreground: true,
        log: None,
        grace: GRACE,
    };
    let end = stand_by(attachment, signals);
    drop(raw);
    match end? {
        End::Exited(Ok(exit)) => Ok(exit.code),
        End::Exited(Err(e)) => Err(Error::from(e)).context("the machine ended"),
        End::GivenUp(signal) => Ok(128 + signal),
        End::OutputFailed(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {
            complain("standard output was closed by its reader; the console was ended");
            Ok(EXIT_CLOSED)
        }
        End::OutputFailed(e) => Err(e).context("cannot write the console's output"),
    }
}

/// A program of the host's that runs where there is nothing else.
fn shell(path: &Path) -> anyhow::Result<Vec<u8>> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut data = Vec::new();
        File::open(path)?.take(MAX_SHELL + 1).read_to_end(&mut data)?;
        Ok(data)
    };
    let data = read().with_context(|| format!("cannot read the shell {}", path.display()))?;
    if data.len() as u64 > MAX_SHELL {
        bail!("the shell {} has more than {MAX_SHELL} bytes", path.display());
    }
    match is_static(&data) {
        Some(true) => Ok(data),
        Some(false) => bail!(
            "the shell {} is not statically linked: its libraries are not in the guest (Debian has one in the \
             package busybox-static)",
            path.display()
        ),
        None => bail!("the shell {} is no 64-bit ELF program", path.display()),
    }
}

/// Whether a 64-bit ELF file (System V ABI, chapter 5) names no interpreter; `None` if it is not one.
fn is_static(file: &[u8]) -> Option<bool> {
    const INTERPRETER: u32 = 3;
    let number = |at: usize, len: usize| -> Option<u64> {
        let bytes = file.get(at..at.checked_add(len)?)?;
        Some(bytes.iter().rev().fold(0, |all, byte| (all << 8) | u64::from(*byte)))
    };
    if file.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for index in 0..count {
        let at = usize::try_from(table.checked_add(index.checked_mul(size)?)?).ok()?;
        if number(at, 4)? == u64::from(INTERPRETER) {
            return Some(false);
        }
    }
    Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_with_an_interpreter_are_told_apart() {
        let mut file = b"\x7fELF\x02".to_vec();
        file.resize(64 + 56, 0);
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        assert_eq!(is_static(&file), Some(true));
        file[64] = 3;
        assert_eq!(is_static(&file), Some(false));
        // One that says that there is more of it than there is.
        file[56] = 2;
        file[64] = 1;
        assert_eq!(is_static(&file), None);
        file[32..40].fill(0xff);
        assert_eq!(is_static(&file), None);
        assert_eq!(is_static(b"#!/bin/sh"), None);
        assert_eq!(is_static(b""), None);
    }
}
