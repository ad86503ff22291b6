//! A machine that runs user code under paging, and whose exceptions go through an IDT: what a
//! process sees of a processor, without an operating system.

use std::sync::Arc;

use mvm_engine::cpuid::CpuModel;
use mvm_engine::mock::NoBus;
use mvm_engine::{IoBus, MpState, Table};
use mvm_memory::GuestRam;

use super::{dispatcher, tier};
use crate::Tier;
use crate::apic::Port;
use crate::block::{Dispatcher, Stop};
use crate::cpu::{Cpu, SegmentReg, seg};
use crate::fault::{Fault, vector};
use crate::flags::rflags;
use crate::mmu::{Mmu, PhysMemory};
use crate::sys::attention::reason;
use crate::sys::bits::{cr0, cr4, efer};
use crate::sys::descriptor::access;
use crate::sys::{Platform, SystemState};

/// Bytes of RAM, from address 0.
const RAM: u64 = 2 << 20;
/// Page tables come from here on, one page each.
const TABLES: u64 = 0x1000;
/// The pages of the supervisor: IDT, GDT and TSS, handlers, stack.
const KERNEL: u64 = 0x10_0000;
/// Where they are mapped: the highest addresses but for the last page.
const KERNEL_LINEAR: u64 = 0xffff_ffff_ffff_0000;
const IDT: u64 = 0;
const GDT: u64 = 0x1000;
const TSS: u64 = 0x1800;
const HANDLERS: u64 = 0x2000;
const STACK_TOP: u64 = 0x4000;

/// Selectors, as Linux has them: code of the supervisor, 32-bit user code, user data, user code.
const KERNEL_CS: u16 = 0x10;
const USER32_CS: u16 = 0x23;
const USER_DS: u16 = 0x2b;
const USER_CS: u16 = 0x33;
const TASK: u16 = 0x40;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

/// A page of the process.
#[derive(Debug, Clone, Copy)]
pub struct UserPage {
    /// Where the process sees it.
    pub linear: u64,
    /// Where it is in RAM: a page below 1 MiB, not one of the first 32.
    pub physical: u64,
    /// It may be written.
    pub write: bool,
    /// It may be executed.
    pub execute: bool,
}

/// Registers of the process.
#[derive(Debug, Clone, Copy)]
pub struct UserState {
    /// General registers.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// Base of GS, for 64-bit code.
    pub gs_base: u64,
    /// XSAVE area in the standard format.
    pub xsave: [u8; 832],
}

/// The exception that ended a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserException {
    /// Its vector.
    pub vector: u8,
    /// Its error code, 0 without.
    pub error: u64,
    /// CR2.
    pub address: u64,
}

/// One vCPU at privilege level 3.
#[derive(Debug)]
pub struct UserMachine {
    /// The processor.
    pub cpu: Cpu,
    platform: Arc<Platform>,
    ram: GuestRam,
    dispatcher: Dispatcher,
    next_table: u64,
}

impl UserMachine {
    /// A machine with `pages`, on the tier that the environment asks for.
    ///
    /// # Panics
    /// If the host refuses the memory.
    pub fn new(pages: &[UserPage]) -> Self {
        Self::with_tier(pages, tier())
    }

    /// A machine with `pages`.
    ///
    /// # Panics
    /// If the host refuses the memory.
    pub fn with_tier(pages: &[UserPage], tier: Tier) -> Self {
        let ram = GuestRam::new(&[(0, RAM)]).expect("RAM for a test machine");
        let io: Arc<dyn IoBus> = Arc::new(NoBus);
        let phys = Arc::new(PhysMemory::new(ram.clone(), io.clone(), 1));
        let platform = Platform::new(CpuModel::V3, 1, io, 1_000_000);
        let mut cpu = Cpu::new(Mmu::new(phys, 0), SystemState::new(platform.clone(), 0));
        let dispatcher = dispatcher(&mut cpu, tier);
        let mut machine = Self { cpu, platform, ram, dispatcher, next_table: TABLES + 0x1000 };
        for page in pages {
            let rights =
                if page.write { WRITABLE } else { 0 } | if page.execute { 0 } else { NO_EXECUTE };
            machine.map(page.linear, page.physical, USER | rights);
        }
        machine.make_kernel();
        machine.cpu.mmu.enter();
        machine
    }

    /// The guest's memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Writes to RAM as a device would.
    pub fn write(&mut self, physical: u64, bytes: &[u8]) {
        assert!(self.cpu.phys_write(physical, bytes), "{physical:#x} is not RAM");
    }

    /// Reads RAM.
    pub fn read(&self, physical: u64, bytes: &mut [u8]) {
        assert!(self.cpu.phys_read(physical, bytes), "{physical:#x} is not RAM");
    }

