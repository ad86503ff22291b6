//! What the facts mean, in words, and what to do about it.

use super::facts::{Device, DeviceFile, Facts, Host, Kvm, Measured, RunEnd, Trial};
use super::{Finding, Kind, Probe, USABLE_MIPS, Verdict, needs};

/// The group of what has none in a user namespace (Linux, /proc/sys/kernel/overflowgid).
const OVERFLOW_GID: u32 = 65534;

/// Judges. Never looks at the host: the same facts have the same answer everywhere.
pub fn judge(facts: Facts) -> Probe {
    let (verdict, finding) = match (&facts.kvm, &facts.device.file) {
        (Some(kvm), _) => opened(kvm, &facts),
        (None, None) if facts.device.errno.is_none_or(|e| e == libc::ENOENT) => {
            (Verdict::Unusable, absent(&facts.device.path, &facts.host))
        }
        (None, Some(file)) if !file.is_kvm => {
            (Verdict::Unusable, something_else(&facts.device.path))
        }
        (None, file) => (Verdict::Unusable, shut(&facts, file.as_ref())),
    };
    let mips = facts.kvm.as_ref().and_then(|kvm| match &kvm.trial {
        Trial::Ran(measured) => measured.integer.mips(),
        _ => None,
    });
    Probe { verdict, finding, mips, facts }
}

fn finding(kind: Kind, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { kind, text: text.into(), detail: String::new(), remedy: remedy.into() }
}

/// There is no device file.
fn absent(path: &str, host: &Host) -> Finding {
    if host.device_in_kernel {
        return finding(
            Kind::DeviceHidden,
            format!("the host has KVM, but there is no {path} here"),
            format!("pass it into this container, as by `docker run --device {path}`"),
        );
    }
    let Some(flagged) = host.virtualization else { return no_hardware(path, host) };
    let (name, module) = (flagged.name(), flagged.module());
    if host.modules.iter().any(|m| m == module) {
        return finding(
            Kind::NoDevice,
            format!("{module} is loaded, but there is no {path}"),
            format!("make it: `sudo mknod {path} c 10 232`, or mount a devtmpfs on /dev"),
        );
    }
    if let Some(rival) = host.rivals.first() {
        return finding(
            Kind::Busy,
            format!(
                "there is no {path}: {module} is not loaded while {rival} is, which may hold {name}"
            ),
            format!("end its machines, `sudo modprobe -r {rival}`, then `sudo modprobe {module}`"),
        );
    }
    finding(
        Kind::ModuleMissing,
        format!("the CPU has {name}, but the module {module} is not loaded: there is no {path}"),
        format!(
            "`sudo modprobe {module}`; if it says \"not supported\", switch {name} on in the \
             firmware (BIOS)"
        ),
    )
}

/// Neither device nor flag.
fn no_hardware(path: &str, host: &Host) -> Finding {
    match (host.cpuid, host.hypervisor) {
        (Some(has), false) => finding(
            Kind::FirmwareDisabled,
            format!("the CPU has {}, but the firmware has switched it off", has.name()),
            format!("switch {} on in the firmware's (BIOS) setup", has.name()),
        ),
        (_, true) => finding(
            Kind::NestedOff,
            format!(
                "this host is a virtual machine without nested virtualization: there is no {path}, \
                 and the CPU shows neither vmx nor svm"
            ),
            "enable nested virtualization for this machine where it is hosted, or take a bare-metal \
             one",
        ),
        (None, false) => finding(
            Kind::NoHardware,
            format!("there is no {path}, and the CPU shows neither vmx nor svm"),
            "switch VT-x or AMD-V on in the firmware's (BIOS) setup, if the CPU has it",
        ),
    }
}

fn something_else(path: &str) -> Finding {
    finding(
        Kind::NotADevice,
        format!("{path} is not the device of KVM"),
        format!("remove it, and `sudo mknod {path} c 10 232`"),
    )
}

