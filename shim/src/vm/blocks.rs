//! Block devices of the host that a container is to have (`linux.devices`): disks of its machine, from the start or
//! [plugged](super::plugged) while it runs.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use mvm_sandbox::Disk;
use mvm_sandbox::spec::GivenDevice;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use super::spec::linux;

/// Where the kernel names block devices by their numbers.
const BY_NUMBER: &str = "/sys/dev/block";

/// The most that a machine has from the start, beside its root.
const MOST: usize = 16;

/// Why a container cannot have a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such device, or it may not be opened.
    #[error("cannot use the block device {} (number {major}:{minor} on the host): {source}", path.display())]
    Open {
        /// Its path in the container.
        path: PathBuf,
        /// Number of its driver.
        major: u32,
        /// Its number with that driver.
        minor: u32,
        /// What the host said.
        source: std::io::Error,
    },
    /// More than there is room for.
    #[error("{found} block devices are too many: there can be {most}")]
    TooMany {
        /// How many different ones.
        found: usize,
        /// How many there can be.
        most: usize,
    },
}

/// A device by its numbers on the host: that of its driver, and its own.
pub type Number = (u32, u32);

/// A device that the specification names, and gives access to by its numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its path in the container.
    pub path: PathBuf,
    /// Which one of the host's.
    pub number: Number,
    /// It is not to be written.
    pub read_only: bool,
}

impl Wanted {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open(&self) -> Result<File, Error> {
        let (major, minor) = self.number;
        open_number(major, minor, self.read_only).map_err(|source| Error::Open {
            path: self.path.clone(),
            major,
            minor,
            source,
        })
    }
}

/// The block devices that a container is given: each that its rules allow by its own numbers, and of a privileged
/// container, which is allowed everything at once, those that are asked for. Its specification lists whatever the host
/// has besides, by the host's names, which is nobody's wish.
pub fn wanted(spec: &Spec) -> Vec<Wanted> {
    wanted_beside(spec, is_hosts_name)
}

fn wanted_beside(spec: &Spec, is_hosts_name: impl Fn(&Path, Number) -> bool) -> Vec<Wanted> {
    let linux = linux(spec);
    let rules = linux.resources().as_ref().and_then(|r| r.devices().clone()).unwrap_or_default();
    let everything = rules.iter().any(allows_everything);
    let devices = linux.devices().as_deref().unwrap_or_default();
    let mut found: Vec<Wanted> = Vec::new();
    for device in devices.iter().filter(|d| d.typ() == LinuxDeviceType::B) {
        let (Ok(major), Ok(minor)) = (device.major().try_into(), device.minor().try_into()) else {
            continue;
        };
        let number = (major, minor);
        let own = rules.iter().rfind(|rule| {
            rule.typ() == Some(LinuxDeviceType::B)
                && (rule.major(), rule.minor()) == (Some(device.major()), Some(device.minor()))
        });
        let read_only = match own {
            Some(rule) if rule.allow() => {
                rule.access().as_ref().is_some_and(|access| !access.contains('w'))
            }
            None if everything => {
                // What is asked for by the host's name is there twice.
                let named = devices.iter().filter(|other| other.path() == device.path()).count();
                if named < 2 && is_hosts_name(device.path(), number) {
                    continue;
                }
                false
            }
            _ => continue,
        };
        let wish = Wanted { path: device.path().clone(), number, read_only };
        if !found.contains(&wish) {
            found.push(wish);
        }
    }
    found
}

fn allows_everything(rule: &LinuxDeviceCgroup) -> bool {
    let all = |number: Option<i64>| number.is_none_or(|number| number < 0);
    rule.allow()
        && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
        && all(rule.major())
        && all(rule.minor())
}

fn is_hosts_name(path: &Path, number: Number) -> bool {
    let about = std::fs::metadata(path);
    about.is_ok_and(|a| {
        a.file_type().is_block_device()
            && (rustix::fs::major(a.rdev()), rustix::fs::minor(a.rdev())) == number
    })
}

/// Each device once, whatever names it has.
pub fn distinct(wanted: &[Wanted]) -> Vec<&Wanted> {
    let mut seen = BTreeSet::new();
    wanted.iter().filter(|device| seen.insert(device.number)).collect()
}

/// Refuses more devices than a machine that runs already has places for.
///
/// # Errors
/// [`Error::TooMany`].
pub fn check(wanted: &[Wanted], most: u32) -> Result<(), Error> {
    let (found, most) = (distinct(wanted).len(), most as usize);
    if found > most { Err(Error::TooMany { found, most }) } else { Ok(()) }
}

/// Takes out what means nothing in a guest: block devices by the host's numbers, but for those that it gets.
pub fn keep_given(spec: &mut Spec, wanted: &[Wanted]) {
    let mut linux = linux(spec);
    let Some(devices) = linux.devices() else { return };
    let given = |device: &LinuxDevice| {
        let is = |w: &Wanted| {
            (i64::from(w.number.0), i64::from(w.number.1)) == (device.major(), device.minor())
        };
        wanted.iter().any(|w| w.path == *device.path() && is(w))
    };
    let kept: Vec<_> =
        devices.iter().filter(|d| d.typ() != LinuxDeviceType::B || given(d)).cloned().collect();
    linux.set_devices(Some(kept));
    spec.set_linux(Some(linux));
}

