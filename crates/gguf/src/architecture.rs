//! A model's hyperparameters, resolved as libllama resolves them and checked before it sees them.
//!
//! libllama answers an unsound hyperparameter by ending the process. What all its architectures share is checked here,
//! with an error that names the key; what one graph alone insists on is found out by trying the header in a process of
//! its own before it is loaded.

use std::collections::HashSet;

use brigade_base::{KvType, KvTypes, LayerRange, LayerScale};

use crate::catalog::{Catalog, TensorRole};
use crate::cuts;
use crate::rules::{
    Experts, Factor, Input, Recurrent, Rules, Sliding, Step, Whole, Window, rules_of, supported_architectures,
};
use crate::stage::zero_type;
use crate::state::{Kv, RecurrentState};
use crate::value::{Array, Metadata, Value};

/// libllama's own limit (`LLAMA_MAX_LAYERS`).
const MAX_LAYERS: u64 = 512;

/// libllama's own limit (`LLAMA_MAX_EXPERTS`).
const MAX_EXPERTS: u64 = 1024;

/// Limit for every width (embedding, head, feed forward): 64 times the largest known, and products of two of them stay
/// far below 2^64.
const MAX_WIDTH: u64 = 1 << 22;

/// Most attention heads of a layer: 64 times the largest known.
const MAX_HEADS: u64 = 1 << 14;

/// Largest vocabulary; the largest known has 262 144 tokens.
const MAX_VOCABULARY: u64 = 1 << 24;

/// Longest context: 2^30 positions, since libllama counts them in 32 bits with a sign.
const MAX_CONTEXT: u64 = 1 << 30;

/// Why a model cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages explain the fields")]
pub enum ArchitectureError {
    #[error(
        "models of the architecture {found:?} cannot be run; `docs/architectures.md` lists the {} that can",
        supported_architectures().count()
    )]
    Unsupported { found: String },
    #[error("the metadata lacks {key:?}; this is no complete language model")]
    Missing { key: String },
    #[error("the metadata key {key:?} is {found}, expected {expected}")]
    Value { key: String, found: String, expected: String },
    #[error("the model lacks the tensor {name:?}")]
    MissingTensor { name: String },
    #[error("the tensor {name:?} has the shape {found:?}, expected {expected}")]
    Shape { name: String, found: Vec<u64>, expected: String },
    #[error("the tensor {name:?} belongs to no known part of a {architecture} model")]
    UnknownTensor { name: String, architecture: &'static str },
}

/// Which layers of a model attend to a window only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlidingWindow {
    /// Tokens that a sliding layer sees.
    pub n_tokens: u32,
    /// For each layer, whether it slides.
    pub slides: Vec<bool>,
    /// Whether the full layers compute the same in a model without a window.
    pub(crate) is_separable: bool,
}

/// The hyperparameters of a model.
#[derive(Debug, Clone)]
pub struct Architecture {
    /// `general.architecture`.
    pub name: &'static str,
    /// Number of layers.
    pub n_layers: u32,
    /// Width of a hidden state.
    pub n_embd: u32,
    /// Attention heads per layer; 0 where a layer has no attention.
    pub n_head: Vec<u32>,
    /// Heads of keys and values per layer; 0 where a layer has no attention.
    pub n_head_kv: Vec<u32>,
    /// Width of one head's key; 0 without attention.
    pub key_length: u32,
    /// Width of one head's value; 0 without attention.
    pub value_length: u32,
    /// Width of the feed forward per layer; 0 where only experts are.
    pub n_ff: Vec<u32>,
    /// Tokens in the vocabulary.
    pub n_vocab: u32,
    /// Context length of the training.
    pub n_ctx_train: u32,
    /// Experts per layer, 0 without.
    pub n_experts: u32,
    /// Experts that a token uses, at most; 0 without.
    pub n_experts_used: u32,
    /// Sliding window attention.
    pub sliding_window: Option<SlidingWindow>,
    /// Rotated dimensions of a head.
    pub n_rope_dims: u32,
    /// Whether the head is the token embedding.
    pub tied_head: bool,
    /// Layers behind `n_layers` that draft further tokens; they are left out.
    pub n_draft_layers: u32,
    /// The node that holds what enters the first layer, where the graph changes its input rows.
    pub(crate) input_node: Option<&'static str>,
    pub(crate) kv: Kv,
    pub(crate) state: RecurrentState,
    cut_points: Vec<u32>,
    why_whole: Option<&'static str>,
    takes_tokens: bool,
    /// Layers that choose what to attend to by an index of their own; all in models without indices.
    pub(crate) indexes: Vec<bool>,
    layer_bytes: Vec<u64>,
    embedding_bytes: u64,
    head_bytes: u64,
    expert_bytes: u64,
    n_weights: u64,
    pub(crate) rules: &'static Rules,
}

