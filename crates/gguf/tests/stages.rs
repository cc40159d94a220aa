//! Stage views: what they hold, and that they hold all of the model between them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test is to panic")]

mod support;

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;

use brigade_base::{KvTypes, LayerRange};
use brigade_gguf::{
    Architecture, ArchitectureError, Array, Catalog, GgmlType, ModelFile, PLACEHOLDER_VOCAB, StageView, StageViewError,
    TensorRole, TensorSource, Value,
};
use proptest::prelude::*;
use support::{ALWAYS_TIED, Model, Recipe, TAKES_TOKENS, every_architecture};

fn range(start: u32, end: u32) -> LayerRange {
    LayerRange::new(start, end).unwrap()
}

/// The virtual file of a view, read in pieces of odd sizes.
fn read_all(view: &StageView, source: &Arc<dyn TensorSource>) -> Vec<u8> {
    let mut reader = view.reader(Arc::clone(source));
    let (mut bytes, mut piece) = (Vec::new(), 1);
    loop {
        let mut buf = vec![0xaa; piece % 4099 + 1];
        match reader.read(&mut buf).unwrap() {
            0 => break,
            n => bytes.extend_from_slice(&buf[..n]),
        }
        piece = piece * 7 + 3;
    }
    assert_eq!(bytes.len() as u64, view.n_bytes());
    bytes
}

/// A view as the model that libllama would find in it.
fn materialise(view: &StageView, source: &Arc<dyn TensorSource>) -> Model {
    let bytes = read_all(view, source);
    let catalog = Catalog::parse(&bytes, bytes.len() as u64).unwrap();
    Model { bytes, catalog }
}

/// Checks one stage against the model that it was cut from.
fn check(model: &Arc<Model>, layers: LayerRange) -> StageView {
    let source: Arc<dyn TensorSource> = Arc::<Model>::clone(model);
    let view = StageView::new(&model.catalog, layers).unwrap();
    let stage = materialise(&view, &source);
    let whole = Architecture::of(&model.catalog).unwrap();
    let cut = Architecture::of(&stage.catalog).unwrap();
    let is_final = layers.end() == whole.n_layers;
    assert_eq!((view.is_final(), cut.n_layers, cut.n_embd), (is_final, layers.len(), whole.n_embd));
    assert_eq!(cut.n_vocab, view.n_vocab());
    assert_eq!(cut.n_vocab, if is_final { whole.n_vocab } else { PLACEHOLDER_VOCAB });
    assert_eq!(stage.catalog.weight_bytes(), view.weight_bytes());
    assert_eq!(stage.catalog.metadata().str("tokenizer.ggml.model"), Some("no_vocab"));
    assert_eq!(stage.catalog.metadata().iter().filter(|(key, _)| key.starts_with("tokenizer.")).count(), 1);
    for layer in layers.iter() {
        let here = (layer - layers.start()) as usize;
        assert_eq!(cut.n_head_kv[here], whole.n_head_kv[layer as usize]);
        assert_eq!(cut.n_ff[here], whole.n_ff[layer as usize]);
        let slides = |architecture: &Architecture, idx: usize| {
            architecture.sliding_window.as_ref().filter(|w| w.slides[idx]).map(|window| window.n_tokens)
        };
        assert_eq!(slides(&cut, here), slides(&whole, layer as usize), "layer {layer} of {layers}");
    }
    // Of this one libllama never looks for a head beside the embedding.
    let is_head = ALWAYS_TIED.contains(&whole.name) || TAKES_TOKENS.contains(&whole.name);
    for tensor in model.catalog.tensors() {
        let name = match TensorRole::of(&tensor.name) {
            TensorRole::Layer(layer) if layers.contains(layer) => {
                tensor.name.replacen(&format!("blk.{layer}."), &format!("blk.{}.", layer - layers.start()), 1)
            }
            TensorRole::EveryStage if reads_rope_factors(&whole, layers) => tensor.name.clone(),
            TensorRole::Head if is_final => tensor.name.clone(),
            TensorRole::TokenEmbedding if is_final && is_head => tensor.name.clone(),
            TensorRole::TokenEmbedding if is_final && whole.tied_head => "output.weight".to_owned(),
            _ => continue,
        };
        assert_eq!(stage.tensor_bytes(&name), model.tensor_bytes(&tensor.name), "{}", tensor.name);
    }
    assert_eq!(view.takes_tokens(), TAKES_TOKENS.contains(&whole.name));
    if !(is_final && is_head) {
        assert!(stage.tensor_bytes("token_embd.weight").iter().all(|byte| *byte == 0));
    }
    view
}

