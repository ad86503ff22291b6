//! Memory for `alloc`: lists, texts, and the buffers that drivers share with their devices.

use core::cell::UnsafeCell;

use linked_list_allocator::LockedHeap;

/// Bytes of it. They take no room in the file.
const SIZE: usize = 1 << 20;

#[repr(align(4096))]
struct Memory(UnsafeCell<[u8; SIZE]>);

// SAFETY: only the allocator looks at it, which has a lock.
unsafe impl Sync for Memory {}

static MEMORY: Memory = Memory(UnsafeCell::new([0; SIZE]));

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

/// Before anything else.
pub(super) fn init() {
    // SAFETY: the first processor calls this once, and nobody else knows the memory.
    unsafe { HEAP.lock().init(MEMORY.0.get().cast(), SIZE) }
}
