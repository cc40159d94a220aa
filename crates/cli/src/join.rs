//! `brigade join`: a node that works for a coordinator, and with `--port` answers HTTP through it.

use brigade_net::Ticket;
use brigade_node::serving::Serving;
use brigade_node::{DirectFetch, Node, Part, WorkerOptions};

use crate::args::JoinArgs;
use crate::error::Failure;
use crate::running::Running;
use crate::{files, http, model, output, serve, sources};

/// Largest file that is taken for a ticket.
const MAX_TICKET_FILE_BYTES: u64 = 16 << 10;

/// Works until stopped.
pub fn run(args: &JoinArgs) -> Result<(), Failure> {
    check_own_settings(args)?;
    let state_dir = args.node.state.dir();
    files::make_state_dir(&state_dir)?;
    brigade_node::system::raise_open_files();
    // A port in use is found before a large model is read.
    let front = args.port.map(|port| http::open(&args.http, port)).transpose()?;
    let options = WorkerOptions {
        state_dir: state_dir.clone(),
        name: args.node.name(),
        ticket: ticket(args)?,
        listen: args.node.listen(0),
        memory: args.node.memory(),
        threads: args.node.threads(),
        throttle: args.node.throttle,
        cache_limit: args.cache_size,
        direct_fetch: serve::direct_fetch(args.direct_fetch, &args.sources),
        kv_spill: args.kv_spill,
        drain_timeout: args.drain_timeout,
        wait_for_capacity: args.wait_for_capacity,
    };
    let pulled = args.model.as_ref().map(|model| sources::open(model, &args.sources, &args.node.state)).transpose()?;
    let model = pulled.as_ref().map(|pulled| model::open_pulled(pulled, &state_dir)).transpose();
    let model = model.map_err(|error| Failure::run(format!("--model cannot be used: {error}")))?;
    let model = model.map(|model| model.with_adapters(&args.lora, &state_dir)).transpose();
    let model = model.map_err(|error| Failure::run(format!("--lora: {error}")))?;
    let node = Node::join(options, model).map_err(Failure::run)?;
    let running = Running::new(node, &state_dir, front, args.drain_timeout)?;
    let id = running.node().id().short();
    let addresses = running.node().link_addresses().first().map(ToString::to_string).unwrap_or_default();
    output::line(format_args!("node    {id} at {addresses}"))?;
    running.wait(|node, part| match part {
        Part::Coordinates => output::line(format_args!("this node coordinates {} now", node.front().model().name)),
        Part::Undecided | Part::Works(_) => Ok(()),
    })
}

/// Refuses what makes no sense for a worker. What was set for all verbs is gone by now, see `config.rs`.
fn check_own_settings(args: &JoinArgs) -> Result<(), Failure> {
    if args.model.is_none() && !args.lora.is_empty() {
        return Err(Failure::usage(
            "--lora (in the file lora under [join]) is for this node's own copy of the model, and there is none; give \
             --model too, or leave it out: a worker is sent what it needs of adapters",
        ));
    }
    if args.direct_fetch == DirectFetch::On {
        return Err(Failure::usage(
            "--direct-fetch (in the file direct-fetch under [join]) is auto or off here: `brigade serve` alone can ask \
             for on",
        ));
    }
    Ok(())
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
