//! A device with its transport as plain data.

use serde::{Deserialize, Serialize};

use super::super::link::status;
use super::super::{ActivateError, DeviceState, QueueState, feature};
use super::{MmioTransport, Registers};

/// All that the guest can see of the device, and where it is in its queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// Device status (2.1).
    pub status: u32,
    /// Interrupt causes not yet acknowledged.
    pub causes: u32,
    /// Configuration generation.
    pub generation: u32,
    /// What the driver accepted.
    pub driver_features: u64,
    /// Selectors: device features, driver features, queue.
    pub selectors: [u32; 3],
    /// By index.
    pub queues: Vec<QueueState>,
    /// The device was at work.
    pub active: bool,
    /// The device's own part.
    pub device: DeviceState,
}

impl MmioTransport {
    /// The state, for a snapshot. The device must be paused ([`VirtioDevice::pause`]).
    ///
    /// [`VirtioDevice::pause`]: super::super::VirtioDevice::pause
    pub fn save(&self) -> MmioState {
        let regs = self.lock();
        let mut queues = regs.queues.clone();
        for (queue, live) in queues.iter_mut().zip(self.device.queue_states()) {
            if let Some(live) = live {
                *queue = live;
            }
        }
        MmioState {
            status: self.link.status(),
            causes: self.link.causes(),
            generation: self.link.generation(),
            driver_features: regs.driver_features,
            selectors: [regs.device_features_sel, regs.driver_features_sel, regs.queue_sel],
            queues,
            active: regs.active,
            device: self.device.save(),
        }
    }

    /// Takes over a saved state on a fresh device, which is left at work if it was.
    ///
    /// # Errors
    /// [`ActivateError`]: the state belongs to another device, or its queues are not in RAM.
    pub fn restore(&self, state: &MmioState) -> Result<(), ActivateError> {
        let mut regs = self.lock();
        let known = state.driver_features & !(feature::DEVICE | self.offered()) == 0;
        if state.queues.len() != regs.queues.len() || !known {
            return Err(ActivateError::WrongState);
        }
        self.device.restore(&state.device)?;
        self.link.restore(state.status, state.causes, state.generation);
        *regs = Registers {
            device_features_sel: state.selectors[0],
            driver_features_sel: state.selectors[1],
            queue_sel: state.selectors[2],
            driver_features: state.driver_features,
            queues: state.queues.clone(),
            seen_generation: state.generation,
            ..Registers::default()
        };
        if state.active && state.status & status::DRIVER_OK != 0 {
            self.activate(&mut regs);
            // Chains made available just before the pause were perhaps never served.
            self.device.queues().iter().for_each(|slot| slot.ring());
        }
        Ok(())
    }
}
