//! State images: FXSAVE, XSAVE and their kin (SDM vol. 1, chapters 10.5 and 13), and the same images
//! for snapshots.

use iced_x86::{Instruction, Mnemonic};

use super::exec::{class, guarded};
use super::state::{FxImage, MXCSR_MASK, MXCSR_RESET, VectorState, guard};
use super::{HostOp, mem};
use crate::block::Block;
use crate::cpu::{Cpu, Mode};
use crate::fault::Fault;
use crate::mmu::{Access, Wrote};
use crate::op::{Flow, Op};

/// Legacy region.
const LEGACY: usize = 512;
/// The header's XSTATE_BV and XCOMP_BV.
const HEADER: usize = 512;
/// Upper halves of YMM0-15; in the compacted format too, as no component lies before.
const AVX_OFFSET: usize = 576;
/// Legacy region, header, AVX.
pub const AREA: usize = 832;

const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// XCOMP_BV: the area is in the compacted format.
const COMPACT: u64 = 1 << 63;

/// Bits of [`Op::aux`].
mod aux {
    /// REX.W: pointers of 64 bits.
    pub const WIDE: u8 = 1;
    /// 64-bit mode: sixteen XMM registers.
    pub const LONG: u8 = 2;
    /// XSAVEOPT: components in their initial state are not written.
    pub const OPT: u8 = 4;
    /// XSAVEC: as XSAVEOPT, compacted.
    pub const COMPACT: u8 = 8;
}

/// Compiles an instruction of these families.
pub fn decode(insn: &Instruction, mode: Mode) -> Option<HostOp> {
    use Mnemonic as M;
    let (handler, flags): (crate::op::Handler, u8) = match insn.mnemonic() {
        M::Fxsave => (fxsave, 0),
        M::Fxsave64 => (fxsave, aux::WIDE),
        M::Fxrstor => (fxrstor, 0),
        M::Fxrstor64 => (fxrstor, aux::WIDE),
        M::Xsave => (xsave, 0),
        M::Xsave64 => (xsave, aux::WIDE),
        M::Xsaveopt => (xsave, aux::OPT),
        M::Xsaveopt64 => (xsave, aux::OPT | aux::WIDE),
        M::Xsavec => (xsave, aux::COMPACT),
        M::Xsavec64 => (xsave, aux::COMPACT | aux::WIDE),
        M::Xrstor => (xrstor, 0),
        M::Xrstor64 => (xrstor, aux::WIDE),
        M::Ldmxcsr => (ldmxcsr::<{ class::SSE }>, 0),
        M::Vldmxcsr => (ldmxcsr::<{ class::AVX }>, 0),
        M::Stmxcsr => (stmxcsr::<{ class::SSE }>, 0),
        M::Vstmxcsr => (stmxcsr::<{ class::AVX }>, 0),
        _ => return None,
    };
    let long = if mode == Mode::Code64 { aux::LONG } else { 0 };
    Some(HostOp { aux: flags | long, ..HostOp::new(handler) })
}

fn ldmxcsr<const G: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, G);
    let mut bytes = [0; 4];
    let read = mem::read(cpu, op, 0, &mut bytes);
    let value = u32::from_le_bytes(bytes);
    match read {
        Err(fault) => cpu.raise(fault),
        Ok(()) if value & !MXCSR_MASK != 0 => cpu.raise(Fault::GP0),
        Ok(()) => {
            cpu.vec.set_mxcsr(value);
            Flow::Next
        }
    }
}

fn stmxcsr<const G: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, G);
    let value = cpu.vec.mxcsr();
    mem::write(cpu, op, &value.to_le_bytes())
}

fn fxsave(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87_NOWAIT);
    let registers = if op.aux & aux::LONG != 0 { 16 } else { 8 };
    let size = 160 + registers * 16;
    // All 512 bytes must be writable, although the last of them are not written.
    let linear = match mem::probe(cpu, op, LEGACY, 15) {
        Ok(linear) => linear,
        Err(fault) => return cpu.raise(fault),
    };
    let mut image = legacy(&mut cpu.vec, op.aux & aux::WIDE != 0);
    sse(&mut cpu.vec, &mut image, registers);
    match cpu.write_bytes(linear, &image[..size]) {
        Ok(wrote) => wrote.into(),
        Err(fault) => cpu.raise(fault),
    }
}

fn fxrstor(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::X87_NOWAIT);
    let mut image = FxImage([0; LEGACY]);
    if let Err(fault) = mem::read(cpu, op, 15, &mut image.0) {
        return cpu.raise(fault);
    }
    let mxcsr = dword(&image.0, 24);
    if mxcsr & !MXCSR_MASK != 0 {
        return cpu.raise(Fault::GP0);
    }
    set_legacy(&mut cpu.vec, &mut image, op.aux & aux::WIDE != 0);
    set_sse(&mut cpu.vec, &image.0, if op.aux & aux::LONG != 0 { 16 } else { 8 });
    cpu.vec.set_mxcsr(mxcsr);
    Flow::Next
}

