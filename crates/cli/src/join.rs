//! `brigade join`: a worker.

use std::path::{Path, PathBuf};

use brigade_net::Ticket;
use brigade_node::{Worker, WorkerOptions, WorkerStatus};
use serde::Serialize;

use crate::args::JoinArgs;
use crate::error::Failure;
use crate::progress::{Bars, POLL};
use crate::{files, output};

/// Largest file that is taken for a ticket.
const MAX_TICKET_FILE_BYTES: u64 = 16 << 10;

/// Works until stopped.
pub fn run(args: &JoinArgs) -> Result<(), Failure> {
    let state_dir = args.node.state.dir();
    files::make_state_dir(&state_dir)?;
    brigade_node::system::raise_open_files();
    let options = WorkerOptions {
        state_dir: state_dir.clone(),
        name: args.node.name(),
        ticket: ticket(args)?,
        listen: args.node.listen(0),
        memory: args.node.memory(),
        threads: args.node.threads(),
        own_copy: args.model.clone(),
        cache_limit: args.cache_size,
        kv_spill: args.kv_spill,
    };
    let worker = Worker::start(options).map_err(Failure::run)?;
    let stopper = worker.stopper();
    ctrlc::set_handler(move || stopper.stop()).map_err(Failure::run)?;
    let first = worker.status();
    output::line(format_args!("node    {} at {}", first.node.short(), first.address))?;
    let watched = watch(&worker, &state_dir);
    let _ = std::fs::remove_file(status_file(&state_dir));
    watched?;
    worker.wait().map_err(Failure::run)
}

fn ticket(args: &JoinArgs) -> Result<Option<Ticket>, Failure> {
    let text = match (&args.ticket, &args.ticket_file) {
        (Some(text), _) if !text.trim().is_empty() => text.clone(),
        (_, Some(path)) => {
            let text = files::read_text(path, MAX_TICKET_FILE_BYTES);
            text.map_err(|error| Failure::usage(format!("--ticket-file {error}")))?
        }
        (_, None) => return Ok(None),
    };
    text.trim().parse().map(Some).map_err(Failure::usage)
}

/// Where a worker notes how it stands, for `brigade status`.
pub fn status_file(state_dir: &Path) -> PathBuf {
    state_dir.join("worker.json")
}

/// What a worker notes: how it stands, and which process that was.
#[derive(Serialize)]
struct Note<'a> {
    pid: u32,
    #[serde(flatten)]
    status: &'a WorkerStatus,
}

/// Shows progress and changes of state until the worker ends.
fn watch(worker: &Worker, state_dir: &Path) -> Result<(), Failure> {
    let mut bars = Bars::new();
    let (mut shown, mut trouble) = (String::new(), None);
    while !worker.is_finished() {
        let status = worker.status();
        let (done, total) = status.weights;
        let share = if status.state == "loading" && total > 0 { done as f32 / total as f32 } else { 1.0 };
        bars.set("fetching weights", share);
        let state = describe(&status);
        if state != shown {
            bars.clear();
            output::line(&state)?;
        }
        if state != shown || status.trouble != trouble {
            // For `brigade status` on this machine; a full disk must not end the worker.
            if let Ok(bytes) = serde_json::to_vec_pretty(&Note { pid: std::process::id(), status: &status }) {
                let _ = brigade_net::write_atomic(&status_file(state_dir), &bytes, 0o600);
            }
            (shown, trouble) = (state, status.trouble);
        }
        std::thread::sleep(POLL);
    }
    bars.clear();
    Ok(())
}

fn describe(status: &WorkerStatus) -> String {
    let coordinator = status.coordinator.short();
    match (&status.layers, status.connected, &status.trouble) {
        (Some(layers), true, _) => format!("{} layers {layers} of {} for {coordinator}", status.state, status.model),
        (None, true, Some(trouble)) => format!("idle for {coordinator} ({trouble})"),
        (None, true, None) => format!("joined {coordinator}, waiting for layers"),
        (_, false, Some(trouble)) => format!("looking for {coordinator} ({trouble})"),
        (_, false, None) => format!("looking for {coordinator}"),
    }
}
