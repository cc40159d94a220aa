//! How long placing takes: `cargo run --release -p brigade-plan --example optimise`.
//!
//! Clusters are drawn from a seed. A line says how many nodes and layers there are, what is asked for, how many stages
//! were chosen, and the milliseconds of the slowest of some draws.

use std::error::Error;
use std::hint::black_box;
use std::io::Write;
use std::time::Instant;

use brigade_base::{ByteSize, NodeId};
use brigade_plan::{
    Curve, Demand, LinkProfile, Links, ModelProfile, NodeProfile, Optimize, Speed, SpeedSource, place, place_anywhere,
};

/// Random numbers from a seed (splitmix64, Steele, Lea and Flood 2014).
struct Dice(u64);

impl Dice {
    /// From 0 to before 1.
    fn share(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) as f64 / 2f64.powi(64)
    }

    /// From `low` to `high`, each factor as likely as any other.
    fn between(&mut self, low: f64, high: f64) -> f64 {
        low * (high / low).powf(self.share())
    }
}

fn model(n_layers: u32, are_alike: bool, dice: &mut Dice) -> ModelProfile {
    const MIB: u64 = 1 << 20;
    let layer_bytes: Vec<u64> =
        (0..n_layers).map(|_| if are_alike || dice.share() < 0.5 { 450 * MIB } else { 520 * MIB }).collect();
    ModelProfile {
        kv_bytes_per_token: vec![4096; n_layers as usize],
        layer_bytes,
        head_bytes: 800 * MIB,
        cut_points: (1..n_layers).collect(),
        n_embd: 8192,
        n_heads: 64,
        n_ff: 28672,
        n_vocab: 128_256,
        ..ModelProfile::default()
    }
}

/// Nodes of which each holds a share of the model between these, as fast as each other or up to 20 times faster.
fn nodes(count: usize, gib: (f64, f64), are_equal: bool, dice: &mut Dice) -> Result<Vec<NodeProfile>, Box<dyn Error>> {
    (0..count)
        .map(|i| {
            let layer_s = if are_equal { dice.between(2e-3, 2.02e-3) } else { dice.between(5e-4, 1e-2) };
            let points = [1, 2, 4, 8, 32, 128].map(|rows| (rows, layer_s * (1.0 + f64::from(rows) / 12.0)));
            let curve = Curve::new(points.to_vec())?;
            let mut id = [0; 32];
            id[..8].copy_from_slice(&(i as u64).to_le_bytes());
            Ok(NodeProfile {
                id: NodeId::from_bytes(id),
                name: format!("node-{i}"),
                memory: ByteSize::mib((dice.between(gib.0, gib.1) * 1024.0) as u64),
                speed: Some(Speed {
                    decode: curve.clone(),
                    chunk: curve,
                    head: None,
                    pass_s: dice.between(2e-5, 2e-4),
                    decode_context_s: 1e-8,
                    chunk_context_s: 1e-9,
                    load_bytes_per_s: 1e9,
                    source: SpeedSource::Device,
                }),
            })
        })
        .collect()
}

fn links(nodes: &[NodeProfile], dice: &mut Dice) -> Links {
    let mut links = Links::default();
    for node in nodes {
        let port = LinkProfile { latency_s: dice.between(5e-5, 3e-3), bytes_per_s: dice.between(5e6, 1.2e9) };
        links.set_port(node.id, port);
    }
    for (a, b) in nodes.iter().take(12).flat_map(|a| nodes.iter().take(12).map(move |b| (a, b))) {
        let link = LinkProfile { latency_s: dice.between(1e-4, 5e-3), bytes_per_s: dice.between(5e6, 1.2e9) };
        links.set(a.id, b.id, link);
    }
    links
}

#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    count: usize,
    n_layers: u32,
    gib: (f64, f64),
    are_alike: bool,
    are_equal: bool,
    anywhere: bool,
    draws: u64,
}

fn time(kind: &Kind, optimize: Optimize, parallel: u32) -> Result<(), Box<dyn Error>> {
    let (mut slowest_ms, mut stages) = (0.0f64, Vec::new());
    for seed in 0..kind.draws {
        let dice = &mut Dice(seed);
        let model = model(kind.n_layers, kind.are_alike, dice);
        let nodes = nodes(kind.count, kind.gib, kind.are_equal, dice)?;
        let links = links(&nodes, dice);
        let demand = Demand { context: 4096, parallel, max_rows: 512, optimize, ..Demand::default() };
        let start = Instant::now();
        let plan = if kind.anywhere {
            place_anywhere(&model, &nodes, &links, &demand)
        } else {
            place(&model, &nodes, &links, &demand)
        };
        slowest_ms = slowest_ms.max(start.elapsed().as_secs_f64() * 1e3);
        stages.push(black_box(plan).map_or(0, |plan| plan.stages.len()));
    }
    let Kind { name, count, n_layers, .. } = kind;
    let asked = format!("{optimize:?} {parallel}");
    writeln!(
        std::io::stdout(),
        "{name:<24} {count:>6} nodes {n_layers:>3} layers {asked:<14} {slowest_ms:8.1} ms, stages {stages:?}"
    )?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let small = Kind {
        name: "any",
        count: 12,
        n_layers: 80,
        gib: (4.0, 24.0),
        are_alike: true,
        are_equal: false,
        anywhere: false,
        draws: 8,
    };
    let large = Kind { count: 10_000, draws: 2, ..small };
    let kinds = [
        Kind { name: "equal machines", are_equal: true, ..small },
        Kind { name: "unequal layers", are_alike: false, ..small },
        Kind { name: "any coordinator", anywhere: true, ..small },
        Kind { name: "large", ..large },
        Kind { name: "large, little memory", gib: (1.5, 3.0), ..large },
        Kind { name: "large, unequal layers", are_alike: false, ..large },
        Kind { name: "large, any coordinator", anywhere: true, ..large },
        Kind { name: "a hundred", count: 100, ..small },
    ];
    for kind in [small].iter().chain(&kinds) {
        for optimize in [Optimize::Latency, Optimize::Throughput, Optimize::Balanced] {
            for parallel in [1, 8, 64, 256] {
                time(kind, optimize, parallel)?;
            }
        }
    }
    Ok(())
}
