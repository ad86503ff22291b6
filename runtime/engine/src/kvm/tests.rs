//! Tiny guests in real mode, as bytes: all that needs neither tables nor an assembler.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mvm_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::KvmEngine;
use crate::cpuid::CpuModel;
use crate::{Engine, IoBus, Kick, MpState, Vcpu, Vm, VmConfig, VmExit};

/// Where code lies.
const CODE: u64 = 0x1000;
/// Nothing is there.
const MMIO: u64 = 0x8000_0000;
/// Longest time that a guest may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// One access: port or address, and the bytes written; none for a read.
type Access = (u64, Vec<u8>);

/// Remembers what is written, and answers reads with counted bytes.
#[derive(Debug, Default)]
struct TestBus {
    accesses: Mutex<Vec<Access>>,
    kick: Mutex<Option<Arc<dyn Kick>>>,
}

impl TestBus {
    fn note(&self, at: u64, data: &[u8]) {
        self.accesses.lock().unwrap().push((at, data.to_vec()));
        if let Some(kick) = &*self.kick.lock().unwrap() {
            kick.kick();
        }
    }
}

impl IoBus for TestBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(self.accesses.lock().unwrap().len() as u8);
        self.note(port.into(), &[]);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.note(port.into(), data);
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        data.fill(0x5a);
        self.note(gpa, &[]);
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.note(gpa, data);
    }
    fn eoi(&self, _: u8) {}
}

struct Guest {
    vm: Arc<dyn Vm>,
    vcpus: Vec<Box<dyn Vcpu>>,
    ram: GuestRam,
    bus: Arc<TestBus>,
}

impl Guest {
    /// A machine, or `None` with a line of explanation if the host has no `/dev/kvm` for us.
    fn new(vcpus: u32) -> Option<Self> {
        Self::of(vcpus, CpuModel::default())
    }

    /// The same with processors of this model.
    fn of(vcpus: u32, cpu: CpuModel) -> Option<Self> {
        Self::with(vcpus, cpu, GuestRam::new(&[(0, 1 << 20)]).unwrap())
    }

    /// The same with this RAM.
    fn with(vcpus: u32, cpu: CpuModel, ram: GuestRam) -> Option<Self> {
        let engine = match KvmEngine::new() {
            Ok(engine) => engine,
            Err(e) => {
                eprintln!("skipped: {e}");
                return None;
            }
        };
        let bus = Arc::new(TestBus::default());
        let config = VmConfig { vcpus, cpu, ram: ram.clone(), io: bus.clone() };
        let vm = engine.create_vm(config).unwrap();
        let vcpus = (0..vcpus).map(|i| vm.create_vcpu(i).unwrap()).collect();
        Some(Self { vm, vcpus, ram, bus })
    }

    /// Has vCPU 0 begin at `code`, in real mode with all segments at zero.
    fn load(&mut self, code: &[u8]) {
        self.ram.memory().write_slice(code, GuestAddress(CODE)).unwrap();
        let mut state = self.vcpus[0].state().unwrap();
        for segment in &mut state.sregs.segments {
            (segment.base, segment.selector) = (0, 0);
        }
        state.regs.rip = CODE;
        state.regs.rflags = 2;
        state.mp_state = MpState::Running;
        self.vcpus[0].set_state(&state).unwrap();
    }

    fn run(&mut self, code: &[u8]) -> VmExit {
        self.load(code);
        run(&mut *self.vcpus[0])
    }

    fn accesses(&self) -> Vec<Access> {
        std::mem::take(&mut *self.bus.accesses.lock().unwrap())
    }

    fn metric(&self, name: &str) -> u64 {
        let metrics = self.vm.metrics().0;
        metrics.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}")).1
    }
}

/// Runs a vCPU; a guest that does not end fails the test.
fn run(vcpu: &mut dyn Vcpu) -> VmExit {
    let kick = vcpu.kicker();
    let (done, over) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let overdue = over.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
        if overdue {
            kick.kick();
        }
        overdue
    });
    let exit = vcpu.run().unwrap();
    drop(done);
    assert!(!watchdog.join().unwrap(), "the guest does not end");
    exit
}

