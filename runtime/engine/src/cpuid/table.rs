//! CPUID leaf by leaf.

use super::features::{FEATURES, Feature, Reg, Shown};
use super::lookup::{Answer, has, lookup, xsave_size};
use super::{CpuModel, host, paravirt};
use crate::CpuidEntry;
use crate::tsc::host_tsc_is_invariant;

/// Bits of a guest physical address, unless the host has fewer.
pub const PHYSICAL_BITS: u32 = 46;

/// Components of XCR0 (SDM vol. 1, 13.3).
mod xcr0 {
    pub const X87: u32 = 1 << 0;
    pub const SSE: u32 = 1 << 1;
    pub const AVX: u32 = 1 << 2;
}

/// Whose instruction set details apply where the vendors differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// AMD, and Hygon, which is the same.
    Amd,
    /// Intel, and everybody else.
    Intel,
}

impl Vendor {
    /// The host's.
    pub fn of_host() -> Self {
        let zero = host::query(0, 0);
        match &vendor_string(zero.ebx, zero.edx, zero.ecx) {
            b"AuthenticAMD" | b"HygonGenuine" => Self::Amd,
            _ => Self::Intel,
        }
    }
}

/// The leaves of a machine's processors.
#[derive(Debug)]
pub struct CpuidTable {
    vendor: Vendor,
    vcpus: u32,
    tables: Vec<Vec<CpuidEntry>>,
}

impl CpuidTable {
    /// The table for `vcpus` processors of `model` on this host, with a TSC of `tsc_khz`.
    ///
    /// `supported` is what an engine says of itself, and limits what is shown; `None` if it does all that
    /// [`FEATURES`] lists. [`CpuModel::Host`] is `supported` itself, with the topology of the machine.
    pub fn new(
        model: CpuModel,
        vcpus: u32,
        tsc_khz: u64,
        supported: Option<&[CpuidEntry]>,
    ) -> Self {
        let vendor = Vendor::of_host();
        let builder = Builder { vendor, vcpus, tsc_khz, model, supported };
        let table = |index| match supported {
            Some(supported) if model == CpuModel::Host => {
                host_table(supported, &builder.table(index))
            }
            _ => builder.table(index),
        };
        Self { vendor, vcpus, tables: (0..vcpus).map(table).collect() }
    }

    /// The vendor.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Number of vCPUs it was made for.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// All leaves of vCPU `index`; empty if there is no such vCPU.
    pub fn entries(&self, index: u32) -> &[CpuidEntry] {
        self.tables.get(index as usize).map_or(&[], Vec::as_slice)
    }

    /// Is the feature of that name shown?
    pub fn has(&self, name: &str) -> bool {
        has(self.entries(0), name)
    }
}

/// The processor as it is: what an engine supports, but for the leaves that tell of the machine around
/// it, which are those of `ours`.
fn host_table(supported: &[CpuidEntry], ours: &[CpuidEntry]) -> Vec<CpuidEntry> {
    /// Caches with their sharing, topology, what hypervisors tell.
    const OURS: &[u32] = &[4, 0xb, 0x15, 0x1f, 0x4000_0000, 0x4000_0010, 0x8000_001d, 0x8000_001e];
    /// The bits of EBX in leaf 1 that are no part of the topology.
    const CLFLUSH: u32 = 0xff00;
    const HT: u32 = 1 << 28;
    let mut table: Vec<CpuidEntry> = supported
        .iter()
        .filter(|e| !OURS.contains(&e.leaf))
        .copied()
        .map(|mut entry| {
            if let Some([_, b, c, d]) = lookup(ours, entry.leaf, entry.subleaf.unwrap_or(0)) {
                match entry.leaf {
                    1 => {
                        entry.ebx = b & !CLFLUSH | entry.ebx & CLFLUSH;
                        entry.edx = entry.edx & !HT | d & HT;
                    }
                    0x8000_0008 => entry.ecx = c,
                    _ => {}
                }
            }
            entry
        })
        .collect();
    table.extend(ours.iter().filter(|e| OURS.contains(&e.leaf)));
    let highest = table.iter().map(|e| e.leaf).filter(|&leaf| leaf < 0x4000_0000).max();
    if let (Some(zero), Some(highest)) = (table.iter_mut().find(|e| e.leaf == 0), highest) {
        zero.eax = zero.eax.max(highest);
    }
    table
}

