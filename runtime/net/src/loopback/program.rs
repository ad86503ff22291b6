//! The program, in the kernel's instruction format (Documentation/bpf/standardization/instruction-set.rst).

use std::os::fd::{AsRawFd, OwnedFd};

/// One instruction: opcode, registers, offset, immediate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    op: u8,
    /// The destination in the low half, the source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Opcodes: class, source and operation.
const LOAD_WORD: u8 = 0x61;
const STORE_WORD_IMMEDIATE: u8 = 0x62;
const LOAD_IMMEDIATE_64: u8 = 0x18;
const MOVE: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const ADD_IMMEDIATE: u8 = 0x07;
const AND_IMMEDIATE: u8 = 0x57;
const JUMP: u8 = 0x05;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_IF_NOT_EQUAL: u8 = 0x55;
/// The same with 32 bits of the register.
const JUMP_IF_NOT_EQUAL_32: u8 = 0x56;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// The source register of a 64-bit immediate that is a map's descriptor.
const MAP_DESCRIPTOR: u8 = 1;

// Helpers, by their numbers (bpf-helpers(7)).
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

// Offsets in `struct bpf_sk_lookup` (linux/bpf.h).
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// `SK_PASS`: go on with what was assigned, or with the ordinary lookup.
const PASS: i32 = 1;

fn instruction(op: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { op, registers: from << 4 | to, offset, immediate }
}

/// A jump forward to a label, whose distance is filled in at the end.
enum Step {
    Plain(Instruction),
    Jump(Instruction, Label),
    Here(Label),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Label {
    Ipv6,
    Ours,
    Pass,
}

/// Hands TCP connections to loopback addresses to the socket that is the map's entry 0.
pub fn redirect(map: &OwnedFd) -> Vec<Instruction> {
    let plain =
        |op, to, from, offset, immediate| Step::Plain(instruction(op, to, from, offset, immediate));
    let jump = |op, to, immediate, label| Step::Jump(instruction(op, to, 0, 0, immediate), label);
    // Addresses are read as they lie in memory.
    let first_byte = i32::from_ne_bytes([255, 0, 0, 0]);
    let net_127 = i32::from_ne_bytes([127, 0, 0, 0]);
    let last_1 = i32::from_ne_bytes([0, 0, 0, 1]);
    let steps = [
        // r6 = the context
        plain(MOVE, 6, 1, 0, 0),
        plain(LOAD_WORD, 2, 6, PROTOCOL, 0),
        jump(JUMP_IF_NOT_EQUAL, 2, libc::IPPROTO_TCP, Label::Pass),
        plain(LOAD_WORD, 2, 6, FAMILY, 0),
        jump(JUMP_IF_NOT_EQUAL, 2, libc::AF_INET, Label::Ipv6),
        plain(LOAD_WORD, 2, 6, LOCAL_IP4, 0),
        plain(AND_IMMEDIATE, 2, 0, 0, first_byte),
        jump(JUMP_IF_NOT_EQUAL_32, 2, net_127, Label::Pass),
        jump(JUMP, 0, 0, Label::Ours),
        Step::Here(Label::Ipv6),
        plain(LOAD_WORD, 2, 6, LOCAL_IP6, 0),
        jump(JUMP_IF_NOT_EQUAL, 2, 0, Label::Pass),
        plain(LOAD_WORD, 2, 6, LOCAL_IP6 + 4, 0),
        jump(JUMP_IF_NOT_EQUAL, 2, 0, Label::Pass),
        plain(LOAD_WORD, 2, 6, LOCAL_IP6 + 8, 0),
        jump(JUMP_IF_NOT_EQUAL, 2, 0, Label::Pass),
        plain(LOAD_WORD, 2, 6, LOCAL_IP6 + 12, 0),
        jump(JUMP_IF_NOT_EQUAL_32, 2, last_1, Label::Pass),
        Step::Here(Label::Ours),
        // r7 = map[0]
        plain(STORE_WORD_IMMEDIATE, 10, 0, -4, 0),
        plain(LOAD_IMMEDIATE_64, 1, MAP_DESCRIPTOR, 0, map.as_raw_fd()),
        plain(0, 0, 0, 0, 0),
        plain(MOVE, 2, 10, 0, 0),
        plain(ADD_IMMEDIATE, 2, 0, 0, -4),
        plain(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        jump(JUMP_IF_EQUAL, 0, 0, Label::Pass),
        plain(MOVE, 7, 0, 0, 0),
        plain(MOVE, 1, 6, 0, 0),
        plain(MOVE, 2, 7, 0, 0),
        plain(MOVE_IMMEDIATE, 3, 0, 0, 0),
        plain(CALL, 0, 0, 0, SK_ASSIGN),
        plain(MOVE, 1, 7, 0, 0),
        plain(CALL, 0, 0, 0, SK_RELEASE),
        Step::Here(Label::Pass),
        plain(MOVE_IMMEDIATE, 0, 0, 0, PASS),
        plain(EXIT, 0, 0, 0, 0),
    ];
    assemble(&steps)
}

fn assemble(steps: &[Step]) -> Vec<Instruction> {
    let is_code = |step: &&Step| !matches!(step, Step::Here(_));
    let mut code = Vec::new();
    for (at, step) in steps.iter().enumerate() {
        match step {
            Step::Here(_) => {}
            Step::Plain(instruction) => code.push(*instruction),
            Step::Jump(instruction, label) => {
                let rest = steps.get(at + 1..).unwrap_or_default();
                let until = rest.iter().take_while(|s| !matches!(s, Step::Here(l) if l == label));
                let distance = i16::try_from(until.filter(is_code).count()).unwrap_or(i16::MAX);
                code.push(Instruction { offset: distance, ..*instruction });
            }
        }
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_skip_what_is_between() {
        let nop = || Step::Plain(instruction(MOVE, 0, 0, 0, 0));
        let jump = |label| Step::Jump(instruction(JUMP, 0, 0, 0, 0), label);
        let code = assemble(&[
            jump(Label::Ours),
            nop(),
            Step::Here(Label::Ipv6),
            jump(Label::Pass),
            Step::Here(Label::Ours),
            nop(),
            Step::Here(Label::Pass),
        ]);
        let offsets: Vec<_> = code.iter().map(|i| i.offset).collect();
        assert_eq!(offsets, [2, 0, 1, 0]);
    }
}
