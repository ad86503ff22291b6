//! The size of a machine that runs.

use std::time::{Duration, Instant};

use mvm_vmm::MemorySize;
use mvm_vmm::monitor::ControlClient;

use crate::error::Error;
use crate::guest::Guest;

/// How long a guest that is to take more memory may do nothing of the kind. Its kernel takes a piece at a time, within
/// milliseconds on a host that is not busy.
const STALL: Duration = Duration::from_secs(10);

/// How long a guest that gives memory back may make a pause: its device reminds it once a second of what it has not managed at
/// once.
const PAUSE: Duration = Duration::from_secs(3);

/// How long all of it may take, whatever progress there is: a guest is not trusted to get on with it.
const LONGEST: Duration = Duration::from_secs(600);

/// How often it is looked whether it has. No event of the guest tells: it is its kernel's own affair.
const LOOK: Duration = Duration::from_millis(10);

/// Makes the machine's memory `bytes` in all. More is there when this returns; less is asked for, and what the guest
/// cannot do without stays.
///
/// # Errors
/// The machine cannot have that much, or [`Error::NotGrown`]: nothing is asked for then but what it has taken.
pub fn resize(control: &mut ControlClient, guest: &Guest, bytes: u64) -> Result<MemorySize, Error> {
    let before = control.status()?.memory;
    // Before the guest hears of it.
    let known = guest.info()?.memory_total_bytes;
    control.resize(bytes)?;
    let wanted = control.status()?.memory.wanted;
    let more = wanted.saturating_sub(before.now);
    if more == 0 {
        return Ok(control.status()?.memory);
    }
    let now = reach(wanted, STALL, LONGEST, || Ok(control.status()?.memory.now))?;
    if now < wanted {
        control.resize(now)?;
        return Err(Error::NotGrown { now, wanted });
    }
    // The driver has it; the kernel puts it to use a moment later.
    let known = known.saturating_add(more);
    let used = reach(known, STALL, LONGEST, || Ok(guest.info()?.memory_total_bytes))?;
    if used < known {
        tracing::warn!(
            "the guest has plugged {more} bytes more, and its kernel says that it has {used} of {known}"
        );
    }
    Ok(control.status()?.memory)
}

/// Waits for a guest that is to give memory back, as long as it gets on with it.
///
/// # Errors
/// The monitor does not answer.
pub fn settle(control: &mut ControlClient) -> Result<MemorySize, Error> {
    let wanted = control.status()?.memory.wanted;
    // What is left, counted down.
    let left = |size: MemorySize| u64::MAX - size.now.saturating_sub(wanted);
    reach(u64::MAX, PAUSE, LONGEST, || Ok(left(control.status()?.memory)))?;
    Ok(control.status()?.memory)
}

/// Looks until the value is `goal` or more, or has not changed for `stall`, or `longest` is over. Returns the last one.
fn reach(
    goal: u64,
    stall: Duration,
    longest: Duration,
    mut look: impl FnMut() -> Result<u64, Error>,
) -> Result<u64, Error> {
    let begun = Instant::now();
    let (mut last, mut changed) = (look()?, begun);
    while last < goal && changed.elapsed() < stall && begun.elapsed() < longest {
        std::thread::sleep(LOOK);
        let now = look()?;
        if now != last {
            (last, changed) = (now, Instant::now());
        }
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_waited_for_as_long_as_there_is_some() {
        let mut steps = [5, 5, 6, 7, 9].into_iter();
        let mut look = || Ok(steps.next().unwrap());
        let long = Duration::from_secs(600);
        assert_eq!(reach(8, long, long, &mut look).unwrap(), 9);
        assert_eq!(reach(8, Duration::ZERO, long, || Ok(7)).unwrap(), 7, "it is given up");
        assert_eq!(reach(8, Duration::from_millis(30), long, || Ok(7)).unwrap(), 7);
        assert!(reach(8, STALL, long, || Err(Error::Interrupted)).is_err());
    }

    #[test]
    fn a_guest_that_dawdles_is_waited_for_so_long_and_no_longer() {
        let (mut now, long) = (0, Duration::from_secs(600));
        let dawdle = || {
            now += 1;
            Ok(now)
        };
        let reached = reach(u64::MAX, long, Duration::from_millis(30), dawdle).unwrap();
        assert!((1..u64::MAX).contains(&reached));
    }
}
