//! Several vCPUs behind the engine seam, each on its thread.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use iced_x86::code_asm::*;
use mvm_engine::{Engine, MsiMessage, Vcpu, Vm, VmConfig, VmExit};
use mvm_memory::GuestRam;

use crate::EmuEngine;
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, DATA, Guest, PML4, RAM, TestBus};
use crate::vm::EmuVm;

/// Page of the start-up code.
const TRAMPOLINE: u64 = 0x8000;
/// Where application processors go on in 64-bit mode, with their APIC id in EDI.
pub(super) const AP_CODE: u64 = 0x9000;

/// A machine whose boot processor starts in 64-bit mode at [`CODE`].
pub(super) struct Machine {
    pub(super) vm: Arc<EmuVm>,
    pub(super) guest: Guest,
    vcpus: Vec<Box<dyn Vcpu>>,
}

impl Machine {
    pub(super) fn new(count: u32) -> Self {
        // The guest of another machine makes tables and the state; the RAM is shared.
        let mut guest = Guest::new();
        guest.cpu().sys.lapic.set_base(0xfee0_0d00).expect("x2APIC");
        guest.cpu().sys.lapic.write_msr(0x80f, 0x1ff).expect("SVR");
        let ram: GuestRam = guest.ram.clone();
        assert_eq!(ram.size(), RAM);
        let config = VmConfig {
            vcpus: count,
            cpu: Default::default(),
            ram,
            io: Arc::new(TestBus::default()),
        };
        EmuEngine::new().expect("the engine");
        let vm = Arc::new(EmuVm::new(config, crate::testing::tier(), None));
        let mut vcpus: Vec<_> = (0..count).map(|i| vm.create_vcpu(i).expect("a vCPU")).collect();
        let mut state = guest.vcpu.state().expect("a state");
        state.cpuid = Vec::new();
        vcpus[0].set_state(&state).expect("it is taken");
        let machine = Self { vm, guest, vcpus };
        machine.trampoline();
        machine
    }

    /// Real mode to 64-bit mode, as operating systems do it: x2APIC on, stack by APIC id.
    fn trampoline(&self) {
        let at = TRAMPOLINE;
        let mut code = asm!(16 at 0;
            cli(); mov(ax, cs); mov(ds, ax); lgdt(ptr(0x100)); mov(eax, cr0); or(eax, 1i32); mov(cr0, eax);
        );
        code.extend([0x66, 0xea, 0x00, 0x82, 0, 0, crate::testing::guest::sel::CODE32 as u8, 0]);
        self.guest.put(at, &code);
        self.guest.put(at + 0x100, &[0x7f, 0, 0x00, 0x00, 0x01, 0x00]);
        self.guest.put(
            at + 0x200,
            &asm!(32 at at + 0x200;
                mov(eax, 0x10i32); mov(ds, ax); mov(ss, ax); mov(es, ax); mov(eax, 0x620i32); mov(cr4, eax);
                mov(eax, PML4 as u32); mov(cr3, eax); mov(ecx, 0xc000_0080u32); rdmsr(); or(eax, 0x100i32); wrmsr();
                mov(eax, cr0); or(eax, 0x8001_0000u32); mov(cr0, eax); push(8i32); push(0x8300i32); retf();
            ),
        );
        self.guest.put(at + 0x100, &[0x7f, 0, 0x00, 0x00, 0x01, 0x00]);
        self.guest.put(
            at + 0x300,
            &asm!(64 at at + 0x300;
                mov(ecx, 0x1bi32); rdmsr(); or(eax, 0xc00i32); wrmsr(); mov(ecx, 0x80fi32); mov(eax, 0x1ffi32); xor(edx, edx);
                wrmsr(); mov(ecx, 0x802i32); rdmsr(); mov(edi, eax); shl(eax, 12u32); mov(rsp, 0xa0_0000u64); add(rsp, rax);
                mov(rcx, 0x1_1000u64); sub(rsp, 16i32); mov(word_ptr(rsp), 0xfffi32); mov(qword_ptr(rsp + 2), rcx);
                lidt(ptr(rsp)); mov(rax, AP_CODE); jmp(rax);
            ),
        );
        // RSP is not set in 32-bit code: a stack for its two pushes.
        let code = self.guest.get::<0x100>(at + 0x200);
        let mut with_stack =
            asm!(32 at at + 0x200; mov(eax, 0x10i32); mov(ss, ax); mov(esp, 0x7f00i32););
        with_stack.extend(code);
        self.guest.put(at + 0x200, &with_stack[..0x100]);
    }

