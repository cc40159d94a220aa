//! The choice itself: which nodes, and where to cut.

use brigade_base::{ByteSize, LayerRange};

use crate::memory::{KV_PADDING, missing, stage_memory, usable};
use crate::optimise::{Choice, Ring, explain};
use crate::predict::{Prediction, RingModel, RingStage};
use crate::units::Units;
use crate::{Demand, Links, ModelProfile, NodeProfile, Optimize, Plan, PlanError, PlannedStage};

/// Places a model on nodes; the last of them is the coordinator.
///
/// Where a node's speed is known, the ring with the least [`RingModel::cost_s`] is chosen, exactly for up to 12 nodes
/// and layers that are alike. The coordinator alone is kept unless a split is expected to be 5 % better, and with
/// [`Demand::spread`] all nodes are used as far as there are places to cut. A node whose speed is not known counts as
/// the slowest of the others.
///
/// Where none is known, or with [`Optimize::Memory`], the fewest nodes that hold the model are used: each further one
/// adds a hop to every token. Among those, the cuts minimise the fullest node's use of its memory, which is what a
/// split in proportion to memory does where layers can be divided freely; an exact dynamic programme over the legal
/// cuts, O(nodes · cuts²).
///
/// # Errors
/// If the model does not fit, or a pinned split is not possible.
///
/// # Panics
/// Never for a profile whose lists are as long as they say.
pub fn place(model: &ModelProfile, nodes: &[NodeProfile], links: &Links, demand: &Demand) -> Result<Plan, PlanError> {
    if let Some(split) = &demand.split {
        return pinned(model, nodes, links, demand, split);
    }
    let by_memory = by_memory(model, nodes, demand);
    if is_measured(nodes, demand)
        && let Some(choice) = Choice::new(model, nodes, links, demand, by_memory.as_ref())
        && let Some(ring) = choice.ring()
    {
        return Ok(chosen(model, nodes, links, demand, &choice, &ring));
    }
    let ring = by_memory.ok_or_else(|| does_not_fit(model, nodes, demand))?;
    let mut plan = assemble(model, nodes, links, demand, &ring);
    plan.explanation = explain_by_memory(model, nodes, demand, ring.len());
    Ok(plan)
}

/// Places a model on nodes of which any may be the coordinator: for machines that are not there yet. With a pinned
/// split, and where no speed is known, it is the last one, or the one with the most memory.
///
/// # Errors
/// As [`place`].
pub fn place_anywhere(
    model: &ModelProfile,
    nodes: &[NodeProfile],
    links: &Links,
    demand: &Demand,
) -> Result<Plan, PlanError> {
    if demand.split.is_some() {
        return place(model, nodes, links, demand);
    }
    // The first of those with the most memory.
    let largest = (0..nodes.len()).rev().max_by_key(|&i| nodes[i].memory).unwrap_or(0);
    let mut others = nodes.to_vec();
    if largest < others.len() {
        let coordinator = others.remove(largest);
        others.push(coordinator);
    }
    let by_memory = by_memory(model, &others, demand);
    if is_measured(nodes, demand)
        && let Some(choice) = Choice::anywhere(model, &others, links, demand, by_memory.as_ref())
        && let Some(ring) = choice.ring()
    {
        return Ok(chosen(model, &others, links, demand, &choice, &ring));
    }
    place(model, &others, links, demand)
}

fn is_measured(nodes: &[NodeProfile], demand: &Demand) -> bool {
    demand.optimize != Optimize::Memory && nodes.iter().any(|node| node.speed.is_some())
}

fn chosen(
    model: &ModelProfile,
    nodes: &[NodeProfile],
    links: &Links,
    demand: &Demand,
    choice: &Choice,
    ring: &Ring,
) -> Plan {
    let mut plan = assemble(model, nodes, links, demand, ring);
    plan.explanation = explain(choice, plan.prediction.as_ref());
    plan.explanation.extend(model.stays_whole());
    plan
}

