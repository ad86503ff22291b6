//! Boot protocols: from a kernel file to a machine that is ready to run its first instruction.
//!
//! [`Kernel::open`] recognises the file, [`Kernel::place`] fills guest memory, and [`Entry`] sets
//! the boot processor's registers. A protocol is a [`BootImage`]; what holds for all of them (is
//! there room, where does the initramfs go, what stands on the command line) is done here.
//!
//! Docs: `docs/boot.md`.

mod acpi;
mod area;
mod cmdline;
mod cpu;
mod elf;
mod error;
mod fw_cfg;
mod hvt;
mod linux;
mod memory_map;
mod modules;
mod mptable;
mod multiboot;
mod pvh;
mod recognise;
mod reset;
mod section;

use std::ffi::CStr;
use std::fmt;

use mvm_devices::fw_cfg::FwCfg;
use mvm_memory::{GuestRam, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

pub use cmdline::Parts as CmdlineParts;
pub use cpu::{Entry, connect_pic};
pub use error::Error;
pub use hvt::{Attached, Kind as ManifestKind, Manifest, ManifestEntry};
pub use modules::Module;
pub use section::Section;

use crate::config::{BootProtocol, CmdlineStyle};
use crate::layout;
use modules::Loaded;

/// A kernel file in the terms of one protocol, checked as far as that goes without guest memory.
trait BootImage: fmt::Debug + Send {
    /// Which; never [`BootProtocol::Auto`].
    fn protocol(&self) -> BootProtocol;

    /// What suits its command line; never [`CmdlineStyle::Auto`].
    fn cmdline_style(&self) -> CmdlineStyle {
        CmdlineStyle::Bare
    }

    /// First address that is free when the kernel has been loaded and has unpacked itself.
    fn end(&self) -> u64;

    /// Bytes that it cannot start without, beyond its image and `modules` bytes of modules.
    fn working_memory(&self, _modules: u64) -> u64 {
        0
    }

    /// Where the protocol wants the initramfs, or the modules.
    fn module_place(&self) -> ModulePlace;

    /// Whether there may be several of them.
    fn takes_several_modules(&self) -> bool {
        false
    }

    /// The devices that it demands, if it has hypercalls in place of a PC's devices.
    fn manifest(&self) -> Option<&Manifest> {
        None
    }

    /// Fills guest memory with everything but the initramfs, and says how to begin.
    ///
    /// # Errors
    /// [`Error`]: something does not fit, or the file cannot be read.
    fn place(&self, file: &mut Section, placing: &Placing<'_>) -> Result<Entry, Error>;
}

/// Where an initramfs goes, or the first module, which the others follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ModulePlace {
    /// As high as possible below the device hole, out of the kernel's way.
    High,
    /// On the page after the kernel, as the common multiboot loaders do: some kernels take what
    /// follows the last module for their own.
    AfterKernel,
    /// There is none.
    Nowhere,
}

/// What a kernel is told of its machine.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// Guest memory, zero so far.
    pub ram: &'a GuestRam,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Frequency of the time-stamp counter in kHz.
    pub tsc_khz: u64,
    /// What was attached to the entries of its manifest.
    pub attached: &'a [Attached],
    /// Whether there are the interrupt controllers and the timer of old PCs.
    pub pic: bool,
    /// Whether the kernel tells its exit code by a port, if nothing else switches its machine off.
    pub exit_status: bool,
    /// The device by which kernels made for PC emulators ask for some of it, if there is one.
    pub fw_cfg: Option<&'a FwCfg>,
}

/// What a [`BootImage`] is placed with.
struct Placing<'a> {
    ram: &'a GuestRam,
    cmdline: &'a CStr,
    /// The modules, or the initramfs alone.
    modules: &'a [Loaded<'a>],
    /// Address of ACPI's root pointer, if there are such tables.
    rsdp: Option<u64>,
    /// Frequency of the time-stamp counter in kHz.
    tsc_khz: u64,
    /// What was attached to the entries of its manifest.
    attached: &'a [Attached],
}

impl Placing<'_> {
    /// Writes a boot structure.
    fn write(&self, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), Error> {
        self.ram
            .memory()
            .write_slice(bytes, GuestAddress(at))
            .map_err(|_| Error::Structure { what, at })
    }
}

/// A kernel file that was recognised.
#[derive(Debug)]
pub struct Kernel {
    file: Section,
    image: Box<dyn BootImage>,
}

impl Kernel {
    /// Recognises a kernel file; `wanted` says by which protocol it must be one.
    ///
    /// # Errors
    /// It is none, or none of ours, or not one for `wanted`.
    pub fn open(file: Section, wanted: BootProtocol) -> Result<Self, Error> {
        let image = recognise::recognise(&file, wanted)?;
        Ok(Self { file, image })
    }

    /// How it is entered; never [`BootProtocol::Auto`].
    pub fn protocol(&self) -> BootProtocol {
        self.image.protocol()
    }

    /// What its command line holds, if `wanted` leaves the choice to the kernel.
    pub fn cmdline_style(&self, wanted: CmdlineStyle) -> CmdlineStyle {
        match wanted {
            CmdlineStyle::Auto => self.image.cmdline_style(),
            chosen => chosen,
        }
    }

