//! The coordinator: the node with the model, which owns the deployment.
//!
//! - The *owner loop* (one thread) holds the [`Cluster`] state machine, turns what happens into its inputs and carries
//!   out its actions. It never blocks on a peer.
//! - Each worker has a *reader* and a *writer* thread on its control link; the writer also sends the heartbeats.
//! - A *loader thread* loads the tail; the *ring thread* then owns it, see [`crate::ring`].
//! - Links come in through the [`Doorway`]; a weights link is served on the thread that it came with.
//!
//! Callers talk to a [`Handle`], which shares with the loop only what may change under a lock for a moment.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use brigade_base::{ByteSize, DeploymentId, Epoch, LayerRange, NodeId};
use brigade_gguf::{StageView, StageViewError, TensorSource};
use brigade_net::{
    Hello, Identity, Link, Listener, Members, Purpose, Refusal, TcpLink, TicketBook, advertised_addrs,
};
use brigade_plan::{Demand, NodeProfile};
use brigade_protocol::cluster::{Action, Cluster, Input, Phase, Settings, StageState};
use brigade_protocol::control::{
    DEAD_AFTER_MS, Deploy, HEARTBEAT_MS, MAX_CONTROL_BYTES, Offer, ToCoordinator, ToWorker,
};
use brigade_protocol::frame::Attach;
use brigade_protocol::kind;
use brigade_protocol::passes::Limits;

use crate::doorway::{Doorkeeper, Doorway, receive_attach};
use crate::handle::{Handle, Shared};
use crate::loaded::{LoadedStage, StageKey, chain, load_stage};
use crate::model::{LocalModel, ModelError};
use crate::reach::reach;
use crate::ring::{Ring, RingEnd, RingLinks};
use crate::serving::{ClusterStatus, Failure, NodeStatus, Readiness};
use crate::stats::RingStats;
use crate::system::resident_memory;
use crate::weights::serve_weights;

/// Prompt tokens of one pass. Long enough that weights are read once for many rows, short enough that a neighbour's
/// next token waits no longer than about a tenth of a second on a slow machine.
pub const CHUNK: u32 = 256;

/// Requests that may wait for a session: a minute's worth of short ones on a small cluster.
pub const MAX_WAITING: usize = 256;

/// How long the last worker's link may take after all stages have loaded.
const RING_TIMEOUT: Duration = Duration::from_secs(15);

/// How often the status is brought up to date while nothing happens.
const PUBLISH_EVERY: Duration = Duration::from_millis(HEARTBEAT_MS);

/// What a coordinator is given.
#[derive(Debug, Clone)]
pub struct CoordinatorOptions {
    /// Keys, membership, tickets, hashes of models.
    pub state_dir: PathBuf,
    /// Name for people.
    pub name: String,
    /// Where its links listen.
    pub listen: SocketAddr,
    /// Memory that it gives itself.
    pub memory: ByteSize,
    /// Threads that compute.
    pub threads: u32,
    /// Tokens of one session; `None` takes what the model was trained for, up to [`DEFAULT_CONTEXT_MAX`].
    pub context: Option<u32>,
    /// Sessions at once.
    pub parallel: u32,
    /// Nodes, this one among them, that must be here before the model is placed.
    pub nodes_wanted: usize,
    /// Use every node, even where fewer would do.
    pub spread: bool,
    /// Layers of each stage, workers in the order of joining and this node last.
    pub split: Option<Vec<u32>>,
}

/// Most tokens of a session unless more are asked for: KV cache is reserved for all of them.
pub const DEFAULT_CONTEXT_MAX: u32 = 4096;

