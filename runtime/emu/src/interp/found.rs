//! What the differential fuzzer found, one test for each.

use crate::fault::Fault;
use crate::flags::rflags;
use crate::testing::{End, Machine, UserMachine, UserPage, UserState};

#[test]
fn xlat_adds_al_once_and_nothing_of_rax() {
    let mut m = Machine::new();
    m.write(0x5002, &[7]);
    (m.cpu.gpr[0], m.cpu.gpr[3]) = (0xff02, 0x5000);
    assert_eq!(m.run(&[0xd7]), End::Reached);
    assert_eq!(m.cpu.gpr[0], 0xff07);
}

#[test]
fn segment_prefixes_without_a_base_do_not_choose_the_exception() {
    let mut m = Machine::new();
    (m.cpu.gpr[3], m.cpu.gpr[5]) = (1 << 63, 1 << 63);
    // mov eax, ss:[rbx]; mov eax, ds:[rbp]
    assert_eq!(m.run(&[0x36, 0x8b, 0x03]), End::Fault(Fault::GP0));
    assert_eq!(m.run(&[0x3e, 0x8b, 0x45, 0]), End::Fault(Fault::SS0));
}

#[test]
fn fwait_is_an_instruction() {
    assert_eq!(Machine::new().run(&[0x9b]), End::Reached);
}

#[test]
fn hints_of_newer_processors_do_nothing() {
    let mut m = Machine::new();
    m.cpu.gpr[0] = 5;
    // rdsspq rax (libgcc's unwinder runs it everywhere); cldemote [rax]; prefetchit0 [rip]
    let code = [0xf3, 0x48, 0x0f, 0x1e, 0xc8, 0x0f, 0x1c, 0x00, 0x0f, 0x18, 0x3d, 0, 0, 0, 0];
    assert_eq!(m.run(&code), End::Reached);
    assert_eq!(m.cpu.gpr[0], 5);
}

#[test]
fn a_failed_cmpxchg_leaves_its_destination_whole() {
    let mut m = Machine::new();
    (m.cpu.gpr[0], m.cpu.gpr[3]) = (1, u64::MAX);
    // cmpxchg ebx, ecx
    assert_eq!(m.run(&[0x0f, 0xb1, 0xcb]), End::Reached);
    assert_eq!((m.cpu.gpr[0], m.cpu.gpr[3]), (0xffff_ffff, u64::MAX));
}

#[test]
fn a_fault_in_a_repeated_comparison_leaves_the_flags() {
    let mut m = Machine::new();
    m.cpu.set_rflags(rflags::ZF | rflags::PF);
    // repne scasb over the last canonical byte
    let last = 0x7fff_ffff_fffe;
    (m.cpu.gpr[0], m.cpu.gpr[1], m.cpu.gpr[7]) = (0, 5, last);
    assert_eq!(m.run(&[0xf2, 0xae]), End::Fault(Fault::GP0));
    assert_eq!((m.cpu.gpr[1], m.cpu.gpr[7]), (3, last + 2));
    assert_eq!(m.cpu.rflags() & rflags::ARITH, rflags::ZF | rflags::PF);
    // The same after more elements than are done at once.
    (m.cpu.gpr[1], m.cpu.gpr[7]) = (5000, last + 2 - 4000);
    assert_eq!(m.run(&[0xf2, 0xae]), End::Fault(Fault::GP0));
    assert_eq!(m.cpu.gpr[1], 1000);
    assert_eq!(m.cpu.rflags() & rflags::ARITH, rflags::ZF | rflags::PF);
}

#[test]
fn conversions_from_memory_to_integers_obey_mxcsr() {
    let mut m = Machine::new();
    m.write(0x5000, &1.5f64.to_le_bytes());
    m.write(0x5008, &0x1f80u32.to_le_bytes());
    m.write(0x500c, &0x3f80u32.to_le_bytes());
    m.cpu.gpr[3] = 0x5000;
    // ldmxcsr [rbx + 12] (round down); cvtsd2si eax, [rbx]; cvtpd2pi mm0, [rbx]; movd ecx, mm0
    let code =
        [0x0f, 0xae, 0x53, 12, 0xf2, 0x0f, 0x2d, 0x03, 0x66, 0x0f, 0x2d, 0x03, 0x0f, 0x7e, 0xc1];
    assert_eq!(m.run(&code), End::Reached);
    assert_eq!((m.cpu.gpr[0], m.cpu.gpr[1]), (1, 1));
}