fn vendor_string(a: u32, b: u32, c: u32) -> [u8; 12] {
    let mut text = [0; 12];
    for (chunk, word) in text.chunks_exact_mut(4).zip([a, b, c]) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    text
}

/// 48 bytes that the guest shows as the model's name.
const BRAND: &[u8; 48] = b"mvm virtual x86-64 processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

struct Builder<'a> {
    vendor: Vendor,
    vcpus: u32,
    tsc_khz: u64,
    model: CpuModel,
    supported: Option<&'a [CpuidEntry]>,
}

impl Builder<'_> {
    fn table(&self, index: u32) -> Vec<CpuidEntry> {
        let mut table = Vec::new();
        let mut add = |leaf: u32, subleaf: Option<u32>, mut answer: Answer| {
            self.add_features(leaf, subleaf.unwrap_or(0), &mut answer);
            let [eax, ebx, ecx, edx] = answer;
            table.push(CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx });
        };
        let vendor = host::query(0, 0);
        let tsc = self.tsc_leaf();
        let max = if tsc.is_some() { 0x15 } else { 0xd };
        add(0, None, [max, vendor.ebx, vendor.ecx, vendor.edx]);
        add(1, None, [self.signature(), 8 << 8 | self.ids() << 16 | index << 24, 0, 0]);
        if self.vendor == Vendor::Intel {
            add(2, None, [0x00fe_ff01, 0, 0, 0]);
            for subleaf in 0..8 {
                let cache = self.cache_leaf(4, subleaf);
                add(4, Some(subleaf), cache);
                if cache[0] & 0x1f == 0 {
                    break;
                }
            }
        }
        add(6, None, [0; 4]);
        add(7, Some(0), [0; 4]);
        add(0xb, Some(0), [0, 1, 1 << 8, index]);
        add(0xb, Some(1), [self.id_bits(), self.vcpus, 1 | 2 << 8, index]);
        self.add_xsave(&mut add);
        if let Some(tsc) = tsc {
            add(0x15, None, tsc);
        }
        let features = self.limit(0x4000_0001, Reg::Eax, paravirt::features(self.invariant()));
        add(0x4000_0000, None, [0x4000_0010, 0x4b4d_564b, 0x564b_4d56, 0x4d]);
        add(0x4000_0001, None, [features, 0, 0, 0]);
        let khz = u32::try_from(self.tsc_khz).unwrap_or(u32::MAX);
        add(0x4000_0010, None, [khz, 1_000_000, 0, 0]);
        self.add_extended(index, &mut add);
        table
    }

    fn add_xsave(&self, add: &mut impl FnMut(u32, Option<u32>, Answer)) {
        if !self.shows_named("xsave") {
            return;
        }
        let components = self.xsave_components();
        add(0xd, Some(0), [components, 576, xsave_size(components.into()), 0]);
        add(0xd, Some(1), [0; 4]);
        if components & xcr0::AVX != 0 {
            add(0xd, Some(2), [256, 576, 0, 0]);
        }
    }

    fn xsave_components(&self) -> u32 {
        let avx = if self.shows_named("avx") { xcr0::AVX } else { 0 };
        xcr0::X87 | xcr0::SSE | avx
    }

    fn add_extended(&self, index: u32, add: &mut impl FnMut(u32, Option<u32>, Answer)) {
        let amd = self.vendor == Vendor::Amd;
        let vendor = host::query(0, 0);
        let (signature, vendor) = if amd {
            (self.signature(), [vendor.ebx, vendor.ecx, vendor.edx])
        } else {
            (0, [0; 3])
        };
        let max = if amd { 0x8000_0021 } else { 0x8000_0008 };
        add(0x8000_0000, None, [max, vendor[0], vendor[1], vendor[2]]);
        // AMD repeats the basic features here.
        let repeated = if amd { self.feature_word(1, 0, Reg::Edx) & 0x0183_f3ff } else { 0 };
        add(0x8000_0001, None, [signature, 0, 0, repeated]);
        for (leaf, text) in (0x8000_0002..).zip(BRAND.chunks_exact(16)) {
            let word = |i: usize| {
                text.get(i * 4..i * 4 + 4)
                    .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            };
            add(leaf, None, [word(0), word(1), word(2), word(3)]);
        }
        let cache = host::query(0x8000_0006, 0);
        if amd {
            let l1 = host::query(0x8000_0005, 0);
            add(0x8000_0005, None, [l1.eax, l1.ebx, l1.ecx, l1.edx]);
        }
        add(0x8000_0006, None, [cache.eax, cache.ebx, cache.ecx, cache.edx]);
        add(0x8000_0007, None, [0, 0, 0, u32::from(self.invariant()) << 8]);
        let cores = if amd { self.id_bits() << 12 | (self.vcpus - 1) } else { 0 };
        add(0x8000_0008, None, [self.physical_bits() | 48 << 8, 0, cores, 0]);
        if amd {
            for subleaf in 0..8 {
                let cache = self.cache_leaf(0x8000_001d, subleaf);
                add(0x8000_001d, Some(subleaf), cache);
                if cache[0] & 0x1f == 0 {
                    break;
                }
            }
            add(0x8000_001e, None, [index, index & 0xff, 0, 0]);
            // No straight-line or TSA/SRSO speculation to defend against inside an interpreter.
            let (a, c) = (self.limit(0x8000_0021, Reg::Eax, 1 << 29), 0b110);
            add(0x8000_0021, None, [a, 0, self.limit(0x8000_0021, Reg::Ecx, c), 0]);
        }
    }

    /// Version information of leaf 1: the vendor's current family, in a model that nobody knows.
    ///
    /// Compilers' dispatch by `arch=` (libgcc's and compiler-rt's `__cpu_model`) takes a model that it
    /// knows for all the features of that model and asks no further; with an unknown one the feature
    /// bits decide, which are right.
    fn signature(&self) -> u32 {
        match self.vendor {
            // Base family 0xf, extended 0xa: 19h, as which Linux knows no erratum of Zen 1. Model 30h.
            Vendor::Amd => 0x00a3_0f01,
            // Family 6, model FFh.
            Vendor::Intel => 0x000f_06f1,
        }
    }

    /// Bits of an APIC id that tell cores of the package apart.
    fn id_bits(&self) -> u32 {
        self.vcpus.next_power_of_two().trailing_zeros()
    }

    fn ids(&self) -> u32 {
        self.vcpus.next_power_of_two().min(255)
    }

    /// A cache of the host, with the sharing of our topology: L3 by all, others by none.
    fn cache_leaf(&self, leaf: u32, subleaf: u32) -> Answer {
        let cache = host::query(leaf, subleaf);
        if cache.eax & 0x1f == 0 {
            return [0; 4];
        }
        let level = cache.eax >> 5 & 7;
        let sharing = if level >= 3 { self.vcpus - 1 } else { 0 };
        let mut eax = cache.eax & 0x3fff | (sharing & 0xfff) << 14;
        if leaf == 4 {
            eax |= ((self.ids() - 1) & 0x3f) << 26;
        }
        [eax, cache.ebx, cache.ecx, cache.edx]
    }

    fn add_features(&self, leaf: u32, subleaf: u32, answer: &mut Answer) {
        for (word, reg) in answer.iter_mut().zip([Reg::Eax, Reg::Ebx, Reg::Ecx, Reg::Edx]) {
            *word |= self.feature_word(leaf, subleaf, reg);
        }
    }

    fn feature_word(&self, leaf: u32, subleaf: u32, reg: Reg) -> u32 {
        FEATURES
            .iter()
            .filter(|f| (f.leaf, f.subleaf, f.reg) == (leaf, subleaf, reg) && self.shows(f))
            .fold(0, |word, f| word | 1 << f.bit)
    }

    fn shows(&self, feature: &Feature) -> bool {
        let by_table = match feature.shown {
            Shown::Always | Shown::WithEngine => true,
            Shown::WithHost => host_has(feature),
            Shown::WithHostAvx => host_has(feature) && host::avx_usable(),
            Shown::OnAmd => self.vendor == Vendor::Amd,
            Shown::WithSmp => return self.vcpus > 1,
        };
        by_table
            && self.model.includes(feature.level)
            && self.supports(feature.leaf, feature.subleaf, feature.reg) >> feature.bit & 1 != 0
    }

    fn shows_named(&self, name: &str) -> bool {
        FEATURES.iter().any(|f| f.name == name && self.shows(f))
    }

    /// What the engine itself would show in a register.
    fn supports(&self, leaf: u32, subleaf: u32, reg: Reg) -> u32 {
        self.supported.map_or(u32::MAX, |all| {
            lookup(all, leaf, subleaf).map_or(0, |answer| answer[reg as usize])
        })
    }

    fn limit(&self, leaf: u32, reg: Reg, value: u32) -> u32 {
        value & self.supports(leaf, 0, reg)
    }

    fn invariant(&self) -> bool {
        host_tsc_is_invariant() && self.limit(0x8000_0007, Reg::Edx, 1 << 8) != 0
    }

    fn physical_bits(&self) -> u32 {
        let of_host = |answer: u32| if answer & 0xff == 0 { 36 } else { answer & 0xff };
        let host = of_host(host::query(0x8000_0008, 0).eax);
        let engine = self.supported.map_or(PHYSICAL_BITS, |all| {
            of_host(lookup(all, 0x8000_0008, 0).unwrap_or_default()[0])
        });
        PHYSICAL_BITS.min(host).min(engine)
    }

    /// Leaf 15h, which only Intel's processors have: a crystal of 1 GHz, the frequency of the local APICs'
    /// timers, and the ratio of the TSC to it.
    fn tsc_leaf(&self) -> Option<Answer> {
        let khz = u32::try_from(self.tsc_khz).ok()?;
        (self.vendor == Vendor::Intel).then_some([1_000_000, khz, 1_000_000_000, 0])
    }
}

