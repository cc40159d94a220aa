//! A model cut into stages answers as the whole one: each legal cut of each architecture, in two and in three stages.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::Path;
use std::sync::Arc;

use brigade_base::{KvType, KvTypes, LayerRange, Token};
use brigade_engine::{Input, Row, RunError, Stage, StageOptions, Vocabulary, dequantize_rows};
use brigade_gguf::{Architecture, ModelFile, StageView, TensorSource, vocabulary_header};
use support::synthetic::{ALL, GEMMA2_27B, N_VOCAB};
use support::{abacus, difference, generate, options, tokens, whole};

/// Stages one behind the other, with the token embedding before them.
struct Pipeline {
    source: Arc<ModelFile>,
    stages: Vec<Stage>,
    scales: Vec<f32>,
}

impl Pipeline {
    /// Cuts the model before each of the layers in `cuts`.
    fn new(source: &Arc<ModelFile>, cuts: &[u32], options: &StageOptions) -> Self {
        let n_layers = Architecture::of(source.catalog()).unwrap().n_layers;
        let bounds: Vec<u32> = [0].iter().chain(cuts).chain(&[n_layers]).copied().collect();
        let mut pipeline = Self { source: Arc::clone(source), stages: Vec::new(), scales: Vec::new() };
        for bounds in bounds.windows(2) {
            let layers = LayerRange::new(bounds[0], bounds[1]).unwrap();
            let view = StageView::new(source.catalog(), layers).unwrap();
            let options =
                StageOptions { n_embd: view.n_embd(), n_vocab: view.n_vocab(), hooks: view.hooks(), ..options.clone() };
            let reader = Box::new(view.reader(source.clone()));
            let stage = Stage::load(reader, view.n_bytes(), options, &mut |_| true)
                .unwrap_or_else(|error| panic!("layers {layers}: {error}"));
            assert_eq!((stage.n_layers(), stage.is_final()), (layers.len(), view.is_final()));
            pipeline.stages.push(stage);
            pipeline.scales.push(view.input_scale());
        }
        pipeline
    }

    fn embed(&self, tokens: &[Token]) -> Vec<f32> {
        let catalog = self.source.catalog();
        let idx = catalog.tensor_idx("token_embd.weight").unwrap();
        let tensor = &catalog.tensors()[idx];
        let mut row = vec![0; (tensor.n_bytes / tensor.dims[1]) as usize];
        let mut hidden = Vec::new();
        for token in tokens {
            self.source.read_tensor(idx, *token as u64 * row.len() as u64, &mut row).unwrap();
            dequantize_rows(tensor.ty.id(), &row, tensor.dims[0] as usize, &mut hidden).unwrap();
        }
        hidden
    }

    fn run(&mut self, rows: &[Row], tokens: &[Token]) -> Result<Vec<f32>, RunError> {
        let mut hidden = self.embed(tokens);
        let mut out = Vec::new();
        for (stage, scale) in self.stages.iter_mut().zip(&self.scales) {
            if *scale != 1.0 {
                hidden.iter_mut().for_each(|value| *value *= scale);
            }
            stage.run(rows, Input::Hidden(&hidden), &mut out)?;
            std::mem::swap(&mut hidden, &mut out);
        }
        Ok(hidden)
    }

    fn feed(&mut self, slot: u32, tokens: &[Token]) -> Vec<f32> {
        let rows = support::rows(&self.stages[0], slot, tokens.len());
        self.run(&rows, tokens).unwrap()
    }

    fn generate(&mut self, slot: u32, tokens: &[Token], n_prefill: usize) -> Vec<f32> {
        let mut all = self.feed(slot, &tokens[..n_prefill]);
        for token in &tokens[n_prefill..] {
            all.extend(self.feed(slot, &[*token]));
        }
        all
    }
}

/// Compares each cut of the model at `path` with the whole; `tolerance` is relative to the largest logit.
fn check(path: &Path, n_vocab: usize, tolerance: f32, stages: &[usize]) {
    check_with(path, n_vocab, tolerance, stages, KvTypes::default());
}

fn check_with(path: &Path, n_vocab: usize, tolerance: f32, stages: &[usize], kv: KvTypes) {
    let text = tokens(40, n_vocab, 5);
    let options = StageOptions { kv, ..options() };
    let expected = generate(&mut whole(path, |o| o.kv = kv), 1, &text, 16);
    let source = Arc::new(ModelFile::open(path).unwrap());
    let cuts = Architecture::of(source.catalog()).unwrap().cut_points();
    assert!(!cuts.is_empty(), "{}: nothing to cut", path.display());
    let mut plans: Vec<Vec<u32>> = vec![vec![]];
    for (i, &cut) in cuts.iter().enumerate() {
        plans.push(vec![cut]);
        plans.extend(cuts[i + 1..].iter().map(|&next| vec![cut, next]));
    }
    for plan in plans.iter().filter(|plan| stages.contains(&(plan.len() + 1))) {
        let logits = Pipeline::new(&source, plan, &options).generate(1, &text, 16);
        let difference = difference(&expected, &logits);
        assert!(difference <= tolerance, "{} cut at {plan:?}: {difference:e}", path.display());
    }
}

