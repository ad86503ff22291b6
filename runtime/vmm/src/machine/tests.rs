//! Machines on the mock engine: a script plays the guest.

use std::sync::Mutex;

use mvm_engine::mock::{MockEngine, Step};
use mvm_engine::{GuestFault, VmExit};

use super::*;
use crate::MachineEvent;
use crate::testing::{ElfBuilder, section};

/// The smallest thing that is taken for a kernel: an ELF file with one byte at 1 MiB.
fn kernel() -> Section {
    section(&ElfBuilder::elf64(0x10_0000).load(0x10_0000, &[0xf4]).build()).unwrap()
}

fn out(port: u16, value: u8) -> Step {
    Step::Do(Box::new(move |vm| vm.io.pio_write(port, &[value])))
}

fn machine(vcpus: u32, script: Vec<Step>) -> (Machine, Events) {
    let parts = Parts { vcpus, ..Parts::new(32 << 20, kernel()) };
    Machine::new(&MockEngine::new(script), parts).unwrap()
}

/// Runs to the end; the phases seen and the outcome.
fn run(vcpus: u32, script: Vec<Step>) -> (Vec<Phase>, Outcome) {
    let (machine, events) = machine(vcpus, script);
    machine.start();
    let mut phases = Vec::new();
    loop {
        match events.wait(Some(Duration::from_secs(20))).expect("an event") {
            MachineEvent::Phase(mark) => phases.push(mark.phase),
            MachineEvent::Ended(reason) => return (phases, machine.finish(reason).unwrap()),
        }
    }
}

#[test]
fn a_guest_that_resets_ends_its_machine_with_its_last_words() {
    let script = b"bye\n".iter().map(|&b| out(0x3f8, b)).chain([out(0x64, 0xfe)]).collect();
    let (phases, outcome) = run(2, script);
    assert_eq!(phases, [Phase::KernelPlaced, Phase::KernelUp]);
    assert_eq!(outcome, Outcome { reason: EndReason::Reset, console_tail: "bye\n".into() });
}

#[test]
fn every_way_to_die_is_told_apart() {
    let fault = || Box::new(GuestFault { reason: "boom".into(), rip: 0x77, ..Default::default() });
    let end = |exit| run(1, vec![Step::Exit(exit)]).1.reason;
    let EndReason::TripleFault { fault: text } = end(VmExit::TripleFault(fault())) else {
        panic!("no triple fault");
    };
    assert!(text.contains("boom at rip 0x77"), "{text}");
    assert!(matches!(end(VmExit::InternalError(fault())), EndReason::EngineFailed { .. }));
    assert_eq!(end(VmExit::HaltedForever), EndReason::HaltedForever);
    assert_eq!(run(1, vec![out(0xf4, 3)]).1.reason, EndReason::DebugExit { status: 7 });
    assert_eq!(run(2, vec![out(0x600, 0x34)]).1.reason, EndReason::PowerOff);
    assert_eq!(run(2, vec![out(0x602, 1)]).1.reason, EndReason::Reset);
}

#[test]
fn a_panic_of_the_engine_ends_the_machine_and_not_the_process() {
    let script = vec![Step::Do(Box::new(|_| panic!("a bug")))];
    let EndReason::EngineFailed { fault } = run(2, script).1.reason else { panic!("no failure") };
    assert!(fault.contains("a bug"), "{fault}");
}

#[test]
fn a_machine_stands_still_while_paused() {
    let count = Arc::new(Mutex::new(0));
    let step = || {
        let count = count.clone();
        // The mock's run plays its whole script; the last step waits for a kick.
        Step::Do(Box::new(move |_| *count.lock().unwrap() += 1))
    };
    let script = vec![step(), Step::Exit(VmExit::Kicked), step()];
    let (machine, events) = machine(2, script);
    machine.pause().unwrap();
    assert_eq!(*count.lock().unwrap(), 0, "it never ran");
    machine.start();
    while *count.lock().unwrap() < 2 {
        std::thread::yield_now();
    }
    machine.pause().unwrap();
    machine.pause().unwrap();
    assert!(!machine.is_running());
    machine.resume();
    assert!(machine.is_running());
    machine.end(EndReason::Stopped);
    machine.resume();
    assert!(!machine.is_running(), "the end is final");
    let last = std::iter::from_fn(|| events.wait(Some(Duration::from_secs(5))))
        .find(|e| matches!(e, MachineEvent::Ended(_)));
    assert_eq!(last, Some(MachineEvent::Ended(EndReason::Stopped)));
    machine.finish(EndReason::Stopped).unwrap();
}

