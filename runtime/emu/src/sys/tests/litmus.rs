//! What two processors may see of each other's accesses (SDM vol. 3, 9.2.3): outcomes that must not be never are.
//!
//! Both run freely. The n-th store of either is of the value n, so that every load tells how far the other one is, and
//! all pairs of rounds can be judged afterwards.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::smp::{AP_CODE, Machine, start_others};
use crate::testing::guest::{CODE, sel};

const ROUNDS: u64 = 30_000;
/// The two variables: in pages of data, or in pages that have code too, whose stores take another way.
const DATA: [u64; 2] = [0x10_0040, 0x11_0080];
const BESIDE_CODE: [u64; 2] = [0x12_0040, 0x13_0080];
/// What was loaded, by processor.
const LOADED: [u64; 2] = [0x60_0000, 0x70_0000];
const DONE: u64 = 0x14_0000;

/// Between a store and a load that must not pass each other.
#[derive(Clone, Copy, Debug)]
enum Fence {
    Mfence,
    Locked,
    Exchange,
    Cpuid,
    Iret,
    Control,
    Invlpg,
    Wrmsr,
}

const FENCES: [Fence; 8] = [
    Fence::Mfence,
    Fence::Locked,
    Fence::Exchange,
    Fence::Cpuid,
    Fence::Iret,
    Fence::Control,
    Fence::Invlpg,
    Fence::Wrmsr,
];

type Assembler<'a> = &'a mut CodeAssembler;

/// A program of one processor: `body` in each of the rounds, counted in R11, from RSI and RDI, the variables. What
/// it has in RAX then is kept.
fn program(
    at: u64,
    variables: [u64; 2],
    index: usize,
    body: impl Fn(Assembler<'_>) -> Result<(), IcedError>,
) -> Vec<u8> {
    let make = || {
        let mut a = CodeAssembler::new(64)?;
        let (mut again, mut wait) = (a.create_label(), a.create_label());
        a.mov(rsi, variables[index])?;
        a.mov(rdi, variables[1 - index])?;
        a.mov(rbp, LOADED[index])?;
        a.mov(r12, DONE)?;
        if variables == BESIDE_CODE {
            // Code in the page of the variables.
            a.lea(rbx, ptr(rsi + 0x100))?;
            a.call(rbx)?;
        }
        // Together.
        a.lock().inc(dword_ptr(r12))?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(r12), 2i32)?;
        a.jb(wait)?;
        a.xor(r11d, r11d)?;
        a.set_label(&mut again)?;
        a.inc(r11)?;
        body(&mut a)?;
        a.mov(qword_ptr(rbp + r11 * 8), rax)?;
        a.cmp(r11, ROUNDS as i32)?;
        a.jb(again)?;
        let mut end = a.create_label();
        a.lock().inc(dword_ptr(r12))?;
        a.set_label(&mut end)?;
        a.pause()?;
        a.cmp(dword_ptr(r12), 4i32)?;
        a.jb(end)?;
        a.cli()?;
        a.hlt()?;
        a.assemble(at)
    };
    make().expect("a program")
}

