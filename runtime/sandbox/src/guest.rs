//! Talking to the agent in the guest: calls and standard streams.
//!
//! Every connection goes through the sandbox's vsock socket: `CONNECT <port>\n` is written, the
//! monitor answers `OK <number>\n`, and from then on the bytes are the guest's.

mod control;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mvm_agent_protocol::messages::launch_failure::Kind as FailureKind;
use mvm_agent_protocol::messages::{
    BlockDevice, ConfigureNetworkRequest, CreateContainerRequest, DeleteProcessRequest,
    ExecProcessRequest, GivenDevice, GuestInfoRequest, GuestInfoResponse, InlineFile,
    LaunchFailure, ListProcessesRequest, NetworkInterface, ProcessInfo, ResizeTerminalRequest,
    Rootfs, SetClockRequest, Share, SignalProcessRequest, StartProcessRequest, StatsRequest,
    StatsResponse, Stdio as StdioMessage, Tmpfs, Volume, WaitProcessRequest,
};
use mvm_agent_protocol::rpc::{CallError, Client};
use mvm_agent_protocol::stream::{Dial, Header, Kind};
use mvm_agent_protocol::{WAIT_MAX_MS, port};

use crate::error::Error;
use crate::spec::{self, Container, FileSystem, Root};

/// The vsock socket's name in the sandbox's directory.
pub const VSOCK_SOCKET: &str = "vsock.sock";

/// How long an ordinary call may take. Generous: the guest may be emulated on a busy host.
const CALL: Duration = Duration::from_secs(60);

/// Longest answer line of the monitor to `CONNECT`.
const MAX_ANSWER: usize = 64;

/// Which standard streams of a process are joined to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stdio {
    /// Standard input is fed by the host; otherwise it is `/dev/null`.
    pub stdin: bool,
    /// Standard output and error come to the host; otherwise they are `/dev/null`.
    pub output: bool,
    /// One terminal in place of three streams.
    pub terminal: bool,
}

impl Stdio {
    fn message(self) -> StdioMessage {
        StdioMessage {
            stdin: self.stdin,
            stdout: self.output && !self.terminal,
            stderr: self.output && !self.terminal,
            terminal: self.terminal,
            ..Default::default()
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code as a shell would show it: 128 + n after signal n.
    pub code: i32,
    /// A memory limit ended it.
    pub oom_killed: bool,
}

/// The joined ends of a process's streams.
#[derive(Debug)]
pub struct Streams {
    /// To the process.
    pub input: Option<UnixStream>,
    /// Standard output, or the terminal's.
    pub output: Option<UnixStream>,
    /// Standard error, unless there is a terminal.
    pub error: Option<UnixStream>,
}

/// Reaches the ports of one guest.
#[derive(Debug, Clone)]
pub struct Dialer {
    socket: PathBuf,
    limit: Duration,
}

impl Dialer {
    /// The guest of the sandbox in `dir`, which has to accept connections within `limit`.
    pub fn new(dir: &Path, limit: Duration) -> Self {
        Self { socket: dir.join(VSOCK_SOCKET), limit }
    }

    /// Connects to a port of the guest.
    pub fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let mut stream = crate::socket::connect(&self.socket)?;
        stream.set_read_timeout(Some(self.limit))?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        let mut answer = Vec::new();
        // Byte by byte: what follows the line belongs to the guest.
        loop {
            let mut byte = [0];
            stream.read_exact(&mut byte).map_err(|e| refused(port, &e))?;
            match byte[0] {
                b'\n' => break,
                _ if answer.len() >= MAX_ANSWER => break,
                other => answer.push(other),
            }
        }
        if !answer.starts_with(b"OK") {
            let text = String::from_utf8_lossy(&answer).into_owned();
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, text));
        }
        stream.set_read_timeout(None)?;
        Ok(stream)
    }
}

fn refused(port: u32, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("the guest does not accept connections to port {port}: {e}"))
}

/// The agent of one guest. The empty process id is the container's first process.
#[derive(Debug, Clone)]
pub struct Guest {
    dialer: Dialer,
    client: Client,
    container: String,
    limit: Duration,
}

