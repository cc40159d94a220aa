//! What was measured: as JSON with lasting names, and as a table for people. `docs/benchmarks.md` says what each
//! number means; a change here is a change there.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use super::prompt;
use super::stats::{Spread, Times, mean};
use super::wave::Wave;

/// Most different errors of one level that are named. More tell no more.
const MAX_ERRORS: usize = 8;

/// Share of a prompt that may be in a cache by chance: the few tokens of a chat template and a start token.
const CACHED_SHARE: f64 = 0.1;

/// Chunks per token below which gaps between chunks are not gaps between tokens.
const CHUNKS_PER_TOKEN: f64 = 0.9;

/// All that is reported.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of the program that measured.
    pub brigade_version: &'static str,
    /// What was measured.
    pub endpoint: String,
    /// Its model.
    pub model: String,
    /// `completions` or `chat/completions`.
    pub api: &'static str,
    /// Tokens that a prompt should have.
    pub prompt_tokens_asked: u32,
    /// Tokens that an answer should have.
    pub completion_tokens_asked: u32,
    /// Measured runs; one more came before.
    pub runs: u32,
    /// What the prompts were drawn from.
    pub seed: u64,
    /// Whether all requests had the same prompt.
    pub same_prompt: bool,
    /// Whether the endpoint was told to go on after the model's end token.
    pub ignore_eos: bool,
    /// `usage` where the endpoint counts tokens, `chunks` where they are counted here.
    pub tokens_from: &'static str,
    /// What to know before comparing.
    pub notes: Vec<String>,
    /// One for each number of streams.
    pub levels: Vec<Level>,
}

/// A number of streams.
#[derive(Debug, Serialize)]
pub struct Level {
    /// Requests at once.
    pub streams: u32,
    /// Requests in all measured runs.
    pub requests: u32,
    /// Those that brought no whole answer; the numbers are without them.
    pub failed: u32,
    /// Why, and how often.
    pub errors: Vec<ErrorCount>,
    /// Tokens of a prompt, on average.
    pub prompt_tokens: Option<f64>,
    /// Of these in the endpoint's cache, where it tells.
    pub cached_prompt_tokens: Option<f64>,
    /// Tokens of an answer, on average.
    pub completion_tokens: Option<f64>,
    /// From sending to the first token.
    pub time_to_first_token_ms: Option<Times>,
    /// From the first token to the last, by their number less one; one value for each answer.
    pub time_per_output_token_ms: Option<Times>,
    /// From each chunk of an answer to the next.
    pub inter_token_latency_ms: Option<Times>,
    /// Tokens of all streams between the first and the last.
    pub tokens_per_second: Option<Spread>,
    /// Tokens of one stream after its first.
    pub tokens_per_second_per_stream: Option<Spread>,
    /// Tokens of all streams, from the moment of asking.
    pub tokens_per_second_end_to_end: Option<Spread>,
    /// Prompt tokens until all streams have their first token.
    pub prompt_tokens_per_second: Option<Spread>,
    /// Length of a run.
    pub seconds: Option<Spread>,
}

/// An error and how often it came.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct ErrorCount {
    /// What was said.
    pub message: String,
    /// How many requests.
    pub count: u32,
}

impl Level {
    /// Of the measured runs.
    pub fn of(streams: u32, waves: &[Wave]) -> Self {
        let times = |of: fn(&Wave) -> Vec<f64>| Times::of(&waves.iter().map(of).collect::<Vec<_>>());
        let spread = |of: fn(&Wave) -> Option<f64>| Spread::of(&waves.iter().filter_map(of).collect::<Vec<_>>());
        let average = |of: fn(&Wave) -> Vec<f64>| {
            let average = mean(&waves.iter().flat_map(of).collect::<Vec<_>>());
            average.map(|tokens| (10.0 * tokens).round() / 10.0)
        };
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let failed = count(waves.iter().map(|wave| wave.failures.len()).sum());
        Self {
            streams,
            requests: count(waves.iter().map(|wave| wave.answers.len()).sum()) + failed,
            failed,
            errors: errors(waves),
            prompt_tokens: average(Wave::prompt_tokens),
            cached_prompt_tokens: average(Wave::cached_tokens),
            completion_tokens: average(Wave::answer_tokens),
            time_to_first_token_ms: times(Wave::first_token_ms),
            time_per_output_token_ms: times(Wave::output_token_ms),
            inter_token_latency_ms: times(Wave::gap_ms),
            tokens_per_second: spread(Wave::decode_rate),
            tokens_per_second_per_stream: spread(Wave::stream_rate),
            tokens_per_second_end_to_end: spread(Wave::end_to_end_rate),
            prompt_tokens_per_second: spread(Wave::prompt_rate),
            seconds: spread(Wave::seconds),
        }
    }
}

