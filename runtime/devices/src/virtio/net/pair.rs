//! One pair of queues, and the packets that go through it.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::backend::NetBackend;
use super::config::{HEADER, MAX_PACKET, NUM_BUFFERS};
use crate::virtio::{Chain, Core, DriverLink, QueueError, QueueSlot, QueueState, VirtQueue};

/// Packets moved in each direction before the other one, and other devices, get their turn.
const BUDGET: u32 = 256;
/// Longest time a packet waits for others to share its interrupt with.
const COALESCE: Duration = Duration::from_micros(100);

/// Counted by all pairs of a device.
#[derive(Debug, Default)]
pub struct Counters {
    pub rx_packets: AtomicU64,
    pub rx_bytes: AtomicU64,
    pub rx_dropped: AtomicU64,
    pub tx_packets: AtomicU64,
    pub tx_bytes: AtomicU64,
    pub tx_dropped: AtomicU64,
}

fn bump(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

/// A packet that waits for buffers of the driver.
#[derive(Debug)]
struct Received {
    bytes: Box<[u8]>,
    /// Nothing waits if this is 0.
    len: usize,
}

/// What is there while the driver is.
#[derive(Debug)]
pub struct Work {
    rx: VirtQueue,
    tx: VirtQueue,
    /// The driver uses this pair.
    active: bool,
    mergeable: bool,
    chain: Chain,
    /// First chain of a packet that is spread over several.
    first: Chain,
    used: Vec<(u16, u32)>,
    received: Received,
}

impl Work {
    pub fn new(rx: VirtQueue, tx: VirtQueue, mergeable: bool) -> Self {
        let received = Received { bytes: vec![0; MAX_PACKET].into(), len: 0 };
        Self {
            rx,
            tx,
            active: false,
            mergeable,
            chain: Chain::default(),
            first: Chain::default(),
            used: Vec::new(),
            received,
        }
    }

    pub fn states(&self) -> [QueueState; 2] {
        [self.rx.state(), self.tx.state()]
    }
}

/// What a round left to do.
#[derive(Debug, Clone, Copy, Default)]
pub struct Again {
    pub rx: bool,
    pub tx: bool,
}

/// What came from the network.
enum Taken {
    Packet,
    /// Not even a header and a byte.
    Runt,
    Nothing,
}

/// What came of a received packet.
enum Delivered {
    Yes,
    /// The driver has no buffers for it; it says when it has.
    NoRoom,
    Dropped,
}

/// Counts the time until an interrupt is due.
struct Coalescer {
    since: Instant,
    pending: bool,
}

impl Coalescer {
    fn new() -> Self {
        Self { since: Instant::now(), pending: false }
    }

    /// Something was used; interrupts if the last time is long enough ago.
    fn used(&mut self, queue: &mut VirtQueue, link: &DriverLink) -> Result<(), QueueError> {
        self.pending = true;
        if self.since.elapsed() >= COALESCE {
            self.flush(queue, link)?;
        }
        Ok(())
    }

    fn flush(&mut self, queue: &mut VirtQueue, link: &DriverLink) -> Result<(), QueueError> {
        if std::mem::take(&mut self.pending) {
            self.since = Instant::now();
            if queue.needs_interrupt()? {
                link.used();
            }
        }
        Ok(())
    }
}

/// A pair with its way to the network. All its work is done on one thread.
#[derive(Debug)]
pub struct Pair {
    pub core: Core<Work>,
    pub backend: Box<dyn NetBackend>,
    /// There may be something to receive.
    readable: AtomicBool,
    /// Something can be sent, for all we know.
    writable: AtomicBool,
    /// The network is gone.
    gone: AtomicBool,
}

impl Pair {
    pub fn new(name: &str, slots: Vec<QueueSlot>, backend: Box<dyn NetBackend>) -> Self {
        Self {
            core: Core::with_slots(name, slots),
            backend,
            readable: AtomicBool::new(true),
            writable: AtomicBool::new(true),
            gone: AtomicBool::new(false),
        }
    }

    /// The backend has news.
    pub fn ready(&self, readable: bool, writable: bool) {
        self.readable.fetch_or(readable, Ordering::AcqRel);
        self.writable.fetch_or(writable, Ordering::AcqRel);
    }

    /// Whether the network has turned out to be gone.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Puts the pair to use or takes it out of use; not while it works. A pair without queues cannot be used: what
    /// the network had for it would go nowhere. Returns whether it is as wanted.
    pub fn set_active(&self, active: bool, tell_backend: bool) -> bool {
        let tell = |active| {
            let told = if tell_backend { self.backend.set_active(active) } else { Ok(()) };
            if let Err(error) = &told {
                tracing::warn!(device = self.core.name(), "cannot switch a queue: {error}");
            }
            told.is_ok()
        };
        let done = self.core.inspect(|work| {
            if !tell(active) {
                return false;
            }
            work.active = active;
            self.ready(true, true);
            true
        });
        done.unwrap_or_else(|| tell(false) && !active)
    }

    /// Moves packets both ways as far as both sides allow.
    pub fn pump(&self, counters: &Counters) -> Option<Again> {
        self.core.serve(|work, link| {
            let tx = self.transmit(work, link, counters)?;
            let rx = work.active && self.receive(work, link, counters)?;
            Ok(Again { rx, tx })
        })
    }

    /// Guest to network. Returns whether to go on later.
    fn transmit(
        &self,
        work: &mut Work,
        link: &DriverLink,
        c: &Counters,
    ) -> Result<bool, QueueError> {
        let Work { tx, chain, .. } = work;
        let mut coalescer = Coalescer::new();
        let mut more = true;
        tx.disable_notifications()?;
        for _ in 0..BUDGET {
            if !self.writable.load(Ordering::Acquire) {
                more = false;
                break;
            }
            if !tx.pop(chain)? {
                if tx.enable_notifications()? {
                    continue;
                }
                more = false;
                break;
            }
            if !self.send(chain, tx, c)? {
                tx.undo_pop();
                continue;
            }
            tx.push_used(chain.head(), 0)?;
            coalescer.used(tx, link)?;
        }
        coalescer.flush(tx, link)?;
        Ok(more)
    }

    /// Sends the packet in `chain`. Returns false if it has to wait.
    fn send(&self, chain: &Chain, tx: &VirtQueue, c: &Counters) -> Result<bool, QueueError> {
        if chain.writable_len() != 0 {
            return Err(QueueError::Request("a packet to send has a part to write to"));
        }
        let len = chain.readable_len();
        if len < HEADER as u64 {
            return Err(QueueError::Short { has: len, needs: HEADER as u64 });
        }
        if len > MAX_PACKET as u64 || self.is_gone() {
            bump(&c.tx_dropped, 1);
            return Ok(true);
        }
        let mut slices = Vec::with_capacity(chain.readable().len());
        chain.readable_slices(tx.memory(), 0, len, &mut slices)?;
        loop {
            match self.backend.send(&slices) {
                Ok(()) => {
                    bump(&c.tx_packets, 1);
                    bump(&c.tx_bytes, len as usize - HEADER);
                    return Ok(true);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.writable.store(false, Ordering::Release);
                    return Ok(false);
                }
                // A header that makes no sense, an interface that is down: such packets get lost.
                Err(_) => {
                    bump(&c.tx_dropped, 1);
                    return Ok(true);
                }
            }
        }
    }

    /// Network to guest. Returns whether to go on later.
    fn receive(
        &self,
        work: &mut Work,
        link: &DriverLink,
        c: &Counters,
    ) -> Result<bool, QueueError> {
        let mut coalescer = Coalescer::new();
        let mut more = true;
        for _ in 0..BUDGET {
            if work.received.len == 0 {
                match self.take_packet(&mut work.received) {
                    Taken::Packet => {}
                    Taken::Runt => {
                        bump(&c.rx_dropped, 1);
                        continue;
                    }
                    Taken::Nothing => {
                        more = false;
                        break;
                    }
                }
            }
            match work.deliver()? {
                Delivered::Yes => {
                    bump(&c.rx_packets, 1);
                    bump(&c.rx_bytes, work.received.len.saturating_sub(HEADER));
                    coalescer.used(&mut work.rx, link)?;
                }
                Delivered::Dropped => bump(&c.rx_dropped, 1),
                Delivered::NoRoom => {
                    // It is told of new buffers only now; some may have come meanwhile.
                    if work.rx.enable_notifications()? {
                        continue;
                    }
                    more = false;
                    break;
                }
            }
            work.received.len = 0;
        }
        if work.received.len == 0 {
            work.rx.disable_notifications()?;
        }
        coalescer.flush(&mut work.rx, link)?;
        Ok(more)
    }

    /// Takes the next packet from the network.
    fn take_packet(&self, received: &mut Received) -> Taken {
        while self.readable.load(Ordering::Acquire) && !self.is_gone() {
            match self.backend.receive(&mut received.bytes) {
                Ok(len) if len > HEADER => {
                    received.len = len;
                    return Taken::Packet;
                }
                Ok(_) => return Taken::Runt,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.readable.store(false, Ordering::Release);
                }
                Err(e) => {
                    tracing::warn!(device = self.core.name(), "the network is gone: {e}");
                    self.gone.store(true, Ordering::Release);
                }
            }
        }
        Taken::Nothing
    }
}

