//! Machines come, go, die and come back; the cluster says so and goes on.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use brigade_base::Token;
use serde_json::{Value, json};
use support::oracle::{oracle, rendered};
use support::{Cluster, Event, Setup, chat_body, endless_body, eventually, run};

/// Tokens of an answer that takes so long that it can be disturbed.
const LONG: u32 = 900;

/// How soon a caller hears that its answer is cut off: a silent machine is noticed after two seconds.
const AT_ONCE: Duration = Duration::from_secs(4);

fn story() -> Vec<Token> {
    oracle().tokens(&rendered("Tell me a story."))
}

/// That requests are refused, in OpenAI's words.
fn check_refused(cluster: &Cluster) {
    let reply = cluster.endpoint.post("/v1/chat/completions", &chat_body("Hello"));
    assert_eq!((reply.status, reply.code()), (503, "service_unavailable"), "{reply:?}");
    assert_eq!(reply.body["error"]["type"], "server_error");
    assert!(reply.message().starts_with("the model is not ready: "), "{reply:?}");
    assert!(reply.retry_after.as_ref().unwrap().parse::<u32>().unwrap() > 0);
}

#[test]
fn a_cluster_is_ready_once_all_nodes_are_there_and_a_token_went_around() {
    let mut cluster = Setup::of(3).start_coordinator();
    cluster.wait_not_ready("1 of 3 nodes are here");
    assert_eq!(cluster.endpoint.get("/health").status, 200);
    check_refused(&cluster);
    cluster.join();
    cluster.wait_not_ready("2 of 3 nodes are here");
    check_refused(&cluster);
    assert_eq!(cluster.placement(), []);
    cluster.join();
    cluster.wait_ready();
    cluster.check_answer();
    assert_eq!(cluster.placement().len(), 3);
    let said = cluster.coordinator.line("ready ");
    assert_eq!(said, format!("{}/v1", cluster.url()));
}

/// Nodes are lost one after the other, each in the middle of an answer, until only the coordinator is left.
#[test]
fn a_worker_that_dies_in_an_answer_is_told_at_once_and_replaced() {
    let mut cluster = Cluster::of(3);
    let prompt = story();
    let expected = oracle().generate(&prompt, LONG, true);
    for (dying, left) in [(0, &["a", "w1"][..]), (1, &["a"])] {
        let mut stream = cluster.stream("/v1/completions", &endless_body(&prompt, LONG));
        let mut told = stream.chunks(5);
        let endpoint = cluster.endpoint.clone();
        let body = endless_body(&prompt, LONG);
        let whole = std::thread::spawn(move || endpoint.post("/v1/completions", &body));
        eventually("two sessions", || (cluster.status()["running"] == 2).then_some(()));
        let epoch = cluster.status()["epoch"].as_u64().unwrap();
        cluster.kill_worker(dying);
        let killed = Instant::now();
        let (rest, end) = stream.rest();
        assert!(killed.elapsed() < AT_ONCE, "{:?}", killed.elapsed());
        told.push_str(&rest);
        let Event::Error(error) = end else { panic!("{end:?} after {told:?}") };
        assert_eq!(error["error"]["code"], "service_unavailable", "{error}");
        assert!(error["error"]["message"].as_str().unwrap().starts_with("the answer was cut off because"), "{error}");
        assert_eq!(stream.event(), Event::BrokeOff, "no end mark follows an error");
        let whole = whole.join().unwrap();
        assert_eq!((whole.status, whole.code()), (503, "service_unavailable"), "half an answer is none: {whole:?}");
        assert!(expected.text.starts_with(&told) && told.len() < expected.text.len(), "{told:?}");

        cluster.wait_placed_on(left);
        assert!(cluster.status()["epoch"].as_u64().unwrap() > epoch);
        cluster.check_answer();
    }
}

#[test]
fn a_worker_that_dies_while_idle_is_noticed_and_replaced_by_a_spare_one() {
    let mut cluster = Cluster::of(2);
    cluster.join();
    eventually("the spare worker", || {
        let status = cluster.status();
        let spare = status["nodes"].as_array().unwrap().iter().find(|node| node["name"] == "w1")?.clone();
        (spare["state"] == "idle" && spare["layers"].is_null()).then_some(())
    });
    cluster.wait_placed_on(&["a", "w0"]);
    cluster.kill_worker(0);
    cluster.wait_placed_on(&["a", "w1"]);
    cluster.check_answer();
}

#[test]
fn a_pinned_split_waits_for_its_worker_which_needs_no_ticket_to_come_back() {
    let mut cluster = Setup::of(3).layers("3,3,2").start();
    cluster.check_answer();
    for i in [0, 1] {
        cluster.kill_worker(i);
        cluster.wait_not_ready("1 more must join");
        check_refused(&cluster);
        cluster.restart_worker(i);
        cluster.wait_ready();
        assert_eq!(cluster.placement().len(), 3);
        cluster.check_answer();
    }
}

