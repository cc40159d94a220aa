//! Tiny random models of each architecture, written as GGUF by hand: an oracle that shares no code with `brigade-gguf`.

use std::path::Path;

use brigade_engine::{Stage, StageOptions, quantize_rows};

pub const N_VOCAB: usize = 96;
const N_HEAD: u64 = 4;
const N_HEAD_KV: u64 = 2;
const N_FF: u64 = 160;
const N_EXPERT: u64 = 4;
/// Tokens of a session, and learned positions.
const N_CTX: u64 = 512;

const F32: u32 = 0;
const F16: u32 = 1;
const Q4_0: u32 = 2;
pub const Q8_0: u32 = 8;
const Q4_K: u32 = 12;

/// One model to make.
#[derive(Debug, Clone, Copy)]
pub struct Synthetic {
    pub name: &'static str,
    pub arch: &'static str,
    pub n_layers: u64,
    /// Width of the hidden state.
    pub n_embd: u64,
    /// The head is the token embedding.
    pub tied: bool,
    /// The feed-forward part is a mixture of experts.
    pub experts: bool,
    /// Sliding window in tokens; 0 for none.
    pub window: u32,
    /// Storage type of matrices; of those whose rows are no whole blocks of Q4_K, Q8_0.
    pub ty: u32,
    /// What its metadata says of pooling; 0 for nothing.
    pub pooling: u32,
    /// Width of a head.
    pub head_dim: u64,
}

const BASE: Synthetic = Synthetic {
    name: "",
    arch: "llama",
    n_layers: 4,
    n_embd: 128,
    tied: false,
    experts: false,
    window: 0,
    ty: F16,
    pooling: 0,
    head_dim: 32,
};

/// A model for each stage rule.
pub const ALL: [Synthetic; 11] = [
    Synthetic { name: "llama", ..BASE },
    Synthetic { name: "llama-tied", tied: true, ..BASE },
    Synthetic { name: "llama-q8_0", tied: true, ty: Q8_0, ..BASE },
    Synthetic { name: "mixtral", experts: true, ..BASE },
    Synthetic { name: "qwen2", arch: "qwen2", ..BASE },
    Synthetic { name: "qwen3", arch: "qwen3", tied: true, ..BASE },
    Synthetic { name: "qwen3moe", arch: "qwen3moe", experts: true, ..BASE },
    Synthetic { name: "gemma2", arch: "gemma2", tied: true, n_layers: 6, window: 12, ..BASE },
    // Its graph scales given rows by the root of the width, which 16 is without rounding.
    Synthetic { name: "gemma2-256", arch: "gemma2", tied: true, n_layers: 6, n_embd: 256, window: 12, ..BASE },
    Synthetic { name: "gemma3", arch: "gemma3", tied: true, n_layers: 14, window: 12, ..BASE },
    Synthetic { name: "phi3", arch: "phi3", ..BASE },
];

/// libllama takes it for the 27B by its number of layers and scales queries by `1/sqrt(n_embd / n_head)`, not by
/// `1/sqrt(head_dim)`.
pub const GEMMA2_27B: Synthetic =
    Synthetic { name: "gemma2-27b", arch: "gemma2", tied: true, n_layers: 46, window: 12, head_dim: 16, ..BASE };

/// Models that embed texts, and such that rank them, which have a classifier.
pub const EMBEDDERS: [Synthetic; 7] = [
    Synthetic { name: "qwen3-embedding", arch: "qwen3", tied: true, pooling: 3, ..BASE },
    Synthetic { name: "qwen3-reranker", arch: "qwen3", tied: true, pooling: RANK, ..BASE },
    Synthetic { name: "bert", arch: "bert", pooling: 1, ..BASE },
    Synthetic { name: "bert-reranker", arch: "bert", pooling: RANK, ..BASE },
    Synthetic { name: "eurobert", arch: "eurobert", pooling: 2, ..BASE },
    Synthetic { name: "modern-bert", arch: "modern-bert", n_layers: 7, window: 12, pooling: 1, ..BASE },
    Synthetic {
        name: "gemma-embedding",
        arch: "gemma-embedding",
        tied: true,
        n_layers: 13,
        window: 12,
        pooling: 1,
        ..BASE
    },
];

/// libllama's number for the pooling of a model with a classifier.
const RANK: u32 = 4;

/// The same model in each kind of storage whose kernels differ.
pub const TYPES: [Synthetic; 4] = [
    Synthetic { name: "f16", n_embd: 256, ..BASE },
    Synthetic { name: "q8_0", n_embd: 256, ty: Q8_0, ..BASE },
    Synthetic { name: "q4_0", n_embd: 256, ty: Q4_0, ..BASE },
    Synthetic { name: "q4_k", n_embd: 256, ty: Q4_K, ..BASE },
];

