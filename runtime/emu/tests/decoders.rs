//! iced-x86, which the engine decodes with, against yaxpeax-x86: lengths and mnemonics, over random
//! bytes and over the code of installed programs.
//!
//! Lengths never differ where both accept the bytes. Where only one accepts them, or they name
//! different instructions, [`known`] has the reason, or the test fails.

#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::Path;

use iced_x86::{Decoder, DecoderOptions};
use yaxpeax_arch::{AddressBase, LengthedInstruction};

/// Length and mnemonic. None: not an instruction.
type Decoded = Option<(usize, String)>;

fn iced(bits: u32, bytes: &[u8]) -> Decoded {
    let mut decoder = Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE);
    let insn = decoder.decode();
    let name = || format!("{:?}", insn.mnemonic()).to_ascii_lowercase();
    (!insn.is_invalid()).then(|| (insn.len(), name()))
}

fn yaxpeax(bits: u32, bytes: &[u8]) -> Decoded {
    use yaxpeax_x86::{long_mode, protected_mode};
    if bits == 64 {
        let insn = long_mode::InstDecoder::default().decode_slice(bytes).ok()?;
        Some((0u64.wrapping_offset(insn.len()) as usize, insn.opcode().to_string()))
    } else {
        let insn = protected_mode::InstDecoder::default().decode_slice(bytes).ok()?;
        Some((0u32.wrapping_offset(insn.len()) as usize, insn.opcode().to_string()))
    }
}

/// One name for what has several.
fn plain(name: &str) -> String {
    const CONDITIONS: [(&str, &str); 14] = [
        ("z", "e"),
        ("nz", "ne"),
        ("c", "b"),
        ("nae", "b"),
        ("nc", "ae"),
        ("nb", "ae"),
        ("na", "be"),
        ("nbe", "a"),
        ("pe", "p"),
        ("po", "np"),
        ("nge", "l"),
        ("nl", "ge"),
        ("ng", "le"),
        ("nle", "g"),
    ];
    for family in ["j", "cmov", "set", "loop"] {
        let condition = name.strip_prefix(family);
        let same = CONDITIONS.iter().find(|(alias, _)| Some(*alias) == condition);
        if let Some((_, usual)) = same {
            return format!("{family}{usual}");
        }
    }
    const SIZED: [&str; 13] = [
        "movs", "cmps", "stos", "lods", "scas", "ins", "outs", "pushf", "popf", "iret", "incssp",
        "wrss", "wruss",
    ];
    const MORE: [&str; 4] = ["pusha", "popa", "int", "retf"];
    for family in SIZED.iter().chain(&MORE) {
        let suffix = name.strip_prefix(family);
        let sized = matches!(suffix, Some("b" | "w" | "d" | "q" | "1" | "3"));
        // MOVSD and CMPSD are also names of SSE instructions, in both decoders.
        if sized {
            return (*family).to_owned();
        }
    }
    match name {
        "jmpf" => "jmp",
        "callf" => "call",
        "xlatb" => "xlat",
        "fneni" => "feni8087_nop",
        "fndisi" => "fdisi8087_nop",
        "fnsetpm" => "fsetpm287_nop",
        // Hints: NOPs to processors that do not know them.
        "reservednop" | "prefetch" | "prefetchw" | "prefetchwt1" | "prefetchit0"
        | "prefetchit1" | "cldemote" | "rdsspd" | "rdsspq" | "pause" => "nop",
        "wbnoinvd" => "wbinvd",
        name => name,
    }
    .to_owned()
}

