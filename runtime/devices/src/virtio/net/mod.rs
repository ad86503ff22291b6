//! Network device (5.1) over a [`NetBackend`]: a tap device of the host, or a socket.
//!
//! Each pair of queues is served by a thread of its own. Packets go from guest memory to the network
//! as they are; what they lack (checksums, splitting into segments) the host's kernel adds, if
//! anybody needs it at all. A received packet for which the driver has no buffers waits, and with it
//! all behind it, in the host's queue: that one drops what is too much.
//!
//! Nothing is filtered here: whose packets come in is decided by what the tap device is joined to.

mod backend;
mod config;
mod control;
mod pair;
mod tap;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use super::{
    ActivateError, Activation, Chain, Core, DeviceState, DeviceType, DriverLink, QueueSlot,
    QueueState, VirtioDevice,
};
use crate::event_loop::{EventLoop, EventLoopError, Interest, Source, Subscriber};
pub use backend::{NetBackend, Offloads, PacketSocket};
pub use config::HEADER;
use config::{Config, feature};
use control::Command;
use pair::{Counters, Pair};
pub use tap::Tap;

/// Descriptors of each queue for packets.
pub const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;
/// Most pairs of queues of one device.
pub const MAX_PAIRS: usize = 16;
/// Least and greatest MTU in bytes: what IPv4 demands (RFC 791), what the field holds.
pub const MTU_RANGE: std::ops::RangeInclusive<u16> = 68..=u16::MAX;

/// Tokens: the queues by index, and from here on the backends by pair.
const TOKEN_BACKEND: u64 = 0x100;

/// How a network device is set up.
#[derive(Debug)]
pub struct NetConfig {
    /// Name for logs and of the threads (15 bytes of it).
    pub name: String,
    /// Its address, which must be that of a single station (the lowest bit of the first byte is 0).
    pub mac: [u8; 6],
    /// Longest packet in bytes without the Ethernet header; see [`MTU_RANGE`].
    pub mtu: u16,
    /// One for each pair of queues, 1 to [`MAX_PAIRS`], all of one network.
    pub backends: Vec<Box<dyn NetBackend>>,
}

/// Why there is no network device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A descriptor could not be made.
    #[error("network device {name}: {source}")]
    Start {
        /// The device.
        name: String,
        /// What the host said.
        source: io::Error,
    },
    /// Too few or too many ways to the network.
    #[error("network device {name} has {pairs} pairs of queues; there can be 1 to {MAX_PAIRS}")]
    Pairs {
        /// The device.
        name: String,
        /// Pairs asked for.
        pairs: usize,
    },
    /// The address cannot be a device's.
    #[error("network device {name}: {mac:02x?} is a group's address, not a device's")]
    Mac {
        /// The device.
        name: String,
        /// The address.
        mac: [u8; 6],
    },
    /// The MTU cannot be.
    #[error("network device {name}: an MTU of {mtu} bytes is less than the least, 68")]
    Mtu {
        /// The device.
        name: String,
        /// Bytes.
        mtu: u16,
    },
    /// A thread could not be started or a descriptor not be waited for.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
}

/// Counters of one device. Bytes are those of Ethernet frames.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct NetStats {
    /// Packets given to the guest.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Packets that could not be given to it.
    pub rx_dropped: u64,
    /// Packets of the guest that were sent.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Packets of the guest that the host did not take.
    pub tx_dropped: u64,
}

#[derive(Debug)]
struct Shared {
    name: String,
    mac: [u8; 6],
    mtu: u16,
    slots: Vec<QueueSlot>,
    pairs: Vec<Pair>,
    control: Core<control::Work>,
    counters: Counters,
    link_up: AtomicBool,
    /// The driver uses the queues as a device with several pairs has them.
    multiqueue: AtomicBool,
    state: Mutex<DriverState>,
    /// Taken over from a snapshot, for the activation that follows.
    restored: Mutex<Option<DriverState>>,
}

/// What the driver said by the control queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DriverState {
    pairs: u16,
    offloads: u64,
}

/// The device, with its threads.
#[derive(Debug)]
pub struct Net {
    shared: Arc<Shared>,
    _threads: Vec<EventLoop>,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Pair(usize),
    Control,
    Unused,
}

