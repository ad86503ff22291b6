//! A machine of the kvm engine.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_SPLIT_IRQCHIP, KVM_X86_QUIRK_LINT0_REENABLED, kvm_enable_cap,
    kvm_msi,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::counters::Exits;
use super::halt::Rendezvous;
use super::irq::{Doorbells, Routes};
use super::kick::Reach;
use super::memory::Slots;
use super::state::{self, KnownMsrs};
use super::sys::{RunPage, XsaveSize};
use super::vcpu::KvmVcpu;
use crate::cpuid::{CpuModel, CpuidTable};
use crate::tsc::host_tsc_khz;
use crate::{CpuidEntry, EngineMetrics, Error, IoBus, MsiMessage, Result, Vcpu, Vm, VmConfig};

/// Three pages that VT-x without unrestricted guests needs for real mode (KVM_SET_TSS_ADDR), in the hole below
/// 4 GiB where neither RAM nor devices are.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page for the same purpose (KVM_SET_IDENTITY_MAP_ADDR).
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Times that making a machine is tried again after a signal.
const TRIES: u32 = 5;

/// What the vCPUs of one machine share.
#[derive(Debug)]
pub(super) struct Machine {
    pub fd: VmFd,
    pub slots: Slots,
    pub io: Arc<dyn IoBus>,
    pub model: CpuModel,
    pub tsc_khz: u64,
    pub xsave: XsaveSize,
    pub known: KnownMsrs,
    pub rendezvous: Arc<Rendezvous>,
    /// INTR of the first vCPU.
    pub intr: AtomicBool,
    reaches: Mutex<Vec<Option<Arc<Reach>>>>,
}

impl Machine {
    /// How to reach the vCPUs made so far, by index; empty until all are made.
    pub fn reaches(&self) -> Vec<Arc<Reach>> {
        lock(&self.reaches).iter().cloned().collect::<Option<_>>().unwrap_or_default()
    }
}

/// A vCPU's place.
#[derive(Debug)]
enum Place {
    Empty,
    /// Made already, for what only a vCPU can tell, and not given out yet.
    Fresh(Box<VcpuFd>),
    Taken,
}

/// A machine.
#[derive(Debug)]
pub(super) struct KvmVm {
    machine: Arc<Machine>,
    table: CpuidTable,
    exits: Vec<Arc<Exits>>,
    places: Mutex<Vec<Place>>,
    routes: Routes,
    doorbells: Doorbells,
    messages: AtomicU64,
}

impl KvmVm {
    pub fn new(kvm: &Kvm, config: VmConfig) -> Result<Self> {
        let VmConfig { vcpus, cpu, ram, io } = config;
        let fd = create(kvm)?;
        set_up(&fd)?;
        let slots = Slots::new(&fd, ram)?;
        let first = fd.create_vcpu(0).map_err(failed("make a vCPU"))?;
        let tsc_khz = first.get_tsc_khz().ok().filter(|&khz| khz != 0);
        let tsc_khz = tsc_khz.map_or_else(host_tsc_khz, u64::from);
        let table = CpuidTable::new(cpu, vcpus, tsc_khz, Some(&state::supported(kvm)?));
        let known = KnownMsrs::learn(kvm, &first)?;
        let machine = Machine {
            xsave: XsaveSize::of(&fd),
            fd,
            slots,
            io,
            model: cpu,
            tsc_khz,
            known,
            rendezvous: Arc::new(Rendezvous::new(vcpus)),
            intr: AtomicBool::new(false),
            reaches: Mutex::new(vec![None; vcpus as usize]),
        };
        let mut places: Vec<Place> = (0..vcpus).map(|_| Place::Empty).collect();
        places[0] = Place::Fresh(Box::new(first));
        Ok(Self {
            machine: Arc::new(machine),
            table,
            exits: (0..vcpus).map(|_| Arc::default()).collect(),
            places: Mutex::new(places),
            routes: Routes::default(),
            doorbells: Doorbells::default(),
            messages: AtomicU64::new(0),
        })
    }

    fn take(&self, index: u32) -> Result<VcpuFd> {
        let mut places = lock(&self.places);
        let max = places.len() as u32;
        let Some(place) = places.get_mut(index as usize) else {
            return Err(Error::TooManyVcpus { wanted: index.saturating_add(1), max });
        };
        match std::mem::replace(place, Place::Taken) {
            Place::Taken => {
                Err(Error::BadState { vcpu: index, reason: "it exists already".into() })
            }
            Place::Fresh(vcpu) => Ok(*vcpu),
            Place::Empty => {
                let made = self.machine.fd.create_vcpu(index.into());
                if made.is_err() {
                    *place = Place::Empty;
                }
                made.map_err(failed("make a vCPU"))
            }
        }
    }
}

