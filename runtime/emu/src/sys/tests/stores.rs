//! Every kind of store into code, in front of it and elsewhere: blocks must end as single instructions do.

use iced_x86::code_asm::*;

use crate::block::Stop;
use crate::testing::asm::asm;
use crate::testing::{CODE, End, Machine};

/// A function in another page, which the store hits as well.
const TARGET: u64 = 0x5800;
/// Where the image that some instructions store may start: far enough below what is looked at.
const PAGE: std::ops::Range<u64> = 0x5000..0x7000;

/// Instructions that store at RBX, or below RSP, which is RBX + 8. Those that need it find RSI, RDI, RCX set.
fn stores() -> Vec<Vec<u8>> {
    let mut all = vec![
        asm!(64 at 0; mov(byte_ptr(rbx), cl);),
        asm!(64 at 0; mov(word_ptr(rbx), cx);),
        asm!(64 at 0; mov(dword_ptr(rbx), ecx);),
        asm!(64 at 0; mov(qword_ptr(rbx), rcx);),
        asm!(64 at 0; mov(qword_ptr(rbx), 0x12i32);),
        asm!(64 at 0; add(byte_ptr(rbx), cl);),
        asm!(64 at 0; adc(dword_ptr(rbx), 0x11i32);),
        asm!(64 at 0; neg(dword_ptr(rbx));),
        asm!(64 at 0; not(word_ptr(rbx));),
        asm!(64 at 0; inc(byte_ptr(rbx));),
        asm!(64 at 0; shl(dword_ptr(rbx), 3u32);),
        asm!(64 at 0; rcr(dword_ptr(rbx), cl);),
        asm!(64 at 0; shld(dword_ptr(rbx), ecx, 5u32);),
        asm!(64 at 0; shrd(qword_ptr(rbx), rcx, cl);),
        asm!(64 at 0; bts(dword_ptr(rbx), 3i32);),
        asm!(64 at 0; btc(qword_ptr(rbx - 8), rdx);),
        asm!(64 at 0; lock().btr(dword_ptr(rbx), 2i32);),
        asm!(64 at 0; lock().xadd(dword_ptr(rbx), ecx);),
        asm!(64 at 0; xadd(byte_ptr(rbx), cl);),
        asm!(64 at 0; xchg(dword_ptr(rbx), ecx);),
        asm!(64 at 0; mov(eax, 0x1122_3344i32); lock().cmpxchg(dword_ptr(rbx), ecx);),
        asm!(64 at 0; mov(eax, 0x1122_3344i32); cmpxchg(word_ptr(rbx), cx);),
        asm!(64 at 0; mov(eax, dword_ptr(rbx)); mov(edx, dword_ptr(rbx + 4)); mov(r8, rbx); mov(ebx, eax); xor(ebx, 0x5500i32); mov(ecx, edx); lock().cmpxchg8b(qword_ptr(r8));),
        asm!(64 at 0; setnz(byte_ptr(rbx));),
        asm!(64 at 0; movbe(dword_ptr(rbx), ecx);),
        asm!(64 at 0; movnti(dword_ptr(rbx), ecx);),
        asm!(64 at 0; stosb();),
        asm!(64 at 0; stosq();),
        asm!(64 at 0; mov(ecx, 1i32); rep().stosd();),
        asm!(64 at 0; movsb();),
        asm!(64 at 0; movsq();),
        asm!(64 at 0; mov(ecx, 2i32); rep().movsw();),
        asm!(64 at 0; push(rcx);),
        asm!(64 at 0; push(0x77i32);),
        asm!(64 at 0; push(cx);),
        asm!(64 at 0; push(qword_ptr(rsi));),
        asm!(64 at 0; pushfq();),
        asm!(64 at 0; push(fs);),
        asm!(64 at 0; enter(8i32, 0i32);),
        asm!(64 at 0; enter(8i32, 1i32);),
        asm!(64 at 0; lea(rsp, ptr(rsi)); pop(qword_ptr(rbx));),
        asm!(64 at 0; mov(word_ptr(rbx), cs);),
        asm!(64 at 0; sidt(ptr(rbx));),
        asm!(64 at 0; sgdt(ptr(rbx));),
        asm!(64 at 0; smsw(word_ptr(rbx));),
        asm!(64 at 0; fninit(); fld1(); fst(dword_ptr(rbx));),
        asm!(64 at 0; fninit(); fld1(); fstp(qword_ptr(rbx));),
        asm!(64 at 0; fninit(); fldpi(); fstp(tbyte_ptr(rbx));),
        asm!(64 at 0; fninit(); fld1(); fist(word_ptr(rbx));),
        asm!(64 at 0; fninit(); fld1(); fistp(qword_ptr(rbx));),
        asm!(64 at 0; fninit(); fld1(); fisttp(dword_ptr(rbx));),
        asm!(64 at 0; fninit(); fld1(); fbstp(tbyte_ptr(rbx));),
        asm!(64 at 0; fnstcw(word_ptr(rbx));),
        asm!(64 at 0; fnstsw(word_ptr(rbx));),
        asm!(64 at 0; fnstenv(ptr(rbx));),
        asm!(64 at 0; fnsave(ptr(rbx));),
        asm!(64 at 0; stmxcsr(dword_ptr(rbx));),
        asm!(64 at 0; and(rbx, -64); fxsave(ptr(rbx));),
        asm!(64 at 0; and(rbx, -64); mov(eax, 7i32); xor(edx, edx); xsave(ptr(rbx));),
        asm!(64 at 0; movd(dword_ptr(rbx), xmm0);),
        asm!(64 at 0; movq(qword_ptr(rbx), xmm0);),
        asm!(64 at 0; movss(dword_ptr(rbx), xmm0);),
        asm!(64 at 0; movsd_2(qword_ptr(rbx), xmm0);),
        asm!(64 at 0; movlps(qword_ptr(rbx), xmm0);),
        asm!(64 at 0; movhps(qword_ptr(rbx), xmm0);),
        asm!(64 at 0; movups(xmmword_ptr(rbx), xmm0);),
        asm!(64 at 0; movdqu(xmmword_ptr(rbx), xmm0);),
        asm!(64 at 0; and(rbx, -16); movaps(xmmword_ptr(rbx), xmm0);),
        asm!(64 at 0; and(rbx, -16); movntdq(xmmword_ptr(rbx), xmm0);),
        asm!(64 at 0; movd(mm0, ecx); movq(qword_ptr(rbx), mm0);),
        asm!(64 at 0; movd(mm0, ecx); movntq(qword_ptr(rbx), mm0);),
        asm!(64 at 0; pextrb(byte_ptr(rbx), xmm0, 1u32);),
        asm!(64 at 0; pextrd(dword_ptr(rbx), xmm0, 1u32);),
        asm!(64 at 0; extractps(dword_ptr(rbx), xmm0, 2u32);),
        asm!(64 at 0; pcmpeqd(xmm1, xmm1); maskmovdqu(xmm0, xmm1);),
        asm!(64 at 0; movd(mm0, ecx); pcmpeqd(mm1, mm1); maskmovq(mm0, mm1);),
    ];
    if super::has("avx") {
        all.extend([
            asm!(64 at 0; vmovups(ymmword_ptr(rbx), ymm0);),
            asm!(64 at 0; vmovd(dword_ptr(rbx), xmm0);),
            asm!(64 at 0; vextractf128(xmmword_ptr(rbx), ymm0, 1u32);),
            asm!(64 at 0; vpcmpeqd(xmm1, xmm1, xmm1); vmaskmovps(xmmword_ptr(rbx), xmm1, xmm0);),
        ]);
    }
    if super::has("avx2") {
        all.push(
            asm!(64 at 0; vpcmpeqd(ymm1, ymm1, ymm1); vpmaskmovd(ymmword_ptr(rbx), ymm1, ymm0);),
        );
    }
    if super::has("f16c") {
        all.push(asm!(64 at 0; vcvtps2ph(qword_ptr(rbx), xmm0, 0u32);));
    }
    all
}

