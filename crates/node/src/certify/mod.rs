//! Whether a model gives the same results cut into stages as whole.
//!
//! ```text
//! catalog -> Architecture, cut points -> Cuts -> plans (plans.rs)
//! seed -----------------------------> script of passes (script.rs)
//! file  --- Stage::load_file ---> wanted results, by llama.cpp's own reader
//! whole --- StageView::whole ---> compared (compare.rs), and so is each plan, stage after stage
//! ```
//!
//! Tokens come from a seed and are the same in every run, whatever a run yields, so no tokenizer is needed, and one
//! stage can do all its passes before the next one is loaded: never more than one stage is in memory. [`certify`] owns
//! all of it for the time of its call.

mod compare;
mod plans;
mod run;
mod script;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use brigade_base::{KvTypes, LayerRange, Pooling};
use brigade_engine::StageMemory;
use brigade_gguf::{Architecture, ModelFile, StageViewError};
use brigade_plan::{Demand, ModelProfile, stage_memory};

pub use compare::{Comparison, MAX_ERROR};
pub use plans::Cuts;

use crate::adapters::{AdapterFile, Bundle};
use crate::model::{ModelError, model_profile};
use crate::purpose::{PoolingChoice, PurposeError, Work};
use crate::sizes::{StageShape, rehearse_model};
use run::{Runner, Stages};
use script::Script;

/// Fewest tokens of a session: the parts of a script have two rows at least.
pub const MIN_TOKENS: u32 = 16;

/// Most tokens of a session. Beyond that a run takes long and shows nothing new.
pub const MAX_TOKENS: u32 = 4096;

/// How a model is examined.
#[derive(Debug, Clone, PartialEq)]
pub struct CertifyOptions {
    /// Which cuts are tried.
    pub cuts: Cuts,
    /// Tokens of each of the two sessions, [`MIN_TOKENS`] to [`MAX_TOKENS`]; fewer where the model was trained for
    /// fewer.
    pub n_tokens: u32,
    /// Threads that compute.
    pub n_threads: u32,
    /// Chooses the tokens.
    pub seed: u64,
    /// How keys and values are stored.
    pub kv: KvTypes,
    /// LoRA adapters that it is examined with.
    pub adapters: Vec<AdapterFile>,
}

impl Default for CertifyOptions {
    fn default() -> Self {
        let (cuts, kv) = (Cuts::Most(3), KvTypes::default());
        Self { cuts, n_tokens: 48, n_threads: 1, seed: 1, kv, adapters: Vec::new() }
    }
}

/// A model could not be examined.
#[derive(Debug, thiserror::Error)]
pub enum CertifyError {
    /// Brigade refuses it.
    #[error("this model is refused: {0}")]
    Refused(String),
    /// Its keys and values cannot be stored as was asked for.
    #[error(transparent)]
    KvTypes(ModelError),
    /// The adapters are none for this model.
    #[error(transparent)]
    Adapters(ModelError),
    /// llama.cpp does not run it whole.
    #[error("llama.cpp does not run this model whole: {0}")]
    Whole(String),
}

impl From<StageViewError> for CertifyError {
    fn from(error: StageViewError) -> Self {
        Self::Refused(error.to_string())
    }
}

impl From<PurposeError> for CertifyError {
    fn from(error: PurposeError) -> Self {
        Self::Refused(error.to_string())
    }
}

/// What an examination found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Every cut gave the bits of the whole.
    Exact,
    /// Every cut gave the same tokens, and results within [`MAX_ERROR`].
    Close,
    /// A cut failed or gave something else.
    Differs,
    /// The model cannot be cut; whole it is exact or close.
    WholeOnly,
}

/// How one way to run the model went.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It ran.
    Compared(Comparison),
    /// It did not.
    Failed(String),
}

impl Outcome {
    /// Whether its results will do.
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Compared(comparison) if comparison.is_close())
    }

    /// Whether it has every bit of the whole.
    pub fn is_exact(&self) -> bool {
        matches!(self, Self::Compared(comparison) if comparison.is_exact())
    }
}

