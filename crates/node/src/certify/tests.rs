//! Verdicts over small models in each kind of storage.

use std::io::Write;

use brigade_engine::quantize_rows;
use brigade_gguf::{Builder, GgmlType, Metadata};

use super::*;

const N_LAYERS: u32 = 5;
const N_EMBD: u64 = 256;
const N_VOCAB: u64 = 80;
const N_EXPERTS: u64 = 3;

/// A mixture of experts of an architecture that is built like a llama, with all matrices in one type.
fn model(architecture: &str, ty: GgmlType) -> tempfile::NamedTempFile {
    model_that_pools(architecture, ty, None)
}

/// The same, and if there is a way of pooling, one that embeds texts.
fn model_that_pools(architecture: &str, ty: GgmlType, pooling: Option<u32>) -> tempfile::NamedTempFile {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", architecture);
    metadata.set("tokenizer.ggml.model", "no_vocab");
    let numbers = [
        ("vocab_size", N_VOCAB),
        ("context_length", 256),
        ("embedding_length", N_EMBD),
        ("block_count", N_LAYERS.into()),
        ("feed_forward_length", N_EMBD),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("rope.dimension_count", 64),
        ("expert_count", N_EXPERTS),
        ("expert_used_count", 2),
        ("expert_feed_forward_length", N_EMBD),
    ];
    numbers.iter().for_each(|(key, n)| metadata.set(format!("{architecture}.{key}"), *n as u32));
    metadata.set(format!("{architecture}.attention.layer_norm_rms_epsilon"), 1e-5);
    if let Some(pooling) = pooling {
        metadata.set(format!("{architecture}.pooling_type"), pooling);
    }
    let mut tensors = vec![("token_embd.weight".to_owned(), vec![N_EMBD, N_VOCAB])];
    for layer in 0..N_LAYERS {
        let of_layer: [(&str, &[u64]); 10] = [
            ("attn_norm", &[N_EMBD]),
            ("attn_q", &[N_EMBD, N_EMBD]),
            ("attn_k", &[N_EMBD, 128]),
            ("attn_v", &[N_EMBD, 128]),
            ("attn_output", &[N_EMBD, N_EMBD]),
            ("ffn_norm", &[N_EMBD]),
            ("ffn_gate_inp", &[N_EMBD, N_EXPERTS]),
            ("ffn_gate_exps", &[N_EMBD, N_EMBD, N_EXPERTS]),
            ("ffn_up_exps", &[N_EMBD, N_EMBD, N_EXPERTS]),
            ("ffn_down_exps", &[N_EMBD, N_EMBD, N_EXPERTS]),
        ];
        tensors.extend(of_layer.map(|(name, dims)| (format!("blk.{layer}.{name}.weight"), dims.to_vec())));
    }
    tensors.push(("output_norm.weight".to_owned(), vec![N_EMBD]));
    tensors.push(("output.weight".to_owned(), vec![N_EMBD, N_VOCAB]));
    let ty_of = |name: &str, dims: &[u64]| {
        if dims.len() == 1 || name.contains("gate_inp") { GgmlType::F32 } else { ty }
    };
    let mut builder = Builder::new(&metadata);
    for (name, dims) in &tensors {
        builder.tensor(name, dims, ty_of(name, dims)).unwrap();
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let fill = |idx: usize, offset: u64, bytes: &mut [u8]| {
        let (name, dims) = &tensors[idx];
        let mut state = idx as u64 + 1;
        let middle = if name.contains("norm") { 1.0 } else { 0.0 };
        let values: Vec<f32> = (0..dims.iter().product::<u64>())
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                middle + ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 0.1
            })
            .collect();
        let all = quantize_rows(ty_of(name, dims).id(), &values, dims[0] as usize).unwrap();
        bytes.copy_from_slice(&all[offset as usize..offset as usize + bytes.len()]);
        Ok(())
    };
    builder.write(&mut file, fill).unwrap();
    file.flush().unwrap();
    file
}

fn check(model: &tempfile::NamedTempFile, options: &CertifyOptions) -> Report {
    let file = Arc::new(ModelFile::open(model.path()).unwrap());
    certify(&file, Some(model.path()), options, &mut |_, _| {}).unwrap()
}

