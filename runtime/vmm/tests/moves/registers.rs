//! Every register that a state has, through several machines and back.

use mvm_engine::{MpState, VcpuState};
use mvm_vmm::Parts;
use mvm_vmm::testing::{ElfBuilder, section};

use crate::journey::{routes, take};

const CODE: u64 = 0x10_0000;

/// MSRs that take any canonical address, and what they are called.
const ADDRESSES: [(u32, &str); 6] = [
    (0xc000_0082, "LSTAR"),
    (0xc000_0083, "CSTAR"),
    (0xc000_0102, "KERNEL_GS_BASE"),
    (0x175, "SYSENTER_ESP"),
    (0x176, "SYSENTER_EIP"),
    (0xc000_0081, "STAR"),
];

/// Registers of the local APIC by offset / 16.
mod apic {
    pub const VERSION: usize = 0x03;
    pub const TPR: usize = 0x08;
    pub const PPR: usize = 0x0a;
    pub const SPURIOUS: usize = 0x0f;
    pub const ISR: usize = 0x10;
    pub const TMR: usize = 0x18;
    pub const IRR: usize = 0x20;
    pub const TIMER: usize = 0x32;
    pub const LINT0: usize = 0x35;
    pub const INITIAL: usize = 0x38;
    pub const CURRENT: usize = 0x39;
    pub const DIVIDE: usize = 0x3e;
}

fn parts() -> Parts {
    let kernel = ElfBuilder::elf64(CODE).load(CODE, &[0xfa, 0xf4]).build();
    Parts::new(16 << 20, section(&kernel).unwrap())
}

/// Numbers that look like any (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn canonical(&mut self) -> u64 {
        (self.next() as i64 >> 17) as u64
    }
}

/// Fills what can be filled without running.
fn fill(state: &mut VcpuState, random: &mut Random) {
    state.regs.gpr.iter_mut().for_each(|r| *r = random.next());
    state.regs.rip = random.canonical();
    // Arithmetic flags, IF, DF and ID as they come.
    state.regs.rflags = random.next() & 0x20_0ed5 | 2;
    state.sregs.cr2 = random.canonical();
    state.sregs.segments[4].base = random.canonical();
    state.sregs.segments[5].base = random.canonical();
    state.debug.address.iter_mut().for_each(|r| *r = random.canonical());
    state.debug.dr7 = 0x400 | 0x2aa;
    let avx = state.xcr0_of_model() & 4;
    state.xcr0 = 3 | avx;
    fill_vectors(&mut state.xsave, state.xcr0, random);
    for (index, _) in ADDRESSES {
        set_msr(state, index, random.canonical());
    }
    set_msr(state, 0xc000_0084, random.next() & 0xffff_ffff);
    set_msr(state, 0x277, 0x0007_0106_0007_0406);
    if state.shows_rdtscp() {
        set_msr(state, 0xc000_0103, random.next() & 0xffff_ffff);
    } else {
        state.msrs.retain(|(index, _)| *index != 0xc000_0103);
    }
    let regs = &mut state.lapic.regs;
    regs[apic::SPURIOUS] = 0x1ff;
    regs[apic::TPR] = 0x20;
    state.sregs.cr8 = 2;
    // In service 0x61, and below it what waits: nothing is delivered between two machines.
    regs[apic::ISR + 3] = 1 << 1;
    regs[apic::IRR + 1] = 1 << 5 | 1 << 31;
    regs[apic::IRR + 2] = random.next() as u32;
    regs[apic::TMR + 3] = 1 << 1;
    regs[apic::LINT0] = 0x1_0000;
    state.events.nmi_masked = true;
    state.mp_state = MpState::Running;
}

/// x87, SSE and, if it is there, AVX.
fn fill_vectors(area: &mut [u8], components: u64, random: &mut Random) {
    area.fill(0);
    let mut put = |at: usize, bytes: &[u8]| area[at..at + bytes.len()].copy_from_slice(bytes);
    // Round to zero, two exceptions unmasked and none pending, the stack's top at 5, all registers in use.
    put(0, &0x0f72u16.to_le_bytes());
    put(2, &0x2a00u16.to_le_bytes());
    put(4, &[0xff]);
    put(24, &0x7f80u32.to_le_bytes());
    put(28, &0xffffu32.to_le_bytes());
    for register in 0..8 {
        put(32 + register * 16, &random.next().to_le_bytes());
        put(40 + register * 16, &(random.next() as u16).to_le_bytes());
    }
    for half in 0..32 {
        put(160 + half * 8, &random.next().to_le_bytes());
        if components & 4 != 0 {
            put(576 + half * 8, &random.next().to_le_bytes());
        }
    }
    put(512, &components.to_le_bytes());
}

