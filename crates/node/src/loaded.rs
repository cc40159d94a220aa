//! A stage in memory, and what it was loaded for, so that the next placement can take it over unchanged.

use std::sync::Arc;

use brigade_base::ByteSize;
use brigade_engine::{LoadError, Stage, StageOptions};
use brigade_gguf::{StageView, TensorSource};
pub use brigade_protocol::worker::StageKey;

use crate::images::Images;
use crate::stage_pass::PassRunner;

/// A stage in memory.
pub struct LoadedStage {
    /// What it was loaded for.
    pub key: StageKey,
    /// The stage.
    pub runner: PassRunner,
    /// Weights, KV cache and compute buffers.
    pub memory: ByteSize,
}

/// Loads a stage from wherever its tensors are; `images` keeps its idle sessions. `progress` hears the share that is
/// loaded; false gives up.
///
/// # Errors
/// If libllama refuses it or its bytes cannot be read.
pub fn load_stage(
    key: StageKey,
    view: &StageView,
    source: Arc<dyn TensorSource>,
    n_threads: u32,
    images: Images,
    progress: &mut dyn FnMut(f32) -> bool,
) -> Result<LoadedStage, LoadError> {
    let options = StageOptions {
        n_ctx: key.context,
        n_sessions: key.sessions,
        max_rows: key.max_rows,
        max_outputs: key.sessions,
        n_threads,
        n_embd: view.n_embd(),
        n_vocab: if view.is_final() { view.n_vocab() } else { 0 },
        input_node: view.input_node(),
        stop_node: view.stop_node(),
    };
    let stage = Stage::load(Box::new(view.reader(source)), view.n_bytes(), options, progress)?;
    let memory = ByteSize(stage.memory().total());
    let runner = PassRunner::new(stage, view.input_scale(), key.sessions, images);
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
