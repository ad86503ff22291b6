//! Hardware task switches (SDM vol. 3, chapter 8). IA-32e mode has none.
//!
//! A switch has two parts. What goes wrong in the first one is a fault of the old task, and nothing but its TSS has changed;
//! what goes wrong in the second one is a fault of the new task, whose segments may not be loaded, and is noted for the loop
//! around the dispatcher to deliver.

use super::attention::reason;
use super::bits::{cr0, dr};
use super::descriptor::{Descriptor, access, system};
use super::segments::{gp, is_null, np, ss_fault, ts};
use super::stack::Stack;
use crate::cpu::{Cpu, SegmentReg, seg};
use crate::fault::Fault;
use crate::flags::rflags;

/// What switches the task (SDM vol. 3, table 8-2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// JMP: the old task ends.
    Jump,
    /// CALL, or an interrupt or exception: the old task waits for the new one's IRET.
    Nest,
    /// IRET with NT set: back to the task that waits.
    Return,
}

/// What the old task will go on with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Resume {
    pub rip: u64,
    pub flags: u64,
}

/// Where the fields of a TSS are (SDM vol. 3, figures 8-2 and 8-10).
#[derive(Debug)]
struct Layout {
    /// Bytes of each of the following fields.
    width: u8,
    cr3: Option<u32>,
    ip: u32,
    flags: u32,
    /// Eight general registers, as they are numbered.
    registers: u32,
    /// Segment selectors, as they are numbered.
    segments: u32,
    /// How many of them.
    segment_count: usize,
    ldt: u32,
    /// The word whose lowest bit asks for a debug exception.
    trap: Option<u32>,
    size: u32,
}

const TSS_32: Layout = Layout {
    width: 4,
    cr3: Some(28),
    ip: 32,
    flags: 36,
    registers: 40,
    segments: 72,
    segment_count: 6,
    ldt: 96,
    trap: Some(100),
    size: 104,
};

const TSS_16: Layout = Layout {
    width: 2,
    cr3: None,
    ip: 14,
    flags: 16,
    registers: 18,
    segments: 34,
    segment_count: 4,
    ldt: 42,
    trap: None,
    size: 44,
};

impl Layout {
    /// Of the TSS with these access rights.
    fn of(rights: u32) -> &'static Self {
        if rights & access::TYPE & !2 == system::TSS { &TSS_32 } else { &TSS_16 }
    }

    fn read(&self, cpu: &mut Cpu, base: u64, at: u32) -> Result<u32, Fault> {
        let address = base.wrapping_add(at.into()) & 0xffff_ffff;
        if self.width == 2 {
            Ok(cpu.read_sys::<u16>(address)?.into())
        } else {
            cpu.read_sys::<u32>(address)
        }
    }

    fn write(&self, cpu: &mut Cpu, base: u64, at: u32, value: u32) -> Result<(), Fault> {
        let address = base.wrapping_add(at.into()) & 0xffff_ffff;
        if self.width == 2 {
            cpu.write_sys::<u16>(address, value as u16)?;
        } else {
            cpu.write_sys::<u32>(address, value)?;
        }
        Ok(())
    }

    fn register(&self, index: usize) -> u32 {
        self.registers + index as u32 * u32::from(self.width)
    }

    fn segment(&self, index: usize) -> u32 {
        self.segments + index as u32 * u32::from(self.width)
    }
}

