//! A whole machine around one vCPU of the engine, for tests of the system side: descriptor tables, a task
//! state, page tables, and a handler for every vector that stops the machine and leaves its frame on the stack.

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use mvm_engine::cpuid::CpuModel;
use mvm_engine::{IoBus, Kick, MpState, Vcpu, VmExit};
use mvm_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::Tier;
use crate::cpu::{Cpu, seg};
use crate::mmu::{Mmu, PhysMemory};
use crate::sys::bits::{cr0, cr4, efer};
use crate::sys::clock::host_tsc_khz;
use crate::sys::descriptor::{Descriptor, access};
use crate::sys::platform::Instructions;
use crate::sys::{Platform, SystemState};
use crate::vcpu::EmuVcpu;
use mvm_engine::Table;

pub const RAM: u64 = 16 << 20;
/// Code of the kernel.
pub const CODE: u64 = 0x1000;
pub const GDT: u64 = 0x1_0000;
pub const IDT: u64 = 0x1_1000;
pub const TSS: u64 = 0x1_a000;
pub const LDT: u64 = 0x1_8000;
/// The handler of vector n is at `HANDLERS + n * 16`.
pub const HANDLERS: u64 = 0x1_4000;
pub const PML4: u64 = 0x2_0000;
pub const PDPT: u64 = 0x2_1000;
pub const PD: u64 = 0x2_2000;
/// Where page tables are taken from.
const TABLES: u64 = 0x3_0000;
pub const STACK: u64 = 0x8_0000;
/// Stack for interrupts out of user code.
pub const STACK0: u64 = 0x8_8000;
/// Stack of IST entry n: `IST + n * 0x1000`.
pub const IST: u64 = 0x9_0000;
/// Data of the kernel.
pub const DATA: u64 = 0x10_0000;
/// Linear address of the user's pages (code first), the physical one, and the end of the stack in them.
pub const USER: u64 = 0x4000_0000;
pub const USER_GPA: u64 = 0x40_0000;
pub const USER_DATA: u64 = USER + 0x8000;
pub const USER_STACK: u64 = USER + 0x2_0000;

/// Physical address of memory behind the bus. See [`TestBus::scratch`].
pub const SCRATCH: u64 = 0xff00_0000;
const SCRATCH_LEN: u64 = 0x2000;

/// See [`TestBus::kick`].
pub const KICK_PORT: u16 = 0xe9;

/// Bits of CR4 that the engine can do, whatever the host is.
const ALL_OF_CR4: u64 =
    cr4::UMIP | cr4::FSGSBASE | cr4::PCIDE | cr4::OSXSAVE | cr4::SMEP | cr4::SMAP;

/// Selectors.
pub mod sel {
    pub const CODE: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const USER32: u16 = 0x1b;
    pub const USER_DATA: u16 = 0x23;
    pub const USER64: u16 = 0x2b;
    pub const CODE32: u16 = 0x30;
    pub const CODE16: u16 = 0x38;
    pub const TSS: u16 = 0x40;
    pub const LDT: u16 = 0x50;
    pub const DATA16: u16 = 0x60;
    /// Free for the test: two entries.
    pub const FREE: u16 = 0x68;
}

/// Page-table bits.
pub mod pte {
    pub const P: u64 = 1;
    pub const W: u64 = 2;
    pub const U: u64 = 4;
    pub const A: u64 = 0x20;
    pub const D: u64 = 0x40;
    pub const PS: u64 = 0x80;
    pub const G: u64 = 0x100;
    pub const NX: u64 = 1 << 63;
}

const DESCRIPTORS: [u64; 15] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x0000_9b00_0000_ffff,
    // TSS and LDT: bases below 16 MiB.
    0x0000_8900_0000_2fff | TSS << 16,
    0,
    0x0000_8200_0000_0fff | LDT << 16,
    0,
    0x0000_9300_0000_ffff,
    0,
    0,
];

