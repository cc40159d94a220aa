//! The nodes that faults befall: a coordinator, workers, and a spare one.
//!
//! Each worker is in a [`Network`] of its own, from which only proxies lead to the others: one in front of the
//! coordinator at the address that the coordinator has outside, and for each other worker one at that worker's. The
//! coordinator sees a worker at an address of 127.0.1.0/24, since the worker's proxy dials from there, and tells others
//! to find it at that address. So every link of a worker can be cut, and there is no way around.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use super::asks::CONTEXT;
use super::faults::{Fault, Kind, Links};
use super::network::Network;
use super::proxy::{Proxy, dial};
use crate::cluster::{nodes, without_settings};
use crate::failure::{Failure, Outcome};
use crate::http::Endpoint;
use crate::processes::{Lines, Processes};

/// How long a coordinator may take to open the model, and then to place it and send a token around.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long leaving may take: the program gives up before.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(90);

/// A worker's disk: its cached weights and its images of idle sessions fit, with as much to spare.
const DISK_BYTES: u64 = 128 << 20;

/// Disk that each node gives for idle sessions.
const KV_SPILL: &str = "32MiB";

/// The coordinator.
const COORDINATOR: &str = "coordinator";

/// The file that fills a disk.
const FILLER: &str = "filler";

/// What to start.
pub struct NodesSpec<'a> {
    /// The program.
    pub brigade: &'a Path,
    /// The model.
    pub model: &'a Path,
    /// Workers that have a stage.
    pub workers: usize,
    /// Workers that come later and have none.
    pub spares: usize,
    /// Requests at once.
    pub streams: u32,
    /// Holders of each stage.
    pub redundancy: u32,
    /// Whether those that stand by compute along.
    pub shadow: bool,
    /// Which computed tokens later answers may use.
    pub prefix_cache: &'a str,
}

/// All nodes.
pub struct Nodes<'a> {
    processes: &'a Processes,
    brigade: &'a Path,
    /// Where requests go.
    pub endpoint: Endpoint,
    redundancy: u32,
    workers: Vec<Node>,
}

/// A worker and its links.
struct Node {
    name: String,
    state_dir: PathBuf,
    ticket: PathBuf,
    listen: SocketAddr,
    links: Option<CutLinks>,
    has_disk: bool,
}

/// Links that can be cut.
struct CutLinks {
    network: Network,
    /// Where others find the worker.
    seen_as: SocketAddr,
    /// In front of the worker.
    inbound: Proxy,
    /// In front of the coordinator.
    outbound: Proxy,
}

impl<'a> Nodes<'a> {
    /// Starts all nodes and waits until they answer.
    pub fn start(processes: &'a Processes, spec: &NodesSpec<'a>) -> Outcome<Self> {
        let dir = processes.dir().join("nodes");
        fs::create_dir_all(&dir).map_err(Failure::io(dir.display()))?;
        let ticket_file = dir.join("ticket");
        let lines = processes.start(COORDINATOR, serve(spec, &dir, &ticket_file))?;
        let address = |line: &str| line.strip_prefix("links ")?.split_whitespace().next()?.parse().ok();
        let links: SocketAddr = lines.wait_for("its address", START_TIMEOUT, address)?;
        let url = |line: &str| line.strip_prefix("serving ").map(str::to_owned);
        let url = lines.wait_for("its endpoint", START_TIMEOUT, url)?;
        let node = |k| Node::prepare(processes, &dir, k, links, &ticket_file);
        let workers = (0..spec.workers + spec.spares).map(node).collect::<Outcome<Vec<_>>>()?;
        introduce(&workers).map_err(Failure::io("the links between workers"))?;
        let endpoint = Endpoint::new(&url);
        let nodes = Self { processes, brigade: spec.brigade, endpoint, redundancy: spec.redundancy, workers };
        for worker in &nodes.workers[..spec.workers] {
            nodes.join(worker)?;
        }
        wait_ready(&lines)?;
        for spare in &nodes.workers[spec.workers..] {
            nodes.join(spare)?;
        }
        Ok(nodes)
    }

