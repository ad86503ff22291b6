//! `mvm run`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, bail};
use mvm_sandbox::ending::Ending;
use mvm_sandbox::guest::Stdio;
use mvm_sandbox::logfile::LogWriter;
use mvm_sandbox::machine::{MachinePlan, MonitorLauncher};
use mvm_sandbox::network::Wish;
use mvm_sandbox::spec::volumes::Volume;
use mvm_sandbox::spec::{self, Container, CpuShare, parse_size, signal_name, signal_number};
use mvm_sandbox::timings::Timings;
use mvm_sandbox::unikernel::Recognised;
use mvm_sandbox::{Description, Disk, EXIT_FAILURE, Error, Sandbox, engine};
use mvm_vmm::config::{HugePages, OwnerGone};
use nix::libc::{SIGINT, SIGPIPE, SIGTERM};

use super::attach::{Attachment, End, stand_by};
use super::modules;
use super::{Context, unikernel, volumes};
use crate::cli::{RunArgs, TimingsFormat};
use crate::images::{self, Ready};
use crate::output::{EXIT_CLOSED, causes, complain, size};
use crate::settings::{Config, Origin, Setting, Settings};
use crate::signals::{ENDING, Signals};
use crate::terminal::{self, Raw};
use crate::{detach, embedded, env_file};

/// The least memory with which the guest's kernel, agent and a small program live. What less would
/// do to a larger kernel or initramfs of the user's own, the monitor finds out.
const MIN_MEMORY: u64 = 64 << 20;

/// How long the streams of an ended container may be silent. Its processes are all gone, so this
/// only bounds a guest that does not answer.
const GRACE: Duration = Duration::from_secs(30);

/// Runs a container and returns the exit code for the user.
pub fn run(context: &Context, args: &RunArgs) -> anyhow::Result<i32> {
    let mut timings = Timings::start();
    // Everything that can be refused is refused before anything is made.
    modules::single(&args.initrd)?;
    let mut settings = Settings::of_run(args, &Config::load(&context.settings)?)?;
    let mut options = options(args, &settings)?;
    // What it is for is not known yet.
    Resources::of(&settings, mvm_vmm::layout::MIN_MEMORY)?;
    let stop_signal =
        args.stop_signal.as_deref().map(signal_number).transpose().context("--stop-signal")?;
    if args.tty && !args.detach {
        terminal::require()?;
    }
    let registry = context.registry()?;
    if let Some(name) = &args.name {
        mvm_sandbox::registry::check_name(name).map_err(Error::from)?;
    }
    let wish = network(args, &settings)?;
    let outlook = engine::look(&context.layout, settings.wish(args.force)).map_err(Error::from)?;
    let ready = images::ready(&images::store(&context.layout)?, args.image(), args.pull)?;
    timings.mark("image");
    let size = match unikernel::recognise(args, &options, &ready)? {
        Recognised::Unikernel(plan) => {
            return unikernel::run(context, args, &settings, &ready, plan, &mut timings);
        }
        Recognised::Linux(size) => size,
    };
    if args.vsock.is_some() {
        bail!("--vsock cannot hold for a container: what it has of the kind is its agent's");
    }
    if !args.disk.is_empty() {
        bail!("--disk cannot hold for a container: it is for unikernels; see --volume and --mount");
    }
    settings.suggest(size);
    let resources = Resources::of(&settings, MIN_MEMORY)?;
    let note = growth(&settings, &resources)?;
    options.cpus = Some(resources.cpus);
    let engine = outlook.decide(engine::Guest::Linux).map_err(Error::from)?;
    let kernel = embedded::kernel(settings.kernel.value.as_deref())?;
    let initramfs = embedded::initramfs(settings.initrd.value.as_deref())?;
    if args.detach && !args.background {
        return detach::start();
    }
    if args.background {
        detach::leave_session()?;
    }
    if let Some(note) = note {
        complain(&format!("note: {note}"));
    }

    let signals = Signals::catch()?;
    let config = ready.image.configuration().config().clone().unwrap_or_default();
    let stop_signal = match stop_signal {
        Some(number) => number,
        None => config.stop_signal().as_deref().map_or(Ok(SIGTERM), signal_number)?,
    };
    let mut labels: BTreeMap<String, String> =
        config.labels().clone().unwrap_or_default().into_iter().collect();
    labels.extend(options.labels.clone());
    let about = Description {
        name: args.name.clone(),
        image: args.image().to_owned(),
        image_digest: ready.image.manifest().to_string(),
        labels,
        vcpus: resources.cpus.vcpus(),
        memory: resources.memory,
        tty: args.tty,
        detached: args.detach,
        auto_remove: args.rm,
        stop_signal,
        stop_timeout: settings.stop_timeout.value,
    };
    let mut sandbox = Sandbox::create(&registry, about)?;
    match sandbox.connect(&wish) {
        Ok(names) => options.names = names.unwrap_or_default(),
        Err(e) => return give_up(sandbox, e),
    }
    if wish != Wish::None {
        timings.mark("network");
    }
    let container = spec::container(sandbox.id(), &config, &options).map_err(Error::from)?;
    let shares = container.volumes.iter().map(Volume::share).collect::<Result<Vec<_>, _>>();
    let shares = match shares {
        // Without anything to share the guest has no such device, and needs no server.
        Ok(shares) => (!shares.is_empty()).then_some(shares),
        Err(e) => return give_up(sandbox, Error::Setup(e.to_string())),
    };
    let boot_limit = settings.boot_limit();
    let plan = MachinePlan {
        vcpus: resources.cpus.vcpus(),
        memory: resources.memory,
        memory_max: resources.memory_max,
        hugepages: settings.hugepages.value,
        engine,
        cpu: settings.cpu.value,
        kernel,
        initramfs: Some(initramfs),
        disks: vec![Disk { file: ready_rootfs(ready), read_only: true }],
        disk_slots: 0,
        shares,
        cmdline: settings.cmdline.value.unwrap_or_default(),
        console: args.console.as_deref().map(open_console).transpose()?,
        boot_limit,
        owner_gone: OwnerGone::Continue,
    };
    let code = Run { args, signals, sandbox, timings }.lead(plan, &container)?;
    Ok(code)
}

