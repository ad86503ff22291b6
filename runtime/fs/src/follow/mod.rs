//! Trees that follow the host: what is mounted or unmounted below their source later is so in the guest
//! too (mount propagation from host to container, `rslave`).
//!
//! The server is confined and cannot mount. For each such tree there is a process of its own, the
//! *follower*, which hears nothing of the guest, and has two mount namespaces:
//!
//! * In the first there is a copy of the source's mounts that is a slave of the host's (mount_namespaces(7)):
//!   the kernel repeats in it what the host does. Nobody opens a file there. That matters: an unmount
//!   on the host fails with EBUSY if a slave is in use, and a guest's kernel keeps files in its caches
//!   for long.
//! * In the second, whose root it is, there is the tree that is shared, made of private clones. The follower
//!   mounts there what appears in the first one, and takes off what disappears. What the guest still has open there lives on,
//!   as after a lazy unmount.
//!
//! The tree has the follower on a leash: a socket that ends it when the share ends, or its server.

mod process;
mod reconcile;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mvm_devices::packets::Packets;
use serde::{Deserialize, Serialize};

use crate::sys;
use crate::tree::{Extent, ReadOnly, Tree, TreeError};

pub use process::main;

/// The hidden subcommand under which the program runs as a follower.
pub const SUBCOMMAND: &str = "mount-follower";

/// The follower's name in the process list, before the source.
pub const PROCESS_NAME: &str = "mvm-mounts";

/// How long it may take until the tree is there.
const READY: Duration = Duration::from_secs(30);

/// What is to be followed.
#[derive(Debug, Serialize, Deserialize)]
struct Ask {
    /// Bytes of the path.
    path: Vec<u8>,
    recursive: bool,
    /// The top alone, or all, cannot be written.
    read_only: (bool, bool),
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "report")]
enum Report {
    /// The tree and its namespace come along.
    Ready,
    Failed {
        message: String,
    },
}

/// Clones the mount tree at the directory `path`, and keeps the clone like it. `program` is run as
/// `PROGRAM mount-follower`: usually this one, `/proc/self/exe`.
///
/// # Errors
/// It is no directory, or the host refuses: mounting is root's.
pub fn follow(path: &Path, extent: Extent, program: &Path) -> Result<Tree, TreeError> {
    let failed = |what| move |source| TreeError { path: path.into(), what, source };
    let (leash, theirs) = Packets::pair().map_err(failed("socketpair"))?;
    let mut command = Command::new(program);
    command
        .arg0(format!("{PROCESS_NAME}: {}", path.display()))
        .arg(SUBCOMMAND)
        .current_dir("/")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    sys::own_session(&mut command);
    let mut child = command.spawn().map_err(failed("start the process that follows its mounts"))?;
    // Keeps the other end open no longer than the child itself.
    drop(command);
    // It ends by itself when its leash does; somebody has to take note of that.
    let reaper = std::thread::Builder::new().name("mounts".into());
    reaper.spawn(move || child.wait()).map_err(failed("start a thread"))?;
    let talk = || -> io::Result<(Report, Vec<OwnedFd>)> {
        let ask = Ask {
            path: path.as_os_str().as_bytes().to_vec(),
            recursive: extent.recursive,
            read_only: (extent.read_only != ReadOnly::No, extent.read_only == ReadOnly::All),
        };
        leash.send(&ask, &[], READY).map_err(io::Error::other)?;
        leash.receive(Some(Instant::now() + READY)).map_err(io::Error::other)
    };
    let what = "follow its mounts";
    match talk().map_err(failed(what))? {
        (Report::Ready, fds) => {
            let mut fds = fds.into_iter();
            let absent = || failed(what)(io::Error::other("no tree came"));
            let root = fds.next().ok_or_else(absent)?;
            // The namespace stays, and with it what is mounted, even if the process is lost.
            let keep = fds.chain([OwnedFd::from(leash)]).collect();
            Ok(Tree::kept(root, keep))
        }
        (Report::Failed { message }, _) => Err(failed(what)(io::Error::other(message))),
    }
}

/// Whether what the host mounts below `path` can be heard of at all: the mount that it is in is shared, or a
/// slave.
///
/// # Errors
/// The path is not there.
pub fn can_be_followed(path: &Path) -> io::Result<bool> {
    let path: PathBuf = path.canonicalize()?;
    let mounts = crate::mounts::parse(&std::fs::read("/proc/self/mountinfo")?);
    Ok(crate::mounts::of(&mounts, &path).is_some_and(|mount| mount.hears))
}
