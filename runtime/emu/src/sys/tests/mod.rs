//! Programs that use the system side of the processor, on a machine of the engine.

mod chaos;
mod clock;
mod compared;
mod debug;
mod edges;
mod events;
mod faults;
mod features;
mod litmus;
mod lockstep;
mod mmio;
mod modes;
mod shared_code;
mod simd;
mod smc;
mod smp;
mod stacks;
mod state;
mod stores;
mod system;
mod tasks;
mod virtual_8086;
mod xsave;

use mvm_engine::cpuid::features::FEATURES;
use mvm_engine::cpuid::{CpuModel, CpuidTable};

/// Is the feature shown on this host?
fn has(name: &str) -> bool {
    CpuidTable::new(CpuModel::V3, 1, 1_000_000, None).has(name)
}

/// Where tests of features may be.
const SOURCES: &[&str] = &[
    include_str!("debug.rs"),
    include_str!("events.rs"),
    include_str!("features.rs"),
    include_str!("simd.rs"),
    include_str!("system.rs"),
    include_str!("xsave.rs"),
    include_str!("../../mmu/tests.rs"),
    include_str!("../../../../engine/src/cpuid/table.rs"),
    include_str!("../../apic/registers.rs"),
];

#[test]
fn every_feature_names_a_test_that_exists() {
    let missing: Vec<&str> = FEATURES
        .iter()
        .filter(|f| {
            let head = format!("#[test]\nfn {}() {{", f.test);
            let indented = format!("#[test]\n    fn {}() {{", f.test);
            !SOURCES.iter().any(|s| s.contains(&head) || s.contains(&indented))
        })
        .map(|f| f.test)
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}
