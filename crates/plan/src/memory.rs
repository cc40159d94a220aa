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
    /// Buffers of the graph: activations of one batch, and logits.
    pub compute: ByteSize,
    /// The process itself, whatever it holds.
    pub process: ByteSize,
}

impl StageMemory {
    /// All of it.
    pub fn total(&self) -> ByteSize {
        ByteSize(self.stage().0.saturating_add(self.process.0))
    }

    /// The stage alone: what it reports once it is loaded.
    pub fn stage(&self) -> ByteSize {
        ByteSize(self.weights.0.saturating_add(self.kv.0).saturating_add(self.compute.0))
    }

    /// What does not depend on the number of its layers.
    pub(crate) fn fixed(&self) -> u64 {
        self.compute.0.saturating_add(self.process.0)
    }
}

/// What stages of a model take for one demand beside the weights of their layers and the KV cache, found out by
/// building their graphs: architecture, types of weights, and the devices of the node that did it are counted as they
/// are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rehearsed {
    /// Tokens of one session.
    pub context: u32,
    /// Sessions at once.
    pub parallel: u32,
    /// Most rows of one batch.
    pub max_rows: u32,
    /// Short runs of layers.
    pub runs: Vec<RehearsedRun>,
    /// What the header says that head and embedding take in the last stage. libllama holds an embedding that is the
    /// head, too, twice if it computes with heads in buffers of another kind, which depends on the processor. A profile
    /// that says more than the header has adapters.
    pub tail_bytes: u64,
}

/// What a run of layers takes as a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RehearsedRun {
    /// The layers.
    pub layers: LayerRange,
    /// Bytes of the buffers of its graphs, and of its logits.
    pub compute: u64,
    /// Bytes of tensors that belong to no layer.
    pub beside_layers: u64,
}

impl Rehearsed {
    fn fits(&self, demand: &Demand) -> bool {
        (self.context, self.parallel, self.max_rows) == (demand.context, demand.parallel, demand.max_rows)
    }

    /// Bytes of the buffers of a stage of a model with `n_layers`, whose logits take `logits`: its own if it was
    /// rehearsed, else those of the smallest run around it, or of the largest inside of it, since layers are computed
    /// one after the other. `None` if there is neither.
    fn compute(&self, layers: LayerRange, n_layers: u32, logits: u64) -> Option<u64> {
        let is_tail = |run: LayerRange| run.end() == n_layers;
        let contains = |a: LayerRange, b: LayerRange| a.start() <= b.start() && b.end() <= a.end();
        if let Some(own) = self.runs.iter().find(|run| run.layers == layers) {
            return Some(own.compute);
        }
        let same = self.runs.iter().filter(|run| is_tail(run.layers) == is_tail(layers));
        let around = same.filter(|run| contains(run.layers, layers)).map(|run| run.compute).min();
        let inside = self.runs.iter().filter(|run| contains(layers, run.layers));
        let with_logits = |run: &RehearsedRun| {
            let missing = if is_tail(layers) && !is_tail(run.layers) { logits } else { 0 };
            run.compute.saturating_add(missing)
        };
        around.or_else(|| inside.map(with_logits).max())
    }

    /// Bytes of tensors that belong to no layer, in a stage of `layers` with or without the head.
    fn beside_layers(&self, layers: LayerRange, is_tail: bool, n_layers: u32) -> Option<u64> {
        let same = || self.runs.iter().filter(|run| (run.layers.end() == n_layers) == is_tail);
        let own = same().find(|run| run.layers == layers).map(|run| run.beside_layers);
        own.or_else(|| same().map(|run| run.beside_layers).max())
    }
}

/// What `layers` take; `is_tail` adds what only the coordinator holds.
pub fn stage_memory(model: &ModelProfile, demand: &Demand, layers: LayerRange, is_tail: bool) -> StageMemory {
    let of = |bytes: &[u64]| own(bytes, layers).iter().fold(0u64, |sum, &b| sum.saturating_add(b));
    let state = of(&model.state_bytes).saturating_mul(demand.parallel.into());
    let floor = if is_tail { COMPUTE_FLOOR + COORDINATOR_FLOOR } else { COMPUTE_FLOOR };
    let kv_per_token = model.kv_bytes_per_token_of(layers, scores(model, demand).is_some());
    let kv = kv_per_token.saturating_mul(padded_context(demand)).saturating_mul(demand.parallel.into());
    let rehearsed = model.rehearsed.as_ref().filter(|it| it.fits(demand));
    let told = if is_tail { tail_bytes(model) } else { 0 };
    let found = rehearsed.and_then(|it| Some((it.beside_layers(layers, is_tail, model.n_layers())?, it.tail_bytes)));
    let beside = found.map_or(told, |(found, in_header)| found.saturating_add(told.saturating_sub(in_header)));
    StageMemory {
        weights: ByteSize(layer_bytes(model, layers).saturating_add(beside)),
        kv: ByteSize(kv.saturating_add(state)),
        compute: ByteSize(compute_bytes(model, demand, layers, is_tail)),
        process: ByteSize(floor),
    }
}

