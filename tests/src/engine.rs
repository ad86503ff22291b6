//! The engine under test.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// Names the engine under test: `emu`, `emu:interp`, `emu:jit` or `kvm`.
pub const TEST_ENGINE: &str = "MVM_TEST_ENGINE";

/// What to name after `--engine`: [`TEST_ENGINE`], else `emu`, which every host has. Tests that are about an engine name
/// it themselves; those that name none get the one under test by [`World::command`](crate::World::command).
///
/// # Panics
/// The variable has another value.
pub fn engine() -> &'static str {
    under_test().unwrap_or("emu")
}

/// The engine under test, if there is a wish.
pub(crate) fn under_test() -> Option<&'static str> {
    let value = env::var_os(TEST_ENGINE)?;
    if value.is_empty() {
        return None;
    }
    let known = ["emu", "emu:interp", "emu:jit", "kvm"].into_iter().find(|name| value == **name);
    Some(known.unwrap_or_else(|| panic!("{TEST_ENGINE} is {value:?}, which is no engine")))
}

/// The engine under test and its tier, where the wish names one.
pub fn engine_and_tier() -> (&'static str, Option<&'static str>) {
    let name = engine();
    name.split_once(':').map_or((name, None), |(engine, tier)| (engine, Some(tier)))
}

/// Settings for programs that take no flags: a file in `dir` that names the engine under test, or none.
pub(crate) fn settings_in(dir: &Path) -> PathBuf {
    if under_test().is_none() {
        return "/dev/null".into();
    }
    let (engine, tier) = engine_and_tier();
    let tier = tier.map(|tier| format!("emu.tier = {tier:?}\n")).unwrap_or_default();
    let path = dir.join("mvm.toml");
    fs::write(&path, format!("engine = {engine:?}\n{tier}")).expect("a file");
    path
}
