//! The system registers of one vCPU, and its states after power-up, INIT and SIPI.

use std::sync::Arc;

use mvm_engine::cpuid::Vendor;
use mvm_engine::{CpuidEntry, MpState, Table};

use super::attention::Attention;
use super::bits::{cr0, dr, xcr0};
use super::descriptor::access;
use super::paravirt::Paravirt;
use super::platform::Platform;
use crate::apic::Lapic;
use crate::cpu::{Cpu, SegmentReg, seg};
use crate::fault::Fault;
use crate::flags::rflags;
use crate::op::reg;

/// IA32_PAT after reset.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// MSRs that are nothing but storage for other parts of the processor.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub pat: u64,
    pub misc_enable: u64,
    /// IA32_BIOS_SIGN_ID: what the guest wrote.
    pub bios_sign: u64,
}

/// Control registers, tables, MSRs, local APIC, events.
#[derive(Debug)]
pub struct SystemState {
    /// Index of the vCPU, which is its APIC id.
    pub index: u32,
    /// What the vCPUs share.
    pub platform: Arc<Platform>,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3, without the no-flush bit.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// Local descriptor table.
    pub ldtr: SegmentReg,
    /// Task register.
    pub tr: SegmentReg,
    /// Global descriptor table.
    pub gdtr: Table,
    /// Interrupt descriptor table.
    pub idtr: Table,
    /// MSRs.
    pub msrs: Msrs,
    /// Local APIC.
    pub lapic: Lapic,
    /// What the guest asked of its hypervisor.
    pub pv: Paravirt,
    /// Guest TSC minus host TSC.
    pub tsc_offset: u64,
    /// Running, halted, or waiting for a start-up IPI.
    pub activity: MpState,
    /// Halted with interrupts off or waiting for a start-up IPI, and counted as such in the platform.
    pub(crate) counted_stopped: bool,
    /// NMIs that wait: one, or two if none is being handled.
    pub nmis_pending: u8,
    /// An interrupt that is to be delivered before anything else: its controller was acknowledged elsewhere.
    pub external: Option<u8>,
    /// NMIs wait for an IRET.
    pub nmi_masked: bool,
    /// The op that just ran takes no single-step trap (MOV SS, INT n, SYSCALL).
    pub step_inhibited: bool,
    /// The op that just ran loaded SS, which holds debug exceptions off until after the next one.
    pub ss_loaded: bool,
    /// An exception that comes before the next instruction: of a task that was just switched to, or one whose delivery has
    /// not come to its end yet.
    pub deferred: Option<Fault>,
    /// Debug exceptions that wait, of the op that is running or held off: bits of DR6.
    pub hits: u64,
    /// The CPUID of this vCPU.
    pub cpuid: Arc<[CpuidEntry]>,
    /// Whose details apply where the vendors differ.
    pub vendor: Vendor,
    /// PAUSE instructions run.
    pub(crate) pauses: u32,
    /// Log lines left for odd things that the guest does.
    pub(crate) log_budget: u32,
}

impl SystemState {
    /// The state of vCPU `index` after power-up.
    pub fn new(platform: Arc<Platform>, index: u32) -> Self {
        let lapic = Lapic::new(platform.clone(), index);
        let cpuid = platform.model.entries(index).into();
        let vendor = platform.model.vendor();
        // The guest's TSC starts with the machine's clock.
        let tsc_offset = 0u64.wrapping_sub(platform.clock.origin().tsc);
        Self {
            index,
            platform,
            cr0: cr0::ET | cr0::CD | cr0::NW,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: xcr0::X87,
            dr: [0; 4],
            dr6: dr::DR6_FIXED,
            dr7: dr::DR7_FIXED,
            ldtr: system_segment(),
            tr: system_segment(),
            gdtr: Table { base: 0, limit: 0xffff },
            idtr: Table { base: 0, limit: 0xffff },
            msrs: Msrs { pat: PAT_RESET, misc_enable: 1, ..Msrs::default() },
            lapic,
            pv: Paravirt::default(),
            tsc_offset,
            activity: if index == 0 { MpState::Running } else { MpState::WaitForSipi },
            counted_stopped: false,
            nmis_pending: 0,
            external: None,
            nmi_masked: false,
            step_inhibited: false,
            ss_loaded: false,
            deferred: None,
            hits: 0,
            cpuid,
            vendor,
            pauses: 0,
            log_budget: 200,
        }
    }

