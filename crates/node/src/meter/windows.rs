//! What is shown of the last seconds: medians, speed, and how busy each stage was.
//!
//! Windows belong to one placement; the meter makes new ones for the next. The clock is an argument.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::serving::HopParts;

/// Decode passes that medians and quantiles are taken over: some seconds of one stream.
const PASSES: usize = 512;

/// The span of time that a stage's busy share is taken over.
const BUSY_SPAN: Duration = Duration::from_secs(10);

/// Parts of that span; the share is over the last ones, so its span is up to one part short.
const BUSY_SLOTS: u64 = 20;

/// Length of a part.
const BUSY_SLOT: Duration = Duration::from_millis(BUSY_SPAN.as_millis() as u64 / BUSY_SLOTS);

/// Marks that the speed is taken over: as many tokens of a slow stream, and 2.5 s of a fast one.
const SPEED_MARKS: usize = 256;

/// Least time between two marks; so the many tokens of one pass are one mark.
const SPEED_STEP: Duration = Duration::from_millis(10);

/// A token so soon after a mark is of the same pass, and belongs to the mark.
const SPEED_BURST: Duration = Duration::from_millis(1);

/// A speed older than this is none.
const SPEED_FRESH: Duration = Duration::from_secs(30);

/// The value below which the share `q` of `values` lies, which get sorted; 0 for none.
pub fn quantile(values: &mut [f32], q: f32) -> f32 {
    values.sort_unstable_by(f32::total_cmp);
    let at = (values.len().saturating_sub(1) as f32 * q).round() as usize;
    values.get(at).copied().unwrap_or(0.0)
}

/// Adds a value to a window of the last [`PASSES`].
pub fn push<T>(window: &mut VecDeque<T>, value: T) {
    if window.len() == PASSES {
        window.pop_front();
    }
    window.push_back(value);
}

/// What the hops of one pass cost, in microseconds per hop.
#[derive(Debug, Clone, Copy)]
pub struct Hop {
    /// All that was not computing.
    pub total: f32,
    /// What that was.
    pub parts: HopParts,
}

/// The last hops of a stream that was alone in the ring.
#[derive(Debug, Clone, Default)]
pub struct Hops(VecDeque<Hop>);

impl Hops {
    /// Adds those of a pass.
    pub fn push(&mut self, hop: Hop) {
        push(&mut self.0, hop);
    }

    /// One number of each, to take quantiles of.
    pub fn values(&self, of: impl Fn(&Hop) -> f32) -> Vec<f32> {
        self.0.iter().map(of).collect()
    }
}

/// How much of the last ten seconds a stage computed.
#[derive(Debug)]
pub struct Busy {
    since: Instant,
    /// Computing time in slot `n`, at `n % BUSY_SLOTS`; older than the newest one's round are overwritten.
    slots: [Duration; BUSY_SLOTS as usize],
    newest: u64,
}

impl Busy {
    /// Counts from `since` on.
    pub fn new(since: Instant) -> Self {
        Self { since, slots: [Duration::ZERO; BUSY_SLOTS as usize], newest: 0 }
    }

    fn slot(&self, at: Instant) -> u64 {
        (at.saturating_duration_since(self.since).as_millis() / BUSY_SLOT.as_millis()) as u64
    }

    /// It computed for `span` until `end`. A span that reaches over several slots is spread over them.
    pub fn add(&mut self, end: Instant, span: Duration) {
        let mut end = end.saturating_duration_since(self.since);
        // What is older than the window is not seen any more.
        let mut left = span.min(BUSY_SPAN).min(end);
        let newest = self.slot(self.since + end);
        for slot in (self.newest + 1..=newest).rev().take(BUSY_SLOTS as usize) {
            self.slots[(slot % BUSY_SLOTS) as usize] = Duration::ZERO;
        }
        self.newest = self.newest.max(newest);
        while !left.is_zero() {
            // A span that ends where a slot begins lies in the slot before.
            let slot = ((end.as_nanos() - 1) / BUSY_SLOT.as_nanos()) as u64;
            let piece = left.min(end.saturating_sub(BUSY_SLOT.saturating_mul(slot as u32)));
            if slot + BUSY_SLOTS > self.newest {
                self.slots[(slot % BUSY_SLOTS) as usize] += piece;
            }
            left -= piece;
            end -= piece;
        }
    }

    /// The share at `now`, 0 to 1; over what has passed, if that is less than ten seconds.
    pub fn share(&self, now: Instant) -> f32 {
        let current = self.slot(now);
        let first = current.saturating_sub(BUSY_SLOTS - 1);
        let known = first..=self.newest.min(current);
        let busy: Duration =
            known.rev().take(BUSY_SLOTS as usize).map(|slot| self.slots[(slot % BUSY_SLOTS) as usize]).sum();
        let begin = BUSY_SLOT.saturating_mul(first as u32);
        let span = now.saturating_duration_since(self.since).saturating_sub(begin);
        if span.is_zero() { 0.0 } else { (busy.as_secs_f32() / span.as_secs_f32()).min(1.0) }
    }
}

