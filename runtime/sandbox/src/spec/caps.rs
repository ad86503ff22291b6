//! Capabilities: docker's default set and its rule for adding and dropping.

use std::collections::HashSet;

use oci_spec::runtime::Capability;

use super::Error;

/// A set of capabilities, as the specification's types want it.
pub type Set = HashSet<Capability>;

/// What docker gives to a container that asks for nothing.
const DEFAULT: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// Every capability that Linux 6.12 knows.
const ALL: [Capability; 41] = [
    Capability::AuditControl,
    Capability::AuditRead,
    Capability::AuditWrite,
    Capability::BlockSuspend,
    Capability::Bpf,
    Capability::CheckpointRestore,
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::Kill,
    Capability::Lease,
    Capability::LinuxImmutable,
    Capability::MacAdmin,
    Capability::MacOverride,
    Capability::Mknod,
    Capability::NetAdmin,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetRaw,
    Capability::Perfmon,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysChroot,
    Capability::SysModule,
    Capability::SysNice,
    Capability::SysPacct,
    Capability::SysPtrace,
    Capability::SysRawio,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Syslog,
    Capability::WakeAlarm,
];

/// Every capability.
pub fn all() -> Set {
    ALL.into_iter().collect()
}

/// One named by the user, with or without `CAP_`, in any case. `None` stands for all.
pub fn parse_capability(name: &str) -> Result<Option<Capability>, Error> {
    let upper = name.to_ascii_uppercase();
    if upper == "ALL" {
        return Ok(None);
    }
    let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
    // The type's own spelling is the kernel's.
    serde_json::from_value(serde_json::Value::String(full))
        .map(Some)
        .map_err(|_| Error::Capability(name.to_owned()))
}

/// Docker's rule. `ALL` on one side is the starting point, the other side's names are exceptions.
pub fn effective(add: &[String], drop: &[String]) -> Result<Set, Error> {
    let parse = |names: &[String]| -> Result<Vec<Option<Capability>>, Error> {
        names.iter().map(|n| parse_capability(n)).collect()
    };
    let (add, drop) = (parse(add)?, parse(drop)?);
    let added = || add.iter().copied().flatten();
    let dropped = || drop.iter().copied().flatten();
    let mut set: Set = if add.contains(&None) {
        all()
    } else if drop.contains(&None) {
        return Ok(added().collect());
    } else {
        DEFAULT.into_iter().chain(added()).collect()
    };
    for capability in dropped() {
        set.remove(&capability);
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn nothing_asked_gives_dockers_set() {
        assert_eq!(effective(&[], &[]).unwrap(), DEFAULT.into_iter().collect());
    }

    #[test]
    fn names_are_taken_in_any_spelling() {
        for name in ["NET_ADMIN", "net_admin", "CAP_NET_ADMIN", "cap_net_admin"] {
            assert_eq!(parse_capability(name).unwrap(), Some(Capability::NetAdmin));
        }
        assert!(matches!(parse_capability("NET_ADMINX"), Err(Error::Capability(_))));
        assert!(parse_capability("").is_err());
    }

    #[test]
    fn all_on_one_side_is_the_starting_point() {
        let some = effective(&names(&["ALL"]), &names(&["MKNOD"])).unwrap();
        assert_eq!(some.len(), ALL.len() - 1);
        let few = effective(&names(&["CHOWN"]), &names(&["all"])).unwrap();
        assert_eq!(few, Set::from([Capability::Chown]));
        let less = effective(&names(&["SYS_TIME"]), &names(&["CHOWN"])).unwrap();
        assert!(less.contains(&Capability::SysTime) && !less.contains(&Capability::Chown));
        assert_eq!(less.len(), DEFAULT.len());
    }
}
