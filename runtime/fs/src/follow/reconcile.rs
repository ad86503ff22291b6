//! Makes the served tree like the watched one.
//!
//! Paths are the host's, and the guest may rename directories and make links while they are walked: no link is
//! followed, nothing above a tree's root is reached, and what is found is cloned only if it is the mount that was
//! looked for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags, openat, openat2, statx};

use super::process::WATCHED;
use crate::mounts::{self, Mount};
use crate::{sys, tree};

/// A tree, and the mount namespace that it is in.
pub(super) struct Place {
    pub root: OwnedFd,
    pub namespace: OwnedFd,
}

impl Place {
    /// Makes its namespace that of the calling thread, which shares its directory with no other.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.namespace, CloneFlags::CLONE_NEWNS)?)
    }

    /// What is at `path` in it, by the way that has no links in it.
    fn find(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
    }
}

/// What a mount of the host is known by. While its clone is there, its device is no other file system's,
/// so that two that come one after the other at one place are told apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    /// How deep it is: what is above others comes before them.
    depth: usize,
    path: PathBuf,
    id: u64,
    device: String,
    root: PathBuf,
}

impl Key {
    /// Of a mount below the root of the watched tree.
    fn of(mount: Mount) -> Option<Self> {
        let path = mount.point.strip_prefix(Path::new("/").join(WATCHED)).ok()?.to_owned();
        let depth = path.components().count();
        let (id, device, root) = (mount.id, mount.device, mount.root);
        (depth > 0).then_some(Self { depth, path, id, device, root })
    }
}

/// Both trees.
pub(super) struct Mirror {
    pub watched: Place,
    pub served: Place,
    /// Mounts of the watched one's namespace.
    pub table: File,
    /// The file system of processes.
    proc: OwnedFd,
    read_only: bool,
    /// The clones that are attached to the served tree.
    clones: BTreeMap<Key, OwnedFd>,
}

impl Mirror {
    /// Nothing is mounted below the served tree's root yet.
    pub fn new(watched: Place, served: Place, table: File, proc: OwnedFd, read_only: bool) -> Self {
        Self { watched, served, table, proc, read_only, clones: BTreeMap::new() }
    }

    /// Takes off what is gone, and mounts what has come.
    ///
    /// # Errors
    /// The table cannot be read. A mount that cannot be made is left out: it may be gone again, or covered.
    pub fn update(&mut self) -> io::Result<()> {
        let mut text = Vec::new();
        self.table.seek(SeekFrom::Start(0))?;
        self.table.read_to_end(&mut text)?;
        let now: BTreeSet<Key> = mounts::parse(&text).into_iter().filter_map(Key::of).collect();
        let gone: Vec<Key> = self.clones.keys().filter(|key| !now.contains(key)).cloned().collect();
        // The innermost first.
        for key in gone.into_iter().rev() {
            if let Some(clone) = self.clones.remove(&key) {
                let _ = self.take_off(&clone);
            }
        }
        for key in now {
            if !self.clones.contains_key(&key)
                && let Ok(clone) = self.put_on(&key)
            {
                self.clones.insert(key, clone);
            }
        }
        self.watched.enter()
    }

    fn put_on(&self, key: &Key) -> io::Result<OwnedFd> {
        self.watched.enter()?;
        let found = self.watched.find(&key.path)?;
        let about = statx(&found, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
        if about.stx_mnt_id != key.id {
            return Err(io::ErrorKind::NotFound.into());
        }
        let clone = tree::clone_tree(found.as_fd(), false)?;
        // It would be in use, and the host could not unmount it.
        drop(found);
        sys::set_mount(clone.as_fd(), true, self.read_only)?;
        self.served.enter()?;
        let target = self.served.find(&key.path)?;
        tree::attach(&clone, target.as_fd())?;
        Ok(clone)
    }

    fn take_off(&self, clone: &OwnedFd) -> io::Result<()> {
        self.served.enter()?;
        nix::unistd::fchdir(&self.proc)?;
        let path = format!("self/fd/{}", clone.as_raw_fd());
        umount2(path.as_str(), MntFlags::MNT_DETACH)?;
        self.write_out(&path)
    }

    /// Has the kernel write out a file system, as an unmount would that lets go of it: the guest may have files of it open,
    /// or in its caches.
    fn write_out(&self, path: &str) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(&self.proc, path, flags, Mode::empty())?;
        let (apart, wait) = channel::<()>();
        // A disk may be slow, and a server of files may never answer.
        std::thread::Builder::new().name("sync".into()).spawn(move || {
            // Whoever shares a directory with others cannot enter a mount namespace.
            let done = unshare(CloneFlags::CLONE_FS);
            drop(apart);
            if done.is_ok() {
                let _ = rustix::fs::syncfs(file.as_fd());
            }
        })?;
        let _ = wait.recv();
        Ok(())
    }
}
