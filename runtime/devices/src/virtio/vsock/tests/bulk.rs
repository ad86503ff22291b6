//! Many bytes and many connections.

use super::*;

/// In a debug build less, to keep the tests short.
const BULK: usize = if cfg!(debug_assertions) { 24 << 20 } else { 200 << 20 };

fn pattern(offset: usize, len: usize) -> Vec<u8> {
    (offset..offset + len).map(|i| (i >> 8) as u8 ^ i as u8).collect()
}

fn report(what: &str, took: Duration) {
    let rate = BULK as f64 / 1e6 / took.as_secs_f64();
    eprintln!("{what}: {} MB in {took:?}, {rate:.0} MB/s", BULK / 1_000_000);
}

#[test]
fn bytes_from_the_guest_arrive_intact() {
    let mut b = bench();
    let streams = b.listen();
    let (mut stream, mut end) = b.accept(&streams, 9);
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        let mut total = 0;
        loop {
            let n = stream.read(&mut buffer).unwrap();
            if n == 0 {
                return total;
            }
            assert!(buffer[..n] == pattern(total, n), "at {total}");
            total += n;
        }
    });
    let blocks: Vec<_> = (0..2).map(|i| pattern(i * 0x10000, 0x10000)).collect();
    let start = Instant::now();
    let mut sent = 0;
    while sent < BULK {
        while let Some((header, _)) = b.guest.try_receive() {
            end.note(&header);
        }
        if end.credit() < 0x10000 {
            let (header, _) = b.guest.receive();
            end.note(&header);
            continue;
        }
        end.send(&mut b.guest, op::RW, &blocks[sent / 0x10000 % 2]);
        sent += 0x10000;
    }
    end.send_flags(&mut b.guest, op::SHUTDOWN, shutdown::BOTH);
    assert_eq!(reader.join().unwrap(), sent);
    report("guest to host", start.elapsed());
}

#[test]
fn bytes_to_the_guest_arrive_intact() {
    let mut b = bench();
    let (mut stream, mut end) = b.connect();
    let start = Instant::now();
    let writer = std::thread::spawn(move || {
        let block = pattern(0, 0x10000);
        for _ in 0..BULK / block.len() {
            stream.write_all(&block).unwrap();
        }
    });
    let mut total = 0;
    let block = [pattern(0, 0x10000), pattern(0, 0x10000)].concat();
    while total < BULK {
        let (header, data) = b.guest.receive();
        end.note(&header);
        if header.op == op::RW {
            let at = total % 0x10000;
            assert!(data == block[at..at + data.len()], "at {total}");
            total += data.len();
            end.consumed = end.consumed.wrapping_add(data.len() as u32);
            if total % 0x10000 < data.len() {
                end.send(&mut b.guest, op::CREDIT_UPDATE, &[]);
            }
        } else if header.op == op::CREDIT_REQUEST {
            end.send(&mut b.guest, op::CREDIT_UPDATE, &[]);
        }
    }
    report("host to guest", start.elapsed());
    assert_eq!(total, BULK);
    writer.join().unwrap();
}

#[test]
fn thousands_of_connections_live_side_by_side() {
    let mut b = bench();
    let streams = b.listen();
    let count = 2000;
    let mut all: Vec<_> = (0..count).map(|i| b.accept(&streams, 10_000 + i)).collect();
    assert_eq!(b.device.stats().connections, u64::from(count));
    for (i, (stream, end)) in all.iter_mut().enumerate() {
        stream.write_all(&(i as u32).to_le_bytes()).unwrap();
        end.send(&mut b.guest, op::RW, &(i as u32).to_be_bytes());
    }
    let mut seen = vec![false; count as usize];
    for _ in 0..count {
        let (header, data) = b.guest.receive();
        assert_eq!(header.op, op::RW);
        let i = u32::from_le_bytes(data.try_into().unwrap());
        assert_eq!(header.dst_port, 10_000 + i);
        seen[i as usize] = true;
    }
    assert!(seen.iter().all(|&s| s));
    for (i, (stream, _)) in all.iter_mut().enumerate() {
        let mut word = [0; 4];
        stream.read_exact(&mut word).unwrap();
        assert_eq!(u32::from_be_bytes(word), i as u32);
    }
    drop(all.drain(..1000));
    let deadline = Instant::now() + SOON;
    let mut closed = 0;
    while closed < 1000 {
        let (header, _) = b.guest.receive_before(deadline).expect("shutdowns arrive");
        assert_eq!(header.op, op::SHUTDOWN);
        if header.flags == shutdown::BOTH {
            End::new(5000, header.dst_port).send(&mut b.guest, op::RST, &[]);
            closed += 1;
        }
    }
    assert!(wait_until(|| b.device.stats().connections == 1000));
    for (_, mut end) in all.drain(..) {
        end.send(&mut b.guest, op::RST, &[]);
    }
    assert!(b.empty());
}
