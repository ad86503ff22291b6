//! The DSDT: devices, processors and sleeping states as AML (ACPI 6.5, chapters 6, 7 and 19).

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use mvm_devices::PowerControl;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform};
use crate::layout;

/// Revision 2: integers have 64 bits.
const REVISION: u8 = 2;

/// A table's header in bytes (5.2.6).
const HEADER: u32 = 36;

/// The whole table.
pub fn table(platform: Platform) -> Sdt {
    let cpus: Vec<Cpu> = (0..platform.vcpus).map(Cpu).collect();
    let virtio: Vec<Virtio> = (0..platform.virtio_devices).map(Virtio).collect();
    let mut devices: Vec<&dyn Aml> = Vec::new();
    devices.extend(cpus.iter().map(|cpu| cpu as &dyn Aml));
    devices.push(&Com1);
    devices.extend(virtio.iter().map(|device| device as &dyn Aml));

    let mut aml = Vec::new();
    Scope::new("\\_SB_".into(), devices).to_aml_bytes(&mut aml);
    if platform.soft_off {
        SoftOff.to_aml_bytes(&mut aml);
    }
    let mut table = Sdt::new(*b"DSDT", HEADER, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&aml);
    table
}

/// A wire from a device to the IOAPIC. Devices send edges, high is active.
fn interrupt(gsi: u32) -> Interrupt {
    const CONSUMER: bool = true;
    const EDGE: bool = true;
    const ACTIVE_LOW: bool = false;
    const SHARED: bool = false;
    Interrupt::new(CONSUMER, EDGE, ACTIVE_LOW, SHARED, gsi)
}

/// A processor (8.4), so that what the MADT lists has an object in the name space.
struct Cpu(u32);

impl Aml for Cpu {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let name = format!("C{:03}", self.0);
        let hid = Name::new("_HID".into(), &"ACPI0007");
        let uid = Name::new("_UID".into(), &self.0);
        Device::new(name.as_str().into(), vec![&hid, &uid]).to_aml_bytes(sink);
    }
}

/// The serial port, a 16550A.
struct Com1;

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        const PORT: u16 = layout::SERIAL_PORT as u16;
        let ports = IO::new(PORT, PORT, 1, mvm_devices::Serial::LEN as u8);
        let interrupt = interrupt(layout::SERIAL_GSI);
        let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
        let uid = Name::new("_UID".into(), &0u8);
        let crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt]));
        Device::new("COM1".into(), vec![&hid, &uid, &crs]).to_aml_bytes(sink);
    }
}

/// A virtio-mmio device. The id is the one that the drivers of Linux and FreeBSD know.
struct Virtio(u32);

impl Aml for Virtio {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let at = layout::virtio_mmio(self.0) as u32;
        let registers = Memory32Fixed::new(true, at, layout::VIRTIO_MMIO_SIZE as u32);
        let interrupt = interrupt(layout::virtio_gsi(self.0));
        let name = format!("V{:03}", self.0);
        let hid = Name::new("_HID".into(), &"LNRO0005");
        let uid = Name::new("_UID".into(), &self.0);
        let crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &interrupt]));
        Device::new(name.as_str().into(), vec![&hid, &uid, &crs]).to_aml_bytes(sink);
    }
}

/// `\_S5` (7.4.2.6): what goes into the sleep control register to switch the machine off. One element alone: kernels that
/// find more take them for those of the PM1 registers, which there are none of.
struct SoftOff;

impl Aml for SoftOff {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let s5 = PowerControl::SLEEP_TYPE_S5;
        Name::new("\\_S5_".into(), &Package::new(vec![&s5])).to_aml_bytes(sink);
    }
}
