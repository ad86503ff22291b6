//! containerd's task API, version 2: its messages on one side, the state machine on the other.

use std::sync::Arc;

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::ttrpc::{self, TtrpcContext};

use crate::backend::{NewContainer, RootMount};
use crate::error::Error;
use crate::events;
use crate::metrics::Version;
use crate::stdio::Paths;
use crate::task::{Phase, Tasks};

/// The service.
pub struct Service {
    tasks: Arc<Tasks>,
    metrics: Version,
    /// Called once all is over.
    shut_down: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("tasks", &self.tasks).finish_non_exhaustive()
    }
}

impl Service {
    /// A service for these tasks; `shut_down` ends it.
    pub fn new(tasks: Arc<Tasks>, shut_down: impl Fn() + Send + Sync + 'static) -> Self {
        Self { tasks, metrics: Version::of_host(), shut_down: Box::new(shut_down) }
    }
}

type Answer<T> = ttrpc::Result<T>;

/// Writes down what was refused, and passes it on.
fn answer<T>(call: &str, id: &str, exec: &str, result: Result<T, Error>) -> Answer<T> {
    result.map_err(|e| {
        tracing::info!(container = id, exec, "{call}: {e}");
        e.into()
    })
}

fn empty(call: &str, id: &str, exec: &str, result: Result<(), Error>) -> Answer<Empty> {
    answer(call, id, exec, result).map(|()| Empty::default())
}

impl containerd_shim_protos::Task for Service {
    fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        tracing::info!(container = request.id, bundle = request.bundle, "create");
        let created = match request.checkpoint.is_empty() {
            true => {
                let new = NewContainer {
                    id: request.id.clone(),
                    bundle: request.bundle.into(),
                    rootfs: request.rootfs.into_iter().map(root_mount).collect(),
                    terminal: request.terminal,
                };
                let paths = Paths {
                    stdin: request.stdin,
                    stdout: request.stdout,
                    stderr: request.stderr,
                    terminal: request.terminal,
                };
                self.tasks.create(&new, paths)
            }
            false => Err(Error::Unimplemented("a checkpoint cannot be restored yet".into())),
        };
        let pid = answer("create", &request.id, "", created)?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    fn start(&self, _: &TtrpcContext, request: StartRequest) -> Answer<StartResponse> {
        tracing::info!(container = request.id, exec = request.exec_id, "start");
        let started = self.tasks.start(&request.id, &request.exec_id);
        let pid = answer("start", &request.id, &request.exec_id, started)?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Answer<DeleteResponse> {
        tracing::info!(container = request.id, exec = request.exec_id, "delete");
        let deleted = self.tasks.delete(&request.id, &request.exec_id);
        let deleted = answer("delete", &request.id, &request.exec_id, deleted)?;
        Ok(DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.status,
            exited_at: MessageField::some(crate::timestamp(deleted.exit.at)),
            ..Default::default()
        })
    }

    fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Answer<Empty> {
        tracing::info!(container = request.id, exec = request.exec_id, "exec");
        let parsed = serde_json::from_slice::<oci_spec::runtime::Process>(&request.spec.value)
            .map_err(|e| Error::InvalidArgument(format!("the process is malformed: {e}")));
        let (id, exec) = (request.id, request.exec_id);
        let added = parsed.and_then(|mut process| {
            // The request has the last word on the terminal, as with runc.
            process.set_terminal(Some(request.terminal));
            let paths = Paths {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            };
            self.tasks.exec(&id, &exec, process, paths)
        });
        empty("exec", &id, &exec, added)
    }

    fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        let (id, exec) = (&request.id, &request.exec_id);
        empty("resize", id, exec, self.tasks.resize(id, exec, request.width, request.height))
    }

    fn state(&self, _: &TtrpcContext, request: StateRequest) -> Answer<StateResponse> {
        let found = self.tasks.process(&request.id, &request.exec_id);
        let (container, process) = answer("state", &request.id, &request.exec_id, found)?;
        let (status, exit) = match process.phase() {
            Phase::Running if process.exec.is_empty() && container.is_paused() => {
                (Status::PAUSED, None)
            }
            Phase::Running => (Status::RUNNING, None),
            Phase::Created | Phase::Starting => (Status::CREATED, None),
            Phase::Ended(exit) => (Status::STOPPED, Some(exit)),
        };
        Ok(StateResponse {
            id: container.id.clone(),
            bundle: container.bundle.display().to_string(),
            pid: container.pid,
            status: status.into(),
            stdin: process.paths.stdin.clone(),
            stdout: process.paths.stdout.clone(),
            stderr: process.paths.stderr.clone(),
            terminal: process.paths.terminal,
            exit_status: exit.as_ref().map_or(0, |e| e.status),
            exited_at: exit.map(|e| crate::timestamp(e.at)).into(),
            exec_id: request.exec_id,
            ..Default::default()
        })
    }

    fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Answer<PidsResponse> {
        let found = self.tasks.processes(&request.id);
        let found = answer("pids", &request.id, "", found)?;
        let process = |process: mvm_agent_protocol::messages::ProcessInfo| {
            let exec_id = process.process_id;
            let details = ProcessDetails { exec_id, ..Default::default() };
            let known = !details.exec_id.is_empty();
            let info = if known { events::any(&details).ok() } else { None };
            ProcessInfo { pid: process.pid, info: info.into(), ..Default::default() }
        };
        let processes = found.into_iter().map(process).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Answer<Empty> {
        empty("pause", &request.id, "", self.tasks.pause(&request.id))
    }

    fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Answer<Empty> {
        empty("resume", &request.id, "", self.tasks.resume(&request.id))
    }

    fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Answer<Empty> {
        let (id, exec) = (&request.id, &request.exec_id);
        tracing::info!(container = id, exec, signal = request.signal, all = request.all, "kill");
        let signal = i32::try_from(request.signal).unwrap_or(-1);
        empty("kill", id, exec, self.tasks.kill(id, exec, signal, request.all))
    }

    fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Answer<Empty> {
        if !request.stdin {
            return Ok(Empty::default());
        }
        let (id, exec) = (&request.id, &request.exec_id);
        empty("close io", id, exec, self.tasks.close_stdin(id, exec))
    }

    fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> Answer<Empty> {
        let refused = Error::Unimplemented("checkpoints are not made yet".into());
        empty("checkpoint", &request.id, "", Err(refused))
    }

    fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Answer<Empty> {
        empty("update", &request.id, "", self.tasks.update(&request.id, &request.resources.value))
    }

    fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Answer<WaitResponse> {
        let exit = self.tasks.wait(&request.id, &request.exec_id);
        let exit = answer("wait", &request.id, &request.exec_id, exit)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(crate::timestamp(exit.at)),
            ..Default::default()
        })
    }

    fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Answer<StatsResponse> {
        let stats = self.tasks.stats(&request.id).and_then(|stats| {
            let wording = "cannot word the figures";
            self.metrics.word(&stats).map_err(Error::failed_to(wording))
        });
        let stats = MessageField::some(answer("stats", &request.id, "", stats)?);
        Ok(StatsResponse { stats, ..Default::default() })
    }

    fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Answer<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.tasks.container(&request.id).map_or(0, |c| c.pid),
            ..Default::default()
        })
    }

    fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Answer<Empty> {
        // The shim of several containers goes with the last one.
        if request.now || self.tasks.is_empty() {
            tracing::info!("shutdown");
            (self.shut_down)();
        }
        Ok(Empty::default())
    }
}

fn root_mount(mount: containerd_shim_protos::api::Mount) -> RootMount {
    RootMount {
        kind: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}