/// Why the decoders disagree about `bytes`: what is known of it.
fn known(ours: &Decoded, theirs: &Decoded, bytes: &[u8], bits: u32) -> Option<&'static str> {
    let rex = |b: &u8| bits == 64 && b & 0xf0 == 0x40;
    let prefix = |b: &u8| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
    let prefixes = bytes.iter().take_while(|b| rex(b) || prefix(b)).count();
    let opcode = &bytes[prefixes..];
    match (ours, theirs) {
        (Some((a, x)), Some((b, y))) => {
            let names = (x.as_str(), y.as_str());
            match names {
                _ if a != b => {
                    // The processor agrees with iced: the fuzzer runs these.
                    let near = matches!(opcode, [0xe8 | 0xe9, ..] | [0x0f, 0x80..=0x8f, ..]);
                    let small = bits == 32 && bytes[..prefixes].contains(&0x66);
                    (near && small)
                        .then_some("yaxpeax reads 32-bit displacements in near branches of 16 bits")
                }
                ("movd", "movq") | ("movq", "movd") => Some("yaxpeax names MOVD by chance"),
                ("pause", "xchg") => Some("F3 90 is PAUSE whatever REX.B says"),
                _ if x.starts_with("vfm") && x.replace("213", "231") == *y => {
                    Some("yaxpeax takes scalar FMA opcodes A9 and AB for B9 and BB")
                }
                ("mcommit", "monitorx") | ("rmpquery", "rdpru") | ("vmgexit", "vmmcall") => {
                    Some("AMD's with an F2 or F3 prefix, unknown to yaxpeax")
                }
                _ => None,
            }
        }
        (Some((_, x)), None) => match x.as_str() {
            _ if bytes[..prefixes].windows(2).any(|w| rex(&w[0]) && rex(&w[1])) => {
                Some("yaxpeax refuses several REX prefixes; the last one counts")
            }
            "mov" if matches!(opcode[0], 0x8c | 0x8e) => {
                Some("yaxpeax refuses REX.R with a segment register; it is ignored")
            }
            "reservednop" => Some("yaxpeax refuses 0F 0D with a register"),
            _ if matches!(opcode, [0x0f, 0xa6 | 0xa7, ..]) => Some("VIA PadLock"),
            _ if opcode[0] == 0x82 => Some("yaxpeax lacks the copy of opcode 80 at 82"),
            "jmp" if opcode[0] == 0xea => Some("yaxpeax lacks far jumps to immediate addresses"),
            _ if opcode[0] == 0x8f => Some("XOP, which yaxpeax lacks"),
            _ if x.starts_with("vfm") || x.starts_with("vfnm") || x.starts_with("vpermil2") => {
                Some("FMA4 and XOP, which yaxpeax lacks")
            }
            _ if x.starts_with('k') => Some("AVX-512 mask instructions that yaxpeax lacks"),
            _ if x.starts_with("vpdp")
                || x.starts_with("vsm")
                || x.starts_with("vsha512")
                || x.starts_with("vpmadd52")
                || x.starts_with("vgf2p8")
                || x.starts_with("vcvtne")
                || x.starts_with("vbcstne")
                || x.starts_with("tc")
                || x.starts_with("td")
                || x.starts_with("tile")
                || x.starts_with("cmp") && x.ends_with("xadd")
                || matches!(
                    x.as_str(),
                    "vpclmulqdq"
                        | "lkgs"
                        | "eretu"
                        | "erets"
                        | "serialize"
                        | "aadd"
                        | "aand"
                        | "aor"
                        | "axor"
                        | "wrmsrns"
                ) =>
            {
                Some("sets that yaxpeax lacks")
            }
            _ if opcode[0] == 0x62 => Some("EVEX, which the engine does not offer"),
            _ => None,
        },
        (None, Some((_, y))) => match y.as_str() {
            "xabort" | "xbegin" => Some("yaxpeax looks at part of ModRM only"),
            _ if y.contains("gather") => {
                Some("equal destination, index or mask, which iced refuses and processors too")
            }
            "rorx" | "vldmxcsr" | "vstmxcsr" => {
                Some("VEX.vvvv in use, which yaxpeax does not look at")
            }
            "hreset" => Some("unknown to iced, and not offered"),
            _ if matches!(bytes, [0x66 | 0xf0 | 0xf2 | 0xf3, 0xc4 | 0xc5, ..]) => {
                Some("a prefix before VEX, which is #UD")
            }
            "rdpru" | "monitorx" | "mwaitx" | "mcommit" | "clzero" | "psmash" | "rmpadjust"
            | "pvalidate" | "rmpupdate" => Some("yaxpeax does not look at the prefixes of 0F 01"),
            _ if opcode[0] == 0x62 => Some("EVEX, which the engine does not offer"),
            _ if matches!(opcode, [0xc5, _, 0x71..=0x73, ..] | [0xc4, _, _, 0x71..=0x73, ..]) => {
                Some("yaxpeax takes any ModRM.reg of the VEX shift group")
            }
            _ => None,
        },
        (None, None) => None,
    }
}

#[derive(Default)]
struct Tally {
    compared: u64,
    agreed: u64,
    /// Lengths that differ for no known reason.
    lengths: u64,
    /// By reason.
    known: BTreeMap<&'static str, u64>,
    /// By kind: how often, and an example.
    unknown: BTreeMap<String, (u64, Vec<u8>)>,
}

