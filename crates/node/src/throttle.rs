//! A node that leaves its machine a share of the time: computing is followed by a pause.
//!
//! For tests of unequal clusters, and for machines on which people want to go on working. A pause is slept in one go,
//! and what the system sleeps too long is taken off the next ones, so that the share is met over a few passes.

use std::time::{Duration, Instant};

/// Most that is taken off later pauses: a machine that was suspended for an hour does not compute without a pause for
/// hours.
const MAX_CREDIT: Duration = Duration::from_millis(100);

/// The share of time in which a stage computes.
#[derive(Debug, Clone, Copy)]
pub struct Throttle {
    /// Seconds of pause for each second of computing; 0 for no pauses.
    pause_per_busy: f64,
    /// What was slept too long.
    credit: Duration,
}

impl Throttle {
    /// Computes for `share` of the time, from just above 0 to 1; anything else counts as 1.
    pub fn new(share: f32) -> Self {
        let share = f64::from(share);
        let pause_per_busy = if share > 0.0 && share < 1.0 { 1.0 / share - 1.0 } else { 0.0 };
        Self { pause_per_busy, credit: Duration::ZERO }
    }

    /// By what factor it makes computing longer.
    pub fn slowdown(&self) -> f64 {
        1.0 + self.pause_per_busy
    }

    /// Sleeps as long as is due after so much computing.
    pub fn pause(&mut self, busy: Duration) {
        let Some(due) = self.due(busy) else { return };
        let begin = Instant::now();
        std::thread::sleep(due);
        self.slept(due, begin.elapsed());
    }

    /// What to sleep after so much computing; `None` if nothing.
    fn due(&mut self, busy: Duration) -> Option<Duration> {
        if self.pause_per_busy == 0.0 {
            return None;
        }
        // A share near 0 would overflow; a pause of an hour is as good as any longer one.
        let owed = Duration::from_secs_f64((busy.as_secs_f64() * self.pause_per_busy).min(3600.0));
        let due = owed.saturating_sub(self.credit);
        self.credit -= self.credit.min(owed);
        (due > Duration::ZERO).then_some(due)
    }

    fn slept(&mut self, due: Duration, slept: Duration) {
        self.credit = (self.credit + slept.saturating_sub(due)).min(MAX_CREDIT);
    }
}

impl Default for Throttle {
    fn default() -> Self {
        Self::new(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_pause_makes_up_the_rest_of_the_time() {
        assert_eq!(Throttle::new(0.25).due(ms(10)), Some(ms(30)));
        assert_eq!(Throttle::new(0.5).slowdown(), 2.0);
        for share in [1.0, 0.0, -1.0, 2.0, f32::NAN] {
            assert_eq!(Throttle::new(share).due(ms(10)), None, "{share}");
        }
        assert_eq!(Throttle::new(f32::MIN_POSITIVE).due(ms(1000)), Some(Duration::from_secs(3600)));
    }

    #[test]
    fn what_was_slept_too_long_is_taken_off() {
        let mut throttle = Throttle::new(0.5);
        throttle.slept(ms(10), ms(25));
        assert_eq!(throttle.due(ms(10)), None);
        assert_eq!(throttle.due(ms(10)), Some(ms(5)));
        assert_eq!(throttle.due(ms(10)), Some(ms(10)));
        throttle.slept(ms(10), Duration::from_secs(3600));
        assert_eq!(throttle.due(ms(1000)), Some(ms(900)));
    }
}
