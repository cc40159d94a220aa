//! Models whose layers keep a state that each token changes for good: it cannot be cut back, copied or saved, and no
//! answer may show that. They are random, so what they say is noise, and any wrong state makes other noise of it.
//! Weights are of eight bits, and there are no experts: such rows have the same bits in any company.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../../engine/tests/support/recurrent.rs"]
mod recurrent;
mod support;

use std::path::PathBuf;

use brigade_base::Token;
use brigade_gguf::ModelFile;
use serde_json::Value;
use support::oracle::{Answer, Oracle};
use support::{Cluster, Event, Setup, abacus, endless_body, eventually};

const PLAIN: &str = "/v1/completions";

/// A model, and what it says.
struct Model {
    dir: tempfile::TempDir,
    oracle: Oracle,
}

impl Model {
    /// A random model of `arch` with the vocabulary of abacus.
    fn of(arch: &str) -> Self {
        brigade_engine::init();
        let dir = tempfile::tempdir().unwrap();
        let base = ModelFile::open(abacus()).unwrap();
        let path = dir.path().join("model.gguf");
        recurrent::write(&recurrent::metadata(arch, base.catalog().metadata()), &path);
        let oracle = Oracle::of(&path);
        Self { dir, oracle }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("model.gguf")
    }

    /// `n_nodes` nodes with `parallel` slots.
    fn setup(&self, n_nodes: usize, cache: &str, parallel: u32) -> Setup {
        let path = self.path();
        Setup::of(n_nodes).serve(&[path.to_str().unwrap(), "--prefix-cache", cache]).parallel(parallel)
    }

    fn ask(&mut self, prompt: &[Token], n: u32, priority: u64) -> Ask {
        let expected = Answer::clone(&self.oracle.generate(prompt, n, true));
        let mut body = endless_body(prompt, n);
        body["priority"] = priority.into();
        Ask { body, expected }
    }
}

/// A request, and its answer.
struct Ask {
    body: Value,
    expected: Answer,
}

impl Ask {
    /// Asks, compares, and returns how many tokens had not to be computed.
    #[track_caller]
    fn check(&self, cluster: &Cluster) -> u64 {
        let reply = cluster.complete(&self.body);
        assert_eq!(reply["choices"][0]["text"], self.expected.text);
        assert_eq!(reply["usage"]["completion_tokens"], self.expected.n_generated);
        reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    }
}

/// Tokens that look random; others for each `seed`.
fn tokens(n: usize, seed: usize) -> Vec<Token> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729 + i * i * 31) % 1024) as Token).collect()
}

/// More callers than slots, of which later ones are more urgent and push earlier ones aside.
fn check_crowd(arch: &str, n_nodes: usize) {
    let mut model = Model::of(arch);
    let beginning = tokens(50, 99);
    let mut crowd: Vec<Vec<Ask>> = Vec::new();
    for caller in 0..8 {
        let own = tokens(3 + 37 * (caller % 4), caller);
        let shared = [&beginning[..], &own].concat();
        let last = [&shared[..], &tokens(30, caller + 20)].concat();
        let long = tokens(300, caller + 40);
        let priority = 8 - caller as u64;
        // The second one goes on from the first, if its slot is left.
        let asks = [(&shared, 1), (&last, 25), (&long, 30)];
        crowd.push(asks.map(|(prompt, n)| model.ask(prompt, n, priority)).into());
    }
    let patient: Vec<Ask> = (0..3).map(|i| model.ask(&tokens(150, 70 + i), 150, 9)).collect();
    let cluster = model.setup(n_nodes, "exact", 3).start();
    let mut streams: Vec<_> = patient.iter().map(|ask| cluster.stream(PLAIN, &ask.body)).collect();
    let begun: Vec<String> = streams.iter_mut().map(|stream| stream.chunks(2)).collect();
    std::thread::scope(|scope| {
        for asks in &crowd {
            let cluster = &cluster;
            scope.spawn(move || asks.iter().map(|ask| ask.check(cluster)).sum::<u64>());
        }
    });
    for ((ask, begun), mut stream) in patient.iter().zip(begun).zip(streams) {
        let (rest, end) = stream.rest();
        assert_eq!((begun + &rest, end), (ask.expected.text.clone(), Event::Done), "a patient session");
    }
    cluster.wait_idle();
    let metrics = cluster.metrics();
    assert!(metrics.get("num_preemptions_total") >= 1.0);
    assert_eq!(metrics.get("epoch"), 1.0, "nothing went wrong that a new placement mended");
    assert_eq!(metrics.get("kv_images"), 0.0);
    // Alone, what is left of a prompt is there for one that begins with all of it, and for no other.
    let all = tokens(90, 5);
    let cached: Vec<u64> = [60, 90, 80].map(|n| model.ask(&all[..n], 1, 0).check(&cluster)).into();
    assert_eq!(cached, [0, 60, 0]);
}

