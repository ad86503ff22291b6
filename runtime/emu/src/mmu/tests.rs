//! Paging as guests see it: rights, bits that are set, sizes, address spaces.

use iced_x86::code_asm::*;

use super::phys::{PageRef, PhysMemory};
use super::raw::HostAddr;
use super::tlb::{Access, FIRST_SLOT_MASK, LARGE_SLOT_MASK, Rights, Tlb, Who};
use crate::fault::vector;
use crate::testing::asm::asm;
use crate::testing::guest::{
    CODE, DATA, End, Guest, PD, PDPT, PML4, USER, USER_DATA, USER_GPA, pte, sel,
};

const PF: u8 = vector::PF;
/// Linear address of pages that tests map as they like, and where their bytes are.
const PAGE: u64 = 0x5000_0000;
const FRAME: u64 = 0x60_0000;

/// Reads, writes or runs [PAGE] (in RBX) at the level that the guest is at; the error code of the fault.
fn access(guest: &mut Guest, user: bool, code: &[u8]) -> Option<u64> {
    guest.cpu().gpr[3] = PAGE;
    let mut code = code.to_vec();
    code.extend([0x0f, 0x0b]);
    let end = if user { guest.run_user(&code) } else { guest.run_kernel(&code) };
    let frame = end.frame();
    match frame.vector {
        PF => {
            assert_eq!(guest.cpu().sys.cr2, PAGE);
            frame.code
        }
        other => {
            assert_eq!(other, vector::UD);
            None
        }
    }
}

fn read() -> Vec<u8> {
    asm!(64 at 0; mov(eax, dword_ptr(rbx));)
}
fn write() -> Vec<u8> {
    asm!(64 at 0; mov(dword_ptr(rbx), eax);)
}
fn fetch() -> Vec<u8> {
    asm!(64 at 0; jmp(rbx);)
}

#[test]
fn rights_of_every_level_count() {
    for level in 1..=4 {
        for (bits, kernel, user) in [
            // (read, write, fetch) error codes.
            (pte::P | pte::W | pte::U, [None, None, None], [None, None, None]),
            (pte::P | pte::U, [None, Some(3), None], [None, Some(7), None]),
            (pte::P | pte::W, [None, None, None], [Some(5), Some(7), Some(0x15)]),
            (pte::P, [None, Some(3), None], [Some(5), Some(7), Some(0x15)]),
            (
                pte::P | pte::W | pte::U | pte::NX,
                [None, None, Some(0x11)],
                [None, None, Some(0x15)],
            ),
            (0, [Some(0), Some(2), Some(0x10)], [Some(4), Some(6), Some(0x14)]),
        ] {
            let mut guest = Guest::new();
            // A page whose upper tables are its own: another entry of the PML4.
            let far = 0x105_5000_0000;
            guest.map(far, FRAME, 7);
            let at = guest.entry(far, level);
            let frame = guest.get64(at) & 0x000f_ffff_ffff_f000;
            guest.put64(at, frame | bits);
            guest.put(FRAME, &[0x0f, 0x0b]);
            let ops = [read(), write(), fetch()];
            for (is_user, codes) in [(false, kernel), (true, user)] {
                for (op, expected) in ops.iter().zip(codes) {
                    if op == &write() {
                        guest.put(FRAME, &[0x0f, 0x0b]);
                    }
                    guest.cpu().gpr[0] = 0x0b0f;
                    let got = access_at(&mut guest, far, is_user, op);
                    assert_eq!(got, expected, "level {level} {bits:#x} user {is_user} {op:02x?}");
                }
            }
        }
    }
}

fn access_at(guest: &mut Guest, at: u64, user: bool, code: &[u8]) -> Option<u64> {
    guest.cpu().gpr[3] = at;
    let mut code = code.to_vec();
    code.extend([0x0f, 0x0b]);
    let end = if user { guest.run_user(&code) } else { guest.run_kernel(&code) };
    let frame = end.frame();
    (frame.vector == PF).then(|| {
        assert_eq!(guest.cpu().sys.cr2, at);
        frame.code.expect("#PF has an error code")
    })
}

