//! What a stage costs in memory.

use brigade_base::{ByteSize, LayerRange};
use serde::Serialize;

use crate::{Demand, ModelProfile};

/// One part in so many of a node's memory is kept free: allocator slack, page tables, and the libraries' own needs
/// grow with what is loaded, measured below 3 %, so one sixteenth leaves as much again.
pub const HEADROOM_DIVISOR: u64 = 16;

/// What a node's process needs before it holds a single weight: code, TLS, thread stacks and libllama's own tables.
/// Measured between 20 and 35 MiB.
pub const COMPUTE_FLOOR: u64 = 30 << 20;

/// What the coordinator's process needs beyond that: HTTP, sessions, samplers, and a vocabulary of some ten thousand
/// tokens. Measured between 15 and 30 MiB.
const COORDINATOR_FLOOR: u64 = 20 << 20;

/// Attention scores of a batch are held up to this size; beyond it the engine uses flash attention, which holds none.
const MAX_SCORES_BYTES: u64 = 512 << 20;

/// libllama rounds each session's KV cache up to so many tokens.
pub(crate) const KV_PADDING: u32 = 256;

/// Bytes that a stage takes on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct StageMemory {
    /// Its layers, and on the coordinator the head and the embedding.
    pub weights: ByteSize,
    /// KV cache of all sessions at full context, and recurrent states.
    pub kv: ByteSize,
    /// Activations of one batch, and the process itself.
    pub compute: ByteSize,
}

impl StageMemory {
    /// All of it.
    pub fn total(&self) -> ByteSize {
        ByteSize(self.weights.0.saturating_add(self.kv.0).saturating_add(self.compute.0))
    }
}

/// What `layers` take; `is_tail` adds what only the coordinator holds.
pub(crate) fn stage_memory(model: &ModelProfile, demand: &Demand, layers: LayerRange, is_tail: bool) -> StageMemory {
    let of = |bytes: &[u64]| {
        let own = bytes.get(layers.start() as usize..layers.end() as usize).unwrap_or_default();
        own.iter().fold(0u64, |sum, &b| sum.saturating_add(b))
    };
    let state = of(&model.state_bytes).saturating_mul(demand.parallel.into());
    let tokens = u64::from(demand.context.next_multiple_of(KV_PADDING)) * u64::from(demand.parallel);
    // Activations of a layer live one after the other: the hidden state and its residual, the widest product, and
    // the scores of attention; all in F32. Logits exist only where tokens are chosen, for one row of each session.
    let row = 4 * (6 * u64::from(model.n_embd) + 3 * u64::from(model.n_ff));
    let scores = 4 * u64::from(model.n_heads) * u64::from(demand.context) * u64::from(demand.max_rows);
    let scores = if scores <= MAX_SCORES_BYTES { scores } else { 0 };
    let logits = if is_tail { 4 * u64::from(model.n_vocab) * u64::from(demand.parallel.max(1)) } else { 0 };
    let floor = if is_tail { COMPUTE_FLOOR + COORDINATOR_FLOOR } else { COMPUTE_FLOOR };
    StageMemory {
        weights: ByteSize(of(&model.layer_bytes).saturating_add(if is_tail { tail_bytes(model) } else { 0 })),
        kv: ByteSize(of(&model.kv_bytes_per_token).saturating_mul(tokens).saturating_add(state)),
        compute: ByteSize(floor + row.saturating_mul(u64::from(demand.max_rows)) + scores + logits),
    }
}

/// What the coordinator holds of the weights beside its layers.
fn tail_bytes(model: &ModelProfile) -> u64 {
    model.head_bytes.saturating_add(model.embedding_bytes)
}

/// What of a node's memory may be used.
pub(crate) fn usable(offered: ByteSize) -> ByteSize {
    ByteSize(offered.0 - offered.0 / HEADROOM_DIVISOR)
}
