//! What the shim's task service asks for, carried out in machines.

use std::sync::Arc;

use mvm_agent_protocol::messages::{ProcessInfo, StatsResponse};
use mvm_sandbox::guest::{Guest, Stdio, Streams};
use oci_spec::runtime::LinuxResources;

use super::container::{Container, Running};
use super::hooks::Kind;
use super::pod::Role;
use super::{EXIT_KILLED, Machines, lock, size, spec, unikernel};
use crate::backend::{Backend, Exit, NewContainer, NewExec, Target};
use crate::error::{Error, Result};

/// Exit status of a process whose machine ended.
const EXIT_MACHINE_ENDED: u32 = 255;

impl Machines {
    /// Waits for the end of a process of `container`.
    fn await_end(&self, container: &Container, process: Target<'_>) -> Exit {
        if let Some(unikernel) = container.unikernel() {
            return unikernel.wait().map(Exit::now).unwrap_or_else(|why| {
                tracing::error!(container = process.container, "{why}");
                Exit::now(EXIT_MACHINE_ENDED)
            });
        }
        let waited = match (container.role, container.running()) {
            (_, Err(e)) => Err(e),
            (Role::Sandbox, _) => container.wait_sandbox().map(Exit::now),
            (_, Ok(Running { machine, guest, .. })) => match guest.wait(process.exec) {
                Ok(exit) => {
                    let status = u32::try_from(exit.code).unwrap_or(EXIT_MACHINE_ENDED);
                    Ok(Exit { oom_killed: exit.oom_killed, ..Exit::now(status) })
                }
                // Its pod was ended.
                Err(_) if container.role == Role::Member && self.pod().is_err() => {
                    Ok(Exit::now(EXIT_KILLED))
                }
                Err(e) => Err(machine.explain(e.into())),
            },
        };
        waited.unwrap_or_else(|why| {
            tracing::error!(container = process.container, exec = process.exec, "{why}");
            Exit::now(EXIT_MACHINE_ENDED)
        })
    }
}

impl Machines {
    /// Changes the limits of a container that runs, and with that of its memory the size of its machine: larger before the
    /// guest lets it have more, smaller after it has it use less. Returns what the guest will not honour.
    fn change_limits(
        &self,
        container: &Container,
        resources: &LinuxResources,
        json: &[u8],
    ) -> Result<Vec<String>> {
        let Running { machine, .. } = container.running()?;
        let limit = size::limit_in(resources);
        let before = machine.limits().of(&container.id);
        let grows = limit > before;
        if grows {
            machine.fit(&container.id, limit)?;
        }
        let updated = container.ask(|guest| guest.update(json));
        if updated.is_err() && grows {
            machine.shrink(&container.id, before);
        } else if updated.is_ok() && limit.is_some() && !grows {
            machine.shrink(&container.id, limit);
        }
        updated
    }
}

impl Backend for Machines {
    fn create(&self, new: &NewContainer) -> Result<u32> {
        let container = Container::new(new, self.host.as_ref(), &self.socket)?;
        match container.role {
            // A unikernel is in the pod's network, not in its machine.
            Role::Member if container.plan.is_some() => {}
            Role::Member => drop(self.pod()?),
            Role::Alone | Role::Sandbox => {
                if let Some(other) = lock(&self.containers).keys().next() {
                    return Err(Error::InvalidArgument(format!(
                        "{} cannot be in the machine of {other}: it is no container of a pod",
                        new.id
                    )));
                }
            }
        }
        if let Err(e) = container.prepare() {
            if let Err(left) = container.dismantle() {
                tracing::warn!(container = new.id, "cannot clean up: {left}");
            }
            return Err(e);
        }
        let pid = container.holder.pid();
        lock(&self.containers).insert(new.id.clone(), Arc::new(container));
        Ok(pid)
    }

    fn start(&self, container: &str, stdio: Stdio) -> Result<Streams> {
        let container = self.container(container)?;
        let _turn = (container.role == Role::Member).then(|| lock(&self.pod_turn));
        let streams = if let Some(plan) = &container.plan {
            self.start_unikernel(&container, plan, stdio)?
        } else {
            let (running, streams) = match container.role {
                Role::Alone => self.start_alone(&container, stdio)?,
                Role::Sandbox => self.start_sandbox(&container)?,
                Role::Member => self.start_member(&container, stdio)?,
            };
            *lock(&container.running) = Some(running);
            streams
        };
        if let Err(e) = container.hooks(Kind::Poststart, "running") {
            tracing::warn!(container = container.id, "{e}");
        }
        Ok(streams)
    }