/// Tokens per second, all sessions together.
#[derive(Debug, Default)]
pub struct Speed {
    /// When, and how many tokens there were then, that one counted.
    marks: VecDeque<(Instant, u64)>,
    last: Option<(Instant, u64)>,
    is_over: bool,
}

impl Speed {
    /// A token was chosen, the `n_tokens`th of all.
    pub fn token(&mut self, n_tokens: u64, now: Instant) {
        if std::mem::take(&mut self.is_over) {
            self.marks.clear();
        }
        self.last = Some((now, n_tokens));
        let since_mark = self.marks.back().map(|(last, _)| now.saturating_duration_since(*last));
        match (since_mark, self.marks.back_mut()) {
            (Some(age), Some(mark)) if age < SPEED_BURST => mark.1 = n_tokens,
            (Some(age), _) if age < SPEED_STEP => {}
            _ => {
                if self.marks.len() == SPEED_MARKS {
                    self.marks.pop_front();
                }
                self.marks.push_back((now, n_tokens));
            }
        }
    }

    /// Nothing is left to generate: the pause that follows is no part of the speed.
    pub fn pause(&mut self) {
        self.is_over = true;
    }

    /// The speed as seen at `now`; 0 if it is not known or long ago.
    pub fn per_second(&self, now: Instant) -> f32 {
        let (Some((begin, before)), Some((end, tokens))) = (self.marks.front(), self.last) else { return 0.0 };
        let span = end.saturating_duration_since(*begin);
        if span < SPEED_BURST || now.saturating_duration_since(end) > SPEED_FRESH {
            return 0.0;
        }
        (tokens - before) as f32 / span.as_secs_f32()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn quantiles_of_nothing_and_something() {
        assert_eq!(quantile(&mut [], 0.5), 0.0);
        assert_eq!(quantile(&mut [3.0, 1.0, 2.0], 0.5), 2.0);
        let mut hundred: Vec<f32> = (0..100).rev().map(|i| i as f32).collect();
        assert_eq!(quantile(&mut hundred, 0.99), 98.0);
    }

    #[test]
    fn a_stage_is_as_busy_as_it_computed() {
        let begin = Instant::now();
        let mut busy = Busy::new(begin);
        assert_eq!(busy.share(begin), 0.0);
        for i in 1..=300 {
            busy.add(begin + ms(100 * i), ms(25));
            let share = busy.share(begin + ms(100 * i));
            assert!((share - 0.25).abs() < 0.005, "{share} after {i} passes");
        }
        let end = begin + ms(30_000);
        let half = busy.share(end + ms(5_000));
        assert!((half - 0.125).abs() < 0.01, "{half} after five idle seconds");
        assert_eq!(busy.share(end + ms(10_001)), 0.0);
        assert_eq!(busy.share(end + ms(1_000_000)), 0.0);
    }

    #[test]
    fn a_long_pass_is_spread_over_the_time_that_it_took() {
        let begin = Instant::now();
        let mut busy = Busy::new(begin);
        busy.add(begin + ms(8_000), ms(4_000));
        assert!((busy.share(begin + ms(8_000)) - 0.5).abs() < 0.001);
        // A pass that is told of late, after a later one.
        busy.add(begin + ms(2_000), ms(2_000));
        assert!((busy.share(begin + ms(8_000)) - 0.75).abs() < 0.001);
        // Longer than everything since the placement, and longer than the window.
        busy.add(begin + ms(8_000), ms(90_000));
        assert_eq!(busy.share(begin + ms(8_000)), 1.0);
        busy.add(begin + ms(500_000), ms(300_000));
        assert_eq!(busy.share(begin + ms(500_000)), 1.0);
    }

    #[test]
    fn the_speed_counts_all_tokens_and_no_pauses() {
        let begin = Instant::now();
        let mut speed = Speed::default();
        assert_eq!(speed.per_second(begin), 0.0);
        let mut n_tokens = 0;
        let mut run = |speed: &mut Speed, begin: Instant, per_pass: u64| {
            for pass in 0..=1_000u64 {
                for _ in 0..per_pass {
                    n_tokens += 1;
                    speed.token(n_tokens, begin + ms(5 * pass));
                }
            }
            begin + ms(5_000)
        };
        let end = run(&mut speed, begin, 100);
        let rate = speed.per_second(end);
        assert!((rate / 20_000.0 - 1.0).abs() < 0.01, "{rate}");
        assert!(speed.marks.len() <= SPEED_MARKS);
        speed.pause();
        assert_eq!(speed.per_second(end), rate, "the last speed stays to be seen");
        assert_eq!(speed.per_second(end + ms(31_000)), 0.0);
        let end = run(&mut speed, end + ms(20_000), 1);
        let rate = speed.per_second(end);
        assert!((rate / 200.0 - 1.0).abs() < 0.01, "{rate}");
    }
}