/// Bytes of the weights of layers.
pub(crate) fn layer_bytes(model: &ModelProfile, layers: LayerRange) -> u64 {
    own(&model.layer_bytes, layers).iter().fold(0, |sum, &bytes| sum.saturating_add(bytes))
}

pub(crate) fn own(bytes: &[u64], layers: LayerRange) -> &[u64] {
    bytes.get(layers.start() as usize..layers.end() as usize).unwrap_or_default()
}

fn padded_context(demand: &Demand) -> u64 {
    u64::from(demand.context.next_multiple_of(KV_PADDING))
}

/// Bytes of the buffers of a stage's graph, and of its logits.
fn compute_bytes(model: &ModelProfile, demand: &Demand, layers: LayerRange, is_tail: bool) -> u64 {
    // Logits exist only where tokens are chosen, for one row of each session.
    let logits = if is_tail { 4 * u64::from(model.n_vocab) * u64::from(demand.parallel.max(1)) } else { 0 };
    let rehearsed = model.rehearsed.as_ref().filter(|it| it.fits(demand));
    let found = rehearsed.and_then(|rehearsed| rehearsed.compute(layers, model.n_layers(), logits));
    found.unwrap_or_else(|| graph_bytes(model, demand).saturating_add(logits))
}

/// Bytes of the attention scores of a batch, where they are held: it is computed plainly then.
fn scores(model: &ModelProfile, demand: &Demand) -> Option<u64> {
    let [heads, context, rows] = [model.n_heads, demand.context, demand.max_rows].map(u64::from);
    let of = |context: u64| (4 * heads).saturating_mul(context).saturating_mul(rows);
    (of(context) <= MAX_SCORES_BYTES && !model.is_flash).then(|| of(padded_context(demand)))
}

/// Bytes of the buffers of any number of layers, by what libllama's graphs of plain decoders hold at once, in F32:
/// layers come one after the other, and so do attention and feed-forward part. Compared with rehearsals of a llama of
/// 1.2 billion weights and of a tiny one it is right to 3 %; other architectures hold up to some rows more.
fn graph_bytes(model: &ModelProfile, demand: &Demand) -> u64 {
    let [embd, ff, rows] = [model.n_embd, model.n_ff, demand.max_rows].map(u64::from);
    let context = padded_context(demand);
    // In elements of two bytes; fewer bytes of a smaller type make no difference that counts.
    let keys_and_values = model.kv_bytes_per_token.iter().copied().max().unwrap_or(0) / 2;
    // The mask is F32, and F16 for flash attention.
    let (scores, mask) = scores(model, demand).map_or((0, 2), |scores| (scores, 4));
    let attention = (4 * rows).saturating_mul(6 * embd + keys_and_values).saturating_add(scores);
    let experts = 2 * u64::from(model.n_experts_used) * embd;
    let feed_forward = (4 * rows).saturating_mul(5 * embd + 3 * ff + experts);
    attention.max(feed_forward).saturating_add((mask * rows).saturating_mul(context))
}

/// What the coordinator holds of the weights beside its layers.
fn tail_bytes(model: &ModelProfile) -> u64 {
    model.head_bytes.saturating_add(model.embedding_bytes)
}

/// What of a node's memory may be used.
pub(crate) fn usable(offered: ByteSize) -> ByteSize {
    ByteSize(offered.0 - offered.0 / HEADROOM_DIVISOR)
}

/// The least that a node must offer so that so much of it may be used.
pub(crate) fn offer_for(needed: ByteSize) -> ByteSize {
    ByteSize(needed.0.saturating_add(needed.0.saturating_sub(1) / (HEADROOM_DIVISOR - 1)))
}

