//! The follower's process: its two namespaces, and its wait for what the host mounts.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use caps::Capability;
use mvm_devices::packets::Packets;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};

use super::reconcile::{Mirror, Place};
use super::{Ask, Report};
use crate::tree;
use crate::{confine, sys};

/// How long the owner may take to say what is followed, or to read the answer.
const OWNER: Duration = Duration::from_secs(10);

/// Mounting, going from one namespace to another, and paths through directories of other users.
const NEEDED: [Capability; 3] =
    [Capability::CAP_SYS_ADMIN, Capability::CAP_SYS_CHROOT, Capability::CAP_DAC_READ_SEARCH];

/// Where the host's mounts are in the first namespace.
pub(super) const WATCHED: &str = "watched";

/// Where what is shared is attached, until it is the second namespace's root.
const SERVED: &str = "served";

/// Runs this process as a follower: what [`SUBCOMMAND`](super::SUBCOMMAND) does.
///
/// To be called before the program opens or starts anything. Standard input is the leash.
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn run() -> io::Result<()> {
    sys::close_inherited()?;
    let leash: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
    nix::sys::prctl::set_name(c"mvm-mounts")?;
    sys::ignore_hangup()?;
    let leash = Packets::from(leash);
    let (ask, _): (Ask, _) =
        leash.receive(Some(Instant::now() + OWNER)).map_err(io::Error::other)?;
    match prepare(&ask) {
        Ok(mirror) => {
            let fds = [mirror.served.root.as_fd(), mirror.served.namespace.as_fd()];
            leash.send(&Report::Ready, &fds, OWNER).map_err(io::Error::other)?;
            watch(&leash, mirror)
        }
        Err(error) => {
            let report = Report::Failed { message: error.to_string() };
            leash.send(&report, &[], OWNER).map_err(io::Error::other)
        }
    }
}

/// Makes both namespaces. The process has one thread, and is in the first one then.
fn prepare(ask: &Ask) -> io::Result<Mirror> {
    let path = PathBuf::from(std::ffi::OsString::from_vec(ask.path.clone()));
    let (top, all) = ask.read_only;
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // The file system of processes, also where nothing is mounted any more.
    let proc = openat(CWD, "/proc", directory, Mode::empty())?;
    tree::enter_namespace(MsFlags::MS_SLAVE)?;
    let source = openat(CWD, &path, directory, Mode::empty())?;
    let serve = tree::clone_tree(source.as_fd(), false)?;
    sys::set_mount(serve.as_fd(), true, top || all)?;

    let root = tree::memory_directory()?;
    let place = tree::attach_somewhere(&root)?;
    for name in [WATCHED, SERVED] {
        mkdirat(&root, name, Mode::from_raw_mode(0o755))?;
    }
    let recursive = if ask.recursive { MsFlags::MS_REC } else { MsFlags::empty() };
    // Cloned and attached in one step: nothing is missed in between.
    nix::unistd::fchdir(&proc)?;
    let from = format!("self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&source));
    let none: Option<&str> = None;
    mount(Some(from.as_str()), &place.join(WATCHED), none, MsFlags::MS_BIND | recursive, none)?;
    drop(source);
    tree::become_root(root.as_fd())?;
    let watched = Place {
        root: openat(CWD, Path::new("/").join(WATCHED), directory, Mode::empty())?,
        namespace: namespace(&proc)?,
    };
    // What it says is told from where it was opened.
    let table = openat(&proc, "self/mountinfo", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;

    unshare(CloneFlags::CLONE_NEWNS)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none)?;
    let at = openat(CWD, Path::new("/").join(SERVED), directory, Mode::empty())?;
    tree::attach(&serve, at.as_fd())?;
    drop((at, root));
    tree::become_root(serve.as_fd())?;
    let served = Place { root: serve, namespace: namespace(&proc)? };
    watched.enter()?;

    confine::drop_capabilities(&NEEDED).map_err(io::Error::other)?;
    nix::sys::prctl::set_no_new_privs()?;
    let mut mirror = Mirror::new(watched, served, File::from(table), proc, all);
    mirror.update()?;
    Ok(mirror)
}

/// The mount namespace that the process is in.
fn namespace(proc: &OwnedFd) -> io::Result<OwnedFd> {
    Ok(openat(proc, "self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Follows until the leash ends, which it also does when anything comes over it.
fn watch(leash: &Packets, mut mirror: Mirror) -> io::Result<()> {
    loop {
        let mut waits = [
            PollFd::new(leash.as_fd(), PollFlags::POLLIN),
            // proc_pid_mounts(5): a change of the table is an exceptional condition.
            PollFd::new(mirror.table.as_fd(), PollFlags::POLLPRI),
        ];
        match poll(&mut waits, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if waits[0].any().unwrap_or(true) {
            return Ok(());
        }
        mirror.update()?;
    }
}
