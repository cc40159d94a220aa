//! A loaded stage: weights, context, KV cache, compute threads and the way to stop it.
//!
//! - [`Stage::load`] reads a GGUF of some layers; [`Stage::load_file`] a whole model, as the oracle to compare with.
//! - `run.rs` computes batches. A stage that is not the last stops its graph at one node and hands that node's value
//!   out. `batch.rs` decides which rows are computed together.
//! - `pooling.rs` is about stages that yield one vector for each text, and about encoders, which have no KV cache.
//! - `kv.rs` cuts, copies, saves and restores the KV cache of sessions.
//! - Each session slot has a KV stream of its own (`kv_unified = false`): which cells a session uses, and so every bit
//!   of its answer, does not depend on what other sessions do. The cache of sliding-window layers has full size
//!   (`swa_full`), so that [`Stage::truncate`] is exact there too.
//! - On the CPU attention is computed plainly where its scores fit into 512 MiB. llama.cpp's flash attention splits a
//!   lone row's keys among threads from 512 tokens on, so that its last bits, and with quantised weights up to 1 % of
//!   a logit, depend on the number of threads and on whether other sessions are in the same batch. Without it a
//!   decode row attends with the same bits in any batch on any number of threads, and decoding at 900 tokens is three
//!   times as fast; a long prefill takes half as long again.
//! - So a row that is alone in its slot has the same bits in any batch, and so has a row of a chunk of two or more in
//!   any cut of its text, as far as llama.cpp multiplies matrices alike for any number of rows. With AMX it does, and
//!   Q8_0 and Q4_0 do with AVX2 too. Elsewhere floats have another kernel for a call of one row (the routing to
//!   experts is F32 on all machines), and Q4_K with AVX2 has another one for blocks of four rows. `tests/batches.rs`
//!   tells.
//! - Keys and values may be stored in blocks (`kv_types.rs`). llama.cpp then computes attention row by row, whoever is
//!   in the batch, so all of this holds as well.
//! - `adapter.rs` joins LoRA adapters to a model.
//! - `rehearsal.rs` says what a stage would take in memory, without loading it.
//!
//! The stage owns everything; a [`Canceller`] shares only a flag, an [`Activity`] only a counter.

use std::path::Path;
use std::sync::Arc;

use brigade_base::{Hooks, KvTypes, LayerScale, Pooling};
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, AdapterSource};
use crate::batch::Scratch;
use crate::context::{Context, Signals};
use crate::model::{Content, LoadError, Model};
use crate::pooling;
use crate::source::ReadSeek;

/// Most session slots of a stage: `LLAMA_MAX_SEQ` of llama.cpp, which refuses more.
const MAX_SESSIONS: u32 = 256;

/// llama.cpp rounds the cells of a session up to this, and those that a row attends to as well.
pub(crate) const CELL_PADDING: u32 = 256;

/// Most rows of one pass. A pass is a unit of work of some milliseconds to a second; llama.cpp's own default is 2048.
const MAX_ROWS: u32 = 16384;

/// Most tokens of one session, more than any model was trained for; keeps positions far from the end of `i32`.
const MAX_CONTEXT: u32 = 1 << 24;

/// Most cells of all sessions; llama.cpp counts them in `u32`, and indexes rows of the cache in `i32`.
const MAX_CELLS: u64 = 1 << 30;

/// Most compute threads: `GGML_MAX_N_THREADS`, the size of ggml's thread masks.
const MAX_THREADS: u32 = 512;

/// How a stage is loaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageOptions {
    /// Most tokens of one session.
    pub n_ctx: u32,
    /// How many sessions have a slot; the KV cache of all is allocated at once.
    pub n_sessions: u32,
    /// Most rows of one [`Stage::run`]. On the CPU the compute buffers hold `n_heads * n_ctx * max_rows` floats, up to
    /// 512 MiB; beyond that attention is computed in another way, slower for decoding.
    pub max_rows: u32,
    /// Most rows of one run that ask for logits, 0 for `max_rows`. A stage that is not the last ignores it. Its
    /// compute buffers hold `max_outputs * n_vocab` floats.
    pub max_outputs: u32,
    /// Threads that compute.
    pub n_threads: u32,
    /// Width of the hidden state that the caller believes in; 0 if it does not know.
    pub n_embd: u32,
    /// Size of the vocabulary that the caller believes in; 0 if it does not know. Compared only without a stop node:
    /// the other stages carry a vocabulary of a few rows.
    pub n_vocab: u32,
    /// Where the graph is entered and left, and what it is told.
    pub hooks: Hooks,
    /// The last stage yields one pooled vector for each text, not logits.
    pub pooling: Option<Pooling>,
    /// How keys and values are stored. Values in blocks bring flash attention with them.
    pub kv: KvTypes,
}

