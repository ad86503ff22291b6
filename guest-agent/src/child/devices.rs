//! Device nodes and the links of /dev that every container has (runtime-spec, config-linux.md,
//! "Default Devices"), and those that the specification adds.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Uid, chmodat, chownat, makedev, mknodat, statat, symlinkat,
    unlinkat,
};

use crate::error::{Context, Error, Result};
use crate::mountapi::{Target, attach, clone_tree, open_or_create};

/// Name below /dev, major, minor.
const DEFAULT: &[(&str, u32, u32)] = &[
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// Link below /dev, target.
const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

struct Node {
    path: PathBuf,
    kind: FileType,
    device: u64,
    mode: u32,
    owner: (u32, u32),
}

/// Creates what every container has below `root`. The caller has set the umask to 0.
pub fn make_defaults(root: BorrowedFd<'_>) -> Result<()> {
    for (name, major, minor) in DEFAULT {
        let node = Node {
            path: Path::new("/dev").join(name),
            kind: FileType::CharacterDevice,
            device: makedev(*major, *minor),
            mode: 0o666,
            owner: (0, 0),
        };
        make(root, &node)?;
    }
    link_all(root)
}

/// Creates the specification's devices below `root`. The caller has set the umask to 0.
pub fn make_all(root: BorrowedFd<'_>, devices: &[LinuxDevice]) -> Result<()> {
    for device in devices {
        make(root, &node_of(device)?)?;
    }
    Ok(())
}

fn node_of(device: &LinuxDevice) -> Result<Node> {
    let path = device.path().clone();
    let invalid = |what: &str| Error::Invalid(format!("linux.devices[{}]: {what}", path.display()));
    let number = |n: i64, what| u32::try_from(n).map_err(|_| invalid(what));
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => return Err(invalid("type \"a\" is not one of a single device")),
    };
    let device_number = if kind == FileType::Fifo {
        0
    } else {
        makedev(
            number(device.major(), "major number out of range")?,
            number(device.minor(), "minor number out of range")?,
        )
    };
    if device.uid() == Some(u32::MAX) || device.gid() == Some(u32::MAX) {
        return Err(invalid("an owner of 4294967295 is no id"));
    }
    Ok(Node {
        kind,
        device: device_number,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        owner: (device.uid().unwrap_or(0), device.gid().unwrap_or(0)),
        path,
    })
}

fn make(root: BorrowedFd<'_>, node: &Node) -> Result<()> {
    let what = || format!("create device {}", node.path.display());
    let name = node.path.file_name().ok_or_else(|| {
        Error::Invalid(format!("linux.devices: {} is no path of a file", node.path.display()))
    })?;
    let parent_path = node.path.parent().unwrap_or(Path::new("/"));
    let parent = open_or_create(root, parent_path, Target::Directory)?;
    let mode = Mode::from_raw_mode(node.mode);
    match mknodat(parent.as_fd(), name, node.kind, mode, node.device) {
        Ok(()) => {}
        Err(rustix::io::Errno::EXIST) => {
            let there = statat(parent.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW).context(what)?;
            // One of the same kind only gets the mode and owner it should have.
            if FileType::from_raw_mode(there.st_mode) != node.kind || there.st_rdev != node.device {
                unlinkat(parent.as_fd(), name, AtFlags::empty()).context(what)?;
                mknodat(parent.as_fd(), name, node.kind, mode, node.device).context(what)?;
            }
        }
        // In a user namespace nodes cannot be made, only those of the guest be shown.
        Err(rustix::io::Errno::PERM) => return bind_of_guest(root, node),
        Err(e) => return Err(Error::system(what(), e)),
    }
    // mknod's mode is cut by default ACLs; ownership is not its business at all.
    chmodat(parent.as_fd(), name, mode, AtFlags::empty()).context(what)?;
    let (uid, gid) = (Uid::from_raw(node.owner.0), Gid::from_raw(node.owner.1));
    chownat(parent.as_fd(), name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).context(what)
}

fn bind_of_guest(root: BorrowedFd<'_>, node: &Node) -> Result<()> {
    let refused = || {
        Error::system(format!("create device {}", node.path.display()), nix::errno::Errno::EPERM)
    };
    let there = rustix::fs::stat(&node.path).map_err(|_| refused())?;
    if there.st_rdev != node.device {
        return Err(refused());
    }
    let target = open_or_create(root, &node.path, Target::File)?;
    let tree = clone_tree(CWD, &node.path, false)?;
    attach(&tree, target.as_fd(), &node.path)
}

fn link_all(root: BorrowedFd<'_>) -> Result<()> {
    let dev = open_or_create(root, Path::new("/dev"), Target::Directory)?;
    for (name, target) in LINKS {
        link(dev.as_fd(), name, target)?;
    }
    // With a devpts of its own the container's /dev/ptmx must be that one's. What an image has
    // there makes way.
    match unlinkat(dev.as_fd(), "ptmx", AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(e) => return Err(Error::system("replace /dev/ptmx", e)),
    }
    link(dev.as_fd(), "ptmx", "pts/ptmx")
}

fn link(dev: BorrowedFd<'_>, name: &str, target: &str) -> Result<()> {
    match symlinkat(target, dev, name) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(Error::system(format!("link /dev/{name}"), e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mountapi::open_path;

    #[test]
    fn wrong_types_and_numbers_are_refused_by_name() {
        let device = |typ, major| {
            let mut device = LinuxDevice::default();
            device.set_path("/dev/x".into()).set_typ(typ).set_major(major);
            node_of(&device).map(drop)
        };
        assert!(device(LinuxDeviceType::C, 1).is_ok());
        for bad in [device(LinuxDeviceType::A, 1), device(LinuxDeviceType::B, -1)] {
            assert!(matches!(bad, Err(Error::Invalid(m)) if m.contains("/dev/x")));
        }
    }

    #[test]
    fn nodes_replace_what_an_image_left_there() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("dev")).unwrap();
        std::fs::write(dir.path().join("dev/null"), "a file").unwrap();
        let root = open_path(dir.path()).unwrap();
        make_defaults(root.as_fd()).unwrap();
        make_defaults(root.as_fd()).unwrap();
        let null = rustix::fs::stat(dir.path().join("dev/null")).unwrap();
        assert_eq!((null.st_rdev, null.st_mode & 0o777), (makedev(1, 3), 0o666));
        let mut device = LinuxDevice::default();
        device.set_path("/dev/null".into()).set_typ(LinuxDeviceType::C);
        device.set_major(1).set_minor(3).set_file_mode(Some(0o600)).set_uid(Some(7));
        make_all(root.as_fd(), &[device]).unwrap();
        let null = rustix::fs::stat(dir.path().join("dev/null")).unwrap();
        assert_eq!((null.st_mode & 0o777, null.st_uid), (0o600, 7), "the specification's mode");
        let ptmx = std::fs::read_link(dir.path().join("dev/ptmx")).unwrap();
        assert_eq!(ptmx, Path::new("pts/ptmx"));
    }
}
