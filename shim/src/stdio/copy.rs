//! Copying one stream, with a bounded buffer and a wait that can always be ended.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use mvm_sandbox::pump::Flag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Bytes moved at once; all the memory that a stream takes.
const BUFFER: usize = 64 << 10;

/// The copies of one process's output.
#[derive(Debug, Clone)]
pub struct Copies(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    running: Mutex<usize>,
    ended: Condvar,
    moved: AtomicU64,
    stop: Flag,
}

impl Copies {
    /// None yet.
    pub fn new() -> io::Result<Self> {
        let shared = Shared {
            running: Mutex::new(0),
            ended: Condvar::new(),
            moved: AtomicU64::new(0),
            stop: Flag::new()?,
        };
        Ok(Self(Arc::new(shared)))
    }

    /// Ends all of them that still wait for something.
    pub fn stop(&self) {
        self.0.stop.raise();
    }

    /// Waits until all output has been copied. When nothing moves for `silence` the rest is given
    /// up: the process is gone, and whoever should read does not.
    pub fn drain(&self, silence: Duration) {
        let mut running = self.0.running.lock().unwrap_or_else(PoisonError::into_inner);
        while *running > 0 {
            let before = self.0.moved.load(Ordering::Relaxed);
            let waited = self.0.ended.wait_timeout(running, silence);
            let (still, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            running = still;
            if timeout.timed_out() && self.0.moved.load(Ordering::Relaxed) == before {
                break;
            }
        }
        drop(running);
        self.stop();
    }

    /// Copies a process's output to `sink`, and then closes it.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn output(&self, name: &str, from: UnixStream, sink: Sink) -> io::Result<()> {
        let shared = Arc::clone(&self.0);
        *shared.running.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let thread = std::thread::Builder::new().name(name.into());
        let spawned = thread.spawn(move || {
            let _counted = Counted(&shared);
            copy_output(from, sink, &shared);
        });
        if spawned.is_err() {
            let mut running = self.0.running.lock().unwrap_or_else(PoisonError::into_inner);
            *running -= 1;
        }
        spawned.map(drop)
    }

    /// Copies `from` to a process's input. Its end of file is passed on unless there is a terminal,
    /// which knows none.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn input(&self, from: File, to: UnixStream, terminal: bool) -> io::Result<()> {
        let shared = Arc::clone(&self.0);
        let thread = std::thread::Builder::new().name("stdin".into());
        thread.spawn(move || copy_input(from, to, terminal, &shared.stop)).map(drop)
    }
}

/// A copy that runs; it is no longer counted when this goes.
struct Counted<'a>(&'a Shared);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        *self.0.running.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.ended.notify_all();
    }
}

/// What output is written to.
#[derive(Debug)]
pub struct Sink {
    /// The open file; a fifo's is non-blocking.
    pub out: File,
    /// The reading end of that fifo: while it is open, data waits for a reader instead of being an
    /// error when there is none.
    pub _keep: Option<File>,
}

fn copy_output(mut from: UnixStream, sink: Sink, shared: &Shared) {
    let mut buffer = vec![0; BUFFER];
    loop {
        if !ready(from.as_fd(), PollFlags::POLLIN, &shared.stop) {
            return;
        }
        let count = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            // The machine is gone; whoever waits for the process hears why.
            Err(_) => return,
        };
        if !write_all(&sink.out, &buffer[..count], shared) {
            // The process shall notice, as it would at a closed pipe.
            let _ = from.shutdown(Shutdown::Both);
            return;
        }
    }
}

/// `false` if the sink takes nothing any more.
fn write_all(mut out: &File, mut data: &[u8], shared: &Shared) -> bool {
    while !data.is_empty() {
        match out.write(data) {
            Ok(0) => return false,
            Ok(count) => {
                data = &data[count..];
                shared.moved.fetch_add(count as u64, Ordering::Relaxed);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if !ready(out.as_fd(), PollFlags::POLLOUT, &shared.stop) {
                    return false;
                }
            }
            Err(e) => {
                tracing::debug!("a standard stream cannot be written: {e}");
                return false;
            }
        }
    }
    true
}

fn copy_input(mut from: File, mut to: UnixStream, terminal: bool, stop: &Flag) {
    let mut buffer = vec![0; BUFFER];
    loop {
        if !ready(from.as_fd(), PollFlags::POLLIN, stop) {
            return;
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            // The process has closed its input, or is gone.
            Ok(count) if !write_input(&mut to, &buffer[..count], stop) => return,
            Ok(_) => {}
            Err(e)
                if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(_) => break,
        }
    }
    if !terminal {
        let _ = to.shutdown(Shutdown::Write);
    }
}

/// The stream stays blocking, since a terminal's is shared with its output: a part that the socket
/// has room for is written each time.
fn write_input(to: &mut UnixStream, mut data: &[u8], stop: &Flag) -> bool {
    use nix::sys::socket::{MsgFlags, send};
    use std::os::fd::AsRawFd;
    while !data.is_empty() {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(to.as_raw_fd(), data, flags) {
            Ok(count) => data = &data[count..],
            Err(nix::errno::Errno::EINTR) => {}
            Err(nix::errno::Errno::EAGAIN) => {
                if !ready(to.as_fd(), PollFlags::POLLOUT, stop) {
                    return false;
                }
            }
            Err(_) => return false,
        }
    }
    true
}

/// Waits for `what`; `false` if the wait was ended by `stop`.
fn ready(fd: BorrowedFd<'_>, what: PollFlags, stop: &Flag) -> bool {
    loop {
        let mut fds = [PollFd::new(fd, what), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) if fds[0].any().unwrap_or(false) => return true,
            Ok(_) if fds[1].any().unwrap_or(false) => return false,
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}
