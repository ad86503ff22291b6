//! From the bytes of a page to a block (invariants 1, 6 and 6a).

use iced_x86::{
    Decoder, DecoderError, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
};

use super::cache::key;
use super::stamp::CodeStamp;
use super::{Block, Selected, operands};
use crate::cpu::{Cpu, Mode};
use crate::fault::Fault;
use crate::host::inline::{self, Inline};
use crate::host::{self, HostFeatures};
use crate::jit::Registers;
use crate::mmu::{HostAddr, PageRef};
use crate::op::{Flow, Op};
use crate::{interp, sys};

/// Instructions in a block, at most: bounds the time to the next look at events.
const MAX_OPS: usize = 64;
/// Rounds of a loop that a block has, at most.
const MAX_ROUNDS: usize = 4;
/// Conditional jumps that translated code goes on behind in the same block, at most.
const MAX_BRANCHES: usize = 8;
/// Bytes looked at for one block, at most, and at first: most of them end before that.
const WINDOW: usize = 320;
const FIRST_LOOK: usize = 64;
/// Longest instruction (SDM vol. 2, 2.3.11).
const MAX_INSN: usize = 15;

/// Decoding of blocks, with the buffers it reuses.
#[derive(Debug)]
pub struct BlockDecoder {
    features: &'static HostFeatures,
    ops: Vec<Op>,
    /// Which of them are instructions.
    valid: Vec<bool>,
    /// Vector instructions, for translation.
    inlines: Vec<Option<Inline>>,
    inline: Option<Inline>,
    translating: bool,
    /// The last op ends its block.
    ends: bool,
    /// It is a conditional jump to the first one.
    loops: bool,
    /// Blocks end at stores, which may be to themselves and which nobody hears of; the last op is one.
    compared: bool,
    stores: bool,
    accesses: InstructionInfoFactory,
    /// The bytes of the run decoded last.
    source: Source,
    /// Lines about unknown instructions that may still be written.
    log_budget: u32,
}

/// Is what follows a conditional jump, at an offset in the page, to be in the same block?
pub type GoesOn<'a> = &'a dyn Fn(u16) -> bool;

/// The bytes that a block is made from: part of one page, or of two.
#[derive(Debug, Default)]
struct Source {
    bytes: Vec<u8>,
    /// How many of them were read, and were to be.
    len: usize,
    wanted: usize,
    host: Option<HostAddr>,
    second: Option<HostAddr>,
    again: Vec<u8>,
}

/// A run of instructions for translation.
#[derive(Debug)]
pub struct Run<'a> {
    pub ops: &'a [Op],
    /// Which of them are valid instructions.
    pub valid: &'a [bool],
    pub inlines: &'a [Option<Inline>],
    pub bytes: &'a [u8],
    /// The last op ends its block.
    pub ends: bool,
    /// The code is not watched: whoever keeps it compares it with the bytes.
    pub compared: bool,
    pub stamp: CodeStamp,
    /// The next page, if it is the run of a single instruction that crosses into it.
    pub second: Option<(HostAddr, CodeStamp)>,
}

impl Source {
    /// The same with the bytes at `host`, of an instruction that goes on at `second`, if that is a page.
    fn look_at(mut self, host: HostAddr, second: Option<HostAddr>) -> Self {
        self.bytes.resize(WINDOW, 0);
        self.again.resize(WINDOW, 0);
        (self.host, self.second, self.wanted) = (Some(host), second, FIRST_LOOK);
        self.len = read(host, second, FIRST_LOOK, &mut self.bytes);
        self
    }

    /// Looks at more bytes, if there are any.
    fn look_further(&mut self) -> bool {
        let Some(host) = self.host else { return false };
        if self.second.is_some() || self.len < self.wanted || self.wanted == WINDOW {
            return false;
        }
        self.wanted = WINDOW;
        self.len = read(host, None, WINDOW, &mut self.bytes);
        true
    }

