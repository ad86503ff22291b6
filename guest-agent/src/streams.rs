//! The standard streams of a process and the connections that carry them.
//!
//! Each attached stream has a thread that copies between the pipe (or terminal) and the connection
//! in blocks. Nothing is stored in between: a host that does not read makes the thread wait, the
//! pipe fill and the process block.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_agent_protocol::stream::{Answer, Kind};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::log::warning;
use crate::sys;

/// Bytes copied at a time: what a pipe holds.
const BLOCK: usize = 64 << 10;

/// The agent's ends of a process's streams.
#[derive(Debug, Default)]
pub struct Streams {
    stdin: Mutex<Slot>,
    stdout: Mutex<Slot>,
    stderr: Mutex<Slot>,
    terminal: Mutex<Slot>,
}

#[derive(Debug, Default)]
enum Slot {
    /// The process has no such stream.
    #[default]
    Absent,
    /// Nobody is attached.
    Free(File),
    /// Somebody is; the copy of the connection serves to end it.
    Busy(UnixStream, File),
    /// The stream has come to its end.
    Ended,
}

/// The process's ends, to be handed to it.
#[derive(Debug)]
pub struct ProcessEnds {
    /// Standard input.
    pub stdin: OwnedFd,
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
}

/// Why a copy ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// No more data will come.
    Source,
    /// The receiving end is gone.
    Sink,
}

impl Streams {
    /// Pipes for the streams that the host wants, /dev/null for the others.
    pub fn pipes(stdin: bool, stdout: bool, stderr: bool) -> io::Result<(Self, ProcessEnds)> {
        let null = || {
            let mut options = std::fs::OpenOptions::new();
            options.read(true).write(true).open("/dev/null").map(OwnedFd::from)
        };
        let mut streams = Self::default();
        let slot =
            |slot: &mut Mutex<Slot>, end: OwnedFd| *slot = Mutex::new(Slot::Free(end.into()));
        let stdin_end = if stdin {
            let (reader, writer) = io::pipe()?;
            slot(&mut streams.stdin, writer.into());
            reader.into()
        } else {
            null()?
        };
        let mut output = |wanted: bool, to: fn(&mut Self) -> &mut Mutex<Slot>| {
            if !wanted {
                return null();
            }
            let (reader, writer) = io::pipe()?;
            slot(to(&mut streams), reader.into());
            Ok(writer.into())
        };
        let stdout_end = output(stdout, |s| &mut s.stdout)?;
        let stderr_end = output(stderr, |s| &mut s.stderr)?;
        Ok((streams, ProcessEnds { stdin: stdin_end, stdout: stdout_end, stderr: stderr_end }))
    }

    /// Streams of a process that has a terminal.
    pub fn of_terminal(master: OwnedFd) -> Self {
        Self { terminal: Mutex::new(Slot::Free(master.into())), ..Self::default() }
    }

    fn slot(&self, kind: Kind) -> &Mutex<Slot> {
        match kind {
            Kind::Stdin => &self.stdin,
            Kind::Stdout => &self.stdout,
            Kind::Stderr => &self.stderr,
            Kind::Terminal => &self.terminal,
        }
    }

    /// Answers a stream connection and copies until the stream or the connection ends.
    pub fn attach(self: &Arc<Self>, kind: Kind, connection: UnixStream) {
        let answer = self.take(kind, &connection);
        let (answer, file) = match answer {
            Ok(file) => (Answer::Attached, file),
            Err(refusal) => (refusal, None),
        };
        let answered = (&connection).write_all(&[answer as u8]);
        let Some(file) = file else { return };
        let end = match (answered, kind) {
            (Err(_), _) => End::Sink,
            (Ok(()), Kind::Stdin) => copy_in(&connection, &file),
            (Ok(()), Kind::Stdout | Kind::Stderr) => copy_out(&file, &connection),
            (Ok(()), Kind::Terminal) => copy_terminal(&file, &connection),
        };
        drop(file);
        self.give_back(kind, &end);
        let _ = connection.shutdown(Shutdown::Both);
    }