    /// Runs every vCPU on a thread until one of them ends for good, then stops the others.
    pub(super) fn run(self) -> (Guest, Vec<VmExit>) {
        let (guest, exits, _) = self.run_all();
        (guest, exits)
    }

    /// The same, with the vCPUs as they were left.
    fn run_all(self) -> (Guest, Vec<VmExit>, Vec<Box<dyn Vcpu>>) {
        let count = self.vcpus.len();
        let kickers: Vec<_> = self.vcpus.iter().map(|v| v.kicker()).collect();
        let (ended, over) = mpsc::channel();
        let threads: Vec<_> = self
            .vcpus
            .into_iter()
            .enumerate()
            .map(|(index, mut vcpu)| {
                let ended = ended.clone();
                std::thread::spawn(move || {
                    let exit = vcpu.run().expect("the host does not fail");
                    ended.send((index, exit)).expect("somebody listens");
                    vcpu
                })
            })
            .collect();
        let mut exits = vec![VmExit::Kicked; count];
        for _ in 0..count {
            let (index, exit) = match over.recv_timeout(Duration::from_secs(240)) {
                Ok(end) => end,
                Err(_) => {
                    kickers.iter().for_each(|k| k.kick());
                    over.recv().expect("a kicked vCPU returns")
                }
            };
            exits[index] = exit;
            kickers.iter().for_each(|k| k.kick());
        }
        let vcpus = threads.into_iter().map(|t| t.join().expect("a vCPU's thread")).collect();
        (self.guest, exits, vcpus)
    }
}

/// Sends INIT and SIPI to all others.
pub(super) fn start_others() -> Vec<u8> {
    asm!(64 at CODE;
        mov(ecx, 0x830i32); xor(edx, edx); mov(eax, 0xc_4500i32); wrmsr(); mov(eax, 0xc_4608i32); wrmsr(); wrmsr();
    )
}

#[test]
fn application_processors_start_by_init_and_sipi() {
    let machine = Machine::new(4);
    machine.guest.put(
        AP_CODE,
        &asm!(64 at AP_CODE;
            mov(rbx, DATA); mov(dword_ptr(rbx + rdi * 4 + 16), edi); mov(eax, cs); mov(dword_ptr(rbx + rdi * 4 + 64), eax);
            lock().inc(dword_ptr(rbx)); cli(); hlt();),
    );
    let mut code = start_others();
    code.extend(asm!(64 at 0, [wait_]; mov(rbx, DATA); set_label(&mut wait_); pause(); cmp(dword_ptr(rbx), 3i32); jne(wait_); hlt();));
    machine.guest.put(CODE, &code);
    let (guest, exits) = machine.run();
    assert!(exits.contains(&VmExit::HaltedForever), "{exits:?}");
    assert_eq!(guest.get32(DATA), 3);
    for id in 1..4 {
        assert_eq!(
            (guest.get32(DATA + 16 + id * 4), guest.get32(DATA + 64 + id * 4)),
            (id as u32, 8)
        );
    }
}

