//! Links: the network devices.

use crate::message::{Message, attribute, text, u16_at, u32_at};
use crate::socket::{Error, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, Socket};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const ARPHRD_ETHER: u16 = 1;
/// `struct ifinfomsg`.
const HEADER: usize = 16;

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its address, if it is an Ethernet device.
    pub mac: Option<[u8; 6]>,
    /// Longest packet in bytes.
    pub mtu: u32,
    /// `IFF_*`.
    pub flags: u32,
    /// Its kind (`veth`, `tun`, ...), if it is made by software.
    pub kind: Option<String>,
}

impl Link {
    /// Whether it has been switched on.
    pub fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP as u32 != 0
    }

    /// Whether it is the loopback device.
    pub fn is_loopback(&self) -> bool {
        self.flags & libc::IFF_LOOPBACK as u32 != 0
    }

    fn parse(body: &[u8]) -> Option<Self> {
        let attributes = body.get(HEADER..)?;
        let ethernet = u16_at(body, 2)? == ARPHRD_ETHER;
        let address = attribute(attributes, IFLA_ADDRESS);
        let info = attribute(attributes, IFLA_LINKINFO);
        Some(Self {
            index: u32_at(body, 4)?,
            flags: u32_at(body, 8)?,
            name: text(attribute(attributes, IFLA_IFNAME)?),
            mac: address.filter(|_| ethernet).and_then(|a| a.try_into().ok()),
            mtu: attribute(attributes, IFLA_MTU).and_then(|v| u32_at(v, 0)).unwrap_or(0),
            kind: info.and_then(|i| attribute(i, IFLA_INFO_KIND)).map(text),
        })
    }
}

/// What is to be changed of a device.
#[derive(Debug, Clone, Default)]
pub struct LinkChange<'a> {
    /// Switch it on or off.
    pub up: Option<bool>,
    /// Another name; only while it is off.
    pub name: Option<&'a str>,
    /// Another MTU.
    pub mtu: Option<u32>,
}

fn header(index: u32, flags: u32, change: u32) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..].copy_from_slice(&change.to_ne_bytes());
    header
}

impl Socket {
    /// All devices.
    ///
    /// # Errors
    /// [`Error`].
    pub fn links(&mut self) -> Result<Vec<Link>, Error> {
        let message = Message::new(RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, &header(0, 0, 0));
        let all = self.dump("list the network devices", &message)?;
        let links = all.iter().filter(|(kind, _)| *kind == RTM_NEWLINK);
        Ok(links.filter_map(|(_, body)| Link::parse(body)).collect())
    }

    /// Changes device `index`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn change_link(&mut self, index: u32, change: &LinkChange<'_>) -> Result<(), Error> {
        let up = libc::IFF_UP as u32;
        let (flags, mask) = match change.up {
            Some(true) => (up, up),
            Some(false) => (0, up),
            None => (0, 0),
        };
        let flags = header(index, flags, mask);
        let mut message = Message::new(RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK, &flags);
        if let Some(name) = change.name {
            message.attribute(IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat());
        }
        if let Some(mtu) = change.mtu {
            message.attribute(IFLA_MTU, &mtu.to_ne_bytes());
        }
        self.request(&format!("change network device {index} ({change:?})"), message)
    }

    /// Removes device `index`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn delete_link(&mut self, index: u32) -> Result<(), Error> {
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        let message = Message::new(RTM_DELLINK, flags, &header(index, 0, 0));
        self.request(&format!("remove network device {index}"), message)
    }
}
