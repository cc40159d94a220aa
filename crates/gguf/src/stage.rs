//! A stage view: the layers `start..end` of a model as a model of its own.
//!
//! ```text
//! header    same metadata, but: block_count, per-layer arrays, vocabulary (none, only its size)
//! tensors   token_embd.weight    final stage: zeros, or real where it must be the head; others: 32 rows of zeros
//!           output_norm, output  final stage: real; others: zeros (the graph is stopped before them). Where texts are
//!                                embedded the final stage has zeros for the head, of 32 rows
//!           positions, norms     first stage: real; others: zeros (the hidden state replaces what they make)
//!           rope factors         real, in every stage
//!           blk.N.*              layers start..end, renumbered from 0
//! ```
//!
//! Nothing is copied: a view knows for each of its tensors which source tensor holds the bytes, and a
//! [`StageReader`] fetches them when they are read. Rows are embedded outside of the stage (by whoever feeds the first
//! one), so no stage needs the vocabulary.

use std::sync::Arc;

use brigade_base::{Hooks, LayerRange};

use crate::architecture::{Architecture, ArchitectureError};
use crate::builder::{BuildError, Builder};
use crate::catalog::{Catalog, TOKEN_TYPES, TensorRole, TensorSource, layer_and_rest};
use crate::ggml_type::GgmlType;
use crate::header::TensorInfo;
use crate::reader::StageReader;
use crate::rules::{Input, Recurrent, Stop};
use crate::value::{Array, Metadata, Value};

/// Vocabulary of a stage that is not the last: as small as possible, since libllama reserves a row of logits for every
/// row of a pass.
pub const PLACEHOLDER_VOCAB: u32 = 32;

/// Keys with one value per layer, where they are arrays.
const PER_LAYER_KEYS: [&str; 11] = [
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_used_count",
    "attention.sliding_window_pattern",
    "attention.recurrent_layers",
    "attention.rope_pattern",
    "attention.indexer.types",
    "swiglu_clamp_exp",
    "swiglu_clamp_shexp",
];

/// The same, of keys without the architecture's name before them.
const PER_LAYER_BARE_KEYS: [&str; 4] = ["xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps"];

/// Types for tensors of zeros that are never computed with, smallest first: the first whose block divides a row is
/// taken.
const ZERO_TYPES: [GgmlType; 4] = [GgmlType::Q1_0, GgmlType::Q2_0, GgmlType::Q4_0, GgmlType::F16];

/// The type of a tensor of zeros with rows of `n_elements`.
pub(crate) fn zero_type(n_elements: u64) -> GgmlType {
    ZERO_TYPES.into_iter().find(|ty| n_elements.is_multiple_of(ty.n_block_elements())).unwrap_or(GgmlType::F16)
}

/// Why there is no such stage.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages explain the fields")]
pub enum StageViewError {
    #[error(transparent)]
    Architecture(#[from] ArchitectureError),
    #[error("layers {layers} were asked of a model with {n_layers} layers")]
    NoSuchLayers { layers: LayerRange, n_layers: u32 },
    #[error("layers {layers} of this {architecture} model cannot be a stage; it can be cut before the layers {cuts:?}")]
    NotCuttable { layers: LayerRange, architecture: &'static str, cuts: Vec<u32> },
    #[error("this {architecture} model cannot be cut: {why}; it runs whole, on one node")]
    Whole { architecture: &'static str, why: &'static str },
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// Where the bytes of a view's tensor come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    Zeros,
    Tensor(usize),
}

/// A tensor's place in the virtual file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment {
    pub start: u64,
    pub n_bytes: u64,
    pub origin: Origin,
}

/// The virtual file itself, shared by a view and its readers.
#[derive(Debug)]
pub(crate) struct VirtualFile {
    pub header: Vec<u8>,
    /// Ascending and without overlap; zeros between them.
    pub segments: Vec<Segment>,
    pub n_bytes: u64,
}

/// Layers `start..end` of a model as a GGUF file that exists only when it is read.
#[derive(Debug, Clone)]
pub struct StageView {
    layers: LayerRange,
    is_final: bool,
    has_head: bool,
    n_embd: u32,
    n_vocab: u32,
    input_scale: f32,
    hooks: Hooks,
    takes_tokens: bool,
    max_positions: Option<u32>,
    tensors: Vec<usize>,
    weight_bytes: u64,
    file: Arc<VirtualFile>,
}

impl StageView {
    /// The view of `layers`.
    ///
    /// # Errors
    /// If the model cannot be run (see [`Architecture::of`]), has no such layers, or cannot be cut there.
    pub fn new(catalog: &Catalog, layers: LayerRange) -> Result<Self, StageViewError> {
        Self::with_head(catalog, layers, true)
    }

