//! The tables as a kernel reads them, for every number of vCPUs and devices that can be.

mod aml;

use std::process::Command;

use mvm_memory::GuestRam;

use super::*;
use aml::{Resource, Value};

fn platforms() -> impl Iterator<Item = Platform> {
    let devices = 0..=layout::MAX_VIRTIO_DEVICES;
    (1..=layout::MAX_VCPUS).flat_map(move |vcpus| devices.clone().map(move |n| (vcpus, n))).map(
        |(vcpus, virtio_devices)| Platform {
            vcpus,
            virtio_devices,
            pic: virtio_devices & 1 != 0,
            soft_off: virtio_devices & 2 != 0,
        },
    )
}

const LARGEST: Platform = Platform {
    vcpus: layout::MAX_VCPUS,
    virtio_devices: layout::MAX_VIRTIO_DEVICES,
    pic: true,
    soft_off: true,
};

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn quad(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The tables of one machine in guest memory.
struct Tables(GuestRam);

impl Tables {
    fn write(platform: Platform) -> Self {
        let ram = GuestRam::new(&[(0, 1 << 20)]).unwrap();
        assert_eq!(write(ram.memory(), platform).unwrap(), layout::ACPI_TABLES);
        Self(ram)
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let end = layout::ACPI_TABLES + layout::ACPI_TABLES_MAX;
        assert!(at >= layout::ACPI_TABLES && at + len as u64 <= end, "{at:#x}+{len:#x}");
        let mut bytes = vec![0; len];
        self.0.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// The table at `at`, whole and with a right checksum.
    fn table(&self, at: u64, signature: &[u8; 4]) -> Vec<u8> {
        let header = self.bytes(at, 36);
        assert_eq!(&header[..4], signature);
        let table = self.bytes(at, word(&header, 4) as usize);
        assert_eq!(sum(&table), 0, "checksum of {}", signature.escape_ascii());
        table
    }

    /// What the RSDP leads to: FADT, MADT, DSDT.
    fn all(&self) -> [Vec<u8>; 3] {
        let rsdp = self.bytes(layout::ACPI_TABLES, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((rsdp[15], word(&rsdp, 20)), (2, 36));
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = self.table(quad(&rsdp, 24), b"XSDT");
        let tables: Vec<u64> = xsdt[36..].chunks_exact(8).map(|c| quad(c, 0)).collect();
        let rsdt = self.table(word(&rsdp, 16).into(), b"RSDT");
        assert!(
            rsdt[36..].chunks_exact(4).map(|c| u64::from(word(c, 0))).eq(tables.iter().copied())
        );
        let [fadt, madt] = tables[..] else { panic!("{tables:x?}") };
        let fadt = self.table(fadt, b"FACP");
        let dsdt = self.table(quad(&fadt, 140), b"DSDT");
        [fadt, self.table(madt, b"APIC"), dsdt]
    }
}

#[test]
fn every_machine_has_tables_with_checksums_in_their_place() {
    for platform in platforms() {
        let [_, madt, dsdt] = Tables::write(platform).all();
        // MADT (5.2.12): 8 bytes for each local APIC, 12 for the IOAPIC, 10 for an override.
        let controllers = 8 * platform.vcpus as usize + 12 + 10 * usize::from(platform.pic);
        assert_eq!(madt.len(), 44 + controllers, "{platform:?}");
        let devices = 1 + platform.vcpus + platform.virtio_devices;
        let names = aml::names(&dsdt[36..]);
        let ids = names.keys().filter(|path| path.ends_with("._HID")).count();
        assert_eq!(ids, devices as usize, "{platform:?}");
        let processors = names.values().filter(|v| **v == Value::Text("ACPI0007".into())).count();
        assert_eq!(processors, platform.vcpus as usize);
        assert_eq!(names.contains_key("\\_S5_"), platform.soft_off);
    }
}

#[test]
fn tables_that_do_not_fit_guest_memory_are_refused() {
    let ram = GuestRam::new(&[(0, layout::ACPI_TABLES)]).unwrap();
    let refused = write(ram.memory(), LARGEST);
    assert!(matches!(refused, Err(Error::Structure { what: "ACPI tables", .. })));
}

#[test]
fn the_fadt_describes_a_reduced_machine_with_its_power_registers() {
    let [fadt, ..] = Tables::write(LARGEST).all();
    // Offsets of table 5.9.
    assert_eq!((fadt[8], fadt.len()), (6, 276));
    const HW_REDUCED: u32 = 1 << 20;
    const RESET_REG_SUP: u32 = 1 << 10;
    const BUTTONS_ABSENT: u32 = 1 << 5 | 1 << 4;
    let wanted = HW_REDUCED | RESET_REG_SUP | BUTTONS_ABSENT;
    assert_eq!(word(&fadt, 112) & wanted, wanted);
    assert_eq!(word(&fadt, 109) & 0xffff, 0b10_0100, "neither VGA nor RTC, nor anything else");
    let port = |at: usize| {
        assert_eq!(fadt[at..at + 4], [1, 8, 0, 1], "a byte-wide port");
        quad(&fadt, at + 4)
    };
    assert_eq!((port(116), fadt[128]), (0x602, 1));
    assert_eq!((port(244), port(256)), (0x600, 0x601));
    assert!(fadt[148..244].iter().all(|b| *b == 0), "no fixed hardware");
}

#[test]
fn the_madt_lists_all_controllers() {
    let [_, madt, _] =
        Tables::write(Platform { vcpus: 3, virtio_devices: 0, pic: false, soft_off: true }).all();
    assert_eq!((word(&madt, 36), word(&madt, 40)), (0xfee0_0000, 0), "no PIC");
    for id in 0..3u8 {
        let at = 44 + 8 * usize::from(id);
        assert_eq!(madt[at..at + 8], [0, 8, id, id, 1, 0, 0, 0]);
    }
    let ioapic = &madt[68..];
    assert_eq!((ioapic[0], ioapic[1], word(ioapic, 4), word(ioapic, 8)), (1, 12, 0xfec0_0000, 0));
    assert!(ioapic[2] >= 3, "its id is none of a local APIC");
    assert_eq!(ioapic.len(), 12, "no override");
    let [_, madt, _] =
        Tables::write(Platform { vcpus: 1, virtio_devices: 0, pic: true, soft_off: true }).all();
    assert_eq!((word(&madt, 36), word(&madt, 40)), (0xfee0_0000, 1), "a PIC");
    assert_eq!(madt[64..], [2, 10, 0, 0, 2, 0, 0, 0, 0, 0], "IRQ 0 is at pin 2");
}

#[test]
fn the_dsdt_has_every_device_where_the_layout_puts_it() {
    let [_, _, dsdt] = Tables::write(LARGEST).all();
    let names = aml::names(&dsdt[36..]);
    let get = |path: &str| names.get(path).unwrap_or_else(|| panic!("no {path}"));
    let wire = |gsi| Resource::Interrupt { gsi, edge: true, active_low: false, shared: false };

    assert_eq!(aml::eisa_id(get("\\_SB_.COM1._HID")), "PNP0501");
    let com1 = aml::resources(get("\\_SB_.COM1._CRS"));
    assert_eq!(com1, [Resource::Io { base: 0x3f8, len: 8 }, wire(4)]);

    for index in 0..layout::MAX_VIRTIO_DEVICES {
        let device = format!("\\_SB_.V{index:03}");
        assert_eq!(get(&format!("{device}._HID")), &Value::Text("LNRO0005".into()));
        assert_eq!(get(&format!("{device}._UID")), &Value::Integer(index.into()));
        let base = 0xd000_0000 + 0x1000 * index;
        let registers = Resource::Memory { base, len: 0x1000, writable: true };
        let wanted = [registers, wire(5 + index)];
        assert_eq!(aml::resources(get(&format!("{device}._CRS"))), wanted);
    }
    for id in 0..layout::MAX_VCPUS {
        assert_eq!(get(&format!("\\_SB_.C{id:03}._UID")), &Value::Integer(id.into()));
    }
    let off = [5].map(Value::Integer).to_vec();
    assert_eq!(get("\\_S5_"), &Value::Package(off));
}

#[test]
fn intels_compiler_reads_the_tables() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: there is no iasl (Debian's acpica-tools) here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for platform in [Platform { vcpus: 1, virtio_devices: 0, pic: false, soft_off: true }, LARGEST]
    {
        let [fadt, madt, dsdt] = Tables::write(platform).all();
        for (name, table) in [("facp", fadt), ("apic", madt), ("dsdt", dsdt)] {
            let path = dir.path().join(format!("{name}.aml"));
            std::fs::write(&path, table).unwrap();
            let run = |arguments: &[&str]| {
                let out = Command::new("iasl").args(arguments).current_dir(&dir).output().unwrap();
                let text = String::from_utf8_lossy(&out.stdout).into_owned()
                    + &String::from_utf8_lossy(&out.stderr);
                assert!(out.status.success(), "iasl {arguments:?}: {text}");
                text
            };
            let text = run(&["-d", path.to_str().unwrap()]);
            assert!(!text.contains("rror") && !text.contains("arning"), "{text}");
            // Its own output compiles again, with all of the compiler's checks of methods and names.
            let text = run(&["-we", "-p", "again", &format!("{name}.dsl")]);
            assert!(text.contains(" 0 Warnings, 0 Remarks"), "{text}");
        }
    }
}