/// The network that is asked for.
pub(super) fn network(args: &RunArgs, settings: &Settings) -> anyhow::Result<Wish> {
    let setting = &settings.network;
    let wish: Result<Wish, _> = setting.value.parse();
    let wish = wish.map_err(Error::from).with_context(|| setting.named("network"))?;
    let wish = wish.publishing(&args.publish).map_err(Error::from);
    wish.context("--publish")
}

fn ready_rootfs(ready: Ready) -> File {
    ready.rootfs.into_file()
}

fn open_console(path: &std::path::Path) -> anyhow::Result<File> {
    File::create(path).with_context(|| format!("cannot write the console to {}", path.display()))
}

struct Resources {
    cpus: CpuShare,
    memory: u64,
    /// 0 for a machine that stays as it is.
    memory_max: u64,
}

impl Resources {
    fn of(settings: &Settings, least: u64) -> anyhow::Result<Self> {
        let cpus = cpus(settings)?;
        let Setting { value, .. } = &settings.memory;
        let named = settings.memory.named("memory");
        let memory = parse_size(value).with_context(|| named.clone())?;
        if memory < least {
            let least = size(least);
            bail!("{named} {value}: a guest needs at least {least} for its kernel and agent");
        }
        let max = mvm_vmm::layout::MAX_MEMORY;
        if memory > max {
            bail!("{named} {value}: at most {}", size(max));
        }
        let memory_max = memory_max(settings)?.unwrap_or(0);
        Ok(Self { cpus, memory, memory_max })
    }
}

/// What the machine can grow to, if somebody has said it.
pub(super) fn memory_max(settings: &Settings) -> anyhow::Result<Option<u64>> {
    let setting = &settings.memory_max;
    let Some(value) = &setting.value else { return Ok(None) };
    let named = setting.named("memory-max");
    let bytes = parse_size(value).with_context(|| named.clone())?;
    let max = mvm_vmm::layout::MAX_MEMORY;
    if bytes > max {
        bail!("{named} {value}: at most {}", size(max));
    }
    if bytes != 0 && settings.hugepages.value == HugePages::Pool {
        bail!(
            "{named} {value}: memory from the host's pool of huge pages ({}) is reserved when the machine is made, and \
             cannot grow",
            settings.hugepages.named("hugepages")
        );
    }
    Ok(Some(bytes))
}