    /// How many workers there are, spares counted.
    pub fn n_workers(&self) -> usize {
        self.workers.len()
    }

    /// The numbers of those that have a stage, by a status.
    pub fn serving(&self, status: &Value) -> Vec<usize> {
        let serves =
            |worker: &Node| nodes(status).iter().any(|node| node["name"] == worker.name && !node["layers"].is_null());
        (0..self.workers.len()).filter(|worker| serves(&self.workers[*worker])).collect()
    }

    /// Why a kind of fault cannot be brought about here.
    pub fn cannot(&self, kind: Kind) -> Option<&'static str> {
        let has_disks = self.workers.iter().all(|worker| worker.has_disk);
        let are_cuttable = self.workers.iter().all(|worker| worker.links.is_some());
        match kind {
            Kind::FullDisk if !has_disks => Some("only root may make the small disks that it takes"),
            Kind::Silence | Kind::Reset if !are_cuttable => Some("only root may make the networks that it takes"),
            _ => None,
        }
    }

    /// Names of the workers that a fault befalls.
    pub fn victims(&self, fault: &Fault) -> String {
        fault.victims.iter().map(|victim| &self.workers[*victim].name[..]).collect::<Vec<_>>().join(" and ")
    }

    /// Does it.
    pub fn strike(&self, fault: &Fault) -> Outcome {
        for worker in fault.victims.iter().map(|victim| &self.workers[*victim]) {
            match fault.kind {
                Kind::Nothing => {}
                Kind::Kill | Kind::KillTwo => drop(self.processes.kill(&worker.name)),
                Kind::Freeze => self.processes.signal(&worker.name, Signal::STOP)?,
                Kind::Silence => worker.proxies(Links::All).for_each(|proxy| proxy.set_silent(true)),
                Kind::Reset => worker.proxies(fault.links).for_each(Proxy::reset),
                Kind::FullDisk => fill(&worker.state_dir)?,
                Kind::Leave => self.leave(worker)?,
            }
        }
        Ok(())
    }

    /// Takes it back.
    pub fn mend(&self, fault: &Fault) -> Outcome {
        for worker in fault.victims.iter().map(|victim| &self.workers[*victim]) {
            match fault.kind {
                Kind::Nothing | Kind::Reset => {}
                Kind::Kill | Kind::KillTwo | Kind::Leave => self.join(worker)?,
                Kind::Freeze => self.processes.signal(&worker.name, Signal::CONT)?,
                Kind::Silence => worker.proxies(Links::All).for_each(|proxy| proxy.set_silent(false)),
                Kind::FullDisk => {
                    fs::remove_file(worker.state_dir.join(FILLER)).map_err(Failure::io("the full disk"))?;
                }
            }
        }
        Ok(())
    }

    /// Whether a status shows that a fault was noticed.
    pub fn shows(&self, status: &Value, fault: &Fault, epoch_before: &Value) -> bool {
        let is_gone = |victim: &usize| !is_here(status, &self.workers[*victim].name);
        status["epoch"] != *epoch_before || fault.victims.iter().any(is_gone)
    }

    /// Whether all nodes are here, the model is ready, and each worker's layers have a second holder, if they are to.
    pub fn are_whole(&self, status: &Value) -> bool {
        status["state"] == "ready"
            && self.workers.iter().all(|worker| is_here(status, &worker.name))
            && (self.redundancy < 2 || are_held_twice(status))
    }

    /// Resident memory of the coordinator that is its own, in bytes, and its open files.
    pub fn footprint(&self) -> Option<(u64, usize)> {
        let id = self.processes.id(COORDINATOR)?;
        let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
        let kib = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?.split_whitespace().next()?;
        let files = fs::read_dir(format!("/proc/{id}/fd")).ok()?.count();
        Some((kib.parse::<u64>().ok()? * 1024, files))
    }

    fn join(&self, worker: &Node) -> Outcome {
        let command = match &worker.links {
            Some(links) => links.network.command(self.brigade),
            None => Command::new(self.brigade),
        };
        let mut command = without_settings(command);
        command.args(["join", "--name", &worker.name, "--threads", "1", "--kv-spill", KV_SPILL]);
        command.args(["--listen", &worker.listen.to_string()]);
        command.arg("--state-dir").arg(&worker.state_dir).arg("--ticket-file").arg(&worker.ticket);
        self.processes.start(&worker.name, command).map(drop)
    }

    /// Asks a worker to leave, as its operator does, and waits until it has ended.
    fn leave(&self, worker: &Node) -> Outcome {
        let mut command = without_settings(Command::new(self.brigade));
        command.arg("leave").arg("--state-dir").arg(&worker.state_dir);
        let left = command.output().map_err(Failure::io("brigade leave"))?;
        if !left.status.success() {
            let words = String::from_utf8_lossy(&left.stderr).trim().to_owned();
            return Err(Failure::said(format!("{} cannot leave: {words}", worker.name)));
        }
        let status = self.processes.ended(&worker.name, LEAVE_TIMEOUT)?;
        if status.success() { Ok(()) } else { Err(Failure::said(format!("{} left with {status}", worker.name))) }
    }
}

