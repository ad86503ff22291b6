//! The tiny machine: whether a guest's ring 0 runs, and how fast.
//!
//! It has one vCPU without interrupt controller, 64 KiB of RAM and a thread of its own with all
//! signals blocked. Its guests end by themselves; the deadline is for a host that is broken or far
//! too busy. The kick works without a signal handler, which a process has only one of:
//! KVM_SET_SIGNAL_MASK lets one blocked signal end KVM_RUN, and that signal stays pending.

use std::fs::File;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use mvm_memory::GuestRam;
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::time::{ClockId, clock_gettime};
use vmm_sys_util::signal::{self, Killable};

use super::facts::{Instruction, Loop, Measured, RunEnd, Trial};
use super::guest::{self, LOOP_INSTRUCTIONS, Program};
use super::{facts, needs};
use crate::kvm::sys;

/// How long the whole may take by the clock: a busy host has a hundred times what it needs.
const DEADLINE: Duration = Duration::from_millis(500);

/// How long the thread has for coming back once it was kicked.
const GRACE: Duration = Duration::from_millis(200);

/// A loop that takes this much processor time is long enough.
const ENOUGH: Duration = Duration::from_millis(1);

/// Turns of the first loop: a millisecond where the host's kernel interprets.
const FIRST_TURNS: u64 = 256;

/// Turns of the longest loop: some milliseconds of a slow processor.
const MOST_TURNS: u64 = 1 << 22;

/// Looks behind the open device. There is no second trial if its outcome is `known`.
///
/// # Errors
/// The host refuses a descriptor or a thread.
pub fn measure(device: &File, known: Option<Trial>) -> std::io::Result<facts::Kvm> {
    let kvm = sys::kvm_from(device.try_clone()?.into());
    let api_version = kvm.get_api_version();
    if api_version != needs::API_VERSION {
        return Ok(facts::Kvm { api_version, missing: Vec::new(), trial: Trial::Skipped });
    }
    let missing = needs::unmet(&kvm).iter().map(|need| need.name.to_owned()).collect();
    let trial = match known {
        Some(trial) => trial,
        None => on_a_thread(DEADLINE, move || trial(&kvm))?,
    };
    Ok(facts::Kvm { api_version, missing, trial })
}

/// Runs `trial` on a thread, and makes its vCPU stop when the time is over.
fn on_a_thread(
    deadline: Duration,
    trial: impl FnOnce() -> Trial + Send + 'static,
) -> std::io::Result<Trial> {
    let (tell, told) = mpsc::channel();
    // The thread begins with this one's signal mask: a kick finds it blocked, however early.
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    let thread = thread::Builder::new().name("mvm-probe".into()).spawn(move || {
        // Nobody listens any more if it took too long.
        let _ = tell.send(trial());
    });
    before.thread_set_mask()?;
    let thread = thread?;
    if let Ok(outcome) = told.recv_timeout(deadline) {
        return Ok(outcome);
    }
    // Fails only if there is no such signal, which there is.
    let _ = thread.kill(kick_signal());
    Ok(told.recv_timeout(GRACE).unwrap_or(Trial::Stuck))
}

fn trial(kvm: &Kvm) -> Trial {
    let vm = match kvm.create_vm() {
        Ok(vm) => vm,
        Err(e) => return Trial::NoVm { errno: e.errno() },
    };
    match Machine::new(kvm, vm).and_then(|mut machine| machine.measure()) {
        Ok(measured) => Trial::Ran(measured),
        Err(Step { step, errno }) => Trial::Failed { step: step.into(), errno },
    }
}

/// A step that failed.
struct Step {
    step: &'static str,
    errno: i32,
}