    fn read_word(&self, physical: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(physical, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn map(&mut self, linear: u64, physical: u64, bits: u64) {
        let mut table = TABLES;
        for level in [39, 30, 21] {
            let at = table + (linear >> level & 0x1ff) * 8;
            let mut entry = self.read_word(at);
            if entry == 0 {
                entry = self.next_table | PRESENT | WRITABLE | USER;
                self.next_table += 0x1000;
                self.write(at, &entry.to_le_bytes());
            }
            table = entry & !0xfff;
        }
        let at = table + (linear >> 12 & 0x1ff) * 8;
        self.write(at, &(physical | PRESENT | bits).to_le_bytes());
    }

    /// Tables whose gates all lead to a HLT of their own.
    fn make_kernel(&mut self) {
        for page in (0..STACK_TOP).step_by(0x1000) {
            self.map(KERNEL_LINEAR + page, KERNEL + page, WRITABLE);
        }
        for n in 0..256u64 {
            let target = KERNEL_LINEAR + HANDLERS + n * 16;
            let dpl: u64 = if matches!(n as u8, vector::BP | vector::OF) { 3 } else { 0 };
            let low = target & 0xffff
                | u64::from(KERNEL_CS) << 16
                | (0x8e00 | dpl << 13) << 32
                | (target >> 16 & 0xffff) << 48;
            self.write(KERNEL + IDT + n * 16, &low.to_le_bytes());
            self.write(KERNEL + IDT + n * 16 + 8, &(target >> 32).to_le_bytes());
            self.write(KERNEL + HANDLERS + n * 16, &[0xf4]);
        }
        let descriptors: [(u16, u64); 4] = [
            (KERNEL_CS, 0x00af_9b00_0000_ffff),
            (USER32_CS & !3, 0x00cf_fb00_0000_ffff),
            (USER_DS & !3, 0x00cf_f300_0000_ffff),
            (USER_CS & !3, 0x00af_fb00_0000_ffff),
        ];
        for (selector, descriptor) in descriptors {
            self.write(KERNEL + GDT + u64::from(selector), &descriptor.to_le_bytes());
        }
        // No port may be used: the bitmap lies beyond the TSS.
        self.write(KERNEL + TSS + 0x66, &0xffffu16.to_le_bytes());
        self.write(KERNEL + TSS + 4, &(KERNEL_LINEAR + STACK_TOP).to_le_bytes());
        let sys = &mut self.cpu.sys;
        sys.gdtr = Table { base: KERNEL_LINEAR + GDT, limit: 0x7f };
        sys.idtr = Table { base: KERNEL_LINEAR + IDT, limit: 0xfff };
        sys.tr =
            SegmentReg { selector: TASK, access: 0x8b, base: KERNEL_LINEAR + TSS, limit: 0x67 };
        sys.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        sys.cr3 = TABLES;
        sys.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
        sys.efer = efer::LME | efer::LMA | efer::NXE;
        sys.xcr0 = 7;
    }

    /// Whom to tell (with [`Self::is_stuck`]) if a run does not end.
    pub fn attention(&self) -> Arc<Platform> {
        self.platform.clone()
    }

    /// Ends the run of the machine that `platform` belongs to.
    pub fn is_stuck(platform: &Platform) {
        let port: &Port = platform.apics.port(0);
        port.attention.raise(reason::KICK);
    }

    /// Sets the process's registers. `compat`: 32-bit code.
    ///
    /// # Panics
    /// If the XSAVE area is not one.
    pub fn start(&mut self, state: &UserState, compat: bool) {
        let data = access::DATA | 3 << access::DPL_SHIFT;
        let flat = SegmentReg { selector: USER_DS, access: data, base: 0, limit: u32::MAX };
        let null = SegmentReg { selector: 0, access: access::UNUSABLE, base: 0, limit: 0 };
        let cpu = &mut self.cpu;
        // A run that was ended for another machine's sake.
        cpu.sys.attention().take();
        cpu.sys.activity = MpState::Running;
        cpu.sys.dr6 = 0xffff_0ff0;
        cpu.seg[seg::SS] = flat;
        cpu.seg[seg::DS] = flat;
        cpu.seg[seg::ES] = flat;
        cpu.seg[seg::FS] = null;
        cpu.seg[seg::GS] = SegmentReg { base: state.gs_base, ..null };
        let (selector, code) =
            if compat { (USER32_CS, access::CODE32) } else { (USER_CS, access::CODE64) };
        cpu.seg[seg::CS] = SegmentReg {
            selector,
            access: code | 3 << access::DPL_SHIFT,
            base: 0,
            limit: u32::MAX,
        };
        cpu.cpl = 3;
        cpu.shadow = false;
        cpu.fault = None;
        cpu.gpr[..16].copy_from_slice(&state.gpr);
        cpu.rip = state.rip;
        cpu.set_rflags(state.rflags);
        cpu.update_mode();
        cpu.vec.from_xsave(&state.xsave).expect("an XSAVE area");
    }

    /// Runs until an exception. None: the run was ended by [`Self::is_stuck`], or the processor
    /// shut down. `single`: one instruction at a time, and before each `look` is called.
    pub fn run(
        &mut self,
        mut look: Option<&mut dyn FnMut(&mut Cpu)>,
    ) -> Option<(UserException, UserState)> {
        self.cpu.vec.enter();
        let end = self.run_inner(&mut look);
        self.cpu.vec.leave();
        end.then(|| self.outcome())
    }

    /// True at a HLT, which is that of a handler.
    fn run_inner(&mut self, look: &mut Option<&mut dyn FnMut(&mut Cpu)>) -> bool {
        loop {
            if self.cpu.sys.attention().take() & reason::KICK != 0 {
                return false;
            }
            let stop = if self.cpu.stepping() || look.is_some() {
                if let Some(look) = look
                    && self.cpu.cpl == 3
                {
                    look(&mut self.cpu);
                }
                self.step()
            } else if self.cpu.shadow {
                self.cpu.shadow = false;
                self.dispatcher.step(&mut self.cpu)
            } else {
                self.dispatcher.run(&mut self.cpu)
            };
            match stop {
                Stop::Fault => {
                    let fault = self.cpu.fault.take().unwrap_or(Fault::UD);
                    if self.cpu.deliver(fault).is_err() {
                        return false;
                    }
                }
                Stop::Halt => return true,
                Stop::Attention | Stop::Stepped | Stop::Look => {}
            }
        }
    }

    /// One instruction with the traps after it, as the vCPU's loop does it.
    fn step(&mut self) -> Stop {
        if let Some(fault) = self.cpu.before_step() {
            self.cpu.fault = Some(fault);
            return Stop::Fault;
        }
        let flags = self.cpu.sysflags;
        self.cpu.shadow = false;
        let stop = self.dispatcher.step(&mut self.cpu);
        if stop == Stop::Fault {
            return stop;
        }
        let restored = !flags & self.cpu.sysflags & rflags::RF != 0;
        match self.cpu.after_step(flags, restored) {
            Some(trap) => {
                self.cpu.fault = Some(trap);
                Stop::Fault
            }
            None => stop,
        }
    }

    /// What the exception frame and the registers say.
    fn outcome(&mut self) -> (UserException, UserState) {
        // RIP is behind the HLT.
        let number = (self.cpu.rip.wrapping_sub(1) & 0xfff) / 16;
        let mut at = KERNEL + (self.cpu.gpr[4] - KERNEL_LINEAR);
        let mut error = 0;
        if matches!(number as u8, 8 | 10..=14 | 17) {
            error = self.read_word(at);
            at += 8;
        }
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.cpu.gpr[..16]);
        gpr[4] = self.read_word(at + 24);
        let state = UserState {
            gpr,
            rip: self.read_word(at),
            rflags: self.read_word(at + 16),
            gs_base: self.cpu.seg[seg::GS].base,
            xsave: self.cpu.vec.to_xsave(),
        };
        (UserException { vector: number as u8, error, address: self.cpu.sys.cr2 }, state)
    }

    /// What runs its blocks.
    #[cfg(test)]
    pub(crate) fn dispatcher(&mut self) -> &mut Dispatcher {
        &mut self.dispatcher
    }

    /// The translator's figures.
    #[cfg(test)]
    pub(crate) fn figures(&self) -> crate::jit::Counters {
        self.dispatcher.jit().expect("a translator").figures(&self.cpu)
    }

    /// Instructions executed.
    pub fn instructions(&self) -> u64 {
        self.dispatcher.instructions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_fault_of_a_process_comes_through_the_gate() {
        let page = UserPage { linear: 0x40_0000, physical: 0x2_0000, write: false, execute: true };
        let mut machine = UserMachine::new(&[page]);
        // mov eax, 7; mov [rip + 0], eax
        machine.write(0x2_0010, &[0xb8, 7, 0, 0, 0, 0x89, 0x05, 0, 0, 0, 0]);
        let mut state =
            UserState { gpr: [5; 16], rip: 0x40_0010, rflags: 0x202, gs_base: 0, xsave: [0; 832] };
        state.gpr[4] = 0x1234;
        machine.start(&state, false);
        let (exception, end) = machine.run(None).expect("an exception");
        assert_eq!(exception, UserException { vector: vector::PF, error: 7, address: 0x40_001b });
        assert_eq!((end.gpr[0], end.gpr[4], end.rip), (7, 0x1234, 0x40_0015));
        assert_eq!(end.rflags, 0x1_0202);
    }
}