/// gemma4 has rope factors for its full layers; libllama stops at them in a model that has none.
fn reads_rope_factors(architecture: &Architecture, layers: LayerRange) -> bool {
    let window = architecture.sliding_window.as_ref().filter(|_| architecture.name == "gemma4");
    window.is_none_or(|window| layers.iter().any(|layer| !window.slides[layer as usize]))
}

#[test]
fn every_stage_of_every_architecture_holds_its_layers() {
    for recipe in every_architecture() {
        let model = recipe.model();
        let legal = Architecture::of(&model.catalog).unwrap().cut_points();
        let may_cut = |layer| layer == 0 || layer == 13 || legal.contains(&layer);
        let all = [(0, 13), (0, 1), (0, 6), (1, 7), (2, 4), (5, 6), (5, 12), (6, 13), (12, 13)];
        for (start, end) in all.into_iter().filter(|(start, end)| may_cut(*start) && may_cut(*end)) {
            check(&model, range(start, end));
        }
    }
}

#[test]
fn a_stage_is_stopped_behind_its_last_layer_unless_it_is_final() {
    let model = Recipe::new("llama", 8).model();
    let stop = |start, end| StageView::new(&model.catalog, range(start, end)).unwrap().hooks().stop_node;
    assert_eq!(stop(0, 3), Some("l_out-2".to_owned()));
    assert_eq!(stop(3, 7), Some("l_out-3".to_owned()));
    assert_eq!(stop(7, 8), None);
    assert!(StageView::whole(&model.catalog).unwrap().is_final());
}

#[test]
fn a_stage_that_pools_has_a_norm_and_a_classifier_but_no_head() {
    for (recipe, head) in [
        (Recipe::new("qwen3", 4), "output.weight"),
        (Recipe { tied: true, ..Recipe::new("qwen3", 4) }, "token_embd.weight"),
    ] {
        let model = recipe.model();
        let source: Arc<dyn TensorSource> = Arc::<Model>::clone(&model);
        let view = StageView::pooled(&model.catalog, range(2, 4)).unwrap();
        assert_eq!((view.is_final(), view.hooks().stop_node, view.n_vocab()), (true, None, PLACEHOLDER_VOCAB));
        let stage = materialise(&view, &source);
        assert_eq!(stage.tensor_bytes("output_norm.weight"), model.tensor_bytes("output_norm.weight"));
        assert!(stage.tensor_bytes(head).iter().all(|byte| *byte == 0));
        let [first, same] = [StageView::pooled, StageView::new].map(|make| make(&model.catalog, range(0, 2)).unwrap());
        assert_eq!(first.header_bytes(), same.header_bytes(), "no other stage differs");
    }
}

#[test]
fn an_encoder_keeps_nothing_and_has_no_head() {
    let model = Recipe { tied: true, ..Recipe::new("bert", 4).with("pooling_type", 1) }.model();
    let architecture = Architecture::of(&model.catalog).unwrap();
    assert!(architecture.is_encoder() && !architecture.tied_head);
    assert_eq!(architecture.kv_bytes_per_token(0, KvTypes::default()), 0);
    let later = StageView::new(&model.catalog, range(2, 3)).unwrap();
    assert_eq!(
        (later.hooks().stop_node.as_deref(), later.hooks().input_node.as_deref()),
        (Some("result_embd"), Some("inp_norm-0"))
    );
    let model = Recipe::new("eurobert", 4).model();
    let later = StageView::new(&model.catalog, range(1, 3)).unwrap();
    assert_eq!((later.hooks().stop_node.as_deref(), later.hooks().input_node), (Some("ffn_inp-1+"), None));
}

#[test]
fn input_is_scaled_where_the_graph_does_not_or_should_not() {
    for (architecture, first, later) in
        [("llama", 1.0, 1.0), ("qwen3", 1.0, 1.0), ("gemma2", 1.0, 1.0), ("gemma3", 8.0, 1.0), ("phi3", 1.0, 1.0)]
    {
        let model = Recipe::new(architecture, 8).model();
        let scale = |start, end| StageView::new(&model.catalog, range(start, end)).unwrap().input_scale();
        assert_eq!((scale(0, 4), scale(4, 8), scale(0, 8)), (first, later, first), "{architecture}");
    }
}

