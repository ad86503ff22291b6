//! The engine under test.

use std::env;

/// Names the engine under test: `emu` or `kvm`.
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
    match value.to_str() {
        Some("") => None,
        Some("emu") => Some("emu"),
        Some("kvm") => Some("kvm"),
        _ => panic!("{TEST_ENGINE} is {value:?}, not emu or kvm"),
    }
}
