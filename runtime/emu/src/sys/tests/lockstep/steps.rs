//! What programs are made of. A step has all its parameters in it, so that one can be left out without changing others.

use iced_x86::code_asm::*;

use super::emit::Emitter;
use super::machine::*;
use super::program::Random;
use crate::testing::guest::{STACK, pte, sel};

/// Registers for data, by index. RBP has addresses, R15 what a step needs, R14 loops of user code, RSP the stack.
const WIDE: [AsmRegister64; 12] = [rax, rcx, rdx, rbx, rsi, rdi, r8, r9, r10, r11, r12, r13];
const LONG: [AsmRegister32; 12] = [eax, ecx, edx, ebx, esi, edi, r8d, r9d, r10d, r11d, r12d, r13d];
const WORD: [AsmRegister16; 12] = [ax, cx, dx, bx, si, di, r8w, r9w, r10w, r11w, r12w, r13w];
const BYTE: [AsmRegister8; 12] = [al, cl, dl, bl, sil, dil, r8b, r9b, r10b, r11b, r12b, r13b];
const VECTORS: [AsmRegisterXmm; 4] = [xmm0, xmm1, xmm9, xmm15];

/// An instruction that others rewrite: the immediate of `mov ebx, imm32`, or an instruction of one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Offset of what is rewritten.
    offset: usize,
    immediate: bool,
    user: bool,
}

/// A linear address for data.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    Window(u64),
    /// Memory of the supervisor.
    Kernel(u64),
    Odd(u64),
}

impl Place {
    fn random(random: &mut Random) -> Self {
        let offset = match random.below(4) {
            // Across the end of a page, or nearly.
            0 => random.below(WINDOW_PAGES) * 4096 + 4096 - random.below(20),
            _ => random.below(WINDOW_PAGES) * 4096 + random.below(64) * 8,
        };
        match random.below(16) {
            0 | 1 => Self::Kernel(random.below(FRAME_COUNT * 4096 - 64)),
            2 => Self::Odd(random.pick(&[
                0,
                1 << 47,
                (1 << 47) - 4,
                u64::MAX - 3,
                0x7000_0ffe,
                !0 << 47,
            ])),
            _ => Self::Window(offset),
        }
    }

    fn linear(self) -> u64 {
        match self {
            Self::Window(offset) => WINDOW + offset,
            Self::Kernel(offset) => FRAMES + offset,
            Self::Odd(address) => address,
        }
    }
}

/// Accesses to memory at RBP.
#[derive(Clone, Copy, Debug)]
pub enum Access {
    Load,
    Extend,
    Add,
    Compare,
    Test,
    Store,
    Immediate,
    AddTo,
    AdcTo,
    Exchange,
    LockAdd,
    Xadd,
    CompareExchange,
    Increment,
    Negate,
    Shift,
    Set,
    Bit,
    Push,
    Pop,
    Multiply,
    Divide,
    Call,
}

const ACCESSES: [Access; 23] = [
    Access::Load,
    Access::Extend,
    Access::Add,
    Access::Compare,
    Access::Test,
    Access::Store,
    Access::Immediate,
    Access::AddTo,
    Access::AdcTo,
    Access::Exchange,
    Access::LockAdd,
    Access::Xadd,
    Access::CompareExchange,
    Access::Increment,
    Access::Negate,
    Access::Shift,
    Access::Set,
    Access::Bit,
    Access::Push,
    Access::Pop,
    Access::Multiply,
    Access::Divide,
    Access::Call,
];

/// How translations are dropped after an entry was changed.
#[derive(Clone, Copy, Debug)]
pub enum Flush {
    /// INVLPG, with PCIDs INVPCID of the space.
    Page,
    /// CR4.PGE off and on or on and off.
    Global,
    /// INVPCID of everything.
    Everything,
    /// CR3: the space of the entry is the current one from then on.
    Space,
}

/// Entries that are changed.
#[derive(Clone, Copy, Debug)]
pub enum Entry {
    Window(u64),
    /// The one above all of the window; a large page if the value says so.
    Large,
    LowCode(u64),
    /// In both spaces, and perhaps global.
    HighCode(u64),
}

#[derive(Clone, Debug)]
pub enum Step {
    Alu {
        kind: u64,
        size: u64,
        to: usize,
        from: usize,
    },
    Memory {
        access: Access,
        place: Place,
        size: u64,
        register: usize,
    },
    Vector {
        kind: u64,
        place: Place,
        register: usize,
    },
    Text {
        kind: u64,
        to: Place,
        from: Place,
        count: u64,
        size: u64,
        down: bool,
    },
    Stack {
        place: Place,
        words: u64,
    },
    Edit {
        entry: Entry,
        space: usize,
        value: u64,
        flush: Flush,
    },
    /// Sets an entry of the window if it is not present, and flushes nothing.
    Map {
        page: u64,
        space: usize,
        value: u64,
    },
    Switch {
        space: usize,
        keep: bool,
    },
    Control {
        fourth: bool,
        bit: u32,
    },
    Ac {
        on: bool,
    },
    Gs {
        place: Place,
        swap: bool,
        register: usize,
    },
    Call {
        function: usize,
        way: u64,
    },
    Alias {
        to: u64,
    },
    Point {
        immediate: bool,
    },
    Patch {
        point: usize,
        near: bool,
        way: u64,
        through: u64,
        value: u64,
    },
    Overlap {
        condition: u8,
    },
    Branch {
        condition: u8,
        steps: Vec<Step>,
    },
    Loop {
        count: u64,
        slot: u64,
        steps: Vec<Step>,
    },
    Trap {
        steps: Vec<Step>,
    },
    Break {
        which: u64,
        kind: u64,
        size: u64,
        place: Place,
        at: Option<(usize, u64)>,
        steps: Vec<Step>,
    },
    Fault {
        kind: u64,
    },
    Interrupts {
        kind: u64,
    },
    User {
        high: bool,
        by_iret: bool,
        flags: u64,
        place: Place,
        steps: Vec<Step>,
    },
}

