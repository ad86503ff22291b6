//! One `mvm.toml`: its keys are the flags of `mvm run`, its errors name file, line and key.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use mvm_sandbox::engine::{EmuTier, EngineChoice};
use mvm_sandbox::network::Wish;
use mvm_sandbox::spec::{CpuShare, parse_size};
use mvm_vmm::config::{CpuModel, HugePages};
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use super::{Origin, Setting, Values};

/// Most bytes of the file.
const MAX_SIZE: u64 = 64 << 10;

/// How alike an unknown key and a known one are, from 0 to 1, if one was meant by the other.
const ALIKE: f64 = 0.75;

/// Every key, in the order of the documentation.
pub const KEYS: &[&str] = &[
    "engine",
    "require-hardware",
    "cpu",
    "cpus",
    "memory",
    "memory-max",
    "hugepages",
    "kernel",
    "initrd",
    "cmdline",
    "boot-timeout",
    "stop-timeout",
    "network",
    "debug-console",
    "emu.tier",
];

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It is a directory, a pipe or the like.
    #[error("{}: this is not a file", path.display())]
    NotAFile {
        /// Its path.
        path: PathBuf,
    },
    /// It is too long to be one.
    #[error("{}: longer than {} KiB, which no mvm.toml is", path.display(), MAX_SIZE >> 10)]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// A key that there is not.
    #[error("{}:{line}: unknown key `{key}`; {}", path.display(), suggestion(key))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key.
        key: String,
    },
    /// Anything else that is wrong in a line.
    #[error("{}:{line}: {message}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
}

/// The key that was meant, or all there are.
fn suggestion(key: &str) -> String {
    let plain = key.replace('_', "-").to_lowercase();
    let alike = KEYS.iter().map(|k| (strsim::jaro_winkler(&plain, k), k));
    match alike.max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((score, meant)) if score >= ALIKE => format!("`{meant}` is the closest one"),
        _ => format!("the keys are {}", KEYS.join(", ")),
    }
}

/// What stands in a file, before anybody asks what it means.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Written {
    engine: Option<Spanned<String>>,
    #[serde(default)]
    emu: WrittenEmu,
    require_hardware: Option<Spanned<bool>>,
    cpu: Option<Spanned<String>>,
    cpus: Option<Spanned<Scalar>>,
    memory: Option<Spanned<Scalar>>,
    memory_max: Option<Spanned<Scalar>>,
    hugepages: Option<Spanned<String>>,
    kernel: Option<Spanned<PathBuf>>,
    initrd: Option<Spanned<PathBuf>>,
    cmdline: Option<Spanned<String>>,
    boot_timeout: Option<Spanned<u64>>,
    stop_timeout: Option<Spanned<u32>>,
    network: Option<Spanned<String>>,
    debug_console: Option<Spanned<bool>>,
}

/// The table `emu`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct WrittenEmu {
    tier: Option<Spanned<String>>,
}

