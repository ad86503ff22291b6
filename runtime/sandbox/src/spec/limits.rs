//! Sizes, CPU shares, resource limits and signals as docker's users write them.

use std::str::FromStr;

use oci_spec::runtime::PosixRlimitType;

use super::Error;

fn invalid(what: &'static str, value: &str, rule: impl Into<String>) -> Error {
    Error::Invalid { what, value: value.to_owned(), rule: rule.into() }
}

/// Bytes from `64m`, `1.5g`, `512MiB`, `4096`: powers of 1024, any case.
pub fn parse_size(text: &str) -> Result<u64, Error> {
    let bad = || invalid("size", text, "give a number with an optional suffix b, k, m, g or t");
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let power = match &lower[digits.len()..] {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        _ => return Err(bad()),
    };
    let unit = 1u64 << (10 * power);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let plain = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    if !plain(whole) || !plain(fraction) || fraction.len() > 9 {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let scale = 10u128.pow(u32::try_from(fraction.len()).unwrap_or(9));
    let part = u128::from(fraction.parse::<u64>().map_err(|_| bad())?) * u128::from(unit) / scale;
    let part = u64::try_from(part).map_err(|_| bad())?;
    whole.checked_mul(unit).and_then(|w| w.checked_add(part)).ok_or_else(bad)
}

/// `--cpus`: thousandths of a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuShare {
    milli: u32,
}

impl CpuShare {
    /// The most vCPUs a machine may have.
    pub const MAX_VCPUS: u32 = 64;

    /// vCPUs that hold this share.
    pub fn vcpus(self) -> u32 {
        self.milli.div_ceil(1000)
    }

    /// Microseconds of CPU time in each period, or `None` if whole vCPUs are the limit.
    pub fn quota(self, period: u64) -> Option<i64> {
        if self.milli.is_multiple_of(1000) {
            return None;
        }
        i64::try_from(u64::from(self.milli) * period / 1000).ok()
    }
}

impl FromStr for CpuShare {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |rule: &str| invalid("number of CPUs", text, rule);
        let value: f64 = text.parse().map_err(|_| bad("give a number such as 2 or 1.5"))?;
        let max = f64::from(Self::MAX_VCPUS);
        if !(0.01..=max).contains(&value) {
            return Err(bad("the range is from 0.01 to 64"));
        }
        // In range, so the cast is exact but for the rounding that is meant.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let milli = (value * 1000.0).round() as u32;
        Ok(Self { milli })
    }
}

/// `--ulimit NAME=SOFT[:HARD]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ulimit {
    /// Which limit.
    pub kind: PosixRlimitType,
    /// The limit in force; `u64::MAX` is none.
    pub soft: u64,
    /// Up to where the process may raise it.
    pub hard: u64,
}

impl FromStr for Ulimit {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |rule: &str| invalid("ulimit", text, rule);
        let (name, values) = text.split_once('=').ok_or_else(|| bad("write NAME=SOFT[:HARD]"))?;
        let kind: PosixRlimitType =
            serde_json::from_value(format!("RLIMIT_{}", name.to_ascii_uppercase()).into())
                .map_err(|_| bad("no such limit; nofile, nproc, core, stack are some"))?;
        let number = |value: &str| match value {
            "-1" | "unlimited" => Ok(u64::MAX),
            _ => value.parse().map_err(|_| bad("a limit is a number, -1 or unlimited")),
        };
        let (soft, hard) = match values.split_once(':') {
            Some((soft, hard)) => (number(soft)?, number(hard)?),
            None => (number(values)?, number(values)?),
        };
        if soft > hard {
            return Err(bad("the soft limit is above the hard one"));
        }
        Ok(Self { kind, soft, hard })
    }
}

/// The classic signals by their x86 Linux numbers, from 1.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// A signal's number in the guest: `TERM`, `SIGTERM`, `15`, `RTMIN+3`.
pub fn signal_number(text: &str) -> Result<i32, Error> {
    let bad = || invalid("signal", text, "give a name such as TERM or a number from 1 to 64");
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=RTMAX).contains(&number) { Ok(number) } else { Err(bad()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(at) = SIGNALS.iter().position(|s| *s == name) {
        return i32::try_from(at + 1).map_err(|_| bad());
    }
    let number = match name {
        "IOT" => 6,
        "CLD" => 17,
        "POLL" => 29,
        "RTMIN" => RTMIN,
        "RTMAX" => RTMAX,
        _ => {
            let offset = |digits: &str| digits.parse::<u8>().map(i32::from).map_err(|_| bad());
            match (name.strip_prefix("RTMIN+"), name.strip_prefix("RTMAX-")) {
                (Some(up), _) => RTMIN + offset(up)?,
                (_, Some(down)) => RTMAX - offset(down)?,
                _ => return Err(bad()),
            }
        }
    };
    if (1..=RTMAX).contains(&number) { Ok(number) } else { Err(bad()) }
}

/// The name of a signal number, as `SIGTERM`.
pub fn signal_name(number: i32) -> String {
    match usize::try_from(number).ok().and_then(|n| SIGNALS.get(n.wrapping_sub(1))) {
        Some(name) => format!("SIG{name}"),
        None => format!("signal {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("4096", 4096),
            ("8m", 8 << 20),
            ("64M", 64 << 20),
            ("1.5g", 3 << 29),
            ("512MiB", 512 << 20),
            ("1kb", 1024),
            ("0", 0),
            ("2t", 2 << 40),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
    }

    #[test]
    fn bad_sizes_are_refused() {
        for bad in
            ["", "m", "-1m", "1.m", ".5m", "1x", "1 0m", "99999999999999999999", "20000000t", "1e3"]
        {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn one_and_a_half_cpus_are_two_vcpus_and_a_quota() {
        let share: CpuShare = "1.5".parse().unwrap();
        assert_eq!((share.vcpus(), share.quota(100_000)), (2, Some(150_000)));
        let share: CpuShare = "2".parse().unwrap();
        assert_eq!((share.vcpus(), share.quota(100_000)), (2, None));
        let share: CpuShare = "0.25".parse().unwrap();
        assert_eq!((share.vcpus(), share.quota(100_000)), (1, Some(25_000)));
    }

    #[test]
    fn bad_cpu_counts_are_refused() {
        for bad in ["", "0", "-1", "nan", "inf", "65", "two", "0.001"] {
            assert!(bad.parse::<CpuShare>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ulimits_take_one_or_two_values() {
        let limit: Ulimit = "nofile=1024:2048".parse().unwrap();
        assert_eq!(
            (limit.kind, limit.soft, limit.hard),
            (PosixRlimitType::RlimitNofile, 1024, 2048)
        );
        let limit: Ulimit = "core=-1".parse().unwrap();
        assert_eq!((limit.soft, limit.hard), (u64::MAX, u64::MAX));
        for bad in ["nofile", "bogus=1", "nofile=2:1", "nofile=x", "nofile=1:2:3", "=1"] {
            assert!(bad.parse::<Ulimit>().is_err(), "{bad}");
        }
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("TERM", 15),
            ("SIGKILL", 9),
            ("sigint", 2),
            ("15", 15),
            ("RTMIN+3", 37),
            ("SIGRTMAX-1", 63),
        ] {
            assert_eq!(signal_number(text).unwrap(), number, "{text}");
        }
        for bad in ["", "0", "65", "SIG", "FOO", "RTMIN+99", "-9"] {
            assert!(signal_number(bad).is_err(), "{bad}");
        }
        assert_eq!(signal_name(9), "SIGKILL");
        assert_eq!(signal_name(40), "signal 40");
    }
}