#[test]
fn supervisor_writes_ignore_read_only_pages_without_wp() {
    let mut guest = Guest::new();
    guest.map(PAGE, FRAME, pte::P | pte::U);
    assert_eq!(access(&mut guest, false, &write()), Some(3));
    guest.cpu().sys.cr0 &= !(1 << 16);
    assert_eq!(access(&mut guest, false, &write()), None);
    assert_eq!(access(&mut guest, true, &write()), Some(7));
}

#[test]
fn smap_and_smep_keep_the_supervisor_off_user_pages() {
    let mut guest = Guest::new();
    guest.map(PAGE, FRAME, 7);
    guest.put(FRAME, &[0x0f, 0x0b]);
    guest.cpu().gpr[0] = 0x0b0f;
    guest.cpu().sys.cr4 |= 1 << 20 | 1 << 21;
    assert_eq!(access(&mut guest, false, &read()), Some(1));
    assert_eq!(access(&mut guest, false, &write()), Some(3));
    assert_eq!(access(&mut guest, false, &fetch()), Some(0x11));
    assert_eq!(access(&mut guest, true, &read()), None);
    assert_eq!(access(&mut guest, true, &fetch()), None);
    let mut with_ac = asm!(64 at 0; stac(););
    with_ac.extend(write());
    assert_eq!(access(&mut guest, false, &with_ac), None);
    // An exception clears nothing of AC, but the handler of it runs with AC as pushed; CPL 3 with AC is no supervisor.
    let mut fetch_with_ac = asm!(64 at 0; stac(););
    fetch_with_ac.extend(fetch());
    assert_eq!(access(&mut guest, false, &fetch_with_ac), Some(0x11), "AC is not about fetches");
}

#[test]
fn a_table_that_has_become_larger() {
    // SAFETY: the address is looked at, and nothing else.
    let host = unsafe { HostAddr::new(0x7000_0123) };
    let rights = Rights { read: true, write: true, exec: false, global: false, shift: 12 };
    let mut tlb = Tlb::default();
    tlb.select(Who::User);
    let far = PAGE + (4096 << 12);
    for count in 1.. {
        tlb.insert(PAGE, host, rights);
        tlb.insert(far, host, rights);
        assert!(tlb.probe_read(PAGE, 8).is_none() && tlb.probe_write(far, 8).is_some());
        if tlb.is_tight() {
            assert!(count > 4096);
            break;
        }
    }
    tlb.set_slot_mask(LARGE_SLOT_MASK);
    assert!(!tlb.is_tight() && tlb.selected() == Who::User);
    assert!(tlb.probe_read(PAGE, 8).is_none() && tlb.probe_read(far, 8).is_none());
    tlb.insert(PAGE, host, rights);
    tlb.insert(far, host, rights);
    assert!(tlb.probe_read(PAGE, 8).is_some() && tlb.probe_write(far, 8).is_some());
    tlb.select(Who::Supervisor);
    assert!(tlb.probe_read(PAGE, 8).is_none());
    tlb.select(Who::User);
    tlb.flush_page(far);
    assert!(tlb.probe_read(PAGE, 8).is_some() && tlb.probe_read(far, 8).is_none());
}

#[test]
fn slow_writes_are_for_those_who_found_them_however_large_the_tables_are() {
    // SAFETY: the address is looked at, and nothing else.
    let host = unsafe { HostAddr::new(0x7000_0123) };
    let page = PageRef { region: 0, page: 7 };
    let upper = 0xffff_8000_5000_0000;
    let all = [Who::User, Who::Supervisor, Who::SupervisorAc, Who::UserAligned];
    for (linear, who) in [PAGE, upper].into_iter().flat_map(|linear| all.map(|who| (linear, who))) {
        let mut tlb = Tlb::default();
        tlb.set_space(3);
        tlb.select(who);
        tlb.insert_slow_write(linear, page, host);
        for mask in [FIRST_SLOT_MASK, LARGE_SLOT_MASK] {
            tlb.set_slot_mask(mask);
            for (pcid, other) in (0..8).flat_map(|pcid| all.map(|other| (pcid, other))) {
                tlb.set_space(pcid);
                tlb.select(other);
                let mine = other == who && (pcid == 3 || linear == upper);
                assert_eq!(tlb.slow_write(linear).is_some(), mine, "{who:?} {pcid} {other:?}");
            }
        }
    }
}

