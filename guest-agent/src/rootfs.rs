//! A container's root file system and volumes, mounted in the agent's own mount namespace.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use mvm_agent_protocol::messages::{
    BlockDevice, Rootfs, Tmpfs, Volume, rootfs::Lower, rootfs::Upper, volume::Source,
};
use mvm_agent_protocol::{VOLUMES_DIR, is_valid_id};
use nix::mount::{MntFlags, umount2};
use rustix::fs::CWD;

use crate::blockdev;
use crate::error::{Context, Error, Result};
use crate::log::{Since, warning};
use crate::mountapi::{attach, change, clone_tree, mount_at, new_mount, open_path};
use crate::{shares, sys};

/// `MOUNT_ATTR_RDONLY` and `MOUNT_ATTR_IDMAP`.
const READ_ONLY: u64 = 1;
const ID_MAPPED: u64 = 0x10_0000;

/// What to do about a file system that was not taken out of use in good order.
const UNRECOVERED: &str = "its log has to be replayed first, and the disk is read-only: mount it once so that it can be \
                           written, or with the option norecovery";

/// What has been mounted for a container; unmounted when dropped.
#[derive(Debug)]
pub struct Mounted {
    dir: PathBuf,
    /// In order of mounting.
    mounts: Vec<PathBuf>,
    volumes: Vec<PathBuf>,
    /// To be made read-only by the container's first process when it no longer needs to write.
    pub readonly: bool,
}

