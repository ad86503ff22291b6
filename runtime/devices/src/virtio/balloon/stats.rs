//! What the guest says of its memory (5.5.6.4).

use serde::Serialize;

use crate::virtio::{Chain, QueueError, QueueState, VirtQueue};

/// Bytes of one statistic: tag and value.
const ENTRY: usize = 10;
/// Most statistics of one report.
const MAX_ENTRIES: u64 = 64;

/// Memory of the guest as it sees it. Bytes, except for counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GuestMemoryStats {
    /// Read from swap.
    pub swap_in: Option<u64>,
    /// Written to swap.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O (count).
    pub major_faults: Option<u64>,
    /// Page faults that did not (count).
    pub minor_faults: Option<u64>,
    /// Not used at all.
    pub free: Option<u64>,
    /// All there is.
    pub total: Option<u64>,
    /// Could be had without swapping.
    pub available: Option<u64>,
    /// Used by caches.
    pub caches: Option<u64>,
}

impl GuestMemoryStats {
    fn set(&mut self, tag: u16, value: u64) {
        let field = match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.caches,
            _ => return,
        };
        *field = Some(value);
    }
}

/// The statistics queue: the driver offers a filled buffer, and fills it anew when it gets it back.
#[derive(Debug)]
pub struct StatsQueue {
    queue: VirtQueue,
    /// The buffer that is kept until the next report is wanted.
    kept: Option<u16>,
}

impl StatsQueue {
    pub fn new(queue: VirtQueue) -> Self {
        Self { queue, kept: None }
    }

    /// Where the queue is, with the kept buffer not yet taken: after a restore it is taken again.
    pub fn state(&self) -> QueueState {
        let mut state = self.queue.state();
        state.next_available = state.next_available.wrapping_sub(u16::from(self.kept.is_some()));
        state
    }

    /// Gives the buffer back, for a new report. Returns whether the driver wants an interrupt.
    pub fn request(&mut self) -> Result<bool, QueueError> {
        let Some(head) = self.kept.take() else { return Ok(false) };
        self.queue.push_used(head, 0)?;
        self.queue.needs_interrupt()
    }

    /// Takes the report, if there is one.
    pub fn take(&mut self, chain: &mut Chain) -> Result<Option<GuestMemoryStats>, QueueError> {
        self.queue.disable_notifications()?;
        let mut news = None;
        // Only one buffer is ever meant to be there.
        while self.kept.is_none() {
            if self.queue.pop(chain)? {
                news = Some(self.read(chain)?);
                self.kept = Some(chain.head());
            } else if !self.queue.enable_notifications()? {
                return Ok(news);
            }
        }
        self.queue.enable_notifications()?;
        Ok(news)
    }

    fn read(&self, chain: &Chain) -> Result<GuestMemoryStats, QueueError> {
        let mut stats = GuestMemoryStats::default();
        let count = (chain.readable_len() / ENTRY as u64).min(MAX_ENTRIES);
        for i in 0..count {
            let mut entry = [0; ENTRY];
            chain.read(self.queue.memory(), i * ENTRY as u64, &mut entry)?;
            let [t0, t1, value @ ..] = entry;
            stats.set(u16::from_le_bytes([t0, t1]), u64::from_le_bytes(value));
        }
        Ok(stats)
    }
}