impl Work {
    /// Gives the received packet to the driver.
    fn deliver(&mut self) -> Result<Delivered, QueueError> {
        let Self { rx, mergeable, chain, first, used, received, .. } = self;
        let packet = &received.bytes[..received.len];
        used.clear();
        let mut done = 0;
        while done < packet.len() {
            let full = used.len() == usize::from(rx.size());
            if full || (!used.is_empty() && !*mergeable) || !rx.pop(chain)? {
                for _ in used.iter() {
                    rx.undo_pop();
                }
                // A packet that does not fit into what the driver can offer at most never will.
                let never = full || !(used.is_empty() || *mergeable);
                return Ok(if never { Delivered::Dropped } else { Delivered::NoRoom });
            }
            if chain.readable_len() != 0 {
                return Err(QueueError::Request(
                    "a buffer for received packets has a part to read",
                ));
            }
            let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
            if room == 0 || (used.is_empty() && room < HEADER) {
                return Err(QueueError::Short { has: room as u64, needs: HEADER as u64 });
            }
            let len = room.min(packet.len() - done);
            chain.write(rx.memory(), 0, &packet[done..done + len])?;
            used.push((chain.head(), len as u32));
            done += len;
            if used.len() == 1 {
                std::mem::swap(chain, first);
            }
        }
        let buffers = used.len() as u16;
        first.write(rx.memory(), NUM_BUFFERS, &buffers.to_le_bytes())?;
        rx.push_used_together(used)?;
        Ok(Delivered::Yes)
    }
}
