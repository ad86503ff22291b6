//! The example unikernel on every engine of this host: what it prints and how it ends.
//!
//! `MVM_TEST_UNIKERNEL` is its ELF file; without that, it is built.

use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mvm_engine::Engine;
use mvm_engine::kvm::KvmEngine;
use mvm_vmm::config::{BootProtocol, CmdlineStyle};
use mvm_vmm::testing::{file, section};
use mvm_vmm::{Disk, EndReason, Machine, MachineEvent, Parts, engines};

#[path = "../../../images/hello-unikernel/src/compute.rs"]
mod compute;
#[path = "common/elf.rs"]
mod elf;
use compute::Checksum;
use elf::UNIKERNEL;

const MEMORY: u64 = 16 << 20;

/// Nothing that a test waits for takes longer, on however busy a host.
const PATIENCE: Duration = Duration::from_secs(120);

/// The engines that can run here; emu can everywhere.
fn all_engines() -> Vec<Box<dyn Engine>> {
    let emu = engines::emulation().unwrap();
    match KvmEngine::new() {
        Ok(kvm) => vec![emu, Box::new(kvm)],
        Err(error) => {
            let _ = writeln!(io::stderr(), "only the emulation engine is tested: {error}");
            vec![emu]
        }
    }
}

#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Captured {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How a run ended, and everything printed.
struct Run {
    reason: EndReason,
    console: String,
}

fn parts(boot: BootProtocol, vcpus: u32, cmdline: &str) -> Parts {
    let kernel = section(&UNIKERNEL).unwrap();
    Parts { boot, vcpus, cmdline: cmdline.into(), ..Parts::new(MEMORY, kernel) }
}

fn run_on(engine: &dyn Engine, parts: Parts) -> Run {
    let captured = Captured::default();
    let parts = Parts { console: Box::new(captured.clone()), ..parts };
    let (machine, events) = Machine::new(engine, parts).unwrap();
    machine.start();
    loop {
        let event = events.wait(Some(PATIENCE));
        let event = event.unwrap_or_else(|| {
            panic!("{}: no end; it printed:\n{}", engine.name(), captured.text())
        });
        if let MachineEvent::Ended(reason) = event {
            machine.finish(reason.clone()).unwrap();
            return Run { reason, console: captured.text() };
        }
    }
}

/// Runs on all engines, which must do the same.
fn run_everywhere(boot: BootProtocol, vcpus: u32, cmdline: &str) -> Run {
    let mut runs = all_engines().into_iter().map(|engine| {
        let run = run_on(&*engine, parts(boot, vcpus, cmdline));
        (engine.name(), run)
    });
    let (_, first) = runs.next().unwrap();
    for (engine, run) in runs {
        assert_eq!(run.console, first.console, "{engine}, {cmdline}: {}", run.reason);
        let codes = [&run, &first].map(|r| r.reason.exit_code());
        assert_eq!(codes[0], codes[1], "{engine}, {cmdline}: {}, not {}", run.reason, first.reason);
    }
    first
}

#[test]
fn it_knows_its_machine_by_either_protocol() {
    for (boot, name) in [(BootProtocol::Pvh, "PVH"), (BootProtocol::Multiboot, "multiboot")] {
        for vcpus in [1, 2] {
            let run = run_everywhere(boot, vcpus, "hello some words");
            assert_eq!(run.reason, EndReason::PowerOff);
            let lines: Vec<&str> = run.console.lines().collect();
            assert_eq!(
                lines[..2],
                ["Hello from a unikernel!", &format!("booted by {name}: hello some words")]
            );
            let memory = lines[2].strip_prefix("memory: ").unwrap();
            let (memory, processors) = memory.split_once(" KiB, processors: ").unwrap();
            // The hole below 1 MiB and the boot structures are missing.
            let memory: u64 = memory.parse().unwrap();
            assert!((MEMORY / 1024 - 512..MEMORY / 1024).contains(&memory), "{memory}");
            assert_eq!(processors, vcpus.to_string());
        }
    }
}

#[test]
fn its_exit_value_is_the_machines() {
    for (value, code) in [(0, 1), (3, 7), (64, 129)] {
        let run = run_everywhere(BootProtocol::Auto, 1, &format!("timer=0 exit={value}"));
        let expected =
            if value == 0 { EndReason::PowerOff } else { EndReason::DebugExit { status: code } };
        assert_eq!(run.reason, expected);
    }
}

#[test]
fn vector_registers_survive_timer_interrupts() {
    const ROUNDS: u32 = 3;
    let run = run_everywhere(BootProtocol::Auto, 1, &format!("compute={ROUNDS}"));
    let mut here = Checksum::new(ROUNDS.into());
    let expected = (1..=4).map(|n| format!("compute {n}/4: {:016x}\n", here.run(ROUNDS)));
    assert_eq!(run.console, expected.collect::<String>());
    assert_eq!(run.reason, EndReason::PowerOff);
}

