//! Joining in namespaces of the tests' own, as root.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use mvm_net::{Error, Interface, Namespace, join, sweep};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Two namespaces with a cable between them: `eth0` in the one, `peer0` in the other.
struct Cable {
    names: [String; 2],
    pod: Namespace,
    #[allow(dead_code, reason = "it keeps the namespace")]
    peer: Namespace,
}

const MAC: [u8; 6] = [2, 0, 0, 0, 0x89, 2];

impl Cable {
    /// `None`, with a word on standard error, where namespaces cannot be made.
    fn new(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: network namespaces need root");
            return None;
        }
        let names = ["a", "b"].map(|end| format!("mvmtest-{}-{test}-{end}", std::process::id()));
        let [pod, peer] = names.each_ref().map(|name| match Namespace::create(name) {
            Ok(namespace) => namespace,
            Err(e) => panic!("{e}"),
        });
        let cable = Self { names, pod, peer };
        cable.ip(0, "link add eth0 address 02:00:00:00:89:02 mtu 1400 type veth peer name peer0");
        cable.ip(0, &format!("link set peer0 netns {}", cable.names[1]));
        cable.ip(0, "link set lo up");
        cable.ip(0, "addr add 10.89.0.2/24 dev eth0");
        cable.ip(0, "addr add fd00:89::2/64 dev eth0 nodad");
        cable.ip(0, "link set eth0 up");
        cable.ip(1, "addr add 10.89.0.1/24 dev peer0");
        cable.ip(1, "link set peer0 up mtu 1400");
        cable.ip(0, "route add 10.90.0.0/16 via 10.89.0.7 metric 7");
        cable.ip(0, "route add default via 10.89.0.1");
        cable.ip(0, "-6 route add default via fd00:89::1");
        cable.ip(0, "neigh add 10.89.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent");
        Some(cable)
    }

    fn run(&self, end: usize, program: &str, arguments: &str) -> String {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[end], program]);
        let out = command.args(arguments.split_whitespace()).output().expect("iproute2");
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{program} {arguments}: {error}");
        String::from_utf8(out.stdout).unwrap()
    }

    fn ip(&self, end: usize, arguments: &str) -> String {
        self.run(end, "ip", arguments)
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for name in &self.names {
            let removed = Namespace::remove(name);
            if !std::thread::panicking() {
                removed.unwrap();
            }
        }
    }
}

#[test]
fn what_somebody_gave_an_interface_is_found() {
    let Some(cable) = Cable::new("list") else { return };
    let all = Interface::list(&mut cable.pod.socket().unwrap()).unwrap();
    let [eth0] = &all[..] else { panic!("{all:?}") };
    assert_eq!((eth0.name.as_str(), eth0.mac, eth0.mtu), ("eth0", MAC, 1400));
    let addresses: Vec<_> =
        eth0.addresses.iter().map(|a| format!("{}/{}", a.ip, a.prefix)).collect();
    assert_eq!(addresses, ["10.89.0.2/24", "fd00:89::2/64"], "no link-local ones");
    let routes: Vec<_> = eth0
        .routes
        .iter()
        .map(|r| {
            let to = r.destination.map(|(ip, bits)| format!("{ip}/{bits}"));
            (to.unwrap_or_default(), r.gateway.unwrap().to_string())
        })
        .collect();
    let want = [("10.90.0.0/16", "10.89.0.7"), ("", "10.89.0.1"), ("", "fd00:89::1")];
    assert_eq!(routes, want.map(|(to, by)| (to.to_owned(), by.to_owned())));
    assert_eq!(eth0.routes[0].metric, Some(7));
    assert_eq!(eth0.neighbours.len(), 1);
    assert_eq!(eth0.neighbours[0].ip.to_string(), "10.89.0.9");
}

/// A header without offloads, and an ARP request for 10.89.0.1 (RFC 826).
fn arp_request() -> Vec<u8> {
    let mut packet = vec![0; 10];
    packet.extend([0xff; 6]);
    packet.extend(MAC);
    packet.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    packet.extend(MAC);
    packet.extend([10, 89, 0, 2, 0, 0, 0, 0, 0, 0, 10, 89, 0, 1]);
    packet
}

