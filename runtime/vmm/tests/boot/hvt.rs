//! Kernels for Solo5's hvt.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use mvm_vmm::config::BootProtocol;
use mvm_vmm::testing::{ElfBuilder, file, section};
use mvm_vmm::{Disk, EndReason, Error, Machine, MachineEvent, NetCard, Parts, engines};

use crate::guest::*;

const HVT: u32 = 1;
const BLOCK: u32 = 1;
const NET: u32 = 2;

/// Argument blocks, and data.
const ARGS: u64 = 0x28_0000;
const DATA: u64 = 0x30_0000;

/// What the guest sees of its start: boot information and command line.
const INFO: u64 = 0x1_0000;
const INFO_LEN: usize = 0x4000;

fn kernel(devices: &[(&str, u32)], code: &[u8]) -> Vec<u8> {
    ElfBuilder::elf64(AT).load(AT, code).solo5(HVT, devices).build()
}

fn disk(serial: &str, content: &[u8], read_only: bool) -> Disk {
    Disk { file: Some(file(content).unwrap()), read_only, serial: serial.into() }
}

/// Makes a hypercall with these words as its arguments.
fn call(a: &mut CodeAssembler, number: u32, words: &[u64]) -> Result<(), IcedError> {
    for (at, word) in (ARGS..).step_by(8).zip(words) {
        a.mov(rax, *word)?;
        a.mov(qword_ptr(at), rax)?;
    }
    a.mov(edx, 0x500 + number)?;
    a.mov(eax, ARGS as u32)?;
    a.out(dx, eax)
}

fn puts(a: &mut CodeAssembler, data: u64, len: usize) -> Result<(), IcedError> {
    call(a, 2, &[data, len as u64])
}

fn halt_with(a: &mut CodeAssembler, status: u64) -> Result<(), IcedError> {
    call(a, 8, &[0, status])?;
    halt(a)
}

