//! A guest's socket driver, as far as the tests need one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use super::super::packet::{HEADER_LEN, Header, TYPE_STREAM};
use super::super::{HOST_CID, Vsock};
use crate::testing::{DriverQueue, Guest, PATIENCE, Segment};

pub const CID: u64 = 3;
const RX_BUFFERS: u64 = 64;
const RX_LEN: u32 = 4096;
const TX_SLOTS: u64 = 8;
const TX_LEN: u64 = 0x11000;

pub struct VsockGuest {
    pub guest: Guest,
    pub queues: Vec<DriverQueue>,
    rx_of: Vec<u64>,
    tx_of: Vec<u64>,
    tx_free: Vec<u64>,
    inbox: VecDeque<(Header, Vec<u8>)>,
}

impl VsockGuest {
    pub fn new(device: Arc<Vsock>) -> Self {
        let mut guest = Guest::new(8 << 20, device);
        let queues = guest.start_without(0, 128);
        let mut new = Self {
            guest,
            queues,
            rx_of: vec![0; 128],
            tx_of: vec![0; 128],
            tx_free: Vec::new(),
            inbox: VecDeque::new(),
        };
        new.fill();
        new
    }

    fn fill(&mut self) {
        let rx = self.guest.alloc(RX_BUFFERS * u64::from(RX_LEN));
        let tx = self.guest.alloc(TX_SLOTS * TX_LEN);
        self.tx_free = (0..TX_SLOTS).map(|i| tx + i * TX_LEN).collect();
        for i in 0..RX_BUFFERS {
            self.post(rx + i * u64::from(RX_LEN));
        }
        self.guest.notify(0);
    }

    pub fn restart(&mut self) {
        self.guest.reset();
        self.queues = self.guest.start_without(0, 128);
        self.inbox.clear();
        self.fill();
    }

    fn post(&mut self, at: u64) {
        let head = self.queues[0].offer(&[Segment::writable(at, RX_LEN)]);
        self.rx_of[usize::from(head)] = at;
    }

    /// Sends a packet as it is.
    pub fn send(&mut self, header: Header, payload: &[u8]) {
        let deadline = Instant::now() + PATIENCE;
        while self.tx_free.is_empty() {
            let seen = self.guest.line.count();
            while let Some((head, _)) = self.queues[1].poll_used() {
                self.tx_free.push(self.tx_of[usize::from(head)]);
            }
            if self.tx_free.is_empty() {
                self.queues[1].ask_for_interrupt();
                if self.queues[1]
                    .poll_used()
                    .map(|(h, _)| self.tx_free.push(self.tx_of[usize::from(h)]))
                    .is_none()
                {
                    self.guest.line.wait_beyond(seen, deadline).expect("the device takes packets");
                }
            }
        }
        let at = self.tx_free.pop().unwrap();
        let memory = self.guest.ram.memory();
        memory.write_slice(&header.to_bytes(), GuestAddress(at)).unwrap();
        memory.write_slice(payload, GuestAddress(at + HEADER_LEN as u64)).unwrap();
        // Header and data in three pieces, as drivers with scattered buffers have it.
        let half = payload.len() as u32 / 2;
        let data = at + HEADER_LEN as u64;
        let mut chain = vec![Segment::readable(at, HEADER_LEN as u32)];
        if !payload.is_empty() {
            chain.push(Segment::readable(data, half));
            chain.push(Segment::readable(data + u64::from(half), payload.len() as u32 - half));
        }
        let head = self.queues[1].offer(&chain);
        self.tx_of[usize::from(head)] = at;
        if self.queues[1].wants_notification() {
            self.guest.notify(1);
        }
    }

    fn collect(&mut self) {
        let mut any = false;
        while let Some((head, len)) = self.queues[0].poll_used() {
            let at = self.rx_of[usize::from(head)];
            let bytes = self.guest.bytes(at, len as usize);
            let header = Header::from_bytes(bytes[..HEADER_LEN].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
            self.inbox.push_back((header, bytes[HEADER_LEN..].to_vec()));
            self.post(at);
            any = true;
        }
        if any && self.queues[0].wants_notification() {
            self.guest.notify(0);
        }
    }

    /// The next packet for the guest.
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        self.receive_before(Instant::now() + PATIENCE).expect("a packet in time")
    }

    pub fn receive_before(&mut self, deadline: Instant) -> Option<(Header, Vec<u8>)> {
        loop {
            let seen = self.guest.line.count();
            self.collect();
            if let Some(packet) = self.inbox.pop_front() {
                return Some(packet);
            }
            self.queues[0].ask_for_interrupt();
            self.collect();
            if self.inbox.is_empty() {
                self.guest.line.wait_beyond(seen, deadline)?;
            }
        }
    }

    /// A packet if there is one now.
    pub fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        self.collect();
        self.inbox.pop_front()
    }
}

/// The guest's end of one connection.
#[derive(Debug, Clone)]
pub struct End {
    pub host_port: u32,
    pub guest_port: u32,
    pub buf_alloc: u32,
    pub consumed: u32,
    pub sent: u32,
    pub peer_alloc: u32,
    pub peer_forwarded: u32,
}

impl End {
    pub fn new(host_port: u32, guest_port: u32) -> Self {
        Self {
            host_port,
            guest_port,
            buf_alloc: 256 << 10,
            consumed: 0,
            sent: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
        }
    }

    pub fn header(&self, op: u16, len: u32) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            len,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.consumed,
        }
    }

    pub fn is(&self, header: &Header) -> bool {
        (header.src_port, header.dst_port) == (self.host_port, self.guest_port)
    }

    pub fn note(&mut self, header: &Header) {
        assert!(self.is(header), "{header:?}");
        (self.peer_alloc, self.peer_forwarded) = (header.buf_alloc, header.fwd_cnt);
    }

    /// Room the host has promised.
    pub fn credit(&self) -> u32 {
        self.peer_alloc - self.sent.wrapping_sub(self.peer_forwarded)
    }

    pub fn send(&mut self, guest: &mut VsockGuest, op: u16, payload: &[u8]) {
        self.sent = self.sent.wrapping_add(payload.len() as u32);
        guest.send(self.header(op, payload.len() as u32), payload);
    }

    pub fn send_flags(&mut self, guest: &mut VsockGuest, op: u16, flags: u32) {
        let header = Header { flags, ..self.header(op, 0) };
        guest.send(header, &[]);
    }

    /// The next packet, which belongs to this connection and has this operation.
    pub fn expect(&mut self, guest: &mut VsockGuest, op: u16) -> (Header, Vec<u8>) {
        let (header, data) = guest.receive();
        self.note(&header);
        assert_eq!(header.op, op, "{header:?}");
        (header, data)
    }
}
