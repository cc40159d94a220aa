//! A tiny BERT with random weights, and what embedding and ranking should give by the engine alone.

use std::path::{Path, PathBuf};

use brigade_base::{Hooks, KvTypes, Pooling, Token};
use brigade_engine::{Input, Row, Stage, StageOptions, Vocabulary};
use brigade_gguf::{Array, Builder, GgmlType, Metadata, ModelFile, Value, vocabulary_header};

/// Tokens of the longest text that it takes.
pub const N_CTX: u32 = 64;

const N_LAYERS: u32 = 6;
const N_EMBD: u64 = 64;
const N_FF: u64 = 96;

/// Letters and digits at the beginning of a word and in one, behind the usual special tokens of BERT.
fn tokens() -> Vec<String> {
    let mut tokens: Vec<String> = (0..104).map(|n| format!("[unused{n}]")).collect();
    for (at, name) in [(0, "[PAD]"), (100, "[UNK]"), (101, "[CLS]"), (102, "[SEP]"), (103, "[MASK]")] {
        tokens[at] = name.to_owned();
    }
    let letters = || ('a'..='z').chain('0'..='9');
    tokens.extend(letters().map(|letter| format!("\u{2581}{letter}")));
    tokens.extend(letters().map(String::from));
    tokens
}

/// Writes the model; with a classifier it ranks, else it embeds by the mean.
pub fn write_bert(dir: &Path, ranks: bool) -> PathBuf {
    let tokens = tokens();
    let n_vocab = tokens.len() as u64;
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", "bert");
    let mut set = |key: &str, value: Value| metadata.set(format!("bert.{key}"), value);
    set("block_count", Value::U32(N_LAYERS));
    set("context_length", Value::U32(N_CTX));
    set("embedding_length", Value::U32(N_EMBD as u32));
    set("feed_forward_length", Value::U32(N_FF as u32));
    set("attention.head_count", Value::U32(4));
    set("attention.layer_norm_epsilon", Value::F32(1e-12));
    set("attention.causal", Value::Bool(false));
    set("pooling_type", Value::U32(if ranks { 4 } else { 1 }));
    metadata.set("tokenizer.ggml.model", "bert");
    metadata.set("tokenizer.ggml.token_type_count", Value::U32(2));
    metadata.set("tokenizer.ggml.tokens", Array::of_strings(tokens));
    let mut builder = Builder::new(&metadata);
    let mut all: Vec<(String, Vec<u64>)> = Vec::new();
    let mut add = |name: &str, dims: &[u64]| all.push((name.to_owned(), dims.to_vec()));
    add("token_embd.weight", &[N_EMBD, n_vocab]);
    add("token_types.weight", &[N_EMBD, 2]);
    add("position_embd.weight", &[N_EMBD, N_CTX.into()]);
    let mut with_bias = |name: &str, dims: &[u64]| {
        add(&format!("{name}.weight"), dims);
        add(&format!("{name}.bias"), &dims[dims.len() - 1..]);
    };
    with_bias("token_embd_norm", &[N_EMBD]);
    for layer in 0..N_LAYERS {
        let mut with_bias = |name: &str, dims: &[u64]| with_bias(&format!("blk.{layer}.{name}"), dims);
        for name in ["attn_q", "attn_k", "attn_v", "attn_output"] {
            with_bias(name, &[N_EMBD, N_EMBD]);
        }
        with_bias("attn_output_norm", &[N_EMBD]);
        with_bias("ffn_up", &[N_EMBD, N_FF]);
        with_bias("ffn_down", &[N_FF, N_EMBD]);
        with_bias("layer_output_norm", &[N_EMBD]);
    }
    if ranks {
        with_bias("cls", &[N_EMBD, N_EMBD]);
        with_bias("cls.output", &[N_EMBD, 1]);
    }
    for (name, dims) in &all {
        builder.tensor(name.as_str(), dims, GgmlType::F32).unwrap();
    }
    let mut bytes = Vec::new();
    let fill = |idx: usize, offset: u64, buf: &mut [u8]| {
        let (name, dims) = &all[idx];
        for (at, value) in buf.chunks_exact_mut(4).enumerate() {
            value.copy_from_slice(&weight(name, dims, offset / 4 + at as u64).to_le_bytes());
        }
        Ok(())
    };
    builder.write(&mut bytes, fill).unwrap();
    let path = dir.join(if ranks { "tiny-reranker.gguf" } else { "tiny-bert.gguf" });
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A random weight that keeps activations near 1.
fn weight(name: &str, dims: &[u64], at: u64) -> f32 {
    let seed = name.bytes().fold(at.wrapping_add(1), |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mixed = (seed ^ (seed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let random = (mixed >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
    match name {
        name if name.ends_with("norm.weight") => 1.0 + 0.3 * random,
        name if name.ends_with(".bias") => 0.1 * random,
        _ => 1.7 / (dims[0] as f32).sqrt() * random,
    }
}

/// A whole model in one stage, without anything of Brigade around it.
pub struct TextOracle {
    stage: Stage,
    vocabulary: Vocabulary,
}

impl TextOracle {
    pub fn of(model: &Path, pooling: Pooling) -> Self {
        Self::with(model, &[], pooling)
    }

    /// The same with an adapter and its scale.
    pub fn with(model: &Path, adapters: &[(&Path, f32)], pooling: Pooling) -> Self {
        brigade_engine::init();
        let options = StageOptions {
            n_ctx: N_CTX,
            n_sessions: 1,
            max_rows: N_CTX,
            max_outputs: 0,
            n_threads: 1,
            n_embd: 0,
            n_vocab: 0,
            hooks: Hooks::default(),
            pooling: Some(pooling),
            kv: KvTypes::default(),
        };
        let stage = Stage::load_file_adapted(model, adapters, options).unwrap();
        let header = vocabulary_header(ModelFile::open(model).unwrap().catalog());
        let n_bytes = header.len() as u64;
        let vocabulary = Vocabulary::load(Box::new(std::io::Cursor::new(header)), n_bytes).unwrap();
        Self { stage, vocabulary }
    }

    pub fn tokens(&self, text: &str) -> Vec<Token> {
        self.vocabulary.tokenize(text, true, true).unwrap()
    }

    /// What the model gives for a text.
    pub fn pooled(&mut self, text: &[Token]) -> Vec<f32> {
        self.stage.clear_all();
        let row = |i: usize| Row { slot: 0, position: i as u32, output: i + 1 == text.len() };
        let rows: Vec<Row> = (0..text.len()).map(row).collect();
        let mut out = Vec::new();
        self.stage.run(&rows, Input::Tokens(text), &mut out).unwrap();
        out
    }

    /// The same, brought to length one.
    pub fn unit(&mut self, text: &[Token]) -> Vec<f32> {
        let values = self.pooled(text);
        let length = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        values.into_iter().map(|value| (f64::from(value) / length) as f32).collect()
    }

    /// The score of a document for a query, which BERT sees with a mark before, between and behind them.
    pub fn score(&mut self, query: &str, document: &str) -> f32 {
        let words = |text: &str| self.vocabulary.tokenize(text, false, false).unwrap();
        let pair = [vec![101], words(query), vec![102], words(document), vec![102]].concat();
        self.pooled(&pair)[0]
    }
}
