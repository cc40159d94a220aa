//! Connects both ends of a ring, on a thread of its own, and hands it to the ring's thread.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::{DeploymentId, Epoch};
use brigade_net::{Identity, Link};
use brigade_protocol::control::{Held, Peer};
use brigade_protocol::frame::{Attach, Feed};
use brigade_protocol::schedule::Limits;

use super::owner::Event;
use crate::handle::Shared;
use crate::incoming::Incoming;
use crate::loaded::LoadedStage;
use crate::outgoing::{Outgoing, Shadow};
use crate::reach::{attach, while_wanted};
use crate::ring::{Connection, Happening, News, RingEnd, RingLinks, Stop};
use crate::threads::lock;

/// How long the last worker's link may take after all stages have loaded.
const RING_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a ring waits for who stands by for its first stage: longer than a machine that is well takes, and short
/// beside any recovery.
const SHADOW_PATIENCE: Duration = Duration::from_millis(250);

/// Ends a ring from outside.
#[derive(Clone)]
pub(super) struct RingStopper {
    pub(super) stop: Arc<Stop>,
    pub(super) canceller: brigade_engine::Canceller,
    pub(super) links: Arc<Mutex<Vec<Arc<dyn Link>>>>,
}

impl RingStopper {
    /// Ends it.
    pub(super) fn stop(&self, why: &str) {
        self.stop.set(why);
        self.canceller.cancel();
        lock(&self.links).iter().for_each(|link| link.close());
    }
}

/// What a ring is made of.
pub(super) struct Connector {
    pub(super) deployment: DeploymentId,
    pub(super) epoch: Epoch,
    pub(super) limits: Limits,
    /// What all stages hold still.
    pub(super) held: Option<Held>,
    /// The first worker; missing without workers.
    pub(super) first: Option<Peer>,
    /// Who stands by for the first worker's stage.
    pub(super) shadow: Option<Peer>,
    /// Where the link of the last worker comes in.
    pub(super) last_link: Receiver<Arc<dyn Link>>,
    pub(super) stopper: RingStopper,
    pub(super) identity: Arc<Identity>,
    pub(super) shared: Arc<Shared>,
    pub(super) connections: Sender<Connection<LoadedStage>>,
    pub(super) events: Sender<Event>,
}

impl Connector {
    pub(super) fn run(self, tail: LoadedStage) {
        let ended = |tail, end| drop(self.events.send(Event::Ring(News::Ended(self.epoch, Box::new(tail), end))));
        let links = match self.connect() {
            Ok(links) => links,
            Err(_) if self.stopper.stop.is_set() => return ended(tail, RingEnd::Stopped),
            Err(why) => return ended(tail, RingEnd::Broke(why)),
        };
        let connection = Connection {
            deployment: self.deployment,
            epoch: self.epoch,
            tail,
            links,
            limits: self.limits,
            held: self.held.clone(),
            stop: Arc::clone(&self.stopper.stop),
        };
        match self.connections.send(connection) {
            Ok(()) => _ = self.shared.submissions.tell(Happening::Wake),
            Err(back) => ended(back.0.tail, RingEnd::Stopped),
        }
    }

    /// Dials the first worker and waits for the last one.
    fn connect(&self) -> Result<Option<RingLinks>, String> {
        let Some(first) = &self.first else { return Ok(None) };
        let (ever, soon) = (Duration::MAX, SHADOW_PATIENCE);
        let first = self.dial(first, Feed::Passes, ever);
        let first = first.map_err(|why| format!("the first stage cannot be reached: {why}"))?;
        let shadow = self.shadow.as_ref().and_then(|shadow| match self.dial(shadow, Feed::Shadow, soon) {
            Ok(link) => Shadow::new(link).ok(),
            Err(why) => {
                tracing::warn!(why, "who stands by for the first stage gets no frames");
                None
            }
        });
        let until = Instant::now() + RING_TIMEOUT;
        loop {
            match self.last_link.recv_timeout(Duration::from_millis(50)) {
                Ok(last) => {
                    self.own(Arc::clone(&last))?;
                    let no_thread = |error: std::io::Error| format!("no thread for a link: {error}");
                    let first = Outgoing::new(first).map_err(no_thread)?;
                    let submissions = self.shared.submissions.clone();
                    let tell = move || _ = submissions.tell(Happening::Frame);
                    let last = Incoming::start_with(last, tell);
                    return Ok(Some(RingLinks { first, shadow, last: last.map_err(no_thread)? }));
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() < until => self.check_stop()?,
                Err(_) => return Err("the last stage did not reach this node".to_owned()),
            }
        }
    }

    /// A link to a stage, unless the ring is stopped or `patience` is over before it is there.
    fn dial(&self, peer: &Peer, feed: Feed, patience: Duration) -> Result<Arc<dyn Link>, String> {
        let (identity, to, begin) = (Arc::clone(&self.identity), peer.clone(), Instant::now());
        let purpose = Attach { deployment: self.deployment, epoch: self.epoch, stage: 0, feed };
        let dial = move || attach(&identity, &to, purpose);
        let is_wanted = || !self.stopper.stop.is_set() && begin.elapsed() < patience;
        let dialled = while_wanted(dial, is_wanted, |result| drop(result.map(|link| link.close())));
        let link = dialled.ok_or("it did not answer in time")?.map_err(|error| error.to_string())?;
        self.own(Arc::clone(&link))?;
        Ok(link)
    }

    /// Whoever stops the ring sets the flag before it closes the links that it finds.
    fn own(&self, link: Arc<dyn Link>) -> Result<(), String> {
        lock(&self.stopper.links).push(link);
        self.check_stop()
    }

    fn check_stop(&self) -> Result<(), String> {
        match self.stopper.stop.is_set() {
            true => Err("it was stopped".to_owned()),
            false => Ok(()),
        }
    }
}
