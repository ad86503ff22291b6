//! The process that stands for a container on the host.
//!
//! It lives in the container's network namespace and does nothing: `/proc/PID/ns/net` is what CNI
//! plugins and hooks ask for before anything of the container runs. When the shim is killed its standard
//! input ends: it takes away what is left of the container ([`cleanup::clear`]), and ends too.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};

use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::Spec;

use super::cgroup;
use crate::cleanup;
use crate::host::Host;

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "shim-holder";

/// Its name in the process list, before the container's.
const PROCESS_NAME: &str = "mvm-holder";

/// Longest report of a holder that could not do it.
const MAX_REPORT: u64 = 4096;

/// Which network namespace a container has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// The host's.
    Host,
    /// A new one.
    New,
    /// The one at this path.
    Join(PathBuf),
}

/// What the holder takes away if the shim is killed.
#[derive(Debug, Clone, Copy)]
pub struct Heritage<'a> {
    /// The container's id.
    pub id: &'a str,
    /// Its bundle.
    pub bundle: &'a Path,
    /// Where the shim listens.
    pub socket: &'a Path,
}

/// A holder that lives. Dropping it ends it.
#[derive(Debug)]
pub struct Holder {
    pid: u32,
    /// `None` once it has retired.
    child: Mutex<Option<Child>>,
}

impl Holder {
    /// Starts one.
    ///
    /// # Errors
    /// There is no process to be had, or the namespace cannot be entered.
    pub fn start(heritage: Heritage<'_>, network: &Network) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0(format!("{PROCESS_NAME}: {}", heritage.id)).arg(SUBCOMMAND);
        command.arg(heritage.id).arg(heritage.bundle).arg(heritage.socket);
        match network {
            Network::Host => command.arg("host"),
            Network::New => command.arg("new"),
            Network::Join(path) => command.arg("join").arg(path),
        };
        // The environment says where things are kept.
        command.current_dir("/").process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        let pipe = child.stdout.take();
        let holder = Self { pid: child.id(), child: Mutex::new(Some(child)) };
        let mut report = String::new();
        if let Some(pipe) = pipe {
            pipe.take(MAX_REPORT).read_to_string(&mut report)?;
        }
        // Dropped, and so ended, if it could not do it.
        match report.as_str() {
            "ready" => Ok(holder),
            "" => Err(io::Error::other("the holder process ended at once")),
            why => Err(io::Error::other(why.to_owned())),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Ends it with the process that it stands for: who hears of that one's end may look whether the
    /// process id is gone. Should the shim be killed after that, what is left is containerd's to clean up, by
    /// the shim's `delete`.
    pub fn retire(&self) {
        let child = self.child.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut child) = child {
            // Nothing to be done about one that is gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.retire();
    }
}

/// What the holder does: enters, reports, and waits for the end of its standard input.
pub fn main(host: &dyn Host) -> ExitCode {
    let home = File::open("/proc/self/ns/net");
    let args: Vec<_> = std::env::args_os().skip(2).collect();
    let [id, bundle, socket] = [0, 1, 2].map(|at| args.get(at).cloned().unwrap_or_default());
    let (id, bundle, socket) = (id.to_string_lossy(), Path::new(&bundle), Path::new(&socket));
    // The bundle may be gone before the shim is.
    let spec = Spec::load(bundle.join("config.json"));
    let report = match enter(args.get(3..).unwrap_or_default()) {
        Ok(()) => "ready".to_owned(),
        Err(why) => why,
    };
    let told = io::stdout().write_all(report.as_bytes()).and_then(|()| io::stdout().flush());
    let null = File::options().write(true).open("/dev/null");
    // The reader waits for the end of what we say.
    let closed = null.and_then(|null| Ok(nix::unistd::dup2_stdout(&null)?));
    if report != "ready" || told.is_err() || closed.is_err() {
        return ExitCode::FAILURE;
    }
    let mut nothing = [0; 64];
    loop {
        match io::stdin().read(&mut nothing) {
            Ok(0) => break,
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return ExitCode::FAILURE,
        }
    }
    if UnixStream::connect(socket).is_ok() {
        // containerd was quicker: it has cleaned up, and has begun anew under the same id. What is in the bundle now
        // is another container's.
        return ExitCode::SUCCESS;
    }
    // Hooks are run where the shim was.
    let back = home.and_then(|home| Ok(setns(home, CloneFlags::CLONE_NEWNET)?));
    let cleared = back.map(|()| cleanup::clear(host, &id, bundle, socket));
    if let Ok(spec) = spec {
        cgroup::abandon(&spec);
    }
    match cleared {
        Ok(Ok(())) => ExitCode::SUCCESS,
        // Nobody listens any more. What is left is seen by `mvm ps`.
        _ => ExitCode::FAILURE,
    }
}

fn enter(args: &[OsString]) -> Result<(), String> {
    let _ = nix::sys::prctl::set_name(c"mvm-holder");
    match (args.first().and_then(|a| a.to_str()), args.get(1)) {
        (Some("host"), None) => Ok(()),
        (Some("new"), None) => unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|e| format!("cannot make a network namespace: {e}")),
        (Some("join"), Some(path)) => {
            let path = PathBuf::from(path);
            let failed = |e: &dyn std::fmt::Display| {
                format!("cannot enter the network namespace {}: {e}", path.display())
            };
            let file = File::open(&path).map_err(|e| failed(&e))?;
            setns(file, CloneFlags::CLONE_NEWNET).map_err(|e| failed(&e))
        }
        _ => Err("a holder is started by the shim alone".into()),
    }
}
