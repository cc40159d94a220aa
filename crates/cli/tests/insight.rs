//! What operators see: `/metrics`, and what became of a request.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use brigade_base::Token;
use serde_json::{Value, json};
use support::{Cluster, Event, Metrics, Setup, endless_body, eventually};

const PLAIN: &str = "/v1/completions";

/// Tokens of the prompts and answers that are counted here.
const N_PROMPT: usize = 50;
const N_ANSWER: u32 = 12;

/// Prompts that look random, without a beginning in common.
fn prompt(i: Token) -> Vec<Token> {
    (0..N_PROMPT as Token).map(|at| (at * 7 + i * 101 + at * at * 3) % 1024).collect()
}

/// What was counted once `n` requests have ended: their callers hear that a moment before.
fn counted(cluster: &Cluster, n: f64) -> Metrics {
    eventually("the end of all requests", || {
        let metrics = cluster.metrics();
        let n_ended = if metrics.tells("request_success") { metrics.get("request_success_total") } else { 0.0 };
        (n_ended == n && metrics.get("num_requests_running") == 0.0).then_some(metrics)
    })
}

/// Names of the nodes in the order of the ring, the coordinator last.
fn ring(cluster: &Cluster) -> Vec<String> {
    cluster.placement().into_iter().map(|(name, _)| name).collect()
}

#[test]
fn counters_tell_what_was_done() {
    let cluster = Cluster::of(3);
    let before = counted(&cluster, 0.0);
    assert_eq!(before.labelled("build_info", &[("version", env!("CARGO_PKG_VERSION"))]), 1.0);
    assert_eq!(before.get("epoch"), 1.0);
    for i in 0..2 {
        cluster.complete(&endless_body(&prompt(i), N_ANSWER));
    }
    // The first prompt once more, of which all but two tokens are known.
    let reply = cluster.complete(&endless_body(&prompt(0), N_ANSWER));
    let n_cached = N_PROMPT as f64 - 2.0;
    assert_eq!(reply["usage"]["prompt_tokens_details"]["cached_tokens"], N_PROMPT - 2);

    let metrics = counted(&cluster, 3.0);
    let (n_prompt, n_answer) = (3.0 * N_PROMPT as f64, 3.0 * f64::from(N_ANSWER));
    let expected = [
        ("prompt_tokens_total", n_prompt),
        ("generation_tokens_total", n_answer),
        ("prefix_cache_queries_total", n_prompt),
        ("prefix_cache_hits_total", n_cached),
        ("num_preemptions_total", 0.0),
        ("time_to_first_token_seconds_count", 3.0),
        ("inter_token_latency_seconds_count", n_answer - 3.0),
        ("time_per_output_token_seconds_count", 3.0),
        ("request_queue_time_seconds_count", 3.0),
        ("request_prefill_time_seconds_count", 3.0),
        ("request_decode_time_seconds_count", 3.0),
        ("e2e_request_latency_seconds_count", 3.0),
        ("request_prompt_tokens_sum", n_prompt),
        ("request_generation_tokens_sum", n_answer),
        ("num_requests_waiting", 0.0),
        ("kv_cache_capacity_tokens", 4.0 * 1024.0),
    ];
    for (name, value) in expected {
        assert_eq!(metrics.get(name), value, "{name}");
    }
    assert_eq!(metrics.labelled("request_success_total", &[("finished_reason", "length")]), 3.0);
    // The last token of an answer is chosen and never computed.
    let n_rows = n_prompt - n_cached + n_answer - 3.0;
    let names = ring(&cluster);
    for (stage, name) in names.iter().enumerate() {
        let labels = [("stage", &stage.to_string()[..]), ("node", &name[..])];
        let more = |of: &str| metrics.labelled(of, &labels) - before.labelled(of, &labels);
        assert_eq!(more("stage_rows_total"), n_rows, "{name}");
        assert_eq!(more("stage_rows_per_pass_sum"), n_rows, "{name}");
        assert!(more("stage_busy_seconds_total") > 0.0, "{name}");
    }
    eventually("bytes on all links", || {
        let metrics = cluster.metrics();
        let bytes = |from: usize| {
            let labels = [("from", &names[from][..]), ("to", &names[(from + 1) % names.len()][..])];
            metrics.labelled("link_bytes_total", &labels)
        };
        // Each row travels as numbers of four bytes, 256 of them.
        (0..names.len()).all(|from| bytes(from) >= n_rows * 1024.0).then_some(())
    });
    eventually("round trips", || {
        let metrics = cluster.metrics();
        ["w0", "w1"].into_iter().all(|node| metrics.labelled("node_rtt_seconds", &[("node", node)]) > 0.0).then_some(())
    });
    assert!(metrics.get("hop_seconds_count") > 0.0);
    let answered = metrics.labelled("http_requests_total", &[("route", PLAIN), ("status", "200")]);
    assert_eq!(answered, 3.0);
}

#[test]
fn gauges_tell_how_things_stand() {
    let cluster = Setup::of(2).parallel(1).start();
    let mut stream = cluster.stream(PLAIN, &endless_body(&prompt(0), 900));
    stream.chunks(1);
    let waits = cluster.stream(PLAIN, &endless_body(&prompt(1), 900));
    eventually("one that runs and one that waits", || {
        let metrics = cluster.metrics();
        let now = (metrics.get("num_requests_running"), metrics.get("num_requests_waiting"));
        (now == (1.0, 1.0) && metrics.get("kv_cache_tokens") >= N_PROMPT as f64).then_some(())
    });
    let usage = cluster.metrics().get("kv_cache_usage_perc");
    assert!(usage > 0.0 && usage <= 1.0, "{usage}");
    drop((stream, waits));
    let metrics = counted(&cluster, 2.0);
    assert_eq!(metrics.labelled("request_success_total", &[("finished_reason", "abort")]), 2.0);
    assert_eq!(metrics.get("e2e_request_latency_seconds_count"), 0.0, "nobody had an answer in full");
}

