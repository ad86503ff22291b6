//! The XSAVE family (SDM vol. 1, chapter 13).

use iced_x86::code_asm::*;

use super::has;
use crate::fault::vector;
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, DATA, End, Guest, STACK};

/// An area in use: x87 with one value, XMM7 ones, YMM7 ones.
fn guest() -> Option<Guest> {
    has("xsave").then(|| {
        let mut guest = Guest::new();
        guest.cpu().gpr[3] = DATA;
        guest
    })
}

const HEADER: u64 = DATA + 512;

#[test]
fn feature_xsave() {
    let Some(mut guest) = guest() else { return };
    let code = asm!(64 at CODE;
        fninit(); fld1(); pcmpeqd(xmm7, xmm7); mov(eax, -1i32); mov(edx, eax); xsave64(ptr(rbx));
        fninit(); pxor(xmm7, xmm7); mov(eax, -1i32); mov(edx, eax); xrstor64(ptr(rbx));
        fistp(dword_ptr(rbx + 4096)); movq(rax, xmm7); xor(ecx, ecx); xgetbv(); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.get64(HEADER) & 3, 3, "XSTATE_BV");
    assert_eq!((guest.get64(HEADER + 8), guest.get::<8>(DATA + 160 + 7 * 16)), (0, [0xff; 8]));
    assert_eq!(guest.get32(DATA + 4096), 1);
    assert_eq!(guest.reg(0), guest.cpu().sys.xcr0);
    // What is not in XSTATE_BV comes back in its initial state; what is not asked for stays.
    guest.put64(HEADER, 1);
    let code = asm!(64 at CODE;
        pcmpeqd(xmm7, xmm7); mov(eax, 1i32); xor(edx, edx); xrstor(ptr(rbx)); movq(rcx, xmm7);
        mov(eax, 2i32); xrstor(ptr(rbx)); movq(rdx, xmm7); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(1), guest.reg(2)), (u64::MAX, 0));
}

#[test]
fn bad_areas_are_refused() {
    let Some(mut guest) = guest() else { return };
    let code = asm!(64 at CODE; mov(eax, -1i32); mov(edx, eax); xrstor(ptr(rbx)););
    let at = CODE + 7;
    for (offset, value) in [
        (512, 1u64 << 9),
        (512, 1 << 62),
        (520, 1),
        (528, 1),
        (520, 1 << 63 | 1 << 9),
        (24, 0x1_0000),
    ] {
        guest.put(DATA, &[0; 832]);
        guest.put64(DATA + offset, value);
        guest.kernel(crate::testing::guest::sel::CODE);
        assert_eq!(guest.run(&code).fault(), (vector::GP, Some(0), at), "{offset}: {value:#x}");
    }
    // A component in XSTATE_BV that a compact area does not have, reserved bytes of a compact header.
    for (offset, value) in [(512, 3u64), (528, 1), (568, 1)] {
        guest.put(DATA, &[0; 832]);
        guest.put64(DATA + 520, 1 << 63 | 1);
        guest.put64(DATA + offset, value);
        assert_eq!(
            guest.run_kernel(&code).fault(),
            (vector::GP, Some(0), at),
            "{offset}: {value:#x}"
        );
    }
    // Alignment of 64, and an area whose end cannot be read.
    guest.put(DATA, &[0; 832]);
    guest.cpu().gpr[3] = DATA + 16;
    assert_eq!(guest.run_kernel(&code).fault(), (vector::GP, Some(0), at));
    guest.cpu().gpr[3] = (16 << 20) - 0x200;
    guest.cpu().gpr[0] = 0;
    let (vector, error, _) = guest.run_kernel(&code).fault();
    assert_eq!((vector, error), (vector::PF, Some(0)));
    let save = asm!(64 at CODE; mov(eax, -1i32); mov(edx, eax); xsave(ptr(rbx)););
    guest.put((16 << 20) - 0x200, &[0x77; 0x200]);
    let (vector, error, _) = guest.run_kernel(&save).fault();
    assert_eq!((vector, error), (vector::PF, Some(2)));
    assert_eq!(guest.get::<8>((16 << 20) - 0x200), [0x77; 8], "nothing is stored before the fault");
}

