//! The choice of the engine: what the user wants, what the guest is, what the host can.
//!
//! [`look`] asks the host, and refuses what no guest could have; [`Outlook::decide`] chooses for a
//! kind of guest. The open device travels from one to the other and on to the monitor, which opens
//! nothing by path.
//!
//! Hardware virtualization is never replaced in silence: `auto` names a [`Selection::fallback`], a
//! wish for kvm that cannot be met is an [`Error`].

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use mvm_engine::probe::{self, Cache, Sources};
use mvm_engine::tsc::kept_tsc_khz;

use crate::layout::Layout;

pub use mvm_engine::probe::{Finding, Kind, Probe, Verdict};
pub use mvm_vmm::config::{EmuTier, EngineChoice};

/// What is inside the machine, as far as it matters to an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// A Linux kernel: it lives in ring 0, with every instruction there is.
    Linux,
    /// A unikernel: one that does its work in ring 3 is at home where ring 0 is interpreted.
    Unikernel,
}

/// What the user wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// The engine.
    pub choice: EngineChoice,
    /// How emulation works, if it comes to that.
    pub tier: EmuTier,
    /// Start on kvm whatever the probe says, as long as there is a device.
    pub force: bool,
    /// Who says that nothing but hardware virtualization will do, if anybody: a flag, or a line of a
    /// file. For the error.
    pub require_hardware: Option<String>,
}

/// Why there is no engine for the guest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// kvm was asked for and cannot be used.
    #[error("the kvm engine cannot run this here: {reason}; {remedy}, or take --engine emu")]
    NoKvm {
        /// What was found.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// kvm was asked for, and ring 0 would be interpreted.
    #[error(
        "the kvm engine cannot run Linux here: {reason}; take --engine emu (--force tries all the \
         same)"
    )]
    Interpreted {
        /// What was found.
        reason: String,
    },
    /// Hardware virtualization is a must, and there is none.
    #[error("{by} asks for hardware virtualization, which is not to be had: {reason}; {remedy}")]
    Required {
        /// Who asks.
        by: String,
        /// What was found.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// Two wishes that cannot both be met.
    #[error("{by} asks for hardware virtualization, and the emu engine has none; choose one")]
    Contradiction {
        /// Who asks for hardware.
        by: String,
    },
    /// Force without anything to be forced.
    #[error("--force goes with --engine kvm alone")]
    NothingToForce,
}

/// What the host offers for a wish.
#[derive(Debug)]
pub struct Outlook {
    wish: Wish,
    /// Not looked at where emu was asked for.
    host: Option<(Probe, Option<OwnedFd>)>,
    tsc_file: PathBuf,
}

/// An engine for a machine.
#[derive(Debug)]
pub struct Selection {
    /// What runs it.
    pub engine: Selected,
    /// How emulation works.
    pub tier: EmuTier,
    /// Frequency of the host's time-stamp counter in kHz, for the emulation engine.
    pub tsc_khz: Option<u64>,
    /// Why, if that was left to us: one sentence.
    pub reason: String,
    /// It stands in for hardware virtualization, which is to be announced.
    pub fallback: bool,
    /// What else the user should hear.
    pub notice: Option<String>,
}

/// What runs a machine.
#[derive(Debug)]
pub enum Selected {
    /// The emulation engine.
    Emu,
    /// Hardware virtualization, behind this open device.
    Kvm(OwnedFd),
}

impl Selected {
    /// Its name, as users know it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Emu => "emu",
            Self::Kvm(_) => "kvm",
        }
    }
}

/// What the host's KVM is, out of the cache of this boot where that knows.
pub fn probe_host(layout: &Layout) -> (Probe, Option<OwnedFd>) {
    probe::examine(&Sources::default(), Some(&Cache::new(layout.probe_file())))
}

/// The same, measured anew; the cache is replaced.
pub fn probe_host_anew(layout: &Layout) -> (Probe, Option<OwnedFd>) {
    probe::examine(&Sources::default(), Some(&Cache::renewed(layout.probe_file())))
}

/// Asks the host, and refuses a wish that it cannot fulfil for any guest. The host is not looked at
/// where that would not matter.
///
/// # Errors
/// [`Error`].
pub fn look(layout: &Layout, wish: Wish) -> Result<Outlook, Error> {
    check(&wish)?;
    let host = (wish.choice != EngineChoice::Emu).then(|| probe_host(layout));
    if let Some((probe, _)) = &host {
        // A unikernel may have what Linux may not.
        choose(&wish, Guest::Unikernel, probe)?;
    }
    Ok(Outlook { wish, host, tsc_file: layout.tsc_file() })
}

