//! Clusters of real `brigade` processes on loopback, and what tests ask of them.
//!
//! - [`Setup`] says how many nodes and with which flags; [`Cluster`] owns their processes and state directories.
//! - [`Process`] is one of them: dropping it ends it, and if the test has failed shows what it said.
//! - [`http`] talks to the endpoint, [`metrics`] reads what it counts, [`oracle`] knows the right answers.
//! - [`fake`] is a server that is none, [`proxy`] a network that can be broken.
//!
//! Nothing here waits for a fixed time: [`eventually`] polls a condition until a deadline.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

pub mod encoder;
pub mod fake;
pub mod http;
pub mod metrics;
pub mod oracle;
mod process;
pub mod proxy;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use brigade_net::{Address, Ticket};
use serde_json::{Value, json};
use tempfile::TempDir;

pub use http::{Endpoint, Event, Reply, Stream};
pub use metrics::Metrics;
pub use process::{Ended, Process, run, run_with_input};
pub use proxy::Proxy;

/// How long a condition may take on a machine that is busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(10);

/// The model inside the program, as a file.
pub fn abacus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-f16.gguf")
}

/// The same model with weights of eight bits.
pub fn quantised_abacus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-q8_0.gguf")
}

/// Waits until `check` yields something; fails after [`PATIENCE`].
#[track_caller]
pub fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not come about");
        std::thread::sleep(POLL);
    }
}

/// How to start a cluster.
#[derive(Clone)]
pub struct Setup {
    n_nodes: usize,
    layers: Option<String>,
    serve: Vec<String>,
    join: Vec<String>,
    key: Option<String>,
    is_cuttable: bool,
}

impl Setup {
    /// `n_nodes`, the coordinator counted, that share the layers of abacus evenly.
    pub fn of(n_nodes: usize) -> Self {
        Self { n_nodes, layers: None, serve: Vec::new(), join: Vec::new(), key: None, is_cuttable: false }
    }

    /// Pins the split instead.
    pub fn layers(mut self, layers: &str) -> Self {
        self.layers = Some(layers.to_owned());
        self
    }

    /// Sessions at once.
    pub fn parallel(self, n: u32) -> Self {
        self.serve(&["--parallel", &n.to_string()])
    }

    /// Tokens of a session.
    pub fn context(self, n: u32) -> Self {
        self.serve(&["--context", &n.to_string()])
    }

    /// Memory that the coordinator gives.
    pub fn memory(self, size: &str) -> Self {
        self.serve(&["--memory", size])
    }

    /// A key that the endpoint wants.
    pub fn key(mut self, key: &str) -> Self {
        self.key = Some(key.to_owned());
        self.serve(&["--api-key", key])
    }

    /// Further arguments of `brigade serve`.
    pub fn serve(mut self, args: &[&str]) -> Self {
        self.serve.extend(args.iter().map(ToString::to_string));
        self
    }

    /// Further arguments of `brigade join`.
    pub fn join(mut self, args: &[&str]) -> Self {
        self.join.extend(args.iter().map(ToString::to_string));
        self
    }

    /// Disk for idle sessions, on all nodes.
    pub fn kv_spill(self, size: &str) -> Self {
        self.serve(&["--kv-spill", size]).join(&["--kv-spill", size])
    }

    /// A second holder of each worker's layers.
    pub fn redundant(self) -> Self {
        self.serve(&["--redundancy", "2"])
    }

    /// Links of workers that can be broken: see [`Cluster::links_of`].
    pub fn cuttable(mut self) -> Self {
        self.is_cuttable = true;
        self
    }

    /// Starts the coordinator alone, which need not become ready.
    pub fn start_coordinator(self) -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let coordinator = serve(&self, dir.path(), "127.0.0.1:0");
        let endpoint = Endpoint::new(&url(&coordinator), self.key.clone());
        let links = links(&coordinator);
        Cluster { coordinator, workers: Vec::new(), endpoint, links, proxies: Vec::new(), setup: self, dir }
    }

    /// Starts all nodes and waits until the model is ready.
    pub fn start(self) -> Cluster {
        let mut cluster = self.start_coordinator();
        for _ in 1..cluster.setup.n_nodes {
            cluster.join();
        }
        cluster.wait_ready();
        cluster
    }
}

fn serve(setup: &Setup, dir: &Path, listen: &str) -> Process {
    let n_nodes = setup.n_nodes.to_string();
    let (state, ticket) = (dir.join("a"), dir.join("ticket"));
    let mut args = vec!["serve", "--state-dir", state.to_str().unwrap(), "--name", "a", "--threads", "1"];
    args.extend(["--port", "0", "--listen", listen, "--nodes", &n_nodes, "--ticket-file", ticket.to_str().unwrap()]);
    match &setup.layers {
        Some(layers) => args.extend(["--layers", layers]),
        None => args.push("--spread"),
    }
    args.extend(setup.serve.iter().map(String::as_str));
    Process::spawn("a", dir, &args)
}

