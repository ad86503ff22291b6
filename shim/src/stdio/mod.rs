//! A process's standard streams on the host's side.
//!
//! They are opened when the process is announced, joined to the guest when it is started, and closed
//! by us when the guest has closed them: containerd's clients wait for that end of file.
//!
//! A fifo is held open at both ends. So a client can go away and come back: what is written
//! meanwhile waits in the fifo, then in the guest, and nothing is lost.

mod copy;
mod logger;
mod uri;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use mvm_sandbox::guest::{Stdio, Streams};
use nix::libc;

use copy::{Copies, Sink};
use logger::Logger;
use uri::Place;

/// How long the streams of an ended process may be silent before the rest is given up.
const SILENCE: Duration = Duration::from_secs(2);

/// Where a process's streams go, in containerd's words; empty for nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Paths {
    /// Standard input.
    pub stdin: String,
    /// Standard output, or the terminal's.
    pub stdout: String,
    /// Standard error; not with a terminal.
    pub stderr: String,
    /// One terminal in place of three streams.
    pub terminal: bool,
}

/// Whose streams these are, for loggers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Owner {
    /// The container.
    pub container: String,
    /// containerd's namespace.
    pub namespace: String,
}

/// Why streams cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A place means nothing.
    #[error(transparent)]
    Place(#[from] uri::Error),
    /// A place cannot be opened.
    #[error("cannot open the standard stream {}: {source}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A logger cannot be started.
    #[error("cannot start the logger {}: {source}", path.display())]
    Logger {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Threads or descriptors are short.
    #[error("cannot copy standard streams: {0}")]
    Copy(#[from] io::Error),
}

/// The streams of one process.
#[derive(Debug)]
pub struct Io {
    copies: Copies,
    stdio: Stdio,
    ends: Mutex<Ends>,
}

#[derive(Debug, Default)]
struct Ends {
    stdin: Option<File>,
    /// While this is open the process's input has not ended, whoever else writes to the fifo.
    stdin_keeper: Option<File>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
}

impl Io {
    /// Opens them.
    ///
    /// # Errors
    /// See [`Error`]; nothing stays open then.
    pub fn open(paths: &Paths, owner: &Owner) -> Result<Self, Error> {
        let mut ends = Ends::default();
        if let Place::Path(path) = Place::parse(&paths.stdin)? {
            let failed = |source| Error::Open { path: path.clone(), source };
            ends.stdin = Some(open(&path, OpenOptions::new().read(true)).map_err(failed)?);
            if is_fifo(&path) {
                let keeper = open(&path, OpenOptions::new().write(true)).map_err(failed)?;
                ends.stdin_keeper = Some(keeper);
            }
        }
        match Place::parse(&paths.stdout)? {
            Place::Logger { program, args } => {
                let (logger, out, err) = Logger::start(&program, &args, owner)
                    .map_err(|source| Error::Logger { path: program.clone(), source })?;
                for pipe in [&out, &err] {
                    set_nonblocking(pipe)?;
                }
                ends.stdout = Some(Sink { out, _keep: None });
                ends.stderr = (!paths.terminal).then_some(Sink { out: err, _keep: None });
                ends.logger = Some(logger);
            }
            place => {
                ends.stdout = sink(&place)?;
                if !paths.terminal {
                    ends.stderr = sink(&Place::parse(&paths.stderr)?)?;
                }
            }
        }
        let stdio = Stdio {
            stdin: ends.stdin.is_some(),
            output: ends.stdout.is_some() || ends.stderr.is_some(),
            terminal: paths.terminal,
        };
        Ok(Self { copies: Copies::new()?, stdio, ends: Mutex::new(ends) })
    }

    /// Which streams the guest is to join.
    pub fn stdio(&self) -> Stdio {
        self.stdio
    }

    /// Joins the guest's ends and begins to copy.
    ///
    /// # Errors
    /// There are no threads to be had.
    pub fn connect(&self, streams: Streams) -> Result<(), Error> {
        let mut ends = self.ends();
        if let (Some(from), Some(to)) = (ends.stdin.take(), streams.input) {
            self.copies.input(from, to, self.stdio.terminal)?;
        }
        let discard = |sink: Option<Sink>| match sink {
            Some(sink) => Ok(sink),
            // One of the two streams goes nowhere.
            None => {
                File::options().write(true).open("/dev/null").map(|out| Sink { out, _keep: None })
            }
        };
        // What has nothing to come ends here: a client waits for the end of each fifo that it reads before it
        // deletes the task.
        match (streams.output, ends.stdout.take()) {
            (Some(from), sink) => self.copies.output("stdout", from, discard(sink)?)?,
            (None, sink) => drop(sink),
        }
        match (streams.error, ends.stderr.take()) {
            (Some(from), sink) => self.copies.output("stderr", from, discard(sink)?)?,
            (None, sink) => drop(sink),
        }
        Ok(())
    }

    /// Ends the process's input once the other writers have closed theirs.
    pub fn close_stdin(&self) {
        self.ends().stdin_keeper = None;
    }

    /// Waits for the rest of the output of an ended process, and closes everything.
    pub fn finish(&self) {
        self.copies.drain(SILENCE);
        let ends = std::mem::take(&mut *self.ends());
        // Not under the lock: a logger may take its time.
        drop(ends);
    }

    fn ends(&self) -> std::sync::MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        self.copies.stop();
    }
}

fn sink(place: &Place) -> Result<Option<Sink>, Error> {
    let (path, file) = match place {
        Place::None => return Ok(None),
        Place::File(path) => {
            (path, OpenOptions::new().append(true).create(true).mode(0o644).open(path))
        }
        Place::Path(path) if is_fifo(path) => {
            // The reading end first: without it a fifo that nobody reads cannot be opened.
            let failed = |source| Error::Open { path: path.clone(), source };
            let keep = open(path, OpenOptions::new().read(true)).map_err(failed)?;
            let out = open(path, OpenOptions::new().write(true)).map_err(failed)?;
            return Ok(Some(Sink { out, _keep: Some(keep) }));
        }
        Place::Path(path) => (path, open(path, OpenOptions::new().append(true))),
        Place::Logger { program, .. } => {
            let source = io::Error::new(io::ErrorKind::Unsupported, "a logger takes both streams");
            return Err(Error::Logger { path: program.clone(), source });
        }
    };
    let out = file.map_err(|source| Error::Open { path: path.clone(), source })?;
    Ok(Some(Sink { out, _keep: None }))
}

fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

fn is_fifo(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_fifo())
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags | OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests;