#[test]
fn metrics_and_traces_are_for_those_with_a_key() {
    let cluster = Setup::of(1).key("first").serve(&["--api-key", "second"]).start();
    let reply = cluster.endpoint.post(PLAIN, &endless_body(&prompt(0), N_ANSWER));
    let path = format!("/debug/requests/{}", reply.request_id.unwrap());
    let ask = |key, path: &str| cluster.endpoint.with_key(key).get(path);
    for path in ["/metrics", &path] {
        assert_eq!(ask(None, path).status, 401);
        assert_eq!(ask(Some("third"), path).status, 401);
        assert_eq!(ask(Some("first"), path).status, 200);
    }
    assert_eq!(ask(Some("second"), "/metrics").status, 200);
    let unknown = ask(Some("second"), "/debug/requests/cmpl-0");
    let others = ask(Some("second"), &path);
    for reply in [&unknown, &others] {
        assert_eq!((reply.status, reply.code()), (404, "request_not_found"), "{reply:?}");
    }
    let said = |reply: &support::Reply| reply.message().split('`').step_by(2).collect::<String>();
    assert_eq!(said(&others), said(&unknown), "nothing tells that there is one");
}

#[test]
fn a_request_has_one_name_in_all_places() {
    let cluster = Cluster::of(1);
    let reply = cluster.endpoint.post(PLAIN, &endless_body(&prompt(0), 2));
    assert_eq!(reply.request_id.as_deref(), reply.body["id"].as_str());
    assert_eq!(cluster.trace_of_done(&reply.request_id.unwrap())["id"], reply.body["id"]);
    let mut stream = cluster.stream(PLAIN, &endless_body(&prompt(1), 5));
    let mut ids = Vec::new();
    while let Event::Chunk(chunk) = stream.event() {
        ids.push(chunk["id"].as_str().unwrap().to_owned());
    }
    ids.dedup();
    let [id] = &ids[..] else { panic!("{ids:?}") };
    assert_eq!(cluster.trace_of_done(id)["completion_tokens"], 5);
    let refused = cluster.endpoint.post(PLAIN, &json!({"prompt": "a", "priority": "soon"}));
    assert_eq!(refused.status, 400);
    assert!(refused.request_id.is_some_and(|id| id.starts_with("cmpl-") && !ids.contains(&id)));
}

/// Each pass of a request with its way through all stages.
#[test]
fn a_trace_shows_each_pass_and_each_stage() {
    let cluster = Cluster::of(3);
    let reply = cluster.complete(&endless_body(&prompt(0), N_ANSWER));
    let trace = cluster.trace_of_done(reply["id"].as_str().unwrap());
    let expected = json!({
        "id": reply["id"], "state": "done", "finish": "length", "priority": 0, "prompt_tokens": N_PROMPT,
        "cached_tokens": 0, "completion_tokens": N_ANSWER, "preemptions": 0, "preempted_ms": 0.0, "passes_left_out": 0,
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(trace[field], *value, "{field}");
    }
    let times = ["queued_ms", "first_token_ms", "total_ms"].map(|name| trace[name].as_f64().unwrap());
    assert!(times.is_sorted(), "{times:?}");

    let ring = ring(&cluster);
    assert_eq!(ring.len(), 3);
    let passes = trace["passes"].as_array().unwrap();
    let of_kind = |kind: &str| -> Vec<&Value> { passes.iter().filter(|pass| pass["kind"] == kind).collect() };
    let n_rows = |passes: &[&Value]| passes.iter().map(|pass| pass["rows"].as_u64().unwrap()).sum::<u64>();
    let (prefill, decode) = (of_kind("prefill"), of_kind("decode"));
    assert_eq!(n_rows(&prefill), N_PROMPT as u64);
    assert_eq!((decode.len(), n_rows(&decode)), (N_ANSWER as usize - 1, u64::from(N_ANSWER) - 1));
    for pass in passes {
        assert_eq!(pass["rows"], pass["pass_rows"], "nobody else was there");
        let stages = pass["stages"].as_array().unwrap();
        let names: Vec<&str> = stages.iter().map(|stage| stage["node"].as_str().unwrap()).collect();
        assert_eq!(names, ring);
        assert!(stages.iter().enumerate().all(|(i, stage)| stage["stage"] == i && stage["frames"] == 1), "{pass}");
        assert!(stages.iter().all(|stage| stage["compute_us"].as_u64().unwrap() > 0), "{pass}");
    }
    let numbers: Vec<u64> = passes.iter().map(|pass| pass["pass"].as_u64().unwrap()).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
}

/// Who looks while an answer is in the making sees how far it is.
#[test]
fn a_trace_is_there_before_the_end() {
    let cluster = Setup::of(2).parallel(1).start();
    let mut stream = cluster.stream(PLAIN, &endless_body(&prompt(0), 900));
    let Event::Chunk(chunk) = stream.event() else { panic!("no beginning") };
    let id = chunk["id"].as_str().unwrap();
    let trace = cluster.trace(id);
    assert_eq!((&trace["state"], &trace["finish"]), (&json!("running"), &Value::Null));
    let before = trace["completion_tokens"].as_u64().unwrap();
    eventually("another token", || (cluster.trace(id)["completion_tokens"].as_u64().unwrap() > before).then_some(()));
    drop(stream);
    let trace = cluster.trace_of_done(id);
    assert_eq!(trace["finish"], "abort");
    assert!(trace["completion_tokens"].as_u64().unwrap() < 900, "{trace}");
}
