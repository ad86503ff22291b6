//! The system calls for which there is no safe wrapper.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{SigHandler, Signal, signal};

/// `struct mount_attr` (mount_setattr(2)).
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// `MOUNT_ATTR_RDONLY`.
const READ_ONLY: u64 = 1;

/// Makes a detached mount, or all of its tree, private and, if asked for, read-only.
pub(crate) fn set_mount(mount: BorrowedFd<'_>, recursive: bool, read_only: bool) -> io::Result<()> {
    let attr = MountAttr {
        set: if read_only { READ_ONLY } else { 0 },
        clear: 0,
        propagation: libc::MS_PRIVATE,
        user_namespace: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, the structure is as large as said and only read.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Closes everything but the standard three descriptors. For a process that has opened nothing yet.
pub(crate) fn close_inherited() -> io::Result<()> {
    // SAFETY: by contract nothing in this process owns a descriptor above 2 yet.
    let rc = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The end of a terminal is no business of a machine's.
pub(crate) fn ignore_hangup() -> io::Result<()> {
    // SAFETY: ignoring a signal installs no handler.
    unsafe { signal(Signal::SIGHUP, SigHandler::SigIgn) }?;
    Ok(())
}

/// Gives the new process a session of its own, out of the terminal's reach.
pub(crate) fn own_session(command: &mut Command) {
    // SAFETY: between fork and exec the closure only calls setsid(2), which is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        });
    }
}

/// Keeps capabilities when a thread takes another user's identity: the guest has checked what that
/// user may do, groups included, of which the host knows nothing (capabilities(7), "securebits").
pub(crate) fn keep_capabilities() -> io::Result<()> {
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    const LOCKED: libc::c_ulong = 1 << 3;
    // SAFETY: a system call without pointers.
    let rc = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP | LOCKED, 0, 0, 0) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
