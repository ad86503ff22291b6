//! A containerd of our own: its own root, state and sockets, mvm's shim on its path, and an end that
//! leaves nothing.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::cri::Cri;
use crate::engine::settings_in;
use crate::shim::NAME as SHIM;
use crate::{Finished, eventually, run_with};

/// Long enough for anything that is not stuck, on a slow and busy machine.
const DEADLINE: Duration = Duration::from_secs(300);

/// The image's name in it.
pub const IMAGE: &str = "docker.io/library/busybox:latest";

/// The name of the network of pods.
pub const NETWORK: &str = "mvm-tests";

/// The namespace in which CRI works.
const CRI_NAMESPACE: &str = "k8s.io";

/// Starts containerd, or ends the test where the machine cannot run any.
#[macro_export]
macro_rules! containerd {
    () => {
        match $crate::Containerd::start() {
            Some(containerd) => containerd,
            None => return,
        }
    };
}

/// containerd with the busybox image. Dropping it ends it and whatever it started.
#[derive(Debug)]
pub struct Containerd {
    dir: TempDir,
    daemon: Option<Child>,
    snapshotter: &'static str,
    mvm: PathBuf,
    /// containerd's, in which `ctr` works: CRI has one of its own.
    namespace: &'static str,
}

impl Containerd {
    /// Starts one; `None`, with the reason on standard error, where the machine cannot run any.
    ///
    /// # Panics
    /// If it should work here and does not.
    #[track_caller]
    pub fn start() -> Option<Self> {
        Self::start_with(None, false)
    }

    /// One whose snapshots are EROFS images, with CRI on request; `None`, with the reason on standard error, where
    /// containerd or mkfs.erofs are too old for that.
    ///
    /// # Panics
    /// If it should work here and does not.
    #[track_caller]
    pub fn with_erofs(cri: bool) -> Option<Self> {
        Self::start_with(cri.then(pods_network).as_ref(), true)
    }

    /// The same with CRI, mvm as its runtime, and a network of its own for pods.
    ///
    /// # Panics
    /// If it should work here and does not.
    #[track_caller]
    pub fn with_cri() -> Option<Self> {
        Self::with_cri_on(&pods_network())
    }

    /// The same with these plugins for the network of pods, which is called `mvm-tests`.
    ///
    /// # Panics
    /// If it should work here and does not.
    #[track_caller]
    pub fn with_cri_on(plugins: &serde_json::Value) -> Option<Self> {
        Self::start_with(Some(plugins), false)
    }

    #[track_caller]
    fn start_with(network: Option<&serde_json::Value>, erofs: bool) -> Option<Self> {
        let cri = network.is_some();
        let reason = obstacle()
            .or_else(|| if cri { network_obstacle() } else { None })
            .or_else(|| if erofs { erofs_obstacle() } else { None });
        if let Some(reason) = reason {
            eprintln!("\n*** SKIPPED: {reason} ***\n");
            return None;
        }
        let mvm = crate::world::variable("MVM");
        let image = crate::world::variable("MVM_TEST_IMAGES").join("busybox.tar");
        // A short path: sockets are in it.
        let dir = tempfile::Builder::new().prefix("mvm-ctd-").tempdir_in("/tmp");
        let dir = dir.expect("a temporary directory");
        for name in ["bin", "fifo"] {
            fs::create_dir(dir.path().join(name)).expect("a directory");
        }
        let link = dir.path().join("bin").join(SHIM);
        std::os::unix::fs::symlink(&mvm, link).expect("a link to the binary");
        let at = |name: &str| dir.path().join(name).display().to_string();
        let disabled = if cri { "" } else { "\"io.containerd.grpc.v1.cri\"" };
        let mut config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [{disabled}]\n\
             [grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n",
            at("root"),
            at("state"),
            at("grpc.sock"),
            at("ttrpc.sock")
        );
        if let Some(plugins) = network {
            config.push_str(&cri_config(dir.path(), plugins));
        }
        if erofs {
            config = config.replace("snapshotter = \"overlayfs\"", "snapshotter = \"erofs\"");
            config.push_str("[plugins.\"io.containerd.service.v1.diff-service\"]\ndefault = [\"erofs\", \"walking\"]\n");
        }
        fs::write(dir.path().join("config.toml"), config).expect("a config");
        let namespace = if cri { CRI_NAMESPACE } else { "default" };
        let mut this = Self { dir, daemon: None, snapshotter: "overlayfs", mvm, namespace };
        this.run_daemon();
        let plugins = this.ctr(&["plugins", "ls"]).expect_code(0).out();
        let works = |name: &str| {
            let is_named = |line: &&str| line.split_whitespace().nth(1) == Some(name);
            plugins.lines().filter(is_named).all(|line| line.trim_end().ends_with("ok"))
        };
        if erofs {
            assert!(works("erofs"), "{plugins}");
            this.snapshotter = "erofs";
        } else if !works("overlayfs") {
            this.snapshotter = "native";
            if cri {
                this.kill_daemon();
                let path = this.path("config.toml");
                let text = fs::read_to_string(&path).expect("the config");
                let text = text.replace("\"overlayfs\"", "\"native\"");
                fs::write(path, text).expect("the config");
                this.run_daemon();
            }
        }
        this.import(&image, IMAGE, this.snapshotter);
        Some(this)
    }