/// `store`, into an immediate in front of it, or into one of a function that has run already.
fn program(store: &[u8], elsewhere: bool) -> Vec<u8> {
    let mut code = asm!(64 at CODE; fninit(); mov(rsi, 0x9000u64); mov(rdx, 0x45u64); mov(rcx, 0xf4f4_f4f4_0f0b_0201u64););
    let origin = |code: &[u8]| CODE + code.len() as u64;
    if elsewhere {
        code.extend(asm!(64 at origin(&code); mov(rbp, TARGET); call(rbp); call(rbp); lea(rbx, ptr(rbp + 1)); mov(eax, 0x99i32); mov(rsp, TARGET + 9);));
    } else {
        // lea rbx, [rip + the immediate]
        let before = 7 + 4 + 3 + 3 + store.len();
        code.extend([0x48, 0x8d, 0x1d]);
        code.extend((before as i32 + 1 - 7).to_le_bytes());
        code.extend(asm!(64 at 0; lea(rsp, ptr(rbx + 8)); nop(); nop(); nop();));
        code.truncate(code.len() - 3);
        code.extend(asm!(64 at 0; mov(rdi, rbx);));
        code.extend([0x90; 3]);
        code.extend(store);
        code.extend([0xb8, 0x44, 0x33, 0x22, 0x11, 0xf4, 0xf4, 0xf4, 0xf4]);
        return code;
    }
    code.extend(asm!(64 at 0; mov(rdi, rbx);));
    code.extend(store);
    let at = origin(&code);
    code.extend(asm!(64 at at; mov(rsp, 0xa000u64); call(TARGET); hlt();));
    code
}

