//! The kernel's routing socket (`rtnetlink(7)`), as far as host and guest need it: links, addresses,
//! routes, neighbours, and the redirection of one link's packets to another.
//!
//! One small crate for both sides, since the agent is carried in every guest's initramfs. Requests
//! are synchronous; a [`Socket`] belongs to the network namespace of the thread that opened it.

mod address;
mod link;
mod message;
mod neighbour;
mod redirect;
mod route;
mod socket;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use address::Address;
pub use link::{Link, LinkChange};
pub use neighbour::Neighbour;
pub use redirect::Redirection;
pub use route::Route;
pub use socket::{Error, Socket};

/// The bytes of an address.
pub fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The address of 4 or 16 bytes.
pub fn ip_from(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|b| Ipv4Addr::from(b).into()),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|b| Ipv6Addr::from(b).into()),
        _ => None,
    }
}

/// The kernel's number of the address family.
fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}
