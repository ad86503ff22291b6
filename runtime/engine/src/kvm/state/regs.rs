//! General, segment, control and debug registers.

use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::{DebugRegisters, GeneralRegisters, Segment, SystemRegisters, Table};

/// A segment is not usable: bit 16 of [`Segment::access`].
const UNUSABLE: u32 = 1 << 16;
/// A busy 64-bit task state, and a busy 16-bit one: what VT-x demands of TR (SDM vol. 3, 27.3.1.2).
const BUSY_TSS: u32 = 0xb;
const BUSY_TSS_16: u32 = 0x3;

pub(super) fn general_from(r: &kvm_regs) -> GeneralRegisters {
    GeneralRegisters {
        gpr: [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        rip: r.rip,
        rflags: r.rflags,
    }
}

pub(super) fn general_to(regs: &GeneralRegisters) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = regs.gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: regs.rip,
        rflags: regs.rflags,
    }
}

fn segment_from(s: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u32::from(value & 1) << at;
    let access = u32::from(s.type_ & 0xf)
        | bit(s.s, 4)
        | u32::from(s.dpl & 3) << 5
        | bit(s.present, 7)
        | bit(s.avl, 12)
        | bit(s.l, 13)
        | bit(s.db, 14)
        | bit(s.g, 15)
        | bit(s.unusable, 16);
    Segment { selector: s.selector, base: s.base, limit: s.limit, access }
}

fn segment_to(s: &Segment) -> kvm_segment {
    let bit = |at: u32| (s.access >> at & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.access & 0xf) as u8,
        present: bit(7),
        dpl: (s.access >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        // What is not present cannot be used, which hardware wants to be told.
        unusable: bit(16) | (bit(7) ^ 1),
        padding: 0,
    }
}

fn table_from(t: &kvm_dtable) -> Table {
    Table { base: t.base, limit: t.limit }
}

fn table_to(t: &Table) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

/// System registers; `cr8` is told apart since local APIC and KVM both have it.
pub(super) fn system_from(s: &kvm_sregs) -> SystemRegisters {
    SystemRegisters {
        segments: [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs].map(segment_from),
        ldtr: segment_from(&s.ldt),
        tr: segment_from(&s.tr),
        gdtr: table_from(&s.gdt),
        idtr: table_from(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
    }
}

/// The registers for KVM, with the local APIC's base.
pub(super) fn system_to(s: &SystemRegisters, apic_base: u64) -> kvm_sregs {
    let [es, cs, ss, ds, fs, gs] = s.segments.map(|s| segment_to(&s));
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: segment_to(&task_register(s.tr)),
        ldt: segment_to(&s.ldtr),
        gdt: table_to(&s.gdtr),
        idt: table_to(&s.idtr),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base,
        interrupt_bitmap: [0; 4],
    }
}

/// TR as hardware takes it. A processor that never loaded it has one that hardware would refuse to enter
/// with; nothing uses it before it is loaded.
fn task_register(mut tr: Segment) -> Segment {
    let busy = match tr.access & 0xf {
        1 | BUSY_TSS_16 => BUSY_TSS_16,
        _ => BUSY_TSS,
    };
    // A system segment, present and usable.
    tr.access = tr.access & !(0x1f | UNUSABLE) | busy | 1 << 7;
    tr
}

pub(super) fn debug_from(d: &kvm_debugregs) -> DebugRegisters {
    DebugRegisters { address: d.db, dr6: d.dr6, dr7: d.dr7 }
}

pub(super) fn debug_to(d: &DebugRegisters) -> kvm_debugregs {
    // Bits that are always one; those that must be zero are KVM's to refuse.
    kvm_debugregs {
        db: d.address,
        dr6: d.dr6 | 0xffff_0ff0,
        dr7: d.dr7 | 0x400,
        ..kvm_debugregs::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_survive_both_ways() {
        let mut regs = GeneralRegisters { rip: 77, rflags: 2, ..Default::default() };
        for (value, gpr) in (100..).zip(&mut regs.gpr) {
            *gpr = value;
        }
        let kvm = general_to(&regs);
        assert_eq!((kvm.rax, kvm.rcx, kvm.rbx, kvm.rsp, kvm.r15), (100, 101, 103, 104, 115));
        assert_eq!(general_from(&kvm), regs);
    }

    #[test]
    fn segments_survive_both_ways() {
        for access in [0xa09b, 0xc093, 0x8b, 0x82, 0x1_0000, 0xf0f3, 0x70fb] {
            let segment = Segment { selector: 0x28, base: 1 << 40, limit: 0xfffff, access };
            assert_eq!(segment_from(&segment_to(&segment)), segment, "{access:#x}");
        }
        let absent = Segment { access: 0x13, ..Segment::default() };
        assert_eq!(segment_from(&segment_to(&absent)).access, 0x1_0013);
    }

    #[test]
    fn tr_is_made_busy() {
        let with = |access| task_register(Segment { access, ..Segment::default() }).access;
        assert_eq!(with(0x82), 0x8b);
        assert_eq!(with(0x89), 0x8b);
        assert_eq!(with(0x81), 0x83);
        assert_eq!(with(0x1_0000), 0x8b);
    }
}
