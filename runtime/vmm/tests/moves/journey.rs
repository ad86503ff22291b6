//! Runs of a guest through several machines.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mvm_emu::{EmuEngine, Tier};
use mvm_engine::Engine;
use mvm_engine::kvm::KvmEngine;
use mvm_memory::GuestRam;
use mvm_vmm::{EndReason, Events, Machine, MachineEvent, MachineState, Parts, Pauser};

use crate::guest::PATIENCE;

/// Which engine runs which leg.
pub struct Route {
    /// The engine that makes the machine. If another one runs the first leg, the machine moves there before its first
    /// instruction: its guest sees a processor that both have, where the first leg's engine has a greater one.
    maker: Arc<dyn Engine>,
    legs: Vec<Arc<dyn Engine>>,
}

impl Route {
    fn new(maker: &Arc<dyn Engine>, legs: [&Arc<dyn Engine>; 3]) -> Self {
        Self { maker: maker.clone(), legs: legs.map(Clone::clone).to_vec() }
    }

    /// A machine before its first leg.
    pub fn begin(&self, parts: impl Fn() -> Parts) -> (Machine, Events) {
        let (machine, events) = Machine::new(&*self.maker, parts()).unwrap();
        if Arc::ptr_eq(&self.maker, &self.legs[0]) {
            return (machine, events);
        }
        let (state, ram) = take(machine);
        self.go_on(&*self.legs[0], parts(), ram, &state)
    }

    /// The engines of the legs after the first.
    pub fn next_legs(&self) -> impl Iterator<Item = &dyn Engine> {
        self.legs[1..].iter().map(|engine| &**engine)
    }

    /// A machine of `engine` that goes on from `state`.
    pub fn go_on(
        &self,
        engine: &dyn Engine,
        parts: Parts,
        ram: GuestRam,
        state: &MachineState,
    ) -> (Machine, Events) {
        let restored = Machine::restore(engine, parts, ram, state);
        restored.unwrap_or_else(|e| panic!("{self}, to {}: {e}", engine.name()))
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.legs.iter().map(|engine| engine.name()).collect();
        f.write_str(&names.join(" -> "))
    }
}

/// Routes of three legs. Without a usable `/dev/kvm` those with kvm are missing, and a line says so.
pub fn routes() -> Vec<Route> {
    let emu: Arc<dyn Engine> = Arc::new(EmuEngine::new().unwrap());
    let translating = EmuEngine::new().unwrap().with_tier(Tier::Translator);
    let jit: Arc<dyn Engine> = Arc::new(translating);
    let mut routes =
        vec![Route::new(&emu, [&emu, &emu, &emu]), Route::new(&emu, [&jit, &emu, &jit])];
    match KvmEngine::new() {
        Ok(kvm) => {
            let kvm: Arc<dyn Engine> = Arc::new(kvm);
            routes.push(Route::new(&kvm, [&kvm, &kvm, &kvm]));
            routes.push(Route::new(&kvm, [&kvm, &emu, &kvm]));
            routes.push(Route::new(&kvm, [&emu, &kvm, &emu]));
        }
        Err(e) => {
            let _ = writeln!(io::stderr(), "SKIPPED: moves from and to kvm are not tested: {e}");
        }
    }
    routes
}

#[derive(Default)]
struct Printed {
    bytes: Vec<u8>,
    /// Stop after this many.
    stop: Option<usize>,
    pauser: Option<Pauser>,
}

/// A console that stops its machine after a given byte.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<Printed>>);

impl Console {
    fn lock(&self) -> MutexGuard<'_, Printed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// Stops `machine` when `count` bytes have been printed.
    pub fn stop_at(&self, count: usize, machine: &Machine) {
        let mut printed = self.lock();
        (printed.stop, printed.pauser) = (Some(count), Some(machine.pauser()));
    }

    fn has_stopped(&self) -> bool {
        self.lock().stop.is_none()
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut printed = self.lock();
        printed.bytes.extend_from_slice(bytes);
        if printed.stop.is_some_and(|stop| printed.bytes.len() >= stop) {
            printed.stop = None;
            if let Some(pauser) = &printed.pauser {
                pauser.ask();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until `console` has stopped the machine, and takes its state out of it.
pub fn leave(machine: Machine, events: &Events, console: &Console) -> (MachineState, GuestRam) {
    let deadline = Instant::now() + PATIENCE;
    while !console.has_stopped() {
        match events.wait(Some(Duration::from_millis(2))) {
            Some(MachineEvent::Ended(reason)) if !console.has_stopped() => {
                panic!("it ended before it was to be stopped: {reason}\n{}", console.text())
            }
            _ => assert!(Instant::now() < deadline, "it does not come to:\n{}", console.text()),
        }
    }
    machine.pause().unwrap();
    take(machine)
}

/// The state and RAM of a machine that stands still, which is ended. The state has been text in between.
pub fn take(machine: Machine) -> (MachineState, GuestRam) {
    let (state, ram) = (machine.save().unwrap(), machine.ram().clone());
    machine.finish(EndReason::Stopped).unwrap();
    let text = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<MachineState>(&text).unwrap(), state);
    (state, ram)
}

/// Waits for the end.
pub fn end(machine: Machine, events: &Events, console: &Console) -> EndReason {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match events.wait(Some(deadline.saturating_duration_since(Instant::now()))) {
            Some(MachineEvent::Phase(_)) => {}
            Some(MachineEvent::Ended(reason)) => {
                machine.finish(reason.clone()).unwrap();
                return reason;
            }
            None => panic!("no end; it printed:\n{}", console.text()),
        }
    }
}

/// Runs a guest along `route`, which it leaves leg by leg after so many bytes as `stops` say; returns the end and all
/// that was printed.
pub fn journey(route: &Route, stops: &[usize], parts: impl Fn() -> Parts) -> (EndReason, String) {
    let console = Console::default();
    let parts = || Parts { console: Box::new(console.clone()), ..parts() };
    let (mut machine, mut events) = route.begin(parts);
    for (stop, engine) in stops.iter().zip(route.next_legs()) {
        console.stop_at(*stop, &machine);
        machine.start();
        let (state, ram) = leave(machine, &events, &console);
        (machine, events) = route.go_on(engine, parts(), ram, &state);
    }
    machine.start();
    let reason = end(machine, &events, &console);
    (reason, console.text())
}
