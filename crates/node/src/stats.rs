//! What a ring measured of itself: speed, each stage's time, and what the software between them costs.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use brigade_protocol::frame::{HEADER_BYTES, Timing};
use brigade_protocol::passes::Pass;

/// Decode passes that medians and quantiles are taken over: some seconds of one stream.
const WINDOW: usize = 512;

/// Tokens that the speed is taken over.
const SPEED_WINDOW: usize = 64;

/// A speed older than this is none.
const SPEED_FRESH: Duration = Duration::from_secs(30);

/// Measurements of one ring, written by its thread and read by whoever asks.
#[derive(Debug, Default)]
pub struct RingStats(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    running: usize,
    waiting: usize,
    tokens: u64,
    token_times: VecDeque<Instant>,
    /// For each worker in ring order and last the tail: milliseconds of recent decode passes.
    stage_ms: Vec<VecDeque<f32>>,
    /// Microseconds between stages, of recent decode passes that were alone in the ring.
    hop_us: VecDeque<f32>,
    bytes_per_token: u64,
}

fn push<T>(window: &mut VecDeque<T>, value: T, most: usize) {
    if window.len() == most {
        window.pop_front();
    }
    window.push_back(value);
}

/// The value below which the share `q` of a window lies; 0 for an empty one.
pub fn quantile(values: impl IntoIterator<Item = f32>, q: f32) -> f32 {
    let mut sorted: Vec<f32> = values.into_iter().collect();
    sorted.sort_by(f32::total_cmp);
    let at = (sorted.len().saturating_sub(1) as f32 * q).round() as usize;
    sorted.get(at).copied().unwrap_or(0.0)
}

/// Whether every row is the next token of its session.
fn is_decode(pass: &Pass) -> bool {
    !pass.tokens.is_empty() && pass.sets.iter().all(|set| set.n_rows <= 1)
}

impl RingStats {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what was measured, but not the number of tokens, nor what a row weighs.
    pub fn reset(&self) {
        let mut inner = self.lock();
        *inner = Inner { tokens: inner.tokens, bytes_per_token: inner.bytes_per_token, ..Inner::default() };
    }

    /// Sessions that have a slot, and that wait for one.
    pub fn set_load(&self, running: usize, waiting: usize) {
        let mut inner = self.lock();
        (inner.running, inner.waiting) = (running, waiting);
    }

    /// A token was chosen.
    pub fn token(&self) {
        let mut inner = self.lock();
        inner.tokens += 1;
        push(&mut inner.token_times, Instant::now(), SPEED_WINDOW);
    }

    /// A pass came back from the last worker after `around`, with what each worker spent.
    pub fn pass_back(&self, pass: &Pass, around: Duration, timings: &[Timing]) {
        if !is_decode(pass) {
            return;
        }
        let mut inner = self.lock();
        inner.stage_ms.resize_with(timings.len() + 1, VecDeque::new);
        for (window, timing) in inner.stage_ms.iter_mut().zip(timings) {
            push(window, timing.compute_us as f32 / 1000.0, WINDOW);
        }
        if pass.tokens.len() == 1 {
            let computing: u64 = timings.iter().map(|t| u64::from(t.compute_us)).sum();
            let hops = timings.len() as f32 + 1.0;
            let software = around.as_micros() as f32 - computing as f32;
            push(&mut inner.hop_us, (software / hops).max(0.0), WINDOW);
        }
    }

    /// The tail was computed.
    pub fn tail_done(&self, pass: &Pass, compute: Duration) {
        if !is_decode(pass) {
            return;
        }
        let mut inner = self.lock();
        if inner.stage_ms.is_empty() {
            inner.stage_ms.push(VecDeque::new());
        }
        if let Some(window) = inner.stage_ms.last_mut() {
            push(window, compute.as_secs_f32() * 1000.0, WINDOW);
        }
    }

    /// Notes what a decode row weighs on a link.
    pub fn set_row_bytes(&self, n_embd: u32) {
        self.lock().bytes_per_token = u64::from(n_embd) * 4 + HEADER_BYTES as u64 + 16;
    }

    /// Sessions with a slot and waiting.
    pub fn load(&self) -> (usize, usize) {
        let inner = self.lock();
        (inner.running, inner.waiting)
    }

    /// Tokens since the start.
    pub fn tokens(&self) -> u64 {
        self.lock().tokens
    }

    /// Tokens per second over the last tokens, all sessions together.
    pub fn tokens_per_second(&self) -> f32 {
        let inner = self.lock();
        let (Some(first), Some(last)) = (inner.token_times.front(), inner.token_times.back()) else { return 0.0 };
        let span = last.duration_since(*first).as_secs_f32();
        if last.elapsed() > SPEED_FRESH || span <= 0.0 {
            return 0.0;
        }
        (inner.token_times.len() - 1) as f32 / span
    }

    /// Median milliseconds of a decode pass in stage `k`, counted in ring order with the tail last.
    pub fn stage_ms(&self, k: usize) -> f32 {
        self.lock().stage_ms.get(k).map_or(0.0, |window| quantile(window.iter().copied(), 0.5))
    }

    /// Median and 99th percentile of the microseconds that software and links cost per hop.
    pub fn hop_us(&self) -> (f32, f32) {
        let inner = self.lock();
        let at = |q| quantile(inner.hop_us.iter().copied(), q);
        (at(0.5), at(0.99))
    }

    /// Bytes that each link carries for one decode row.
    pub fn bytes_per_token(&self) -> u64 {
        self.lock().bytes_per_token
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use brigade_base::PassId;
    use brigade_protocol::frame::RowSet;

    #[test]
    fn quantiles_of_nothing_and_something() {
        assert_eq!(quantile([], 0.5), 0.0);
        assert_eq!(quantile([3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile((0..100).map(|i| i as f32), 0.99), 98.0);
    }

    #[test]
    fn a_hop_costs_what_is_not_computing() {
        let stats = RingStats::default();
        let set = RowSet { slot: 0, keep: 3, n_rows: 1, n_outputs: 1 };
        let pass = Pass { id: PassId(1), sets: vec![set], tokens: vec![1] };
        let timings = [Timing { compute_us: 400, software_us: 9 }, Timing { compute_us: 300, software_us: 9 }];
        stats.pass_back(&pass, Duration::from_micros(1000), &timings);
        stats.tail_done(&pass, Duration::from_micros(500));
        assert_eq!(stats.hop_us(), (100.0, 100.0));
        assert_eq!((stats.stage_ms(0), stats.stage_ms(2)), (0.4, 0.5));
    }
}
