//! From the first instruction to serving the host.
//!
//! The time until the host hears hello is counted, so only what cannot wait comes before it: the
//! listening sockets, to which the host connects as soon as it has heard. Mounts and control
//! groups are made while the host reads.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mvm_agent_protocol::messages::Hello;
use mvm_agent_protocol::{PROTOCOL_VERSION, hello, port};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{chdir, chroot};

use crate::cgroup::Cgroups;
use crate::container::Workshop;
use crate::error::{Context, Error, Result};
use crate::info;
use crate::log::{self, error, warning};
use crate::power::Machine;
use crate::reaper::Reaper;
use crate::rootfs::mount_if_possible;
use crate::service::Service;
use crate::sys;
use crate::transport::{Listener, Transport};
use crate::zygote::Zygote;

/// How long the host may take to answer hello.
const ANSWER: Duration = Duration::from_secs(30);

/// Open files that processes may have unless the specification says otherwise.
const OPEN_FILES: u64 = 1 << 20;

/// `MOUNT_ATTR_NOSUID`, `NODEV`, `NOEXEC`.
const NOSUID: u64 = 2;
const NODEV: u64 = 4;
const NOEXEC: u64 = 8;

struct Listeners {
    control: Listener,
    stream: Listener,
}

fn listen(transport: &Transport) -> Result<Listeners> {
    let on = |port| transport.listen(port).context(|| format!("listen on port {port}"));
    Ok(Listeners { control: on(port::CONTROL)?, stream: on(port::STREAM)? })
}

/// PID 1 of a guest. `start_ns` is when the program began, in `CLOCK_BOOTTIME`.
pub fn guest(start_ns: u64) -> ! {
    match serve_guest(start_ns) {
        Ok(never) => match never {},
        Err(e) => {
            log::use_kernel_log();
            error!("cannot serve the host: {e}");
            // The end of PID 1 would be a kernel panic with a less clear reason.
            Machine::Guest.stop_now()
        }
    }
}

fn serve_guest(start_ns: u64) -> Result<std::convert::Infallible> {
    let listeners = listen(&Transport::Vsock)?;
    let greeting = say_hello(&Transport::Vsock, start_ns)?;
    leave_initramfs()?;
    mount_all();
    log::use_kernel_log();
    prepare_process();
    // From here on the kernel may want to kill for memory: never this process or the zygote.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let zygote = Zygote::start().context(|| "fork the zygote".into())?;
    let _ = sys::loopback_up();
    let cgroups = Cgroups::open(Path::new("/sys/fs/cgroup"));
    if let Some(stream) = greeting {
        take_answer(stream, Machine::Guest)?;
    }
    serve(listeners, zygote, cgroups, Machine::Guest)
}

/// On a host, for trying it out without a virtual machine: sockets in `dir`, a mount namespace of
/// its own, containers as in a guest.
pub fn host(dir: PathBuf, start_ns: u64) -> Result<std::convert::Infallible> {
    let transport = Transport::Unix(dir);
    let listeners = listen(&transport)?;
    let greeting = say_hello(&transport, start_ns)?;
    unshare(CloneFlags::CLONE_NEWNS)
        .context(|| "make a mount namespace (root is needed)".into())?;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .context(|| "separate the mounts from the host's".into())?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>)
        .context(|| "mount a tmpfs on /run".into())?;
    nix::sys::prctl::set_child_subreaper(true).context(|| "become a subreaper".into())?;
    let zygote = Zygote::start().context(|| "fork the zygote".into())?;
    let cgroups = Cgroups::open(Path::new("/sys/fs/cgroup"));
    if let Some(stream) = greeting {
        take_answer(stream, Machine::Host)?;
    }
    serve(listeners, zygote, cgroups, Machine::Host)
}

fn say_hello(transport: &Transport, start_ns: u64) -> Result<Option<UnixStream>> {
    let stream = transport.dial_hello().context(|| "dial the host's hello port".into())?;
    let Some(mut stream) = stream else { return Ok(None) };
    let message = Hello {
        protocol_version: PROTOCOL_VERSION,
        agent_version: env!("CARGO_PKG_VERSION").into(),
        kernel_release: info::kernel_release(),
        agent_start_ns: start_ns,
        ready_ns: sys::clock_ns(libc::CLOCK_BOOTTIME),
        ..Default::default()
    };
    hello::send(&mut stream, &message).map_err(|e| Error::State(e.to_string()))?;
    Ok(Some(stream))
}

fn take_answer(mut stream: UnixStream, machine: Machine) -> Result<()> {
    stream.set_read_timeout(Some(ANSWER)).context(|| "set a timeout".into())?;
    let answer = hello::read_answer(&mut stream).map_err(|e| Error::State(e.to_string()))?;
    if !answer.accepted {
        return Err(Error::State(format!("the host refuses this agent: {}", answer.reason)));
    }
    if answer.unix_time_ns != 0
        && let Err(e) = machine.set_clock(answer.unix_time_ns)
    {
        warning!("{e}");
    }
    Ok(())
}

/// Makes a tmpfs the root. The root that the kernel starts with cannot be pivoted away from, which
/// containers need to do.
fn leave_initramfs() -> Result<()> {
    let what = || "make a tmpfs the root".to_owned();
    let staging = "/root";
    std::fs::create_dir_all(staging).context(what)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), staging, Some("tmpfs"), flags, Some("mode=0755")).context(what)?;
    chdir(staging).context(what)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context(what)?;
    chroot(".").context(what)?;
    chdir("/").context(what)
}

fn mount_all() {
    mount_if_possible("/proc", "proc", &[], NOSUID | NODEV | NOEXEC);
    mount_if_possible("/sys", "sysfs", &[], NOSUID | NODEV | NOEXEC);
    mount_if_possible("/dev", "devtmpfs", &["mode=0755"], NOSUID | NOEXEC);
    mount_if_possible("/dev/pts", "devpts", &["mode=0620", "ptmxmode=0666"], NOSUID | NOEXEC);
    mount_if_possible("/dev/shm", "tmpfs", &["mode=1777"], NOSUID | NODEV);
    mount_if_possible("/sys/fs/cgroup", "cgroup2", &["nsdelegate"], NOSUID | NODEV | NOEXEC);
    for dir in ["/run/mvm", "/tmp"] {
        let _ = std::fs::create_dir_all(dir);
    }
}

/// What all processes inherit from PID 1.
fn prepare_process() {
    for (resource, limit) in
        [(Resource::RLIMIT_NOFILE, OPEN_FILES), (Resource::RLIMIT_NPROC, libc::RLIM_INFINITY)]
    {
        if let Err(e) = setrlimit(resource, limit, limit) {
            warning!("cannot raise {resource:?}: {e}");
        }
    }
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
}

fn serve(
    listeners: Listeners,
    zygote: Zygote,
    cgroups: Cgroups,
    machine: Machine,
) -> Result<std::convert::Infallible> {
    let reaper = Reaper::start().context(|| "start the reaper".into())?;
    let service = Arc::new(Service::new(Workshop { zygote, reaper, cgroups }, machine));
    let streams = Arc::clone(&service);
    std::thread::Builder::new()
        .name("streams".into())
        .spawn(move || streams.serve_streams(&listeners.stream))
        .context(|| "start the stream server".into())?;
    service.serve_calls(&listeners.control);
    Err(Error::State("the control server has ended".into()))
}
