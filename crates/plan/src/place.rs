//! The choice itself: which nodes, and where to cut.

use brigade_base::{ByteSize, LayerRange};

use crate::memory::{stage_memory, usable};
use crate::predict::{Prediction, RingModel, RingStage};
use crate::{Demand, Links, ModelProfile, NodeProfile, Plan, PlanError, PlannedStage};

/// Places a model on nodes, in ring order with the coordinator last.
///
/// The fewest nodes that hold the model are used (all of them with [`Demand::spread`]): each further one adds a hop to
/// every token. Among those, the cuts minimise the fullest node's use of its memory, which is what a split in
/// proportion to memory does where layers can be divided freely; an exact dynamic programme over the legal cuts,
/// O(nodes · cuts²).
///
/// # Errors
/// If the model does not fit, or a pinned split is not possible.
///
/// # Panics
/// Never for a profile whose lists are as long as they say.
pub fn place(model: &ModelProfile, nodes: &[NodeProfile], links: &Links, demand: &Demand) -> Result<Plan, PlanError> {
    let mut plan = choose(model, nodes, demand)?;
    plan.prediction = predict(model, nodes, links, demand, &plan.stages);
    Ok(plan)
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

fn choose(model: &ModelProfile, nodes: &[NodeProfile], demand: &Demand) -> Result<Plan, PlanError> {
    if let Some(split) = &demand.split {
        return pinned(model, nodes, demand, split);
    }
    let Some((coordinator, workers)) = nodes.split_last() else {
        return Err(does_not_fit(model, nodes, demand));
    };
    // The largest workers first, so that the fewest are needed; those chosen stay in the order in which they came.
    let mut by_memory: Vec<usize> = (0..workers.len()).collect();
    by_memory.sort_by_key(|&i| std::cmp::Reverse(workers[i].memory));
    let most = workers.len().min(model.cut_points.len());
    let fewest = if demand.spread { most } else { 0 };
    for count in fewest..=most {
        let mut chosen = by_memory[..count].to_vec();
        chosen.sort_unstable();
        let ring: Vec<&NodeProfile> = chosen.iter().map(|&i| &workers[i]).chain([coordinator]).collect();
        if let Some(ranges) = balance(model, &ring, demand) {
            return Ok(explain(model, nodes, &ring, &ranges, demand));
        }
    }
    Err(does_not_fit(model, nodes, demand))
}

/// Cost of a way to fill the first nodes: the fullest node's share, then evenness.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
struct Fill {
    fullest: f64,
    squares: f64,
}

/// The cuts for exactly these nodes that leave the fullest one emptiest, or `None` if they cannot hold the model.
fn balance(model: &ModelProfile, ring: &[&NodeProfile], demand: &Demand) -> Option<Vec<LayerRange>> {
    let mut bounds = vec![0];
    bounds.extend(&model.cut_points);
    bounds.push(model.n_layers());
    // best[c] is the best way for the nodes so far to hold everything before bound c, and the bound where the last
    // of them begins.
    let mut best: Vec<Vec<Option<(Fill, usize)>>> = Vec::with_capacity(ring.len());
    for (k, node) in ring.iter().enumerate() {
        let capacity = usable(node.memory).0;
        let is_tail = k + 1 == ring.len();
        let mut row = vec![None; bounds.len()];
        for end in 1..bounds.len() {
            for start in 0..end {
                let before = match k {
                    0 if start == 0 => Some(Fill { fullest: 0.0, squares: 0.0 }),
                    0 => None,
                    _ => best[k - 1][start].map(|(fill, _)| fill),
                };
                let (Some(before), Ok(layers)) = (before, LayerRange::new(bounds[start], bounds[end])) else {
                    continue;
                };
                let needed = stage_memory(model, demand, layers, is_tail).total().0;
                if needed > capacity {
                    continue;
                }
                let share = needed as f64 / capacity as f64;
                let fill = Fill { fullest: before.fullest.max(share), squares: before.squares + share * share };
                if row[end].is_none_or(|(other, _)| fill < other) {
                    row[end] = Some((fill, start));
                }
            }
        }
        best.push(row);
    }
    let mut end = bounds.len() - 1;
    let mut ranges = Vec::with_capacity(ring.len());
    for row in best.iter().rev() {
        let (_, start) = row[end]?;
        ranges.push(LayerRange::new(bounds[start], bounds[end]).ok()?);
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
    let mut at = 0;
    for count in &split[..split.len() - 1] {
        at += count;
        if !model.cut_points.contains(&at) {
            return Err(PlanError::SplitCut { at, allowed: model.cut_points.clone() });
        }
    }
    Ok(())
}

fn pinned(model: &ModelProfile, nodes: &[NodeProfile], demand: &Demand, split: &[u32]) -> Result<Plan, PlanError> {
    check_split(model, split)?;
    let (Some((coordinator, workers)), true) = (nodes.split_last(), split.len() <= nodes.len()) else {
        return Err(PlanError::SplitNodes { stages: split.len(), nodes: nodes.len() });
    };
    let ring: Vec<&NodeProfile> = workers[..split.len() - 1].iter().chain([coordinator]).collect();
    let mut ranges = Vec::new();
    let mut start = 0;
    for (k, (&count, node)) in split.iter().zip(&ring).enumerate() {
        let layers =
            LayerRange::new(start, start + count).map_err(|_| PlanError::SplitEmpty { split: split.to_vec() })?;
        let needed = stage_memory(model, demand, layers, k + 1 == ring.len()).total();
        let usable = usable(node.memory);
        if needed > usable {
            return Err(PlanError::SplitTooLarge { name: node.name.clone(), layers: count, needed, usable });
        }
        ranges.push(layers);
        start += count;
    }
    let mut plan = explain(model, nodes, &ring, &ranges, demand);
    plan.explanation = vec!["The split was pinned with --layers.".to_owned()];
    Ok(plan)
}

fn explain(
    model: &ModelProfile,
    nodes: &[NodeProfile],
    ring: &[&NodeProfile],
    ranges: &[LayerRange],
    demand: &Demand,
) -> Plan {
    let stages: Vec<PlannedStage> = ring
        .iter()
        .zip(ranges)
        .enumerate()
        .map(|(k, (node, &layers))| PlannedStage {
            node: node.id,
            name: node.name.clone(),
            layers,
            memory: stage_memory(model, demand, layers, k + 1 == ring.len()),
            offered: node.memory,
        })
        .collect();
    let mut explanation = Vec::new();
    let idle = nodes.len() - ring.len();
    explanation.push(match (ring.len(), idle) {
        (1, 0) => "The coordinator holds the whole model.".to_owned(),
        (1, _) => "The coordinator alone holds the model, which is faster than any split: no token waits for a link. \
                   --spread uses the other nodes all the same."
            .to_owned(),
        (n, 0) => format!("The model is split over all {n} nodes, in proportion to what each can use."),
        (n, idle) => {
            format!("The model needs {n} of {} nodes; {idle} stay idle, since each hop costs time.", nodes.len())
        }
    });
    if demand.spread && idle > 0 {
        explanation.push(format!(
            "The model has only {} places to cut, so not every node gets a stage.",
            model.cut_points.len()
        ));
    }
    Plan { stages, prediction: None, explanation }
}

fn does_not_fit(model: &ModelProfile, nodes: &[NodeProfile], demand: &Demand) -> PlanError {
    let Ok(all) = LayerRange::new(0, model.n_layers()) else {
        return PlanError::SplitEmpty { split: Vec::new() };
    };
    let whole = stage_memory(model, demand, all, true);
    let extra = whole.compute.0.saturating_mul(nodes.len().saturating_sub(1) as u64);
    let needed = ByteSize(whole.total().0.saturating_add(extra));
    let offered = ByteSize(nodes.iter().map(|node| usable(node.memory).0).fold(0, u64::saturating_add));
    // Where the sum would do, it is the grain that does not: at least the smallest piece must fit somewhere more.
    let piece = model.layer_bytes.iter().copied().max().unwrap_or(0);
    let missing = ByteSize(needed.0.saturating_sub(offered.0).max(piece));
    PlanError::DoesNotFit { needed, offered, missing, n_nodes: nodes.len() }
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
        let plan = place_here(&model(12), &nodes(&[1000, 500, 600]), &demand()).unwrap();
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
        assert!(matches!(ask(&[7, 1], &[500, 2000]), Err(PlanError::SplitTooLarge { .. })));
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
        fn no_split_is_emptier_at_its_fullest(
            memory in prop::collection::vec(700u64..1500, 2..4), n_layers in 3u32..7,
        ) {
            let (model, nodes) = (model(n_layers), nodes(&memory));
            let demand = Demand { spread: true, ..demand() };
            let ring: Vec<_> = nodes.iter().collect();
            let fullest = |ranges: &[LayerRange]| ranges.iter().enumerate().map(|(k, &r)| {
                stage_memory(&model, &demand, r, k + 1 == ring.len()).total().0 as f64 / usable(ring[k].memory).0 as f64
            }).fold(0.0, f64::max);
            let found = fullest(&balance(&model, &ring, &demand).unwrap());
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
