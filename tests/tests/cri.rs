//! Pods, as the kubelet asks for them: CRI of the distribution's containerd.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mvm_net::Namespace;
use mvm_tests::cri::messages::{LinuxContainerResources, Mount};
use mvm_tests::cri::{Cri, EXITED, Pod, RESIZE, RUNNING, STDERR, STDIN, STDOUT};
use mvm_tests::{Containerd, LoopDevice, eventually, http, is_running};
use nix::sys::signal::{Signal, kill};
use protobuf::MessageField;

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

#[test]
fn containers_of_a_pod_are_in_one_machine() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    let volume = ctd.path("volume");
    fs::create_dir(&volume).expect("a directory");
    let mut config = cri.pod_config("web-1");
    config.linux.mut_or_insert_default().sysctls =
        [("kernel.shmmax".to_owned(), "12345678".to_owned())].into();
    let pod = cri.run_pod(config);
    assert!(cri.is_ready(&pod));
    let machines = ctd.mvm(&["ps", "-q"]).expect_code(0).out();
    assert_eq!(machines.lines().count(), 1, "{machines}");
    let with_volume = |name: &str, script: &str| {
        let mut config = cri.container_config(name, script);
        config.mounts.push(Mount {
            container_path: "/data".into(),
            host_path: volume.display().to_string(),
            ..Default::default()
        });
        config
    };
    // A server on the pod's loopback, and whoever asks it.
    let server = "echo from the server >/data/f; echo shared >/dev/shm/s; mkdir /www; \
                  echo hello over localhost >/www/index.html; httpd -f -p 127.0.0.1:8080 -h /www";
    let first = cri.start(&pod, with_volume("first", server));
    let client = "until wget -qO- http://127.0.0.1:8080/; do sleep 0.1; done; \
                  cat /data/f /dev/shm/s; hostname; cat /proc/sys/kernel/shmmax; echo $$";
    let second = cri.start(&pod, with_volume("second", client));
    assert_eq!(cri.wait(&second), 0);
    let said = "hello over localhost\nfrom the server\nshared\nweb-1\n12345678\n1\n";
    assert_eq!(cri.log(&pod, "second"), said);
    assert_eq!(cri.status(&first).state, RUNNING);
    assert_eq!(ctd.mvm(&["ps", "-q"]).expect_code(0).out(), machines, "the same machine");
    assert_eq!(fs::read_to_string(volume.join("f")).expect("a file"), "from the server\n");
    // Processes are the containers' own.
    assert_eq!(cri.exec(&first, "ps | grep -q '[w]get' || exit 3").code, 3);
    let shm = cri
        .exec(&first, "df -k /dev/shm | awk 'NR == 2 { print $2 }'; grep -c /dev/shm /proc/mounts");
    assert_eq!(shm.out(), "65536\n1\n");
    end(&cri, &ctd, &pod);
}

/// How many files the file server of a machine has open.
fn open_files(machine: &str) -> usize {
    let name = format!("mvm-files: {machine}");
    let processes = fs::read_dir("/proc").expect("/proc").flatten().map(|entry| entry.path());
    let mut servers = processes.filter(|process| {
        let line = fs::read(process.join("cmdline")).unwrap_or_default();
        line.split(|b| *b == 0).next().is_some_and(|first| first.starts_with(name.as_bytes()))
    });
    let server = servers.next().unwrap_or_else(|| panic!("no {name}"));
    fs::read_dir(server.join("fd")).expect("its descriptors").count()
}

/// Stops and removes a pod, and looks for what is left.
#[track_caller]
fn end(cri: &Cri<'_>, ctd: &Containerd, pod: &Pod) {
    cri.remove_pod(pod);
    ctd.expect_nothing_left();
}

