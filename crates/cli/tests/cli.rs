//! The verbs as people and scripts use them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};
use support::oracle::{conversation, oracle};
use support::{Cluster, MAX_ANSWER, PATIENCE, abacus, eventually, run, run_with_input};

fn parsed(args: &[&str]) -> Value {
    serde_json::from_str(&run(args).ok()).unwrap()
}

#[test]
fn every_verb_explains_itself() {
    for verb in ["serve", "join", "leave", "chat", "status", "inspect", "certify", "plan", "ticket", "doctor", "bench"]
    {
        for help in ["--help", "-h"] {
            assert!(run(&[verb, help]).ok().contains(&format!("Usage: brigade {verb}")), "{verb}");
        }
        assert!(run(&["--help"]).ok().contains(&format!("  {verb} ")), "{verb}");
    }
    assert_eq!(run(&["--version"]).ok().trim(), concat!("brigade ", env!("CARGO_PKG_VERSION")));
    for wrong in [&[][..], &["nonsense"], &["serve", "--nonsense"], &["serve", "--memory", "much"]] {
        let ended = run(wrong);
        assert!(ended.code == Some(2) && !ended.stderr.is_empty(), "{wrong:?}: {ended:?}");
    }
}

#[test]
fn inspect_tells_what_is_in_a_file() {
    let abacus = abacus();
    let path = abacus.to_str().unwrap();
    let report = parsed(&["inspect", path, "--json"]);
    let expected = json!({
        "name": "abacus", "architecture": "llama", "unsupported": null, "quantisation": "F16", "layers": 8,
        "embedding_length": 256, "vocabulary": 1024, "context": 1024, "experts": 0, "tied_head": false,
        "kv_bytes_per_token": 4096, "cut_points": [1, 2, 3, 4, 5, 6, 7],
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&report[key], value, "{key}");
    }
    assert_eq!(report["bytes_per_layer"].as_array().unwrap().len(), 8);
    assert!(report.get("tensors").is_none());
    let tensors = parsed(&["inspect", path, "--json", "--tensors"])["tensors"].as_array().unwrap().clone();
    let embedding = tensors.iter().find(|tensor| tensor["name"] == "token_embd.weight").unwrap();
    assert_eq!(embedding["dims"], json!([256, 1024]));
    let text = run(&["inspect", path, "--tensors"]).ok();
    assert!(text.contains("cut points     1-7") && text.contains("blk.7.ffn_down.weight"), "{text}");
}

