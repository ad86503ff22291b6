//! A program on a terminal of its own, as a user has it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;
use rustix::termios::{Winsize, tcsetwinsize};

/// Longer than anything that is not stuck takes, on a slow and busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// The terminal, and the program whose controlling terminal it is.
#[derive(Debug)]
pub struct Terminal {
    master: Option<File>,
    slave: OwnedFd,
    before: Termios,
    child: Child,
    shown: Arc<Shown>,
    reader: Option<JoinHandle<()>>,
    /// What was waited for ends here.
    seen: usize,
}

#[derive(Debug, Default)]
struct Shown {
    bytes: Mutex<Vec<u8>>,
    more: Condvar,
    closed: AtomicBool,
}

impl Terminal {
    /// Starts `command` on a terminal of this size.
    ///
    /// # Panics
    /// If there is no terminal or no program.
    pub fn start(command: &Command, columns: u16, rows: u16) -> Self {
        let pty = openpty(None, None).expect("a terminal");
        // The program may not have the other end: it would never hear of its being closed.
        for end in [&pty.master, &pty.slave] {
            fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("a descriptor");
        }
        let master = File::from(pty.master);
        let slave = pty.slave;
        set_size(&master, columns, rows);
        let before = tcgetattr(&slave).expect("its settings");
        // setsid(1) makes the terminal the controlling one, and then becomes the program.
        let mut leader = Command::new("setsid");
        leader.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => leader.env(name, value),
                None => leader.env_remove(name),
            };
        }
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        let child = leader.stdin(end()).stdout(end()).stderr(end()).spawn().expect("setsid");
        let shown = Arc::new(Shown::default());
        let (mut from, into) = (master.try_clone().expect("a descriptor"), shown.clone());
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while !into.closed.load(Ordering::Acquire) {
                let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
                if let Ok(0) | Err(_) = poll(&mut fds, 20u8) {
                    continue;
                }
                // Fails when nobody has the other end open any more.
                let Ok(n @ 1..) = from.read(&mut buffer) else { break };
                let mut bytes = into.bytes.lock().unwrap_or_else(PoisonError::into_inner);
                bytes.extend_from_slice(&buffer[..n]);
                into.more.notify_all();
            }
        });
        Self { master: Some(master), slave, before, child, shown, reader: Some(reader), seen: 0 }
    }

    /// The program's process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Presses these keys.
    pub fn press(&mut self, keys: &str) {
        let master = self.master.as_mut().expect("a terminal that is not hung up");
        master.write_all(keys.as_bytes()).expect("a terminal that takes keys");
    }

    /// Changes the window's size.
    pub fn resize(&self, columns: u16, rows: u16) {
        set_size(self.master.as_ref().expect("a terminal"), columns, rows);
    }

    /// All that was shown so far.
    pub fn screen(&self) -> String {
        let bytes = self.shown.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until `text` has been shown, after what was waited for before.
    ///
    /// # Panics
    /// With all that was shown if it never is.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let bytes = self.shown.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = self.seen;
        let find = |bytes: &[u8]| {
            let fresh = &bytes[begin..];
            fresh.windows(text.len()).position(|w| w == text.as_bytes())
        };
        let absent = |bytes: &mut Vec<u8>| find(bytes).is_none();
        let waited = self.shown.more.wait_timeout_while(bytes, DEADLINE, absent);
        let (bytes, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match find(&bytes) {
            Some(at) => self.seen = begin + at + text.len(),
            None => panic!("no {text:?}; the screen:\n{}", String::from_utf8_lossy(&bytes)),
        }
    }

    /// Whether the terminal passes keys on as they are.
    pub fn is_raw(&self) -> bool {
        let now = tcgetattr(&self.slave).expect("the settings");
        !now.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }

    /// Whether its settings are those from before the program started.
    pub fn is_as_before(&self) -> bool {
        tcgetattr(&self.slave).expect("the settings") == self.before
    }

    /// Closes the window.
    pub fn hang_up(&mut self) {
        self.shown.closed.store(true, Ordering::Release);
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader");
        }
        drop(self.master.take());
    }

    /// Sends the program itself a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("a program to be signalled");
    }

    /// Waits until the program has ended; its exit code, 128 + n after signal n.
    ///
    /// # Panics
    /// If it does not end (it is killed then).
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            }
            if start.elapsed() > DEADLINE {
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!("the program does not end; the screen:\n{}", self.screen());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Nothing to be done about one that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.shown.closed.store(true, Ordering::Release);
    }
}

fn set_size(master: &File, columns: u16, rows: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(master.as_fd(), size).expect("a size");
}
