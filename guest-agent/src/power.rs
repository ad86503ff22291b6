//! The machine that the agent runs on, and its end.
//!
//! A guest ends by one write: byte 0xFE to port 0x64, the reset line of the keyboard controller.
//! The kernel's own restart, which comes to the same port by default, is the second try.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::reboot::{RebootMode, reboot};

use crate::container::Container;
use crate::error::{Context, Result};
use crate::log::{error, info};
use crate::sys;

/// How long the answer to the shutdown call gets to leave.
const FAREWELL: Duration = Duration::from_millis(20);

/// What the agent runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// A guest of which it is PID 1.
    Guest,
    /// A host where it is tried out: nothing outside of its containers may be touched.
    Host,
}

impl Machine {
    /// Sets the wall clock.
    pub fn set_clock(self, unix_ns: u64) -> Result<()> {
        match self {
            Self::Guest => sys::set_clock(unix_ns).context(|| "set the clock".into()),
            Self::Host => Ok(()),
        }
    }

    /// Asks all processes to end, then makes them.
    pub fn end_processes(self, containers: &[Arc<Container>], grace: Duration) {
        if !grace.is_zero() {
            for container in containers {
                // One that has ended already is what is wanted.
                let _ = container.signal_all(libc::SIGTERM);
            }
            let deadline = Instant::now() + grace;
            for container in containers {
                if let Ok(process) = container.process("") {
                    process.exit.wait(deadline.saturating_duration_since(Instant::now()));
                }
            }
        }
        for container in containers {
            container.kill();
        }
    }

    /// Writes everything out and ends the machine shortly after this returns.
    pub fn stop(self) {
        nix::unistd::sync();
        let ended = std::thread::Builder::new().name("stop".into()).spawn(move || {
            std::thread::sleep(FAREWELL);
            self.stop_now()
        });
        if ended.is_err() {
            self.stop_now();
        }
    }

    /// Ends the machine.
    pub fn stop_now(self) -> ! {
        if self == Self::Host {
            std::process::exit(0);
        }
        info!("the machine stops");
        if let Err(e) = sys::reset_machine() {
            error!("cannot reset the machine by its port: {e}");
        }
        // A machine that took the byte does not come here.
        let Err(e) = reboot(RebootMode::RB_AUTOBOOT);
        error!("cannot restart: {e}");
        loop {
            std::thread::park();
        }
    }
}
