//! Memory that comes and goes while the guest runs.

use std::sync::Arc;

use mvm_devices::EventLoop;
use mvm_devices::virtio::mem::{Mem, MemConfig, MemError, MemStats};
use mvm_memory::GuestRam;

use super::Devices;
use crate::layout;

/// The device for the growing region of `ram`.
pub(super) fn open(ram: &GuestRam, events: &EventLoop) -> Result<Arc<Mem>, MemError> {
    let step = layout::growth_step(ram.size());
    Mem::new(MemConfig { name: "mvm-mem".into(), ram: ram.clone(), step }, events)
}

/// What it counts.
pub(super) fn counters(mem: &Mem) -> [(String, u64); 5] {
    let MemStats { region, usable, requested, plugged, refused } = mem.stats();
    [
        ("region", region),
        ("usable", usable),
        ("requested", requested),
        ("plugged", plugged),
        ("refused", refused),
    ]
    .map(|(key, n)| (format!("mvm-mem.{key}"), n))
}

impl Devices {
    /// By how much the machine has grown, in a machine that can.
    pub fn memory_growth(&self) -> Option<MemStats> {
        self.mem.as_ref().map(|mem| mem.stats())
    }
}