#[test]
fn abacus_is_bit_exact_however_it_is_cut() {
    check(&abacus(), 1024, 0.0, &[1, 2, 3]);
}

#[test]
fn abacus_in_q8_0_is_bit_exact() {
    check(&abacus().with_file_name("abacus-q8_0.gguf"), 1024, 0.0, &[2]);
}

#[test]
fn each_architecture_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    for model in ALL {
        let path = dir.path().join(format!("{}.gguf", model.name));
        model.write(&path);
        check(&path, N_VOCAB, 0.0, &[1, 2, 3]);
    }
}

#[test]
fn a_model_that_is_known_by_its_number_of_layers_is_exact() {
    let file = tempfile::NamedTempFile::new().unwrap();
    GEMMA2_27B.write(file.path());
    check(file.path(), N_VOCAB, 0.0, &[1, 2]);
}

#[test]
fn a_cache_in_blocks_is_exact_however_the_model_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = [(KvType::Q8_0, KvType::Q8_0), (KvType::Q4_0, KvType::Q4_0), (KvType::Q8_0, KvType::F16)];
    for kv in kinds.map(|(k, v)| KvTypes { k, v }) {
        check_with(&abacus(), 1024, 0.0, &[2], kv);
        for model in ALL {
            let path = dir.path().join(format!("{}.gguf", model.name));
            model.write(&path);
            check_with(&path, N_VOCAB, 0.0, &[2], kv);
        }
    }
}

/// Batches of many sessions through a split model: what each session gets, and what a stage costs.
#[test]
fn sessions_share_passes_in_a_pipeline() {
    let source = Arc::new(ModelFile::open(abacus()).unwrap());
    let mut split = Pipeline::new(&source, &[3, 5], &options());
    let mut oracle = whole(&abacus(), |_| ());
    let text = tokens(24, 1024, 9);
    split.feed(2, &text[..23]);
    support::feed(&mut oracle, 2, &text[..23]);
    // Slot 2 decodes while slot 0 prefills; rows of a stage that is not last come back in the caller's order.
    let mut rows = vec![Row { slot: 2, position: 23, output: true }];
    rows.extend((0..24).map(|position| Row { slot: 0, position, output: position == 23 }));
    let batch: Vec<Token> = text[23..].iter().chain(&text).copied().collect();
    let mut expected = Vec::new();
    oracle.run(&rows, Input::Tokens(&batch), &mut expected).unwrap();
    assert_eq!(split.run(&rows, &batch).unwrap(), expected);

    let memory: Vec<_> = split.stages.iter().map(|stage| stage.memory()).collect();
    assert!(memory[0].kv * 2 == memory[1].kv * 3, "three layers against two: {memory:?}");
    assert!(memory.iter().map(|memory| memory.kv).sum::<u64>() == oracle.memory().kv);
}

/// A coordinator truncates and replays after a loss: a stage that starts anew catches up to the same bits.
#[test]
fn a_replayed_pipeline_goes_on_with_the_same_bits() {
    let source = Arc::new(ModelFile::open(abacus()).unwrap());
    let text = tokens(30, 1024, 10);
    let mut first = Pipeline::new(&source, &[4], &options());
    let expected = first.generate(0, &text, 16);
    first.stages[1].clear(0).unwrap();
    let error = first.run(&[Row { slot: 0, position: 30, output: true }], &[1]).unwrap_err();
    assert_eq!(error, RunError::Position { slot: 0, expected: 0, found: 30 });
    for stage in &mut first.stages {
        stage.clear(0).unwrap();
    }
    assert_eq!(first.generate(0, &text, 16), expected);
}

#[test]
fn a_vocabulary_loads_from_a_header_without_tensors() {
    let source = ModelFile::open(abacus()).unwrap();
    let header = vocabulary_header(source.catalog());
    let n_bytes = header.len() as u64;
    let vocabulary = Vocabulary::load(Box::new(std::io::Cursor::new(header)), n_bytes).unwrap();
    assert_eq!(vocabulary.n_tokens(), 1024);
    assert_eq!(vocabulary.tokenize("12", false, false).unwrap().len(), 2);
}