#[test]
fn locked_operations_of_two_processors_lose_nothing() {
    let machine = Machine::new(2);
    // Counters inside a page, across pages, by XADD, CMPXCHG and XCHG-built locks.
    let body = |at: u64| {
        asm!(64 at at, [again, retry, take, done];
            mov(rbx, DATA); mov(ecx, 20_000i32);
            set_label(&mut again);
            lock().inc(qword_ptr(rbx + 8));
            lock().add(qword_ptr(rbx + 0xffc), 1i32);
            mov(eax, 1i32); lock().xadd(qword_ptr(rbx + 16), rax);
            set_label(&mut retry); mov(rax, qword_ptr(rbx + 24)); lea(rdx, ptr(rax + 1)); lock().cmpxchg(qword_ptr(rbx + 24), rdx); jne(retry);
            set_label(&mut take); mov(eax, 1i32); xchg(dword_ptr(rbx + 32), eax); test(eax, eax); pause(); jnz(take);
            inc(qword_ptr(rbx + 40)); mov(dword_ptr(rbx + 32), 0i32);
            dec(ecx); jnz(again);
            lock().inc(dword_ptr(rbx)); set_label(&mut done); pause(); cmp(dword_ptr(rbx), 2i32); jne(done); cli(); hlt();
        )
    };
    machine.guest.put(AP_CODE, &body(AP_CODE));
    let mut code = start_others();
    let at = CODE + code.len() as u64;
    code.extend(body(at));
    machine.guest.put(CODE, &code);
    let (guest, exits) = machine.run();
    assert!(exits.contains(&VmExit::HaltedForever), "{exits:?}");
    for at in [8, 0xffc, 16, 24, 40] {
        assert_eq!(guest.get64(DATA + at), 40_000, "{at:#x}");
    }
}

#[test]
fn another_processor_writes_code_that_runs() {
    let machine = Machine::new(2);
    // The first writes a new immediate and tells; the second runs the function and answers with what it got, which is
    // compared. Cross-modifying code with the synchronisation that the manual asks for (SDM vol. 3, 9.1.3).
    let function = DATA + 0x1000;
    machine.guest.put(function, &asm!(64 at function; mov(eax, 0i32); ret();));
    machine.guest.put(
        AP_CODE,
        &asm!(64 at AP_CODE, [next, wait_, end];
            mov(rbx, DATA); mov(rsi, function); xor(ecx, ecx);
            set_label(&mut next); inc(ecx);
            set_label(&mut wait_); pause(); cmp(dword_ptr(rbx), -1i32); je(end); cmp(dword_ptr(rbx), ecx); jne(wait_);
            mov(r8, rcx); xor(eax, eax); cpuid(); mov(rcx, r8); mov(rbx, DATA); call(rsi); mov(dword_ptr(rbx + 64), eax);
            mov(dword_ptr(rbx + 128), ecx); jmp(next);
            set_label(&mut end); cli(); hlt();
        ),
    );
    let mut code = start_others();
    let at = CODE + code.len() as u64;
    code.extend(asm!(64 at at, [next, wait_, bad, end];
        mov(rbx, DATA); mov(rsi, function); xor(ecx, ecx); xor(edi, edi);
        set_label(&mut next); inc(ecx); cmp(ecx, 3000i32); ja(end);
        mov(dword_ptr(rsi + 1), ecx); mov(dword_ptr(rbx), ecx);
        set_label(&mut wait_); pause(); cmp(dword_ptr(rbx + 128), ecx); jne(wait_);
        cmp(dword_ptr(rbx + 64), ecx); je(next);
        set_label(&mut bad); inc(edi); jmp(next);
        set_label(&mut end); mov(dword_ptr(rbx + 192), edi); mov(dword_ptr(rbx + 196), ecx); mov(dword_ptr(rbx), -1i32); hlt();
    ));
    machine.guest.put(CODE, &code);
    let (guest, exits) = machine.run();
    assert!(exits.contains(&VmExit::HaltedForever), "{exits:?}");
    assert_eq!((guest.get32(DATA + 192), guest.get32(DATA + 196)), (0, 3001));
}