fn list(random: &mut Random, user: bool, depth: u64, most: u64) -> Vec<Step> {
    let count = 1 + random.below(most);
    (0..count).map(|_| Step::random(random, user, depth)).collect()
}

/// An entry for a page of code: as it should be, or not.
fn code_entry(random: &mut Random, page: u64) -> u64 {
    let base = if random.once_in(2) { PROGRAM } else { COPY };
    let level = u64::from(page * 4096 >= USER_PART as u64) ^ u64::from(random.once_in(5));
    let rights = u64::from(!random.once_in(5)) | u64::from(!random.once_in(3)) << 1 | level << 2;
    let no_execute = if random.once_in(5) { pte::NX } else { 0 };
    (base + page * 4096) | rights | random.next() & 0x60 | no_execute
}

impl Step {
    /// A random step, with `depth` levels of others in it.
    pub fn random(random: &mut Random, user: bool, depth: u64) -> Self {
        let nested = depth > 0;
        loop {
            return match random.below(40) {
                0..5 => Self::Alu {
                    kind: random.below(16),
                    size: random.pick(&[1, 2, 4, 8]),
                    to: random.below(12) as usize,
                    from: random.below(12) as usize,
                },
                5..14 => Self::Memory {
                    access: random.pick(&ACCESSES),
                    place: Place::random(random),
                    size: random.pick(&[1, 2, 4, 8, 4, 8]),
                    register: random.below(12) as usize,
                },
                14 => Self::Vector {
                    kind: random.below(7),
                    place: Place::random(random),
                    register: random.below(4) as usize,
                },
                15 => Self::Text {
                    kind: random.below(5),
                    to: Place::random(random),
                    from: Place::random(random),
                    count: random.pick(&[0, 1, 7, 40, 700]),
                    size: random.pick(&[1, 2, 4, 8]),
                    down: random.once_in(3),
                },
                16 => Self::Stack { place: Place::random(random), words: 1 + random.below(4) },
                17..20 if !user && nested && random.once_in(3) => {
                    // Calls before and after a change of what is called, in one address space after the other.
                    let function = random.below(FUNCTION_COUNT) as usize;
                    let (way, edit) = if random.once_in(2) {
                        // By the mapping that INVLPG is enough for.
                        let (page, space) =
                            (if function == 3 { 2 } else { 3 }, random.below(2) as usize);
                        let value = code_entry(random, page);
                        (
                            4,
                            Self::Edit {
                                entry: Entry::LowCode(page),
                                space,
                                value,
                                flush: Flush::Page,
                            },
                        )
                    } else {
                        (2 + random.below(4), Self::edit(random))
                    };
                    let call = Self::Call { function, way };
                    let mut steps = vec![call.clone(), edit, call.clone()];
                    if random.once_in(2) {
                        steps.push(Self::Switch { space: random.below(2) as usize, keep: true });
                        steps.push(call);
                    }
                    Self::Loop { count: 2 + random.below(3), slot: depth, steps }
                }
                17..20 if !user => Self::edit(random),
                20 if !user => Self::Map {
                    page: random.below(WINDOW_PAGES),
                    space: random.below(2) as usize,
                    value: random.window_entry() | 1,
                },
                21 if !user => {
                    Self::Switch { space: random.below(2) as usize, keep: random.once_in(2) }
                }
                22 if !user => {
                    let (fourth, bit) = random.pick(&[
                        (false, 16),
                        (false, 18),
                        (false, 3),
                        (true, 20),
                        (true, 21),
                        (true, 7),
                        (true, 9),
                    ]);
                    Self::Control { fourth, bit }
                }
                23 if !user => Self::Ac { on: random.once_in(2) },
                24 => Self::Gs {
                    place: Place::random(random),
                    swap: random.once_in(3),
                    register: random.below(12) as usize,
                },
                25 | 26 if !user => Self::Call {
                    function: random.below(FUNCTION_COUNT) as usize,
                    way: random.below(6),
                },
                27 => Self::Alias { to: random.below(3) },
                28 => Self::Point { immediate: random.once_in(2) },
                29 if nested && random.once_in(2) => {
                    // A loop that changes itself, behind and ahead of the change.
                    let patch = |random: &mut Random| Self::Patch {
                        point: 0,
                        near: true,
                        way: random.below(8),
                        through: random.below(3),
                        value: random.next(),
                    };
                    let mut steps = vec![
                        Self::Point { immediate: random.once_in(2) },
                        Self::Branch {
                            condition: random.below(16) as u8,
                            steps: vec![Self::Point { immediate: random.once_in(2) }],
                        },
                        patch(random),
                    ];
                    steps.extend(list(random, user, depth - 1, 2));
                    steps.push(patch(random));
                    steps.push(Self::Point { immediate: random.once_in(2) });
                    Self::Loop { count: 3 + random.below(5), slot: depth, steps }
                }
                29 | 30 => Self::Patch {
                    point: random.below(64) as usize,
                    near: false,
                    way: random.below(8),
                    through: random.below(3),
                    value: random.next(),
                },
                31 => Self::Overlap { condition: random.below(16) as u8 },
                32 if nested => Self::Branch {
                    condition: random.below(16) as u8,
                    steps: list(random, user, depth - 1, 3),
                },
                33 if nested => Self::Loop {
                    count: 1 + random.below(6),
                    slot: depth,
                    steps: list(random, user, depth - 1, 5),
                },
                34 if nested => Self::Trap { steps: list(random, user, depth - 1, 3) },
                35 if nested && !user => Self::Break {
                    which: random.below(4),
                    kind: random.pick(&[0, 1, 3]),
                    size: random.pick(&[0, 1, 2, 3]),
                    place: Place::random(random),
                    at: random.once_in(2).then(|| (random.below(64) as usize, random.below(3))),
                    steps: list(random, user, depth - 1, 4),
                },
                36 => Self::Fault { kind: random.below(10) },
                37 => Self::Interrupts { kind: random.below(8) },
                38 | 39 if nested && !user => Self::User {
                    high: random.once_in(2),
                    by_iret: random.once_in(2),
                    flags: random.pick(&[0x202, 0x202, 2, 0x4_0202, 0x302]),
                    place: Place::random(random),
                    steps: list(random, true, depth - 1, 8),
                },
                _ => continue,
            };
        }
    }

