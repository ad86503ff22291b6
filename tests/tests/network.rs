//! `mvm run --network`: namespaces made by the tests, and CNI's plugins where they are installed.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mvm_net::Namespace;
use mvm_tests::{Cable, Finished, Running, World, engine, run_with};
use mvm_vmm::testing::ElfBuilder;
use nix::sys::signal::{Signal, kill};

/// Longer than anything that is not stuck takes.
const PATIENCE: Duration = Duration::from_secs(240);

/// Runs a script in a container of busybox at the cable.
#[track_caller]
fn sh(cable: &Cable, script: &str) -> Finished {
    let network = cable.network();
    World::small().mvm(&["run", "--rm", "--network", &network, "busybox", "sh", "-ec", script])
}

#[test]
fn without_a_network_there_is_loopback_alone() {
    let run = World::small()
        .mvm(&[
            "run",
            "--rm",
            "--network",
            "none",
            "busybox",
            "sh",
            "-c",
            "ls /sys/class/net; ip route",
        ])
        .expect_code(0);
    assert!(!run.out().contains("eth0"), "{}", run.out());
    assert!(run.out().lines().any(|line| line == "lo"), "{}", run.out());
    assert!(!run.out().contains(" via "), "{}", run.out());
}

#[test]
fn the_guest_has_what_the_interface_has() {
    let cable = Cable::new("has");
    let netns = Path::new("/etc/netns").join(cable.name(0));
    fs::create_dir_all(&netns).unwrap();
    fs::write(netns.join("resolv.conf"), "nameserver 127.0.0.1\nnameserver 10.89.0.1\n").unwrap();
    // A server for one question: UDP, by the name server that was handed down.
    let socket = cable.at_peer(|| UdpSocket::bind("10.89.0.1:53"));
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut question) {
            // RFC 1035, 4.1: the question again, and for an address (type 1) one answer.
            let wants_v4 = question[len - 4..len] == [0, 1, 0, 1];
            let mut answer = question[..len].to_vec();
            answer[2..4].copy_from_slice(&[0x81, 0x80]);
            answer[7] = u8::from(wants_v4);
            if wants_v4 {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 1, 2, 3]);
            }
            socket.send_to(&answer, from).unwrap();
        }
    });
    let script = "
        ip addr show eth0; echo MTU $(cat /sys/class/net/eth0/mtu)
        echo MAC $(cat /sys/class/net/eth0/address)
        ip route; ip -6 route; cat /etc/resolv.conf /etc/hosts
        ping -c 2 -W 60 10.89.0.1; ping -c 1 -W 60 10.91.0.1; ping6 -c 2 -W 60 fd00:89::1
        ping -c 1 -W 60 -s 20000 10.89.0.1
        nslookup host.test. || true";
    let out = sh(&cable, script).expect_code(0).out();
    let mac = cable.run(0, "cat", "/sys/class/net/eth0/address");
    for want in [
        "inet 10.89.0.2/24",
        "inet6 fd00:89::2/64",
        "MTU 1400",
        &format!("MAC {mac}"),
        "default via 10.89.0.1",
        "default via fd00:89::1",
        "nameserver 10.89.0.1\n",
        "10.89.0.2\t",
        "2 packets transmitted, 2 packets received",
        "20008 bytes from 10.89.0.1",
        "10.1.2.3",
    ] {
        assert!(out.contains(want), "no {want:?} in\n{out}");
    }
    assert!(!out.contains("127.0.0.1\n") && !out.contains("127.0.1.1"), "{out}");
    cable.nothing_is_left();
}

/// Sends everything back that comes by the next connection.
fn echo(listener: TcpListener) -> JoinHandle<()> {
    thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let (mut from, mut to) = (stream.try_clone().unwrap(), stream);
        std::io::copy(&mut from, &mut to).expect("both ways");
        to.shutdown(std::net::Shutdown::Write).unwrap();
    })
}

