//! Initramfs of busybox and a script, for the guests of others.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mvm_tests::run_with;

/// Packs the directory `tree`, with busybox, `init` and the usual directories put into it, as `to`.
///
/// # Panics
/// If that fails.
pub fn pack(tree: &Path, init: &str, to: &Path) {
    for dir in ["bin", "dev", "proc", "tmp"] {
        fs::create_dir_all(tree.join(dir)).expect("a directory");
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).expect("a static busybox");
    let file = tree.join("init");
    fs::write(&file, init).expect("a file");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("an executable file");
    let mut pack = Command::new("sh");
    pack.args(["-c", r#"cd "$1" && find . | /bin/busybox cpio -o -H newc >"$2""#, "sh"]);
    pack.arg(tree).arg(to);
    run_with(pack, b"", Duration::from_secs(60)).expect_code(0);
}
