//! A container's network: the interfaces of its network namespace become those of its machine.
//!
//! Whatever fills the namespace (CNI plugins, hooks, `ip netns`) does so until the start, which is when
//! they are looked at. A namespace without any is one with loopback alone.

use std::path::PathBuf;

use mvm_sandbox::network::Wish;

use super::holder::Network;
use crate::error::{Error, Result};

/// Refuses what no machine can have.
///
/// # Errors
/// [`Error::Unimplemented`]: the container is to have the host's own network.
pub fn check(network: &Network) -> Result<()> {
    match network {
        Network::Host => Err(Error::Unimplemented(
            "the container asks for the host's own network (linux.namespaces has no network namespace: \
             --net-host, hostNetwork), which a machine cannot share; give it a network namespace, with an \
             interface by CNI for instance"
                .into(),
        )),
        Network::New | Network::Join(_) => Ok(()),
    }
}

/// What the machine is to have, where `holder` is the process in the container's namespace.
pub fn wish(network: &Network, holder: u32) -> Wish {
    match network {
        Network::Host => Wish::None,
        Network::New => Wish::IfAny(PathBuf::from(format!("/proc/{holder}/ns/net"))),
        // By its own name: it may be there longer than the holder.
        Network::Join(path) => Wish::IfAny(path.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_network_is_refused_and_others_are_found() {
        let error = check(&Network::Host).unwrap_err();
        assert!(matches!(&error, Error::Unimplemented(text) if text.contains("--net-host")));
        check(&Network::New).unwrap();
        assert_eq!(wish(&Network::New, 7), Wish::IfAny("/proc/7/ns/net".into()));
        let named = Network::Join("/run/netns/x".into());
        assert_eq!(wish(&named, 7), Wish::IfAny("/run/netns/x".into()));
    }
}
