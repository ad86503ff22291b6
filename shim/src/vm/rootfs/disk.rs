//! Roots that are one whole file system, and so a disk of the guest.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use mvm_sandbox::spec::FileSystem;

use crate::backend::RootMount;

/// File systems that the guest's kernel mounts by itself.
const BUILT_IN: [&str; 2] = ["ext4", "erofs"];

/// File systems that it mounts with a module, if there is one for it.
const MODULES: [&str; 1] = ["xfs"];

/// Options of XFS that are about nothing but the disk itself (Linux: Documentation/admin-guide/xfs.rst).
const XFS_FLAGS: [&str; 30] = [
    "attr2",
    "bsdgroups",
    "discard",
    "filestreams",
    "gqnoenforce",
    "gquota",
    "grpid",
    "grpquota",
    "inode32",
    "inode64",
    "largeio",
    "noalign",
    "noattr2",
    "nodiscard",
    "nogrpid",
    "nolargeio",
    "noquota",
    "norecovery",
    "nouuid",
    "pqnoenforce",
    "pquota",
    "prjquota",
    "qnoenforce",
    "quota",
    "swalloc",
    "sysvgroups",
    "uqnoenforce",
    "uquota",
    "usrquota",
    "wsync",
];
const XFS_VALUES: [&str; 5] = ["allocsize", "logbsize", "logbufs", "sunit", "swidth"];

/// A module of the guest's kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Module(pub &'static [u8]);

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Module({} bytes)", self.0.len())
    }
}

/// A root that a machine gets as a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// An image or a block device.
    pub path: PathBuf,
    /// What is on it.
    pub system: FileSystem,
    /// What the guest's kernel has to get first.
    pub module: Option<Module>,
}

impl Disk {
    /// Opens it.
    ///
    /// # Errors
    /// It is gone, or may not be used.
    pub fn open(&self) -> std::io::Result<File> {
        File::options().read(true).write(!self.system.read_only).open(&self.path)
    }
}

/// The disk that `mounts` amount to, if they are one whole file system that the guest can mount as they ask for it. `module`
/// says what its kernel needs for a type that it does not mount by itself.
///
/// # Errors
/// Those of `module`.
pub fn disk<E>(
    mounts: &[RootMount],
    module: impl FnOnce(&str) -> Result<Option<&'static [u8]>, E>,
) -> Result<Option<Disk>, E> {
    let [one] = mounts else { return Ok(None) };
    let kind = one.kind.as_str();
    let Some((options, read_only)) = options(kind, &one.options) else { return Ok(None) };
    let is_disk = std::fs::metadata(&one.source)
        .is_ok_and(|about| about.file_type().is_file() || about.file_type().is_block_device());
    if !is_disk || !one.target.trim_matches('/').is_empty() {
        return Ok(None);
    }
    let module = match (BUILT_IN.contains(&kind), MODULES.contains(&kind)) {
        (true, _) => None,
        (false, true) => match module(kind)? {
            Some(bytes) => Some(Module(bytes)),
            None => return Ok(None),
        },
        (false, false) => return Ok(None),
    };
    let system = FileSystem { kind: kind.to_owned(), options, read_only };
    Ok(Some(Disk { path: one.source.clone().into(), system, module }))
}

/// The file system's own options among `words`, and whether it is not to be written; `None` if one is for mount(2), or for who
/// knows whom.
fn options(kind: &str, words: &[String]) -> Option<(Vec<String>, bool)> {
    let mut own = Vec::new();
    let mut read_only = kind == "erofs";
    for word in words {
        match word.as_str() {
            "loop" | "defaults" => {}
            "ro" => read_only = true,
            "rw" => read_only = kind == "erofs",
            word if kind == "xfs" && is_of_xfs(word) => own.push(word.to_owned()),
            _ => return None,
        }
    }
    Some((own, read_only))
}

fn is_of_xfs(word: &str) -> bool {
    match word.split_once('=') {
        Some((key, _)) => XFS_VALUES.contains(&key),
        None => XFS_FLAGS.contains(&word),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &[u8] = b"module";

    fn words(text: &str) -> Vec<String> {
        text.split(',').map(String::from).collect()
    }

    fn none(_: &str) -> Result<Option<&'static [u8]>, ()> {
        Ok(None)
    }

    fn some(kind: &str) -> Result<Option<&'static [u8]>, ()> {
        assert_eq!(kind, "xfs", "no other is a module");
        Ok(Some(MODULE))
    }

    /// An image, and a mount of it.
    fn image() -> (tempfile::TempDir, impl Fn(&str, &str) -> RootMount) {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, "").unwrap();
        let mount = move |kind: &str, options: &str| RootMount {
            kind: kind.into(),
            source: image.display().to_string(),
            target: String::new(),
            options: words(options),
        };
        (dir, mount)
    }

    #[test]
    fn whole_file_systems_that_the_guest_knows_are_disks() {
        let (_dir, mount) = image();
        let found = |kind, options| {
            let disk = disk(&[mount(kind, options)], none).unwrap();
            disk.map(|d| d.system.read_only)
        };
        assert_eq!(found("ext4", "loop,rw"), Some(false));
        assert_eq!(found("ext4", "ro"), Some(true));
        assert_eq!(found("ext4", "ro,rw"), Some(false));
        assert_eq!(found("erofs", "loop,rw"), Some(true));
        assert_eq!(found("xfs", "loop"), None, "this kernel has it not");
        assert_eq!(found("btrfs", "loop"), None, "no kernel of ours has it");
        assert_eq!(found("ext4", "loop,data=journal"), None, "an option for mount(2)");
        assert_eq!(found("ext4", "nouuid"), None, "an option of another");
        let disk = |mounts: &[RootMount]| disk(mounts, none).unwrap();
        assert_eq!(disk(&[mount("ext4", "ro"), mount("ext4", "ro")]), None);
        let missing = RootMount { source: "/no/such".into(), ..mount("ext4", "ro") };
        assert_eq!(disk(&[missing]), None);
        let directory = RootMount { source: "/etc".into(), ..mount("ext4", "ro") };
        assert_eq!(disk(&[directory]), None);
        let below = RootMount { target: "/below".into(), ..mount("ext4", "ro") };
        assert_eq!(disk(&[below]), None);
    }

    #[test]
    fn xfs_is_a_disk_with_a_module_and_options_of_its_own() {
        let (_dir, mount) = image();
        let found = |options| disk(&[mount("xfs", options)], some).unwrap();
        let clone = found("loop,nouuid,ro,norecovery,logbsize=64k").unwrap();
        assert_eq!(clone.system.options, ["nouuid", "norecovery", "logbsize=64k"]);
        assert!(clone.system.read_only);
        assert_eq!(clone.module, Some(Module(MODULE)));
        assert_eq!(format!("{:?}", clone.module.unwrap()), "Module(6 bytes)");
        assert!(!found("loop,rw").unwrap().system.read_only);
        // These name devices of the host, or are for mount(2).
        for foreign in ["logdev=/dev/sdb", "rtdev=/dev/sdb", "noatime", "dax", "nouuid=1", ""] {
            assert_eq!(found(foreign), None, "{foreign}");
        }
        let ext4 = disk(&[mount("ext4", "rw")], some).unwrap().unwrap();
        assert_eq!(ext4.module, None);
        let failed = disk(&[mount("xfs", "rw")], |_| Err("no settings"));
        assert_eq!(failed, Err("no settings"));
    }
}