/// Reads packets until one is an ARP reply to us.
fn wait_for_reply(tap: &OwnedFd) {
    let mut file = File::from(tap.try_clone().unwrap());
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut packet = [0; 2000];
    while Instant::now() < deadline {
        let mut wait = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        if poll(&mut wait, PollTimeout::from(1000u16)).unwrap() == 0 {
            // Packets may get lost.
            file.write_all(&arp_request()).unwrap();
            continue;
        }
        let len = file.read(&mut packet).unwrap();
        let frame = &packet[10..len];
        if frame[..6] == MAC && frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
            return;
        }
    }
    panic!("no answer came");
}

#[test]
fn packets_go_both_ways_and_nothing_stays() {
    let Some(cable) = Cable::new("join") else { return };
    let joined = join(&cable.pod, 1).unwrap();
    assert_eq!((joined.len(), joined[0].queues.len()), (1, 1));
    assert_eq!(joined[0].interface.name, "eth0");
    assert!(cable.ip(0, "link show").contains("mvm0"));
    assert!(cable.ip(0, "link show mvm0").contains("mtu 1400"));
    wait_for_reply(&joined[0].queues[0]);

    let again = join(&cable.pod, 1).unwrap_err();
    assert!(matches!(&again, Error::InUse { name, .. } if name == "eth0"), "{again}");
    sweep(&cable.pod).unwrap();
    wait_for_reply(&joined[0].queues[0]);

    drop(joined);
    assert!(!cable.ip(0, "link show").contains("mvm0"), "it goes with its descriptors");
    assert!(cable.run(0, "tc", "qdisc show dev eth0").contains("ingress"));
    sweep(&cable.pod).unwrap();
    assert!(!cable.run(0, "tc", "qdisc show dev eth0").contains("ingress"));
    sweep(&cable.pod).unwrap();
}

#[test]
fn what_a_killed_machine_left_does_not_hinder_the_next() {
    let Some(cable) = Cable::new("left") else { return };
    drop(join(&cable.pod, 2).unwrap());
    let joined = join(&cable.pod, 2).unwrap();
    assert_eq!(joined[0].queues.len(), 2);
    drop(joined);
}

#[test]
fn filters_of_others_are_respected() {
    let Some(cable) = Cable::new("foreign") else { return };
    cable.run(0, "tc", "qdisc add dev eth0 ingress");
    cable.run(
        0,
        "tc",
        "filter add dev eth0 parent ffff: protocol ip prio 5 u32 match u32 0 0 flowid 1:1",
    );
    let refused = join(&cable.pod, 1).unwrap_err();
    assert!(matches!(refused, Error::Foreign { .. }), "{refused}");
    sweep(&cable.pod).unwrap();
    assert!(cable.run(0, "tc", "filter show dev eth0 parent ffff:").contains("u32"));
    assert!(!cable.ip(0, "link show").contains("mvm0"), "nothing is left");
}

#[test]
fn namespaces_that_cannot_be_used_are_told() {
    let open = |path: &str| Namespace::open(Path::new(path)).unwrap_err().to_string();
    assert!(open("/no/such").contains("/no/such"));
    assert!(open("/etc/passwd").contains("no network namespace"));
    assert!(open("/proc/self/ns/uts").contains("no network namespace"));
    let Some(cable) = Cable::new("empty") else { return };
    cable.ip(0, "link del eth0");
    let refused = join(&cable.pod, 1).unwrap_err();
    assert!(matches!(refused, Error::NoInterface { .. }), "{refused}");
    let name = &cable.names[0];
    assert!(Namespace::create(name).unwrap_err().to_string().contains(name.as_str()));
    assert_eq!(
        Namespace::open(&Path::new(Namespace::DIRECTORY).join(name)).unwrap().identity(),
        cable.pod.identity()
    );
}
