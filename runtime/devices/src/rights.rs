//! Descriptors that come with what is read from a unix socket (`SCM_RIGHTS`, unix(7)).

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
pub use rustix::net::RecvFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, ReturnFlags, recvmsg};

/// What was read.
#[derive(Debug)]
pub struct Received {
    /// Bytes of it; 0 at the end of a stream.
    pub bytes: usize,
    /// The descriptors that came with them.
    pub fds: Vec<OwnedFd>,
    /// Something did not fit, bytes of a packet or descriptors, and is gone.
    pub truncated: bool,
}

/// Reads once from `socket`, and takes at most `most` descriptors. Those that are too many are closed, whatever the
/// other side has sent: what the kernel has put into this process for them must not stay.
///
/// # Errors
/// What the kernel says, but for interruptions.
pub fn receive(
    socket: impl AsFd,
    buf: &mut [u8],
    most: usize,
    flags: RecvFlags,
) -> io::Result<Received> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(most))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match recvmsg(socket.as_fd(), &mut [IoSliceMut::new(buf)], &mut control, flags) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    // Space is a little larger than asked for.
    let cut = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
    let truncated = received.flags.intersects(cut) || fds.len() > most;
    fds.truncate(most);
    Ok(Received { bytes: received.bytes, fds, truncated })
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read, pipe};
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn descriptors_that_are_too_many_are_closed() {
        for (most, sent) in [(0, 1), (1, 1), (1, 2), (1, 3), (2, 5), (5, 5)] {
            let (a, b) = UnixStream::pair().unwrap();
            let (mut ends, begins): (Vec<_>, Vec<_>) = (0..sent).map(|_| pipe().unwrap()).unzip();
            let raw: Vec<_> = begins.iter().map(AsRawFd::as_raw_fd).collect();
            let (text, rights) = ([IoSlice::new(b"x")], [ControlMessage::ScmRights(&raw)]);
            sendmsg::<()>(a.as_raw_fd(), &text, &rights, MsgFlags::empty(), None).unwrap();
            drop(begins);
            let received = receive(&b, &mut [0; 8], most, RecvFlags::DONTWAIT).unwrap();
            let taken = received.fds.len();
            assert_eq!((received.bytes, taken), (1, most.min(sent)));
            assert_eq!(received.truncated, sent > most, "{sent} of which {most} are taken");
            // A pipe ends when nobody has its other end any more.
            for end in &mut ends[taken..] {
                rustix::io::ioctl_fionbio(&*end, true).unwrap();
                assert_eq!(end.read(&mut [0]).unwrap(), 0);
            }
        }
    }
}
