//! Seam 3 of the architecture: code that a device overwrites is stale for every engine.

use std::io::Write;

use mvm_devices::testing::{Guest, Segment};
use mvm_devices::virtio::block::{Block, BlockConfig, Cache};
use mvm_engine::mock::NoBus;
use mvm_engine::{Engine, MpState, Vcpu, VmConfig, VmExit};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::engines;

/// `mov al, n; hlt`, in real mode.
fn answer(n: u8) -> [u8; 3] {
    [0xb0, n, 0xf4]
}

/// Runs the code at `address` until it halts, and returns AL.
fn call(vcpu: &mut dyn Vcpu, address: u64) -> u8 {
    let mut state = vcpu.state().unwrap();
    state.sregs.segments[1].base = address;
    state.regs.rip = 0;
    state.mp_state = MpState::Running;
    vcpu.set_state(&state).unwrap();
    assert!(matches!(vcpu.run().unwrap(), VmExit::HaltedForever));
    vcpu.state().unwrap().regs.gpr[0] as u8
}

#[test]
fn a_page_executed_then_read_from_a_disk_executes_as_what_was_read() {
    engines().iter().for_each(|engine| read_over_code(&**engine));
}

fn read_over_code(engine: &dyn Engine) {
    let mut disk = tempfile::tempfile().unwrap();
    for n in [2, 3] {
        let mut sector = [0xf4; 512];
        sector[..3].copy_from_slice(&answer(n));
        disk.write_all(&sector).unwrap();
    }
    let block = Block::new(BlockConfig {
        name: "vblk-test".into(),
        serial: String::new(),
        read_only: false,
        cache: Cache::WriteBack,
        file: Some(disk),
    })
    .unwrap();
    let mut guest = Guest::new(4 << 20, block);
    let mut queue = guest.start().remove(0);
    let (header, status, code) = (guest.alloc(16), guest.alloc(1), guest.alloc(0x1000));
    let config = VmConfig {
        vcpus: 1,
        cpu: Default::default(),
        ram: guest.ram.clone(),
        io: std::sync::Arc::new(NoBus),
    };
    let vm = engine.create_vm(config).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();

    guest.memory().write_slice(&answer(1), GuestAddress(code)).unwrap();
    assert_eq!(call(&mut *vcpu, code), 1);
    for (sector, want) in [(0u64, 2), (1, 3), (0, 2)] {
        let request: [u64; 2] = [0, sector];
        for (at, word) in (header..).step_by(8).zip(request) {
            guest.memory().write_obj(word, GuestAddress(at)).unwrap();
        }
        let chain = [
            Segment::readable(header, 16),
            Segment::writable(code, 512),
            Segment::writable(status, 1),
        ];
        guest.transact(&mut queue, &chain);
        assert_eq!(guest.bytes(status, 1), [0]);
        assert_eq!(call(&mut *vcpu, code), want);
    }
}
