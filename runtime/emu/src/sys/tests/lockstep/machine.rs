//! The machine that programs run on: two address spaces, handlers that keep a log, and what is compared at the end.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use iced_x86::code_asm::*;
use mvm_engine::VmExit;

use super::program::Program;
use crate::Tier;
use crate::cpu::seg;
use crate::sys::bits::{cr0, cr4};
use crate::testing::asm::asm;
use crate::testing::guest::{Guest, IST, PD, PDPT, PML4, SCRATCH, STACK, lock, pte, sel};

/// Physical: the program, and a copy that pages of code may be mapped to instead.
pub const PROGRAM: u64 = 0x50_0000;
pub const COPY: u64 = 0x51_0000;
pub const PROGRAM_SIZE: usize = 0x8000;
/// Offsets in the program: small functions, its end, the part of privilege level 3.
pub const FUNCTIONS: usize = 0x3800;
pub const END: usize = 0x3ff0;
pub const USER_PART: usize = 0x4000;
/// Physical: what the window shows.
pub const FRAMES: u64 = 0x58_0000;
pub const FRAME_COUNT: u64 = 4;
/// A page of registers of devices, and nothing at all.
pub const DEVICE: u64 = SCRATCH;
pub const HOLE: u64 = 0x3000_0000;
/// Physical address of a large page that may take the window's place.
pub const LARGE: u64 = 0x40_0000;

/// Linear: pages that the program changes the entries of; the program in the lower half, and in the upper one.
pub const WINDOW: u64 = 0x6000_0000;
pub const WINDOW_PAGES: u64 = 8;
pub const LOW_CODE: u64 = 0x6040_0000;
pub const HIGH_CODE: u64 = 0xffff_9000_0000_0000;
pub const CODE_PAGES: u64 = 8;

/// Variables of the kernel.
const VARIABLES: u64 = 0x10_0000;
/// Where to go on after code of privilege level 3.
pub const GO_ON: u64 = VARIABLES;
const SYSTEM_CALLS: u64 = VARIABLES + 8;
/// A pointer for indirect calls, a descriptor for INVPCID, loop counters.
pub const POINTER: u64 = VARIABLES + 16;
pub const DESCRIPTOR: u64 = VARIABLES + 32;
pub const ROUND: u64 = VARIABLES + 64;
pub const COUNTERS: u64 = VARIABLES + 0x100;
const NEXT: u64 = 0x11_0000;
const LOG: u64 = 0x12_0000;
const LOG_RECORDS: u64 = 1024;
/// Exceptions after which a program is over.
const LIMIT: i32 = 3000;
/// Written by the handler of interrupts from outside alone.
const DISTURBANCES: u64 = 0x14_0000;
const COMMON: u64 = 0x22_0000;
const SYSTEM_CALL: u64 = 0x22_1000;
const OUTSIDE: u8 = 0x60;
/// What the program sends itself.
pub const OWN: u8 = 0x61;

/// How a program is run.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    pub tier: Tier,
    /// How often the translator leaves code to the interpreter.
    pub trials: u8,
    /// Bytes for translated code.
    pub room: Option<usize>,
    /// Interrupts come from outside.
    pub interrupts: bool,
    /// Code of every so manieth page is compared, and not watched.
    pub compared: Option<usize>,
}

/// Where things are that programs refer to.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    /// Top tables.
    pub tops: [u64; 2],
    /// The first entries of window and lower code in each address space, and the window's entry one level up.
    pub window: [u64; 2],
    pub window_large: [u64; 2],
    pub low_code: [u64; 2],
    pub high_code: u64,
}

