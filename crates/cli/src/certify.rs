//! `brigade certify`: whether a model gives the same results cut into stages as whole, on this machine.
//!
//! The report goes to standard output whatever it says; the exit code is for scripts: 0 if every cut is exact or within
//! tolerance, 1 if one differs or something went wrong, 2 for a wrong command line, 3 if the model runs whole only, 4
//! if Brigade refuses it.

use std::path::Path;
use std::sync::Arc;

use brigade_base::ByteSize;
use brigade_engine::StageMemory;
use brigade_gguf::ModelFile;
use brigade_node::certify::{self, CertifyError, CertifyOptions, Cuts, MemoryLine, Outcome, Report, Verdict, certify};
use brigade_node::system;
use serde::Serialize;

use crate::args::CertifyArgs;
use crate::error::Failure;
use crate::progress::Bars;
use crate::{output, sources};

/// Exit code for a model that is not cut.
const WHOLE_ONLY: u8 = 3;

/// Exit code for a model that is not run.
const REFUSED: u8 = 4;

#[derive(Serialize)]
struct Answer {
    model: String,
    architecture: String,
    layers: u32,
    verdict: &'static str,
    /// Why it is no better than that.
    reason: Option<String>,
    cut_points: Vec<u32>,
    /// How texts were pooled, if it embeds them.
    pooling: Option<String>,
    /// The whole as one stage, then each cut.
    runs: Vec<Run>,
    stages: Vec<Stage>,
}

/// The model in one cut.
#[derive(Serialize)]
struct Run {
    /// First layer of each stage but the first.
    cuts: Vec<u32>,
    verdict: &'static str,
    /// Results that were compared with those of the whole.
    results: u32,
    /// Results with other bits.
    other_bits: u32,
    /// Results whose likeliest token is another one.
    other_tokens: u32,
    /// Largest error, as a share of the largest value of its result; null where a value is none.
    largest_error: Option<f64>,
    /// What went wrong.
    failure: Option<String>,
}

/// What a stage takes in memory.
#[derive(Serialize)]
struct Stage {
    /// First layer, and first layer behind it.
    layers: [u32; 2],
    predicted: Memory,
    found: Memory,
}

#[derive(Serialize)]
struct Memory {
    weights: u64,
    kv: u64,
    compute: u64,
}

impl From<StageMemory> for Memory {
    fn from(memory: StageMemory) -> Self {
        Self { weights: memory.weights, kv: memory.kv, compute: memory.compute }
    }
}

/// Examines the model and prints what was found.
pub fn run(args: &CertifyArgs) -> Result<(), Failure> {
    let opened = sources::open(&args.model, &args.sources, &args.state)?;
    let file = Arc::new(ModelFile::open(&opened.path).map_err(Failure::run)?);
    let options = CertifyOptions {
        cuts: args.cuts,
        n_tokens: args.tokens,
        n_threads: args.threads.unwrap_or_else(system::default_threads),
        seed: args.seed,
        kv: args.kv.types(),
        adapters: args.lora.clone(),
    };
    brigade_engine::init();
    let mut bars = Bars::new();
    let mut shown = String::new();
    let result = certify(&file, Some(&opened.path), &options, &mut |what, share| {
        if shown != what {
            bars.set(&shown, 1.0);
            what.clone_into(&mut shown);
        }
        bars.set(what, share);
    });
    bars.clear();
    let answer = match &result {
        Ok(report) => found(&opened.path, report),
        Err(CertifyError::Refused(reason)) => refused(&opened.path, &file, reason),
        Err(error @ CertifyError::KvTypes(_)) => return Err(Failure::usage(error)),
        Err(error) => return Err(Failure::run(error)),
    };
    if args.json {
        output::json(&answer)?
    } else {
        print(&answer)?
    }
    end(&answer, result.as_ref().ok().map(Report::verdict))
}

