//! Placements follow what was measured, are told with what to expect of them, and change when that pays.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use support::oracle::{oracle, rendered};
use support::{Setup, abacus, endless_body, eventually, run};

/// So much slower a node is made that no noise hides it.
const SLOW: [&str; 2] = ["--throttle", "0.08"];

fn node<'a>(status: &'a Value, name: &str) -> &'a Value {
    status["nodes"].as_array().unwrap().iter().find(|node| node["name"] == name).unwrap()
}

/// Seconds of a mean layer for one row.
fn layer_s(status: &Value, name: &str) -> f64 {
    node(status, name)["speed"]["decode"][0][1].as_f64().unwrap()
}

fn n_layers(status: &Value, name: &str) -> u64 {
    let layers = &node(status, name)["layers"];
    layers.as_array().map_or(0, |l| l[1].as_u64().unwrap() - l[0].as_u64().unwrap())
}

#[test]
fn a_slow_node_is_found_out_and_gets_as_little_as_possible() {
    let mut cluster = Setup::of(3).serve(&["--optimize", "latency"]).start_coordinator();
    cluster.join_with(&SLOW);
    cluster.join();
    cluster.wait_ready();
    let status = cluster.status();
    assert_eq!(n_layers(&status, "w0"), 1, "{status:#}");
    assert_eq!(n_layers(&status, "w1") + n_layers(&status, "a"), 7);
    assert!(layer_s(&status, "w0") > 3.0 * layer_s(&status, "w1"), "{status:#}");

    let prediction = &status["prediction"];
    assert!(prediction["tokens_per_s"].as_f64().unwrap() > 0.0, "{prediction}");
    assert!(prediction["first_token_s"].as_f64().unwrap() > 0.0, "{prediction}");
    assert_eq!(prediction["stages"].as_array().unwrap().len(), 3);
    let mut links: Vec<[&str; 2]> = status["links"].as_array().unwrap().iter().map(pair).collect();
    links.sort_unstable();
    assert_eq!(links, [["a", "w0"], ["a", "w1"], ["w0", "w1"]]);
    assert!(status["links"].as_array().unwrap().iter().all(|link| link["rtt_ms"].as_f64().unwrap() > 0.0));

    let said = cluster.coordinator.line("plan ");
    assert!(said.contains("w0 ") && said.contains(" tokens/s for one stream"), "{said}");
    cluster.check_answer();
}

/// What `brigade` prints while `n_threads` other threads compute.
fn said_while_busy(n_threads: usize, args: &[&str]) -> Value {
    let is_over = AtomicBool::new(false);
    let compute = || {
        while !is_over.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
    };
    let ended = std::thread::scope(|scope| {
        (0..n_threads).for_each(|_| drop(scope.spawn(compute)));
        let ended = std::panic::catch_unwind(|| run(args));
        is_over.store(true, Ordering::Relaxed);
        ended
    });
    serde_json::from_str(&ended.unwrap().ok()).unwrap()
}

#[test]
fn numbers_of_a_busy_machine_are_told_with_a_warning() {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let n_cores = stat.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu ")).count();
    if std::thread::available_parallelism().map_or(0, usize::from) < n_cores.max(1) {
        // The system does not tell how busy it is, or this process cannot make it so.
        return;
    }
    let (dir, model) = (tempfile::tempdir().unwrap(), abacus());
    let of = |verb| {
        let place = ["--state-dir", dir.path().to_str().unwrap(), "--context", "512", "--json"];
        said_while_busy(n_cores, &[&[verb, model.to_str().unwrap()], &place[..]].concat())
    };
    let (profile, plan) = (of("profile"), of("plan"));
    for notes in [&profile["notes"], &plan["machines"]["notes"]] {
        let note = notes[0].as_str().unwrap_or_default();
        assert!(note.starts_with("Other programs took ") && note.contains("when it is idle"), "{notes}");
    }
    for curve in ["decode", "chunk"] {
        let points = profile["model"]["speed"][curve].as_array().unwrap();
        let seconds: Vec<f64> = points.iter().map(|point| point[1].as_f64().unwrap()).collect();
        assert!(seconds[0] > 0.0 && seconds.is_sorted(), "more rows take longer: {curve} {seconds:?}");
    }
}

/// Both ends of a link in alphabetical order.
fn pair(link: &Value) -> [&str; 2] {
    let mut ends = [&link["from"], &link["to"]].map(|end| end.as_str().unwrap());
    ends.sort_unstable();
    ends
}

#[test]
fn a_fast_node_that_joins_relieves_a_slow_one_while_answers_are_made() {
    // The coordinator has no room for the whole model.
    let setup = Setup::of(2).serve(&["--optimize", "latency", "--parallel", "1", "--context", "1024"]);
    let mut cluster = setup.memory("70MiB").start_coordinator();
    cluster.join_with(&SLOW);
    cluster.wait_ready();
    cluster.wait_placed_on(&["a", "w0"]);
    cluster.join();
    let prompt = oracle().tokens(&rendered("Tell me a story."));
    let alone = oracle().generate(&prompt, 400, true);
    let is_done = || cluster.placement().iter().any(|(name, _)| name == "w1");
    eventually("the fast node serves", || {
        let mut stream = cluster.endpoint.stream("/v1/completions", &endless_body(&prompt, 400));
        assert_eq!(stream.rest().0, alone.text);
        is_done().then_some(())
    });
    cluster.wait_placed_on(&["a", "w0", "w1"]);
    let status = cluster.status();
    assert_eq!(n_layers(&status, "w0"), 1, "{status:#}");
}