fn prepare(guest: &mut Guest, program: &Program) -> Places {
    let second = guest.new_table();
    let pointers = guest.new_table();
    guest.put64(second, pointers | 7);
    guest.put64(pointers, PD | 7);
    // What handlers alone may use is not to show in the tables.
    for entry in [PML4, PDPT, second, pointers] {
        guest.put64(entry, guest.get64(entry) | pte::A);
    }
    for large in 0..8 {
        guest.put64(PD + large * 8, guest.get64(PD + large * 8) | pte::A | pte::D);
    }
    let tops = [PML4, second];
    let mut places =
        Places { tops, window: [0; 2], window_large: [0; 2], low_code: [0; 2], high_code: 0 };
    let code_bits = |page: u64| if page * 4096 < USER_PART as u64 { 3 } else { 7 };
    for page in 0..CODE_PAGES {
        guest.map(HIGH_CODE + page * 4096, PROGRAM + page * 4096, code_bits(page) | pte::G);
    }
    places.high_code = guest.entry_in(PML4, HIGH_CODE, 1);
    let slot = (HIGH_CODE >> 39 & 0x1ff) * 8;
    // Both top tables lead to the same global pages: whose entry is used depends on what is in the TLB.
    let high = guest.get64(PML4 + slot) | pte::A;
    guest.put64(PML4 + slot, high);
    guest.put64(second + slot, high);
    for (space, top) in tops.into_iter().enumerate() {
        for page in 0..CODE_PAGES {
            guest.map_in(top, LOW_CODE + page * 4096, PROGRAM + page * 4096, code_bits(page));
        }
        for (page, entry) in (0..).zip(program.window[space]) {
            guest.map_in(top, WINDOW + page * 4096, entry, 0);
        }
        places.low_code[space] = guest.entry_in(top, LOW_CODE, 1);
        places.window[space] = guest.entry_in(top, WINDOW, 1);
        places.window_large[space] = guest.entry_in(top, WINDOW, 2);
    }
    places
}

