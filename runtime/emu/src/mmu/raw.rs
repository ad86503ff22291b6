//! Accesses to guest RAM through its mapping: the unsafe part of the MMU.
//!
//! Guest memory is shared with other vCPUs and devices at any time, so it is never seen through
//! references: each access is one host instruction of the guest's own width, which makes it as atomic
//! and as ordered as the guest's (invariant 13).

use std::arch::asm;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::flags::Cc;
use crate::int::Int;

/// What bytes of zero are a value of.
///
/// # Safety
/// They are.
pub unsafe trait Zero {}

// SAFETY: an integer.
unsafe impl Zero for u32 {}

/// So many zeros, of memory that is not touched before they are.
pub fn zeros<T: Zero>(count: usize) -> Box<[T]> {
    // SAFETY: as the trait promises.
    unsafe { Box::new_zeroed_slice(count).assume_init() }
}

/// An address inside the mapping of guest RAM.
///
/// Made by the MMU alone, for an access that ends in the same page, and used up within the op that
/// asked for it: the mapping lives as long as the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostAddr(u64);

impl HostAddr {
    /// # Safety
    /// `address` lies in a mapping of guest RAM that outlives the value, and what is accessed
    /// through the value does not reach beyond that mapping.
    #[inline(always)]
    pub(super) unsafe fn new(address: u64) -> Self {
        Self(address)
    }

    /// As a number: identifies the byte of guest RAM.
    #[inline(always)]
    pub fn addr(self) -> u64 {
        self.0
    }

    /// As a pointer, for host stubs.
    #[inline(always)]
    pub fn ptr(self) -> *mut u8 {
        self.0 as *mut u8
    }

    /// Bytes from here to the end of the page.
    #[inline(always)]
    pub fn to_page_end(self) -> usize {
        4096 - (self.0 & 0xfff) as usize
    }

    /// The address `offset` further on, which must be in the same page.
    #[inline(always)]
    #[allow(clippy::should_implement_trait)]
    pub fn add(self, offset: usize) -> Self {
        debug_assert!((self.0 & 0xfff) as usize + offset < 4096);
        Self(self.0 + offset as u64)
    }

    /// Loads a `T` with one instruction.
    #[inline(always)]
    pub fn load<T: Int>(self) -> T {
        debug_assert!(T::SIZE <= self.to_page_end());
        let value: u64;
        // SAFETY: the type's contract: mapped memory up to the page's end, and the access fits.
        unsafe {
            match T::SIZE {
                1 => {
                    asm!("movzx {v:e}, byte ptr [{p}]", v = lateout(reg) value, p = in(reg) self.0,
                    options(nostack, preserves_flags, readonly))
                }
                2 => {
                    asm!("movzx {v:e}, word ptr [{p}]", v = lateout(reg) value, p = in(reg) self.0,
                    options(nostack, preserves_flags, readonly))
                }
                4 => asm!("mov {v:e}, dword ptr [{p}]", v = lateout(reg) value, p = in(reg) self.0,
                    options(nostack, preserves_flags, readonly)),
                _ => asm!("mov {v}, qword ptr [{p}]", v = lateout(reg) value, p = in(reg) self.0,
                    options(nostack, preserves_flags, readonly)),
            }
        }
        T::truncate(value)
    }

    /// Stores a `T` with one instruction.
    #[inline(always)]
    pub fn store<T: Int>(self, value: T) {
        debug_assert!(T::SIZE <= self.to_page_end());
        let v = value.zext();
        // SAFETY: as in `load`.
        unsafe {
            match T::SIZE {
                1 => asm!("mov byte ptr [{p}], {v}", v = in(reg_byte) v as u8, p = in(reg) self.0,
                    options(nostack, preserves_flags)),
                2 => asm!("mov word ptr [{p}], {v:x}", v = in(reg) v, p = in(reg) self.0,
                    options(nostack, preserves_flags)),
                4 => asm!("mov dword ptr [{p}], {v:e}", v = in(reg) v, p = in(reg) self.0,
                    options(nostack, preserves_flags)),
                _ => asm!("mov qword ptr [{p}], {v}", v = in(reg) v, p = in(reg) self.0,
                    options(nostack, preserves_flags)),
            }
        }
    }

