//! What a new process does between its birth in the zygote and the execution of its program.
//!
//! It is told what to become over its channel ([`Order`]), sets everything up that can be set up
//! from within, reports ([`Report`]), waits for the start and executes. Whatever fails on the way
//! is reported with the step that failed. The order of the steps matters; `become_process` says why.

mod copy_up;
mod credentials;
mod devices;
pub mod hooks;
mod mini_init;
mod mount_options;
mod mounts;
pub mod namespaces;
mod program;
mod sysctl;
mod terminal;
mod tuning;
mod users;

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, chdir, getcwd, setgroups, setresgid, setresuid, setsid};
use oci_spec::runtime::{Hook, LinuxPersonality, LinuxSeccomp};
use serde::{Deserialize, Serialize};

use crate::channel::Channel;
use crate::error::{Context, Error, Result};
use crate::mountapi::{self, Target};
use crate::seccomp;
use crate::spec::{Process, Spec};
use crate::sys;
pub use credentials::capability;
use hooks::Hooks;
use terminal::Terminal;

/// From the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// What to become; the specification follows as bytes. Descriptors: standard input, output and
    /// error, unless it has a terminal; then, to join a container, a pidfd of its first process.
    Become(Job),
    /// Execute the program.
    Start,
}

/// To the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// Everything is set up. With the terminal's master if there is a terminal.
    Ready {
        /// What of the specification is not honoured.
        notices: Vec<String>,
    },
    /// It ends here.
    Failed(Error),
}

/// What to become.
#[derive(Debug, Serialize, Deserialize)]
pub enum Job {
    /// The first process of a container.
    First {
        /// The mounted root in the agent's mount namespace.
        rootfs: PathBuf,
        /// Make the root read-only at the end.
        readonly: bool,
        /// It was born in a new user namespace.
        in_user_namespace: bool,
        /// Be a small init and run the program as a child.
        init: bool,
        /// What `startContainer` hooks are told of the container, if there are any.
        state: Vec<u8>,
    },
    /// A further process of a container.
    Further {
        /// `CLONE_NEW*` of the namespaces to join.
        namespaces: i32,
    },
}

/// The life of a new process. Does not return.
pub fn main(sync: &Channel) -> ! {
    let error = match set_up_and_exec(sync) {
        Ok(Some(never)) => match never {},
        // The agent has given up on this process.
        Ok(None) => sys::exit_now(0),
        Err(error) => error,
    };
    // If even that fails (a seccomp filter may forbid it), the exit code has to tell.
    let code = if sync.send(&Report::Failed(error), &[]).is_ok() { 1 } else { 126 };
    sys::exit_now(code)
}

fn set_up_and_exec(sync: &Channel) -> Result<Option<Infallible>> {
    let Some((Order::Become(job), fds)) = receive(sync)? else { return Ok(None) };
    let spec = Spec::parse(&sync.receive_bytes().context(|| "receive the specification".into())?)?;
    setsid().context(|| "start a session".into())?;
    let mut setup = match job {
        Job::First { rootfs, readonly, in_user_namespace, init, state } => {
            let setup = first(&spec, &rootfs, readonly, in_user_namespace, init)?;
            Setup { hooks: spec.start_hooks().to_vec(), state, ..setup }
        }
        Job::Further { namespaces } => {
            let target = fds.last().ok_or_else(|| Error::Invalid("no process to join".into()))?;
            join(target.as_fd(), namespaces)?;
            let in_user_namespace = namespaces & libc::CLONE_NEWUSER != 0;
            Setup { is_first: false, in_user_namespace, ..Setup::default() }
        }
    };
    if let Some(linux) = &spec.linux {
        setup.seccomp.clone_from(linux.seccomp());
        setup.personality.clone_from(linux.personality());
    }
    setup.streams = fds;
    let process = spec
        .process
        .as_ref()
        .ok_or_else(|| Error::Invalid("process: the specification has none".into()))?;
    become_process(sync, process, setup)
}

