//! `mvm run --unikernel`: a kernel file as a machine of its own. No image, no agent; what the guest
//! writes to its serial port is the output, what is typed at that port is the input, and how the
//! machine ends is the exit code.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, bail};
use mvm_sandbox::ending::Ending;
use mvm_sandbox::engine::{self, Guest};
use mvm_sandbox::logfile::{LogWriter, Source};
use mvm_sandbox::machine::{MonitorLauncher, Payload};
use mvm_sandbox::network::Wish;
use mvm_sandbox::pump::{self, Flag, OutputEnd, Sink};
use mvm_sandbox::spec::{parse_size, signal_name};
use mvm_sandbox::timings::Timings;
use mvm_sandbox::unikernel::{Dialect, Kind, Mount, Words};
use mvm_sandbox::{BarePlan, Description, Disk, Error, Sandbox, Woken};
use mvm_vmm::EndReason;
use mvm_vmm::config::BootProtocol;
use mvm_vmm::layout::{MAX_MEMORY, MIN_MEMORY};
use nix::libc::SIGTERM;

use super::Context;
use super::attach::our_output;
use super::disk::{self, Asked};
use super::modules;
use super::run::{self, announce_engine, cpus, give_up, interrupted, output_failed, stopped};
use crate::cli::RunArgs;
use crate::output::{causes, complain, size};
use crate::settings::{Config, Origin, Settings};
use crate::signals::{ENDING, Signals};
use crate::terminal::{self, Raw};
use crate::{detach, embedded, env_file};

/// Memory if nobody says otherwise: far more than most unikernels touch.
const MEMORY: u64 = 64 << 20;

/// The same for kernels that expect to be started as PC emulators do it, which give as much. Test kernels take it for granted.
const MEMORY_OF_EMULATORS: u64 = 128 << 20;

/// How long what is left in the console's pipe may take to be written once the machine is gone.
const GRACE: Duration = Duration::from_secs(30);

/// Runs the kernel and returns the exit code for the user.
pub fn run(context: &Context, args: &RunArgs) -> anyhow::Result<i32> {
    let mut timings = Timings::start();
    let Some(kind) = args.unikernel.map(Kind::from) else { bail!("--unikernel names no kind") };
    refuse_what_does_not_hold(args, kind, Provenance::File)?;
    let settings = Settings::of_run(args, &Config::load(&context.settings)?)?;
    let asked = disk::read(&args.disk)?;
    let cmdline = command_line(args, kind, &disk::mounts(&asked, kind)?)?;
    // The files in mvm.toml are those of containers.
    let kernel_path = args.kernel.as_deref().context("--unikernel needs --kernel FILE")?;
    let kernel = embedded::kernel(Some(kernel_path))?;
    let (initrd, modules) = if kind == Kind::Multiboot {
        (None, modules::open(&args.initrd)?)
    } else {
        let initrd = modules::single(&args.initrd)?;
        (initrd.map(|path| embedded::initramfs(Some(path))).transpose()?, Vec::new())
    };
    let disks = asked.iter().map(Asked::open).collect::<anyhow::Result<_>>()?;
    let mut dialect = Dialect::from(kind);
    dialect
        .look_into(&kernel.file)
        .with_context(|| format!("cannot read {}", kernel_path.display()))?;
    let load = Load {
        dialect,
        kernel,
        initrd,
        modules,
        disks,
        boot: boot(args, kind)?,
        cmdline,
        left_out: Vec::new(),
        command: args.image_and_command.clone(),
        image: kernel_path.display().to_string(),
        image_digest: String::new(),
        labels: BTreeMap::new(),
    };
    launch(context, args, &settings, load, &mut timings)
}

/// Where a guest comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Provenance {
    /// A file of the user's.
    File,
    /// An image.
    Image,
}

