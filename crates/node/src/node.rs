//! A node: it coordinates or works, and changes between the two as the council decides.
//!
//! One thread owns the node's part, a [`Coordinator`] or a [`Worker`], and replaces it by the other one. Key, address
//! and state directory ([`Site`]) stay, and so does the [`Gateway`] that callers talk to: it passes requests to whoever
//! coordinates and submits those that are open again where that changes.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use brigade_base::{ByteSize, DeploymentId, Hash, KvTypes, NodeId};
use brigade_net::{Ticket, TicketSecret};
use brigade_plan::Optimize;
use brigade_protocol::council::{Charter, Incumbent, Stored, Voter};

use crate::coordinator::{Coordinator, CoordinatorError, CoordinatorOptions, DeploymentSettings};
use crate::council::RoleChange;
use crate::gateway::{Coordinating, Gateway, GatewayOptions};
use crate::known::KnownCoordinator;
use crate::model::LocalModel;
use crate::purpose::PoolingChoice;
use crate::share::OwnCopy;
use crate::site::{Site, SiteError};
use crate::threads::{lock, unique_number};
use crate::worker::{Worker, WorkerError, WorkerOptions, WorkerStatus};
use brigade_protocol::schedule::PrefixCache;

/// How often it is looked whether a part has ended or the node is to stop.
const POLL: Duration = Duration::from_millis(25);

/// Weights that a node keeps on disk once it works where it coordinated before; it has the whole model anyway.
const CACHE_LIMIT: ByteSize = ByteSize(0);

/// A node cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// It has no place.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// It cannot coordinate.
    #[error(transparent)]
    Coordinator(#[from] CoordinatorError),
    /// It cannot work.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The system gives no threads.
    #[error("the system gives no thread: {0}")]
    Thread(std::io::Error),
    /// It was elected and cannot do what it was elected for.
    #[error(
        "this node was elected to coordinate and does not have the model that is served; start it again, with --model \
         FILE if it is to take over, without it if not"
    )]
    NoModel,
    /// What was agreed before cannot be used.
    #[error("this node cannot found a deployment: {0}")]
    Charter(String),
}

/// What a node does.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "made to be looked at, one at a time")]
pub enum Part {
    /// Nothing yet: it waits for the votes of a majority, or to hear who coordinates.
    Undecided,
    /// It coordinates.
    Coordinates,
    /// It works for a coordinator.
    Works(WorkerStatus),
}

/// A running node.
pub struct Node {
    front: Arc<Gateway>,
    node_id: NodeId,
    link_addresses: Vec<SocketAddr>,
    part: Arc<Mutex<PartView>>,
    stops: Arc<AtomicU32>,
    thread: JoinHandle<Result<(), NodeError>>,
}

/// Asks a node to stop.
#[derive(Clone)]
pub struct NodeStopper(Arc<AtomicU32>);

