//! Serves the device's queues, in guest RAM that the monitor has lent.
//!
//! One thread for each queue, and a few for what waits for a disk, so that one flush holds up nothing
//! else. Everything that is stored in guest RAM goes through `vm-memory` and so through the page
//! tracker that the monitor shares, before the used ring is moved.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::Opcode;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use mvm_devices::packets::Packets;
use mvm_devices::virtio::fs::wire::FromServer;
use mvm_devices::virtio::{Chain, QueueError, QueueState, RawChain, VirtQueue};
use mvm_memory::{GuestMemory, GuestRam, Loan};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::shares::Shares;

/// Threads for requests that wait for a disk.
const SLOW_THREADS: usize = 2;

/// How long the monitor may leave a report unread.
const REPORT: Duration = Duration::from_secs(5);

/// `struct fuse_in_header` and `struct fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;

/// Why the monitor's request cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The descriptors do not fit the message.
    #[error("{got} descriptors came with guest RAM, {wanted} should have")]
    Descriptors {
        /// How many came.
        got: usize,
        /// How many should have.
        wanted: usize,
    },
    /// RAM was lent before, or not yet.
    #[error("guest RAM was {0}")]
    Order(&'static str),
    /// It is no RAM.
    #[error(transparent)]
    Ram(#[from] mvm_memory::Error),
    /// A queue cannot be used.
    #[error("queue {index}: {source}")]
    Queue {
        /// Which.
        index: usize,
        /// Why.
        source: QueueError,
    },
    /// The host refuses a thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

struct State {
    queues: Vec<VirtQueue>,
    /// Requests may be taken.
    running: bool,
    /// Requests under way.
    busy: usize,
}

/// What the threads share once RAM is there.
struct Attached {
    memory: Arc<GuestMemory>,
    sizes: Vec<u16>,
    call: File,
    doorbells: Vec<OwnedFd>,
}

/// A request on its way to a slow thread.
struct Slow {
    queue: usize,
    raw: RawChain,
    chain: Chain,
}

/// The queues.
pub(crate) struct Queues {
    server: Server<Arc<Shares>>,
    device: Arc<Packets>,
    attached: Mutex<Option<Arc<Attached>>>,
    state: Mutex<State>,
    idle: Condvar,
    /// Readable when all is over.
    end: EventFd,
}

impl Queues {
    /// Queues of which nothing is known yet; `device` hears of the driver's faults.
    pub fn new(shares: Arc<Shares>, device: Arc<Packets>) -> std::io::Result<Arc<Self>> {
        let end = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Arc::new(Self {
            server: Server::new(shares),
            device,
            attached: Mutex::new(None),
            state: Mutex::new(State { queues: Vec::new(), running: false, busy: 0 }),
            idle: Condvar::new(),
            end,
        }))
    }

    /// Ends the threads; nothing is served any more.
    pub fn close(&self) {
        self.stop();
        let _ = self.end.write(1);
    }

    /// Takes guest RAM and doorbells, and starts the threads.
    pub fn attach(
        self: &Arc<Self>,
        regions: &[(u64, u64)],
        sizes: Vec<u16>,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Error> {
        let mut place = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        if place.is_some() {
            return Err(Error::Order("lent before"));
        }
        let wanted = 1 + sizes.len() + 2 * regions.len();
        if fds.len() != wanted {
            return Err(Error::Descriptors { got: fds.len(), wanted });
        }
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or(Error::Descriptors { got: 0, wanted });
        let call = File::from(next()?);
        let doorbells = sizes.iter().map(|_| next()).collect::<Result<Vec<_>, _>>()?;
        let mut loans = Vec::new();
        for &(start, size) in regions {
            loans.push(Loan { start, size, ram: next()?, tracker: next()? });
        }
        let memory = Arc::new(GuestRam::attach(loans)?.memory().clone());
        let count = sizes.len();
        let attached = Arc::new(Attached { memory, sizes, call, doorbells });
        let (hand_over, slow) = channel();
        let slow = Arc::new(Mutex::new(slow));
        for index in 0..SLOW_THREADS {
            let (queues, attached, slow) = (self.clone(), attached.clone(), slow.clone());
            let work = move || queues.serve_slow(&attached, &slow);
            std::thread::Builder::new().name(format!("mvm-fs-slow{index}")).spawn(work)?;
        }
        for index in 0..count {
            let (queues, attached, slow) = (self.clone(), attached.clone(), hand_over.clone());
            let work = move || queues.watch(&attached, index, &slow);
            std::thread::Builder::new().name(format!("mvm-fs-queue{index}")).spawn(work)?;
        }
        *place = Some(attached);
        Ok(())
    }

    /// Starts on the queues of a driver.
    pub fn activate(&self, states: &[QueueState], features: u64) -> Result<(), Error> {
        let attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let attached = attached.as_ref().ok_or(Error::Order("not lent yet"))?;
        let mut queues = Vec::new();
        if states.len() != attached.sizes.len() {
            return Err(Error::Order("lent for another number of queues"));
        }
        for (index, (state, size)) in states.iter().zip(&attached.sizes).enumerate() {
            let memory = GuestMemory::clone(&attached.memory);
            let queue = VirtQueue::new(state, *size, memory, features);
            queues.push(queue.map_err(|source| Error::Queue { index, source })?);
        }
        let mut state = self.lock();
        (state.queues, state.running) = (queues, true);
        Ok(())
    }

    /// Takes no more requests and waits for those under way. Returns where the queues are.
    pub fn pause(&self) -> Vec<QueueState> {
        let state = self.wait_idle();
        state.queues.iter().map(VirtQueue::state).collect()
    }

    /// Goes on; the device rings the doorbells.
    pub fn resume(&self) {
        let mut state = self.lock();
        state.running = !state.queues.is_empty();
    }

    /// Waits for what is under way and forgets the driver.
    pub fn stop(&self) {
        self.wait_idle().queues.clear();
    }

    fn wait_idle(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.running = false;
        while state.busy > 0 {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue's thread: waits for its doorbell.
    fn watch(&self, attached: &Attached, index: usize, slow: &Sender<Slow>) {
        let Some(doorbell) = attached.doorbells.get(index) else { return };
        let mut counter = match doorbell.try_clone() {
            Ok(fd) => File::from(fd),
            Err(error) => {
                tracing::error!("queue {index} is not served: {error}");
                return;
            }
        };
        loop {
            let mut wait =
                [doorbell.as_fd(), self.end.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut wait, PollTimeout::NONE) {
                Ok(_) if wait[1].any() == Some(true) => return,
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => {
                    tracing::error!("queue {index} is not served any more: poll: {error}");
                    return;
                }
            }
            // Non-blocking: whoever else has read it has not served for us.
            let _ = counter.read_exact(&mut [0; 8]);
            if let Err(fault) = self.serve(attached, index, slow) {
                self.lock().running = false;
                let report = FromServer::Failed { message: fault.to_string() };
                let _ = self.device.send(&report, &[], REPORT);
            }
        }
    }

    /// Serves queue `index` until it is empty.
    fn serve(
        &self,
        attached: &Attached,
        index: usize,
        slow: &Sender<Slow>,
    ) -> Result<(), QueueError> {
        let mut chain = Chain::default();
        loop {
            let mut state = self.lock();
            if !state.running {
                return Ok(());
            }
            let Some(queue) = state.queues.get_mut(index) else { return Ok(()) };
            queue.disable_notifications()?;
            let Some(raw) = queue.pop_raw(&attached.memory, &mut chain)? else {
                if queue.enable_notifications()? {
                    continue;
                }
                return Ok(());
            };
            state.busy += 1;
            drop(state);
            let header = Header::read(&chain, &attached.memory);
            if header.as_ref().is_some_and(Header::is_slow) {
                let request = Slow { queue: index, raw, chain: std::mem::take(&mut chain) };
                // It cannot fail: those threads end with the process.
                let _ = slow.send(request);
                continue;
            }
            let len = self.handle(attached, raw, &chain, header.as_ref());
            self.finish(attached, index, &chain, len)?;
        }
    }

    fn serve_slow(&self, attached: &Attached, requests: &Mutex<Receiver<Slow>>) {
        loop {
            let next = requests.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(Slow { queue, raw, chain }) = next else { return };
            let header = Header::read(&chain, &attached.memory);
            let len = self.handle(attached, raw, &chain, header.as_ref());
            if let Err(fault) = self.finish(attached, queue, &chain, len) {
                self.lock().running = false;
                let report = FromServer::Failed { message: fault.to_string() };
                let _ = self.device.send(&report, &[], REPORT);
            }
        }
    }

    /// Returns a request to the driver.
    fn finish(
        &self,
        attached: &Attached,
        index: usize,
        chain: &Chain,
        len: u32,
    ) -> Result<(), QueueError> {
        let mut state = self.lock();
        state.busy -= 1;
        if state.busy == 0 {
            self.idle.notify_all();
        }
        let Some(queue) = state.queues.get_mut(index) else { return Ok(()) };
        queue.push_used(chain.head(), len)?;
        if queue.needs_interrupt()? {
            let _ = (&attached.call).write_all(&1u64.to_ne_bytes());
        }
        Ok(())
    }

    /// Carries out one request, and returns the bytes stored in its chain.
    fn handle(
        &self,
        attached: &Attached,
        raw: RawChain,
        chain: &Chain,
        header: Option<&Header>,
    ) -> u32 {
        let memory = &*attached.memory;
        let reader = Reader::from_descriptor_chain(memory, raw.clone());
        let writer = VirtioFsWriter::new(memory, raw).map(Writer::VirtioFs);
        let done = match (reader, writer) {
            (Ok(reader), Ok(writer)) => self.server.handle_message(reader, writer, None, None).ok(),
            _ => None,
        };
        match (done, header) {
            (Some(len), Some(header)) if len > 0 || !header.wants_answer(chain) => {
                u32::try_from(len).unwrap_or(u32::MAX)
            }
            // Nobody is left waiting for an answer, whatever the request was.
            (done, Some(header)) if header.wants_answer(chain) => {
                let error = if done.is_some() { 0 } else { -libc::EIO };
                match chain.write(memory, 0, &header.answer(error)) {
                    Ok(()) => OUT_HEADER as u32,
                    Err(_) => 0,
                }
            }
            _ => 0,
        }
    }
}

/// What has to be known of a request before the library reads it.
struct Header {
    opcode: u32,
    unique: u64,
}

impl Header {
    fn read(chain: &Chain, memory: &GuestMemory) -> Option<Self> {
        let mut raw = [0; IN_HEADER];
        chain.read(memory, 0, &mut raw).ok()?;
        let [_, _, _, _, o0, o1, o2, o3, unique @ ..] = raw;
        let unique: [u8; 8] = unique[..8].try_into().ok()?;
        Some(Self {
            opcode: u32::from_le_bytes([o0, o1, o2, o3]),
            unique: u64::from_le_bytes(unique),
        })
    }

    /// Waits for a disk.
    fn is_slow(&self) -> bool {
        [Opcode::Fsync, Opcode::Fsyncdir, Opcode::Fallocate]
            .map(|o| o as u32)
            .contains(&self.opcode)
    }

    fn wants_answer(&self, chain: &Chain) -> bool {
        let silent = [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt].map(|o| o as u32);
        !silent.contains(&self.opcode) && chain.writable_len() >= OUT_HEADER as u64
    }

    /// `struct fuse_out_header` alone.
    fn answer(&self, error: i32) -> [u8; OUT_HEADER] {
        let mut out = [0; OUT_HEADER];
        out[..4].copy_from_slice(&(OUT_HEADER as u32).to_le_bytes());
        out[4..8].copy_from_slice(&error.to_le_bytes());
        out[8..].copy_from_slice(&self.unique.to_le_bytes());
        out
    }
}