/// A guest to be run, and what is recorded about it.
pub(super) struct Load {
    pub dialect: Dialect,
    pub kernel: Payload,
    pub initrd: Option<Payload>,
    pub modules: Vec<(Payload, String)>,
    pub disks: Vec<Disk>,
    pub boot: BootProtocol,
    /// Without the guest's addresses.
    pub cmdline: String,
    /// What the guest is not told, in sentences.
    pub left_out: Vec<String>,
    pub command: Vec<String>,
    pub image: String,
    pub image_digest: String,
    pub labels: BTreeMap<String, String>,
}

/// Makes a machine for the guest, runs it, and returns the exit code for the user.
pub(super) fn launch(
    context: &Context,
    args: &RunArgs,
    settings: &Settings,
    load: Load,
    timings: &mut Timings,
) -> anyhow::Result<i32> {
    let kind = load.dialect.kind;
    let memory = memory(settings, kind)?;
    let vcpus = cpus(settings)?.vcpus();
    let mut labels = load.labels;
    labels.extend(run::labels(args)?);
    let wish = run::network(args, settings)?;
    let registry = context.registry()?;
    if let Some(name) = &args.name {
        mvm_sandbox::registry::check_name(name).map_err(Error::from)?;
    }
    let outlook = engine::look(&context.layout, settings.wish(args.force)).map_err(Error::from)?;
    let engine = outlook.decide(guest(kind)).map_err(Error::from)?;
    if args.detach && !args.background {
        return detach::start();
    }
    // Before the working directory is left.
    let vsock = args.vsock.as_deref().map(std::path::absolute).transpose().context("--vsock")?;
    if args.background {
        detach::leave_session()?;
    }

    let signals = Signals::of(&ENDING)?;
    let about = Description {
        name: args.name.clone(),
        image: load.image,
        image_digest: load.image_digest,
        labels,
        vcpus,
        memory,
        detached: args.detach,
        auto_remove: args.rm,
        stop_signal: SIGTERM,
        stop_timeout: settings.stop_timeout.value,
        ..Description::default()
    };
    let mut sandbox = Sandbox::create(&registry, about)?;
    let mut cmdline = load.cmdline;
    load.left_out.iter().for_each(|what| complain(what));
    if wish != Wish::None {
        if let Err(e) = sandbox.connect(&wish) {
            return give_up(sandbox, e);
        }
        if let Some(addresses) = sandbox.addresses() {
            let told = addresses.tell(&load.dialect, &cmdline);
            cmdline = told.cmdline;
            told.left_out.iter().for_each(|what| complain(what));
        }
        timings.mark("network");
    }
    let plan = BarePlan {
        vcpus,
        memory,
        hugepages: settings.hugepages.value,
        engine,
        cpu: settings.cpu.value,
        kernel: load.kernel,
        initrd: load.initrd,
        modules: load.modules,
        cmdline,
        style: kind.style(load.boot),
        boot: load.boot,
        exit_status: kind.tells_exit_status(),
        disks: load.disks,
        input: args.interactive && !args.detach,
        vsock,
    };
    lead(args, sandbox, plan, load.command, &signals, timings)
}

