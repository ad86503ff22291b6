//! What is told about the place where a guest died.

use std::fmt::Write as _;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, kvm_regs, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use mvm_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::GuestFault;

/// Bytes shown of the code.
const SHOWN: u64 = 16;

/// EFER.LMA.
const LMA: u64 = 1 << 10;

/// Describes the vCPU as it stands. What cannot be found out is left out: this is told when something
/// has gone wrong already.
pub(super) fn describe(
    index: u32,
    vcpu: &VcpuFd,
    ram: &GuestRam,
    reason: String,
    bytes: Option<Vec<u8>>,
) -> GuestFault {
    let (regs, sregs) = (vcpu.get_regs().unwrap_or_default(), vcpu.get_sregs().unwrap_or_default());
    let linear = match sregs.efer & LMA != 0 && sregs.cs.l != 0 {
        true => regs.rip,
        false => sregs.cs.base.wrapping_add(regs.rip) & 0xffff_ffff,
    };
    let bytes = bytes.unwrap_or_else(|| peek(vcpu, ram, linear));
    GuestFault { vcpu: index, reason, rip: regs.rip, bytes, registers: text(&regs, &sregs) }
}

fn peek(vcpu: &VcpuFd, ram: &GuestRam, linear: u64) -> Vec<u8> {
    (0..SHOWN)
        .map_while(|i| {
            let at = vcpu.translate_gva(linear.wrapping_add(i)).ok().filter(|t| t.valid != 0)?;
            ram.memory().read_obj::<u8>(GuestAddress(at.physical_address)).ok()
        })
        .collect()
}

fn text(r: &kvm_regs, s: &kvm_sregs) -> String {
    let mut text = String::new();
    let named = [
        ("rax", r.rax),
        ("rcx", r.rcx),
        ("rdx", r.rdx),
        ("rbx", r.rbx),
        ("rsp", r.rsp),
        ("rbp", r.rbp),
        ("rsi", r.rsi),
        ("rdi", r.rdi),
        ("r8", r.r8),
        ("r9", r.r9),
        ("r10", r.r10),
        ("r11", r.r11),
        ("r12", r.r12),
        ("r13", r.r13),
        ("r14", r.r14),
        ("r15", r.r15),
        ("rflags", r.rflags),
        ("cpl", s.ss.dpl.into()),
        ("cs", s.cs.selector.into()),
        ("ss", s.ss.selector.into()),
        ("cr0", s.cr0),
        ("cr2", s.cr2),
        ("cr3", s.cr3),
        ("cr4", s.cr4),
        ("efer", s.efer),
        ("gs", s.gs.base),
        ("fs", s.fs.base),
    ];
    for (name, value) in named {
        // Writing to a String cannot fail.
        let _ = write!(text, "{name}={value:#x} ");
    }
    text.truncate(text.trim_end().len());
    text
}

/// A KVM_EXIT_INTERNAL_ERROR in words, with the instruction's bytes if KVM gives them (Linux,
/// include/uapi/linux/kvm.h).
pub(super) fn internal_error(suberror: u32, data: &[u64]) -> (String, Option<Vec<u8>>) {
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "the host's KVM cannot emulate an instruction",
        KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions at the same time",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit in the middle of delivering an event",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "an exit of the hardware that KVM does not know"
        }
        _ => "an internal error",
    };
    let mut reason = format!("{what} (KVM_EXIT_INTERNAL_ERROR, suberror {suberror}");
    for word in data {
        let _ = write!(reason, ", {word:#x}");
    }
    reason.push(')');
    let bytes = (suberror == KVM_INTERNAL_ERROR_EMULATION).then(|| instruction(data)).flatten();
    (reason, bytes)
}

/// `emulation_failure`: flags, then the number of bytes and the bytes themselves.
fn instruction(data: &[u64]) -> Option<Vec<u8>> {
    let (&flags, rest) = data.split_first()?;
    if flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) == 0 {
        return None;
    }
    let bytes: Vec<u8> = rest.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (&size, bytes) = bytes.split_first()?;
    bytes.get(..usize::from(size)).filter(|b| !b.is_empty()).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instruction_of_an_emulation_failure_is_found() {
        let (reason, bytes) = internal_error(1, &[1, 0x0000_0fef_0f66_0403, 0]);
        assert_eq!(bytes.unwrap(), [0x04, 0x66, 0x0f]);
        assert!(reason.contains("suberror 1"), "{reason}");
        assert_eq!(internal_error(1, &[0, 0x0403]).1, None);
        assert_eq!(internal_error(1, &[1, 0]).1, None);
        assert_eq!(internal_error(1, &[1, 0xff]).1, None);
        assert_eq!(internal_error(3, &[1, 0x0403]).1, None);
        assert_eq!(internal_error(1, &[]).1, None);
    }
}