#[test]
fn every_type_of_weights_is_exact_in_every_cut() {
    let types = [
        GgmlType::F16,
        GgmlType::Q8_0,
        GgmlType::Q4_0,
        GgmlType::Q4_K,
        GgmlType::Q6_K,
        GgmlType::IQ4_XS,
        GgmlType::MXFP4,
    ];
    for ty in types {
        let options = CertifyOptions { cuts: Cuts::All, n_tokens: 24, ..CertifyOptions::default() };
        let report = check(&model("llama", ty), &options);
        assert_eq!(report.verdict(), Verdict::Exact, "{ty:?}: {:?}", report.plans);
        assert!(report.plans.len() > 9 && report.plans.iter().any(|plan| plan.cuts.len() == 4));
        let worst = report.worst_prediction(0).unwrap();
        assert!(worst.error().abs() < 0.05, "{ty:?}: {worst:?}");
    }
}

#[test]
fn a_model_that_must_stay_whole_is_compared_with_llama_cpp() {
    // Its sizes are known by their numbers of layers.
    let report = check(&model("llama", GgmlType::Q8_0), &CertifyOptions { cuts: Cuts::Most(1), ..Default::default() });
    assert_eq!((report.verdict(), report.plans.len()), (Verdict::Exact, 2));
    let file = model("gptj", GgmlType::Q8_0);
    let opened = Arc::new(ModelFile::open(file.path()).unwrap());
    let refused = certify(&opened, Some(file.path()), &CertifyOptions::default(), &mut |_, _| {});
    assert!(matches!(refused, Err(CertifyError::Refused(_))), "{refused:?}");
}

#[test]
fn without_a_path_the_whole_is_one_stage() {
    let file = model("llama", GgmlType::Q4_0);
    let opened = Arc::new(ModelFile::open(file.path()).unwrap());
    let mut said = Vec::new();
    let report =
        certify(&opened, None, &CertifyOptions::default(), &mut |what, share| said.push((what.to_owned(), share)));
    assert_eq!(report.unwrap().verdict(), Verdict::Exact);
    assert!(said.len() == 5 && said.is_sorted_by(|a, b| a.1 <= b.1), "{said:?}");
}

/// An adapter of two layers, one in each half.
fn adapter(value: f32) -> tempfile::NamedTempFile {
    adapter_of(&[("blk.1.attn_q", N_EMBD), ("blk.4.attn_q", N_EMBD)], value)
}

/// An adapter of matrices, which are given with their rows.
fn adapter_of(matrices: &[(&str, u64)], value: f32) -> tempfile::NamedTempFile {
    let mut metadata = Metadata::new();
    for (key, value) in [("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora")] {
        metadata.set(key, value);
    }
    let mut builder = Builder::new(&metadata);
    for (name, n_rows) in matrices {
        builder.tensor(format!("{name}.weight.lora_a"), &[N_EMBD, 2], GgmlType::F32).unwrap();
        builder.tensor(format!("{name}.weight.lora_b"), &[2, *n_rows], GgmlType::F32).unwrap();
    }
    let fill = |_: usize, _: u64, bytes: &mut [u8]| {
        bytes.as_chunks_mut::<4>().0.iter_mut().for_each(|element| *element = value.to_le_bytes());
        Ok(())
    };
    let mut file = tempfile::NamedTempFile::new().unwrap();
    builder.write(&mut file, fill).unwrap();
    file.flush().unwrap();
    file
}

#[test]
fn adapters_are_cut_with_the_model() {
    let (model, one, other) = (model("llama", GgmlType::Q8_0), adapter(0.02), adapter(-0.01));
    let of = |file: &tempfile::NamedTempFile, scale| AdapterFile { path: file.path().to_owned(), scale };
    for adapters in [vec![of(&one, 2.0)], vec![of(&one, 1.0), of(&other, 0.5)]] {
        let report = check(&model, &CertifyOptions { adapters, ..CertifyOptions::default() });
        assert_eq!(report.verdict(), Verdict::Exact, "{:?}", report.plans);
        let worst = report.worst_prediction(0).unwrap();
        assert!(worst.error().abs() < 0.05, "{worst:?}");
    }
    // A model is no adapter.
    let opened = Arc::new(ModelFile::open(model.path()).unwrap());
    let options = CertifyOptions { adapters: vec![of(&model, 1.0)], ..CertifyOptions::default() };
    let refused = certify(&opened, Some(model.path()), &options, &mut |_, _| {});
    assert!(matches!(refused, Err(CertifyError::Adapters(_))), "{refused:?}");
}

