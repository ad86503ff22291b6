//! Which handler runs an instruction.

use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind};

use super::{arith, atomic, bcd, flow, moves, stack, string};
use crate::block::Selected;
use crate::cpu::Mode;
use crate::op::{Handler, Op, op_flags};

/// Picks a function by operand size.
macro_rules! sized {
    ($size:expr, $f:path) => {{
        use $f as f;
        match $size {
            1 => f::<u8> as Handler,
            2 => f::<u16>,
            4 => f::<u32>,
            8 => f::<u64>,
            _ => return None,
        }
    }};
    ($size:expr, $f:path, $k:literal) => {{
        use $f as f;
        match $size {
            1 => f::<u8, $k> as Handler,
            2 => f::<u16, $k>,
            4 => f::<u32, $k>,
            8 => f::<u64, $k>,
            _ => return None,
        }
    }};
}

/// The same for functions without an 8-bit form.
macro_rules! sized_wide {
    ($size:expr, $f:path) => {{
        use $f as f;
        match $size {
            2 => f::<u16> as Handler,
            4 => f::<u32>,
            8 => f::<u64>,
            _ => return None,
        }
    }};
    ($size:expr, $f:path, $k:literal) => {{
        use $f as f;
        match $size {
            2 => f::<u16, $k> as Handler,
            4 => f::<u32, $k>,
            8 => f::<u64, $k>,
            _ => return None,
        }
    }};
}

/// Picks a function by size and by number.
macro_rules! sized_kind {
    ($size:expr, $f:path, $k:expr, [$($n:literal)*], $by:ident) => {
        match $k {
            $($n => $by!($size, $f, $n),)*
            _ => return None,
        }
    };
}

/// Picks a function by condition.
macro_rules! by_condition {
    ($c:expr, $f:path, [$($n:literal)*]) => {{
        use $f as f;
        match $c {
            $($n => f::<$n> as Handler,)*
            _ => return None,
        }
    }};
    ($c:expr, $f:path) => {
        by_condition!($c, $f, [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15])
    };
}

macro_rules! sized_condition {
    ($size:expr, $c:expr, $f:path) => {
        sized_kind!($size, $f, $c, [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], sized_wide)
    };
}

/// What the operands of an instruction are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    None,
    Register,
    Memory,
    Immediate,
}

fn form(insn: &Instruction, operand: u32) -> Form {
    if operand >= insn.op_count() {
        return Form::None;
    }
    match insn.op_kind(operand) {
        OpKind::Register => Form::Register,
        OpKind::Memory => Form::Memory,
        OpKind::Immediate8
        | OpKind::Immediate8_2nd
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Form::Immediate,
        _ => Form::None,
    }
}

/// Bytes of an operand in a register or in memory.
fn operand_size(insn: &Instruction, operand: u32) -> usize {
    match insn.op_kind(operand) {
        OpKind::Register => insn.op_register(operand).size(),
        _ => insn.memory_size().size(),
    }
}

/// Number of a condition, 0 to 15, in the order of the opcodes.
fn condition(insn: &Instruction) -> u8 {
    match insn.condition_code() {
        ConditionCode::None => u8::MAX,
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
    }
}

/// The handler for an integer instruction whose operands are in `op`; `None` if it is not one of ours.
pub(crate) fn select(insn: &Instruction, mode: Mode, op: &mut Op) -> Option<Selected> {
    if let Some(selected) = select_flow(insn, mode, op) {
        return Some(selected);
    }
    let handler = select_data(insn, mode, op)?;
    Some(Selected { handler, ends: false })
}