/// Copies `len` bytes to [`DATA`] and prints them from there.
fn show(a: &mut CodeAssembler, from: u64, len: usize) -> Result<(), IcedError> {
    a.mov(rsi, from)?;
    a.mov(rdi, DATA)?;
    a.mov(rcx, len as u64)?;
    a.cld()?;
    a.rep().movsb()?;
    puts(a, DATA, len)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn a_guest_finds_its_boot_information_and_manifest() {
    const REGISTERS: u64 = DATA - 0x100;
    let code = assemble(64, AT, |a| {
        a.mov(qword_ptr(REGISTERS), rdi)?;
        a.mov(qword_ptr(REGISTERS + 8), rsp)?;
        a.pushfq()?;
        a.pop(rax)?;
        a.mov(qword_ptr(REGISTERS + 16), rax)?;
        a.mov(rax, cr0)?;
        a.mov(qword_ptr(REGISTERS + 24), rax)?;
        a.mov(rax, cr4)?;
        a.mov(qword_ptr(REGISTERS + 32), rax)?;
        // SSE is on.
        a.movups(xmm0, xmmword_ptr(REGISTERS))?;
        a.addps(xmm0, xmm0)?;
        show(a, REGISTERS, 0x28)?;
        show(a, INFO, INFO_LEN)?;
        show(a, CMDLINE.into(), CMDLINE_DUMPED)?;
        halt_with(a, 0)
    });
    let kernel = kernel(&[("data", BLOCK), ("log", BLOCK)], &code);
    let run = run_on_emu(Parts {
        // Less than a large page is of no use.
        memory: MEMORY + (1 << 20),
        cmdline: " --ipv4=10.0.0.2/24 ".into(),
        disks: vec![disk("log", &[0; 3 * 512 + 1], false), disk("x", &[0; 512], false)],
        ..parts(&kernel)
    });
    assert_eq!(run.reason, EndReason::GuestHalt { status: 0, cookie: 0 });
    assert_eq!(run.reason.exit_code(), 0);
    let (registers, rest) = run.console.split_at(0x28);
    let (info, cmdline) = rest.split_at(INFO_LEN);
    assert_eq!((word(registers, 0), word(registers, 8)), (INFO, MEMORY - 8));
    assert_eq!(word(registers, 16) & 1 << 9, 0, "interrupts are off");
    assert_eq!(word(registers, 24) & 0x8000_0021, 0x8000_0021, "PG, NE, PE");
    assert_eq!(word(registers, 32) & 0x620, 0x620, "OSXMMEXCPT, OSFXSR, PAE");

    let [memory, kernel_end, cycles, cmdline_at, manifest_at] =
        std::array::from_fn(|i| word(info, i * 8));
    assert_eq!(memory, MEMORY);
    assert_eq!(kernel_end, (AT + code.len() as u64).next_multiple_of(0x1000));
    assert!((100_000_000..10_000_000_000).contains(&cycles), "{cycles} Hz");
    assert_eq!(cmdline_at, u64::from(CMDLINE));
    assert!(cmdline.starts_with(b" --ipv4=10.0.0.2/24 \0"));
    let manifest = &info[(manifest_at - INFO) as usize..];
    assert_eq!(word(manifest, 0), 1 | 3 << 32, "version and entries");
    let entry = |index: usize| &manifest[8 + index * 104..][..104];
    for (index, name, capacity) in [(1, &b"data\0"[..], 512), (2, b"log\0", 3 * 512)] {
        let entry = entry(index);
        assert!(entry.starts_with(name));
        assert_eq!((entry[68], word(entry, 72), entry[96]), (1, capacity, 1));
        assert_eq!(word(entry, 80) & 0xffff, 512);
    }
    assert_eq!((entry(0)[71], entry(0)[96]), (0x40, 0), "reserved");
}

#[test]
fn a_guest_reads_writes_waits_and_ends_with_a_status() {
    let code = assemble(64, AT, |a| {
        call(a, 1, &[0])?;
        a.mov(rsi, qword_ptr(ARGS))?;
        a.mov(qword_ptr(DATA), rsi)?;
        puts(a, DATA, 8)?;
        call(a, 3, &[2_000_000, 7, 7])?;
        show(a, ARGS + 8, 16)?;
        // Sector 1 to memory, and from there to sector 0.
        call(a, 5, &[1, 512, DATA, 512, 7])?;
        show(a, ARGS + 32, 8)?;
        call(a, 5, &[1, 512, DATA, 512, 7])?;
        call(a, 4, &[1, 0, DATA, 512, 7])?;
        call(a, 5, &[1, 0, DATA + 512, 512, 7])?;
        puts(a, DATA + 512, 512)?;
        call(a, 4, &[1, 1024, DATA, 512, 7])?;
        show(a, ARGS + 32, 8)?;
        // A disk is no network.
        call(a, 7, &[1, DATA, 512, 7])?;
        show(a, ARGS + 24, 8)?;
        halt_with(a, 0x107)
    });
    let content = [[1; 512], [2; 512]].concat();
    let disks = vec![disk("storage", &content, false)];
    let run = run_on_emu(Parts { disks, ..parts(&kernel(&[("storage", BLOCK)], &code)) });
    assert_eq!(run.reason, EndReason::GuestHalt { status: 0x107, cookie: 0 });
    assert_eq!(run.reason.exit_code(), 7);
    let seen = &run.console;
    assert!(word(seen, 0) > 1_700_000_000_000_000_000, "{}", word(seen, 0));
    assert_eq!((word(seen, 8), word(seen, 16) as u32), (0, 0), "nothing is ready");
    assert_eq!(word(seen, 24) as u32, 0, "sector 1 was read");
    assert_eq!(seen[32..544], [2; 512], "and written to sector 0");
    assert_eq!(word(seen, 544) as u32, 2, "there is no sector 2");
    assert_eq!(word(seen, 552) as u32, 2, "nor a network");
}

#[test]
fn a_guest_talks_to_its_network() {
    const FRAME: usize = 60;
    let code = assemble(64, AT, |a| {
        // Tells that it is there, waits for an answer for as long as it takes, and shows it; then
        // what it knows of its device.
        a.mov(rax, 0x0011_2233_4455_6677u64)?;
        a.mov(qword_ptr(DATA), rax)?;
        call(a, 6, &[2, DATA, FRAME as u64, 7])?;
        show(a, ARGS + 24, 4)?;
        call(a, 3, &[u64::MAX, 7, 7])?;
        show(a, ARGS + 8, 16)?;
        call(a, 7, &[2, DATA + 0x1000, 2048, 7])?;
        show(a, ARGS + 16, 12)?;
        puts(a, DATA + 0x1000, FRAME)?;
        call(a, 7, &[2, DATA + 0x1000, 2048, 7])?;
        show(a, ARGS + 16, 12)?;
        show(a, INFO, INFO_LEN)?;
        halt_with(a, 0)
    });
    let kernel = kernel(&[("storage", BLOCK), ("service", NET)], &code);
    for engine in all_engines() {
        let (theirs, network) = UnixDatagram::pair().unwrap();
        network.set_read_timeout(Some(PATIENCE)).unwrap();
        let mac = [2, 0x11, 0x22, 0x33, 0x44, 0x55];
        let answering = std::thread::spawn(move || {
            let mut packet = [0; 2048];
            let len = network.recv(&mut packet).unwrap();
            network.send(&[&[0; 12][..], &[0xab; FRAME]].concat()).unwrap();
            (packet[..len].to_vec(), network)
        });
        let run = run_on(
            &*engine,
            Parts {
                disks: vec![disk("storage", &[0; 512], false)],
                nets: vec![NetCard { queues: vec![theirs.into()], mac, mtu: 1400 }],
                ..parts(&kernel)
            },
        );
        assert_eq!(run.reason, EndReason::GuestHalt { status: 0, cookie: 0 }, "{}", engine.name());
        let (sent, _network) = answering.join().unwrap();
        assert_eq!(sent.len(), 12 + FRAME);
        assert_eq!(sent[..20], [&[0; 12][..], &0x0011_2233_4455_6677u64.to_le_bytes()].concat());
        let mut seen = run.console.as_slice();
        let mut next = |len: usize| seen.split_off(..len).unwrap();
        assert_eq!(next(4), [0; 4], "it was sent");
        let polled = next(16);
        assert_eq!((word(polled, 0), polled[8]), (1 << 2, 1), "one is ready, device 2");
        let read = next(12);
        assert_eq!((word(read, 0), read[8]), (FRAME as u64, 0), "length and result");
        assert_eq!(next(FRAME), [0xab; FRAME]);
        let nothing = next(12);
        assert_eq!((word(nothing, 0), nothing[8]), (2048, 1), "nothing is left: try again");
        let info = next(INFO_LEN);
        let manifest = &info[(word(info, 32) - INFO) as usize..];
        let entry = &manifest[8 + 2 * 104..][..104];
        assert!(entry.starts_with(b"service\0"));
        assert_eq!((&entry[72..78], &entry[78..80]), (&mac[..], &1400u16.to_le_bytes()[..]));
        assert_eq!(entry[96], 1, "attached");
    }
}

#[test]
fn guests_that_do_what_they_must_not_are_ended() {
    let end = |write: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>| {
        let code = assemble(64, AT, |a| {
            // CR0.WP: read-only pages are that for the kernel too.
            a.mov(rax, cr0)?;
            a.bts(rax, 16)?;
            a.mov(cr0, rax)?;
            write(a)?;
            halt_with(a, 1)
        });
        run(parts(&kernel(&[], &code))).reason
    };
    for at in [INFO, u64::from(CMDLINE), 0xf_fff8] {
        let reason = end(&|a| a.mov(qword_ptr(at), rax));
        assert!(matches!(reason, EndReason::TripleFault { .. }), "write to {at:#x}: {reason}");
    }
    for at in [0u64, 0x500, 0x9000, MEMORY] {
        let reason = end(&|a| a.mov(rax, qword_ptr(at)));
        assert!(matches!(reason, EndReason::TripleFault { .. }), "read of {at:#x}: {reason}");
    }
    let reason = end(&|a| puts(a, MEMORY - 4, 5));
    let EndReason::BadHypercall { fault } = &reason else { panic!("{reason}") };
    assert!(fault.contains("number 2") && fault.contains("not the guest's"), "{fault}");
    assert_eq!(reason.exit_code(), 139);
    let reason = end(&|a| call(a, 9, &[0]));
    assert!(matches!(reason, EndReason::BadHypercall { .. }), "{reason}");
    // The ports by which others end their machines do nothing here.
    let reason = end(&|a| {
        a.mov(eax, 3)?;
        a.out(0xf4, eax)?;
        a.mov(eax, 0xfe)?;
        a.out(0x64, al)
    });
    assert_eq!(reason, EndReason::GuestHalt { status: 1, cookie: 0 });
}

/// How many calls of this name the guest has begun.
fn calls(machine: &Machine, name: &str) -> u64 {
    let name = format!("mvm-hvt.{name}");
    machine.device_counters().into_iter().find(|(n, _)| *n == name).expect("a counter").1
}

#[test]
fn a_guest_that_waits_for_ever_can_be_paused_and_goes_on() {
    let code = assemble(64, AT, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        call(a, 3, &[u64::MAX, 0, 0])?;
        a.mov(byte_ptr(DATA), i32::from(b'!'))?;
        puts(a, DATA, 1)?;
        a.jmp(again)
    });
    let kernel = kernel(&[], &code);
    for engine in all_engines() {
        // Each of the ends: while it waits, and while it stands still.
        for still in [false, true] {
            let captured = Captured::default();
            let parts = Parts { console: Box::new(captured.clone()), ..parts(&kernel) };
            let (machine, events) = Machine::new(&*engine, parts).unwrap();
            assert_eq!(machine.boot_protocol(), BootProtocol::Hvt);
            machine.start();
            let state = || {
                (captured.0.lock().unwrap().len(), calls(&machine, "poll"), calls(&machine, "puts"))
            };
            let deadline = Instant::now() + PATIENCE;
            while calls(&machine, "poll") == 0 {
                assert!(Instant::now() < deadline, "it does not begin to wait");
                std::thread::sleep(Duration::from_millis(1));
            }
            // Its wait ends when it is paused, maybe more than once until it stands still. When it is
            // let go on it says so, at the latest then, and waits again.
            while state().0 < 3 {
                assert!(Instant::now() < deadline, "{}: {:?}", engine.name(), state());
                machine.pause().unwrap();
                assert!(!machine.is_running());
                let paused = state();
                std::thread::sleep(Duration::from_millis(2));
                assert_eq!(state(), paused, "{}: it runs while it is paused", engine.name());
                machine.resume();
                std::thread::sleep(Duration::from_millis(1));
            }
            if still {
                machine.pause().unwrap();
            }
            machine.end(EndReason::Stopped);
            let is_end = |e| matches!(e, MachineEvent::Ended(EndReason::Stopped));
            while !is_end(events.wait(Some(PATIENCE)).expect("its end")) {}
            // The end is final.
            machine.resume();
            assert!(machine.has_ended() && !machine.is_running());
            machine.finish(EndReason::Stopped).unwrap();
        }
    }
}

