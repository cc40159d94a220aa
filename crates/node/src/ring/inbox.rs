//! What reaches a ring's thread: requests from callers, and word that a frame came back.

use std::collections::HashMap;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use brigade_base::{Epoch, TenantId, Token};
use tokio::sync::mpsc::UnboundedSender;

use crate::outgoing::Shadow;
use crate::serving::{Event, Failure, Request};
use crate::threads::lock;

/// Something for the ring's thread, which sleeps on one queue of these.
pub enum Happening {
    /// Somebody asks.
    Submission(Box<Submission>),
    /// The last worker's link has one more frame, or has ended.
    Frame,
    /// There is a connection.
    Wake,
    /// A node of the ring that broke is gone.
    Gone(String),
    /// A node that stands by begins to compute along.
    Shadowed,
    /// One that stands by for the first stage of the ring of this epoch, and wants its frames.
    Shadow(Epoch, Box<Shadow>),
    /// What is missing for another ring.
    Missing(String),
    /// Send nothing more in this ring; it is told when nothing is on its way.
    Drain(Epoch),
    /// The thread is to end; this is what callers hear.
    Stop(Failure),
}

/// A request on its way into the ring.
pub struct Submission {
    /// What is asked.
    pub request: Request,
    /// Tokens of its answer that were chosen and told elsewhere; the answer goes on behind them.
    pub answer: Vec<Token>,
    /// When.
    pub at: Instant,
    /// Who hears the answer.
    pub events: UnboundedSender<Event>,
    /// Counts the open requests; taken back when the session ends.
    pub open: OpenCount,
}

/// Open requests that each tenant may have even where others fill the queue. So a key that asks for hundreds does not
/// lock the others out, and what all of them hold together stays bounded, by the number of keys.
pub const RESERVED: usize = 16;

/// Counts the open requests of each tenant.
#[derive(Debug, Default)]
pub struct Open(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    of: HashMap<TenantId, usize>,
}

impl Open {
    /// How many are open.
    pub fn count(&self) -> usize {
        lock(&self.0).all
    }

    /// Counts one more, unless `most` are open already and the tenant has [`RESERVED`] of its own.
    pub fn take(self: &Arc<Self>, tenant: TenantId, most: usize) -> Option<OpenCount> {
        let mut counts = lock(&self.0);
        let own = counts.of.get(&tenant).copied().unwrap_or(0);
        if counts.all >= most && own >= RESERVED {
            return None;
        }
        counts.all += 1;
        counts.of.insert(tenant, own + 1);
        Some(OpenCount { open: Arc::clone(self), tenant })
    }
}

/// One of the open requests; dropping it takes it back.
pub struct OpenCount {
    open: Arc<Open>,
    tenant: TenantId,
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        let mut counts = lock(&self.open.0);
        counts.all -= 1;
        let own = counts.of.get(&self.tenant).copied().unwrap_or(1) - 1;
        // Those who have nothing open are not remembered.
        match own {
            0 => counts.of.remove(&self.tenant),
            own => counts.of.insert(self.tenant, own),
        };
    }
}

/// The way to the ring's thread.
#[derive(Clone)]
pub struct Submissions(Sender<Happening>);

impl Submissions {
    /// Into the inbox of which `sender` is the other end.
    pub fn new(sender: Sender<Happening>) -> Self {
        Self(sender)
    }

    /// Tells the thread something. False if it has ended.
    pub fn tell(&self, happening: Happening) -> bool {
        self.0.send(happening).is_ok()
    }

    /// Hands a request to it. False if it has ended.
    pub fn send(&self, submission: Submission) -> bool {
        self.tell(Happening::Submission(Box::new(submission)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_tenant_does_not_lock_the_others_out() {
        let open = Arc::new(Open::default());
        let take = |tenant, n: usize| (0..n).filter_map(|_| open.take(TenantId(tenant), 50)).collect::<Vec<_>>();
        let greedy = take(1, 100);
        assert_eq!(greedy.len(), 50);
        let modest = take(2, 100);
        assert_eq!(modest.len(), RESERVED);
        drop(greedy);
        assert_eq!(take(2, 100).len(), 50 - RESERVED);
        drop(modest);
        let counts = lock(&open.0);
        assert_eq!((counts.all, counts.of.len()), (0, 0));
    }
}
