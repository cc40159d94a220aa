//! A model with LoRA adapters: cut into stages it answers as the whole one with llama.cpp's own reader.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigade_base::{KvType, KvTypes, LayerRange, Pooling, Token};
use brigade_engine::{
    AdapterSource, Input, LoadError, Row, Stage, StageOptions, dequantize_rows, hollow, rehearse_adapted,
};
use brigade_gguf::{
    AdapterView, Architecture, Builder, Catalog, GgmlType, Metadata, ModelFile, StageView, TensorSource,
    bundle_adapters,
};
use support::synthetic::{N_VOCAB, Synthetic, named};
use support::{abacus, difference, generate, open, options, recurrent, synthetic, tokens};

/// An adapter to make.
struct Lora {
    alpha: f32,
    rank: u64,
    ty: GgmlType,
    /// Ends of the names of matrices.
    targets: &'static [&'static str],
    seed: u64,
}

const ATTENTION: Lora =
    Lora { alpha: 16.0, rank: 8, ty: GgmlType::F16, targets: &["attn_q.weight", "attn_v.weight"], seed: 1 };
const ALL: Lora = Lora {
    alpha: 0.0,
    rank: 4,
    ty: GgmlType::F32,
    targets: &["attn_q.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight", "output.weight"],
    seed: 2,
};

