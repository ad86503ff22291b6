//! Starting a machine for a sandbox, up to the agent's first word.
//!
//! [`Launcher`] is the seam to the monitor: the real one starts a process, tests put a machine of
//! their own making in its place and so need neither engine nor guest.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mvm_agent_protocol::{hello, port};
use mvm_fs::{FileServer, NewShare};
use mvm_net::Joined;
use mvm_vmm::config::{
    CmdlineStyle, CpuModel, DialConfig, DiskConfig, EngineConfig, FsConfig, GuestPort, HugePages,
    ImageSource, MachineConfig, ModuleConfig, NetConfig, OwnerGone, VsockConfig,
};
use mvm_vmm::monitor::spawn::Error as SpawnError;
use mvm_vmm::monitor::{ControlClient, Event, FdTable, Launch, Monitor, Request, Response, spawn};
use mvm_vmm::{EndReason, Outcome};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::engine::{Selected, Selection};
use crate::error::Error;
use crate::guest::{VSOCK_SOCKET, unix_time_ns};
use crate::network::Card;
use crate::registry::Place;
use crate::sandbox::Disk;
use crate::timings::Timings;
use crate::vsock::Door;

/// The control socket's name in the sandbox's directory.
pub const CONTROL_SOCKET: &str = "control.sock";

/// The name, in the sandbox's directory, of the socket by which shares come and go
/// ([`mvm_fs::ShareClient`]).
pub const SHARES_SOCKET: &str = "shares.sock";

/// Name of the file in the sandbox's directory that tells how the machine ended.
pub const OUTCOME_FILE: &str = "outcome.json";

/// Name of the console's log in the sandbox's log directory.
pub const CONSOLE_LOG: &str = "console.log";

/// Name of the monitor's own log in the sandbox's log directory.
pub const MONITOR_LOG: &str = "monitor.log";

/// Name of the file server's own log in the sandbox's log directory.
pub const FILES_LOG: &str = "files.log";

/// The guest's vsock context id. Each machine has a vsock of its own, so all can have the same.
const CID: u64 = 3;

/// How long a hello may take once the guest has connected.
const HELLO: Duration = Duration::from_secs(30);

/// How long a monitor may take to say why it ended.
pub(crate) const LAST_WORDS: Duration = Duration::from_secs(3);

/// A piece of an open file.
#[derive(Debug)]
pub struct Payload {
    /// The file.
    pub file: File,
    /// First byte.
    pub offset: u64,
    /// Number of bytes, or all up to the end.
    pub len: Option<u64>,
}

impl Payload {
    /// A whole file.
    pub fn file(file: File) -> Self {
        Self { file, offset: 0, len: None }
    }
}

/// A machine to be started. Everything in it is open already.
#[derive(Debug)]
pub struct MachinePlan {
    /// vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Guest memory that it can grow to while it runs, in bytes ([`crate::memory`]); 0 for a machine that stays as it is.
    pub memory_max: u64,
    /// The host's pages that it is made of.
    pub hugepages: HugePages,
    /// What runs it.
    pub engine: Selection,
    /// The processor that the guest sees, if it matters.
    pub cpu: Option<CpuModel>,
    /// The kernel.
    pub kernel: Payload,
    /// The initramfs with the agent.
    pub initramfs: Option<Payload>,
    /// Disks, in the order of their names in the guest. The first one usually is the container's root.
    pub disks: Vec<Disk>,
    /// Places for disks that come while it runs ([`Sandbox::monitor_client`](crate::Sandbox::monitor_client)): that
    /// many, or as many as other devices leave.
    pub disk_slots: u32,
    /// The directories and files of the host that the guest is to see; `None` for a machine that has no
    /// shared file system and can get none.
    pub shares: Option<Vec<NewShare>>,
    /// Appended to the kernel's command line.
    pub cmdline: String,
    /// Where the console goes in place of the sandbox's own log. The kernel is verbose then.
    pub console: Option<File>,
    /// How long the guest may take until its agent is ready.
    pub boot_limit: Duration,
    /// What happens to it when this process is killed.
    pub owner_gone: OwnerGone,
}

/// A machine that has been started.
pub trait Machine: Debug + Send {
    /// The process that is the machine.
    fn pid(&self) -> u32;
    /// Becomes readable when there is an event.
    fn channel(&self) -> BorrowedFd<'_>;
    /// The next event until `deadline`.
    fn next_event(&mut self, deadline: Option<Instant>) -> Result<Option<Event>, SpawnError>;
    /// Ends it at once and collects what is left of it.
    fn end(&mut self) -> io::Result<()>;
}

impl Machine for Monitor {
    fn pid(&self) -> u32 {
        Monitor::pid(self)
    }

