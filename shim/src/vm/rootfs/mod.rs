//! A container's root on the host: what containerd's snapshotter hands over, mounted at the bundle's
//! `rootfs`.

mod disk;
mod options;
mod overlay;

use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::backend::RootMount;
pub use disk::{Disk, Module, disk};
use options::options;
use overlay::mount_from_near;

/// mount(2) takes one page of data, the terminating zero included.
const MAX_DATA: usize = 4095;

/// How long an unmount is tried again for while something on the host uses the tree.
const BUSY: Duration = Duration::from_millis(500);

/// Most mounts on one another that are taken off.
const MAX_STACK: usize = 64;

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A mount was refused.
    #[error("cannot mount {kind} {from} at {}: {source}", at.display())]
    Mount {
        /// The type.
        kind: String,
        /// The source.
        from: String,
        /// The target.
        at: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// mount(8) would not have it.
    #[error("cannot mount {kind} image {from} at {}: {reason}", at.display())]
    Image {
        /// The type.
        kind: String,
        /// The image.
        from: String,
        /// The target.
        at: PathBuf,
        /// What was said.
        reason: String,
    },
    /// A target that leads out.
    #[error("the mount target {0:?} is not a plain path below the root")]
    Target(String),
    /// The data do not fit, whatever is done.
    #[error("the options of the {kind} mount have {len} bytes; mount(2) takes {MAX_DATA}")]
    TooLong {
        /// The type.
        kind: String,
        /// Their length.
        len: usize,
    },
    /// There is no thread to be had.
    #[error("cannot mount the root: {0}")]
    Thread(std::io::Error),
}

/// A mounted root. Dropping it unmounts it.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    mounted: bool,
}

impl Root {
    /// Mounts `mounts`, one after the other, at `path`. Without any, the tree is there already.
    ///
    /// # Errors
    /// See [`Error`]; nothing stays mounted then.
    pub fn mount(path: &Path, mounts: &[RootMount]) -> Result<Self, Error> {
        let root = Self { path: path.to_owned(), mounted: !mounts.is_empty() };
        for one in mounts {
            mount_one(path, one)?;
        }
        Ok(root)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if self.mounted {
            unmount(&self.path);
        }
    }
}

/// Takes off all that is mounted at `path`. What is busy for long is detached.
pub fn unmount(path: &Path) {
    let until = Instant::now() + BUSY;
    for _ in 0..MAX_STACK {
        let result = loop {
            match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
                Err(Errno::EBUSY) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(Errno::EBUSY) => {
                    break umount2(path, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH);
                }
                other => break other,
            }
        };
        match result {
            Ok(()) => {}
            // Nothing (more) is mounted there, or the place is gone.
            Err(Errno::EINVAL | Errno::ENOENT) => return,
            Err(e) => {
                tracing::warn!("cannot unmount {}: {e}", path.display());
                return;
            }
        }
    }
}

/// Has mount(8) do what it takes to mount an image: a loop device, which goes with the mount.
fn mount_image(one: &RootMount, at: &Path) -> Result<(), Error> {
    let image = |reason: String| Error::Image {
        kind: one.kind.clone(),
        from: one.source.clone(),
        at: at.to_owned(),
        reason,
    };
    let mut command = Command::new("mount");
    command.args(["-t", &one.kind, "-o", &one.options.join(","), "--", &one.source]).arg(at);
    let output = command.stdin(Stdio::null()).output().map_err(|e| image(e.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(image(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

fn mount_one(root: &Path, one: &RootMount) -> Result<(), Error> {
    let at = target(root, &one.target)?;
    if one.options.iter().any(|word| word == "loop") {
        return mount_image(one, &at);
    }
    let options = options(&one.options);
    let failed = |source| Error::Mount {
        kind: one.kind.clone(),
        from: one.source.clone(),
        at: at.clone(),
        source,
    };
    let flags = options.flags.0;
    let none: Option<&str> = None;
    if flags.contains(MsFlags::MS_BIND) {
        let deep = flags & (MsFlags::MS_BIND | MsFlags::MS_REC);
        mount(Some(one.source.as_str()), &at, none, deep, none).map_err(failed)?;
        let rest = flags & !MsFlags::MS_REC;
        if rest != MsFlags::MS_BIND {
            // The other flags are taken by a second call alone.
            mount(none, &at, none, rest | MsFlags::MS_REMOUNT, none).map_err(failed)?;
        }
    } else {
        let data = options.data.join(",");
        if data.len() <= MAX_DATA {
            mount(
                Some(one.source.as_str()),
                &at,
                Some(one.kind.as_str()),
                flags,
                Some(data.as_str()),
            )
            .map_err(failed)?;
        } else {
            mount_from_near(one, &at, flags, &options.data)?;
        }
    }
    match options.propagation {
        Some(flags) => mount(none, &at, none, flags, none).map_err(failed),
        None => Ok(()),
    }
}

/// A mount's place below the root.
fn target(root: &Path, below: &str) -> Result<PathBuf, Error> {
    let below = Path::new(below.trim_start_matches('/'));
    let plain = below.components().all(|c| matches!(c, Component::Normal(_)));
    let path = root.join(below);
    // What an image could have made of a link leads who knows where.
    let links = || below.ancestors().any(|part| root.join(part).is_symlink());
    if plain && !links() { Ok(path) } else { Err(Error::Target(below.display().to_string())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_stay_below_the_root() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();
        assert_eq!(target(dir.path(), "").unwrap(), dir.path().join(""));
        assert_eq!(target(dir.path(), "/a/b").unwrap(), dir.path().join("a/b"));
        for bad in ["../x", "a/../../x", "link/x", "link"] {
            assert!(matches!(target(dir.path(), bad), Err(Error::Target(_))), "{bad}");
        }
    }

    #[test]
    fn a_refused_mount_is_named_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let mount =
            RootMount { kind: "nosuchfs".into(), source: "x".into(), ..RootMount::default() };
        let error = Root::mount(dir.path(), &[mount]).unwrap_err();
        assert!(error.to_string().contains("nosuchfs x"), "{error}");
    }
}
