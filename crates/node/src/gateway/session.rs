//! One request of this node's callers, over all coordinators that answer it.
//!
//! The task owns the request and the tokens that came. It asks whoever coordinates, passes on what comes, and where the
//! answer breaks off because the coordinator is lost or gives up its office, it asks the next one for the rest:
//!
//! ```text
//! ask --> relay --> done, failed, or the caller has gone
//!   ^       |
//!   +-------+ lost: told as a pause, for at most the time to wait for capacity
//! ```
//!
//! Each token is told once and in its place: it has a position, and the next coordinator computes the very same.

use std::time::Duration;

use brigade_base::Token;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::remote::Source;
use super::standing::{Lead, Standing};
use crate::serving::{Event, Failure, Request, SubmitError};

/// Pause before a coordinator is asked again that did not take a request: many are asked at once after a loss, and the
/// new one is ready after some tenths of a second at best.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// Longest wait, and the time of a request that gives none; it is added to a clock.
pub(super) const NEVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// A request with what came of it.
pub(super) struct Session {
    /// Its timeout is what is left of it at the last submission.
    pub(super) request: Request,
    /// The time that the caller gave it.
    pub(super) timeout: Option<Duration>,
    pub(super) submitted: Instant,
    pub(super) client: UnboundedSender<Event>,
    /// How long it waits for a coordinator.
    pub(super) wait: Duration,
    pub(super) standing: watch::Receiver<Standing>,
    pub(super) _room: OwnedSemaphorePermit,
    /// The tokens that were told.
    pub(super) answer: Vec<Token>,
    /// The caller knows that the answer waits.
    pub(super) paused: bool,
    /// The end of the answer's text. It is told with the answer's end: where that is lost, the text comes again.
    pub(super) rest: Option<String>,
    /// Until when it waits; set while it does.
    pub(super) waits_until: Option<Instant>,
}

/// What becomes of an answer after an event.
enum Then {
    GoOn,
    /// Its caller knows the end, or has gone.
    Ended,
    /// Somebody else must go on with it.
    Lost(String),
}

impl Session {
    /// Answers the request. `first` is what its first submission, in the given turn, gave.
    pub(super) async fn run(mut self, mut first: Option<(u64, Source)>) {
        let mut lost = None;
        loop {
            let (turn, source) = match first.take() {
                Some(first) => first,
                None => match self.ask(lost.take()).await {
                    Ok(Some(found)) => found,
                    Ok(None) => return,
                    Err(failure) => return self.tell(Event::Failed(failure)),
                },
            };
            match self.relay(turn, source).await {
                Then::Lost(_) if self.is_stopping() => return self.tell(Event::Failed(Failure::Stopping)),
                Then::Lost(why) => {
                    self.pause(&why);
                    lost = Some((turn, why));
                }
                Then::GoOn | Then::Ended => return,
            }
        }
    }

    /// Finds somebody who goes on; `None` if the caller has gone meanwhile. `lost` is the turn in which the answer
    /// broke off, and why.
    async fn ask(&mut self, mut lost: Option<(u64, String)>) -> Result<Option<(u64, Source)>, Failure> {
        let end_of_wait = *self.waits_until.get_or_insert_with(|| Instant::now() + self.wait);
        let end_of_time = self.submitted + self.timeout.unwrap_or(NEVER);
        loop {
            let (turn, lead) = {
                let standing = self.standing.borrow_and_update();
                (standing.turn, standing.lead.clone())
            };
            let why = match lost.take() {
                // Another node refuses by an event: asked again at once, a busy one would be asked without end.
                Some((same, why)) if same == turn => why,
                Some((_, why)) if Instant::now() >= end_of_wait.min(end_of_time) => why,
                _ => match self.submit(&lead) {
                    Ok(source) => return Ok(Some((turn, source))),
                    Err(_) if self.is_stopping() => return Err(Failure::Stopping),
                    Err(error) if self.may_pass(&error) => error.to_string(),
                    Err(error) => return Err(error.into()),
                },
            };
            self.pause(&why);
            tokio::select! {
                // In this order, so that it does not depend on luck what a caller hears where several are true.
                biased;
                () = self.client.closed() => return Ok(None),
                () = sleep_until(end_of_time) => return Err(self.timed_out()),
                () = sleep_until(end_of_wait) => return Err(Failure::PlacementLost(why)),
                _ = self.standing.changed() => {}
                // Who does not coordinate now will not by itself: its turn ends with news.
                () = sleep(ASK_AGAIN), if !matches!(lead, Lead::Nobody { .. }) => {}
            }
        }
    }