/// A coordinator cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// Its key cannot be used.
    #[error(transparent)]
    Identity(#[from] brigade_net::IdentityError),
    /// Its link address cannot be bound.
    #[error(transparent)]
    Bind(#[from] brigade_net::BindError),
    /// Tickets or members cannot be read.
    #[error("the state directory cannot be used: {0}")]
    State(String),
    /// The model cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A stage cannot be cut.
    #[error(transparent)]
    View(#[from] StageViewError),
    /// A setting makes no sense for this model.
    #[error("{0}")]
    Setting(String),
    /// Its own stage failed.
    #[error("this node's own stage failed: {0}")]
    Tail(String),
    /// The system gives no threads.
    #[error("the system gives no thread: {0}")]
    Thread(#[from] std::io::Error),
}

pub(crate) enum Event {
    WorkerLink(Arc<TcpLink>),
    Message(NodeId, u64, ToCoordinator),
    WorkerGone(NodeId, u64, String),
    DataLink(Arc<dyn Link>, Attach),
    TailProgress(Epoch, f32),
    TailLoaded(Epoch, Result<LoadedStage, String>),
    WentAround(Epoch),
    RingEnded(Epoch, Box<LoadedStage>, RingEnd),
    Stop,
}

/// A running coordinator.
pub struct Coordinator {
    handle: Arc<Handle>,
    events: Sender<Event>,
    thread: JoinHandle<Result<(), CoordinatorError>>,
    link_addresses: Vec<SocketAddr>,
}

/// Asks a coordinator to stop.
#[derive(Clone)]
pub struct CoordinatorStopper(Sender<Event>);

impl CoordinatorStopper {
    /// The coordinator says goodbye to its workers and ends.
    pub fn stop(&self) {
        let _ = self.0.send(Event::Stop);
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map(drop)
}

/// Tokens of a session: what was asked for, or what the model and this program's default allow.
fn context_of(model: &LocalModel, asked: Option<u32>) -> Result<u32, CoordinatorError> {
    let trained = model.architecture().n_ctx_train;
    match asked {
        Some(context) if trained > 0 && context > trained => Err(CoordinatorError::Setting(format!(
            "--context {context} is more than the {trained} tokens that this model was trained for"
        ))),
        Some(context) => Ok(context),
        None if trained > 0 => Ok(trained.min(DEFAULT_CONTEXT_MAX)),
        None => Ok(DEFAULT_CONTEXT_MAX),
    }
}

impl Coordinator {
    /// Starts a coordinator of an opened model.
    ///
    /// # Errors
    /// If its key, address, state or settings cannot be used.
    pub fn start(model: LocalModel, options: CoordinatorOptions) -> Result<Self, CoordinatorError> {
        brigade_engine::init();
        let identity = Arc::new(Identity::load_or_create(&options.state_dir)?);
        let state = |error: String| CoordinatorError::State(error);
        let tickets = TicketBook::open(&options.state_dir).map_err(|e| state(e.to_string()))?;
        let members = Members::open(&options.state_dir).map_err(|e| state(e.to_string()))?;
        let model = Arc::new(model);
        let context = context_of(&model, options.context)?;
        let listener = Listener::bind(&identity, &[options.listen])?;
        let link_addresses: Vec<SocketAddr> = listener.local_addrs().iter().flat_map(|a| advertised_addrs(*a)).collect();
        let (events, inbox) = channel();
        let stats = Arc::new(RingStats::default());
        stats.set_row_bytes(model.architecture().n_embd);
        let coordinator = NodeProfile { id: identity.node_id(), name: options.name.clone(), memory: options.memory };
        let demand = Demand {
            context,
            parallel: options.parallel,
            max_rows: CHUNK + options.parallel,
            spread: options.spread,
            split: options.split.clone(),
        };
        let settings = Settings {
            deployment: DeploymentId(seconds_since_1970()),
            coordinator,
            model: model.profile(),
            demand,
            nodes_wanted: options.nodes_wanted.max(1),
        };
        let shared = Arc::new(Shared::new(&model, &identity, &options, context, tickets, &link_addresses));
        let keeper = Door {
            members: Mutex::new(members),
            shared: Arc::clone(&shared),
            model: Arc::clone(&model),
            events: events.clone(),
        };
        let keeper = Arc::new(keeper);
        let doorway = Doorway::open(listener, Arc::clone(&keeper) as Arc<dyn Doorkeeper>);
        let owner = Owner {
            cluster: Cluster::new(settings),
            header: model.file().catalog().header_bytes(true),
            model: Arc::clone(&model),
            identity,
            options,
            context,
            shared: Arc::clone(&shared),
            stats: Arc::clone(&stats),
            events: events.clone(),
            workers: HashMap::new(),
            next_generation: 1,
            tail: Tail::Empty,
            tail_wanted: None,
            tail_share: 0.0,
            ring_waits: None,
            ring_stop: None,
            started: Instant::now(),
            _doorway: doorway,
        };
        let thread = std::thread::Builder::new().name("coordinator".into()).spawn(move || owner.run(&inbox))?;
        let handle = Arc::new(Handle::new(shared, model, stats));
        Ok(Self { handle, events, thread, link_addresses })
    }

    /// What callers talk to.
    pub fn handle(&self) -> Arc<Handle> {
        Arc::clone(&self.handle)
    }

    /// Where its links listen.
    pub fn link_addresses(&self) -> &[SocketAddr] {
        &self.link_addresses
    }

    /// A handle that stops it from elsewhere.
    pub fn stopper(&self) -> CoordinatorStopper {
        CoordinatorStopper(self.events.clone())
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// Why it could not go on.
    pub fn wait(self) -> Result<(), CoordinatorError> {
        self.thread.join().unwrap_or(Ok(()))
    }
}

/// Seconds since 1970, for what people and files see.
pub(crate) fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Lets in workers that are members or bring a ticket, the data link of the last worker, and members' weights links.
struct Door {
    members: Mutex<Members>,
    shared: Arc<Shared>,
    model: Arc<LocalModel>,
    events: Sender<Event>,
}

impl Doorkeeper for Door {
    fn admit(&self, hello: &Hello, peer: NodeId) -> Result<(), Refusal> {
        let mut members = lock(&self.members);
        match hello.purpose {
            Purpose::Control if members.contains(&peer) => Ok(()),
            Purpose::Control => {
                let secret = hello.admission.as_ref().ok_or(Refusal::NotAMember)?;
                let now = seconds_since_1970();
                lock(&self.shared.tickets).check(secret, now)?;
                let admitted = members.admit(peer, &peer.short(), now);
                admitted.map(drop).map_err(|error| Refusal::NotExpected(error.to_string()))
            }
            Purpose::Data | Purpose::Weights if members.contains(&peer) => Ok(()),
            Purpose::Data | Purpose::Weights => Err(Refusal::NotAMember),
        }
    }

    fn enter(&self, hello: Hello, link: Arc<TcpLink>) {
        match hello.purpose {
            Purpose::Control => {
                link.set_frame_limit(MAX_CONTROL_BYTES);
                let _ = self.events.send(Event::WorkerLink(link));
            }
            Purpose::Data => {
                link.set_frame_limit(brigade_net::MAX_FRAME);
                match receive_attach(&*link) {
                    Some(attach) => drop(self.events.send(Event::DataLink(link, attach))),
                    None => link.close(),
                }
            }
            Purpose::Weights => serve_weights(&*link, self.model.file()),
        }
    }
}

/// A worker's control link.
struct WorkerLink {
    generation: u64,
    outbox: Sender<ToWorker>,
    link: Arc<TcpLink>,
    /// Shared with the writer, which asks, and the reader, which hears the answer.
    pulse: Arc<Mutex<Pulse>>,
}

/// What the heartbeat tells of a worker.
#[derive(Default)]
struct Pulse {
    asked: Option<(u64, Instant)>,
    rtt_ms: f32,
    resident: ByteSize,
}

enum Tail {
    Empty,
    Loading(Arc<AtomicBool>),
    Loaded(Box<LoadedStage>),
    /// The ring thread has it.
    InRing,
}

/// All state of a coordinator.
struct Owner {
    cluster: Cluster,
    model: Arc<LocalModel>,
    /// The model's header without its vocabulary, as workers get it.
    header: Vec<u8>,
    identity: Arc<Identity>,
    options: CoordinatorOptions,
    context: u32,
    shared: Arc<Shared>,
    stats: Arc<RingStats>,
    events: Sender<Event>,
    workers: HashMap<NodeId, WorkerLink>,
    next_generation: u64,
    tail: Tail,
    /// The tail that the present placement wants, until it is loaded.
    tail_wanted: Option<(Epoch, LayerRange)>,
    tail_share: f32,
    /// Where the ring thread waits for the link of the last worker.
    ring_waits: Option<(Attach, NodeId, Sender<Arc<dyn Link>>)>,
    ring_stop: Option<RingStopper>,
    started: Instant,
    _doorway: Doorway,
}

/// Ends a ring from outside.
#[derive(Clone)]
struct RingStopper {
    stop: Arc<AtomicBool>,
    canceller: brigade_engine::Canceller,
    links: Arc<Mutex<Vec<Arc<dyn Link>>>>,
}

impl RingStopper {
    fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.canceller.cancel();
        lock(&self.links).iter().for_each(|link| link.close());
    }
}

impl Owner {
    fn run(mut self, inbox: &Receiver<Event>) -> Result<(), CoordinatorError> {
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
        self.stop_ring("the server is stopping");
        self.shared.set_readiness(Readiness::NotReady("the server is stopping".to_owned()));
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
                self.feed(Input::Gone(id, reason))
            }
            Event::Message(..) | Event::WorkerGone(..) => None,
            Event::DataLink(link, attach) => {
                match &self.ring_waits {
                    Some((wanted, last, sender)) if *wanted == attach && *last == link.peer() => {
                        let _ = sender.send(link);
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
                        self.feed(Input::RingBroke(epoch, reason))
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
                    self.stop_ring("the model is placed anew");
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
                Action::StopRing { reason, .. } => self.stop_ring(&reason),
                Action::Undeploy { node, epoch } => {
                    self.send(node, ToWorker::Undeploy { deployment: self.deployment(), epoch });
                }
                Action::GiveUp { reason } => given_up = Some(reason),
            }
        }
        given_up
    }

    fn deployment(&self) -> DeploymentId {
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
            let _ = self.events.send(Event::TailLoaded(epoch, Ok(*tail)));
            self.tail = Tail::Loading(Arc::new(AtomicBool::new(false)));
            return;
        }
        let cancel = Arc::new(AtomicBool::new(false));
        let (cancelled, events, threads) = (Arc::clone(&cancel), self.events.clone(), self.options.threads);
        let source = Arc::clone(self.model.file()) as Arc<dyn TensorSource>;
        let load = move || {
            let mut progress = |share| {
                let _ = events.send(Event::TailProgress(epoch, share));
                !cancelled.load(Ordering::Relaxed)
            };
            let result = load_stage(key, &view, source, threads, &mut progress).map_err(|error| chain(&error));
            let _ = events.send(Event::TailLoaded(epoch, result));
        };
        self.tail = Tail::Loading(cancel);
        if let Err(error) = spawn("loader", load) {
            let _ = self.events.send(Event::TailLoaded(epoch, Err(error.to_string())));
        }
    }

    fn tail_loaded(&mut self, epoch: Epoch, result: Result<LoadedStage, String>) -> Option<String> {
        self.tail = Tail::Empty;
        let own = self.identity.node_id();
        match result {
            Ok(tail) => {
                let memory = tail.memory;
                self.tail = Tail::Loaded(Box::new(tail));
                self.feed(Input::Loaded(own, epoch, memory))
            }
            // Given up for a newer placement, which is loaded next.
            Err(_) if self.tail_wanted.is_some() => None,
            Err(reason) => self.feed(Input::StageFailed(own, epoch, reason)),
        }
    }

    fn start_ring(
        &mut self,
        epoch: Epoch,
        ends: Option<(NodeId, NodeId)>,
        n_stages: u32,
    ) -> Result<(), CoordinatorError> {
        let Tail::Loaded(tail) = std::mem::replace(&mut self.tail, Tail::InRing) else { return Ok(()) };
        let attach = Attach { deployment: self.deployment(), epoch };
        let limits = Limits {
            n_slots: self.options.parallel,
            context: self.context,
            chunk: CHUNK,
            n_stages,
            max_waiting: MAX_WAITING,
        };
        let stopper = RingStopper {
            stop: Arc::new(AtomicBool::new(false)),
            canceller: tail.runner.stage().canceller(),
            links: Arc::new(Mutex::new(Vec::new())),
        };
        let (last_sender, last_link) = channel();
        self.ring_waits = ends.map(|(_, last)| (attach, last, last_sender));
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
            stats: Arc::clone(&self.stats),
            shared: Arc::clone(&self.shared),
            events: self.events.clone(),
        };
        spawn("ring", move || thread.run(*tail))?;
        Ok(())
    }

    fn stop_ring(&mut self, reason: &str) {
        self.shared.set_readiness(Readiness::NotReady(reason.to_owned()));
        self.shared.submissions.close(Failure::PlacementLost(reason.to_owned()));
        if let Some(stopper) = &self.ring_stop {
            stopper.stop();
        }
        if let Tail::Loading(cancel) = &self.tail {
            cancel.store(true, Ordering::Relaxed);
        }
    }

    fn publish(&self) {
        let phase = match self.cluster.phase() {
            Phase::Ready => "ready".to_owned(),
            Phase::Waiting(why) => format!("waiting: {why}"),
            Phase::Loading => "loading weights".to_owned(),
            Phase::Joining => "connecting the stages".to_owned(),
            Phase::Probing => "sending a first token around".to_owned(),
            Phase::Settling(why) => format!("placing the model anew: {why}"),
        };
        if *self.cluster.phase() != Phase::Ready {
            self.shared.set_readiness(Readiness::NotReady(phase.clone()));
        }
        let (running, waiting) = self.stats.load();
        let (hop_us_p50, hop_us_p99) = self.stats.hop_us();
        let n_workers = self.cluster.plan().map_or(0, |plan| plan.stages.len() - 1);
        let mut nodes: Vec<NodeStatus> = self.cluster.members().iter().map(|m| self.worker_status(m)).collect();
        nodes.sort_by_key(|node| node.layers.map_or(u32::MAX, LayerRange::start));
        nodes.push(self.own_status(n_workers));
        *lock(&self.shared.status) = ClusterStatus {
            coordinator: self.identity.node_id(),
            model: self.model.name().to_owned(),
            model_id: self.model.id(),
            n_layers: self.model.architecture().n_layers,
            state: phase,
            epoch: self.cluster.epoch().0,
            context: self.context,
            parallel: self.options.parallel,
            running,
            waiting,
            tokens_generated: self.stats.tokens(),
            tokens_per_second: self.stats.tokens_per_second(),
            hop_us_p50,
            hop_us_p99,
            uptime_s: self.started.elapsed().as_secs(),
            nodes,
        };
    }

    fn worker_status(&self, member: &brigade_protocol::cluster::Member) -> NodeStatus {
        let stages = self.cluster.plan().map(|plan| plan.stages.as_slice()).unwrap_or_default();
        let place = stages.iter().position(|stage| stage.node == member.id);
        let link = self.workers.get(&member.id);
        let pulse = link.map(|worker| lock(&worker.pulse));
        let (state, loaded) = match &member.stage {
            StageState::Idle => ("idle".to_owned(), 0.0),
            StageState::Loading(share) => ("loading".to_owned(), *share),
            StageState::Loaded | StageState::Joined => ("ready".to_owned(), 1.0),
            StageState::Failed(why) => (format!("failed: {why}"), 0.0),
        };
        NodeStatus {
            id: member.id,
            name: member.offer.name.clone(),
            role: "worker".to_owned(),
            connected: link.is_some(),
            address: member.offer.addresses.first().cloned().unwrap_or_default(),
            layers: member.layers,
            state,
            loaded,
            memory_offered: member.offer.memory,
            memory_stage: member.stage_memory,
            memory_resident: pulse.as_ref().map_or(ByteSize(0), |p| p.resident),
            threads: member.offer.threads,
            pass_ms: place.map_or(0.0, |k| self.stats.stage_ms(k)),
            bytes_per_token: if place.is_some() { self.stats.bytes_per_token() } else { 0 },
            rtt_ms: pulse.map_or(0.0, |p| p.rtt_ms),
        }
    }

    fn own_status(&self, n_workers: usize) -> NodeStatus {
        let layers = self.cluster.plan().and_then(|plan| plan.stages.last()).map(|stage| stage.layers);
        let (state, loaded, memory) = match &self.tail {
            Tail::Empty => ("idle", 0.0, ByteSize(0)),
            Tail::Loading(_) => ("loading", self.tail_share, ByteSize(0)),
            Tail::Loaded(tail) => ("ready", 1.0, tail.memory),
            Tail::InRing => ("ready", 1.0, self.cluster.tail_memory()),
        };
        NodeStatus {
            id: self.identity.node_id(),
            name: self.options.name.clone(),
            role: "coordinator".to_owned(),
            connected: true,
            address: self.shared.link_addresses.first().cloned().unwrap_or_default(),
            layers,
            state: state.to_owned(),
            loaded,
            memory_offered: self.options.memory,
            memory_stage: memory,
            memory_resident: resident_memory(),
            threads: self.options.threads,
            pass_ms: self.stats.stage_ms(n_workers),
            bytes_per_token: if n_workers > 0 { self.stats.bytes_per_token() } else { 0 },
            rtt_ms: 0.0,
        }
    }
}

/// The address under which the coordinator sees a worker is one that others may reach too.
fn with_seen_address(mut offer: Offer, seen_as: &str) -> Offer {
    let port = offer.addresses.first().and_then(|a| a.parse::<SocketAddr>().ok()).map(|a| a.port());
    if let (Ok(mut seen), Some(port)) = (seen_as.parse::<SocketAddr>(), port) {
        seen.set_port(port);
        let seen = seen.to_string();
        offer.addresses.retain(|a| *a != seen);
        offer.addresses.insert(0, seen);
    }
    offer
}

fn read_worker(link: &dyn Link, pulse: &Mutex<Pulse>, tell: impl Fn(ToCoordinator)) -> String {
    let mut buf = Vec::new();
    loop {
        let deadline = Instant::now() + Duration::from_millis(DEAD_AFTER_MS);
        match link.recv(&mut buf, Some(deadline)) {
            Ok(kind::CONTROL) => match ToCoordinator::decode(&buf) {
                Ok(ToCoordinator::Pong { nonce, resident }) => {
                    let mut pulse = lock(pulse);
                    pulse.resident = resident;
                    if let Some((_, at)) = pulse.asked.filter(|(asked, _)| *asked == nonce) {
                        pulse.rtt_ms = at.elapsed().as_secs_f32() * 1000.0;
                    }
                }
                Ok(message) => tell(message),
                Err(error) => return error.to_string(),
            },
            Ok(other) => return format!("it sent a frame of unknown kind {other:#x}"),
            Err(brigade_net::LinkError::TimedOut) => {
                return format!("it was silent for {} s", DEAD_AFTER_MS as f32 / 1000.0);
            }
            Err(error) => return error.to_string(),
        }
    }
}

/// Sends what the owner loop wants told, and a ping whenever a heartbeat's time has passed.
fn write_worker(link: &dyn Link, pulse: &Mutex<Pulse>, messages: &Receiver<ToWorker>) {
    let heartbeat = Duration::from_millis(HEARTBEAT_MS);
    let mut next_ping = Instant::now();
    let mut nonce = 0;
    loop {
        let message = match messages.recv_timeout(next_ping.saturating_duration_since(Instant::now())) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => {
                next_ping = Instant::now() + heartbeat;
                nonce += 1;
                lock(pulse).asked = Some((nonce, Instant::now()));
                ToWorker::Ping { nonce }
            }
            Err(RecvTimeoutError::Disconnected) => return link.close(),
        };
        if link.send(kind::CONTROL, &[&message.encode()]).is_err() {
            return link.close();
        }
    }
}

/// Closes the ring's links, then runs it.
struct RingThread {
    attach: Attach,
    first: Option<(NodeId, Vec<String>)>,
    last_link: Receiver<Arc<dyn Link>>,
    limits: Limits,
    stopper: RingStopper,
    model: Arc<LocalModel>,
    identity: Arc<Identity>,
    stats: Arc<RingStats>,
    shared: Arc<Shared>,
    events: Sender<Event>,
}

impl RingThread {
    fn run(self, tail: LoadedStage) {
        let links = match self.connect() {
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
            limits: self.limits,
            stop: Arc::clone(&self.stopper.stop),
            stats: Arc::clone(&self.stats),
        };
        let end = match ring.probe() {
            Ok(()) => {
                let inbox = self.shared.submissions.open();
                let _ = self.events.send(Event::WentAround(self.attach.epoch));
                ring.run(&inbox, &|| self.shared.submissions.failure())
            }
            Err(end) => end,
        };
        lock(&self.stopper.links).iter().for_each(|link| link.close());
        let stopped = self.stopper.stop.load(Ordering::Relaxed);
        let end = if stopped { RingEnd::Stopped } else { end };
        let _ = self.events.send(Event::RingEnded(self.attach.epoch, Box::new(ring.tail), end));
    }

    /// Dials the first worker and waits for the last one.
    fn connect(&self) -> Result<Option<RingLinks>, RingEnd> {
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