    /// A copy of the stream's descriptor, `None` if the stream has ended already.
    fn take(&self, kind: Kind, connection: &UnixStream) -> Result<Option<File>, Answer> {
        let mut slot = lock(self.slot(kind));
        match std::mem::take(&mut *slot) {
            Slot::Free(file) => match (connection.try_clone(), file.try_clone()) {
                (Ok(connection), Ok(copy)) => {
                    *slot = Slot::Busy(connection, file);
                    Ok(Some(copy))
                }
                (Err(e), _) | (_, Err(e)) => {
                    warning!("cannot attach a stream: {e}");
                    *slot = Slot::Free(file);
                    Err(Answer::Busy)
                }
            },
            busy @ Slot::Busy(..) => {
                *slot = busy;
                Err(Answer::Busy)
            }
            Slot::Ended => {
                *slot = Slot::Ended;
                Ok(None)
            }
            Slot::Absent => Err(Answer::NotFound),
        }
    }

    fn give_back(&self, kind: Kind, end: &End) {
        let mut slot = lock(self.slot(kind));
        // For input, the connection is the source: its end is the end of the stream. For output it
        // is the sink, and another connection may come.
        let is_over = match kind {
            Kind::Stdin => true,
            _ => *end == End::Source,
        };
        *slot = match std::mem::take(&mut *slot) {
            Slot::Busy(_, file) if !is_over => Slot::Free(file),
            _ => Slot::Ended,
        };
    }

    /// Ends the standard input, attached or not.
    pub fn close_stdin(&self) {
        let mut slot = lock(&self.stdin);
        match &*slot {
            Slot::Busy(connection, _) => {
                let _ = connection.shutdown(Shutdown::Read);
            }
            Slot::Absent => {}
            _ => *slot = Slot::Ended,
        }
    }