/// Whether a node can hold the whole model as the coordinator.
pub(crate) fn can_hold(model: &ModelProfile, node: &NodeProfile, demand: &Demand) -> bool {
    let all = LayerRange::new(0, model.n_layers());
    all.is_ok_and(|all| stage_memory(model, demand, all, true).total() <= usable(node.memory))
}

/// The plan for one node alone, without words; `None` if it cannot hold the model. What was asked about the split does
/// not count.
pub(crate) fn alone_on(model: &ModelProfile, node: &NodeProfile, links: &Links, demand: &Demand) -> Option<Plan> {
    let all = LayerRange::new(0, model.n_layers()).ok().filter(|_| can_hold(model, node, demand))?;
    Some(assemble(model, std::slice::from_ref(node), links, demand, &vec![(0, all)]))
}

/// What these stages will do, if the speed of all their nodes is known.
pub fn predict(
    model: &ModelProfile,
    nodes: &[NodeProfile],
    links: &Links,
    demand: &Demand,
    stages: &[PlannedStage],
) -> Option<Prediction> {
    let of = |stage: &PlannedStage| {
        let node = nodes.iter().find(|node| node.id == stage.node)?;
        Some(RingStage { node, speed: node.speed.as_ref()?, layers: stage.layers })
    };
    let ring = stages.iter().map(of).collect::<Option<Vec<_>>>()?;
    Some(RingModel::new(model, &ring, links, demand).predict())
}

/// The ring that memory alone would choose, `None` if there is none.
pub(crate) fn by_memory(model: &ModelProfile, nodes: &[NodeProfile], demand: &Demand) -> Option<Ring> {
    let (coordinator, workers) = nodes.split_last()?;
    let units = Units::new(model, demand)?;
    // The largest workers first, so that the fewest are needed; those chosen stay in the order in which they came.
    let mut by_memory: Vec<usize> = (0..workers.len()).collect();
    by_memory.sort_by_key(|&i| std::cmp::Reverse(workers[i].memory));
    let most = workers.len().min(units.len() - 1);
    let fewest = if demand.spread { most } else { 0 };
    let mut room = units.most(usable(coordinator.memory).0, true, false);
    for count in 0..=most {
        room += count.checked_sub(1).map_or(0, |k| units.most(usable(workers[by_memory[k]].memory).0, false, false));
        if count < fewest || room < units.len() {
            continue;
        }
        let mut chosen = by_memory[..count].to_vec();
        chosen.sort_unstable();
        // Where pieces differ, what does not fit in one order may fit in another.
        let by_size = by_memory[..count].to_vec();
        for mut chosen in [chosen, by_size.iter().rev().copied().collect(), by_size] {
            chosen.push(workers.len());
            let usable: Vec<u64> = chosen.iter().map(|&i| usable(nodes[i].memory).0).collect();
            if let Some(ranges) = balance(&units, &usable) {
                return Some(chosen.into_iter().zip(ranges).collect());
            }
        }
    }
    None
}

/// Cost of a way to fill the first nodes: the fullest node's share, then evenness.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
struct Fill {
    fullest: f64,
    squares: f64,
}

