//! The thread on which devices wait.
//!
//! A [`Subscriber`] registers descriptors under tokens of its own and is called when one is ready.
//! Tokens are never used again by a subscriber that may still have events of the old one under way,
//! or it tells stale events apart itself. Stopping is an event like all others.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Events taken from the kernel at a time.
const BATCH: usize = 64;
/// Bits of an epoll datum that are the subscriber's token; the rest says which subscriber.
const TOKEN_BITS: u32 = 48;
/// Subscriber number of the loop itself.
const STOP: u64 = u64::MAX;
/// Device threads do no recursion and hold no large frames.
pub(crate) const STACK: usize = 256 << 10;

/// Why the loop could not be made or a descriptor not be added.
#[derive(Debug, thiserror::Error)]
pub enum EventLoopError {
    /// The host refuses a thread or a descriptor.
    #[error("cannot start event loop {name}: {source}")]
    Start {
        /// Name of the thread.
        name: String,
        /// What the host said.
        source: io::Error,
    },
    /// epoll refuses the descriptor.
    #[error("cannot wait for descriptor {fd}: {source}")]
    Watch {
        /// Which one.
        fd: i32,
        /// What the host said.
        source: io::Error,
    },
}

/// What to wait for. Errors and hang-ups are always reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interest {
    /// Bytes, a connection or an end can be read.
    pub readable: bool,
    /// Bytes can be written.
    pub writable: bool,
    /// Report changes only, not states.
    pub edge: bool,
}

impl Interest {
    /// Reading alone.
    pub const READ: Self = Self { readable: true, writable: false, edge: false };
    /// Only errors and hang-ups.
    pub const NONE: Self = Self { readable: false, writable: false, edge: false };

    fn flags(self) -> EventSet {
        let mut flags = EventSet::empty();
        flags.set(EventSet::IN | EventSet::READ_HANG_UP, self.readable);
        flags.set(EventSet::OUT, self.writable);
        flags.set(EventSet::EDGE_TRIGGERED, self.edge);
        flags
    }
}

/// A descriptor that became ready.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// The token it was added under.
    pub token: u64,
    /// Something can be read, perhaps the end.
    pub readable: bool,
    /// Something can be written.
    pub writable: bool,
    /// The other side is gone, both ways, or the descriptor is in error.
    pub hung_up: bool,
}

/// Someone who waits on the loop.
pub trait Subscriber: Send + Sync {
    /// `source` is ready. Runs on the loop's thread: must not block.
    fn ready(&self, source: Source);
}

struct Shared {
    epoll: Epoll,
    stop: EventFd,
    subscribers: RwLock<Vec<Arc<dyn Subscriber>>>,
}

/// Adds descriptors for one subscriber. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Registrar {
    shared: Arc<Shared>,
    subscriber: u64,
}

impl Registrar {
    /// Waits for `interest` on `fd`, reported as `token` (below 2^48).
    ///
    /// # Errors
    /// [`EventLoopError::Watch`].
    pub fn add(
        &self,
        fd: &impl AsRawFd,
        token: u64,
        interest: Interest,
    ) -> Result<(), EventLoopError> {
        self.control(ControlOperation::Add, fd, token, interest)
    }

    /// Changes what is waited for.
    ///
    /// # Errors
    /// [`EventLoopError::Watch`].
    pub fn modify(
        &self,
        fd: &impl AsRawFd,
        token: u64,
        interest: Interest,
    ) -> Result<(), EventLoopError> {
        self.control(ControlOperation::Modify, fd, token, interest)
    }

    /// Stops waiting on `fd`, before it is closed. An event of this round may still come.
    pub fn remove(&self, fd: &impl AsRawFd) {
        // It fails only if the descriptor was never added.
        let _ = self.control(ControlOperation::Delete, fd, 0, Interest::NONE);
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: &impl AsRawFd,
        token: u64,
        interest: Interest,
    ) -> Result<(), EventLoopError> {
        let fd = fd.as_raw_fd();
        let data = self.subscriber << TOKEN_BITS | token & ((1 << TOKEN_BITS) - 1);
        let event = EpollEvent::new(interest.flags(), data);
        let done = self.shared.epoll.ctl(operation, fd, event);
        done.map_err(|source| EventLoopError::Watch { fd, source })
    }
}

