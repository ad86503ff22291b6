//! Entropy device (5.4), from the host kernel's generator.

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mvm_memory::GuestMemory;

use super::{
    ActivateError, Activation, Chain, Core, DeviceType, OneQueue, QueueError, QueueState,
    VirtioDevice, common_device_methods,
};
use crate::event_loop::{EventLoop, EventLoopError, Interest, Source, Subscriber};

const QUEUE_SIZE: u16 = 64;
/// Most bytes given for one buffer: the device may use less than it was offered (5.4.6.1).
const MAX_BYTES: u64 = 64 << 10;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// The host has no more descriptors.
    #[error("cannot make the entropy device: {0}")]
    Start(io::Error),
    /// The event loop refused a descriptor.
    #[error(transparent)]
    Watch(#[from] EventLoopError),
}

/// The device.
#[derive(Debug)]
pub struct Rng {
    core: Core<OneQueue>,
    given: AtomicU64,
}

impl Rng {
    /// A device that works on `events`.
    ///
    /// # Errors
    /// [`RngError`].
    pub fn new(name: &str, events: &EventLoop) -> Result<Arc<Self>, RngError> {
        let core = Core::new(name, &[QUEUE_SIZE]).map_err(RngError::Start)?;
        let device = Arc::new(Self { core, given: AtomicU64::new(0) });
        let registrar = events.subscribe(device.clone());
        registrar.add(&device.core.slots()[0].doorbell, 0, Interest::READ)?;
        Ok(device)
    }

    /// Random bytes given to the guest so far.
    pub fn given(&self) -> u64 {
        self.given.load(Ordering::Relaxed)
    }

    fn fill(&self, chain: &Chain, memory: &GuestMemory) -> Result<u32, QueueError> {
        if chain.writable_len() == 0 {
            return Err(QueueError::Request("entropy request without room for a byte"));
        }
        let len = chain.writable_len().min(MAX_BYTES);
        let mut buffer = [0; 1024];
        let mut done = 0;
        while done < len {
            let part = &mut buffer[..(len - done).min(1024) as usize];
            fill_random(part);
            chain.write(memory, done, part)?;
            done += part.len() as u64;
        }
        self.given.fetch_add(done, Ordering::Relaxed);
        Ok(done as u32)
    }
}

/// The kernel's generator never fails once the host is up, and gives a few hundred bytes whole.
fn fill_random(mut buffer: &mut [u8]) {
    while !buffer.is_empty() {
        if let Ok(n) = rustix::rand::getrandom(&mut *buffer, rustix::rand::GetRandomFlags::empty())
        {
            buffer = &mut buffer[n..];
        }
    }
}

impl Subscriber for Rng {
    fn ready(&self, _source: Source) {
        self.core.serve_one(|chain, memory| self.fill(chain, memory));
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        self.core.start_one(activation)
    }

    fn reset(&self) {
        self.core.stop();
    }

    fn queue_states(&self) -> Vec<Option<QueueState>> {
        self.core.states_of_one()
    }

    common_device_methods!();
}
