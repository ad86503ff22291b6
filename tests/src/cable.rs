//! A network for one guest: two namespaces with a cable between them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mvm_net::Namespace;

/// Two namespaces with a cable between them: `eth0` in the one for the guest, `peer0` in the other. They have
/// 10.89.0.2/24 and 10.89.0.1/24, and fd00:89::2/64 and fd00:89::1/64. Both go when this is dropped.
#[derive(Debug)]
pub struct Cable {
    names: [String; 2],
}

impl Cable {
    /// A cable for the test of this name.
    ///
    /// # Panics
    /// Without privilege.
    #[must_use]
    pub fn new(test: &str) -> Self {
        let names = ["a", "b"].map(|end| format!("mvme2e-{}-{test}-{end}", std::process::id()));
        for name in &names {
            Namespace::create(name).expect("a network namespace; this needs root");
        }
        let cable = Self { names };
        cable.ip(0, "link add eth0 mtu 1400 type veth peer name peer0 mtu 1400");
        cable.ip(0, &format!("link set peer0 netns {}", cable.names[1]));
        for (end, device, host) in [(0, "eth0", 2), (1, "peer0", 1)] {
            cable.ip(end, "link set lo up");
            cable.ip(end, &format!("addr add 10.89.0.{host}/24 dev {device}"));
            cable.ip(end, &format!("addr add fd00:89::{host}/64 dev {device} nodad"));
            cable.ip(end, &format!("link set {device} up"));
        }
        cable.ip(1, "addr add 10.91.0.1/32 dev lo");
        cable.ip(0, "route add default via 10.89.0.1");
        cable.ip(0, "-6 route add default via fd00:89::1");
        cable
    }

    /// The name of the namespace at this end: 0 for the guest's, 1 for the other.
    pub fn name(&self, end: usize) -> &str {
        &self.names[end]
    }

    /// Its file.
    pub fn path(&self, end: usize) -> PathBuf {
        Path::new(Namespace::DIRECTORY).join(&self.names[end])
    }

    /// What `--network` takes.
    pub fn network(&self) -> String {
        format!("ns:{}", self.path(0).display())
    }

    /// What a program of the host's says in the namespace of this end.
    ///
    /// # Panics
    /// If it fails.
    pub fn run(&self, end: usize, program: &str, arguments: &str) -> String {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[end], program]);
        let out = command.args(arguments.split_whitespace()).output().expect("iproute2");
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{program} {arguments}: {error}");
        String::from_utf8(out.stdout).unwrap()
    }

    /// `ip` of iproute2 there.
    ///
    /// # Panics
    /// If it fails.
    pub fn ip(&self, end: usize, arguments: &str) -> String {
        self.run(end, "ip", arguments)
    }

    /// A socket at the guest's peer.
    ///
    /// # Panics
    /// If it cannot be had.
    pub fn at_peer<R: Send>(&self, make: impl FnOnce() -> std::io::Result<R> + Send) -> R {
        Namespace::open(&self.path(1)).unwrap().enter(make).unwrap().expect("a socket")
    }

    /// Checks that the guest's interface is as it was before.
    ///
    /// # Panics
    /// If it is not.
    #[track_caller]
    pub fn nothing_is_left(&self) {
        let links = self.ip(0, "-o link show");
        assert!(!links.contains("mvm0"), "{links}");
        let disciplines = self.run(0, "tc", "qdisc show dev eth0");
        assert!(!disciplines.contains("ingress"), "{disciplines}");
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Namespace::remove(name);
            let _ = fs::remove_dir_all(Path::new("/etc/netns").join(name));
        }
    }
}
