//! Fetching what a node misses, from several sources at once.
//!
//! ```text
//! loader thread           source threads                     disk
//!   run ---- starts ----> dial, ask what there is
//!     |                   take work, ask ------ FETCH --->
//!     |<---- changed ---- verify <------------- CHUNK ----   --> write, rename when whole
//!     '----- over ------> (links are closed)
//! ```
//!
//! The state is shared under one lock, held for a moment; blocks are hashed and written without it. A source that
//! breaks off is dialled again a few times, and later now and then. One that sends a wrong block is not asked again by
//! this gathering: what came over a link that is authenticated and encrypted was wrong where it came from.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant};

use brigade_base::{Hash, NodeId};
use brigade_net::Link;
use brigade_protocol::control::Peer;
use brigade_protocol::weights::{BLOCK_BYTES, Hub, MAX_WEIGHTS_FRAME};

use super::hub::{HubReader, ask_hub};
use super::pool::{Arrived, Pool, SourceId};
use super::talk::{End, Talk};
use super::tree::{Tree, Trees, block_range};
use super::{Origin, Tally};
use crate::cache::{Cache, Partial};
use crate::threads::lock;

/// How often a source that breaks off is dialled again before it is given up for a while.
const ATTEMPTS: u32 = 4;

/// First pause before that; each next one is twice as long.
const PAUSE: Duration = Duration::from_millis(200);

/// How long a source that was given up is left alone.
const LEAVE_ALONE: Duration = Duration::from_secs(5);

/// Nodes that are asked at once, the coordinator among them: more than can fill the link of a home's machine.
const MAX_ASKED_NODES: usize = 8;

/// How often the loader looks after its sources and tells how far they are.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A tensor that is missing.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Its hash.
    pub hash: Hash,
    /// Its length.
    pub n_bytes: u64,
    /// Its name, for messages.
    pub name: String,
}

/// A tensor that has come: a file of the cache.
pub type Place = Arc<File>;

/// Whom a node may ask, and how; it may change while weights come.
pub trait Suppliers: Sync {
    /// Nodes beside the coordinator.
    fn peers(&self) -> Vec<Peer>;

    /// A link for weights to a node, or to the coordinator of this moment. Gives up when it `is_wanted` no more.
    ///
    /// # Errors
    /// Why there is none.
    fn dial(&self, peer: Option<&Peer>, is_wanted: &dyn Fn() -> bool) -> Result<Arc<dyn Link>, NoLink>;

    /// The server that the model came from, if it may be asked.
    fn hub(&self) -> Option<Hub>;

    /// What reads from it; `None` if it cannot be asked.
    fn reader(&self, hub: &Hub) -> Option<Arc<dyn HubReader>>;
}

/// Why there is no link to a node.
#[derive(Debug)]
pub struct NoLink {
    /// For people.
    pub why: String,
    /// It is there, and has no room at the moment.
    pub is_busy: bool,
}

impl<T: ToString> From<T> for NoLink {
    fn from(why: T) -> Self {
        Self { why: why.to_string(), is_busy: false }
    }
}

/// Why something is missing still.
#[derive(Debug)]
pub enum Failed {
    /// Nobody wants it any more.
    Cancelled,
    /// Whoever has this tensor sends other bytes; its number.
    WrongBytes(usize),
    /// Nobody who has this tensor can be reached; its number, and why.
    BrokeOff(usize, String),
    /// Writing on this node failed.
    Disk(io::Error),
}

/// What all threads of a gathering share.
pub struct Gathering<'a> {
    pub(super) wanted: &'a [Wanted],
    cache: &'a Cache,
    pub(super) trees: &'a Trees,
    tally: &'a Tally,
    state: Mutex<State>,
    changed: Condvar,
    begun: Instant,
}

pub(super) struct State {
    pub(super) pool: Pool,
    /// Those that are known.
    trees: Vec<Option<Arc<Tree>>>,
    partials: Vec<Option<Arc<Partial>>>,
    places: Vec<Option<Place>>,
    /// Bytes that are here.
    here: u64,
    /// Bytes that came from nodes.
    pub(super) from_nodes: u64,
    links: HashMap<usize, Arc<dyn Link>>,
    last_link: usize,
    /// Who sent a wrong block, and of which tensor.
    banned: Vec<(NodeId, usize)>,
    /// What went wrong last.
    pub(super) why: String,
    pub(super) is_over: bool,
    failed: Option<Failed>,
}