    /// The devices that the kernel demands, if it has hypercalls in place of a PC's devices.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.image.manifest()
    }

    /// Fills guest memory: kernel, initramfs or modules, command line and everything the kernel is
    /// told.
    ///
    /// # Errors
    /// [`Error`]: it does not fit, or a file cannot be read.
    pub fn place(
        mut self,
        facts: &Facts<'_>,
        modules: impl IntoIterator<Item = Module>,
        cmdline: &CmdlineParts<'_>,
    ) -> Result<Entry, Error> {
        let Facts { ram, tsc_khz, attached, fw_cfg, .. } = *facts;
        // An empty file is as good as none.
        let modules: Vec<Module> = modules.into_iter().filter(|m| m.content.size() > 0).collect();
        let at = self.plan(ram, &modules)?;
        let rsdp = match self.manifest() {
            // Nor is there room for a PC's tables in what it can see.
            Some(_) => None,
            None => write_tables(facts, cmdline)?,
        };
        let cmdline = cmdline::build(cmdline)?;
        let loaded = modules::layout(&modules, at);
        let placing = Placing { ram, cmdline: &cmdline, modules: &loaded, rsdp, tsc_khz, attached };
        let entry = self.image.place(&mut self.file, &placing)?;
        if let Some(device) = fw_cfg {
            tell(device, facts, rsdp.is_some(), &cmdline, &modules, &loaded)?;
        }
        modules::load(modules, at, ram)?;
        Ok(entry)
    }

    /// Tells a kernel made for PC emulators of its machine, as [`Kernel::place`] does, without touching guest memory: it
    /// goes on from a state in which it is there already.
    ///
    /// # Errors
    /// These are not the parts that were placed then.
    pub fn tell_again(
        &self,
        facts: &Facts<'_>,
        modules: impl IntoIterator<Item = Module>,
        cmdline: &CmdlineParts<'_>,
    ) -> Result<(), Error> {
        let Some(device) = facts.fw_cfg else { return Ok(()) };
        let modules: Vec<Module> = modules.into_iter().filter(|m| m.content.size() > 0).collect();
        let loaded = modules::layout(&modules, self.plan(facts.ram, &modules)?);
        let acpi = !cmdline.style.announces_devices();
        tell(device, facts, acpi, &cmdline::build(cmdline)?, &modules, &loaded)
    }

    /// Checks that everything fits and says where the initramfs or the first module goes.
    fn plan(&self, ram: &GuestRam, modules: &[Module]) -> Result<u64, Error> {
        const PAGE: u64 = PAGE_SIZE as u64;
        let (module_place, protocol) = (self.image.module_place(), self.protocol());
        if !modules.is_empty() && module_place == ModulePlace::Nowhere {
            return Err(Error::NoInitramfs { protocol });
        }
        if modules.len() > 1 && !self.image.takes_several_modules() {
            return Err(Error::OneInitramfs { protocol, count: modules.len() });
        }
        let len = modules::total(modules).unwrap_or(u64::MAX);
        let after = self.image.end().checked_next_multiple_of(PAGE);
        let need = after
            .and_then(|end| end.checked_add(len))
            .and_then(|end| end.checked_add(self.image.working_memory(len)))
            .and_then(|end| end.checked_next_multiple_of(1 << 20))
            .unwrap_or(u64::MAX);
        if need > layout::LOW_MEMORY_END {
            return Err(Error::TooLarge { need });
        }
        let have = ram.size();
        if have < need {
            return Err(Error::NotEnoughMemory { have, need });
        }
        Ok(match module_place {
            // Whole pages, all of them below the end that was checked.
            ModulePlace::High => (memory_map::low_end(ram) & !(PAGE - 1)) - len,
            ModulePlace::AfterKernel | ModulePlace::Nowhere => after.unwrap_or(need),
        })
    }
}

/// Fills the firmware configuration device.
fn tell(
    device: &FwCfg,
    facts: &Facts<'_>,
    acpi: bool,
    cmdline: &CStr,
    modules: &[Module],
    loaded: &[Loaded<'_>],
) -> Result<(), Error> {
    let initrd = match (loaded.first(), modules.first()) {
        (Some(place), Some(module)) => {
            let content = module.content.try_clone();
            Some((*place, content.map_err(Error::reading("the initramfs"))?))
        }
        _ => None,
    };
    fw_cfg::tell(device, facts, acpi, cmdline, initrd);
    Ok(())
}

/// Writes what a kernel looks for without being told: MP table, reset code and, unless it is our guests' Linux, ACPI
/// tables, whose root pointer's address is returned for those who are to be told of it. Devices that its command line tells
/// of are not in them, nor is such a kernel told: it finds them where it looks, if it does, and its memory map stays as it is
/// without any (Nanos takes whatever the map has for its page tables, up to 1 MiB).
fn write_tables(facts: &Facts<'_>, cmdline: &CmdlineParts<'_>) -> Result<Option<u64>, Error> {
    let Facts { ram, vcpus, pic, exit_status, .. } = *facts;
    mptable::write(ram.memory(), vcpus, pic)?;
    reset::write(ram.memory())?;
    if !cmdline.style.has_acpi() {
        return Ok(None);
    }
    let announced = cmdline.style.announces_devices();
    let virtio_devices = if announced { 0 } else { cmdline.virtio_devices };
    // By other means such kernels tell their exit code, and Nanos wherever it finds no `\_S5` (its `src/drivers/acpi.c`).
    let soft_off = !announced && !exit_status;
    let platform = acpi::Platform { vcpus, virtio_devices, pic, soft_off };
    let rsdp = acpi::write(ram.memory(), platform)?;
    Ok((!announced).then_some(rsdp))
}

#[cfg(test)]
mod tests;
