//! The system calls that no safe wrapper covers, each behind a safe function.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// Takes ownership of a descriptor that the kernel has just handed out.
pub fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: callers pass descriptors fresh from the kernel that nothing else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Which side of a [`clone_process`] this is.
#[derive(Debug)]
pub enum Clone {
    /// The new process.
    Child,
    /// The old one, with the new one's id.
    Parent(i32),
}

/// Makes a process that shares nothing with this one. `flags` are `CLONE_*` without `CLONE_VM`.
///
/// Must be called by a single-threaded process: the child has a copy of this thread only, and
/// none of the C library's fork handlers run.
pub fn clone_process(flags: i32) -> Result<Clone, Errno> {
    let flags = i64::from(flags | libc::SIGCHLD);
    // SAFETY: without CLONE_VM the child runs on a copy of this stack; all pointers are null and
    // the flags ask for no writes through them.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0_i64, 0_i64, 0_i64, 0_i64) };
    match i32::try_from(Errno::result(pid)?) {
        Ok(0) => Ok(Clone::Child),
        Ok(pid) => Ok(Clone::Parent(pid)),
        Err(_) => Err(Errno::EOVERFLOW),
    }
}

/// `fork`, for a process with only one thread.
pub fn fork() -> Result<Clone, Errno> {
    // SAFETY: see clone_process; the C library's handlers run here in addition.
    match Errno::result(unsafe { libc::fork() })? {
        0 => Ok(Clone::Child),
        pid => Ok(Clone::Parent(pid)),
    }
}

/// Reaps the next child that ends: its id, exit code and the signal that ended it (0 = none).
///
/// Not by a wrapper whose signal type has no real-time signals: the child would be lost.
pub fn wait_for_any_child() -> Result<(i32, i32, i32), Errno> {
    let mut status = 0;
    // SAFETY: writes one integer.
    let pid = Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) })?;
    if libc::WIFSIGNALED(status) {
        Ok((pid, 0, libc::WTERMSIG(status)))
    } else {
        Ok((pid, libc::WEXITSTATUS(status), 0))
    }
}

/// Reaps a child that has ended already, as [`wait_for_any_child`]; `None` if there is none.
pub fn reap_one() -> Result<Option<(i32, i32, i32)>, Errno> {
    let mut status = 0;
    let flags = libc::__WALL | libc::WNOHANG;
    // SAFETY: writes one integer.
    let pid = Errno::result(unsafe { libc::waitpid(-1, &raw mut status, flags) })?;
    Ok(match pid {
        0 => None,
        pid if libc::WIFSIGNALED(status) => Some((pid, 0, libc::WTERMSIG(status))),
        pid => Some((pid, libc::WEXITSTATUS(status), 0)),
    })
}

/// Takes the next of the signals in `set`, all of which are blocked. Real-time ones included.
pub fn wait_for_signal(set: &nix::sys::signal::SigSet) -> Result<i32, Errno> {
    // SAFETY: reads a signal set; no information is asked for.
    Errno::result(unsafe { libc::sigwaitinfo(set.as_ref(), std::ptr::null_mut()) })
}

/// `kill`, real-time signals included.
pub fn send_signal(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: integers only.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Closes every descriptor from `first` on. For a process that uses none of them any more.
pub fn close_from(first: u32) {
    // SAFETY: the callers own no objects for these descriptors that they will use again, and end
    // by `_exit`, which runs no destructors.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
}

/// A descriptor that refers to the process.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: takes two integers.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    i32::try_from(fd).map(own).map_err(|_| Errno::EOVERFLOW)
}

/// Sends a signal to exactly the process that `pidfd` refers to, alive or not.
pub fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<(), Errno> {
    // SAFETY: integers and a null pointer, which the call allows.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<u8>(),
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// Marks every descriptor from `first` on to be closed on exec.
pub fn close_on_exec_from(first: RawFd) -> Result<(), Errno> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    let first = u32::try_from(first).map_err(|_| Errno::EBADF)?;
    // SAFETY: changes a flag of descriptors, closes none.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, CLOSE_RANGE_CLOEXEC) };
    Errno::result(result).map(drop)
}

/// Replaces this process's descriptor `to` by a copy of `from`, kept across exec.
pub fn dup_onto(from: BorrowedFd<'_>, to: RawFd) -> Result<(), Errno> {
    if from.as_raw_fd() == to {
        // dup2 onto itself would leave the close-on-exec flag set.
        // SAFETY: clears the flags of a valid descriptor.
        return Errno::result(unsafe { libc::fcntl(to, libc::F_SETFD, 0) }).map(drop);
    }
    // SAFETY: `to` is one of 0, 1, 2, which no Rust object owns.
    Errno::result(unsafe { libc::dup2(from.as_raw_fd(), to) }).map(drop)
}

