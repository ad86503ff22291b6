//! Images packaged for urunc: keys `com.urunc.unikernel.*` in annotations, labels, or `/urunc.json`
//! in the image's root. The values of one place are all plain or all base64; which, the type tells.

use mvm_vmm::config::BootProtocol;

use super::value::{self, Encoding};
use super::{
    Dialect, DiskSource, Error, Kind, Mount, MountPoint, Packaging, Pairs, UnikernelPlan, Words,
};

/// Names the kind of guest; has to be there.
const TYPE: &str = "com.urunc.unikernel.unikernelType";
/// Path of the kernel; has to be there.
const BINARY: &str = "com.urunc.unikernel.binary";
const CMDLINE: &str = "com.urunc.unikernel.cmdline";
const INITRD: &str = "com.urunc.unikernel.initrd";
const VERSION: &str = "com.urunc.unikernel.unikernelVersion";
/// Path of a raw disk.
const BLOCK: &str = "com.urunc.unikernel.block";
/// Where the guest is to mount it.
const MOUNT_POINT: &str = "com.urunc.unikernel.blkMntPoint";
/// The name of the network device in the manifest of a guest of Solo5.
const NET_DEVICE: &str = "com.urunc.unikernel.solo5NetDev";
/// Names another monitor. What the guest was built for its file says better, except that Solo5 builds
/// one file for each.
const HYPERVISOR: &str = "com.urunc.unikernel.hypervisor";
/// Ask for the container's root file system as a disk; the second is the older name.
const MOUNT: [&str; 2] = ["com.urunc.unikernel.mountRootfs", "com.urunc.unikernel.useDMBlock"];

/// All that are looked at.
const KNOWN: [&str; 11] = [
    TYPE,
    BINARY,
    CMDLINE,
    INITRD,
    VERSION,
    BLOCK,
    MOUNT_POINT,
    NET_DEVICE,
    HYPERVISOR,
    MOUNT[0],
    MOUNT[1],
];

/// Longest name of a device in a Solo5 manifest (its `mft_abi.h`).
const DEVICE_MAX: usize = 67;

/// The file in the image.
const FILE: &str = "/urunc.json";
const FILE_MAX: usize = 64 << 10;

/// Where the user's keys are.
const USERS: &str = "annotations (--annotation)";

/// A place with keys.
struct Source {
    place: &'static str,
    pairs: Pairs,
    encoding: Encoding,
    /// What wins over it: the user's annotations, if the type is not among them.
    over: Pairs,
}

pub(super) fn recognise(packaging: &Packaging<'_>) -> Result<Option<UnikernelPlan>, Error> {
    let Some(source) = find(packaging)? else { return Ok(None) };
    let (kind, solo5) = kind(&source)?;
    let missing = |key| Error::Missing { key, place: source.place };
    let kernel = source.path(BINARY)?.ok_or_else(|| missing(BINARY))?;
    let initrd = source.path(INITRD)?;
    let (disk, mount) = source.disk(kind, initrd.is_some())?.unzip();
    let mount = mount.flatten();
    let hypervisor = source.get(HYPERVISOR)?.unwrap_or_default();
    let old_unikraft = source.get(VERSION)?.is_some_and(|version| is_old(&version));
    // As in urunc: what would be executed counts, the annotation is for images that say nothing.
    let line = source.get(CMDLINE)?.unwrap_or_default();
    let words = match packaging.command() {
        nothing if nothing.is_empty() => line.split_whitespace().map(str::to_owned).collect(),
        command => command,
    };
    let mut mounts = packaging.mounts(kind, usize::from(disk.is_some()))?;
    if let (Kind::Linux, Some(_), Some(users)) = (kind, &initrd, mounts.first()) {
        let what = format!("the mount point {} of --disk", users.at);
        return Err(Error::Word { what, reason: "the image's initrd is its root" });
    }
    // Where the user wants something, what the image wants there is not.
    let own = mount.clone().filter(|own| mounts.iter().all(|users| users.at != own.at));
    mounts.extend(own);
    let takes_environment = kind.takes_environment() && !old_unikraft;
    let cmdline = Words {
        kernel: &kernel,
        env: if takes_environment { packaging.env } else { &[] },
        initrd: initrd.is_some(),
        old_unikraft,
        mounts: &mounts,
        init: true,
        kernel_args: packaging.kernel_args,
        args: &words,
    };
    let cmdline = cmdline.cmdline(kind)?;
    // Solo5 guests for other monitors than hvt are entered as their files say.
    let boot = match solo5 && !matches!(hypervisor.as_str(), "" | "hvt") {
        true => BootProtocol::Auto,
        false => kind.boot(),
    };
    // Every image for urunc with a disk names a mount point, needed or not: guests of Solo5 miss nothing.
    let untold = mount.filter(|_| kind != Kind::Hvt).and_then(|m| Some((m.untold(kind)?, m)));
    let left_out = untold.map(|(why, Mount { at, .. })| {
        format!("the guest is not told that its disk is to be mounted at {at}: {why}")
    });
    Ok(Some(UnikernelPlan {
        dialect: Dialect { old_unikraft, solo5_net: source.net_device()?, ..kind.into() },
        kernel,
        initrd,
        disk,
        boot,
        cmdline,
        left_out: left_out.into_iter().collect(),
        environment: takes_environment,
        words,
    }))
}

