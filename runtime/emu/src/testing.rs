//! A tiny machine for tests and tools: flat RAM, 64-bit mode, no devices, no operating system.

#[cfg(test)]
pub(crate) mod asm;
#[cfg(test)]
pub(crate) mod guest;
mod user;

pub use user::{UserException, UserMachine, UserPage, UserState};

use std::sync::Arc;

use mvm_engine::cpuid::CpuModel;
use mvm_engine::mock::NoBus;
use mvm_memory::GuestRam;

use crate::Tier;
use crate::block::{Dispatcher, Stop};
use crate::cpu::{Cpu, Mode};
use crate::fault::Fault;
use crate::jit::Store;
use crate::mmu::{Mmu, PhysMemory};
use crate::op::reg;
use crate::sys::{Platform, SystemState};

/// What tests run on: the environment may ask for the translator (`MVM_TEST_TIER=jit`), and that all code is compared and not
/// watched (`MVM_TEST_TIER=compared`).
pub fn tier() -> Tier {
    match asked_for().as_deref() {
        Ok("jit" | "compared") => Tier::Translator,
        _ => Tier::Interpreter,
    }
}

fn asked_for() -> Result<String, std::env::VarError> {
    std::env::var("MVM_TEST_TIER")
}

/// A dispatcher of `tier` for `cpu`.
///
/// # Panics
/// If the host refuses executable memory.
pub(crate) fn dispatcher(cpu: &mut Cpu, tier: Tier) -> Dispatcher {
    match tier {
        Tier::Interpreter => Dispatcher::new(cpu),
        Tier::Translator => {
            let store = Store::new(cpu.mmu.phys(), 1).expect("executable memory");
            store.set_trials(0);
            if asked_for().as_deref() == Ok("compared") {
                cpu.mmu.phys().compare_code(1);
            }
            Dispatcher::translating(cpu, Arc::new(store))
        }
    }
}

/// Bytes of RAM, from address 0.
pub const RAM: u64 = 16 << 20;
/// Where [`Machine::load`] puts code.
pub const CODE: u64 = 0x1000;
/// The initial stack pointer.
pub const STACK: u64 = 0x20_0000;

/// Why [`Machine::run`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// An exception; `rip` is at the instruction. Nothing is delivered.
    Fault(Fault),
    /// HLT.
    Halt,
    /// The instruction pointer reached the end given.
    Reached,
    /// The steps given are used up.
    Steps,
}

/// One vCPU in 64-bit mode, CPL 0, paging off (addresses are physical).
#[derive(Debug)]
pub struct Machine {
    /// The processor.
    pub cpu: Cpu,
    /// RAM.
    pub ram: GuestRam,
    dispatcher: Dispatcher,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// A machine with zeroed RAM and registers.
    ///
    /// # Panics
    /// If the host refuses the memory.
    pub fn new() -> Self {
        let ram = GuestRam::new(&[(0, RAM)]).expect("RAM for a test machine");
        let io = Arc::new(NoBus);
        let phys = Arc::new(PhysMemory::new(ram.clone(), io.clone(), 1));
        let mut cpu = Cpu::new(Mmu::new(phys, 0), new_system(io));
        cpu.long_mode_for_tests();
        cpu.gpr[4] = STACK;
        cpu.mmu.enter();
        let dispatcher = dispatcher(&mut cpu, tier());
        Self { cpu, ram, dispatcher }
    }

    /// Puts `code` at [`CODE`] and goes there.
    pub fn load(&mut self, code: &[u8]) {
        self.write(CODE, code);
        self.cpu.rip = CODE;
    }

    /// Writes to RAM as a device would.
    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        assert!(self.cpu.phys_write(address, bytes), "{address:#x} is not RAM");
    }

    /// Reads RAM.
    pub fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        assert!(self.cpu.phys_read(address, &mut bytes), "{address:#x} is not RAM");
        bytes
    }

    /// Runs the code loaded until it faults, halts, or reaches its end.
    pub fn run(&mut self, code: &[u8]) -> End {
        self.load(code);
        self.run_to(CODE + code.len() as u64)
    }

    /// Runs blocks until `end` is reached at the end of one, or something happens.
    pub fn run_to(&mut self, end: u64) -> End {
        self.cpu.vec.enter();
        let result = self.run_inner(end);
        self.cpu.vec.leave();
        result
    }

    fn run_inner(&mut self, end: u64) -> End {
        // A block goes on into what follows it: put a HLT there to stop at.
        for _ in 0..1_000_000 {
            if self.cpu.rip == end {
                return End::Reached;
            }
            match self.dispatcher.step(&mut self.cpu) {
                Stop::Fault => return End::Fault(self.cpu.fault.take().unwrap_or(Fault::UD)),
                Stop::Halt => return End::Halt,
                _ => {}
            }
        }
        End::Steps
    }

    /// Runs one instruction.
    #[cfg(test)]
    pub(crate) fn step(&mut self) -> Stop {
        self.dispatcher.step(&mut self.cpu)
    }

    /// Runs whole blocks, as the engine does, until a fault, HLT, or `stops` times of something else.
    pub fn run_blocks(&mut self, stops: u32) -> End {
        self.cpu.vec.enter();
        let mut result = End::Steps;
        for _ in 0..stops {
            match self.dispatcher.run(&mut self.cpu) {
                Stop::Fault => {
                    result = End::Fault(self.cpu.fault.take().unwrap_or(Fault::UD));
                    break;
                }
                Stop::Halt => {
                    result = End::Halt;
                    break;
                }
                _ => {}
            }
        }
        self.cpu.vec.leave();
        result
    }

    /// Instructions executed.
    pub fn instructions(&self) -> u64 {
        self.dispatcher.instructions
    }
}

impl Cpu {
    /// 64-bit mode with flat segments, all extensions on, paging off: for tests, since no processor can be so.
    fn long_mode_for_tests(&mut self) {
        self.mode = Mode::Code64;
        self.cpl = 0;
        self.sys.cr0 = 0x33;
        self.sys.cr4 = 0x4_0600;
        self.sys.efer = 0x500;
        self.sys.xcr0 = 7;
        self.vec.update_access(self.sys.cr0, self.sys.cr4, self.sys.xcr0);
        self.gpr[usize::from(reg::ZERO)] = 0;
        self.tlb_set_context();
    }
}

fn new_system(io: Arc<NoBus>) -> SystemState {
    SystemState::new(Platform::new(CpuModel::V3, 1, io, 1_000_000), 0)
}
