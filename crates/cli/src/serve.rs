//! `brigade serve`: a coordinator with its HTTP endpoint.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use brigade_api::{ApiOptions, Server};
use brigade_node::serving::{ClusterStatus, Readiness, Serving};
use brigade_node::{Coordinator, CoordinatorOptions, LocalModel};

use crate::args::ServeArgs;
use crate::endpoint::Note;
use crate::error::Failure;
use crate::progress::{Bars, POLL};
use crate::{embedded, files, output};

/// Port of links unless told otherwise, so that workers find a restarted coordinator again.
const LINK_PORT: u16 = 7411;

/// Largest file of keys: thousands of them.
const MAX_KEY_FILE_BYTES: u64 = 1 << 20;

/// Serves until stopped.
pub fn run(args: &ServeArgs) -> Result<(), Failure> {
    let state_dir = args.node.state.dir();
    files::make_state_dir(&state_dir)?;
    brigade_node::system::raise_open_files();
    let keys = api_keys(args)?;
    if !args.bind.is_loopback() && keys.is_empty() {
        return Err(Failure::usage(format!(
            "--bind {} lets other machines in; give --api-key or --api-key-file as well",
            args.bind
        )));
    }
    // A port in use and a file that cannot be written are found before a large model is read.
    if let Some(path) = &args.ticket_file {
        files::check_writable(path).map_err(|error| ticket_file_failed(path, &error))?;
    }
    let http_address = SocketAddr::new(args.bind, args.port);
    let http = TcpListener::bind(http_address).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            Failure::run(format!("port {} is in use; choose another with --port, or 0 for any", args.port))
        }
        _ => Failure::run(format!("the endpoint cannot listen on {http_address}: {error}")),
    })?;
    let model = open_model(args, &state_dir)?;
    let options = CoordinatorOptions {
        state_dir: state_dir.clone(),
        name: args.node.name(),
        listen: args.node.listen(LINK_PORT),
        memory: args.node.memory(),
        threads: args.node.threads(),
        context: args.context,
        parallel: args.parallel,
        nodes_wanted: args.nodes as usize,
        spread: args.spread,
        split: args.layers.clone(),
        prefix_cache: args.prefix_cache,
        kv_spill: args.kv_spill,
    };
    let coordinator = Coordinator::start(model, options).map_err(Failure::run)?;
    let stopper = coordinator.stopper();
    ctrlc::set_handler(move || stopper.stop()).map_err(Failure::run)?;

    let handle = coordinator.handle();
    let ticket = handle.ticket(args.ticket_ttl).map_err(Failure::run)?.to_string();
    if let Some(path) = &args.ticket_file {
        brigade_net::write_atomic(path, format!("{ticket}\n").as_bytes(), 0o600)
            .map_err(|error| ticket_file_failed(path, &error))?;
    }
    let admin_token = brigade_net::random_token().map_err(Failure::run)?;
    let host_names = args.host_name.clone();
    let api = ApiOptions {
        keys,
        admin_token: Some(admin_token.clone()),
        host_names,
        share_prefix_cache: args.share_prefix_cache,
        ..ApiOptions::default()
    };
    let server = Server::start(http, Arc::clone(&handle) as Arc<dyn Serving>, &api).map_err(Failure::run)?;
    let url = format!("http://{}", server.addr());
    let _note = Note { url: url.clone(), admin_token, pid: std::process::id() }.leave(&state_dir)?;

    let card = handle.model();
    output::line(format_args!(
        "model   {} ({} tokens of context, {} sessions)",
        card.name, card.context, args.parallel
    ))?;
    output::line(format_args!("links   {}", join(coordinator.link_addresses())))?;
    output::line(format_args!("join    brigade join {ticket}"))?;
    output::line(format_args!("serving {url}/v1"))?;
    watch(&coordinator, &*handle, &format!("ready {url}/v1"))?;
    server.stop();
    coordinator.wait().map_err(Failure::run)
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

fn open_model(args: &ServeArgs, state_dir: &Path) -> Result<LocalModel, Failure> {
    let path = match &args.model {
        Some(path) => path.clone(),
        None => embedded::abacus(state_dir)?,
    };
    brigade_engine::init();
    let bars = Mutex::new(Bars::new());
    let hashing = |done: u64, total: u64| {
        let share = if total == 0 { 1.0 } else { done as f32 / total as f32 };
        bars.lock().unwrap_or_else(PoisonError::into_inner).set("hashing weights", share);
    };
    let model = LocalModel::open(&path, state_dir, &hashing);
    bars.lock().unwrap_or_else(PoisonError::into_inner).clear();
    model.map_err(Failure::run)
}

/// Keys from the command line and the file.
fn api_keys(args: &ServeArgs) -> Result<Vec<String>, Failure> {
    let mut keys = args.api_key.clone();
    if let Some(path) = &args.api_key_file {
        let text = files::read_text(path, MAX_KEY_FILE_BYTES)
            .map_err(|error| Failure::usage(format!("--api-key-file {error}")))?;
        let found = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let before = keys.len();
        keys.extend(found.map(str::to_owned));
        if keys.len() == before {
            let path = path.display();
            return Err(Failure::usage(format!("--api-key-file {path}: there is no key in it; write one per line")));
        }
    }
    if keys.iter().any(|key| key.trim().is_empty()) {
        return Err(Failure::usage("--api-key must not be empty"));
    }
    Ok(keys)
}

/// Shows progress and changes of state until the coordinator ends.
fn watch(coordinator: &Coordinator, handle: &dyn Serving, ready: &str) -> Result<(), Failure> {
    let mut bars = Bars::new();
    let mut shown = String::new();
    while !coordinator.is_finished() {
        let status = handle.status();
        show_loading(&mut bars, &status);
        let state = match handle.readiness() {
            Readiness::Ready => ready.to_owned(),
            Readiness::NotReady(why) => why,
        };
        if state != shown {
            bars.clear();
            output::line(&state)?;
            shown = state;
        }
        std::thread::sleep(POLL);
    }
    bars.clear();
    Ok(())
}

fn show_loading(bars: &mut Bars, status: &ClusterStatus) {
    for node in &status.nodes {
        if let Some(layers) = node.layers {
            bars.set(
                &format!("{} layers {layers}", node.name),
                if node.state == "loading" { node.loaded } else { 1.0 },
            );
        }
    }
}
