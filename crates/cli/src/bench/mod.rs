//! `brigade bench`: measures any OpenAI-compatible endpoint from outside, by the method of the field.
//!
//! - [`target`] asks, and finds out how this endpoint wants to be asked.
//! - [`prompt`] draws prompts that no cache knows and finds how long they must be.
//! - [`wave`] sends one request per stream at the same moment; a run is a wave.
//! - [`report`] makes numbers of the runs with [`stats`], and a table or JSON of these.
//!
//! One thread for each stream blocks on its own connection; nothing else runs meanwhile, so that times are the
//! endpoint's. All state is on the stack of [`run`], so an interrupt may end the process at any moment.

mod prompt;
mod report;
mod stats;
mod target;
mod wave;

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::args::{BenchArgs, EndpointArgs};
use crate::endpoint::{Endpoint, EndpointError};
use crate::error::Failure;
use crate::output;
use crate::progress::Bars;
use prompt::{Length, Prompts};
use report::{Level, Report};
use target::Target;
use wave::{Broken, Wave};

/// What OpenAI's API calls a prompt that is too long, and with it most others.
const TOO_LONG: &str = "context_length_exceeded";

/// Measures and reports.
pub fn run(args: &BenchArgs) -> Result<(), Failure> {
    let endpoint =
        EndpointArgs { url: args.target.clone().or_else(|| args.endpoint.url.clone()), ..args.endpoint.clone() };
    let n_connections = args.streams.iter().max().copied().unwrap_or(1) as usize;
    let endpoint = Endpoint::of(&endpoint)?.under_load(n_connections, args.timeout)?;
    let mut notes = Vec::new();
    let model = match &args.model {
        Some(model) => model.clone(),
        None => first_model(&endpoint, &mut notes)?,
    };
    let (target, found) = Target::settle(endpoint, model, args.chat).map_err(failure)?;
    notes.extend(found);
    let report = Bench { args, target, prompts: Prompts::new(seed(args), args.same_prompt), notes }.measure()?;
    if args.json {
        output::json(&report)?
    } else {
        output::text(&report.table())?
    }
    match report.n_failed() {
        (0, _) => Ok(()),
        (failed, all) => Err(Failure::run(format!("{failed} of {all} requests failed; the report says why"))),
    }
}

/// What the prompts are drawn from.
fn seed(args: &BenchArgs) -> u64 {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Milliseconds differ from call to call, and are short enough to be typed again.
    args.seed.unwrap_or_else(|| u64::try_from(now().as_millis()).unwrap_or(0))
}

/// The first model that the endpoint lists.
fn first_model(endpoint: &Endpoint, notes: &mut Vec<String>) -> Result<String, Failure> {
    let missing = || {
        let base = endpoint.base();
        Failure::run(format!(
            "{base} lists no model; is that all before `/v1` of its address? Then name one with --model"
        ))
    };
    let reply = endpoint.get("/v1/models").map_err(|error| match error {
        EndpointError::Refused { status: 404 | 405 | 501, .. } => missing(),
        EndpointError::Refused { status: 401 | 403, ref message, .. } => wants_key(message),
        error => error.into(),
    })?;
    let models: Vec<&str> = reply
        .get("data")
        .and_then(Value::as_array)
        .map(|models| models.iter().filter_map(|model| model.get("id")?.as_str()).collect())
        .unwrap_or_default();
    let first = models.first().ok_or_else(missing)?;
    if models.len() > 1 {
        notes.push(format!("the first of {} models was measured; --model names another", models.len()));
    }
    Ok((*first).to_owned())
}

fn wants_key(message: &str) -> Failure {
    Failure::run(format!(
        "the endpoint wants a key that it knows: {message}; give it with --api-key or BRIGADE_API_KEY"
    ))
}

