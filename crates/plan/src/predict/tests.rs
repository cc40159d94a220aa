//! Rounds and first tokens against rings that are stepped through pass by pass.

use brigade_base::{ByteSize, NodeId};

use super::*;
use crate::{Curve, SpeedSource};

/// Stages of one layer each.
struct Ring {
    model: ModelProfile,
    nodes: Vec<NodeProfile>,
    links: Links,
    demand: Demand,
}

impl Ring {
    /// Stages that take so many milliseconds for a row and `row_share` of that for each further one, and links alike.
    fn new(layer_ms: &[f64], row_share: f64, link: LinkProfile) -> Self {
        let n = layer_ms.len();
        let model = ModelProfile {
            layer_bytes: vec![1 << 20; n],
            kv_bytes_per_token: vec![1024; n],
            cut_points: (1..n as u32).collect(),
            n_embd: 1000,
            ..ModelProfile::default()
        };
        let node = |(i, ms): (usize, &f64)| {
            let at = |rows: u32| (rows, ms * 1e-3 * (1.0 + row_share * f64::from(rows - 1)));
            let curve = Curve::new(vec![at(1), at(2), at(64)]).unwrap();
            let speed = Speed {
                decode: curve.clone(),
                chunk: curve,
                head: Some(Curve::constant(0.0)),
                pass_s: 0.0,
                decode_context_s: 0.0,
                chunk_context_s: 0.0,
                load_bytes_per_s: 1e9,
                source: SpeedSource::Layers,
            };
            let id = NodeId::from_bytes([i as u8 + 1; 32]);
            NodeProfile { id, name: format!("n{i}"), memory: ByteSize::gib(1), speed: Some(speed) }
        };
        let nodes: Vec<NodeProfile> = layer_ms.iter().enumerate().map(node).collect();
        let mut links = Links::default();
        let pairs = nodes.iter().flat_map(|a| nodes.iter().map(move |b| (a.id, b.id)));
        pairs.for_each(|(a, b)| links.set(a, b, link));
        let demand = Demand { context: 1024, parallel: 8, max_rows: 40, ..Demand::default() };
        Self { model, nodes, links, demand }
    }

    fn with<T>(&self, ask: impl FnOnce(&RingModel) -> T) -> T {
        let stage = |(i, node): (u32, _)| {
            let node: &NodeProfile = node;
            RingStage { node, speed: node.speed.as_ref().unwrap(), layers: LayerRange::new(i, i + 1).unwrap() }
        };
        let stages: Vec<RingStage> = (0..).zip(&self.nodes).map(stage).collect();
        ask(&RingModel::new(&self.model, &stages, &self.links, &self.demand))
    }
}

/// Seconds of a round: of so many passes one follows the other through the ring, the next as soon as fewer than one for
/// each stage are on their way and its own sessions have their tokens.
fn stepped_round_s(ring: &RingModel, passes: usize, rows: f64) -> f64 {
    const ROUNDS: usize = 200;
    let n = ring.stages.len();
    let (mut free, mut wire_free) = (vec![0.0f64; n], vec![0.0f64; n]);
    let mut back: Vec<f64> = Vec::new();
    for k in 0..2 * ROUNDS * passes {
        let mut at = k.checked_sub(passes.min(n)).map_or(0.0, |k| back[k]);
        for stage in 0..n {
            at = at.max(free[stage]) + ring.decode_s(stage, rows);
            free[stage] = at;
            let wire = ring.wire_s(stage, rows);
            wire_free[stage] = at.max(wire_free[stage]) + wire;
            at = wire_free[stage] + ring.hop_s(stage, rows) - wire;
        }
        back.push(at);
    }
    (back[2 * ROUNDS * passes - 1] - back[ROUNDS * passes - 1]) / ROUNDS as f64
}

const LAN: LinkProfile = LinkProfile { latency_s: 0.000_1, bytes_per_s: 1e9 };

#[test]
fn a_round_takes_what_stepping_through_it_takes() {
    let far = LinkProfile { latency_s: 0.02, bytes_per_s: 1e9 };
    let narrow = LinkProfile { latency_s: 0.001, bytes_per_s: 1e6 };
    for link in [LAN, far, narrow] {
        for layer_ms in [&[1.0][..], &[1.0, 1.0], &[2.0, 10.0, 1.0], &[1.0, 1.0, 1.0, 1.0]] {
            for (row_share, streams) in [(0.1, 8), (1.0, 8), (1.0, 5), (0.5, 3), (1.0, 1)] {
                Ring::new(layer_ms, row_share, link).with(|ring| {
                    let round = ring.round(streams);
                    assert_eq!(round.rows, streams.div_ceil(round.passes));
                    let stepped = stepped_round_s(ring, round.passes as usize, round.rows.into());
                    let off = round.seconds / stepped - 1.0;
                    assert!(off.abs() < 0.01, "{layer_ms:?}, {streams} rows of {row_share}: {round:?}, not {stepped}");
                });
            }
        }
    }
}

#[test]
fn passes_are_chosen_by_what_stages_compute_whatever_the_links() {
    // Each row costs the same, so the busy stage would compute six for five sessions in two passes.
    let passes = |link| Ring::new(&[1.0, 4.0], 1.0, link).with(|ring| ring.round(5));
    let far = passes(LinkProfile { latency_s: 0.1, bytes_per_s: 1e9 });
    assert_eq!((passes(LAN).passes, far.passes, far.rows), (5, 5, 1));
    assert!(far.seconds > 2.5 * 0.2, "5 passes go around 2 at a time: {far:?}");
}

#[test]
fn unequal_passes_keep_stages_as_busy_as_they_are() {
    // Five sessions over two passes: three rows in one of them, not two passes and a half of two.
    let mut ring = Ring::new(&[5.0, 5.0], 0.0, LinkProfile { latency_s: 0.0, bytes_per_s: 1e15 });
    ring.demand.parallel = 5;
    let prediction = ring.with(|ring| ring.predict());
    assert!(prediction.stages.iter().all(|stage| (stage.busy - 1.0).abs() < 1e-6), "{prediction:?}");
    assert!(matches!(prediction.streams_bound, Bound::Compute(_)), "{prediction:?}");
}

#[test]
fn every_chunk_crosses_the_link_into_the_first_stage() {
    // The rate of that link alone decides: all rows of the prompt go over it.
    let mut ring = Ring::new(&[0.001, 0.001], 0.0, LinkProfile { latency_s: 0.0, bytes_per_s: 1e15 });
    let narrow = LinkProfile { latency_s: 0.01, bytes_per_s: 1e6 };
    ring.links.set(ring.nodes[1].id, ring.nodes[0].id, narrow);
    let (prompt, first_token_s) = ring.with(|ring| (ring.prompt_tokens(), ring.first_token_s()));
    let bytes = f64::from(prompt) * ring.model.row_bytes();
    assert!(first_token_s >= bytes / narrow.bytes_per_s + narrow.latency_s, "{first_token_s}");
}
