//! Virtio devices that the command line tells of, `virtio_mmio.device=SIZE@ADDRESS:IRQ`; the drivers
//! are those of the crate virtio-drivers.

use core::cell::UnsafeCell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

pub use virtio_drivers::device::blk::SECTOR_SIZE as SECTOR;

/// A disk.
pub type Disk = VirtIOBlk<Identity, MmioTransport<'static>>;

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

/// Memory for queues; what is taken is not given back.
#[repr(align(4096))]
struct Pool(UnsafeCell<[u8; POOL_PAGES * PAGE_SIZE]>);

const POOL_PAGES: usize = 32;

// SAFETY: `dma_alloc` gives out each page once.
unsafe impl Sync for Pool {}

static POOL: Pool = Pool(UnsafeCell::new([0; POOL_PAGES * PAGE_SIZE]));

/// Physical addresses are virtual addresses.
pub struct Identity;

// SAFETY: memory is mapped one to one, and `dma_alloc` gives out each zeroed page once.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        static TAKEN: AtomicUsize = AtomicUsize::new(0);
        let first = TAKEN.fetch_add(pages, Ordering::Relaxed);
        assert!(first + pages <= POOL_PAGES, "no memory for more devices");
        // SAFETY: so far into the pool and not to its end, as has just been checked.
        let start = unsafe { POOL.0.get().cast::<u8>().add(first * PAGE_SIZE) };
        (start as PhysAddr, NonNull::new(start).expect("the pool has an address"))
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
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