#[test]
fn containers_come_and_go_in_a_machine_that_stays() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    let pod = cri.run_pod(cri.pod_config("again"));
    let machines = ctd.mvm(&["ps", "-q"]).expect_code(0).out();
    let held = || open_files(machines.trim());
    let before = held();
    for (attempt, code) in [(0, 3), (1, 0), (2, 137)] {
        let script = if code == 137 { "kill -9 $$" } else { "echo $0; exit $CODE" };
        let mut config = cri.container_config("crash", script);
        config.metadata.mut_or_insert_default().attempt = attempt;
        config.log_path = format!("{attempt}.log");
        let mut variable = mvm_tests::cri::messages::KeyValue::new();
        (variable.key, variable.value) = ("CODE".into(), code.to_string());
        config.envs.push(variable);
        // A shell whose child is killed: the first process of a container hears no signal of its own.
        if code == 137 {
            config.command[2] = "sh -c 'kill -9 $$'; exit $?".into();
        }
        let id = cri.start(&pod, config);
        assert_eq!(cri.wait(&id), code);
        cri.remove(&id);
        // With no container in it the machine goes on.
        assert_eq!(ctd.mvm(&["ps", "-q"]).expect_code(0).out(), machines);
        assert!(cri.is_ready(&pod));
        // Nothing of the container's files is held any more.
        eventually("its files to be closed", || held() == before);
    }
    let id = cri.start(&pod, cri.container_config("polite", IDLE));
    eventually("its output", || cri.log(&pod, "polite") == "up\n");
    cri.stop(&id, 60);
    assert_eq!((cri.status(&id).state, cri.status(&id).exit_code), (EXITED, 0));
    let id = cri
        .start(&pod, cri.container_config("stubborn", "trap '' TERM; while :; do sleep 0.1; done"));
    cri.stop(&id, 1);
    assert_eq!(cri.status(&id).exit_code, 137);
    end(&cri, &ctd, &pod);
}

#[test]
fn a_pod_is_as_large_as_its_limits_and_they_hold() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    let mut config = cri.pod_config("sized");
    let resources = LinuxContainerResources {
        memory_limit_in_bytes: 200 << 20,
        cpu_period: 100_000,
        cpu_quota: 200_000,
        ..Default::default()
    };
    config.linux.mut_or_insert_default().resources = MessageField::some(resources);
    let pod = cri.run_pod(config);
    let mut container = cri.container_config("hog", "nproc; free -m | awk '/Mem/ { print $2 }'; cat /dev/zero | head -c 100m | tail >/dev/null; echo survived");
    container.linux.mut_or_insert_default().resources =
        MessageField::some(LinuxContainerResources {
            memory_limit_in_bytes: 32 << 20,
            ..Default::default()
        });
    let id = cri.start(&pod, container);
    cri.wait(&id);
    let log = cri.log(&pod, "hog");
    let mut lines = log.lines();
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get()).min(2);
    assert_eq!(lines.next(), Some(cpus.to_string().as_str()), "{log}");
    let memory: u64 = lines.next().and_then(|m| m.parse().ok()).expect("a number");
    // The limit and what the guest itself takes, less what its kernel keeps.
    assert!((200..=300).contains(&memory), "{log}");
    assert_eq!(cri.status(&id).reason, "OOMKilled", "{log}");
    // The others of the pod live.
    let other = cri.start(&pod, cri.container_config("other", "echo fine"));
    assert_eq!(cri.wait(&other), 0);
    end(&cri, &ctd, &pod);
}

#[test]
fn a_pods_end_is_the_end_of_what_is_in_it() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    let pod = cri.run_pod(cri.pod_config("short"));
    let id = cri.start(&pod, cri.container_config("long", IDLE));
    eventually("its output", || cri.log(&pod, "long") == "up\n");
    // Somebody kills the machine.
    let machine = ctd.mvm(&["ps", "-q"]).expect_code(0).out();
    let about = ctd.mvm(&["inspect", machine.trim()]).expect_code(0).out();
    let about: serde_json::Value = serde_json::from_str(&about).expect("JSON");
    let monitor = about[0]["monitor"]["pid"].as_i64().and_then(|p| i32::try_from(p).ok());
    let monitor = nix::unistd::Pid::from_raw(monitor.expect("a monitor"));
    kill(monitor, Signal::SIGKILL).expect("a signal");
    assert_eq!(cri.wait(&id), 255);
    eventually("the end of the pod", || !cri.is_ready(&pod));
    assert!(!is_running(monitor));
    end(&cri, &ctd, &pod);
}

#[test]
fn containerd_may_be_restarted_under_a_pod() {
    let mut ctd = pods!();
    let (pod, id) = {
        let cri = Cri::new(&ctd);
        let pod = cri.run_pod(cri.pod_config("lasting"));
        let id = cri.start(&pod, cri.container_config("first", IDLE));
        eventually("its output", || cri.log(&pod, "first") == "up\n");
        (pod, id)
    };
    ctd.kill_daemon();
    ctd.run_daemon();
    let cri = Cri::new(&ctd);
    assert!(cri.is_ready(&pod));
    assert_eq!(cri.exec(&id, "echo still here").expect_code(0).out(), "still here\n");
    let second = cri.start(&pod, cri.container_config("second", "echo new"));
    assert_eq!(cri.wait(&second), 0);
    end(&cri, &ctd, &pod);
}