/// The cuts for nodes that can use so many bytes, in ring order, that leave the fullest one emptiest; `None` if they
/// cannot hold the model.
fn balance(units: &Units, usable: &[u64]) -> Option<Vec<LayerRange>> {
    let n = units.len();
    // best[k][end] is the best way for the nodes up to k to hold everything before that piece, and the piece with which
    // the last of them begins.
    let mut best: Vec<Vec<Option<(Fill, usize)>>> = Vec::with_capacity(usable.len());
    for (k, &capacity) in usable.iter().enumerate() {
        let is_tail = k + 1 == usable.len();
        let mut row = vec![None; n + 1];
        for end in if is_tail { n..=n } else { 1..=n } {
            for start in (0..end).rev() {
                let needed = units.needs(start, end, is_tail);
                if needed > capacity {
                    break;
                }
                let before = match k {
                    0 if start == 0 => Some(Fill { fullest: 0.0, squares: 0.0 }),
                    0 => None,
                    _ => best[k - 1][start].map(|(fill, _)| fill),
                };
                let Some(before) = before else { continue };
                let share = needed as f64 / capacity as f64;
                let fill = Fill { fullest: before.fullest.max(share), squares: before.squares + share * share };
                // Of equals the one that begins first.
                if row[end].is_none_or(|(other, _)| fill <= other) {
                    row[end] = Some((fill, start));
                }
            }
        }
        best.push(row);
    }
    let mut end = n;
    let mut ranges = Vec::with_capacity(usable.len());
    for row in best.iter().rev() {
        let (_, start) = row[end]?;
        ranges.push(units.layers(start, end)?);
        end = start;
    }
    ranges.reverse();
    Some(ranges)
}

/// Whether a pinned split is possible for this model at all, whatever the nodes.
///
/// # Errors
/// If it has a stage without layers, does not add up, or cuts where the model cannot be cut.
pub fn check_split(model: &ModelProfile, split: &[u32]) -> Result<(), PlanError> {
    let n_layers = model.n_layers();
    if split.contains(&0) || split.is_empty() {
        return Err(PlanError::SplitEmpty { split: split.to_vec() });
    }
    if split.iter().map(|&n| u64::from(n)).sum::<u64>() != u64::from(n_layers) {
        return Err(PlanError::SplitSum { split: split.to_vec(), n_layers });
    }
    if let (Some(why), stages @ 2..) = (model.why_whole, split.len()) {
        return Err(PlanError::SplitWhole { stages, why });
    }
    let mut at = 0;
    for count in &split[..split.len() - 1] {
        at += count;
        if !model.cut_points.contains(&at) {
            return Err(PlanError::SplitCut { at, allowed: model.cut_points.clone() });
        }
    }
    Ok(())
}

fn pinned(
    model: &ModelProfile,
    nodes: &[NodeProfile],
    links: &Links,
    demand: &Demand,
    split: &[u32],
) -> Result<Plan, PlanError> {
    check_split(model, split)?;
    if split.len() > nodes.len() {
        return Err(PlanError::SplitNodes { stages: split.len(), nodes: nodes.len() });
    }
    let places = (0..split.len() - 1).chain([nodes.len() - 1]);
    let mut ring = Ring::new();
    let mut start = 0;
    for (place, &count) in places.zip(split) {
        let layers =
            LayerRange::new(start, start + count).map_err(|_| PlanError::SplitEmpty { split: split.to_vec() })?;
        let needed = stage_memory(model, demand, layers, ring.len() + 1 == split.len()).total();
        let usable = usable(nodes[place].memory);
        if needed > usable {
            let (name, missing) = (nodes[place].name.clone(), missing(needed, nodes[place].memory));
            return Err(PlanError::SplitTooLarge { name, layers: count, needed, usable, missing });
        }
        ring.push((place, layers));
        start += count;
    }
    let mut plan = assemble(model, nodes, links, demand, &ring);
    plan.explanation = vec!["The split was pinned with --layers.".to_owned()];
    Ok(plan)
}

/// The plan of a ring, yet without words.
fn assemble(model: &ModelProfile, nodes: &[NodeProfile], links: &Links, demand: &Demand, ring: &Ring) -> Plan {
    let stage = |(k, &(place, layers)): (usize, &(usize, LayerRange))| PlannedStage {
        node: nodes[place].id,
        name: nodes[place].name.clone(),
        layers,
        memory: stage_memory(model, demand, layers, k + 1 == ring.len()),
        offered: nodes[place].memory,
    };
    let stages: Vec<PlannedStage> = ring.iter().enumerate().map(stage).collect();
    let prediction = predict(model, nodes, links, demand, &stages);
    Plan { stages, prediction, explanation: Vec::new() }
}

