//! Every feature bit that a guest can see on every engine, with the test of the emulation engine that
//! proves it there.
//!
//! A bit that is not in this table is zero.

/// A register of a CPUID answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// When a bit is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// Always: every 64-bit processor has it, or every engine does it by itself.
    Always,
    /// If the host has it: its instructions run on the host, or hardware virtualization needs it.
    WithHost,
    /// If the engine has it, which the emulation engine does by itself. It is worth that two engines do not show the same.
    WithEngine,
    /// If the host has it and its kernel saves AVX state.
    WithHostAvx,
    /// On AMD only.
    OnAmd,
    /// With more than one vCPU.
    WithSmp,
}

/// The least level of the System V ABI's x86-64 supplement at which a feature is shown. Features in
/// no level (cryptography, randomness, protection) are shown at all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// x86-64-v2.
    V2,
    /// x86-64-v3, and what comes with the registers of AVX.
    V3,
}

/// One feature bit.
#[derive(Debug, Clone, Copy)]
pub struct Feature {
    /// Name, as in `/proc/cpuinfo` of Linux where it has one there.
    pub name: &'static str,
    /// Leaf.
    pub leaf: u32,
    /// Subleaf.
    pub subleaf: u32,
    /// Register.
    pub reg: Reg,
    /// Bit.
    pub bit: u8,
    /// When it is shown.
    pub shown: Shown,
    /// At which level.
    pub level: Level,
    /// The test that executes the feature.
    pub test: &'static str,
}

const fn feature(
    name: &'static str,
    leaf: u32,
    reg: Reg,
    bit: u8,
    shown: Shown,
    test: &'static str,
) -> Feature {
    Feature { name, leaf, subleaf: 0, reg, bit, shown, level: Level::V2, test }
}

/// Level 3, with the subleaf.
const fn v3(
    name: &'static str,
    (leaf, subleaf): (u32, u32),
    reg: Reg,
    bit: u8,
    shown: Shown,
    test: &'static str,
) -> Feature {
    Feature { name, leaf, subleaf, reg, bit, shown, level: Level::V3, test }
}

use Reg::{Eax, Ebx, Ecx, Edx};
use Shown::{Always, OnAmd, WithEngine, WithHost, WithHostAvx, WithSmp};

const EXT: u32 = 0x8000_0001;

