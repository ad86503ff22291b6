//! From the bytes of a page to a block (invariants 1 and 6).

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

use super::cache::key;
use super::stamp::CodeStamp;
use super::{Block, Selected, operands};
use crate::cpu::{Cpu, Mode};
use crate::fault::Fault;
use crate::host::{self, HostFeatures};
use crate::mmu::{HostAddr, PageRef};
use crate::op::{Flow, Op};
use crate::{interp, sys};

/// Instructions in a block, at most: bounds the time to the next look at events.
const MAX_OPS: usize = 64;
/// Bytes looked at for one block.
const WINDOW: usize = 320;
/// Longest instruction (SDM vol. 2, 2.3.11).
const MAX_INSN: usize = 15;

/// Decoding of blocks, with the buffers it reuses.
#[derive(Debug)]
pub struct BlockDecoder {
    features: &'static HostFeatures,
    ops: Vec<Op>,
    /// Lines about unknown instructions that may still be written.
    log_budget: u32,
}

/// The bytes that a block is made from: part of one page, or of two.
struct Source {
    bytes: [u8; WINDOW],
    len: usize,
    host: HostAddr,
    second: Option<HostAddr>,
}

impl Source {
    fn first_page(host: HostAddr) -> Self {
        let mut source = Self { bytes: [0; WINDOW], len: 0, host, second: None };
        source.len = source.read();
        source
    }

    fn two_pages(host: HostAddr, second: HostAddr) -> Self {
        let mut source = Self { bytes: [0; WINDOW], len: 0, host, second: Some(second) };
        source.len = source.read();
        source
    }

    fn read(&mut self) -> usize {
        let head = self.host.to_page_end().min(WINDOW);
        let Some(second) = self.second else {
            self.host.copy_out(&mut self.bytes[..head]);
            return head;
        };
        let head = head.min(MAX_INSN);
        self.host.copy_out(&mut self.bytes[..head]);
        second.copy_out(&mut self.bytes[head..MAX_INSN]);
        MAX_INSN
    }
}

impl BlockDecoder {
    pub fn new() -> Self {
        Self { features: HostFeatures::detect(), ops: Vec::with_capacity(MAX_OPS), log_budget: 100 }
    }

    /// Decodes the block at `host`, which is at linear address `linear`.
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
        let mut source = Source::first_page(host);
        loop {
            let mut len = self.run(&source, cpu.mode, limit);
            if len == 0 && source.second.is_none() {
                // Not even one instruction in this page.
                let second = cpu.fetch((linear | 0xfff).wrapping_add(1))?;
                source = Source::two_pages(host, second);
                len = self.run(&source, cpu.mode, 1);
            }
            if len == 0 {
                // Too long for an instruction.
                self.ops.clear();
                self.ops.push(undefined_op(too_long));
                len = MAX_INSN;
            }
            let Some(block) = self.publish(cpu, &mut source, len, single) else { continue };
            return Ok(block);
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
        let head = source.host.to_page_end().min(len);
        let first = watch(cpu, source.host, head)?;
        let second = match source.second {
            Some(host) if len > head => Some((host.addr(), watch(cpu, host, len - head)?)),
            _ => None,
        };
        let seen = source.bytes;
        source.len = source.read();
        if seen[..len] != source.bytes[..len] {
            return None;
        }
        Some(Block {
            ops: self.ops.as_slice().into(),
            key: key(source.host, cpu.mode, single),
            first,
            second,
            len: len as u16,
            count: self.ops.len() as u16,
        })
    }

    /// Decodes up to `limit` instructions into `ops`. Returns the bytes used.
    fn run(&mut self, source: &Source, mode: Mode, limit: usize) -> usize {
        self.ops.clear();
        let bits = match mode {
            Mode::Code64 => 64,
            Mode::Code32 => 32,
            Mode::Code16 | Mode::Real => 16,
        };
        let bytes = &source.bytes[..source.len];
        let mut decoder = Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE);
        let mut insn = Instruction::default();
        let mut used = 0;
        while self.ops.len() < limit && decoder.can_decode() {
            decoder.decode_out(&mut insn);
            if insn.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                break;
            }
            let end = decoder.position();
            let mut op = undefined_op(undefined);
            (op.start, op.end) = (used as u16, end as u16);
            let ends = self.select(&insn, mode, &mut op, &bytes[used..end]);
            self.ops.push(op);
            used = end;
            if ends {
                break;
            }
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

fn undefined_op(handler: crate::op::Handler) -> Op {
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
