//! Block devices that come into a machine while it runs: those of a pod's containers.
//!
//! A device is one disk of the machine, however many of its containers have it: what one of them writes the others read.
//! It goes with the last one that has it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mvm_sandbox::guest::Guest;
use mvm_sandbox::spec::GivenDevice;
use mvm_vmm::monitor::ControlClient;

use super::blocks::{self, Number, Wanted};
use super::rootfs;

/// Places for disks that a pod's machine is booted with, if other devices leave so many.
pub const PLACES: u32 = 8;

/// Most of them that roots of containers take: the others are for block devices, which cannot come in another way.
const ROOTS: usize = 4;

/// How long a monitor may take to put a disk into its place, or to take one out.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Why a root is no disk.
#[derive(Debug, thiserror::Error)]
pub enum NoDisk {
    /// Others have the places.
    #[error("{ROOTS} roots of the pod's containers are disks already")]
    Full,
    /// It is not there.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The image or device.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The machine has no place for it, or the guest does not take it.
    #[error(transparent)]
    Plug(mvm_sandbox::Error),
}

/// Why a container does not get its devices.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One is not there.
    #[error(transparent)]
    Open(#[from] blocks::Error),
    /// The disk is there, and cannot be written.
    #[error(
        "{path}: another container of the pod has this block device (number {}:{} on the host), and has it read-only: \
         the container that writes has to start first, or after that one's end", number.0, number.1
    )]
    ReadOnly {
        /// Its path in the container.
        path: String,
        /// Its number on the host.
        number: Number,
    },
    /// The machine has no place for it, or the guest does not take it.
    #[error("{path}: the block device does not come into the pod's machine: {source}")]
    Plug {
        /// Its path in the container.
        path: String,
        /// What machine or guest said.
        source: mvm_sandbox::Error,
    },
}

/// Where disks come and go.
pub trait Socket {
    /// Has the guest's kernel know file systems of the type `kind`, by a module of it.
    fn prepare(&mut self, kind: &str, module: &[u8]) -> Result<(), mvm_sandbox::Error>;
    /// Makes `file` a disk of the guest. Returns its place.
    fn plug(&mut self, file: File, read_only: bool) -> Result<u32, mvm_sandbox::Error>;
    /// Takes the disk at `place` away, written out by the guest.
    fn unplug(&mut self, place: u32) -> Result<(), mvm_sandbox::Error>;
}

/// A machine that runs: its monitor, and the agent in it.
#[derive(Debug)]
pub struct Running<'a> {
    /// The monitor.
    pub monitor: ControlClient,
    /// The agent.
    pub guest: &'a Guest,
}

impl Socket for Running<'_> {
    fn prepare(&mut self, kind: &str, module: &[u8]) -> Result<(), mvm_sandbox::Error> {
        self.guest.add_file_system(kind, module)
    }

    fn plug(&mut self, file: File, read_only: bool) -> Result<u32, mvm_sandbox::Error> {
        let place = self.monitor.plug(file.as_fd(), read_only)?;
        // Only the monitor has it now: when that lets go of it, the host's device is free.
        drop(file);
        if let Err(e) = self.guest.plug(place) {
            if let Err(left) = self.monitor.unplug(place) {
                tracing::warn!(
                    place,
                    "cannot take out a disk that the guest has not taken: {left}"
                );
            }
            return Err(e);
        }
        Ok(place)
    }

    fn unplug(&mut self, place: u32) -> Result<(), mvm_sandbox::Error> {
        let let_go = self.guest.unplug(place);
        // Even if not: the device is wanted back.
        self.monitor.unplug(place)?;
        let_go
    }
}

/// The devices that have come into one machine.
#[derive(Debug, Default)]
pub struct Plugged {
    devices: Mutex<BTreeMap<Number, Disk>>,
    /// Places of roots, and whether they can be written.
    roots: Mutex<BTreeMap<u32, bool>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Disk {
    place: u32,
    read_only: bool,
    /// Containers that have it.
    users: u32,
}

impl Plugged {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Number, Disk>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn roots(&self) -> MutexGuard<'_, BTreeMap<u32, bool>> {
        self.roots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a disk of a container's root. Returns its place.
    ///
    /// # Errors
    /// See [`NoDisk`].
    pub fn plug_root(&self, root: &rootfs::Disk, socket: &mut dyn Socket) -> Result<u32, NoDisk> {
        let mut roots = self.roots();
        if roots.len() >= ROOTS {
            return Err(NoDisk::Full);
        }
        let file =
            root.open().map_err(|source| NoDisk::Open { path: root.path.clone(), source })?;
        let (kind, read_only) = (&root.system.kind, root.system.read_only);
        if let Some(module) = root.module {
            socket.prepare(kind, module.0).map_err(NoDisk::Plug)?;
        }
        let place = socket.plug(file, read_only).map_err(NoDisk::Plug)?;
        roots.insert(place, !read_only);
        Ok(place)
    }