#[test]
fn a_machine_that_is_dropped_takes_its_threads_and_devices_along() {
    let emulated =
        || Machine::new(&mvm_emu::EmuEngine::default(), Parts::new(32 << 20, kernel())).unwrap();
    for (machine, events) in [machine(4, Vec::new()), emulated()] {
        machine.start();
        let control = Arc::downgrade(&machine.control);
        let serial = Arc::downgrade(&machine.devices.serial);
        drop(machine);
        assert!(control.upgrade().is_none());
        assert!(serial.upgrade().is_none());
        assert!(matches!(events.try_next(), Some(MachineEvent::Phase(_))));
    }
}

#[test]
fn what_is_typed_at_the_console_reaches_the_guest() {
    let (reader, mut typist) = io::pipe().unwrap();
    typist.write_all(b"k").unwrap();
    let echo = Step::Do(Box::new(|vm| {
        let get = |port| {
            let mut byte = [0];
            vm.io.pio_read(port, &mut byte);
            byte[0]
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        while get(0x3fd) & 1 == 0 && Instant::now() < deadline {
            std::thread::yield_now();
        }
        vm.io.pio_write(0x3f8, &[get(0x3f8)]);
        // Behind entropy and balloon there is a virtio console (device id 3).
        let mut id = [0; 4];
        vm.io.mmio_read(layout::virtio_mmio(2) + 8, &mut id);
        vm.io.pio_write(0xf4, &id);
    }));
    let parts = Parts {
        console_input: Some(reader.into()),
        virtio_console: Some(VirtioConsole::default()),
        ..Parts::new(32 << 20, kernel())
    };
    let (machine, events) = Machine::new(&MockEngine::new(vec![echo]), parts).unwrap();
    machine.start();
    let ended = std::iter::from_fn(|| events.wait(Some(Duration::from_secs(30))))
        .find(|e| matches!(e, MachineEvent::Ended(_)));
    assert_eq!(ended, Some(MachineEvent::Ended(EndReason::DebugExit { status: 7 })));
    assert_eq!(machine.console_tail(), "k");
}

/// A machine that stands still, its state and its RAM.
fn paused(vcpus: u32) -> (MachineState, GuestRam) {
    let (machine, _events) = machine(vcpus, Vec::new());
    machine.pause().unwrap();
    (machine.save().unwrap(), machine.ram().clone())
}

fn restored(
    engine: &dyn Engine,
    vcpus: u32,
    ram: GuestRam,
    state: &MachineState,
) -> Result<(Machine, Events), String> {
    let parts = Parts { vcpus, ..Parts::new(32 << 20, kernel()) };
    Machine::restore(engine, parts, ram, state).map_err(|e| e.to_string())
}

#[test]
fn a_state_is_taken_while_the_machine_stands_still_and_not_after_its_end() {
    let (machine, _events) = machine(2, Vec::new());
    let fresh = machine.save().unwrap();
    machine.start();
    assert!(matches!(machine.save(), Err(Error::NotPaused)));
    machine.pause().unwrap();
    assert_eq!(machine.save().unwrap(), fresh, "the mock's vCPUs do nothing");
    machine.pauser().ask();
    machine.end(EndReason::Stopped);
    assert!(matches!(machine.save(), Err(Error::NotPaused)));
    let pauser = machine.pauser();
    drop(machine);
    pauser.ask();
}

#[test]
fn a_state_goes_on_only_in_a_machine_of_its_kind() {
    let mock = || MockEngine::new(Vec::new());
    let (state, ram) = paused(2);
    assert!(state.is_portable());
    let (machine, _events) = restored(&mock(), 2, ram.clone(), &state).unwrap();
    assert_eq!(machine.save().unwrap().ioapic, state.ioapic);
    drop(machine);
    let error = |engine: &dyn Engine, vcpus, ram: &GuestRam, state: &MachineState| {
        restored(engine, vcpus, ram.clone(), state).map(drop).unwrap_err()
    };
    assert!(error(&mock(), 1, &ram, &state).contains("2 vCPUs, these parts 1"));
    let small = GuestRam::new(&[(0, 16 << 20)]).unwrap();
    assert!(error(&mock(), 2, &small, &state).contains("16777216 bytes"));
    let mut other = state.clone();
    other.virtio.pop();
    assert!(error(&mock(), 2, &ram, &other).contains("virtio devices"));
    let mut other = state.clone();
    other.virtio.swap(0, 1);
    assert!(error(&mock(), 2, &ram, &other).contains("virtio device 0 (mvm-rng)"));
    other.vcpus.clear();
    assert!(error(&mock(), 0, &ram, &other).contains("no vCPUs"));
}

#[test]
fn a_state_of_the_hosts_own_processor_is_refused_by_name() {
    let (mut state, ram) = paused(1);
    for vcpu in &mut state.vcpus {
        vcpu.model = CpuModel::Host;
    }
    assert!(!state.is_portable());
    let error =
        restored(&mvm_emu::EmuEngine::default(), 1, ram.clone(), &state).map(drop).unwrap_err();
    assert!(error.contains("--cpu host") && error.contains("not with emu"), "{error}");
    // A processor with more than this one, as a synthetic table has it.
    let emu = mvm_emu::EmuEngine::default();
    let (machine, _events) = Machine::new(&emu, Parts::new(32 << 20, kernel())).unwrap();
    let (mut state, ram) = (machine.save().unwrap(), machine.ram().clone());
    drop(machine);
    let leaf = |e: &&mut mvm_engine::CpuidEntry| e.leaf == 7 && e.subleaf.unwrap_or(0) == 0;
    state.vcpus[0].cpuid.iter_mut().find(leaf).unwrap().ebx |= 1 << 16 | 1 << 4;
    let error = restored(&emu, 1, ram, &state).map(drop).unwrap_err();
    assert!(error.contains("CPUID.7h.0:EBX[4] CPUID.7h.0:EBX[16]"), "{error}");
}

#[test]
fn disks_come_and_go_in_places_that_the_guest_gives_back() {
    let disk = |size: u64| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file
    };
    let slot = || Disk { file: None, read_only: false, serial: "slot".into() };
    let fixed = Disk { file: Some(disk(512)), read_only: true, serial: "root".into() };
    let parts = Parts { disks: vec![fixed, slot(), slot()], ..Parts::new(32 << 20, kernel()) };
    let (machine, _events) = Machine::new(&MockEngine::new(Vec::new()), parts).unwrap();
    let register = |place, offset, value: Option<u32>| {
        let at = layout::virtio_mmio(place) + offset;
        let memory = &machine.bus.devices().memory;
        let mut word = value.unwrap_or_default().to_le_bytes();
        match value {
            Some(_) => assert!(memory.write(at, &word)),
            None => assert!(memory.read(at, &mut word)),
        }
        u32::from_le_bytes(word)
    };
    let (id, status) = (8, 0x70);
    let ids = || [0, 1, 2].map(|place| register(place, id, None));
    assert_eq!(ids(), [2, 0, 0]);
    assert!(matches!(machine.unplug(1), Err(SlotError::NoDisk { place: 1 })));
    assert!(matches!(machine.unplug(u32::MAX), Err(SlotError::NoDisk { .. })));
    assert_eq!(machine.plug(disk(1024), true).unwrap(), 1);
    assert_eq!(machine.plug(disk(1024), false).unwrap(), 2);
    assert_eq!(ids(), [2; 3]);
    let listed =
        |name: &str| machine.device_counters().iter().any(|(key, _)| key.starts_with(name));
    assert!(listed("mvm-block-2."));
    let full = machine.plug(disk(1024), false).unwrap_err();
    assert!(matches!(full, SlotError::Full { places: 3, lost: 0 }), "{full}");
    // A driver takes one of them and keeps it.
    for value in [1, 3] {
        register(1, status, Some(value));
    }
    machine.unplug(1).unwrap();
    machine.unplug(2).unwrap();
    assert_eq!(ids(), [2, 0, 0]);
    assert!(listed("mvm-block-0.") && !listed("mvm-block-2."));
    assert_eq!(machine.plug(disk(1024), false).unwrap(), 2);
    let lost = machine.plug(disk(1024), false).unwrap_err();
    assert!(matches!(lost, SlotError::Full { places: 3, lost: 1 }), "{lost}");
    // It lets go, as Linux does: a reset, and then the device is acknowledged again.
    for value in [0, 1] {
        register(1, status, Some(value));
    }
    assert_eq!(machine.plug(disk(1024), false).unwrap(), 1);
}