/// A task's registers, as its TSS has them.
#[derive(Debug)]
struct Image {
    cr3: Option<u32>,
    ip: u32,
    flags: u32,
    registers: [u32; 8],
    /// Null where a TSS of 16 bits has none.
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Image {
    fn read(cpu: &mut Cpu, layout: &Layout, base: u64) -> Result<Self, Fault> {
        let mut image = Self {
            cr3: layout.cr3.map(|at| layout.read(cpu, base, at)).transpose()?,
            ip: layout.read(cpu, base, layout.ip)?,
            flags: layout.read(cpu, base, layout.flags)?,
            registers: [0; 8],
            segments: [0; 6],
            ldt: layout.read(cpu, base, layout.ldt)? as u16,
            trap: layout.trap.map(|at| layout.read(cpu, base, at)).transpose()?.unwrap_or(0) & 1
                != 0,
        };
        for (index, register) in image.registers.iter_mut().enumerate() {
            *register = layout.read(cpu, base, layout.register(index))?;
        }
        for (index, selector) in image.segments[..layout.segment_count].iter_mut().enumerate() {
            *selector = layout.read(cpu, base, layout.segment(index))? as u16;
        }
        Ok(image)
    }
}

/// EFLAGS that a task can have.
const FLAGS: u64 = rflags::ARITH
    | rflags::TF
    | rflags::IF
    | rflags::DF
    | rflags::IOPL
    | rflags::NT
    | rflags::RF
    | rflags::VM
    | rflags::AC
    | rflags::VIF
    | rflags::VIP
    | rflags::ID;

/// DR7: the local enable bits, which a switch clears.
const DR7_LOCAL: u64 = 0x155;

const fn unloaded(selector: u16) -> SegmentReg {
    SegmentReg { selector, access: access::UNUSABLE, base: 0, limit: 0 }
}

impl Cpu {
    /// Goes to the task whose TSS `selector` picks; an exception's error code is pushed on its stack.
    ///
    /// # Errors
    /// #GP, #NP, #TS of the selector, and what accesses to the old and new TSS and the GDT raise: of the old task.
    pub(crate) fn switch_task(
        &mut self,
        selector: u16,
        way: Way,
        resume: Resume,
        code: Option<u32>,
    ) -> Result<(), Fault> {
        let wrong = if way == Way::Return { ts(selector) } else { gp(selector) };
        if selector & 4 != 0 || is_null(selector) {
            return Err(wrong);
        }
        let address = self.descriptor_address(selector).ok_or(wrong)?;
        let descriptor = Descriptor(self.read_sys::<u64>(address)?);
        let (kind, busy) = (descriptor.kind(), descriptor.0 & system::BUSY != 0);
        let is_tss = descriptor.is_system() && matches!(kind & !2, system::TSS | system::TSS16);
        if !is_tss || busy != (way == Way::Return) {
            return Err(wrong);
        }
        if !descriptor.present() {
            return Err(np(selector));
        }
        let layout = Layout::of(descriptor.access());
        if descriptor.limit() < layout.size - 1 {
            return Err(ts(selector));
        }
        let image = Image::read(self, layout, descriptor.base())?;
        self.save_task(way, resume)?;
        let old = self.sys.tr;
        if way == Way::Nest {
            self.write_sys::<u16>(descriptor.base(), old.selector)?;
        } else if let Some(address) = self.descriptor_address(old.selector) {
            let rights = self.read_sys::<u8>(address.wrapping_add(5))?;
            self.write_sys::<u8>(address.wrapping_add(5), rights & !((system::BUSY >> 40) as u8))?;
        }
        let busy = Descriptor(descriptor.0 | system::BUSY);
        self.write_sys::<u8>(address.wrapping_add(5), (busy.0 >> 40) as u8)?;
        // From here on it is the new task.
        self.sys.tr = busy.load(selector);
        self.enter_task(&image, way);
        if let Err(fault) = self.load_task(&image, layout.width, code) {
            self.sys.deferred = Some(fault);
            self.sys.attention().raise_self(reason::INTERRUPT);
        }
        if image.trap {
            self.sys.hits |= dr::DR6_BT;
            self.sys.attention().raise_self(reason::INTERRUPT);
        }
        Ok(())
    }

    /// Puts the registers into the current TSS.
    fn save_task(&mut self, way: Way, resume: Resume) -> Result<(), Fault> {
        let tr = self.sys.tr;
        let layout = Layout::of(tr.access);
        if tr.access & access::UNUSABLE != 0 || tr.limit < layout.ldt - 1 {
            return Err(ts(tr.selector));
        }
        let flags = if way == Way::Return { resume.flags & !rflags::NT } else { resume.flags };
        layout.write(self, tr.base, layout.ip, resume.rip as u32)?;
        layout.write(self, tr.base, layout.flags, flags as u32)?;
        for index in 0..8 {
            let value = self.gpr[index] as u32;
            layout.write(self, tr.base, layout.register(index), value)?;
        }
        for index in 0..layout.segment_count {
            // The upper half of its field is reserved.
            let at = tr.base.wrapping_add(layout.segment(index).into()) & 0xffff_ffff;
            let selector = self.seg[index].selector;
            self.write_sys::<u16>(at, selector)?;
        }
        Ok(())
    }

