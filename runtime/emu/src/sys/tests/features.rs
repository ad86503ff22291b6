//! Basic features of the processor, one test per CPUID bit.

use iced_x86::code_asm::*;
use mvm_engine::VmExit;

use super::has;
use crate::fault::vector;
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, DATA, End, Guest, USER, USER_DATA, USER_GPA, pte};

#[test]
fn feature_cx8() {
    let mut guest = Guest::new();
    guest.put64(DATA, 0x1_0000_0002);
    let code = asm!(64 at CODE;
        mov(rbx, DATA); mov(rdi, rbx); mov(edx, 1i32); mov(eax, 2i32); mov(ecx, 7i32); mov(ebx, 8i32);
        lock().cmpxchg8b(qword_ptr(rdi)); setz(sil); cmpxchg8b(qword_ptr(rdi)); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.get64(DATA), 0x7_0000_0008);
    let gpr = guest.cpu().gpr;
    assert_eq!((gpr[6] & 0xff, gpr[0], gpr[2]), (1, 8, 7), "then it fails and loads");
}

#[test]
fn feature_cx16() {
    if !has("cx16") {
        return;
    }
    let mut guest = Guest::new();
    let code = asm!(64 at CODE;
        mov(rdi, DATA); xor(eax, eax); xor(edx, edx); mov(ebx, 3i32); mov(ecx, 4i32);
        lock().cmpxchg16b(xmmword_ptr(rdi)); cmpxchg16b(xmmword_ptr(rdi + 8));
    );
    let (vector, code, _) = guest.run(&code).fault();
    assert_eq!((vector, code), (vector::GP, Some(0)), "not aligned");
    assert_eq!((guest.get64(DATA), guest.get64(DATA + 8)), (3, 4));
}

#[test]
fn feature_cmov() {
    let mut guest = Guest::new();
    let code = asm!(64 at CODE;
        mov(eax, -1i32); mov(rcx, -1i64); mov(edx, 5i32); cmp(edx, 5i32); cmove(eax, edx);
        cmovne(ecx, edx); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(
        (guest.cpu().gpr[0], guest.cpu().gpr[1]),
        (5, 0xffff_ffff),
        "the upper half goes anyway"
    );
}

#[test]
fn feature_clflush() {
    let mut guest = Guest::new();
    let code = asm!(64 at CODE; mov(rdi, DATA); clflush(byte_ptr(rdi)); hlt(););
    assert_eq!(guest.run(&code), End::Halt);
    let code = asm!(64 at CODE; clflushopt(byte_ptr(rdi)); hlt(););
    match guest.run_kernel(&code) {
        End::Halt => assert!(has("clflushopt")),
        end => assert_eq!((end.fault().0, has("clflushopt")), (vector::UD, false)),
    }
    let code = asm!(64 at CODE; clflush(byte_ptr(rdi)););
    guest.cpu().gpr[7] = 0x5000_0000;
    assert_eq!(guest.run(&code).fault(), (vector::PF, Some(0), CODE));
    assert_eq!(guest.cpu().sys.cr2, 0x5000_0000);
}

#[test]
fn feature_rdrand() {
    let mut guest = Guest::new();
    let code = asm!(64 at CODE, [again];
        set_label(&mut again); rdrand(rax); jnc(again); rdrand(rcx); jnc(again); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_ne!(guest.reg(0), guest.reg(1));
}

#[test]
fn feature_rdseed() {
    let mut guest = Guest::new();
    let code = asm!(64 at CODE, [again];
        set_label(&mut again); rdseed(rax); jnc(again); rdseed(rcx); jnc(again); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_ne!(guest.reg(0), guest.reg(1));
}

#[test]
fn feature_erms() {
    let mut guest = Guest::new();
    guest.put(DATA, b"fast short and long");
    let code = asm!(64 at CODE;
        mov(rsi, DATA); mov(rdi, DATA + 0x1ff8); mov(ecx, 19i32); rep().movsb(); mov(ecx, 9000i32);
        mov(al, 0x5ai32); rep().stosb(); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(&guest.get::<19>(DATA + 0x1ff8), b"fast short and long");
    let end = DATA + 0x1ff8 + 19 + 9000;
    assert_eq!(guest.get::<3>(end - 2), [0x5a, 0x5a, 0]);
    assert_eq!(guest.cpu().gpr[7], end);
}

#[test]
fn feature_lahf() {
    let mut guest = Guest::new();
    let code = asm!(64 at CODE; mov(ah, 0xd7u32); sahf(); mov(ah, 0i32); lahf(); hlt(););
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.cpu().gpr[0] >> 8 & 0xff, 0xd7);
}

#[test]
fn feature_prefetchw() {
    let mut guest = Guest::new();
    // No fault, wherever it points.
    guest.cpu().gpr[3] = 0x6000_0000;
    assert_eq!(
        guest.run(&asm!(64 at CODE; prefetchw(byte_ptr(rbx)); prefetcht0(byte_ptr(rbx)); hlt();)),
        End::Halt
    );
}

#[test]
fn feature_nx() {
    let mut guest = Guest::new();
    guest.map(USER, USER_GPA, pte::P | pte::W | pte::U | pte::NX);
    let (vector, code, rip) = guest.run_user(&[0x90]).fault();
    assert_eq!((vector, code, rip), (vector::PF, Some(0x15), USER));
    assert_eq!(guest.cpu().sys.cr2, USER);
    // Without EFER.NXE the bit is reserved.
    guest.cpu().sys.efer &= !(1 << 11);
    assert_eq!(guest.run_user(&[0x90]).fault(), (vector::PF, Some(0xd), USER));
}

#[test]
fn feature_smep() {
    let mut guest = Guest::new();
    guest.put(USER_GPA, &[0xf4]);
    let jump = asm!(64 at CODE; mov(rax, USER); jmp(rax););
    assert_eq!(guest.run(&jump), End::Halt);
    let code = asm!(64 at CODE;
        mov(rax, cr4); or(eax, 1i32 << 20); mov(cr4, rax); mov(rax, USER); jmp(rax););
    assert_eq!(guest.run(&code).fault(), (vector::PF, Some(0x11), USER));
}

#[test]
fn feature_smap() {
    if !has("smap") {
        return;
    }
    let mut guest = Guest::new();
    let code = asm!(64 at CODE;
        mov(rbx, USER_DATA); mov(rax, qword_ptr(rbx)); mov(rax, cr4); or(eax, 1i32 << 21); mov(cr4, rax);
        stac(); mov(qword_ptr(rbx), rax); clac(); mov(rcx, qword_ptr(rbx));
    );
    let load = CODE + code.len() as u64 - 3;
    assert_eq!(guest.run(&code).fault(), (vector::PF, Some(1), load));
    // POPF sets AC too; implicit accesses do not heed it: a GDT in a user's page.
    let code = asm!(64 at CODE;
        mov(rbx, USER_DATA); pushfq(); or(dword_ptr(rsp), 1i32 << 18); popfq(); mov(rax, qword_ptr(rbx));
        mov(qword_ptr(rbx + 8), 0i32); mov(word_ptr(rbx + 0x100), 0x7fi32); mov(qword_ptr(rbx + 0x102), rbx);
        lgdt(ptr(rbx + 0x100)); mov(eax, 0x10i32); mov(ds, ax);
    );
    // Delivering the fault needs the table as well: a triple fault.
    let end = guest.run_kernel(&code);
    assert!(matches!(end, End::Exit(VmExit::TripleFault(_))), "{end:?}");
    assert_eq!(guest.cpu().sys.cr2, USER_DATA + 8);
}
