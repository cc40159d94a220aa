//! `brigade status`: the cluster as its coordinator sees it.

use std::path::Path;

use brigade_base::ByteSize;
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use serde_json::Value;

use crate::args::StatusArgs;
use crate::endpoint::Endpoint;
use crate::error::Failure;
use crate::{files, output};

/// Largest note of a worker: a few texts of a few kilobytes.
const MAX_NOTE_BYTES: u64 = 1 << 20;

/// Prints the status once.
pub fn run(args: &StatusArgs) -> Result<(), Failure> {
    let state_dir = args.endpoint.state.dir();
    let endpoint = match Endpoint::of(&args.endpoint) {
        Ok(endpoint) => endpoint,
        // On a worker's machine there is no endpoint, but there is something to tell.
        Err(failure) => {
            let worker = worker(&state_dir)?.ok_or(failure)?;
            return if args.json { output::json(&worker) } else { output::text(&describe_worker(&worker)) };
        }
    };
    let status = endpoint.get("/brigade/v1/status")?;
    if args.json { output::json(&status) } else { print(&status) }
}

/// What the worker that runs with this state directory notes; `None` if there is no note.
fn worker(state_dir: &Path) -> Result<Option<Value>, Failure> {
    let Ok(text) = files::read_text(&crate::join::status_file(state_dir), MAX_NOTE_BYTES) else { return Ok(None) };
    let Ok(worker) = serde_json::from_str::<Value>(&text) else { return Ok(None) };
    let pid = worker.get("pid").and_then(Value::as_i64).and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
    // A process of another user may not be asked, but it is there.
    match pid.map(test_kill_process) {
        Some(Ok(()) | Err(Errno::PERM)) => Ok(Some(worker)),
        _ => Err(Failure::run(format!(
            "no worker runs with the state directory {}: the last one was killed; start `brigade join` again",
            state_dir.display()
        ))),
    }
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
        "{} of {} sessions run, {} wait; {:.1} tokens/s, {} tokens since the start; {:.0} us per hop; {:.0} % of KV cache",
        number(status, "running"),
        number(status, "parallel"),
        number(status, "waiting"),
        number(status, "tokens_per_second"),
        number(status, "tokens_generated"),
        number(status, "hop_us_p50"),
        100.0 * number(status, "kv_tokens") / number(status, "kv_capacity").max(1.0),
    ))?;
    output::line("")?;
    output::line(format_args!(
        "{:<20} {:<11} {:>7} {:<9} {:>10} {:>10} {:>10} {:>7} {:>8} {:>6} {:>8}",
        "node", "role", "layers", "state", "stage", "resident", "offered", "threads", "pass ms", "busy", "rtt ms"
    ))?;
    for node in status.get("nodes").and_then(Value::as_array).into_iter().flatten() {
        let state = if text(node, "state") == "loading" {
            format!("{:.0} %", 100.0 * number(node, "loaded"))
        } else {
            text(node, "state").to_owned()
        };
        output::line(format_args!(
            "{:<20} {:<11} {:>7} {:<9} {:>10} {:>10} {:>10} {:>7} {:>8.2} {:>4.0} % {:>8.2}",
            text(node, "name"),
            text(node, "role"),
            layers(node),
            state,
            size(node, "memory_stage").to_string(),
            size(node, "memory_resident").to_string(),
            size(node, "memory_offered").to_string(),
            number(node, "threads"),
            number(node, "pass_ms"),
            100.0 * number(node, "busy"),
            number(node, "rtt_ms"),
        ))?;
    }
    Ok(())
}

fn describe_worker(worker: &Value) -> String {
    let connected = worker.get("connected").and_then(Value::as_bool).unwrap_or(false);
    let link = if connected { "connected" } else { "looking for it" };
    let model = text(worker, "model");
    let of = if model.is_empty() { "" } else { " of " };
    let mut lines = vec![
        format!("this node is a worker of {}, {link}", text(worker, "coordinator")),
        format!("state   {}", text(worker, "state")),
        format!("layers  {}{of}{model}", layers(worker)),
    ];
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
    fn a_worker_that_was_killed_runs_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let note = |pid: u32| std::fs::write(dir.path().join("worker.json"), json!({"pid": pid}).to_string()).unwrap();
        assert_eq!(worker(dir.path()).unwrap(), None);
        note(std::process::id());
        assert!(worker(dir.path()).unwrap().is_some());
        // Beyond the highest process number of any system.
        for pid in [0, i32::MAX as u32, u32::MAX] {
            note(pid);
            assert!(worker(dir.path()).unwrap_err().to_string().contains("no worker runs"), "{pid}");
        }
    }

    #[test]
    fn a_worker_tells_of_its_link_and_its_trouble() {
        let lost = json!({"coordinator": "c", "connected": false, "state": "waiting", "trouble": "no route"});
        let text = describe_worker(&lost);
        assert!(text.contains("worker of c, looking for it\n") && text.contains("trouble no route\n"), "{text}");
        let runs = json!({"coordinator": "c", "connected": true, "model": "m", "layers": [0, 4], "state": "running"});
        let text = describe_worker(&runs);
        assert!(text.contains("c, connected\n") && text.contains("layers  0..4 of m\n"), "{text}");
    }
}
