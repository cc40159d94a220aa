//! The worker: a node that runs a stage for a coordinator.
//!
//! - The *owner loop* (one thread) holds all state and never blocks: each of the other threads tells it an [`Event`].
//! - A *control thread* dials the coordinator, answers its pings, and passes its messages on. It dials again when the
//!   link is lost, for as long as the worker runs; the stage is dropped meanwhile, so its memory is free.
//! - A *loader thread* gathers and verifies weights and loads the stage.
//! - A *dialing thread* reaches the next stage; the [`Doorway`] takes the link of the one before.
//! - The *stage thread* owns the stage while both links are up, see [`crate::stage_thread`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, Epoch, LayerRange, NodeId};
use brigade_gguf::{Catalog, ModelFile, StageView, TensorSource};
use brigade_net::{Hello, Identity, Link, Listener, Purpose, Refusal, TcpLink, Ticket, advertised_addrs};
use brigade_protocol::control::{DEAD_AFTER_MS, Deploy, MAX_CONTROL_BYTES, Offer, ToCoordinator, ToWorker};
use brigade_protocol::frame::Attach;
use brigade_protocol::kind;
use serde::Serialize;

use crate::cache::Cache;
use crate::doorway::{Doorkeeper, Doorway, receive_attach};
use crate::known::KnownCoordinator;
use crate::loaded::{LoadedStage, StageKey, chain, load_stage};
use crate::reach::{ReachError, reach};
use crate::stage_thread::{RunningStage, StageEnd};
use crate::system::resident_memory;
use crate::weights::{Gather, WeightsError};

/// First and longest pause before the coordinator is dialled again: soon for a restart, seldom for a night.
const REDIAL: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// Progress is told no more often than this.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Largest frame of hidden states: a full batch of the widest model.
const MAX_DATA_BYTES: usize = brigade_net::MAX_FRAME;

/// What a worker is given.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Keys, membership, cache.
    pub state_dir: PathBuf,
    /// Name for people.
    pub name: String,
    /// What admits it; `None` dials the coordinator that admitted it before.
    pub ticket: Option<Ticket>,
    /// Where its links listen.
    pub listen: SocketAddr,
    /// Memory that it gives.
    pub memory: ByteSize,
    /// Threads that compute.
    pub threads: u32,
    /// Its own copy of the model.
    pub own_copy: Option<PathBuf>,
    /// Most bytes of cached weights.
    pub cache_limit: ByteSize,
}

