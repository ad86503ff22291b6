//! What is done to containers and processes between their start and their end.

use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use mvm_agent_protocol::messages::{ProcessInfo, StatsResponse};

use super::{Phase, Tasks};
use crate::backend::Exit;
use crate::error::{Error, Result};
use crate::events::Event;

impl Tasks {
    /// Sends a signal to a process, or to all of the container.
    ///
    /// # Errors
    /// The process has ended, or is an exec'ed one that was not started.
    pub fn kill(&self, id: &str, exec: &str, signal: i32, all: bool) -> Result<()> {
        let (container, process) = self.process(id, exec)?;
        let finished = || Error::NotFound(format!("process already finished: {id} {exec}"));
        if !(0..=64).contains(&signal) {
            return Err(Error::InvalidArgument(format!("there is no signal {signal}")));
        }
        loop {
            match process.phase() {
                Phase::Ended(_) => return Err(finished()),
                Phase::Created if !exec.is_empty() => {
                    return Err(Error::FailedPrecondition(format!(
                        "process {exec} is not started"
                    )));
                }
                Phase::Created => {
                    // Nothing is there yet that could do other with a signal than end.
                    let exit = Exit::now(128 + signal.unsigned_abs());
                    if signal == 0 {
                        return Ok(());
                    }
                    if process.end_unstarted(exit.clone()) {
                        process.io.finish();
                        self.tell_end(&container, &process, &exit);
                        return Ok(());
                    }
                }
                // A machine may take its time to come up; a further process does not.
                Phase::Starting if exec.is_empty() => {
                    if signal != 0 {
                        self.backend.interrupt_start(id);
                    }
                    return Ok(());
                }
                Phase::Starting => drop(container.turn()),
                Phase::Running => break,
            }
        }
        if signal == 0 {
            return Ok(());
        }
        let sent = match all && exec.is_empty() {
            true => self.backend.signal_all(id, signal),
            false => self.backend.signal(container.target(&process), signal),
        };
        match sent {
            // It ended a moment ago.
            Err(Error::FailedPrecondition(_) | Error::NotFound(_)) => Err(finished()),
            other => other,
        }
    }

    /// Sets the size of a process's terminal, now or when it is started.
    ///
    /// # Errors
    /// It has no terminal, or the backend refuses.
    pub fn resize(&self, id: &str, exec: &str, columns: u32, rows: u32) -> Result<()> {
        let (container, process) = self.process(id, exec)?;
        if !process.paths.terminal {
            return Err(Error::FailedPrecondition("the process has no terminal".into()));
        }
        let clamp = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let size = (clamp(columns), clamp(rows));
        match process.resize(size) {
            true => self.backend.resize(container.target(&process), size.0, size.1),
            false => Ok(()),
        }
    }

    /// Ends a process's standard input once its other writers have closed theirs.
    ///
    /// # Errors
    /// There is no such process.
    pub fn close_stdin(&self, id: &str, exec: &str) -> Result<()> {
        let (_, process) = self.process(id, exec)?;
        process.io.close_stdin();
        Ok(())
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// It does not run, or the backend refuses.
    pub fn pause(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        let _turn = container.turn();
        container.require_running("pause")?;
        self.backend.pause(id)?;
        container.set_paused(true);
        let container_id = id.to_owned();
        self.events.publish(Event::Paused(TaskPaused { container_id, ..TaskPaused::default() }));
        Ok(())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// It is not frozen, or the backend refuses.
    pub fn resume(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        let _turn = container.turn();
        if container.word() != "paused" {
            let word = container.word();
            return Err(Error::FailedPrecondition(format!("cannot resume a {word} container")));
        }
        self.backend.resume(id)?;
        container.set_paused(false);
        let container_id = id.to_owned();
        self.events.publish(Event::Resumed(TaskResumed { container_id, ..TaskResumed::default() }));
        Ok(())
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// It has ended, or the backend refuses.
    pub fn update(&self, id: &str, resources: &[u8]) -> Result<()> {
        let container = self.container(id)?;
        let _turn = container.turn();
        if container.word() == "stopped" {
            return Err(Error::FailedPrecondition("cannot update a stopped container".into()));
        }
        self.backend.update(id, resources)
    }

    /// Figures of a container.
    ///
    /// # Errors
    /// It has ended, or the backend refuses.
    pub fn stats(&self, id: &str) -> Result<StatsResponse> {
        let container = self.container(id)?;
        match container.init.phase() {
            Phase::Ended(_) => Err(Error::NotFound(format!("container {id} has stopped"))),
            _ => Ok(self.backend.stats(id)?.unwrap_or_default()),
        }
    }

    /// The processes of a container, the first one with the id of the host's process that stands
    /// for it, the others with theirs in the guest.
    ///
    /// # Errors
    /// It does not run, or the backend refuses.
    pub fn processes(&self, id: &str) -> Result<Vec<ProcessInfo>> {
        let container = self.container(id)?;
        match container.init.phase() {
            Phase::Running => {
                let mut processes = self.backend.processes(id)?;
                if let Some(first) = processes.first_mut() {
                    first.pid = container.pid;
                }
                Ok(processes)
            }
            Phase::Ended(_) => Ok(Vec::new()),
            Phase::Created | Phase::Starting => {
                Ok(vec![ProcessInfo { pid: container.pid, ..ProcessInfo::default() }])
            }
        }
    }
}
