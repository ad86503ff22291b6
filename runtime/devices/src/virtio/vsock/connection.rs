//! One stream connection between the guest and a socket of the host.
//!
//! Bytes are held back, never piled up: towards the host a connection keeps at most what it has
//! promised the guest room for (5.10.6.3), towards the guest nothing at all, as the socket's own buffer
//! holds what the guest has no credit for.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;

use mvm_memory::GuestMemory;
use nix::sys::socket::{MsgFlags, send};

use super::VsockError;
use super::packet::{HEADER_LEN, Header, Key, op, shutdown};
use crate::virtio::iov::{self, Io};
use crate::virtio::{Chain, QueueError};

/// Most payload of one packet to the guest.
const MAX_PAYLOAD: u64 = 64 << 10;

/// Who asked for a connection to the guest, and how to tell them that it stands.
#[derive(Debug)]
pub enum Opener {
    /// A host process by the listening socket: gets a line.
    Line,
    /// This process: gets a message.
    Caller(SyncSender<Result<(), VsockError>>),
}

#[derive(Debug)]
enum State {
    /// The guest was asked and has not answered.
    Requested(Opener),
    Established,
}

/// Packets waiting to be sent, apart from data.
#[derive(Debug, Default, Clone, Copy)]
struct Pending {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
}

/// What became of a connection after something happened to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Live,
    /// It is over, the guest knows.
    Gone,
    /// It is over, the guest must be told (RST).
    Reset,
}

#[derive(Debug)]
pub struct Connection {
    pub key: Key,
    stream: UnixStream,
    state: State,
    pending: Pending,
    /// It is in the list of those that may have something for the guest.
    pub queued: bool,
    /// The socket may have bytes for us, or room: true until it says otherwise.
    readable: bool,
    writable: bool,
    /// The host's end is closed.
    hung_up: bool,

    /// Guest to host: bytes taken from the guest that the socket had no room for.
    held: VecDeque<u8>,
    /// Room promised to the guest, bytes received, bytes passed on, and what the guest knows of them.
    buf_alloc: u32,
    received: u32,
    forwarded: u32,
    told: u32,

    /// Host to guest: the guest's room, what it has passed on, and bytes sent.
    peer_alloc: u32,
    peer_forwarded: u32,
    sent: u32,
    asked_for_credit: bool,

    /// Ends: flags the guest sent, and those sent to it.
    guest_shutdown: u32,
    told_shutdown: u32,
    /// The socket gives, or takes, no more.
    host_eof: bool,
    host_deaf: bool,
    /// Nobody speaks to the guest any more; only held bytes are still delivered.
    lingering: bool,
}

impl Connection {
    /// The guest asked: `request` is its packet.
    pub fn accepted(stream: UnixStream, request: &Header, buf_alloc: u32) -> Self {
        let pending = Pending { response: true, ..Pending::default() };
        let mut new = Self::new(stream, request.key(), State::Established, pending, buf_alloc);
        new.take_credit(request);
        new
    }

    /// The host asks.
    pub fn requested(stream: UnixStream, key: Key, opener: Opener, buf_alloc: u32) -> Self {
        let pending = Pending { request: true, ..Pending::default() };
        Self::new(stream, key, State::Requested(opener), pending, buf_alloc)
    }

    fn new(stream: UnixStream, key: Key, state: State, pending: Pending, buf_alloc: u32) -> Self {
        Self {
            key,
            stream,
            state,
            pending,
            queued: false,
            readable: true,
            writable: true,
            hung_up: false,
            held: VecDeque::new(),
            buf_alloc,
            received: 0,
            forwarded: 0,
            told: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            sent: 0,
            asked_for_credit: false,
            guest_shutdown: 0,
            told_shutdown: 0,
            host_eof: false,
            host_deaf: false,
            lingering: false,
        }
    }

    /// The host's socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The guest has forgotten the connection. Returns true if bytes are still to be delivered.
    pub fn linger(&mut self) -> bool {
        self.lingering = !self.held.is_empty();
        self.lingering
    }

    /// Both sides are done, except that the guest has not said so.
    pub fn finished(&self) -> bool {
        self.told_shutdown == shutdown::BOTH && self.held.is_empty()
    }

    /// Both what comes in and what goes out may have moved while nobody looked.
    pub fn rescan(&mut self) -> Fate {
        self.socket_ready(true, true, false)
    }