    /// Are the first `len` bytes still the same?
    fn is_unchanged(&mut self, len: usize) -> bool {
        let Some(host) = self.host else { return false };
        read(host, self.second, len, &mut self.again);
        self.again[..len] == self.bytes[..len]
    }
}

/// Reads `wanted` bytes at `host`, less if that page ends before. Of an instruction that goes on at `second`, all that there may be.
fn read(host: HostAddr, second: Option<HostAddr>, wanted: usize, to: &mut [u8]) -> usize {
    let head = host.to_page_end();
    let Some(second) = second else {
        let head = head.min(wanted);
        host.copy_out(&mut to[..head]);
        return head;
    };
    let head = head.min(MAX_INSN);
    host.copy_out(&mut to[..head]);
    second.copy_out(&mut to[head..MAX_INSN]);
    MAX_INSN
}

impl BlockDecoder {
    pub fn new() -> Self {
        Self {
            features: HostFeatures::detect(),
            ops: Vec::with_capacity(MAX_OPS),
            valid: Vec::with_capacity(MAX_OPS),
            inlines: Vec::with_capacity(MAX_OPS),
            inline: None,
            translating: false,
            ends: false,
            loops: false,
            compared: false,
            stores: false,
            accesses: InstructionInfoFactory::new(),
            source: Source::default(),
            log_budget: 100,
        }
    }