impl Lora {
    fn write(&self, model: &Catalog, path: &Path) {
        let architecture = model.metadata().str("general.architecture").unwrap();
        let mut metadata = Metadata::new();
        for (key, value) in
            [("general.architecture", architecture), ("general.type", "adapter"), ("adapter.type", "lora")]
        {
            metadata.set(key, value);
        }
        metadata.set("adapter.lora.alpha", self.alpha);
        let mut builder = Builder::new(&metadata);
        for tensor in model.tensors().iter().filter(|t| self.targets.iter().any(|end| t.name.ends_with(end))) {
            let (mut a, mut b) = (tensor.dims.clone(), tensor.dims.clone());
            (a[1], b[0]) = (self.rank, self.rank);
            builder.tensor(format!("{}.lora_a", tensor.name), &a, self.ty).unwrap();
            builder.tensor(format!("{}.lora_b", tensor.name), &b, self.ty).unwrap();
        }
        let mut state = self.seed;
        let mut value = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            0.1 * ((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
        };
        let is_half = self.ty == GgmlType::F16;
        builder
            .write(&mut File::create(path).unwrap(), |_, _, bytes| {
                for element in bytes.chunks_exact_mut(if is_half { 2 } else { 4 }) {
                    let value = value();
                    // Half precision of a number between 2^-14 and 1, cut off.
                    let half =
                        (value.to_bits() >> 16 & 0x8000) | ((value.to_bits() >> 13).wrapping_sub(112 << 10) & 0x7fff);
                    match is_half {
                        true if value.abs() < 1e-4 => element.fill(0),
                        true => element.copy_from_slice(&(half as u16).to_le_bytes()),
                        false => element.copy_from_slice(&value.to_le_bytes()),
                    }
                }
                Ok(())
            })
            .unwrap();
    }
}

/// The tensors of all adapters, one after the other.
struct Files(Vec<ModelFile>);

impl TensorSource for Files {
    fn read_tensor(&self, mut idx: usize, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        for file in &self.0 {
            let n = file.catalog().tensors().len();
            if idx < n {
                return file.read_at(idx, offset, buf);
            }
            idx -= n;
        }
        unreachable!("the adapters have fewer tensors")
    }
}

struct Adapted {
    model: Arc<ModelFile>,
    files: Arc<Files>,
    bundle: Catalog,
    paths: Vec<(PathBuf, f32)>,
    /// Holds the adapters' files.
    _dir: tempfile::TempDir,
}

impl Adapted {
    fn new(model: &Path, loras: &[(&Lora, f32)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = Arc::new(ModelFile::open(model).unwrap());
        let mut paths = Vec::new();
        for (i, (lora, scale)) in loras.iter().enumerate() {
            let path = dir.path().join(format!("{i}.gguf"));
            lora.write(model.catalog(), &path);
            paths.push((path, *scale));
        }
        let files: Vec<_> = paths.iter().map(|(path, _)| ModelFile::open(path).unwrap()).collect();
        let given: Vec<_> = files.iter().zip(loras).map(|(file, (_, scale))| (file.catalog(), *scale)).collect();
        let bundle = bundle_adapters(model.catalog(), &given).unwrap();
        // What travels is the header.
        let bundle = Catalog::parse_header(&bundle.header_bytes(true)).unwrap();
        Self { model, files: Arc::new(Files(files)), bundle, paths, _dir: dir }
    }

    /// What llama.cpp makes of the files.
    fn whole(&self, text: &[Token]) -> Vec<f32> {
        let adapters: Vec<_> = self.paths.iter().map(|(path, scale)| (path.as_path(), *scale)).collect();
        let mut stage = Stage::load_file_adapted(self.model.path(), &adapters, options()).unwrap();
        generate(&mut stage, 1, text, 16)
    }

    fn stage(&self, view: &StageView) -> Stage {
        let adapter =
            AdapterView::new(&self.bundle, self.model.catalog(), view).unwrap().map(|adapter| AdapterSource {
                reader: Box::new(adapter.reader(self.files.clone())),
                n_bytes: adapter.n_bytes(),
                weight_bytes: adapter.weight_bytes(),
                scale: adapter.scale(),
            });
        let options = StageOptions { n_embd: view.n_embd(), n_vocab: view.n_vocab(), hooks: view.hooks(), ..options() };
        let reader = Box::new(view.reader(self.model.clone()));
        Stage::load_adapted(reader, view.n_bytes(), adapter, options, &mut |_| true).unwrap()
    }

    /// What the model yields that is cut before each of the layers in `cuts`.
    fn cut(&self, cuts: &[u32], text: &[Token]) -> Vec<f32> {
        let catalog = self.model.catalog();
        let n_layers = Architecture::of(catalog).unwrap().n_layers;
        let bounds: Vec<u32> = [0].iter().chain(cuts).chain(&[n_layers]).copied().collect();
        let views = bounds.windows(2).map(|b| StageView::new(catalog, LayerRange::new(b[0], b[1]).unwrap()).unwrap());
        let mut stages: Vec<_> = views.map(|view| (view.input_scale(), self.stage(&view))).collect();
        let mut all = Vec::new();
        let parts = std::iter::once(0..16).chain((16..text.len()).map(|at| at..at + 1));
        for part in parts {
            let rows: Vec<_> = part.clone().map(|at| Row { slot: 1, position: at as u32, output: true }).collect();
            let mut hidden = self.embed(&text[part]);
            let mut out = Vec::new();
            for (scale, stage) in &mut stages {
                hidden.iter_mut().for_each(|value| *value *= *scale);
                stage.run(&rows, Input::Hidden(&hidden), &mut out).unwrap();
                std::mem::swap(&mut hidden, &mut out);
            }
            all.extend(hidden);
        }
        all
    }

    fn embed(&self, tokens: &[Token]) -> Vec<f32> {
        let catalog = self.model.catalog();
        let idx = catalog.tensor_idx("token_embd.weight").unwrap();
        let tensor = &catalog.tensors()[idx];
        let mut row = vec![0; tensor.row_bytes() as usize];
        let mut hidden = Vec::new();
        for token in tokens {
            self.model.read_tensor(idx, *token as u64 * row.len() as u64, &mut row).unwrap();
            dequantize_rows(tensor.ty.id(), &row, tensor.dims[0] as usize, &mut hidden).unwrap();
        }
        hidden
    }
}

fn model(name: &str, dir: &Path) -> (PathBuf, usize) {
    match name {
        "abacus" => (abacus(), 1024),
        name => {
            let path = dir.join(name);
            named(name).write(&path);
            (path, N_VOCAB)
        }
    }
}

#[test]
fn a_cut_model_with_an_adapter_is_the_whole_one_with_it() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["abacus", "llama", "llama-q8_0", "qwen2", "gemma2"] {
        let (path, n_vocab) = model(name, dir.path());
        let text = tokens(24, n_vocab, 5);
        let plain = Adapted::new(&path, &[]).whole(&text);
        for (lora, scale) in [(&ATTENTION, 1.0), (&ALL, -0.5)] {
            let adapted = Adapted::new(&path, &[(lora, scale)]);
            let expected = adapted.whole(&text);
            assert!(difference(&plain, &expected) > 1e-3, "{name}: the adapter does nothing");
            let cuts = Architecture::of(adapted.model.catalog()).unwrap().cut_points();
            let (first, last) = (cuts[0], cuts[cuts.len() - 1]);
            for cuts in [&[][..], &[first], &[first, last]] {
                assert!(adapted.cut(cuts, &text) == expected, "{name} cut at {cuts:?}, scale {scale}");
            }
        }
    }
}

#[test]
fn experts_are_adapted_too() {
    let dir = tempfile::tempdir().unwrap();
    let lora = Lora { targets: &["ffn_up_exps.weight", "ffn_down_exps.weight"], ..ALL };
    for model in [Synthetic { name: "mixtral", ..named("mixtral") }, named("qwen3moe")] {
        let path = dir.path().join(model.name);
        model.write(&path);
        let text = tokens(24, N_VOCAB, 5);
        let adapted = Adapted::new(&path, &[(&lora, 2.0)]);
        let expected = adapted.whole(&text);
        assert!(expected != Adapted::new(&path, &[]).whole(&text));
        assert!(adapted.cut(&[2], &text) == expected, "{}", model.name);
    }
}

/// Several adapters are added up in F32 before libllama sees them, in the same way in each stage.
#[test]
fn several_adapters_are_joined_alike_in_every_stage() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["abacus", "llama"] {
        let (path, n_vocab) = model(name, dir.path());
        let text = tokens(24, n_vocab, 5);
        let adapted = Adapted::new(&path, &[(&ATTENTION, 0.7), (&ALL, -0.5)]);
        let expected = adapted.cut(&[], &text);
        assert!(adapted.cut(&[1, 3], &text) == expected, "{name}");
        let found = difference(&adapted.whole(&text), &expected);
        assert!(found < 5e-3, "{name}: {found} from what llama.cpp makes of them");
        for one in [(&ATTENTION, 0.7), (&ALL, -0.5)] {
            assert!(difference(&Adapted::new(&path, &[one]).whole(&text), &expected) > 1e-2, "{name}: one is left out");
        }
    }
}

