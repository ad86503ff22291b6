//! The process that all container processes are born from.
//!
//! The service has threads, and a process that forks while it has threads may do next to nothing
//! before exec. So the agent forks once, before its first thread: the zygote has one thread
//! forever, and setting up a container in its children is ordinary code. It does not execute the
//! agent again, which would cost a start of a program for every container.
//!
//! Children are made with `CLONE_PARENT`: they are the agent's own, which reaps them.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};

use crate::channel::{self, Channel};
use crate::child;
use crate::error::{Context, Error, Result};
use crate::sys::{self, Clone};

const NEW_PID: u8 = 1;
const NEW_USER: u8 = 2;
const JOIN_PID: u8 = 4;

/// What the kernel has to know when it makes the process. Everything else the child does itself.
#[derive(Debug, Default)]
pub struct Birth<'a> {
    /// In a new process-id namespace, as its init.
    pub new_pid_namespace: bool,
    /// In a new user namespace, which then owns its other namespaces.
    pub new_user_namespace: bool,
    /// In this process-id namespace, or in the one of the process that a pidfd names.
    pub pid_namespace: Option<BorrowedFd<'a>>,
}

/// The agent's end.
#[derive(Debug)]
pub struct Zygote {
    socket: Mutex<UnixStream>,
}

impl Zygote {
    /// Forks the zygote. Must be called before the first thread is started.
    pub fn start() -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        match sys::fork()? {
            Clone::Child => {
                drop(ours);
                serve(&theirs)
            }
            Clone::Parent(_) => Ok(Self { socket: Mutex::new(ours) }),
        }
    }

    /// Makes a process that runs [`child::main`] with `sync`. It waits for its configuration there,
    /// so whoever has to know its process id can be told first.
    pub fn spawn(&self, birth: &Birth<'_>, sync: &Channel) -> Result<i32> {
        let mut flags = 0;
        let mut fds = vec![sync.as_fd()];
        if birth.new_pid_namespace {
            flags |= NEW_PID;
        }
        if birth.new_user_namespace {
            flags |= NEW_USER;
        }
        if let Some(fd) = birth.pid_namespace {
            flags |= JOIN_PID;
            fds.push(fd);
        }
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let mut answer = [0; 4];
        channel::send_with_fds(&socket, &[flags], &fds)
            .and_then(|()| socket.read_exact(&mut answer))
            .context(|| "ask the zygote for a process".into())?;
        match i32::from_ne_bytes(answer) {
            pid if pid > 0 => Ok(pid),
            errno => Err(Error::System { what: "create a process".into(), errno: -errno }),
        }
    }
}

/// The zygote's life: one request, one process.
fn serve(socket: &UnixStream) -> ! {
    let own_pid_namespace = std::fs::File::open("/proc/self/ns/pid").ok();
    let mut request = [0];
    // The agent's end being closed means that the agent is gone.
    while let Ok((1, fds)) = channel::receive_with_fds(socket, &mut request) {
        let answer = match bear(request[0], fds, own_pid_namespace.as_ref().map(AsFd::as_fd)) {
            Ok(Birthed::Child(sync)) => child::main(&sync),
            Ok(Birthed::Parent(pid)) => pid,
            Err(errno) => -(errno as i32),
        };
        let mut socket = socket;
        if socket.write_all(&answer.to_ne_bytes()).is_err() {
            break;
        }
    }
    sys::exit_now(0)
}

enum Birthed {
    Child(Channel),
    Parent(i32),
}

fn bear(flags: u8, fds: Vec<OwnedFd>, own: Option<BorrowedFd<'_>>) -> Result<Birthed, Errno> {
    let mut fds = fds.into_iter();
    let sync = fds.next().ok_or(Errno::EBADF)?;
    let mut clone_flags = libc::CLONE_PARENT;
    if flags & NEW_PID != 0 {
        clone_flags |= libc::CLONE_NEWPID;
    }
    if flags & NEW_USER != 0 {
        clone_flags |= libc::CLONE_NEWUSER;
    }
    let join = if flags & JOIN_PID != 0 { Some(fds.next().ok_or(Errno::EBADF)?) } else { None };
    if let Some(target) = &join {
        // Changes where this process's children are born, not this process.
        setns(target, CloneFlags::CLONE_NEWPID)?;
    }
    let born = sys::clone_process(clone_flags);
    if let (Some(_), Some(own)) = (&join, own)
        && !matches!(born, Ok(Clone::Child))
    {
        setns(own, CloneFlags::CLONE_NEWPID)?;
    }
    Ok(match born? {
        Clone::Child => Birthed::Child(sync.into()),
        Clone::Parent(pid) => Birthed::Parent(pid),
    })
}
