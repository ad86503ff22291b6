//! Every kind of access to memory that is behind the bus: it does what it does to RAM.
//!
//! A device may be asked in pieces, and a locked operation on it locks nobody else out (SDM vol. 3, 9.1.2); but each instruction
//! ends, with the same result.

use iced_x86::code_asm::*;
use mvm_engine::Vcpu;

use super::has;
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, End, Guest, SCRATCH, lock, sel};

/// Where the memory is mapped: two pages in a row.
const PAGE: u64 = 0x5000_0000;
const FRAME: u64 = 0x60_0000;

/// What is in it at first.
fn pattern() -> Vec<u8> {
    (0..0x2000u32).map(|i| (i.wrapping_mul(0x9e37_79b1) >> 23) as u8).collect()
}

/// What a program leaves behind.
#[derive(Debug, PartialEq)]
struct Left {
    end: String,
    gpr: Vec<u64>,
    flags: u64,
    vectors: Vec<u8>,
    memory: Vec<u8>,
}

fn run(code: &[u8], frame: u64, offset: u64) -> Left {
    let mut guest = Guest::new();
    guest.map(PAGE, frame, 3);
    guest.map(PAGE + 0x1000, frame + 0x1000, 3);
    if frame == SCRATCH {
        *lock(&guest.bus.scratch) = pattern();
    } else {
        guest.put(frame, &pattern());
    }
    let cpu = guest.cpu();
    for (i, register) in cpu.gpr[..16].iter_mut().enumerate() {
        *register = 0x0123_4567_89ab_cdefu64.rotate_left(i as u32 * 7);
    }
    (cpu.gpr[3], cpu.gpr[4], cpu.gpr[1]) = (PAGE + offset, crate::testing::guest::STACK, 5);
    (cpu.gpr[6], cpu.gpr[7]) = (PAGE + offset, PAGE + offset + 0x40);
    let end = match guest.run(code) {
        End::Halt => "halt".into(),
        other => format!("{other:?}"),
    };
    let memory = match frame {
        SCRATCH => lock(&guest.bus.scratch)[..0x2000].to_vec(),
        _ => guest.get::<0x2000>(frame).to_vec(),
    };
    let state = guest.vcpu.state().expect("a state");
    Left {
        end,
        gpr: state.regs.gpr.to_vec(),
        flags: state.regs.rflags,
        vectors: state.xsave[..512]
            .iter()
            .chain(state.xsave.get(576..832).unwrap_or(&[]))
            .copied()
            .collect(),
        memory,
    }
}

/// Runs a program whose operand is at RBX on RAM and on the bus, in a page and across two.
#[track_caller]
fn same(code: &[u8]) {
    let code = [code, &[0xf4]].concat();
    for offset in [0x100, 0xffd] {
        let (ram, bus) = (run(&code, FRAME, offset), run(&code, SCRATCH, offset));
        assert_eq!(ram.end, "halt", "{code:02x?}");
        assert_eq!(ram, bus, "{code:02x?} at {offset:#x}");
    }
}

macro_rules! each {
    ($($name:ident($($arg:expr),*);)*) => { $(same(&asm!(64 at CODE; $name($($arg),*);));)* };
}

