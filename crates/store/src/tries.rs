//! How often something is asked for, and how long is waited in between.

use std::time::{Duration, Instant};

use crate::error::{Again, FetchError};
use crate::settings::Limits;
use crate::url::without_query;

/// Who did not answer in time is left alone for at least this part of it: for a second after the usual 30, which is
/// long enough to tell people why nothing moves.
const SILENCE_PART: u32 = 30;

/// Hears why something is asked for again, and after which pause.
pub(crate) type OnRetry<'a> = &'a (dyn Fn(&FetchError, Duration) + Sync);

/// How often in a row something went wrong, and what to do about it.
pub(crate) struct Tries<'a> {
    limits: &'a Limits,
    deadline: Option<(Instant, Duration)>,
    on_retry: OnRetry<'a>,
    n_failed: u32,
}

impl<'a> Tries<'a> {
    pub(crate) fn new(limits: &'a Limits, deadline: Option<Instant>, on_retry: OnRetry<'a>) -> Self {
        let deadline = deadline.map(|at| (at, at.saturating_duration_since(Instant::now())));
        Self { limits, deadline, on_retry, n_failed: 0 }
    }

    /// How long the next request may take.
    pub(crate) fn time(&self, url: &str) -> Result<Duration, FetchError> {
        let Some((deadline, limit)) = self.deadline else { return Ok(self.limits.request_time) };
        match deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(FetchError::TooSlow { url: without_query(url).to_owned(), limit }),
            left => Ok(left.min(self.limits.request_time)),
        }
    }

    /// Waits for as long as it makes sense to after a request that brought `n_bytes` and then failed.
    ///
    /// # Errors
    /// The failure, if there is no sense in another try.
    pub(crate) fn failed(&mut self, error: FetchError, n_bytes: u64) -> Result<(), FetchError> {
        if n_bytes >= self.limits.progress_bytes && matches!(error, FetchError::BrokeOff { .. }) {
            self.n_failed = 0;
            return Ok(());
        }
        self.n_failed += 1;
        let backoff = self.limits.first_pause.saturating_mul(1 << (self.n_failed - 1).min(16));
        let backoff = match &error {
            FetchError::NoAnswer { limit, .. } => backoff.max(*limit / SILENCE_PART),
            _ => backoff,
        };
        let pause = match error.again() {
            Again::Never => return Err(error),
            _ if self.n_failed >= self.limits.n_tries => return Err(error),
            Again::Now => Duration::ZERO,
            Again::Later(wait) if wait.is_some_and(|wait| wait > self.limits.longest_pause) => return Err(error),
            Again::Later(wait) => wait.unwrap_or(backoff).min(self.limits.longest_pause),
        };
        let is_late = self.deadline.is_some_and(|(deadline, _)| Instant::now() + pause >= deadline);
        if is_late {
            return Err(error);
        }
        (self.on_retry)(&error, pause);
        std::thread::sleep(pause);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_end_unless_something_moves_on() {
        let limits =
            Limits { n_tries: 3, first_pause: Duration::from_millis(1), progress_bytes: 10, ..Limits::default() };
        let broke_off = || FetchError::BrokeOff { url: String::new(), found: 0, expected: 1 };
        let busy = |s| FetchError::Busy { url: String::new(), status: 429, wait: Some(Duration::from_secs(s)) };
        let mut tries = Tries::new(&limits, None, &|_, _| ());
        for n_bytes in [0, 9, 10, 0, 0] {
            tries.failed(broke_off(), n_bytes).unwrap();
        }
        assert!(tries.failed(broke_off(), 0).is_err());
        let mut tries = Tries::new(&limits, None, &|_, _| ());
        assert!(tries.failed(busy(0), 0).is_ok());
        assert!(tries.failed(busy(61), 0).is_err(), "nobody waits for longer than a minute");
        assert!(Tries::new(&limits, Some(Instant::now()), &|_, _| ()).failed(broke_off(), 0).is_err());
    }

    #[test]
    fn who_says_nothing_for_long_is_left_alone_for_longer() {
        let limits = Limits { first_pause: Duration::from_millis(1), ..Limits::default() };
        let pauses = std::sync::Mutex::new(Vec::new());
        let hears = |_: &FetchError, pause| pauses.lock().unwrap().push(pause);
        let mut tries = Tries::new(&limits, None, &hears);
        let silent = |ms| FetchError::NoAnswer { url: String::new(), limit: Duration::from_millis(ms) };
        tries.failed(silent(300), 0).unwrap();
        tries.failed(silent(0), 0).unwrap();
        assert_eq!(*pauses.lock().unwrap(), [10, 2].map(Duration::from_millis));
        assert_eq!(Limits::default().request_time / SILENCE_PART, Duration::from_secs(1));
    }
}
