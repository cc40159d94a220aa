//! Where a model may be cut: before layers that can begin a stage, whatever other cuts there are.

use crate::architecture::Architecture;

/// What cuts depend on beside the hyperparameters.
pub(crate) struct Facts {
    /// Numbers whose multiples stages may begin at.
    pub steps: Vec<u32>,
    /// Layers that rotate by position.
    pub rotates: Vec<bool>,
    /// Layers that have an index of their own; a stage begins with one, as the others use the last one's.
    pub indexes: Vec<bool>,
    /// Sliding layers have other heads than full ones, and the graph takes those of the first layer.
    pub swa_differs: bool,
}

/// The layers before which a cut is legal. Any set of them makes stages that each compute what those layers do in the
/// whole model.
pub(crate) fn cut_points(architecture: &Architecture, facts: &Facts) -> Vec<u32> {
    let n_layers = architecture.n_layers;
    let is_on_step = |cut: &u32| facts.steps.iter().all(|step| cut.is_multiple_of(*step));
    let slides = |cut: &u32| match &architecture.sliding_window {
        // Each stage begins with a sliding layer, except for the first, which has one further on.
        Some(window) if !window.is_separable => {
            let first = window.slides.iter().position(|slides| *slides).unwrap_or(window.slides.len());
            *cut as usize > first && window.slides[*cut as usize]
        }
        _ => true,
    };
    // Widths and rotations are taken from the heads of the first layer, so a stage begins with attention if the model
    // does.
    let has_heads = |layer: u32| architecture.n_head[layer as usize] > 0;
    let window = architecture.sliding_window.as_ref().filter(|_| facts.swa_differs);
    let is_swa = |layer: u32| window.is_some_and(|window| window.slides[layer as usize]);
    let begins_alike = |cut: &u32| has_heads(*cut) == has_heads(0) && is_swa(*cut) == is_swa(0);
    // A layer of deci without a feed-forward part has no output of its own.
    let ends_well = |cut: &u32| architecture.name != "deci" || architecture.n_ff[*cut as usize - 1] > 0;
    let cuts = (1..n_layers)
        .filter(|cut| is_on_step(cut) && slides(cut) && begins_alike(cut) && ends_well(cut))
        .filter(|cut| facts.indexes[*cut as usize])
        .collect();
    let state: Vec<bool> = (0..n_layers).map(|layer| architecture.state.is_in(layer)).collect();
    let kv: Vec<bool> = (0..n_layers).map(|layer| architecture.kv.is_in(layer)).collect();
    // Without a KV cache both masks are filled where there is a window.
    let masked = architecture.sliding_window.as_ref().filter(|_| architecture.is_encoder());
    let slides: Vec<bool> = masked.map_or_else(Vec::new, |window| window.slides.clone());
    let sees_all: Vec<bool> = slides.iter().map(|slides| !slides).collect();
    // The graph of llama4 has an input for layers that do not rotate, every fourth one.
    let is_still = |layer: u32| architecture.name == "llama4" && (layer + 1).is_multiple_of(4);
    let still: Vec<bool> = (0..n_layers).map(is_still).collect();
    let cuts = with_kinds(cuts, &[&still, &state, &kv, &facts.rotates, &facts.indexes, &slides, &sees_all]);
    without_recognised(cuts, architecture)
}

/// Leaves out cuts until each stage between two of them, or between one and an end of the model, has a layer of each
/// kind that the model has: graphs fill the inputs of all kinds, and end the process over one that no layer uses.
fn with_kinds(cuts: Vec<u32>, kinds: &[&Vec<bool>]) -> Vec<u32> {
    let kinds: Vec<_> = kinds.iter().filter(|kind| kind.contains(&true)).collect();
    let has_all = |from: u32, to: usize| kinds.iter().all(|kind| kind[from as usize..to].contains(&true));
    let n_layers = kinds.first().map_or(0, |kind| kind.len());
    let mut kept = Vec::with_capacity(cuts.len());
    let mut start = 0;
    for cut in cuts {
        if has_all(start, cut as usize) && has_all(cut, n_layers) {
            kept.push(cut);
            start = cut;
        }
    }
    kept
}

/// Leaves out cuts until no stage between two of them, or between one and an end of the model, has a number of layers
/// by which libllama recognises something else.
fn without_recognised(cuts: Vec<u32>, architecture: &Architecture) -> Vec<u32> {
    let recognised = architecture.rules.recognised;
    let n_layers = architecture.n_layers;
    if recognised.is_empty() || recognised.contains(&n_layers) {
        return cuts;
    }
    let mut kept: Vec<u32> = Vec::with_capacity(cuts.len());
    for cut in cuts {
        let is_bad = |other: &u32| recognised.contains(&(cut - other));
        if !is_bad(&0) && !kept.iter().any(is_bad) && !recognised.contains(&(n_layers - cut)) {
            kept.push(cut);
        }
    }
    kept
}
