//! Programs on both tiers, and what only the translator has: links, the jump cache, eviction.

mod calls;

use std::time::Duration;

use iced_x86::code_asm::*;

use super::Counters;
use super::store::TRIALS;
use crate::Tier;
use crate::fault::vector;
use crate::testing::asm::asm;
use crate::testing::{UserException, UserMachine, UserPage, UserState};

const CODE: u64 = 0x40_0000;
/// The page behind it, elsewhere in RAM.
const CODE2: u64 = 0x40_1000;
const DATA: u64 = 0x50_0000;

fn machine(tier: Tier) -> UserMachine {
    let page = |linear, physical, write| UserPage { linear, physical, write, execute: true };
    UserMachine::with_tier(
        &[
            page(CODE, 0x2_0000, true),
            page(CODE2, 0x2_6000, true),
            page(DATA, 0x3_0000, true),
            page(DATA + 0x1000, 0x3_4000, true),
        ],
        tier,
    )
}

fn start(machine: &mut UserMachine, code: &[(u64, &[u8])], rip: u64) {
    for (at, bytes) in code {
        let physical = if *at < CODE2 { 0x2_0000 } else { 0x2_6000 } + (at & 0xfff);
        machine.write(physical, bytes);
    }
    let mut gpr = [0; 16];
    for (i, value) in (0u64..).zip(&mut gpr) {
        *value = 0x1111_1111_1111_1111 * i;
    }
    gpr[4] = DATA + 0x1800;
    gpr[7] = DATA;
    let mut xsave = [0; 832];
    (xsave[0], xsave[1]) = (0x7f, 3);
    (xsave[24], xsave[25]) = (0x80, 0x1f);
    machine.start(&UserState { gpr, rip, rflags: 0x8d7, gs_base: DATA, xsave }, false);
}

/// Runs code that ends with an exception on both tiers; they must agree on everything.
fn both(code: &[(u64, &[u8])]) -> (UserException, UserState, Counters) {
    let run = |tier, trials| {
        let mut machine = machine(tier);
        if let Some(jit) = machine.dispatcher().jit_mut() {
            jit.set_trials(trials);
        }
        start(&mut machine, code, code[0].0);
        let (exception, state) = machine.run(None).expect("an end");
        let mut data = [0; 0x1000];
        machine.read(0x3_0000, &mut data);
        let counters = machine.dispatcher().jit().map(|jit| jit.counters.clone());
        (exception, state, data, counters.unwrap_or_default())
    };
    let (interpreted, translated) = (run(Tier::Interpreter, 0), run(Tier::Translator, 0));
    let in_part = run(Tier::Translator, TRIALS);
    for run in [&translated, &in_part] {
        assert_eq!(interpreted.0, run.0);
        let (a, b) = (&interpreted.1, &run.1);
        // Dead flags may be stale in the frame of another exception (J2).
        let flags = if interpreted.0.vector == vector::UD { !0 } else { !0x8d5 };
        assert_eq!((a.gpr, a.rip, a.rflags & flags), (b.gpr, b.rip, b.rflags & flags));
        assert!(a.xsave == b.xsave && interpreted.2 == run.2);
    }
    assert!(translated.3.blocks > 0, "it was translated");
    assert!(
        in_part.3.interpreted_blocks > translated.3.interpreted_blocks,
        "what runs once is not"
    );
    (translated.0, translated.1, translated.3)
}

#[test]
fn a_loop_is_linked_and_its_flags_cross_blocks() {
    let code = asm!(64 at CODE, [again];
        mov(ecx, 100_000i32); xor(eax, eax); set_label(&mut again);
        adc(eax, ecx); rcl(ebx, 1i32); dec(ecx); jnz(again); pushfq(); pop(rdx); ud2();
    );
    let (exception, _, counters) = both(&[(CODE, &code)]);
    assert_eq!(exception.vector, vector::UD);
    assert!(counters.links > 0 && counters.entered < 100, "{counters:?}");
}

#[test]
fn calls_between_pages_go_through_the_jump_cache() {
    let code = asm!(64 at CODE, [again];
        mov(ecx, 10_000i32); mov(r15, CODE2); set_label(&mut again);
        call(r15); call(CODE2); dec(ecx); jnz(again); ud2();
    );
    let function = asm!(64 at CODE2; add(rax, rcx); mov(qword_ptr(rdi), rax); ret(););
    let (_, state, counters) = both(&[(CODE, &code), (CODE2, &function)]);
    assert_eq!(state.gpr[0], 2 * (1..=10_000).sum::<u64>());
    assert!(counters.entered < 200, "{counters:?}");
}

