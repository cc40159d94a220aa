//! Gathering weights and loading a stage, on a thread of its own.
//!
//! The owner loop has the other end of each [`Leash`]: with it it ends a load, or the link over which weights come, so
//! that the coordinator of that moment is dialled for the rest.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, Hash, NodeId};
use brigade_gguf::{AdapterView, Catalog, ModelFile, StageView, TensorSource};
use brigade_net::{GreetError, Identity, Link, Purpose, Refusal, TcpLink};
use brigade_protocol::control::Peer;
use brigade_protocol::weights::{Hub, Sources};
use brigade_protocol::worker::Load;

use super::owner::{Event, LoadFailure};
use crate::adapters::StageAdapter;
use crate::cache::Cache;
use crate::images::Images;
use crate::known::KnownCoordinator;
use crate::loaded::{LoadedStage, StageFiles, chain, load_stage, options_of};
use crate::reach::{ReachError, reach, while_wanted};
use crate::share::{DirectFetch, HubReader, NoLink, Suppliers, Tally, Trees, read_from_hub};
use crate::threads::lock;
use crate::trial;
use crate::weights::{Gather, WeightsError};

/// Progress is told no more often than this.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// How long a coordinator is dialled for weights before that counts as a failure: a lost one is replaced or back by
/// then, since that takes a few seconds.
const DIAL_PATIENCE: Duration = Duration::from_secs(10);

/// Pause before it is dialled again.
const REDIAL: Duration = Duration::from_millis(250);

/// What the owner loop holds a loader by.
#[derive(Default)]
pub(super) struct Leash {
    is_cancelled: AtomicBool,
    /// Over which weights come from the coordinator.
    link: Mutex<Option<Arc<dyn Link>>>,
}

impl Leash {
    /// The loader gives up with the next piece. Its link is left alone: a cut one would be mended first.
    pub(super) fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }

    /// What weights are missing come over another link.
    pub(super) fn cut(&self) {
        if let Some(link) = lock(&self.link).take() {
            link.close();
        }
    }

    fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }
}

/// What a stage needs of the deployment's adapters.
struct Adapter {
    bundle: Catalog,
    view: AdapterView,
    /// Index and hash of each tensor.
    tensors: Vec<(u32, Hash)>,
}

/// Gathers weights and loads a stage, on a thread of its own.
pub(super) struct Loader {
    pub(super) load: Load,
    pub(super) own: Option<Arc<ModelFile>>,
    /// The node was given a copy whose header is another one.
    pub(super) differs: bool,
    pub(super) cache: Arc<Cache>,
    pub(super) trees: Arc<Trees>,
    pub(super) tally: Arc<Tally>,
    /// Who else may have weights, as the coordinator says.
    pub(super) sources: Arc<Mutex<Sources>>,
    pub(super) direct_fetch: DirectFetch,
    pub(super) identity: Arc<Identity>,
    /// Who has the weights; another one where the council says so.
    pub(super) known: Arc<Mutex<KnownCoordinator>>,
    pub(super) threads: u32,
    /// Share of the time in which the stage computes.
    pub(super) throttle: f32,
    /// Memory that the other stages leave.
    pub(super) room: ByteSize,
    /// Where idle sessions are kept, and how many bytes of them.
    pub(super) state_dir: PathBuf,
    pub(super) kv_spill: ByteSize,
    /// Bytes of them that all stages of this node have there.
    pub(super) spilled: Arc<AtomicU64>,
    pub(super) leash: Arc<Leash>,
    pub(super) events: Sender<Event>,
}

