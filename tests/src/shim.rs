//! The shim without containerd: what is hard to have containerd ask for is asked of it directly, in
//! containerd's protocol.

use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, KillRequest, Mount, ShutdownRequest, StartRequest,
    WaitRequest,
};
use containerd_shim_protos::ttrpc::context::{Context, with_timeout};
use containerd_shim_protos::{Client, TaskClient};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::engine::settings_in;
use crate::{Finished, eventually, run_with};

/// Long enough for anything that is not stuck, on a slow and busy machine.
const DEADLINE: Duration = Duration::from_secs(300);

/// The name under which the binary is the shim.
pub(crate) const NAME: &str = "containerd-shim-mvm-v1";

/// Runs shims, each with a container.
#[derive(Debug)]
pub struct Shim {
    dir: TempDir,
    mvm: PathBuf,
}

impl Shim {
    /// A place for them.
    ///
    /// # Panics
    /// If there is none.
    pub fn new() -> Self {
        let mvm = crate::world::variable("MVM");
        // A short path: sockets are in it.
        let dir = tempfile::Builder::new().prefix("mvm-shim-").tempdir_in("/tmp");
        let dir = dir.expect("a temporary directory");
        symlink(&mvm, dir.path().join(NAME)).expect("a link to the binary");
        Self { dir, mvm }
    }

    /// Runs a shell script in a container whose root is the file system of type `kind` at `source`.
    ///
    /// # Panics
    /// If the shim does not do as it should.
    pub fn run(
        &self,
        id: &str,
        kind: &str,
        source: &Path,
        options: &[&str],
        script: &str,
    ) -> Finished {
        let serving = self.serve(id, script, &json!({}));
        serving.create(id, &[root(kind, source, options)]);
        let finished = serving.finish(id, serving.start(id));
        serving.end();
        finished
    }

    /// The same, but somebody kills the machine as soon as the script has written a line `done`.
    ///
    /// # Panics
    /// If the shim does not do as it should.
    pub fn run_killed(
        &self,
        id: &str,
        kind: &str,
        source: &Path,
        options: &[&str],
        script: &str,
    ) -> Finished {
        let serving = self.serve(id, script, &json!({}));
        serving.create(id, &[root(kind, source, options)]);
        serving.start(id).expect("a start");
        eventually("its output", || self.output(id).lines().any(|line| line == "done"));
        self.kill_machine();
        let finished = serving.finish(id, Ok(()));
        serving.end();
        finished
    }

    /// Kills the process that is the only machine there is.
    fn kill_machine(&self) {
        let listed = self.mvm(&["ps", "-q"]);
        let about = self.mvm(&["inspect", listed.trim()]);
        let about: Value = serde_json::from_str(&about).expect("JSON");
        let pid = about[0]["monitor"]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        let pid = Pid::from_raw(pid.unwrap_or_else(|| panic!("no monitor in {about}")));
        kill(pid, Signal::SIGKILL).expect("a monitor to be killed");
    }

    /// What `mvm` says of the machines here.
    fn mvm(&self, args: &[&str]) -> String {
        let mut command = Command::new(&self.mvm);
        command.arg("--root").arg(self.dir.path().join("mvm")).args(args);
        command.env("MVM_CONFIG", "/dev/null");
        run_with(command, b"", DEADLINE).expect_code(0).out()
    }

    fn output(&self, id: &str) -> String {
        let path = self.dir.path().join(id).join("out");
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    /// A pod, with nothing in it.
    ///
    /// # Panics
    /// If the shim does not do as it should.
    pub fn pod(&self, id: &str) -> Pod<'_> {
        let serving = self.serve(id, "", &kind_of(id, "sandbox"));
        serving.create(id, &[]);
        serving.start(id).expect("a sandbox");
        Pod { serving }
    }