fn select_data(insn: &Instruction, mode: Mode, op: &mut Op) -> Option<Handler> {
    use Form::{Immediate, Memory, None as Nothing, Register};
    use Mnemonic as M;
    let forms = (form(insn, 0), form(insn, 1));
    let size = if insn.op_count() > 0 { operand_size(insn, 0) } else { 0 };
    let locked = op.flags & op_flags::LOCK != 0;
    let mnemonic = insn.mnemonic();
    Some(match mnemonic {
        M::Mov => {
            // Moves of control, debug and segment registers are the system's.
            if [0, 1]
                .iter()
                .any(|&i| insn.op_kind(i) == OpKind::Register && !insn.op_register(i).is_gpr())
            {
                return None;
            }
            match forms {
                (Register, Register) => sized!(size, moves::mov_rr),
                (Register, Immediate) => sized!(size, moves::mov_ri),
                (Register, Memory) => sized!(size, moves::mov_rm),
                (Memory, Register) => sized!(size, moves::mov_mr),
                (Memory, Immediate) => sized!(size, moves::mov_mi),
                _ => return None,
            }
        }
        M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor | M::Cmp | M::Test => {
            let kind = match mnemonic {
                M::Add => arith::kind::ADD,
                M::Or => arith::kind::OR,
                M::Adc => arith::kind::ADC,
                M::Sbb => arith::kind::SBB,
                M::And => arith::kind::AND,
                M::Sub => arith::kind::SUB,
                M::Xor => arith::kind::XOR,
                M::Cmp => arith::kind::CMP,
                _ => arith::kind::TEST,
            };
            match (forms, locked) {
                ((Register, Register), _) => {
                    sized_kind!(size, arith::alu_rr, kind, [0 1 2 3 4 5 6 7 8], sized)
                }
                ((Register, Immediate), _) => {
                    sized_kind!(size, arith::alu_ri, kind, [0 1 2 3 4 5 6 7 8], sized)
                }
                ((Register, Memory), _) => {
                    sized_kind!(size, arith::alu_rm, kind, [0 1 2 3 4 5 6 7 8], sized)
                }
                ((Memory, Register), false) => {
                    sized_kind!(size, arith::alu_mr, kind, [0 1 2 3 4 5 6 7 8], sized)
                }
                ((Memory, Immediate), false) => {
                    sized_kind!(size, arith::alu_mi, kind, [0 1 2 3 4 5 6 7 8], sized)
                }
                ((Memory, Register), true) => {
                    sized_kind!(size, arith::alu_mr_lock, kind, [0 1 2 3 4 5 6], sized)
                }
                ((Memory, Immediate), true) => {
                    sized_kind!(size, arith::alu_mi_lock, kind, [0 1 2 3 4 5 6], sized)
                }
                _ => return None,
            }
        }
        M::Inc | M::Dec | M::Neg | M::Not => {
            let kind = match mnemonic {
                M::Inc => arith::unary::INC,
                M::Dec => arith::unary::DEC,
                M::Neg => arith::unary::NEG,
                _ => arith::unary::NOT,
            };
            match (forms.0, locked) {
                (Register, _) => sized_kind!(size, arith::unary_r, kind, [0 1 2 3], sized),
                (_, false) => sized_kind!(size, arith::unary_m, kind, [0 1 2 3], sized),
                (_, true) => sized_kind!(size, arith::unary_m_lock, kind, [0 1 2 3], sized),
            }
        }
        M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shl | M::Shr | M::Sal | M::Sar => {
            let kind = match mnemonic {
                M::Rol => 0u8,
                M::Ror => 1,
                M::Rcl => 2,
                M::Rcr => 3,
                M::Shr => 5,
                M::Sar => 7,
                _ => 4,
            };
            match forms {
                (Register, Immediate) => {
                    sized_kind!(size, arith::shift_ri, kind, [0 1 2 3 4 5 7], sized)
                }
                (Register, _) => sized_kind!(size, arith::shift_rc, kind, [0 1 2 3 4 5 7], sized),
                (_, Immediate) => sized_kind!(size, arith::shift_mi, kind, [0 1 2 3 4 5 7], sized),
                _ => sized_kind!(size, arith::shift_mc, kind, [0 1 2 3 4 5 7], sized),
            }
        }
        M::Shld | M::Shrd => {
            op.aux = u8::from(form(insn, 2) == Register);
            match (forms.0, mnemonic) {
                (Register, M::Shld) => sized_wide!(size, arith::double_r, false),
                (Register, _) => sized_wide!(size, arith::double_r, true),
                (_, M::Shld) => sized_wide!(size, arith::double_m, false),
                _ => sized_wide!(size, arith::double_m, true),
            }
        }
        M::Imul if insn.op_count() == 3 => match forms.1 {
            Register => sized_wide!(size, arith::imul_rri),
            _ => sized_wide!(size, arith::imul_rmi),
        },
        M::Imul if insn.op_count() == 2 => match forms.1 {
            Register => sized_wide!(size, arith::imul_rr),
            _ => sized_wide!(size, arith::imul_rm),
        },
        M::Mul | M::Imul | M::Div | M::Idiv => {
            let kind = match mnemonic {
                M::Mul => arith::wide::MUL,
                M::Imul => arith::wide::IMUL,
                M::Div => arith::wide::DIV,
                _ => arith::wide::IDIV,
            };
            match forms.0 {
                Register => sized_kind!(size, arith::wide_r, kind, [0 1 2 3], sized),
                _ => sized_kind!(size, arith::wide_m, kind, [0 1 2 3], sized),
            }
        }
        M::Bsf | M::Bsr => match (forms.1, mnemonic) {
            (Register, M::Bsf) => sized_wide!(size, arith::scan_r, false),
            (Register, _) => sized_wide!(size, arith::scan_r, true),
            (_, M::Bsf) => sized_wide!(size, arith::scan_m, false),
            _ => sized_wide!(size, arith::scan_m, true),
        },
        M::Bt | M::Bts | M::Btr | M::Btc => {
            let kind = match mnemonic {
                M::Bt => 0u8,
                M::Bts => 1,
                M::Btr => 2,
                _ => 3,
            };
            op.aux = u8::from(forms.1 == Immediate);
            match forms.0 {
                Register => sized_kind!(size, arith::bit_r, kind, [0 1 2 3], sized_wide),
                _ => sized_kind!(size, arith::bit_m, kind, [0 1 2 3], sized_wide),
            }
        }
        M::Movzx | M::Movsx | M::Movsxd => select_extension(insn, mnemonic, forms.1, size)?,
        M::Lea => sized_wide!(size, moves::lea),
        M::Xchg => match forms {
            (Register, Register) => sized!(size, moves::xchg_rr),
            (Register, _) => {
                op.src = op.dst;
                sized!(size, atomic::xchg_m)
            }
            _ => sized!(size, atomic::xchg_m),
        },
        M::Xadd => match forms.0 {
            Register => sized!(size, atomic::xadd_r),
            _ => sized!(size, atomic::xadd_m),
        },
        M::Cmpxchg => match forms.0 {
            Register => sized!(size, atomic::cmpxchg_r),
            _ => sized!(size, atomic::cmpxchg_m),
        },
        M::Cmpxchg8b => atomic::cmpxchg8b,
        M::Cmpxchg16b => atomic::cmpxchg16b,
        M::Bswap => sized_wide!(size, moves::bswap),
        M::Cbw => moves::widen::<u16>,
        M::Cwde => moves::widen::<u32>,
        M::Cdqe => moves::widen::<u64>,
        M::Cwd => moves::sign::<u16>,
        M::Cdq => moves::sign::<u32>,
        M::Cqo => moves::sign::<u64>,
        M::Xlatb => moves::xlat,
        M::Lahf => moves::lahf,
        M::Sahf => moves::sahf,
        M::Salc => moves::salc,
        M::Clc => moves::clc,
        M::Stc => moves::stc,
        M::Cmc => moves::cmc,
        M::Cld => moves::cld,
        M::Std => moves::std,
        M::Nop
        | M::Fnop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Cldemote
        | M::Rdsspd
        | M::Rdsspq
        | M::Reservednop
            if mnemonic != M::Fnop =>
        {
            moves::nop
        }
        M::Push | M::Pop => select_stack(insn, mode, op, mnemonic == M::Push, forms.0)?,
        M::Pusha => stack::pusha::<u16>,
        M::Pushad => stack::pusha::<u32>,
        M::Popa => stack::popa::<u16>,
        M::Popad => stack::popa::<u32>,
        M::Leave => match (mode, stack_width(insn)) {
            (Mode::Code64, 8) => stack::leave64,
            (_, 2) => stack::leave::<u16>,
            (_, 4) => stack::leave::<u32>,
            _ => stack::leave::<u64>,
        },
        M::Enter => {
            op.imm = u64::from(insn.immediate16());
            op.extra = u32::from(insn.immediate8_2nd());
            match insn.code() {
                iced_x86::Code::Enterw_imm16_imm8 => stack::enter::<u16>,
                iced_x86::Code::Enterd_imm16_imm8 => stack::enter::<u32>,
                _ => stack::enter::<u64>,
            }
        }
        M::Aaa => bcd::ascii_adjust::<false>,
        M::Aas => bcd::ascii_adjust::<true>,
        M::Aam => bcd::aam,
        M::Aad => bcd::aad,
        M::Daa => bcd::decimal_adjust::<false>,
        M::Das => bcd::decimal_adjust::<true>,
        M::Movsb
        | M::Movsw
        | M::Movsd
        | M::Movsq
        | M::Stosb
        | M::Stosw
        | M::Stosd
        | M::Stosq
        | M::Lodsb
        | M::Lodsw
        | M::Lodsd
        | M::Lodsq
        | M::Scasb
        | M::Scasw
        | M::Scasd
        | M::Scasq
        | M::Cmpsb
        | M::Cmpsw
        | M::Cmpsd
        | M::Cmpsq => select_string(insn, op)?,
        _ => match condition(insn) {
            u8::MAX => return None,
            c => match (mnemonic_family(insn), forms) {
                (Family::Set, (Register, _)) => by_condition!(c, moves::setcc_r),
                (Family::Set, (Memory, _)) => by_condition!(c, moves::setcc_m),
                (Family::Move, (_, Register)) => sized_condition!(size, c, moves::cmov_r),
                (Family::Move, (_, Memory)) => sized_condition!(size, c, moves::cmov_m),
                (_, (Nothing, _)) | (_, _) => return None,
            },
        },
    })
}

