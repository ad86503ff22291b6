use super::*;

#[derive(Default)]
struct Log {
    messages: Mutex<Vec<(u64, u32)>>,
    routes: Mutex<Vec<(u8, Option<MsiMessage>)>>,
}

impl MsiSink for Log {
    fn signal_msi(&self, address: u64, data: u32) {
        self.messages.lock().unwrap().push((address, data));
    }
    fn route_changed(&self, pin: u8, message: Option<MsiMessage>) {
        self.routes.lock().unwrap().push((pin, message));
    }
}

fn set_up() -> (Arc<IoApic>, Arc<Log>) {
    let log = Arc::new(Log::default());
    (IoApic::new(log.clone()), log)
}

fn write(ioapic: &IoApic, index: u8, value: u32) {
    ioapic.write(window::SELECT, &[index]);
    ioapic.write(window::DATA, &value.to_le_bytes());
}

fn read(ioapic: &IoApic, index: u8) -> u32 {
    ioapic.write(window::SELECT, &u32::from(index).to_le_bytes());
    let mut data = [0; 4];
    ioapic.read(window::DATA, &mut data);
    u32::from_le_bytes(data)
}

fn taken(log: &Log) -> Vec<(u64, u32)> {
    std::mem::take(&mut log.messages.lock().unwrap())
}

#[test]
fn registers_after_reset() {
    let (ioapic, _) = set_up();
    assert_eq!(read(&ioapic, 1), 0x0017_0020);
    assert_eq!(read(&ioapic, 0x10), 1 << 16);
    assert_eq!(read(&ioapic, 0x10 + 48), 0, "beyond the table");
    write(&ioapic, 0, 0x0500_0000);
    assert_eq!((read(&ioapic, 0), read(&ioapic, 2)), (0x0500_0000, 0x0500_0000));
}

#[test]
fn an_edge_is_sent_once_and_lost_while_masked() {
    let (ioapic, log) = set_up();
    let pin = ioapic.pin(5).unwrap();
    pin.trigger();
    write(&ioapic, 0x1b, 3 << 24);
    write(&ioapic, 0x1a, 0x31);
    assert!(taken(&log).is_empty());
    pin.trigger();
    pin.set_level(true);
    pin.set_level(true);
    assert_eq!(taken(&log), [(0xfee0_3000, 0x31), (0xfee0_3000, 0x31)]);
    let last = *log.routes.lock().unwrap().last().unwrap();
    assert_eq!(last, (5, Some(MsiMessage { address: 0xfee0_3000, data: 0x31 })));
    assert!(!ioapic.wants_eoi(0x31));
}

#[test]
fn a_level_is_sent_again_after_eoi_while_asserted() {
    let (ioapic, log) = set_up();
    let pin = ioapic.pin(9).unwrap();
    pin.set_level(true);
    write(&ioapic, 0x22, 0x40 | 1 << 15);
    assert_eq!(taken(&log), [(0xfee0_0000, 0xc040)], "sent on unmasking");
    assert_eq!(read(&ioapic, 0x22) >> 14 & 1, 1, "remote IRR");
    pin.set_level(true);
    assert!(taken(&log).is_empty(), "remote IRR holds it back");
    assert!(ioapic.wants_eoi(0x40));
    ioapic.eoi_broadcast(0x41);
    assert!(taken(&log).is_empty());
    ioapic.eoi_broadcast(0x40);
    assert_eq!(taken(&log).len(), 1);
    pin.set_level(false);
    ioapic.write(window::EOI, &0x40u32.to_le_bytes());
    assert!(taken(&log).is_empty());
    assert_eq!(read(&ioapic, 0x22) >> 14 & 1, 0);
}

#[test]
fn remote_irr_is_read_only_and_cleared_by_edge_mode() {
    let (ioapic, log) = set_up();
    write(&ioapic, 0x10, 0x50 | 1 << 15 | 1 << 14 | 1 << 12);
    assert_eq!(read(&ioapic, 0x10), 0x50 | 1 << 15);
    ioapic.set_level(0, true);
    assert_eq!(taken(&log).len(), 1);
    write(&ioapic, 0x10, 0x50 | 1 << 16);
    assert_eq!(read(&ioapic, 0x10), 0x50 | 1 << 16);
}

#[test]
fn logical_and_lowest_priority_destinations_reach_the_message() {
    let (ioapic, _) = set_up();
    write(&ioapic, 0x13, 0x0600_0000);
    write(&ioapic, 0x12, 0x60 | 1 << 8 | 1 << 11);
    let route = ioapic.route(1).unwrap();
    assert_eq!(route, MsiMessage { address: 0xfee0_600c, data: 0x160 });
}

#[test]
fn state_survives_save_and_restore() {
    let (ioapic, _) = set_up();
    write(&ioapic, 0x1a, 0x31);
    ioapic.set_level(7, true);
    let (other, log) = set_up();
    other.restore(&ioapic.state());
    assert_eq!(other.state(), ioapic.state());
    assert_eq!(log.routes.lock().unwrap().len(), PINS);
}

#[test]
fn odd_accesses_do_nothing_bad() {
    let (ioapic, _) = set_up();
    for offset in 0..0x1000 {
        for len in 0..=9 {
            let mut data = vec![0xa5; len];
            ioapic.write(offset, &data);
            ioapic.read(offset, &mut data);
        }
    }
    ioapic.set_level(24, true);
    ioapic.set_level(255, true);
    assert!(ioapic.pin(24).is_none());
}