    /// Asks for the rest of the answer, in what is left of the time.
    fn submit(&mut self, lead: &Lead) -> Result<Source, SubmitError> {
        self.request.timeout = self.timeout.map(|timeout| timeout.saturating_sub(self.submitted.elapsed()));
        lead.submit(&self.request, &self.answer)
    }

    /// Passes on what `source` tells for as long as the turn lasts.
    async fn relay(&mut self, turn: u64, mut source: Source) -> Then {
        loop {
            let event = tokio::select! {
                biased;
                event = source.events.recv() => event,
                () = self.client.closed() => return Then::Ended,
                _ = self.standing.wait_for(|standing| standing.turn != turn) => {
                    return Then::Lost("another node coordinates now".to_owned());
                }
            };
            let then = match event {
                Some(event) => self.take(event),
                None => Then::Lost("the coordinator was lost".to_owned()),
            };
            if !matches!(then, Then::GoOn) {
                return then;
            }
        }
    }

    fn take(&mut self, event: Event) -> Then {
        match event {
            Event::Token { position, token, text, logprob } => {
                // A token that was told already comes of a submission that overlaps.
                match (position as usize).cmp(&self.answer.len()) {
                    std::cmp::Ordering::Less => return Then::GoOn,
                    std::cmp::Ordering::Greater => return Then::Lost("a token of the answer was missing".to_owned()),
                    std::cmp::Ordering::Equal => self.answer.push(token),
                }
                self.resume();
                self.tell(Event::Token { position, token, text, logprob });
            }
            Event::Text { text } => self.rest = Some(text),
            // Where its end is lost it comes again, and is the same.
            Event::Pooled { values } => {
                self.resume();
                self.tell(Event::Pooled { values });
            }
            Event::Paused { why } => {
                if !self.paused {
                    self.paused = true;
                    self.tell(Event::Paused { why });
                }
            }
            Event::Resumed => self.resume(),
            Event::Done { reason, usage } => {
                self.request.done.add();
                self.resume();
                if let Some(text) = self.rest.take() {
                    self.tell(Event::Text { text });
                }
                self.tell(Event::Done { reason, usage });
                return Then::Ended;
            }
            Event::Failed(failure) => return self.fail(failure),
        }
        Then::GoOn
    }

    fn fail(&mut self, failure: Failure) -> Then {
        let failure = match failure {
            Failure::Stopping => return Then::Lost("the coordinator stopped".to_owned()),
            Failure::Refused(error) if self.may_pass(&error) => return Then::Lost(error.to_string()),
            Failure::TimedOut { .. } => self.timed_out(),
            other => other,
        };
        self.tell(Event::Failed(failure));
        Then::Ended
    }

    /// Whether what a coordinator says against a request may be otherwise soon. A full queue is no reason to give an
    /// answer up that was begun.
    fn may_pass(&self, error: &SubmitError) -> bool {
        match error {
            SubmitError::NotReady(_) | SubmitError::Stopping => true,
            SubmitError::Busy { .. } => self.paused,
            _ => false,
        }
    }

    fn is_stopping(&self) -> bool {
        matches!(self.standing.borrow().lead, Lead::Stopping)
    }

    fn timed_out(&self) -> Failure {
        Failure::TimedOut { after: self.timeout.unwrap_or(NEVER) }
    }

    fn pause(&mut self, why: &str) {
        self.rest = None;
        // From the loss on, and not anew with each attempt that comes to nothing.
        self.waits_until.get_or_insert_with(|| Instant::now() + self.wait);
        if !self.paused {
            self.paused = true;
            tracing::debug!(request = self.request.id, why, "an answer waits");
            self.tell(Event::Paused { why: why.to_owned() });
        }
    }

    fn resume(&mut self) {
        self.waits_until = None;
        if self.paused {
            self.paused = false;
            self.tell(Event::Resumed);
        }
    }

    /// A caller that has gone is noticed by the loops.
    fn tell(&self, event: Event) {
        let _ = self.client.send(event);
    }
}
