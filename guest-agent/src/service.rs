//! The calls of the host and its stream connections.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mvm_agent_protocol::messages::*;
use mvm_agent_protocol::rpc::{Agent, Code, Status};
use mvm_agent_protocol::stream::{self, Answer, Request};
use mvm_agent_protocol::{WAIT_MAX_MS, rpc};

use crate::container::{Container, Process, Workshop};
use crate::disks;
use crate::error::{Context, Error, Result};
use crate::filesystems;
use crate::forward;
use crate::info;
use crate::log::warning;
use crate::network;
use crate::power::Machine;
use crate::streams::Streams;
use crate::sys;
use crate::transport::Listener;

/// How long a stream connection may take to say what it is.
const HEADER: Duration = Duration::from_secs(10);

/// The most seed bytes taken at a time.
const MAX_SEED: usize = 4096;

type Answered<T> = std::result::Result<T, Status>;

/// The service.
#[derive(Debug)]
pub struct Service {
    workshop: Workshop,
    /// `None` while one is being made.
    containers: Mutex<BTreeMap<String, Option<Arc<Container>>>>,
    machine: Machine,
}

impl Service {
    /// A service without containers.
    pub fn new(workshop: Workshop, machine: Machine) -> Self {
        Self { workshop, containers: Mutex::default(), machine }
    }

    fn containers(&self) -> MutexGuard<'_, BTreeMap<String, Option<Arc<Container>>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        match self.containers().get(id) {
            Some(Some(container)) => Ok(Arc::clone(container)),
            Some(None) => Err(Error::State(format!("container {id:?} is being created"))),
            None => Err(Error::NotFound(format!("there is no container {id:?}"))),
        }
    }

    fn process(&self, container: &str, process: &str) -> Result<Arc<Process>> {
        self.container(container)?.process(process)
    }

    fn take_apart(&self, container: &Arc<Container>, force: bool) -> Result<()> {
        if !force {
            container.check_stopped()?;
        }
        container.kill();
        let result = container.dismantle();
        self.containers().remove(container.id());
        result
    }

    /// Serves control connections until the listener fails for good.
    pub fn serve_calls(self: &Arc<Self>, listener: &Listener) {
        serve_connections(listener, "control", |connection| {
            let agent: Arc<dyn Agent> = Arc::<Self>::clone(self);
            move || {
                if let Err(e) = rpc::serve(connection, &agent) {
                    warning!("a control connection broke: {e}");
                }
            }
        });
    }

    /// Serves stream connections until the listener fails for good.
    pub fn serve_streams(self: &Arc<Self>, listener: &Listener) {
        serve_connections(listener, "stream", |connection| {
            let service = Arc::clone(self);
            move || {
                if let Err(e) = service.attach_stream(connection) {
                    warning!("a stream connection failed: {e}");
                }
            }
        });
    }

    fn attach_stream(&self, mut connection: UnixStream) -> std::result::Result<(), stream::Error> {
        use std::io::Write;
        connection.set_read_timeout(Some(HEADER))?;
        let request = match Request::read(&mut connection) {
            Ok(request) => request,
            Err(e) => {
                connection.write_all(&[Answer::Malformed as u8])?;
                return Err(e);
            }
        };
        connection.set_read_timeout(None)?;
        let header = match request {
            Request::Stream(header) => header,
            Request::Dial(dial) => return Ok(forward::serve(dial.port, connection)?),
        };
        let streams: Arc<Streams> = match self.process(&header.container_id, &header.process_id) {
            Ok(process) => Arc::clone(&process.streams),
            Err(_) => return Ok(connection.write_all(&[Answer::NotFound as u8])?),
        };
        streams.attach(header.kind, connection);
        Ok(())
    }
}