/// The table.
pub const FEATURES: &[Feature] = &[
    feature("fpu", 1, Edx, 0, Always, "feature_x87"),
    feature("de", 1, Edx, 2, Always, "io_breakpoint_traps"),
    feature("pse", 1, Edx, 3, Always, "feature_pse"),
    feature("tsc", 1, Edx, 4, Always, "rdtsc_counts_from_the_offset"),
    feature("msr", 1, Edx, 5, Always, "msrs_read_back"),
    feature("pae", 1, Edx, 6, Always, "feature_pae"),
    feature("cx8", 1, Edx, 8, Always, "feature_cx8"),
    feature("apic", 1, Edx, 9, Always, "xapic_registers_read_by_the_page"),
    feature("sep", 1, Edx, 11, Always, "sysenter_and_sysexit"),
    feature("pge", 1, Edx, 13, Always, "feature_pge"),
    feature("cmov", 1, Edx, 15, Always, "feature_cmov"),
    feature("pat", 1, Edx, 16, Always, "msrs_read_back"),
    feature("clflush", 1, Edx, 19, Always, "feature_clflush"),
    feature("mmx", 1, Edx, 23, Always, "feature_mmx"),
    feature("fxsr", 1, Edx, 24, Always, "feature_fxsr"),
    feature("sse", 1, Edx, 25, Always, "feature_sse"),
    feature("sse2", 1, Edx, 26, Always, "feature_sse2"),
    feature("ht", 1, Edx, 28, WithSmp, "topology_of_four"),
    feature("pni", 1, Ecx, 0, WithHost, "feature_sse3"),
    feature("pclmulqdq", 1, Ecx, 1, WithHost, "feature_pclmulqdq"),
    feature("ssse3", 1, Ecx, 9, WithHost, "feature_ssse3"),
    v3("fma", (1, 0), Ecx, 12, WithHostAvx, "feature_fma"),
    feature("cx16", 1, Ecx, 13, WithHost, "feature_cx16"),
    feature("pcid", 1, Ecx, 17, WithEngine, "pcid_and_invpcid"),
    feature("sse4_1", 1, Ecx, 19, WithHost, "feature_sse4_1"),
    feature("sse4_2", 1, Ecx, 20, WithHost, "feature_sse4_2"),
    feature("x2apic", 1, Ecx, 21, Always, "x2apic_self_ipi_interrupts"),
    v3("movbe", (1, 0), Ecx, 22, WithHost, "feature_movbe"),
    feature("popcnt", 1, Ecx, 23, WithHost, "feature_popcnt"),
    feature("tsc_deadline_timer", 1, Ecx, 24, Always, "tsc_deadline_interrupts"),
    feature("aes", 1, Ecx, 25, WithHost, "feature_aes"),
    v3("xsave", (1, 0), Ecx, 26, WithHost, "feature_xsave"),
    v3("avx", (1, 0), Ecx, 28, WithHostAvx, "feature_avx"),
    v3("f16c", (1, 0), Ecx, 29, WithHostAvx, "feature_f16c"),
    feature("rdrand", 1, Ecx, 30, Always, "feature_rdrand"),
    feature("hypervisor", 1, Ecx, 31, Always, "hypervisor_leaves"),
    feature("arat", 6, Eax, 2, Always, "timer_wakes_a_halted_processor"),
    feature("fsgsbase", 7, Ebx, 0, WithHost, "fsgsbase_instructions"),
    feature("tsc_adjust", 7, Ebx, 1, Always, "tsc_adjust_moves_the_counter"),
    v3("bmi1", (7, 0), Ebx, 3, WithHost, "feature_bmi1"),
    v3("avx2", (7, 0), Ebx, 5, WithHostAvx, "feature_avx2"),
    feature("smep", 7, Ebx, 7, WithHost, "feature_smep"),
    v3("bmi2", (7, 0), Ebx, 8, WithHost, "feature_bmi2"),
    feature("erms", 7, Ebx, 9, WithHost, "feature_erms"),
    feature("invpcid", 7, Ebx, 10, WithEngine, "pcid_and_invpcid"),
    feature("rdseed", 7, Ebx, 18, Always, "feature_rdseed"),
    feature("smap", 7, Ebx, 20, WithHost, "feature_smap"),
    v3("adx", (7, 0), Ebx, 19, WithHost, "feature_adx"),
    feature("clflushopt", 7, Ebx, 23, WithHost, "feature_clflush"),
    feature("sha_ni", 7, Ebx, 29, WithHost, "feature_sha"),
    feature("umip", 7, Ecx, 2, WithHost, "umip_hides_the_tables"),
    feature("rdpid", 7, Ecx, 22, WithHost, "rdtscp_and_rdpid"),
    feature("fsrm", 7, Edx, 4, WithHost, "feature_erms"),
    v3("xsaveopt", (0xd, 1), Eax, 0, WithHost, "feature_xsaveopt"),
    v3("xsavec", (0xd, 1), Eax, 1, WithHost, "feature_xsavec"),
    v3("xgetbv1", (0xd, 1), Eax, 2, WithHost, "feature_xgetbv1"),
    feature("lahf_lm", EXT, Ecx, 0, Always, "feature_lahf"),
    feature("cmp_legacy", EXT, Ecx, 1, OnAmd, "topology_of_four"),
    v3("abm", (EXT, 0), Ecx, 5, WithHost, "feature_lzcnt"),
    feature("3dnowprefetch", EXT, Ecx, 8, WithHost, "feature_prefetchw"),
    feature("topoext", EXT, Ecx, 22, OnAmd, "topology_of_four"),
    feature("syscall", EXT, Edx, 11, Always, "syscall_and_sysret"),
    feature("nx", EXT, Edx, 20, Always, "feature_nx"),
    feature("pdpe1gb", EXT, Edx, 26, WithHost, "feature_pdpe1gb"),
    feature("rdtscp", EXT, Edx, 27, WithHost, "rdtscp_and_rdpid"),
    feature("lm", EXT, Edx, 29, Always, "iretq_to_compatibility_mode_and_back"),
    // LFENCE waits for everything before it: true of an interpreter.
    feature("lfence_always_serializing", 0x8000_0021, Eax, 2, OnAmd, "feature_sse2"),
    feature("null_sel_clr_base", 0x8000_0021, Eax, 6, OnAmd, "null_selectors_clear_the_base"),
];
