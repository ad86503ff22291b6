//! Guests written in assembly, and the engines that run them.

use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use mvm_emu::EmuEngine;
use mvm_engine::Engine;
use mvm_engine::kvm::KvmEngine;
use mvm_vmm::testing::{ElfBuilder, INTERRUPT_TABLE, interrupt_table};
use mvm_vmm::{EndReason, Machine, MachineEvent, Parts};

/// Nothing that a test waits for takes longer, on however busy a host.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The engines of this host. Where there is no `/dev/kvm` for us a line says so.
pub fn engines() -> Vec<Box<dyn Engine>> {
    let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(EmuEngine::new().unwrap())];
    match KvmEngine::new() {
        Ok(kvm) => engines.push(Box::new(kvm)),
        Err(e) => eprintln!("skipped on kvm: {e}"),
    }
    engines
}

/// Assembles for 64-bit mode at `origin`.
pub fn assemble(
    origin: u64,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(64).unwrap();
    write(&mut assembler).unwrap();
    assembler.assemble(origin).unwrap()
}

/// Where [`with_handler`] puts the kernel.
pub const CODE: u64 = 0x10_0000;
/// Where it puts the handler.
pub const HANDLER: u64 = 0x10_1000;
/// What LIDT is to read then.
pub const IDTR: u64 = IDT + INTERRUPT_TABLE;
const IDT: u64 = 0x20_0000;

/// A kernel with a handler of one interrupt.
pub fn with_handler(code: &[u8], vector: u64, handler: &[u8]) -> ElfBuilder {
    ElfBuilder::elf64(CODE)
        .load(CODE, code)
        .load(HANDLER, handler)
        .load(IDT, &interrupt_table(IDT, [(vector, HANDLER)]))
}

/// What there is to say about a machine that has ended.
#[derive(Debug)]
pub struct Run {
    pub reason: EndReason,
    pub metrics: Vec<(String, u64)>,
    pub devices: Vec<(String, u64)>,
}

impl Run {
    /// A counter of the engine.
    pub fn metric(&self, name: &str) -> u64 {
        find(&self.metrics, name)
    }

    /// A counter of a device.
    pub fn device(&self, name: &str) -> u64 {
        find(&self.devices, name)
    }
}

fn find(rows: &[(String, u64)], name: &str) -> u64 {
    rows.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name} in {rows:?}")).1
}

/// Runs a machine to its end.
pub fn run(engine: &dyn Engine, parts: Parts) -> Run {
    let (machine, events) = Machine::new(engine, parts).unwrap();
    machine.start();
    loop {
        match events.wait(Some(PATIENCE)).expect("an end in time") {
            MachineEvent::Phase(_) => {}
            MachineEvent::Ended(reason) => {
                let (metrics, devices) = (machine.engine_metrics().0, machine.device_counters());
                machine.finish(reason.clone()).unwrap();
                return Run { reason, metrics, devices };
            }
        }
    }
}