/// What a node that offers so much would have to offer beyond it so that `needed` may be used.
pub(crate) fn missing(needed: ByteSize, offered: ByteSize) -> ByteSize {
    ByteSize(offer_for(needed).0.saturating_sub(offered.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_missing_is_enough_and_no_byte_too_much(
            needed in prop_oneof![0u64..100, 0u64..1 << 50], offered in prop_oneof![0u64..100, 0u64..1 << 50],
        ) {
            let (needed, offered) = (ByteSize(needed), ByteSize(offered));
            let missing = missing(needed, offered).0;
            prop_assert!(usable(ByteSize(offered.0 + missing)) >= needed);
            prop_assert!(missing == 0 || usable(ByteSize(offered.0 + missing - 1)) < needed);
        }
    }

    #[test]
    fn what_was_rehearsed_counts_for_its_demand_alone() {
        let range = |start, end| LayerRange::new(start, end).unwrap();
        let runs = [(4, 8, 900), (3, 7, 510), (2, 6, 500), (0, 4, 500), (7, 8, 300), (6, 7, 120), (0, 1, 100)];
        let run = |(start, end, compute)| {
            let beside_layers = if end == 8 { 70 } else { 7 };
            RehearsedRun { layers: range(start, end), compute, beside_layers }
        };
        let runs = runs.map(run).to_vec();
        let rehearsed = Rehearsed { context: 512, parallel: 2, max_rows: 64, runs, tail_bytes: 90 };
        let model = ModelProfile {
            layer_bytes: vec![10; 8],
            kv_bytes_per_token: vec![1; 8],
            n_vocab: 100,
            head_bytes: 85,
            embedding_bytes: 5,
            rehearsed: Some(rehearsed),
            ..ModelProfile::default()
        };
        let demand = Demand { context: 512, parallel: 2, max_rows: 64, ..Demand::default() };
        let compute = |demand: &Demand, start, end| stage_memory(&model, demand, range(start, end), end == 8).compute.0;
        // As rehearsed; around it; inside of it; with the head, where logits of 800 bytes are added to the rest.
        for (start, end, bytes) in
            [(0, 1, 100), (0, 4, 500), (0, 2, 500), (6, 7, 120), (0, 7, 510), (7, 8, 300), (4, 8, 900), (0, 8, 1310)]
        {
            assert_eq!(compute(&demand, start, end), bytes, "{start}..{end}");
        }
        let weights = |start, end| stage_memory(&model, &demand, range(start, end), end == 8).weights.0;
        assert_eq!([weights(0, 3), weights(0, 8)], [37, 150]);
        let adapted = ModelProfile { head_bytes: 95, ..model.clone() };
        assert_eq!(stage_memory(&adapted, &demand, range(0, 8), true).weights.0, 160);
        let other = Demand { max_rows: 65, ..demand.clone() };
        assert_eq!(stage_memory(&model, &other, range(0, 8), true).weights.0, 80 + 90);
        assert_eq!(compute(&other, 0, 1), 2 * 65 * 512 * 2);
    }

    #[test]
    fn values_are_as_wide_as_in_the_widest_layer_of_the_stage() {
        let model = ModelProfile {
            layer_bytes: vec![0; 4],
            kv_bytes_per_token: vec![4, 8, 0, 12],
            value_bytes_per_token: vec![2, 4, 0, 6],
            n_heads: 1,
            ..ModelProfile::default()
        };
        let check = |model: &ModelProfile, context, expected: [u64; 3]| {
            let demand = Demand { context, parallel: 1, max_rows: 1024, ..Demand::default() };
            let kv = |(start, end)| stage_memory(model, &demand, LayerRange::new(start, end).unwrap(), false).kv.0;
            assert_eq!([(0, 2), (0, 4), (2, 3)].map(kv), expected.map(|bytes| bytes * u64::from(context)), "{context}");
        };
        // The third layer has no heads for values, and room for them.
        check(&model, 1024, [2 + 4 + 4 + 4, 2 + 4 + 6 + 4 * 6, 0]);
        // Where it keeps a state instead, it has none.
        let hybrid = ModelProfile { state_bytes: vec![0, 0, 1, 0], ..model.clone() };
        assert_eq!(hybrid.kv_bytes_per_token_of(LayerRange::new(0, 4).unwrap(), true), 2 + 4 + 6 + 3 * 6);
        let all_alike = ModelProfile { value_bytes_per_token: Vec::new(), ..model.clone() };
        check(&all_alike, 1024, [12, 24, 0]);
        // Flash attention stores each layer as it is.
        check(&ModelProfile { is_flash: true, ..model.clone() }, 1024, [12, 24, 0]);
        check(&model, 1 << 20, [12, 24, 0]);
    }
}