fn errors(waves: &[Wave]) -> Vec<ErrorCount> {
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for failure in waves.iter().flat_map(|wave| &wave.failures) {
        *counts.entry(failure.to_string()).or_default() += 1;
    }
    let mut errors: Vec<_> = counts.into_iter().map(|(message, count)| ErrorCount { message, count }).collect();
    errors.sort_by_key(|error| std::cmp::Reverse(error.count));
    errors.truncate(MAX_ERRORS);
    errors
}

/// What the waves of a level tell about the worth of its numbers.
pub fn cautions(level: &Level, waves: &[Wave], asked: u32, same_prompt: bool) -> Vec<String> {
    let mut notes = Vec::new();
    let streams = streams(level.streams);
    if let Some(n) = level.completion_tokens.filter(|n| *n < 0.99 * f64::from(asked)) {
        notes.push(format!("{streams}: answers ended early, after {n:.1} of {asked} tokens on average"));
    }
    let cached = level.cached_prompt_tokens.zip(level.prompt_tokens);
    if let Some((cached, prompt)) = cached.filter(|(cached, prompt)| !same_prompt && *cached > CACHED_SHARE * prompt) {
        notes.push(format!("{streams}: {cached:.0} of {prompt:.0} prompt tokens came from the endpoint's cache"));
    }
    let answers = || waves.iter().flat_map(|wave| &wave.answers);
    let n_chunks: usize = answers().map(|answer| answer.chunks.len()).sum();
    let n_tokens: f64 = answers().map(|answer| f64::from(answer.n_tokens())).sum();
    if (n_chunks as f64) < CHUNKS_PER_TOKEN * n_tokens {
        let per_chunk = n_tokens / (n_chunks as f64).max(1.0);
        notes.push(format!("{streams}: a chunk has {per_chunk:.1} tokens, so gaps between chunks are no token times"));
    }
    if level.failed > 0 {
        notes.push(format!(
            "{streams}: {} of {} requests failed, so there was less to do than asked for",
            level.failed, level.requests
        ));
    }
    notes
}

/// What to say where prompts are not as long as they were to be, by the tokens of those that were sent.
pub fn length_note(levels: &[Level], asked: u32) -> Option<String> {
    let n = prompt_tokens(levels).filter(|n| !prompt::is_near(*n, asked))?;
    Some(format!("prompts have {n:.0} tokens on average, not the {asked} that were asked for"))
}

/// Tokens of a prompt, as the mean of the levels.
fn prompt_tokens(levels: &[Level]) -> Option<f64> {
    mean(&levels.iter().filter_map(|level| level.prompt_tokens).collect::<Vec<_>>())
}

fn streams(n: u32) -> String {
    if n == 1 { "1 stream".to_owned() } else { format!("{n} streams") }
}

/// Columns of the table.
const NAME_WIDTH: usize = 32;
const LEVEL_WIDTH: usize = 25;

impl Report {
    /// Requests that failed, of how many.
    pub fn n_failed(&self) -> (u32, u32) {
        let sum = |of: fn(&Level) -> u32| self.levels.iter().map(of).sum();
        (sum(|level| level.failed), sum(|level| level.requests))
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut out = format!("{} at {}, {}\n", self.model, self.endpoint, self.api);
        let prompts = prompt_tokens(&self.levels);
        let prompts =
            prompts.map_or_else(|| "prompts of unknown length".to_owned(), |n| format!("{n:.0}-token prompts"));
        let (tokens, runs) = (self.completion_tokens_asked, self.runs);
        let _ = writeln!(out, "{prompts}, {tokens} tokens out; mean of {runs} ± standard deviation, after a warm-up\n");
        self.row(&mut out, "", |level| streams(level.streams));
        self.row(&mut out, "tokens/s, all streams", |level| spread(level.tokens_per_second));
        self.row(&mut out, "tokens/s, one stream", |level| spread(level.tokens_per_second_per_stream));
        self.row(&mut out, "tokens/s, with the prompt", |level| spread(level.tokens_per_second_end_to_end));
        self.row(&mut out, "prompt tokens/s", |level| spread(level.prompt_tokens_per_second));
        self.time_rows(&mut out, "time to first token, ms", |level| level.time_to_first_token_ms);
        self.time_rows(&mut out, "time per output token, ms", |level| level.time_per_output_token_ms);
        self.time_rows(&mut out, "gap between chunks, ms", |level| level.inter_token_latency_ms);
        self.row(&mut out, "failed requests", |level| format!("{} of {}", level.failed, level.requests));
        let said = self.levels.iter().flat_map(|level| &level.errors);
        let errors = said.map(|error| format!("{} failed: {}", error.count, error.message));
        for (i, line) in self.notes.iter().cloned().chain(errors).enumerate() {
            let _ = writeln!(out, "{}- {line}", if i == 0 { "\n" } else { "" });
        }
        out
    }

    fn time_rows(&self, out: &mut String, name: &str, of: fn(&Level) -> Option<Times>) {
        self.row(out, name, |level| spread(of(level).map(|times| Spread { mean: times.mean, sd: times.sd })));
        self.row(out, "    p50 / p99 / max", |level| {
            let parts = |times: Times| [times.p50, times.p99, times.max].map(number).join(" / ");
            of(level).map_or_else(|| "-".to_owned(), parts)
        });
    }

