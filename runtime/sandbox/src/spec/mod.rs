//! From an image's configuration and the user's flags to the OCI runtime specification of the
//! container's process, with docker's meaning and docker's defaults.
//!
//! Two decisions differ from a container that shares the host's kernel:
//!
//! * No seccomp filter by default. A filter protects the kernel below the process; that kernel is
//!   the guest's own, the boundary to the host is the machine. A profile can still be given.
//! * No network namespace: the guest has one container, so the guest's own is the container's.

mod caps;
mod debug;
mod limits;
mod mounts;
pub mod volumes;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use oci_spec::OciSpecError;
use oci_spec::image::Config as ImageConfig;
use oci_spec::runtime::{
    Hook, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder, LinuxNamespaceBuilder,
    LinuxNamespaceType, LinuxResourcesBuilder, LinuxSeccomp, PosixRlimit, PosixRlimitBuilder,
    Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};

use crate::network::Names;
pub use caps::parse_capability;
pub use debug::{Console, console};
pub use limits::{CpuShare, Ulimit, parse_size, signal_name, signal_number};
pub use mounts::Tmpfs;

/// Period of the CPU quota, microseconds.
const CPU_PERIOD: u64 = 100_000;

/// Docker's search path for an image that names none.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why no specification can be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing to run.
    #[error("the image names no command to run; give one after the image: `mvm run IMAGE COMMAND`")]
    NoCommand,
    /// A working directory must be absolute.
    #[error("the working directory {0:?} is not an absolute path")]
    WorkingDirectory(String),
    /// No such capability.
    #[error("unknown capability {0:?}; names are like NET_ADMIN, and ALL means every one")]
    Capability(String),
    /// A value of the form `KEY=VALUE` has no key.
    #[error("invalid environment variable {0:?}: the name is empty or holds a zero byte")]
    Environment(String),
    /// A value does not have the form it should.
    #[error("invalid {what} {value:?}: {rule}")]
    Invalid {
        /// What it is the value of.
        what: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        rule: String,
    },
    /// Nothing in the guest could be a debug console's shell.
    #[error(
        "no container runs in this guest whose shell a debug console could have; \
         `--shell FILE` takes a statically linked one from the host"
    )]
    NoShell,
    /// The specification does not hold together.
    #[error("cannot build the runtime specification: {0}")]
    Spec(#[from] OciSpecError),
}

/// What the user asks for beyond the image's own configuration.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Program and arguments in place of the image's.
    pub command: Vec<String>,
    /// In place of the image's entry point; an empty string clears it.
    pub entrypoint: Option<String>,
    /// `KEY=VALUE`, later ones win.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`.
    pub user: Option<String>,
    /// Host name in the guest; the container's id if not given.
    pub hostname: Option<String>,
    /// A terminal.
    pub terminal: bool,
    /// Columns and rows of that terminal.
    pub console_size: Option<(u16, u16)>,
    /// The root file system is not to be written.
    pub read_only: bool,
    /// Memory file systems.
    pub tmpfs: Vec<Tmpfs>,
    /// Directories and files of the host ([`volumes::resolve`]).
    pub volumes: Vec<volumes::Volume>,
    /// Resource limits.
    pub ulimits: Vec<Ulimit>,
    /// Capabilities beyond docker's default set.
    pub cap_add: Vec<String>,
    /// Capabilities taken away.
    pub cap_drop: Vec<String>,
    /// Every capability, nothing masked.
    pub privileged: bool,
    /// `execve` gives no new privileges.
    pub no_new_privileges: bool,
    /// A seccomp profile in the form of the runtime specification.
    pub seccomp: Option<LinuxSeccomp>,
    /// CPU quota.
    pub cpus: Option<CpuShare>,
    /// Labels: shown by `mvm ps`, not part of the specification.
    pub labels: BTreeMap<String, String>,
    /// Annotations of the specification.
    pub annotations: BTreeMap<String, String>,
    /// What the guest's files say of its network.
    pub names: Names,
}

