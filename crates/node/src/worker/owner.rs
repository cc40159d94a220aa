//! The worker's owner loop: an event comes in, [`Stages`] says what to do, and that is done here.
//!
//! The loop owns what the state machine names: stages ([`Place`]) and links. Everything that blocks is on a thread that
//! gets what it works on and hands it back with an [`Event`].

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, Hash, NodeId};
use brigade_gguf::ModelFile;
use brigade_net::{Identity, Link};
use brigade_protocol::control::{Held, Peer, StageRole, ToCoordinator, ToWorker};
use brigade_protocol::frame::Attach;
use brigade_protocol::kind;
use brigade_protocol::weights::Sources;
use brigade_protocol::worker::{Action, DialId, End, HoldId, Input, LinkId, Load, Stages};

use super::loader::{Leash, Loader};
use super::measuring::Measuring;
use super::{WorkerError, WorkerStatus};
use crate::activity::WorkerActivity;
use crate::cache::Cache;
use crate::council::CouncilHost;
use crate::handover::{self, HandoverError};
use crate::known::KnownCoordinator;
use crate::loaded::LoadedStage;
use crate::measure;
use crate::reach::attach;
use crate::shadow::ShadowSlot;
use crate::share::{DirectFetch, Tally, Trees};
use crate::site::Keeping;
use crate::stage_pass::PassRunner;
use crate::stage_thread::{Route, RunningStage, StageEnd};
use crate::threads::{lock, spawn};

/// What the other threads tell the owner loop.
pub(super) enum Event {
    Connected(Arc<dyn Link>),
    Message(ToWorker),
    Unreachable(String),
    Disconnected(String),
    GaveUp(WorkerError),
    Inbound(Arc<dyn Link>, Attach),
    Progress(HoldId, u64, u64),
    Loaded(HoldId, Result<Box<LoadedStage>, LoadFailure>),
    Dialled(DialId, Result<Arc<dyn Link>, String>),
    Ended(HoldId, Box<LoadedStage>, End, Option<Held>),
    ShadowGone(LinkId),
    /// Another coordinator is to be dialled.
    Followed,
    Stop,
    /// To end at once.
    Abandon,
}

/// Why a stage was not loaded.
pub(super) enum LoadFailure {
    /// This node and the coordinator have different files: nothing will mend that but a person.
    OtherModel(String),
    /// Anything else.
    Other(String),
}

/// Where a stage is.
pub(super) enum Place {
    /// A loader thread works.
    Loading(Arc<Leash>),
    Resting(Box<LoadedStage>),
    Running(RunningStage, Arc<ShadowSlot>),
    /// A thread moves what its slots hold over the link; closing that ends it.
    Moving(Arc<dyn Link>),
}

/// All state of a worker.
pub(super) struct Owner {
    pub(super) state_dir: PathBuf,
    pub(super) identity: Arc<Identity>,
    pub(super) council: Arc<CouncilHost>,
    pub(super) known: Arc<Mutex<KnownCoordinator>>,
    pub(super) own: Option<Arc<ModelFile>>,
    pub(super) own_hash: Option<Hash>,
    pub(super) cache: Arc<Cache>,
    pub(super) trees: Arc<Trees>,
    pub(super) tally: Arc<Tally>,
    /// Who else may have weights; shared with loaders.
    pub(super) sources: Arc<Mutex<Sources>>,
    pub(super) direct_fetch: DirectFetch,
    pub(super) threads: u32,
    pub(super) throttle: f32,
    /// What this node gives.
    pub(super) memory: ByteSize,
    pub(super) measuring: Measuring,
    pub(super) kv_spill: ByteSize,
    /// Bytes of idle sessions on disk, of all stages.
    pub(super) spilled: Arc<AtomicU64>,
    pub(super) drain_timeout: Duration,
    pub(super) events: Sender<Event>,
    pub(super) status: Arc<Mutex<WorkerStatus>>,
    /// Who may open a data link; shared with the door.
    pub(super) peers: Arc<Mutex<Vec<NodeId>>>,
    /// Who may measure links to this node; shared with the door.
    pub(super) fellows: Arc<Mutex<Vec<NodeId>>>,
    pub(super) activity: Arc<WorkerActivity>,
    pub(super) stopping: Arc<AtomicBool>,
    pub(super) control: Option<Arc<dyn Link>>,
    pub(super) stages: Stages,
    pub(super) places: HashMap<HoldId, Place>,
    /// Links that no stage has.
    pub(super) links: HashMap<LinkId, Arc<dyn Link>>,
    pub(super) last_link: u64,
    /// Counters of what is loaded.
    pub(super) engines: HashMap<HoldId, brigade_engine::Activity>,
    /// Name of the model whose stages are here.
    pub(super) model: String,
    pub(super) _keeper: Keeping,
}

