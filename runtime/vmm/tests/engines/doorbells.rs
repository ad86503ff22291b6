//! Devices work without vCPUs leaving the guest, where the engine can do that.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use mvm_vmm::testing::section;
use mvm_vmm::{EndReason, Parts, layout};

use crate::guest::{CODE, HANDLER, IDTR, assemble, engines, run, with_handler};

/// The rings of the queue.
const DESCRIPTORS: u64 = 0x21_0000;
const AVAILABLE: u64 = 0x21_1000;
const USED: u64 = 0x21_2000;
/// Interrupts taken.
const COUNT: u64 = 0x22_0000;
const BUFFER: u64 = 0x23_0000;

const VECTOR: u64 = 0x41;
/// Entries of the queue.
const SIZE: u32 = 8;

/// Registers of virtio-mmio (4.2.2).
mod reg {
    pub const DRIVER_FEATURES: i32 = 0x20;
    pub const DRIVER_FEATURES_SEL: i32 = 0x24;
    pub const QUEUE_NUM: i32 = 0x38;
    pub const QUEUE_READY: i32 = 0x44;
    pub const QUEUE_NOTIFY: i32 = 0x50;
    pub const STATUS: i32 = 0x70;
    pub const QUEUE_DESC: i32 = 0x80;
    pub const QUEUE_DRIVER: i32 = 0x90;
    pub const QUEUE_DEVICE: i32 = 0xa0;
}

/// A driver of the entropy device, the first one, that asks `requests` times for 16 bytes, each time waits for the
/// interrupt, and ends the machine with the number of interrupts.
fn driver(requests: u32) -> Vec<u8> {
    let handler = assemble(HANDLER, |a| {
        a.push(rax)?;
        a.inc(qword_ptr(COUNT))?;
        a.mov(eax, layout::LOCAL_APIC as u32 + 0xb0)?;
        a.mov(dword_ptr(rax), 0)?;
        a.pop(rax)?;
        a.iretq()
    });
    let code = assemble(CODE, |a| {
        set_up(a)?;
        let (mut next, mut wait, mut done) = (a.create_label(), a.create_label(), a.create_label());
        a.xor(esi, esi)?;
        a.set_label(&mut next)?;
        a.cmp(esi, requests)?;
        a.je(done)?;
        a.inc(esi)?;
        a.mov(word_ptr(AVAILABLE + 2), si)?;
        a.mov(dword_ptr(rdi + reg::QUEUE_NOTIFY), 0)?;
        a.set_label(&mut wait)?;
        a.cli()?;
        a.cmp(dword_ptr(COUNT), esi)?;
        a.jae(next)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(wait)?;
        a.set_label(&mut done)?;
        a.mov(eax, dword_ptr(COUNT))?;
        a.out(0xf4, eax)?;
        a.hlt()
    });
    // Address, length, and the flag that the device writes.
    let descriptor =
        [&BUFFER.to_le_bytes()[..], &16u32.to_le_bytes(), &2u32.to_le_bytes()].concat();
    with_handler(&code, VECTOR, &handler).load(DESCRIPTORS, &descriptor).build()
}

/// Interrupts and the device, with its registers at RDI.
fn set_up(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.lidt(qword_ptr(IDTR))?;
    a.mov(eax, layout::LOCAL_APIC as u32 + 0xf0)?;
    a.mov(dword_ptr(rax), 0x1ff)?;
    a.mov(ebx, layout::IOAPIC as u32)?;
    let entry = 0x10 + layout::virtio_gsi(0) * 2;
    for (register, value) in [(entry + 1, 0), (entry, VECTOR as u32)] {
        a.mov(dword_ptr(rbx), register)?;
        a.mov(dword_ptr(rbx + 0x10), value)?;
    }
    a.mov(edi, layout::virtio_mmio(0) as u32)?;
    for (register, value) in [
        (reg::STATUS, 1),
        (reg::STATUS, 3),
        // VERSION_1 and nothing else: every buffer used is an interrupt.
        (reg::DRIVER_FEATURES_SEL, 1),
        (reg::DRIVER_FEATURES, 1),
        (reg::STATUS, 0xb),
        (reg::QUEUE_NUM, SIZE),
        (reg::QUEUE_DESC, DESCRIPTORS as u32),
        (reg::QUEUE_DRIVER, AVAILABLE as u32),
        (reg::QUEUE_DEVICE, USED as u32),
        (reg::QUEUE_READY, 1),
        (reg::STATUS, 0xf),
    ] {
        a.mov(dword_ptr(rdi + register), value)?;
    }
    Ok(())
}

#[test]
fn ten_thousand_doorbells_and_interrupts_cost_kvm_no_exit() {
    const REQUESTS: u32 = 10_000;
    for engine in engines() {
        let [some, none] = [REQUESTS, 0].map(|requests| {
            let parts = Parts::new(32 << 20, section(&driver(requests)).unwrap());
            let run = run(&*engine, parts);
            assert_eq!(run.reason, EndReason::DebugExit { status: requests << 1 | 1 });
            run
        });
        assert_eq!(some.device("mvm-rng.interrupts"), u64::from(REQUESTS));
        assert_eq!(some.device("mvm-rng.given"), u64::from(REQUESTS) * 16);
        if engine.name() == "kvm" {
            let exits = some.metric("vcpu0.exits");
            assert_eq!(exits, none.metric("vcpu0.exits"), "{:?}", some.metrics);
            // What the guest does itself: the I/O APIC, the device, the end; and no message goes by ioctl.
            assert_eq!((exits, some.metric("msi-messages")), (4 + 11 + 1, 0));
            assert!(some.metric("irqfds") >= 2 && some.metric("ioeventfds") >= 2);
        }
    }
}