/// A file that the host provides in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProvidedFile {
    /// Its name among the provided ones.
    pub name: Cow<'static, str>,
    /// What is in it.
    pub data: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
}

/// Where the guest finds provided files.
pub const PROVIDED_DIR: &str = "/run/mvm/volumes";

/// What a container's root is made of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Root {
    /// The read-only EROFS image on the first disk, with guest memory above.
    #[default]
    Image,
    /// The share of this name, as it is.
    Share(String),
    /// A disk, as it is.
    Disk {
        /// Its place among the machine's disks.
        index: u32,
        /// The file system on it.
        system: FileSystem,
    },
    /// The disk at a place of a machine that runs, as it is.
    Plugged {
        /// The place.
        place: u32,
        /// The file system on it.
        system: FileSystem,
    },
    /// A directory that the guest has already, with guest memory above.
    Directory(String),
}

/// A file system on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystem {
    /// Its type, as mount(8) calls it.
    pub kind: String,
    /// Options of its own for the mount, `key=value` or `key`.
    pub options: Vec<String>,
    /// It cannot be written.
    pub read_only: bool,
}

/// A directory in guest memory that the containers of one machine have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    /// Its name among the provided files and volumes.
    pub name: String,
    /// The most that it can hold, in bytes.
    pub size: u64,
}

/// A block device of the host that the machine has as a disk, and by whose numbers the specification calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GivenDevice {
    /// The host's number of its driver.
    pub major: u32,
    /// The host's number of the device with that driver.
    pub minor: u32,
    /// The number of its register window: its place among the machine's disks.
    pub place: u32,
}

/// A specification and the files it mounts.
#[derive(Debug, Clone)]
pub struct Container {
    /// The specification.
    pub spec: Spec,
    /// Its root.
    pub root: Root,
    /// Files it bind-mounts.
    pub files: Vec<ProvidedFile>,
    /// Directories and files of the host that it bind-mounts.
    pub volumes: Vec<volumes::Volume>,
    /// Memory that it bind-mounts.
    pub memory: Vec<Memory>,
    /// Block devices that it has.
    pub devices: Vec<GivenDevice>,
    /// What its `startContainer` hooks are told, a JSON object (OCI runtime.md, "State"); empty without such hooks.
    pub hook_state: Vec<u8>,
}

impl Container {
    /// How long its `startContainer` hooks may take, all together.
    pub fn hooks_limit(&self) -> Duration {
        /// How long one may take that does not say it itself. The agent knows the same.
        const LIMIT: Duration = Duration::from_secs(300);
        /// What is as good as no limit, and can be added to the time.
        const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);
        let hooks = self.spec.hooks().as_ref().and_then(|h| h.start_container().as_deref());
        let limit = |hook: &Hook| {
            let seconds = hook.timeout().and_then(|t| u64::try_from(t).ok()).filter(|t| *t > 0);
            seconds.map_or(LIMIT, Duration::from_secs)
        };
        let all = hooks.unwrap_or_default().iter().map(limit);
        all.fold(Duration::ZERO, Duration::saturating_add).min(LONGEST)
    }
}