#[test]
fn tlb_shootdowns_by_ipi() {
    let mut machine = Machine::new(2);
    let page = 0x5000_0000u64;
    machine.guest.map(page, 0x60_0000, 3);
    machine.guest.put64(0x60_0000, 1);
    machine.guest.put64(0x60_1000, 2);
    let entry = machine.guest.entry(page, 1);
    // The handler of 0xf0 flushes the page and acknowledges.
    machine.guest.handler(
        0xf0,
        &asm!(64 at Guest::handler_at(0xf0);
            push(rax); push(rcx); push(rdx); mov(rax, page); invlpg(ptr(rax)); mov(ecx, 0x80bi32); xor(eax, eax); xor(edx, edx);
            wrmsr(); mov(rax, DATA); lock().inc(dword_ptr(rax + 64)); pop(rdx); pop(rcx); pop(rax); iretq();),
    );
    machine.guest.put(
        AP_CODE,
        &asm!(64 at AP_CODE, [spin];
            mov(rbx, DATA); mov(rsi, page); mov(eax, dword_ptr(rsi)); mov(dword_ptr(rbx), 1i32); sti();
            set_label(&mut spin); mov(eax, dword_ptr(rsi)); mov(dword_ptr(rbx + 128), eax); jmp(spin);
        ),
    );
    let mut code = start_others();
    let at = CODE + code.len() as u64;
    // 1000 times: swap the frame, IPI, wait for the answer, then the other must see the new frame only.
    code.extend(asm!(64 at at, [ready, next, answered, seen, other_frame, store];
        mov(rbx, DATA); mov(rdi, entry); mov(rsi, page);
        set_label(&mut ready); pause(); cmp(dword_ptr(rbx), 1i32); jne(ready);
        xor(r15d, r15d);
        set_label(&mut next); inc(r15d); xor(qword_ptr(rdi), 0x1000i32); invlpg(ptr(rsi));
        mov(ecx, 0x830i32); mov(edx, 1i32); mov(eax, 0x40f0i32); wrmsr();
        set_label(&mut answered); pause(); cmp(dword_ptr(rbx + 64), r15d); jne(answered);
        mov(dword_ptr(rbx + 128), 0i32);
        set_label(&mut seen); pause(); mov(edx, dword_ptr(rbx + 128)); test(edx, edx); jz(seen);
        cmp(edx, dword_ptr(rsi)); je(other_frame); inc(r14d);
        set_label(&mut other_frame); cmp(r15d, 1000i32); jb(next);
        set_label(&mut store); mov(dword_ptr(rbx + 192), r14d); mov(dword_ptr(rbx + 196), r15d);
        mov(eax, 0xc_4500i32); xor(edx, edx); mov(ecx, 0x830i32); wrmsr(); mov(rsp, rdx); ud2();
    ));
    machine.guest.put(CODE, &code);
    let (guest, exits) = machine.run();
    // It ends by a triple fault of the first, with the second in wait for a start-up IPI again.
    assert!(matches!(exits[0], VmExit::TripleFault(_)), "{exits:?}");
    assert_eq!((guest.get32(DATA + 192), guest.get32(DATA + 196)), (0, 1000));
}

#[test]
fn msis_and_ipis_reach_their_processor() {
    let machine = Machine::new(2);
    // Each handler counts for its vCPU; a device thread sends MSIs to both, the first sends IPIs to the second by its
    // logical id and with "all but self".
    let mut machine = machine;
    machine.guest.handler(
        0x61,
        &asm!(64 at Guest::handler_at(0x61);
            push(rax); push(rcx); push(rdx); mov(ecx, 0x802i32); rdmsr(); mov(rcx, DATA + 64); lock().inc(dword_ptr(rcx + rax * 4));
            mov(ecx, 0x80bi32); xor(eax, eax); xor(edx, edx); wrmsr(); pop(rdx); pop(rcx); pop(rax); iretq();),
    );
    machine.guest.put(
        AP_CODE,
        &asm!(64 at AP_CODE, [idle];
            mov(rbx, DATA); mov(dword_ptr(rbx), 1i32); set_label(&mut idle); sti(); hlt(); cli(); cmp(dword_ptr(rbx + 68), 3i32); jb(idle); hlt();
        ),
    );
    let mut code = start_others();
    let at = CODE + code.len() as u64;
    code.extend(asm!(64 at at, [ready, first, second, msis];
        mov(rbx, DATA); set_label(&mut ready); pause(); cmp(dword_ptr(rbx), 1i32); jne(ready);
        mov(ecx, 0x830i32); mov(edx, 2i32); mov(eax, 0x4861i32); wrmsr();
        set_label(&mut first); pause(); cmp(dword_ptr(rbx + 68), 1i32); jne(first);
        xor(edx, edx); mov(eax, 0xc_4061i32); wrmsr();
        set_label(&mut second); pause(); cmp(dword_ptr(rbx + 68), 2i32); jne(second);
        // The device may send.
        mov(dword_ptr(rbx + 4), 1i32); sti(); set_label(&mut msis); pause(); cmp(dword_ptr(rbx + 64), 1i32); jne(msis); cli(); hlt();
    ));
    machine.guest.put(CODE, &code);
    let (vm, ram) = (machine.vm.clone(), machine.guest.ram.clone());
    let counted = vm.clone();
    let device = std::thread::spawn(move || {
        use vm_memory::{Bytes, GuestAddress};
        for _ in 0..u64::MAX {
            let go: u32 = ram.memory().read_obj(GuestAddress(DATA + 4)).expect("RAM");
            if go != 0 {
                break;
            }
            std::thread::yield_now();
        }
        for id in 0..2u64 {
            vm.signal_msi(MsiMessage { address: 0xfee0_0000 | id << 12, data: 0x61 });
        }
    });
    let (guest, exits) = machine.run();
    device.join().expect("the device");
    assert!(exits.contains(&VmExit::HaltedForever), "{exits:?}");
    assert_eq!((guest.get32(DATA + 64), guest.get32(DATA + 68)), (1, 3));
    // Code takes memory, which is told, where code is made.
    let translated = crate::testing::tier() == crate::Tier::Translator;
    assert_eq!(counted.code_memory() > 0, translated);
    let rows = counted.metrics().0;
    for name in
        ["vcpu1.jit-blocks", "vcpu1.jit-memory", "vcpu1.jit-calls", "vcpu1.jit-killed-pages"]
    {
        assert_eq!(rows.iter().any(|(row, _)| row == name), translated, "{name}");
    }
}

