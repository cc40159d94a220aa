//! Callers who ask one thing after the other for as long as the test lasts, and note when each token came.
//!
//! Each has a thread. What all of them see is in one place, [`Seen`], which the test reads: the moments of tokens since
//! the last fault, the first word of a pause, and what became of the answers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::asks::{Ask, Heard};
use crate::failure::{Failure, Outcome};
use crate::http::Endpoint;
use crate::output::error;
use crate::random::Random;

/// How long a caller who was turned away waits: callers that ask again at once would only measure that.
const BACK_OFF: Duration = Duration::from_millis(100);

/// How long the last answers may take once nobody asks any more.
const LAST_ANSWERS: Duration = Duration::from_secs(60);

/// What became of all answers.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Tally {
    /// Those that were equal to the undisturbed ones.
    pub whole: u64,
    /// Those that came to an end and were not.
    pub wrong: u64,
    /// Those that did not come to an end.
    pub lost: u64,
    /// Tokens of whole answers.
    pub tokens: u64,
}

/// All callers.
pub struct Callers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    endpoint: Endpoint,
    asks: Vec<Ask>,
    /// Nobody asks anything more.
    is_over: AtomicBool,
    /// Nobody cares any more: the nodes are ended in the middle of answers.
    is_abandoned: AtomicBool,
    seen: Mutex<Seen>,
}

/// What they see.
#[derive(Default)]
struct Seen {
    /// For each caller the moments at which tokens came; the first is before the last fault.
    tokens: Vec<Vec<Instant>>,
    /// When each caller last asked something.
    asked: Vec<Option<Instant>>,
    /// When a stream first said that it pauses, since the last fault.
    paused: Option<Instant>,
    tally: Tally,
}

impl Seen {
    /// Forgets what was before now.
    fn begin(&mut self) {
        for moments in &mut self.tokens {
            moments.drain(..moments.len().saturating_sub(1));
        }
        self.paused = None;
    }

    /// The longest time without a token that ended after `from` and before `to`, of any caller.
    fn pause(&self, from: Instant, to: Instant) -> Duration {
        let gaps = self.tokens.iter().flat_map(|moments| moments.windows(2));
        let gaps = gaps.filter(|gap| gap[1] > from && gap[1] <= to).map(|gap| gap[1] - gap[0]);
        gaps.max().unwrap_or_default()
    }
}

impl Callers {
    /// Starts `n` callers, who draw what they ask from `random`.
    pub fn start(n: u32, endpoint: &Endpoint, asks: Vec<Ask>, random: &mut Random) -> Outcome<Self> {
        let (tokens, asked) = (vec![Vec::new(); n as usize], vec![None; n as usize]);
        let seen = Seen { tokens, asked, ..Seen::default() };
        let (is_over, is_abandoned) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Shared { endpoint: endpoint.clone(), asks, is_over, is_abandoned, seen: Mutex::new(seen) };
        let shared = Arc::new(shared);
        let thread = |caller: u32| {
            let (shared, random) = (Arc::clone(&shared), Random::new(random.next()));
            let name = format!("caller-{caller}");
            std::thread::Builder::new().name(name).spawn(move || shared.call(caller as usize, random))
        };
        let threads: Result<_, _> = (0..n).map(thread).collect();
        Ok(Self { shared, threads: threads.map_err(Failure::io("a thread"))? })
    }

    /// Forgets when tokens came so far: a fault follows.
    pub fn begin(&self) {
        self.shared.seen().begin();
    }

    /// When a stream first said that it pauses, since the last fault.
    pub fn paused(&self) -> Option<Instant> {
        self.shared.seen().paused
    }

    /// Whether every caller has had a token since `moment`.
    pub fn all_moved_since(&self, moment: Instant) -> bool {
        self.shared.seen().tokens.iter().all(|moments| moments.last().is_some_and(|last| *last > moment))
    }

    /// Whether every caller hears an answer that was asked for since `moment`.
    pub fn all_asked_since(&self, moment: Instant) -> bool {
        self.shared.seen().asked.iter().all(|asked| asked.is_some_and(|asked| asked > moment))
    }

    /// The longest time without a token in that time, of any caller.
    pub fn pause(&self, from: Instant, to: Instant) -> Duration {
        self.shared.seen().pause(from, to)
    }

    /// What became of all answers so far.
    pub fn tally(&self) -> Tally {
        self.shared.seen().tally
    }

    /// Lets all callers hear their last answer out.
    pub fn finish(&self) -> Outcome<Tally> {
        self.shared.is_over.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + LAST_ANSWERS;
        while !self.threads.iter().all(JoinHandle::is_finished) {
            if Instant::now() > deadline {
                return Err(Failure::said(format!("the last answers did not end within {LAST_ANSWERS:?}")));
            }
            std::thread::sleep(BACK_OFF);
        }
        Ok(self.tally())
    }
}

impl Drop for Callers {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        self.shared.is_abandoned.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks until it is over.
    fn call(&self, caller: usize, mut random: Random) {
        while !self.is_over.load(Ordering::Relaxed) {
            let ask = random.one_of(&self.asks);
            self.seen().asked[caller] = Some(Instant::now());
            let told = ask.ask(&self.endpoint, |heard| self.hear(caller, &heard));
            if self.is_abandoned.load(Ordering::Relaxed) {
                return;
            }
            let is_lost = told.is_err();
            let complaint = match told {
                Ok(told) => {
                    let fault = ask.fault_of(&told);
                    let tally = &mut self.seen().tally;
                    match &fault {
                        None => (tally.whole, tally.tokens) = (tally.whole + 1, tally.tokens + told.n_tokens),
                        Some(_) => tally.wrong += 1,
                    }
                    fault.map(|fault| format!("wrong: {fault}"))
                }
                Err(failure) => {
                    self.seen().tally.lost += 1;
                    Some(format!("lost: {failure}"))
                }
            };
            if let Some(complaint) = complaint {
                error(&format!("an answer is {complaint}"));
            }
            if is_lost {
                std::thread::sleep(BACK_OFF);
            }
        }
    }

    fn hear(&self, caller: usize, heard: &Heard<'_>) {
        let now = Instant::now();
        let mut seen = self.seen();
        match heard {
            Heard::Token => seen.tokens[caller].push(now),
            Heard::Comment(comment) if comment.starts_with("paused") => {
                seen.paused.get_or_insert(now);
            }
            Heard::Comment(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_the_longest_gap_that_ends_after_the_fault() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let tokens = vec![[0, 90, 100, 130, 170].map(at).to_vec(), [95, 160].map(at).to_vec(), vec![]];
        let mut seen = Seen { tokens, ..Seen::default() };
        let pause = |seen: &Seen, from, to| seen.pause(at(from), at(to)).as_millis();
        assert_eq!(pause(&seen, 100, 200), 65);
        assert_eq!([pause(&seen, 100, 150), pause(&seen, 165, 200), pause(&seen, 180, 200)], [30, 40, 0]);
        seen.begin();
        assert_eq!(seen.tokens, [vec![at(170)], vec![at(160)], vec![]]);
        seen.tokens[1].push(at(200));
        assert_eq!(pause(&seen, 180, 200), 40);
    }
}