/// Conditional instructions other than jumps.
enum Family {
    Set,
    Move,
    Other,
}

fn mnemonic_family(insn: &Instruction) -> Family {
    let integer = |i| insn.op_kind(i) != OpKind::Register || insn.op_register(i).is_gpr();
    match insn.op_count() {
        1 if integer(0) && operand_size(insn, 0) == 1 => Family::Set,
        2 if integer(0) && integer(1) && insn.op_kind(0) == OpKind::Register => Family::Move,
        _ => Family::Other,
    }
}

fn select_extension(
    insn: &Instruction,
    mnemonic: Mnemonic,
    source: Form,
    size: usize,
) -> Option<Handler> {
    let from = operand_size(insn, 1);
    macro_rules! pick {
        ($f:path) => {{
            use $f as f;
            match (size, from) {
                (2, 1) => f::<u16, u8> as Handler,
                (4, 1) => f::<u32, u8>,
                (8, 1) => f::<u64, u8>,
                (2, 2) => f::<u16, u16>,
                (4, 2) => f::<u32, u16>,
                (8, 2) => f::<u64, u16>,
                // MOVSXD with a 16-bit target takes 16 bits of its source.
                (2, 4) => f::<u16, u16>,
                (4, 4) => f::<u32, u32>,
                (8, 4) => f::<u64, u32>,
                _ => return None,
            }
        }};
    }
    Some(match (mnemonic == Mnemonic::Movzx, source) {
        (true, Form::Register) => pick!(moves::movzx_r),
        (true, _) => pick!(moves::movzx_m),
        (false, Form::Register) => pick!(moves::movsx_r),
        (false, _) => pick!(moves::movsx_m),
    })
}

