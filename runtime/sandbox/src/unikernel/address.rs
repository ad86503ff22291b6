//! Telling a guest without an agent its address: parameters on its command line, as each kind expects
//! them.

use std::net::Ipv4Addr;

use super::Kind;

/// What a guest is told of its first network device. Of IPv6 none of the kinds is told anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Its address.
    pub ip: Ipv4Addr,
    /// Bits of its network, at most 32.
    pub prefix: u8,
    /// The default route's gateway.
    pub gateway: Option<Ipv4Addr>,
    /// The first name server.
    pub name_server: Option<Ipv4Addr>,
}

impl Address {
    fn mask(&self) -> Ipv4Addr {
        let host = u32::MAX.checked_shr(self.prefix.into()).unwrap_or(0);
        Ipv4Addr::from_bits(!host)
    }

    /// Whether the gateway is in the guest's own network, or there is none.
    fn gateway_is_near(&self) -> bool {
        let network = |ip: Ipv4Addr| ip.to_bits() & self.mask().to_bits();
        self.gateway.is_none_or(|gateway| network(gateway) == network(self.ip))
    }

    /// What cannot be said of it in the words of this kind.
    pub fn left_out(&self, kind: Kind) -> Option<String> {
        let gateway = self.gateway.filter(|_| kind == Kind::Linux && !self.gateway_is_near())?;
        let Self { ip, prefix, .. } = self;
        Some(format!(
            "the guest is not told its gateway {gateway}: it is outside of the network of {ip}/{prefix}, \
             and Linux takes no such one from its command line"
        ))
    }

    /// The parameters, each of which is one or two words; `None` if the kind knows none.
    fn parameters(&self, kind: Kind, old_unikraft: bool) -> Option<Vec<Vec<String>>> {
        let Self { ip, prefix, gateway, name_server } = *self;
        let mask = self.mask();
        let text = |ip: Option<Ipv4Addr>| ip.map(|ip| ip.to_string()).unwrap_or_default();
        let pair = |key: &str, value: Ipv4Addr| vec![key.to_owned(), value.to_string()];
        let mut all = Vec::new();
        match kind {
            // The library uknetdev took one parameter for each part before release 0.16.1.
            Kind::Unikraft if old_unikraft => {
                all.push(vec![format!("netdev.ipv4_addr={ip}")]);
                all.extend(gateway.map(|gw| vec![format!("netdev.ipv4_gw_addr={gw}")]));
                all.push(vec![format!("netdev.ipv4_subnet_mask={mask}")]);
            }
            Kind::Unikraft => {
                let list =
                    format!("netdev.ip={ip}/{prefix}:{}:{}", text(gateway), text(name_server));
                all.push(vec![list.trim_end_matches(':').to_owned()]);
            }
            // MirageOS' own parameters for its first device.
            Kind::Hvt => {
                all.push(vec![format!("--ipv4={ip}/{prefix}")]);
                all.extend(gateway.map(|gw| vec![format!("--ipv4-gateway={gw}")]));
            }
            Kind::Hermit => {
                all.extend([pair("-ip", ip), pair("-mask", mask)]);
                all.extend(gateway.map(|gw| pair("-gateway", gw)));
            }
            // Mewz' parameters, which are those of our own too.
            Kind::Rust => {
                all.push(vec![format!("ip={ip}/{prefix}")]);
                all.extend(gateway.map(|gw| vec![format!("gateway={gw}")]));
            }
            // Linux, Documentation/admin-guide/nfs/nfsroot.rst: client, server, gateway, mask, host,
            // device, method, name server.
            // A gateway elsewhere would have it give up the whole.
            Kind::Linux => {
                let gateway = gateway.filter(|_| self.gateway_is_near());
                let line = format!("ip={ip}::{}:{mask}:::off:{}", text(gateway), text(name_server));
                all.push(vec![line.trim_end_matches(':').to_owned()]);
            }
            // Nanos' parameters for its first device.
            Kind::Nanos => {
                all.push(vec![format!("en1.ipaddr={ip}")]);
                all.push(vec![format!("en1.netmask={mask}")]);
                all.extend(gateway.map(|gw| vec![format!("en1.gateway={gw}")]));
            }
            Kind::Rumprun | Kind::Multiboot => return None,
        }
        Some(all)
    }