fn explain_by_memory(model: &ModelProfile, nodes: &[NodeProfile], demand: &Demand, n_stages: usize) -> Vec<String> {
    let idle = nodes.len() - n_stages;
    let mut explanation = vec![match (n_stages, idle) {
        (1, 0) => "The coordinator holds the whole model.".to_owned(),
        (1, _) => {
            "The coordinator alone holds the model: no token waits for a link. --spread uses the other nodes all \
                   the same."
                .to_owned()
        }
        (n, 0) => format!("The model is split over all {n} nodes, in proportion to what each can use."),
        (n, idle) => {
            format!("The model needs {n} of {} nodes; {idle} stay idle, since each hop costs time.", nodes.len())
        }
    }];
    explanation.extend(model.stays_whole());
    if demand.spread && idle > 0 && model.why_whole.is_none() {
        explanation.push(format!(
            "The model has only {} places to cut, so not every node gets a stage.",
            model.cut_points.len()
        ));
    }
    explanation
}

fn does_not_fit(model: &ModelProfile, nodes: &[NodeProfile], demand: &Demand) -> PlanError {
    let Ok(all) = LayerRange::new(0, model.n_layers()) else {
        return PlanError::SplitEmpty { split: Vec::new() };
    };
    let whole = stage_memory(model, demand, all, true);
    let extra = whole.fixed().saturating_mul(nodes.len().saturating_sub(1) as u64);
    let needed = ByteSize(whole.total().0.saturating_add(extra));
    let offered = ByteSize(nodes.iter().map(|node| usable(node.memory).0).fold(0, u64::saturating_add));
    let fits = |demand: Demand| by_memory(model, nodes, &demand).is_some();
    let blocks = |count: u32| Demand { context: count * KV_PADDING, ..demand.clone() };
    let sessions = |count: u32| Demand { parallel: count, ..demand.clone() };
    let fits_context = most_that(demand.context.saturating_sub(1) / KV_PADDING, |n| fits(blocks(n)));
    let fits_parallel = most_that(demand.parallel.saturating_sub(1), |n| fits(sessions(n)));
    let fits_context = fits_context.map(|count| count * KV_PADDING);
    if let (Some(why), Some(node)) = (model.why_whole, nodes.last()) {
        let (needed, name) = (whole.total(), node.name.clone());
        let (offered, missing) = (usable(node.memory), missing(needed, node.memory));
        return PlanError::WholeDoesNotFit { why, name, needed, offered, missing, fits_context, fits_parallel };
    }
    let (missing, on) = lacking(model, nodes, demand, whole.total());
    PlanError::DoesNotFit { needed, offered, missing, on, n_nodes: nodes.len(), fits_context, fits_parallel }
}

/// The least that the coordinator would have to offer beyond what it does so that the model fits, and its name; where
/// nothing that it offers would do, since a worker is too small for any piece, what each node would have to. Of one
/// that fits nowhere, what it needs `whole`.
fn lacking(
    model: &ModelProfile,
    nodes: &[NodeProfile],
    demand: &Demand,
    whole: ByteSize,
) -> (ByteSize, Option<String>) {
    // No stage takes so much, whatever is counted for its buffers.
    let most = whole.0.saturating_mul(4);
    let with = |more: u64, is_all: bool| {
        let from = if is_all { 0 } else { nodes.len().saturating_sub(1) };
        let mut raised = nodes.to_vec();
        raised[from..].iter_mut().for_each(|node| node.memory = ByteSize(node.memory.0.saturating_add(more)));
        by_memory(model, &raised, demand).is_some()
    };
    if let Some(more) = least_that(most, |more| with(more, false)) {
        return (ByteSize(more), nodes.last().map(|node| node.name.clone()));
    }
    (ByteSize(least_that(most, |more| with(more, true)).unwrap_or(whole.0)), None)
}

