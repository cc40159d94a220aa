//! `brigade status`: the cluster as its coordinator sees it.

use brigade_base::ByteSize;
use serde_json::Value;

use crate::args::StatusArgs;
use crate::endpoint::Endpoint;
use crate::error::Failure;
use crate::{node_note, output};

/// Prints the status once.
pub fn run(args: &StatusArgs) -> Result<(), Failure> {
    let state_dir = args.endpoint.state.dir();
    let endpoint = match Endpoint::of(&args.endpoint) {
        Ok(endpoint) => endpoint,
        // On a worker's machine there is no endpoint, but there is something to tell.
        Err(failure) => {
            let worker = node_note::find(&state_dir)?.ok_or(failure)?.note;
            return if args.json { output::json(&worker) } else { output::text(&describe_worker(&worker)) };
        }
    };
    let status = endpoint.get("/brigade/v1/status")?;
    if args.json { output::json(&status) } else { output::text(&describe(&status)) }
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

/// A range of layers, as JSON has it.
fn range(value: &Value) -> Option<String> {
    match value.as_array().map(Vec::as_slice) {
        Some([start, end]) => Some(format!("{start}..{end}")),
        _ => None,
    }
}

fn layers(value: &Value) -> String {
    value.get("layers").and_then(range).unwrap_or_else(|| "-".to_owned())
}

/// Layers for which a node stands by; empty where it does not.
fn standby(value: &Value) -> String {
    let all = value.get("standby").and_then(Value::as_array).into_iter().flatten();
    all.filter_map(range).collect::<Vec<_>>().join(",")
}

fn describe(status: &Value) -> String {
    let mut lines = vec![
        format!("{}: {}", text(status, "model"), text(status, "state")),
        format!(
            "{} of {} sessions run, {} wait; {:.1} tokens/s, {} tokens since the start; {:.0} us per hop; {:.0} % of KV cache{}",
            number(status, "running"),
            number(status, "parallel"),
            number(status, "waiting"),
            number(status, "tokens_per_second"),
            number(status, "tokens_generated"),
            number(status, "hop_us_p50"),
            100.0 * number(status, "kv_tokens") / number(status, "kv_capacity").max(1.0),
            kv_types(status),
        ),
    ];
    lines.extend(adapters(status));
    lines.extend(recoveries(status));
    lines.push(String::new());
    lines.push(format!(
        "{:<20} {:<11} {:>7} {:>9} {:<9} {:>10} {:>10} {:>10} {:>7} {:>8} {:>6} {:>8}",
        "node",
        "role",
        "layers",
        "stands by",
        "state",
        "stage",
        "resident",
        "offered",
        "threads",
        "pass ms",
        "busy",
        "rtt ms"
    ));
    let nodes = status.get("nodes").and_then(Value::as_array);
    lines.extend(nodes.into_iter().flatten().map(describe_node));
    let origins: Vec<String> = nodes.into_iter().flatten().filter_map(weights_of_node).collect();
    if !origins.is_empty() {
        lines.push(String::new());
        lines.extend(origins);
    }
    lines.push(String::new());
    lines.join("\n")
}

fn weights_of_node(node: &Value) -> Option<String> {
    weights(node.get("weights")?).map(|weights| format!("weights of {}: {weights}", text(node, "name")))
}

/// From where a node had its weights, and how many bytes it sent; `None` if it did neither.
fn weights(weights: &Value) -> Option<String> {
    let came = [
        ("own_copy", "from its own copy"),
        ("cache", "from its cache"),
        ("coordinator", "from the coordinator"),
        ("workers", "from other workers"),
        ("hub", "from the hub"),
        ("served", "sent to other nodes"),
    ];
    let said = |(key, from): (&str, &str)| {
        let bytes = size(weights, key);
        (bytes.0 > 0).then(|| format!("{bytes} {from}"))
    };
    let said: Vec<String> = came.into_iter().filter_map(said).collect();
    (!said.is_empty()).then(|| said.join(", "))
}

/// The adapters of the model; `None` where it has none.
fn adapters(status: &Value) -> Option<String> {
    let names = status.get("adapters").and_then(Value::as_array)?;
    let names: Vec<_> = names.iter().filter_map(Value::as_str).collect();
    (!names.is_empty()).then(|| format!("with {}", names.join(", ")))
}

/// How keys and values are stored, where that is not as usual.
fn kv_types(status: &Value) -> String {
    let side = |key| status.get("kv").map_or("", |kv| text(kv, key));
    match (side("k"), side("v")) {
        ("" | "f16", "" | "f16") => String::new(),
        (k, v) if k == v => format!(" in {k}"),
        (k, v) => format!(" in {k}/{v}"),
    }
}

fn describe_node(node: &Value) -> String {
    let state = if text(node, "state") == "loading" {
        format!("{:.0} %", 100.0 * number(node, "loaded"))
    } else {
        text(node, "state").to_owned()
    };
    let standby = standby(node);
    format!(
        "{:<20} {:<11} {:>7} {:>9} {:<9} {:>10} {:>10} {:>10} {:>7} {:>8.2} {:>4.0} % {:>8.2}",
        text(node, "name"),
        text(node, "role"),
        layers(node),
        if standby.is_empty() { "-" } else { &standby },
        state,
        size(node, "memory_stage").to_string(),
        size(node, "memory_resident").to_string(),
        size(node, "memory_offered").to_string(),
        number(node, "threads"),
        number(node, "pass_ms"),
        100.0 * number(node, "busy"),
        number(node, "rtt_ms"),
    )
}

/// How often the model was placed anew after a loss, and the last time of it; `None` if it never was.
fn recoveries(status: &Value) -> Option<String> {
    let n = status.get("recoveries").and_then(Value::as_u64).filter(|n| *n > 0)?;
    let times = if n == 1 { "once".to_owned() } else { format!("{n} times") };
    let last = status.get("last_recovery").filter(|last| last.is_object()).map(|last| {
        let pause = match number(last, "pause_ms") {
            ms if ms > 0.0 => format!("answers paused for {:.1} s", ms / 1000.0),
            _ => "answers are paused".to_owned(),
        };
        format!(", last because {}; {pause}", text(last, "reason"))
    });
    Some(format!("recovered {times}{}", last.unwrap_or_default()))
}

fn describe_worker(worker: &Value) -> String {
    if text(worker, "role") == "coordinator" {
        return "this node coordinates, and has no endpoint to ask; start it with --port to give it one\n".to_owned();
    }
    let connected = worker.get("connected").and_then(Value::as_bool).unwrap_or(false);
    let link = if connected { "connected" } else { "looking for it" };
    let model = text(worker, "model");
    let of = if model.is_empty() { "" } else { " of " };
    let mut lines = vec![
        format!("this node is a worker of {}, {link}", text(worker, "coordinator")),
        format!("state   {}", text(worker, "state")),
        format!("layers  {}{of}{model}", layers(worker)),
    ];
    let standby = standby(worker);
    if !standby.is_empty() {
        lines.push(format!("standby {standby}"));
    }
    lines.extend(worker.get("weights_from").and_then(weights).map(|weights| format!("weights {weights}")));
    if let Some(trouble) = worker.get("trouble").and_then(Value::as_str) {
        lines.push(format!("trouble {trouble}"));
    }
    lines.push("`brigade status` on the coordinator shows the whole cluster\n".to_owned());
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn losses_and_who_stands_by_are_shown_where_there_are_any() {
        let mut status = json!({"model": "m", "state": "ready", "nodes": [
            {"name": "w0", "role": "worker", "layers": [0, 4], "standby": [[4, 6], [6, 8]], "state": "ready"},
            {"name": "w1", "role": "worker", "layers": [4, 8], "standby": [], "state": "leaving"},
        ]});
        let shown = describe(&status);
        let row = |name: &str| {
            let line = shown.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(row("w0")[2..5], ["0..4", "4..6,6..8", "ready"]);
        assert_eq!(row("w1")[2..5], ["4..8", "-", "leaving"]);
        assert!(!shown.contains("recovered"), "{shown}");
        status["recoveries"] = json!(1);
        assert!(describe(&status).contains("\nrecovered once\n"));
        status["recoveries"] = json!(2);
        status["last_recovery"] = json!({"reason": "w2 is lost", "pause_ms": 640.0});
        let shown = describe(&status);
        assert!(shown.contains("\nrecovered 2 times, last because w2 is lost; answers paused for 0.6 s\n"), "{shown}");
        status["last_recovery"]["pause_ms"] = json!(0);
        assert!(describe(&status).contains("w2 is lost; answers are paused\n"));
    }

    #[test]
    fn it_is_said_where_weights_came_from() {
        let node = |weights: Value| json!({"model": "m", "nodes": [{"name": "w0", "weights": weights}]});
        let none = json!({"cache": 0, "served": 0});
        assert!(!describe(&node(none)).contains("weights"));
        let some = json!({"cache": 2048, "workers": 1 << 20, "served": 1024, "hub": 0});
        let shown = describe(&node(some.clone()));
        let line = "weights of w0: 2.0 KiB from its cache, 1.0 MiB from other workers, 1.0 KiB sent to other nodes\n";
        assert!(shown.contains(line), "{shown}");
        let worker = describe_worker(&json!({"coordinator": "c", "weights_from": some}));
        assert!(worker.contains("weights 2.0 KiB from its cache"), "{worker}");
    }

    #[test]
    fn a_worker_tells_of_its_link_and_its_trouble() {
        let lost = json!({"coordinator": "c", "connected": false, "state": "waiting", "trouble": "no route"});
        let text = describe_worker(&lost);
        assert!(text.contains("worker of c, looking for it\n") && text.contains("trouble no route\n"), "{text}");
        let runs = json!({"coordinator": "c", "connected": true, "model": "m", "layers": [0, 4], "state": "running"});
        let text = describe_worker(&runs);
        assert!(text.contains("c, connected\n") && text.contains("layers  0..4 of m\n"), "{text}");
        assert!(!text.contains("standby"), "{text}");
        let stands_by = json!({"coordinator": "c", "connected": true, "model": "m", "standby": [[0, 4]]});
        let text = describe_worker(&stands_by);
        assert!(text.contains("layers  - of m\nstandby 0..4\n"), "{text}");
    }
}