impl Mounted {
    /// Where the root is.
    pub fn root(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Mounts the root and provides the volumes below `dir`, which must not exist. In a user
    /// namespace the root shows its owners mapped into it.
    pub fn new(
        dir: &Path,
        rootfs: &Rootfs,
        volumes: &[Volume],
        user_namespace: Option<BorrowedFd<'_>>,
    ) -> Result<Self> {
        fs::create_dir_all(dir).context(|| format!("create {}", dir.display()))?;
        let mut mounted =
            Self { dir: dir.into(), mounts: vec![], volumes: vec![], readonly: rootfs.readonly };
        // On failure the drop of `mounted` undoes what was done.
        mounted.mount_root(rootfs, user_namespace)?;
        for volume in volumes {
            mounted.provide(volume)?;
        }
        Ok(mounted)
    }

    fn mount_root(&mut self, rootfs: &Rootfs, map: Option<BorrowedFd<'_>>) -> Result<()> {
        if rootfs.direct {
            return self.mount_direct(rootfs);
        }
        let lower = self.dir.join("lower");
        match &rootfs.lower {
            Some(Lower::Share(share)) => {
                let tree = shares::tree(share)?;
                change(&tree, true, READ_ONLY, 0, 0, &lower)?;
                shares::attach_at(&tree, &lower)?;
            }
            Some(Lower::Block(device)) => mount_block(&lower, device, "erofs", true)?,
            Some(Lower::VirtiofsTag(tag)) => {
                mount_at(&lower, "virtiofs", Some(tag), &[], READ_ONLY)?;
            }
            Some(Lower::Path(path)) => bind(Path::new(path), &lower)?,
            Some(_) | None => {
                return Err(Error::Invalid("rootfs: it has no lower layer".into()));
            }
        }
        self.mounts.push(lower.clone());
        let upper = self.dir.join("upper");
        match &rootfs.upper {
            Some(Upper::Tmpfs(size)) => mount_tmpfs(&upper, size)?,
            Some(Upper::Scratch(device)) => mount_block(&upper, device, "ext4", false)?,
            None => {
                // Room for the directories that mounts need, nothing else.
                self.readonly = true;
                mount_tmpfs(&upper, &Tmpfs { size_bytes: 1 << 20, ..Default::default() })?;
            }
            Some(_) => {
                return Err(Error::Unsupported("rootfs: an unknown kind of upper layer".into()));
            }
        }
        self.mounts.push(upper.clone());
        if let Some(namespace) = map {
            map_ids(&lower, namespace)?;
            self.mounts.push(lower.clone());
        }
        for name in ["data", "work"] {
            let path = upper.join(name);
            fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
        }
        // The upper directory's owner and mode are those of the root directory. In a user namespace
        // that is its root, and what is copied up keeps the mapped owner: only the lower layer is
        // mapped, the agent itself could not write to a mapped upper one.
        copy_owner_and_mode(&lower, &upper.join("data"))?;
        let option = |key: &str, path: PathBuf| format!("{key}={}", path.display());
        let options = [
            option("lowerdir", lower),
            option("upperdir", upper.join("data")),
            option("workdir", upper.join("work")),
        ];
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let root = self.root();
        mount_at(&root, "overlay", Some("overlay"), &options, 0)?;
        self.mounts.push(root);
        Ok(())
    }

    /// A share or a disk that is the root itself. Its owners are what they are: whoever made it for a
    /// user namespace made them so.
    fn mount_direct(&mut self, rootfs: &Rootfs) -> Result<()> {
        if rootfs.upper.is_some() {
            return Err(Error::Invalid("rootfs: the root itself has no upper layer".into()));
        }
        let root = self.root();
        match &rootfs.lower {
            Some(Lower::Share(share)) => shares::attach_at(&shares::tree(share)?, &root)?,
            Some(Lower::Block(device)) => mount_block(&root, device, "ext4", false)?,
            _ => {
                return Err(Error::Invalid(
                    "rootfs: only a share or a block device can be the root itself".into(),
                ));
            }
        }
        self.mounts.push(root);
        Ok(())
    }

    fn provide(&mut self, volume: &Volume) -> Result<()> {
        if !is_valid_id(&volume.name) {
            return Err(Error::Invalid(format!("volume {:?}: not a valid name", volume.name)));
        }
        let path = Path::new(VOLUMES_DIR).join(&volume.name);
        if volume.kept {
            return keep(volume, &path);
        }
        if path.exists() {
            return Err(Error::Exists(format!("volume {:?} exists already", volume.name)));
        }
        match &volume.source {
            Some(Source::Block(device)) => mount_block(&path, device, "ext4", volume.readonly)?,
            Some(Source::VirtiofsTag(tag)) => mount_at(&path, "virtiofs", Some(tag), &[], 0)?,
            Some(Source::Tmpfs(size)) => mount_tmpfs(&path, size)?,
            Some(Source::Share(share)) => shares::attach_at(&shares::tree(share)?, &path)?,
            Some(Source::File(file)) => {
                let mode = if file.mode == 0 { 0o644 } else { file.mode & 0o7777 };
                let what = || format!("write volume file {}", path.display());
                fs::create_dir_all(VOLUMES_DIR).context(what)?;
                self.volumes.push(path.clone());
                fs::write(&path, &file.data).context(what)?;
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).context(what)?;
                return Ok(());
            }
            Some(_) | None => {
                return Err(Error::Invalid(format!("volume {:?}: it has no source", volume.name)));
            }
        }
        self.mounts.push(path.clone());
        self.volumes.push(path.clone());
        if volume.readonly {
            let mount = open_path(&path)?;
            change(&mount, false, READ_ONLY, 0, 0, &path)?;
        }
        Ok(())
    }
}

/// Provides a volume that outlives its container.
fn keep(volume: &Volume, path: &Path) -> Result<()> {
    // Containers may be made at the same time.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if volume.readonly {
        return Err(Error::Invalid(format!("volume {:?}: kept, and read-only", volume.name)));
    }
    match &volume.source {
        Some(Source::Tmpfs(_)) if path.exists() => Ok(()),
        Some(Source::Tmpfs(size)) => mount_tmpfs_as(path, size, "1777"),
        _ => Err(Error::Invalid(format!("volume {:?}: only memory can be kept", volume.name))),
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for mount in self.mounts.drain(..).rev() {
            if let Err(e) = umount2(&mount, MntFlags::MNT_DETACH) {
                warning!("cannot unmount {}: {e}", mount.display());
            }
        }
        for volume in self.volumes.drain(..) {
            // Either a file or the empty directory of a mount.
            let _ = fs::remove_file(&volume).or_else(|_| fs::remove_dir(&volume));
        }
        for name in ["rootfs", "lower", "upper", ""] {
            // Never recursive: what is still mounted here must not be emptied.
            let _ = fs::remove_dir(self.dir.join(name));
        }
    }
}

