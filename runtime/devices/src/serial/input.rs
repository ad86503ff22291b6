//! A descriptor of the host whose bytes are typed at a serial port, as fast as the guest takes them.

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Serial;
use crate::event_loop::{EventLoop, EventLoopError, Interest, Registrar, Source, Subscriber};

const TOKEN_INPUT: u64 = 0;
const TOKEN_ROOM: u64 = 1;
/// Most bytes taken from the descriptor at a time.
const CHUNK: usize = 4 << 10;

/// Why nothing can be typed.
#[derive(Debug, thiserror::Error)]
pub enum SerialInputError {
    /// A descriptor could not be made or made non-blocking.
    #[error("cannot read the serial console's input: {0}")]
    Start(#[source] io::Error),
    /// The event loop refused a descriptor.
    #[error(transparent)]
    Watch(#[from] EventLoopError),
}

/// Reads on an event loop's thread. What the guest has no room for stays in the descriptor.
pub(super) struct Input {
    serial: Weak<Serial>,
    registrar: Registrar,
    /// Gone after its end.
    fd: Mutex<Option<OwnedFd>>,
    /// Rung when the guest has made room.
    room: EventFd,
}

impl Input {
    /// Types what comes from `fd` at `serial`.
    ///
    /// # Errors
    /// [`SerialInputError`].
    pub fn start(
        serial: &Arc<Serial>,
        fd: OwnedFd,
        events: &EventLoop,
    ) -> Result<Arc<Self>, SerialInputError> {
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(|e| SerialInputError::Start(e.into()))?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&fd, FcntlArg::F_SETFL(flags)).map_err(|e| SerialInputError::Start(e.into()))?;
        let room = EventFd::new(EFD_NONBLOCK).map_err(SerialInputError::Start)?;
        let mut input = None;
        events.reserve(|registrar| {
            let (serial, fd) = (Arc::downgrade(serial), Mutex::new(None));
            let new = Arc::new(Self { serial, registrar, fd, room });
            input = Some(new.clone());
            new
        });
        let absent = || SerialInputError::Start(ErrorKind::NotConnected.into());
        let input = input.ok_or_else(absent)?;
        // Files cannot be waited for, and need not be.
        match input.registrar.add(&fd, TOKEN_INPUT, Interest { edge: true, ..Interest::READ }) {
            Err(EventLoopError::Watch { source, .. })
                if source.raw_os_error() == Some(libc::EPERM) => {}
            done => done?,
        }
        *input.fd.lock().unwrap_or_else(PoisonError::into_inner) = Some(fd);
        input.registrar.add(&input.room, TOKEN_ROOM, Interest::READ)?;
        Ok(input)
    }

    /// The guest takes bytes again.
    pub fn there_is_room(&self) {
        // A full counter has woken the loop already.
        let _ = self.room.write(1);
    }

    /// Whether the descriptor has come to its end.
    #[cfg(test)]
    pub fn is_over(&self) -> bool {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn pump(&self) {
        let Some(serial) = self.serial.upgrade() else { return };
        let mut slot = self.fd.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = [0; CHUNK];
        while let Some(fd) = slot.as_ref() {
            let room = serial.room().min(CHUNK);
            if room == 0 {
                return;
            }
            match nix::unistd::read(fd, &mut bytes[..room]) {
                Ok(n) if n > 0 => drop(serial.input(&bytes[..n])),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return,
                // The end. A pseudo-terminal says it with an error.
                Ok(_) | Err(_) => {
                    self.registrar.remove(fd);
                    *slot = None;
                }
            }
        }
    }
}

impl Subscriber for Input {
    fn ready(&self, source: Source) {
        if source.token == TOKEN_ROOM {
            let _ = self.room.read();
        }
        self.pump();
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Input").finish_non_exhaustive()
    }
}
