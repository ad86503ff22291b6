//! File system device (5.11), whose queues are served by another process.
//!
//! The server takes the identity of whoever asks in the guest, so it needs privileges, and must not
//! live beside code that faces the guest in other ways: it is a process of its own (`mvm-fs`). It
//! maps guest RAM *and its page tracker*, so what it stores ends stale code and reaches the dirty log
//! as any device's writes do, before it moves the used ring. Doorbells go to it directly; interrupts
//! come back through the monitor, where the transport's registers are.
//!
//! A server that dies or does not answer ends the machine: files are not coming back.

#[cfg(test)]
mod tests;
pub mod wire;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use mvm_memory::GuestRam;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{
    ActivateError, Activation, Core, DeviceType, DriverLink, QueueSlot, QueueState, VirtioDevice,
};
use crate::event_loop::{EventLoop, EventLoopError, Interest, Registrar, Source, Subscriber};
use crate::packets::{PacketError, Packets};
use wire::{FromServer, ToServer};

/// Longest tag in bytes (5.11.4).
pub const MAX_TAG: usize = 36;

/// Sizes of the high-priority queue and of the request queue. The driver makes its largest request
/// fit into the latter.
const QUEUES: [u16; 2] = [64, 1024];

/// How long the server may take for an answer. What is under way has to be finished first, on
/// whatever disk that is.
const ANSWER: Duration = Duration::from_secs(30);

const CALL: u64 = 0;
const CHANNEL: u64 = 1;

/// Told when the server is gone, with the reason.
pub type Gone = Arc<dyn Fn(&str) + Send + Sync>;

/// How the device is set up.
pub struct FsConfig {
    /// Name for logs.
    pub name: String,
    /// What the guest mounts it by, at most [`MAX_TAG`] bytes.
    pub tag: String,
    /// The channel to the server.
    pub channel: Packets,
    /// Told once, when the server is gone.
    pub on_gone: Gone,
}

impl fmt::Debug for FsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FsConfig").field("tag", &self.tag).finish_non_exhaustive()
    }
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The host has no more descriptors.
    #[error("cannot make the file system device: {0}")]
    Start(io::Error),
    /// The tag does not fit.
    #[error("the tag {tag:?} of a file system has 1 to {MAX_TAG} bytes")]
    Tag {
        /// The tag.
        tag: String,
    },
    /// The event loop refused a descriptor.
    #[error(transparent)]
    Watch(#[from] EventLoopError),
}

struct Server {
    channel: Packets,
    attached: bool,
    gone: bool,
    /// What it said last.
    queues: Vec<QueueState>,
}

/// The device.
pub struct Fs {
    core: Core<()>,
    tag: [u8; MAX_TAG],
    call: EventFd,
    server: Mutex<Server>,
    registrar: Registrar,
    on_gone: Gone,
}

