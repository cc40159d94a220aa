//! Benchmarks: `cargo xtask bench KIND`.
//!
//! - [`cluster`] compares a split model with the same model in one process, side by side in one run.
//! - [`serve`] compares the two under many streams, with the targets of the project, and plots them.
//! - [`plan`] compares what the planner predicts with what clusters of unlike nodes do.
//! - [`scheduler`] leaves the model out and measures what is around it.
//! - [`whole`] measures one process; the other benchmarks start it as a child, so that its memory is its own.
//!
//! Prompts are tokens, answers have an exact length and are greedy, so that two runs do the same work.

pub mod cluster;
pub mod plan;
pub mod scheduler;
pub mod serve;
pub mod whole;

use std::path::PathBuf;

use brigade_base::Token;
use brigade_gguf::{Architecture, ModelFile};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::cluster::profile_dir;
use crate::failure::{Failure, Outcome};
use crate::output::error;
use crate::synth::{Quantisation, Shape, name_of, write};

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// A model on several nodes against the same model in one process
    Cluster(cluster::ClusterArgs),
    /// A model on several nodes under 1 to 32 streams against one process, with targets and a plot
    ///
    /// Each round measures the whole model in one process with the threads of one node, the same with the threads of
    /// all nodes together, and then the cluster, each alone and on the same file. Medians of the rounds are held
    /// against the targets, which are meant for two pinned processes of one thread: `--pin`. Streams count while all of
    /// them decode; times of the cluster are those of an HTTP client on this machine.
    Serve(serve::ServeArgs),
    /// What the planner predicts against what clusters of unlike nodes do, with targets and a drawing
    ///
    /// Two to four processes of one thread, throttled and capped in memory, on links that are shaped; nobody else may
    /// use this machine meanwhile, and shaped links need root. It takes about 20 minutes.
    Plan(plan::PlanArgs),
    /// A model in one process, without HTTP
    Whole(whole::WholeArgs),
    /// A thousand streams without a model: what scheduling and HTTP cost
    Scheduler(scheduler::SchedulerArgs),
    /// An endpoint without a model; the child of `scheduler`
    #[command(hide = true)]
    Rehearsal(scheduler::RehearsalArgs),
    /// A model in one process under many streams; the child of `serve`
    #[command(hide = true)]
    Bar(serve::BarArgs),
}

/// Runs a benchmark.
pub fn run(bench: &Bench) -> Outcome {
    match bench {
        Bench::Cluster(args) => cluster::run(args),
        Bench::Plan(args) => plan::run(args),
        Bench::Scheduler(args) => scheduler::run(args),
        Bench::Rehearsal(args) => scheduler::run_rehearsal(args),
        Bench::Serve(args) => serve::run(args),
        Bench::Whole(args) => whole::run(args),
        Bench::Bar(args) => serve::run_bar(args),
    }
}

/// Which model.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// A GGUF file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shape", "quantisation"])]
    pub model: Option<PathBuf>,
    /// Without a file: the shape of a model with random weights, made once and kept
    /// [default: tinyllama-1.1b; for `serve` llama-1b]
    #[arg(long)]
    pub shape: Option<Shape>,
    /// How its weights are stored
    #[arg(long = "type", value_name = "TYPE", default_value = "Q4_0", ignore_case = true)]
    pub quantisation: Quantisation,
}

impl ModelArgs {
    /// The file, made if need be.
    pub fn path(&self) -> Outcome<PathBuf> {
        self.path_or(Shape::TinyLlama)
    }

    /// The same with another default shape.
    pub fn path_or(&self, shape: Shape) -> Outcome<PathBuf> {
        if let Some(path) = &self.model {
            return Ok(path.clone());
        }
        let dir = profile_dir()?.parent().map_or_else(|| PathBuf::from("bench"), |target| target.join("bench"));
        std::fs::create_dir_all(&dir).map_err(Failure::io(dir.display()))?;
        let shape = self.shape.unwrap_or(shape);
        let path = dir.join(format!("{}-{}.gguf", name_of(shape), name_of(self.quantisation)));
        if !path.is_file() {
            error(&format!("writing {} once ...", path.display()));
            write(shape, self.quantisation, 1, &path)?;
        }
        Ok(path)
    }
}