/// Opens the devices as disks of a machine to be, which come behind `before` others. A device that has two names is one
/// disk.
///
/// # Errors
/// See [`Error`].
pub fn open(wanted: &[Wanted], before: usize) -> Result<(Vec<Disk>, Vec<GivenDevice>), Error> {
    let devices = distinct(wanted);
    if devices.len() > MOST {
        return Err(Error::TooMany { found: devices.len(), most: MOST });
    }
    let (mut disks, mut given) = (Vec::new(), Vec::new());
    for (place, device) in (before..).zip(devices) {
        disks.push(Disk { file: device.open()?, read_only: device.read_only });
        let (major, minor) = device.number;
        given.push(GivenDevice { major, minor, place: u32::try_from(place).unwrap_or(u32::MAX) });
    }
    Ok((disks, given))
}

/// Opens the device of this number, by whatever name the host has for it.
fn open_number(major: u32, minor: u32, read_only: bool) -> std::io::Result<File> {
    let uevent =
        std::fs::read_to_string(Path::new(BY_NUMBER).join(format!("{major}:{minor}/uevent")))?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=")).unwrap_or_default();
    let file = File::options().read(true).write(!read_only).open(Path::new("/dev").join(name))?;
    let about = file.metadata()?;
    let number = (rustix::fs::major(about.rdev()), rustix::fs::minor(about.rdev()));
    if !about.file_type().is_block_device() || number != (major, minor) {
        return Err(std::io::Error::other(format!("/dev/{name} is another device")));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(devices: &serde_json::Value, rules: &serde_json::Value) -> Spec {
        let linux = json!({ "devices": devices, "resources": { "devices": rules } });
        serde_json::from_value(json!({ "ociVersion": "1.0.2", "linux": linux })).unwrap()
    }

    fn device(path: &str, kind: &str, major: i64, minor: i64) -> serde_json::Value {
        json!({ "path": path, "type": kind, "major": major, "minor": minor })
    }

    #[test]
    fn only_what_is_allowed_by_its_own_number_is_given() {
        let devices = json!([
            device("/dev/a", "b", 7, 1),
            device("/dev/b", "b", 7, 2),
            device("/dev/c", "c", 7, 1),
            device("/dev/sda", "b", 8, 0),
            device("/dev/odd", "b", -1, 0),
        ]);
        let rules = json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "b", "major": 7, "minor": 1, "access": "rwm" },
            { "allow": true, "type": "b", "major": 7, "minor": 2, "access": "r" },
            { "allow": true, "type": "b", "major": 8, "access": "rwm" },
            { "allow": true, "type": "b", "major": -1, "minor": 0, "access": "rwm" },
        ]);
        let mut spec = spec(&devices, &rules);
        let found = wanted(&spec);
        let told: Vec<_> = found.iter().map(|w| (w.number, w.read_only)).collect();
        assert_eq!(told, [((7, 1), false), ((7, 2), true)]);
        keep_given(&mut spec, &found);
        let kept = linux(&spec).devices().clone().unwrap();
        let kept: Vec<_> = kept.iter().map(|d| d.path().display().to_string()).collect();
        assert_eq!(kept, ["/dev/a", "/dev/b", "/dev/c"]);
        assert!(check(&found, 2).is_ok() && check(&[], 0).is_ok());
        assert!(matches!(check(&found, 1), Err(Error::TooMany { found: 2, most: 1 })));
        let twice: Vec<_> = found.iter().chain(&found).cloned().collect();
        assert_eq!(distinct(&twice).len(), 2);
    }

    #[test]
    fn who_is_allowed_everything_gets_what_is_asked_for_and_not_what_the_host_has() {
        let devices = json!([
            device("/dev/data", "b", 8, 0),
            device("/dev/sdb", "b", 8, 16),
            device("/dev/sda", "b", 8, 0),
            device("/dev/sdb", "b", 8, 16),
            device("/dev/sdc", "b", 8, 32),
        ]);
        let everything = json!([{ "allow": true, "access": "rwm" }]);
        let hosts = |path: &Path, _| path.starts_with("/dev") && !path.ends_with("data");
        let mut asked = spec(&devices, &everything);
        let found = wanted_beside(&asked, hosts);
        let told: Vec<_> = found.iter().map(|w| (w.path.to_str().unwrap(), w.number)).collect();
        assert_eq!(told, [("/dev/data", (8, 0)), ("/dev/sdb", (8, 16))]);
        keep_given(&mut asked, &found);
        let kept = linux(&asked).devices().clone().unwrap();
        assert!(
            kept.iter()
                .all(|d| ["/dev/data", "/dev/sdb"].map(Path::new).contains(&d.path().as_path()))
        );
        // Rules for one kind, or against it, are none for everything.
        for rules in [
            json!([{ "allow": true, "type": "b", "access": "rwm" }]),
            json!([{ "allow": false, "access": "rwm" }]),
            json!([{ "allow": true, "major": 8, "access": "rwm" }]),
        ] {
            assert_eq!(wanted_beside(&spec(&devices, &rules), hosts), []);
        }
        assert!(
            !is_hosts_name(Path::new("/dev/null"), (1, 3))
                && !is_hosts_name(Path::new("/no"), (8, 0))
        );
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let devices = json!([device("/dev/data", "b", 4000, 1)]);
        let rules =
            json!([{ "allow": true, "type": "b", "major": 4000, "minor": 1, "access": "rw" }]);
        let error = open(&wanted(&spec(&devices, &rules)), 0).unwrap_err().to_string();
        assert!(error.contains("/dev/data") && error.contains("4000:1"), "{error}");
    }
}