#[test]
fn a_machine_is_asked_to_grow_as_far_as_it_was_made_for() {
    let size = |now: u64, wanted: u64, max: u64| MemorySize {
        started: 32 << 20,
        now: now << 20,
        wanted: wanted << 20,
        max: max << 20,
    };
    let (fixed, _events) = machine(1, Vec::new());
    assert_eq!(fixed.memory(), size(32, 32, 32));
    assert!(matches!(fixed.resize(64 << 20), Err(Error::CannotGrow)));
    fixed.resize(32 << 20).unwrap();
    let parts = Parts { memory_max: 300 << 20, ..Parts::new(32 << 20, kernel()) };
    let (machine, _events) = Machine::new(&MockEngine::new(Vec::new()), parts).unwrap();
    assert_eq!(machine.memory(), size(32, 32, 32 + 384), "in whole pieces of the guest's");
    machine.resize((65 << 20) + 1).unwrap();
    assert_eq!(machine.memory(), size(32, 66, 32 + 384), "the guest has done nothing yet");
    let counter = |machine: &Machine, name: &str| {
        machine.device_counters().into_iter().find(|(n, _)| n == name).unwrap().1 >> 20
    };
    assert_eq!(counter(&machine, "mvm-mem.usable"), 128);
    machine.resize(1 << 20).unwrap();
    assert_eq!(machine.memory(), size(32, 32, 32 + 384));
    assert_eq!(counter(&machine, "mvm-mem.usable"), 128, "what it was once given it may use");
    let refused = machine.resize(1 << 40).unwrap_err().to_string();
    assert!(refused.contains("1048576 MiB") && refused.contains("416 MiB"), "{refused}");
}