/// What a test does in the middle of an access.
pub struct Hook(pub Box<dyn Fn() + Send>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

/// Ports and MMIO: remembers what is written, answers what it was told.
#[derive(Debug, Default)]
pub struct TestBus {
    pub port_writes: Mutex<Vec<(u16, Vec<u8>)>>,
    pub mmio_writes: Mutex<Vec<(u64, Vec<u8>)>>,
    pub mmio_reads: Mutex<Vec<(u64, usize)>>,
    pub eois: Mutex<Vec<u8>>,
    /// Bytes at [`SCRATCH`] that keep what is written.
    pub scratch: Mutex<Vec<u8>>,
    /// Called by a write to memory of a device.
    pub on_mmio_write: Mutex<Option<Hook>>,
    /// Kicked by a write to [`KICK_PORT`].
    pub kick: Mutex<Option<Arc<dyn Kick>>>,
}

impl IoBus for TestBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        if let (KICK_PORT, Some(kick)) = (port, &*lock(&self.kick)) {
            kick.kick();
        }
        lock(&self.port_writes).push((port, data.to_vec()));
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if let Some(at) = address.checked_sub(SCRATCH).filter(|at| *at < SCRATCH_LEN) {
            let bytes = lock(&self.scratch);
            (at as usize..)
                .zip(data)
                .for_each(|(i, byte)| *byte = bytes.get(i).copied().unwrap_or(0));
            return;
        }
        lock(&self.mmio_reads).push((address, data.len()));
        data.fill(0xab);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some(at) = address.checked_sub(SCRATCH).filter(|at| *at < SCRATCH_LEN) {
            let (mut bytes, at) = (lock(&self.scratch), at as usize);
            if bytes.len() < at + data.len() {
                bytes.resize(at + data.len(), 0);
            }
            bytes[at..at + data.len()].copy_from_slice(data);
            return;
        }
        if let Some(hook) = &*lock(&self.on_mmio_write) {
            (hook.0)();
        }
        lock(&self.mmio_writes).push((address, data.to_vec()));
    }
    fn eoi(&self, vector: u8) {
        lock(&self.eois).push(vector);
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an exception or interrupt pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    pub vector: u8,
    pub code: Option<u64>,
    pub rip: u64,
    pub cs: u16,
    pub flags: u64,
    pub rsp: u64,
    pub ss: u16,
    /// Where the frame is: of the handler's stack, after an error code.
    pub at: u64,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// HLT with interrupts off, outside the handlers.
    Halt,
    /// In the handler of a vector.
    Vector(Frame),
    /// Anything else.
    Exit(VmExit),
}

impl End {
    /// The frame of the exception that must have ended the run.
    #[track_caller]
    pub fn frame(&self) -> Frame {
        match self {
            Self::Vector(frame) => *frame,
            other => panic!("no exception, but {other:?}"),
        }
    }

    /// (vector, error code, rip) of the exception that must have ended the run.
    #[track_caller]
    pub fn fault(&self) -> (u8, Option<u64>, u64) {
        let frame = self.frame();
        (frame.vector, frame.code, frame.rip)
    }
}

/// The machine.
#[derive(Debug)]
pub struct Guest {
    pub vcpu: EmuVcpu,
    pub ram: GuestRam,
    pub bus: Arc<TestBus>,
    pub platform: Arc<Platform>,
    next_table: u64,
}

impl Guest {
    fn bare(power_up: bool) -> Self {
        Self::with(power_up, Instructions { invpcid: true, smap: true, rdpid: true }, super::tier())
    }

    /// As [`Guest::new`], on `tier`.
    pub fn with_tier(tier: Tier) -> Self {
        let all = Instructions { invpcid: true, smap: true, rdpid: true };
        Self::with(true, all, tier).in_64_bit_mode()
    }