#[test]
fn port_accesses_reach_the_bus_one_by_one() {
    let Some(mut guest) = Guest::new(1) else { return };
    // mov al, 0x41; out 0x10, al; mov eax, 0x11223344; mov dx, 0x3f8; out dx, eax; in ax, 0x20; cli; hlt
    let exit = guest.run(&[
        0xb0, 0x41, 0xe6, 0x10, 0x66, 0xb8, 0x44, 0x33, 0x22, 0x11, 0xba, 0xf8, 0x03, 0x66, 0xef,
        0xe5, 0x20, 0xfa, 0xf4,
    ]);
    assert_eq!(exit, VmExit::HaltedForever);
    let expected = [(0x10, vec![0x41]), (0x3f8, vec![0x44, 0x33, 0x22, 0x11]), (0x20, Vec::new())];
    assert_eq!(guest.accesses(), expected);
    assert_eq!(guest.vcpus[0].state().unwrap().regs.gpr[0] & 0xffff, 0x0202);
    assert_eq!((guest.metric("vcpu0.io-out-exits"), guest.metric("vcpu0.io-in-exits")), (2, 1));
    assert_eq!(guest.metric("vcpu0.exits"), 3);
    assert!(guest.metric("vcpu0.looks") >= 1);
}

#[test]
fn string_accesses_have_the_size_of_their_items() {
    let Some(mut guest) = Guest::new(1) else { return };
    let text: Vec<u8> = (1..=6).collect();
    guest.ram.memory().write_slice(&text, GuestAddress(0x2000)).unwrap();
    // cld; mov si, 0x2000; mov cx, 3; mov dx, 0x70; rep outsw; mov di, 0x3000; mov cx, 5; rep insb; cli; hlt
    let exit = guest.run(&[
        0xfc, 0xbe, 0x00, 0x20, 0xb9, 0x03, 0x00, 0xba, 0x70, 0x00, 0xf3, 0x6f, 0xbf, 0x00, 0x30,
        0xb9, 0x05, 0x00, 0xf3, 0x6c, 0xfa, 0xf4,
    ]);
    assert_eq!(exit, VmExit::HaltedForever);
    let accesses = guest.accesses();
    assert_eq!(accesses[..3], [(0x70, vec![1, 2]), (0x70, vec![3, 4]), (0x70, vec![5, 6])]);
    // KVM reads ahead; what it has too much of it keeps.
    let mut read = [0; 5];
    guest.ram.memory().read_slice(&mut read, GuestAddress(0x3000)).unwrap();
    assert_eq!(read, [3, 4, 5, 6, 7]);
    let state = guest.vcpus[0].state().unwrap();
    assert_eq!((state.regs.gpr[1] & 0xffff, state.regs.gpr[7] & 0xffff), (0, 0x3005));
}

#[test]
fn accesses_outside_ram_reach_the_bus() {
    let Some(mut guest) = Guest::new(1) else { return };
    // mov eax, 0x80000000; mov ds' base by hand below; mov [bx], ax; mov cl, [bx+5]; cli; hlt
    guest.load(&[0x89, 0x07, 0x8a, 0x4f, 0x05, 0xfa, 0xf4]);
    let mut state = guest.vcpus[0].state().unwrap();
    state.sregs.segments[3].base = MMIO;
    state.regs.gpr[0] = 0xbeef;
    guest.vcpus[0].set_state(&state).unwrap();
    assert_eq!(run(&mut *guest.vcpus[0]), VmExit::HaltedForever);
    assert_eq!(guest.accesses(), [(MMIO, vec![0xef, 0xbe]), (MMIO + 5, vec![])]);
    assert_eq!(guest.vcpus[0].state().unwrap().regs.gpr[1] & 0xff, 0x5a);
    assert_eq!(guest.metric("vcpu0.mmio-write-exits"), 1);
}

#[test]
fn a_kick_before_a_run_is_not_lost() {
    let Some(mut guest) = Guest::new(1) else { return };
    // jmp $
    guest.load(&[0xeb, 0xfe]);
    for _ in 0..100 {
        guest.vcpus[0].kicker().kick();
        assert_eq!(run(&mut *guest.vcpus[0]), VmExit::Kicked);
    }
    assert_eq!(guest.metric("vcpu0.kicks"), 100);
}