fn url(coordinator: &Process) -> String {
    coordinator.line("serving ").trim_end_matches("/v1").to_owned()
}

fn links(coordinator: &Process) -> SocketAddr {
    coordinator.line("links ").trim().parse().unwrap()
}

/// Proxies that a worker's links go through.
pub struct Links {
    /// In front of the worker, at an address that is this worker's alone.
    pub inbound: Proxy,
    /// In front of the coordinator. It dials from that address, so that others look for the worker there.
    pub outbound: Proxy,
    /// Where the worker listens.
    listen: SocketAddr,
    /// Where it finds the coordinator.
    coordinator: SocketAddr,
}

impl Links {
    /// Of worker `i`, to a coordinator.
    fn of(i: usize, coordinator: SocketAddr) -> Self {
        let ip = Ipv4Addr::new(127, 0, 1, u8::try_from(i + 1).unwrap());
        let [front, back] = [ip, Ipv4Addr::LOCALHOST].map(|ip| TcpListener::bind((ip, 0)).unwrap());
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, front.local_addr().unwrap().port()));
        let through = back.local_addr().unwrap();
        let inbound = Proxy::new(move || proxy::dial(listen, None));
        let outbound = Proxy::new(move || proxy::dial(coordinator, Some(ip.into())));
        inbound.listen(front).unwrap();
        outbound.listen(back).unwrap();
        Self { inbound, outbound, listen, coordinator: through }
    }
}

/// A coordinator `a` and its workers `w0`, `w1`, ...
pub struct Cluster {
    pub coordinator: Process,
    pub workers: Vec<Process>,
    pub endpoint: Endpoint,
    /// Where the coordinator takes links.
    pub links: SocketAddr,
    proxies: Vec<Links>,
    setup: Setup,
    dir: TempDir,
}

impl Cluster {
    /// A ready cluster of `n_nodes` that share the layers evenly.
    pub fn of(n_nodes: usize) -> Self {
        Setup::of(n_nodes).start()
    }

    /// The endpoint's URL, without a path.
    pub fn url(&self) -> &str {
        &self.endpoint.url
    }

    /// Where a node keeps its state: `a`, `w0`, ...
    pub fn state_dir(&self, node: &str) -> PathBuf {
        self.dir.path().join(node)
    }

