//! What public models cost, by name and quantisation: profiles without a file.
//!
//! Shapes are in `models.toml`, from the models' own `config.json`. Bytes follow from them: the matrices of a layer by
//! their widths, times the bits of a weight in a file of that [`Quant`]. Norms are counted, biases are not (below 0.1
//! %). All layers of a kind are taken to be alike, where real files give some of them more bits than others.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

use brigade_base::{KvType, KvTypes};
use serde::Deserialize;

use super::{nearest, same_name};
use crate::ModelProfile;

/// How the weights of a file are stored; names as llama.cpp has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "llama.cpp's names")]
#[expect(non_camel_case_types, reason = "llama.cpp's names")]
pub enum Quant {
    F16,
    Q8_0,
    Q6_K,
    Q5_K_M,
    Q4_K_M,
    Q4_0,
    IQ4_XS,
    MXFP4,
    Q3_K_M,
    Q2_K,
}

/// Bits of a weight, by what it belongs to.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Bits {
    layers: f64,
    experts: f64,
    head: f64,
    embedding: f64,
}

impl Quant {
    /// All of them, the largest first.
    pub const ALL: [Self; 10] = [
        Self::F16,
        Self::Q8_0,
        Self::Q6_K,
        Self::Q5_K_M,
        Self::Q4_K_M,
        Self::Q4_0,
        Self::IQ4_XS,
        Self::MXFP4,
        Self::Q3_K_M,
        Self::Q2_K,
    ];

    /// Its name in llama.cpp.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "F16",
            Self::Q8_0 => "Q8_0",
            Self::Q6_K => "Q6_K",
            Self::Q5_K_M => "Q5_K_M",
            Self::Q4_K_M => "Q4_K_M",
            Self::Q4_0 => "Q4_0",
            Self::IQ4_XS => "IQ4_XS",
            Self::MXFP4 => "MXFP4",
            Self::Q3_K_M => "Q3_K_M",
            Self::Q2_K => "Q2_K",
        }
    }

    /// The next smaller one that stores every model: MXFP4 is for models that were trained in it.
    pub fn smaller(self) -> Option<Self> {
        let after = Self::ALL.into_iter().skip_while(|quant| *quant != self).skip(1);
        after.into_iter().find(|quant| *quant != Self::MXFP4)
    }

    /// Uniform types have the bits of their blocks. The mixtures give some matrices more than others; what the layers
    /// have on average follows from the sizes of Llama 3 70B (70.55e9 weights) in
    /// <https://github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference>, head (Q6_K) and embedding (the base type)
    /// taken off. llama.cpp keeps the head at Q6_K in all files below it. MXFP4 files have experts in it and the rest
    /// in Q8_0.
    fn bits(self) -> Bits {
        let mixed = |layers, embedding| Bits { layers, experts: layers, head: 6.5625, embedding };
        match self {
            Self::F16 => Bits { layers: 16.0, experts: 16.0, head: 16.0, embedding: 16.0 },
            Self::Q8_0 => Bits { layers: 8.5, experts: 8.5, head: 8.5, embedding: 8.5 },
            Self::Q6_K => mixed(6.5625, 6.5625),
            Self::Q5_K_M => mixed(5.65, 5.5),
            Self::Q4_K_M => mixed(4.80, 4.5),
            Self::Q4_0 => mixed(4.5, 4.5),
            Self::IQ4_XS => mixed(4.26, 4.25),
            Self::MXFP4 => Bits { layers: 8.5, experts: 4.25, head: 8.5, embedding: 8.5 },
            Self::Q3_K_M => mixed(3.85, 3.4375),
            Self::Q2_K => mixed(2.94, 2.625),
        }
    }
}

impl fmt::Display for Quant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A text is no quantisation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no quantisation {text:?}: write one of {}", Quant::ALL.map(Quant::name).join(", "))]
pub struct QuantError {
    /// What was read.
    pub text: String,
}

