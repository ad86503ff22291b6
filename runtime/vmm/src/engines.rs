//! The engines there are.

use std::os::fd::OwnedFd;

use mvm_engine::kvm::KvmEngine;
use mvm_engine::{Engine, Error};

use crate::config::EmuConfig;

/// The emulation engine, as it is by default.
///
/// # Errors
/// The host refuses what it needs.
pub fn emulation() -> Result<Box<dyn Engine>, Error> {
    emulation_as(EmuConfig::default())
}

/// The emulation engine.
///
/// # Errors
/// The host refuses what it needs.
pub fn emulation_as(config: EmuConfig) -> Result<Box<dyn Engine>, Error> {
    let engine = mvm_emu::EmuEngine::new()?.with_tier(config.tier.into());
    Ok(Box::new(engine.with_tsc_khz(config.tsc_khz)))
}

/// Hardware virtualization behind `device`, the open device of KVM.
///
/// # Errors
/// What stands behind it cannot be used.
pub fn kvm(device: OwnedFd) -> Result<Box<dyn Engine>, Error> {
    Ok(Box::new(KvmEngine::from_device(device)?))
}