#[test]
fn a_crowd_is_answered_as_if_each_were_alone_by_states_and_attention_in_each_layer() {
    check_crowd("falcon-h1", 3);
}

#[test]
fn a_crowd_is_answered_as_if_each_were_alone_by_states_and_attention_in_turns() {
    check_crowd("qwen35", 2);
}

#[test]
fn a_crowd_is_answered_as_if_each_were_alone_by_states_only() {
    check_crowd("mamba2", 3);
}

/// Turns of a conversation go on in the slot where they are.
#[test]
fn no_turn_of_a_conversation_is_computed_twice() {
    let mut model = Model::of("falcon-h1");
    let cluster = model.setup(2, "full", 2).start();
    let mut history = Vec::new();
    let mut n_computed = 0;
    for turn in 0..4 {
        history.extend(tokens(20 + 30 * turn, turn));
        let expected = model.oracle.go_on(&history, n_computed, 12, true);
        let n = expected.n_generated as u32;
        let ask = Ask { body: endless_body(&history, n), expected };
        assert_eq!(ask.check(&cluster), u64::from(n_computed), "turn {turn}");
        history.extend(&ask.expected.tokens);
        n_computed = history.len() as u32 - 1;
    }
}

/// Hears the beginnings of some answers, does something to the cluster, and compares all with the undisturbed ones.
fn check_answers(model: &mut Model, mut cluster: Cluster, disturb: impl FnOnce(&mut Cluster)) -> Cluster {
    let asks: Vec<Ask> = [4, 60, 130, 320].map(|n| model.ask(&tokens(n, n), 350, 0)).into();
    let mut streams: Vec<_> = asks.iter().map(|ask| cluster.stream(PLAIN, &ask.body)).collect();
    let begun: Vec<String> = streams.iter_mut().map(|stream| stream.chunks(5)).collect();
    disturb(&mut cluster);
    for ((ask, begun), mut stream) in asks.iter().zip(begun).zip(streams) {
        let (rest, end) = stream.rest();
        assert_eq!((begun + &rest, end), (ask.expected.text.clone(), Event::Done));
    }
    cluster.wait_idle();
    assert!(cluster.metrics().get("epoch") >= 2.0);
    cluster
}

#[test]
fn a_worker_is_killed_and_its_layers_go_to_the_others() {
    for arch in ["mamba2", "jamba"] {
        let mut model = Model::of(arch);
        let n_nodes = if arch == "jamba" { 2 } else { 3 };
        let cluster = model.setup(n_nodes, "exact", 4).start();
        let cluster = check_answers(&mut model, cluster, |cluster| cluster.kill_worker(0));
        model.ask(&tokens(40, 3), 20, 0).check(&cluster);
    }
}

/// Who stood by has the states of the lost stage; those of the others are where other passes have left them.
#[test]
fn a_worker_is_killed_whose_stage_another_one_computes_along() {
    let mut model = Model::of("falcon-h1");
    let cluster = model.setup(3, "off", 4).redundant().serve(&["--shadow"]).start();
    eventually("a worker that stands by", || {
        let (one, other) = (cluster.node("w0")?, cluster.node("w1")?);
        other["standby"].as_array()?.contains(&one["layers"]).then_some(())
    });
    // Those who stand by hear of the sessions that begin once they are connected; by the end of these they are.
    for seed in 0..2 {
        model.ask(&tokens(30, seed), 300, 0).check(&cluster);
    }
    let cluster = check_answers(&mut model, cluster, |cluster| cluster.kill_worker(0));
    cluster.wait_placed_on(&["a", "w1"]);
}

#[test]
fn a_worker_leaves_in_the_middle_of_answers() {
    let mut model = Model::of("qwen35");
    let mut cluster = model.setup(2, "exact", 4).start();
    cluster.join();
    cluster.wait_spare("w1");
    let cluster = check_answers(&mut model, cluster, |cluster| cluster.leave(0));
    cluster.wait_placed_on(&["a", "w1"]);
}
