//! One machine for all tests of this file, booted through `mvm-sandbox` as `mvm run` boots one.
//! Every case is a container of its own in it, made by the agent's own calls: a specification is
//! sent as it is, also one that no flag of `mvm run` could say and no library type could hold.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use mvm_agent_protocol::messages::{
    BlockDevice, CreateContainerRequest, DeleteContainerRequest, Empty, ExecProcessRequest,
    InlineFile, LaunchFailure, Rootfs, SignalProcessRequest, StartProcessRequest, Stdio, Tmpfs,
    Volume, WaitProcessRequest,
};
use mvm_agent_protocol::rpc::{CallError, Client};
use mvm_agent_protocol::stream::{Header, Kind};
use mvm_agent_protocol::{VOLUMES_DIR, WAIT_MAX_MS, port};
use mvm_image::{Owners, from_directory};
use mvm_sandbox::engine::{EmuTier, EngineChoice, Guest, Selection, Wish, look};
use mvm_sandbox::guest::Dialer;
use mvm_sandbox::layout::Layout;
use mvm_sandbox::machine::{Launcher, Machine as Monitored, MachinePlan, Payload};
use mvm_sandbox::registry::Registry;
use mvm_sandbox::spec::{Options, container};
use mvm_sandbox::timings::Timings;
use mvm_sandbox::{Description, Disk, Sandbox};
use mvm_tests::{Chroot, World};
use mvm_vmm::config::HugePages;
use mvm_vmm::config::OwnerGone;
use mvm_vmm::monitor::spawn::Error as SpawnError;
use mvm_vmm::monitor::{Launch, spawn};
use oci_spec::image::Config as ImageConfig;
use serde_json::{Value, json};

/// Long enough for anything that is not stuck.
const LIMIT: Duration = Duration::from_secs(120);

/// Guest memory in bytes.
const MEMORY: u64 = 256 << 20;

/// vCPUs: two, so that there is something to choose from.
const VCPUS: u32 = 2;

/// Starts monitors of the binary under test, which end with this process.
#[derive(Debug)]
struct UnderTest(PathBuf);

impl Launcher for UnderTest {
    fn launch(&self, mut launch: Launch) -> Result<Box<dyn Monitored>, SpawnError> {
        launch.program.clone_from(&self.0);
        launch.config.owner_gone = OwnerGone::End;
        Ok(Box::new(spawn(launch)?))
    }
}

struct Machine {
    _sandbox: Sandbox,
    dialer: Dialer,
    client: Client,
    /// Kept last: its directory goes after the machine.
    _world: World,
}

