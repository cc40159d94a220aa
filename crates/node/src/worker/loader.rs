//! Gathering weights and loading a stage, on a thread of its own.
//!
//! The owner loop has the other end of each [`Leash`]: with it it ends a load, or the link over which weights come, so
//! that the coordinator of that moment is dialled for the rest.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, NodeId};
use brigade_gguf::{Catalog, ModelFile, StageView, TensorSource};
use brigade_net::{Identity, Link, Purpose, TcpLink};
use brigade_protocol::worker::Load;

use super::owner::{Event, LoadFailure};
use crate::cache::Cache;
use crate::images::Images;
use crate::known::KnownCoordinator;
use crate::loaded::{LoadedStage, chain, load_stage};
use crate::reach::{ReachError, while_wanted};
use crate::threads::lock;
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
    /// Over which weights come.
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

/// Gathers weights and loads a stage, on a thread of its own.
pub(super) struct Loader {
    pub(super) load: Load,
    pub(super) own: Option<Arc<ModelFile>>,
    /// The node was given a copy whose header is another one.
    pub(super) differs: bool,
    pub(super) cache: Arc<Cache>,
    pub(super) identity: Arc<Identity>,
    /// Who has the weights; another one where the council says so.
    pub(super) known: Arc<Mutex<KnownCoordinator>>,
    pub(super) threads: u32,
    /// Share of the time in which the stage computes.
    pub(super) throttle: f32,
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
        let dial = || self.dial();
        let mut last = Instant::now();
        let mut progress = |done, total| {
            if last.elapsed() >= PROGRESS_EVERY || done == total {
                last = Instant::now();
                let _ = self.events.send(Event::Progress(*id, done, total));
            }
            !self.leash.is_cancelled()
        };
        let gather = Gather {
            model_name: &model.name,
            catalog: &catalog,
            tensors,
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
        self.leash.cut();
        let mut go_on = |_share: f32| !self.leash.is_cancelled();
        let images = Images::of_node(&self.state_dir, self.kv_spill).sharing(self.spilled);
        let loaded = load_stage(key.clone(), &view, source, self.threads, images, &mut go_on);
        let mut loaded = loaded.map_err(|error| other(chain(&error)))?;
        loaded.runner.set_throttle(self.throttle);
        Ok(loaded)
    }

    /// A link to the coordinator of this moment, for weights.
    fn dial(&self) -> Result<Arc<dyn Link>, String> {
        let until = Instant::now() + DIAL_PATIENCE;
        loop {
            if self.leash.is_cancelled() {
                return Err("the stage is not wanted any more".to_owned());
            }
            let known = lock(&self.known).clone();
            let (identity, to) = (Arc::clone(&self.identity), known.clone());
            let dial = move || to.dial(&identity, Purpose::Weights, None);
            let discard = |result: Result<_, ReachError>| drop(result.map(|link: Arc<TcpLink>| link.close()));
            match while_wanted(dial, || self.wants(known.node), discard) {
                Some(Ok(link)) => {
                    link.set_frame_limit(brigade_protocol::weights::CHUNK_BYTES);
                    *lock(&self.leash.link) = Some(Arc::clone(&link) as Arc<dyn Link>);
                    // Who was told of another one before the link was there has not cut it.
                    if self.wants(known.node) {
                        return Ok(link);
                    }
                    self.leash.cut();
                }
                Some(Err(error)) if error.is_final() || Instant::now() >= until => return Err(error.to_string()),
                Some(Err(_)) => std::thread::sleep(REDIAL),
                None if Instant::now() >= until => return Err("the coordinator is not reached".to_owned()),
                None => {}
            }
        }
    }

    /// Whether weights of this coordinator are wanted, still.
    fn wants(&self, coordinator: NodeId) -> bool {
        lock(&self.known).node == coordinator && !self.leash.is_cancelled()
    }
}