    /// The process has ended: nobody will read its input. Output is still to be read to its end.
    pub fn process_ended(&self) {
        let slot = lock(&self.stdin);
        if let Slot::Busy(connection, _) = &*slot {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Ends everything: the container is deleted.
    pub fn close(&self) {
        for kind in [Kind::Stdin, Kind::Stdout, Kind::Stderr, Kind::Terminal] {
            let mut slot = lock(self.slot(kind));
            match std::mem::take(&mut *slot) {
                Slot::Busy(connection, file) => {
                    let _ = connection.shutdown(Shutdown::Both);
                    *slot = Slot::Busy(connection, file);
                }
                Slot::Absent => {}
                _ => *slot = Slot::Ended,
            }
        }
    }

    /// Sets the terminal's size; false if there is no terminal.
    pub fn resize(&self, columns: u16, rows: u16) -> Option<Result<(), Errno>> {
        match &*lock(&self.terminal) {
            Slot::Free(file) | Slot::Busy(_, file) => {
                Some(sys::set_window_size(file.as_fd(), columns, rows))
            }
            Slot::Ended => Some(Ok(())),
            Slot::Absent => None,
        }
    }
}

/// Copies what the process writes until it has no writer any more or the host hangs up.
fn copy_out(mut source: &File, mut sink: &UnixStream) -> End {
    let mut block = vec![0; BLOCK];
    loop {
        let mut fds = [
            PollFd::new(source.as_fd(), PollFlags::POLLIN),
            // Only a full hang-up: the host may well close its sending half.
            PollFd::new(sink.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(_) => return End::Sink,
        }
        if fds[1].any().unwrap_or(true) {
            return End::Sink;
        }
        match source.read(&mut block) {
            Ok(0) => return End::Source,
            Ok(n) => {
                if sink.write_all(&block[..n]).is_err() {
                    return End::Sink;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // EIO: the last process has closed the terminal.
            Err(_) => return End::Source,
        }
    }
}

/// Copies what the host sends until it half-closes or the process no longer reads.
fn copy_in(mut source: &UnixStream, mut sink: &File) -> End {
    let mut block = vec![0; BLOCK];
    loop {
        match source.read(&mut block) {
            Ok(0) => return End::Source,
            Ok(n) => {
                if sink.write_all(&block[..n]).is_err() {
                    return End::Sink;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return End::Source,
        }
    }
}

/// Both directions of a terminal; ends with its output.
fn copy_terminal(terminal: &File, connection: &UnixStream) -> End {
    let input = connection.try_clone().and_then(|from| {
        let to = terminal.try_clone()?;
        std::thread::Builder::new().name("tty-in".into()).spawn(move || copy_in(&from, &to))
    });
    if let Err(e) = input {
        warning!("a terminal has no input: {e}");
    }
    let end = copy_out(terminal, connection);
    // Ends the input thread too.
    let _ = connection.shutdown(Shutdown::Both);
    end
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn attach(streams: &Arc<Streams>, kind: Kind) -> (UnixStream, std::thread::JoinHandle<()>) {
        let (mut host, guest) = UnixStream::pair().unwrap();
        let streams = Arc::clone(streams);
        let thread = std::thread::spawn(move || streams.attach(kind, guest));
        let mut answer = [9];
        host.read_exact(&mut answer).unwrap();
        assert_eq!(answer[0], Answer::Attached as u8);
        (host, thread)
    }

    fn refusal(streams: &Arc<Streams>, kind: Kind) -> u8 {
        let (mut host, guest) = UnixStream::pair().unwrap();
        streams.attach(kind, guest);
        let mut answer = Vec::new();
        host.read_to_end(&mut answer).unwrap();
        answer[0]
    }

    #[test]
    fn output_is_drained_to_the_last_byte_after_the_writer_is_gone() {
        let (streams, ends) = Streams::pipes(false, true, false).unwrap();
        let streams = Arc::new(streams);
        let mut out = File::from(ends.stdout);
        out.write_all(b"before ").unwrap();
        let (mut host, thread) = attach(&streams, Kind::Stdout);
        out.write_all(b"after").unwrap();
        drop(out);
        let mut all = String::new();
        host.read_to_string(&mut all).unwrap();
        thread.join().unwrap();
        assert_eq!(all, "before after");
        assert_eq!(refusal(&streams, Kind::Stdout), Answer::Attached as u8, "and then nothing");
    }

    #[test]
    fn half_close_of_the_host_is_end_of_input() {
        let (streams, ends) = Streams::pipes(true, false, false).unwrap();
        let streams = Arc::new(streams);
        let (mut host, thread) = attach(&streams, Kind::Stdin);
        host.write_all(b"hello").unwrap();
        host.shutdown(Shutdown::Write).unwrap();
        let mut all = String::new();
        File::from(ends.stdin).read_to_string(&mut all).unwrap();
        thread.join().unwrap();
        assert_eq!(all, "hello");
    }

    #[test]
    fn close_stdin_ends_input_attached_or_not() {
        for attached in [false, true] {
            let (streams, ends) = Streams::pipes(true, false, false).unwrap();
            let streams = Arc::new(streams);
            let connection = attached.then(|| attach(&streams, Kind::Stdin));
            streams.close_stdin();
            let mut all = String::new();
            File::from(ends.stdin).read_to_string(&mut all).unwrap();
            drop(connection);
        }
    }

    #[test]
    fn a_second_connection_is_refused_and_after_a_hang_up_accepted() {
        let (streams, ends) = Streams::pipes(false, true, false).unwrap();
        let streams = Arc::new(streams);
        let (host, thread) = attach(&streams, Kind::Stdout);
        assert_eq!(refusal(&streams, Kind::Stdout), Answer::Busy as u8);
        assert_eq!(refusal(&streams, Kind::Stderr), Answer::NotFound as u8);
        drop(host);
        thread.join().unwrap();
        let (mut host, thread) = attach(&streams, Kind::Stdout);
        File::from(ends.stdout).write_all(b"x").unwrap();
        let mut all = String::new();
        host.read_to_string(&mut all).unwrap();
        thread.join().unwrap();
        assert_eq!(all, "x");
    }

    #[test]
    fn a_host_that_does_not_read_blocks_the_writer() {
        let (streams, ends) = Streams::pipes(false, true, false).unwrap();
        let streams = Arc::new(streams);
        let (mut host, thread) = attach(&streams, Kind::Stdout);
        let mut out = File::from(ends.stdout);
        let (sender, written) = std::sync::mpsc::channel();
        const TOTAL: usize = 8 << 20;
        let writer = std::thread::spawn(move || {
            for _ in 0..TOTAL / BLOCK {
                out.write_all(&[7; BLOCK]).unwrap();
                sender.send(BLOCK).unwrap();
            }
        });
        // As much as pipe, block and socket buffers hold, then nothing.
        let mut stored = 0;
        while let Ok(n) = written.recv_timeout(Duration::from_millis(300)) {
            stored += n;
        }
        assert!(stored < 2 << 20, "{stored} bytes were stored");
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap();
        writer.join().unwrap();
        thread.join().unwrap();
        assert!(all.len() == TOTAL && all.iter().all(|b| *b == 7));
    }
}
