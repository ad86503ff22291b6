//! The loop that runs blocks.

use std::sync::Arc;

use super::Block;
use super::cache::{BlockCache, CAPACITY, CAPACITY_BESIDE_TRANSLATOR, key};
use super::decode::BlockDecoder;
use crate::cpu::{Cpu, Mode, seg};
use crate::fault::Fault;
use crate::jit::{Jit, Ran, Store};
use crate::mmu::HostAddr;
use crate::op::{Flow, Op, reg};

/// Why the loop gave control back. [`Cpu::rip`] is exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The attention word is set.
    Attention,
    /// [`Cpu::fault`] is to be delivered.
    Fault,
    /// HLT was executed.
    Halt,
    /// One instruction was executed, as asked for.
    Stepped,
    /// An op ended its block so that the surroundings are looked at: the interrupt shadow, TF.
    Look,
}

/// Runs blocks on a [`Cpu`].
#[derive(Debug)]
pub struct Dispatcher {
    cache: BlockCache,
    decoder: BlockDecoder,
    jit: Option<Box<Jit>>,
    /// Instructions executed.
    pub instructions: u64,
    blocks: u32,
}

/// Blocks between two looks at the APIC timer's deadline.
const TIMER_INTERVAL: u32 = 256;

const BLOCK: usize = reg::BLOCK as usize;

impl Dispatcher {
    /// A dispatcher with an empty cache for one vCPU.
    pub fn new(cpu: &Cpu) -> Self {
        Self::with_capacity(cpu, CAPACITY)
    }

    fn with_capacity(cpu: &Cpu, capacity: usize) -> Self {
        Self {
            cache: BlockCache::new(cpu.mmu.phys().clone(), capacity),
            decoder: BlockDecoder::new(),
            jit: None,
            instructions: 0,
            blocks: 0,
        }
    }

    /// The same, which executes translated code from `store`, and puts such to it.
    pub fn translating(cpu: &mut Cpu, store: Arc<Store>) -> Self {
        let jit = Some(Box::new(Jit::new(cpu, store)));
        cpu.mmu.phys().want_changed_code(cpu.mmu.index);
        Self { jit, ..Self::with_capacity(cpu, CAPACITY_BESIDE_TRANSLATOR) }
    }

    /// Nothing is executed for a while.
    pub fn rest(&mut self) {
        if let Some(jit) = &mut self.jit {
            jit.rest();
        }
    }

    /// Others cannot make code anew before this vCPU has left what there is, even if it executes none of it: steps, or code of
    /// 16 and 32 bits. Who ends an epoch raises its attention.
    #[inline]
    fn leave_what_is_over(&mut self) {
        if let Some(jit) = &mut self.jit
            && jit.is_over()
        {
            jit.rest();
        }
    }

    /// The translator, if there is one.
    pub fn jit(&self) -> Option<&Jit> {
        self.jit.as_deref()
    }

    /// The translator, if there is one.
    #[cfg(test)]
    pub(crate) fn jit_mut(&mut self) -> Option<&mut Jit> {
        self.jit.as_deref_mut()
    }

    /// The cache, for metrics.
    pub fn cache(&self) -> &BlockCache {
        &self.cache
    }

    /// Runs until something is to be done outside.
    pub fn run(&mut self, cpu: &mut Cpu) -> Stop {
        self.leave_what_is_over();
        loop {
            if cpu.sys.attention().any() {
                if let Some(jit) = &mut self.jit {
                    jit.note_event();
                }
                return Stop::Attention;
            }
            if cpu.stepping() {
                return Stop::Look;
            }
            if let Some(jit) = &mut self.jit
                && cpu.mode == Mode::Code64
            {
                match jit.run(cpu, &mut self.decoder) {
                    Ran::Code(None) => continue,
                    Ran::Code(Some(stop)) => return stop,
                    Ran::Interpret => {}
                }
            }
            self.blocks = self.blocks.wrapping_add(1);
            if self.blocks.is_multiple_of(TIMER_INTERVAL) {
                cpu.poll_timer();
            }
            let (block, ops) = match find(&mut self.cache, &mut self.decoder, cpu, false) {
                Ok(found) => found,
                Err(fault) => {
                    cpu.fault = Some(fault);
                    return Stop::Fault;
                }
            };
            self.instructions += u64::from(block.count);
            if let Some(stop) = execute(cpu, block, ops) {
                return stop;
            }
        }
    }

