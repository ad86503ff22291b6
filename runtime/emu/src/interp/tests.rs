//! Programs through the whole engine: decoding, blocks, handlers.

use crate::fault::{Fault, vector};
use crate::flags::rflags;
use crate::testing::{CODE, End, Machine, STACK};

fn asm(build: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut code = Vec::new();
    build(&mut code);
    code
}

#[test]
fn a_loop_sums_with_flags_and_memory() {
    // xor eax,eax; mov ecx,100; l: add eax,ecx; mov [rsp-8],eax; dec ecx; jnz l; hlt
    let code = [
        0x31, 0xc0, 0xb9, 100, 0, 0, 0, 0x01, 0xc8, 0x89, 0x44, 0x24, 0xf8, 0xff, 0xc9, 0x75, 0xf6,
    ];
    let mut m = Machine::new();
    assert_eq!(m.run(&code), End::Reached);
    assert_eq!(m.cpu.gpr[0], 5050);
    assert_eq!(m.read(STACK - 8), 5050u32.to_le_bytes());
    assert_ne!(m.cpu.rflags() & rflags::ZF, 0);
}

#[test]
fn high_bytes_and_merges() {
    // mov eax,0x11223344; mov ah,al; mov bl,ah; mov ax,0x5566; movzx ecx,ah; movsx rdx,al
    let code = asm(|c| {
        c.extend([0xb8, 0x44, 0x33, 0x22, 0x11, 0x88, 0xc4, 0x88, 0xe3]);
        c.extend([0x66, 0xb8, 0x96, 0x55, 0x0f, 0xb6, 0xcc, 0x48, 0x0f, 0xbe, 0xd0]);
    });
    let mut m = Machine::new();
    assert_eq!(m.run(&code), End::Reached);
    assert_eq!(m.cpu.gpr[3] & 0xff, 0x44);
    assert_eq!(m.cpu.gpr[0], 0x1122_5596);
    assert_eq!(m.cpu.gpr[1], 0x55);
    assert_eq!(m.cpu.gpr[2], 0xffff_ffff_ffff_ff96);
}

#[test]
fn calls_return_and_the_stack_balances() {
    // call f; jmp end; f: push rbp; mov rbp,rsp; mov eax,7; leave; ret
    let code = asm(|c| {
        c.extend([0xe8, 2, 0, 0, 0, 0xeb, 0x0b]);
        c.extend([0x55, 0x48, 0x89, 0xe5, 0xb8, 7, 0, 0, 0, 0xc9, 0xc3]);
    });
    let mut m = Machine::new();
    assert_eq!(m.run(&code), End::Reached);
    assert_eq!(m.cpu.gpr[0], 7);
    assert_eq!(m.cpu.gpr[4], STACK);
}

