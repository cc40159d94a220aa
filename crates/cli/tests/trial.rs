//! Models that would end a process end a child of it: headers with hostile numbers, types, shapes and vocabularies.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::{Path, PathBuf};

use brigade_base::{KvTypes, LayerRange};
use brigade_engine::{Stage, StageMemory, StageOptions};
use brigade_gguf::{
    AdapterView, Builder, Catalog, GgmlType, Metadata, ModelFile, StageView, SyntheticTensors, Value, bundle_adapters,
};
use brigade_node::trial::{self, TrialError};
use support::{Setup, abacus, eventually, run};

/// The header of a model in the making.
#[derive(Clone)]
struct Header {
    metadata: Metadata,
    tensors: Vec<(String, Vec<u64>, GgmlType)>,
}

impl Header {
    fn of_abacus() -> Self {
        let file = ModelFile::open(abacus()).unwrap();
        let tensors = file.catalog().tensors().iter().map(|t| (t.name.clone(), t.dims.clone(), t.ty)).collect();
        Self { metadata: file.catalog().metadata().clone(), tensors }
    }

    fn with(&self, key: &str, value: impl Into<Value>) -> Self {
        let mut header = self.clone();
        header.metadata.set(key, value);
        header
    }

    fn without(&self, key: &str) -> Self {
        Self { metadata: self.metadata.filtered(|found, _| found != key), ..self.clone() }
    }

    fn tensor(&self, name: &str, change: impl FnOnce(&mut Vec<u64>, &mut GgmlType)) -> Self {
        let mut header = self.clone();
        let (_, dims, ty) = header.tensors.iter_mut().find(|(found, ..)| found == name).unwrap();
        change(dims, ty);
        header
    }

    fn builder(&self) -> Option<Builder> {
        let mut builder = Builder::new(&self.metadata);
        for (name, dims, ty) in &self.tensors {
            builder.tensor(name.as_str(), dims, *ty).ok()?;
        }
        Some(builder)
    }

    /// As our own reader of headers sees it, if it does.
    fn catalog(&self) -> Option<Catalog> {
        Catalog::parse_header(&self.builder()?.header_bytes()).ok()
    }

    /// A file with weights of zeros.
    fn write(&self, dir: &Path) -> PathBuf {
        let path = dir.join("model.gguf");
        let zeros = |_: usize, _: u64, bytes: &mut [u8]| {
            bytes.fill(0);
            Ok(())
        };
        self.builder().unwrap().write(&mut std::fs::File::create(&path).unwrap(), zeros).unwrap();
        path
    }

    /// What a trial of the first `n_layers` layers finds, where our own rules let it come that far.
    fn attempt(&self, n_layers: u32) -> Option<Result<StageMemory, TrialError>> {
        self.attempt_with(n_layers, None)
    }

    /// The same with adapters for all matrices of layers.
    fn attempt_adapted(&self, n_layers: u32) -> Result<StageMemory, TrialError> {
        let architecture = self.metadata.str("general.architecture").unwrap();
        let mut adapter = Self { metadata: Metadata::new(), tensors: Vec::new() };
        let keys = [("general.architecture", architecture), ("general.type", "adapter"), ("adapter.type", "lora")];
        keys.into_iter().for_each(|(key, value)| adapter.metadata.set(key, value));
        for (name, dims, _) in self.tensors.iter().filter(|(name, dims, _)| name.starts_with("blk.") && dims.len() > 1)
        {
            adapter.tensors.push((format!("{name}.lora_a"), vec![dims[0], 4], GgmlType::F32));
            adapter.tensors.push((format!("{name}.lora_b"), vec![4, dims[1]], GgmlType::F32));
        }
        self.attempt_with(n_layers, Some(&adapter.catalog().unwrap())).unwrap()
    }

    /// The same with an adapter.
    fn attempt_with(&self, n_layers: u32, adapter: Option<&Catalog>) -> Option<Result<StageMemory, TrialError>> {
        let catalog = self.catalog()?;
        let view = StageView::new(&catalog, LayerRange::new(0, n_layers).unwrap()).ok()?;
        enable();
        let bundle = adapter.map(|adapter| bundle_adapters(&catalog, &[(adapter, 1.0)]).unwrap());
        let adapter = bundle.and_then(|bundle| AdapterView::new(&bundle, &catalog, &view).unwrap());
        let result = trial::stage(&view, adapter.as_ref(), &options(&view)).map(Option::unwrap);
        let is_found_out = !matches!(result, Err(TrialError::Untried(_) | TrialError::Late));
        assert!(is_found_out, "{result:?}");
        Some(result)
    }
}

fn enable() {
    trial::enable(env!("CARGO_BIN_EXE_brigade").into());
}

