//! The example unikernel: vector registers full, timers running, several processors.

use mvm_vmm::testing::section;
use mvm_vmm::{EndReason, Parts};

use crate::compute::Checksum;
use crate::elf::UNIKERNEL;
use crate::journey::{journey, routes};

fn parts(vcpus: u32, cmdline: &str) -> Parts {
    let kernel = section(&UNIKERNEL).unwrap();
    Parts { vcpus, cmdline: cmdline.into(), ..Parts::new(16 << 20, kernel) }
}

#[test]
fn a_computation_goes_on_with_its_timer_of_any_kind() {
    const ROUNDS: u32 = 40;
    let checksum = Checksum::new(ROUNDS.into()).run(ROUNDS);
    let expected = format!("{}\nmarks: {checksum:016x}\n", ".".repeat(ROUNDS as usize));
    for clock in ["periodic", "once", "deadline"] {
        let cmdline = format!("clock={clock} marks={ROUNDS}");
        for route in routes() {
            // At first, in the middle, one after the other; and when only the timer is waited for.
            for stops in [[1, 13], [20, 21], [39, 40]] {
                let (reason, text) = journey(&route, &stops, || parts(1, &cmdline));
                assert_eq!(text, expected, "{route}, {clock}, {stops:?}: {reason}");
                assert_eq!(reason, EndReason::PowerOff);
            }
        }
    }
}

#[test]
fn two_processors_go_on() {
    const ROUNDS: u32 = 30;
    const GREETING: &str = "Hello from a unikernel!";
    let sum =
        (ROUNDS..ROUNDS + 2).fold(0u64, |sum, n| sum.wrapping_add(Checksum::new(n.into()).run(n)));
    let expected = format!("team: 2 processors, {sum:016x}");
    let mut before = None;
    for route in routes() {
        // The second one has not started; both compute; one is about to end.
        for stops in [[5, GREETING.len()], [120, 130], [145, 165]] {
            let (reason, text) =
                journey(&route, &stops, || parts(2, &format!("hello team={ROUNDS}")));
            let at = format!("{route}, {stops:?}: {reason}");
            let lines: Vec<&str> = text.lines().collect();
            let [greeting, .., marks, last] = lines[..] else { panic!("{at}\n{text}") };
            assert_eq!((greeting, last), (GREETING, &*expected), "{at}");
            let count = |mark| marks.bytes().filter(|b| *b == mark).count() as u32;
            assert_eq!((count(b'a'), count(b'b')), (ROUNDS, ROUNDS + 1), "{at}\n{marks}");
            assert_eq!(reason, EndReason::PowerOff);
            // The stops above are where they are said to be.
            let head = text.len() - marks.len() - last.len() - 2;
            assert_eq!(*before.get_or_insert(head), head);
            assert!((5..120).contains(&head), "{head}");
        }
    }
}