/// Whether these name the type or the kernel.
pub(super) fn is_annotated(pairs: &Pairs) -> bool {
    pairs.contains_key(TYPE) || pairs.contains_key(BINARY)
}

/// The first place that has the type or the kernel.
fn find(packaging: &Packaging<'_>) -> Result<Option<Source>, Error> {
    let places = [
        (USERS, packaging.annotations),
        ("manifest's annotations", packaging.manifest),
        ("labels", packaging.labels),
    ];
    let found = places.into_iter().find(|(_, pairs)| is_annotated(pairs));
    let (place, pairs) = match found {
        Some((place, pairs)) => (place, pairs.clone()),
        None => match packaging.tree.head(FILE, FILE_MAX + 1)? {
            Some(bytes) => ("urunc.json", parse(&bytes)?),
            None => return Ok(None),
        },
    };
    let over = if is_annotated(packaging.annotations) {
        Pairs::new()
    } else {
        packaging.annotations.clone()
    };
    let value = pairs.get(TYPE).ok_or(Error::Missing { key: TYPE, place })?;
    let encoding = match named(value) {
        Some(_) => Encoding::Plain,
        None => match value::decode(value).as_deref().and_then(named) {
            Some(_) => Encoding::Base64,
            None => Encoding::Either,
        },
    };
    Ok(Some(Source { place, pairs, encoding, over }))
}

fn parse(bytes: &[u8]) -> Result<Pairs, Error> {
    let fail = |reason: String| Error::File { path: FILE.into(), reason };
    if bytes.len() > FILE_MAX {
        return Err(fail(format!("is larger than {FILE_MAX} bytes")));
    }
    let object: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(bytes).map_err(|e| fail(format!("is malformed: {e}")))?;
    // Other keys are nobody's business here.
    let texts = object.into_iter().filter(|(key, _)| KNOWN.contains(&key.as_str()));
    let pairs = texts.map(|(key, value)| match value {
        serde_json::Value::String(text) => Ok((key, text)),
        _ => Err(Error::Value { key, place: "urunc.json", reason: "it is no text".into() }),
    });
    pairs.collect()
}

/// The kinds by urunc's names, and whether it is a guest of Solo5's.
fn named(name: &str) -> Option<(Kind, bool)> {
    match name {
        "unikraft" => Some((Kind::Unikraft, false)),
        "mirage" => Some((Kind::Hvt, true)),
        "rumprun" => Some((Kind::Rumprun, true)),
        "hermit" => Some((Kind::Hermit, false)),
        "linux" => Some((Kind::Linux, false)),
        // The latter is no name of urunc's: a kernel of one's own, as with `--unikernel rust`.
        "mewz" | "rust" => Some((Kind::Rust, false)),
        _ => None,
    }
}

fn kind(source: &Source) -> Result<(Kind, bool), Error> {
    let name = source.get(TYPE)?.unwrap_or_default();
    named(&name).ok_or_else(|| {
        let reason = format!(
            "there is no kind of unikernel {name:?}: unikraft, mirage, rumprun, hermit, linux, mewz and rust are known"
        );
        Error::Value { key: TYPE.into(), place: source.place, reason }
    })
}

