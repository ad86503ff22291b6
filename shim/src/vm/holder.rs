//! The process that stands for a container on the host.
//!
//! It lives in the container's network namespace and does nothing: `/proc/PID/ns/net` is what CNI
//! plugins and hooks ask for before anything of the container runs. It ends when the shim does,
//! since then its standard input ends.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};

use nix::sched::{CloneFlags, setns, unshare};

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

/// A holder that lives. Dropping it ends it.
#[derive(Debug)]
pub struct Holder {
    child: Child,
}

impl Holder {
    /// Starts one.
    ///
    /// # Errors
    /// There is no process to be had, or the namespace cannot be entered.
    pub fn start(container: &str, network: &Network) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0(format!("{PROCESS_NAME}: {container}")).arg(SUBCOMMAND);
        match network {
            Network::Host => command.arg("host"),
            Network::New => command.arg("new"),
            Network::Join(path) => command.arg("join").arg(path),
        };
        command.env_clear().current_dir("/").process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut holder = Self { child: command.spawn()? };
        let mut report = String::new();
        if let Some(pipe) = holder.child.stdout.take() {
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
        self.child.id()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Nothing to be done about one that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the holder does: enters, reports, and waits for the end of its standard input.
pub fn main() -> ExitCode {
    let report = match enter() {
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
            Ok(0) => return ExitCode::SUCCESS,
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return ExitCode::FAILURE,
        }
    }
}

fn enter() -> Result<(), String> {
    let _ = nix::sys::prctl::set_name(c"mvm-holder");
    let args: Vec<_> = std::env::args_os().skip(2).collect();
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
