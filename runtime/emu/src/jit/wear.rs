//! Which pages have their code compared instead of watched (J22): those whose code is stored to all the time, by themselves or
//! since data lie beside it, for a while.

use std::time::{Duration, Instant};

use super::cache::Map;

/// So many ends of a page's code in such a time, and it is compared. Each end takes about a microsecond, with the store and what is
/// interpreted since: less than a hundredth of the time was lost so, and more is now.
const ENDS: u32 = 64;
const WINDOW: Duration = Duration::from_millis(8);
/// How long it is compared the first time. Each time is twice as long as the one before, up to so many times as long: what is
/// compared in vain costs more than what is watched in vain only as long as it runs often.
const TERM: Duration = Duration::from_millis(250);
const LONGEST: u32 = 64;
/// Pages that are remembered.
const PAGES: usize = 4096;

#[derive(Debug)]
struct Page {
    /// When its ends are counted from, and the generation that it had then. None: from the next one.
    since: Option<Instant>,
    generation: u32,
    /// Some of the code that ended since was translated.
    translated: bool,
    /// It is compared until then.
    until: Option<Instant>,
    /// Terms of the next time.
    terms: u32,
}

/// Pages whose code has ended, by host address.
#[derive(Debug, Default)]
pub struct Wear {
    pages: Map<Page>,
    /// When the first term is over.
    next: Option<Instant>,
    /// How many have begun.
    pub begun: u64,
}

impl Wear {
    /// The code of `page` has ended, whose generation is `generation` now; `translated` code among it. True: it is to be compared from
    /// now on.
    pub fn ended(&mut self, page: u64, generation: u32, translated: bool, now: Instant) -> bool {
        if self.pages.len() >= PAGES && !self.pages.contains_key(&page) {
            self.pages.retain(|_, page| page.until.is_some());
            if self.pages.len() >= PAGES {
                return false;
            }
        }
        let new = || Page { since: None, generation, translated, until: None, terms: 1 };
        let page = self.pages.entry(page).or_insert_with(new);
        page.translated |= translated;
        if page.until.is_some() {
            return false;
        }
        let in_window = |since| now.saturating_duration_since(since) <= WINDOW;
        if !page.since.is_some_and(in_window) {
            (page.since, page.generation, page.translated) = (Some(now), generation, translated);
        }
        if generation.wrapping_sub(page.generation) < ENDS || !page.translated {
            return false;
        }
        let until = now + TERM * page.terms;
        page.until = Some(until);
        self.begun += 1;
        page.terms = (page.terms * 2).min(LONGEST);
        self.next = Some(self.next.map_or(until, |next| next.min(until)));
        true
    }

    /// When a page is to be watched again, if one is compared.
    pub fn next(&self) -> Option<Instant> {
        self.next
    }

    /// The pages that are to be watched again.
    pub fn over(&mut self, now: Instant) -> Vec<u64> {
        let mut over = Vec::new();
        for (host, page) in &mut self.pages {
            if page.until.is_some_and(|until| until <= now) {
                (page.until, page.since) = (None, None);
                over.push(*host);
            }
        }
        self.next = self.pages.values().filter_map(|page| page.until).min();
        over
    }

    /// Bytes of memory, about.
    pub fn memory(&self) -> usize {
        self.pages.capacity() * (size_of::<(u64, Page)>() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_ends_all_the_time_is_compared_for_a_while_and_longer_the_next_time() {
        let (mut wear, mut now) = (Wear::default(), Instant::now());
        let mut generation = 0;
        let mut terms = Vec::new();
        for _ in 0..9 {
            let mut ended = |by| {
                generation += by;
                wear.ended(0x1000, generation, true, now)
            };
            ended(1);
            assert!(!ended(ENDS - 1), "not yet");
            assert!(ended(1));
            assert!(!ended(1000), "it is");
            let until = wear.next().unwrap();
            terms.push((until - now) / TERM.as_millis() as u32);
            assert!(wear.over(until - MS).is_empty());
            assert_eq!(wear.over(until), [0x1000]);
            assert_eq!(wear.next(), None);
            now = until;
        }
        assert_eq!(terms, [1, 2, 4, 8, 16, 32, 64, 64, 64].map(|times| MS * times));
    }

    #[test]
    fn what_ends_now_and_then_or_is_interpreted_is_not() {
        let (mut wear, now) = (Wear::default(), Instant::now());
        for i in 0..1000 {
            assert!(!wear.ended(0x1000, 10 * i, true, now + 2 * MS * i), "it runs in between");
            assert!(
                !wear.ended(0x2000, 10 * i, false, now),
                "watching it is what the interpreter does"
            );
        }
        assert!(wear.ended(0x2000, 9990, true, now));
    }

    #[test]
    fn few_pages_are_remembered() {
        let (mut wear, now) = (Wear::default(), Instant::now());
        wear.ended(0, 0, true, now);
        assert!(wear.ended(0, ENDS, true, now));
        assert!((1..100_000).all(|page| !wear.ended(page << 12, 0, true, now)));
        assert!(wear.pages.len() <= PAGES && wear.pages.contains_key(&0));
    }
}
