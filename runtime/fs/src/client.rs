//! The asking side of the share socket.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use mvm_devices::packets::{PacketError, Packets};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use std::os::fd::AsRawFd;

use crate::protocol::{Answer, Ask, ShareOptions};
use crate::tree::Tree;

/// How long the server may take. Ending a share waits for what is under way in it.
const LIMIT: Duration = Duration::from_secs(60);

/// Why a share was not made or ended.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("cannot reach the file server: {0}")]
    Connect(io::Error),
    /// The connection failed.
    #[error("lost touch with the file server: {0}")]
    Channel(#[from] PacketError),
    /// The server refused.
    #[error("the file server refused: {0}")]
    Refused(String),
}

/// A connection to the file server of a running machine.
#[derive(Debug)]
pub struct ShareClient(Packets);

impl ShareClient {
    /// Connects to the socket at `path` (at most 107 bytes, unix(7)).
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let made = || -> nix::Result<OwnedFd> {
            let flags = SockFlag::SOCK_CLOEXEC;
            let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
            connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
            Ok(fd)
        };
        let fd = made().map_err(|e| ClientError::Connect(e.into()))?;
        Ok(Self(Packets::from(fd)))
    }

    /// Shares the directory `tree` under `name`: the guest finds it at once.
    ///
    /// The tree should be a detached one ([`tree::detach`](crate::tree::detach)): of a plain directory
    /// a server that has been taken over could see what is above it.
    ///
    /// # Errors
    /// The name is taken or no name, the table is full, it is no directory.
    pub fn add(
        &mut self,
        name: &str,
        tree: Tree,
        options: ShareOptions,
    ) -> Result<(), ClientError> {
        let ask = Ask::Add { name: name.into(), options };
        self.0.send(&ask, &tree.descriptors(), LIMIT)?;
        self.done()
    }

    /// Ends a share, once nothing is under way in it. All descriptors of its tree are closed then; for
    /// the guest its files are stale.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn remove(&mut self, name: &str) -> Result<(), ClientError> {
        self.0.send(&Ask::Remove { name: name.into() }, &[], LIMIT)?;
        self.done()
    }

    /// Names of all shares, sorted.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn list(&mut self) -> Result<Vec<String>, ClientError> {
        self.0.send(&Ask::List, &[], LIMIT)?;
        match self.answer()? {
            Answer::Names { names } => Ok(names),
            other => Err(ClientError::Refused(format!("{other:?} to a question for names"))),
        }
    }

    fn done(&mut self) -> Result<(), ClientError> {
        self.answer().map(drop)
    }

    fn answer(&mut self) -> Result<Answer, ClientError> {
        match self.0.receive(Some(Instant::now() + LIMIT))?.0 {
            Answer::Error { message } => Err(ClientError::Refused(message)),
            other => Ok(other),
        }
    }
}
