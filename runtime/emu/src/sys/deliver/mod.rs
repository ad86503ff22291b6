//! Delivery of exceptions and interrupts (SDM vol. 3, chapter 6).

mod legacy;
mod long;
mod real;
mod tss;

use mvm_engine::GuestFault;

use crate::cpu::{Cpu, Mode, seg};
use crate::fault::{Fault, vector};
use crate::flags::rflags;
use crate::op::Flow;
use crate::sys::attention::reason;
use crate::sys::bits::dr;

/// What is being delivered: decides privilege checks, the pushed RF, and the EXT bit of error
/// codes on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// An exception of the fault class (or an abort): RIP is at the instruction.
    Fault,
    /// A trap (#DB after an instruction) or INT1.
    Trap,
    /// An external interrupt or NMI.
    External,
    /// INT n, INT3, INTO: the gate's privilege is checked.
    Software,
}

/// One delivery.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Event {
    pub vector: u8,
    pub code: Option<u32>,
    pub cause: Cause,
    /// The RIP to push.
    pub rip: u64,
}

impl Event {
    /// RFLAGS to push.
    fn pushed_flags(&self, cpu: &Cpu) -> u64 {
        let flags = cpu.rflags();
        match self.cause {
            Cause::Fault => flags | rflags::RF,
            _ => flags,
        }
    }

    /// Error code of a fault about the gate itself.
    fn gate_code(&self) -> u32 {
        u32::from(self.vector) << 3 | 2
    }
}

/// The processor shut down: a fault while a double fault was delivered.
#[derive(Debug)]
pub struct Shutdown(pub Box<GuestFault>);

/// Exceptions in place of others before whoever waits for the vCPU has a turn. There need not be an end: where alignment is
/// checked and the handler's stack is not aligned, each delivery of that exception raises it anew, as on processors.
const ROUNDS: u32 = 8;

/// Classes of SDM vol. 3, table 6-4.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(fault: Fault) -> Class {
    match fault.vector() {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

impl Cpu {
    /// Delivers an exception raised at [`Cpu::rip`], with everything that may go wrong on the way.
    ///
    /// # Errors
    /// [`Shutdown`]: a triple fault.
    pub fn deliver(&mut self, fault: Fault) -> Result<(), Shutdown> {
        let (event, class) = self.exception(fault);
        self.deliver_all(event, class)
    }

    /// Delivers external interrupt `vector`.
    ///
    /// # Errors
    /// [`Shutdown`]: a triple fault.
    pub fn deliver_interrupt(&mut self, vector: u8) -> Result<(), Shutdown> {
        let event = Event { vector, code: None, cause: Cause::External, rip: self.rip };
        self.deliver_all(event, Class::Benign)
    }

    /// Delivers INT n, INT3 or INTO from a handler; `rip` is the next instruction's.
    pub(crate) fn software_interrupt(&mut self, vector: u8, rip: u64, cause: Cause) -> Flow {
        self.sys.step_inhibited = true;
        match self.enter(Event { vector, code: None, cause, rip }) {
            Ok(()) => Flow::Jump,
            Err(fault) => self.raise(fault),
        }
    }

    fn exception(&mut self, fault: Fault) -> (Event, Class) {
        if fault.vector() == vector::PF {
            self.sys.cr2 = self.fault_address;
        }
        let cause = if fault.vector() == vector::DB { Cause::Trap } else { Cause::Fault };
        let mut code = fault.code();
        if !self.sys.protected() {
            code = None;
        }
        (Event { vector: fault.vector(), code, cause, rip: self.rip }, class(fault))
    }

    fn deliver_all(&mut self, mut event: Event, mut first: Class) -> Result<(), Shutdown> {
        let mut last = None;
        for _ in 0..ROUNDS {
            let Err(fault) = self.enter(event) else {
                // Watchpoints on the frame would make debug exceptions of debug exceptions without end. What a new task
                // asks for is another matter.
                self.sys.hits &= dr::DR6_BT;
                if event.vector == vector::DB {
                    // Its handler may use the debug registers (SDM vol. 3, 18.2.4).
                    self.sys.dr7 &= !dr::DR7_GD;
                }
                return Ok(());
            };
            let second = class(fault);
            let double = match first {
                Class::Benign => false,
                Class::Contributory => second == Class::Contributory,
                Class::PageFault => matches!(second, Class::Contributory | Class::PageFault),
                Class::DoubleFault => return Err(self.shut_down(event, fault)),
            };
            let next = if double {
                if fault.vector() == vector::PF {
                    self.sys.cr2 = self.fault_address;
                }
                Fault::with_code(vector::DF, 0)
            } else {
                mark_external(fault, event.cause)
            };
            last = Some(next);
            (event, first) = self.exception(next);
        }
        self.sys.deferred = last;
        self.sys.attention().raise_self(reason::SYNC);
        Ok(())
    }

    fn shut_down(&mut self, event: Event, fault: Fault) -> Shutdown {
        let reason = format!(
            "triple fault ({fault:?} while delivering vector {}; cr2 {:#x})",
            event.vector, self.sys.cr2
        );
        Shutdown(Box::new(self.guest_fault(reason)))
    }

    /// Goes through the gate of `event`. On an error nothing but the accessed bits of descriptors
    /// and memory below the new stack pointer has changed.
    fn enter(&mut self, event: Event) -> Result<(), Fault> {
        if !self.sys.protected() {
            self.enter_real(event)
        } else if self.sys.long_mode() {
            self.enter_long(event)
        } else {
            self.enter_legacy(event)
        }
    }

    /// What is told about this vCPU when the guest dies here.
    pub fn guest_fault(&mut self, reason: String) -> GuestFault {
        let linear = match self.mode {
            Mode::Code64 => self.rip,
            _ => self.seg[seg::CS].base.wrapping_add(self.rip),
        };
        GuestFault {
            vcpu: self.sys.index,
            reason,
            rip: self.rip,
            bytes: self.peek(linear, 16),
            registers: self.registers_text(),
        }
    }

    fn registers_text(&self) -> String {
        use std::fmt::Write as _;
        const NAMES: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ];
        let mut text = String::new();
        for (name, value) in NAMES.iter().zip(self.gpr) {
            // Writing to a String cannot fail.
            let _ = write!(text, "{name}={value:#x} ");
        }
        let sys = &self.sys;
        let _ = write!(
            text,
            "rflags={:#x} mode={:?} cpl={} cs={:#x} ss={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} \
             efer={:#x} gs={:#x} fs={:#x} kernel_gs={:#x}",
            self.rflags(),
            self.mode,
            self.cpl,
            self.seg[seg::CS].selector,
            self.seg[seg::SS].selector,
            sys.cr0,
            sys.cr2,
            sys.cr3,
            sys.cr4,
            sys.efer,
            self.seg[seg::GS].base,
            self.seg[seg::FS].base,
            sys.msrs.kernel_gs_base,
        );
        text
    }
}

/// Sets the EXT bit in error codes about segments met while something external (in the wide sense:
/// not a software interrupt) was delivered.
fn mark_external(fault: Fault, cause: Cause) -> Fault {
    match (fault.vector(), fault.code()) {
        (vector::TS | vector::NP | vector::SS | vector::GP, Some(code))
            if cause != Cause::Software =>
        {
            Fault::with_code(fault.vector(), code | 1)
        }
        _ => fault,
    }
}
