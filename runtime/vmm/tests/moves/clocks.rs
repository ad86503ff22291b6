//! Time goes on where it stood, for all processors alike.

use mvm_engine::ClockState;
use mvm_vmm::testing::{ElfBuilder, section};
use mvm_vmm::{MachineState, Parts};

use crate::journey::{routes, take};

const CODE: u64 = 0x10_0000;

fn parts() -> Parts {
    let kernel = ElfBuilder::elf64(CODE).load(CODE, &[0xfa, 0xf4]).build();
    Parts { vcpus: 3, ..Parts::new(16 << 20, section(&kernel).unwrap()) }
}

/// The clock of all vCPUs, which agree: to the tick for counters that are the host's with a fixed distance.
fn clock(state: &MachineState, place: &str) -> ClockState {
    let first = state.vcpus[0].clock;
    for vcpu in &state.vcpus[1..] {
        assert_eq!(vcpu.clock.host_tsc, first.host_tsc, "{place}: of one moment");
        assert_eq!(vcpu.clock.tsc, first.tsc, "{place}");
    }
    first
}

#[test]
fn counters_go_on_together() {
    for route in routes() {
        let place = route.to_string();
        let (machine, _events) = route.begin(parts);
        let (mut state, mut ram) = take(machine);
        for engine in route.next_legs() {
            let before = clock(&state, &place);
            let (machine, _events) = route.go_on(engine, parts(), ram, &state);
            (state, ram) = take(machine);
            let after = clock(&state, &place);
            let host = after.host_tsc - before.host_tsc;
            let (ticks, nanos) = (
                after.tsc.wrapping_sub(before.tsc),
                after.kvmclock_ns.wrapping_sub(before.kvmclock_ns),
            );
            if after.tsc == after.host_tsc {
                eprintln!("{place}: this KVM shows guests the host's counter, which cannot be set");
            } else {
                assert!(ticks <= host, "{place}: {ticks} ticks where the host had {host}");
            }
            let most = mvm_engine::tsc::ticks_to_nanos(host, after.tsc_khz);
            // The host may have slewed its clock meanwhile.
            assert!(nanos <= most + most / 1000 + 1000, "{place}: {nanos} ns, at most {most}");
        }
    }
}