/// Bytes that a stack instruction moves.
fn stack_width(insn: &Instruction) -> usize {
    match insn.mnemonic() {
        Mnemonic::Leave => match insn.code() {
            iced_x86::Code::Leavew => 2,
            iced_x86::Code::Leaved => 4,
            _ => 8,
        },
        _ => insn.stack_pointer_increment().unsigned_abs() as usize,
    }
}

fn select_stack(
    insn: &Instruction,
    mode: Mode,
    op: &mut Op,
    push: bool,
    form: Form,
) -> Option<Handler> {
    if form == Form::Register && !insn.op0_register().is_gpr() {
        return None;
    }
    let size = stack_width(insn);
    op.aux = size as u8;
    let fast = mode == Mode::Code64 && size == 8;
    Some(match (push, form, fast) {
        (true, Form::Register, true) => stack::push64_r,
        (true, Form::Immediate, true) => stack::push64_i,
        (true, Form::Memory, true) => stack::push64_m,
        (false, Form::Register, true) => stack::pop64_r,
        (true, Form::Register, false) => stack::push_r,
        (true, Form::Immediate, false) => stack::push_i,
        (true, Form::Memory, false) => sized_wide!(size, stack::push_m),
        (false, Form::Register, false) => sized_wide!(size, stack::pop_r),
        (false, Form::Memory, _) => {
            // The address counts with rSP after the increment.
            sized_wide!(size, stack::pop_m)
        }
        _ => return None,
    })
}

