//! The threads that run the vCPUs, and how they are made to stop, go on and end.
//!
//! One lock holds what is wanted and where each thread is; a change of what is wanted kicks every
//! vCPU out of its run. Nothing is polled.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mvm_devices::{Gate, Passage};
use mvm_engine::{Kick, MpState, Vcpu, VmExit};
use nix::time::ClockId;
use nix::unistd::{Pid, gettid};

use crate::events::{MachineEvent, Notifier};
use crate::outcome::EndReason;

/// What the vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Paused,
    Running,
    Stopped,
}

/// Where one vCPU thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Stands still between two instructions.
    Parked,
    /// Runs guest code, or is about to.
    Running,
    /// As [`Place::Running`], but the vCPU only waits for a start-up IPI.
    Waiting,
    /// Stands still: halted with interrupts off.
    Halted,
    /// The thread has ended.
    Gone,
}

impl Place {
    fn is_still(self) -> bool {
        !matches!(self, Self::Running | Self::Waiting)
    }
}

/// A vCPU, which its thread has to itself while it runs.
type SharedVcpu = Arc<Mutex<Box<dyn Vcpu>>>;

#[derive(Debug)]
struct State {
    target: Target,
    places: Vec<Place>,
    clocks: Vec<ThreadClock>,
    ended: bool,
}

/// What all vCPU threads of a machine share.
#[derive(Debug)]
pub(crate) struct Control {
    state: Mutex<State>,
    changed: Condvar,
    kicks: Vec<Arc<dyn Kick>>,
    /// Where devices wait on the vCPUs' threads.
    gate: Arc<Gate>,
    notifier: Arc<Notifier>,
}