    fn edit(random: &mut Random) -> Self {
        let space = random.below(2) as usize;
        let any = random.pick(&[Flush::Page, Flush::Global, Flush::Everything, Flush::Space]);
        let everything = random.pick(&[Flush::Global, Flush::Everything]);
        // Often where the functions are, which are called from everywhere.
        let page = if random.once_in(2) { 2 + random.below(2) } else { random.below(CODE_PAGES) };
        match random.below(8) {
            0 => {
                // The table, or a large page in its place.
                let large = if random.once_in(2) { LARGE | pte::PS } else { 0 };
                let value = large | random.next() & 0x66 | u64::from(!random.once_in(4));
                Self::Edit { entry: Entry::Large, space, value, flush: everything }
            }
            1 | 2 => Self::Edit {
                entry: Entry::LowCode(page),
                space,
                value: code_entry(random, page),
                flush: any,
            },
            3 => {
                let global = if random.once_in(2) { pte::G } else { 0 };
                let value = code_entry(random, page) | global;
                Self::Edit { entry: Entry::HighCode(page), space, value, flush: everything }
            }
            _ => Self::Edit {
                entry: Entry::Window(random.below(WINDOW_PAGES)),
                space,
                value: random.window_entry(),
                flush: any,
            },
        }
    }

    pub fn emit(
        &self,
        e: &mut Emitter,
        places: &Places,
        known: &[Point],
        points: &mut Vec<Point>,
        pcids: bool,
    ) {
        if !e.has_room() {
            return;
        }
        let all = |e: &mut Emitter, steps: &[Step], points: &mut Vec<Point>| {
            steps.iter().for_each(|step| step.emit(e, places, known, points, pcids));
        };
        match self {
            Self::Alu { kind, size, to, from } => alu(e, *kind, *size, *to, *from),
            Self::Memory { access, place, size, register } => {
                memory(e, *access, place.linear(), *size, *register);
            }
            Self::Vector { kind, place, register } => vector(e, *kind, place.linear(), *register),
            Self::Text { kind, to, from, count, size, down } => {
                text(e, *kind, (to.linear(), from.linear()), *count, *size, *down);
            }
            Self::Stack { place, words } => stack(e, place.linear(), *words),
            Self::Edit { entry, space, value, flush } => {
                edit(e, places, *entry, *space, *value, *flush, pcids);
            }
            Self::Map { page, space, value } => {
                let entry = places.window[*space] + page * 8;
                e.asm(|a| {
                    a.mov(r15, entry)?;
                    a.test(byte_ptr(r15), 1i32)
                });
                let over = e.forward(0x85);
                e.asm(|a| {
                    a.mov(rbp, *value)?;
                    a.mov(qword_ptr(r15), rbp)
                });
                e.land(over);
            }
            Self::Switch { space, keep } => {
                let keep = if *keep && pcids { 1 << 63 } else { 0 };
                let value = top(places, *space, pcids) | keep;
                e.asm(|a| {
                    a.mov(r15, value)?;
                    a.mov(cr3, r15)
                });
            }
            Self::Control { fourth: true, bit } => e.asm(|a| {
                a.mov(r15, cr4)?;
                a.btc(r15, *bit)?;
                a.mov(cr4, r15)
            }),
            Self::Control { bit, .. } => e.asm(|a| {
                a.mov(r15, cr0)?;
                a.btc(r15, *bit)?;
                a.mov(cr0, r15)
            }),
            Self::Ac { on: true } => e.asm(|a| a.stac()),
            Self::Ac { .. } => e.asm(|a| a.clac()),
            Self::Gs { place, swap, register } => e.asm(|a| {
                a.mov(rbp, place.linear())?;
                a.wrgsbase(rbp)?;
                if *swap {
                    a.swapgs()?;
                }
                a.mov(WIDE[*register], qword_ptr(8).gs())?;
                a.mov(dword_ptr(16).gs(), LONG[*register])
            }),
            Self::Call { function, way } => call(e, *function, *way),
            Self::Alias { to } => {
                // lea r15, [rip + distance behind the jump]; to another mapping of the same code.
                let base = [PROGRAM, LOW_CODE, HIGH_CODE][*to as usize];
                let target = base + e.at as u64 + 13;
                e.asm(|a| {
                    a.mov(r15, 0x1122_3344_5566_7788u64)?;
                    a.jmp(r15)
                });
                let at = e.at - 11;
                assert_eq!(e.at as u64 + base, target, "the jump is as long as thought");
                e.bytes[at..at + 8].copy_from_slice(&target.to_le_bytes());
            }
            Self::Point { immediate } => {
                let user = e.user;
                if *immediate {
                    points.push(Point { offset: e.at + 1, immediate: true, user });
                    e.raw(&[0xbb, 0x55, 0x11, 0, 0]);
                    e.asm(|a| a.add(rsi, rbx));
                } else {
                    points.push(Point { offset: e.at, immediate: false, user });
                    e.raw(&[0xf5]);
                    e.asm(|a| a.adc(rdi, rbx));
                }
            }
            Self::Patch { point, near, way, through, value } => {
                let own: Vec<&Point> = match points.iter().rfind(|p| p.user == e.user) {
                    Some(last) if *near => vec![last],
                    _ => known.iter().filter(|p| p.user == e.user).collect(),
                };
                if known.is_empty() && !near {
                    // The first time round: as long as it will be.
                    patch(e, 0, false, *way, *value, *through);
                } else if let Some(point) = own.get(*point % own.len().max(1)) {
                    patch(e, point.offset as u64, point.immediate, *way, *value, *through);
                } else {
                    patch(e, END as u64 - 8, true, *way, *value, *through);
                }
            }
            Self::Overlap { condition } => {
                // Into the middle of what follows: inc edx; stc; nops, which is also the immediate of a MOV.
                let inner = e.at + 4;
                e.raw(&[0x70 | condition, 2]);
                e.raw(&[0x48, 0xb8, 0xff, 0xc2, 0xf9, 0x90, 0x90, 0x90, 0x90, 0x90]);
                for (at, length) in [(0, 2), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1)] {
                    e.next[inner + at] = (inner + at + length) as u16;
                }
            }
            Self::Branch { condition, steps } => {
                let over = e.forward(0x80 | condition);
                all(e, steps, points);
                e.land(over);
            }
            Self::Loop { count, slot, steps } => {
                let counter = (COUNTERS + slot * 8) as u32;
                let user = e.user;
                e.asm(|a| {
                    if user { a.mov(r14, *count) } else { a.mov(qword_ptr(counter), *count as i32) }
                });
                let top = e.at;
                all(e, steps, points);
                e.asm(|a| if user { a.dec(r14) } else { a.dec(qword_ptr(counter)) });
                let back = top as i32 - (e.at as i32 + 6);
                let mut jump = vec![0x0f, 0x85];
                jump.extend(back.to_le_bytes());
                e.raw(&jump);
            }
            Self::Trap { steps } => {
                let flags = |e: &mut Emitter, on: bool| {
                    e.asm(|a| {
                        a.pushfq()?;
                        if on {
                            a.or(dword_ptr(rsp), 0x100i32)?
                        } else {
                            a.and(dword_ptr(rsp), !0x100i32)?
                        }
                        a.popfq()
                    });
                };
                flags(e, true);
                all(e, steps, points);
                flags(e, false);
            }
            Self::Break { which, kind, size, place, at, steps } => {
                let code = at.and_then(|(point, base)| {
                    let point = known.get(point % known.len().max(1))?;
                    let start = point.offset - usize::from(point.immediate);
                    Some([PROGRAM, LOW_CODE, HIGH_CODE][base as usize] + start as u64)
                });
                let (kind, size) = if at.is_some() { (0, 0) } else { (*kind, *size) };
                let address = code.unwrap_or(place.linear());
                let control = 0x400 | 2 << (which * 2) | (kind | size << 2) << (16 + which * 4);
                e.asm(|a| {
                    a.mov(r15, address)?;
                    match which {
                        0 => a.mov(dr0, r15)?,
                        1 => a.mov(dr1, r15)?,
                        2 => a.mov(dr2, r15)?,
                        _ => a.mov(dr3, r15)?,
                    }
                    a.mov(r15d, control as u32)?;
                    a.mov(dr7, r15)
                });
                all(e, steps, points);
                e.asm(|a| {
                    a.mov(r15d, 0x400u32)?;
                    a.mov(dr7, r15)
                });
            }
            Self::Fault { kind } => fault(e, *kind),
            Self::Interrupts { kind } => interrupts(e, *kind),
            Self::User { high, by_iret, flags, place, steps } => {
                let start = e.switch();
                all(e, steps, points);
                e.raw(&[0xcd, 0x80]);
                e.switch();
                let base = if *high { HIGH_CODE } else { LOW_CODE };
                let (entry, flags, by_iret) = (base + start as u64, *flags, *by_iret);
                let pointer = place.linear();
                let known = e.at;
                // lea r15, [rip + distance of what follows]
                e.raw(&[0x4c, 0x8d, 0x3d, 0, 0, 0, 0]);
                e.asm(|a| {
                    a.mov(qword_ptr(GO_ON as u32), r15)?;
                    if by_iret {
                        a.push(i32::from(sel::USER_DATA))?;
                        a.mov(r15, pointer)?;
                        a.push(r15)?;
                        a.push(flags as i32)?;
                        a.push(i32::from(sel::USER64))?;
                        a.mov(r15, entry)?;
                        a.push(r15)?;
                        a.iretq()
                    } else {
                        a.mov(rcx, entry)?;
                        a.mov(r11d, flags as u32)?;
                        a.mov(rsp, pointer)?;
                        a.sysretq()
                    }
                });
                let distance = (e.at - (known + 7)) as i32;
                e.bytes[known + 3..known + 7].copy_from_slice(&distance.to_le_bytes());
                // The flags are the user's: DF and AC are not wanted.
                e.asm(|a| {
                    a.push(2i32)?;
                    a.popfq()
                });
            }
        }
    }
}

