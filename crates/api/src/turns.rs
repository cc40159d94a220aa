//! How many texts of each request are on their way at once, so that those with many do not fill the queue.
//!
//! One text of a request always may be, as the one of a completion. Beyond that there are [`MOST`] for all requests
//! together, which they share evenly: one that has more than its share sends none until it is below that again, and
//! what gets free goes to those that came later.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use brigade_node::MAX_WAITING;

/// Of one request: the passes of a few stages stay full, and no more of the queue is taken than everyone has to
/// himself.
const MAX_AT_ONCE: usize = 16;

/// Of all requests that have more than one on its way: half of the queue.
const MOST: usize = MAX_WAITING / 2;

/// What all requests with texts have on its way.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    n_requests: AtomicUsize,
    n_texts: AtomicUsize,
}

impl Turns {
    /// One more request, with nothing on its way.
    pub(crate) fn join(self: &Arc<Self>) -> Turn {
        self.n_requests.fetch_add(1, Ordering::Relaxed);
        Turn { turns: Arc::clone(self), n_texts: 0 }
    }
}

/// What one of them has on its way; dropping it gives that up.
#[derive(Debug)]
pub(crate) struct Turn {
    turns: Arc<Turns>,
    n_texts: usize,
}

impl Turn {
    /// Whether one more text may be sent now. Two that ask at once may both hear so.
    pub(crate) fn may_send(&self) -> bool {
        let share = MOST / self.turns.n_requests.load(Ordering::Relaxed).max(1);
        let is_free = self.turns.n_texts.load(Ordering::Relaxed) < MOST;
        self.n_texts == 0 || is_free && self.n_texts < share.clamp(1, MAX_AT_ONCE)
    }

    /// A text was sent.
    pub(crate) fn begin(&mut self) {
        self.n_texts += 1;
        self.turns.n_texts.fetch_add(1, Ordering::Relaxed);
    }

    /// One of those that were sent came back.
    pub(crate) fn end(&mut self) {
        self.n_texts -= 1;
        self.turns.n_texts.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.n_texts.fetch_sub(self.n_texts, Ordering::Relaxed);
        self.turns.n_requests.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends all that may be sent.
    fn fill(turn: &mut Turn) -> usize {
        while turn.may_send() {
            turn.begin();
        }
        turn.n_texts
    }

    #[test]
    fn requests_of_many_texts_leave_half_of_the_queue() {
        let turns = Arc::<Turns>::default();
        let mut all: Vec<Turn> = (0..100).map(|_| turns.join()).collect();
        drop(all.split_off(30));
        for _ in 0..5 {
            all.iter_mut().for_each(|turn| assert_eq!(fill(turn), MOST / 30));
            // Of each a text came back.
            all.iter_mut().for_each(Turn::end);
        }
        drop(all);
        assert_eq!((turns.n_texts.load(Ordering::Relaxed), turns.n_requests.load(Ordering::Relaxed)), (0, 0));
        assert_eq!(fill(&mut turns.join()), MAX_AT_ONCE);
    }

    #[test]
    fn who_comes_late_gets_a_share_too() {
        let turns = Arc::<Turns>::default();
        let mut early: Vec<Turn> = (0..8).map(|_| turns.join()).collect();
        early.iter_mut().for_each(|turn| assert_eq!(fill(turn), MAX_AT_ONCE));
        let mut late: Vec<Turn> = (0..8).map(|_| turns.join()).collect();
        late.iter_mut().for_each(|turn| assert_eq!(fill(turn), 1));
        for _ in 0..MAX_AT_ONCE {
            for turn in early.iter_mut().chain(&mut late) {
                turn.end();
                fill(turn);
            }
        }
        assert!(early.iter().chain(&late).all(|turn| (7..=8).contains(&turn.n_texts)), "{early:?} {late:?}");
    }
}
