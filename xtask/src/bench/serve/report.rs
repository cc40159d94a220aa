//! From rounds to a verdict: medians, ratios, targets, tables, curves.
//!
//! Each value that is reported is the median of its rounds; a ratio is one of medians. The JSON keeps the rounds whole.

use std::path::Path;

use brigade_base::ByteSize;
use serde::Serialize;

use super::plot::{Plot, Scale, Series};
use super::rounds::{DecodePoint, Mixed, MixedStream, Round, WholeRound};
use super::{LONG_PROMPT, MIXED_PROMPT, MIXED_STREAMS, Part, ServeArgs};
use crate::bench::{ModelFacts, median};
use crate::failure::Outcome;
use crate::output::{line, table};

/// What must be reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, ">= {bound}"),
            Self::AtMost(bound) => write!(f, "<= {bound}"),
        }
    }
}

/// One line of the verdict.
#[derive(Debug, Clone, Serialize)]
struct Check {
    what: String,
    unit: &'static str,
    /// `None` if it could not be measured.
    measured: Option<f64>,
    /// What it is compared with.
    baseline: Option<f64>,
    /// What that is.
    baseline_is: Option<String>,
    /// Measured by baseline.
    ratio: Option<f64>,
    /// For the ratio if there is a baseline, else for what was measured.
    target: Option<Target>,
    met: Option<bool>,
}

impl Check {
    fn new(what: impl Into<String>, unit: &'static str, measured: Option<f64>) -> Self {
        let what = what.into();
        Self { what, unit, measured, baseline: None, baseline_is: None, ratio: None, target: None, met: None }
    }

    /// Compares with `baseline`, called `name`.
    fn over(mut self, baseline: Option<f64>, name: impl Into<String>) -> Self {
        self.baseline = baseline;
        self.baseline_is = Some(name.into());
        self.ratio = self.measured.zip(baseline.filter(|base| *base > 0.0)).map(|(measured, base)| measured / base);
        self
    }

    fn with(mut self, target: Target) -> Self {
        self.target = Some(target);
        self.met = self.verdict().map(|value| target.is_met(value));
        self
    }

    /// What the target is for.
    fn verdict(&self) -> Option<f64> {
        if self.baseline_is.is_some() { self.ratio } else { self.measured }
    }

    fn cells(&self) -> Vec<String> {
        let number = |value: Option<f64>| value.map_or("-".to_owned(), short);
        let baseline = match (&self.baseline_is, self.baseline) {
            (Some(name), Some(value)) => format!("{} ({name})", short(value)),
            (Some(name), None) => format!("- ({name})"),
            (None, _) => String::new(),
        };
        let met = match (self.target, self.met) {
            (None, _) => "",
            (Some(_), Some(true)) => "yes",
            (Some(_), Some(false)) => "NO",
            (Some(_), None) => "not measured",
        };
        vec![
            self.what.clone(),
            format!("{} {}", number(self.measured), self.unit).trim_end().to_owned(),
            baseline,
            self.baseline_is
                .as_ref()
                .map_or_else(String::new, |_| self.ratio.map_or("-".into(), |r| format!("{r:.3}"))),
            self.target.map_or_else(String::new, |target| target.to_string()),
            met.to_owned(),
        ]
    }
}

/// Three digits, or all before the point.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// Medians of the rounds for one number of streams.
#[derive(Debug, Clone, Serialize)]
struct CurvePoint {
    streams: u32,
    cluster: Option<DecodePoint>,
    whole_one: Option<DecodePoint>,
    whole_all: Option<DecodePoint>,
}

/// A run.
#[derive(Debug, Serialize)]
pub struct Report {
    model: String,
    n_layers: u32,
    weight_bytes: u64,
    cores: usize,
    processes: u32,
    threads_per_process: u32,
    pinned: bool,
    prompt_tokens: u32,
    measured_gaps: u32,
    checks: Vec<Check>,
    curve: Vec<CurvePoint>,
    rounds: Vec<Round>,
}

