//! How kernels for PCs measure time before they know of anything better.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use mvm_vmm::config::{BootProtocol, CmdlineStyle};
use mvm_vmm::testing::ElfBuilder;
use mvm_vmm::{EndReason, Parts};

use crate::guest::*;

/// Writes a byte to a port below 256.
fn out(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(al, value)?;
    a.out(port, al)
}

/// Exits with 1 if the flags say "not equal".
fn must_be_equal(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut equal = a.create_label();
    a.je(equal)?;
    exit(a, 1)?;
    a.set_label(&mut equal)
}

/// Waits for a change of the count, as those do who have set the timer to tick; then for the second counter's output
/// by its gate; then looks whether the clock chip has power.
fn kernel() -> Vec<u8> {
    let code = assemble(64, AT, |a| {
        out(a, 0x43, 0x34)?;
        out(a, 0x40, 0xff)?;
        out(a, 0x40, 0xff)?;
        let mut counts = a.create_label();
        a.set_label(&mut counts)?;
        out(a, 0x43, 0)?;
        a.in_(al, 0x40)?;
        a.in_(al, 0x40)?;
        a.cmp(al, 0xf8)?;
        a.ja(counts)?;

        a.in_(al, 0x61)?;
        a.and(al, 0xfc)?;
        a.out(0x61, al)?;
        out(a, 0x43, 0xb0)?;
        out(a, 0x42, 0)?;
        out(a, 0x42, 0x10)?;
        a.in_(al, 0x61)?;
        a.test(al, 0x20)?;
        must_be_equal(a)?;
        a.or(al, 1)?;
        a.out(0x61, al)?;
        let mut low = a.create_label();
        a.set_label(&mut low)?;
        a.in_(al, 0x61)?;
        a.test(al, 0x20)?;
        a.jz(low)?;

        out(a, 0x70, 0x8d)?;
        a.in_(al, 0x71)?;
        a.cmp(al, 0x80)?;
        must_be_equal(a)?;
        exit(a, 0)
    });
    ElfBuilder::elf64(AT).load(AT, &code).build()
}

#[test]
fn a_kernel_measures_time_by_an_old_timer() {
    let kernel = kernel();
    let run = run(Parts { boot: BootProtocol::Linux, ..parts(&kernel) });
    assert_eq!(run.reason, EndReason::DebugExit { status: 1 });
}

#[test]
fn linux_has_no_old_timer() {
    let code = assemble(64, AT, |a| {
        a.xor(eax, eax)?;
        a.in_(al, 0x71)?;
        a.out(0xf4, eax)?;
        halt(a)
    });
    let kernel = ElfBuilder::elf64(AT).load(AT, &code).build();
    let style = CmdlineStyle::Linux;
    let run = run(Parts { cmdline_style: style, boot: BootProtocol::Linux, ..parts(&kernel) });
    assert_eq!(run.reason, EndReason::DebugExit { status: 0xff << 1 | 1 });
}
