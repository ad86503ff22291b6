//! The guest's network devices, set up as the host says.

use mvm_agent_protocol::messages::{
    NetworkAddress, NetworkInterface, NetworkNeighbour, NetworkRoute,
};
use mvm_netlink::{Address, Link, LinkChange, Neighbour, Route, Socket, ip_from};

use crate::error::{Error, Result};

/// Longest name of a device (`IFNAMSIZ` without the final zero).
const MAX_NAME: usize = 15;

/// Sets up the devices that `interfaces` name by their addresses on the link.
pub fn configure(interfaces: &[NetworkInterface]) -> Result<()> {
    let plans = interfaces.iter().map(Plan::check).collect::<Result<Vec<_>>>()?;
    let mut socket = Socket::open().map_err(refused)?;
    let links = socket.links().map_err(refused)?;
    let mut found = Vec::new();
    for plan in plans {
        let link = links.iter().find(|link| link.mac == Some(plan.mac) && !link.is_loopback());
        let link = link.ok_or_else(|| {
            Error::NotFound(format!("no network device has the address {}", mac_text(plan.mac)))
        })?;
        found.push((plan, link));
    }
    // All names first: one device's new name may be another's old one.
    rename(&mut socket, &found)?;
    for (plan, link) in found {
        plan.apply(&mut socket, link.index).map_err(refused)?;
    }
    Ok(())
}

fn refused(error: mvm_netlink::Error) -> Error {
    let errno = error.errno().unwrap_or(libc::EIO);
    match error {
        mvm_netlink::Error::Refused { what, hint, .. } => {
            let hint = hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
            Error::System { what: format!("{what}{hint}"), errno }
        }
        other => Error::System { what: other.to_string(), errno },
    }
}

fn rename(socket: &mut Socket, found: &[(Plan, &Link)]) -> Result<()> {
    let wrong: Vec<_> = found
        .iter()
        .filter(|(plan, link)| !plan.name.is_empty() && plan.name != link.name)
        .collect();
    let mut change = |index, name: &str| {
        let change = LinkChange { name: Some(name), up: Some(false), mtu: None };
        socket.change_link(index, &change).map_err(refused)
    };
    for (_, link) in &wrong {
        change(link.index, &format!("mvmtmp{}", link.index))?;
    }
    wrong.iter().try_for_each(|(plan, link)| change(link.index, &plan.name))
}

/// What the host said of one device, checked; device numbers are still 0.
#[derive(Debug)]
struct Plan {
    mac: [u8; 6],
    name: String,
    mtu: u32,
    addresses: Vec<Address>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

impl Plan {
    fn check(interface: &NetworkInterface) -> Result<Self> {
        let name = &interface.name;
        let plain = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':';
        let reserved = matches!(name.as_str(), "." | ".." | "lo");
        if name.len() > MAX_NAME || !name.bytes().all(plain) || reserved {
            return Err(Error::Invalid(format!("{name:?} cannot be a network device's name")));
        }
        Ok(Self {
            mac: mac(&interface.mac)?,
            name: name.clone(),
            mtu: interface.mtu,
            addresses: interface.addresses.iter().map(address).collect::<Result<_>>()?,
            routes: interface.routes.iter().map(route).collect::<Result<_>>()?,
            neighbours: interface.neighbours.iter().map(neighbour).collect::<Result<_>>()?,
        })
    }

    fn apply(self, socket: &mut Socket, index: u32) -> std::result::Result<(), mvm_netlink::Error> {
        let mtu = Some(self.mtu).filter(|&mtu| mtu != 0);
        socket.change_link(index, &LinkChange { up: Some(true), mtu, name: None })?;
        for address in self.addresses {
            socket.add_address(&Address { index, ..address })?;
        }
        for neighbour in self.neighbours {
            socket.add_neighbour(&Neighbour { index, ..neighbour })?;
        }
        for route in self.routes {
            socket.add_route(&Route { index, ..route })?;
        }
        Ok(())
    }
}

fn mac(bytes: &[u8]) -> Result<[u8; 6]> {
    let invalid = |_| Error::Invalid(format!("{bytes:02x?} is no address on a link"));
    bytes.try_into().map_err(invalid)
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn ip(bytes: &[u8]) -> Result<std::net::IpAddr> {
    ip_from(bytes).ok_or_else(|| Error::Invalid(format!("{bytes:02x?} is no IP address")))
}

fn optional_ip(bytes: &[u8]) -> Result<Option<std::net::IpAddr>> {
    if bytes.is_empty() { Ok(None) } else { ip(bytes).map(Some) }
}

fn prefix(ip: std::net::IpAddr, bits: u32) -> Result<u8> {
    let most = if ip.is_ipv4() { 32 } else { 128 };
    let fits = u8::try_from(bits).ok().filter(|bits| *bits <= most);
    fits.ok_or_else(|| Error::Invalid(format!("{ip}/{bits} is no network")))
}

fn address(message: &NetworkAddress) -> Result<Address> {
    let own = ip(&message.ip)?;
    Ok(Address {
        peer: optional_ip(&message.peer)?,
        no_prefix_route: message.no_prefix_route,
        ..Address::new(0, own, prefix(own, message.prefix)?)
    })
}

fn route(message: &NetworkRoute) -> Result<Route> {
    let network = optional_ip(&message.destination)?;
    let destination = network.map(|ip| Ok((ip, prefix(ip, message.prefix)?))).transpose()?;
    let scope = u8::try_from(message.scope);
    let scope = scope.map_err(|_| Error::Invalid(format!("scope {}", message.scope)))?;
    let some = |n: u32| Some(n).filter(|&n| n != 0);
    Ok(Route {
        ipv6: message.ipv6,
        destination,
        gateway: optional_ip(&message.gateway)?,
        source: optional_ip(&message.source)?,
        metric: some(message.metric),
        scope,
        on_link: message.on_link,
        mtu: some(message.mtu),
        ..Route::by_default(0, std::net::Ipv4Addr::UNSPECIFIED.into())
    })
}

fn neighbour(message: &NetworkNeighbour) -> Result<Neighbour> {
    Ok(Neighbour { index: 0, ip: ip(&message.ip)?, mac: mac(&message.mac)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> NetworkInterface {
        NetworkInterface { mac: vec![2, 0, 0, 0, 0, 1], name: "eth0".into(), ..Default::default() }
    }

    #[test]
    fn what_is_no_address_is_refused_before_anything_is_done() {
        Plan::check(&interface()).unwrap();
        let bad: [fn(&mut NetworkInterface); 6] = [
            |i| i.mac.truncate(5),
            |i| i.name = "a/b".into(),
            |i| i.name = "x".repeat(16),
            |i| i.addresses.push(NetworkAddress { ip: vec![1, 2, 3], ..Default::default() }),
            |i| {
                let ip = vec![10, 0, 0, 1];
                i.addresses.push(NetworkAddress { ip, prefix: 33, ..Default::default() });
            },
            |i| i.routes.push(NetworkRoute { gateway: vec![1], ..Default::default() }),
        ];
        for change in bad {
            let mut interface = interface();
            change(&mut interface);
            assert!(matches!(Plan::check(&interface), Err(Error::Invalid(_))), "{interface:?}");
        }
    }

    #[test]
    fn a_device_that_there_is_not_is_named() {
        let absent = NetworkInterface { mac: vec![0x02, 0xfe, 9, 9, 9, 9], ..interface() };
        let error = configure(&[absent]).unwrap_err().to_string();
        assert!(error.contains("02:fe:09:09:09:09"), "{error}");
    }
}