#[test]
fn blocks_have_ways_out() {
    // Flags that only a way out needs, or what comes behind it; accesses before and behind one, in one page or in two.
    let code = asm!(64 at CODE, [again, odd, third, out, on];
        mov(r12d, 600i32); lea(rbp, ptr(rdi + 0xe00)); set_label(&mut again);
        lea(r13, ptr(rbp + r12)); mov(rax, qword_ptr(r13)); add(al, r12b); test(r12d, 1i32); jnz(odd);
        mov(qword_ptr(r13 + 8), rax); mov(ecx, r12d); imul_2(ecx, ecx); cmp(cl, 0x40i32); jb(third);
        adc(rbx, qword_ptr(r13 + 8)); dec(rcx); jo(out); setp(dl); mov(byte_ptr(r13 + 24), dl); js(out);
        set_label(&mut on); sub(r12d, 1i32); jnz(again); ud2();
        set_label(&mut odd); sbb(rsi, rax); jmp(on);
        set_label(&mut third); adc(rsi, rbx); pushfq(); pop(rax); xor(rsi, rax); jmp(on);
        set_label(&mut out); rcl(rsi, 1i32); jmp(on);
    );
    let (exception, _, counters) = both(&[(CODE, &code)]);
    assert_eq!(exception.vector, vector::UD);
    // Blocks that ended with each jump would have three or four instructions.
    assert!(counters.instructions >= 8 * counters.blocks, "{counters:?}");
    assert!(counters.spared_probes >= 2, "{counters:?}");
}

#[test]
fn the_registers_without_host_registers() {
    let code = asm!(64 at CODE;
        mov(r8, r9); add(r8d, r9d); xchg(r10, r11); imul_3(r9, r15, 77i32); mov(r11b, r8b); cmovnz(r15d, r10d); adc(rax, r9); sub(ebx, r10d); cmp(rsi, r11); sbb(r12w, r8w); and(r9, rbx); xor(r10d, ecx); test(rdx, r15); mov(rbp, r15); mov(r15, rsi); bts(r9, rdx); btr(rdx, r10);
        shld(r8, rdx, 5i32); shrd(rcx, r11, 9i32); add(r11w, r8w); bts(r9, 40i32); btc(r10d, 3i32); xor(r8d, r8d); test(r9, r9); setz(r10b); or(r11b, cl); sbb(r8, r8); imul_2(rbx, r9); popcnt(rsi, r11); movsxd(r10, r9d);
        lea(r10, ptr(r8 + r9 * 4 + 5)); bswap(r9); xadd(r8, r15); shl(r8, cl); movzx(r9d, r15w); cmp(r8, r9); setb(r10b);
        neg(r11); not(r15w); push(r15); pop(r8); mul(r9); cdq(); mov(ecx, 77i32); div(ecx); test(r8d, r8d); ud2();
    );
    both(&[(CODE, &code)]);
}

#[test]
fn fills_and_bits_of_strings() {
    // Of all lengths, none among them, across pages, downwards; bits far before and behind their operands.
    let code = asm!(64 at CODE, [again];
        mov(r12d, 45i32); mov(r13, DATA); mov(rax, 0x0123_4567_89ab_cdefu64); set_label(&mut again);
        lea(rcx, ptr(r12 - 1)); imul_2(rcx, rcx); mov(rdi, r13); rep().stosb(); add(rax, rdi);
        lea(rdi, ptr(r13 + r12 * 4 + 0x7f3)); mov(ecx, r12d); rep().stosq(); lea(rdi, ptr(r13 + 0xfc0)); lea(ecx, ptr(r12 - 20)); and(ecx, 31i32);
        cmp(ecx, 30i32); rep().stosd(); setb(al); add(rax, rdi); std(); stosw(); stosb(); cld(); stosd(); stosq(); stosb(); add(rax, rdi); mov(word_ptr(rdi), ax);
        lea(rbx, ptr(r12 - 30)); imul_3(rbx, rbx, 77i32); mov(r9, rbx); cmp(r12d, 9i32); bts(qword_ptr(r13 + 0x400), rbx); adc(rax, r9); jz(again);
        lock().btr(dword_ptr(r13 + 0x404), r9d); adc(rax, rax); btc(qword_ptr(r13 + r12 * 8 + 0x300), r9); adc(rax, rbx); bt(dword_ptr(rdi - 60), ebx);
        adc(rax, rbx); bt(word_ptr(rdi - 60), bx); rcr(rax, 1i32); dec(r12); jnz(again); ud2();
    );
    let (exception, _, counters) = both(&[(CODE, &code)]);
    assert_eq!(exception.vector, vector::UD);
    // STD, CLD, BT of 16 bits, UD2, and HLT where that ends, in blocks that overlap.
    assert_eq!(counters.called_instructions, 11, "{counters:?}");
}