#[test]
fn a_supervisor_that_may_reach_user_pages_finds_what_others_found() {
    // SAFETY: the address is looked at, and nothing else.
    let host = unsafe { HostAddr::new(0x7000_0123) };
    let rights = Rights { read: true, write: false, exec: true, global: false, shift: 12 };
    let mut tlb = Tlb::default();
    tlb.select(Who::User);
    tlb.insert(PAGE + 0x123, host, rights);
    tlb.select(Who::Supervisor);
    tlb.insert(PAGE + 0x1123, host, Rights { write: true, ..rights });
    assert!(tlb.adopt(PAGE, Access::Read).is_none(), "SMAP");
    tlb.select(Who::SupervisorAc);
    assert!(tlb.probe_read(PAGE, 8).is_none());
    assert!(tlb.adopt(PAGE, Access::Write).is_none(), "nobody has written there");
    assert_eq!(tlb.adopt(PAGE + 4, Access::Read).unwrap().addr(), 0x7000_0004);
    assert!(tlb.probe_read(PAGE, 8).is_some() && tlb.probe_exec(PAGE).is_none(), "SMEP");
    assert_eq!(tlb.adopt(PAGE + 0x1008, Access::Write).unwrap().addr(), 0x7000_0008);
    assert!(tlb.probe_write(PAGE + 0x1000, 8).is_some());
    tlb.flush_page(PAGE);
    assert!(tlb.probe_read(PAGE, 8).is_none() && tlb.adopt(PAGE, Access::Read).is_none());
    tlb.flush_writes();
    assert!(tlb.adopt(PAGE + 0x1000, Access::Write).is_none());
    assert!(tlb.adopt(PAGE + 0x1000, Access::Read).is_some());
    tlb.flush_all();
    assert!(tlb.adopt(PAGE + 0x1000, Access::Read).is_none());
}

#[test]
fn stores_to_pages_with_code_are_found_without_a_walk_until_something_changes() {
    let mut guest = Guest::new();
    guest.map(PAGE, FRAME, 7);
    // Code of the user's that stores beside itself, to a page that so is watched.
    let code = asm!(64 at 0; mov(ecx, 100i32); mov(dword_ptr(rbx + 0x800), eax); dec(ecx); jnz(0x5u64); ud2(););
    guest.put(FRAME, &code);
    let jump = asm!(64 at 0; jmp(rbx););
    let walks = guest.cpu().mmu.walks;
    assert_eq!(access(&mut guest, true, &jump), None);
    let walks = guest.cpu().mmu.walks - walks;
    assert!(walks < 50, "{walks} walks for 100 stores");
    // The next one is refused at once.
    guest.map(PAGE, FRAME, pte::P | pte::U);
    guest.cpu().mmu.tlb.flush_page(PAGE);
    guest.cpu().gpr[3] = PAGE;
    assert_eq!(access(&mut guest, true, &write()), Some(7));
}

#[test]
fn accessed_and_dirty_bits() {
    let mut guest = Guest::new();
    guest.map(PAGE, FRAME, 7);
    let entries: Vec<u64> = (1..=4).map(|level| guest.entry(PAGE, level)).collect();
    let bits = |guest: &Guest| -> Vec<u64> {
        entries.iter().map(|e| guest.get64(*e) & (pte::A | pte::D)).collect()
    };
    assert_eq!(bits(&guest)[..2], [0, 0]);
    assert_eq!(access(&mut guest, false, &read()), None);
    assert_eq!(bits(&guest), [pte::A; 4]);
    // The read has put it into the TLB: the first write must still set D.
    let mut code = read();
    code.extend(write());
    assert_eq!(access(&mut guest, false, &code), None);
    assert_eq!(bits(&guest), [pte::A | pte::D, pte::A, pte::A, pte::A]);
    // A write that is not allowed sets nothing in the leaf.
    guest.put64(entries[0], FRAME | pte::P | pte::U);
    assert_eq!(access(&mut guest, false, &write()), Some(3));
    assert_eq!(bits(&guest)[0] & pte::D, 0);
    // Cleared by the guest and flushed, they are set anew.
    let clear = asm!(64 at 0; mov(rcx, PAGE); mov(rdx, entries[0]); mov(rax, FRAME | 7); mov(qword_ptr(rdx), rax);
        invlpg(ptr(rcx)); mov(dword_ptr(rcx), eax););
    assert_eq!(access(&mut guest, false, &clear), None);
    assert_eq!(bits(&guest)[0], pte::A | pte::D);
}

