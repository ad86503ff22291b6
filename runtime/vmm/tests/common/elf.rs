//! The example unikernel's ELF file.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

/// What `MVM_TEST_UNIKERNEL` names; without that it is built.
pub static UNIKERNEL: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let path = std::env::var_os("MVM_TEST_UNIKERNEL").map_or_else(build, PathBuf::from);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
});

fn build() -> PathBuf {
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../images");
    let elf = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hello-unikernel.elf");
    let built = Command::new(images.join("hello-unikernel/build.sh")).arg(&elf).status();
    assert!(built.is_ok_and(|status| status.success()), "the unikernel cannot be built");
    elf
}
