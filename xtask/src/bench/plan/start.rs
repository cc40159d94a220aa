//! Starts a cluster as its operator would, one node after the other.
//!
//! Nodes measure themselves when they start. On one machine they would slow each other down doing so, so each is
//! started when those before have come to rest: when all processes together have hardly used a core for a while.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use brigade_base::ByteSize;

use super::clusters::ClusterPlan;
use super::net::Net;
use crate::bench::scheduler::cpu_time;
use crate::cluster::{nodes, without_settings};
use crate::failure::{Failure, Outcome};
use crate::http::Endpoint;
use crate::processes::{Lines, Processes};

/// Tokens of a session: a prediction's prompt of 512 tokens, and as many again.
pub const CONTEXT: u32 = 1024;

/// Sessions at once.
pub const STREAMS: u32 = 8;

/// How long a coordinator may take to open its model, and then to place and load it.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a node may measure: some times its own bound of five seconds, throttled.
const REST_TIMEOUT: Duration = Duration::from_secs(60);

/// Over so long a time processes must be at rest: some pauses of a throttled node, and some heartbeats.
const REST: Duration = Duration::from_millis(700);

/// The share of a core that processes at rest use at most; the kernel counts in hundredths of a second.
const REST_SHARE: f64 = 0.05;

/// What to start.
pub struct Start<'a> {
    /// The program.
    pub brigade: &'a Path,
    /// The model, of which each node has a copy.
    pub model: &'a Path,
    /// Its nodes and links.
    pub plan: &'a ClusterPlan,
    /// How layers are placed.
    pub placement: Placement,
    /// Becomes the parent of the nodes' directories.
    pub dir: PathBuf,
    /// Where each node finds what it measured before: the directory of an earlier start, and its nodes' numbers there.
    pub measured: Option<(PathBuf, Vec<usize>)>,
}

/// How layers are placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// By what was measured.
    Measured,
    /// By memory.
    Memory,
    /// As it is said here, the coordinator's last.
    Layers(Vec<u32>),
}

/// A cluster that answers.
pub struct Running {
    /// The coordinator's endpoint.
    pub endpoint: Endpoint,
    /// The links, where they are shaped.
    _net: Option<Net>,
}