    fn with(power_up: bool, instructions: Instructions, tier: Tier) -> Self {
        let ram = GuestRam::new(&[(0, RAM)]).expect("RAM");
        let bus = Arc::new(TestBus::default());
        let mut platform = Platform::new(CpuModel::V3, 1, bus.clone(), host_tsc_khz());
        // What the host lacks is tested all the same.
        let shared = Arc::get_mut(&mut platform).expect("nobody else has it");
        shared.cr4 |= ALL_OF_CR4;
        shared.instructions = instructions;
        let phys = Arc::new(PhysMemory::new(ram.clone(), bus.clone(), 1));
        let mut cpu = Cpu::new(Mmu::new(phys, 0), SystemState::new(platform.clone(), 0));
        if power_up {
            cpu.power_up();
            cpu.gpr = [0; crate::op::reg::COUNT];
        }
        let dispatcher = super::dispatcher(&mut cpu, tier);
        let vcpu = EmuVcpu::new(cpu, dispatcher, platform.clone(), Arc::default());
        Self { vcpu, ram, bus, platform, next_table: TABLES }
    }

    /// A processor after power-up that goes on in real mode at 0:[`CODE`].
    pub fn real() -> Self {
        let mut guest = Self::bare(true);
        guest.put(HANDLERS, &[0xf4; 4096]);
        for vector in 0..256 {
            guest.put64(vector * 4, ((HANDLERS >> 4) << 16) | (vector * 16));
        }
        let cs = &mut guest.cpu().seg[seg::CS];
        (cs.selector, cs.base) = (0, 0);
        guest.cpu().rip = CODE;
        guest.cpu().gpr[4] = 0x7000;
        guest
    }

    /// 64-bit mode, privilege level 0, paging on: the first 16 MiB for the supervisor, pages for the user.
    pub fn new() -> Self {
        Self::bare(true).in_64_bit_mode()
    }

    /// The same, of a processor without [`Instructions`].
    pub fn without_features() -> Self {
        let none = Instructions { invpcid: false, smap: false, rdpid: false };
        Self::with(true, none, super::tier()).in_64_bit_mode()
    }

    fn in_64_bit_mode(self) -> Self {
        let mut guest = self;
        guest.tables();
        for vector in 0..256 {
            guest.gate(vector as u8, HANDLERS + vector * 16, gate_dpl(vector), 0);
        }
        guest.put64(TSS + 4, STACK0);
        for ist in 1..8 {
            guest.put64(TSS + 28 + ist * 8, IST + ist * 0x1000);
        }
        guest.put64(PML4, PDPT | 7);
        guest.put64(PDPT, PD | 7);
        for i in 0..8 {
            guest.put64(PD + i * 8, i << 21 | pte::PS | 3);
        }
        for page in 0..32 {
            guest.map(USER + page * 4096, USER_GPA + page * 4096, 7);
        }
        let cpu = guest.cpu();
        cpu.sys.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
        cpu.sys.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        if cpu.sys.platform.model.has("xsave") {
            cpu.sys.cr4 |= cr4::OSXSAVE;
            cpu.sys.xcr0 = if cpu.sys.platform.model.has("avx") { 7 } else { 3 };
        }
        cpu.sys.cr3 = PML4;
        cpu.sys.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        guest.kernel(sel::CODE);
        guest
    }

    /// 32-bit protected mode, privilege level 0, paging off.
    pub fn new_32() -> Self {
        let mut guest = Self::bare(true);
        guest.tables();
        for vector in 0..256u64 {
            let rights = 0x8e00 | gate_dpl(vector) << 13;
            let handler = HANDLERS + vector * 16;
            let high = (handler & 0xffff_0000) << 32;
            guest.put64(IDT + vector * 8, handler & 0xffff | 0x30 << 16 | rights << 32 | high);
        }
        guest.put64(TSS + 4, STACK0 | u64::from(sel::DATA) << 32);
        guest.cpu().sys.cr0 = cr0::PE | cr0::ET | cr0::NE;
        guest.cpu().sys.cr4 = cr4::OSFXSR;
        guest.kernel(sel::CODE32);
        guest
    }

