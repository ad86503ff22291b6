//! A small init for containers whose program is none: the container's first process runs the
//! program as its child, passes signals on, reaps orphans and ends as the program ended.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::{Pid, getpid, isatty, setpgid, tcsetpgrp};

use super::credentials::Credentials;
use crate::error::{Context, Result};
use crate::sys::{self, Clone};

/// Forks. In the child, which is to become the program, it returns; the parent stays init for as
/// long as the child lives.
pub fn split(credentials: &Credentials) -> Result<()> {
    let all = SigSet::all();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&all), None).context(|| "block signals".into())?;
    match sys::fork().context(|| "start the program under init".into())? {
        Clone::Child => {
            // A process group of its own: the terminal's signals go to the program, not to both.
            let own = getpid();
            setpgid(own, own).context(|| "make a process group".into())?;
            if isatty(std::io::stdin()).unwrap_or(false) {
                tcsetpgrp(std::io::stdin(), own).context(|| "take the terminal".into())?;
            }
            Ok(())
        }
        Clone::Parent(pid) => {
            // Whether exec works is reported by the child alone, over the descriptor it keeps.
            sys::close_from(3);
            // Whatever the program needs to get on its way, this process does not.
            credentials.settle()?;
            supervise(Pid::from_raw(pid), &all)
        }
    }
}

fn supervise(program: Pid, all: &SigSet) -> ! {
    loop {
        match sys::wait_for_signal(all) {
            Ok(signal) if signal == libc::SIGCHLD => reap(program),
            Ok(signal) => {
                // The program may be gone already: then its end is about to be reaped.
                let _ = sys::send_signal(program.as_raw(), signal);
            }
            Err(Errno::EINTR) => {}
            Err(_) => sys::exit_now(1),
        }
    }
}

/// Reaps all that have ended; ends like the program once it is among them.
fn reap(program: Pid) {
    while let Ok(Some((pid, code, signal))) = sys::reap_one() {
        if pid == program.as_raw() {
            // An init cannot be ended by a signal of its own: 128+n is how shells say it.
            sys::exit_now(if signal == 0 { code } else { 128 + signal });
        }
    }
}