    /// The same for a model that embeds or ranks texts: the final stage has the final norm and the classifier, but no
    /// head, and [`PLACEHOLDER_VOCAB`] tokens. libllama computes logits for all rows that it pools, which with a real
    /// head takes longer than the layers of a small model.
    ///
    /// # Errors
    /// As [`StageView::new`].
    pub fn pooled(catalog: &Catalog, layers: LayerRange) -> Result<Self, StageViewError> {
        Self::with_head(catalog, layers, false)
    }

    fn with_head(catalog: &Catalog, layers: LayerRange, has_head: bool) -> Result<Self, StageViewError> {
        let architecture = Architecture::of(catalog)?;
        // What takes tokens needs the rows of all of them, head or not.
        let has_head = has_head || architecture.takes_tokens();
        let n_layers = architecture.n_layers;
        if layers.end() > n_layers {
            return Err(StageViewError::NoSuchLayers { layers, n_layers });
        }
        let cuts = architecture.cut_points();
        let may_cut = |layer| layer == 0 || layer == n_layers || cuts.contains(&layer);
        if !may_cut(layers.start()) || !may_cut(layers.end()) {
            if let Some(why) = architecture.why_whole() {
                return Err(StageViewError::Whole { architecture: architecture.name, why });
            }
            return Err(StageViewError::NotCuttable { layers, architecture: architecture.name, cuts });
        }
        Draft::new(catalog, &architecture, layers, has_head).finish()
    }

    /// The view of all layers: a pipeline of one stage.
    ///
    /// # Errors
    /// If the model cannot be run.
    pub fn whole(catalog: &Catalog) -> Result<Self, StageViewError> {
        let n_layers = Architecture::of(catalog)?.n_layers;
        let layers =
            LayerRange::new(0, n_layers).map_err(|_| ArchitectureError::Missing { key: "block_count".to_owned() })?;
        Self::new(catalog, layers)
    }

    /// Whether this stage ends behind the last layer and yields logits, or pooled texts; else it yields hidden states.
    pub fn is_final(&self) -> bool {
        self.is_final
    }

    /// Whether it has the model's head. A final stage that pools has zeros in its place.
    pub fn has_head(&self) -> bool {
        self.has_head
    }

    /// The layers of the model that this stage holds.
    pub fn layers(&self) -> LayerRange {
        self.layers
    }

    /// Where its graph is entered and left, and what it is told. The final stage has no stop node.
    pub fn hooks(&self) -> Hooks {
        self.hooks.clone()
    }

    /// What each input row must be multiplied by before libllama gets it as an embedding: rows of the token embedding
    /// in the first stage, hidden states in all others.
    pub fn input_scale(&self) -> f32 {
        self.input_scale
    }

    /// Whether the stage is to be given tokens: its layers need them, and it looks their embedding up itself. Such a
    /// model is whole.
    pub fn takes_tokens(&self) -> bool {
        self.takes_tokens
    }

    /// Positions that the model has embeddings for, where it has learned them: libllama ends the process over a token
    /// behind the last one.
    pub fn max_positions(&self) -> Option<u32> {
        self.max_positions
    }

    /// Width of a hidden state.
    pub fn n_embd(&self) -> u32 {
        self.n_embd
    }

    /// Size of the vocabulary that the loaded stage has: the model's in a final stage with a head, else
    /// [`PLACEHOLDER_VOCAB`].
    pub fn n_vocab(&self) -> u32 {
        self.n_vocab
    }

    /// Indices of the source tensors that this stage needs, ascending.
    pub fn tensors(&self) -> &[usize] {
        &self.tensors
    }

    /// Bytes of the virtual file.
    pub fn n_bytes(&self) -> u64 {
        self.file.n_bytes
    }

