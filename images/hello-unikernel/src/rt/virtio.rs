//! Virtio devices that the command line tells of, `virtio_mmio.device=SIZE@ADDRESS:IRQ`; the drivers
//! are those of the crate virtio-drivers.

use core::cell::UnsafeCell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

pub use virtio_drivers::device::blk::SECTOR_SIZE as SECTOR;

/// A disk.
pub type Disk = VirtIOBlk<Identity, MmioTransport<'static>>;

/// The disks of this machine.
pub fn disks(cmdline: &'static str) -> impl Iterator<Item = Disk> {
    let words = cmdline.split_ascii_whitespace();
    words.filter_map(|word| word.strip_prefix("virtio_mmio.device=")).filter_map(disk)
}

/// The device at `SIZE@ADDRESS:IRQ`, if it is a disk.
fn disk(place: &str) -> Option<Disk> {
    let (size, rest) = place.split_once('@')?;
    let address = rest.split(':').next()?.strip_prefix("0x")?;
    let address = usize::from_str_radix(address, 16).ok()?;
    let (size, unit) = size.strip_suffix('K').map_or((size, 1), |size| (size, 1024));
    let size = size.parse::<usize>().ok()?.checked_mul(unit)?;
    // SAFETY: the command line says so, and devices are mapped.
    let transport = unsafe { MmioTransport::new(NonNull::new(address as *mut _)?, size).ok()? };
    (transport.device_type() == DeviceType::Block).then(|| Disk::new(transport).ok())?
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