/// Whether the loop goes on.
type Flow = Result<(), Leaving>;

/// Why the loop ends.
enum Leaving {
    Stopped(&'static str),
    Failed(WorkerError),
}

impl Owner {
    /// Runs until the worker ends.
    pub(super) fn run(mut self, inbox: &Receiver<Event>) -> Result<(), WorkerError> {
        let end = loop {
            if let Err(end) = self.turn(inbox) {
                break end;
            }
            self.publish();
        };
        let (reason, result) = match end {
            Leaving::Stopped(reason) => (reason, Ok(())),
            Leaving::Failed(error) => ("it cannot go on", Err(error)),
        };
        self.stopping.store(true, Ordering::Relaxed);
        self.measuring.stop();
        self.tell(&ToCoordinator::Goodbye { reason: reason.to_owned() });
        for place in self.places.values() {
            end_place(place);
        }
        self.links.values().for_each(|link| link.close());
        if let Some(control) = &self.control {
            control.close();
        }
        measure::wait_until_over();
        result
    }

    /// Waits for an event or for what is due, and does what follows from it.
    fn turn(&mut self, inbox: &Receiver<Event>) -> Flow {
        let event = match self.stages.next_tick() {
            None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(at) => inbox.recv_timeout(at.saturating_duration_since(Instant::now())),
        };
        match event {
            Ok(event) => self.apply(event),
            Err(RecvTimeoutError::Timeout) => self.input(Input::Tick),
            Err(RecvTimeoutError::Disconnected) => Err(Leaving::Stopped("it was stopped")),
        }
    }

    fn apply(&mut self, event: Event) -> Flow {
        match event {
            Event::Connected(link) => {
                self.control = Some(link);
                self.input(Input::CoordinatorHere)
            }
            Event::Unreachable(reason) => {
                tracing::debug!(reason, "the coordinator is not there");
                self.set_trouble(reason);
                Ok(())
            }
            Event::Disconnected(reason) => {
                tracing::warn!(reason, "the coordinator is gone; this node's stages stop");
                self.set_trouble(format!("the coordinator is gone: {reason}"));
                self.control = None;
                self.measuring.stop();
                self.cut_loaders();
                self.input(Input::CoordinatorGone)
            }
            Event::GaveUp(error) => Err(Leaving::Failed(error)),
            Event::Message(message) => self.message(message),
            Event::Inbound(link, attach) => {
                let peer = link.peer();
                let link = self.keep(link);
                self.input(Input::Inbound { link, peer, attach })
            }
            Event::Progress(id, done, total) => {
                lock(&self.status).weights = (done, total);
                self.input(Input::Progress(id, done, total))
            }
            Event::Loaded(id, result) => self.loaded(id, result),
            Event::Dialled(id, result) => {
                let result = result.inspect_err(|reason| self.set_trouble(reason.clone())).map(|link| self.keep(link));
                self.input(Input::Dialled(id, result))
            }
            Event::Ended(id, stage, end, held) => {
                if let End::Failed(reason) = &end {
                    tracing::warn!(layers = %stage.key.layers, reason, "a stage ended");
                    self.set_trouble(reason.clone());
                }
                self.places.insert(id, Place::Resting(stage));
                self.input(Input::Ended { id, end, held })
            }
            Event::ShadowGone(link) => self.input(Input::ShadowGone(link)),
            Event::Followed => {
                // Its control thread then dials the other one.
                if let Some(control) = &self.control {
                    control.close();
                }
                self.cut_loaders();
                lock(&self.status).coordinator = lock(&self.known).node;
                Ok(())
            }
            Event::Abandon => Err(Leaving::Stopped("it has another part now")),
            Event::Stop if self.stages.is_leaving() => Err(Leaving::Stopped("it was stopped")),
            Event::Stop => {
                let reason = "it was asked to leave".to_owned();
                self.input(Input::Leave { reason, within: self.drain_timeout })
            }
        }
    }

