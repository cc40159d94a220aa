//! `cargo xtask bench serve`: many users at once, against the limit of the machine.
//!
//! One run measures a cluster of `brigade` processes and the same model file in one process ([`bar`]), each alone and
//! one after the other, round by round, so that both see the same moods of the machine. It prints medians of the
//! rounds, ratios against the project's targets, and what is unmet; it writes all raw values as JSON and the curves
//! over the number of streams as SVG. Parts, all of them unless `--part` names some:
//!
//! - *decode*: 1 to 32 streams at once. Speed of all together, first token, gaps between tokens, and how busy each
//!   stage was, against the whole model with the threads of one node and with the threads of all nodes together: the
//!   limit of the hardware. What counts is the time in which all streams decode; see [`load`].
//! - *prompt*: the first token of a prompt of 512 tokens that is alone, against the threads of one node: chunks of the
//!   prompt overlap in the stages.
//! - *mixed*: four streams decode, then a prompt of 1,500 tokens arrives. The longest gap of each stream over the
//!   median of its own gaps, once of those before the prompt and once of all; and the prompt's first token over that of
//!   another prompt of the same length that had the cluster to itself.
//! - *hop*: what software and links take between two stages for a lone stream, and of what that is made.
//! - *memory*: what an idle session costs beside its keys and values.
//!
//! All times of a cluster are taken by an HTTP client on the same machine, which takes its share of the cores; those of
//! the bar are taken inside the process. A token is a piece of text that arrives, so a model whose tokens all have a
//! text is needed; the synthetic ones are such.
//!
//! The targets hold for two processes of one thread, each pinned to its own core:
//! `cargo xtask bench serve --pin --json FILE --svg FILE`.

mod bar;
pub mod load;
mod metrics;
mod parts;
pub mod plot;
mod report;
mod rounds;

use std::path::{Path, PathBuf};

use brigade_base::Token;
use clap::{Args, ValueEnum};

pub use bar::{BarArgs, run as run_bar};

use self::parts::{DecodeShape, HOP_CONTEXT, MEMORY_CONTEXT, MEMORY_SESSIONS};
use self::report::Report;
use self::rounds::{ClusterRound, Round};
use super::{ModelArgs, ModelFacts};
use crate::cluster::{Cluster, ClusterSpec, brigade};
use crate::failure::{Failure, Outcome};
use crate::output::{error, line};
use crate::processes::Processes;
use crate::synth::Shape;

/// Tokens of the prompt whose first token is measured alone.
const LONG_PROMPT: u32 = 512;

/// Prompts of that length in a round.
const PROMPT_SAMPLES: u32 = 2;

/// Tokens of the prompt that arrives among streams.
const MIXED_PROMPT: u32 = 1500;

/// Streams that it arrives among.
const MIXED_STREAMS: u32 = 4;

/// Tokens that a stream may generate while such a prompt is being read: one with each chunk, if chunks have 2 tokens.
const MIXED_TOKENS: u32 = MIXED_PROMPT / 2;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Streams at once: their speed, first tokens, gaps between tokens, and how busy each stage was
    Decode,
    /// The first token of a 512-token prompt that is alone
    Prompt,
    /// A 1,500-token prompt among four streams that decode
    Mixed,
    /// What software and links take between two stages
    Hop,
    /// What idle sessions take beside their keys and values
    Memory,
}

/// `cargo xtask bench serve`
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// What to measure [default: all]
    #[arg(long = "part", value_name = "PART", value_delimiter = ',')]
    pub parts: Vec<Part>,
    /// Nodes besides the coordinator
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub workers: u32,
    /// Threads that compute in each node
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub threads: u32,
    /// Layers of each stage, the coordinator's last [default: by memory]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub layers: Vec<u32>,
    /// Give each process its own cores (needs `taskset`)
    #[arg(long)]
    pub pin: bool,
    /// How often to measure each
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Numbers of streams at once
    #[arg(long, value_name = "N,..", default_value = "1,2,4,8,16,32", value_delimiter = ',',
          value_parser = clap::value_parser!(u32).range(1..=256))]
    pub streams: Vec<u32>,
    /// Gaps between tokens that are measured of each stream
    #[arg(long, value_name = "N", default_value_t = 48, value_parser = clap::value_parser!(u32).range(2..=4096))]
    pub tokens: u32,
    /// Tokens of a stream's prompt
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..=4096))]
    pub prompt: u32,
    /// Write all values as JSON to this file, or without a file to standard output instead of the tables
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
    /// Plot throughput and latency over the streams into this file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

