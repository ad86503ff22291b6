//! Accesses of a block that go off the same address: one probe serves them all (J14).
//!
//! Registers are followed through the block as a symbol plus a distance, so that stack accesses between pushes and
//! pops, fields of a structure, and elements of an array off the same index are known to lie side by side.

use super::plan::{Field, Kind, Mem, Operand, Plan};
use super::system::System;
use crate::host::inline::Inline;
use crate::op::{Op, op_flags, reg};

/// Bytes that one probe vouches for, at most. They must lie in one page, which the larger they are the less they do.
const SPAN: i64 = 512;
/// Spans in use at a time.
pub const SLOTS: usize = 8;

/// An address: `base + (index << scale) + disp`, and a segment's base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    pub base: u8,
    pub index: u8,
    pub scale: u8,
    pub disp: i32,
    pub seg: Option<u8>,
}

impl Address {
    /// The memory operand of `op`. Plans are made for operands whose displacement fits.
    pub fn of_operand(op: &Op) -> Self {
        let seg = (op.flags & op_flags::SEG != 0).then_some(op.seg);
        Self { base: op.base, index: op.index, scale: op.scale, disp: op.disp as i32, seg }
    }

    /// Where 8 bytes are pushed to.
    pub const PUSHED: Self = Self::at(SP, -8);

    /// `disp` beyond register `base`.
    const fn at(base: u8, disp: i32) -> Self {
        Self { base, index: reg::ZERO, scale: 0, disp, seg: None }
    }

    /// What `op` accesses by its plan; of two accesses, the one of its operand.
    pub fn of(op: &Op, plan: &Plan) -> Self {
        match plan.kind {
            Kind::Push { .. }
            | Kind::System(System::PushFlags)
            | Kind::CallNear
            | Kind::CallIndirect { register: Some(_) } => Self::PUSHED,
            Kind::Pop { .. } | Kind::Return => Self::at(SP, 0),
            Kind::Leave => Self::at(BP, 0),
            Kind::Fill { .. } => Self::at(DI, 0),
            _ => Self::of_operand(op),
        }
    }
}

const SP: u8 = 4;
const BP: u8 = 5;
const DI: u8 = 7;

/// What an access of a block does for its neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Nothing: it has a probe of its own.
    Alone,
    /// Its probe is for the bytes from `low` (relative to its address) on, and is kept in `slot`.
    Head { slot: u8, low: i16, bytes: u16, write: bool },
    /// It goes by the probe that is in `slot`, `at` so many bytes from the head's address.
    Member { slot: u8, at: i16 },
}

/// A value nobody knows, plus a distance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Value {
    symbol: u16,
    distance: i64,
}

/// Accesses with the same key are a known distance apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    base: u16,
    index: u16,
    scale: u8,
    seg: Option<u8>,
}

#[derive(Debug)]
struct Group {
    key: Key,
    head: usize,
    last: usize,
    /// Bounds, as distances from the key.
    low: i64,
    high: i64,
    head_at: i64,
    write: bool,
    number: usize,
    members: usize,
}

/// An access after the first one of its group.
#[derive(Debug, Clone, Copy)]
struct Member {
    group: usize,
    op: usize,
    /// Its address, as a distance from the key.
    at: i64,
}

/// Finds the spans of blocks. Keeps its buffers.
#[derive(Debug, Default)]
pub struct Spans {
    values: Vec<Value>,
    next: u16,
    open: Vec<Group>,
    closed: Vec<Group>,
    /// Of groups, by number.
    slots: Vec<Option<(u8, i64)>>,
    members: Vec<Member>,
    roles: Vec<Role>,
}

impl Spans {
    /// What the access of op `index` does.
    pub fn role(&self, index: usize) -> Role {
        self.roles.get(index).copied().unwrap_or(Role::Alone)
    }

