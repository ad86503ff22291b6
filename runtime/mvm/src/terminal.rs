//! The user's terminal: raw while a process in the guest has it, and itself again on every way out.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, bail};
use nix::sys::termios::{
    InputFlags, LocalFlags, OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr,
};

/// The settings to restore, where the panic hook finds them.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Holds the terminal in raw mode.
#[derive(Debug)]
pub struct Raw(());

impl Raw {
    /// Makes the terminal on standard input raw.
    pub fn enter() -> anyhow::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin).context("cannot read the terminal's settings")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        debug_assert!(!raw.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ISIG));
        debug_assert!(!raw.input_flags.contains(InputFlags::ICRNL));
        debug_assert!(!raw.output_flags.contains(OutputFlags::OPOST));
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        restore_on_panic();
        tcsetattr(&stdin, SetArg::TCSANOW, &raw).context("cannot make the terminal raw")?;
        Ok(Self(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether the terminal is raw at the moment, so that a line has to end in a carriage return too.
pub fn is_raw() -> bool {
    BEFORE.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

fn restore() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before {
        // A terminal that was hung up cannot be restored and need not be.
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &before);
    }
}

/// A panic message on a raw terminal would be a staircase, and the shell after it unusable.
fn restore_on_panic() {
    let next = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        next(info);
    }));
}

/// Docker's check and message.
pub fn require() -> anyhow::Result<()> {
    if !io::stdin().is_terminal() {
        bail!("the input device is not a TTY; leave -t out, or run mvm from a terminal");
    }
    Ok(())
}

/// Columns and rows of the terminal.
pub fn size() -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(io::stdin()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}
