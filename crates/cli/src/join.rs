//! `brigade join`: a worker.

use std::path::Path;

use brigade_net::Ticket;
use brigade_node::{Worker, WorkerOptions, WorkerStatus};

use crate::args::JoinArgs;
use crate::error::Failure;
use crate::output;
use crate::progress::{Bars, POLL};

/// Largest file that is taken for a ticket.
const MAX_TICKET_FILE_BYTES: u64 = 16 << 10;

/// Works until stopped.
pub fn run(args: &JoinArgs) -> Result<(), Failure> {
    let state_dir = args.node.state.dir();
    brigade_net::create_private_dir(&state_dir)
        .map_err(|error| Failure::run(format!("{} cannot be used: {error}", state_dir.display())))?;
    let options = WorkerOptions {
        state_dir: state_dir.clone(),
        name: args.node.name(),
        ticket: ticket(args)?,
        listen: args.node.listen(0),
        memory: args.node.memory(),
        threads: args.node.threads(),
        own_copy: args.model.clone(),
        cache_limit: args.cache_size,
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
        (Some(text), _) => text.clone(),
        (None, Some(path)) => {
            let failed = |error: std::io::Error| Failure::usage(format!("--ticket-file {}: {error}", path.display()));
            if std::fs::metadata(path).map_err(failed)?.len() > MAX_TICKET_FILE_BYTES {
                return Err(Failure::usage(format!("--ticket-file {}: this is no ticket", path.display())));
            }
            std::fs::read_to_string(path).map_err(failed)?
        }
        (None, None) => return Ok(None),
    };
    text.trim().parse().map(Some).map_err(Failure::usage)
}

/// Where a worker notes how it stands, for `brigade status`.
pub fn status_file(state_dir: &Path) -> std::path::PathBuf {
    state_dir.join("worker.json")
}

/// Shows progress and changes of state until the worker ends.
fn watch(worker: &Worker, state_dir: &Path) -> Result<(), Failure> {
    let mut bars = Bars::new();
    let mut shown = String::new();
    while !worker.is_finished() {
        let status = worker.status();
        let (done, total) = status.weights;
        let share = if status.state == "loading" && total > 0 { done as f32 / total as f32 } else { 1.0 };
        bars.set("fetching weights", share);
        let state = describe(&status);
        if state != shown {
            bars.clear();
            output::line(&state)?;
            // For `brigade status` on this machine; a full disk must not end the worker.
            if let Ok(bytes) = serde_json::to_vec_pretty(&status) {
                let _ = brigade_net::write_atomic(&status_file(state_dir), &bytes, 0o600);
            }
            shown = state;
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
