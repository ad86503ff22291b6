//! The tree of a test image as a directory, to run the same program on the host's processor.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::{Finished, run_with};

/// An image unpacked for chroot(1), with /proc and /dev mounted. Wants root.
#[derive(Debug)]
pub struct Chroot {
    root: TempDir,
}

impl Chroot {
    /// Unpacks the first layer of the OCI archive `image` (the test images have one).
    ///
    /// # Panics
    /// If the archive cannot be unpacked or the mounts fail.
    pub fn new(image: &Path) -> Self {
        let root = tempfile::Builder::new().prefix("mvm-chroot-").tempdir().expect("a directory");
        let script = r#"
            set -eu
            layout=$(mktemp -d)
            trap 'rm -rf "$layout"' EXIT
            tar -C "$layout" -xf "$1"
            manifest=$(sed -E 's/.*"digest":"sha256:([0-9a-f]+)".*/\1/' "$layout/index.json")
            layer=$(sed -E 's/.*"layers":\[\{[^]]*"digest":"sha256:([0-9a-f]+)".*/\1/' "$layout/blobs/sha256/$manifest")
            tar -C "$2" --numeric-owner --xattrs -xzf "$layout/blobs/sha256/$layer"
        "#;
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(image).arg(root.path());
        run_with(command, b"", Duration::from_secs(300)).expect_code(0);
        Self { root }
    }

    /// Where the tree is.
    pub fn path(&self) -> PathBuf {
        self.root.path().to_path_buf()
    }

    /// Runs a shell script in it, in namespaces of its own.
    #[track_caller]
    pub fn sh(&self, script: &str) -> Finished {
        run_with(self.command(script), b"", Duration::from_secs(300))
    }

    /// The command for that, not yet started.
    pub fn command(&self, script: &str) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--kill-child", "--uts", "--ipc", "sh", "-c"]);
        command.arg(
            "mount -t proc proc \"$1/proc\" && mount --bind /dev \"$1/dev\" && \
             mount -t tmpfs -o mode=1777 tmpfs \"$1/tmp\" && \
             exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
             LANG=C.UTF-8 HOME=/root chroot \"$1\" sh -c \"$2\"",
        );
        command.arg("sh").arg(self.root.path()).arg(script);
        command
    }
}