impl ServeArgs {
    fn wants(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    /// Most streams at once.
    fn most_streams(&self) -> u32 {
        self.streams.iter().copied().max().unwrap_or(1)
    }

    /// What each stream does while `begins_early` tokens may be generated before it is measured.
    fn shape(&self, begins_early: u32) -> DecodeShape {
        // Streams need not advance evenly: twice what is measured leaves room for it.
        DecodeShape { prompt: self.prompt, tokens: self.tokens, most: 2 * self.tokens + begins_early + 16 }
    }

    /// The streams of *decode*. Streams that come together begin one after the other: while a prompt is read, those
    /// before it get a token with each of its chunks, at most one for two tokens of the prompt, and with usual chunks
    /// four at most.
    fn decode_shape(&self) -> DecodeShape {
        self.shape(self.most_streams() * (self.prompt / 2).min(4))
    }

    /// The streams of *mixed*.
    fn mixed_shape(&self) -> DecodeShape {
        self.shape(MIXED_STREAMS * (self.prompt / 2).min(4) + MIXED_TOKENS)
    }

    /// Tokens that a session of a shape must hold.
    fn context(shape: DecodeShape) -> u32 {
        shape.prompt + shape.most + 2
    }
}

/// Prompts that never repeat.
pub struct Prompts {
    n_vocab: u32,
    n_made: u64,
}

impl Prompts {
    /// Of a model with so many tokens.
    pub fn new(n_vocab: u32) -> Self {
        Self { n_vocab, n_made: 0 }
    }

    /// The next one.
    pub fn fresh(&mut self, n_tokens: u32) -> Vec<Token> {
        self.n_made += 1;
        super::prompt(self.n_made, n_tokens, self.n_vocab)
    }
}

/// Measures, prints and writes.
pub fn run(args: &ServeArgs) -> Outcome {
    let brigade = brigade()?;
    let model = args.model.path_or(Shape::Llama1b)?;
    let facts = ModelFacts::of(&model)?;
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    if (args.workers + 1) * args.threads > n_cores as u32 {
        error(&format!("note: {} threads compute on {n_cores} core(s)", (args.workers + 1) * args.threads));
    }
    let processes = Processes::new()?;
    let mut bench = Bench { processes, brigade, model, prompts: Prompts::new(facts.n_vocab), n_clusters: 0, args };
    let rounds = (1..=args.rounds).map(|round| bench.round(round)).collect::<Outcome<Vec<Round>>>()?;
    let report = Report::new(args, &bench.model, &facts, n_cores, rounds);
    if let Some(path) = &args.svg {
        std::fs::write(path, plot::draw(&report.plots())).map_err(Failure::io(path.display()))?;
    }
    let json = serde_json::to_string_pretty(&report).map_err(Failure::said)?;
    match &args.json {
        Some(path) if path == Path::new("-") => return line(json),
        Some(path) => std::fs::write(path, json + "\n").map_err(Failure::io(path.display()))?,
        None => {}
    }
    report.print()
}

/// What a run owns.
struct Bench<'a> {
    processes: Processes,
    brigade: PathBuf,
    model: PathBuf,
    prompts: Prompts,
    /// Clusters that were started, to name their directories.
    n_clusters: u32,
    args: &'a ServeArgs,
}

