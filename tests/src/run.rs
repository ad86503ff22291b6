//! Running a program with input, a deadline, and everything it wrote.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

/// Longer than anything that is not stuck takes, where guests are emulated and many others want the processors.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a program left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Exit code, 128 + signal if a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Passes the result on if the program ended with `code`, else panics with all it wrote.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(
            self.code,
            code,
            "exit code {} instead of {code}\n--- stdout\n{}\n--- stderr\n{}",
            self.code,
            self.out(),
            self.err()
        );
        self
    }
}

/// Runs `command` with `input` on its standard input.
///
/// # Panics
/// If it cannot be started, or does not end within `deadline` (it is killed then).
#[track_caller]
pub fn run_with(mut command: Command, input: &[u8], deadline: Duration) -> Finished {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => panic!("cannot start {command:?}: {e}"),
    };
    let pid = child.id();
    let (ended, end) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if end.recv_timeout(deadline) == Err(mpsc::RecvTimeoutError::Timeout) {
            let pid = Pid::from_raw(pid.cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            return true;
        }
        false
    });
    let mut stdin = child.stdin.take();
    let input = input.to_vec();
    thread::spawn(move || {
        if let Some(mut pipe) = stdin.take() {
            // A program may well end without reading its input.
            let _ = pipe.write_all(&input);
        }
    });
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let status = child.wait();
    drop(ended);
    let overdue = watchdog.join().unwrap_or(true);
    let (stdout, stdout_closed) = stdout.take();
    let (stderr, stderr_closed) = stderr.take();
    assert!(
        !overdue,
        "{command:?} did not end within {deadline:?}\n--- stdout\n{}\n--- stderr\n{}",
        String::from_utf8_lossy(&stdout),
        String::from_utf8_lossy(&stderr)
    );
    assert!(
        stdout_closed && stderr_closed,
        "{command:?} ended, and somebody else still has its output: {}",
        String::from_utf8_lossy(&stderr)
    );
    let code = match status {
        Ok(status) => code_of(status),
        Err(e) => panic!("cannot wait for {command:?}: {e}"),
    };
    Finished { code, stdout, stderr }
}

/// 128 + n after signal n, as a shell has it.
pub(crate) fn code_of(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Whether there is such a process. One that has ended and only waits to be collected by a parent
/// that may never do so does not count.
pub fn is_running(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| state != 'Z' && state != 'X')
}

/// What comes out of a pipe.
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    closed: mpsc::Receiver<()>,
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> Collected {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let (close, closed) = mpsc::channel();
    let into = bytes.clone();
    thread::spawn(move || {
        let mut buffer = [0; 1 << 16];
        let Some(mut pipe) = pipe else { return };
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            let part = buffer.get(..count).unwrap_or_default();
            into.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(part);
        }
        drop(close);
    });
    Collected { bytes, closed }
}

impl Collected {
    /// What came, and whether that is all: what a program leaves behind may keep its pipes open for good.
    fn take(self) -> (Vec<u8>, bool) {
        let end = self.closed.recv_timeout(Duration::from_secs(60));
        let bytes = std::mem::take(&mut *self.bytes.lock().unwrap_or_else(PoisonError::into_inner));
        (bytes, end != Err(mpsc::RecvTimeoutError::Timeout))
    }
}

/// Polls `condition` for as long as anything may take.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never came: {what}");
        thread::sleep(Duration::from_millis(50));
    }
}
