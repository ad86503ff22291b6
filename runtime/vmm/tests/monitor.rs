//! The monitor as a process: real guests of a few bytes, owners that go away, clients that ask.
//!
//! Without the usual harness, because this program is also the monitor: the tests run it again as
//! `PROGRAM monitor`.

#![allow(clippy::print_stdout)]

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use mvm_vmm::config::{
    BootProtocol, ConsoleConfig, CpuModel, EngineConfig, ImageSource, MachineConfig, OwnerGone,
};
use mvm_vmm::monitor::{
    self, ControlClient, Event, FdTable, Launch, Monitor, Phase, Request, Response, RunState,
};
use mvm_vmm::testing::{self, ElfBuilder};
use mvm_vmm::{EndReason, Outcome};

type Test = (&'static str, fn());

const TESTS: &[Test] = &[
    ("a_guest_prints_and_switches_itself_off", a_guest_prints_and_switches_itself_off),
    ("every_end_has_its_reason", every_end_has_its_reason),
    ("the_control_socket_answers", the_control_socket_answers),
    ("what_cannot_start_is_told", what_cannot_start_is_told),
    ("a_killed_monitor_is_noticed", a_killed_monitor_is_noticed),
    ("a_machine_survives_its_owner_or_not", a_machine_survives_its_owner_or_not),
    ("a_monitor_without_an_owner_ends", a_monitor_without_an_owner_ends),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|a| a == monitor::SUBCOMMAND) {
        return monitor::main();
    }
    if args.iter().any(|a| a == "--list") {
        TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let filter = args.iter().find(|a| !a.starts_with("--"));
    let mut failed = 0;
    for (name, test) in TESTS {
        if filter.is_some_and(|f| !name.contains(f.as_str())) {
            continue;
        }
        let ok = std::panic::catch_unwind(test).is_ok();
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
        failed += u8::from(!ok);
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Guests: 64-bit code at 1 MiB.
mod guest {
    /// `mov dx, 0x3f8; mov al, c; out dx, al` for each character.
    fn print(text: &str) -> Vec<u8> {
        let out = |c: u8| [0x66, 0xba, 0xf8, 0x03, 0xb0, c, 0xee];
        text.bytes().flat_map(out).collect()
    }

    fn after(text: &str, code: &[u8]) -> Vec<u8> {
        [print(text), code.to_vec()].concat()
    }

    /// Pulls the reset line: `mov al, 0xfe; out 0x64, al; jmp $`.
    pub fn reset() -> Vec<u8> {
        after("hi\n", &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe])
    }

    /// `jmp $`.
    pub fn spin() -> Vec<u8> {
        after("spinning\n", &[0xeb, 0xfe])
    }

    /// `hlt; jmp .-1` with interrupts off.
    pub fn halt() -> Vec<u8> {
        after("", &[0xf4, 0xeb, 0xfd])
    }

    /// `ud2` without an interrupt table.
    pub fn crash() -> Vec<u8> {
        after("ouch\n", &[0x0f, 0x0b])
    }

    /// `mov al, 3; out 0xf4, al`.
    pub fn exit() -> Vec<u8> {
        after("", &[0xb0, 3, 0xe6, 0xf4, 0xeb, 0xfe])
    }
}

const KERNEL_AT: u64 = 0x10_0000;

/// An ELF file with `code` at 1 MiB.
fn kernel(code: &[u8]) -> File {
    testing::file(&ElfBuilder::elf64(KERNEL_AT).load(KERNEL_AT, code).build()).unwrap()
}

fn machine(kernel: File) -> (MachineConfig, FdTable) {
    let mut fds = FdTable::new();
    let kernel = ImageSource::file(fds.add(kernel));
    let mut config = MachineConfig::new("test", 32 << 20, kernel);
    config.engine = EngineConfig::Emu;
    (config, fds)
}

fn launch(config: MachineConfig, fds: FdTable) -> Monitor {
    monitor::spawn(Launch::new(config, fds)).unwrap()
}

fn next(monitor: &mut Monitor) -> Event {
    let deadline = Instant::now() + Duration::from_secs(30);
    monitor.next_event(Some(deadline)).unwrap().expect("an event in time")
}

/// All events to the end; the outcome and the phases on the way.
fn to_end(monitor: &mut Monitor) -> (Outcome, Vec<Phase>) {
    let mut phases = Vec::new();
    loop {
        match next(monitor) {
            Event::Phase(mark) => phases.push(mark.phase),
            Event::Engine { name, .. } => assert_eq!(name, "emu"),
            Event::Boot { protocol } => assert_eq!(protocol, BootProtocol::Linux),
            Event::Ended(outcome) => return (outcome, phases),
            Event::Failed { message } => panic!("did not start: {message}"),
        }
    }
}

fn wait_for(monitor: &mut Monitor, wanted: Phase) {
    loop {
        match next(monitor) {
            Event::Phase(mark) if mark.phase == wanted => return,
            Event::Phase(_) | Event::Engine { .. } | Event::Boot { .. } => {}
            other => panic!("{other:?} while waiting for {wanted:?}"),
        }
    }
}

fn a_guest_prints_and_switches_itself_off() {
    let (mut config, mut fds) = machine(kernel(&guest::reset()));
    let mut console = tempfile::tempfile().unwrap();
    let mut result = tempfile::tempfile().unwrap();
    let log = Some(fds.add(console.try_clone().unwrap()));
    config.console = ConsoleConfig { log, ..ConsoleConfig::default() };
    config.outcome = Some(fds.add(result.try_clone().unwrap()));
    config.vcpus = 2;
    let mut monitor = launch(config, fds);
    let (outcome, phases) = to_end(&mut monitor);
    assert_eq!(outcome, Outcome { reason: EndReason::Reset, console_tail: "hi\n".into() });
    assert_eq!(phases, [Phase::Monitor, Phase::KernelPlaced, Phase::KernelUp, Phase::Ended]);
    assert!(monitor.wait().unwrap().success());
    let mut text = String::new();
    console.rewind().unwrap();
    console.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hi\n");
    result.rewind().unwrap();
    assert_eq!(serde_json::from_reader::<_, Outcome>(result).unwrap(), outcome);
}

fn every_end_has_its_reason() {
    let end = |code: &[u8]| {
        let (config, fds) = machine(kernel(code));
        to_end(&mut launch(config, fds)).0
    };
    assert_eq!(end(&guest::exit()).reason, EndReason::DebugExit { status: 7 });
    assert_eq!(end(&guest::halt()).reason, EndReason::HaltedForever);
    let crash = end(&guest::crash());
    assert!(matches!(&crash.reason, EndReason::TripleFault { fault } if fault.contains("rip")));
    assert_eq!(crash.console_tail, "ouch\n");
}

fn the_control_socket_answers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let (mut config, mut fds) = machine(kernel(&guest::spin()));
    config.control = Some(fds.add(UnixListener::bind(&path).unwrap()));
    config.fallback = Some("for the test".into());
    let mut monitor = launch(config, fds);
    wait_for(&mut monitor, Phase::KernelUp);

    // Somebody who connects and says nothing, and somebody who asks and does not listen.
    let _silent = UnixStream::connect(&path).unwrap();
    let mut deaf = UnixStream::connect(&path).unwrap();
    for _ in 0..64 {
        deaf.write_all(b"{\"request\":\"status\"}\n").unwrap();
    }

    let mut client = ControlClient::connect(&path, Duration::from_secs(20)).unwrap();
    let status = client.status().unwrap();
    assert_eq!((status.state, status.pid), (RunState::Running, monitor.pid()));
    assert_eq!((status.engine.as_str(), status.memory.now), ("emu", 32 << 20));
    assert_eq!(status.engine_reason.as_deref(), Some("for the test"));
    assert_eq!(client.request(&Request::Pause).unwrap(), Response::Ok);
    assert_eq!(client.status().unwrap().state, RunState::Paused);
    let still = client.stats().unwrap().vcpu_time;
    assert_eq!(client.stats().unwrap().vcpu_time, still);
    assert_eq!(client.request(&Request::Resume).unwrap(), Response::Ok);
    let began = Instant::now();
    while client.stats().unwrap().vcpu_time == still {
        assert!(began.elapsed() < Duration::from_secs(20), "it runs again");
    }
    let stats = client.stats().unwrap();
    assert!(stats.resident > 0 && stats.overhead <= stats.resident);
    assert!(stats.engine.contains(&("fallback".into(), 1)), "{:?}", stats.engine);
    assert!(stats.guest_resident < 4 << 20, "RAM is touched lazily: {}", stats.guest_resident);
    client.stop().unwrap();
    assert_eq!(to_end(&mut monitor).0.reason, EndReason::Stopped);
    assert!(monitor.wait().unwrap().success());
}

fn what_cannot_start_is_told() {
    let message = |config, fds| {
        let mut monitor = launch(config, fds);
        loop {
            match next(&mut monitor) {
                Event::Failed { message } => {
                    assert_eq!(monitor.wait().unwrap().code(), Some(1));
                    return message;
                }
                Event::Ended(outcome) => panic!("it ran: {outcome:?}"),
                Event::Phase(_) | Event::Engine { .. } | Event::Boot { .. } => {}
            }
        }
    };
    let (config, fds) = machine(testing::file(b"#!/bin/sh\n").unwrap());
    assert!(message(config, fds).contains("this is not a kernel"));
    let large = ElfBuilder::elf64(KERNEL_AT).segment(KERNEL_AT, KERNEL_AT, &[0xf4], 9 << 20);
    let (mut config, fds) = machine(testing::file(&large.build()).unwrap());
    config.memory = 8 << 20;
    assert!(message(config, fds).contains("give at least 10 MiB"));
    let (mut config, fds) = machine(kernel(&guest::spin()));
    config.cpu = Some(CpuModel::Host);
    assert!(message(config, fds).contains("host"));
    let (mut config, mut fds) = machine(kernel(&guest::spin()));
    config.engine = EngineConfig::Kvm { device: fds.add(File::open("/dev/null").unwrap()) };
    assert!(message(config, fds).contains("kvm"));
    let (config, _) = machine(kernel(&guest::spin()));
    assert!(message(config, FdTable::new()).contains("descriptor 0 was not handed over"));
}

fn a_killed_monitor_is_noticed() {
    let (config, fds) = machine(kernel(&guest::spin()));
    let mut monitor = launch(config, fds);
    wait_for(&mut monitor, Phase::KernelUp);
    monitor.kill().unwrap();
    let (outcome, _) = to_end(&mut monitor);
    let EndReason::MonitorDied { status } = outcome.reason else { panic!("{outcome:?}") };
    assert!(status.contains("SIGKILL"), "{status}");
}

fn a_machine_survives_its_owner_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    for owner_gone in [OwnerGone::Continue, OwnerGone::End] {
        let _ = std::fs::remove_file(&path);
        let (mut config, mut fds) = machine(kernel(&guest::spin()));
        config.control = Some(fds.add(UnixListener::bind(&path).unwrap()));
        config.owner_gone = owner_gone;
        let mut result = tempfile::tempfile().unwrap();
        config.outcome = Some(fds.add(result.try_clone().unwrap()));
        let mut monitor = launch(config, fds);
        wait_for(&mut monitor, Phase::KernelUp);
        let pidfd = monitor.pidfd().try_clone_to_owned().unwrap();
        drop(monitor);
        if owner_gone == OwnerGone::Continue {
            let mut client = ControlClient::connect(&path, Duration::from_secs(20)).unwrap();
            assert_eq!(client.status().unwrap().state, RunState::Running);
            client.stop().unwrap();
        }
        let mut waits = [nix::poll::PollFd::new(
            std::os::fd::AsFd::as_fd(&pidfd),
            nix::poll::PollFlags::POLLIN,
        )];
        assert_eq!(nix::poll::poll(&mut waits, 20_000u16).unwrap(), 1, "the monitor ends");
        result.rewind().unwrap();
        let reason = serde_json::from_reader::<_, Outcome>(result).unwrap().reason;
        match owner_gone {
            OwnerGone::Continue => assert_eq!(reason, EndReason::Stopped),
            OwnerGone::End => assert_eq!(reason, EndReason::OwnerGone),
        }
    }
}

fn a_monitor_without_an_owner_ends() {
    let mut monitor = Command::new("/proc/self/exe")
        .arg(monitor::SUBCOMMAND)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    assert_eq!(monitor.wait().unwrap().code(), Some(1));
}
