//! Benchmarks: `cargo xtask bench KIND`.
//!
//! - [`cluster`] compares a split model with the same model in one process, side by side in one run.
//! - [`whole`] measures one process; the other benchmarks start it as a child, so that its memory is its own.
//!
//! Prompts are tokens, answers have an exact length and are greedy, so that two runs do the same work.

pub mod cluster;
pub mod whole;

use std::path::PathBuf;

use brigade_base::Token;
use brigade_gguf::{Architecture, ModelFile};
use clap::{Args, Subcommand};

use crate::cluster::profile_dir;
use crate::failure::{Failure, Outcome};
use crate::output::error;
use crate::synth::{Quantisation, Shape, name_of, write};

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// A model on several nodes against the same model in one process
    Cluster(cluster::ClusterArgs),
    /// A model in one process, without HTTP
    Whole(whole::WholeArgs),
}

/// Runs a benchmark.
pub fn run(bench: &Bench) -> Outcome {
    match bench {
        Bench::Cluster(args) => cluster::run(args),
        Bench::Whole(args) => whole::run(args),
    }
}

/// Which model.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// A GGUF file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shape", "quantisation"])]
    pub model: Option<PathBuf>,
    /// Without a file: the shape of a model with random weights, made once and kept
    #[arg(long, default_value = "tinyllama-1.1b")]
    pub shape: Shape,
    /// How its weights are stored
    #[arg(long = "type", value_name = "TYPE", default_value = "Q4_0", ignore_case = true)]
    pub quantisation: Quantisation,
}

impl ModelArgs {
    /// The file, made if need be.
    pub fn path(&self) -> Outcome<PathBuf> {
        if let Some(path) = &self.model {
            return Ok(path.clone());
        }
        let dir = profile_dir()?.parent().map_or_else(|| PathBuf::from("bench"), |target| target.join("bench"));
        std::fs::create_dir_all(&dir).map_err(Failure::io(dir.display()))?;
        let path = dir.join(format!("{}-{}.gguf", name_of(self.shape), name_of(self.quantisation)));
        if !path.is_file() {
            error(&format!("writing {} once ...", path.display()));
            write(self.shape, self.quantisation, 1, &path)?;
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

    /// The prompts, one for each stream: tokens from the middle half of the vocabulary, where no model keeps its
    /// control tokens.
    pub fn prompts(&self, n_vocab: u32) -> Vec<Vec<Token>> {
        let prompt = |stream: u32| {
            let mut state = u64::from(stream) + 1;
            let mut token = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (n_vocab / 4 + (state >> 33) as u32 % (n_vocab / 2).max(1)) as Token
            };
            (0..self.prompt).map(|_| token()).collect()
        };
        (0..self.streams).map(prompt).collect()
    }
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
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_few_values() {
        assert_eq!([median([]), median([2.0]), median([4.0, 1.0, 9.0]), median([1.0, 2.0])], [0.0, 2.0, 4.0, 1.5]);
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