fn serve(spec: &NodesSpec<'_>, dir: &Path, ticket_file: &Path) -> Command {
    let mut command = without_settings(Command::new(spec.brigade));
    command.arg("serve").arg(spec.model).arg("--state-dir").arg(dir.join(COORDINATOR));
    command.args(["--name", COORDINATOR, "--listen", "127.0.0.1:0", "--port", "0", "--threads", "1"]);
    // All processes share this machine, so that what one of them measures says nothing.
    command.args(["--optimize", "memory"]);
    command.args(["--spread", "--nodes", &(spec.workers + 1).to_string(), "--context", &CONTEXT.to_string()]);
    command.args([
        "--parallel",
        &spec.streams.to_string(),
        "--prefix-cache",
        spec.prefix_cache,
        "--kv-spill",
        KV_SPILL,
    ]);
    command.args(["--redundancy", &spec.redundancy.to_string()]).args(spec.shadow.then_some("--shadow"));
    command.arg("--ticket-file").arg(ticket_file);
    command
}

fn wait_ready(lines: &Lines) -> Outcome {
    lines.wait_for("the line `ready URL`", START_TIMEOUT, |line| line.starts_with("ready ").then_some(()))
}

impl Node {
    /// Makes what worker `k` needs: a disk, a network, and the proxies in it.
    fn prepare(processes: &Processes, dir: &Path, k: usize, coordinator: SocketAddr, ticket: &Path) -> Outcome<Self> {
        let name = format!("worker-{}", k + 1);
        let (state_dir, ticket) = (dir.join(&name), ticket.to_owned());
        let has_disk = processes.small_disk(&state_dir, DISK_BYTES);
        let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let Some(network) = Network::make(processes, &format!("network-{}", k + 1)) else {
            return Ok(Self { name, state_dir, ticket, listen: loopback(0), links: None, has_disk });
        };
        let links = CutLinks::make(network, Ipv4Addr::new(127, 0, 1, k as u8 + 1), coordinator);
        let links = links.map_err(Failure::io(format!("the links of {name}")))?;
        Ok(Self { name, state_dir, ticket, listen: loopback(links.seen_as.port()), links: Some(links), has_disk })
    }

    fn proxies(&self, which: Links) -> impl Iterator<Item = &Proxy> {
        let inbound = self.links.iter().filter(move |_| which != Links::Outbound).map(|links| &links.inbound);
        let outbound = self.links.iter().filter(move |_| which != Links::Inbound).map(|links| &links.outbound);
        inbound.chain(outbound)
    }
}