fn end(answer: &Answer, verdict: Option<Verdict>) -> Result<(), Failure> {
    let reason = answer.reason.as_deref().unwrap_or("there is no layer before which it may be cut");
    match verdict {
        Some(Verdict::Exact | Verdict::Close) => Ok(()),
        Some(Verdict::Differs) => Err(Failure::run("the model does not give the same results in every cut")),
        Some(Verdict::WholeOnly) => {
            Err(Failure::Verdict { text: format!("the model runs whole only: {reason}"), code: WHOLE_ONLY })
        }
        None => Err(Failure::Verdict { text: format!("the model is refused: {reason}"), code: REFUSED }),
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

fn refused(path: &Path, file: &ModelFile, reason: &str) -> Answer {
    let metadata = file.catalog().metadata();
    let architecture = metadata.str("general.architecture").unwrap_or("unknown");
    Answer {
        model: name_of(path),
        architecture: architecture.to_owned(),
        layers: metadata.u32(&format!("{architecture}.block_count")).unwrap_or(0),
        verdict: "refused",
        reason: Some(reason.to_owned()),
        cut_points: Vec::new(),
        pooling: None,
        runs: Vec::new(),
        stages: Vec::new(),
    }
}

fn found(path: &Path, report: &Report) -> Answer {
    let verdict = match report.verdict() {
        Verdict::Exact => "exact",
        Verdict::Close => "within tolerance",
        Verdict::Differs => "differs",
        Verdict::WholeOnly => "whole only",
    };
    let run = |plan: &certify::PlanOutcome| {
        let verdict = if plan.outcome.is_exact() {
            "exact"
        } else if plan.outcome.is_good() {
            "within tolerance"
        } else {
            "differs"
        };
        let (compared, failure) = match &plan.outcome {
            Outcome::Compared(comparison) => (Some(comparison), None),
            Outcome::Failed(error) => (None, Some(error.clone())),
        };
        Run {
            cuts: plan.cuts.clone(),
            verdict: if failure.is_some() { "failed" } else { verdict },
            results: compared.map_or(0, |it| it.n_results),
            other_bits: compared.map_or(0, |it| it.n_other),
            other_tokens: compared.map_or(0, |it| it.n_other_tokens),
            largest_error: compared.map(|it| it.error).filter(|error| error.is_finite()),
            failure,
        }
    };
    let stage = |line: &MemoryLine| Stage {
        layers: [line.layers.start(), line.layers.end()],
        predicted: line.predicted.into(),
        found: line.found.into(),
    };
    Answer {
        model: name_of(path),
        architecture: report.architecture.to_owned(),
        layers: report.n_layers,
        verdict,
        reason: report.reason().map(str::to_owned),
        cut_points: report.cut_points.clone(),
        pooling: report.pooling.map(|pooling| pooling.to_string()),
        runs: report.plans.iter().map(run).collect(),
        stages: report.memory.iter().map(stage).collect(),
    }
}

fn print(answer: &Answer) -> Result<(), Failure> {
    output::line(format_args!(
        "{} ({}, {} layers): {}",
        answer.model, answer.architecture, answer.layers, answer.verdict
    ))?;
    if let Some(reason) = &answer.reason {
        output::line(format_args!("  {reason}"))?;
    }
    for run in &answer.runs {
        let cuts = run.cuts.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let what = if cuts.is_empty() { "one stage".to_owned() } else { format!("cut before {cuts}") };
        let how = match (&run.failure, run.largest_error) {
            (Some(failure), _) => failure.clone(),
            (None, _) if run.other_bits == 0 => format!("all {} results have the bits of the whole", run.results),
            (None, error) => {
                let error = error.map_or_else(|| "beyond all numbers".to_owned(), |error| format!("{error:.1e}"));
                format!(
                    "{} of {} results have other bits, {} another token, largest error {error}",
                    run.other_bits, run.results, run.other_tokens
                )
            }
        };
        output::line(format_args!("  {what:<28} {:<16}  {how}", run.verdict))?;
    }
    for stage in &answer.stages {
        let total = |memory: &Memory| ByteSize(memory.weights + memory.kv + memory.compute);
        let [start, end] = stage.layers;
        let error = percent_off(total(&stage.predicted).0, total(&stage.found).0);
        output::line(format_args!(
            "  layers {:<21} took {}, predicted {} ({error:+.1} %)",
            format!("{start}..{end}"),
            total(&stage.found),
            total(&stage.predicted)
        ))?;
    }
    Ok(())
}

/// By how many percent a prediction is off, in tenths; none is not below none.
fn percent_off(predicted: u64, found: u64) -> f64 {
    let percent = 100.0 * (predicted as f64 / found.max(1) as f64 - 1.0);
    (10.0 * percent).round() / 10.0 + 0.0
}

/// `all`, or how many cuts.
///
/// # Errors
/// If it is neither.
pub fn cuts(text: &str) -> Result<Cuts, String> {
    if text.eq_ignore_ascii_case("all") {
        return Ok(Cuts::All);
    }
    match text.parse() {
        Ok(n @ 1..=MAX_CUTS) => Ok(Cuts::Most(n)),
        _ => Err(format!("give `all`, or a number of cuts from 1 to {MAX_CUTS}")),
    }
}

/// Most cuts that can be asked for by number; the deepest known model has some 130 layers, each in a cut of each kind.
const MAX_CUTS: u32 = 1000;

#[cfg(test)]
mod tests {
    use super::percent_off;

    #[test]
    fn a_prediction_that_is_right_is_not_below_what_was_found() {
        for (predicted, shown) in [(99_996, "+0.0"), (100_000, "+0.0"), (100_060, "+0.1"), (99_940, "-0.1")] {
            assert_eq!(format!("{:+.1}", percent_off(predicted, 100_000)), shown, "{predicted}");
        }
    }
}