/// Makes the specification of the container `id`.
pub fn container(id: &str, image: &ImageConfig, options: &Options) -> Result<Container, Error> {
    let hostname = options.hostname.clone().unwrap_or_else(|| id.to_owned());
    let file = |name: &'static str, text: String| ProvidedFile {
        name: name.into(),
        data: text.into_bytes(),
        mode: 0o644,
    };
    let names = &options.names;
    let mut files = vec![
        file("hostname", format!("{hostname}\n")),
        file("hosts", hosts(&hostname, &names.addresses)),
    ];
    if let Some(text) = &names.resolv_conf {
        files.push(file("resolv.conf", text.clone()));
    }
    let user = options.user.clone().or_else(|| image.user().clone()).unwrap_or_default();
    let (uid, gid, username) = user_ids(&user);
    let mut user = UserBuilder::default().uid(uid).gid(gid);
    if let Some(username) = username {
        user = user.username(username);
    }

    let mut process = ProcessBuilder::default()
        .terminal(options.terminal)
        .user(user.build()?)
        .args(command(image, options)?)
        .env(environment(image, options, &hostname)?)
        .cwd(working_directory(image, options)?)
        .capabilities(capability_sets(uid == 0, options)?)
        .rlimits(rlimits(&options.ulimits)?)
        .no_new_privileges(options.no_new_privileges);
    if let Some((columns, rows)) = options.console_size {
        process = process.console_size(
            oci_spec::runtime::BoxBuilder::default()
                .height(u64::from(rows))
                .width(u64::from(columns))
                .build()?,
        );
    }

    let annotations: HashMap<String, String> = options.annotations.clone().into_iter().collect();
    let spec = SpecBuilder::default()
        .version("1.2.0")
        .root(RootBuilder::default().path("rootfs").readonly(options.read_only).build()?)
        .hostname(hostname)
        .process(process.build()?)
        .mounts(mounts::all(image, options, &files, &options.volumes)?)
        .annotations(annotations)
        .linux(linux(id, options)?)
        .build()?;
    let volumes = options.volumes.clone();
    Ok(Container {
        spec,
        root: Root::Image,
        files,
        volumes,
        memory: Vec::new(),
        devices: Vec::new(),
        hook_state: Vec::new(),
    })
}

fn linux(id: &str, options: &Options) -> Result<oci_spec::runtime::Linux, Error> {
    let mut namespaces = Vec::new();
    for kind in [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Cgroup,
    ] {
        namespaces.push(LinuxNamespaceBuilder::default().typ(kind).build()?);
    }
    let mut resources = LinuxResourcesBuilder::default();
    if let Some(quota) = options.cpus.and_then(|c| c.quota(CPU_PERIOD)) {
        resources =
            resources.cpu(LinuxCpuBuilder::default().quota(quota).period(CPU_PERIOD).build()?);
    }
    let hidden = |paths: &[&str]| -> Vec<String> {
        if options.privileged {
            Vec::new()
        } else {
            paths.iter().map(ToString::to_string).collect()
        }
    };
    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces)
        .resources(resources.build()?)
        .cgroups_path(PathBuf::from(format!("/mvm/{id}")))
        .masked_paths(hidden(&MASKED_PATHS))
        .readonly_paths(hidden(&READONLY_PATHS));
    if let Some(seccomp) = &options.seccomp {
        linux = linux.seccomp(seccomp.clone());
    }
    Ok(linux.build()?)
}

/// Docker's list of what is hidden.
const MASKED_PATHS: [&str; 11] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

/// Docker's list of what is read-only.
const READONLY_PATHS: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Docker's rule: a new entry point also drops the image's arguments.
fn command(image: &ImageConfig, options: &Options) -> Result<Vec<String>, Error> {
    let mut args: Vec<String> = match &options.entrypoint {
        Some(program) if program.is_empty() => Vec::new(),
        Some(program) => vec![program.clone()],
        None => image.entrypoint().clone().unwrap_or_default(),
    };
    if !options.command.is_empty() {
        args.extend(options.command.iter().cloned());
    } else if options.entrypoint.is_none() {
        args.extend(image.cmd().clone().unwrap_or_default());
    }
    if args.is_empty() { Err(Error::NoCommand) } else { Ok(args) }
}

fn working_directory(image: &ImageConfig, options: &Options) -> Result<PathBuf, Error> {
    let given = options.cwd.clone().or_else(|| image.working_dir().clone()).unwrap_or_default();
    match given.as_str() {
        "" => Ok("/".into()),
        path if path.starts_with('/') => Ok(path.into()),
        // An image may carry a relative one, which docker takes from the root.
        path if options.cwd.is_none() => Ok(PathBuf::from(format!("/{path}"))),
        _ => Err(Error::WorkingDirectory(given)),
    }
}

/// The variables, later ones replacing earlier ones of the same name in place.
fn environment(
    image: &ImageConfig,
    options: &Options,
    hostname: &str,
) -> Result<Vec<String>, Error> {
    let mut env: Vec<String> = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if options.terminal {
        env.push("TERM=xterm".to_owned());
    }
    let image_env = image.env().clone().unwrap_or_default();
    for entry in image_env.iter().chain(&options.env) {
        merge_variable(&mut env, entry)?;
    }
    Ok(env)
}

