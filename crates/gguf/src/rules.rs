//! What a stage of each architecture needs beyond renumbered layers: one row per architecture.
//!
//! The rows follow llama.cpp's `src/models/*.cpp`; `docs/architectures.md` shows what came of each when it was run
//! whole and cut. An architecture without a row is refused, never run wrong: its graph may use token ids in every
//! layer, or constants that depend on the number of layers.

use crate::catalog::TensorRole;

/// What the graph does with its input rows before the first layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    /// Nothing.
    Plain,
    /// It multiplies rows that it looked up from tokens itself by `sqrt(n_embd)`; given rows are taken as they are.
    ScaledTokens,
    /// It changes all rows, given ones too: a scale, a norm, embeddings of positions. The node with this name holds
    /// what enters the first layer; with a `+` behind it, the first sum of that node and another one.
    Changed(&'static str),
    /// It multiplies all rows by what this key says; 0 means that it does not.
    Scaled(&'static str),
    /// As `Changed` if the model has this tensor, else `Plain`.
    ChangedWith { node: &'static str, tensor: &'static str },
    /// It ends the process over given rows: it must look rows up itself. The node with this name holds them.
    LookedUp(&'static str),
    /// It takes tokens alone, which its layers need too.
    Tokens,
    /// As `Tokens` if this key is not 0, else as `ScaledTokens`.
    TokensIf(&'static str),
}

/// Which layers attend to a window of the past only. libllama reads `attention.sliding_window_pattern` as a list with a
/// flag for each layer or as a period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sliding {
    /// None, even if the metadata names a window (phi3: libllama ignores it).
    Never,
    /// All but the last of each `period`, or all but the first with `dense_first`, where the pattern is not told; a
    /// period of 0 means that it must be.
    Pattern { period: u32, dense_first: bool, window: Window },
}

/// When a pattern of sliding layers counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Window {
    /// The metadata must name a window.
    Told,
    /// There always is one: this long if the metadata names none.
    Default(u32),
    /// Where the metadata names one that is not 0. A model without it computes in another way, so a stage must have a
    /// sliding layer if the model has one.
    Optional,
    /// As `Optional`, but full layers compute the same without a window.
    Separable,
}

/// Which layers keep a state that each token changes for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recurrent {
    None,
    /// All, and none has a KV cache.
    All,
    /// All, beside a KV cache.
    Beside,
    /// Those without KV heads.
    NoKvHeads,
    /// Those with neither KV heads nor a feed-forward part; a layer with the latter has no state at all.
    NoKvHeadsNoFeedForward,
    /// `attention.recurrent_layers` tells, else all but the last of each `full_attention_interval`, or of each so many
    /// where that is missing.
    Interval(u32),
}

/// Whether layers route to experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Experts {
    Never,
    Optional,
    Always,
}

/// What a layer does by its place, in a way that the metadata of a stage cannot tell: a stage then begins at a
/// multiple.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// A multiple of this many layers.
    Of(u32),
    /// A multiple of what this key says; of 1 where it is missing.
    Key(&'static str),
}

/// A factor of each layer that libllama works out from the number of layers. A stage has fewer, and is told.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Factor {
    /// Of queries: `1/sqrt(n_embd / n_head)` in a model with this many layers, `1/sqrt(key_length)` in all others.
    Queries(u32),
    /// This divided by the root of the number of layers.
    OverRootOfLayers(f32),
    /// Of layers that keep a state: from 1 in the first layer of the model to 0 in the last one, and a little more.
    Falling,
}