impl Machine {
    fn boot() -> Self {
        let world = World::new();
        let layout = Layout::at(world.root());
        let images = world.image_file("busybox");
        let guest = images.parent().expect("a directory");
        let open = |name: &str| {
            let path = guest.join(name);
            File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let rootfs = world.root().join("rootfs.erofs");
        let tree = Chroot::new(&images);
        add_hostile_links(&tree.path().join("hostile")).expect("links");
        from_directory(&tree.path(), &rootfs, Owners::Keep).expect("an image");
        let plan = MachinePlan {
            vcpus: VCPUS,
            memory: MEMORY,
            memory_max: 0,
            hugepages: HugePages::default(),
            engine: selection(&layout),
            cpu: None,
            kernel: Payload::file(open("vmlinux")),
            initramfs: Some(Payload::file(open("initramfs.cpio"))),
            disks: vec![Disk {
                file: File::open(&rootfs).expect("a root file system"),
                read_only: true,
            }],
            disk_slots: 0,
            shares: None,
            cmdline: String::new(),
            console: None,
            boot_limit: LIMIT,
            owner_gone: OwnerGone::End,
        };
        let registry = Registry::open(layout).expect("a registry");
        let about = Description { vcpus: VCPUS, memory: MEMORY, ..Description::default() };
        let mut sandbox = Sandbox::create(&registry, about).expect("a sandbox");
        let launcher = UnderTest(world.binary().to_path_buf());
        sandbox.boot(&launcher, plan, &mut Timings::start(), None).expect("a booted machine");
        let dialer = Dialer::new(&sandbox.place().dir, LIMIT);
        let control = dialer.dial(port::CONTROL).expect("the agent's control port");
        let client = Client::new(control).expect("a client");
        Self { _sandbox: sandbox, dialer, client, _world: world }
    }
}

/// The engine under test.
fn selection(layout: &Layout) -> Selection {
    let (engine, tier) = mvm_tests::engine_and_tier();
    let choice = if engine == "kvm" { EngineChoice::Kvm } else { EngineChoice::Emu };
    let tier = tier.map_or_else(EmuTier::default, |tier| tier.parse().expect("a tier"));
    let outlook = look(layout, Wish { choice, tier, ..Wish::default() });
    outlook.and_then(|o| o.decide(Guest::Linux)).unwrap_or_else(|e| panic!("{e}"))
}

/// What an image can hold to lead a runtime astray.
fn add_hostile_links(dir: &Path) -> io::Result<()> {
    std::fs::create_dir(dir)?;
    for (link, target) in [
        ("abs", "/etc"),
        ("up", "../../../../../../../.."),
        ("dangling", "/made/by/a/link"),
        ("file", "../made/file"),
        ("loop", "loop"),
        ("magic", "/proc/self/root"),
        ("cwd", "/proc/self/cwd"),
    ] {
        symlink(target, dir.join(link))?;
    }
    Ok(())
}

static MACHINE: OnceLock<Mutex<Option<Machine>>> = OnceLock::new();

extern "C" fn end_machine() {
    drop(slot(&MACHINE).take());
}

fn slot(
    machine: &'static OnceLock<Mutex<Option<Machine>>>,
) -> MutexGuard<'static, Option<Machine>> {
    machine.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection to the one machine.
fn guest() -> (Client, Dialer) {
    let mut machine = slot(&MACHINE);
    let machine = machine.get_or_insert_with(|| {
        // Statics are never dropped, and the machine must not be left behind.
        // SAFETY: registers a function that takes nothing and does not unwind.
        unsafe { libc::atexit(end_machine) };
        Machine::boot()
    });
    (machine.client.clone(), machine.dialer.clone())
}

/// A container to be.
#[derive(Debug, Clone)]
pub struct Case {
    /// The specification.
    pub spec: Value,
    /// The agent's small init in front.
    pub init: bool,
    /// Files that bind mounts find at [`volume`].
    pub files: Vec<(&'static str, Vec<u8>)>,
    /// Whether the root has an upper layer.
    pub writable: bool,
}

/// Where a file of a case is in the guest.
pub fn volume(name: &str) -> String {
    format!("{VOLUMES_DIR}/{name}")
}

/// A container as `mvm run busybox sh -c SCRIPT` makes it.
pub fn sh(script: &str) -> Case {
    run(&["sh", "-c", script])
}

/// A container as `mvm run busybox ARGS` makes it.
pub fn run(args: &[&str]) -> Case {
    let options = Options {
        command: args.iter().map(ToString::to_string).collect(),
        user: Some("0:0".into()),
        ..Options::default()
    };
    let made = container("case", &ImageConfig::default(), &options).expect("a specification");
    let mut spec = serde_json::to_value(made.spec).expect("JSON");
    // The files of the host are not what is tested here, nor is the name of the group.
    let mounts = spec["mounts"].as_array_mut().expect("mounts");
    mounts.retain(|m| m["type"] != "bind");
    spec["linux"].as_object_mut().expect("linux").remove("cgroupsPath");
    Case { spec, init: false, files: Vec::new(), writable: true }
}

/// JSON merge patch (RFC 7386): objects are merged, null removes, all else replaces.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let target = target.as_object_mut().expect("an object");
    for (key, value) in patch {
        if value.is_null() {
            target.remove(&key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

impl Case {
    /// With the specification changed by a merge patch.
    pub fn with(mut self, patch: Value) -> Self {
        merge(&mut self.spec, patch);
        self
    }

    /// With a further mount.
    pub fn mount(mut self, mount: Value) -> Self {
        self.spec["mounts"].as_array_mut().expect("mounts").push(mount);
        self
    }

    /// With a further namespace.
    pub fn namespace(mut self, namespace: Value) -> Self {
        self.spec["linux"]["namespaces"].as_array_mut().expect("namespaces").push(namespace);
        self
    }

    /// Without a namespace of its own.
    pub fn without_namespace(mut self, kind: &str) -> Self {
        let list = self.spec["linux"]["namespaces"].as_array_mut().expect("namespaces");
        list.retain(|ns| ns["type"] != kind);
        self
    }

    /// With the same capabilities in all sets.
    pub fn capabilities(self, names: &[&str]) -> Self {
        self.with(json!({"process": {"capabilities": {
            "bounding": names, "effective": names, "permitted": names,
            "inheritable": [], "ambient": [],
        }}}))
    }

    /// With a file for bind mounts.
    pub fn file(mut self, name: &'static str, data: impl AsRef<[u8]>) -> Self {
        self.files.push((name, data.as_ref().to_vec()));
        self
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn run(self) -> Outcome {
        let what = self.spec["process"]["args"].to_string();
        self.start().unwrap_or_else(|e| panic!("{what} was refused: {e}")).finish()
    }

    /// Runs it to its successful end and returns what it wrote.
    #[track_caller]
    pub fn out(self) -> String {
        let outcome = self.run();
        assert_eq!((outcome.code, outcome.signal), (0, 0), "{outcome:#?}");
        outcome.out
    }

    /// The message with which it is refused. Nothing may be left: the same name can be used again.
    #[track_caller]
    pub fn refused(self) -> String {
        let what = self.spec.to_string();
        let id = fresh_id();
        let message = match self.start_as(&id) {
            Ok(_) => panic!("not refused: {what}"),
            Err(message) => message,
        };
        assert!(!message.contains("panicked") && message.len() < 1000, "{message}");
        let left = guest().0.list_containers(&Empty::new(), LIMIT).expect("a list").containers;
        assert!(left.iter().all(|c| c.id != id), "{what} is refused and half there");
        message
    }

    /// Starts it.
    pub fn start(self) -> Result<Running, String> {
        self.start_as(&fresh_id())
    }

    /// Starts it under a name.
    pub fn start_as(self, id: &str) -> Result<Running, String> {
        let terminal = self.spec["process"]["terminal"] == true;
        let (client, dialer) = guest();
        let mut rootfs = Rootfs::new();
        let mut lower = BlockDevice::new();
        lower.set_index(0);
        rootfs.set_block(lower);
        if self.writable {
            rootfs.set_tmpfs(Tmpfs { size_bytes: 16 << 20, ..Default::default() });
        }
        let volumes = self.files.iter().map(|(name, data)| {
            let mut volume = Volume { name: (*name).into(), ..Default::default() };
            volume.set_file(InlineFile { data: data.clone(), mode: 0o755, ..Default::default() });
            volume
        });
        let request = CreateContainerRequest {
            id: id.into(),
            spec_json: self.spec.to_string().into_bytes(),
            rootfs: Some(rootfs).into(),
            volumes: volumes.collect(),
            stdio: Some(stdio(terminal)).into(),
            init: self.init,
            state_json: format!("{{\"id\":\"{id}\"}}").into_bytes(),
            ..Default::default()
        };
        let made = client.create_container(&request, LIMIT).map_err(|e| e.to_string())?;
        check(made.failure.into_option())?;
        let process = Attached::new(&dialer, id, "", terminal);
        let running = Running { client, dialer, id: id.into(), notices: made.notices, process };
        start(&running.client, id, "")?;
        Ok(running)
    }
}

fn fresh_id() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("case{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

fn stdio(terminal: bool) -> Stdio {
    let pipes = !terminal;
    Stdio { stdin: pipes, stdout: pipes, stderr: pipes, terminal, ..Default::default() }
}

fn check(failure: Option<LaunchFailure>) -> Result<(), String> {
    failure.map_or(Ok(()), |f| Err(format!("{:?}: {}", f.kind.enum_value_or_default(), f.message)))
}

fn start(client: &Client, container: &str, process: &str) -> Result<(), String> {
    let request = StartProcessRequest {
        container_id: container.into(),
        process_id: process.into(),
        ..Default::default()
    };
    let started = client.start_process(&request, LIMIT).map_err(|e| e.to_string())?;
    check(started.failure.into_option())
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Exit code.
    pub code: u32,
    /// Signal that ended it, or 0.
    pub signal: u32,
    /// Whether the kernel killed for want of memory.
    pub oom: bool,
    /// Standard output, or the terminal's.
    pub out: String,
    /// Standard error.
    pub err: String,
    /// What is not honoured.
    pub notices: Vec<String>,
}

/// The joined ends of a process.
struct Attached {
    input: UnixStream,
    output: BufReader<UnixStream>,
    error: Option<JoinHandle<String>>,
}

impl Attached {
    fn new(dialer: &Dialer, container: &str, process: &str, terminal: bool) -> Self {
        let attach = |kind| {
            let mut stream = dialer.dial(port::STREAM).expect("the agent's stream port");
            let header =
                Header { container_id: container.into(), process_id: process.into(), kind };
            header.write(&mut stream).expect("a header");
            header.confirm(&mut stream).expect("an attached stream");
            stream
        };
        if terminal {
            let stream = attach(Kind::Terminal);
            let input = stream.try_clone().expect("a copy");
            return Self { input, output: BufReader::new(stream), error: None };
        }
        let mut error = attach(Kind::Stderr);
        let error = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = error.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        Self {
            input: attach(Kind::Stdin),
            output: BufReader::new(attach(Kind::Stdout)),
            error: Some(error),
        }
    }
}

/// A container that has been started.
pub struct Running {
    client: Client,
    dialer: Dialer,
    id: String,
    /// What is not honoured.
    pub notices: Vec<String>,
    process: Attached,
}

impl Running {
    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Reads its output up to a line that contains `text`.
    #[track_caller]
    pub fn until(&mut self, text: &str) -> String {
        let mut all = String::new();
        loop {
            let mut line = String::new();
            let n = self.process.output.read_line(&mut line).expect("output");
            all.push_str(&line);
            if line.contains(text) {
                return all;
            }
            assert_ne!(n, 0, "it ended without {text:?}: {all}");
        }
    }

    /// Writes to its input.
    #[track_caller]
    pub fn write(&mut self, text: &str) {
        self.process.input.write_all(text.as_bytes()).expect("input");
    }

    /// Sends it a signal.
    #[track_caller]
    pub fn signal(&self, signal: u32) {
        let request =
            SignalProcessRequest { container_id: self.id.clone(), signal, ..Default::default() };
        self.client.signal_process(&request, LIMIT).expect("a sent signal");
    }

    /// Any other call.
    pub fn call<R>(
        &self,
        call: impl FnOnce(&Client, Duration) -> Result<R, CallError>,
    ) -> Result<R, String> {
        call(&self.client, LIMIT).map_err(|e| e.to_string())
    }

    /// Runs a further process to its end.
    pub fn exec(&self, process: Value) -> Result<Outcome, String> {
        let terminal = process["terminal"] == true;
        let name = fresh_id();
        let request = ExecProcessRequest {
            container_id: self.id.clone(),
            process_id: name.clone(),
            process_json: process.to_string().into_bytes(),
            stdio: Some(stdio(terminal)).into(),
            ..Default::default()
        };
        let made = self.client.exec_process(&request, LIMIT).map_err(|e| e.to_string())?;
        check(made.failure.into_option())?;
        let attached = Attached::new(&self.dialer, &self.id, &name, terminal);
        start(&self.client, &self.id, &name)?;
        Ok(self.wait(&name, attached, made.notices))
    }

    /// Waits for its end, then takes it apart.
    #[track_caller]
    pub fn finish(mut self) -> Outcome {
        let process = std::mem::replace(
            &mut self.process,
            Attached {
                input: UnixStream::pair().expect("a pair").0,
                output: BufReader::new(UnixStream::pair().expect("a pair").0),
                error: None,
            },
        );
        let notices = std::mem::take(&mut self.notices);
        self.wait("", process, notices)
    }

    fn wait(&self, process: &str, mut attached: Attached, notices: Vec<String>) -> Outcome {
        // The input stays open until the output has ended: a terminal has both in one.
        let mut out = Vec::new();
        if attached.error.is_some() {
            let _ = attached.input.shutdown(std::net::Shutdown::Write);
        }
        let _ = attached.output.read_to_end(&mut out);
        let err = attached.error.map_or_else(String::new, |e| e.join().expect("its errors"));
        let request = WaitProcessRequest {
            container_id: self.id.clone(),
            process_id: process.into(),
            timeout_ms: WAIT_MAX_MS,
            ..Default::default()
        };
        let ended = loop {
            let answer = self.client.wait_process(&request, LIMIT).expect("its end");
            if !answer.running {
                break answer;
            }
        };
        Outcome {
            code: ended.exit_code,
            signal: ended.signal,
            oom: ended.oom_killed,
            out: String::from_utf8_lossy(&out).into_owned(),
            err,
            notices,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let request = DeleteContainerRequest {
            container_id: self.id.clone(),
            force: true,
            ..Default::default()
        };
        let gone = self.client.delete_container(&request, LIMIT);
        if !std::thread::panicking() {
            gone.expect("the container goes");
        }
    }
}