#[test]
fn a_killed_shim_takes_its_pod_along() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    let pod = cri.run_pod(cri.pod_config("orphan"));
    let id = cri.start(&pod, cri.container_config("first", IDLE));
    eventually("its output", || cri.log(&pod, "first") == "up\n");
    for shim in ctd.shims() {
        kill(shim, Signal::SIGKILL).expect("a shim to be killed");
    }
    eventually("the end of the pod", || !cri.is_ready(&pod));
    eventually("the end of the container", || cri.status(&id).state == EXITED);
    eventually("the end of the machine", || ctd.mvm(&["ps", "-aq"]).out().is_empty());
    end(&cri, &ctd, &pod);
}

#[test]
fn ctr_makes_pods_by_annotations() {
    let ctd = pods!();
    let kind = |kind: &str| format!("io.kubernetes.cri.container-type={kind}");
    let sandbox = "io.kubernetes.cri.sandbox-id=pod1";
    let null = "file:///dev/null";
    let flags =
        ["-d", "--log-uri", null, "--annotation", &kind("sandbox"), "--annotation", sandbox];
    let command = ctd.run_command(&flags, "pod1", &["no-such-program"]);
    mvm_tests::run_with(command, b"", Duration::from_secs(300)).expect_code(0);
    assert_eq!(ctd.status("pod1"), "RUNNING");
    assert!(is_running(ctd.pid("pod1")));
    let member = ["--annotation", &kind("container"), "--annotation", sandbox];
    let run = ctd.sh(&member, "c1", "echo in the pod >/dev/shm/x; cat /dev/shm/x").expect_code(0);
    assert_eq!(run.out(), "in the pod\n");
    let exec = ctd.exec("pod1", "e1", "true", b"");
    assert!(exec.code != 0 && exec.err().contains("sandbox"), "{}", exec.err());
    // One that belongs to no pod, and one whose pod is not there.
    let stray =
        ["--annotation", &kind("container"), "--annotation", "io.kubernetes.cri.sandbox-id=none"];
    let run = ctd.sh(&stray, "c2", "true");
    assert!(run.code != 0 && run.err().contains("none"), "{}", run.err());
    ctd.ctr(&["container", "rm", "c2"]);
    ctd.ctr(&["task", "kill", "-s", "SIGKILL", "pod1"]).expect_code(0);
    ctd.remove("pod1");
    ctd.expect_nothing_left();
}

#[test]
fn ctr_gives_a_block_device_to_a_container_of_a_pod() {
    let ctd = pods!();
    let Some(device) = LoopDevice::new(&ctd.path("image"), 3 << 20) else { return };
    let path = device.path().display().to_string();
    let kind = |kind: &str| format!("io.kubernetes.cri.container-type={kind}");
    let sandbox = "io.kubernetes.cri.sandbox-id=pod1";
    let null = "file:///dev/null";
    let flags =
        ["-d", "--log-uri", null, "--annotation", &kind("sandbox"), "--annotation", sandbox];
    let command = ctd.run_command(&flags, "pod1", &["no-such-program"]);
    mvm_tests::run_with(command, b"", Duration::from_secs(300)).expect_code(0);
    let member = ["--annotation", &kind("container"), "--annotation", sandbox];
    let script = format!(
        "wc -c <{path}; echo from the pod | dd of={path} bs=512 seek=7 conv=sync 2>/dev/null
         dd if={path} bs=512 skip=7 count=1 2>/dev/null | head -n 1"
    );
    let run = ctd.sh(&[&member[..], &["--device", &path]].concat(), "c1", &script).expect_code(0);
    assert_eq!(run.out(), "3145728\nfrom the pod\n", "{}", run.err());
    assert!(device.content()[7 * 512..].starts_with(b"from the pod\n"));
    // The machine goes on, and the next one has it not.
    let run =
        ctd.sh(&member, "c2", &format!("[ -e {path} ] || echo none; ls /sys/block | grep -c vd"));
    assert_eq!(run.out(), "none\n0\n", "{}", run.err());
    ctd.ctr(&["task", "kill", "-s", "SIGKILL", "pod1"]).expect_code(0);
    ctd.remove("pod1");
    ctd.expect_nothing_left();
}

