//! A model's hyperparameters, resolved as libllama resolves them and checked before it sees them.
//!
//! libllama answers an unsound hyperparameter by ending the process. So everything that its asserts look at is checked
//! here: a model for which [`Architecture::of`] succeeds does not trip them.

use std::collections::HashSet;

use crate::catalog::{Catalog, TensorRole};
use crate::rules::{Experts, Rules, Sliding, rules_of, supported_architectures};
use crate::stage::zero_type;
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

/// Bytes of one element of the KV cache (F16).
const KV_ELEMENT_BYTES: u64 = 2;

/// Why a model cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages explain the fields")]
pub enum ArchitectureError {
    #[error("models of architecture {found:?} cannot be cut yet; supported are {}", supported_list())]
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

fn supported_list() -> String {
    supported_architectures().collect::<Vec<_>>().join(", ")
}

/// Which layers of a model attend to a window only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlidingWindow {
    /// Tokens that a sliding layer sees.
    pub n_tokens: u32,
    /// For each layer, whether it slides.
    pub slides: Vec<bool>,
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
    /// Attention heads per layer.
    pub n_head: Vec<u32>,
    /// Heads of keys and values per layer.
    pub n_head_kv: Vec<u32>,
    /// Width of one head's key.
    pub key_length: u32,
    /// Width of one head's value.
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

        let n_layers = keys.required("block_count", 1, MAX_LAYERS)?;
        let n_embd = keys.required("embedding_length", 1, MAX_WIDTH)?;
        let n_ctx_train = keys.required("context_length", 1, MAX_CONTEXT)?;
        let n_head = keys.per_layer("attention.head_count", n_layers, 1, MAX_HEADS)?;
        let n_head = n_head.ok_or_else(|| keys.missing("attention.head_count"))?;
        let n_head_kv = keys.per_layer("attention.head_count_kv", n_layers, 1, MAX_HEADS)?;
        let n_head_kv = n_head_kv.unwrap_or_else(|| n_head.clone());
        let n_ff = keys.per_layer("feed_forward_length", n_layers, 0, MAX_WIDTH)?;
        keys.check_heads(&n_head, &n_head_kv)?;
        let default_length = u64::from(n_embd / n_head.first().copied().unwrap_or(1));
        let key_length = keys.optional("attention.key_length", default_length, 1, MAX_WIDTH)?;
        let value_length = keys.optional("attention.value_length", default_length, 1, MAX_WIDTH)?;
        let n_rope_dims = keys.optional("rope.dimension_count", key_length.into(), 1, MAX_WIDTH)?;
        keys.check_lengths(rules, key_length, value_length, n_rope_dims)?;
        keys.check_rope()?;
        let (n_experts, n_experts_used) = keys.experts(rules, n_layers)?;
        let sliding_window = keys.sliding_window(rules, n_layers)?;
        keys.optional("nextn_predict_layers", 0, 0, 0)?;

