//! How a node ends when it is asked to: first its clients' answers, then its part in the cluster.
//!
//! ```text
//! Ctrl-C, SIGTERM -> the endpoint refuses new completions, those under way go on for --drain-timeout
//!                 -> the node is stopped: a worker asks to be relieved, a coordinator says goodbye
//! once more       -> the node is stopped at once
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use brigade_api::Server;

use crate::error::Failure;
use crate::output;

/// Counts how often this process was asked to end.
#[derive(Debug, Clone, Default)]
pub struct Signals(Arc<AtomicU32>);

impl Signals {
    /// Listens for Ctrl-C, SIGTERM and the end of the terminal; once in a process.
    ///
    /// # Errors
    /// If the system does not let it.
    pub fn listen() -> Result<Self, Failure> {
        let signals = Self::default();
        let counted = Arc::clone(&signals.0);
        ctrlc::set_handler(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        })
        .map_err(Failure::run)?;
        Ok(signals)
    }

    fn count(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Ends a node as it was asked to; looked at every now and then.
pub struct Ending<S> {
    signals: Signals,
    drain: Drain,
    stop: S,
}

impl<S: Fn()> Ending<S> {
    /// Lets answers go on for `limit`, then calls `stop`, and calls it again for each further signal.
    pub fn new(signals: Signals, limit: Duration, stop: S) -> Self {
        Self { signals, drain: Drain { limit, until: None, n_stops: 0 }, stop }
    }

    /// Does what is to be done by now.
    ///
    /// # Errors
    /// If nobody reads what it says.
    pub fn poll(&mut self, server: Option<&Server>) -> Result<(), Failure> {
        let n_asked = self.signals.count();
        if n_asked == 0 {
            return Ok(());
        }
        let first = self.drain.until.is_none();
        if first && let Some(server) = server {
            server.drain();
        }
        let n_answering = server.map_or(0, Server::n_answering);
        if first && n_answering > 0 {
            output::line(format_args!(
                "stopping; answers that run ({n_answering}) may go on for {}, interrupt again to end them",
                humantime::format_duration(self.drain.limit)
            ))?;
        }
        (0..self.drain.stops_due(n_asked, n_answering, Instant::now())).for_each(|_| (self.stop)());
        Ok(())
    }
}

/// When to stop.
struct Drain {
    limit: Duration,
    /// Until when answers may go on; set at the first signal.
    until: Option<Instant>,
    /// How often the node was told to stop.
    n_stops: u32,
}

impl Drain {
    /// How often the node is to be told to stop now: once when its answers have ended or their time is over, and from
    /// the second signal on as often as it was asked.
    fn stops_due(&mut self, n_asked: u32, n_answering: usize, now: Instant) -> u32 {
        let until = *self.until.get_or_insert(now + self.limit);
        let wanted = match n_asked {
            0 | 1 => u32::from(n_answering == 0 || now >= until),
            more => more,
        };
        let due = wanted.saturating_sub(self.n_stops);
        self.n_stops += due;
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn drain() -> (Drain, Instant) {
        (Drain { limit: LIMIT, until: None, n_stops: 0 }, Instant::now())
    }

    #[test]
    fn a_node_without_answers_stops_at_once_and_once() {
        let (mut drain, now) = drain();
        assert_eq!((drain.stops_due(1, 0, now), drain.stops_due(1, 0, now + 2 * LIMIT)), (1, 0));
    }

    #[test]
    fn answers_may_end_until_their_time_is_over() {
        let (mut drain, now) = drain();
        assert_eq!((drain.stops_due(1, 2, now), drain.stops_due(1, 1, now + LIMIT / 2)), (0, 0));
        assert_eq!(drain.stops_due(1, 1, now + LIMIT), 1);
    }

    #[test]
    fn who_asks_again_is_heard_at_once() {
        let (mut drain, now) = drain();
        assert_eq!((drain.stops_due(1, 2, now), drain.stops_due(2, 2, now)), (0, 2));
        assert_eq!((drain.stops_due(2, 0, now), drain.stops_due(3, 0, now)), (0, 1));
    }
}
