//! The coordinator: the node with the model, which owns the deployment.
//!
//! - The *owner loop* (one thread) holds the [`Cluster`] state machine, turns what happens into its inputs and carries
//!   out its actions. It never blocks on a peer.
//! - Each worker has a *reader* and a *writer* thread on its control link; the writer also sends the heartbeats.
//! - A *loader thread* loads the tail; a *connector* reaches the neighbours; the *ring thread* then owns both, and all
//!   sessions over all placements, see [`crate::ring`].
//! - Links come in through the node's [`Site`]; those for weights and requests are served on the threads that they came
//!   with.
//! - `muster.rs`: who votes, and who is waited for after a takeover.
//!
//! Callers talk to a [`Handle`], which shares with the loop only what may change under a lock for a moment.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, KvTypes, Pooling};
use brigade_gguf::{Architecture, StageViewError, TensorSource};
use brigade_net::{Members, TicketBook};
use brigade_plan::{Demand, ModelProfile, NodeProfile, Optimize, check_split};
use brigade_protocol::cluster::{Cluster, Settings};
use brigade_protocol::council::Charter;
use brigade_protocol::frame::{FrameHead, RowSet};
use brigade_protocol::schedule::PrefixCache;

use self::door::{Door, RequestLinks};
use self::muster::{Muster, Voters};
use self::owner::{Event, Owner, Tail};
use self::pace::Pace;
pub(crate) use self::settings::DeploymentSettings;
use self::sharing::Claims;
use crate::adapters::Adapters;
use crate::doctor::{Rounds, Subject};
use crate::gateway::Coordinating;
use crate::handle::{Handle, Shared};
use crate::meter::Meter;
use crate::model::{LocalModel, ModelError, check_kv};
use crate::probe::Seats;
use crate::purpose::{PoolingChoice, PurposeError, Work};
use crate::ring::{Ring, RingOptions, Submissions, Watch};
use crate::share::{DirectFetch, Shelf, Stock, Tally};
use crate::site::Site;
use crate::sizes::rehearse_model;
use crate::threads::seconds_since_1970;

mod connector;
mod door;
mod examine;
mod muster;
mod owner;
mod pace;
mod settings;
mod sharing;
mod status;
mod worker_link;

/// Prompt tokens of one pass. Long enough that weights are read once for many rows, short enough that a neighbour's
/// next token waits no longer than about a tenth of a second on a slow machine.
pub const CHUNK: u32 = 256;

/// Requests that may wait for a session: a minute's worth of short ones on a small cluster.
pub const MAX_WAITING: usize = 256;

/// What a coordinator is given.
#[derive(Debug, Clone)]
pub struct CoordinatorOptions {
    /// Keys, membership, tickets, hashes of models.
    pub state_dir: PathBuf,
    /// The name that requests use; `None` takes the file's.
    pub model_name: Option<String>,
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
    /// How keys and values are stored.
    pub kv: KvTypes,
    /// Nodes, this one among them, that must be here before the model is placed.
    pub nodes_wanted: usize,
    /// Use every node, even where fewer would do.
    pub spread: bool,
    /// What placements are to be best at.
    pub optimize: Optimize,
    /// Share of the time in which it computes, above 0 to 1.
    pub throttle: f32,
    /// Layers of each stage, workers in the order of joining and this node last.
    pub split: Option<Vec<u32>>,
    /// Whose cached tokens a session may use.
    pub prefix_cache: PrefixCache,
    /// Room on disk for the KV caches of idle sessions; 0 saves none.
    pub kv_spill: ByteSize,
    /// Holders of each worker's stage: 2 has another worker stand by with the weights loaded.
    pub redundancy: u32,
    /// Those that stand by compute what their stage does, so that nothing is computed again when they take over.
    pub shadow: bool,
    /// How long answers and requests wait for the model to have a place again.
    pub wait_for_capacity: Duration,
    /// Whether it generates text or makes vectors, and how.
    pub pooling: PoolingChoice,
    /// Whether workers may fetch weights from where the model came from.
    pub direct_fetch: DirectFetch,
    /// How long it waits to be relieved of its stages, where it works for another coordinator when it is to stop.
    pub drain_timeout: Duration,
}

