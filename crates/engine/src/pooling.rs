//! Stages that embed or rank texts: their last stage yields one vector for each text, not logits.
//!
//! - All rows of a slot in a run are one text, or the rest of one where the pooling looks at the last row alone. The
//!   rows of each slot are a call of their own, so no text has a bit from its neighbours in the batch.
//! - libllama pools, behind the graph's last node, and applies the classifier of a model that ranks. A GGUF without a
//!   real head will do: no logits are read.
//! - *Encoders* have no KV cache: a row sees those after it too. So a text is computed at once, from position 0, and
//!   its slot is empty again behind the run.
//!
//! The stage owns all of it; a caller gets copies.

use brigade_base::Pooling;
use llama_cpp_sys_2 as sys;

use crate::context::Context;
use crate::model::{LoadError, Model};
use crate::run::RunError;
use crate::stage::{Stage, StageOptions};

/// Most values of a classifier: it tells a few labels apart, and libllama reads them from rows as wide as a hidden
/// state where the model has no such layer.
const MAX_CLASSES: u32 = 1024;

/// libllama's number for a pooling.
pub(crate) fn type_of(pooling: Pooling) -> sys::llama_pooling_type {
    match pooling {
        Pooling::Mean => sys::LLAMA_POOLING_TYPE_MEAN,
        Pooling::Cls => sys::LLAMA_POOLING_TYPE_CLS,
        Pooling::Last => sys::LLAMA_POOLING_TYPE_LAST,
        Pooling::Rank => sys::LLAMA_POOLING_TYPE_RANK,
    }
}

/// Width of what the stage yields for a row or a text.
///
/// # Errors
/// If the model has no such output, or texts may be longer than it has positions for.
pub(crate) fn check(model: &Model, context: &Context, options: &StageOptions) -> Result<u32, LoadError> {
    let is_final = options.hooks.stop_node.is_none();
    if !context.has_memory {
        // What positions are learned for is looked up by their number, and beyond the last libllama ends the process.
        let (value, max) = (options.n_ctx.into(), model.n_ctx_train().into());
        if value > max {
            return Err(LoadError::Option { name: "n_ctx", value, min: 1, max });
        }
        if is_final && options.pooling.is_none() {
            return Err(LoadError::NoText);
        }
    }
    match options.pooling {
        Some(pooling) if !is_final => Err(LoadError::Pooling(pooling, "only the last stage pools")),
        Some(Pooling::Rank) => {
            let n_classes = model.n_cls_out();
            let is_sound = (1..=MAX_CLASSES.min(model.n_embd_out())).contains(&n_classes);
            let why = "the model's classifier has no classes, or too many";
            if is_sound { Ok(n_classes) } else { Err(LoadError::Pooling(Pooling::Rank, why)) }
        }
        Some(_) => Ok(model.n_embd_out()),
        None if is_final => Ok(model.n_vocab()),
        None => Ok(model.n_embd()),
    }
}

impl Stage {
    /// Copies the pooled vector of `slot` from the last decode to `out`, which has its width.
    pub(crate) fn read_pooled(&mut self, slot: u32, out: &mut [f32]) -> Result<(), RunError> {
        // SAFETY: the context exists; a number that was not in the last batch gives null.
        let values = unsafe { sys::llama_get_embeddings_seq(self.context.as_ptr(), slot as i32) };
        if values.is_null() {
            return Err(RunError::Decode { code: 0, message: format!("nothing was pooled for slot {slot}") });
        }
        // SAFETY: libllama keeps as many values for each sequence as `check` took for the width, until the next decode.
        out.copy_from_slice(unsafe { std::slice::from_raw_parts(values, out.len()) });
        Ok(())
    }
}
