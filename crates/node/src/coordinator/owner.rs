//! The coordinator's owner loop: what happens becomes an input of the state machine, its actions become deeds.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use brigade_base::{DeploymentId, Epoch, LayerRange, NodeId};
use brigade_gguf::{StageView, StageViewError, TensorSource};
use brigade_net::{Identity, Link, TcpLink};
use brigade_plan::{PlannedStage, Speed};
use brigade_protocol::cluster::{Action, Cluster, Input, Order, Role, Settings};
use brigade_protocol::control::{Assign, HEARTBEAT_MS, Held, Peer, StageOrder, StageRole, ToCoordinator, ToWorker};
use brigade_protocol::frame::{Attach, Feed};
use brigade_protocol::schedule::Limits;

use super::connector::{Connector, RingStopper};
use super::door::RequestLinks;
use super::muster::{Muster, Voters};
use super::pace::Pace;
use super::sharing::Claims;
use super::worker_link::{Pulse, WorkerLink, read_worker, with_seen_address, write_worker};
use super::{CoordinatorError, CoordinatorOptions};
use crate::adapters::Adapters;
use crate::council::CouncilHost;
use crate::doctor::Report;
use crate::handle::Shared;
use crate::images::Images;
use crate::loaded::{LoadedStage, StageFiles, StageKey, chain, load_stage};
use crate::meter::Meter;
use crate::model::LocalModel;
use crate::outgoing::Shadow;
use crate::purpose::Work;
use crate::reach::attach;
use crate::ring::{Connection, Happening, News, RingEnd, Watch};
use crate::serving::Failure;
use crate::share::Tally;
use crate::site::Keeping;
use crate::sizes::view_of;
use crate::threads::{lock, spawn};

/// How often the status is brought up to date while nothing happens.
const PUBLISH_EVERY: Duration = Duration::from_millis(HEARTBEAT_MS);

/// How often it is looked whether a pass is stuck, while one is awaited.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Stages that have not moved for so long, while a pass is late, do not compute it: four heartbeats, which tell whether
/// they move.
const STILL: Duration = Duration::from_millis(4 * HEARTBEAT_MS);

/// How long a worker that wants to end waits for its stages to be placed elsewhere although nothing is to be answered.
const LINGER: Duration = Duration::from_secs(2);

/// What an image has for each token beside its KV: position and session, twice as much as libllama writes.
const IMAGE_TOKEN_BYTES: u64 = 32;

/// What the other threads tell the owner loop.
pub(super) enum Event {
    WorkerLink(Arc<TcpLink>),
    Message(NodeId, u64, ToCoordinator),
    WorkerGone(NodeId, u64, String),
    DataLink(Arc<dyn Link>, Attach),
    TailProgress(Epoch, f32),
    TailLoaded(Epoch, Result<Box<LoadedStage>, String>),
    /// This node has measured itself, or cannot.
    OwnSpeed(Option<Box<Speed>>),
    Ring(News<LoadedStage>),
    /// All nodes are to be examined; who asks hears of it.
    Examine(Sender<Report>),
    Stop,
}

pub(super) enum Tail {
    Empty,
    Loading(Arc<AtomicBool>),
    Loaded(Box<LoadedStage>),
    /// The ring thread has it.
    InRing,
}

/// The tail that a placement wants.
#[derive(Debug, Clone, Copy)]
pub(super) struct TailWanted {
    epoch: Epoch,
    stage: u32,
    layers: LayerRange,
    keep_kv: bool,
}

/// A ring waits for the link of the last worker.
pub(super) struct RingWait {
    attach: Attach,
    last: NodeId,
    sender: Sender<Arc<dyn Link>>,
}

/// The nodes around the coordinator in a ring.
struct RingEnds {
    first: Option<NodeId>,
    last: Option<NodeId>,
    shadow: Option<NodeId>,
    n_stages: u32,
}

