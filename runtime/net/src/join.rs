//! Joining tap devices to the interfaces of a namespace.
//!
//! The interface keeps its addresses, so that whoever looks at the namespace sees what it always saw;
//! but what comes in at it goes to the guest before the namespace's own kernel stack gets to see it,
//! and what the guest sends goes out at it. The guest has the interface's addresses and MAC.
//!
//! A tap device goes with its last descriptor and takes its own filter along. The filter of the
//! interface does not go by itself: [`sweep`] removes it once the tap device is gone, and so does the
//! next [`join`].

use std::os::fd::OwnedFd;

use mvm_netlink::{LinkChange, Redirection, Socket};

use crate::{Error, Interface, Namespace, tap};

/// Most interfaces of a machine.
pub const MAX_INTERFACES: usize = 8;

/// Priority of our filters, by which they are known.
const PRIORITY: u16 = 0x6d76;
/// What the names of our tap devices begin with.
const TAP_PREFIX: &str = "mvm";

/// An interface that the guest has.
#[derive(Debug)]
pub struct Joined {
    /// What it is.
    pub interface: Interface,
    /// The queues of the tap device that is joined to it.
    pub queues: Vec<OwnedFd>,
}

/// Joins every interface of `namespace` that a machine can use to a tap device with so many queues.
///
/// # Errors
/// [`Error`]; nothing is left behind.
pub fn join(namespace: &Namespace, queues: usize) -> Result<Vec<Joined>, Error> {
    let mut socket = namespace.socket()?;
    let failed = |source| namespace.netlink(source);
    let interfaces = Interface::list(&mut socket).map_err(failed)?;
    let path = || namespace.path().to_owned();
    match interfaces.len() {
        0 => return Err(Error::NoInterface { path: path() }),
        count if count > MAX_INTERFACES => {
            return Err(Error::TooManyInterfaces { path: path(), count });
        }
        _ => {}
    }
    let mut all = Vec::new();
    for interface in interfaces {
        match join_one(namespace, &mut socket, &interface, queues) {
            Ok(queues) => all.push(Joined { interface, queues }),
            Err(error) => {
                drop(all);
                if let Err(e) = sweep_with(&mut socket) {
                    tracing::warn!("cannot clean up after a failure: {e}");
                }
                return Err(error);
            }
        }
    }
    Ok(all)
}

fn join_one(
    namespace: &Namespace,
    socket: &mut Socket,
    interface: &Interface,
    queues: usize,
) -> Result<Vec<OwnedFd>, Error> {
    let failed = |source| namespace.netlink(source);
    clear(namespace, socket, interface)?;
    let made = tap::create(namespace, TAP_PREFIX, queues)?;
    let links = socket.links().map_err(failed)?;
    let index = links.iter().find(|link| link.name == made.name).map(|link| link.index);
    let Some(tap) = index else {
        let source = std::io::ErrorKind::NotFound.into();
        return Err(Error::Tap { path: namespace.path().to_owned(), source });
    };
    let change = LinkChange { up: Some(true), mtu: Some(interface.mtu), name: None };
    socket.change_link(tap, &change).map_err(failed)?;
    for (from, to) in [(tap, interface.index), (interface.index, tap)] {
        socket.add_ingress(from).map_err(|e| match e.errno() {
            // Such as clsact, which takes the same place.
            Some(libc::EEXIST) => {
                Error::Foreign { name: interface.name.clone(), path: namespace.path().to_owned() }
            }
            _ => missing(e, namespace, INGRESS),
        })?;
        socket.redirect(from, to, PRIORITY).map_err(|e| missing(e, namespace, REDIRECTION))?;
    }
    Ok(made.queues)
}

const INGRESS: (&str, &str) = ("ingress queueing discipline", "NET_SCH_INGRESS");
const REDIRECTION: (&str, &str) =
    ("u32 classifier or mirred action", "NET_CLS_U32 and CONFIG_NET_ACT_MIRRED");

/// A kernel that does not know a thing by its name says that there is none.
fn missing(
    error: mvm_netlink::Error,
    namespace: &Namespace,
    what: (&'static str, &'static str),
) -> Error {
    match error.errno() {
        Some(libc::ENOENT | libc::EOPNOTSUPP) => {
            Error::NoTrafficControl { what: what.0, option: what.1 }
        }
        _ => namespace.netlink(error),
    }
}

/// Makes way on the ingress side of `interface`: what a machine that is gone has left is removed.
fn clear(namespace: &Namespace, socket: &mut Socket, interface: &Interface) -> Result<(), Error> {
    let failed = |source| namespace.netlink(source);
    let (name, path) = (interface.name.clone(), namespace.path().to_owned());
    let links = socket.links().map_err(failed)?;
    let filters = socket.redirections(interface.index).map_err(failed)?;
    for filter in &filters {
        if filter.priority != PRIORITY {
            return Err(Error::Foreign { name, path });
        }
        if filter.target.is_some_and(|target| links.iter().any(|link| link.index == target)) {
            return Err(Error::InUse { name, path });
        }
    }
    match socket.delete_ingress(interface.index) {
        // There is none, and perhaps the kernel has never heard of any.
        Err(e) if !filters.is_empty() => Err(failed(e)),
        _ => Ok(()),
    }
}

/// Removes what machines that are gone have left at the interfaces of `namespace`: redirections to tap
/// devices that are there no more.
///
/// # Errors
/// The kernel's.
pub fn sweep(namespace: &Namespace) -> Result<(), Error> {
    let mut socket = namespace.socket()?;
    sweep_with(&mut socket).map_err(|source| namespace.netlink(source))
}

fn sweep_with(socket: &mut Socket) -> Result<(), mvm_netlink::Error> {
    let links = socket.links()?;
    for link in &links {
        let filters = socket.redirections(link.index)?;
        let abandoned = |filter: &Redirection| {
            let target = filter.target.unwrap_or(0);
            filter.priority == PRIORITY && !links.iter().any(|link| link.index == target)
        };
        if !filters.is_empty() && filters.iter().all(abandoned) {
            match socket.delete_ingress(link.index) {
                // It has gone with the interface, or somebody else was faster.
                Err(e) if matches!(e.errno(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) => {
                }
                done => done?,
            }
        }
    }
    Ok(())
}