    /// Exchanges atomically; returns what was there.
    #[inline(always)]
    pub fn swap<T: Int>(self, value: T) -> T {
        let mut v = value.zext();
        // SAFETY: as in `load`.
        unsafe {
            match T::SIZE {
                1 => {
                    let mut b = v as u8;
                    asm!("xchg byte ptr [{p}], {v}", v = inout(reg_byte) b, p = in(reg) self.0,
                        options(nostack, preserves_flags));
                    v = b as u64;
                }
                2 => asm!("xchg word ptr [{p}], {v:x}", v = inout(reg) v, p = in(reg) self.0,
                    options(nostack, preserves_flags)),
                4 => asm!("xchg dword ptr [{p}], {v:e}", v = inout(reg) v, p = in(reg) self.0,
                    options(nostack, preserves_flags)),
                _ => asm!("xchg qword ptr [{p}], {v}", v = inout(reg) v, p = in(reg) self.0,
                    options(nostack, preserves_flags)),
            }
        }
        T::truncate(v)
    }

    /// Stores `new` if `old` is there, atomically; returns what was there.
    #[inline(always)]
    pub fn compare_exchange<T: Int>(self, old: T, new: T) -> T {
        let mut a = old.zext();
        let n = new.zext();
        // SAFETY: as in `load`.
        unsafe {
            match T::SIZE {
                1 => asm!("lock cmpxchg byte ptr [{p}], {n}", n = in(reg_byte) n as u8,
                    p = in(reg) self.0, inout("rax") a, options(nostack)),
                2 => asm!("lock cmpxchg word ptr [{p}], {n:x}", n = in(reg) n,
                    p = in(reg) self.0, inout("rax") a, options(nostack)),
                4 => asm!("lock cmpxchg dword ptr [{p}], {n:e}", n = in(reg) n,
                    p = in(reg) self.0, inout("rax") a, options(nostack)),
                _ => asm!("lock cmpxchg qword ptr [{p}], {n}", n = in(reg) n,
                    p = in(reg) self.0, inout("rax") a, options(nostack)),
            }
        }
        T::truncate(a)
    }

    /// Adds atomically; returns what was there.
    #[inline(always)]
    pub fn fetch_add<T: Int>(self, value: T) -> T {
        let mut v = value.zext();
        // SAFETY: as in `load`.
        unsafe {
            match T::SIZE {
                1 => {
                    let mut b = v as u8;
                    asm!("lock xadd byte ptr [{p}], {v}", v = inout(reg_byte) b,
                        p = in(reg) self.0, options(nostack));
                    v = b as u64;
                }
                2 => asm!("lock xadd word ptr [{p}], {v:x}", v = inout(reg) v, p = in(reg) self.0,
                    options(nostack)),
                4 => asm!("lock xadd dword ptr [{p}], {v:e}", v = inout(reg) v, p = in(reg) self.0,
                    options(nostack)),
                _ => asm!("lock xadd qword ptr [{p}], {v}", v = inout(reg) v, p = in(reg) self.0,
                    options(nostack)),
            }
        }
        T::truncate(v)
    }

    /// CMPXCHG16B on an aligned address: stores `new` if `old` is there; returns what was there.
    #[inline]
    pub fn compare_exchange_16(self, old: u128, new: u128) -> u128 {
        debug_assert!(self.0 & 15 == 0);
        let (mut low, mut high) = (old as u64, (old >> 64) as u64);
        // SAFETY: as in `load`; aligned, as the instruction demands. RBX cannot be an operand.
        unsafe {
            asm!("xchg rbx, {n}", "lock cmpxchg16b xmmword ptr [{p}]", "mov rbx, {n}",
                n = inout(reg) new as u64 => _, p = in(reg) self.0,
                inout("rax") low, inout("rdx") high, in("rcx") (new >> 64) as u64,
                options(nostack));
        }
        (high as u128) << 64 | low as u128
    }

    /// The aligned 64-bit word here, for the page walker's atomic updates.
    #[inline]
    pub(super) fn or_u64(self, bits: u64) {
        debug_assert!(self.0 & 7 == 0);
        // SAFETY: mapped as above and aligned; guest memory is only ever accessed atomically or by
        // single instructions.
        unsafe { AtomicU64::from_ptr(self.0 as *mut u64) }.fetch_or(bits, Ordering::SeqCst);
    }

    /// Copies `to.len()` bytes out; they must end in the same page.
    #[inline]
    pub fn copy_out(self, to: &mut [u8]) {
        debug_assert!(to.len() <= self.to_page_end());
        // SAFETY: as in `load`; `to` is engine memory and cannot overlap guest RAM.
        unsafe { copy_forward(self.0, to.as_mut_ptr() as u64, to.len()) }
    }

    /// Copies `from` in; it must end in the same page.
    #[inline]
    pub fn copy_in(self, from: &[u8]) {
        debug_assert!(from.len() <= self.to_page_end());
        // SAFETY: as in `copy_out`.
        unsafe { copy_forward(from.as_ptr() as u64, self.0, from.len()) }
    }

