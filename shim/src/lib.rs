//! containerd's shim for mvm: `io.containerd.mvm.v1`, the program `containerd-shim-mvm-v1`.
//!
//! * [`task`] is the state machine of containers and processes, over a [`backend`] (tests: a mock)
//!   and [`events`]; [`service`] puts containerd's task API (version 2) in front of it.
//! * [`vm`] is the real backend, over `mvm-sandbox`.
//! * [`stdio`] moves standard streams, [`metrics`] words the guest's figures as containerd wants.
//! * [`launch`] and [`cleanup`] are the subcommands, [`server`] is the process that stays.
//!
//! This is a library: the program is `mvm` itself, under the name [`NAME`]. So there is one file with
//! one guest in it, which is the command line, the shim, the holder of a namespace and the monitor of
//! a machine. The bootstrap is ours, on `containerd-shim-protos`: that of `containerd-shim` starts
//! whatever file it finds itself to be, under that file's name, and brings a D-Bus client along.

pub mod backend;
pub mod cleanup;
pub mod cli;
pub mod error;
pub mod events;
pub mod host;
pub mod launch;
pub mod metrics;
pub mod server;
pub mod service;
pub mod stdio;
pub mod task;
pub mod vm;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;

use cli::Flags;
use host::Host;

/// The name under which the program is the shim: what containerd makes of `io.containerd.mvm.v1`.
pub const NAME: &str = "containerd-shim-mvm-v1";

/// Whether a program that was started under this name is the shim.
pub fn is_shim(program: Option<&OsStr>) -> bool {
    program.and_then(|p| Path::new(p).file_name()) == Some(OsStr::new(NAME))
}

/// The shim; `args` come after the program's name.
pub fn main(host: Arc<dyn Host>, args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match dispatch(host, args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            // containerd shows this to the user.
            let _ = writeln!(std::io::stderr(), "{NAME}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(host: Arc<dyn Host>, args: impl IntoIterator<Item = OsString>) -> anyhow::Result<()> {
    let flags = Flags::parse(args)?;
    let mut out = std::io::stdout();
    if flags.version {
        writeln!(out, "{NAME} {}", env!("CARGO_PKG_VERSION"))?;
        return Ok(());
    }
    flags.check()?;
    match flags.action.as_str() {
        "start" => {
            let address = launch::start(host.as_ref(), &flags)?;
            out.write_all(address.as_bytes())?;
        }
        "delete" => {
            let response = cleanup::delete(host.as_ref(), &flags)?;
            out.write_all(&response.write_to_bytes()?)?;
        }
        "" => server::serve(host, &flags)?,
        other => anyhow::bail!("{other:?} is nothing that a shim does: start, delete"),
    }
    out.flush()?;
    Ok(())
}

/// A time as protobuf has it.
fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: since.subsec_nanos().cast_signed(),
        ..Timestamp::default()
    }
}
