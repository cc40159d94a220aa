//! Weights that come from several nodes: each byte once where that is enough, and all of them right whoever ends or
//! lies.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[allow(dead_code, reason = "a part of what it can do is needed")]
#[path = "../../store/tests/support/server.rs"]
mod hub;
mod support;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use hub::Server;
use serde_json::Value;
use support::{Cluster, Setup, abacus, eventually, run};

/// Bytes of a node's weights by where they came from, as its status says.
fn weights(cluster: &Cluster, node: &str, key: &str) -> u64 {
    cluster.node(node).unwrap()["weights"][key].as_u64().unwrap()
}

/// Waits until the status has heard of all that nodes have fetched, which is as much as their caches hold.
fn check_tally(cluster: &Cluster, node: &str) {
    eventually(&format!("the tally of {node}"), || {
        let fetched = weights(cluster, node, "coordinator") + weights(cluster, node, "workers");
        (fetched == n_cached(cluster, node)).then_some(())
    });
}

fn cached(cluster: &Cluster, node: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(cluster.state_dir(node).join("cache")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn n_cached(cluster: &Cluster, node: &str) -> u64 {
    // A file that was still being written may have got another name meanwhile.
    cached(cluster, node).iter().filter_map(|path| Some(std::fs::metadata(path).ok()?.len())).sum()
}

/// Every tensor of a node's cache has the hash that it is named by.
fn check_cache(cluster: &Cluster, node: &str) -> BTreeSet<String> {
    let check = |path: PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(blake3::hash(&std::fs::read(&path).unwrap()).to_string(), name);
        name
    };
    cached(cluster, node).into_iter().map(check).collect()
}

#[test]
fn five_empty_nodes_fetch_each_tensor_once_and_all_of_it_is_right() {
    let cluster = Setup::of(6).layers("2,1,1,1,1,2").start();
    let mut all = BTreeSet::new();
    let mut n_bytes = 0;
    for i in 0..5 {
        let node = format!("w{i}");
        check_tally(&cluster, &node);
        for name in check_cache(&cluster, &node) {
            assert!(all.insert(name), "two nodes have the same tensor");
        }
        n_bytes += n_cached(&cluster, &node);
    }
    let given = || {
        let of_workers: u64 = (0..5).map(|i| weights(&cluster, &format!("w{i}"), "served")).sum();
        (weights(&cluster, "a", "served") + of_workers == n_bytes).then_some(())
    };
    eventually("the tally of those that give", given);
    cluster.check_answer();
}

/// A server with the model, its address there, and a directory into which it was pulled.
fn pulled() -> (Server, String, tempfile::TempDir) {
    let server = Server::start(&[("abacus-f16.gguf", &std::fs::read(abacus()).unwrap())], |_| String::new());
    let url = format!("{}/web/abacus-f16.gguf", server.url());
    let dir = tempfile::tempdir().unwrap();
    run(&["pull", &url, "--models-dir", dir.path().to_str().unwrap()]).ok();
    let n_bytes = std::fs::metadata(abacus()).unwrap().len();
    let sent = server.n_bytes_sent();
    assert!((n_bytes..n_bytes + 100).contains(&sent), "{sent} bytes for {n_bytes}");
    (server, url, dir)
}

#[test]
fn a_model_that_one_machine_pulled_crosses_the_uplink_once() {
    let (server, url, dir) = pulled();
    let sent = server.n_bytes_sent();
    let pulled = [&url, "--models-dir", dir.path().to_str().unwrap()];
    let cluster = Setup::of(6).layers("2,1,1,1,1,2").serve(&pulled).start();
    for i in 0..5 {
        let node = format!("w{i}");
        check_tally(&cluster, &node);
        check_cache(&cluster, &node);
    }
    cluster.check_answer();
    assert!(server.n_bytes_sent() <= sent + 100, "{} bytes more", server.n_bytes_sent() - sent);
}

/// First and last bytes of what the server was asked for since then, beyond what says that it is the model.
fn ranges(server: &Server, n_asked: usize) -> Vec<(u64, u64)> {
    server.asked()[n_asked..].iter().filter_map(|asked| asked.range).filter(|(first, _)| *first > 3).collect()
}

#[test]
fn no_two_nodes_fetch_the_same_from_the_hub() {
    let (server, url, dir) = pulled();
    let (n_asked, sent) = (server.asked().len(), server.n_bytes_sent());
    let settings = [&url, "--models-dir", dir.path().to_str().unwrap(), "--direct-fetch", "on", "--redundancy", "2"];
    let cluster = Setup::of(4).layers("3,3,2").serve(&settings).start();
    let nodes = ["w0", "w1", "w2"];
    for node in nodes {
        eventually(&format!("the weights of {node}"), || {
            let keys = ["coordinator", "workers", "hub"];
            let fetched: u64 = keys.iter().map(|key| weights(&cluster, node, key)).sum();
            (fetched > 0 && fetched == n_cached(&cluster, node)).then_some(())
        });
        check_cache(&cluster, node);
    }
    let of_hub: u64 = nodes.iter().map(|node| weights(&cluster, node, "hub")).sum();
    assert!(server.n_bytes_sent() - sent >= of_hub);
    let mut ranges = ranges(&server, n_asked);
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 < pair[1].0), "{ranges:?}");
    cluster.check_answer();
}