    fn message(&mut self, message: ToWorker) -> Flow {
        match message {
            ToWorker::Accept { seen_as, deployment } => {
                tracing::info!(seen_as, "joined the cluster");
                let known = lock(&self.known).clone();
                self.council.belong(deployment, known.node);
                if let Err(error) = known.save(&self.state_dir) {
                    tracing::warn!(%error, "the coordinator could not be remembered; the next join needs a ticket");
                }
                lock(&self.status).trouble = None;
                Ok(())
            }
            ToWorker::Measure(request) => {
                if let Some(control) = self.control.clone() {
                    self.measuring.measure(*request, !self.places.is_empty(), control);
                }
                Ok(())
            }
            ToWorker::Examine => {
                if let Some(control) = self.control.clone() {
                    let addresses = lock(&self.known).addresses.clone();
                    self.measuring.examine(&addresses, !self.places.is_empty(), control);
                }
                Ok(())
            }
            ToWorker::Fellows(nodes) => {
                *lock(&self.fellows) = nodes;
                Ok(())
            }
            ToWorker::Sources(sources) => {
                *lock(&self.sources) = *sources;
                Ok(())
            }
            ToWorker::Assign(assign) => {
                if !assign.stages.is_empty() {
                    self.measuring.cut_short();
                }
                let (epoch, revision) = (assign.epoch, assign.revision);
                for order in &assign.stages {
                    let (stage, layers) = (order.stage, order.layers);
                    tracing::info!(%epoch, revision, stage, %layers, role = role_name(&order.role), "stage assigned");
                }
                self.model = assign.model.as_ref().map(|model| model.name.clone()).unwrap_or_default();
                self.input(Input::Assign(assign))
            }
            ToWorker::Join { deployment, epoch } => self.input(Input::Join { deployment, epoch }),
            ToWorker::Released => self.input(Input::Released),
            ToWorker::Goodbye { reason } => {
                self.set_trouble(format!("the coordinator ended: {reason}"));
                Ok(())
            }
            ToWorker::Ping { .. } => Ok(()),
        }
    }

    fn loaded(&mut self, id: HoldId, result: Result<Box<LoadedStage>, LoadFailure>) -> Flow {
        self.places.remove(&id);
        let (result, other_model) = match result {
            Ok(stage) => {
                let memory = stage.memory;
                self.engines.insert(id, stage.runner.stage().activity());
                self.places.insert(id, Place::Resting(stage));
                (Ok(memory), None)
            }
            Err(LoadFailure::Other(reason)) => (Err(reason), None),
            Err(LoadFailure::OtherModel(reason)) => (Err(reason.clone()), Some(reason)),
        };
        self.watch();
        self.input(Input::Loaded(id, result))?;
        other_model.map_or(Ok(()), |reason| Err(Leaving::Failed(WorkerError::OtherModel(reason))))
    }

    /// Tells the state machine, and does what it says.
    fn input(&mut self, input: Input) -> Flow {
        let actions = self.stages.handle(Instant::now(), input);
        *lock(&self.peers) = self.stages.peers().collect();
        for action in actions {
            self.act(action).map_err(|error| Leaving::Failed(WorkerError::Thread(error)))?;
            if self.stopping.load(Ordering::Relaxed) {
                return Err(Leaving::Stopped("it left"));
            }
        }
        Ok(())
    }

