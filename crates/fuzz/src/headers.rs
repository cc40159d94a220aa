//! Headers of models, as they come from files and from peers.

use std::collections::BTreeSet;

use brigade_base::LayerRange;
use brigade_gguf::{Architecture, Catalog, StageView, StageViewError, TensorRole, vocabulary_header};

/// Most cuts of one model that are tried: the first, the last, and some between.
const MAX_CUTS: usize = 6;

/// Any bytes: the parser ends without a panic, and what it accepts survives being written and read again.
pub fn header(bytes: &[u8]) {
    let Ok(catalog) = Catalog::parse(bytes, bytes.len() as u64) else { return };
    let again = Catalog::parse_header(&catalog.header_bytes(false)).expect("a written header can be read");
    assert_eq!(again.header_hash(), catalog.header_hash(), "a written header says the same");
    assert_eq!(again.tensors().len(), catalog.tensors().len());
    let parts = [(bytes.to_vec(), bytes.len() as u64)];
    drop(Catalog::parse_parts(&parts));
    drop(Catalog::parse(&bytes[..bytes.len() / 2], bytes.len() as u64));
    drop(catalog.quantisation());
    for tensor in catalog.tensors() {
        assert!(tensor.offset + tensor.n_bytes <= bytes.len() as u64, "a tensor lies in its file");
        assert!(tensor.row_bytes() <= tensor.n_bytes);
        let _ = (TensorRole::of(&tensor.name), tensor.n_elements());
    }
    let _ = (catalog.n_parameters(), catalog.bytes_per_layer(), catalog.weight_bytes());
    Catalog::parse_header(&vocabulary_header(&catalog)).expect("the vocabulary alone is a sound header");
}

/// Any header, as it could come from a peer: every legal cut yields views whose virtual headers can be read, and are
/// models of as many layers.
pub fn stage_view(bytes: &[u8]) {
    let Ok(catalog) = Catalog::parse_header(bytes) else { return };
    let Ok(architecture) = Architecture::of(&catalog) else { return };
    let n_layers = architecture.n_layers;
    for layer in 0..=n_layers {
        let _ = (architecture.layer_bytes(layer), architecture.state_bytes(layer));
    }
    let _ = (architecture.unread_embedding_bytes(), architecture.head_bytes(), architecture.expert_bytes());
    let cuts = architecture.cut_points();
    assert!(cuts.is_sorted() && cuts.iter().all(|cut| (1..n_layers).contains(cut)), "cuts lie inside: {cuts:?}");
    let step = cuts.len().div_ceil(MAX_CUTS).max(1);
    let tried = cuts.iter().copied().step_by(step).chain(cuts.last().copied());
    let ends: BTreeSet<u32> = tried.chain([0, n_layers]).collect();
    for start in &ends {
        for end in ends.iter().filter(|end| *end > start) {
            check_view(&catalog, LayerRange::new(*start, *end).expect("it is not empty"));
        }
    }
    // Where no cut is legal there is no view, and no panic.
    for end in 1..n_layers.min(8) {
        drop(StageView::new(&catalog, LayerRange::new(0, end).expect("it is not empty")));
    }
    drop(StageView::pooled(&catalog, LayerRange::new(0, n_layers).expect("a model has layers")));
}

fn check_view(catalog: &Catalog, layers: LayerRange) {
    let view = match StageView::new(catalog, layers) {
        Ok(view) => view,
        Err(StageViewError::NotCuttable { .. } | StageViewError::NoSuchLayers { .. }) => {
            panic!("a legal cut is refused: {layers}");
        }
        // Names and sizes may be sound in the model and not in the view.
        Err(_) => return,
    };
    let stage = Catalog::parse(view.header_bytes(), view.n_bytes()).expect("a view is a sound file");
    let architecture = match Architecture::of(&stage) {
        Ok(architecture) => architecture,
        Err(error) => panic!("the stage {layers} is no sound model: {error}"),
    };
    assert_eq!(architecture.n_layers, layers.len(), "a stage has its layers");
    assert_eq!(stage.weight_bytes(), view.weight_bytes(), "a view says what it takes");
    assert!(view.tensors().iter().all(|idx| *idx < catalog.tensors().len()), "a view's tensors exist");
}