/// Flags that ask for something which no agent is there to do.
pub(super) fn refuse_what_does_not_hold(
    args: &RunArgs,
    kind: Kind,
    from: Provenance,
) -> anyhow::Result<()> {
    let file = from == Provenance::File;
    let deaf = args.interactive && !kind.takes_input();
    let asked = [
        (deaf, "--interactive", "Solo5 has no call that reads a console"),
        (args.vsock.is_some() && !kind.has_sockets(), "--vsock", "Solo5 has no such device"),
        (args.tty && !args.interactive, "--tty", "without --interactive nobody types at it"),
        (args.init, "--init", "it has no processes"),
        (args.read_only, "--read-only", "it has no root file system of mvm's; see --disk FILE:ro"),
        (args.privileged, "--privileged", "it has no capabilities to be given"),
        (args.user.is_some(), "--user", "it has no users"),
        (args.workdir.is_some(), "--workdir", "it has no working directory"),
        (file && args.entrypoint.is_some(), "--entrypoint", "its kernel is the program"),
        (args.hostname.is_some(), "--hostname", "nothing in it takes one"),
        (args.stop_signal.is_some(), "--stop-signal", "it takes no signals"),
        (
            args.memory_max.is_some(),
            "--memory-max",
            "its memory stays as it is: it has no agent of mvm's",
        ),
        (args.console.is_some(), "--console", "its console is what it prints"),
        (!args.tmpfs.is_empty(), "--tmpfs", "it has no file systems of mvm's"),
        (
            !args.volume.is_empty(),
            "--volume",
            "it has no file systems of mvm's; see --disk FILE:/PATH",
        ),
        (
            !args.mount.is_empty(),
            "--mount",
            "it has no file systems of mvm's; see --disk FILE:/PATH",
        ),
        (!args.ulimit.is_empty(), "--ulimit", "it has no processes"),
        (!args.cap_add.is_empty(), "--cap-add", "it has no capabilities"),
        (!args.cap_drop.is_empty(), "--cap-drop", "it has no capabilities"),
        (!args.security_opt.is_empty(), "--security-opt", "it has no processes"),
        (file && !args.annotation.is_empty(), "--annotation", "it has no runtime specification"),
    ];
    match asked.iter().find(|(asked, ..)| *asked) {
        Some((_, flag, why)) => bail!("{flag} cannot hold for a unikernel: {why}"),
        None if args.tty && !args.detach => terminal::require(),
        None => Ok(()),
    }
}

/// Which guest the engine has to run.
pub(super) fn guest(kind: Kind) -> Guest {
    if kind == Kind::Linux { Guest::Linux } else { Guest::Unikernel }
}

/// Memory of a machine in bytes: little, unless somebody said otherwise.
pub(super) fn memory(settings: &Settings, kind: Kind) -> anyhow::Result<u64> {
    if settings.memory.origin == Origin::Default && kind != Kind::Linux {
        return Ok(if kind == Kind::Multiboot { MEMORY_OF_EMULATORS } else { MEMORY });
    }
    let named = settings.memory.named("memory");
    let memory = parse_size(&settings.memory.value).with_context(|| named.clone())?;
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&memory) {
        let (value, min, max) = (&settings.memory.value, size(MIN_MEMORY), size(MAX_MEMORY));
        bail!("{named} {value}: a machine has {min} to {max}");
    }
    Ok(memory)
}

/// The kernel's command line.
fn command_line(args: &RunArgs, kind: Kind, mounts: &[Mount]) -> anyhow::Result<String> {
    let env = env_file::collect(&args.env_file, &args.env)?;
    if !env.is_empty() && !kind.takes_environment() {
        bail!("--env cannot hold for this kind of unikernel: it has no environment");
    }
    let name = args.kernel.as_deref().and_then(Path::file_name).unwrap_or_default();
    let words = Words {
        kernel: &name.to_string_lossy(),
        env: &env,
        initrd: !args.initrd.is_empty(),
        mounts,
        kernel_args: args.cmdline.as_deref().unwrap_or_default(),
        args: &args.image_and_command,
        ..Words::default()
    };
    Ok(words.cmdline(kind).map_err(Error::from)?)
}

fn boot(args: &RunArgs, kind: Kind) -> anyhow::Result<BootProtocol> {
    match &args.boot {
        Some(name) => Ok(name.parse()?),
        None => Ok(kind.boot()),
    }
}

