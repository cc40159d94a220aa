//! Models that embed or rank texts: what is pooled, alone and in company, and models without a KV cache.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::sync::Arc;

use brigade_base::{LayerRange, Pooling, Token};
use brigade_engine::{Input, LoadError, Row, Stage, StageOptions, dequantize_rows};
use brigade_gguf::{Architecture, ModelFile, StageView, TensorSource};
use support::synthetic::{EMBEDDERS, N_VOCAB, Synthetic, named};
use support::{difference, feed, options, rows, tokens};

/// Writes the model and loads it with the options changed.
fn load(model: Synthetic, change: impl FnOnce(&mut StageOptions)) -> Result<Stage, LoadError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    model.write(file.path());
    let mut options = options();
    change(&mut options);
    Stage::load_file(file.path(), options)
}

fn pooled(name: &str, pooling: Pooling) -> Stage {
    load(named(name), |o| o.pooling = Some(pooling)).unwrap()
}

/// The pooled vector of a text in `slot`, in one run.
fn embed(stage: &mut Stage, slot: u32, text: &[Token]) -> Vec<f32> {
    stage.clear(slot).unwrap();
    let mut rows = rows(stage, slot, text.len());
    rows.iter_mut().for_each(|row| row.output = row.position as usize + 1 == text.len());
    let mut out = Vec::new();
    stage.run(&rows, Input::Tokens(text), &mut out).unwrap();
    out
}

/// All rows that the graph of the model ends with.
fn all_rows(name: &str, node: &str, text: &[Token]) -> Vec<f32> {
    let mut stage = load(named(name), |o| o.hooks.stop_node = Some(node.to_owned())).unwrap();
    feed(&mut stage, 0, text)
}

#[test]
fn each_pooling_takes_its_rows() {
    for (name, node) in [
        ("qwen3-embedding", "result_norm"),
        ("bert", "result_embd"),
        ("eurobert", "result_embd"),
        ("modern-bert", "final_norm_out"),
        ("gemma-embedding", "result_norm"),
    ] {
        let n_embd = named(name).n_embd as usize;
        let text = tokens(37, N_VOCAB, 3);
        let rows = all_rows(name, node, &text);
        let by = |pooling| embed(&mut pooled(name, pooling), 1, &text);
        assert_eq!(by(Pooling::Cls), rows[..n_embd], "{name}");
        assert_eq!(by(Pooling::Last), rows[rows.len() - n_embd..], "{name}");
        let sum = |i: usize| rows.iter().skip(i).step_by(n_embd).map(|value| f64::from(*value)).sum::<f64>();
        let mean: Vec<f32> = (0..n_embd).map(|i| (sum(i) / text.len() as f64) as f32).collect();
        assert!(difference(&by(Pooling::Mean), &mean) < 1e-5, "{name}");
    }
}

#[test]
fn a_text_has_the_same_bits_in_any_company() {
    for model in EMBEDDERS {
        let pooling = Pooling::of_gguf(model.pooling.into()).unwrap();
        let mut stage = pooled(model.name, pooling);
        let texts: Vec<Vec<Token>> = [13, 1, 1, 21].iter().map(|&n| tokens(n, N_VOCAB, n)).collect();
        let alone: Vec<Vec<f32>> = texts.iter().map(|text| embed(&mut stage, 2, text)).collect();
        assert!(alone.iter().all(|values| values.len() == stage.n_out() as usize));
        stage.clear_all();
        let row = |slot: usize, position: usize| Row {
            slot: slot as u32,
            position: position as u32,
            output: position + 1 == texts[slot].len(),
        };
        let all: Vec<Row> = (0..4).flat_map(|slot| (0..texts[slot].len()).map(move |at| row(slot, at))).collect();
        let mut out = Vec::new();
        stage.run(&all, Input::Tokens(&texts.concat()), &mut out).unwrap();
        assert_eq!(out, alone.concat(), "{}", model.name);
    }
}

/// The pooled vector of a text by stages that begin at the layers in `cuts`.
fn embed_split(source: &Arc<ModelFile>, cuts: &[u32], pooling: Pooling, text: &[Token]) -> Vec<f32> {
    let catalog = source.catalog();
    let idx = catalog.tensor_idx("token_embd.weight").unwrap();
    let tensor = &catalog.tensors()[idx];
    let mut row = vec![0; (tensor.n_bytes / tensor.dims[1]) as usize];
    let mut hidden = Vec::new();
    for token in text {
        source.read_tensor(idx, *token as u64 * row.len() as u64, &mut row).unwrap();
        dequantize_rows(tensor.ty.id(), &row, tensor.dims[0] as usize, &mut hidden).unwrap();
    }
    let n_layers = Architecture::of(catalog).unwrap().n_layers;
    let bounds: Vec<u32> = [0].iter().chain(cuts).chain(&[n_layers]).copied().collect();
    for bounds in bounds.windows(2) {
        let view = StageView::pooled(catalog, LayerRange::new(bounds[0], bounds[1]).unwrap()).unwrap();
        let options = StageOptions {
            n_embd: view.n_embd(),
            n_vocab: view.n_vocab(),
            hooks: view.hooks(),
            pooling: view.is_final().then_some(pooling),
            ..options()
        };
        let mut stage =
            Stage::load(Box::new(view.reader(source.clone())), view.n_bytes(), options, &mut |_| true).unwrap();
        let mut rows = rows(&stage, 1, text.len());
        rows.iter_mut().for_each(|row| row.output = row.position as usize + 1 == text.len());
        hidden.iter_mut().for_each(|value| *value *= view.input_scale());
        let mut out = Vec::new();
        stage.run(&rows, Input::Hidden(&hidden), &mut out).unwrap();
        hidden = out;
    }
    hidden
}

