//! What is known of an interface: all that the guest is told.

use mvm_netlink::{Address, Link, Neighbour, Route, Socket};

/// An Ethernet interface with what somebody gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its address on the link.
    pub mac: [u8; 6],
    /// Longest packet in bytes.
    pub mtu: u32,
    /// Its addresses, those that the kernel makes up left out.
    pub addresses: Vec<Address>,
    /// Its routes, those that follow from addresses left out; in the order in which they can be
    /// added.
    pub routes: Vec<Route>,
    /// Its permanent neighbours.
    pub neighbours: Vec<Neighbour>,
}

impl Interface {
    /// The interfaces that a machine can use: Ethernet, up, and no tap device.
    ///
    /// # Errors
    /// The kernel's.
    pub fn list(socket: &mut Socket) -> Result<Vec<Self>, mvm_netlink::Error> {
        let links = socket.links()?;
        let (addresses, routes) = (socket.addresses()?, socket.routes()?);
        let neighbours = socket.neighbours()?;
        let usable = links.into_iter().filter_map(|link| {
            let mac = usable(&link)?;
            let index = link.index;
            let mut routes: Vec<_> =
                routes.iter().filter(|r| r.index == index && r.is_given()).cloned().collect();
            // A gateway must be reachable before it can be used.
            routes.sort_by_key(|route| (route.gateway.is_some(), route.destination.is_none()));
            let addresses = addresses.iter().filter(|a| a.index == index && a.is_given());
            let neighbours = neighbours.iter().filter(|n| n.index == index);
            Some(Self {
                index,
                name: link.name,
                mac,
                mtu: link.mtu,
                addresses: addresses.cloned().collect(),
                routes,
                neighbours: neighbours.cloned().collect(),
            })
        });
        Ok(usable.collect())
    }
}

/// Its address, if it is of use. The kernel's own devices for tunnels are Ethernet too in part, but
/// down; a tap device belongs to some other machine.
fn usable(link: &Link) -> Option<[u8; 6]> {
    let tap = link.kind.as_deref() == Some("tun");
    let mac = link.mac.filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6])?;
    (link.is_up() && !link.is_loopback() && !tap).then_some(mac)
}