#[test]
fn layers_that_are_not_there_are_refused() {
    let model = Recipe::new("llama", 8).model();
    let error = StageView::new(&model.catalog, range(4, 9)).unwrap_err();
    assert!(matches!(error, StageViewError::NoSuchLayers { n_layers: 8, .. }));
}

#[test]
fn sliding_layers_follow_from_window_period_and_pattern() {
    let slides = |recipe: &Recipe| {
        let window = Architecture::of(&recipe.model().catalog).unwrap().sliding_window;
        window.map(|window| window.slides.iter().map(|slides| if *slides { 's' } else { 'f' }).collect::<String>())
    };
    let pattern = "attention.sliding_window_pattern";
    let flags = |text: &str| Array::of_bool(&text.chars().map(|c| c == 's').collect::<Vec<_>>());
    for (recipe, expected) in [
        (Recipe::new("gemma2", 5), Some("sfsfs")),
        (Recipe::new("gemma3", 8), Some("sssssfss")),
        (Recipe::new("gemma3", 8).with(pattern, 3), Some("ssfssfss")),
        (Recipe::new("gemma3", 4).with(pattern, flags("ffsf")), Some("ffsf")),
        (Recipe::new("gemma3", 4).with(pattern, Array::of_i32(&[1, 0, 0, 1])), Some("sffs")),
        (Recipe::new("gemma3", 4).with("attention.sliding_window", 0), None),
        (Recipe::new("phi3", 4).with("attention.sliding_window", 32), None),
        (Recipe::new("llama", 4), None),
    ] {
        assert_eq!(slides(&recipe).as_deref(), expected, "{}", recipe.architecture);
    }
}

#[test]
fn every_stage_of_a_model_that_must_slide_has_a_sliding_layer() {
    let cuts = |recipe: Recipe| Architecture::of(&recipe.model().catalog).unwrap().cut_points();
    let pattern = |flags: &[bool]| {
        Recipe::new("gemma2", flags.len() as u32).with("attention.sliding_window_pattern", Array::of_bool(flags))
    };
    assert_eq!(cuts(Recipe::new("gemma2", 7)), [2, 4, 6]);
    assert_eq!(cuts(pattern(&[false, false, true, true, false])), [3]);
    assert_eq!(cuts(pattern(&[true, false, false])), []);
    assert_eq!(cuts(Recipe::new("gemma3", 4)), [1, 2, 3]);
    let model = Recipe::new("gemma2", 7).model();
    assert!(StageView::new(&model.catalog, range(1, 7)).is_err());
    // Layer 5 of gemma3 is a full one: alone it is a model without a window.
    let model = Recipe::new("gemma3", 12).model();
    let view = check(&model, range(5, 6));
    let stage = Catalog::parse(view.header_bytes(), view.n_bytes()).unwrap();
    assert_eq!(stage.metadata().u32("gemma3.attention.sliding_window"), Some(0));
}