fn top(places: &Places, space: usize, pcids: bool) -> u64 {
    places.tops[space] | if pcids { space as u64 + 1 } else { 0 }
}

fn alu(e: &mut Emitter, kind: u64, size: u64, to: usize, from: usize) {
    macro_rules! both {
        ($name:ident) => {
            e.asm(|a| match size {
                1 => a.$name(BYTE[to], BYTE[from]),
                2 => a.$name(WORD[to], WORD[from]),
                4 => a.$name(LONG[to], LONG[from]),
                _ => a.$name(WIDE[to], WIDE[from]),
            })
        };
    }
    macro_rules! one {
        ($name:ident $(, $more:expr)*) => {
            e.asm(|a| match size {
                1 => a.$name(BYTE[to] $(, $more)*),
                2 => a.$name(WORD[to] $(, $more)*),
                4 => a.$name(LONG[to] $(, $more)*),
                _ => a.$name(WIDE[to] $(, $more)*),
            })
        };
    }
    match kind {
        0 => both!(add),
        1 => both!(sub),
        2 => both!(xor),
        3 => both!(adc),
        4 => both!(sbb),
        5 => both!(cmp),
        6 => both!(and),
        7 => both!(test),
        8 => both!(mov),
        9 => both!(xchg),
        10 => one!(inc),
        11 => one!(neg),
        12 => one!(shl, 3u32),
        13 => one!(ror, cl),
        14 => e.asm(|a| a.imul_2(WIDE[to], WIDE[from])),
        _ => e.asm(|a| a.lea(WIDE[to], ptr(WIDE[from] + rax * 4 + 5))),
    }
}

