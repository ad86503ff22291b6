//! A unikernel: no operating system, one program, one machine.
//!
//! The words of its command line say what it does, one after the other: `hello`, `compute=ROUNDS`,
//! `timer=TICKS`, `clock=periodic|once|deadline` (how the timer ticks from then on), `marks=ROUNDS`, `smp`,
//! `team=ROUNDS`, `disk`, `find=TEXT`, `doorbell=TIMES`, `http=PORT/TIMES`, `vsock=PORT/TIMES`, `dial=PORT`, `echo`, `spin`, `halt`,
//! `fault`, `trap`, and at the end `exit=VALUE`.

#![no_std]
#![no_main]

extern crate alloc;

mod compute;
mod http;
mod net;
mod rt;
mod vsock;

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use compute::Checksum;
use ring0::TimerMode;
use rt::{BootInfo, Console, cpus, interrupts, ring0, virtio};

/// The program: what it returns goes to the debug exit port, and 0 switches the machine off.
fn main(boot: &BootInfo) -> u32 {
    let (mut done, mut status) = (false, 0);
    for word in boot.cmdline.split_ascii_whitespace() {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        let number = value.parse().unwrap_or(1);
        match name {
            "hello" => hello(boot),
            "compute" => compute(number),
            "timer" => timer(number),
            "clock" => clock(value),
            "marks" => marks(number),
            "smp" => smp(),
            "team" => team(number),
            "disk" => disk(boot),
            "find" => find(boot, value),
            "doorbell" => doorbell(boot, number),
            "http" => http(boot, value),
            "vsock" => {
                let (port, times) = port_and_times(value, 5000);
                vsock::serve(boot.cmdline, port, times);
            }
            "dial" => vsock::dial(boot.cmdline, port_and_times(value, 5000).0),
            "echo" => echo(),
            "spin" => spin(),
            "halt" => ring0::halt(),
            "fault" => ring0::crash(),
            "trap" => trap(),
            "exit" => status = number,
            // Words for others: the loader's file name, devices.
            _ => continue,
        }
        done |= name != "exit";
    }
    if !done {
        hello(boot);
    }
    status
}

/// Says what it knows of the machine.
fn hello(boot: &BootInfo) {
    println!("Hello from a unikernel!");
    println!("booted by {}: {}", boot.protocol, boot.cmdline);
    println!("memory: {} KiB, processors: {}", boot.memory / 1024, cpus::count());
}

/// Computes in vector registers while the timer interrupts.
fn compute(rounds: u32) {
    ring0::set_timer(true);
    let mut state = Checksum::new(rounds.into());
    for quarter in 1..=4 {
        let (before, ticks) = (state, ring0::ticks());
        let checksum = state.run(rounds);
        // Once more, until an interrupt has come between.
        while ring0::ticks() == ticks {
            let mut again = before;
            assert_eq!(again.run(rounds), checksum, "an interrupt changed a register");
        }
        println!("compute {quarter}/4: {checksum:016x}");
    }
    ring0::set_timer(false);
}

/// Waits for ticks of the timer.
fn timer(ticks: u32) {
    ring0::sleep(ticks.into());
    println!("timer: {ticks} ticks");
}

/// Chooses how the timer ticks.
fn clock(mode: &str) {
    ring0::set_timer_mode(match mode {
        "periodic" => TimerMode::Periodic,
        "once" => TimerMode::Once,
        "deadline" => TimerMode::Deadline,
        _ => panic!("no such clock: {mode}"),
    });
}

/// Computes while the timer of this processor ticks, and prints `mark` after each round, with all in registers.
fn compute_with_marks(cpu: u32, rounds: u32, mark: u8) -> u64 {
    ring0::set_timer(true);
    let checksum = Checksum::new(rounds.into()).run_with(rounds, || Console::write(mark));
    // It must still be ticking.
    let ticks = ring0::ticks_of(cpu);
    while ring0::ticks_of(cpu) == ticks {
        core::hint::spin_loop();
    }
    ring0::set_timer(false);
    checksum
}

/// A computation with places where a test can stop it.
fn marks(rounds: u32) {
    let checksum = compute_with_marks(0, rounds, b'.');
    println!();
    println!("marks: {checksum:016x}");
}

/// The same on all processors at a time.
fn team(rounds: u32) {
    static ROUNDS: AtomicU32 = AtomicU32::new(0);
    static CHECKSUMS: AtomicU64 = AtomicU64::new(0);

    fn work(cpu: u32) {
        let rounds = ROUNDS.load(Ordering::Relaxed) + cpu;
        let checksum = compute_with_marks(cpu, rounds, b'a' + cpu as u8);
        CHECKSUMS.fetch_add(checksum, Ordering::Relaxed);
    }

    ROUNDS.store(rounds, Ordering::Relaxed);
    let started = cpus::start_others(work);
    assert!(started, "a processor did not start");
    work(0);
    let on_time = cpus::wait_for_others();
    println!();
    println!("team: {} processors, {:016x}", cpus::count(), CHECKSUMS.load(Ordering::Relaxed));
    assert!(on_time, "a processor did not end");
}