fn select_string(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    use Mnemonic as M;
    // The SSE2 instructions of these names have vector operands.
    if (0..insn.op_count())
        .any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_xmm())
        || insn.op_count() > 2
        || insn.op_kind(0) == OpKind::Memory
    {
        return None;
    }
    op.aux = 0;
    if insn.has_repne_prefix() {
        op.aux = string::rep::REPNE;
    } else if insn.has_rep_prefix() {
        op.aux = string::rep::REP;
    }
    Some(match insn.mnemonic() {
        M::Movsb => string::movs::<u8>,
        M::Movsw => string::movs::<u16>,
        M::Movsd => string::movs::<u32>,
        M::Movsq => string::movs::<u64>,
        M::Stosb => string::stos::<u8>,
        M::Stosw => string::stos::<u16>,
        M::Stosd => string::stos::<u32>,
        M::Stosq => string::stos::<u64>,
        M::Lodsb => string::lods::<u8>,
        M::Lodsw => string::lods::<u16>,
        M::Lodsd => string::lods::<u32>,
        M::Lodsq => string::lods::<u64>,
        M::Scasb => string::scas::<u8>,
        M::Scasw => string::scas::<u16>,
        M::Scasd => string::scas::<u32>,
        M::Scasq => string::scas::<u64>,
        M::Cmpsb => string::cmps::<u8>,
        M::Cmpsw => string::cmps::<u16>,
        M::Cmpsd => string::cmps::<u32>,
        _ => string::cmps::<u64>,
    })
}

