//! The specification's mounts, made in the container's mount namespace before its root becomes
//! the root.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};
use oci_spec::runtime::Mount;
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, openat};

use super::copy_up::copy_up;
use super::mount_options::{Options, Recursive, attr, parse, propagation};
use crate::error::{Context, Error, Result};
use crate::mountapi::{self, Target, attach, change, clone_tree, new_mount, open_or_create};

/// Cuts this namespace's mounts off from the agent's (or as the specification's
/// `rootfsPropagation` says) so that nothing mounted here appears there.
pub fn isolate(rootfs_propagation: Option<&str>) -> Result<()> {
    let (kind, _) = match rootfs_propagation {
        None | Some("") => (libc::MS_PRIVATE, true),
        Some(word) => propagation(word).ok_or_else(|| {
            Error::Invalid(format!("linux.rootfsPropagation: {word:?} is no propagation type"))
        })?,
    };
    // A shared root would carry every mount made below back to the agent's namespace: the
    // container's root is made shared once it is the root, see `finish_root`.
    let kind = if kind == libc::MS_SLAVE { MsFlags::MS_SLAVE } else { MsFlags::MS_PRIVATE };
    mount(None::<&str>, "/", None::<&str>, kind | MsFlags::MS_REC, None::<&str>)
        .context(|| "separate the container's mounts".into())
}

/// Covers `rootfs` with a copy of itself. The mounts that a user namespace's first mount
/// namespace starts with are locked: they could not become the root.
pub fn unlock_root(rootfs: &Path) -> Result<()> {
    let tree = clone_tree(CWD, rootfs, true)?;
    attach(&tree, mountapi::open_path(rootfs)?.as_fd(), rootfs)
}

/// Makes all mounts of the specification below `root`. Returns notices.
pub fn make_all(root: BorrowedFd<'_>, mounts: &[Mount]) -> Result<Vec<String>> {
    let mut notices = Vec::new();
    for m in mounts {
        let field = format!("mounts[{}]", m.destination().display());
        let ignored = make(root, m).map_err(|e| e.within(&field))?;
        if !ignored.is_empty() {
            let list = ignored.join(", ");
            notices.push(format!("{field}: ignored, without meaning for a bind mount: {list}"));
        }
    }
    Ok(notices)
}

/// Whether a mount is a /dev that has everything already and belongs to somebody else.
pub fn brings_dev(mounts: &[Mount]) -> bool {
    mounts.iter().any(|m| {
        let is_bind = m.typ().as_deref() == Some("bind")
            || m.options().iter().flatten().any(|o| matches!(o.as_str(), "bind" | "rbind"));
        is_bind && absolute(m.destination()).components().eq(Path::new("/dev").components())
    })
}

/// Returns the options that were ignored.
fn make(root: BorrowedFd<'_>, m: &Mount) -> Result<Vec<String>> {
    let has_mappings = [m.uid_mappings(), m.gid_mappings()]
        .iter()
        .any(|mappings| mappings.as_ref().is_some_and(|list| !list.is_empty()));
    if has_mappings {
        return Err(Error::Unsupported("uidMappings and gidMappings are not supported".into()));
    }
    let words = m.options().as_deref().unwrap_or_default().iter().map(String::as_str);
    let options = parse(words)?;
    let destination = absolute(m.destination());
    let fs_type = m.typ().as_deref().unwrap_or_default();
    if options.remount {
        return remount(root, &destination, options);
    }
    match (options.bind, fs_type) {
        (Some(recursive), _) => bind(root, m, &destination, &options, recursive)?,
        (None, "bind") => bind(root, m, &destination, &options, Recursive::Yes)?,
        (None, "") => {
            return Err(Error::Invalid("it has neither a type nor the option \"bind\"".into()));
        }
        (None, fs_type) => {
            let source = m.source().as_deref().and_then(Path::to_str);
            file_system(root, fs_type, source, &destination, &options)?;
            return Ok(Vec::new());
        }
    }
    Ok(options.data)
}