impl Tally {
    /// Compares the instruction at the start of `bytes`; returns how far to go on.
    fn compare(&mut self, bits: u32, bytes: &[u8]) -> usize {
        let ours = iced(bits, bytes);
        let theirs = yaxpeax(bits, bytes);
        self.compared += 1;
        let length = ours.as_ref().map_or(1, |(length, _)| *length);
        let same = match (&ours, &theirs) {
            (Some((a, x)), Some((b, y))) => a == b && plain(x) == plain(y),
            (ours, theirs) => ours == theirs,
        };
        if same {
            self.agreed += 1;
        } else if let Some(reason) = known(&ours, &theirs, bytes, bits) {
            *self.known.entry(reason).or_default() += 1;
        } else {
            let example = bytes[..bytes.len().min(15)].to_vec();
            let kind = format!("iced {ours:?}, yaxpeax {theirs:?}");
            if let (Some((a, _)), Some((b, _))) = (&ours, &theirs) {
                self.lengths += u64::from(a != b);
            }
            self.unknown.entry(kind).or_insert((0, example)).0 += 1;
        }
        length
    }

    /// Fails if more than `allowed` disagreements are unknown, or one is about a length.
    fn check(&self, what: &str, allowed: u64) {
        println!("{what}: {} compared, {} agreed", self.compared, self.agreed);
        for (reason, n) in &self.known {
            println!("  {n} known: {reason}");
        }
        for (kind, (n, example)) in &self.unknown {
            println!("  {n} unknown: {kind} {example:02x?}");
        }
        let unknown: u64 = self.unknown.values().map(|(n, _)| n).sum();
        assert!(unknown <= allowed, "{what}: {unknown} disagreements");
        assert_eq!(self.lengths, 0, "{what}: lengths that differ");
    }
}

/// The code of an x86-64 ELF file.
fn text(path: &Path) -> Option<Vec<u8>> {
    let file = std::fs::read(path).ok()?;
    let word = |at: usize, n: usize| -> Option<usize> {
        let bytes = file.get(at..at + n)?;
        Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte)))
    };
    const X86_64: usize = 62;
    if file.get(..5)? != b"\x7fELF\x02" || word(18, 2)? != X86_64 {
        return None;
    }
    let (table, size, count) = (word(40, 8)?, word(58, 2)?, word(60, 2)?);
    let names = word(table + word(62, 2)? * size + 24, 8)?;
    let header = (0..count).map(|i| table + i * size).find(|header| {
        let name = word(*header, 4).map(|offset| names + offset);
        name.and_then(|at| file.get(at..at + 6)) == Some(b".text\0")
    })?;
    let (offset, length) = (word(header + 24, 8)?, word(header + 32, 8)?);
    file.get(offset..offset + length).map(<[u8]>::to_vec)
}

#[test]
fn installed_programs_decode_alike() {
    let mut tally = Tally::default();
    let paths = [
        "/proc/self/exe",
        "/bin/bash",
        "/bin/busybox",
        "/usr/bin/python3",
        "/lib/x86_64-linux-gnu/libc.so.6",
        "/lib64/libc.so.6",
        "/lib/x86_64-linux-gnu/libm.so.6",
        "/lib/x86_64-linux-gnu/libcrypto.so.3",
    ];
    for path in paths {
        let Some(text) = text(Path::new(path)) else { continue };
        let before = tally.compared;
        let mut at = 0;
        while at + 15 <= text.len() {
            at += tally.compare(64, &text[at..]);
        }
        println!("{path}: {} instructions", tally.compared - before);
    }
    assert!(tally.compared > 100_000, "this test itself is larger than that");
    // There may be data among the code, which is as good as random.
    tally.check("programs", tally.compared / 10_000);
}

/// Random bytes, mostly behind the prefixes that lead to the larger opcode maps.
fn random(bits: u32, count: u32) {
    let mut tally = Tally::default();
    let mut state = 0x1357_9bdf_0246_8acfu64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..count {
        let mut bytes = [0u8; 16];
        bytes[..8].copy_from_slice(&next().to_le_bytes());
        bytes[8..].copy_from_slice(&next().to_le_bytes());
        let head: &[u8] = match next() >> 40 & 15 {
            0 | 1 => &[0x0f],
            2 => &[0x66, 0x0f],
            3 => &[0xf3, 0x0f],
            4 => &[0xf2, 0x0f],
            5 => &[0x0f, 0x38],
            6 => &[0x66, 0x0f, 0x38],
            7 => &[0x66, 0x0f, 0x3a],
            8 | 9 => &[0xc5],
            10 | 11 => &[0xc4],
            _ => &[],
        };
        bytes[..head.len()].copy_from_slice(head);
        if head == [0xc4] {
            // A map that exists.
            bytes[1] = (bytes[1] & 0xe0) | (1 + (bytes[2] >> 3) % 3);
        }
        tally.compare(bits, &bytes);
    }
    tally.check("random bytes", 0);
}

#[test]
fn random_bytes_decode_alike_in_64_bit_mode() {
    random(64, 1_000_000);
}

#[test]
fn random_bytes_decode_alike_in_32_bit_mode() {
    random(32, 1_000_000);
}
