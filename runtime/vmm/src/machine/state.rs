//! A machine's state: taken while it stands still, and given to another machine, of the same engine or the other.

use std::sync::{Arc, Weak};

use mvm_devices::fw_cfg::FwCfgState;
use mvm_devices::virtio::MmioState;
use mvm_devices::{IoApicState, SerialState};
use mvm_engine::tsc::host_tsc;
use mvm_engine::{Engine, Vcpu, VcpuState};
use mvm_memory::GuestRam;
use serde::{Deserialize, Serialize};

use super::{Error, Frame, Machine, Parts};
use crate::devices::OldPcState;
use crate::events::Events;
use crate::layout;
use crate::vcpu_thread::Control;

/// Everything that a guest can notice of its machine but RAM, the content of disks, and what [`Parts`] say.
///
/// Left out is what no guest can depend on: the last POST code and the bits of the PC's system control ports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// By index. Their clocks are those of one moment.
    pub vcpus: Vec<VcpuState>,
    /// The I/O APIC.
    pub ioapic: IoApicState,
    /// The serial port.
    pub serial: SerialState,
    /// Virtio devices, in the order of their register windows.
    pub virtio: Vec<MmioState>,
    /// The firmware configuration device, where there is one. What it tells follows from [`Parts`].
    #[serde(default)]
    pub fw_cfg: Option<FwCfgState>,
    /// What old PCs have, where it is there.
    #[serde(default)]
    pub old_pc: Option<OldPcState>,
}

impl MachineState {
    /// Whether a machine on another host or of another engine can go on from it: not after `--cpu host`.
    pub fn is_portable(&self) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.model.is_portable())
    }
}

/// Has a machine stand still, from wherever that is noticed to be wanted: a console's writer, for instance.
#[derive(Debug, Clone)]
pub struct Pauser(Weak<Control>);

impl Pauser {
    /// Asks all vCPUs to stop before their next instruction, and does not wait: on a vCPU's own thread (in a device
    /// that it accesses) that is the instruction after the access. [`Machine::pause`] waits, and stops the devices.
    pub fn ask(&self) {
        if let Some(control) = self.0.upgrade() {
            control.ask_pause();
        }
    }
}

impl Machine {
    /// A handle that asks for a pause.
    pub fn pauser(&self) -> Pauser {
        Pauser(Arc::downgrade(&self.control))
    }

    /// Guest RAM: with [`Machine::save`] all that it takes to go on elsewhere.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The state of a machine that stands still ([`Machine::pause`]). Guest RAM is as it is; the machine may go on
    /// afterwards.
    ///
    /// # Errors
    /// [`Error::NotPaused`], or the engine cannot tell.
    pub fn save(&self) -> Result<MachineState, Error> {
        if !self.control.stands_still() {
            return Err(Error::NotPaused);
        }
        // Somebody may let it go on at this moment.
        let states = self.threads.with_vcpus(|vcpu| vcpu.state()).ok_or(Error::NotPaused)?;
        let mut vcpus = states.into_iter().collect::<mvm_engine::Result<Vec<_>>>()?;
        let now = host_tsc();
        for vcpu in vcpus.iter_mut().filter(|vcpu| vcpu.clock.host_tsc != 0) {
            vcpu.clock = vcpu.clock.at(now);
        }
        Ok(MachineState {
            vcpus,
            ioapic: self.devices.ioapic.state(),
            serial: self.devices.serial.state(),
            virtio: self.devices.virtio.transports().map(|v| v.save()).collect(),
            fw_cfg: self.devices.fw_cfg.as_ref().map(|device| device.state()),
            old_pc: self.devices.old_pc.as_ref().map(|old| old.state()),
        })
    }

    /// Makes a machine that goes on from `state` over `ram`, which no other machine may use any more. `parts` are
    /// those that the machine of the state was made from; the kernel only tells what kind of machine it was, and
    /// the processor is the state's. Its clocks have stood still in between.
    ///
    /// # Errors
    /// [`Error::State`]: the state is of another kind of machine; or the engine cannot take it over, with the
    /// features that it lacks named.
    pub fn restore(
        engine: &dyn Engine,
        parts: Parts,
        ram: GuestRam,
        state: &MachineState,
    ) -> Result<(Self, Events), Error> {
        check(&parts, &ram, state)?;
        let Some(first) = state.vcpus.first() else { return Err(no_vcpus()) };
        let built = Frame::build(engine, parts, first.model, Some(ram));
        let (frame, cargo) = built.map_err(|e| match e {
            Error::Engine(mvm_engine::Error::Model { engine, .. }) if !state.is_portable() => {
                Error::State(format!(
                    "it was taken with --cpu host and can go on with the kvm engine only, not with {engine}"
                ))
            }
            e => e,
        })?;
        let devices = &frame.devices;
        let transports: Vec<_> = devices.virtio.transports().cloned().collect();
        if transports.len() != state.virtio.len() {
            let (theirs, ours) = (state.virtio.len(), transports.len());
            return Err(Error::State(format!(
                "it has {theirs} virtio devices, these parts {ours}"
            )));
        }
        // First where interrupts go, then what the vCPUs have of them, and at the end the devices, which interrupt.
        devices.ioapic.restore(&state.ioapic);
        let old_pc = devices.old_pc.as_ref().zip(state.old_pc.as_ref());
        if let Some((old, state)) = old_pc {
            old.restore_controllers(state);
        }
        let mut vcpus = frame.create_vcpus()?;
        let now = host_tsc();
        for (vcpu, state) in vcpus.iter_mut().zip(&state.vcpus) {
            take_over(&mut **vcpu, state, now)?;
        }
        devices.serial.restore(&state.serial);
        for (index, (transport, state)) in transports.iter().zip(&state.virtio).enumerate() {
            transport.restore(state).map_err(|e| {
                Error::State(format!("virtio device {index} ({}): {e}", transport.device().name()))
            })?;
        }
        // What it had plugged is there again.
        frame.vm.ram_grew()?;
        if let (Some(device), Some(state)) = (&devices.fw_cfg, &state.fw_cfg) {
            device.restore(state);
        }
        if let Some((old, state)) = old_pc {
            old.restore_clocks(state);
        }
        let boot = frame.tell_again(cargo)?;
        frame.finish(vcpus, boot)
    }
}

/// Gives `vcpu` a state whose clocks go on at `now`.
fn take_over(vcpu: &mut dyn Vcpu, state: &VcpuState, now: u64) -> mvm_engine::Result<()> {
    let clock = state.clock.restarted(now);
    vcpu.set_state(&VcpuState { clock, ..state.clone() })
}

fn no_vcpus() -> Error {
    Error::State("it has no vCPUs".into())
}

fn check(parts: &Parts, ram: &GuestRam, state: &MachineState) -> Result<(), Error> {
    let (theirs, ours) = (state.vcpus.len(), parts.vcpus as usize);
    if theirs != ours {
        return Err(Error::State(format!("it has {theirs} vCPUs, these parts {ours}")));
    }
    let ranges: Vec<_> = ram.boot_regions().map(|r| (r.start, r.size)).collect();
    let growth = ram.growing_region().map(|r| (r.start, r.size));
    if ranges != layout::ram_ranges(parts.memory)
        || growth != layout::growth(parts.memory, parts.memory_max)
    {
        let (theirs, ours) = (ram.size(), parts.memory);
        return Err(Error::State(format!("its RAM has {theirs} bytes, these parts {ours}")));
    }
    Ok(())
}