    /// `cmdline`, which was made for `kind`, with the guest's address on it; `None` if the kind has no
    /// parameter for that. What the words say already is not said a second time.
    pub fn tell(&self, kind: Kind, old_unikraft: bool, cmdline: &str) -> Option<String> {
        if kind == Kind::Rumprun {
            return self.rumprun(cmdline);
        }
        let said = |parameter: &[String]| {
            let key = parameter[0].split_inclusive('=').next().unwrap_or_default();
            cmdline.split_whitespace().any(|word| match key.ends_with('=') {
                true => word.starts_with(key),
                false => word == key,
            })
        };
        let parameters = self.parameters(kind, old_unikraft)?;
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
        Some(parts.collect::<Vec<_>>().join(" "))
    }

    /// Rumprun's document (its doc/config.md) with a `net` in it; Solo5's device is `ukvmif0` there.
    fn rumprun(&self, cmdline: &str) -> Option<String> {
        let mut document: serde_json::Value = serde_json::from_str(cmdline).ok()?;
        let mut net = serde_json::json!({
            "if": "ukvmif0", "cloner": "True", "type": "inet", "method": "static",
            "addr": self.ip.to_string(), "mask": self.prefix.to_string(),
        });
        if let Some(gateway) = self.gateway {
            net["gw"] = gateway.to_string().into();
        }
        document.as_object_mut()?.insert("net".into(), net);
        Some(document.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: Address = Address {
        ip: Ipv4Addr::new(10, 0, 0, 2),
        prefix: 24,
        gateway: Some(Ipv4Addr::new(10, 0, 0, 1)),
        name_server: Some(Ipv4Addr::new(10, 0, 0, 53)),
    };
    const ALONE: Address = Address { gateway: None, name_server: None, ..FULL };

    #[test]
    fn every_kind_is_told_in_its_own_words() {
        for (kind, line, full, alone) in [
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
            assert_eq!(FULL.tell(kind, false, line).as_deref(), Some(full));
            assert_eq!(ALONE.tell(kind, false, line).as_deref(), Some(alone));
        }
        assert_eq!(
            FULL.tell(Kind::Unikraft, true, "app --").unwrap(),
            "app netdev.ipv4_addr=10.0.0.2 netdev.ipv4_gw_addr=10.0.0.1 \
             netdev.ipv4_subnet_mask=255.255.255.0 --"
        );
        assert_eq!(FULL.tell(Kind::Multiboot, false, "a"), None);
        let told = FULL.tell(Kind::Rumprun, false, r#"{"cmdline":"redis -v"}"#).unwrap();
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        assert_eq!(told["cmdline"], "redis -v");
        assert_eq!(
            (&told["net"]["addr"], &told["net"]["mask"]),
            (&"10.0.0.2".into(), &"24".into())
        );
        assert_eq!(told["net"]["gw"], "10.0.0.1");
    }

    #[test]
    fn the_users_own_words_are_not_contradicted() {
        let line = "--ipv4=192.168.0.7/16 a";
        assert_eq!(
            FULL.tell(Kind::Hvt, false, line).unwrap(),
            format!("--ipv4-gateway=10.0.0.1 {line}")
        );
        let line = "-ip 1.2.3.4 -mask 255.0.0.0 -gateway 1.1.1.1 -- a";
        assert_eq!(FULL.tell(Kind::Hermit, false, line).unwrap(), line);
    }

    #[test]
    fn a_gateway_elsewhere_is_told_to_those_who_take_it() {
        let gateway = Some(Ipv4Addr::new(169, 254, 1, 1));
        let far = Address { prefix: 32, gateway, name_server: None, ..FULL };
        let told = |kind| far.tell(kind, false, "a").unwrap();
        assert_eq!(told(Kind::Unikraft), "a netdev.ip=10.0.0.2/32:169.254.1.1");
        assert_eq!(told(Kind::Rust), "ip=10.0.0.2/32 gateway=169.254.1.1 a");
        assert_eq!(told(Kind::Linux), "ip=10.0.0.2:::255.255.255.255:::off a");
        assert_eq!(far.left_out(Kind::Rust), None);
        assert!(far.left_out(Kind::Linux).unwrap().contains("169.254.1.1"));
        assert_eq!(FULL.left_out(Kind::Linux), None);
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
            assert_eq!(Address { prefix, ..FULL }.mask().to_string(), mask);
        }
    }
}
