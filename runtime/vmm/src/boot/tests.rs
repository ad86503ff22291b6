//! Kernels of every kind, made by hand.

use mvm_devices::testing::Rng;

use super::*;
use crate::testing::{self, ElfBuilder, bzimage};

const LOAD_AT: u64 = 0x100_0000;

fn section(bytes: &[u8]) -> Section {
    testing::section(bytes).unwrap()
}

/// A Linux kernel with one segment at `start`, 16 bytes in the file and `size` in memory.
fn vmlinux(start: u64, size: u64, entry: u64) -> Vec<u8> {
    elf(start, size, entry).note("Linux", 0x100, b"salt").build()
}

fn elf(start: u64, size: u64, entry: u64) -> ElfBuilder {
    ElfBuilder::elf64(entry).segment(start, start, &[0x90; 16], size)
}

fn place(kernel: &[u8], memory: u64, initramfs: Option<&[u8]>) -> Result<(GuestRam, Entry), Error> {
    announce(kernel, memory, initramfs, 1, &CmdlineParts::default())
}

fn facts(ram: &GuestRam, vcpus: u32) -> Facts<'_> {
    Facts {
        ram,
        vcpus,
        tsc_khz: 1_000_000,
        attached: &[],
        pic: false,
        exit_status: false,
        fw_cfg: None,
    }
}

fn announce(
    kernel: &[u8],
    memory: u64,
    initramfs: Option<&[u8]>,
    vcpus: u32,
    cmdline: &CmdlineParts<'_>,
) -> Result<(GuestRam, Entry), Error> {
    let ram = GuestRam::new(&layout::ram_ranges(memory)).unwrap();
    let initramfs = initramfs.map(|bytes| Module::from(section(bytes)));
    let entry = open(kernel)?.place(&facts(&ram, vcpus), initramfs, cmdline)?;
    Ok((ram, entry))
}

#[test]
fn a_vmlinux_and_its_initramfs_are_placed() {
    let kernel = vmlinux(LOAD_AT, 0x1_0000, LOAD_AT + 4);
    let (ram, entry) = place(&kernel, 64 << 20, Some(&[0x55; 5000])).unwrap();
    assert_eq!((entry.rip, entry.mode), (LOAD_AT + 4, cpu::Mode::Linux64));
    let byte = |at| ram.memory().read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!(byte(LOAD_AT + 15), 0x90);
    let at = (64 << 20) - 0x2000;
    assert_eq!((byte(at), byte(at + 4999), byte(at + 5000)), (0x55, 0x55, 0));
    assert_eq!(
        &ram.memory().read_obj::<[u8; 8]>(GuestAddress(layout::CMDLINE)).unwrap(),
        b"console="
    );
    assert_eq!(&ram.memory().read_obj::<[u8; 4]>(GuestAddress(layout::MP_TABLE)).unwrap(), b"_MP_");
}

/// A kernel that finds ACPI's way to switch its machine off takes it, and its exit code is lost.
#[test]
fn who_tells_an_exit_code_by_a_port_finds_no_other_way_out() {
    let kernel =
        elf(LOAD_AT, 0x1000, LOAD_AT).note("Xen", 18, &(LOAD_AT as u32).to_le_bytes()).build();
    let cmdline = CmdlineParts { style: CmdlineStyle::Bare, ..CmdlineParts::default() };
    for exit_status in [false, true] {
        let ram = GuestRam::new(&layout::ram_ranges(64 << 20)).unwrap();
        let facts = Facts { exit_status, ..facts(&ram, 1) };
        open(&kernel).unwrap().place(&facts, None, &cmdline).unwrap();
        let mut low = vec![0; 1 << 20];
        ram.memory().read_slice(&mut low, GuestAddress(0)).unwrap();
        let has = |text: &[u8]| low.windows(text.len()).any(|bytes| bytes == text);
        assert!(has(b"DSDT") && has(b"_SB_"));
        assert_eq!(has(b"_S5_"), !exit_status);
    }
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry() {
    let (ram, entry) = place(&bzimage(0x020f, 1), 64 << 20, None).unwrap();
    assert_eq!((entry.rip, entry.mode), (0x10_0200, cpu::Mode::Linux64));
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x10_003f)).unwrap(), 0xcc);
    let old = place(&bzimage(0x0206, 1), 64 << 20, None);
    assert!(matches!(old, Err(Error::OldBzImage { major: 2, minor: 6 })));
    assert!(matches!(place(&bzimage(0x020f, 0), 64 << 20, None), Err(Error::OldBzImage { .. })));
}