/// Gives each connection a thread.
fn serve_connections<F: FnOnce() + Send + 'static>(
    listener: &Listener,
    name: &str,
    mut work: impl FnMut(UnixStream) -> F,
) {
    loop {
        let spawned = listener.accept().and_then(|connection| {
            std::thread::Builder::new().name(name.into()).spawn(work(connection))
        });
        if let Err(e) = spawned {
            warning!("cannot serve a {name} connection: {e}");
            // Out of memory or descriptors: the same again at once would only burn the CPU.
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Programs that cannot be run are an answer, all else is a refusal.
fn launch_failure(error: Error) -> Answered<LaunchFailure> {
    match error.launch_kind() {
        Some(kind) => Ok(LaunchFailure {
            kind: kind.into(),
            message: error.to_string(),
            ..Default::default()
        }),
        None => Err(error.into()),
    }
}

fn empty(result: Result<()>) -> Answered<Empty> {
    result.map(|()| Empty::default()).map_err(Status::from)
}

impl Agent for Service {
    fn set_clock(&self, request: SetClockRequest) -> Answered<Empty> {
        empty(self.machine.set_clock(request.unix_time_ns))
    }

    fn reseed_random(&self, request: ReseedRandomRequest) -> Answered<Empty> {
        if request.seed.len() > MAX_SEED {
            let message = format!("a seed of {} bytes, at most {MAX_SEED}", request.seed.len());
            return Err(Status::new(Code::INVALID_ARGUMENT, message));
        }
        empty(std::fs::File::open("/dev/urandom").context(|| "open /dev/urandom".into()).and_then(
            |random| {
                sys::add_entropy(random.as_fd(), &request.seed).context(|| "add entropy".into())
            },
        ))
    }

    fn guest_info(&self, request: GuestInfoRequest) -> Answered<GuestInfoResponse> {
        Ok(info::guest(request.dmesg_tail_bytes))
    }

    fn shutdown(&self, request: ShutdownRequest) -> Answered<Empty> {
        let containers: Vec<_> = self.containers().values().flatten().cloned().collect();
        let grace = Duration::from_millis(request.grace_ms.into());
        self.machine.end_processes(&containers, grace);
        for container in &containers {
            if let Err(e) = self.take_apart(container, true) {
                warning!("shutdown: {e}");
            }
        }
        drop(containers);
        self.machine.stop();
        Ok(Empty::default())
    }

    fn create_container(
        &self,
        request: CreateContainerRequest,
    ) -> Answered<CreateContainerResponse> {
        {
            let mut containers = self.containers();
            if containers.contains_key(&request.id) {
                return Err(
                    Error::Exists(format!("container {:?} exists already", request.id)).into()
                );
            }
            containers.insert(request.id.clone(), None);
        }
        let mut response = CreateContainerResponse::default();
        match self.workshop.create(&request) {
            Ok((container, notices)) => {
                response.notices = notices;
                response.pid = pid(container.process("")?.pid);
                self.containers().insert(request.id, Some(Arc::new(container)));
            }
            Err(e) => {
                self.containers().remove(&request.id);
                response.failure = Some(launch_failure(e)?).into();
            }
        }
        Ok(response)
    }

    fn exec_process(&self, request: ExecProcessRequest) -> Answered<ExecProcessResponse> {
        let container = self.container(&request.container_id)?;
        let mut response = ExecProcessResponse::default();
        match self.workshop.exec(&container, &request) {
            Ok((number, notices)) => {
                response.pid = pid(number);
                response.notices = notices;
            }
            Err(e) => response.failure = Some(launch_failure(e)?).into(),
        }
        Ok(response)
    }

    fn start_process(&self, request: StartProcessRequest) -> Answered<StartProcessResponse> {
        let process = self.process(&request.container_id, &request.process_id)?;
        let mut response = StartProcessResponse::default();
        if let Err(e) = process.start() {
            response.failure = Some(launch_failure(e)?).into();
        }
        response.started_ns = sys::clock_ns(libc::CLOCK_BOOTTIME);
        Ok(response)
    }

    fn wait_process(&self, request: WaitProcessRequest) -> Answered<WaitProcessResponse> {
        let process = self.process(&request.container_id, &request.process_id)?;
        let timeout = Duration::from_millis(request.timeout_ms.min(WAIT_MAX_MS).into());
        Ok(match process.exit.wait(timeout) {
            None => WaitProcessResponse { running: true, ..Default::default() },
            Some(ended) => WaitProcessResponse {
                running: false,
                exit_code: ended.code.into(),
                signal: ended.signal.into(),
                oom_killed: process.was_oom_killed(),
                exited_ns: ended.at_ns,
                exited_unix_ns: ended.at_unix_ns,
                ..Default::default()
            },
        })
    }

    fn signal_process(&self, request: SignalProcessRequest) -> Answered<Empty> {
        const LAST: u32 = 64;
        if request.signal == 0 || request.signal > LAST {
            let message = format!("signal {} is not 1 to {LAST}", request.signal);
            return Err(Status::new(Code::INVALID_ARGUMENT, message));
        }
        let signal = i32::try_from(request.signal).unwrap_or(libc::SIGKILL);
        let container = self.container(&request.container_id)?;
        empty(if request.all {
            container.signal_all(signal)
        } else {
            container.process(&request.process_id).and_then(|process| process.signal(signal))
        })
    }

    fn resize_terminal(&self, request: ResizeTerminalRequest) -> Answered<Empty> {
        let process = self.process(&request.container_id, &request.process_id)?;
        let clamp = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let result = process.streams.resize(clamp(request.columns), clamp(request.rows));
        empty(match result {
            None => Err(Error::State("the process has no terminal".into())),
            Some(result) => result.context(|| "resize the terminal".into()),
        })
    }

    fn close_stdin(&self, request: CloseStdinRequest) -> Answered<Empty> {
        let process = self.process(&request.container_id, &request.process_id)?;
        process.streams.close_stdin();
        Ok(Empty::default())
    }

    fn delete_process(&self, request: DeleteProcessRequest) -> Answered<Empty> {
        let container = self.container(&request.container_id)?;
        empty(container.delete_process(&request.process_id))
    }

    fn delete_container(&self, request: DeleteContainerRequest) -> Answered<Empty> {
        let container = self.container(&request.container_id)?;
        empty(self.take_apart(&container, request.force))
    }

    fn list_containers(&self, _: Empty) -> Answered<ListContainersResponse> {
        let containers: Vec<_> = self.containers().values().flatten().cloned().collect();
        let state = |container: &Arc<Container>| {
            let (status, further) = container.status();
            ContainerState {
                id: container.id().into(),
                status: status.into(),
                pid: container.process("").map_or(0, |p| pid(p.pid)),
                process_ids: std::iter::once(String::new())
                    .chain(further.into_iter().map(|(id, _)| id))
                    .collect(),
                ..Default::default()
            }
        };
        let containers = containers.iter().map(state).collect();
        Ok(ListContainersResponse { containers, ..Default::default() })
    }

    fn list_processes(&self, request: ListProcessesRequest) -> Answered<ListProcessesResponse> {
        let container = self.container(&request.container_id)?;
        let (_, further) = container.status();
        let mut pids = container.cgroup().processes();
        if !container.cgroup().exists() {
            pids = further.iter().map(|(_, pid)| *pid).collect();
            pids.push(container.process("")?.pid);
        }
        let processes = pids
            .into_iter()
            .filter_map(|pid| {
                let mut found = info::process(pid)?;
                if let Some((id, _)) = further.iter().find(|(_, known)| *known == pid) {
                    found.process_id.clone_from(id);
                }
                Some(found)
            })
            .collect();
        Ok(ListProcessesResponse { processes, ..Default::default() })
    }

    fn update_resources(
        &self,
        request: UpdateResourcesRequest,
    ) -> Answered<UpdateResourcesResponse> {
        let notices = self.container(&request.container_id)?.update(&request.resources_json)?;
        Ok(UpdateResourcesResponse { notices, ..Default::default() })
    }

    fn pause_container(&self, request: PauseContainerRequest) -> Answered<Empty> {
        empty(self.container(&request.container_id)?.pause(true))
    }

    fn resume_container(&self, request: ResumeContainerRequest) -> Answered<Empty> {
        empty(self.container(&request.container_id)?.pause(false))
    }

    fn stats(&self, request: StatsRequest) -> Answered<StatsResponse> {
        Ok(self.container(&request.container_id)?.cgroup().stats())
    }

    fn configure_network(&self, request: ConfigureNetworkRequest) -> Answered<Empty> {
        empty(network::configure(&request.interfaces))
    }

    fn plug_disk(&self, request: DiskRequest) -> Answered<Empty> {
        empty(disks::plug(request.place))
    }

    fn unplug_disk(&self, request: DiskRequest) -> Answered<Empty> {
        empty(disks::unplug(request.place))
    }

    fn add_file_system(&self, request: AddFileSystemRequest) -> Answered<AddFileSystemResponse> {
        let there = filesystems::add(&request.fs_type, &request.module)?;
        Ok(AddFileSystemResponse { there, ..Default::default() })
    }
}

fn pid(pid: i32) -> u32 {
    u32::try_from(pid).unwrap_or(0)
}