fn options(view: &StageView) -> StageOptions {
    StageOptions {
        n_ctx: 512,
        n_sessions: 2,
        max_rows: 64,
        max_outputs: 2,
        n_threads: 1,
        n_embd: view.n_embd(),
        n_vocab: if view.is_final() { view.n_vocab() } else { 0 },
        hooks: view.hooks(),
        pooling: None,
        kv: KvTypes::default(),
    }
}

#[test]
fn a_trial_finds_what_the_stage_then_takes() {
    let header = Header::of_abacus();
    let catalog = header.catalog().unwrap();
    for n_layers in [4, 8] {
        let found = header.attempt(n_layers).unwrap().unwrap();
        let view = StageView::new(&catalog, LayerRange::new(0, n_layers).unwrap()).unwrap();
        let reader = Box::new(view.reader(std::sync::Arc::new(SyntheticTensors::new(&catalog))));
        let stage = Stage::load(reader, view.n_bytes(), options(&view), &mut |_| true).unwrap();
        assert_eq!(found, stage.memory(), "{n_layers} layers");
    }
}

#[test]
fn hostile_numbers_end_a_child_at_most() {
    let header = Header::of_abacus();
    let keys: Vec<String> = header.metadata.iter().map(|(key, _)| key.to_owned()).collect();
    let mut results = Vec::new();
    for key in keys.iter().filter(|key| key.starts_with("llama.")) {
        let numbers = [0, 1, 3, 33, 1 << 20, u32::MAX].map(Value::U32);
        let floats = [0.0, -1.0, f32::NAN, 1e30].map(Value::F32);
        let others = [Value::Bool(true), Value::I32(-1), Value::U64(u64::MAX)];
        for value in numbers.into_iter().chain(floats).chain(others) {
            results.extend(header.with(key, value).attempt(4));
        }
        results.extend(header.without(key).attempt(4));
    }
    let n_ended = results.iter().filter(|result| matches!(result, Err(TrialError::Ended(_)))).count();
    assert!(results.iter().any(Result::is_ok) && n_ended > 0, "{n_ended} of {} ended their process", results.len());
}

#[test]
fn hostile_types_and_shapes_of_tensors_end_a_child_at_most() {
    let header = Header::of_abacus();
    let mut ends = Vec::new();
    for name in ["attn_norm", "attn_k", "ffn_down"].map(|name| format!("blk.0.{name}.weight")) {
        let name = &name;
        let of_type = GgmlType::all().map(|ty| header.tensor(name, |_, old| *old = ty));
        let twice = header.tensor(name, |dims, _| dims.iter_mut().for_each(|n| *n *= 2));
        ends.extend(
            of_type.chain([twice]).filter_map(|header| header.attempt(4)?.err()).map(|error| error.to_string()),
        );
    }
    assert!(ends.iter().any(|end| end.contains("SIGSEGV")), "{ends:#?}");
    assert!(ends.iter().any(|end| end.contains("unsupported types")), "{ends:#?}");
}

#[test]
fn hostile_vocabularies_end_a_child_at_most() {
    enable();
    let header = Header::of_abacus();
    let keys: Vec<String> = header.metadata.iter().map(|(key, _)| key.to_owned()).collect();
    let attempt = |header: Header| {
        let result = trial::vocabulary(&Builder::new(&header.metadata).header_bytes());
        assert!(!matches!(result, Err(TrialError::Untried(_) | TrialError::Late)), "{result:?}");
        result
    };
    assert_eq!(attempt(header.clone()), Ok(()));
    let mut n_refused = 0;
    for key in keys.iter().filter(|key| key.starts_with("tokenizer.")) {
        n_refused += usize::from(attempt(header.without(key)).is_err());
        for value in [Value::U32(u32::MAX), Value::U32(7), Value::Bool(true), Value::from("gpt-4o")] {
            n_refused += usize::from(attempt(header.with(key, value)).is_err());
        }
    }
    for name in ["llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "none"] {
        drop(attempt(header.with("tokenizer.ggml.model", name)));
    }
    assert!(n_refused > 0);
}