#[test]
fn integer_instructions() {
    each! {
        mov(qword_ptr(rbx), rax); mov(dword_ptr(rbx), eax); mov(word_ptr(rbx), ax); mov(byte_ptr(rbx), ah);
        mov(rax, qword_ptr(rbx)); mov(eax, dword_ptr(rbx)); mov(ax, word_ptr(rbx)); mov(ch, byte_ptr(rbx));
        mov(qword_ptr(rbx), -2i32); mov(word_ptr(rbx), 0x1234i32); movzx(eax, byte_ptr(rbx)); movzx(rax, word_ptr(rbx));
        movsx(eax, byte_ptr(rbx)); movsxd(rax, dword_ptr(rbx)); movnti(qword_ptr(rbx), rdx); lea(rax, qword_ptr(rbx));
        add(dword_ptr(rbx), eax); or(qword_ptr(rbx), rax); adc(word_ptr(rbx), dx); sbb(byte_ptr(rbx), dl); and(qword_ptr(rbx), 0x77i32);
        sub(rax, qword_ptr(rbx)); xor(dword_ptr(rbx), 0x1111i32); cmp(qword_ptr(rbx), rax); cmp(al, byte_ptr(rbx));
        test(qword_ptr(rbx), rax); test(word_ptr(rbx), 0xf000u32); inc(qword_ptr(rbx)); dec(byte_ptr(rbx)); neg(dword_ptr(rbx));
        not(word_ptr(rbx)); shl(qword_ptr(rbx), 3i32); sar(dword_ptr(rbx), cl); rcl(word_ptr(rbx), 1i32); ror(byte_ptr(rbx), cl);
        shld(dword_ptr(rbx), eax, 3i32); shrd(qword_ptr(rbx), rax, cl); mul(dword_ptr(rbx)); imul_2(rax, qword_ptr(rbx));
        imul_3(eax, dword_ptr(rbx), 311i32); imul(byte_ptr(rbx)); xchg(qword_ptr(rbx), rax); xchg(byte_ptr(rbx), al); xadd(qword_ptr(rbx), rax);
        xadd(word_ptr(rbx), dx); cmpxchg(qword_ptr(rbx), rdx); cmpxchg(byte_ptr(rbx), dl); cmpxchg8b(qword_ptr(rbx));
        bt(dword_ptr(rbx), 7i32); bts(qword_ptr(rbx), 40i32); btc(dword_ptr(rbx), ecx); btr(word_ptr(rbx), cx); bsf(rax, qword_ptr(rbx));
        bsr(eax, dword_ptr(rbx)); cmove(rax, qword_ptr(rbx)); cmovne(eax, dword_ptr(rbx)); sete(byte_ptr(rbx)); setne(byte_ptr(rbx));
        push(qword_ptr(rbx)); push(word_ptr(rbx)); stmxcsr(dword_ptr(rbx)); smsw(word_ptr(rbx)); str(word_ptr(rbx)); sldt(word_ptr(rbx)); sgdt(fword_ptr(rbx)); sidt(fword_ptr(rbx));
        mov(word_ptr(rbx), ds); verr(word_ptr(rbx)); lar(eax, word_ptr(rbx));
    }
}

#[test]
fn locked_instructions() {
    for code in [
        asm!(64 at CODE; lock().inc(dword_ptr(rbx));),
        asm!(64 at CODE; lock().dec(byte_ptr(rbx));),
        asm!(64 at CODE; lock().neg(qword_ptr(rbx));),
        asm!(64 at CODE; lock().not(word_ptr(rbx));),
        asm!(64 at CODE; lock().add(qword_ptr(rbx), rax);),
        asm!(64 at CODE; lock().adc(dword_ptr(rbx), 5i32);),
        asm!(64 at CODE; lock().sub(byte_ptr(rbx), al);),
        asm!(64 at CODE; lock().xadd(dword_ptr(rbx), eax);),
        asm!(64 at CODE; lock().bts(dword_ptr(rbx), 9i32);),
        asm!(64 at CODE; lock().btc(qword_ptr(rbx), rcx);),
        asm!(64 at CODE; mov(rax, qword_ptr(rbx)); lock().cmpxchg(qword_ptr(rbx), rdx);),
        asm!(64 at CODE; lock().cmpxchg(word_ptr(rbx), dx);),
        asm!(64 at CODE; mov(eax, dword_ptr(rbx)); mov(edx, dword_ptr(rbx + 4)); mov(rdi, rbx); lock().cmpxchg8b(qword_ptr(rbx));),
    ] {
        same(&code);
    }
    if has("cx16") {
        // Aligned, or #GP(0).
        let code = asm!(64 at CODE; add(rbx, 0x20i32); and(rbx, -16i32); mov(rax, qword_ptr(rbx)); mov(rdx, qword_ptr(rbx + 8)); lock().cmpxchg16b(xmmword_ptr(rbx)););
        same(&code);
    }
}

