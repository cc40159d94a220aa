//! The whole model in one process: what a cluster's answers and speed are compared with.
//!
//! It shares with a coordinator the engine and the size of prompt chunks, and nothing else: no cutting, no frames, no
//! scheduler, and llama.cpp's own reader.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use brigade_base::{Hooks, KvTypes, Token};
use brigade_engine::{Input, Row, Sampler, Sampling, Stage, StageOptions, Vocabulary};

use crate::failure::{Failure, Outcome};

/// A model that is not split.
pub struct Whole {
    stage: Stage,
    vocabulary: Vocabulary,
}

/// What was generated for some prompts.
#[derive(Debug, Default)]
pub struct Generated {
    /// The tokens for each prompt, without the end token.
    pub answers: Vec<Vec<Token>>,
    /// Until the first prompt had its first token.
    pub to_first: Duration,
    /// Until each prompt had its first token.
    pub to_first_of_each: Vec<Duration>,
    /// Until each batch of answer tokens was computed: one token of each answer that still goes on.
    pub to_batches: Vec<Duration>,
    /// Until all was done.
    pub to_last: Duration,
}

impl Whole {
    /// Loads the model at `path` for `n_sessions` sessions of `n_ctx` tokens.
    pub fn open(path: &Path, n_threads: u32, n_ctx: u32, n_sessions: u32) -> Outcome<Self> {
        let failed = |error: &dyn std::fmt::Display| Failure::said(format!("{}: {error}", path.display()));
        let options = StageOptions {
            n_ctx,
            n_sessions,
            max_rows: brigade_node::CHUNK,
            max_outputs: n_sessions,
            n_threads,
            n_embd: 0,
            n_vocab: 0,
            hooks: Hooks::default(),
            pooling: None,
            kv: KvTypes::default(),
        };
        let stage = Stage::load_file(path, options).map_err(|error| failed(&error))?;
        let file = File::open(path).map_err(|error| failed(&error))?;
        let n_bytes = file.metadata().map_err(|error| failed(&error))?.len();
        let vocabulary = Vocabulary::load(Box::new(file), n_bytes).map_err(|error| failed(&error))?;
        Ok(Self { stage, vocabulary })
    }

    /// The greedy answer to a question in the ChatML format, of at most `n_max` tokens.
    pub fn chat(&mut self, question: &str, n_max: usize) -> Outcome<String> {
        let prompt = format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
        let tokens = self.vocabulary.tokenize(&prompt, true, true).map_err(Failure::said)?;
        let generated = self.generate(&[tokens], n_max, true)?;
        Ok(self.text(&generated.answers[0]))
    }

    /// The text of tokens; bytes that are no character become U+FFFD.
    pub fn text(&self, tokens: &[Token]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| self.vocabulary.token_bytes(*token, false)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Greedily continues the prompts, each in a session of its own, by at most `n_max` tokens; to the end token if
    /// `stop_at_end`. Prompts are read one after the other, then all sessions go on in one batch.
    pub fn generate(&mut self, prompts: &[Vec<Token>], n_max: usize, stop_at_end: bool) -> Outcome<Generated> {
        let started = Instant::now();
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let mut sampler = Sampler::new(&greedy, self.stage.n_vocab()).map_err(Failure::said)?;
        self.stage.clear_all();
        let mut logits = Vec::new();
        let mut next: Vec<(u32, Token)> = Vec::new();
        let mut done = Generated { answers: vec![Vec::new(); prompts.len()], ..Generated::default() };
        for (slot, prompt) in (0..).zip(prompts) {
            self.read(slot, prompt, &mut logits)?;
            next.push((slot, sampler.sample(&logits, self.stage.len(slot)).map_err(Failure::said)?));
            done.to_first_of_each.push(started.elapsed());
        }
        done.to_first = done.to_first_of_each.first().copied().unwrap_or_default();
        let n_vocab = self.stage.n_vocab() as usize;
        loop {
            next.retain(|(slot, token)| {
                let answer = &mut done.answers[*slot as usize];
                let goes_on = answer.len() < n_max && !(stop_at_end && self.vocabulary.is_end(*token));
                if goes_on {
                    answer.push(*token);
                }
                goes_on && answer.len() < n_max
            });
            if next.is_empty() {
                done.to_last = started.elapsed();
                return Ok(done);
            }
            let row = |(slot, _): &(u32, Token)| Row { slot: *slot, position: self.stage.len(*slot), output: true };
            let rows: Vec<Row> = next.iter().map(row).collect();
            let tokens: Vec<Token> = next.iter().map(|(_, token)| *token).collect();
            self.stage.run(&rows, Input::Tokens(&tokens), &mut logits).map_err(Failure::said)?;
            for ((slot, token), logits) in next.iter_mut().zip(logits.chunks_exact(n_vocab)) {
                *token = sampler.sample(logits, self.stage.len(*slot)).map_err(Failure::said)?;
            }
            done.to_batches.push(started.elapsed());
        }
    }

    /// Reads a prompt in chunks and leaves the logits of its last token. No chunk of a longer prompt is a single token,
    /// since the kernels for one row round otherwise than those for several.
    fn read(&mut self, slot: u32, prompt: &[Token], logits: &mut Vec<f32>) -> Outcome {
        let most = brigade_node::CHUNK as usize;
        let mut rest = prompt;
        while !rest.is_empty() {
            let n = if rest.len() == most + 1 { most - 1 } else { rest.len().min(most) };
            let (chunk, behind) = rest.split_at(n);
            rest = behind;
            let first = self.stage.len(slot);
            let is_last = |i: usize| rest.is_empty() && i + 1 == chunk.len();
            let row = |i: usize| Row { slot, position: first + i as u32, output: is_last(i) };
            let rows: Vec<Row> = (0..chunk.len()).map(row).collect();
            self.stage.run(&rows, Input::Tokens(chunk), logits).map_err(Failure::said)?;
        }
        if prompt.is_empty() { Err(Failure::said("the prompt is empty")) } else { Ok(()) }
    }
}
