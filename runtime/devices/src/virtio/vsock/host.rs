//! The host's side: who may be connected to the guest, and how they ask.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::sys::socket::{MsgFlags, recv};

use super::VsockError;

/// Takes connections that the guest makes to one port; gets the host's end. Called on the devices'
/// thread: it hands the stream on and returns.
pub type Acceptor = Arc<dyn Fn(UnixStream) + Send + Sync>;

/// Told that the guest has made a connection. Called on the devices' thread.
pub type Joined = Arc<dyn Fn() + Send + Sync>;

/// Connects to whoever is meant by a port of the host at which nobody waits. Called on the devices' thread,
/// with any port that the guest likes: it does not block.
pub type Dialer = Arc<dyn Fn(u32) -> io::Result<UnixStream> + Send + Sync>;

/// Who waits at a port of the host.
enum Listener {
    /// Takes any number of connections.
    Acceptor(Acceptor),
    /// A stream that the first connection goes on in; nobody waits after that.
    Stream(UnixStream, Joined),
}

/// A connection of the guest that was accepted.
pub enum Accepted {
    /// It goes to the acceptor of this port.
    Handed(u32, UnixStream),
    /// It goes on in a stream that was there before.
    Joined(Joined),
    /// It goes to somebody outside this process, who knows already.
    Dialled,
}

/// Ports of the host that the guest may connect to.
#[derive(Default)]
pub struct Listeners {
    ports: Mutex<HashMap<u32, Listener>>,
    /// For all other ports.
    dialer: OnceLock<Dialer>,
}

impl Listeners {
    /// False if somebody listens there already.
    pub fn add(&self, port: u32, acceptor: Acceptor) -> bool {
        self.insert(port, Listener::Acceptor(acceptor))
    }

    /// As [`Listeners::add`], for one connection that goes on in `stream`.
    pub fn add_stream(&self, port: u32, stream: UnixStream, joined: Joined) -> bool {
        self.insert(port, Listener::Stream(stream, joined))
    }

    /// Has `dialer` asked for the ports at which nobody waits. The first one counts.
    pub fn dial_by(&self, dialer: Dialer) {
        self.dialer.get_or_init(|| dialer);
    }

    fn insert(&self, port: u32, listener: Listener) -> bool {
        let mut all = self.lock();
        if all.contains_key(&port) {
            return false;
        }
        all.insert(port, listener);
        true
    }

    /// The device's end of a new connection to `port` and what becomes of it; `None` if nobody
    /// listens there.
    pub fn open(&self, port: u32) -> Option<io::Result<(UnixStream, Accepted)>> {
        let mut all = self.lock();
        match all.get(&port) {
            Some(Listener::Acceptor(_)) => {
                let pair = UnixStream::pair();
                return Some(pair.map(|(ours, theirs)| (ours, Accepted::Handed(port, theirs))));
            }
            Some(Listener::Stream(..)) => {}
            None => {
                let dialled = self.dialer.get()?(port);
                return Some(dialled.map(|stream| (stream, Accepted::Dialled)));
            }
        }
        match all.remove(&port)? {
            Listener::Stream(stream, joined) => Some(Ok((stream, Accepted::Joined(joined)))),
            Listener::Acceptor(_) => None,
        }
    }

    pub fn remove(&self, port: u32) -> bool {
        self.lock().remove(&port).is_some()
    }

    /// Passes an accepted connection on.
    pub fn deliver(&self, accepted: Accepted) {
        match accepted {
            Accepted::Joined(joined) => joined(),
            Accepted::Dialled => {}
            Accepted::Handed(port, stream) => {
                let acceptor = match self.lock().get(&port) {
                    Some(Listener::Acceptor(acceptor)) => acceptor.clone(),
                    // A listener that has gone meanwhile drops the stream: the guest sees an end.
                    Some(Listener::Stream(..)) | None => return,
                };
                acceptor(stream);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Listener>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Listeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.lock().keys()).finish()
    }
}

/// A wish of this process.
#[derive(Debug)]
pub struct ConnectRequest {
    pub guest_port: u32,
    pub stream: UnixStream,
    pub reply: SyncSender<Result<(), VsockError>>,
}

/// Most host processes that have connected and not yet said to which port.
const MAX_HANDSHAKES: usize = 64;
/// Longest first line: `CONNECT 4294967295\n`.
const MAX_LINE: usize = 32;

/// A host process that has connected to the listening socket and not finished its first line.
#[derive(Debug)]
struct Handshake {
    token: u64,
    stream: UnixStream,
    line: Vec<u8>,
}

/// What a first line came to.
#[derive(Debug)]
pub enum Hello {
    /// Not there yet.
    Incomplete,
    /// Here is the port.
    Connect(UnixStream, u32),
    /// It made no sense, or the process has gone.
    Dropped,
}

/// The listening socket and those who have just come in by it.
#[derive(Debug, Default)]
pub struct Door {
    listener: Option<UnixListener>,
    handshakes: VecDeque<Handshake>,
}

impl Door {
    pub fn new(listener: Option<UnixListener>) -> Self {
        Self { listener, handshakes: VecDeque::new() }
    }

    /// Where host processes knock.
    pub fn listener(&self) -> Option<&UnixListener> {
        self.listener.as_ref()
    }

    /// The next process that wants in.
    pub fn accept(&self) -> Option<io::Result<UnixStream>> {
        let accepted = self.listener.as_ref()?.accept();
        match accepted {
            Ok((stream, _)) => Some(stream.set_nonblocking(true).map(|()| stream)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => None,
            Err(e) => Some(Err(e)),
        }
    }

    /// Waits for the first line of `stream`. The one that has dawdled longest makes room.
    pub fn admit(&mut self, token: u64, stream: UnixStream) {
        if self.handshakes.len() >= MAX_HANDSHAKES {
            self.handshakes.pop_front();
        }
        self.handshakes.push_back(Handshake { token, stream, line: Vec::new() });
    }

    /// `token` has something to read. `None` if it is none of ours.
    pub fn ready(&mut self, token: u64) -> Option<Hello> {
        let at = self.handshakes.iter().position(|h| h.token == token)?;
        let port = match read_line(&mut self.handshakes[at]) {
            Ok(None) => return Some(Hello::Incomplete),
            Ok(Some(port)) => Some(port),
            Err(_) => None,
        };
        let handshake = self.handshakes.remove(at)?;
        Some(port.map_or(Hello::Dropped, |port| Hello::Connect(handshake.stream, port)))
    }
}

/// Reads on to the end of the line, and not a byte further: what follows belongs to the guest.
fn read_line(handshake: &mut Handshake) -> io::Result<Option<u32>> {
    let Handshake { stream, line, .. } = handshake;
    while line.last() != Some(&b'\n') {
        if line.len() >= MAX_LINE {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut byte = [0];
        match recv(stream.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) => line.push(byte[0]),
            Err(nix::errno::Errno::EAGAIN) => return Ok(None),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let text = std::str::from_utf8(line).map_err(|_| ErrorKind::InvalidData)?;
    let port = text.trim_end().strip_prefix("CONNECT ").and_then(|p| p.trim().parse().ok());
    port.map(Some).ok_or_else(|| ErrorKind::InvalidData.into())
}