impl Report {
    /// Sums up `rounds`.
    pub fn new(args: &ServeArgs, model: &Path, facts: &ModelFacts, cores: usize, rounds: Vec<Round>) -> Self {
        let curve = if args.wants(Part::Decode) { curve(&args.streams, &rounds) } else { Vec::new() };
        let (one, processes) = (args.threads, args.workers + 1);
        let mut checks = Vec::new();
        if args.wants(Part::Decode) {
            checks.extend(decode_checks(&curve, one, processes * one));
        }
        if args.wants(Part::Prompt) {
            checks.push(prompt_check(&rounds, one));
        }
        if args.wants(Part::Mixed) {
            checks.extend(mixed_checks(&rounds));
        }
        if args.wants(Part::Hop) {
            checks.extend(hop_checks(&rounds));
        }
        if args.wants(Part::Memory) {
            let each =
                over(&rounds, |round| round.cluster.memory.as_ref().map(|memory| memory.bytes_per_session() / 1024.0));
            checks.push(Check::new("memory of an idle session beside its KV", "KiB", each).with(Target::AtMost(16.0)));
        }
        Self {
            model: model.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            n_layers: facts.n_layers,
            weight_bytes: facts.weight_bytes,
            cores,
            processes,
            threads_per_process: args.threads,
            pinned: args.pin,
            prompt_tokens: args.prompt,
            measured_gaps: args.tokens,
            checks,
            curve,
            rounds,
        }
    }

    /// Prints tables for people, and a line for each target that is not met.
    pub fn print(&self) -> Outcome {
        line(format_args!("model   {}: {} layers, {}", self.model, self.n_layers, ByteSize(self.weight_bytes)))?;
        line(format_args!(
            "work    {} processes of {} thread(s){} on {} core(s), median of {} round(s)\n",
            self.processes,
            self.threads_per_process,
            if self.pinned { ", pinned" } else { "" },
            self.cores,
            self.rounds.len()
        ))?;
        self.print_curve()?;
        let head = ["what", "measured", "baseline", "ratio", "target", "met?"].map(str::to_owned).to_vec();
        table(&std::iter::once(head).chain(self.checks.iter().map(Check::cells)).collect::<Vec<_>>())?;
        let unmet: Vec<&Check> = self.checks.iter().filter(|c| c.target.is_some() && c.met != Some(true)).collect();
        if !unmet.is_empty() {
            line("")?;
        }
        for check in unmet {
            let value = check.verdict().map_or("not measured".to_owned(), |value| format!("{value:.3}"));
            let target = check.target.map(|target| target.to_string()).unwrap_or_default();
            let over = check.baseline_is.as_ref().map(|name| format!(" over {name}")).unwrap_or_default();
            line(format_args!("unmet: {}{over}: {value}, target {target}", check.what))?;
        }
        Ok(())
    }

    fn print_curve(&self) -> Outcome {
        if self.curve.is_empty() {
            return Ok(());
        }
        let (one, all) = self.names();
        let head = [
            "streams".to_owned(),
            "cluster, tokens/s".to_owned(),
            one,
            all,
            "first token, ms".to_owned(),
            "gap p50, ms".to_owned(),
            "gap p99, ms".to_owned(),
            "busy".to_owned(),
        ];
        let row = |point: &CurvePoint| {
            let number = |side: &Option<DecodePoint>, pick: fn(&DecodePoint) -> f64| {
                side.as_ref().map_or("-".to_owned(), |point| short(pick(point)))
            };
            let busy = point.cluster.iter().flat_map(|point| &point.stage_busy);
            let busy: Vec<String> = busy.map(|share| format!("{share:.2}")).collect();
            vec![
                point.streams.to_string(),
                number(&point.cluster, |p| p.tokens_per_second),
                number(&point.whole_one, |p| p.tokens_per_second),
                number(&point.whole_all, |p| p.tokens_per_second),
                number(&point.cluster, |p| p.first_token_ms),
                number(&point.cluster, |p| p.gap_ms_p50),
                number(&point.cluster, |p| p.gap_ms_p99),
                busy.join(" "),
            ]
        };
        table(&std::iter::once(head.to_vec()).chain(self.curve.iter().map(row)).collect::<Vec<_>>())?;
        line("")
    }

    /// What the two bars are called.
    fn names(&self) -> (String, String) {
        let (one, all) = (self.threads_per_process, self.processes * self.threads_per_process);
        (whole(one), whole(all))
    }

