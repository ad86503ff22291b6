//! How much memory a machine needs for what runs in it, and making it that large.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mvm_sandbox::guest::Guest;
use mvm_sandbox::memory;
use mvm_vmm::MemorySize;
use mvm_vmm::monitor::ControlClient;
use oci_spec::runtime::{LinuxResources, Spec};

use super::spec;

/// The limits of the containers in one machine.
#[derive(Debug, Default)]
pub struct Fit(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// By container; those without a limit have none to count.
    limits: BTreeMap<String, u64>,
    /// What the machine was last asked to have, if ever.
    asked: Option<u64>,
}

/// What a machine is made larger and smaller by.
pub trait Sizing {
    /// What it has, and can have.
    fn size(&mut self) -> Result<MemorySize, mvm_sandbox::Error>;
    /// Makes it this large.
    fn resize(&mut self, bytes: u64) -> Result<MemorySize, mvm_sandbox::Error>;
}

/// A machine that runs: its monitor, and the agent in it.
#[derive(Debug)]
pub struct Running<'a> {
    /// The monitor.
    pub monitor: ControlClient,
    /// The agent.
    pub guest: &'a Guest,
}

impl Sizing for Running<'_> {
    fn size(&mut self) -> Result<MemorySize, mvm_sandbox::Error> {
        Ok(self.monitor.status()?.memory)
    }

    fn resize(&mut self, bytes: u64) -> Result<MemorySize, mvm_sandbox::Error> {
        memory::resize(&mut self.monitor, self.guest, bytes)
    }
}

/// The limit of a container's memory, if it has one.
pub fn limit(spec: &Spec) -> Option<u64> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    limit_in(resources?)
}

/// The limit of memory that `resources` set. Zero is what is not said, and without a limit (-1) a container needs no more
/// memory than with the one before.
pub fn limit_in(resources: &LinuxResources) -> Option<u64> {
    let limit = resources.memory().as_ref()?.limit()?;
    u64::try_from(limit).ok().filter(|limit| *limit != 0)
}

