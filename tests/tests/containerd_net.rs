//! Networks of containers that containerd starts: by CNI, by hooks, and none.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mvm_net::Namespace;
use mvm_net::cni::Attachment;
use mvm_tests::cri::{Cri, Pod};
use mvm_tests::{
    Chroot, Containerd, NETWORK, World, containerd, eventually, http, plugin_dir, run_with,
};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

/// Longer than anything that is not stuck takes.
const PATIENCE: Duration = Duration::from_secs(240);

/// What the container does: it shows its network and serves a page.
const SERVE: &str = "ip addr show eth0; ip route; ip -6 route; echo MTU $(cat /sys/class/net/eth0/mtu); \
                     mkdir /tmp/www; echo hello >/tmp/www/index.html; echo ready; \
                     exec httpd -f -p 80 -h /tmp/www";

/// A network namespace in place of the host's, so that the host has nothing of what is made.
struct Outside(String);

impl Outside {
    fn new(test: &str) -> Self {
        let name = format!("mvme2e-{}-{test}", std::process::id());
        Namespace::create(&name).expect("a network namespace; this needs root");
        Self(name)
    }

    /// A command line that is run in it.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}/{}", Namespace::DIRECTORY, self.0)).arg(program);
        command
    }

    fn run(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        let mut command = self.command(words.next().expect("a program"));
        command.args(words);
        run_with(command, b"", PATIENCE).expect_code(0).out()
    }

    /// Gets the page that [`SERVE`] serves.
    #[track_caller]
    fn fetch(&self, server: &str) {
        let path = Path::new(Namespace::DIRECTORY).join(&self.0);
        let namespace = Namespace::open(&path).expect("the namespace");
        let address = server.parse().expect("an address");
        eventually(&format!("an answer from {server}"), || {
            http::get(&namespace, address, "/index.html").is_ok_and(|page| page == "hello\n")
        });
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = Namespace::remove(&self.0);
    }
}

/// Ends a container in the background.
#[track_caller]
fn end(ctd: &Containerd, id: &str) {
    ctd.ctr(&["task", "kill", "-s", "SIGKILL", id]).expect_code(0);
    ctd.remove(id);
}

/// Where CNI's plugins are, if the host has them.
fn plugins() -> Option<&'static str> {
    let found = ["/usr/lib/cni", "/opt/cni/bin"].into_iter().find(|dir| {
        ["ptp", "host-local"].iter().all(|plugin| Path::new(dir).join(plugin).exists())
    });
    if found.is_none() {
        eprintln!("SKIPPED: there are no CNI plugins here (Debian: containernetworking-plugins)");
    }
    found
}

#[test]
fn ctrs_cni_makes_the_network_between_create_and_start() {
    let Some(plugins) = plugins() else { return };
    let ctd = containerd!();
    let outside = Outside::new("cni");
    let config = ctd.path("net.d");
    fs::create_dir(&config).expect("a directory");
    let list = json!({
        "cniVersion": "0.4.0", "name": "e2e", "plugins": [{
            "type": "ptp", "mtu": 1400, "ipam": {
                "type": "host-local", "dataDir": ctd.path("leases"),
                "ranges": [[{ "subnet": "10.93.0.0/24" }], [{ "subnet": "fd00:93::/64" }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] } }] });
    fs::write(config.join("10-e2e.conflist"), list.to_string()).expect("a network");
    // ctr takes networks and plugins from places of its own choice: others are mounted there, for it alone.
    let script = format!(
        "mkdir -p /etc/cni/net.d /opt/cni/bin && mount --bind {} /etc/cni/net.d && \
         {{ [ {plugins} = /opt/cni/bin ] || mount --bind {plugins} /opt/cni/bin; }} && exec \"$@\"",
        config.display()
    );
    let log = format!("file://{}", ctd.path("c1.log").display());
    let run = |inner: Command| {
        let mut command = outside.command("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh"]).arg(inner.get_program());
        command.args(inner.get_args());
        run_with(command, b"", PATIENCE)
    };
    run(ctd.run_command(&["-d", "--cni", "--log-uri", &log], "c1", &["sh", "-c", SERVE]))
        .expect_code(0);
    eventually("its output", || ctd.output("c1").contains("ready"));
    let out = ctd.output("c1");
    for want in ["inet 10.93.0.2/24", "inet6 fd00:93::2/64", "default via 10.93.0.1", "MTU 1400"] {
        assert!(out.contains(want), "no {want:?} in\n{out}");
    }
    outside.fetch("10.93.0.2:80");
    outside.fetch("[fd00:93::2]:80");
    // From version 1.7 on ctr takes the network down at the end, for which it looks for it again.
    run(ctd.command(&["task", "kill", "-s", "SIGKILL", "c1"])).expect_code(0);
    eventually("the end of the task", || ctd.status("c1") == "STOPPED");
    run(ctd.command(&["task", "rm", "c1"])).expect_code(0);
    run(ctd.command(&["container", "rm", "c1"])).expect_code(0);
    // The namespace is gone, and the cable's other end with it.
    eventually("the end of the cable", || !outside.run("ip -o link show").contains("veth"));
    ctd.expect_nothing_left();
}