    /// The curves, ready to be drawn.
    pub fn plots(&self) -> Vec<Plot> {
        let (one, all) = self.names();
        let cluster = format!("cluster, {} x {}", self.processes, threads(self.threads_per_process));
        let series = |pick: fn(&DecodePoint) -> f64| {
            let of = |name: &str, side: fn(&CurvePoint) -> &Option<DecodePoint>| {
                let points = self.curve.iter();
                let points = points.filter_map(|at| Some((f64::from(at.streams), pick(side(at).as_ref()?))));
                Series { name: name.to_owned(), points: points.collect() }
            };
            vec![of(&cluster, |at| &at.cluster), of(&one, |at| &at.whole_one), of(&all, |at| &at.whole_all)]
        };
        let plot = |title: &str, scale, pick| Plot { title: title.to_owned(), scale, series: series(pick) };
        vec![
            plot("throughput of all streams, tokens/s", Scale::Linear, |p| p.tokens_per_second),
            plot("first token, median, ms", Scale::Log, |p| p.first_token_ms),
            plot("gap between tokens, median, ms", Scale::Linear, |p| p.gap_ms_p50),
            plot("gap between tokens, 99th percentile, ms", Scale::Linear, |p| p.gap_ms_p99),
        ]
    }
}

fn threads(n: u32) -> String {
    format!("{n} thread{}", if n == 1 { "" } else { "s" })
}

/// How a bar is called.
fn whole(n_threads: u32) -> String {
    format!("whole, {}", threads(n_threads))
}

/// The median over the rounds that have a value; `None` if none has.
fn over(rounds: &[Round], pick: impl Fn(&Round) -> Option<f64>) -> Option<f64> {
    let values: Vec<f64> = rounds.iter().filter_map(pick).collect();
    (!values.is_empty()).then(|| median(values))
}

fn curve(streams: &[u32], rounds: &[Round]) -> Vec<CurvePoint> {
    let point = |&n: &u32| CurvePoint {
        streams: n,
        cluster: middle(rounds.iter().map(|round| &round.cluster.decode), n),
        whole_one: middle(rounds.iter().filter_map(|round| Some(&round.whole_one.as_ref()?.decode)), n),
        whole_all: middle(rounds.iter().filter_map(|round| Some(&round.whole_all.as_ref()?.decode)), n),
    };
    streams.iter().map(point).collect()
}

/// The median of each value of the points with `n` streams.
fn middle<'a>(rounds: impl Iterator<Item = &'a Vec<DecodePoint>>, n: u32) -> Option<DecodePoint> {
    let points: Vec<&DecodePoint> = rounds.flatten().filter(|point| point.streams == n).collect();
    let of = |pick: fn(&DecodePoint) -> f64| median(points.iter().map(|point| pick(point)));
    let n_stages = points.iter().map(|point| point.stage_busy.len()).min()?;
    Some(DecodePoint {
        streams: n,
        tokens_per_second: of(|point| point.tokens_per_second),
        first_token_ms: of(|point| point.first_token_ms),
        gap_ms_p50: of(|point| point.gap_ms_p50),
        gap_ms_p99: of(|point| point.gap_ms_p99),
        stage_busy: (0..n_stages).map(|stage| median(points.iter().map(|point| point.stage_busy[stage]))).collect(),
    })
}

fn decode_checks(curve: &[CurvePoint], one: u32, all: u32) -> Vec<Check> {
    let mut checks = Vec::new();
    for point in curve {
        let n = point.streams;
        let what = format!("decode, {n} stream{}", if n == 1 { "" } else { "s" });
        let speed = |side: &Option<DecodePoint>| side.as_ref().map(|point| point.tokens_per_second);
        let check = || Check::new(what.clone(), "tokens/s", speed(&point.cluster));
        if n == 1 {
            checks.push(check().over(speed(&point.whole_one), whole(one)).with(Target::AtLeast(0.95)));
        }
        let against_all = check().over(speed(&point.whole_all), whole(all));
        checks.push(if n == 8 { against_all.with(Target::AtLeast(0.85)) } else { against_all });
        if n == 8 {
            checks.extend(busy_checks(point));
        }
    }
    checks
}

