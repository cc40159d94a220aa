//! The coordinator's owner loop: what happens becomes an input of the state machine, its actions become deeds.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::{DeploymentId, Epoch, LayerRange, NodeId};
use brigade_gguf::{StageView, StageViewError, TensorSource};
use brigade_net::{Identity, Link, TcpLink};
use brigade_plan::PlannedStage;
use brigade_protocol::cluster::{Action, Cluster, Input};
use brigade_protocol::control::{Deploy, HEARTBEAT_MS, ToCoordinator, ToWorker};
use brigade_protocol::frame::Attach;
use brigade_protocol::schedule::Limits;

use super::ring_thread::{RingStopper, RingThread};
use super::worker_link::{Pulse, WorkerLink, read_worker, with_seen_address, write_worker};
use super::{CHUNK, CoordinatorError, CoordinatorOptions};
use crate::doorway::Doorway;
use crate::handle::Shared;
use crate::images::Images;
use crate::loaded::{LoadedStage, StageKey, chain, load_stage};
use crate::meter::Meter;
use crate::model::LocalModel;
use crate::ring::RingEnd;
use crate::serving::{Failure, Readiness};
use crate::state_lock::StateLock;
use crate::threads::spawn;

/// How often the status is brought up to date while nothing happens.
const PUBLISH_EVERY: Duration = Duration::from_millis(HEARTBEAT_MS);

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
    WentAround(Epoch),
    RingEnded(Epoch, Box<LoadedStage>, RingEnd),
    Stop,
}

pub(super) enum Tail {
    Empty,
    Loading(Arc<AtomicBool>),
    Loaded(Box<LoadedStage>),
    /// The ring thread has it.
    InRing,
}

/// A ring thread waits for the link of the last worker.
pub(super) struct RingWait {
    attach: Attach,
    last: NodeId,
    sender: Sender<Arc<dyn Link>>,
}

/// All state of a coordinator.
pub(super) struct Owner {
    pub(super) cluster: Cluster,
    pub(super) model: Arc<LocalModel>,
    /// The model's header without its vocabulary, as workers get it.
    pub(super) header: Vec<u8>,
    pub(super) identity: Arc<Identity>,
    pub(super) options: CoordinatorOptions,
    pub(super) context: u32,
    pub(super) shared: Arc<Shared>,
    pub(super) meter: Arc<Meter>,
    pub(super) events: Sender<Event>,
    pub(super) workers: HashMap<NodeId, WorkerLink>,
    pub(super) next_generation: u64,
    pub(super) tail: Tail,
    /// The tail that the present placement wants, until it is loaded.
    pub(super) tail_wanted: Option<(Epoch, LayerRange)>,
    pub(super) tail_share: f32,
    /// Where the ring thread waits for the link of the last worker.
    pub(super) ring_waits: Option<RingWait>,
    pub(super) ring_stop: Option<RingStopper>,
    pub(super) started: Instant,
    pub(super) _doorway: Doorway,
    pub(super) _lock: StateLock,
}

