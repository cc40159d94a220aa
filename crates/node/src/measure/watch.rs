//! Whether other programs computed while something was measured.
//!
//! A [`Watch`] runs while a measurement does, and stands still while a process of our own is waited for: its time would
//! count as that of others. What it saw is a [`Disturbance`].

use std::time::Instant;

use crate::system::CpuTime;

/// Share of the processor that other programs may take during a measurement that counts for long: a desktop at rest
/// takes a few percent, a program that computes takes a core.
const MOST_OTHERS: f64 = 0.1;

/// What other programs took of the processor while something was measured; nothing where the system does not tell.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Disturbance {
    /// Shares of the processor that others took, times the seconds for which they did.
    others_s: f64,
    /// Seconds that were watched.
    watched_s: f64,
}

impl Disturbance {
    /// Share of all cores' time that others took, 0 to 1.
    pub fn share(self) -> f64 {
        if self.watched_s > 0.0 { self.others_s / self.watched_s } else { 0.0 }
    }

    /// Whether the processor was left to the measurement, so that it counts for long.
    pub fn is_quiet(self) -> bool {
        self.share() <= MOST_OTHERS
    }

    /// What to tell people who read the numbers; nothing if it was quiet.
    pub fn note(self) -> Option<String> {
        (!self.is_quiet()).then(|| {
            format!(
                "Other programs took {:.0} % of the processor while this machine was measured, so it may be much \
                 faster than these numbers say; run this again when it is idle.",
                100.0 * self.share()
            )
        })
    }

    /// Of two measurements together.
    #[must_use]
    pub(super) fn and(self, other: Self) -> Self {
        Self { others_s: self.others_s + other.others_s, watched_s: self.watched_s + other.watched_s }
    }
}

/// Watches the processor.
#[derive(Debug)]
pub(super) struct Watch {
    /// Since when it runs; `None` while it stands still.
    since: Option<(CpuTime, Instant)>,
    seen: Disturbance,
}

impl Watch {
    pub(super) fn begin() -> Self {
        let mut watch = Self { since: None, seen: Disturbance::default() };
        watch.go_on();
        watch
    }

    /// Stands still until it is told to go on.
    pub(super) fn pause(&mut self) {
        let (Some((before, begin)), Some(now)) = (self.since.take(), CpuTime::now()) else { return };
        let watched_s = begin.elapsed().as_secs_f64();
        let others_s = now.others_since(before) * watched_s;
        self.seen = self.seen.and(Disturbance { others_s, watched_s });
    }

    pub(super) fn go_on(&mut self) {
        self.since = CpuTime::now().map(|now| (now, Instant::now()));
    }

    /// What it saw.
    pub(super) fn end(mut self) -> Disturbance {
        self.pause();
        self.seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_machine_is_told_of_and_a_quiet_one_is_not() {
        let of = |share: f64, watched_s: f64| Disturbance { others_s: share * watched_s, watched_s };
        assert!(Disturbance::default().is_quiet() && of(0.09, 3.0).note().is_none());
        let note = of(0.76, 1.5).note().unwrap();
        assert!(note.starts_with("Other programs took 76 % of the processor"), "{note}");
        let both = of(1.0, 1.0).and(of(0.0, 3.0));
        assert_eq!((both.share(), both.is_quiet()), (0.25, false), "longer ones count more");
    }

    #[test]
    fn nothing_is_watched_while_it_stands_still() {
        let mut watch = Watch::begin();
        watch.pause();
        let seen = watch.seen;
        watch.pause();
        assert_eq!(watch.end(), seen);
    }
}