#[test]
fn string_instructions() {
    for code in [
        asm!(64 at CODE; rep().movsb();),
        asm!(64 at CODE; rep().movsw();),
        asm!(64 at CODE; rep().movsd();),
        asm!(64 at CODE; rep().movsq();),
        asm!(64 at CODE; mov(ecx, 0x123i32); rep().movsb();),
        asm!(64 at CODE; lea(rdi, ptr(rsi + 3)); mov(ecx, 0x123i32); rep().movsb();),
        asm!(64 at CODE; std(); add(rsi, 0x20i32); rep().movsq(); cld();),
        asm!(64 at CODE; rep().stosb();),
        asm!(64 at CODE; mov(ecx, 0x100i32); rep().stosd();),
        asm!(64 at CODE; stosq(); stosw();),
        asm!(64 at CODE; lodsb(); lodsq();),
        asm!(64 at CODE; rep().lodsw();),
        asm!(64 at CODE; scasb(); sete(al); scasq();),
        asm!(64 at CODE; mov(al, byte_ptr(rdi + 3)); repne().scasb();),
        asm!(64 at CODE; repe().cmpsb();),
        asm!(64 at CODE; lea(rdi, ptr(rsi)); repe().cmpsd();),
        asm!(64 at CODE; mov(dx, 0x80i32); rep().insb();),
        asm!(64 at CODE; mov(dx, 0x80i32); rep().outsd();),
        asm!(64 at CODE; xlatb();),
    ] {
        same(&code);
    }
    // From RAM to the bus and back.
    let code = asm!(64 at CODE;
        mov(rdi, rbx); mov(esi, CODE as u32); mov(ecx, 20i32); rep().movsb(); mov(rsi, rbx); mov(edi, 0x61_0000u32); mov(ecx, 3i32);
        rep().movsq(); mov(rax, qword_ptr(0x61_0000u32)); mov(rdx, qword_ptr(0x61_0010u32));
    );
    same(&code);
}

#[test]
fn the_stack() {
    let code = asm!(64 at CODE, [over, there];
        mov(rdx, rsp); lea(rsp, ptr(rbx + 0x80)); push(-7i32); push(rax); push(qword_ptr(rbx)); push(-7_070_707i32); pushfq(); pop(rcx);
        push(ax); pop(si); mov(rbp, rbx); enter(0x28i32, 0i32); leave(); call(over); jmp(there); set_label(&mut over); ret();
        set_label(&mut there); pop(r8); pop(qword_ptr(rbx + 8)); enter(16i32, 3i32); mov(r9, rsp); mov(r10, rbp); mov(rsp, rdx);
    );
    same(&code);
    // An exception, and the way back.
    let code = asm!(64 at CODE; mov(rdx, rsp); lea(rsp, ptr(rbx + 0x80)); int3(); nop(); mov(r9, rsp); mov(rsp, rdx););
    let back = CODE + code.len() as u64 - 7;
    for frame in [FRAME, SCRATCH] {
        let mut guest = Guest::new();
        guest.map(PAGE, frame, 3);
        guest.handler(3, &asm!(64 at 0; mov(rax, qword_ptr(rsp)); iretq();));
        guest.cpu().gpr[3] = PAGE + 0x100;
        assert_eq!(guest.run(&[&code[..], &[0xf4]].concat()), End::Halt);
        assert_eq!((guest.reg(0), guest.reg(9)), (back, PAGE + 0x180));
    }
}

#[test]
fn segments_and_far_pointers() {
    let selector = i32::from(sel::DATA);
    let code = i32::from(sel::CODE);
    same(
        &asm!(64 at CODE; mov(dword_ptr(rbx), selector); mov(ss, word_ptr(rbx)); mov(fs, word_ptr(rbx)); mov(eax, fs);),
    );
    same(&asm!(64 at CODE, [there];
        lea(rax, ptr(there)); mov(qword_ptr(rbx), rax); mov(word_ptr(rbx + 8), code); db(&[0x48, 0xff, 0x2b]); ud2();
        set_label(&mut there); nop();
    ));
    same(&asm!(64 at CODE, [there];
        lea(rax, ptr(there)); mov(qword_ptr(rbx), rax); mov(word_ptr(rbx + 8), code); db(&[0x48, 0xff, 0x1b]); ud2();
        set_label(&mut there); pop(rax); pop(rcx);
    ));
    same(
        &asm!(64 at CODE; mov(dword_ptr(rbx), 0x1234i32); mov(word_ptr(rbx + 4), selector); lfs(eax, fword_ptr(rbx)); mov(ecx, fs);),
    );
    same(
        &asm!(64 at CODE; sgdt(fword_ptr(rbx)); lgdt(fword_ptr(rbx)); sidt(fword_ptr(rbx)); lidt(fword_ptr(rbx)); mov(eax, selector); mov(ds, ax);),
    );
}