    fn channel(&self) -> BorrowedFd<'_> {
        Monitor::channel(self)
    }

    fn next_event(&mut self, deadline: Option<Instant>) -> Result<Option<Event>, SpawnError> {
        Monitor::next_event(self, deadline)
    }

    fn end(&mut self) -> io::Result<()> {
        self.kill()?;
        self.wait().map(drop)
    }
}

/// A machine whose files another process serves, which ends with it.
#[derive(Debug)]
struct Served {
    machine: Box<dyn Machine>,
    server: FileServer,
}

impl Machine for Served {
    fn pid(&self) -> u32 {
        self.machine.pid()
    }

    fn channel(&self) -> BorrowedFd<'_> {
        self.machine.channel()
    }

    fn next_event(&mut self, deadline: Option<Instant>) -> Result<Option<Event>, SpawnError> {
        self.machine.next_event(deadline)
    }

    fn end(&mut self) -> io::Result<()> {
        let ended = self.machine.end();
        self.server.finish();
        ended
    }
}

/// Starts machines.
pub trait Launcher {
    /// Starts one.
    fn launch(&self, launch: Launch) -> Result<Box<dyn Machine>, SpawnError>;
}

/// Starts each machine in a monitor process of its own.
#[derive(Debug, Clone, Copy, Default)]
pub struct MonitorLauncher;

impl Launcher for MonitorLauncher {
    fn launch(&self, launch: Launch) -> Result<Box<dyn Machine>, SpawnError> {
        Ok(Box::new(spawn(launch)?))
    }
}

/// A machine on its way: its agent has not said hello yet.
#[derive(Debug)]
pub struct Starting {
    machine: Box<dyn Machine>,
    hello: UnixStream,
    /// The sandbox's directory.
    dir: PathBuf,
    deadline: Instant,
    limit: Duration,
}

/// What every machine has, whatever runs in it.
#[derive(Debug)]
pub(crate) struct Hardware {
    pub vcpus: u32,
    pub memory: u64,
    pub hugepages: HugePages,
    pub engine: Selection,
    pub cpu: Option<CpuModel>,
    pub kernel: Payload,
    pub initramfs: Option<Payload>,
}

/// A machine's config on its way, with the descriptors that it names.
#[derive(Debug)]
pub(crate) struct Draft {
    pub fds: FdTable,
    pub config: MachineConfig,
}

impl Draft {
    /// A machine of `hardware` that can be controlled and leaves word of its end at `place`.
    pub fn new(place: &Place, hardware: Hardware) -> Result<Self, Error> {
        let mut fds = FdTable::new();
        let mut image = |payload: Payload| ImageSource {
            fd: fds.add(payload.file),
            offset: payload.offset,
            len: payload.len,
        };
        let kernel = image(hardware.kernel);
        let mut config = MachineConfig::new(place.id.clone(), hardware.memory, kernel);
        config.initramfs = hardware.initramfs.map(&mut image);
        config.vcpus = hardware.vcpus;
        config.hugepages = hardware.hugepages;
        config.fallback = hardware.engine.fallback.then_some(hardware.engine.reason);
        config.emu.tier = hardware.engine.tier;
        config.emu.tsc_khz = hardware.engine.tsc_khz;
        config.engine = match hardware.engine.engine {
            Selected::Emu => EngineConfig::Emu,
            Selected::Kvm(device) => EngineConfig::Kvm { device: fds.add(device) },
        };
        config.cpu = hardware.cpu;
        config.outcome = Some(fds.add(create(&place.dir.join(OUTCOME_FILE))?));
        config.control = Some(fds.add(listen(place, CONTROL_SOCKET)?));
        Ok(Self { fds, config })
    }

    /// Where the console goes.
    pub fn console(&mut self, to: impl Into<OwnedFd>) {
        self.config.console.log = Some(self.fds.add(to));
    }

    /// What is typed at the console.
    pub fn console_input(&mut self, from: impl Into<OwnedFd>) {
        self.config.console.input = Some(self.fds.add(from));
    }

    /// One more disk.
    pub fn disk(&mut self, file: File, read_only: bool, serial: String) {
        self.config.disks.push(DiskConfig { fd: self.fds.add(file), read_only, serial });
    }

    /// One more module, and what the kernel is told of it.
    pub fn module(&mut self, payload: Payload, text: String) {
        let Payload { file, offset, len } = payload;
        let content = ImageSource { fd: self.fds.add(file), offset, len };
        self.config.modules.push(ModuleConfig { content, text });
    }

