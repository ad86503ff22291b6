//! Instruction set extensions that run on the host: one result each, by hand.

use iced_x86::code_asm::*;

use super::has;
use crate::fault::vector;
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, DATA, End, Guest};

/// Two vectors of 32 bytes at DATA and DATA + 32, whose address is in RBX; results go to DATA + 64.
fn with_vectors(a: [u32; 8], b: [u32; 8]) -> Guest {
    let mut guest = Guest::new();
    for (at, vector) in [(DATA, a), (DATA + 32, b)] {
        for (i, word) in (0..).zip(vector) {
            guest.put(at + i * 4, &word.to_le_bytes());
        }
    }
    guest.cpu().gpr[3] = DATA;
    guest
}

fn result(guest: &Guest) -> [u32; 8] {
    std::array::from_fn(|i| guest.get32(DATA + 64 + i as u64 * 4))
}

const fn f(value: f32) -> u32 {
    value.to_bits()
}

#[test]
fn feature_x87() {
    let mut guest = with_vectors([0; 8], [0; 8]);
    let code = asm!(64 at CODE;
        fninit(); fldpi(); fld1(); faddp(st1, st0); fistp(dword_ptr(rbx + 64)); fnstsw(ax); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(result(&guest)[0], 4);
    assert_eq!(guest.cpu().gpr[0] & 0x20, 0x20, "the precision flag");
    // With CR0.TS the unit is not available.
    guest.cpu().sys.cr0 |= 8;
    guest.cpu().update_mode();
    assert_eq!(guest.run(&asm!(64 at CODE; nop(); fld1();)).fault(), (vector::NM, None, CODE + 1));
    assert_eq!(guest.run_kernel(&asm!(64 at CODE; clts(); fld1(); hlt();)), End::Halt);
    // An exception that is not masked comes with the next waiting instruction.
    let code = asm!(64 at CODE;
        fninit(); mov(word_ptr(rbx), 0x37bi32); fldcw(word_ptr(rbx)); fldz(); fld1();
        fdivrp(st1, st0); nop(); wait(); hlt();
    );
    let fault = guest.run_kernel(&code).frame();
    assert_eq!((fault.vector, fault.rip), (vector::MF, CODE + code.len() as u64 - 2));
}

#[test]
fn feature_mmx() {
    let mut guest =
        with_vectors([0x7fff_0001, 5, 0, 0, 0, 0, 0, 0], [1 << 16 | 1, 6, 0, 0, 0, 0, 0, 0]);
    let code = asm!(64 at CODE;
        movq(mm0, qword_ptr(rbx)); paddsw(mm0, qword_ptr(rbx + 32)); movq(qword_ptr(rbx + 64), mm0);
        emms(); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(result(&guest)[..2], [0x7fff_0002, 11]);
    guest.cpu().sys.cr0 |= 4;
    guest.cpu().update_mode();
    assert_eq!(guest.run_kernel(&code).fault(), (vector::UD, None, CODE), "CR0.EM");
}

#[test]
fn feature_sse() {
    let mut guest = with_vectors([f(1.5), f(2.0), f(0.0), f(9.0), 0, 0, 0, 0], [f(2.0); 8]);
    let code = asm!(64 at CODE;
        movaps(xmm0, xmmword_ptr(rbx)); mulps(xmm0, xmmword_ptr(rbx + 32));
        movups(xmmword_ptr(rbx + 64), xmm0); stmxcsr(dword_ptr(rbx + 80)); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(result(&guest)[..5], [f(3.0), f(4.0), f(0.0), f(18.0), 0x1f80]);
    // Operands that are not aligned, and a processor that is not told to save the registers.
    let code = asm!(64 at CODE; movaps(xmm0, xmmword_ptr(rbx + 4)););
    assert_eq!(guest.run(&code).fault(), (vector::GP, Some(0), CODE));
    guest.cpu().sys.cr4 &= !(1 << 9);
    guest.cpu().update_mode();
    assert_eq!(guest.run_kernel(&code).fault(), (vector::UD, None, CODE));
}

#[test]
fn feature_sse2() {
    let mut guest = with_vectors([1, 2, 3, u32::MAX, 0, 0, 0, 0], [10, 20, 30, 1, 0, 0, 0, 0]);
    let code = asm!(64 at CODE;
        movdqa(xmm1, xmmword_ptr(rbx)); paddd(xmm1, xmmword_ptr(rbx + 32)); lfence(); mfence();
        movdqu(xmmword_ptr(rbx + 64), xmm1); movnti(dword_ptr(rbx + 80), eax); pause(); hlt();
    );
    guest.cpu().gpr[0] = 77;
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(result(&guest)[..5], [11, 22, 33, 0, 77]);
    // An exception that is not masked.
    let code = asm!(64 at CODE;
        mov(dword_ptr(rbx), 0x1d80i32); ldmxcsr(dword_ptr(rbx)); xorpd(xmm0, xmm0);
        mov(eax, 1i32); cvtsi2sd(xmm1, eax); divsd(xmm1, xmm0);
    );
    let fault = guest.run_kernel(&code).frame();
    assert_eq!((fault.vector, fault.rip), (vector::XM, CODE + code.len() as u64 - 4));
    // LDMXCSR refuses reserved bits.
    let code = asm!(64 at CODE; mov(dword_ptr(rbx), 0x1_1f80i32); ldmxcsr(dword_ptr(rbx)););
    assert_eq!(guest.run_kernel(&code).frame().vector, vector::GP);
}

/// Runs one instruction with XMM0 from `a` and XMM1 from `b`, and stores XMM0.
fn xmm_op(code: &[u8], a: [u32; 4], b: [u32; 4]) -> [u32; 4] {
    let wide = |v: [u32; 4]| [v[0], v[1], v[2], v[3], 0, 0, 0, 0];
    let mut guest = with_vectors(wide(a), wide(b));
    let mut all = asm!(64 at CODE;
        movdqu(xmm0, xmmword_ptr(rbx)); movdqu(xmm1, xmmword_ptr(rbx + 32)););
    all.extend(code);
    all.extend(asm!(64 at CODE; movdqu(xmmword_ptr(rbx + 64), xmm0); hlt();));
    assert_eq!(guest.run(&all), End::Halt);
    std::array::from_fn(|i| result(&guest)[i])
}

#[test]
fn feature_sse3() {
    if has("pni") {
        let got = xmm_op(
            &asm!(64 at 0; haddps(xmm0, xmm1);),
            [f(1.0), f(2.0), f(3.0), f(4.0)],
            [f(5.0); 4],
        );
        assert_eq!(got, [f(3.0), f(7.0), f(10.0), f(10.0)]);
    }
}

#[test]
fn feature_pclmulqdq() {
    if has("pclmulqdq") {
        // (x + 1)^2 = x^2 + 1 without carries.
        assert_eq!(
            xmm_op(&asm!(64 at 0; pclmulqdq(xmm0, xmm1, 0);), [3, 0, 9, 9], [3, 0, 9, 9]),
            [5, 0, 0, 0]
        );
    }
}

#[test]
fn feature_ssse3() {
    if has("ssse3") {
        let got = xmm_op(
            &asm!(64 at 0; pshufb(xmm0, xmm1);),
            [0x0403_0201, 0, 0, 0],
            [0x0001_0203, 0x8080_8080, 0, 0],
        );
        assert_eq!(got, [0x0102_0304, 0, 0x0101_0101, 0x0101_0101]);
    }
}

#[test]
fn feature_sse4_1() {
    if has("sse4_1") {
        let got =
            xmm_op(&asm!(64 at 0; pmulld(xmm0, xmm1);), [3, 5, 7, 1 << 16], [4, 5, 6, 1 << 16]);
        assert_eq!(got, [12, 25, 42, 0]);
    }
}

#[test]
fn feature_sse4_2() {
    if !has("sse4_2") {
        return;
    }
    let mut guest = with_vectors([0; 8], [0; 8]);
    (guest.cpu().gpr[0], guest.cpu().gpr[1]) = (0, 1);
    assert_eq!(
        guest.run(&asm!(64 at CODE; crc32(eax, cl); pcmpgtq(xmm0, xmm1); hlt();)),
        End::Halt
    );
    assert_eq!(guest.cpu().gpr[0], 0xf26b_8303, "the polynomial's table entry of 1");
}

#[test]
fn feature_aes() {
    if has("aes") {
        // All zero: SubBytes gives 0x63, which the other steps leave.
        assert_eq!(
            xmm_op(&asm!(64 at 0; aesenclast(xmm0, xmm1);), [0; 4], [0; 4]),
            [0x6363_6363; 4]
        );
    }
}

#[test]
fn feature_sha() {
    if has("sha_ni") {
        let got = xmm_op(&asm!(64 at 0; sha1nexte(xmm0, xmm1);), [0, 0, 0, 4], [1, 2, 3, 10]);
        assert_eq!(got, [1, 2, 3, 11]);
    }
}

#[test]
fn feature_avx() {
    if !has("avx") {
        return;
    }
    let mut guest =
        with_vectors([f(1.0); 8], [f(0.5), f(1.5), f(2.5), f(3.5), f(4.5), f(5.5), f(6.5), f(7.5)]);
    let code = asm!(64 at CODE;
        vmovups(ymm0, ymmword_ptr(rbx)); vaddps(ymm3, ymm0, ymmword_ptr(rbx + 32));
        vmovups(ymmword_ptr(rbx + 64), ymm3); vzeroupper(); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(result(&guest), [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5].map(f));
    // A 128-bit operation clears the upper half.
    let code = asm!(64 at CODE;
        vmovups(ymm3, ymmword_ptr(rbx)); vaddps(xmm3, xmm3, xmm3); vmovups(ymmword_ptr(rbx + 64), ymm3); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(result(&guest)[3..5], [f(2.0), 0]);
    guest.cpu().sys.xcr0 = 3;
    guest.cpu().update_mode();
    assert_eq!(guest.run_kernel(&code).fault(), (vector::UD, None, CODE), "XCR0 without AVX");
}

/// Runs one instruction on YMM0 (`a`) and YMM1 (`b`) to YMM0.
fn ymm_op(code: &[u8], a: [u32; 8], b: [u32; 8]) -> [u32; 8] {
    let mut guest = with_vectors(a, b);
    let mut all = asm!(64 at CODE;
        vmovdqu(ymm0, ymmword_ptr(rbx)); vmovdqu(ymm1, ymmword_ptr(rbx + 32)););
    all.extend(code);
    all.extend(asm!(64 at CODE; vmovdqu(ymmword_ptr(rbx + 64), ymm0); hlt();));
    assert_eq!(guest.run(&all), End::Halt);
    result(&guest)
}

#[test]
fn feature_avx2() {
    if has("avx2") {
        let got = ymm_op(
            &asm!(64 at 0; vpermd(ymm0, ymm1, ymm0);),
            [1, 2, 3, 4, 5, 6, 7, 8],
            [7, 6, 5, 4, 3, 2, 1, 0],
        );
        assert_eq!(got, [8, 7, 6, 5, 4, 3, 2, 1]);
    }
}

#[test]
fn feature_fma() {
    if has("fma") {
        let got = ymm_op(&asm!(64 at 0; vfmadd213ps(ymm0, ymm1, ymm1);), [f(2.0); 8], [f(3.0); 8]);
        assert_eq!(got, [f(9.0); 8]);
    }
}

#[test]
fn feature_f16c() {
    if has("f16c") {
        let got = ymm_op(
            &asm!(64 at 0; vcvtph2ps(ymm0, xmm1);),
            [0; 8],
            [0x3c00_c000, 0, 0, 0, 0, 0, 0, 0],
        );
        assert_eq!(got[..2], [f(-2.0), f(1.0)]);
    }
}

/// The registers RAX and RDX after an instruction on RCX and RBX.
fn scalar(code: &[u8], rcx_: u64, rbx_: u64) -> (u64, u64) {
    let mut guest = Guest::new();
    (guest.cpu().gpr[1], guest.cpu().gpr[3]) = (rcx_, rbx_);
    let mut all = code.to_vec();
    all.push(0xf4);
    assert_eq!(guest.run(&all), End::Halt);
    (guest.cpu().gpr[0], guest.cpu().gpr[2])
}

#[test]
fn feature_popcnt() {
    if has("popcnt") {
        assert_eq!(scalar(&asm!(64 at 0; popcnt(rax, rcx);), 0xff00_0000_0000_0101, 0).0, 10);
    }
}

#[test]
fn feature_lzcnt() {
    if has("abm") {
        assert_eq!(scalar(&asm!(64 at 0; lzcnt(rax, rcx);), 0x1000, 0).0, 51);
        assert_eq!(scalar(&asm!(64 at 0; lzcnt(eax, ecx);), 1 << 40, 0).0, 32);
    }
}

#[test]
fn feature_bmi1() {
    if has("bmi1") {
        assert_eq!(scalar(&asm!(64 at 0; andn(rax, rcx, rbx);), 0xf0, 0xff).0, 0x0f);
        assert_eq!(scalar(&asm!(64 at 0; tzcnt(eax, ecx);), 0, 0).0, 32);
        assert_eq!(scalar(&asm!(64 at 0; blsr(rax, rcx);), 0x30, 0).0, 0x20);
    }
}

#[test]
fn feature_bmi2() {
    if has("bmi2") {
        assert_eq!(scalar(&asm!(64 at 0; pdep(rax, rcx, rbx);), 0b101, 0xf0f0).0, 0x50);
        let code = asm!(64 at 0; mov(rdx, rcx); mulx(rdx, rax, rbx););
        assert_eq!(scalar(&code, u64::MAX, 2), (u64::MAX - 1, 1));
        assert_eq!(scalar(&asm!(64 at 0; rorx(rax, rcx, 4);), 0x1f, 0).0, 0xf000_0000_0000_0001);
    }
}

#[test]
fn feature_adx() {
    if has("adx") {
        let code = asm!(64 at 0; xor(eax, eax); stc(); adcx(rax, rcx); adcx(rax, rbx); setb(dl););
        assert_eq!(scalar(&code, u64::MAX, 5).0, 6);
    }
}

#[test]
fn feature_movbe() {
    if has("movbe") {
        let mut guest = with_vectors([0x0102_0304, 0, 0, 0, 0, 0, 0, 0], [0; 8]);
        assert_eq!(guest.run(&asm!(64 at CODE; movbe(eax, dword_ptr(rbx)); hlt();)), End::Halt);
        assert_eq!(guest.cpu().gpr[0], 0x0403_0201);
    }
}

#[test]
fn feature_fxsr() {
    let mut guest = Guest::new();
    guest.cpu().gpr[3] = DATA;
    let code = asm!(64 at CODE;
        fninit(); fld1(); pcmpeqd(xmm15, xmm15); fxsave64(ptr(rbx)); fninit(); pxor(xmm15, xmm15);
        fxrstor64(ptr(rbx)); fistp(dword_ptr(rbx + 1024)); movq(rax, xmm15); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.get32(DATA + 1024), guest.cpu().gpr[0]), (1, u64::MAX));
    assert_eq!(guest.get::<16>(DATA + 160 + 15 * 16), [0xff; 16]);
    guest.cpu().gpr[3] = DATA + 8;
    assert_eq!(
        guest.run(&asm!(64 at CODE; fxsave64(ptr(rbx));)).fault(),
        (vector::GP, Some(0), CODE)
    );
    // A reserved bit of MXCSR.
    guest.put(DATA + 24, &0x1_0000u32.to_le_bytes());
    guest.cpu().gpr[3] = DATA;
    assert_eq!(
        guest.run_kernel(&asm!(64 at CODE; fxrstor(ptr(rbx));)).fault(),
        (vector::GP, Some(0), CODE)
    );
}
