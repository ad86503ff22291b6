//! Room for descriptors. Each file that the guest's kernel remembers is an open one here, and their number is limited
//! (`RLIMIT_NOFILE`); the guest's agent makes its kernel forget in good time. How fast files are come by and how late the agent
//! runs is a matter of luck, though: a request that finds no descriptor waits for the guest to forget one.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the guest may take to forget something: its agent looks every 20 ms when there is little room, if it runs.
const PATIENCE: Duration = Duration::from_secs(2);

/// Most descriptors that one request takes: the file and its name, and one or two on the way.
const ONE_REQUEST: usize = 4;

#[derive(Default)]
struct State {
    /// How often the guest has given something back.
    given_back: u64,
    /// What that was when somebody had waited in vain.
    hopeless: Option<u64>,
    /// Requests that wait.
    waiting: usize,
}

/// Who waits for descriptors, and who brings them.
#[derive(Default)]
pub(crate) struct Room {
    state: Mutex<State>,
    changed: Condvar,
}

impl Room {
    /// Runs `f`, and again after each descriptor that the guest gives back as long as there were none for it.
    ///
    /// # Errors
    /// Those of `f`: `EMFILE` after [`PATIENCE`], or at once if the guest has given nothing back since that was waited for before.
    pub fn find<R>(&self, mut f: impl FnMut() -> io::Result<R>) -> io::Result<R> {
        // Nearly always there is room at once.
        let mut deadline = None;
        loop {
            let seen = self.lock().given_back;
            match f() {
                Err(e) if is_full(&e) => {
                    let deadline = *deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
                    self.wait(seen, deadline, e)?;
                }
                done => return done,
            }
        }
    }

    /// Waits until there is room for a request that cannot be repeated, since half of it would be done.
    ///
    /// # Errors
    /// Like [`find`](Self::find).
    pub fn ensure(&self) -> io::Result<()> {
        let any = io::stderr();
        self.find(|| {
            let probe = || rustix::io::fcntl_dupfd_cloexec(&any, 0);
            let free: Result<Vec<_>, _> = std::iter::repeat_with(probe).take(ONE_REQUEST).collect();
            Ok(free.map(drop)?)
        })
    }

    /// The guest has forgotten or closed a file.
    pub fn given_back(&self) {
        let mut state = self.lock();
        state.given_back += 1;
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Waits until something has been given back since `seen`, or returns `full`.
    fn wait(&self, seen: u64, deadline: Instant, full: io::Error) -> io::Result<()> {
        let mut state = self.lock();
        while state.given_back == seen {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.hopeless == Some(seen) {
                state.hopeless = Some(seen);
                return Err(full);
            }
            state.waiting += 1;
            let woken = self.changed.wait_timeout(state, left);
            (state, _) = woken.unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// There are no descriptors left.
pub(crate) fn is_full(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EMFILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> io::Error {
        io::Error::from_raw_os_error(libc::EMFILE)
    }

    #[test]
    fn who_finds_none_goes_on_when_one_is_given_back() {
        let room = Room::default();
        let mut tries = 0;
        // Given back between the failure and the wait: not missed.
        let found = room.find(|| {
            tries += 1;
            if tries < 3 {
                room.given_back();
                return Err(full());
            }
            Ok(tries)
        });
        assert_eq!(found.unwrap(), 3);
        let other = room.find(|| Err::<(), _>(io::Error::from_raw_os_error(libc::ENOENT)));
        assert_eq!(other.unwrap_err().raw_os_error(), Some(libc::ENOENT));
        room.ensure().unwrap();
    }

    #[test]
    fn nobody_waits_twice_for_a_guest_that_forgets_nothing() {
        let room = Room::default();
        let in_vain = |room: &Room| {
            let mut tries = 0;
            let found = room.find(|| {
                tries += 1;
                Err::<(), _>(full())
            });
            assert!(is_full(&found.unwrap_err()));
            tries
        };
        assert_eq!(in_vain(&room), 1);
        assert_eq!(room.lock().hopeless, Some(0));
        // At once: with a deadline that nothing ends it would be for good.
        assert!(room.wait(0, Instant::now() + Duration::from_secs(86_400), full()).is_err());
        room.given_back();
        assert_eq!(in_vain(&room), 1, "it may hope again");
        assert_eq!(room.lock().hopeless, Some(1));
    }
}
