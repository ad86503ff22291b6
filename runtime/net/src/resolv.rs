//! Name servers: what the guest's `/etc/resolv.conf` says.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::{Namespace, cni};

/// Longest file that is taken.
const MAX: usize = 64 << 10;

/// What the guest's `/etc/resolv.conf` says, from what a plugin told, or else from what holds in the
/// namespace at `namespace`: `/etc/netns/NAME/resolv.conf` (`ip-netns(8)`), or the host's own.
///
/// Name servers on the host's loopback are left out, as the guest cannot reach them; `None` if
/// nothing remains.
pub fn find(namespace: &Path, dns: Option<&cni::Dns>) -> Option<String> {
    if let Some(dns) = dns.filter(|dns| !dns.nameservers.is_empty()) {
        return Some(dns.resolv_conf());
    }
    let mut files: Vec<PathBuf> = Vec::new();
    for directory in [Namespace::DIRECTORY, "/var/run/netns"] {
        if let Ok(name) = namespace.strip_prefix(directory) {
            files.push(Path::new("/etc/netns").join(name).join("resolv.conf"));
        }
    }
    // The second is where systemd-resolved, which listens on loopback, names its own servers.
    files.extend(["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"].map(PathBuf::from));
    files.iter().find_map(|file| {
        let text = fs::read(file).ok().filter(|bytes| bytes.len() <= MAX)?;
        usable(&String::from_utf8_lossy(&text))
    })
}

/// The lines without servers on loopback; `None` if there is no server.
fn usable(text: &str) -> Option<String> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next().unwrap_or_default().to_owned())
    };
    // A scope names an interface, which the guest may not have.
    let reachable = |address: &str| match address.split('%').next().unwrap_or_default().parse() {
        Ok(IpAddr::V4(ip)) => !ip.is_loopback(),
        Ok(IpAddr::V6(ip)) => !ip.is_loopback(),
        Err(_) => false,
    };
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| server(line).is_none_or(|address| reachable(&address)))
        .collect();
    let any = lines.iter().any(|line| server(line).is_some());
    any.then(|| lines.iter().map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_on_loopback_are_left_out() {
        let text = "# c\nnameserver 127.0.0.53\nsearch a b\nnameserver 10.0.0.1\nnameserver ::1\n";
        assert_eq!(usable(text).as_deref(), Some("# c\nsearch a b\nnameserver 10.0.0.1\n"));
        assert_eq!(usable("nameserver 127.0.0.1\nnameserver nonsense\n"), None);
        assert_eq!(usable(""), None);
    }

    #[test]
    fn what_a_plugin_says_comes_first() {
        let dns = cni::Dns {
            nameservers: vec!["10.1.1.1".into()],
            search: vec!["x.test".into(), "y.test".into()],
            options: vec!["ndots:2".into()],
            ..cni::Dns::default()
        };
        let text = find(Path::new("/run/netns/none"), Some(&dns)).unwrap();
        assert_eq!(text, "nameserver 10.1.1.1\nsearch x.test y.test\noptions ndots:2\n");
    }
}
