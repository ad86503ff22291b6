//! Programs that take a container's output (`binary://` of containerd).
//!
//! The program finds standard output at descriptor 3, standard error at 4, and closes 5 when it is
//! ready. `CONTAINER_ID` and `CONTAINER_NAMESPACE` say whose output it is.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Owner;

/// How long a logger may take to be ready.
const READY: Duration = Duration::from_secs(10);

/// How long a logger may go on when there is nothing more to read.
const END: Duration = Duration::from_secs(10);

/// A logger that runs.
#[derive(Debug)]
pub struct Logger {
    child: Child,
    name: String,
}

impl Logger {
    /// Starts it and waits until it is ready. Returns what is to be written to: output and error.
    ///
    /// # Errors
    /// It cannot be started, or does not become ready.
    pub fn start(
        program: &Path,
        args: &[OsString],
        owner: &Owner,
    ) -> io::Result<(Self, File, File)> {
        // The shell could only say it in the place where the program says that it is ready.
        if !std::fs::metadata(program)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
        }
        let (out, write_out) = io::pipe()?;
        let (err, write_err) = io::pipe()?;
        let (ready, write_ready) = io::pipe()?;
        // A shell puts the descriptors where they belong: standard input, output and error of a
        // child are set without code between fork and exec, descriptors 3 to 5 are not.
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "exec \"$@\" 3<&0 4<&1 5>&2 0</dev/null 1>/dev/null 2>/dev/null", "sh"])
            .arg(program)
            .args(args)
            .env("CONTAINER_ID", &owner.container)
            .env("CONTAINER_NAMESPACE", &owner.namespace)
            .stdin(OwnedFd::from(out))
            .stdout(OwnedFd::from(err))
            .stderr(OwnedFd::from(write_ready));
        let child = command.spawn()?;
        drop(command);
        let mut logger = Self { child, name: program.display().to_string() };
        if let Err(e) = wait_ready(ready) {
            logger.end(Duration::ZERO);
            return Err(e);
        }
        Ok((logger, OwnedFd::from(write_out).into(), OwnedFd::from(write_err).into()))
    }

    /// Waits for its end after all that writes to it is closed, and kills it after `limit`.
    fn end(&mut self, limit: Duration) {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                _ => return,
            }
        }
        if !limit.is_zero() {
            tracing::warn!("the logger {} does not end and is killed", self.name);
        }
        // Nothing to be done about one that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        self.end(END);
    }
}

fn wait_ready(mut ready: PipeReader) -> io::Result<()> {
    let timeout = PollTimeout::try_from(READY).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, timeout)? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not become ready"));
    }
    // A byte or the end: both mean ready.
    ready.read(&mut [0]).map(drop)
}
