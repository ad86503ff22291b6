//! Console (5.3), one port: the guest's hvc0 on descriptors of the host.
//!
//! Output that the host does not take stays in the guest's buffers; nothing is piled up here. When
//! the reader is gone, output is dropped: a guest must not stop because nobody looks at its console.

#[cfg(test)]
mod tests;

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::Serialize;

use super::iov::{self, Io};
use super::{
    ActivateError, Activation, Chain, Core, DeviceType, QueueError, QueueState, VirtQueue,
    VirtioDevice, common_device_methods,
};
use crate::event_loop::{EventLoop, EventLoopError, Interest, Registrar, Source, Subscriber};
use crate::serial::tail::Tail;

const QUEUE_SIZE: u16 = 64;
const RX: usize = 0;
const TX: usize = 1;
const TOKEN_INPUT: u64 = 2;
const TOKEN_OUTPUT: u64 = 3;
/// Most bytes moved for one buffer at a time.
const MAX_BYTES: u64 = 64 << 10;

/// How the console is set up.
#[derive(Debug)]
pub struct ConsoleConfig {
    /// Name for logs.
    pub name: String,
    /// Where the guest's output goes. The open file is made non-blocking, so it should be the
    /// device's own (a pipe, a pseudo-terminal, a file), not a terminal shared with others.
    pub output: Option<OwnedFd>,
    /// Where the guest's input comes from; made non-blocking too.
    pub input: Option<OwnedFd>,
    /// Bytes of output kept for [`Console::tail`].
    pub tail: usize,
}

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// A descriptor could not be made or made non-blocking.
    #[error("cannot make console {name}: {source}")]
    Start {
        /// The device.
        name: String,
        /// What the host said.
        source: io::Error,
    },
    /// The event loop refused a descriptor.
    #[error(transparent)]
    Watch(#[from] EventLoopError),
}

/// Counters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConsoleStats {
    /// Bytes the guest printed.
    pub output: u64,
    /// Of these, bytes that nobody took.
    pub dropped: u64,
    /// Bytes given to the guest.
    pub input: u64,
}

/// One descriptor and what is known of it.
#[derive(Debug)]
struct End {
    fd: Option<OwnedFd>,
    ready: bool,
}

impl End {
    /// Registers `fd`. Files cannot be waited for, and need not be.
    fn new(
        fd: Option<OwnedFd>,
        registrar: &Registrar,
        token: u64,
        interest: Interest,
    ) -> Result<Self, EventLoopError> {
        if let Some(fd) = &fd {
            match registrar.add(fd, token, Interest { edge: true, ..interest }) {
                Err(EventLoopError::Watch { source, .. })
                    if source.raw_os_error() == Some(libc::EPERM) => {}
                done => done?,
            }
        }
        Ok(Self { fd, ready: true })
    }

    fn close(&mut self, registrar: &Registrar) {
        if let Some(fd) = self.fd.take() {
            registrar.remove(&fd);
        }
    }
}

#[derive(Debug)]
struct Ends {
    input: End,
    output: End,
    tail: Tail,
}

#[derive(Debug)]
struct Work {
    rx: VirtQueue,
    tx: VirtQueue,
    chain: Chain,
    /// Bytes of the next output chain that were written already.
    written: u64,
}

/// The device.
#[derive(Debug)]
pub struct Console {
    core: Core<Work>,
    registrar: Registrar,
    ends: Mutex<Option<Ends>>,
    output: AtomicU64,
    dropped: AtomicU64,
    input: AtomicU64,
}

impl Console {
    /// A console that works on `events`.
    ///
    /// # Errors
    /// [`ConsoleError`].
    pub fn new(config: ConsoleConfig, events: &EventLoop) -> Result<Arc<Self>, ConsoleError> {
        let start = |source| ConsoleError::Start { name: config.name.clone(), source };
        let core = Core::new(&config.name, &[QUEUE_SIZE; 2]).map_err(start)?;
        for fd in [&config.output, &config.input].into_iter().flatten() {
            set_nonblocking(fd).map_err(start)?;
        }
        let mut device = None;
        events.reserve(|registrar| {
            let new = Arc::new(Self {
                core,
                registrar,
                ends: Mutex::new(None),
                output: AtomicU64::new(0),
                dropped: AtomicU64::new(0),
                input: AtomicU64::new(0),
            });
            device = Some(new.clone());
            new
        });
        let absent = || ConsoleError::Start {
            name: config.name.clone(),
            source: ErrorKind::NotConnected.into(),
        };
        let device = device.ok_or_else(absent)?;
        let registrar = &device.registrar;
        for (token, slot) in device.core.slots().iter().enumerate() {
            registrar.add(&slot.doorbell, token as u64, Interest::READ)?;
        }
        // Events that come before the ends are in place change nothing: ends start as ready.
        let write = Interest { writable: true, ..Interest::NONE };
        let ends = Ends {
            input: End::new(config.input, registrar, TOKEN_INPUT, Interest::READ)?,
            output: End::new(config.output, registrar, TOKEN_OUTPUT, write)?,
            tail: Tail::new(config.tail),
        };
        *device.ends.lock().unwrap_or_else(PoisonError::into_inner) = Some(ends);
        Ok(device)
    }

    /// The end of what the guest has printed.
    pub fn tail(&self) -> Vec<u8> {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        ends.as_ref().map(|ends| ends.tail.bytes()).unwrap_or_default()
    }

