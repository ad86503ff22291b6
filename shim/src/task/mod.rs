//! The state machine of containers and processes, with containerd's events.
//!
//! It follows runc's shim in what is allowed when, in the kinds of errors, and in the order of
//! events: a process's start is told before its end, the ends of exec'ed processes before that of the
//! container's first one, an end by a memory limit before the end itself, and the deletion last.

mod container;
mod control;
mod ends;
mod process;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::api::Mount;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskStart,
};
use containerd_shim_protos::protobuf::MessageField;

use crate::backend::{Backend, Exit, NewContainer, NewExec};
use crate::error::{Error, Result};
use crate::events::{Event, Sink};
use crate::stdio::{Io, Owner, Paths};

pub use container::Container;
pub use process::{Phase, Process};

const SIGKILL: i32 = 9;

/// All containers of this shim.
pub struct Tasks {
    namespace: String,
    backend: Arc<dyn Backend>,
    events: Arc<dyn Sink>,
    /// `None` while one is being made.
    containers: Mutex<BTreeMap<String, Option<Arc<Container>>>>,
}

impl std::fmt::Debug for Tasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tasks").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

/// What is left of a deleted process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deleted {
    /// The host's process that stood for it.
    pub pid: u32,
    /// How it ended.
    pub exit: Exit,
}

impl Tasks {
    /// No containers yet.
    pub fn new(namespace: &str, backend: Arc<dyn Backend>, events: Arc<dyn Sink>) -> Self {
        let containers = Mutex::default();
        Self { namespace: namespace.to_owned(), backend, events, containers }
    }