impl Net {
    /// A device as `config` says.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn new(config: NetConfig) -> Result<Arc<Self>, NetError> {
        let NetConfig { name, mac, mtu, backends } = config;
        if backends.is_empty() || backends.len() > MAX_PAIRS {
            return Err(NetError::Pairs { name, pairs: backends.len() });
        }
        if mac[0] & 1 != 0 {
            return Err(NetError::Mac { name, mac });
        }
        if !MTU_RANGE.contains(&mtu) {
            return Err(NetError::Mtu { name, mtu });
        }
        let start = |source| NetError::Start { name: name.clone(), source };
        let count = backends.len();
        let mut sizes = vec![QUEUE_SIZE; 2 * count];
        sizes.push(CONTROL_QUEUE_SIZE);
        let slots = QueueSlot::several(&sizes).map_err(start)?;
        let mut pairs = Vec::new();
        for (index, backend) in backends.into_iter().enumerate() {
            let own = slots[2 * index..][..2].iter().map(QueueSlot::try_clone);
            let own = own.collect::<io::Result<_>>().map_err(start)?;
            pairs.push(Pair::new(&name, own, backend));
        }
        let shared = Arc::new(Shared {
            control: Core::with_slots(&name, Vec::new()),
            name,
            mac,
            mtu,
            slots,
            pairs,
            counters: Counters::default(),
            link_up: AtomicBool::new(true),
            multiqueue: AtomicBool::new(false),
            state: Mutex::new(DriverState { pairs: 1, offloads: 0 }),
            restored: Mutex::new(None),
        });
        let mut threads = Vec::new();
        for (index, pair) in shared.pairs.iter().enumerate() {
            let name = &shared.name;
            let thread = if index == 0 { name.clone() } else { format!("{name}.{index}") };
            let thread = EventLoop::start(&thread)?;
            let registrar = thread.subscribe(shared.clone());
            let watch = Interest { readable: true, writable: true, edge: true };
            registrar.add(&fd(pair), TOKEN_BACKEND + index as u64, watch)?;
            let mut queues = vec![2 * index, 2 * index + 1];
            if index + 1 == count {
                queues.push(2 * count);
            }
            for queue in queues {
                registrar.add(&shared.slots[queue].doorbell, queue as u64, Interest::READ)?;
            }
            threads.push(thread);
        }
        Ok(Arc::new(Self { shared, _threads: threads }))
    }

    /// Plugs the cable in or out, as the driver sees it.
    pub fn set_link(&self, up: bool) {
        self.shared.set_link(up);
    }

    /// Counters.
    pub fn stats(&self) -> NetStats {
        let c = &self.shared.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetStats {
            rx_packets: get(&c.rx_packets),
            rx_bytes: get(&c.rx_bytes),
            rx_dropped: get(&c.rx_dropped),
            tx_packets: get(&c.tx_packets),
            tx_bytes: get(&c.tx_bytes),
            tx_dropped: get(&c.tx_dropped),
        }
    }
}

fn fd(pair: &Pair) -> i32 {
    use std::os::fd::AsRawFd;
    pair.backend.fd().as_raw_fd()
}

impl Shared {
    fn set_link(&self, up: bool) {
        if self.link_up.swap(up, Ordering::AcqRel) != up {
            self.control.config_changed();
        }
    }

    fn role(&self, queue: usize) -> Role {
        // Without the feature the control queue is the third, however many the device has.
        let multiqueue = self.multiqueue.load(Ordering::Acquire);
        let pairs = if multiqueue { self.pairs.len() } else { 1 };
        match queue / 2 {
            pair if pair < pairs => Role::Pair(pair),
            _ if queue == 2 * pairs => Role::Control,
            _ => Role::Unused,
        }
    }

    fn control_queue(&self) -> usize {
        let multiqueue = self.multiqueue.load(Ordering::Acquire);
        2 * if multiqueue { self.pairs.len() } else { 1 }
    }

    fn pump(&self, index: usize) {
        let Some(pair) = self.pairs.get(index) else { return };
        if let Some(again) = pair.pump(&self.counters) {
            for (more, queue) in [(again.rx, 2 * index), (again.tx, 2 * index + 1)] {
                if more {
                    self.slots[queue].ring();
                }
            }
        }
        if pair.is_gone() {
            self.set_link(false);
        }
    }

    fn serve_control(&self) {
        let more = self.control.serve(|work, link: &DriverLink| {
            let control::Work { queue, chain, features } = work;
            let drained = queue.drain(chain, |chain, memory| {
                control::answer(chain, memory, *features, |command| self.execute(command))
            })?;
            if drained.interrupt {
                link.used();
            }
            Ok(drained.more)
        });
        if more == Some(true) {
            self.slots[self.control_queue()].ring();
        }
    }

    fn execute(&self, command: Command) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = match command {
            Command::Pairs(pairs) => DriverState { pairs, ..*state },
            Command::Offloads(offloads) => DriverState { offloads, ..*state },
        };
        if !self.apply(wanted) {
            return false;
        }
        *state = wanted;
        true
    }

    /// Uses as many pairs, and leaves as much undone in received packets, as `state` says.
    fn apply(&self, state: DriverState) -> bool {
        let several = self.pairs.len() > 1;
        let count = usize::from(state.pairs);
        if count == 0 || count > self.pairs.len() {
            return false;
        }
        let mut pairs = self.pairs.iter().enumerate();
        let active = pairs.all(|(index, pair)| pair.set_active(index < count, several));
        let offloads = Offloads::from_features(state.offloads);
        let set = self.pairs[0].backend.set_offloads(offloads);
        if let Err(error) = &set {
            tracing::warn!(device = self.name, "cannot set offloads: {error}");
        }
        if active {
            (0..count).for_each(|index| self.slots[2 * index].ring());
        }
        active && set.is_ok()
    }
}

