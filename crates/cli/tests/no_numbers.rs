//! Weights that are no numbers, as of a broken download: requests fail and say why, and are counted so.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use brigade_gguf::ModelFile;
use serde_json::{Value, json};
use support::{Cluster, Setup, abacus, chat_body};

/// A token with an embedding of NaN in a model.
const BROKEN_TOKEN: u32 = 900;

/// The usual model, but one matrix of its last layer is all NaN.
fn broken_abacus(dir: &Path) -> PathBuf {
    broken_at(dir, "blk.7.ffn_up.weight", |n_bytes| 0..n_bytes)
}

/// The usual model with NaN in some bytes of a tensor.
fn broken_at(dir: &Path, name: &str, place: impl FnOnce(usize) -> Range<usize>) -> PathBuf {
    let mut bytes = fs::read(abacus()).unwrap();
    let file = ModelFile::open(abacus()).unwrap();
    let tensor = file.catalog().tensor(name).unwrap();
    let weights = &mut bytes[tensor.offset as usize..][place(tensor.n_bytes as usize)];
    weights.chunks_exact_mut(2).for_each(|weight| weight.copy_from_slice(&0x7e00_u16.to_le_bytes()));
    let path = dir.join("broken.gguf");
    fs::write(&path, bytes).unwrap();
    path
}

/// That a request fails for its numbers, and is neither counted nor traced as one that was answered.
#[track_caller]
fn check(cluster: &Cluster, path: &str, body: &Value) {
    let before = cluster.metrics().labelled("request_success_total", &[("finished_reason", "error")]);
    let reply = cluster.endpoint.post(path, body);
    assert_eq!(reply.status, 500, "{reply:?}");
    assert!(reply.message().contains("no numbers") && reply.message().contains("brigade certify"), "{reply:?}");
    let trace = cluster.trace_of_done(&reply.request_id.unwrap());
    assert_eq!((&trace["finish"], &trace["completion_tokens"]), (&json!("error"), &json!(0)));
    let metrics = cluster.metrics();
    assert_eq!(metrics.labelled("request_success_total", &[("finished_reason", "error")]), before + 1.0);
    assert_eq!(metrics.labelled("request_success_total", &[("finished_reason", "stop")]), 0.0);
    assert_eq!(metrics.get("e2e_request_latency_seconds_count"), 0.0);
    assert_eq!(metrics.get("prompt_tokens_total"), 0.0);
}

#[test]
fn an_answer_that_has_no_numbers_fails() {
    let dir = tempfile::tempdir().unwrap();
    let model = broken_abacus(dir.path());
    let cluster = Setup::of(2).serve(&[model.to_str().unwrap()]).start();
    check(&cluster, "/v1/completions", &json!({"prompt": "hello"}));
    check(&cluster, "/v1/completions", &json!({"prompt": "hello", "ignore_eos": true, "temperature": 0}));
    check(&cluster, "/v1/chat/completions", &chat_body("hello"));
}

#[test]
fn a_vector_that_has_no_numbers_fails() {
    let dir = tempfile::tempdir().unwrap();
    let model = broken_abacus(dir.path());
    let cluster = Setup::of(1).serve(&[model.to_str().unwrap(), "--pooling", "last"]).start();
    check(&cluster, "/v1/embeddings", &json!({"input": "hello"}));
    check(&cluster, "/v1/embeddings", &json!({"input": ["hello", "you"]}));
}

/// Values that are no numbers before the last stage break the ring. The request that brings them breaks each further
/// ring; it is given up, and all others are answered.
#[test]
fn a_text_that_breaks_each_ring_fails_alone() {
    let dir = tempfile::tempdir().unwrap();
    let row = |n_bytes: usize| {
        let row_bytes = n_bytes / 1024;
        BROKEN_TOKEN as usize * row_bytes..(BROKEN_TOKEN as usize + 1) * row_bytes
    };
    let model = broken_at(dir.path(), "token_embd.weight", row);
    let cluster = Setup::of(2).serve(&[model.to_str().unwrap()]).start();
    let good = json!({"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": true});
    let before = cluster.endpoint.post("/v1/completions", &good);
    let reply = cluster.endpoint.post("/v1/completions", &json!({"prompt": [5, BROKEN_TOKEN, 6], "max_tokens": 4}));
    assert_eq!(reply.status, 500, "{reply:?}");
    let message = reply.message();
    assert!(message.contains("5 times in a row") && message.contains("brigade certify"), "{reply:?}");
    let after = cluster.endpoint.post("/v1/completions", &good);
    assert_eq!((after.status, &after.body["choices"]), (200, &before.body["choices"]), "{after:?}");
}