#[test]
fn status_shows_the_cluster() {
    let cluster = Cluster::of(2);
    let [coordinator, worker] = ["a", "w0"].map(|node| cluster.state_dir(node));
    let [coordinator, worker] = [&coordinator, &worker].map(|dir| dir.to_str().unwrap());
    // So that there is something to measure.
    (0..3).for_each(|_| cluster.check_answer());

    let id_len = |value: &Value| value.as_str().map_or(0, str::len);
    let status = eventually("measurements", || {
        let status = parsed(&["status", "--state-dir", coordinator, "--json"]);
        let pass_ms = |i: usize| status["nodes"][i]["pass_ms"].as_f64().unwrap();
        let measured = pass_ms(0) > 0.0 && pass_ms(1) > 0.0 && status["hop_us_p50"].as_f64().unwrap() > 0.0;
        (measured && status["running"] == 0).then_some(status)
    });
    let expected = json!({
        "model": "abacus", "n_layers": 8, "state": "ready", "context": 1024, "parallel": 4, "waiting": 0,
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&status[key], value, "{key}");
    }
    // The upper half is the coordinator's term.
    assert_eq!(status["epoch"].as_u64().unwrap(), 1);
    assert_eq!((id_len(&status["coordinator"]), id_len(&status["model_id"])), (64, 64), "{status}");
    assert!(status["tokens_generated"].as_u64().unwrap() >= 6 && status["tokens_per_second"].as_f64().unwrap() > 0.0);
    let nodes = status["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 2);
    for (node, (name, role)) in nodes.iter().zip([("w0", "worker"), ("a", "coordinator")]) {
        assert_eq!((&node["name"], &node["role"], &node["state"]), (&json!(name), &json!(role), &json!("ready")));
        assert_eq!((&node["connected"], &node["loaded"], &node["threads"]), (&json!(true), &json!(1.0), &json!(1)));
        assert_eq!(id_len(&node["id"]), 64);
        let [stage, resident, offered] =
            ["stage", "resident", "offered"].map(|kind| node[format!("memory_{kind}")].as_u64().unwrap());
        assert!(1 << 20 < stage && stage < offered && 1 << 20 < resident, "{node}");
        let port = node["address"].as_str().unwrap().parse::<std::net::SocketAddr>().unwrap().port();
        assert!(port > 0);
    }
    assert!(nodes[0]["rtt_ms"].as_f64().unwrap() > 0.0);
    assert_eq!(nodes[0]["layers"][1], nodes[1]["layers"][0], "one stage begins where the other ends");

    let text = run(&["status", "--state-dir", coordinator]).ok();
    assert!(text.starts_with("abacus: ready\n0 of 4 sessions run"), "{text}");
    assert!(text.lines().any(|line| line.starts_with("w0 ") && line.contains(" worker ")), "{text}");
    // Measurements change from one look to the next; who is here does not.
    let names =
        |text: &str| text.lines().filter_map(|line| line.split(' ').next().map(str::to_owned)).collect::<Vec<_>>();
    assert_eq!(names(&text), names(&run(&["status", "--url", cluster.url()]).ok()), "found and told are one");

    let text = run(&["status", "--state-dir", worker]).ok();
    let id = status["coordinator"].as_str().unwrap();
    assert!(text.contains(&format!("worker of {}", &id[..8])) && text.contains("layers  0.."), "{text}");
    let report = parsed(&["status", "--state-dir", worker, "--json"]);
    assert_eq!((&report["state"], &report["connected"]), (&json!("running"), &json!(true)), "{report}");

    cluster.check_answer();
}

/// The findings of a node by name, of what `doctor --json` prints.
fn findings<'a>(examination: &'a Value, name: &str) -> Vec<&'a Value> {
    let nodes = examination["nodes"].as_array().unwrap();
    let node = nodes.iter().find(|node| node["name"] == name).unwrap_or_else(|| panic!("no {name} in {examination}"));
    node["findings"].as_array().unwrap().iter().collect()
}

#[test]
fn doctor_examines_every_node_from_any_node() {
    let cluster = Cluster::of(2);
    cluster.check_answer();
    let [coordinator, worker] = ["a", "w0"].map(|node| cluster.state_dir(node));
    let [coordinator, worker] = [&coordinator, &worker].map(|dir| dir.to_str().unwrap());
    let places = [["--state-dir", coordinator], ["--state-dir", worker], ["--url", cluster.url()]];
    for place in places {
        let found = parsed(&[&["doctor", "--json"], &place[..]].concat());
        assert_eq!(found["nodes"].as_array().unwrap().len(), 2, "{found}");
        for (name, checks) in [("a", ["memory", "disk", "model"]), ("w0", ["memory", "disk", "clock"])] {
            let findings = findings(&found, name);
            assert!(findings.iter().all(|finding| finding["severity"] != "fail"), "{findings:?}");
            for check in checks {
                let finding = findings.iter().find(|finding| finding["check"] == check);
                assert!(finding.is_some_and(|finding| finding["detail"].is_string()), "{check} in {findings:?}");
            }
        }
        let text = run(&[&["doctor", "--all"], &place[..]].concat()).ok();
        assert!(text.contains("a, coordinator\n") && text.contains("w0, worker\n"), "{text}");
    }
    // What only the process that looks can tell is said of the node that it is beside.
    for (dir, name) in [(coordinator, "a"), (worker, "w0")] {
        let found = parsed(&["doctor", "--json", "--state-dir", dir]);
        assert!(findings(&found, name).iter().any(|finding| finding["check"] == "loopback"), "{found}");
    }
    cluster.check_answer();
}

