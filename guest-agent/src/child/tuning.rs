//! Scheduling, I/O priority and execution domain of a process.

use oci_spec::runtime::{
    IOPriorityClass, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, Scheduler,
};

use crate::error::{Context, Error, Result};
use crate::spec::Process;
use crate::sys::{self, SchedAttr};

/// The kernel's number of the execution domain that says it is a 32-bit machine.
const PER_LINUX32: u64 = 8;

/// Applies what the specification asks for to this process.
pub fn apply(process: &Process, personality: Option<&LinuxPersonality>) -> Result<()> {
    if let Some(io) = &process.io_priority {
        let class = match io.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        let level = u32::try_from(io.priority()).ok().filter(|level| *level < 8);
        let level = level.ok_or_else(|| {
            Error::Invalid(format!("process.ioPriority: priority {} is not 0 to 7", io.priority()))
        })?;
        sys::set_io_priority(class, level).context(|| "process.ioPriority".into())?;
    }
    if let Some(scheduler) = &process.scheduler {
        sys::set_scheduler(attributes(scheduler)?).context(|| "process.scheduler".into())?;
    }
    if let Some(personality) = personality {
        let domain = match personality.domain() {
            LinuxPersonalityDomain::PerLinux => 0,
            LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
        };
        sys::set_personality(domain).context(|| "linux.personality".into())?;
    }
    Ok(())
}

fn attributes(scheduler: &Scheduler) -> Result<SchedAttr> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(Error::Unsupported("process.scheduler: Linux has no SCHED_ISO".into()));
        }
    };
    let flags = scheduler.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
            }
    });
    let priority = u32::try_from(scheduler.priority().unwrap_or(0))
        .map_err(|_| Error::Invalid("process.scheduler: negative priority".into()))?;
    Ok(SchedAttr {
        policy: u32::try_from(policy).unwrap_or(0),
        flags,
        nice: scheduler.nice().unwrap_or(0),
        priority,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
        ..SchedAttr::default()
    })
}
