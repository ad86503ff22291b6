//! Detached mount trees: what a share is made of.
//!
//! A clone of a mount tree that is attached nowhere (open_tree(2)) has nothing above its root: `..`
//! stays where it is, whoever follows it. It goes with its last descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, fchdir, pivot_root};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, fstat, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use crate::{FILE, sys};

/// Why a path cannot be shared.
#[derive(Debug, thiserror::Error)]
#[error("cannot share {}: {what}: {source}", path.display())]
pub struct TreeError {
    /// The path.
    pub path: PathBuf,
    /// What was being done.
    pub what: &'static str,
    /// What the host said.
    pub source: io::Error,
}

/// A directory to share, best the root of a detached tree.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
    /// What has to stay open as long as the tree is used.
    keep: Vec<OwnedFd>,
}

impl Tree {
    /// A tree that is there as long as `keep` is open.
    pub(crate) fn kept(root: OwnedFd, keep: Vec<OwnedFd>) -> Self {
        Self { root, keep }
    }

    /// Its descriptors, the root first.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        std::iter::once(&self.root).chain(&self.keep).map(OwnedFd::as_fd).collect()
    }
}

impl From<OwnedFd> for Tree {
    fn from(root: OwnedFd) -> Self {
        Self { root, keep: Vec::new() }
    }
}

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// What of a tree cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadOnly {
    /// Nothing is kept from being written.
    #[default]
    No,
    /// The tree itself; mounts below it can be written (`ro` of a recursive bind mount).
    Top,
    /// All of it.
    All,
}

/// How much of a mount tree is cloned, and what of it can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// With the mounts below it; without, what they cover is seen.
    pub recursive: bool,
    /// What cannot be written.
    pub read_only: ReadOnly,
}

impl Extent {
    /// A tree with all that is mounted below it.
    pub fn whole(read_only: bool) -> Self {
        let read_only = if read_only { ReadOnly::All } else { ReadOnly::No };
        Self { recursive: true, read_only }
    }
}

/// Clones the mount tree at `path`, cut off from what the host mounts later. Of a file it makes a
/// directory with that file alone, called [`FILE`].
///
/// Works in a thread with a mount namespace of its own, and leaves nothing in the caller's.
///
/// # Errors
/// The path is not there, or the caller has no CAP_SYS_ADMIN.
pub fn detach(path: &Path, extent: Extent) -> Result<Tree, TreeError> {
    let failed = |what| move |source| TreeError { path: path.into(), what, source };
    let work = || {
        enter_namespace(MsFlags::MS_PRIVATE).map_err(failed("enter a mount namespace"))?;
        detach_here(path, extent)
    };
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(done) => done,
        Err(_) => Err(failed("clone its mounts")(io::ErrorKind::Other.into())),
    })
}

/// Gives the calling thread mounts of its own. `propagation` says what they hear of those that they are
/// copies of.
pub(crate) fn enter_namespace(propagation: MsFlags) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
    let flags = MsFlags::MS_REC | propagation;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)?;
    Ok(())
}

/// [`detach`] in the calling thread's mount namespace, which nobody else may be in.
pub(crate) fn detach_here(path: &Path, extent: Extent) -> Result<Tree, TreeError> {
    let failed =
        |what| move |e: rustix::io::Errno| TreeError { path: path.into(), what, source: e.into() };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let source = openat(CWD, path, flags, Mode::empty()).map_err(failed("open"))?;
    let stat = fstat(&source).map_err(failed("look at it"))?;
    let clone = clone_tree(source.as_fd(), extent.recursive).map_err(failed("clone its mounts"))?;
    let private = |tree: &OwnedFd, recursive, read_only| {
        sys::set_mount(tree.as_fd(), recursive, read_only).map_err(|source| TreeError {
            path: path.into(),
            what: "change the clone of its mounts",
            source,
        })
    };
    private(&clone, true, extent.read_only == ReadOnly::All)?;
    if extent.read_only == ReadOnly::Top {
        private(&clone, false, true)?;
    }
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Ok(clone.into());
    }
    let directory = around_file(&clone).map_err(failed("make a directory around the file"))?;
    // What the guest creates beside the file would be in the host's memory.
    private(&directory, false, true)?;
    Ok(directory.into())
}

/// The directory at `path` as it is, where nothing can be cloned.
pub(crate) fn plain(path: &Path) -> Result<Tree, TreeError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match openat(CWD, path, flags, Mode::empty()) {
        Ok(fd) => Ok(fd.into()),
        Err(e) => {
            let what = match e {
                rustix::io::Errno::NOTDIR => "share a file without a mount namespace",
                _ => "open",
            };
            Err(TreeError { path: path.into(), what, source: e.into() })
        }
    }
}

pub(crate) fn clone_tree(source: BorrowedFd<'_>, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(source, "", flags)
}

/// A detached tree of a directory in memory and the mount `file` in it.
fn around_file(file: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    // Only what is attached somewhere can be mounted on.
    let directory = memory_directory()?;
    let place = attach_somewhere(&directory)?;
    let made = || {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let target = openat(&directory, FILE, flags, Mode::from_raw_mode(0o644))?;
        attach(file, target.as_fd())?;
        clone_tree(directory.as_fd(), true)
    };
    let made = made();
    let _ = umount2(&place, MntFlags::MNT_DETACH);
    made
}

/// A small tmpfs that is attached nowhere.
pub(crate) fn memory_directory() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("size", "64k"), ("nr_inodes", "16"), ("mode", "0755")] {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_create(context.as_fd())?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
}

/// Attaches a detached mount to a directory that any system has.
pub(crate) fn attach_somewhere(mount: &OwnedFd) -> rustix::io::Result<PathBuf> {
    let mut failure = rustix::io::Errno::NOENT;
    for place in ["/tmp", "/run", "/mnt", "/dev", "/etc"] {
        let target = openat(CWD, place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        match target.and_then(|target| attach(mount, target.as_fd())) {
            Ok(()) => return Ok(place.into()),
            Err(e) => failure = e,
        }
    }
    Err(failure)
}

/// Attaches a detached mount to an opened file or directory.
pub(crate) fn attach(mount: &OwnedFd, target: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount.as_fd(), "", target, "", flags)
}

/// Makes an attached mount the root of the calling thread's namespace, and takes away all that was there.
pub(crate) fn become_root(root: BorrowedFd<'_>) -> io::Result<()> {
    fchdir(root)?;
    // The old root is mounted over the new one, and taken away (pivot_root(2)).
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    Ok(())
}

/// A clone of what is at `path`, without the mounts on it.
pub(crate) fn clone_one(path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, path, flags)
}

/// Whether `fd` is a directory.
pub(crate) fn is_directory(fd: BorrowedFd<'_>) -> bool {
    let stat = rustix::fs::statat(fd, "", AtFlags::EMPTY_PATH);
    stat.is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory)
}
