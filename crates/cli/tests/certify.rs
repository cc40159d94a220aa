//! `brigade certify`: verdicts in words, in JSON and as exit codes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs::File;
use std::path::{Path, PathBuf};

use brigade_gguf::{Array, Builder, GgmlType, Metadata, ModelFile, Value as Metadatum};
use serde_json::Value;
use support::{abacus, quantised_abacus, run};

/// The small model as one of another architecture, without its tokenizer.
fn as_architecture(name: &str, dir: &Path) -> PathBuf {
    as_architecture_with(name, dir, &[], &[])
}

/// The same with more metadata, and more tensors of 32 ones in each layer.
fn as_architecture_with(name: &str, dir: &Path, keys: &[(&str, Metadatum)], tensors: &[&str]) -> PathBuf {
    let file = ModelFile::open(abacus()).unwrap();
    let mut metadata = Metadata::new();
    for (key, value) in file.catalog().metadata().iter() {
        if let Some(rest) = key.strip_prefix("llama.") {
            metadata.set(format!("{name}.{rest}"), value.clone());
        }
    }
    metadata.set("general.architecture", name);
    metadata.set("tokenizer.ggml.model", "no_vocab");
    metadata.set(format!("{name}.vocab_size"), 1024);
    keys.iter().for_each(|(key, value)| metadata.set(format!("{name}.{key}"), value.clone()));
    let mut builder = Builder::new(&metadata);
    for tensor in file.catalog().tensors() {
        builder.tensor(&tensor.name, &tensor.dims, tensor.ty).unwrap();
    }
    for (layer, tensor) in (0..8).flat_map(|layer| tensors.iter().map(move |tensor| (layer, tensor))) {
        builder.tensor(format!("blk.{layer}.{tensor}"), &[32], GgmlType::F32).unwrap();
    }
    let n_tensors = file.catalog().tensors().len();
    let ones = |bytes: &mut [u8]| {
        bytes.as_chunks_mut::<4>().0.iter_mut().for_each(|one| *one = 1f32.to_le_bytes());
        Ok(())
    };
    let path = dir.join(format!("{name}.gguf"));
    let mut out = File::create(&path).unwrap();
    let read = |idx: usize, offset: u64, bytes: &mut [u8]| match idx < n_tensors {
        true => file.read_at(idx, offset, bytes),
        false => ones(bytes),
    };
    builder.write(&mut out, read).unwrap();
    path
}

/// With one thread, since threads of llama.cpp that wait for each other spin, and other tests run beside this one.
fn certify(path: &Path, args: &[&str]) -> support::Ended {
    run(&[&["certify", path.to_str().unwrap(), "--threads", "1"], args].concat())
}

#[test]
fn a_model_that_is_exact_in_every_cut() {
    let text = certify(&abacus(), &["--tokens", "24"]).ok();
    assert!(text.contains("(llama, 8 layers): exact"), "{text}");
    assert_eq!(text.matches("have the bits of the whole").count(), 4, "{text}");
    let json = certify(&quantised_abacus(), &["--cuts", "all", "--tokens", "16", "--json"]).ok();
    let report: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&report["verdict"], &report["layers"]), (&"exact".into(), &8.into()));
    let runs = report["runs"].as_array().unwrap();
    assert!(runs.len() > 15 && runs.iter().all(|run| run["verdict"] == "exact" && run["other_bits"] == 0));
    assert!(runs.iter().any(|run| run["cuts"].as_array().unwrap().len() == 7), "one layer in each stage");
    assert_eq!(report["stages"][0]["layers"], serde_json::json!([0, 1]));
}

#[test]
fn a_model_without_tokenizer_is_as_good() {
    let dir = tempfile::tempdir().unwrap();
    let text = certify(&as_architecture("llama", dir.path()), &["--cuts", "1"]).ok();
    assert!(text.contains("llama.gguf (llama, 8 layers): exact"), "{text}");
}

#[test]
fn what_is_not_cut_or_not_run_has_an_exit_code_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let whole = certify(&as_architecture("baichuan", dir.path()), &["--tokens", "16"]);
    assert_eq!(whole.code, Some(3), "{whole:?}");
    assert!(whole.stdout.contains("whole only") && whole.stderr.contains("runs whole only"), "{whole:?}");
    let refused = certify(&as_architecture("gptj", dir.path()), &["--json"]);
    assert_eq!(refused.code, Some(4), "{refused:?}");
    let report: Value = serde_json::from_str(&refused.stdout).unwrap();
    assert_eq!((&report["verdict"], &report["architecture"]), (&"refused".into(), &"gptj".into()));
    assert_eq!(report["layers"], 8);
    assert!(report["reason"].as_str().unwrap().contains("gptj"));
}

