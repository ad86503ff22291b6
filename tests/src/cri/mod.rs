//! Kubernetes' side of containerd: pods and containers by CRI, as the kubelet asks for them.

mod grpc;
mod streaming;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use protobuf::{EnumOrUnknown, Message, MessageField};

use crate::{Containerd, Finished, IMAGE, eventually};
pub use grpc::Error as CallError;
pub use streaming::{RESIZE, STATUS, STDERR, STDIN, STDOUT, Session};

/// Message types generated from `proto/cri.proto`.
#[allow(missing_docs, missing_debug_implementations, unused_qualifications, clippy::all)]
pub mod messages {
    mod generated {
        include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
    }
    pub use generated::cri::*;
}

use messages::*;

const SERVICE: &str = "runtime.v1.RuntimeService";

/// Long enough for anything that is not stuck, on a slow and busy machine.
const DEADLINE: Duration = Duration::from_secs(300);

/// States of a container.
pub const RUNNING: i32 = 1;
/// It has ended.
pub const EXITED: i32 = 2;

/// A client of a containerd that serves CRI.
#[derive(Debug)]
pub struct Cri<'a> {
    ctd: &'a Containerd,
}

/// A pod.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// What it was made with.
    pub config: PodSandboxConfig,
}

impl<'a> Cri<'a> {
    /// A client, once the service is ready.
    ///
    /// # Panics
    /// If it does not become so.
    #[track_caller]
    pub fn new(ctd: &'a Containerd) -> Self {
        let this = Self { ctd };
        eventually("CRI to be ready", || {
            let status: Result<StatusResponse, _> = this.call("Status", &StatusRequest::new());
            status.is_ok_and(|s| s.status.conditions.iter().all(|c| c.status))
        });
        this
    }

    /// Any call.
    ///
    /// # Errors
    /// It is refused.
    pub fn call<A: Message>(&self, method: &str, request: &impl Message) -> Result<A, CallError> {
        grpc::call(&self.ctd.path("grpc.sock"), SERVICE, method, request, DEADLINE)
    }

    #[track_caller]
    fn must<A: Message>(&self, method: &str, request: &impl Message) -> A {
        self.call(method, request).unwrap_or_else(|e| panic!("{method}: {e}"))
    }