/// The model of [`ALL`] or [`EMBEDDERS`] with this name.
pub fn named(name: &str) -> Synthetic {
    *ALL.iter().chain(&EMBEDDERS).find(|model| model.name == name).unwrap()
}

struct Tensor {
    name: String,
    dims: Vec<u64>,
    ty: u32,
}

impl Synthetic {
    /// Loads the model with [`super::options`], changed.
    pub fn load(&self, change: impl FnOnce(&mut StageOptions)) -> Stage {
        let file = tempfile::NamedTempFile::new().unwrap();
        self.write(file.path());
        super::whole(file.path(), change)
    }

    /// Writes the model to `path`.
    pub fn write(&self, path: &Path) {
        let tensors = self.tensors();
        let metadata = self.metadata();
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend((tensors.len() as u64).to_le_bytes());
        bytes.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            push_str(&mut bytes, &key);
            bytes.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &tensors {
            push_str(&mut bytes, &tensor.name);
            bytes.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
            bytes.extend(tensor.ty.to_le_bytes());
            bytes.extend((data.len() as u64).to_le_bytes());
            data.extend(tensor.values());
            data.resize(data.len().next_multiple_of(32), 0);
        }
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(data);
        std::fs::write(path, bytes).unwrap();
    }

    fn metadata(&self) -> Vec<(String, Vec<u8>)> {
        let key = |key: &str| format!("{}.{key}", self.arch);
        let mut all = vec![
            ("general.architecture".to_owned(), string(self.arch)),
            ("tokenizer.ggml.model".to_owned(), string("no_vocab")),
            (key("vocab_size"), u32_value(N_VOCAB as u64)),
            (key("context_length"), u32_value(N_CTX)),
            (key("embedding_length"), u32_value(self.n_embd)),
            (key("block_count"), u32_value(self.n_layers)),
            (key("feed_forward_length"), u32_value(N_FF)),
            (key("attention.head_count"), u32_value(N_HEAD)),
            (
                key("attention.head_count_kv"),
                u32_value(if matches!(self.arch, "bert" | "modern-bert") { N_HEAD } else { N_HEAD_KV }),
            ),
            (key("attention.key_length"), u32_value(self.head_dim)),
            (key("attention.value_length"), u32_value(self.head_dim)),
            (key("rope.dimension_count"), u32_value(self.head_dim)),
            (key("attention.layer_norm_rms_epsilon"), f32_value(1e-5)),
        ];
        if self.experts {
            all.push((key("expert_count"), u32_value(N_EXPERT)));
            all.push((key("expert_used_count"), u32_value(2)));
            all.push((key("expert_feed_forward_length"), u32_value(N_FF)));
        }
        if self.window > 0 {
            all.push((key("attention.sliding_window"), u32_value(self.window.into())));
        }
        if self.pooling > 0 {
            all.push((key("pooling_type"), u32_value(self.pooling.into())));
        }
        if self.arch.ends_with("bert") {
            all.push((key("attention.layer_norm_epsilon"), f32_value(1e-5)));
            all.push((key("attention.causal"), [7u32.to_le_bytes().as_slice(), &[0]].concat()));
            all.push(("tokenizer.ggml.token_type_count".to_owned(), u32_value(2)));
        }
        if self.arch == "gemma2" {
            all.push((key("attn_logit_softcapping"), f32_value(50.0)));
            all.push((key("final_logit_softcapping"), f32_value(30.0)));
        }
        all
    }