impl Architecture {
    /// Resolves and checks the hyperparameters of a model.
    ///
    /// # Errors
    /// If the architecture has no rules, or if anything is missing or unsound.
    pub fn of(catalog: &Catalog) -> Result<Self, ArchitectureError> {
        let metadata = catalog.metadata();
        let found = metadata.str("general.architecture");
        let found = found.ok_or_else(|| ArchitectureError::Missing { key: "general.architecture".to_owned() })?;
        let rules = rules_of(found).ok_or_else(|| ArchitectureError::Unsupported { found: found.to_owned() })?;
        let keys = Keys { metadata, prefix: rules.name };

        let n_blocks = keys.required("block_count", 1, MAX_LAYERS)?;
        let n_draft_layers = keys.optional("nextn_predict_layers", 0, 0, u64::from(n_blocks) - 1)?;
        let n_layers = n_blocks - n_draft_layers;
        let n_embd = keys.required("embedding_length", 1, MAX_WIDTH)?;
        let n_ctx_train = keys.required("context_length", 1, MAX_CONTEXT)?;
        let heads = keys.heads(rules, n_blocks, n_embd)?;
        let n_ff = keys.per_layer("feed_forward_length", n_blocks, 0, MAX_WIDTH)?;
        let n_rope_dims = keys.optional("rope.dimension_count", heads.key_length.into(), 0, MAX_WIDTH)?;
        keys.check_lengths(rules, heads.key_length, heads.value_length, n_rope_dims)?;
        keys.check_rope()?;
        let (n_experts, mut used) = keys.experts(rules, n_blocks)?;
        used.truncate(n_layers as usize);
        let n_experts_used = used.iter().copied().max().unwrap_or(0);
        let sliding_window = keys.sliding_window(rules, n_layers)?;
        let n_ff = n_ff.unwrap_or_else(|| vec![0; n_blocks as usize]);
        if rules.has_bare_layers && n_ff.get(n_layers as usize - 1).is_some_and(|n_ff| *n_ff == 0) {
            // libllama then chooses no rows for the head, and ends the process.
            return Err(keys.wrong("feed_forward_length", "0 in the last layer", "more there"));
        }
        let recurrent = keys.recurrent(rules, &heads.n_head_kv, &n_ff, n_layers)?;
        let state = RecurrentState::of(&keys, recurrent, n_embd, &heads)?;

        let tensors = Tensors { catalog, rules };
        let n_vocab = tensors.n_vocab(n_embd)?;
        keys.check_vocabulary(n_vocab)?;
        let is_bare = |layer: u32| {
            let layer = layer as usize;
            rules.has_bare_layers && heads.n_head[layer] == 0 && heads.n_head_kv[layer] == 0 && n_ff[layer] == 0
        };
        tensors.check_layers(n_layers, n_blocks, is_bare)?;
        let embedding_bytes = catalog.tensor("token_embd.weight").map_or(0, |tensor| tensor.n_bytes);
        let has_head = catalog.tensor("output.weight").is_some() || rules.is_encoder;
        let tied_head = rules.always_tied || !has_head;
        let untied_bytes = tensors.bytes_of(TensorRole::Head);
        let mut layer_bytes = catalog.bytes_per_layer();
        layer_bytes.resize(n_layers as usize, 0);
        let input_node = keys.input_node(rules, catalog);
        let rotates = keys.flags("attention.rope_pattern", n_layers)?.unwrap_or_else(|| vec![true; n_layers as usize]);
        let indexes = keys.indexes(rules, n_ctx_train, n_layers)?;
        let kv = Kv::of(&keys, rules, &heads, sliding_window.as_ref(), &state, &indexes)?;
        let swa_differs = keys.swa_differs(&heads, n_rope_dims)?;
        let Heads { mut n_head, mut n_head_kv, key_length, value_length } = heads;
        let mut n_ff = n_ff;
        [&mut n_head, &mut n_head_kv, &mut n_ff]
            .into_iter()
            .for_each(|per_layer| per_layer.truncate(n_layers as usize));
        let mut architecture = Self {
            name: rules.name,
            n_layers,
            n_embd,
            n_head,
            n_head_kv,
            key_length,
            value_length,
            n_ff,
            n_vocab,
            n_ctx_train,
            n_experts,
            n_experts_used,
            sliding_window,
            n_rope_dims,
            tied_head,
            n_draft_layers,
            input_node,
            kv,
            state,
            cut_points: Vec::new(),
            why_whole: keys.why_whole(rules, n_layers),
            takes_tokens: keys.takes_tokens(rules),
            indexes: indexes.clone(),
            layer_bytes,
            embedding_bytes,
            expert_bytes: expert_bytes(catalog),
            n_weights: catalog.n_parameters(),
            head_bytes: if tied_head { untied_bytes.saturating_add(embedding_bytes) } else { untied_bytes },
            rules,
        };
        if architecture.why_whole.is_none() {
            let routes = used.iter().map(|n| *n > 0).collect();
            let facts = cuts::Facts { steps: keys.steps(rules), rotates, indexes, routes, swa_differs };
            architecture.cut_points = cuts::cut_points(&architecture, &facts);
            if architecture.cut_points.is_empty() {
                architecture.why_whole = Some(if n_layers == 1 {
                    "it has one layer"
                } else {
                    "none of its layers can begin a stage that computes what it does in the whole"
                });
            }
        }
        Ok(architecture)
    }