/// Unikraft before 0.16.1; what is no number is new.
fn is_old(version: &str) -> bool {
    const NEW: [u32; 3] = [0, 16, 1];
    let numbers = version.trim_start_matches('v').split(['-', '+', '~']).next().unwrap_or_default();
    let mut parts = [0; 3];
    for (part, text) in parts.iter_mut().zip(numbers.split('.')) {
        match text.parse() {
            Ok(number) => *part = number,
            Err(_) => return false,
        }
    }
    parts < NEW
}

impl Source {
    fn get(&self, key: &str) -> Result<Option<String>, Error> {
        let (encoding, value) = match (self.over.get(key), self.pairs.get(key)) {
            (Some(value), _) => (Encoding::Either, value),
            (None, Some(value)) => (self.encoding, value),
            (None, None) => return Ok(None),
        };
        encoding.text(value).map(Some).map_err(|reason| self.bad(key, reason))
    }

    /// What is wrong with a key's value, and where that is.
    fn bad(&self, key: &str, reason: String) -> Error {
        let place = if self.over.contains_key(key) { USERS } else { self.place };
        Error::Value { key: key.into(), place, reason }
    }

    fn path(&self, key: &str) -> Result<Option<String>, Error> {
        let Some(text) = self.get(key)?.filter(|text| !text.is_empty()) else { return Ok(None) };
        value::path(&text).map(Some).map_err(|reason| self.bad(key, reason))
    }

    /// The disk, and where it is to be mounted, as urunc chooses: one that is for the root, or is beside an initrd; all
    /// that is in the image, if that is asked for; or one that is for another place.
    fn disk(&self, kind: Kind, initrd: bool) -> Result<Option<(DiskSource, Option<Mount>)>, Error> {
        let file = self.path(BLOCK)?.map(DiskSource::File);
        let at = self.mount_point()?;
        let root = file.is_none() || at.as_ref().is_none_or(|at| !at.is_root());
        let mount = |at: Option<MountPoint>| at.map(|at| Mount { disk: 0, at });
        let Some(key) = self.whole()?.filter(|_| root && !initrd) else {
            return Ok(file.map(|file| (file, mount(at))));
        };
        let bad = |reason: &str| self.bad(key, reason.into());
        if file.is_some() {
            return Err(bad(
                "there is a disk for another place as well, and one disk is all that there is",
            ));
        }
        let at = match kind {
            Kind::Linux | Kind::Rust => MountPoint::root(),
            // It has files of its own there.
            Kind::Rumprun => "/data".parse().map_err(|e: String| bad(&e))?,
            Kind::Unikraft => {
                return Err(bad(
                    "Unikraft takes the image's files by 9pfs, a device that there is not; an initrd can hold them",
                ));
            }
            _ => return Err(bad(&format!("{kind} kernels mount no disk"))),
        };
        Ok(Some((DiskSource::Root, mount(Some(at)))))
    }

    fn mount_point(&self) -> Result<Option<MountPoint>, Error> {
        let Some(text) = self.get(MOUNT_POINT)?.filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        text.parse().map(Some).map_err(|reason| self.bad(MOUNT_POINT, reason))
    }

    /// The key that wants all that is in the image as a disk, if one does. Values are those of Go's `strconv.ParseBool`.
    fn whole(&self) -> Result<Option<&'static str>, Error> {
        for key in MOUNT {
            match self.get(key)?.unwrap_or_default().as_str() {
                "1" | "t" | "T" | "TRUE" | "true" | "True" => return Ok(Some(key)),
                "" | "0" | "f" | "F" | "FALSE" | "false" | "False" => {}
                other => {
                    let reason = format!("{other:?} is neither true nor false");
                    return Err(self.bad(key, reason));
                }
            }
        }
        Ok(None)
    }

    /// The name of a network device, of which options are made.
    fn net_device(&self) -> Result<Option<String>, Error> {
        let Some(name) = self.get(NET_DEVICE)?.filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
        if name.len() > DEVICE_MAX || !name.chars().all(plain) || name.starts_with('-') {
            let reason = format!(
                "{name:?} is no name of a device: up to {DEVICE_MAX} letters and digits of ASCII, and _ and - within"
            );
            return Err(self.bad(NET_DEVICE, reason));
        }
        Ok(Some(name))
    }
}