impl Bench<'_> {
    fn round(&mut self, round: u32) -> Outcome<Round> {
        let args = self.args;
        let say = |what: &str| error(&format!("round {round} of {}: {what} ...", args.rounds));
        let (decodes, prompts) = (args.wants(Part::Decode), args.wants(Part::Prompt));
        let mut result = Round::default();
        if decodes || prompts {
            say(&format!("one process, {} thread(s)", args.threads));
            result.whole_one = Some(bar::measure(&self.processes, &self.bar(args.threads, prompts), args.pin)?);
        }
        if decodes {
            let threads = (args.workers + 1) * args.threads;
            say(&format!("one process, {threads} threads"));
            result.whole_all = Some(bar::measure(&self.processes, &self.bar(threads, false), args.pin)?);
        }
        let cluster = &mut result.cluster;
        if decodes {
            say(&format!("{} processes under {} streams", args.workers + 1, args.most_streams()));
            self.decode(cluster)?;
        }
        if prompts || args.wants(Part::Mixed) || args.wants(Part::Hop) {
            say(&format!("{} processes with long prompts", args.workers + 1));
            self.long(cluster)?;
        }
        if args.wants(Part::Memory) {
            say(&format!("{} processes with idle sessions", args.workers + 1));
            let running = self.cluster(MEMORY_CONTEXT, MEMORY_SESSIONS)?;
            cluster.memory = parts::memory(&self.processes, &running.endpoint, &mut self.prompts)?;
            self.processes.end();
        }
        Ok(result)
    }

    fn decode(&mut self, result: &mut ClusterRound) -> Outcome {
        let shape = self.args.decode_shape();
        let running = self.cluster(ServeArgs::context(shape), self.args.most_streams())?;
        for &n in &self.args.streams {
            result.decode.push(parts::decode(&running.endpoint, &mut self.prompts, n, shape)?);
        }
        self.processes.end();
        Ok(())
    }

    fn long(&mut self, result: &mut ClusterRound) -> Outcome {
        let args = self.args;
        let shape = args.mixed_shape();
        let longest = (MIXED_PROMPT + 4).max(HOP_CONTEXT).max(ServeArgs::context(shape));
        let running = self.cluster(longest, MIXED_STREAMS + 1)?;
        // First, since what the coordinator tells is of its last passes.
        if args.wants(Part::Hop) {
            result.hop = Some(parts::hop(&running, &mut self.prompts)?);
        }
        if args.wants(Part::Prompt) {
            result.prompt_first_token_ms = parts::prompt(&running.endpoint, &mut self.prompts)?;
        }
        if args.wants(Part::Mixed) {
            result.mixed = Some(parts::mixed(&running.endpoint, &mut self.prompts, shape)?);
        }
        self.processes.end();
        Ok(())
    }

    /// A cluster that has answered once.
    fn cluster(&mut self, context: u32, parallel: u32) -> Outcome<Cluster> {
        self.n_clusters += 1;
        let workers = (1..=self.args.workers).map(|k| format!("worker-{k}"));
        let spec = ClusterSpec {
            names: std::iter::once("coordinator".to_owned()).chain(workers).collect(),
            model: Some(self.model.clone()),
            threads: self.args.threads,
            pin: self.args.pin,
            context: Some(context),
            parallel: Some(parallel),
            layers: self.args.layers.clone(),
        };
        let state_dir = self.processes.dir().join(format!("cluster-{}", self.n_clusters));
        let cluster = Cluster::start(&self.processes, &self.brigade, &state_dir, &spec)?;
        load::first_token_alone(&cluster.endpoint, &self.prompts.fresh(self.args.prompt))?;
        Ok(cluster)
    }

    fn bar(&self, threads: u32, long_prompt: bool) -> BarArgs {
        let args = self.args;
        BarArgs {
            model: self.model.clone(),
            threads,
            streams: if args.wants(Part::Decode) { args.streams.clone() } else { Vec::new() },
            tokens: args.tokens,
            prompt: args.prompt,
            context: ServeArgs::context(args.decode_shape()),
            long_prompt,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ServeArgs,
    }

    fn parse(words: &[&str]) -> ServeArgs {
        Line::parse_from(std::iter::once(&"serve").chain(words)).args
    }

    #[test]
    fn all_parts_are_measured_unless_some_are_named() {
        let (all, some) = (parse(&[]), parse(&["--part", "hop,memory", "--json"]));
        let wanted = |args: &ServeArgs| Part::value_variants().iter().filter(|part| args.wants(**part)).count();
        assert_eq!((wanted(&all), wanted(&some)), (5, 2));
        assert_eq!(all.streams, [1, 2, 4, 8, 16, 32]);
        assert_eq!((all.json.as_deref(), some.json.as_deref()), (None, Some(Path::new("-"))));
    }

    #[test]
    fn sessions_hold_what_streams_may_generate() {
        let args = parse(&["--tokens", "10", "--prompt", "2", "--streams", "3"]);
        assert_eq!(args.decode_shape().most, 2 * 10 + 3 + 16);
        assert!(ServeArgs::context(args.mixed_shape()) > 2 * 10 + MIXED_TOKENS);
    }

    #[test]
    fn prompts_never_repeat() {
        let mut prompts = Prompts::new(1000);
        let made: std::collections::HashSet<_> = (0..100).map(|_| prompts.fresh(4)).collect();
        assert_eq!(made.len(), 100);
    }
}
