//! Flow control, ends and addresses, packet by packet.

use super::*;
use crate::virtio::vsock::packet::Header;

#[test]
fn the_guest_is_held_back_while_the_host_does_not_read() {
    let mut b = bench();
    let streams = b.listen();
    let (mut stream, mut end) = b.accept(&streams, 9);
    let block = Rng::new(3).bytes(32 << 10);
    let mut sent = 0u64;
    // Socket buffer and promise fill up; then there is no more credit.
    let deadline = Instant::now() + SOON;
    while end.credit() >= block.len() as u32 {
        end.send(&mut b.guest, op::RW, &block);
        sent += block.len() as u64;
        let quiet = Instant::now() + Duration::from_millis(20);
        while let Some((header, _)) = b.guest.receive_before(quiet) {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            end.note(&header);
        }
        assert!(Instant::now() < deadline && sent < 4 << 20, "backpressure");
    }
    assert!(sent >= u64::from(end.peer_alloc));
    let mut got = vec![0; sent as usize];
    stream.read_exact(&mut got).unwrap();
    assert!(got.chunks(block.len()).all(|chunk| chunk == block));
    while end.credit() < block.len() as u32 {
        end.expect(&mut b.guest, op::CREDIT_UPDATE);
    }
}

#[test]
fn a_guest_that_ignores_its_credit_is_cut_off() {
    let mut b = bench();
    let streams = b.listen();
    let (mut stream, mut end) = b.accept(&streams, 9);
    let block = vec![1; 64 << 10];
    loop {
        end.send(&mut b.guest, op::RW, &block);
        if let Some((header, _)) = b.guest.try_receive()
            && header.op == op::RST
        {
            break;
        }
        assert!(end.sent < 64 << 20);
    }
    assert!(b.empty());
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
}

#[test]
fn the_host_is_held_back_by_the_guests_credit() {
    let mut b = bench();
    let streams = b.listen();
    let mut end = End::new(5000, 9);
    end.buf_alloc = 1000;
    end.send(&mut b.guest, op::REQUEST, &[]);
    end.expect(&mut b.guest, op::RESPONSE);
    let mut stream = streams.recv_timeout(SOON).unwrap();
    let data = Rng::new(4).bytes(10_000);
    stream.write_all(&data).unwrap();
    let mut got = Vec::new();
    let mut asked = 0;
    while got.len() < data.len() {
        let (header, payload) = b.guest.receive();
        end.note(&header);
        match header.op {
            op::RW => {
                got.extend(payload);
                assert!(got.len() as u32 - end.consumed <= 1000, "more than there is room for");
            }
            op::CREDIT_REQUEST => {
                asked += 1;
                end.consumed += 700.min(got.len() as u32 - end.consumed);
                end.send(&mut b.guest, op::CREDIT_UPDATE, &[]);
            }
            _ => panic!("{header:?}"),
        }
    }
    assert_eq!(got, data);
    assert!(asked > 5);
    // Nonsense about credit stops data and nothing else.
    end.consumed = u32::MAX / 2;
    end.send(&mut b.guest, op::CREDIT_UPDATE, &[]);
    stream.write_all(b"x").unwrap();
    assert_eq!(b.guest.receive().0.op, op::CREDIT_REQUEST);
}

#[test]
fn what_the_guest_sent_before_it_closed_is_delivered() {
    for ends_with_reset in [false, true] {
        let mut b = bench();
        let streams = b.listen();
        let (mut stream, mut end) = b.accept(&streams, 9);
        let data = Rng::new(5).bytes(end.peer_alloc as usize);
        for chunk in data.chunks(64 << 10) {
            end.send(&mut b.guest, op::RW, chunk);
        }
        end.send_flags(&mut b.guest, op::SHUTDOWN, shutdown::BOTH);
        if ends_with_reset {
            end.send(&mut b.guest, op::RST, &[]);
        }
        std::thread::sleep(Duration::from_millis(20));
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), data.len());
        assert_eq!(got, data);
        if !ends_with_reset {
            while b.guest.receive().0.op != op::RST {}
        }
        assert!(b.empty());
    }
}

#[test]
fn either_side_may_close_its_half() {
    let mut b = bench();
    let (mut stream, mut end) = b.connect();
    end.send_flags(&mut b.guest, op::SHUTDOWN, shutdown::SEND);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    stream.write_all(b"still talking").unwrap();
    assert_eq!(end.expect(&mut b.guest, op::RW).1, b"still talking");

    let (mut stream, mut end) = b.connect();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(end.expect(&mut b.guest, op::SHUTDOWN).0.flags, shutdown::SEND);
    end.send(&mut b.guest, op::RW, b"the guest too");
    let mut got = [0; 13];
    stream.read_exact(&mut got).unwrap();
    end.send_flags(&mut b.guest, op::SHUTDOWN, shutdown::BOTH);
    end.expect(&mut b.guest, op::RST);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);

    let (mut stream, mut end) = b.connect();
    end.send_flags(&mut b.guest, op::SHUTDOWN, shutdown::RECEIVE);
    assert!(wait_until(|| stream.write(b"nobody listens").is_err()));
}

#[test]
fn packets_that_belong_to_nothing_are_answered_with_reset() {
    let mut b = bench();
    let streams = b.listen();
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 99] {
        let mut end = End::new(5000, 1);
        end.send(&mut b.guest, op, &[]);
        end.expect(&mut b.guest, op::RST);
    }
    let mut end = End::new(5000, 1);
    b.guest.send(Header { kind: 2, ..end.header(op::REQUEST, 0) }, &[]);
    end.expect(&mut b.guest, op::RST);
    // No answer to a reset, nor to wrong addresses.
    end.send(&mut b.guest, op::RST, &[]);
    b.guest.send(Header { src_cid: 4, ..end.header(op::REQUEST, 0) }, &[]);
    b.guest.send(Header { dst_cid: 1, ..end.header(op::REQUEST, 0) }, &[]);
    assert!(b.guest.receive_before(Instant::now() + Duration::from_millis(50)).is_none());
    assert_eq!(b.device.stats().dropped, 2);
    // A second request for a connection that stands, or an unknown operation, ends it.
    for op in [op::REQUEST, op::RESPONSE, 42] {
        let (mut stream, mut end) = b.accept(&streams, 1);
        end.send(&mut b.guest, op, &[]);
        end.expect(&mut b.guest, op::RST);
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
    assert!(b.empty());
}

#[test]
fn a_packet_longer_than_its_buffers_stops_the_device() {
    let mut b = bench();
    b.guest.send(End::new(5000, 1).header(op::RW, 100), &[0; 99]);
    assert!(b.guest.guest.wait_needs_reset());
    b.guest.restart();
    b.connect();
}

#[test]
fn a_flood_of_bad_packets_waits_for_room_to_answer() {
    let mut b = bench();
    for port in 0..3000 {
        End::new(5000, port).send(&mut b.guest, op::RW, &[]);
        // The guest takes nothing until the device has stopped taking, or all was sent.
        if port % 64 == 63 {
            while b.guest.try_receive().is_some() {}
        }
    }
    assert!(!b.guest.guest.mmio.link().needs_reset());
}