    /// Imports an image from a file.
    #[track_caller]
    pub fn import(&self, file: &Path, name: &str, snapshotter: &str) {
        let file = file.display().to_string();
        let import = ["image", "import", "--snapshotter", snapshotter, "--index-name", name];
        let done = self.ctr(&[&import[..], &[&file]].concat());
        // From version 2.1 on the daemon unpacks for one snapshotter; ctr does for the others.
        if done.code != 0 && done.err().contains("no unpack platforms") {
            self.ctr(&[&import[..], &["--local", &file]].concat()).expect_code(0);
        } else {
            done.expect_code(0);
        }
    }

    /// The snapshotter that is used unless flags say otherwise.
    pub fn snapshotter(&self) -> &str {
        self.snapshotter
    }

    /// Starts the daemon, after [`Self::kill_daemon`] once more.
    #[track_caller]
    pub fn run_daemon(&mut self) {
        let log = File::options().create(true).append(true).open(self.path("containerd.log"));
        let log = log.expect("a log");
        let path = search_path();
        let child = Command::new(program("containerd"))
            .arg("--config")
            .arg(self.path("config.toml"))
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("MVM_ROOT", self.path("mvm"))
            .env("MVM_CONFIG", settings_in(self.dir.path()))
            .env_remove("MVM_ENGINE")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("containerd");
        self.daemon = Some(child);
        eventually("containerd's answer", || self.ctr(&["version"]).code == 0);
    }