#[test]
fn too_little_memory_is_told_with_what_is_needed() {
    let kernel = vmlinux(LOAD_AT, 20 << 20, LOAD_AT);
    let Err(error) = place(&kernel, 8 << 20, Some(&[0; 1 << 20])) else { panic!("it fitted") };
    assert!(matches!(error, Error::NotEnoughMemory { have: 0x80_0000, need } if need == 54 << 20));
    assert_eq!(
        error.to_string(),
        "8 MiB of guest memory are not enough for this kernel and initramfs; give at least 54 MiB"
    );
    assert!(place(&kernel, 54 << 20, Some(&[0; 1 << 20])).is_ok());
    let huge = vmlinux(LOAD_AT, u64::MAX / 4, LOAD_AT);
    assert!(matches!(place(&huge, 64 << 20, None), Err(Error::TooLarge { .. })));
}

#[test]
fn a_kernel_that_is_not_linux_needs_no_room_to_work_in() {
    let small = elf(layout::HIGH_RAM_START, 0x1000, layout::HIGH_RAM_START).build();
    assert!(place(&small, layout::MIN_MEMORY, Some(&[0; 1 << 20])).is_ok());
    let full = elf(layout::HIGH_RAM_START, (16 << 20) - layout::HIGH_RAM_START, LOAD_AT - 1);
    assert!(place(&full.build(), 16 << 20, None).is_ok());
    let error = place(&full.build(), 16 << 20, Some(&[0])).unwrap_err();
    assert!(error.to_string().ends_with("give at least 17 MiB"), "{error}");
}

#[test]
fn what_is_no_kernel_is_said_to_be_none() {
    let refused = |bytes: &[u8]| open(bytes).unwrap_err().to_string();
    assert_eq!(
        refused(b"#!/bin/sh\n"),
        "this is not a kernel: neither an ELF file nor a bzImage, and without a multiboot header; it \
         begins with 23 21 2f 62 69 6e 2f 73 (a script)"
    );
    assert!(refused(b"").contains("begins with nothing (the file is empty)"));
    assert!(refused(&[0x1f, 0x8b, 8]).contains("gzip"));
    assert!(refused(&[0; 4096]).contains("00 00 00"));
}

fn open(bytes: &[u8]) -> Result<Kernel, Error> {
    Kernel::open(section(bytes), BootProtocol::Auto)
}

#[test]
fn damaged_elf_files_are_refused() {
    let refused = |bytes: &[u8]| open(bytes).unwrap_err();
    assert!(matches!(refused(b"\x7fELF\x02\x01"), Error::Elf(_)));
    let good = vmlinux(LOAD_AT, 0x1000, LOAD_AT);
    let patched = |at: usize, value: u8| {
        let mut file = good.clone();
        file[at] = value;
        file
    };
    assert!(matches!(refused(&patched(18, 183)), Error::WrongMachine { bits: 64, machine: 183 }));
    assert!(matches!(refused(&patched(5, 2)), Error::WrongMachine { .. }), "big-endian");
    assert!(matches!(refused(&patched(4, 3)), Error::Elf(_)), "no such class");
    // What a 32-bit file has elsewhere makes no sense here.
    assert!(matches!(refused(&patched(4, 1)), Error::Elf(_)));
    for (at, value) in [(57, 1), (54, 55), (35, 1)] {
        assert!(matches!(refused(&patched(at, value)), Error::Elf(_)), "{at}");
    }
    let low = vmlinux(0x1000, 0x1000, LOAD_AT);
    assert!(matches!(refused(&low), Error::Segment { start: 0x1000, .. }));
    let wraps = vmlinux(u64::MAX - 5, 0x1000, LOAD_AT);
    assert!(matches!(refused(&wraps), Error::Segment { .. }));
    assert!(matches!(refused(&vmlinux(LOAD_AT, 0x1000, LOAD_AT - 1)), Error::Elf(_)));
    assert!(matches!(refused(&vmlinux(LOAD_AT, 15, LOAD_AT)), Error::Elf(_)), "more than fits");
    for cut in 1..good.len() {
        assert!(open(&good[..cut]).is_err(), "cut after {cut} bytes");
    }
    let overlap = |start| elf(LOAD_AT, 0x1000, LOAD_AT).load(start, &[1; 8]).build();
    assert!(matches!(refused(&overlap(LOAD_AT + 0xfff)), Error::Elf(_)));
    assert!(matches!(refused(&overlap(LOAD_AT - 7)), Error::Elf(_)));
    assert!(open(&overlap(LOAD_AT + 0x1000)).is_ok());
    assert!(open(&overlap(LOAD_AT - 8)).is_ok());
    assert!(matches!(refused(&ElfBuilder::elf64(LOAD_AT).build()), Error::Elf(_)));
}

