//! Finding the VM's virtio block devices.

use std::fs;
use std::path::{Path, PathBuf};

use mvm_agent_protocol::messages::{BlockDevice, block_device::Which};

use crate::disks;
use crate::error::{Error, Result};

/// The device node of `device`.
pub fn node(device: &BlockDevice) -> Result<PathBuf> {
    node_in(Path::new("/sys/block"), device)
}

fn node_in(sys_block: &Path, device: &BlockDevice) -> Result<PathBuf> {
    let name = match &device.which {
        Some(Which::Index(index)) => {
            let name = name_of_index(*index);
            sys_block.join(&name).exists().then_some(name).ok_or_else(|| {
                Error::NotFound(format!(
                    "block device number {index}: the guest has {}",
                    list(sys_block)
                ))
            })?
        }
        Some(Which::Serial(serial)) => by_serial(sys_block, serial).ok_or_else(|| {
            Error::NotFound(format!(
                "block device with serial {serial:?}: the guest has {}",
                list(sys_block)
            ))
        })?,
        Some(Which::Place(place)) => disks::name(*place)?,
        Some(_) | None => {
            return Err(Error::Invalid(
                "a block device needs a serial number, an index or a place".into(),
            ));
        }
    };
    Ok(Path::new("/dev").join(name))
}

/// `vda` is 0, `vdz` 25, `vdaa` 26: the kernel's names.
fn name_of_index(index: u32) -> String {
    let mut letters = Vec::new();
    let mut rest = u64::from(index) + 1;
    while rest > 0 {
        rest -= 1;
        letters.push(b'a' + u8::try_from(rest % 26).unwrap_or(0));
        rest /= 26;
    }
    letters.reverse();
    format!("vd{}", String::from_utf8_lossy(&letters))
}

fn devices(sys_block: &Path) -> impl Iterator<Item = (String, String)> {
    fs::read_dir(sys_block).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok().filter(|name| name.starts_with("vd"))?;
        let serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        Some((name, serial.trim_end().to_owned()))
    })
}

fn by_serial(sys_block: &Path, serial: &str) -> Option<String> {
    devices(sys_block)
        .find(|(_, found)| !serial.is_empty() && found == serial)
        .map(|(name, _)| name)
}

fn list(sys_block: &Path) -> String {
    let mut all: Vec<String> =
        devices(sys_block).map(|(name, serial)| format!("{name} (serial {serial:?})")).collect();
    all.sort();
    if all.is_empty() { "none".into() } else { all.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sys_block() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "root"), ("vdb", "scratch\n"), ("sda", "root"), ("vdc", "")]
        {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("serial"), serial).unwrap();
        }
        dir
    }

    fn find(which: Which) -> Result<PathBuf> {
        let device = BlockDevice { which: Some(which), ..Default::default() };
        node_in(sys_block().path(), &device)
    }

    #[test]
    fn devices_are_found_by_serial_and_index() {
        assert_eq!(find(Which::Serial("scratch".into())).unwrap(), Path::new("/dev/vdb"));
        assert_eq!(find(Which::Index(2)).unwrap(), Path::new("/dev/vdc"));
    }

    #[test]
    fn missing_devices_are_named_with_what_is_there() {
        for which in [Which::Serial("none".into()), Which::Serial(String::new()), Which::Index(9)] {
            let error = find(which).unwrap_err();
            assert!(error.to_string().contains("vdb (serial \"scratch\")"), "{error}");
        }
    }

    #[test]
    fn names_go_on_after_z() {
        let names = [0, 25, 26, 51, 52, 701, 702].map(name_of_index);
        assert_eq!(names, ["vda", "vdz", "vdaa", "vdaz", "vdba", "vdzz", "vdaaa"]);
        assert!(name_of_index(u32::MAX).starts_with("vd"));
    }
}
