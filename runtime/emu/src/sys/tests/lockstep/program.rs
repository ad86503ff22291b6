//! A random program: where it starts, and its steps.

use std::fmt::Write as _;

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

use super::emit::Emitter;
use super::machine::*;
use super::steps::{Point, Step, functions};
use crate::sys::bits::cr4;

/// Xorshift: the same sequence each time.
pub struct Random(u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }

    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A page-table entry of the window.
    pub fn window_entry(&mut self) -> u64 {
        let frame = match self.below(12) {
            0 => DEVICE,
            1 => HOLE,
            _ => FRAMES + self.below(FRAME_COUNT) * 4096,
        };
        let present = u64::from(!self.once_in(4));
        frame | present | (self.next() & 0x66) | if self.once_in(4) { 1 << 63 } else { 0 }
    }

    fn value(&mut self) -> u64 {
        match self.below(4) {
            0 => self.below(16),
            1 => WINDOW + self.below(WINDOW_PAGES * 4096),
            2 => self.below(64).wrapping_neg(),
            _ => self.next(),
        }
    }
}

/// Everything about a program.
#[derive(Clone)]
pub struct Program {
    pub steps: Vec<Step>,
    pub gpr: [u64; 16],
    /// The window's entries in both address spaces.
    pub window: [[u64; WINDOW_PAGES as usize]; 2],
    pub pcids: bool,
    /// SMEP, SMAP.
    pub cr4: u64,
    pub start: usize,
    user_start: usize,
    base: u8,
    pub rounds: u64,
}

impl Program {
    pub fn random(seed: u64) -> Self {
        let mut random = Random(seed);
        random.next();
        let count = 10 + random.below(50);
        let mut program = Self {
            steps: Vec::new(),
            gpr: std::array::from_fn(|_| random.value()),
            window: std::array::from_fn(|_| std::array::from_fn(|_| random.window_entry())),
            pcids: random.once_in(2),
            cr4: random.pick(&[0, cr4::SMEP, cr4::SMAP, cr4::SMEP | cr4::SMAP]),
            // Often just before the end of a page.
            start: random.pick(&[0, 0x40, 0xf80, 0xff3]),
            user_start: random.pick(&[0, 0xfe0, 0xff9]),
            base: random.below(3) as u8,
            rounds: 1 + random.below(4),
        };
        for _ in 0..count {
            program.steps.push(Step::random(&mut random, false, 2));
        }
        program
    }

    /// The linear address at which it starts.
    pub fn base(&self) -> u64 {
        [PROGRAM, LOW_CODE, HIGH_CODE][usize::from(self.base)]
    }

    pub fn emit(&self, places: &Places) -> Emitter {
        // Twice: steps refer to points behind them.
        let (first, points) = self.emit_with(places, &[]);
        let (second, again) = self.emit_with(places, &points);
        assert!(first.at == second.at && points == again, "code of another length");
        second
    }

    fn emit_with(&self, places: &Places, known: &[Point]) -> (Emitter, Vec<Point>) {
        let mut code = Emitter::new(self.start, self.user_start);
        let mut points = Vec::new();
        for step in &self.steps {
            if !code.has_room() {
                break;
            }
            step.emit(&mut code, places, known, &mut points, self.pcids);
        }
        // dec qword [ROUND]; jnz start
        code.asm(|a| a.dec(iced_x86::code_asm::qword_ptr(ROUND as u32)));
        let back = self.start as i64 - (code.at as i64 + 6);
        let mut jump = vec![0x0f, 0x85];
        jump.extend((back as i32).to_le_bytes());
        code.raw(&jump);
        code.jump(END);
        functions(&mut code);
        (code, points)
    }

    /// The same code with other immediates, for pages of code that are mapped elsewhere.
    pub fn copy_of(&self, code: &Emitter) -> Vec<u8> {
        let mut bytes = code.bytes.clone();
        for offset in 0..bytes.len() - 5 {
            // mov ebx, imm32 of the points.
            let mark = [0xbb, 0x55, 0x11];
            if code.next[offset] as usize == offset + 5 && bytes[offset..offset + 3] == mark {
                bytes[offset + 1] = 0x56;
            }
        }
        bytes
    }

    pub fn describe(&self) -> String {
        let mut text = format!(
            "pcids {} cr4 {:#x} base {:#x} rounds {} start {:#x}\ngpr {:x?}\nwindow {:x?}\n",
            self.pcids,
            self.cr4,
            self.base(),
            self.rounds,
            self.start,
            self.gpr,
            self.window
        );
        for step in &self.steps {
            let _ = writeln!(text, "{step:x?}");
        }
        let places = Places {
            tops: [0x2_0000, 0],
            window: [0; 2],
            window_large: [0; 2],
            low_code: [0; 2],
            high_code: 0,
        };
        let code = self.emit(&places);
        let mut formatter = IntelFormatter::new();
        for start in [self.start, USER_PART + self.user_start] {
            let mut at = start;
            while at < END && code.next[at] as usize != END
                || at > USER_PART && code.next[at] as usize > at
            {
                let mut decoder =
                    Decoder::with_ip(64, &code.bytes[at..], at as u64, DecoderOptions::NONE);
                let mut line = String::new();
                formatter.format(&decoder.decode(), &mut line);
                let _ = writeln!(text, "{at:#06x} {line}");
                at = code.next[at] as usize;
            }
        }
        text
    }
}
