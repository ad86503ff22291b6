//! Addresses of devices.

use std::net::IpAddr;

use crate::message::{Message, attribute, u32_at};
use crate::socket::{
    Error, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, Socket,
};
use crate::{family, ip_bytes, ip_from};

const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
/// Addresses that the kernel made up for privacy.
const IFA_F_TEMPORARY: u32 = 1;
/// No duplicate address detection: whoever gives the address knows that it is unique.
const IFA_F_NODAD: u32 = 2;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
/// `struct ifaddrmsg`.
const HEADER: usize = 8;

/// An address of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Number of the device.
    pub index: u32,
    /// The address.
    pub ip: IpAddr,
    /// The other end's, if it is not in the same network.
    pub peer: Option<IpAddr>,
    /// Bits of the network.
    pub prefix: u8,
    /// Where it is valid: 0 everywhere, 253 on the link.
    pub scope: u8,
    /// The network is not reached by the device just because of the address.
    pub no_prefix_route: bool,
    /// The kernel made it up for privacy.
    pub temporary: bool,
}

impl Address {
    /// An address that is valid everywhere.
    pub fn new(index: u32, ip: IpAddr, prefix: u8) -> Self {
        Self { index, ip, peer: None, prefix, scope: 0, no_prefix_route: false, temporary: false }
    }

    /// Whether somebody gave it: neither made up for the link alone nor for privacy.
    pub fn is_given(&self) -> bool {
        self.scope == 0 && !(self.temporary && self.ip.is_ipv6())
    }

    fn parse(body: &[u8]) -> Option<Self> {
        let attributes = body.get(HEADER..)?;
        let get = |kind| attribute(attributes, kind).and_then(ip_from);
        let (local, address) = (get(IFA_LOCAL), get(IFA_ADDRESS));
        let ip = local.or(address)?;
        let flags = attribute(attributes, IFA_FLAGS).and_then(|v| u32_at(v, 0)).unwrap_or(0);
        Some(Self {
            index: u32_at(body, 4)?,
            ip,
            peer: address.filter(|peer| *peer != ip),
            prefix: body[1],
            scope: body[3],
            no_prefix_route: flags & IFA_F_NOPREFIXROUTE != 0,
            temporary: flags & IFA_F_TEMPORARY != 0,
        })
    }
}

impl Socket {
    /// The addresses of all devices, IPv4 and IPv6.
    ///
    /// # Errors
    /// [`Error`].
    pub fn addresses(&mut self) -> Result<Vec<Address>, Error> {
        let message = Message::new(RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, &[0; HEADER]);
        let all = self.dump("list the addresses", &message)?;
        let addresses = all.iter().filter(|(kind, _)| *kind == RTM_NEWADDR);
        Ok(addresses.filter_map(|(_, body)| Address::parse(body)).collect())
    }

    /// Gives a device an address; one that it has already is no error.
    ///
    /// # Errors
    /// [`Error`].
    pub fn add_address(&mut self, address: &Address) -> Result<(), Error> {
        let Address { index, ip, peer, prefix, scope, no_prefix_route, .. } = address;
        let mut header = [0; HEADER];
        (header[0], header[1], header[3]) = (family(*ip), *prefix, *scope);
        header[4..].copy_from_slice(&index.to_ne_bytes());
        let how = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let mut message = Message::new(RTM_NEWADDR, how, &header);
        message.attribute(IFA_LOCAL, &ip_bytes(*ip));
        message.attribute(IFA_ADDRESS, &ip_bytes(peer.unwrap_or(*ip)));
        if let (IpAddr::V4(ip), None, 1..=30) = (ip, peer, prefix) {
            let broadcast = ip.to_bits() | u32::MAX >> prefix;
            message.attribute(IFA_BROADCAST, &broadcast.to_be_bytes());
        }
        let no_route = if *no_prefix_route { IFA_F_NOPREFIXROUTE } else { 0 };
        let unique = if ip.is_ipv6() { IFA_F_NODAD } else { 0 };
        message.attribute(IFA_FLAGS, &(unique | no_route).to_ne_bytes());
        let what = format!("add address {ip}/{prefix} to network device {index}");
        match self.request(&what, message) {
            Err(e) if e.errno() == Some(libc::EEXIST) => Ok(()),
            done => done,
        }
    }
}
