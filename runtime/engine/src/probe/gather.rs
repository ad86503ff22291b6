//! Looks at the host: processor flags, modules, the device file and who may open it.
//!
//! Only files that are there for everybody are read, and of each only a bounded part. The user
//! database is read as a file: a static program has no other way to it.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use core::arch::x86_64::__cpuid;

use super::facts::{Device, DeviceFile, Host, User, Virtualization};

/// Most bytes that are read of `/proc/cpuinfo`: the first processor is described in fewer.
const CPUINFO: u64 = 8 << 10;

/// Most bytes that are read of the user database.
const DATABASE: u64 = 4 << 20;

/// Device number of KVM (Linux, Documentation/admin-guide/devices.txt: misc, 232).
const KVM_DEVICE: u64 = nix::sys::stat::makedev(10, 232);

/// Where to look. Tests look elsewhere.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The device.
    pub device: PathBuf,
    /// Usually `/proc`.
    pub proc: PathBuf,
    /// Usually `/sys`.
    pub sys: PathBuf,
    /// Usually `/etc`.
    pub etc: PathBuf,
}

impl Default for Sources {
    fn default() -> Self {
        Self {
            device: "/dev/kvm".into(),
            proc: "/proc".into(),
            sys: "/sys".into(),
            etc: "/etc".into(),
        }
    }
}

impl Sources {
    /// Processor and kernel.
    pub fn host(&self) -> Host {
        let cpuinfo = head(&self.proc.join("cpuinfo"), CPUINFO);
        let module = |name: &&str| self.sys.join("module").join(name).exists();
        let modules =
            |names: &[&str]| names.iter().copied().filter(module).map(Into::into).collect();
        Host {
            virtualization: flag(&cpuinfo),
            cpuid: cpuid_virtualization(),
            hypervisor: has_flag(&cpuinfo, "hypervisor"),
            modules: modules(&["kvm", "kvm_intel", "kvm_amd", "kvm_pvm"]),
            rivals: modules(&["vboxdrv", "vmmon"]),
            device_in_kernel: self.sys.join("class/misc/kvm").exists(),
        }
    }

    /// The device file, and the open device.
    pub fn device(&self) -> (Device, Option<File>) {
        let mut device =
            Device { path: self.device.display().to_string(), file: None, errno: None };
        let open = match self.device.metadata() {
            Ok(metadata) => {
                let is_kvm = metadata.file_type().is_char_device() && metadata.rdev() == KVM_DEVICE;
                device.file = Some(DeviceFile {
                    is_kvm,
                    mode: metadata.mode() & 0o7777,
                    uid: metadata.uid(),
                    gid: metadata.gid(),
                    group: self.group(metadata.gid()).map(|g| g.name),
                });
                // Opening something else may do or wait for anything.
                if is_kvm { self.open().map(Some) } else { Ok(None) }
            }
            Err(e) => Err(e),
        };
        match open {
            Ok(file) => (device, file),
            Err(e) => {
                device.errno = Some(e.raw_os_error().unwrap_or(libc::EIO));
                (device, None)
            }
        }
    }

    fn open(&self) -> io::Result<File> {
        File::options().read(true).write(true).open(&self.device)
    }

    /// Who asks, as far as it matters for a device of group `gid`.
    pub fn user(&self, gid: Option<u32>) -> User {
        let uid = nix::unistd::geteuid().as_raw();
        let passwd = head(&self.etc.join("passwd"), DATABASE);
        let entry = passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let (id, group) = (fields.nth(1)?, fields.next()?);
            (id.parse() == Ok(uid)).then(|| (name.to_owned(), group.parse::<u32>().ok()))
        });
        let (name, primary) = match entry {
            Some((name, primary)) => (Some(name), primary),
            None => (None, None),
        };
        let listed = |gid: u32| {
            primary == Some(gid)
                || self.group(gid).is_some_and(|g| name.iter().any(|n| g.members.contains(n)))
        };
        let listed_in_group = gid.is_some_and(listed);
        User { uid, name, listed_in_group }
    }

    fn group(&self, gid: u32) -> Option<Group> {
        let groups = head(&self.etc.join("group"), DATABASE);
        groups.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            if fields.nth(1)?.parse() != Ok(gid) {
                return None;
            }
            let members = fields.next().unwrap_or_default().split(',').map(Into::into).collect();
            Some(Group { name: name.to_owned(), members })
        })
    }
}