#[test]
fn a_stage_is_told_the_factors_that_depend_on_the_number_of_layers() {
    // 64 / 2 heads = 32 wide and keys of 16: the two formulas of gemma differ.
    let odd = |architecture, n_layers| {
        let recipe = Recipe::new(architecture, n_layers).with("attention.head_count", 2);
        recipe.with("attention.head_count_kv", 1).model()
    };
    let told = |model: &Arc<Model>, start, end| {
        let scales = check(model, range(start, end)).hooks().layer_scales;
        scales.into_iter().map(|scale| (scale.node, scale.factors)).collect::<Vec<_>>()
    };
    let queries = |factor: f32, n_layers| vec![("Qcur".to_owned(), vec![factor; n_layers])];
    for (architecture, n_layers) in [("gemma2", 46), ("gemma3", 62)] {
        let model = odd(architecture, n_layers);
        assert_eq!(told(&model, 24, n_layers), queries(1.0 / 32f32.sqrt(), n_layers as usize - 24), "{architecture}");
        assert_eq!(told(&model, 0, n_layers), []);
        // Here a stage has the number of layers by which libllama recognises the model that this is not.
        let model = odd(architecture, n_layers + 6);
        assert_eq!(told(&model, 0, n_layers), queries(1.0 / 16f32.sqrt(), n_layers as usize), "{architecture}");
        assert_eq!(told(&model, 0, n_layers + 6), []);
        let even = Recipe::new(architecture, n_layers).model();
        assert_eq!(told(&even, 24, n_layers), []);
    }
    let model = Recipe::new("minicpm3", 7).model();
    let factor = 1.4 / 7f32.sqrt();
    let both = |n_layers| ["hidden_scaled", "hidden_scaled_ffn"].map(|node| (node.to_owned(), vec![factor; n_layers]));
    assert_eq!((told(&model, 0, 3), told(&model, 3, 7)), (both(3).to_vec(), both(4).to_vec()));
    assert_eq!(told(&model, 0, 7), []);
    // Every fourth layer attends; the others forget the less, the later they come.
    let model = Recipe::new("minimax-01", 12).with("full_attention_interval", 4).model();
    let nodes = ["slopes", "q_decay_exp", "k_decay_exp", "diag_decay_exp"];
    let falling = |layers: &[u8]| {
        let factors: Vec<f32> = layers.iter().map(|l| (1.0 - f64::from(*l) / 11.0 + 1e-5) as f32).collect();
        nodes.map(|node| (node.to_owned(), factors.clone())).to_vec()
    };
    assert_eq!((told(&model, 0, 4), told(&model, 4, 12)), (falling(&[0, 1, 2]), falling(&[4, 5, 6, 8, 9, 10])));
    assert_eq!(told(&model, 0, 12), []);
}

#[test]
fn what_would_end_libllama_is_refused_here() {
    for (architecture, key, value) in [
        ("llama", "block_count", Value::U32(0)),
        ("llama", "block_count", Value::U32(600)),
        ("llama", "embedding_length", Value::from("wide")),
        ("llama", "attention.head_count", Value::U32(0)),
        ("gemma3", "attention.head_count", Value::U32(128)),
        ("llama", "attention.head_count_kv", Value::U32(3)),
        ("llama", "attention.head_count_kv", Array::of_u32(&[2, 2, 1, 2]).into()),
        ("llama", "attention.head_count_kv", Array::of_u32(&[2, 2]).into()),
        ("llama", "attention.value_length", Value::U32(8)),
        ("qwen2", "rope.dimension_count", Value::U32(8)),
        ("phi3", "rope.dimension_count", Value::U32(7)),
        ("llama", "rope.scaling.type", Value::from("magic")),
        ("llama", "expert_count", Value::U32(2000)),
        ("llama", "expert_count", Value::U32(4)),
        ("qwen2", "expert_count", Value::U32(4)),
        ("qwen3moe", "expert_used_count", Value::U32(5)),
        ("qwen3moe", "expert_used_count", Value::U32(0)),
        ("qwen3moe", "expert_group_count", Value::U32(3)),
        ("llama", "nextn_predict_layers", Value::U32(4)),
        ("gemma3", "attention.key_length_swa", Value::U32(8)),
        ("gemma3", "attention.sliding_window_pattern", Array::of_bool(&[true]).into()),
        ("gemma3", "attention.sliding_window_pattern", Array::of_bool(&[false; 4]).into()),
        ("gemma2", "attention.sliding_window_pattern", Value::U32(1)),
        ("gemma2", "attention.sliding_window", Value::U32(0)),
    ] {
        let model = Recipe::new(architecture, 4).with(key, value).model();
        let error = Architecture::of(&model.catalog).unwrap_err();
        assert!(error.to_string().contains(key) || key == "expert_count", "{architecture} {key}: {error}");
    }
}

#[test]
fn an_unknown_architecture_is_refused_with_the_known_ones() {
    let model = Recipe::new("clip", 4).model();
    let error = Architecture::of(&model.catalog).unwrap_err();
    assert_eq!(error, ArchitectureError::Unsupported { found: "clip".to_owned() });
    assert!(error.to_string().contains("architectures.md"), "{error}");
}

#[test]
fn draft_layers_are_left_out() {
    let model = Recipe::new("qwen3", 6).with("nextn_predict_layers", 2).model();
    let architecture = Architecture::of(&model.catalog).unwrap();
    assert_eq!((architecture.n_layers, architecture.n_draft_layers, architecture.n_ff.len()), (4, 2, 4));
    assert_eq!(architecture.cut_points(), [1, 2, 3]);
    for (start, end) in [(0, 2), (2, 4), (0, 4)] {
        let view = check(&model, range(start, end));
        let stage = Catalog::parse(view.header_bytes(), view.n_bytes()).unwrap();
        assert_eq!(stage.metadata().u32("qwen3.nextn_predict_layers"), None);
    }
    assert!(StageView::new(&model.catalog, range(2, 5)).is_err());
}