#[test]
fn reads_with_their_writes_a_little_later() {
    // What is between has opcode extensions of all numbers, names, flags, vectors, ways out; the pages are one and two.
    let code = asm!(64 at CODE, [again, out];
        mov(r12d, 40i32); lea(rsi, ptr(rdi + 0xff4)); set_label(&mut again);
        mov(eax, dword_ptr(rsi + 4)); or(eax, 8i32); mov(dword_ptr(rsi + 4), eax); mov(rax, qword_ptr(rdi + 8)); ror(rax, 7i32); not(rax); mov(qword_ptr(rdi + 8), rax);
        mov(rcx, qword_ptr(rdi + 0x20)); adc(rcx, 77i32); sbb(rcx, rdx); rcl(rcx, 3i32); mov(r9, rcx); xor(r9, r11); inc(rcx); mov(dword_ptr(rdi + 0x24), ecx);
        mov(rbx, qword_ptr(rsi - 8)); xchg(rbx, rdx); sar(rdx, 2i32); neg(rdx); cmp(r12d, 3i32); je(out); mov(qword_ptr(rsi - 1), rdx);
        movdqu(xmm1, xmmword_ptr(rdi + 0x40)); paddq(xmm1, xmm2); movd(xmm2, eax); pxor(xmm2, xmm1); movdqa(xmmword_ptr(rdi + 0x40), xmm2);
        mov(bl, byte_ptr(rdi + 0x61)); mov(ah, bl); bswap(rbx); mov(byte_ptr(rdi + 0x60), ah); movups(xmm3, xmmword_ptr(rsi + 3)); addps(xmm3, xmm1); movups(xmmword_ptr(rsi + 2), xmm3);
        cmp(rax, qword_ptr(rdi + 0x70)); setc(bl); dec(rbx); mov(qword_ptr(rdi + 0x70), rbx); add(rsi, 1i32); dec(r12d); jnz(again);
        set_label(&mut out); ud2();
    );
    let (exception, ..) = both(&[(CODE, &code)]);
    assert_eq!(exception.vector, vector::UD);
    // A loop of a few rounds.
    let code = asm!(64 at CODE, [again];
        mov(r12d, 700i32); mov(rsi, rdi); set_label(&mut again);
        mov(rax, qword_ptr(rsi)); ror(rax, 9i32); lea(rax, ptr(rax + r12)); or(rax, 1i32); mov(qword_ptr(rsi), rax); add(rsi, 5i32); dec(r12d); jnz(again); ud2();
    );
    let (exception, ..) = both(&[(CODE, &code)]);
    assert_eq!(exception.vector, vector::UD);
}

/// A little of everything that accesses memory off one register, which is `rdi` and may be anywhere.
fn neighbours() -> Vec<u8> {
    asm!(64 at CODE, [out];
        mov(eax, dword_ptr(rdi + 4)); add(qword_ptr(rdi + 40), rax); lea(rbx, ptr(rdi + 16)); mov(r15, rdi); adc(rdx, qword_ptr(rbx - 8));
        mov(byte_ptr(r15 + 100), dl); cmp(qword_ptr(rbx + 3), rax); mov(ecx, 5i32); setb(byte_ptr(r15 + 7)); shl(dword_ptr(rdi + 60), cl);
        sub(rdi, 24i32); mov(r9, 2u64); inc(qword_ptr(rdi + 24)); xadd(qword_ptr(r15 + 80), r9); mov(rsi, 3u64);
        movzx(r10d, word_ptr(rdi + rsi * 8)); mov(dword_ptr(rdi + rsi * 8 + 34), r10d); imul_2(r10, qword_ptr(rdi + rsi * 8 + 1));
        movups(xmm1, xmmword_ptr(r15 + 16)); addps(xmm1, xmmword_ptr(rbx)); movups(xmmword_ptr(rbx + 64), xmm1); xchg(qword_ptr(r15), rax);
        cmpxchg(dword_ptr(r15 + 120), edx); mul(qword_ptr(r15 + 90)); mov(r8, r15); mov(r8, qword_ptr(r8 + 2)); mov(qword_ptr(r15 + 130), r8);
        lea(rsp, ptr(r15 + 160)); push(rax); push(77i32); pop(r14); push(rsp); pop(rbp); mov(rbp, rsp); push(r15); push(rbx); leave();
        push(qword_ptr(rsp + 8)); push(qword_ptr(r15)); pop(rdx); push(rdx); pop(rsp); mov(rdi, qword_ptr(r15 + 8)); jb(out); nop(); set_label(&mut out); ud2();
    )
}

