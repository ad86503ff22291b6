//! Mounting by descriptors: a mount is made detached, changed, then attached to an opened
//! directory. No path is looked up twice, so a container's symbolic links cannot redirect it.

use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, readlinkat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use crate::error::{Context, Error, Result};
use crate::sys;

/// Makes a detached mount of a file system.
///
/// `options` are the file system's own, `key=value` or `key`.
pub fn new_mount(
    fs_type: &str,
    source: Option<&str>,
    options: &[&str],
    attributes: u64,
) -> Result<OwnedFd> {
    let context = fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|e| match e {
        rustix::io::Errno::NODEV => {
            Error::Unsupported(format!("mount: no file system type {fs_type:?} in this kernel"))
        }
        e => Error::system(format!("mount {fs_type}"), e),
    })?;
    let refused = |option: &str, e: rustix::io::Errno| {
        let reason = kernel_reason(&context);
        Error::system(format!("mount {fs_type}: option {option:?}{reason}"), e)
    };
    if let Some(source) = source {
        fsconfig_set_string(context.as_fd(), "source", source).map_err(|e| refused("source", e))?;
    }
    for option in options {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(context.as_fd(), key, value),
            None => fsconfig_set_flag(context.as_fd(), *option),
        }
        .map_err(|e| refused(option, e))?;
    }
    let what = || {
        let source = source.map(|s| format!(" of {s}")).unwrap_or_default();
        format!("mount {fs_type}{source}{}", kernel_reason(&context))
    };
    fsconfig_create(context.as_fd()).map_err(|e| Error::system(what(), e))?;
    let flags = MountAttrFlags::from_bits_retain(u32::try_from(attributes).unwrap_or(0));
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)
        .map_err(|e| Error::system(what(), e))
}

/// What the kernel says about a failed mount beyond the error number.
fn kernel_reason(context: &OwnedFd) -> String {
    let mut reason = String::new();
    let Ok(copy) = context.try_clone() else { return reason };
    let mut log = std::fs::File::from(copy);
    let mut line = [0; 256];
    while let Ok(n @ 1..) = log.read(&mut line) {
        // "e overlay: ...": a level letter, then the text.
        let text = String::from_utf8_lossy(&line[..n]);
        reason.push_str(": ");
        reason.push_str(text.get(2..).unwrap_or_default().trim_end());
    }
    reason
}

/// Makes a detached copy of the mount at `path` below `dir`, with the mounts on it if `recursive`.
/// An empty path is `dir` itself.
pub fn clone_tree(dir: BorrowedFd<'_>, path: &Path, recursive: bool) -> Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if path.as_os_str().is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(dir, path, flags).context(|| format!("bind {}", path.display()))
}

/// Attaches a detached mount to an opened directory or file.
pub fn attach(mount: &OwnedFd, target: BorrowedFd<'_>, name: &Path) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount.as_fd(), "", target, "", flags)
        .context(|| format!("mount onto {}", name.display()))
}

/// Makes a file system mount at a path of the agent's own, creating the directory.
pub fn mount_at(
    path: &Path,
    fs_type: &str,
    source: Option<&str>,
    options: &[&str],
    attributes: u64,
) -> Result<()> {
    std::fs::create_dir_all(path).context(|| format!("create {}", path.display()))?;
    let mount = new_mount(fs_type, source, options, attributes)?;
    attach(&mount, open_path(path)?.as_fd(), path)
}

/// Opens a path of the agent's own as a mount target.
pub fn open_path(path: &Path) -> Result<OwnedFd> {
    openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .context(|| format!("open {}", path.display()))
}

/// What to create where a mount target is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A directory.
    Directory,
    /// An empty file.
    File,
}

/// As many symbolic links are followed as by the kernel.
const MAX_LINKS: u32 = 40;

/// Opens `path` below `root`, never outside of it whatever links are there, and creates what is
/// missing. A link to something missing makes that be created.
pub fn open_or_create(root: BorrowedFd<'_>, path: &Path, target: Target) -> Result<OwnedFd> {
    open_or_create_by(root, path, target, MAX_LINKS)
}