/// As wide as models of eight billion weights: more than four gigabytes that are not there.
#[test]
fn a_large_model_is_tried_in_pieces() {
    let mut header = Header { metadata: Metadata::new(), tensors: Vec::new() };
    header.metadata.set("general.architecture", "llama");
    let (n_embd, n_kv, n_ff, n_vocab, n_layers) = (4096, 1024, 14_336, 32_000, 32);
    for (key, value) in [
        ("embedding_length", n_embd as u32),
        ("block_count", n_layers),
        ("feed_forward_length", n_ff as u32),
        ("context_length", 8192),
        ("attention.head_count", 32),
        ("attention.head_count_kv", 8),
        ("rope.dimension_count", 128),
        ("vocab_size", n_vocab as u32),
    ] {
        header.metadata.set(format!("llama.{key}"), Value::U32(value));
    }
    header.metadata.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    header.metadata.set("tokenizer.ggml.model", "no_vocab");
    let mut add = |name: String, dims: &[u64]| {
        let ty = if dims.len() > 1 { GgmlType::Q4_0 } else { GgmlType::F32 };
        header.tensors.push((format!("{name}.weight"), dims.to_vec(), ty));
    };
    add("token_embd".to_owned(), &[n_embd, n_vocab]);
    for layer in 0..n_layers {
        for (name, dims) in [
            ("attn_norm", &[n_embd][..]),
            ("attn_q", &[n_embd, n_embd]),
            ("attn_k", &[n_embd, n_kv]),
            ("attn_v", &[n_embd, n_kv]),
            ("attn_output", &[n_embd, n_embd]),
            ("ffn_norm", &[n_embd]),
            ("ffn_gate", &[n_embd, n_ff]),
            ("ffn_up", &[n_embd, n_ff]),
            ("ffn_down", &[n_ff, n_embd]),
        ] {
            add(format!("blk.{layer}.{name}"), dims);
        }
    }
    add("output_norm".to_owned(), &[n_embd]);
    add("output".to_owned(), &[n_embd, n_vocab]);
    let hostile = header.tensor("blk.17.attn_norm.weight", |_, ty| *ty = GgmlType::F16);
    let memory = header.attempt(n_layers).unwrap().unwrap();
    assert!((3 << 30..5 << 30).contains(&memory.weights), "{memory:?}");
    // Layers that are alike are tried once, and this one is like no other.
    for error in [hostile.attempt(n_layers).unwrap(), hostile.attempt_adapted(n_layers)].map(Result::unwrap_err) {
        assert!(error.to_string().contains("unsupported types"), "{error}");
    }
    assert_eq!(header.attempt_adapted(n_layers), Ok(memory));
}

/// The small model as one of looped layers, `factor` times as wide.
fn looped(n_loops: u32, factor: u64) -> Header {
    let abacus = Header::of_abacus();
    let mut model = Header { metadata: Metadata::new(), tensors: abacus.tensors.clone() };
    for (key, value) in abacus.metadata.iter() {
        let grows = ["embedding_length", "feed_forward_length", "head_count", "head_count_kv"];
        let value = match value {
            Value::U32(n) if grows.iter().any(|end| key.ends_with(end)) => Value::U32(n * factor as u32),
            value => value.clone(),
        };
        model.metadata.set(key.replace("llama.", "nanbeige."), value);
    }
    model.metadata.set("general.architecture", "nanbeige");
    model.metadata.set("nanbeige.num_loops", Value::U32(n_loops));
    for (name, dims, _) in &mut model.tensors {
        let is_of_tokens = ["token_embd.weight", "output.weight"].contains(&name.as_str());
        let n_wide = if is_of_tokens { 1 } else { dims.len() };
        dims[..n_wide].iter_mut().for_each(|n| *n *= factor);
    }
    model
}

/// libllama makes room for an adapter's nodes in a graph as if each matrix were used once.
#[test]
fn adapters_are_tried_with_their_stage() {
    assert!(looped(1, 1).attempt_adapted(8).is_ok());
    // Of the large one, which nothing can be cut out of, only graphs are made: there is no memory for its weights.
    for factor in [1, 128] {
        let model = looped(6, factor);
        let weights = model.attempt(8).unwrap().unwrap().weights;
        assert_eq!(weights > 64 << 30, factor > 1, "{weights}");
        let error = model.attempt_adapted(8).unwrap_err();
        assert!(matches!(&error, TrialError::Ended(why) if why.contains("GGML_ASSERT")), "{error}");
    }
}

#[test]
fn serve_says_in_one_line_why_a_model_cannot_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = Header::of_abacus().with("llama.attention.layer_norm_rms_epsilon", -1f32).write(dir.path());
    let state = dir.path().join("a");
    let ended = run(&[
        "serve",
        path.to_str().unwrap(),
        "--state-dir",
        state.to_str().unwrap(),
        "--threads",
        "1",
        "--port",
        "0",
        "--listen",
        "127.0.0.1:0",
    ]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let last = ended.stderr.lines().last().unwrap();
    assert!(last.starts_with("brigade: ") && last.contains("libllama cannot run this model: ops.cpp:"), "{ended:?}");
}

#[test]
fn a_worker_survives_layers_that_cannot_run() {
    let dir = tempfile::tempdir().unwrap();
    // Layers of the worker, not of the coordinator, have a norm of a type that libllama computes with nowhere.
    let path = Header::of_abacus().tensor("blk.0.attn_norm.weight", |_, ty| *ty = GgmlType::F16).write(dir.path());
    let mut cluster = Setup::of(2).layers("4,4").serve(&[path.to_str().unwrap()]).start_coordinator();
    cluster.join();
    cluster.wait_not_ready("libllama cannot run this model: binary-ops.cpp:");
    assert!(cluster.workers[0].ended().is_none(), "it is there for the next model");
    eventually("the worker as a member", || cluster.node("w0").filter(|node| node["connected"] == true));
}
