//! `brigade leave`: the worker that runs here hands its layers over and ends.
//!
//! The worker does the work: this asks it with SIGTERM, as a service manager does, and waits.

use std::path::Path;
use std::time::Instant;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::args::LeaveArgs;
use crate::error::Failure;
use crate::node_note::{Found, find, is_in_use};
use crate::progress::POLL;
use crate::{files, output};

/// Asks once and waits.
pub fn run(args: &LeaveArgs) -> Result<(), Failure> {
    let state_dir = args.state.dir();
    if state_dir.is_file() {
        return Err(files::is_a_file(&state_dir));
    }
    let found = find(&state_dir)?.ok_or_else(|| no_worker(&state_dir))?;
    if found.coordinates() {
        return Err(coordinates(&state_dir, found.pid));
    }
    let Found { pid, note } = found;
    let number = pid.as_raw_nonzero();
    // A second signal would end it at once.
    if is_leaving(&note) {
        output::line(format_args!("the worker (process {number}) is leaving already"))?;
    } else {
        ask(pid)?;
        output::line(format_args!("the worker (process {number}) was asked to leave"))?;
    }
    let begin = Instant::now();
    let mut last = note;
    while is_in_use(&state_dir) {
        if let Ok(Some(found)) = find(&state_dir) {
            last = found.note;
        }
        if begin.elapsed() >= args.timeout {
            return Err(too_slow(args, pid, &last));
        }
        std::thread::sleep(POLL);
    }
    output::line(format_args!("it has left after {:.1} s{}", begin.elapsed().as_secs_f32(), outcome(&last)))
}

fn is_leaving(note: &Value) -> bool {
    matches!(note.get("state").and_then(Value::as_str), Some("leaving" | "released"))
}

fn ask(pid: Pid) -> Result<(), Failure> {
    let number = pid.as_raw_nonzero();
    match kill_process(pid, Signal::TERM) {
        // It has ended in this very moment.
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(Errno::PERM) => Err(Failure::run(format!(
            "the worker (process {number}) is another user's: run this as that user, or with sudo"
        ))),
        Err(error) => Err(Failure::run(format!("the worker (process {number}) cannot be asked: {error}"))),
    }
}

fn no_worker(state_dir: &Path) -> Failure {
    Failure::run(format!(
        "no node runs with the state directory {}: name that of `brigade join` with --state-dir",
        state_dir.display()
    ))
}

fn coordinates(state_dir: &Path, pid: Pid) -> Failure {
    Failure::run(format!(
        "the node with the state directory {} is the coordinator, which has nobody to hand its work to: to end it once \
         its running answers have ended, run: kill {}",
        state_dir.display(),
        pid.as_raw_nonzero()
    ))
}

fn too_slow(args: &LeaveArgs, pid: Pid, last: &Value) -> Failure {
    let trouble = last.get("trouble").and_then(Value::as_str).map(|text| format!(" ({text})")).unwrap_or_default();
    let number = pid.as_raw_nonzero();
    Failure::run(format!(
        "the worker has not left after {}{trouble}; it goes on leaving: wait, or end it at once with: kill {number}",
        humantime::format_duration(args.timeout)
    ))
}

/// What is known of how it went.
fn outcome(last: &Value) -> &'static str {
    let holds =
        |key: &str| last.get(key).is_some_and(|value| !value.is_null() && value.as_array() != Some(&Vec::new()));
    match last.get("state").and_then(Value::as_str) {
        Some("released") => "; other machines have its layers",
        _ if !holds("layers") && !holds("standby") => "; it held no layers",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn it_says_what_became_of_the_layers() {
        assert!(outcome(&json!({"state": "released", "layers": [0, 4]})).contains("other machines"));
        assert!(outcome(&json!({"state": "waiting", "layers": null, "standby": []})).contains("no layers"));
        assert_eq!(outcome(&json!({"state": "leaving", "layers": [0, 4]})), "");
        assert_eq!(outcome(&json!({"state": "leaving", "standby": [[0, 4]]})), "");
    }

    #[test]
    fn who_leaves_already_is_not_asked_again() {
        assert!(is_leaving(&json!({"state": "leaving"})) && is_leaving(&json!({"state": "released"})));
        assert!(!is_leaving(&json!({"state": "running"})) && !is_leaving(&json!({})));
    }
}
