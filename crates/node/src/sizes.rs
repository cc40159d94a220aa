//! What stages of a model take in memory, and what they are loaded with for it.
//!
//! Weights and KV cache follow from the header. The buffers of graphs do not: they depend on each architecture's graph.
//! So the graphs of the smallest stages are built once, without weights and without memory
//! ([`brigade_engine::rehearse`]), and the planner is told what they would take.

use std::collections::HashMap;
use std::sync::Arc;

use brigade_base::{KvTypes, LayerRange, Pooling};
use brigade_engine::{LoadError, StageOptions, rehearse};
use brigade_gguf::{Architecture, Catalog, HeaderError, StageView, StageViewError, SyntheticTensors};
use brigade_plan::{Demand, Rehearsed, RehearsedRun};

use crate::trial::{self, TrialError};

/// Numbers of pieces, of which the buffers are found out: from four on, more pieces of the same kinds take no more.
const RUNS: [usize; 4] = [4, 3, 2, 1];

/// Most graphs that are built. A model of one kind of layers has eight, one with a pattern of six layers some twenty;
/// at 50 ms each in a process of its own, nobody waits longer than two seconds.
const MAX_REHEARSALS: usize = 40;

/// For how much a stage is loaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StageShape {
    /// Tokens of one session.
    pub n_ctx: u32,
    /// Sessions at once.
    pub n_sessions: u32,
    /// Most rows of one batch.
    pub max_rows: u32,
    /// How keys and values are stored.
    pub kv: KvTypes,
    /// Whether the last stage pools texts.
    pub pooling: Option<Pooling>,
}

/// The options of a stage of that view.
pub(crate) fn stage_options(view: &StageView, shape: StageShape, n_threads: u32) -> StageOptions {
    StageOptions {
        n_ctx: shape.n_ctx,
        n_sessions: shape.n_sessions,
        max_rows: shape.max_rows,
        max_outputs: shape.n_sessions,
        n_threads,
        n_embd: view.n_embd(),
        n_vocab: if view.is_final() { view.n_vocab() } else { 0 },
        hooks: view.hooks(),
        pooling: shape.pooling.filter(|_| view.is_final()),
        kv: shape.kv,
    }
}

/// The view of `layers` as a deployment with this pooling has it.
pub(crate) fn view_of(
    catalog: &Catalog,
    layers: LayerRange,
    pooling: Option<Pooling>,
) -> Result<StageView, StageViewError> {
    match pooling {
        Some(_) => StageView::pooled(catalog, layers),
        None => StageView::new(catalog, layers),
    }
}