fn step(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> Step {
    move |e| Step { step, errno: e.errno() }
}

struct Machine {
    vcpu: VcpuFd,
    /// Keeps the memory slots.
    _vm: VmFd,
    ram: GuestRam,
}

impl Machine {
    fn new(kvm: &Kvm, vm: VmFd) -> Result<Self, Step> {
        let ram = GuestRam::new(&[(0, guest::RAM_SIZE)])
            .map_err(|_| Step { step: "guest memory", errno: 0 })?;
        for (slot, region) in (0..).zip(ram.regions()) {
            sys::set_slot(&vm, slot, region, 0..region.size, false)
                .map_err(step("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let vcpu = vm.create_vcpu(0).map_err(step("KVM_CREATE_VCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(step("KVM_GET_SUPPORTED_CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(step("KVM_SET_CPUID2"))?;
        sys::only_ended_by(&vcpu, kick_signal()).map_err(step("KVM_SET_SIGNAL_MASK"))?;
        Ok(Self { vcpu, _vm: vm, ram })
    }

    fn measure(&mut self) -> Result<Measured, Step> {
        let integer = self.time_loop()?;
        let mut instructions = Vec::new();
        for (name, program) in [("pxor", Program::Pxor), ("cmpxchg16b", Program::Cmpxchg16b)] {
            let end = self.run(program)?;
            instructions.push(Instruction { name: name.into(), end });
        }
        Ok(Measured { integer, instructions })
    }

    /// Longer and longer loops, until one takes long enough to be measured.
    fn time_loop(&mut self) -> Result<Loop, Step> {
        let mut turns = FIRST_TURNS;
        loop {
            let before = cpu_time();
            let end = self.run(Program::Loop(turns))?;
            let spent = cpu_time().saturating_sub(before);
            if end != RunEnd::Done || spent >= ENOUGH || turns >= MOST_TURNS {
                let cpu_ns = u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX);
                return Ok(Loop { end, instructions: turns * LOOP_INSTRUCTIONS, cpu_ns });
            }
            turns *= 8;
        }
    }

    fn run(&mut self, program: Program) -> Result<RunEnd, Step> {
        let placed = program.place(self.ram.memory());
        placed.map_err(|_| Step { step: "guest memory", errno: 0 })?;
        let sregs = self.vcpu.get_sregs().map_err(step("KVM_GET_SREGS"))?;
        let sregs = guest::system_registers(sregs);
        self.vcpu.set_sregs(&sregs).map_err(step("KVM_SET_SREGS"))?;
        self.vcpu.set_regs(&program.registers()).map_err(step("KVM_SET_REGS"))?;
        let end = match self.vcpu.run() {
            Ok(VcpuExit::Hlt) => None,
            Ok(VcpuExit::InternalError) => {
                Some(RunEnd::InternalError { suberror: sys::internal_error(&mut self.vcpu).0 })
            }
            Ok(VcpuExit::FailEntry(reason, _)) => Some(RunEnd::FailEntry { reason }),
            Ok(VcpuExit::Shutdown) => Some(RunEnd::Shutdown),
            Ok(exit) => Some(RunEnd::Unexpected { exit: format!("{exit:?}") }),
            Err(e) if e.errno() == libc::EINTR => Some(RunEnd::Overdue),
            Err(e) => Some(RunEnd::Refused { errno: e.errno() }),
        };
        if let Some(end) = end {
            return Ok(end);
        }
        let regs = self.vcpu.get_regs().map_err(step("KVM_GET_REGS"))?;
        let right = program.is_right(self.ram.memory(), &regs);
        Ok(if right { RunEnd::Done } else { RunEnd::Wrong })
    }
}

/// The signal that ends a run. Blocked in the thread that runs, and so never delivered. The engine's is
/// another one.
fn kick_signal() -> i32 {
    signal::SIGRTMIN()
}

/// Processor time of this thread.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The host's KVM, if a machine can be made.
    fn machine() -> Option<(Kvm, VmFd)> {
        let kvm = Kvm::new().ok()?;
        let vm = kvm.create_vm().ok()?;
        Some((kvm, vm))
    }

    #[test]
    fn a_guest_without_end_is_ended() {
        let Some((kvm, vm)) = machine() else { return };
        let outcome = on_a_thread(Duration::from_millis(50), move || {
            let ends = Machine::new(&kvm, vm).and_then(|mut machine| {
                let first = machine.run(Program::Forever)?;
                // The kick is still pending, so that no later run can outlast it.
                Ok([first, machine.run(Program::Forever)?])
            });
            match ends {
                Ok([RunEnd::Overdue, RunEnd::Overdue]) => Trial::Skipped,
                Ok(ends) => Trial::Failed { step: format!("{ends:?}"), errno: 0 },
                Err(Step { step, errno }) => Trial::Failed { step: step.into(), errno },
            }
        });
        assert_eq!(outcome.unwrap(), Trial::Skipped);
    }

    #[test]
    fn a_thread_that_does_not_come_back_is_given_up() {
        let (keep, wait) = mpsc::channel::<()>();
        let outcome = on_a_thread(Duration::ZERO, move || {
            let _ = wait.recv();
            Trial::Skipped
        });
        assert_eq!(outcome.unwrap(), Trial::Stuck);
        drop(keep);
    }

    #[test]
    fn the_loop_does_what_it_is_for() {
        let Some((kvm, vm)) = machine() else { return };
        let outcome = on_a_thread(DEADLINE, move || {
            match Machine::new(&kvm, vm).and_then(|mut m| m.run(Program::Loop(1000))) {
                Ok(RunEnd::Done) => Trial::Skipped,
                Ok(end) => Trial::Failed { step: format!("{end:?}"), errno: 0 },
                Err(Step { step, errno }) => Trial::Failed { step: step.into(), errno },
            }
        });
        assert_eq!(outcome.unwrap(), Trial::Skipped);
    }
}
