//! Guest RAM as memory slots, and KVM's log of what guests write there.

use std::sync::{Mutex, PoisonError};

use kvm_ioctls::VmFd;
use mvm_memory::GuestRam;

use super::sys;
use crate::{Error, Result};

/// The slots of a machine: one for each region of its RAM, by index.
#[derive(Debug)]
pub(super) struct Slots {
    ram: GuestRam,
    logging: Mutex<bool>,
}

impl Slots {
    /// Gives `vm` its RAM.
    pub fn new(vm: &VmFd, ram: GuestRam) -> Result<Self> {
        let slots = Self { ram, logging: Mutex::new(false) };
        slots.set(vm, false)?;
        Ok(slots)
    }

    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn set(&self, vm: &VmFd, log: bool) -> Result<()> {
        for (slot, region) in (0..).zip(self.ram.regions()) {
            sys::set_slot(vm, slot, region, log).map_err(|e| Error::Host {
                what: "give KVM the guest's memory",
                source: e.into(),
            })?;
        }
        Ok(())
    }

    /// Starts or stops logging. When it stops, what was written until then is in the tracker.
    pub fn log(&self, vm: &VmFd, on: bool) -> Result<()> {
        let mut logging = self.logging.lock().unwrap_or_else(PoisonError::into_inner);
        if *logging == on {
            return Ok(());
        }
        if on {
            self.set(vm, true)?;
        } else {
            self.fetch(vm)?;
            self.set(vm, false)?;
        }
        *logging = on;
        Ok(())
    }

    /// Adds what vCPUs have written since the last time to the RAM's tracker.
    pub fn collect(&self, vm: &VmFd) -> Result<()> {
        let logging = self.logging.lock().unwrap_or_else(PoisonError::into_inner);
        if *logging { self.fetch(vm) } else { Ok(()) }
    }

    fn fetch(&self, vm: &VmFd) -> Result<()> {
        for (slot, region) in (0..).zip(self.ram.regions()) {
            let log = vm.get_dirty_log(slot, region.size as usize).map_err(|e| Error::Host {
                what: "read KVM's log of written pages",
                source: e.into(),
            })?;
            for (index, word) in log.into_iter().enumerate() {
                let mut left = word;
                while left != 0 {
                    region.tracker.set_dirty(index * 64 + left.trailing_zeros() as usize);
                    left &= left - 1;
                }
            }
        }
        Ok(())
    }
}