#[test]
fn megabytes_go_both_ways_unchanged() {
    let cable = Cable::new("bulk");
    for (address, at) in
        [("10.89.0.1:5000", "10.89.0.1 5000"), ("[fd00:89::1]:5000", "fd00:89::1 5000")]
    {
        let echo = echo(cable.at_peer(|| TcpListener::bind(address)));
        let script = format!(
            "dd if=/dev/urandom of=/tmp/sent bs=65536 count=96 2>/dev/null
             nc {at} < /tmp/sent > /tmp/got
             cmp /tmp/sent /tmp/got && echo same $(wc -c < /tmp/got)"
        );
        assert_eq!(sh(&cable, &script).expect_code(0).out(), "same 6291456\n", "{at}");
        echo.join().unwrap();
    }
    cable.nothing_is_left();
}

#[test]
fn the_guest_is_reached_from_outside() {
    let cable = Cable::new("serve");
    let script = "echo ready; nc -l -p 7000 > /tmp/got; sha256sum < /tmp/got";
    let network = cable.network();
    let world = World::small();
    let args = ["run", "--rm", "--network", &network, "busybox", "sh", "-c", script];
    let mut guest = Running::start(world.command(&args));
    guest.wait_for("ready");
    let sent: Vec<u8> =
        (0..4u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let start = Instant::now();
    let mut stream = loop {
        // It does not say when it listens.
        let address = "10.89.0.2:7000".parse().unwrap();
        let namespace = Namespace::open(&cable.path(1)).unwrap();
        match namespace.enter(|| TcpStream::connect_timeout(&address, PATIENCE)).unwrap() {
            Ok(stream) => break stream,
            Err(e) => assert!(start.elapsed() < PATIENCE, "nobody listens: {e}"),
        }
        thread::sleep(Duration::from_millis(50));
    };
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&sent).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = stream.read_to_end(&mut rest);
    let done = guest.finish().expect_code(0);
    let digest = run_with(Command::new("sha256sum"), &sent, PATIENCE).expect_code(0).out();
    assert!(done.out().contains(&digest), "{} instead of {digest}", done.out());
    cable.nothing_is_left();
}

#[test]
fn a_namespace_serves_one_machine_at_a_time_and_survives_kills() {
    let cable = Cable::new("kill");
    let world = World::with_images(&["busybox"]);
    let network = cable.network();
    let run = |name: &str| {
        let args = ["run", "-d", "--name", name, "--network", &network, "busybox", "sleep", "1000"];
        world.mvm(&args)
    };
    run("one").expect_code(0);
    let about = world.inspect("one");
    assert_eq!(about["network"][0]["addresses"][0], "10.89.0.2/24", "{about}");
    let second = run("two").expect_code(125);
    assert!(second.err().contains("joined to another machine"), "{}", second.err());
    // The owner first, so that nobody is there to clean up.
    let owner = about["owner"]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    kill(nix::unistd::Pid::from_raw(owner.expect("an owner")), Signal::SIGKILL).unwrap();
    world.kill_monitor("one");
    world.mvm(&["ps", "-a"]).expect_code(0);
    mvm_tests::eventually("the interface to be free", || {
        world.mvm(&["ps", "-a"]);
        !cable.run(0, "tc", "qdisc show dev eth0").contains("ingress")
    });
    cable.nothing_is_left();
    world.mvm(&["rm", "-f", "one"]).expect_code(0);
    run("three").expect_code(0);
    world.mvm(&["rm", "-f", "three"]).expect_code(0);
    cable.nothing_is_left();
}

#[test]
fn networks_that_there_are_not_are_told_plainly() {
    let world = World::small();
    for (network, want) in [
        ("host", "invalid network \"host\""),
        ("ns:/no/such", "/no/such"),
        ("ns:/etc/passwd", "it is no network namespace"),
        ("cni:nope", "there is no network \"nope\""),
    ] {
        let run = world.mvm(&["run", "--rm", "--network", network, "busybox", "true"]);
        let run = run.expect_code(125);
        assert!(run.err().contains(want), "{network}: {}", run.err());
    }
    let run = world.mvm(&["run", "--rm", "-p", "80:80", "busybox", "true"]).expect_code(125);
    assert!(run.err().contains("--network cni:NAME"), "{}", run.err());
    assert_eq!(world.mvm(&["ps", "-aq"]).expect_code(0).out(), "", "nothing is left of them");
}

