//! What is dialled on the loopback of a pod's network namespace reaches the pod's containers, which are
//! in the guest: `kubectl port-forward`, for which CRI dials there.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use mvm_agent_protocol::relay::relay;
use mvm_net::{Loopback, Namespace};
use mvm_sandbox::guest::Guest;
use mvm_sandbox::pump::Flag;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

/// The most connections at a time; further ones are reset. Each has two threads here and two in the
/// guest.
const MAX_CONNECTIONS: usize = 128;

/// How long nothing is accepted after that failed: the host is short of something.
const PAUSE: Duration = Duration::from_millis(100);

/// Forwards until it is dropped.
#[derive(Debug)]
pub struct Forward {
    stop: Flag,
    thread: Option<JoinHandle<()>>,
}

impl Forward {
    /// Forwards what is dialled in the network namespace of the process `pid` to the guest.
    ///
    /// # Errors
    /// The kernel does not do it ([`Loopback::take`]), or there is no thread for it.
    pub fn start(pid: u32, guest: &Guest) -> Result<Self, Error> {
        let namespace = Namespace::open(Path::new(&format!("/proc/{pid}/ns/net")))?;
        let loopback = Loopback::take(&namespace)?;
        let stop = Flag::new().map_err(Error::Host)?;
        let (guest, stopped) = (guest.clone(), stop.clone());
        let accept = move || accept(&loopback, &guest, &stopped);
        let thread = thread::Builder::new().name("forward".into()).spawn(accept);
        Ok(Self { stop, thread: Some(thread.map_err(Error::Host)?) })
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.stop.raise();
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

/// Why nothing is forwarded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The loopback cannot be had.
    #[error(transparent)]
    Net(#[from] mvm_net::Error),
    /// The host is short of something.
    #[error("cannot forward: {0}")]
    Host(io::Error),
}

fn accept(loopback: &Loopback, guest: &Guest, stop: &Flag) {
    // Each connection has a copy.
    let open = Arc::new(());
    loop {
        let mut fds = [
            PollFd::new(loopback.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            Err(e) => {
                tracing::error!("nothing is forwarded any more: {e}");
                return;
            }
            Ok(_) => {}
        }
        if fds[1].any().unwrap_or(true) {
            return;
        }
        let taken = loopback.accept().and_then(|(dialled, port)| {
            let dialled = UnixStream::from(OwnedFd::from(dialled));
            if Arc::strong_count(&open) > MAX_CONNECTIONS {
                tracing::warn!(port, "more than {MAX_CONNECTIONS} connections are not forwarded");
                return reset(&dialled);
            }
            let (guest, open) = (guest.clone(), Arc::clone(&open));
            let forward = move || {
                forward(&dialled, port, &guest);
                drop(open);
            };
            thread::Builder::new().name("forward".into()).spawn(forward).map(drop)
        });
        if let Err(e) = taken {
            tracing::warn!("cannot forward a connection: {e}");
            thread::sleep(PAUSE);
        }
    }
}

fn forward(dialled: &UnixStream, port: u16, guest: &Guest) {
    let forwarded = match guest.dial_loopback(port) {
        Ok(stream) => relay(dialled, &stream),
        Err(e) => {
            tracing::info!(port, "not forwarded: {e}");
            reset(dialled)
        }
    };
    if let Err(e) = forwarded {
        tracing::warn!(port, "cannot forward a connection: {e}");
    }
}

/// Makes the connection's end one that whoever dialled takes for a refusal, not for an empty answer.
fn reset(dialled: &UnixStream) -> io::Result<()> {
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    Ok(setsockopt(dialled, sockopt::Linger, &linger)?)
}
