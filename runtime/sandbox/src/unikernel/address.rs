//! Telling a guest without an agent its addresses: parameters on its command line, as each kind expects
//! them.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{Dialect, Kind};

/// One address of an interface, and how the world is reached from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Given<A> {
    /// The address.
    pub ip: A,
    /// Bits of its network, at most as many as the address has.
    pub prefix: u8,
    /// The gateway of the default route by this interface.
    pub gateway: Option<A>,
}

/// What a guest can be told of one network device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Addressed {
    /// Its first address of IPv4.
    pub v4: Option<Given<Ipv4Addr>>,
    /// Its first address of IPv6 that is good beyond the link.
    pub v6: Option<Given<Ipv6Addr>>,
}

/// What a guest can be told of its network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Its network devices, in order.
    pub interfaces: Vec<Addressed>,
    /// The first name server.
    pub name_server: Option<Ipv4Addr>,
}

/// A command line that tells, and what it does not tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The command line.
    pub cmdline: String,
    /// What is there and the guest is not told, in sentences.
    pub left_out: Vec<String>,
}

/// Nanos' interfaces have names with one digit.
const NANOS_MAX: usize = 9;

impl Addressed {
    /// That a guest of this kind is not told its address.
    fn refused(&self, kind: Kind) -> Option<String> {
        let v4 = self.v4.map(|v4| format!("{}/{}", v4.ip, v4.prefix));
        let address = v4.or(self.v6.map(|v6| format!("{}/{}", v6.ip, v6.prefix)))?;
        Some(format!(
            "the guest is not told its address {address}: {kind} kernels have no word for it"
        ))
    }
}

impl Given<Ipv4Addr> {
    fn mask(&self) -> Ipv4Addr {
        let host = u32::MAX.checked_shr(self.prefix.into()).unwrap_or(0);
        Ipv4Addr::from_bits(!host)
    }

    /// Whether the gateway is in the guest's own network, or there is none.
    fn gateway_is_near(&self) -> bool {
        let network = |ip: Ipv4Addr| ip.to_bits() & self.mask().to_bits();
        self.gateway.is_none_or(|gateway| network(gateway) == network(self.ip))
    }

    /// Bits of a network that has the gateway in it as well.
    fn prefix_with_gateway(&self) -> u8 {
        let shared =
            |gateway: Ipv4Addr| (gateway.to_bits() ^ self.ip.to_bits()).leading_zeros() as u8;
        self.gateway.map_or(self.prefix, |gateway| self.prefix.min(shared(gateway)))
    }
}

/// A parameter: one or two words.
type Parameter = Vec<String>;

fn one(key: impl std::fmt::Display, value: impl std::fmt::Display) -> Parameter {
    vec![format!("{key}{value}")]
}

fn text<A: std::fmt::Display>(ip: Option<A>) -> String {
    ip.map(|ip| ip.to_string()).unwrap_or_default()
}

impl Addresses {
    /// `cmdline`, which was made for this kind of guest, with what it can be told of its addresses on it. What the
    /// words say already is not said a second time.
    pub fn tell(&self, dialect: &Dialect, cmdline: &str) -> Told {
        let mut left_out = Vec::new();
        if self.interfaces.iter().all(|i| *i == Addressed::default()) {
            left_out
                .push("the guest is not told an address: its network interfaces have none".into());
            return Told { cmdline: cmdline.to_owned(), left_out };
        }
        let cmdline = match dialect.kind {
            Kind::Rumprun => self.rumprun(cmdline, &mut left_out),
            Kind::Multiboot => {
                left_out.extend(self.interfaces.iter().find_map(|i| i.refused(dialect.kind)));
                cmdline.to_owned()
            }
            kind => put(kind, &self.parameters(dialect, &mut left_out), cmdline),
        };
        Told { cmdline, left_out }
    }