    /// Accesses that go by another's probe.
    pub fn members(&self) -> usize {
        self.roles.iter().filter(|role| matches!(role, Role::Member { .. })).count()
    }

    /// Every access has its own probe.
    pub fn none(&mut self) {
        self.roles.clear();
    }

    /// Looks at a block; `immediate` is the immediate operand of an op.
    pub fn find(
        &mut self,
        ops: &[Op],
        plans: &[Plan],
        inlines: &[Option<Inline>],
        immediate: impl Fn(usize) -> i64,
    ) {
        self.slots.clear();
        self.roles.clear();
        self.roles.resize(plans.len(), Role::Alone);
        self.next = u16::from(reg::BLOCK) + 1;
        self.values.clear();
        self.values.extend((0..self.next).map(|symbol| Value { symbol, distance: 0 }));
        for (i, ((op, plan), inline)) in ops.iter().zip(plans).zip(inlines).enumerate() {
            if matches!(plan.kind, Kind::Call) {
                // The handler may change the surroundings, and any register.
                self.closed.append(&mut self.open);
                (0..16).for_each(|register| self.forget(register));
                continue;
            }
            // These have two accesses, or one that is not where and what the operand says.
            let two = matches!(
                plan.kind,
                Kind::CallIndirect { register: None }
                    | Kind::PushMemory
                    | Kind::Fill { repeated: true }
                    | Kind::BitString { .. }
            );
            // The head of a span reaches below its own displacement.
            let address = Address::of(op, plan);
            let far = i64::from(address.disp) < i64::from(i32::MIN) + SPAN;
            if plan.mem != Mem::None && !two && !far {
                self.access(i, &address, plan);
            }
            self.effect(op, plan, inline.as_ref(), immediate(i));
        }
        self.closed.append(&mut self.open);
        self.assign();
    }

    fn value(&self, register: u8) -> Value {
        self.values[usize::from(register)]
    }

    fn forget(&mut self, register: u8) {
        self.values[usize::from(register)] = Value { symbol: self.next, distance: 0 };
        self.next += 1;
    }

    fn set(&mut self, register: u8, from: u8, distance: i64) {
        let value = self.value(from);
        let distance = value.distance.wrapping_add(distance);
        self.values[usize::from(register)] = Value { distance, ..value };
    }

    fn access(&mut self, i: usize, address: &Address, plan: &Plan) {
        let (base, index) = (self.value(address.base), self.value(address.index));
        let key =
            Key { base: base.symbol, index: index.symbol, scale: address.scale, seg: address.seg };
        let at = base
            .distance
            .wrapping_add(index.distance << address.scale)
            .wrapping_add(i64::from(address.disp));
        let write = plan.mem == Mem::Write;
        let (low, high) = (at, at.wrapping_add(i64::from(plan.size)));
        let near = |group: &Group| {
            let (low, high) = (group.low.min(low), group.high.max(high));
            high.checked_sub(low).is_some_and(|bytes| bytes <= SPAN)
        };
        if let Some(group) = self.open.iter_mut().find(|group| group.key == key && near(group)) {
            (group.low, group.high) = (group.low.min(low), group.high.max(high));
            group.write |= write;
            group.last = i;
            group.members += 1;
            self.members.push(Member { group: group.number, op: i, at });
            return;
        }
        let number = self.slots.len();
        self.slots.push(None);
        self.open.push(Group {
            key,
            head: i,
            last: i,
            low,
            high,
            head_at: at,
            write,
            number,
            members: 0,
        });
    }

