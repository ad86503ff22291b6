//! What Kubernetes asks for of a container that runs, one feature after the other: CRI of the distribution's
//! containerd.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mvm_net::Namespace;
use mvm_tests::cri::messages::{ContainerConfig, Device, NamespaceOption};
use mvm_tests::cri::messages::{
    LinuxContainerResources, LinuxSandboxSecurityContext, Mount, MountPropagation, NamespaceMode,
};
use mvm_tests::cri::{Cri, EXITED, Pod};
use mvm_tests::hostmount::{FOLLOWS, followed, is_followed};
use mvm_tests::{Containerd, LoopDevice, eventually, http};
use protobuf::{EnumOrUnknown, MessageField};

/// Starts containerd with CRI, or ends the test where the machine cannot run any.
macro_rules! pods {
    () => {
        match Containerd::with_cri() {
            Some(containerd) => containerd,
            None => return,
        }
    };
}

/// A script that goes on until it is told to end.
const IDLE: &str = "trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done";

/// What a shell says that a file of its control group holds.
fn limit(cri: &Cri<'_>, id: &str, file: &str) -> String {
    let script = format!("cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/{file}");
    cri.exec(id, &script).expect_code(0).out().trim().to_owned()
}

#[track_caller]
fn end(cri: &Cri<'_>, ctd: &Containerd, pod: &Pod) {
    cri.remove_pod(pod);
    ctd.expect_nothing_left();
}

fn memory(bytes: i64) -> LinuxContainerResources {
    LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() }
}

#[test]
fn limits_are_changed_while_it_runs_and_figures_are_told() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    let pod = cri.run_pod(cri.pod_config("limits"));
    let mut config = cri.container_config("first", IDLE);
    config.linux.mut_or_insert_default().resources = MessageField::some(memory(64 << 20));
    let id = cri.start(&pod, config);
    let other = cri.start(&pod, cri.container_config("other", IDLE));
    eventually("its output", || cri.log(&pod, "first") == "up\n");
    assert_eq!(limit(&cri, &id, "memory.max"), (64 << 20).to_string());
    let limits = LinuxContainerResources {
        memory_limit_in_bytes: 48 << 20,
        cpu_quota: 30_000,
        cpu_period: 100_000,
        cpu_shares: 512,
        ..Default::default()
    };
    cri.update(&id, limits).expect("new limits");
    assert_eq!(limit(&cri, &id, "memory.max"), (48 << 20).to_string());
    assert_eq!(limit(&cri, &id, "cpu.max"), "30000 100000");
    let weight = limit(&cri, &id, "cpu.weight");
    assert_ne!(weight, limit(&cri, &other, "cpu.weight"));
    // They hold: what was allowed before is not any more.
    let hog = cri.exec(&id, "head -c 56m /dev/zero | tail | wc -c");
    assert!(hog.out() != format!("{}\n", 56 << 20), "{}", hog.err());

    let (cpu, used) = cri.stats(&id);
    assert!(cpu > 0 && (4096..=48 << 20).contains(&used), "{cpu} ns, {used} bytes");
    cri.exec(&id, "n=0; while [ $n -lt 20000 ]; do n=$((n + 1)); done").expect_code(0);
    assert!(cri.stats(&id).0 > cpu);
    let all = cri.all_stats();
    assert_eq!(all.len(), 2, "{all:?}");
    assert!(all.contains_key(&id) && all.contains_key(&other), "{all:?}");

    // The node's own view: the pod's machine, and what is in it.
    let machine = ctd.mvm(&["ps", "-q"]).expect_code(0).out();
    let stats = ["stats", "--format", "json", machine.trim()];
    let stats = ctd.mvm(&stats).expect_code(0).out();
    let stats: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
    let figure = |pointer: &str| stats.pointer(pointer).and_then(serde_json::Value::as_f64);
    let some =
        |pointer: &str| assert!(figure(pointer).is_some_and(|n| n > 0.0), "{pointer}: {stats}");
    for pointer in ["/memory", "/host/cpu_seconds", "/guest/memory_total", "/guest/memory_current"]
    {
        some(pointer);
    }
    for container in [&id, &other] {
        some(&format!("/guest/containers/{container}/cpu/usage_usec"));
        some(&format!("/guest/containers/{container}/pids"));
    }
    let table = ctd.mvm(&["stats"]).expect_code(0).out();
    assert!(table.contains(&id[..13]) && table.contains(&other[..13]), "{table}");
    end(&cri, &ctd, &pod);
}

/// A pod whose containers, and the containers, that have this kind of process ids.
fn with_pids(config: &mut ContainerConfig, mode: NamespaceMode) {
    let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    context.namespace_options = pids(mode);
}

