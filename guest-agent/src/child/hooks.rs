//! `startContainer` hooks: programs of the container's own file system, run in its namespaces and as its user before
//! its program is (OCI runtime specification, config.md, "StartContainer Hooks").
//!
//! Each is a child of the process that is to become the program, under the same seccomp filter and with the same
//! capabilities.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, getpid};
use oci_spec::runtime::Hook;
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Map, Value};

use super::credentials::Credentials;
use crate::error::{Context, Error, Result};
use crate::seccomp::Filters;
use crate::sys::{self, Clone};

/// How long a hook may take that does not say it itself.
const LIMIT: Duration = Duration::from_secs(300);

/// What is as good as no limit, and can be added to the time.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Most bytes of what a failed hook wrote that an error shows.
const MAX_SHOWN: u64 = 2048;

/// Exit code of a hook that could not be executed, as shells have it.
const NOT_EXECUTED: i32 = 127;

/// How long a hook may take.
pub fn limit(hook: &Hook) -> Duration {
    let seconds = hook.timeout().and_then(|t| u64::try_from(t).ok()).filter(|t| *t > 0);
    seconds.map_or(LIMIT, Duration::from_secs).min(LONGEST)
}

/// What the process that is to become the program has got ready for it.
#[derive(Debug)]
pub struct Hooks<'a> {
    /// One after the other.
    pub hooks: &'a [Hook],
    /// The container's state as the host has it (runtime.md, "State").
    pub state: &'a [u8],
    /// The filter of the program.
    pub filters: Option<&'a Filters>,
    /// Its credentials.
    pub credentials: &'a Credentials,
}

impl Hooks<'_> {
    /// Runs all, until one fails. The process has one thread, and no handlers of signals.
    ///
    /// # Errors
    /// What the failed one is, and what it said.
    pub fn run(&self) -> Result<()> {
        if self.hooks.is_empty() {
            return Ok(());
        }
        let state = state(self.state)?;
        for hook in self.hooks {
            self.one(hook, &state).map_err(|e| {
                Error::State(format!("the startContainer hook {}: {e}", hook.path().display()))
            })?;
        }
        Ok(())
    }

    fn one(&self, hook: &Hook, state: &[u8]) -> Result<()> {
        if !hook.path().is_absolute() {
            return Err(Error::Invalid("its path is not absolute".into()));
        }
        let path = c_string(hook.path().as_os_str().as_bytes())?;
        let own = [path.clone()];
        let args: Vec<CString> = match hook.args().as_deref().unwrap_or_default() {
            [] => own.to_vec(),
            args => args.iter().map(|a| c_string(a.as_bytes())).collect::<Result<_>>()?,
        };
        let env = hook.env().iter().flatten();
        let env: Vec<CString> = env.map(|e| c_string(e.as_bytes())).collect::<Result<_>>()?;
        // Files: a hook that reads nothing, or writes much, holds up nobody.
        let mut input = memory()?;
        input
            .write_all(state)
            .and_then(|()| input.seek(SeekFrom::Start(0)))
            .context(|| "write the state".into())?;
        let mut said = memory()?;
        match sys::fork().context(|| "fork".into())? {
            Clone::Child => {
                let error = self.execute(&input, &said, &path, &args, &env);
                let _ = write!(said, "{error}");
                sys::exit_now(NOT_EXECUTED)
            }
            Clone::Parent(pid) => {
                let how = match wait(pid, Instant::now() + limit(hook))? {
                    None => "it did not end in time and was killed".to_owned(),
                    Some(WaitStatus::Exited(_, 0)) => return Ok(()),
                    Some(WaitStatus::Exited(_, code)) => format!("exit code {code}"),
                    Some(WaitStatus::Signaled(_, signal, _)) => format!("killed by {signal}"),
                    Some(other) => format!("{other:?}"),
                };
                Err(Error::State(format!("{how}: {}", tail(&mut said))))
            }
        }
    }

    /// In the child: becomes the hook. Returns only if that fails.
    fn execute(
        &self,
        input: &File,
        output: &File,
        path: &CString,
        args: &[CString],
        env: &[CString],
    ) -> Error {
        let ready = || -> Result<()> {
            let streams = "set up its streams";
            sys::dup_onto(input.as_fd(), 0).context(|| streams.into())?;
            sys::dup_onto(output.as_fd(), 1).context(|| streams.into())?;
            sys::dup_onto(output.as_fd(), 2).context(|| streams.into())?;
            if let Some(filters) = self.filters {
                filters.install()?;
            }
            self.credentials.settle()
        };
        if let Err(error) = ready() {
            return error;
        }
        let args: Vec<_> = args.iter().map(CString::as_c_str).collect();
        let env: Vec<_> = env.iter().map(CString::as_c_str).collect();
        Error::system("cannot be executed", sys::exec(path, &args, &env))
    }
}