impl Guest {
    /// Connects to the agent of the sandbox `id` in `dir`.
    pub fn connect(dir: &Path, id: &str) -> Result<Self, Error> {
        Self::connect_within(dir, id, CALL)
    }

    /// The same, where no call may take longer than `limit`.
    pub fn connect_within(dir: &Path, id: &str, limit: Duration) -> Result<Self, Error> {
        let dialer = Dialer::new(dir, limit);
        let what = "cannot reach the agent in the guest";
        let stream = dialer.dial(port::CONTROL).map_err(Error::io(what))?;
        let client = Client::new(stream).map_err(Error::io(what))?;
        Ok(Self { dialer, client, container: id.to_owned(), limit })
    }

    /// The same guest's container of another id.
    pub fn of(&self, container: &str) -> Self {
        Self { container: container.to_owned(), ..self.clone() }
    }

    /// The same, where no call may take longer than `limit`.
    pub fn within(&self, limit: Duration) -> Self {
        Self { limit, ..self.clone() }
    }

    /// The same, where calls may take so much longer.
    pub fn patient(&self, more: Duration) -> Self {
        self.within(self.limit.saturating_add(more))
    }

    /// Sets up the container; returns what the guest will not honour.
    pub fn create(
        &self,
        container: &Container,
        stdio: Stdio,
        init: bool,
    ) -> Result<Vec<String>, Error> {
        let spec = serde_json::to_vec(&container.spec)
            .map_err(|e| Error::io("cannot encode the specification")(e.into()))?;
        let files = container.files.iter().map(|file| {
            let mut volume = Volume { name: file.name.clone().into_owned(), ..Default::default() };
            let (data, mode) = (file.data.clone(), file.mode);
            volume.set_file(InlineFile { data, mode, ..Default::default() });
            volume
        });
        let shared = container.volumes.iter().map(|shared| {
            let name = shared.name.clone();
            let readonly = shared.bind.read_only;
            let mut volume = Volume { name: name.clone(), readonly, ..Default::default() };
            let path = if shared.file { mvm_fs::FILE.to_owned() } else { String::new() };
            volume.set_share(share(name, path));
            volume
        });
        let memory = container.memory.iter().map(|memory| {
            let mut volume = Volume { name: memory.name.clone(), kept: true, ..Default::default() };
            volume.set_tmpfs(Tmpfs { size_bytes: memory.size, ..Default::default() });
            volume
        });
        let request = CreateContainerRequest {
            id: self.container.clone(),
            spec_json: spec,
            rootfs: Some(rootfs(&container.root)).into(),
            volumes: files.chain(shared).chain(memory).collect(),
            stdio: Some(stdio.message()).into(),
            init,
            devices: container.devices.iter().map(given).collect(),
            state_json: container.hook_state.clone(),
            ..Default::default()
        };
        let response = self.client.create_container(&request, self.limit).map_err(refused_setup)?;
        match response.failure.into_option() {
            Some(failure) => Err(launch_error(failure, program(&container.spec))),
            None => Ok(response.notices),
        }
    }

    /// Sets up a further process.
    pub fn exec(
        &self,
        process: &str,
        spec: &oci_spec::runtime::Process,
        stdio: Stdio,
    ) -> Result<Vec<String>, Error> {
        let json = serde_json::to_vec(spec)
            .map_err(|e| Error::io("cannot encode the process")(e.into()))?;
        let request = ExecProcessRequest {
            container_id: self.container.clone(),
            process_id: process.to_owned(),
            process_json: json,
            stdio: Some(stdio.message()).into(),
            ..Default::default()
        };
        let response = self.client.exec_process(&request, self.limit).map_err(refused_setup)?;
        match response.failure.into_option() {
            Some(failure) => Err(launch_error(failure, first(spec.args().as_deref()))),
            None => Ok(response.notices),
        }
    }

    /// Joins the streams of a process that has been set up.
    pub fn attach(&self, process: &str, stdio: Stdio) -> Result<Streams, Error> {
        if stdio.terminal {
            let output = self.attach_one(process, Kind::Terminal)?;
            let input = match stdio.stdin {
                true => Some(output.try_clone().map_err(Error::io("cannot join the terminal"))?),
                false => None,
            };
            return Ok(Streams { input, output: Some(output), error: None });
        }
        let input = match stdio.stdin {
            true => Some(self.attach_one(process, Kind::Stdin)?),
            false => None,
        };
        let (output, error) = match stdio.output {
            true => (
                Some(self.attach_one(process, Kind::Stdout)?),
                Some(self.attach_one(process, Kind::Stderr)?),
            ),
            false => (None, None),
        };
        Ok(Streams { input, output, error })
    }