    /// Takes over all that cannot fault. Segments have their selectors, and are not loaded.
    fn enter_task(&mut self, image: &Image, way: Way) {
        self.sys.cr0 |= cr0::TS;
        self.sys.dr7 &= !DR7_LOCAL;
        if let Some(cr3) = image.cr3.filter(|_| self.sys.paging()) {
            self.sys.cr3 = cr3.into();
            self.tlb_flush_non_global();
        }
        let nested = if way == Way::Nest { rflags::NT } else { 0 };
        self.replace_flags(u64::from(image.flags) & FLAGS | nested);
        for (register, value) in self.gpr.iter_mut().zip(image.registers) {
            *register = value.into();
        }
        for (segment, selector) in self.seg.iter_mut().zip(image.segments) {
            *segment = unloaded(selector);
        }
        self.sys.ldtr = unloaded(image.ldt);
        self.rip = image.ip.into();
        self.cpl = image.segments[seg::CS] as u8 & 3;
        self.update_mode();
    }

    /// Loads the segments and pushes the error code.
    fn load_task(&mut self, image: &Image, width: u8, code: Option<u32>) -> Result<(), Fault> {
        if !is_null(image.ldt) {
            let ldt = self.task_descriptor(image.ldt)?;
            let is_ldt = ldt.is_system() && ldt.kind() == system::LDT && ldt.present();
            if image.ldt & 4 != 0 || !is_ldt {
                return Err(ts(image.ldt));
            }
            self.sys.ldtr = ldt.load(image.ldt);
        }
        if self.virtual_8086() {
            self.load_8086_segments(image.segments);
            self.update_mode();
            return if self.rip > 0xffff { Err(Fault::GP0) } else { Ok(()) };
        }
        let cpl = self.cpl;
        let selector = image.segments[seg::CS];
        let cs = self.task_descriptor(selector)?;
        let fits = if cs.conforming() { cs.dpl() <= cpl } else { cs.dpl() == cpl };
        if !cs.is_code() || !fits {
            return Err(ts(selector));
        }
        if !cs.present() {
            return Err(np(selector));
        }
        let cs = self.mark_accessed(selector, cs)?.load(selector);
        self.set_code_segment(cs, cpl);
        let selector = image.segments[seg::SS];
        let ss = self.task_descriptor(selector)?;
        if !ss.is_writable_data() || ss.dpl() != cpl || selector as u8 & 3 != cpl {
            return Err(ts(selector));
        }
        if !ss.present() {
            return Err(ss_fault(selector));
        }
        self.seg[seg::SS] = self.mark_accessed(selector, ss)?.load(selector);
        for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let selector = image.segments[register];
            if is_null(selector) {
                continue;
            }
            let data = self.task_descriptor(selector)?;
            let reachable = data.conforming() || data.dpl() >= cpl.max(selector as u8 & 3);
            if !data.is_readable() || !reachable {
                return Err(ts(selector));
            }
            if !data.present() {
                return Err(np(selector));
            }
            self.seg[register] = self.mark_accessed(selector, data)?.load(selector);
        }
        self.update_mode();
        if let Some(code) = code {
            let mut stack = Stack::of(self);
            stack.push(self, width, code.into())?;
            stack.commit(self);
        }
        if self.rip > cs.limit.into() { Err(Fault::GP0) } else { Ok(()) }
    }

    /// The descriptor of a segment of the new task.
    fn task_descriptor(&mut self, selector: u16) -> Result<Descriptor, Fault> {
        if is_null(selector) {
            return Err(ts(selector));
        }
        let address = self.descriptor_address(selector).ok_or(ts(selector))?;
        Ok(Descriptor(self.read_sys::<u64>(address)?))
    }
}