/// The requested features: EDX:EAX and XCR0.
fn requested(cpu: &Cpu) -> u64 {
    (cpu.gpr[2] << 32 | cpu.gpr[0] & 0xffff_ffff) & cpu.vec.xcr0()
}

/// Bytes of an area with the components `features`.
fn area_size(features: u64) -> usize {
    if features & AVX != 0 { AREA } else { AVX_OFFSET }
}

fn xsave(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, guard::XSAVE);
    match save(cpu, op) {
        Ok(flow) => flow,
        Err(fault) => cpu.raise(fault),
    }
}

fn save(cpu: &mut Cpu, op: &Op) -> Result<Flow, Fault> {
    let requested = requested(cpu);
    let compact = op.aux & aux::COMPACT != 0;
    let registers = if op.aux & aux::LONG != 0 { 16 } else { 8 };
    let size = area_size(requested);
    // The whole area is checked before the first byte is written.
    let linear = mem::probe(cpu, op, size, 63)?;

    let mut in_use = in_use(&cpu.vec);
    let mxcsr = cpu.vec.mxcsr();
    if compact && mxcsr != MXCSR_RESET {
        in_use |= SSE;
    }
    let optimised = op.aux & (aux::OPT | aux::COMPACT) != 0;
    let write = if optimised { requested & in_use } else { requested };

    let mut image = legacy(&mut cpu.vec, op.aux & aux::WIDE != 0);
    sse(&mut cpu.vec, &mut image, registers);
    let mut flow = Flow::Next;
    let mut put = |cpu: &mut Cpu, offset: usize, bytes: &[u8]| -> Result<(), Fault> {
        if cpu.write_bytes(linear.wrapping_add(offset as u64), bytes)? == Wrote::Code {
            flow = Flow::Break;
        }
        Ok(())
    };
    if write & X87 != 0 {
        put(cpu, 0, &image[..24])?;
        put(cpu, 32, &image[32..160])?;
    }
    let mxcsr_too = if compact { write & SSE != 0 } else { requested & (SSE | AVX) != 0 };
    if mxcsr_too {
        put(cpu, 24, &image[24..32])?;
    }
    if write & SSE != 0 {
        put(cpu, 160, &image[160..160 + registers * 16])?;
    }
    if write & AVX != 0 {
        let mut upper = [0; 256];
        for (to, ymm) in upper.chunks_exact_mut(16).zip(&cpu.vec.ymm[..registers]) {
            to[..8].copy_from_slice(&ymm.0[2].to_le_bytes());
            to[8..].copy_from_slice(&ymm.0[3].to_le_bytes());
        }
        put(cpu, AVX_OFFSET, &upper[..registers * 16])?;
    }
    if compact {
        let mut header = [0; 16];
        header[..8].copy_from_slice(&(requested & in_use).to_le_bytes());
        header[8..].copy_from_slice(&(requested | COMPACT).to_le_bytes());
        put(cpu, HEADER, &header)?;
    } else {
        let mut old = [0; 8];
        cpu.read_bytes(linear.wrapping_add(HEADER as u64), &mut old)?;
        let new = u64::from_le_bytes(old) & !requested | requested & in_use;
        put(cpu, HEADER, &new.to_le_bytes())?;
    }
    Ok(flow)
}

fn xrstor(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, guard::XSAVE);
    match restore(cpu, op) {
        Ok(()) => Flow::Next,
        Err(fault) => cpu.raise(fault),
    }
}

fn restore(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    let requested = requested(cpu);
    let registers = if op.aux & aux::LONG != 0 { 16 } else { 8 };
    let linear = mem::address(cpu, op, AVX_OFFSET, 63, Access::Read)?;
    let mut area = [0u8; AREA];
    cpu.read_bytes(linear, &mut area[..AVX_OFFSET])?;
    let present = qword(&area, HEADER);
    let layout = qword(&area, HEADER + 8);
    let compact = layout & COMPACT != 0;
    if compact {
        let beyond_xcr0 = (layout & !COMPACT) & !cpu.vec.xcr0();
        let missing = present & !layout;
        if beyond_xcr0 | missing != 0 || area[HEADER + 16..AVX_OFFSET].iter().any(|b| *b != 0) {
            return Err(Fault::GP0);
        }
    } else if present & !cpu.vec.xcr0() != 0
        || area[HEADER + 8..HEADER + 24].iter().any(|b| *b != 0)
    {
        return Err(Fault::GP0);
    }
    let load = requested & present;
    if load & AVX != 0 {
        let upper = linear.wrapping_add(AVX_OFFSET as u64);
        cpu.read_bytes(upper, &mut area[AVX_OFFSET..AVX_OFFSET + registers * 16])?;
    }
    let mxcsr = dword(&area, 24);
    let mxcsr_loaded = if compact { load & SSE != 0 } else { requested & (SSE | AVX) != 0 };
    if mxcsr_loaded && mxcsr & !MXCSR_MASK != 0 {
        return Err(Fault::GP0);
    }

    if requested & X87 != 0 {
        let mut image = FxImage::reset();
        if load & X87 != 0 {
            image.0.copy_from_slice(&area[..LEGACY]);
        }
        set_legacy(&mut cpu.vec, &mut image, op.aux & aux::WIDE != 0);
    }
    if mxcsr_loaded {
        cpu.vec.set_mxcsr(mxcsr);
    } else if compact && requested & SSE != 0 {
        cpu.vec.set_mxcsr(MXCSR_RESET);
    }
    if requested & SSE != 0 {
        if load & SSE == 0 {
            area[160..416].fill(0);
        }
        set_sse(&mut cpu.vec, &area[..LEGACY], registers);
    }
    if requested & AVX != 0 {
        if load & AVX == 0 {
            area[AVX_OFFSET..].fill(0);
        }
        set_avx(&mut cpu.vec, &area, registers);
    }
    Ok(())
}

