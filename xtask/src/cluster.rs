//! Clusters of real `brigade` processes on this machine.
//!
//! The caller owns the [`Processes`]; a [`Cluster`] only knows where its endpoint is. Node 0 is the coordinator, the
//! others join it with its ticket, over loopback.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::failure::{Failure, Outcome};
use crate::http::Endpoint;
use crate::processes::Processes;

/// How long a coordinator may take to open its model, hashing included: 100 GB from a slow disk.
const OPEN_TIMEOUT: Duration = Duration::from_secs(600);

/// How long placing, loading and the first token may take after that.
const READY_TIMEOUT: Duration = Duration::from_secs(300);

/// How long the status may lag behind what it tells of.
const STATUS_TIMEOUT: Duration = Duration::from_secs(3);

/// How often it is asked.
const STATUS_POLL: Duration = Duration::from_millis(25);

/// What to start.
#[derive(Debug, Clone)]
pub struct ClusterSpec {
    /// Names of the nodes, the coordinator's first.
    pub names: Vec<String>,
    /// The model, of which each node has a copy; `None` takes the embedded one, and workers fetch their layers.
    pub model: Option<PathBuf>,
    /// Threads that compute in each node.
    pub threads: u32,
    /// Gives node `k` the cores from `k * threads` on, as far as there are so many.
    pub pin: bool,
    /// Tokens of a session.
    pub context: Option<u32>,
    /// Sessions at once.
    pub parallel: Option<u32>,
    /// Layers of each stage, the coordinator's last; by memory if there are none.
    pub layers: Vec<u32>,
}

/// A cluster that answers.
pub struct Cluster {
    /// Its endpoint.
    pub endpoint: Endpoint,
    /// From the start of the first process until a token had gone around.
    pub startup: Duration,
}

impl Cluster {
    /// Starts the processes and waits until they answer. `state_dir`, which need not exist, becomes their parent.
    pub fn start(processes: &Processes, brigade: &Path, state_dir: &Path, spec: &ClusterSpec) -> Outcome<Self> {
        std::fs::create_dir_all(state_dir).map_err(Failure::io(state_dir.display()))?;
        let started = Instant::now();
        let ticket = state_dir.join("ticket");
        let mut serve = node(brigade, "serve", 0, state_dir, &ticket, spec);
        serve.args(spec.model.iter()).args(["--port", "0", "--spread", "--nodes", &spec.names.len().to_string()]);
        for (flag, value) in [("--context", spec.context), ("--parallel", spec.parallel)] {
            if let Some(value) = value {
                serve.args([flag, &value.to_string()]);
            }
        }
        if !spec.layers.is_empty() {
            let layers: Vec<String> = spec.layers.iter().map(u32::to_string).collect();
            // Nothing is left to be decided, so nothing need be measured.
            serve.args(["--layers", &layers.join(","), "--optimize", "memory"]);
        }
        let lines = processes.start(&spec.names[0], serve)?;
        // Printed once the ticket is in its file.
        lines.wait_for("its address", OPEN_TIMEOUT, |line| line.starts_with("serving ").then_some(()))?;
        for k in 1..spec.names.len() {
            let mut join = node(brigade, "join", k, state_dir, &ticket, spec);
            if let Some(model) = &spec.model {
                join.arg("--model").arg(model);
            }
            processes.start(&spec.names[k], join)?;
        }
        let url = |line: &str| line.strip_prefix("ready ").map(str::to_owned);
        let url = lines.wait_for("the line `ready URL`", READY_TIMEOUT, url)?;
        Ok(Self { endpoint: Endpoint::new(&url), startup: started.elapsed() })
    }

    /// The status, once it tells of the work of all stages.
    pub fn measured_status(&self) -> Outcome<Value> {
        let deadline = Instant::now() + STATUS_TIMEOUT;
        loop {
            let status = self.endpoint.status()?;
            let is_measured = |node: &Value| node["layers"].is_null() || node["pass_ms"].as_f64() > Some(0.0);
            if nodes(&status).iter().all(is_measured) || Instant::now() > deadline {
                return Ok(status);
            }
            std::thread::sleep(STATUS_POLL);
        }
    }
}