#[test]
fn neighbours_off_one_register_wherever_they_lie() {
    // In a page, across two, in the last bytes of the last one: where the end faults, where the start does.
    let places = [
        0x100, 0xf00, 0xf40, 0xf80, 0xfa8, 0xfd0, 0xff8, 0xffc, 0x1000, 0x1f40, 0x1f80, 0x1ff0,
        -0x18, -0x40,
    ];
    for place in places {
        let mut code = asm!(64 at CODE; mov(rdi, DATA.wrapping_add_signed(place)););
        code.extend(neighbours());
        let (_, _, counters) = both(&[(CODE, &code)]);
        assert!(counters.spared_probes > 25, "{counters:?}");
    }
}

#[test]
fn a_span_whose_end_may_not_be_written() {
    // The second access hits code: it takes the slow path, and so do the ones that share its probe.
    let code = asm!(64 at CODE, [again];
        mov(ecx, 40i32); lea(rbx, ptr(again)); set_label(&mut again);
        mov(eax, dword_ptr(rbx + 0x100)); add(dword_ptr(rbx + 0x104), ecx); add(eax, dword_ptr(rbx + 0x104)); dec(ecx); jnz(again); ud2();
    );
    let (_, state, _) = both(&[(CODE, &code)]);
    assert_eq!(state.gpr[1], 0);
}

#[test]
fn the_second_bytes_of_registers() {
    let code = asm!(64 at CODE;
        mov(ah, 0x5ai32); mov(bh, ah); add(bh, bl); test(ah, 2i32); setb(ch); mov(byte_ptr(rdi + 3), bh); add(dh, byte_ptr(rdi + 3));
        movzx(ebp, dh); movzx(eax, ah); inc(ah); xchg(ah, bl); xchg(bh, al); cmp(bh, 3i32); adc(ah, al); shl(ch, 3i32); xadd(dl, ah);
        neg(bh); movsx(esi, ah); sub(ah, ah); xchg(ch, cl); test(dh, dh); ud2();
    );
    let (_, _, counters) = both(&[(CODE, &code)]);
    // The one that exchanges parts of one register, UD2, and HLT where that ends.
    assert_eq!(counters.called_instructions, 3, "{counters:?}");
}

#[test]
fn flags_by_way_of_ah() {
    let code = asm!(64 at CODE, [again, over];
        mov(ecx, 255i32); set_label(&mut again);
        mov(eax, ecx); shl(eax, 8i32); add(cl, 0x7f); sahf(); jnp(over); seto(bl); adc(edx, ebx); set_label(&mut over); lahf(); sbb(edx, eax); sahf(); rcl(edx, 3i32);
        add(cl, -0x7fi32); lahf(); xor(edx, eax); dec(ecx); jnz(again); ud2();
    );
    let (_, _, counters) = both(&[(CODE, &code)]);
    // UD2, in two blocks that overlap, and HLT where that ends.
    assert_eq!(counters.called_instructions, 3, "{counters:?}");
}

#[test]
fn division_that_faults_and_that_does_not() {
    for (high, low, divisor) in [
        (0u64, 7u64, 2u64),
        (1, 0, 1),
        (0, 7, 0),
        (u64::MAX, 1 << 63, u64::MAX),
        (u64::MAX, 9u64.wrapping_neg(), 4),
    ] {
        for signed in [false, true] {
            let divide = if signed {
                asm!(64 at CODE; idiv(rbx); cmp(rax, rdx); ud2();)
            } else {
                asm!(64 at CODE; div(rbx); cmp(rax, rdx); ud2();)
            };
            let mut code = asm!(64 at CODE; mov(rax, low); mov(rdx, high); mov(rbx, divisor););
            code.extend(divide);
            both(&[(CODE, &code)]);
        }
    }
}

#[test]
fn vectors_in_place() {
    let code = asm!(64 at CODE;
        mov(rax, 0x4000_0000_3f80_0000u64); movq(xmm1, rax); pshufd(xmm2, xmm1, 0i32); addps(xmm2, xmm1); movdqu(xmmword_ptr(rdi + 8), xmm2);
        movdqa(xmm3, xmmword_ptr(rdi)); vaddps(ymm4, ymm2, ymmword_ptr(rdi)); vpxor(xmm5, xmm4, xmm2); vextractf128(xmm6, ymm4, 1i32);
        cvttss2si(r9d, xmm2); pmovmskb(r10d, xmm4); comiss(xmm1, xmm2); setb(bl); movd(dword_ptr(rdi + 100), xmm2); movdqa(xmm7, xmmword_ptr(rdi + 8)); ud2();
    );
    // The last one is not aligned. UD2 keeps the flags alive: dead ones may be stale (J2).
    let (exception, _, _) = both(&[(CODE, &code)]);
    assert_eq!(exception.vector, vector::GP);
}