    fn tables(&mut self) {
        for (i, descriptor) in (0..).zip(DESCRIPTORS) {
            self.put64(GDT + i * 8, descriptor);
        }
        self.put(HANDLERS, &[0xf4; 4096]);
        // No I/O bitmap.
        self.put(TSS + 0x66, &0x68u16.to_le_bytes());
        let cpu = self.cpu();
        cpu.sys.gdtr = Table { base: GDT, limit: 0x7f };
        cpu.sys.idtr = Table { base: IDT, limit: 0xfff };
        cpu.sys.tr = Descriptor(DESCRIPTORS[8] | 2 << 40).load(sel::TSS);
        cpu.sys.tr.limit = 0x67;
        cpu.sys.ldtr.access = access::UNUSABLE;
    }

    /// Goes to privilege level 0, with code segment `selector`.
    pub fn kernel(&mut self, selector: u16) {
        self.level(selector, sel::DATA, CODE, STACK);
    }

    /// Goes to privilege level 3, to the first of the user's pages.
    pub fn user(&mut self, selector: u16) {
        self.level(selector, sel::USER_DATA, USER, USER_STACK);
    }

    fn level(&mut self, code: u16, data: u16, rip: u64, rsp: u64) {
        let load =
            |selector: u16| Descriptor(DESCRIPTORS[usize::from(selector >> 3)]).load(selector);
        self.wake();
        let cpu = self.cpu();
        for register in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            cpu.seg[register] = load(data);
        }
        cpu.seg[seg::CS] = load(code);
        cpu.cpl = (code & 3) as u8;
        cpu.set_rflags(2);
        cpu.shadow = false;
        (cpu.rip, cpu.gpr[4]) = (rip, rsp);
        cpu.tlb_flush_all();
        cpu.update_mode();
    }

    pub fn cpu(&mut self) -> &mut Cpu {
        self.vcpu.cpu_mut()
    }

    /// General register `index`.
    pub fn reg(&mut self, index: usize) -> u64 {
        self.cpu().gpr[index]
    }

    /// Sets the 64-bit interrupt gate of `vector`.
    pub fn gate(&mut self, vector: u8, handler: u64, dpl: u64, ist: u64) {
        let rights = 0x8e00 | dpl << 13 | ist;
        let low = handler & 0xffff | u64::from(sel::CODE) << 16 | rights << 32;
        let at = IDT + u64::from(vector) * 16;
        self.put64(at, low | (handler & 0xffff_0000) << 32);
        self.put64(at + 8, handler >> 32);
    }

    /// Puts `code` where `vector` goes to, in place of the handler that stops.
    pub fn handler(&mut self, vector: u8, code: &[u8]) {
        // Room for more than 16 bytes, beyond the user's stack.
        let at = 0x20_0000 + u64::from(vector) * 0x100;
        assert!(code.len() <= 0x100);
        self.put(at, code);
        self.gate(vector, at, gate_dpl(vector.into()), 0);
    }

    /// Where [`Guest::handler`] puts its code.
    pub fn handler_at(vector: u8) -> u64 {
        0x20_0000 + u64::from(vector) * 0x100
    }

    /// Maps a page of 4 KiB in the address space whose top table is at [`PML4`].
    pub fn map(&mut self, linear: u64, gpa: u64, bits: u64) {
        self.map_in(PML4, linear, gpa, bits);
    }

    /// Maps a page of 4 KiB in the address space whose top table is at `top`.
    pub fn map_in(&mut self, top: u64, linear: u64, gpa: u64, bits: u64) {
        let at = self.entry_in(top, linear, 1);
        self.put64(at, gpa | bits);
    }

    /// Address of the entry of `linear` at `level` (1: of pages of 4 KiB), with the tables above it.
    pub fn entry(&mut self, linear: u64, level: u32) -> u64 {
        self.entry_in(PML4, linear, level)
    }

    /// The same in the address space whose top table is at `top`.
    pub fn entry_in(&mut self, top: u64, linear: u64, level: u32) -> u64 {
        let mut table = top;
        for upper in (level + 1..=4).rev() {
            let at = table + (linear >> (12 + 9 * (upper - 1)) & 0x1ff) * 8;
            let entry = self.get64(at);
            table = if entry & 1 != 0 {
                assert!(entry & pte::PS == 0 || upper == 4, "a large page is in the way");
                entry & 0x000f_ffff_ffff_f000
            } else {
                let new = self.new_table();
                self.put64(at, new | 7);
                new
            };
        }
        table + (linear >> (12 + 9 * (level - 1)) & 0x1ff) * 8
    }

    /// A zeroed page for page tables.
    pub fn new_table(&mut self) -> u64 {
        self.next_table += 4096;
        assert!(self.next_table < 0x7_0000);
        self.next_table - 4096
    }

    /// Writes to RAM as a device does.
    pub fn put(&self, gpa: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(gpa)).expect("an address in RAM");
    }

    pub fn put64(&self, gpa: u64, value: u64) {
        self.put(gpa, &value.to_le_bytes());
    }

    pub fn get<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(gpa)).expect("an address in RAM");
        bytes
    }

    pub fn get64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.get(gpa))
    }

    pub fn get32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.get(gpa))
    }

    /// Runs `code` at [`CODE`] at the level that the processor is at.
    pub fn run(&mut self, code: &[u8]) -> End {
        self.put(CODE, code);
        self.cpu().rip = CODE;
        self.go()
    }

    /// Runs 64-bit `code` at [`USER`] at privilege level 3.
    pub fn run_user(&mut self, code: &[u8]) -> End {
        self.put(USER_GPA, code);
        self.user(sel::USER64);
        self.go()
    }

    /// Runs `code` again at level 0 after whatever came before.
    pub fn run_kernel(&mut self, code: &[u8]) -> End {
        self.kernel(sel::CODE);
        self.run(code)
    }

    fn wake(&mut self) {
        self.cpu().sys.activity = MpState::Running;
        if std::mem::take(&mut self.cpu().sys.counted_stopped) {
            self.platform.resume_one();
        }
    }

    /// Goes on where the processor is.
    pub fn go(&mut self) -> End {
        self.wake();
        let exit = self.run_vcpu();
        if exit != VmExit::HaltedForever {
            return End::Exit(exit);
        }
        let mut at = self.cpu().rip;
        if self.cpu().mode == crate::cpu::Mode::Real {
            at += self.cpu().seg[seg::CS].base;
        }
        let at = at.wrapping_sub(1).wrapping_sub(HANDLERS);
        if at >= 4096 || !at.is_multiple_of(16) {
            return End::Halt;
        }
        End::Vector(self.frame((at / 16) as u8))
    }

    /// One run of the vCPU, ended by force after a long time.
    pub fn run_vcpu(&mut self) -> VmExit {
        self.run_vcpu_for(Duration::from_secs(120))
    }

    /// The same with a time of one's own.
    pub fn run_vcpu_for(&mut self, time: Duration) -> VmExit {
        let kick = self.vcpu.kicker();
        let (done, over) = mpsc::channel::<()>();
        let watchdog = std::thread::spawn(move || {
            if over.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout) {
                kick.kick();
            }
        });
        let exit = self.vcpu.run().expect("the host does not fail");
        drop(done);
        watchdog.join().expect("the watchdog does not panic");
        exit
    }

    fn frame(&mut self, vector: u8) -> Frame {
        let long = self.cpu().sys.long_mode();
        let mode = self.cpu().mode;
        let size = match mode {
            _ if long => 8,
            crate::cpu::Mode::Real => 2,
            _ => 4,
        };
        let mut at = self.cpu().gpr[4];
        let has_code = size > 2 && matches!(vector, 8 | 10..=14 | 17);
        let word = |guest: &Self, at: u64| guest.get64(at) & (u64::MAX >> (64 - size * 8));
        let code = has_code.then(|| {
            at += size;
            word(self, at - size)
        });
        let words: [u64; 5] = std::array::from_fn(|i| word(self, at + i as u64 * size));
        let [rip, cs, flags, rsp, ss] = words;
        Frame { vector, code, rip, cs: cs as u16, flags, rsp, ss: ss as u16, at }
    }
}

fn gate_dpl(vector: u64) -> u64 {
    if matches!(vector, 3 | 4 | 0x80) { 3 } else { 0 }
}
