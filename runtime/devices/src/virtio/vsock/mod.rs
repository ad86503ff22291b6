//! Socket device (5.10), in this process: guest streams end in unix sockets of the host.
//!
//! * Host to guest: [`Vsock::connect`] from this process, or through the listening socket handed in at
//!   the start: connect to it, write `CONNECT <port>\n`, read `OK <host port>\n`, and the guest's
//!   bytes follow (the convention of other microVM monitors).
//! * Guest to host: ports registered with [`Vsock::listen`], whose acceptor gets the stream, or with
//!   [`Vsock::join`], for one connection through a stream that is there already; for all others whoever
//!   was registered with [`Vsock::dial_by`] is asked.
//!
//! Nothing is opened by path here. Waiting data is bounded on both ways: see `connection.rs`.

mod connection;
mod host;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    ActivateError, Activation, Chain, Core, DeviceState, DeviceType, QueueError, QueueState,
    VirtQueue, VirtioDevice, common_device_methods,
};
use crate::event_loop::{EventLoop, EventLoopError, Interest, Registrar, Source, Subscriber};
use connection::Opener;
use host::Listeners;
pub use host::{Acceptor, Dialer, Joined};
use host::{ConnectRequest, Door, Hello};
use muxer::Muxer;

/// The host's address (5.10.4).
pub const HOST_CID: u64 = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Stream sockets (5.10.3).
const FEATURE_STREAM: u64 = 1;

/// Tokens: the queues by index, then these, then connections and handshakes.
const TOKEN_REQUESTS: u64 = 3;
const TOKEN_LISTENER: u64 = 4;
const FIRST_CONNECTION: u64 = 16;

/// How the device is set up.
#[derive(Debug)]
pub struct VsockConfig {
    /// Name for logs.
    pub name: String,
    /// The guest's address, 3 or more.
    pub guest_cid: u64,
    /// Where host processes ask for connections to the guest, bound and listening.
    pub listener: Option<UnixListener>,
}

/// Why there is no device, or no connection.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The host has no more descriptors.
    #[error("cannot make the socket device: {0}")]
    Start(io::Error),
    /// The event loop refused a descriptor.
    #[error(transparent)]
    Watch(#[from] EventLoopError),
    /// Addresses below 3 are reserved.
    #[error("guest address {0} is reserved; it must be 3 or more and fit 32 bits")]
    GuestCid(u64),
    /// No socket for the connection.
    #[error("no socket for a connection with the guest: {0}")]
    Socket(io::Error),
    /// The guest has no driver at work.
    #[error("the guest's socket driver is not running")]
    NotReady,
    /// Nobody listens on that port of the guest, or it closed at once.
    #[error("the guest refused the connection to port {0}")]
    Refused(u32),
    /// No answer in time.
    #[error("the guest did not answer a connection to port {0} in time")]
    Timeout(u32),
    /// The table is full.
    #[error("there are {0} connections with the guest already")]
    Full(usize),
    /// Nobody listens on that port of the host.
    #[error("nobody listens on port {0} of the host")]
    NoListener(u32),
    /// Somebody does already.
    #[error("port {0} of the host has a listener already")]
    PortTaken(u32),
}

/// Counters of the device.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct VsockStats {
    /// Connections now.
    pub connections: u64,
    /// Packets taken from the guest.
    pub packets_from_guest: u64,
    /// Packets given to the guest.
    pub packets_to_guest: u64,
    /// Payload taken from the guest.
    pub bytes_from_guest: u64,
    /// Payload given to the guest.
    pub bytes_to_guest: u64,
    /// Packets with wrong addresses.
    pub dropped: u64,
}

#[derive(Debug, Default)]
struct Counters {
    packets_from_guest: AtomicU64,
    packets_to_guest: AtomicU64,
    bytes_from_guest: AtomicU64,
    bytes_to_guest: AtomicU64,
    dropped: AtomicU64,
}