#[test]
fn kicks_from_another_thread_end_every_run() {
    let Some(mut guest) = Guest::new(1) else { return };
    guest.load(&[0xeb, 0xfe]);
    let kick = guest.vcpus[0].kicker();
    let (ask, asked) = mpsc::channel::<()>();
    let kicker = std::thread::spawn(move || asked.iter().for_each(|()| kick.kick()));
    for _ in 0..500 {
        // Sometimes it comes before the run, sometimes in it, sometimes between look and run.
        ask.send(()).unwrap();
        assert_eq!(run(&mut *guest.vcpus[0]), VmExit::Kicked);
    }
    drop(ask);
    kicker.join().unwrap();
}

#[test]
fn an_access_is_complete_when_a_kick_ends_the_run() {
    let Some(mut guest) = Guest::new(1) else { return };
    // in al, 0x20; mov ah, al; jmp $
    guest.load(&[0xe4, 0x20, 0x88, 0xc4, 0xeb, 0xfe]);
    guest.bus.note(0, &[]);
    *guest.bus.kick.lock().unwrap() = Some(guest.vcpus[0].kicker());
    assert_eq!(run(&mut *guest.vcpus[0]), VmExit::Kicked);
    let state = guest.vcpus[0].state().unwrap();
    assert_eq!(state.regs.gpr[0] & 0xff, 1, "the answer is in its register");
    assert_eq!(state.regs.rip, CODE + 2, "and nothing after it has run");
}

#[test]
fn a_guest_that_only_waits_is_not_taken_for_dead() {
    let Some(mut guest) = Guest::new(1) else { return };
    // sti; hlt; jmp back
    guest.load(&[0xfb, 0xf4, 0xeb, 0xfd]);
    let kick = guest.vcpus[0].kicker();
    let kicker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        kick.kick();
    });
    assert_eq!(run(&mut *guest.vcpus[0]), VmExit::Kicked);
    kicker.join().unwrap();
    let looks = guest.metric("vcpu0.looks");
    // 5, 10, 20, 40, 80, 160 ms: it is not looked at all the time, even if the host is slow.
    assert!((1..=12).contains(&looks), "{looks} looks");
    let state = guest.vcpus[0].state().unwrap();
    assert_eq!(state.mp_state, MpState::Halted);
}

#[test]
fn a_machine_is_dead_when_all_its_processors_are() {
    let Some(mut guest) = Guest::new(3) else { return };
    guest.load(&[0xfa, 0xf4]);
    let mut others: Vec<_> = guest.vcpus.drain(1..).collect();
    let threads: Vec<_> =
        others.drain(..).map(|mut vcpu| std::thread::spawn(move || run(&mut *vcpu))).collect();
    assert_eq!(run(&mut *guest.vcpus[0]), VmExit::HaltedForever);
    for thread in threads {
        assert_eq!(thread.join().unwrap(), VmExit::HaltedForever, "they wait for a start-up IPI");
    }
    // It says so again, and is alive with another state.
    assert_eq!(run(&mut *guest.vcpus[0]), VmExit::HaltedForever);
    guest.load(&[0xeb, 0xfe]);
    guest.vcpus[0].kicker().kick();
    assert_eq!(run(&mut *guest.vcpus[0]), VmExit::Kicked);
}

#[test]
fn one_dead_processor_is_not_the_end_while_another_runs() {
    let Some(mut guest) = Guest::new(2) else { return };
    guest.load(&[0xfa, 0xf4]);
    let mut running = guest.vcpus.remove(1);
    let mut state = running.state().unwrap();
    // jmp $
    guest.ram.memory().write_slice(&[0xeb, 0xfe], GuestAddress(0x5000)).unwrap();
    state.mp_state = MpState::Running;
    state.sregs.segments[1].base = 0x5000;
    state.regs.rip = 0;
    running.set_state(&state).unwrap();
    let end = running.kicker();
    let thread = std::thread::spawn(move || run(&mut *running));
    let own = guest.vcpus[0].kicker();
    let kicker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        own.kick();
        end.kick();
    });
    assert_eq!(run(&mut *guest.vcpus[0]), VmExit::Kicked);
    assert_eq!(thread.join().unwrap(), VmExit::Kicked);
    kicker.join().unwrap();
}