/// Checks what the machine can grow to against what it starts with. Who asks for less than that for this machine is refused;
/// what is set for all machines holds for those that it can hold for, and this returns what to tell of another one.
fn growth(settings: &Settings, resources: &Resources) -> anyhow::Result<Option<String>> {
    let short = short_of(settings, resources.memory, resources.memory_max);
    let Some(short) = short else { return Ok(None) };
    if settings.memory_max.origin == Origin::Flag {
        bail!(
            "{short}; with more of the one or less of the other ({}) it can grow",
            settings.memory.named("memory")
        );
    }
    Ok(Some(format!("{short}: it cannot grow")))
}

/// What is wrong with a size to grow to that is below the size of the machine.
pub(super) fn short_of(settings: &Settings, memory: u64, memory_max: u64) -> Option<String> {
    let asked = settings.memory_max.value.as_deref()?;
    let named = settings.memory_max.named("memory-max");
    (1..memory).contains(&memory_max).then(|| {
        format!(
            "{named} {asked}: less than the {} of memory that the machine starts with",
            size(memory)
        )
    })
}

pub(super) fn cpus(settings: &Settings) -> anyhow::Result<CpuShare> {
    settings.cpus.value.parse().with_context(|| settings.cpus.named("cpus"))
}

/// The flags as the specification wants them.
fn options(args: &RunArgs, settings: &Settings) -> anyhow::Result<spec::Options> {
    let mut options = spec::Options {
        command: args.command().to_vec(),
        entrypoint: args.entrypoint.clone(),
        env: env_file::collect(&args.env_file, &args.env)?,
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        hostname: args.hostname.clone(),
        terminal: args.tty,
        console_size: if args.tty && !args.detach { terminal::size() } else { None },
        read_only: args.read_only,
        cap_add: args.cap_add.clone(),
        cap_drop: args.cap_drop.clone(),
        privileged: args.privileged,
        cpus: Some(cpus(settings)?),
        ..Default::default()
    };
    for name in args.cap_add.iter().chain(&args.cap_drop) {
        spec::parse_capability(name).context("--cap-add or --cap-drop")?;
    }
    for tmpfs in &args.tmpfs {
        options.tmpfs.push(tmpfs.parse().context("--tmpfs")?);
    }
    for limit in &args.ulimit {
        options.ulimits.push(limit.parse().context("--ulimit")?);
    }
    options.volumes = volumes::all(args, &mut options.tmpfs)?;
    options.labels = labels(args)?;
    for annotation in &args.annotation {
        match annotation.split_once('=') {
            Some((key, value)) if !key.is_empty() => {
                options.annotations.insert(key.to_owned(), value.to_owned());
            }
            _ => bail!("invalid annotation {annotation:?}: write KEY=VALUE"),
        }
    }
    for option in &args.security_opt {
        security(option, &mut options)?;
    }
    if let Some(name) = &args.hostname {
        check_hostname(name)?;
    }
    Ok(options)
}

/// The labels of the command line.
pub(super) fn labels(args: &RunArgs) -> anyhow::Result<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    for label in &args.label {
        let (key, value) = label.split_once('=').unwrap_or((label, ""));
        if key.is_empty() {
            bail!("invalid label {label:?}: the key is empty");
        }
        labels.insert(key.to_owned(), value.to_owned());
    }
    Ok(labels)
}

