//! The right answers: the same file, whole, in this process, without network, batching or scheduling.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use brigade_base::{Hooks, KvTypes, Token};
use brigade_engine::{Input, Row, Sampler, Sampling, Stage, StageOptions, Vocabulary};
use brigade_gguf::{ModelFile, vocabulary_header};

use super::{MAX_ANSWER, abacus};

/// Tokens of one session: what abacus was trained for.
pub const CONTEXT: u32 = 1024;

/// What a session yields.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answer {
    /// The tokens, the end token not among them.
    pub tokens: Vec<Token>,
    /// Their text.
    pub text: String,
    /// The natural logarithm of each token's probability.
    pub logprobs: Vec<f64>,
    /// The same and those of the five likeliest tokens, best first, as the engine has them: to compare bits.
    pub printed: Vec<(f32, Vec<f32>)>,
    /// `stop` or `length`.
    pub finish: &'static str,
    /// Tokens generated, the end token counted.
    pub n_generated: usize,
}

/// A model and what it has answered so far.
pub struct Oracle {
    stage: Stage,
    vocabulary: Vocabulary,
    known: HashMap<(Vec<Token>, u32, bool), Arc<Answer>>,
}

/// The oracle of this test binary, for abacus.
pub fn oracle() -> MutexGuard<'static, Oracle> {
    static ORACLE: OnceLock<Mutex<Oracle>> = OnceLock::new();
    ORACLE.get_or_init(|| Mutex::new(Oracle::of(&abacus()))).lock().unwrap_or_else(PoisonError::into_inner)
}

/// A chat with one message, as abacus was trained on it.
pub fn rendered(prompt: &str) -> String {
    conversation(&[prompt])
}

/// What the model is told first, and then a conversation.
pub fn instructed(system: &str, turns: &[&str]) -> String {
    format!("<|im_start|>system\n{system}<|im_end|>\n{}", conversation(turns))
}

/// A conversation of user and assistant in turns; the last turn is the user's.
pub fn conversation(turns: &[&str]) -> String {
    let roles = ["user", "assistant"].into_iter().cycle();
    let turns: String =
        turns.iter().zip(roles).map(|(text, role)| format!("<|im_start|>{role}\n{text}<|im_end|>\n")).collect();
    format!("{turns}<|im_start|>assistant\n")
}

impl Oracle {
    /// An oracle of another model file.
    pub fn of(model: &Path) -> Self {
        Self::with(model, &[], KvTypes::default())
    }

    /// An oracle of a model with adapters and their scales, and its keys and values stored so.
    pub fn with(model: &Path, adapters: &[(&Path, f32)], kv: KvTypes) -> Self {
        brigade_engine::init();
        let options = StageOptions {
            n_ctx: CONTEXT,
            n_sessions: 1,
            max_rows: brigade_node::CHUNK,
            max_outputs: 1,
            n_threads: 1,
            n_embd: 0,
            n_vocab: 0,
            hooks: Hooks::default(),
            pooling: None,
            kv,
        };
        let stage = Stage::load_file_adapted(model, adapters, options).unwrap();
        let header = vocabulary_header(ModelFile::open(model).unwrap().catalog());
        let n_bytes = header.len() as u64;
        let vocabulary = Vocabulary::load(Box::new(std::io::Cursor::new(header)), n_bytes).unwrap();
        Self { stage, vocabulary, known: HashMap::new() }
    }

    /// The tokens of a text, control tokens among them.
    pub fn tokens(&self, text: &str) -> Vec<Token> {
        self.vocabulary.tokenize(text, true, true).unwrap()
    }

    /// The answer to one question.
    pub fn chat(&mut self, prompt: &str) -> Arc<Answer> {
        let tokens = self.tokens(&rendered(prompt));
        self.generate(&tokens, MAX_ANSWER, false)
    }