impl Loader {
    /// Gathers, verifies, loads.
    pub(super) fn load(self) -> Result<LoadedStage, LoadFailure> {
        let other = |text: String| LoadFailure::Other(text);
        let Load { id, key, model, tensors } = &self.load;
        if self.differs {
            return Err(LoadFailure::OtherModel(format!(
                "this node's copy is not the model {} that is served: their headers differ. Use the same file, or leave \
                 --model away to fetch the weights",
                model.name
            )));
        }
        let catalog = Catalog::parse_header(&model.header).map_err(|e| other(e.to_string()))?;
        let view = StageView::new(&catalog, key.layers).map_err(|e| other(e.to_string()))?;
        if view.tensors().len() != tensors.len()
            || view.tensors().iter().zip(tensors).any(|(&idx, (named, _))| idx != *named as usize)
        {
            return Err(other("the assignment does not name the tensors of its layers".to_owned()));
        }
        let adapter = self.adapter(&catalog, &view).map_err(other)?;
        self.check_room(&view, adapter.as_ref()).map_err(other)?;
        let mut last = Instant::now();
        let mut progress = |done, total| {
            if last.elapsed() >= PROGRESS_EVERY || done == total {
                last = Instant::now();
                let _ = self.events.send(Event::Progress(*id, done, total));
            }
            !self.leash.is_cancelled()
        };
        let kept = adapter.iter().flat_map(|adapter| &adapter.tensors).map(|(_, hash)| *hash).collect::<Vec<_>>();
        let gather = Gather {
            model_name: &model.name,
            catalog: &catalog,
            tensors,
            keep: &kept,
            own: self.own.as_ref(),
            cache: &self.cache,
            trees: &self.trees,
            tally: &self.tally,
            suppliers: &self,
            begin: begin_of(self.identity.node_id()),
            progress: &mut progress,
        };
        let weights = gather.run().map_err(|error| match error {
            WeightsError::OwnCopyDiffers { .. } => LoadFailure::OtherModel(error.to_string()),
            error => other(error.to_string()),
        })?;
        let source: Arc<dyn TensorSource> = Arc::new(weights);
        let adapter = adapter.map(|adapter| self.gather_adapter(adapter)).transpose().map_err(other)?;
        self.leash.cut();
        let mut go_on = |_share: f32| !self.leash.is_cancelled();
        let images = Images::of_node(&self.state_dir, self.kv_spill).sharing(self.spilled);
        let files = StageFiles { view: &view, source, adapter };
        let loaded = load_stage(key.clone(), files, None, self.threads, images, &mut go_on);
        let mut loaded = loaded.map_err(|error| other(chain(&error)))?;
        loaded.runner.set_throttle(self.throttle);
        Ok(loaded)
    }

    /// What the stage needs of the deployment's adapters.
    fn adapter(&self, catalog: &Catalog, view: &StageView) -> Result<Option<Adapter>, String> {
        let Some(adapters) = &self.load.model.adapters else { return Ok(None) };
        let bundle = Catalog::parse_header(&adapters.header).map_err(|error| error.to_string())?;
        let cut = AdapterView::new(&bundle, catalog, view);
        let Some(view) = cut.map_err(|error| format!("the adapters cannot be used: {error}"))? else { return Ok(None) };
        let hash = |&idx: &usize| adapters.tensors.get(idx).map(|hash| (idx as u32, *hash));
        let tensors = view.tensors().iter().map(hash).collect::<Option<Vec<_>>>();
        let tensors = tensors.ok_or("the assignment does not name the tensors of its adapters")?;
        Ok(Some(Adapter { bundle, view, tensors }))
    }

    /// Gathers and verifies the tensors of an adapter.
    fn gather_adapter(&self, adapter: Adapter) -> Result<StageAdapter, String> {
        let gather = Gather {
            model_name: &self.load.model.name,
            catalog: &adapter.bundle,
            tensors: &adapter.tensors,
            keep: &self.load.key.tensors,
            own: None,
            cache: &self.cache,
            trees: &self.trees,
            tally: &self.tally,
            suppliers: self,
            begin: begin_of(self.identity.node_id()),
            progress: &mut |_, _| !self.leash.is_cancelled(),
        };
        let weights = gather.run().map_err(|error| error.to_string())?;
        Ok(StageAdapter { view: adapter.view, source: Arc::new(weights) })
    }