/// What [`Outlook::decide`] would choose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreseen {
    /// The engine's name.
    pub engine: &'static str,
    /// It would stand in for hardware virtualization.
    pub fallback: bool,
}

/// Chooses on a host that looks like `probe`, without anything coming of it.
///
/// # Errors
/// Those of [`look`] and [`Outlook::decide`].
pub fn foresee(wish: &Wish, guest: Guest, probe: &Probe) -> Result<Foreseen, Error> {
    check(wish)?;
    if wish.choice == EngineChoice::Emu {
        return Ok(Foreseen { engine: "emu", fallback: false });
    }
    Ok(match choose(wish, guest, probe)? {
        Decision::Kvm { .. } => Foreseen { engine: "kvm", fallback: false },
        Decision::Fallback => Foreseen { engine: "emu", fallback: true },
    })
}

fn check(wish: &Wish) -> Result<(), Error> {
    if wish.force && wish.choice != EngineChoice::Kvm {
        return Err(Error::NothingToForce);
    }
    match (&wish.require_hardware, wish.choice) {
        (Some(by), EngineChoice::Emu) => Err(Error::Contradiction { by: by.clone() }),
        _ => Ok(()),
    }
}

impl Outlook {
    /// Chooses the engine for a guest.
    ///
    /// # Errors
    /// [`Error`].
    pub fn decide(self, guest: Guest) -> Result<Selection, Error> {
        let tier = self.wish.tier;
        let emulation = |reason, fallback| Selection {
            engine: Selected::Emu,
            tier,
            tsc_khz: Some(kept_tsc_khz(&self.tsc_file)),
            reason,
            fallback,
            notice: None,
        };
        let Some((probe, device)) = self.host else {
            return Ok(emulation(String::new(), false));
        };
        let decision = choose(&self.wish, guest, &probe)?;
        let reason = match self.wish.choice {
            EngineChoice::Auto => probe.finding.text.clone(),
            _ => String::new(),
        };
        match (decision, device) {
            (Decision::Kvm { notice }, Some(device)) => {
                let engine = Selected::Kvm(device);
                Ok(Selection { engine, tier, tsc_khz: None, reason, fallback: false, notice })
            }
            (Decision::Fallback, _) => Ok(emulation(reason, true)),
            // The probe comes with the device that it tried.
            (Decision::Kvm { .. }, None) => Err(Error::NoKvm {
                reason: format!("{} is not open", probe.facts.device.path),
                remedy: probe.finding.remedy,
            }),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Kvm { notice: Option<String> },
    Fallback,
}

/// The choice itself. Never [`Decision::Fallback`] where kvm was asked for.
fn choose(wish: &Wish, guest: Guest, probe: &Probe) -> Result<Decision, Error> {
    let (reason, remedy) = (probe.finding.text.clone(), probe.finding.remedy.clone());
    let kvm = |notice| Ok(Decision::Kvm { notice });
    if probe.verdict == Verdict::Usable {
        return kvm(None);
    }
    if let Some(by) = wish.require_hardware.clone() {
        return Err(Error::Required { by, reason, remedy });
    }
    match (wish.choice, probe.verdict, guest) {
        (EngineChoice::Auto | EngineChoice::Emu, ..) => Ok(Decision::Fallback),
        (EngineChoice::Kvm, Verdict::Interpreted, Guest::Unikernel) => kvm(Some(format!(
            "{reason}: only a unikernel that works in ring 3 is fast here (see `mvm doctor`)"
        ))),
        (EngineChoice::Kvm, Verdict::Interpreted, Guest::Linux) if wish.force => {
            kvm(Some(format!("{reason}: the guest goes on as far as that lets it (--force)")))
        }
        (EngineChoice::Kvm, Verdict::Interpreted, Guest::Linux) => {
            Err(Error::Interpreted { reason })
        }
        // A trial machine that failed may fail for a reason that this guest does not have.
        (EngineChoice::Kvm, _, _) if wish.force && may_be_forced(probe) => {
            kvm(Some(format!("{reason}: tried all the same (--force)")))
        }
        (EngineChoice::Kvm, ..) => Err(Error::NoKvm { reason, remedy }),
    }
}

/// Whether there is a device on which something can be tried.
fn may_be_forced(probe: &Probe) -> bool {
    matches!(probe.finding.kind, Kind::TrialFailed | Kind::Overdue)
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