#[test]
fn reserved_bits_fault() {
    let mut guest = Guest::new();
    for (level, bits) in
        [(1, 1u64 << 46), (1, 1 << 51), (2, 1 << 46), (3, 1 << 46), (4, 1 << 46), (4, pte::PS)]
    {
        guest.map(PAGE, FRAME, 7);
        let at = guest.entry(PAGE, level);
        let old = guest.get64(at);
        guest.put64(at, old | bits);
        // The kernel lies under the same PML4 entry: only the walk is run.
        let who = Who::Supervisor;
        let cpu = guest.cpu();
        cpu.tlb_flush_all();
        let found = super::walk::walk(&cpu.mmu.phys, &cpu.mmu.paging, PAGE, Access::Read, who);
        assert_eq!(found.err(), Some(9), "level {level} {bits:#x}");
        guest.put64(at, old);
    }
    guest.map(PAGE, FRAME, 7 | 1 << 50);
    assert_eq!(access(&mut guest, true, &write()), Some(0xf));
    // Bits 52 to 62 are the system's.
    guest.map(PAGE, FRAME, 7 | 0x7ff << 52);
    assert_eq!(access(&mut guest, true, &write()), None);
}

#[test]
fn feature_pdpe1gb() {
    let mut guest = Guest::new();
    let base = 0x1_8000_0000;
    let at = guest.entry(base, 3);
    guest.put64(at, pte::PS | 7);
    guest.put64(FRAME + 0x123450, 0x1234);
    assert_eq!(access_at(&mut guest, base + FRAME + 0x123450, false, &read()), None);
    assert_eq!(guest.reg(0), 0x1234);
    assert_eq!(guest.get64(at) & (pte::A | pte::D), pte::A);
    // Bits between PAT and the frame are reserved.
    guest.put64(at, pte::PS | 7 | 1 << 13);
    assert_eq!(access_at(&mut guest, base, false, &read()), Some(9));
    guest.put64(at, pte::PS | 7 | 1 << 12);
    assert_eq!(access_at(&mut guest, base + FRAME, false, &read()), None, "PAT");
    // INVLPG of one address drops all of it.
    let code = asm!(64 at CODE;
        mov(rbx, base + FRAME); mov(rcx, base + 0x10_0000); mov(eax, dword_ptr(rbx)); mov(eax, dword_ptr(rcx));
        mov(rdx, at); mov(qword_ptr(rdx), 0i32); invlpg(ptr(rbx)); mov(eax, dword_ptr(rcx));
    );
    assert_eq!(guest.run_kernel(&code).frame().code, Some(0));
}

#[test]
fn feature_pse() {
    // 2 MiB pages in 64-bit mode: the kernel's own are such.
    let mut guest = Guest::new();
    let at = PD + 0x1ff * 8;
    let base = 0x1ff << 21;
    guest.put64(at, 0x60_0000 | pte::PS | 7);
    guest.put64(FRAME + 0x1f_fff8, 99);
    assert_eq!(access_at(&mut guest, base + 0x1f_fff8, true, &read()), None);
    assert_eq!(guest.reg(0), 99);
    assert_eq!(access_at(&mut guest, base, true, &write()), None);
    assert_eq!(guest.get64(at) & (pte::A | pte::D), pte::A | pte::D);
    guest.put64(at, 0x60_0000 | pte::PS | 7 | 1 << 13);
    assert_eq!(access_at(&mut guest, base, true, &write()), Some(0xf));
    // 4 MiB pages of 32-bit paging, with CR4.PSE.
    let mut guest = Guest::new_32();
    guest.put(PD, &0x83u32.to_le_bytes());
    guest.put(PD + 4 * 4, &0x40_0083u32.to_le_bytes());
    guest.put64(USER_GPA + 0x3f_fff8, 0x77);
    let code = asm!(32 at CODE;
        mov(eax, cr4); or(eax, 0x10i32); mov(cr4, eax); mov(eax, PD as u32); mov(cr3, eax); mov(eax, cr0);
        or(eax, 0x8000_0000u32); mov(cr0, eax); mov(ebx, dword_ptr(0x13f_fff8)); mov(dword_ptr(0x100_0000), ebx);
        mov(ecx, dword_ptr(0x140_0000));
    );
    let frame = guest.run(&code).frame();
    assert_eq!((frame.vector, frame.code), (PF, Some(0)));
    assert_eq!(
        (guest.cpu().sys.cr2, guest.reg(3), guest.get32(USER_GPA)),
        (0x140_0000, 0x77, 0x77)
    );
    assert_eq!(guest.get32(PD + 16) & 0x60, 0x60);
}

