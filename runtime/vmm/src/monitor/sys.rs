//! The system calls for which there is no safe wrapper.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{SigHandler, Signal, signal};

/// Closes everything but the standard three descriptors. For a process that has opened nothing yet.
pub(super) fn close_inherited() -> io::Result<()> {
    // SAFETY: by contract nothing in this process owns a descriptor above 2 yet.
    let rc = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The end of a terminal is no business of a machine.
pub(super) fn ignore_hangup() -> io::Result<()> {
    // SAFETY: ignoring a signal installs no handler.
    unsafe { signal(Signal::SIGHUP, SigHandler::SigIgn) }?;
    Ok(())
}

/// Gives the new process a session of its own, out of the terminal's reach: Ctrl-C is for the
/// front door.
pub(super) fn own_session(command: &mut Command) {
    // SAFETY: between fork and exec the closure only calls setsid(2), which is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        });
    }
}

/// A descriptor for process `pid`, a child that has not been waited for.
pub(super) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: a system call without pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; it fits, as all do.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