/// A cut and how it went.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanOutcome {
    /// First layer of each stage but the first; empty for the whole model as one stage.
    pub cuts: Vec<u32>,
    /// How it went.
    pub outcome: Outcome,
}

/// What a stage takes in memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLine {
    /// Its layers.
    pub layers: LayerRange,
    /// What it was predicted to take.
    pub predicted: StageMemory,
    /// What it took.
    pub found: StageMemory,
}

impl MemoryLine {
    /// By which share of what it took the prediction is too high.
    pub fn error(&self) -> f64 {
        let found = self.found.total().max(1) as f64;
        (self.predicted.total() as f64 - found) / found
    }
}

/// All that an examination found.
#[derive(Debug, Clone)]
pub struct Report {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Layers of the model.
    pub n_layers: u32,
    /// Where it may be cut.
    pub cut_points: Vec<u32>,
    /// Why it cannot be cut, where that is known.
    pub why_whole: Option<&'static str>,
    /// How texts were pooled, if it embeds them.
    pub pooling: Option<Pooling>,
    /// The whole as one stage, then each cut.
    pub plans: Vec<PlanOutcome>,
    /// Each stage that was loaded, once.
    pub memory: Vec<MemoryLine>,
}

impl Report {
    /// The outcome in one word.
    pub fn verdict(&self) -> Verdict {
        let all = |good: fn(&Outcome) -> bool| self.plans.iter().all(|plan| good(&plan.outcome));
        match () {
            () if !all(Outcome::is_good) => Verdict::Differs,
            () if self.cut_points.is_empty() => Verdict::WholeOnly,
            () if all(Outcome::is_exact) => Verdict::Exact,
            () => Verdict::Close,
        }
    }

    /// Why the verdict is no better, where that is known.
    pub fn reason(&self) -> Option<&'static str> {
        match self.verdict() {
            Verdict::WholeOnly => self.why_whole,
            Verdict::Close => Some("some sums are rounded in another order"),
            Verdict::Exact | Verdict::Differs => None,
        }
    }

    /// The prediction that was farthest off, of stages that took at least `n_bytes`.
    pub fn worst_prediction(&self, n_bytes: u64) -> Option<MemoryLine> {
        let large = self.memory.iter().filter(|line| line.found.total() >= n_bytes);
        large.max_by(|a, b| a.error().abs().total_cmp(&b.error().abs())).copied()
    }
}