#[test]
fn an_exception_of_a_conversion_keeps_the_mmx_register() {
    let mut m = Machine::new();
    m.write(0x5000, &[0x11; 8]);
    m.write(0x5008, &0x1f00u32.to_le_bytes());
    m.write(0x5010, &[0xff; 16]);
    m.cpu.gpr[3] = 0x5000;
    // movq mm0, [rbx]; ldmxcsr [rbx + 8] (invalid operations unmasked); cvtps2pi mm0, [rbx + 16]
    let code = [0x0f, 0x6f, 0x03, 0x0f, 0xae, 0x53, 8, 0x0f, 0x2d, 0x43, 16];
    assert_eq!(m.run(&code), End::Fault(Fault::new(crate::fault::vector::XM)));
    // movq [rbx + 32], mm0
    assert_eq!(m.run(&[0x0f, 0x7f, 0x43, 32]), End::Reached);
    assert_eq!(m.read(0x5020), [0x11u8; 8]);
}

#[test]
fn an_exact_tiny_result_underflows_if_that_is_unmasked() {
    let mut m = Machine::new();
    m.write(0x5000, &f64::MIN_POSITIVE.to_le_bytes());
    m.write(0x5008, &0.5f64.to_le_bytes());
    m.write(0x5010, &0x1780u32.to_le_bytes());
    m.cpu.gpr[3] = 0x5000;
    // ldmxcsr [rbx + 16]; movsd xmm0, [rbx]; mulsd xmm0, [rbx + 8]
    let code = [0x0f, 0xae, 0x53, 16, 0xf2, 0x0f, 0x10, 0x03, 0xf2, 0x0f, 0x59, 0x43, 8];
    assert_eq!(m.run(&code), End::Fault(Fault::new(crate::fault::vector::XM)));
    assert_eq!(m.cpu.vec.mxcsr() & 0x3f, 0x10);
}

#[test]
fn an_exact_tiny_half_underflows_if_that_is_unmasked() {
    if !crate::host::HostFeatures::detect().f16c {
        return;
    }
    for (single, mxcsr, raised) in [
        (2f32.powi(-15), 0x1780u32, true),
        (-2f32.powi(-24), 0x1780, true),
        (1023.0 * 2f32.powi(-24), 0x9780, true),
        (2f32.powi(-14), 0x1780, false),
        (0.0, 0x1780, false),
        (2f32.powi(-15), 0x1f80, false),
    ] {
        let mut m = Machine::new();
        // The last element of four.
        m.write(0x500c, &single.to_le_bytes());
        m.write(0x5010, &mxcsr.to_le_bytes());
        m.cpu.gpr[3] = 0x5000;
        // ldmxcsr [rbx + 16]; movups xmm1, [rbx]
        let start = [0x0f, 0xae, 0x53, 16, 0x0f, 0x10, 0x0b];
        // vcvtps2ph xmm0, xmm1, 0; vcvtps2ph [rbx + 1], xmm1, 0
        let register: &[u8] = &[0xc4, 0xe3, 0x79, 0x1d, 0xc8, 0];
        let memory: &[u8] = &[0xc4, 0xe3, 0x79, 0x1d, 0x4b, 1, 0];
        for code in [register, memory] {
            let end = m.run(&[&start, code].concat());
            let (expected, flags) = if raised {
                (End::Fault(Fault::new(crate::fault::vector::XM)), 0x10)
            } else {
                (End::Reached, 0)
            };
            assert_eq!((end, m.cpu.vec.mxcsr() & 0x3f), (expected, flags), "{single} {mxcsr:#x}");
        }
    }
}

#[test]
fn emms_waits_for_pending_exceptions() {
    let mut m = Machine::new();
    m.write(0x5000, &[0x7e, 3]);
    m.cpu.gpr[3] = 0x5000;
    // fldcw [rbx] (invalid operations unmasked); fld st(0) of an empty stack; emms
    let code = [0xd9, 0x2b, 0xd9, 0xc0, 0x0f, 0x77];
    assert_eq!(m.run(&code), End::Fault(Fault::new(crate::fault::vector::MF)));
}

#[test]
fn gathers_and_masked_moves_in_the_stack_segment_raise_stack_faults() {
    let mut m = Machine::new();
    if !crate::host::HostFeatures::detect().avx2 {
        return;
    }
    m.cpu.gpr[5] = 1 << 63;
    // vpcmpeqd xmm1, xmm1, xmm1; vmaskmovps xmm0, xmm1, [rbp]
    let code = [0xc5, 0xf1, 0x76, 0xc9, 0xc4, 0xe2, 0x71, 0x2c, 0x45, 0];
    assert_eq!(m.run(&code), End::Fault(Fault::SS0));
    // the same; vgatherdps xmm0, [rbp + xmm2], xmm1
    let code = [0xc5, 0xf1, 0x76, 0xc9, 0xc4, 0xe2, 0x71, 0x92, 0x44, 0x15, 0];
    assert_eq!(m.run(&code), End::Fault(Fault::SS0));
}

