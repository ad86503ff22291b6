//! The ends of processes, and what is told of them.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::protobuf::MessageField;

use super::{Container, Phase, Process, SIGKILL, Tasks};
use crate::backend::Exit;
use crate::error::{Error, Result};
use crate::events::Event;

/// How long exec'ed processes may outlive the container's first one, which took the namespace of
/// their process ids with it.
const EXECS_END: Duration = Duration::from_secs(10);

impl Tasks {
    /// Hears of the end of a process, from now on.
    pub(super) fn watch(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: Arc<Process>,
    ) -> Result<()> {
        let pid = container.pid;
        let (tasks, container) = (Arc::clone(self), Arc::clone(container));
        let name = if process.exec.is_empty() { "wait init" } else { "wait exec" };
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let exit = tasks.backend.wait(container.target(&process));
            tracing::info!(container = container.id, exec = process.exec, pid, ?exit, "ended");
            tasks.end(&container, &process, exit);
        });
        thread.map(drop).map_err(Error::failed_to("cannot wait for the process"))
    }

    /// A process could not be started: it has ended.
    pub(super) fn fail_start(&self, container: &Container, process: &Process, why: &Error) {
        process.io.finish();
        self.end(container, process, Exit::now(why.exit_status()));
    }

    pub(super) fn end(&self, container: &Container, process: &Process, exit: Exit) {
        if process.exec.is_empty() {
            self.end_execs(container, &exit);
        }
        let _telling = container.telling();
        if process.ended(exit.clone()) {
            self.tell_end(container, process, &exit);
        }
    }

    /// The namespace of their process ids is gone, and they with it.
    fn end_execs(&self, container: &Container, exit: &Exit) {
        for process in container.execs() {
            if !matches!(process.phase(), Phase::Running | Phase::Starting) {
                continue;
            }
            if process.wait_for(Duration::ZERO).is_none() {
                // Without such a namespace they are not.
                let _ = self.backend.signal(container.target(&process), SIGKILL);
            }
            let over = process.wait_for(EXECS_END).is_some();
            // Who saw it end may be about to tell.
            let _telling = container.telling();
            if !over {
                let exit = Exit { status: 128 + SIGKILL.unsigned_abs(), ..exit.clone() };
                if process.ended(exit.clone()) {
                    self.tell_end(container, &process, &exit);
                }
            }
        }
    }

    pub(super) fn tell_end(&self, container: &Container, process: &Process, exit: &Exit) {
        if exit.oom_killed {
            let container_id = container.id.clone();
            self.events.publish(Event::Oom(TaskOOM { container_id, ..TaskOOM::default() }));
        }
        let first = process.exec.is_empty();
        self.events.publish(Event::Exit(TaskExit {
            container_id: container.id.clone(),
            id: if first { container.id.clone() } else { process.exec.clone() },
            pid: container.pid,
            exit_status: exit.status,
            exited_at: MessageField::some(crate::timestamp(exit.at)),
            ..TaskExit::default()
        }));
    }
}