struct Group {
    name: String,
    members: Vec<String>,
}

/// The first `limit` bytes of a file as text; nothing if it cannot be read.
fn head(path: &Path, limit: u64) -> String {
    let mut bytes = Vec::new();
    // Half of it is better than nothing, and nothing is an answer too.
    let _ = File::open(path).and_then(|f| f.take(limit).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The virtualization flag of the first processor.
fn flag(cpuinfo: &str) -> Option<Virtualization> {
    [Virtualization::Vmx, Virtualization::Svm].into_iter().find(|v| has_flag(cpuinfo, v.flag()))
}

fn has_flag(cpuinfo: &str, flag: &str) -> bool {
    let line = cpuinfo.lines().find(|l| l.starts_with("flags"));
    line.is_some_and(|l| l.split_ascii_whitespace().any(|f| f == flag))
}

/// What the processor says (SDM vol. 2, CPUID 1, ECX bit 5; APM vol. 3, 8000_0001h, ECX bit 2).
fn cpuid_virtualization() -> Option<Virtualization> {
    if __cpuid(1).ecx & 1 << 5 != 0 {
        return Some(Virtualization::Vmx);
    }
    let extended = __cpuid(0x8000_0000).eax >= 0x8000_0001;
    (extended && __cpuid(0x8000_0001).ecx & 1 << 2 != 0).then_some(Virtualization::Svm)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn sources(dir: &Path) -> Sources {
        let at = |name: &str| dir.join(name);
        Sources { device: at("kvm"), proc: at("proc"), sys: at("sys"), etc: at("etc") }
    }

    fn write(dir: &Path, name: &str, text: &str) {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        let cpuinfo = "model name : svm\nflags\t\t: fpu vmx_lock hypervisor\nvmx flags : vnmi\n";
        assert!(has_flag(cpuinfo, "hypervisor"));
        assert_eq!(flag(cpuinfo), None);
        assert_eq!(flag("flags : a svm"), Some(Virtualization::Svm));
        assert_eq!(flag("flags : vmx"), Some(Virtualization::Vmx));
    }

    #[test]
    fn host_facts_come_from_proc_and_sys() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "proc/cpuinfo", "flags : vmx\n\nflags : vmx hypervisor\n");
        for module in ["kvm", "kvm_intel", "vboxdrv", "other"] {
            write(dir.path(), &format!("sys/module/{module}/refcnt"), "0");
        }
        let host = sources(dir.path()).host();
        assert_eq!(host.virtualization, Some(Virtualization::Vmx));
        assert!(!host.hypervisor && !host.device_in_kernel);
        assert_eq!(
            (host.modules, host.rivals),
            (vec!["kvm".into(), "kvm_intel".into()], vec!["vboxdrv".into()])
        );
    }

    #[test]
    fn nothing_readable_is_no_facts() {
        let dir = tempfile::tempdir().unwrap();
        let sources = sources(dir.path());
        let host = sources.host();
        assert_eq!(Host { cpuid: None, ..host }, Host::default());
        let (device, file) = sources.device();
        assert_eq!((device.errno, device.file, file.is_none()), (Some(libc::ENOENT), None, true));
        assert_eq!(sources.user(Some(0)).name, None);
    }

    #[test]
    fn something_else_at_the_devices_place_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let sources = sources(dir.path());
        // Opening it would wait for ever.
        nix::unistd::mkfifo(&sources.device, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (device, file) = sources.device();
        assert!(file.is_none() && device.errno.is_none());
        assert!(!device.file.unwrap().is_kvm);
    }

    #[test]
    fn groups_and_users_are_looked_up() {
        let dir = tempfile::tempdir().unwrap();
        let uid = nix::unistd::geteuid();
        write(dir.path(), "etc/group", "bad\nroot:x:0:\nkvm:x:993:alice,me\nmine:x:7:\n");
        write(dir.path(), "etc/passwd", &format!("alice:x:123456:1::/:/x\nme:x:{uid}:7:::\n"));
        let sources = sources(dir.path());
        assert_eq!(sources.group(993).unwrap().name, "kvm");
        assert!(sources.group(994).is_none());
        let user = sources.user(Some(993));
        assert_eq!((user.name.as_deref(), user.listed_in_group), (Some("me"), true));
        assert!(sources.user(Some(7)).listed_in_group, "by the primary group");
        assert!(!sources.user(Some(0)).listed_in_group && !sources.user(None).listed_in_group);
    }
}