impl CutLinks {
    /// Of a worker in `network` that others are to find at `ip`.
    fn make(network: Network, ip: Ipv4Addr, coordinator: SocketAddr) -> io::Result<Self> {
        let front = TcpListener::bind((ip, 0))?;
        let seen_as = front.local_addr()?;
        let behind = SocketAddr::from((Ipv4Addr::LOCALHOST, seen_as.port()));
        let inside = network.clone();
        let inbound = Proxy::new(move || inside.enter().and_then(|()| dial(behind, None)));
        inbound.listen(front)?;
        let outbound = Proxy::new(move || dial(coordinator, Some(ip.into())));
        outbound.listen(network.listen(coordinator)?)?;
        Ok(Self { network, seen_as, inbound, outbound })
    }
}

/// Lets workers find each other: in the network of each there is a way to all others.
fn introduce(workers: &[Node]) -> io::Result<()> {
    for links in workers.iter().filter_map(|worker| worker.links.as_ref()) {
        let others = workers.iter().filter_map(|other| other.links.as_ref());
        for other in others.filter(|other| other.seen_as != links.seen_as) {
            links.inbound.listen(other.network.listen(links.seen_as)?)?;
        }
    }
    Ok(())
}

/// Whether the coordinator counts on a worker.
fn is_here(status: &Value, name: &str) -> bool {
    let is_here = |node: &Value| node["connected"] == true && node["state"] != "loading" && node["state"] != "leaving";
    nodes(status).iter().any(|node| node["name"] == name && is_here(node))
}

/// Whether some node stands by for each layer of the workers.
fn are_held_twice(status: &Value) -> bool {
    let layers_of = |value: &Value| Some(value[0].as_u64()?..value[1].as_u64()?);
    let stands_by = |node: &Value, layer| {
        let standby = node["standby"].as_array().map_or(&[][..], Vec::as_slice);
        standby.iter().filter_map(layers_of).any(|layers| layers.contains(&layer))
    };
    let is_held_twice = |layer| nodes(status).iter().any(|other| stands_by(other, layer));
    let workers = nodes(status).iter().filter(|node| node["role"] != "coordinator");
    workers.filter_map(|node| layers_of(&node["layers"])).flatten().all(is_held_twice)
}

/// Writes to a disk until there is no room.
fn fill(dir: &Path) -> Outcome {
    let failed = |error| Failure::Io { what: "the disk that was to be full".to_owned(), source: error };
    let mut file = File::create(dir.join(FILLER)).map_err(failed)?;
    loop {
        match file.write_all(&[0; 64 << 10]) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(name: &str, state: &str, layers: Value, standby: Value) -> Value {
        json!({"name": name, "role": "worker", "connected": true, "state": state, "layers": layers, "standby": standby})
    }

    #[test]
    fn a_worker_is_here_once_it_holds_what_it_is_to_hold() {
        let status = |state: &str| json!({"nodes": [node("w", state, json!([0, 4]), json!([]))]});
        for (state, expected) in [("ready", true), ("idle", true), ("loading", false), ("leaving", false)] {
            assert_eq!(is_here(&status(state), "w"), expected, "{state}");
        }
        assert!(!is_here(&status("ready"), "v"));
        let mut gone = status("ready");
        gone["nodes"][0]["connected"] = false.into();
        assert!(!is_here(&gone, "w"));
    }

    #[test]
    fn layers_are_held_twice_if_others_stand_by_for_all_of_them() {
        let check = |standby: Value, expected: bool| {
            let coordinator = json!({"name": "c", "role": "coordinator", "layers": [6, 8]});
            let nodes = [
                node("v", "ready", json!([0, 3]), standby),
                node("w", "ready", json!([3, 6]), json!([[0, 3]])),
                node("idle", "idle", json!(null), json!([])),
                coordinator,
            ];
            assert_eq!(are_held_twice(&json!({ "nodes": nodes })), expected);
        };
        check(json!([[3, 6]]), true);
        check(json!([[3, 5], [5, 6]]), true);
        check(json!([[3, 5]]), false);
        check(json!([]), false);
    }
}