    /// The socket is ready. The caller then looks for packets to send.
    pub fn socket_ready(&mut self, readable: bool, writable: bool, hung_up: bool) -> Fate {
        self.readable |= readable || hung_up;
        self.writable |= writable || hung_up;
        self.hung_up |= hung_up;
        if self.hung_up && matches!(self.state, State::Requested(_)) {
            return Fate::Reset;
        }
        if self.writable && !self.held.is_empty() {
            return self.flush();
        }
        Fate::Live
    }

    /// Whether the guest should be sent something.
    pub fn wants_to_send(&self) -> bool {
        if self.lingering {
            return false;
        }
        let Pending { request, response, credit_update, credit_request } = self.pending;
        let control = request || response || credit_update || credit_request;
        control || self.may_read() || self.shutdown_due() != 0
    }

    fn may_read(&self) -> bool {
        matches!(self.state, State::Established)
            && self.readable
            && !self.host_eof
            && self.guest_shutdown & shutdown::RECEIVE == 0
            && (self.credit() > 0 || !self.asked_for_credit)
    }

    /// Flags of SHUTDOWN that the guest has not been sent.
    fn shutdown_due(&self) -> u32 {
        let deaf = self.host_deaf || self.hung_up;
        let mut flags = if self.host_eof { shutdown::SEND } else { 0 };
        flags |= if deaf { shutdown::RECEIVE } else { 0 };
        flags & !self.told_shutdown
    }

