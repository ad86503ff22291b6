//! What PC emulators have and PCs do not. Kernels that were made on them look for it unasked: test
//! kernels take the number of processors from the firmware configuration, say.

use std::sync::Arc;

use mvm_devices::fw_cfg::FwCfg;
use mvm_devices::{Bus, BusError, IoApic, Pic, Scratch, TestInterrupts};
use mvm_memory::GuestRam;

/// Places the firmware configuration device, which has nothing to tell so far, and the test device.
///
/// # Errors
/// The places are taken.
pub fn place(
    ram: &GuestRam,
    ioapic: &Arc<IoApic>,
    pic: Option<&Arc<Pic>>,
    bus: &mut Bus,
) -> Result<Arc<FwCfg>, BusError> {
    let fw_cfg = Arc::new(FwCfg::new(ram.clone()));
    bus.ports.insert("fw-cfg", FwCfg::PORT, FwCfg::LEN, fw_cfg.clone())?;
    let scratch = Arc::new(Scratch::ports());
    for port in Scratch::PORTS {
        bus.ports.insert("test-scratch", port, Scratch::PORTS_LEN, scratch.clone())?;
    }
    let interrupts = Arc::new(TestInterrupts::new(ioapic.clone(), pic.cloned()));
    bus.ports.insert("test-interrupts", TestInterrupts::PORT, TestInterrupts::LEN, interrupts)?;
    let memory = Arc::new(Scratch::memory());
    bus.memory.insert("test-memory", Scratch::MEMORY, Scratch::MEMORY_LEN, memory)?;
    Ok(fw_cfg)
}
