//! Makes cases: a few instructions of given or random forms, with operands that mostly work.

use std::collections::HashSet;

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory, Mnemonic as M,
    OpAccess, OpCodeOperandKind as K, OpKind, Register as R,
};

use super::case::{
    CODE, CODE_SIZE, Case, DATA, DATA_SIZE, GS_BASE, HOLE, MAX_CODE, READ_ONLY, Rng, State, XSAVE,
};
use super::compare::{defined_flags, flag_bits};
use super::forms::{Form, only_memory, or_memory};

/// A case, and what its generator knows about it.
#[derive(Clone)]
pub struct Generated {
    pub case: Case,
    /// The instructions of forms (not those in support): start, end, form.
    pub forms: Vec<(u64, u64, Form)>,
}

/// General registers that start as pointers into the window.
const POINTERS: [usize; 7] = [3, 5, 6, 7, 8, 12, 13];

struct Maker<'a> {
    rng: &'a mut Rng,
    bitness: u32,
    code: Vec<u8>,
    start: u64,
    /// Known contents of the pointer registers.
    known: [Option<u64>; 16],
    undefined: u64,
    /// Indirect branches made.
    indirects: u32,
    forms: Vec<(u64, u64, Form)>,
    info: InstructionInfoFactory,
}

/// Makes a case of the forms in `wanted`, with noise between.
///
/// `allowed`: codes that random bytes may happen to be.
pub fn case(rng: &mut Rng, bitness: u32, wanted: &[Form], allowed: &HashSet<Code>) -> Generated {
    let mut state = initial(rng, bitness);
    let near_end = rng.once_in(8);
    let offset = if near_end { 0xfe0 + rng.below(32) } else { 64 + rng.below(64) };
    state.rip = CODE + offset;
    let mut known = [None; 16];
    for p in POINTERS {
        if bitness == 64 || p < 8 {
            known[p] = Some(state.gpr[p]);
        }
    }
    let mut maker = Maker {
        rng,
        bitness,
        code: Vec::new(),
        start: state.rip,
        known,
        undefined: 0,
        indirects: 0,
        forms: Vec::new(),
        info: InstructionInfoFactory::new(),
    };
    let mut start = maker.rng.once_in(20).then(|| maker.begin_loop());
    for form in wanted {
        let before = maker.code.len();
        if maker.rng.once_in(12) {
            maker.bytes(allowed);
        }
        if maker.rng.once_in(100) {
            maker.trap();
        }
        if maker.rng.once_in(30) {
            maker.patch();
        }
        for _ in 0..20 {
            if maker.form(*form) {
                break;
            }
        }
        if is_image(*form) {
            // What it leaves in memory differs between processors: nothing may look at it, not in a second round either.
            start = None;
            break;
        }
        if maker.code.len() > MAX_CODE - 16 {
            maker.code.truncate(before);
            let end = maker.start + before as u64;
            maker.forms.retain(|(at, ..)| *at < end);
            break;
        }
    }
    if let Some(start) = start {
        maker.end_loop(start);
    }
    let mut code = [0xcc; MAX_CODE];
    let len = maker.code.len().min(MAX_CODE - 1);
    code[..len].copy_from_slice(&maker.code[..len]);
    let forms = maker.forms;
    let data_seed = rng.next();
    Generated {
        case: Case {
            state,
            code,
            len: len as u32 + 1,
            compat: u32::from(bitness == 32),
            data_seed,
        },
        forms,
    }
}

/// Does an instruction of this form need or make a state image?
fn is_image(form: Form) -> bool {
    matches!(
        form.code.mnemonic(),
        M::Fxsave
            | M::Fxsave64
            | M::Fnsave
            | M::Fnstenv
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            // After an image was made.
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xrstor
            | M::Xrstor64
    )
}