    fn parameters(&self, dialect: &Dialect, left_out: &mut Vec<String>) -> Vec<Parameter> {
        let kind = dialect.kind;
        let mut all = Vec::new();
        let mut told = 0;
        for (index, interface) in self.interfaces.iter().enumerate() {
            let many = match kind {
                // The parameter is a list whose places count.
                Kind::Unikraft => index == told && !(dialect.old_unikraft && index > 0),
                Kind::Nanos => index < NANOS_MAX,
                _ => index == 0,
            };
            let mut said = false;
            if let Some(v4) = interface.v4.filter(|_| many) {
                all.extend(self.v4(dialect, index, &v4, left_out));
                said = true;
            }
            if let Some(v6) = interface.v6.filter(|_| many) {
                let words = v6_parameters(dialect, index, &v6, interface.v4.is_none());
                // Who has IPv4 misses little.
                if words.is_empty() && interface.v4.is_none() {
                    left_out.extend(interface.refused(kind));
                }
                said |= !words.is_empty();
                all.extend(words);
            }
            told += usize::from(said);
        }
        if told < self.interfaces.iter().filter(|i| **i != Addressed::default()).count() {
            left_out.push(match told {
                0 if !left_out.is_empty() => return all,
                0 => {
                    "the guest is not told an address: its first network interface has none".into()
                }
                1 => "the guest is told of its first network interface alone".into(),
                n => format!("the guest is told of its first {n} network interfaces alone"),
            });
        }
        all
    }

    fn v4(
        &self,
        dialect: &Dialect,
        index: usize,
        address: &Given<Ipv4Addr>,
        left_out: &mut Vec<String>,
    ) -> Vec<Parameter> {
        let Given { ip, prefix, gateway } = *address;
        let mask = address.mask();
        let mut all = Vec::new();
        match dialect.kind {
            // The library uknetdev took one parameter for each part before release 0.16.1.
            Kind::Unikraft if dialect.old_unikraft => {
                all.push(one("netdev.ipv4_addr=", ip));
                all.extend(gateway.map(|gw| one("netdev.ipv4_gw_addr=", gw)));
                all.push(one("netdev.ipv4_subnet_mask=", mask));
            }
            // Once for each device, as kraft does it.
            Kind::Unikraft => {
                let list = format!("{ip}/{prefix}:{}:{}", text(gateway), text(self.name_server));
                all.push(one("netdev.ip=", list.trim_end_matches(':')));
            }
            // MirageOS' own parameters: those of a device other than `service` begin with its name.
            Kind::Hvt => {
                let group = dialect.mirage_group();
                all.push(one(format!("--{group}ipv4="), format!("{ip}/{prefix}")));
                all.extend(gateway.map(|gw| one(format!("--{group}ipv4-gateway="), gw)));
            }
            Kind::Hermit => {
                let pair = |key: &str, value: Ipv4Addr| vec![key.to_owned(), value.to_string()];
                all.extend([pair("-ip", ip), pair("-mask", mask)]);
                all.extend(gateway.map(|gw| pair("-gateway", gw)));
            }
            // Mewz' parameters, which are those of our own too.
            Kind::Rust => {
                all.push(one("ip=", format!("{ip}/{prefix}")));
                all.extend(gateway.map(|gw| one("gateway=", gw)));
            }
            // Linux, Documentation/admin-guide/nfs/nfsroot.rst: client, server, gateway, mask, host,
            // device, method, name server.
            // A gateway elsewhere would have it give up the whole.
            Kind::Linux => {
                let near = gateway.filter(|_| address.gateway_is_near());
                if let (None, Some(gateway)) = (near, gateway) {
                    left_out.push(format!(
                        "the guest is not told its gateway {gateway}: it is outside of the network of {ip}/{prefix}, \
                         and Linux takes no such one from its command line"
                    ));
                }
                let line = format!("{ip}::{}:{mask}:::off:{}", text(near), text(self.name_server));
                all.push(one("ip=", line.trim_end_matches(':')));
            }
            // Nanos' parameters (its `src/net/net.c`); the first device is `en1`.
            Kind::Nanos => {
                let name = format!("en{}", index + 1);
                all.push(one(format!("{name}.ipaddr="), ip));
                all.push(one(format!("{name}.netmask="), mask));
                all.extend(gateway.map(|gw| one(format!("{name}.gateway="), gw)));
            }
            Kind::Rumprun | Kind::Multiboot => {}
        }
        all
    }

    /// Rumprun's document (its `lib/librumprun_base/config.c`) with a `net` in it, of which it takes one; Solo5's device is
    /// `ukvmif0` there. A gateway must be in the interface's network there, so that the network is made as large as it
    /// takes.
    fn rumprun(&self, document: &str, left_out: &mut Vec<String>) -> String {
        let first = self.interfaces.first().copied().unwrap_or_default();
        let (family, ip, prefix, gateway) = match (first.v4, first.v6) {
            (Some(v4), _) => (
                "inet",
                v4.ip.to_string(),
                v4.prefix_with_gateway(),
                v4.gateway.map(|gw| gw.to_string()),
            ),
            (None, Some(v6)) => {
                ("inet6", v6.ip.to_string(), v6.prefix, v6.gateway.map(|gw| gw.to_string()))
            }
            (None, None) => {
                left_out.push(
                    "the guest is not told an address: its first network interface has none".into(),
                );
                return document.to_owned();
            }
        };
        if self.interfaces.len() > 1 {
            left_out.push("the guest is told of its first network interface alone".into());
        }
        let mut net = serde_json::json!({
            "if": "ukvmif0", "cloner": "True", "type": family, "method": "static",
            "addr": ip, "mask": prefix.to_string(),
        });
        if let Some(gateway) = gateway {
            net["gw"] = gateway.into();
        }
        // By text: it is not quite JSON, in which no key is there twice.
        match document.strip_suffix('}') {
            Some(rest) => format!("{rest},\"net\":{net}}}"),
            None => document.to_owned(),
        }
    }
}