#[test]
fn accesses_across_pages_and_outside_ram() {
    // mov rax,[rbx]; mov [rbx+1],rax
    let code = [0x48, 0x8b, 0x03, 0x48, 0x89, 0x43, 1];
    let mut m = Machine::new();
    m.write(0x5ffc, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    m.cpu.gpr[3] = 0x5ffc;
    assert_eq!(m.run(&code), End::Reached);
    assert_eq!(m.cpu.gpr[0], 0x0807_0605_0403_0201);
    assert_eq!(m.read(0x5ffc), [1, 1, 2, 3, 4, 5, 6, 7, 8]);
    // Paging is off: a non-canonical address is still #GP.
    m.cpu.gpr[3] = 1 << 63;
    assert_eq!(m.run(&code), End::Fault(Fault::GP0));
    assert_eq!(m.cpu.rip, CODE);
    // Beyond RAM: the bus answers ones.
    m.cpu.gpr[3] = 0x8000_0000;
    assert_eq!(m.run(&code[..3]), End::Reached);
    assert_eq!(m.cpu.gpr[0], u64::MAX);
}

#[test]
fn division_faults_and_results() {
    let mut m = Machine::new();
    // div rcx
    let code = [0x48, 0xf7, 0xf1];
    (m.cpu.gpr[0], m.cpu.gpr[2], m.cpu.gpr[1]) = (5, 3, 4);
    assert_eq!(m.run(&code), End::Reached);
    assert_eq!((m.cpu.gpr[0], m.cpu.gpr[2]), (0xc000_0000_0000_0001, 1));
    m.cpu.gpr[1] = 0;
    assert_eq!(m.run(&code), End::Fault(Fault::DE));
    // idiv ecx of i32::MIN by -1
    (m.cpu.gpr[0], m.cpu.gpr[2], m.cpu.gpr[1]) = (0x8000_0000, 0xffff_ffff, 0xffff_ffff);
    assert_eq!(m.run(&[0xf7, 0xf9]), End::Fault(Fault::DE));
    // idiv rcx with a wide dividend: -(2^64) / 3
    (m.cpu.gpr[0], m.cpu.gpr[2], m.cpu.gpr[1]) = (0, u64::MAX, 3);
    assert_eq!(m.run(&[0x48, 0xf7, 0xf9]), End::Reached);
    assert_eq!((m.cpu.gpr[0] as i64, m.cpu.gpr[2] as i64), (-0x5555_5555_5555_5555, -1));
}

#[test]
fn repeated_moves_overlap_as_the_processor_does() {
    let mut m = Machine::new();
    // rep movsb one byte ahead fills; rep movsq with distance 4 goes by elements.
    m.write(0x6000, &[7]);
    (m.cpu.gpr[6], m.cpu.gpr[7], m.cpu.gpr[1]) = (0x6000, 0x6001, 5000);
    assert_eq!(m.run(&[0xf3, 0xa4]), End::Reached);
    assert_eq!(m.read::<8>(0x6000 + 4993), [7; 8]);
    assert_eq!((m.cpu.gpr[6], m.cpu.gpr[7], m.cpu.gpr[1]), (0x6000 + 5000, 0x6001 + 5000, 0));
    m.write(0x9000, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
    (m.cpu.gpr[6], m.cpu.gpr[7], m.cpu.gpr[1]) = (0x9000, 0x9004, 2);
    assert_eq!(m.run(&[0xf3, 0x48, 0xa5]), End::Reached);
    assert_eq!(
        m.read(0x9000),
        [1u8, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 13, 14, 15, 16].map(|b| b)[..20]
            .try_into()
            .map(|a: [u8; 20]| a)
            .unwrap()
    );
}

#[test]
fn repne_scasb_finds_and_stops() {
    let mut m = Machine::new();
    m.write(0x7000, b"hello\0");
    (m.cpu.gpr[0], m.cpu.gpr[7], m.cpu.gpr[1]) = (0, 0x7000, u64::MAX);
    assert_eq!(m.run(&[0xf2, 0xae]), End::Reached);
    assert_eq!(m.cpu.gpr[7], 0x7006);
    assert_eq!(!m.cpu.gpr[1] - 1, 5);
}

#[test]
fn repeated_comparisons_end_where_they_must_wherever_they_lie() {
    const BYTES: usize = 9000;
    let mut m = Machine::new();
    // Both sides across the ends of pages, at different places of them and not aligned.
    let (first, second) = (0x1_6ff3u64, 0x1_bffd);
    let text: Vec<u8> = (0..BYTES).map(|i| (i * 7 % 251) as u8).collect();
    m.write(first, &text);
    for (size, prefix) in [(1, 0x3e), (2, 0x66), (4, 0x3e), (8, 0x48)] {
        for place in [0, 1, 13 / size, 14 / size, 4100 / size, BYTES / size - 1, BYTES] {
            for until_equal in [false, true] {
                // What ends it is at `place`.
                let element = |i: usize, other: u8| {
                    let ends = i / size == place;
                    if ends == until_equal { text[i] } else { text[i] ^ other }
                };
                let bytes: Vec<u8> = (0..BYTES).map(|i| element(i, 0x80)).collect();
                m.write(second, &bytes);
                let done = (place + 1).min(BYTES / size);
                let number = |bytes: &[u8]| {
                    let mut all = [0; 8];
                    all[..size].copy_from_slice(&bytes[(done - 1) * size..done * size]);
                    u64::from_le_bytes(all)
                };
                let (a, b) = (number(&text), number(&bytes));
                let mut code = vec![if until_equal { 0xf2 } else { 0xf3 }, prefix];
                code.push(if size == 1 { 0xa6 } else { 0xa7 });
                (m.cpu.gpr[6], m.cpu.gpr[7]) = (first, second);
                m.cpu.gpr[1] = (BYTES / size) as u64;
                assert_eq!(m.run(&code), End::Reached);
                let what = (size, place, until_equal);
                let registers = (m.cpu.gpr[6], m.cpu.gpr[7], m.cpu.gpr[1]);
                let bytes_done = (done * size) as u64;
                let expected =
                    (first + bytes_done, second + bytes_done, (BYTES / size - done) as u64);
                assert_eq!(registers, expected, "{what:?}");
                let flags = m.cpu.rflags();
                assert_eq!(flags & rflags::ZF != 0, a == b, "{what:?}");
                assert_eq!(flags & rflags::CF != 0, a < b, "{what:?}");
            }
        }
    }
    // SCAS, which finds it, and does not.
    m.write(first, &[0x55; BYTES]);
    for (size, prefix, opcode) in
        [(1u64, 0x3e, 0xae), (2, 0x66, 0xaf), (4, 0x3e, 0xaf), (8, 0x48, 0xaf)]
    {
        let at = 5000 / size;
        m.write(first + at * size, &[0xaa; 8][..size as usize]);
        let count = BYTES as u64 / size;
        for (rep, value, done) in [
            (0xf2, 0xaaaa_aaaa_aaaa_aaaau64, at + 1),
            (0xf3, 0x5555_5555_5555_5555, at + 1),
            (0xf2, 0x7777_7777_7777_7777, count),
        ] {
            (m.cpu.gpr[0], m.cpu.gpr[7], m.cpu.gpr[1]) = (value, first, count);
            assert_eq!(m.run(&[rep, prefix, opcode]), End::Reached);
            let registers = (m.cpu.gpr[0], m.cpu.gpr[7], m.cpu.gpr[1]);
            assert_eq!(registers, (value, first + done * size, count - done), "{size} {rep:x}");
            assert_eq!(m.cpu.rflags() & rflags::ZF != 0, rep == 0xf2 && done < count, "{size}");
        }
        m.write(first + at * size, &[0x55; 8][..size as usize]);
    }
}

#[test]
fn locked_operations_work_everywhere() {
    let mut m = Machine::new();
    // lock add qword [rbx], 5 inside a page, across pages
    for address in [0x5000u64, 0x5ffd, 0x5003] {
        m.write(address, &10u64.to_le_bytes());
        m.cpu.gpr[3] = address;
        assert_eq!(m.run(&[0xf0, 0x48, 0x83, 0x03, 5]), End::Reached);
        assert_eq!(m.read(address), 15u64.to_le_bytes());
    }
    // lock cmpxchg [rbx], rcx: fails, then succeeds
    (m.cpu.gpr[0], m.cpu.gpr[1], m.cpu.gpr[3]) = (1, 99, 0x5000);
    m.write(0x5000, &15u64.to_le_bytes());
    let code = [0xf0, 0x48, 0x0f, 0xb1, 0x0b];
    assert_eq!(m.run(&code), End::Reached);
    assert_eq!(m.cpu.gpr[0], 15);
    assert_eq!(m.run(&code), End::Reached);
    assert_eq!(m.read(0x5000), 99u64.to_le_bytes());
    assert_ne!(m.cpu.rflags() & rflags::ZF, 0);
    // cmpxchg16b [rbx]
    m.write(0x5010, &[0; 16]);
    (m.cpu.gpr[0], m.cpu.gpr[2], m.cpu.gpr[3], m.cpu.gpr[1]) = (0, 0, 0x5010, 0x77);
    assert_eq!(m.run(&[0xf0, 0x48, 0x0f, 0xc7, 0x0b]), End::Reached);
    assert_eq!(m.read(0x5018), 0x77u64.to_le_bytes());
    m.cpu.gpr[3] = 0x5008 + 4;
    assert_eq!(m.run(&[0xf0, 0x48, 0x0f, 0xc7, 0x0b]), End::Fault(Fault::GP0));
}

#[test]
fn code_that_rewrites_itself_is_seen() {
    // mov byte [rip+1], 42; mov al, 1 (its immediate is rewritten); hlt-free end
    let code = [0xc6, 0x05, 1, 0, 0, 0, 42, 0xb0, 1];
    let mut m = Machine::new();
    m.load(&code);
    m.write(CODE + code.len() as u64, &[0x0f, 0x0b]);
    assert_eq!(m.run_blocks(100), End::Fault(Fault::UD));
    assert_eq!(m.cpu.gpr[0], 42);
    // A device's write is seen as well.
    m.cpu.rip = CODE + 7;
    m.write(CODE + 8, &[43]);
    assert_eq!(m.run_blocks(100), End::Fault(Fault::UD));
    assert_eq!(m.cpu.gpr[0], 43);
}

#[test]
fn instructions_across_pages_run_and_follow_changes() {
    // mov eax, imm32 with the page's end inside the immediate
    let mut m = Machine::new();
    m.write(0x2ffe, &[0xb8, 1, 2, 3, 4, 0x0f, 0x0b]);
    m.cpu.rip = 0x2ffe;
    assert_eq!(m.run_blocks(10), End::Fault(Fault::UD));
    assert_eq!(m.cpu.gpr[0], 0x0403_0201);
    m.write(0x3000, &[9]);
    m.cpu.rip = 0x2ffe;
    assert_eq!(m.run_blocks(10), End::Fault(Fault::UD));
    assert_eq!(m.cpu.gpr[0], 0x0403_0901);
}

#[test]
fn shifts_by_zero_keep_the_flags() {
    let mut m = Machine::new();
    m.cpu.set_rflags(rflags::CF | rflags::OF | rflags::ZF | rflags::PF);
    (m.cpu.gpr[0], m.cpu.gpr[1]) = (0x80, 0x20);
    assert_eq!(m.run(&[0xd3, 0xe0]), End::Reached);
    assert_eq!(m.cpu.rflags() & rflags::ARITH, rflags::CF | rflags::OF | rflags::ZF | rflags::PF);
    // rcl eax,1 takes the carry in
    assert_eq!(m.run(&[0xd1, 0xd0]), End::Reached);
    assert_eq!(m.cpu.gpr[0], 0x101);
}

#[test]
fn page_faults_say_what_and_where() {
    let mut m = Machine::new();
    // PML4 at 0x10000, one 2 MiB page: present, writable, user; a second one read-only.
    m.write(0x10000, &0x11007u64.to_le_bytes());
    m.write(0x11000, &0x12007u64.to_le_bytes());
    m.write(0x12000, &0x87u64.to_le_bytes());
    m.write(0x12008, &(0x20_0085u64).to_le_bytes());
    m.cpu.sys.cr0 |= 1 << 31 | 1 << 16;
    m.cpu.sys.cr4 |= 1 << 5;
    m.cpu.sys.cr3 = 0x10000;
    m.cpu.tlb_set_context();
    // mov [rbx], eax
    let code = [0x89, 0x03];
    m.cpu.gpr[3] = 0x20_0010;
    assert_eq!(m.run(&code), End::Fault(Fault::with_code(vector::PF, 3)));
    assert_eq!(m.cpu.fault_address, 0x20_0010);
    m.cpu.gpr[3] = 0x40_0010;
    assert_eq!(m.run(&code), End::Fault(Fault::with_code(vector::PF, 2)));
    // Across the limit: nothing is written.
    m.cpu.gpr[3] = 0x1f_fffe;
    m.cpu.gpr[0] = u64::MAX;
    assert_eq!(m.run(&code), End::Fault(Fault::with_code(vector::PF, 3)));
    assert_eq!(m.cpu.fault_address, 0x20_0000);
    assert_eq!(m.read::<2>(0x1f_fffe), [0; 2]);
    // A and D are set as needed.
    assert_eq!(m.read::<1>(0x12000)[0] & 0x60, 0x60);
    assert_eq!(m.read::<1>(0x12008)[0] & 0x60, 0);
}

#[test]
fn a_zeroing_idiom_does_not_shape_the_stub_for_other_registers() {
    // vpxor xmm0,xmm0,xmm0; vpcmpeqb xmm1,xmm0,xmm0; vpxor xmm2,xmm1,xmm0; vmovq rax,xmm2
    let code = [
        0xc5, 0xf9, 0xef, 0xc0, 0xc5, 0xf9, 0x74, 0xc8, 0xc5, 0xf1, 0xef, 0xd0, 0xc4, 0xe1, 0xf9,
        0x7e, 0xd0,
    ];
    let mut m = Machine::new();
    if !crate::host::HostFeatures::detect().avx {
        return;
    }
    assert_eq!(m.run(&code), End::Reached);
    assert_eq!(m.cpu.gpr[0], u64::MAX);
}