/// A worker cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Its key cannot be used.
    #[error(transparent)]
    Identity(#[from] brigade_net::IdentityError),
    /// Its link address cannot be bound.
    #[error(transparent)]
    Bind(#[from] brigade_net::BindError),
    /// Neither a ticket nor a coordinator that knows it.
    #[error(
        "this node has joined no cluster yet: run `brigade serve` on the machine with the model and pass the ticket that \
         it prints, `brigade join TICKET`"
    )]
    NoTicket,
    /// Its own copy of the model cannot be used.
    #[error("--model cannot be used: {0}")]
    OwnCopy(#[from] brigade_gguf::OpenError),
    /// The coordinator cannot be reached, or refuses.
    #[error(transparent)]
    Reach(#[from] ReachError),
    /// The model that is served is another one under the same name.
    #[error("{0}")]
    OtherModel(String),
    /// Its state directory cannot be used.
    #[error("the state directory cannot be used: {0}")]
    State(#[from] std::io::Error),
}

/// How a worker stands, for people.
#[derive(Debug, Clone, Serialize)]
pub struct WorkerStatus {
    /// Its key.
    pub node: NodeId,
    /// Its coordinator.
    pub coordinator: NodeId,
    /// Where its links listen.
    pub address: String,
    /// Whether the coordinator is reached.
    pub connected: bool,
    /// Name of the model whose layers it has.
    pub model: String,
    /// Its layers.
    pub layers: Option<LayerRange>,
    /// `waiting`, `loading`, `loaded` or `running`.
    pub state: String,
    /// Bytes of weights that are here, and in all.
    pub weights: (u64, u64),
    /// The last thing that went wrong.
    pub trouble: Option<String>,
}

enum Event {
    Connected(Arc<dyn Link>),
    Message(ToWorker),
    Disconnected(String),
    GaveUp(WorkerError),
    Inbound(Arc<dyn Link>, Attach),
    Loaded(Epoch, Result<LoadedStage, LoadFailure>),
    Dialled(Epoch, Result<Arc<dyn Link>, String>),
    StageEnded(Epoch, Box<LoadedStage>, StageEnd),
    Stop,
}

enum LoadFailure {
    /// This node and the coordinator have different files: nothing will mend that but a person.
    OtherModel(String),
    Other(String),
}

/// A running worker.
pub struct Worker {
    events: Sender<Event>,
    status: Arc<Mutex<WorkerStatus>>,
    thread: JoinHandle<Result<(), WorkerError>>,
}

/// Asks a worker to stop.
#[derive(Clone)]
pub struct WorkerStopper(Sender<Event>);

impl WorkerStopper {
    /// The worker says goodbye and ends.
    pub fn stop(&self) {
        let _ = self.0.send(Event::Stop);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker {
    /// Starts a worker. It dials the coordinator in the background.
    ///
    /// # Errors
    /// If its key, address or own copy of the model cannot be used, or there is no coordinator to dial.
    pub fn start(options: WorkerOptions) -> Result<Self, WorkerError> {
        brigade_engine::init();
        let identity = Arc::new(Identity::load_or_create(&options.state_dir)?);
        let own = options.own_copy.as_ref().map(ModelFile::open).transpose()?.map(Arc::new);
        let known = match &options.ticket {
            Some(ticket) => KnownCoordinator::of(ticket),
            None => KnownCoordinator::load(&options.state_dir)?.ok_or(WorkerError::NoTicket)?,
        };
        let cache = Arc::new(Cache::open(&options.state_dir.join("cache"), options.cache_limit)?);
        let listener = Listener::bind(&identity, &[options.listen])?;
        let addresses: Vec<String> =
            listener.local_addrs().iter().flat_map(|a| advertised_addrs(*a)).map(|a| a.to_string()).collect();
        let (events, inbox) = channel();
        let upstream = Arc::new(Mutex::new(None));
        let keeper = DataDoor { upstream: Arc::clone(&upstream), events: events.clone() };
        let doorway = Doorway::open(listener, Arc::new(keeper));
        let status = Arc::new(Mutex::new(WorkerStatus {
            node: identity.node_id(),
            coordinator: known.node,
            address: addresses.first().cloned().unwrap_or_default(),
            connected: false,
            model: String::new(),
            layers: None,
            state: "waiting".to_owned(),
            weights: (0, 0),
            trouble: None,
        }));
        let own_hash = own.as_ref().map(|file| file.catalog().header_hash());
        let stopping = Arc::new(AtomicBool::new(false));
        let owner = Owner {
            state_dir: options.state_dir.clone(),
            identity: Arc::clone(&identity),
            known: known.clone(),
            own,
            own_hash,
            cache,
            threads: options.threads,
            events: events.clone(),
            status: Arc::clone(&status),
            upstream,
            stopping: Arc::clone(&stopping),
            control: None,
            deploy: None,
            to_load: false,
            slot: Slot::Empty,
            inbound: None,
            outbound: None,
            _doorway: doorway,
        };
        let offer = Offer {
            name: options.name,
            memory: options.memory,
            threads: options.threads,
            addresses,
            software: env!("CARGO_PKG_VERSION").to_owned(),
            own_copy: own_hash,
        };
        let secret = options.ticket.map(|ticket| ticket.admission());
        let control = Control { identity, known, secret, offer, events: events.clone(), stopping };
        spawn("control", move || control.run())?;
        let thread = std::thread::Builder::new().name("worker".into()).spawn(move || owner.run(&inbox))?;
        Ok(Self { events, status, thread })
    }

    /// How it stands.
    pub fn status(&self) -> WorkerStatus {
        lock(&self.status).clone()
    }

    /// A handle that stops it from elsewhere.
    pub fn stopper(&self) -> WorkerStopper {
        WorkerStopper(self.events.clone())
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// Why it could not go on.
    pub fn wait(self) -> Result<(), WorkerError> {
        self.thread.join().unwrap_or(Ok(()))
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map(drop)
}

/// Lets in the data link of the stage before, and nothing else.
struct DataDoor {
    upstream: Arc<Mutex<Option<NodeId>>>,
    events: Sender<Event>,
}

impl Doorkeeper for DataDoor {
    fn admit(&self, hello: &Hello, peer: NodeId) -> Result<(), Refusal> {
        if hello.purpose != Purpose::Data {
            return Err(Refusal::NotExpected("a worker takes only the links of its neighbours in the ring".to_owned()));
        }
        if *lock(&self.upstream) != Some(peer) {
            return Err(Refusal::NotExpected("this worker expects no link from that node".to_owned()));
        }
        Ok(())
    }

    fn enter(&self, _hello: Hello, link: Arc<TcpLink>) {
        link.set_frame_limit(MAX_DATA_BYTES);
        match receive_attach(&*link) {
            Some(attach) => drop(self.events.send(Event::Inbound(link, attach))),
            None => link.close(),
        }
    }
}

/// Keeps the control link up.
struct Control {
    identity: Arc<Identity>,
    known: KnownCoordinator,
    secret: Option<brigade_net::TicketSecret>,
    offer: Offer,
    events: Sender<Event>,
    stopping: Arc<AtomicBool>,
}

impl Control {
    fn run(mut self) {
        let mut pause = REDIAL.0;
        let mut was_connected = false;
        while !self.stopping.load(Ordering::Relaxed) {
            match self.known.dial(&self.identity, Purpose::Control, self.secret.as_ref()) {
                Ok(link) => {
                    was_connected = true;
                    pause = REDIAL.0;
                    // A member needs no ticket any more, and the ticket may expire.
                    self.secret = None;
                    let reason = self.converse(link);
                    let _ = self.events.send(Event::Disconnected(reason));
                }
                Err(error) if !was_connected || error.is_final() => {
                    let _ = self.events.send(Event::GaveUp(error.into()));
                    return;
                }
                Err(error) => tracing::debug!(%error, "the coordinator is not there"),
            }
            let until = Instant::now() + pause;
            while Instant::now() < until && !self.stopping.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(50));
            }
            pause = (pause * 2).min(REDIAL.1);
        }
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
            let deadline = Instant::now() + Duration::from_millis(DEAD_AFTER_MS);
            let message = match link.recv(&mut buf, Some(deadline)) {
                Ok(kind::CONTROL) => ToWorker::decode(&buf),
                Ok(other) => return close(&*link, format!("the coordinator sent a frame of unknown kind {other:#x}")),
                Err(error) => return close(&*link, error.to_string()),
            };
            match message {
                // Answered here, so that a busy owner loop is not taken for a dead node.
                Ok(ToWorker::Ping { nonce }) => {
                    let pong = ToCoordinator::Pong { nonce, resident: resident_memory() };
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

/// Where the stage is.
enum Slot {
    Empty,
    /// A loader thread works; the flag tells it to give up.
    Loading(Arc<AtomicBool>),
    Loaded(Box<LoadedStage>),
    Running(RunningStage),
}

/// All state of a worker.
struct Owner {
    state_dir: PathBuf,
    identity: Arc<Identity>,
    known: KnownCoordinator,
    own: Option<Arc<ModelFile>>,
    own_hash: Option<brigade_base::Hash>,
    cache: Arc<Cache>,
    threads: u32,
    events: Sender<Event>,
    status: Arc<Mutex<WorkerStatus>>,
    /// Who may open a data link; shared with the door.
    upstream: Arc<Mutex<Option<NodeId>>>,
    stopping: Arc<AtomicBool>,
    control: Option<Arc<dyn Link>>,
    deploy: Option<Arc<Deploy>>,
    /// The deployment's stage is still to be loaded.
    to_load: bool,
    slot: Slot,
    inbound: Option<Arc<dyn Link>>,
    outbound: Option<Arc<dyn Link>>,
    _doorway: Doorway,
}

impl Owner {
    fn run(mut self, inbox: &Receiver<Event>) -> Result<(), WorkerError> {
        let result = loop {
            let Ok(event) = inbox.recv() else { break Ok(()) };
            match event {
                Event::Stop => break Ok(()),
                Event::GaveUp(error) => break Err(error),
                Event::Loaded(epoch, Err(LoadFailure::OtherModel(reason))) => {
                    self.tell(&ToCoordinator::StageFailed { epoch, reason: reason.clone() });
                    break Err(WorkerError::OtherModel(reason));
                }
                event => self.apply(event),
            }
            self.load_if_due();
            self.run_if_due();
            self.publish();
        };
        self.stopping.store(true, Ordering::Relaxed);
        self.tell(&ToCoordinator::Goodbye { reason: "it was stopped".to_owned() });
        self.drop_stage();
        if let Some(control) = &self.control {
            control.close();
        }
        result
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Connected(link) => self.control = Some(link),
            Event::Disconnected(reason) => {
                tracing::warn!(reason, "the coordinator is gone; this node's stage is dropped");
                self.set_trouble(format!("the coordinator is gone: {reason}"));
                self.control = None;
                self.undeploy();
            }
            Event::Message(message) => self.message(message),
            Event::Inbound(link, attach) => {
                if self.attach() == Some(attach) {
                    self.inbound = Some(link);
                } else {
                    link.close();
                }
            }
            Event::Loaded(epoch, result) => self.loaded(epoch, result),
            Event::Dialled(epoch, result) => self.dialled(epoch, result),
            Event::StageEnded(epoch, stage, end) => {
                let mut stage = stage;
                stage.runner.clear();
                self.slot = if self.deploy.is_some() { Slot::Loaded(stage) } else { Slot::Empty };
                (self.inbound, self.outbound) = (None, None);
                if let StageEnd::Failed(reason) = end {
                    self.fail(epoch, reason);
                }
            }
            Event::Stop | Event::GaveUp(_) => {}
        }
    }

    fn message(&mut self, message: ToWorker) {
        match message {
            ToWorker::Accept { seen_as } => {
                tracing::info!(seen_as, "joined the cluster");
                if let Err(error) = self.known.save(&self.state_dir) {
                    tracing::warn!(%error, "the coordinator could not be remembered; the next join needs a ticket");
                }
                lock(&self.status).trouble = None;
            }
            ToWorker::Deploy(deploy) => {
                if self.deploy.as_ref().is_some_and(|now| now.epoch >= deploy.epoch) {
                    return;
                }
                self.stop_stage();
                tracing::info!(epoch = %deploy.epoch, layers = %deploy.layers, model = deploy.model_name, "stage assigned");
                *lock(&self.upstream) = Some(deploy.upstream);
                self.deploy = Some(Arc::new(*deploy));
                self.to_load = true;
            }
            ToWorker::Join { epoch, .. } => self.dial_next(epoch),
            ToWorker::Undeploy { epoch, .. } => {
                if self.deploy.as_ref().is_some_and(|now| now.epoch <= epoch) {
                    self.undeploy();
                }
            }
            ToWorker::Goodbye { reason } => self.set_trouble(format!("the coordinator ended: {reason}")),
            ToWorker::Ping { .. } => {}
        }
    }

    fn attach(&self) -> Option<Attach> {
        self.deploy.as_ref().map(|d| Attach { deployment: d.deployment, epoch: d.epoch })
    }

    fn tell(&self, message: &ToCoordinator) {
        if let Some(control) = &self.control
            && let Err(error) = control.send(kind::CONTROL, &[&message.encode()])
        {
            tracing::debug!(%error, "the coordinator was not told");
        }
    }

    fn fail(&mut self, epoch: Epoch, reason: String) {
        tracing::error!(%epoch, reason, "the stage failed");
        self.set_trouble(reason.clone());
        if self.deploy.as_ref().is_some_and(|d| d.epoch == epoch) {
            self.tell(&ToCoordinator::StageFailed { epoch, reason });
        }
    }

    fn set_trouble(&self, text: String) {
        lock(&self.status).trouble = Some(text);
    }

    /// Ends what runs; what is loaded stays for the next placement, which may want the same.
    fn stop_stage(&mut self) {
        match &self.slot {
            Slot::Loading(cancel) => cancel.store(true, Ordering::Relaxed),
            Slot::Running(running) => running.stop(),
            Slot::Empty | Slot::Loaded(_) => {}
        }
        for link in [self.inbound.take(), self.outbound.take()].into_iter().flatten() {
            link.close();
        }
    }

    /// Ends what runs and frees what is loaded.
    fn drop_stage(&mut self) {
        self.stop_stage();
        if matches!(self.slot, Slot::Loaded(_)) {
            self.slot = Slot::Empty;
        }
    }

    fn undeploy(&mut self) {
        self.deploy = None;
        self.to_load = false;
        *lock(&self.upstream) = None;
        self.drop_stage();
    }

    fn load_if_due(&mut self) {
        let (true, Some(deploy)) = (self.to_load, self.deploy.clone()) else { return };
        if !matches!(self.slot, Slot::Empty | Slot::Loaded(_)) {
            return;
        }
        self.to_load = false;
        let key = key_of(&deploy);
        if let Slot::Loaded(stage) = &mut self.slot
            && stage.key == key
        {
            stage.runner.clear();
            let memory = stage.memory;
            return self.tell(&ToCoordinator::Loaded { epoch: deploy.epoch, memory });
        }
        // The old weights go before the new ones come: this node may not hold both.
        self.slot = Slot::Empty;
        let cancel = Arc::new(AtomicBool::new(false));
        let loader = Loader {
            deploy: Arc::clone(&deploy),
            key,
            own: self.own.clone().filter(|_| self.own_hash == Some(deploy.header_hash)),
            differs: self.own_hash.is_some_and(|hash| hash != deploy.header_hash),
            cache: Arc::clone(&self.cache),
            identity: Arc::clone(&self.identity),
            known: self.known.clone(),
            threads: self.threads,
            cancel: Arc::clone(&cancel),
            control: self.control.clone(),
            status: Arc::clone(&self.status),
        };
        let events = self.events.clone();
        let epoch = deploy.epoch;
        match spawn("loader", move || drop(events.send(Event::Loaded(epoch, loader.load())))) {
            Ok(()) => self.slot = Slot::Loading(cancel),
            Err(error) => self.fail(epoch, format!("no thread to load the stage: {error}")),
        }
    }

    fn loaded(&mut self, epoch: Epoch, result: Result<LoadedStage, LoadFailure>) {
        self.slot = Slot::Empty;
        match result {
            Ok(stage) if self.deploy.is_some() => {
                let memory = stage.memory;
                self.slot = Slot::Loaded(Box::new(stage));
                if self.deploy.as_ref().is_some_and(|d| d.epoch == epoch) {
                    self.tell(&ToCoordinator::Loaded { epoch, memory });
                }
            }
            Ok(_) => {}
            Err(LoadFailure::OtherModel(reason) | LoadFailure::Other(reason)) => {
                if self.deploy.as_ref().is_some_and(|d| d.epoch == epoch) {
                    self.fail(epoch, reason);
                }
            }
        }
    }

    fn dial_next(&mut self, epoch: Epoch) {
        let Some(deploy) = self.deploy.clone().filter(|d| d.epoch == epoch) else { return };
        let (identity, events) = (Arc::clone(&self.identity), self.events.clone());
        let dial = move || {
            let attach = Attach { deployment: deploy.deployment, epoch };
            let result = reach(&identity, deploy.downstream, &deploy.downstream_addresses, Purpose::Data, None)
                .map_err(|error| format!("the next stage cannot be reached: {error}"))
                .and_then(|link| {
                    link.send(kind::ATTACH, &[&attach.encode()]).map_err(|error| error.to_string())?;
                    Ok(link as Arc<dyn Link>)
                });
            let _ = events.send(Event::Dialled(epoch, result));
        };
        if let Err(error) = spawn("dial", dial) {
            self.fail(epoch, format!("no thread to dial the next stage: {error}"));
        }
    }

    fn dialled(&mut self, epoch: Epoch, result: Result<Arc<dyn Link>, String>) {
        if self.deploy.as_ref().is_none_or(|d| d.epoch != epoch) {
            if let Ok(link) = result {
                link.close();
            }
            return;
        }
        match result {
            Ok(link) => {
                self.outbound = Some(link);
                self.tell(&ToCoordinator::Joined { epoch });
            }
            Err(reason) => self.fail(epoch, reason),
        }
    }

    fn run_if_due(&mut self) {
        let Some(attach) = self.attach() else { return };
        if self.to_load || !matches!(self.slot, Slot::Loaded(_)) {
            return;
        }
        let (Some(inbound), Some(outbound)) = (self.inbound.clone(), self.outbound.clone()) else { return };
        let Slot::Loaded(stage) = std::mem::replace(&mut self.slot, Slot::Empty) else { return };
        let events = self.events.clone();
        let ended = move |stage, end| drop(events.send(Event::StageEnded(attach.epoch, Box::new(stage), end)));
        match RunningStage::start(attach, *stage, inbound, outbound, ended) {
            Ok(running) => self.slot = Slot::Running(running),
            Err(error) => self.fail(attach.epoch, format!("no thread to run the stage: {error}")),
        }
    }

    fn publish(&self) {
        let mut status = lock(&self.status);
        status.connected = self.control.is_some();
        status.layers = self.deploy.as_ref().map(|d| d.layers);
        status.model = self.deploy.as_ref().map(|d| d.model_name.clone()).unwrap_or_default();
        status.state = match self.slot {
            Slot::Empty => "waiting",
            Slot::Loading(_) => "loading",
            Slot::Loaded(_) => "loaded",
            Slot::Running(_) => "running",
        }
        .to_owned();
    }
}

fn key_of(deploy: &Deploy) -> StageKey {
    StageKey {
        header_hash: deploy.header_hash,
        tensors: deploy.tensors.iter().map(|(_, hash)| *hash).collect(),
        layers: deploy.layers,
        context: deploy.context,
        sessions: deploy.sessions,
        max_rows: deploy.max_rows,
    }
}

/// Gathers weights and loads a stage, on a thread of its own.
struct Loader {
    deploy: Arc<Deploy>,
    key: StageKey,
    own: Option<Arc<ModelFile>>,
    /// The node was given a copy whose header is another one.
    differs: bool,
    cache: Arc<Cache>,
    identity: Arc<Identity>,
    known: KnownCoordinator,
    threads: u32,
    cancel: Arc<AtomicBool>,
    control: Option<Arc<dyn Link>>,
    status: Arc<Mutex<WorkerStatus>>,
}

impl Loader {
    fn load(self) -> Result<LoadedStage, LoadFailure> {
        let other = |text: String| LoadFailure::Other(text);
        let deploy = &self.deploy;
        if self.differs {
            return Err(LoadFailure::OtherModel(format!(
                "this node's copy is not the model {} that is served: their headers differ. Use the same file, or leave \
                 --model away to fetch the weights",
                deploy.model_name
            )));
        }
        let catalog = Catalog::parse_header(&deploy.header).map_err(|e| other(e.to_string()))?;
        let view = StageView::new(&catalog, deploy.layers).map_err(|e| other(e.to_string()))?;
        if view.tensors().len() != deploy.tensors.len()
            || view.tensors().iter().zip(&deploy.tensors).any(|(&idx, (named, _))| idx != *named as usize)
        {
            return Err(other("the deployment does not name the tensors of its layers".to_owned()));
        }
        let dial = || {
            self.known.dial(&self.identity, Purpose::Weights, None).map_or_else(
                |error| Err(error.to_string()),
                |link| {
                    link.set_frame_limit(brigade_protocol::weights::CHUNK_BYTES);
                    Ok(link as Arc<dyn Link>)
                },
            )
        };
        let mut last = Instant::now();
        let mut progress = |done, total| {
            lock(&self.status).weights = (done, total);
            if last.elapsed() >= PROGRESS_EVERY || done == total {
                last = Instant::now();
                let message = ToCoordinator::Progress { epoch: deploy.epoch, done, total };
                if let Some(control) = &self.control {
                    let _ = control.send(kind::CONTROL, &[&message.encode()]);
                }
            }
            !self.cancel.load(Ordering::Relaxed)
        };
        let gather = Gather {
            model_name: &deploy.model_name,
            catalog: &catalog,
            tensors: &deploy.tensors,
            own: self.own.as_ref(),
            cache: &self.cache,
            dial: &dial,
            progress: &mut progress,
        };
        let weights = gather.run().map_err(|error| match error {
            WeightsError::OwnCopyDiffers { .. } => LoadFailure::OtherModel(error.to_string()),
            error => other(error.to_string()),
        })?;
        let source: Arc<dyn TensorSource> = Arc::new(weights);
        let mut go_on = |_share: f32| !self.cancel.load(Ordering::Relaxed);
        load_stage(self.key.clone(), &view, source, self.threads, &mut go_on).map_err(|error| other(chain(&error)))
    }
}