    fn attach_one(&self, process: &str, kind: Kind) -> Result<UnixStream, Error> {
        let what = || format!("cannot join the process's {kind:?}");
        let mut stream = self.dialer.dial(port::STREAM).map_err(Error::io(what()))?;
        let header =
            Header { container_id: self.container.clone(), process_id: process.into(), kind };
        stream.set_read_timeout(Some(self.limit)).map_err(Error::io(what()))?;
        header.write(&mut stream)?;
        header.confirm(&mut stream)?;
        stream.set_read_timeout(None).map_err(Error::io(what()))?;
        Ok(stream)
    }

    /// Connects to who listens at a TCP port of the guest's loopback.
    pub fn dial_loopback(&self, port: u16) -> Result<UnixStream, Error> {
        let what = || format!("cannot reach port {port} of the guest's loopback");
        let mut stream = self.dialer.dial(port::STREAM).map_err(Error::io(what()))?;
        stream.set_read_timeout(Some(self.limit)).map_err(Error::io(what()))?;
        let dial = Dial { port };
        dial.write(&mut stream)?;
        dial.confirm(&mut stream)?;
        stream.set_read_timeout(None).map_err(Error::io(what()))?;
        Ok(stream)
    }

    /// Executes the program of a process that has been set up.
    pub fn start(&self, process: &str, program: &str) -> Result<(), Error> {
        let request = StartProcessRequest {
            container_id: self.container.clone(),
            process_id: process.to_owned(),
            ..Default::default()
        };
        let response = self.client.start_process(&request, self.limit)?;
        match response.failure.into_option() {
            Some(failure) => Err(launch_error(failure, program.to_owned())),
            None => Ok(()),
        }
    }

    /// Waits until a process has ended. The end of the machine ends the wait too, as an error.
    pub fn wait(&self, process: &str) -> Result<Exit, CallError> {
        loop {
            if let Some(exit) = self.poll_exit(process, WAIT_MAX_MS)? {
                return Ok(exit);
            }
        }
    }

    /// Waits for at most `limit_ms`.
    pub fn poll_exit(&self, process: &str, limit_ms: u32) -> Result<Option<Exit>, CallError> {
        let request = WaitProcessRequest {
            container_id: self.container.clone(),
            process_id: process.to_owned(),
            timeout_ms: limit_ms,
            ..Default::default()
        };
        let limit = Duration::from_millis(u64::from(limit_ms)) + self.limit;
        let response = match self.client.wait_process(&request, limit) {
            // A machine that is paused answers later.
            Err(CallError::Timeout { .. }) => return Ok(None),
            other => other?,
        };
        if response.running {
            return Ok(None);
        }
        let code = match response.signal {
            0 => i32::try_from(response.exit_code).unwrap_or(255),
            signal => i32::try_from(signal).map_or(255, |s| 128 + (s & 0x7f)),
        };
        Ok(Some(Exit { code, oom_killed: response.oom_killed }))
    }

    /// Sends a signal to a process.
    pub fn signal(&self, process: &str, signal: i32) -> Result<(), Error> {
        let request = SignalProcessRequest {
            container_id: self.container.clone(),
            process_id: process.to_owned(),
            signal: signal.unsigned_abs(),
            ..Default::default()
        };
        self.client.signal_process(&request, self.limit)?;
        Ok(())
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, process: &str, columns: u16, rows: u16) -> Result<(), Error> {
        let request = ResizeTerminalRequest {
            container_id: self.container.clone(),
            process_id: process.to_owned(),
            columns: columns.into(),
            rows: rows.into(),
            ..Default::default()
        };
        self.client.resize_terminal(&request, self.limit)?;
        Ok(())
    }

