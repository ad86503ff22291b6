//! A guest that reads items.

use vm_memory::{Bytes, GuestAddress};

use super::*;

const RAM: u64 = 1 << 20;
const DESCRIPTOR: u64 = 0x1000;
const BUFFER: u64 = 0x2000;

const READ: u32 = 2;
const SKIP: u32 = 4;
const SELECT: u32 = 8;
const WRITE: u32 = 16;

struct Guest {
    ram: GuestRam,
    device: FwCfg,
}

fn guest() -> Guest {
    let ram = GuestRam::new(&[(0, RAM)]).unwrap();
    let device = FwCfg::new(ram.clone());
    device.item(key::NB_CPUS, 3u16.to_le_bytes().to_vec());
    Guest { ram, device }
}

impl Guest {
    fn select(&self, number: u16) {
        self.device.write(0, &number.to_le_bytes());
    }

    fn bytes(&self, len: usize) -> Vec<u8> {
        let next = |_| {
            let mut byte = [0xee];
            self.device.read(FwCfg::DATA, &mut byte);
            byte[0]
        };
        (0..len).map(next).collect()
    }

    fn item(&self, number: u16, len: usize) -> Vec<u8> {
        self.select(number);
        self.bytes(len)
    }

    /// Runs a DMA descriptor and returns its control word afterwards.
    fn dma(&self, control: u32, length: u32, address: u64) -> u32 {
        let descriptor =
            [&control.to_be_bytes()[..], &length.to_be_bytes(), &address.to_be_bytes()].concat();
        self.ram.memory().write_slice(&descriptor, GuestAddress(DESCRIPTOR)).unwrap();
        self.start(DESCRIPTOR);
        u32::from_be_bytes(self.ram.memory().read_obj(GuestAddress(DESCRIPTOR)).unwrap())
    }

    fn start(&self, descriptor: u64) {
        self.device.write(FwCfg::DMA, &((descriptor >> 32) as u32).to_be_bytes());
        self.device.write(FwCfg::DMA + 4, &(descriptor as u32).to_be_bytes());
    }

