//! Integer arithmetic by the host's own instructions, flags included.
//!
//! Each function runs one instruction on values and returns the result with the flags it left. Where an
//! instruction keeps some flags (or all, as a shift by zero does), the guest's are loaded first; so they are
//! for multiplications, which leave those without a defined value alone on some processors.

use std::arch::asm;

use crate::flags::Cc;
use crate::int::Int;

/// Arithmetic on one operand width.
#[allow(missing_docs)]
pub trait Alu: Int {
    fn add(self, b: Self) -> (Self, Cc);
    fn adc(self, b: Self, cc: Cc) -> (Self, Cc);
    fn sub(self, b: Self) -> (Self, Cc);
    fn sbb(self, b: Self, cc: Cc) -> (Self, Cc);
    fn and(self, b: Self) -> (Self, Cc);
    fn or(self, b: Self) -> (Self, Cc);
    fn xor(self, b: Self) -> (Self, Cc);
    fn inc(self, cc: Cc) -> (Self, Cc);
    fn dec(self, cc: Cc) -> (Self, Cc);
    fn neg(self) -> (Self, Cc);
    fn shl(self, count: u8, cc: Cc) -> (Self, Cc);
    fn shr(self, count: u8, cc: Cc) -> (Self, Cc);
    fn sar(self, count: u8, cc: Cc) -> (Self, Cc);
    fn rol(self, count: u8, cc: Cc) -> (Self, Cc);
    fn ror(self, count: u8, cc: Cc) -> (Self, Cc);
    fn rcl(self, count: u8, cc: Cc) -> (Self, Cc);
    fn rcr(self, count: u8, cc: Cc) -> (Self, Cc);
    /// MUL: low half, high half, flags.
    fn mul(self, b: Self, cc: Cc) -> (Self, Self, Cc);
    /// One-operand IMUL: low half, high half, flags.
    fn imul_wide(self, b: Self, cc: Cc) -> (Self, Self, Cc);
}

/// Arithmetic that 8-bit operands have not.
#[allow(missing_docs)]
pub trait AluWide: Alu {
    fn imul(self, b: Self, cc: Cc) -> (Self, Cc);
    /// BSF: `self` is what stays if `b` is zero.
    fn bsf(self, b: Self, cc: Cc) -> (Self, Cc);
    fn bsr(self, b: Self, cc: Cc) -> (Self, Cc);
    fn shld(self, b: Self, count: u8, cc: Cc) -> (Self, Cc);
    fn shrd(self, b: Self, count: u8, cc: Cc) -> (Self, Cc);
}

macro_rules! binary {
    ($name:ident, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(self, b: Self) -> (Self, Cc) {
            let mut d = self;
            let cc: Cc;
            // SAFETY: computes on registers only.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {d", $m, "}, {s", $m, "}"),
                    "lahf", "seto al",
                    d = inout($class) d, s = in($class) b, out("ax") cc,
                    options(pure, nomem, nostack),
                );
            }
            (d, cc)
        }
    };
}

macro_rules! with_carry {
    ($name:ident, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(self, b: Self, cc: Cc) -> (Self, Cc) {
            let mut d = self;
            let out: Cc;
            // SAFETY: computes on registers only.
            unsafe {
                asm!(
                    "bt {c:e}, 8",
                    concat!(stringify!($name), " {d", $m, "}, {s", $m, "}"),
                    "lahf", "seto al",
                    c = in(reg) u32::from(cc), d = inout($class) d, s = in($class) b, out("ax") out,
                    options(pure, nomem, nostack),
                );
            }
            (d, out)
        }
    };
}

macro_rules! keeps_carry {
    ($name:ident, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(self, cc: Cc) -> (Self, Cc) {
            let mut d = self;
            let out: Cc;
            // SAFETY: computes on registers only.
            unsafe {
                asm!(
                    "bt {c:e}, 8",
                    concat!(stringify!($name), " {d", $m, "}"),
                    "lahf", "seto al",
                    c = in(reg) u32::from(cc), d = inout($class) d, out("ax") out,
                    options(pure, nomem, nostack),
                );
            }
            (d, out)
        }
    };
}

/// Shifts and rotates: a count of zero keeps all flags, rotates keep most, so all are loaded.
macro_rules! shift {
    ($name:ident, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(self, count: u8, cc: Cc) -> (Self, Cc) {
            let mut d = self;
            let mut flags = cc;
            // SAFETY: computes on registers only.
            unsafe {
                asm!(
                    "add al, 127", "sahf",
                    concat!(stringify!($name), " {d", $m, "}, cl"),
                    "lahf", "seto al",
                    d = inout($class) d, in("cl") count, inout("ax") flags,
                    options(pure, nomem, nostack),
                );
            }
            (d, flags)
        }
    };
}

macro_rules! double_shift {
    ($name:ident, $m:literal) => {
        #[inline(always)]
        fn $name(self, b: Self, count: u8, cc: Cc) -> (Self, Cc) {
            let mut d = self;
            let mut flags = cc;
            // SAFETY: computes on registers only.
            unsafe {
                asm!(
                    "add al, 127", "sahf",
                    concat!(stringify!($name), " {d", $m, "}, {s", $m, "}, cl"),
                    "lahf", "seto al",
                    d = inout(reg) d, s = in(reg) b, in("cl") count, inout("ax") flags,
                    options(pure, nomem, nostack),
                );
            }
            (d, flags)
        }
    };
}