impl Subscriber for Shared {
    fn ready(&self, source: Source) {
        if let Some(index) = source.token.checked_sub(TOKEN_BACKEND) {
            let index = index as usize;
            if let Some(pair) = self.pairs.get(index) {
                pair.ready(source.readable || source.hung_up, source.writable || source.hung_up);
            }
            return self.pump(index);
        }
        let queue = source.token as usize;
        let Some(slot) = self.slots.get(queue) else { return };
        slot.clear();
        match self.role(queue) {
            Role::Pair(index) => self.pump(index),
            Role::Control => self.serve_control(),
            Role::Unused => {}
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Network
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn queues(&self) -> &[QueueSlot] {
        &self.shared.slots
    }

    fn features(&self) -> u64 {
        let several = if self.shared.pairs.len() > 1 { feature::MQ } else { 0 };
        feature::MAC
            | feature::MTU
            | feature::STATUS
            | feature::CSUM
            | feature::HOST_TSO4
            | feature::HOST_TSO6
            | feature::HOST_ECN
            | feature::OFFLOADS
            | feature::MRG_RXBUF
            | feature::CTRL_VQ
            | feature::CTRL_GUEST_OFFLOADS
            | several
    }

    fn accepts(&self, features: u64) -> bool {
        let has = |bits| features & bits != 0;
        feature::REQUIREMENTS.iter().all(|&(what, needs)| !has(what) || has(needs))
    }

    fn connect(&self, link: Arc<DriverLink>) {
        self.shared.pairs.iter().for_each(|pair| pair.core.connect(link.clone()));
        self.shared.control.connect(link);
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Shared { mac, mtu, pairs, link_up, .. } = &*self.shared;
        let config = Config {
            mac: *mac,
            link_up: link_up.load(Ordering::Acquire),
            pairs: pairs.len() as u16,
            mtu: *mtu,
        };
        super::read_config_bytes(&config.to_bytes(), offset, data);
    }

    fn activate(&self, mut activation: Activation) -> Result<(), ActivateError> {
        let shared = &self.shared;
        let features = activation.features;
        shared.multiqueue.store(features & feature::MQ != 0, Ordering::Release);
        let mergeable = features & feature::MRG_RXBUF != 0;
        for (index, pair) in shared.pairs.iter().enumerate() {
            // The driver must have the first pair; of the others it may leave some out.
            let has = |queue: usize| activation.queues.get(queue).is_some_and(Option::is_some);
            let usable =
                shared.role(2 * index) == Role::Pair(index) && has(2 * index) && has(2 * index + 1);
            if index == 0 || usable {
                let (rx, tx) = (activation.take(2 * index)?, activation.take(2 * index + 1)?);
                pair.core.start(pair::Work::new(rx, tx, mergeable));
            }
        }
        let control = shared.control_queue();
        if features & feature::CTRL_VQ != 0
            && let Some(queue) = activation.queues.get_mut(control).and_then(Option::take)
        {
            shared.control.start(control::Work { queue, chain: Chain::default(), features });
        }
        let restored = shared.restored.lock().unwrap_or_else(PoisonError::into_inner).take();
        let fresh = DriverState { pairs: 1, offloads: features & feature::OFFLOADS };
        let state = restored.unwrap_or(fresh);
        *shared.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        // A host that refuses gives complete packets, which every driver takes.
        shared.apply(state);
        shared.slots[control].ring();
        Ok(())
    }

    fn reset(&self) {
        self.shared.control.stop();
        self.shared.pairs.iter().for_each(|pair| drop(pair.core.stop()));
        *self.shared.restored.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn pause(&self) {
        self.shared.control.set_paused(true);
        self.shared.pairs.iter().for_each(|pair| pair.core.set_paused(true));
    }

    fn resume(&self) {
        self.shared.pairs.iter().for_each(|pair| pair.core.set_paused(false));
        self.shared.control.set_paused(false);
        self.shared.slots[self.shared.control_queue()].ring();
    }

    fn queue_states(&self) -> Vec<Option<QueueState>> {
        let mut states = vec![None; self.shared.slots.len()];
        for (index, pair) in self.shared.pairs.iter().enumerate() {
            if let Some([rx, tx]) = pair.core.inspect(|work| work.states()) {
                (states[2 * index], states[2 * index + 1]) = (Some(rx), Some(tx));
            }
        }
        if let Some(state) = self.shared.control.inspect(|work| work.queue.state()) {
            states[self.shared.control_queue()] = Some(state);
        }
        states
    }

    fn save(&self) -> DeviceState {
        let state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        DeviceState::Network { pairs: state.pairs, offloads: state.offloads }
    }

    fn restore(&self, state: &DeviceState) -> Result<(), ActivateError> {
        let DeviceState::Network { pairs, offloads } = *state else {
            return Err(ActivateError::WrongState);
        };
        let fits = (1..=self.shared.pairs.len()).contains(&usize::from(pairs));
        if !fits || offloads & !feature::OFFLOADS != 0 {
            return Err(ActivateError::WrongState);
        }
        let mut restored = self.shared.restored.lock().unwrap_or_else(PoisonError::into_inner);
        *restored = Some(DriverState { pairs, offloads });
        Ok(())
    }
}