impl Fit {
    /// How large the machine has to be.
    fn wanted(state: &State) -> u64 {
        let sum = state.limits.values().fold(0u64, |sum, limit| sum.saturating_add(*limit));
        sum.saturating_add(spec::OVERHEAD)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The limit of `container`, as far as it is known.
    pub fn of(&self, container: &str) -> Option<u64> {
        self.state().limits.get(container).copied()
    }

    /// Notes the limit of a container whose machine was made for it.
    pub fn note(&self, container: &str, limit: Option<u64>) {
        self.state().limits.extend(limit.map(|limit| (container.to_owned(), limit)));
    }

    /// A container has this limit from now on, or none, or is gone. `machine` is asked for more or less memory
    /// if that changes what it needs, and is as large as it needs to be when this returns.
    ///
    /// # Errors
    /// The guest does not take the memory; the limits are those from before then.
    pub fn set<S: Sizing, E: From<mvm_sandbox::Error>>(
        &self,
        container: &str,
        limit: Option<u64>,
        machine: impl FnOnce() -> Result<S, E>,
    ) -> Result<(), E> {
        // Held all along: who comes second has the machine as the first one has left it.
        let mut state = self.state();
        let before = match limit {
            Some(limit) => state.limits.insert(container.to_owned(), limit),
            None => state.limits.remove(container),
        };
        let resized = adapt(&mut state, machine);
        if resized.is_err() {
            match before {
                Some(limit) => drop(state.limits.insert(container.to_owned(), limit)),
                None => drop(state.limits.remove(container)),
            }
        }
        resized
    }
}

fn adapt<S: Sizing, E: From<mvm_sandbox::Error>>(
    state: &mut State,
    machine: impl FnOnce() -> Result<S, E>,
) -> Result<(), E> {
    let wanted = Fit::wanted(state);
    if state.asked == Some(wanted) {
        return Ok(());
    }
    let mut machine = machine()?;
    let MemorySize { started, wanted: asked, max, .. } = machine.size()?;
    let fits = wanted.min(max).max(started);
    if wanted > max && state.asked.is_none_or(|asked| asked < wanted) {
        let [wanted, max] = [wanted, max].map(|bytes| bytes >> 20);
        tracing::warn!(
            "the limits take a machine of {wanted} MiB of memory, and this one cannot have more than {max} MiB \
             (memory-max): beyond that they have no effect"
        );
    }
    if fits != asked {
        let after = machine.resize(fits)?;
        tracing::info!(
            "the machine's memory: {} MiB, of {} MiB that it is to have",
            after.now >> 20,
            after.wanted >> 20
        );
    }
    state.asked = Some(wanted);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::cell::RefCell;

    const MIB: u64 = 1 << 20;

    /// A machine that was started with some memory, and what it was asked for.
    struct Mock {
        size: MemorySize,
        asked: Vec<u64>,
        refuses: bool,
    }

    impl Sizing for &RefCell<Mock> {
        fn size(&mut self) -> Result<MemorySize, mvm_sandbox::Error> {
            Ok(self.borrow().size)
        }

        fn resize(&mut self, bytes: u64) -> Result<MemorySize, mvm_sandbox::Error> {
            let mut mock = self.borrow_mut();
            mock.asked.push(bytes / MIB);
            if mock.refuses {
                return Err(mvm_sandbox::Error::NotGrown { now: mock.size.now, wanted: bytes });
            }
            mock.size.now = bytes;
            mock.size.wanted = mock.size.now;
            Ok(mock.size)
        }
    }

    fn machine(started: u64, max: u64) -> RefCell<Mock> {
        let (started, max) = (started * MIB, max * MIB);
        let size = MemorySize { started, now: started, wanted: started, max };
        RefCell::new(Mock { size, asked: Vec::new(), refuses: false })
    }

    fn ok(mock: &RefCell<Mock>) -> Result<&RefCell<Mock>, mvm_sandbox::Error> {
        Ok(mock)
    }

    #[test]
    fn a_machine_grows_with_the_limits_in_it_and_shrinks_again() {
        let (fit, mock) = (Fit::default(), machine(512 + 96, 4096));
        let set = |id, limit: Option<u64>| fit.set(id, limit.map(|m| m * MIB), || ok(&mock));
        fit.note("a", Some(200 * MIB));
        set("a", Some(256)).unwrap();
        set("b", Some(256)).unwrap();
        set("free", None).unwrap();
        assert!(mock.borrow().asked.is_empty(), "it is as large as they need it");
        set("a", Some(1024)).unwrap();
        set("a", Some(1024)).unwrap();
        assert_eq!(mock.borrow().asked, [96 + 1024 + 256]);
        set("b", None).unwrap();
        set("a", Some(128)).unwrap();
        assert_eq!(
            mock.borrow().asked[1..],
            [96 + 1024, 96 + 512],
            "not less than it was started with"
        );
        set("a", Some(64)).unwrap();
        assert_eq!(mock.borrow().asked.len(), 3);
        assert_eq!((fit.of("a"), fit.of("b")), (Some(64 * MIB), None));
    }

    #[test]
    fn more_than_the_machine_can_have_is_as_much_as_it_can() {
        let (fit, mock) = (Fit::default(), machine(300, 1024));
        fit.set("a", Some(5000 * MIB), || ok(&mock)).unwrap();
        fit.set("a", Some(6000 * MIB), || ok(&mock)).unwrap();
        assert_eq!(mock.borrow().asked, [1024]);
        let fixed = machine(300, 300);
        Fit::default().set("a", Some(5000 * MIB), || ok(&fixed)).unwrap();
        assert!(fixed.borrow().asked.is_empty());
    }

    #[test]
    fn a_guest_that_refuses_leaves_the_limits_as_they_were() {
        let (fit, mock) = (Fit::default(), machine(300, 4096));
        fit.set("a", Some(100 * MIB), || ok(&mock)).unwrap();
        mock.borrow_mut().refuses = true;
        let refused = fit.set("a", Some(1000 * MIB), || ok(&mock)).unwrap_err();
        assert!(matches!(refused, mvm_sandbox::Error::NotGrown { .. }));
        mock.borrow_mut().refuses = false;
        fit.set("b", Some(500 * MIB), || ok(&mock)).unwrap();
        assert_eq!(mock.borrow().asked, [1096, 696]);
    }

    #[test]
    fn limits_are_what_is_said_of_them() {
        let resources = |memory| {
            let resources = json!({ "memory": memory });
            serde_json::from_value::<LinuxResources>(resources).unwrap()
        };
        assert_eq!(limit_in(&resources(json!({ "limit": 5 }))), Some(5));
        assert_eq!(limit_in(&resources(json!({ "limit": -1 }))), None);
        assert_eq!(limit_in(&resources(json!({ "limit": 0 }))), None);
        assert_eq!(limit_in(&resources(json!({ "swap": 5 }))), None);
        assert_eq!(limit_in(&LinuxResources::default()), None);
    }
}
