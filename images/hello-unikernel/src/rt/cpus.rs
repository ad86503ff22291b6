//! Processors: how many there are, and how the others start.

use core::slice;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use super::boot_info::read;
use super::ring0;

/// Most processors that can be used, as in ring0.s.
pub const MAX: u32 = 32;

/// Where the others start in real mode, as in ring0.s.
const TRAMPOLINE: u64 = 0x1000;

/// Interrupt commands (SDM volume 3, 12.6.1): to all but the sender, edge, asserted.
const INIT: u32 = 0xc_4500;
const STARTUP: u32 = 0xc_4600 | (TRAMPOLINE >> 12) as u32;

/// Ticks that other processors have to get ready: much more than they need on a busy host.
const PATIENCE: u64 = 6000;

/// What the others do.
static WORK: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// How many of them have done it.
static DONE: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

/// Processors of this machine by its MP table (Intel MultiProcessor Specification 1.4), 1 without.
pub fn count() -> u32 {
    // SAFETY: this is RAM or ROM in every machine, and identity-mapped.
    let area = unsafe { slice::from_raw_parts(0xf_0000 as *const u8, 0x1_0000) };
    let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    let pointer = area.chunks(16).find(|c| c.starts_with(b"_MP_") && sum(c) == 0);
    let Some(pointer) = pointer else { return 1 };
    let table = u64::from(u32::from_le_bytes([pointer[4], pointer[5], pointer[6], pointer[7]]));
    if table == 0 {
        return 1;
    }
    // SAFETY: the pointer's sum was right, so there is a table.
    let entries: u16 = unsafe { read(table + 34) };
    let (mut at, mut found) = (table + 44, 0);
    for _ in 0..entries {
        // SAFETY: the entries follow each other; those of processors have 20 bytes, others 8.
        let [kind, enabled]: [u8; 2] = unsafe { [read(at), read(at + 3)] };
        if kind == 0 {
            found += u32::from(enabled & 1);
        }
        at += if kind == 0 { 20 } else { 8 };
    }
    found.clamp(1, MAX)
}

/// Has all other processors begin with `work`, each with its number from 1 on; false if they do not in
/// time. To be called once.
pub fn start_others(work: fn(u32)) -> bool {
    let others = count() - 1;
    if others == 0 {
        return true;
    }
    WORK.store(work as *mut (), Ordering::Release);
    // SAFETY: a page of RAM that nobody uses, and a piece of our own image.
    unsafe {
        let (start, end) = (&raw const trampoline, &raw const trampoline_end);
        let len = end as usize - start as usize;
        core::ptr::copy_nonoverlapping(start, TRAMPOLINE as *mut u8, len);
    }
    ring0::command_others(INIT);
    ring0::sleep(1);
    ring0::command_others(STARTUP);
    wait(&ring0::CPUS_STARTED, others + 1)
}

/// Waits until they have done it; false if they have not in time.
pub fn wait_for_others() -> bool {
    wait(&DONE, count() - 1)
}

fn wait(count: &AtomicU32, wanted: u32) -> bool {
    ring0::set_timer(true);
    let start = ring0::ticks();
    while count.load(Ordering::Acquire) < wanted && ring0::ticks() - start < PATIENCE {
        core::hint::spin_loop();
    }
    ring0::set_timer(false);
    count.load(Ordering::Acquire) >= wanted
}

/// What a processor other than the first does.
pub(super) fn other(cpu: u32) -> ! {
    let work = WORK.load(Ordering::Acquire);
    // SAFETY: it was stored before this processor was started, and it was such a function.
    let work: fn(u32) = unsafe { core::mem::transmute(work) };
    work(cpu);
    DONE.fetch_add(1, Ordering::Release);
    ring0::halt()
}