/// The least number up to `most` that holds, if those above one that holds do; `None` if `most` does not.
fn least_that(most: u64, holds: impl Fn(u64) -> bool) -> Option<u64> {
    let (mut failed, mut held) = (0, most);
    if !holds(most) {
        return None;
    }
    while failed + 1 < held {
        let half = held.midpoint(failed);
        if holds(half) { held = half } else { failed = half }
    }
    Some(held)
}

/// The largest count from 1 to `most` that holds, if those below one that holds do.
fn most_that(most: u32, holds: impl Fn(u32) -> bool) -> Option<u32> {
    let (mut held, mut failed) = (0, most.saturating_add(1));
    while held + 1 < failed {
        let half = held.midpoint(failed);
        if holds(half) { held = half } else { failed = half }
    }
    (held > 0).then_some(held)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::COMPUTE_FLOOR;
    use brigade_base::NodeId;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn model(n_layers: u32) -> ModelProfile {
        ModelProfile {
            layer_bytes: vec![100 * MIB; n_layers as usize],
            kv_bytes_per_token: vec![1024; n_layers as usize],
            head_bytes: 200 * MIB,
            cut_points: (1..n_layers).collect(),
            n_embd: 64,
            n_heads: 4,
            n_ff: 128,
            n_vocab: 1000,
            ..ModelProfile::default()
        }
    }

    #[test]
    fn a_model_that_must_stay_whole_is_told_to_be() {
        let whole = ModelProfile { cut_points: Vec::new(), why_whole: Some("its layers share a memory"), ..model(8) };
        let spread = Demand { spread: true, ..demand() };
        let plan = place_here(&whole, &nodes(&[4000, 4000]), &spread).unwrap();
        assert_eq!(plan.stages.len(), 1);
        assert!(plan.explanation.iter().any(|said| said.contains("since its layers share a memory")));
        let error = place_here(&whole, &nodes(&[600, 700]), &demand()).unwrap_err();
        assert!(matches!(error, PlanError::WholeDoesNotFit { .. }), "{error}");
        let said = error.to_string();
        assert!(said.contains("must stay whole on one node") && !said.contains("let another machine"), "{said}");
        // A worker's memory is of no use to it: the coordinator holds what is last, and that is all of it.
        let roomy_worker = nodes(&[4000, 700]);
        let PlanError::WholeDoesNotFit { name, missing, .. } =
            place_here(&whole, &roomy_worker, &demand()).unwrap_err()
        else {
            panic!("it fits")
        };
        assert_eq!(name, "n1");
        let fits = |more: u64| place_here(&whole, &raised(&roomy_worker, 1.., more), &demand()).is_ok();
        assert!(fits(missing.0) && !fits(missing.0 - 1), "{missing}");
        let pinned = Demand { split: Some(vec![4, 4]), ..demand() };
        let error = place_here(&whole, &nodes(&[4000, 4000]), &pinned).unwrap_err();
        assert_eq!(error, PlanError::SplitWhole { stages: 2, why: "its layers share a memory" });
    }

    fn nodes(mib: &[u64]) -> Vec<NodeProfile> {
        mib.iter()
            .enumerate()
            .map(|(i, &m)| NodeProfile {
                id: NodeId::from_bytes([i as u8; 32]),
                name: format!("n{i}"),
                memory: ByteSize::mib(m),
                speed: None,
            })
            .collect()
    }

    /// Those from a place on give so many bytes more.
    fn raised(nodes: &[NodeProfile], places: std::ops::RangeFrom<usize>, more: u64) -> Vec<NodeProfile> {
        let mut nodes = nodes.to_vec();
        nodes[places].iter_mut().for_each(|node| node.memory = ByteSize(node.memory.0 + more));
        nodes
    }

    fn demand() -> Demand {
        Demand { context: 1024, parallel: 1, max_rows: 16, ..Demand::default() }
    }

    fn place_here(model: &ModelProfile, nodes: &[NodeProfile], demand: &Demand) -> Result<Plan, PlanError> {
        place(model, nodes, &Links::default(), demand)
    }

    fn split_of(plan: &Plan) -> Vec<u32> {
        plan.stages.iter().map(|stage| stage.layers.len()).collect()
    }

    #[test]
    fn who_can_hold_the_model_alone_is_known_without_placing() {
        let demand = demand();
        let needed = stage_memory(&model(8), &demand, LayerRange::new(0, 8).unwrap(), true).total().0;
        let mut seen = [false; 2];
        for memory in (needed..needed * 9 / 8).step_by(1 << 20).map(ByteSize) {
            let node = NodeProfile { memory, ..nodes(&[1])[0].clone() };
            let placed = place_here(&model(8), std::slice::from_ref(&node), &demand).ok();
            let alone = alone_on(&model(8), &node, &Links::default(), &demand);
            assert_eq!(alone.as_ref().map(|plan| &plan.stages), placed.as_ref().map(|plan| &plan.stages));
            assert_eq!(can_hold(&model(8), &node, &demand), placed.is_some());
            seen[usize::from(placed.is_some())] = true;
        }
        assert_eq!(seen, [true; 2]);
    }

    #[test]
    fn one_node_is_enough_where_it_is() {
        let plan = place_here(&model(8), &nodes(&[4000, 4000]), &demand()).unwrap();
        assert_eq!(split_of(&plan), [8]);
        assert_eq!(plan.stages[0].name, "n1");
    }

    #[test]
    fn spread_uses_all_and_charges_the_head_to_the_coordinator() {
        let plan = place_here(&model(10), &nodes(&[4000, 4000, 4000]), &Demand { spread: true, ..demand() }).unwrap();
        assert_eq!(split_of(&plan), [4, 4, 2]);
    }

    #[test]
    fn shares_follow_memory() {
        let plan = place_here(&model(12), &nodes(&[980, 500, 600]), &demand()).unwrap();
        assert_eq!(split_of(&plan), [7, 3, 2]);
    }

    #[test]
    fn the_largest_worker_is_taken_first() {
        let plan = place_here(&model(12), &nodes(&[300, 1000, 900]), &demand()).unwrap();
        assert_eq!(plan.stages.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["n1", "n2"]);
    }

    #[test]
    fn kv_counts() {
        let lean = place_here(&model(8), &nodes(&[1200]), &demand());
        assert!(lean.is_ok());
        let error =
            place_here(&model(8), &nodes(&[1200]), &Demand { context: 65536, parallel: 4, ..demand() }).unwrap_err();
        assert!(matches!(error, PlanError::DoesNotFit { .. }), "{error}");
        assert!(error.to_string().contains("missing"), "{error}");
    }

    #[test]
    fn pinned_splits_are_checked() {
        let ask = |split: &[u32], mib: &[u64]| {
            place_here(&model(8), &nodes(mib), &Demand { split: Some(split.to_vec()), ..demand() })
        };
        assert_eq!(split_of(&ask(&[3, 4, 1], &[2000, 2000, 2000]).unwrap()), [3, 4, 1]);
        assert!(matches!(ask(&[3, 4], &[2000, 2000]), Err(PlanError::SplitSum { .. })));
        assert!(matches!(ask(&[0, 8], &[2000, 2000]), Err(PlanError::SplitEmpty { .. })));
        assert!(matches!(ask(&[4, 4], &[2000]), Err(PlanError::SplitNodes { stages: 2, nodes: 1 })));
        let Err(PlanError::SplitTooLarge { missing, .. }) = ask(&[7, 1], &[500, 2000]) else { panic!("it fits") };
        let fits = |more: u64| {
            let mut nodes = nodes(&[500, 2000]);
            nodes[0].memory.0 += more;
            place_here(&model(8), &nodes, &Demand { split: Some(vec![7, 1]), ..demand() }).is_ok()
        };
        assert!(fits(missing.0) && !fits(missing.0 - 1), "{missing}");
        let even = ModelProfile { cut_points: vec![2, 4, 6], ..model(8) };
        let odd = place_here(&even, &nodes(&[2000, 2000]), &Demand { split: Some(vec![3, 5]), ..demand() });
        assert_eq!(odd, Err(PlanError::SplitCut { at: 3, allowed: vec![2, 4, 6] }));
    }

    proptest! {
        #[test]
        fn a_plan_holds_every_layer_once_and_overfills_nobody(
            memory in prop::collection::vec(60u64..1500, 1..6), n_layers in 1u32..20, step in 1u32..4, spread: bool,
        ) {
            let cut_points = (1..n_layers).filter(|c| c % step == 0).collect();
            let model = ModelProfile { cut_points, ..model(n_layers) };
            let nodes = nodes(&memory);
            if let Ok(plan) = place_here(&model, &nodes, &Demand { spread, ..demand() }) {
                let mut next = 0;
                for stage in &plan.stages {
                    prop_assert_eq!(stage.layers.start(), next);
                    prop_assert!(next == 0 || model.cut_points.contains(&next));
                    next = stage.layers.end();
                    prop_assert!(stage.memory.total() <= usable(stage.offered));
                }
                prop_assert_eq!(next, n_layers);
                prop_assert_eq!(plan.stages.last().unwrap().node, nodes.last().unwrap().id);
            }
        }

        #[test]
        fn what_is_missing_makes_it_fit_and_no_byte_less(
            memory in prop::collection::vec(20u64..900, 1..5), n_layers in 4u32..24, step in 1u32..9, spread: bool,
        ) {
            let cut_points = (1..n_layers).filter(|c| c % step == 0).collect();
            let model = ModelProfile { cut_points, ..model(n_layers) };
            let nodes = nodes(&memory);
            let demand = Demand { spread, ..demand() };
            if let Err(error) = place_here(&model, &nodes, &demand) {
                let PlanError::DoesNotFit { missing, on, .. } = &error else { panic!("{error}") };
                let from = if on.is_some() { nodes.len() - 1 } else { 0 };
                let fits = |more: u64| place_here(&model, &raised(&nodes, from.., more), &demand).is_ok();
                prop_assert!(fits(missing.0) && !fits(missing.0 - 1), "{error}");
            }
        }

        #[test]
        fn no_split_is_emptier_at_its_fullest(
            memory in prop::collection::vec(700u64..1500, 2..4), n_layers in 3u32..7,
        ) {
            let (model, nodes) = (model(n_layers), nodes(&memory));
            let demand = Demand { spread: true, ..demand() };
            let ring: Vec<_> = nodes.iter().collect();
            let capacities: Vec<u64> = nodes.iter().map(|node| usable(node.memory).0).collect();
            let fullest = |ranges: &[LayerRange]| ranges.iter().enumerate().map(|(k, &r)| {
                stage_memory(&model, &demand, r, k + 1 == ring.len()).total().0 as f64 / usable(ring[k].memory).0 as f64
            }).fold(0.0, f64::max);
            let found = fullest(&balance(&Units::new(&model, &demand).unwrap(), &capacities).unwrap());
            let cuts: Vec<Vec<u32>> = if ring.len() == 2 {
                (1..n_layers).map(|a| vec![0, a, n_layers]).collect()
            } else {
                (1..n_layers).flat_map(|a| (a + 1..n_layers).map(move |b| vec![0, a, b, n_layers])).collect()
            };
            for cut in cuts {
                let ranges: Vec<_> = cut.windows(2).map(|w| LayerRange::new(w[0], w[1]).unwrap()).collect();
                prop_assert!(found <= fullest(&ranges) + 1e-12);
            }
        }
    }

    #[test]
    fn nothing_fits_in_less_than_a_process_needs() {
        let floor = nodes(&[COMPUTE_FLOOR / MIB]);
        assert!(matches!(place_here(&model(1), &floor, &demand()), Err(PlanError::DoesNotFit { .. })));
    }
}