/// Which components are not in their initial state (XINUSE). All registers count, also those that
/// the mode does not show.
fn in_use(vec: &VectorState) -> u64 {
    let mut bits = 0;
    let x87 = vec.x87_image();
    if x87.0[..24] != FxImage::reset().0[..24] || x87.0[32..160].iter().any(|b| *b != 0) {
        bits |= X87;
    }
    for ymm in &vec.ymm {
        if ymm.0[0] | ymm.0[1] != 0 {
            bits |= SSE;
        }
        if ymm.0[2] | ymm.0[3] != 0 {
            bits |= AVX;
        }
    }
    bits
}

/// The x87 part of the legacy region. Without REX.W the pointers have 32 bits, and zero selectors.
fn legacy(vec: &mut VectorState, wide: bool) -> [u8; LEGACY] {
    let mut image = vec.x87_image().0;
    if !wide {
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    image
}

/// MXCSR and XMM of the legacy region.
fn sse(vec: &mut VectorState, image: &mut [u8; LEGACY], registers: usize) {
    image[24..28].copy_from_slice(&vec.mxcsr().to_le_bytes());
    image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    for (to, ymm) in image[160..].chunks_exact_mut(16).zip(&vec.ymm[..registers]) {
        to[..8].copy_from_slice(&ymm.0[0].to_le_bytes());
        to[8..].copy_from_slice(&ymm.0[1].to_le_bytes());
    }
}

fn set_legacy(vec: &mut VectorState, image: &mut FxImage, wide: bool) {
    if !wide {
        image.0[12..16].fill(0);
        image.0[20..24].fill(0);
    }
    vec.set_x87_image(image);
}

fn set_sse(vec: &mut VectorState, image: &[u8], registers: usize) {
    for (i, ymm) in vec.ymm[..registers].iter_mut().enumerate() {
        ymm.0[0] = qword(image, 160 + i * 16);
        ymm.0[1] = qword(image, 168 + i * 16);
    }
}

fn set_avx(vec: &mut VectorState, area: &[u8], registers: usize) {
    for (i, ymm) in vec.ymm[..registers].iter_mut().enumerate() {
        ymm.0[2] = qword(area, AVX_OFFSET + i * 16);
        ymm.0[3] = qword(area, AVX_OFFSET + 8 + i * 16);
    }
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn qword(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

impl VectorState {
    /// The state as an XSAVE area in the standard format, all three components present.
    pub fn to_xsave(&mut self) -> [u8; AREA] {
        let mut area = [0; AREA];
        let mut image = legacy(self, true);
        sse(self, &mut image, 16);
        area[..LEGACY].copy_from_slice(&image);
        area[HEADER] = (X87 | SSE | AVX) as u8;
        for (to, ymm) in area[AVX_OFFSET..].chunks_exact_mut(16).zip(&self.ymm) {
            to[..8].copy_from_slice(&ymm.0[2].to_le_bytes());
            to[8..].copy_from_slice(&ymm.0[3].to_le_bytes());
        }
        area
    }

    /// Replaces the state by that of an XSAVE area in the standard format.
    ///
    /// # Errors
    /// The area is too short, in another format, or its MXCSR has reserved bits set.
    pub fn from_xsave(&mut self, area: &[u8]) -> Result<(), &'static str> {
        if area.len() < AREA {
            return Err("the XSAVE area is too short");
        }
        let present = qword(area, HEADER);
        if qword(area, HEADER + 8) != 0 || present & !(X87 | SSE | AVX) != 0 {
            return Err("the XSAVE area has components or a format that the engine lacks");
        }
        let mxcsr = dword(area, 24);
        if mxcsr & !MXCSR_MASK != 0 {
            return Err("MXCSR has reserved bits set");
        }
        let mut copy = [0; AREA];
        copy.copy_from_slice(&area[..AREA]);
        let mut image = FxImage::reset();
        if present & X87 != 0 {
            image.0.copy_from_slice(&copy[..LEGACY]);
        }
        if present & SSE == 0 {
            copy[160..416].fill(0);
        }
        if present & AVX == 0 {
            copy[AVX_OFFSET..].fill(0);
        }
        set_legacy(self, &mut image, true);
        set_sse(self, &copy, 16);
        set_avx(self, &copy, 16);
        self.set_mxcsr(if present & (SSE | AVX) == 0 { MXCSR_RESET } else { mxcsr });
        Ok(())
    }
}