impl NodeStopper {
    /// A worker asks to be relieved of its stages first; asked again, the node ends at once.
    pub fn stop(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// What others see of the part.
enum PartView {
    Undecided,
    Coordinates,
    Works(Arc<dyn Fn() -> WorkerStatus + Send + Sync>),
}

impl Node {
    /// Starts a node that serves a model: it coordinates, unless another one took over meanwhile; then it works for
    /// that.
    ///
    /// # Errors
    /// If its key, address, state or settings cannot be used.
    pub fn serve(model: LocalModel, options: CoordinatorOptions) -> Result<Self, NodeError> {
        let settings = DeploymentSettings::of(&options, &model);
        let mut problem = None;
        let (site, roles) = Site::take(&options.state_dir, options.listen, |me, addresses, stored| {
            let may_lead = |charter: &Charter| charter.voter(me).is_some_and(|voter| voter.may_lead);
            let is_same = |charter: &Charter| has_model(charter, Some(settings.served_hash));
            // A coordinator that comes back, or is a voter by now, asks the others first.
            if stored.charter.as_ref().is_some_and(|charter| may_lead(charter) && is_same(charter)) {
                return stored;
            }
            let addresses = addresses.iter().map(ToString::to_string).collect();
            let own = Voter { node: me, name: options.name.clone(), addresses, may_lead: true };
            let founded = stored.clone().forget().found(DeploymentId(unique_number()), own, settings.encode());
            founded.unwrap_or_else(|error| {
                problem = Some(error.to_string());
                stored
            })
        })?;
        if let Some(why) = problem {
            return Err(NodeError::Charter(why));
        }
        let worker_options = WorkerOptions {
            state_dir: options.state_dir.clone(),
            name: options.name.clone(),
            ticket: None,
            listen: options.listen,
            memory: options.memory,
            threads: options.threads,
            throttle: options.throttle,
            cache_limit: CACHE_LIMIT,
            kv_spill: options.kv_spill,
            drain_timeout: options.drain_timeout,
            wait_for_capacity: options.wait_for_capacity,
            direct_fetch: options.direct_fetch,
        };
        let options = Options { coordinator: options, worker: worker_options, founded: true };
        Self::start(site, roles, options, Some(model), None)
    }

    /// Starts a node that works for the coordinator that it knows. With a whole `model` it may take that one's place
    /// when it is lost.
    ///
    /// # Errors
    /// If its key, address or state cannot be used, or there is no coordinator to dial.
    pub fn join(options: WorkerOptions, model: Option<LocalModel>) -> Result<Self, NodeError> {
        let known = match &options.ticket {
            Some(ticket) => KnownCoordinator::of(ticket),
            None => {
                KnownCoordinator::load(&options.state_dir).map_err(WorkerError::from)?.ok_or(WorkerError::NoTicket)?
            }
        };
        let has_ticket = options.ticket.is_some();
        let (site, roles) = Site::take(&options.state_dir, options.listen, |me, _, stored| {
            // With a ticket of another cluster, or where this node led one of its own, what was agreed is over.
            let belongs = |c: &Charter| c.voter(known.node).is_some() && c.voter(me).is_some();
            match stored.charter.as_ref().is_some_and(|charter| has_ticket && !belongs(charter)) {
                true => stored.forget(),
                false => able(stored, me, model.as_ref().map(LocalModel::served_hash)),
            }
        })?;
        let coordinator_options = CoordinatorOptions {
            state_dir: options.state_dir.clone(),
            model_name: None,
            name: options.name.clone(),
            listen: options.listen,
            memory: options.memory,
            threads: options.threads,
            context: None,
            parallel: 1,
            kv: KvTypes::default(),
            nodes_wanted: 1,
            spread: false,
            split: None,
            optimize: Optimize::default(),
            throttle: options.throttle,
            prefix_cache: PrefixCache::default(),
            kv_spill: options.kv_spill,
            redundancy: 1,
            shadow: false,
            wait_for_capacity: options.wait_for_capacity,
            direct_fetch: options.direct_fetch,
            pooling: PoolingChoice::default(),
            drain_timeout: options.drain_timeout,
        };
        let options = Options { coordinator: coordinator_options, worker: options, founded: false };
        Self::start(site, roles, options, model, Some(known))
    }

    fn start(
        site: Site,
        roles: Receiver<RoleChange>,
        options: Options,
        model: Option<LocalModel>,
        known: Option<KnownCoordinator>,
    ) -> Result<Self, NodeError> {
        let model = model.map(Arc::new);
        let front = Gateway::start(GatewayOptions {
            identity: Arc::clone(&site.identity),
            state_dir: site.state_dir.clone(),
            own_copy: model.as_ref().map(|model| Arc::clone(model.file())),
            wait_for_capacity: options.coordinator.wait_for_capacity,
        });
        let front = Arc::new(front.map_err(NodeError::Thread)?);
        let (node_id, link_addresses) = (site.identity.node_id(), site.link_addresses.clone());
        let part = Arc::new(Mutex::new(PartView::Undecided));
        let stops = Arc::new(AtomicU32::new(0));
        let mut runner = Runner {
            site: Arc::new(site),
            roles,
            options,
            model,
            front: Arc::clone(&front),
            view: Arc::clone(&part),
            stops: Arc::clone(&stops),
            by_hand: known.clone(),
            part: Running::Nothing,
        };
        if let Some(known) = known {
            let secret = runner.options.worker.ticket.as_ref().map(Ticket::admission);
            front.follow(Some((known.node, known.addresses.clone())));
            runner.work(known, secret)?;
        }
        let thread = std::thread::Builder::new().name("node".into()).spawn(move || runner.run());
        Ok(Self { front, node_id, link_addresses, part, stops, thread: thread.map_err(NodeError::Thread)? })
    }

    /// What callers talk to, whatever the node's part.
    pub fn front(&self) -> &Arc<Gateway> {
        &self.front
    }

    /// Its key.
    pub fn id(&self) -> NodeId {
        self.node_id
    }

    /// Where its links listen.
    pub fn link_addresses(&self) -> &[SocketAddr] {
        &self.link_addresses
    }

    /// What it does.
    pub fn part(&self) -> Part {
        let works = match &*lock(&self.part) {
            PartView::Undecided => return Part::Undecided,
            PartView::Coordinates => return Part::Coordinates,
            PartView::Works(status) => Arc::clone(status),
        };
        Part::Works(works())
    }

    /// A handle that stops it from elsewhere.
    pub fn stopper(&self) -> NodeStopper {
        NodeStopper(Arc::clone(&self.stops))
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// Why it could not go on.
    pub fn wait(self) -> Result<(), NodeError> {
        self.thread.join().unwrap_or(Ok(()))
    }
}

/// What was stored, with this node as one that may not lead if it has not the model that is served any more.
///
/// No quorum is mistaken for that: only a candidate and a coordinator count by their own charter, and this node becomes
/// neither until a coordinator that knows what it offers sends another one.
fn able(mut stored: Stored, me: NodeId, own: Option<Hash>) -> Stored {
    if let Some(charter) = &mut stored.charter
        && !has_model(charter, own)
    {
        let voters = charter.voters.iter_mut().chain(&mut charter.before);
        voters.filter(|voter| voter.node == me).for_each(|voter| voter.may_lead = false);
    }
    stored
}

/// Whether `own`, what a model with its adapters is known by, is what the charter's deployment serves; not, if its
/// settings are of another program.
fn has_model(charter: &Charter, own: Option<Hash>) -> bool {
    DeploymentSettings::decode(&charter.settings).is_some_and(|settings| own == Some(settings.served_hash))
}

/// What each part is started with.
struct Options {
    coordinator: CoordinatorOptions,
    worker: WorkerOptions,
    /// The coordinator's options were given here, and not by another coordinator.
    founded: bool,
}

/// The part that runs.
enum Running {
    Nothing,
    Coordinates(Coordinator),
    Works(Worker),
}

/// What the node's thread owns.
struct Runner {
    site: Arc<Site>,
    roles: Receiver<RoleChange>,
    options: Options,
    /// The whole model, where the node has it.
    model: Option<Arc<LocalModel>>,
    front: Arc<Gateway>,
    view: Arc<Mutex<PartView>>,
    stops: Arc<AtomicU32>,
    /// The coordinator that it was started for, where somebody said that it is.
    by_hand: Option<KnownCoordinator>,
    part: Running,
}

impl Runner {
    fn run(mut self) -> Result<(), NodeError> {
        let result = self.run_parts();
        self.front.stop();
        result
    }

    fn run_parts(&mut self) -> Result<(), NodeError> {
        let mut n_stopped = 0;
        loop {
            match self.roles.recv_timeout(POLL) {
                Ok(change) if n_stopped == 0 => self.change(change)?,
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            let n_asked = self.stops.load(Ordering::Relaxed);
            for _ in n_stopped..n_asked {
                match &self.part {
                    Running::Nothing => return Ok(()),
                    Running::Coordinates(coordinator) => coordinator.stopper().stop(),
                    Running::Works(worker) => worker.stopper().stop(),
                }
            }
            n_stopped = n_asked;
            let is_finished = match &self.part {
                Running::Nothing => false,
                Running::Coordinates(coordinator) => coordinator.is_finished(),
                Running::Works(worker) => worker.is_finished(),
            };
            if is_finished {
                return self.end_part();
            }
        }
    }

    fn change(&mut self, change: RoleChange) -> Result<(), NodeError> {
        match change {
            RoleChange::Lead { term, charter } => self.lead(term, &charter),
            RoleChange::Follow(incumbent) => self.follow(incumbent),
            RoleChange::StepDown => {
                self.front.follow(None);
                self.drop_part();
                Ok(())
            }
        }
    }

    fn lead(&mut self, term: u64, charter: &Charter) -> Result<(), NodeError> {
        // Only who has the model is elected, unless a coordinator did not hear in time that it is gone. Others take
        // over when this node ends.
        let served = self.model.clone().filter(|model| has_model(charter, Some(model.served_hash())));
        let model = served.ok_or(NodeError::NoModel)?;
        self.front.follow(None);
        self.drop_part();
        let mut options = self.options.coordinator.clone();
        // Whoever founded the deployment and comes back to it may have been given other settings. Whoever takes over
        // from another one goes on with what holds.
        let is_own = self.options.founded && charter.coordinator == self.site.identity.node_id();
        if let (false, Some(settings)) = (is_own, DeploymentSettings::decode(&charter.settings)) {
            options = settings.into_options(options);
        }
        let coordinator = Coordinator::start(model, options, &self.site, term, charter)?;
        self.front.lead(coordinator.handle() as Arc<dyn Coordinating>);
        *lock(&self.view) = PartView::Coordinates;
        self.part = Running::Coordinates(coordinator);
        Ok(())
    }

    fn follow(&mut self, incumbent: Incumbent) -> Result<(), NodeError> {
        let Incumbent { term, peer } = incumbent;
        let mut known = KnownCoordinator { node: peer.node, addresses: peer.addresses };
        // An address that somebody gave by hand may lead through where the coordinator's own do not.
        let by_hand = self.by_hand.iter().filter(|by_hand| by_hand.node == known.node);
        for address in by_hand.flat_map(|by_hand| &by_hand.addresses) {
            if !known.addresses.contains(address) {
                known.addresses.push(address.clone());
            }
        }
        self.front.follow_term(term, known.node, known.addresses.clone());
        match &self.part {
            Running::Works(worker) => {
                worker.follow(known);
                Ok(())
            }
            Running::Coordinates(_) | Running::Nothing => {
                self.drop_part();
                self.work(known, None)
            }
        }
    }

    fn work(&mut self, known: KnownCoordinator, secret: Option<TicketSecret>) -> Result<(), NodeError> {
        let own_copy = |model: &Arc<LocalModel>| OwnCopy {
            file: Arc::clone(model.file()),
            hashes: model.manifest().tensors.clone(),
            served_hash: model.served_hash(),
        };
        let own = self.model.as_ref().map(own_copy);
        let worker = Worker::start(&self.options.worker, own, &self.site, known, secret)?;
        *lock(&self.view) = PartView::Works(worker.watcher());
        self.part = Running::Works(worker);
        Ok(())
    }

    /// Ends the part at once: another one follows.
    fn drop_part(&mut self) {
        *lock(&self.view) = PartView::Undecided;
        match &self.part {
            Running::Nothing => {}
            Running::Coordinates(coordinator) => coordinator.stopper().stop(),
            Running::Works(worker) => worker.abandon(),
        }
        if let Err(error) = self.end_part() {
            tracing::warn!(%error, "the part that ends had a problem");
        }
    }

    fn end_part(&mut self) -> Result<(), NodeError> {
        match std::mem::replace(&mut self.part, Running::Nothing) {
            Running::Nothing => Ok(()),
            Running::Coordinates(coordinator) => Ok(coordinator.wait()?),
            Running::Works(worker) => Ok(worker.wait()?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::share::DirectFetch;

    #[test]
    fn a_node_without_the_model_may_lead_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-f16.gguf");
        let model = LocalModel::open(&path, dir.path(), &|_, _| {}).unwrap();
        let me = NodeId::from_bytes([1; 32]);
        let own = Voter { node: me, name: String::new(), addresses: Vec::new(), may_lead: true };
        let options = CoordinatorOptions {
            state_dir: dir.path().to_owned(),
            model_name: None,
            name: String::new(),
            listen: ([127, 0, 0, 1], 0).into(),
            memory: ByteSize(0),
            threads: 1,
            context: None,
            parallel: 1,
            kv: KvTypes::default(),
            nodes_wanted: 1,
            spread: false,
            split: None,
            optimize: Optimize::default(),
            throttle: 1.0,
            prefix_cache: PrefixCache::default(),
            kv_spill: ByteSize(0),
            redundancy: 1,
            shadow: false,
            wait_for_capacity: Duration::ZERO,
            direct_fetch: DirectFetch::default(),
            pooling: PoolingChoice::default(),
            drain_timeout: Duration::ZERO,
        };
        let settings = DeploymentSettings::of(&options, &model).encode();
        let stored = Stored::default().found(DeploymentId(1), own, settings).unwrap();
        assert_eq!(able(stored.clone(), me, Some(model.header_hash())), stored);
        for own in [None, Some(Hash::from_bytes([9; 32]))] {
            let charter = able(stored.clone(), me, own).charter.unwrap();
            assert!(!charter.voters[0].may_lead);
        }
    }
}
