//! `cargo xtask bench cluster`: what splitting a model costs, and what it saves.
//!
//! Each round first measures the whole model in one process, then a cluster of `brigade` processes on the same file,
//! never both at once; rounds follow each other, so that both see the same moods of the machine. Medians are printed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, Token};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::whole::{WholeArgs, WholeResult, decode_speed};
use super::{ModelArgs, ModelFacts, WorkArgs, completion, median};
use crate::cluster::{Cluster, ClusterSpec, brigade, layers, nodes, on_cores};
use crate::failure::{Failure, Outcome};
use crate::http::{Answer, Endpoint};
use crate::output::{error, line, table};
use crate::processes::Processes;

/// How long one process may take for a round: an hour of a very slow machine helps nobody.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// `cargo xtask bench cluster`
#[derive(Debug, Args)]
pub struct ClusterArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub work: WorkArgs,
    /// Nodes besides the coordinator
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub workers: u32,
    /// Give each process its own cores (needs `taskset`)
    #[arg(long)]
    pub pin: bool,
    /// How often to measure each
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What a cluster did in one round.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ClusterResult {
    /// Seconds from the first process to the first token around the ring, hashing of the weights included.
    pub startup_s: f64,
    /// Milliseconds until the first token of any request, HTTP included.
    pub first_token_ms: f64,
    /// Tokens per second after that, all streams together.
    pub tokens_per_second: f64,
    /// What software and links cost per hop of a lone stream, in microseconds.
    pub hop_us_p50: f64,
    /// The 99th percentile of the same.
    pub hop_us_p99: f64,
    /// Each node in ring order.
    pub nodes: Vec<NodeResult>,
    /// What was answered.
    #[serde(skip)]
    pub texts: Vec<String>,
}

/// What one node had.
#[derive(Debug, Clone, Default, Serialize)]
pub struct NodeResult {
    /// Its name.
    pub name: String,
    /// Its layers.
    pub layers: String,
    /// Milliseconds of a decode pass in its stage.
    pub pass_ms: f64,
    /// Bytes per token on its outgoing link.
    pub bytes_per_token: u64,
    /// Resident memory.
    pub resident_bytes: u64,
}

/// All rounds.
#[derive(Debug, Serialize)]
struct Report {
    model: PathBuf,
    processes: u32,
    threads: u32,
    streams: u32,
    prompt_tokens: u32,
    answer_tokens: u32,
    pinned: bool,
    whole: Vec<WholeResult>,
    cluster: Vec<ClusterResult>,
    /// Median speed of the cluster over that of one process.
    ratio: f64,
    /// Answers that were equal, of all rounds and streams.
    identical: usize,
    /// Answers that were compared.
    compared: usize,
}

/// Measures and prints.
pub fn run(args: &ClusterArgs) -> Outcome {
    let brigade = brigade()?;
    let model = args.model.path()?;
    let facts = ModelFacts::of(&model)?;
    let processes = Processes::new()?;
    let (mut whole, mut cluster) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        error(&format!("round {round} of {}: one process ...", args.rounds));
        whole.push(measure_whole(&processes, &model, args)?);
        error(&format!("round {round} of {}: {} processes ...", args.rounds, args.workers + 1));
        let state_dir = processes.dir().join(format!("round-{round}"));
        cluster.push(measure_cluster(&processes, &brigade, &state_dir, &model, &facts, args)?);
    }
    let report = report(model, args, whole, cluster);
    if args.json { line(serde_json::to_string_pretty(&report).map_err(Failure::said)?) } else { print(&report, &facts) }
}

fn report(model: PathBuf, args: &ClusterArgs, whole: Vec<WholeResult>, cluster: Vec<ClusterResult>) -> Report {
    let speed = median(cluster.iter().map(|round| round.tokens_per_second));
    let bar = median(whole.iter().map(|round| round.tokens_per_second));
    let pairs = || whole.iter().zip(&cluster).flat_map(|(whole, cluster)| whole.texts.iter().zip(&cluster.texts));
    Report {
        model,
        processes: args.workers + 1,
        threads: args.work.threads,
        streams: args.work.streams,
        prompt_tokens: args.work.prompt,
        answer_tokens: args.work.tokens,
        pinned: args.pin,
        ratio: if bar > 0.0 { speed / bar } else { 0.0 },
        identical: pairs().filter(|(one, other)| one == other).count(),
        compared: pairs().count(),
        whole,
        cluster,
    }
}

