//! Page walks (SDM vol. 3, chapter 5): 4-level, PAE and 32-bit paging.

use super::phys::PhysMemory;
use super::tlb::{Access, Who};

/// Bits of a page-table entry.
mod pte {
    pub const P: u64 = 1;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
}

/// Bits of a page fault's error code.
#[allow(missing_docs)]
pub mod code {
    pub const P: u32 = 1;
    pub const W: u32 = 1 << 1;
    pub const U: u32 = 1 << 2;
    pub const RSVD: u32 = 1 << 3;
    pub const I: u32 = 1 << 4;
}

/// Physical address width shown to the guest at most (CPUID 8000_0008H): bits above are reserved.
pub use mvm_engine::cpuid::PHYSICAL_BITS;

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const TOO_HIGH: u64 = ADDRESS & !((1 << PHYSICAL_BITS) - 1);

/// The control bits that decide how addresses are translated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Paging {
    /// CR0.PG.
    pub enabled: bool,
    /// CR4.PAE.
    pub pae: bool,
    /// EFER.LMA.
    pub long: bool,
    /// CR4.PSE.
    pub pse: bool,
    /// CR0.WP.
    pub wp: bool,
    /// EFER.NXE.
    pub nxe: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR4.PGE.
    pub pge: bool,
    /// CR3.
    pub cr3: u64,
}

/// A page that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// Guest physical address of the byte asked for.
    pub gpa: u64,
    /// Allowed to whoever asked: loads.
    pub read: bool,
    /// Stores; and D is set already.
    pub write: bool,
    /// Fetches.
    pub exec: bool,
    /// Global.
    pub global: bool,
    /// Shift of its size.
    pub shift: u8,
}

/// Translates `linear` for an access. The error is a page fault's code.
pub fn walk(
    mem: &PhysMemory,
    paging: &Paging,
    linear: u64,
    access: Access,
    who: Who,
) -> Result<Page, u32> {
    if !paging.enabled {
        let gpa = linear & 0xffff_ffff;
        return Ok(Page { gpa, read: true, write: true, exec: true, global: true, shift: 12 });
    }
    let mut fault = 0;
    if access == Access::Write {
        fault |= code::W;
    }
    if matches!(who, Who::User | Who::UserAligned) {
        fault |= code::U;
    }
    if access == Access::Exec && (paging.nxe && paging.pae || paging.smep) {
        fault |= code::I;
    }
    if paging.pae {
        walk_wide(mem, paging, linear, access, who, fault)
    } else {
        walk_32(mem, paging, linear, access, who, fault)
    }
}

/// Rights that all levels agree on.
#[derive(Clone, Copy)]
struct Leaf {
    gpa: u64,
    all: u64,
    nx: bool,
    dirty: bool,
    global: bool,
    shift: u8,
}

fn walk_wide(
    mem: &PhysMemory,
    paging: &Paging,
    linear: u64,
    access: Access,
    who: Who,
    fault: u32,
) -> Result<Page, u32> {
    let (mut table, mut level) =
        if paging.long { (paging.cr3 & ADDRESS, 4u32) } else { (paging.cr3 & 0xffff_ffe0, 3) };
    let mut all = pte::W | pte::U;
    let mut nx = false;
    // Entries whose A bit is to be set once the access is known to be allowed.
    let mut path = [(0u64, 0u64); 4];
    let mut steps = 0;
    let reserved = TOO_HIGH | if paging.nxe { 0 } else { pte::NX };
    loop {
        let shift = 12 + 9 * (level - 1);
        let bits = if level == 3 && !paging.long { 3 } else { 0x1ff };
        let at = table + ((linear >> shift) & bits) * 8;
        let entry = mem.read_u64(at).unwrap_or(0);
        if entry & pte::P == 0 {
            return Err(fault);
        }
        let pdpte = level == 3 && !paging.long;
        let large = entry & pte::PS != 0 && (level == 2 || level == 3) && !pdpte;
        let mut forbidden = reserved;
        if entry & pte::PS != 0 && level == 4 {
            forbidden |= pte::PS;
        }
        if large {
            // Bits between PAT (12) and the frame.
            forbidden |= ((1 << shift) - 1) & ADDRESS & !0x1000;
        }
        if pdpte {
            forbidden |= pte::NX | 0x1e6;
        }
        if entry & forbidden != 0 {
            return Err(fault | code::P | code::RSVD);
        }
        if !pdpte {
            all &= entry;
            nx |= entry & pte::NX != 0;
            path[steps] = (at, entry);
            steps += 1;
        }
        if level == 1 || large {
            let offset = (1u64 << shift) - 1;
            let leaf = Leaf {
                gpa: entry & ADDRESS & !offset | linear & offset,
                all,
                nx,
                dirty: entry & pte::D != 0,
                global: entry & pte::G != 0 && paging.pge,
                shift: shift as u8,
            };
            let mut page = judge(paging, leaf, access, who, fault)?;
            for (i, &(at, entry)) in path[..steps].iter().enumerate() {
                let mut bits = pte::A;
                if i + 1 == steps && access == Access::Write {
                    bits |= pte::D;
                }
                if entry & bits != bits {
                    mem.or_u64(at, bits);
                }
            }
            page.write &= leaf.dirty || access == Access::Write;
            return Ok(page);
        }
        table = entry & ADDRESS;
        level -= 1;
    }
}