#[test]
fn vectors_and_x87() {
    each! {
        movups(xmm1, xmmword_ptr(rbx)); movdqu(xmm2, xmmword_ptr(rbx)); movups(xmmword_ptr(rbx), xmm3); movss(xmm1, dword_ptr(rbx));
        movsd_2(xmm1, qword_ptr(rbx)); movq(xmm1, qword_ptr(rbx)); movd(xmm1, dword_ptr(rbx)); movlps(xmm1, qword_ptr(rbx));
        movhps(qword_ptr(rbx), xmm1); cvtsi2sd(xmm1, dword_ptr(rbx)); movq(mm1, qword_ptr(rbx)); movq(qword_ptr(rbx), mm0); paddb(mm1, qword_ptr(rbx));
        fild(dword_ptr(rbx)); fild(qword_ptr(rbx)); fist(word_ptr(rbx)); fnstcw(word_ptr(rbx)); fnstsw(word_ptr(rbx)); fnstenv(ptr(rbx));
        fnsave(ptr(rbx)); fbld(tbyte_ptr(rbx));
    }
    // Aligned operands.
    let aligned =
        |code: &[u8]| [&asm!(64 at CODE; add(rbx, 0x40i32); and(rbx, -64i32);)[..], code].concat();
    for code in [
        asm!(64 at 0; movaps(xmm1, xmmword_ptr(rbx)); movapd(xmmword_ptr(rbx + 16), xmm1); movntdq(xmmword_ptr(rbx + 32), xmm1);),
        asm!(64 at 0; pxor(xmm1, xmmword_ptr(rbx)); movdqa(xmmword_ptr(rbx + 16), xmm1);),
        asm!(64 at 0; fld1(); fstp(tbyte_ptr(rbx)); fld(tbyte_ptr(rbx)); fadd(dword_ptr(rbx + 7)); fstp(qword_ptr(rbx));),
        asm!(64 at 0; stmxcsr(dword_ptr(rbx)); ldmxcsr(dword_ptr(rbx));),
        asm!(64 at 0; fxsave(ptr(rbx + 16)); and(dword_ptr(rbx + 16 + 24), 0xffffi32); fxrstor(ptr(rbx + 16));),
        asm!(64 at 0; mov(rdi, rbx); movdqu(xmm2, xmmword_ptr(rbx)); maskmovdqu(xmm1, xmm2);),
    ] {
        same(&aligned(&code));
    }
    if has("avx2") {
        for code in [
            asm!(64 at 0; vmovdqu(ymm1, ymmword_ptr(rbx)); vmovdqa(ymmword_ptr(rbx + 32), ymm1); vmovntdqa(ymm2, ymmword_ptr(rbx)); vmovntdq(ymmword_ptr(rbx), ymm2);),
            asm!(64 at 0; vpaddd(ymm1, ymm2, ymmword_ptr(rbx)); vmovups(ymmword_ptr(rbx + 5), ymm1);),
            asm!(64 at 0; vpmaskmovd(ymm1, ymm2, ymmword_ptr(rbx)); vpmaskmovd(ymmword_ptr(rbx), ymm1, ymm1); vpbroadcastd(ymm3, dword_ptr(rbx));),
            asm!(64 at 0; vpcmpeqd(xmm1, xmm1, xmm1); vpxor(xmm2, xmm2, xmm2); vpgatherdd_3(xmm3, dword_ptr(rbx + xmm2 * 4), xmm1);),
        ] {
            same(&aligned(&code));
        }
    }
    if has("xsave") {
        same(&aligned(&asm!(64 at 0;
            lea(rdi, ptr(rbx + 512)); mov(ecx, 8i32); xor(eax, eax); rep().stosq(); mov(eax, 7i32); xor(edx, edx); xsave(ptr(rbx));
            xrstor(ptr(rbx));
        )));
    }
    if has("movbe") {
        each! { movbe(eax, dword_ptr(rbx)); movbe(qword_ptr(rbx), rax); }
    }
}