/// The buffers of a model's graphs could not be found out; the planner estimates them then.
#[derive(Debug, thiserror::Error)]
pub enum SizesError {
    /// The header is none without its vocabulary.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The model cannot be cut.
    #[error(transparent)]
    View(#[from] StageViewError),
    /// llama.cpp refused a stage.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// llama.cpp cannot run a stage.
    #[error(transparent)]
    Trial(#[from] TrialError),
}

/// What the buffers of a model's graphs take for `demand` on this machine, with keys and values stored so, and where
/// the last stage pools texts. Some milliseconds for each kind of layers.
///
/// # Errors
/// If llama.cpp does not take the model, which loading it would tell as well.
pub fn rehearse_model(
    catalog: &Catalog,
    demand: &Demand,
    kv: KvTypes,
    pooling: Option<Pooling>,
) -> Result<Rehearsed, SizesError> {
    // Each view looks at the whole header: without the vocabulary there is not much of it.
    let catalog = Catalog::parse_header(&catalog.header_bytes(true))?;
    let source = Arc::new(SyntheticTensors::new(&catalog));
    let architecture = Architecture::of(&catalog).map_err(StageViewError::from)?;
    let (n_layers, cuts) = (architecture.n_layers, architecture.cut_points());
    let (context, parallel, max_rows) = (demand.context, demand.parallel, demand.max_rows);
    let shape = StageShape { n_ctx: context, n_sessions: parallel, max_rows, kv, pooling };
    let tail_bytes = architecture.head_bytes().saturating_add(architecture.unread_embedding_bytes());
    let mut rehearsed = Rehearsed { context, parallel, max_rows, runs: Vec::new(), tail_bytes };
    let bounds: Vec<u32> = [0].into_iter().chain(cuts).chain([n_layers]).collect();
    // Runs are alike whose views have the same header and end alike: of a model that embeds texts, the last stage has
    // the header of any other.
    let mut known: HashMap<(Vec<u8>, bool), (u64, u64)> = HashMap::new();
    for (start, end) in runs_of(&bounds) {
        let Ok(layers) = LayerRange::new(start, end) else { continue };
        let view = view_of(&catalog, layers, pooling)?;
        let key = (view.header_bytes().to_vec(), view.is_final());
        let (compute, weights) = match known.get(&key) {
            Some(bytes) => *bytes,
            None if known.len() >= MAX_REHEARSALS => continue,
            None => {
                let options = stage_options(&view, shape, 1);
                let memory = match trial::memory(&view, &options)? {
                    Some(memory) => memory,
                    None => rehearse(Box::new(view.reader(source.clone())), view.n_bytes(), &options)?,
                };
                known.insert(key, (memory.compute, memory.weights));
                (memory.compute, memory.weights)
            }
        };
        let of_layers = layers.iter().map(|layer| architecture.layer_bytes(layer)).fold(0, u64::saturating_add);
        rehearsed.runs.push(RehearsedRun { layers, compute, beside_layers: weights.saturating_sub(of_layers) });
    }
    Ok(rehearsed)
}

/// Runs of pieces of a model that is cut at `bounds`, the longest first, and the last ones first.
fn runs_of(bounds: &[u32]) -> impl Iterator<Item = (u32, u32)> {
    let of = |n: usize| bounds.windows(n + 1).rev().map(move |run| (run[0], run[n]));
    let longest = RUNS[0].min(bounds.len().saturating_sub(1));
    let shorter = RUNS[1..].iter().copied().filter(move |n| *n < longest);
    [longest].into_iter().filter(|n| *n > 0).chain(shorter).flat_map(of)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use brigade_base::KvType;
    use brigade_engine::Stage;
    use brigade_gguf::{ModelFile, TensorSource};
    use brigade_plan::stage_memory;

    use super::*;
    use crate::model_profile;
    use crate::purpose::{PoolingChoice, Work};

    /// Each stage of a model in some cuts, as predicted and as loaded, to one part in a hundred.
    fn check(file: &Arc<ModelFile>, demand: &Demand, kv: KvTypes, pooling: Option<Pooling>) {
        let choice = pooling.map_or(PoolingChoice::None, PoolingChoice::As);
        let work = Work::of(file.catalog(), choice).unwrap();
        let mut profile = work.profile(model_profile(file.catalog(), kv).unwrap());
        profile.rehearsed = Some(rehearse_model(file.catalog(), demand, kv, pooling).unwrap());
        let middle = profile.cut_points[profile.cut_points.len() / 2];
        let n_layers = profile.n_layers();
        for (start, end) in [(0, middle), (middle, n_layers), (0, n_layers)] {
            let layers = LayerRange::new(start, end).unwrap();
            let view = view_of(file.catalog(), layers, pooling).unwrap();
            let shape = StageShape {
                n_ctx: demand.context,
                n_sessions: demand.parallel,
                max_rows: demand.max_rows,
                kv,
                pooling,
            };
            let options = stage_options(&view, shape, 1);
            let source = Arc::clone(file) as Arc<dyn TensorSource>;
            let reader = Box::new(view.reader(source));
            let found = Stage::load(reader, view.n_bytes(), options, &mut |_| true).unwrap().memory().total() as f64;
            let predicted = stage_memory(&profile, demand, layers, end == n_layers).stage().0 as f64;
            let error = (predicted - found) / found;
            assert!(error.abs() <= 0.01, "{layers} {demand:?} {kv}: {predicted} instead of {found}, {error:+.3}");
        }
    }

    #[test]
    fn what_a_stage_takes_is_known_before_it_is_loaded() {
        for name in ["abacus-f16.gguf", "abacus-q8_0.gguf"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").join(name);
            let file = Arc::new(ModelFile::open(path).unwrap());
            for kv in [KvTypes::default(), KvTypes::both(KvType::Q8_0), KvTypes::both(KvType::Q4_0)] {
                for (context, parallel, max_rows) in [(200, 1, 64), (1024, 4, 260), (8192, 2, 258)] {
                    check(&file, &Demand { context, parallel, max_rows, ..Demand::default() }, kv, None);
                }
            }
        }
    }

    #[test]
    fn a_stage_that_pools_has_no_head() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-f16.gguf");
        let file = Arc::new(ModelFile::open(path).unwrap());
        for pooling in [Pooling::Mean, Pooling::Last] {
            let demand = Demand { context: 512, parallel: 3, max_rows: 515, ..Demand::default() };
            check(&file, &demand, KvTypes::default(), Some(pooling));
        }
    }

    #[test]
    fn an_estimate_will_do_where_nothing_was_rehearsed() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-f16.gguf");
        let file = ModelFile::open(path).unwrap();
        for kv in [KvTypes::default(), KvTypes::both(KvType::Q8_0)] {
            for (context, parallel, max_rows) in [(512, 1, 64), (1024, 4, 260), (8192, 16, 272)] {
                let demand = Demand { context, parallel, max_rows, ..Demand::default() };
                let mut profile = model_profile(file.catalog(), kv).unwrap();
                let layers = LayerRange::new(0, 8).unwrap();
                let estimated = stage_memory(&profile, &demand, layers, true).compute.0 as f64;
                profile.rehearsed = Some(rehearse_model(file.catalog(), &demand, kv, None).unwrap());
                let rehearsed = stage_memory(&profile, &demand, layers, true).compute.0 as f64;
                let error = estimated / rehearsed - 1.0;
                assert!(error.abs() < 0.05, "{demand:?} {kv}: {estimated} instead of {rehearsed}, {error:+.3}");
            }
        }
    }
}