#[test]
fn paging_of_32_bits() {
    let mut guest = Guest::new_32();
    let table = PD + 0x1000;
    guest.put(PD, &(table as u32 | 7).to_le_bytes());
    for page in 0..0x400u32 {
        guest.put(table + u64::from(page) * 4, &(page << 12 | 3).to_le_bytes());
    }
    let page = 0x30_0000u64;
    guest.put(table + 0x300 * 4, &(0x60_0000u32 | 1).to_le_bytes());
    guest.put(FRAME, &0x1111u32.to_le_bytes());
    let code = asm!(32 at CODE;
        mov(eax, PD as u32); mov(cr3, eax); mov(eax, cr0); or(eax, 0x8001_0000u32); mov(cr0, eax);
        mov(ebx, dword_ptr(page as u32)); mov(dword_ptr(page as u32), ebx);
    );
    let frame = guest.run(&code).frame();
    assert_eq!((frame.vector, frame.code, guest.reg(3)), (PF, Some(3), 0x1111));
    assert_eq!(guest.get32(table + 0x300 * 4) & 0x60, 0x20);
    assert_eq!(guest.get32(PD) & 0x20, 0x20);
    // D of an entry in an odd place.
    guest.put(table + 0x301 * 4, &(0x60_1000u32 | 3).to_le_bytes());
    let code = asm!(32 at CODE; mov(dword_ptr(page as u32 + 0x1004), 7i32); ud2(););
    guest.kernel(sel::CODE32);
    assert_eq!(guest.run(&code).frame().vector, vector::UD);
    assert_eq!(guest.get32(table + 0x301 * 4), 0x60_1063);
    assert_eq!(guest.get32(table + 0x302 * 4) & 0x40, 0);
    assert_eq!(guest.get32(FRAME + 0x1004), 7);
}

#[test]
fn feature_pae() {
    let mut guest = Guest::new_32();
    // Four pointers at an address that is only 32-byte aligned, tables with 64-bit entries.
    let pointers = PDPT + 0x20;
    guest.put64(pointers, PD | 1);
    guest.put64(PD, pte::PS | 3);
    guest.put64(PD + 8, (PD + 0x1000) | 7);
    guest.put64(PD + 0x1000, FRAME | 3 | pte::NX);
    guest.put(FRAME, &[0xf4]);
    let code = asm!(32 at CODE;
        mov(ecx, 0xc000_0080u32); rdmsr(); or(eax, 0x800i32); wrmsr();
        mov(eax, cr4); or(eax, 0x20i32); mov(cr4, eax); mov(eax, pointers as u32); mov(cr3, eax);
        mov(eax, cr0); or(eax, 0x8000_0000u32); mov(cr0, eax); mov(dword_ptr(0x20_0004), 5i32);
        mov(eax, 0x20_0000i32); jmp(eax);
    );
    let frame = guest.run(&code).frame();
    assert_eq!((frame.vector, frame.code, frame.rip), (PF, Some(0x11), 0x20_0000));
    assert_eq!(guest.get32(FRAME + 4), 5);
    assert_eq!(guest.get64(PD + 0x1000) & 0x60, 0x60);
    // A pointer-table entry that is not there.
    guest.kernel(sel::CODE32);
    let code = asm!(32 at CODE; mov(eax, dword_ptr(0x4000_0000)););
    assert_eq!(guest.run(&code).frame().code, Some(0));
}