    /// Bytes of the key and the value that one token has in the KV cache of `layer`; 0 for a layer that has none or is
    /// not there.
    pub fn kv_bytes_per_token(&self, layer: u32, types: KvTypes) -> u64 {
        let (key, value) = self.kv.bytes_per_token(layer, types);
        key.saturating_add(value)
    }

    /// Of [`Architecture::kv_bytes_per_token`] those of the value.
    pub fn value_bytes_per_token(&self, layer: u32, types: KvTypes) -> u64 {
        self.kv.bytes_per_token(layer, types).1
    }

    /// The length of a head's key or value that cannot be stored in one of these types, since it is no whole number of
    /// blocks, with that type.
    pub fn kv_misfit(&self, types: KvTypes) -> Option<(u64, KvType)> {
        self.kv.misfit(types)
    }

    /// Bytes of the state that one session has in `layer`, however long it is; 0 for a layer that has none.
    pub fn state_bytes(&self, layer: u32) -> u64 {
        self.state.bytes(layer)
    }

    /// Whether layers keep a state that a token changes for good: a session cannot be cut back to fewer tokens.
    pub fn is_recurrent(&self) -> bool {
        self.state.is_any()
    }

    /// Whether it keeps no KV cache and sees a text from both ends, so that all of it is computed at once. It yields
    /// hidden states, no logits.
    pub fn is_encoder(&self) -> bool {
        self.rules.is_encoder
    }

    /// Where the model may be cut: layer `c` in the list can be the first of a stage. Any set of them is legal. Empty
    /// for a model that must stay whole.
    pub fn cut_points(&self) -> Vec<u32> {
        self.cut_points.clone()
    }

