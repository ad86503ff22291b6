//! A terminal of the container's own devpts.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::unistd::{Gid, Uid, fchown};
use rustix::fs::CWD;

use crate::error::{Context, Result};
use crate::mountapi::{Target, attach, clone_tree, open_or_create, open_path};
use crate::sys;

/// Both ends of a new terminal.
#[derive(Debug)]
pub struct Terminal {
    /// Goes to the agent.
    pub master: OwnedFd,
    /// The process's own.
    pub slave: OwnedFd,
    number: u32,
}

/// Opens a terminal in the current root, which has a devpts at /dev/pts.
pub fn open(columns: u16, rows: u16) -> Result<Terminal> {
    let master: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC)
        .open("/dev/ptmx")
        .context(|| "open /dev/ptmx: a terminal needs a devpts mount at /dev/pts".into())?;
    let number = sys::unlock_terminal(master.as_fd()).context(|| "unlock the terminal".into())?;
    // By the master's descriptor: a path could be anything in a container.
    let slave = sys::terminal_peer(master.as_fd()).context(|| "open the terminal".into())?;
    if columns != 0 && rows != 0 {
        sys::set_window_size(slave.as_fd(), columns, rows)
            .context(|| "set the terminal's size".into())?;
    }
    Ok(Terminal { master: master.into(), slave, number })
}

impl Terminal {
    /// Shows the terminal as /dev/console, as the container's first process has it.
    pub fn bind_console(&self) -> Result<()> {
        let root = open_path(Path::new("/"))?;
        let console = Path::new("/dev/console");
        let target = open_or_create(root.as_fd(), console, Target::File)?;
        let source = format!("/dev/pts/{}", self.number);
        let tree = clone_tree(CWD, Path::new(&source), false)?;
        attach(&tree, target.as_fd(), console)
    }

    /// Makes it the controlling terminal of this session and gives it to the user.
    pub fn take_control(&self, uid: u32) -> Result<()> {
        sys::set_controlling_terminal(self.slave.as_fd())
            .context(|| "make the terminal the controlling one".into())?;
        give(self.slave.as_fd(), uid)
    }
}

/// Gives a terminal or pipe to the user of the process, who may want to open /dev/stdout. Its group
/// is left as it is: devpts sets it.
pub fn give(fd: BorrowedFd<'_>, uid: u32) -> Result<()> {
    let stat = rustix::fs::fstat(fd).context(|| "look at a standard stream".into())?;
    // What is not the process's own, /dev/null for instance, keeps its owner.
    let is_shared_device =
        libc::S_IFCHR == stat.st_mode & libc::S_IFMT && stat.st_rdev == rustix::fs::makedev(1, 3);
    if is_shared_device || stat.st_uid == uid {
        return Ok(());
    }
    fchown(fd, Some(Uid::from_raw(uid)), None::<Gid>)
        .context(|| format!("give a standard stream to user {uid}"))
}