    /// The virtual file up to where tensor data starts.
    pub fn header_bytes(&self) -> &[u8] {
        &self.file.header
    }

    /// Bytes of all tensors in the view, those of zeros too: what they take in memory.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// A reader of the virtual file. `source` must hold the model of the catalog that the view was made of.
    pub fn reader(&self, source: Arc<dyn TensorSource>) -> StageReader {
        StageReader::new(Arc::clone(&self.file), source)
    }
}

/// A view in the making.
struct Draft<'a> {
    catalog: &'a Catalog,
    architecture: &'a Architecture,
    layers: LayerRange,
    is_final: bool,
    /// It is final, and tokens can be chosen by what it yields.
    has_head: bool,
    n_vocab: u32,
    builder: Builder,
    origins: Vec<Origin>,
}

impl<'a> Draft<'a> {
    fn new(catalog: &'a Catalog, architecture: &'a Architecture, layers: LayerRange, has_head: bool) -> Self {
        let is_final = layers.end() == architecture.n_layers;
        let has_head = has_head && is_final;
        let n_vocab = if has_head { architecture.n_vocab } else { PLACEHOLDER_VOCAB };
        let metadata = stage_metadata(catalog.metadata(), architecture, layers, n_vocab);
        let builder = Builder::new(&metadata);
        Self { catalog, architecture, layers, is_final, has_head, n_vocab, builder, origins: Vec::new() }
    }

    fn finish(mut self) -> Result<StageView, StageViewError> {
        self.add_embedding()?;
        let (catalog, is_whole) = (self.catalog, self.is_final && self.layers.start() == 0);
        for (idx, tensor) in catalog.tensors().iter().enumerate() {
            match self.architecture.rules.role_of(&tensor.name) {
                TensorRole::Layer(layer) if self.layers.contains(layer) => self.add_layer_tensor(idx, tensor)?,
                TensorRole::Head if self.has_head || self.is_final && !tensor.name.starts_with("output.") => {
                    self.add_source(idx, &tensor.name, tensor)?;
                }
                TensorRole::Head => self.add_unread_head(tensor)?,
                TensorRole::Input if self.layers.start() == 0 => self.add_source(idx, &tensor.name, tensor)?,
                TensorRole::Input => self.add(&tensor.name, &tensor.dims, tensor.ty, Origin::Zeros)?,
                TensorRole::EveryStage if !self.reads_rope_factors() => {}
                TensorRole::EveryStage => self.add_source(idx, &tensor.name, tensor)?,
                TensorRole::Other if is_whole => self.add_source(idx, &tensor.name, tensor)?,
                TensorRole::Layer(_) | TensorRole::TokenEmbedding | TensorRole::Other => {}
            }
        }
        let mut tensors: Vec<usize> = self.origins.iter().filter_map(|origin| origin.tensor_idx()).collect();
        tensors.sort_unstable();
        let header = self.builder.header_bytes();
        let data_start = header.len() as u64;
        let segment = |(placed, origin): (&crate::builder::Placed, &Origin)| Segment {
            start: data_start + placed.offset,
            n_bytes: placed.n_bytes,
            origin: *origin,
        };
        let segments: Vec<_> = self.builder.placed().iter().zip(&self.origins).map(segment).collect();
        Ok(StageView {
            layers: self.layers,
            is_final: self.is_final,
            has_head: self.has_head,
            n_embd: self.architecture.n_embd,
            n_vocab: self.n_vocab,
            input_scale: input_scale(self.architecture, self.layers),
            hooks: hooks(self.architecture, self.layers, self.is_final),
            takes_tokens: self.architecture.takes_tokens(),
            max_positions: max_positions(self.catalog),
            tensors,
            weight_bytes: segments.iter().map(|segment| segment.n_bytes).sum(),
            file: Arc::new(VirtualFile { header, segments, n_bytes: data_start + self.builder.n_data_bytes() }),
        })
    }

    fn add(&mut self, name: &str, dims: &[u64], ty: GgmlType, origin: Origin) -> Result<(), StageViewError> {
        self.builder.tensor(name, dims, ty)?;
        self.origins.push(origin);
        Ok(())
    }