    /// Why the model must stay whole, where its architecture or size is the reason.
    pub fn why_whole(&self) -> Option<&'static str> {
        self.why_whole
    }

    /// Whether libllama takes no rows that it has not looked up itself.
    pub(crate) fn looks_up_rows(&self) -> bool {
        matches!(self.rules.input, Input::LookedUp(_))
    }

    /// Whether its layers need the tokens themselves, and not only their embeddings.
    pub fn takes_tokens(&self) -> bool {
        self.takes_tokens
    }

    /// `n_embd / n_head`, which some graphs use in place of the key length.
    fn head_width(&self) -> u32 {
        self.n_embd / self.n_head.first().copied().unwrap_or(1).max(1)
    }

    /// Factors that libllama would work out otherwise for a stage of these layers, as they are in the whole.
    pub(crate) fn scales(&self, layers: LayerRange) -> Vec<LayerScale> {
        let told = |(node, factor): &(&str, Factor)| {
            let has_it = |layer: &u32| *factor != Factor::Falling || self.state.is_in(*layer);
            let all = |start: u32, n_layers: u32| {
                let layers = (layers.start()..layers.end()).filter(has_it);
                layers.map(|layer| self.factor(*factor, layer - start, n_layers)).collect::<Vec<f32>>()
            };
            let factors = all(0, self.n_layers);
            (factors != all(layers.start(), layers.len())).then(|| LayerScale { node: (*node).to_owned(), factors })
        };
        self.rules.scales.iter().filter_map(told).collect()
    }

    /// That of `layer` in a model with `n_layers`, as libllama computes it, with the same bits.
    fn factor(&self, factor: Factor, layer: u32, n_layers: u32) -> f32 {
        match factor {
            Factor::Falling => (1.0 - f64::from(layer) / (f64::from(n_layers) - 1.0) + 1e-5) as f32,
            Factor::Queries(recognised) if n_layers == recognised => 1.0 / (self.head_width() as f32).sqrt(),
            Factor::Queries(_) => 1.0 / (self.key_length as f32).sqrt(),
            Factor::OverRootOfLayers(numerator) => numerator / (n_layers as f32).sqrt(),
        }
    }

    /// Bytes of the tensors of `layer`; 0 for a layer that is not there.
    pub fn layer_bytes(&self, layer: u32) -> u64 {
        self.layer_bytes.get(layer as usize).copied().unwrap_or(0)
    }

    /// Bytes of the token embedding, from which the coordinator looks up rows.
    pub fn embedding_bytes(&self) -> u64 {
        self.embedding_bytes
    }

    /// Bytes that the final stage holds for an embedding that nothing reads: zeros, or the embedding once more where
    /// libllama makes the head of it.
    pub fn unread_embedding_bytes(&self) -> u64 {
        if self.takes_tokens() && !self.tied_head {
            return self.embedding_bytes;
        }
        if self.rules.always_tied {
            return self.embedding_bytes;
        }
        let n_embd = u64::from(self.n_embd);
        let row = zero_type(n_embd).row_bytes(n_embd).unwrap_or(0);
        row.saturating_mul(self.n_vocab.into())
    }

    /// Of the bytes of all layers, those of experts: tensors of which a row uses only a part.
    pub fn expert_bytes(&self) -> u64 {
        self.expert_bytes
    }

    /// All weights, as a count.
    pub fn n_weights(&self) -> u64 {
        self.n_weights
    }

    /// Bytes of final norm and head; with a tied head these include the token embedding.
    pub fn head_bytes(&self) -> u64 {
        self.head_bytes
    }
}

/// Bytes of the tensors that hold one matrix for each expert.
fn expert_bytes(catalog: &Catalog) -> u64 {
    let is_expert = |name: &str| name.starts_with("blk.") && name.ends_with("_exps.weight");
    let tensors = catalog.tensors().iter().filter(|tensor| is_expert(&tensor.name));
    tensors.fold(0, |sum, tensor| sum.saturating_add(tensor.n_bytes))
}

/// Attention heads of each block, and their width.
pub(crate) struct Heads {
    pub n_head: Vec<u32>,
    pub n_head_kv: Vec<u32>,
    pub key_length: u32,
    pub value_length: u32,
}