/// Adds `entry`; one without `=` removes the variable, as docker has it.
pub fn merge_variable(env: &mut Vec<String>, entry: &str) -> Result<(), Error> {
    let (name, value) = match entry.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (entry, None),
    };
    if name.is_empty() || entry.contains('\0') {
        return Err(Error::Environment(entry.to_owned()));
    }
    let same = |e: &String| e.split('=').next() == Some(name);
    match (env.iter().position(same), value) {
        (Some(at), Some(_)) => env[at] = entry.to_owned(),
        (None, Some(_)) => env.push(entry.to_owned()),
        (Some(at), None) => drop(env.remove(at)),
        (None, None) => {}
    }
    Ok(())
}

/// Numbers are used as they are; a name, or a number whose group the image decides, is left to
/// the guest, which has the image's `/etc/passwd`.
pub fn user_ids(user: &str) -> (u32, u32, Option<String>) {
    let (name, group) = match user.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (user, None),
    };
    let uid = if name.is_empty() { Some(0) } else { name.parse().ok() };
    match (uid, group.map(str::parse)) {
        (Some(uid), Some(Ok(gid))) => (uid, gid, None),
        (Some(0), None) => (0, 0, Some("0".to_owned())),
        (uid, _) => (uid.unwrap_or(0), 0, Some(user.to_owned())),
    }
}

/// Gives a process another user, and the capabilities that go with it. All that the container may
/// have is in its first process's bounding set.
pub fn change_user(
    process: &mut Process,
    user: Option<&str>,
    privileged: bool,
) -> Result<(), Error> {
    if let Some(user) = user {
        let (uid, gid, username) = user_ids(user);
        let mut new = UserBuilder::default().uid(uid).gid(gid);
        if let Some(username) = username {
            new = new.username(username);
        }
        process.set_user(new.build()?);
    }
    if !privileged && user.is_none() {
        return Ok(());
    }
    let bounding = match privileged {
        true => caps::all(),
        false => {
            let own = process.capabilities().as_ref();
            own.and_then(|c| c.bounding().clone()).unwrap_or_default()
        }
    };
    let root = process.user().uid() == 0;
    process.set_capabilities(Some(sets(root, bounding)?));
    Ok(())
}

fn capability_sets(
    root: bool,
    options: &Options,
) -> Result<oci_spec::runtime::LinuxCapabilities, Error> {
    let set = if options.privileged {
        caps::all()
    } else {
        caps::effective(&options.cap_add, &options.cap_drop)?
    };
    sets(root, set)
}

/// Without root the kernel keeps only what is in the bounding set, as with docker.
fn sets(root: bool, set: caps::Set) -> Result<oci_spec::runtime::LinuxCapabilities, Error> {
    let held = if root { set.clone() } else { caps::Set::new() };
    Ok(LinuxCapabilitiesBuilder::default()
        .bounding(set)
        .effective(held.clone())
        .permitted(held)
        .inheritable(caps::Set::new())
        .ambient(caps::Set::new())
        .build()?)
}

fn rlimits(ulimits: &[Ulimit]) -> Result<Vec<PosixRlimit>, Error> {
    let mut limits: Vec<PosixRlimit> = Vec::new();
    for limit in ulimits {
        let entry = PosixRlimitBuilder::default()
            .typ(limit.kind)
            .soft(limit.soft)
            .hard(limit.hard)
            .build()?;
        limits.retain(|l| l.typ() != limit.kind);
        limits.push(entry);
    }
    Ok(limits)
}

fn hosts(hostname: &str, addresses: &[IpAddr]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n",
    );
    if addresses.is_empty() {
        text.push_str(&format!("127.0.1.1\t{hostname}\n"));
    }
    for address in addresses {
        text.push_str(&format!("{address}\t{hostname}\n"));
    }
    text
}

#[cfg(test)]
mod tests;