/// Changes the attributes of a mount that is there; of a file system nothing but them.
fn remount(root: BorrowedFd<'_>, destination: &Path, options: Options) -> Result<Vec<String>> {
    let mount = mountapi::open_in_root(root, destination)?;
    apply(&mount, destination, &options)?;
    Ok(options.data)
}

/// Opens the directory or file to mount onto, creating it if it is missing.
fn target(root: BorrowedFd<'_>, destination: &Path, kind: Target) -> Result<OwnedFd> {
    let target = open_or_create(root, destination, kind)?;
    let stat = |fd: BorrowedFd<'_>| {
        rustix::fs::fstat(fd).context(|| format!("look at {}", destination.display()))
    };
    let (top, found) = (stat(root)?, stat(target.as_fd())?);
    if (top.st_dev, top.st_ino) == (found.st_dev, found.st_ino) {
        // All that is made after it would be below it.
        return Err(Error::Unsupported("a mount over the root is not supported".into()));
    }
    // The kernel would only say that something is invalid.
    let is_directory = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
    let why = match (kind, is_directory) {
        (Target::Directory, false) => libc::ENOTDIR,
        (Target::File, true) => libc::EISDIR,
        _ => return Ok(target),
    };
    Err(Error::System { what: format!("mount onto {}", destination.display()), errno: why })
}

fn absolute(path: &Path) -> PathBuf {
    Path::new("/").join(path)
}

fn bind(
    root: BorrowedFd<'_>,
    m: &Mount,
    destination: &Path,
    options: &Options,
    recursive: Recursive,
) -> Result<()> {
    let source = m
        .source()
        .as_deref()
        .ok_or_else(|| Error::Invalid("a bind mount needs a source".into()))?;
    let metadata = std::fs::metadata(source)
        .context(|| format!("bind source {} in the guest", source.display()))?;
    let kind = if metadata.is_dir() { Target::Directory } else { Target::File };
    let target = target(root, destination, kind)?;
    let tree = clone_tree(CWD, source, recursive == Recursive::Yes)?;
    place(&tree, target.as_fd(), destination, options)
}

fn file_system(
    root: BorrowedFd<'_>,
    fs_type: &str,
    source: Option<&str>,
    destination: &Path,
    options: &Options,
) -> Result<()> {
    let target = target(root, destination, Target::Directory)?;
    // "cgroup" in a specification means the hierarchy that the guest has, which is version 2.
    let fs_type = if fs_type == "cgroup" { "cgroup2" } else { fs_type };
    let mut data: Vec<&str> = options
        .data
        .iter()
        .map(String::as_str)
        // Options of the version 1 hierarchy that specifications still carry.
        .filter(|word| fs_type != "cgroup2" || word.starts_with("memory_") || *word == "nsdelegate")
        .collect();
    // A device that cannot be written cannot be mounted for writing, read-only mount or not.
    if options.set & attr::RDONLY != 0 && source.is_some_and(|s| s.starts_with("/dev/")) {
        data.push("ro");
    }
    let mounted = match new_mount(fs_type, source, &data, 0) {
        // It shows a network namespace, and a user namespace without one of its own may not have
        // one made: the guest's is shown then.
        Err(Error::System { errno: libc::EPERM, .. }) if fs_type == "sysfs" => {
            clone_tree(CWD, Path::new("/sys"), true)?
        }
        other => other?,
    };
    if options.copy_up {
        if fs_type != "tmpfs" {
            return Err(Error::Invalid("option \"tmpcopyup\" is for a tmpfs".into()));
        }
        let has_mode = data.iter().any(|word| word.starts_with("mode="));
        copy_up(target.as_fd(), mounted.as_fd(), has_mode)?;
    }
    place(&mounted, target.as_fd(), destination, options)
}

/// Applies the options to a detached mount and attaches it.
fn place(
    tree: &OwnedFd,
    target: BorrowedFd<'_>,
    destination: &Path,
    options: &Options,
) -> Result<()> {
    apply(tree, destination, options)?;
    attach(tree, target, destination)?;
    for (kind, recursive) in &options.propagation {
        change(tree, *recursive, 0, 0, *kind, destination)?;
    }
    Ok(())
}

