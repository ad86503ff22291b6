//! How a machine gets its network: the interfaces of a network namespace become the guest's.
//!
//! * [`Namespace`] is a network namespace, made or found.
//! * [`Interface`] is what is known of one of its interfaces: all that the guest has to be told.
//! * [`join`] puts a tap device beside each interface and redirects packets between the two, both
//!   ways; the guest then *is* at the interface, under its address. [`sweep`] removes what stays when
//!   the tap devices are gone.
//! * [`cni`] has plugins make the interfaces.
//! * [`Loopback`] takes what is dialled on a namespace's loopback, where nothing of the guest is.
//! * [`resolv`] finds out which name servers hold in a namespace.
//!
//! Not in scope: the device that the guest sees (`mvm-devices`), and telling the guest (the agent).

pub mod cni;
mod interface;
mod join;
mod loopback;
mod namespace;
pub mod resolv;
mod tap;

use std::io;
use std::path::PathBuf;

pub use interface::Interface;
pub use join::{Joined, MAX_INTERFACES, join, sweep};
pub use loopback::Loopback;
pub use namespace::{Identity, Namespace};

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is no network namespace, or cannot be opened.
    #[error("cannot use the network namespace {}: {source}", path.display())]
    Namespace {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Entering it needs a privilege.
    #[error(
        "cannot enter the network namespace {}: {source}; this needs root (CAP_SYS_ADMIN)",
        path.display()
    )]
    Enter {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused to tell or to change something of the network.
    #[error("network namespace {}: {source}", path.display())]
    Netlink {
        /// The namespace's file.
        path: PathBuf,
        /// What.
        source: mvm_netlink::Error,
    },
    /// There is nothing to join.
    #[error(
        "the network namespace {} has no interface that a machine could use: it wants at least one \
         Ethernet interface besides lo that is up",
        path.display()
    )]
    NoInterface {
        /// The namespace's file.
        path: PathBuf,
    },
    /// There is more than a machine has places for.
    #[error(
        "the network namespace {} has {count} interfaces; a machine takes at most {MAX_INTERFACES}",
        path.display()
    )]
    TooManyInterfaces {
        /// The namespace's file.
        path: PathBuf,
        /// How many.
        count: usize,
    },
    /// Another machine has the interface.
    #[error("interface {name} in {} is joined to another machine already", path.display())]
    InUse {
        /// The interface.
        name: String,
        /// The namespace's file.
        path: PathBuf,
    },
    /// Somebody else filters what comes in.
    #[error(
        "interface {name} in {} has an ingress discipline that is not mvm's; \
         `tc qdisc del dev {name} ingress` in that namespace removes it",
        path.display()
    )]
    Foreign {
        /// The interface.
        name: String,
        /// The namespace's file.
        path: PathBuf,
    },
    /// The kernel lacks what joins a tap device and an interface.
    #[error(
        "this kernel cannot redirect packets between interfaces: it has no {what} \
         (CONFIG_{option}); load the module or use another kernel, or run with --network none"
    )]
    NoTrafficControl {
        /// What is missing.
        what: &'static str,
        /// The kernel's option.
        option: &'static str,
    },
    /// There is no tap device.
    #[error("cannot make a tap device in {}: {source}{}", path.display(), tap::remedy(source))]
    Tap {
        /// The namespace's file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A plugin or its configuration.
    #[error(transparent)]
    Cni(#[from] cni::Error),
    /// The host refused.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}
