//! File systems that the host mounts while containers run.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

const NONE: Option<&str> = None;

/// A file system in memory, mounted on the host. It goes when this is dropped.
#[derive(Debug)]
pub struct HostMount(PathBuf);

impl HostMount {
    /// Mounts one.
    ///
    /// # Panics
    /// If the host refuses.
    pub fn new(path: &Path) -> Self {
        let kind = Some("tmpfs");
        mount(kind, path, kind, MsFlags::empty(), NONE).expect("a mount of the host");
        Self(path.into())
    }

    /// The same, and nobody is told what is mounted below it.
    ///
    /// # Panics
    /// If the host refuses.
    pub fn private(path: &Path) -> Self {
        let made = Self::new(path);
        mount(NONE, path, NONE, MsFlags::MS_PRIVATE, NONE).expect("a private mount");
        made
    }

    /// The same, and what is mounted below it is told to others.
    ///
    /// # Panics
    /// If the host refuses.
    pub fn shared(path: &Path) -> Self {
        let made = Self::private(path);
        mount(NONE, path, NONE, MsFlags::MS_SHARED, NONE).expect("a shared mount");
        made
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Unmounts it, which the host refuses if it is in use.
    ///
    /// # Errors
    /// As umount(2).
    pub fn unmount(self) -> nix::Result<()> {
        umount2(&self.0, MntFlags::empty())
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// What a container says that sees a directory at `/v` in which the host mounts something at `sub`, with a file `f`, and unmounts it
/// again. It has that file open all the while, and then finds a file `under`.
pub const FOLLOWS: &str = "cat /v/early/f; until [ -e /v/sub/f ]; do sleep 0.1; done; exec 3</v/sub/f; echo open; \
                           while [ -e /v/sub/f ]; do sleep 0.1; done; cat <&3; cat /v/sub/under; echo x >/v/early/new; \
                           until [ -e /v/sub/f ]; do sleep 0.1; done; cat /v/sub/f; while :; do sleep 0.1; done";

/// The host's side of [`FOLLOWS`], before the container is started.
///
/// # Panics
/// If the host refuses.
pub fn followed(dir: &Path) -> [HostMount; 2] {
    let top = HostMount::shared(dir);
    for name in ["early", "sub"] {
        std::fs::create_dir(dir.join(name)).expect("a directory");
    }
    std::fs::write(dir.join("sub/under"), "under\n").expect("a file");
    let early = HostMount::new(&dir.join("early"));
    std::fs::write(dir.join("early/f"), "early\n").expect("a file");
    // Taken off in this order.
    [early, top]
}

/// The host's side of [`FOLLOWS`], when the container runs and `output` is what it has said so far. All is unmounted
/// at the end.
///
/// # Panics
/// If the container does not see it.
pub fn is_followed([early, top]: [HostMount; 2], output: impl Fn() -> String) {
    crate::eventually("what was there before", || output() == "early\n");
    let at = top.path().join("sub");
    let put = |text: &str| {
        let made = HostMount::new(&at);
        std::fs::write(at.join("f"), text).expect("a file");
        made
    };
    let late = put("late\n");
    crate::eventually("what the host has mounted", || output() == "early\nopen\n");
    late.unmount().expect("what the guest has open is not in use on the host");
    crate::eventually("what is under it", || output() == "early\nopen\nlate\nunder\n");
    let again = put("again\n");
    crate::eventually("what the host mounts again", || output().ends_with("under\nagain\n"));
    assert!(early.path().join("new").exists(), "what was mounted before can still be written");
    for mount in [again, early, top] {
        mount.unmount().expect("it is not in use on the host");
    }
}
