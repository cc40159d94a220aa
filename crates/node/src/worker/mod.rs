//! The worker: a node that holds stages for a coordinator.
//!
//! - The *owner loop* (one thread) holds all state and never blocks: each of the other threads tells it an [`Event`].
//!   What follows from it is decided by [`brigade_protocol::worker::Stages`].
//! - A *control thread* dials the coordinator, answers its pings, and passes its messages on. It dials again when the
//!   link is lost, for as long as the worker runs; the stages stop meanwhile, and after a while their memory is free.
//! - A *measuring thread* finds out how fast this node is when the coordinator asks; another, what is wrong with it.
//! - A *loader thread* gathers and verifies weights and loads a stage, one at a time.
//! - *Dialing threads* reach the stages behind; the node's [`Site`] takes the links of those before.
//! - A *stage thread* owns a stage while it serves or stands by, see [`crate::stage_thread`]; a *handover thread*,
//!   while what its slots hold moves to or from another node.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use brigade_base::{ByteSize, LayerRange, NodeId};
use brigade_net::{Ticket, TicketSecret};
use brigade_protocol::control::Offer;
use brigade_protocol::weights::WeightBytes;
use brigade_protocol::worker::Stages;
use serde::Serialize;

use self::control::Control;
use self::door::WorkerDoor;
use self::measuring::{Measurable, Measuring};
use self::owner::{Event, Owner};
use crate::activity::WorkerActivity;
use crate::cache::Cache;
use crate::known::KnownCoordinator;
use crate::probe::Seats;
use crate::reach::ReachError;
use crate::share::{DirectFetch, OwnCopy, Shelf, Stock, Tally, Trees};
use crate::site::Site;
use crate::threads::{lock, spawn};

mod control;
mod door;
mod loader;
mod measuring;
mod owner;
#[cfg(test)]
mod tests;

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
    /// Share of the time in which they do; 1 without pauses.
    pub throttle: f32,
    /// Most bytes of cached weights.
    pub cache_limit: ByteSize,
    /// Whether weights may come from where the model was downloaded from, where the coordinator wants that.
    pub direct_fetch: DirectFetch,
    /// Most bytes of idle sessions that are kept on disk; 0 keeps none.
    pub kv_spill: ByteSize,
    /// How long it waits, when it is asked to end, until its stages are elsewhere.
    pub drain_timeout: Duration,
    /// How long requests that came in here wait for another coordinator when theirs is lost.
    pub wait_for_capacity: Duration,
}

