//! The network of a sandbox: what is wanted, what was made for it, and what has to be undone.
//!
//! Whatever is made is written down before it is made, in a file of the sandbox's directory, so that
//! whoever finds the sandbox without its owner can undo it.

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use mvm_agent_protocol::messages::{
    NetworkAddress, NetworkInterface, NetworkNeighbour, NetworkRoute,
};
use mvm_net::cni::{Attachment, Dns, Places, PortMapping};
use mvm_net::{Identity, Interface, Joined, Namespace};
use mvm_netlink::ip_bytes;
use serde::{Deserialize, Serialize};

use crate::registry::Place;
use crate::unikernel::{Addressed, Addresses, Given};

/// Name of the file in the sandbox's directory that says what has to be undone.
pub const FILE: &str = "network.json";

/// Most queues of a network device.
const MAX_QUEUES: u32 = 8;

/// Why there is no network, or not the one that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such kind of network.
    #[error(
        "invalid network {0:?}: there are none, ns:PATH (the interfaces of a network namespace) and \
         cni:NAME (a network of the CNI configuration)"
    )]
    Wish(String),
    /// A port cannot be published as written.
    #[error("invalid port {0:?}: write [IP:]HOST:GUEST[/tcp|udp], as in 8080:80")]
    Port(String),
    /// Only plugins publish ports.
    #[error("-p needs --network cni:NAME with a network that publishes ports")]
    PortsWithoutCni,
    /// The namespace or a plugin.
    #[error(transparent)]
    Net(#[from] mvm_net::Error),
    /// An interface that a machine cannot have.
    #[error(
        "interface {name} of the network namespace has an MTU of {mtu} bytes; 68 to 65535 can be"
    )]
    Mtu {
        /// The interface.
        name: String,
        /// Bytes.
        mtu: u32,
    },
    /// What has to be undone cannot be written down or read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl From<mvm_net::cni::Error> for Error {
    fn from(error: mvm_net::cni::Error) -> Self {
        Self::Net(error.into())
    }
}

/// Which network a sandbox is to have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Wish {
    /// Nothing but loopback.
    #[default]
    None,
    /// The interfaces of the namespace at this path.
    Namespace(PathBuf),
    /// The same, or nothing but loopback if it has none. Nobody writes this; it is what a container
    /// engine means that hands over a namespace.
    IfAny(PathBuf),
    /// The network of this name, by CNI, with these ports of the host.
    Cni {
        /// Its name.
        name: String,
        /// Ports.
        ports: Vec<PortMapping>,
    },
}

impl FromStr for Wish {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            Some(("ns", path)) if !path.is_empty() => Ok(Self::Namespace(path.into())),
            Some(("cni", name)) if !name.is_empty() => {
                Ok(Self::Cni { name: name.into(), ports: Vec::new() })
            }
            _ => Err(Error::Wish(text.into())),
        }
    }
}

impl Wish {
    /// With ports of the host, each as `[IP:]HOST:GUEST[/PROTOCOL]`.
    ///
    /// # Errors
    /// [`Error::Port`], [`Error::PortsWithoutCni`].
    pub fn publishing(self, list: &[String]) -> Result<Self, Error> {
        let list = list.iter().map(|text| port(text)).collect::<Result<Vec<_>, _>>()?;
        match self {
            wish if list.is_empty() => Ok(wish),
            Self::Cni { name, .. } => Ok(Self::Cni { name, ports: list }),
            _ => Err(Error::PortsWithoutCni),
        }
    }
}

fn port(text: &str) -> Result<PortMapping, Error> {
    let parse = || {
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let (rest, guest) = ports.rsplit_once(':')?;
        let (host_ip, host) = match rest.rsplit_once(':') {
            Some((ip, host)) => {
                let ip = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')).unwrap_or(ip);
                (ip.parse::<IpAddr>().ok()?.to_string(), host)
            }
            None => (String::new(), rest),
        };
        let number = |text: &str| text.parse::<u16>().ok().filter(|n| *n != 0);
        matches!(protocol, "tcp" | "udp").then_some(PortMapping {
            host_port: number(host)?,
            container_port: number(guest)?,
            protocol: protocol.into(),
            host_ip,
        })
    };
    parse().ok_or_else(|| Error::Port(text.into()))
}