fn receive(sync: &Channel) -> Result<Option<(Order, Vec<OwnedFd>)>> {
    sync.receive().context(|| "receive orders".into())
}

/// What `become_process` needs beside the process.
#[derive(Debug, Default)]
struct Setup {
    seccomp: Option<LinuxSeccomp>,
    personality: Option<LinuxPersonality>,
    streams: Vec<OwnedFd>,
    notices: Vec<String>,
    is_first: bool,
    in_user_namespace: bool,
    init: bool,
    hooks: Vec<Hook>,
    state: Vec<u8>,
    /// The protection of the root, which comes after all that writes to it.
    finish_root: Option<FinishRoot>,
}

#[derive(Debug)]
struct FinishRoot {
    propagation: Option<String>,
    readonly: bool,
    readonly_paths: Vec<String>,
    masked_paths: Vec<String>,
}

fn first(
    spec: &Spec,
    rootfs: &Path,
    readonly: bool,
    in_user_namespace: bool,
    init: bool,
) -> Result<Setup> {
    if in_user_namespace {
        become_namespace_root()?;
    }
    namespaces::enter(spec)?;
    let linux = spec.linux.clone().unwrap_or_default();
    mounts::isolate(linux.rootfs_propagation().as_deref())?;

    if in_user_namespace {
        mounts::unlock_root(rootfs)?;
    }

    umask(Mode::empty());
    let root = mountapi::open_path(rootfs)?;
    let mounts = spec.mounts.as_deref().unwrap_or_default();
    let notices = mounts::make_all(root.as_fd(), mounts)?;
    if !mounts::brings_dev(mounts) {
        devices::make_defaults(root.as_fd())?;
    }
    devices::make_all(root.as_fd(), linux.devices().as_deref().unwrap_or_default())?;
    umask(Mode::from_bits_truncate(0o022));
    if let Some(process) = &spec.process {
        mountapi::open_or_create(root.as_fd(), &process.cwd, Target::Directory)
            .map_err(|e| e.within("process.cwd"))?;
    }
    drop(root);
    if let Some(parameters) = linux.sysctl() {
        sysctl::set_all(parameters)?;
    }
    mounts::enter_root(rootfs)?;
    let finish_root = Some(FinishRoot {
        propagation: linux.rootfs_propagation().clone(),
        readonly,
        readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        masked_paths: linux.masked_paths().clone().unwrap_or_default(),
    });
    let is_first = true;
    Ok(Setup { notices, is_first, in_user_namespace, init, finish_root, ..Setup::default() })
}

/// The maps are written by the agent before this process is told anything; what is left is to be
/// the namespace's user 0.
fn become_namespace_root() -> Result<()> {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid)
        .and_then(|()| setresuid(uid, uid, uid))
        .and_then(|()| setgroups(&[]))
        .context(|| {
            "become root of the user namespace (linux.uidMappings and gidMappings must map id 0)"
                .into()
        })
}

fn join(target: BorrowedFd<'_>, namespaces: i32) -> Result<()> {
    // Until it is the program, the container's processes may not look into this one or its
    // descriptors.
    nix::sys::prctl::set_dumpable(false).context(|| "hide from the container".into())?;
    setns(target, CloneFlags::from_bits_retain(namespaces))
        .context(|| "join the container's namespaces".into())?;
    if namespaces & libc::CLONE_NEWUSER != 0 {
        become_namespace_root()?;
    }
    chdir("/").context(|| "enter the container's root".into())
}