#[test]
fn feature_pge() {
    let mut guest = Guest::new();
    // The TLB keeps global pages of the upper half alone.
    let high = 0xffff_8000_0000_0000u64;
    guest.map(high, FRAME, 3 | pte::G);
    let other = 0x5000_1000u64;
    guest.map(other, FRAME, 7);
    let (global, plain) = (guest.entry(high, 1), guest.entry(other, 1));
    guest.put64(FRAME, 1);
    guest.put64(FRAME + 0x2000, 2);
    let code = asm!(64 at CODE;
        mov(rax, cr4); or(eax, 0x80i32); mov(cr4, rax); mov(rbx, high); mov(rcx, other); mov(rsi, qword_ptr(rbx));
        mov(rsi, qword_ptr(rcx)); mov(rdx, global); add(dword_ptr(rdx), 0x2000i32); mov(rdx, plain);
        add(dword_ptr(rdx), 0x2000i32); mov(rax, cr3); mov(cr3, rax); mov(rsi, qword_ptr(rbx));
        mov(rdi, qword_ptr(rcx)); invlpg(ptr(rbx)); mov(r8, qword_ptr(rbx)); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(6), guest.reg(7), guest.reg(8)), (1, 2, 2));
    // A change of CR4.PGE drops them too.
    let code = asm!(64 at CODE;
        mov(rbx, high); mov(rsi, qword_ptr(rbx)); mov(rdx, global); sub(dword_ptr(rdx), 0x2000i32);
        mov(rsi, qword_ptr(rbx)); mov(rax, cr4); btr(rax, 7i32); mov(cr4, rax); mov(rdi, qword_ptr(rbx)); hlt();
    );
    guest.cpu().sys.cr4 |= 0x80;
    assert_eq!(guest.run_kernel(&code), End::Halt);
    assert_eq!((guest.reg(6), guest.reg(7)), (2, 1));
}

/// Two address spaces that differ in what [`PAGE`] is: frames with 1 and 2.
fn two_spaces() -> (Guest, u64) {
    let mut guest = Guest::new();
    guest.map(PAGE, FRAME, 7);
    guest.put64(FRAME, 1);
    guest.put64(FRAME + 0x1000, 2);
    guest.put64(FRAME + 0x2000, 3);
    let second = guest.new_table();
    let pointers = guest.new_table();
    guest.put64(second, pointers | 7);
    guest.put64(pointers, guest.get64(PDPT));
    let pd = guest.new_table();
    for i in 0..512 {
        guest.put64(pd + i * 8, guest.get64(PD + i * 8));
    }
    guest.put64(pointers, pd | 7);
    guest.map_in(second, PAGE, FRAME + 0x1000, 7);
    (guest, second)
}

