//! A program that is spoken to while it runs.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::Finished;
use crate::run::code_of;

/// Longer than anything that is not stuck takes, on a slow and busy machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// The program; it is killed after a while, so that every wait for it ends.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    stderr: thread::JoinHandle<Vec<u8>>,
    heard: Vec<u8>,
    /// What was asked for with [`Running::hear`] ends here.
    seen: usize,
    /// Dropped at its end.
    ended: Option<mpsc::Sender<()>>,
}

impl Running {
    /// Starts `command` without input.
    ///
    /// # Panics
    /// If that fails.
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null());
        Self::begin(command, DEADLINE)
    }

    /// Starts `command`, which can be told something by [`Running::say`]. It is killed after `deadline`.
    ///
    /// # Panics
    /// If that fails.
    pub fn conversation(mut command: Command, deadline: Duration) -> Self {
        command.stdin(Stdio::piped());
        Self::begin(command, deadline)
    }

    /// Starts `command` with an input that ends when it is dropped.
    ///
    /// # Panics
    /// If that fails.
    pub fn start_with_input(mut command: Command) -> (Self, ChildStdin) {
        command.stdin(Stdio::piped());
        let mut running = Self::begin(command, DEADLINE);
        let input = running.stdin.take().expect("its input");
        (running, input)
    }

    fn begin(mut command: Command, deadline: Duration) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("a program");
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("its output"));
        let mut from = child.stderr.take().expect("its errors");
        let stderr = thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = from.read_to_end(&mut bytes);
            bytes
        });
        let (ended, end) = mpsc::channel::<()>();
        let pid = Pid::from_raw(child.id().cast_signed());
        thread::spawn(move || {
            if end.recv_timeout(deadline) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        Self { child, stdin, stdout, stderr, heard: Vec::new(), seen: 0, ended: Some(ended) }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Waits for a line on its standard output that begins with `text`.
    ///
    /// # Panics
    /// If it ends before.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        loop {
            let begin = self.heard.len();
            let n = self.stdout.read_until(b'\n', &mut self.heard).expect("its output");
            assert!(n > 0, "it ended without {text:?}: {}", String::from_utf8_lossy(&self.heard));
            if self.heard[begin..].starts_with(text.as_bytes()) {
                return;
            }
        }
    }

    /// The next line of its standard output without its end, `None` when there is no more.
    ///
    /// # Panics
    /// If it cannot be read.
    #[track_caller]
    pub fn line(&mut self) -> Option<String> {
        let begin = self.heard.len();
        let n = self.stdout.read_until(b'\n', &mut self.heard).expect("its output");
        let line = String::from_utf8_lossy(&self.heard[begin..]).into_owned();
        (n > 0).then(|| line.trim_end_matches(['\r', '\n']).to_owned())
    }

    /// Writes to its standard input.
    ///
    /// # Panics
    /// If it has none or takes no more.
    #[track_caller]
    pub fn say(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("a conversation");
        stdin.write_all(text.as_bytes()).expect("a program that listens");
    }

    /// Waits for `text` on its standard output, in a line that need not be complete, after what was
    /// waited for before. Returns what came up to it.
    ///
    /// # Panics
    /// If it ends before.
    #[track_caller]
    pub fn hear(&mut self, text: &str) -> String {
        loop {
            let fresh = &self.heard[self.seen..];
            if let Some(at) = fresh.windows(text.len()).position(|w| w == text.as_bytes()) {
                self.seen += at + text.len();
                return String::from_utf8_lossy(&fresh[..at]).into_owned();
            }
            let more = self.stdout.fill_buf().expect("its output");
            let n = more.len();
            self.heard.extend_from_slice(more);
            self.stdout.consume(n);
            assert!(n > 0, "it ended without {text:?}: {}", String::from_utf8_lossy(&self.heard));
        }
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it is gone.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("a program to be signalled");
    }

    /// Whether it has ended. It stays a process until [`Running::finish`].
    ///
    /// # Panics
    /// If it cannot be waited for.
    #[track_caller]
    pub fn is_over(&self) -> bool {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(self.pid()), flags).expect("a child") != WaitStatus::StillAlive
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it cannot be waited for.
    #[track_caller]
    pub fn finish(mut self) -> Finished {
        let _ = self.stdout.read_to_end(&mut self.heard);
        let status = self.child.wait().expect("its end");
        drop(self.ended.take());
        let stderr = self.stderr.join().unwrap_or_default();
        Finished { code: code_of(status), stdout: self.heard, stderr }
    }
}
