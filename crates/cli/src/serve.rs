//! `brigade serve`: a node with a model and an HTTP endpoint. It coordinates, unless another node has taken over.

use std::net::SocketAddr;
use std::path::Path;

use brigade_node::serving::{Purpose, Serving};
use brigade_node::{CoordinatorOptions, DirectFetch, Node, Part};
use brigade_store::Settings;

use crate::args::ServeArgs;
use crate::error::Failure;
use crate::running::Running;
use crate::sources::SourceArgs;
use crate::{embedded, files, http, model, output, sources};

/// Port of links unless told otherwise, so that workers find a restarted coordinator again.
const LINK_PORT: u16 = 7411;

/// Serves until stopped.
pub fn run(args: &ServeArgs) -> Result<(), Failure> {
    let state_dir = args.node.state.dir();
    files::make_state_dir(&state_dir)?;
    brigade_node::system::raise_open_files();
    if args.shadow && args.redundancy < 2 {
        return Err(Failure::usage(
            "--shadow feeds the nodes that stand by, and there are none; give --redundancy 2 too",
        ));
    }
    // A port in use and a file that cannot be written are found before a large model is read.
    if let Some(path) = &args.ticket_file {
        files::check_writable(path).map_err(|error| ticket_file_failed(path, &error))?;
    }
    let mut front = http::open(&args.http, args.port)?;
    front.options.share_prefix_cache = args.share_prefix_cache;
    // Held until the end, so that nobody prunes it meanwhile.
    let pulled = args.model.as_ref().map(|model| sources::open(model, &args.sources, &args.node.state)).transpose()?;
    let model = match &pulled {
        Some(pulled) => model::open_pulled(pulled, &state_dir),
        None => model::open(&embedded::abacus(&state_dir)?, &state_dir),
    };
    let model = model.and_then(|model| model.with_adapters(&args.lora, &state_dir)).map_err(Failure::run)?;
    let (why_whole, has_adapted_head) = (model.architecture().why_whole(), model.has_adapted_head());
    let node = Node::serve(model, options(args, &state_dir)).map_err(Failure::run)?;
    let running = Running::new(node, &state_dir, Some(front), args.drain_timeout)?;
    running.wait(|node, part| match part {
        Part::Undecided => Ok(()),
        Part::Coordinates => greet(args, node, why_whole, has_adapted_head),
        Part::Works(status) => {
            let coordinator = status.coordinator.short();
            output::line(format_args!("another node coordinates: {coordinator}; this one works for it"))
        }
    })
}

fn options(args: &ServeArgs, state_dir: &Path) -> CoordinatorOptions {
    CoordinatorOptions {
        model_name: None,
        state_dir: state_dir.to_owned(),
        name: args.node.name(),
        listen: args.node.listen(LINK_PORT),
        memory: args.node.memory(),
        threads: args.node.threads(),
        context: args.context,
        parallel: args.parallel,
        kv: args.kv.types(),
        nodes_wanted: args.nodes as usize,
        spread: args.spread,
        split: args.layers.clone(),
        optimize: args.optimize,
        throttle: args.node.throttle,
        prefix_cache: args.prefix_cache,
        kv_spill: args.kv_spill,
        redundancy: args.redundancy,
        shadow: args.shadow,
        wait_for_capacity: args.wait_for_capacity,
        pooling: args.pooling,
        direct_fetch: direct_fetch(args.direct_fetch, &args.sources),
        drain_timeout: args.drain_timeout,
    }
}

/// Whether weights may be fetched from where the model came from: as `wanted`, but not where no server is to be asked.
pub fn direct_fetch(wanted: DirectFetch, sources: &SourceArgs) -> DirectFetch {
    // An error means that servers may be asked: its cause is not looked at otherwise, and is none of workers' business.
    let is_offline = Settings::from_environment(sources.offline).is_ok_and(|settings| settings.is_offline);
    if is_offline { DirectFetch::Off } else { wanted }
}

/// Says what is served, and how other nodes join.
fn greet(args: &ServeArgs, node: &Node, why_whole: Option<&str>, has_adapted_head: bool) -> Result<(), Failure> {
    let made = match node.front().create_ticket(args.ticket_ttl) {
        Ok(made) => made,
        // A coordinator that has ended since makes none, and its own last word says more.
        Err(error) => {
            tracing::warn!(%error, "no ticket was made; `brigade ticket create` tries again");
            return Ok(());
        }
    };
    let ticket = made.ticket.ok_or_else(|| Failure::run("the coordinator made no ticket"))?;
    if let Some(path) = &args.ticket_file {
        brigade_net::write_atomic(path, format!("{ticket}\n").as_bytes(), 0o600)
            .map_err(|error| ticket_file_failed(path, &error))?;
    }
    let card = node.front().model();
    output::line(format_args!(
        "model   {} ({} tokens of context, {} sessions)",
        card.name, card.context, args.parallel
    ))?;
    match card.purpose {
        Purpose::Generate => {}
        Purpose::Embed => output::line("texts   it embeds them: POST /v1/embeddings")?,
        Purpose::Rank => output::line("texts   it ranks them: POST /v1/rerank")?,
    }
    if has_adapted_head && card.purpose != Purpose::Generate {
        output::line("lora    what adapts the head (output.weight) does nothing here, since no text is generated")?;
    }
    if let Some(why) = why_whole {
        output::line(format_args!("whole   this model stays on one node, since {why}"))?;
    }
    output::line(format_args!("links   {}", join(node.link_addresses())))?;
    output::line(format_args!("join    brigade join {ticket}"))
}

fn ticket_file_failed(path: &Path, error: &std::io::Error) -> Failure {
    // Without the name of the temporary file that was to become this one.
    let inner = error.get_ref().and_then(|inner| inner.source());
    let reason = inner.map_or_else(|| error.to_string(), ToString::to_string);
    Failure::run(format!("--ticket-file {} cannot be written: {reason}", path.display()))
}

fn join(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}