/// What `sethostname(2)` and `/etc/hosts` can hold.
fn check_hostname(name: &str) -> anyhow::Result<()> {
    let ok = (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
        && !name.starts_with(['-', '.']);
    if !ok {
        bail!("invalid host name {name:?}: up to 64 letters, digits, hyphens and dots");
    }
    Ok(())
}

/// One `--security-opt`, in docker's forms `KEY=VALUE`, `KEY:VALUE` and `KEY`.
fn security(option: &str, options: &mut spec::Options) -> anyhow::Result<()> {
    let (key, value) = option.split_once(['=', ':']).unwrap_or((option, ""));
    match (key, value) {
        ("no-new-privileges", "" | "true") => options.no_new_privileges = true,
        ("no-new-privileges", "false") => options.no_new_privileges = false,
        ("seccomp", "unconfined") => options.seccomp = None,
        ("seccomp", path) if !path.is_empty() => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the seccomp profile {path}"))?;
            let profile = serde_json::from_str(&text).with_context(|| {
                format!("{path} is no seccomp profile of the runtime specification")
            })?;
            options.seccomp = Some(profile);
        }
        // Nothing to switch off: the guest has neither.
        ("apparmor", "unconfined") | ("label", "disable") => {}
        _ => bail!(
            "unknown security option {option:?}: no-new-privileges, seccomp=unconfined and \
             seccomp=FILE are there"
        ),
    }
    Ok(())
}

/// A container on its way through its life.
struct Run<'a> {
    args: &'a RunArgs,
    signals: Signals,
    sandbox: Sandbox,
    timings: Timings,
}

impl Run<'_> {
    fn lead(mut self, plan: MachinePlan, container: &Container) -> anyhow::Result<i32> {
        let ending = Signals::of(&ENDING)?;
        let notice = plan.engine.notice.clone();
        let interrupt = Some(ending.as_fd());
        let booted = self.sandbox.boot(&MonitorLauncher, plan, &mut self.timings, interrupt);
        match booted {
            Ok(()) => {}
            Err(Error::Interrupted) => return interrupted(self.sandbox, ending.next()?),
            Err(e) => return give_up(self.sandbox, e),
        }
        announce_engine(&self.sandbox, notice.as_deref());
        let stdio = Stdio {
            stdin: self.args.interactive && !self.args.detach,
            output: true,
            terminal: self.args.tty,
        };
        // Before the process starts: what it prints and what is typed at it are raw from the first
        // byte on.
        let raw = match self.args.interactive && self.args.tty && !self.args.detach {
            true => Some(Raw::enter()?),
            false => None,
        };
        let mut notices = Vec::new();
        let started = self.sandbox.start(container, stdio, self.args.init, &mut notices);
        let streams = match started {
            Ok(streams) => streams,
            Err(e) => {
                drop(raw);
                return give_up(self.sandbox, e);
            }
        };
        for notice in &notices {
            complain(&format!("note: {notice}"));
        }
        self.timings.mark("process started");
        let log = LogWriter::create(&self.sandbox.place().logs)
            .context("cannot write the container's log")?;
        let log = Some(Arc::new(Mutex::new(log)));

        if self.args.background {
            let id = self.sandbox.id().to_owned();
            if let Err(e) = self.show_timings().and_then(|()| detach::report(&id)) {
                // Whoever was to hear the id was interrupted: it is as if nothing had been started.
                self.sandbox.abandon("interrupted before it was known")?;
                return Err(e);
            }
        }
        let guest = self.sandbox.guest()?.clone();
        let attachment = Attachment {
            guest: &guest,
            process: "",
            streams,
            tty: self.args.tty,
            foreground: !self.args.detach,
            log,
            grace: GRACE,
        };
        let end = stand_by(attachment, &self.signals);
        drop(raw);
        self.timings.mark("process ended");
        self.conclude(end?)
    }

    fn conclude(mut self, end: End) -> anyhow::Result<i32> {
        let mut failure = None;
        let ending = match end {
            End::Exited(waited) => match self.sandbox.conclude(waited) {
                Ok(ending) => ending,
                Err(e) => {
                    let first_line = e.to_string().lines().next().map(str::to_owned);
                    failure = Some(e);
                    Ending { exit_code: EXIT_FAILURE, oom_killed: false, reason: first_line }
                }
            },
            End::GivenUp(signal) => stopped(128 + signal, {
                let times = if signal == SIGINT { "repeated " } else { "" };
                format!("ended by {times}{}", signal_name(signal))
            }),
            End::OutputFailed(e) => output_failed(&e),
        };
        if ending.oom_killed {
            complain("the container ran out of memory; give it more by --memory");
        }
        let cost = self.args.timings.and_then(|_| self.sandbox.cost());
        let Self { args, sandbox, mut timings, .. } = self;
        let code = finish(sandbox, &ending);
        timings.mark("teardown");
        if !args.background
            && let Err(e) = show_timings(args, &timings, cost.as_ref())
        {
            complain(&causes(&e));
        }
        match failure {
            Some(e) => Err(e.into()),
            None => Ok(code),
        }
    }

    fn show_timings(&self) -> anyhow::Result<()> {
        show_timings(self.args, &self.timings, self.sandbox.cost().as_ref())
    }
}