/// Prints its command line and ends with exit code 43: tests/unikernels.rs says how.
const PRINTS: &[u8] = &[
    0x8b, 0xb6, 0x28, 0x02, 0, 0, 0xba, 0xf8, 0x03, 0, 0, 0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb,
    0xf8, 0xb0, 0x0a, 0xee, 0xb8, 21, 0, 0, 0, 0xe7, 0xf4, 0xfa, 0xf4, 0xeb, 0xfd,
];

#[test]
fn unikernels_have_a_device_and_are_told_their_address() {
    const AT: u64 = 0x10_0000;
    let cable = Cable::new("told");
    let world = World::new();
    let kernel = world.root().join("app");
    fs::write(&kernel, ElfBuilder::elf64(AT).segment(AT, AT, PRINTS, 0x1000).build()).unwrap();
    let run = |kind: &str, network: &str| {
        let kernel = kernel.to_str().unwrap();
        let args = ["run", "--engine", engine(), "--rm", "--network", network, "--boot", "linux"];
        let all = [&args[..], &["--unikernel", kind, "--kernel", kernel, "word"]].concat();
        world.mvm(&all).expect_code(43)
    };
    let network = cable.network();
    let device = "virtio_mmio.device=";
    let devices = |out: &str| out.matches(device).count();
    assert_eq!(devices(&run("rust", &network).out()), devices(&run("rust", "none").out()) + 1);
    for (kind, want) in [
        ("rust", "ip=10.89.0.2/24 gateway=10.89.0.1 word"),
        ("unikraft", "app netdev.ip=10.89.0.2/24:10.89.0.1"),
        (
            "nanos",
            "en1.ipaddr=10.89.0.2 en1.netmask=255.255.255.0 en1.gateway=10.89.0.1 en1.ip6addr=fd00:89::2 word",
        ),
        ("hermit", "-ip 10.89.0.2 -mask 255.255.255.0 -gateway 10.89.0.1 -- word"),
    ] {
        let told = run(kind, &network);
        assert!(told.out().starts_with(want), "{kind}: {}", told.out());
        assert!(!told.err().contains("not told"), "{kind}: {}", told.err());
    }
    // A second interface, of which two kinds can be told.
    cable.ip(0, &format!("link add eth1 type veth peer name peer1 netns {}", cable.name(1)));
    cable.ip(1, "link set peer1 up");
    cable.ip(0, "addr add 10.92.0.2/16 dev eth1");
    cable.ip(0, "link set eth1 up");
    let second = run("unikraft", &network);
    // The host's name server comes behind each.
    let words: Vec<_> = ["netdev.ip=10.89.0.2/24:10.89.0.1", "netdev.ip=10.92.0.2/16"].into();
    let told = second.out();
    let told: Vec<_> = told.split(' ').filter(|word| word.starts_with("netdev.ip=")).collect();
    assert!(told.len() == 2 && told.iter().zip(words).all(|(t, w)| t.starts_with(w)), "{told:?}");
    assert!(run("nanos", &network).out().contains("en2.ipaddr=10.92.0.2 en2.netmask=255.255.0.0"));
    let first = run("rust", &network);
    assert!(first.err().contains("first network interface alone"), "{}", first.err());
    cable.ip(0, "link del eth1");
    let untold = run("multiboot", &network);
    assert!(untold.err().contains("not told its address 10.89.0.2/24"), "{}", untold.err());
    assert!(!untold.out().contains("10.89.0.2"), "{}", untold.out());
    cable.nothing_is_left();
}

/// A program for Solo5's hvt, made by hand.
#[derive(Default)]
struct Calls(Vec<u8>);

impl Calls {
    /// Its argument blocks, and its data.
    const ARGS: u32 = 0x28_0000;
    const DATA: u32 = 0x30_0000;

    fn put(&mut self, opcode: &[u8], operands: &[u32]) {
        self.0.extend(opcode);
        operands.iter().for_each(|operand| self.0.extend(operand.to_le_bytes()));
    }