    /// A directory for what a test writes itself.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// The ticket that the coordinator wrote.
    pub fn ticket(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("ticket")).unwrap().trim().to_owned()
    }

    /// Another worker, which comes with the ticket; its number.
    pub fn join(&mut self) -> usize {
        self.join_with(&[])
    }

    /// Another worker with further arguments; its number.
    pub fn join_with(&mut self, args: &[&str]) -> usize {
        let i = self.workers.len();
        let mut ticket = self.dir.path().join("ticket");
        if self.setup.is_cuttable {
            let links = Links::of(i, self.links);
            let addrs = vec![Address::from(links.coordinator)];
            let text = Ticket { addrs, ..self.ticket().parse().unwrap() }.to_string();
            ticket = self.dir.path().join(format!("w{i}.ticket"));
            std::fs::write(&ticket, text).unwrap();
            self.proxies.push(links);
        }
        let process = self.worker(i, &[&["--ticket-file", ticket.to_str().unwrap()], args].concat());
        self.workers.push(process);
        i
    }

    /// Starts worker `i` again in its state directory, without a ticket.
    pub fn restart_worker(&mut self, i: usize) {
        self.workers[i] = self.worker(i, &[]);
    }

    /// Starts the coordinator again in its state directory and at its link address.
    pub fn restart_coordinator(&mut self) {
        self.coordinator = serve(&self.setup, self.dir.path(), &self.links.to_string());
        self.endpoint = Endpoint::new(&url(&self.coordinator), self.setup.key.clone());
    }

    fn worker(&self, i: usize, args: &[&str]) -> Process {
        let name = format!("w{i}");
        let state = self.state_dir(&name);
        let own = ["join", "--state-dir", state.to_str().unwrap(), "--name", &name, "--threads", "1"];
        let listen = self.proxies.get(i).map_or("127.0.0.1:0".to_owned(), |links| links.listen.to_string());
        let listen = ["--listen", &listen];
        let further: Vec<&str> = self.setup.join.iter().map(String::as_str).collect();
        Process::spawn(&name, self.dir.path(), &[&own[..], &listen, &further, args].concat())
    }

    /// The links of worker `i`, where they can be broken.
    pub fn links_of(&self, i: usize) -> &Links {
        &self.proxies[i]
    }

    /// Asks worker `i` to leave, and waits until it has.
    #[track_caller]
    pub fn leave(&mut self, i: usize) {
        let state = self.state_dir(&format!("w{i}"));
        run(&["leave", "--state-dir", state.to_str().unwrap()]).ok();
        assert_eq!(self.workers[i].wait().code(), Some(0));
        assert_eq!(self.workers[i].stderr(), "");
    }

    /// Ends worker `i` without a goodbye.
    pub fn kill_worker(&mut self, i: usize) {
        self.workers[i].kill();
    }

    /// The status as the endpoint tells it.
    pub fn status(&self) -> Value {
        self.endpoint.get("/brigade/v1/status").ok()
    }

    /// What the endpoint counts.
    pub fn metrics(&self) -> Metrics {
        let reply = self.endpoint.get("/metrics");
        assert_eq!(reply.status, 200);
        Metrics::parse(&reply.text)
    }

    /// What the endpoint knows of a request.
    pub fn trace(&self, id: &str) -> Value {
        self.endpoint.get(&format!("/debug/requests/{id}")).ok()
    }

    /// What the endpoint knows of a request that has been answered: its caller hears the end a moment before.
    #[track_caller]
    pub fn trace_of_done(&self, id: &str) -> Value {
        eventually("the end of a request", || Some(self.trace(id)).filter(|trace| trace["state"] == "done"))
    }

    /// Waits until no request runs or waits.
    #[track_caller]
    pub fn wait_idle(&self) {
        eventually("rest", || {
            let status = self.status();
            (status["running"] == 0 && status["waiting"] == 0).then_some(())
        });
    }

    /// Name and layers of every node that has a stage, in ring order.
    pub fn placement(&self) -> Vec<(String, [u64; 2])> {
        let status = self.status();
        let stage = |node: &Value| {
            let layers = node["layers"].as_array()?;
            Some((
                node["name"].as_str().unwrap().to_owned(),
                [layers[0].as_u64().unwrap(), layers[1].as_u64().unwrap()],
            ))
        };
        status["nodes"].as_array().unwrap().iter().filter_map(stage).collect()
    }

    /// What the endpoint says of itself: `ready`, `recovering` or `not_ready`.
    pub fn readiness(&self) -> String {
        self.endpoint.get("/ready").body["status"].as_str().unwrap().to_owned()
    }

    /// Waits until requests are answered.
    #[track_caller]
    pub fn wait_ready(&self) {
        eventually("readiness", || (self.readiness() == "ready").then_some(()));
    }

    /// A node as the status shows it, if it does.
    pub fn node(&self, name: &str) -> Option<Value> {
        self.status()["nodes"].as_array().unwrap().iter().find(|node| node["name"] == name).cloned()
    }

    /// Waits until a worker is here and has no layers.
    #[track_caller]
    pub fn wait_spare(&self, name: &str) {
        eventually(&format!("{name} as a spare one"), || {
            let node = self.node(name)?;
            (node["connected"] == true && node["state"] == "idle" && node["layers"].is_null()).then_some(())
        });
    }

    /// Waits until the endpoint says that it is not ready for a reason with these words.
    #[track_caller]
    pub fn wait_not_ready(&self, words: &str) {
        eventually(&format!("being not ready because of {words:?}"), || {
            let reply = self.endpoint.get("/ready");
            let reason = reply.body["reason"].as_str().unwrap_or("");
            (reply.status == 503 && reason.contains(words)).then_some(())
        });
    }

    /// Waits until the model is ready on exactly these nodes, in any order.
    #[track_caller]
    pub fn wait_placed_on(&self, nodes: &[&str]) {
        eventually(&format!("a placement on {nodes:?}"), || {
            let mut found: Vec<String> = self.placement().into_iter().map(|(name, _)| name).collect();
            found.sort();
            (found == nodes && self.readiness() == "ready").then_some(())
        });
    }

    /// The reply to `POST /v1/completions`.
    #[track_caller]
    pub fn complete(&self, body: &Value) -> Value {
        self.endpoint.post("/v1/completions", body).ok()
    }

    /// The greedy answer to a prompt.
    #[track_caller]
    pub fn chat(&self, prompt: &str) -> String {
        let reply = self.endpoint.post("/v1/chat/completions", &chat_body(prompt)).ok();
        reply["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    }

    /// Starts a streamed answer.
    #[track_caller]
    pub fn stream(&self, path: &str, body: &Value) -> Stream {
        self.endpoint.stream(path, body)
    }

    /// Asks one thing and compares with the oracle.
    #[track_caller]
    pub fn check_answer(&self) {
        let prompt = "What is 17 + 25?";
        assert_eq!(self.chat(prompt), oracle::oracle().chat(prompt).text);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // All at once, so that none waits for another; each process is then waited for by its own drop.
        self.coordinator.signal("TERM");
        self.workers.iter_mut().for_each(|worker| worker.signal("TERM"));
    }
}

/// Most tokens of an answer that tests ask for; longer than any right one.
pub const MAX_ANSWER: u32 = 64;

/// The body of a greedy chat.
pub fn chat_body(prompt: &str) -> Value {
    json!({
        "model": "default",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": MAX_ANSWER,
    })
}

/// The body of a greedy completion that goes on for exactly `n` tokens.
pub fn endless_body(prompt: &[brigade_base::Token], n: u32) -> Value {
    json!({"prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": true})
}