#[test]
fn status_knows_a_worker_that_was_killed() {
    let mut cluster = Cluster::of(2);
    cluster.workers[0].kill();
    let ended = run(&["status", "--state-dir", cluster.state_dir("w0").to_str().unwrap()]);
    assert!(ended.code == Some(1) && ended.stderr.contains("no node runs with"), "{ended:?}");
}

#[test]
fn a_worker_that_is_asked_to_leave_ends_and_others_have_its_layers() {
    let mut cluster = Cluster::of(3);
    let [coordinator, worker] = ["a", "w0"].map(|node| cluster.state_dir(node));
    let leave = |dir: &std::path::Path| run(&["leave", "--state-dir", dir.to_str().unwrap(), "--timeout", "15s"]);
    let refused = leave(&coordinator);
    assert!(refused.code == Some(1) && refused.stderr.contains("is the coordinator"), "{refused:?}");
    assert!(cluster.coordinator.ended().is_none());

    let said = leave(&worker).ok();
    assert!(said.contains("was asked to leave\nit has left after "), "{said}");
    assert_eq!(cluster.workers[0].wait().code(), Some(0));
    assert_eq!(cluster.workers[0].stderr(), "");
    cluster.wait_placed_on(&["a", "w1"]);
    cluster.check_answer();
    let refused = leave(&worker);
    assert!(refused.code == Some(1) && refused.stderr.contains("no node runs with"), "{refused:?}");
}

#[test]
fn doctor_finds_a_lost_coordinator() {
    let mut cluster = Cluster::of(2);
    cluster.coordinator.kill();
    for node in ["a", "w0"] {
        let ended = run(&["doctor", "--state-dir", cluster.state_dir(node).to_str().unwrap(), "--json"]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        let found: Value = serde_json::from_str(&ended.stdout).unwrap();
        let [machine] = &found["nodes"].as_array().unwrap()[..] else { panic!("{found}") };
        assert_eq!(machine["role"], "this machine", "it is examined all the same");
        let findings = machine["findings"].as_array().unwrap();
        assert_eq!(findings[0]["severity"], "fail", "the worst is first");
        assert!(findings[1]["severity"] != "fail" && findings[0]["fix"] != "", "{findings:?}");
        assert!(ended.stderr.starts_with("brigade: 1 of "), "{ended:?}");
    }
}

#[test]
fn chat_answers_once_or_line_by_line() {
    let cluster = Cluster::of(2);
    let state = cluster.state_dir("a");
    let state = state.to_str().unwrap();
    let limit = MAX_ANSWER.to_string();
    let chat = ["chat", "--state-dir", state, "--max-tokens", &limit];

    let (first, second) = ("What is 17 + 25?", "What is 8 + 5?");
    let answer = oracle().chat(first).text.clone();
    assert_eq!(run(&[&chat[..], &[first]].concat()).ok(), format!("{answer}\n"));

    let prompt = oracle().tokens(&conversation(&[first, &answer, second]));
    let then = oracle().generate(&prompt, MAX_ANSWER, false).text.clone();
    let said = run_with_input(&chat, &format!("{first}\n\n{second}\n")).ok();
    assert_eq!(said, format!("{answer}\n{then}\n"), "the second turn knows of the first");
    assert_eq!(run_with_input(&chat, "").ok(), "");

    let long = "seven eight ".repeat(600);
    let ended = run(&[&chat[..], &[&long]].concat());
    assert!(ended.code == Some(1) && ended.stderr.contains("the prompt has"), "{ended:?}");
}

/// `brigade serve | head -1`: the reader that goes is no error.
#[test]
fn a_closed_pipe_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().to_str().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_brigade"))
        .args(["serve", "--state-dir", state, "--port", "0", "--listen", "127.0.0.1:0", "--threads", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut reader = BufReader::with_capacity(1, child.stdout.take().unwrap());
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("model "), "{line}");
    drop(reader);
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));

    let mut child = Command::new(env!("CARGO_BIN_EXE_brigade"))
        .args(["inspect", "--tensors", abacus().to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}