/// What has to be undone.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// The namespace's file.
    namespace: PathBuf,
    /// Which namespace that was, if it was there already.
    identity: Option<Identity>,
    /// The name of the namespace, if it was made for the sandbox.
    own: Option<String>,
    /// What plugins did.
    attachment: Option<Attachment>,
}

impl Record {
    fn save(&self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(FILE);
        let next = dir.join(format!(".{FILE}"));
        let written = serde_json::to_vec(self)
            .map_err(io::Error::from)
            .and_then(|json| fs::write(&next, json))
            .and_then(|()| fs::rename(&next, &path));
        written.map_err(|source| Error::File { path, source })
    }
}

/// A network device of the machine, on its way.
#[derive(Debug)]
pub(crate) struct Card {
    pub joined: Joined,
    pub mtu: u16,
}

/// The network that a sandbox has.
#[derive(Debug)]
pub struct Network {
    cards: Vec<Card>,
    interfaces: Vec<Interface>,
    resolv_conf: Option<String>,
}

/// What the files of the guest say of its network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// Addresses under which the guest's host name stands in `/etc/hosts`.
    pub addresses: Vec<IpAddr>,
    /// `/etc/resolv.conf`.
    pub resolv_conf: Option<String>,
}

/// An interface, for those who look at the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Its name.
    pub name: String,
    /// Its address on the link.
    pub mac: String,
    /// Longest packet in bytes.
    pub mtu: u32,
    /// Its addresses with the bits of their networks.
    pub addresses: Vec<String>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.addresses.join(" "))
    }
}

impl Network {
    /// Makes the network that `wish` asks for, for a machine of so many vCPUs; `None` if that is none.
    ///
    /// # Errors
    /// [`Error`]. What was made until then is undone by [`tear_down`].
    pub fn set_up(place: &Place, wish: &Wish, vcpus: u32) -> Result<Option<Self>, Error> {
        match wish {
            Wish::None => Ok(None),
            Wish::IfAny(path) => match Self::set_up(place, &Wish::Namespace(path.clone()), vcpus) {
                Err(Error::Net(mvm_net::Error::NoInterface { .. })) => {
                    tear_down(&place.dir)?;
                    Ok(None)
                }
                done => done,
            },
            Wish::Namespace(path) => {
                let namespace = Namespace::open(path)?;
                let record = Record {
                    namespace: path.clone(),
                    identity: Some(namespace.identity()),
                    own: None,
                    attachment: None,
                };
                record.save(&place.dir)?;
                Self::of(&namespace, None, vcpus).map(Some)
            }
            Wish::Cni { name, ports } => {
                let own = format!("mvm-{}", place.id);
                let path = Path::new(Namespace::DIRECTORY).join(&own);
                let mut attachment =
                    Attachment::prepare(&places(), name, &place.id, &path, ports.clone())?;
                let mut record = Record {
                    namespace: path,
                    identity: None,
                    own: Some(own.clone()),
                    attachment: None,
                };
                record.save(&place.dir)?;
                let namespace = Namespace::create(&own)?;
                record.attachment = Some(attachment.clone());
                record.save(&place.dir)?;
                attachment.add()?;
                // With the plugins' own words, which they want to hear again.
                record.attachment = Some(attachment.clone());
                record.save(&place.dir)?;
                Self::of(&namespace, attachment.dns().as_ref(), vcpus).map(Some)
            }
        }
    }

    fn of(namespace: &Namespace, dns: Option<&Dns>, vcpus: u32) -> Result<Self, Error> {
        let queues = vcpus.clamp(1, MAX_QUEUES) as usize;
        let mut cards = Vec::new();
        for joined in mvm_net::join(namespace, queues)? {
            let mtu = joined.interface.mtu;
            let fits = u16::try_from(mtu).ok().filter(|mtu| *mtu >= 68);
            let name = || joined.interface.name.clone();
            let mtu = fits.ok_or_else(|| Error::Mtu { name: name(), mtu })?;
            cards.push(Card { joined, mtu });
        }
        let interfaces = cards.iter().map(|card| card.joined.interface.clone()).collect();
        let resolv_conf = mvm_net::resolv::find(namespace.path(), dns);
        Ok(Self { cards, interfaces, resolv_conf })
    }

