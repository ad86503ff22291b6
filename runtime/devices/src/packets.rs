//! Messages with descriptors between two processes of one sandbox: one packet of JSON each, over a
//! unix socket of type `SOCK_SEQPACKET` (unix(7)), descriptors beside it.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::rights::{self, Received, RecvFlags};

/// Longest message in bytes.
pub const MAX_PACKET: usize = 64 << 10;

/// Most descriptors that go with a message.
pub const MAX_FDS: usize = 200;

/// Why a message was not sent or not understood.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The socket failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The other side is gone.
    #[error("the other side closed the channel")]
    Closed,
    /// Nothing came in time.
    #[error("the other side said nothing in time")]
    Timeout,
    /// The message is longer, or has more descriptors, than one can have.
    #[error(
        "a message of {bytes} bytes with {fds} descriptors; at most {MAX_PACKET} and {MAX_FDS} are taken"
    )]
    TooLong {
        /// Bytes.
        bytes: usize,
        /// Descriptors.
        fds: usize,
    },
    /// The message is no JSON of the expected form.
    #[error("a message could not be understood: {0}")]
    Json(#[from] serde_json::Error),
}

/// One end of a channel.
#[derive(Debug)]
pub struct Packets(OwnedFd);

impl Packets {
    /// Both ends of a new channel.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self(a), Self(b)))
    }

    /// Sends `message` with `fds`. Waits while the other side is behind, at most `limit`.
    ///
    /// # Errors
    /// [`PacketError`].
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<(), PacketError> {
        let json = serde_json::to_vec(message)?;
        if json.len() > MAX_PACKET || fds.len() > MAX_FDS {
            return Err(PacketError::TooLong { bytes: json.len(), fds: fds.len() });
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &[][..] } else { &rights[..] };
        let deadline = Instant::now() + limit;
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        loop {
            let parts = [IoSlice::new(&json)];
            match sendmsg::<()>(self.0.as_raw_fd(), &parts, rights, flags, None) {
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => self.wait(PollFlags::POLLOUT, Some(deadline))?,
                Err(e) => return Err(failed("cannot send", e)),
            }
        }
    }

    /// The next message and its descriptors; waits until `deadline`, for ever if there is none.
    ///
    /// # Errors
    /// [`PacketError`].
    pub fn receive<T: DeserializeOwned>(
        &self,
        deadline: Option<Instant>,
    ) -> Result<(T, Vec<OwnedFd>), PacketError> {
        loop {
            match self.try_receive()? {
                Some(message) => return Ok(message),
                None => self.wait(PollFlags::POLLIN, deadline)?,
            }
        }
    }

    /// The next message if there is one.
    ///
    /// # Errors
    /// [`PacketError`], never `Timeout`.
    pub fn try_receive<T: DeserializeOwned>(
        &self,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, PacketError> {
        let mut buf = vec![0; MAX_PACKET];
        let received = match rights::receive(&self.0, &mut buf, MAX_FDS, RecvFlags::DONTWAIT) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            received => received.map_err(|e| failed("cannot receive", e))?,
        };
        let Received { bytes, fds, truncated } = received;
        if truncated {
            return Err(PacketError::TooLong { bytes, fds: fds.len() });
        }
        if bytes == 0 {
            return Err(PacketError::Closed);
        }
        Ok(Some((serde_json::from_slice(&buf[..bytes])?, fds)))
    }

    fn wait(&self, flags: PollFlags, deadline: Option<Instant>) -> Result<(), PacketError> {
        let timeout = match deadline.map(|d| d.checked_duration_since(Instant::now())) {
            None => PollTimeout::NONE,
            Some(None) => return Err(PacketError::Timeout),
            Some(Some(left)) => {
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut [PollFd::new(self.0.as_fd(), flags)], timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(e) => Err(failed("cannot wait", e)),
        }
    }
}

impl From<OwnedFd> for Packets {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Packets> for OwnedFd {
    fn from(packets: Packets) -> Self {
        packets.0
    }
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Packets {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn failed(what: &'static str, source: impl Into<io::Error>) -> PacketError {
    let source = source.into();
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => PacketError::Closed,
        _ => PacketError::Io { what, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn messages_come_whole_and_with_their_descriptors() {
        let (a, b) = Packets::pair().unwrap();
        let zero = File::open("/dev/zero").unwrap();
        a.send(&("first", 1), &[zero.as_fd()], LIMIT).unwrap();
        a.send(&("second", 2), &[], LIMIT).unwrap();
        let ((text, number), mut fds): ((String, u32), _) = b.receive(None).unwrap();
        assert_eq!((text.as_str(), number, fds.len()), ("first", 1, 1));
        let mut byte = [1];
        File::from(fds.remove(0)).read_exact(&mut byte).unwrap();
        assert_eq!(byte, [0]);
        let ((text, _), fds): ((String, u32), _) = b.receive(None).unwrap();
        assert_eq!((text.as_str(), fds.len()), ("second", 0));
        assert!(b.try_receive::<u32>().unwrap().is_none());
    }

    #[test]
    fn silence_nonsense_and_the_end_are_told_apart() {
        let (a, b) = Packets::pair().unwrap();
        assert!(matches!(b.receive::<u32>(Some(Instant::now())), Err(PacketError::Timeout)));
        a.send(&"text", &[], LIMIT).unwrap();
        assert!(matches!(b.receive::<u32>(None), Err(PacketError::Json(_))));
        let long = "x".repeat(MAX_PACKET);
        assert!(matches!(a.send(&long, &[], LIMIT), Err(PacketError::TooLong { .. })));
        drop(a);
        assert!(matches!(b.receive::<u32>(None), Err(PacketError::Closed)));
        assert!(matches!(b.send(&1, &[], LIMIT), Err(PacketError::Closed)));
    }
}