    /// The shim of the container `id`.
    fn serve(&self, id: &str, script: &str, annotations: &Value) -> Serving<'_> {
        let bundle = self.bundle(id, script, annotations);
        let address = self.call(&bundle, id, "start").expect_code(0).out();
        let client = TaskClient::new(Client::connect(&address).expect("the shim's socket"));
        Serving { shim: self, id: id.into(), address, client }
    }

    fn bundle(&self, id: &str, script: &str, annotations: &Value) -> PathBuf {
        let bundle = self.dir.path().join(id);
        fs::create_dir(&bundle).expect("a bundle");
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": { "path": "rootfs" },
            "process": {
                "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": ["sh", "-c", script],
                "env": ["PATH=/usr/bin:/bin"],
            },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "linux": { "namespaces": [{ "type": "mount" }, { "type": "pid" }, { "type": "network" }] },
            "annotations": annotations,
        });
        fs::write(bundle.join("config.json"), spec.to_string()).expect("a specification");
        bundle
    }

    fn call(&self, bundle: &Path, id: &str, action: &str) -> Finished {
        let mut command = Command::new(self.dir.path().join(NAME));
        command.args(["-namespace", "test", "-id", id, "-address", "/no/containerd"]);
        command.arg("-bundle").arg(bundle).arg(action).current_dir(bundle);
        command.env("MVM_ROOT", self.dir.path().join("mvm"));
        command.env("MVM_CONFIG", settings_in(self.dir.path()));
        command.env_remove("MVM_ENGINE").env_remove("TTRPC_ADDRESS");
        run_with(command, b"", DEADLINE)
    }

    /// Nothing of any container is there any more: no machine, mount, socket or loop device.
    ///
    /// # Panics
    /// If something is.
    #[track_caller]
    pub fn expect_nothing_left(&self) {
        assert_eq!(self.mvm(&["ps", "-aq"]), "");
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("the mounts");
        let dir = self.dir.path().display().to_string();
        assert!(!mounts.contains(&dir), "{mounts}");
        for name in ["mvm/run/sandboxes", "mvm/run/names", "mvm/run/shims", "mvm/data/logs"] {
            let entries = fs::read_dir(self.dir.path().join(name)).into_iter().flatten().flatten();
            let left: Vec<_> = entries.map(|entry| entry.path()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

/// A pod that a shim serves.
#[derive(Debug)]
pub struct Pod<'a> {
    serving: Serving<'a>,
}

impl Pod<'_> {
    /// Starts a shell script in a container of the pod's.
    ///
    /// # Panics
    /// If the shim does not do as it should.
    pub fn start(&self, id: &str, kind: &str, source: &Path, options: &[&str], script: &str) {
        let Serving { shim, id: pod, .. } = &self.serving;
        shim.bundle(id, script, &kind_of(pod, "container"));
        self.serving.create(id, &[root(kind, source, options)]);
        self.serving.start(id).expect("a start");
    }

    /// Waits for the end of a container, and forgets it.
    ///
    /// # Panics
    /// If the shim does not do as it should.
    pub fn finish(&self, id: &str) -> Finished {
        self.serving.finish(id, Ok(()))
    }

    /// What a container has written so far.
    pub fn output(&self, id: &str) -> String {
        self.serving.shim.output(id)
    }

    /// Kills the container `id`.
    ///
    /// # Panics
    /// If the shim does not do as it should.
    pub fn kill(&self, id: &str) {
        let request = KillRequest { id: id.into(), signal: 9, ..KillRequest::default() };
        self.serving.client.kill(limit(), &request).expect("a signal");
    }

    /// Ends the pod, and with it the containers `others`.
    ///
    /// # Panics
    /// If the shim does not do as it should.
    pub fn end(self, others: &[&str]) {
        let id = self.serving.id.clone();
        self.kill(&id);
        for id in others {
            self.finish(id);
        }
        self.serving.finish(&id, Ok(()));
        self.serving.end();
    }
}

/// A shim that runs.
struct Serving<'a> {
    shim: &'a Shim,
    id: String,
    address: String,
    client: TaskClient,
}

impl fmt::Debug for Serving<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serving").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Serving<'_> {
    fn create(&self, id: &str, rootfs: &[Mount]) {
        let bundle = self.shim.dir.path().join(id);
        let stream = |name: &str| format!("file://{}", bundle.join(name).display());
        let create = CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            rootfs: rootfs.to_vec(),
            stdout: stream("out"),
            stderr: stream("err"),
            ..CreateTaskRequest::default()
        };
        self.client.create(limit(), &create).expect("a task");
    }

    fn start(&self, id: &str) -> Result<(), String> {
        let start = StartRequest { id: id.into(), ..StartRequest::default() };
        self.client.start(limit(), &start).map(drop).map_err(|e| e.to_string())
    }

    fn finish(&self, id: &str, started: Result<(), String>) -> Finished {
        let id = || id.to_owned();
        let wait = WaitRequest { id: id(), ..WaitRequest::default() };
        let ended = self.client.wait(limit(), &wait).expect("the task's end");
        self.client
            .delete(limit(), &DeleteRequest { id: id(), ..DeleteRequest::default() })
            .expect("the task to be forgotten");
        let bundle = self.shim.dir.path().join(id());
        let read = |name: &str| fs::read(bundle.join(name)).unwrap_or_default();
        Finished {
            code: i32::try_from(ended.exit_status).unwrap_or(-1),
            stdout: read("out"),
            stderr: match started {
                Ok(()) => read("err"),
                Err(e) => e.into_bytes(),
            },
        }
    }

    fn end(&self) {
        let request = ShutdownRequest { id: self.id.clone(), ..ShutdownRequest::default() };
        // The answer may not come any more.
        let _ = self.client.shutdown(limit(), &request);
        let socket = PathBuf::from(self.address.trim_start_matches("unix://"));
        eventually("the end of the shim", || !socket.exists());
        let bundle = self.shim.dir.path().join(&self.id);
        self.shim.call(&bundle, &self.id, "delete").expect_code(0);
    }
}

fn limit() -> Context {
    with_timeout(DEADLINE.as_nanos().try_into().unwrap_or(i64::MAX))
}

fn kind_of(pod: &str, kind: &str) -> Value {
    json!({ "io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": pod })
}

fn root(kind: &str, source: &Path, options: &[&str]) -> Mount {
    Mount {
        type_: kind.into(),
        source: source.display().to_string(),
        options: options.iter().map(ToString::to_string).collect(),
        ..Mount::default()
    }
}

impl Default for Shim {
    fn default() -> Self {
        Self::new()
    }
}
