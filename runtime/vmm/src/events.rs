//! What a machine tells whoever runs it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use nix::time::ClockId;

use crate::monitor::protocol::{Phase, PhaseMark};
use crate::outcome::EndReason;

/// Something that happened in a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// A phase was reached.
    Phase(PhaseMark),
    /// The machine ended; its vCPUs stop. The last event.
    Ended(EndReason),
}

/// The machine's end of the event channel; any thread.
#[derive(Debug)]
pub(crate) struct Notifier {
    sender: Sender<MachineEvent>,
    wake: Arc<EventFd>,
}

impl Notifier {
    pub fn send(&self, event: MachineEvent) {
        // Nobody listens any more: the machine is being taken down.
        let _ = self.sender.send(event);
        let _ = self.wake.write(1);
    }

    pub fn phase(&self, phase: Phase) {
        self.send(MachineEvent::Phase(PhaseMark::now(phase)));
    }
}

/// The receiving end: events in order, and a descriptor that is readable while there may be some.
#[derive(Debug)]
pub struct Events {
    receiver: Receiver<MachineEvent>,
    wake: Arc<EventFd>,
}

impl Events {
    /// The next event if there is one. Call until `None` after [`Events::as_fd`] was readable.
    pub fn try_next(&self) -> Option<MachineEvent> {
        // Cleared first: what is sent after this makes the descriptor readable again.
        let _ = self.wake.read();
        self.receiver.try_recv().ok()
    }

    /// Waits for the next event; `None` when there can be none any more or `timeout` has passed.
    pub fn wait(&self, timeout: Option<Duration>) -> Option<MachineEvent> {
        match timeout {
            None => self.receiver.recv().ok(),
            Some(timeout) => self.receiver.recv_timeout(timeout).ok(),
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

pub(crate) fn channel() -> std::io::Result<(Notifier, Events)> {
    let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
    let (sender, receiver) = mpsc::channel();
    Ok((Notifier { sender, wake: wake.clone() }, Events { receiver, wake }))
}

impl PhaseMark {
    /// `phase`, reached now.
    pub fn now(phase: Phase) -> Self {
        let read = |clock| {
            let now = nix::time::clock_gettime(clock);
            now.map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
        };
        Self {
            phase,
            at_ns: read(ClockId::CLOCK_MONOTONIC),
            cpu_ns: read(ClockId::CLOCK_PROCESS_CPUTIME_ID),
        }
    }
}
