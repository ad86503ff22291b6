//! Kernels with a PVH entry.

use mvm_vmm::config::BootProtocol;
use mvm_vmm::testing::{ElfBuilder, section};
use mvm_vmm::{EndReason, Module, Parts};

use crate::guest::*;

const PHYS32_ENTRY: u32 = 18;

/// Shows what it finds and exits; entered at its beginning.
fn dumper() -> Vec<u8> {
    assemble(32, AT, |a| {
        save_registers_32(a)?;
        dump(a)?;
        exit(a, 0)
    })
}

fn entry(address: u64) -> [u8; 4] {
    (address as u32).to_le_bytes()
}

/// Checks the registers and returns the address of the start information.
fn check(dump: &Dump) -> u32 {
    let (_, info) = dump.entered();
    assert_eq!((dump.dword(info), dump.dword(info + 4)), (0x336e_c578, 1));
    info
}

#[test]
fn a_kernel_of_either_class_finds_its_start_information() {
    // Entered through the ELF header's entry point, it would halt at once.
    let code = dumper();
    let halts = AT + 0x8000;
    let elf32 = ElfBuilder::elf32(halts).note("Xen", PHYS32_ENTRY, &entry(AT));
    let elf64 = ElfBuilder::elf64(halts).note("Xen", PHYS32_ENTRY, &AT.to_le_bytes());
    for kernel in [elf32, elf64] {
        let kernel = kernel.load(AT, &code).load(halts, &[0xf4]).build();
        let cmdline = "two  words".to_owned();
        let initramfs = Some(section(&[7; 5000]).unwrap());
        let dump = run_dump(Parts { cmdline: cmdline.clone(), initramfs, ..parts(&kernel) });
        let info = check(&dump);
        assert_eq!((dump.dword(info + 8), dump.dword(info + 12)), (0, 1));
        let module = dump.qword(info + 16) as u32;
        assert_eq!((dump.qword(module), dump.qword(module + 8)), (MEMORY - 0x2000, 5000));
        assert_eq!((dump.qword(module + 16), dump.qword(module + 24)), (0, 0));
        assert_eq!(dump.text(dump.qword(info + 24) as u32), cmdline);
        let (map, count) = (dump.qword(info + 40) as u32, dump.dword(info + 48));
        assert_eq!((count, dump.dword(info + 52)), (4, 0));
        let range = |index: u32| {
            let at = map + index * 24;
            (dump.qword(at), dump.qword(at + 8), dump.dword(at + 16), dump.dword(at + 20))
        };
        assert_eq!(range(0), (0, 0xa_0000, 1, 0));
        // The ACPI tables, which the start information names, and the MP table.
        assert_eq!((range(1).0, range(1).2), (dump.qword(info + 32), 3));
        assert_eq!(range(2).2, 2);
        assert_eq!(range(3), (0x10_0000, MEMORY - 0x10_0000, 1, 0));
    }
}

#[test]
fn several_modules_are_told_in_their_order() {
    let code = dumper();
    let kernel =
        ElfBuilder::elf32(AT).note("Xen", PHYS32_ENTRY, &entry(AT)).load(AT, &code).build();
    let initramfs = Some(section(&[7; 5000]).unwrap());
    let content = section(&[8; 100]).unwrap();
    let modules = vec![Module { content, text: "second x".into() }];
    let dump = run_dump(Parts { initramfs, modules, ..parts(&kernel) });
    let info = check(&dump);
    assert_eq!(dump.dword(info + 12), 2);
    let list = dump.qword(info + 16) as u32;
    assert_eq!((dump.qword(list), dump.qword(list + 8)), (MEMORY - 0x3000, 5000));
    assert_eq!((dump.qword(list + 32), dump.qword(list + 40)), (MEMORY - 0x1000, 100));
    assert_eq!(dump.text(dump.qword(list + 48) as u32), "second x");
}

#[test]
fn linux_keeps_its_own_protocol_unless_told_otherwise() {
    let code = assemble(64, AT, |a| exit(a, 3));
    let pvh = assemble(32, AT + 0x1000, |a| exit(a, 4));
    let kernel = ElfBuilder::elf64(AT)
        .load(AT, &code)
        .load(AT + 0x1000, &pvh)
        .note("Linux", 0x101, &[0; 4])
        .note("Xen", PHYS32_ENTRY, &entry(AT + 0x1000));
    let kernel = kernel.build();
    // Linux wants room to work in.
    let end = |boot| run(Parts { boot, memory: 64 << 20, ..parts(&kernel) }).reason;
    let exited = |value: u32| EndReason::DebugExit { status: value << 1 | 1 };
    assert_eq!(end(BootProtocol::Auto), exited(3));
    assert_eq!(end(BootProtocol::Linux), exited(3));
    assert_eq!(end(BootProtocol::Pvh), exited(4));
}

#[test]
fn an_entry_that_is_none_is_refused() {
    let plain = ElfBuilder::elf64(AT).load(AT, &[0xf4]);
    for (content, want) in [
        (&[0; 3][..], "has 3 bytes"),
        (&entry(AT + 1), "nothing is loaded at its entry point 0x100001"),
        (&u64::MAX.to_le_bytes(), "nothing is loaded"),
    ] {
        let kernel = plain.clone().note("Xen", PHYS32_ENTRY, content).build();
        let message = refusal(parts(&kernel)).to_string();
        assert!(message.contains(want), "{message}");
    }
    let forced = Parts { boot: BootProtocol::Pvh, ..parts(&plain.build()) };
    let message = refusal(forced).to_string();
    assert!(message.contains("protocol pvh") && message.contains("type 18"), "{message}");
}
