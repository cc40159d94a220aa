//! What reaches a ring's thread: requests from callers, and word that a frame came back.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::serving::{Event, Failure, Request};
use crate::threads::lock;

/// Something for the ring's thread, which sleeps on one queue of these.
pub enum Happening {
    /// Somebody asks.
    Submission(Box<Submission>),
    /// The last worker's link has one more frame, or has ended.
    Frame,
}

/// A request on its way into the ring.
pub struct Submission {
    /// What is asked.
    pub request: Request,
    /// When.
    pub at: Instant,
    /// Who hears the answer.
    pub events: UnboundedSender<Event>,
    /// Counts the open requests; taken back when the session ends.
    pub open: OpenCount,
}

/// One of the open requests; dropping it takes it back.
pub struct OpenCount(Arc<AtomicUsize>);

impl OpenCount {
    /// Counts one more, unless `most` are open already.
    pub fn take(counter: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let more = |n| (n < most).then_some(n + 1);
        counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Self(Arc::clone(counter)))
    }
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The way into the ring that runs, if one does.
pub struct Submissions(Mutex<(Option<Sender<Happening>>, Failure)>);

impl Submissions {
    /// No way in yet.
    pub fn new() -> Self {
        Self(Mutex::new((None, Failure::Stopping)))
    }

    /// A new way in; the old one ends.
    pub fn open(&self, sender: Sender<Happening>) {
        *lock(&self.0) = (Some(sender), Failure::PlacementLost("the model is placed anew".to_owned()));
    }

    /// No way in, and what those who are in will hear: the first reason, if there are several.
    pub fn close(&self, failure: Failure) {
        self.end(Some(failure));
    }

    /// No way in any more, if there still was one; returns what those who are in are to hear.
    pub fn end(&self, failure: Option<Failure>) -> Failure {
        let mut inner = lock(&self.0);
        if inner.0.take().is_some()
            && let Some(failure) = failure
        {
            inner.1 = failure;
        }
        inner.1.clone()
    }

    /// Hands a request to the ring. False if there is none.
    pub fn send(&self, submission: Submission) -> bool {
        let happening = Happening::Submission(Box::new(submission));
        lock(&self.0).0.as_ref().is_some_and(|sender| sender.send(happening).is_ok())
    }
}
