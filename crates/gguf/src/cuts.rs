//! Where a model may be cut: before layers that can begin a stage, whatever other cuts there are.

use std::collections::BTreeSet;

use crate::architecture::Architecture;

/// What cuts depend on beside the hyperparameters.
pub(crate) struct Facts {
    /// Numbers whose multiples stages may begin at.
    pub steps: Vec<u32>,
    /// Layers that rotate by position.
    pub rotates: Vec<bool>,
    /// Layers that have an index of their own; a stage begins with one, as the others use the last one's.
    pub indexes: Vec<bool>,
    /// Layers that route to experts, if some do not.
    pub routes: Vec<bool>,
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
    // A layer without a feed-forward part has no output of its own there.
    let ends_well = |cut: &u32| !architecture.rules.has_bare_layers || architecture.n_ff[*cut as usize - 1] > 0;
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
    let cuts =
        with_kinds(cuts, &[&still, &state, &kv, &facts.rotates, &facts.indexes, &facts.routes, &slides, &sees_all]);
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
    let (rules, n_layers) = (architecture.rules, architecture.n_layers);
    let is_bad = |n: u32| rules.recognised.contains(&n);
    // Only the final stage has all tokens.
    let is_bad_end = |n: u32| rules.recognises(n, architecture.n_vocab);
    if rules.recognised.is_empty() || is_bad_end(n_layers) {
        return cuts;
    }
    let open: Vec<u32> = cuts.into_iter().filter(|cut| !is_bad(*cut) && !is_bad_end(n_layers - cut)).collect();
    // Taken in their order more cuts go together, but behind the first ones there may be a wide run without any; taken
    // from the middle of the widest run on, they are spread.
    let in_order = compatible(open.clone(), n_layers, is_bad, |_, cut| *cut);
    let spread = compatible(open, n_layers, is_bad, |kept, cut| {
        let start = kept.range(..cut).next_back().map_or(*cut, |start| cut - start);
        let end = kept.range(cut..).next().map_or(*cut, |end| end - cut);
        // The widest run first, and in it what is nearest to its middle.
        (2 * n_layers - (start + end)) * n_layers + start.abs_diff(end)
    });
    if widest(&spread, n_layers) < widest(&in_order, n_layers) { spread } else { in_order }
}

/// Of the cuts in `open` those that go together: again and again the one of the lowest `rank` beside those that were
/// taken already (and the ends of the model), without those at a bad distance from it.
fn compatible(
    mut open: Vec<u32>,
    n_layers: u32,
    is_bad: impl Fn(u32) -> bool,
    rank: impl Fn(&BTreeSet<u32>, &u32) -> u32,
) -> Vec<u32> {
    let mut kept = BTreeSet::from([0, n_layers]);
    while let Some(cut) = open.iter().copied().min_by_key(|cut| rank(&kept, cut)) {
        kept.insert(cut);
        open.retain(|other| *other != cut && !is_bad(other.abs_diff(cut)));
    }
    kept.into_iter().filter(|cut| *cut > 0 && *cut < n_layers).collect()
}

/// Most layers between two neighbouring cuts, or between one and an end of the model.
fn widest(cuts: &[u32], n_layers: u32) -> u32 {
    let starts = std::iter::once(0).chain(cuts.iter().copied());
    starts.zip(cuts.iter().copied().chain([n_layers])).map(|(start, end)| end - start).max().unwrap_or(n_layers)
}