#[test]
fn kernels_that_cannot_be_served_are_refused_with_what_they_lack() {
    let good = || ElfBuilder::elf64(AT).load(AT, &[0xf4]);
    let with_notes = |notes: ElfBuilder| notes.build();
    let abi = |target: u32, version: u32| [target, version, 0, 0].map(u32::to_le_bytes).concat();
    for (file, want) in [
        (with_notes(good().solo5(2, &[])), "target spt"),
        (with_notes(good().solo5(99, &[])), "target number 99"),
        (with_notes(good().note("Solo5", 0x3149_4241, &abi(HVT, 3))), "version 3"),
        (with_notes(good().note("Solo5", 0x3149_4241, &abi(HVT, 2))), "no manifest"),
        (with_notes(good().note("Solo5", 0x3149_4241, &[1; 15])), "15 bytes"),
        (with_notes(ElfBuilder::elf64(AT + 1).load(AT, &[0xf4]).solo5(HVT, &[])), "entry point"),
        (with_notes(good().solo5(HVT, &[("odd", 3)])), "\"odd\""),
    ] {
        let message = refusal(parts(&file)).to_string();
        assert!(message.contains(want), "{message}");
    }
    let fine = || kernel(&[], &[0xf4]);
    let initramfs = Some(section(&[1]).unwrap());
    let message = refusal(Parts { initramfs, ..parts(&fine()) }).to_string();
    assert!(message.contains("hvt has no place for one"), "{message}");
    let message = refusal(Parts { memory: 4 << 30, ..parts(&fine()) }).to_string();
    assert!(message.contains("3072 MiB at most"), "{message}");
    let message = refusal(Parts { cmdline: "x".repeat(8192), ..parts(&fine()) }).to_string();
    assert!(message.contains("8191"), "{message}");
    let boot = BootProtocol::Hvt;
    let message = refusal(Parts { boot, ..parts(&with_notes(good())) }).to_string();
    assert!(message.contains("ABI1"), "{message}");

    let engine = engines::emulation().unwrap();
    for (device, want) in
        [(("uplink", NET), "network device \"uplink\""), (("disk", BLOCK), "\"disk\"")]
    {
        match Machine::new(&*engine, parts(&kernel(&[device], &[0xf4]))) {
            Err(Error::Devices(error)) => assert!(error.to_string().contains(want), "{error}"),
            other => panic!("{other:?}"),
        }
    }
}

