//! Test kernels, and how they are run.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use mvm_emu::{EmuEngine, Tier};
use mvm_engine::Engine;
use mvm_engine::kvm::KvmEngine;
use mvm_vmm::testing::section;
use mvm_vmm::{BootError, EndReason, Error, Machine, MachineEvent, Parts};

/// Where test kernels lie.
pub const AT: u64 = 0x10_0000;

/// Where [`save_registers_32`] puts what it finds, and the end of what [`dump`] shows.
pub const SAVED: u32 = 0x5000;
pub const DUMPED: usize = 0x3000;

/// Where command lines are.
pub const CMDLINE: u32 = 0x2_0000;
pub const CMDLINE_DUMPED: usize = 0x100;

/// Memory that test machines have unless they need more.
pub const MEMORY: u64 = 16 << 20;

/// Nothing that a test waits for takes longer, on however busy a host.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Assembles for `bits` at `origin`.
pub fn assemble(
    bits: u32,
    origin: u64,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bits).unwrap();
    write(&mut assembler).unwrap();
    assembler.assemble(origin).unwrap()
}

/// Prints `len` bytes of memory on the serial port; changes EDX, ESI and ECX.
pub fn print_memory(a: &mut CodeAssembler, start: u32, len: u32) -> Result<(), IcedError> {
    a.mov(edx, 0x3f8)?;
    a.mov(esi, start)?;
    a.mov(ecx, len)?;
    a.cld()?;
    a.rep().outsb()
}

/// Prints all that [`Dump`] takes apart.
pub fn dump(a: &mut CodeAssembler) -> Result<(), IcedError> {
    print_memory(a, SAVED, DUMPED as u32)?;
    print_memory(a, CMDLINE, CMDLINE_DUMPED as u32)
}

/// Ends the machine with `value` at the debug exit port, and never goes on.
pub fn exit(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(eax, value)?;
    a.out(0xf4, eax)?;
    halt(a)
}

/// Halts for ever.
pub fn halt(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.cli()?;
    a.set_label(&mut again)?;
    a.hlt()?;
    a.jmp(again)
}

/// Puts the registers of a 32-bit entry to [`SAVED`], then reloads all segments from the descriptor
/// table, which must survive that.
pub fn save_registers_32(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let at = |index: u32| dword_ptr(SAVED + index * 4);
    a.mov(at(0), eax)?;
    a.mov(at(1), ebx)?;
    a.pushfd()?;
    a.pop(eax)?;
    a.mov(at(2), eax)?;
    a.mov(eax, cr0)?;
    a.mov(at(3), eax)?;
    a.mov(eax, cr4)?;
    a.mov(at(4), eax)?;
    a.mov(eax, cs)?;
    a.mov(at(5), eax)?;
    a.mov(eax, ds)?;
    a.mov(at(6), eax)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    // CS: a far return to after the call.
    let (mut far_return, mut next) = (a.create_label(), a.create_label());
    a.mov(ecx, at(5))?;
    a.push(ecx)?;
    a.call(far_return)?;
    a.jmp(next)?;
    a.set_label(&mut far_return)?;
    a.retf()?;
    a.set_label(&mut next)
}

/// What a kernel has printed by [`dump`].
pub struct Dump(Vec<u8>);

impl Dump {
    pub fn new(console: &[u8]) -> Self {
        assert_eq!(console.len(), DUMPED + CMDLINE_DUMPED, "{}", String::from_utf8_lossy(console));
        Self(console.to_vec())
    }

    /// Bytes of guest memory from `address` on.
    pub fn bytes(&self, address: u32) -> &[u8] {
        let from = |start: u32, place: usize, len: usize| {
            let offset = address.checked_sub(start)? as usize;
            (offset < len).then(|| &self.0[place + offset..place + len])
        };
        from(SAVED, 0, DUMPED)
            .or_else(|| from(CMDLINE, DUMPED, CMDLINE_DUMPED))
            .unwrap_or_else(|| panic!("{address:#x} was not dumped"))
    }

    pub fn dword(&self, address: u32) -> u32 {
        u32::from_le_bytes(self.bytes(address)[..4].try_into().unwrap())
    }

    pub fn qword(&self, address: u32) -> u64 {
        u64::from_le_bytes(self.bytes(address)[..8].try_into().unwrap())
    }