    /// Does one thing.
    ///
    /// # Errors
    /// If the system gives no thread.
    fn act(&mut self, action: Action) -> io::Result<()> {
        match action {
            Action::Tell(message) => {
                if let ToCoordinator::StageFailed { reason, .. } | ToCoordinator::RingBroke { reason, .. } = &message {
                    tracing::error!(reason, "a stage or its ring failed");
                    self.set_trouble(reason.clone());
                }
                self.tell(&message);
            }
            Action::Load(load) => self.load(*load)?,
            Action::Free(id) => match self.places.get(&id) {
                Some(Place::Loading(leash)) => leash.cancel(),
                _ => {
                    self.places.remove(&id);
                    self.engines.remove(&id);
                    self.watch();
                }
            },
            Action::Empty(id) => {
                if let Some(Place::Resting(stage)) = self.places.get_mut(&id) {
                    stage.runner.clear();
                }
            }
            Action::Dial(id, peer, attach) => self.dial(id, peer, attach)?,
            Action::Close(link) => {
                if let Some(link) = self.links.remove(&link) {
                    link.close();
                }
            }
            Action::Serve { id, attach, inbound, outbound } => {
                if let Some(outbound) = self.links.remove(&outbound) {
                    let shadow = Arc::default();
                    let route = Route::On { outbound, shadow: Arc::clone(&shadow) };
                    self.run_stage(id, attach, inbound, route, shadow)?;
                }
            }
            Action::StandBy { id, attach, inbound } => {
                self.run_stage(id, attach, inbound, Route::Nowhere, Arc::default())?;
            }
            Action::Shadow(id, link) => self.shadow(id, link)?,
            Action::Send { id, link, within } => self.hand_over(id, link, within, handover::send)?,
            Action::Receive { id, link, within } => self.hand_over(id, link, within, handover::receive)?,
            Action::Stop(id) => {
                if let Some(place) = self.places.get(&id) {
                    end_place(place);
                }
            }
            Action::End => self.stopping.store(true, Ordering::Relaxed),
        }
        Ok(())
    }

    fn load(&mut self, load: Load) -> io::Result<()> {
        let (id, header_hash) = (load.id, load.key.header_hash);
        let leash = Arc::new(Leash::default());
        let loader = Loader {
            load,
            own: self.own.clone().filter(|_| self.own_hash == Some(header_hash)),
            differs: self.own_hash.is_some_and(|hash| hash != header_hash),
            cache: Arc::clone(&self.cache),
            trees: Arc::clone(&self.trees),
            tally: Arc::clone(&self.tally),
            sources: Arc::clone(&self.sources),
            direct_fetch: self.direct_fetch,
            identity: Arc::clone(&self.identity),
            known: Arc::clone(&self.known),
            threads: self.threads,
            throttle: self.throttle,
            room: ByteSize(self.memory.0.saturating_sub(self.stages.memory().0)),
            state_dir: self.state_dir.clone(),
            kv_spill: self.kv_spill,
            spilled: Arc::clone(&self.spilled),
            leash: Arc::clone(&leash),
            events: self.events.clone(),
        };
        lock(&self.status).weights = (0, 0);
        self.places.insert(id, Place::Loading(leash));
        let events = self.events.clone();
        spawn("loader", move || drop(events.send(Event::Loaded(id, loader.load().map(Box::new)))))
    }

    /// A lost coordinator may leave its links open; loaders dial whoever is there for what they miss.
    fn cut_loaders(&self) {
        for place in self.places.values() {
            if let Place::Loading(leash) = place {
                leash.cut();
            }
        }
    }

    fn dial(&mut self, id: DialId, peer: Peer, purpose: Attach) -> io::Result<()> {
        let (identity, events) = (Arc::clone(&self.identity), self.events.clone());
        spawn("dial", move || {
            let result = attach(&identity, &peer, purpose)
                .map_err(|error| format!("node {} cannot be reached: {error}", peer.node.short()));
            let _ = events.send(Event::Dialled(id, result));
        })
    }

    /// Takes a stage that is at rest, and the link that it will own.
    fn take(&mut self, id: HoldId, link: LinkId) -> Option<(Box<LoadedStage>, Arc<dyn Link>)> {
        let link = self.links.remove(&link)?;
        match self.places.remove(&id) {
            Some(Place::Resting(stage)) => Some((stage, link)),
            Some(other) => {
                self.places.insert(id, other);
                None
            }
            None => None,
        }
    }

