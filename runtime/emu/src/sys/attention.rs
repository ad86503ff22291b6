//! How other threads reach a vCPU: one atomic word, and a wake-up if it sleeps.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mvm_memory::PageTracker;

/// Reasons for attention: bits of the word.
#[allow(missing_docs)]
pub mod reason {
    /// An interrupt was posted, or a held one may be deliverable now.
    pub const INTERRUPT: u32 = 1 << 0;
    /// A non-maskable interrupt.
    pub const NMI: u32 = 1 << 1;
    /// INIT.
    pub const INIT: u32 = 1 << 2;
    /// Start-up IPI; the vector is beside the word.
    pub const SIPI: u32 = 1 << 3;
    /// Somebody wants `run` to return.
    pub const KICK: u32 = 1 << 4;
    /// A paravirtual kick: leave HLT.
    pub const UNHALT: u32 = 1 << 5;
    /// The engine's own: come to a block boundary and look.
    pub const SYNC: u32 = 1 << 6;
    /// What starts a vCPU again that halted with interrupts off or waits for a start-up IPI.
    pub const WAKING: u32 = NMI | INIT | SIPI | UNHALT;
    /// The vCPU thread sleeps on the word.
    pub const SLEEPING: u32 = 1 << 31;
}

/// The attention word of one vCPU.
///
/// The vCPU looks at it with a plain load before every block; everyone else sets bits. A bit is
/// set after what it announces, and taken before that is looked at.
#[derive(Debug, Default)]
pub struct Attention {
    word: AtomicU32,
    run: OnceLock<RunWord>,
}

/// For translated code, which can test for zero without touching flags: not zero as long as the attention word is zero.
/// It may be zero while that is; it is never left at one when that is not. Besides those who raise attention,
/// other processes clear it ([`mvm_memory::Notices`]).
#[derive(Debug)]
struct RunWord {
    memory: PageTracker,
    vcpu: usize,
}

impl RunWord {
    fn word(&self) -> Option<&AtomicU32> {
        self.memory.notices().run_word(self.vcpu)
    }

    fn set(&self, value: u32) {
        if let Some(word) = self.word() {
            word.store(value, Ordering::SeqCst);
        }
    }
}

impl Attention {
    /// From now on there is a run word: that of `vcpu` among the notices of `memory`, the machine's first region.
    pub fn keep_run_word(&self, memory: PageTracker, vcpu: u32) {
        let _ = self.run.set(RunWord { memory, vcpu: vcpu as usize });
    }

    /// Is there anything to look at?
    #[inline(always)]
    pub fn any(&self) -> bool {
        self.word.load(Ordering::Relaxed) != 0
    }

    /// Is one of `reasons` waiting to be taken?
    pub fn waits(&self, reasons: u32) -> bool {
        self.word.load(Ordering::SeqCst) & reasons != 0
    }

    /// Sets `reasons` and wakes the vCPU if it sleeps. Any thread.
    pub fn raise(&self, reasons: u32) {
        let before = self.word.fetch_or(reasons, Ordering::SeqCst);
        self.stop_running();
        if before & reason::SLEEPING != 0 {
            futex::wake(&self.word);
        }
    }

    /// Sets `reasons` on the vCPU's own thread, which is awake.
    #[inline]
    pub fn raise_self(&self, reasons: u32) {
        self.word.fetch_or(reasons, Ordering::Relaxed);
        self.stop_running();
    }

    /// Clears the run word.
    #[inline]
    fn stop_running(&self) {
        if let Some(run) = self.run.get() {
            run.set(0);
        }
    }

    /// Sets the run word if there is no reason not to, and `notices` is all that other processes have given
    /// notice of. Its address, or nothing if there is a reason.
    #[inline]
    pub fn clear_to_run(&self, notices: u64) -> Option<*const AtomicU32> {
        let run = self.run.get()?;
        let word = run.word()?;
        if word.load(Ordering::Relaxed) == 0 {
            // Whoever clears it has set a bit or counted before: that is seen here, or the word is cleared after this.
            word.store(1, Ordering::SeqCst);
            if self.word.load(Ordering::SeqCst) != 0 || run.memory.notices().count() != notices {
                word.store(0, Ordering::SeqCst);
                return None;
            }
        }
        (!self.any()).then_some(std::ptr::from_ref(word))
    }