fn lead(
    args: &RunArgs,
    mut sandbox: Sandbox,
    plan: BarePlan,
    command: Vec<String>,
    signals: &Signals,
    timings: &mut Timings,
) -> anyhow::Result<i32> {
    let notice = plan.engine.notice.clone();
    let started = sandbox.start_bare(&MonitorLauncher, plan, command, timings, signals.as_fd());
    let port = match started {
        Ok(port) => port,
        Err(Error::Interrupted) => return interrupted(sandbox, signals.next()?),
        Err(e) => return give_up(sandbox, e),
    };
    announce_engine(&sandbox, notice.as_deref());
    let log =
        LogWriter::create(&sandbox.place().logs).context("cannot write the container's log")?;
    if args.background {
        let id = sandbox.id().to_owned();
        if let Err(e) = detach::report(&id) {
            // Whoever was to hear the id was interrupted: it is as if nothing had been started.
            sandbox.abandon("interrupted before it was known")?;
            return Err(e);
        }
    }
    // Raw, a terminal leaves everything to the guest's own: echo, line editing and Ctrl-C.
    let raw = if args.tty && port.input.is_some() { Some(Raw::enter()?) } else { None };
    let input_over = Flag::new().context("cannot make an event descriptor")?;
    if let Some(keyboard) = port.input {
        let stdin =
            io::stdin().as_fd().try_clone_to_owned().context("cannot use standard input")?;
        pump::input(stdin, keyboard, input_over.clone()).context("cannot start a thread")?;
    }
    let output = Output::start(port.output, log, !args.detach)?;
    let ended = stand_by(&mut sandbox, output, signals, timings);
    input_over.raise();
    drop(raw);
    let ending = ended?;
    timings.mark("process ended");
    let cost = args.timings.and_then(|_| sandbox.cost());
    let code = run::finish(sandbox, &ending);
    timings.mark("teardown");
    if !args.background
        && let Err(e) = run::show_timings(args, timings, cost.as_ref())
    {
        complain(&causes(&e));
    }
    Ok(code)
}

/// The thread that copies the console to our output and the log.
struct Output {
    /// The machine is gone: what is in the pipe is all there is.
    gone: Flag,
    /// The copying is over.
    over: Flag,
    end: Receiver<OutputEnd>,
}

impl Output {
    fn start(console: UnixStream, log: LogWriter, foreground: bool) -> anyhow::Result<Self> {
        let flag = || Flag::new().context("cannot make an event descriptor");
        let (gone, over) = (flag()?, flag()?);
        let out = if foreground { Some(our_output(Source::Stdout)?) } else { None };
        let sink = Sink { out, log: Some(Arc::new(Mutex::new(log))), source: Source::Stdout };
        let (tell, end) = channel();
        let raised = over.clone();
        let done = move |how| {
            // Nobody hears it when the run was given up.
            let _ = tell.send(how);
            raised.raise();
        };
        pump::output("console", console, sink, gone.clone(), GRACE, done)
            .context("cannot start a thread")?;
        Ok(Self { gone, over, end })
    }
}

/// Waits for the machine's end and the last of its output, or for a reason to end it.
fn stand_by(
    sandbox: &mut Sandbox,
    output: Output,
    signals: &Signals,
    timings: &mut Timings,
) -> anyhow::Result<Ending> {
    let mut others = vec![signals.as_fd(), output.over.as_fd()];
    let outcome = loop {
        match sandbox.wait_machine(timings, &others)? {
            Woken::Ended(outcome) => break outcome,
            Woken::Other(0) => {
                let signal = signals.next()?;
                return Ok(stopped(128 + signal, format!("ended by {}", signal_name(signal))));
            }
            Woken::Other(_) => match output.end.try_recv() {
                Ok(OutputEnd::SinkFailed(e)) => return Ok(output_failed(&e)),
                // The monitor has closed it and will say why.
                _ => others.truncate(1),
            },
        }
    };
    output.gone.raise();
    if let Ok(OutputEnd::SinkFailed(e)) = output.end.recv() {
        return Ok(output_failed(&e));
    }
    let reason = outcome.reason;
    let said_so = reason.is_orderly() && reason != EndReason::Stopped;
    if !said_so {
        complain(&reason.to_string());
    }
    let exit_code = reason.exit_code().into();
    Ok(Ending { exit_code, oom_killed: false, reason: (!said_so).then(|| first_line(&reason)) })
}