/// All state of a coordinator.
pub(super) struct Owner {
    pub(super) cluster: Cluster,
    pub(super) settings: Settings,
    pub(super) muster: Muster,
    pub(super) voters: Voters,
    pub(super) pace: Pace,
    pub(super) claims: Claims,
    /// Who waits for workers to examine themselves.
    pub(super) askers: Vec<Sender<Report>>,
    /// Another node coordinated before.
    pub(super) took_over: bool,
    /// The links of gateways, which end with this.
    pub(super) requests: Arc<RequestLinks>,
    /// Weights that this node has sent.
    pub(super) tally: Arc<Tally>,
    /// Who computes along in the present epoch: whose frames, and who.
    pub(super) shadows: Vec<(Epoch, u32, NodeId)>,
    pub(super) council: Arc<CouncilHost>,
    pub(super) had_quorum: bool,
    pub(super) model: Arc<LocalModel>,
    /// The model's header without its vocabulary, as workers get it.
    pub(super) header: Vec<u8>,
    pub(super) identity: Arc<Identity>,
    pub(super) options: CoordinatorOptions,
    pub(super) context: u32,
    /// What is done with the model.
    pub(super) work: Work,
    pub(super) shared: Arc<Shared>,
    pub(super) meter: Arc<Meter>,
    pub(super) events: Sender<Event>,
    pub(super) workers: HashMap<NodeId, WorkerLink>,
    /// Those that want to end and were not told yet that they may, and since when.
    pub(super) leavers: HashMap<NodeId, Instant>,
    pub(super) next_generation: u64,
    pub(super) tail: Tail,
    /// The tail that the present placement wants, until its loading begins.
    pub(super) tail_wanted: Option<TailWanted>,
    /// The one that is being loaded.
    pub(super) tail_loading: Option<TailWanted>,
    pub(super) tail_share: f32,
    /// Where a ring waits for the link of the last worker.
    pub(super) ring_waits: Option<RingWait>,
    pub(super) ring_stop: Option<RingStopper>,
    /// To the ring's thread.
    pub(super) connections: Sender<Connection<LoadedStage>>,
    pub(super) ring_thread: Option<JoinHandle<()>>,
    /// What that thread waits for.
    pub(super) watch: Arc<Watch>,
    /// What sessions that wait were told is missing.
    pub(super) said_missing: String,
    /// The epoch of which it was said that it is slow.
    pub(super) said_slow: Option<Epoch>,
    /// What would be better than a placement, and which one.
    pub(super) advice: (Option<Epoch>, Vec<String>),
    pub(super) started: Instant,
    pub(super) _keeper: Keeping,
}

impl Owner {
    pub(super) fn run(mut self, inbox: &Receiver<Event>) -> Result<(), CoordinatorError> {
        self.measure_own();
        let result = match self.muster(inbox) {
            Some(early) => self.serve(early, inbox),
            None => Ok(()),
        };
        self.shared.stopping();
        self.stop_ring("the coordinator was stopped");
        // Callers hear the end before this process ends.
        self.shared.submissions.tell(Happening::Stop(Failure::Stopping));
        if let Some(thread) = self.ring_thread.take() {
            let _ = thread.join();
        }
        for worker in self.workers.values() {
            let _ = worker.outbox.send(ToWorker::Goodbye { reason: "the coordinator was stopped".to_owned() });
        }
        self.pace.end();
        // The writers send what is left and then close their links.
        self.workers.clear();
        self.requests.close_all();
        result
    }

