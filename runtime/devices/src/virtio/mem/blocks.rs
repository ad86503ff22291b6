//! Which blocks of the region are plugged: a bit for each.

use std::ops::Range;

/// Blocks by number, from the region's start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blocks {
    words: Vec<u64>,
    count: usize,
    plugged: usize,
}

impl Blocks {
    /// `count` blocks, none of them plugged.
    pub fn new(count: usize) -> Self {
        Self { words: vec![0; count.div_ceil(64)], count, plugged: 0 }
    }

    /// As [`Blocks::words`] has shown them; `None` if there are not `count`.
    pub fn from_words(words: &[u64], count: usize) -> Option<Self> {
        let plugged = words.iter().map(|word| word.count_ones() as usize).sum();
        let blocks = Self { words: words.to_vec(), count, plugged };
        let tail = (count..words.len() * 64).all(|index| !blocks.is_plugged(index));
        (words.len() == count.div_ceil(64) && tail).then_some(blocks)
    }

    /// A bit for each block.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many are plugged.
    pub fn plugged(&self) -> usize {
        self.plugged
    }

    fn is_plugged(&self, index: usize) -> bool {
        self.words.get(index / 64).is_some_and(|word| word >> (index % 64) & 1 != 0)
    }

    /// How many of `range` are plugged.
    pub fn plugged_in(&self, range: Range<usize>) -> usize {
        range.filter(|&index| self.is_plugged(index)).count()
    }

    /// Plugs or unplugs all of `range`, as far as there are such blocks.
    pub fn set(&mut self, range: Range<usize>, plugged: bool) {
        for index in range.start..range.end.min(self.count) {
            let (word, bit) = (&mut self.words[index / 64], 1 << (index % 64));
            match (*word & bit != 0, plugged) {
                (false, true) => self.plugged += 1,
                (true, false) => self.plugged -= 1,
                _ => continue,
            }
            *word ^= bit;
        }
    }

    /// The plugged ones, neighbours in one piece.
    pub fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for index in (0..self.count).filter(|&index| self.is_plugged(index)) {
            match runs.last_mut() {
                Some(last) if last.end == index => last.end += 1,
                _ => runs.push(index..index + 1),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_and_come_in_runs() {
        let mut blocks = Blocks::new(130);
        blocks.set(60..70, true);
        blocks.set(65..68, false);
        blocks.set(129..500, true);
        assert_eq!(blocks.plugged(), 8);
        assert_eq!(blocks.plugged_in(0..130), 8);
        assert_eq!(blocks.plugged_in(64..66), 1);
        assert_eq!(blocks.runs(), [60..65, 68..70, 129..130]);
        assert_eq!(Blocks::from_words(blocks.words(), 130), Some(blocks.clone()));
        assert_eq!(Blocks::from_words(blocks.words(), 129), None, "a block too many");
        assert_eq!(Blocks::from_words(&blocks.words()[1..], 130), None);
    }
}
