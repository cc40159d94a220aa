//! How keys and values of the KV cache are stored: llama.cpp's types for it, and what a model must be like.
//!
//! Types of blocks store a head's key or value as whole blocks. llama.cpp turns such keys and values by a Hadamard
//! matrix first, which spreads outliers, and reads them back row by row: a row attends with the same bits in any batch.

use brigade_base::{KvType, KvTypes};
use llama_cpp_sys_2 as sys;

use crate::model::{LoadError, Model};

/// llama.cpp's name for it.
pub(crate) fn ggml_type(ty: KvType) -> sys::ggml_type {
    match ty {
        KvType::F16 => sys::GGML_TYPE_F16,
        KvType::Q8_0 => sys::GGML_TYPE_Q8_0,
        KvType::Q4_0 => sys::GGML_TYPE_Q4_0,
    }
}

/// Refuses types whose blocks would reach over the end of a head: ggml ends the process over a row like that.
pub(crate) fn check_types(model: &Model, types: KvTypes) -> Result<(), LoadError> {
    let width = model.n_embd().checked_div(model.n_heads());
    for (side, ty, keys) in [
        ("keys", types.k, ["attention.key_length", "attention.key_length_swa"]),
        ("values", types.v, ["attention.value_length", "attention.value_length_swa"]),
    ] {
        let told = keys.map(|key| model.number(key));
        let lengths = [told[0].or(width), told[1]];
        let misfits = |length: &u32| !u64::from(*length).is_multiple_of(ty.block_elements());
        if let Some(length) = lengths.into_iter().flatten().find(misfits) {
            return Err(LoadError::KvType { ty, side, length });
        }
    }
    Ok(())
}