    /// The machine's network devices, once.
    pub(crate) fn take_cards(&mut self) -> Vec<Card> {
        std::mem::take(&mut self.cards)
    }

    /// What the guest's files say.
    pub fn names(&self) -> Names {
        let addresses = self.interfaces.iter().flat_map(|i| &i.addresses).map(|a| a.ip);
        Names { addresses: addresses.collect(), resolv_conf: self.resolv_conf.clone() }
    }

    /// What a guest without an agent can be told.
    pub fn addresses(&self) -> Addresses {
        let lines = self.resolv_conf.as_deref().unwrap_or_default().lines();
        let mut servers = lines.filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
        });
        Addresses {
            interfaces: self.interfaces.iter().map(addressed).collect(),
            name_server: servers.next(),
        }
    }

    /// For those who look at the sandbox.
    pub fn summary(&self) -> Vec<Summary> {
        let summary = |interface: &Interface| Summary {
            name: interface.name.clone(),
            mac: interface.mac.map(|byte| format!("{byte:02x}")).join(":"),
            mtu: interface.mtu,
            addresses: interface
                .addresses
                .iter()
                .map(|address| format!("{}/{}", address.ip, address.prefix))
                .collect(),
        };
        self.interfaces.iter().map(summary).collect()
    }

    /// What the agent is told.
    pub(crate) fn messages(&self) -> Vec<NetworkInterface> {
        self.interfaces.iter().map(message).collect()
    }
}

/// What can be told of an interface: its first address of each family, and how the world is reached from there.
fn addressed(interface: &Interface) -> Addressed {
    Addressed { v4: given(interface, v4, 32), v6: given(interface, v6, 128) }
}

fn given<A>(interface: &Interface, family: fn(IpAddr) -> Option<A>, bits: u8) -> Option<Given<A>> {
    let mut addresses = interface.addresses.iter();
    let (ip, prefix) = addresses.find_map(|a| Some((family(a.ip)?, a.prefix)))?;
    let defaults = interface.routes.iter().filter(|route| route.destination.is_none());
    let gateways = defaults.filter_map(|r| Some((r.metric.unwrap_or(0), family(r.gateway?)?)));
    let gateway = gateways.min_by_key(|(metric, _)| *metric).map(|(_, gateway)| gateway);
    Some(Given { ip, prefix: prefix.min(bits), gateway })
}

fn v4(ip: IpAddr) -> Option<Ipv4Addr> {
    match ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    }
}

fn v6(ip: IpAddr) -> Option<Ipv6Addr> {
    match ip {
        IpAddr::V6(ip) => Some(ip),
        IpAddr::V4(_) => None,
    }
}

/// The usual directories, and those of the variables by which CNI's own tools are told.
fn places() -> Places {
    let mut places = Places::default();
    let list = |name| {
        let value = std::env::var_os(name).filter(|v| !v.is_empty());
        value.map(|v| std::env::split_paths(&v).collect::<Vec<_>>())
    };
    if let Some(dirs) = list("NETCONFPATH") {
        places.config_dirs = dirs;
    }
    if let Some(dirs) = list("CNI_PATH") {
        places.plugin_dirs = dirs;
    }
    places
}

