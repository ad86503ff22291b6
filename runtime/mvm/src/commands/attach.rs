//! Standing between the user's terminal and a process in a guest: streams, signals, window size,
//! and the end.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mvm_agent_protocol::rpc::CallError;
use mvm_sandbox::guest::{Exit, Guest, Streams};
use mvm_sandbox::logfile::Source;
use mvm_sandbox::pump::{self, Flag, OutputEnd, SharedLog, Sink};
use nix::libc::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};

use crate::signals::Signals;
use crate::terminal;

/// How long a process may go on after its terminal was hung up: nobody can reach it any more, and
/// it has been told by SIGHUP.
const HANG_UP: Duration = Duration::from_secs(10);

/// How many interrupts it takes to give up on a process that does not react, as with docker.
const PATIENCE: usize = 3;

/// A process to stand by.
#[derive(Debug)]
pub struct Attachment<'a> {
    /// The guest that it runs in.
    pub guest: &'a Guest,
    /// Its id; empty for the container's first one.
    pub process: &'a str,
    /// Its streams.
    pub streams: Streams,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Whether our standard output and error are for it.
    pub foreground: bool,
    /// Where its output is logged.
    pub log: Option<SharedLog>,
    /// How long its streams may be silent, once it is gone, until they are given up.
    pub grace: Duration,
}

/// How it came to an end.
#[derive(Debug)]
pub enum End {
    /// The process ended, or the wait for it failed.
    Exited(Result<Exit, CallError>),
    /// The user gave up on it by this signal.
    GivenUp(i32),
    /// Our own output cannot be written any more.
    OutputFailed(io::Error),
}

enum Event {
    Exited(Result<Exit, CallError>),
    OutputDone(OutputEnd),
    Signal(i32),
}

/// Stands by until the process has ended and all its output is written.
pub fn stand_by(attachment: Attachment<'_>, signals: &Signals) -> anyhow::Result<End> {
    let Attachment { guest, process, streams, tty, foreground, log, grace } = attachment;
    let (tell, events) = channel();
    let exited = Flag::new().context("cannot make an event descriptor")?;
    let stop_input = Flag::new().context("cannot make an event descriptor")?;

    let mut open = 0;
    let outputs =
        [("stdout", streams.output, Source::Stdout), ("stderr", streams.error, Source::Stderr)];
    for (name, stream, source) in outputs {
        let Some(stream) = stream else { continue };
        let out = if foreground { Some(our_output(source)?) } else { None };
        let sink = Sink { out, log: log.clone(), source };
        let tell = tell.clone();
        // Nobody hears it when this function has returned already.
        let done = move |end| drop(tell.send(Event::OutputDone(end)));
        pump::output(name, stream, sink, exited.clone(), grace, done)
            .context("cannot start a thread")?;
        open += 1;
    }
    if let Some(stream) = streams.input {
        let stdin =
            io::stdin().as_fd().try_clone_to_owned().context("cannot use standard input")?;
        pump::input(stdin, stream, stop_input.clone()).context("cannot start a thread")?;
    }
    spawn_waiter(guest, process, tell.clone())?;
    spawn_signals(signals, tell)?;

    let end = Loop { guest, process, tty, open, exited }.run(&events);
    stop_input.raise();
    Ok(end)
}

pub(super) fn our_output(source: Source) -> anyhow::Result<File> {
    let fd = match source {
        Source::Stdout => io::stdout().as_fd().try_clone_to_owned(),
        Source::Stderr => io::stderr().as_fd().try_clone_to_owned(),
    };
    Ok(File::from(fd.context("cannot use standard output")?))
}

fn spawn_waiter(guest: &Guest, process: &str, tell: Sender<Event>) -> anyhow::Result<()> {
    let (guest, process) = (guest.clone(), process.to_owned());
    let wait = move || drop(tell.send(Event::Exited(guest.wait(&process))));
    thread::Builder::new().name("wait".into()).spawn(wait).context("cannot start a thread")?;
    Ok(())
}

fn spawn_signals(signals: &Signals, tell: Sender<Event>) -> anyhow::Result<()> {
    let signals = signals.clone();
    let pass = move || {
        while let Ok(number) = signals.next() {
            if tell.send(Event::Signal(number)).is_err() {
                break;
            }
        }
    };
    thread::Builder::new().name("signals".into()).spawn(pass).context("cannot start a thread")?;
    Ok(())
}

struct Loop<'a> {
    guest: &'a Guest,
    process: &'a str,
    tty: bool,
    /// Output streams that are still copied.
    open: usize,
    exited: Flag,
}

impl Loop<'_> {
    fn run(mut self, events: &Receiver<Event>) -> End {
        let mut exit = None;
        let mut interrupts = 0;
        let mut hung_up: Option<Instant> = None;
        loop {
            let event = match hung_up {
                Some(until) => events.recv_timeout(until.saturating_duration_since(Instant::now())),
                None => events.recv().map_err(RecvTimeoutError::from),
            };
            let event = match event {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => return End::GivenUp(SIGHUP),
                // Every thread holds a sender, and the one for signals never ends by itself.
                Err(RecvTimeoutError::Disconnected) => return End::GivenUp(SIGTERM),
            };
            match event {
                Event::Exited(result) => {
                    exit = Some(result);
                    self.exited.raise();
                }
                Event::OutputDone(OutputEnd::SinkFailed(e)) => return End::OutputFailed(e),
                Event::OutputDone(_) => self.open -= 1,
                Event::Signal(number) => {
                    if matches!(number, SIGINT | SIGTERM) {
                        interrupts += 1;
                        // The process is gone, or does not react: somebody wants to leave.
                        if exit.is_some() || interrupts >= PATIENCE {
                            return End::GivenUp(number);
                        }
                    }
                    if number == SIGHUP && self.tty && hung_up.is_none() {
                        hung_up = Some(Instant::now() + HANG_UP);
                    }
                    self.pass_on(number);
                }
            }
            if self.open == 0
                && let Some(result) = exit.take()
            {
                return End::Exited(result);
            }
        }
    }

    /// In a thread of its own: a guest that does not answer must not keep us from the next signal.
    fn pass_on(&self, number: i32) {
        let (guest, process, tty) = (self.guest.clone(), self.process.to_owned(), self.tty);
        let act = move || {
            let result = match (number, tty) {
                (SIGWINCH, true) => match terminal::size() {
                    Some((columns, rows)) => guest.resize(&process, columns, rows),
                    None => Ok(()),
                },
                (SIGWINCH, false) => Ok(()),
                _ => guest.signal(&process, number),
            };
            if let Err(e) = result {
                tracing::debug!("signal {number} was not passed on: {e}");
            }
        };
        if let Err(e) = thread::Builder::new().name("signal".into()).spawn(act) {
            tracing::warn!("signal {number} was not passed on: {e}");
        }
    }
}