/// The device does not open.
fn shut(facts: &Facts, file: Option<&DeviceFile>) -> Finding {
    let Device { path, errno, .. } = &facts.device;
    let errno = errno.unwrap_or(libc::EIO);
    let said = std::io::Error::from_raw_os_error(errno);
    match (errno, file) {
        (libc::EACCES, Some(file)) => no_permission(facts, file),
        (libc::EPERM, _) => finding(
            Kind::Denied,
            format!("{path} may not be opened here: {said}"),
            format!("allow the device to this container, as by `docker run --device {path}`"),
        ),
        (libc::ENODEV | libc::ENXIO, _) => finding(
            Kind::ModuleMissing,
            format!("nothing stands behind {path}: {said}"),
            match facts.host.virtualization {
                Some(v) => format!("load the module: `sudo modprobe {}`", v.module()),
                None => "load the module: kvm_intel or kvm_amd".into(),
            },
        ),
        _ => finding(
            Kind::OpenFailed,
            format!("{path} does not open: {said}"),
            "see what the host's kernel says: `sudo dmesg`",
        ),
    }
}

fn no_permission(facts: &Facts, file: &DeviceFile) -> Finding {
    let Device { path, .. } = &facts.device;
    let user = facts.user.name.clone().unwrap_or_else(|| facts.user.uid.to_string());
    let group = file.group.clone().unwrap_or_else(|| file.gid.to_string());
    let text = format!("{path} may not be opened: it belongs to group {group}");
    if file.gid == OVERFLOW_GID {
        return finding(
            Kind::NoPermission,
            format!("{path} may not be opened: its group is not known in this user namespace"),
            "keep the device's group, as by `podman run --group-add keep-groups`",
        );
    }
    let group_may_open = file.mode & 0o060 == 0o060;
    let remedy = if facts.user.listed_in_group && group_may_open {
        format!(
            "{user} is in that group, but this session is older: log in again, or `newgrp {group}`"
        )
    } else if group_may_open && file.gid != 0 {
        format!("join the group: `sudo usermod -aG {group} {user}`, then log in again")
    } else {
        format!(
            "let a group open it: `sudo groupadd -f kvm; sudo chgrp kvm {path}; sudo chmod 660 \
             {path}; sudo usermod -aG kvm {user}`, then log in again"
        )
    };
    let text = if group_may_open {
        text
    } else {
        format!("{path} may not be opened: only user {} may (mode {:o})", file.uid, file.mode)
    };
    finding(Kind::NoPermission, text, remedy)
}

/// The device opens.
fn opened(kvm: &Kvm, facts: &Facts) -> (Verdict, Finding) {
    let path = &facts.device.path;
    if kvm.api_version != needs::API_VERSION {
        let found = finding(
            Kind::WrongApi,
            format!("{path} speaks version {} of KVM's interface", kvm.api_version),
            format!("mvm speaks version {}, which Linux has had since 2007", needs::API_VERSION),
        );
        return (Verdict::Unusable, found);
    }
    if !kvm.missing.is_empty() {
        let found = finding(
            Kind::MissingExtensions,
            format!("the host's KVM lacks {}", kvm.missing.join(", ")),
            "use a newer kernel: Linux 4.12 has them all",
        );
        return (Verdict::Unusable, found);
    }
    match &kvm.trial {
        Trial::Ran(measured) => ran(measured, facts),
        Trial::NoVm { errno } => (Verdict::Unusable, no_vm(*errno, facts)),
        Trial::Failed { step, errno } => (Verdict::Unusable, failed(step, *errno)),
        Trial::Stuck => (Verdict::Unusable, stuck()),
        Trial::Skipped => (Verdict::Unusable, failed("the trial", 0)),
    }
}