/// Who is asked: `None` for the coordinator.
type Supplier = Option<NodeId>;

/// What the loader knows of a source's thread.
enum Thread {
    Runs,
    EndedAt(Instant, SourceId),
}

impl<'a> Gathering<'a> {
    /// To fetch what is `wanted` into `cache`; `begin` is where among it to begin.
    pub fn new(wanted: &'a [Wanted], cache: &'a Cache, trees: &'a Trees, tally: &'a Tally, begin: u64) -> Self {
        let n = wanted.len();
        let state = State {
            pool: Pool::new(wanted.iter().map(|tensor| tensor.n_bytes), begin),
            trees: vec![None; n],
            partials: vec![None; n],
            places: vec![None; n],
            here: 0,
            from_nodes: 0,
            links: HashMap::new(),
            last_link: 0,
            banned: Vec::new(),
            why: "no node was reached".to_owned(),
            is_over: false,
            failed: None,
        };
        Self { wanted, cache, trees, tally, state: Mutex::new(state), changed: Condvar::new(), begun: Instant::now() }
    }

    /// Fetches all; each tensor's place, in the order of what is wanted. `progress` hears how many bytes are here;
    /// false gives up.
    ///
    /// # Errors
    /// If something cannot be had with the right bytes.
    pub fn run(self, suppliers: &dyn Suppliers, progress: &mut dyn FnMut(u64) -> bool) -> Result<Vec<Place>, Failed> {
        self.take_up().map_err(Failed::Disk)?;
        std::thread::scope(|scope| {
            self.watch_over(scope, suppliers, progress);
            self.end();
        });
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        match state.failed {
            Some(failed) => Err(failed),
            None => Ok(state.places.into_iter().flatten().collect()),
        }
    }

    /// Finds what is here from before of tensors whose trees need not be asked for.
    fn take_up(&self) -> io::Result<()> {
        for (at, tensor) in self.wanted.iter().enumerate() {
            let tree = Tree::of_one(tensor.hash, tensor.n_bytes).map(Arc::new);
            if let Some(tree) = tree.or_else(|| self.trees.get(&tensor.hash)) {
                self.tree_is_known(at, tree)?;
            }
        }
        Ok(())
    }

