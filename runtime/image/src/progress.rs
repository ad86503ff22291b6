//! What a caller can watch while an image is imported or unpacked.

/// A watcher of a long operation. All methods default to doing nothing.
///
/// The library draws nothing itself: the command line turns these calls into a progress bar, a
/// service into log lines.
pub trait Progress: Sync {
    /// A step begins, for instance `layer 2/5`; `total` is its length in bytes where it is known.
    fn begin(&self, step: &str, total: Option<u64>) {
        let _ = (step, total);
    }

    /// `bytes` more of the current step are done.
    fn advance(&self, bytes: u64) {
        let _ = bytes;
    }

    /// The current step is done.
    fn end(&self) {}

    /// Whether nobody wants the result any more. The operation then fails soon, and leaves nothing.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Nobody watches.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {}

/// A reader that reports to a [`Progress`].
pub(crate) struct Watched<'a, R> {
    pub(crate) inner: R,
    pub(crate) progress: &'a dyn Progress,
}

impl<R: std::io::Read> std::io::Read for Watched<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if self.progress.is_cancelled() {
            return Err(std::io::Error::other("the operation was cancelled"));
        }
        let n = self.inner.read(buf)?;
        self.progress.advance(n as u64);
        Ok(n)
    }
}