#[test]
fn a_triple_fault_is_told_with_its_place() {
    let Some(mut guest) = Guest::new(1) else { return };
    // ud2, in protected mode without a single interrupt gate.
    guest.load(&[0x0f, 0x0b]);
    protected(&mut guest);
    let exit = run(&mut *guest.vcpus[0]);
    let VmExit::TripleFault(fault) = exit else { panic!("{exit:?}") };
    assert_eq!(fault.vcpu, 0);
    assert!(fault.registers.contains("cr0="), "{fault}");
    assert_eq!(guest.metric("vcpu0.shutdown-exits"), 1);
}

/// 32-bit protected mode with flat segments, SSE switched on, and no IDT.
fn protected(guest: &mut Guest) {
    let mut state = guest.vcpus[0].state().unwrap();
    for (index, segment) in state.sregs.segments.iter_mut().enumerate() {
        let access = if index == 1 { 0xc09b } else { 0xc093 };
        *segment = crate::Segment { selector: 8, base: 0, limit: u32::MAX, access };
    }
    state.sregs.idtr.limit = 0;
    state.sregs.cr0 = 0x33;
    state.sregs.cr4 |= 0x600;
    guest.vcpus[0].set_state(&state).unwrap();
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_told_with_its_bytes() {
    let Some(mut guest) = Guest::new(1) else { return };
    // paddq xmm0, xmm0; cli; hlt
    let code = [0x66, 0x0f, 0xd4, 0xc0, 0xfa, 0xf4];
    guest.load(&code);
    protected(&mut guest);
    match run(&mut *guest.vcpus[0]) {
        // Hardware runs it.
        VmExit::HaltedForever => {}
        VmExit::InternalError(fault) => {
            assert!(fault.reason.contains("suberror 1"), "{fault}");
            assert_eq!((fault.rip, &fault.bytes[..4]), (CODE, &code[..4]), "{fault}");
            assert!(fault.registers.contains("cr4="), "{fault}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_vcpus_write_is_logged_between_start_and_stop() {
    let Some(mut guest) = Guest::new(1) else { return };
    let dirty = |guest: &Guest| guest.ram.regions()[0].tracker.take_dirty()[0];
    // mov [si], al; cli; hlt
    let store = |guest: &mut Guest, page: u64| {
        guest.load(&[0x88, 0x04, 0xfa, 0xf4]);
        let mut state = guest.vcpus[0].state().unwrap();
        state.regs.gpr[6] = page << 12;
        guest.vcpus[0].set_state(&state).unwrap();
        assert_eq!(run(&mut *guest.vcpus[0]), VmExit::HaltedForever);
    };
    store(&mut guest, 4);
    guest.vm.collect_writes().unwrap();
    assert_eq!(dirty(&guest), 1 << 1, "only what was loaded: nothing is logged yet");
    guest.vm.log_writes(true).unwrap();
    store(&mut guest, 5);
    assert_eq!(dirty(&guest), 1 << 1);
    guest.vm.collect_writes().unwrap();
    assert_eq!(dirty(&guest), 1 << 5);
    store(&mut guest, 6);
    guest.vm.log_writes(false).unwrap();
    assert_eq!(dirty(&guest), 1 << 6 | 1 << 1);
    store(&mut guest, 7);
    guest.vm.collect_writes().unwrap();
    assert_eq!(dirty(&guest), 1 << 1);
}

#[test]
fn ram_that_grows_is_the_guests_from_then_on_and_logged_like_the_rest() {
    let (low, growth) = ([(0, 0x8000)], Some((0x8000, 0x8000)));
    let ram = GuestRam::growing(&low, growth, mvm_memory::Backing::Small).unwrap();
    let Some(mut guest) = Guest::with(1, CpuModel::default(), ram) else { return };
    // mov [si], al; cli; hlt
    let store = |guest: &mut Guest, at: u64| {
        guest.load(&[0x88, 0x04, 0xfa, 0xf4]);
        let mut state = guest.vcpus[0].state().unwrap();
        (state.regs.gpr[0], state.regs.gpr[6]) = (0x5a, at);
        guest.vcpus[0].set_state(&state).unwrap();
        assert_eq!(run(&mut *guest.vcpus[0]), VmExit::HaltedForever);
    };
    let host = guest.ram.regions()[1].host as usize;
    let byte = |at: usize| {
        // SAFETY: inside the region's mapping, which the guest's RAM keeps.
        unsafe { ((host + at) as *const u8).read_volatile() }
    };
    let tracker = guest.ram.regions()[1].tracker.clone();
    store(&mut guest, 0x9000);
    assert_eq!(byte(0x1000), 0, "withheld: the store is the bus's");
    guest.vm.log_writes(true).unwrap();
    tracker.make_usable(0x2000);
    guest.vm.ram_grew().unwrap();
    store(&mut guest, 0x9000);
    store(&mut guest, 0xa000);
    assert_eq!((byte(0x1000), byte(0x2000)), (0x5a, 0));
    tracker.make_usable(0x8000);
    guest.vm.ram_grew().unwrap();
    store(&mut guest, 0xa008);
    assert_eq!(byte(0x2008), 0x5a);
    guest.vm.log_writes(false).unwrap();
    assert_eq!(tracker.take_dirty(), [0b110]);
}

#[test]
fn vcpus_are_made_once_and_up_to_their_number() {
    let Some(guest) = Guest::new(2) else { return };
    assert!(guest.vm.create_vcpu(1).is_err());
    assert!(guest.vm.create_vcpu(2).is_err());
    assert!(guest.vm.attach_interrupt(24, &eventfd()).is_err());
    assert!(guest.vm.route(24, None).is_err());
}

fn eventfd() -> vmm_sys_util::eventfd::EventFd {
    vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

#[test]
fn the_table_is_limited_to_what_kvm_supports() {
    let Some(guest) = Guest::new(2) else { return };
    let entries = guest.vm.cpuid(1);
    let id = crate::cpuid::lookup(&entries, 1, 0).unwrap();
    assert_eq!(id[1] >> 24, 1, "its own APIC id");
    assert_ne!(id[2] >> 31, 0, "a hypervisor");
    let khz = crate::cpuid::lookup(&entries, 0x4000_0010, 0).unwrap()[0];
    assert_eq!(u64::from(khz), guest.vm.tsc_khz());
}

#[test]
fn states_that_cannot_be_leave_the_vcpu_as_it_was() {
    let Some(mut guest) = Guest::new(1) else { return };
    guest.load(&[0xeb, 0xfe]);
    let good = guest.vcpus[0].state().unwrap();
    let changes: [fn(&mut crate::VcpuState); 7] = [
        |s| s.xcr0 = 1 << 40,
        |s| s.sregs.cr4 = 1 << 60,
        |s| s.lapic.regs = vec![0; 65],
        |s| s.xsave.truncate(100),
        |s| s.xsave[24..28].copy_from_slice(&u32::MAX.to_le_bytes()),
        |s| s.model = CpuModel::Host,
        |s| s.clock.tsc_khz *= 2,
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut bad = good.clone();
        bad.regs.gpr[0] = 99;
        change(&mut bad);
        let refused = guest.vcpus[0].set_state(&bad);
        assert!(refused.is_err(), "number {number}");
        let after = guest.vcpus[0].state().unwrap();
        assert_eq!((after.regs, after.sregs), (good.regs, good.sregs), "number {number}");
    }
}

#[test]
fn a_state_of_the_hosts_processor_names_what_is_missing_here() {
    let Some(mut guest) = Guest::of(1, CpuModel::Host) else { return };
    let good = guest.vcpus[0].state().unwrap();
    assert!(!good.model.is_portable());
    guest.vcpus[0].set_state(&good).unwrap();
    // A feature that this host's KVM does not show: the first free bit.
    let mut bad = good.clone();
    let leaf = bad.cpuid.iter_mut().find(|e| e.leaf == 7 && e.subleaf.unwrap_or(0) == 0);
    let leaf = leaf.expect("leaf 7");
    let bit = leaf.ebx.trailing_ones();
    leaf.ebx |= 1 << bit;
    bad.regs.gpr[0] = 99;
    let error = guest.vcpus[0].set_state(&bad).unwrap_err().to_string();
    let missing = crate::cpuid::missing(&good.cpuid, &bad.cpuid);
    assert!(missing.len() == 1 && error.ends_with(&missing[0]), "{error}: {missing:?}");
    assert_eq!(guest.vcpus[0].state().unwrap().regs, good.regs);
    // A machine with a portable processor does not take it at all.
    let Some(mut other) = Guest::new(1) else { return };
    let error = other.vcpus[0].set_state(&good).unwrap_err().to_string();
    assert!(error.contains("--cpu host"), "{error}");
}