/// A string or a number, as a flag would have it.
#[derive(Debug)]
struct Scalar(String);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Scalar;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string or a number")
            }

            fn visit_str<E>(self, text: &str) -> Result<Scalar, E> {
                Ok(Scalar(text.to_owned()))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Scalar, E> {
                Ok(Scalar(number.to_string()))
            }

            fn visit_f64<E>(self, number: f64) -> Result<Scalar, E> {
                Ok(Scalar(number.to_string()))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Reads a file; `None` if there is none.
pub fn read(path: &Path) -> Result<Option<Values>, Error> {
    let fail = |source| Error::Read { path: path.to_owned(), source };
    // Opening a pipe would wait for whoever has its other end.
    let file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path);
    let file = match file {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail(e)),
    };
    let kind = file.metadata().map_err(fail)?.file_type();
    // /dev/null is the way to have no settings at all.
    if !kind.is_file() && !kind.is_char_device() {
        return Err(Error::NotAFile { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > MAX_SIZE {
        return Err(Error::TooLong { path: path.to_owned() });
    }
    let text = String::from_utf8(bytes).map_err(|e| Error::Line {
        path: path.to_owned(),
        line: line_of(e.as_bytes(), e.utf8_error().valid_up_to()),
        message: "this is not UTF-8".into(),
    })?;
    parse(path, &text).map(Some)
}

/// The line in which byte `at` stands, from 1.
fn line_of(text: &[u8], at: usize) -> usize {
    1 + text.iter().take(at).filter(|&&b| b == b'\n').count()
}

fn parse(path: &Path, text: &str) -> Result<Values, Error> {
    let place = Place { path, text };
    let written: Written = toml::from_str(text).map_err(|e| place.explain(&e))?;
    let paths = |setting: Option<Setting<PathBuf>>| {
        // Where the file is moved to, what it names beside it moves too.
        let near = path.parent().unwrap_or(Path::new("/"));
        setting.map(|s| Setting { value: near.join(s.value), origin: s.origin })
    };
    Ok(Values {
        engine: place.with("engine", written.engine, |v| v.parse::<EngineChoice>())?,
        tier: place.with("emu.tier", written.emu.tier, |v| v.parse::<EmuTier>())?,
        require_hardware: place.take(written.require_hardware),
        cpu: place.with("cpu", written.cpu, |v| v.parse::<CpuModel>())?,
        cpus: place.checked("cpus", written.cpus, |v| v.parse::<CpuShare>().map(drop))?,
        memory: place.checked("memory", written.memory, |v| parse_size(v).map(drop))?,
        memory_max: place.checked("memory-max", written.memory_max, |v| parse_size(v).map(drop))?,
        hugepages: place.with("hugepages", written.hugepages, |v| v.parse::<HugePages>())?,
        kernel: paths(place.take(written.kernel)),
        initrd: paths(place.take(written.initrd)),
        cmdline: place.take(written.cmdline),
        boot_timeout: place.take(written.boot_timeout),
        stop_timeout: place.take(written.stop_timeout),
        network: place
            .with("network", written.network, |v| v.parse::<Wish>().map(|_| v.clone()))?,
        debug_console: place.take(written.debug_console),
    })
}

/// The file that is being read.
struct Place<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Place<'_> {
    fn line(&self, at: usize) -> usize {
        line_of(self.text.as_bytes(), at)
    }

    fn setting<T, U>(&self, from: &Spanned<T>, value: U) -> Setting<U> {
        let line = self.line(from.span().start);
        Setting { value, origin: Origin::File { path: self.path.to_owned(), line } }
    }

    fn take<T: Clone>(&self, from: Option<Spanned<T>>) -> Option<Setting<T>> {
        from.map(|from| self.setting(&from, from.get_ref().clone()))
    }

    fn with<T, U, E: std::fmt::Display>(
        &self,
        key: &str,
        from: Option<Spanned<T>>,
        parse: impl Fn(&T) -> Result<U, E>,
    ) -> Result<Option<Setting<U>>, Error> {
        let Some(from) = from else { return Ok(None) };
        match parse(from.get_ref()) {
            Ok(value) => Ok(Some(self.setting(&from, value))),
            Err(e) => Err(self.error(from.span().start, format!("{key}: {e}"))),
        }
    }

    fn checked<E: std::fmt::Display>(
        &self,
        key: &str,
        from: Option<Spanned<Scalar>>,
        check: impl Fn(&str) -> Result<(), E>,
    ) -> Result<Option<Setting<String>>, Error> {
        self.with(key, from, |Scalar(text)| check(text).map(|()| text.clone()))
    }

    fn error(&self, at: usize, message: String) -> Error {
        Error::Line { path: self.path.to_owned(), line: self.line(at), message }
    }

    /// An error of the parser with our place, in one line.
    fn explain(&self, error: &toml::de::Error) -> Error {
        let span = error.span().unwrap_or(0..0);
        let key = self.text.get(span.clone()).unwrap_or_default().trim_matches(['"', '\'']);
        if error.message().starts_with("unknown field") {
            let (path, line) = (self.path.to_owned(), self.line(span.start));
            let key = key.chars().filter(|c| !c.is_control()).take(40).collect();
            return Error::UnknownKey { path, line, key };
        }
        let message: Vec<&str> = error.message().lines().map(str::trim).collect();
        self.error(span.start, message.join("; "))
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