        let tensors = Tensors { catalog, rules };
        let n_vocab = tensors.n_vocab(n_embd)?;
        keys.check_vocabulary(n_vocab)?;
        tensors.check_layers(n_layers)?;
        let embedding_bytes = catalog.tensor("token_embd.weight").map_or(0, |tensor| tensor.n_bytes);
        let tied_head = rules.always_tied || catalog.tensor("output.weight").is_none();
        let untied_bytes = tensors.bytes_of(TensorRole::Head);
        Ok(Self {
            name: rules.name,
            n_layers,
            n_embd,
            n_head,
            n_head_kv,
            key_length,
            value_length,
            n_ff: n_ff.unwrap_or_else(|| vec![0; n_layers as usize]),
            n_vocab,
            n_ctx_train,
            n_experts,
            n_experts_used,
            sliding_window,
            n_rope_dims,
            tied_head,
            layer_bytes: catalog.bytes_per_layer(),
            embedding_bytes,
            expert_bytes: expert_bytes(catalog),
            n_weights: catalog.n_parameters(),
            head_bytes: if tied_head { untied_bytes.saturating_add(embedding_bytes) } else { untied_bytes },
            rules,
        })
    }

    /// Bytes that one token takes in the KV cache of `layer` (keys and values in F16); 0 for a layer that is not there.
    pub fn kv_bytes_per_token(&self, layer: u32) -> u64 {
        let n_head_kv = self.n_head_kv.get(layer as usize).copied().unwrap_or(0);
        u64::from(n_head_kv) * (u64::from(self.key_length) + u64::from(self.value_length)) * KV_ELEMENT_BYTES
    }

    /// Where the model may be cut: layer `c` in the list can be the first of a stage. Any set of them is legal. Empty
    /// for a model that must stay whole.
    pub fn cut_points(&self) -> Vec<u32> {
        if !self.is_cuttable() {
            return Vec::new();
        }
        match (&self.sliding_window, self.rules.sliding) {
            // Each stage begins with a sliding layer, except for the first, which has one further on.
            (Some(SlidingWindow { slides, .. }), Sliding::Pattern { default_window: Some(_), .. }) => {
                let first = slides.iter().position(|slides| *slides).unwrap_or(slides.len());
                (1..self.n_layers).filter(|cut| *cut as usize > first && slides[*cut as usize]).collect()
            }
            _ => (1..self.n_layers).collect(),
        }
    }

    fn is_cuttable(&self) -> bool {
        match self.rules.attention_scale {
            // Cutting such a model may change the attention scale, and nothing can make up for that.
            Some(scale) if !scale.by_query_norm && self.n_layers >= scale.n_layers => {
                self.head_width() == self.key_length
            }
            _ => true,
        }
    }

    /// `n_embd / n_head`, which some graphs use in place of the key length.
    fn head_width(&self) -> u32 {
        self.n_embd / self.n_head.first().copied().unwrap_or(1).max(1)
    }

    /// By how much the attention scale of the whole model is larger than what libllama takes for a stage of
    /// `n_stage_layers`; 1 if they are equal.
    pub(crate) fn attention_scale_ratio(&self, n_stage_layers: u32) -> f64 {
        let Some(scale) = self.rules.attention_scale else { return 1.0 };
        let divisor = |n_layers| if n_layers == scale.n_layers { self.head_width() } else { self.key_length };
        let (whole, stage) = (divisor(self.n_layers), divisor(n_stage_layers));
        (f64::from(stage) / f64::from(whole)).sqrt()
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

/// Reads an architecture's keys.
struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'static str,
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

    fn optional(&self, key: &str, default: u64, min: u64, max: u64) -> Result<u32, ArchitectureError> {
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

    /// All graphs here take the number of heads from layer 0, and share each key among a whole number of queries.
    fn check_heads(&self, n_head: &[u32], n_head_kv: &[u32]) -> Result<(), ArchitectureError> {
        for (key, counts) in [("attention.head_count", n_head), ("attention.head_count_kv", n_head_kv)] {
            if counts.windows(2).any(|pair| pair[0] != pair[1]) {
                return Err(self.wrong(key, "different from layer to layer", "the same number in all layers"));
            }
        }
        match n_head.iter().zip(n_head_kv).find(|(q, kv)| !q.is_multiple_of(**kv)) {
            Some((q, kv)) => Err(self.wrong("attention.head_count_kv", kv, format!("a divisor of the {q} heads"))),
            None => Ok(()),
        }
    }

    fn check_lengths(&self, rules: &Rules, key: u32, value: u32, rope: u32) -> Result<(), ArchitectureError> {
        if rules.same_key_value_length && value != key {
            return Err(self.wrong("attention.value_length", value, format!("the key length, {key}")));
        }
        if rope > key || !rope.is_multiple_of(2) {
            return Err(self.wrong("rope.dimension_count", rope, format!("an even number of at most {key}")));
        }
        if rules.rotates_whole_head && rope != key {
            return Err(self.wrong("rope.dimension_count", rope, format!("the key length, {key}")));
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

    fn check_rope(&self) -> Result<(), ArchitectureError> {
        match self.get("rope.scaling.type") {
            None => Ok(()),
            Some(Value::String(name)) if ["none", "linear", "yarn", "longrope"].contains(&name.as_str()) => Ok(()),
            Some(value) => Err(self.wrong("rope.scaling.type", describe(value), "none, linear, yarn or longrope")),
        }
    }

    fn experts(&self, rules: &Rules, n_layers: u32) -> Result<(u32, u32), ArchitectureError> {
        let (min, max) = match rules.experts {
            Experts::Never => (0, 0),
            Experts::Optional => (0, MAX_EXPERTS),
            Experts::Always => (1, MAX_EXPERTS),
        };
        let n_experts = self.optional("expert_count", 0, min, max)?;
        let min_used = u64::from(n_experts > 0);
        let used = self.per_layer("expert_used_count", n_layers, min_used, n_experts.into())?;
        let n_used = match (used, n_experts) {
            (Some(used), _) => used.into_iter().max().unwrap_or(0),
            (None, 0) => 0,
            (None, _) => return Err(self.missing("expert_used_count")),
        };
        let n_groups = self.optional("expert_group_count", 0, 0, u64::from(n_experts.saturating_sub(1)))?;
        if n_groups > 1 {
            if !n_experts.is_multiple_of(n_groups) {
                return Err(self.wrong("expert_group_count", n_groups, format!("a divisor of {n_experts} experts")));
            }
            self.required("expert_group_used_count", 1, u64::from(n_groups - 1))?;
        }
        self.per_layer("expert_feed_forward_length", n_layers, 0, MAX_WIDTH)?;
        Ok((n_experts, n_used))
    }

    fn sliding_window(&self, rules: &Rules, n_layers: u32) -> Result<Option<SlidingWindow>, ArchitectureError> {
        let Sliding::Pattern { period, default_window } = rules.sliding else { return Ok(None) };
        let (default, min) = default_window.map_or((0, 0), |n_tokens| (n_tokens, 1));
        let n_tokens = self.optional("attention.sliding_window", default.into(), min, MAX_CONTEXT)?;
        if n_tokens == 0 {
            return Ok(None);
        }
        let key = "attention.sliding_window_pattern";
        let every = |period: u32| (0..n_layers).map(|layer| period == 0 || layer % period < period - 1).collect();
        let slides: Vec<bool> = match self.get(key) {
            None => every(period),
            Some(Value::Array(Array::Scalars(scalars))) if scalars.len() == n_layers as usize => {
                let slides = scalars.iter().map(|value| match value {
                    Value::Bool(slides) => Ok(slides),
                    other => self.number(key, &other, 0, 1).map(|n| n == 1),
                });
                slides.collect::<Result<_, _>>()?
            }
            Some(value @ Value::Array(_)) => {
                return Err(self.wrong(key, describe(value), format!("one bool for each of the {n_layers} layers")));
            }
            Some(value) => every(self.number(key, value, 0, MAX_LAYERS)?),
        };
        if !slides.contains(&true) {
            return Err(self.wrong(key, "without a sliding layer", "at least one, since there is a window"));
        }
        Ok(Some(SlidingWindow { n_tokens, slides }))
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

/// Kinds of tokenizers: byte-level BPE, SentencePiece, and none, which stages have.
const TOKENIZERS: [&str; 3] = ["gpt2", "llama", "no_vocab"];

fn describe(value: &Value) -> String {
    match value {
        Value::Array(array) => format!("an array of {} values", array.len()),
        Value::String(text) => format!("{:?}", text.chars().take(80).collect::<String>()),
        Value::U64(n) => n.to_string(),
        other => format!("{other:?}"),
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
                None if name == "output_norm.weight" => {
                    return Err(ArchitectureError::MissingTensor { name: name.to_owned() });
                }
                _ => {}
            }
        }
        Ok(n_vocab)
    }

    /// Each layer has its tensors, and there is nothing that no stage would take.
    fn check_layers(&self, n_layers: u32) -> Result<(), ArchitectureError> {
        for layer in 0..n_layers {
            let name = format!("blk.{layer}.attn_norm.weight");
            if self.catalog.tensor(&name).is_none() {
                return Err(ArchitectureError::MissingTensor { name });
            }
        }
        let unknown = self.catalog.tensors().iter().find(|tensor| match TensorRole::of(&tensor.name) {
            TensorRole::Layer(layer) => layer >= n_layers,
            TensorRole::Other => true,
            TensorRole::TokenEmbedding => tensor.name != "token_embd.weight",
            // libllama would stop at a tensor that it does not ask for.
            TensorRole::Head => self.rules.always_tied && tensor.name == "output.weight",
            TensorRole::EveryStage => false,
        });
        match unknown {
            Some(tensor) => {
                Err(ArchitectureError::UnknownTensor { name: tensor.name.clone(), architecture: self.rules.name })
            }
            None => Ok(()),
        }
    }

    fn bytes_of(&self, role: TensorRole) -> u64 {
        let tensors = self.catalog.tensors().iter().filter(|tensor| TensorRole::of(&tensor.name) == role);
        tensors.map(|tensor| tensor.n_bytes).fold(0, u64::saturating_add)
    }
}
