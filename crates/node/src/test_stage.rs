//! Layers in the middle of the small model of the repository, for tests: hidden states in, hidden states out.

use std::path::Path;
use std::sync::Arc;

use brigade_base::{KvTypes, LayerRange};
use brigade_gguf::{Metadata, ModelFile, StageView};
use brigade_protocol::frame::RowSet;

use crate::images::Images;
use crate::loaded::{LoadedStage, StageFiles, StageKey, load_stage};
use crate::stage_pass::PassRunner;

#[path = "../../engine/tests/support/recurrent.rs"]
mod recurrent;

/// Sessions of the stage.
pub const N_SLOTS: u32 = 8;

/// Most rows of a pass.
pub const MAX_ROWS: u32 = 32;

/// Loads two layers, as a worker would.
pub fn loaded(images: Images) -> LoadedStage {
    brigade_engine::init();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-f16.gguf");
    load(&path, images)
}

/// The same of a model that has attention and a state in each layer.
pub fn loaded_with_state(images: Images) -> LoadedStage {
    brigade_engine::init();
    let file = tempfile::NamedTempFile::new().unwrap();
    recurrent::write(&recurrent::metadata("falcon-h1", &Metadata::new()), file.path());
    load(file.path(), images)
}

fn load(path: &Path, images: Images) -> LoadedStage {
    let file = Arc::new(ModelFile::open(path).unwrap());
    let layers = LayerRange::new(2, 4).unwrap();
    let view = StageView::new(file.catalog(), layers).unwrap();
    let key = StageKey {
        header_hash: file.catalog().header_hash(),
        tensors: Vec::new(),
        layers,
        context: 64,
        sessions: N_SLOTS,
        max_rows: MAX_ROWS,
        kv: KvTypes::default(),
        adapters: None,
    };
    let files = StageFiles { view: &view, source: file, adapter: None };
    load_stage(key, files, None, 1, images, &mut |_| true).unwrap()
}

/// The hidden state `[n_embd]` of a made-up token at a position of a slot.
pub fn row(slot: u32, position: u32, n_embd: u32) -> impl Iterator<Item = f32> {
    (0..n_embd).map(move |i| {
        let mixed = (slot * 7919 + position * 104_729 + i * 31 + 1).wrapping_mul(2_654_435_761);
        (mixed >> 16) as f32 / 32768.0 - 1.0
    })
}

/// The hidden states `[n_rows, n_embd]` of row sets.
pub fn rows(sets: &[RowSet], n_embd: u32) -> Vec<f32> {
    let positions = sets.iter().flat_map(|set| (set.keep..set.keep + set.n_rows).map(|at| (set.slot, at)));
    positions.flat_map(|(slot, at)| row(slot, at, n_embd)).collect()
}

/// `n_rows` rows of a slot from position `keep` on.
pub fn set(slot: u32, keep: u32, n_rows: u32) -> RowSet {
    RowSet { slot, keep, n_rows, n_outputs: 0 }
}

/// Computes row sets with made-up hidden states; `[n_rows, n_embd]`.
pub fn compute(runner: &mut PassRunner, sets: &[RowSet]) -> Vec<f32> {
    let (mut hidden, mut out) = (rows(sets, runner.stage().n_embd()), Vec::new());
    runner.run(sets, &mut hidden, &mut out).unwrap();
    out
}
