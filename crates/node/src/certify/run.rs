//! Runs a script through a model, whole or stage after stage.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use brigade_base::{Hooks, LayerRange};
use brigade_engine::{Input, Stage, StageMemory, StageOptions, dequantize_rows};
use brigade_gguf::{ModelFile, StageView, TensorSource, vocabulary_header};

use super::script::{Pass, Script};
use crate::adapters::{AdapterFile, Bundle, StageAdapter};
use crate::loaded::chain;
use crate::sizes::{StageShape, stage_options, view_of};
use crate::trial;

/// For each pass, what its rows yield: hidden states of all, or results of those with output.
pub(super) type Results = Vec<Vec<f32>>;

/// What stages took in memory, by their layers.
#[derive(Debug, Default)]
pub(super) struct Stages {
    pub found: BTreeMap<LayerRange, StageMemory>,
}

/// What all runs have in common.
#[derive(Clone, Copy)]
pub(super) struct Runner<'a> {
    pub file: &'a Arc<ModelFile>,
    pub script: &'a Script,
    pub shape: StageShape,
    pub n_threads: u32,
    /// What is added to the model's matrices.
    pub adapters: Option<&'a Bundle>,
}

impl Runner<'_> {
    /// The results of the whole model as llama.cpp's own readers load it, and one adapter if there is one.
    pub(super) fn uncut(&self, path: &Path, adapter: Option<&AdapterFile>) -> Result<Results, String> {
        let whole = self.whole().map_err(|error| chain(&error))?;
        let view = view_of(self.file.catalog(), whole, self.shape.pooling).map_err(|error| chain(&error))?;
        let mut options = stage_options(&view, self.shape, self.n_threads);
        self.tried(&view, &options)?;
        let catalog = self.file.catalog();
        if catalog.metadata().str("tokenizer.ggml.model") != Some("no_vocab") {
            trial::vocabulary(&vocabulary_header(catalog)).map_err(|error| chain(&error))?;
        }
        // The file has all tokens, its graph makes its own input, and rows for images may be wider.
        (options.n_vocab, options.n_embd, options.hooks) = (0, 0, Hooks::default());
        trial::uncut(catalog, &options).map_err(|error| chain(&error))?;
        let adapters: Vec<_> = adapter.iter().map(|adapter| (adapter.path.as_path(), adapter.scale)).collect();
        let mut stage = Stage::load_file_adapted(path, &adapters, options).map_err(|error| chain(&error))?;
        self.each(&mut stage, |_, pass| Given::Tokens(pass))
    }

    /// The results of the model in stages that begin at layer 0 and at `cuts`.
    pub(super) fn cut(&self, cuts: &[u32], stages: &mut Stages) -> Result<Results, String> {
        let n_layers = self.whole().map_err(|error| chain(&error))?.end();
        let ends = cuts.iter().copied().chain([n_layers]);
        let mut states = self.embeddings()?;
        for (start, end) in [0].into_iter().chain(cuts.iter().copied()).zip(ends) {
            let layers = LayerRange::new(start, end).map_err(|error| chain(&error))?;
            let view = view_of(self.file.catalog(), layers, self.shape.pooling).map_err(|error| chain(&error))?;
            let mut stage = self.load(&view).map_err(|error| format!("the stage of layers {layers}: {error}"))?;
            stages.found.insert(layers, stage.memory());
            if view.input_scale() != 1.0 {
                states.iter_mut().flatten().for_each(|value| *value *= view.input_scale());
            }
            states = self.each(&mut stage, |idx, pass| {
                if view.takes_tokens() { Given::Tokens(pass) } else { Given::States(&states[idx]) }
            })?;
        }
        Ok(states)
    }

    fn whole(&self) -> Result<LayerRange, brigade_gguf::StageViewError> {
        Ok(StageView::whole(self.file.catalog())?.layers())
    }

    fn load(&self, view: &StageView) -> Result<Stage, String> {
        let options = stage_options(view, self.shape, self.n_threads);
        let adapter = self.tried(view, &options)?.map(StageAdapter::into_source);
        let source = Arc::clone(self.file) as Arc<dyn TensorSource>;
        let reader = Box::new(view.reader(source));
        Stage::load_adapted(reader, view.n_bytes(), adapter, options, &mut |_| true).map_err(|error| chain(&error))
    }

    /// What of the adapters the stage needs, once the stage was tried with it.
    fn tried(&self, view: &StageView, options: &StageOptions) -> Result<Option<StageAdapter>, String> {
        let adapter = self.adapters.map(|adapters| adapters.cut(self.file.catalog(), view)).transpose();
        let adapter = adapter.map_err(|error| chain(&error))?.flatten();
        trial::stage(view, adapter.as_ref().map(|adapter| &adapter.view), options).map_err(|error| chain(&error))?;
        Ok(adapter)
    }

    /// Runs all passes; `given` tells what enters each of them.
    fn each<'a>(&'a self, stage: &mut Stage, given: impl Fn(usize, &'a Pass) -> Given<'a>) -> Result<Results, String> {
        let mut results = Vec::with_capacity(self.script.passes.len());
        for (idx, pass) in self.script.passes.iter().enumerate() {
            if let Some(rewind) = pass.rewind {
                stage.truncate(rewind.slot, rewind.n_keep).map_err(|error| chain(&error))?;
            }
            let input = match given(idx, pass) {
                Given::Tokens(pass) => Input::Tokens(&pass.tokens),
                Given::States(states) => Input::Hidden(states),
            };
            let mut out = Vec::new();
            stage.run(&pass.rows, input, &mut out).map_err(|error| chain(&error))?;
            results.push(out);
        }
        Ok(results)
    }

    /// The rows of the token embedding for the tokens of each pass.
    fn embeddings(&self) -> Result<Results, String> {
        let (catalog, name) = (self.file.catalog(), "token_embd.weight");
        let tensor = catalog.tensor_idx(name).ok_or_else(|| format!("the model has no tensor {name}"))?;
        let info = &catalog.tensors()[tensor];
        let n_embd = info.dims.first().copied().unwrap_or(0);
        let mut bytes = vec![0; info.ty.row_bytes(n_embd).unwrap_or(0) as usize];
        let rows_of = |pass: &Pass| {
            let mut rows = Vec::with_capacity(pass.tokens.len() * n_embd as usize);
            for &token in &pass.tokens {
                let at = u64::from(token.unsigned_abs()) * bytes.len() as u64;
                self.file.read_at(tensor, at, &mut bytes).map_err(|error| chain(&error))?;
                dequantize_rows(info.ty.id(), &bytes, n_embd as usize, &mut rows).map_err(|error| chain(&error))?;
            }
            Ok(rows)
        };
        self.script.passes.iter().map(rows_of).collect()
    }
}

/// What enters a pass.
enum Given<'a> {
    Tokens(&'a Pass),
    States(&'a [f32]),
}