    fn row(&self, out: &mut String, name: &str, cell: impl Fn(&Level) -> String) {
        let mut line = format!("{name:NAME_WIDTH$}");
        for level in &self.levels {
            let _ = write!(line, "{:>LEVEL_WIDTH$}", cell(level));
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
}

fn spread(spread: Option<Spread>) -> String {
    spread.map_or_else(|| "-".to_owned(), |spread| format!("{} ± {}", number(spread.mean), number(spread.sd)))
}

/// With as many digits as mean something.
fn number(value: f64) -> String {
    let digits = if value < 10.0 { 2 } else { usize::from(value < 1000.0) };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::wave::{Broken, tests::wave};

    fn report(levels: Vec<Level>) -> Report {
        Report {
            brigade_version: "1",
            endpoint: "http://e".to_owned(),
            model: "m".to_owned(),
            api: "completions",
            prompt_tokens_asked: 100,
            completion_tokens_asked: 3,
            runs: 2,
            seed: 1,
            same_prompt: false,
            ignore_eos: true,
            tokens_from: "usage",
            notes: vec!["a note".to_owned()],
            levels,
        }
    }

    #[test]
    fn names_in_json_last() {
        let level = Level::of(2, &[wave(&[&[100, 200, 300], &[200, 400, 600]])]);
        let json = serde_json::to_value(report(vec![level])).unwrap();
        let keys = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
        let top = "brigade_version endpoint model api prompt_tokens_asked completion_tokens_asked runs seed \
                   same_prompt ignore_eos tokens_from notes levels";
        assert_eq!(keys(&json), top);
        let level = &json["levels"][0];
        let expected = "streams requests failed errors prompt_tokens cached_prompt_tokens completion_tokens \
                        time_to_first_token_ms time_per_output_token_ms inter_token_latency_ms tokens_per_second \
                        tokens_per_second_per_stream tokens_per_second_end_to_end prompt_tokens_per_second seconds";
        assert_eq!(keys(level), expected);
        assert_eq!(keys(&level["time_to_first_token_ms"]), "mean sd p50 p99 max");
        assert_eq!(keys(&level["tokens_per_second"]), "mean sd");
        assert!(level["cached_prompt_tokens"].is_null(), "what is not known is null, not 0");
    }

    #[test]
    fn the_table_has_a_column_for_each_level_and_says_what_is_missing() {
        let levels = vec![Level::of(1, &[wave(&[&[500, 600]])]), Level::of(8, &[wave(&[])])];
        let table = report(levels).table();
        let row = |name: &str| {
            let words = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
            words.filter_map(|line| line.strip_prefix(name).map(str::to_owned)).next().unwrap()
        };
        assert_eq!(row("1 stream "), "8 streams");
        assert_eq!(row("tokens/s, all streams "), "10.0 ± 0.00 -");
        assert_eq!(row("p50 / p99 / max "), "500.0 / 500.0 / 500.0 -");
        assert_eq!(row("failed requests "), "0 of 1 0 of 0");
        assert!(
            table.starts_with("m at http://e, completions\n100-token prompts, 3 tokens out; mean of 2 ±"),
            "{table}"
        );
        assert!(table.ends_with("\n\n- a note\n"), "{table}");
        let width = table.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(width <= NAME_WIDTH + 2 * LEVEL_WIDTH, "{table}");
    }

    #[test]
    fn what_is_said_of_the_length_of_prompts_is_what_the_head_says() {
        // They have 100 tokens.
        let levels = || vec![Level::of(1, &[wave(&[&[500, 600]])]), Level::of(8, &[wave(&[])])];
        assert_eq!(length_note(&levels(), 101), None);
        assert_eq!(length_note(&[], 101), None, "of unknown lengths nothing is said");
        let note = length_note(&levels(), 120).unwrap();
        assert!(note.starts_with("prompts have 100 tokens on average") && note.contains("120"), "{note}");
        assert!(report(levels()).table().contains("\n100-token prompts,"));
    }

    #[test]
    fn what_makes_numbers_worth_less_is_said() {
        let mut failed = wave(&[&[100, 200]]);
        failed.failures = vec![Broken::Lost, Broken::Empty, Broken::Empty];
        let waves = [failed];
        let level = Level::of(4, &waves);
        assert_eq!((level.requests, level.failed), (4, 3));
        assert_eq!(level.errors[0], ErrorCount { message: Broken::Empty.to_string(), count: 2 });
        let notes = cautions(&level, &waves, 10, false).join("\n");
        assert!(notes.contains("answers ended early, after 2.0 of 10 tokens"), "{notes}");
        assert!(notes.contains("3 of 4 requests failed"), "{notes}");
        let waves = [wave(&[&[100, 200]])];
        assert!(cautions(&Level::of(1, &waves), &waves, 2, false).is_empty());
    }
}