fn host_has(feature: &Feature) -> bool {
    let max = host::query(feature.leaf & 0x8000_0000, 0).eax;
    if feature.leaf > max {
        return false;
    }
    let host = host::query(feature.leaf, feature.subleaf);
    let word = [host.eax, host.ebx, host.ecx, host.edx][feature.reg as usize];
    word >> feature.bit & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::super::lookup::answer;
    use super::super::{Level, lacking, missing};
    use super::*;
    use crate::cpuid::incompatible;

    const CR4_OSXSAVE: u64 = 1 << 18;

    fn of_host(vcpus: u32, tsc_khz: u64) -> CpuidTable {
        CpuidTable::new(CpuModel::V3, vcpus, tsc_khz, None)
    }

    fn query(model: &CpuidTable, index: u32, leaf: u32, subleaf: u32) -> Answer {
        answer(model.entries(index), model.vendor(), (leaf, subleaf), 0, 1)
    }

    #[test]
    fn a_linux_64_bit_kernel_finds_what_it_requires() {
        let model = of_host(1, 2_000_000);
        for name in
            ["fpu", "pse", "msr", "pae", "cx8", "pge", "fxsr", "cmov", "sse", "sse2", "lm", "nx"]
        {
            assert!(model.has(name), "{name}");
        }
    }

    #[test]
    fn topology_of_four() {
        let model = of_host(4, 2_000_000);
        assert_eq!(query(&model, 3, 0xb, 0), [0, 1, 0x100, 3]);
        assert_eq!(query(&model, 3, 0xb, 1), [2, 4, 0x201, 3]);
        assert_eq!(query(&model, 3, 0xb, 2), [0, 0, 2, 0]);
        assert_eq!(query(&model, 3, 1, 0)[1], 3 << 24 | 4 << 16 | 8 << 8);
        assert!(model.has("ht") && !of_host(1, 2_000_000).has("ht"));
    }

    #[test]
    fn hypervisor_leaves() {
        let model = of_host(1, 2_345_678);
        let [max, b, c, d] = query(&model, 0, 0x4000_0000, 0);
        assert_eq!(&vendor_string(b, c, d), b"KVMKVMKVM\0\0\0");
        assert_eq!(max, 0x4000_0010);
        assert_eq!(query(&model, 0, 0x4000_0010, 0)[0], 2_345_678);
        assert!(model.has("hypervisor"));
    }

    #[test]
    fn osxsave_and_area_size_follow_the_registers() {
        let model = of_host(1, 2_000_000);
        let entries = model.entries(0);
        let osxsave = |cr4| answer(entries, model.vendor(), (1, 0), cr4, 1)[2] >> 27 & 1;
        assert_eq!((osxsave(0), osxsave(CR4_OSXSAVE)), (0, 1));
        if model.has("avx") {
            assert_eq!(answer(entries, model.vendor(), (0xd, 0), 0, 3)[1..3], [576, 832]);
            assert_eq!(answer(entries, model.vendor(), (0xd, 0), 0, 7)[1], 832);
        }
    }

    #[test]
    fn each_bit_is_listed_once() {
        for (i, a) in FEATURES.iter().enumerate() {
            for b in &FEATURES[i + 1..] {
                assert!(
                    (a.leaf, a.subleaf, a.reg, a.bit) != (b.leaf, b.subleaf, b.reg, b.bit),
                    "{a:?}"
                );
                assert!(a.name != b.name, "{a:?}");
            }
        }
    }

    #[test]
    fn what_must_not_be_shown_is_not() {
        let model = of_host(2, 2_000_000);
        let [.., c1, d1] = query(&model, 0, 1, 0);
        // MONITOR, VMX; VME, MCE, MTRR, MCA, ACPI.
        assert_eq!(c1 & (1 << 3 | 1 << 5), 0);
        assert_eq!(d1 & (1 << 1 | 1 << 7 | 1 << 12 | 1 << 14 | 1 << 22), 0);
        let [_, b7, c7, d7] = query(&model, 0, 7, 0);
        // HLE, RTM, AVX-512F; PKU, LA57; CET-IBT.
        assert_eq!(b7 & (1 << 4 | 1 << 11 | 1 << 16), 0);
        assert_eq!(c7 & (1 << 3 | 1 << 16), 0);
        assert_eq!(d7 & 1 << 20, 0);
        // SVM.
        assert_eq!(query(&model, 0, EXTENDED_FEATURES, 0)[2] & 1 << 2, 0);
    }

    const EXTENDED_FEATURES: u32 = 0x8000_0001;

    #[test]
    fn v2_shows_nothing_of_v3() {
        let table = CpuidTable::new(CpuModel::V2, 1, 2_000_000, None);
        for feature in FEATURES.iter().filter(|f| f.level == Level::V3) {
            assert!(!table.has(feature.name), "{}", feature.name);
        }
        assert!(lookup(table.entries(0), 0xd, 0).is_none());
        if of_host(1, 2_000_000).has("avx2") {
            assert!(lacking(CpuModel::V3, table.entries(0)).contains(&"avx2"));
            let missing = missing(table.entries(0), of_host(1, 2_000_000).entries(0));
            assert!(missing.iter().any(|name| name == "avx2"), "{missing:?}");
        }
        assert!(lacking(CpuModel::Host, table.entries(0)).is_empty());
    }

    #[test]
    fn an_engine_limits_what_is_shown() {
        let mut supported = of_host(1, 2_000_000).entries(0).to_vec();
        for entry in supported.iter_mut().filter(|e| e.leaf == 1) {
            entry.ecx &= !(1 << 26 | 1 << 28);
        }
        for entry in supported.iter_mut().filter(|e| e.leaf == 0x4000_0001) {
            entry.eax = 1;
        }
        let table = CpuidTable::new(CpuModel::V3, 2, 2_000_000, Some(&supported));
        assert!(!table.has("xsave") && !table.has("avx") && table.has("x2apic"));
        assert!(table.has("ht"), "the topology is the machine's own");
        assert_eq!(query(&table, 1, 0x4000_0001, 0)[0], 1);
        assert_eq!(query(&table, 1, 0xd, 0), [0; 4]);
    }

    #[test]
    fn the_host_model_keeps_identity_and_unknown_leaves_but_not_topology() {
        let entry = |leaf, eax, ebx, edx| CpuidEntry { leaf, eax, ebx, edx, ..Default::default() };
        let supported = [
            entry(0, 0x20, 1, 2),
            entry(1, 0x000a_0671, 0x0102_0800, 1 << 28 | 1),
            entry(0x1f, 7, 7, 7),
            entry(0x20, 1, 2, 3),
            entry(0x8000_0000, 0x8000_0008, 0, 0),
        ];
        let table = CpuidTable::new(CpuModel::Host, 1, 2_000_000, Some(&supported));
        let one = lookup(table.entries(0), 1, 0).unwrap();
        assert_eq!((one[0], one[1], one[3]), (0x000a_0671, 0x0001_0800, 1));
        assert_eq!(lookup(table.entries(0), 0x20, 0), Some([1, 2, 0, 3]));
        assert_eq!(lookup(table.entries(0), 0x1f, 0), None);
        assert_eq!(lookup(table.entries(0), 0x4000_0010, 0).unwrap()[0], 2_000_000);
    }

    #[test]
    fn what_a_state_has_and_a_processor_lacks_is_named_bit_by_bit() {
        let ours = of_host(1, 2_000_000).entries(0).to_vec();
        assert_eq!(incompatible(&ours, &ours), None);
        let with = |leaf, subleaf: Option<u32>, bits: [u32; 4]| {
            let mut theirs = ours.clone();
            if !theirs.iter().any(|e| e.leaf == leaf && e.subleaf == subleaf) {
                theirs.push(CpuidEntry { leaf, subleaf, ..Default::default() });
            }
            for entry in theirs.iter_mut().filter(|e| e.leaf == leaf && e.subleaf == subleaf) {
                entry.eax |= bits[0];
                entry.ebx |= bits[1];
                entry.ecx |= bits[2];
                entry.edx |= bits[3];
            }
            theirs
        };
        let subleaf = ours.iter().find(|e| e.leaf == 7).unwrap().subleaf;
        // AVX-512F, which has no name here; what an operating system switches on; a hypercall; sizes and addresses.
        let theirs = with(7, subleaf, [0, 1 << 16, 0, 0]);
        assert_eq!(missing(&ours, &theirs), ["CPUID.7h.0:EBX[16]"]);
        let reason = incompatible(&ours, &theirs).unwrap();
        assert!(reason.contains("lacks") && reason.ends_with("CPUID.7h.0:EBX[16]"), "{reason}");
        assert_eq!(missing(&ours, &with(7, Some(1), [1 << 4, 0, 0, 0])), ["CPUID.7h.1:EAX[4]"]);
        let one = ours.iter().find(|e| e.leaf == 1).unwrap().subleaf;
        assert!(missing(&ours, &with(1, one, [u32::MAX, u32::MAX, 1 << 27, 0])).is_empty());
        let pv = ours.iter().find(|e| e.leaf == 0x4000_0001).unwrap().subleaf;
        assert_eq!(
            missing(&ours, &with(0x4000_0001, pv, [1 << 4 | 1 << 11, 0, 0, 0])),
            ["kvm_feature_4", "kvm_feature_11"]
        );
        // The other way round nothing is lost: what is more is not shown.
        assert!(missing(&theirs, &ours).is_empty());
        // A processor of the first level, and of another vendor.
        let v2 = CpuidTable::new(CpuModel::V2, 1, 2_000_000, None).entries(0).to_vec();
        if of_host(1, 2_000_000).has("avx2") {
            let reason = incompatible(&v2, &ours).unwrap();
            assert!(reason.contains("avx2") && reason.contains("bmi2"), "{reason}");
        }
        let mut other = ours.clone();
        other.iter_mut().filter(|e| e.leaf == 0).for_each(|e| e.ebx ^= 1);
        assert!(incompatible(&ours, &other).unwrap().contains("vendor"));
        assert_eq!(incompatible(&ours, &[]), None, "nothing is known of it");
    }

    #[test]
    fn the_tsc_leaf_gives_the_frequency_exactly() {
        let table = of_host(1, 2_345_678);
        if table.vendor() == Vendor::Intel {
            let [denominator, numerator, crystal, _] = query(&table, 0, 0x15, 0);
            let hz = u64::from(crystal) * u64::from(numerator) / u64::from(denominator);
            assert_eq!(hz, 2_345_678_000);
        }
    }
}