    fn memory(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

#[test]
fn items_are_read_byte_by_byte_and_end_in_zeros() {
    let guest = guest();
    assert_eq!(guest.item(key::SIGNATURE, 6), b"QEMU\0\0");
    assert_eq!(guest.item(key::ID, 4), [3, 0, 0, 0]);
    assert_eq!(guest.item(key::NB_CPUS, 2), [3, 0]);
    assert_eq!(guest.item(0x3fff, 3), [0; 3], "there is none");
    assert_eq!(guest.item(key::SIGNATURE | 1 << 14, 4), b"QEMU", "the write channel");
    assert_eq!(guest.item(key::SIGNATURE | 1 << 15, 4), [0; 4], "one of the architecture's own");
    guest.select(key::SIGNATURE);
    assert_eq!((guest.bytes(2), guest.bytes(2)), (b"QE".to_vec(), b"MU".to_vec()));
}

#[test]
fn only_whole_registers_do_something() {
    let guest = guest();
    guest.select(key::SIGNATURE);
    guest.device.write(0, &[5]);
    guest.device.write(FwCfg::DATA, &[5]);
    guest.device.write(FwCfg::DATA, &[5, 0]);
    guest.device.write(2, &[0; 9]);
    guest.device.write(0, &[]);
    let mut other = [0xee; 2];
    guest.device.read(2, &mut other);
    assert_eq!(other, [0; 2]);
    assert_eq!(guest.bytes(4), b"QEMU");
    let mut wide = [0xee; 16];
    guest.device.read(FwCfg::DMA, &mut wide);
    assert_eq!(&wide, b"QEMU CFG\0\0\0\0\0\0\0\0");
}

#[test]
fn files_are_listed_by_name_and_size() {
    let guest = guest();
    assert_eq!(guest.item(key::FILE_DIRECTORY, 4), [0; 4]);
    assert!(guest.device.file("etc/one", vec![7; 5]));
    assert!(guest.device.file(&"n".repeat(55), vec![8; 300]));
    assert!(!guest.device.file(&"n".repeat(56), vec![9]), "no room for the NUL");
    let directory = guest.item(key::FILE_DIRECTORY, 4 + 3 * 64);
    assert_eq!(directory[..4], [0, 0, 0, 2]);
    let entry = |index: usize| &directory[4 + index * 64..4 + (index + 1) * 64];
    assert_eq!(entry(0)[..16], *b"\0\0\0\x05\0\x20\0\0etc/one\0");
    assert_eq!(entry(1)[..8], [0, 0, 1, 44, 0, 0x21, 0, 0]);
    assert_eq!((entry(1)[62], entry(1)[63]), (b'n', 0));
    assert_eq!(entry(2), [0; 64], "the directory ends there");
    assert_eq!(guest.item(0x20, 6), [7, 7, 7, 7, 7, 0]);
    for index in 2..64 {
        assert!(guest.device.file(&index.to_string(), Vec::new()));
    }
    assert!(!guest.device.file("one too many", Vec::new()));
}

#[test]
fn dma_selects_skips_and_reads() {
    let guest = guest();
    guest.device.file("long", (0..=255u8).cycle().take(10_000).collect::<Vec<_>>());
    let select = |number: u16| u32::from(number) << 16 | SELECT;
    assert_eq!(guest.dma(select(0x20) | READ, 9000, BUFFER), 0);
    let read = guest.memory(BUFFER, 9001);
    assert!(read[..9000].iter().enumerate().all(|(i, byte)| *byte == i as u8));
    assert_eq!(read[9000], 0);
    assert_eq!(guest.dma(SKIP, 998, 0), 0);
    assert_eq!(guest.dma(READ, 4, BUFFER), 0);
    assert_eq!(
        guest.memory(BUFFER, 4),
        [9998u16 as u8, 9999u16 as u8, 0, 0],
        "zeros after its end"
    );
    assert_eq!(guest.dma(select(key::SIGNATURE), 0, 0), 0, "nothing but the number");
    assert_eq!(guest.bytes(4), b"QEMU", "both ways of reading go on from one place");
    assert_eq!(guest.dma(SKIP, u32::MAX, 0), 0);
    assert_eq!(guest.dma(select(0x3ffe) | READ, 4, BUFFER), 0);
    assert_eq!(guest.memory(BUFFER, 4), [0; 4], "there is none");
}

#[test]
fn what_cannot_be_done_is_an_error_and_changes_nothing() {
    let guest = guest();
    guest.select(key::SIGNATURE);
    for (control, length, address) in [
        (WRITE, 4, BUFFER),
        (READ, 0x1000, RAM - 0xfff),
        (READ, u32::MAX, BUFFER),
        (READ, 1, RAM),
        (READ, 2, u64::MAX),
    ] {
        assert_eq!(guest.dma(control, length, address), 1, "{control} {length:#x} {address:#x}");
    }
    assert_eq!(guest.memory(RAM - 16, 16), [0; 16]);
    assert_eq!(guest.bytes(4), b"QEMU");
    // There is no telling where these descriptors are.
    for at in [RAM - 15, RAM, u64::MAX] {
        guest.start(at);
    }
    // The upper half holds for one transfer.
    guest.device.write(FwCfg::DMA, &u32::MAX.to_be_bytes());
    guest.device.write(FwCfg::DMA + 4, &0u32.to_be_bytes());
    guest.select(key::SIGNATURE);
    let control = (READ | SELECT).to_be_bytes();
    let descriptor = [&control[..], &4u32.to_be_bytes(), &BUFFER.to_be_bytes()].concat();
    guest.ram.memory().write_slice(&descriptor, GuestAddress(DESCRIPTOR)).unwrap();
    guest.device.write(FwCfg::DMA + 4, &(DESCRIPTOR as u32).to_be_bytes());
    assert_eq!(guest.memory(BUFFER, 4), b"QEMU");
}
