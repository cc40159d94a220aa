//! One model on three nodes, for people to watch.
//!
//! Three `brigade` processes share the embedded model by ticket. Four questions are streamed through HTTP; then a table
//! says which node did what, and the same questions go to the whole model in one process: the texts must be equal, else
//! the demo fails. It leaves nothing behind.

use std::time::Instant;

use brigade_base::ByteSize;
use serde_json::{Value, json};

use crate::cluster::{Cluster, ClusterSpec, brigade, layers, nodes};
use crate::failure::{Failure, Outcome};
use crate::http::Endpoint;
use crate::output::{line, table, text};
use crate::processes::Processes;
use crate::whole::Whole;

/// The coordinator first.
const NAMES: [&str; 3] = ["kitchen", "desk", "attic"];

/// What the embedded model is good at, and a story that takes a moment.
const QUESTIONS: [&str; 4] =
    ["What is 47 plus 78?", "What is 90 minus 37?", "What color is a strawberry?", "Write a story about a cat."];

/// Longer than any story of the model, far below its context.
const MAX_TOKENS: usize = 256;

/// Tokens of a session in the process that is compared with: a short question and its answer.
const CONTEXT: u32 = 512;

/// Runs the demo.
pub fn run() -> Outcome {
    let brigade = brigade()?;
    let processes = Processes::new()?;
    let state_dir = processes.dir().join("nodes");
    line("starting three nodes that share one model ...")?;
    let spec = ClusterSpec {
        names: NAMES.map(str::to_owned).to_vec(),
        model: None,
        threads: 1,
        pin: false,
        context: None,
        parallel: None,
        layers: Vec::new(),
    };
    let cluster = Cluster::start(&processes, &brigade, &state_dir, &spec)?;
    line(format_args!("ready after {:.1} s", cluster.startup.as_secs_f32()))?;

    let (answers, speed) = ask_all(&cluster.endpoint)?;
    let status = cluster.measured_status()?;
    show(&status, speed)?;
    processes.end();

    // The very file that was served.
    let model = state_dir.join(NAMES[0]).join("models/abacus.gguf");
    let mut whole = Whole::open(&model, 1, CONTEXT, 1)?;
    for (question, answer) in QUESTIONS.iter().zip(&answers) {
        let expected = whole.chat(question, MAX_TOKENS)?;
        if expected != *answer {
            return Err(Failure::said(format!(
                "{question:?}: three nodes answered {answer:?}, one process answers {expected:?}"
            )));
        }
    }
    line(format_args!("proof  the whole model in one process gives the same {} texts: identical", QUESTIONS.len()))
}

/// Asks all questions, shows the answers as they come, and returns them with the speed in tokens per second.
fn ask_all(endpoint: &Endpoint) -> Outcome<(Vec<String>, f64)> {
    let mut answers = Vec::new();
    let (mut n_tokens, mut seconds) = (0, 0.0);
    for question in QUESTIONS {
        text(&format!("\n> {question}\n"))?;
        let body = json!({
            "model": "default",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let asked = Instant::now();
        let answer = endpoint.stream("/v1/chat/completions", &body, text)?;
        n_tokens += answer.n_tokens;
        seconds += asked.elapsed().as_secs_f64();
        text("\n")?;
        answers.push(answer.text);
    }
    Ok((answers, n_tokens as f64 / seconds))
}

/// Shows what each node did.
fn show(status: &Value, speed: f64) -> Outcome {
    let head = ["node", "layers", "stage memory", "ms per token", "bytes per token out", "round trip"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(nodes(status).iter().map(|node| {
        let rtt_ms = node["rtt_ms"].as_f64().unwrap_or(0.0);
        vec![
            node["name"].as_str().unwrap_or("?").to_owned(),
            layers(node),
            ByteSize(node["memory_stage"].as_u64().unwrap_or(0)).to_string(),
            format!("{:.2}", node["pass_ms"].as_f64().unwrap_or(0.0)),
            node["bytes_per_token"].as_u64().filter(|n| *n > 0).map_or("-".to_owned(), |n| n.to_string()),
            if rtt_ms > 0.0 { format!("{rtt_ms:.2} ms") } else { "-".to_owned() },
        ]
    }));
    text("\n")?;
    table(&rows)?;
    let hop = |key: &str| status[key].as_f64().unwrap_or(0.0);
    text("\n")?;
    line(format_args!("speed  {speed:.0} tokens/s, questions read included"))?;
    line(format_args!("hop    {:.0} us (median), {:.0} us (99th percentile)", hop("hop_us_p50"), hop("hop_us_p99")))
}
