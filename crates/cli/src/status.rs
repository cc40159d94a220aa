//! `brigade status`: the cluster as its coordinator sees it.

use brigade_base::ByteSize;
use serde_json::Value;

use crate::args::StatusArgs;
use crate::endpoint::Endpoint;
use crate::error::Failure;
use crate::output;

/// Prints the status once.
pub fn run(args: &StatusArgs) -> Result<(), Failure> {
    let state_dir = args.endpoint.state.dir();
    let worker_file = crate::join::status_file(&state_dir);
    let endpoint = match Endpoint::of(&args.endpoint) {
        Ok(endpoint) => endpoint,
        // On a worker's machine there is no endpoint, but there is something to tell.
        Err(failure) => {
            let Ok(text) = std::fs::read_to_string(&worker_file) else { return Err(failure) };
            let worker: Value = serde_json::from_str(&text).map_err(|_| failure)?;
            return if args.json { output::json(&worker) } else { print_worker(&worker) };
        }
    };
    let status = endpoint.get("/brigade/v1/status")?;
    if args.json { output::json(&status) } else { print(&status) }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("")
}

fn number(value: &Value, key: &str) -> f64 {
    value.get(key).and_then(Value::as_f64).unwrap_or(0.0)
}

fn size(value: &Value, key: &str) -> ByteSize {
    ByteSize(value.get(key).and_then(Value::as_u64).unwrap_or(0))
}

fn layers(value: &Value) -> String {
    match value.get("layers").and_then(Value::as_array).map(Vec::as_slice) {
        Some([start, end]) => format!("{start}..{end}"),
        _ => "-".to_owned(),
    }
}

fn print(status: &Value) -> Result<(), Failure> {
    output::line(format_args!("{}: {}", text(status, "model"), text(status, "state")))?;
    output::line(format_args!(
        "{} of {} sessions run, {} wait; {:.1} tokens/s, {} tokens since the start; {:.0} us per hop",
        number(status, "running"),
        number(status, "parallel"),
        number(status, "waiting"),
        number(status, "tokens_per_second"),
        number(status, "tokens_generated"),
        number(status, "hop_us_p50"),
    ))?;
    output::line("")?;
    output::line(format_args!(
        "{:<20} {:<11} {:>7} {:<9} {:>10} {:>10} {:>10} {:>7} {:>8} {:>8}",
        "node", "role", "layers", "state", "stage", "resident", "offered", "threads", "pass ms", "rtt ms"
    ))?;
    for node in status.get("nodes").and_then(Value::as_array).into_iter().flatten() {
        let state = if text(node, "state") == "loading" {
            format!("{:.0} %", 100.0 * number(node, "loaded"))
        } else {
            text(node, "state").to_owned()
        };
        output::line(format_args!(
            "{:<20} {:<11} {:>7} {:<9} {:>10} {:>10} {:>10} {:>7} {:>8.2} {:>8.2}",
            text(node, "name"),
            text(node, "role"),
            layers(node),
            state,
            size(node, "memory_stage").to_string(),
            size(node, "memory_resident").to_string(),
            size(node, "memory_offered").to_string(),
            number(node, "threads"),
            number(node, "pass_ms"),
            number(node, "rtt_ms"),
        ))?;
    }
    Ok(())
}

fn print_worker(worker: &Value) -> Result<(), Failure> {
    output::line(format_args!("this node is a worker of {}", text(worker, "coordinator")))?;
    output::line(format_args!("state   {}", text(worker, "state")))?;
    let model = text(worker, "model");
    output::line(format_args!("layers  {}{}{model}", layers(worker), if model.is_empty() { "" } else { " of " }))?;
    output::line("`brigade status` on the coordinator shows the whole cluster")
}
