//! Network devices behind hypercalls, over the same backends as virtio's.
//!
//! The guest's packets are whole Ethernet frames: nothing is left undone in them, so the header that
//! a backend wants before each is all zeros.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mvm_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::abi::Answer;
use super::{HypercallNet, NOT_OWN, Refused};
use crate::limit::RateLimit;
use crate::virtio::net::{HEADER, NetBackend};

/// Bytes before the packet: addresses and type (IEEE 802.3, 3.1.1).
const FRAME_HEADER: usize = 14;
/// Bytes of a VLAN's tag, which may be among them (IEEE 802.1Q).
const TAG: usize = 4;

/// A network under its handle.
#[derive(Debug)]
pub struct Port {
    handle: u64,
    mac: [u8; 6],
    mtu: u16,
    backend: Box<dyn NetBackend>,
    counters: Counters,
    complaints: RateLimit,
}

/// Frames.
#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
    dropped: AtomicU64,
}

impl Port {
    pub fn new(config: HypercallNet) -> Self {
        let HypercallNet { handle, mac, mtu, backend } = config;
        let complaints = RateLimit::new(4, Duration::from_secs(60));
        Self { handle, mac, mtu, backend, counters: Counters::default(), complaints }
    }

    pub fn handle(&self) -> u64 {
        self.handle
    }

    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Longest packet in bytes without the frame's header.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// Readable when there is a frame.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.backend.fd()
    }

    /// Frames sent, received, and lost.
    pub fn counts(&self) -> [u64; 3] {
        let Counters { sent, received, dropped } = &self.counters;
        [sent, received, dropped].map(|counter| counter.load(Ordering::Relaxed))
    }

    fn complain(&self, error: &io::Error) {
        if self.complaints.admit().is_some() {
            tracing::warn!("hypercall on network {}: {error}", self.handle);
        }
    }

    fn longest(&self) -> usize {
        usize::from(self.mtu) + FRAME_HEADER + TAG
    }

    /// Sends the frame in `[data, data + len)`, which is the guest's own. One for which the host has
    /// no room is lost, as on any network.
    pub fn write(&self, ram: &GuestRam, data: u64, len: u64) -> Result<Answer, Refused> {
        let Some(len) = usize::try_from(len).ok().filter(|len| *len <= self.longest()) else {
            return Ok(Answer::Invalid);
        };
        if len < FRAME_HEADER {
            return Ok(Answer::Invalid);
        }
        let mut packet = vec![0; HEADER + len];
        let frame = &mut packet[HEADER..];
        ram.memory().read_slice(frame, GuestAddress(data)).map_err(|_| NOT_OWN)?;
        match self.backend.send_bytes(&packet) {
            Ok(()) => add(&self.counters.sent),
            Err(e) if passes(&e) || e.raw_os_error() == Some(libc::ENOBUFS) => {
                add(&self.counters.dropped);
            }
            Err(e) => {
                self.complain(&e);
                add(&self.counters.dropped);
                return Ok(Answer::Failed);
            }
        }
        Ok(Answer::Ok)
    }

    /// Receives the next frame to `[data, data + room)`, which is the guest's own, and says how long it
    /// is. One for which there is no room is lost.
    pub fn read(&self, ram: &GuestRam, data: u64, room: u64) -> Result<Received, Refused> {
        // One byte more, by which a frame shows that it is too long.
        let mut packet = vec![0; HEADER + self.longest() + 1];
        let received = match self.backend.receive(&mut packet) {
            Ok(received) => received,
            Err(e) if passes(&e) => return Ok(Err(Answer::Again)),
            Err(e) => {
                self.complain(&e);
                return Ok(Err(Answer::Failed));
            }
        };
        let frame = packet.get(HEADER..received).unwrap_or_default();
        let fits = frame.len() <= self.longest() && frame.len() as u64 <= room;
        if frame.is_empty() || !fits {
            add(&self.counters.dropped);
            return Ok(Err(Answer::Again));
        }
        ram.memory().write_slice(frame, GuestAddress(data)).map_err(|_| NOT_OWN)?;
        add(&self.counters.received);
        Ok(Ok(frame.len() as u64))
    }
}

/// The length of a frame, or why there is none.
type Received = Result<u64, Answer>;

/// Not now, but perhaps the next time.
fn passes(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