fn select_flow(insn: &Instruction, mode: Mode, op: &mut Op) -> Option<Selected> {
    use Mnemonic as M;
    let near = matches!(
        insn.op_kind(0),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    );
    let direct = insn.op_count() > 0 && near;
    let wide = mode == Mode::Code64;
    let ends = |handler: Handler| Some(Selected { handler, ends: true });
    if direct {
        let width = match insn.op_kind(0) {
            OpKind::NearBranch16 => 2u8,
            OpKind::NearBranch32 => 4,
            _ => 8,
        };
        // Decoded at address zero: the target is the offset from the block's start.
        op.imm = match width {
            2 => i64::from(insn.near_branch16() as i16) as u64,
            4 => i64::from(insn.near_branch32() as i32) as u64,
            _ => insn.near_branch64(),
        };
        op.extra = if width == 2 { 0xffff } else { 0xffff_ffff };
        let condition = condition(insn);
        return ends(match insn.mnemonic() {
            M::Jmp if wide => flow::jmp::<true>,
            M::Jmp => flow::jmp::<false>,
            M::Call if wide && width == 8 => flow::call64,
            M::Call => {
                op.aux = width;
                flow::call_legacy
            }
            M::Jcxz | M::Jecxz | M::Jrcxz | M::Loop | M::Loope | M::Loopne => {
                op.aux = count_size(insn);
                match (insn.mnemonic(), wide) {
                    (M::Loop, true) => flow::loop_cx::<true, 0>,
                    (M::Loop, false) => flow::loop_cx::<false, 0>,
                    (M::Loope, true) => flow::loop_cx::<true, 1>,
                    (M::Loope, false) => flow::loop_cx::<false, 1>,
                    (M::Loopne, true) => flow::loop_cx::<true, 2>,
                    (M::Loopne, false) => flow::loop_cx::<false, 2>,
                    (_, true) => flow::jrcxz::<true>,
                    (_, false) => flow::jrcxz::<false>,
                }
            }
            _ if condition != u8::MAX && wide => by_condition!(condition, flow::jcc),
            _ if condition != u8::MAX => by_condition!(condition, flow::jcc_legacy),
            _ => return None,
        });
    }
    let form = form(insn, 0);
    match insn.mnemonic() {
        M::Jmp | M::Call if matches!(form, Form::Register | Form::Memory) => {
            if insn.is_jmp_far_indirect() || insn.is_call_far_indirect() {
                return None;
            }
            let size = operand_size(insn, 0);
            let call = insn.mnemonic() == M::Call;
            ends(match (call, form, size) {
                (false, Form::Register, 8) => flow::jmp_r64,
                (false, _, 8) => flow::jmp_m64,
                (true, Form::Register, 8) => flow::call_r64,
                (true, _, 8) => flow::call_m64,
                (false, Form::Register, _) => sized_wide!(size, flow::jmp_r),
                (false, ..) => sized_wide!(size, flow::jmp_m),
                (true, Form::Register, _) => sized_wide!(size, flow::call_r),
                (true, ..) => sized_wide!(size, flow::call_m),
            })
        }
        M::Ret => {
            op.imm = if insn.op_count() > 0 { u64::from(insn.immediate16()) } else { 0 };
            use iced_x86::Code as C;
            ends(match insn.code() {
                C::Retnq | C::Retnq_imm16 => flow::ret64,
                C::Retnd | C::Retnd_imm16 => flow::ret::<u32>,
                _ => flow::ret::<u16>,
            })
        }
        _ => None,
    }
}

/// Bytes of the counter of JCXZ and LOOP.
fn count_size(insn: &Instruction) -> u8 {
    use iced_x86::Code as C;
    match insn.code() {
        C::Jcxz_rel8_16
        | C::Jcxz_rel8_32
        | C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX => 2,
        C::Jecxz_rel8_16
        | C::Jecxz_rel8_32
        | C::Jecxz_rel8_64
        | C::Loop_rel8_16_ECX
        | C::Loop_rel8_32_ECX
        | C::Loop_rel8_64_ECX
        | C::Loope_rel8_16_ECX
        | C::Loope_rel8_32_ECX
        | C::Loope_rel8_64_ECX
        | C::Loopne_rel8_16_ECX
        | C::Loopne_rel8_32_ECX
        | C::Loopne_rel8_64_ECX => 4,
        _ => 8,
    }
}