/// A worker cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Neither a ticket nor a coordinator that knows it.
    #[error(
        "this node has joined no cluster yet: run `brigade serve` on the machine with the model and pass the ticket that \
         it prints, `brigade join TICKET`"
    )]
    NoTicket,
    /// The coordinator cannot be reached, or refuses.
    #[error(transparent)]
    Reach(#[from] ReachError),
    /// The model that is served is another one under the same name.
    #[error("{0}")]
    OtherModel(String),
    /// Its state directory cannot be used.
    #[error("the state directory cannot be used: {0}")]
    State(#[from] std::io::Error),
    /// The system gives no thread.
    #[error("no thread for a stage: {0}; end other programs or raise the limit of processes")]
    Thread(std::io::Error),
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
    /// The layers that it serves; the first ones where it serves several stages.
    pub layers: Option<LayerRange>,
    /// The layers that it stands by for.
    pub standby: Vec<LayerRange>,
    /// `waiting`, `loading`, `loaded`, `running` or `leaving`.
    pub state: String,
    /// Bytes of weights that are here, and in all.
    pub weights: (u64, u64),
    /// Bytes of weights since it started, by where it had them from, and what it sent to other nodes.
    pub weights_from: WeightBytes,
    /// The last thing that went wrong.
    pub trouble: Option<String>,
}

/// A running worker.
pub struct Worker {
    events: Sender<Event>,
    known: Arc<Mutex<KnownCoordinator>>,
    status: Arc<Mutex<WorkerStatus>>,
    thread: JoinHandle<Result<(), WorkerError>>,
}

/// Asks a worker to stop.
#[derive(Clone)]
pub struct WorkerStopper(Sender<Event>);

impl WorkerStopper {
    /// The worker leaves: it ends once its stages are elsewhere, or after [`WorkerOptions::drain_timeout`]. When it is
    /// told again, or if nobody needs it, it ends at once.
    pub fn stop(&self) {
        let _ = self.0.send(Event::Stop);
    }
}

impl Worker {
    /// Begins to work at a node's place for a coordinator, which it dials in the background. `own` is the node's own
    /// copy of the model.
    ///
    /// # Errors
    /// If its cache cannot be used or the system gives no threads.
    pub(crate) fn start(
        options: &WorkerOptions,
        own: Option<OwnCopy>,
        site: &Site,
        known: KnownCoordinator,
        secret: Option<TicketSecret>,
    ) -> Result<Self, WorkerError> {
        brigade_engine::init();
        let cache = Arc::new(Cache::open(&site.state_dir.join("cache"), options.cache_limit)?);
        let addresses: Vec<String> = site.link_addresses.iter().map(ToString::to_string).collect();
        let (events, inbox) = channel();
        let peers = Arc::new(Mutex::new(Vec::new()));
        let fellows = Arc::new(Mutex::new(Vec::new()));
        let (trees, tally) = (Arc::<Trees>::default(), Arc::<Tally>::default());
        let activity = Arc::new(WorkerActivity::default());
        let is_busy = {
            let activity = Arc::clone(&activity);
            move || activity.moved_lately()
        };
        let stocks = own.iter().map(Stock::from).collect();
        let shelf = Shelf::new(stocks, Some(Arc::clone(&cache)), Arc::clone(&trees), Arc::clone(&tally), is_busy);
        let served_hash = own.as_ref().map(|own| own.served_hash);
        let own = own.map(|own| own.file);
        let keeper = site.keep(Arc::new(WorkerDoor {
            peers: Arc::clone(&peers),
            fellows: Arc::clone(&fellows),
            seats: Seats::default(),
            shelf: Arc::new(shelf),
            events: events.clone(),
        }));
        let status = Arc::new(Mutex::new(WorkerStatus {
            node: site.identity.node_id(),
            coordinator: known.node,
            address: addresses.first().cloned().unwrap_or_default(),
            connected: false,
            model: String::new(),
            layers: None,
            standby: Vec::new(),
            state: "waiting".to_owned(),
            weights: (0, 0),
            weights_from: WeightBytes::default(),
            trouble: None,
        }));
        let own_hash = own.as_ref().map(|file| file.catalog().header_hash());
        let stopping = Arc::new(AtomicBool::new(false));
        let known = Arc::new(Mutex::new(known));
        let measuring = Measuring::new(Measurable {
            identity: Arc::clone(&site.identity),
            state_dir: site.state_dir.clone(),
            own: own_hash.zip(own.clone()),
            memory: options.memory,
            threads: options.threads,
            throttle: options.throttle,
            addresses: addresses.clone(),
        });
        let owner = Owner {
            state_dir: site.state_dir.clone(),
            identity: Arc::clone(&site.identity),
            council: Arc::clone(&site.council),
            known: Arc::clone(&known),
            own,
            own_hash,
            cache,
            trees,
            tally: Arc::clone(&tally),
            sources: Arc::default(),
            direct_fetch: options.direct_fetch,
            threads: options.threads,
            throttle: options.throttle,
            memory: options.memory,
            measuring,
            kv_spill: options.kv_spill,
            spilled: Arc::default(),
            events: events.clone(),
            status: Arc::clone(&status),
            drain_timeout: options.drain_timeout,
            peers,
            fellows,
            activity: Arc::clone(&activity),
            stopping: Arc::clone(&stopping),
            control: None,
            stages: Stages::new(),
            places: HashMap::new(),
            links: HashMap::new(),
            last_link: 0,
            engines: HashMap::new(),
            model: String::new(),
            _keeper: keeper,
        };
        let offer = Offer {
            name: options.name.clone(),
            memory: options.memory,
            kv_spill: options.kv_spill,
            threads: options.threads,
            addresses,
            software: env!("CARGO_PKG_VERSION").to_owned(),
            own_copy: served_hash,
        };
        let control = Control {
            identity: Arc::clone(&site.identity),
            council: Arc::clone(&site.council),
            known: Arc::clone(&known),
            secret,
            offer,
            events: events.clone(),
            activity,
            tally,
            stopping,
        };
        spawn("control", move || control.run())?;
        let thread = std::thread::Builder::new().name("worker".into()).spawn(move || owner.run(&inbox))?;
        Ok(Self { events, known, status, thread })
    }

    /// Works for another coordinator from now on. Its stages stay loaded for a while, in case that one wants them.
    pub(crate) fn follow(&self, coordinator: KnownCoordinator) {
        let is_same = {
            let mut known = lock(&self.known);
            let is_same = known.node == coordinator.node;
            *known = coordinator;
            is_same
        };
        if !is_same {
            let _ = self.events.send(Event::Followed);
        }
    }

    /// Ends at once, without asking anybody: the node has another part to play.
    pub(crate) fn abandon(&self) {
        let _ = self.events.send(Event::Abandon);
    }

    /// Tells how it stands, from elsewhere.
    pub(crate) fn watcher(&self) -> Arc<dyn Fn() -> WorkerStatus + Send + Sync> {
        let status = Arc::clone(&self.status);
        Arc::new(move || lock(&status).clone())
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