impl fmt::Debug for Registrar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registrar").field("subscriber", &self.subscriber).finish()
    }
}

/// The loop with its thread, which ends when this is dropped.
pub struct EventLoop {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts the thread, called `name` (at most 15 bytes show).
    ///
    /// # Errors
    /// [`EventLoopError::Start`].
    pub fn start(name: &str) -> Result<Self, EventLoopError> {
        let start = || -> io::Result<Self> {
            let (epoll, stop) = (Epoll::new()?, EventFd::new(EFD_NONBLOCK)?);
            let event = EpollEvent::new(EventSet::IN, STOP);
            epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), event)?;
            let shared = Arc::new(Shared { epoll, stop, subscribers: RwLock::default() });
            let on_thread = shared.clone();
            let thread = std::thread::Builder::new()
                .name(name.into())
                .stack_size(STACK)
                .spawn(move || run(&on_thread))?;
            Ok(Self { shared, thread: Some(thread) })
        };
        start().map_err(|source| EventLoopError::Start { name: name.into(), source })
    }

    /// Makes `subscriber` known. It stays until the loop ends.
    pub fn subscribe(&self, subscriber: Arc<dyn Subscriber>) -> Registrar {
        self.reserve(|_| subscriber)
    }

    /// As [`EventLoop::subscribe`], for a subscriber that keeps its own registrar.
    pub fn reserve(&self, make: impl FnOnce(Registrar) -> Arc<dyn Subscriber>) -> Registrar {
        let mut all = self.shared.subscribers.write().unwrap_or_else(PoisonError::into_inner);
        let registrar = Registrar { shared: self.shared.clone(), subscriber: all.len() as u64 };
        all.push(make(registrar.clone()));
        registrar
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        let _ = self.shared.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Subscribers hold registrars, registrars the loop: the circle is opened here.
        self.shared.subscribers.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoop").finish_non_exhaustive()
    }
}

fn run(shared: &Shared) {
    let mut events = vec![EpollEvent::default(); BATCH];
    loop {
        let count = match shared.epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                tracing::error!("devices stop: epoll_wait: {e}");
                return;
            }
        };
        for event in &events[..count] {
            if event.data() == STOP {
                return;
            }
            let index = (event.data() >> TOKEN_BITS) as usize;
            let all = shared.subscribers.read().unwrap_or_else(PoisonError::into_inner);
            let Some(subscriber) = all.get(index).cloned() else { continue };
            drop(all);
            let set = event.event_set();
            subscriber.ready(Source {
                token: event.data() & ((1 << TOKEN_BITS) - 1),
                readable: set.intersects(EventSet::IN | EventSet::READ_HANG_UP),
                writable: set.contains(EventSet::OUT),
                hung_up: set.intersects(EventSet::HANG_UP | EventSet::ERROR),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    struct Forward(Sender<u64>, EventFd);
    impl Subscriber for Forward {
        fn ready(&self, source: Source) {
            let _ = self.1.read();
            let _ = self.0.send(source.token);
        }
    }

    #[test]
    fn events_reach_their_subscriber_until_the_loop_is_dropped() {
        let events = EventLoop::start("test-loop").unwrap();
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let (sender, receiver) = channel();
        let subscriber = Arc::new(Forward(sender, fd.try_clone().unwrap()));
        let registrar = events.subscribe(subscriber.clone());
        registrar.add(&fd, 77, Interest::READ).unwrap();
        fd.write(1).unwrap();
        assert_eq!(receiver.recv_timeout(Duration::from_secs(5)), Ok(77));
        drop(events);
        assert_eq!(Arc::strong_count(&subscriber), 1, "the loop lets go of it");
    }

    #[test]
    fn a_descriptor_that_cannot_be_watched_is_an_error() {
        let events = EventLoop::start("test-loop").unwrap();
        let (sender, _receiver) = channel();
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let registrar = events.subscribe(Arc::new(Forward(sender, fd)));
        assert!(matches!(registrar.add(&-1, 0, Interest::READ), Err(EventLoopError::Watch { .. })));
    }
}