/// An error of KVM while `what` was done.
pub(super) fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::Host { what, source: e.into() }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn create(kvm: &Kvm) -> Result<VmFd> {
    let mut tries = 0;
    loop {
        match kvm.create_vm() {
            // A signal came while the kernel waited for all processors.
            Err(e) if e.errno() == libc::EINTR && tries < TRIES => tries += 1,
            made => return made.map_err(failed("make a virtual machine")),
        }
    }
}

/// What must be done before there are vCPUs.
fn set_up(fd: &VmFd) -> Result<()> {
    fd.set_tss_address(TSS_ADDRESS).map_err(failed("place the task state"))?;
    fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(failed("place the identity map"))?;
    // Local APICs in the kernel, and routes for as many interrupts as our I/O APIC has pins.
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args[0] = super::irq::PINS.into();
    fd.enable_cap(&split).map_err(failed("make local APICs"))?;
    let quirks = fd.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
    if quirks & KVM_X86_QUIRK_LINT0_REENABLED as i32 != 0 {
        // Whoever boots a guest that has the old controllers connects LINT0, as firmware does.
        let mut cap = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, ..Default::default() };
        cap.args[0] = KVM_X86_QUIRK_LINT0_REENABLED.into();
        fd.enable_cap(&cap).map_err(failed("disconnect LINT0"))?;
    }
    Ok(())
}

impl Vm for KvmVm {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        let fd = self.take(index)?;
        let page = RunPage::new(&fd)
            .map_err(|source| Error::Host { what: "share a page with KVM", source })?;
        let reach = Arc::new(Reach::new(page));
        let cpuid = self.table.entries(index).to_vec();
        let exits = self.exits[index as usize].clone();
        let vcpu = KvmVcpu::new(fd, index, self.machine.clone(), reach.clone(), exits, cpuid)?;
        lock(&self.machine.reaches)[index as usize] = Some(reach);
        Ok(Box::new(vcpu))
    }

    fn signal_msi(&self, message: MsiMessage) {
        self.messages.fetch_add(1, Ordering::Relaxed);
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..kvm_msi::default()
        };
        // Nobody there to take it is the guest's affair, as on a bus.
        if let Err(e) = self.machine.fd.signal_msi(msi) {
            tracing::debug!("an interrupt message goes nowhere: {message:?}: {e}");
        }
    }

    fn set_intr(&self, asserted: bool) {
        self.machine.intr.store(asserted, Ordering::SeqCst);
        if asserted && let Some(Some(first)) = lock(&self.machine.reaches).first() {
            first.interrupt();
        }
    }

    fn route(&self, gsi: u32, message: Option<MsiMessage>) -> Result<()> {
        self.routes.set(&self.machine.fd, gsi, message)
    }

    fn attach_interrupt(&self, gsi: u32, fd: &EventFd) -> Result<bool> {
        self.routes.attach(&self.machine.fd, gsi, fd).map(|()| true)
    }

    fn attach_doorbell(&self, gpa: u64, value: u32, fd: &EventFd) -> Result<bool> {
        self.doorbells.attach(&self.machine.fd, gpa, value, fd).map(|()| true)
    }

    fn ram_grew(&self) -> Result<()> {
        self.machine.slots.grow(&self.machine.fd)
    }

    fn log_writes(&self, on: bool) -> Result<()> {
        self.machine.slots.log(&self.machine.fd, on)
    }

    fn collect_writes(&self) -> Result<()> {
        self.machine.slots.collect(&self.machine.fd)
    }

    fn cpuid(&self, index: u32) -> Vec<CpuidEntry> {
        self.table.entries(index).to_vec()
    }

    fn tsc_khz(&self) -> u64 {
        self.machine.tsc_khz
    }

    fn metrics(&self) -> EngineMetrics {
        let mut rows = Vec::new();
        for (index, exits) in self.exits.iter().enumerate() {
            rows.push((format!("vcpu{index}.exits"), exits.by_guest()));
            rows.extend(exits.rows().map(|(name, n)| (format!("vcpu{index}.{name}"), n)));
        }
        rows.push(("msi-messages".into(), self.messages.load(Ordering::Relaxed)));
        rows.push(("route-changes".into(), self.routes.changes()));
        rows.push(("irqfds".into(), self.routes.attached()));
        rows.push(("ioeventfds".into(), self.doorbells.attached()));
        EngineMetrics(rows)
    }
}