/// How busy each stage was; and, of what follows from that, the least share of the time in which all were at once.
fn busy_checks(point: &CurvePoint) -> Vec<Check> {
    let target = Target::AtLeast(0.8);
    let shares = point.cluster.as_ref().map_or(&[][..], |point| &point.stage_busy);
    if shares.is_empty() {
        return vec![Check::new("stages busy, 8 streams", "", None).with(target)];
    }
    let each = shares.iter().enumerate();
    let mut checks: Vec<Check> = each
        .map(|(k, share)| Check::new(format!("stage {k} busy, 8 streams"), "", Some(*share)).with(target))
        .collect();
    let idle: f64 = shares.iter().map(|share| 1.0 - share).sum();
    checks.push(Check::new("all stages busy at once, at least", "", Some((1.0 - idle).max(0.0))));
    checks
}

fn prompt_check(rounds: &[Round], one: u32) -> Check {
    let of = |samples: &[f64]| (!samples.is_empty()).then(|| median(samples.iter().copied()));
    let cluster = over(rounds, |round| of(&round.cluster.prompt_first_token_ms));
    let bar = |side: &WholeRound| of(&side.prompt_first_token_ms);
    let bar = over(rounds, |round| bar(round.whole_one.as_ref()?));
    let what = format!("first token of a {LONG_PROMPT}-token prompt");
    Check::new(what, "ms", cluster).over(bar, whole(one)).with(Target::AtMost(0.65))
}

fn mixed_checks(rounds: &[Round]) -> Vec<Check> {
    // Of each round, the stream whose worst gap is the most of its median.
    let worst = |mixed: &Mixed, base: fn(&MixedStream) -> f64| -> Option<(f64, f64)> {
        let share = |stream: &&MixedStream| stream.gap_ms_max / base(stream).max(f64::MIN_POSITIVE);
        let stream = mixed.streams.iter().max_by(|a, b| share(a).total_cmp(&share(b)))?;
        Some((stream.gap_ms_max, base(stream)))
    };
    let gap = |name: &str, base: fn(&MixedStream) -> f64| {
        let of = |round: &Round| worst(round.cluster.mixed.as_ref()?, base);
        let (most, middle) = (over(rounds, |round| Some(of(round)?.0)), over(rounds, |round| Some(of(round)?.1)));
        let what = format!("longest gap of {MIXED_STREAMS} streams, {MIXED_PROMPT}-token prompt");
        Check::new(what, "ms", most).over(middle, name).with(Target::AtMost(4.0))
    };
    let first = over(rounds, |round| Some(round.cluster.mixed.as_ref()?.first_token_ms));
    let alone = over(rounds, |round| Some(round.cluster.mixed.as_ref()?.alone_first_token_ms));
    vec![
        gap("its median gap before", |stream| stream.quiet_gap_ms_p50),
        gap("its median gap over all", |stream| stream.gap_ms_p50),
        Check::new("first token of that prompt", "ms", first).over(alone, "alone").with(Target::AtMost(1.5)),
    ]
}