#[test]
fn vector_registers_are_there_after_whatever_is_called() {
    // Each round: a handler between wide and narrow ones, an access that crosses pages, and one that is misaligned.
    let code = asm!(64 at CODE, [again];
        mov(rax, 0x4000_0000_3f80_0000u64); movq(xmm15, rax); vinsertf128(ymm15, ymm15, xmm15, 1i32); mov(r12d, 300i32); lea(rsi, ptr(rdi + 0x1000));
        set_label(&mut again);
        vaddps(ymm14, ymm14, ymm15); vperm2f128(ymm13, ymm14, ymm15, 0x21i32); xor(eax, eax); cpuid(); addps(xmm13, xmm15);
        vmovups(ymmword_ptr(rsi - 17), ymm13); mov(ecx, 3i32); rep().stosb(); sub(rdi, 3i32); vpaddd(xmm12, xmm12, xmmword_ptr(rsi - 9)); paddd(xmm11, xmm12);
        vpaddd(ymm10, ymm10, ymm13); mov(edx, 0u32); mov(eax, 7i32); xsave(ptr(rdi + 64)); vpxor(ymm10, ymm10, ymmword_ptr(rdi + 64 + 160)); vzeroupper(); vaddps(ymm9, ymm9, ymm15);
        movdqa(xmm8, xmm14); pshufb(xmm8, xmm9); movq(r9, xmm8); mov(dword_ptr(rsi + 8), r12d); dec(r12d); jnz(again); mov(ebx, 4i32); ud2();
    );
    let (exception, state, counters) = both(&[(CODE, &code)]);
    assert_eq!((exception.vector, state.gpr[3]), (vector::UD, 4));
    assert!(counters.entered < 100, "{counters:?}");
}

#[test]
fn general_registers_that_vector_instructions_imply() {
    let code = asm!(64 at CODE, [again];
        mov(ebx, 200i32); set_label(&mut again);
        movdqu(xmm1, xmmword_ptr(rdi + rbx)); mov(byte_ptr(rdi + rbx), bl); mov(eax, 9i32); mov(edx, ebx); pcmpestri(xmm1, xmmword_ptr(rdi + rbx), 8i32);
        add(r9, rcx); pcmpistri(xmm1, xmm0, 0x18i32); adc(r10, rcx); mulx(rcx, r8, rbx); mulx(r11, r11, r9); mov(rdx, r11); mulx(rdx, rax, r15); xor(r15, rdx);
        andn(r8, r8, r9); pcmpistrm(xmm1, xmm2, 0x40i32); pblendvb(xmm2, xmmword_ptr(rdi)); sha256rnds2(xmm3, xmm2); add(r15, rax); pextrq(r8, xmm3, 1i32); dec(ebx); jnz(again); ud2();
    );
    let (exception, _, counters) = both(&[(CODE, &code)]);
    assert_eq!(exception.vector, vector::UD);
    // One that has more operands than there are places for, in the three blocks that overlap, three times in the loop; UD2 in
    // both that go on behind that; HLT where it ends.
    assert_eq!(counters.called_instructions, 8, "{counters:?}");
}

#[test]
fn floating_point_under_every_mxcsr() {
    // Rounding, flushing and unmasked exceptions come and go within a block; the last one is taken.
    let code = asm!(64 at CODE, [again];
        mov(dword_ptr(rdi), 0x1f80i32); mov(dword_ptr(rdi + 4), 0x9fc0i32); mov(dword_ptr(rdi + 8), 0x5f80i32); mov(dword_ptr(rdi + 12), 0x1d80i32);
        mov(eax, 0x0000_0007i32); movd(xmm1, eax); mov(eax, 0x3f80_0000i32); movd(xmm2, eax); mov(eax, 0x4040_0000i32); movd(xmm3, eax);
        mov(ecx, 60i32); set_label(&mut again);
        divss(xmm2, xmm3); ldmxcsr(dword_ptr(rdi + 4)); mulss(xmm1, xmm3); addss(xmm2, xmm3); movss(dword_ptr(rdi + 20), xmm1); divps(xmm4, xmmword_ptr(rdi)); ldmxcsr(dword_ptr(rdi + 8));
        divss(xmm2, xmm3); addss(xmm5, xmm2); vdivps(ymm6, ymm5, ymm3); stmxcsr(dword_ptr(rdi + 24)); ldmxcsr(dword_ptr(rdi)); mulss(xmm1, xmm3); sqrtss(xmm7, xmm2); stmxcsr(dword_ptr(rdi + 28));
        dec(ecx); jnz(again); ldmxcsr(dword_ptr(rdi + 12)); movups(xmm8, xmm2); divss(xmm8, xmm9); ud2();
    );
    let (exception, ..) = both(&[(CODE, &code)]);
    assert_eq!(exception.vector, vector::XM);
}