/// Runs both bodies; what each loaded, by round from 1 on.
fn run(
    variables: [u64; 2],
    first: impl Fn(Assembler<'_>) -> Result<(), IcedError>,
    second: impl Fn(Assembler<'_>) -> Result<(), IcedError>,
) -> [Vec<u64>; 2] {
    let machine = Machine::new(2);
    for variable in BESIDE_CODE {
        machine.guest.put(variable + 0x100, &[0xc3]);
    }
    machine.guest.put(AP_CODE, &program(AP_CODE, variables, 1, second));
    let mut code = start_others();
    let at = CODE + code.len() as u64;
    code.extend(program(at, variables, 0, first));
    machine.guest.put(CODE, &code);
    let (guest, _) = machine.run();
    assert_eq!(guest.get32(DONE), 4, "both came to their end");
    LOADED.map(|at| (0..=ROUNDS).map(|round| guest.get64(at + round * 8)).collect())
}

/// Stores the round's number to the own variable.
fn store(a: Assembler<'_>) -> Result<(), IcedError> {
    a.mov(qword_ptr(rsi), r11)
}

fn load(a: Assembler<'_>) -> Result<(), IcedError> {
    a.mov(rax, qword_ptr(rdi))
}

#[test]
fn stores_and_loads_do_not_pass_a_fence() {
    for variables in [DATA, BESIDE_CODE] {
        for fence in FENCES {
            let body = |a: Assembler<'_>| {
                match fence {
                    Fence::Mfence => store(a).and_then(|()| a.mfence())?,
                    Fence::Locked => store(a).and_then(|()| a.lock().or(dword_ptr(rsp - 64), 0))?,
                    Fence::Exchange => {
                        a.mov(rdx, r11)?;
                        a.xchg(qword_ptr(rsi), rdx)?;
                    }
                    Fence::Cpuid => {
                        store(a)?;
                        a.xor(eax, eax)?;
                        a.cpuid()?;
                    }
                    Fence::Iret => {
                        let mut behind = a.create_label();
                        a.mov(rdx, rsp)?;
                        a.push(i32::from(sel::DATA))?;
                        a.push(rdx)?;
                        a.push(2i32)?;
                        a.push(i32::from(sel::CODE))?;
                        a.lea(rax, ptr(behind))?;
                        a.push(rax)?;
                        store(a)?;
                        a.iretq()?;
                        a.set_label(&mut behind)?;
                    }
                    Fence::Control => {
                        a.mov(rdx, cr4)?;
                        store(a)?;
                        a.mov(cr4, rdx)?;
                    }
                    Fence::Invlpg => {
                        store(a)?;
                        a.invlpg(ptr(r12 + 0x4000))?;
                    }
                    Fence::Wrmsr => {
                        a.mov(ecx, 0xc000_0102u32)?;
                        a.xor(edx, edx)?;
                        store(a)?;
                        a.wrmsr()?;
                    }
                }
                load(a)
            };
            let [x, y] = run(variables, body, body);
            // Round i did not see store y[i] + 1 of the other one, whose load behind it sees store i then.
            for (round, loaded) in x.iter().enumerate().skip(1) {
                let missed = *loaded as usize + 1;
                assert!(
                    missed > ROUNDS as usize || y[missed] >= round as u64,
                    "{fence:?} {round}: {loaded} {}",
                    y[missed]
                );
            }
        }
    }
}

#[test]
fn messages_come_after_what_they_tell_of() {
    // The first stores to its variable and then to the other one; the second loads them in the other order.
    for variables in [DATA, BESIDE_CODE] {
        for kind in 0..4 {
            let writer = |a: Assembler<'_>| {
                match kind {
                    0 => store(a)?,
                    1 => {
                        a.movq(xmm0, r11)?;
                        a.movq(qword_ptr(rsi), xmm0)?;
                    }
                    2 => {
                        a.mov(rdx, rdi)?;
                        a.mov(rdi, rsi)?;
                        a.mov(rax, r11)?;
                        a.mov(ecx, 1i32)?;
                        a.rep().stosq()?;
                        a.mov(rdi, rdx)?;
                    }
                    _ => a.lock().inc(qword_ptr(rsi))?,
                }
                a.mov(qword_ptr(rdi), r11)?;
                a.xor(eax, eax)
            };
            let reader = |a: Assembler<'_>| {
                // Here RSI is what is stored last. How much older is what was stored first?
                a.mov(rdx, qword_ptr(rsi))?;
                a.mov(rax, qword_ptr(rdi))?;
                a.sub(rax, rdx)
            };
            let [_, ages] = run(variables, writer, reader);
            assert!(ages[1..].iter().all(|age| (*age as i64) >= 0), "kind {kind}");
        }
    }
}

#[test]
fn loads_of_one_place_do_not_go_back() {
    for variables in [DATA, BESIDE_CODE] {
        let reader = |a: Assembler<'_>| {
            a.mov(rdx, qword_ptr(rdi))?;
            a.mov(rax, qword_ptr(rdi))?;
            a.sub(rax, rdx)
        };
        let writer = |a: Assembler<'_>| store(a).and_then(|()| a.xor(eax, eax));
        let [_, steps] = run(variables, writer, reader);
        assert!(steps[1..].iter().all(|step| (*step as i64) >= 0));
    }
}

#[test]
fn loads_are_not_passed_by_later_stores() {
    for variables in [DATA, BESIDE_CODE] {
        let body = |a: Assembler<'_>| load(a).and_then(|()| store(a));
        let [x, y] = run(variables, body, body);
        // Round i saw store x[i] of the other one, which had loaded before: it cannot have seen store i.
        for (round, loaded) in x.iter().enumerate().skip(1) {
            let seen = *loaded as usize;
            assert!(y[seen] < round as u64, "{round}: {seen} {}", y[seen]);
        }
    }
}

#[test]
fn accesses_that_are_aligned_are_whole() {
    // Both halves of what is stored are the same.
    for variables in [DATA, BESIDE_CODE] {
        let writer = |a: Assembler<'_>| {
            a.mov(rax, r11)?;
            a.shl(rax, 32u32)?;
            a.or(rax, r11)?;
            a.mov(qword_ptr(rsi), rax)?;
            a.xor(eax, eax)
        };
        let reader = |a: Assembler<'_>| a.mov(rax, qword_ptr(rdi));
        let [_, values] = run(variables, writer, reader);
        assert!(values.iter().all(|value| value >> 32 == value & 0xffff_ffff));
    }
}