    fn run_stage(
        &mut self,
        id: HoldId,
        attach: Attach,
        inbound: LinkId,
        route: Route,
        shadow: Arc<ShadowSlot>,
    ) -> io::Result<()> {
        let Some((stage, inbound)) = self.take(id, inbound) else { return Ok(()) };
        let events = self.events.clone();
        let ended = move |stage, end, held| {
            let end = match end {
                StageEnd::LinkClosed => End::Closed,
                StageEnd::Failed(reason) => End::Failed(reason),
            };
            let _ = events.send(Event::Ended(id, Box::new(stage), end, held));
        };
        let running = RunningStage::start(attach, *stage, inbound, route, self.activity.stage(), ended)?;
        self.places.insert(id, Place::Running(running, shadow));
        Ok(())
    }

    /// Begins or ends to send a stage's frames to who stands by for the one behind.
    fn shadow(&mut self, id: HoldId, link: Option<LinkId>) -> io::Result<()> {
        let Some(Place::Running(_, shadow)) = self.places.get(&id) else { return Ok(()) };
        let Some(link_id) = link else {
            shadow.clear();
            return Ok(());
        };
        let Some(link) = self.links.remove(&link_id) else { return Ok(()) };
        let events = self.events.clone();
        shadow.set(link, move || drop(events.send(Event::ShadowGone(link_id))))
    }

    /// Sends or receives what a stage's slots hold, on a thread of its own.
    fn hand_over(
        &mut self,
        id: HoldId,
        link: LinkId,
        within: Duration,
        work: fn(&mut PassRunner, &dyn Link, Instant) -> Result<(), HandoverError>,
    ) -> io::Result<()> {
        let Some((mut stage, link)) = self.take(id, link) else { return Ok(()) };
        self.places.insert(id, Place::Moving(Arc::clone(&link)));
        let events = self.events.clone();
        let until = Instant::now() + within;
        spawn("handover", move || {
            let result = work(&mut stage.runner, &*link, until);
            link.close();
            let held = stage.runner.rest();
            let end = result.map_or_else(|error| End::Failed(error.to_string()), |()| End::Done);
            let _ = events.send(Event::Ended(id, stage, end, held));
        })
    }

    /// Gives a link a name.
    fn keep(&mut self, link: Arc<dyn Link>) -> LinkId {
        self.last_link += 1;
        let id = LinkId(self.last_link);
        self.links.insert(id, link);
        id
    }

    fn watch(&self) {
        self.activity.watch(self.engines.values().cloned().collect());
    }

    fn tell(&self, message: &ToCoordinator) {
        if let Some(control) = &self.control
            && let Err(error) = control.send(kind::CONTROL, &[&message.encode()])
        {
            tracing::debug!(%error, "the coordinator was not told");
        }
    }

    fn set_trouble(&self, text: String) {
        lock(&self.status).trouble = Some(text);
    }

    fn publish(&self) {
        let views = self.stages.view();
        let serving = || views.iter().filter(|view| !view.is_standby);
        let mut status = lock(&self.status);
        status.connected = self.control.is_some();
        status.weights_from = self.tally.read();
        status.layers = serving().map(|view| view.layers).next();
        status.standby = views.iter().filter(|view| view.is_standby).map(|view| view.layers).collect();
        status.model.clone_from(&self.model);
        status.state = if self.stages.is_leaving() {
            "leaving"
        } else if views.iter().any(|view| view.is_loading) {
            "loading"
        } else if serving().any(|view| view.is_running) {
            "running"
        } else if views.is_empty() {
            "waiting"
        } else {
            "loaded"
        }
        .to_owned();
    }
}

/// Ends whatever is done with a stage.
fn end_place(place: &Place) {
    match place {
        Place::Loading(leash) => leash.cancel(),
        Place::Resting(_) => {}
        Place::Running(running, _) => running.stop(),
        Place::Moving(link) => link.close(),
    }
}

fn role_name(role: &StageRole) -> &'static str {
    match role {
        StageRole::Serve { .. } => "serve",
        StageRole::Standby { .. } => "standby",
        StageRole::HandOver { .. } => "hand over",
    }
}
