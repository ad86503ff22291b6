//! Clocks and steal time of the paravirtual interface.

use std::time::{SystemTime, UNIX_EPOCH};

use iced_x86::code_asm::*;
use mvm_engine::Vcpu;

use super::state::copy_ram;
use crate::fault::vector;
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, DATA, End, Guest, USER};

const WALL_CLOCK: u32 = 0x4b56_4d00;
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const STEAL_TIME: u32 = 0x4b56_4d03;

fn write_msr(guest: &mut Guest, msr: u32, value: u64) -> End {
    let code = asm!(64 at CODE;
        mov(ecx, msr); mov(eax, value as u32); mov(edx, (value >> 32) as u32); wrmsr(); hlt();
    );
    guest.run_kernel(&code)
}

/// `pvclock_read` of Linux: nanoseconds from the page at DATA and the TSC.
fn read_clock(guest: &mut Guest) -> u64 {
    // shift is a negative i8 or not; mul is 32.32.
    let code = asm!(64 at CODE, [right, scale];
        mov(rbx, DATA); rdtsc(); shl(rdx, 32u32); or(rax, rdx); sub(rax, qword_ptr(rbx + 8)); movsx(ecx, byte_ptr(rbx + 28));
        test(ecx, ecx); js(right); shl(rax, cl); jmp(scale);
        set_label(&mut right); neg(ecx); shr(rax, cl);
        set_label(&mut scale); mov(edx, dword_ptr(rbx + 24)); mul(rdx); shrd(rax, rdx, 32u32); add(rax, qword_ptr(rbx + 16)); hlt();
    );
    assert_eq!(guest.run_kernel(&code), End::Halt);
    guest.reg(0)
}

#[test]
fn the_clock_page_gives_the_machines_time() {
    let mut guest = Guest::new();
    assert_eq!(write_msr(&mut guest, SYSTEM_TIME, DATA | 1), End::Halt);
    assert_eq!(guest.get32(DATA) & 1, 0, "an even version");
    let before = guest.platform.clock.nanos();
    let now = read_clock(&mut guest);
    let after = guest.platform.clock.nanos();
    // A rounding of the scale is all that may be between the two.
    assert!(before <= now + 2 && now <= after + 2, "{before} {now} {after}");
    // A guest that moves its TSC gets a page to match with the next registration.
    guest.cpu().sys.set_tsc(5);
    assert_eq!(write_msr(&mut guest, SYSTEM_TIME, DATA | 1), End::Halt);
    let before = guest.platform.clock.nanos();
    assert!(read_clock(&mut guest) + 2 >= before);
    // Off: nothing more is written.
    let version = guest.get32(DATA);
    assert_eq!(write_msr(&mut guest, SYSTEM_TIME, DATA), End::Halt);
    assert_eq!(guest.get32(DATA), version);
}

#[test]
fn the_wall_clock_is_the_hosts() {
    let mut guest = Guest::new();
    assert_eq!(write_msr(&mut guest, WALL_CLOCK, DATA), End::Halt);
    let (version, seconds, nanos) =
        (guest.get32(DATA), guest.get32(DATA + 4), guest.get32(DATA + 8));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    assert!(version % 2 == 0 && nanos < 1_000_000_000);
    assert!(u64::from(seconds) <= now && u64::from(seconds) + 86_400 > now);
}

#[test]
fn records_outside_ram_and_odd_ones_end_nothing() {
    let mut guest = Guest::new();
    for address in [16 << 20, (16 << 20) - 8, !0x3f, 1 << 63, (16 << 20) - 1, 0x7fff] {
        assert_eq!(write_msr(&mut guest, SYSTEM_TIME, address | 1), End::Halt);
        assert_eq!(write_msr(&mut guest, WALL_CLOCK, address), End::Halt);
        assert_eq!(write_msr(&mut guest, STEAL_TIME, address & !0x3f | 1), End::Halt);
    }
    // Reserved bits of the steal-time MSR.
    assert_eq!(
        write_msr(&mut guest, STEAL_TIME, DATA | 3).fault(),
        (vector::GP, Some(0), CODE + 15)
    );
}

