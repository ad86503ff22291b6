//! An instruction with its memory operand somewhere else.

use super::asm::{Asm, Ea};

/// Low bits of the first byte of a VEX prefix.
const VEX2: u8 = 0xc5;
const VEX3: u8 = 0xc4;

/// Emits the instruction `code`, whose ModRM byte is at `modrm` and says `[rcx]`, with the operand `ea` instead.
pub fn emit(asm: &mut Asm, code: &[u8], modrm: usize, ea: Ea) {
    let b = ea.base.map_or(0, |base| base >> 3);
    let x = ea.index.map_or(0, |(index, _)| index >> 3);
    let (head, rest) = code.split_at(modrm);
    match *head {
        // B and X are inverted there. Two bytes of prefix have neither, and map 1.
        [VEX3, first, ref tail @ ..] => {
            asm.bytes(&[VEX3, first & 0x9f | (1 - b) << 5 | (1 - x) << 6]);
            asm.bytes(tail);
        }
        [VEX2, only, ref tail @ ..] if b | x != 0 => {
            asm.bytes(&[VEX3, only & 0x80 | (1 - b) << 5 | (1 - x) << 6 | 1, only & 0x7f]);
            asm.bytes(tail);
        }
        [VEX2, ..] => asm.bytes(head),
        _ => {
            let prefixes = head.iter().take_while(|byte| matches!(byte, 0x66 | 0xf2 | 0xf3));
            let (prefixes, tail) = head.split_at(prefixes.count());
            asm.bytes(prefixes);
            let (rex, tail) = match *tail {
                [rex @ 0x40..=0x4f, ref tail @ ..] => (rex, tail),
                _ => (0x40, tail),
            };
            if rex | b | x != 0x40 {
                asm.bytes(&[rex & !3 | x << 1 | b]);
            }
            asm.bytes(tail);
        }
    }
    let [modrm, rest @ ..] = rest else { return };
    asm.ea(modrm & 0x38, ea);
    asm.bytes(rest);
}

#[cfg(test)]
mod tests {
    use iced_x86::code_asm::*;

    use super::*;
    use crate::testing::asm::asm;

    #[test]
    fn every_encoding_with_every_kind_of_operand() {
        let at_rcx = [
            asm!(64 at 0; movups(xmm1, xmmword_ptr(rcx));),
            asm!(64 at 0; movdqa(xmmword_ptr(rcx), xmm9);),
            asm!(64 at 0; pinsrq(xmm10, qword_ptr(rcx), 1i32);),
            asm!(64 at 0; pshufb(xmm3, xmmword_ptr(rcx));),
            asm!(64 at 0; vaddps(ymm9, ymm10, ymmword_ptr(rcx));),
            asm!(64 at 0; vpinsrd(xmm2, xmm3, dword_ptr(rcx), 3i32);),
            asm!(64 at 0; vblendvps(xmm2, xmm3, xmmword_ptr(rcx), xmm14);),
            asm!(64 at 0; cvtsi2sd(xmm8, qword_ptr(rcx));),
            asm!(64 at 0; fld(tbyte_ptr(rcx));),
            asm!(64 at 0; fistp(word_ptr(rcx));),
            asm!(64 at 0; popcnt(r9, qword_ptr(rcx));),
        ];
        let places = [
            Ea::at(1, 0),
            Ea::at(6, 0x7f),
            Ea::at(12, -0x80),
            Ea { base: Some(6), index: Some((1, 0)), disp: 0x1234 },
            Ea { base: Some(13), index: Some((9, 3)), disp: 0 },
        ];
        for code in at_rcx {
            let mut decoder = iced_x86::Decoder::new(64, &code, 0);
            let wanted = decoder.decode();
            let has_last = wanted.op_count() > 0
                && matches!(wanted.op_kind(wanted.op_count() - 1), iced_x86::OpKind::Immediate8);
            let modrm = code.len() - 1 - usize::from(has_last || wanted.op_count() == 4);
            for place in places {
                let mut asm = Asm::default();
                emit(&mut asm, &code, modrm, place);
                let made = iced_x86::Decoder::new(64, asm.code(), 0).decode();
                assert_eq!((made.code(), made.len()), (wanted.code(), asm.here()));
                let register = |register: iced_x86::Register| {
                    (register != iced_x86::Register::None).then(|| register.number() as u8)
                };
                let index = register(made.memory_index());
                let scale = made.memory_index_scale().ilog2() as u8;
                let disp = made.memory_displacement64() as i32;
                let found = (register(made.memory_base()), index.map(|i| (i, scale)), disp);
                assert_eq!(found, (place.base, place.index, place.disp), "{made}");
                for i in 0..made.op_count() {
                    assert_eq!(made.op_kind(i), wanted.op_kind(i));
                    if made.op_kind(i) == iced_x86::OpKind::Register {
                        assert_eq!(made.op_register(i), wanted.op_register(i));
                    }
                }
            }
        }
    }
}
