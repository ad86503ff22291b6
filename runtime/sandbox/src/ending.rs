//! How a sandbox ended, told to those who wait for it.
//!
//! Each sandbox has a file that is blank until its end. Waiters hold it open: they are woken when
//! it is written, and can still read it when `--rm` has removed the directory. Its room on the disk is taken
//! at the start: the end can be told on a disk that has become full.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde::{Deserialize, Serialize};

use crate::procid::{PidFd, ProcessId};

/// The file's name in the sandbox's directory.
pub const ENDING_FILE: &str = "ending";

/// Bytes that are kept for it: enough for any reason of ours, which are a line.
const ROOM: usize = 1024;

/// How a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// The exit code that the user sees.
    pub exit_code: i32,
    /// A memory limit ended the process.
    pub oom_killed: bool,
    /// Why it ended, if not by itself.
    pub reason: Option<String>,
}

/// Makes the blank file.
pub fn prepare(dir: &Path) -> io::Result<()> {
    File::create(dir.join(ENDING_FILE))?.write_all(&[b' '; ROOM])
}

/// What it says, if the sandbox in `dir` has ended.
pub fn look(dir: &Path) -> Option<Ending> {
    serde_json::from_slice(&std::fs::read(dir.join(ENDING_FILE)).ok()?).ok()
}

/// Writes it and so wakes the waiters. In place: they hold this very file.
pub fn announce(dir: &Path, ending: &Ending) -> io::Result<()> {
    let mut file = File::options().write(true).open(dir.join(ENDING_FILE))?;
    file.write_all(&serde_json::to_vec(ending)?)
}

/// Waits for one sandbox to end.
#[derive(Debug)]
pub struct Waiter {
    file: File,
    inotify: Inotify,
    owner: Option<PidFd>,
}

/// What a waiter learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Waited {
    /// It ended.
    Ended(Ending),
    /// Its front door ended without a word; the state has to be recovered.
    OwnerGone,
    /// The time is over.
    Timeout,
    /// The other descriptor became readable.
    Other,
}

impl Waiter {
    /// Waits for the sandbox in `dir`, whose front door is `owner`.
    pub fn new(dir: &Path, owner: ProcessId) -> io::Result<Self> {
        let file = File::open(dir.join(ENDING_FILE))?;
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        // By descriptor, so that file and watch are the same even if the directory goes away.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        inotify.add_watch(path.as_str(), AddWatchFlags::IN_CLOSE_WRITE)?;
        Ok(Self { file, inotify, owner: owner.open()? })
    }

    fn read(&mut self) -> io::Result<Option<Ending>> {
        let mut text = String::new();
        self.file.seek(SeekFrom::Start(0))?;
        self.file.read_to_string(&mut text)?;
        // Half written is not yet written: the closing of the file wakes us again.
        Ok(serde_json::from_str(&text).ok())
    }

    /// Waits until `deadline`, or for ever.
    pub fn wait(&mut self, deadline: Option<Instant>) -> io::Result<Waited> {
        self.wait_or(deadline, None)
    }

    /// The same, or until `other` is readable.
    pub fn wait_or(
        &mut self,
        deadline: Option<Instant>,
        other: Option<BorrowedFd<'_>>,
    ) -> io::Result<Waited> {
        loop {
            let owner_gone = match &self.owner {
                Some(owner) => owner.wait_ended(Duration::ZERO)?,
                None => true,
            };
            // Read after looking at the owner: what it wrote before it ended counts.
            if let Some(ending) = self.read()? {
                return Ok(Waited::Ended(ending));
            }
            if owner_gone {
                return Ok(Waited::OwnerGone);
            }
            let timeout = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return Ok(Waited::Timeout),
                Some(left) => {
                    let millis = left.as_millis().saturating_add(1);
                    PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
                }
                None => PollTimeout::NONE,
            };
            let mut fds = vec![PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
            fds.extend(other.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            if let Some(owner) = &self.owner {
                fds.push(PollFd::new(owner.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
            if other.is_some() && fds.get(1).and_then(PollFd::any).unwrap_or(false) {
                return Ok(Waited::Other);
            }
            match self.inotify.read_events() {
                Ok(_) | Err(nix::errno::Errno::EAGAIN) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ending() -> Ending {
        Ending { exit_code: 3, oom_killed: false, reason: Some("why".into()) }
    }

    #[test]
    fn what_is_told_fits_into_the_room_that_was_kept() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(look(dir.path()), None);
        prepare(dir.path()).unwrap();
        assert_eq!(look(dir.path()), None, "blank");
        let size = || std::fs::metadata(dir.path().join(ENDING_FILE)).unwrap().len();
        let before = size();
        let reason = Some("its monitor process 4194304 was ended by SIGKILL ".repeat(10));
        let ending = Ending { reason, ..ending() };
        announce(dir.path(), &ending).unwrap();
        assert_eq!((look(dir.path()), size()), (Some(ending), before));
    }

    #[test]
    fn waiter_learns_the_ending_even_if_the_directory_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path()).unwrap();
        let mut waiter = Waiter::new(dir.path(), ProcessId::current().unwrap()).unwrap();
        let path = dir.path().to_owned();
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            announce(&path, &ending()).unwrap();
            std::fs::remove_dir_all(&path).unwrap();
        });
        assert_eq!(waiter.wait(None).unwrap(), Waited::Ended(ending()));
        writer.join().unwrap();
    }

    #[test]
    fn waiting_has_a_limit_and_ends_with_the_owner() {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path()).unwrap();
        let me = ProcessId::current().unwrap();
        let mut waiter = Waiter::new(dir.path(), me).unwrap();
        let soon = Instant::now() + Duration::from_millis(20);
        assert_eq!(waiter.wait(Some(soon)).unwrap(), Waited::Timeout);
        let gone = ProcessId { start: me.start + 1, ..me };
        let mut waiter = Waiter::new(dir.path(), gone).unwrap();
        assert_eq!(waiter.wait(None).unwrap(), Waited::OwnerGone);
        announce(dir.path(), &ending()).unwrap();
        assert_eq!(waiter.wait(None).unwrap(), Waited::Ended(ending()));
    }
}