impl FromStr for Quant {
    type Err = QuantError;

    fn from_str(text: &str) -> Result<Self, QuantError> {
        let found = Self::ALL.into_iter().find(|quant| same_name(quant.name(), text));
        found.ok_or_else(|| QuantError { text: text.to_owned() })
    }
}

/// There is no shape of that name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no model {name:?} is in the catalogue; the nearest are {}. Or name a GGUF file", .nearest.join(", "))]
pub struct UnknownModel {
    /// What was asked for.
    pub name: String,
    /// The names that are most like it.
    pub nearest: Vec<String>,
}

/// The shape of a public model.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Its name here.
    pub name: String,
    /// The repository on huggingface.co whose `config.json` has the shape.
    pub source: String,
    /// Its architecture in GGUF.
    pub architecture: String,
    layers: u32,
    cuts: Option<Vec<u32>>,
    embd: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    ff: u32,
    vocab: u32,
    #[serde(default)]
    tied: bool,
    experts: Option<Experts>,
    mla: Option<LatentAttention>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct Experts {
    count: u32,
    used: u32,
    ff: u32,
    #[serde(default)]
    shared_ff: u32,
    #[serde(default)]
    dense_layers: u32,
}

/// Attention whose keys and values come from one short vector.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct LatentAttention {
    q_rank: u32,
    kv_rank: u32,
    rope: u32,
    nope: u32,
    value: u32,
}

impl Shape {
    /// Weights of a layer's attention.
    fn attention_weights(&self) -> u64 {
        let [embd, heads, kv_heads, dim] = [self.embd, self.heads, self.kv_heads, self.head_dim].map(u64::from);
        let Some(mla) = self.mla else { return 2 * embd * heads * dim + 2 * embd * kv_heads * dim };
        let [q_rank, kv_rank, rope, nope, value] =
            [mla.q_rank, mla.kv_rank, mla.rope, mla.nope, mla.value].map(u64::from);
        let query = embd * q_rank + q_rank * heads * (nope + rope);
        let key_value = embd * (kv_rank + rope) + kv_rank * heads * (nope + value);
        query + key_value + heads * value * embd
    }

    /// Weights of layer `layer_idx`'s feed-forward part that every row uses, those of its experts, and those of its
    /// router.
    fn ff_weights(&self, layer_idx: u32) -> (u64, u64, u64) {
        let embd = u64::from(self.embd);
        match self.experts {
            Some(experts) if layer_idx >= experts.dense_layers => {
                let [count, ff, shared] = [experts.count, experts.ff, experts.shared_ff].map(u64::from);
                (3 * embd * shared, 3 * embd * ff * count, embd * count)
            }
            _ => (3 * embd * u64::from(self.ff), 0, 0),
        }
    }

    /// Bytes of KV cache of a token in one layer. Latent attention caches its short vector alone.
    fn kv_bytes_per_token(&self, kv: KvTypes) -> u64 {
        let heads = u64::from(self.kv_heads) * u64::from(self.head_dim);
        match self.mla {
            Some(mla) => kv.k.bytes(u64::from(mla.kv_rank + mla.rope)),
            None => kv.k.bytes(heads) + kv.v.bytes(heads),
        }
    }