/// Which models of an architecture cannot be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whole {
    Always(&'static str),
    /// Those with this many layers.
    Layers(u32, &'static str),
    /// Those with this many layers or more.
    From(u32, &'static str),
    /// Those whose metadata has this key with a number above this one.
    Above(u32, &'static str, &'static str),
}

/// Where the hidden state behind the last layer of a stage is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// In the node with this name, a dash and the number of the layer.
    Numbered(&'static str),
    /// In the node with this name.
    Named(&'static str),
    /// In the sum of the node with this name, a dash and the number of the layer, and another one. It has no name
    /// itself.
    Sum(&'static str),
}

/// The rules of one architecture.
#[derive(Debug)]
pub(crate) struct Rules {
    /// `general.architecture`, and the prefix of its keys.
    pub name: &'static str,
    pub input: Input,
    pub sliding: Sliding,
    pub recurrent: Recurrent,
    pub experts: Experts,
    pub steps: &'static [Step],
    /// Any of which keeps a model whole.
    pub whole: &'static [Whole],
    /// The graph asserts that keys and values have the same length.
    pub same_key_value_length: bool,
    /// The graph asserts that all dimensions of a head are rotated.
    pub rotates_whole_head: bool,
    /// All layers must have as many heads as the first.
    pub uniform_heads: bool,
    /// The loader takes the head from `token_embd.weight` even if there is an `output.weight`.
    pub always_tied: bool,
    /// The final norm is called `token_embd_norm`.
    pub norm_is_token_embd_norm: bool,
    /// It sees a text from both ends: there is neither a KV cache nor a head.
    pub is_encoder: bool,
    /// Factors by the number of layers, and the nodes that they are found at (see `brigade_base::LayerScale`).
    pub scales: &'static [(&'static str, Factor)],
    /// The node behind a layer that holds the hidden state.
    pub stop: Stop,
    /// Numbers of layers by which libllama recognises a kind of model; no stage may have so many, unless the model has.
    pub recognised: &'static [u32],
    /// A number of layers by which it does so where there are so many tokens.
    pub recognised_with_tokens: Option<(u32, u32)>,
    /// Layers may have neither attention nor a feed-forward part, and no tensors then.
    pub has_bare_layers: bool,
}

/// Attention whose head sizes are free.
const FREE: Rules = Rules {
    name: "",
    input: Input::Plain,
    sliding: Sliding::Never,
    recurrent: Recurrent::None,
    experts: Experts::Optional,
    steps: &[],
    whole: &[],
    same_key_value_length: false,
    rotates_whole_head: false,
    uniform_heads: false,
    always_tied: false,
    norm_is_token_embd_norm: false,
    is_encoder: false,
    scales: &[],
    stop: Stop::Numbered("l_out"),
    recognised: &[],
    recognised_with_tokens: None,
    has_bare_layers: false,
};

/// Latent attention in which libllama knows small models by how many layers they have, and others from the rest.
const LATENT: Rules = Rules { recognised: &[26, 27], recognised_with_tokens: Some((48, 128_256)), ..FREE };

/// Embeddings of positions and token types with a norm before the first layer, and a norm at the end of each.
const ENCODER: Rules = Rules {
    input: Input::Changed("inp_norm-0"),
    same_key_value_length: true,
    is_encoder: true,
    stop: Stop::Named("result_embd"),
    ..FREE
};

/// Norms at the beginning of each part of a layer, and one behind the last.
const PRE_NORM_ENCODER: Rules = Rules { input: Input::Plain, stop: Stop::Sum("ffn_inp"), ..ENCODER };

/// Attention of equal heads, all of which rotate whole.
const PLAIN: Rules = Rules {
    experts: Experts::Never,
    same_key_value_length: true,
    rotates_whole_head: true,
    uniform_heads: true,
    ..FREE
};

const fn sliding(period: u32, window: Window) -> Sliding {
    Sliding::Pattern { period, dense_first: false, window }
}

const fn full_first(period: u32, window: Window) -> Sliding {
    Sliding::Pattern { period, dense_first: true, window }
}

const MINICPM3: Factor = Factor::OverRootOfLayers(1.4);

const TOKENS: &str = "its layers use the tokens themselves, not only hidden states";
const STREAMS: &str = "more than one hidden state per token passes from layer to layer";
const FIRST_LAYER: &str = "all its layers use what the first one got or computed";

#[rustfmt::skip]
const RULES: &[Rules] = &[
    Rules { name: "llama", experts: Experts::Optional, ..PLAIN },
    Rules { name: "qwen2", ..PLAIN },
    Rules { name: "qwen3", ..PLAIN },
    Rules { name: "qwen3moe", experts: Experts::Always, ..PLAIN },
    Rules {
        name: "gemma2",
        input: Input::Changed("inp_scaled"),
        sliding: sliding(2, Window::Default(4096)),
        experts: Experts::Never,
        uniform_heads: true,
        always_tied: true,
        scales: &[("Qcur", Factor::Queries(46))],
        ..FREE
    },
    Rules {
        name: "gemma3",
        input: Input::ScaledTokens,
        sliding: sliding(6, Window::Separable),
        experts: Experts::Never,
        uniform_heads: true,
        scales: &[("Qcur", Factor::Queries(62))],
        ..FREE
    },
    Rules { name: "phi3", rotates_whole_head: false, ..PLAIN },

    // Input rows that the graph changes.
    Rules { name: "granite", input: Input::Scaled("embedding_scale"), ..FREE },
    Rules { name: "granitemoe", input: Input::Scaled("embedding_scale"), ..FREE },
    Rules { name: "granitehybrid", input: Input::Scaled("embedding_scale"), recurrent: Recurrent::NoKvHeads, ..FREE },
    Rules { name: "granite_swa", input: Input::Scaled("embedding_scale"), sliding: sliding(0, Window::Told), ..FREE },
    Rules { name: "minicpm", input: Input::Scaled("embedding_scale"), ..FREE },
    Rules { name: "grok", input: Input::Scaled("embedding_scale"), ..FREE },
    Rules {
        name: "minicpm3",
        input: Input::Changed("inp_scaled"),
        scales: &[("hidden_scaled", MINICPM3), ("hidden_scaled_ffn", MINICPM3)],
        ..FREE
    },
    Rules { name: "gemma", input: Input::Changed("inp_scaled"), always_tied: true, ..FREE },

    Rules { name: "gpt2", input: Input::Changed("inpL"), ..FREE },
    Rules { name: "starcoder", input: Input::Changed("inpL"), ..FREE },
    Rules { name: "bloom", input: Input::Changed("inp_norm-0"), ..FREE },
    Rules { name: "talkie", input: Input::Changed("inp_norm"), whole: &[Whole::Always(FIRST_LAYER)], ..FREE },
    Rules { name: "muse-glimmer", input: Input::Changed("embd_norm"), sliding: sliding(4, Window::Told), ..FREE },
    Rules { name: "mpt", input: Input::ChangedWith { node: "inpL", tensor: "position_embd.weight" }, ..FREE },

    // Patterns of sliding layers.
    Rules { name: "cohere2", sliding: sliding(4, Window::Told), always_tied: true, ..FREE },
    Rules { name: "cohere2moe", sliding: full_first(4, Window::Told), ..FREE },
    Rules { name: "gpt-oss", sliding: sliding(2, Window::Told), ..FREE },
    Rules { name: "olmo2", sliding: sliding(4, Window::Optional), ..FREE },
    Rules {
        name: "exaone4",
        whole: &[Whole::Layers(64, "libllama knows its sliding layers by their number alone")],
        recognised: &[64],
        ..FREE
    },
    Rules { name: "exaone-moe", sliding: sliding(4, Window::Told), ..FREE },
    Rules {
        name: "afmoe",
        input: Input::Changed("inp_embd_scaled"),
        sliding: sliding(4, Window::Optional),
        steps: &[Step::Of(4)],
        ..FREE
    },
    Rules { name: "plamo3", sliding: sliding(8, Window::Optional), ..FREE },
    Rules { name: "laguna", sliding: full_first(4, Window::Optional), ..FREE },
    Rules { name: "mellum", sliding: sliding(4, Window::Optional), ..FREE },
    Rules { name: "maple", sliding: sliding(0, Window::Told), ..FREE },
    Rules { name: "mimo2", sliding: sliding(0, Window::Told), ..FREE },
    Rules { name: "step35", sliding: sliding(0, Window::Told), stop: Stop::Named("h_nextn"), ..FREE },
    Rules { name: "spark2_5", sliding: sliding(0, Window::Told), ..FREE },
    Rules {
        name: "smallthinker", sliding: full_first(4, Window::Optional), steps: &[Step::Of(4)], recognised: &[4], ..FREE
    },
    Rules {
        name: "llama4",
        sliding: sliding(4, Window::Default(8192)),
        steps: &[Step::Of(4), Step::Key("interleave_moe_layer_step")],
        ..FREE
    },

    // What a layer does by its number.
    Rules { name: "smollm3", steps: &[Step::Of(4)], ..FREE },
    Rules { name: "ernie4_5-moe", steps: &[Step::Key("interleave_moe_layer_step")], ..FREE },
    Rules { name: "ernie4_5", ..FREE },
    Rules { name: "paddleocr", ..FREE },
    Rules {
        name: "baichuan",
        whole: &[Whole::Always("libllama knows its two sizes by their number of layers alone")],
        ..FREE
    },

    // Recurrent and hybrid.
    Rules { name: "mamba", recurrent: Recurrent::All, ..FREE },
    Rules { name: "mamba2", recurrent: Recurrent::All, ..FREE },
    Rules { name: "jamba", recurrent: Recurrent::NoKvHeads, ..FREE },
    Rules { name: "falcon-h1", recurrent: Recurrent::Beside, ..FREE },
    Rules { name: "plamo2", recurrent: Recurrent::NoKvHeads, stop: Stop::Numbered("ffn_residual"), ..FREE },
    Rules { name: "lfm2", recurrent: Recurrent::NoKvHeads, norm_is_token_embd_norm: true, ..FREE },
    Rules { name: "lfm2moe", recurrent: Recurrent::NoKvHeads, norm_is_token_embd_norm: true, ..FREE },
    Rules {
        name: "nemotron_h",
        recurrent: Recurrent::NoKvHeadsNoFeedForward,
        stop: Stop::Numbered("nemotron_h_block_out"),
        ..FREE
    },
    Rules {
        name: "nemotron_h_moe",
        recurrent: Recurrent::NoKvHeadsNoFeedForward,
        stop: Stop::Numbered("nemotron_h_block_out"),
        ..FREE
    },
    Rules { name: "qwen3next", recurrent: Recurrent::Interval(4), ..FREE },
    Rules { name: "qwen35", recurrent: Recurrent::Interval(4), ..FREE },
    Rules { name: "qwen35moe", recurrent: Recurrent::Interval(4), ..FREE },
    Rules {
        name: "minimax-01",
        recurrent: Recurrent::Interval(8),
        scales: &[
            ("slopes", Factor::Falling),
            ("q_decay_exp", Factor::Falling),
            ("k_decay_exp", Factor::Falling),
            ("diag_decay_exp", Factor::Falling),
        ],
        ..FREE
    },
    Rules { name: "kimi-linear", recurrent: Recurrent::NoKvHeads, ..FREE },
    Rules { name: "bailingmoe3", recurrent: Recurrent::NoKvHeads, ..FREE },
    Rules {
        name: "rwkv6",
        input: Input::Changed("norm_w-0+"),
        recurrent: Recurrent::All,
        // Hidden states are halved behind each so many layers.
        steps: &[Step::Key("rescale_every_n_layers")],
        ..FREE
    },
    Rules { name: "rwkv7", recurrent: Recurrent::All, whole: &[Whole::Always(FIRST_LAYER)], ..FREE },
    Rules { name: "arwkv7", recurrent: Recurrent::All, whole: &[Whole::Always(FIRST_LAYER)], ..FREE },

    // Latent attention.
    Rules { name: "deepseek2", ..LATENT },
    Rules { name: "mistral4", ..LATENT },
    Rules { name: "plm", always_tied: true, ..FREE },
    Rules { name: "deepseek2-ocr", ..FREE },
    Rules { name: "deepseek32", ..FREE },
    Rules { name: "glm-dsa", ..FREE },
    Rules { name: "minimax-m3", ..FREE },

    // Plain decoders.
    Rules { name: "mistral3", ..FREE },
    Rules { name: "deci", has_bare_layers: true, ..FREE },
    Rules { name: "falcon", ..FREE },
    Rules { name: "gptneox", ..FREE },
    Rules { name: "refact", ..FREE },
    Rules { name: "stablelm", ..FREE },
    Rules { name: "qwen", ..FREE },
    Rules { name: "qwen2moe", ..FREE },
    Rules { name: "qwen2vl", ..FREE },
    Rules { name: "qwen3vl", ..FREE },
    Rules { name: "qwen3vlmoe", ..FREE },
    Rules { name: "phi2", ..FREE },
    Rules { name: "phimoe", ..FREE },
    Rules { name: "plamo", ..FREE },
    Rules { name: "codeshell", ..FREE },
    Rules { name: "orion", ..FREE },
    Rules { name: "internlm2", ..FREE },
    Rules { name: "starcoder2", ..FREE },
    Rules { name: "xverse", ..FREE },
    Rules {
        name: "command-r",
        always_tied: true,
        whole: &[Whole::From(64, "libllama knows by their number of layers that its queries are normed")],
        ..FREE
    },
    Rules { name: "dbrx", ..FREE },
    Rules { name: "olmo", ..FREE },
    Rules { name: "olmoe", ..FREE },
    Rules { name: "openelm", always_tied: true, ..FREE },
    Rules { name: "arctic", ..FREE },
    Rules { name: "deepseek", ..FREE },
    Rules { name: "chatglm", ..FREE },
    Rules { name: "glm4", input: Input::LookedUp("embd"), ..FREE },
    Rules { name: "glm4moe", input: Input::LookedUp("embd"), ..FREE },
    Rules { name: "bitnet", always_tied: true, ..FREE },
    Rules { name: "jais", ..FREE },
    Rules { name: "jais2", ..FREE },
    Rules { name: "nemotron", ..FREE },
    Rules { name: "exaone", ..FREE },
    Rules { name: "bailingmoe", ..FREE },
    Rules { name: "bailingmoe2", ..FREE },
    Rules { name: "dots1", ..FREE },
    Rules { name: "arcee", ..FREE },
    Rules { name: "hunyuan-moe", ..FREE },
    Rules { name: "hunyuan-dense", ..FREE },
    Rules { name: "hunyuan_vl", ..FREE },
    Rules { name: "hy_v3", ..FREE },
    Rules { name: "seed_oss", ..FREE },
    Rules { name: "grovemoe", ..FREE },
    Rules { name: "apertus", ..FREE },
    Rules { name: "minimax-m2", ..FREE },
    Rules { name: "pangu-embedded", ..FREE },
    Rules { name: "maincoder", ..FREE },

    // Models that embed texts.
    Rules { name: "bert", ..ENCODER },
    Rules { name: "jina-bert-v2", ..ENCODER },
    Rules { name: "jina-bert-v3", ..ENCODER },
    Rules { name: "nomic-bert", ..ENCODER },
    Rules { name: "nomic-bert-moe", steps: &[Step::Key("moe_every_n_layers")], ..ENCODER },
    Rules { name: "neo-bert", ..PRE_NORM_ENCODER },
    Rules { name: "eurobert", ..PRE_NORM_ENCODER },
    Rules {
        name: "modern-bert", input: Input::Changed("inp_norm-0"), sliding: full_first(3, Window::Separable),
        whole: &[Whole::Above(0, "decision.block_count", "its last layers are run more than once")], ..PRE_NORM_ENCODER
    },
    Rules {
        name: "gemma-embedding", input: Input::ScaledTokens, sliding: sliding(6, Window::Told),
        stop: Stop::Numbered("l_out"), ..ENCODER
    },
    Rules { name: "llama-embed", ..FREE },

    // Whole only.
    Rules {
        name: "gemma3n",
        input: Input::Tokens,
        sliding: sliding(5, Window::Told),
        whole: &[Whole::Always(TOKENS)],
        ..FREE
    },
    Rules {
        name: "gemma4",
        input: Input::TokensIf("embedding_length_per_layer_input"),
        sliding: sliding(0, Window::Told),
        whole: &[
            Whole::Above(0, "embedding_length_per_layer_input", TOKENS),
            Whole::Above(0, "attention.shared_kv_layers", "its last layers read the KV cache of others"),
        ],
        // libllama insists on two layers.
        recognised: &[1],
        ..FREE
    },
    Rules { name: "hy_v4", whole: &[Whole::Always(STREAMS)], ..FREE },
    Rules { name: "kimi-k3", recurrent: Recurrent::NoKvHeads, whole: &[Whole::Always(STREAMS)], ..FREE },
    Rules {
        name: "qwen4exp",
        input: Input::Tokens,
        recurrent: Recurrent::Interval(4),
        whole: &[Whole::Always(TOKENS)],
        ..FREE
    },
    Rules { name: "chameleon", whole: &[Whole::Always("it was not tried in parts")], ..FREE },
    Rules {
        name: "cogvlm",
        input: Input::Tokens,
        whole: &[Whole::Always("its layers take given rows for images")],
        ..FREE
    },
    Rules { name: "nanbeige", whole: &[Whole::Above(1, "num_loops", "its layers are run more than once")], ..FREE },
    ];

impl Rules {
    /// Whether layers keep a key for each token beside those of attention, by which they choose.
    pub(crate) fn has_index(&self) -> bool {
        matches!(self.name, "deepseek32" | "glm-dsa" | "hy_v4" | "minimax-m3" | "qwen4exp")
    }

    /// Whether libllama knows a model of this architecture by how many layers, and how many tokens, it has.
    pub(crate) fn recognises(&self, n_layers: u32, n_vocab: u32) -> bool {
        self.recognised.contains(&n_layers) || self.recognised_with_tokens == Some((n_layers, n_vocab))
    }

    /// Which part of a model needs the tensor `name`.
    pub(crate) fn role_of(&self, name: &str) -> TensorRole {
        match TensorRole::of(name) {
            TensorRole::Input if self.norm_is_token_embd_norm && name.starts_with("token_embd_norm.") => {
                TensorRole::Head
            }
            role => role,
        }
    }
}

/// The rules for `name`.
pub(crate) fn rules_of(name: &str) -> Option<&'static Rules> {
    RULES.iter().find(|rules| rules.name == name)
}

/// The architectures that can be run.
pub fn supported_architectures() -> impl Iterator<Item = &'static str> {
    RULES.iter().map(|rules| rules.name)
}