    /// Kills the daemon; what it started goes on.
    pub fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            // It may be gone already.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// A place below its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What it and its shims wrote to the log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("containerd.log")).unwrap_or_default()
    }

    /// A command line of `ctr`, not yet started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program("ctr"));
        command.arg("--address").arg(self.path("grpc.sock"));
        command.args(["--namespace", self.namespace]).args(args);
        command
    }

    /// Runs `ctr ARGS`.
    #[track_caller]
    pub fn ctr(&self, args: &[&str]) -> Finished {
        run_with(self.command(args), b"", DEADLINE)
    }

    /// A command line of `ctr run FLAGS busybox ID ARGS`, not yet started.
    pub fn run_command(&self, flags: &[&str], id: &str, args: &[&str]) -> Command {
        self.run_image_command(flags, IMAGE, id, args)
    }

    /// The same with another image.
    pub fn run_image_command(
        &self,
        flags: &[&str],
        image: &str,
        id: &str,
        args: &[&str],
    ) -> Command {
        let fifos = self.path("fifo").display().to_string();
        let mut all = vec!["run", "--snapshotter", self.snapshotter, "--fifo-dir", &fifos];
        // Another one, to compare with.
        if !flags.contains(&"--runtime") {
            all.extend(["--runtime", "io.containerd.mvm.v1"]);
        }
        all.extend(flags);
        all.extend([image, id]);
        all.extend(args);
        self.command(&all)
    }

    /// Runs `ctr run --rm FLAGS busybox ID ARGS` with `input`.
    #[track_caller]
    pub fn run(&self, flags: &[&str], id: &str, args: &[&str], input: &[u8]) -> Finished {
        let flags: Vec<&str> = ["--rm"].iter().chain(flags).copied().collect();
        run_with(self.run_command(&flags, id, args), input, DEADLINE)
    }

    /// Runs a shell script in a container that is removed afterwards.
    #[track_caller]
    pub fn sh(&self, flags: &[&str], id: &str, script: &str) -> Finished {
        self.run(flags, id, &["sh", "-c", script], b"")
    }

    /// Runs a container of this specification, which is removed afterwards.
    #[track_caller]
    pub fn run_spec(&self, id: &str, spec: &serde_json::Value) -> Finished {
        let file = self.path(&format!("{id}.json"));
        fs::write(&file, spec.to_string()).expect("a file");
        let (file, fifos) = (file.display().to_string(), self.path("fifo").display().to_string());
        let runtime = "io.containerd.mvm.v1";
        self.ctr(&[
            "run",
            "--rm",
            "--runtime",
            runtime,
            "--fifo-dir",
            &fifos,
            "--config",
            &file,
            id,
        ])
    }

    /// Starts a container in the background, with its output in `ID.log`.
    #[track_caller]
    pub fn start_container(&self, id: &str, script: &str) {
        let log = format!("file://{}", self.path(&format!("{id}.log")).display());
        let command = self.run_command(&["-d", "--log-uri", &log], id, &["sh", "-c", script]);
        run_with(command, b"", DEADLINE).expect_code(0);
    }

    /// What a container in the background wrote so far.
    pub fn output(&self, id: &str) -> String {
        fs::read_to_string(self.path(&format!("{id}.log"))).unwrap_or_default()
    }

    /// Runs a shell script in a container that runs.
    #[track_caller]
    pub fn exec(&self, id: &str, exec: &str, script: &str, input: &[u8]) -> Finished {
        let fifos = self.path("fifo").display().to_string();
        let args =
            ["task", "exec", "--fifo-dir", &fifos, "--exec-id", exec, id, "sh", "-c", script];
        run_with(self.command(&args), input, DEADLINE)
    }

    /// The status of a task as `ctr task ls` shows it; empty if there is none.
    pub fn status(&self, id: &str) -> String {
        let list = self.ctr(&["task", "ls"]).out();
        let mut rows = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = rows.find(|row| row.first() == Some(&id));
        row.and_then(|row| row.get(2).map(ToString::to_string)).unwrap_or_default()
    }

    /// The process that stands for a task.
    ///
    /// # Panics
    /// If there is no such task.
    #[track_caller]
    pub fn pid(&self, id: &str) -> Pid {
        let list = self.ctr(&["task", "ls"]).out();
        let mut rows = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = rows.find(|row| row.first() == Some(&id));
        let pid = row.and_then(|row| row.get(1).and_then(|pid| pid.parse().ok()));
        Pid::from_raw(pid.unwrap_or_else(|| panic!("no task {id} in\n{list}")))
    }

    /// Waits for the end of a task, and removes it and its container.
    #[track_caller]
    pub fn remove(&self, id: &str) {
        eventually("the end of the task", || self.status(id) == "STOPPED");
        self.ctr(&["task", "rm", id]);
        self.ctr(&["container", "rm", id]).expect_code(0);
    }

    /// `mvm ARGS` with the directories that the shims use.
    #[track_caller]
    pub fn mvm(&self, args: &[&str]) -> Finished {
        let mut command = Command::new(&self.mvm);
        command.arg("--root").arg(self.path("mvm")).args(args).env("MVM_CONFIG", "/dev/null");
        run_with(command, b"", DEADLINE)
    }

    /// The shims that this containerd has started, by the address on their command lines.
    pub fn shims(&self) -> Vec<Pid> {
        let address = self.path("grpc.sock").display().to_string();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            let mut words = line.split('\0');
            if words.next() == Some(SHIM) && words.any(|word| word == address) {
                found.push(Pid::from_raw(pid));
            }
        }
        found
    }

    /// Mounts below its directory, the last one first.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
        let mut found: Vec<_> = points.filter(|point| point.starts_with(self.dir.path())).collect();
        found.reverse();
        found
    }

    /// Waits until nothing is left of any container: what ends after its end does so at once.
    #[track_caller]
    pub fn expect_nothing_left(&self) {
        eventually("the end of all shims", || self.shims().is_empty());
        // Layers that a snapshotter has mounted are images', not containers'.
        let layers = self.path("root");
        let mounts = self.mounts().into_iter().filter(|point| !point.starts_with(&layers));
        assert_eq!(mounts.collect::<Vec<_>>(), Vec::<PathBuf>::new());
        assert_eq!(self.mvm(&["ps", "-aq"]).expect_code(0).out(), "");
        for dir in ["mvm/run/sandboxes", "mvm/run/names", "mvm/run/shims", "mvm/data/logs", "fifo"]
        {
            let entries = fs::read_dir(self.path(dir)).into_iter().flatten().flatten();
            let left: Vec<_> = entries.map(|entry| entry.path()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- containerd's log\n{}", tail(&self.log()));
        }
        if self.namespace == CRI_NAMESPACE && self.daemon.is_some() {
            Cri::clear(self);
        }
        // First whoever would start others.
        self.kill_daemon();
        for pid in self.shims() {
            let _ = kill(pid, Signal::SIGKILL);
        }
        let mut list = Command::new(&self.mvm);
        list.arg("--root").arg(self.path("mvm")).args(["ps", "-aq"]);
        if let Ok(output) = list.output() {
            for id in String::from_utf8_lossy(&output.stdout).split_whitespace() {
                let mut remove = Command::new(&self.mvm);
                let _ = remove.arg("--root").arg(self.path("mvm")).args(["rm", "-f", id]).output();
            }
        }
        for mount in self.mounts() {
            let _ = umount2(&mount, MntFlags::MNT_DETACH);
        }
    }
}