    /// Starts sources and looks after them until nothing is missing, or it cannot be had.
    fn watch_over<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        suppliers: &'scope dyn Suppliers,
        progress: &mut dyn FnMut(u64) -> bool,
    ) {
        let threads: Arc<Mutex<HashMap<Supplier, Thread>>> = Arc::default();
        let mut has_hub = false;
        loop {
            let mut whom: Vec<Option<Peer>> = vec![None];
            whom.extend(suppliers.peers().into_iter().map(Some));
            for peer in whom {
                self.start(scope, &threads, suppliers, peer);
            }
            if !has_hub && let Some(hub) = suppliers.hub() {
                has_hub = true;
                self.start_hub(scope, hub, suppliers);
            }
            let here = self.lock().here;
            if !progress(here) {
                self.fail(Failed::Cancelled);
            }
            let mut state = self.lock();
            if state.failed.is_some() {
                return;
            }
            if state.places.iter().all(Option::is_some) {
                let here = state.here;
                drop(state);
                progress(here);
                return;
            }
            if let Some(tensor) = state.pool.hopeless() {
                let is_wrong = state.banned.iter().any(|(_, of)| *of == tensor);
                let why = std::mem::take(&mut state.why);
                let failed = if is_wrong { Failed::WrongBytes(tensor) } else { Failed::BrokeOff(tensor, why) };
                state.failed = Some(failed);
                return;
            }
            self.rest(state);
        }
    }

    fn start_hub<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, hub: Hub, suppliers: &'scope dyn Suppliers) {
        let Some(reader) = suppliers.reader(&hub) else { return };
        let ask = move || ask_hub(self, &hub, &reader);
        if let Err(error) = Builder::new().name("weights".into()).spawn_scoped(scope, ask) {
            tracing::warn!(%error, "no thread to ask the hub");
        }
    }

    /// Begins to ask a node, unless that is done already or was in vain a moment ago.
    fn start<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        threads: &Arc<Mutex<HashMap<Supplier, Thread>>>,
        suppliers: &'scope dyn Suppliers,
        peer: Option<Peer>,
    ) {
        let supplier = peer.as_ref().map(|peer| peer.node);
        let before = {
            let mut known = lock(threads);
            let n_running = known.values().filter(|thread| matches!(thread, Thread::Runs)).count();
            let before = match known.get(&supplier) {
                Some(Thread::Runs) => return,
                Some(Thread::EndedAt(at, _)) if at.elapsed() < LEAVE_ALONE => return,
                Some(Thread::EndedAt(_, source)) => Some(*source),
                None => None,
            };
            if n_running >= MAX_ASKED_NODES {
                return;
            }
            known.insert(supplier, Thread::Runs);
            before
        };
        let is_first = before.is_none();
        let source = before.unwrap_or_else(|| self.lock().pool.join(true));
        if !is_first {
            self.lock().pool.lose(source, true);
        }
        let ended = Arc::clone(threads);
        let ask = move || {
            self.ask(source, suppliers, peer.as_ref(), is_first);
            lock(&ended).insert(supplier, Thread::EndedAt(Instant::now(), source));
            self.changed.notify_all();
        };
        if let Err(error) = Builder::new().name("weights".into()).spawn_scoped(scope, ask) {
            lock(threads).insert(supplier, Thread::EndedAt(Instant::now(), source));
            self.lose(source, true, format!("the system gives no thread: {error}"));
        }
    }

    /// Asks a node until nothing is missing, or it cannot be reached several times. With `is_hoped` others wait for
    /// that before they give up.
    fn ask(&self, source: SourceId, suppliers: &dyn Suppliers, peer: Option<&Peer>, is_hoped: bool) {
        let origin = if peer.is_some() { Origin::Worker } else { Origin::Coordinator };
        let mut n_in_vain = 0;
        while !self.is_over() {
            let before = self.lock().from_nodes;
            let mut is_busy = false;
            let end = match suppliers.dial(peer, &|| !self.is_over()) {
                Ok(link) => self.talk(source, origin, link),
                Err(no_link) => {
                    // The coordinator has room once others have loaded. A worker is not waited for.
                    is_busy = no_link.is_busy && peer.is_none();
                    End::Broke(no_link.why)
                }
            };
            let why = match end {
                End::Over => return,
                End::Disk(error) => return self.fail(Failed::Disk(error)),
                End::Wrong(tensor) => {
                    let name = &self.wanted[tensor].name;
                    tracing::warn!(tensor = name, "wrong bytes came; they were thrown away, and their source is left");
                    return self.lose(source, true, format!("wrong bytes came for {name}"));
                }
                End::Broke(why) => why,
            };
            n_in_vain = if is_busy || self.lock().from_nodes > before { 0 } else { n_in_vain + 1 };
            let is_gone = n_in_vain >= ATTEMPTS;
            self.lose(source, is_gone || !is_hoped, why);
            if is_gone {
                return;
            }
            self.pause(PAUSE * (1 << n_in_vain));
        }
    }

    /// Notes a link so that it is closed at the end, and talks over it.
    fn talk(&self, source: SourceId, origin: Origin, link: Arc<dyn Link>) -> End {
        let peer = link.peer();
        let number = {
            let mut state = self.lock();
            if state.is_over || state.banned.iter().any(|(node, _)| *node == peer) {
                link.close();
                let why = state.why.clone();
                return if state.is_over { End::Over } else { End::Broke(why) };
            }
            state.last_link += 1;
            let number = state.last_link;
            state.links.insert(number, Arc::clone(&link));
            number
        };
        link.set_frame_limit(MAX_WEIGHTS_FRAME);
        let end = Talk::new(self, source, origin, &*link).run();
        link.close();
        let mut state = self.lock();
        state.links.remove(&number);
        if let End::Wrong(tensor) = end {
            state.banned.push((peer, tensor));
        }
        if state.is_over { End::Over } else { end }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(super) fn is_over(&self) -> bool {
        self.lock().is_over
    }

    /// Waits a moment, or for news.
    pub(super) fn rest(&self, state: MutexGuard<'_, State>) {
        drop(self.changed.wait_timeout(state, LOOK_EVERY));
    }

    /// Sleeps for so long, or until all is over.
    pub(super) fn pause(&self, time: Duration) {
        let state = self.lock();
        let is_over = |state: &mut State| !state.is_over;
        drop(self.changed.wait_timeout_while(state, time, is_over));
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    pub(super) fn lose(&self, source: SourceId, is_gone: bool, why: String) {
        let mut state = self.lock();
        if !state.is_over {
            tracing::debug!(why, "weights do not come from a source at the moment");
            state.why = why;
        }
        state.pool.lose(source, is_gone);
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn fail(&self, failed: Failed) {
        self.lock().failed.get_or_insert(failed);
        self.changed.notify_all();
    }

    /// Ends all threads.
    fn end(&self) {
        let mut state = self.lock();
        state.is_over = true;
        let links = std::mem::take(&mut state.links);
        drop(state);
        self.changed.notify_all();
        links.values().for_each(|link| link.close());
    }

    fn partial(&self, tensor: usize) -> io::Result<Arc<Partial>> {
        let known = self.lock().partials[tensor].clone();
        if let Some(partial) = known {
            return Ok(partial);
        }
        let wanted = &self.wanted[tensor];
        let partial = Arc::new(self.cache.begin(&wanted.hash, wanted.n_bytes)?);
        Ok(Arc::clone(self.lock().partials[tensor].get_or_insert(partial)))
    }

    /// The blocks of a tensor that are on disk from before.
    fn blocks_here(&self, tensor: usize, tree: &Tree) -> io::Result<Vec<usize>> {
        let n_bytes = self.wanted[tensor].n_bytes;
        let partial = self.partial(tensor)?;
        let mut bytes = vec![0; n_bytes.min(BLOCK_BYTES) as usize];
        let mut here = Vec::new();
        for block in 0..tree.blocks().len() {
            let (offset, n) = block_range(n_bytes, block);
            if !partial.read(offset, &mut bytes[..n])? {
                break;
            }
            if tree.holds(block, &bytes[..n]) {
                here.push(block);
            }
        }
        Ok(here)
    }

    /// The tree of a tensor is known: what is here from before need not be fetched.
    pub(super) fn tree_is_known(&self, tensor: usize, tree: Arc<Tree>) -> io::Result<()> {
        if self.lock().trees[tensor].is_some() {
            return Ok(());
        }
        let here = self.blocks_here(tensor, &tree)?;
        let n_bytes = self.wanted[tensor].n_bytes;
        let n_here: u64 = here.iter().map(|block| block_range(n_bytes, *block).1 as u64).sum();
        let is_whole = {
            let mut state = self.lock();
            // Two sources may have been asked for it.
            if state.trees[tensor].is_some() {
                return Ok(());
            }
            state.here += n_here;
            state.trees[tensor] = Some(tree);
            state.pool.tree_known(tensor, &here)
        };
        self.tally.add(Origin::Cache, n_here);
        self.changed.notify_all();
        if is_whole { self.finish(tensor) } else { Ok(()) }
    }

    /// Takes a block in. False if it is not the right one.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn take_in(&self, origin: Origin, tensor: usize, block: usize, bytes: &[u8]) -> io::Result<bool> {
        let wanted = &self.wanted[tensor];
        let tree = self.lock().trees[tensor].clone();
        if !tree.is_some_and(|tree| tree.holds(block, bytes)) {
            return Ok(false);
        }
        self.partial(tensor)?.write(block_range(wanted.n_bytes, block).0, bytes)?;
        let arrived = {
            let mut state = self.lock();
            let arrived = state.pool.arrived(tensor, block);
            if arrived != Arrived::Again {
                state.here += bytes.len() as u64;
                self.tally.add(origin, bytes.len() as u64);
            }
            if origin != Origin::Hub {
                state.from_nodes += bytes.len() as u64;
            }
            arrived
        };
        if arrived == Arrived::Last {
            self.finish(tensor)?;
        }
        Ok(true)
    }

    /// All blocks of a tensor are here.
    fn finish(&self, tensor: usize) -> io::Result<()> {
        let place = self.partial(tensor)?.finish()?;
        let mut state = self.lock();
        state.places[tensor] = Some(place);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }
}