#[test]
fn xsave_needs_its_control_bits() {
    let Some(mut guest) = guest() else { return };
    let code = asm!(64 at CODE; xsave(ptr(rbx)););
    guest.cpu().sys.cr0 |= 8;
    guest.cpu().update_mode();
    assert_eq!(guest.run(&code).fault(), (vector::NM, None, CODE));
    guest.cpu().sys.cr0 &= !8;
    guest.cpu().sys.cr4 &= !(1 << 18);
    assert_eq!(guest.run_kernel(&code).fault(), (vector::UD, None, CODE));
    assert_eq!(guest.run_kernel(&asm!(64 at CODE; xgetbv();)).fault(), (vector::UD, None, CODE));
    assert_eq!(guest.run_kernel(&asm!(64 at CODE; xsetbv();)).fault(), (vector::UD, None, CODE));
    guest.cpu().sys.cr4 |= 1 << 18;
    // XSETBV: x87 off, AVX without SSE, a bit that is not there, another register, from user code.
    for (value, index) in [(2u32, 0u32), (5, 0), (0x203, 0), (7, 1)] {
        let code = asm!(64 at CODE; mov(eax, value); mov(ecx, index); xor(edx, edx); xsetbv(););
        assert_eq!(guest.run_kernel(&code).fault(), (vector::GP, Some(0), CODE + 12), "{value:#x}");
    }
    let user = crate::testing::guest::USER;
    let code = asm!(64 at user; mov(eax, 3i32); xor(ecx, ecx); xor(edx, edx); xsetbv(););
    assert_eq!(guest.run_user(&code).fault(), (vector::GP, Some(0), user + 9));
    let code =
        asm!(64 at CODE; mov(eax, 3i32); xor(ecx, ecx); xor(edx, edx); xsetbv(); xgetbv(); hlt(););
    assert_eq!(guest.run_kernel(&code), End::Halt);
    assert_eq!(guest.cpu().sys.xcr0, 3);
}

#[test]
fn feature_xsaveopt() {
    let Some(mut guest) = guest().filter(|_| has("xsaveopt")) else { return };
    guest.put(DATA, &[0x77; 832]);
    guest.put(HEADER, &[0; 64]);
    let code = asm!(64 at CODE;
        fninit(); pcmpeqd(xmm7, xmm7); mov(eax, -1i32); mov(edx, eax); xsaveopt64(ptr(rbx)); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.get64(HEADER) & 2, 2);
    assert_eq!(guest.get::<8>(DATA + 160 + 7 * 16), [0xff; 8]);
    if guest.get64(HEADER) & 1 == 0 {
        assert_eq!(
            guest.get::<8>(DATA + 32),
            [0x77; 8],
            "x87 was in its initial state: not written"
        );
    }
}

#[test]
fn feature_xsavec() {
    let Some(mut guest) = guest().filter(|_| has("xsavec")) else { return };
    let code = asm!(64 at CODE;
        fninit(); fld1(); pcmpeqd(xmm7, xmm7); mov(eax, -1i32); mov(edx, eax); xsavec64(ptr(rbx));
        fninit(); pxor(xmm7, xmm7); xrstor64(ptr(rbx)); fistp(dword_ptr(rbx + 4096)); movq(rax, xmm7); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    let requested = guest.cpu().sys.xcr0;
    assert_eq!(guest.get64(HEADER + 8), 1 << 63 | requested);
    assert_eq!(guest.get64(HEADER) & 3, 3);
    assert_eq!((guest.get32(DATA + 4096), guest.reg(0)), (1, u64::MAX));
}

#[test]
fn feature_xgetbv1() {
    let Some(mut guest) = guest().filter(|_| has("xgetbv1")) else { return };
    let code = asm!(64 at CODE; mov(ecx, 1i32); xgetbv(); mov(ebx, eax); mov(ecx, 2i32); xgetbv(););
    let (vector, error, _) = guest.run(&code).fault();
    assert_eq!((vector, error), (vector::GP, Some(0)), "there is no XCR2");
    let (in_use, xcr0) = (guest.reg(3), guest.cpu().sys.xcr0);
    assert_eq!(in_use & !xcr0, 0);
}

#[test]
fn xgetbv1_is_there_if_shown() {
    let Some(mut guest) = guest().filter(|_| has("xsave")) else { return };
    let end = guest.run(&asm!(64 at CODE; mov(ecx, 1i32); xgetbv(); hlt();));
    if has("xgetbv1") {
        assert_eq!(end, End::Halt);
    } else {
        assert_eq!(end.fault(), (vector::GP, Some(0), CODE + 5));
    }
}

#[test]
fn avx_survives_a_switch_of_contexts() {
    let Some(mut guest) = guest().filter(|_| has("avx")) else { return };
    guest.put(STACK, &[0x5a; 32]);
    let code = asm!(64 at CODE;
        mov(rsi, STACK); vmovdqu(ymm9, ymmword_ptr(rsi)); mov(eax, 7i32); xor(edx, edx); xsave64(ptr(rbx));
        vzeroall(); xrstor64(ptr(rbx)); vmovdqu(ymmword_ptr(rsi + 64), ymm9); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.get::<32>(STACK + 64), [0x5a; 32]);
    assert_eq!(guest.get64(HEADER) & 6, 6);
    assert_eq!(guest.get::<16>(DATA + 576 + 9 * 16), [0x5a; 16]);
}
