//! Gathering weights and loading a stage, on a thread of its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use brigade_base::ByteSize;
use brigade_gguf::{Catalog, ModelFile, StageView, TensorSource};
use brigade_net::{Identity, Link, Purpose};
use brigade_protocol::worker::Load;

use super::owner::{Event, LoadFailure};
use crate::cache::Cache;
use crate::images::Images;
use crate::known::KnownCoordinator;
use crate::loaded::{LoadedStage, chain, load_stage};
use crate::weights::{Gather, WeightsError};

/// Progress is told no more often than this.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Gathers weights and loads a stage, on a thread of its own.
pub(super) struct Loader {
    pub(super) load: Load,
    pub(super) own: Option<Arc<ModelFile>>,
    /// The node was given a copy whose header is another one.
    pub(super) differs: bool,
    pub(super) cache: Arc<Cache>,
    pub(super) identity: Arc<Identity>,
    pub(super) known: KnownCoordinator,
    pub(super) threads: u32,
    /// Where idle sessions are kept, and how many bytes of them.
    pub(super) state_dir: PathBuf,
    pub(super) kv_spill: ByteSize,
    /// Bytes of them that all stages of this node have there.
    pub(super) spilled: Arc<AtomicU64>,
    pub(super) cancel: Arc<AtomicBool>,
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
            if last.elapsed() >= PROGRESS_EVERY || done == total {
                last = Instant::now();
                let _ = self.events.send(Event::Progress(*id, done, total));
            }
            !self.cancel.load(Ordering::Relaxed)
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
        let mut go_on = |_share: f32| !self.cancel.load(Ordering::Relaxed);
        let images = Images::of_node(&self.state_dir, self.kv_spill).sharing(self.spilled);
        let loaded = load_stage(key.clone(), &view, source, self.threads, images, &mut go_on);
        loaded.map_err(|error| other(chain(&error)))
    }
}