    /// Takes it back, written out by the guest.
    pub fn unplug_root(&self, place: u32, socket: &mut dyn Socket) {
        if self.roots().remove(&place).is_some()
            && let Err(e) = socket.unplug(place)
        {
            tracing::warn!(place, "the guest has not let go of a container's root: {e}");
        }
    }

    /// Whether there is a root that the guest has to write out.
    pub fn has_written_roots(&self) -> bool {
        self.roots().values().any(|written| *written)
    }

    /// Gives a container the devices that it wants: all of them or none.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn plug(
        &self,
        wanted: &[Wanted],
        socket: &mut dyn Socket,
    ) -> Result<Vec<GivenDevice>, Error> {
        let mut disks = self.lock();
        let mut given = Vec::new();
        for device in blocks::distinct(wanted) {
            match plug_one(&mut disks, device, socket) {
                Ok(place) => {
                    let (major, minor) = device.number;
                    given.push(GivenDevice { major, minor, place });
                }
                Err(e) => {
                    take_back(&mut disks, &given, socket);
                    return Err(e);
                }
            }
        }
        Ok(given)
    }

    /// Takes them back.
    pub fn unplug(&self, given: &[GivenDevice], socket: &mut dyn Socket) {
        take_back(&mut self.lock(), given, socket);
    }
}

fn plug_one(
    disks: &mut BTreeMap<Number, Disk>,
    device: &Wanted,
    socket: &mut dyn Socket,
) -> Result<u32, Error> {
    let path = || device.path.display().to_string();
    if let Some(disk) = disks.get_mut(&device.number) {
        // What a container may do with a disk that can be written is for its control group in the guest to say.
        if disk.read_only && !device.read_only {
            return Err(Error::ReadOnly { path: path(), number: device.number });
        }
        disk.users += 1;
        return Ok(disk.place);
    }
    let read_only = device.read_only;
    let plugged = socket.plug(device.open()?, read_only);
    let place = plugged.map_err(|source| Error::Plug { path: path(), source })?;
    disks.insert(device.number, Disk { place, read_only, users: 1 });
    Ok(place)
}