fn apply(tree: &OwnedFd, destination: &Path, options: &Options) -> Result<()> {
    if options.set_recursive | options.clear_recursive != 0 {
        change(tree, true, options.set_recursive, options.clear_recursive, 0, destination)?;
    }
    if options.set | options.clear != 0 {
        change(tree, false, options.set, options.clear, 0, destination)?;
    }
    Ok(())
}

/// Makes `rootfs` the root of this mount namespace and lets go of the old one.
pub fn enter_root(rootfs: &Path) -> Result<()> {
    chdir(rootfs).context(|| format!("enter {}", rootfs.display()))?;
    // Both the same: the old root is stacked on the new one and comes off by the unmount.
    pivot_root(".", ".").context(|| "make the container's root the root".into())?;
    umount2(".", MntFlags::MNT_DETACH).context(|| "detach the old root".into())?;
    chdir("/").context(|| "enter the container's root".into())
}

/// What remains once the root is the root: propagation, read-only and masked paths.
pub fn finish_root(
    rootfs_propagation: Option<&str>,
    readonly: bool,
    readonly_paths: &[String],
    masked_paths: &[String],
) -> Result<()> {
    let root = mountapi::open_path(Path::new("/"))?;
    if let Some((kind, recursive)) = rootfs_propagation.and_then(propagation) {
        change(&root, recursive, 0, 0, kind, Path::new("/"))?;
    }
    for path in readonly_paths {
        make_readonly(Path::new(path))?;
    }
    for path in masked_paths {
        mask(Path::new(path))?;
    }
    if readonly {
        change(&root, false, attr::RDONLY, 0, 0, Path::new("/"))?;
    }
    Ok(())
}

/// Paths that do not exist need no protection.
fn existing(path: &Path) -> Result<Option<OwnedFd>> {
    match mountapi::open_path(path) {
        Ok(fd) => Ok(Some(fd)),
        Err(Error::System { errno: libc::ENOENT | libc::ENOTDIR, .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

fn make_readonly(path: &Path) -> Result<()> {
    let Some(target) = existing(path)? else { return Ok(()) };
    let tree = clone_tree(target.as_fd(), Path::new(""), true)?;
    change(&tree, true, attr::RDONLY, 0, 0, path)?;
    attach(&tree, target.as_fd(), path)
}

/// The container's /dev/null, which an image or a mount may have made something else.
fn null() -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = openat(CWD, "/dev/null", flags, Mode::empty()).context(|| "open /dev/null".into())?;
    let stat = rustix::fs::fstat(&fd).context(|| "look at /dev/null".into())?;
    let is_null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == makedev(1, 3);
    if is_null {
        Ok(fd)
    } else {
        Err(Error::Invalid("linux.maskedPaths: the container's /dev/null is none".into()))
    }
}

fn mask(path: &Path) -> Result<()> {
    let Some(target) = existing(path)? else { return Ok(()) };
    let metadata = std::fs::metadata(path).context(|| format!("mask {}", path.display()))?;
    let cover = if metadata.is_dir() {
        new_mount("tmpfs", Some("tmpfs"), &[], attr::RDONLY)?
    } else {
        clone_tree(null()?.as_fd(), Path::new(""), false)?
    };
    attach(&cover, target.as_fd(), path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dev_of_somebody_else_is_seen_however_it_is_written() {
        let brings = |json: &str| brings_dev(&serde_json::from_str::<Vec<Mount>>(json).unwrap());
        assert!(brings(r#"[{"destination":"/dev/","source":"/dev","options":["rbind"]}]"#));
        assert!(brings(r#"[{"destination":"/dev","source":"/dev","type":"bind"}]"#));
        assert!(!brings(r#"[{"destination":"/dev","type":"tmpfs"}]"#));
        assert!(!brings(r#"[{"destination":"/dev/shm","source":"/x","type":"bind"}]"#));
    }
}
