//! The run time: what is left of an operating system when there is one program.

mod boot_info;
mod console;
pub mod cpus;
mod heap;
pub mod interrupts;
mod memory;
mod network_card;
pub mod port;
pub mod ring0;
pub mod virtio;

use core::panic::PanicInfo;

pub use boot_info::BootInfo;
pub use console::Console;
pub use network_card::{NetworkCard, Received};

use crate::println;

/// Status for programs that failed by mistake.
const PANICKED: u32 = 101;

/// Where every processor comes from ring 0.
#[unsafe(no_mangle)]
extern "C" fn start_cpu(cpu: u32, protocol: u32, info: u64) -> ! {
    if cpu != 0 {
        cpus::other(cpu);
    }
    Console::init();
    heap::init();
    // SAFETY: ring0.s calls this with what it found.
    let boot = unsafe { BootInfo::read(protocol, info) };
    match crate::main(&boot) {
        0 => power_off(),
        value => exit(value),
    }
}

/// Where ring 0 sends a program that made a mistake.
#[unsafe(no_mangle)]
extern "C" fn fault_report(vector: u64, error: u64, address: u64, cr2: u64) -> ! {
    println!("exception {vector} (error code {error:#x}) at {address:#x}, CR2 {cr2:#x}");
    exit(PANICKED)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    println!("{info}");
    exit(PANICKED)
}

/// Ends the machine by its debug exit port: the monitor's exit code is `value << 1 | 1`.
pub fn exit(value: u32) -> ! {
    port::out32(0xf4, value);
    ring0::halt()
}

/// Switches the machine off: success. The ports are the power management registers of the common
/// chipsets; if there are none, and so nothing happens, the debug exit port takes a 0.
pub fn power_off() -> ! {
    const SLEEP_ENABLE: u16 = 1 << 13;
    port::out16(0x604, SLEEP_ENABLE);
    port::out16(0xb004, SLEEP_ENABLE);
    ring0::sleep(10);
    exit(0)
}
