//! What metadata makes a tiny model of each architecture that the pinned libllama knows: a row per architecture, and
//! more rows where it builds other graphs for other metadata.
//!
//! A recipe is the [`BASE`] shape, then its groups, then its own keys; a later value of a key wins. Keys stand without
//! the architecture's prefix, all values are facts that libllama's loaders ask for. Rows are multiples of 256 values
//! where that is possible, so that every weight type fits; windows are shorter than the tokens of a run.

use brigade_gguf::{Array, Metadata, Value};

use self::V::{B, Cycle, CycleB, CycleF, F, U, Us};

/// Tokens of the vocabulary.
pub const N_VOCAB: u32 = 112;

/// A metadata value.
#[derive(Debug, Clone, Copy)]
pub enum V {
    U(u32),
    F(f32),
    B(bool),
    Us(&'static [u32]),
    /// One element per layer, by turns.
    Cycle(&'static [u32]),
    CycleF(&'static [f32]),
    CycleB(&'static [bool]),
}

/// A key without the architecture's prefix, and its value.
type Key = (&'static str, V);

/// How to make one model.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    /// `general.architecture`.
    pub arch: &'static str,
    /// What sets it apart from other recipes of the architecture; empty for the first.
    pub variant: &'static str,
    /// Layers: at least two periods of the pattern.
    pub n_layers: u32,
    /// Another number of layers.
    pub more_layers: Option<u32>,
    groups: &'static [&'static [Key]],
    keys: &'static [Key],
    /// Tensors that are left out: whole names, or ends that begin with a dot.
    pub without: &'static [&'static str],
    /// Why no model is made of it.
    pub problem: Option<&'static str>,
    /// Why Brigade refuses it, where it does.
    pub refusal: Option<&'static str>,
}

const fn of(arch: &'static str, n_layers: u32, groups: &'static [&'static [Key]]) -> Recipe {
    let more_layers = Some(n_layers + 3);
    Recipe { arch, variant: "", n_layers, more_layers, groups, keys: &[], without: &[], problem: None, refusal: None }
}

const fn none(arch: &'static str, problem: &'static str) -> Recipe {
    Recipe { problem: Some(problem), ..of(arch, 4, &[]) }
}

impl Recipe {
    const fn keys(self, keys: &'static [Key]) -> Self {
        Self { keys, ..self }
    }

    const fn variant(self, variant: &'static str) -> Self {
        Self { variant, ..self }
    }

    const fn without(self, without: &'static [&'static str]) -> Self {
        Self { without, ..self }
    }

    const fn refused(self, why: &'static str) -> Self {
        Self { refusal: Some(why), ..self }
    }

    /// Only this number of layers makes such a model.
    const fn fixed(self) -> Self {
        Self { more_layers: None, ..self }
    }

    /// The architecture, with the variant behind it.
    pub fn name(&self) -> String {
        if self.variant.is_empty() { self.arch.to_owned() } else { format!("{}-{}", self.arch, self.variant) }
    }

    /// The metadata of the model with `n_layers` layers.
    pub fn metadata(&self, n_layers: u32) -> Metadata {
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", self.arch);
        metadata.set("general.name", format!("tiny {}", self.name()).as_str());
        metadata.set("general.quantization_version", 2);
        metadata.set("tokenizer.ggml.model", "no_vocab");
        let groups = [BASE].into_iter().chain(self.groups.iter().copied()).chain([self.keys]);
        for (key, value) in groups.flatten() {
            let is_global = key.starts_with("xielu.") || key.starts_with("tokenizer.");
            let key = if is_global { (*key).to_owned() } else { format!("{}.{key}", self.arch) };
            metadata.set(key, value.resolve(n_layers));
        }
        metadata.set(format!("{}.block_count", self.arch), n_layers);
        metadata
    }
}

impl V {
    fn resolve(self, n_layers: u32) -> Value {
        fn cycle<T: Copy>(values: &[T], n: u32) -> Vec<T> {
            values.iter().copied().cycle().take(n as usize).collect()
        }
        match self {
            U(n) => n.into(),
            F(x) => x.into(),
            B(b) => b.into(),
            Us(values) => Array::of_u32(values).into(),
            Cycle(values) => Array::of_u32(&cycle(values, n_layers)).into(),
            CycleF(values) => Array::of_f32(&cycle(values, n_layers)).into(),
            CycleB(values) => Array::of_bool(&cycle(values, n_layers)).into(),
        }
    }
}

const BASE: &[Key] = &[
    ("vocab_size", U(N_VOCAB)),
    ("context_length", U(256)),
    ("embedding_length", U(256)),
    ("feed_forward_length", U(512)),
    ("attention.head_count", U(4)),
    ("attention.head_count_kv", U(2)),
    ("attention.layer_norm_rms_epsilon", F(1e-5)),
    ("attention.layer_norm_epsilon", F(1e-5)),
];

/// As many heads of keys and values as of queries.
const MHA: &[Key] = &[("attention.head_count_kv", U(4))];

/// Texts of two kinds, as encoders know them.
const SEGMENTS: &[Key] = &[("tokenizer.ggml.token_type_count", U(2))];

/// A narrow model, where the number of layers matters and must be large.
const NARROW: &[Key] =
    &[("embedding_length", U(64)), ("feed_forward_length", U(96)), ("expert_feed_forward_length", U(32))];

/// Heads of another width than `embedding_length / head_count`.
const WIDE_HEADS: &[Key] = &[("attention.key_length", U(32)), ("attention.value_length", U(32))];

/// A mixture of experts.
const MOE: &[Key] = &[("expert_count", U(4)), ("expert_used_count", U(2)), ("expert_feed_forward_length", U(256))];

/// Experts that every token passes.
const SHARED: &[Key] = &[("expert_shared_count", U(1)), ("expert_shared_feed_forward_length", U(512))];

/// The first layer has no experts.
const LEAD: &[Key] = &[("leading_dense_block_count", U(1))];

const SOFTMAX: &[Key] = &[("expert_gating_func", U(1))];
const SIGMOID: &[Key] =
    &[("expert_gating_func", U(2)), ("expert_weights_norm", B(true)), ("expert_weights_scale", F(1.5))];

/// A window that a run of a few dozen tokens leaves behind.
const WINDOW: &[Key] = &[("attention.sliding_window", U(12))];

/// The factors of Granite.
const SCALES: &[Key] =
    &[("logit_scale", F(4.0)), ("residual_scale", F(0.5)), ("embedding_scale", F(3.0)), ("attention.scale", F(0.125))];

/// Latent attention: one latent row per token, absorbed into the query.
const MLA: &[Key] = &[
    ("attention.head_count_kv", U(1)),
    ("attention.q_lora_rank", U(256)),
    ("attention.kv_lora_rank", U(256)),
    ("attention.key_length", U(288)),
    ("attention.value_length", U(256)),
    ("attention.key_length_mla", U(96)),
    ("attention.value_length_mla", U(64)),
    ("rope.dimension_count", U(32)),
];

/// The same, as narrow as [`NARROW`].
const NARROW_MLA: &[Key] = &[
    ("attention.kv_lora_rank", U(64)),
    ("attention.key_length", U(80)),
    ("attention.value_length", U(64)),
    ("attention.key_length_mla", U(48)),
    ("attention.value_length_mla", U(32)),
    ("rope.dimension_count", U(16)),
];

/// Chooses the past tokens that attention sees.
const INDEXER: &[Key] = &[
    ("attention.indexer.head_count", U(2)),
    ("attention.indexer.key_length", U(64)),
    ("attention.indexer.top_k", U(8)),
];

const MAMBA: &[Key] =
    &[("ssm.conv_kernel", U(4)), ("ssm.inner_size", U(512)), ("ssm.state_size", U(16)), ("ssm.time_step_rank", U(16))];
const MAMBA2: &[Key] = &[
    ("ssm.conv_kernel", U(4)),
    ("ssm.inner_size", U(512)),
    ("ssm.state_size", U(32)),
    ("ssm.time_step_rank", U(8)),
    ("ssm.group_count", U(2)),
];

/// Gated delta net: 4 heads of values, 2 of keys.
const DELTA: &[Key] = &[
    ("ssm.conv_kernel", U(4)),
    ("ssm.inner_size", U(256)),
    ("ssm.state_size", U(64)),
    ("ssm.time_step_rank", U(4)),
    ("ssm.group_count", U(2)),
];

/// Kimi delta attention.
const KDA: &[Key] = &[("ssm.conv_kernel", U(4)), ("kda.head_dim", U(64))];

/// Rotation by several positions; the sum is half of a head.
const SECTIONS: &[Key] = &[("rope.dimension_sections", Us(&[12, 10, 10, 0]))];

/// Every fourth layer attends, the others keep a state.
const HYBRID: &[Key] = &[("attention.head_count_kv", Cycle(&[0, 0, 2, 0]))];
const HYBRID_MLA: &[Key] = &[("attention.head_count_kv", Cycle(&[0, 0, 0, 1]))];

const WKV6: &[Key] = &[
    ("attention.head_count", U(0)),
    ("attention.head_count_kv", U(0)),
    ("wkv.head_size", U(64)),
    ("time_mix_extra_dim", U(32)),
    ("time_decay_extra_dim", U(64)),
];
const WKV7: &[Key] = &[
    ("attention.head_count", U(0)),
    ("attention.head_count_kv", U(0)),
    ("wkv.head_size", U(64)),
    ("attention.decay_lora_rank", U(32)),
    ("attention.iclr_lora_rank", U(32)),
    ("attention.value_residual_mix_lora_rank", U(32)),
    ("attention.gate_lora_rank", U(64)),
];

/// Streams of hidden states beside each other.
const HYPER: &[Key] = &[
    ("hyper_connection.count", U(4)),
    ("hyper_connection.sinkhorn_iterations", U(2)),
    ("hyper_connection.epsilon", F(1e-6)),
];

const DIFFUSION: &str = "it writes a text in no order, by diffusion";
const ENCODER: &str = "its encoder is a model of its own beside the decoder";
const STREAMS: &str = "more than one hidden state of each token passes from layer to layer";

/// Every recipe, in the order of libllama's own list.
pub const ALL: &[Recipe] = &[
    none("clip", "libllama loads it beside a language model only"),
    of("llama", 4, &[]),
    of("llama", 5, &[MOE]).variant("experts"),
    of("llama", 4, &[]).variant("tied").without(&["output.weight", "rope_freqs.weight", ".bias"]),
    of("llama4", 16, &[MOE, SHARED]).keys(&[("interleave_moe_layer_step", U(2))]),
    of("deci", 4, &[]),
    // A layer that attends, one that only multiplies, one without either, and one that does nothing at all.
    of("deci", 10, &[]).variant("bare").keys(&[
        ("attention.head_count", Cycle(&[4, 4, 0, 0])),
        ("attention.head_count_kv", Cycle(&[2, 0, 0, 0])),
        ("feed_forward_length", Cycle(&[512, 256, 512, 0])),
    ]),
    of("falcon", 4, &[]),
    of("grok", 4, &[MOE]),
    of("gpt2", 4, &[MHA]),
    none("gptj", "libllama knows its name only"),
    of("gptneox", 4, &[MHA]).keys(&[("use_parallel_residual", B(false))]),
    of("gptneox", 4, &[MHA]).variant("parallel").keys(&[("use_parallel_residual", B(true))]),
    of("mpt", 4, &[MHA]).keys(&[("attention.max_alibi_bias", F(8.0)), ("attention.clamp_kqv", F(4.0))]),
    of("baichuan", 4, &[MHA]),
    of("starcoder", 4, &[]),
    of("refact", 4, &[]),
    of("bert", 4, &[MHA, SEGMENTS]),
    of("modern-bert", 12, &[MHA, WINDOW]),
    of("nomic-bert", 4, &[MHA, SEGMENTS]),
    of("nomic-bert-moe", 8, &[MHA, MOE, SEGMENTS]).keys(&[("moe_every_n_layers", U(2))]),
    of("neo-bert", 4, &[MHA]),
    of("jina-bert-v2", 4, &[MHA, SEGMENTS]),
    of("jina-bert-v3", 4, &[MHA, SEGMENTS]),
    of("eurobert", 4, &[MHA]),
    of("bloom", 4, &[MHA]),
    of("stablelm", 4, &[]),
    of("qwen", 4, &[MHA]).keys(&[("feed_forward_length", U(1024))]),
    of("qwen2", 4, &[]),
    of("qwen2moe", 4, &[MOE, SHARED]),
    of("qwen2vl", 4, &[SECTIONS]),
    of("qwen3", 4, &[]),
    of("qwen3moe", 4, &[MOE]),
    of("qwen3next", 16, &[MOE, SHARED, DELTA]).keys(&[("rope.dimension_count", U(16))]),
    of("qwen3vl", 6, &[SECTIONS]).keys(&[("n_deepstack_layers", U(3))]),
    of("qwen3vlmoe", 6, &[SECTIONS, MOE]).keys(&[("n_deepstack_layers", U(3))]),
    of("qwen35", 16, &[DELTA, SECTIONS]),
    of("qwen35moe", 16, &[DELTA, SECTIONS, MOE, SHARED]),
    none("clef", "it decides between options, and writes no text"),
    of("qwen4exp", 8, &[DELTA, SECTIONS, MOE, SHARED, HYPER, INDEXER])
        .keys(&[("hyper_connection.low_rank", U(8)), ("attention.compress_ratios", Cycle(&[4]))]),
    of("phi2", 4, &[MHA]).keys(&[("rope.dimension_count", U(32))]),
    of("phi3", 4, &[]),
    of("phimoe", 4, &[MOE]),
    of("plamo", 4, &[]),
    of("plamo2", 16, &[MAMBA2, HYBRID]).keys(&[
        ("attention.key_length", U(64)),
        ("attention.value_length", U(64)),
        ("ssm.group_count", U(0)),
    ]),
    of("plamo3", 16, &[WINDOW]),
    of("codeshell", 4, &[]),
    of("orion", 4, &[]),
    of("internlm2", 4, &[]),
    of("minicpm", 4, &[]),
    of("minicpm", 4, &[MOE]).variant("experts"),
    of("minicpm3", 4, &[MHA]).keys(&[
        ("attention.q_lora_rank", U(256)),
        ("attention.kv_lora_rank", U(256)),
        ("attention.key_length", U(96)),
        ("rope.dimension_count", U(32)),
    ]),
    of("gemma", 4, &[]),
    of("gemma2", 8, &[WINDOW]).keys(&[("attn_logit_softcapping", F(50.0)), ("final_logit_softcapping", F(30.0))]),
    of("gemma2", 46, &[WINDOW, NARROW]).variant("46").fixed(),
    of("gemma2", 46, &[WINDOW, NARROW, WIDE_HEADS]).variant("27b").fixed(),
    of("gemma3", 13, &[WINDOW]).keys(&[("rope.freq_base_swa", F(1000.0))]),
    of("gemma3", 62, &[WINDOW, NARROW]).variant("62").fixed(),
    of("gemma3", 62, &[WINDOW, NARROW, WIDE_HEADS]).variant("27b").fixed(),
    of("gemma3n", 30, &[WINDOW]).fixed().keys(&[
        ("embedding_length", U(64)),
        ("feed_forward_length", U(96)),
        ("attention.head_count", U(2)),
        ("attention.head_count_kv", U(1)),
    ]),
    of("gemma4", 10, &[WINDOW]).keys(&[
        ("attention.sliding_window_pattern", CycleB(&[true, true, true, true, false])),
        ("embedding_length_per_layer_input", U(32)),
        ("attention.shared_kv_layers", U(0)),
        ("attention.key_length_swa", U(64)),
        ("attention.value_length_swa", U(64)),
        ("rope.freq_base_swa", F(1000.0)),
    ]),
    of("gemma4", 10, &[WINDOW]).variant("26b").keys(&[
        ("attention.sliding_window_pattern", CycleB(&[true, true, true, true, false])),
        ("embedding_length_per_layer_input", U(0)),
        ("attention.shared_kv_layers", U(0)),
        ("attention.key_length_swa", U(64)),
        ("attention.value_length_swa", U(64)),
        ("rope.freq_base_swa", F(1000.0)),
    ]),
    none("gemma4-assistant", "a draft that reads another model's state"),
    of("gemma-embedding", 24, &[WINDOW]),
    of("starcoder2", 4, &[]),
    of("mamba", 4, &[MAMBA]).keys(&[("attention.head_count", U(0)), ("feed_forward_length", U(0))]),
    of("mamba2", 4, &[MAMBA2]).keys(&[("attention.head_count", U(0)), ("feed_forward_length", U(0))]),
    of("maple", 8, &[MOE, WINDOW])
        .keys(&[("attention.sliding_window_pattern", CycleB(&[true, false])), ("swiglu_clamp_exp", CycleF(&[7.0]))]),
    of("jamba", 16, &[MAMBA, HYBRID]),
    of("jamba", 16, &[MAMBA, HYBRID, MOE]).variant("experts"),
    of("falcon-h1", 4, &[MAMBA2]),
    of("xverse", 4, &[]),
    of("command-r", 4, &[]).keys(&[("logit_scale", F(0.25))]),
    of("command-r", 64, &[NARROW]).variant("64").fixed().keys(&[("logit_scale", F(0.25))]),
    of("cohere2", 8, &[WINDOW]).keys(&[("logit_scale", F(0.25))]),
    of("cohere2moe", 9, &[WINDOW, MOE, SHARED, LEAD, SIGMOID]).keys(&[("logit_scale", F(0.25))]),
    of("dbrx", 4, &[MOE]).keys(&[("attention.clamp_kqv", F(8.0))]),
    of("olmo", 4, &[]).keys(&[("attention.clamp_kqv", F(8.0))]),
    of("olmo2", 4, &[]),
    of("olmo2", 8, &[WINDOW]).variant("window"),
    of("olmoe", 4, &[MOE, MHA]),
    of("muse-glimmer", 8, &[WINDOW]).keys(&[("logit_scale", F(0.5))]),
    of("openelm", 4, &[]).keys(&[
        ("attention.head_count", Cycle(&[4, 4, 8, 8])),
        ("attention.head_count_kv", Cycle(&[2, 2, 4, 4])),
        ("feed_forward_length", Cycle(&[256, 512, 512, 768])),
        ("attention.key_length", U(64)),
        ("attention.value_length", U(64)),
    ]),
    of("arctic", 4, &[MOE]),
    of("deepseek", 5, &[MOE, SHARED, LEAD, MHA]).keys(&[("expert_weights_scale", F(1.0))]),
    of("deepseek2", 5, &[MOE, SHARED, LEAD, SIGMOID, MLA])
        .keys(&[("expert_group_count", U(2)), ("expert_group_used_count", U(1))]),
    of("deepseek2", 61, &[MOE, SHARED, LEAD, SIGMOID, MLA, NARROW, NARROW_MLA]).variant("61").fixed().keys(&[
        ("attention.q_lora_rank", U(64)),
        ("expert_group_count", U(2)),
        ("expert_group_used_count", U(1)),
    ]),
    of("deepseek2", 27, &[MOE, SHARED, LEAD, SOFTMAX, MLA, NARROW, NARROW_MLA]).variant("lite").fixed(),
    of("deepseek2-ocr", 5, &[MOE, SHARED, LEAD, MHA]),
    of("deepseek32", 5, &[MOE, SHARED, LEAD, SIGMOID, MLA, INDEXER]),
    of("deepseek4", 8, &[MOE, SHARED, WINDOW, HYPER, INDEXER])
        .keys(&[
            ("attention.head_count_kv", U(1)),
            ("attention.key_length", U(64)),
            ("attention.value_length", U(64)),
            ("rope.dimension_count", U(32)),
            ("attention.q_lora_rank", U(256)),
            ("attention.output_group_count", U(2)),
            ("attention.output_lora_rank", U(64)),
            ("attention.compress_ratios", Cycle(&[0, 4])),
            ("attention.compress_rope_freq_base", F(160_000.0)),
            ("hash_layer_count", U(0)),
            ("swiglu_clamp_exp", F(10.0)),
            ("expert_gating_func", U(4)),
            ("expert_weights_norm", B(true)),
            ("expert_weights_scale", F(1.0)),
        ])
        .refused(STREAMS),
    of("chatglm", 4, &[]).keys(&[("rope.dimension_count", U(32))]),
    of("glm4", 4, &[]).keys(&[("rope.dimension_count", U(32))]),
    of("glm4", 4, &[SECTIONS]).variant("sections"),
    of("glm4moe", 5, &[MOE, SHARED, LEAD, SIGMOID]),
    of("glm-dsa", 5, &[MOE, SHARED, LEAD, SIGMOID, MLA, INDEXER]),
    of("bitnet", 4, &[]),
    of("t5", 4, &[MHA]).keys(&[("attention.relative_buckets_count", U(8))]).refused(ENCODER),
    of("t5encoder", 4, &[MHA]).keys(&[("attention.relative_buckets_count", U(8))]).refused(ENCODER),
    of("jais", 4, &[MHA]).keys(&[("attention.max_alibi_bias", F(8.0))]),
    of("jais2", 4, &[]),
    of("nemotron", 4, &[]).keys(&[("rope.dimension_count", U(32))]),
    of("nemotron_h", 16, &[MAMBA2])
        .keys(&[("attention.head_count_kv", Cycle(&[0, 0, 2, 0])), ("feed_forward_length", Cycle(&[0, 512, 0, 512]))]),
    of("nemotron_h_moe", 16, &[MAMBA2, MOE, SHARED, SIGMOID])
        .keys(&[("attention.head_count_kv", Cycle(&[0, 0, 2, 0])), ("feed_forward_length", Cycle(&[0, 512, 0, 512]))]),
    of("nemotron_h_moe", 16, &[MAMBA2, MOE, SHARED, SIGMOID]).variant("counts").keys(&[
        ("attention.head_count_kv", Cycle(&[0, 0, 2, 0])),
        ("feed_forward_length", Cycle(&[0, 512, 0, 512])),
        ("expert_used_count", Cycle(&[0, 2, 0, 1])),
    ]),
    of("exaone", 4, &[]),
    of("exaone4", 4, &[]),
    of("exaone4", 64, &[WINDOW, NARROW]).variant("64").fixed(),
    of("exaone-moe", 9, &[WINDOW, MOE, SHARED, LEAD, SIGMOID]),
    of("rwkv6", 4, &[WKV6]).keys(&[("rescale_every_n_layers", U(2))]),
    of("rwkv6qwen2", 4, &[WKV6])
        .keys(&[("token_shift_count", U(1)), ("attention.head_count_kv", U(2))])
        .without(&[".time_mix_first.weight"])
        .refused("it has no rules yet"),
    of("rwkv7", 4, &[WKV7]),
    of("arwkv7", 4, &[WKV7]).keys(&[("token_shift_count", U(1))]),
    of("granite", 4, &[SCALES]),
    of("granite", 4, &[SCALES, MOE]).variant("experts"),
    of("granitemoe", 4, &[SCALES, MOE]),
    of("granitemoe", 4, &[SCALES, MOE, SHARED]).variant("shared"),
    of("granitehybrid", 16, &[SCALES, MAMBA2, HYBRID]),
    of("granitehybrid", 16, &[SCALES, MAMBA2, HYBRID, MOE, SHARED]).variant("experts"),
    of("graniteswitch", 4, &[SCALES])
        .keys(&[
            ("adapters.count", U(2)),
            ("adapters.lora_rank", U(8)),
            ("adapters.token_ids_activate", Us(&[100, 101])),
            ("adapters.token_ids_substitute", Us(&[1, 2])),
        ])
        .refused("the tokens choose adapters in every layer"),
    of("granite_swa", 8, &[SCALES, WINDOW])
        .keys(&[("attention.sliding_window_pattern", CycleB(&[true, true, true, false]))]),
    of("chameleon", 4, &[]).keys(&[("vocab_size", U(10_240))]),
    none("wavtokenizer-dec", "makes sound, not text"),
    of("plm", 4, &[MHA]).keys(&[
        ("attention.kv_lora_rank", U(256)),
        ("attention.key_length", U(96)),
        ("attention.value_length", U(64)),
        ("rope.dimension_count", U(32)),
    ]),
    of("bailingmoe", 5, &[MOE, SHARED, LEAD]),
    of("bailingmoe2", 5, &[MOE, SHARED, LEAD, SIGMOID]),
    of("bailingmoe3", 16, &[MOE, SHARED, LEAD, SIGMOID, MLA, KDA, HYBRID_MLA])
        .keys(&[("kda.safe_gate", B(true)), ("kda.gate_lower_bound", F(-5.0))]),
    of("dots1", 5, &[MOE, SHARED, LEAD, SIGMOID, MHA]),
    of("dots3note", 5, &[MOE, SHARED, LEAD, SIGMOID, MLA, INDEXER, WINDOW])
        .keys(&[
            ("attention.kv_lora_rank_swa", U(256)),
            ("attention.key_length_mla_swa", U(96)),
            ("attention.value_length_mla_swa", U(64)),
            ("rope.freq_base_swa", F(1000.0)),
            ("attention.sliding_window_pattern", CycleB(&[true, false])),
            ("attention.indexer.types", CycleB(&[true])),
        ])
        .refused("its two kinds of latent attention are not known yet"),
    of("arcee", 4, &[]),
    of("afmoe", 16, &[WINDOW, MOE, SHARED, LEAD, SIGMOID]),
    of("laguna", 9, &[WINDOW, MOE, SHARED, LEAD, SIGMOID]),
    of("ernie4_5", 4, &[]),
    of("ernie4_5-moe", 5, &[MOE, SHARED, LEAD]).keys(&[("interleave_moe_layer_step", U(1))]),
    of("hunyuan-moe", 4, &[MOE, SHARED]),
    of("hunyuan-dense", 4, &[]),
    of("hunyuan_vl", 4, &[SECTIONS]),
    of("hy_v3", 5, &[MOE, SHARED, LEAD, SIGMOID]),
    of("hy_v4", 5, &[MOE, SHARED, LEAD, SIGMOID, MLA, HYPER, INDEXER])
        .keys(&[("hyper_connection.magnitude", F(1.0)), ("attention.indexer.types", CycleB(&[true]))]),
    of("smollm3", 16, &[]),
    of("gpt-oss", 8, &[MOE, WINDOW]),
    of("lfm2", 16, &[HYBRID]).keys(&[("shortconv.l_cache", U(3))]),
    of("lfm2moe", 16, &[HYBRID, MOE, LEAD, SIGMOID]).keys(&[("shortconv.l_cache", U(3))]),
    of("dream", 4, &[]).refused(DIFFUSION),
    of("smallthinker", 16, &[MOE, WINDOW, SIGMOID]),
    of("llada", 4, &[]).refused(DIFFUSION),
    of("llada-moe", 4, &[MOE]).refused(DIFFUSION),
    of("seed_oss", 4, &[]),
    of("grovemoe", 4, &[MOE]).keys(&[
        ("expert_chunk_feed_forward_length", U(256)),
        ("expert_group_scale", F(0.05)),
        ("experts_per_group", U(2)),
    ]),
    of("apertus", 4, &[]).keys(&[
        ("xielu.alpha_n", F(0.8)),
        ("xielu.alpha_p", F(0.8)),
        ("xielu.beta", F(0.5)),
        ("xielu.eps", F(-1e-6)),
    ]),
    of("minimax-01", 16, &[MOE]).keys(&[("residual_scale", F(2.0))]),
    of("minimax-01", 16, &[MOE])
        .variant("interval")
        .keys(&[("residual_scale", F(2.0)), ("full_attention_interval", U(4))]),
    of("hrm_text", 8, &[])
        .fixed()
        .keys(&[
            ("hrm.layers_per_stack", U(2)),
            ("hrm.h_cycles", U(2)),
            ("hrm.l_cycles", U(1)),
            ("embedding_scale", F(2.0)),
        ])
        .refused("its layers are run more than once"),
    of("minimax-m2", 4, &[MOE, SIGMOID]),
    of("minimax-m3", 5, &[MOE, SHARED, LEAD, SIGMOID]).keys(&[
        ("rope.dimension_count", U(32)),
        ("attention.indexer.head_count", U(2)),
        ("attention.indexer.key_length", U(64)),
        ("attention.indexer.top_k", U(2)),
        ("attention.indexer.block_size", U(4)),
        ("attention.indexer.local_blocks", U(1)),
    ]),
    of("cogvlm", 4, &[MHA]),
    of("rnd1", 4, &[MOE]).refused(DIFFUSION),
    of("pangu-embedded", 4, &[]),
    of("mistral3", 4, &[]),
    of("mistral3", 4, &[MOE]).variant("experts"),
    none("eagle3", "a draft that reads another model's state"),
    none("dflash", "a draft that reads another model's state"),
    of("mistral4", 5, &[MOE, SHARED, LEAD, SIGMOID, MLA])
        .keys(&[("expert_group_count", U(2)), ("expert_group_used_count", U(1))]),
    of("paddleocr", 4, &[SECTIONS]),
    of("mimo2", 8, &[MOE, WINDOW, SIGMOID]).keys(&[("attention.sliding_window_pattern", CycleB(&[false, true]))]),
    of("step35", 8, &[MOE, SHARED, WINDOW, SIGMOID])
        .keys(&[("attention.sliding_window_pattern", CycleB(&[false, true, true, true]))]),
    of("spark2_5", 8, &[WINDOW]).keys(&[("attention.sliding_window_pattern", CycleB(&[true, false]))]),
    of("llama-embed", 4, &[]),
    of("maincoder", 4, &[]),
    of("kimi-linear", 16, &[MOE, SHARED, LEAD, SIGMOID, MLA, KDA, HYBRID_MLA]),
    of("kimi-k3", 8, &[MOE, SHARED, LEAD, SIGMOID, MLA, KDA, HYBRID_MLA]).keys(&[
        ("attn_res.block_size", U(4)),
        ("activation.situ_beta", F(4.0)),
        ("activation.situ_linear_beta", F(25.0)),
        ("expert_latent_length", U(256)),
        ("kda.gate_lower_bound", F(-5.0)),
    ]),
    of("glm5-next", 8, &[MOE, SHARED, LEAD, SIGMOID, MLA, KDA, HYBRID_MLA, HYPER, INDEXER])
        .keys(&[
            ("attention.key_length", U(256)),
            ("rope.dimension_count", U(0)),
            ("attention.indexer.kpool", U(4)),
            ("kda.gate_lower_bound", F(-5.0)),
        ])
        .refused(STREAMS),
    of("talkie", 4, &[]).keys(&[("logit_scale", F(0.5))]),
    of("mellum", 8, &[MOE, WINDOW]),
    of("nanbeige", 4, &[]).keys(&[("num_loops", U(2))]),
    none("qwen3tts", "makes sound, not text"),
    none("pockettts", "makes sound, not text"),
];