/// A specification of a container that serves, with a root of its own.
fn spec(ctd: &Containerd, root: &Chroot, script: &str) -> Value {
    let default = ctd.ctr(&["oci", "spec"]).expect_code(0).out();
    let mut spec: Value = serde_json::from_str(&default).expect("a specification");
    spec["root"]["path"] = root.path().display().to_string().into();
    spec["root"]["readonly"] = false.into();
    spec["process"]["args"] = json!(["sh", "-c", script]);
    spec
}

fn hook(script: &str) -> Value {
    json!([{
        "path": "/bin/sh", "args": ["sh", "-ec", script],
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
    }])
}

#[test]
fn hooks_of_the_host_make_interfaces_and_take_them_away() {
    let ctd = containerd!();
    let outside = Outside::new("hook");
    let root = Chroot::new(&World::new().image_file("busybox"));
    let mut spec = spec(&ctd, &root, &SERVE.replace("exec httpd", "ip addr show eth1; httpd"));
    let at_outside = format!("nsenter --net={}/{}", Namespace::DIRECTORY, outside.0);
    let make = format!(
        "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/')
         for n in 0 1; do
            {at_outside} ip link add out$n type veth peer name eth$n netns $pid
            {at_outside} ip addr add 10.94.$n.1/24 dev out$n
            {at_outside} ip link set out$n up
         done"
    );
    // This one is in the container's namespace.
    let name = "for n in 0 1; do ip addr add 10.94.$n.2/24 dev eth$n; ip link set eth$n up; done
                ip route add default via 10.94.0.1";
    let gone = ctd.path("gone");
    spec["hooks"] = json!({
        "createRuntime": hook(&make),
        "createContainer": hook(name),
        "poststop": hook(&format!("cat >{}; readlink /proc/self/ns/net >>{0}", gone.display())),
    });
    let file = ctd.path("spec.json");
    fs::write(&file, spec.to_string()).expect("a file");
    let (file, fifos) = (file.display().to_string(), ctd.path("fifo").display().to_string());
    let log = format!("file://{}", ctd.path("c1.log").display());
    let runtime = "io.containerd.mvm.v1";
    let args = ["run", "-d", "--log-uri", &log, "--runtime", runtime, "--fifo-dir", &fifos];
    ctd.ctr(&[&args[..], &["--config", &file, "c1"]].concat()).expect_code(0);
    outside.fetch("10.94.0.2:80");
    outside.fetch("10.94.1.2:80");
    let out = ctd.output("c1");
    for want in ["inet 10.94.0.2/24", "inet 10.94.1.2/24", "default via 10.94.0.1"] {
        assert!(out.contains(want), "no {want:?} in\n{out}");
    }
    assert!(ctd.mvm(&["inspect", "default.c1"]).expect_code(0).out().contains("10.94.1.2/24"));
    end(&ctd, "c1");
    let told = fs::read_to_string(&gone).expect("what the last hook wrote");
    let own = fs::read_link("/proc/self/ns/net").expect("a namespace").display().to_string();
    assert!(told.contains("\"status\":\"stopped\"") && told.contains(&own), "{told}");
    assert!(!outside.run("ip -o link show").contains("out0"));

    spec["hooks"] = json!({ "createContainer": hook("echo no way >&2; exit 1") });
    let run = ctd.run_spec("c2", &spec);
    assert!(run.code != 0 && run.err().contains("no way"), "{}", run.err());
    ctd.expect_nothing_left();
}

#[test]
fn a_named_namespace_is_free_again_after_a_killed_shim() {
    let ctd = containerd!();
    let (inside, outside) = (Outside::new("in"), Outside::new("out"));
    inside.run(&format!("ip link add eth0 type veth peer name out0 netns {}", outside.0));
    for (namespace, device, host) in [(&inside, "eth0", 2), (&outside, "out0", 1)] {
        namespace.run(&format!("ip addr add 10.95.0.{host}/24 dev {device}"));
        namespace.run(&format!("ip link set {device} up"));
    }
    let log = format!("file://{}", ctd.path("c1.log").display());
    let namespace = format!("network:{}/{}", Namespace::DIRECTORY, inside.0);
    let flags = ["-d", "--with-ns", &namespace, "--log-uri", &log];
    let start = |id: &str| ctd.run_command(&flags, id, &["sh", "-c", SERVE]);
    run_with(start("c1"), b"", PATIENCE).expect_code(0);
    outside.fetch("10.95.0.2:80");
    assert!(inside.run("ip -o link show").contains("mvm0"));
    for shim in ctd.shims() {
        kill(shim, Signal::SIGKILL).expect("a shim to be killed");
    }
    eventually("the interface to be free", || {
        !inside.run("ip -o link show").contains("mvm0")
            && !inside.run("tc qdisc show dev eth0").contains("ingress")
    });
    eventually("the end of the task", || {
        ctd.ctr(&["task", "rm", "c1"]);
        ctd.status("c1").is_empty()
    });
    run_with(start("c2"), b"", PATIENCE).expect_code(0);
    outside.fetch("10.95.0.2:80");
    end(&ctd, "c2");
    assert!(!inside.run("ip -o link show").contains("mvm0"));
    assert!(!inside.run("tc qdisc show dev eth0").contains("ingress"));
    ctd.ctr(&["container", "rm", "c1"]);
    eventually("the end of what was killed", || ctd.mvm(&["ps", "-aq"]).out().is_empty());
    ctd.expect_nothing_left();
}