fn memory(e: &mut Emitter, access: Access, address: u64, size: u64, r: usize) {
    macro_rules! to_register {
        ($name:ident) => {
            e.asm(|a| match size {
                1 => a.$name(BYTE[r], byte_ptr(rbp)),
                2 => a.$name(WORD[r], word_ptr(rbp)),
                4 => a.$name(LONG[r], dword_ptr(rbp)),
                _ => a.$name(WIDE[r], qword_ptr(rbp)),
            })
        };
    }
    macro_rules! to_memory {
        ($name:ident $(, $lock:ident)?) => {
            e.asm(|a| match size {
                1 => a$(.$lock())?.$name(byte_ptr(rbp), BYTE[r]),
                2 => a$(.$lock())?.$name(word_ptr(rbp), WORD[r]),
                4 => a$(.$lock())?.$name(dword_ptr(rbp), LONG[r]),
                _ => a$(.$lock())?.$name(qword_ptr(rbp), WIDE[r]),
            })
        };
    }
    macro_rules! one {
        ($name:ident $(, $more:expr)*) => {
            e.asm(|a| match size {
                1 => a.$name(byte_ptr(rbp) $(, $more)*),
                2 => a.$name(word_ptr(rbp) $(, $more)*),
                4 => a.$name(dword_ptr(rbp) $(, $more)*),
                _ => a.$name(qword_ptr(rbp) $(, $more)*),
            })
        };
    }
    e.asm(|a| a.mov(rbp, address));
    match access {
        Access::Load => to_register!(mov),
        Access::Extend => e.asm(|a| match size {
            1 => a.movzx(LONG[r], byte_ptr(rbp)),
            2 => a.movsx(WIDE[r], word_ptr(rbp)),
            _ => a.movsxd(WIDE[r], dword_ptr(rbp)),
        }),
        Access::Add => to_register!(add),
        Access::Compare => to_register!(cmp),
        Access::Test => to_memory!(test),
        Access::Store => to_memory!(mov),
        Access::Immediate => one!(mov, 0x5ai32),
        Access::AddTo => to_memory!(add),
        Access::AdcTo => to_memory!(adc),
        Access::Exchange => to_memory!(xchg),
        Access::LockAdd => to_memory!(add, lock),
        Access::Xadd => to_memory!(xadd, lock),
        Access::CompareExchange => to_memory!(cmpxchg, lock),
        Access::Increment => one!(inc),
        Access::Negate => one!(neg),
        Access::Shift => one!(rcl, cl),
        Access::Set => e.asm(|a| a.setbe(byte_ptr(rbp))),
        Access::Bit => e.asm(|a| a.bts(dword_ptr(rbp), 9i32)),
        Access::Push => e.asm(|a| {
            a.push(qword_ptr(rbp))?;
            a.lea(rsp, ptr(rsp + 8))
        }),
        Access::Pop => e.asm(|a| {
            a.push(WIDE[r])?;
            a.pop(qword_ptr(rbp))
        }),
        Access::Multiply => one!(mul),
        Access::Divide => one!(div),
        // Into a window that may be the code of a return, or not be mapped.
        Access::Call => e.asm(|a| {
            a.lea(r15, ptr(rsp))?;
            a.mov(rsp, rbp)?;
            a.push(WIDE[r])?;
            a.pop(WIDE[(r + 1) % 12])?;
            a.mov(rsp, r15)
        }),
    }
    if e.user {
        return;
    }
    // A push or pop that was skipped leaves the stack pointer off.
    if matches!(access, Access::Push | Access::Pop) {
        e.asm(|a| a.mov(rsp, STACK));
    }
}

