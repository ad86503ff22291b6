//! The tiny machine's guests: a few bytes each, in ring 0 of 64-bit mode.
//!
//! 64-bit mode, because there every kind of KVM runs guest code as it will run a kernel's: real
//! mode and protected mode without paging are emulated where the hardware has no unrestricted
//! guest, which says nothing about the rest.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use mvm_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Guest RAM in bytes, from address 0.
pub const RAM_SIZE: u64 = 0x1_0000;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;
const DATA: u64 = 0x5000;

/// Entry of a page table: present, writable.
const TABLE: u64 = 0b11;
/// Entry of a page directory: present, writable, 2 MiB.
const LARGE_PAGE: u64 = 0b1000_0011;

/// CR0: PE, MP, ET, NE, WP, PG (SDM vol. 3, 2.5).
const CR0: u64 = 0x8001_0033;
/// CR4: PAE, OSFXSR, OSXMMEXCPT.
const CR4: u64 = 0x620;
/// EFER: LME, LMA.
const EFER: u64 = 0x500;

/// Value that the data instructions work with.
const PATTERN: u64 = 0x1122_3344_5566_7788;

/// A guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// A loop of [`LOOP_INSTRUCTIONS`] integer instructions, so many times.
    Loop(u64),
    /// One SSE2 instruction.
    Pxor,
    /// One locked 16-byte exchange, as Linux' allocator uses it.
    Cmpxchg16b,
    /// A loop without end.
    #[cfg(test)]
    Forever,
}

/// Instructions of one turn of [`Program::Loop`].
pub const LOOP_INSTRUCTIONS: u64 = 4;

impl Program {
    /// The code. Ends in HLT.
    fn code(self) -> &'static [u8] {
        match self {
            // add rax, rbx; xor rdx, rax; dec rcx; jnz to the first; hlt
            Self::Loop(_) => b"\x48\x01\xd8\x48\x31\xc2\x48\xff\xc9\x75\xf5\xf4",
            // pxor xmm0, xmm0; hlt
            Self::Pxor => b"\x66\x0f\xef\xc0\xf4",
            // cmpxchg16b [rdi]; hlt
            Self::Cmpxchg16b => b"\x48\x0f\xc7\x0f\xf4",
            #[cfg(test)]
            Self::Forever => b"\xeb\xfe",
        }
    }

    /// Puts page tables and code into guest RAM.
    pub fn place(self, memory: &GuestMemory) -> Result<(), GuestMemoryError> {
        memory.write_obj(PDPT | TABLE, GuestAddress(PML4))?;
        memory.write_obj(PD | TABLE, GuestAddress(PDPT))?;
        memory.write_obj(LARGE_PAGE, GuestAddress(PD))?;
        memory.write_slice(&[0; 16], GuestAddress(DATA))?;
        memory.write_slice(self.code(), GuestAddress(CODE))
    }

    /// The registers to begin with.
    pub fn registers(self) -> kvm_regs {
        let turns = match self {
            Self::Loop(turns) => turns,
            _ => PATTERN,
        };
        kvm_regs { rip: CODE, rflags: 2, rbx: 3, rcx: turns, rdi: DATA, ..Default::default() }
    }

    /// Whether it has done what it was to do.
    pub fn is_right(self, memory: &GuestMemory, end: &kvm_regs) -> bool {
        match self {
            Self::Loop(turns) => end.rcx == 0 && end.rax == turns.wrapping_mul(3),
            Self::Pxor => true,
            // Memory was zero like RDX:RAX, so RCX:RBX is in it now.
            Self::Cmpxchg16b => {
                let halves: Result<[u64; 2], _> = memory.read_obj(GuestAddress(DATA));
                matches!(halves, Ok([3, PATTERN]))
            }
            #[cfg(test)]
            Self::Forever => false,
        }
    }
}

/// The system registers of 64-bit mode, ring 0, on top of those after power-up.
pub fn system_registers(mut sregs: kvm_sregs) -> kvm_sregs {
    let segment = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    // Execute/read, long; read/write. Both accessed (SDM vol. 3, 3.4.5).
    sregs.cs = kvm_segment { selector: 0x8, type_: 0xb, l: 1, ..segment };
    let data = kvm_segment { selector: 0x10, type_: 0x3, db: 1, ..segment };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4, CR4, EFER);
    sregs
}