#[test]
fn stages_begin_where_a_pattern_does() {
    let cuts = |recipe: Recipe| Architecture::of(&recipe.model().catalog).unwrap().cut_points();
    assert_eq!(cuts(Recipe::new("smollm3", 13)), [4, 8, 12]);
    assert_eq!(cuts(Recipe::new("ernie4_5-moe", 13).with("interleave_moe_layer_step", 3)), [3, 6, 9, 12]);
    assert_eq!(cuts(Recipe::new("minimax-01", 24)), [8, 16]);
    assert_eq!(cuts(Recipe::new("qwen3next", 12).with("full_attention_interval", 6)), [6]);
    assert_eq!(cuts(Recipe::new("rwkv6", 13).with("rescale_every_n_layers", 6)), [6, 12]);
    let llama4 = Recipe::new("llama4", 26).with("interleave_moe_layer_step", 3);
    // Layers 3, 7, 11 are full; a stage begins with one that slides.
    // Each stage has one that does not rotate, too, so none begins before layer 24.
    assert_eq!(cuts(llama4), [12]);
    let heads = Array::of_u32(&[4, 0, 4, 0, 0, 4, 4]);
    let jamba = Recipe::new("jamba", 7).with("attention.head_count", heads.clone());
    // Each stage begins with attention and has both kinds of layers.
    assert_eq!(cuts(jamba.with("attention.head_count_kv", heads)), [2]);
}

/// No stage of a model with latent attention may have 26 or 27 layers, by which libllama knows a smaller one. The cuts
/// that are left lie close to each other nevertheless.
#[test]
fn no_stage_has_the_length_of_another_model() {
    let cuts = |recipe: Recipe| Architecture::of(&recipe.model().catalog).unwrap().cut_points();
    for n_layers in 2..=100 {
        let cuts = cuts(Recipe::new("deepseek2", n_layers));
        let bounds: Vec<u32> = [0].into_iter().chain(cuts.iter().copied()).chain([n_layers]).collect();
        for (i, start) in bounds.iter().enumerate() {
            let lengths = bounds[i + 1..].iter().map(|end| end - start);
            let is_whole = |length: &u32| *length == n_layers;
            let mut bad = lengths.filter(|length| [26, 27].contains(length) && !is_whole(length));
            assert!([26, 27].contains(&n_layers) || bad.next().is_none(), "{n_layers}: {cuts:?}");
        }
        let widest = bounds.windows(2).map(|run| run[1] - run[0]).max().unwrap();
        assert!(widest <= 7, "{n_layers}: {cuts:?}");
        assert!(n_layers > 26 || widest == 1, "{n_layers}: {cuts:?}");
    }
    // With so many tokens libllama also knows one of 48 layers, and only the final stage has all tokens.
    let (few, many) = (Recipe::new("deepseek2", 69), Recipe { n_vocab: 128_256, ..Recipe::new("deepseek2", 69) });
    let (few, many) = (cuts(few), cuts(many));
    assert!(!many.contains(&21) && many.len() > 15, "{many:?}");
    assert!(few.contains(&21), "{few:?}");
}

#[test]
fn layers_may_have_nothing() {
    let recipe = |architecture, bare: &[u32]| {
        let list = |full: u32, bare: &[u32]| -> Vec<u32> {
            (0..6).map(|layer| if bare.contains(&layer) { 0 } else { full }).collect()
        };
        let recipe = Recipe { bare: bare.to_vec(), ..Recipe::new(architecture, 6) };
        let recipe = recipe.with("attention.head_count", Array::of_u32(&list(4, &[2, 4])));
        let recipe = recipe.with("attention.head_count_kv", Array::of_u32(&list(2, &[2, 4])));
        recipe.with("feed_forward_length", Array::of_u32(&list(96, &[2]))).model()
    };
    // A stage begins with a layer that attends and ends with one that has a feed-forward part.
    let model = recipe("deci", &[2]);
    let architecture = Architecture::of(&model.catalog).unwrap();
    assert_eq!((architecture.cut_points(), architecture.layer_bytes(2)), (vec![1, 5], 0));
    let stage = check(&model, range(1, 5));
    assert!(!stage.header_bytes().windows(6).any(|bytes| bytes == b"blk.1."), "a layer without tensors has some");
    // Nothing else may be missing.
    for model in [recipe("deci", &[4]), recipe("deci", &[3]), recipe("llama", &[2])] {
        assert!(Architecture::of(&model.catalog).is_err());
    }
}