fn bump(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

#[derive(Debug)]
struct Work {
    rx: VirtQueue,
    tx: VirtQueue,
    event: VirtQueue,
    chain: Chain,
    muxer: Muxer,
    /// The guest is still to be told that its connections are gone (5.10.6.7).
    announce_reset: bool,
}

/// The device.
#[derive(Debug)]
pub struct Vsock {
    core: Core<Work>,
    guest_cid: u64,
    registrar: Registrar,
    listeners: Listeners,
    door: Mutex<Door>,
    requests: Mutex<Vec<ConnectRequest>>,
    requests_event: EventFd,
    /// Names for sockets, never used again, across resets.
    tokens: Arc<AtomicU64>,
    /// Socket events were missed while paused.
    rescan: AtomicBool,
    restored: AtomicBool,
    counters: Counters,
}

impl Vsock {
    /// A device that works on `events`.
    ///
    /// # Errors
    /// [`VsockError`].
    pub fn new(config: VsockConfig, events: &EventLoop) -> Result<Arc<Self>, VsockError> {
        let cid = config.guest_cid;
        if cid <= HOST_CID || cid >= u64::from(u32::MAX) {
            return Err(VsockError::GuestCid(cid));
        }
        if let Some(listener) = &config.listener {
            listener.set_nonblocking(true).map_err(VsockError::Start)?;
        }
        let core = Core::new(&config.name, &QUEUE_SIZES).map_err(VsockError::Start)?;
        let requests_event = EventFd::new(EFD_NONBLOCK).map_err(VsockError::Start)?;
        let mut device = None;
        events.reserve(|registrar| {
            let new = Arc::new(Self {
                core,
                guest_cid: cid,
                registrar,
                listeners: Listeners::default(),
                door: Mutex::new(Door::new(config.listener)),
                requests: Mutex::default(),
                requests_event,
                tokens: Arc::new(AtomicU64::new(FIRST_CONNECTION)),
                rescan: AtomicBool::new(false),
                restored: AtomicBool::new(false),
                counters: Counters::default(),
            });
            device = Some(new.clone());
            new
        });
        let device = device.ok_or(VsockError::NotReady)?;
        for (token, slot) in device.core.slots().iter().enumerate() {
            device.registrar.add(&slot.doorbell, token as u64, Interest::READ)?;
        }
        device.registrar.add(&device.requests_event, TOKEN_REQUESTS, Interest::READ)?;
        if let Some(listener) = device.door().listener() {
            let interest = Interest { edge: true, ..Interest::READ };
            device.registrar.add(listener, TOKEN_LISTENER, interest)?;
        }
        Ok(device)
    }

    /// Connects to `port` of the guest.
    ///
    /// # Errors
    /// [`VsockError`]: refused, no answer within `patience`, no driver, too many.
    pub fn connect(&self, port: u32, patience: Duration) -> Result<UnixStream, VsockError> {
        let (ours, theirs) = UnixStream::pair().map_err(VsockError::Socket)?;
        let (reply, answer) = sync_channel(1);
        let request = ConnectRequest { guest_port: port, stream: ours, reply };
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).push(request);
        self.requests_event.write(1).map_err(VsockError::Socket)?;
        match answer.recv_timeout(patience) {
            Ok(answer) => answer.map(|()| theirs),
            // Dropping our end tells the device to give up.
            Err(RecvTimeoutError::Timeout) => Err(VsockError::Timeout(port)),
            Err(RecvTimeoutError::Disconnected) => Err(VsockError::Refused(port)),
        }
    }

    /// Lets the guest connect to `port` of the host, until [`Vsock::unlisten`].
    ///
    /// # Errors
    /// [`VsockError::PortTaken`].
    pub fn listen(&self, port: u32, acceptor: Acceptor) -> Result<(), VsockError> {
        if self.listeners.add(port, acceptor) { Ok(()) } else { Err(VsockError::PortTaken(port)) }
    }

    /// Lets the guest connect to `port` of the host once: what it sends and gets goes through
    /// `stream`, and `joined` is called. Further connections are refused.
    ///
    /// # Errors
    /// [`VsockError::PortTaken`].
    pub fn join(&self, port: u32, stream: UnixStream, joined: Joined) -> Result<(), VsockError> {
        let added = self.listeners.add_stream(port, stream, joined);
        if added { Ok(()) } else { Err(VsockError::PortTaken(port)) }
    }

    /// Has `dialer` make the connections of the guest to ports that nobody has registered; without one they
    /// are refused. Only the first dialer counts.
    pub fn dial_by(&self, dialer: Dialer) {
        self.listeners.dial_by(dialer);
    }

    /// Refuses further connections to `port`; those that stand are not touched. Returns whether
    /// there was a listener.
    pub fn unlisten(&self, port: u32) -> bool {
        self.listeners.remove(port)
    }

    /// Counters.
    pub fn stats(&self) -> VsockStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let c = &self.counters;
        VsockStats {
            connections: self.core.inspect(|work| work.muxer.len() as u64).unwrap_or(0),
            packets_from_guest: get(&c.packets_from_guest),
            packets_to_guest: get(&c.packets_to_guest),
            bytes_from_guest: get(&c.bytes_from_guest),
            bytes_to_guest: get(&c.bytes_to_guest),
            dropped: get(&c.dropped),
        }
    }

    fn door(&self) -> MutexGuard<'_, Door> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets in who waits at the listening socket.
    fn open_door(&self) {
        let mut door = self.door();
        while let Some(accepted) = door.accept() {
            let stream = match accepted {
                Ok(stream) => stream,
                Err(e) => {
                    tracing::warn!(device = self.name(), "cannot accept a connection: {e}");
                    return;
                }
            };
            let token = self.tokens.fetch_add(1, Ordering::Relaxed);
            if self.registrar.add(&stream, token, Interest { edge: true, ..Interest::READ }).is_ok()
            {
                door.admit(token, stream);
            }
        }
    }

    /// Reads on the first line of `token`. Returns false if it is no handshake.
    fn handshake(&self, token: u64) -> bool {
        let hello = self.door().ready(token);
        match hello {
            None => return false,
            Some(Hello::Incomplete) => {}
            Some(Hello::Dropped) => tracing::debug!(device = self.name(), "a caller was dropped"),
            Some(Hello::Connect(stream, port)) => {
                // It comes back under a token of its own.
                self.registrar.remove(&stream);
                let connected = self.with_muxer(|muxer| muxer.connect(stream, port, Opener::Line));
                if let Some(Err(why)) = connected {
                    tracing::debug!(device = self.name(), port, "not connected: {why}");
                }
            }
        }
        true
    }

    /// Does what this process asked for.
    fn take_requests(&self) {
        let _ = self.requests_event.read();
        let all =
            std::mem::take(&mut *self.requests.lock().unwrap_or_else(PoisonError::into_inner));
        for ConnectRequest { guest_port, stream, reply } in all {
            let opener = Opener::Caller(reply.clone());
            let done = self.with_muxer(|muxer| muxer.connect(stream, guest_port, opener));
            let answer = match done {
                Some(Ok(())) => continue,
                Some(Err(why)) => why,
                None => VsockError::NotReady,
            };
            let _ = reply.try_send(Err(answer));
        }
    }

    fn with_muxer<R>(&self, f: impl FnOnce(&mut Muxer) -> R) -> Option<R> {
        self.core.serve(|work, _| Ok(f(&mut work.muxer)))
    }

    /// Moves packets both ways, as far as both sides allow.
    fn pump(&self) {
        let mut accepted = Vec::new();
        self.core.serve(|work, link| {
            if self.rescan.swap(false, Ordering::AcqRel) {
                work.muxer.rescan();
            }
            let take = |muxer: &mut Muxer, chain: &Chain, memory: &_| {
                muxer.packet(chain, memory, &self.listeners, &mut accepted, &self.counters)
            };
            let from_guest = work.take_packets(take)?;
            let to_guest = work.give_packets(&self.counters)?;
            let event = work.announce()?;
            if from_guest.interrupt || to_guest.interrupt || event {
                link.used();
            }
            if from_guest.again {
                self.core.slots()[TX].ring();
            }
            if to_guest.again {
                self.core.slots()[RX].ring();
            }
            Ok(())
        });
        accepted.into_iter().for_each(|connection| self.listeners.deliver(connection));
    }
}

