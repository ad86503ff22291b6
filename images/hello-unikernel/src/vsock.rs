//! Sockets to the host (virtio-vsock): what comes by a connection is sent back.

use alloc::vec::Vec;

use virtio_drivers::Error;
use virtio_drivers::device::socket::{
    SocketError, VMADDR_CID_HOST, VsockAddr, VsockEvent, VsockEventType,
};

use crate::println;
use crate::rt::virtio::{self, Sockets};
use crate::rt::{interrupts, ring0};

/// The port that we dial from.
const OUR_PORT: u32 = 1024;

/// Takes connections to `port` until as many as `times` have ended.
pub fn serve(cmdline: &'static str, port: u32, times: u64) {
    let mut sockets = open(cmdline);
    sockets.listen(port);
    println!("vsock: listening on port {port} of guest {}", sockets.guest_cid());
    let mut connections = Vec::new();
    let mut ended = 0;
    while ended < times {
        let event = next(&mut sockets);
        let at = connections.iter().position(|c: &Echo| c.is_of(&event));
        match (&event.event_type, at) {
            (VsockEventType::ConnectionRequest, _) => {
                connections.push(Echo::new(event.source, port))
            }
            (VsockEventType::Disconnected { .. }, Some(at)) => {
                connections.swap_remove(at);
                ended += 1;
            }
            (_, Some(at)) => connections[at].go_on(&mut sockets),
            (_, None) => {}
        }
    }
    println!("vsock: {ended} connections");
}

/// Connects to `port` of the host, greets, and sends back what comes, until the host has enough.
pub fn dial(cmdline: &'static str, port: u32) {
    let mut sockets = open(cmdline);
    let host = VsockAddr { cid: VMADDR_CID_HOST, port };
    sockets.connect(host, OUR_PORT).expect("vsock: cannot ask for a connection");
    let mut connection = Echo::new(host, OUR_PORT);
    loop {
        match next(&mut sockets).event_type {
            VsockEventType::Connected => connection.left.extend(b"Hello from a unikernel!\n"),
            VsockEventType::Disconnected { .. } => break,
            _ => {}
        }
        connection.go_on(&mut sockets);
    }
    println!("vsock: the connection to port {port} of the host is over");
}

fn open(cmdline: &'static str) -> Sockets {
    let (sockets, irq) = virtio::sockets(cmdline).expect("there is no socket device");
    interrupts::enable(irq, true);
    ring0::set_timer(true);
    sockets
}

/// Waits for something to happen. The driver keeps silent about what concerns no connection, so that the wait for an
/// interrupt may be one for the next tick.
fn next(sockets: &mut Sockets) -> VsockEvent {
    loop {
        let seen = ring0::interrupts();
        match sockets.poll().expect("vsock: the host breaks the rules") {
            Some(event) => return event,
            None => ring0::wait_event(seen),
        }
    }
}

/// A connection, and what is still to be sent back by it.
struct Echo {
    peer: VsockAddr,
    port: u32,
    left: Vec<u8>,
}

impl Echo {
    fn new(peer: VsockAddr, port: u32) -> Self {
        Self { peer, port, left: Vec::new() }
    }

    fn is_of(&self, event: &VsockEvent) -> bool {
        self.peer == event.source && self.port == event.destination.port
    }

    /// Sends what there is. If the peer has no room for it, it says so when it has.
    fn go_on(&mut self, sockets: &mut Sockets) {
        loop {
            if self.left.is_empty() {
                let mut bytes = [0; 1024];
                // None if it is over.
                let len = sockets.recv(self.peer, self.port, &mut bytes).unwrap_or(0);
                if len == 0 {
                    return;
                }
                self.left.extend_from_slice(&bytes[..len]);
            }
            match sockets.send(self.peer, self.port, &self.left) {
                Ok(()) => self.left.clear(),
                Err(Error::SocketDeviceError(SocketError::InsufficientBufferSpaceInPeer)) => return,
                // It is over: the peer wanted no more.
                Err(Error::SocketDeviceError(SocketError::NotConnected)) => self.left.clear(),
                Err(e) => panic!("vsock: {e}"),
            }
        }
    }
}
