//! The little that needs ring 0, as functions.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

global_asm!(include_str!("ring0.s"), options(att_syntax));

/// Timer interrupts of each processor; ring 0 counts them.
#[unsafe(no_mangle)]
static TICKS: [AtomicU64; MAX] = [const { AtomicU64::new(0) }; MAX];

/// The periods of their timers, for ring 0.
#[unsafe(no_mangle)]
static TIMERS: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];

/// How timers are used, as in the local vector table.
#[unsafe(no_mangle)]
static TIMER_MODE: AtomicU32 = AtomicU32::new(TimerMode::Periodic as u32);

const MAX: usize = super::cpus::MAX as usize;

/// Interrupts of devices; ring 0 counts them.
#[unsafe(no_mangle)]
static INTERRUPTS: AtomicU64 = AtomicU64::new(0);

/// Processors that have started; ring 0 numbers them with it.
#[unsafe(no_mangle)]
pub static CPUS_STARTED: AtomicU32 = AtomicU32::new(1);

const ARM_TIMER: u32 = 0;
const WAIT_TICK: u32 = 1;
const HALT: u32 = 2;
const CRASH: u32 = 3;
const COMMAND_OTHERS: u32 = 4;
const WAIT_DEVICE: u32 = 5;

/// About 10 ms in units of 16 bus cycles, where the bus has 1 GHz as in virtual machines.
const TICK: u64 = 10_000_000 / 16;

fn service(which: u32, argument: u64) {
    // SAFETY: ring0.s: the services change no more than these registers and no memory of ours.
    unsafe {
        asm!("int3", inlateout("eax") which => _, in("rdi") argument, lateout("ecx") _);
    }
}

/// How a timer comes to tick again and again.
#[derive(Clone, Copy)]
pub enum TimerMode {
    /// By itself.
    Periodic = 1 << 17,
    /// It is started again with each interrupt.
    Once = 0,
    /// Each interrupt sets the time-stamp counter's value for the next.
    Deadline = 2 << 17,
}

/// Has timers tick in this way, from when they are started on. They must be off.
pub fn set_timer_mode(mode: TimerMode) {
    TIMER_MODE.store(mode as u32, Ordering::Relaxed);
}

/// Timer interrupts of the first processor so far.
pub fn ticks() -> u64 {
    ticks_of(0)
}

/// Timer interrupts of processor `cpu` so far.
pub fn ticks_of(cpu: u32) -> u64 {
    TICKS[cpu as usize].load(Ordering::Relaxed)
}

/// Lets this processor's timer tick, about 100 times a second, or stops it.
pub fn set_timer(on: bool) {
    service(ARM_TIMER, if on { TICK } else { 0 });
}

/// Waits, with the timer running, until there are more ticks than `seen`.
pub fn wait_tick(seen: u64) {
    while ticks() == seen {
        service(WAIT_TICK, seen);
    }
}

/// Waits for this many ticks.
pub fn sleep(count: u64) {
    set_timer(true);
    let start = ticks();
    while ticks() - start < count {
        wait_tick(ticks());
    }
    set_timer(false);
}

/// Interrupts of devices so far.
pub fn interrupts() -> u64 {
    INTERRUPTS.load(Ordering::Relaxed)
}

/// Waits until there are more interrupts of devices than `seen`.
pub fn wait_interrupt(seen: u64) {
    while interrupts() == seen {
        service(WAIT_DEVICE, seen);
    }
}

/// Waits until there are more interrupts of devices than `seen`, or there was any interrupt: with the timer on, a tick
/// at the latest.
pub fn wait_event(seen: u64) {
    service(WAIT_DEVICE, seen);
}

/// Sends an interrupt command (SDM volume 3, 12.6.1) to all other processors.
pub fn command_others(command: u32) {
    service(COMMAND_OTHERS, command.into());
}

/// Never runs again: `cli; hlt`.
pub fn halt() -> ! {
    loop {
        service(HALT, 0);
    }
}

/// Crashes the processor by a triple fault.
pub fn crash() -> ! {
    loop {
        service(CRASH, 0);
    }
}
