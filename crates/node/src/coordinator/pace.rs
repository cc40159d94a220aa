//! How fast this node and its workers are: asked before they get a stage, and looked after while they have one.
//!
//! A worker's offer is held back until it has told how fast it is, or its time is over. From then on what its stages
//! take is compared with that, and where they differ the state machine is told so.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use brigade_base::NodeId;
use brigade_plan::{LinkProfile, Optimize, Speed};
use brigade_protocol::cluster::{Input, Phase};
use brigade_protocol::control::{ModelRef, Offer, ToWorker};
use brigade_protocol::measure::{LinkReport, MAX_PEERS, Measure, Measured};

use super::owner::{Event, Owner};
use crate::adapters::Adapters;
use crate::measure::{self, MeasureOptions, MeasureRequest, ProfileKey, Profiles};
use crate::meter::{Expected, ExpectedStage};
use crate::probe::LinkBook;
use crate::threads::{seconds_since_1970, spawn};

/// So long a worker may measure; then it takes part without. It has five seconds, and time to get there.
const MEASURE_WITHIN: Duration = Duration::from_secs(8);

/// How often it is looked whether a node has become slower or faster.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How often a node that became slow and has no stage any more measures itself anew: seldom, since that disturbs
/// whoever uses the machine.
const AGAIN_EVERY: Duration = Duration::from_secs(300);

/// By how much a node's pace must change before others are told: what passes take wavers by some percent.
const TELLING: f64 = 0.1;

/// Beyond this a number is a mistake, and no pace.
const PACES: std::ops::RangeInclusive<f64> = 0.05..=50.0;

/// How fast a node is.
struct Known {
    /// As it measured itself.
    speed: Speed,
    /// How many times as long it takes now, as far as others were told.
    factor: f64,
    /// Seconds of a row in a mean layer when it was fastest.
    best_s: f64,
}

impl Known {
    fn row_s(&self) -> f64 {
        self.speed.decode.at(1.0) * self.factor
    }

    /// Whether it was clearly faster once.
    fn is_slowed(&self) -> bool {
        self.row_s() > self.best_s * (1.0 + TELLING)
    }
}

/// A worker that does not take part yet.
struct Waits {
    offer: Offer,
    since: Instant,
    /// It has told how fast it is, and waits for this node.
    is_measured: bool,
}

/// What is known of speeds.
#[derive(Default)]
pub(super) struct Pace {
    /// This node is still measuring itself, since then.
    own_since: Option<Instant>,
    /// Ends that.
    cancel: Arc<AtomicBool>,
    /// Workers that do not take part yet.
    waiting: HashMap<NodeId, Waits>,
    speeds: HashMap<NodeId, Known>,
    /// What workers measured of links, and what they said went wrong.
    reports: HashMap<NodeId, (Vec<LinkReport>, Option<String>)>,
    looked: Option<Instant>,
    /// When nodes that became slow lost their stages, or were asked to measure themselves anew.
    asked_again: HashMap<NodeId, Instant>,
}

impl Pace {
    /// This node measures itself.
    pub(super) fn begin_own(&mut self) {
        self.own_since = Some(Instant::now());
    }

    /// Whether the first placement is to wait for this node's own measurement.
    pub(super) fn waits(&self) -> bool {
        self.own_since.is_some_and(|since| since.elapsed() < MEASURE_WITHIN)
    }

    /// The offer of a worker that is still measuring.
    pub(super) fn offer(&self, node: NodeId) -> Option<&Offer> {
        self.waiting.get(&node).map(|waits| &waits.offer)
    }

    /// What was measured of a node while nothing else ran.
    pub(super) fn speed(&self, node: NodeId) -> Option<&Speed> {
        self.speeds.get(&node).map(|known| &known.speed)
    }

    /// How many times as long as measured a node takes; `None` if nothing was measured.
    pub(super) fn factor(&self, node: NodeId) -> Option<f64> {
        self.speeds.get(&node).map(|known| known.factor)
    }

    /// A node has measured itself.
    fn note(&mut self, node: NodeId, speed: Speed) {
        let before = self.speeds.get(&node).map_or(f64::INFINITY, |known| known.best_s);
        let best_s = before.min(speed.decode.at(1.0));
        self.speeds.insert(node, Known { speed, factor: 1.0, best_s });
    }

    /// What workers measured of their links, by who did.
    pub(super) fn links(&self) -> impl Iterator<Item = (NodeId, &LinkReport)> {
        self.reports.iter().flat_map(|(node, (links, _))| links.iter().map(move |link| (*node, link)))
    }

    /// What went wrong when a worker measured itself.
    pub(super) fn trouble(&self, node: NodeId) -> Option<&str> {
        self.reports.get(&node)?.1.as_deref()
    }

    /// Ends this node's own measurement, if it still measures.
    pub(super) fn end(&self) {
        self.cancel.store(true, Ordering::Relaxed);
        measure::wait_until_over();
    }