    /// Stores bytes, a multiple of four.
    fn store(&mut self, at: u32, bytes: &[u8]) {
        for (at, word) in (at..).step_by(4).zip(bytes.chunks_exact(4)) {
            let word = u32::from_le_bytes(word.try_into().unwrap());
            self.put(&[0xc7, 0x04, 0x25], &[at, word]); // mov dword [at], word
        }
    }

    fn call(&mut self, number: u32, words: &[u64]) {
        self.store(
            Self::ARGS,
            &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>(),
        );
        self.put(&[0xba], &[0x500 + number]); // mov edx, port
        self.put(&[0xb8], &[Self::ARGS]); // mov eax, ARGS
        self.put(&[0xef], &[]); // out dx, eax
    }

    /// Shows memory, which may be what only the machine writes.
    fn show(&mut self, from: u32, len: u32) {
        let to = Self::DATA + 0x8000;
        self.put(&[0xbe], &[from]); // mov esi, from
        self.put(&[0xbf], &[to]); // mov edi, to
        self.put(&[0xb9], &[len]); // mov ecx, len
        self.put(&[0xfc, 0xf3, 0xa4], &[]); // cld; rep movsb
        self.call(2, &[to.into(), len.into()]);
    }

    /// Goes to `back` unless the 16 bits at `at` are these.
    fn unless(&mut self, at: u32, value: [u8; 2], back: usize) {
        self.put(&[0x66, 0x81, 0x3c, 0x25], &[at]); // cmp word [at], value
        self.0.extend(value);
        let next = self.0.len() + 6;
        self.put(&[0x0f, 0x85], &[(back as u32).wrapping_sub(next as u32)]); // jne back
    }
}

#[test]
fn a_guest_of_solo5s_asks_for_its_gateway() {
    const AT: u64 = 0x10_0000;
    const CMDLINE: u32 = 0x2_0000;
    let told = "--ipv4=10.89.0.2/24 --ipv4-gateway=10.89.0.1 word";
    let mac = [2, 0, 0, 0, 0, 0x77];
    // ARP (RFC 826): who has 10.89.0.1?
    let mut frame = [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac].concat();
    frame.extend([10, 89, 0, 2, 0, 0, 0, 0, 0, 0, 10, 89, 0, 1]);
    frame.resize(60, 0);
    let (sent, received) = (Calls::DATA, Calls::DATA + 0x4000);
    let mut calls = Calls::default();
    calls.show(CMDLINE, told.len() as u32);
    calls.store(sent, &frame);
    calls.call(6, &[1, sent.into(), frame.len() as u64, 7]);
    let wait = calls.0.len();
    calls.call(3, &[u64::MAX, 0, 0]);
    calls.call(7, &[1, received.into(), 2048, 7]);
    // Until there is the answer: other frames come by, too.
    calls.unless(received + 12, [8, 6], wait);
    calls.unless(received + 20, [0, 2], wait);
    calls.show(received + 28, 4);
    calls.call(8, &[0, 5]);
    let kernel = ElfBuilder::elf64(AT).segment(AT, AT, &calls.0, 0x1000);
    let kernel = kernel.solo5(1, &[("service", 2)]).build();

    let cable = Cable::new("solo5");
    cable.ip(0, "link set eth0 address 02:00:00:00:00:77");
    let world = World::new();
    let path = world.root().join("app.hvt");
    fs::write(&path, kernel).unwrap();
    let run = |network: &str| {
        let kernel = path.to_str().unwrap();
        let args = ["run", "--engine", engine(), "--rm", "--network", network, "--unikernel"];
        world.mvm(&[&args[..], &["hvt", "--kernel", kernel, "word"]].concat())
    };
    let answered = run(&cable.network()).expect_code(5);
    assert_eq!(answered.out(), format!("{told}\n\x59\0\x01"), "the command line, and 10.89.0.1");
    cable.nothing_is_left();
    let without = run("none").expect_code(125);
    assert!(without.err().contains("network device \"service\""), "{}", without.err());
}

/// CNI's plugins, if the host has them.
fn plugins() -> Option<&'static str> {
    let found = ["/usr/lib/cni", "/opt/cni/bin"].into_iter().find(|dir| {
        ["bridge", "host-local", "portmap"].iter().all(|p| Path::new(dir).join(p).exists())
    });
    if found.is_none() {
        eprintln!("SKIPPED: there are no CNI plugins here (Debian: containernetworking-plugins)");
    }
    found
}

