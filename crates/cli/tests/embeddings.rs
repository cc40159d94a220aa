//! Models that embed and rank texts: on one node and on several, through any of them, and when one is lost.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::Path;

use brigade_base::Pooling;
use serde_json::{Value, json};
use support::encoder::{N_CTX, TextOracle, write_bert};
use support::{Endpoint, Setup, abacus, chat_body, eventually, run};

const TEXTS: [&str; 5] = ["hello world", "1 2 3", "a", "the quick brown fox", "hello world"];

/// The vectors of a reply, in order.
fn vectors(reply: &Value) -> Vec<Vec<f32>> {
    let data = reply["data"].as_array().unwrap();
    assert!(data.iter().enumerate().all(|(index, item)| item["index"] == index));
    let values =
        |item: &Value| item["embedding"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
    data.iter().map(values).collect()
}

fn embed(endpoint: &Endpoint, input: Value) -> Value {
    endpoint.post("/v1/embeddings", &json!({"model": "default", "input": input})).ok()
}

/// Compares text by text and all at once with the engine, on `n_nodes`.
fn check(model: &Path, n_nodes: usize, pooling: Pooling, args: &[&str]) {
    let mut oracle = TextOracle::of(model, pooling);
    let tokens: Vec<Vec<i32>> = TEXTS.iter().map(|text| oracle.tokens(text)).collect();
    let expected: Vec<Vec<f32>> = tokens.iter().map(|text| oracle.unit(text)).collect();
    let cluster = Setup::of(n_nodes).serve(&[model.to_str().unwrap()]).serve(args).start();
    assert_eq!(cluster.placement().len(), n_nodes);
    let all = embed(&cluster.endpoint, json!(TEXTS));
    assert_eq!(vectors(&all), expected, "{pooling} on {n_nodes}");
    let n_tokens: usize = tokens.iter().map(Vec::len).sum();
    assert_eq!(all["usage"], json!({"prompt_tokens": n_tokens, "total_tokens": n_tokens}));
    for (text, expected) in TEXTS.iter().zip(&expected) {
        assert_eq!(vectors(&embed(&cluster.endpoint, json!(text))), std::slice::from_ref(expected), "{text}");
    }
    assert_eq!(vectors(&embed(&cluster.endpoint, json!(tokens))), expected);
    let asked = cluster.endpoint.post("/v1/chat/completions", &chat_body("hi"));
    assert_eq!((asked.status, asked.code()), (400, "unsupported_model"), "{asked:?}");
}

#[test]
fn a_text_model_embeds_the_same_on_one_node_and_on_three() {
    for n_nodes in [1, 3] {
        check(&abacus(), n_nodes, Pooling::Mean, &["--pooling", "mean"]);
    }
    check(&abacus(), 3, Pooling::Last, &["--pooling", "last"]);
}

#[test]
fn an_encoder_embeds_the_same_on_one_node_and_on_three() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_bert(dir.path(), false);
    for n_nodes in [1, 3] {
        check(&model, n_nodes, Pooling::Mean, &[]);
    }
    check(&model, 2, Pooling::Cls, &["--pooling", "cls"]);
}

#[test]
fn a_text_is_as_long_as_the_model_takes() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_bert(dir.path(), false);
    let cluster = Setup::of(2).layers("3,3").serve(&[model.to_str().unwrap()]).start();
    // One token for each letter, and a mark at each end.
    let text = |n: u32| "a ".repeat(n as usize - 2);
    let reply = embed(&cluster.endpoint, json!(text(N_CTX)));
    assert_eq!(reply["usage"]["prompt_tokens"], N_CTX);
    let refused = cluster.endpoint.post("/v1/embeddings", &json!({"input": ["a", text(N_CTX + 1)]}));
    assert_eq!((refused.status, refused.code()), (400, "context_length_exceeded"), "{refused:?}");
    assert!(refused.message().contains("has 65 tokens, but at most 64"), "{refused:?}");
    let refused = cluster.endpoint.post("/v1/embeddings", &json!({"input": text(50 * N_CTX)}));
    assert!(refused.message().contains("has at least "), "{refused:?}");
}

#[test]
fn documents_are_ranked_alike_on_one_node_and_on_three() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_bert(dir.path(), true);
    let mut oracle = TextOracle::of(&model, Pooling::Rank);
    let query = "what is it";
    let mut expected: Vec<(usize, f32)> =
        TEXTS.iter().enumerate().map(|(at, text)| (at, oracle.score(query, text))).collect();
    expected.sort_by(|a, b| b.1.total_cmp(&a.1));
    for n_nodes in [1, 3] {
        let cluster = Setup::of(n_nodes).serve(&[model.to_str().unwrap()]).start();
        let body = json!({"query": query, "documents": TEXTS, "raw_scores": true});
        let reply = cluster.endpoint.post("/v1/rerank", &body).ok();
        let found = reply["results"].as_array().unwrap().iter();
        let found: Vec<(usize, f32)> = found
            .map(|r| (r["index"].as_u64().unwrap() as usize, r["relevance_score"].as_f64().unwrap() as f32))
            .collect();
        assert_eq!(found, expected, "{n_nodes} nodes");
        let best = cluster.endpoint.post("/v1/rerank", &json!({"query": query, "documents": TEXTS, "top_n": 1})).ok();
        assert_eq!(best["results"][0]["index"], expected[0].0);
        let refused = cluster.endpoint.post("/v1/embeddings", &json!({"input": "a"}));
        assert!(refused.status == 400 && refused.message().contains("/v1/rerank"), "{refused:?}");
    }
}