/// Where segments of an image lie, and where it does what cannot be done.
const RODATA: u64 = 0x40_0000;
const IMAGE_DATA: u64 = 0x40_2000;
const HEAP: u64 = 0x50_0000;
const IDT: u64 = 0x60_0000;
const IDTR: u64 = 0x61_0000;
const GDT: u64 = 0x62_0000;
/// A handler of page faults, in the code's segment.
const FAULT: u64 = AT + 0x800;

/// A guest that does what `write` says, and whose handler of page faults ends it with their error code and 0x40.
fn protected(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut code = assemble(64, AT, |a| {
        for (at, value) in
            [(0, FAULT & 0xffff | 8 << 16 | 0x8e00 << 32 | FAULT >> 16 << 48), (8, 0)]
        {
            a.mov(rax, value)?;
            a.mov(qword_ptr(IDT + 14 * 16 + at), rax)?;
        }
        a.mov(rax, 0xfff | IDT << 16)?;
        a.mov(qword_ptr(IDTR), rax)?;
        a.mov(word_ptr(IDTR + 8), 0)?;
        a.lidt(qword_ptr(IDTR))?;
        // The descriptor table that it was entered with is where it can see nothing.
        for (at, value) in [(8, 0x00af_9b00_0000_ffff_u64), (16, 0x00cf_9300_0000_ffff)] {
            a.mov(rax, value)?;
            a.mov(qword_ptr(GDT + at), rax)?;
        }
        a.mov(rax, 23 | GDT << 16)?;
        a.mov(qword_ptr(IDTR), rax)?;
        a.lgdt(qword_ptr(IDTR))?;
        write(a)
    });
    assert!(code.len() <= (FAULT - AT) as usize);
    code.resize((FAULT - AT) as usize, 0xf4);
    code.extend(assemble(64, FAULT, |a| {
        a.pop(rbx)?;
        a.or(ebx, 0x40)?;
        a.mov(qword_ptr(ARGS + 8), rbx)?;
        a.mov(edx, 0x508)?;
        a.mov(eax, ARGS as u32)?;
        a.out(dx, eax)?;
        halt(a)
    }));
    // `ret` is code wherever it may be executed.
    ElfBuilder::elf64(AT)
        .load(AT, &code)
        .flags(5)
        .load(RODATA, &[0xc3; 0x1000])
        .flags(4)
        .segment(IMAGE_DATA, IMAGE_DATA, &[0xc3; 16], 0x2000)
        .flags(6)
        .solo5(HVT, &[])
        .build()
}