    /// What an op that is no call leaves in the registers.
    fn effect(&mut self, op: &Op, plan: &Plan, inline: Option<&Inline>, immediate: i64) {
        match plan.kind {
            Kind::Copy { code, field, operand, .. } if code.wide && code.map == 0 => {
                match (code.op, field, operand) {
                    (0x89, Field::Reg(from, ..), Operand::Reg(to, ..))
                    | (0x8b, Field::Reg(to, ..), Operand::Reg(from, ..)) => self.set(to, from, 0),
                    (0x81 | 0x83, Field::Digit(0), Operand::Reg(register, ..)) => {
                        self.set(register, register, immediate);
                    }
                    (0x81 | 0x83, Field::Digit(5), Operand::Reg(register, ..)) => {
                        self.set(register, register, immediate.wrapping_neg());
                    }
                    (0xff, Field::Digit(0), Operand::Reg(register, ..)) => {
                        self.set(register, register, 1);
                    }
                    (0xff, Field::Digit(1), Operand::Reg(register, ..)) => {
                        self.set(register, register, -1);
                    }
                    _ => self.written(field, operand),
                }
            }
            Kind::Copy { field, operand, .. } | Kind::ByCl { field, operand, .. } => {
                self.written(field, operand);
            }
            Kind::Lea { register, size: 8 } if op.index == reg::ZERO => {
                self.set(register, op.base, op.disp);
            }
            Kind::MovImm { register } | Kind::Lea { register, .. } => self.forget(register),
            Kind::Extend { .. } | Kind::CompareExchange { .. } => self.forget(0),
            Kind::CompareExchange16 { .. } => {
                self.forget(0);
                self.forget(2);
            }
            Kind::System(System::PushFlags) => self.set(SP, SP, -8),
            // Addresses in GS are others from now on.
            Kind::System(System::SwapGs) => self.closed.append(&mut self.open),
            Kind::Sign { .. } => self.forget(2),
            Kind::Multiply { .. } | Kind::Divide { .. } => {
                self.forget(0);
                self.forget(2);
            }
            Kind::Push { .. } | Kind::PushMemory => self.set(SP, SP, -8),
            Kind::Pop { register } => {
                self.set(SP, SP, 8);
                self.forget(register);
            }
            Kind::Fill { repeated } => {
                self.forget(DI);
                if repeated {
                    self.forget(1);
                }
            }
            Kind::BitString { .. } => {}
            Kind::Leave => {
                self.set(SP, BP, 8);
                self.forget(BP);
            }
            Kind::Vector => {
                let places = inline.map_or(&[][..], |inline| &inline.moves[..]);
                for place in places.iter().flatten().filter(|place| place.store) {
                    self.forget(place.guest);
                }
            }
            Kind::AhOfFlags => self.forget(0),
            Kind::Nop
            | Kind::Flag(_)
            | Kind::FlagsOfAh
            | Kind::System(System::ClearInterrupts | System::SetInterrupts) => {}
            // The block ends.
            Kind::Call
            | Kind::Jump
            | Kind::Branch { .. }
            | Kind::CallNear
            | Kind::JumpIndirect { .. }
            | Kind::CallIndirect { .. }
            | Kind::Return => {}
        }
    }

    fn written(&mut self, field: Field, operand: Operand) {
        for (register, written) in [field.register(), operand.register()].into_iter().flatten() {
            if written {
                self.forget(register);
            }
        }
    }

    /// Gives slots to the groups of more than one access, as long as there are any.
    fn assign(&mut self) {
        self.closed.sort_by_key(|group| group.head);
        let mut busy = [None; SLOTS];
        for group in self.closed.drain(..).filter(|group| group.members != 0) {
            let free = busy.iter().position(|last| last.is_none_or(|last| last < group.head));
            let Some(slot) = free else { continue };
            busy[slot] = Some(group.last);
            let slot = slot as u8;
            self.roles[group.head] = Role::Head {
                slot,
                low: (group.low - group.head_at) as i16,
                bytes: (group.high - group.low) as u16,
                write: group.write,
            };
            self.slots[group.number] = Some((slot, group.head_at));
        }
        for Member { group, op, at } in self.members.drain(..) {
            if let Some((slot, head_at)) = self.slots[group] {
                self.roles[op] = Role::Member { slot, at: (at - head_at) as i16 };
            }
        }
    }
}