    /// Runs one instruction.
    pub fn step(&mut self, cpu: &mut Cpu) -> Stop {
        self.leave_what_is_over();
        let (block, ops) = match find(&mut self.cache, &mut self.decoder, cpu, true) {
            Ok(found) => found,
            Err(fault) => {
                cpu.fault = Some(fault);
                return Stop::Fault;
            }
        };
        self.instructions += 1;
        match execute(cpu, block, ops) {
            None | Some(Stop::Look) => Stop::Stepped,
            Some(stop) => stop,
        }
    }
}

/// Runs a block to its end. `None`: go on at [`Cpu::rip`].
#[inline(always)]
fn execute(cpu: &mut Cpu, block: &Block, ops: &[Op]) -> Option<Stop> {
    let start = cpu.rip;
    cpu.gpr[BLOCK] = start;
    for op in ops {
        match (op.handler)(cpu, op, block) {
            Flow::Next => {}
            Flow::Jump => return None,
            Flow::Break => {
                cpu.rip = next(cpu, start, op.end);
                return Some(Stop::Look);
            }
            Flow::Fault => {
                cpu.rip = start.wrapping_add(op.start.into());
                return Some(Stop::Fault);
            }
            Flow::Again => {
                cpu.rip = start.wrapping_add(op.start.into());
                return None;
            }
            Flow::Halt => {
                cpu.rip = next(cpu, start, op.end);
                return Some(Stop::Halt);
            }
        }
    }
    cpu.rip = next(cpu, start, block.len);
    None
}

/// The instruction pointer `offset` bytes on.
#[inline(always)]
fn next(cpu: &Cpu, start: u64, offset: u16) -> u64 {
    let rip = start.wrapping_add(offset.into());
    if cpu.mode == Mode::Code64 { rip } else { rip & 0xffff_ffff }
}

/// The block at [`Cpu::rip`], and its ops.
#[inline(always)]
fn find<'a>(
    cache: &'a mut BlockCache,
    decoder: &mut BlockDecoder,
    cpu: &mut Cpu,
    single: bool,
) -> Result<(&'a Block, &'a [Op]), Fault> {
    let linear = if cpu.mode == Mode::Code64 { cpu.rip } else { legacy_linear(cpu)? };
    let host = cpu.code_host(linear)?;
    let key = key(host, cpu.mode, single);
    // The borrow checker does not see that the early return ends the borrow: look twice, by number.
    if let Some(id) = cache.front(key) {
        match cache.at(id).0.second {
            None => return Ok(cache.at(id)),
            Some((second, stamp)) => {
                let there = cpu.fetch((linear | 0xfff).wrapping_add(1))?;
                if there.addr() == second && stamp.is_current() {
                    return Ok(cache.at(id));
                }
            }
        }
    } else if let Some(id) = cache.find(key)
        && cache.at(id).0.second.is_none()
    {
        return Ok(cache.at(id));
    }
    let block = decoder.decode(cpu, linear, host, single)?;
    let id = cache.insert(block, decoder.ops());
    Ok(cache.at(id))
}

impl Cpu {
    /// The host address of the code at `linear`.
    ///
    /// # Errors
    /// Those of [`Cpu::fetch`].
    #[inline(always)]
    pub(crate) fn code_host(&mut self, linear: u64) -> Result<HostAddr, Fault> {
        let (code_linear, code_host) = self.mmu.code_page;
        if linear & !0xfff == code_linear {
            return Ok(self.mmu.tlb.code_byte(code_host, linear));
        }
        let host = self.fetch(linear)?;
        self.mmu.code_page = (linear & !0xfff, host.addr() & !0xfff);
        Ok(host)
    }
}

#[cold]
fn legacy_linear(cpu: &Cpu) -> Result<u64, Fault> {
    let cs = &cpu.seg[seg::CS];
    if cpu.rip > u64::from(cs.limit) {
        return Err(Fault::GP0);
    }
    Ok(cs.base.wrapping_add(cpu.rip) & 0xffff_ffff)
}