/// Reads an architecture's keys.
pub(crate) struct Keys<'a> {
    pub(crate) metadata: &'a Metadata,
    pub(crate) prefix: &'static str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn missing(&self, key: &str) -> ArchitectureError {
        ArchitectureError::Missing { key: self.name(key) }
    }

    fn wrong(&self, key: &str, found: impl ToString, expected: impl ToString) -> ArchitectureError {
        ArchitectureError::Value { key: self.name(key), found: found.to_string(), expected: expected.to_string() }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(&self.name(key))
    }

    fn number(&self, key: &str, value: &Value, min: u64, max: u64) -> Result<u32, ArchitectureError> {
        let number = value.as_u64().filter(|n| (min..=max).contains(n)).and_then(|n| u32::try_from(n).ok());
        number.ok_or_else(|| self.wrong(key, describe(value), format!("an integer from {min} to {max}")))
    }

    fn required(&self, key: &str, min: u64, max: u64) -> Result<u32, ArchitectureError> {
        self.number(key, self.get(key).ok_or_else(|| self.missing(key))?, min, max)
    }

    pub(crate) fn optional(&self, key: &str, default: u64, min: u64, max: u64) -> Result<u32, ArchitectureError> {
        self.number(key, self.get(key).unwrap_or(&Value::U64(default)), min, max)
    }

    /// A number for all layers, or an array with one for each.
    fn per_layer(&self, key: &str, n_layers: u32, min: u64, max: u64) -> Result<Option<Vec<u32>>, ArchitectureError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::Scalars(scalars))) if scalars.len() == n_layers as usize => {
                scalars.iter().map(|value| self.number(key, &value, min, max)).collect::<Result<_, _>>().map(Some)
            }
            Some(value @ Value::Array(_)) => {
                Err(self.wrong(key, describe(value), format!("one number for each of the {n_layers} layers")))
            }
            Some(value) => Ok(Some(vec![self.number(key, value, min, max)?; n_layers as usize])),
        }
    }

    /// Numbers of heads, and how wide they are: `n_embd` divided among those of the first layer unless told.
    fn heads(&self, rules: &Rules, n_blocks: u32, n_embd: u32) -> Result<Heads, ArchitectureError> {
        let min = u64::from(rules.uniform_heads);
        let n_head = match self.per_layer("attention.head_count", n_blocks, min, MAX_HEADS)? {
            Some(n_head) => n_head,
            None if rules.recurrent == Recurrent::All => vec![0; n_blocks as usize],
            None => return Err(self.missing("attention.head_count")),
        };
        let n_head_kv = self.per_layer("attention.head_count_kv", n_blocks, min, MAX_HEADS)?;
        let n_head_kv = n_head_kv.unwrap_or_else(|| n_head.clone());
        for (key, counts) in [("attention.head_count", &n_head), ("attention.head_count_kv", &n_head_kv)] {
            if rules.uniform_heads && counts.windows(2).any(|pair| pair[0] != pair[1]) {
                return Err(self.wrong(key, "different from layer to layer", "the same number in all layers"));
            }
        }
        let odd = n_head.iter().zip(&n_head_kv).find(|(q, kv)| **kv > 0 && !q.is_multiple_of(**kv));
        if let Some((q, kv)) = odd {
            return Err(self.wrong("attention.head_count_kv", kv, format!("a divisor of the {q} heads")));
        }
        let first = n_head.first().copied().unwrap_or(0);
        if first == 0 && rules.name == "plamo2" {
            // libllama would rotate no dimension, and never end.
            return Err(self.wrong("attention.head_count", "0 in the first layer", "the same number in all layers"));
        }
        if first == 0 {
            return Ok(Heads { n_head, n_head_kv, key_length: 0, value_length: 0 });
        }
        if !rules.scales.is_empty() && n_embd < first {
            let most = format!("at most the width of a hidden state, {n_embd}");
            return Err(self.wrong("attention.head_count", first, most));
        }
        let default = u64::from(n_embd / first);
        let key_length = self.optional("attention.key_length", default, 1, MAX_WIDTH)?;
        let value_length = self.optional("attention.value_length", default, 1, MAX_WIDTH)?;
        Ok(Heads { n_head, n_head_kv, key_length, value_length })
    }

    fn check_lengths(&self, rules: &Rules, key: u32, value: u32, rope: u32) -> Result<(), ArchitectureError> {
        if rules.same_key_value_length && value != key {
            return Err(self.wrong("attention.value_length", value, format!("the key length, {key}")));
        }
        if (key > 0 && rope > key) || !rope.is_multiple_of(2) {
            return Err(self.wrong("rope.dimension_count", rope, format!("an even number of at most {key}")));
        }
        if rules.rotates_whole_head && rope != key {
            return Err(self.wrong("rope.dimension_count", rope, format!("the key length, {key}")));
        }
        if !rules.uniform_heads {
            return Ok(());
        }
        // Other lengths in sliding layers: the graphs here read them from layer 0 alone.
        for (name, same) in [
            ("attention.key_length_swa", key),
            ("attention.value_length_swa", value),
            ("rope.dimension_count_swa", rope),
        ] {
            let found = self.optional(name, same.into(), 0, MAX_WIDTH)?;
            if found != same {
                return Err(self.wrong(name, found, format!("the same as in the other layers, {same}")));
            }
        }
        Ok(())
    }

    /// For each layer, whether it keeps a state.
    fn recurrent(
        &self,
        rules: &Rules,
        n_head_kv: &[u32],
        n_ff: &[u32],
        n_layers: u32,
    ) -> Result<Vec<bool>, ArchitectureError> {
        let all = |is: &dyn Fn(usize) -> bool| (0..n_layers as usize).map(is).collect::<Vec<_>>();
        Ok(match rules.recurrent {
            Recurrent::None => all(&|_| false),
            Recurrent::All | Recurrent::Beside => all(&|_| true),
            Recurrent::NoKvHeads => all(&|i| n_head_kv[i] == 0),
            Recurrent::NoKvHeadsNoFeedForward => all(&|i| n_head_kv[i] == 0 && n_ff[i] == 0),
            Recurrent::Interval(default) => match self.flags("attention.recurrent_layers", n_layers)? {
                Some(flags) => flags,
                None => {
                    let interval = self.optional("full_attention_interval", default.into(), 1, MAX_LAYERS)? as usize;
                    all(&|i| (i + 1) % interval != 0)
                }
            },
        })
    }

    /// A list with a flag for each layer, and perhaps for draft layers behind them; `None` if there is no list.
    fn flags(&self, key: &str, n_layers: u32) -> Result<Option<Vec<bool>>, ArchitectureError> {
        match self.get(key) {
            Some(Value::Array(Array::Scalars(scalars))) if scalars.len() >= n_layers as usize => {
                let flags = scalars.iter().take(n_layers as usize).map(|value| match value {
                    Value::Bool(flag) => Ok(flag),
                    other => self.number(key, &other, 0, 1).map(|n| n == 1),
                });
                flags.collect::<Result<_, _>>().map(Some)
            }
            Some(value @ Value::Array(_)) => {
                Err(self.wrong(key, describe(value), format!("one flag for each of the {n_layers} layers")))
            }
            _ => Ok(None),
        }
    }

    /// Why this model must stay whole.
    fn why_whole(&self, rules: &Rules, n_layers: u32) -> Option<&'static str> {
        rules.whole.iter().find_map(|whole| match *whole {
            Whole::Always(why) => Some(why),
            Whole::Layers(n, why) => (n == n_layers).then_some(why),
            Whole::From(n, why) => (n_layers >= n).then_some(why),
            Whole::Above(least, key, why) => {
                self.get(key).and_then(Value::as_u64).is_some_and(|n| n > least.into()).then_some(why)
            }
        })
    }

    fn takes_tokens(&self, rules: &Rules) -> bool {
        match rules.input {
            Input::Tokens => true,
            Input::TokensIf(key) => self.get(key).and_then(Value::as_u64).is_some_and(|n| n > 0),
            _ => false,
        }
    }

    fn input_node(&self, rules: &Rules, catalog: &Catalog) -> Option<&'static str> {
        match rules.input {
            Input::Plain | Input::ScaledTokens | Input::Scaled(_) | Input::Tokens | Input::TokensIf(_) => None,
            Input::Changed(node) | Input::LookedUp(node) => Some(node),
            Input::ChangedWith { node, tensor } => catalog.tensor(tensor).map(|_| node),
        }
    }

    /// For each layer, whether it has an index of its own; true in models without indices.
    fn indexes(&self, rules: &Rules, n_ctx_train: u32, n_layers: u32) -> Result<Vec<bool>, ArchitectureError> {
        if rules.name == "minimax-m3" {
            let n_dense = self.optional("leading_dense_block_count", 0, 0, MAX_LAYERS)?;
            return Ok((0..n_layers).map(|layer| layer >= n_dense).collect());
        }
        if matches!(rules.name, "glm-dsa" | "hy_v4")
            && let Some(flags) = self.flags("attention.indexer.types", n_layers)?
        {
            return Ok(flags);
        }
        if rules.name != "glm-dsa" {
            return Ok(vec![true; n_layers as usize]);
        }
        // The table that libllama has for files which do not tell: two layers, then one of four.
        let is_long = n_ctx_train >= 1 << 20;
        let has_index = |layer: u32| !is_long || layer < 2 || (layer < 78 && (layer - 2).is_multiple_of(4));
        Ok((0..n_layers).map(has_index).collect())
    }

    /// Whether heads of sliding layers differ from those of full ones in length or rotation.
    fn swa_differs(&self, heads: &Heads, n_rope_dims: u32) -> Result<bool, ArchitectureError> {
        let differs = |key: &str, same: u32| Ok(self.optional(key, same.into(), 0, MAX_WIDTH)? != same);
        Ok(differs("attention.key_length_swa", heads.key_length)?
            || differs("attention.value_length_swa", heads.value_length)?
            || differs("rope.dimension_count_swa", n_rope_dims)?)
    }

    /// The numbers whose multiples stages may begin at.
    fn steps(&self, rules: &Rules) -> Vec<u32> {
        let step = |step: &Step| match step {
            Step::Of(n) => *n,
            Step::Key(key) => self.get(key).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok()).unwrap_or(1),
        };
        rules.steps.iter().map(step).filter(|step| *step > 1).collect()
    }

    fn check_rope(&self) -> Result<(), ArchitectureError> {
        match self.get("rope.scaling.type") {
            None => Ok(()),
            Some(Value::String(name)) if ["none", "linear", "yarn", "longrope"].contains(&name.as_str()) => Ok(()),
            Some(value) => Err(self.wrong("rope.scaling.type", describe(value), "none, linear, yarn or longrope")),
        }
    }

    /// How many there are, and how many of them a row uses in each layer; no list if there are none.
    fn experts(&self, rules: &Rules, n_layers: u32) -> Result<(u32, Vec<u32>), ArchitectureError> {
        let (min, max) = match rules.experts {
            Experts::Never => (0, 0),
            Experts::Optional => (0, MAX_EXPERTS),
            Experts::Always => (1, MAX_EXPERTS),
        };
        let n_experts = self.optional("expert_count", 0, min, max)?;
        let key = "expert_used_count";
        let used = match (self.per_layer(key, n_layers, 0, n_experts.into())?, n_experts) {
            (Some(used), _) if n_experts > 0 && !used.iter().any(|n| *n > 0) => {
                return Err(self.wrong(key, "0 in all layers", format!("1 to {n_experts} in some")));
            }
            (Some(used), _) => used,
            (None, 0) => Vec::new(),
            (None, _) => return Err(self.missing(key)),
        };
        let n_groups = self.optional("expert_group_count", 0, 0, u64::from(n_experts.saturating_sub(1)))?;
        if n_groups > 1 {
            if !n_experts.is_multiple_of(n_groups) {
                return Err(self.wrong("expert_group_count", n_groups, format!("a divisor of {n_experts} experts")));
            }
            self.required("expert_group_used_count", 1, u64::from(n_groups - 1))?;
        }
        self.per_layer("expert_feed_forward_length", n_layers, 0, MAX_WIDTH)?;
        Ok((n_experts, used))
    }

    fn sliding_window(&self, rules: &Rules, n_layers: u32) -> Result<Option<SlidingWindow>, ArchitectureError> {
        let Sliding::Pattern { period, dense_first, window } = rules.sliding else { return Ok(None) };
        let key = "attention.sliding_window";
        let n_tokens = match window {
            Window::Told => self.required(key, 1, MAX_CONTEXT)?,
            Window::Default(default) => self.optional(key, default.into(), 1, MAX_CONTEXT)?,
            Window::Optional | Window::Separable => self.optional(key, 0, 0, MAX_CONTEXT)?,
        };
        if n_tokens == 0 {
            return Ok(None);
        }
        let key = "attention.sliding_window_pattern";
        let every = |period: u32| {
            let slides = |layer: u32| match (period, dense_first) {
                (0, _) => true,
                (_, true) => !layer.is_multiple_of(period),
                (_, false) => layer % period < period - 1,
            };
            (0..n_layers).map(slides).collect()
        };
        let slides: Vec<bool> = match (self.flags(key, n_layers)?, self.get(key)) {
            (Some(flags), _) => flags,
            (None, None) if period == 0 => return Err(self.missing(key)),
            (None, None) => every(period),
            (None, Some(value)) => every(self.number(key, value, 0, MAX_LAYERS)?),
        };
        if !slides.contains(&true) {
            return Err(self.wrong(key, "without a sliding layer", "at least one, since there is a window"));
        }
        Ok(Some(SlidingWindow { n_tokens, slides, is_separable: window == Window::Separable }))
    }

    /// The vocabulary, where it is told, must have as many tokens as the embedding has rows, each once, and be of a
    /// kind that the architectures here use. libllama ends the process over what is refused here.
    fn check_vocabulary(&self, n_vocab: u32) -> Result<(), ArchitectureError> {
        let wrong = |key: &str, found: String, expected: String| {
            Err(ArchitectureError::Value { key: format!("tokenizer.ggml.{key}"), found, expected })
        };
        let kind = self.metadata.str("tokenizer.ggml.model");
        if let Some(kind) = kind.filter(|kind| !TOKENIZERS.contains(kind)) {
            return wrong("model", format!("{:?}", kind.chars().take(80).collect::<String>()), TOKENIZERS.join(", "));
        }
        let Some(Array::Strings(tokens)) = self.metadata.array("tokenizer.ggml.tokens") else { return Ok(()) };
        if tokens.len() as u64 != u64::from(n_vocab) {
            let expected = format!("{n_vocab} tokens, one for each row of token_embd.weight");
            return wrong("tokens", format!("a list of {} tokens", tokens.len()), expected);
        }
        let mut seen = HashSet::with_capacity(tokens.len());
        for (i, token) in tokens.iter().enumerate() {
            let text = String::from_utf8_lossy(token).chars().take(80).collect::<String>();
            if token.contains(&0) {
                return wrong("tokens", format!("a zero byte in token {i}"), "texts without zero bytes".to_owned());
            }
            // libllama names empty ones by their number.
            if !token.is_empty() && !seen.insert(token) {
                return wrong(
                    "tokens",
                    format!("{text:?} twice, the second time as token {i}"),
                    "each once".to_owned(),
                );
            }
        }
        let has_byte = |byte: u8| seen.contains(format!("<0x{byte:02X}>").as_bytes());
        match (0..=u8::MAX).find(|byte| kind == Some("llama") && !has_byte(*byte)) {
            Some(byte) => {
                wrong("tokens", format!("no token <0x{byte:02X}>"), "one for each of the 256 bytes".to_owned())
            }
            None => Ok(()),
        }
    }
}