impl StageOptions {
    pub(crate) fn check(&self) -> Result<(), LoadError> {
        let check = |name, value: u64, min: u64, max: u64| {
            if (min..=max).contains(&value) { Ok(()) } else { Err(LoadError::Option { name, value, min, max }) }
        };
        check("n_ctx", self.n_ctx.into(), 1, MAX_CONTEXT.into())?;
        check("n_sessions", self.n_sessions.into(), 1, MAX_SESSIONS.into())?;
        check("max_rows", self.max_rows.into(), 1, MAX_ROWS.into())?;
        check("n_threads", self.n_threads.into(), 1, MAX_THREADS.into())?;
        check("n_ctx * n_sessions", self.n_cells(), 1, MAX_CELLS)?;
        for LayerScale { node, factors } in &self.hooks.layer_scales {
            if let Some(factor) = factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
                return Err(LoadError::Factor { node: node.clone(), factor: *factor });
            }
        }
        Ok(())
    }

    /// KV cells of all sessions.
    pub(crate) fn n_cells(&self) -> u64 {
        u64::from(self.n_ctx.next_multiple_of(CELL_PADDING)) * u64::from(self.n_sessions)
    }

    /// Rows of the graphs that buffers are measured with. llama.cpp deals them evenly over all sessions; the graph of
    /// Kimi-Linear cannot be made otherwise, which would end the process.
    pub(crate) fn n_graph_rows(&self) -> u32 {
        self.max_rows.next_multiple_of(self.n_sessions)
    }

    /// Most outputs that llama.cpp must be ready for; it reserves at least one for each session. Where all rows are
    /// outputs, none may be missing in the graphs that buffers are measured with either: the mean of a text is a
    /// product over its rows, and ends the process if they are fewer.
    pub(crate) fn n_outputs(&self) -> u32 {
        let all = self.hooks.stop_node.is_some() || self.pooling.is_some() || self.max_outputs == 0;
        if all { self.n_graph_rows() } else { self.max_outputs.min(self.max_rows).max(self.n_sessions) }
    }
}

/// What a stage holds in memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StageMemory {
    /// All tensors.
    pub weights: u64,
    /// The KV cache of all sessions, and recurrent states.
    pub kv: u64,
    /// Buffers of the graph and of outputs, without adapters: for those the first pass makes some larger. The output
    /// buffer grows with the first large batch.
    pub compute: u64,
}

impl StageMemory {
    /// All together.
    pub const fn total(self) -> u64 {
        self.weights + self.kv + self.compute
    }
}

/// Layers of a model that compute, with the KV cache of all sessions. See the head of this file for how.
pub struct Stage {
    // Freed in this order: a context refers to its model.
    pub(crate) context: Context,
    pub(crate) model: Model,
    pub(crate) options: StageOptions,
    pub(crate) n_embd: u32,
    pub(crate) n_vocab: u32,
    pub(crate) n_out: u32,
    pub(crate) max_outputs: u32,
    memory: StageMemory,
    /// Tokens of each slot that the KV cache holds.
    pub(crate) lens: Vec<u32>,
    pub(crate) scratch: Scratch,
}

// SAFETY: llama.cpp ties a context to no thread; one thread at a time uses it, as all methods that touch it take
// `&mut self` or only read values that a run does not change. Raw pointers in the scratch space point into it.
unsafe impl Send for Stage {}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stage").field("options", &self.options).field("lens", &self.lens).finish_non_exhaustive()
    }
}