/// How much work.
#[derive(Debug, Clone, Copy, Args)]
pub struct WorkArgs {
    /// Threads that compute in each process
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub threads: u32,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=65536))]
    pub tokens: u32,
    /// Tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub prompt: u32,
    /// Requests at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub streams: u32,
}

impl WorkArgs {
    /// Tokens that a session must hold.
    pub fn context(&self) -> u32 {
        self.prompt + self.tokens + 1
    }

    /// The prompts, one for each stream.
    pub fn prompts(&self, n_vocab: u32) -> Vec<Vec<Token>> {
        (1..=u64::from(self.streams)).map(|seed| prompt(seed, self.prompt, n_vocab)).collect()
    }
}

/// A prompt: tokens from the middle half of the vocabulary, where no model keeps its control tokens.
pub fn prompt(seed: u64, n_tokens: u32, n_vocab: u32) -> Vec<Token> {
    let mut state = seed;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (n_vocab / 4 + (state >> 33) as u32 % (n_vocab / 2).max(1)) as Token
    };
    (0..n_tokens).map(|_| token()).collect()
}

/// What `/v1/completions` is asked: the greedy continuation of a prompt by exactly `n_tokens`, streamed.
pub fn completion(prompt: &[Token], n_tokens: u32) -> Value {
    json!({
        "model": "default",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": n_tokens,
        "ignore_eos": true,
        "stream": true,
        "stream_options": {"include_usage": true},
    })
}

/// What is known of a model without loading it.
pub struct ModelFacts {
    /// Tokens in its vocabulary.
    pub n_vocab: u32,
    /// Layers.
    pub n_layers: u32,
    /// Bytes of its weights.
    pub weight_bytes: u64,
}

impl ModelFacts {
    /// Reads a model's header.
    pub fn of(path: &std::path::Path) -> Outcome<Self> {
        let file = ModelFile::open(path).map_err(Failure::said)?;
        let architecture = Architecture::of(file.catalog()).map_err(Failure::said)?;
        let (n_vocab, n_layers) = (architecture.n_vocab, architecture.n_layers);
        Ok(Self { n_vocab, n_layers, weight_bytes: file.catalog().weight_bytes() })
    }
}

/// The middle of some values; 0 for none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    quantile(values, 0.5)
}

/// The value below which the share `q` (0 to 1) of some values lies, between two of them in proportion; 0 for none.
pub fn quantile(values: impl IntoIterator<Item = f64>, q: f64) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = q.clamp(0.0, 1.0) * last as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_few_values() {
        assert_eq!([median([]), median([2.0]), median([4.0, 1.0, 9.0]), median([1.0, 2.0])], [0.0, 2.0, 4.0, 1.5]);
    }

    #[test]
    fn quantiles_lie_between_values() {
        let values = || (0..=10).map(f64::from);
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|q| quantile(values(), q)), [0.0, 5.0, 9.9, 10.0]);
        assert_eq!([quantile([], 0.9), quantile([3.0], 0.9), quantile([1.0, 2.0], 7.0)], [0.0, 3.0, 2.0]);
    }

    #[test]
    fn prompts_are_repeatable_different_and_within_the_vocabulary() {
        let work = WorkArgs { threads: 1, tokens: 8, prompt: 50, streams: 3 };
        let prompts = work.prompts(1000);
        assert_eq!(prompts, work.prompts(1000));
        assert!(prompts[0] != prompts[1] && prompts.len() == 3);
        assert!(prompts.iter().flatten().all(|token| (250..750).contains(token)));
        assert_eq!(prompts[2].len(), 50);
    }
}