#[test]
fn x87_in_place_with_its_pointers() {
    let code = asm!(64 at CODE, [again];
        mov(word_ptr(rdi), 0x0f7fi32); mov(word_ptr(rdi + 2), 0x037fi32); mov(ecx, 50i32); set_label(&mut again);
        fninit(); fldpi(); fld1(); fadd_2(st0, st1); fst(qword_ptr(rdi + 16)); fstp(tbyte_ptr(rdi + 0xffb)); fldcw(word_ptr(rdi)); fild(dword_ptr(rdi + 16)); fdivp(st1, st0);
        fnstenv(ptr(rdi + 32)); fldcw(word_ptr(rdi + 2)); fld(tbyte_ptr(rdi + 0xffb)); fcomip(st0, st1); setb(bl); fcmovb(st0, st1); fxam(); fnstsw(ax); add(edx, eax); fnstsw(word_ptr(rdi + 6));
        fnstcw(word_ptr(rdi + 8)); fxsave(ptr(rdi + 0x200)); wait(); movq(mm1, qword_ptr(rdi + 16)); paddd(mm2, mm1); cvtpi2ps(xmm1, mm2); movq2dq(xmm2, mm2); emms(); dec(ecx); jnz(again);
        mov(word_ptr(rdi), 0x0300i32); fldz(); fld1(); fldcw(word_ptr(rdi)); fdiv_2(st0, st1); fnstenv(ptr(rdi + 32)); fldcw(word_ptr(rdi)); fdiv_2(st0, st1); fld1(); ud2();
    );
    let (exception, _, counters) = both(&[(CODE, &code)]);
    assert_eq!(exception.vector, vector::MF);
    assert!(counters.entered < 100, "{counters:?}");
}

#[test]
fn code_that_changes_itself() {
    let code = asm!(64 at CODE, [again, target];
        mov(ecx, 50i32); xor(edx, edx); lea(rbx, ptr(target)); set_label(&mut again);
        inc(byte_ptr(rbx + 1)); set_label(&mut target); mov(eax, 5i32); add(edx, eax); dec(ecx); jnz(again); ud2();
    );
    let (_, state, counters) = both(&[(CODE, &code)]);
    assert_eq!(state.gpr[2], (6..=55).sum::<u64>());
    assert!(counters.killed_pages >= 49, "{counters:?}");
}

#[test]
fn a_full_cache_is_emptied() {
    let mut code = asm!(64 at CODE; mov(ebx, 30i32););
    let top = code.len();
    // A jump to the next instruction ends each of 400 blocks.
    for _ in 0..400 {
        code.extend([0x01, 0xd8, 0xeb, 0x00]);
    }
    code.extend([0xff, 0xcb, 0x0f, 0x85]);
    let back = top as i32 - (code.len() as i32 + 4);
    code.extend(back.to_le_bytes());
    code.extend([0x0f, 0x0b]);
    let mut machine = machine(Tier::Translator);
    machine.dispatcher().jit().unwrap().store().set_room(4 << 10);
    start(&mut machine, &[(CODE, &code)], CODE);
    let (_, state) = machine.run(None).unwrap();
    assert_eq!(state.gpr[0], 400 * (1..=30).sum::<u64>());
    let emptied = machine.dispatcher().jit().unwrap().store().emptied();
    assert!(emptied > 30, "{emptied}");
}

/// Code that would run for ever, or for as good as that, is left for another thread's sake.
fn is_left(code: &[u8]) {
    let mut machine = machine(Tier::Translator);
    if let Some(jit) = machine.dispatcher().jit_mut() {
        jit.set_trials(0);
    }
    start(&mut machine, &[(CODE, code)], CODE);
    let platform = machine.attention();
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        UserMachine::is_stuck(&platform);
    });
    assert!(machine.run(None).is_none());
    other.join().unwrap();
}

#[test]
fn a_loop_without_end_can_be_left() {
    is_left(&[0xeb, 0xfe]);
}

#[test]
fn loops_in_rounds_without_end_can_be_left() {
    is_left(
        &asm!(64 at CODE, [again]; xor(eax, eax); set_label(&mut again); inc(rcx); test(eax, eax); jz(again);),
    );
}