#[test]
fn a_stopped_worker_says_goodbye_and_frees_its_place() {
    let mut cluster = Cluster::of(3);
    assert_eq!(cluster.workers[0].terminate().code(), Some(0));
    assert!(!cluster.state_dir("w0").join("worker.json").exists(), "the note of a running worker");
    cluster.wait_placed_on(&["a", "w1"]);
    cluster.check_answer();
    assert_eq!(cluster.workers[0].stderr(), "");
}

/// A machine that hangs answers nothing, not even a closed link; the heartbeat finds it.
#[test]
fn a_worker_that_hangs_is_taken_for_dead() {
    let mut cluster = Cluster::of(3);
    cluster.workers[0].signal("STOP");
    cluster.wait_placed_on(&["a", "w1"]);
    cluster.check_answer();
    // It finds itself left out, and comes back as a spare one.
    cluster.workers[0].signal("CONT");
    eventually("the return of w0", || {
        let status = cluster.status();
        let node = status["nodes"].as_array().unwrap().iter().find(|node| node["name"] == "w0")?.clone();
        (node["connected"] == true && node["state"] == "idle").then_some(())
    });
    cluster.check_answer();
}

#[test]
fn workers_find_a_restarted_coordinator_by_themselves() {
    let mut cluster = Cluster::of(3);
    cluster.coordinator.kill();
    cluster.restart_coordinator();
    cluster.wait_ready();
    assert_eq!(cluster.placement().len(), 3);
    cluster.check_answer();
}

#[test]
fn a_stopped_coordinator_ends_its_answers_frees_its_ports_and_its_workers_memory() {
    let mut cluster = Cluster::of(2);
    let mut stream = cluster.stream("/v1/completions", &endless_body(&story(), LONG));
    stream.chunks(3);
    let status = cluster.coordinator.terminate();
    assert_eq!(status.code(), Some(0));
    assert_eq!(cluster.coordinator.stderr(), "");
    let (_, end) = stream.rest();
    let Event::Error(error) = end else { panic!("{end:?}") };
    assert!(error["error"]["message"].as_str().unwrap().contains("the server is stopping"), "{error}");

    TcpListener::bind(cluster.links).unwrap();
    TcpListener::bind(cluster.url().trim_start_matches("http://")).unwrap();
    assert!(!cluster.state_dir("a").join("endpoint.json").exists());

    let state = cluster.state_dir("w0");
    let ask = |json: &[&str]| run(&[&["status", "--state-dir", state.to_str().unwrap()], json].concat()).ok();
    eventually("a worker without a stage", || ask(&[]).contains("layers  -").then_some(()));
    let worker: Value = serde_json::from_str(&ask(&["--json"])).unwrap();
    assert_eq!((&worker["layers"], &worker["connected"]), (&Value::Null, &json!(false)), "{worker}");
    assert!(cluster.coordinator.stdout().lines().all(|line| line != "ready"), "it is not ready when it has stopped");
}

/// The first caller hangs up while its answer has most of its tokens to go; the second gets the only slot.
fn check_hang_up(stream: bool) {
    let cluster = Setup::of(2).parallel(1).start();
    let mut body = endless_body(&story(), LONG);
    body["stream"] = stream.into();
    let body = body.to_string();
    let address = cluster.url().trim_start_matches("http://");
    let mut rude = TcpStream::connect(address).unwrap();
    let head = format!("host: localhost\r\ncontent-type: application/json\r\ncontent-length: {}", body.len());
    rude.write_all(format!("POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{body}").as_bytes()).unwrap();
    if stream {
        rude.read_exact(&mut [0; 64]).unwrap();
    }
    eventually("the first session", || (cluster.status()["running"] == 1).then_some(()));
    std::thread::scope(|scope| {
        let second = scope.spawn(|| cluster.chat("What is 17 + 25?"));
        eventually("the second request", || (cluster.status()["waiting"] == 1).then_some(()));
        rude.shutdown(Shutdown::Both).unwrap();
        drop(rude);
        assert_eq!(second.join().unwrap(), oracle().chat("What is 17 + 25?").text);
    });
    eventually("rest", || (cluster.status()["running"] == 0).then_some(()));
    let generated = cluster.status()["tokens_generated"].as_u64().unwrap();
    assert!(generated < u64::from(LONG), "{generated} tokens were generated, most of them for nobody");
}

#[test]
fn a_caller_that_hangs_up_on_a_stream_frees_its_session() {
    check_hang_up(true);
}

#[test]
fn a_caller_that_hangs_up_on_a_whole_answer_frees_its_session() {
    check_hang_up(false);
}

/// A coordinator that cannot be reached any more does not end its workers; they wait for it.
#[test]
fn a_worker_outlives_its_coordinator() {
    let mut cluster = Cluster::of(2);
    cluster.coordinator.kill();
    let worker = &cluster.workers[0];
    let looks = || worker.stdout().lines().last().is_some_and(|line| line.starts_with("looking for ")).then_some(());
    eventually("looking for the coordinator", looks);
    assert!(cluster.workers[0].ended().is_none());
    assert_eq!(cluster.workers[0].terminate().code(), Some(0));
}
