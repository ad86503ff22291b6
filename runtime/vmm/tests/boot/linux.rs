//! Kernels that are entered by the Linux 64-bit boot protocol without being Linux.

use iced_x86::code_asm::*;
use mvm_vmm::config::{BootProtocol, CmdlineStyle};
use mvm_vmm::testing::{ElfBuilder, section};
use mvm_vmm::{EndReason, Parts};

use crate::guest::*;

/// Saves RSI, RFLAGS and CS, shows what it finds and exits.
fn dumper() -> Vec<u8> {
    let code = assemble(64, AT, |a| {
        a.mov(qword_ptr(SAVED), rsi)?;
        a.pushfq()?;
        a.pop(rax)?;
        a.mov(qword_ptr(SAVED + 8), rax)?;
        a.mov(eax, cs)?;
        a.mov(dword_ptr(SAVED + 16), eax)?;
        dump(a)?;
        exit(a, 0)
    });
    ElfBuilder::elf64(AT).load(AT, &code).build()
}

/// The command line as the zero page tells it.
fn cmdline(dump: &Dump) -> String {
    let page = dump.dword(SAVED);
    let text = dump.text(dump.dword(page + 0x228));
    assert_eq!(dump.dword(page + 0x238) as usize, text.len() + 1, "with its NUL");
    text
}

#[test]
fn a_kernel_without_notes_finds_the_zero_page() {
    let initramfs = Some(section(&[7; 5000]).unwrap());
    let dump = run_dump(Parts { initramfs, ..parts(&dumper()) });
    let page = dump.dword(SAVED);
    assert_eq!(dump.qword(SAVED + 8) & 1 << 9, 0, "interrupts are off");
    assert_eq!(dump.dword(SAVED + 16), 0x10, "__BOOT_CS");
    assert_eq!(dump.bytes(page + 0x202)[..4], *b"HdrS");
    assert_eq!(dump.dword(page + 0x218), (MEMORY - 0x2000) as u32);
    assert_eq!(dump.dword(page + 0x21c), 5000);
    assert_eq!(dump.bytes(page + 0x1e8)[0], 3, "entries of the memory map");
}

#[test]
fn the_command_line_is_of_the_style_asked_for() {
    let line = |style, words: &str| {
        let boot = BootProtocol::Linux;
        let cmdline_style = style;
        let parts = Parts { boot, cmdline_style, cmdline: words.into(), ..parts(&dumper()) };
        cmdline(&run_dump(parts))
    };
    // Entropy and balloon are in every machine.
    let devices = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
    assert_eq!(line(CmdlineStyle::Auto, "app x -- y"), format!("app x {devices} -- y"));
    assert_eq!(line(CmdlineStyle::Bare, " app  x"), " app  x");
    assert!(line(CmdlineStyle::Linux, "x").starts_with("console=ttyS0 "));
}

/// What kernels are told of their machine by tables although their command line has the devices.
const TABLES: u32 = 0xe_0000;
const TABLES_LEN: u32 = 0x1000;

#[test]
fn a_kernel_that_is_told_of_devices_by_words_finds_its_processors_by_acpi() {
    let code = assemble(64, AT, |a| {
        print_memory(a, TABLES, TABLES_LEN)?;
        print_memory(a, CMDLINE, CMDLINE_DUMPED as u32)?;
        exit(a, 0)
    });
    let kernel = ElfBuilder::elf64(AT).load(AT, &code).build();
    let run = run(Parts { vcpus: 3, ..parts(&kernel) });
    assert_eq!(run.reason, EndReason::DebugExit { status: 1 });
    let (tables, cmdline) = run.console.split_at(TABLES_LEN as usize);
    assert!(cmdline.starts_with(b"virtio_mmio.device="));
    assert!(tables.starts_with(b"RSD PTR "));
    let find = |what: &[u8]| tables.windows(what.len()).position(|window| window == what);
    // 8 bytes for each local APIC, then the I/O APIC.
    let madt = &tables[find(b"APIC").unwrap()..];
    let processors = madt[44..].chunks_exact(8).take_while(|entry| entry[..2] == [0, 8]).count();
    assert_eq!(processors, 3);
    // Neither each device once more, nor another way out than the ports that they know.
    assert!(find(b"ACPI0007").is_some() && find(b"LNRO0005").is_none() && find(b"_S5_").is_none());
}

#[test]
fn what_is_written_to_the_exit_port_is_a_status_for_those_who_mean_it_so() {
    let code = assemble(64, AT, |a| {
        a.mov(edx, 0x501)?;
        a.mov(al, 3)?;
        a.out(dx, al)?;
        halt(a)
    });
    let kernel = ElfBuilder::elf64(AT).load(AT, &code).build();
    for (exit_status, reason, code) in
        [(false, EndReason::PowerOff, 0), (true, EndReason::GuestHalt { status: 3, cookie: 0 }, 3)]
    {
        let run = run(Parts { exit_status, ..parts(&kernel) });
        assert_eq!((run.reason.exit_code(), run.reason), (code, reason));
    }
}