#[test]
fn a_machine_that_has_grown_goes_on_with_what_it_had() {
    let engine = || MockEngine::new(Vec::new());
    let parts = |memory_max| Parts { memory_max, ..Parts::new(32 << 20, kernel()) };
    let (machine, _events) = Machine::new(&engine(), parts(1 << 30)).unwrap();
    machine.start();
    machine.resize(64 << 20).unwrap();
    machine.pause().unwrap();
    let state = machine.save().unwrap();
    let ram = |memory_max| {
        let growth = layout::growth(32 << 20, memory_max);
        let backing = mvm_memory::Backing::Small;
        GuestRam::growing(&layout::ram_ranges(32 << 20), growth, backing).unwrap()
    };
    let (other, _events) =
        Machine::restore(&engine(), parts(1 << 30), ram(1 << 30), &state).unwrap();
    assert_eq!(other.memory(), machine.memory());
    assert_eq!(other.ram().growing_region().unwrap().usable(), 128 << 20);
    for (ours, theirs) in [(1 << 30, 2 << 30), (0, 1 << 30), (1 << 30, 0)] {
        let refused = Machine::restore(&engine(), parts(ours), ram(theirs), &state).unwrap_err();
        assert!(matches!(refused, Error::State(_)), "{refused}");
    }
}