    /// Counters.
    pub fn stats(&self) -> ConsoleStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (output, dropped, input) = (get(&self.output), get(&self.dropped), get(&self.input));
        ConsoleStats { output, dropped, input }
    }

    /// Moves bytes both ways as far as both sides allow.
    fn pump(&self) {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(ends) = ends.as_mut() else { return };
        let done = self.core.serve(|work, link| {
            let (printed, tx_again) = self.print(work, ends)?;
            let (typed, rx_again) = self.type_in(work, ends)?;
            if (printed && work.tx.needs_interrupt()?) | (typed && work.rx.needs_interrupt()?) {
                link.used();
            }
            Ok((tx_again, rx_again))
        });
        let Some((tx_again, rx_again)) = done else { return };
        if tx_again {
            self.core.slots()[TX].ring();
        }
        if rx_again {
            self.core.slots()[RX].ring();
        }
    }

    /// Guest to host. Returns whether buffers were used, and whether to go on later.
    fn print(&self, work: &mut Work, ends: &mut Ends) -> Result<(bool, bool), QueueError> {
        let Work { tx, chain, written, .. } = work;
        let mut used = false;
        tx.disable_notifications()?;
        for _ in 0..tx.size() {
            if ends.output.fd.is_some() && !ends.output.ready {
                return Ok((used, false));
            }
            if !tx.pop(chain)? {
                if tx.enable_notifications()? {
                    continue;
                }
                return Ok((used, false));
            }
            *written += self.write_some(chain, tx, *written, ends)?;
            if *written < chain.readable_len() {
                tx.undo_pop();
                continue;
            }
            *written = 0;
            tx.push_used(chain.head(), 0)?;
            used = true;
        }
        Ok((used, true))
    }

    /// Writes what follows `at` in the chain, once. Returns the bytes gone.
    fn write_some(
        &self,
        chain: &Chain,
        tx: &VirtQueue,
        at: u64,
        ends: &mut Ends,
    ) -> Result<u64, QueueError> {
        let len = (chain.readable_len() - at).min(MAX_BYTES);
        if len == 0 {
            return Ok(0);
        }
        let Ends { output, tail, .. } = ends;
        let mut slices = Vec::new();
        chain.readable_slices(tx.memory(), at, len, &mut slices)?;
        let gone = match &output.fd {
            None => {
                self.dropped.fetch_add(len, Ordering::Relaxed);
                len
            }
            Some(fd) => match iov::write(fd.as_fd(), &slices, Io::Stream) {
                Ok(n) => n as u64,
                Err(e) if e.kind() == ErrorKind::Interrupted => 0,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    output.ready = false;
                    0
                }
                Err(e) => {
                    tracing::info!(device = self.name(), "output goes nowhere from now on: {e}");
                    output.close(&self.registrar);
                    0
                }
            },
        };
        let mut copy = vec![0; gone as usize];
        chain.read(tx.memory(), at, &mut copy)?;
        tail.push(&copy);
        self.output.fetch_add(gone, Ordering::Relaxed);
        Ok(gone)
    }

    /// Host to guest. Returns whether buffers were used, and whether to go on later.
    fn type_in(&self, work: &mut Work, ends: &mut Ends) -> Result<(bool, bool), QueueError> {
        let Work { rx, chain, .. } = work;
        let input = &mut ends.input;
        let mut used = false;
        for _ in 0..rx.size() {
            let Some(fd) = input.fd.as_ref().filter(|_| input.ready) else {
                return Ok((used, false));
            };
            if !rx.pop(chain)? {
                if rx.enable_notifications()? {
                    continue;
                }
                return Ok((used, false));
            }
            if chain.writable_len() == 0 {
                return Err(QueueError::Request("console input buffer without room"));
            }
            let mut slices = Vec::new();
            chain.writable_slices(rx.memory(), 0, MAX_BYTES, &mut slices)?;
            match iov::read(fd.as_fd(), &slices, Io::Stream) {
                // The end of input. A pseudo-terminal says it with an error.
                Ok(0) => input.close(&self.registrar),
                Ok(n) => {
                    self.input.fetch_add(n as u64, Ordering::Relaxed);
                    rx.push_used(chain.head(), n as u32)?;
                    used = true;
                    continue;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => input.ready = false,
                Err(_) => input.close(&self.registrar),
            }
            rx.undo_pop();
        }
        Ok((used, true))
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

impl Subscriber for Console {
    fn ready(&self, source: Source) {
        match source.token {
            TOKEN_INPUT | TOKEN_OUTPUT => {
                let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(ends) = ends.as_mut() else { return };
                ends.input.ready |= source.token == TOKEN_INPUT;
                ends.output.ready |= source.token == TOKEN_OUTPUT;
            }
            token => {
                if let Some(slot) = self.core.slots().get(token as usize) {
                    slot.clear();
                }
            }
        }
        self.pump();
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&self, mut activation: Activation) -> Result<(), ActivateError> {
        let (rx, tx) = (activation.take(RX)?, activation.take(TX)?);
        self.core.start(Work { rx, tx, chain: Chain::default(), written: 0 });
        Ok(())
    }

    fn reset(&self) {
        self.core.stop();
    }

    fn queue_states(&self) -> Vec<Option<QueueState>> {
        let states = self.core.inspect(|work| [work.rx.state(), work.tx.state()]);
        (0..2).map(|i| states.map(|s| s[i])).collect()
    }

    common_device_methods!();
}