fn hop_checks(rounds: &[Round]) -> Vec<Check> {
    let hop = |pick: fn(&super::rounds::Hop) -> f64| {
        // A coordinator that has measured none says 0.
        over(rounds, |round| round.cluster.hop.as_ref().map(pick).filter(|us| *us > 0.0))
    };
    let bytes = hop(|hop| hop.frame_bytes as f64).unwrap_or(0.0);
    let mut checks = vec![
        Check::new(format!("hop of {bytes:.0} bytes, median"), "us", hop(|hop| hop.us_p50)).with(Target::AtMost(250.0)),
        Check::new("hop, 99th percentile", "us", hop(|hop| hop.us_p99)).with(Target::AtMost(1000.0)),
    ];
    let names = rounds.iter().find_map(|round| round.cluster.hop.as_ref()).map_or(&[][..], |hop| &hop.parts_us);
    for (name, _) in names {
        let part =
            |round: &Round| round.cluster.hop.as_ref()?.parts_us.iter().find(|part| part.0 == *name).map(|part| part.1);
        checks.push(Check::new(format!("  of that, {name}"), "us", over(rounds, part)));
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::serve::rounds::{ClusterRound, Hop, Memory};

    fn point(streams: u32, tokens_per_second: f64, stage_busy: &[f64]) -> DecodePoint {
        DecodePoint { streams, tokens_per_second, stage_busy: stage_busy.to_vec(), ..DecodePoint::default() }
    }

    fn whole_round(decode: Vec<DecodePoint>, prompt_ms: f64) -> Option<WholeRound> {
        Some(WholeRound { threads: 1, decode, prompt_first_token_ms: vec![prompt_ms] })
    }

    fn round(speed: f64) -> Round {
        let stream = |max| MixedStream { quiet_gap_ms_p50: 100.0, gap_ms_p50: 200.0, gap_ms_max: max };
        Round {
            whole_one: whole_round(vec![point(1, 10.0, &[]), point(8, 40.0, &[])], 1000.0),
            whole_all: whole_round(vec![point(1, 18.0, &[]), point(8, 50.0, &[])], 600.0),
            cluster: ClusterRound {
                decode: vec![point(1, speed, &[0.5, 0.4]), point(8, 45.0, &[0.9, 0.7])],
                prompt_first_token_ms: vec![650.0],
                mixed: Some(Mixed {
                    alone_first_token_ms: 2000.0,
                    first_token_ms: 3001.0,
                    streams: vec![stream(300.0), stream(500.0)],
                }),
                hop: Some(Hop {
                    frame_bytes: 8192,
                    us_p50: 90.0,
                    us_p99: 1500.0,
                    parts_us: vec![("read".into(), 9.0)],
                }),
                memory: Some(Memory { sessions: 4, growth_bytes: 4 * 8192 }),
            },
        }
    }

    fn report(rounds: Vec<Round>, words: &[&str]) -> Report {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            args: ServeArgs,
        }
        let args = Line::parse_from(["serve", "--streams", "1,8"].iter().chain(words)).args;
        let facts = ModelFacts { n_vocab: 100, n_layers: 4, weight_bytes: 5 };
        Report::new(&args, Path::new("dir/model.gguf"), &facts, 2, rounds)
    }

    #[test]
    fn medians_are_held_against_targets() {
        let report = report(vec![round(9.0), round(9.6), round(9.7)], &[]);
        let verdicts: Vec<(&str, Option<bool>)> =
            report.checks.iter().filter(|c| c.target.is_some()).map(|c| (c.what.as_str(), c.met)).collect();
        let gap = "longest gap of 4 streams, 1500-token prompt";
        assert_eq!(
            verdicts,
            [
                ("decode, 1 stream", Some(true)),
                ("decode, 8 streams", Some(true)),
                ("stage 0 busy, 8 streams", Some(true)),
                ("stage 1 busy, 8 streams", Some(false)),
                ("first token of a 512-token prompt", Some(true)),
                (gap, Some(false)),
                (gap, Some(true)),
                ("first token of that prompt", Some(false)),
                ("hop of 8192 bytes, median", Some(true)),
                ("hop, 99th percentile", Some(false)),
                ("memory of an idle session beside its KV", Some(true)),
            ]
        );
        let first = &report.checks[0];
        assert_eq!((first.measured, first.baseline), (Some(9.6), Some(10.0)));
        assert_eq!(first.cells().join("|"), "decode, 1 stream|9.60 tokens/s|10.0 (whole, 1 thread)|0.960|>= 0.95|yes");
        let at_once = report.checks.iter().find(|check| check.what.starts_with("all stages")).unwrap();
        assert!((at_once.measured.unwrap() - 0.6).abs() < 1e-9);
    }

    #[test]
    fn what_was_not_measured_is_not_met_and_not_zero() {
        let report = report(vec![Round::default()], &[]);
        assert!(report.checks.iter().all(|check| check.measured.is_none() && check.met.is_none()));
        assert!(report.checks.iter().all(|check| !check.cells()[1].starts_with('0')));
    }

    #[test]
    fn parts_that_were_not_asked_for_are_absent() {
        let report = report(vec![round(9.0)], &["--part", "prompt"]);
        assert_eq!((report.checks.len(), report.curve.len()), (1, 0));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["checks"][0]["target"]["at_most"], 0.65);
        assert_eq!(json["rounds"][0]["cluster"]["hop"]["us_p50"], 90.0);
    }

    #[test]
    fn each_side_is_a_curve_of_each_plot() {
        let report = report(vec![round(9.0)], &[]);
        let plots = report.plots();
        assert!(plots.iter().all(|plot| plot.series.len() == 3));
        assert_eq!(plots[0].series[2].points, [(1.0, 18.0), (8.0, 50.0)]);
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([0.0, 0.1234, 9.876, 98.76, 98765.4].map(short), ["0.000", "0.123", "9.88", "98.8", "98765"]);
    }
}
