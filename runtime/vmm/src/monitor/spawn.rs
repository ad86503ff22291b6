//! The owner's side: starting a monitor process and hearing from it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::fds::{self, FdTable};
use super::protocol::Event;
use super::sys;
use crate::config::{self, MachineConfig};
use crate::outcome::{EndReason, Outcome};

/// The hidden subcommand under which the program runs as a monitor.
pub const SUBCOMMAND: &str = "monitor";

/// The monitor's name in the process list, before the machine's.
pub const PROCESS_NAME: &str = "mvm-monitor";

/// Why there is no monitor, or no word from it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The config is impossible.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The process could not be started.
    #[error("cannot start the monitor process: {what}: {source}")]
    Start {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The channel failed.
    #[error("lost touch with the monitor process: {0}")]
    Channel(#[from] fds::Error),
}

/// What a monitor is started with.
#[derive(Debug)]
pub struct Launch {
    /// The machine.
    pub config: MachineConfig,
    /// The descriptors that the config names.
    pub fds: FdTable,
    /// Where the monitor's own log lines go; nowhere if absent.
    pub log: Option<File>,
    /// The program to run as `PROGRAM monitor`: usually this one, `/proc/self/exe`.
    pub program: PathBuf,
}

impl Launch {
    /// A machine run by this very program.
    pub fn new(config: MachineConfig, fds: FdTable) -> Self {
        Self { config, fds, log: None, program: "/proc/self/exe".into() }
    }
}

/// A monitor process that this process has started.
///
/// Dropping it does not end the machine (see [`OwnerGone`](crate::config::OwnerGone)); the event
/// channel closes.
#[derive(Debug)]
pub struct Monitor {
    child: Child,
    pidfd: OwnedFd,
    channel: UnixStream,
}

/// Starts a monitor and hands it its machine.
///
/// # Errors
/// The config is impossible or the host refuses a process. Errors of the machine itself come as
/// [`Event::Failed`].
pub fn spawn(launch: Launch) -> Result<Monitor, Error> {
    launch.config.validate()?;
    let failed = |what| move |source| Error::Start { what, source };
    let (channel, theirs) = UnixStream::pair().map_err(failed("socketpair"))?;
    let log = launch.log.map_or_else(Stdio::null, Stdio::from);
    let mut command = Command::new(&launch.program);
    command
        .arg0(format!("{PROCESS_NAME}: {}", launch.config.id))
        .arg(SUBCOMMAND)
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(log);
    sys::own_session(&mut command);
    let child = command.spawn().map_err(failed("exec"))?;
    let pidfd = sys::pidfd_open(child.id()).map_err(failed("pidfd_open"))?;
    let monitor = Monitor { child, pidfd, channel };
    fds::send(&monitor.channel, &launch.config, &launch.fds)?;
    Ok(monitor)
}

impl Monitor {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Becomes readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Becomes readable when there is an event.
    pub fn channel(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Waits for the next event, at most until `deadline`; `None` if nothing came until then.
    ///
    /// The end of the process without [`Event::Ended`] or [`Event::Failed`] is told as an
    /// [`Event::Ended`] with [`EndReason::MonitorDied`].
    ///
    /// # Errors
    /// The channel is broken or carries nonsense.
    pub fn next_event(&mut self, deadline: Option<Instant>) -> Result<Option<Event>, Error> {
        // A zero timeout would mean for ever.
        let left = |d: Instant| d.saturating_duration_since(Instant::now());
        let timeout = deadline.map(|d| left(d).max(Duration::from_millis(1)));
        let failed = |source| fds::Error::Io { what: "cannot set the channel's deadline", source };
        self.channel.set_read_timeout(timeout).map_err(failed)?;
        match fds::receive::<Event>(&self.channel) {
            Ok((event, _)) => Ok(Some(event)),
            Err(fds::Error::Timeout) => Ok(None),
            Err(fds::Error::Closed) => {
                let status = self.wait().map_or_else(|e| e.to_string(), |s| describe(&s));
                let reason = EndReason::MonitorDied { status };
                Ok(Some(Event::Ended(Outcome { reason, console_tail: String::new() })))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Ends the monitor and with it the machine, at once.
    ///
    /// # Errors
    /// The host refuses (a process that has ended already is no error).
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()
    }

    /// Waits for the process to end and collects it.
    ///
    /// # Errors
    /// The host refuses.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

/// An exit status for people.
fn describe(status: &ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("it exited with code {code}"),
        (None, Some(signal)) => match nix::sys::signal::Signal::try_from(signal) {
            Ok(name) => format!("it was ended by {name}"),
            Err(_) => format!("it was ended by signal {signal}"),
        },
        (None, None) => "for an unknown reason".into(),
    }
}