/// The handlers.
fn handlers(guest: &mut Guest) {
    let has_code = |vector: u64| matches!(vector, 8 | 10..=14 | 17);
    for vector in (0..32u64).chain([u64::from(OWN)]) {
        let at = Guest::handler_at(vector as u8);
        let mut code = if has_code(vector) { Vec::new() } else { asm!(64 at at; push(0i32);) };
        let rest = at + code.len() as u64;
        code.extend(asm!(64 at rest; push(rax); push(rbx); push(rcx); push(rdx); mov(edx, vector as i32); jmp(COMMON);));
        guest.put(at, &code);
        guest.gate(vector as u8, at, if vector == 3 { 3 } else { 0 }, 1);
    }
    guest.put(
        COMMON,
        &asm!(64 at COMMON, [exact, no_address, no_step, skip, user, out, stop, own];
            mov(ebx, LOG as u32); mov(rcx, qword_ptr(rbx)); inc(qword_ptr(rbx)); cmp(rcx, LIMIT); ja(stop);
            and(ecx, LOG_RECORDS as i32 - 1); shl(ecx, 6u32); lea(rcx, ptr(rbx + rcx + 64));
            mov(qword_ptr(rcx), rdx); mov(rax, qword_ptr(rsp + 32)); mov(qword_ptr(rcx + 8), rax);
            mov(rax, qword_ptr(rsp + 40)); mov(qword_ptr(rcx + 16), rax); mov(rax, qword_ptr(rsp + 64)); mov(qword_ptr(rcx + 24), rax);
            mov(rax, qword_ptr(rsp + 56)); cmp(edx, 1i32); je(exact); cmp(edx, 3i32); je(exact); cmp(edx, i32::from(OWN)); je(exact);
            // Arithmetic flags that the instruction would have overwritten may be stale (J2), and behind it they live.
            and(eax, !0x8d5i32); mov(qword_ptr(rsp + 56), rax);
            set_label(&mut exact); mov(qword_ptr(rcx + 32), rax); mov(rax, qword_ptr(rsp + 48)); mov(dword_ptr(rcx + 40), eax);
            mov(rax, qword_ptr(rsp + 72)); mov(dword_ptr(rcx + 44), eax); mov(qword_ptr(rcx + 48), 0i32);
            cmp(edx, 14i32); jne(no_address); mov(rax, cr2); mov(qword_ptr(rcx + 48), rax);
            set_label(&mut no_address); cmp(edx, 1i32); jne(no_step);
            mov(rax, dr6); mov(qword_ptr(rcx + 48), rax); mov(eax, 0xffff_0ff0u32); mov(dr6, rax); or(dword_ptr(rsp + 56), 0x1_0000i32); jmp(out);
            set_label(&mut no_step); cmp(edx, 3i32); je(out); cmp(edx, i32::from(OWN)); je(own);
            cmp(edx, 14i32); jne(skip); test(byte_ptr(rsp + 32), 0x10i32); jz(skip);
            // Code that may not be executed: on in the mapping that always may, or at the end of user code.
            test(byte_ptr(rsp + 48), 3i32); jnz(user);
            mov(rax, qword_ptr(rsp + 40)); and(eax, PROGRAM_SIZE as i32 - 1); add(eax, PROGRAM as i32); mov(qword_ptr(rsp + 40), rax); jmp(out);
            set_label(&mut user); mov(rax, qword_ptr(GO_ON as u32)); mov(qword_ptr(rsp + 40), rax); mov(qword_ptr(rsp + 48), i32::from(sel::CODE));
            mov(qword_ptr(rsp + 56), 2i32); mov(qword_ptr(rsp + 64), STACK as i32); mov(qword_ptr(rsp + 72), i32::from(sel::DATA)); jmp(out);
            set_label(&mut skip); mov(rax, qword_ptr(rsp + 40)); mov(rcx, rax); and(eax, PROGRAM_SIZE as i32 - 1); and(rcx, -(PROGRAM_SIZE as i32));
            movzx(eax, word_ptr(rax * 2 + NEXT as u32)); or(rax, rcx); mov(qword_ptr(rsp + 40), rax); jmp(out);
            set_label(&mut own); mov(ecx, 0x80bi32); xor(eax, eax); xor(edx, edx); wrmsr();
            set_label(&mut out); pop(rdx); pop(rcx); pop(rbx); pop(rax); add(rsp, 8i32); iretq();
            set_label(&mut stop); cli(); hlt();
        ),
    );
    let at = Guest::handler_at(0x80);
    guest.put(at, &asm!(64 at at; mov(rsp, STACK); jmp(qword_ptr(GO_ON as u32));));
    guest.gate(0x80, at, 3, 0);
    guest.put(
        SYSTEM_CALL,
        &asm!(64 at SYSTEM_CALL; inc(qword_ptr(SYSTEM_CALLS as u32)); sysretq();),
    );
    let at = Guest::handler_at(OUTSIDE);
    guest.put(
        at,
        &asm!(64 at at, [all, out];
            push(rax); push(rcx); push(rdx); mov(eax, DISTURBANCES as u32); inc(qword_ptr(rax)); mov(rcx, qword_ptr(rax));
            and(ecx, 3i32); jz(all); dec(ecx); jnz(out); mov(rax, cr3); mov(cr3, rax); jmp(out);
            set_label(&mut all); mov(rax, cr4); xor(rax, 0x80i32); mov(cr4, rax); xor(rax, 0x80i32); mov(cr4, rax);
            set_label(&mut out); mov(ecx, 0x80bi32); xor(eax, eax); xor(edx, edx); wrmsr(); pop(rdx); pop(rcx); pop(rax); iretq();
        ),
    );
    guest.gate(OUTSIDE, at, 0, 2);
}

/// What a program left behind.
pub struct Outcome {
    exit: String,
    registers: Vec<(String, u64)>,
    vectors: Vec<u8>,
    memory: Vec<(u64, Vec<u8>)>,
    devices: String,
    at_the_end: bool,
}

