//! Which vCPUs write the pages of a region of RAM: a word for each page, made when the first page near it is asked for.
//! So a region costs what of it is in use, and not what it is long.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU32;

/// Pages whose words are made together: they fill a page themselves.
const TOGETHER: usize = 1024;

/// The words of one region.
#[derive(Debug)]
pub(super) struct Writers(Box<[OnceLock<Box<[AtomicU32]>>]>);

impl Writers {
    /// Those of a region of `pages` pages, rounded up.
    pub fn new(pages: u64) -> Self {
        let pieces = pages.div_ceil(TOGETHER as u64);
        Self((0..pieces).map(|_| OnceLock::new()).collect())
    }

    /// The word of a page, if there is such a page. All who ask get the same one.
    #[inline]
    pub fn of(&self, page: u32) -> Option<&AtomicU32> {
        let page = page as usize;
        let piece = self.0.get(page / TOGETHER)?;
        piece
            .get_or_init(|| (0..TOGETHER).map(|_| AtomicU32::new(0)).collect())
            .get(page % TOGETHER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn words_are_made_where_they_are_asked_for() {
        let writers = Writers::new(3 * TOGETHER as u64 - 1);
        writers.of(2 * TOGETHER as u32 + 5).unwrap().fetch_or(3, Ordering::SeqCst);
        assert_eq!(writers.of(2 * TOGETHER as u32 + 5).unwrap().load(Ordering::SeqCst), 3);
        assert_eq!(writers.of(2 * TOGETHER as u32 + 4).unwrap().load(Ordering::SeqCst), 0);
        assert!(writers.of(3 * TOGETHER as u32).is_none());
        assert_eq!(writers.0.iter().filter(|piece| piece.get().is_some()).count(), 1);
    }
}
