//! Where the agent's connections come from: vsock in a guest, unix sockets when it is tried out on
//! a host. Only the host (CID 2), or a process of the same user, gets through.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use mvm_agent_protocol::port;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, getpeername,
    getsockopt, listen, socket, sockopt,
};

use crate::log::warning;
use crate::sys;

/// The kind of transport.
#[derive(Debug, Clone)]
pub enum Transport {
    /// `AF_VSOCK`, as in a guest.
    Vsock,
    /// `NAME.sock` in a directory.
    Unix(PathBuf),
}

/// An accepting socket.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    vsock: bool,
}

const BACKLOG: i32 = 128;

fn vsock_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}

fn unix_name(port: u32) -> &'static str {
    match port {
        port::HELLO => "hello.sock",
        port::CONTROL => "control.sock",
        _ => "stream.sock",
    }
}

impl Transport {
    /// Listens on one of the agent's ports.
    pub fn listen(&self, port: u32) -> io::Result<Listener> {
        match self {
            Self::Vsock => {
                let socket = vsock_socket()?;
                bind(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
                listen(&socket, Backlog::new(BACKLOG)?)?;
                Ok(Listener { socket, vsock: true })
            }
            Self::Unix(dir) => {
                let listener = UnixListener::bind(dir.join(unix_name(port)))?;
                Ok(Listener { socket: listener.into(), vsock: false })
            }
        }
    }

    /// Dials the host's hello port. `None` if nobody listens there and nobody has to.
    pub fn dial_hello(&self) -> io::Result<Option<UnixStream>> {
        match self {
            Self::Vsock => {
                let socket = vsock_socket()?;
                let host = VsockAddr::new(libc::VMADDR_CID_HOST, port::HELLO);
                connect(socket.as_raw_fd(), &host)?;
                Ok(Some(socket.into()))
            }
            Self::Unix(dir) => Ok(UnixStream::connect(dir.join(unix_name(port::HELLO))).ok()),
        }
    }
}

impl Listener {
    /// The next connection from somebody who is allowed to connect.
    pub fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let fd = match accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Ok(fd) => sys::own(fd),
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(e) => return Err(e.into()),
            };
            match self.peer_refusal(&fd) {
                None => return Ok(fd.into()),
                Some(who) => warning!("refused a connection from {who}: only the host may connect"),
            }
        }
    }

    /// Who is at the other end if it is nobody to talk to.
    fn peer_refusal(&self, fd: &OwnedFd) -> Option<String> {
        if self.vsock {
            match getpeername::<VsockAddr>(fd.as_raw_fd()) {
                Ok(peer) if peer.cid() == libc::VMADDR_CID_HOST => None,
                Ok(peer) => Some(format!("vsock CID {}", peer.cid())),
                Err(e) => Some(format!("an unknown peer ({e})")),
            }
        } else {
            match getsockopt(&fd.as_fd(), sockopt::PeerCredentials) {
                Ok(peer) if peer.uid() == nix::unistd::geteuid().as_raw() => None,
                Ok(peer) => Some(format!("user {}", peer.uid())),
                Err(e) => Some(format!("an unknown peer ({e})")),
            }
        }
    }
}