    /// A worker is gone.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.waiting.remove(&node);
        self.speeds.remove(&node);
        self.reports.remove(&node);
        self.reports.values_mut().for_each(|(links, _)| links.retain(|link| link.peer != node));
        self.asked_again.remove(&node);
    }
}

impl Owner {
    fn is_measured(&self) -> bool {
        self.work.optimize(self.options.optimize) != Optimize::Memory
    }

    /// Begins to measure this node, unless speeds do not count. One that has taken over from another coordinator uses
    /// what it knows already: nobody is to wait for it.
    pub(super) fn measure_own(&mut self) {
        if !self.is_measured() {
            return;
        }
        self.pace.begin_own();
        let file = Arc::clone(self.model.file());
        let request = MeasureRequest {
            catalog: file.catalog().clone(),
            context: self.context,
            sessions: self.options.parallel,
            max_rows: self.max_rows(),
            kv: self.options.kv,
        };
        let options = MeasureOptions::new(self.options.threads, self.options.throttle, Some(file));
        self.pace.cancel = Arc::clone(&options.cancel);
        let (profiles, events, is_urgent) =
            (Profiles::open(&self.options.state_dir), self.events.clone(), self.took_over);
        let measure = move || {
            let known = || profiles.get(&ProfileKey::of(&request, &options));
            let measured = || measure::speed(&request, &options, &profiles, false);
            let speed = if is_urgent {
                known()
            } else {
                measured().inspect_err(|error| tracing::warn!(%error, "this node's speed is not known")).ok()
            };
            let _ = events.send(Event::OwnSpeed(speed.map(Box::new)));
        };
        if let Err(error) = spawn("measure", measure) {
            tracing::warn!(%error, "this node's speed is not known");
        }
    }

    /// This node has measured itself, or cannot: the model may be placed from now on.
    pub(super) fn own_speed(&mut self, speed: Option<Box<Speed>>) -> Option<String> {
        let own = self.identity.node_id();
        if let Some(speed) = &speed {
            self.pace.note(own, Speed::clone(speed));
        }
        self.settings.coordinator.speed = speed.as_deref().cloned();
        let given_up = self.feed(Input::Measured(own, speed, self.known_links()));
        self.speeds_changed();
        given_up.or(self.begin())
    }

    /// Links that this node measured when it was a worker.
    fn known_links(&self) -> Vec<(NodeId, NodeId, LinkProfile)> {
        let own = self.identity.node_id();
        let book = LinkBook::open(&self.options.state_dir, &self.shared.link_addresses);
        let both_ways = |(peer, link): (NodeId, LinkReport)| [(own, peer, link.there), (peer, own, link.back)];
        book.all(seconds_since_1970()).flat_map(both_ways).collect()
    }

    /// This node's own measurement is over, or takes too long.
    fn begin(&mut self) -> Option<String> {
        self.pace.own_since = None;
        let mut given_up = self.feed(Input::Tick);
        let measured: Vec<NodeId> =
            self.pace.waiting.iter().filter(|(_, waits)| waits.is_measured).map(|(id, _)| *id).collect();
        for id in measured {
            given_up = given_up.or(self.admit(id));
        }
        given_up
    }

    /// A worker offers itself: it is asked how fast it is first. Nobody waits for that where answers wait already,
    /// since another coordinator was lost.
    pub(super) fn offered(&mut self, id: NodeId, offer: Offer) -> Option<String> {
        if !self.is_measured() {
            // Told of before it is assigned anything, and of where it listens.
            self.pace.waiting.insert(id, Waits { offer, since: Instant::now(), is_measured: false });
            self.tell_fellows();
            return self.admit(id);
        }
        self.pace.waiting.insert(id, Waits { offer, since: Instant::now(), is_measured: false });
        self.tell_fellows();
        self.ask_to_measure(id, false);
        if self.took_over { self.admit(id) } else { None }
    }

    fn ask_to_measure(&self, id: NodeId, again: bool) {
        let model = self.model_ref();
        // The coordinator first: it sends the weights.
        let others = self.workers.keys().filter(|other| **other != id);
        let peers = std::iter::once(self.identity.node_id()).chain(others.copied());
        let peers =
            peers.map(|node| self.peer(node)).filter(|peer| !peer.addresses.is_empty()).take(MAX_PEERS).collect();
        self.send(id, ToWorker::Measure(Box::new(Measure { model, peers, again })));
    }

    /// What a stage's node needs to know of the model.
    pub(super) fn model_ref(&self) -> ModelRef {
        ModelRef {
            name: self.shared.card.name.clone(),
            header_hash: self.model.header_hash(),
            header: self.header.clone(),
            context: self.context,
            sessions: self.options.parallel,
            max_rows: self.max_rows(),
            kv: self.options.kv,
            adapters: self.model.adapters().map(Adapters::to_ref),
        }
    }