/// The status with which such a guest ends.
fn status(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
    let run = run(parts(&protected(|a| {
        write(a)?;
        halt_with(a, 0)
    })));
    let EndReason::GuestHalt { status, .. } = run.reason else { panic!("{}", run.reason) };
    u64::try_from(status).unwrap()
}

/// Error codes of page faults (SDM vol. 3, 4.7).
const WRITE_TO_PRESENT: u64 = 3;
const FETCH_FROM_PRESENT: u64 = 0x11;

#[test]
fn code_and_constants_cannot_be_written() {
    for at in [AT, FAULT + 8, RODATA, RODATA + 0xff8] {
        assert_eq!(status(|a| a.mov(qword_ptr(at), 1)), 0x40 | WRITE_TO_PRESENT, "{at:#x}");
    }
    for at in [IMAGE_DATA, IMAGE_DATA + 0x1ff8, HEAP, AT + 0x1000, RODATA - 8, RODATA + 0x1000] {
        assert_eq!(status(|a| a.mov(qword_ptr(at), 1)), 0, "{at:#x}");
    }
    // What the guest is told, and what it cannot see at all.
    assert_eq!(status(|a| a.mov(qword_ptr(INFO), 1)), 0x40 | WRITE_TO_PRESENT);
    assert_eq!(status(|a| a.mov(rax, qword_ptr(0))), 0x40);
}

