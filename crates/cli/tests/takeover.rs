//! The coordinator dies, hangs or is restarted: another node with the model takes over, answers that came in through
//! the others go on, and whoever comes back works for the new one.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use serde_json::Value;
use support::oracle::{oracle, rendered};
use support::{Cluster, Endpoint, Event, Setup, Stream, abacus, endless_body, eventually};

const PLAIN: &str = "/v1/completions";

/// Tokens of an answer that takes so long that it can be disturbed.
const LONG: u32 = 700;

/// `n` nodes that all have the model and an endpoint.
fn cluster(n: usize) -> Cluster {
    let cluster = Setup::of(n).join(&["--model", abacus().to_str().unwrap(), "--port", "0"]).start();
    // All know who votes, so that any of them can take over.
    eventually("the votes", || {
        let knows = |name: String| cluster.state_dir(&name).join("council.bin").exists().then_some(());
        (0..n - 1).try_for_each(|i| knows(format!("w{i}")))
    });
    cluster
}

/// The endpoint of worker `i`.
fn endpoint(cluster: &Cluster, i: usize) -> Endpoint {
    Endpoint::new(cluster.workers[i].line("serving ").trim_end_matches("/v1"), None)
}

fn story() -> (Value, String) {
    let prompt = oracle().tokens(&rendered("Tell me a story."));
    let expected = oracle().generate(&prompt, LONG, true).text.clone();
    (endless_body(&prompt, LONG), expected)
}

/// Reads the rest of a stream of which `told` was read, and compares the whole.
#[track_caller]
fn check_rest(mut told: String, stream: &mut Stream, expected: &str) {
    let (rest, end) = stream.rest();
    told.push_str(&rest);
    assert!(matches!(end, Event::Done), "{end:?} after {told:?}");
    assert_eq!(told, expected);
}

/// Waits until an endpoint says that `nodes` are here, and that one of them coordinates.
#[track_caller]
fn wait_led(endpoint: &Endpoint, nodes: &[&str]) -> String {
    eventually(&format!("a cluster of {nodes:?}"), || {
        let status = endpoint.get("/brigade/v1/status").ok();
        let here = status["nodes"].as_array()?.iter().filter(|node| node["connected"] == true);
        let (mut names, mut leader) = (Vec::new(), None);
        for node in here {
            names.push(node["name"].as_str()?.to_owned());
            leader = if node["role"] == "coordinator" { node["name"].as_str().map(str::to_owned) } else { leader };
        }
        names.sort();
        (names == nodes && status["state"] == "ready").then_some(leader).flatten()
    })
}

#[test]
fn answers_that_came_in_elsewhere_outlive_the_coordinator_which_comes_back_as_a_worker() {
    let mut cluster = cluster(4);
    let (body, expected) = story();
    let endpoints = [0, 1, 2].map(|i| endpoint(&cluster, i));
    let mut streams = endpoints.each_ref().map(|endpoint| endpoint.stream(PLAIN, &body));
    let told = streams.each_mut().map(|stream| stream.chunks(5));
    cluster.coordinator.kill();
    for (told, stream) in told.into_iter().zip(&mut streams) {
        check_rest(told, stream, &expected);
        assert!(stream.has_paused());
    }
    let leader = wait_led(&endpoints[0], &["w0", "w1", "w2"]);
    assert_ne!(leader, "a");

    cluster.restart_coordinator();
    assert_eq!(wait_led(&cluster.endpoint, &["a", "w0", "w1", "w2"]), leader);
    // It answers too, through the other one.
    cluster.check_answer();
    let status = cluster.status();
    assert!(status["term"].as_u64().unwrap() >= 2, "{status}");
    let second = ["w0", "w1", "w2"].iter().position(|name| *name == leader).unwrap();
    let mut stream = cluster.stream(PLAIN, &body);
    let told = stream.chunks(5);
    cluster.workers[second].kill();
    check_rest(told, &mut stream, &expected);
}

#[test]
fn a_coordinator_that_hangs_is_replaced_and_its_own_answers_go_on_when_it_is_back() {
    let mut cluster = cluster(4);
    let (body, expected) = story();
    let other = endpoint(&cluster, 0);
    let (mut through_it, mut through_other) = (cluster.stream(PLAIN, &body), other.stream(PLAIN, &body));
    let told = [through_it.chunks(5), through_other.chunks(5)];
    cluster.coordinator.signal("STOP");
    let [told_by_it, told_by_other] = told;
    check_rest(told_by_other, &mut through_other, &expected);
    cluster.coordinator.signal("CONT");
    check_rest(told_by_it, &mut through_it, &expected);
    assert_ne!(wait_led(&cluster.endpoint, &["a", "w0", "w1", "w2"]), "a");
    cluster.check_answer();
}

/// Of two nodes the one that is left cannot know whether it or the other one was cut off. So the worker waits, and its
/// callers with it, until the coordinator is back.
#[test]
fn the_worker_of_a_pair_never_takes_over() {
    let mut cluster = cluster(2);
    let (body, expected) = story();
    let other = endpoint(&cluster, 0);
    let mut stream = other.stream(PLAIN, &body);
    let mut told = stream.chunks(5);
    cluster.coordinator.kill();
    told.push_str(&stream.until_pause());
    eventually("looking for the coordinator", || {
        let said = cluster.workers[0].stdout();
        said.lines().last().is_some_and(|line| line.starts_with("looking for ")).then_some(())
    });
    cluster.restart_coordinator();
    check_rest(told, &mut stream, &expected);
    assert_eq!(wait_led(&other, &["a", "w0"]), "a");
}

/// Whoever has no copy of the model cannot lead; a coordinator that is lost stays lost until it is back.
#[test]
fn nobody_takes_over_without_the_model() {
    let mut cluster = Setup::of(4).join(&["--port", "0"]).start();
    let (body, expected) = story();
    let other = endpoint(&cluster, 2);
    let mut stream = other.stream(PLAIN, &body);
    let mut told = stream.chunks(5);
    cluster.coordinator.kill();
    told.push_str(&stream.until_pause());
    cluster.restart_coordinator();
    check_rest(told, &mut stream, &expected);
    assert_eq!(wait_led(&other, &["a", "w0", "w1", "w2"]), "a");
}