    /// A worker has told how fast it is.
    pub(super) fn measured(&mut self, id: NodeId, measured: Measured) -> Option<String> {
        let Measured { speed, is_fresh, mut links, trouble } = measured;
        if let Some(trouble) = &trouble {
            tracing::warn!(node = %id.short(), trouble, "a worker could not measure everything");
        }
        // One that says what it knows, or nothing, is as fast as it was found to be.
        let known = self.pace.speeds.get(&id).map(|known| known.speed.slowed(known.factor));
        let now = if is_fresh { speed.clone().or(known) } else { known.or_else(|| speed.clone()) };
        if let Some(speed) = speed.filter(|_| is_fresh || !self.pace.speeds.contains_key(&id)) {
            self.pace.note(id, speed);
        }
        links.retain(|link| link.peer == self.identity.node_id() || self.workers.contains_key(&link.peer));
        let both_ways = links.iter().flat_map(|link| [(id, link.peer, link.there), (link.peer, id, link.back)]);
        let known: Vec<(NodeId, NodeId, LinkProfile)> = both_ways.collect();
        self.pace.reports.insert(id, (links, trouble));
        let given_up = self.feed(Input::Measured(id, now.map(Box::new), known));
        self.speeds_changed();
        if let Some(waits) = self.pace.waiting.get_mut(&id) {
            waits.is_measured = true;
        }
        given_up.or_else(|| if self.pace.waits() { None } else { self.admit(id) })
    }

    /// A worker takes part from now on, if it waits for that.
    fn admit(&mut self, id: NodeId) -> Option<String> {
        let waits = self.pace.waiting.remove(&id)?;
        self.feed(Input::Offer(id, waits.offer))
    }

    /// What stages take is compared with what is known now, and what would be better is looked for anew.
    fn speeds_changed(&mut self) {
        self.advice.0 = None;
        if matches!(self.cluster.phase(), Phase::Ready) {
            self.meter.expect(self.expected());
        }
    }

    /// Admits those that measure for too long, and looks how fast stages are.
    pub(super) fn look_at_paces(&mut self) -> Option<String> {
        let mut given_up = None;
        if self.pace.own_since.is_some() && !self.pace.waits() {
            tracing::warn!("this node is still measuring itself; the model is placed without");
            given_up = self.begin();
        }
        let late = |waits: &Waits| waits.since.elapsed() >= MEASURE_WITHIN && !self.pace.waits();
        let late: Vec<NodeId> = self.pace.waiting.iter().filter(|(_, waits)| late(waits)).map(|(id, _)| *id).collect();
        for id in late {
            tracing::warn!(node = %id.short(), "a worker did not tell how fast it is; it takes part without");
            given_up = given_up.or(self.admit(id));
        }
        if self.pace.looked.is_none_or(|looked| looked.elapsed() >= LOOK_EVERY) {
            self.pace.looked = Some(Instant::now());
            given_up = given_up.or(self.tell_paces());
            self.ask_idle_again();
        }
        given_up
    }

    fn tell_paces(&mut self) -> Option<String> {
        let paces = self.meter.paces();
        let mut given_up = None;
        for (id, factor) in &paces {
            // One that serves two stages computes them in turn, and neither time says how fast it is.
            let is_alone = paces.iter().filter(|(other, _)| other == id).count() == 1;
            let Some(factor) = factor.filter(|f| is_alone && PACES.contains(f)) else { continue };
            let Some(known) = self.pace.speeds.get_mut(id) else { continue };
            if (factor / known.factor - 1.0).abs() < TELLING {
                continue;
            }
            tracing::info!(node = %id.short(), factor, before = known.factor, "a node's pace has changed");
            known.factor = factor;
            let speed = Some(Box::new(known.speed.slowed(factor)));
            given_up = given_up.or(self.feed(Input::Measured(*id, speed, Vec::new())));
            self.advice.0 = None;
        }
        given_up
    }

    /// Lets those that became slow and lost their stages for it measure themselves anew, after a while: a game that was
    /// played may be over.
    fn ask_idle_again(&mut self) {
        let idle = self.cluster.members().iter().filter(|member| member.stages.is_empty()).map(|member| member.id);
        let slow: Vec<NodeId> = idle.filter(|id| self.pace.speeds.get(id).is_some_and(Known::is_slowed)).collect();
        self.pace.asked_again.retain(|id, _| slow.contains(id));
        for id in slow {
            let since = *self.pace.asked_again.entry(id).or_insert_with(Instant::now);
            if since.elapsed() >= AGAIN_EVERY {
                self.ask_to_measure(id, true);
                self.pace.asked_again.insert(id, Instant::now());
            }
        }
    }

    /// What the stages of the present placement are expected to take.
    pub(super) fn expected(&self) -> Option<Expected> {
        let model = self.settings.model.clone();
        let of = |stage: &brigade_plan::PlannedStage| ExpectedStage {
            node: stage.node,
            speed: self.pace.speed(stage.node).cloned(),
            work: model.work(stage.layers),
        };
        let stages: Vec<ExpectedStage> = self.stages().iter().map(of).collect();
        stages.iter().any(|stage| stage.speed.is_some()).then_some(Expected { model, stages })
    }
}