trait Model {
    /// What XCR0 may be.
    fn xcr0_of_model(&self) -> u64;

    /// Whether there is RDTSCP, and with it TSC_AUX.
    fn shows_rdtscp(&self) -> bool;
}

impl Model for VcpuState {
    fn xcr0_of_model(&self) -> u64 {
        let leaf = |leaf| self.cpuid.iter().find(|e| e.leaf == leaf && e.subleaf.unwrap_or(0) == 0);
        leaf(0xd).map_or(3, |e| u64::from(e.eax))
    }

    fn shows_rdtscp(&self) -> bool {
        self.cpuid.iter().any(|e| e.leaf == 0x8000_0001 && e.edx >> 27 & 1 != 0)
    }
}

fn set_msr(state: &mut VcpuState, index: u32, value: u64) {
    if let Some(slot) = state.msrs.iter_mut().find(|(i, _)| *i == index) {
        slot.1 = value;
    }
}

/// What must be the same; clocks and what a running timer has counted go on.
fn settled(state: &VcpuState) -> VcpuState {
    let mut state = VcpuState { clock: Default::default(), ..state.clone() };
    state.lapic.regs[apic::CURRENT] = 0;
    // What one engine does not know it leaves out; all that were set are checked.
    state.msrs.retain(|(i, _)| ADDRESSES.iter().any(|(a, _)| a == i) || MORE.contains(i));
    state.msrs.sort_unstable();
    state
}

/// MSRs with values of their own.
const MORE: [u32; 3] = [0xc000_0084, 0x277, 0xc000_0103];

#[test]
fn all_registers_come_back() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for route in routes() {
        for (timer, initial, deadline) in [
            (0x1_0020, 0, 0),
            (0x2_0020, 3_000_000_000, 0),
            (0x20, 4_000_000_000, 0),
            (0x4_0020, 0, 1 << 62),
        ] {
            let (machine, _events) = route.begin(parts);
            let (mut state, mut ram) = take(machine);
            let vcpu = &mut state.vcpus[0];
            fill(vcpu, &mut random);
            vcpu.lapic.regs[apic::TIMER] = timer;
            vcpu.lapic.regs[apic::INITIAL] = initial;
            vcpu.lapic.regs[apic::CURRENT] = initial;
            vcpu.lapic.regs[apic::DIVIDE] = 0xa;
            vcpu.lapic.tsc_deadline = deadline;
            let expected = settled(vcpu);
            let mut left = initial;
            for engine in route.next_legs().chain(route.next_legs()) {
                let (machine, _events) = route.go_on(engine, parts(), ram, &state);
                (state, ram) = take(machine);
                let vcpu = &state.vcpus[0];
                let place = format!("{route} at {}, timer {timer:#x}", engine.name());
                compare(&settled(vcpu), &expected, &place);
                // 128 bus cycles a count: minutes are left.
                let current = vcpu.lapic.regs[apic::CURRENT];
                assert!(current <= left && current >= left / 2, "{place}: {current} of {left}");
                left = current;
            }
        }
    }
}

fn compare(state: &VcpuState, expected: &VcpuState, place: &str) {
    assert_eq!(state.regs, expected.regs, "{place}");
    assert_eq!(state.sregs, expected.sregs, "{place}");
    assert_eq!(state.debug, expected.debug, "{place}");
    assert_eq!(state.xcr0, expected.xcr0, "{place}");
    let bytes = state.xsave.iter().zip(&expected.xsave).enumerate();
    let differ: Vec<_> = bytes.filter(|(_, (now, then))| now != then).collect();
    assert!(differ.is_empty(), "{place}: XSAVE area: {differ:?}");
    assert_eq!(state.xsave.len(), expected.xsave.len(), "{place}");
    // One engine may have more of them than the other.
    for msr in &expected.msrs {
        assert!(state.msrs.contains(msr), "{place}: {msr:x?} in {:x?}", state.msrs);
    }
    for (at, (now, then)) in state.lapic.regs.iter().zip(&expected.lapic.regs).enumerate() {
        // The version is the engine's own; the processor's priority follows from the rest.
        if ![apic::VERSION, apic::PPR].contains(&at) {
            assert_eq!(now, then, "{place}: local APIC register {at:#x}");
        }
    }
    assert_eq!(state.lapic.base, expected.lapic.base, "{place}");
    assert_eq!(state.lapic.tsc_deadline, expected.lapic.tsc_deadline, "{place}");
    assert_eq!(state.events, expected.events, "{place}");
    assert_eq!(state.mp_state, expected.mp_state, "{place}");
}
