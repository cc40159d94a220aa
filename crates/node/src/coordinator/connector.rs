//! The thread of a ring: it connects both ends, sends a first token around, and serves until it ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::NodeId;
use brigade_net::{Identity, Link, Purpose};
use brigade_protocol::frame::Attach;
use brigade_protocol::kind;
use brigade_protocol::schedule::Limits;

use super::owner::Event;
use crate::handle::Shared;
use crate::incoming::Incoming;
use crate::loaded::LoadedStage;
use crate::meter::Meter;
use crate::model::LocalModel;
use crate::outgoing::Outgoing;
use crate::reach::reach;
use crate::ring::{Happening, Ring, RingEnd, RingLinks};
use crate::threads::lock;

/// How long the last worker's link may take after all stages have loaded.
const RING_TIMEOUT: Duration = Duration::from_secs(15);

/// Ends a ring from outside.
#[derive(Clone)]
pub(super) struct RingStopper {
    pub(super) stop: Arc<AtomicBool>,
    pub(super) canceller: brigade_engine::Canceller,
    pub(super) links: Arc<Mutex<Vec<Arc<dyn Link>>>>,
}

impl RingStopper {
    /// Ends it.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.canceller.cancel();
        lock(&self.links).iter().for_each(|link| link.close());
    }
}

/// Closes the ring's links, then runs it.
pub(super) struct RingThread {
    pub(super) attach: Attach,
    pub(super) first: Option<(NodeId, Vec<String>)>,
    pub(super) last_link: Receiver<Arc<dyn Link>>,
    pub(super) limits: Limits,
    pub(super) stopper: RingStopper,
    pub(super) model: Arc<LocalModel>,
    pub(super) identity: Arc<Identity>,
    pub(super) meter: Arc<Meter>,
    pub(super) shared: Arc<Shared>,
    pub(super) events: Sender<Event>,
}

impl RingThread {
    pub(super) fn run(self, tail: LoadedStage) {
        let (happen, inbox) = channel();
        let links = match self.connect(&happen) {
            Ok(links) => links,
            Err(end) => {
                let _ = self.events.send(Event::RingEnded(self.attach.epoch, Box::new(tail), end));
                return;
            }
        };
        let mut ring = Ring {
            attach: self.attach,
            model: Arc::clone(&self.model),
            tail,
            links,
            inbox,
            limits: self.limits,
            stop: Arc::clone(&self.stopper.stop),
            meter: Arc::clone(&self.meter),
        };
        let end = match ring.probe() {
            Ok(()) => {
                self.shared.submissions.open(happen);
                let _ = self.events.send(Event::WentAround(self.attach.epoch));
                ring.run(&|failure| self.shared.submissions.end(failure))
            }
            Err(end) => end,
        };
        lock(&self.stopper.links).iter().for_each(|link| link.close());
        let stopped = self.stopper.stop.load(Ordering::Relaxed);
        let end = if stopped { RingEnd::Stopped } else { end };
        let _ = self.events.send(Event::RingEnded(self.attach.epoch, Box::new(ring.tail), end));
    }

    /// Dials the first worker and waits for the last one.
    fn connect(&self, happen: &Sender<Happening>) -> Result<Option<RingLinks>, RingEnd> {
        let Some((first, addresses)) = &self.first else { return Ok(None) };
        let broke = |why: String| RingEnd::Broke(why);
        let first = reach(&self.identity, *first, addresses, Purpose::Data, None)
            .map_err(|error| broke(format!("the first stage cannot be reached: {error}")))?;
        first.send(kind::ATTACH, &[&self.attach.encode()]).map_err(|error| broke(error.to_string()))?;
        lock(&self.stopper.links).push(Arc::clone(&first) as Arc<dyn Link>);
        let until = Instant::now() + RING_TIMEOUT;
        loop {
            match self.last_link.recv_timeout(Duration::from_millis(50)) {
                Ok(last) => {
                    lock(&self.stopper.links).push(Arc::clone(&last));
                    // Whoever stops the ring sets the flag before it closes the links that it finds.
                    if self.stopper.stop.load(Ordering::Relaxed) {
                        return Err(RingEnd::Stopped);
                    }
                    let no_thread = |error: std::io::Error| broke(format!("no thread for a link: {error}"));
                    let first = Outgoing::new(first).map_err(no_thread)?;
                    let happen = happen.clone();
                    let tell = move || drop(happen.send(Happening::Frame));
                    let last = Incoming::start_with(last, tell).map_err(no_thread)?;
                    return Ok(Some(RingLinks { first, last }));
                }
                Err(RecvTimeoutError::Timeout) if self.stopper.stop.load(Ordering::Relaxed) => {
                    return Err(RingEnd::Stopped);
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() < until => {}
                Err(_) => return Err(broke("the last stage did not reach this node".to_owned())),
            }
        }
    }
}