    fn add_source(&mut self, idx: usize, name: &str, tensor: &TensorInfo) -> Result<(), StageViewError> {
        self.add(name, &tensor.dims, tensor.ty, Origin::Tensor(idx))
    }

    /// gemma4 has rope factors for full layers, and stops at them in a model without such layers.
    fn reads_rope_factors(&self) -> bool {
        let window = self.architecture.sliding_window.as_ref().filter(|_| self.architecture.name == "gemma4");
        window.is_none_or(|window| self.layers.iter().any(|layer| !window.slides[layer as usize]))
    }

    /// A tensor behind the last layer, in a stage that is stopped before it or has no head: zeros, for as many tokens
    /// as there are here.
    fn add_unread_head(&mut self, tensor: &TensorInfo) -> Result<(), StageViewError> {
        let mut dims = tensor.dims.clone();
        if let (Some(last), true) = (dims.last_mut(), tensor.name.starts_with("output."))
            && *last == u64::from(self.architecture.n_vocab)
        {
            *last = self.n_vocab.into();
        }
        let ty = if dims.len() > 1 { zero_type(dims[0]) } else { GgmlType::F32 };
        self.add(&tensor.name, &dims, ty, Origin::Zeros)
    }

    /// libllama insists on a token embedding with a row per token, which nothing ever reads. A head that is tied to it
    /// is given by itself, as most architectures may have it: libllama would keep both.
    fn add_embedding(&mut self) -> Result<(), StageViewError> {
        let name = "token_embd.weight";
        if self.has_head && (self.architecture.tied_head || self.architecture.takes_tokens()) {
            let missing = || ArchitectureError::MissingTensor { name: name.to_owned() };
            let idx = self.catalog.tensor_idx(name).ok_or_else(missing)?;
            let tensor = &self.catalog.tensors()[idx];
            if self.architecture.rules.always_tied || self.architecture.takes_tokens() {
                return self.add_source(idx, name, tensor);
            }
            self.add_source(idx, "output.weight", tensor)?;
        }
        let n_embd = u64::from(self.architecture.n_embd);
        self.add(name, &[n_embd, self.n_vocab.into()], zero_type(n_embd), Origin::Zeros)
    }

    fn add_layer_tensor(&mut self, idx: usize, tensor: &TensorInfo) -> Result<(), StageViewError> {
        let Some((layer, rest)) = layer_and_rest(&tensor.name) else { return Ok(()) };
        let name = format!("blk.{}.{rest}", layer - self.layers.start());
        self.add_source(idx, &name, tensor)
    }
}

impl Origin {
    fn tensor_idx(self) -> Option<usize> {
        match self {
            Self::Zeros => None,
            Self::Tensor(idx) => Some(idx),
        }
    }
}

/// The model's metadata with what differs in a stage of `layers`.
fn stage_metadata(source: &Metadata, architecture: &Architecture, layers: LayerRange, n_vocab: u32) -> Metadata {
    let name = |key: &str| format!("{}.{key}", architecture.name);
    // Draft layers are left out, and rows hold no images.
    let left_out = ["nextn_predict_layers", "n_deepstack_layers", "deepstack_mapping"].map(name);
    let is_left_out = |key: &str| left_out.iter().any(|other| other == key);
    let mut metadata = source.filtered(|key, _| !key.starts_with("tokenizer.") && !is_left_out(key));
    metadata.set("tokenizer.ggml.model", "no_vocab");
    if let Some(value) = source.get(TOKEN_TYPES) {
        metadata.set(TOKEN_TYPES, value.clone());
    }
    metadata.set(name("block_count"), layers.len());
    metadata.set(name("vocab_size"), n_vocab);
    let bare = PER_LAYER_BARE_KEYS.map(str::to_owned);
    for key in PER_LAYER_KEYS.map(name).into_iter().chain(bare) {
        if let Some(Array::Scalars(scalars)) = source.array(&key)
            && let Some(slice) = scalars.slice(layers.start() as usize, layers.end() as usize)
        {
            metadata.set(key, Array::Scalars(slice));
        }
    }
    if let Some(window) = &architecture.sliding_window {
        let (window_key, pattern_key) = (name("attention.sliding_window"), name("attention.sliding_window_pattern"));
        let slides = &window.slides[layers.start() as usize..layers.end() as usize];
        if slides.contains(&true) {
            // Told layer by layer, so that it does not matter where in the pattern a stage begins.
            metadata.set(pattern_key, Array::of_bool(slides));
        } else {
            // libllama insists on a sliding layer where there is a window; full layers compute the same without.
            metadata = metadata.filtered(|key, _| key != pattern_key);
            metadata.set(window_key, 0);
        }
    }
    if matches!(architecture.rules.recurrent, Recurrent::Interval(_)) {
        let flags: Vec<u32> = layers.iter().map(|layer| architecture.state.is_in(layer).into()).collect();
        metadata.set(name("attention.recurrent_layers"), Array::of_u32(&flags));
    }
    // What libllama works out from the first layer or from the number of layers is told.
    for (key, length) in
        [("attention.key_length", architecture.key_length), ("attention.value_length", architecture.value_length)]
    {
        if length > 0 && source.get(&name(key)).is_none() {
            metadata.set(name(key), length);
        }
    }
    for (key, value) in told_by_layers(source, architecture, layers) {
        metadata.set(name(key), value);
    }
    if let (Input::Scaled(key), true) = (architecture.rules.input, layers.start() > 0) {
        metadata.set(name(key), 0.0f32);
    }
    let leading = name("leading_dense_block_count");
    if let Some(n_dense) = source.u32(&leading) {
        metadata.set(leading, Value::U32(n_dense.saturating_sub(layers.start()).min(layers.len())));
    }
    metadata
}

