//! Routes of the main table.

use std::net::IpAddr;

use crate::message::{Message, attribute, u32_at};
use crate::socket::{
    Error, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, Socket,
};
use crate::{ip_bytes, ip_from};

const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTAX_MTU: u16 = 2;
const RTN_UNICAST: u8 = 1;
const RT_TABLE_MAIN: u32 = 254;
/// Made by the kernel because there is an address.
const RTPROT_KERNEL: u8 = 2;
const RTPROT_STATIC: u8 = 4;
const RTM_F_CLONED: u32 = 0x200;
const RTNH_F_ONLINK: u32 = 4;
/// `struct rtmsg`.
const HEADER: usize = 12;

/// A route to some network by one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Number of the device.
    pub index: u32,
    /// For IPv6, not IPv4.
    pub ipv6: bool,
    /// The network and its bits; `None` is everything.
    pub destination: Option<(IpAddr, u8)>,
    /// By whom, if the network is not at the device itself.
    pub gateway: Option<IpAddr>,
    /// The address to send from.
    pub source: Option<IpAddr>,
    /// Order among routes to the same network; lower is better.
    pub metric: Option<u32>,
    /// How far away: 0 anywhere, 253 on the link.
    pub scope: u8,
    /// The gateway is on the link although no network says so.
    pub on_link: bool,
    /// Longest packet, if it is shorter than the device's.
    pub mtu: Option<u32>,
    /// It follows from an address.
    pub by_kernel: bool,
}

impl Route {
    /// The default route by `gateway`.
    pub fn by_default(index: u32, gateway: IpAddr) -> Self {
        Self {
            index,
            ipv6: gateway.is_ipv6(),
            destination: None,
            gateway: Some(gateway),
            source: None,
            metric: None,
            scope: 0,
            on_link: false,
            mtu: None,
            by_kernel: false,
        }
    }

    /// Whether somebody gave it: it does not follow from an address.
    pub fn is_given(&self) -> bool {
        !self.by_kernel
    }

    /// `None`: it is not to one device, not in the main table, not for ordinary packets.
    fn parse(body: &[u8]) -> Option<Self> {
        let attributes = body.get(HEADER..)?;
        let get = |kind| attribute(attributes, kind);
        let number = |kind| get(kind).and_then(|v| u32_at(v, 0));
        let ip = |kind| get(kind).and_then(ip_from);
        let table = number(RTA_TABLE).unwrap_or(body[4].into());
        let flags = u32_at(body, 8)?;
        if table != RT_TABLE_MAIN || body[7] != RTN_UNICAST || flags & RTM_F_CLONED != 0 {
            return None;
        }
        // A gateway of the other family is behind its family's number.
        let via = get(RTA_VIA).and_then(|v| v.get(2..)).and_then(ip_from);
        let mtu = get(RTA_METRICS).and_then(|m| attribute(m, RTAX_MTU)).and_then(|v| u32_at(v, 0));
        Some(Self {
            index: number(RTA_OIF)?,
            ipv6: i32::from(body[0]) == libc::AF_INET6,
            destination: ip(RTA_DST).map(|dst| (dst, body[1])),
            gateway: ip(RTA_GATEWAY).or(via),
            source: ip(RTA_PREFSRC),
            metric: number(RTA_PRIORITY),
            scope: body[6],
            on_link: flags & RTNH_F_ONLINK != 0,
            mtu,
            by_kernel: body[5] == RTPROT_KERNEL,
        })
    }
}

impl Socket {
    /// The routes of the main tables, IPv4 and IPv6.
    ///
    /// # Errors
    /// [`Error`].
    pub fn routes(&mut self) -> Result<Vec<Route>, Error> {
        let message = Message::new(RTM_GETROUTE, NLM_F_REQUEST | NLM_F_DUMP, &[0; HEADER]);
        let all = self.dump("list the routes", &message)?;
        let routes = all.iter().filter(|(kind, _)| *kind == RTM_NEWROUTE);
        Ok(routes.filter_map(|(_, body)| Route::parse(body)).collect())
    }

    /// Adds a route; one that there is already is no error.
    ///
    /// # Errors
    /// [`Error`].
    pub fn add_route(&mut self, route: &Route) -> Result<(), Error> {
        let family = if route.ipv6 { libc::AF_INET6 } else { libc::AF_INET };
        let mut header = [0; HEADER];
        header[0] = family as u8;
        header[1] = route.destination.map_or(0, |(_, prefix)| prefix);
        header[4] = RT_TABLE_MAIN as u8;
        header[5] = RTPROT_STATIC;
        header[6] = route.scope;
        header[7] = RTN_UNICAST;
        let flags = if route.on_link { RTNH_F_ONLINK } else { 0 };
        header[8..].copy_from_slice(&flags.to_ne_bytes());
        let how = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let mut message = Message::new(RTM_NEWROUTE, how, &header);
        if let Some((network, _)) = route.destination {
            message.attribute(RTA_DST, &ip_bytes(network));
        }
        match route.gateway {
            Some(gateway) if gateway.is_ipv6() == route.ipv6 => {
                message.attribute(RTA_GATEWAY, &ip_bytes(gateway));
            }
            Some(gateway) => {
                let family = u16::from(crate::family(gateway)).to_ne_bytes();
                message.attribute(RTA_VIA, &[&family[..], &ip_bytes(gateway)].concat());
            }
            None => {}
        }
        if let Some(source) = route.source {
            message.attribute(RTA_PREFSRC, &ip_bytes(source));
        }
        if let Some(metric) = route.metric {
            message.attribute(RTA_PRIORITY, &metric.to_ne_bytes());
        }
        if let Some(mtu) = route.mtu {
            message.nested(RTA_METRICS, |m| {
                m.attribute(RTAX_MTU, &mtu.to_ne_bytes());
            });
        }
        message.attribute(RTA_OIF, &route.index.to_ne_bytes());
        let to = route.destination.map_or("default".into(), |(ip, bits)| format!("{ip}/{bits}"));
        let by = route.gateway.map(|ip| format!(" by {ip}")).unwrap_or_default();
        match self.request(&format!("add route {to}{by}"), message) {
            Err(e) if e.errno() == Some(libc::EEXIST) => Ok(()),
            done => done,
        }
    }
}