    /// A file system of `shares`, and the process that serves it.
    fn share(&mut self, place: &Place, shares: Vec<NewShare>) -> Result<FileServer, Error> {
        let path = place.dir.join(SHARES_SOCKET);
        let listener = crate::socket::bind_packets(&path);
        let (server, channel) = mvm_fs::spawn(mvm_fs::Launch {
            id: place.id.clone(),
            shares,
            listener: listener.map_err(Error::io(path.display().to_string()))?,
            log: Some(create(&place.logs.join(FILES_LOG))?),
            program: "/proc/self/exe".into(),
        })?;
        let channel = self.fds.add(channel);
        self.config.fs = Some(FsConfig { tag: mvm_fs::TAG.into(), channel });
        Ok(server)
    }

    /// One more network device.
    pub fn net(&mut self, card: Card) {
        let Joined { interface, queues } = card.joined;
        let queues = queues.into_iter().map(|fd| self.fds.add(fd)).collect();
        self.config.nets.push(NetConfig { queues, mac: interface.mac, mtu: card.mtu });
    }

    /// Sockets between the guest and whoever comes to `door`.
    pub fn sockets(&mut self, door: Door) {
        let Door { listener, directory, name } = door;
        self.config.vsock = Some(VsockConfig {
            cid: CID,
            listener: Some(self.fds.add(listener)),
            guest_ports: Vec::new(),
            dial: Some(DialConfig { directory: self.fds.add(directory), name }),
        });
    }

    /// Starts it, with the monitor's own log at `place`.
    pub fn launch(self, launcher: &dyn Launcher, place: &Place) -> Result<Box<dyn Machine>, Error> {
        let mut launch = Launch::new(self.config, self.fds);
        launch.log = Some(create(&place.logs.join(MONITOR_LOG))?);
        Ok(launcher.launch(launch)?)
    }
}

/// Opens what the machine needs and starts it.
pub(crate) fn launch(
    launcher: &dyn Launcher,
    place: &Place,
    plan: MachinePlan,
    cards: Vec<Card>,
) -> Result<Starting, Error> {
    let MachinePlan { vcpus, memory, hugepages, engine, cpu, kernel, initramfs, .. } = plan;
    let hardware = Hardware { vcpus, memory, hugepages, engine, cpu, kernel, initramfs };
    let mut draft = Draft::new(place, hardware)?;
    draft.config.memory_max = plan.memory_max;
    draft.config.cmdline = plan.cmdline;
    // The guest is Linux whatever its kernel's file looks like: a stripped one has no notes that say so.
    draft.config.cmdline_style = CmdlineStyle::Linux;
    draft.config.verbose = plan.console.is_some();
    draft.config.owner_gone = plan.owner_gone;
    for (index, Disk { file, read_only }) in plan.disks.into_iter().enumerate() {
        draft.disk(file, read_only, format!("disk{index}"));
    }
    let server = match plan.shares {
        Some(shares) => Some(draft.share(place, shares)?),
        None => None,
    };
    cards.into_iter().for_each(|card| draft.net(card));
    draft.console(match plan.console {
        Some(file) => file,
        None => create(&place.logs.join(CONSOLE_LOG))?,
    });
    let (hello, theirs) = UnixStream::pair().map_err(Error::io("socketpair"))?;
    draft.config.vsock = Some(VsockConfig {
        cid: CID,
        listener: Some(draft.fds.add(listen(place, VSOCK_SOCKET)?)),
        guest_ports: vec![GuestPort { port: port::HELLO, stream: draft.fds.add(theirs) }],
        dial: None,
    });
    draft.config.disk_slots = plan.disk_slots.min(draft.config.room_for_disks());
    let mut machine = draft.launch(launcher, place)?;
    if let Some(server) = server {
        machine = Box::new(Served { machine, server });
    }
    let deadline = Instant::now() + plan.boot_limit;
    let dir = place.dir.clone();
    Ok(Starting { machine, hello, dir, deadline, limit: plan.boot_limit })
}

/// A connection to the monitor of the machine in the sandbox's directory `dir`, which has to answer each request within
/// `limit`.
pub(crate) fn control(dir: &Path, limit: Duration) -> Result<ControlClient, Error> {
    let path = dir.join(CONTROL_SOCKET);
    let connected = crate::socket::with_short(&path, |p| Ok(ControlClient::connect(p, limit)));
    Ok(connected.map_err(Error::io(path.display().to_string()))??)
}

fn listen(place: &Place, name: &str) -> Result<UnixListener, Error> {
    let path = place.dir.join(name);
    crate::socket::bind(&path).map_err(Error::io(path.display().to_string()))
}

fn create(path: &Path) -> Result<File, Error> {
    File::create(path).map_err(Error::io(path.display().to_string()))
}

impl Starting {
    /// The machine's process.
    pub fn pid(&self) -> u32 {
        self.machine.pid()
    }