    /// How other threads reach this vCPU.
    #[inline(always)]
    pub fn attention(&self) -> &Attention {
        &self.lapic.port().attention
    }

    /// Is paging on?
    #[inline]
    pub fn paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }

    /// Is IA-32e mode active?
    #[inline]
    pub fn long_mode(&self) -> bool {
        self.efer & super::bits::efer::LMA != 0
    }

    /// Is protection on?
    #[inline]
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// The guest's time-stamp counter.
    #[inline]
    pub fn tsc(&self) -> u64 {
        super::clock::host_tsc().wrapping_add(self.tsc_offset)
    }

    /// Moves the guest's TSC to `value`.
    pub fn set_tsc(&mut self, value: u64) {
        let offset = value.wrapping_sub(super::clock::host_tsc());
        self.move_tsc(offset);
    }

    /// Changes the distance of guest and host TSC.
    pub(crate) fn move_tsc(&mut self, offset: u64) {
        self.tsc_offset = offset;
        self.lapic.retime(offset);
    }

    /// Whether another log line about the guest's doings may be written.
    pub(crate) fn may_log(&mut self) -> bool {
        if self.log_budget == 0 {
            return false;
        }
        self.log_budget -= 1;
        if self.log_budget == 0 {
            tracing::warn!(vcpu = self.index, "no more log lines about this vCPU");
        }
        true
    }
}

/// LDTR and TR after reset (SDM vol. 3, table 10-1).
fn system_segment() -> SegmentReg {
    SegmentReg { selector: 0, access: 0x82, base: 0, limit: 0xffff }
}

impl Cpu {
    /// The state after power-up (SDM vol. 3, table 10-1).
    pub fn power_up(&mut self) {
        let (platform, index) = (self.sys.platform.clone(), self.sys.index);
        self.sys = SystemState::new(platform, index);
        self.reset_registers();
    }

    /// INIT: like power-up, but the vector state, most MSRs and the APIC's base survive.
    pub(crate) fn init(&mut self) {
        let sys = &mut self.sys;
        // CD and NW survive INIT.
        sys.cr0 = cr0::ET | sys.cr0 & (cr0::CD | cr0::NW);
        sys.cr2 = 0;
        sys.cr3 = 0;
        sys.cr4 = 0;
        sys.efer = 0;
        sys.dr = [0; 4];
        sys.dr6 = dr::DR6_FIXED;
        sys.dr7 = dr::DR7_FIXED;
        sys.ldtr = system_segment();
        sys.tr = system_segment();
        sys.gdtr = Table { base: 0, limit: 0xffff };
        sys.idtr = Table { base: 0, limit: 0xffff };
        sys.lapic.init();
        sys.nmis_pending = 0;
        sys.external = None;
        sys.nmi_masked = false;
        sys.step_inhibited = false;
        sys.ss_loaded = false;
        sys.deferred = None;
        sys.hits = 0;
        sys.activity = if sys.index == 0 { MpState::Running } else { MpState::WaitForSipi };
        self.reset_registers();
    }

    fn reset_registers(&mut self) {
        self.gpr = [0; reg::COUNT];
        // The processor signature, as leaf 1 tells it.
        self.gpr[2] = self.sys.cpuid.iter().find(|e| e.leaf == 1).map_or(0, |e| e.eax.into());
        self.rip = 0xfff0;
        self.set_rflags(rflags::FIXED);
        self.shadow = false;
        self.fault = None;
        for index in 0..6 {
            self.seg[index] =
                SegmentReg { selector: 0, access: access::REAL_DATA, base: 0, limit: 0xffff };
        }
        self.seg[seg::FLAT] =
            SegmentReg { selector: 0, access: access::DATA, base: 0, limit: u32::MAX };
        self.seg[seg::CS] = SegmentReg {
            selector: 0xf000,
            access: access::REAL_CODE,
            base: 0xffff_0000,
            limit: 0xffff,
        };
        self.tlb_flush_all();
        self.update_mode();
    }

    /// A start-up IPI: real mode at page `vector`.
    pub(crate) fn start_up(&mut self, vector: u8) {
        let cs = &mut self.seg[seg::CS];
        cs.selector = u16::from(vector) << 8;
        cs.base = u64::from(vector) << 12;
        self.rip = 0;
        self.sys.activity = MpState::Running;
    }
}
