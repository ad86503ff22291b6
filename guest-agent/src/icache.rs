//! Keeps what the guest's kernel remembers of shared files below what the host's file server can hold open.
//!
//! Each file that this kernel has in its caches is an open descriptor of the server's, whose number is limited. The kernel
//! knows no such limit: it forgets files when memory is short, which need not be soon. Without descriptors the server
//! could only say EMFILE, to whoever happens to ask for the next file.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::log::warning;

/// Number of inodes in the caches of all file systems, and how many of them nobody uses (proc(5)).
const INODES: &str = "/proc/sys/fs/inode-nr";

/// Where the kernel is told to forget.
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// The page cache goes first: a file of which pages are kept is not forgotten.
const PAGES_AND_INODES: &[u8] = b"3";

/// Files at a time that programs can be thought to come by in a second, at most.
const PER_SECOND: u64 = 100_000;

/// The server needs descriptors for files that are open, too: this share of them is for those.
const SPARE: u64 = 3;

/// Shortest and longest time between two looks.
const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(10);

/// Starts to keep below `limit` files. Only the first call counts: there is one server.
pub fn keep_below(limit: u64) {
    static STARTED: AtomicBool = AtomicBool::new(false);
    if limit == 0 || STARTED.swap(true, Ordering::Relaxed) {
        return;
    }
    let most = limit - limit / SPARE;
    let thread = std::thread::Builder::new().name("icache".into());
    if let Err(e) = thread.spawn(move || watch(most)) {
        warning!("cannot watch the number of files in the caches: {e}");
    }
}

fn watch(most: u64) {
    loop {
        let Some(mut known) = files_known() else {
            warning!("{INODES} does not say how many files are in the caches");
            return;
        };
        if known > most {
            drop_caches();
            known = files_known().unwrap_or(known);
            if known > most {
                // What has still to be written is not forgotten.
                nix::unistd::sync();
                drop_caches();
            }
        }
        std::thread::sleep(pause(most.saturating_sub(known)));
    }
}

fn drop_caches() {
    if let Err(e) = fs::write(Path::new(DROP_CACHES), PAGES_AND_INODES) {
        warning!("cannot drop caches: {e}");
    }
}

fn files_known() -> Option<u64> {
    count(&fs::read_to_string(INODES).ok()?)
}

fn count(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

/// How long `room` lasts, if it is filled as fast as can be thought.
fn pause(room: u64) -> Duration {
    Duration::from_millis(room.saturating_mul(1000) / PER_SECOND).clamp(SHORT, LONG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fuller_the_sooner() {
        assert_eq!(count("1234\t56\n"), Some(1234));
        assert_eq!(count(""), None);
        assert_eq!(pause(0), SHORT);
        assert_eq!(pause(50_000), Duration::from_millis(500));
        assert_eq!(pause(u64::MAX), LONG);
    }
}