/// Runs the model of `file` whole and cut, and compares the results. With its `path`, the whole is what llama.cpp's own
/// reader loads from there; without it (for a file in parts), the whole as one stage. So it is with several adapters,
/// which llama.cpp by itself adds up in another order from start to start.
///
/// `progress` hears what is being done, and how far that is, 0 to 1.
///
/// # Errors
/// If the model is refused, or does not run whole.
pub fn certify(
    file: &Arc<ModelFile>,
    path: Option<&Path>,
    options: &CertifyOptions,
    progress: &mut dyn FnMut(&str, f32),
) -> Result<Report, CertifyError> {
    let catalog = file.catalog();
    let architecture = Architecture::of(catalog).map_err(|error| CertifyError::Refused(error.to_string()))?;
    let work = Work::of(catalog, PoolingChoice::Model)?;
    let pooling = work.pooling;
    let n_tokens = options.n_tokens.clamp(MIN_TOKENS, MAX_TOKENS).min(architecture.n_ctx_train);
    if n_tokens < script::MIN_TOKENS {
        return Err(CertifyError::Refused(format!(
            "it is for texts of {n_tokens} tokens, too few for any examination"
        )));
    }
    let script = match pooling {
        Some(_) => Script::of_texts(n_tokens, architecture.n_vocab, options.seed),
        None => Script::of_sessions(n_tokens, architecture.n_vocab, !architecture.is_recurrent(), options.seed),
    };
    let shape = StageShape { n_ctx: n_tokens, n_sessions: 2, max_rows: script.max_rows(), kv: options.kv, pooling };
    let adapters = match options.adapters.as_slice() {
        [] => None,
        all => Some(Bundle::open(catalog, all).map_err(CertifyError::Adapters)?),
    };
    let profile = profile(file, work, &shape, adapters.as_ref())?;
    let runner = Runner { file, script: &script, shape, n_threads: options.n_threads, adapters: adapters.as_ref() };

    progress("whole", 0.0);
    let oracle = match (path, options.adapters.as_slice()) {
        (None, _) | (Some(_), [_, _, ..]) => None,
        (Some(path), adapters) => Some(runner.uncut(path, adapters.first()).map_err(CertifyError::Whole)?),
    };
    let mut stages = Stages::default();
    let whole = runner.cut(&[], &mut stages);
    let wanted = match (oracle, &whole) {
        (Some(results), _) => results,
        (None, Ok(results)) => results.clone(),
        (None, Err(error)) => return Err(CertifyError::Whole(error.clone())),
    };
    if wanted.iter().flatten().any(|value| value.is_nan()) {
        let with = if adapters.is_some() { "with these adapters " } else { "" };
        return Err(CertifyError::Whole(format!("{with}it yields values that are no numbers")));
    }
    let outcome = |results: Result<run::Results, String>| match results {
        Ok(results) => Outcome::Compared(compare::compare(&script, &wanted, &results)),
        Err(error) => Outcome::Failed(error),
    };
    let mut outcomes = vec![PlanOutcome { cuts: Vec::new(), outcome: outcome(whole) }];
    let cut_points = architecture.cut_points();
    let chosen = plans::plans(&cut_points, options.cuts);
    for (idx, cuts) in chosen.iter().enumerate() {
        progress(&format!("cut before {}", listed(cuts)), idx as f32 / chosen.len() as f32);
        let results = runner.cut(cuts, &mut stages);
        outcomes.push(PlanOutcome { cuts: cuts.clone(), outcome: outcome(results) });
    }
    progress("", 1.0);
    Ok(Report {
        architecture: architecture.name,
        n_layers: architecture.n_layers,
        cut_points,
        why_whole: architecture.why_whole(),
        pooling,
        plans: outcomes,
        memory: stages.found.iter().map(|(layers, found)| line(&profile, &shape, *layers, *found)).collect(),
    })
}

fn profile(
    file: &ModelFile,
    work: Work,
    shape: &StageShape,
    adapters: Option<&Bundle>,
) -> Result<ModelProfile, CertifyError> {
    let refused = |error: ModelError| match error {
        ModelError::KvTypes { .. } => CertifyError::KvTypes(error),
        error => CertifyError::Refused(error.to_string()),
    };
    let mut profile = model_profile(file.catalog(), shape.kv).map_err(refused)?;
    if let Some(adapters) = adapters {
        adapters.add_to(&mut profile, file.catalog());
    }
    // After that, since what adapts the head goes with it.
    let profile = work.profile(profile);
    let rehearsed = rehearse_model(file.catalog(), &demand(shape), shape.kv, shape.pooling).ok();
    Ok(ModelProfile { rehearsed, ..profile })
}

fn demand(shape: &StageShape) -> Demand {
    let StageShape { n_ctx: context, n_sessions: parallel, max_rows, .. } = *shape;
    Demand { context, parallel, max_rows, ..Demand::default() }
}

fn line(profile: &ModelProfile, shape: &StageShape, layers: LayerRange, found: StageMemory) -> MemoryLine {
    let is_tail = layers.end() == profile.n_layers();
    let memory = stage_memory(profile, &demand(shape), layers, is_tail);
    let predicted = StageMemory { weights: memory.weights.0, kv: memory.kv.0, compute: memory.compute.0 };
    MemoryLine { layers, predicted, found }
}

/// Numbers with commas between them.
fn listed(numbers: &[u32]) -> String {
    numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}