    /// Copies `len` bytes to `to` as `rep movsb` does: ascending, byte by byte as far as overlap
    /// can show. Both ranges end in their pages.
    #[inline]
    pub fn copy_to(self, to: HostAddr, len: usize) {
        debug_assert!(len <= self.to_page_end() && len <= to.to_page_end());
        // SAFETY: both ranges are mapped guest RAM.
        unsafe { copy_forward(self.0, to.0, len) }
    }

    /// Fills `count` elements of `T` from here on, as `rep stos` does.
    #[inline]
    pub fn fill<T: Int>(self, value: T, count: usize) {
        debug_assert!(count * T::SIZE <= self.to_page_end());
        // SAFETY: the range is mapped guest RAM; DF is clear in the engine.
        unsafe {
            match T::SIZE {
                1 => asm!("rep stosb", inout("rcx") count => _, inout("rdi") self.0 => _,
                    in("al") value.zext() as u8, options(nostack, preserves_flags)),
                2 => asm!("rep stosw", inout("rcx") count => _, inout("rdi") self.0 => _,
                    in("ax") value.zext() as u16, options(nostack, preserves_flags)),
                4 => asm!("rep stosd", inout("rcx") count => _, inout("rdi") self.0 => _,
                    in("eax") value.zext() as u32, options(nostack, preserves_flags)),
                _ => asm!("rep stosq", inout("rcx") count => _, inout("rdi") self.0 => _,
                    in("rax") value.zext(), options(nostack, preserves_flags)),
            }
        }
    }
}

/// What a repeated comparison came to: elements compared, and the flags of the last one.
pub type Compared = (usize, Cc);

/// One instruction of the host's that compares while elements are equal, or until they are.
macro_rules! repeated {
    ($while_equal:literal, $until_equal:literal, $until:expr, $($operands:tt)*) => {
        if $until {
            asm!($until_equal, "lahf", "seto al", $($operands)* options(nostack, readonly));
        } else {
            asm!($while_equal, "lahf", "seto al", $($operands)* options(nostack, readonly));
        }
    };
}

impl HostAddr {
    /// Compares up to `count` elements of `T`, at least one, from here on with those at `other`, as `repe cmps` does, or with
    /// `until_equal` `repne cmps`. They end in their pages.
    #[inline]
    pub fn compare<T: Int>(self, other: Self, count: usize, until_equal: bool) -> Compared {
        debug_assert!(count > 0 && count * T::SIZE <= self.to_page_end().min(other.to_page_end()));
        let (left, cc): (usize, Cc);
        macro_rules! cmps {
            ($while_equal:literal, $until_equal:literal) => {
                repeated!($while_equal, $until_equal, until_equal, inout("rcx") count => left,
                    inout("rsi") self.0 => _, inout("rdi") other.0 => _, out("ax") cc,)
            };
        }
        // SAFETY: both ranges are mapped guest RAM; DF is clear in the engine.
        unsafe {
            match T::SIZE {
                1 => cmps!("repe cmpsb", "repne cmpsb"),
                2 => cmps!("repe cmpsw", "repne cmpsw"),
                4 => cmps!("repe cmpsd", "repne cmpsd"),
                _ => cmps!("repe cmpsq", "repne cmpsq"),
            }
        }
        (count - left, cc)
    }

    /// The same for `value` and the elements from here on, as SCAS does.
    #[inline]
    pub fn scan<T: Int>(self, value: T, count: usize, until_equal: bool) -> Compared {
        debug_assert!(count > 0 && count * T::SIZE <= self.to_page_end());
        let (left, cc): (usize, u64);
        macro_rules! scas {
            ($while_equal:literal, $until_equal:literal) => {
                repeated!($while_equal, $until_equal, until_equal, inout("rcx") count => left,
                    inout("rdi") self.0 => _, inout("rax") value.zext() => cc,)
            };
        }
        // SAFETY: as in `compare`.
        unsafe {
            match T::SIZE {
                1 => scas!("repe scasb", "repne scasb"),
                2 => scas!("repe scasw", "repne scasw"),
                4 => scas!("repe scasd", "repne scasd"),
                _ => scas!("repe scasq", "repne scasq"),
            }
        }
        (count - left, cc as Cc)
    }
}

/// `rep movsb`: defined for overlapping ranges.
///
/// # Safety
/// Both ranges are mapped, the target is writable, and nobody holds a reference to either that
/// forbids the access.
#[inline]
unsafe fn copy_forward(from: u64, to: u64, len: usize) {
    // SAFETY: the caller's promise; DF is clear in the engine.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
}
