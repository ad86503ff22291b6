//! File systems that are not in the kernel from the start, but modules of it that the host brings when a disk needs them:
//! guests without such a disk do without them, and so do the initramfs and the agent.

use std::fs;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::kmod::init_module;

use crate::error::{Context, Error, Result};
use crate::log::Since;

/// What the kernel can mount.
const TABLE: &str = "/proc/filesystems";

/// Loads `module`, unless the kernel has file systems of the type `fs_type` anyway. Whether it has them, where there is no
/// module.
///
/// # Errors
/// The kernel does not take the module, or it is another one.
pub fn add(fs_type: &str, module: &[u8]) -> Result<bool> {
    // Containers may be made at the same time.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if has(fs_type)? {
        return Ok(true);
    }
    if module.is_empty() {
        return Ok(false);
    }
    let since = Since::now();
    match init_module(module, c"") {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(e) => {
            let what = format!("load the kernel module for {fs_type} ({} bytes)", module.len());
            return Err(Error::system(what, e).explained(&since.said_of(fs_type)));
        }
    }
    if has(fs_type)? {
        return Ok(true);
    }
    Err(Error::Invalid(format!(
        "a kernel module for {fs_type}: it is loaded, and {TABLE} has no {fs_type}"
    )))
}

fn has(fs_type: &str) -> Result<bool> {
    let table = fs::read_to_string(TABLE).context(|| format!("read {TABLE}"))?;
    Ok(lists(&table, fs_type))
}

/// Whether a table like `/proc/filesystems` has this type: each line is one, some after the word `nodev` (proc(5)).
fn lists(table: &str, fs_type: &str) -> bool {
    table.lines().any(|line| line.split_ascii_whitespace().next_back() == Some(fs_type))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_known_by_their_whole_names() {
        let table = "nodev\tsysfs\nnodev\ttmpfs\n\text4\n\terofs\n";
        for there in ["sysfs", "ext4", "erofs"] {
            assert!(lists(table, there), "{there}");
        }
        for missing in ["xfs", "fs", "ext", "nodev", ""] {
            assert!(!lists(table, missing), "{missing}");
        }
    }

    #[test]
    fn what_the_kernel_has_needs_no_module() {
        assert_eq!(add("proc", b"no module at all"), Ok(true));
        assert_eq!(add("nosuchfs", b""), Ok(false));
    }

    #[test]
    fn what_is_no_module_is_refused_with_the_name() {
        // Without the right to load modules that is the reason; with it, that this is none.
        let error = add("nosuchfs", b"no module at all").unwrap_err().to_string();
        assert!(error.starts_with("load the kernel module for nosuchfs (16 bytes)"), "{error}");
    }
}