/// Runs `program`.
pub fn outcome(program: &Program, run: Run) -> Outcome {
    let mut guest = Guest::with_tier(run.tier);
    if let Some(jit) = guest.vcpu.dispatcher_mut().jit_mut() {
        jit.set_trials(run.trials);
        if let Some(room) = run.room {
            jit.store().set_room(room);
        }
    }
    if let Some(nth) = run.compared {
        guest.cpu().mmu.phys().compare_code(nth);
    }
    let places = prepare(&mut guest, program);
    handlers(&mut guest);
    let code = program.emit(&places);
    guest.put(PROGRAM, &code.bytes);
    guest.put(COPY, &program.copy_of(&code));
    let next: Vec<u8> = code.next.iter().flat_map(|offset| offset.to_le_bytes()).collect();
    guest.put(NEXT, &next);
    for frame in 0..FRAME_COUNT {
        let bytes: Vec<u8> = (0..4096u64).map(|i| (i * 7 + frame * 31) as u8).collect();
        guest.put(FRAMES + frame * 4096, &bytes);
    }
    guest.put64(ROUND, program.rounds);
    guest.cpu().sys.msrs.star = u64::from(sel::USER32) << 48 | u64::from(sel::CODE) << 32;
    guest.cpu().sys.msrs.lstar = SYSTEM_CALL;
    guest.cpu().sys.msrs.fmask = 0x700;
    let lapic = &mut guest.cpu().sys.lapic;
    lapic.set_base(0xfee0_0d00).expect("x2APIC");
    lapic.write_msr(0x80f, 0x1ff).expect("the spurious vector");
    // A return to level 3, which an interrupt has too, drops segments that are above it.
    guest.user(sel::USER64);
    let segments = guest.cpu().seg;
    guest.kernel(sel::CODE);
    let cpu = guest.cpu();
    for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
        cpu.seg[register] = segments[register];
    }
    cpu.sys.cr0 |= cr0::AM;
    cpu.sys.cr4 |= cr4::FSGSBASE | cr4::PGE | program.cr4;
    if program.pcids {
        cpu.sys.cr4 |= cr4::PCIDE;
        cpu.sys.cr3 |= 1;
    }
    cpu.gpr[..16].copy_from_slice(&program.gpr);
    cpu.gpr[4] = STACK;
    cpu.rip = program.base() + program.start as u64;
    cpu.set_rflags(0x202);
    cpu.tlb_flush_all();
    cpu.update_mode();
    let exit = run_it(&mut guest, run.interrupts);
    collect(&mut guest, exit)
}

fn run_it(guest: &mut Guest, interrupts: bool) -> VmExit {
    let over = Arc::new(AtomicBool::new(!interrupts));
    let (stop, platform) = (over.clone(), guest.platform.clone());
    let outside = interrupts.then(|| {
        std::thread::spawn(move || {
            let mut pause = 1;
            while !stop.load(Ordering::SeqCst) {
                platform.apics.port(0).post(OUTSIDE, false);
                pause = pause * 5 % 37;
                std::thread::sleep(Duration::from_micros(pause));
            }
        })
    });
    let exit = guest.run_vcpu_for(Duration::from_secs(3));
    over.store(true, Ordering::SeqCst);
    outside.into_iter().for_each(|thread| thread.join().expect("the other thread"));
    exit
}

