//! What Solo5's guests get in place of devices.

use std::io;
use std::sync::Arc;

use mvm_devices::virtio::net::NetError;
use mvm_devices::{Bus, Gate, HypercallConfig, HypercallDisk, HypercallNet, Hypercalls};

use super::{Disk, Error, NetCard, net};
use crate::boot::{Manifest, ManifestEntry as Entry, ManifestKind};

/// Gives each block device that the kernel demands its disk: the one whose serial number is the
/// device's name, or else the first of those whose serial number is no device's name.
///
/// # Errors
/// There is no disk for a block device.
pub fn assign(manifest: &Manifest, disks: Vec<Disk>) -> Result<Vec<HypercallDisk>, Error> {
    let demanded = |kind| manifest.entries.iter().enumerate().filter(move |(_, e)| e.kind == kind);
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

/// Gives each network device that the kernel demands its network, in order.
///
/// # Errors
/// There are more or fewer networks than the kernel demands, or one cannot be used.
pub fn assign_nets(manifest: &Manifest, nets: Vec<NetCard>) -> Result<Vec<HypercallNet>, Error> {
    let demanded = manifest.entries.iter().enumerate();
    let demanded: Vec<_> = demanded.filter(|(_, e)| e.kind == ManifestKind::Net).collect();
    if let Some((_, entry)) = demanded.get(nets.len()) {
        return Err(Error::NoNetwork { name: entry.name.clone() });
    }
    if nets.len() > demanded.len() {
        return Err(Error::SpareNetwork { networks: nets.len(), demanded: demanded.len() });
    }
    let assign = |((handle, entry), card): ((usize, &Entry), NetCard)| {
        let failed = |source| NetError::Start { name: entry.name.clone(), source };
        // Such a guest has one processor. Queues that are closed get no packets.
        let none = || io::Error::from(io::ErrorKind::NotFound);
        let queue = card.queues.into_iter().next().ok_or_else(none).map_err(failed)?;
        let backend = net::backend(queue).map_err(failed)?;
        Ok(HypercallNet { handle: handle as u64, mac: card.mac, mtu: card.mtu, backend })
    };
    demanded.into_iter().zip(nets).map(assign).collect()
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
    }

    #[test]
    fn networks_go_to_the_devices_in_order_and_none_is_left_over() {
        let card = |last| {
            let (ours, _) = std::os::unix::net::UnixDatagram::pair().unwrap();
            NetCard { queues: vec![ours.into()], mac: [2, 0, 0, 0, 0, last], mtu: 1400 }
        };
        let two = manifest(&[("", 1 << 30), ("uplink", 2), ("data", 1), ("service", 2)]);
        let assigned = assign_nets(&two, vec![card(1), card(2)]).unwrap();
        let seen: Vec<_> = assigned.iter().map(|net| (net.handle, net.mac[5], net.mtu)).collect();
        assert_eq!(seen, [(1, 1, 1400), (3, 2, 1400)]);
        let missing = assign_nets(&two, vec![card(1)]).unwrap_err().to_string();
        assert!(missing.contains("network device \"service\""), "{missing}");
        let spare = assign_nets(&manifest(&[("data", 1)]), vec![card(1)]).unwrap_err();
        assert!(spare.to_string().contains("demands 0"), "{spare}");
        let file = NetCard { queues: vec![file(b"x").unwrap().into()], ..card(1) };
        let unusable = assign_nets(&two, vec![file, card(2)]).unwrap_err().to_string();
        assert!(unusable.contains("uplink"), "{unusable}");
    }
}