/// BSF, BSR and two-operand IMUL.
macro_rules! with_flags {
    ($name:ident, $m:literal) => {
        #[inline(always)]
        fn $name(self, b: Self, cc: Cc) -> (Self, Cc) {
            let mut d = self;
            let mut flags = cc;
            // SAFETY: computes on registers only.
            unsafe {
                asm!(
                    "add al, 127", "sahf",
                    concat!(stringify!($name), " {d", $m, "}, {s", $m, "}"),
                    "lahf", "seto al",
                    d = inout(reg) d, s = in(reg) b, inout("ax") flags,
                    options(pure, nomem, nostack),
                );
            }
            (d, flags)
        }
    };
}

macro_rules! mul_byte {
    ($name:ident, $instruction:literal, $m:literal, $ax:tt, $dx:tt) => {
        #[inline(always)]
        fn $name(self, b: Self, cc: Cc) -> (Self, Self, Cc) {
            let product: u16;
            let mut flags = cc;
            // SAFETY: computes on registers only.
            unsafe {
                asm!("add al, 127", "sahf", "mov al, {a}", concat!($instruction, " {b}"),
                    "mov {p:x}, ax", "lahf", "seto al",
                    a = in(reg_byte) self, b = in(reg_byte) b, p = out(reg) product,
                    inout("ax") flags, options(pure, nomem, nostack));
            }
            (product as u8, (product >> 8) as u8, flags)
        }
    };
}

macro_rules! mul_pair {
    ($name:ident, $instruction:literal, $m:literal, $ax:tt, $dx:tt) => {
        #[inline(always)]
        fn $name(self, b: Self, cc: Cc) -> (Self, Self, Cc) {
            let (low, high): (Self, Self);
            let mut flags = cc;
            // SAFETY: computes on registers only.
            unsafe {
                asm!("add al, 127", "sahf", concat!("mov ", $ax, ", {a", $m, "}"),
                    concat!($instruction, " {b", $m, "}"), concat!("mov {l", $m, "}, ", $ax),
                    "lahf", "seto al",
                    a = in(reg) self, b = in(reg) b, l = out(reg) low, inout("ax") flags,
                    out($dx) high, options(pure, nomem, nostack));
            }
            (low, high, flags)
        }
    };
}

macro_rules! alu {
    ($t:ty, $class:ident, $m:literal, $mul:ident, $ax:tt, $dx:tt) => {
        impl Alu for $t {
            binary!(add, $class, $m);
            binary!(sub, $class, $m);
            binary!(and, $class, $m);
            binary!(or, $class, $m);
            binary!(xor, $class, $m);
            with_carry!(adc, $class, $m);
            with_carry!(sbb, $class, $m);
            keeps_carry!(inc, $class, $m);
            keeps_carry!(dec, $class, $m);
            shift!(shl, $class, $m);
            shift!(shr, $class, $m);
            shift!(sar, $class, $m);
            shift!(rol, $class, $m);
            shift!(ror, $class, $m);
            shift!(rcl, $class, $m);
            shift!(rcr, $class, $m);
            #[inline(always)]
            fn neg(self) -> (Self, Cc) {
                let mut d = self;
                let cc: Cc;
                // SAFETY: computes on registers only.
                unsafe {
                    asm!(concat!("neg {d", $m, "}"), "lahf", "seto al",
                        d = inout($class) d, out("ax") cc, options(pure, nomem, nostack));
                }
                (d, cc)
            }
            $mul!(mul, "mul", $m, $ax, $dx);
            $mul!(imul_wide, "imul", $m, $ax, $dx);
        }
    };
}

macro_rules! wide {
    ($t:ty, $m:literal) => {
        impl AluWide for $t {
            with_flags!(imul, $m);
            with_flags!(bsf, $m);
            with_flags!(bsr, $m);
            double_shift!(shld, $m);
            double_shift!(shrd, $m);
        }
    };
}

alu!(u8, reg_byte, "", mul_byte, "al", "ah");
alu!(u16, reg, ":x", mul_pair, "ax", "dx");
alu!(u32, reg, ":e", mul_pair, "eax", "edx");
alu!(u64, reg, "", mul_pair, "rax", "rdx");
wide!(u16, ":x");
wide!(u32, ":e");
wide!(u64, "");

/// Conditions by number, as in the low four bits of Jcc, SETcc and CMOVcc.
#[inline(always)]
pub fn condition<const C: u8>(cc: Cc) -> bool {
    use crate::flags::cc as bits;
    let less = |cc: Cc| (cc >> 15 ^ cc) & 1 != 0;
    let holds = match C >> 1 {
        0 => cc & bits::OF != 0,
        1 => cc & bits::CF != 0,
        2 => cc & bits::ZF != 0,
        3 => cc & (bits::CF | bits::ZF) != 0,
        4 => cc & bits::SF != 0,
        5 => cc & bits::PF != 0,
        6 => less(cc),
        _ => cc & bits::ZF != 0 || less(cc),
    };
    holds != (C & 1 != 0)
}