impl Owner {
    pub(super) fn run(mut self, inbox: &Receiver<Event>) -> Result<(), CoordinatorError> {
        let mut given_up = self.feed(Input::Tick);
        let result = loop {
            if let Some(reason) = given_up.take() {
                break Err(CoordinatorError::Tail(reason));
            }
            self.load_tail_if_due();
            self.publish();
            let tick = self.cluster.next_tick().map(|at| at.saturating_duration_since(Instant::now()));
            match inbox.recv_timeout(tick.unwrap_or(PUBLISH_EVERY).min(PUBLISH_EVERY)) {
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => break Ok(()),
                Ok(event) => given_up = self.apply(event),
                Err(RecvTimeoutError::Timeout) => given_up = self.feed(Input::Tick),
            }
        };
        self.stop_ring(Failure::Stopping);
        for worker in self.workers.values() {
            let _ = worker.outbox.send(ToWorker::Goodbye { reason: "the coordinator was stopped".to_owned() });
        }
        // The writers send what is left and then close their links.
        self.workers.clear();
        result
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
                if let Some(member) = self.cluster.members().iter().find(|m| m.id == id) {
                    self.meter.gone(&member.offer.name);
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
            Event::WentAround(epoch) => self.feed(Input::WentAround(epoch)),
            Event::RingEnded(epoch, tail, end) => {
                let mut tail = tail;
                tail.runner.clear();
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
        let events = self.events.clone();
        let read = move || {
            let reason = read_worker(&*reader_link, &reader_pulse, |message| {
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
                self.send(id, ToWorker::Accept { seen_as });
                self.feed(Input::Offer(id, offer))
            }
            ToCoordinator::Progress { epoch, done, total } => {
                let share = if total == 0 { 1.0 } else { done as f32 / total as f32 };
                self.feed(Input::Progress(id, epoch, share))
            }
            ToCoordinator::Loaded { epoch, memory } => self.feed(Input::Loaded(id, epoch, memory)),
            ToCoordinator::Joined { epoch } => self.feed(Input::Joined(id, epoch)),
            ToCoordinator::StageFailed { epoch, reason } => {
                tracing::warn!(node = %id.short(), %epoch, reason, "a worker's stage failed");
                self.feed(Input::StageFailed(id, epoch, reason))
            }
            ToCoordinator::RingBroke { epoch, reason } => {
                tracing::warn!(node = %id.short(), %epoch, reason, "a worker says that the ring broke");
                self.feed(Input::RingBroke(Some(id), epoch, reason))
            }
            ToCoordinator::Goodbye { reason } => {
                if let Some(worker) = self.workers.remove(&id) {
                    worker.link.close();
                }
                self.feed(Input::Gone(id, reason))
            }
            // The reader has taken what it tells.
            ToCoordinator::Pong { .. } => None,
        }
    }

    fn send(&self, id: NodeId, message: ToWorker) {
        if let Some(worker) = self.workers.get(&id) {
            let _ = worker.outbox.send(message);
        }
    }

    fn feed(&mut self, input: Input) -> Option<String> {
        let actions = self.cluster.handle(Instant::now(), input);
        let mut given_up = None;
        for action in actions {
            match action {
                Action::Deploy { node, epoch, layers, upstream, downstream } => {
                    match self.deploy(epoch, layers, upstream, downstream) {
                        Ok(deploy) => self.send(node, ToWorker::Deploy(Box::new(deploy))),
                        Err(error) => given_up = Some(error.to_string()),
                    }
                }
                Action::LoadTail { epoch, layers } => {
                    self.stop_ring(Failure::PlacementLost("the model is placed anew".to_owned()));
                    self.tail_share = 0.0;
                    self.tail_wanted = Some((epoch, layers));
                }
                Action::Join { node, epoch } => {
                    self.send(node, ToWorker::Join { deployment: self.deployment(), epoch });
                }
                Action::StartRing { epoch, first, last, n_stages } => {
                    if let Err(error) = self.start_ring(epoch, first.zip(last), n_stages) {
                        given_up = Some(error.to_string());
                    }
                }
                Action::Ready { epoch } => {
                    tracing::info!(%epoch, "ready");
                    self.shared.set_readiness(Readiness::Ready);
                }
                Action::StopRing { reason, .. } => {
                    self.tail_wanted = None;
                    self.stop_ring(Failure::PlacementLost(reason));
                }
                Action::Undeploy { node, epoch } => {
                    self.send(node, ToWorker::Undeploy { deployment: self.deployment(), epoch });
                }
                Action::GiveUp { reason } => given_up = Some(reason),
            }
        }
        given_up
    }

    pub(super) fn deployment(&self) -> DeploymentId {
        self.cluster.deployment()
    }

    fn deploy(
        &self,
        epoch: Epoch,
        layers: LayerRange,
        upstream: NodeId,
        downstream: NodeId,
    ) -> Result<Deploy, StageViewError> {
        let view = StageView::new(self.model.file().catalog(), layers)?;
        let hashes = &self.model.manifest().tensors;
        let tensors = view.tensors().iter().map(|&idx| (idx as u32, hashes[idx])).collect();
        let downstream_addresses = if downstream == self.identity.node_id() {
            self.shared.link_addresses.clone()
        } else {
            let member = self.cluster.members().iter().find(|m| m.id == downstream);
            member.map(|m| m.offer.addresses.clone()).unwrap_or_default()
        };
        Ok(Deploy {
            deployment: self.deployment(),
            epoch,
            model_name: self.model.name().to_owned(),
            header_hash: self.model.header_hash(),
            header: self.header.clone(),
            layers,
            tensors,
            context: self.context,
            sessions: self.options.parallel,
            max_rows: CHUNK + self.options.parallel,
            upstream,
            downstream,
            downstream_addresses,
        })
    }

    fn load_tail_if_due(&mut self) {
        let Some((epoch, layers)) = self.tail_wanted else { return };
        if !matches!(self.tail, Tail::Empty | Tail::Loaded(_)) {
            return;
        }
        self.tail_wanted = None;
        let catalog = self.model.file().catalog();
        let view = match StageView::new(catalog, layers) {
            Ok(view) => view,
            Err(error) => return drop(self.events.send(Event::TailLoaded(epoch, Err(error.to_string())))),
        };
        let hashes = &self.model.manifest().tensors;
        let key = StageKey {
            header_hash: self.model.header_hash(),
            tensors: view.tensors().iter().map(|&idx| hashes[idx]).collect(),
            layers,
            context: self.context,
            sessions: self.options.parallel,
            max_rows: CHUNK + self.options.parallel,
        };
        if let Tail::Loaded(tail) = std::mem::replace(&mut self.tail, Tail::Empty)
            && tail.key == key
        {
            let _ = self.events.send(Event::TailLoaded(epoch, Ok(tail)));
            self.tail = Tail::Loading(Arc::new(AtomicBool::new(false)));
            return;
        }
        let cancel = Arc::new(AtomicBool::new(false));
        let (cancelled, events, threads) = (Arc::clone(&cancel), self.events.clone(), self.options.threads);
        let source = Arc::clone(self.model.file()) as Arc<dyn TensorSource>;
        let (state_dir, kv_spill) = (self.options.state_dir.clone(), self.options.kv_spill);
        let load = move || {
            let mut progress = |share| {
                let _ = events.send(Event::TailProgress(epoch, share));
                !cancelled.load(Ordering::Relaxed)
            };
            let images = Images::of_node(&state_dir, kv_spill);
            let result = load_stage(key, &view, source, threads, images, &mut progress);
            let result = result.map(Box::new).map_err(|error| chain(&error));
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
        match result {
            Ok(tail) => {
                let memory = tail.memory;
                self.tail = Tail::Loaded(tail);
                self.feed(Input::Loaded(own, epoch, memory))
            }
            // Nobody wants it any more; the next placement loads its own.
            Err(_) if was_cancelled => None,
            Err(reason) => self.feed(Input::StageFailed(own, epoch, reason)),
        }
    }

    fn start_ring(
        &mut self,
        epoch: Epoch,
        ends: Option<(NodeId, NodeId)>,
        n_stages: u32,
    ) -> Result<(), CoordinatorError> {
        let tail = match std::mem::replace(&mut self.tail, Tail::InRing) {
            Tail::Loaded(tail) => tail,
            other => {
                self.tail = other;
                return Err(CoordinatorError::Tail("the ring was to start without its tail".to_owned()));
            }
        };
        let attach = Attach { deployment: self.deployment(), epoch };
        let can_save = tail.runner.stage().can_save();
        let limits = Limits {
            n_slots: self.options.parallel,
            context: self.context,
            chunk: CHUNK,
            n_stages,
            cache: self.options.prefix_cache,
            image_tokens: if can_save { self.image_tokens() } else { 0 },
        };
        self.meter.placed(epoch, self.ring_names());
        let stopper = RingStopper {
            stop: Arc::new(AtomicBool::new(false)),
            canceller: tail.runner.stage().canceller(),
            links: Arc::new(Mutex::new(Vec::new())),
        };
        let (last_sender, last_link) = channel();
        self.ring_waits = ends.map(|(_, last)| RingWait { attach, last, sender: last_sender });
        self.ring_stop = Some(stopper.clone());
        let first = ends.map(|(first, _)| {
            let member = self.cluster.members().iter().find(|m| m.id == first);
            (first, member.map(|m| m.offer.addresses.clone()).unwrap_or_default())
        });
        let thread = RingThread {
            attach,
            first,
            last_link,
            limits,
            stopper,
            model: Arc::clone(&self.model),
            identity: Arc::clone(&self.identity),
            meter: Arc::clone(&self.meter),
            shared: Arc::clone(&self.shared),
            events: self.events.clone(),
        };
        spawn("ring", move || thread.run(*tail))?;
        Ok(())
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
        let kv_bytes = self.model.profile().kv_bytes_per_token;
        let members = self.cluster.members();
        let tokens = self.stages().iter().map(|stage| {
            let room = members.iter().find(|m| m.id == stage.node).map_or(self.options.kv_spill, |m| m.offer.kv_spill);
            let layers = stage.layers.start() as usize..stage.layers.end() as usize;
            room.0 / (kv_bytes[layers].iter().sum::<u64>() + IMAGE_TOKEN_BYTES)
        });
        tokens.min().unwrap_or(0)
    }

    /// Ends the ring, if there is one; its sessions hear why.
    fn stop_ring(&mut self, why: Failure) {
        let reason = match &why {
            Failure::PlacementLost(reason) => reason.clone(),
            other => other.to_string(),
        };
        self.shared.set_readiness(Readiness::NotReady(reason));
        self.shared.submissions.close(why);
        if let Some(stopper) = &self.ring_stop {
            stopper.stop();
        }
        if let Tail::Loading(cancel) = &self.tail {
            cancel.store(true, Ordering::Relaxed);
        }
    }
}