fn open_or_create_by(
    root: BorrowedFd<'_>,
    path: &Path,
    target: Target,
    links: u32,
) -> Result<OwnedFd> {
    match open_in_root(root, path) {
        Err(Error::System { errno: libc::ENOENT, .. }) => {}
        other => return other,
    }
    let parent_path = path.parent().unwrap_or(Path::new("/"));
    let parent = open_or_create_by(root, parent_path, Target::Directory, links)?;
    // `x/..` is there once `x` is.
    let Some(Component::Normal(name)) = path.components().next_back() else {
        return open_in_root(root, path);
    };
    let created = match target {
        Target::Directory => mkdirat(parent.as_fd(), name, Mode::from_raw_mode(0o755)),
        Target::File => openat(
            parent.as_fd(),
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY,
            Mode::from_raw_mode(0o644),
        )
        .map(drop),
    };
    match created {
        Ok(()) => open_in_root(root, path),
        Err(rustix::io::Errno::EXIST) => match readlinkat(parent.as_fd(), name, Vec::new()) {
            // Where it leads to is missing, or it would have been opened.
            Ok(link) if links > 0 => {
                let link = Path::new(OsStr::from_bytes(link.as_bytes()));
                open_or_create_by(root, &parent_path.join(link), target, links - 1)
            }
            // Made by somebody else a moment ago.
            _ => open_in_root(root, path),
        },
        Err(e) => Err(Error::system(format!("create {}", path.display()), e)),
    }
}

/// Opens an existing `path` below `root`, links resolved inside of it. An empty path is `root`.
pub fn open_in_root(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new("/") } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
        .context(|| format!("open {} in the container", path.display()))
}

/// Changes a mount's attributes; see [`sys::change_mount`].
pub fn change(
    mount: &OwnedFd,
    recursive: bool,
    set: u64,
    clear: u64,
    propagation: u64,
    name: &Path,
) -> Result<()> {
    sys::change_mount(mount.as_fd(), recursive, set, clear, propagation, None)
        .context(|| format!("change the mount options of {}", name.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn targets_are_created_inside_of_the_root_whatever_links_say() {
        let outside = tempfile::tempdir().unwrap();
        let dir = tempfile::tempdir().unwrap();
        symlink(outside.path(), dir.path().join("abs")).unwrap();
        symlink("../../../../../../..", dir.path().join("up")).unwrap();
        let root = open_path(dir.path()).unwrap();

        open_or_create(root.as_fd(), Path::new("/a/b/../c/file"), Target::File).unwrap();
        assert!(dir.path().join("a/c/file").is_file());
        open_or_create(root.as_fd(), Path::new("/up/made"), Target::Directory).unwrap();
        assert!(dir.path().join("made").is_dir());
        // The link's absolute target means the same path inside of the root, which is missing.
        open_or_create(root.as_fd(), Path::new("/abs/x"), Target::Directory).unwrap();
        assert!(dir.path().join(outside.path().strip_prefix("/").unwrap()).join("x").is_dir());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn links_without_end_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        symlink("loop", dir.path().join("loop")).unwrap();
        // Each of these leads to a longer path that is missing again.
        symlink("grow/x", dir.path().join("grow")).unwrap();
        let root = open_path(dir.path()).unwrap();
        for path in ["/loop", "/loop/x", "/grow", "/grow/x"] {
            let error = open_or_create(root.as_fd(), Path::new(path), Target::Directory);
            assert!(error.is_err(), "{path}");
        }
    }

    #[test]
    fn open_or_create_of_existing_returns_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = open_path(dir.path()).unwrap();
        for _ in 0..2 {
            open_or_create(root.as_fd(), Path::new("x/y"), Target::Directory).unwrap();
        }
        open_or_create(root.as_fd(), Path::new("/"), Target::Directory).unwrap();
    }
}
