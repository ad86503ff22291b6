//! Neighbours: which address on the link a device of the network has.

use std::net::IpAddr;

use crate::message::{Message, attribute, u16_at, u32_at};
use crate::socket::{Error, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, Socket};
use crate::{family, ip_bytes, ip_from};

const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const NLM_F_REPLACE: u16 = 0x100;
/// `struct ndmsg`.
const HEADER: usize = 12;

/// A neighbour that somebody has entered for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Number of the device.
    pub index: u32,
    /// Its address.
    pub ip: IpAddr,
    /// Its address on the link.
    pub mac: [u8; 6],
}

impl Neighbour {
    fn parse(body: &[u8]) -> Option<Self> {
        let attributes = body.get(HEADER..)?;
        if u16_at(body, 8)? & NUD_PERMANENT == 0 {
            return None;
        }
        Some(Self {
            index: u32_at(body, 4)?,
            ip: ip_from(attribute(attributes, NDA_DST)?)?,
            mac: attribute(attributes, NDA_LLADDR)?.try_into().ok()?,
        })
    }
}

impl Socket {
    /// The permanent neighbours.
    ///
    /// # Errors
    /// [`Error`].
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>, Error> {
        let message = Message::new(RTM_GETNEIGH, NLM_F_REQUEST | NLM_F_DUMP, &[0; HEADER]);
        let all = self.dump("list the neighbours", &message)?;
        let neighbours = all.iter().filter(|(kind, _)| *kind == RTM_NEWNEIGH);
        Ok(neighbours.filter_map(|(_, body)| Neighbour::parse(body)).collect())
    }

    /// Enters a neighbour for good.
    ///
    /// # Errors
    /// [`Error`].
    pub fn add_neighbour(&mut self, neighbour: &Neighbour) -> Result<(), Error> {
        let Neighbour { index, ip, mac } = neighbour;
        let mut header = [0; HEADER];
        header[0] = family(*ip);
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        header[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
        let how = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let mut message = Message::new(RTM_NEWNEIGH, how, &header);
        message.attribute(NDA_DST, &ip_bytes(*ip)).attribute(NDA_LLADDR, mac);
        self.request(&format!("add neighbour {ip} of network device {index}"), message)
    }
}
