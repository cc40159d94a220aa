//! A stage in memory, and what it was loaded for, so that the next placement can take it over unchanged.

use std::sync::Arc;

use brigade_base::{ByteSize, Pooling};
use brigade_engine::{LoadError, Stage, StageOptions};
use brigade_gguf::{StageView, TensorSource};
pub use brigade_protocol::worker::StageKey;

use crate::adapters::StageAdapter;
use crate::images::Images;
use crate::sizes::{StageShape, stage_options};
use crate::stage_pass::PassRunner;
use crate::trial::{self, TrialError};

/// A stage in memory.
pub struct LoadedStage {
    /// What it was loaded for.
    pub key: StageKey,
    /// The stage.
    pub runner: PassRunner,
    /// Weights, KV cache and compute buffers.
    pub memory: ByteSize,
}

impl LoadedStage {
    /// Checks that a stage that pools makes vectors of as many values as callers are told.
    ///
    /// # Errors
    /// If it does not: no vector of it would be taken.
    pub fn check_values(&self, told: Option<u32>) -> Result<(), String> {
        let made = self.runner.stage().n_out();
        match told {
            Some(told) if told != made => {
                Err(format!("it makes {made} values of a text, where the model's header says {told}; report this"))
            }
            _ => Ok(()),
        }
    }
}

/// A stage was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// It was tried elsewhere, and cannot be.
    #[error(transparent)]
    Trial(#[from] TrialError),
    /// It was not loaded here.
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// The options with which a stage is loaded.
pub fn options_of(key: &StageKey, view: &StageView, pooling: Option<Pooling>, n_threads: u32) -> StageOptions {
    let shape =
        StageShape { n_ctx: key.context, n_sessions: key.sessions, max_rows: key.max_rows, kv: key.kv, pooling };
    stage_options(view, shape, n_threads)
}

/// Checks that each token of a session of `context` tokens has a position that the model knows.
///
/// # Errors
/// If the model has learned fewer.
pub fn check_positions(view: &StageView, context: u32) -> Result<(), LoadError> {
    match view.max_positions() {
        Some(max) if context > max => {
            Err(LoadError::Option { name: "n_ctx", value: context.into(), min: 1, max: max.into() })
        }
        _ => Ok(()),
    }
}

/// What a stage is read from.
pub struct StageFiles<'a> {
    /// The stage as a GGUF.
    pub view: &'a StageView,
    /// The tensors of its model.
    pub source: Arc<dyn TensorSource>,
    /// What is added to its matrices.
    pub adapter: Option<StageAdapter>,
}

/// Loads a stage from wherever its tensors are, once it was tried; the last one may pool. `images` keeps its idle
/// sessions. `progress` hears the share that is loaded; false gives up.
///
/// # Errors
/// If libllama cannot run it or its bytes cannot be read.
pub fn load_stage(
    key: StageKey,
    files: StageFiles<'_>,
    pooling: Option<Pooling>,
    n_threads: u32,
    images: Images,
    progress: &mut dyn FnMut(f32) -> bool,
) -> Result<LoadedStage, StageError> {
    let StageFiles { view, source, adapter } = files;
    let options = options_of(&key, view, pooling, n_threads);
    check_positions(view, key.context)?;
    trial::stage(view, adapter.as_ref().map(|adapter| &adapter.view), &options)?;
    let adapter = adapter.map(StageAdapter::into_source);
    let stage = Stage::load_adapted(Box::new(view.reader(source)), view.n_bytes(), adapter, options, progress)?;
    let memory = ByteSize(stage.memory().total());
    let mut runner = PassRunner::new(stage, view.input_scale(), key.sessions, images);
    runner.set_takes_tokens(view.takes_tokens());
    Ok(LoadedStage { runner, key, memory })
}

/// An error with all that it was caused by, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