fn pids(mode: NamespaceMode) -> MessageField<NamespaceOption> {
    MessageField::some(NamespaceOption { pid: EnumOrUnknown::new(mode), ..Default::default() })
}

#[test]
fn process_ids_are_shared_where_that_is_asked_for() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    for (mode, name) in [(NamespaceMode::POD, "shared"), (NamespaceMode::NODE, "node")] {
        let mut config = cri.pod_config(name);
        config.linux.mut_or_insert_default().security_context =
            MessageField::some(LinuxSandboxSecurityContext {
                namespace_options: pids(mode),
                ..Default::default()
            });
        let pod = cri.run_pod(config);
        let mut first = cri.container_config("first", IDLE);
        with_pids(&mut first, mode);
        let first = cri.start(&pod, first);
        let mut second = cri.container_config("second", IDLE);
        with_pids(&mut second, mode);
        let second = cri.start(&pod, second);
        eventually("both to be up", || {
            ["first", "second"].iter().all(|name| cri.log(&pod, name) == "up\n")
        });
        // The end of the first process is the end of a container, whatever else it has started.
        let mut third = cri.container_config("third", "sleep 100001 & sleep 100001 & echo fine");
        with_pids(&mut third, mode);
        let third = cri.start(&pod, third);
        assert_eq!(cri.wait(&third), 0, "{name}");
        assert_eq!(cri.exec(&second, "ps | grep '[s]leep 100001' || echo none").out(), "none\n");
        let seen = cri.exec(&second, "ps | grep -c '[e]cho up'").expect_code(0).out();
        assert_eq!(seen, "2\n", "{name}");
        // One ends the other, as a sidecar would.
        let script = "own=$(cat /proc/self/cgroup); \
                      for p in $(ps -o pid,args | awk '/[e]cho up/ { print $1 }'); do \
                      [ \"$(cat /proc/$p/cgroup)\" = \"$own\" ] || kill -TERM $p; done";
        cri.exec(&second, script).expect_code(0);
        eventually("the first one's end", || cri.status(&first).state == EXITED);
        assert_eq!(cri.status(&first).exit_code, 0, "{name}");
        end(&cri, &ctd, &pod);
    }
    // Unless it is asked for, they are not.
    let pod = cri.run_pod(cri.pod_config("apart"));
    cri.start(&pod, cri.container_config("first", IDLE));
    let second = cri.start(&pod, cri.container_config("second", IDLE));
    assert_eq!(cri.exec(&second, "ps | grep -c '[e]cho up'").expect_code(0).out(), "1\n");
    end(&cri, &ctd, &pod);
}

#[test]
fn probes_and_hooks_of_the_life_cycle_are_what_the_kubelet_makes_of_them() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    let pod = cri.run_pod(cri.pod_config("probed"));
    let script = "mkdir /www; echo fine >/www/healthz; httpd -p 8080 -h /www; \
                  trap 'cat /tmp/said; exit 0' TERM; echo up; while :; do sleep 0.1; done";
    let id = cri.start(&pod, cri.container_config("server", script));
    // postStart, which is run beside the program's own start.
    cri.exec(&id, "echo started >>/tmp/said").expect_code(0);
    eventually("its output", || cri.log(&pod, "server") == "up\n");
    // Probes by a command: what counts is the exit code; and they may be given up.
    assert_eq!(cri.exec(&id, "test -s /tmp/said").code, 0);
    assert_eq!(cri.exec(&id, "test -s /tmp/missing").code, 1);
    let slow = cri.exec_within(&id, "sleep 600", 1);
    let slow = slow.expect_err("a probe that takes too long").to_string();
    assert!(slow.contains("timeout") || slow.contains("deadline"), "{slow}");
    // Probes by HTTP and TCP, from the host to the pod's address.
    let host = Namespace::open(Path::new("/proc/self/ns/net")).expect("the host's namespace");
    let address: SocketAddr = format!("{}:8080", cri.address(&pod)).parse().expect("an address");
    assert_eq!(http::get(&host, address, "/healthz").expect("an answer"), "fine\n");
    assert!(http::get(&host, address, "/missing").is_err());
    let limit = Duration::from_secs(60);
    TcpStream::connect_timeout(&address, limit).expect("somebody to listen");
    let nobody = SocketAddr::new(address.ip(), 9);
    assert!(TcpStream::connect_timeout(&nobody, limit).is_err());
    // preStop, and then the end.
    cri.exec(&id, "echo stopping >>/tmp/said").expect_code(0);
    cri.stop(&id, 60);
    assert_eq!(cri.status(&id).exit_code, 0);
    assert_eq!(cri.log(&pod, "server"), "up\nstarted\nstopping\n");
    end(&cri, &ctd, &pod);
}

