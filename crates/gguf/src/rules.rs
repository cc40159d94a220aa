//! What a stage of each architecture needs beyond renumbered layers: one row per architecture that was read and tried.
//!
//! The rows follow llama.cpp's `src/models/*.cpp`. An architecture without a row is refused, never run wrong: its graph
//! may use token ids in every layer, or constants that depend on the number of layers.

/// Where libllama multiplies the input of the first layer by `sqrt(n_embd)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EmbeddingScale {
    /// Nowhere.
    Never,
    /// On rows that it looked up from tokens itself; given rows are taken as they are.
    TokensOnly,
    /// On all rows, given ones too.
    AllRows,
}

/// Which layers attend to a window of the past only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sliding {
    /// None, even if the metadata names a window (phi3: libllama ignores it).
    Never,
    /// All but the last of each `period`. Without a `default_window`, none where the metadata names no window or one of
    /// 0, so that a stage of full layers alone is possible; with one, libllama insists on a sliding layer.
    Pattern { period: u32, default_window: Option<u32> },
}

/// Whether layers route to experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Experts {
    Never,
    Optional,
    Always,
}

/// libllama recognises one size of a model by its number of layers and scales its attention by
/// `1/sqrt(n_embd / n_head)`, all others by `1/sqrt(key_length)`. A stage has another number of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttentionScale {
    /// The number of layers that it recognises.
    pub n_layers: u32,
    /// Whether the query passes a norm whose weights can take up the difference (`attn_q_norm`).
    pub by_query_norm: bool,
}

/// The rules of one architecture.
#[derive(Debug)]
pub(crate) struct Rules {
    /// `general.architecture`, and the prefix of its keys.
    pub name: &'static str,
    pub embedding_scale: EmbeddingScale,
    pub sliding: Sliding,
    pub experts: Experts,
    /// The graph asserts that keys and values have the same length.
    pub same_key_value_length: bool,
    /// The graph asserts that all dimensions of a head are rotated.
    pub rotates_whole_head: bool,
    /// The loader takes the head from `token_embd.weight` even if there is an `output.weight`.
    pub always_tied: bool,
    pub attention_scale: Option<AttentionScale>,
}

const PLAIN: Rules = Rules {
    name: "",
    embedding_scale: EmbeddingScale::Never,
    sliding: Sliding::Never,
    experts: Experts::Never,
    same_key_value_length: true,
    rotates_whole_head: true,
    always_tied: false,
    attention_scale: None,
};

const RULES: &[Rules] = &[
    Rules { name: "llama", experts: Experts::Optional, ..PLAIN },
    Rules { name: "qwen2", ..PLAIN },
    Rules { name: "qwen3", ..PLAIN },
    Rules { name: "qwen3moe", experts: Experts::Always, ..PLAIN },
    Rules {
        name: "gemma2",
        embedding_scale: EmbeddingScale::AllRows,
        sliding: Sliding::Pattern { period: 2, default_window: Some(4096) },
        same_key_value_length: false,
        rotates_whole_head: false,
        always_tied: true,
        attention_scale: Some(AttentionScale { n_layers: 46, by_query_norm: false }),
        ..PLAIN
    },
    Rules {
        name: "gemma3",
        embedding_scale: EmbeddingScale::TokensOnly,
        sliding: Sliding::Pattern { period: 6, default_window: None },
        same_key_value_length: false,
        rotates_whole_head: false,
        attention_scale: Some(AttentionScale { n_layers: 62, by_query_norm: true }),
        ..PLAIN
    },
    Rules { name: "phi3", rotates_whole_head: false, ..PLAIN },
];

/// The rules for `name`.
pub(crate) fn rules_of(name: &str) -> Option<&'static Rules> {
    RULES.iter().find(|rules| rules.name == name)
}

/// The architectures that can be cut into stages.
pub fn supported_architectures() -> impl Iterator<Item = &'static str> {
    RULES.iter().map(|rules| rules.name)
}
