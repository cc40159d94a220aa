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
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use brigade_base::{ByteSize, LayerRange, NodeId};
use brigade_gguf::ModelFile;
use brigade_net::{Identity, Listener, Ticket, advertised_addrs};
use brigade_protocol::control::Offer;
use serde::Serialize;

use self::control::Control;
use self::door::DataDoor;
use self::owner::{Event, Owner, Slot};
use crate::cache::Cache;
use crate::doorway::Doorway;
use crate::known::KnownCoordinator;
use crate::reach::ReachError;
use crate::state_lock::StateLock;
use crate::threads::{lock, spawn};

mod control;
mod door;
mod loader;
mod owner;

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
    /// Most bytes of idle sessions that are kept on disk; 0 keeps none.
    pub kv_spill: ByteSize,
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

impl Worker {
    /// Starts a worker. It dials the coordinator in the background.
    ///
    /// # Errors
    /// If its key, address or own copy of the model cannot be used, or there is no coordinator to dial.
    pub fn start(options: WorkerOptions) -> Result<Self, WorkerError> {
        brigade_engine::init();
        let identity = Arc::new(Identity::load_or_create(&options.state_dir)?);
        let lock = StateLock::take(&options.state_dir)?;
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
            kv_spill: options.kv_spill,
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
            _lock: lock,
        };
        let offer = Offer {
            name: options.name,
            memory: options.memory,
            kv_spill: options.kv_spill,
            threads: options.threads,
            addresses,
            software: env!("CARGO_PKG_VERSION").to_owned(),
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
