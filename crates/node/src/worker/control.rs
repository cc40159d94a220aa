//! The thread that keeps a worker's control link up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_net::{Identity, Link, Purpose, TcpLink, TicketSecret};
use brigade_protocol::control::{DEAD_AFTER_MS, MAX_CONTROL_BYTES, Offer, ToCoordinator, ToWorker};
use brigade_protocol::kind;

use super::owner::Event;
use crate::activity::WorkerActivity;
use crate::council::CouncilHost;
use crate::known::KnownCoordinator;
use crate::reach::{ReachError, while_wanted};
use crate::share::Tally;
use crate::system::resident_memory;
use crate::threads::lock;

/// First and longest pause before the coordinator is dialled again: soon for a restart, seldom for a night.
const REDIAL: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// How often a thread that waits looks whether it should.
const POLL: Duration = Duration::from_millis(25);

/// Keeps the control link up.
pub(super) struct Control {
    pub(super) identity: Arc<Identity>,
    pub(super) council: Arc<CouncilHost>,
    /// Whom to dial; another one where the council says so.
    pub(super) known: Arc<Mutex<KnownCoordinator>>,
    pub(super) secret: Option<TicketSecret>,
    pub(super) offer: Offer,
    pub(super) events: Sender<Event>,
    pub(super) activity: Arc<WorkerActivity>,
    pub(super) tally: Arc<Tally>,
    pub(super) stopping: Arc<AtomicBool>,
}

impl Control {
    /// Runs until the worker stops or the coordinator refuses it for good.
    pub(super) fn run(mut self) {
        let mut pause = REDIAL.0;
        // Without a ticket this node was a member before: its coordinator may just be starting.
        let mut was_connected = self.secret.is_none();
        while !self.stopping.load(Ordering::Relaxed) {
            let known = lock(&self.known).clone();
            let Some(dialled) = self.dial(&known) else {
                pause = REDIAL.0;
                continue;
            };
            match dialled {
                Ok(link) => {
                    was_connected = true;
                    pause = REDIAL.0;
                    // A member needs no ticket any more, and the ticket may expire.
                    self.secret = None;
                    let reason = self.converse(link);
                    self.council.lost(known.node);
                    let _ = self.events.send(Event::Disconnected(reason));
                }
                Err(error) if !was_connected || error.is_final() => {
                    let _ = self.events.send(Event::GaveUp(error.into()));
                    return;
                }
                Err(error) => drop(self.events.send(Event::Unreachable(error.to_string()))),
            }
            let until = Instant::now() + pause;
            while Instant::now() < until && self.is_wanted(&known) {
                std::thread::sleep(POLL);
            }
            let is_same = lock(&self.known).node == known.node;
            pause = if is_same { (pause * 2).min(REDIAL.1) } else { REDIAL.0 };
        }
    }

    /// Dials a coordinator; `None` if another one is to be dialled, or none any more, before that is done.
    fn dial(&self, known: &KnownCoordinator) -> Option<Result<Arc<TcpLink>, ReachError>> {
        let (identity, to, secret) = (Arc::clone(&self.identity), known.clone(), self.secret.clone());
        let dial = move || to.dial(&identity, Purpose::Control, secret.as_ref());
        while_wanted(dial, || self.is_wanted(known), |result| drop(result.map(|link| link.close())))
    }

    /// Whether this is the coordinator to dial, still.
    fn is_wanted(&self, known: &KnownCoordinator) -> bool {
        lock(&self.known).node == known.node && !self.stopping.load(Ordering::Relaxed)
    }

    /// Offers this node and passes messages on until the link ends; returns why.
    fn converse(&self, link: Arc<TcpLink>) -> String {
        link.set_frame_limit(MAX_CONTROL_BYTES);
        if let Err(error) = link.send(kind::CONTROL, &[&ToCoordinator::Offer(self.offer.clone()).encode()]) {
            return error.to_string();
        }
        let _ = self.events.send(Event::Connected(Arc::clone(&link) as Arc<dyn Link>));
        let mut buf = Vec::new();
        loop {
            // The owner loop may have ended before it heard of this link.
            if self.stopping.load(Ordering::Relaxed) {
                let goodbye = ToCoordinator::Goodbye { reason: "it was stopped".to_owned() };
                let _ = link.send(kind::CONTROL, &[&goodbye.encode()]);
                return close(&*link, "this node ends".to_owned());
            }
            let deadline = Instant::now() + Duration::from_millis(DEAD_AFTER_MS);
            let message = match link.recv(&mut buf, Some(deadline)) {
                Ok(kind::CONTROL) => {
                    self.council.heard(link.peer());
                    ToWorker::decode(&buf)
                }
                // It does not coordinate any more, and says who does.
                Ok(kind::COUNCIL) => {
                    self.council.receive(link.peer(), &buf);
                    return close(&*link, "another node coordinates now".to_owned());
                }
                Ok(other) => return close(&*link, format!("the coordinator sent a frame of unknown kind {other:#x}")),
                Err(error) => return close(&*link, error.to_string()),
            };
            match message {
                // Answered here, so that a busy owner loop is not taken for a dead node.
                Ok(ToWorker::Ping { nonce }) => {
                    let progress = self.activity.progress();
                    let (resident, weights) = (resident_memory(), self.tally.read());
                    let pong = ToCoordinator::Pong { nonce, resident, progress, weights };
                    if let Err(error) = link.send(kind::CONTROL, &[&pong.encode()]) {
                        return error.to_string();
                    }
                }
                Ok(message) => drop(self.events.send(Event::Message(message))),
                Err(error) => return close(&*link, error.to_string()),
            }
        }
    }
}

fn close(link: &dyn Link, reason: String) -> String {
    link.close();
    reason
}