#[test]
fn calls_that_go_forward_alone_can_be_left() {
    // Each calls the next one twice, and jumps over a byte: 2^60 of them.
    let mut code = Vec::new();
    for _ in 0..60 {
        code.extend([0xe8, 9, 0, 0, 0, 0xe8, 4, 0, 0, 0, 0xeb, 1, 0x90, 0xc3]);
    }
    code.push(0xc3);
    is_left(&code);
}

#[test]
fn loops_are_there_in_several_rounds() {
    // Down to the end of what is mapped, up to it, across the pages, with an end in each of the rounds.
    let places = [0x100, 0xf80, 0xff0, 0x1f00, 0x1fb0, 0x1fe8];
    for (place, rounds) in places.into_iter().flat_map(|place| (1..=9).map(move |n| (place, n))) {
        let code = asm!(64 at CODE, [up, down, out];
            mov(rdi, DATA + place); mov(rsi, DATA + 0x40u64); mov(ecx, rounds); mov(rbp, rdi); xor(eax, eax);
            set_label(&mut up); adc(rax, qword_ptr(rsi)); movups(xmm1, xmmword_ptr(rsi + 8)); add(qword_ptr(rdi), rax); paddb(xmm1, xmm2);
            movups(xmmword_ptr(rdi + 8), xmm1); lea(rsi, ptr(rsi + 16)); add(rdi, 24i32); dec(ecx); jnz(up); pushfq();
            mov(ecx, rounds + 5); set_label(&mut down); dec(rdi); mov(al, byte_ptr(rdi)); inc(r9); mov(byte_ptr(rdi + r9), al);
            cmp(rdi, rbp); jz(out); dec(ecx); jnz(down); set_label(&mut out); pushfq(); ud2();
        );
        let (_, _, counters) = both(&[(CODE, &code)]);
        assert!(rounds < 3 || counters.spared_probes > 9, "{counters:?}");
    }
}

#[test]
fn tables_that_are_too_small_become_larger() {
    // Two pages that want the same entry of the TLB. POPF leaves for the dispatcher.
    let far = DATA + (4096 << 12);
    let page = |linear, physical| UserPage { linear, physical, write: true, execute: true };
    let run = |tier| {
        let pages = [
            page(CODE, 0x2_0000),
            page(DATA + 0x1000, 0x3_4000),
            page(DATA, 0x3_0000),
            page(far, 0x3_6000),
        ];
        let mut machine = UserMachine::with_tier(&pages, tier);
        let code = asm!(64 at CODE, [again];
            mov(rsi, far); mov(ecx, 120_000i32); set_label(&mut again);
            add(dword_ptr(rdi), ecx); xor(dword_ptr(rsi), ecx); pushfq(); popfq(); dec(ecx); jnz(again); ud2();
        );
        start(&mut machine, &[(CODE, &code)], CODE);
        let (exception, state) = machine.run(None).expect("an end");
        let emptied = machine.dispatcher().jit().map(|jit| jit.store().emptied());
        let mut data = [[0; 4]; 2];
        machine.read(0x3_0000, &mut data[0]);
        machine.read(0x3_6000, &mut data[1]);
        (exception, state.gpr, data, emptied)
    };
    let (interpreted, translated) = (run(Tier::Interpreter), run(Tier::Translator));
    assert_eq!(
        (interpreted.0, interpreted.1, interpreted.2),
        (translated.0, translated.1, translated.2)
    );
    assert_eq!(translated.3, Some(1), "once, and then there is room");
}

#[test]
fn a_round_changes_the_one_after_it() {
    // The third round makes the addition a subtraction.
    let code = asm!(64 at CODE, [again, patched];
        mov(ecx, 10i32); lea(rdi, ptr(patched)); xor(eax, eax); mov(dl, 0x29i32); jmp(again); nop(); nop(); set_label(&mut again);
        mov(ebx, 1i32); set_label(&mut patched); add(eax, ebx); cmp(ecx, 8i32); mov(r9, rdi); cmovne(r9, rsp);
        mov(byte_ptr(r9), dl); dec(ecx); jnz(again); ud2();
    );
    let (_, state, _) = both(&[(CODE, &code)]);
    assert_eq!(state.gpr[0] as i32, 3 - 7);
}