#[test]
fn layers_may_use_no_experts() {
    let with = |used: &[u32]| {
        let recipe = Recipe::new("llama", 4).with("expert_count", 4).with("expert_feed_forward_length", 32);
        Architecture::of(&recipe.with("expert_used_count", Array::of_u32(used)).model().catalog)
    };
    // Each stage has a layer that does.
    let cuts = |used: &[u32]| with(used).unwrap().cut_points();
    assert_eq!((cuts(&[1, 2, 1, 1]), cuts(&[0, 2, 0, 1])), (vec![1, 2, 3], vec![2]));
    assert_eq!(with(&[0, 2, 0, 1]).unwrap().n_experts_used, 2);
    assert!(with(&[0; 4]).unwrap_err().to_string().contains("1 to 4 in some"));
    assert!(with(&[5, 1, 1, 1]).is_err());
}

#[test]
fn a_model_that_must_stay_whole_says_why() {
    let model = Recipe::new("gemma3n", 6).model();
    let architecture = Architecture::of(&model.catalog).unwrap();
    assert!(architecture.why_whole().unwrap().contains("tokens"));
    let error = StageView::new(&model.catalog, range(0, 3)).unwrap_err();
    assert!(error.to_string().contains("runs whole"), "{error}");
    assert!(StageView::whole(&model.catalog).unwrap().takes_tokens());
    assert_eq!(Architecture::of(&Recipe::new("llama", 4).model().catalog).unwrap().why_whole(), None);
}