    /// What the model costs in a file of that quantisation, with keys and values stored so.
    pub fn profile(&self, quant: Quant, kv: KvTypes) -> ModelProfile {
        let bits = quant.bits();
        let bytes = |weights: u64, bits: f64| (weights as f64 * bits / 8.0).round() as u64;
        let (mut layer_bytes, mut expert_bytes, mut n_weights) = (Vec::new(), 0, 0);
        for layer_idx in 0..self.layers {
            let (dense, experts, router) = self.ff_weights(layer_idx);
            let dense = dense + self.attention_weights();
            let own = bytes(experts, bits.experts);
            // Norms and routers are F32.
            let norms = 2 * u64::from(self.embd);
            layer_bytes.push(bytes(dense, bits.layers) + own + 4 * (norms + router));
            expert_bytes += own;
            n_weights += dense + experts + norms + router;
        }
        let matrix = u64::from(self.vocab) * u64::from(self.embd);
        let embedding = if self.tied { 0 } else { matrix };
        let experts = self.experts;
        ModelProfile {
            kv_bytes_per_token: vec![self.kv_bytes_per_token(kv); layer_bytes.len()],
            value_bytes_per_token: Vec::new(),
            state_bytes: Vec::new(),
            is_flash: kv.v != KvType::F16,
            rehearsed: None,
            why_whole: None,
            layer_bytes,
            head_bytes: bytes(matrix, bits.head),
            embedding_bytes: bytes(embedding, bits.embedding),
            cut_points: self.cuts.clone().unwrap_or_else(|| (1..self.layers).collect()),
            n_embd: self.embd,
            n_heads: self.heads,
            n_ff: experts.map_or(self.ff, |e| self.ff.max(e.ff * e.used + e.shared_ff)),
            n_vocab: self.vocab,
            n_experts: experts.map_or(0, |e| e.count),
            n_experts_used: experts.map_or(0, |e| e.used),
            expert_bytes,
            n_weights: n_weights + matrix + embedding,
        }
    }
}

#[derive(Deserialize)]
struct File {
    model: Vec<Shape>,
}

/// The embedded file; a test sees to it that it can be read.
static SHAPES: LazyLock<Vec<Shape>> = LazyLock::new(|| {
    let file: Result<File, _> = toml::from_str(include_str!("models.toml"));
    file.map_or_else(|_| Vec::new(), |file| file.model)
});

/// All shapes.
pub fn shapes() -> &'static [Shape] {
    &SHAPES
}

/// Their names.
pub fn names() -> impl Iterator<Item = &'static str> {
    shapes().iter().map(|shape| shape.name.as_str())
}

/// The shape of that name; spelling counts, case and punctuation do not.
///
/// # Errors
/// If there is none.
pub fn shape(name: &str) -> Result<&'static Shape, UnknownModel> {
    let found = shapes().iter().find(|shape| same_name(&shape.name, name));
    found.ok_or_else(|| UnknownModel { name: name.to_owned(), nearest: nearest(name, names()) })
}

