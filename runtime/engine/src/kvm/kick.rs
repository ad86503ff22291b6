//! Ending a run from outside.
//!
//! Who wants something of a vCPU notes it, sets `immediate_exit` in the vCPU's run page, and sends
//! its thread a signal. The signal interrupts a KVM_RUN that is under way; the flag ends one that is
//! about to start, so nothing falls between looking and running (Linux, Documentation/virt/kvm/api.rst,
//! 5, "immediate_exit").

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::halt::Rendezvous;
use super::sys::{self, RunPage, ThreadId};
use crate::Kick;

/// Somebody wants the run to end.
pub(super) const KICK: u32 = 1;
/// Another vCPU asks whether this one is stopped for good.
pub(super) const LOOK: u32 = 2;
/// INTR was asserted.
pub(super) const INTR: u32 = 4;

/// How other threads reach a vCPU.
#[derive(Debug)]
pub(super) struct Reach {
    page: RunPage,
    wanted: AtomicU32,
    /// The thread that runs the vCPU, while it does.
    thread: Mutex<Option<ThreadId>>,
}

impl Reach {
    pub fn new(page: RunPage) -> Self {
        Self { page, wanted: AtomicU32::new(0), thread: Mutex::new(None) }
    }

    /// The page that this vCPU shares with KVM.
    pub fn page(&self) -> &RunPage {
        &self.page
    }

    /// Asks for something; the vCPU comes to [`Reach::take`] soon, or when it is run next.
    pub fn ask(&self, what: u32) {
        self.ask_self(what);
        if let Some(thread) = *self.lock() {
            sys::send_kick(thread);
        }
    }

    /// Asks for something on the vCPU's own thread: KVM_RUN returns at once.
    pub fn ask_self(&self, what: u32) {
        self.wanted.fetch_or(what, Ordering::SeqCst);
        self.page.set_immediate_exit(true);
    }

    /// INTR was asserted. The vCPU's own thread looks at it before it runs on; others interrupt it.
    pub fn interrupt(&self) {
        let own = *self.lock() == Some(sys::this_thread());
        if !own {
            self.ask(INTR);
        }
    }

    /// What is wanted, once.
    pub fn take(&self) -> u32 {
        // In this order: what is asked for after the flag was taken back sets it again.
        self.page.set_immediate_exit(false);
        self.wanted.swap(0, Ordering::SeqCst)
    }

    /// Runs `f` with `immediate_exit` off, whatever is wanted; that stays wanted.
    pub fn held_back<T>(&self, f: impl FnOnce() -> T) -> T {
        self.page.set_immediate_exit(false);
        let result = f();
        if self.wanted.load(Ordering::SeqCst) != 0 {
            self.page.set_immediate_exit(true);
        }
        result
    }

    /// Whether something is wanted.
    pub fn asked(&self, what: u32) -> bool {
        self.wanted.load(Ordering::SeqCst) & what != 0
    }

    /// From now on this thread is the one to interrupt.
    pub fn enter(&self) {
        *self.lock() = Some(sys::this_thread());
    }

    /// And now no more: who holds a signal for it has sent it.
    pub fn leave(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<ThreadId>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a run.
#[derive(Debug)]
pub(super) struct KvmKick {
    pub reach: Arc<Reach>,
    pub rendezvous: Arc<Rendezvous>,
}

impl Kick for KvmKick {
    fn kick(&self) {
        self.reach.ask(KICK);
        self.rendezvous.wake();
    }
}