/// All signals to their default action and none blocked, as a new program expects.
pub fn reset_signals() {
    // SAFETY: sigaction with SIG_DFL and sigprocmask with an empty set touch no memory of ours.
    unsafe {
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        for signal in 1..=libc::SIGRTMAX() {
            // Fails for SIGKILL and SIGSTOP, and for those the C library keeps: as it should be.
            libc::sigaction(signal, &raw const default, std::ptr::null_mut());
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Makes `terminal` the controlling terminal of this session.
pub fn set_controlling_terminal(terminal: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the argument of TIOCSCTTY is an integer.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// Unlocks the other end of a terminal master and returns its number.
pub fn unlock_terminal(master: BorrowedFd<'_>) -> Result<u32, Errno> {
    let (unlock, mut number) = (0_i32, 0_u32);
    // SAFETY: TIOCSPTLCK reads one integer, TIOCGPTN writes one.
    unsafe {
        Errno::result(libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock))?;
        Errno::result(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number))?;
    }
    Ok(number)
}

/// Opens the other end of a terminal master.
pub fn terminal_peer(master: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) }).map(own)
}

/// Sets a terminal's size in characters.
pub fn set_window_size(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> Result<(), Errno> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
        .map(drop)
}

/// Sets a resource limit of another process.
pub fn set_limit(pid: i32, resource: u32, soft: u64, hard: u64) -> Result<(), Errno> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: prlimit64 reads one rlimit64; the old value is not asked for.
    let result = unsafe { libc::prlimit64(pid, resource, &raw const limit, std::ptr::null_mut()) };
    Errno::result(result).map(drop)
}

/// CPUs are numbered below this.
pub const MAX_CPUS: usize = 1024;

/// Has another process run on these CPUs only.
pub fn set_affinity(pid: i32, cpus: &[usize]) -> Result<(), Errno> {
    let mut mask = [0_u64; MAX_CPUS / 64];
    for cpu in cpus {
        let word = mask.get_mut(cpu / 64).ok_or(Errno::EINVAL)?;
        *word |= 1 << (cpu % 64);
    }
    // SAFETY: reads a bit mask of the given size.
    let result = unsafe {
        libc::syscall(libc::SYS_sched_setaffinity, pid, size_of_val(&mask), mask.as_ptr())
    };
    Errno::result(result).map(drop)
}

/// Changes a mount (or with `recursive` a tree of mounts) that `mount` refers to: attributes to set
/// and clear, propagation (0 = as it is), user namespace for an id-mapped mount.
pub fn change_mount(
    mount: BorrowedFd<'_>,
    recursive: bool,
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let namespace =
        user_namespace.and_then(|fd| u64::try_from(fd.as_raw_fd()).ok()).unwrap_or_default();
    // struct mount_attr
    let attr = [set, clear, propagation, namespace];
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: reads a C string and a mount_attr of the given size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            attr.as_ptr(),
            size_of_val(&attr),
        )
    };
    Errno::result(result).map(drop)
}

/// Brings the loopback interface of this network namespace up.
pub fn loopback_up() -> Result<(), Errno> {
    // SAFETY: a plain system call; the descriptor is owned below.
    let socket = own(Errno::result(unsafe {
        libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)
    })?);
    // SAFETY: an ifreq is plain data, all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    // SAFETY: both requests read and write exactly one ifreq; the union holds flags for both.
    unsafe {
        Errno::result(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request))?;
        #[allow(clippy::cast_possible_truncation)] // IFF_UP is 1.
        {
            request.ifr_ifru.ifru_flags |= libc::IFF_UP as i16;
        }
        Errno::result(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request))?;
    }
    Ok(())
}

/// Gives this process a session keyring of its own.
pub fn new_session_keyring() {
    const KEYCTL_JOIN_SESSION_KEYRING: i32 = 1;
    // SAFETY: integers and a null name, which means an anonymous keyring. A kernel without keys
    // has nothing to separate, so a failure is none.
    unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<u8>());
    }
}

/// Installs a seccomp program on this thread.
pub fn install_seccomp(program: &[seccompiler::sock_filter], flags: u64) -> Result<(), Errno> {
    const SECCOMP_SET_MODE_FILTER: i32 = 1;
    let len = u16::try_from(program.len()).map_err(|_| Errno::EINVAL)?;
    let filter = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: `filter` points to `len` instructions in the kernel's layout, which it only reads.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &raw const filter)
    };
    Errno::result(result).map(drop)
}

/// Sets the I/O priority of this process: class (1 real-time, 2 best-effort, 3 idle) and level.
pub fn set_io_priority(class: u32, level: u32) -> Result<(), Errno> {
    const WHO_PROCESS: i32 = 1;
    let value = (class << 13) | (level & 0x1fff);
    // SAFETY: integers only.
    Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, value) }).map(drop)
}

