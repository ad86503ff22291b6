//! The shim without containerd: what is hard to have containerd ask for is asked of it directly, in
//! containerd's protocol.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, Mount, ShutdownRequest, StartRequest, WaitRequest,
};
use containerd_shim_protos::ttrpc::context::with_timeout;
use containerd_shim_protos::{Client, TaskClient};
use serde_json::json;
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
        });
        fs::write(bundle.join("config.json"), spec.to_string()).expect("a specification");
        let address = self.call(&bundle, id, "start").expect_code(0).out();
        let client = TaskClient::new(Client::connect(&address).expect("the shim's socket"));
        let limit = || with_timeout(DEADLINE.as_nanos().try_into().unwrap_or(i64::MAX));
        let stream = |name: &str| format!("file://{}", bundle.join(name).display());
        let create = CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            rootfs: vec![Mount {
                type_: kind.into(),
                source: source.display().to_string(),
                options: options.iter().map(ToString::to_string).collect(),
                ..Mount::default()
            }],
            stdout: stream("out"),
            stderr: stream("err"),
            ..CreateTaskRequest::default()
        };
        let id = || id.to_owned();
        client.create(limit(), &create).expect("a task");
        let start = StartRequest { id: id(), ..StartRequest::default() };
        let started = client.start(limit(), &start);
        let wait = WaitRequest { id: id(), ..WaitRequest::default() };
        let ended = client.wait(limit(), &wait).expect("the task's end");
        client
            .delete(limit(), &DeleteRequest { id: id(), ..DeleteRequest::default() })
            .expect("the task to be forgotten");
        // The answer may not come any more.
        let _ =
            client.shutdown(limit(), &ShutdownRequest { id: id(), ..ShutdownRequest::default() });
        let socket = PathBuf::from(address.trim_start_matches("unix://"));
        eventually("the end of the shim", || !socket.exists());
        let read = |name: &str| fs::read(bundle.join(name)).unwrap_or_default();
        let finished = Finished {
            code: i32::try_from(ended.exit_status).unwrap_or(-1),
            stdout: read("out"),
            stderr: match started {
                Ok(_) => read("err"),
                Err(e) => e.to_string().into_bytes(),
            },
        };
        self.call(&bundle, &create.id, "delete").expect_code(0);
        finished
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
        let mut list = Command::new(&self.mvm);
        list.arg("--root").arg(self.dir.path().join("mvm")).args(["ps", "-aq"]);
        list.env("MVM_CONFIG", "/dev/null");
        assert_eq!(run_with(list, b"", DEADLINE).expect_code(0).out(), "");
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

impl Default for Shim {
    fn default() -> Self {
        Self::new()
    }
}
