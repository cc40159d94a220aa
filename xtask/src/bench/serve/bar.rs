//! The bar: the whole model in one process, as a good server on one machine would run it.
//!
//! Prompts are read one after the other, each in as large chunks as a coordinator may use; then all streams go on in
//! *one* batch per token. No HTTP, no links, no waiting. `bench serve` starts this program as a child for it, pinned to
//! as many cores as it has threads, so that neither side inherits memory or threads from the other.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use super::load::{Steady, Track, all_began};
use super::rounds::{DecodePoint, WholeRound};
use super::{LONG_PROMPT, PROMPT_SAMPLES, Prompts};
use crate::bench::ModelFacts;
use crate::cluster::on_cores;
use crate::failure::{Failure, Outcome};
use crate::output::line;
use crate::processes::Processes;
use crate::whole::{Generated, Whole};

/// How long the child may take: an hour of a very slow machine helps nobody.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// The child's arguments.
#[derive(Debug, Clone, Args)]
pub struct BarArgs {
    /// The model
    #[arg(long)]
    pub model: PathBuf,
    /// Threads that compute
    #[arg(long)]
    pub threads: u32,
    /// Numbers of streams to measure
    #[arg(long, value_delimiter = ',')]
    pub streams: Vec<u32>,
    /// Gaps between tokens of each stream
    #[arg(long)]
    pub tokens: u32,
    /// Tokens of a stream's prompt
    #[arg(long)]
    pub prompt: u32,
    /// Tokens that a session must hold
    #[arg(long)]
    pub context: u32,
    /// Measure the first token of a long prompt, too
    #[arg(long)]
    pub long_prompt: bool,
}

impl BarArgs {
    fn to_child(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = ["bench", "bar", "--model"].map(Into::into).to_vec();
        args.push(self.model.clone().into_os_string());
        let numbers = [
            ("--threads", self.threads),
            ("--tokens", self.tokens),
            ("--prompt", self.prompt),
            ("--context", self.context),
        ];
        args.extend(numbers.iter().flat_map(|(flag, n)| [OsString::from(flag), n.to_string().into()]));
        if !self.streams.is_empty() {
            let streams: Vec<String> = self.streams.iter().map(u32::to_string).collect();
            args.extend(["--streams".into(), streams.join(",").into()]);
        }
        if self.long_prompt {
            args.push("--long-prompt".into());
        }
        args
    }
}

/// Measures in a child process.
pub fn measure(processes: &Processes, args: &BarArgs, pin: bool) -> Outcome<WholeRound> {
    let program = std::env::current_exe().map_err(Failure::io("the path of this program"))?;
    let mut command = on_cores(&program, pin.then_some((0, args.threads)));
    command.args(args.to_child());
    let lines = processes.start("whole", command)?;
    let result = lines.wait_for("its result", TIMEOUT, |line| serde_json::from_str(line).ok());
    processes.end();
    result
}

/// `cargo xtask bench bar`: measures in this process and prints one line of JSON.
pub fn run(args: &BarArgs) -> Outcome {
    let result = measure_here(&args.model, args)?;
    line(serde_json::to_string(&result).map_err(Failure::said)?)
}

fn measure_here(path: &Path, args: &BarArgs) -> Outcome<WholeRound> {
    let mut prompts = Prompts::new(ModelFacts::of(path)?.n_vocab);
    let n_sessions = args.streams.iter().copied().max().unwrap_or(1);
    let context = if args.long_prompt { args.context.max(LONG_PROMPT + 2) } else { args.context };
    let mut whole = Whole::open(path, args.threads, context, n_sessions)?;
    // Touches all weights once, as the token that goes around a cluster before it is ready does.
    whole.generate(&[prompts.fresh(2)], 2, false)?;
    let mut result = WholeRound { threads: args.threads, ..WholeRound::default() };
    for &n in &args.streams {
        let prompts: Vec<_> = (0..n).map(|_| prompts.fresh(args.prompt)).collect();
        let started = Instant::now();
        // One for the first token, one to count gaps from.
        let generated = whole.generate(&prompts, args.tokens as usize + 2, false)?;
        let steady = steady(&generated, started).ok_or_else(|| Failure::said("the model answered nothing"))?;
        result.decode.push(DecodePoint::new(n, &steady));
    }
    for _ in 0..if args.long_prompt { PROMPT_SAMPLES } else { 0 } {
        let generated = whole.generate(&[prompts.fresh(LONG_PROMPT)], 1, false)?;
        result.prompt_first_token_ms.push(generated.to_first.as_secs_f64() * 1000.0);
    }
    Ok(result)
}

/// Sums up by the rule that holds for streams of a cluster.
fn steady(generated: &Generated, started: Instant) -> Option<Steady> {
    let track = |first: &Duration| Track {
        asked: started,
        tokens: std::iter::once(first).chain(&generated.to_batches).map(|to| started + *to).collect(),
    };
    let tracks: Vec<Track> = generated.to_first_of_each.iter().map(track).collect();
    let end = started + *generated.to_batches.last()?;
    Some(Steady::of(&tracks, all_began(&tracks)?, end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Child {
        #[command(flatten)]
        args: BarArgs,
    }

    #[test]
    fn a_child_is_told_what_its_parent_means() {
        for (streams, long_prompt) in [(vec![1, 8], true), (vec![], false)] {
            let model = PathBuf::from("model.gguf");
            let args = BarArgs { model, threads: 2, streams, tokens: 48, prompt: 32, context: 400, long_prompt };
            // Its first two words are the subcommand.
            let read = Child::parse_from(args.to_child().into_iter().skip(1)).args;
            assert_eq!(format!("{read:?}"), format!("{args:?}"));
        }
    }

    #[test]
    fn batches_are_what_all_streams_do_at_once() {
        let ms = Duration::from_millis;
        let generated = Generated {
            to_first_of_each: vec![ms(100), ms(200)],
            to_batches: vec![ms(220), ms(240), ms(260)],
            ..Generated::default()
        };
        let steady = steady(&generated, Instant::now()).unwrap();
        assert!((steady.tokens_per_second - 100.0).abs() < 1e-6, "{steady:?}");
        assert!((steady.gap_ms.0 - 20.0).abs() < 1e-6 && (steady.first_token_ms - 150.0).abs() < 1e-6, "{steady:?}");
    }
}