fn device(host: &Path, path: &str, permissions: &str) -> Device {
    Device {
        container_path: path.into(),
        host_path: host.display().to_string(),
        permissions: permissions.into(),
        ..Default::default()
    }
}

/// A container that idles, and has these devices of the host: path in it, and what it may do there.
fn with_devices(
    cri: &Cri<'_>,
    name: &str,
    devices: &[(&LoopDevice, &str, &str)],
) -> ContainerConfig {
    let mut config = cri.container_config(name, IDLE);
    let asked = devices.iter().map(|(at, path, permissions)| device(at.path(), path, permissions));
    config.devices = asked.collect();
    config
}

/// The disks that the guest has: their size in sectors and whether they are read-only.
fn disks(cri: &Cri<'_>, id: &str) -> String {
    let script = "cd /sys/block; for d in vd*; do [ -e $d ] && echo $(cat $d/size $d/ro); done";
    cri.exec(id, &format!("{script}; true")).expect_code(0).out()
}

#[test]
fn block_devices_come_and_go_with_the_containers_of_a_pod() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    let Some(large) = LoopDevice::new(&ctd.path("large"), 3 << 20) else { return };
    let Some(small) = LoopDevice::new(&ctd.path("small"), 1 << 20) else { return };
    let mut config = cri.pod_config("blocks");
    config.linux.mut_or_insert_default().security_context =
        MessageField::some(LinuxSandboxSecurityContext { privileged: true, ..Default::default() });
    let pod = cri.run_pod(config);
    let plain = cri.start(&pod, cri.container_config("plain", IDLE));
    assert_eq!(disks(&cri, &plain), "");
    let writer = cri.start(&pod, with_devices(&cri, "writer", &[(&large, "/dev/data", "rwm")]));
    let wrote = "stat -c '%F %a' /dev/data; wc -c </dev/data
                 echo from the writer | dd of=/dev/data bs=512 seek=7 conv=sync 2>/dev/null";
    let wrote = cri.exec(&writer, wrote).expect_code(0).out();
    let mode = std::os::unix::fs::MetadataExt::mode(&large.path().metadata().expect("a device"));
    assert_eq!(wrote, format!("block special file {:o}\n3145728\n", mode & 0o777));
    // Another container has the same disk, under another name, and may not write to it.
    let devices = [(&large, "/dev/same", "r"), (&small, "/dev/more", "r")];
    let reader = cri.start(&pod, with_devices(&cri, "reader", &devices));
    let read = "dd if=/dev/same bs=512 skip=7 count=1 2>/dev/null | head -n 1; wc -c </dev/more
                for d in same more; do (echo x >/dev/$d) 2>&1 | sed 's/.*: //'; done";
    let read = cri.exec(&reader, read).expect_code(0).out();
    let refused = "Operation not permitted\n";
    assert_eq!(read, format!("from the writer\n1048576\n{refused}{refused}"));
    assert_eq!(disks(&cri, &plain), "6144 0\n2048 1\n");
    // Who wants to write to what is read-only for the whole machine comes too late; the others are as they were.
    let late = cri.try_start(&pod, with_devices(&cri, "late", &[(&small, "/dev/data", "rw")]));
    let late = late.expect_err("a refusal").to_string();
    assert!(late.contains("/dev/data") && late.contains("read-only"), "{late}");
    // The one goes: the disk stays for the other, and what was written is there for all.
    cri.exec(&writer, "echo the last | dd of=/dev/data bs=512 seek=9 conv=sync 2>/dev/null")
        .expect_code(0);
    cri.remove(&writer);
    let last = cri.exec(&reader, "dd if=/dev/same bs=512 skip=9 count=1 2>/dev/null | head -n 1");
    assert_eq!(last.expect_code(0).out(), "the last\n");
    cri.remove(&reader);
    assert_eq!(disks(&cri, &plain), "");
    let content = large.content();
    assert!(content[7 * 512..].starts_with(b"from the writer\n"));
    assert!(content[9 * 512..].starts_with(b"the last\n"));
    assert!(small.content().iter().all(|byte| *byte == 0));
    // Who is allowed everything gets what is asked for, and nothing else that the host has.
    let mut config = with_devices(&cri, "privileged", &[(&small, "/dev/data", "rwm")]);
    let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    context.privileged = true;
    let privileged = cri.start(&pod, config);
    let script = "wc -c </dev/data; ls -d /dev/vd* /dev/loop[0-9]* 2>/dev/null | wc -l";
    assert_eq!(cri.exec(&privileged, script).expect_code(0).out(), "1048576\n0\n");
    assert_eq!(disks(&cri, &plain), "2048 0\n");
    cri.remove(&privileged);
    // Places are used anew, by whatever disk.
    for round in 0..9 {
        let device = if round % 2 == 0 { &small } else { &large };
        let name = format!("round{round}");
        let id = cri.start(&pod, with_devices(&cri, &name, &[(device, "/dev/data", "rwm")]));
        let script = format!("echo {round} | dd of=/dev/data bs=512 conv=sync 2>/dev/null");
        cri.exec(&id, &script).expect_code(0);
        cri.remove(&id);
        assert!(device.content().starts_with(format!("{round}\n").as_bytes()), "{round}");
    }
    assert_eq!(disks(&cri, &plain), "");
    end(&cri, &ctd, &pod);
}

