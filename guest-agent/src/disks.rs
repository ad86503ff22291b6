//! Disks that come and go while the guest runs.
//!
//! Each has a place: a register window that the kernel has known from the start, where it finds no device until the host
//! has put a disk in. The kernel looks there again when the driver of such windows is bound to it (`bind` of the driver
//! in sysfs), and lets go of the disk, after writing out what it has of it, when that is undone (`unbind`).

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};

const SYSFS: &str = "/sys";

/// How long the kernel may take to write out a file system that nobody uses any more, and how often to look.
const LET_GO: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(20);

/// The driver of register windows, below [`SYSFS`].
const DRIVER: &str = "bus/platform/drivers/virtio-mmio";

/// Has the kernel look for the disk at `place`.
pub fn plug(place: u32) -> Result<()> {
    tell(Path::new(SYSFS), place, "bind")?;
    match name(place) {
        Ok(_) => Ok(()),
        Err(e) => {
            unplug(place)?;
            Err(e)
        }
    }
}

/// Has the kernel let go of the disk at `place`, once nothing of it is mounted any more.
pub fn unplug(place: u32) -> Result<()> {
    let unused = name(place).map_or(Ok(()), |name| wait_unmounted(&Path::new("/dev").join(name)));
    tell(Path::new(SYSFS), place, "unbind").and(unused)
}

/// Waits until a file system on the disk has been written out: the processes that see it have been ended, and the kernel takes it
/// out of use at its own time.
fn wait_unmounted(node: &Path) -> Result<()> {
    let deadline = Instant::now() + LET_GO;
    loop {
        // Whoever mounts a disk has it for himself alone (open(2), O_EXCL).
        match File::options().read(true).custom_flags(libc::O_EXCL).open(node) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(LOOK);
            }
            opened => {
                return opened
                    .map(drop)
                    .context(|| format!("wait for {} to be unmounted", node.display()));
            }
        }
    }
}

/// The kernel's name of the disk at `place`.
pub fn name(place: u32) -> Result<String> {
    name_in(Path::new(SYSFS), place)
}

fn window(place: u32) -> String {
    format!("virtio-mmio.{place}")
}

fn tell(sysfs: &Path, place: u32, what: &str) -> Result<()> {
    let path = sysfs.join(DRIVER).join(what);
    fs::write(&path, window(place))
        .context(|| format!("{what} the driver of the disk at place {place}"))
}

fn name_in(sysfs: &Path, place: u32) -> Result<String> {
    let entries =
        |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().collect::<Vec<_>>();
    let window = sysfs.join("bus/platform/devices").join(window(place));
    let devices = entries(&window)
        .into_iter()
        .filter(|e| e.file_name().as_encoded_bytes().starts_with(b"virtio"));
    let mut disks = devices.flat_map(|device| entries(&device.path().join("block")));
    let disk = disks.next().and_then(|disk| disk.file_name().into_string().ok());
    disk.ok_or_else(|| Error::NotFound(format!("the kernel finds no disk at place {place}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_found_by_their_place() {
        let dir = tempfile::tempdir().unwrap();
        let devices = dir.path().join("bus/platform/devices");
        for below in [
            "virtio-mmio.3/virtio7/block/vdb",
            "virtio-mmio.3/power",
            "virtio-mmio.30/virtio8/net/eth0",
        ] {
            fs::create_dir_all(devices.join(below)).unwrap();
        }
        assert_eq!(name_in(dir.path(), 3).unwrap(), "vdb");
        for missing in [0, 30, u32::MAX] {
            let error = name_in(dir.path(), missing).unwrap_err().to_string();
            assert!(error.contains(&format!("place {missing}")), "{error}");
        }
    }

    #[test]
    fn the_driver_is_told_of_the_window() {
        let dir = tempfile::tempdir().unwrap();
        assert!(tell(dir.path(), 1, "bind").unwrap_err().to_string().contains("place 1"));
        fs::create_dir_all(dir.path().join(DRIVER)).unwrap();
        for what in ["bind", "unbind"] {
            tell(dir.path(), 12, what).unwrap();
            assert_eq!(
                fs::read_to_string(dir.path().join(DRIVER).join(what)).unwrap(),
                "virtio-mmio.12"
            );
        }
    }
}
