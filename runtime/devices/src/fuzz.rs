//! Entry points for libFuzzer: each makes a device with a synthetic guest and lets the input choose
//! what a hostile driver does to it. A crash, a panic or a hang is a finding.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use mvm_memory::{Backing, GuestRam};
use vm_memory::{Bytes, GuestAddress};

use crate::fw_cfg::{self, FwCfg};
use crate::testing::Guest;
use crate::testing::hostile::{Bytewise, Choices, mischief, poke};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::{Balloon, BalloonConfig};
use crate::virtio::block::{Block, BlockConfig, Cache};
use crate::virtio::console::{Console, ConsoleConfig};
use crate::virtio::mem::{self, Mem, MemConfig};
use crate::virtio::net::{Net, NetBackend, NetConfig, PacketSocket};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockConfig};
use crate::{
    Bus, BusDevice, EventLoop, Gate, HypercallConfig, HypercallDisk, HypercallNet, Hypercalls,
    InterruptLine, MsiSink, Pic, Serial, SerialConfig,
};

const RAM: u64 = 2 << 20;

/// Where memory grows, if it does: among the first 2^32 that an input's words often are.
const REGION: u64 = 1 << 30;

/// Lets `data` choose mischief on all queues and registers of the device.
fn run(data: &[u8], device: Arc<dyn VirtioDevice>) {
    run_in(data, Guest::new(RAM, device));
}

fn run_in(data: &[u8], mut guest: Guest) {
    let mut queues = guest.start();
    let mut choices = Bytewise(data);
    let plain = |draw: &mut dyn FnMut() -> Option<u64>| {
        // Words of the input make up headers: small numbers are kinds, operations, ports.
        let mut header = Vec::new();
        for _ in 0..6 {
            header.extend(draw()?.to_le_bytes());
        }
        Some(header)
    };
    while let Some(choice) = choices.draw() {
        let index = choice as usize % queues.len();
        let done = match choice >> 8 & 15 {
            0 => poke(&guest, &mut choices),
            _ => mischief(&guest, &mut queues[index], plain, &mut choices),
        };
        if done.is_none() {
            break;
        }
        if guest.mmio.link().needs_reset() {
            guest.reset();
            queues = guest.start();
        }
    }
    // Waits for whatever is running.
    guest.reset();
}

fn events() -> Option<EventLoop> {
    EventLoop::start("fuzz").ok()
}

/// The hypercalls of a Solo5 guest.
pub fn fuzz_hvt(data: &[u8]) {
    let make = || -> io::Result<(GuestRam, Hypercalls)> {
        let ram = GuestRam::new(&[(0, RAM)]).map_err(io::Error::other)?;
        let network = UnixDatagram::pair()?;
        for len in [1, 12, 13, 26, 100, 2000] {
            network.1.send(&vec![len as u8; len])?;
        }
        let disks = vec![HypercallDisk { handle: 1, file: disk(64 << 10)?, read_only: false }];
        let config = HypercallConfig {
            ram: ram.clone(),
            console: Serial::new(Arc::new(Unconnected), SerialConfig::default()),
            disks,
            nets: vec![HypercallNet {
                handle: 2,
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1500,
                backend: Box::new(PacketSocket::new(network.0)?),
            }],
            // Shut: nobody waits.
            gate: Arc::new(Gate::new()),
            events: Arc::new(|_| {}),
        };
        Ok((ram, Hypercalls::new(config)?))
    };
    let Ok((ram, calls)) = make() else { return };
    let mut choices = Bytewise(data);
    while let Some(choice) = choices.draw() {
        let near = [0, Hypercalls::GUEST_MEMORY, RAM - 32, u64::from(u32::MAX) - 32];
        let at = near[choice as usize % near.len()] + (choice >> 8) % 64;
        for offset in (0..40).step_by(8) {
            let Some(word) = choices.draw() else { break };
            // Most words near what makes sense.
            let word = match word >> 60 {
                0..4 => word & 0xff,
                4..8 => (word & 0xff) * 512,
                8..12 => Hypercalls::GUEST_MEMORY + (word & 0x1f_ffff),
                _ => word,
            };
            let _ = ram.memory().write_obj(word, GuestAddress(at + offset));
        }
        calls.write(choice >> 16 & 15, &(at as u32).to_le_bytes());
    }
}