    /// Decodes the run of 64-bit code at `host`, linear address `linear`, for translation: what lies in its page, or
    /// the instruction that crosses into the next one. Offsets are from the page's start. If it `goes_on`, it has what follows
    /// its conditional jumps, where that says so of the offset behind one, and a loop is there several times (neither if the page's
    /// code is compared). None: that is for the interpreter to look at (a page that cannot be fetched, an instruction that is
    /// too long, or one that crosses into or out of a page that is compared).
    pub fn decode_run(
        &mut self,
        cpu: &mut Cpu,
        linear: u64,
        host: HostAddr,
        goes_on: Option<GoesOn<'_>>,
    ) -> Option<Run<'_>> {
        let offset = host.addr() & 0xfff;
        let once = unwatched(cpu, host);
        let compared = once.is_some();
        let goes_on = goes_on.filter(|_| !compared);
        self.compared = compared;
        let mut source = std::mem::take(&mut self.source).look_at(host, None);
        let mut limit = MAX_OPS;
        let (len, stamp, second) = loop {
            self.translating = true;
            let len = self.run(&mut source, Mode::Code64, limit, offset, goes_on);
            self.translating = false;
            if len == 0 && source.second.is_none() {
                let second = cpu.fetch((linear | 0xfff).wrapping_add(1)).ok()?;
                if compared || unwatched(cpu, second).is_some() {
                    return None;
                }
                source = source.look_at(host, Some(second));
                limit = 1;
                continue;
            }
            if len == 0 {
                return None;
            }
            let head = host.to_page_end().min(len);
            let stamp = match once {
                Some(stamp) => stamp,
                None => watch(cpu, host, head)?,
            };
            let second = match source.second {
                Some(next) if len > head => Some((next, watch(cpu, next, len - head)?)),
                _ => None,
            };
            if source.is_unchanged(len) {
                break (len, stamp, second);
            }
            source = source.look_at(host, second.map(|(next, _)| next));
        };
        self.source = source;
        if goes_on.is_some() && self.loops {
            self.unroll();
        }
        Some(Run {
            ops: &self.ops,
            valid: &self.valid,
            inlines: &self.inlines,
            bytes: &self.source.bytes[..len],
            ends: self.ends,
            compared,
            stamp,
            second,
        })
    }

    /// Several rounds of the loop that the run is.
    fn unroll(&mut self) {
        let len = self.ops.len();
        for _ in 1..(MAX_OPS / len).min(MAX_ROUNDS) {
            self.ops.extend_from_within(..len);
            self.valid.extend_from_within(..len);
            self.inlines.extend_from_within(..len);
        }
    }

    /// The ops of the block decoded last.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Decodes the block at `host`, which is at linear address `linear`. Its [ops](Self::ops) are there until the next one.
    ///
    /// # Errors
    /// The faults of fetching the second page of an instruction that crosses.
    pub fn decode(
        &mut self,
        cpu: &mut Cpu,
        linear: u64,
        host: HostAddr,
        single: bool,
    ) -> Result<Block, Fault> {
        let limit = if single { 1 } else { MAX_OPS };
        self.compared = unwatched(cpu, host).is_some();
        let mut source = std::mem::take(&mut self.source).look_at(host, None);
        loop {
            let mut len = self.run(&mut source, cpu.mode, limit, 0, None);
            if len == 0 && source.second.is_none() {
                // Not even one instruction in this page.
                let second = cpu.fetch((linear | 0xfff).wrapping_add(1))?;
                source = source.look_at(host, Some(second));
                len = self.run(&mut source, cpu.mode, 1, 0, None);
            }
            if len == 0 {
                // Too long for an instruction.
                self.ops.clear();
                self.ops.push(undefined_op(too_long));
                len = MAX_INSN;
            }
            if let Some(block) = self.publish(cpu, &mut source, len, single) {
                self.source = source;
                return Ok(block);
            }
            source = source.look_at(host, None);
        }
    }

    /// Watches the pages, makes sure that the bytes are still the ones decoded, and makes the block.
    fn publish(
        &mut self,
        cpu: &mut Cpu,
        source: &mut Source,
        len: usize,
        single: bool,
    ) -> Option<Block> {
        let start = source.host?;
        let head = start.to_page_end().min(len);
        let mut stamp = |host, len, compared: bool| {
            // What is compared is good for once: it is decoded each time that it runs.
            if compared { Some(CodeStamp::never()) } else { watch(cpu, host, len) }
        };
        let first = stamp(start, head, self.compared)?;
        let second = match source.second {
            Some(host) if len > head => {
                Some((host.addr(), stamp(host, len - head, self.compared)?))
            }
            _ => None,
        };
        if !source.is_unchanged(len) {
            return None;
        }
        Some(Block {
            key: key(start, cpu.mode, single),
            first,
            second,
            len: len as u16,
            count: self.ops.len() as u16,
        })
    }

    /// Decodes up to `limit` instructions into `ops`, as if they were at address `base`. Returns the bytes used.
    fn run(
        &mut self,
        source: &mut Source,
        mode: Mode,
        limit: usize,
        base: u64,
        goes_on: Option<GoesOn<'_>>,
    ) -> usize {
        let used = self.run_over(source, mode, limit, base, goes_on);
        if !self.ends && !self.stores && self.ops.len() < limit && source.look_further() {
            return self.run_over(source, mode, limit, base, goes_on);
        }
        used
    }

    /// The same with the bytes that there are.
    fn run_over(
        &mut self,
        source: &Source,
        mode: Mode,
        limit: usize,
        base: u64,
        goes_on: Option<GoesOn<'_>>,
    ) -> usize {
        self.ops.clear();
        self.valid.clear();
        self.inlines.clear();
        (self.ends, self.loops, self.stores) = (false, false, false);
        let bits = match mode {
            Mode::Code64 => 64,
            Mode::Code32 => 32,
            Mode::Code16 | Mode::Real => 16,
        };
        let bytes = &source.bytes[..source.len];
        let mut decoder = Decoder::with_ip(bits, bytes, base, DecoderOptions::NONE);
        let mut insn = Instruction::default();
        let mut used = 0;
        let mut sti = false;
        let mut branches = 0;
        while self.ops.len() < limit && decoder.can_decode() {
            decoder.decode_out(&mut insn);
            if insn.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                break;
            }
            let end = decoder.position();
            let mut op = undefined_op(undefined);
            (op.start, op.end) = (base as u16 + used as u16, base as u16 + end as u16);
            self.ends = self.select(&insn, mode, &mut op, &bytes[used..end]);
            sti = insn.mnemonic() == Mnemonic::Sti;
            let branch = insn.is_jcc_short_or_near();
            self.loops = branch && insn.near_branch_target() == base;
            if branch && !self.loops && branches < MAX_BRANCHES {
                self.ends = !goes_on.is_some_and(|goes_on| goes_on(op.end));
                branches += 1;
            }
            self.ops.push(op);
            self.valid.push(!insn.is_invalid());
            self.inlines.push(self.inline.take());
            used = end;
            self.stores = self.compared && writes(&mut self.accesses, &insn);
            if self.ends || self.stores {
                break;
            }
        }
        if sti && let Some(last) = self.ops.last_mut() {
            last.aux = sys::STI_LAST;
        }
        used
    }

    fn select(&mut self, insn: &Instruction, mode: Mode, op: &mut Op, bytes: &[u8]) -> bool {
        if insn.is_invalid() {
            if bytes.len() >= MAX_INSN {
                op.handler = too_long;
                return true;
            }
            self.unknown(bytes);
            return true;
        }
        operands::fill(insn, mode, op);
        if let Some(Selected { handler, ends }) = interp::select(insn, mode, op) {
            op.handler = handler;
            return ends;
        }
        if let Some(found) = sys::decode(insn) {
            op.handler = found.handler;
            op.imm = found.imm;
            op.dst = found.dst;
            op.src = found.src;
            op.aux = found.aux;
            return found.ends_block;
        }
        if let Some(found) = host::decode(insn, mode, self.features) {
            op.handler = found.handler;
            op.imm = found.imm;
            op.extra = found.extra;
            op.dst = found.dst;
            op.src = found.src;
            op.aux = found.aux;
            if self.translating {
                self.inline = inline::make(insn, self.features, &Registers);
            }
            return false;
        }
        self.unknown(bytes);
        op.handler = undefined;
        true
    }

    fn unknown(&mut self, bytes: &[u8]) {
        if self.log_budget > 0 {
            self.log_budget -= 1;
            tracing::warn!("unknown instruction {bytes:02x?}: the guest gets #UD");
        }
    }
}