#[test]
fn readers_seek_anywhere() {
    let model = Recipe::new("qwen3", 6).model();
    let source: Arc<dyn TensorSource> = Arc::<Model>::clone(&model);
    let view = StageView::new(&model.catalog, range(2, 6)).unwrap();
    let all = read_all(&view, &source);
    let mut reader = view.reader(source);
    assert_eq!(reader.seek(SeekFrom::End(0)).unwrap(), view.n_bytes());
    assert_eq!(reader.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(reader.seek(SeekFrom::Start(u64::MAX)).unwrap(), u64::MAX);
    assert_eq!(reader.read(&mut [0; 8]).unwrap(), 0);
    assert!(reader.seek(SeekFrom::End(-(all.len() as i64) - 1)).is_err());
    for (i, start) in (0..all.len()).step_by(97).enumerate() {
        let n = (i * 53 % 700).min(all.len() - start);
        let mut buf = vec![0; n];
        reader.seek(SeekFrom::Start(start as u64)).unwrap();
        reader.read_exact(&mut buf).unwrap();
        assert_eq!(buf, all[start..start + n], "{start}");
    }
}

#[test]
fn an_error_of_the_source_reaches_the_reader() {
    struct Broken;
    impl TensorSource for Broken {
        fn read_tensor(&self, _: usize, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            Err(std::io::Error::other("the peer left"))
        }
    }
    let model = Recipe::new("llama", 4).model();
    let view = StageView::new(&model.catalog, range(0, 2)).unwrap();
    let error = std::io::copy(&mut view.reader(Arc::new(Broken)), &mut std::io::sink()).unwrap_err();
    assert_eq!(error.to_string(), "the peer left");
}

#[test]
fn a_travelling_header_makes_the_same_stages() {
    let model = Recipe::new("gemma3", 9).model();
    let bytes = model.catalog.header_bytes(true);
    assert!(bytes.len() < model.catalog.header_bytes(false).len());
    let travelled = Catalog::parse_header(&bytes).unwrap();
    for (start, end) in [(0, 4), (4, 9)] {
        let here = StageView::new(&model.catalog, range(start, end)).unwrap();
        let there = StageView::new(&travelled, range(start, end)).unwrap();
        assert_eq!(here.header_bytes(), there.header_bytes());
        assert_eq!(here.tensors(), there.tensors());
    }
}

#[test]
fn zeros_take_the_smallest_type_that_fits_the_width() {
    for (n_embd, ty) in [(256, GgmlType::Q1_0), (64, GgmlType::Q2_0), (96, GgmlType::Q4_0)] {
        let mut recipe = Recipe::new("gemma3", 4);
        recipe.n_embd = n_embd;
        let model = recipe.model();
        let view = StageView::new(&model.catalog, range(2, 4)).unwrap();
        let stage = Catalog::parse(view.header_bytes(), view.n_bytes()).unwrap();
        let embedding = stage.tensor("token_embd.weight").unwrap();
        assert_eq!((embedding.ty, &embedding.dims), (ty, &vec![n_embd, 48]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn stages_partition_the_layers(
        recipe in (0usize..brigade_gguf::supported_architectures().count(), 1u32..15, any::<bool>()),
        cuts in prop::collection::btree_set(1u32..15, 0..5),
    ) {
        let name = brigade_gguf::supported_architectures().nth(recipe.0).unwrap();
        let mut recipe = Recipe { tied: recipe.2, ..Recipe::new(name, recipe.1) };
        recipe.tied |= ALWAYS_TIED.contains(&name);
        let model = recipe.model();
        let Ok(architecture) = Architecture::of(&model.catalog) else {
            // A pattern whose first layers do not slide is none for so few layers.
            prop_assume!(recipe.n_layers > 2);
            panic!("{name} with {} layers", recipe.n_layers);
        };
        let legal = architecture.cut_points();
        let mut borders: Vec<u32> = cuts.into_iter().filter(|cut| legal.contains(cut)).collect();
        borders.insert(0, 0);
        borders.push(recipe.n_layers);
        let mut n_holders: HashMap<usize, usize> = HashMap::new();
        for pair in borders.windows(2) {
            let view = check(&model, range(pair[0], pair[1]));
            view.tensors().iter().for_each(|idx| *n_holders.entry(*idx).or_default() += 1);
        }
        for (idx, tensor) in model.catalog.tensors().iter().enumerate() {
            let expected = match TensorRole::of(&tensor.name) {
                TensorRole::EveryStage => {
                    borders.windows(2).filter(|pair| reads_rope_factors(&architecture, range(pair[0], pair[1]))).count()
                }
                TensorRole::TokenEmbedding if architecture.is_encoder() => 0,
                TensorRole::TokenEmbedding => usize::from(recipe.tied || TAKES_TOKENS.contains(&name)),
                _ => 1,
            };
            prop_assert_eq!(n_holders.get(&idx).copied().unwrap_or(0), expected, "{}", tensor.name);
        }
    }
}

fn abacus() -> Arc<ModelFile> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-f16.gguf");
    Arc::new(ModelFile::open(path).unwrap())
}

#[test]
fn the_embedded_model_is_understood() {
    let file = abacus();
    let catalog = file.catalog();
    let architecture = Architecture::of(catalog).unwrap();
    assert_eq!((architecture.name, architecture.n_layers, architecture.n_embd), ("llama", 8, 256));
    assert_eq!((architecture.n_vocab, architecture.n_ctx_train, architecture.tied_head), (1024, 1024, false));
    assert_eq!(architecture.kv_bytes_per_token(0, KvTypes::default()), 4 * (32 + 32) * 2);
    assert_eq!(architecture.cut_points(), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(catalog.quantisation(), "F16");
    let layers: u64 = (0..8).map(|layer| architecture.layer_bytes(layer)).sum();
    assert_eq!(layers + architecture.head_bytes() + architecture.embedding_bytes(), catalog.weight_bytes());
}

#[test]
fn stages_of_the_embedded_model_hold_its_bytes() {
    let file = abacus();
    let source: Arc<dyn TensorSource> = Arc::<ModelFile>::clone(&file);
    for (start, end) in [(0, 3), (3, 8)] {
        let view = StageView::new(file.catalog(), range(start, end)).unwrap();
        let stage = materialise(&view, &source);
        for idx in view.tensors() {
            let tensor = &file.catalog().tensors()[*idx];
            let name = match TensorRole::of(&tensor.name) {
                TensorRole::Layer(layer) => {
                    tensor.name.replacen(&format!("blk.{layer}."), &format!("blk.{}.", layer - start), 1)
                }
                _ => tensor.name.clone(),
            };
            let mut bytes = vec![0; tensor.n_bytes as usize];
            file.read_at(*idx, 0, &mut bytes).unwrap();
            assert_eq!(stage.tensor_bytes(&name), bytes, "{name}");
        }
    }
}