fn no_vm(errno: i32, facts: &Facts) -> Finding {
    let said = std::io::Error::from_raw_os_error(errno);
    let name = facts.host.virtualization.map_or("VT-x or AMD-V", |v| v.name());
    if errno == libc::EBUSY {
        let who = match facts.host.rivals.first() {
            Some(rival) => format!("another hypervisor ({rival})"),
            None => "another hypervisor".into(),
        };
        return finding(
            Kind::Busy,
            format!("{who} holds {name}: KVM cannot make a machine"),
            match facts.host.rivals.first() {
                Some(rival) => format!("end its machines, or `sudo modprobe -r {rival}`"),
                None => "end the other hypervisor's machines and unload its module".into(),
            },
        );
    }
    finding(
        Kind::VmRefused,
        format!("KVM cannot make a machine: {said}"),
        format!("see `sudo dmesg`; {name} may be switched off in the firmware (BIOS)"),
    )
}

fn failed(step: &str, errno: i32) -> Finding {
    let said = match errno {
        0 => String::new(),
        n => format!(": {}", std::io::Error::from_raw_os_error(n)),
    };
    finding(
        Kind::TrialFailed,
        format!("a trial machine failed at {step}{said}"),
        "see what the host's kernel says: `sudo dmesg`",
    )
}

fn stuck() -> Finding {
    finding(
        Kind::Overdue,
        "a trial machine did not come to its end in time",
        "the host is very busy, or its KVM is broken: `mvm doctor` tries again",
    )
}

/// The tiny machine ran.
fn ran(measured: &Measured, facts: &Facts) -> (Verdict, Finding) {
    let integer = &measured.integer;
    match &integer.end {
        RunEnd::Done => {}
        RunEnd::Overdue => return (Verdict::Unusable, stuck()),
        end => {
            return (
                Verdict::Unusable,
                failed(&format!("its first instructions ({})", words(end)), 0),
            );
        }
    }
    let mips = integer.mips().unwrap_or(0.0);
    let unable: Vec<&str> = measured
        .instructions
        .iter()
        .filter(|i| i.end != RunEnd::Done)
        .map(|i| i.name.as_str())
        .collect();
    if mips >= USABLE_MIPS && unable.is_empty() {
        let how = match facts.host.virtualization {
            Some(v) => v.name(),
            None => "its hypervisor",
        };
        let text =
            format!("{} works by {how}: guest kernels run at {}", facts.device.path, speed(mips));
        return (Verdict::Usable, finding(Kind::Works, text, ""));
    }
    let path = &facts.device.path;
    let modules = &facts.host.modules;
    let pagetable = facts.host.virtualization.is_none() || modules.iter().any(|m| m == "kvm_pvm");
    let speed = speed(mips);
    let text = if pagetable {
        format!("{path} is a pagetable hypervisor that interprets guest kernels at {speed}")
    } else if mips < USABLE_MIPS {
        format!("{path} runs guest kernels at only {speed}")
    } else {
        format!("{path} cannot do {} in guest kernels", unable.join(", "))
    };
    let remedy = if pagetable {
        "enable nested virtualization for this machine where it is hosted, or take a bare-metal one"
    } else {
        "see what the host's kernel says: `sudo dmesg`"
    };
    let mut found = finding(Kind::Interpreted, text, remedy);
    found.detail = format!("mvm wants {USABLE_MIPS} MIPS, hardware does more than 500");
    if !unable.is_empty() {
        found.detail.push_str(&format!("; ring 0 cannot do {}", unable.join(", ")));
    }
    (Verdict::Interpreted, found)
}

/// A speed for people.
pub fn speed(mips: f64) -> String {
    if mips < 10.0 { format!("{mips:.1} MIPS") } else { format!("{mips:.0} MIPS") }
}

fn words(end: &RunEnd) -> String {
    match end {
        RunEnd::Done => "done".into(),
        RunEnd::Wrong => "wrong result".into(),
        RunEnd::InternalError { suberror } => format!("KVM internal error, suberror {suberror}"),
        RunEnd::FailEntry { reason } => format!("entry refused, reason {reason:#x}"),
        RunEnd::Shutdown => "triple fault".into(),
        RunEnd::Overdue => "overdue".into(),
        RunEnd::Refused { errno } => std::io::Error::from_raw_os_error(*errno).to_string(),
        RunEnd::Unexpected { exit } => format!("unexpected exit {exit}"),
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
