//! Boots a kernel in this process, with its serial console on standard output: the shortest way
//! from an engine to a guest, for work on either.
//!
//! ```text
//! cargo run --release -p mvm-vmm --example boot -- --kernel vmlinux [--initrd rd.cpio] [--cpus N]
//!     [--memory MIB] [--cmdline STRING] [--style STYLE] [--boot PROTOCOL] [--verbose] [--engine NAME]
//!     [--disk FILE]... [--timeout SECONDS]
//! ```
//!
//! At the end phases, processor times and the counters of engine and devices go to standard error.

#![allow(clippy::print_stdout)]

use std::fs::File;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use mvm_vmm::config::{BootProtocol, CmdlineStyle, EngineChoice};
use mvm_vmm::monitor::PhaseMark;
use mvm_vmm::{Disk, EndReason, Events, Machine, MachineEvent, Parts, Section, engines};

struct Options {
    kernel: String,
    initrd: Option<String>,
    cpus: u32,
    memory: u64,
    cmdline: String,
    style: CmdlineStyle,
    boot: BootProtocol,
    verbose: bool,
    engine: EngineChoice,
    disks: Vec<String>,
    timeout: Option<Duration>,
}

fn main() -> ExitCode {
    match options().and_then(|options| boot(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("boot: {message}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        kernel: String::new(),
        initrd: None,
        cpus: 1,
        memory: 256,
        cmdline: String::new(),
        style: CmdlineStyle::Auto,
        boot: BootProtocol::Auto,
        verbose: false,
        engine: EngineChoice::Auto,
        disks: Vec::new(),
        timeout: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let mut value = || args.next().ok_or(format!("{name} needs a value"));
        let number = |text: String| text.parse::<u32>().map_err(|e| format!("{text}: {e}"));
        match name.as_str() {
            "--kernel" => options.kernel = value()?,
            "--initrd" => options.initrd = Some(value()?),
            "--cpus" => options.cpus = number(value()?)?,
            "--memory" => options.memory = number(value()?)?.into(),
            "--cmdline" => options.cmdline = value()?,
            "--style" => {
                let style = serde_json::Value::String(value()?);
                options.style = serde_json::from_value(style).map_err(|e| e.to_string())?;
            }
            "--boot" => options.boot = value()?.parse().map_err(|e| format!("{e}"))?,
            "--verbose" => options.verbose = true,
            "--engine" => options.engine = value()?.parse().map_err(|e| format!("{e}"))?,
            "--disk" => options.disks.push(value()?),
            "--timeout" => {
                options.timeout = Some(Duration::from_secs(number(value()?)?.into()));
            }
            _ => return Err(format!("unknown option {name}")),
        }
    }
    if options.kernel.is_empty() {
        return Err("--kernel FILE is needed".into());
    }
    Ok(options)
}

fn boot(options: &Options) -> Result<(), String> {
    let open = |path: &str| {
        let file = File::open(path).map_err(|e| format!("{path}: {e}"))?;
        Section::new(file, 0, None).map_err(|e| format!("{path}: {e}"))
    };
    let began = PhaseMark::now(mvm_vmm::monitor::Phase::Monitor);
    let engine = match options.engine {
        EngineChoice::Kvm => {
            let device = File::options().read(true).write(true).open("/dev/kvm");
            engines::kvm(device.map_err(|e| format!("/dev/kvm: {e}"))?.into())
        }
        EngineChoice::Auto | EngineChoice::Emu => engines::emulation(),
    };
    let engine = engine.map_err(|e| e.to_string())?;
    let disk = |path: &String| {
        let file = File::options().read(true).write(true).open(path);
        let file = Some(file.map_err(|e| format!("{path}: {e}"))?);
        Ok(Disk { file, read_only: false, serial: String::new() })
    };
    let parts = Parts {
        disks: options.disks.iter().map(disk).collect::<Result<_, String>>()?,
        vcpus: options.cpus,
        initramfs: options.initrd.as_deref().map(open).transpose()?,
        cmdline: options.cmdline.clone(),
        cmdline_style: options.style,
        boot: options.boot,
        verbose: options.verbose,
        console: Box::new(io::stdout()),
        ..Parts::new(options.memory << 20, open(&options.kernel)?)
    };
    let (machine, events) = Machine::new(&*engine, parts).map_err(|e| e.to_string())?;
    machine.start();
    let reason = watch(&machine, &events, began.at_ns, options.timeout);
    report(&machine);
    let outcome = machine.finish(reason).map_err(|e| e.to_string())?;
    let _ = io::stdout().flush();
    eprintln!("end: {}", outcome.reason);
    if outcome.reason.is_orderly() { Ok(()) } else { Err("the guest did not end well".into()) }
}

/// Prints phases until the machine has ended, or ends it when `timeout` is over.
fn watch(machine: &Machine, events: &Events, began: u64, timeout: Option<Duration>) -> EndReason {
    let deadline = timeout.map(|t| Instant::now() + t);
    loop {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        match events.wait(left) {
            Some(MachineEvent::Phase(PhaseMark { phase, at_ns, .. })) => {
                let ms = at_ns.saturating_sub(began) as f64 / 1e6;
                eprintln!("{ms:10.1} ms  {phase:?}");
            }
            Some(MachineEvent::Ended(reason)) => return reason,
            None => machine.end(EndReason::Stopped),
        }
    }
}

fn report(machine: &Machine) {
    for (index, time) in machine.vcpu_times().iter().enumerate() {
        eprintln!("vCPU {index}: {:.3} s of processor time", time.as_secs_f64());
    }
    eprintln!("guest RAM touched: {} KiB", machine.resident_ram() / 1024);
    for (name, value) in machine.engine_metrics().0 {
        eprintln!("engine {name} {value}");
    }
    for (name, value) in machine.device_counters() {
        eprintln!("{name} {value}");
    }
    for device in machine.device_stats().iter().filter(|d| d.reads + d.writes > 0) {
        eprintln!(
            "{} at {:#x}: {} reads, {} writes",
            device.name, device.base, device.reads, device.writes
        );
    }
}
