//! The socket, and what the kernel answers.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::message::{HEADER, Message, attribute, messages, text, u32_at};

pub(crate) const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLM_F_ACK: u16 = 4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// The kernel answers at once; this is for one that does not at all.
const PATIENCE: i64 = 10;
/// Lists change while they are read; so often they are read again.
const ATTEMPTS: u32 = 20;
/// The kernel sends no longer datagrams.
const BUFFER: usize = 64 << 10;

/// Why the kernel did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("the routing socket: {0}")]
    Socket(#[source] io::Error),
    /// The kernel refused.
    #[error("{what}: {}{}", Errno::from_raw(*errno).desc(), detail(hint))]
    Refused {
        /// What was asked for.
        what: String,
        /// The kernel's error number.
        errno: i32,
        /// The kernel's own words.
        hint: Option<String>,
    },
    /// A list that changes faster than it can be read.
    #[error("{0}: it changes all the time")]
    Unsteady(String),
}

fn detail(hint: &Option<String>) -> String {
    hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default()
}

impl Error {
    /// The kernel's error number.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            Self::Socket(e) => e.raw_os_error(),
            Self::Unsteady(_) => None,
        }
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Socket(errno.into())
    }
}

/// A routing socket of one network namespace.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens one in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn open() -> Result<Self, Error> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(PATIENCE, 0))?;
        // For the words that go with an error; older kernels have none.
        let _ = sys::extended_errors(&fd);
        Ok(Self { fd, sequence: 0 })
    }

    /// Asks for something to be done; `what` names it in an error.
    pub(crate) fn request(&mut self, what: &str, message: Message) -> Result<(), Error> {
        self.exchange(what, message, &mut |_, _| {}).map(drop)
    }

    /// Asks for a list: kind and body of each entry.
    pub(crate) fn dump(
        &mut self,
        what: &str,
        message: &Message,
    ) -> Result<Vec<(u16, Vec<u8>)>, Error> {
        for _ in 0..ATTEMPTS {
            let mut all = Vec::new();
            let mut keep = |kind, body: &[u8]| all.push((kind, body.to_vec()));
            if self.exchange(what, message.clone(), &mut keep)? {
                return Ok(all);
            }
        }
        Err(Error::Unsteady(what.into()))
    }

    /// One request and all that comes back. Returns false if a list has changed meanwhile.
    fn exchange(
        &mut self,
        what: &str,
        message: Message,
        entry: &mut dyn FnMut(u16, &[u8]),
    ) -> Result<bool, Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.finish(self.sequence);
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let mut buffer = vec![0; BUFFER];
        let mut steady = true;
        loop {
            let len = match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            for received in messages(&buffer[..len]) {
                // The rest of an exchange that was given up.
                if received.sequence != self.sequence {
                    continue;
                }
                steady &= received.flags & NLM_F_DUMP_INTR == 0;
                match received.kind {
                    NLMSG_DONE => return Ok(steady),
                    NLMSG_ERROR => {
                        let code = u32_at(received.body, 0).unwrap_or(0).cast_signed();
                        if code == 0 {
                            return Ok(steady);
                        }
                        let hint = hint(received.body, received.flags);
                        let errno = code.saturating_neg();
                        return Err(Error::Refused { what: what.into(), errno, hint });
                    }
                    kind => entry(kind, received.body),
                }
            }
        }
    }
}

/// The kernel's words, which follow what it sends back of the request.
fn hint(body: &[u8], flags: u16) -> Option<String> {
    let echoed = if flags & NLM_F_CAPPED != 0 { HEADER } else { u32_at(body, 4)? as usize };
    let attributes = body.get(4 + echoed.next_multiple_of(4)..)?;
    attribute(attributes, NLMSGERR_ATTR_MSG).map(text).filter(|t| !t.is_empty())
}

mod sys {
    use std::io;
    use std::os::fd::{AsRawFd, OwnedFd};

    /// `NETLINK_EXT_ACK`.
    pub fn extended_errors(fd: &OwnedFd) -> io::Result<()> {
        let on: libc::c_int = 1;
        let len = size_of_val(&on) as libc::socklen_t;
        // SAFETY: the kernel reads a number at the address.
        let done = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_NETLINK,
                libc::NETLINK_EXT_ACK,
                (&raw const on).cast(),
                len,
            )
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