    /// Bytes the guest has room for (5.10.6.3). A guest that lies gets none.
    fn credit(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    fn take_credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked_for_credit = false;
        }
    }

    /// A packet from the guest, whose payload is in `chain` after the header.
    pub fn receive(
        &mut self,
        header: &Header,
        chain: &Chain,
        memory: &GuestMemory,
    ) -> Result<Fate, QueueError> {
        self.take_credit(header);
        match header.op {
            op::RST => Ok(Fate::Gone),
            op::RESPONSE => Ok(self.answered()),
            op::RW if !matches!(self.state, State::Established) => Ok(Fate::Reset),
            op::RW => self.receive_data(header.len, chain, memory),
            op::CREDIT_UPDATE => Ok(Fate::Live),
            op::CREDIT_REQUEST => {
                self.pending.credit_update = true;
                Ok(Fate::Live)
            }
            op::SHUTDOWN => {
                self.guest_shutdown |= header.flags & shutdown::BOTH;
                Ok(self.follow_shutdown())
            }
            // A second request for the same ports, or an operation that does not exist.
            _ => Ok(Fate::Reset),
        }
    }

    /// The guest has accepted.
    fn answered(&mut self) -> Fate {
        match std::mem::replace(&mut self.state, State::Established) {
            State::Requested(Opener::Line) => {
                let line = format!("OK {}\n", self.key.host_port);
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                // Nothing was written to the socket before, so it has room for a line.
                match send(self.stream.as_raw_fd(), line.as_bytes(), flags) {
                    Ok(n) if n == line.len() => Fate::Live,
                    _ => Fate::Reset,
                }
            }
            State::Requested(Opener::Caller(caller)) => {
                // A caller that has given up closes the stream, which says it all.
                let _ = caller.try_send(Ok(()));
                Fate::Live
            }
            State::Established => Fate::Reset,
        }
    }

    fn receive_data(
        &mut self,
        len: u32,
        chain: &Chain,
        memory: &GuestMemory,
    ) -> Result<Fate, QueueError> {
        let outstanding = self.received.wrapping_sub(self.forwarded);
        // More than was promised room for, or after the guest said that there would be no more.
        if len > self.buf_alloc.saturating_sub(outstanding)
            || self.guest_shutdown & shutdown::SEND != 0
        {
            return Ok(Fate::Reset);
        }
        self.received = self.received.wrapping_add(len);
        let (mut at, mut left) = (HEADER_LEN as u64, u64::from(len));
        if self.held.is_empty() && self.writable && !self.host_deaf {
            let mut slices = Vec::new();
            chain.readable_slices(memory, at, left, &mut slices)?;
            while !slices.is_empty() {
                match iov::write(self.stream.as_fd(), &slices, Io::Socket) {
                    Ok(n) => {
                        self.forwarded = self.forwarded.wrapping_add(n as u32);
                        (at, left) = (at + n as u64, left - n as u64);
                        iov::advance(&mut slices, n);
                    }
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => {
                        self.write_failed(&e);
                        break;
                    }
                }
            }
        }
        if self.host_deaf {
            // Nobody will read it; the guest learns by SHUTDOWN.
            self.forwarded = self.forwarded.wrapping_add(left as u32);
        } else if left > 0 {
            let mut rest = vec![0; left as usize];
            chain.read(memory, at, &mut rest)?;
            self.held.extend(rest);
        }
        self.offer_credit();
        Ok(Fate::Live)
    }

    /// Passes held bytes on, as far as the socket takes them.
    fn flush(&mut self) -> Fate {
        while !self.held.is_empty() && self.writable && !self.host_deaf {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.stream.as_raw_fd(), self.held.as_slices().0, flags) {
                Ok(n) => {
                    self.held.drain(..n);
                    self.forwarded = self.forwarded.wrapping_add(n as u32);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => self.write_failed(&e.into()),
            }
        }
        if self.held.is_empty() {
            // Memory for a burst goes back after it.
            self.held = VecDeque::new();
        }
        self.offer_credit();
        self.follow_shutdown()
    }

    fn write_failed(&mut self, e: &io::Error) {
        self.writable = false;
        if e.kind() != io::ErrorKind::WouldBlock {
            self.host_deaf = true;
            self.forwarded = self.forwarded.wrapping_add(self.held.len() as u32);
            self.held.clear();
        }
    }

    /// Tells the guest of room that it does not know of, once it thinks that half is gone.
    fn offer_credit(&mut self) {
        let seen_by_guest = self.received.wrapping_sub(self.told);
        if self.told != self.forwarded && seen_by_guest >= self.buf_alloc / 2 {
            self.pending.credit_update = true;
        }
    }

    /// Acts on what the guest has shut down, after everything it sent before was delivered.
    fn follow_shutdown(&mut self) -> Fate {
        if self.guest_shutdown & shutdown::RECEIVE != 0 {
            // The host's writer gets an error instead of filling a buffer nobody reads.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if !self.held.is_empty() {
            return Fate::Live;
        }
        if self.lingering {
            return Fate::Gone;
        }
        if self.guest_shutdown & shutdown::SEND != 0 {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if self.guest_shutdown == shutdown::BOTH { Fate::Reset } else { Fate::Live }
    }

    /// The next packet for the guest, data written to `chain` behind room for the header. `None` if
    /// there is nothing, after all.
    pub fn next_packet(
        &mut self,
        guest_cid: u64,
        chain: &Chain,
        memory: &GuestMemory,
    ) -> Result<Option<Header>, QueueError> {
        let mut header = Header::to_guest(guest_cid, self.key, 0);
        if std::mem::take(&mut self.pending.request) {
            header.op = op::REQUEST;
        } else if std::mem::take(&mut self.pending.response) {
            header.op = op::RESPONSE;
        } else if let Some(len) = self.read_data(chain, memory)? {
            header.op = op::RW;
            header.len = len;
        } else if self.shutdown_due() != 0 {
            self.told_shutdown |= self.shutdown_due();
            header.op = op::SHUTDOWN;
            header.flags = self.told_shutdown;
        } else if std::mem::take(&mut self.pending.credit_request) {
            header.op = op::CREDIT_REQUEST;
        } else if self.pending.credit_update {
            header.op = op::CREDIT_UPDATE;
        } else {
            return Ok(None);
        }
        // Every packet carries the news of room.
        self.pending.credit_update = false;
        self.told = self.forwarded;
        header.buf_alloc = self.buf_alloc;
        header.fwd_cnt = self.forwarded;
        Ok(Some(header))
    }

    /// Reads from the socket into `chain`. Returns the bytes, at least one.
    fn read_data(
        &mut self,
        chain: &Chain,
        memory: &GuestMemory,
    ) -> Result<Option<u32>, QueueError> {
        if !self.may_read() {
            return Ok(None);
        }
        let room = chain.writable_len() - HEADER_LEN as u64;
        let len = room.min(MAX_PAYLOAD).min(u64::from(self.credit()));
        if len == 0 {
            self.asked_for_credit = true;
            self.pending.credit_request = true;
            return Ok(None);
        }
        let mut slices = Vec::new();
        chain.writable_slices(memory, HEADER_LEN as u64, len, &mut slices)?;
        loop {
            match iov::read(self.stream.as_fd(), &slices, Io::Socket) {
                Ok(0) => self.host_eof = true,
                Ok(n) => {
                    self.sent = self.sent.wrapping_add(n as u32);
                    return Ok(Some(n as u32));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                // The host's end was closed with bytes unread.
                Err(_) => self.host_eof = true,
            }
            return Ok(None);
        }
    }
}
