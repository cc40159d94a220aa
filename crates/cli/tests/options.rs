//! What a model is served with: another storage of its KV cache, and LoRA adapters. Answers are those of one machine.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs::File;
use std::path::{Path, PathBuf};

use brigade_base::{KvType, KvTypes, Pooling};
use brigade_gguf::{Builder, GgmlType, Metadata, ModelFile};
use brigade_plan::COMPUTE_FLOOR;
use serde_json::{Value, json};
use support::encoder::TextOracle;
use support::oracle::Oracle;
use support::{Cluster, Setup, abacus, chat_body, endless_body, run};

const QUESTIONS: [&str; 4] = ["12+30=", "Reverse the word brigade.", "Count from 3 to 9.", "Tell me a story."];

/// Compares answers and the probabilities of their tokens with the oracle's.
fn check(cluster: &Cluster, oracle: &mut Oracle) -> Vec<String> {
    let mut texts = Vec::new();
    for question in QUESTIONS {
        let expected = oracle.chat(question);
        let reply = cluster.endpoint.post("/v1/chat/completions", &chat_body(question)).ok();
        assert_eq!(reply["choices"][0]["message"]["content"], json!(expected.text), "{question:?}");
        texts.push(expected.text.clone());
    }
    let prompt: Vec<_> = (0..300).map(|i| (i * 7919 + i * i * 31) % 1000 + 10).collect();
    let expected = oracle.generate(&prompt, 40, true);
    let mut body = endless_body(&prompt, 40);
    body["logprobs"] = 1.into();
    let reply = cluster.complete(&body);
    assert_eq!(reply["choices"][0]["text"], json!(expected.text));
    let logprobs = reply["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    for (found, expected) in logprobs.iter().zip(&expected.logprobs) {
        assert!((found.as_f64().unwrap() - expected).abs() < 1e-4);
    }
    texts
}

/// A random adapter for those matrices of abacus, of each layer or behind the last one. A cluster may need it under
/// several names.
fn write_adapter(path: &Path, targets: &[&str], seed: u64) {
    let model = ModelFile::open(abacus()).unwrap();
    let mut metadata = Metadata::new();
    let architecture = model.catalog().metadata().str("general.architecture").unwrap();
    for (key, value) in [("general.architecture", architecture), ("general.type", "adapter"), ("adapter.type", "lora")]
    {
        metadata.set(key, value);
    }
    metadata.set("adapter.lora.alpha", 8.0f32);
    let mut builder = Builder::new(&metadata);
    let is_target = |name: &str| targets.iter().any(|end| name == *end || name.ends_with(&format!(".{end}")));
    for tensor in model.catalog().tensors().iter().filter(|tensor| is_target(&tensor.name)) {
        builder.tensor(format!("{}.lora_a", tensor.name), &[tensor.dims[0], 4], GgmlType::F32).unwrap();
        builder.tensor(format!("{}.lora_b", tensor.name), &[4, tensor.dims[1]], GgmlType::F32).unwrap();
    }
    let mut state = seed;
    let fill = |_: usize, _: u64, bytes: &mut [u8]| {
        for element in bytes.as_chunks_mut::<4>().0 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *element = (0.05 * ((state >> 40) as f32 / (1 << 23) as f32 - 1.0)).to_le_bytes();
        }
        Ok(())
    };
    builder.write(&mut File::create(path).unwrap(), fill).unwrap();
}

fn adapters(dir: &Path) -> [PathBuf; 2] {
    let [one, other] = ["one.gguf", "other.gguf"].map(|name| dir.join(name));
    write_adapter(&one, &["attn_q.weight", "attn_v.weight", "ffn_down.weight"], 1);
    write_adapter(&other, &["attn_q.weight", "output.weight"], 2);
    [one, other]
}

#[test]
fn a_cache_in_blocks_is_the_same_on_any_number_of_nodes() {
    let kv = KvTypes { k: KvType::Q8_0, v: KvType::Q4_0 };
    let mut oracle = Oracle::with(&abacus(), &[], kv);
    for n_nodes in [1, 3] {
        let cluster = Setup::of(n_nodes).serve(&["--cache-type-k", "q8_0", "--cache-type-v", "q4_0"]).start();
        check(&cluster, &mut oracle);
        let status = cluster.status();
        assert_eq!(status["kv"], json!({"k": "q8_0", "v": "q4_0"}));
        let workers = status["nodes"].as_array().unwrap().iter().filter(|node| node["role"] == "worker");
        for worker in workers {
            let bytes = |key: &str| worker[key].as_f64().unwrap();
            let predicted = bytes("memory_predicted") - COMPUTE_FLOOR as f64;
            let error = predicted / bytes("memory_stage") - 1.0;
            assert!(error.abs() < 0.05, "{predicted} bytes were predicted: {worker}");
        }
    }
}

