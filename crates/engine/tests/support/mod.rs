//! What the tests share: paths, options, hidden states by hand, and tiny models of each architecture.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs::File;
use std::path::{Path, PathBuf};

use brigade_base::Token;
use brigade_engine::{Input, Row, RunError, Stage, StageOptions};

pub mod recurrent;
pub mod synthetic;

/// A small but real model: 8 layers, 1024 tokens.
pub fn abacus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-f16.gguf")
}

pub const N_VOCAB: usize = 1024;

pub fn options() -> StageOptions {
    StageOptions {
        n_ctx: 512,
        n_sessions: 4,
        max_rows: 64,
        max_outputs: 0,
        n_threads: 1,
        n_embd: 0,
        n_vocab: 0,
        hooks: brigade_base::Hooks::default(),
        pooling: None,
        kv: brigade_base::KvTypes::default(),
    }
}

pub fn whole(path: &Path, change: impl FnOnce(&mut StageOptions)) -> Stage {
    let mut options = options();
    change(&mut options);
    Stage::load_file(path, options).unwrap()
}

pub fn open(path: &Path) -> (Box<File>, u64) {
    let file = File::open(path).unwrap();
    let n_bytes = file.metadata().unwrap().len();
    (Box::new(file), n_bytes)
}

/// Tokens that look random and are all below `n_vocab`.
pub fn tokens(n: usize, n_vocab: usize, seed: usize) -> Vec<Token> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729 + i * i * 31) % n_vocab) as Token).collect()
}

/// Rows that continue `slot` with `n` tokens, all with logits.
pub fn rows(stage: &Stage, slot: u32, n: usize) -> Vec<Row> {
    (0..n as u32).map(|i| Row { slot, position: stage.len(slot) + i, output: true }).collect()
}

/// Appends `tokens` to `slot` in one run and returns what it yields.
pub fn feed(stage: &mut Stage, slot: u32, tokens: &[Token]) -> Vec<f32> {
    let mut out = Vec::new();
    stage.run(&rows(stage, slot, tokens.len()), Input::Tokens(tokens), &mut out).unwrap();
    out
}

/// Appends `tokens` to `slot`, first `n_prefill` at once, then one by one; the results one after the other.
pub fn generate(stage: &mut Stage, slot: u32, tokens: &[Token], n_prefill: usize) -> Vec<f32> {
    let mut all = feed(stage, slot, &tokens[..n_prefill]);
    for token in &tokens[n_prefill..] {
        all.extend(feed(stage, slot, &[*token]));
    }
    all
}

/// Appends one token of `text` to each of `slots` in one run, the one at its position; an error changes nothing.
pub fn decode(stage: &mut Stage, slots: &[u32], text: &[Token]) -> Result<Vec<f32>, RunError> {
    let row = |&slot: &u32| Row { slot, position: stage.len(slot), output: true };
    let rows: Vec<_> = slots.iter().map(row).collect();
    let input: Vec<_> = rows.iter().map(|row| text[row.position as usize]).collect();
    let mut out = Vec::new();
    stage.run(&rows, Input::Tokens(&input), &mut out).map(|()| out)
}

/// Whether a row that is alone in its call has the bits that it has beside another one; a property of llama.cpp's
/// kernels for the model's types on this machine. Clears all slots, and needs two.
pub fn lone_rows_agree(stage: &mut Stage) -> bool {
    let text = [1, 2, 3];
    stage.clear_all();
    let lone = decode(stage, &[0], &text).unwrap();
    stage.clear_all();
    let both = decode(stage, &[0, 1], &text).unwrap();
    stage.clear_all();
    both[..lone.len()] == lone
}

/// The same of chunks of two and of four rows.
pub fn chunks_agree(stage: &mut Stage) -> bool {
    stage.clear_all();
    let four = feed(stage, 0, &[1, 2, 3, 4]);
    let halves = [feed(stage, 1, &[1, 2]), feed(stage, 1, &[3, 4])].concat();
    stage.clear_all();
    four == halves
}

/// Largest difference, as a share of the largest value.
pub fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).all(|value| value.is_finite()), "values are not finite");
    let scale = a.iter().fold(f32::MIN_POSITIVE, |scale, value| scale.max(value.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / scale).fold(0.0, f32::max)
}
