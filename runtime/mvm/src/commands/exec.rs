//! `mvm exec`.

use std::time::Duration;

use anyhow::{Context as _, bail};
use mvm_sandbox::guest::{Guest, Stdio};
use mvm_sandbox::ops::{self, Found};
use mvm_sandbox::spec::{self, merge_variable};
use mvm_sandbox::{Error, random_id};
use nix::libc::SIGKILL;
use oci_spec::runtime::Process;

use super::Context;
use super::attach::{Attachment, End, stand_by};
use crate::cli::ExecArgs;
use crate::env_file;
use crate::output::{EXIT_CLOSED, complain};
use crate::signals::Signals;
use crate::terminal::{self, Raw};

/// How long a stream may be silent after the process has ended: what it left behind may hold the
/// stream open for ever.
const GRACE: Duration = Duration::from_secs(2);

/// Runs a further process and returns its exit code.
pub fn exec(context: &Context, args: &ExecArgs) -> anyhow::Result<i32> {
    if args.tty {
        terminal::require()?;
    }
    let found = ops::find(&context.registry()?, args.container())?;
    let guest = found.guest()?;
    let process = process(args, &found)?;
    let signals = Signals::catch()?;
    let id = format!("exec-{}", random_id().context("cannot read /dev/urandom")?);
    let stdio = Stdio { stdin: args.interactive, output: !args.detach, terminal: args.tty };
    for notice in guest.exec(&id, &process, stdio)? {
        complain(&format!("note: {notice}"));
    }
    let program = args.command().first().map_or("", String::as_str);
    if args.detach {
        guest.start(&id, program)?;
        return Ok(0);
    }
    let streams = guest.attach(&id, stdio)?;
    // Before the process starts: what it prints and what is typed at it are raw from the first
    // byte on.
    let raw = if args.interactive && args.tty { Some(Raw::enter()?) } else { None };
    guest.start(&id, program)?;
    let attachment = Attachment {
        guest: &guest,
        process: &id,
        streams,
        tty: args.tty,
        foreground: true,
        log: None,
        grace: GRACE,
    };
    let end = stand_by(attachment, &signals);
    drop(raw);
    conclude(&guest, &id, end?)
}

fn conclude(guest: &Guest, id: &str, end: End) -> anyhow::Result<i32> {
    match end {
        End::Exited(Ok(exit)) => {
            if let Err(e) = guest.delete(id) {
                tracing::debug!("process {id} is not forgotten: {e}");
            }
            Ok(exit.code)
        }
        End::Exited(Err(e)) => {
            Err(Error::from(e)).context("the container ended while the process ran")
        }
        End::GivenUp(signal) => {
            guest.signal(id, SIGKILL)?;
            Ok(128 + signal)
        }
        End::OutputFailed(e) => {
            guest.signal(id, SIGKILL)?;
            if e.kind() == std::io::ErrorKind::BrokenPipe {
                complain("standard output was closed by its reader; the process was ended");
                return Ok(EXIT_CLOSED);
            }
            Err(e).context("cannot write the process's output")
        }
    }
}

/// The container's own process with what the flags change.
fn process(args: &ExecArgs, found: &Found) -> anyhow::Result<Process> {
    let Some(mut process) = found.spec()?.process().clone() else {
        bail!("the specification of container {} has no process", found.state.name);
    };
    let mut env = process.env().clone().unwrap_or_default();
    if args.tty {
        merge_variable(&mut env, "TERM=xterm").map_err(Error::from)?;
    }
    for variable in env_file::collect(&args.env_file, &args.env)? {
        merge_variable(&mut env, &variable).map_err(Error::from)?;
    }
    process.set_args(Some(args.command().to_vec())).set_terminal(Some(args.tty)).set_env(Some(env));
    if args.tty
        && let Some((columns, rows)) = terminal::size()
    {
        let size = oci_spec::runtime::BoxBuilder::default()
            .width(columns)
            .height(rows)
            .build()
            .context("cannot describe the terminal")?;
        process.set_console_size(Some(size));
    }
    spec::change_user(&mut process, args.user.as_deref(), args.privileged).map_err(Error::from)?;
    if let Some(dir) = &args.workdir {
        if !dir.starts_with('/') {
            bail!("the working directory {dir:?} is not an absolute path");
        }
        process.set_cwd(dir.into());
    }
    Ok(process)
}