    /// Whether libllama can run the stage and there is memory for it, before anything is fetched.
    fn check_room(&self, view: &StageView, adapter: Option<&Adapter>) -> Result<(), String> {
        let options = options_of(&self.load.key, view, None, self.threads);
        let adapted = adapter.map(|adapter| &adapter.view);
        let needed = trial::stage(view, adapted, &options).map_err(|error| error.to_string())?;
        let adapted = adapted.map_or(0, AdapterView::weight_bytes);
        let needed = needed.map_or(ByteSize(0), |memory| ByteSize(memory.total().saturating_add(adapted)));
        if needed <= self.room {
            return Ok(());
        }
        let (layers, room) = (view.layers(), self.room);
        Err(format!(
            "the layers {layers} take {needed}, but this node has {room} left of what it gives; give it more \
                     with --memory, or a shorter --context or fewer --parallel sessions to the coordinator"
        ))
    }

    /// A link to the coordinator of this moment, for weights.
    fn dial_coordinator(&self, is_wanted: &dyn Fn() -> bool) -> Result<Arc<dyn Link>, NoLink> {
        let until = Instant::now() + DIAL_PATIENCE;
        loop {
            if self.leash.is_cancelled() || !is_wanted() {
                return Err("the stage is not wanted any more".into());
            }
            let known = lock(&self.known).clone();
            let (identity, to) = (Arc::clone(&self.identity), known.clone());
            let dial = move || to.dial(&identity, Purpose::Weights, None);
            let discard = |result: Result<_, ReachError>| drop(result.map(|link: Arc<TcpLink>| link.close()));
            match while_wanted(dial, || self.wants(known.node) && is_wanted(), discard) {
                Some(Ok(link)) => {
                    *lock(&self.leash.link) = Some(Arc::clone(&link) as Arc<dyn Link>);
                    // Who was told of another one before the link was there has not cut it.
                    if self.wants(known.node) {
                        return Ok(link);
                    }
                    self.leash.cut();
                }
                Some(Err(error)) if error.is_final() || Instant::now() >= until => return Err(no_link(&error)),
                Some(Err(_)) => std::thread::sleep(REDIAL),
                None if Instant::now() >= until => return Err("the coordinator is not reached".into()),
                None => {}
            }
        }
    }

    /// Whether weights of this coordinator are wanted, still.
    fn wants(&self, coordinator: NodeId) -> bool {
        lock(&self.known).node == coordinator && !self.leash.is_cancelled()
    }
}

impl Suppliers for Loader {
    fn peers(&self) -> Vec<Peer> {
        let (own, coordinator) = (self.identity.node_id(), lock(&self.known).node);
        let others = |peer: &&Peer| peer.node != own && peer.node != coordinator;
        lock(&self.sources).peers.iter().filter(others).cloned().collect()
    }

    fn dial(&self, peer: Option<&Peer>, is_wanted: &dyn Fn() -> bool) -> Result<Arc<dyn Link>, NoLink> {
        let Some(peer) = peer else { return self.dial_coordinator(is_wanted) };
        let (identity, to) = (Arc::clone(&self.identity), peer.clone());
        let dial = move || reach(&identity, to.node, &to.addresses, Purpose::Weights, None);
        let dialled = while_wanted(dial, is_wanted, |result| drop(result.map(|link| link.close())));
        let link = dialled.ok_or("the weights are not wanted any more")?.map_err(|error| no_link(&error))?;
        Ok(link)
    }

    fn hub(&self) -> Option<Hub> {
        lock(&self.sources).hub.clone().filter(|_| self.direct_fetch != DirectFetch::Off)
    }

    fn reader(&self, hub: &Hub) -> Option<Arc<dyn HubReader>> {
        read_from_hub(hub)
    }
}

fn no_link(error: &ReachError) -> NoLink {
    let is_busy = matches!(error, ReachError::Greet(GreetError::Refused(Refusal::Busy)));
    NoLink { why: error.to_string(), is_busy }
}

/// Where a node begins among the tensors that it misses: elsewhere than others.
fn begin_of(node: NodeId) -> u64 {
    u64::from_le_bytes(*node.as_bytes().first_chunk().unwrap_or(&[0; 8]))
}
