//! A backend without machines: what is called is written down, and tests decide when a process ends.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard};

use mvm_agent_protocol::messages::{ProcessInfo, StatsResponse};
use mvm_sandbox::guest::{Stdio, Streams};

use super::{Backend, Exit, NewContainer, NewExec, Target};
use crate::error::{Error, Result};

/// The id of the process that stands for every container.
pub const PID: u32 = 4711;

/// The guest's ends of a process's streams.
#[derive(Debug, Default)]
pub struct GuestEnds {
    /// Standard input.
    pub input: Option<UnixStream>,
    /// Standard output, or the terminal.
    pub output: Option<UnixStream>,
    /// Standard error.
    pub error: Option<UnixStream>,
}

#[derive(Debug, Default)]
struct Inside {
    calls: Vec<String>,
    exits: BTreeMap<(String, String), Exit>,
    ends: BTreeMap<(String, String), GuestEnds>,
    /// Calls of these names are refused.
    broken: BTreeMap<&'static str, Error>,
    /// A start waits for an interruption.
    slow_start: bool,
    interrupted: bool,
}

/// The mock.
#[derive(Debug, Default)]
pub struct Mock {
    inside: Mutex<Inside>,
    changed: Condvar,
}

impl Mock {
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap()
    }

    fn call(&self, name: &'static str, about: &str) -> Result<()> {
        let mut inside = self.inside();
        inside.calls.push(format!("{name} {about}").trim().to_owned());
        inside.broken.get(name).cloned().map_or(Ok(()), Err)
    }

    /// Refuses all calls of that name from now on.
    pub fn break_call(&self, name: &'static str, error: Error) {
        self.inside().broken.insert(name, error);
    }

    /// Makes starts wait until they are interrupted.
    pub fn start_slowly(&self) {
        self.inside().slow_start = true;
    }

    /// Ends a process.
    pub fn end(&self, container: &str, exec: &str, exit: Exit) {
        let key = (container.to_owned(), exec.to_owned());
        let mut inside = self.inside();
        inside.ends.remove(&key);
        inside.exits.insert(key, exit);
        drop(inside);
        self.changed.notify_all();
    }

    /// The guest's ends of a process's streams.
    pub fn ends(&self, container: &str, exec: &str) -> GuestEnds {
        let key = (container.to_owned(), exec.to_owned());
        self.inside().ends.insert(key, GuestEnds::default()).unwrap_or_default()
    }

    /// What was called so far.
    pub fn calls(&self) -> Vec<String> {
        self.inside().calls.clone()
    }

    /// Waits until something was called.
    pub fn wait_call(&self, call: &str) {
        let inside = self.inside();
        let absent = |inside: &mut Inside| !inside.calls.iter().any(|c| c == call);
        drop(self.changed.wait_while(inside, absent).unwrap());
    }

    fn streams(&self, container: &str, exec: &str, stdio: Stdio) -> Streams {
        let mut guest = GuestEnds::default();
        let mut host = Streams { input: None, output: None, error: None };
        let pair = |end: &mut Option<UnixStream>| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            *end = Some(theirs);
            Some(ours)
        };
        if stdio.terminal {
            host.output = pair(&mut guest.output);
            host.input = host.output.as_ref().map(|o| o.try_clone().unwrap());
        } else {
            if stdio.stdin {
                host.input = pair(&mut guest.input);
            }
            if stdio.output {
                host.output = pair(&mut guest.output);
                host.error = pair(&mut guest.error);
            }
        }
        self.inside().ends.insert((container.to_owned(), exec.to_owned()), guest);
        host
    }
}

fn about(target: Target<'_>) -> String {
    format!("{} {}", target.container, target.exec)
}

impl Backend for Mock {
    fn create(&self, new: &NewContainer) -> Result<u32> {
        self.call("create", &new.id).map(|()| PID)
    }

    fn start(&self, container: &str, stdio: Stdio) -> Result<Streams> {
        self.call("start", container)?;
        self.changed.notify_all();
        let inside = self.inside();
        if inside.slow_start {
            drop(self.changed.wait_while(inside, |i| !i.interrupted).unwrap());
            return Err(Error::failed("interrupted"));
        }
        drop(inside);
        Ok(self.streams(container, "", stdio))
    }

    fn exec(&self, new: &NewExec<'_>, stdio: Stdio) -> Result<Streams> {
        self.call("exec", &format!("{} {}", new.container, new.exec))?;
        Ok(self.streams(new.container, new.exec, stdio))
    }

    fn wait(&self, process: Target<'_>) -> Exit {
        let key = (process.container.to_owned(), process.exec.to_owned());
        let running = |inside: &mut Inside| !inside.exits.contains_key(&key);
        let inside = self.changed.wait_while(self.inside(), running).unwrap();
        inside.exits[&key].clone()
    }

    fn signal(&self, process: Target<'_>, signal: i32) -> Result<()> {
        self.call("signal", &format!("{} {signal}", about(process)))?;
        if signal == 9 {
            self.end(process.container, process.exec, Exit::now(137));
        }
        Ok(())
    }

    fn signal_all(&self, container: &str, signal: i32) -> Result<()> {
        self.call("signal_all", &format!("{container} {signal}"))
    }

    fn interrupt_start(&self, _container: &str) {
        self.inside().interrupted = true;
        self.changed.notify_all();
    }

    fn resize(&self, process: Target<'_>, columns: u16, rows: u16) -> Result<()> {
        self.call("resize", &format!("{} {columns}x{rows}", about(process)))
    }

    fn pause(&self, container: &str) -> Result<()> {
        self.call("pause", container)
    }

    fn resume(&self, container: &str) -> Result<()> {
        self.call("resume", container)
    }

    fn update(&self, container: &str, resources: &[u8]) -> Result<()> {
        self.call("update", &format!("{container} {}", String::from_utf8_lossy(resources)))
    }

    fn stats(&self, container: &str) -> Result<Option<StatsResponse>> {
        self.call("stats", container)?;
        Ok(Some(StatsResponse { pids_current: 3, ..StatsResponse::default() }))
    }

    fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>> {
        self.call("processes", container)?;
        let process = |pid| ProcessInfo { pid, ..ProcessInfo::default() };
        Ok(vec![process(60), process(61)])
    }

    fn delete_exec(&self, process: Target<'_>) -> Result<()> {
        self.call("delete_exec", &about(process))
    }

    fn delete(&self, container: &str) -> Result<()> {
        self.call("delete", container)
    }

    fn shut_down(&self) {
        let _ = self.call("shut_down", "");
    }
}