fn first_line(reason: &EndReason) -> String {
    reason.to_string().lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn args(list: &[&str]) -> Box<RunArgs> {
        let all = ["mvm", "run", "--kernel", "/k/app_x86", "--unikernel"].iter().chain(list);
        match Cli::try_parse_from(all).unwrap().command {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn line(list: &[&str]) -> String {
        let args = args(list);
        let kind = args.unikernel.unwrap().into();
        let disks = disk::read(&args.disk).unwrap();
        command_line(&args, kind, &disk::mounts(&disks, kind).unwrap()).unwrap()
    }

    #[test]
    fn words_become_the_command_line() {
        assert_eq!(line(&["rust", "a", "--b", "c=1"]), "a --b c=1");
        assert_eq!(
            line(&["linux", "--cmdline", "root=/dev/vda ro", "quiet"]),
            "root=/dev/vda ro quiet"
        );
        assert_eq!(line(&["unikraft", "x"]), "app_x86 -- x");
        assert_eq!(
            line(&["unikraft", "-e", "A=b c", "-e", "D=", "x", "y"]),
            "app_x86 env.vars=[ \"A=b c\" \"D=\" ] -- x y"
        );
        assert_eq!(line(&["hvt"]), "");
        assert_eq!(line(&["multiboot", "x", "y=1"]), "app_x86 x y=1");
        let args = args(&["unikraft", "-e", "A=\" evil"]);
        assert!(command_line(&args, Kind::Unikraft, &[]).is_err());
        assert_eq!(line(&["nanos", "-e", "A=b"]), "environment.A=b");
        assert_eq!(
            line(&["linux", "--disk", "a:/:ro", "--disk", "b", "-e", "A=b", "quiet"]),
            "root=/dev/vda rw A=b quiet"
        );
        assert_eq!(line(&["rust", "--disk", "a", "--disk", "b:/d", "x"]), "disk1.mount=/d x");
    }

    #[test]
    fn what_cannot_hold_is_refused_by_name() {
        for flag in [
            "-t",
            "--init",
            "--read-only",
            "--privileged",
            "--user=1",
            "--memory-max=1g",
            "--tmpfs=/x",
            "--cap-add=ALL",
        ] {
            let args = args(&["rust", flag]);
            let e = refused(&args, Kind::Rust).unwrap_err().to_string();
            assert!(e.contains("cannot hold for a unikernel"), "{flag}: {e}");
        }
        refused(&args(&["rust", "--rm", "--cpus", "2", "word"]), Kind::Rust).unwrap();
        for (name, kind) in [("linux", Kind::Linux), ("multiboot", Kind::Multiboot)] {
            refused(&args(&[name, "-i"]), kind).unwrap();
        }
        let mute = refused(&args(&["hvt", "--vsock", "/x"]), Kind::Hvt).unwrap_err().to_string();
        assert!(mute.contains("--vsock cannot hold"), "{mute}");
        let deaf = refused(&args(&["hvt", "-i"]), Kind::Hvt).unwrap_err().to_string();
        assert!(deaf.contains("--interactive cannot hold"), "{deaf}");
    }

    fn refused(args: &RunArgs, kind: Kind) -> anyhow::Result<()> {
        refuse_what_does_not_hold(args, kind, Provenance::File)
    }

    #[test]
    fn memory_may_be_small() {
        let of = |list: &[&str]| {
            let args = args(list);
            let settings = Settings::of_run(&args, &Config::default()).unwrap();
            memory(&settings, args.unikernel.unwrap().into())
        };
        assert_eq!(of(&["rust"]).unwrap(), 64 << 20);
        assert_eq!(of(&["multiboot"]).unwrap(), 128 << 20);
        assert_eq!(of(&["linux"]).unwrap(), 512 << 20);
        assert_eq!(of(&["hvt", "-m", "16m"]).unwrap(), 16 << 20);
        assert!(of(&["hvt", "-m", "1m"]).unwrap_err().to_string().contains("--memory 1m"));
    }
}