/// What a public model costs in a file of that quantisation.
///
/// # Errors
/// If there is no shape of that name.
pub fn profile(name: &str, quant: Quant) -> Result<ModelProfile, UnknownModel> {
    shape(name).map(|shape| shape.profile(quant, KvTypes::default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: f64 = (1u64 << 30) as f64;

    fn gib(profile: &ModelProfile) -> f64 {
        (profile.layer_bytes.iter().sum::<u64>() + profile.head_bytes + profile.embedding_bytes) as f64 / GIB
    }

    #[test]
    fn sizes_are_those_of_real_files() {
        // Sizes as llama-bench prints them: 4167 and XiongjieDai for Llama, geerlingguy and visorcraft for the others.
        for (name, quant, expected_gib, n_billion) in [
            ("llama-2-7b", Quant::F16, 12.55, 6.74),
            ("llama-2-7b", Quant::Q8_0, 6.67, 6.74),
            ("llama-2-7b", Quant::Q4_0, 3.56, 6.74),
            ("llama-2-7b", Quant::Q4_K_M, 3.80, 6.74),
            ("llama-3.2-3b", Quant::Q4_K_M, 1.87, 3.21),
            ("llama-3.1-8b", Quant::Q4_K_M, 4.58, 8.03),
            ("llama-3.3-70b", Quant::F16, 131.42, 70.55),
            ("llama-3.3-70b", Quant::Q8_0, 69.83, 70.55),
            ("llama-3.3-70b", Quant::Q6_K, 53.91, 70.55),
            ("llama-3.3-70b", Quant::Q5_K_M, 46.52, 70.55),
            ("llama-3.3-70b", Quant::Q4_K_M, 39.60, 70.55),
            ("llama-3.3-70b", Quant::IQ4_XS, 35.30, 70.55),
            ("llama-3.3-70b", Quant::Q3_K_M, 31.91, 70.55),
            ("llama-3.3-70b", Quant::Q2_K, 24.56, 70.55),
            ("llama-2-70b", Quant::Q4_0, 36.20, 68.98),
            ("qwen2.5-32b", Quant::Q4_K_M, 18.48, 32.76),
            ("qwen2.5-14b", Quant::Q4_K_M, 8.37, 14.77),
            ("qwen3-30b-a3b", Quant::Q4_K_M, 17.28, 30.53),
            ("qwen3-235b-a22b", Quant::Q3_K_M, 104.72, 235.09),
            ("gpt-oss-20b", Quant::MXFP4, 11.27, 20.91),
            ("gpt-oss-120b", Quant::MXFP4, 59.02, 116.83),
            ("deepseek-v3", Quant::Q4_K_M, 376.65, 671.03),
        ] {
            let profile = profile(name, quant).unwrap();
            let off = gib(&profile) / expected_gib - 1.0;
            assert!(off.abs() < 0.04, "{name} {quant}: {:.2} GiB, expected {expected_gib}", gib(&profile));
            let billions = profile.n_weights as f64 / 1e9;
            assert!((billions / n_billion - 1.0).abs() < 0.01, "{name}: {billions:.2} 10^9 weights");
        }
    }

    #[test]
    fn all_shapes_are_sound() {
        assert!(shapes().len() >= 28);
        for shape in shapes() {
            let profile = shape.profile(Quant::Q4_K_M, KvTypes::default());
            assert_eq!(profile.layer_bytes.len(), profile.kv_bytes_per_token.len(), "{}", shape.name);
            let (cuts, ends) = (&profile.cut_points, [0, profile.n_layers()]);
            assert!(cuts.is_sorted_by(|a, b| a < b) && cuts.iter().all(|cut| *cut > ends[0] && *cut < ends[1]));
            assert!(profile.expert_bytes < profile.layer_bytes.iter().sum(), "{}", shape.name);
            assert_eq!(profile.n_experts > 0, profile.expert_bytes > 0, "{}", shape.name);
            assert_eq!(names().filter(|name| same_name(name, &shape.name)).count(), 1, "{}", shape.name);
            let sizes = Quant::ALL.map(|quant| gib(&shape.profile(quant, KvTypes::default())));
            let dense = profile.n_experts == 0;
            for pair in Quant::ALL.windows(2).zip(sizes.windows(2)).filter(|_| dense) {
                let (quants, sizes) = pair;
                if !quants.contains(&Quant::MXFP4) {
                    assert!(sizes[0] > sizes[1], "{} {quants:?}", shape.name);
                }
            }
        }
    }

    #[test]
    fn kv_is_that_of_the_heads() {
        // 2 * 8 heads * 128 values * 2 bytes; for latent attention one vector of 512 + 64.
        assert_eq!(profile("llama-3.3-70b", Quant::F16).unwrap().kv_bytes_per_token, [4096; 80]);
        assert_eq!(profile("deepseek-v3", Quant::Q4_K_M).unwrap().kv_bytes_per_token, [1152; 61]);
    }

    #[test]
    fn names_are_read_leniently_and_errors_help() {
        assert_eq!(shape("Llama 3.3 70B").unwrap().name, "llama-3.3-70b");
        let error = shape("llama-3-70b").unwrap_err();
        assert!(error.nearest.contains(&"llama-3.3-70b".to_owned()), "{error}");
        assert_eq!("q4_k_m".parse(), Ok(Quant::Q4_K_M));
        assert!("Q9".parse::<Quant>().unwrap_err().to_string().contains("Q4_K_M"));
        assert_eq!((Quant::IQ4_XS.smaller(), Quant::Q2_K.smaller()), (Some(Quant::Q3_K_M), None));
    }
}