#[test]
fn the_timer_ticks_for_a_halted_processor() {
    let run = run_everywhere(BootProtocol::Auto, 1, "timer=3 timer=2");
    assert_eq!(run.console, "timer: 3 ticks\ntimer: 2 ticks\n");
}

#[test]
fn all_processors_add_and_compute() {
    for vcpus in [1, 2, 3] {
        let run = run_everywhere(BootProtocol::Auto, vcpus, "smp");
        let sum: u64 = (1..=u64::from(vcpus)).map(|n| n * 10_000).sum();
        let checksums = (0..u64::from(vcpus))
            .fold(0u64, |sum, cpu| sum.wrapping_add(Checksum::new(cpu).run(1)));
        let expected = format!("smp: {vcpus} processors, sum {sum}, checksums {checksums:016x}\n");
        assert_eq!(run.console, expected);
        assert_eq!(run.reason, EndReason::PowerOff);
    }
}

#[test]
fn a_halt_with_interrupts_off_ends_it() {
    for vcpus in [1, 2] {
        let run = run_everywhere(BootProtocol::Auto, vcpus, "halt");
        assert_eq!(run.reason, EndReason::HaltedForever);
    }
}

#[test]
fn a_triple_fault_ends_it() {
    let run = run_everywhere(BootProtocol::Auto, 1, "fault");
    assert!(matches!(run.reason, EndReason::TripleFault { .. }), "{}", run.reason);
}

#[test]
fn it_tells_of_exceptions() {
    let run = run_everywhere(BootProtocol::Auto, 1, "trap");
    assert!(run.console.starts_with("exception 6 (error code 0x0) at 0x"), "{}", run.console);
    assert_eq!(run.reason, EndReason::DebugExit { status: 101 << 1 | 1 });
}

#[test]
fn it_sends_back_what_is_typed() {
    // More than the serial port holds at a time.
    let typed = "all that is typed, ".repeat(50);
    for engine in all_engines() {
        let (input, mut keyboard) = io::pipe().unwrap();
        write!(keyboard, "{typed}\u{4}not this").unwrap();
        let console_input = Some(input.into());
        let run = run_on(&*engine, Parts { console_input, ..parts(BootProtocol::Auto, 1, "echo") });
        assert_eq!(run.console, format!("echo: until Ctrl-D\n{typed}"), "{}", engine.name());
        assert_eq!(run.reason, EndReason::PowerOff);
    }
}

#[test]
fn it_reads_and_writes_disks() {
    const NOTE: &[u8] = b"The unikernel was here.";
    for engine in all_engines() {
        let mut content = vec![0; 64 << 10];
        content[..9].copy_from_slice(b"some text");
        content[512..].fill(0xee);
        let files = [false, true].map(|read_only| (file(&content).unwrap(), read_only));
        let disks = files.iter().map(|(file, read_only)| Disk {
            file: Some(file.try_clone().unwrap()),
            read_only: *read_only,
            serial: String::new(),
        });
        let disks = disks.collect();
        let cmdline_style = CmdlineStyle::Devices;
        let parts = Parts { disks, cmdline_style, ..parts(BootProtocol::Auto, 1, "disk") };
        let run = run_on(&*engine, parts);
        let lines = [0, 1].map(|n| format!("disk {n}: 128 sectors, \"some text\"\n"));
        assert_eq!(run.console, lines.concat(), "{}", engine.name());

        let mut written = content.clone();
        written[512..1024].fill(0);
        written[512..][..NOTE.len()].copy_from_slice(NOTE);
        for ((file, _), expected) in files.iter().zip([written, content]) {
            let mut found = vec![0; expected.len()];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == expected, "{}", engine.name());
        }
    }
}

#[test]
fn it_takes_an_interrupt_for_every_doorbell() {
    const TIMES: u64 = 300;
    for engine in all_engines() {
        let line = format!("doorbell={TIMES}");
        let cmdline_style = CmdlineStyle::Devices;
        let parts = Parts { cmdline_style, ..parts(BootProtocol::Auto, 1, &line) };
        let run = run_on(&*engine, parts);
        let expected = format!("doorbell: {TIMES} requests, {TIMES} interrupts\n");
        assert_eq!(run.console, expected, "{}", engine.name());
        assert_eq!(run.reason, EndReason::PowerOff);
    }
}

#[test]
fn one_that_spins_is_stopped_from_outside() {
    for engine in all_engines() {
        let (machine, events) =
            Machine::new(&*engine, parts(BootProtocol::Auto, 2, "spin")).unwrap();
        machine.start();
        machine.end(EndReason::Stopped);
        loop {
            match events.wait(Some(PATIENCE)).expect("an end in time") {
                MachineEvent::Phase(_) => {}
                MachineEvent::Ended(reason) => {
                    assert_eq!(reason, EndReason::Stopped);
                    machine.finish(reason).unwrap();
                    break;
                }
            }
        }
    }
}
