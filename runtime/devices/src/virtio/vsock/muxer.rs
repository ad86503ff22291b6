//! All connections of one guest.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mvm_memory::GuestMemory;

use super::connection::{Connection, Fate, Opener};
use super::host::{Accepted, Listeners};
use super::packet::{HEADER_LEN, Header, Key, TYPE_STREAM, op};
use super::{Counters, HOST_CID, VsockError, bump};
use crate::event_loop::{Interest, Registrar, Source};
use crate::virtio::{Chain, QueueError};

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 4096;
/// Room promised to the guest per connection, while there are few of them and when there are many:
/// what the host's readers leave lying is bounded in all.
const BUF_ALLOC: u32 = 256 << 10;
const BUF_ALLOC_MANY: u32 = 32 << 10;
const MANY: usize = 256;
/// Most RSTs waiting for room in the receive queue. Beyond that nothing more is taken from the guest.
const MAX_RESETS: usize = 1024;
/// First port of the host's ends.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// The connections, and what is to be sent for them.
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    registrar: Registrar,
    connections: HashMap<u64, Connection>,
    by_key: HashMap<Key, u64>,
    /// Connections that may have something for the guest.
    ready: VecDeque<u64>,
    resets: VecDeque<Key>,
    /// Where names for sockets come from; shared with the handshakes, and never going back, as events
    /// of closed sockets may still be under way.
    tokens: Arc<AtomicU64>,
    next_port: u32,
}

impl Muxer {
    pub fn new(guest_cid: u64, registrar: Registrar, tokens: Arc<AtomicU64>) -> Self {
        Self {
            guest_cid,
            registrar,
            connections: HashMap::new(),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            tokens,
            next_port: FIRST_HOST_PORT,
        }
    }

    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Whether the guest's packets may be taken now.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Asks the guest for a connection from `stream` to its port `guest_port`.
    pub fn connect(
        &mut self,
        stream: UnixStream,
        guest_port: u32,
        opener: Opener,
    ) -> Result<(), VsockError> {
        if !self.has_room() {
            return Err(VsockError::Full(MAX_CONNECTIONS));
        }
        let key = self.free_key(guest_port);
        let new = Connection::requested(stream, key, opener, self.buf_alloc());
        self.insert(new).map_err(VsockError::Socket)
    }

    /// A packet from the guest, in `chain`.
    pub fn packet(
        &mut self,
        chain: &Chain,
        memory: &GuestMemory,
        listeners: &Listeners,
        accepted: &mut Vec<Accepted>,
        counters: &Counters,
    ) -> Result<(), QueueError> {
        let mut raw = [0; HEADER_LEN];
        chain.read(memory, 0, &mut raw)?;
        let header = Header::from_bytes(&raw);
        if u64::from(header.len) > chain.readable_len() - HEADER_LEN as u64 {
            return Err(QueueError::Request("vsock packet longer than its buffers"));
        }
        bump(&counters.packets_from_guest, 1);
        // Addresses are not the guest's to choose (5.10.6.4.1): such packets go nowhere.
        if header.dst_cid != HOST_CID || header.src_cid != self.guest_cid {
            bump(&counters.dropped, 1);
            return Ok(());
        }
        let key = header.key();
        if header.kind != TYPE_STREAM {
            self.answer_with_reset(&header);
            return Ok(());
        }
        if let Some(&token) = self.by_key.get(&key) {
            let Some(connection) = self.connections.get_mut(&token) else { return Ok(()) };
            if header.op == op::RW {
                bump(&counters.bytes_from_guest, u64::from(header.len));
            }
            let fate = connection.receive(&header, chain, memory)?;
            self.settle(token, fate);
            return Ok(());
        }
        match header.op {
            op::REQUEST => match self.accept(&header, listeners) {
                Ok(connection) => accepted.push(connection),
                Err(why) => {
                    tracing::debug!(port = header.dst_port, "guest connection refused: {why}");
                    self.answer_with_reset(&header);
                }
            },
            _ => self.answer_with_reset(&header),
        }
        Ok(())
    }

    fn accept(&mut self, request: &Header, listeners: &Listeners) -> Result<Accepted, VsockError> {
        if !self.has_room() {
            return Err(VsockError::Full(MAX_CONNECTIONS));
        }
        let port = request.dst_port;
        let opened = listeners.open(port).ok_or(VsockError::NoListener(port))?;
        let (ours, accepted) = opened.map_err(VsockError::Socket)?;
        let new = Connection::accepted(ours, request, self.buf_alloc());
        self.insert(new).map_err(VsockError::Socket)?;
        Ok(accepted)
    }

