//! What every device has: queues, the way to its driver, and a working part that is there between
//! activation and reset.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use mvm_memory::GuestMemory;

use super::{
    ActivateError, Activation, Chain, Drained, DriverLink, QueueError, QueueSlot, QueueState,
    VirtQueue,
};

/// The common part of a device; `T` is what it works on (its open queues and what goes with them).
///
/// The lock around the working part is what makes reset synchronous: whoever works on the queues
/// holds it, so a reset that has returned has been waited for.
#[derive(Debug)]
pub struct Core<T> {
    name: String,
    slots: Vec<QueueSlot>,
    link: OnceLock<Arc<DriverLink>>,
    work: Mutex<Slot<T>>,
}

#[derive(Debug)]
struct Slot<T> {
    work: Option<T>,
    paused: bool,
}

impl<T> Core<T> {
    /// A device called `name` with queues of these greatest sizes.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn new(name: &str, queue_sizes: &[u16]) -> io::Result<Self> {
        Ok(Self::with_slots(name, QueueSlot::several(queue_sizes)?))
    }

    /// A part of a device, which works on some of its queues.
    pub fn with_slots(name: &str, slots: Vec<QueueSlot>) -> Self {
        Self {
            name: name.into(),
            slots,
            link: OnceLock::new(),
            work: Mutex::new(Slot { work: None, paused: false }),
        }
    }

    /// What log lines call the device.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The queues.
    pub fn slots(&self) -> &[QueueSlot] {
        &self.slots
    }

    /// Takes the link; the first one stays.
    pub fn connect(&self, link: Arc<DriverLink>) {
        let _ = self.link.set(link);
    }

    /// The way to the driver, once connected.
    pub fn link(&self) -> Option<&Arc<DriverLink>> {
        self.link.get()
    }

    /// Tells the driver of a new configuration.
    pub fn config_changed(&self) {
        if let Some(link) = self.link() {
            link.config_changed();
        }
    }

    /// Runs `f` on the working part if it is at work: active, not paused, not failed. An error stops
    /// the device until it is reset.
    ///
    /// What the driver is told, it is told in `f`: after it, the device may have been reset, and the
    /// next driver must not hear of the last one's affairs.
    pub fn serve<R>(
        &self,
        f: impl FnOnce(&mut T, &DriverLink) -> Result<R, QueueError>,
    ) -> Option<R> {
        let link = self.link()?;
        let mut slot = self.lock();
        if slot.paused || link.needs_reset() {
            return None;
        }
        f(slot.work.as_mut()?, link).inspect_err(|fault| link.fail(fault)).ok()
    }

    /// One round on queue `index`, with the interrupt and the further round that come of it.
    pub fn serve_queue(
        &self,
        index: usize,
        round: impl FnOnce(&mut T) -> Result<Option<Drained>, QueueError>,
    ) {
        let done = self.serve(|work, link| {
            let drained = round(work)?;
            if drained.is_some_and(|d| d.interrupt) {
                link.used();
            }
            Ok(drained.is_some_and(|d| d.more))
        });
        if done == Some(true)
            && let Some(slot) = self.slots.get(index)
        {
            slot.ring();
        }
    }

    /// Runs `f` on the working part, in whatever state.
    pub fn inspect<R>(&self, f: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.lock().work.as_mut().map(f)
    }

    /// Starts work, and looks at every queue once: the driver may have filled it already.
    pub fn start(&self, work: T) {
        self.lock().work = Some(work);
        self.ring_all();
    }

    /// Takes the working part away, once nobody uses it.
    pub fn stop(&self) -> Option<T> {
        self.lock().work.take()
    }

    /// Pauses or goes on.
    pub fn set_paused(&self, paused: bool) {
        self.lock().paused = paused;
        if !paused {
            self.ring_all();
        }
    }

    fn ring_all(&self) {
        self.slots.iter().for_each(QueueSlot::ring);
    }

    fn lock(&self) -> MutexGuard<'_, Slot<T>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The working part of a device that has one queue and takes each request by itself.
#[derive(Debug)]
pub struct OneQueue {
    queue: VirtQueue,
    chain: Chain,
}

impl Core<OneQueue> {
    /// Starts work on the queue that the driver has set up.
    ///
    /// # Errors
    /// [`ActivateError`]: there is none, or it cannot be used.
    pub fn start_one(&self, mut activation: Activation) -> Result<(), ActivateError> {
        self.start(OneQueue { queue: activation.take(0)?, chain: Chain::default() });
        Ok(())
    }

    /// One round, at its doorbell: `answer` is as [`VirtQueue::drain`] has it.
    pub fn serve_one(&self, answer: impl FnMut(&Chain, &GuestMemory) -> Result<u32, QueueError>) {
        self.slots.iter().for_each(QueueSlot::clear);
        self.serve_queue(0, |work| work.queue.drain(&mut work.chain, answer).map(Some));
    }

    /// Where the queue is.
    pub fn states_of_one(&self) -> Vec<Option<QueueState>> {
        vec![self.inspect(|work| work.queue.state())]
    }
}

/// The methods of [`VirtioDevice`](super::VirtioDevice) that are the same for every device with a
/// field `core`, or with a field `$part` that has one.
macro_rules! common_device_methods {
    ($($part:ident)?) => {
        fn name(&self) -> &str {
            self$(.$part)?.core.name()
        }
        fn queues(&self) -> &[$crate::virtio::QueueSlot] {
            self$(.$part)?.core.slots()
        }
        fn connect(&self, link: std::sync::Arc<$crate::virtio::DriverLink>) {
            self$(.$part)?.core.connect(link);
        }
        fn pause(&self) {
            self$(.$part)?.core.set_paused(true);
        }
        fn resume(&self) {
            self$(.$part)?.core.set_paused(false);
        }
    };
}
pub(crate) use common_device_methods;