/// The common end: terminal, identity, program, then the wait for the start.
fn become_process(sync: &Channel, process: &Process, setup: Setup) -> Result<Option<Infallible>> {
    let filters = setup.seccomp.as_ref().map(seccomp::compile).transpose()?;
    let identity = users::resolve(&process.user)?;

    let terminal = attach_streams(process, &setup, identity.uid)?;
    if let Some(finish) = &setup.finish_root {
        mounts::finish_root(
            finish.propagation.as_deref(),
            finish.readonly,
            &finish.readonly_paths,
            &finish.masked_paths,
        )?;
    }
    sys::new_session_keyring();
    tuning::apply(process, setup.personality.as_ref())?;
    let mask = process.user.umask().unwrap_or(0o022);
    umask(Mode::from_bits_truncate(mask));

    // As root first: a directory may be closed to the user and still be the one to start in.
    let entered = chdir(&process.cwd);
    let no_new_privileges = process.no_new_privileges.unwrap_or(false);
    // Without no_new_privs only a privileged process may install a filter. The privilege is kept
    // until then, so that the filter has to let nothing through but the two calls behind it.
    let keep_admin = !no_new_privileges && filters.is_some();
    let (credentials, refused) =
        credentials::assume(&identity, process.capabilities.as_ref(), keep_admin)?;
    if entered.is_err() {
        chdir(&process.cwd).context(|| format!("process.cwd {}", process.cwd.display()))?;
    }
    check_working_directory()?;
    let program = program::prepare(process, identity.home.as_deref())?;
    if no_new_privileges {
        rustix::thread::set_no_new_privs(true).context(|| "set no_new_privs".into())?;
    }

    let Setup { mut notices, streams, init, hooks, state, .. } = setup;
    notices.extend(refused);
    drop(streams);
    report_ready(sync, notices, terminal)?;
    let Some((Order::Start, _)) = receive(sync)? else { return Ok(None) };

    sys::reset_signals();
    sys::close_on_exec_from(3).context(|| "mark descriptors".into())?;
    let (filters, credentials) = (filters.as_ref(), &credentials);
    Hooks { hooks: &hooks, state: &state, filters, credentials }.run()?;
    if init {
        mini_init::split(credentials)?;
        sys::reset_signals();
    }
    if let Some(filters) = filters {
        filters.install()?;
    }
    credentials.settle()?;
    Err(program.exec())
}

fn report_ready(sync: &Channel, notices: Vec<String>, terminal: Option<Terminal>) -> Result<()> {
    let master = terminal.as_ref().map(|t| t.master.as_fd());
    sync.send(&Report::Ready { notices }, master.as_slice())
        .context(|| "report that the process is ready".into())
}

/// Standard streams onto 0, 1 and 2.
fn attach_streams(process: &Process, setup: &Setup, uid: u32) -> Result<Option<Terminal>> {
    let onto = |fd: BorrowedFd<'_>, to| {
        sys::dup_onto(fd, to).context(|| format!("set up standard stream {to}"))
    };
    if process.terminal.unwrap_or(false) {
        let clamp = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
        let (columns, rows) =
            process.console_size.map_or((0, 0), |s| (clamp(s.width()), clamp(s.height())));
        let terminal = terminal::open(columns, rows)?;
        if setup.is_first {
            terminal.bind_console()?;
        }
        terminal.take_control(uid)?;
        for to in 0..3 {
            onto(terminal.slave.as_fd(), to)?;
        }
        return Ok(Some(terminal));
    }
    let [stdin, stdout, stderr, ..] = &setup.streams[..] else {
        return Err(Error::Invalid("the agent gave no standard streams".into()));
    };
    for (to, fd) in [stdin, stdout, stderr].into_iter().enumerate() {
        // In a user namespace pipes of the agent belong to an unmapped user: they cannot be given.
        if !setup.in_user_namespace {
            terminal::give(fd.as_fd(), uid)?;
        }
        onto(fd.as_fd(), i32::try_from(to).unwrap_or(0))?;
    }
    Ok(None)
}

/// A working directory outside of the root would be a way out of the container.
fn check_working_directory() -> Result<()> {
    let now = getcwd().context(|| "process.cwd: not inside of the container's root".into())?;
    if now.is_absolute() {
        Ok(())
    } else {
        Err(Error::Invalid("process.cwd: not inside of the container's root".into()))
    }
}
