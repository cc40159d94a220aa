//! Which pass a ring waits for, and how long such passes take: what tells a stuck pass from a slow one.
//!
//! The ring's thread says what it waits for; the owner loop, which hears the heartbeats of all stages, asks whether it
//! waits for too long. A pass is late when it takes four times as long as passes with as many rows did lately, and
//! never before a second has passed; what has not been seen yet gets half a minute.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use brigade_base::PassId;

use crate::threads::lock;

/// No pass is late before: four heartbeats.
const LEAST: Duration = Duration::from_secs(1);

/// A pass of a size that was not seen yet is late after this: the largest operation of the largest model on one core.
const UNKNOWN: Duration = Duration::from_secs(30);

/// How many times as long as usual a late pass takes.
const LATE: u32 = 4;

/// Weight of the newest pass in the running average: the last dozen count.
const NEWEST: f64 = 1.0 / 8.0;

/// Kinds of passes, by the number of their rows: each twice as many.
const N_SIZES: usize = 16;

/// The pass that a ring waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Awaited {
    /// The pass.
    pub pass: PassId,
    /// Since when it is the oldest on its way.
    pub since: Instant,
    /// When it will be late.
    pub late: Instant,
}

/// Shared between the ring's thread and the owner loop.
#[derive(Debug, Default)]
pub struct Watch(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    awaited: Option<(Awaited, usize)>,
    /// Average seconds of the passes of each size; 0 before the first.
    usual: [f64; N_SIZES],
}

impl State {
    fn late_after(&self, size: usize) -> Duration {
        // A larger pass that is known bounds a smaller one; a smaller one says what twice as much takes.
        let larger = self.usual[size..].iter().copied().find(|s| *s > 0.0);
        let smaller = || (0..size).rev().find(|at| self.usual[*at] > 0.0);
        let expected = match (self.usual[size], smaller()) {
            (known, _) if known > 0.0 => known,
            (_, Some(at)) => self.usual[at] * f64::from(1u32 << (size - at)),
            _ => match larger {
                Some(larger) => larger,
                None => return UNKNOWN,
            },
        };
        (Duration::from_secs_f64(expected.min(3600.0)) * LATE).max(LEAST)
    }
}

/// Passes of as many rows are alike.
fn size_of(n_rows: u32) -> usize {
    (u32::BITS - n_rows.leading_zeros()).min(N_SIZES as u32 - 1) as usize
}

impl Watch {
    /// Says which pass is awaited from `since` on, and how many rows it has; `None` if nothing is on its way.
    pub fn set(&self, awaited: Option<(PassId, u32, Instant)>) {
        let mut state = lock(&self.0);
        state.awaited = awaited.map(|(pass, n_rows, since)| {
            let size = size_of(n_rows);
            (Awaited { pass, since, late: since + state.late_after(size) }, size)
        });
    }

    /// The pass that was awaited is back.
    pub fn back(&self, at: Instant) {
        let mut state = lock(&self.0);
        let Some((awaited, size)) = state.awaited.take() else { return };
        let took = at.saturating_duration_since(awaited.since).as_secs_f64();
        let usual = &mut state.usual[size];
        *usual = if *usual == 0.0 { took } else { *usual + NEWEST * (took - *usual) };
    }

    /// The pass that is awaited, if one is.
    pub fn awaited(&self) -> Option<Awaited> {
        lock(&self.0).awaited.map(|(awaited, _)| awaited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn late_after(watch: &Watch, n_rows: u32) -> Duration {
        let now = Instant::now();
        watch.set(Some((PassId(1), n_rows, now)));
        let awaited = watch.awaited().unwrap();
        assert_eq!((awaited.pass, awaited.since), (PassId(1), now));
        awaited.late - now
    }

    fn passes(watch: &Watch, n_rows: u32, took: Duration) {
        for _ in 0..30 {
            let now = Instant::now();
            watch.set(Some((PassId(1), n_rows, now)));
            watch.back(now + took);
        }
    }

    #[test]
    fn what_was_never_seen_has_much_time() {
        assert_eq!(late_after(&Watch::default(), 4), UNKNOWN);
    }

    #[test]
    fn a_pass_is_late_after_four_times_the_usual() {
        let watch = Watch::default();
        passes(&watch, 4, Duration::from_secs(2));
        let about = |duration: Duration, s: f64| (duration.as_secs_f64() - s).abs() < 1e-6;
        assert!(about(late_after(&watch, 5), 8.0), "as many rows, about");
        assert!(about(late_after(&watch, 40), 64.0), "eight times as many");
        assert!(about(late_after(&watch, 1), 8.0), "fewer take no longer");
        passes(&watch, 4, Duration::from_secs(1));
        assert!(late_after(&watch, 4) < Duration::from_secs_f64(4.1), "the usual follows");
    }

    #[test]
    fn quick_passes_have_a_second() {
        let watch = Watch::default();
        passes(&watch, 1, Duration::from_millis(2));
        assert_eq!(late_after(&watch, 1), LEAST);
    }

    #[test]
    fn nothing_is_awaited_once_all_is_back() {
        let watch = Watch::default();
        watch.set(Some((PassId(1), 1, Instant::now())));
        watch.back(Instant::now());
        assert_eq!(watch.awaited(), None);
        watch.set(None);
        assert_eq!(watch.awaited(), None);
    }
}
