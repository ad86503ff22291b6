//! The network: TCP/IP by the crate smoltcp, over a network card.
//!
//! The command line says who we are, `ip=ADDRESS/BITS`, and where the rest of the world is, `gateway=ADDRESS`.

use core::arch::x86_64::_rdtsc;
use core::cell::RefCell;

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, Ipv4Address, Ipv4Cidr};

use crate::rt::{self, NetworkCard, interrupts, ring0, virtio};

/// A network card with an address.
pub struct Network {
    card: Card,
    interface: Interface,
    address: Ipv4Cidr,
}

impl Network {
    /// The first card, with the address on the command line. The timer ticks from now on.
    pub fn open(cmdline: &'static str) -> Result<Self, &'static str> {
        let word = |name| cmdline.split_ascii_whitespace().find_map(|w| w.strip_prefix(name));
        let address = word("ip=").ok_or("no ip=ADDRESS/BITS on the command line")?;
        let address: Ipv4Cidr = address.parse().map_err(|()| "ip= is not ADDRESS/BITS")?;
        let gateway = word("gateway=").map(str::parse::<Ipv4Address>).transpose();
        let gateway = gateway.map_err(|_| "gateway= is not an address")?;

        let (card, irq) = virtio::network(cmdline).ok_or("there is no network card")?;
        interrupts::enable(irq, true);
        ring0::set_timer(true);
        let mut config = Config::new(EthernetAddress(card.mac()).into());
        // SAFETY: every processor that runs 64-bit code has a time-stamp counter, and ring 3 may read it.
        config.random_seed = unsafe { _rdtsc() };
        let mut card = Card(RefCell::new(card));
        let mut interface = Interface::new(config, &mut card, now());
        interface.update_ip_addrs(|all| all.push(address.into()).expect("there is room for one"));
        if let Some(gateway) = gateway {
            interface.routes_mut().add_default_ipv4_route(gateway).expect("there is room for one");
        }
        Ok(Self { card, interface, address })
    }

    /// Our address.
    pub fn address(&self) -> Ipv4Address {
        self.address.address()
    }

    /// Sends and receives what there is. If that changed nothing, waits for the card or a tick.
    pub fn poll(&mut self, sockets: &mut SocketSet<'_>) {
        // In this order, so that what comes after the look at the card ends the wait.
        let seen = ring0::interrupts();
        self.card.0.get_mut().acknowledge();
        let changed = self.interface.poll(now(), &mut self.card, sockets);
        if changed == smoltcp::iface::PollResult::None {
            ring0::wait_event(seen);
        }
    }
}

fn now() -> Instant {
    Instant::from_millis(10 * ring0::ticks().cast_signed())
}

/// The card, as smoltcp wants it: tokens that stand for a frame to be taken, or room for one to be sent.
struct Card(RefCell<NetworkCard>);

impl Device for Card {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Room<'_>)> {
        let card = self.0.get_mut();
        // What comes may have to be answered.
        let received = if card.has_room() { card.receive()? } else { return None };
        Some((Received { card: &self.0, received }, Room { card: &self.0 }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room<'_>> {
        self.0.get_mut().has_room().then_some(Room { card: &self.0 })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        const ETHERNET_HEADER: usize = 14;
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.0.borrow().mtu() + ETHERNET_HEADER;
        capabilities
    }
}

struct Received<'a> {
    card: &'a RefCell<NetworkCard>,
    received: rt::Received,
}

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        // The card is free meanwhile: `f` may send an answer.
        let result = f(self.received.frame());
        self.card.borrow_mut().give_back(self.received);
        result
    }
}

struct Room<'a> {
    card: &'a RefCell<NetworkCard>,
}

impl phy::TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.card.borrow_mut().send(len, f)
    }
}