#[test]
fn what_is_no_adapter_is_an_error() {
    let load = |adapter: &Path| Stage::load_file_adapted(&abacus(), &[(adapter, 1.0)], options());
    assert!(matches!(load(&abacus()), Err(LoadError::Adapter(why)) if why.contains("adapter")));
    assert!(matches!(load(Path::new("not there")), Err(LoadError::Adapter(_))));
}

/// Builds the graphs of the model in `path` with an adapter for all matrices of its layers.
fn rehearse_with_adapter(path: &Path, options: &StageOptions) {
    let (model, n_bytes) = open(path);
    let file = ModelFile::open(path).unwrap();
    let mut metadata = Metadata::new();
    let architecture = file.catalog().metadata().str("general.architecture").unwrap();
    for (key, value) in [("general.architecture", architecture), ("general.type", "adapter"), ("adapter.type", "lora")]
    {
        metadata.set(key, value);
    }
    let mut builder = Builder::new(&metadata);
    let is_matrix = |dims: &[u64]| (2..=3).contains(&dims.len()) && dims[1] > 1;
    for tensor in file.catalog().tensors().iter().filter(|t| t.name.starts_with("blk.") && is_matrix(&t.dims)) {
        let (mut a, mut b) = (tensor.dims.clone(), tensor.dims.clone());
        (a[1], b[0]) = (1, 1);
        builder.tensor(format!("{}.lora_a", tensor.name), &a, GgmlType::F32).unwrap();
        builder.tensor(format!("{}.lora_b", tensor.name), &b, GgmlType::F32).unwrap();
    }
    let adapter =
        AdapterSource { reader: hollow(builder.header_bytes()), n_bytes: 1 << 30, weight_bytes: 0, scale: 1.0 };
    rehearse_adapted(model, n_bytes, adapter, options).unwrap();
}

#[test]
fn graphs_of_every_kind_are_rehearsed_with_an_adapter() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for model in synthetic::ALL.iter().chain(&synthetic::EMBEDDERS) {
        model.write(file.path());
        let is_embedder = synthetic::EMBEDDERS.iter().any(|embedder| embedder.name == model.name);
        let pooling = is_embedder.then_some(Pooling::Mean);
        rehearse_with_adapter(file.path(), &StageOptions { pooling, ..options() });
    }
    for name in recurrent::ALL {
        recurrent::write(&recurrent::metadata(name, &Metadata::new()), file.path());
        rehearse_with_adapter(file.path(), &options());
    }
    let kv = KvTypes { k: KvType::Q8_0, v: KvType::Q8_0 };
    rehearse_with_adapter(&abacus(), &StageOptions { kv, ..options() });
    // As many rows as cells.
    rehearse_with_adapter(&abacus(), &StageOptions { n_ctx: 256, n_sessions: 2, max_rows: 512, ..options() });
}