fn message(interface: &Interface) -> NetworkInterface {
    let optional = |ip: Option<IpAddr>| ip.map(ip_bytes).unwrap_or_default();
    let addresses = interface.addresses.iter().map(|address| NetworkAddress {
        ip: ip_bytes(address.ip),
        prefix: address.prefix.into(),
        peer: optional(address.peer),
        no_prefix_route: address.no_prefix_route,
        ..Default::default()
    });
    let routes = interface.routes.iter().map(|route| NetworkRoute {
        ipv6: route.ipv6,
        destination: optional(route.destination.map(|(ip, _)| ip)),
        prefix: route.destination.map_or(0, |(_, prefix)| prefix.into()),
        gateway: optional(route.gateway),
        source: optional(route.source),
        metric: route.metric.unwrap_or(0),
        scope: route.scope.into(),
        on_link: route.on_link,
        mtu: route.mtu.unwrap_or(0),
        ..Default::default()
    });
    let neighbours = interface.neighbours.iter().map(|neighbour| NetworkNeighbour {
        ip: ip_bytes(neighbour.ip),
        mac: neighbour.mac.to_vec(),
        ..Default::default()
    });
    NetworkInterface {
        mac: interface.mac.to_vec(),
        name: interface.name.clone(),
        mtu: interface.mtu,
        addresses: addresses.collect(),
        routes: routes.collect(),
        neighbours: neighbours.collect(),
        ..Default::default()
    }
}

/// Undoes what was made for the network of the sandbox in `dir`, whose machine is gone. Nothing, or
/// what is gone already, is no error.
///
/// # Errors
/// The first; all is tried.
pub fn tear_down(dir: &Path) -> Result<(), Error> {
    let path = dir.join(FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::File { path, source }),
    };
    let record: Record = serde_json::from_slice(&bytes)
        .map_err(|e| Error::File { path: path.clone(), source: e.into() })?;
    let detached = match &record.attachment {
        Some(attachment) => attachment.delete().map_err(Error::from),
        None => Ok(()),
    };
    let cleared = match (&record.own, &record.identity) {
        (Some(own), _) => Namespace::remove(own),
        (None, Some(identity)) => match Namespace::open(&record.namespace) {
            Ok(namespace) if namespace.identity() == *identity => mvm_net::sweep(&namespace),
            // It is gone, and all that was in it.
            _ => Ok(()),
        },
        (None, None) => Ok(()),
    };
    detached?;
    cleared?;
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::File { path, source })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes_are_read_or_refused_by_name() {
        assert_eq!("none".parse::<Wish>().unwrap(), Wish::None);
        assert_eq!(
            "ns:/run/netns/a:b".parse::<Wish>().unwrap(),
            Wish::Namespace("/run/netns/a:b".into())
        );
        let cni = Wish::Cni { name: "web".into(), ports: Vec::new() };
        assert_eq!("cni:web".parse::<Wish>().unwrap(), cni);
        for bad in ["", "host", "bridge", "ns:", "cni:", "None"] {
            let error = bad.parse::<Wish>().unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }

    #[test]
    fn ports_are_read_as_docker_writes_them() {
        let read = |text: &str| {
            let p = port(text).unwrap();
            (p.host_ip, p.host_port, p.container_port, p.protocol)
        };
        assert_eq!(read("8080:80"), (String::new(), 8080, 80, "tcp".into()));
        assert_eq!(read("127.0.0.1:53:5353/udp"), ("127.0.0.1".into(), 53, 5353, "udp".into()));
        assert_eq!(read("[::1]:1:2"), ("::1".into(), 1, 2, "tcp".into()));
        for bad in ["80", "", ":80", "80:", "0:80", "80:99999", "x:80:80", "80:80/sctp"] {
            assert!(matches!(port(bad), Err(Error::Port(_))), "{bad}");
        }
        let list = ["1:2".to_owned()];
        assert!(matches!(Wish::None.publishing(&list), Err(Error::PortsWithoutCni)));
        assert_eq!(Wish::None.publishing(&[]).unwrap(), Wish::None);
    }

    #[test]
    fn nothing_to_undo_is_no_error_and_a_namespace_that_is_gone_neither() {
        let dir = tempfile::tempdir().unwrap();
        tear_down(dir.path()).unwrap();
        let namespace = Namespace::open(Path::new("/proc/self/ns/net")).unwrap();
        let identity = Some(namespace.identity());
        let record = Record { namespace: "/no/such".into(), identity, own: None, attachment: None };
        record.save(dir.path()).unwrap();
        tear_down(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        fs::write(dir.path().join(FILE), "junk").unwrap();
        assert!(tear_down(dir.path()).unwrap_err().to_string().contains(FILE));
    }
}
