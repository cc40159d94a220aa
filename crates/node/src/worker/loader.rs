//! Gathering weights and loading a stage, on a thread of its own.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::ByteSize;
use brigade_gguf::{Catalog, ModelFile, StageView, TensorSource};
use brigade_net::{Identity, Link, Purpose};
use brigade_protocol::control::{Deploy, ToCoordinator};
use brigade_protocol::kind;

use super::WorkerStatus;
use super::owner::LoadFailure;
use crate::cache::Cache;
use crate::images::Images;
use crate::known::KnownCoordinator;
use crate::loaded::{LoadedStage, StageKey, chain, load_stage};
use crate::threads::lock;
use crate::weights::{Gather, WeightsError};

/// Progress is told no more often than this.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Gathers weights and loads a stage, on a thread of its own.
pub(super) struct Loader {
    pub(super) deploy: Arc<Deploy>,
    pub(super) key: StageKey,
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
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) control: Option<Arc<dyn Link>>,
    pub(super) status: Arc<Mutex<WorkerStatus>>,
}

impl Loader {
    /// Gathers, verifies, loads.
    pub(super) fn load(self) -> Result<LoadedStage, LoadFailure> {
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
        let images = Images::of_node(&self.state_dir, self.kv_spill);
        let loaded = load_stage(self.key.clone(), &view, source, self.threads, images, &mut go_on);
        loaded.map_err(|error| other(chain(&error)))
    }
}