/// What the page of `host` is now, if its code is compared.
fn unwatched(cpu: &Cpu, host: HostAddr) -> Option<CodeStamp> {
    let record = cpu.mmu.phys().code_at(host.addr())?;
    // SAFETY: the record lives as long as `phys`, which the block cache keeps.
    record.is_compared().then(|| unsafe { CodeStamp::new(record, record.generation()) })
}

/// Does an instruction store to memory, perhaps?
fn writes(accesses: &mut InstructionInfoFactory, insn: &Instruction) -> bool {
    let used = accesses.info(insn).used_memory().iter();
    let reads = |access| matches!(access, OpAccess::None | OpAccess::Read | OpAccess::CondRead);
    used.map(|memory| memory.access()).any(|access| !reads(access))
}

/// Watches `len` bytes of code at `host`; no fast store to their page is left afterwards.
fn watch(cpu: &mut Cpu, host: HostAddr, len: usize) -> Option<CodeStamp> {
    let phys = cpu.mmu.phys().clone();
    let page: PageRef = phys.page_of_host(host)?;
    let offset = (host.addr() & 0xfff) as usize;
    let (generation, drop_own) = phys.watch(page, offset, len, cpu.mmu.index);
    if drop_own {
        cpu.mmu.obey_requests();
    }
    let record = phys.code_page(page)?;
    // SAFETY: the record lives as long as `phys`, which the block cache keeps.
    Some(unsafe { CodeStamp::new(record, generation) })
}

pub(super) fn undefined_op(handler: crate::op::Handler) -> Op {
    Op {
        handler,
        imm: 0,
        disp: 0,
        start: 0,
        end: 0,
        dst: 0,
        src: 0,
        base: crate::op::reg::ZERO,
        index: crate::op::reg::ZERO,
        scale: 0,
        seg: crate::cpu::seg::FLAT as u8,
        flags: 0,
        aux: 0,
        extra: 0,
    }
}

fn undefined(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    cpu.raise(Fault::UD)
}

fn too_long(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    cpu.raise(Fault::GP0)
}
