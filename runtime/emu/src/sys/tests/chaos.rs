//! Kernels gone mad: random system instructions with odd operands, in every mode. The engine may tell the guest what it
//! likes, but it neither panics nor hangs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mvm_engine::{Vcpu, VmExit};

use crate::cpu::seg;
use crate::testing::guest::{CODE, DATA, GDT, Guest, IDT, PD, STACK, TSS, USER, sel};

/// Xorshift: the same sequence each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn value(&mut self) -> u64 {
        const PLACES: &[u64] = &[
            DATA,
            CODE,
            STACK,
            GDT,
            IDT,
            TSS,
            PD,
            USER,
            0,
            u64::MAX,
            1 << 47,
            16 << 20,
            0xfee0_0000,
        ];
        const MSRS: &[u64] = &[
            0x10,
            0x1b,
            0x3b,
            0x174,
            0x175,
            0x176,
            0x1a0,
            0x277,
            0x6e0,
            0x800,
            0x808,
            0x80b,
            0x80f,
            0x828,
            0x830,
            0x832,
            0x838,
            0x83e,
            0x83f,
            0xc000_0080,
            0xc000_0081,
            0xc000_0082,
            0xc000_0100,
            0xc000_0102,
            0xc000_0103,
            0x4b56_4d00,
            0x4b56_4d01,
            0x4b56_4d03,
        ];
        match self.below(6) {
            0 => self.pick(PLACES),
            1 => self.pick(PLACES).wrapping_add(self.below(32)).wrapping_sub(16),
            2 => self.pick(MSRS),
            3 => 1 << self.below(64),
            4 => self.below(0x100),
            _ => self.next(),
        }
    }

    /// An instruction or something like it.
    fn instruction(&mut self, code: &mut Vec<u8>) {
        if self.below(4) == 0 {
            code.push(self.pick(&[0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x48, 0x64, 0x2e, 0x41]));
        }
        let modrm = self.next() as u8;
        match self.below(12) {
            // Groups 6 and 7, control and debug registers, MSRs, CPUID, table loads.
            0 | 1 => {
                code.extend([0x0f, self.pick(&[0x00, 0x01, 0x01, 0x20, 0x21, 0x22, 0x23]), modrm])
            }
            2 => code.extend([
                0x0f,
                self.pick(&[0x30, 0x32, 0x31, 0xa2, 0x05, 0x07, 0x34, 0x35, 0x06, 0x08, 0x09]),
            ]),
            3 => code.extend([0x0f, self.pick(&[0x02, 0x03, 0xb2, 0xb4, 0xb5, 0xae, 0xc7]), modrm]),
            4 => code.extend([self.pick(&[0x8e, 0x8c, 0x62, 0x63, 0xff, 0xc4, 0xc5]), modrm]),
            5 => code.push(self.pick(&[
                0xcf, 0xcb, 0xcc, 0xf1, 0xce, 0x9c, 0x9d, 0xfa, 0xfb, 0xf4, 0xc9, 0x60, 0x61,
            ])),
            6 => {
                code.push(self.pick(&[
                    0x6c, 0x6d, 0x6e, 0x6f, 0xa4, 0xa5, 0xaa, 0xab, 0xec, 0xed, 0xee, 0xef,
                ]))
            }
            7 => code.extend([self.pick(&[0xcd, 0xe4, 0xe5, 0xe6, 0xe7]), modrm]),
            8 => code.push(
                self.pick(&[0x06, 0x07, 0x16, 0x17, 0x1e, 0x1f, 0x0e, 0x50, 0x58, 0x54, 0x5c]),
            ),
            9 => code.extend([
                self.pick(&[0xea, 0x9a, 0xca, 0xc8]),
                modrm,
                self.next() as u8,
                0,
                0,
                self.pick(&[8, 0x30, 0x38, 0x40]),
            ]),
            10 => code.extend([0x0f, self.next() as u8, modrm, self.next() as u8]),
            _ => code.extend(self.next().to_le_bytes()),
        }
    }
}

#[test]
fn random_system_code_neither_panics_nor_hangs() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..24 {
        let mut guest = match round % 4 {
            0 | 1 => Guest::new(),
            2 => Guest::new_32(),
            _ => Guest::real(),
        };
        if round % 2 == 0 {
            // Faults are returned from, past the instruction.
            for vector in 0..32 {
                if round % 4 < 2 {
                    guest.handler(vector, &[0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf]);
                }
            }
        }
        let over = Arc::new(AtomicBool::new(false));
        let (stop, kick) = (over.clone(), guest.vcpu.kicker());
        let kicker = std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                kick.kick();
                std::thread::yield_now();
            }
        });
        let good = guest.vcpu.state().expect("a state");
        for _ in 0..40 {
            let mut code = Vec::new();
            while code.len() < 48 {
                random.instruction(&mut code);
            }
            let user = round % 4 == 1 && random.below(2) == 0;
            guest.put(if user { crate::testing::guest::USER_GPA } else { CODE }, &code);
            guest.vcpu.set_state(&good).expect("its own state");
            if user {
                guest.user(sel::USER64);
            }
            let cpu = guest.cpu();
            cpu.rip = if user { USER } else { CODE };
            for register in (0..16).filter(|r| *r != 4) {
                cpu.gpr[register] = random.value();
            }
            if random.below(8) == 0 {
                cpu.set_rflags(random.below(1 << 17) & !(1 << 17));
                cpu.sys.dr = std::array::from_fn(|_| random.value());
                cpu.sys.dr7 = random.next() & 0xffff_03ff | 0x400;
            }
            if random.below(8) == 0 {
                cpu.seg[seg::DS].limit = random.next() as u32;
            }
            for _ in 0..4 {
                match guest.vcpu.run().expect("the host does not fail") {
                    VmExit::Kicked => {}
                    VmExit::InternalError(fault) => panic!("{fault} after {code:02x?}"),
                    VmExit::HaltedForever | VmExit::TripleFault(_) => break,
                }
            }
        }
        over.store(true, Ordering::SeqCst);
        kicker.join().expect("the kicker");
    }
}