fn measure_whole(processes: &Processes, model: &Path, args: &ClusterArgs) -> Outcome<WholeResult> {
    let program = std::env::current_exe().map_err(Failure::io("the path of this program"))?;
    let mut command = on_cores(&program, args.pin.then_some((0, args.work.threads)));
    command.args(WholeArgs::for_child(model, &args.work));
    let lines = processes.start("whole", command)?;
    let result = lines.wait_for("its result", WHOLE_TIMEOUT, |line| serde_json::from_str(line).ok());
    processes.end();
    result
}

fn measure_cluster(
    processes: &Processes,
    brigade: &Path,
    state_dir: &Path,
    model: &Path,
    facts: &ModelFacts,
    args: &ClusterArgs,
) -> Outcome<ClusterResult> {
    let workers = (1..=args.workers).map(|k| format!("worker-{k}"));
    let spec = ClusterSpec {
        names: std::iter::once("coordinator".to_owned()).chain(workers).collect(),
        model: Some(model.to_owned()),
        threads: args.work.threads,
        pin: args.pin,
        context: Some(args.work.context()),
        parallel: Some(args.work.streams),
        layers: Vec::new(),
    };
    let cluster = Cluster::start(processes, brigade, state_dir, &spec)?;
    let asked = Instant::now();
    let answers = ask_all(&cluster.endpoint, &args.work.prompts(facts.n_vocab), args.work.tokens)?;
    let status = cluster.measured_status()?;
    processes.end();
    let spans = || answers.iter().filter_map(|answer| answer.span);
    let (Some(first), Some(last)) = (spans().map(|s| s.0).min(), spans().map(|s| s.1).max()) else {
        return Err(Failure::said("the cluster answered without text; take another model or prompt"));
    };
    if let Some(short) = answers.iter().find(|answer| answer.n_tokens != u64::from(args.work.tokens)) {
        return Err(Failure::said(format!("an answer has {} tokens, not {}", short.n_tokens, args.work.tokens)));
    }
    let number = |key: &str| status[key].as_f64().unwrap_or(0.0);
    Ok(ClusterResult {
        startup_s: cluster.startup.as_secs_f64(),
        first_token_ms: (first - asked).as_secs_f64() * 1000.0,
        tokens_per_second: decode_speed(&args.work, (last - first).as_secs_f64()),
        hop_us_p50: number("hop_us_p50"),
        hop_us_p99: number("hop_us_p99"),
        nodes: nodes(&status).iter().map(node_result).collect(),
        texts: answers.into_iter().map(|answer| answer.text).collect(),
    })
}

fn node_result(node: &Value) -> NodeResult {
    NodeResult {
        name: node["name"].as_str().unwrap_or("?").to_owned(),
        layers: layers(node),
        pass_ms: node["pass_ms"].as_f64().unwrap_or(0.0),
        bytes_per_token: node["bytes_per_token"].as_u64().unwrap_or(0),
        resident_bytes: node["memory_resident"].as_u64().unwrap_or(0),
    }
}