/// The firmware configuration device: its registers, and descriptors in guest memory.
pub fn fuzz_fw_cfg(data: &[u8]) {
    let Ok(ram) = GuestRam::new(&[(0, RAM)]) else { return };
    let device = FwCfg::new(ram.clone());
    device.item(fw_cfg::key::CMDLINE_DATA, b"a word\0".to_vec());
    device.file("etc/file", vec![7; 9000]);
    let mut choices = Bytewise(data);
    while let Some(choice) = choices.draw() {
        let near = [0, RAM - 8, RAM, u64::MAX - 8];
        let near = |word: u64| near[word as usize % near.len()].wrapping_add(word >> 8 & 0xff);
        let number = choice >> 8 & 0x3f;
        match choice & 3 {
            0 => device.read(choice >> 8 & 15, &mut [0; 8][..(choice >> 16) as usize % 9]),
            1 => {
                device.write(choice >> 8 & 15, &choice.to_le_bytes()[..(choice >> 16) as usize % 9])
            }
            2 => device.write(0, &(number as u16).to_le_bytes()),
            _ => {
                let (Some(length), Some(address)) = (choices.draw(), choices.draw()) else { break };
                let (at, address) = (near(choice >> 16), near(address));
                let control = (number << 16 | choice >> 32 & 0x1f) as u32;
                let length =
                    if length & 1 == 0 { length as u32 } else { (length >> 1) as u32 & 0x3fff };
                let words =
                    [&control.to_be_bytes()[..], &length.to_be_bytes(), &address.to_be_bytes()];
                let _ = ram.memory().write_slice(&words.concat(), GuestAddress(at));
                device.write(FwCfg::DMA, &((at >> 32) as u32).to_be_bytes());
                device.write(FwCfg::DMA + 4, &(at as u32).to_be_bytes());
            }
        }
    }
}

/// The old interrupt controllers, between a guest, devices and a processor.
///
/// # Panics
/// What they say is not what they are.
pub fn fuzz_pic(data: &[u8]) {
    let mut bus = Bus::new();
    let pic = Pic::new(Arc::new(Unconnected));
    if pic.place(&mut bus).is_err() {
        return;
    }
    let ports = [Pic::PORTS[0], Pic::PORTS[1], Pic::ELCR].map(|port| [port, port + 1]).concat();
    let mut choices = Bytewise(data);
    while let Some(choice) = choices.draw() {
        let port = ports[(choice >> 8) as usize % ports.len()];
        let bytes = choice.to_le_bytes();
        match choice & 7 {
            0 => drop(bus.ports.read(port, &mut [0; 2][..1 + (choice >> 16 & 1) as usize])),
            1..4 => drop(bus.ports.write(port, &bytes[2..3 + (choice >> 32 & 1) as usize])),
            4 | 5 => pic.set_irq(bytes[1] & 31, bytes[2] & 1 != 0),
            6 => {
                let asked = pic.intr();
                let vector = pic.acknowledge();
                assert!(asked || vector & 7 == 7, "{vector:#x} though nothing was requested");
            }
            _ => {
                let state = pic.state();
                let other = Pic::new(Arc::new(Unconnected));
                other.restore(&state);
                assert_eq!(other.state(), state);
            }
        }
    }
}

#[derive(Debug)]
struct Unconnected;

impl MsiSink for Unconnected {
    fn signal_msi(&self, _: u64, _: u32) {}
}

impl InterruptLine for Unconnected {
    fn trigger(&self) {}
    fn set_level(&self, _: bool) {}
}