#[test]
fn exec_and_attach_have_streams() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    let pod = cri.run_pod(cri.pod_config("streams"));
    let mut config = cri.container_config(
        "talker",
        "echo up; while sleep 0.2; do echo tick; echo tock >&2; done & \
         while read line; do echo \"heard $line\"; echo \"$line\" >&2; \
         [ \"$line\" != end ] || exit 4; done",
    );
    config.stdin = true;
    let id = cri.start(&pod, config);
    eventually("its output", || cri.log(&pod, "talker").starts_with("up\n"));

    let mut exec = cri.exec_session(&id, "read a; echo out $a; echo err >&2; exit 3", false);
    exec.say(STDIN, b"in\n");
    assert_eq!(exec.code(), Ok(3));
    assert_eq!((exec.text(STDOUT).as_str(), exec.text(STDERR).as_str()), ("out in\n", "err\n"));
    let mut exec = cri.exec_session(&id, "true", false);
    assert_eq!(exec.code(), Ok(0));
    // What is read slowly is not lost.
    let mut exec = cri.exec_session(&id, "head -c 1000000 /dev/zero", false);
    assert_eq!(exec.code(), Ok(0));
    assert_eq!(exec.heard(STDOUT).len(), 1_000_000);

    // One with a terminal, whose size comes later.
    let script =
        "until [ \"$(stty size)\" = '30 90' ]; do sleep 0.1; done; tty; read a; echo si''zed $a";
    let mut exec = cri.exec_session(&id, script, true);
    exec.say(RESIZE, br#"{"Width":90,"Height":30}"#);
    exec.wait_for(STDOUT, "/dev/pts/");
    exec.say(STDIN, b"now\n");
    exec.wait_for(STDOUT, "sized now");
    assert_eq!(exec.code(), Ok(0));

    // To attach is to hear what comes from now on, on both streams once containerd has joined them: input comes through
    // before. Who goes leaves the process as it is.
    let attach = || {
        let mut session = cri.attach(&id, false);
        session.wait_for(STDOUT, "tick");
        session.wait_for(STDERR, "tock");
        session
    };
    let mut first = attach();
    first.say(STDIN, b"one\n");
    first.wait_for(STDOUT, "heard one");
    drop(first);
    let mut second = attach();
    second.say(STDIN, b"two\n");
    second.wait_for(STDOUT, "heard two");
    second.wait_for(STDERR, "two");
    second.say(STDIN, b"end\n");
    assert_eq!(cri.wait(&id), 4);
    second.wait();
    let log = cri.log(&pod, "talker");
    for want in ["heard one\n", "heard two\n", "heard end\n"] {
        assert!(log.contains(want), "no {want:?} in {log}");
    }
    end(&cri, &ctd, &pod);
}

#[test]
fn ports_of_a_pods_loopback_are_forwarded() {
    let ctd = pods!();
    let cri = Cri::new(&ctd);
    let pod = cri.run_pod(cri.pod_config("ports"));
    // 8080 is on IPv4's loopback alone, 8081 on IPv6's, 8082 repeats what it hears, after its end.
    let script = "mkdir /www; echo hello >/www/index.html; httpd -p 127.0.0.1:8080 -h /www; \
                  httpd -p '[::1]:8081' -h /www; \
                  printf '#!/bin/sh\ncat >/tmp/x; cat /tmp/x\n' >/back; chmod +x /back; nc -ll -p 8082 -e /back & \
                  until netstat -ltn | grep -q :8082; do sleep 0.1; done; echo ready; wait";
    let id = cri.start(&pod, cri.container_config("server", script));
    eventually("its servers", || cri.log(&pod, "server").contains("ready"));

    // As the kubelet has it done. Nobody listens at 9.
    let mut session = cri.port_forward(&pod, &[8080, 8081, 9]);
    for channel in [0, 2] {
        session.say(channel, b"GET / HTTP/1.0\r\n\r\n");
    }
    session.wait_for(0, "hello");
    session.wait_for(2, "hello");
    assert!(!session.text(4).contains("hello"), "{session:?}");
    drop(session);

    // What that comes to, which is dialling there.
    let holder = ctd.pid(&pod.id);
    let namespace = Namespace::open(Path::new(&format!("/proc/{holder}/ns/net")));
    let namespace = namespace.expect("the pod's namespace");
    for server in ["127.0.0.1:8080", "127.0.0.1:8081", "[::1]:8080", "[::1]:8081"] {
        let address: SocketAddr = server.parse().expect("an address");
        let page = http::get(&namespace, address, "/index.html");
        assert_eq!(page.expect("an answer"), "hello\n", "{server}");
    }
    let refused = http::get(&namespace, "127.0.0.1:9".parse().expect("an address"), "/");
    assert!(refused.is_err(), "{refused:?}");
    // Much, and the end of one direction before the other.
    let data: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    let mut stream = namespace
        .enter(|| std::net::TcpStream::connect("127.0.0.1:8082"))
        .expect("the namespace")
        .expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(240))).expect("a limit");
    stream.write_all(&data).expect("to be heard");
    stream.shutdown(Shutdown::Write).expect("an end");
    let mut back = Vec::new();
    stream.read_to_end(&mut back).expect("an answer");
    assert!(back == data, "{} bytes came back", back.len());
    cri.stop(&id, 0);
    end(&cri, &ctd, &pod);
}

