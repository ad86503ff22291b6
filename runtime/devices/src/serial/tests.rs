use super::*;
use crate::testing::{self, wait_until};

#[derive(Debug, Default)]
struct Count(AtomicU64);
impl InterruptLine for Count {
    fn set_level(&self, asserted: bool) {
        self.0.fetch_add(u64::from(asserted), Ordering::Relaxed);
    }
}

struct Broken;
impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn get(serial: &Serial, register: u64) -> u8 {
    let mut byte = [0];
    serial.read(register, &mut byte);
    byte[0]
}

#[test]
fn output_reaches_the_tail_even_if_the_reader_is_gone() {
    let config = SerialConfig { output: Box::new(Broken), tail: 5 };
    let serial = Serial::new(Arc::new(Count::default()), config);
    for byte in b"hello world" {
        serial.write(0, &[*byte]);
    }
    assert_eq!(serial.tail(), b"world");
    assert_eq!((serial.written(), serial.lost()), (11, 11));
}

#[test]
fn input_beyond_the_fifo_arrives_in_order() {
    let line = Arc::new(Count::default());
    let serial = Serial::new(line.clone(), SerialConfig::default());
    serial.write(1, &[1]);
    let sent: Vec<u8> = (0..=255).cycle().take(1000).collect();
    assert_eq!(serial.input(&sent), 1000);
    let mut got = Vec::new();
    while get(&serial, 5) & 1 != 0 {
        got.push(get(&serial, 0));
    }
    assert_eq!(got, sent);
    assert!(line.0.load(Ordering::Relaxed) > 0);
    assert_eq!(serial.input(&vec![0; 1 << 20]), INPUT_LIMIT, "bounded");
}

#[test]
fn state_survives_save_and_restore() {
    let one = Serial::new(Arc::new(Count::default()), SerialConfig::default());
    one.write(1, &[1]);
    one.write(7, &[0x5a]);
    one.input(&[7; 100]);
    let other = Serial::new(Arc::new(Count::default()), SerialConfig::default());
    other.restore(&one.state());
    assert_eq!(get(&other, 7), 0x5a);
    let mut count = 0;
    while get(&other, 5) & 1 != 0 {
        assert_eq!(get(&other, 0), 7);
        count += 1;
    }
    assert_eq!(count, 100);
}

#[test]
fn any_width_and_register_is_tolerated() {
    let serial = Serial::new(Arc::new(Count::default()), SerialConfig::default());
    for offset in 0..8 {
        for len in 0..=8 {
            let mut data = vec![0xff; len];
            serial.read(offset, &mut data);
            serial.write(offset, &data);
        }
    }
}

/// Takes what the port has for the guest until `len` bytes are there.
fn take(serial: &Serial, len: usize) -> Vec<u8> {
    let mut got = Vec::new();
    let all = wait_until(|| {
        while got.len() < len && get(serial, 5) & 1 != 0 {
            got.push(get(serial, 0));
        }
        got.len() == len
    });
    assert!(all, "{} of {len} bytes", got.len());
    got
}

#[test]
fn a_pipe_is_typed_at_the_guest_without_loss_however_slow_it_is() {
    let events = EventLoop::start("serial-test").unwrap();
    let serial = Serial::new(Arc::new(Count::default()), SerialConfig::default());
    let (reader, mut writer) = io::pipe().unwrap();
    writer.write_all(b"early").unwrap();
    serial.read_from(reader.into(), &events).unwrap();
    assert_eq!(take(&serial, 5), b"early");
    // More than the port and the pipe hold together.
    let sent = testing::Rng::new(3).bytes(300_000);
    let typist = std::thread::spawn({
        let sent = sent.clone();
        move || writer.write_all(&sent)
    });
    assert!(wait_until(|| serial.room() == 0));
    assert!(take(&serial, sent.len()) == sent);
    typist.join().unwrap().unwrap();
    // The other end is gone: nothing more comes, and nothing spins.
    assert!(wait_until(|| serial.input.get().unwrap().is_over()));
    assert_eq!(get(&serial, 5) & 1, 0);
}

#[test]
fn a_file_is_typed_at_the_guest() {
    let events = EventLoop::start("serial-test").unwrap();
    let serial = Serial::new(Arc::new(Count::default()), SerialConfig::default());
    let sent = testing::Rng::new(4).bytes(100_000);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&sent).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    serial.read_from(file.into(), &events).unwrap();
    assert!(take(&serial, sent.len()) == sent);
    assert!(wait_until(|| serial.input.get().unwrap().is_over()));
}