#[test]
fn steal_time_is_counted_and_versions_are_even() {
    let mut guest = Guest::new();
    assert_eq!(write_msr(&mut guest, STEAL_TIME, DATA | 1), End::Halt);
    assert_eq!(guest.get32(DATA + 8) & 1, 0);
    assert_ne!(guest.get32(DATA + 8), 0);
    // While the processor sleeps, the record says so, and a flush can be left there.
    let platform = guest.platform.clone();
    let ram = guest.ram.clone();
    let waker = std::thread::spawn(move || {
        use vm_memory::{Bytes, GuestAddress};
        while !platform.apics.port(0).attention.sleeping() {
            std::thread::yield_now();
        }
        let preempted: u8 = ram.memory().read_obj(GuestAddress(DATA + 16)).expect("RAM");
        platform.apics.port(0).attention.raise(crate::sys::attention::reason::UNHALT);
        preempted
    });
    assert_eq!(guest.run_kernel(&asm!(64 at CODE; sti(); hlt(); cli(); hlt();)), End::Halt);
    assert_eq!(waker.join().expect("the waker"), 1);
}

#[test]
fn hypercalls() {
    let mut guest = Guest::new();
    for call in [[0x0f, 0x01, 0xc1], [0x0f, 0x01, 0xd9]] {
        let mut code = asm!(64 at CODE; mov(eax, 99i32););
        code.extend(call);
        code.push(0xf4);
        assert_eq!(guest.run_kernel(&code), End::Halt);
        assert_eq!(guest.reg(0) as i64, -1000, "ENOSYS");
    }
    // KICK_CPU of somebody who is not there, then of itself: the next HLT does not halt.
    let mut code = asm!(64 at CODE; mov(eax, 5i32); mov(rcx, -1i64););
    code.extend([0x0f, 0x01, 0xd9]);
    code.extend(asm!(64 at 0; mov(eax, 5i32); xor(ecx, ecx);));
    code.extend([0x0f, 0x01, 0xd9, 0xfb, 0xf4, 0xfa]);
    code.extend(asm!(64 at 0; mov(ebx, 7i32); hlt();));
    assert_eq!(guest.run_kernel(&code), End::Halt);
    assert_eq!((guest.reg(0), guest.reg(3)), (0, 7));
    assert_eq!(
        guest.run_user(&[0x0f, 0x01, 0xd9, 0x0f, 0x0b]).fault(),
        (vector::UD, None, USER + 3)
    );
    assert_eq!(guest.reg(0) as i64, -1, "EPERM");
}

#[test]
fn records_go_on_in_another_machine() {
    const STEAL: u64 = DATA + 0x40;
    let mut guest = Guest::new();
    assert_eq!(write_msr(&mut guest, SYSTEM_TIME, DATA | 1), End::Halt);
    assert_eq!(write_msr(&mut guest, STEAL_TIME, STEAL | 1), End::Halt);
    // Told by another engine, with more versions than this one has seen.
    guest.put(DATA, &44u32.to_le_bytes());
    guest.put(STEAL, &1_000_000u64.to_le_bytes());
    guest.put(STEAL + 8, &88u32.to_le_bytes());
    guest.put(0, &[0xee; 16]);
    let state = guest.vcpu.state().expect("a state");
    let mut other = Guest::new();
    copy_ram(&guest, &other);
    other.vcpu.set_state(&state).expect("it is taken");
    // Whoever read the old versions must not take the new records for the old ones.
    let versions = (other.get32(DATA), other.get32(STEAL + 8));
    assert!(
        versions.0 > 44 && versions.1 > 88 && (versions.0 | versions.1) & 1 == 0,
        "{versions:?}"
    );
    assert!(u64::from_le_bytes(other.get::<8>(STEAL)) >= 1_000_000, "stolen time only grows");
    // There was no wall clock, so nothing is written at its address, 0.
    assert_eq!(other.get::<16>(0), [0xee; 16]);
    let before = other.platform.clock.nanos();
    assert!(read_clock(&mut other) + 2 >= before);
}