/// Kinds of tokenizers: byte-level BPE and its kin, SentencePiece of both kinds, WordPiece, and none, which stages
/// have.
const TOKENIZERS: [&str; 10] =
    ["gpt2", "llama", "bert", "t5", "rwkv", "plamo2", "gemma4", "hybriddna", "whitespace", "no_vocab"];

fn describe(value: &Value) -> String {
    match value {
        Value::Array(array) => format!("an array of {} values", array.len()),
        Value::String(text) => format!("{:?}", text.chars().take(80).collect::<String>()),
        other => other.as_u64().map_or_else(|| format!("{other:?}"), |n| n.to_string()),
    }
}

/// Looks at an architecture's tensors.
struct Tensors<'a> {
    catalog: &'a Catalog,
    rules: &'static Rules,
}

impl Tensors<'_> {
    /// The vocabulary's size: the rows of the token embedding, which must be `n_embd` wide, and so must the head.
    fn n_vocab(&self, n_embd: u32) -> Result<u32, ArchitectureError> {
        let name = "token_embd.weight";
        let missing = || ArchitectureError::MissingTensor { name: name.to_owned() };
        let embedding = self.catalog.tensor(name).ok_or_else(missing)?;
        let shape = |name: &str, found: &[u64], expected: String| ArchitectureError::Shape {
            name: name.to_owned(),
            found: found.to_vec(),
            expected,
        };
        let n_vocab = match *embedding.dims {
            [width, rows] if width == u64::from(n_embd) && rows <= MAX_VOCABULARY => rows as u32,
            _ => return Err(shape(name, &embedding.dims, format!("[{n_embd}, up to {MAX_VOCABULARY}]"))),
        };
        for (name, dims) in [
            ("output_norm.weight", vec![u64::from(n_embd)]),
            ("output.weight", vec![u64::from(n_embd), u64::from(n_vocab)]),
        ] {
            match self.catalog.tensor(name) {
                Some(tensor) if tensor.dims != dims => return Err(shape(name, &tensor.dims, format!("{dims:?}"))),
                _ => {}
            }
        }
        Ok(n_vocab)
    }

    /// Each layer has tensors unless it is bare, and there is nothing that no stage would take.
    fn check_layers(
        &self,
        n_layers: u32,
        n_blocks: u32,
        is_bare: impl Fn(u32) -> bool,
    ) -> Result<(), ArchitectureError> {
        let bytes = self.catalog.bytes_per_layer();
        let is_empty = |layer: &u32| bytes.get(*layer as usize).is_none_or(|bytes| *bytes == 0);
        if let Some(layer) = (0..n_layers).find(|layer| is_empty(layer) && !is_bare(*layer)) {
            return Err(ArchitectureError::MissingTensor { name: format!("blk.{layer}.attn_norm.weight") });
        }
        let is_whole = !self.rules.whole.is_empty();
        let unknown = self.catalog.tensors().iter().find(|tensor| match self.rules.role_of(&tensor.name) {
            TensorRole::Layer(layer) => layer >= n_blocks,
            TensorRole::Other => !is_whole,
            TensorRole::TokenEmbedding => tensor.name != "token_embd.weight",
            // libllama would stop at a tensor that it does not ask for.
            TensorRole::Head => self.rules.always_tied && tensor.name == "output.weight",
            TensorRole::EveryStage | TensorRole::Input => false,
        });
        match unknown {
            Some(tensor) => {
                Err(ArchitectureError::UnknownTensor { name: tensor.name.clone(), architecture: self.rules.name })
            }
            None => Ok(()),
        }
    }

    fn bytes_of(&self, role: TensorRole) -> u64 {
        let tensors = self.catalog.tensors().iter().filter(|tensor| self.rules.role_of(&tensor.name) == role);
        tensors.map(|tensor| tensor.n_bytes).fold(0, u64::saturating_add)
    }
}