    /// Waits for the nodes of the coordinator before, so that all take part in the first placement. Returns what is to
    /// be applied after it begins; `None` if this is to stop.
    fn muster(&mut self, inbox: &Receiver<Event>) -> Option<Vec<Event>> {
        let mut early = Vec::new();
        loop {
            let is_here = |event: &&Event| match event {
                Event::Message(id, generation, ToCoordinator::Offer(_)) => self.is_current(*id, *generation),
                _ => false,
            };
            let n_here = early.iter().filter(is_here).count();
            if !self.muster.waits(n_here) {
                let nodes_wanted = self.settings.nodes_wanted.max(n_here + 1);
                self.cluster = Cluster::new(Settings { nodes_wanted, ..self.settings.clone() });
                return Some(early);
            }
            match inbox.recv_timeout(LOOK_EVERY) {
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return None,
                Ok(Event::WorkerLink(link)) => self.greet_worker(&link),
                // What it has said is not heeded then.
                Ok(Event::WorkerGone(id, generation, _)) if self.is_current(id, generation) => {
                    self.workers.remove(&id);
                }
                Ok(event) => early.push(event),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Coordinates until it is stopped or cannot go on.
    fn serve(&mut self, early: Vec<Event>, inbox: &Receiver<Event>) -> Result<(), CoordinatorError> {
        let mut given_up = self.tick();
        for event in early {
            given_up = given_up.or(self.apply(event));
        }
        loop {
            if let Some(reason) = given_up.take() {
                return Err(CoordinatorError::Tail(reason));
            }
            self.load_tail_if_due();
            self.publish();
            let tick = self.cluster.next_tick().map(|at| at.saturating_duration_since(Instant::now()));
            let look = if self.watch.awaited().is_some() { LOOK_EVERY } else { PUBLISH_EVERY };
            match inbox.recv_timeout(tick.unwrap_or(look).min(look)) {
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Ok(event) => given_up = self.apply(event),
                Err(RecvTimeoutError::Timeout) => given_up = self.tick(),
            }
            if let Some(stuck) = self.stuck() {
                given_up = given_up.or(self.feed(stuck));
            }
            given_up = given_up.or(self.ask_council());
            given_up = given_up.or(self.look_at_paces());
            self.dismiss_leavers();
        }
    }

    /// Time has passed. The first placement waits for this node's own speed.
    fn tick(&mut self) -> Option<String> {
        if self.pace.waits() { None } else { self.feed(Input::Tick) }
    }

    /// Tells the council who is here, and asks it whether that is enough to place the model on others.
    fn ask_council(&mut self) -> Option<String> {
        if let Some(proposal) = self.voters.proposal() {
            self.council.propose(proposal);
        }
        let has_quorum = self.council.has_quorum();
        if std::mem::replace(&mut self.had_quorum, has_quorum) == has_quorum {
            return None;
        }
        if !has_quorum {
            tracing::warn!("a majority of the cluster's nodes is out of reach");
        }
        self.feed(Input::Quorum(has_quorum))
    }

    /// Lets those go that nobody can replace, if nobody waits for an answer either.
    fn dismiss_leavers(&mut self) {
        self.leavers.retain(|node, _| self.workers.contains_key(node));
        let due: Vec<NodeId> =
            self.leavers.iter().filter(|(_, since)| since.elapsed() >= LINGER).map(|(node, _)| *node).collect();
        if due.is_empty() || self.shared.open.count() > 0 {
            return;
        }
        for node in due {
            self.leavers.remove(&node);
            self.send(node, ToWorker::Released);
        }
    }

    /// Returns why the coordinator must give up, if it must.
    fn apply(&mut self, event: Event) -> Option<String> {
        match event {
            Event::WorkerLink(link) => {
                self.greet_worker(&link);
                None
            }
            Event::Message(id, generation, message) if self.is_current(id, generation) => self.message(id, message),
            Event::WorkerGone(id, generation, reason) if self.is_current(id, generation) => {
                tracing::warn!(node = %id.short(), reason, "a worker is gone");
                self.workers.remove(&id);
                self.tell_fellows();
                self.pace.forget(id);
                self.voters.went(id, false);
                if let Some(member) = self.cluster.members().iter().find(|m| m.id == id) {
                    let name = &member.offer.name;
                    self.meter.gone(name);
                    if member.layers().is_some() {
                        let gone = format!("node {name} is gone ({reason})");
                        self.shared.submissions.tell(Happening::Gone(gone));
                    }
                }
                self.feed(Input::Gone(id, reason))
            }
            Event::Message(..) | Event::WorkerGone(..) => None,
            Event::DataLink(link, attach) => {
                match &self.ring_waits {
                    Some(wait) if wait.attach == attach && wait.last == link.peer() => {
                        let _ = wait.sender.send(link);
                    }
                    _ => link.close(),
                }
                None
            }
            Event::TailProgress(epoch, share) => {
                if epoch == self.cluster.epoch() {
                    self.tail_share = share;
                }
                None
            }
            Event::TailLoaded(epoch, result) => self.tail_loaded(epoch, result),
            Event::OwnSpeed(speed) => self.own_speed(speed),
            Event::Examine(asker) => {
                self.examine(asker);
                None
            }
            Event::Ring(News::WentAround(epoch)) => self.feed(Input::WentAround(epoch)),
            Event::Ring(News::Drained(epoch)) => self.feed(Input::Drained(epoch)),
            Event::Ring(News::Ended(epoch, tail, end)) => {
                self.tail = Tail::Loaded(tail);
                self.ring_stop = None;
                self.ring_waits = None;
                match end {
                    RingEnd::Broke(reason) => {
                        tracing::warn!(%epoch, reason, "the ring broke");
                        self.feed(Input::RingBroke(None, epoch, reason))
                    }
                    RingEnd::Stopped => None,
                }
            }
            Event::Stop => None,
        }
    }

    fn is_current(&self, id: NodeId, generation: u64) -> bool {
        self.workers.get(&id).is_some_and(|worker| worker.generation == generation)
    }

    fn greet_worker(&mut self, link: &Arc<TcpLink>) {
        let generation = self.next_generation;
        self.next_generation += 1;
        let id = link.peer();
        let (outbox, messages) = channel();
        let pulse = Arc::new(Mutex::new(Pulse::default()));
        let (reader_link, writer_link) = (Arc::clone(link), Arc::clone(link));
        let (reader_pulse, writer_pulse) = (Arc::clone(&pulse), Arc::clone(&pulse));
        let (events, council) = (self.events.clone(), Arc::clone(&self.council));
        let read = move || {
            let heard = || council.heard(id);
            let reason = read_worker(&*reader_link, &reader_pulse, &heard, |message| {
                let _ = events.send(Event::Message(id, generation, message));
            });
            reader_link.close();
            let _ = events.send(Event::WorkerGone(id, generation, reason));
        };
        let write = move || write_worker(&*writer_link, &writer_pulse, &messages);
        if spawn("worker reader", read).and_then(|()| spawn("worker writer", write)).is_err() {
            return link.close();
        }
        let worker = WorkerLink { generation, outbox, link: Arc::clone(link), pulse };
        if let Some(old) = self.workers.insert(id, worker) {
            old.link.close();
        }
    }

    fn message(&mut self, id: NodeId, message: ToCoordinator) -> Option<String> {
        match message {
            ToCoordinator::Offer(offer) => {
                tracing::info!(node = offer.name, id = %id.short(), memory = %offer.memory, "a worker joined");
                let seen_as = self.workers.get(&id).map(|w| w.link.peer_addr()).unwrap_or_default();
                let offer = with_seen_address(offer, &seen_as);
                self.voters.came(id, &offer);
                self.send(id, ToWorker::Accept { seen_as, deployment: self.deployment() });
                self.offered(id, offer)
            }
            ToCoordinator::Measured(measured) => self.measured(id, *measured),
            ToCoordinator::Examined(examined) => {
                self.examined(id, &examined);
                None
            }
            ToCoordinator::Progress { epoch, stage, done, total } => {
                let share = if total == 0 { 1.0 } else { done as f32 / total as f32 };
                self.feed(Input::Progress(id, epoch, stage, share))
            }
            ToCoordinator::Loaded { epoch, stage, memory, held } => {
                let given_up = self.feed(Input::Loaded(id, epoch, stage, memory, held));
                if stage == 0 && self.options.shadow {
                    self.feed_shadow(id, epoch);
                }
                given_up
            }
            ToCoordinator::Joined { epoch, stage } => self.feed(Input::Joined(id, epoch, stage)),
            ToCoordinator::StageFailed { epoch, stage, reason } => {
                tracing::warn!(node = %id.short(), %epoch, stage, reason, "a worker's stage failed");
                self.feed(Input::StageFailed(id, epoch, stage, reason))
            }
            ToCoordinator::RingBroke { epoch, stage, reason } => {
                tracing::warn!(node = %id.short(), %epoch, stage, reason, "a worker says that the ring broke");
                self.feed(Input::RingBroke(Some(id), epoch, reason))
            }
            ToCoordinator::Leave { reason } => {
                tracing::info!(node = %id.short(), reason, "a worker wants to end");
                self.leavers.entry(id).or_insert_with(Instant::now);
                self.feed(Input::Leave(id, reason))
            }
            ToCoordinator::Goodbye { reason } => {
                if let Some(worker) = self.workers.remove(&id) {
                    worker.link.close();
                }
                self.tell_fellows();
                self.pace.forget(id);
                self.voters.went(id, true);
                self.feed(Input::Gone(id, reason))
            }
            // The reader has taken what it tells.
            ToCoordinator::Pong { .. } => None,
        }
    }

    pub(super) fn send(&self, id: NodeId, message: ToWorker) {
        if let Some(worker) = self.workers.get(&id) {
            let _ = worker.outbox.send(message);
        }
    }

    pub(super) fn feed(&mut self, input: Input) -> Option<String> {
        let actions = self.cluster.handle(Instant::now(), input);
        let mut given_up = None;
        for action in actions {
            match action {
                Action::Assign { node, epoch, revision, orders } => match self.assign(epoch, revision, &orders) {
                    Ok(assign) => {
                        self.claim(node, &orders);
                        self.note_shadows(epoch, &orders);
                        self.send(node, ToWorker::Assign(Box::new(assign)));
                    }
                    Err(error) => given_up = Some(error.to_string()),
                },
                Action::LoadTail { epoch, stage, layers, keep_kv } => {
                    self.stop_ring("the model is placed anew");
                    self.tail_share = 0.0;
                    self.tail_wanted = Some(TailWanted { epoch, stage, layers, keep_kv });
                }
                Action::Join { node, epoch } => {
                    self.send(node, ToWorker::Join { deployment: self.deployment(), epoch });
                }
                Action::StartRing { epoch, first, last, n_stages, shadow, held } => {
                    let ends = RingEnds { first, last, shadow, n_stages };
                    if let Err(error) = self.start_ring(epoch, ends, held) {
                        given_up = Some(error.to_string());
                    }
                }
                Action::Ready { epoch } => {
                    tracing::info!(%epoch, "ready");
                    self.shared.ready();
                }
                Action::Drain { epoch } => _ = self.shared.submissions.tell(Happening::Drain(epoch)),
                Action::StopRing { reason, .. } => {
                    tracing::info!(reason, "the ring is stopped");
                    self.tail_wanted = None;
                    self.shared.not_ready(reason.clone());
                    self.stop_ring(&reason);
                }
                Action::Released { node } => {
                    self.leavers.remove(&node);
                    self.send(node, ToWorker::Released);
                }
                Action::GiveUp { reason } => given_up = Some(reason),
            }
        }
        given_up
    }

    /// Sends the frames of the ring that runs to who has just loaded its first stage to stand by for it. The other
    /// stages get those of the stage before, which is told so.
    fn feed_shadow(&self, node: NodeId, epoch: Epoch) {
        let serves = self.stages().first().is_none_or(|stage| stage.node == node);
        if serves || epoch != self.cluster.epoch() || !matches!(self.tail, Tail::InRing) {
            return;
        }
        let (identity, peer, shared) = (Arc::clone(&self.identity), self.peer(node), Arc::clone(&self.shared));
        let purpose = Attach { deployment: self.deployment(), epoch, stage: 0, feed: Feed::Shadow };
        let dial = move || {
            let link = attach(&identity, &peer, purpose).map_err(|error| error.to_string());
            match link.and_then(|link| Shadow::new(link).map_err(|error| error.to_string())) {
                Ok(shadow) => _ = shared.submissions.tell(Happening::Shadow(epoch, Box::new(shadow))),
                Err(why) => tracing::warn!(why, "who stands by for the first stage gets no frames"),
            }
        };
        if let Err(error) = spawn("dial", dial) {
            tracing::error!(%error, "no thread to dial with");
        }
    }

    /// A node that begins to compute along lacks what is cached.
    fn note_shadows(&mut self, epoch: Epoch, orders: &[Order]) {
        self.shadows.retain(|(of, ..)| *of == epoch);
        for order in orders {
            if let Role::Serve { shadow: Some(node), .. } = order.role
                && !self.shadows.contains(&(epoch, order.stage, node))
            {
                self.shadows.push((epoch, order.stage, node));
                self.shared.submissions.tell(Happening::Shadowed);
            }
        }
    }

    pub(super) fn deployment(&self) -> DeploymentId {
        self.cluster.deployment()
    }

    /// Orders with all that a worker needs to know: what the state machine says in names.
    fn assign(&self, epoch: Epoch, revision: u32, orders: &[Order]) -> Result<Assign, StageViewError> {
        let model = self.model_ref();
        let stages = orders.iter().map(|order| self.stage_order(order)).collect::<Result<Vec<_>, _>>()?;
        let model = (!stages.is_empty()).then_some(model);
        Ok(Assign { deployment: self.deployment(), epoch, revision, model, stages })
    }

    fn stage_order(&self, order: &Order) -> Result<StageOrder, StageViewError> {
        let view = StageView::new(self.model.file().catalog(), order.layers)?;
        let hashes = &self.model.manifest().tensors;
        let role = match order.role {
            Role::Serve { upstream, downstream, shadow, kv_from } => {
                let (downstream, shadow) = (self.peer(downstream), shadow.map(|node| self.peer(node)));
                StageRole::Serve { upstream, downstream, shadow, kv_from }
            }
            Role::Standby { upstream } => StageRole::Standby { upstream },
            Role::HandOver { to } => StageRole::HandOver { to: self.peer(to) },
        };
        Ok(StageOrder {
            stage: order.stage,
            layers: order.layers,
            tensors: view.tensors().iter().map(|&idx| (idx as u32, hashes[idx])).collect(),
            role,
            keep_kv: order.keep_kv,
        })
    }

    /// A node and where it listens.
    pub(super) fn peer(&self, node: NodeId) -> Peer {
        if node == self.identity.node_id() {
            return Peer { node, addresses: self.shared.link_addresses.clone() };
        }
        let member = self.cluster.members().iter().find(|m| m.id == node).map(|m| &m.offer);
        let offer = member.or_else(|| self.pace.offer(node));
        Peer { node, addresses: offer.map(|offer| offer.addresses.clone()).unwrap_or_default() }
    }

    fn load_tail_if_due(&mut self) {
        let Some(TailWanted { epoch, layers, keep_kv, .. }) = self.tail_wanted else { return };
        if !matches!(self.tail, Tail::Empty | Tail::Loaded(_)) {
            return;
        }
        self.tail_loading = self.tail_wanted.take();
        let catalog = self.model.file().catalog();
        let view = match view_of(catalog, layers, self.work.pooling) {
            Ok(view) => view,
            Err(error) => return drop(self.events.send(Event::TailLoaded(epoch, Err(error.to_string())))),
        };
        let adapter = match self.model.adapters().map(|all| all.bundle().cut(catalog, &view)).transpose() {
            Ok(adapter) => adapter.flatten(),
            Err(error) => return drop(self.events.send(Event::TailLoaded(epoch, Err(error.to_string())))),
        };
        let hashes = &self.model.manifest().tensors;
        let key = StageKey {
            header_hash: self.model.header_hash(),
            tensors: view.tensors().iter().map(|&idx| hashes[idx]).collect(),
            layers,
            context: self.context,
            sessions: self.options.parallel,
            max_rows: self.max_rows(),
            kv: self.options.kv,
            adapters: self.model.adapters().map(Adapters::id),
        };
        if let Tail::Loaded(mut tail) = std::mem::replace(&mut self.tail, Tail::Empty)
            && tail.key == key
        {
            tail.runner.next_epoch(keep_kv);
            let _ = self.events.send(Event::TailLoaded(epoch, Ok(tail)));
            self.tail = Tail::Loading(Arc::new(AtomicBool::new(false)));
            return;
        }
        let cancel = Arc::new(AtomicBool::new(false));
        let (cancelled, events, threads) = (Arc::clone(&cancel), self.events.clone(), self.options.threads);
        let source = Arc::clone(self.model.file()) as Arc<dyn TensorSource>;
        let (state_dir, kv_spill) = (self.options.state_dir.clone(), self.options.kv_spill);
        let (throttle, pooling) = (self.options.throttle, self.work.pooling);
        let n_values = pooling.map(|_| self.model.n_values(pooling));
        let load = move || {
            let mut progress = |share| {
                let _ = events.send(Event::TailProgress(epoch, share));
                !cancelled.load(Ordering::Relaxed)
            };
            let images = Images::of_node(&state_dir, kv_spill);
            let files = StageFiles { view: &view, source, adapter };
            let result = load_stage(key, files, pooling, threads, images, &mut progress);
            let throttled = result.map(|mut stage| {
                stage.runner.set_throttle(throttle);
                Box::new(stage)
            });
            let result = throttled.map_err(|error| chain(&error)).and_then(|tail| {
                tail.check_values(n_values)?;
                Ok(tail)
            });
            let _ = events.send(Event::TailLoaded(epoch, result));
        };
        self.tail = Tail::Loading(cancel);
        if let Err(error) = spawn("loader", load) {
            let _ = self.events.send(Event::TailLoaded(epoch, Err(error.to_string())));
        }
    }

    fn tail_loaded(&mut self, epoch: Epoch, result: Result<Box<LoadedStage>, String>) -> Option<String> {
        let was_loading = std::mem::replace(&mut self.tail, Tail::Empty);
        let was_cancelled = matches!(was_loading, Tail::Loading(cancel) if cancel.load(Ordering::Relaxed));
        let own = self.identity.node_id();
        let wanted = self.tail_loading.take().filter(|wanted| wanted.epoch == epoch);
        let (stage, keeps) = wanted.map_or((0, false), |wanted| (wanted.stage, wanted.keep_kv));
        match result {
            Ok(tail) => {
                let memory = tail.memory;
                let held = keeps.then(|| tail.runner.held());
                self.tail = Tail::Loaded(tail);
                self.feed(Input::Loaded(own, epoch, stage, memory, held))
            }
            // Nobody wants it any more; the next placement loads its own.
            Err(_) if was_cancelled => None,
            Err(reason) => self.feed(Input::StageFailed(own, epoch, stage, reason)),
        }
    }

    fn start_ring(&mut self, epoch: Epoch, ends: RingEnds, held: Option<Held>) -> Result<(), CoordinatorError> {
        let tail = match std::mem::replace(&mut self.tail, Tail::InRing) {
            Tail::Loaded(tail) => tail,
            other => {
                self.tail = other;
                return Err(CoordinatorError::Tail("the ring was to start without its tail".to_owned()));
            }
        };
        let (can_save, can_rewind) = (tail.runner.stage().can_save(), tail.runner.stage().can_rewind());
        let limits = self.limits();
        let limits = Limits {
            n_stages: ends.n_stages,
            image_tokens: if can_save { self.image_tokens() } else { 0 },
            can_rewind: limits.can_rewind && can_rewind,
            ..limits
        };
        self.meter.placed(epoch, self.ring_names());
        self.meter.expect(self.expected());
        let stopper = RingStopper {
            stop: Arc::default(),
            canceller: tail.runner.stage().canceller(),
            links: Arc::new(Mutex::new(Vec::new())),
        };
        let (last_sender, last_link) = channel();
        let deployment = self.deployment();
        let attach = Attach { deployment, epoch, stage: ends.n_stages - 1, feed: Feed::Passes };
        self.ring_waits = ends.last.map(|last| RingWait { attach, last, sender: last_sender });
        self.ring_stop = Some(stopper.clone());
        let connector = Connector {
            deployment,
            epoch,
            limits,
            held,
            first: ends.first.map(|node| self.peer(node)),
            shadow: ends.shadow.map(|node| self.peer(node)),
            last_link,
            stopper,
            identity: Arc::clone(&self.identity),
            shared: Arc::clone(&self.shared),
            connections: self.connections.clone(),
            events: self.events.clone(),
        };
        spawn("connector", move || connector.run(*tail))?;
        Ok(())
    }

    /// What bounds the passes of any ring.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            n_slots: self.options.parallel,
            context: self.context,
            chunk: self.work.chunk(self.context),
            n_stages: 1,
            cache: self.options.prefix_cache,
            image_tokens: 0,
            task: self.work.task,
            can_rewind: !self.model.architecture().is_recurrent(),
        }
    }

    /// Most rows of a pass: a chunk, and a row of each session.
    pub(super) fn max_rows(&self) -> u32 {
        self.work.max_rows(self.context, self.options.parallel)
    }

    /// Whether the pass that is awaited will not come: it is late, and for a second no stage has moved at all. One that
    /// is late while stages compute is slow, which is said and no more.
    fn stuck(&mut self) -> Option<Input> {
        let now = Instant::now();
        let awaited = self.watch.awaited().filter(|awaited| now >= awaited.late)?;
        let epoch = self.cluster.epoch();
        let ring: Vec<NodeId> = self.stages().iter().map(|stage| stage.node).collect();
        let pulses: Vec<(NodeId, Pulse)> =
            ring.iter().filter_map(|node| Some((*node, *lock(&self.workers.get(node)?.pulse)))).collect();
        let late = now - awaited.since;
        let moved = pulses.iter().filter_map(|(_, pulse)| pulse.moved).max().unwrap_or(awaited.since);
        let name = |node: NodeId| {
            self.cluster.members().iter().find(|m| m.id == node).map(|m| m.offer.name.clone()).unwrap_or_default()
        };
        // The first one that has not passed it on has it, or its link does not bring it.
        let holder = pulses.iter().find(|(_, pulse)| pulse.progress.sent < awaited.pass);
        if now.saturating_duration_since(moved) < STILL {
            if self.said_slow != Some(epoch) {
                let node = holder.map(|(node, _)| name(*node)).unwrap_or_default();
                tracing::warn!(node, late_ms = late.as_millis() as u64, "a pass takes much longer than usual");
                self.said_slow = Some(epoch);
            }
            return None;
        }
        let at_fault = holder.filter(|(_, pulse)| pulse.progress.received >= awaited.pass).map(|(node, _)| *node);
        let why = match (at_fault, holder) {
            (Some(node), _) => format!("node {} computes a pass no further", name(node)),
            (None, Some((node, _))) => format!("a pass does not reach node {}", name(*node)),
            (None, None) => "a pass does not come back from the last stage".to_owned(),
        };
        tracing::warn!(%epoch, pass = %awaited.pass, late_ms = late.as_millis() as u64, why, "a pass is stuck");
        self.watch.set(None);
        Some(Input::Stuck(at_fault, epoch, why))
    }

    /// The stages of the present plan in ring order; none without one.
    pub(super) fn stages(&self) -> &[PlannedStage] {
        self.cluster.plan().map(|plan| plan.stages.as_slice()).unwrap_or_default()
    }

    /// Names of the nodes in ring order.
    fn ring_names(&self) -> Vec<String> {
        let members = self.cluster.members();
        let name = |id: NodeId| members.iter().find(|m| m.id == id).map_or(&self.options.name, |m| &m.offer.name);
        self.stages().iter().map(|stage| name(stage.node).clone()).collect()
    }

    /// Tokens whose KV cache fits on the disk of every node, as far as each allows.
    fn image_tokens(&self) -> u64 {
        let kv_bytes = self.model.profile(self.options.kv).kv_bytes_per_token;
        let members = self.cluster.members();
        let tokens = self.stages().iter().map(|stage| {
            let room = members.iter().find(|m| m.id == stage.node).map_or(self.options.kv_spill, |m| m.offer.kv_spill);
            let layers = stage.layers.start() as usize..stage.layers.end() as usize;
            room.0 / (kv_bytes[layers].iter().sum::<u64>() + IMAGE_TOKEN_BYTES)
        });
        tokens.min().unwrap_or(0)
    }

    /// Ends the ring, if there is one; its sessions wait for the next.
    fn stop_ring(&mut self, why: &str) {
        if let Some(stopper) = &self.ring_stop {
            stopper.stop(why);
            self.shared.submissions.tell(Happening::Wake);
        }
        if let Tail::Loading(cancel) = &self.tail {
            cancel.store(true, Ordering::Relaxed);
        }
    }
}