    /// The likeliest continuation of `prompt`, the lowest token id among equals.
    pub fn generate(&mut self, prompt: &[Token], max_tokens: u32, ignore_end: bool) -> Arc<Answer> {
        let question = (prompt.to_vec(), max_tokens, ignore_end);
        if let Some(answer) = self.known.get(&question) {
            return Arc::clone(answer);
        }
        let answer = Arc::new(self.compute(prompt, max_tokens, ignore_end));
        self.known.insert(question, Arc::clone(&answer));
        answer
    }

    fn compute(&mut self, prompt: &[Token], max_tokens: u32, ignore_end: bool) -> Answer {
        self.stage.clear_all();
        self.go_on(prompt, 0, max_tokens, ignore_end)
    }

    /// The likeliest continuation of `prompt`, of whose tokens the first `n_kept` are not computed again: they are as
    /// the last call left them, in the batch shapes that it had.
    pub fn go_on(&mut self, prompt: &[Token], n_kept: u32, max_tokens: u32, ignore_end: bool) -> Answer {
        self.choose_with(|logits, _| likeliest(logits), prompt, n_kept, max_tokens, ignore_end)
    }

    /// The continuation of `prompt` by exactly `n` tokens that are drawn.
    pub fn sample(&mut self, prompt: &[Token], n: u32, sampling: &Sampling) -> Answer {
        let mut sampler = Sampler::new(sampling, self.stage.n_vocab()).unwrap();
        let draw = |logits: &[f32], position| {
            let token = sampler.sample(logits, position).unwrap();
            sampler.accept(token);
            token
        };
        self.choose_with(draw, prompt, 0, n, true)
    }

    /// The continuation of `prompt` by the tokens that `choose` takes, given logits and a position.
    fn choose_with(
        &mut self,
        mut choose: impl FnMut(&[f32], u32) -> Token,
        prompt: &[Token],
        n_kept: u32,
        max_tokens: u32,
        ignore_end: bool,
    ) -> Answer {
        self.stage.truncate(0, n_kept).unwrap();
        let mut logits = Vec::new();
        let mut new = &prompt[n_kept as usize..];
        while !new.is_empty() {
            // A row that is alone is computed in another way; the schedule leaves none of a prompt alone.
            let most = brigade_node::CHUNK as usize;
            let n = if new.len() == most + 1 { most - 1 } else { new.len().min(most) };
            self.feed(&new[..n], &mut logits);
            new = &new[n..];
        }
        let mut answer = Answer::default();
        let finish = loop {
            let token = choose(&logits, self.stage.len(0));
            answer.n_generated += 1;
            if self.vocabulary.is_end(token) && !ignore_end {
                break "stop";
            }
            let (own, top) = brigade_engine::log_probabilities(&logits, token, 5);
            answer.tokens.push(token);
            answer.logprobs.push(logprob(&logits, token));
            answer.printed.push((own, top.into_iter().map(|(_, logprob)| logprob).collect()));
            if answer.n_generated >= max_tokens as usize {
                break "length";
            }
            self.feed(&[token], &mut logits);
        };
        let bytes: Vec<u8> =
            answer.tokens.iter().flat_map(|&token| self.vocabulary.token_bytes(token, false)).collect();
        Answer { text: String::from_utf8_lossy(&bytes).into_owned(), finish, ..answer }
    }

    /// Appends tokens; `logits` are those of the last.
    fn feed(&mut self, tokens: &[Token], logits: &mut Vec<f32>) {
        let start = self.stage.len(0);
        let row = |i: usize| Row { slot: 0, position: start + i as u32, output: i + 1 == tokens.len() };
        let rows: Vec<Row> = (0..tokens.len()).map(row).collect();
        self.stage.run(&rows, Input::Tokens(tokens), logits).unwrap();
    }
}

/// The likeliest token, the lowest id among equals.
fn likeliest(logits: &[f32]) -> Token {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as Token
}

/// The logarithm of a token's probability.
fn logprob(logits: &[f32], token: Token) -> f64 {
    let max = logits[likeliest(logits) as usize];
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - f64::from(max)).exp()).sum();
    f64::from(logits[token as usize]) - f64::from(max) - sum.ln()
}