impl Control {
    pub fn new(kicks: Vec<Arc<dyn Kick>>, gate: Arc<Gate>, notifier: Arc<Notifier>) -> Arc<Self> {
        let state = State {
            target: Target::Paused,
            places: vec![Place::Parked; kicks.len()],
            clocks: vec![ThreadClock::Stopped(Duration::ZERO); kicks.len()],
            ended: false,
        };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new(), kicks, gate, notifier })
    }

    /// Ends the machine for `reason`; only the first reason counts. Any thread, a vCPU's too.
    pub fn end(&self, reason: EndReason) {
        let mut state = self.lock();
        if !state.ended {
            state.ended = true;
            self.notifier.send(MachineEvent::Ended(reason));
        }
        self.set(state, Target::Stopped);
    }

    /// Lets the vCPUs run. No effect after the end.
    pub fn resume(&self) {
        let state = self.lock();
        self.set(state, Target::Running);
    }

    /// Makes all vCPUs stand still and waits until they do; false if they do not in time.
    pub fn pause(&self, deadline: Instant) -> bool {
        self.ask_pause();
        self.wait_all(deadline, Place::is_still)
    }

    /// Asks all vCPUs to stand still. Any thread, a vCPU's too.
    pub fn ask_pause(&self) {
        let state = self.lock();
        self.set(state, Target::Paused);
    }

    /// Whether all vCPUs stand still and are meant to, and may yet go on.
    pub fn stands_still(&self) -> bool {
        let state = self.lock();
        state.target == Target::Paused && state.places.iter().all(|p| p.is_still())
    }

    /// Whether the vCPUs are meant to run.
    pub fn is_running(&self) -> bool {
        self.lock().target == Target::Running
    }

    /// Whether the machine has ended.
    pub fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Processor time that each vCPU's thread has used.
    pub fn cpu_times(&self) -> Vec<Duration> {
        self.lock().clocks.iter().map(|clock| clock.read()).collect()
    }

    fn set(&self, mut state: MutexGuard<'_, State>, target: Target) {
        // Stopped is final.
        if state.target != Target::Stopped {
            state.target = target;
        }
        // Under the lock, so that the gate hears of changes in their order.
        self.gate.set(match state.target {
            Target::Running => Passage::Open,
            Target::Paused => Passage::Shut,
            Target::Stopped => Passage::Ended,
        });
        drop(state);
        self.changed.notify_all();
        self.kicks.iter().for_each(|kick| kick.kick());
    }

    fn wait_all(&self, deadline: Instant, there: impl Fn(Place) -> bool) -> bool {
        let mut state = self.lock();
        while !state.places.iter().all(|&p| there(p)) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Parks vCPU `index` until it is to run; false if it is to end.
    fn may_run(&self, index: usize) -> bool {
        let mut state = self.lock();
        loop {
            match state.target {
                Target::Running if state.places[index] != Place::Halted => {
                    if state.places[index] == Place::Parked {
                        state.places[index] = Place::Running;
                    }
                    return true;
                }
                Target::Stopped => return false,
                Target::Paused if state.places[index] != Place::Halted => {
                    self.put(&mut state, index, Place::Parked);
                }
                _ => {}
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// vCPU `index` will never run again by itself. If that holds for all, the machine has ended.
    fn halted(&self, index: usize) {
        let mut state = self.lock();
        self.put(&mut state, index, Place::Halted);
        let running = |p: &Place| matches!(p, Place::Running | Place::Parked);
        if !state.places.iter().any(running) {
            drop(state);
            return self.end(EndReason::HaltedForever);
        }
        drop(state);
        // Those that have never started cannot tell by themselves: they sleep in their run.
        self.kicks.iter().for_each(|kick| kick.kick());
    }

    /// vCPU `index` was kicked: notes whether it waits to be started, if that matters.
    fn kicked(&self, index: usize, vcpu: &mut dyn Vcpu) {
        if !self.lock().places.contains(&Place::Halted) {
            return;
        }
        let waits = vcpu.state().is_ok_and(|s| s.mp_state == MpState::WaitForSipi);
        let mut state = self.lock();
        if !waits {
            if state.places[index] == Place::Waiting {
                self.put(&mut state, index, Place::Running);
            }
            return;
        }
        self.put(&mut state, index, Place::Waiting);
        if state.places.iter().all(|p| matches!(p, Place::Waiting | Place::Halted | Place::Gone)) {
            drop(state);
            self.end(EndReason::HaltedForever);
        }
    }

    fn put(&self, state: &mut MutexGuard<'_, State>, index: usize, place: Place) {
        state.places[index] = place;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads of one machine.
#[derive(Debug)]
pub(crate) struct VcpuThreads {
    control: Arc<Control>,
    vcpus: Vec<SharedVcpu>,
    threads: Vec<JoinHandle<()>>,
}

impl VcpuThreads {
    /// Starts a thread per vCPU, all parked.
    pub fn start(control: Arc<Control>, vcpus: Vec<Box<dyn Vcpu>>) -> io::Result<Self> {
        let vcpus = vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect();
        let mut started = Self { control, vcpus, threads: Vec::new() };
        for (index, vcpu) in started.vcpus.iter().enumerate() {
            let (control, vcpu) = (started.control.clone(), vcpu.clone());
            let thread = thread::Builder::new()
                .name(format!("mvm-vcpu-{index}"))
                .spawn(move || run(&control, index, &vcpu))?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    /// What `look` says of each vCPU, by index; `None` if one of them runs.
    pub fn with_vcpus<T>(&self, mut look: impl FnMut(&mut dyn Vcpu) -> T) -> Option<Vec<T>> {
        let look = |vcpu: &SharedVcpu| match vcpu.try_lock() {
            Ok(mut vcpu) => Some(look(&mut **vcpu)),
            Err(_) => None,
        };
        self.vcpus.iter().map(look).collect()
    }

    /// Makes all threads end and waits for them; false if one is still there at `deadline` (it is
    /// then left to the end of the process).
    pub fn stop(&mut self, deadline: Instant) -> bool {
        let state = self.control.lock();
        self.control.set(state, Target::Stopped);
        // A vCPU without a thread (starting one failed) is not waited for.
        let started = self.threads.len();
        let mut state = self.control.lock();
        state.places[started..].fill(Place::Gone);
        drop(state);
        if !self.control.wait_all(deadline, |p| p == Place::Gone) {
            return false;
        }
        for thread in self.threads.drain(..) {
            // A panic was caught and told on the thread itself.
            let _ = thread.join();
        }
        true
    }
}

fn lock(vcpu: &SharedVcpu) -> MutexGuard<'_, Box<dyn Vcpu>> {
    // After a panic the machine has ended, and nobody looks any more.
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Body of a vCPU's thread.
fn run(control: &Control, index: usize, vcpu: &SharedVcpu) {
    control.lock().clocks[index] = ThreadClock::Running(gettid());
    let died = catch_unwind(AssertUnwindSafe(|| run_until_stopped(control, index, vcpu)));
    if let Err(panic) = died {
        let message = panic
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "for an unknown reason".into());
        let fault = format!("vCPU {index}: internal error of mvm, please report it: {message}");
        control.end(EndReason::EngineFailed { fault });
    }
    let mut state = control.lock();
    state.clocks[index] = ThreadClock::Stopped(state.clocks[index].read());
    control.put(&mut state, index, Place::Gone);
}

fn run_until_stopped(control: &Control, index: usize, vcpu: &SharedVcpu) {
    while control.may_run(index) {
        // Nobody else wants it while it is not parked.
        let mut vcpu = lock(vcpu);
        match vcpu.run() {
            Ok(VmExit::Kicked) => control.kicked(index, &mut **vcpu),
            Ok(VmExit::HaltedForever) => control.halted(index),
            Ok(VmExit::TripleFault(fault)) => control.end(EndReason::triple_fault(&fault)),
            Ok(VmExit::InternalError(fault)) => control.end(EndReason::engine_failed(&fault)),
            Err(error) => control.end(EndReason::engine_failed(&error)),
        }
    }
}

/// Processor time of a thread of this process.
#[derive(Debug, Clone, Copy)]
enum ThreadClock {
    Running(Pid),
    Stopped(Duration),
}

impl ThreadClock {
    fn read(self) -> Duration {
        match self {
            // The clock of a thread by its id: ~tid << 3, per-thread 4, scheduler time 2
            // (clock_getcpuclockid(3) and the kernel's posix-timers.h).
            ThreadClock::Running(tid) => ClockId::from_raw(!tid.as_raw() << 3 | 4 | 2)
                .now()
                .map_or(Duration::ZERO, Duration::from),
            ThreadClock::Stopped(time) => time,
        }
    }
}