fn walk_32(
    mem: &PhysMemory,
    paging: &Paging,
    linear: u64,
    access: Access,
    who: Who,
    fault: u32,
) -> Result<Page, u32> {
    let directory = (paging.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4;
    let pde = u64::from(mem.read_u32(directory).unwrap_or(0));
    if pde & pte::P == 0 {
        return Err(fault);
    }
    let (at, entry, all, shift) = if pde & pte::PS != 0 && paging.pse {
        if pde & 1 << 21 != 0 {
            return Err(fault | code::P | code::RSVD);
        }
        (directory, pde, pde, 22u8)
    } else {
        let at = (pde & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4;
        let entry = u64::from(mem.read_u32(at).unwrap_or(0));
        if entry & pte::P == 0 {
            return Err(fault);
        }
        (at, entry, pde & entry, 12)
    };
    let gpa = if shift == 22 {
        // PSE-36: bits 32-39 of the frame are in bits 13-20.
        entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32 | linear & 0x3f_ffff
    } else {
        entry & 0xffff_f000 | linear & 0xfff
    };
    let leaf = Leaf {
        gpa,
        all,
        nx: false,
        dirty: entry & pte::D != 0,
        global: entry & pte::G != 0 && paging.pge,
        // The TLB treats 4 MiB pages as two of 2 MiB.
        shift: if shift == 22 { 30 } else { 12 },
    };
    let mut page = judge(paging, leaf, access, who, fault)?;
    if shift == 12 && pde & pte::A == 0 {
        set_32(mem, directory, pte::A);
    }
    let bits = if access == Access::Write { pte::A | pte::D } else { pte::A };
    if entry & bits != bits {
        set_32(mem, at, bits);
    }
    page.write &= leaf.dirty || access == Access::Write;
    Ok(page)
}

fn set_32(mem: &PhysMemory, at: u64, bits: u64) {
    mem.or_u64(at, bits << (8 * (at & 4)));
}

/// Decides what `who` may do with the page, and whether `access` is among it.
fn judge(paging: &Paging, leaf: Leaf, access: Access, who: Who, fault: u32) -> Result<Page, u32> {
    let user_page = leaf.all & pte::U != 0;
    let writable = leaf.all & pte::W != 0;
    let (read, write, exec) = match who {
        Who::User | Who::UserAligned => (user_page, user_page && writable, user_page && !leaf.nx),
        Who::Supervisor | Who::SupervisorAc => {
            let reach = !(user_page && paging.smap && who == Who::Supervisor);
            let fetch = !(user_page && paging.smep);
            (reach, reach && (writable || !paging.wp), fetch && !leaf.nx)
        }
    };
    let allowed = match access {
        Access::Read => read,
        Access::Write => write,
        Access::Exec => exec,
    };
    if !allowed {
        return Err(fault | code::P);
    }
    Ok(Page { gpa: leaf.gpa, read, write, exec, global: leaf.global, shift: leaf.shift })
}