/// What stages leave out of a header is in that of the whole, which llama.cpp reads: a child survives it first.
#[test]
fn a_header_that_would_end_the_process_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let norms = ["attn_q_norm.weight", "attn_k_norm.weight"];
    let model = |n_deepstack: u32| {
        let sections = Array::of_u32(&[6, 5, 5, 0]);
        let keys = [("rope.dimension_sections", sections.into()), ("n_deepstack_layers", n_deepstack.into())];
        as_architecture_with("qwen3vl", dir.path(), &keys, &norms)
    };
    let text = certify(&model(2), &["--cuts", "1", "--tokens", "16"]).ok();
    assert!(text.contains("(qwen3vl, 8 layers): exact"), "{text}");
    let bad = certify(&model(100), &["--cuts", "1", "--tokens", "16"]);
    assert!(bad.code == Some(1) && bad.stderr.contains("llama.cpp"), "{bad:?}");
    assert!(!bad.stderr.contains("#1 "), "no backtrace: {bad:?}");
}

/// An adapter of the first matrix of some layers, with values that change what comes out.
fn write_adapter(path: &Path, layers: &[u32], value: f32) {
    let mut metadata = Metadata::new();
    for (key, value) in [("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora")] {
        metadata.set(key, value);
    }
    let mut builder = Builder::new(&metadata);
    for layer in layers {
        builder.tensor(format!("blk.{layer}.attn_q.weight.lora_a"), &[256, 2], GgmlType::F32).unwrap();
        builder.tensor(format!("blk.{layer}.attn_q.weight.lora_b"), &[2, 256], GgmlType::F32).unwrap();
    }
    let fill = |_: usize, offset: u64, bytes: &mut [u8]| {
        for (at, element) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let odd = (offset / 4 + at as u64) % 3;
            *element = (value * (odd as f32 - 1.0)).to_le_bytes();
        }
        Ok(())
    };
    builder.write(&mut File::create(path).unwrap(), fill).unwrap();
}

#[test]
fn a_model_is_examined_with_its_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let [one, other] = ["one,two.gguf", "other.gguf"].map(|name| dir.path().join(name));
    write_adapter(&one, &[0, 3, 7], 0.05);
    write_adapter(&other, &[3, 4], 0.02);
    let [one, other] = [one, other].map(|path| path.to_str().unwrap().to_owned());
    let given = |adapters: &[&str]| {
        let args: Vec<&str> = adapters.iter().flat_map(|adapter| ["--lora", adapter]).collect();
        let json = certify(&abacus(), &[&["--cuts", "3", "--tokens", "16", "--json"], &args[..]].concat()).ok();
        serde_json::from_str::<Value>(&json).unwrap()
    };
    let weights = |report: &Value, layers: [u32; 2]| {
        let stage =
            report["stages"].as_array().unwrap().iter().find(|stage| stage["layers"] == serde_json::json!(layers));
        stage.unwrap_or_else(|| panic!("{report:#}"))["found"]["weights"].as_u64().unwrap()
    };
    let (plain, scaled, both) = (given(&[]), given(&[&format!("{one}:3")]), given(&[&one, &other]));
    for report in [&plain, &scaled, &both] {
        assert_eq!(report["verdict"], "exact", "{report:#}");
        assert_eq!(report["runs"].as_array().unwrap().len(), 4);
        for stage in report["stages"].as_array().unwrap() {
            let total = |of: &str| -> f64 {
                ["weights", "kv", "compute"].iter().map(|part| stage[of][part].as_f64().unwrap()).sum()
            };
            assert!((total("predicted") / total("found") - 1.0).abs() < 0.05, "{stage}");
        }
    }
    // A pair for each of three layers, and for two more.
    let (pair, whole) = (2 * 4 * 2 * 256, [0, 8]);
    assert_eq!(weights(&scaled, whole) - weights(&plain, whole), 3 * pair);
    assert_eq!(weights(&both, whole) - weights(&plain, whole), 5 * pair);
    let wrong = certify(&abacus(), &["--lora", abacus().to_str().unwrap()]);
    assert!(wrong.code == Some(1) && wrong.stderr.contains("it is no adapter"), "{wrong:?}");
}

#[test]
fn wrong_command_lines_and_files() {
    for wrong in [["--cuts", "0"], ["--cuts", "some"], ["--tokens", "3"], ["--tokens", "99999"]] {
        assert_eq!(certify(&abacus(), &wrong).code, Some(2), "{wrong:?}");
    }
    assert_eq!(certify(&abacus(), &["--cache-type-k", "q9_0"]).code, Some(2));
    assert_eq!(certify(Path::new("/nowhere/model.gguf"), &[]).code, Some(1));
}