impl Fs {
    /// A device that hears of its server on `events`.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn new(config: FsConfig, events: &EventLoop) -> Result<Arc<Self>, FsError> {
        let bytes = config.tag.as_bytes();
        if bytes.is_empty() || bytes.len() > MAX_TAG {
            return Err(FsError::Tag { tag: config.tag });
        }
        let mut tag = [0; MAX_TAG];
        tag[..bytes.len()].copy_from_slice(bytes);
        let core = Core::new(&config.name, &QUEUES).map_err(FsError::Start)?;
        let call = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|e| FsError::Start(e.into()))?;
        let mut made = None;
        let registrar = events.reserve(|registrar| {
            let server = Server {
                channel: config.channel,
                attached: false,
                gone: false,
                queues: Vec::new(),
            };
            let device = Arc::new(Self {
                core,
                tag,
                call,
                server: Mutex::new(server),
                registrar,
                on_gone: config.on_gone,
            });
            made = Some(device.clone());
            device
        });
        let device = made.ok_or_else(|| FsError::Start(io::ErrorKind::Other.into()))?;
        registrar.add(&device.call, CALL, Interest::READ)?;
        registrar.add(&device.lock().channel, CHANNEL, Interest::READ)?;
        Ok(device)
    }

    /// Lends guest RAM and doorbells to the server.
    fn attach(&self, server: &mut Server, ram: &GuestRam) -> Result<(), String> {
        let loans = ram.lend();
        if loans.len() != ram.regions().len() {
            return Err("guest RAM cannot be shared with another process".into());
        }
        let mut fds = vec![self.call.as_fd()];
        fds.extend(self.core.slots().iter().map(|slot| slot.doorbell_fd()));
        for loan in &loans {
            fds.extend([loan.ram, loan.tracker]);
        }
        let regions = loans.iter().map(|loan| (loan.start, loan.size)).collect();
        let ask = ToServer::Attach { regions, queues: QUEUES.to_vec() };
        self.ask_with(server, &ask, &fds)?;
        server.attached = true;
        Ok(())
    }

    fn ask(&self, server: &mut Server, ask: &ToServer) -> Result<(), String> {
        self.ask_with(server, ask, &[])
    }

    fn ask_with(
        &self,
        server: &mut Server,
        ask: &ToServer,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), String> {
        if server.gone {
            return Err("the file server is gone".into());
        }
        // The answer is ours to read; the event loop has other devices to serve meanwhile.
        let _ = self.registrar.modify(&server.channel, CHANNEL, Interest::NONE);
        let answer = self.wait_for_answer(server, ask, fds);
        if !server.gone {
            let _ = self.registrar.modify(&server.channel, CHANNEL, Interest::READ);
        }
        answer
    }

    fn wait_for_answer(
        &self,
        server: &mut Server,
        ask: &ToServer,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), String> {
        let deadline = Instant::now() + ANSWER;
        let mut answer = server.channel.send(ask, fds, ANSWER).map(|()| None);
        loop {
            match answer {
                Ok(Some(FromServer::Done { queues })) => {
                    server.queues = queues;
                    return Ok(());
                }
                Ok(Some(FromServer::Refused { message })) => return Err(message),
                Ok(Some(FromServer::Failed { message })) => self.fail(&message),
                Ok(None) => {}
                Err(error) => return Err(self.give_up(server, &error)),
            }
            answer = server.channel.receive(Some(deadline)).map(|(answer, _)| Some(answer));
        }
    }

    /// The driver has broken a rule.
    fn fail(&self, message: &str) {
        if let Some(link) = self.core.link() {
            link.fail(&message);
        }
    }

    /// The server is lost, and what it served with it.
    fn give_up(&self, server: &mut Server, error: &PacketError) -> String {
        let message = format!("lost the file server of the machine: {error}");
        if !server.gone {
            server.gone = true;
            self.registrar.remove(&server.channel);
            (self.on_gone)(&message);
        }
        message
    }

    /// What the server says without being asked. While it is being asked, that is for the asker.
    fn listen(&self) {
        let mut server = match self.server.try_lock() {
            Ok(server) => server,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        if server.gone {
            return;
        }
        match server.channel.try_receive::<FromServer>() {
            Ok(Some((FromServer::Failed { message }, _))) => self.fail(&message),
            Ok(Some(_)) | Ok(None) => {}
            Err(error) => {
                self.give_up(&mut server, &error);
            }
        }
    }

    /// Passes an interrupt on, if the driver is still the one it is for.
    fn interrupt(&self) {
        self.core.serve(|(), link| {
            link.used();
            Ok(())
        });
    }

    fn lock(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_active(&self) -> bool {
        self.core.inspect(|()| ()).is_some()
    }
}

impl Subscriber for Fs {
    fn ready(&self, source: Source) {
        if source.token == CALL {
            let _ = self.call.read();
            self.interrupt();
        } else {
            self.listen();
        }
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::FileSystem
    }

    fn name(&self) -> &str {
        self.core.name()
    }

    fn queues(&self) -> &[QueueSlot] {
        self.core.slots()
    }

    fn connect(&self, link: Arc<DriverLink>) {
        self.core.connect(link);
    }

    fn features(&self) -> u64 {
        0
    }

    /// `struct virtio_fs_config` (5.11.4): tag and number of request queues.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; MAX_TAG + 4];
        config[..MAX_TAG].copy_from_slice(&self.tag);
        config[MAX_TAG..].copy_from_slice(&(QUEUES.len() as u32 - 1).to_le_bytes());
        super::read_config_bytes(&config, offset, data);
    }

    fn activate(&self, mut activation: Activation) -> Result<(), ActivateError> {
        let mut queues = Vec::new();
        for index in 0..QUEUES.len() {
            queues.push(activation.take(index)?.state());
        }
        let mut server = self.lock();
        if !server.attached {
            self.attach(&mut server, &activation.ram).map_err(ActivateError::Backend)?;
        }
        let ask = ToServer::Activate { queues, features: activation.features };
        // The server may have used buffers before its answer is here: those interrupts are not to
        // be lost.
        self.core.start(());
        if let Err(message) = self.ask(&mut server, &ask) {
            self.core.stop();
            return Err(ActivateError::Backend(message));
        }
        // A doorbell that was rung before then was nobody's.
        self.core.slots().iter().for_each(QueueSlot::ring);
        Ok(())
    }

    fn reset(&self) {
        if self.core.stop().is_none() {
            return;
        }
        // A server that does not answer is given up, and the machine with it: nothing runs on.
        let _ = self.ask(&mut self.lock(), &ToServer::Stop);
        // What it wrote last was for a driver that is not there any more.
        let _ = self.call.read();
    }

    fn pause(&self) {
        if self.is_active() {
            let _ = self.ask(&mut self.lock(), &ToServer::Pause);
        }
        self.core.set_paused(true);
    }

    fn resume(&self) {
        if self.is_active() {
            let _ = self.ask(&mut self.lock(), &ToServer::Resume);
        }
        self.core.set_paused(false);
        // The last interrupt before the pause may have come to a device that stood still.
        self.interrupt();
    }

    fn queue_states(&self) -> Vec<Option<QueueState>> {
        if !self.is_active() {
            return vec![None; QUEUES.len()];
        }
        let server = self.lock();
        (0..QUEUES.len()).map(|index| server.queues.get(index).copied()).collect()
    }
}

impl fmt::Debug for Fs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fs").field("core", &self.core).finish_non_exhaustive()
    }
}
