//! `--disk FILE[:/MOUNTPOINT][:ro]`: a disk of a unikernel, and where the guest is to mount it.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;

use anyhow::{Context as _, anyhow, bail};
use mvm_sandbox::Disk;
use mvm_sandbox::unikernel::{Kind, Mount, MountPoint};

/// The least that a disk has, in bytes.
const SECTOR: u64 = 512;

/// What a flag says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Asked<'a> {
    text: &'a str,
    path: &'a str,
    read_only: bool,
    at: Option<MountPoint>,
}

/// Reads the flags.
pub(super) fn read(flags: &[String]) -> anyhow::Result<Vec<Asked<'_>>> {
    flags.iter().map(|text| Asked::read(text)).collect()
}

/// The mount points among them, in order.
pub(super) fn mount_points(disks: &[Asked<'_>]) -> Vec<Option<MountPoint>> {
    disks.iter().map(|disk| disk.at.clone()).collect()
}

/// What a kernel of this kind is told of them.
pub(super) fn mounts(disks: &[Asked<'_>], kind: Kind) -> anyhow::Result<Vec<Mount>> {
    let mut mounts = Vec::new();
    for (disk, asked) in disks.iter().enumerate() {
        let Some(at) = asked.at.clone() else { continue };
        let mount = Mount { disk, at };
        if let Some(why) = mount.untold(kind) {
            bail!("--disk {}: the guest cannot be told of its mount point: {why}", asked.text);
        }
        mounts.push(mount);
    }
    Ok(mounts)
}

impl<'a> Asked<'a> {
    fn read(text: &'a str) -> anyhow::Result<Self> {
        let (rest, read_only) = match text.strip_suffix(":ro") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let (path, at) = match rest.rfind(":/").filter(|at| *at > 0) {
            Some(at) => (&rest[..at], Some(&rest[at + 1..])),
            None => (rest, None),
        };
        let at = at.map(str::parse).transpose();
        let at = at.map_err(|e: String| anyhow!("--disk {text}: {e}"))?;
        Ok(Self { text, path, read_only, at })
    }

    /// Opens it.
    pub(super) fn open(&self) -> anyhow::Result<Disk> {
        let Self { path, read_only, .. } = *self;
        let file = File::options()
            .read(true)
            .write(!read_only)
            .open(path)
            .with_context(|| format!("cannot open the disk {path}"))?;
        let about = file.metadata()?;
        let kind = about.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            bail!("the disk {path} is neither a file nor a block device");
        }
        if kind.is_file() && about.len() < SECTOR {
            bail!("the disk {path} has {} bytes; a disk has sectors of {SECTOR}", about.len());
        }
        Ok(Disk { file, read_only })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(text: &str) -> (&str, bool, Option<String>) {
        let Asked { path, read_only, at, .. } = Asked::read(text).unwrap();
        (path, read_only, at.map(|at| at.to_string()))
    }

    #[test]
    fn flags_are_read_from_their_end() {
        assert_eq!(asked("a.img"), ("a.img", false, None));
        assert_eq!(asked("/d/a.img:ro"), ("/d/a.img", true, None));
        assert_eq!(asked("a:b"), ("a:b", false, None));
        assert_eq!(asked("a.img:/data"), ("a.img", false, Some("/data".into())));
        assert_eq!(asked("/dev/vg/x:/:ro"), ("/dev/vg/x", true, Some("/".into())));
        assert_eq!(asked("a:/b:/c/"), ("a:/b", false, Some("/c".into())));
        for bad in ["a:/x y", "a:/..", "a:/x\"", "a:/x\n"] {
            assert!(Asked::read(bad).unwrap_err().to_string().contains("--disk"), "{bad}");
        }
    }

    #[test]
    fn mount_points_are_for_those_who_can_be_told() {
        let flags = ["a".to_owned(), "b:/data".to_owned()];
        let disks = read(&flags).unwrap();
        let told = mounts(&disks, Kind::Rust).unwrap();
        assert_eq!((told.len(), told[0].disk), (1, 1));
        for kind in
            [Kind::Hvt, Kind::Unikraft, Kind::Nanos, Kind::Hermit, Kind::Multiboot, Kind::Linux]
        {
            let why = mounts(&disks, kind).unwrap_err().to_string();
            assert!(why.contains("--disk b:/data"), "{why}");
        }
    }

    #[test]
    fn disks_are_opened_as_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [0; 512]).unwrap();
        let path = path.to_str().unwrap();
        let open = |text: &str| Asked::read(text).unwrap().open();
        assert!(!open(path).unwrap().read_only);
        assert!(open(&format!("{path}:ro")).unwrap().read_only);
        assert!(open(&format!("{path}:/data:ro")).unwrap().read_only);
        assert!(open("/").is_err());
        std::fs::write(dir.path().join("small"), [0; 511]).unwrap();
        let small = open(dir.path().join("small").to_str().unwrap()).unwrap_err().to_string();
        assert!(small.contains("511 bytes"), "{small}");
        assert!(open("/no/such").unwrap_err().to_string().contains("/no/such"));
    }
}