fn mount_block(
    path: &Path,
    device: &BlockDevice,
    default_type: &str,
    readonly: bool,
) -> Result<()> {
    let fs_type = if device.fs_type.is_empty() { default_type } else { &device.fs_type };
    let node = blockdev::node(device)?;
    let mut options: Vec<&str> = device.options.iter().map(String::as_str).collect();
    if readonly {
        options.push("ro");
    }
    let attributes = if readonly { READ_ONLY } else { 0 };
    let since = Since::now();
    mount_at(path, fs_type, node.to_str(), &options, attributes).map_err(|e| {
        let name = node.file_name().unwrap_or_default().to_string_lossy();
        // As file systems begin what they say: `XFS (vda): ...`.
        let said = since.said_of(&format!("({name}): "));
        let advice = if is_unrecovered(&e, fs_type, readonly) { UNRECOVERED } else { "" };
        e.explained(&said).explained(advice)
    })
}

/// Whether a disk that cannot be written has a log that must be.
fn is_unrecovered(error: &Error, fs_type: &str, readonly: bool) -> bool {
    readonly && fs_type == "xfs" && matches!(error, Error::System { errno: libc::EROFS, .. })
}

fn mount_tmpfs(path: &Path, size: &Tmpfs) -> Result<()> {
    mount_tmpfs_as(path, size, "0755")
}

fn mount_tmpfs_as(path: &Path, size: &Tmpfs, mode: &str) -> Result<()> {
    let mode = format!("mode={mode}");
    let options = match size.size_bytes {
        0 => vec![mode],
        bytes => vec![mode, format!("size={bytes}")],
    };
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    mount_at(path, "tmpfs", Some("tmpfs"), &options, 0)
}

fn bind(source: &Path, path: &Path) -> Result<()> {
    fs::create_dir_all(path).context(|| format!("create {}", path.display()))?;
    let tree = clone_tree(CWD, source, true)?;
    change(&tree, false, READ_ONLY, 0, 0, path)?;
    attach(&tree, open_path(path)?.as_fd(), path)
}

/// Covers a mount with a copy of itself whose owners are mapped into a user namespace.
fn map_ids(path: &Path, namespace: BorrowedFd<'_>) -> Result<()> {
    let tree: OwnedFd = clone_tree(CWD, path, false)?;
    sys::change_mount(tree.as_fd(), false, ID_MAPPED, 0, 0, Some(namespace))
        .context(|| format!("map the owners of {}", path.display()))?;
    attach(&tree, open_path(path)?.as_fd(), path)
}

fn copy_owner_and_mode(from: &Path, to: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let what = || format!("set up {}", to.display());
    let metadata = fs::metadata(from).context(what)?;
    std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid())).context(what)?;
    fs::set_permissions(to, metadata.permissions()).context(what)
}

/// Makes a file system appear at `path` if it does not need to be there, see [`mount_at`]; used at
/// boot for what not every kernel has.
pub fn mount_if_possible(path: &str, fs_type: &str, options: &[&str], attributes: u64) {
    let target = Path::new(path);
    let result = fs::create_dir_all(target)
        .context(|| format!("create {path}"))
        .and_then(|()| new_mount(fs_type, Some(fs_type), options, attributes))
        .and_then(|mount| attach(&mount, open_path(target)?.as_fd(), target));
    if let Err(e) = result {
        warning!("{e}");
    }
}
