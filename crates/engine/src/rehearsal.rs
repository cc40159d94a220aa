//! What a stage would take in memory, found out without loading it.
//!
//! llama.cpp reads the header alone, builds the graphs of the largest passes, and adds up what their buffers would be.
//! It takes milliseconds, and no memory to speak of. The sums are those of a stage that is loaded with the same options
//! on the same devices.

use crate::context::Context;
use crate::model::{Content, LoadError, Model};
use crate::source::ReadSeek;
use crate::stage::{StageMemory, StageOptions};

/// What [`Stage::load`](crate::Stage::load) would take for the GGUF of `n_bytes` bytes that `reader` yields; only its
/// header is read.
///
/// # Errors
/// As [`Stage::load`](crate::Stage::load), but for what is wrong with tensors alone.
pub fn rehearse(
    reader: Box<dyn ReadSeek + Send>,
    n_bytes: u64,
    options: &StageOptions,
) -> Result<StageMemory, LoadError> {
    options.check()?;
    // Nothing is computed, so nobody need wait to compute.
    let options = StageOptions { n_threads: 1, ..options.clone() };
    let model = Model::from_reader(reader, n_bytes, Content::Sizes, &mut |_| true)?;
    model.check_kind()?;
    let (_context, captured) = Context::new(&model, &options, model.n_embd())?;
    let kv = captured.kv_bytes + captured.cell_bytes;
    Ok(StageMemory { weights: model.n_bytes(), kv, compute: captured.compute_bytes })
}
