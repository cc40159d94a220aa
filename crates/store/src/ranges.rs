//! Which bytes of a file are still to come, and who fetches which.
//!
//! The bytes that are missing are ranges in ascending order. Each connection takes the first one, cut to a size, and
//! moves on in it; what it leaves goes back. All bytes before the first missing one can be hashed.

use std::collections::VecDeque;
use std::ops::Range;

/// Ranges that nobody fetches, and those that somebody does.
#[derive(Debug)]
pub struct Missing {
    free: VecDeque<Range<u64>>,
    /// By connection: what is still to come of the range that it took.
    taken: Vec<Option<Range<u64>>>,
    n_bytes: u64,
}

impl Missing {
    /// Of a file of `n_bytes`, fetched over at most `n_connections`; ranges that make no sense are made whole.
    pub fn new(n_bytes: u64, n_connections: usize, mut ranges: Vec<Range<u64>>) -> Self {
        ranges.iter_mut().for_each(|range| range.end = range.end.min(n_bytes));
        Self { free: merged(ranges).into(), taken: vec![None; n_connections], n_bytes }
    }

    /// Takes the next range, of at most `most` bytes, for a connection.
    pub fn take(&mut self, connection: usize, most: u64) -> Option<Range<u64>> {
        let first = self.free.front_mut()?;
        let end = first.end.min(first.start.saturating_add(most.max(1)));
        let range = first.start..end;
        first.start = end;
        if first.is_empty() {
            self.free.pop_front();
        }
        self.taken[connection] = Some(range.clone());
        Some(range)
    }

    /// So many bytes of a connection's range have come.
    pub fn advance(&mut self, connection: usize, n_bytes: u64) {
        if let Some(range) = &mut self.taken[connection] {
            range.start = range.end.min(range.start.saturating_add(n_bytes));
        }
    }

    /// A connection has fetched its range, or gives back what is left of it.
    pub fn release(&mut self, connection: usize) {
        if let Some(rest) = self.taken[connection].take().filter(|rest| !rest.is_empty()) {
            let at = self.free.partition_point(|range| range.start < rest.start);
            self.free.insert(at, rest);
        }
    }

    /// How many connections fetch something.
    pub fn n_busy(&self) -> usize {
        self.taken.iter().flatten().count()
    }

    /// All that is missing, in ascending order.
    pub fn all(&self) -> Vec<Range<u64>> {
        merged(self.free.iter().chain(self.taken.iter().flatten()).cloned().collect())
    }

    /// Bytes that are here.
    pub fn n_done(&self) -> u64 {
        let missing: u64 =
            self.free.iter().chain(self.taken.iter().flatten()).map(|range| range.end - range.start).sum();
        self.n_bytes - missing.min(self.n_bytes)
    }

    /// Bytes before the first missing one.
    pub fn frontier(&self) -> u64 {
        let first = self.free.front().map(|range| range.start);
        let taken = self.taken.iter().flatten().filter(|range| !range.is_empty()).map(|range| range.start);
        taken.chain(first).min().unwrap_or(self.n_bytes)
    }
}

/// In ascending order, neighbours joined, empty ones left out.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a list of ranges may have one")]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_taken_in_order_and_given_back() {
        let mut missing = Missing::new(100, 2, vec![0..100]);
        assert_eq!((missing.take(0, 30), missing.take(1, 30)), (Some(0..30), Some(30..60)));
        missing.advance(1, 20);
        assert_eq!((missing.n_done(), missing.frontier(), missing.n_busy()), (20, 0, 2));
        missing.advance(0, 30);
        assert_eq!(missing.frontier(), 50);
        missing.release(0);
        missing.release(1);
        assert_eq!(missing.all(), [50..100]);
        assert_eq!(missing.take(0, 1000), Some(50..60));
        assert_eq!(missing.take(1, 1000), Some(60..100));
        missing.advance(0, 10);
        missing.advance(1, 40);
        missing.release(1);
        missing.release(0);
        assert_eq!((missing.frontier(), missing.all(), missing.take(0, 1)), (100, vec![], None));
    }

    #[test]
    fn damaged_lists_are_made_whole() {
        let missing = Missing::new(100, 1, vec![90..200, 50..60, 55..70, 8..8, 300..400]);
        assert_eq!(missing.all(), [50..70, 90..100]);
        assert_eq!((missing.n_done(), missing.frontier()), (70, 50));
        #[expect(clippy::reversed_empty_ranges, reason = "what a damaged file may say")]
        let missing = Missing::new(100, 1, vec![60..50]);
        assert_eq!(missing.n_done(), 100);
    }
}
