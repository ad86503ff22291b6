//! The monitor process itself: from its first instruction to its end.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::control::{Answerer, Server};
use super::fds::{self, FdTable};
use super::protocol::{
    CONTROL_VERSION, Event, Phase, PhaseMark, Request, Response, RunState, Stats, Status,
};
use super::sys;
use super::usage::Usage;
use super::wiring;
use crate::config::{self, EngineConfig, MachineConfig, OwnerGone};
use crate::engines;
use crate::events::{Events, MachineEvent};
use crate::logfmt::{self, Logfmt};
use crate::machine::{self, Machine};
use crate::outcome::{EndReason, Outcome};

/// How long the owner may take to hand over the config.
const CONFIG_DEADLINE: Duration = Duration::from_secs(10);

/// How long an owner may leave an event unread before it is given up.
const EVENT_DEADLINE: Duration = Duration::from_secs(2);

/// Why the monitor has no machine to run.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The owner did not hand over a machine.
    #[error("the monitor was not handed a machine: {0}")]
    Channel(#[from] fds::Error),
    /// The config is impossible.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// A descriptor cannot be used for what the config says.
    #[error("{what}: {source}")]
    Descriptor {
        /// What it was to be.
        what: String,
        /// What the host said.
        source: io::Error,
    },
    /// No engine.
    #[error(transparent)]
    Engine(#[from] mvm_engine::Error),
    /// The machine cannot be made.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// The process could not be set up.
    #[error("cannot set up the monitor process: {what}: {source}")]
    Setup {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// Runs this process as a monitor: what [`SUBCOMMAND`](super::SUBCOMMAND) does.
///
/// To be called before the program opens or starts anything: every descriptor but the standard
/// three is closed. Standard input is the owner channel, standard error the log.
pub fn main() -> ExitCode {
    tracing_subscriber::fmt().event_format(Logfmt).with_writer(io::stderr).init();
    let mut owner = match set_up() {
        Ok(channel) => Owner { channel: Some(channel) },
        Err(error) => {
            tracing::error!("{error}");
            return ExitCode::FAILURE;
        }
    };
    match start(&mut owner) {
        Ok(monitor) => {
            let outcome = monitor.run(&mut owner);
            owner.tell(&Event::Ended(outcome));
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("{error}");
            owner.tell(&Event::Failed { message: error.to_string() });
            ExitCode::FAILURE
        }
    }
}

/// Makes the process fit for its work: nothing inherited, no directory held, a name of its own.
fn set_up() -> Result<UnixStream, Error> {
    let failed = |what| move |source: nix::Error| Error::Setup { what, source: source.into() };
    sys::close_inherited().map_err(|source| Error::Setup { what: "close_range", source })?;
    let channel = io::stdin().as_fd().try_clone_to_owned();
    let channel: OwnedFd = channel.map_err(|source| Error::Setup { what: "dup", source })?;
    let null = File::open("/dev/null")
        .map_err(|source| Error::Setup { what: "open /dev/null", source })?;
    nix::unistd::dup2_stdin(&null).map_err(failed("dup2"))?;
    nix::unistd::chdir("/").map_err(failed("chdir"))?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    nix::sys::prctl::set_name(c"mvm-monitor").map_err(failed("prctl"))?;
    sys::ignore_hangup().map_err(|source| Error::Setup { what: "sigaction", source })?;
    let channel = UnixStream::from(channel);
    let timeouts = channel
        .set_read_timeout(Some(CONFIG_DEADLINE))
        .and_then(|()| channel.set_write_timeout(Some(EVENT_DEADLINE)));
    timeouts.map_err(|source| Error::Setup { what: "set the channel's deadlines", source })?;
    Ok(channel)
}

/// The process that started this one, as long as it listens.
#[derive(Debug)]
struct Owner {
    channel: Option<UnixStream>,
}

impl Owner {
    fn tell(&mut self, event: &Event) {
        let Some(channel) = &self.channel else { return };
        if let Err(error) = fds::send(channel, event, &FdTable::new()) {
            tracing::info!("the owner does not listen any more: {error}");
            self.channel = None;
        }
    }
}

/// A machine and what is around it in this process.
#[derive(Debug)]
struct Monitor {
    config: MachineConfig,
    machine: Machine,
    events: Events,
    server: Server,
    outcome_file: Option<File>,
    engine: String,
    phases: Vec<PhaseMark>,
    usage: Usage,
}

/// Takes over the machine from the owner and starts it.
fn start(owner: &mut Owner) -> Result<Monitor, Error> {
    let Some(channel) = &owner.channel else { return Err(fds::Error::Closed.into()) };
    let (config, mut fds): (MachineConfig, FdTable) = fds::receive(channel)?;
    logfmt::common("sandbox", &config.id);
    config.validate()?;
    let usage =
        Usage::open().map_err(|source| Error::Setup { what: "/proc/self/statm", source })?;
    let received = PhaseMark::now(Phase::Monitor);
    owner.tell(&Event::Phase(received));

    let engine = match config.engine {
        EngineConfig::Emu => engines::emulation_as(config.emu)?,
        EngineConfig::Kvm { device } => engines::kvm(fds.take(device)?)?,
    };
    let name = engine.name().to_owned();
    owner.tell(&Event::Engine { name: name.clone(), reason: config.fallback.clone() });
    let listener = match config.control {
        Some(index) => Some(UnixListener::from(fds.take(index)?)),
        None => None,
    };
    let server = Server::new(listener)
        .map_err(|source| Error::Descriptor { what: "the control socket".into(), source })?;
    let outcome_file = config.outcome.map(|index| fds.take(index)).transpose()?.map(File::from);
    let parts = wiring::parts(&config, &mut fds)?;
    // What the config does not name is not kept.
    drop(fds);
    let (machine, events) = Machine::new(&*engine, parts)?;
    owner.tell(&Event::Boot { protocol: machine.boot_protocol() });
    machine.start();
    Ok(Monitor {
        config,
        machine,
        events,
        server,
        outcome_file,
        engine: name,
        phases: vec![received],
        usage,
    })
}

impl Monitor {
    /// Serves the machine until it has ended.
    fn run(mut self, owner: &mut Owner) -> Outcome {
        let reason = loop {
            if let Some(reason) = self.take_events(owner) {
                break reason;
            }
            let (server, view) = (
                &mut self.server,
                View {
                    config: &self.config,
                    machine: &self.machine,
                    engine: &self.engine,
                    phases: &self.phases,
                    usage: &self.usage,
                },
            );
            if let Err(error) = wait(&self.events, server, owner) {
                let fault = format!("the monitor cannot wait for events: {error}");
                self.machine.end(EndReason::EngineFailed { fault });
                continue;
            }
            server.serve(&view);
            if owner_is_gone(owner) && self.config.owner_gone == OwnerGone::End {
                self.machine.end(EndReason::OwnerGone);
            }
        };
        self.end(reason, owner)
    }

    /// Passes on what the machine tells; its end if it has ended.
    fn take_events(&mut self, owner: &mut Owner) -> Option<EndReason> {
        while let Some(event) = self.events.try_next() {
            match event {
                MachineEvent::Phase(mark) => {
                    self.phases.push(mark);
                    owner.tell(&Event::Phase(mark));
                }
                MachineEvent::Ended(reason) => return Some(reason),
            }
        }
        None
    }

    fn end(self, reason: EndReason, owner: &mut Owner) -> Outcome {
        owner.tell(&Event::Phase(PhaseMark::now(Phase::Ended)));
        let tail = self.machine.console_tail();
        let outcome = self.machine.finish(reason).unwrap_or_else(|error| {
            let reason = EndReason::EngineFailed { fault: error.to_string() };
            Outcome { reason, console_tail: tail }
        });
        tracing::info!("{}", outcome.reason);
        if let Some(mut file) = self.outcome_file {
            let written = serde_json::to_vec(&outcome).map_err(io::Error::from);
            if let Err(error) = written.and_then(|json| file.write_all(&json)) {
                tracing::error!("cannot write the outcome file: {error}");
            }
        }
        outcome
    }
}

/// Sleeps until the machine, a client or the owner has something to say.
fn wait(events: &Events, server: &mut Server, owner: &Owner) -> nix::Result<()> {
    let mut waits = vec![PollFd::new(events.as_fd(), PollFlags::POLLIN)];
    if let Some(channel) = &owner.channel {
        waits.push(PollFd::new(channel.as_fd(), PollFlags::POLLIN));
    }
    server.waits(&mut waits);
    let timeout = server.next_deadline().map_or(PollTimeout::NONE, |left| {
        PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
    });
    match poll(&mut waits, timeout) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether the owner has closed its end. It has nothing to say after the config: if it speaks all
/// the same, it is not one of ours, and is not listened to any more.
fn owner_is_gone(owner: &mut Owner) -> bool {
    let Some(channel) = &owner.channel else { return true };
    let mut byte = [0];
    let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
    match nix::sys::socket::recv(channel.as_raw_fd(), &mut byte, flags) {
        Err(nix::Error::EAGAIN | nix::Error::EINTR) => false,
        Ok(0) | Ok(_) | Err(_) => {
            owner.channel = None;
            true
        }
    }
}

/// What a request is answered from.
struct View<'a> {
    config: &'a MachineConfig,
    machine: &'a Machine,
    engine: &'a str,
    phases: &'a [PhaseMark],
    usage: &'a Usage,
}

impl View<'_> {
    fn status(&self) -> Status {
        let state = if self.machine.has_ended() {
            RunState::Ended
        } else if self.machine.is_running() {
            RunState::Running
        } else {
            RunState::Paused
        };
        Status {
            version: CONTROL_VERSION,
            id: self.config.id.clone(),
            pid: std::process::id(),
            state,
            engine: self.engine.to_owned(),
            engine_reason: self.config.fallback.clone(),
            boot: self.machine.boot_protocol(),
            vcpus: self.config.vcpus,
            memory: self.machine.memory(),
            phases: self.phases.to_vec(),
        }
    }

    fn stats(&self) -> io::Result<Stats> {
        let memory = self.usage.memory()?;
        let mut engine = self.machine.engine_metrics().0;
        engine.push(("fallback".into(), self.config.fallback.is_some().into()));
        Ok(Stats {
            engine,
            devices: self.machine.device_counters(),
            memory: self.machine.memory(),
            resident: memory.resident,
            guest_resident: self.machine.resident_ram(),
            overhead: memory.private + self.machine.code_memory(),
            cpu_time: self.usage.cpu_time(),
            vcpu_time: self.machine.vcpu_times(),
        })
    }
}

impl Answerer for View<'_> {
    fn answer(&self, request: Request, fd: Option<OwnedFd>) -> Response {
        let failed = |error: &dyn std::error::Error| Response::Error { message: error.to_string() };
        match request {
            Request::Status => Response::Status(self.status()),
            Request::Stats => match self.stats() {
                Ok(stats) => Response::Stats(stats),
                Err(error) => failed(&error),
            },
            Request::Pause => match self.machine.pause() {
                Ok(()) => Response::Ok,
                Err(error) => failed(&error),
            },
            Request::Resume => {
                self.machine.resume();
                Response::Ok
            }
            Request::ConsoleTail => Response::ConsoleTail { text: self.machine.console_tail() },
            Request::Plug { read_only } => {
                match fd.map(|fd| self.machine.plug(fd.into(), read_only)) {
                    Some(Ok(place)) => Response::Plugged { place },
                    Some(Err(error)) => failed(&error),
                    None => Response::Error { message: "no descriptor came with the disk".into() },
                }
            }
            Request::Unplug { place } => match self.machine.unplug(place) {
                Ok(()) => Response::Ok,
                Err(error) => failed(&error),
            },
            Request::Resize { memory } => match self.machine.resize(memory) {
                Ok(()) => Response::Ok,
                Err(error) => failed(&error),
            },
            Request::Stop => {
                self.machine.end(EndReason::Stopped);
                Response::Ok
            }
        }
    }
}