    /// Waits until the agent has said hello. Ends early when the machine does, or when
    /// `interrupt` becomes readable; the machine is gone then.
    pub fn wait_ready(
        mut self,
        timings: &mut Timings,
        interrupt: Option<BorrowedFd<'_>>,
    ) -> Result<Box<dyn Machine>, Error> {
        timings.watch(nix::unistd::Pid::from_raw(self.pid().cast_signed()));
        match self.wait_hello(timings, interrupt) {
            Ok(()) => Ok(self.machine),
            Err(e) => {
                // Why it did not become ready is what matters, not whether it was still there.
                let _ = self.machine.end();
                Err(e)
            }
        }
    }

    fn wait_hello(
        &mut self,
        timings: &mut Timings,
        interrupt: Option<BorrowedFd<'_>>,
    ) -> Result<(), Error> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.too_late());
            }
            let mut fds = vec![self.machine.channel(), self.hello.as_fd()];
            fds.extend(interrupt);
            let ready = readable(&fds, Some(left))?;
            let ready = |at: usize| ready.get(at).copied().unwrap_or(false);
            let (event, hello, interrupted) = (ready(0), ready(1), ready(2));
            if interrupted {
                return Err(Error::Interrupted);
            }
            if event {
                self.take_event(timings)?;
            } else if hello {
                return self.answer_hello(timings);
            }
        }
    }

    fn take_event(&mut self, timings: &mut Timings) -> Result<(), Error> {
        match self.machine.next_event(Some(Instant::now() + LAST_WORDS))? {
            Some(Event::Phase(mark)) => timings.mark_monitor(mark),
            // As we chose, and a container's guest is always Linux.
            Some(Event::Engine { .. } | Event::Boot { .. }) => {}
            Some(Event::Failed { message }) => {
                return Err(Error::Boot { message, console: None });
            }
            Some(Event::Ended(outcome)) => return Err(boot_error(outcome)),
            None => {}
        }
        Ok(())
    }

    fn answer_hello(&mut self, timings: &mut Timings) -> Result<(), Error> {
        let limit = self.hello.set_read_timeout(Some(HELLO));
        limit.map_err(Error::io("cannot set a deadline"))?;
        let message = match hello::receive(&mut self.hello) {
            Ok(message) => message,
            Err(e) => {
                // The end of the machine closes the stream too, and is the better reason.
                let until = Instant::now() + LAST_WORDS;
                while Instant::now() < until {
                    self.take_event(timings)?;
                }
                return Err(e.into());
            }
        };
        hello::answer(&mut self.hello, &message, unix_time_ns())?;
        timings.mark("agent ready");
        Ok(())
    }

    fn too_late(&mut self) -> Error {
        let message = format!(
            "the agent in the guest did not report within {} s; \
             `--console FILE` shows what the guest does meanwhile",
            self.limit.as_secs()
        );
        Error::Boot { message, console: self.console_tail() }
    }

    /// What a guest that still runs wrote last; nothing if the monitor cannot be asked.
    fn console_tail(&self) -> Option<String> {
        let mut monitor = control(&self.dir, LAST_WORDS).ok()?;
        match monitor.request(&Request::ConsoleTail).ok()? {
            Response::ConsoleTail { text } => Some(text),
            _ => None,
        }
    }
}

/// Which of `fds` are readable, or all false after `limit` or a signal.
pub(crate) fn readable(
    fds: &[BorrowedFd<'_>],
    limit: Option<Duration>,
) -> Result<Vec<bool>, Error> {
    let timeout = limit.map_or(PollTimeout::NONE, |left| {
        PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
    });
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    match poll(&mut polled, timeout) {
        Ok(_) => Ok(polled.iter().map(|fd| fd.any().unwrap_or(false)).collect()),
        Err(nix::errno::Errno::EINTR) => Ok(vec![false; fds.len()]),
        Err(e) => Err(Error::io("poll")(e.into())),
    }
}

pub(crate) fn boot_error(outcome: Outcome) -> Error {
    Error::Boot { message: outcome.reason.to_string(), console: Some(outcome.console_tail) }
}

/// Hears a running machine's events until it has ended, or for at most `limit`.
pub fn last_words(machine: &mut dyn Machine, limit: Duration) -> Outcome {
    let deadline = Instant::now() + limit;
    loop {
        match machine.next_event(Some(deadline)) {
            Ok(Some(Event::Ended(outcome))) => return outcome,
            Ok(Some(Event::Failed { message })) => return died(message),
            Ok(Some(_)) => {}
            Ok(None) => return died("it stopped answering".into()),
            Err(e) => return died(e.to_string()),
        }
    }
}

pub(crate) fn died(status: String) -> Outcome {
    Outcome { reason: EndReason::MonitorDied { status }, console_tail: String::new() }
}