fn collect(guest: &mut Guest, exit: VmExit) -> Outcome {
    let cpu = guest.cpu();
    let mut registers: Vec<(String, u64)> =
        (0..16).map(|i| (format!("r{i}"), cpu.gpr[i])).collect();
    let sys = &cpu.sys;
    for (name, value) in [
        ("rip", cpu.rip),
        // An interrupt that came last leaves nothing in them.
        ("rflags", cpu.rflags()),
        ("cr0", sys.cr0),
        ("cr2", sys.cr2),
        ("cr3", sys.cr3),
        ("cr4", sys.cr4),
        ("dr6", sys.dr6),
        ("dr7", sys.dr7),
        ("cpl", cpu.cpl.into()),
        ("kernel gs", sys.msrs.kernel_gs_base),
    ] {
        registers.push((name.into(), value));
    }
    registers.extend((0..4).map(|i| (format!("dr{i}"), sys.dr[i])));
    registers.extend((0..6).map(|i| (format!("segment {i}"), cpu.seg[i].selector.into())));
    registers.extend((0..6).map(|i| (format!("base {i}"), cpu.seg[i].base)));
    let words = cpu.vec.to_xsave();
    registers.extend((0..).zip(words.chunks_exact(8)).map(|(i, word)| {
        (format!("xsave {:#x}", i * 8), u64::from_le_bytes(word.try_into().expect("eight bytes")))
    }));
    let at_the_end = cpu.rip % PROGRAM_SIZE as u64 == END as u64 + 2;
    // Descriptor tables, page tables, stacks but for that of interrupts from outside, variables, log, programs, frames.
    let ranges = [
        (0x1_0000, 0x7_0000 - 0x1_0000),
        (STACK - 0x4000, 0x4000),
        (STACK + 0x4000, 0x4000),
        (IST, 0x1000),
        (IST + 0x2000, 0x1000),
        (VARIABLES, 0x1000),
        (LOG, 64 * (LOG_RECORDS + 1)),
        (PROGRAM, PROGRAM_SIZE as u64),
        (COPY, PROGRAM_SIZE as u64),
        (FRAMES, FRAME_COUNT * 4096),
        (LARGE, WINDOW_PAGES * 4096),
    ];
    let memory = ranges.into_iter().map(|(at, size)| (at, bytes(guest, at, size))).collect();
    let count = guest.get64(LOG).min(LOG_RECORDS);
    let vectors: BTreeSet<u8> = (0..count).map(|n| guest.get64(LOG + 64 + n * 64) as u8).collect();
    let bus = &guest.bus;
    let devices = format!(
        "{:?} {:?} {:?} {:?}",
        lock(&bus.port_writes),
        lock(&bus.mmio_writes),
        lock(&bus.mmio_reads),
        lock(&bus.scratch)
    );
    let exit = format!("{exit:?}");
    Outcome { exit, registers, vectors: vectors.into_iter().collect(), memory, devices, at_the_end }
}

fn bytes(guest: &Guest, at: u64, size: u64) -> Vec<u8> {
    use vm_memory::{Bytes, GuestAddress};
    let mut bytes = vec![0; size as usize];
    guest.ram.memory().read_slice(&mut bytes, GuestAddress(at)).expect("RAM");
    bytes
}

impl Outcome {
    pub fn vectors(&self) -> Vec<u8> {
        self.vectors.clone()
    }

    /// Was it ended by force? One that is stepped through STI and HLT gets its interrupt in between, and sleeps for ever, or until
    /// there is one from outside.
    pub fn is_by_force(&self) -> bool {
        self.exit == format!("{:?}", VmExit::Kicked)
    }

    pub fn is_at_the_end(&self) -> bool {
        self.at_the_end
    }

    /// Lines about what is different.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.exit != other.exit {
            lines.push(format!("exit: {} and {}", self.exit, other.exit));
        }
        for ((name, a), (_, b)) in self.registers.iter().zip(&other.registers) {
            if a != b {
                lines.push(format!("{name}: {a:#x} and {b:#x}"));
            }
        }
        for ((at, a), (_, b)) in self.memory.iter().zip(&other.memory) {
            let words = a.chunks_exact(8).zip(b.chunks_exact(8));
            for (offset, (a, b)) in (0..).step_by(8).zip(words).filter(|(_, (a, b))| a != b).take(8)
            {
                let word =
                    |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
                lines.push(format!("at {:#x}: {:#x} and {:#x}", at + offset, word(a), word(b)));
            }
        }
        if self.devices != other.devices {
            lines.push(format!("devices: {} and {}", self.devices, other.devices));
        }
        lines
    }
}