/// One line, so that nobody wonders why it is slow, and only where the user left the choice to us.
pub(super) fn announce_engine(sandbox: &Sandbox, notice: Option<&str>) {
    let engine = &sandbox.state().engine;
    if let Some(notice) = notice {
        complain(notice);
    }
    if engine.fallback {
        let (name, reason) = (&engine.name, &engine.reason);
        complain(&format!("{reason}: running on {name} (slower; see `mvm doctor`)"));
    }
}

/// Takes the machine down, and returns the exit code. What of that fails, on a full disk for instance, is told, and changes
/// nothing about how the container ended.
pub(super) fn finish(sandbox: Sandbox, ending: &Ending) -> i32 {
    let name = sandbox.state().name.clone();
    match sandbox.finish(ending) {
        Ok(()) => {}
        Err(e @ Error::State(_)) => {
            complain(&format!("cannot record how container {name} ended: {e}"))
        }
        Err(e) => complain(&format!("cannot clean up after container {name}: {e}")),
    }
    ending.exit_code
}

/// The same of a container that nobody ran: nothing is left. Why it did not run is what matters.
fn abandon(sandbox: Sandbox, reason: &str) {
    let name = sandbox.state().name.clone();
    if let Err(e) = sandbox.abandon(reason) {
        complain(&format!("cannot clean up after container {name}: {e}"));
    }
}

/// The guest's program never ran: nothing is left, and the caller says why.
pub(super) fn give_up(sandbox: Sandbox, error: Error) -> anyhow::Result<i32> {
    abandon(sandbox, &error.to_string());
    Err(error.into())
}

/// A signal came while the machine was starting: nothing is left.
pub(super) fn interrupted(sandbox: Sandbox, signal: i32) -> anyhow::Result<i32> {
    let reason = format!("interrupted by {} while the machine was starting", signal_name(signal));
    abandon(sandbox, &reason);
    complain(&reason);
    Ok(128 + signal)
}

pub(super) fn stopped(exit_code: i32, reason: String) -> Ending {
    Ending { exit_code, oom_killed: false, reason: Some(reason) }
}

/// Its output cannot be written any more: nobody is there to run it for.
pub(super) fn output_failed(error: &io::Error) -> Ending {
    let closed = error.kind() == io::ErrorKind::BrokenPipe;
    let what = if closed { "was closed by its reader".into() } else { error.to_string() };
    complain(&format!("standard output {what}; the container was ended"));
    let code = if closed { EXIT_CLOSED } else { EXIT_FAILURE };
    debug_assert_eq!(EXIT_CLOSED, 128 + SIGPIPE);
    stopped(code, format!("its output {what}"))
}