impl Start<'_> {
    /// Starts the processes and waits until the cluster answers and rests.
    pub fn run(&self, processes: &Processes) -> Outcome<Running> {
        for k in 0..self.plan.nodes.len() {
            self.remember(k)?;
        }
        let lines = processes.start(&ClusterPlan::name_of(0), self.serve())?;
        let (links, url) = addresses(&lines)?;
        let endpoint = Endpoint::new(&url);
        let net = if self.plan.is_shaped() { Some(Net::make(processes, self.plan, links)?) } else { None };
        for k in 1..self.plan.nodes.len() {
            self.rest(processes)?;
            processes.start(&ClusterPlan::name_of(k), self.join(k, net.as_ref()))?;
            let deadline = Instant::now() + REST_TIMEOUT;
            while nodes(&endpoint.status()?).len() <= k {
                if let Some(reason) = processes.failed() {
                    return Err(Failure::said(reason));
                }
                if Instant::now() > deadline {
                    return Err(Failure::said(format!("{} has not joined", ClusterPlan::name_of(k))));
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        lines.wait_for("the line `ready URL`", START_TIMEOUT, |line| line.starts_with("ready ").then_some(()))?;
        self.rest(processes)?;
        Ok(Running { endpoint, _net: net })
    }

    /// The directory of node `k`.
    fn state_dir(&self, k: usize) -> PathBuf {
        self.dir.join(ClusterPlan::name_of(k))
    }

    /// Gives node `k` what it measured of itself in an earlier start.
    fn remember(&self, k: usize) -> Outcome {
        let Some((dir, numbers)) = &self.measured else { return Ok(()) };
        let (from, to) =
            (dir.join(ClusterPlan::name_of(numbers[k])).join("profiles"), self.state_dir(k).join("profiles"));
        // A node that has measured nothing yet has no such directory.
        let Ok(files) = std::fs::read_dir(&from) else { return Ok(()) };
        std::fs::create_dir_all(&to).map_err(Failure::io(to.display()))?;
        for file in files.flatten() {
            std::fs::copy(file.path(), to.join(file.file_name())).map_err(Failure::io(to.display()))?;
        }
        Ok(())
    }

    fn serve(&self) -> Command {
        let mut command = self.node("serve", 0, without_settings(Command::new(self.brigade)));
        command.arg(self.model).args(["--listen", "127.0.0.1:0", "--port", "0"]);
        command.args(["--context", &CONTEXT.to_string(), "--parallel", &STREAMS.to_string()]);
        command.args(["--nodes", &self.plan.nodes.len().to_string()]);
        match &self.placement {
            Placement::Measured => {}
            Placement::Memory => drop(command.args(["--optimize", "memory"])),
            Placement::Layers(layers) => {
                let layers: Vec<String> = layers.iter().map(u32::to_string).collect();
                command.args(["--layers", &layers.join(",")]);
            }
        }
        command
    }

    fn join(&self, k: usize, net: Option<&Net>) -> Command {
        let (command, listen) = match net {
            Some(net) => (net.command(k, self.brigade), net.listen(k).to_string()),
            None => (Command::new(self.brigade), "127.0.0.1:0".to_owned()),
        };
        let mut command = self.node("join", k, without_settings(command));
        command.args(["--listen", &listen]).arg("--model").arg(self.model);
        command
    }

    fn node(&self, verb: &str, k: usize, mut command: Command) -> Command {
        let node = self.plan.nodes[k];
        command.args([verb, "--name", &ClusterPlan::name_of(k), "--threads", "1"]);
        command.args(["--throttle", &node.throttle.to_string(), "--memory", &node.memory.0.to_string()]);
        command.arg("--state-dir").arg(self.state_dir(k)).arg("--ticket-file").arg(self.dir.join("ticket"));
        command
    }

    /// Waits until all nodes have come to rest.
    fn rest(&self, processes: &Processes) -> Outcome {
        let ids = (0..self.plan.nodes.len()).filter_map(|k| processes.id(&ClusterPlan::name_of(k)));
        let ids: Vec<u32> = ids.collect();
        let used = || ids.iter().map(|id| cpu_time(Some(*id))).sum::<Outcome<f64>>();
        let deadline = Instant::now() + REST_TIMEOUT;
        let mut before = used()?;
        while Instant::now() < deadline {
            std::thread::sleep(REST);
            let now = used()?;
            if now - before <= REST.as_secs_f64() * REST_SHARE {
                return Ok(());
            }
            before = now;
        }
        Err(Failure::said(format!("the nodes still compute after {REST_TIMEOUT:?} in which nobody asked anything")))
    }
}

/// Where a coordinator takes in links, and its endpoint; the latter is said once the ticket is in its file.
fn addresses(lines: &Lines) -> Outcome<(SocketAddr, String)> {
    let links = |line: &str| line.strip_prefix("links ")?.split_whitespace().next()?.parse().ok();
    let links = lines.wait_for("its address", START_TIMEOUT, links)?;
    let url = |line: &str| line.strip_prefix("serving ").map(str::to_owned);
    Ok((links, lines.wait_for("its endpoint", START_TIMEOUT, url)?))
}

/// Whether the cluster could hold this split at all, as `brigade plan` says.
pub fn is_legal(brigade: &Path, model: &Path, plan: &ClusterPlan, layers: &[u32]) -> Outcome<bool> {
    let mut command = without_settings(Command::new(brigade));
    command.arg("plan").arg(model).args(["--context", &CONTEXT.to_string(), "--parallel", &STREAMS.to_string()]);
    let layers: Vec<String> = layers.iter().map(u32::to_string).collect();
    command.args(["--layers", &layers.join(",")]);
    // The coordinator is the last one there.
    for k in (1..plan.nodes.len()).chain([0]) {
        let ByteSize(memory) = plan.nodes[k].memory;
        command.args(["--node", &format!("{}={memory}", ClusterPlan::name_of(k))]);
    }
    Ok(command.output().map_err(Failure::io("brigade plan"))?.status.success())
}