    fn containers(&self) -> MutexGuard<'_, BTreeMap<String, Option<Arc<Container>>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container of that id.
    ///
    /// # Errors
    /// There is none, or it is still being made.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        match self.containers().get(id) {
            Some(Some(container)) => Ok(Arc::clone(container)),
            Some(None) => {
                Err(Error::FailedPrecondition(format!("container {id} is being created")))
            }
            None => Err(Error::NotFound(format!("container {id} does not exist"))),
        }
    }

    /// The process, with its container.
    ///
    /// # Errors
    /// There is none.
    pub fn process(&self, id: &str, exec: &str) -> Result<(Arc<Container>, Arc<Process>)> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        Ok((container, process))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    fn io(&self, container: &str, paths: &Paths) -> Result<Io> {
        let namespace = self.namespace.clone();
        let owner = Owner { container: container.to_owned(), namespace };
        Io::open(paths, &owner).map_err(Error::failed)
    }

    /// Prepares a container. Returns the id of the host's process that stands for it.
    ///
    /// # Errors
    /// The id is taken, or the backend refuses; nothing is left then.
    pub fn create(&self, new: &NewContainer, paths: Paths) -> Result<u32> {
        match self.containers().entry(new.id.clone()) {
            Entry::Vacant(free) => free.insert(None),
            Entry::Occupied(_) => {
                return Err(Error::AlreadyExists(format!("container {} already exists", new.id)));
            }
        };
        let made = self.try_create(new, paths);
        match made {
            Ok(container) => {
                let pid = container.pid;
                self.containers().insert(new.id.clone(), Some(Arc::new(container)));
                Ok(pid)
            }
            Err(e) => {
                self.containers().remove(&new.id);
                Err(e)
            }
        }
    }

    fn try_create(&self, new: &NewContainer, paths: Paths) -> Result<Container> {
        let io = self.io(&new.id, &paths)?;
        let pid = self.backend.create(new)?;
        self.events.publish(Event::Create(TaskCreate {
            container_id: new.id.clone(),
            bundle: new.bundle.display().to_string(),
            rootfs: new.rootfs.iter().map(mount).collect(),
            io: MessageField::some(TaskIO {
                stdin: paths.stdin.clone(),
                stdout: paths.stdout.clone(),
                stderr: paths.stderr.clone(),
                terminal: paths.terminal,
                ..TaskIO::default()
            }),
            pid,
            ..TaskCreate::default()
        }));
        let bundle: PathBuf = new.bundle.clone();
        Ok(Container::new(&new.id, bundle, pid, Process::new("", None, paths, io)))
    }

    /// Announces a further process.
    ///
    /// # Errors
    /// The id is taken, or the container has ended or is frozen.
    pub fn exec(
        &self,
        id: &str,
        exec: &str,
        spec: oci_spec::runtime::Process,
        paths: Paths,
    ) -> Result<()> {
        let container = self.container(id)?;
        let _turn = container.turn();
        if exec.is_empty() {
            return Err(Error::InvalidArgument("a further process needs an id".into()));
        }
        if container.has(exec) {
            return Err(Error::AlreadyExists(format!("id {exec} in container {id}")));
        }
        if let word @ ("stopped" | "paused") = container.word() {
            return Err(Error::FailedPrecondition(format!("cannot exec in a {word} container")));
        }
        let io = self.io(id, &paths)?;
        container.add(Process::new(exec, Some(spec), paths, io))?;
        self.events.publish(Event::ExecAdded(TaskExecAdded {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..TaskExecAdded::default()
        }));
        Ok(())
    }

    /// Starts an announced process. Returns the id of the host's process that stands for it.
    ///
    /// # Errors
    /// It is not in a state to be started, or the backend refuses: it has ended then.
    pub fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let (container, process) = self.process(id, exec)?;
        let _turn = container.turn();
        if !exec.is_empty() {
            container.require_running("start a process in")?;
        }
        process.begin_start()?;
        let stdio = process.io.stdio();
        let started = match &process.spec {
            None => self.backend.start(id, stdio),
            Some(spec) => {
                let new = NewExec { container: id, exec, process: spec };
                self.backend.exec(&new, stdio)
            }
        };
        let joined = started.and_then(|streams| process.io.connect(streams).map_err(Error::failed));
        if let Err(e) = joined {
            self.fail_start(&container, &process, &e);
            return Err(e);
        }
        if let Some((columns, rows)) = process.started()
            && let Err(e) = self.backend.resize(container.target(&process), columns, rows)
        {
            tracing::warn!("{id} {exec}: cannot set the size of the terminal: {e}");
        }
        self.events.publish(match exec {
            "" => Event::Start(TaskStart {
                container_id: id.to_owned(),
                pid: container.pid,
                ..TaskStart::default()
            }),
            _ => Event::ExecStarted(TaskExecStarted {
                container_id: id.to_owned(),
                exec_id: exec.to_owned(),
                pid: container.pid,
                ..TaskExecStarted::default()
            }),
        });
        self.watch(&container, process)?;
        Ok(container.pid)
    }

    /// Forgets a process that has ended or was never started; with the first one, the container.
    ///
    /// # Errors
    /// It runs, or the backend refuses.
    pub fn delete(&self, id: &str, exec: &str) -> Result<Deleted> {
        let (container, process) = self.process(id, exec)?;
        let _turn = container.turn();
        match process.phase() {
            Phase::Ended(_) => {}
            Phase::Created if exec.is_empty() => {
                // It goes without having run, and whoever waits for it hears of that.
                self.end(&container, &process, Exit::now(128 + SIGKILL.unsigned_abs()));
            }
            Phase::Created => {
                process.end_unstarted(Exit::now(0));
            }
            phase @ (Phase::Starting | Phase::Running) => {
                let word = phase.word();
                return Err(Error::FailedPrecondition(format!("cannot delete a {word} process")));
            }
        }
        process.io.finish();
        let exit = process.wait();
        drop(container.telling());
        let deleted = Deleted { pid: container.pid, exit };
        if !exec.is_empty() {
            container.forget(exec);
            self.backend.delete_exec(container.target(&process))?;
            return Ok(deleted);
        }
        for exec in container.execs() {
            exec.io.finish();
        }
        self.backend.delete(id)?;
        self.containers().remove(id);
        self.events.publish(Event::Delete(TaskDelete {
            container_id: id.to_owned(),
            id: id.to_owned(),
            pid: deleted.pid,
            exit_status: deleted.exit.status,
            exited_at: MessageField::some(crate::timestamp(deleted.exit.at)),
            ..TaskDelete::default()
        }));
        Ok(deleted)
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// There is no such process.
    pub fn wait(&self, id: &str, exec: &str) -> Result<Exit> {
        Ok(self.process(id, exec)?.1.wait())
    }
}

fn mount(mount: &crate::backend::RootMount) -> Mount {
    Mount {
        type_: mount.kind.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
        ..Mount::default()
    }
}