/// Writes the phases, and what the machine cost the host, to standard error.
pub(super) fn show_timings(
    args: &RunArgs,
    timings: &Timings,
    cost: Option<&mvm_vmm::monitor::Stats>,
) -> anyhow::Result<()> {
    use std::io::Write;
    let Some(format) = args.timings else { return Ok(()) };
    let spans = timings.spans();
    let text = match format {
        TimingsFormat::Json => {
            let host = cost.map(super::stats::on_host);
            format!("{}\n", serde_json::json!({ "phases": spans, "host": host }))
        }
        TimingsFormat::Text => {
            let mut text = format!("{:<16} {:>10} {:>10}\n", "phase", "ms", "at ms");
            for span in &spans {
                text.push_str(&format!(
                    "{:<16} {:>10.1} {:>10.1}\n",
                    span.phase, span.ms, span.at_ms
                ));
            }
            if let Some(cost) = cost {
                text.push_str(&format!(
                    "host: {:.2} s of CPU, {} of memory: {} of the guest's RAM, {} of mvm's own\n",
                    cost.cpu_time.as_secs_f64(),
                    size(cost.resident),
                    size(cost.guest_resident),
                    size(cost.overhead)
                ));
            }
            text
        }
    };
    io::stderr().write_all(text.as_bytes()).context("cannot write the timings")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::settings::Places;

    fn args(list: &[&str]) -> Box<RunArgs> {
        let all = ["mvm", "run"].iter().chain(list).chain(&["image"]);
        match Cli::try_parse_from(all).unwrap().command {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn refused(list: &[&str]) -> String {
        let args = args(list);
        let settings = Settings::of_run(&args, &Config::default()).unwrap();
        let resources = Resources::of(&settings, MIN_MEMORY);
        let grown = resources.and_then(|resources| growth(&settings, &resources));
        match (options(&args, &settings), grown) {
            (Err(e), _) | (_, Err(e)) => format!("{e:#}"),
            _ => panic!("{list:?} is taken"),
        }
    }

    #[test]
    fn flags_become_options() {
        let args = args(&[
            "--cap-add=NET_ADMIN",
            "--ulimit",
            "nofile=10",
            "--tmpfs",
            "/run",
            "-l",
            "a=b",
            "-l",
            "c",
            "--annotation",
            "x.y=z",
            "--security-opt",
            "no-new-privileges",
            "--read-only",
        ]);
        let settings = Settings::of_run(&args, &Config::default()).unwrap();
        let options = options(&args, &settings).unwrap();
        assert!(options.read_only && options.no_new_privileges);
        assert_eq!((options.ulimits.len(), options.tmpfs.len()), (1, 1));
        assert_eq!(options.labels.get("c").map(String::as_str), Some(""));
        assert_eq!(options.annotations.get("x.y").map(String::as_str), Some("z"));
    }

    #[test]
    fn a_limit_of_growth_that_is_set_for_all_machines_does_not_stop_larger_ones() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("mvm.toml");
        let told = |max: &str, list: &[&str]| {
            std::fs::write(&file, format!("memory-max = '{max}'\n")).unwrap();
            let config = Config::load(&Places::current(Some(&file))).unwrap();
            let settings = Settings::of_run(&args(list), &config).unwrap();
            let resources = Resources::of(&settings, MIN_MEMORY).unwrap();
            growth(&settings, &resources).unwrap()
        };
        let note = told("1g", &["--memory", "2g"]).unwrap();
        assert!(note.starts_with("memory-max in ") && note.contains("mvm.toml:1 1g"), "{note}");
        assert!(note.ends_with("2.0GiB of memory that the machine starts with: it cannot grow"));
        for (max, list) in
            [("1g", &["--memory", "1g"][..]), ("0", &[]), ("1g", &["--memory-max=0"])]
        {
            assert_eq!(told(max, list), None);
        }
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        for (list, want) in [
            (&["--memory", "8m"][..], "--memory 8m: a guest needs at least 64.0MiB"),
            (&["--memory", "lots"], "\"lots\""),
            (&["--memory", "600g"], "at most 512GiB"),
            (&["--memory-max", "511m"], "--memory-max 511m: less than the 512MiB of memory"),
            (&["--memory", "2g", "--memory-max=1g"], "(--memory)"),
            (&["--cpus", "0"], "\"0\""),
            (&["--cap-add", "NOPE"], "\"NOPE\""),
            (&["--ulimit", "x=1"], "\"x=1\""),
            (&["--tmpfs", "run"], "\"run\""),
            (&["-v", "data:/x"], "named volumes"),
            (&["--mount", "type=bind,source=/no/such,target=/x"], "does not exist: /no/such"),
            (&["--label", "=x"], "\"=x\""),
            (&["--annotation", "x"], "\"x\""),
            (&["--security-opt", "bogus"], "\"bogus\""),
            (&["--security-opt", "seccomp=/no/such"], "/no/such"),
            (&["--env-file", "/no/such"], "/no/such"),
            (&["--hostname", "a b"], "\"a b\""),
        ] {
            let message = refused(list);
            assert!(message.contains(want), "{list:?}: {message}");
        }
    }
}
