//! Fields of the specification that this agent does not honour, said rather than hidden.

use std::path::Path;

use crate::child::capability;
use crate::spec::{Process, Spec};

/// Notices for the container `id`.
pub fn of(spec: &Spec, id: &str) -> Vec<String> {
    let mut notices = spec.process.as_ref().map(of_process).unwrap_or_default();
    let mut say = |is_given: bool, what: &str| {
        if is_given {
            notices.push(what.into());
        }
    };
    if let Some(linux) = &spec.linux {
        let label = linux.mount_label().as_ref().is_some_and(|label| !label.is_empty());
        say(label, "linux.mountLabel: ignored, the guest kernel has no SELinux");
        say(
            linux.intel_rdt().is_some(),
            "linux.intelRdt: ignored, a guest has no cache allocation",
        );
        say(
            linux.memory_policy().is_some(),
            "linux.memoryPolicy: ignored, the guest has one memory node",
        );
        let devices = linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty());
        say(devices, "linux.netDevices: ignored, the network is set up by the host");
        let flags = linux
            .personality()
            .as_ref()
            .and_then(|p| p.flags().as_ref())
            .is_some_and(|flags| !flags.is_empty());
        say(flags, "linux.personality.flags: ignored, there are none defined");
        let ours = Path::new("/mvm").join(id);
        let elsewhere = linux
            .cgroups_path()
            .as_ref()
            .is_some_and(|path| !path.as_os_str().is_empty() && *path != ours);
        say(
            elsewhere,
            &format!("linux.cgroupsPath: ignored, in the guest it is {}", ours.display()),
        );
    }
    let hooks: Vec<&str> = spec
        .hooks
        .iter()
        .flat_map(|hooks| &hooks.others)
        .filter(|(_, list)| list.as_ref().is_some_and(|list| !list.is_empty()))
        .map(|(name, _)| name.as_str())
        .collect();
    say(!hooks.is_empty(), &format!("hooks: not run in the guest ({})", hooks.join(", ")));
    for (section, is_given) in [
        ("vm", spec.vm.is_some()),
        ("windows", spec.windows.is_some()),
        ("solaris", spec.solaris.is_some()),
        ("zos", spec.zos.is_some()),
    ] {
        say(is_given, &format!("{section}: ignored, not for a Linux container in this machine"));
    }
    notices
}

/// Notices for a process.
pub fn of_process(process: &Process) -> Vec<String> {
    let mut notices = Vec::new();
    // "unconfined" is what there is.
    let profile = process.apparmor_profile.as_deref().unwrap_or_default();
    if !matches!(profile, "" | "unconfined") {
        notices.push("process.apparmorProfile: ignored, the guest kernel has no AppArmor".into());
    }
    if process.selinux_label.as_ref().is_some_and(|label| !label.is_empty()) {
        notices.push("process.selinuxLabel: ignored, the guest kernel has no SELinux".into());
    }
    let mut unknown: Vec<&String> = process
        .capabilities
        .iter()
        .flat_map(|capabilities| capabilities.sets())
        .flatten()
        .filter(|name| capability(name).is_none())
        .collect();
    unknown.sort();
    unknown.dedup();
    for name in unknown {
        notices
            .push(format!("process.capabilities: {name:?} ignored, there is no such capability"));
    }
    notices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ignored_is_named_and_nothing_else() {
        let json = r#"{"ociVersion":"1.1.0","process":{"cwd":"/","user":{},
            "apparmorProfile":"docker-default","selinuxLabel":"x",
            "capabilities":{"bounding":["CAP_CHOWN","CAP_X"],"permitted":["CAP_X"]}},
            "linux":{"mountLabel":"y","cgroupsPath":"/a/b"},"hooks":{"prestart":[{"path":"/x"}]},"vm":{}}"#;
        let notices = of(&serde_json::from_str(json).unwrap(), "c");
        let fields =
            ["apparmor", "selinux", "CAP_X", "mountLabel", "cgroupsPath", "prestart", "vm"];
        for (notice, field) in notices.iter().zip(fields) {
            assert!(notice.contains(field), "{notices:?}");
        }
        assert_eq!(notices.len(), fields.len());
        let json = r#"{"ociVersion":"1.1.0","process":{"cwd":"/","user":{},
            "apparmorProfile":"unconfined","selinuxLabel":""},"hooks":{"poststop":[]},
            "linux":{"cgroupsPath":"/mvm/c"}}"#;
        assert!(of(&serde_json::from_str(json).unwrap(), "c").is_empty());
    }
}
