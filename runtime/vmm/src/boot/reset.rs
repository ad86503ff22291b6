//! What stands in for firmware: a few bytes at the place where a PC's BIOS is entered.
//!
//! A kernel that finds no other way to restart goes back to real mode and jumps there. Linux does so
//! on hardware-reduced ACPI without asking the reset register: it takes for granted that such a
//! machine has EFI, and when it has none, falls back to the BIOS.

use mvm_devices::SystemControl;
use mvm_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::Error;
use crate::layout;

/// `mov al, 0xfe; out 0x64, al; hlt; jmp $-1`, 16-bit code: pulls the processor's reset line through
/// the keyboard controller.
const CODE: [u8; 7] = *b"\xb0\xfe\xe6\x64\xf4\xeb\xfd";

/// Writes the code to the BIOS's entry point.
///
/// # Errors
/// Guest memory does not reach there.
pub fn write(memory: &GuestMemory) -> Result<(), Error> {
    let at = layout::BIOS_ENTRY;
    memory
        .write_slice(&CODE, GuestAddress(at))
        .map_err(|_| Error::Structure { what: "reset code", at })
}

const _: () = assert!(SystemControl::KEYBOARD_COMMAND == CODE[3] as u64);
const _: () = assert!(layout::BIOS_ENTRY + CODE.len() as u64 <= layout::HIGH_RAM_START);

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use mvm_emu::EmuEngine;
    use mvm_engine::{Engine, IoBus, VmConfig, VmExit};
    use mvm_memory::GuestRam;

    use super::*;

    /// Notes the ports that are written.
    #[derive(Debug, Default)]
    struct Ports(Mutex<Vec<(u16, Vec<u8>)>>);

    impl IoBus for Ports {
        fn pio_read(&self, _port: u16, _data: &mut [u8]) {}
        fn pio_write(&self, port: u16, data: &[u8]) {
            self.0.lock().unwrap().push((port, data.to_vec()));
        }
        fn mmio_read(&self, _gpa: u64, _data: &mut [u8]) {}
        fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
        fn eoi(&self, _vector: u8) {}
    }

    #[test]
    fn entering_the_bios_pulls_the_reset_line() {
        let ram = GuestRam::new(&[(0, 1 << 20)]).unwrap();
        write(ram.memory()).unwrap();
        let ports = Arc::new(Ports::default());
        let config = VmConfig { vcpus: 1, cpu: Default::default(), ram, io: ports.clone() };
        let vm = EmuEngine::default().create_vm(config).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        // As after a far jump to f000:fff0 in real mode.
        let mut state = vcpu.state().unwrap();
        state.sregs.segments[1].base = 0xf_0000;
        state.regs.rip = 0xfff0;
        vcpu.set_state(&state).unwrap();
        assert!(matches!(vcpu.run().unwrap(), VmExit::HaltedForever));
        assert_eq!(*ports.0.lock().unwrap(), [(0x64, vec![0xfe])]);
    }
}