impl Stage {
    /// Loads the GGUF of `n_bytes` bytes that `reader` yields. Weights are read into memory, nothing is mapped.
    ///
    /// `progress` hears the loaded share, 0 to 1, and returns whether to go on.
    ///
    /// # Errors
    /// If an option is out of range, the reader fails, llama.cpp refuses the file, the model is not the one that the
    /// options describe, or `progress` said stop.
    pub fn load(
        reader: Box<dyn ReadSeek + Send>,
        n_bytes: u64,
        options: StageOptions,
        progress: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Self, LoadError> {
        Self::load_adapted(reader, n_bytes, None, options, progress)
    }

    /// The same with an adapter, whose header was checked against the model's.
    ///
    /// # Errors
    /// As [`Stage::load`], and if llama.cpp refuses the adapter.
    pub fn load_adapted(
        reader: Box<dyn ReadSeek + Send>,
        n_bytes: u64,
        adapter: Option<AdapterSource>,
        options: StageOptions,
        progress: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Self, LoadError> {
        options.check()?;
        Self::adapted(Model::from_reader(reader, n_bytes, Content::All, progress)?, adapter, options)
    }

    /// The stage of a loaded model, with an adapter that is loaded now.
    pub(crate) fn adapted(
        model: Model,
        adapter: Option<AdapterSource>,
        options: StageOptions,
    ) -> Result<Self, LoadError> {
        let Some(adapter) = adapter else { return Self::new(model, options) };
        let weight_bytes = adapter.weight_bytes;
        let adapter = Adapter::load(&model, adapter)?;
        let mut stage = Self::new(model, options)?;
        stage.context.set_adapters(&[adapter]);
        stage.memory.weights += weight_bytes;
        Ok(stage)
    }

    /// Loads a whole GGUF from its file with llama.cpp's own reader and the same settings as [`Stage::load`]: what a
    /// split model is compared with.
    ///
    /// # Errors
    /// As [`Stage::load`].
    pub fn load_file(path: &Path, options: StageOptions) -> Result<Self, LoadError> {
        Self::load_file_adapted(path, &[], options)
    }

    /// The same with adapters and their scales, read and joined by llama.cpp. In which order it adds several to one
    /// matrix depends on where they lie in memory, so last bits may differ from start to start.
    ///
    /// # Errors
    /// As [`Stage::load_adapted`].
    pub fn load_file_adapted(path: &Path, adapters: &[(&Path, f32)], options: StageOptions) -> Result<Self, LoadError> {
        options.check()?;
        let model = Model::from_file(path)?;
        let load = |(path, scale): &(&Path, f32)| Adapter::load_file(&model, path, *scale);
        let adapters = adapters.iter().map(load).collect::<Result<Vec<_>, _>>()?;
        let mut stage = Self::new(model, options)?;
        if !adapters.is_empty() {
            stage.context.set_adapters(&adapters);
        }
        Ok(stage)
    }

    pub(crate) fn new(model: Model, options: StageOptions) -> Result<Self, LoadError> {
        model.check_kind()?;
        let (n_embd, n_vocab) = (model.n_embd(), model.n_vocab());
        check_shape("n_embd", n_embd, options.n_embd)?;
        if options.hooks.stop_node.is_none() {
            check_shape("n_vocab", n_vocab, options.n_vocab)?;
        }
        let (context, captured) = Context::new(&model, &options, n_embd)?;
        let n_out = pooling::check(&model, &context, &options)?;
        let memory = StageMemory { weights: model.n_bytes(), kv: captured.kv_bytes, compute: captured.compute_bytes };
        let max_rows = options.max_rows.min(context.n_batch());
        let max_outputs = options.n_outputs().min(max_rows);
        let scratch = Scratch::new(&options, n_embd as usize, model.n_position_planes());
        let lens = vec![0; options.n_sessions as usize];
        let options = StageOptions { max_rows, ..options };
        Ok(Self { context, model, options, n_embd, n_vocab, n_out, max_outputs, memory, lens, scratch })
    }

    /// The options that it was loaded with; `max_rows` may be lower, as it is never above the cells of the KV cache.
    pub fn options(&self) -> &StageOptions {
        &self.options
    }

    /// Width of the hidden state.
    pub fn n_embd(&self) -> u32 {
        self.n_embd
    }

    /// Size of the vocabulary of this GGUF; a few tokens in stages that do not yield logits.
    pub fn n_vocab(&self) -> u32 {
        self.n_vocab
    }

    /// Width of what it yields for a row or a text: hidden states, logits, or a pooled vector.
    pub fn n_out(&self) -> u32 {
        self.n_out
    }

    /// Whether a text must be computed at once, as rows see those behind them: there is no KV cache.
    pub fn is_encoder(&self) -> bool {
        !self.context.has_memory
    }

    /// Layers of this GGUF.
    pub fn n_layers(&self) -> u32 {
        self.model.n_layers()
    }

    /// Whether it yields logits or pooled vectors, not hidden states.
    pub fn is_final(&self) -> bool {
        self.options.hooks.stop_node.is_none()
    }

    /// What it holds in memory.
    pub fn memory(&self) -> StageMemory {
        self.memory
    }

    /// Tokens that the KV cache holds for `slot`; 0 for a slot that does not exist.
    pub fn len(&self, slot: u32) -> u32 {
        self.lens.get(slot as usize).copied().unwrap_or(0)
    }

    /// A handle with which other threads stop the run in progress.
    pub fn canceller(&self) -> Canceller {
        Canceller(Arc::clone(&self.context.signals))
    }

    /// A handle with which other threads see that a run moves on.
    pub fn activity(&self) -> Activity {
        Activity(Arc::clone(&self.context.signals))
    }
}

fn check_shape(name: &'static str, found: u32, expected: u32) -> Result<(), LoadError> {
    if expected == 0 || found == expected {
        Ok(())
    } else {
        Err(LoadError::Shape { name, found: found.into(), expected: expected.into() })
    }
}

/// Stops the run in progress of one stage, from any thread.
#[derive(Debug, Clone)]
pub struct Canceller(Arc<Signals>);

impl Canceller {
    /// Stops the run in progress, and returns whether there was one: if so, that run ends with `RunError::Cancelled`
    /// or another error, never with a result. Without a run in progress it does nothing; the next run is not
    /// affected.
    ///
    /// The CPU stops before its next graph node, a device after the graph that it was given.
    pub fn cancel(&self) -> bool {
        self.0.cancel()
    }
}

/// Tells how far the runs of one stage have come, from any thread; outlives the stage.
#[derive(Debug, Clone)]
pub struct Activity(Arc<Signals>);

impl Activity {
    /// Graph nodes that were begun so far. On the CPU it rises all through a run, by some dozen a layer; while a device
    /// computes it stands still, which is a matter of milliseconds.
    pub fn steps(&self) -> u64 {
        self.0.steps()
    }
}
