//! The server between its sockets: the device, and those who add and remove shares.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mvm_devices::packets::{PacketError, Packets};
use mvm_devices::virtio::fs::wire::{FromServer, ToServer};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockFlag, accept4};

use crate::protocol::{Answer, Ask};
use crate::queue::{self, Queues};
use crate::shares::Shares;
use crate::tree::Tree;

/// Most clients of the share socket at a time; a further one takes the place of the oldest.
const MAX_CLIENTS: usize = 16;

/// How long an answer may stay unread.
const SEND: Duration = Duration::from_secs(5);

/// A file server at work.
pub(crate) struct FileService {
    shares: Arc<Shares>,
    device: Arc<Packets>,
    queues: Arc<Queues>,
    listener: Option<OwnedFd>,
    clients: Vec<Packets>,
}

impl FileService {
    /// Serves `shares` to the device behind `device`.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn new(
        shares: Arc<Shares>,
        device: Packets,
        listener: Option<OwnedFd>,
    ) -> io::Result<Self> {
        let device = Arc::new(device);
        let queues = Queues::new(shares.clone(), device.clone())?;
        Ok(Self { shares, device, queues, listener, clients: Vec::new() })
    }

    /// Serves until the device is gone, and the machine with it.
    pub fn run(mut self) -> io::Result<()> {
        let ended = self.serve();
        self.queues.close();
        ended
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            let mut waits = vec![PollFd::new(self.device.as_fd(), PollFlags::POLLIN)];
            waits.extend(self.listener.iter().map(|l| PollFd::new(l.as_fd(), PollFlags::POLLIN)));
            waits.extend(self.clients.iter().map(|c| PollFd::new(c.as_fd(), PollFlags::POLLIN)));
            match poll(&mut waits, PollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            match self.device.try_receive::<ToServer>() {
                Ok(Some((ask, fds))) => self.answer_device(ask, fds),
                Ok(None) => {}
                Err(PacketError::Closed) => return Ok(()),
                Err(error) => return Err(io::Error::other(error)),
            }
            self.accept();
            let shares = &self.shares;
            self.clients.retain(|client| serve_client(client, shares));
        }
    }

    fn answer_device(&self, ask: ToServer, fds: Vec<OwnedFd>) {
        let mut at = Vec::new();
        let done: Result<(), queue::Error> = match ask {
            ToServer::Attach { regions, queues } => self.queues.attach(&regions, queues, fds),
            ToServer::Activate { queues, features } => self.queues.activate(&queues, features),
            ToServer::Pause => {
                at = self.queues.pause();
                Ok(())
            }
            ToServer::Resume => {
                self.queues.resume();
                Ok(())
            }
            ToServer::Stop => {
                self.queues.stop();
                Ok(())
            }
        };
        let answer = match done {
            Ok(()) => FromServer::Done { queues: at },
            Err(error) => FromServer::Refused { message: error.to_string() },
        };
        if let Err(error) = self.device.send(&answer, &[], SEND) {
            tracing::warn!("the device does not listen: {error}");
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        while let Ok(fd) = accept4(listener.as_raw_fd(), flags) {
            // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
            let client = Packets::from(unsafe { OwnedFd::from_raw_fd(fd) });
            if self.clients.len() >= MAX_CLIENTS {
                self.clients.remove(0);
            }
            self.clients.push(client);
        }
    }
}

/// Answers a client if it has asked. Returns false if it is gone.
fn serve_client(client: &Packets, shares: &Shares) -> bool {
    let (ask, fds) = match client.try_receive::<Ask>() {
        Ok(Some(message)) => message,
        Ok(None) => return true,
        Err(PacketError::Json(error)) => {
            let message = format!("not understood: {error}");
            return client.send(&Answer::Error { message }, &[], SEND).is_ok();
        }
        Err(_) => return false,
    };
    let failed = |message: String| Answer::Error { message };
    let answer = match ask {
        Ask::Add { name, options } => {
            let mut fds = fds.into_iter();
            match fds.next() {
                Some(root) => match shares.add(&name, Tree::kept(root, fds.collect()), options) {
                    Ok(()) => Answer::Done,
                    Err(error) => failed(error.to_string()),
                },
                None => failed(format!("no descriptor came with the share {name:?}")),
            }
        }
        Ask::Remove { name } => match shares.remove(&name) {
            Ok(()) => Answer::Done,
            Err(error) => failed(error.to_string()),
        },
        Ask::List => Answer::Names { names: shares.names() },
    };
    client.send(&answer, &[], SEND).is_ok()
}