    /// Takes all reasons.
    pub fn take(&self) -> u32 {
        self.word.swap(0, Ordering::SeqCst) & !reason::SLEEPING
    }

    /// Is the owner asleep (or about to be)?
    pub fn sleeping(&self) -> bool {
        self.word.load(Ordering::SeqCst) & reason::SLEEPING != 0
    }

    /// Sleeps until a reason is raised or `timeout` is over. Only the owner calls this. Returns at
    /// once if there is a reason already.
    pub fn sleep(&self, timeout: Option<Duration>) {
        let asleep =
            self.word.compare_exchange(0, reason::SLEEPING, Ordering::SeqCst, Ordering::SeqCst);
        if asleep.is_err() {
            return;
        }
        futex::wait(&self.word, reason::SLEEPING, timeout);
        self.word.fetch_and(!reason::SLEEPING, Ordering::SeqCst);
    }
}

mod futex {
    //! futex(2), private to the process.
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    /// Sleeps while `*word == expected`, at most for `timeout`. May return early.
    pub fn wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) {
        let timeout = timeout.map(|t| libc::timespec {
            tv_sec: libc::time_t::try_from(t.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: t.subsec_nanos().into(),
        });
        let pointer = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the word outlives the call, `pointer` is null or points to a timespec that does.
        // Every result means "look again", which the caller does.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                expected,
                pointer,
            );
        }
    }

    /// Wakes the sleeper.
    pub fn wake(word: &AtomicU32) {
        // SAFETY: the word outlives the call; waking nobody is no error.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                1,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Instant;

    use vm_memory::bitmap::NewBitmap as _;

    #[test]
    fn a_reason_before_sleep_is_not_lost() {
        let attention = Attention::default();
        attention.raise(reason::KICK);
        let start = Instant::now();
        attention.sleep(Some(Duration::from_secs(20)));
        assert!(start.elapsed() < Duration::from_secs(10));
        assert_eq!(attention.take(), reason::KICK);
        assert!(!attention.any());
    }

    #[test]
    fn the_run_word_is_one_only_while_nothing_is_to_be_looked_at() {
        let (attention, memory) = (Attention::default(), PageTracker::with_len(4096));
        assert!(attention.clear_to_run(0).is_none(), "there is none");
        attention.keep_run_word(memory.clone(), 1);
        let read = || memory.notices().run_word(1).unwrap().load(Ordering::SeqCst);
        assert!(attention.clear_to_run(0).is_some() && read() == 1);
        attention.raise(reason::KICK);
        assert!(read() == 0 && attention.clear_to_run(0).is_none() && read() == 0);
        attention.take();
        assert!(attention.clear_to_run(0).is_some() && read() == 1);
        memory.notices().give();
        assert!(read() == 0 && attention.clear_to_run(0).is_none() && read() == 0);
        assert!(attention.clear_to_run(1).is_some() && read() == 1);
    }

    #[test]
    fn raise_wakes_a_sleeper() {
        let attention = Arc::new(Attention::default());
        let other = attention.clone();
        let sleeper = std::thread::spawn(move || {
            other.sleep(Some(Duration::from_secs(30)));
            other.take()
        });
        while !attention.sleeping() {
            std::thread::yield_now();
        }
        attention.raise(reason::NMI);
        assert_eq!(sleeper.join().unwrap(), reason::NMI);
    }

    #[test]
    fn sleep_ends_with_its_timeout_and_leaves_no_trace() {
        let attention = Attention::default();
        attention.sleep(Some(Duration::from_millis(5)));
        assert!(!attention.any() && !attention.sleeping());
    }
}