#[test]
fn a_split_model_gives_the_bits_of_the_whole_one() {
    let dir = tempfile::tempdir().unwrap();
    let text = tokens(40, N_VOCAB, 5);
    for model in EMBEDDERS {
        let path = dir.path().join(model.name);
        model.write(&path);
        let pooling = Pooling::of_gguf(model.pooling.into()).unwrap();
        let whole = embed(&mut pooled(model.name, pooling), 0, &text);
        let source = Arc::new(ModelFile::open(&path).unwrap());
        let cuts = Architecture::of(source.catalog()).unwrap().cut_points();
        assert!(!cuts.is_empty(), "{}: nothing to cut", model.name);
        let mut plans: Vec<Vec<u32>> = vec![vec![]];
        for (i, &cut) in cuts.iter().enumerate() {
            plans.push(vec![cut]);
            plans.extend(cuts.get(i + 1).map(|&next| vec![cut, next]));
        }
        for plan in plans {
            assert_eq!(embed_split(&source, &plan, pooling, &text), whole, "{} cut at {plan:?}", model.name);
        }
    }
}

/// A decoder that looks at the last row alone takes a text in parts.
#[test]
fn the_last_row_is_the_same_after_chunks() {
    for name in ["qwen3-embedding", "qwen3-reranker"] {
        let pooling = if name == "qwen3-embedding" { Pooling::Last } else { Pooling::Rank };
        let mut stage = pooled(name, pooling);
        let text = tokens(40, N_VOCAB, 6);
        let whole = embed(&mut stage, 0, &text);
        stage.clear(0).unwrap();
        feed(&mut stage, 0, &text[..17]);
        let mut out = Vec::new();
        let rest = rows(&stage, 0, text.len() - 17);
        stage.run(&rest, Input::Tokens(&text[17..]), &mut out).unwrap();
        let last = out.len() - stage.n_out() as usize;
        assert_eq!(out[last..], whole, "{name}");
    }
}

#[test]
fn an_encoder_sees_the_whole_text_and_keeps_nothing() {
    let mut stage = pooled("bert", Pooling::Cls);
    assert!(stage.is_encoder() && !stage.can_save());
    let text = tokens(20, N_VOCAB, 1);
    let whole = embed(&mut stage, 0, &text);
    assert_eq!(stage.len(0), 0);
    assert_ne!(whole, embed(&mut stage, 0, &text[..19]), "the first row sees the last one");
    assert_eq!(whole, embed(&mut stage, 3, &text));
    assert!(!pooled("qwen3-embedding", Pooling::Cls).is_encoder());
}

#[test]
fn a_classifier_gives_one_score() {
    for name in ["bert-reranker", "qwen3-reranker"] {
        let mut stage = pooled(name, Pooling::Rank);
        assert_eq!(stage.n_out(), 1);
        let scores: Vec<f32> = (1..5).flat_map(|seed| embed(&mut stage, 0, &tokens(12, N_VOCAB, seed))).collect();
        assert!(scores.iter().all(|score| score.is_finite()));
        // With a single class qwen3's softmax is 1 whatever the text.
        assert_eq!(scores.windows(2).all(|pair| pair[0] == pair[1]), name == "qwen3-reranker", "{scores:?}");
    }
}

#[test]
fn what_a_model_cannot_do_is_refused() {
    let check = |model: &str, change: fn(&mut StageOptions), expected: &str| {
        let error = load(named(model), change).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains(expected), "{model}: {error:?} has no {expected:?}");
    };
    check("bert", |_| (), "generates no text");
    let too_long = |o: &mut StageOptions| (o.n_ctx, o.pooling) = (513, Some(Pooling::Cls));
    check("bert", too_long, "n_ctx is 513, but must be from 1 to 512");
    let in_the_middle =
        |o: &mut StageOptions| (o.hooks.stop_node, o.pooling) = (Some("l_out-1".to_owned()), Some(Pooling::Last));
    check("qwen3-embedding", in_the_middle, "only the last stage");
}
