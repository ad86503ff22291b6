//! Virtio devices that the command line tells of, `virtio_mmio.device=SIZE@ADDRESS:IRQ`; the drivers
//! are those of the crate virtio-drivers.

use core::cell::UnsafeCell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

pub use virtio_drivers::device::blk::SECTOR_SIZE as SECTOR;

/// A disk.
pub type Disk = VirtIOBlk<Identity, MmioTransport<'static>>;

/// A source of entropy.
pub type Entropy = VirtIORng<Identity, MmioTransport<'static>>;

/// The disks of this machine.
pub fn disks(cmdline: &'static str) -> impl Iterator<Item = Disk> {
    devices(cmdline, DeviceType::Block).filter_map(|(device, _)| Disk::new(device).ok())
}

/// The first source of entropy of this machine, and its interrupt.
pub fn entropy(cmdline: &'static str) -> Option<(Entropy, u32)> {
    let mut found = devices(cmdline, DeviceType::EntropySource);
    found.find_map(|(device, irq)| Some((Entropy::new(device).ok()?, irq)))
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
