//! Data that a guest writes to a disk, looked at by the host.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::{Chroot, Finished, Shim, World, run_with};

/// Longer than anything that is not stuck takes.
const PATIENCE: Duration = Duration::from_secs(3600);

#[track_caller]
fn host(program: &str, args: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(args);
    run_with(command, b"", PATIENCE).expect_code(0).out()
}

/// Has a container whose root is a disk (ext4) write so many mebibytes of noise, read them back from the disk, and tell
/// their digest; the host finds the same on the image.
///
/// # Panics
/// If it does not.
#[track_caller]
pub fn data_on_a_disk(shim: &Shim, mebibytes: u64) {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("ext4").display().to_string();
    let tree = Chroot::new(&World::new().image_file("busybox"));
    let size = format!("{}M", mebibytes * 5 / 4 + 48);
    host("mke2fs", &["-q", "-t", "ext4", "-d", &tree.path().display().to_string(), &image, &size]);
    let script = format!(
        "dd if=/dev/urandom of=/data bs=1M count={mebibytes} 2>/dev/null; sha256sum </data; sync; \
         echo 3 >/proc/sys/vm/drop_caches; sha256sum </data"
    );
    let run = shim.run("data", "ext4", Path::new(&image), &["loop", "rw"], &script);
    assert_eq!(run.code, 0, "{}", run.err());
    let seen: Vec<String> = run.out().lines().map(|line| line.replace("  -", "")).collect();
    assert_eq!(seen.len(), 2, "{}", run.err());
    assert_eq!(seen[0], seen[1], "what was written is not what is read");
    host("e2fsck", &["-fn", &image]);
    let dumped = dir.path().join("data").display().to_string();
    host("debugfs", &["-R", &format!("dump /data {dumped}"), &image]);
    let found = host("sha256sum", &[&dumped]);
    assert!(found.starts_with(&seen[0]), "{found} is on the disk, {} was written", seen[0]);
}

/// A script for Debian that makes a repository of so many files on a volume at `/v`, and clones it to another place there
/// and from that to `place`.
pub fn clone_script(count: usize, place: &str) -> String {
    format!(
        "set -e; export HOME=/root; git config --global user.email a@b; git config --global user.name n
         git config --global --add safe.directory '*'; mkdir /v/one; cd /v/one; git init -q
         n=0; while [ $n -lt {count} ]; do d=d$((n % 40)); [ -d $d ] || mkdir $d
         echo file $n >$d/f$n; n=$((n + 1)); done
         git add . && git commit -qm first && git clone -q /v/one /v/two && git clone -q /v/two {place}
         cd {place} && git fsck --full 2>/dev/null && git status --porcelain | wc -l
         git ls-files | wc -l && git ls-files | xargs cat | sha256sum | cut -d' ' -f1"
    )
}

/// Checks what that script printed against the clone that the host sees at `clone`.
///
/// # Panics
/// If they differ.
#[track_caller]
pub fn expect_cloned(run: &Finished, count: usize, clone: &Path) {
    // As git lists them: by names.
    let script = "cd \"$0\" && find . -path ./.git -prune -o -type f -print | LC_ALL=C sort | xargs cat | sha256sum";
    let want = host("sh", &["-c", script, &clone.display().to_string()]);
    let want = want.split_whitespace().next().unwrap_or_default();
    assert_eq!(run.out(), format!("0\n{count}\n{want}\n"), "{}", run.err());
}