    /// What a pod of that name is made with, before a test changes it.
    pub fn pod_config(&self, name: &str) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: MessageField::some(PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "tests".into(),
                ..Default::default()
            }),
            hostname: name.into(),
            log_directory: self.ctd.path(&format!("logs-{name}")).display().to_string(),
            linux: MessageField::some(LinuxPodSandboxConfig::new()),
            ..Default::default()
        }
    }

    /// Runs a pod.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    pub fn run_pod(&self, config: PodSandboxConfig) -> Pod {
        fs::create_dir_all(&config.log_directory).expect("a directory for logs");
        let request = RunPodSandboxRequest {
            config: MessageField::some(config.clone()),
            runtime_handler: "mvm".into(),
            ..Default::default()
        };
        let made: RunPodSandboxResponse = self.must("RunPodSandbox", &request);
        Pod { id: made.pod_sandbox_id, config }
    }

    /// Whether a pod is ready.
    #[track_caller]
    pub fn is_ready(&self, pod: &Pod) -> bool {
        let status: PodSandboxStatusResponse = self.must("PodSandboxStatus", &pod_request(pod));
        status.status.state == 0
    }

    /// A pod's address.
    #[track_caller]
    pub fn address(&self, pod: &Pod) -> String {
        let status: PodSandboxStatusResponse = self.must("PodSandboxStatus", &pod_request(pod));
        status.status.network.ip.clone()
    }

    /// Stops and removes a pod, with all containers in it.
    #[track_caller]
    pub fn remove_pod(&self, pod: &Pod) {
        let _: Nothing = self.must("StopPodSandbox", &pod_request(pod));
        let _: Nothing = self.must("RemovePodSandbox", &pod_request(pod));
    }

    /// Removes all pods there are, as far as that goes: what a test leaves that has failed. Networks
    /// outside of containerd's own directories are among it.
    pub(crate) fn clear(ctd: &'a Containerd) {
        let limit = Duration::from_secs(30);
        let socket = ctd.path("grpc.sock");
        let list = ListPodSandboxRequest::new();
        let pods: Result<ListPodSandboxResponse, _> =
            grpc::call(&socket, SERVICE, "ListPodSandbox", &list, limit);
        for pod in pods.map(|list| list.items).unwrap_or_default() {
            let request = PodSandboxRequest { pod_sandbox_id: pod.id, ..Default::default() };
            for method in ["StopPodSandbox", "RemovePodSandbox"] {
                let done: Result<Nothing, _> =
                    grpc::call(&socket, SERVICE, method, &request, limit);
                if let Err(e) = done {
                    eprintln!("{method}: {e}");
                }
            }
        }
    }

    /// What a container that runs a shell script is made with, before a test changes it. Its log is
    /// `NAME.log`.
    pub fn container_config(&self, name: &str, script: &str) -> ContainerConfig {
        ContainerConfig {
            metadata: MessageField::some(ContainerMetadata {
                name: name.into(),
                ..Default::default()
            }),
            image: MessageField::some(ImageSpec { image: IMAGE.into(), ..Default::default() }),
            command: ["sh", "-c", script].map(String::from).to_vec(),
            log_path: format!("{name}.log"),
            linux: MessageField::some(LinuxContainerConfig {
                security_context: MessageField::some(LinuxContainerSecurityContext {
                    namespace_options: MessageField::some(NamespaceOption {
                        pid: EnumOrUnknown::new(NamespaceMode::CONTAINER),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Creates and starts a container in a pod. Returns its id.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    pub fn start(&self, pod: &Pod, config: ContainerConfig) -> String {
        self.try_start(pod, config).unwrap_or_else(|e| panic!("start: {e}"))
    }

    /// The same.
    ///
    /// # Errors
    /// It is refused.
    pub fn try_start(&self, pod: &Pod, config: ContainerConfig) -> Result<String, CallError> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: MessageField::some(config),
            sandbox_config: MessageField::some(pod.config.clone()),
            ..Default::default()
        };
        let made: CreateContainerResponse = self.call("CreateContainer", &request)?;
        let _: Nothing = self.call("StartContainer", &container_request(&made.container_id))?;
        Ok(made.container_id)
    }

    /// Where a container is in its life.
    #[track_caller]
    pub fn status(&self, id: &str) -> ContainerStatus {
        let status: ContainerStatusResponse = self.must("ContainerStatus", &container_request(id));
        status.status.unwrap_or_default()
    }

    /// Waits for the end of a container, and returns its exit code.
    #[track_caller]
    pub fn wait(&self, id: &str) -> i32 {
        eventually("the end of the container", || self.status(id).state == EXITED);
        self.status(id).exit_code
    }

    /// Stops a container with that many seconds for it to end by itself.
    #[track_caller]
    pub fn stop(&self, id: &str, timeout: i64) {
        let request =
            StopContainerRequest { container_id: id.into(), timeout, ..Default::default() };
        let _: Nothing = self.must("StopContainer", &request);
    }

    /// Removes a container.
    #[track_caller]
    pub fn remove(&self, id: &str) {
        let _: Nothing = self.must("RemoveContainer", &container_request(id));
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// It is refused.
    pub fn update(&self, id: &str, limits: LinuxContainerResources) -> Result<(), CallError> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.into(),
            linux: MessageField::some(limits),
            ..Default::default()
        };
        self.call::<Nothing>("UpdateContainerResources", &request).map(drop)
    }

    /// A container's processor time in nanoseconds and its memory in bytes; zero for what is not told.
    #[track_caller]
    pub fn stats(&self, id: &str) -> (u64, u64) {
        let stats: ContainerStatsResponse = self.must("ContainerStats", &container_request(id));
        figures(&stats.stats)
    }

    /// The same of all containers, by their ids.
    #[track_caller]
    pub fn all_stats(&self) -> BTreeMap<String, (u64, u64)> {
        let list = ListContainerStatsRequest::new();
        let list: ListContainerStatsResponse = self.must("ListContainerStats", &list);
        list.stats.iter().map(|one| (one.attributes.id.clone(), figures(one))).collect()
    }

    /// Runs a shell script in a container.
    #[track_caller]
    pub fn exec(&self, id: &str, script: &str) -> Finished {
        self.try_exec(id, script).unwrap_or_else(|e| panic!("ExecSync: {e}"))
    }

    /// The same.
    ///
    /// # Errors
    /// It is refused.
    pub fn try_exec(&self, id: &str, script: &str) -> Result<Finished, CallError> {
        self.exec_within(id, script, 0)
    }

    /// Runs a shell script in a container, for so many seconds at most.
    ///
    /// # Errors
    /// It takes longer, or is refused.
    pub fn exec_within(&self, id: &str, script: &str, seconds: i64) -> Result<Finished, CallError> {
        let request = ExecSyncRequest {
            container_id: id.into(),
            cmd: ["sh", "-c", script].map(String::from).to_vec(),
            timeout: seconds,
            ..Default::default()
        };
        let done: ExecSyncResponse = self.call("ExecSync", &request)?;
        Ok(Finished { code: done.exit_code, stdout: done.stdout, stderr: done.stderr })
    }

    /// Runs a shell script in a container, with its streams in a session.
    ///
    /// # Panics
    /// If that is refused.
    #[track_caller]
    pub fn exec_session(&self, id: &str, script: &str, terminal: bool) -> Session {
        let request = ExecRequest {
            container_id: id.into(),
            cmd: ["sh", "-c", script].map(String::from).to_vec(),
            tty: terminal,
            stdin: true,
            stdout: true,
            // A terminal is one stream.
            stderr: !terminal,
            ..Default::default()
        };
        let answer: StreamingResponse = self.must("Exec", &request);
        Session::open(&answer.url)
    }

    /// Joins the streams of a container's first process.
    ///
    /// # Panics
    /// If that is refused.
    #[track_caller]
    pub fn attach(&self, id: &str, terminal: bool) -> Session {
        let request = AttachRequest {
            container_id: id.into(),
            stdin: true,
            tty: terminal,
            stdout: true,
            stderr: !terminal,
            ..Default::default()
        };
        let answer: StreamingResponse = self.must("Attach", &request);
        Session::open(&answer.url)
    }

    /// Connects to ports of a pod. Port n of them has the channels 2 n for data and 2 n + 1 for errors; on
    /// each the number of the port comes first, two bytes with the low one first.
    ///
    /// # Panics
    /// If that is refused.
    #[track_caller]
    pub fn port_forward(&self, pod: &Pod, ports: &[u16]) -> Session {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: ports.iter().map(|port| i32::from(*port)).collect(),
            ..Default::default()
        };
        let answer: StreamingResponse = self.must("PortForward", &request);
        Session::open(&answer.url)
    }

    /// What a container wrote, without the log's own words.
    pub fn log(&self, pod: &Pod, name: &str) -> String {
        let path = PathBuf::from(&pod.config.log_directory).join(format!("{name}.log"));
        let text = fs::read_to_string(path).unwrap_or_default();
        let said = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
        said.map(|line| format!("{line}\n")).collect()
    }
}

fn figures(stats: &ContainerStats) -> (u64, u64) {
    (stats.cpu.usage_core_nano_seconds.value, stats.memory.working_set_bytes.value)
}

fn pod_request(pod: &Pod) -> PodSandboxRequest {
    PodSandboxRequest { pod_sandbox_id: pod.id.clone(), ..Default::default() }
}

fn container_request(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.into(), ..Default::default() }
}
