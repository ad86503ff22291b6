//! Joining two connections: what comes from one goes to the other, both ways.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Bytes copied at a time.
const BLOCK: usize = 32 << 10;

/// Copies both ways until both have said all, or one is gone, which ends the other too. An end of one
/// direction is passed on as such. Nothing is stored: who does not read makes the other wait.
///
/// # Errors
/// There is no thread or descriptor for it. Both are closed then, as after any end.
pub fn relay(one: &UnixStream, other: &UnixStream) -> io::Result<()> {
    let (from, to) = (one.try_clone()?, other.try_clone()?);
    let forth = move || copy(&from, &to);
    let forth = std::thread::Builder::new().name("relay".into()).spawn(forth);
    if forth.is_ok() {
        copy(other, one);
    }
    let forth = forth.map(|thread| drop(thread.join()));
    hang_up([one, other]);
    forth
}

fn hang_up(both: [&UnixStream; 2]) {
    for stream in both {
        // It may be gone already.
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn copy(mut from: &UnixStream, mut to: &UnixStream) {
    let mut block = vec![0; BLOCK];
    loop {
        let mut fds = [
            PollFd::new(from.as_fd(), PollFlags::POLLIN),
            // Only a full hang-up: it may well have ended its own half.
            PollFd::new(to.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(_) => break,
        }
        if fds[1].any().unwrap_or(true) {
            break;
        }
        match from.read(&mut block) {
            Ok(0) => {
                // It may be gone already.
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            Ok(n) => {
                if to.write_all(&block[..n]).is_err() {
                    break;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    hang_up([from, to]);
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// Two ends whose other ends are joined.
    fn joined() -> (UnixStream, UnixStream, thread::JoinHandle<()>) {
        let ((left, one), (other, right)) =
            (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let thread = thread::spawn(move || relay(&one, &other).unwrap());
        (left, right, thread)
    }

    #[test]
    fn an_end_of_one_direction_leaves_the_other() {
        let (mut left, mut right, thread) = joined();
        left.write_all(b"ask").unwrap();
        left.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        right.read_to_string(&mut text).unwrap();
        assert_eq!(text, "ask");
        let answer = vec![7; 1 << 20];
        let writer = thread::spawn({
            let answer = answer.clone();
            move || right.write_all(&answer).unwrap()
        });
        let mut got = Vec::new();
        left.read_to_end(&mut got).unwrap();
        assert!(got == answer);
        writer.join().unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn who_goes_takes_the_other_along() {
        for first in [true, false] {
            let (left, right, thread) = joined();
            let (gone, mut stays) = if first { (left, right) } else { (right, left) };
            drop(gone);
            assert_eq!(stays.read(&mut [0]).unwrap(), 0);
            thread.join().unwrap();
        }
    }
}
