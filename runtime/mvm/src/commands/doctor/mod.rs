//! `mvm doctor`: what this host can do, in plain answers with a remedy each.

mod engine;

use std::fs;

use mvm_sandbox::EXIT_FAILURE;
use serde::Serialize;

use super::Context;
use crate::cli::DoctorArgs;
use crate::embedded;
use crate::output::{causes, line, print, size};

/// Guest memory that a container has if nothing is said.
const USUAL_MEMORY: u64 = 512 << 20;

/// Open files that a machine needs at most.
const OPEN_FILES: u64 = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Good,
    /// Containers run, something is slower or missing.
    Limited,
    /// Containers do not run.
    Bad,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do, if anything.
    remedy: Option<String>,
}

fn good(name: &'static str, found: impl Into<String>) -> Check {
    Check { name, verdict: Verdict::Good, found: found.into(), remedy: None }
}

fn not(
    name: &'static str,
    verdict: Verdict,
    found: impl Into<String>,
    remedy: impl Into<String>,
) -> Check {
    Check { name, verdict, found: found.into(), remedy: Some(remedy.into()) }
}

pub fn doctor(context: &Context, args: &DoctorArgs) -> anyhow::Result<i32> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    // First, since it makes the directory in which the measurement is kept.
    let state = state(context);
    let engines = engine::Findings::gather(&context.layout, &context.settings);
    let mut checks = engines.checks();
    checks.extend([cpu(&cpuinfo), guest(), state, images(context), memory(), files()]);
    let bad = checks.iter().any(|c| c.verdict == Verdict::Bad);
    if args.json {
        let mut answer = serde_json::json!({ "usable": !bad, "checks": checks });
        for (key, value) in engines.json() {
            answer[key] = value;
        }
        line(&answer.to_string())?;
    } else {
        let mut text = String::new();
        for check in &checks {
            let sign = match check.verdict {
                Verdict::Good => "ok  ",
                Verdict::Limited => "note",
                Verdict::Bad => "BAD ",
            };
            let found = check.found.replace('\n', &format!("\n{:19}", ""));
            text.push_str(&format!("{sign}  {:<12} {found}\n", check.name));
            if let Some(remedy) = &check.remedy {
                text.push_str(&format!("      {:<12} -> {remedy}\n", ""));
            }
        }
        print(&text)?;
    }
    Ok(if bad { EXIT_FAILURE } else { 0 })
}

fn has_flag(cpuinfo: &str, flag: &str) -> bool {
    cpuinfo
        .lines()
        .find(|l| l.starts_with("flags"))
        .is_some_and(|l| l.split_ascii_whitespace().any(|f| f == flag))
}

fn cpu(cpuinfo: &str) -> Check {
    // What an x86-64-v3 host has beyond the baseline, as /proc/cpuinfo names it.
    let wanted = ["avx2", "bmi1", "bmi2", "fma", "f16c", "movbe", "abm"];
    let missing: Vec<&str> = wanted.into_iter().filter(|f| !has_flag(cpuinfo, f)).collect();
    if missing.is_empty() {
        return good("cpu", "x86-64-v3: guests get AVX2, BMI and FMA");
    }
    not(
        "cpu",
        Verdict::Limited,
        format!("the CPU lacks {}", missing.join(", ")),
        "none: guests see a CPU without them, and programs built for x86-64-v3 do not run",
    )
}

fn guest() -> Check {
    let sizes = embedded::sizes();
    match (sizes.kernel, sizes.initramfs) {
        (Some(kernel), Some(initramfs)) => good(
            "guest",
            format!(
                "kernel ({}) and agent ({}) are built in",
                size(kernel as u64),
                size(initramfs as u64)
            ),
        ),
        _ => not(
            "guest",
            Verdict::Limited,
            "this mvm was built without a guest kernel and agent",
            "build it by `make`, or give --kernel and --initrd to each run",
        ),
    }
}

fn state(context: &Context) -> Check {
    let dir = context.layout.sandboxes();
    match context.registry() {
        Ok(_) => good("state", dir.display().to_string()),
        Err(e) => not("state", Verdict::Bad, e.to_string(), "give a directory by --root DIR"),
    }
}

fn images(context: &Context) -> Check {
    let dir = context.layout.images();
    let store = match crate::images::store(&context.layout) {
        Ok(store) => store,
        Err(e) => {
            return not("images", Verdict::Bad, causes(&e), "give a directory by --root DIR");
        }
    };
    let space = nix::sys::statvfs::statvfs(&dir)
        .map(|s| s.blocks_available().saturating_mul(s.fragment_size()));
    match (store.usage(), space) {
        (Ok(usage), Ok(space)) => good(
            "images",
            format!(
                "{} ({} used, {} free)",
                dir.display(),
                size(usage.blobs + usage.rootfs),
                size(space)
            ),
        ),
        _ => good("images", dir.display().to_string()),
    }
}

fn memory() -> Check {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|l| l.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .map(|kib| kib * 1024);
    match available {
        Some(bytes) if bytes < USUAL_MEMORY => not(
            "memory",
            Verdict::Limited,
            format!("{} are available", size(bytes)),
            format!(
                "a container may use {}: free some, or give less by --memory",
                size(USUAL_MEMORY)
            ),
        ),
        Some(bytes) => good("memory", format!("{} are available", size(bytes))),
        None => good("memory", "unknown: /proc/meminfo does not say"),
    }
}

fn files() -> Check {
    use nix::sys::resource::{Resource, getrlimit};
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, _)) if soft < OPEN_FILES => not(
            "files",
            Verdict::Limited,
            format!("{soft} open files are allowed"),
            format!("raise the limit: `ulimit -n {OPEN_FILES}`"),
        ),
        Ok((soft, _)) => good("files", format!("{soft} open files are allowed")),
        Err(e) => good("files", format!("unknown: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words() {
        let cpuinfo = "processor: 0\nflags\t\t: fpu avx512 svm_lock avx2\n";
        assert!(has_flag(cpuinfo, "avx2"));
        assert!(!has_flag(cpuinfo, "svm") && !has_flag(cpuinfo, "avx"));
    }
}