/// A program of containerd's: the machine's own, or the one in the directory that `MVM_TEST_CONTAINERD`
/// names, which may be of another version.
fn program(name: &str) -> PathBuf {
    match env::var_os("MVM_TEST_CONTAINERD") {
        Some(dir) if !dir.is_empty() => Path::new(&dir).join(name),
        _ => name.into(),
    }
}

/// Where containerd's helpers are looked for, those of its own directory first.
fn search_path() -> String {
    let path = env::var("PATH").unwrap_or_default();
    match env::var("MVM_TEST_CONTAINERD") {
        Ok(dir) if !dir.is_empty() => format!("{dir}:{path}"),
        _ => path,
    }
}

/// Why containerd cannot keep snapshots as EROFS images here.
fn erofs_obstacle() -> Option<String> {
    let said = |program: &Path, flag: &str| {
        let output = Command::new(program).arg(flag).env("PATH", search_path()).output();
        output.map(|o| {
            format!("{}{}", String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr))
        })
    };
    let version = said(&program("containerd"), "--version").unwrap_or_default();
    let number = version.split_whitespace().find_map(|word| {
        let (major, rest) = word.trim_start_matches('v').split_once('.')?;
        Some((major.parse::<u32>().ok()?, rest.split('.').next()?.parse::<u32>().ok()?))
    });
    if number.is_none_or(|number| number < (2, 1)) {
        return Some(format!(
            "the EROFS snapshotter came with containerd 2.1, and this is {:?}; MVM_TEST_CONTAINERD=DIR names another",
            version.trim()
        ));
    }
    match said(Path::new("mkfs.erofs"), "--help") {
        Ok(help) if help.contains("--tar") => None,
        Ok(_) => Some("the EROFS differ wants mkfs.erofs with --tar (erofs-utils 1.7), and this one has it not".into()),
        Err(e) => Some(format!("the EROFS differ wants mkfs.erofs, which cannot be run: {e}")),
    }
}

/// CRI with mvm as a runtime, the test image as its sandbox image, which is not pulled, and a network
/// between each pod and the host.
fn cri_config(dir: &Path, plugins: &serde_json::Value) -> String {
    let network = dir.join("net.d");
    fs::create_dir(&network).expect("a directory");
    let mut plugins = plugins.clone();
    for plugin in plugins.as_array_mut().into_iter().flatten() {
        if let Some(ipam) = plugin.get_mut("ipam") {
            ipam["dataDir"] = dir.join("addresses").display().to_string().into();
        }
    }
    let list = serde_json::json!({ "cniVersion": "0.4.0", "name": NETWORK, "plugins": plugins });
    fs::write(network.join("10-tests.conflist"), list.to_string()).expect("a network");
    format!(
        "[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = {IMAGE:?}\n\
         restrict_oom_score_adj = true\nstream_server_port = \"0\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = {:?}\nconf_dir = {:?}\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"overlayfs\"\ndefault_runtime_name = \"mvm\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.mvm]\n\
         runtime_type = \"io.containerd.mvm.v1\"\n",
        plugin_dir(),
        network.display().to_string(),
    )
}

/// A network between each pod and the host.
fn pods_network() -> serde_json::Value {
    serde_json::json!([{
        "type": "ptp",
        "ipam": {
            "type": "host-local",
            "ranges": [[{ "subnet": "10.99.77.0/24" }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
    }])
}

/// Where CNI's plugins are.
pub fn plugin_dir() -> &'static str {
    let dirs = ["/usr/lib/cni", "/opt/cni/bin"];
    dirs.into_iter().find(|dir| Path::new(dir).is_dir()).unwrap_or("/usr/lib/cni")
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// Why this machine cannot have networks for pods; what can be installed is no reason.
fn network_obstacle() -> Option<String> {
    // What the plugin for a network between pod and host does.
    let forward = "/proc/sys/net/ipv4/ip_forward";
    if let Err(e) = File::options().write(true).open(forward) {
        return Some(format!("pods need a network, and {forward} cannot be written: {e}"));
    }
    let made = Command::new("unshare").args(["--net", "ip", "link", "set", "lo", "up"]).output();
    match made {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Some(format!("pods need a network namespace, which is not to be had here: {why}"))
        }
        Err(e) => Some(format!("unshare(1) cannot be run: {e}")),
    }
}

/// Why this machine cannot run containerd; what can be installed is no reason.
fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("containerd needs root, and this is an ordinary user".into());
    }
    let mut probe = Command::new("unshare");
    probe.args(["--mount", "mount", "-t", "tmpfs", "tmpfs"]).arg(Path::new("/mnt"));
    match probe.output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Some(format!("containerd needs to mount, which is not allowed here: {why}"))
        }
        Err(e) => Some(format!("unshare(1) cannot be run: {e}")),
    }
}