fn vector(e: &mut Emitter, kind: u64, address: u64, r: usize) {
    let x = VECTORS[r];
    let y = [ymm0, ymm1, ymm9, ymm15][r];
    e.asm(|a| a.mov(rbp, address));
    e.asm(|a| match kind {
        0 => a.movups(x, xmmword_ptr(rbp)),
        1 => a.movups(xmmword_ptr(rbp), x),
        2 => a.movaps(xmmword_ptr(rbp), x),
        3 => a.paddd(x, xmmword_ptr(rbp)),
        4 => a.movq(qword_ptr(rbp), x),
        5 => a.vmovups(ymmword_ptr(rbp), y),
        _ => a.vpaddq(y, y, ymmword_ptr(rbp)),
    });
}

fn text(e: &mut Emitter, kind: u64, (to, from): (u64, u64), count: u64, size: u64, down: bool) {
    e.asm(|a| {
        a.mov(rdi, to)?;
        a.mov(rsi, from)?;
        a.mov(ecx, count as u32)?;
        if down { a.std() } else { a.cld() }
    });
    macro_rules! by_size {
        ($prefix:ident, $b:ident, $w:ident, $d:ident, $q:ident) => {
            e.asm(|a| match size {
                1 => a.$prefix().$b(),
                2 => a.$prefix().$w(),
                4 => a.$prefix().$d(),
                _ => a.$prefix().$q(),
            })
        };
    }
    match kind {
        0 => by_size!(rep, movsb, movsw, movsd, movsq),
        1 => by_size!(rep, stosb, stosw, stosd, stosq),
        2 => by_size!(rep, lodsb, lodsw, lodsd, lodsq),
        3 => by_size!(repe, cmpsb, cmpsw, cmpsd, cmpsq),
        _ => by_size!(repne, scasb, scasw, scasd, scasq),
    }
    e.asm(|a| a.cld());
}

fn stack(e: &mut Emitter, address: u64, words: u64) {
    let user = e.user;
    e.asm(|a| a.mov(rsp, address));
    for register in &WIDE[..words as usize] {
        e.asm(|a| a.push(*register));
    }
    e.asm(|a| a.pushfq());
    e.asm(|a| a.pop(WIDE[words as usize + 1]));
    // enter 8, 1 and leave
    e.raw(&[0xc8, 8, 0, 1]);
    e.asm(|a| a.leave());
    for i in 0..words as usize {
        e.asm(|a| a.pop(WIDE[i + 3]));
    }
    if !user {
        e.asm(|a| a.mov(rsp, STACK));
    }
}