    fn exec(&self, new: &NewExec<'_>, stdio: Stdio) -> Result<Streams> {
        let container = self.container(new.container)?;
        container.ask(|guest| container.exec(guest, new, stdio))
    }

    fn wait(&self, process: Target<'_>) -> Exit {
        let Ok(container) = self.container(process.container) else {
            return Exit::now(EXIT_MACHINE_ENDED);
        };
        let exit = self.await_end(&container, process);
        if process.exec.is_empty() {
            container.holder.retire();
        }
        exit
    }

    fn signal(&self, process: Target<'_>, signal: i32) -> Result<()> {
        let container = self.container(process.container)?;
        if container.role == Role::Sandbox {
            container.standing.signal(signal);
            return Ok(());
        }
        if let Some(unikernel) = container.unikernel() {
            return unikernel.signal(signal);
        }
        container.ask(|guest| guest.signal(process.exec, signal))
    }

    fn signal_all(&self, container: &str, signal: i32) -> Result<()> {
        let container = self.container(container)?;
        if container.role == Role::Sandbox {
            container.standing.signal(signal);
            return Ok(());
        }
        if let Some(unikernel) = container.unikernel() {
            return unikernel.signal(signal);
        }
        container.ask(|guest| guest.signal_all(signal))
    }

    fn interrupt_start(&self, container: &str) {
        if let Ok(container) = self.container(container) {
            container.interrupt.raise();
        }
    }

    fn resize(&self, process: Target<'_>, columns: u16, rows: u16) -> Result<()> {
        let container = self.container(process.container)?;
        match container.unikernel() {
            // A serial line has no size.
            Some(_) => Ok(()),
            None => container.ask(|guest| guest.resize(process.exec, columns, rows)),
        }
    }

    fn pause(&self, container: &str) -> Result<()> {
        let container = self.container(container)?;
        match container.unikernel() {
            Some(unikernel) => unikernel.pause(),
            None => container.ask(Guest::freeze),
        }
    }

    fn resume(&self, container: &str) -> Result<()> {
        let container = self.container(container)?;
        match container.unikernel() {
            Some(unikernel) => unikernel.resume(),
            None => container.ask(Guest::thaw),
        }
    }

    fn update(&self, container: &str, resources: &[u8]) -> Result<()> {
        let container = self.container(container)?;
        let parsed: LinuxResources = serde_json::from_slice(resources)
            .map_err(|e| Error::InvalidArgument(format!("the resources are malformed: {e}")))?;
        if container.unikernel().is_some() {
            return Err(unikernel::refused("changing limits while it runs"));
        }
        if container.role == Role::Sandbox || lock(&container.running).is_none() {
            let mut spec = lock(&container.spec);
            let mut linux = spec::linux(&spec);
            linux.set_resources(Some(parsed));
            spec.set_linux(Some(linux));
            return Ok(());
        }
        container.note(&self.change_limits(&container, &parsed, resources)?);
        Ok(())
    }

    fn stats(&self, container: &str) -> Result<Option<StatsResponse>> {
        let container = self.container(container)?;
        if let Some(unikernel) = container.unikernel() {
            return unikernel.stats().map(Some);
        }
        // No process of a sandbox takes anything: what the machine takes is its containers'.
        let running = container.role != Role::Sandbox && lock(&container.running).is_some();
        if running { container.ask(Guest::stats).map(Some) } else { Ok(None) }
    }

    fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>> {
        let container = self.container(container)?;
        if container.role == Role::Sandbox || container.unikernel().is_some() {
            return Ok(vec![ProcessInfo::default()]);
        }
        container.ask(Guest::processes)
    }

    fn delete_exec(&self, process: Target<'_>) -> Result<()> {
        match self.container(process.container)?.ask(|guest| guest.delete(process.exec)) {
            // It never came that far, or went with its machine.
            Err(
                Error::NotFound(_)
                | Error::FailedPrecondition(_)
                | Error::Unimplemented(_)
                | Error::Failed { .. },
            ) => Ok(()),
            other => other,
        }
    }

    fn delete(&self, container: &str) -> Result<()> {
        let container = self.container(container)?;
        let result = container.dismantle();
        lock(&self.containers).remove(&container.id);
        result
    }

    fn shut_down(&self) {
        let mut left: Vec<_> = std::mem::take(&mut *lock(&self.containers)).into_values().collect();
        left.sort_by_key(|container| container.role == Role::Sandbox);
        for container in left {
            if let Err(e) = container.dismantle() {
                tracing::warn!(container = container.id, "cannot clean up: {e}");
            }
        }
    }
}