fn disk(size: u64) -> io::Result<File> {
    let fd = nix::sys::memfd::memfd_create("disk", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    let file = File::from(fd);
    file.set_len(size)?;
    Ok(file)
}

/// The queue of the block device.
pub fn fuzz_block(data: &[u8]) {
    let config = BlockConfig {
        name: "fuzz-block".into(),
        serial: "fuzz".into(),
        read_only: false,
        cache: Cache::Unsafe,
        file: disk(1 << 20).ok(),
    };
    if let Ok(device) = Block::new(config) {
        run(data, device);
    }
}

/// The queues of the socket device.
pub fn fuzz_vsock(data: &[u8]) {
    let Some(events) = events() else { return };
    let config = VsockConfig { name: "fuzz-vsock".into(), guest_cid: 3, listener: None };
    if let Ok(device) = Vsock::new(config, &events) {
        for port in 0..4 {
            let _ = device.listen(port, Arc::new(drop));
        }
        run(data, device);
    }
}

/// The queues of the console.
pub fn fuzz_console(data: &[u8]) {
    let Some(events) = events() else { return };
    let input = io::pipe().ok().map(|(reader, _)| reader.into());
    let config = ConsoleConfig { name: "fuzz-console".into(), output: None, input, tail: 4096 };
    if let Ok(device) = Console::new(config, &events) {
        run(data, device);
    }
}

/// The queues of the network device, with two pairs and a packet now and then.
pub fn fuzz_net(data: &[u8]) {
    let network = || -> io::Result<(UnixDatagram, Box<dyn NetBackend>)> {
        let (ours, theirs) = UnixDatagram::pair()?;
        ours.set_nonblocking(true)?;
        // What they are is the input's choice too.
        for packet in data.chunks(3000).take(8) {
            ours.send(packet)?;
        }
        Ok((ours, Box::new(PacketSocket::new(theirs)?)))
    };
    let (Ok((_a, first)), Ok((_b, second))) = (network(), network()) else { return };
    let config = NetConfig {
        name: "fuzz-net".into(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        backends: vec![first, second],
    };
    if let Ok(device) = Net::new(config) {
        run(data, device);
    }
}

/// The queue of the entropy device.
pub fn fuzz_rng(data: &[u8]) {
    let Some(events) = events() else { return };
    if let Ok(device) = Rng::new("fuzz-rng", &events) {
        run(data, device);
    }
}

/// The queues of the balloon.
pub fn fuzz_balloon(data: &[u8]) {
    let Some(events) = events() else { return };
    let config =
        BalloonConfig { name: "fuzz-balloon".into(), deflate_on_oom: true, reporting: true };
    if let Ok(device) = Balloon::new(config, &events) {
        run(data, device);
    }
}

/// The queue of the memory device, with a host that changes its mind.
///
/// # Panics
/// More is plugged than was ever asked for.
pub fn fuzz_mem(data: &[u8]) {
    let growth = (REGION, 32 * mem::BLOCK);
    let Ok(ram) = GuestRam::growing(&[(0, RAM)], Some(growth), Backing::Small) else { return };
    let Some(events) = events() else { return };
    let config = MemConfig { name: "fuzz-mem".into(), ram: ram.clone(), step: 8 * mem::BLOCK };
    let Ok(device) = Mem::new(config, &events) else { return };
    // By the input's length: the input itself is the guest's.
    let most = (data.len() as u64 % 33) * mem::BLOCK;
    let _ = device.make_usable(most).and_then(|()| device.request(most));
    run_in(data, Guest::over(ram, device.clone()));
    assert!(device.stats().plugged <= most, "{:?}", device.stats());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    type Fuzz = fn(&[u8]);

    #[test]
    fn random_inputs_find_nothing() {
        let targets: [(&str, Fuzz); 7] = [
            ("block", fuzz_block),
            ("vsock", fuzz_vsock),
            ("net", fuzz_net),
            ("console", fuzz_console),
            ("rng", fuzz_rng),
            ("balloon", fuzz_balloon),
            ("mem", fuzz_mem),
        ];
        for (name, target) in targets {
            for seed in 0..20 {
                eprintln!("{name}, seed {seed}");
                target(&testing::Rng::new(seed).bytes(20_000));
            }
        }
    }
}