/// What the hooks are told: the host's knowledge, with the process's number here.
fn state(given: &[u8]) -> Result<Vec<u8>> {
    let mut state: Map<String, Value> = serde_json::from_slice(given)
        .map_err(|e| Error::Invalid(format!("the container's state for its hooks: {e}")))?;
    state.insert("pid".into(), getpid().as_raw().into());
    state.insert("status".into(), "created".into());
    serde_json::to_vec(&state).map_err(|e| Error::Invalid(e.to_string()))
}

fn memory() -> Result<File> {
    let fd = memfd_create("hook", MemfdFlags::CLOEXEC);
    fd.map(File::from).context(|| "make a file in memory".into())
}

fn c_string(text: &[u8]) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Invalid("a zero byte in its arguments".into()))
}

/// Waits for a child; kills it if it does not end by `deadline`.
fn wait(pid: i32, deadline: Instant) -> Result<Option<WaitStatus>> {
    let process = sys::pidfd_open(pid).context(|| "watch it".into())?;
    let in_time = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if left.is_zero() => break false,
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => break true,
            Err(e) => return Err(Error::system("wait for it", e)),
        }
    };
    let pid = Pid::from_raw(pid);
    if !in_time {
        // It may have ended just now.
        let _ = kill(pid, Signal::SIGKILL);
    }
    loop {
        match waitpid(pid, None) {
            Err(Errno::EINTR) => {}
            status => return Ok(in_time.then_some(status.context(|| "wait for it".into())?)),
        }
    }
}

/// The end of what a hook wrote.
fn tail(said: &mut File) -> String {
    let mut text = Vec::new();
    let length = said.metadata().map_or(0, |about| about.len());
    let start = SeekFrom::Start(length.saturating_sub(MAX_SHOWN));
    let read = said.seek(start).and_then(|_| said.take(MAX_SHOWN).read_to_end(&mut text));
    match read {
        Ok(_) => String::from_utf8_lossy(&text).trim().to_owned(),
        Err(e) => format!("(what it wrote cannot be read: {e})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_has_the_number_that_counts_here() {
        let told = state(br#"{"id":"c1","pid":4711,"status":"creating","bundle":"/b"}"#).unwrap();
        let told: Value = serde_json::from_slice(&told).unwrap();
        assert_eq!(told["pid"], getpid().as_raw());
        assert_eq!((&told["id"], &told["status"]), (&"c1".into(), &"created".into()));
        assert!(matches!(state(b"[]"), Err(Error::Invalid(_))));
    }

    #[test]
    fn any_limit_can_be_added_to_the_time() {
        for (timeout, seconds) in [(0, 300), (-5, 300), (7, 7), (i64::MAX, LONGEST.as_secs())] {
            let hook = serde_json::json!({ "path": "/x", "timeout": timeout });
            let limit = limit(&serde_json::from_value(hook).unwrap());
            assert_eq!(limit, Duration::from_secs(seconds));
            assert!(Instant::now().checked_add(limit).is_some());
        }
    }
}
