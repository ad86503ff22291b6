//! Virtio devices that the command line tells of, `virtio_mmio.device=SIZE@ADDRESS:IRQ`; the drivers
//! are those of the crate virtio-drivers.

use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::ptr::NonNull;

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::socket::{VirtIOSocket, VsockConnectionManager};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

use super::NetworkCard;

pub use virtio_drivers::device::blk::SECTOR_SIZE as SECTOR;

/// A disk.
pub type Disk = VirtIOBlk<Identity, MmioTransport<'static>>;

/// Sockets to the host.
pub type Sockets = VsockConnectionManager<Identity, MmioTransport<'static>>;

/// A source of entropy, which tells by an interrupt that it has given some. (The crate's own driver only looks.)
pub struct Entropy {
    transport: MmioTransport<'static>,
    queue: VirtQueue<Identity, 8>,
}

impl Entropy {
    /// Initialises the device (virtio 1.2, 3.1.1). Without the feature `EVENT_IDX` every buffer used is an
    /// interrupt, however fast the driver has seen it.
    fn new(mut transport: MmioTransport<'static>) -> Option<Self> {
        const VERSION_1: u64 = 1 << 32;
        let begun = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        transport.set_status(DeviceStatus::empty());
        transport.set_status(begun);
        let features = transport.read_device_features() & VERSION_1;
        transport.write_driver_features(features);
        transport.set_status(begun | DeviceStatus::FEATURES_OK);
        let queue = VirtQueue::new(&mut transport, 0, false, false).ok()?;
        transport.finish_init();
        Some(Self { transport, queue })
    }

    /// Has `bytes` filled; `wait` returns when there was an interrupt.
    pub fn fill(&mut self, bytes: &mut [u8], wait: impl FnOnce()) {
        // SAFETY: it stays where it is until it has been taken back below.
        let token = unsafe { self.queue.add(&[], &mut [bytes]) }.expect("the queue is empty");
        if self.queue.should_notify() {
            self.transport.notify(0);
        }
        wait();
        while !self.queue.can_pop() {
            core::hint::spin_loop();
        }
        // SAFETY: the buffer of `add`.
        unsafe { self.queue.pop_used(token, &[], &mut [bytes]) }.expect("it was used");
    }
}

/// The disks of this machine.
pub fn disks(cmdline: &'static str) -> impl Iterator<Item = Disk> {
    devices(cmdline, DeviceType::Block).filter_map(|(device, _)| Disk::new(device).ok())
}

/// The first source of entropy of this machine, and its interrupt.
pub fn entropy(cmdline: &'static str) -> Option<(Entropy, u32)> {
    let mut found = devices(cmdline, DeviceType::EntropySource);
    found.find_map(|(device, irq)| Some((Entropy::new(device)?, irq)))
}

/// The first network card of this machine, and its interrupt.
pub fn network(cmdline: &'static str) -> Option<(NetworkCard, u32)> {
    let (device, irq) = devices(cmdline, DeviceType::Network).next()?;
    Some((NetworkCard::new(device).ok()?, irq))
}

/// The socket device of this machine, and its interrupt.
pub fn sockets(cmdline: &'static str) -> Option<(Sockets, u32)> {
    /// What may lie about of a connection before the other end has to wait.
    const PER_CONNECTION: u32 = 16 << 10;
    let (device, irq) = devices(cmdline, DeviceType::Socket).next()?;
    let driver = VirtIOSocket::new(device).ok()?;
    Some((VsockConnectionManager::new_with_capacity(driver, PER_CONNECTION), irq))
}

/// The devices of a type, and the interrupt of each.
fn devices(
    cmdline: &'static str,
    wanted: DeviceType,
) -> impl Iterator<Item = (MmioTransport<'static>, u32)> {
    let words = cmdline.split_ascii_whitespace();
    let places = words.filter_map(|word| word.strip_prefix("virtio_mmio.device="));
    places.filter_map(device).filter(move |(device, _)| device.device_type() == wanted)
}

/// The device at `SIZE@ADDRESS:IRQ`.
fn device(place: &str) -> Option<(MmioTransport<'static>, u32)> {
    let (size, rest) = place.split_once('@')?;
    let mut rest = rest.split(':');
    let address = usize::from_str_radix(rest.next()?.strip_prefix("0x")?, 16).ok()?;
    let irq = rest.next()?.parse().ok()?;
    let (size, unit) = size.strip_suffix('K').map_or((size, 1), |size| (size, 1024));
    let size = size.parse::<usize>().ok()?.checked_mul(unit)?;
    // SAFETY: the command line says so, and devices are mapped.
    let transport = unsafe { MmioTransport::new(NonNull::new(address as *mut _)?, size).ok()? };
    Some((transport, irq))
}

/// Physical addresses are virtual addresses.
pub struct Identity;

impl Identity {
    fn layout(pages: usize) -> Layout {
        let size = pages.checked_mul(PAGE_SIZE);
        let layout = size.and_then(|size| Layout::from_size_align(size, PAGE_SIZE).ok());
        layout.expect("less than all memory")
    }
}

// SAFETY: memory is mapped one to one, and `dma_alloc` gives out zeroed pages that nobody else has.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: queues have at least one page.
        let start = unsafe { alloc_zeroed(Self::layout(pages)) };
        (start as PhysAddr, NonNull::new(start).expect("no memory for more devices"))
    }

    unsafe fn dma_dealloc(_: PhysAddr, start: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: the caller has it from `dma_alloc`, with as many pages.
        unsafe { dealloc(start.as_ptr(), Self::layout(pages)) };
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).expect("devices are not at 0")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr() as PhysAddr
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}