/// What an endpoint's error means for who measures.
fn failure(error: EndpointError) -> Failure {
    let advice = match &error {
        EndpointError::Refused { status: 401 | 403, message, .. } => return wants_key(message),
        EndpointError::Refused { status: 429, .. } => {
            "the endpoint is busy: come again when nobody else asks it, or with fewer --streams"
        }
        EndpointError::Refused { status: 404, .. } => "is that its address, and has it this --model?",
        EndpointError::Refused { code: Some(code), .. } if code == "unsupported_model" => {
            "only models that generate text are measured"
        }
        // An endpoint that says what is wrong needs no guess.
        EndpointError::Refused { status: 400 | 413 | 422, code: Some(code), .. } if code != TOO_LONG => {
            return error.into();
        }
        EndpointError::Refused { status: 400 | 413 | 422, .. } => {
            "if prompt and answer are too long for it, ask for less with --prompt-tokens and --tokens"
        }
        EndpointError::Refused { status: 500.., .. } | EndpointError::Failed { .. } => "its own log may say more",
        EndpointError::BrokeOff { .. } => "does it still run?",
        EndpointError::TooSlow { .. } => "--timeout gives it longer, --tokens asks for less",
        _ => return error.into(),
    };
    Failure::run(format!("{}: {advice}", error.to_string().trim_end_matches('.')))
}

/// A measurement under way.
struct Bench<'a> {
    args: &'a BenchArgs,
    target: Target,
    prompts: Prompts,
    notes: Vec<String>,
}

impl Bench<'_> {
    fn measure(mut self) -> Result<Report, Failure> {
        let args = self.args;
        let length = self.length()?;
        let mut levels = Vec::with_capacity(args.streams.len());
        let mut is_counted_here = false;
        for &streams in &args.streams {
            let waves = self.level(streams, length)?;
            let level = Level::of(streams, &waves);
            self.notes.extend(report::cautions(&level, &waves, args.tokens, args.same_prompt));
            is_counted_here |=
                waves.iter().flat_map(|wave| &wave.answers).any(|answer| answer.usage.completion.is_none());
            levels.push(level);
        }
        if is_counted_here {
            self.notes.push("the endpoint does not count the tokens of a stream; a chunk is taken for one".to_owned());
        }
        self.notes.extend(report::length_note(&levels, args.prompt_tokens));
        Ok(Report {
            brigade_version: env!("CARGO_PKG_VERSION"),
            endpoint: self.target.url().to_owned(),
            model: self.target.model().to_owned(),
            api: self.target.api(),
            prompt_tokens_asked: args.prompt_tokens,
            completion_tokens_asked: args.tokens,
            runs: args.runs,
            seed: self.prompts.seed(),
            same_prompt: args.same_prompt,
            ignore_eos: self.target.ignores_end(),
            tokens_from: if is_counted_here { "chunks" } else { "usage" },
            notes: self.notes,
            levels,
        })
    }

    /// How many words a prompt must have.
    fn length(&mut self) -> Result<Length, Failure> {
        let (target, prompts, args) = (&self.target, &mut self.prompts, self.args);
        // A single one tells all where prompts are all the same, and each costs an answer with other endpoints.
        let n_counted = if target.counts_alone() && !args.same_prompt { prompt::SAMPLE } else { 1 };
        let count = |n_words| prompt::mean_of(n_counted, || target.prompt_tokens(&prompts.draw(n_words)));
        let length = prompt::calibrate(args.prompt_tokens, count).map_err(failure)?;
        if length.n_tokens.is_none() {
            self.notes.push(format!(
                "the endpoint does not count the tokens of a prompt; prompts have {} common words",
                length.n_words
            ));
        }
        Ok(length)
    }

    /// The measured runs at a number of streams, after one to warm up.
    fn level(&mut self, streams: u32, length: Length) -> Result<Vec<Wave>, Failure> {
        let mut bars = Bars::new();
        let name = format!("{streams} at once");
        let mut waves = Vec::with_capacity(self.args.runs as usize);
        for run in 0..=self.args.runs {
            bars.set(&name, run as f32 / (self.args.runs + 1) as f32);
            let prompts: Vec<String> = (0..streams).map(|_| self.prompts.draw(length.n_words)).collect();
            let mut wave = wave::run(&self.target, &prompts, self.args.tokens, length.n_tokens);
            if wave.answers.is_empty() {
                // Nothing is left to measure, and the next run would hardly be better.
                bars.clear();
                return Err(match wave.failures.pop() {
                    Some(Broken::Endpoint(error)) => failure(error),
                    other => Failure::run(other.unwrap_or(Broken::Lost)),
                });
            }
            if run > 0 {
                waves.push(wave);
            }
        }
        bars.clear();
        Ok(waves)
    }
}
