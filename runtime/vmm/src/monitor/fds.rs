//! Messages with descriptors over the owner channel.
//!
//! A message is a four-byte little-endian length and that many bytes of JSON. Descriptors travel
//! with the first byte of the message that names them (`SCM_RIGHTS`, unix(7)).

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use mvm_devices::rights::{self, RecvFlags};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::FdIndex;

/// Longest message in bytes: a config or an outcome is a few kilobytes.
pub const MAX_MESSAGE: usize = 1 << 20;

/// Most descriptors that go with a message (the kernel's SCM_MAX_FD is 253).
pub const MAX_FDS: usize = 128;

/// Why a message was not sent or not understood.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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
    /// The message is longer than one can be.
    #[error("a message of {len} bytes; at most {MAX_MESSAGE} are taken")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// More descriptors than can go along.
    #[error("{count} descriptors with one message; at most {MAX_FDS} can go along")]
    TooManyFds {
        /// How many.
        count: usize,
    },
    /// The message is no JSON of the expected form.
    #[error("a message could not be understood: {0}")]
    Json(#[from] serde_json::Error),
    /// The config names a descriptor that did not come.
    #[error("descriptor {index} was not handed over ({count} were)")]
    NoSuchFd {
        /// Its place.
        index: u32,
        /// How many came.
        count: usize,
    },
    /// The config names a descriptor twice.
    #[error("descriptor {index} is named twice")]
    FdTakenTwice {
        /// Its place.
        index: u32,
    },
}

/// Descriptors on their way to the monitor, in the order in which the config names them.
#[derive(Debug, Default)]
pub struct FdTable(Vec<Option<OwnedFd>>);

impl FdTable {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a descriptor and says how a config names it.
    pub fn add(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(Some(fd.into()));
        FdIndex(u32::try_from(self.0.len() - 1).unwrap_or(u32::MAX))
    }

    /// Takes a descriptor out: each has one owner.
    ///
    /// # Errors
    /// There is none at this place, or it was taken before.
    pub fn take(&mut self, index: FdIndex) -> Result<OwnedFd, Error> {
        let count = self.0.len();
        let place = self.0.get_mut(index.0 as usize);
        let place = place.ok_or(Error::NoSuchFd { index: index.0, count })?;
        place.take().ok_or(Error::FdTakenTwice { index: index.0 })
    }

    fn raw(&self) -> Vec<RawFd> {
        self.0.iter().flatten().map(AsRawFd::as_raw_fd).collect()
    }
}

/// Sends `message` with the descriptors of `fds`.
///
/// # Errors
/// [`Error`]: too large, or the other side is gone.
pub fn send<T: Serialize>(socket: &UnixStream, message: &T, fds: &FdTable) -> Result<(), Error> {
    let json = serde_json::to_vec(message)?;
    if json.len() > MAX_MESSAGE {
        return Err(Error::TooLong { len: json.len() });
    }
    let raw = fds.raw();
    if raw.len() > MAX_FDS {
        return Err(Error::TooManyFds { count: raw.len() });
    }
    let mut bytes = (json.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&json);
    let mut sent = 0;
    if !raw.is_empty() {
        let rights = [ControlMessage::ScmRights(&raw)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sent = sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, flags, None)
            .map_err(|e| failed("cannot send to the channel", e.into()))?;
    }
    // std's write on a socket asks for no SIGPIPE only where the process ignores it; mvm does.
    let mut socket = socket;
    socket.write_all(&bytes[sent..]).map_err(|e| failed("cannot send to the channel", e))
}

/// Receives one message and the descriptors that came with it. The socket's read timeout is the
/// deadline of each part.
///
/// # Errors
/// [`Error`]: nothing came in time, it is malformed, or the other side is gone.
pub fn receive<T: DeserializeOwned>(socket: &UnixStream) -> Result<(T, FdTable), Error> {
    let mut fds = FdTable::new();
    let mut head = [0; 4];
    let got = receive_some(socket, &mut head, &mut fds)?;
    let mut rest = socket;
    rest.read_exact(&mut head[got..]).map_err(|e| failed("cannot read from the channel", e))?;
    let len = u32::from_le_bytes(head) as usize;
    if len > MAX_MESSAGE {
        return Err(Error::TooLong { len });
    }
    let mut json = vec![0; len];
    rest.read_exact(&mut json).map_err(|e| failed("cannot read from the channel", e))?;
    Ok((serde_json::from_slice(&json)?, fds))
}

/// Reads the first bytes of a message, with which the descriptors come.
fn receive_some(socket: &UnixStream, buf: &mut [u8], fds: &mut FdTable) -> Result<usize, Error> {
    let received = rights::receive(socket, buf, MAX_FDS, RecvFlags::empty());
    let received = received.map_err(|e| failed("cannot read from the channel", e))?;
    if received.truncated {
        return Err(Error::TooManyFds { count: MAX_FDS + 1 });
    }
    for fd in received.fds {
        fds.add(fd);
    }
    if received.bytes == 0 {
        return Err(Error::Closed);
    }
    Ok(received.bytes)
}

/// Sends what fits of `bytes`, which are some, with one descriptor. Returns how many bytes went.
pub(super) fn send_one(socket: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let raw = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&raw)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &rights, flags, None) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Reads what is there, and the descriptor that came with it. Further ones are closed.
pub(super) fn receive_one(
    socket: &UnixStream,
    buf: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    let received = rights::receive(socket, buf, 1, RecvFlags::empty())?;
    Ok((received.bytes, received.fds.into_iter().next()))
}

fn failed(what: &'static str, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset => Error::Closed,
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Timeout,
        _ => Error::Io { what, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::time::Duration;

    #[test]
    fn descriptors_arrive_in_their_places() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut fds = FdTable::new();
        let null = fds.add(File::open("/dev/null").unwrap());
        let zero = fds.add(File::open("/dev/zero").unwrap());
        send(&a, &vec![null, zero], &fds).unwrap();
        let (names, mut fds): (Vec<FdIndex>, _) = receive(&b).unwrap();
        assert_eq!(names, [null, zero]);
        let mut byte = [1];
        assert_eq!(File::from(fds.take(names[1]).unwrap()).read(&mut byte).unwrap(), 1);
        assert_eq!(byte, [0]);
        assert!(matches!(fds.take(names[1]), Err(Error::FdTakenTwice { index: 1 })));
        assert!(matches!(fds.take(FdIndex(2)), Err(Error::NoSuchFd { index: 2, count: 2 })));
    }

    #[test]
    fn hostile_messages_are_refused() {
        let (a, b) = UnixStream::pair().unwrap();
        (&a).write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(receive::<u8>(&b), Err(Error::TooLong { .. })));
        (&a).write_all(&[2, 0, 0, 0, b'{', b'{']).unwrap();
        assert!(matches!(receive::<u8>(&b), Err(Error::Json(_))));
        b.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        (&a).write_all(&[9]).unwrap();
        assert!(matches!(receive::<u8>(&b), Err(Error::Timeout)));
        drop(a);
        assert!(matches!(receive::<u8>(&b), Err(Error::Closed)));
    }

    #[test]
    fn a_long_message_comes_whole() {
        let (a, b) = UnixStream::pair().unwrap();
        let text = "x".repeat(MAX_MESSAGE - 2);
        let sender = std::thread::spawn({
            let text = text.clone();
            move || send(&a, &text, &FdTable::new())
        });
        assert_eq!(receive::<String>(&b).unwrap().0, text);
        sender.join().unwrap().unwrap();
    }
}
