//! A network card (virtio 1.2, 5.1): Ethernet frames in buffers of ours, which go to the device and come back.
//!
//! The crate's own buffers would do for receiving. Its way to send waits until the frame is out, and this one does not.

use alloc::boxed::Box;
use core::ops::Range;

use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::Transport;
use virtio_drivers::transport::mmio::MmioTransport;

use super::virtio::Identity;

/// Buffers for each direction, and the bytes of one: a header of the device's, and a frame.
const BUFFERS: usize = 16;
const SIZE: usize = 2048;

/// The largest packet, without the Ethernet header, where the device says nothing.
const USUAL_MTU: u16 = 1500;

type Buffer = Box<[u8; SIZE]>;

/// A network card.
pub struct NetworkCard {
    // First, so that the device has lost its queues before the buffers go.
    driver: VirtIONetRaw<Identity, MmioTransport<'static>, BUFFERS>,
    mtu: usize,
    /// The buffers that the device has, by the numbers that the driver gave them.
    receiving: [Option<Buffer>; BUFFERS],
    sending: [Option<(Buffer, usize)>; BUFFERS],
}

/// A frame that has come.
pub struct Received {
    buffer: Buffer,
    frame: Range<usize>,
}

impl Received {
    /// It.
    pub fn frame(&self) -> &[u8] {
        &self.buffer[self.frame.clone()]
    }
}

impl NetworkCard {
    /// Initialises the device, and gives it buffers for what comes.
    pub(super) fn new(mut device: MmioTransport<'static>) -> virtio_drivers::Result<Self> {
        /// The feature, and the place in the configuration (5.1.3, 5.1.4).
        const MTU: (u64, usize) = (1 << 3, 10);
        let told = device.read_device_features() & MTU.0 != 0;
        let mtu = if told { device.read_config_space(MTU.1)? } else { USUAL_MTU };
        let mut card = Self {
            driver: VirtIONetRaw::new(device)?,
            // For larger ones there is no room in the buffers.
            mtu: mtu.min(USUAL_MTU).into(),
            receiving: [const { None }; BUFFERS],
            sending: [const { None }; BUFFERS],
        };
        for _ in 0..BUFFERS {
            card.lend(Box::new([0; SIZE]))?;
        }
        Ok(card)
    }

    /// Its Ethernet address.
    pub fn mac(&self) -> [u8; 6] {
        self.driver.mac_address()
    }

    /// The largest packet in a frame, in bytes.
    pub fn mtu(&self) -> usize {
        self.mtu
    }

    /// Takes note of an interrupt. What happens after that is another one.
    pub fn acknowledge(&mut self) {
        self.driver.ack_interrupt();
    }

    /// The next frame that has come.
    pub fn receive(&mut self) -> Option<Received> {
        let number = self.driver.poll_receive()?;
        let mut buffer = self.receiving[usize::from(number)].take().expect("the device has it");
        // SAFETY: the buffer of `receive_begin` for this number.
        let done = unsafe { self.driver.receive_complete(number, &mut buffer[..]) };
        let (header, len) = done.expect("the device keeps to the rules");
        Some(Received { buffer, frame: header..header + len })
    }

    /// Gives the device the buffer of `received` back.
    pub fn give_back(&mut self, received: Received) {
        self.lend(received.buffer).expect("there is room for what was there before");
    }

    fn lend(&mut self, mut buffer: Buffer) -> virtio_drivers::Result<()> {
        // SAFETY: it is in `receiving`, where nobody looks at it, until it is taken out again.
        let number = unsafe { self.driver.receive_begin(&mut buffer[..]) }?;
        self.receiving[usize::from(number)] = Some(buffer);
        Ok(())
    }

    /// Whether a frame can be sent.
    pub fn has_room(&mut self) -> bool {
        while let Some(number) = self.driver.poll_transmit() {
            let sent = self.sending[usize::from(number)].take();
            let (buffer, len) = sent.expect("the device has it");
            // SAFETY: the buffer of `transmit_begin` for this number.
            let done = unsafe { self.driver.transmit_complete(number, &buffer[..len]) };
            done.expect("the device keeps to the rules");
        }
        self.driver.can_send()
    }

    /// Sends a frame of `len` bytes that `fill` makes; there must be room for it.
    pub fn send<R>(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut buffer: Buffer = Box::new([0; SIZE]);
        let header = self.driver.fill_buffer_header(&mut buffer[..]).expect("it is large enough");
        let len = header + len;
        let result = fill(&mut buffer[header..len]);
        // SAFETY: it is in `sending`, where nobody changes it, until it is taken out again.
        let number = unsafe { self.driver.transmit_begin(&buffer[..len]) }.expect("there is room");
        self.sending[usize::from(number)] = Some((buffer, len));
        result
    }
}