    /// A host socket is ready.
    pub fn socket_ready(&mut self, source: Source) {
        let Some(connection) = self.connections.get_mut(&source.token) else { return };
        let fate = connection.socket_ready(source.readable, source.writable, source.hung_up);
        self.settle(source.token, fate);
    }

    /// Looks at all sockets, as events may have been missed.
    pub fn rescan(&mut self) {
        let tokens: Vec<u64> = self.connections.keys().copied().collect();
        for token in tokens {
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            let fate = connection.rescan();
            self.settle(token, fate);
        }
    }

    /// Whether there may be something for the guest.
    pub fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Puts the next packet for the guest into `chain`. Returns the bytes written, `None` if there is
    /// no packet.
    pub fn next_packet(
        &mut self,
        chain: &Chain,
        memory: &GuestMemory,
        counters: &Counters,
    ) -> Result<Option<u32>, QueueError> {
        if chain.writable_len() <= HEADER_LEN as u64 {
            return Err(QueueError::Request("vsock receive buffer without room for data"));
        }
        let Some(header) = self.next_header(chain, memory)? else { return Ok(None) };
        chain.write(memory, 0, &header.to_bytes())?;
        bump(&counters.packets_to_guest, 1);
        bump(&counters.bytes_to_guest, u64::from(header.len));
        Ok(Some(HEADER_LEN as u32 + header.len))
    }

    fn next_header(
        &mut self,
        chain: &Chain,
        memory: &GuestMemory,
    ) -> Result<Option<Header>, QueueError> {
        if let Some(key) = self.resets.pop_front() {
            return Ok(Some(Header::to_guest(self.guest_cid, key, op::RST)));
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            connection.queued = false;
            let header = connection.next_packet(self.guest_cid, chain, memory)?;
            // Round robin: behind all others that have something.
            self.enqueue(token);
            if header.is_some() {
                return Ok(header);
            }
        }
        Ok(None)
    }

    fn settle(&mut self, token: u64, fate: Fate) {
        match fate {
            Fate::Live => self.enqueue(token),
            Fate::Gone | Fate::Reset => self.remove(token, fate == Fate::Reset),
        }
    }

    fn enqueue(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if !connection.queued && connection.wants_to_send() {
            connection.queued = true;
            self.ready.push_back(token);
        }
    }

    fn remove(&mut self, token: u64, tell_guest: bool) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let key = connection.key;
        if self.by_key.get(&key) == Some(&token) {
            self.by_key.remove(&key);
            if tell_guest {
                self.resets.push_back(key);
            }
        }
        // A guest may close in a hurry; what it sent before is delivered all the same.
        if !tell_guest && connection.linger() {
            return;
        }
        self.registrar.remove(connection.stream());
        self.connections.remove(&token);
    }

    fn insert(&mut self, connection: Connection) -> io::Result<()> {
        connection.stream().set_nonblocking(true)?;
        let token = self.tokens.fetch_add(1, Ordering::Relaxed);
        let interest = Interest { readable: true, writable: true, edge: true };
        self.registrar.add(connection.stream(), token, interest).map_err(io::Error::other)?;
        self.by_key.insert(connection.key, token);
        self.connections.insert(token, connection);
        self.enqueue(token);
        Ok(())
    }

    /// Answers a packet that belongs to nothing, unless it is a RST itself.
    fn answer_with_reset(&mut self, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(header.key());
        }
    }

    fn has_room(&mut self) -> bool {
        if self.connections.len() >= MAX_CONNECTIONS {
            // A guest that never confirms an end must not use up the table.
            let done = self.connections.iter().filter(|(_, c)| c.finished());
            for token in done.map(|(&token, _)| token).collect::<Vec<_>>() {
                self.remove(token, true);
            }
        }
        self.connections.len() < MAX_CONNECTIONS
    }

    fn buf_alloc(&self) -> u32 {
        if self.connections.len() < MANY { BUF_ALLOC } else { BUF_ALLOC_MANY }
    }

    /// A port of the host's that no connection to `guest_port` has.
    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let host_port = self.next_port;
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            let key = Key { host_port, guest_port };
            if !self.by_key.contains_key(&key) {
                return key;
            }
        }
    }
}