/// The whole as llama.cpp reads it has a head, and stages that pool have none.
#[test]
fn an_adapter_of_the_head_changes_nothing_where_texts_are_embedded() {
    let both = [("blk.1.attn_q", N_EMBD), ("blk.4.attn_q", N_EMBD), ("output", N_VOCAB)];
    for pooling in [1, 3] {
        let model = model_that_pools("llama", GgmlType::Q8_0, Some(pooling));
        for matrices in [&both[..], &both[2..]] {
            let adapter = adapter_of(matrices, 0.02);
            let adapters = vec![AdapterFile { path: adapter.path().to_owned(), scale: 1.0 }];
            let report = check(&model, &CertifyOptions { adapters, ..CertifyOptions::default() });
            assert_eq!(report.pooling, Pooling::of_gguf(pooling.into()));
            assert_eq!(report.verdict(), Verdict::Exact, "{matrices:?}: {:?}", report.plans);
            let worst = report.worst_prediction(0).unwrap();
            assert!(worst.error().abs() < 0.05, "{worst:?}");
        }
    }
}

#[test]
fn numbers_that_are_none_are_those_of_the_adapters() {
    let (model, adapter) = (model("llama", GgmlType::Q8_0), adapter(f32::NAN));
    let file = Arc::new(ModelFile::open(model.path()).unwrap());
    let adapters = vec![AdapterFile { path: adapter.path().to_owned(), scale: 1.0 }];
    let options = CertifyOptions { adapters, ..CertifyOptions::default() };
    let error = certify(&file, Some(model.path()), &options, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("with these adapters it yields values that are no numbers"), "{error}");
}

/// What is compared is exact without any of them as well.
#[test]
fn each_adapter_has_a_say_in_what_is_compared() {
    let (model, one, other) = (model("llama", GgmlType::Q8_0), adapter(0.02), adapter(-0.01));
    let file = Arc::new(ModelFile::open(model.path()).unwrap());
    let script = Script::of_sessions(24, N_VOCAB as u32, true, 1);
    let kv = KvTypes::default();
    let shape = StageShape { n_ctx: 24, n_sessions: 2, max_rows: script.max_rows(), kv, pooling: None };
    let of = |file: &tempfile::NamedTempFile, scale| AdapterFile { path: file.path().to_owned(), scale };
    let run = |adapters: &[AdapterFile], cuts: &[u32]| {
        let bundle = (!adapters.is_empty()).then(|| Bundle::open(file.catalog(), adapters).unwrap());
        let runner = Runner { file: &file, script: &script, shape, n_threads: 1, adapters: bundle.as_ref() };
        let mut stages = Stages::default();
        let results = runner.cut(cuts, &mut stages).unwrap();
        (results, stages.found.values().map(|memory| memory.weights).sum::<u64>())
    };
    // A pair in each of two layers.
    let n_bytes = 2 * 4 * 2 * 2 * N_EMBD;
    for cuts in [&[][..], &[2]] {
        let (plain, weights) = run(&[], cuts);
        let (first, with_first) = run(&[of(&one, 1.0)], cuts);
        let (both, with_both) = run(&[of(&one, 1.0), of(&other, 0.5)], cuts);
        assert!(first != plain && both != plain && both != first, "cut before {cuts:?}");
        assert_eq!((with_first - weights, with_both - weights), (n_bytes, 2 * n_bytes));
    }
}

#[test]
fn what_differs_is_told() {
    // A model whose second half is another one is not what the file says.
    let (one, other) = (model("llama", GgmlType::F16), model("llama", GgmlType::Q8_0));
    let opened = Arc::new(ModelFile::open(one.path()).unwrap());
    let options = CertifyOptions { cuts: Cuts::Most(1), ..CertifyOptions::default() };
    let report = certify(&opened, Some(other.path()), &options, &mut |_, _| {}).unwrap();
    assert_eq!(report.verdict(), Verdict::Differs);
    assert!(report.plans.iter().all(|plan| !plan.outcome.is_good()), "{:?}", report.plans);
}