fn edit(
    e: &mut Emitter,
    places: &Places,
    entry: Entry,
    space: usize,
    value: u64,
    flush: Flush,
    pcids: bool,
) {
    let (at, linear) = match entry {
        Entry::Window(page) => (places.window[space] + page * 8, WINDOW + page * 4096),
        Entry::Large => (places.window_large[space], WINDOW),
        Entry::LowCode(page) => (places.low_code[space] + page * 8, LOW_CODE + page * 4096),
        Entry::HighCode(page) => (places.high_code + page * 8, HIGH_CODE + page * 4096),
    };
    // Where it says nothing of a large page, the table that is there.
    let table = matches!(entry, Entry::Large) && value & pte::PS == 0;
    let value = if table { places.window[space] & !0xfff | value } else { value };
    let global = |e: &mut Emitter| {
        e.asm(|a| {
            a.mov(r15, cr4)?;
            a.btc(r15, 7i32)?;
            a.mov(cr4, r15)?;
            a.btc(r15, 7i32)?;
            a.mov(cr4, r15)
        });
    };
    // Between the store and the flush nothing may depend on which of both translations is used.
    e.asm(|a| {
        a.pushfq()?;
        a.cli()?;
        a.mov(rbp, at)?;
        a.mov(r15, value)?;
        a.mov(qword_ptr(rbp), r15)
    });
    match flush {
        Flush::Page => {
            e.asm(|a| {
                a.mov(rbp, linear)?;
                a.invlpg(ptr(rbp))
            });
            if pcids {
                e.asm(|a| {
                    a.mov(qword_ptr(DESCRIPTOR as u32), space as i32 + 1)?;
                    a.mov(qword_ptr(DESCRIPTOR as u32 + 8), rbp)?;
                    a.xor(r15d, r15d)?;
                    a.invpcid(r15, xmmword_ptr(DESCRIPTOR as u32))
                });
            }
        }
        Flush::Global => global(e),
        Flush::Everything => e.asm(|a| {
            a.mov(qword_ptr(DESCRIPTOR as u32), 0i32)?;
            a.mov(qword_ptr(DESCRIPTOR as u32 + 8), 0i32)?;
            a.mov(r15d, 2i32)?;
            a.invpcid(r15, xmmword_ptr(DESCRIPTOR as u32))
        }),
        Flush::Space => {
            let value = top(places, space, pcids);
            e.asm(|a| {
                a.mov(r15, value)?;
                a.mov(cr3, r15)
            });
        }
    }
    e.asm(|a| a.popfq());
}

const FUNCTION_COUNT: u64 = 4;
/// Bytes for each function.
const FUNCTION: usize = 64;

/// The functions that calls go to.
pub fn functions(e: &mut Emitter) {
    for number in 0..FUNCTION_COUNT as usize {
        // The last one lies across two pages.
        e.at = if number == 3 { 0x2ffd } else { FUNCTIONS + number * FUNCTION };
        match number {
            0 => e.asm(|a| {
                a.add(rax, rbx)?;
                a.ret()
            }),
            1 => e.asm(|a| {
                a.push(rcx)?;
                a.xor(rcx, rdx)?;
                a.rol(rcx, 7u32)?;
                // What a rotation by more than one leaves in OF is each processor's own business.
                a.test(rcx, rcx)?;
                a.pop(rdx)?;
                a.ret()
            }),
            2 => e.asm(|a| {
                a.adc(r8, r9)?;
                a.lea(rsp, ptr(rsp - 8))?;
                a.mov(r15, qword_ptr(rsp + 8))?;
                a.mov(qword_ptr(rsp), r15)?;
                a.ret_1(8i32)
            }),
            _ => e.asm(|a| {
                a.mov(r10d, 0x1234i32)?;
                a.sbb(r10, r11)?;
                a.ret()
            }),
        }
    }
    e.at = END;
    e.asm(|a| {
        a.cli()?;
        a.hlt()
    });
    e.jump(END);
}

fn call(e: &mut Emitter, function: usize, way: u64) {
    let target = if function == 3 { 0x2ffd } else { FUNCTIONS + function * FUNCTION };
    let relative = |e: &mut Emitter, opcode: u8| {
        let mut bytes = vec![opcode];
        bytes.extend((target as i32 - (e.at as i32 + 5)).to_le_bytes());
        e.raw(&bytes);
    };
    let base = [PROGRAM, LOW_CODE, HIGH_CODE][way as usize % 3];
    match way {
        0 | 1 => relative(e, 0xe8),
        2..4 => e.asm(|a| {
            a.mov(r15, base + target as u64)?;
            a.call(r15)
        }),
        _ => e.asm(|a| {
            a.mov(r15, base + target as u64)?;
            a.mov(qword_ptr(POINTER as u32), r15)?;
            a.call(qword_ptr(POINTER as u32))
        }),
    }
    // A return that went wrong.
    e.asm(|a| a.mov(rsp, STACK));
}

