//! `cargo xtask bench whole`: the whole model in this process, without HTTP or links. The bar for a cluster.

use std::path::{Path, PathBuf};
use std::time::Instant;

use brigade_base::ByteSize;
use clap::Args;
use serde::{Deserialize, Serialize};

use super::{ModelArgs, ModelFacts, WorkArgs};
use crate::failure::{Failure, Outcome};
use crate::output::line;
use crate::whole::Whole;

/// `cargo xtask bench whole`
#[derive(Debug, Args)]
pub struct WholeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub work: WorkArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What one process measured of itself.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct WholeResult {
    /// Seconds to load.
    pub load_s: f64,
    /// Milliseconds until the first token of the first prompt.
    pub first_token_ms: f64,
    /// Tokens per second after that, all streams together.
    pub tokens_per_second: f64,
    /// Resident memory at the end.
    pub resident_bytes: u64,
    /// What was answered, to be compared.
    pub texts: Vec<String>,
}

impl WholeArgs {
    /// The arguments that make a child do this work on `model`.
    pub fn for_child(model: &Path, work: &WorkArgs) -> Vec<std::ffi::OsString> {
        let mut args: Vec<std::ffi::OsString> = ["bench", "whole", "--json", "--model"].map(Into::into).to_vec();
        args.push(PathBuf::from(model).into_os_string());
        for (flag, n) in [
            ("--threads", work.threads),
            ("--tokens", work.tokens),
            ("--prompt", work.prompt),
            ("--streams", work.streams),
        ] {
            args.extend([flag.into(), n.to_string().into()]);
        }
        args
    }
}

/// Measures and prints.
pub fn run(args: &WholeArgs) -> Outcome {
    let result = measure(&args.model.path()?, &args.work)?;
    if args.json {
        return line(serde_json::to_string(&result).map_err(Failure::said)?);
    }
    line(format_args!("tokens/s     {:.2}", result.tokens_per_second))?;
    line(format_args!("first token  {:.1} ms", result.first_token_ms))?;
    line(format_args!("load         {:.2} s", result.load_s))?;
    line(format_args!("resident     {}", ByteSize(result.resident_bytes)))
}

fn measure(path: &Path, work: &WorkArgs) -> Outcome<WholeResult> {
    let facts = ModelFacts::of(path)?;
    let started = Instant::now();
    let mut whole = Whole::open(path, work.threads, work.context(), work.streams)?;
    let load_s = started.elapsed().as_secs_f64();
    let prompts = work.prompts(facts.n_vocab);
    // Touches all weights once, as the token that goes around a cluster before it is ready does.
    whole.generate(&[vec![prompts[0][0]]], 1, false)?;
    let generated = whole.generate(&prompts, work.tokens as usize, false)?;
    Ok(WholeResult {
        load_s,
        first_token_ms: generated.to_first.as_secs_f64() * 1000.0,
        tokens_per_second: decode_speed(work, (generated.to_last - generated.to_first).as_secs_f64()),
        resident_bytes: brigade_node::system::resident_memory().0,
        texts: generated.answers.iter().map(|answer| whole.text(answer)).collect(),
    })
}

/// Tokens per second of all streams, `seconds` from the first token of any to the last of all.
pub fn decode_speed(work: &WorkArgs, seconds: f64) -> f64 {
    f64::from(work.streams * work.tokens - 1) / seconds.max(f64::MIN_POSITIVE)
}