#[test]
fn an_access_across_the_end_of_canonical_addresses_is_a_protection_fault() {
    let mut m = Machine::new();
    // Paging with nothing mapped but the code.
    m.write(0x10000, &0x11007u64.to_le_bytes());
    m.write(0x11000, &0x12007u64.to_le_bytes());
    m.write(0x12000, &0x87u64.to_le_bytes());
    m.cpu.sys.cr0 |= 1 << 31;
    m.cpu.sys.cr4 |= 1 << 5;
    m.cpu.sys.cr3 = 0x10000;
    m.cpu.tlb_set_context();
    m.cpu.gpr[3] = 0x7fff_ffff_fffe;
    // A load, a store, a modification, a vector load.
    for code in
        [&[0x8b, 0x03][..], &[0x89, 0x03], &[0x01, 0x03], &[0xf0, 0x01, 0x03], &[0x0f, 0x10, 0x03]]
    {
        assert_eq!(m.run(code), End::Fault(Fault::GP0), "{code:02x?}");
    }
}

#[test]
fn clflush_in_the_stack_segment_raises_stack_faults() {
    let mut m = Machine::new();
    m.cpu.gpr[4] = 1 << 60;
    // clflush [rsp + 8], clflush [rax]
    assert_eq!(m.run(&[0x0f, 0xae, 0x7c, 0x24, 8]), End::Fault(Fault::SS0));
    m.cpu.gpr[0] = 1 << 60;
    assert_eq!(m.run(&[0x0f, 0xae, 0x38]), End::Fault(Fault::GP0));
}

#[test]
fn enter_faults_if_its_frame_cannot_be_written() {
    let mut m = Machine::new();
    m.cpu.gpr[4] = 0xffff_8000_0000_0100;
    // enter 0x200, 0
    assert_eq!(m.run(&[0xc8, 0, 2, 0]), End::Fault(Fault::SS0));
    assert_eq!(m.cpu.gpr[4], 0xffff_8000_0000_0100);
}

#[test]
fn a_repetition_counted_by_ecx_clears_the_rest_of_rcx() {
    let mut m = Machine::new();
    m.cpu.gpr[1] = 1 << 40;
    // rep stosb with a 32-bit address
    assert_eq!(m.run(&[0x67, 0xf3, 0xaa]), End::Reached);
    assert_eq!(m.cpu.gpr[1], 0);
}

#[test]
fn bit_strings_at_a_bare_address_keep_its_size() {
    let mut m = Machine::new();
    m.write(0x5000, &[1]);
    m.cpu.set_rflags(0);
    // bt [0x5004] with a 32-bit address, eax = -32
    m.cpu.gpr[0] = 0xffff_ffe0;
    let code = [0x67, 0x0f, 0xa3, 0x04, 0x25, 0x04, 0x50, 0, 0];
    assert_eq!(m.run(&code), End::Reached);
    assert_eq!(m.cpu.rflags() & rflags::CF, rflags::CF);
    // The same below zero: it wraps at 32 bits, where there is no RAM and the bus says ones.
    m.cpu.set_rflags(0);
    let code = [0x67, 0x0f, 0xa3, 0x04, 0x25, 0, 0, 0, 0];
    assert_eq!(m.run(&code), End::Reached);
    assert_eq!(m.cpu.rflags() & rflags::CF, rflags::CF);
}

#[test]
fn elements_of_masked_moves_do_not_wrap_at_the_address_size() {
    if !crate::host::HostFeatures::detect().avx {
        return;
    }
    let page = |linear, physical| UserPage { linear, physical, write: true, execute: true };
    let mut machine =
        UserMachine::new(&[page(0xffff_f000, 0x2_0000), page(0x1_0000_0000, 0x2_2000)]);
    // vcmptrueps xmm1, xmm1, xmm1; vmaskmovps xmm0, xmm1, [ebx]; int3
    let code = [0xc5, 0xf0, 0xc2, 0xc9, 0x0f, 0x67, 0xc4, 0xe2, 0x71, 0x2c, 0x03, 0xcc];
    machine.write(0x2_0000, &code);
    machine.write(0x2_0ffc, &[5; 4]);
    machine.write(0x2_2000, &[7; 12]);
    let mut gpr = [0; 16];
    gpr[3] = 0xffff_fffc;
    let mut xsave = [0; 832];
    xsave[24..26].copy_from_slice(&[0x80, 0x1f]);
    xsave[512] = 7;
    let state = UserState { gpr, rip: 0xffff_f000, rflags: 2, gs_base: 0, xsave };
    machine.start(&state, false);
    let (exception, end) = machine.run(None).expect("an exception");
    assert_eq!(exception.vector, crate::fault::vector::BP);
    assert_eq!(end.xsave[160..176], [5, 5, 5, 5, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]);
}
