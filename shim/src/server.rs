//! The shim's process: serves containerd until the last container is deleted.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use anyhow::Context;
use containerd_shim_protos::create_task;
use containerd_shim_protos::ttrpc::Server;
use mvm_vmm::logfmt::{self, Logfmt};
use nix::libc;
use tracing_subscriber::filter::LevelFilter;

use crate::cli::Flags;
use crate::events::remote::Remote;
use crate::events::{self, Event};
use crate::host::Host;
use crate::service::Service;
use crate::task::Tasks;
use crate::vm::Machines;

/// Where containerd takes events, as it tells its shims.
const EVENTS: &str = "TTRPC_ADDRESS";

/// The fifo in the bundle that containerd reads our log from.
const LOG: &str = "log";

/// How long the last events may take.
const FLUSH: Duration = Duration::from_secs(5);

/// Serves what comes in at the listener that is our standard input.
///
/// # Errors
/// The process cannot be set up, or no machines can be made here.
pub fn serve(host: Arc<dyn Host>, flags: &Flags) -> anyhow::Result<()> {
    logfmt::common("namespace", &flags.namespace);
    // The first container is the pod's sandbox, or alone.
    logfmt::common("sandbox", &flags.id);
    log(flags.debug);
    let listener = take_listener().context("cannot take the socket over")?;
    std::env::set_current_dir("/").context("cannot leave the bundle")?;
    let events = match std::env::var(EVENTS).ok().filter(|address| !address.is_empty()) {
        Some(address) => Some(Arc::new(Remote::new(&address, &flags.namespace)?)),
        None => {
            tracing::error!("{EVENTS} is not set: containerd will hear of no events");
            None
        }
    };
    let sink: Arc<dyn events::Sink> = match &events {
        Some(remote) => Arc::<Remote>::clone(remote),
        None => Arc::new(Nobody),
    };
    let machines = Arc::new(Machines::new(host, &flags.namespace, flags.socket.clone())?);
    let backend: Arc<dyn crate::backend::Backend> = machines;
    let tasks = Arc::new(Tasks::new(&flags.namespace, Arc::clone(&backend), sink));
    let (end, ended) = mpsc::sync_channel(1);
    // A second call finds the channel full, which is as good.
    let service = Service::new(tasks, move || {
        let _ = end.try_send(());
    });
    let mut server = Server::new()
        .add_listener(listener.into_raw_fd())?
        .register_service(create_task(Arc::new(service)));
    server.start()?;
    tracing::info!("the shim is ready");
    let _ = ended.recv();
    if let Some(socket) = &flags.socket {
        // Whoever asks from now on is not to find us.
        let _ = std::fs::remove_file(socket);
    }
    backend.shut_down();
    if let Some(events) = &events {
        events.flush(FLUSH);
    }
    Ok(())
}

/// For events when containerd takes none.
struct Nobody;

impl events::Sink for Nobody {
    fn publish(&self, event: Event) {
        tracing::debug!("{} is told to nobody", event.topic());
    }
}

/// Our standard input is the listener; `/dev/null` takes its place.
fn take_listener() -> io::Result<OwnedFd> {
    let listener = io::stdin().as_fd().try_clone_to_owned()?;
    nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
    Ok(listener)
}

/// Lines go to containerd's fifo. A line for which there is no room is lost: nobody may be reading.
fn log(debug: bool) {
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let lines = tracing_subscriber::fmt().event_format(Logfmt);
    let lines = lines.with_max_level(level);
    match open_log() {
        Ok(fifo) => lines.with_writer(Mutex::new(fifo)).init(),
        // Nobody wants to hear it.
        Err(_) => lines.with_writer(io::sink).init(),
    }
}

fn open_log() -> io::Result<File> {
    let path = PathBuf::from(LOG);
    if !std::fs::metadata(&path)?.file_type().is_fifo() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // Both ends: containerd may go and come back.
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path)
}