fn patch(e: &mut Emitter, offset: u64, immediate: bool, way: u64, value: u64, through: u64) {
    let address = [PROGRAM, LOW_CODE, HIGH_CODE][through as usize] + offset;
    // CMC, CLC, STC, NOP, CWDE, CDQ.
    let byte = if immediate {
        value as u8
    } else {
        [0xf5, 0xf8, 0xf9, 0x90, 0x98, 0x99][value as usize % 6]
    };
    // Wide stores are for immediates alone, narrow ones instead of them for the others.
    let wide = if immediate { value as u32 & 0xffff_ff00 | u32::from(byte) } else { 0 };
    e.asm(|a| {
        a.mov(rbp, address)?;
        a.mov(r15d, if immediate { wide } else { byte.into() })
    });
    // All of one length, whatever the point is: padded with prefixes that mean nothing.
    let plain = |e: &mut Emitter| e.asm(|a| a.mov(byte_ptr(rbp), r15b));
    match way {
        0 => plain(e),
        1 => e.asm(|a| a.xchg(byte_ptr(rbp), r15b)),
        2 => e.asm(|a| {
            a.mov(rdi, rbp)?;
            a.mov(eax, r15d)?;
            a.mov(ecx, 1i32)?;
            a.rep().stosb()
        }),
        3 => e.asm(|a| {
            a.movzx(r15d, r15b)?;
            a.mov(al, byte_ptr(rbp))?;
            a.lock().cmpxchg(byte_ptr(rbp), r15b)
        }),
        // REX.W or not: four bytes, or one.
        4 if immediate => e.raw(&[0x44, 0x89, 0x7d, 0]),
        4 => e.raw(&[0x44, 0x88, 0x7d, 0]),
        5 if immediate => e.asm(|a| {
            a.movd(xmm1, r15d)?;
            a.movd(dword_ptr(rbp), xmm1)
        }),
        5 => {
            e.asm(|a| a.movd(xmm1, r15d));
            // pextrb [rbp], xmm1, 0 is six bytes long, the other five: no difference in length may be.
            e.raw(&[0x44, 0x88, 0x7d, 0]);
            e.raw(&[0x90]);
        }
        6 => e.asm(|a| {
            a.sub(r15b, byte_ptr(rbp))?;
            a.lock().add(byte_ptr(rbp), r15b)
        }),
        _ => e.asm(|a| {
            a.xor(r15b, byte_ptr(rbp))?;
            a.xor(byte_ptr(rbp), r15b)
        }),
    }
}

fn fault(e: &mut Emitter, kind: u64) {
    match kind {
        0 => e.asm(|a| a.ud2()),
        1 => e.asm(|a| a.int3()),
        2 => e.asm(|a| {
            a.xor(ecx, ecx)?;
            a.div(rcx)
        }),
        3 => e.asm(|a| {
            a.mov(rax, 1u64 << 63)?;
            a.cqo()?;
            a.mov(rcx, -1i64)?;
            a.idiv(rcx)
        }),
        4 => e.asm(|a| {
            a.mov(ecx, 0x1234i32)?;
            a.rdmsr()
        }),
        5 => e.asm(|a| {
            a.mov(r15, 1u64 << 47)?;
            a.call(r15)
        }),
        6 => e.asm(|a| a.int(0x33i32)),
        7 => e.asm(|a| {
            a.mov(r15d, 0x7777i32)?;
            a.mov(ds, r15d)
        }),
        8 => e.asm(|a| {
            a.in_(al, 0x40i32)?;
            a.out(0x41i32, eax)
        }),
        _ => e.asm(|a| {
            a.mov(rbp, WINDOW)?;
            a.clflush(byte_ptr(rbp))?;
            a.invlpg(ptr(rbp))
        }),
    }
    if kind == 5 && !e.user {
        e.asm(|a| a.mov(rsp, STACK));
    }
}

fn interrupts(e: &mut Emitter, kind: u64) {
    if e.user {
        // What level 3 may do of it, and a system call.
        return match kind {
            0..4 => e.asm(|a| a.syscall()),
            4 => e.asm(|a| a.cli()),
            5 => e.asm(|a| a.hlt()),
            _ => e.asm(|a| a.sti()),
        };
    }
    let send = |e: &mut Emitter| {
        e.asm(|a| {
            a.mov(ecx, 0x83fi32)?;
            a.mov(eax, i32::from(OWN))?;
            a.xor(edx, edx)?;
            a.wrmsr()
        });
    };
    match kind {
        0 => e.asm(|a| a.sti()),
        1 => e.asm(|a| a.cli()),
        2 => {
            send(e);
            e.asm(|a| a.inc(r8));
        }
        3 => {
            e.asm(|a| a.cli());
            send(e);
            e.asm(|a| {
                a.sti()?;
                a.inc(r9)?;
                a.inc(r9)
            });
        }
        4 => {
            e.asm(|a| a.cli());
            send(e);
            e.asm(|a| {
                a.sti()?;
                a.hlt()?;
                a.inc(r10)
            });
        }
        5 => {
            e.asm(|a| a.cli());
            send(e);
            e.asm(|a| {
                a.pushfq()?;
                a.or(dword_ptr(rsp), 0x200i32)?;
                a.mov(r15d, i32::from(sel::DATA))?;
                a.popfq()?;
                a.mov(ss, r15d)?;
                a.inc(r11)?;
                a.inc(r11)
            });
        }
        6 => e.asm(|a| {
            a.mov(r15d, i32::from(sel::DATA))?;
            a.mov(ss, r15d)?;
            a.inc(r12)
        }),
        _ => {
            // A switch of the stack as kernels do it, with what would be an interrupt in between.
            e.asm(|a| {
                a.mov(r15d, i32::from(sel::DATA))?;
                a.mov(ss, r15d)?;
                a.mov(rsp, STACK - 0x100)?;
                a.push(r13)?;
                a.pop(r12)?;
                a.mov(rsp, STACK)
            });
        }
    }
}