#[test]
fn a_coordinator_that_is_offline_sends_nobody_to_the_hub() {
    let (server, url, dir) = pulled();
    let n_asked = server.asked().len();
    let models = dir.path().to_str().unwrap();
    let settings = [&url, "--models-dir", models, "--direct-fetch", "on", "--offline"];
    let cluster = Setup::of(2).layers("4,4").serve(&settings).start();
    check_tally(&cluster, "w0");
    assert_eq!(server.asked().len(), n_asked, "offline nothing is asked for");
    cluster.check_answer();
}

/// A worker with variables of its own, which ends with this.
struct Worker(Child);

impl Worker {
    fn join(cluster: &Cluster, name: &str, args: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_brigade"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("BRIGADE_")) {
            command.env_remove(name);
        }
        command.args(["join", &cluster.ticket(), "--name", name, "--threads", "1", "--listen", "127.0.0.1:0"]);
        command.arg("--state-dir").arg(cluster.state_dir(name)).args(args).envs(variables.iter().copied());
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_worker_that_is_offline_does_not_ask_the_hub() {
    let (server, url, dir) = pulled();
    let settings = [&url, "--models-dir", dir.path().to_str().unwrap(), "--direct-fetch", "on"];
    let cluster = Setup::of(3).layers("4,2,2").serve(&settings).start_coordinator();
    let n_asked = server.asked().len();
    let _workers = [
        Worker::join(&cluster, "w0", &["--offline"], &[]),
        Worker::join(&cluster, "w1", &[], &[("HF_HUB_OFFLINE", "1")]),
    ];
    cluster.wait_ready();
    for node in ["w0", "w1"] {
        check_tally(&cluster, node);
        check_cache(&cluster, node);
    }
    assert_eq!(ranges(&server, n_asked), []);
    cluster.check_answer();
}

#[test]
fn who_stands_by_is_given_what_the_serving_node_has() {
    let cluster = Setup::of(3).layers("6,2").redundant().start();
    let stands_by = |node: &Value| node["standby"].as_array().is_some_and(|all| !all.is_empty());
    eventually("a standby", || ["w0", "w1"].iter().filter_map(|name| cluster.node(name)).find(stands_by));
    eventually("all weights of it", || (n_cached(&cluster, "w1") == n_cached(&cluster, "w0")).then_some(()));
    for node in ["w0", "w1"] {
        check_tally(&cluster, node);
        check_cache(&cluster, node);
    }
    assert_eq!(check_cache(&cluster, "w0"), check_cache(&cluster, "w1"));
}

#[test]
fn wrong_bytes_of_another_node_are_refused() {
    let mut cluster = Setup::of(2).layers("6,2").redundant().start();
    for path in cached(&cluster, "w0") {
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        // In place: the file that the node may have open changes too.
        std::fs::write(&path, bytes).unwrap();
    }
    cluster.join();
    eventually("a standby", || {
        let node = cluster.node("w1")?;
        let stands_by = node["standby"].as_array().is_some_and(|all| !all.is_empty());
        (stands_by && weights(&cluster, "w1", "coordinator") > 0).then_some(())
    });
    eventually("all weights of it", || (n_cached(&cluster, "w1") == n_cached(&cluster, "w0")).then_some(()));
    check_cache(&cluster, "w1");
    cluster.kill_worker(0);
    cluster.wait_placed_on(&["a", "w1"]);
    cluster.check_answer();
}

#[test]
fn a_source_that_ends_in_the_middle_is_replaced() {
    let mut cluster = Setup::of(3).layers("3,3,2").cuttable().start_coordinator();
    cluster.join_with(&["--model", abacus().to_str().unwrap()]);
    eventually("the first node", || cluster.node("w0"));
    // After the middle of a tensor nothing comes any more, and the node hangs for the other one.
    cluster.links_of(0).inbound.silence_after(400_000);
    cluster.join();
    eventually("the weights of the second node", || {
        let node = cluster.node("w1")?;
        (node["layers"].is_array() && node["loaded"] == 1.0).then_some(())
    });
    check_cache(&cluster, "w1");
    cluster.kill_worker(0);
    cluster.links_of(0).inbound.set_silent(false);
    cluster.join();
    cluster.wait_placed_on(&["a", "w1", "w2"]);
    for node in ["w1", "w2"] {
        check_cache(&cluster, node);
    }
    cluster.check_answer();
}