#[test]
fn plugins_make_a_network_and_take_it_away_again() {
    let Some(plugins) = plugins() else { return };
    let world = World::with_images(&["busybox"]);
    // mvm runs in a namespace of its own: bridge and rules are not the host's.
    let host = format!("mvme2e-{}-cni", std::process::id());
    Namespace::create(&host).expect("a network namespace; this needs root");
    struct Guard<'a>(&'a str);
    impl Drop for Guard<'_> {
        fn drop(&mut self) {
            let _ = Namespace::remove(self.0);
        }
    }
    let _guard = Guard(&host);
    let config = world.root().join("net.d");
    let leases = world.root().join("leases");
    fs::create_dir_all(&config).unwrap();
    let list = serde_json::json!({
        "cniVersion": "1.0.0", "name": "e2e", "plugins": [
            { "type": "bridge", "bridge": "mvmbr0", "isGateway": true, "ipam": {
                "type": "host-local", "dataDir": leases,
                "ranges": [[{ "subnet": "10.92.0.0/24" }], [{ "subnet": "fd00:92::/64" }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] } },
            { "type": "portmap", "capabilities": { "portMappings": true } } ] });
    fs::write(config.join("10-e2e.conflist"), list.to_string()).unwrap();
    let enter = format!("--net={}/{host}", Namespace::DIRECTORY);
    // What the namespace's own addresses are reached by.
    let up = Command::new("nsenter").arg(&enter).args(["ip", "link", "set", "lo", "up"]).status();
    assert!(up.is_ok_and(|status| status.success()), "lo cannot be set up");
    let mvm = |args: &[&str]| {
        let inner = world.command(args);
        // Not by `ip netns exec`, which makes a mount namespace: what mvm mounts in /run/netns would be
        // in that alone.
        let mut command = Command::new("nsenter");
        command.arg(&enter).arg(inner.get_program()).args(inner.get_args());
        for (key, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        command.env("NETCONFPATH", &config).env("CNI_PATH", plugins);
        run_with(command, b"", PATIENCE)
    };
    let script = "echo hello > /tmp/index.html; exec httpd -f -p 80 -h /tmp";
    let args = ["run", "-d", "--name", "web", "--network", "cni:e2e", "-p", "8080:80", "busybox"];
    mvm(&[&args[..], &["sh", "-c", script]].concat()).expect_code(0);
    let about = world.inspect("web");
    assert_eq!(about["network"][0]["addresses"][0], "10.92.0.2/24", "{about}");
    let namespace = format!("mvm-{}", about["id"].as_str().unwrap());
    assert!(Path::new(Namespace::DIRECTORY).join(&namespace).exists());
    let namespace_of_host = Namespace::open(&Path::new(Namespace::DIRECTORY).join(&host)).unwrap();
    let fetch = |server: &str| {
        mvm_tests::http::get(&namespace_of_host, server.parse().unwrap(), "/index.html")
    };
    mvm_tests::eventually("an answer by the bridge", || {
        fetch("10.92.0.2:80").is_ok_and(|page| page == "hello\n")
    });
    let ping = mvm(&["exec", "web", "ping6", "-c", "1", "-W", "60", "fd00:92::1"]);
    ping.expect_code(0);
    // The published port, at the bridge's own address.
    assert_eq!(fetch("10.92.0.1:8080").expect("a page"), "hello\n");

    mvm(&["rm", "-f", "web"]).expect_code(0);
    assert!(!Path::new(Namespace::DIRECTORY).join(&namespace).exists());
    let left: Vec<_> = fs::read_dir(leases.join("e2e")).unwrap().flatten().collect();
    let left: Vec<_> = left
        .iter()
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| name.starts_with("10.") || name.starts_with("fd00"))
        .collect();
    assert!(left.is_empty(), "addresses are still given away: {left:?}");
    let refused = mvm(&["run", "--rm", "--network", "cni:other", "busybox", "true"]);
    assert!(refused.expect_code(125).err().contains("there are e2e"));
}