#[test]
fn nmis_of_two_senders_are_both_taken() {
    // The first sends itself an NMI while the second sends it one, and an interrupt behind that; when the interrupt is there,
    // both were handled. As many rounds as it takes to see them come in every order.
    const ROUNDS: i32 = 3000;
    let mut machine = Machine::new(2);
    let (ready, go, answered, over) = (0, 8, 16, 24);
    let (received, flushed) = (32, 40);
    machine.guest.handler(
        2,
        &asm!(64 at Guest::handler_at(2); inc(qword_ptr((DATA + received) as u32)); iretq();),
    );
    machine.guest.handler(
        0x44,
        &asm!(64 at Guest::handler_at(0x44);
            push(rax); push(rcx); push(rdx); mov(qword_ptr((DATA + flushed) as u32), 1i32); mov(ecx, 0x80bi32); xor(eax, eax);
            xor(edx, edx); wrmsr(); pop(rdx); pop(rcx); pop(rax); iretq();),
    );
    machine.guest.put(
        AP_CODE,
        &asm!(64 at AP_CODE, [again, wait_, out];
            mov(rbx, DATA); xor(esi, esi);
            set_label(&mut again); inc(rsi); mov(qword_ptr(rbx + ready), rsi);
            set_label(&mut wait_); pause(); cmp(qword_ptr(rbx + over), 0i32); jne(out); cmp(qword_ptr(rbx + go), rsi); jne(wait_);
            mov(ecx, 0x830i32); xor(edx, edx); mov(eax, 0x4400i32); wrmsr(); mov(eax, 0x4044i32); wrmsr();
            mov(qword_ptr(rbx + answered), rsi); jmp(again); set_label(&mut out); cli(); hlt();
        ),
    );
    let mut code = start_others();
    let at = CODE + code.len() as u64;
    code.extend(asm!(64 at at, [again, wait_, come, done, out];
        mov(rbx, DATA); xor(esi, esi); sti();
        set_label(&mut again); inc(rsi); mov(qword_ptr(rbx + received), 0i32); mov(qword_ptr(rbx + flushed), 0i32);
        set_label(&mut wait_); pause(); cmp(qword_ptr(rbx + ready), rsi); jne(wait_); mov(qword_ptr(rbx + go), rsi);
        mov(ecx, 0x830i32); xor(edx, edx); mov(eax, 0x4400i32); wrmsr();
        set_label(&mut come); pause(); cmp(qword_ptr(rbx + flushed), 1i32); jne(come);
        mov(rdi, qword_ptr(rbx + received)); cmp(rdi, 2i32); jne(out);
        set_label(&mut done); pause(); cmp(qword_ptr(rbx + answered), rsi); jne(done);
        cmp(rsi, ROUNDS); jb(again);
        set_label(&mut out); mov(qword_ptr(rbx + over), 1i32); mov(qword_ptr(rbx + 48), rsi); mov(qword_ptr(rbx + 56), rdi); cli(); hlt();
    ));
    machine.guest.put(CODE, &code);
    let (guest, exits) = machine.run();
    assert!(exits.contains(&VmExit::HaltedForever), "{exits:?}");
    assert_eq!((guest.get64(DATA + 48), guest.get64(DATA + 56)), (ROUNDS as u64, 2));
}