#[test]
fn pcid_and_invpcid() {
    const NO_FLUSH: u64 = 1 << 63;
    let (mut guest, second) = two_spaces();
    let entry = guest.entry(PAGE, 1);
    // Another page of the first space, which the second one does not touch.
    guest.map(PAGE + 0x7000, FRAME, 7);
    // PCIDE needs a PCID of zero, and long mode.
    let code = asm!(64 at CODE;
        mov(rax, cr4); bts(rax, 17i32); mov(cr4, rax); mov(rbx, PAGE); mov(r10, entry);
        // Space 1 is PCID 5, space 2 is PCID 6.
        mov(rax, PML4 | 5); mov(cr3, rax); mov(r8, qword_ptr(rbx)); mov(rdi, qword_ptr(rbx + 0x7000));
        mov(rax, second | 6); mov(cr3, rax); mov(r9, qword_ptr(rbx));
        add(dword_ptr(r10 + 7 * 8), 0x2000i32);
        // Back without a flush: the old translation; again with one: the new.
        mov(rax, PML4 | 5 | NO_FLUSH); mov(cr3, rax); mov(r11, qword_ptr(rbx + 0x7000)); mov(rsi, cr3);
        mov(r13, qword_ptr(rbx));
        mov(rax, PML4 | 5); mov(cr3, rax); mov(r12, qword_ptr(rbx + 0x7000)); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    let gpr = guest.cpu().gpr;
    assert_eq!((gpr[8], gpr[7], gpr[9], gpr[13]), (1, 1, 2, 1));
    assert_eq!((gpr[11], gpr[12]), (1, 3));
    assert_eq!(gpr[6], PML4 | 5, "bit 63 is not kept");
    // INVPCID: one address, one PCID, everything, everything but global pages.
    for (kind, pcid, linear) in [(0u64, 5u64, PAGE), (1, 5, 0), (2, 0, 0), (3, 0, 0)] {
        let (mut guest, _) = two_spaces();
        guest.put64(DATA, pcid);
        guest.put64(DATA + 8, linear);
        guest.cpu().sys.cr4 |= 1 << 17;
        guest.cpu().sys.cr3 = PML4 | 5;
        let entry = guest.entry(PAGE, 1);
        let code = asm!(64 at CODE;
            mov(rbx, PAGE); mov(r8, qword_ptr(rbx)); mov(rcx, entry); add(dword_ptr(rcx), 0x2000i32);
            mov(r9, qword_ptr(rbx)); mov(rax, kind); mov(rdx, DATA); invpcid(rax, xmmword_ptr(rdx));
            mov(r10, qword_ptr(rbx)); hlt();
        );
        assert_eq!(guest.run_kernel(&code), End::Halt);
        assert_eq!((guest.reg(8), guest.reg(9), guest.reg(10)), (1, 1, 3), "type {kind}");
    }
    // What is not a type, a PCID, an address; PCIDs without CR4.PCIDE; user code.
    for (pcide, kind, pcid, linear) in [
        (true, 4u64, 0u64, 0u64),
        (true, 1, 0x1000, 0),
        (true, 2, 0x1000, 0),
        (true, 3, 1 << 63, 0),
        (true, 0, 5, 1 << 47),
        (false, 1, 5, 0),
    ] {
        let mut guest = Guest::new();
        guest.put64(DATA, pcid);
        guest.put64(DATA + 8, linear);
        guest.cpu().sys.cr4 |= if pcide { 1 << 17 } else { 0 };
        (guest.cpu().gpr[0], guest.cpu().gpr[2]) = (kind, DATA);
        let code = asm!(64 at CODE; invpcid(rax, xmmword_ptr(rdx)););
        assert_eq!(
            guest.run_kernel(&code).fault(),
            (vector::GP, Some(0), CODE),
            "{kind} {pcid:#x}"
        );
    }
    let mut guest = Guest::new();
    guest.cpu().gpr[2] = USER_DATA;
    let code = asm!(64 at USER; invpcid(rax, xmmword_ptr(rdx)););
    assert_eq!(guest.run_user(&code).fault(), (vector::GP, Some(0), USER));
    // CR4.PCIDE with a PCID in CR3, CR0.PG off under it.
    let code = asm!(64 at CODE; mov(rax, cr3); or(eax, 1i32); mov(cr3, rax); mov(rax, cr4); bts(rax, 17i32); mov(cr4, rax););
    assert_eq!(guest.run_kernel(&code).frame().vector, vector::GP);
}

#[test]
fn invlpg_drops_globals_of_every_space() {
    let (mut guest, second) = two_spaces();
    guest.cpu().sys.cr4 |= 1 << 17 | 1 << 7;
    let top = guest.new_table();
    // A page of the upper half, global, shared by both.
    let high = 0xffff_8000_0000_0000u64;
    guest.put64(PML4 + 256 * 8, top | 7);
    guest.put64(second + 256 * 8, top | 7);
    guest.map(high, FRAME, 3 | pte::G);
    let entry = guest.entry(high, 1);
    let code = asm!(64 at CODE;
        mov(rbx, high); mov(r10, entry); mov(r8, qword_ptr(rbx)); mov(rax, second | 6); mov(cr3, rax);
        add(dword_ptr(r10), 0x2000i32); mov(r9, qword_ptr(rbx)); invlpg(ptr(rbx)); mov(r11, qword_ptr(rbx));
        mov(rax, PML4 | 1 << 63); mov(cr3, rax); mov(r12, qword_ptr(rbx)); hlt();
    );
    assert_eq!(guest.run_kernel(&code), End::Halt);
    assert_eq!((guest.reg(8), guest.reg(9), guest.reg(11), guest.reg(12)), (1, 1, 3, 3));
}

#[test]
fn control_registers_refuse_what_cannot_be() {
    let mut guest = Guest::new();
    for (register, value) in [
        (cr0, 1u64 << 31),
        (cr0, 1 << 32 | 0x8001_0033),
        (cr0, 0x33),
        (cr0, 0xa001_0033),
        (cr4, 0),
        (cr4, 1 << 12 | 0x20),
        (cr4, 1 << 22 | 0x20),
        (cr3, 1 << 46),
        (cr8, 16),
    ] {
        let code = asm!(64 at CODE; mov(rax, value); mov(register, rax););
        let fault = guest.run_kernel(&code).frame();
        assert_eq!((fault.vector, fault.code), (vector::GP, Some(0)), "{value:#x}");
    }
    // Registers that do not exist.
    for code in [[0x0f, 0x20, 0xc8], [0x0f, 0x22, 0xe8], [0x0f, 0x20, 0xf8]] {
        assert_eq!(guest.run_kernel(&code).fault(), (vector::UD, None, CODE));
    }
    for code in [
        asm!(64 at USER; mov(rax, cr0);),
        asm!(64 at USER; invlpg(ptr(rax));),
        asm!(64 at USER; clts();),
    ] {
        assert_eq!(guest.run_user(&code).fault(), (vector::GP, Some(0), USER));
    }
}

#[test]
fn tables_outside_ram_are_not_present() {
    let mut guest = Guest::new();
    let at = guest.entry(PAGE, 2);
    guest.put64(at, 0x3fff_ffff_f000 | 7);
    assert_eq!(access(&mut guest, false, &read()), Some(0));
    // A page that is not RAM is the bus.
    guest.put64(at, 0);
    guest.map(PAGE, 0x3fff_ffff_f000, 7);
    assert_eq!(access(&mut guest, false, &read()), None);
    assert_eq!(guest.reg(0), 0xabab_abab);
}

#[test]
fn who_sleeps_is_told_of_each_page_and_not_of_each_store() {
    let ram = mvm_memory::GuestRam::new(&[(0, 0x8000)]).expect("RAM");
    let phys = PhysMemory::new(ram, std::sync::Arc::new(mvm_engine::mock::NoBus), 1);
    phys.want_changed_code(0);
    let gpas = [0x1000, 0x3000, 0x6000];
    let found = gpas.map(|gpa| phys.find(gpa).expect("RAM"));
    for (page, _) in found.iter().cycle().take(10_000) {
        assert!(!phys.watch(*page, 0, 8, 0).1, "nobody has written fast");
        assert!(phys.stored(*page, 4, 1));
    }
    let mut told = phys.take_changed_code(0);
    assert!(told.len() < 20, "{}", told.len());
    told.sort_unstable();
    told.dedup();
    assert_eq!(told, found.map(|(_, host)| host.addr()));
    assert!(phys.take_changed_code(0).is_empty());
}

#[test]
fn ram_that_grows_is_ram_as_far_as_it_may_be_used() {
    use vm_memory::bitmap::Bitmap as _;
    let growth = Some((1 << 32, 0x4000));
    let ram = mvm_memory::GuestRam::growing(&[(0, 0x1000)], growth, mvm_memory::Backing::Small);
    let ram = ram.unwrap();
    let phys = PhysMemory::new(ram.clone(), std::sync::Arc::new(mvm_engine::mock::NoBus), 1);
    let at = |offset: u64| (1 << 32) + offset;
    assert!(phys.find(at(0)).is_none() && !phys.write(at(0x1ff8), &[7; 8]));
    ram.growing_region().unwrap().tracker.make_usable(0x2000);
    assert!(phys.write(at(0x1ff8), &[7; 8]));
    assert_eq!(phys.read_u64(at(0x1ff8)), Some(0x0707_0707_0707_0707));
    assert!(phys.find(at(0x2000)).is_none() && !phys.write(at(0x1ffc), &[7; 8]));
    let (page, _) = phys.find(at(0x1000)).unwrap();
    assert!(
        phys.allow_fast_write(page, 0) && ram.growing_region().unwrap().tracker.dirty_at(0x1000)
    );
}