#[test]
fn what_the_host_mounts_later_is_seen_in_pods() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    let dir = ctd.path("followed");
    std::fs::create_dir(&dir).expect("a directory");
    let mounts = followed(&dir);
    let pod = cri.run_pod(cri.pod_config("follows"));
    let with = |name: &str, propagation: MountPropagation| {
        let mut config = cri.container_config(name, FOLLOWS);
        config.mounts.push(Mount {
            container_path: "/v".into(),
            host_path: dir.display().to_string(),
            propagation: propagation.into(),
            ..Default::default()
        });
        config
    };
    let both = with("both", MountPropagation::PROPAGATION_BIDIRECTIONAL);
    let both = cri.try_start(&pod, both).expect_err("a refusal").to_string();
    assert!(both.contains("HostToContainer"), "{both}");
    let follows = with("follows", MountPropagation::PROPAGATION_HOST_TO_CONTAINER);
    let id = cri.start(&pod, follows);
    is_followed(mounts, || cri.log(&pod, "follows"));
    cri.remove(&id);
    end(&cri, &ctd, &pod);
}

#[test]
fn block_devices_that_are_too_many_or_vanish_are_errors_of_their_container_alone() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    let made: Option<Vec<_>> =
        (0..9).map(|n| LoopDevice::new(&ctd.path(&format!("image{n}")), 1 << 20)).collect();
    let Some(loops) = made else { return };
    let paths: Vec<_> = (0..loops.len()).map(|n| format!("/dev/data{n}")).collect();
    let some = |range: std::ops::Range<usize>| {
        let found = loops[range.clone()].iter().zip(&paths[range]);
        found.map(|(device, path)| (device, path.as_str(), "rwm")).collect::<Vec<_>>()
    };
    let pod = cri.run_pod(cri.pod_config("many"));
    let all = cri.try_start(&pod, with_devices(&cri, "all", &some(0..9))).expect_err("a refusal");
    assert!(all.to_string().contains("9 block devices are too many"), "{all}");
    let first = cri.start(&pod, with_devices(&cri, "first", &some(0..5)));
    let rest = cri.try_start(&pod, with_devices(&cri, "rest", &some(5..9))).expect_err("a refusal");
    let said = rest.to_string();
    assert!(said.contains("/dev/data8") && said.contains("no place left"), "{said}");
    // What came for it has gone.
    assert_eq!(disks(&cri, &first).lines().count(), 5);
    let second = cri.start(&pod, with_devices(&cri, "second", &some(5..8)));
    assert_eq!(disks(&cri, &first).lines().count(), 8);
    // What was behind a device vanishes: its blocks cannot be read any more.
    std::fs::OpenOptions::new()
        .write(true)
        .open(ctd.path("image0"))
        .expect("the image")
        .set_len(0)
        .expect("cut off");
    let read = cri.exec(&first, "dd if=/dev/data0 bs=64k skip=8 count=1 | wc -c");
    assert_eq!(read.out(), "0\n", "{}", read.err());
    assert!(read.err().contains("Input/output error"), "{}", read.err());
    assert_eq!(
        cri.exec(&first, "dd if=/dev/data1 bs=64k count=1 2>/dev/null | wc -c").out(),
        "65536\n"
    );
    // A device that is not there is named.
    cri.remove(&first);
    let node = ctd.path("node");
    let made = Command::new("mknod").arg(&node).args(["b", "4000", "1"]).status();
    assert!(made.expect("mknod").success());
    let mut config = cri.container_config("missing", IDLE);
    config.devices.push(device(&node, "/dev/data", "rwm"));
    let missing = cri.try_start(&pod, config).expect_err("a refusal").to_string();
    assert!(missing.contains("/dev/data") && missing.contains("4000:1"), "{missing}");
    assert_eq!(disks(&cri, &second).lines().count(), 3);
    end(&cri, &ctd, &pod);
}
