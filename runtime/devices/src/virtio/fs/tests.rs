//! The device against a server of the tests' own.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, channel};

use nix::poll::{PollFd, PollFlags, poll};

use super::*;
use crate::testing::{Guest, PATIENCE, reg};

struct Rig {
    guest: Guest,
    server: Packets,
    gone: Receiver<String>,
    _events: EventLoop,
}

fn rig() -> Rig {
    let events = EventLoop::start("test").unwrap();
    let (ours, server) = Packets::pair().unwrap();
    let (tell, gone) = channel();
    let tell = Mutex::new(tell);
    let config = FsConfig {
        name: "fs".into(),
        tag: "mvm".into(),
        channel: ours,
        on_gone: Arc::new(move |message: &str| {
            let _ = tell.lock().unwrap().send(message.to_owned());
        }),
    };
    let device = Fs::new(config, &events).unwrap();
    Rig { guest: Guest::new(4 << 20, device), server, gone, _events: events }
}

/// Answers `count` requests and returns them with the descriptors of the first.
fn answer(server: &Packets, count: usize) -> (Vec<ToServer>, Vec<OwnedFd>) {
    let (mut asked, mut all) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let (ask, fds) = server.receive::<ToServer>(Some(Instant::now() + PATIENCE)).unwrap();
        let queues = match &ask {
            ToServer::Activate { queues, .. } => queues.clone(),
            _ => Vec::new(),
        };
        server.send(&FromServer::Done { queues }, &[], PATIENCE).unwrap();
        asked.push(ask);
        all.extend(fds);
    }
    (asked, all)
}

#[test]
fn the_configuration_names_the_tag_and_one_request_queue() {
    let rig = rig();
    let mut config = [0; 44];
    rig.guest.mmio.device().read_config(0, &mut config);
    assert_eq!(&config[..4], b"mvm\0");
    assert_eq!(config[36..40], [1, 0, 0, 0]);
    assert_eq!(rig.guest.mmio.device().queues().len(), 2);
    let (channel, _server) = Packets::pair().unwrap();
    let events = EventLoop::start("test").unwrap();
    let tag = "x".repeat(MAX_TAG + 1);
    let config = FsConfig { name: "fs".into(), tag, channel, on_gone: Arc::new(|_: &str| {}) };
    assert!(matches!(Fs::new(config, &events), Err(FsError::Tag { .. })));
}

#[test]
fn the_server_gets_ram_queues_and_the_end() {
    let mut rig = rig();
    let server = std::mem::replace(&mut rig.server, Packets::pair().unwrap().0);
    let other_side = std::thread::spawn(move || {
        let (asked, fds) = answer(&server, 2);
        // The call, two doorbells, RAM and tracker of one region.
        assert_eq!(fds.len(), 5);
        assert!(
            matches!(&asked[0], ToServer::Attach { regions, .. } if *regions == [(0, 4 << 20)])
        );
        let ToServer::Activate { queues, .. } = &asked[1] else { panic!("{asked:?}") };
        assert!(queues.len() == 2 && queues.iter().all(|q| q.ready));
        let mut call = File::from(fds.into_iter().next().unwrap());
        call.write_all(&1u64.to_ne_bytes()).unwrap();
        let (asked, _) = answer(&server, 1);
        assert_eq!(asked, [ToServer::Stop]);
        let (asked, _) = answer(&server, 1);
        assert!(matches!(asked[0], ToServer::Activate { .. }), "RAM is lent once");
        server
    });
    rig.guest.start();
    rig.guest.line.wait_beyond(0, Instant::now() + PATIENCE).expect("an interrupt");
    assert_eq!(rig.guest.read(reg::INTERRUPT_STATUS) & 1, 1);
    rig.guest.reset();
    rig.guest.start();
    drop(other_side.join().unwrap());
    assert!(rig.gone.recv_timeout(PATIENCE).unwrap().contains("lost the file server"));
}

#[test]
fn an_interrupt_before_the_answer_is_not_lost() {
    let mut rig = rig();
    let server = std::mem::replace(&mut rig.server, Packets::pair().unwrap().0);
    let other_side = std::thread::spawn(move || {
        let (_, fds) = answer(&server, 1);
        server.receive::<ToServer>(Some(Instant::now() + PATIENCE)).unwrap();
        let mut call = File::from(fds.into_iter().next().unwrap());
        call.write_all(&1u64.to_ne_bytes()).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let counted = || poll(&mut [PollFd::new(call.as_fd(), PollFlags::POLLIN)], 0u8).unwrap();
        while counted() != 0 {
            assert!(Instant::now() < deadline, "nobody takes the interrupt");
            std::thread::yield_now();
        }
        server.send(&FromServer::Done { queues: Vec::new() }, &[], PATIENCE).unwrap();
        server
    });
    rig.guest.start();
    rig.guest.line.wait_beyond(0, Instant::now() + PATIENCE).expect("an interrupt");
    drop(other_side.join().unwrap());
}

#[test]
fn a_fault_that_the_server_reports_stops_the_device() {
    let mut rig = rig();
    let server = std::mem::replace(&mut rig.server, Packets::pair().unwrap().0);
    let other_side = std::thread::spawn(move || {
        answer(&server, 2);
        server
    });
    rig.guest.start();
    let server = other_side.join().unwrap();
    server.send(&FromServer::Failed { message: "bad ring".into() }, &[], PATIENCE).unwrap();
    rig.guest.line.wait_beyond(0, Instant::now() + PATIENCE).expect("an interrupt");
    assert!(rig.guest.mmio.link().needs_reset());
    drop(server);
    assert!(rig.gone.recv_timeout(PATIENCE).is_ok());
}

#[test]
fn a_server_that_refuses_leaves_the_device_without_driver() {
    let mut rig = rig();
    let server = std::mem::replace(&mut rig.server, Packets::pair().unwrap().0);
    let other_side = std::thread::spawn(move || {
        server.receive::<ToServer>(Some(Instant::now() + PATIENCE)).unwrap();
        server.send(&FromServer::Refused { message: "no".into() }, &[], PATIENCE).unwrap();
        server
    });
    for status in [1, 3] {
        rig.guest.write(reg::STATUS, status);
    }
    rig.guest.accept(rig.guest.offered());
    rig.guest.write(reg::STATUS, 0xb);
    for index in 0..2 {
        rig.guest.set_up_queue(index, 16, rig.guest.offered());
    }
    rig.guest.write(reg::STATUS, 0xf);
    assert!(rig.guest.mmio.link().needs_reset());
    drop(other_side.join().unwrap());
}