    fn tensors(&self) -> Vec<Tensor> {
        let n_embd = self.n_embd;
        let mut all = Vec::new();
        let mut add = |name: String, dims: &[u64]| {
            let ty = match self.ty {
                _ if dims.len() == 1
                    || ["gate_inp", "token_types", "position_embd"].iter().any(|n| name.contains(n)) =>
                {
                    F32
                }
                Q4_K if !dims[0].is_multiple_of(256) => Q8_0,
                ty => ty,
            };
            all.push(Tensor { name, dims: dims.to_vec(), ty });
        };
        let (n_q, n_kv) = (N_HEAD * self.head_dim, N_HEAD_KV * self.head_dim);
        add("token_embd.weight".to_owned(), &[n_embd, N_VOCAB as u64]);
        if self.arch == "bert" {
            self.bert(&mut add);
            return all;
        }
        let (qwen2, phi3) = (self.arch == "qwen2", self.arch == "phi3");
        let gemma = self.arch.starts_with("gemma");
        for layer in 0..self.n_layers {
            let mut add = |name: &str, dims: &[u64]| add(format!("blk.{layer}.{name}"), dims);
            add("attn_norm.weight", &[n_embd]);
            if self.arch == "modern-bert" {
                add("attn_qkv.weight", &[n_embd, 3 * n_q]);
            } else if phi3 {
                add("attn_qkv.weight", &[n_embd, n_q + 2 * n_kv]);
            } else {
                for (name, n) in [("attn_q", n_q), ("attn_k", n_kv), ("attn_v", n_kv)] {
                    add(&format!("{name}.weight"), &[n_embd, n]);
                    if qwen2 {
                        add(&format!("{name}.bias"), &[n]);
                    }
                }
            }
            add("attn_output.weight", &[n_q, n_embd]);
            if matches!(self.arch, "qwen3" | "qwen3moe" | "gemma3" | "gemma-embedding") {
                add("attn_q_norm.weight", &[self.head_dim]);
                add("attn_k_norm.weight", &[self.head_dim]);
            }
            add("ffn_norm.weight", &[n_embd]);
            if gemma {
                add("post_attention_norm.weight", &[n_embd]);
                add("post_ffw_norm.weight", &[n_embd]);
            }
            if self.experts {
                add("ffn_gate_inp.weight", &[n_embd, N_EXPERT]);
                add("ffn_gate_exps.weight", &[n_embd, N_FF, N_EXPERT]);
                add("ffn_up_exps.weight", &[n_embd, N_FF, N_EXPERT]);
                add("ffn_down_exps.weight", &[N_FF, n_embd, N_EXPERT]);
            } else if phi3 || self.arch == "modern-bert" {
                add("ffn_up.weight", &[n_embd, 2 * N_FF]);
                add("ffn_down.weight", &[N_FF, n_embd]);
            } else {
                add("ffn_gate.weight", &[n_embd, N_FF]);
                add("ffn_up.weight", &[n_embd, N_FF]);
                add("ffn_down.weight", &[N_FF, n_embd]);
            }
        }
        add("output_norm.weight".to_owned(), &[n_embd]);
        if self.arch == "modern-bert" {
            add("token_embd_norm.weight".to_owned(), &[n_embd]);
        }
        if !self.tied && !self.arch.ends_with("bert") {
            add("output.weight".to_owned(), &[n_embd, N_VOCAB as u64]);
        }
        if self.pooling == RANK {
            add("cls.output.weight".to_owned(), &[n_embd, 1]);
        }
        all
    }

    /// The tensors of an encoder with learned positions, which norms behind each part of a layer.
    fn bert(&self, add: &mut dyn FnMut(String, &[u64])) {
        let n_embd = self.n_embd;
        let mut with_bias = |name: &str, dims: &[u64]| {
            add(format!("{name}.weight"), dims);
            add(format!("{name}.bias"), &dims[dims.len() - 1..]);
        };
        with_bias("token_embd_norm", &[n_embd]);
        for layer in 0..self.n_layers {
            let mut with_bias = |name: &str, dims: &[u64]| with_bias(&format!("blk.{layer}.{name}"), dims);
            for name in ["attn_q", "attn_k", "attn_v", "attn_output"] {
                with_bias(name, &[n_embd, n_embd]);
            }
            with_bias("attn_output_norm", &[n_embd]);
            with_bias("ffn_up", &[n_embd, N_FF]);
            with_bias("ffn_down", &[N_FF, n_embd]);
            with_bias("layer_output_norm", &[n_embd]);
        }
        if self.pooling == RANK {
            with_bias("cls", &[n_embd, n_embd]);
            with_bias("cls.output", &[n_embd, 1]);
        }
        add("token_types.weight".to_owned(), &[n_embd, 2]);
        add("position_embd.weight".to_owned(), &[n_embd, N_CTX]);
    }
}

impl Tensor {
    /// Values that keep activations near 1: norms around 1, matrices by their fan-in, all from the tensor's name.
    fn values(&self) -> Vec<u8> {
        let n: u64 = self.dims.iter().product();
        let mut state =
            self.name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let (middle, spread) = match self.name.as_str() {
            name if name.ends_with("norm.bias") => (0.0, 0.1),
            name if name.contains("norm") => (1.0, 0.3),
            _ => (0.0, 1.7 / (self.dims[0] as f32).sqrt()),
        };
        let values: Vec<f32> = (0..n)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                middle + spread * ((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
            })
            .collect();
        quantize_rows(self.ty, &values, self.dims[0] as usize).unwrap()
    }
}

fn push_str(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = 8u32.to_le_bytes().to_vec();
    push_str(&mut bytes, text);
    bytes
}

fn u32_value(value: u64) -> Vec<u8> {
    [4u32.to_le_bytes(), (value as u32).to_le_bytes()].concat()
}

fn f32_value(value: f32) -> Vec<u8> {
    [6u32.to_le_bytes(), value.to_le_bytes()].concat()
}