/// The nodes of a status.
pub fn nodes(status: &Value) -> &[Value] {
    status["nodes"].as_array().map_or(&[], Vec::as_slice)
}

fn node(brigade: &Path, verb: &str, k: usize, state_dir: &Path, ticket: &Path, spec: &ClusterSpec) -> Command {
    let name = &spec.names[k];
    let mut command = without_settings(on_cores(brigade, spec.pin.then_some((k, spec.threads))));
    command.arg(verb).args(["--name", name, "--listen", "127.0.0.1:0", "--threads", &spec.threads.to_string()]);
    command.arg("--state-dir").arg(state_dir.join(name)).arg("--ticket-file").arg(ticket);
    command
}

/// The command without what is set for a real node in the environment; its filter of log lines stays.
pub fn without_settings(mut command: Command) -> Command {
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("BRIGADE_") && key != "BRIGADE_LOG" {
            command.env_remove(key);
        }
    }
    command
}

/// A command for `program`, pinned to the `k`-th group of so many cores if told so.
pub fn on_cores(program: &Path, pin: Option<(usize, u32)>) -> Command {
    let Some((k, threads)) = pin else { return Command::new(program) };
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let width = (threads as usize).clamp(1, n_cores);
    let first = (k * width) % n_cores;
    let cores: Vec<String> = (first..first + width).map(|core| (core % n_cores).to_string()).collect();
    let mut command = Command::new("taskset");
    command.args(["-c", &cores.join(",")]).arg(program);
    command
}

/// The `brigade` program beside this one, built first where Cargo runs this.
pub fn brigade() -> Outcome<PathBuf> {
    let dir = profile_dir()?;
    let path = dir.join(format!("brigade{}", std::env::consts::EXE_SUFFIX));
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut build = Command::new(cargo);
        build.args(["build", "--quiet", "--package", "brigade"]).current_dir(crate::root());
        match dir.file_name().and_then(|name| name.to_str()) {
            None | Some("debug") => &mut build,
            Some(profile) => build.args(["--profile", profile]),
        };
        // Variables of the package that Cargo runs would make build scripts run again.
        for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("CARGO_PKG_")) {
            build.env_remove(key);
        }
        let status = build.status().map_err(Failure::io("cargo build"))?;
        if !status.success() {
            return Err(Failure::said("brigade could not be built"));
        }
    }
    if !path.is_file() {
        return Err(Failure::said(format!(
            "{} is missing; build it with `cargo build --release -p brigade`",
            path.display()
        )));
    }
    Ok(path)
}

/// Where this program lies: `release` or another profile in the target directory.
pub fn profile_dir() -> Outcome<PathBuf> {
    let program = std::env::current_exe().map_err(Failure::io("the path of this program"))?;
    let dir = program.parent().unwrap_or(Path::new("."));
    // Test programs lie one deeper.
    let dir = if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir };
    Ok(dir.to_owned())
}

/// The layers of a node in a status, for people.
pub fn layers(node: &Value) -> String {
    match &node["layers"] {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(ends) => ends.iter().map(Value::to_string).collect::<Vec<_>>().join(".."),
        other => format!("{}..{}", other["start"], other["end"]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pinned_programs_get_cores_that_exist() {
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        for (k, threads) in [(0, 1), (1, 1), (7, 3), (1, 600)] {
            let command = on_cores(Path::new("brigade"), Some((k, threads)));
            let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
            let cores: Vec<usize> = args[1].split(',').map(|core| core.parse().unwrap()).collect();
            assert_eq!(cores.len(), (threads as usize).min(n_cores));
            assert!(cores.iter().all(|core| *core < n_cores), "{cores:?}");
        }
    }

    #[test]
    fn layers_are_shown_however_they_are_written() {
        for (value, shown) in [(json!([0, 3]), "0..3"), (json!("0..3"), "0..3"), (json!(null), "-")] {
            assert_eq!(layers(&json!({ "layers": value })), shown);
        }
        assert_eq!(layers(&json!({"layers": {"start": 1, "end": 2}})), "1..2");
    }
}