/// Most tokens of a session unless more are asked for: KV cache is reserved for all of them.
pub const DEFAULT_CONTEXT_MAX: u32 = 4096;

/// A coordinator cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
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

/// A running coordinator.
pub struct Coordinator {
    handle: Arc<Handle>,
    events: Sender<Event>,
    thread: JoinHandle<Result<(), CoordinatorError>>,
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

/// Bytes of a frame with one decode row, which is what a token costs each link.
fn row_bytes(n_embd: u32) -> u64 {
    let mut header = Vec::new();
    let sets = vec![RowSet { slot: 0, keep: 0, n_rows: 1, n_outputs: 1 }];
    FrameHead { sets, n_embd, ..FrameHead::default() }.encode(&mut header);
    header.len() as u64 + 4 * u64::from(n_embd)
}

/// The profile with what the buffers of the model's graphs take, where that can be found out.
fn with_sizes(
    profile: ModelProfile,
    model: &LocalModel,
    demand: &Demand,
    kv: KvTypes,
    pooling: Option<Pooling>,
) -> ModelProfile {
    match rehearse_model(model.file().catalog(), demand, kv, pooling) {
        Ok(rehearsed) => ModelProfile { rehearsed: Some(rehearsed), ..profile },
        Err(error) => {
            tracing::debug!(%error, "what stages take beside weights and KV cache is estimated");
            profile
        }
    }
}

impl Coordinator {
    /// Begins to coordinate with the votes for `term`, at a node's place.
    ///
    /// # Errors
    /// If its state or settings cannot be used.
    pub(crate) fn start(
        model: Arc<LocalModel>,
        options: CoordinatorOptions,
        site: &Site,
        term: u64,
        charter: &Charter,
    ) -> Result<Self, CoordinatorError> {
        brigade_engine::init();
        let state = |error: String| CoordinatorError::State(error);
        let tickets = TicketBook::open(&site.state_dir).map_err(|e| state(e.to_string()))?;
        let mut members = Members::open(&site.state_dir).map_err(|e| state(e.to_string()))?;
        let me = site.identity.node_id();
        // Those who vote or were members were admitted by the coordinator before. One that comes back has its own list,
        // from which somebody may have been taken.
        let took_over = charter.coordinator != me;
        let known = DeploymentSettings::decode(&charter.settings).map(|settings| settings.members).unwrap_or_default();
        let voters = charter.electorate().map(|voter| (voter.node, voter.name.clone()));
        for (node, name) in voters.chain(known).filter(|(node, _)| took_over && *node != me) {
            members.admit(node, &name, seconds_since_1970()).map_err(|e| state(e.to_string()))?;
        }
        let members = Arc::new(Mutex::new(members));
        let setting = |error: PurposeError| CoordinatorError::Setting(error.to_string());
        let work = Work::of(model.file().catalog(), options.pooling).map_err(setting)?;
        let Architecture { n_ctx_train, n_embd, .. } = *model.architecture();
        let context = work.context(n_ctx_train, n_embd, options.context, options.parallel).map_err(setting)?;
        check_kv(model.file().catalog(), model.architecture(), options.kv)?;
        let profile = work.profile(model.profile(options.kv));
        if let Some(split) = &options.split {
            check_split(&profile, split).map_err(|error| CoordinatorError::Setting(error.to_string()))?;
        }
        let (events, inbox) = channel();
        let meter = Arc::new(Meter::new(row_bytes(n_embd)));
        let demand = Demand {
            context,
            parallel: options.parallel,
            max_rows: work.max_rows(context, options.parallel),
            spread: options.spread,
            split: options.split.clone(),
            optimize: work.optimize(options.optimize),
        };
        // Nobody is to wait for it where stages are loaded already and answers are paused: an estimate will do.
        let profile = match took_over {
            true => profile,
            false => with_sizes(profile, &model, &demand, options.kv, work.pooling),
        };
        let settings = Settings {
            deployment: charter.deployment,
            coordinator: NodeProfile { id: me, name: options.name.clone(), memory: options.memory, speed: None },
            model: profile,
            demand,
            nodes_wanted: options.nodes_wanted.max(1),
            term,
            redundancy: options.redundancy,
            shadow: options.shadow,
        };
        let (happen, happenings) = channel();
        let submissions = Submissions::new(happen);
        let addresses = &site.link_addresses;
        let shared = Shared::new(&model, &site.identity, &options, (context, work), tickets, addresses, submissions);
        let shared = Arc::new(shared);
        let (subject, ask) = (Subject::coordinator(&options, &model, addresses), events.clone());
        let rounds = Rounds::new(me, subject, move |asker| ask.send(Event::Examine(asker)).is_ok());
        let handle = Arc::new(Handle::new(Arc::clone(&shared), Arc::clone(&model), Arc::clone(&meter), rounds));
        let requests = Arc::new(RequestLinks::default());
        let (watch, tally) = (Arc::new(Watch::default()), Arc::<Tally>::default());
        let is_busy = {
            let watch = Arc::clone(&watch);
            move || watch.awaited().is_some()
        };
        let source = Arc::clone(model.file()) as Arc<dyn TensorSource>;
        let mut stocks = vec![Stock::new(source, model.file().catalog(), &model.manifest().tensors)];
        stocks.extend(model.adapters().map(Adapters::stock));
        let shelf = Arc::new(Shelf::new(stocks, None, Arc::default(), Arc::clone(&tally), is_busy));
        let keeper = site.keep(Arc::new(Door {
            members: Arc::clone(&members),
            shared: Arc::clone(&shared),
            model: Arc::clone(&model),
            events: events.clone(),
            handle: Arc::clone(&handle) as Arc<dyn Coordinating>,
            vocabulary: OnceLock::new(),
            requests: Arc::clone(&requests),
            seats: Seats::default(),
            shelf,
        }));
        let settings_of_all = DeploymentSettings::of(&options, &model);
        let (connections, connected) = channel();
        let mut owner = Owner {
            muster: Muster::new(&settings, charter),
            cluster: Cluster::new(settings.clone()),
            settings,
            voters: Voters::new(me, &options, addresses, charter, settings_of_all, members),
            requests,
            tally,
            shadows: Vec::new(),
            pace: Pace::default(),
            claims: Claims::default(),
            askers: Vec::new(),
            took_over,
            council: Arc::clone(&site.council),
            had_quorum: true,
            header: model.file().catalog().header_bytes(true),
            model: Arc::clone(&model),
            identity: Arc::clone(&site.identity),
            options,
            context,
            work,
            shared: Arc::clone(&shared),
            meter: Arc::clone(&meter),
            events: events.clone(),
            workers: HashMap::new(),
            leavers: HashMap::new(),
            next_generation: 1,
            tail: Tail::Empty,
            tail_wanted: None,
            tail_loading: None,
            tail_share: 0.0,
            ring_waits: None,
            ring_stop: None,
            connections,
            ring_thread: None,
            watch: Arc::clone(&watch),
            said_missing: String::new(),
            said_slow: None,
            advice: (None, Vec::new()),
            started: Instant::now(),
            _keeper: keeper,
        };
        let tell = events.clone();
        let ring = Ring::new(RingOptions {
            model,
            meter,
            inbox: happenings,
            connections: connected,
            tell: Box::new(move |news| drop(tell.send(Event::Ring(news)))),
            watch,
            limits: owner.limits(),
            wait_for_capacity: owner.options.wait_for_capacity,
        });
        owner.ring_thread = Some(std::thread::Builder::new().name("ring".into()).spawn(move || ring.run())?);
        let thread = std::thread::Builder::new().name("coordinator".into()).spawn(move || owner.run(&inbox))?;
        Ok(Self { handle, events, thread })
    }

    /// What callers talk to.
    pub fn handle(&self) -> Arc<Handle> {
        Arc::clone(&self.handle)
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