/// How Linux's paravirtual spinlocks wait: halted with interrupts off until the holder kicks.
#[test]
fn halts_without_interrupts_and_kicks_lose_nobody() {
    const ROUNDS: i32 = 30_000;
    let machine = Machine::new(2);
    // The turn is at DATA + 8; each waits for its own number, gives the turn away, and kicks.
    let body = |at: u64, own: i32| {
        asm!(64 at at, [wait_, mine, end];
            cli(); mov(rdi, DATA);
            set_label(&mut wait_); cmp(dword_ptr(rdi + 8), own); je(mine); hlt(); jmp(wait_);
            set_label(&mut mine); inc(dword_ptr(rdi)); mov(dword_ptr(rdi + 8), 1 - own);
            mov(eax, 5i32); xor(ebx, ebx); mov(ecx, 1 - own); vmcall();
            cmp(dword_ptr(rdi), ROUNDS); jb(wait_);
            set_label(&mut end); hlt(); jmp(end);
        )
    };
    machine.guest.put(AP_CODE, &body(AP_CODE, 1));
    let mut code = start_others();
    let at = CODE + code.len() as u64;
    code.extend(body(at, 0));
    machine.guest.put(CODE, &code);
    let (guest, exits) = machine.run();
    assert!(exits.contains(&VmExit::HaltedForever), "{exits:?}");
    let rounds = guest.get32(DATA) as i32;
    assert!((ROUNDS..ROUNDS + 2).contains(&rounds), "{rounds}");
}

#[test]
fn a_machine_that_stops_before_it_starts_the_others_has_stopped() {
    let machine = Machine::new(3);
    machine.guest.put(CODE, &asm!(64 at CODE; cli(); hlt();));
    let (_, exits, mut vcpus) = machine.run_all();
    assert!(exits.contains(&VmExit::HaltedForever), "{exits:?}");
    // Whoever did not say so, because it slept when the last one stopped, says so now.
    for vcpu in &mut vcpus {
        let exit = vcpu.run().expect("the host does not fail");
        let exit = if exit == VmExit::Kicked { vcpu.run().expect("the host") } else { exit };
        assert_eq!(exit, VmExit::HaltedForever);
    }
}

#[test]
fn what_a_machine_refuses() {
    let ram = GuestRam::new(&[(0, 0x1000)]).expect("RAM");
    let engine = EmuEngine::new().expect("the engine").with_tier(crate::testing::tier());
    for vcpus in [0, crate::MAX_VCPUS + 1] {
        let config = VmConfig {
            vcpus,
            cpu: Default::default(),
            ram: ram.clone(),
            io: Arc::new(TestBus::default()),
        };
        assert!(engine.create_vm(config).is_err());
    }
    let vm = engine
        .create_vm(VmConfig {
            vcpus: 1,
            cpu: Default::default(),
            ram,
            io: Arc::new(TestBus::default()),
        })
        .expect("a machine");
    let vcpu = vm.create_vcpu(0).expect("the vCPU");
    assert!(vm.create_vcpu(0).is_err() && vm.create_vcpu(1).is_err());
    drop(vcpu);
    for message in
        [MsiMessage { address: 0, data: u32::MAX }, MsiMessage { address: u64::MAX, data: 0 }]
    {
        vm.signal_msi(message);
    }
    assert!(!vm.metrics().0.is_empty());
}
