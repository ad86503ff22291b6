//! Moving a process's standard streams between the guest and this process.
//!
//! One thread per direction, blocked in `poll` whenever there is nothing to do. Back pressure
//! needs no code: a writer that blocks stops its reader.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::logfile::{LogWriter, Source};

/// Bytes moved at once.
const BUFFER: usize = 256 << 10;

/// A flag that threads blocked in `poll` can see; once raised it stays so.
#[derive(Debug, Clone)]
pub struct Flag(Arc<EventFd>);

impl Flag {
    /// A lowered one.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(Arc::new(EventFd::from_value_and_flags(0, flags)?)))
    }

    /// Raises it.
    pub fn raise(&self) {
        // Fails only when the counter would overflow, and then it is raised.
        let _ = self.0.write(1);
    }
}

impl AsFd for Flag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A container's log, shared by the threads that write to it.
pub type SharedLog = Arc<Mutex<LogWriter>>;

/// How the copying of an output stream ended.
#[derive(Debug)]
pub enum OutputEnd {
    /// The process closed it.
    Closed,
    /// Nobody reads our side any more, or it cannot be written.
    SinkFailed(io::Error),
    /// The process had ended, something held the stream open, and nothing came any more.
    Abandoned,
}

/// What an output stream is copied to.
#[derive(Debug)]
pub struct Sink {
    /// A file, terminal or pipe; nothing if output is only logged.
    pub out: Option<File>,
    /// The log.
    pub log: Option<SharedLog>,
    /// Under which source it is logged.
    pub source: Source,
}

impl Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        if let Some(log) = &self.log {
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(e) = log.write(self.source, data) {
                // A full disk must not end the container.
                tracing::warn!("cannot write the container's log, it ends here: {e}");
                drop(log);
                self.log = None;
            }
        }
        match &mut self.out {
            Some(out) => out.write_all(data),
            None => Ok(()),
        }
    }
}

/// Copies `from` to `sink` in a thread of its own until the stream ends, and then calls `done`.
/// Once `exited` is raised the process is gone, and the stream may be silent for no longer than
/// `grace`.
pub fn output(
    name: &str,
    from: UnixStream,
    sink: Sink,
    exited: Flag,
    grace: Duration,
    done: impl FnOnce(OutputEnd) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || done(copy_output(from, sink, &exited, grace)))
}

fn copy_output(mut from: UnixStream, mut sink: Sink, exited: &Flag, grace: Duration) -> OutputEnd {
    let mut buffer = vec![0; BUFFER];
    loop {
        match readable(from.as_fd(), exited.as_fd(), grace) {
            Ok(Ready::Source) => {}
            Ok(Ready::Abandoned) => return OutputEnd::Abandoned,
            Err(_) => return OutputEnd::Closed,
        }
        match from.read(&mut buffer) {
            Ok(0) => return OutputEnd::Closed,
            Ok(n) => {
                if let Err(e) = sink.write(&buffer[..n]) {
                    // The process shall notice, as it would at a closed pipe.
                    let _ = from.shutdown(Shutdown::Both);
                    return OutputEnd::SinkFailed(e);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // The machine is gone; whoever waits for the process hears why.
            Err(_) => return OutputEnd::Closed,
        }
    }
}

enum Ready {
    Source,
    Abandoned,
}

fn readable(from: BorrowedFd<'_>, exited: BorrowedFd<'_>, grace: Duration) -> io::Result<Ready> {
    let mut gone = false;
    loop {
        let source = PollFd::new(from, PollFlags::POLLIN);
        let count = if gone {
            let timeout = PollTimeout::try_from(grace).unwrap_or(PollTimeout::MAX);
            poll(&mut [source], timeout)
        } else {
            let mut fds = [source, PollFd::new(exited, PollFlags::POLLIN)];
            let polled = poll(&mut fds, PollTimeout::NONE);
            if polled.is_ok() && !fds[0].any().unwrap_or(false) {
                gone = true;
                continue;
            }
            polled
        };
        match count {
            Ok(0) => return Ok(Ready::Abandoned),
            Ok(_) => return Ok(Ready::Source),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Copies `from` (a duplicate of our standard input) to the process in a thread of its own. Its
/// end of file is passed on. Raising `stop` ends the thread.
pub fn input(from: OwnedFd, mut to: UnixStream, stop: Flag) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut from = File::from(from);
        let mut buffer = vec![0; BUFFER];
        loop {
            let mut fds = [
                PollFd::new(from.as_fd(), PollFlags::POLLIN),
                PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => {}
                Err(nix::errno::Errno::EINTR) => continue,
                Err(_) => return,
            }
            if fds[1].any().unwrap_or(false) {
                return;
            }
            match from.read(&mut buffer) {
                Ok(0) => break,
                // The process has closed its input, or is gone.
                Ok(n) if to.write_all(&buffer[..n]).is_err() => return,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A terminal that was hung up reads as an error: to the process it is the end.
                Err(_) => break,
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom};

    fn sink(out: File) -> Sink {
        Sink { out: Some(out), log: None, source: Source::Stdout }
    }

    /// Runs a copy to its end, which `act` brings about.
    fn end_of(host: UnixStream, out: File, grace: Duration, act: impl FnOnce(Flag)) -> OutputEnd {
        let flag = Flag::new().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let done = move |end| tell.send(end).unwrap();
        let thread = output("t", host, sink(out), flag.clone(), grace, done).unwrap();
        act(flag);
        thread.join().unwrap();
        told.recv().unwrap()
    }

    #[test]
    fn megabytes_pass_unchanged() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let mut out = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..5_000_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
        let end = end_of(host, out.try_clone().unwrap(), Duration::from_secs(10), |_| {
            guest.write_all(&data).unwrap();
            drop(guest);
        });
        assert!(matches!(end, OutputEnd::Closed));
        let mut copied = Vec::new();
        out.seek(SeekFrom::Start(0)).unwrap();
        out.read_to_end(&mut copied).unwrap();
        assert!(copied == data);
    }

    #[test]
    fn stream_held_open_after_the_end_is_abandoned() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let out = tempfile::tempfile().unwrap();
        let end = end_of(host, out, Duration::from_millis(30), |exited| {
            guest.write_all(b"x").unwrap();
            exited.raise();
        });
        assert!(matches!(end, OutputEnd::Abandoned));
    }

    #[test]
    fn sink_that_takes_no_more_is_reported() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let end = end_of(host, full, Duration::from_secs(10), |_| {
            guest.write_all(b"x").unwrap();
        });
        let OutputEnd::SinkFailed(e) = end else { panic!("{end:?}") };
        assert_eq!(e.raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn end_of_input_is_passed_on_and_the_thread_can_be_stopped() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let (ours, mut typed) = io::pipe().unwrap();
        let thread = input(ours.into(), host, Flag::new().unwrap()).unwrap();
        typed.write_all(b"hello").unwrap();
        drop(typed);
        let mut got = String::new();
        guest.read_to_string(&mut got).unwrap();
        assert_eq!(got, "hello");
        thread.join().unwrap();

        let (_guest, host) = UnixStream::pair().unwrap();
        let (ours, _typed) = io::pipe().unwrap();
        let stop = Flag::new().unwrap();
        let thread = input(ours.into(), host, stop.clone()).unwrap();
        stop.raise();
        thread.join().unwrap();
    }
}