fn machine(code: &[u8]) -> Machine {
    let mut machine = Machine::new();
    // What runs off stops.
    machine.write(CODE, &[0xf4; 0x1000]);
    machine.write(PAGE.start, &[0xf4; 0x2000]);
    machine
        .write(TARGET, &[0xb8, 0x44, 0x33, 0x22, 0x11, 0xc3, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4]);
    machine.write(0x9000, &[0x21, 0x43, 0x65, 0x07, 0xf4, 0xf4, 0xf4, 0xf4]);
    let vector = 0x1111_f4c3_0706_0504_u64;
    machine.cpu.vec.ymm[0].0 = [vector, !vector, vector ^ 0xff, 0x3c00_0000_3f80_0000];
    machine.cpu.gpr[4] = 0xa000;
    machine.load(code);
    machine
}

#[test]
fn every_kind_of_store_ends_what_it_hits() {
    let (mut idle, mut endless) = (Vec::new(), Vec::new());
    for store in stores() {
        for elsewhere in [false, true] {
            let code = program(&store, elsewhere);
            // What single instructions do, decoded one by one, is right.
            let mut stepped = machine(&code);
            let end = stepped.run_to(u64::MAX);
            if end == End::Steps {
                endless.push((store.clone(), elsewhere));
                continue;
            }
            let mut whole = machine(&code);
            let other = whole.run_blocks(1000);
            assert_eq!(end, other, "{store:02x?} {elsewhere}");
            assert_eq!(stepped.cpu.gpr[..16], whole.cpu.gpr[..16], "{store:02x?} {elsewhere}");
            assert_eq!(stepped.cpu.rip, whole.cpu.rip, "{store:02x?} {elsewhere}");
            let page = |m: &Machine| (m.read::<0x2000>(PAGE.start), m.read::<0x1000>(CODE));
            let (after, before) = (page(&stepped), page(&machine(&code)));
            assert!(after == page(&whole), "{store:02x?} {elsewhere}");
            if after == before {
                idle.push((store.clone(), elsewhere));
            }
        }
    }
    assert!(
        idle.is_empty() && endless.is_empty(),
        "they store nothing: {idle:02x?}, they do not end: {endless:02x?}"
    );
}

#[test]
fn a_step_is_not_a_block() {
    // What the test above takes for granted.
    let mut machine = machine(&asm!(64 at CODE; inc(eax); inc(eax); hlt();));
    machine.cpu.vec.enter();
    assert_eq!(machine.step(), Stop::Stepped);
    machine.cpu.vec.leave();
    assert_eq!((machine.cpu.gpr[0], machine.cpu.rip), (1, CODE + 2));
}
