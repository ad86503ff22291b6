//! What Solo5's guests get in place of devices.

use std::sync::Arc;

use mvm_devices::{Bus, Gate, HypercallConfig, HypercallDisk, Hypercalls};

use super::{Disk, Error};
use crate::boot::{Manifest, ManifestKind};

/// Gives each block device that the kernel demands its disk: the one whose serial number is the
/// device's name, or else the first of those whose serial number is no device's name.
///
/// # Errors
/// There is no disk for a block device, or the kernel demands a network device.
pub fn assign(manifest: &Manifest, disks: Vec<Disk>) -> Result<Vec<HypercallDisk>, Error> {
    let demanded = |kind| manifest.entries.iter().enumerate().filter(move |(_, e)| e.kind == kind);
    if let Some((_, entry)) = demanded(ManifestKind::Net).next() {
        return Err(Error::NoNetwork { name: entry.name.clone() });
    }
    let is_demanded =
        |disk: &Disk| demanded(ManifestKind::Block).any(|(_, entry)| entry.name == disk.serial);
    let (mut named, mut others): (Vec<_>, Vec<_>) =
        disks.into_iter().filter(|d| d.file.is_some()).partition(is_demanded);
    let mut assigned = Vec::new();
    for (handle, entry) in demanded(ManifestKind::Block) {
        let by_name = named.iter().position(|d| d.serial == entry.name);
        let disk = match by_name {
            Some(index) => named.remove(index),
            None if others.is_empty() => return Err(Error::NoDisk { name: entry.name.clone() }),
            None => others.remove(0),
        };
        if let Some(file) = disk.file {
            assigned.push(HypercallDisk { handle: handle as u64, file, read_only: disk.read_only });
        }
    }
    for disk in named.iter().chain(&others) {
        tracing::warn!("the disk {:?} is not used: the kernel demands no more", disk.serial);
    }
    Ok(assigned)
}

/// Makes the hypercalls and places them on `bus`.
///
/// # Errors
/// A disk cannot be used or has not even a sector.
pub fn attach(config: HypercallConfig, bus: &mut Bus) -> Result<Arc<Hypercalls>, Error> {
    let hypercalls = Arc::new(Hypercalls::new(config).map_err(Error::HypercallDisk)?);
    if let Some((handle, _)) = hypercalls.capacities().find(|(_, capacity)| *capacity == 0) {
        return Err(Error::EmptyDisk { handle });
    }
    bus.ports.insert("hypercalls", Hypercalls::PORT, Hypercalls::LEN, hypercalls.clone())?;
    Ok(hypercalls)
}

/// What the guest's devices are, and by what their waiting is ended.
#[derive(Debug)]
pub struct Guest<'a> {
    /// What the kernel demands.
    pub manifest: &'a Manifest,
    /// Of the machine.
    pub gate: &'a Arc<Gate>,
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;
    use crate::testing::{file, manifest_note};

    fn manifest(devices: &[(&str, u32)]) -> Manifest {
        Manifest::parse(&manifest_note(devices)).unwrap()
    }

    fn disk(serial: &str) -> Disk {
        let file = file(serial.as_bytes()).unwrap();
        Disk { file: Some(file), read_only: false, serial: serial.into() }
    }

    /// Handles, and the serial numbers of the disks behind them.
    fn assigned(manifest: &Manifest, disks: &[&str]) -> Result<Vec<(u64, String)>, Error> {
        let disks = disks.iter().map(|serial| disk(serial)).collect();
        let read = |mut disk: HypercallDisk| {
            let mut serial = String::new();
            disk.file.rewind().unwrap();
            disk.file.read_to_string(&mut serial).unwrap();
            (disk.handle, serial)
        };
        Ok(assign(manifest, disks)?.into_iter().map(read).collect())
    }

    #[test]
    fn disks_go_to_the_devices_of_their_names_or_in_order() {
        let two = manifest(&[("", 1 << 30), ("data", 1), ("log", 1)]);
        let want = |data: &str, log: &str| vec![(1, data.to_owned()), (2, log.to_owned())];
        assert_eq!(assigned(&two, &["log", "data"]).unwrap(), want("data", "log"));
        assert_eq!(assigned(&two, &["a", "b", "c"]).unwrap(), want("a", "b"));
        assert_eq!(assigned(&two, &["log", "a"]).unwrap(), want("a", "log"));
        assert_eq!(assigned(&manifest(&[]), &["a"]).unwrap(), []);
    }

    #[test]
    fn a_device_that_there_is_not_is_named() {
        let missing = assigned(&manifest(&[("data", 1), ("log", 1)]), &["log"]).unwrap_err();
        assert!(missing.to_string().contains("block device \"data\""), "{missing}");
        let empty = vec![Disk { file: None, read_only: false, serial: "data".into() }];
        let missing = assign(&manifest(&[("data", 1)]), empty).unwrap_err();
        assert!(matches!(missing, Error::NoDisk { .. }), "{missing}");
        let network = assigned(&manifest(&[("data", 1), ("uplink", 2)]), &["data"]).unwrap_err();
        assert!(network.to_string().contains("network device \"uplink\""), "{network}");
    }
}