#[test]
fn any_node_embeds_and_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_bert(dir.path(), true);
    let cluster = Setup::of(2).serve(&[model.to_str().unwrap()]).join(&["--port", "0"]).start();
    let other = Endpoint::new(cluster.workers[0].line("serving ").trim_end_matches("/v1"), None);
    let body = json!({"query": "what", "documents": TEXTS});
    let expected = cluster.endpoint.post("/v1/rerank", &body).ok();
    let found = eventually("an answer of the worker", || {
        Some(other.post("/v1/rerank", &body)).filter(|reply| reply.status == 200)
    });
    assert_eq!(found.body["results"], expected["results"]);
}

/// However many texts it has; its id is that of the answer's header, on any node.
#[test]
fn a_request_is_one_in_metrics_and_traces() {
    let cluster = Setup::of(2).serve(&["--pooling", "last"]).join(&["--port", "0"]).start();
    let other = Endpoint::new(cluster.workers[0].line("serving ").trim_end_matches("/v1"), None);
    // More than are on their way at once, and so few that all of their passes are told.
    let texts: Vec<String> = (0..30).map(|n| format!("What is {n} + {}?", n * 7 % 100)).collect();
    let body = json!({"input": texts});
    let mut n_tokens = 0;
    for (at, endpoint) in [&cluster.endpoint, &other].into_iter().enumerate() {
        let reply = eventually("vectors", || Some(endpoint.post("/v1/embeddings", &body)).filter(|r| r.status == 200));
        let of_request = reply.body["usage"]["prompt_tokens"].as_u64().unwrap();
        n_tokens += of_request;
        let trace = cluster.trace_of_done(&reply.request_id.unwrap());
        let found = ["finish", "texts", "texts_done", "prompt_tokens", "completion_tokens"].map(|name| &trace[name]);
        assert_eq!(found, [&json!("stop"), &json!(30), &json!(30), &json!(of_request), &json!(0)]);
        let rows: u64 = trace["passes"].as_array().unwrap().iter().map(|pass| pass["rows"].as_u64().unwrap()).sum();
        assert_eq!((&trace["passes_left_out"], rows), (&json!(0), of_request));
        let metrics = cluster.metrics();
        assert_eq!(metrics.labelled("request_success_total", &[("finished_reason", "stop")]), 1.0 + at as f64);
        assert_eq!(metrics.get("e2e_request_latency_seconds_count"), 1.0 + at as f64);
        assert_eq!((metrics.get("prompt_tokens_total"), metrics.get("request_prompt_tokens_sum")), {
            (n_tokens as f64, n_tokens as f64)
        });
    }
}

/// The texts that were on their way are embedded on what is left, and none is missing.
#[test]
fn a_worker_may_be_lost() {
    let texts: Vec<String> = (0..300).map(|n| format!("What is {n} + {}?", n * 7 % 100)).collect();
    let mut cluster = Setup::of(3).serve(&["--pooling", "last"]).start();
    let expected = vectors(&embed(&cluster.endpoint, json!(texts)));
    let endpoint = cluster.endpoint.clone();
    let asking = std::thread::spawn(move || embed(&endpoint, json!(texts)));
    eventually("texts on their way", || (cluster.status()["running"] != 0).then_some(()));
    cluster.kill_worker(0);
    assert_eq!(vectors(&asking.join().unwrap()), expected);
    assert_eq!(cluster.placement().len(), 2);
}

/// Nothing that is predicted of generated text is told of a model that generates none, although it was measured.
#[test]
fn no_tokens_are_promised_of_a_model_that_embeds() {
    let cluster = Setup::of(1).serve(&["--pooling", "last", "--optimize", "latency"]).start();
    let said = cluster.coordinator.line("plan ");
    assert!(said.contains("a 0..8") && !said.contains("tokens/s") && !said.contains("first token"), "{said}");
    let status = cluster.status();
    assert!(!status["nodes"][0]["speed"].is_null(), "{status:#}");
    assert!(status["prediction"].is_null() && status["advice"] == json!([]), "{status:#}");
}

/// Nor of a worker that is not worth its place, which is measured as well.
#[test]
fn a_worker_that_embeds_slowly_is_told_without_tokens() {
    let setup = Setup::of(2).serve(&["--pooling", "last", "--optimize", "latency"]).join(&["--throttle", "0.1"]);
    let cluster = setup.start();
    let status = cluster.status();
    assert!(status["nodes"].as_array().unwrap().iter().all(|node| !node["speed"].is_null()), "{status:#}");
    let told = status["explanation"].to_string();
    assert!(told.contains("as prompts are") && told.contains("--spread asks for every node"), "{told}");
    let found = run(&["doctor", "--json", "--url", cluster.url()]).ok();
    assert!(found.contains("round trip") && !found.contains("tokens/s"), "{found}");
    for words in ["token's", "streams together", "times as fast", "of its time"] {
        assert!(!told.contains(words) && !found.contains(words), "{words}: {told} {found}");
    }
}

#[test]
fn what_a_model_cannot_do_ends_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let bert = write_bert(dir.path(), false);
    let check = |model: &Path, pooling: &str, says: &str| {
        let state = dir.path().join("state");
        let args = ["serve", model.to_str().unwrap(), "--state-dir", state.to_str().unwrap(), "--pooling", pooling];
        let ended = run(&[&args[..], &["--port", "0", "--listen", "127.0.0.1:0", "--threads", "1"]].concat());
        assert!(ended.stderr.contains(says), "{ended:?}");
    };
    check(&abacus(), "rank", "no classifier");
    check(&bert, "none", "generates no text");
    check(&bert, "middle", "there are model, none, mean, cls, last and rank");
}