/// What libllama tells by the number of layers of a whole model, or by which layer it is, as keys.
fn told_by_layers(source: &Metadata, architecture: &Architecture, layers: LayerRange) -> Vec<(&'static str, Value)> {
    let mut told = Vec::new();
    let (n_layers, n_vocab) = (architecture.n_layers, architecture.n_vocab);
    let has = |key: &str| source.get(&format!("{}.{key}", architecture.name)).is_some();
    match architecture.name {
        "deepseek2" | "mistral4" => {}
        "minicpm" if !has("residual_scale") => {
            return vec![("residual_scale", Value::F32(1.4 / (n_layers as f32).sqrt()))];
        }
        "glm-dsa" => {
            let own = &architecture.indexes[layers.start() as usize..layers.end() as usize];
            let types: Vec<u32> = own.iter().map(|full| u32::from(*full)).collect();
            return vec![("attention.indexer.types", Array::of_u32(&types).into())];
        }
        _ => return told,
    }
    // The small ones have no such rank.
    if architecture.rules.recognises(n_layers, n_vocab) {
        told.push(("attention.q_lora_rank", Value::U32(0)));
    }
    let gating = format!("{}.expert_gating_func", architecture.name);
    if source.u32(&gating).unwrap_or(0) == 0 {
        let is_sigmoid = matches!(n_layers, 47 | 48) && n_vocab == 154_880;
        told.push(("expert_gating_func", Value::U32(if is_sigmoid { 2 } else { 1 })));
    }
    told
}

fn max_positions(catalog: &Catalog) -> Option<u32> {
    let table = catalog.tensor("position_embd.weight")?;
    Some(table.dims.get(1).and_then(|n| u32::try_from(*n).ok()).unwrap_or(0))
}

fn input_scale(architecture: &Architecture, layers: LayerRange) -> f32 {
    match (architecture.rules.input, layers.start()) {
        (Input::ScaledTokens | Input::TokensIf(_), 0) if !architecture.takes_tokens() => {
            (architecture.n_embd as f32).sqrt()
        }
        _ => 1.0,
    }
}

fn hooks(architecture: &Architecture, layers: LayerRange, is_final: bool) -> Hooks {
    let looks_up_rows = architecture.looks_up_rows();
    let enters = layers.start() > 0 || looks_up_rows;
    let last = layers.len() - 1;
    let stop = match architecture.rules.stop {
        Stop::Numbered(name) => format!("{name}-{last}"),
        Stop::Named(name) => name.to_owned(),
        Stop::Sum(name) => format!("{name}-{last}+"),
    };
    Hooks {
        input_node: architecture.input_node.filter(|_| enters).map(str::to_owned),
        looks_up_rows,
        stop_node: (!is_final).then_some(stop),
        layer_scales: architecture.scales(layers),
    }
}