#[test]
fn an_adapter_is_applied_on_every_node() {
    let dir = tempfile::tempdir().unwrap();
    let [one, _] = adapters(dir.path());
    let mut oracle = Oracle::with(&abacus(), &[(&one, 6.0)], KvTypes::default());
    let given = format!("{}:6", one.display());
    for n_nodes in [1, 3] {
        let cluster = Setup::of(n_nodes).serve(&["--lora", &given]).start();
        let texts = check(&cluster, &mut oracle);
        assert_eq!(cluster.status()["adapters"], json!(["one:6"]));
        let mut plain = Oracle::of(&abacus());
        assert!(QUESTIONS.iter().zip(&texts).any(|(question, text)| plain.chat(question).text != *text));
    }
}

#[test]
fn several_adapters_are_the_same_on_any_number_of_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let given = adapters(dir.path()).map(|path| path.display().to_string());
    let answers = |n_nodes: usize, given: &[&str]| -> Vec<Value> {
        let args: Vec<&str> = given.iter().flat_map(|adapter| ["--lora", adapter]).collect();
        let cluster = Setup::of(n_nodes).serve(&args).start();
        let prompts = [(100..400).collect::<Vec<_>>(), vec![5, 6, 7]];
        let ask = |prompt: &Vec<i32>| {
            let mut body = endless_body(prompt, 30);
            body["logprobs"] = 1.into();
            cluster.complete(&body)["choices"][0]["logprobs"]["token_logprobs"].clone()
        };
        prompts.iter().map(ask).collect()
    };
    let both = [given[0].as_str(), given[1].as_str()];
    let expected = answers(1, &both);
    assert_eq!(answers(3, &both), expected);
    assert_ne!(answers(1, &both[..1]), expected);
}

/// A stage that pools has no head to adapt; what adapts layers as well is applied there.
#[test]
fn what_adapts_the_head_changes_no_vector() {
    let dir = tempfile::tempdir().unwrap();
    let ([_, both], head) = (adapters(dir.path()), dir.path().join("head.gguf"));
    write_adapter(&head, &["output.weight"], 3);
    let texts = ["hello world", "What is 12 + 30?"];
    for (adapter, pooling, n_nodes) in [(&both, Pooling::Mean, 1), (&both, Pooling::Last, 3), (&head, Pooling::Last, 1)]
    {
        let mut oracle = TextOracle::with(&abacus(), &[(adapter, 4.0)], pooling);
        let mut plain = TextOracle::of(&abacus(), pooling);
        let args = ["--pooling", &pooling.to_string(), "--lora", &format!("{}:4", adapter.display())];
        let cluster = Setup::of(n_nodes).serve(&args).start();
        assert!(cluster.coordinator.line("lora ").contains("does nothing"));
        for text in texts {
            let tokens = oracle.tokens(text);
            let expected = oracle.unit(&tokens);
            assert_eq!(plain.unit(&tokens) == expected, adapter == &head);
            let reply = cluster.endpoint.post("/v1/embeddings", &json!({"model": "default", "input": text})).ok();
            let values = reply["data"][0]["embedding"].as_array().unwrap().iter();
            let found: Vec<f32> = values.map(|value| value.as_f64().unwrap() as f32).collect();
            assert_eq!(found, expected, "{pooling} on {n_nodes}");
        }
    }
}

#[test]
fn what_cannot_be_used_is_said_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let serve = |args: &[&str]| {
        let state = dir.path().join("state");
        let own = ["serve", "--state-dir", state.to_str().unwrap(), "--port", "0", "--listen", "127.0.0.1:0"];
        run(&[&own, args].concat())
    };
    let model = abacus().display().to_string();
    for (args, code, words) in [
        (["--lora", model.as_str()], 1, "it is no adapter"),
        (["--lora", "missing.gguf"], 1, "missing.gguf"),
        (["--lora", "x.gguf:0"], 2, "write FILE or FILE:SCALE"),
        (["--cache-type-k", "q5_1"], 2, "f16, q8_0 and q4_0"),
    ] {
        let ended = serve(&args);
        assert_eq!(ended.code, Some(code), "{args:?}: {ended:?}");
        assert!(ended.stderr.contains(words), "{args:?}: {ended:?}");
    }
}

#[test]
fn a_smaller_cache_is_planned_for() {
    let plan = |args: &[&str]| {
        let ended = run(&[&["plan", "llama-3.3-70b", "--node", "a=96GiB", "--json"], args].concat());
        serde_json::from_str::<Value>(&ended.stdout).map_err(|_| ended.stderr)
    };
    let kv = |args: &[&str]| plan(args).unwrap()["plan"]["stages"][0]["memory"]["kv"].as_u64().unwrap();
    let all = kv(&[]);
    assert_eq!(kv(&["--cache-type-k", "q8_0", "--cache-type-v", "q8_0"]), all / 32 * 17);
    assert_eq!(kv(&["--cache-type-k", "q4_0"]), all / 2 + all / 64 * 9);
    let why = plan(&["--context", "65536", "--parallel", "4"]).unwrap_err();
    assert!(why.contains("With --cache-type-k q8_0 --cache-type-v q8_0 it would fit"), "{why}");
}