#[test]
fn data_of_the_image_cannot_be_executed() {
    let call = |at: u64| {
        status(|a| {
            a.mov(rax, at)?;
            a.call(rax)
        })
    };
    for at in [RODATA, IMAGE_DATA] {
        // The fault pushes its frame below the return address.
        assert_eq!(call(at), 0x40 | FETCH_FROM_PRESENT, "{at:#x}");
    }
    // Elsewhere a guest may put code.
    assert_eq!(
        status(|a| {
            a.mov(byte_ptr(HEAP), 0xc3)?;
            a.mov(rax, HEAP)?;
            a.call(rax)
        }),
        0
    );
}

#[test]
fn an_image_in_many_pieces_is_protected_as_far_as_that_goes() {
    // Alternating pages in more large ones than there are tables for.
    const PIECES: u64 = 12;
    let code = assemble(64, AT, |a| {
        for piece in 1..=PIECES {
            a.mov(byte_ptr((piece << 21) + 0x1000), 1)?;
        }
        halt_with(a, 7)
    });
    let mut elf = ElfBuilder::elf64(AT).load(AT, &code).flags(5);
    for piece in 1..=PIECES {
        let at = piece << 21;
        elf = elf.load(at, &[1; 16]).flags(4).load(at + 0x1000, &[2; 16]).flags(6);
    }
    let kernel = elf.solo5(HVT, &[]).build();
    let run = run(Parts { memory: 64 << 20, ..parts(&kernel) });
    assert_eq!(run.reason, EndReason::GuestHalt { status: 7, cookie: 0 });
}

#[test]
fn a_guest_has_as_many_devices_as_a_manifest_has_room_for() {
    const DEVICES: usize = 63;
    let names: Vec<String> = (0..DEVICES).map(|n| format!("storage{n}")).collect();
    let devices: Vec<_> = names.iter().map(|name| (name.as_str(), BLOCK)).collect();
    // Reads the first sector of the last one.
    let code = assemble(64, AT, |a| {
        call(a, 5, &[DEVICES as u64, 0, DATA, 512, 0])?;
        puts(a, DATA, 1)?;
        halt_with(a, 0)
    });
    let disks = (0..DEVICES).map(|n| disk("", &[b'0' + n as u8; 512], false)).collect();
    let run = run_on_emu(Parts { disks, ..parts(&kernel(&devices, &code)) });
    assert_eq!(run.reason, EndReason::GuestHalt { status: 0, cookie: 0 });
    assert_eq!(run.console, [b'0' + DEVICES as u8 - 1]);
}
