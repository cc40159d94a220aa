//! What a session keeps in each layer: keys and values per token, or a state of one size.
//!
//! The sizes are those of llama.cpp's `llama_hparams::{n_embd_k_gqa, n_embd_v_gqa, n_embd_r, n_embd_s}` and of what
//! `llama_model::create_memory` makes of them.

use brigade_base::{KvType, KvTypes};

use crate::architecture::{ArchitectureError, Heads, Keys, SlidingWindow};
use crate::rules::{Recurrent, Rules};

/// Bytes of an element of a recurrent state (F32).
const STATE_ELEMENT_BYTES: u64 = 4;

/// Largest size of anything here, far from where products end.
const MAX_SIZE: u64 = 1 << 24;

/// Elements of keys and values that a token has in each layer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kv {
    layers: Vec<(u64, u64)>,
    /// Lengths of one head's key and value that occur.
    lengths: Vec<(u64, u64)>,
}

impl Kv {
    pub(crate) fn of(
        keys: &Keys<'_>,
        rules: &Rules,
        heads: &Heads,
        window: Option<&SlidingWindow>,
        state: &RecurrentState,
        indexes: &[bool],
    ) -> Result<Self, ArchitectureError> {
        // Compressed attention keeps no values: they are a part of the keys.
        let is_latent = keys.optional("attention.key_length_mla", 0, 0, MAX_SIZE)? > 0;
        let key_swa = keys.optional("attention.key_length_swa", heads.key_length.into(), 0, MAX_SIZE)?;
        let value_swa = keys.optional("attention.value_length_swa", heads.value_length.into(), 0, MAX_SIZE)?;
        // One key for each token, by which a layer chooses what to attend to; two architectures reserve as much for a
        // value.
        let index = u64::from(keys.optional("attention.indexer.key_length", 0, 0, MAX_SIZE)?);
        let index = if matches!(rules.name, "minimax-m3" | "qwen4exp") { 2 * index } else { index };
        // Layers of gemma3n from here on, and the last ones of gemma4, read what others keep.
        let n_shared = keys.optional("attention.shared_kv_layers", 0, 0, MAX_SIZE)?;
        let n_own = match rules.name {
            "gemma3n" => 20,
            _ => (indexes.len() as u32).saturating_sub(n_shared),
        };
        let n_loops = u64::from(keys.optional("num_loops", 1, 1, MAX_SIZE)?);
        let layer = |layer: u32| {
            let has_kv = match rules.recurrent {
                Recurrent::None | Recurrent::Beside => !rules.is_encoder,
                Recurrent::All => false,
                Recurrent::NoKvHeads | Recurrent::NoKvHeadsNoFeedForward | Recurrent::Interval(_) => {
                    !state.is_in(layer)
                }
            };
            let has_kv = has_kv && layer < n_own;
            let slides = window.is_some_and(|window| window.slides[layer as usize]);
            let (k, v) = if slides { (key_swa, value_swa) } else { (heads.key_length, heads.value_length) };
            let n_heads = if has_kv { u64::from(heads.n_head_kv[layer as usize]) } else { 0 };
            let index = if rules.has_index() && has_kv && indexes[layer as usize] { index } else { 0 };
            let n_heads = n_heads * n_loops;
            (n_heads * u64::from(k) + index, if is_latent { 0 } else { n_heads * u64::from(v) })
        };
        let layers: Vec<(u64, u64)> = (0..indexes.len() as u32).map(layer).collect();
        let value = |length: u64| if is_latent { 0 } else { length };
        let mut lengths = vec![(heads.key_length.into(), value(heads.value_length.into()))];
        if rules.is_encoder {
            lengths.clear();
        }
        if window.is_some() && !rules.is_encoder {
            lengths.push((key_swa.into(), value(value_swa.into())));
        }
        Ok(Self { layers, lengths })
    }

    /// Bytes of a token's key and value.
    pub(crate) fn bytes_per_token(&self, layer: u32, types: KvTypes) -> (u64, u64) {
        let (k, v) = self.layers.get(layer as usize).copied().unwrap_or_default();
        (types.k.bytes(k), types.v.bytes(v))
    }

    pub(crate) fn is_in(&self, layer: u32) -> bool {
        self.layers.get(layer as usize).is_some_and(|(k, v)| k + v > 0)
    }

    /// The length of a head's key or value that is no whole number of blocks, with the type.
    pub(crate) fn misfit(&self, types: KvTypes) -> Option<(u64, KvType)> {
        self.lengths.iter().find_map(|(k, v)| {
            let misfits = |n: &u64, ty: KvType| !n.is_multiple_of(ty.block_elements());
            if misfits(k, types.k) { Some((*k, types.k)) } else { misfits(v, types.v).then_some((*v, types.v)) }
        })
    }
}

/// Layers that keep a state, and how large it is.
#[derive(Debug, Clone, Default)]
pub(crate) struct RecurrentState {
    layers: Vec<bool>,
    n_elements: u64,
}

impl RecurrentState {
    pub(crate) fn of(
        keys: &Keys<'_>,
        layers: Vec<bool>,
        n_embd: u32,
        heads: &Heads,
    ) -> Result<Self, ArchitectureError> {
        if !layers.contains(&true) {
            return Ok(Self { layers, n_elements: 0 });
        }
        let key = |name: &str, default: u64| keys.optional(name, default, 0, MAX_SIZE).map(u64::from);
        let n_embd = u64::from(n_embd);
        let n_head = u64::from(heads.n_head.first().copied().unwrap_or(0));
        let (wkv, short, kda) = (key("wkv.head_size", 0)?, key("shortconv.l_cache", 0)?, key("kda.head_dim", 0)?);
        let (kernel, inner) = (key("ssm.conv_kernel", 0)?, key("ssm.inner_size", 0)?);
        // The first kind of state space layers knows no groups, whatever the metadata says.
        let has_groups = !matches!(keys.prefix, "mamba" | "jamba" | "plamo2");
        let groups = if has_groups { key("ssm.group_count", 0)? } else { 0 };
        let size = key("ssm.state_size", 0)?;
        let shift = key("token_shift_count", 2)?;
        let times = |factors: &[u64]| factors.iter().fold(1u64, |product, factor| product.saturating_mul(*factor));
        let rows = kernel.saturating_sub(1);
        let n_elements = if wkv > 0 {
            times(&[shift, n_embd]).saturating_add(times(&[n_embd, wkv]))
        } else if short > 0 {
            times(&[n_embd, short - 1])
        } else if kda > 0 {
            let rows = if kernel > 0 { rows } else { 3 };
            times(&[3, rows, n_head, kda]).saturating_add(times(&[kda, kda, n_head]))
        } else if inner > 0 {
            let width = inner.saturating_add(times(&[2, groups, size]));
            times(&[rows, width]).saturating_add(times(&[size, inner]))
        } else {
            times(&[heads.key_length.into(), heads.key_length.into(), n_head])
        };
        Ok(Self { layers, n_elements })
    }

    pub(crate) fn is_in(&self, layer: u32) -> bool {
        self.layers.get(layer as usize).copied().unwrap_or(false)
    }

    pub(crate) fn is_any(&self) -> bool {
        self.layers.contains(&true)
    }

    pub(crate) fn bytes(&self, layer: u32) -> u64 {
        if self.is_in(layer) { self.n_elements.saturating_mul(STATE_ELEMENT_BYTES) } else { 0 }
    }
}
