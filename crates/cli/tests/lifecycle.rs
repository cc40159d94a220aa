//! Machines come, go, die and come back; the cluster says so and goes on.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use brigade_base::Token;
use serde_json::{Value, json};
use support::oracle::{oracle, rendered};
use support::{Cluster, Event, Setup, chat_body, endless_body, eventually, run};

/// Tokens of an answer that takes so long that it can be disturbed.
const LONG: u32 = 900;

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

#[test]
fn a_worker_that_dies_while_idle_is_noticed_and_replaced_by_a_spare_one() {
    let mut cluster = Cluster::of(2);
    cluster.join();
    cluster.wait_spare("w1");
    cluster.wait_placed_on(&["a", "w0"]);
    cluster.kill_worker(0);
    cluster.wait_placed_on(&["a", "w1"]);
    cluster.check_answer();
}

#[test]
fn a_pinned_split_waits_for_its_worker_which_needs_no_ticket_to_come_back() {
    // Nobody waits for it with a request; `failure.rs` has those who do.
    let mut cluster = Setup::of(3).layers("3,3,2").serve(&["--wait-for-capacity", "0s"]).start();
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
    cluster.wait_spare("w0");
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

/// What a stopped coordinator leaves behind: free ports, workers with free memory, and no note of itself.
fn check_stopped(cluster: &mut Cluster) {
    assert_eq!(cluster.coordinator.wait().code(), Some(0));
    assert_eq!(cluster.coordinator.stderr(), "");
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

#[test]
fn a_stopped_coordinator_takes_no_more_requests_and_ends_with_its_last_answer() {
    let mut cluster = Cluster::of(2);
    let story = story();
    let mut stream = cluster.stream("/v1/completions", &endless_body(&story, LONG));
    let told = stream.chunks(3);
    cluster.coordinator.signal("TERM");
    eventually("refusals", || {
        let reply = cluster.endpoint.post("/v1/chat/completions", &chat_body("Hello"));
        (reply.status == 503).then(|| assert_eq!(reply.message(), "the server is stopping", "{reply:?}"))
    });
    let (rest, end) = stream.rest();
    assert_eq!((told + &rest, end), (oracle().generate(&story, LONG, true).text.clone(), Event::Done));
    check_stopped(&mut cluster);
}

/// The first signal lets answers end, the second does not.
#[test]
fn a_coordinator_that_is_stopped_twice_ends_its_answers() {
    let mut cluster = Cluster::of(2);
    let mut stream = cluster.stream("/v1/completions", &endless_body(&story(), LONG));
    stream.chunks(3);
    cluster.coordinator.signal("TERM");
    eventually("stopping", || (cluster.endpoint.get("/ready").body["status"] == "stopping").then_some(()));
    cluster.coordinator.signal("TERM");
    let (_, end) = stream.rest();
    let Event::Error(error) = end else { panic!("{end:?}") };
    assert!(error["error"]["message"].as_str().unwrap().contains("the server is stopping"), "{error}");
    check_stopped(&mut cluster);
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