/// Sends all prompts at once and waits for all answers.
fn ask_all(endpoint: &Endpoint, prompts: &[Vec<Token>], n_tokens: u32) -> Outcome<Vec<Answer>> {
    let ask = |prompt: &Vec<Token>| endpoint.stream("/v1/completions", &completion(prompt, n_tokens), |_| Ok(()));
    std::thread::scope(|scope| {
        let ask = &ask;
        let threads: Vec<_> = prompts.iter().map(|prompt| scope.spawn(move || ask(prompt))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Outcome<Answer>>| {
            thread.join().unwrap_or_else(|_| Err(Failure::said("a request panicked")))
        };
        threads.into_iter().map(join).collect()
    })
}

fn print(report: &Report, facts: &ModelFacts) -> Outcome {
    let name = report.model.file_name().unwrap_or_default().to_string_lossy();
    line(format_args!("model   {name}: {} layers, {}", facts.n_layers, ByteSize(facts.weight_bytes)))?;
    line(format_args!(
        "work    {} stream(s), {} tokens of prompt, {} of answer, {} thread(s) each{}, median of {} round(s)\n",
        report.streams,
        report.prompt_tokens,
        report.answer_tokens,
        report.threads,
        if report.pinned { ", pinned" } else { "" },
        report.whole.len()
    ))?;
    let row = |what: &str, whole: f64, cluster: f64, digits: usize| {
        let ratio = if whole > 0.0 { format!("{:.2}", cluster / whole) } else { "-".to_owned() };
        vec![what.to_owned(), format!("{whole:.digits$}"), format!("{cluster:.digits$}"), ratio]
    };
    let whole = |pick: fn(&WholeResult) -> f64| median(report.whole.iter().map(pick));
    let cluster = |pick: fn(&ClusterResult) -> f64| median(report.cluster.iter().map(pick));
    let head = ["", "one process", &format!("{} processes", report.processes), "ratio"];
    let mib = f64::from(1 << 20);
    let resident = cluster(|c| c.nodes.iter().map(|node| node.resident_bytes as f64).sum());
    table(&[
        head.map(str::to_owned).to_vec(),
        row("tokens/s", whole(|w| w.tokens_per_second), cluster(|c| c.tokens_per_second), 2),
        row("first token, ms", whole(|w| w.first_token_ms), cluster(|c| c.first_token_ms), 1),
        row("until ready, s", whole(|w| w.load_s), cluster(|c| c.startup_s), 2),
        row("resident in all, MiB", whole(|w| w.resident_bytes as f64) / mib, resident / mib, 0),
    ])?;
    print_nodes(report)?;
    line(format_args!(
        "hop     {:.0} us (median), {:.0} us (99th percentile)",
        cluster(|c| c.hop_us_p50),
        cluster(|c| c.hop_us_p99)
    ))?;
    line(format_args!("texts   {} of {} identical", report.identical, report.compared))
}

/// The nodes of the last round; their numbers hardly differ between rounds.
fn print_nodes(report: &Report) -> Outcome {
    let head = ["node", "layers", "ms per pass", "bytes per token out", "resident"].map(str::to_owned).to_vec();
    let rows = report.cluster.last().into_iter().flat_map(|round| &round.nodes).map(|node| {
        vec![
            node.name.clone(),
            node.layers.clone(),
            format!("{:.2}", node.pass_ms),
            node.bytes_per_token.to_string(),
            ByteSize(node.resident_bytes).to_string(),
        ]
    });
    line("")?;
    table(&std::iter::once(head).chain(rows).collect::<Vec<_>>())?;
    line("")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::{Quantisation, Shape};

    #[test]
    fn a_report_compares_medians_and_texts() {
        let work = WorkArgs { threads: 1, tokens: 8, prompt: 8, streams: 1 };
        let model = ModelArgs { model: None, shape: Some(Shape::Tiny), quantisation: Quantisation::Q4_0 };
        let args = ClusterArgs { model, work, workers: 1, pin: false, rounds: 2, json: false };
        let whole = |speed, text: &str| WholeResult {
            tokens_per_second: speed,
            texts: vec![text.to_owned()],
            ..WholeResult::default()
        };
        let cluster = |speed, text: &str| ClusterResult {
            tokens_per_second: speed,
            texts: vec![text.to_owned()],
            ..ClusterResult::default()
        };
        let wholes = vec![whole(10.0, "a"), whole(30.0, "a")];
        let report = report(PathBuf::new(), &args, wholes, vec![cluster(9.0, "a"), cluster(21.0, "b")]);
        assert_eq!((report.ratio, report.identical, report.compared), (0.75, 1, 2));
        assert_eq!(decode_speed(&work, 0.5), 14.0);
    }
}
