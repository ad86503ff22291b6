//! A progress bar for what takes long, on terminals only.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mvm_image::Progress;

use crate::interrupt::Watch;

/// Draws the steps of an import on standard error.
#[derive(Debug)]
pub struct Bar {
    current: Mutex<Option<ProgressBar>>,
    interrupt: Watch,
}

/// Steps shorter than this are not drawn.
const TICK: Duration = Duration::from_millis(120);

impl Bar {
    /// Nothing is drawn until a step begins. Ctrl-C ends the work from now on.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self { current: Mutex::new(None), interrupt: Watch::begin()? })
    }

    /// What came of the work: if a signal ended it, that signal.
    pub fn judge<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        self.interrupt.judge(result)
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Option<ProgressBar>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress for Bar {
    fn begin(&self, step: &str, total: Option<u64>) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        let template = match total {
            Some(_) => "{msg} {wide_bar} {bytes}/{total_bytes} {eta}",
            None => "{spinner} {msg} {bytes}",
        };
        let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(10));
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(step.to_owned());
        bar.enable_steady_tick(TICK);
        *self.current() = Some(bar);
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &*self.current() {
            bar.inc(bytes);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.interrupt.signal().is_some()
    }

    fn end(&self) {
        if let Some(bar) = self.current().take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.end();
    }
}
