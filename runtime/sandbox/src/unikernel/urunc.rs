//! Images packaged for urunc: keys `com.urunc.unikernel.*` in annotations, labels, or `/urunc.json`
//! in the image's root. The values of one place are all plain or all base64; which, the type tells.

use mvm_vmm::config::BootProtocol;

use super::value::{self, Encoding};
use super::{Error, Kind, Packaging, Pairs, UnikernelPlan, Words};

/// Names the kind of guest; has to be there.
const TYPE: &str = "com.urunc.unikernel.unikernelType";
/// Path of the kernel; has to be there.
const BINARY: &str = "com.urunc.unikernel.binary";
const CMDLINE: &str = "com.urunc.unikernel.cmdline";
const INITRD: &str = "com.urunc.unikernel.initrd";
const VERSION: &str = "com.urunc.unikernel.unikernelVersion";
const BLOCK: &str = "com.urunc.unikernel.block";
/// Names another monitor. What the guest was built for its file says better, except that Solo5 builds
/// one file for each.
const HYPERVISOR: &str = "com.urunc.unikernel.hypervisor";
/// Ask for the container's root file system as a disk; the second is the older name.
const MOUNT: [&str; 2] = ["com.urunc.unikernel.mountRootfs", "com.urunc.unikernel.useDMBlock"];

/// All that are looked at.
const KNOWN: [&str; 9] =
    [TYPE, BINARY, CMDLINE, INITRD, VERSION, BLOCK, HYPERVISOR, MOUNT[0], MOUNT[1]];

/// The file in the image.
const FILE: &str = "/urunc.json";
const FILE_MAX: usize = 64 << 10;

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
    let (place, missing) = (source.place, |key| Error::Missing { key, place: source.place });
    let kernel = source.path(BINARY)?.ok_or_else(|| missing(BINARY))?;
    for key in MOUNT {
        if source.get(key)?.is_some_and(|v| !matches!(v.as_str(), "" | "false" | "0")) {
            let reason =
                "the container's root file system cannot be given to a unikernel as a disk";
            return Err(Error::Value { key: key.into(), place, reason: reason.into() });
        }
    }
    let initrd = source.path(INITRD)?;
    let disk = source.path(BLOCK)?;
    let hypervisor = source.get(HYPERVISOR)?.unwrap_or_default();
    let old_unikraft = source.get(VERSION)?.is_some_and(|version| is_old(&version));
    // As in urunc: what would be executed counts, the annotation is for images that say nothing.
    let line = source.get(CMDLINE)?.unwrap_or_default();
    let words = match packaging.command() {
        nothing if nothing.is_empty() => line.split_whitespace().map(str::to_owned).collect(),
        command => command,
    };
    let cmdline = Words {
        kernel: &kernel,
        env: packaging.env,
        initrd: initrd.is_some(),
        old_unikraft,
        kernel_args: packaging.kernel_args,
        args: &words,
    };
    let cmdline = cmdline.cmdline(kind)?;
    // Solo5 guests for other monitors than hvt are entered as their files say.
    let boot = match solo5 && !matches!(hypervisor.as_str(), "" | "hvt") {
        true => BootProtocol::Auto,
        false => kind.boot(),
    };
    let environment = kind.takes_environment() && !old_unikraft;
    Ok(Some(UnikernelPlan {
        kind,
        kernel,
        initrd,
        disk,
        boot,
        cmdline,
        old_unikraft,
        environment,
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
        ("annotations (--annotation)", packaging.annotations),
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
        let (place, encoding, value) = match (self.over.get(key), self.pairs.get(key)) {
            (Some(value), _) => ("annotations (--annotation)", Encoding::Either, value),
            (None, Some(value)) => (self.place, self.encoding, value),
            (None, None) => return Ok(None),
        };
        let bad = |reason| Error::Value { key: key.into(), place, reason };
        encoding.text(value).map(Some).map_err(bad)
    }

    fn path(&self, key: &str) -> Result<Option<String>, Error> {
        let Some(text) = self.get(key)?.filter(|text| !text.is_empty()) else { return Ok(None) };
        let bad = |reason| Error::Value { key: key.into(), place: self.place, reason };
        value::path(&text).map(Some).map_err(bad)
    }
}