fn take_back(disks: &mut BTreeMap<Number, Disk>, given: &[GivenDevice], socket: &mut dyn Socket) {
    for device in given {
        let number = (device.major, device.minor);
        let Some(disk) = disks.get_mut(&number) else { continue };
        disk.users -= 1;
        if disk.users > 0 {
            continue;
        }
        let place = disk.place;
        disks.remove(&number);
        if let Err(e) = socket.unplug(place) {
            // The guest may have lost something of it, and the place is not used again unless it lets go.
            tracing::warn!(
                "the guest has not let go of the block device {}:{} of the host: {e}",
                number.0,
                number.1
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use mvm_sandbox::spec::FileSystem;

    use super::*;

    /// Places, and what is at them: whether it can be written.
    #[derive(Default)]
    struct Mock {
        places: [Option<bool>; 2],
        stuck: bool,
    }

    impl Socket for Mock {
        fn prepare(&mut self, kind: &str, _: &[u8]) -> Result<(), mvm_sandbox::Error> {
            Err(mvm_sandbox::Error::Setup(format!("no {kind} here")))
        }

        fn plug(&mut self, _: File, read_only: bool) -> Result<u32, mvm_sandbox::Error> {
            let full = || mvm_sandbox::Error::Setup("full".into());
            let free = self.places.iter().position(Option::is_none).ok_or_else(full)?;
            self.places[free] = Some(!read_only);
            Ok(free as u32)
        }

        fn unplug(&mut self, place: u32) -> Result<(), mvm_sandbox::Error> {
            assert!(self.places[place as usize].is_some(), "nothing is there");
            if self.stuck {
                return Err(mvm_sandbox::Error::Setup("stuck".into()));
            }
            self.places[place as usize] = None;
            Ok(())
        }
    }

    /// Places without end, and the file systems that have been brought.
    #[derive(Default)]
    struct Many(std::collections::BTreeSet<u32>, Vec<String>);

    impl Socket for Many {
        fn prepare(&mut self, kind: &str, _: &[u8]) -> Result<(), mvm_sandbox::Error> {
            self.1.push(kind.to_owned());
            Ok(())
        }

        fn plug(&mut self, _: File, _: bool) -> Result<u32, mvm_sandbox::Error> {
            let free = (0..).find(|place| !self.0.contains(place)).unwrap_or_default();
            self.0.insert(free);
            Ok(free)
        }

        fn unplug(&mut self, place: u32) -> Result<(), mvm_sandbox::Error> {
            assert!(self.0.remove(&place), "nothing is there");
            Ok(())
        }
    }

    fn root(path: &std::path::Path, kind: &str, read_only: bool) -> rootfs::Disk {
        let system = FileSystem { kind: kind.into(), options: vec![], read_only };
        rootfs::Disk { path: path.to_owned(), system, module: None }
    }

    /// Block devices of this host, or nothing is tested.
    fn devices(read_only: bool) -> Vec<Wanted> {
        let names = std::fs::read_dir("/sys/dev/block").unwrap();
        let number = |name: &str| {
            let (major, minor) = name.split_once(':')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        };
        let numbers = names.flatten().filter_map(|e| number(e.file_name().to_str()?));
        let wanted = numbers.map(|number| Wanted { path: "/dev/x".into(), number, read_only });
        wanted.filter(|device| device.open().is_ok()).collect()
    }

    #[test]
    fn a_device_is_one_disk_for_all_and_goes_with_the_last() {
        let Some(one) = devices(true).into_iter().next() else { return };
        let both = [one.clone(), Wanted { path: "/dev/y".into(), ..one.clone() }];
        let (mut mock, plugged) = (Mock::default(), Plugged::default());
        let first = plugged.plug(&both, &mut mock).unwrap();
        let second = plugged.plug(&both[..1], &mut mock).unwrap();
        assert_eq!((first.len(), &first), (1, &second));
        assert_eq!(mock.places, [Some(false), None]);
        let writer = Wanted { read_only: false, ..one };
        let refused = plugged.plug(std::slice::from_ref(&writer), &mut mock).unwrap_err();
        assert!(matches!(refused, Error::ReadOnly { number, .. } if number == writer.number));
        plugged.unplug(&first, &mut mock);
        assert_eq!(mock.places, [Some(false), None]);
        plugged.unplug(&second, &mut mock);
        assert_eq!(mock.places, [None, None]);
    }

    #[test]
    fn roots_leave_places_for_devices() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let root = root(&path, "ext4", true);
        let (mut mock, plugged) = (Many::default(), Plugged::default());
        let missing = plugged.plug_root(&root, &mut mock).unwrap_err();
        assert!(matches!(missing, NoDisk::Open { .. }), "{missing}");
        std::fs::write(&path, "").unwrap();
        for _ in 1..ROOTS {
            plugged.plug_root(&root, &mut mock).unwrap();
        }
        assert!(!plugged.has_written_roots());
        let written = self::root(&path, "ext4", false);
        let place = plugged.plug_root(&written, &mut mock).unwrap();
        assert!(plugged.has_written_roots());
        assert!(matches!(plugged.plug_root(&root, &mut mock), Err(NoDisk::Full)));
        plugged.unplug_root(place, &mut mock);
        plugged.unplug_root(place, &mut mock);
        assert_eq!((mock.0.len(), plugged.has_written_roots()), (ROOTS - 1, false));
        plugged.plug_root(&root, &mut mock).unwrap();
        assert_eq!(mock.1, [""; 0]);
    }

    #[test]
    fn the_module_for_a_root_comes_before_its_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, "").unwrap();
        let module = Some(rootfs::Module(b"module"));
        let root = rootfs::Disk { module, ..root(&path, "xfs", false) };
        let (mut mock, plugged) = (Many::default(), Plugged::default());
        for _ in 0..ROOTS {
            plugged.plug_root(&root, &mut mock).unwrap();
        }
        assert_eq!((mock.0.len(), &mock.1), (ROOTS, &vec!["xfs".to_owned(); ROOTS]));
        // Not for nothing.
        assert!(matches!(plugged.plug_root(&root, &mut mock), Err(NoDisk::Full)));
        assert_eq!(mock.1.len(), ROOTS);
        // Without it there is no disk.
        let (mut mock, plugged) = (Mock::default(), Plugged::default());
        let refused = plugged.plug_root(&root, &mut mock).unwrap_err();
        assert!(refused.to_string().contains("no xfs here"), "{refused}");
        assert_eq!((mock.places, plugged.has_written_roots()), ([None, None], false));
    }

    #[test]
    fn a_container_gets_all_of_its_devices_or_none() {
        let devices = devices(true);
        let Some(three) = devices.get(..3) else { return };
        let (mut mock, plugged) = (Mock::default(), Plugged::default());
        let refused = plugged.plug(three, &mut mock).unwrap_err();
        assert!(matches!(refused, Error::Plug { .. }), "{refused}");
        let missing = Wanted { number: (4000, 1), ..three[0].clone() };
        let refused = plugged.plug(&[three[0].clone(), missing], &mut mock).unwrap_err();
        assert!(matches!(refused, Error::Open(_)), "{refused}");
        assert_eq!((mock.places, plugged.lock().len()), ([None, None], 0));
        // One that the guest keeps is not the container's any more all the same.
        let given = plugged.plug(&three[..1], &mut mock).unwrap();
        mock.stuck = true;
        plugged.unplug(&given, &mut mock);
        assert_eq!((mock.places, plugged.lock().len()), ([Some(false), None], 0));
    }
}