#[test]
fn the_hosts_network_is_refused_and_an_empty_one_is_loopback() {
    let ctd = containerd!();
    let run = ctd.sh(&["--net-host"], "c1", "true");
    assert!(run.code != 0 && run.err().contains("the host's own network"), "{}", run.err());
    let run = ctd.sh(&[], "c2", "ls /sys/class/net").expect_code(0);
    assert!(!run.out().contains("eth0") && run.out().contains("lo"), "{}", run.out());
    ctd.expect_nothing_left();
}

/// What containerd's CRI has kept of a pod's network, as the plugins were asked for it: to ask them again.
fn attachment(ctd: &Containerd, plugins: &Value, pod: &Pod) -> Attachment {
    let read = |path: &Path| -> Value {
        let text = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        serde_json::from_slice(&text).expect("JSON")
    };
    let kept = read(Path::new(&format!("/var/lib/cni/results/{NETWORK}-{}-eth0", pod.id)));
    let bundle = format!("state/io.containerd.runtime.v2.task/k8s.io/{}/config.json", pod.id);
    let spec = read(&ctd.path(&bundle));
    let mut namespaces = spec["linux"]["namespaces"].as_array().expect("namespaces").iter();
    let network = namespaces.find(|namespace| namespace["type"] == "network").expect("a network's");
    let attachment = json!({
        "network": { "name": NETWORK, "version": "0.4.0", "plugins": plugins },
        "plugin_dirs": [plugin_dir()],
        "container": pod.id,
        "namespace": network["path"],
        "ports": [],
        "result": kept["result"],
    });
    serde_json::from_value(attachment).expect("an attachment")
}

/// CRI-O asks the plugins so, for each pod that runs when it is restarted.
#[test]
fn plugins_find_a_running_pods_network_as_they_made_it() {
    // Not another's: the plugin leaves its bridge.
    let bridge = format!("mvmt{}", std::process::id());
    struct Bridge<'a>(&'a str);
    impl Drop for Bridge<'_> {
        fn drop(&mut self) {
            let _ = Command::new("ip").args(["link", "del", self.0]).output();
        }
    }
    let _bridge = Bridge(&bridge);
    let ipam = |dir: &Path| {
        json!({ "type": "host-local", "dataDir": dir, "routes": [{ "dst": "0.0.0.0/0" }],
                "ranges": [[{ "subnet": "10.99.78.0/24" }], [{ "subnet": "fd00:9978::/64" }]] })
    };
    for first in
        [json!({ "type": "ptp" }), json!({ "type": "bridge", "bridge": bridge, "isGateway": true })]
    {
        let with = |dir: &Path| {
            let mut first = first.clone();
            first["ipam"] = ipam(dir);
            json!([first])
        };
        // Where addresses are kept is containerd's own directory, whose name is not known before.
        let Some(ctd) = Containerd::with_cri_on(&with(Path::new(""))) else { return };
        let plugins = with(&ctd.path("addresses"));
        let cri = Cri::new(&ctd);
        let pod = cri.run_pod(cri.pod_config("checked"));
        let id = cri.start(&pod, cri.container_config("server", SERVE));
        eventually("its output", || cri.log(&pod, "server").ends_with("ready\n"));
        let attached = attachment(&ctd, &plugins, &pod);
        attached.check().unwrap_or_else(|e| panic!("{first}: {e}"));
        // It is looked at in earnest: something that is not as it was is found.
        let namespace = serde_json::to_value(&attached).expect("plain data")["namespace"].clone();
        let namespace =
            Namespace::open(Path::new(namespace.as_str().expect("a path"))).expect("the pod's");
        let mut remove = Command::new("ip");
        remove.args(["addr", "del", &format!("{}/24", cri.address(&pod)), "dev", "eth0"]);
        let removed = namespace.enter(|| Ok(run_with(remove, b"", PATIENCE))).expect("entered");
        removed.expect("the program").expect_code(0);
        let found = attached.check().expect_err("an address is missing").to_string();
        assert!(found.contains("CHECK"), "{found}");
        drop(namespace);
        cri.remove(&id);
        cri.remove_pod(&pod);
        ctd.expect_nothing_left();
        let leases = fs::read_dir(ctd.path("addresses").join(NETWORK))
            .expect("what was given away")
            .flatten();
        let leases: Vec<_> = leases.map(|e| e.file_name().into_string().expect("a name")).collect();
        assert!(
            !leases.iter().any(|name| name.starts_with("10.") || name.starts_with("fd00")),
            "{leases:?}"
        );
        assert!(attached.check().is_err(), "the pod is gone");
        attached.delete().expect("what is gone can be taken away again");
    }
}