fn initial(rng: &mut Rng, bitness: u32) -> State {
    let mut state = State { gpr: [0; 16], rip: 0, rflags: 0x202, pad: [0; 6], xsave: [0; XSAVE] };
    for gpr in &mut state.gpr {
        *gpr = rng.value();
    }
    for p in POINTERS {
        state.gpr[p] = DATA + 0x400 + (rng.below(0x1800) & !63);
    }
    state.gpr[4] =
        DATA + 0xc00 + rng.below(64) * 16 + if rng.once_in(8) { rng.below(16) } else { 0 };
    if bitness == 32 {
        for gpr in &mut state.gpr {
            *gpr &= 0xffff_ffff;
        }
    }
    state.rflags |= rng.next() & 0x8d5;
    if rng.once_in(12) {
        state.rflags |= 0x400;
    }
    if rng.once_in(10) {
        // Alignment checks.
        state.rflags |= 0x4_0000;
    }
    let x = &mut state.xsave;
    // x87
    let fcw: u16 = if rng.once_in(4) { (rng.next() as u16 & 0xf3f) | 0x40 } else { 0x37f };
    let top = rng.below(8) as u16;
    let mut fsw = (rng.next() as u16 & 0x4700) | top << 11;
    if rng.once_in(4) {
        fsw |= rng.next() as u16 & 0x7f;
    }
    // ES and B follow from flags and masks.
    if fsw & !fcw & 0x3f != 0 {
        if rng.once_in(3) { fsw |= 0x8080 } else { fsw &= !0x3f }
    }
    x[0..2].copy_from_slice(&fcw.to_le_bytes());
    x[2..4].copy_from_slice(&fsw.to_le_bytes());
    x[4] = match rng.below(4) {
        0 => 0,
        1 => 0xff,
        _ => rng.next() as u8,
    };
    for i in 0..8 {
        x[32 + i * 16..42 + i * 16].copy_from_slice(&rng.extended());
    }
    let mxcsr: u32 = match rng.below(8) {
        0 => rng.next() as u32 & 0xffff,
        1 => 0x1f80 | rng.next() as u32 & 0xe07f,
        2 => 0x1f80 | rng.next() as u32 & 0x3f,
        _ => 0x1f80,
    };
    x[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    x[28..30].copy_from_slice(&[0xff, 0xff]);
    for i in 0..16 {
        for (base, half) in [(160, 0), (160, 8), (576, 0), (576, 8)] {
            let at = base + i * 16 + half;
            x[at..at + 8].copy_from_slice(&rng.float().to_le_bytes());
        }
    }
    x[512] = 7;
    state
}

impl Maker<'_> {
    fn here(&self) -> u64 {
        self.start + self.code.len() as u64
    }

    /// `mov dword [counter], n`. Returns where the loop starts.
    fn begin_loop(&mut self) -> u64 {
        let mut store = self.counter(Code::Mov_rm32_imm32);
        store.set_op1_kind(OpKind::Immediate32);
        store.set_immediate32(2 + self.rng.below(4) as u32);
        let _ = self.emit(&store, None);
        self.here()
    }

    /// `cmp eax, edx; dec dword [counter]; jnz start`: the flags are defined at the start.
    fn end_loop(&mut self, start: u64) {
        if self.code.len() > MAX_CODE - 40 {
            return;
        }
        self.undefined = u64::MAX;
        self.define_flags(u32::MAX);
        let _ = self.emit(&self.counter(Code::Dec_rm32), None);
        let mut branch = Instruction::default();
        branch.set_code(if self.bitness == 64 { Code::Jne_rel32_64 } else { Code::Jne_rel32_32 });
        branch.set_op0_kind(if self.bitness == 64 {
            OpKind::NearBranch64
        } else {
            OpKind::NearBranch32
        });
        branch.set_near_branch64(start);
        if let Ok(mut encoder) = Encoder::try_new(self.bitness)
            && encoder.encode(&branch, self.here()).is_ok()
        {
            self.code.extend(encoder.take_buffer());
        }
    }

    /// An instruction on the loop counter, which is where no operand is.
    fn counter(&self, code: Code) -> Instruction {
        let mut insn = Instruction::default();
        insn.set_code(code);
        insn.set_op0_kind(OpKind::Memory);
        insn.set_memory_displ_size(if self.bitness == 64 { 8 } else { 4 });
        insn.set_memory_displacement64(DATA + 0x70);
        insn
    }

    /// Random bytes, if they are an instruction that may run, or none at all.
    fn bytes(&mut self, allowed: &HashSet<Code>) {
        let mut bytes = Vec::new();
        for _ in 0..self.rng.below(3) {
            // No FS: its base is the child's own. Other segments with GS: manuals do not say who wins.
            const PREFIXES: [u8; 10] = [0x66, 0x67, 0x2e, 0x36, 0x3e, 0x26, 0x65, 0xf2, 0xf3, 0xf0];
            let prefix = self.rng.pick(&PREFIXES);
            let segment = |b: &u8| matches!(b, 0x2e | 0x36 | 0x3e | 0x26 | 0x65);
            if !segment(&prefix) || !bytes.iter().any(segment) {
                bytes.push(prefix);
            }
        }
        if self.bitness == 64 && self.rng.once_in(2) {
            bytes.push(0x40 | self.rng.below(16) as u8);
        }
        let map: &[u8] = match self.rng.below(16) {
            0..6 => &[],
            6..12 => &[0x0f],
            12 => &[0x0f, 0x38],
            13 => &[0x0f, 0x3a],
            14 => &[0xc5],
            _ => &[0xc4],
        };
        bytes.extend(map);
        bytes.push(self.rng.next() as u8);
        // A register, or memory at a pointer, mostly.
        let base = self.rng.pick(&[3u8, 5, 6, 7]);
        let middle = self.rng.next() as u8 & 0x38;
        let operand = match self.rng.below(4) {
            0 => self.rng.next() as u8,
            1 => 0xc0 | self.rng.next() as u8,
            _ => 0x40 | middle | base,
        };
        bytes.push(operand);
        bytes.extend(self.rng.next().to_le_bytes());
        bytes.extend(self.rng.next().to_le_bytes());
        let at = self.here();
        let insn = Decoder::with_ip(self.bitness, &bytes, at, DecoderOptions::NONE).decode();
        if insn.is_invalid() {
            // What this decoder does not know is #UD, but for the maps in which the host may know more.
            let prefix = |b: &u8| {
                matches!(b, 0x66 | 0x67 | 0x2e | 0x36 | 0x3e | 0x26 | 0x65 | 0xf2 | 0xf3 | 0xf0)
                    || self.bitness == 64 && *b & 0xf0 == 0x40
            };
            let mut opcode = bytes.iter().skip_while(|b| prefix(b));
            let escaped = map.len() == 1 && map[0] == 0x0f && opcode.next() == Some(&0x0f);
            // VMCALL and its like with prefixes are for a hypervisor below the host to answer.
            if !escaped || opcode.next() == Some(&0x01) || !self.rng.once_in(20) {
                return;
            }
            self.code.extend(&bytes[..bytes.len().min(15)]);
            return;
        }
        let near = insn.op_kinds().any(|k| {
            matches!(k, OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
        });
        let indirect = matches!(insn.mnemonic(), M::Call | M::Jmp | M::Ret);
        let state = matches!(insn.mnemonic(), M::Popf | M::Popfd | M::Popfq)
            || is_image(Form { code: insn.code(), memory: true });
        if insn.segment_prefix() == R::FS
            || !allowed.contains(&insn.code())
            || near
            || indirect
            || state
        {
            return;
        }
        self.define_flags(insn.rflags_read());
        if self.here() != at && insn.is_ip_rel_memory_operand() {
            return;
        }
        let length = insn.len();
        self.code.extend(&bytes[..length]);
        self.note(&insn);
    }

    /// Sets TF: `pushf; or dword [rsp], 0x100; popf`. The next instruction ends the case.
    fn trap(&mut self) {
        let wide = self.bitness == 64;
        let stack = |code: Code| {
            let mut insn = Instruction::default();
            insn.set_code(code);
            insn
        };
        let mut or = stack(Code::Or_rm32_imm32);
        or.set_op0_kind(OpKind::Memory);
        or.set_memory_base(if wide { R::RSP } else { R::ESP });
        or.set_op1_kind(OpKind::Immediate32);
        or.set_immediate32(0x100);
        self.define_flags(u32::MAX);
        let _ = self.emit(&stack(if wide { Code::Pushfq } else { Code::Pushfd }), None);
        let _ = self.emit(&or, None);
        let _ = self.emit(&stack(if wide { Code::Popfq } else { Code::Popfd }), None);
    }

    /// Code that rewrites what comes just after it: the immediate of a MOV, or a whole instruction.
    fn patch(&mut self) {
        let between = self.rng.below(4) as usize;
        let opcode = self.rng.once_in(2);
        // mov byte [target], imm8
        let new = if opcode {
            // cmc, clc, stc, cld, xchg eax, ebx, push rax
            self.rng.pick(&[0xf5, 0xf8, 0xf9, 0xfc, 0x93, 0x50])
        } else {
            self.rng.next() as u8
        };
        let length: u64 = if self.bitness == 64 { 8 } else { 7 };
        let at = self.here();
        let after = at + length + between as u64;
        let target = if opcode { after } else { after + 1 };
        let mut store = Instruction::default();
        store.set_code(Code::Mov_rm8_imm8);
        store.set_op0_kind(OpKind::Memory);
        store.set_memory_displ_size(if self.bitness == 64 { 8 } else { 4 });
        store.set_memory_displacement64(target);
        store.set_op1_kind(OpKind::Immediate8);
        store.set_immediate8(new);
        if self.emit(&store, None).is_none() || self.here() != at + length {
            return;
        }
        self.code.extend(std::iter::repeat_n(0x90, between));
        if opcode {
            self.code.push(0x90);
        } else {
            // mov dl, old
            self.code.extend([0xb2, 0x55]);
        }
        self.known = [None; 16];
    }

    /// Appends an instruction of `form` and what it needs before it. False: does not encode.
    fn form(&mut self, form: Form) -> bool {
        let length = self.code.len();
        let (known, undefined) = (self.known, self.undefined);
        let forms = self.forms.len();
        if self.try_form(form).is_some() {
            return true;
        }
        self.code.truncate(length);
        (self.known, self.undefined) = (known, undefined);
        self.forms.truncate(forms);
        false
    }

    fn try_form(&mut self, form: Form) -> Option<()> {
        let code = form.code;
        let info = code.op_code();
        let mut insn = Instruction::default();
        insn.set_code(code);
        let mut target = None;
        for i in 0..info.op_count() {
            let kind = info.op_kind(i);
            if only_memory(kind) || or_memory(kind) && form.memory {
                self.memory(&mut insn, i, kind)?;
            } else {
                target = self.operand(&mut insn, i, kind)?.or(target);
            }
        }
        self.prepare(&mut insn)?;
        self.define_flags(insn.rflags_read());
        if info.can_use_lock_prefix()
            && form.memory
            && insn.op0_kind() == OpKind::Memory
            && self.rng.once_in(3)
        {
            insn.set_has_lock_prefix(true);
        }
        self.emit(&insn, Some(form))?;
        if target.is_some() {
            // What a taken branch skips: `inc al`.
            self.code.extend([0xfe, 0xc0]);
        }
        Some(())
    }

    /// An operand that is not memory. Some: the instruction is a branch (over the next two bytes).
    fn operand(&mut self, insn: &mut Instruction, i: u32, kind: K) -> Option<Option<()>> {
        let gpr = |rng: &mut Rng, base: R, bitness: u32| {
            let count = if bitness == 64 { 16 } else { 8 };
            let n = rng.below(count);
            // Seldom the stack pointer.
            let n = if n == 4 && !rng.once_in(4) { 0 } else { n };
            base + n as u32
        };
        let vector_count = if self.bitness == 64 { 16 } else { 8 };
        let mut register = |r: R| {
            insn.set_op_kind(i, OpKind::Register);
            insn.set_op_register(i, r);
        };
        match kind {
            K::r8_or_mem | K::r8_reg | K::r8_opcode => {
                let list = if self.bitness == 64 { 20 } else { 8 };
                register(R::AL + self.rng.below(list) as u32);
            }
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode | K::r16_reg_mem => {
                register(gpr(self.rng, R::AX, self.bitness));
            }
            K::r32_or_mem
            | K::r32_reg
            | K::r32_rm
            | K::r32_opcode
            | K::r32_vvvv
            | K::r32_reg_mem => {
                register(gpr(self.rng, R::EAX, self.bitness));
            }
            K::r64_or_mem
            | K::r64_reg
            | K::r64_rm
            | K::r64_opcode
            | K::r64_vvvv
            | K::r64_reg_mem => {
                register(gpr(self.rng, R::RAX, self.bitness));
            }
            K::mm_or_mem | K::mm_reg | K::mm_rm => register(R::MM0 + self.rng.below(8) as u32),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                register(R::XMM0 + self.rng.below(vector_count) as u32);
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                register(R::YMM0 + self.rng.below(vector_count) as u32);
            }
            K::al => register(R::AL),
            K::cl => register(R::CL),
            K::ax => register(R::AX),
            K::dx => register(R::DX),
            K::eax => register(R::EAX),
            K::rax => register(R::RAX),
            K::st0 => register(R::ST0),
            K::sti_opcode => register(R::ST0 + self.rng.below(8) as u32),
            K::imm8 => {
                insn.set_op_kind(
                    i,
                    if i > 0
                        && matches!(insn.op_kind(i - 1), OpKind::Immediate8 | OpKind::Immediate16)
                    {
                        OpKind::Immediate8_2nd
                    } else {
                        OpKind::Immediate8
                    },
                );
                let value =
                    if self.rng.once_in(2) { self.rng.below(32) } else { self.rng.next() & 0xff };
                if insn.op_kind(i) == OpKind::Immediate8_2nd {
                    insn.set_immediate8_2nd(value as u8 & 31);
                } else {
                    insn.set_immediate8(value as u8);
                }
            }
            K::imm8_const_1 => {
                insn.set_op_kind(i, OpKind::Immediate8);
                insn.set_immediate8(1);
            }
            K::imm8sex16 => {
                insn.set_op_kind(i, OpKind::Immediate8to16);
                insn.set_immediate8to16(self.rng.value() as i8 as i16);
            }
            K::imm8sex32 => {
                insn.set_op_kind(i, OpKind::Immediate8to32);
                insn.set_immediate8to32(self.rng.value() as i8 as i32);
            }
            K::imm8sex64 => {
                insn.set_op_kind(i, OpKind::Immediate8to64);
                insn.set_immediate8to64(self.rng.value() as i8 as i64);
            }
            K::imm16 => {
                insn.set_op_kind(i, OpKind::Immediate16);
                let value = self.rng.value() as u16;
                insn.set_immediate16(match insn.mnemonic() {
                    M::Ret => value & 0x70,
                    M::Enter => value & 0xff,
                    _ => value,
                });
            }
            K::imm32 => {
                insn.set_op_kind(i, OpKind::Immediate32);
                insn.set_immediate32(self.rng.value() as u32);
            }
            K::imm32sex64 => {
                insn.set_op_kind(i, OpKind::Immediate32to64);
                insn.set_immediate32to64(self.rng.value() as i32 as i64);
            }
            K::imm64 => {
                insn.set_op_kind(i, OpKind::Immediate64);
                insn.set_immediate64(self.rng.value());
            }
            K::br64_1 | K::br64_4 => {
                insn.set_op_kind(i, OpKind::NearBranch64);
                return Some(Some(()));
            }
            K::br32_1 | K::br32_4 => {
                insn.set_op_kind(i, OpKind::NearBranch32);
                return Some(Some(()));
            }
            K::br16_1 | K::br16_2 => {
                insn.set_op_kind(i, OpKind::NearBranch16);
                return Some(Some(()));
            }
            K::seg_rSI => insn.set_op_kind(
                i,
                if self.bitness == 64 { OpKind::MemorySegRSI } else { OpKind::MemorySegESI },
            ),
            K::es_rDI => insn.set_op_kind(
                i,
                if self.bitness == 64 { OpKind::MemoryESRDI } else { OpKind::MemoryESEDI },
            ),
            K::seg_rDI => insn.set_op_kind(
                i,
                if self.bitness == 64 { OpKind::MemorySegRDI } else { OpKind::MemorySegEDI },
            ),
            K::seg_rBX_al => {
                insn.set_op_kind(i, OpKind::Memory);
                insn.set_memory_base(if self.bitness == 64 { R::RBX } else { R::EBX });
                insn.set_memory_index(R::AL);
            }
            _ => return None,
        }
        Some(None)
    }

    /// An address for an operand of `size` bytes.
    fn place(&mut self, size: u64, aligned: bool) -> u64 {
        let page = 4096u64;
        let align = if aligned { size.next_power_of_two().clamp(1, 64) } else { 1 };
        match self.rng.below(24) {
            // Across the two pages.
            0 => DATA + page - 1 - self.rng.below(size.max(2) - 1),
            // Across the end of what can be written.
            1 if self.rng.once_in(2) => READ_ONLY - 1 - self.rng.below(size.max(2) - 1),
            // Read-only, or across the hole's edge, or in it.
            2 if self.rng.once_in(3) => READ_ONLY + (self.rng.below(page - size) & !(align - 1)),
            3 if self.rng.once_in(3) => HOLE - self.rng.below(size + 1),
            4..7 => DATA + 0x80 + self.rng.below(DATA_SIZE as u64 - 0x80 - size),
            _ => DATA + ((0x100 + self.rng.below(DATA_SIZE as u64 - 0x200 - size)) & !(align - 1)),
        }
    }

    fn size_of(insn: &Instruction) -> u64 {
        match insn.mnemonic() {
            M::Fxsave | M::Fxrstor | M::Fxsave64 | M::Fxrstor64 => 512,
            M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xrstor
            | M::Xrstor64 => XSAVE as u64,
            _ => (insn.memory_size().size() as u64).clamp(1, 512),
        }
    }

    fn memory(&mut self, insn: &mut Instruction, i: u32, kind: K) -> Option<()> {
        insn.set_op_kind(i, OpKind::Memory);
        let mut size = Self::size_of(insn);
        if size == XSAVE as u64 {
            size = 896;
        }
        let aligned = size >= 512 || !self.rng.once_in(6);
        let mut address = self.place(size, aligned || size >= 16);
        if size >= 512 {
            address &= !63;
        }
        let wide = self.bitness == 64;
        if kind == K::mem_offs {
            insn.set_memory_displ_size(if wide { 8 } else { 4 });
            insn.set_memory_displacement64(address);
            return Some(());
        }
        if matches!(kind, K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y) {
            return self.gathered(insn, kind);
        }
        let full = |n: usize| if wide { R::RAX + n as u32 } else { R::EAX + n as u32 };
        match self.rng.below(10) {
            // Absolute.
            0 => {
                insn.set_memory_displ_size(if wide { 8 } else { 4 });
                insn.set_memory_displacement64(address);
            }
            1 if wide => {
                insn.set_memory_base(R::RIP);
                insn.set_memory_displ_size(8);
                insn.set_memory_displacement64(address);
            }
            // Whatever the registers hold.
            2 if self.rng.once_in(8) => {
                let count = if wide { 16 } else { 8 };
                insn.set_memory_base(full(self.rng.below(count) as usize));
                insn.set_memory_displ_size(1);
                insn.set_memory_displacement64(self.rng.next() as i8 as i64 as u64);
            }
            3 if wide => {
                // A 32-bit address size.
                let base = self.pointer();
                let at = self.known[base]?;
                insn.set_memory_base(R::EAX + base as u32);
                insn.set_memory_displ_size(4);
                insn.set_memory_displacement64(address.wrapping_sub(at) as i32 as i64 as u64);
            }
            3 if self.rng.once_in(12) => {
                // A 16-bit one, which nothing is mapped at.
                insn.set_memory_base(self.rng.pick(&[R::None, R::BX, R::BP]));
                insn.set_memory_index(self.rng.pick(&[R::SI, R::DI]));
                insn.set_memory_displ_size(2);
                insn.set_memory_displacement64(self.rng.next() & 0xffff);
                if insn.memory_base() == R::None {
                    insn.set_memory_base(insn.memory_index());
                    insn.set_memory_index(R::None);
                }
            }
            choice => {
                let base = self.pointer();
                let at = self.known[base]?;
                insn.set_memory_base(full(base));
                let mut address = address;
                if choice >= 7 {
                    let index = if self.rng.once_in(2) || !wide { 1 } else { 9 };
                    if index != base {
                        let value = self.rng.below(32);
                        self.set_small(index, value);
                        let scale = self.rng.below(4);
                        insn.set_memory_index(full(index));
                        insn.set_memory_index_scale(1 << scale);
                        address = address.wrapping_sub(value << scale);
                    }
                }
                insn.set_memory_displ_size(if wide { 8 } else { 4 });
                let displacement = address.wrapping_sub(at) as i32 as i64 as u64;
                insn.set_memory_displacement64(displacement);
                if i8::try_from(displacement as i64).is_ok() {
                    insn.set_memory_displ_size(1);
                }
                if displacement == 0 && self.rng.once_in(2) {
                    insn.set_memory_displ_size(0);
                }
            }
        }
        if self.rng.once_in(16) {
            insn.set_segment_prefix(self.rng.pick(&[R::DS, R::ES, R::SS, R::CS]));
        } else if wide && self.rng.once_in(24) {
            insn.set_segment_prefix(R::GS);
            let displacement = insn.memory_displacement64().wrapping_sub(GS_BASE);
            if insn.memory_base() != R::RIP && insn.memory_displ_size() >= 4 {
                let wide = if insn.memory_base() == R::None && insn.memory_index() == R::None {
                    displacement & 0xffff_ffff
                } else {
                    displacement as i32 as i64 as u64
                };
                insn.set_memory_displacement64(wide);
            }
        }
        Some(())
    }

    /// VSIB: indices from the table at the window's start, a full mask sometimes.
    fn gathered(&mut self, insn: &mut Instruction, kind: K) -> Option<()> {
        let number = 1 + self.rng.below(7) as u32;
        let (index, narrow) = match kind {
            K::mem_vsib32x => (R::XMM0 + number, true),
            K::mem_vsib64x => (R::XMM0 + number, false),
            K::mem_vsib32y => (R::YMM0 + number, true),
            _ => (R::YMM0 + number, false),
        };
        let base = self.pointer();
        let full = if self.bitness == 64 { R::RAX } else { R::EAX } + base as u32;
        insn.set_memory_base(full);
        insn.set_memory_index(index);
        insn.set_memory_index_scale(1 << self.rng.below(3));
        insn.set_memory_displ_size(1);
        insn.set_memory_displacement64(self.rng.below(64));
        if !self.rng.once_in(8) {
            // vmovdqu index, [table]
            let mut load = Instruction::default();
            load.set_code(Code::VEX_Vmovdqu_ymm_ymmm256);
            load.set_op0_kind(OpKind::Register);
            load.set_op0_register(R::YMM0 + number);
            load.set_op1_kind(OpKind::Memory);
            load.set_memory_displ_size(if self.bitness == 64 { 8 } else { 4 });
            load.set_memory_displacement64(DATA + if narrow { 0 } else { 64 });
            self.emit(&load, None)?;
        }
        Some(())
    }

    /// A register that holds an address in the window, made to if need be.
    fn pointer(&mut self) -> usize {
        let good: Vec<usize> = (0..16).filter(|i| self.known[*i].is_some()).collect();
        if good.len() > 2 || !good.is_empty() && self.rng.once_in(2) {
            return self.rng.pick(&good);
        }
        let register = self.rng.pick(&[3usize, 5, 6, 7]);
        let value = DATA + 0x400 + (self.rng.below(0x1800) & !63);
        self.set_small(register, value);
        register
    }

    /// `mov r32, imm32`.
    fn set_small(&mut self, register: usize, value: u64) {
        let mut insn = Instruction::default();
        insn.set_code(Code::Mov_r32_imm32);
        insn.set_op0_kind(OpKind::Register);
        insn.set_op0_register(R::EAX + register as u32);
        insn.set_op1_kind(OpKind::Immediate32);
        insn.set_immediate32(value as u32);
        let _ = self.emit(&insn, None);
        self.known[register] = (value >= DATA).then_some(value);
    }

    /// What some instructions need to be worth running.
    fn prepare(&mut self, insn: &mut Instruction) -> Option<()> {
        let size = (insn.memory_size().size() as u64).clamp(1, 64);
        let kinds: Vec<OpKind> = insn.op_kinds().collect();
        let string = insn.is_string_instruction();
        let implicit = |k: &OpKind| {
            matches!(
                k,
                OpKind::MemorySegRSI
                    | OpKind::MemoryESRDI
                    | OpKind::MemorySegRDI
                    | OpKind::MemorySegESI
                    | OpKind::MemoryESEDI
                    | OpKind::MemorySegEDI
            )
        };
        if kinds.iter().any(implicit) && !self.rng.once_in(10) {
            for register in [6, 7] {
                let address = self.place(size * 8, false);
                self.set_small(register, address);
            }
            if self.rng.once_in(6) {
                // Close to each other, so that they overlap.
                let address = DATA + 0x800 + self.rng.below(0x1000);
                let distance = self.rng.below(80).wrapping_sub(40);
                self.set_small(6, address);
                self.set_small(7, address.wrapping_add(distance));
            }
        }
        if string {
            let info = insn.code().op_code();
            if self.rng.once_in(2) {
                if info.can_use_rep_prefix() {
                    insn.set_has_rep_prefix(true);
                }
                if info.can_use_repne_prefix() && self.rng.once_in(2) {
                    insn.set_has_rep_prefix(false);
                    insn.set_has_repne_prefix(true);
                }
                let count =
                    if self.rng.once_in(4) { self.rng.below(600) } else { self.rng.below(12) };
                self.set_small(1, count);
            }
        }
        match insn.mnemonic() {
            // The stack may have been moved away.
            M::Push
            | M::Pop
            | M::Call
            | M::Ret
            | M::Enter
            | M::Leave
            | M::Pushfq
            | M::Popfq
            | M::Pushf
            | M::Popf
            | M::Pushfd
            | M::Popfd
            | M::Pushad
            | M::Popad
            | M::Pusha
            | M::Popa
                if self.rng.once_in(3) =>
            {
                let at = DATA + 0xc00 + self.rng.below(64) * 16;
                self.set_small(4, at);
                self.known[4] = None;
            }
            M::Div | M::Idiv if !self.rng.once_in(3) => {
                // A small dividend, so that the quotient often fits.
                let small = if self.rng.once_in(4) { self.rng.value() & 0x7f } else { 0 };
                self.set_small(2, small);
            }
            M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xrstor
            | M::Xrstor64 => {
                let mask = if self.rng.once_in(3) { 7 } else { self.rng.below(8) };
                self.set_small(0, mask);
                self.set_small(2, 0);
            }
            _ => {}
        }
        match insn.mnemonic() {
            M::Leave => {
                let at = DATA + 0xc00 + self.rng.below(64) * 16;
                self.set_small(5, at);
            }
            // An image in memory that can be loaded.
            M::Xrstor | M::Xrstor64 | M::Fxrstor | M::Fxrstor64 if !self.rng.once_in(4) => {
                self.image(insn)?;
            }
            M::Ldmxcsr | M::Vldmxcsr | M::Fldcw if !self.rng.once_in(4) => {
                let value = match insn.mnemonic() {
                    M::Fldcw => self.rng.next() & 0xffff,
                    _ if self.rng.once_in(2) => 0x1f80 | self.rng.next() & 0xe07f,
                    _ => self.rng.next() & 0xffff,
                };
                let mut store = *insn;
                store.set_code(match insn.mnemonic() {
                    M::Fldcw => Code::Mov_rm16_imm16,
                    _ => Code::Mov_rm32_imm32,
                });
                if insn.mnemonic() == M::Fldcw {
                    store.set_op1_kind(OpKind::Immediate16);
                    store.set_immediate16(value as u16);
                } else {
                    store.set_op1_kind(OpKind::Immediate32);
                    store.set_immediate32(value as u32);
                }
                self.emit(&store, None)?;
            }
            M::Popf | M::Popfq | M::Popfd => {
                // Mostly neither alignment checks nor single steps: and [rsp], ~(AC | TF).
                let mask = match self.rng.below(8) {
                    0 => !0x4_0000u32,
                    1 => !0x100,
                    _ => !0x4_0100,
                };
                let mut and = Instruction::default();
                and.set_code(Code::And_rm32_imm32);
                and.set_op0_kind(OpKind::Memory);
                and.set_memory_base(if self.bitness == 64 { R::RSP } else { R::ESP });
                and.set_op1_kind(OpKind::Immediate32);
                and.set_immediate32(mask);
                self.emit(&and, None)?;
            }
            M::Ret | M::Jmp | M::Call
                if !insn.op_kinds().any(|k| {
                    matches!(k, OpKind::NearBranch64 | OpKind::NearBranch32 | OpKind::NearBranch16)
                }) =>
            {
                self.indirect(insn)?;
            }
            _ => {}
        }
        Some(())
    }

    /// Makes an indirect branch go to the next instruction, mostly.
    fn indirect(&mut self, insn: &mut Instruction) -> Option<()> {
        if self.indirects == 0 && self.rng.once_in(8) {
            return Some(());
        }
        // Registers hold code addresses from now on: a stray branch might make a loop.
        self.indirects += 1;
        // mov eax, target; then push it, or store it, or use it. The branch comes last, and goes to
        // what is behind it.
        let wide = self.bitness == 64;
        const MOV: u64 = 5;
        match insn.mnemonic() {
            M::Ret => {
                let target = self.here() + MOV + 1 + self.length(insn)?;
                self.set_small(0, target);
                let mut push = Instruction::default();
                push.set_code(if wide { Code::Push_r64 } else { Code::Push_r32 });
                push.set_op0_kind(OpKind::Register);
                push.set_op0_register(if wide { R::RAX } else { R::EAX });
                self.emit(&push, None)?;
            }
            _ if insn.op0_kind() == OpKind::Register => {
                insn.set_op0_register(match insn.op0_register().size() {
                    2 => R::AX,
                    4 => R::EAX,
                    _ => R::RAX,
                });
                let target = self.here() + MOV + self.length(insn)?;
                self.set_small(0, target);
            }
            _ => {
                // Through memory.
                insn.set_memory_base(R::None);
                insn.set_memory_index(R::None);
                insn.set_segment_prefix(R::None);
                insn.set_memory_displ_size(if wide { 8 } else { 4 });
                insn.set_memory_displacement64(DATA + 0x200);
                let mut store = Instruction::default();
                store.set_code(if wide { Code::Mov_rm64_r64 } else { Code::Mov_rm32_r32 });
                store.set_op0_kind(OpKind::Memory);
                store.set_memory_displ_size(if wide { 8 } else { 4 });
                store.set_memory_displacement64(DATA + 0x200);
                store.set_op1_kind(OpKind::Register);
                store.set_op1_register(if wide { R::RAX } else { R::EAX });
                let target = self.here() + MOV + self.length(&store)? + self.length(insn)?;
                self.set_small(0, target);
                self.emit(&store, None)?;
            }
        }
        Some(())
    }

    /// Bytes of an instruction that does not depend on where it is.
    fn length(&self, insn: &Instruction) -> Option<u64> {
        let mut encoder = Encoder::try_new(self.bitness).ok()?;
        encoder.encode(insn, self.here()).ok().map(|n| n as u64)
    }

    /// Saves an image where the instruction will restore from, so that it is a good one.
    fn image(&mut self, insn: &Instruction) -> Option<()> {
        let fx = matches!(insn.mnemonic(), M::Fxrstor | M::Fxrstor64);
        let mut save = *insn;
        save.set_code(match insn.mnemonic() {
            M::Fxrstor64 => Code::Fxsave64_m512byte,
            M::Fxrstor => Code::Fxsave_m512byte,
            M::Xrstor64 if self.rng.once_in(2) => Code::Xsavec64_mem,
            M::Xrstor64 => Code::Xsave64_mem,
            _ if self.rng.once_in(2) => Code::Xsavec_mem,
            _ => Code::Xsave_mem,
        });
        if !fx {
            // The header must be zero before: mov qword [header + 8..64], 0
            let mut clear = Instruction::default();
            clear.set_code(Code::Mov_rm32_imm32);
            clear.set_op0_kind(OpKind::Memory);
            clear.set_op1_kind(OpKind::Immediate32);
            clear.set_immediate32(0);
            let mut simple = save;
            // An absolute operand keeps this short.
            simple.set_memory_base(R::None);
            simple.set_memory_index(R::None);
            let _ = simple;
            for at in (0..24).step_by(4) {
                clear.set_memory_base(insn.memory_base());
                clear.set_memory_index(insn.memory_index());
                clear.set_memory_index_scale(insn.memory_index_scale());
                clear.set_memory_displ_size(if self.bitness == 64 { 8 } else { 4 });
                clear
                    .set_memory_displacement64(insn.memory_displacement64().wrapping_add(512 + at));
                self.emit(&clear, None)?;
            }
        }
        self.emit(&save, None)
    }

    /// `cmp r, r` before an instruction that reads flags which are undefined.
    fn define_flags(&mut self, read: u32) {
        if flag_bits(read) & self.undefined != 0 {
            let mut cmp = Instruction::default();
            cmp.set_code(Code::Cmp_r32_rm32);
            cmp.set_op0_kind(OpKind::Register);
            cmp.set_op0_register(R::EAX);
            cmp.set_op1_kind(OpKind::Register);
            cmp.set_op1_register(R::EDX);
            let _ = self.emit(&cmp, None);
        }
    }

    fn emit(&mut self, insn: &Instruction, form: Option<Form>) -> Option<()> {
        let mut insn = *insn;
        let at = self.here();
        let near = |k: OpKind| {
            matches!(k, OpKind::NearBranch64 | OpKind::NearBranch32 | OpKind::NearBranch16)
        };
        if insn.op_kinds().any(near) {
            // Over the two bytes that follow: the length is found by a first try. With 16 bits of
            // operand size the branch is cut to 16 bits, which leads out of the code.
            let cut =
                if insn.op_kinds().any(|k| k == OpKind::NearBranch16) { 0xffff } else { u64::MAX };
            insn.set_near_branch64((at + 16) & cut);
            let length = self.length(&insn)?;
            insn.set_near_branch64((at + length + 2) & cut);
        }
        let mut encoder = Encoder::try_new(self.bitness).ok()?;
        encoder.encode(&insn, at).ok()?;
        self.code.extend(encoder.take_buffer());
        if let Some(form) = form {
            self.forms.push((at, self.here(), form));
        }
        self.note(&insn);
        (self.code.len() < MAX_CODE).then_some(())
    }

    /// What `insn` does to what is known.
    fn note(&mut self, insn: &Instruction) {
        for used in self.info.info(insn).used_registers() {
            let writes = !matches!(
                used.access(),
                OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
            );
            if writes && used.register().is_gpr() {
                self.known[used.register().full_register().number()] = None;
            }
        }
        self.undefined &= !defined_flags(insn);
        self.undefined |= flag_bits(insn.rflags_undefined());
        if insn.mnemonic() == M::Bsf || insn.mnemonic() == M::Bsr {
            // Intel leaves these alone, AMD defines them.
            self.undefined |= 0x895;
        }
    }
}

const _: () = assert!(CODE_SIZE >= 0x2000);