/// What a round on one queue came to.
#[derive(Debug, Clone, Copy, Default)]
struct Round {
    interrupt: bool,
    /// Stopped in the middle, to let others go on.
    again: bool,
}

impl Work {
    fn take_packets(
        &mut self,
        mut take: impl FnMut(&mut Muxer, &Chain, &mvm_memory::GuestMemory) -> Result<(), QueueError>,
    ) -> Result<Round, QueueError> {
        let Self { tx, chain, muxer, .. } = self;
        let mut round = Round::default();
        let mut budget = tx.size();
        tx.disable_notifications()?;
        while muxer.takes_packets() {
            if budget == 0 {
                round.again = true;
                break;
            }
            if tx.pop(chain)? {
                take(muxer, chain, tx.memory())?;
                tx.push_used(chain.head(), 0)?;
                budget -= 1;
            } else if !tx.enable_notifications()? {
                break;
            }
        }
        round.interrupt = budget < tx.size() && tx.needs_interrupt()?;
        Ok(round)
    }

    fn give_packets(&mut self, counters: &Counters) -> Result<Round, QueueError> {
        let Self { rx, chain, muxer, .. } = self;
        let mut round = Round::default();
        let mut budget = rx.size();
        let held_back = !muxer.takes_packets();
        while muxer.has_packets() {
            if budget == 0 {
                round.again = true;
                break;
            }
            if !rx.pop(chain)? {
                // Only a guest that is asked to says when it has made room.
                if rx.enable_notifications()? {
                    continue;
                }
                break;
            }
            match muxer.next_packet(chain, rx.memory(), counters)? {
                Some(len) => rx.push_used(chain.head(), len)?,
                None => rx.undo_pop(),
            }
            budget -= 1;
        }
        if !muxer.has_packets() {
            rx.disable_notifications()?;
        }
        // Packets of the guest were left lying for want of room, which is there now.
        round.again |= held_back && muxer.takes_packets();
        round.interrupt = budget < rx.size() && rx.needs_interrupt()?;
        Ok(round)
    }

