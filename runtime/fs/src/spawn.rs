//! The owner's side: starting a file server.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mvm_devices::packets::{PacketError, Packets};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::confine::Layer;
use crate::protocol::{First, NewShare, Report, Setup, Source};
use crate::sys;

/// The hidden subcommand under which the program runs as a file server.
pub const SUBCOMMAND: &str = "file-server";

/// The server's name in the process list, before the sandbox's.
pub const PROCESS_NAME: &str = "mvm-files";

/// How long the server may take until it serves: clones of mounts are made, no data is read.
const READY: Duration = Duration::from_secs(30);

/// How long it may take to end when its machine has, in milliseconds.
const END: u16 = 5000;

/// Why there is no file server.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The process could not be started.
    #[error("cannot start the file server: {what}: {source}")]
    Start {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// It did not answer.
    #[error("the file server does not answer: {0}")]
    Channel(#[from] PacketError),
    /// It said why not.
    #[error("{0}")]
    Refused(String),
}

/// What a file server is started with.
#[derive(Debug)]
pub struct Launch {
    /// Name of the sandbox.
    pub id: String,
    /// The first shares.
    pub shares: Vec<NewShare>,
    /// Listening socket of type `SOCK_SEQPACKET` for [`ShareClient`](crate::ShareClient)s.
    pub listener: OwnedFd,
    /// Where its log lines go; nowhere if absent.
    pub log: Option<File>,
    /// The program to run as `PROGRAM file-server`: usually this one, `/proc/self/exe`.
    pub program: PathBuf,
}

/// A file server that this process has started. It ends with the channel to its device.
#[derive(Debug)]
pub struct FileServer {
    child: Child,
    layers: Vec<Layer>,
}

/// Starts a file server, and returns it with the device's end of the channel.
///
/// # Errors
/// [`SpawnError`]: also for a path that cannot be shared.
pub fn spawn(launch: Launch) -> Result<(FileServer, OwnedFd), SpawnError> {
    let failed = |what| move |source| SpawnError::Start { what, source };
    let (owner, theirs) = Packets::pair().map_err(failed("socketpair"))?;
    let (device, server_end) = Packets::pair().map_err(failed("socketpair"))?;
    let log = launch.log.map_or_else(Stdio::null, Stdio::from);
    let mut command = Command::new(&launch.program);
    command
        .arg0(format!("{PROCESS_NAME}: {}", launch.id))
        .arg(SUBCOMMAND)
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(log);
    sys::own_session(&mut command);
    let child = command.spawn().map_err(failed("exec"))?;
    // Keeps the other end open no longer than the child itself.
    drop(command);
    let mut server = FileServer { child, layers: Vec::new() };
    match hand_over(
        &owner,
        launch.id,
        &launch.shares,
        [server_end.as_fd(), launch.listener.as_fd()],
    ) {
        Ok(layers) => {
            server.layers = layers;
            Ok((server, device.into()))
        }
        Err(error) => {
            server.kill();
            Err(error)
        }
    }
}

fn hand_over(
    owner: &Packets,
    id: String,
    shares: &[NewShare],
    sockets: [BorrowedFd<'_>; 2],
) -> Result<Vec<Layer>, SpawnError> {
    let mut fds = sockets.to_vec();
    let mut first = Vec::new();
    for NewShare { name, source, options } in shares {
        let (path, keep) = match source {
            Source::Path(path) => (Some(path.as_os_str().as_bytes().to_vec()), 0),
            Source::Tree(tree) => {
                let descriptors = tree.descriptors();
                fds.extend(&descriptors);
                (None, descriptors.len() - 1)
            }
        };
        first.push(First { name: name.clone(), options: *options, path, keep });
    }
    owner.send(&Setup { id, shares: first }, &fds, READY)?;
    match owner.receive(Some(Instant::now() + READY))?.0 {
        Report::Ready { layers } => Ok(layers),
        Report::Failed { message } => Err(SpawnError::Refused(message)),
    }
}

impl FileServer {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What confines it.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Waits for it to end, after its machine has; makes it if it does not.
    pub fn finish(&mut self) {
        let ended = || -> io::Result<bool> {
            let process = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
            let mut wait = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
            Ok(poll(&mut wait, PollTimeout::from(END))? > 0)
        };
        if ended().unwrap_or(false) {
            let _ = self.child.wait();
        } else {
            self.kill();
        }
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
