//! Users, groups and capabilities: from the agent's powers to exactly those of the specification.

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities,
};

use super::users::Identity;
use crate::error::{Context, Result};
use crate::spec::Capabilities;

/// The capability of a name such as `CAP_CHOWN`.
pub fn capability(name: &str) -> Option<CapabilitySet> {
    CapabilitySet::from_name(name.strip_prefix("CAP_")?)
}

/// The bits of a list of capabilities. Names that are not known have been said to be ignored.
fn bits(names: &[String]) -> CapabilitySet {
    names.iter().filter_map(|name| capability(name)).collect()
}

/// What remains to be done right before the program is executed.
#[derive(Debug)]
pub struct Credentials {
    /// The sets of the specification, if the ones in force are still larger.
    outstanding: Option<CapabilitySets>,
}

impl Credentials {
    /// Gives up what was kept.
    pub fn settle(&self) -> Result<()> {
        self.outstanding.map_or(Ok(()), |sets| {
            set_capabilities(None, sets)
                .context(|| "give up CAP_SYS_ADMIN (does the seccomp profile allow capset?)".into())
        })
    }
}

/// Becomes `identity` with the capabilities given; none given means none. With `keep_admin`
/// `CAP_SYS_ADMIN` stays in force until [`Credentials::settle`].
///
/// Returns with it notices of what the kernel cannot grant, which is no failure (config.md, "Linux
/// Process").
pub fn assume(
    identity: &Identity,
    capabilities: Option<&Capabilities>,
    keep_admin: bool,
) -> Result<(Credentials, Vec<String>)> {
    let none = Capabilities::default();
    let wanted = capabilities.unwrap_or(&none).sets();
    let (sets, bounding, ambient, notices) = grantable(wanted.map(bits));

    drop_bounding(bounding)?;
    // Without this, leaving user 0 would lose the permitted set too.
    set_keep_capabilities(true).context(|| "keep capabilities".into())?;
    let groups: Vec<Gid> = identity.groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups)
        .context(|| format!("process.user.additionalGids: set {} groups", groups.len()))?;
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    setresgid(gid, gid, gid).context(|| format!("process.user: become group {gid}"))?;
    setresuid(uid, uid, uid).context(|| format!("process.user: become user {uid}"))?;
    set_keep_capabilities(false).context(|| "keep capabilities".into())?;

    clear_ambient_capability_set().context(|| "clear the ambient capabilities".into())?;
    let is_larger = keep_admin && !sets.effective.contains(CapabilitySet::SYS_ADMIN);
    let mut first = sets;
    if is_larger {
        first.permitted |= CapabilitySet::SYS_ADMIN;
        first.effective |= CapabilitySet::SYS_ADMIN;
    }
    set_capabilities(None, first)
        .context(|| format!("process.capabilities: permitted {:?}", sets.permitted))?;
    for capability in ambient.iter() {
        configure_capability_in_ambient_set(capability, true)
            .context(|| format!("process.capabilities: ambient {capability:?}"))?;
    }
    Ok((Credentials { outstanding: is_larger.then_some(sets) }, notices))
}

/// Cuts the sets down to what the kernel's rules allow, and says so.
fn grantable(
    [bounding, mut effective, mut inheritable, permitted, mut ambient]: [CapabilitySet; 5],
) -> (CapabilitySets, CapabilitySet, CapabilitySet, Vec<String>) {
    let mut notices = Vec::new();
    let mut cut = |set: &mut CapabilitySet, name: &str, to: CapabilitySet, what: &str| {
        let beyond = *set & !to;
        if !beyond.is_empty() {
            let list: Vec<_> = beyond.iter_names().map(|(name, _)| format!("CAP_{name}")).collect();
            let list = list.join(" ");
            notices.push(format!("process.capabilities.{name}: {list} not granted, not {what}"));
            *set &= to;
        }
    };
    cut(&mut effective, "effective", permitted, "permitted");
    cut(&mut inheritable, "inheritable", bounding, "in the bounding set");
    cut(&mut ambient, "ambient", permitted & inheritable, "both permitted and inheritable");
    (CapabilitySets { effective, permitted, inheritable }, bounding, ambient, notices)
}

fn drop_bounding(keep: CapabilitySet) -> Result<()> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match capability_is_in_bounding_set(capability) {
            Ok(true) if !keep.contains(capability) => {
                remove_capability_from_bounding_set(capability)
                    .context(|| format!("drop capability {capability:?}"))?;
            }
            Ok(_) => {}
            // Past the last one that this kernel has.
            Err(_) => break,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_of_the_specification_is_known() {
        // The enumeration of the crate that the host uses.
        let last = CapabilitySet::from_bits_retain((1 << 41) - 1);
        let all: Vec<String> = last.iter_names().map(|(name, _)| format!("CAP_{name}")).collect();
        assert_eq!((all.len(), bits(&all)), (41, last));
        for name in ["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE", "CAP_WAKE_ALARM", "CAP_SYSLOG"] {
            assert!(all.iter().any(|known| known == name), "{name}");
        }
        assert!(capability("CHOWN").is_none() && capability("CAP_NOPE").is_none());
    }

    #[test]
    fn what_cannot_be_granted_is_cut_and_said() {
        let (a, b) = (CapabilitySet::CHOWN, CapabilitySet::KILL);
        let (sets, bounding, ambient, notices) = grantable([a, a | b, a | b, a, a | b]);
        assert_eq!((sets.effective, sets.inheritable, sets.permitted), (a, a, a));
        assert_eq!((bounding, ambient), (a, a));
        assert_eq!(notices.len(), 3, "{notices:?}");
        assert!(notices.iter().all(|n| n.contains("CAP_KILL") && !n.contains("CAP_CHOWN")));
        assert!(grantable([a, a, a, a, a]).3.is_empty());
    }
}
