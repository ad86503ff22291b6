//! Framed JSON messages with file descriptors over a unix socket pair: how the service talks to
//! the processes it sets up.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::sys;

/// A longer message is refused by the reader, bytes. Specifications are some ten kilobytes.
const MAX_LEN: usize = 16 << 20;

/// The most descriptors that go with one message.
const MAX_FDS: usize = 8;

/// One end.
#[derive(Debug)]
pub struct Channel(UnixStream);

impl Channel {
    /// Both ends, closed on exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = UnixStream::pair()?;
        Ok((Self(a), Self(b)))
    }

    /// Sends `message` with `fds`.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let body = serde_json::to_vec(message).map_err(io::Error::other)?;
        let len = u32::try_from(body.len()).map_err(io::Error::other)?.to_be_bytes();
        send_with_fds(&self.0, &len, fds)?;
        (&self.0).write_all(&body)
    }

    /// Receives the next message and its descriptors; `None` when the other end is closed.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut len = [0; 4];
        let (n, fds) = receive_with_fds(&self.0, &mut len)?;
        if n == 0 {
            return Ok(None);
        }
        (&self.0).read_exact(&mut len[n..])?;
        let body = self.read_body(len)?;
        Ok(Some((serde_json::from_slice(&body)?, fds)))
    }

    /// Sends `bytes` as they are, behind a message that announces them.
    pub fn send_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?.to_be_bytes();
        (&self.0).write_all(&len)?;
        (&self.0).write_all(bytes)
    }

    /// Receives what [`Channel::send_bytes`] has sent.
    pub fn receive_bytes(&self) -> io::Result<Vec<u8>> {
        let mut len = [0; 4];
        (&self.0).read_exact(&mut len)?;
        self.read_body(len)
    }

    fn read_body(&self, len: [u8; 4]) -> io::Result<Vec<u8>> {
        let len = usize::try_from(u32::from_be_bytes(len)).unwrap_or(usize::MAX);
        if len > MAX_LEN {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("message of {len} bytes"),
            ));
        }
        let mut body = vec![0; len];
        (&self.0).read_exact(&mut body)?;
        Ok(body)
    }

    /// Receiving fails after this time without a message.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.0.set_read_timeout(Some(timeout))
    }

    /// The socket as a descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Sends `bytes` (a few, in one piece) with `fds`.
pub fn send_with_fds(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let sent = loop {
        let iov = [IoSlice::new(bytes)];
        match sendmsg::<()>(socket.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    // The descriptors went with the first byte.
    let mut socket = socket;
    socket.write_all(&bytes[sent..])
}

/// Receives at most `buffer.len()` bytes and the descriptors that came with them.
pub fn receive_with_fds(
    socket: &UnixStream,
    buffer: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = cmsg_space!([RawFd; MAX_FDS]);
    loop {
        let mut iov = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let mut fds = Vec::new();
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = part {
                fds.extend(raw.into_iter().map(sys::own));
            }
        }
        return Ok((message.bytes, fds));
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn messages_and_descriptors_arrive() {
        let (a, b) = Channel::pair().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let big = "x".repeat(300_000);
        let sender = {
            let big = big.clone();
            std::thread::spawn(move || a.send(&big, &[writer.as_fd()]).unwrap())
        };
        let (received, fds): (String, _) = b.receive().unwrap().unwrap();
        sender.join().unwrap();
        assert_eq!((received == big, fds.len()), (true, 1));
        std::fs::File::from(fds.into_iter().next().unwrap()).write_all(b"hi").unwrap();
        let mut reader = reader;
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hi");
        assert!(b.receive::<String>().unwrap().is_none(), "closed");
    }

    #[test]
    fn bytes_follow_a_message() {
        let (a, b) = Channel::pair().unwrap();
        a.send(&1, &[]).unwrap();
        a.send_bytes(b"as they are").unwrap();
        assert_eq!(b.receive::<i32>().unwrap().unwrap().0, 1);
        assert_eq!(b.receive_bytes().unwrap(), b"as they are");
    }

    #[test]
    fn announced_giant_is_refused() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&[0xff; 4]).unwrap();
        assert!(Channel(b).receive::<String>().is_err());
    }
}