    /// Forgets a further process that has ended.
    pub fn delete(&self, process: &str) -> Result<(), Error> {
        let request = DeleteProcessRequest {
            container_id: self.container.clone(),
            process_id: process.to_owned(),
            ..Default::default()
        };
        self.client.delete_process(&request, self.limit)?;
        Ok(())
    }

    /// Sets the guest's clock to the host's, as after a pause.
    pub fn set_clock(&self) -> Result<(), Error> {
        let request = SetClockRequest { unix_time_ns: unix_time_ns(), ..Default::default() };
        self.client.set_clock(&request, self.limit)?;
        Ok(())
    }

    /// Gives the guest's network devices their addresses and routes.
    pub fn configure_network(&self, interfaces: Vec<NetworkInterface>) -> Result<(), Error> {
        let request = ConfigureNetworkRequest { interfaces, ..Default::default() };
        self.client.configure_network(&request, self.limit)?;
        Ok(())
    }

    /// Figures of the container's control group.
    pub fn stats(&self) -> Result<StatsResponse, Error> {
        let request = StatsRequest { container_id: self.container.clone(), ..Default::default() };
        Ok(self.client.stats(&request, self.limit)?)
    }

    /// Memory, uptime and the like.
    pub fn info(&self) -> Result<GuestInfoResponse, Error> {
        Ok(self.client.guest_info(&GuestInfoRequest::new(), self.limit)?)
    }

    /// The processes in the container.
    pub fn processes(&self) -> Result<Vec<ProcessInfo>, Error> {
        let request =
            ListProcessesRequest { container_id: self.container.clone(), ..Default::default() };
        Ok(self.client.list_processes(&request, self.limit)?.processes)
    }
}

fn rootfs(root: &Root) -> Rootfs {
    let disk = |system: &FileSystem| BlockDevice {
        fs_type: system.kind.clone(),
        options: system.options.clone(),
        ..Default::default()
    };
    let mut rootfs = Rootfs::new();
    match root {
        Root::Image => {
            let mut disk = BlockDevice { fs_type: "erofs".into(), ..Default::default() };
            disk.set_index(0);
            rootfs.set_block(disk);
            rootfs.set_tmpfs(Tmpfs::new());
        }
        Root::Directory(path) => {
            rootfs.set_path(path.clone());
            rootfs.set_tmpfs(Tmpfs::new());
        }
        Root::Share(name) => {
            rootfs.set_share(share(name.clone(), String::new()));
            rootfs.direct = true;
        }
        Root::Disk { index, system } => {
            let mut disk = disk(system);
            disk.set_index(*index);
            rootfs.set_block(disk);
            // Without an upper layer it is read-only.
            rootfs.direct = !system.read_only;
        }
        Root::Plugged { place, system } => {
            let mut disk = disk(system);
            disk.set_place(*place);
            rootfs.set_block(disk);
            rootfs.direct = !system.read_only;
        }
    }
    rootfs
}

fn given(device: &spec::GivenDevice) -> GivenDevice {
    let mut disk = BlockDevice::new();
    disk.set_place(device.place);
    GivenDevice {
        major: device.major,
        minor: device.minor,
        device: Some(disk).into(),
        ..Default::default()
    }
}

fn share(name: String, path: String) -> Share {
    Share { name, path, max_files: mvm_fs::max_files(), ..Default::default() }
}

/// The host's clock, as hello and the agent want it.
pub fn unix_time_ns() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(0))
}

/// What a specification runs.
pub fn program(spec: &oci_spec::runtime::Spec) -> String {
    first(spec.process().as_ref().and_then(|p| p.args().as_deref()))
}

fn first(args: Option<&[String]>) -> String {
    args.and_then(<[String]>::first).cloned().unwrap_or_default()
}

/// What the agent will not set up it says in its own words; the call's name adds nothing to them.
fn refused_setup(error: CallError) -> Error {
    match error {
        CallError::Refused { status, .. } => Error::Setup(status.message),
        other => other.into(),
    }
}

fn launch_error(failure: LaunchFailure, program: String) -> Error {
    let message = failure.message.clone();
    match failure.kind.enum_value_or_default() {
        FailureKind::NOT_FOUND => Error::NotFound { program, message },
        FailureKind::NOT_EXECUTABLE => Error::NotExecutable { program, message },
        FailureKind::OTHER => Error::Setup(message),
    }
}
