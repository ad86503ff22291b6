//! Takes from this process what it does not need. Every layer is attempted and reported; only the
//! system call filter has to hold.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use caps::{CapSet, Capability, CapsHashSet};
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};
use rustix::fs::{Mode, OFlags, mkdirat, openat};
use serde::{Deserialize, Serialize};

use crate::{sys, tree};

/// One layer of confinement, and why it does not hold if it does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Its name.
    pub name: String,
    /// `None` if it holds.
    pub missing: Option<String>,
}

/// What serving files as the guest's users needs (capabilities(7)): their ownership, their permissions,
/// which the guest has checked already, and the attributes that only privileged users may set.
const NEEDED: [Capability; 8] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
];

/// What is known of the process's own identity and mounts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standing {
    /// All identities of the guest are the one of whoever started the server.
    pub squash: bool,
    /// Mount trees can be cloned.
    pub own_mounts: bool,
}

/// Enters namespaces of its own. The process has one thread.
pub(crate) fn namespaces(layers: &mut Vec<Layer>) -> Standing {
    let (uid, gid) = (geteuid(), getegid());
    let root = uid.is_root();
    if !root {
        let map = || -> io::Result<()> {
            unshare(CloneFlags::CLONE_NEWUSER)?;
            fs::write("/proc/self/setgroups", "deny")?;
            fs::write("/proc/self/uid_map", format!("0 {uid} 1\n"))?;
            fs::write("/proc/self/gid_map", format!("0 {gid} 1\n"))
        };
        note(layers, "user namespace", map());
    }
    let own_mounts = note(layers, "mount namespace", tree::enter_namespace(MsFlags::MS_PRIVATE));
    for (name, flag) in [
        ("network namespace", CloneFlags::CLONE_NEWNET),
        ("IPC namespace", CloneFlags::CLONE_NEWIPC),
        ("UTS namespace", CloneFlags::CLONE_NEWUTS),
    ] {
        note(layers, name, unshare(flag).map_err(Into::into));
    }
    Standing { squash: !root, own_mounts }
}

/// Makes an empty directory the root; of `/proc` there is only what leads to the process's own
/// descriptors.
pub(crate) fn root(layers: &mut Vec<Layer>) {
    note(layers, "root directory", empty_root());
}

fn empty_root() -> io::Result<()> {
    let root = tree::memory_directory()?;
    let own_descriptors = tree::clone_one("/proc/self/fd")?;
    tree::attach_somewhere(&root)?;
    let mode = Mode::from_raw_mode(0o755);
    for path in ["proc", "proc/self", "proc/self/fd"] {
        mkdirat(&root, path, mode)?;
    }
    // The library opens it and reads it only for what is not asked of it.
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    openat(&root, "proc/self/mountinfo", flags, Mode::from_raw_mode(0o444))?;
    let target = openat(&root, "proc/self/fd", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    tree::attach(&own_descriptors, target.as_fd())?;
    sys::set_mount(root.as_fd(), false, true)?;
    tree::become_root(root.as_fd())?;
    Ok(())
}

/// Gives up all capabilities but those needed, for good.
pub(crate) fn privileges(layers: &mut Vec<Layer>) {
    note(layers, "capabilities", drop_capabilities(&NEEDED).map_err(io::Error::other));
    note(layers, "no new privileges", nix::sys::prctl::set_no_new_privs().map_err(Into::into));
    let undumpable = nix::sys::prctl::set_dumpable(false).map_err(Into::into);
    note(layers, "no core dumps", undumpable);
}

/// Gives up all capabilities but `needed`.
pub(crate) fn drop_capabilities(
    needed: &[Capability],
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let has = caps::read(None, CapSet::Permitted)?;
    if has.is_empty() {
        return Ok(());
    }
    if has.contains(&Capability::CAP_SETPCAP) {
        sys::keep_capabilities()?;
        for capability in caps::runtime::thread_all_supported() {
            if !needed.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    let keep: CapsHashSet = needed.iter().copied().filter(|c| has.contains(c)).collect();
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    Ok(())
}

fn note(layers: &mut Vec<Layer>, name: &str, result: io::Result<()>) -> bool {
    let missing = result.err().map(|e| e.to_string());
    if let Some(why) = &missing {
        tracing::warn!("not confined by {name}: {why}");
    }
    let holds = missing.is_none();
    layers.push(Layer { name: name.into(), missing });
    holds
}