/// A fixed slice of what `make fuzz` does without end: no input makes the loaders panic, and what
/// they accept they can place or refuse to.
#[test]
fn damaged_kernels_of_every_form_are_placed_or_refused() {
    let mut rng = Rng::new(5);
    let kernels = testing::kernels();
    let ram = GuestRam::new(&layout::ram_ranges(64 << 20)).unwrap();
    let (mut placed, mut refused) = (0, 0);
    for round in 0..6000 {
        let mut kernel = kernels[round % kernels.len()].clone();
        for _ in 0..1 + rng.below(4) {
            let at = rng.below(kernel.len().min(0x300) as u64) as usize;
            match rng.below(4) {
                0 => kernel[at] ^= 1 << rng.below(8),
                1 => kernel[at] = rng.next() as u8,
                2 => kernel[at..].iter_mut().take(4).for_each(|b| *b = 0xff),
                _ => kernel.truncate(at.max(1)),
            }
        }
        let Ok(kernel) = open(&kernel) else {
            refused += 1;
            continue;
        };
        match kernel.place(&facts(&ram, 1), None, &CmdlineParts::default()) {
            Ok(_) => placed += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(placed > 300 && refused > 300, "{placed} placed, {refused} refused");
}

#[test]
fn any_memory_size_boots_or_is_refused_with_and_without_acpi() {
    let mut rng = Rng::new(2024);
    let mut below = |n| rng.below(n);
    let mut booted = [0; 2];
    for round in 0..400 {
        let memory = match below(4) {
            0 => layout::MIN_MEMORY + below(64 << 20),
            1 => layout::LOW_MEMORY_END - (1 << 20) + below(2 << 20),
            2 => layout::LOW_MEMORY_END + below(1 << 30),
            _ => 1 << below(33).max(22),
        };
        let acpi = round % 2 == 1;
        let parts = CmdlineParts {
            style: if acpi { CmdlineStyle::Stock } else { CmdlineStyle::Linux },
            virtio_devices: below(u64::from(layout::MAX_VIRTIO_DEVICES) + 1) as u32,
            high_memory: memory > layout::LOW_MEMORY_END,
            ..CmdlineParts::default()
        };
        let kernel = match below(2) {
            0 => vmlinux(LOAD_AT, 1 + below(32 << 20), LOAD_AT),
            _ => bzimage(0x020f, 1),
        };
        let initramfs = vec![7; below(1 << 16) as usize];
        let vcpus = 1 + below(layout::MAX_VCPUS.into()) as u32;
        let ram = match announce(&kernel, memory, Some(&initramfs), vcpus, &parts) {
            Ok((ram, _)) => ram,
            Err(Error::NotEnoughMemory { have, need }) => {
                assert!(have < need && have < 128 << 20, "{have:#x} {need:#x}");
                continue;
            }
            Err(error) => panic!("{memory:#x}: {error}"),
        };
        booted[usize::from(acpi)] += 1;
        let word = |at| ram.memory().read_obj::<u64>(GuestAddress(at)).unwrap();
        let rsdp = word(layout::ZERO_PAGE + 0x70);
        let signature = u64::from_le_bytes(*b"RSD PTR ");
        assert_eq!(rsdp, if acpi { layout::ACPI_TABLES } else { 0 });
        assert_eq!(word(layout::ACPI_TABLES) == signature, acpi);
        assert_eq!(word(layout::MP_TABLE) as u32, u32::from_le_bytes(*b"_MP_"));
    }
    assert!(booted.iter().all(|n| *n > 100), "{booted:?}");
}

#[test]
fn a_bzimage_is_taken_for_a_distributions_kernel() {
    let style = |kernel: &[u8], wanted| open(kernel).unwrap().cmdline_style(wanted);
    let (ours, stock) = (vmlinux(LOAD_AT, 16, LOAD_AT), bzimage(0x020f, 1));
    assert_eq!(style(&ours, CmdlineStyle::Auto), CmdlineStyle::Linux);
    assert_eq!(style(&stock, CmdlineStyle::Auto), CmdlineStyle::Stock);
    assert_eq!(style(&stock, CmdlineStyle::Linux), CmdlineStyle::Linux);
}