/// The parameters for an address of IPv6, if the kind has some. `only` if there is none of IPv4.
fn v6_parameters(
    dialect: &Dialect,
    index: usize,
    address: &Given<Ipv6Addr>,
    only: bool,
) -> Vec<Parameter> {
    let Given { ip, prefix, gateway } = *address;
    match dialect.kind {
        // A guest that knows no such option ends when it sees one.
        Kind::Hvt if dialect.ipv6 || only => {
            let group = dialect.mirage_group();
            let mut all = vec![one(format!("--{group}ipv6="), format!("{ip}/{prefix}"))];
            all.extend(gateway.map(|gw| one(format!("--{group}ipv6-gateway="), gw)));
            all
        }
        // Routers tell it the rest.
        Kind::Nanos => vec![one(format!("en{}.ip6addr=", index + 1), ip)],
        _ => Vec::new(),
    }
}

/// Puts parameters on a command line, but for those that are there.
fn put(kind: Kind, parameters: &[Parameter], cmdline: &str) -> String {
    let said = |parameter: &Parameter| {
        let key = parameter[0].split_inclusive('=').next().unwrap_or_default();
        cmdline.split_whitespace().any(|word| match key.ends_with('=') {
            true => word.starts_with(key),
            false => word == key,
        })
    };
    let mut words: Vec<&str> = Vec::new();
    for parameter in parameters.iter().filter(|parameter| !said(parameter)) {
        words.extend(parameter.iter().map(String::as_str));
    }
    // Unikraft's first word is its name; whatever follows may be quoted and is not looked into.
    let (name, rest) = match kind {
        Kind::Unikraft => cmdline.split_once(' ').unwrap_or((cmdline, "")),
        _ => ("", cmdline),
    };
    let words = words.join(" ");
    let parts = [name, &words, rest].into_iter().filter(|part| !part.is_empty());
    parts.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: Given<Ipv4Addr> = Given {
        ip: Ipv4Addr::new(10, 0, 0, 2),
        prefix: 24,
        gateway: Some(Ipv4Addr::new(10, 0, 0, 1)),
    };
    const SIX: Given<Ipv6Addr> = Given {
        ip: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2),
        prefix: 64,
        gateway: Some(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1)),
    };
    const SERVER: Option<Ipv4Addr> = Some(Ipv4Addr::new(10, 0, 0, 53));

    fn of(interfaces: &[Addressed], name_server: Option<Ipv4Addr>) -> Addresses {
        Addresses { interfaces: interfaces.to_vec(), name_server }
    }

    fn v4(v4: Given<Ipv4Addr>) -> Addressed {
        Addressed { v4: Some(v4), v6: None }
    }

    fn tell(addresses: &Addresses, kind: Kind, line: &str) -> String {
        let told = addresses.tell(&kind.into(), line);
        assert!(told.left_out.is_empty(), "{:?}", told.left_out);
        told.cmdline
    }

    #[test]
    fn every_kind_is_told_in_its_own_words() {
        let full = of(&[v4(FULL)], SERVER);
        let alone = of(&[v4(Given { gateway: None, ..FULL })], None);
        for (kind, line, with_all, with_little) in [
            (Kind::Rust, "a", "ip=10.0.0.2/24 gateway=10.0.0.1 a", "ip=10.0.0.2/24 a"),
            (Kind::Rust, "", "ip=10.0.0.2/24 gateway=10.0.0.1", "ip=10.0.0.2/24"),
            (
                Kind::Unikraft,
                "app env.vars=[ \"A=x -- y\" ] -- b",
                "app netdev.ip=10.0.0.2/24:10.0.0.1:10.0.0.53 env.vars=[ \"A=x -- y\" ] -- b",
                "app netdev.ip=10.0.0.2/24 env.vars=[ \"A=x -- y\" ] -- b",
            ),
            (
                Kind::Hermit,
                "-- a",
                "-ip 10.0.0.2 -mask 255.255.255.0 -gateway 10.0.0.1 -- a",
                "-ip 10.0.0.2 -mask 255.255.255.0 -- a",
            ),
            (
                Kind::Hvt,
                "a",
                "--ipv4=10.0.0.2/24 --ipv4-gateway=10.0.0.1 a",
                "--ipv4=10.0.0.2/24 a",
            ),
            (
                Kind::Nanos,
                "",
                "en1.ipaddr=10.0.0.2 en1.netmask=255.255.255.0 en1.gateway=10.0.0.1",
                "en1.ipaddr=10.0.0.2 en1.netmask=255.255.255.0",
            ),
            (
                Kind::Linux,
                "quiet",
                "ip=10.0.0.2::10.0.0.1:255.255.255.0:::off:10.0.0.53 quiet",
                "ip=10.0.0.2:::255.255.255.0:::off quiet",
            ),
        ] {
            assert_eq!(tell(&full, kind, line), with_all);
            assert_eq!(tell(&alone, kind, line), with_little);
        }
        let old = Dialect { old_unikraft: true, ..Kind::Unikraft.into() };
        assert_eq!(
            full.tell(&old, "app --").cmdline,
            "app netdev.ipv4_addr=10.0.0.2 netdev.ipv4_gw_addr=10.0.0.1 \
             netdev.ipv4_subnet_mask=255.255.255.0 --"
        );
        let named = Dialect { solo5_net: Some("management".into()), ..Kind::Hvt.into() };
        assert_eq!(
            full.tell(&named, "a").cmdline,
            "--management-ipv4=10.0.0.2/24 --management-ipv4-gateway=10.0.0.1 a"
        );
        let untold = full.tell(&Kind::Multiboot.into(), "a");
        assert_eq!(untold.cmdline, "a");
        assert!(untold.left_out[0].contains("not told its address 10.0.0.2/24"), "{untold:?}");
        let nothing = of(&[Addressed::default()], SERVER).tell(&Kind::Rust.into(), "a");
        assert_eq!((nothing.cmdline.as_str(), nothing.left_out.len()), ("a", 1));
    }

    #[test]
    fn rumprun_is_told_in_its_document() {
        let line = r#"{"cmdline":"redis -v","env":"A=1","env":"B=2"}"#;
        let told = tell(&of(&[v4(FULL)], None), Kind::Rumprun, line);
        assert!(
            told.starts_with(r#"{"cmdline":"redis -v","env":"A=1","env":"B=2","net":{"#),
            "{told}"
        );
        let net = |addresses: &Addresses| {
            let told = addresses.tell(&Kind::Rumprun.into(), r#"{"cmdline":"x"}"#);
            let document: serde_json::Value = serde_json::from_str(&told.cmdline).unwrap();
            (document["net"].clone(), told.left_out.len())
        };
        let expected = serde_json::json!({
            "if": "ukvmif0", "cloner": "True", "type": "inet", "method": "static",
            "addr": "10.0.0.2", "mask": "24", "gw": "10.0.0.1",
        });
        assert_eq!(net(&of(&[v4(FULL)], None)), (expected, 0));
        // Its network takes the gateway in, or the interface would have none.
        let far = Given { prefix: 32, gateway: Some(Ipv4Addr::new(10, 0, 1, 1)), ..FULL };
        assert_eq!(net(&of(&[v4(far)], None)).0["mask"], "23");
        let (six, left) = net(&of(&[Addressed { v4: None, v6: Some(SIX) }], None));
        assert_eq!(
            (&six["type"], &six["addr"], &six["mask"], &six["gw"], left),
            (&"inet6".into(), &"fd00::2".into(), &"64".into(), &"fd00::1".into(), 0)
        );
        let both = Addressed { v4: Some(FULL), v6: Some(SIX) };
        let (inet, left) = net(&of(&[both, v4(FULL)], None));
        assert_eq!((&inet["type"], left), (&"inet".into(), 1));
    }

    #[test]
    fn further_interfaces_are_told_to_those_who_can_be() {
        let second = Given { ip: Ipv4Addr::new(10, 1, 0, 2), prefix: 16, gateway: None };
        let two = of(&[v4(FULL), v4(second)], SERVER);
        assert_eq!(
            tell(&two, Kind::Unikraft, "app --"),
            "app netdev.ip=10.0.0.2/24:10.0.0.1:10.0.0.53 netdev.ip=10.1.0.2/16::10.0.0.53 --"
        );
        assert_eq!(
            tell(&two, Kind::Nanos, "a"),
            "en1.ipaddr=10.0.0.2 en1.netmask=255.255.255.0 en1.gateway=10.0.0.1 \
             en2.ipaddr=10.1.0.2 en2.netmask=255.255.0.0 a"
        );
        for kind in [Kind::Rust, Kind::Hermit, Kind::Linux, Kind::Hvt] {
            let told = two.tell(&kind.into(), "");
            assert!(!told.cmdline.contains("10.1.0.2"), "{}", told.cmdline);
            assert_eq!(told.left_out, ["the guest is told of its first network interface alone"]);
        }
        let old = Dialect { old_unikraft: true, ..Kind::Unikraft.into() };
        assert_eq!(two.tell(&old, "app").left_out.len(), 1);
        // A place in the list cannot be left empty; names can be left out.
        let gap = of(&[v4(FULL), Addressed::default(), v4(second)], None);
        let told = gap.tell(&Kind::Unikraft.into(), "app --");
        assert_eq!((told.cmdline.matches("netdev.ip=").count(), told.left_out.len()), (1, 1));
        assert!(tell(&gap, Kind::Nanos, "").contains("en3.ipaddr=10.1.0.2"));
        let many = of(&[v4(second); 11], None).tell(&Kind::Nanos.into(), "");
        assert!(many.cmdline.contains("en9.") && !many.cmdline.contains("en10."));
        assert_eq!(many.left_out, ["the guest is told of its first 9 network interfaces alone"]);
    }

    #[test]
    fn ipv6_is_told_to_those_who_know_it() {
        let both = of(&[Addressed { v4: Some(FULL), v6: Some(SIX) }], None);
        let only = of(&[Addressed { v4: None, v6: Some(SIX) }], None);
        let modern = Dialect { ipv6: true, ..Kind::Hvt.into() };
        let four = "--ipv4=10.0.0.2/24 --ipv4-gateway=10.0.0.1";
        let six = "--ipv6=fd00::2/64 --ipv6-gateway=fd00::1";
        assert_eq!(both.tell(&modern, "a").cmdline, format!("{four} {six} a"));
        assert_eq!(tell(&both, Kind::Hvt, "a"), format!("{four} a"));
        assert_eq!(tell(&only, Kind::Hvt, "a"), format!("{six} a"));
        assert!(tell(&both, Kind::Nanos, "").ends_with("en1.gateway=10.0.0.1 en1.ip6addr=fd00::2"));
        for kind in [Kind::Rust, Kind::Unikraft, Kind::Hermit, Kind::Linux] {
            let told = only.tell(&kind.into(), "a");
            assert_eq!(told.cmdline, "a", "{kind}");
            assert!(told.left_out[0].contains("fd00::2/64"), "{:?}", told.left_out);
        }
    }

    #[test]
    fn the_users_own_words_are_not_contradicted() {
        let full = of(&[v4(FULL)], SERVER);
        let line = "--ipv4=192.168.0.7/16 a";
        assert_eq!(tell(&full, Kind::Hvt, line), format!("--ipv4-gateway=10.0.0.1 {line}"));
        let line = "-ip 1.2.3.4 -mask 255.0.0.0 -gateway 1.1.1.1 -- a";
        assert_eq!(tell(&full, Kind::Hermit, line), line);
    }

    #[test]
    fn a_gateway_elsewhere_is_told_to_those_who_take_it() {
        let gateway = Some(Ipv4Addr::new(169, 254, 1, 1));
        let far = of(&[v4(Given { prefix: 32, gateway, ..FULL })], None);
        assert_eq!(tell(&far, Kind::Unikraft, "a"), "a netdev.ip=10.0.0.2/32:169.254.1.1");
        assert_eq!(tell(&far, Kind::Rust, "a"), "ip=10.0.0.2/32 gateway=169.254.1.1 a");
        let linux = far.tell(&Kind::Linux.into(), "a");
        assert_eq!(linux.cmdline, "ip=10.0.0.2:::255.255.255.255:::off a");
        assert!(linux.left_out[0].contains("169.254.1.1"));
    }

    #[test]
    fn masks_are_those_of_their_prefixes() {
        for (prefix, mask) in [
            (0, "0.0.0.0"),
            (1, "128.0.0.0"),
            (24, "255.255.255.0"),
            (31, "255.255.255.254"),
            (32, "255.255.255.255"),
        ] {
            assert_eq!(Given { prefix, ..FULL }.mask().to_string(), mask);
        }
    }
}
