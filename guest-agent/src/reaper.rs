//! Collects every process that ends, the agent's own and the orphans that fall to PID 1.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::log::error;
use crate::sys;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The exit code, if it exited.
    pub code: u8,
    /// The signal that ended it, else 0.
    pub signal: u8,
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub at_ns: u64,
    /// Wall clock, nanoseconds since 1970.
    pub at_unix_ns: u64,
}

/// The end of one process, to wait for.
#[derive(Debug, Default)]
pub struct Exit {
    ended: Mutex<Option<Ended>>,
    happened: Condvar,
}

impl Exit {
    /// How the process ended, if it has.
    pub fn get(&self) -> Option<Ended> {
        *lock(&self.ended)
    }

    /// Waits for the end, at most for `timeout`.
    pub fn wait(&self, timeout: Duration) -> Option<Ended> {
        let deadline = Instant::now() + timeout;
        let mut ended = lock(&self.ended);
        while ended.is_none() {
            let left = deadline.checked_duration_since(Instant::now())?;
            ended =
                self.happened.wait_timeout(ended, left).map_or_else(|e| e.into_inner().0, |r| r.0);
        }
        *ended
    }

    fn set(&self, how: Ended) {
        *lock(&self.ended) = Some(how);
        self.happened.notify_all();
    }
}

type OnExit = Box<dyn FnOnce(&Ended) + Send>;

#[derive(Default)]
struct Watched {
    processes: HashMap<i32, (Arc<Exit>, OnExit)>,
}

/// The table of processes that somebody wants to hear of.
#[derive(Default)]
pub struct Reaper {
    watched: Mutex<Watched>,
    /// Rung when there is a new child, for when there were none.
    born: Condvar,
}

impl std::fmt::Debug for Reaper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reaper").finish_non_exhaustive()
    }
}

impl Reaper {
    /// Starts the reaping thread.
    pub fn start() -> std::io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let worker = Arc::clone(&reaper);
        std::thread::Builder::new().name("reaper".into()).spawn(move || worker.run())?;
        Ok(reaper)
    }

    /// Watches a child that cannot have ended yet. `on_exit` runs on the reaping thread right
    /// before those who wait are woken.
    pub fn watch(&self, pid: i32, on_exit: OnExit) -> Arc<Exit> {
        let exit = Arc::new(Exit::default());
        lock(&self.watched).processes.insert(pid, (Arc::clone(&exit), on_exit));
        self.born.notify_all();
        exit
    }

    fn run(&self) {
        loop {
            match sys::wait_for_any_child() {
                Ok((pid, code, signal)) => self.ended(pid, code, signal),
                Err(Errno::EINTR) => {}
                Err(Errno::ECHILD) => {
                    let watched = lock(&self.watched);
                    if watched.processes.is_empty() {
                        drop(self.born.wait(watched));
                    } else {
                        error!("children are watched that the kernel does not know");
                        drop(self.born.wait_timeout(watched, Duration::from_secs(1)));
                    }
                }
                Err(e) => {
                    error!("cannot wait for children: {e}");
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    }

    fn ended(&self, pid: i32, code: i32, signal: i32) {
        let Some((exit, on_exit)) = lock(&self.watched).processes.remove(&pid) else { return };
        let how = Ended {
            code: u8::try_from(code & 0xff).unwrap_or(u8::MAX),
            signal: u8::try_from(signal).unwrap_or(u8::MAX),
            at_ns: sys::clock_ns(libc::CLOCK_BOOTTIME),
            at_unix_ns: sys::clock_ns(libc::CLOCK_REALTIME),
        };
        on_exit(&how);
        exit.set(how);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