#[test]
fn a_pods_machine_is_in_the_pods_control_group() {
    let ctd = pods!();
    let Some(parent) = Group::new() else { return };
    let cri = Cri::new(&ctd);
    let mut config = cri.pod_config("grouped");
    config.linux.mut_or_insert_default().cgroup_parent = format!("/{}", parent.name);
    let pod = cri.run_pod(config);
    let group = parent.path.join(&pod.id);
    let inside = || {
        let pids = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        let names = pids.lines().filter_map(|pid| fs::read(format!("/proc/{pid}/cmdline")).ok());
        names.map(|name| String::from_utf8_lossy(&name).into_owned()).collect::<Vec<_>>()
    };
    let has = |what: &str| inside().iter().any(|name| name.contains(what));
    assert!(has("mvm-monitor") && has("mvm-files"), "{:?}", inside());
    let id = cri.start(&pod, cri.container_config("burner", "while :; do :; done"));
    parent.limit_cpu();
    eventually("the limit to be felt", || parent.throttled() > 0);
    cri.stop(&id, 0);
    cri.remove_pod(&pod);
    assert!(!group.exists(), "{:?}", inside());
    ctd.expect_nothing_left();
}

/// A control group of the test's own, in the hierarchy that limits processors.
struct Group {
    name: String,
    path: PathBuf,
    unified: bool,
}

impl Group {
    /// One, unless the machine does not allow it, which is said.
    fn new() -> Option<Self> {
        let name = format!("mvm-tests-{}", std::process::id());
        let hierarchies = [
            ("/sys/fs/cgroup/cpu", false),
            ("/sys/fs/cgroup/cpu,cpuacct", false),
            ("/sys/fs/cgroup", true),
        ];
        let at = hierarchies.into_iter().find(|(at, unified)| {
            Path::new(at).join(if *unified { "cgroup.controllers" } else { "cpu.shares" }).exists()
        });
        let Some((at, unified)) = at else {
            eprintln!("\n*** SKIPPED: no hierarchy of control groups limits processors here ***\n");
            return None;
        };
        let path = Path::new(at).join(&name);
        if unified {
            // It may be on already.
            let _ = fs::write(Path::new(at).join("cgroup.subtree_control"), "+cpu");
        }
        if let Err(e) = fs::create_dir(&path) {
            eprintln!("\n*** SKIPPED: {} cannot be made: {e} ***\n", path.display());
            return None;
        }
        Some(Self { name, path, unified })
    }

    /// A tenth of a processor.
    fn limit_cpu(&self) {
        if self.unified {
            fs::write(self.path.join("cpu.max"), "10000 100000").expect("a limit");
        } else {
            fs::write(self.path.join("cpu.cfs_period_us"), "100000").expect("a period");
            fs::write(self.path.join("cpu.cfs_quota_us"), "10000").expect("a limit");
        }
    }

    /// How often the limit has held somebody up.
    fn throttled(&self) -> u64 {
        let stat = fs::read_to_string(self.path.join("cpu.stat")).unwrap_or_default();
        let value = stat.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        value.and_then(|v| v.parse().ok()).unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // In the other hierarchies the shim has made it, on the way to its own.
        let roots = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        let others = roots.map(|entry| entry.path().join(&self.name));
        for path in others.chain([self.path.clone()]) {
            let _ = fs::remove_dir(path);
        }
    }
}