#[test]
fn an_instruction_across_pages_is_translated_too() {
    // Loops over ADC EAX, imm32 and over a conditional jump, both across the pages.
    let rest = [0u8, 0, 0, 0xff, 0xc9, 0x75, 0xf7, 0x0f, 0x0b];
    let head = [0xb9, 0x10, 0x27, 0, 0, 0x31, 0xc0, 0x83, 0xd0, 0x02];
    let (_, state, counters) =
        both(&[(CODE2 - 10, &head), (CODE2, &[0xff, 0xc9, 0x75, 0xf9, 0x0f, 0x0b])]);
    assert_eq!((state.gpr[0], state.gpr[1]), (2 * 10_000, 0));
    assert!(counters.interpreted_blocks == 0 && counters.entered < 100, "{counters:?}");
    let head = [0xb9, 0x10, 0x27, 0, 0, 0x31, 0xc0, 0x15, 0x03];
    let (_, state, counters) = both(&[(CODE2 - 9, &head), (CODE2, &rest)]);
    assert_eq!((state.gpr[0], state.gpr[1]), (3 * 10_000, 0));
    assert!(counters.interpreted_blocks == 0 && counters.entered < 100, "{counters:?}");
    let head = [0xb9, 0x10, 0x27, 0, 0, 0x31, 0xc0, 0xff, 0xc0, 0xff, 0xc9, 0x0f];
    let (_, state, counters) =
        both(&[(CODE2 - 12, &head), (CODE2, &[0x85, 0xf6, 0xff, 0xff, 0xff, 0x0f, 0x0b])]);
    assert_eq!((state.gpr[0], state.gpr[1]), (10_000, 0));
    assert!(counters.interpreted_blocks == 0 && counters.entered < 100, "{counters:?}");
}

#[test]
fn no_memory_is_writable_and_executable() {
    let mut machine = machine(Tier::Translator);
    start(&mut machine, &[(CODE, &asm!(64 at CODE; pxor(xmm0, xmm0); fld1(); ud2();))], CODE);
    machine.run(None).unwrap();
    let code = machine.dispatcher().jit().unwrap().store().arena().entry(0);
    // start-end rwxp ...
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut views = 0;
    for line in maps.lines() {
        let rights = line.split(' ').nth(1).unwrap();
        assert!(!(rights.contains('w') && rights.contains('x')), "{line}");
        let start = line.split('-').next().unwrap();
        let executable = line.contains("memfd:mvm-emu-code") && rights.starts_with("r-x");
        views += u32::from(executable && u64::from_str_radix(start, 16).unwrap() == code);
    }
    assert_eq!(views, 1, "its code is where it is looked for:\n{maps}");
    // And it cannot become so.
    // SAFETY: if it could be done, the code would stay as it is.
    let writable = unsafe {
        libc::mprotect(code as *mut libc::c_void, 4096, libc::PROT_READ | libc::PROT_WRITE)
    };
    assert_eq!(writable, -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EACCES));
}

#[test]
fn code_counts_where_it_is_asked_to() {
    const ROUNDS: u64 = 1000;
    let code = asm!(64 at CODE, [again];
        mov(ecx, ROUNDS as i32); mov(r15, CODE2); set_label(&mut again);
        mov(rax, qword_ptr(rdi)); mov(qword_ptr(rdi + 8), rax); call(r15); dec(ecx); jnz(again); ud2();
    );
    let function = asm!(64 at CODE2; inc(rdx); ret(););
    let count = |counting: bool| {
        let mut machine = machine(Tier::Translator);
        if counting {
            machine.dispatcher().jit_mut().unwrap().set_counting();
        }
        start(&mut machine, &[(CODE, &code), (CODE2, &function)], CODE);
        let (_, state) = machine.run(None).unwrap();
        (state.gpr, machine.figures())
    };
    let ((plain, without), (counted, with)) = (count(false), count(true));
    assert_eq!(plain, counted);
    assert!(without.counted.is_none() && without.memory > 0x1_0000);
    let figures = with.counted.unwrap();
    // Each round: the body, the function, what comes behind the call.
    assert!((3 * ROUNDS..3 * ROUNDS + 20).contains(&figures.blocks), "{figures:?}");
    // Two accesses by one probe, a pushed and a popped return address, less the first ones.
    assert!((3 * ROUNDS - 20..=3 * ROUNDS).contains(&figures.tlb_hits), "{figures:?}");
    assert!((ROUNDS - 20..=ROUNDS).contains(&figures.jump_hits), "{figures:?}");
    assert!((ROUNDS - 20..=ROUNDS).contains(&figures.returns), "{figures:?}");
    assert!(with.entered < 50, "{with:?}");
    let names: Vec<_> = with.rows().iter().map(|(name, _)| *name).collect();
    assert!(names.contains(&"jit-counted-tlb-hits") && names.contains(&"jit-memory"));
}
