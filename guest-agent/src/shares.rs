//! The file system that the host shares: mounted once, trees of it bound wherever they are wanted.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use mvm_agent_protocol::is_valid_id;
use mvm_agent_protocol::messages::Share;
use rustix::fs::{FileType, Mode, OFlags, fstat};

use crate::error::{Context, Error, Result};
use crate::icache;
use crate::mountapi::{attach, clone_tree, mount_at, open_in_root, open_path};

/// The device's tag.
const TAG: &str = "mvm";

/// Where it is mounted, for the agent alone.
const SHARES_DIR: &str = "/run/mvm/shares";

/// Its root directory, once it has been needed.
static ROOT: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// A detached clone of what `share` names.
pub fn tree(share: &Share) -> Result<OwnedFd> {
    if !is_valid_id(&share.name) {
        return Err(Error::Invalid(format!("share {:?}: not a valid name", share.name)));
    }
    let mut root = ROOT.lock().unwrap_or_else(PoisonError::into_inner);
    let root = match &mut *root {
        Some(root) => root,
        none => {
            let path = Path::new(SHARES_DIR);
            mount_at(path, "virtiofs", Some(TAG), &[], 0)?;
            icache::keep_below(share.max_files);
            none.insert(open_path(path)?)
        }
    };
    let what = |e: Error| e.within(format!("share {:?}", share.name));
    let top = open_in_root(root.as_fd(), Path::new(&share.name)).map_err(what)?;
    // Below its own directory as if that were the root, whatever links are there.
    let place = match share.path.as_str() {
        "" => top,
        path => open_in_root(top.as_fd(), Path::new(path)).map_err(what)?,
    };
    clone_tree(place.as_fd(), Path::new(""), true)
}

/// Attaches a tree at a path of the agent's own, on a directory or a file as the tree is.
pub fn attach_at(tree: &OwnedFd, path: &Path) -> Result<()> {
    let what = || format!("create {}", path.display());
    let stat = fstat(tree).context(|| format!("look at what is shared at {}", path.display()))?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        std::fs::create_dir_all(path).context(what)?;
    } else {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).context(what)?;
        }
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::from_raw_mode(0o600)).context(what)?;
    }
    attach(tree, open_path(path)?.as_fd(), path)
}
