//! Synthetic models in memory: every architecture, a few layers, contents that tell where each byte belongs.

#![allow(dead_code, reason = "each test file uses some of these")]

use std::io;
use std::sync::Arc;

use brigade_gguf::{Array, Builder, Catalog, GgmlType, Metadata, TensorSource, Value};

/// A whole model in memory.
pub struct Model {
    pub bytes: Vec<u8>,
    pub catalog: Catalog,
}

impl TensorSource for Model {
    fn read_tensor(&self, tensor_idx: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let tensor = &self.catalog.tensors()[tensor_idx];
        assert!(offset + buf.len() as u64 <= tensor.n_bytes, "a read behind the end of {}", tensor.name);
        let start = (tensor.offset + offset) as usize;
        buf.copy_from_slice(&self.bytes[start..start + buf.len()]);
        Ok(())
    }
}

impl Model {
    pub fn build(builder: &Builder, names: &[String]) -> Arc<Self> {
        let mut bytes = Vec::new();
        builder.write(&mut bytes, |idx, offset, buf| fill(&names[idx], offset, buf)).unwrap();
        let catalog = Catalog::parse(&bytes, bytes.len() as u64).unwrap();
        Arc::new(Self { bytes, catalog })
    }

    pub fn tensor_bytes(&self, name: &str) -> &[u8] {
        let tensor = self.catalog.tensor(name).unwrap_or_else(|| panic!("no tensor {name}"));
        &self.bytes[tensor.offset as usize..][..tensor.n_bytes as usize]
    }
}

/// Bytes that depend on the tensor's name and the place in it.
fn fill(name: &str, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let seed = name.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    buf.iter_mut().enumerate().for_each(|(i, byte)| *byte = (seed + (offset + i as u64) * 37) as u8);
    Ok(())
}

/// Architectures whose head libllama takes from the token embedding whatever else there is.
pub const ALWAYS_TIED: [&str; 7] = ["gemma", "gemma2", "cohere2", "command-r", "openelm", "bitnet", "plm"];

/// Architectures that look up tokens themselves.
pub const TAKES_TOKENS: [&str; 3] = ["gemma3n", "qwen4exp", "cogvlm"];

/// What a synthetic model is like.
pub struct Recipe {
    pub architecture: &'static str,
    pub n_layers: u32,
    pub n_embd: u64,
    pub tied: bool,
    pub n_vocab: u64,
    /// Layers without tensors.
    pub bare: Vec<u32>,
    pub extra: Vec<(&'static str, Value)>,
}

impl Recipe {
    pub fn new(architecture: &'static str, n_layers: u32) -> Self {
        Self {
            architecture,
            n_layers,
            n_embd: 64,
            tied: ALWAYS_TIED.contains(&architecture),
            n_vocab: 48,
            bare: Vec::new(),
            extra: Vec::new(),
        }
    }

    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.extra.push((key, value.into()));
        self
    }

    pub fn metadata(&self) -> Metadata {
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", self.architecture);
        metadata.set("general.alignment", 64);
        let mut set = |key: &str, value: Value| metadata.set(format!("{}.{key}", self.architecture), value);
        set("block_count", self.n_layers.into());
        set("context_length", 128.into());
        set("embedding_length", Value::U32(self.n_embd as u32));
        set("feed_forward_length", Array::of_u32(&vec![96; self.n_layers as usize]).into());
        set("attention.head_count", 4.into());
        set("attention.head_count_kv", Array::of_u32(&vec![2; self.n_layers as usize]).into());
        set("attention.layer_norm_rms_epsilon", 1e-5.into());
        set("rope.dimension_count", 16.into());
        set("attention.key_length", 16.into());
        set("attention.value_length", 16.into());
        if self.architecture == "qwen3moe" {
            set("expert_count", 4.into());
            set("expert_used_count", 2.into());
            set("expert_feed_forward_length", 32.into());
        }
        if !["llama", "qwen2", "qwen3", "qwen3moe", "phi3"].contains(&self.architecture) {
            set("attention.sliding_window", 32.into());
        }
        if ["granite_swa", "maple", "mimo2", "step35", "spark2_5", "gemma4"].contains(&self.architecture) {
            let slides: Vec<bool> = (0..self.n_layers).map(|layer| layer % 3 != 2).collect();
            set("attention.sliding_window_pattern", Array::of_bool(&slides).into());
        }
        for (key, value) in &self.extra {
            set(key, value.clone());
        }
        metadata.set("tokenizer.ggml.model", "gpt2");
        metadata.set("tokenizer.ggml.tokens", Array::of_strings((0..self.n_vocab).map(|i| format!("t{i}"))));
        metadata.set("tokenizer.chat_template", "{{ messages }}");
        metadata
    }

    pub fn tensors(&self) -> Vec<(String, Vec<u64>, GgmlType)> {
        let n_embd = self.n_embd;
        let mut tensors = vec![("token_embd.weight".to_owned(), vec![n_embd, self.n_vocab], GgmlType::Q8_0)];
        tensors.push(("rope_freqs.weight".to_owned(), vec![8], GgmlType::F32));
        for layer in (0..self.n_layers).filter(|layer| !self.bare.contains(layer)) {
            for (name, dims, ty) in [
                ("attn_norm.weight", vec![n_embd], GgmlType::F32),
                ("attn_q_norm.weight", vec![16], GgmlType::F32),
                ("attn_q.weight", vec![n_embd, 64], GgmlType::Q4_0),
                ("ffn_down.weight", vec![96, n_embd], GgmlType::F16),
            ] {
                tensors.push((format!("blk.{layer}.{name}"), dims, ty));
            }
        }
        tensors.push(("output_norm.weight".to_owned(), vec![n_embd], GgmlType::F32));
        if !self.tied {
            tensors.push(("output.weight".to_owned(), vec![n_embd, self.n_vocab], GgmlType::Q8_0));
        }
        tensors
    }

    pub fn model(&self) -> Arc<Model> {
        let mut builder = Builder::new(&self.metadata());
        let mut names = Vec::new();
        for (name, dims, ty) in self.tensors() {
            builder.tensor(name.clone(), &dims, ty).unwrap();
            names.push(name);
        }
        Model::build(&builder, &names)
    }
}

/// One model of each supported architecture.
pub fn every_architecture() -> impl Iterator<Item = Recipe> {
    brigade_gguf::supported_architectures().map(|name| Recipe::new(name, 13))
}