    /// EAX and EBX as [`save_registers_32`] saved them, with the rest as every 32-bit entry has it:
    /// protected mode with two different segments, no paging, no interrupts.
    pub fn entered(&self) -> (u32, u32) {
        let saved = |index: u32| self.dword(SAVED + index * 4);
        assert_eq!(saved(2) & (1 << 8 | 1 << 9 | 1 << 17), 0, "TF, IF, VM");
        assert_eq!(saved(3) & 0x8000_0001, 1, "CR0");
        assert_eq!(saved(4), 0, "CR4");
        assert!(saved(5) != 0 && saved(6) != 0 && saved(5) != saved(6), "CS and DS");
        (saved(0), saved(1))
    }

    pub fn text(&self, address: u32) -> String {
        let bytes = self.bytes(address);
        let len = bytes.iter().position(|b| *b == 0).expect("a final NUL");
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    }
}

/// How a run ended.
#[derive(Debug)]
pub struct Run {
    pub reason: EndReason,
    /// Everything printed.
    pub console: Vec<u8>,
}

/// Parts of a machine for this kernel file.
pub fn parts(kernel: &[u8]) -> Parts {
    Parts::new(MEMORY, section(kernel).unwrap())
}

/// Output of a machine's console.
#[derive(Clone, Default)]
pub struct Captured(pub Arc<Mutex<Vec<u8>>>);

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The engines of this host, emu in both ways to run code. Where there is no `/dev/kvm` for us a line says so.
pub fn all_engines() -> Vec<Box<dyn Engine>> {
    let tiers = [Tier::Interpreter, Tier::Translator];
    let emu = |tier| -> Box<dyn Engine> { Box::new(EmuEngine::new().unwrap().with_tier(tier)) };
    let mut engines: Vec<Box<dyn Engine>> = tiers.map(emu).into();
    match KvmEngine::new() {
        Ok(kvm) => engines.push(Box::new(kvm)),
        Err(e) => eprintln!("skipped on kvm: {e}"),
    }
    engines
}

/// What `parts` are made of, once more. Disks and sockets are in no test here.
fn twin(parts: &Parts) -> Parts {
    Parts {
        vcpus: parts.vcpus,
        cpu: parts.cpu,
        boot: parts.boot,
        initramfs: parts.initramfs.as_ref().map(|i| i.try_clone().unwrap()),
        modules: parts.modules.iter().map(|m| m.try_clone().unwrap()).collect(),
        cmdline: parts.cmdline.clone(),
        cmdline_style: parts.cmdline_style,
        exit_status: parts.exit_status,
        verbose: parts.verbose,
        ..Parts::new(parts.memory, parts.kernel.try_clone().unwrap())
    }
}

/// Runs a machine to its end, on every engine of this host: they do not differ.
pub fn run(parts: Parts) -> Run {
    let runs: Vec<_> = all_engines()
        .iter()
        .map(|engine| (engine.name(), run_on(&**engine, twin(&parts))))
        .collect();
    let (first_name, first) = &runs[0];
    for (name, run) in &runs {
        // How they tell of a fault is theirs.
        let faults = |r: &Run| matches!(r.reason, EndReason::TripleFault { .. });
        let same = run.reason == first.reason || faults(run) && faults(first);
        assert!(same, "{name}: {}; {first_name}: {}", run.reason, first.reason);
        assert!(run.console == first.console, "{name} prints something else than {first_name}");
    }
    runs.into_iter().next().unwrap().1
}

/// Runs a machine to its end on emu alone: the guest prints what time it is, writes to disks, or
/// does in ring 0 what some KVMs cannot.
pub fn run_on_emu(parts: Parts) -> Run {
    run_on(&EmuEngine::new().unwrap(), parts)
}

/// Runs a machine to its end on `engine`.
pub fn run_on(engine: &dyn Engine, parts: Parts) -> Run {
    let captured = Captured::default();
    let parts = Parts { console: Box::new(captured.clone()), ..parts };
    let (machine, events) = Machine::new(engine, parts).unwrap();
    machine.start();
    loop {
        match events.wait(Some(PATIENCE)).expect("an end in time") {
            MachineEvent::Phase(_) => {}
            MachineEvent::Ended(reason) => {
                machine.finish(reason.clone()).unwrap();
                let console = captured.0.lock().unwrap().clone();
                return Run { reason, console };
            }
        }
    }
}

/// Runs a machine that ends by the debug exit port with value 0, and takes its dump apart.
pub fn run_dump(parts: Parts) -> Dump {
    let run = run(parts);
    assert_eq!(run.reason, EndReason::DebugExit { status: 1 });
    Dump::new(&run.console)
}

/// Why a machine cannot be made from these parts.
pub fn refusal(parts: Parts) -> BootError {
    match Machine::new(&EmuEngine::new().unwrap(), parts) {
        Err(Error::Boot(error)) => error,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was made"),
    }
}
