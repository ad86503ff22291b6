//! How another process that stores to the guest's RAM reaches vCPUs which run translated code.
//!
//! A vCPU that looks at a [`CodePage`](crate::CodePage) before each block needs no notice. Translated code goes from
//! block to block without a look, and leaves only when its run word is zero. So whoever ends cached
//! code clears the run words after the page's record has been told and before it stores anything
//! else: a guest that sees a later store (the used index of a queue) finds the word cleared.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// vCPUs that can have a run word.
pub const RUN_WORDS: usize = 32;

/// A word in a cache line of its own: others clear it while its vCPU reads it at each block.
#[derive(Debug, Default)]
#[repr(C, align(64))]
struct RunWord(AtomicU32);

/// The run words, in memory that the processes share.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Notices {
    /// How often code went stale by a store of another process.
    count: AtomicU64,
    run: [RunWord; RUN_WORDS],
}

impl Notices {
    /// Notices given so far. A vCPU that knows of all of them may set its run word, if it then asks
    /// again.
    #[inline]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// The run word of `vcpu`: translated code runs on while it is not zero.
    #[inline]
    pub fn run_word(&self, vcpu: usize) -> Option<&AtomicU32> {
        self.run.get(vcpu).map(|word| &word.0)
    }

    /// Gives notice that code of some page went stale.
    pub fn give(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
        for word in &self.run {
            word.0.store(0, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_clears_what_runs_and_counts() {
        let notices = Notices::default();
        let word = notices.run_word(RUN_WORDS - 1).unwrap();
        word.store(1, Ordering::SeqCst);
        notices.give();
        assert_eq!((word.load(Ordering::SeqCst), notices.count()), (0, 1));
        assert!(notices.run_word(RUN_WORDS).is_none());
    }
}