    /// Tells a guest that was restored from a snapshot that its connections are gone.
    fn announce(&mut self) -> Result<bool, QueueError> {
        const TRANSPORT_RESET: [u8; 4] = [0; 4];
        if !self.announce_reset || !self.event.pop(&mut self.chain)? {
            return Ok(false);
        }
        self.announce_reset = false;
        self.chain.write(self.event.memory(), 0, &TRANSPORT_RESET)?;
        self.event.push_used(self.chain.head(), TRANSPORT_RESET.len() as u32)?;
        self.event.needs_interrupt()
    }
}

impl Subscriber for Vsock {
    fn ready(&self, source: Source) {
        match source.token {
            TOKEN_REQUESTS => self.take_requests(),
            TOKEN_LISTENER => self.open_door(),
            token if token < QUEUE_SIZES.len() as u64 => self.core.slots()[token as usize].clear(),
            token => {
                if !self.handshake(token)
                    && self.with_muxer(|muxer| muxer.socket_ready(source)).is_none()
                {
                    // Paused: the edge is gone, so all sockets are looked at afterwards.
                    self.rescan.store(true, Ordering::Release);
                    return;
                }
            }
        }
        self.pump();
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Socket
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&self, mut activation: Activation) -> Result<(), ActivateError> {
        let (rx, tx) = (activation.take(RX)?, activation.take(TX)?);
        let event = activation.take(EVENT)?;
        let muxer = Muxer::new(self.guest_cid, self.registrar.clone(), self.tokens.clone());
        let announce_reset = self.restored.swap(false, Ordering::AcqRel);
        self.core.start(Work { rx, tx, event, chain: Chain::default(), muxer, announce_reset });
        Ok(())
    }

    /// Streams end with the driver that they belong to.
    fn reset(&self) {
        self.core.stop();
    }

    fn queue_states(&self) -> Vec<Option<QueueState>> {
        let states = self.core.inspect(|w| [w.rx.state(), w.tx.state(), w.event.state()]);
        (0..QUEUE_SIZES.len()).map(|i| states.map(|s| s[i])).collect()
    }

    fn restore(&self, _state: &DeviceState) -> Result<(), ActivateError> {
        self.restored.store(true, Ordering::Release);
        Ok(())
    }

    common_device_methods!();
}