/// Lets every processor add, and compute.
fn smp() {
    const TIMES: u64 = 10_000;
    static SUM: AtomicU64 = AtomicU64::new(0);
    static CHECKSUMS: AtomicU64 = AtomicU64::new(0);

    fn work(cpu: u32) {
        for _ in 0..TIMES {
            SUM.fetch_add(u64::from(cpu) + 1, Ordering::Relaxed);
        }
        CHECKSUMS.fetch_add(Checksum::new(cpu.into()).run(1), Ordering::Relaxed);
    }

    let started = cpus::start_others(work);
    work(0);
    let on_time = started && cpus::wait_for_others();
    let (sum, checksums) = (SUM.load(Ordering::Relaxed), CHECKSUMS.load(Ordering::Relaxed));
    println!("smp: {} processors, sum {sum}, checksums {checksums:016x}", cpus::count());
    assert!(on_time, "a processor did not start or did not end");
}

/// Shows the text at the beginning of each disk, and leaves one in the second sector.
fn disk(boot: &BootInfo) {
    const NOTE: &[u8] = b"The unikernel was here.";
    for (number, mut disk) in virtio::disks(boot.cmdline).enumerate() {
        let mut sector = [0; virtio::SECTOR];
        disk.read_blocks(0, &mut sector).expect("cannot read");
        let text = sector.split(|b| !(b' '..=b'~').contains(b)).next().unwrap_or(&[]);
        let text = str::from_utf8(text).unwrap_or("");
        println!("disk {number}: {} sectors, {text:?}", disk.capacity());
        if let Some(path) = mount_point(boot.cmdline, number) {
            println!("disk {number}: to be mounted at {path}");
        }
        if !disk.readonly() {
            sector.fill(0);
            sector[..NOTE.len()].copy_from_slice(NOTE);
            disk.write_blocks(1, &sector).expect("cannot write");
            disk.read_blocks(1, &mut sector).expect("cannot read again");
            assert!(sector.starts_with(NOTE), "what was written does not come back");
        }
    }
}

/// Where the file system on a disk is to be mounted, by the word `diskNUMBER.mount=PATH`. There is nothing here that mounts it.
fn mount_point(cmdline: &str, disk: usize) -> Option<&str> {
    cmdline.split_ascii_whitespace().find_map(|word| {
        let (number, path) = word.strip_prefix("disk")?.split_once(".mount=")?;
        (number.parse() == Ok(disk)).then_some(path)
    })
}

/// Says which of the first sectors of each disk begin with a text.
fn find(boot: &BootInfo, text: &str) {
    const SECTORS: u64 = 1024;
    for (number, mut disk) in virtio::disks(boot.cmdline).enumerate() {
        for at in 0..SECTORS.min(disk.capacity()) {
            let mut sector = [0; virtio::SECTOR];
            disk.read_blocks(at as usize, &mut sector).expect("cannot read");
            if sector.starts_with(text.as_bytes()) {
                println!("disk {number}: {text:?} is at the beginning of sector {at}");
            }
        }
    }
}

/// Asks the entropy device for a few bytes, time after time, and waits for its interrupt each time.
fn doorbell(boot: &BootInfo, times: u32) {
    let (mut entropy, irq) = virtio::entropy(boot.cmdline).expect("there is no entropy device");
    interrupts::enable(irq, true);
    let first = ring0::interrupts();
    for time in 0..times {
        let mut bytes = [0; 16];
        entropy.fill(&mut bytes, || ring0::wait_interrupt(first + u64::from(time)));
    }
    interrupts::enable(irq, false);
    println!("doorbell: {times} requests, {} interrupts", ring0::interrupts() - first);
}

/// Answers requests.
fn http(boot: &BootInfo, value: &str) {
    let (port, times) = port_and_times(value, 80);
    let port = u16::try_from(port).expect("not a port of TCP");
    http::serve(boot.cmdline, port, times);
}

/// `PORT/TIMES`, both of which may be left out; without TIMES it goes on for ever.
fn port_and_times(value: &str, usual: u32) -> (u32, u64) {
    let (port, times) = value.split_once('/').unwrap_or((value, ""));
    let number = |text: &str| text.parse::<u32>().expect("not a number");
    let port = if port.is_empty() { usual } else { number(port) };
    (port, if times.is_empty() { u64::MAX } else { number(times).into() })
}

/// Sends back what is typed, up to the end-of-transmission character (Ctrl-D).
fn echo() {
    println!("echo: until Ctrl-D");
    loop {
        match Console::read() {
            Some(4) => return,
            Some(byte) => Console::write(byte),
            None => core::hint::spin_loop(),
        }
    }
}

/// Never ends, for tests of those who end it.
fn spin() -> ! {
    println!("spin");
    loop {
        core::hint::spin_loop();
    }
}

/// Makes a mistake: what the processor says about it is printed.
fn trap() -> ! {
    // SAFETY: an exception, which ring 0 reports; it does not come back.
    unsafe { core::arch::asm!("ud2", options(noreturn)) }
}
