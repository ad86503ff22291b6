//! Where blocks are entered (J4, J9), bridges (J15), and blocks that compare their code (J22).
//!
//! A block is made for flags in memory or for native ones, whichever suits what it does first, and has an entry for both: the
//! one that is (as far as is known) used most lies right before it, the other one out of the way.

use super::asm::host::{RAX, RCX};
use super::asm::{Code, Ea, Rm};
use super::layout::{self, CC};
use super::plan::{ALL, Flags, Kind, Mem};
use super::spans::Role;
use super::translate::{At, Cold, Input, Translator};

/// A translated block, by offsets in the arena.
#[derive(Debug, Clone, Copy, Default)]
pub struct Entries {
    /// Entry M.
    pub memory: u32,
    /// Entry N.
    pub native: u32,
    /// Of a bridge: entry M for those who know that the right page follows.
    pub checked: u32,
}

/// The entry that is used less.
#[derive(Debug, Clone, Copy)]
pub(super) struct OtherEntry {
    at: At,
    live: Flags,
    /// Where the block itself starts, and where flags are there.
    body: usize,
    wanted: At,
}

/// Bytes of the look at the run word, by which the entries of blocks begin, but for bridges.
pub const LOOK: u32 = 8;

impl Translator {
    /// Starts the block with the entry that is used most. `live` flags are in use.
    pub(super) fn entry(&mut self, start: u16, live: Flags, input: &Input<'_>) {
        // What has become of code that has changed may use any of them.
        let live = if input.compared.is_some() { ALL } else { live };
        let wanted = match input.compared {
            Some(_) => At::Memory,
            None if live == 0 => At::Native,
            None => self.wanted(),
        };
        // Its own jump back has native flags.
        let last = self.plans.last().zip(input.ops.last());
        let loops = last.is_some_and(|(plan, op)| {
            matches!(plan.kind, Kind::Branch { .. }) && op.imm == u64::from(start)
        });
        let native = input.native || loops;
        let (first, other) =
            if native { (At::Native, At::Memory) } else { (At::Memory, At::Native) };
        self.enter(start, first, wanted, live);
        let body = self.asm.here();
        self.cold.push(Cold::Entry(OtherEntry { at: other, live, body, wanted }));
        if self.counts() {
            // Flags may be in use.
            self.asm.load(RCX, Ea::cpu(layout::COUNTED_BLOCKS));
            self.asm.lea(RCX, Ea::at(RCX, 1));
            self.asm.store(Ea::cpu(layout::COUNTED_BLOCKS), RCX);
        }
        self.at = Some(wanted);
        if let Some(host) = input.compared {
            self.compare_code(host, input.bytes);
        }
    }

    /// Leaves if the code at `host` is not the `bytes` that the block is made of. Flags are in memory.
    fn compare_code(&mut self, host: u64, bytes: &[u8]) {
        self.asm.mov_imm64(RAX, host);
        let differs = |translator: &mut Self| {
            let jump = translator.asm.jcc(5);
            let stub = translator.stubs.exit_changed;
            translator.cold.push(Cold::Leave { jump, stub });
        };
        let (eights, rest) = bytes.as_chunks::<8>();
        let mut at = Ea::at(RAX, 0);
        for part in eights {
            self.asm.mov_imm64(RCX, u64::from_le_bytes(*part));
            self.asm.op(Code::wide(0x3b), RCX, Rm::Mem(at));
            differs(self);
            at.disp += 8;
        }
        let (fours, rest) = rest.as_chunks::<4>();
        for part in fours {
            self.asm.op_digit(Code::one(0x81), 7, Rm::Mem(at));
            self.asm.imm32(i32::from_le_bytes(*part));
            differs(self);
            at.disp += 4;
        }
        for byte in rest {
            self.asm.op_digit(Code::one(0x80), 7, Rm::Mem(at));
            self.asm.byte(*byte);
            differs(self);
            at.disp += 1;
        }
    }

    /// Makes the other one.
    pub(super) fn other_entry(&mut self, other: OtherEntry) {
        self.enter(self.start, other.at, other.wanted, other.live);
        self.asm.jmp_to(other.body);
    }

    /// The way out for an event, and the entry for flags that are `at` one place and `wanted` at another.
    fn enter(&mut self, start: u16, at: At, wanted: At, live: Flags) {
        let native = at == At::Native;
        let stub = if native { self.stubs.exit_event_native } else { self.stubs.exit_event };
        let leave = self.leave_for_event(start, stub);
        let entry = self.asm.place(self.asm.here()) as u32;
        if native {
            self.entries.native = entry;
        } else {
            (self.entries.memory, self.entries.checked) = (entry, entry);
        }
        self.check_run(leave);
        match (at, wanted) {
            _ if live == 0 => {}
            (At::Memory, At::Native) => self.asm.restore_flags(CC),
            (At::Native, At::Memory) => self.asm.save_flags(CC),
            _ => {}
        }
    }

    /// Where the flags are best at the start: in memory, if something destroys EFLAGS before an instruction uses them.
    fn wanted(&self) -> At {
        let first = self.plans.iter().enumerate().find_map(|(i, plan)| {
            let probes =
                plan.mem != Mem::None && !matches!(self.spans.role(i), Role::Member { .. });
            match plan.kind {
                _ if probes => Some(At::Memory),
                Kind::Branch { .. } | Kind::Jump => Some(At::Native),
                Kind::Call | Kind::Vector | Kind::System(_) => Some(At::Memory),
                _ if plan.transfers() => Some(At::Memory),
                _ if plan.sets || plan.reads != 0 => Some(At::Native),
                _ => None,
            }
        });
        first.unwrap_or(At::Native)
    }

    /// Where the block at `start` is left for an event.
    fn leave_for_event(&mut self, start: u16, stub: u32) -> usize {
        let leave = self.asm.here();
        self.asm.mov_ecx(start.into());
        self.asm.far(0xe9, stub);
        leave
    }

    /// The entries of a block whose instruction crosses into the page at host address `next` (J15): they look whether
    /// that is what follows. Flags are in memory then.
    pub(super) fn bridge_entry(&mut self, start: u16, next: u64) {
        let leave = self.leave_for_event(start, self.stubs.exit_event);
        let native = self.asm.here();
        self.asm.save_flags(CC);
        let memory = self.asm.here();
        self.check_run(leave);
        self.at = Some(At::Memory);
        for jump in self.compare_next_page(next) {
            self.cold.push(Cold::Leave { jump, stub: self.stubs.exit_bridge });
        }
        let checked = self.asm.here();
        self.count(layout::COUNTED_BLOCKS);
        let [memory, native, checked] =
            [memory, native, checked].map(|at| self.asm.place(at) as u32);
        self.entries = Entries { memory, native, checked };
    }

    /// Leaves if the run word is zero. Keeps the flags.
    fn check_run(&mut self, leave: usize) {
        let start = self.asm.here();
        self.asm.load(RCX, Ea::cpu(layout::RUN));
        self.asm.op(Code::one(0x8b), RCX, Rm::Mem(Ea::at(RCX, 0)));
        // jrcxz
        let distance = leave as i64 - (self.asm.here() as i64 + 2);
        self.asm.bytes(&[0xe3, distance as i8 as u8]);
        // Links count on it.
        assert_eq!(self.asm.here() - start, LOOK as usize, "the look at the run word");
    }
}