/// `struct sched_attr` of the kernel.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct SchedAttr {
    /// The structure's size, bytes.
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// For the time-sharing policies.
    pub nice: i32,
    /// For the real-time policies.
    pub priority: u32,
    /// Deadline policy, nanoseconds.
    pub runtime: u64,
    /// Deadline policy, nanoseconds.
    pub deadline: u64,
    /// Deadline policy, nanoseconds.
    pub period: u64,
}

/// Sets this process's scheduling policy.
pub fn set_scheduler(mut attr: SchedAttr) -> Result<(), Errno> {
    attr.size = u32::try_from(size_of::<SchedAttr>()).unwrap_or(0);
    // SAFETY: the kernel reads `size` bytes of the structure.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) })
        .map(drop)
}

/// Sets the domain name of this UTS namespace.
pub fn set_domain_name(name: &str) -> Result<(), Errno> {
    // SAFETY: reads as many bytes as it is told.
    Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// Sets this process's execution domain.
pub fn set_personality(persona: u64) -> Result<(), Errno> {
    // SAFETY: an integer only.
    Errno::result(unsafe { libc::personality(persona) }).map(drop)
}

/// A `bpf` system call with the attribute block `attr`.
pub fn bpf(command: i32, attr: &mut [u64]) -> Result<i32, Errno> {
    let size = size_of_val(attr);
    // SAFETY: the kernel reads and writes within `size` bytes; pointers inside are the caller's
    // and stay valid for the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size) };
    i32::try_from(Errno::result(result)?).map_err(|_| Errno::EOVERFLOW)
}

/// The time of `clock` (`libc::CLOCK_*`), nanoseconds.
pub fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec. The clocks used exist on every kernel, else the time stays 0.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// Sets the wall clock, nanoseconds since 1970.
pub fn set_clock(unix_ns: u64) -> Result<(), Errno> {
    let time = libc::timespec {
        tv_sec: i64::try_from(unix_ns / 1_000_000_000).map_err(|_| Errno::EINVAL)?,
        tv_nsec: i64::try_from(unix_ns % 1_000_000_000).map_err(|_| Errno::EINVAL)?,
    };
    // SAFETY: reads one timespec.
    Errno::result(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) }).map(drop)
}

/// Adds `seed` to the kernel's random pool and credits all its bits.
pub fn add_entropy(random: BorrowedFd<'_>, seed: &[u8]) -> Result<(), Errno> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let len = i32::try_from(seed.len()).map_err(|_| Errno::EINVAL)?;
    // struct rand_pool_info: entropy count in bits, size in bytes, the bytes.
    let mut info = Vec::with_capacity(seed.len() + 8);
    info.extend_from_slice(&len.saturating_mul(8).to_ne_bytes());
    info.extend_from_slice(&len.to_ne_bytes());
    info.extend_from_slice(seed);
    // SAFETY: RNDADDENTROPY reads two integers and then as many bytes as the second one says;
    // RNDRESEEDCRNG takes nothing.
    unsafe {
        Errno::result(libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, info.as_ptr()))?;
        Errno::result(libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG)).map(drop)
    }
}

/// The last `buffer.len()` bytes of the kernel log.
pub fn kernel_log(buffer: &mut [u8]) -> Result<usize, Errno> {
    const SYSLOG_ACTION_READ_ALL: i32 = 3;
    let len = i32::try_from(buffer.len()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: writes at most `len` bytes to the buffer.
    let n = Errno::result(unsafe {
        libc::klogctl(SYSLOG_ACTION_READ_ALL, buffer.as_mut_ptr().cast(), len)
    })?;
    usize::try_from(n).map_err(|_| Errno::EINVAL)
}

/// Replaces this process by a program. Returns only if that fails.
pub fn exec(program: &CStr, args: &[&CStr], env: &[&CStr]) -> Errno {
    let pointers = |strings: &[&CStr]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: a program path and two null-terminated arrays of C strings that outlive the call.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    Errno::last()
}

/// Ends this process at once, without running anything else.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(code) }
}

/// Resets the machine by the keyboard controller's reset line (byte 0xFE to port 0x64).
pub fn reset_machine() -> io::Result<()> {
    const COMMAND_PORT: u16 = 0x64;
    const PULSE_RESET: u8 = 0xfe;
    // SAFETY: asks the kernel for the right to use one port.
    Errno::result(unsafe { libc::ioperm(COMMAND_PORT.into(), 1, 1) })?;
    // SAFETY: the port may be used now; writing it has no effect on memory.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") COMMAND_PORT, in("al") PULSE_RESET, options(nomem, nostack));
    }
    Ok(())
}
