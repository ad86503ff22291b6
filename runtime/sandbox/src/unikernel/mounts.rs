//! Telling a guest where the file systems on its disks are to be mounted, in the words of its kind.

use std::fmt;
use std::str::FromStr;

use super::Kind;

/// Longest mount point in bytes.
const MAX: usize = 255;

/// A place in the guest's file system: absolute, without detours, and of characters that mean nothing on any
/// command line and in no JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint(String);

impl MountPoint {
    /// Where a guest has everything.
    pub fn root() -> Self {
        Self("/".into())
    }

    /// Whether that is it.
    pub fn is_root(&self) -> bool {
        self.0 == "/"
    }
}

impl FromStr for MountPoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        if text.len() > MAX {
            return Err(format!(
                "{} bytes are too long for a mount point, the limit is {MAX}",
                text.len()
            ));
        }
        if !text.starts_with('/') {
            return Err(format!("the mount point {text:?} does not begin with a slash"));
        }
        if let Some(c) = text.chars().find(|c| !plain(*c)) {
            return Err(format!(
                "there is a {c:?} in the mount point {text:?}: letters and digits of ASCII and ._-/ can be"
            ));
        }
        let mut path = String::new();
        for part in text.split('/').filter(|part| !part.is_empty() && *part != ".") {
            if part == ".." {
                return Err(format!("the mount point {text:?} has a step up in it"));
            }
            path.push('/');
            path.push_str(part);
        }
        Ok(if path.is_empty() { Self::root() } else { Self(path) })
    }
}

impl fmt::Display for MountPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A disk whose file system the guest is to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The disk's number among those of the machine.
    pub disk: usize,
    /// Where.
    pub at: MountPoint,
}

/// Most disks whose names Linux makes with one letter.
const LETTERS: usize = 26;

impl Mount {
    /// Why guests of this kind cannot be told of it, if they cannot.
    pub fn untold(&self, kind: Kind) -> Option<&'static str> {
        match kind {
            Kind::Rust => None,
            Kind::Linux if !self.at.is_root() => {
                Some("of Linux' parameters one names the root, and none another")
            }
            Kind::Linux if self.disk >= LETTERS => Some("it has no simple name"),
            Kind::Linux => None,
            Kind::Rumprun if self.disk > 0 => Some("rumprun mounts one disk"),
            Kind::Rumprun => None,
            Kind::Hvt => Some("guests of Solo5 know their disks by the names in their manifests"),
            Kind::Unikraft => Some(
                "Unikraft's vfs.fstab wants the kernel's own names of disk and file system; write it with --cmdline",
            ),
            Kind::Nanos => {
                Some("Nanos goes by the label of the volume: --cmdline mounts.LABEL=PATH")
            }
            Kind::Hermit => Some("Hermit has no disks"),
            Kind::Multiboot => Some("there are no such words"),
        }
    }

    /// The words for it, for kinds that are told words.
    pub(super) fn words(&self, kind: Kind) -> Vec<String> {
        match kind {
            _ if self.untold(kind).is_some() => Vec::new(),
            Kind::Rust => vec![format!("disk{}.mount={}", self.disk, self.at)],
            // Linux, Documentation/admin-guide/kernel-parameters.txt.
            Kind::Linux => {
                let letter = char::from(b'a' + (self.disk % LETTERS) as u8);
                vec![format!("root=/dev/vd{letter}"), "rw".into()]
            }
            _ => Vec::new(),
        }
    }

    /// What stands under `blk` in rumprun's document, as its parser wants it: the disk by the name that the source `etfs` has
    /// for it, and `blk` for any file system that it knows.
    pub(super) fn rumprun(&self) -> serde_json::Value {
        serde_json::json!({
            "source": "etfs", "path": "/dev/ld0a", "fstype": "blk", "mountpoint": self.at.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_plain_paths() {
        let read = |text: &str| text.parse::<MountPoint>().map(|at| at.to_string());
        for (text, path) in [
            ("/", "/"),
            ("//", "/"),
            ("/./", "/"),
            ("/data", "/data"),
            ("//a/./b.c_d-e/", "/a/b.c_d-e"),
        ] {
            assert_eq!(read(text).as_deref(), Ok(path));
        }
        let long = format!("/{}", "x".repeat(MAX));
        for bad in [
            "",
            "data",
            "..",
            "/..",
            "/a/../b",
            "/a b",
            "/a\"",
            "/a'",
            "/a\\",
            "/a\n",
            "/a\0",
            "/a:b",
            "/a,b",
            "/a=b",
            "/a]",
            "/a;b",
            "/a$b",
            "/\u{e4}",
            "/a\u{202e}",
            &long,
        ] {
            let error = read(bad).unwrap_err();
            assert!(!error.contains(|c: char| c.is_control() || c == '\u{202e}'), "{error:?}");
        }
        assert_eq!(read(&long[..MAX]).unwrap().len(), MAX);
    }

    #[test]
    fn every_kind_is_told_or_not_for_a_reason() {
        let mount = |disk, at: &str| Mount { disk, at: at.parse().unwrap() };
        let (root, data) = (mount(0, "/"), mount(1, "/data"));
        assert_eq!(root.words(Kind::Linux), ["root=/dev/vda", "rw"]);
        assert_eq!(mount(25, "/").words(Kind::Linux), ["root=/dev/vdz", "rw"]);
        assert_eq!(data.words(Kind::Rust), ["disk1.mount=/data"]);
        for (kind, mount) in [
            (Kind::Linux, &data),
            (Kind::Linux, &mount(26, "/")),
            (Kind::Rumprun, &data),
            (Kind::Hvt, &root),
            (Kind::Unikraft, &root),
            (Kind::Nanos, &root),
            (Kind::Hermit, &root),
            (Kind::Multiboot, &root),
        ] {
            assert!(mount.untold(kind).is_some(), "{kind}");
            assert!(mount.words(kind).is_empty(), "{kind}");
        }
        assert_eq!(root.untold(Kind::Rumprun), None);
    }
}
