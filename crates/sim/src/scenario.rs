//! What follows from a seed before anything happens: machines, model, settings, callers.

use brigade_base::{ByteSize, NodeId, TenantId, Token};
use brigade_plan::{Curve, Demand, ModelProfile, NodeProfile, Speed, SpeedSource};
use brigade_protocol::schedule::{Limits, PrefixCache, Task};

use crate::model::{MAX_LAYERS, Model, N_EMBD};
use crate::network::{Distance, MS, Nanos, NodeIdx, SECOND};
use crate::random::Random;
use crate::truth::Caller;

/// Until then things go wrong.
pub const TROUBLE: Nanos = 40 * SECOND;

/// Most tokens of a prompt.
const MAX_PROMPT: u64 = 120;

/// Most tokens of an answer.
const MAX_ANSWER: u64 = 150;

/// What may go wrong, each so often of a hundred faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Faults {
    /// Mean time between two.
    pub pause: Nanos,
    /// Processes are killed.
    pub kill: u64,
    /// Machines vanish.
    pub vanish: u64,
    /// Processes freeze.
    pub freeze: u64,
    /// Nodes cannot reach each other.
    pub partition: u64,
    /// Links break.
    pub link: u64,
    /// Machines slow down.
    pub slow: u64,
    /// Disks fill up.
    pub disk: u64,
    /// Workers leave.
    pub leave: u64,
    /// The coordinator too may be killed.
    pub coordinator: bool,
    /// Loading fails so often of a hundred times.
    pub load_failures: u64,
}

impl Faults {
    fn of(random: &mut Random) -> Self {
        let calm = Self {
            pause: [SECOND, 3 * SECOND, 8 * SECOND][random.below(3) as usize],
            kill: 0,
            vanish: 0,
            freeze: 0,
            partition: 0,
            link: 0,
            slow: 0,
            disk: 0,
            leave: 0,
            coordinator: random.percent(40),
            load_failures: random.pick(&[0, 0, 3]),
        };
        match random.below(9) {
            0 => Self { pause: 1000 * SECOND, ..calm },
            1 => Self { kill: 100, ..calm },
            2 => Self { freeze: 60, slow: 40, ..calm },
            3 => Self { partition: 60, link: 40, ..calm },
            4 => Self { leave: 80, kill: 20, ..calm },
            5 => Self { vanish: 50, link: 50, ..calm },
            6 => Self { link: 100, ..calm },
            _ => Self {
                kill: 20,
                vanish: 10,
                freeze: 10,
                partition: 15,
                link: 15,
                slow: 10,
                disk: 10,
                leave: 10,
                ..calm
            },
        }
    }
}

/// Everything that a seed decides beforehand.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Nodes; the first one coordinates at the beginning.
    pub nodes: Vec<NodeProfile>,
    /// Who has the whole model, and can take over as coordinator. The first node has.
    pub may_lead: Vec<bool>,
    /// Thousandths of a second that each node's clock goes on in a second.
    pub clock_rates: Vec<u64>,
    /// The model's costs.
    pub profile: ModelProfile,
    /// The model.
    pub model: Model,
    /// Slots, context, passes.
    pub limits: Limits,
    /// What is asked of placements.
    pub demand: Demand,
    /// Nodes that must be here at first.
    pub nodes_wanted: usize,
    /// Holders of each stage.
    pub redundancy: u32,
    /// Those that stand by get frames.
    pub shadow: bool,
    /// How far nodes are from each other.
    pub distance: Distance,
    /// How long sessions wait for a placement.
    pub patience: Nanos,
    /// What goes wrong.
    pub faults: Faults,
    /// Who asks.
    pub callers: Vec<Caller>,
    /// Who hangs up when.
    pub hang_ups: Vec<(Nanos, usize)>,
}

impl Scenario {
    /// What `seed` decides.
    pub fn of(seed: u64) -> Self {
        let random = &mut Random::new(seed, 1);
        let n_layers = random.between(3, MAX_LAYERS as u64 + 1) as u32;
        let n_nodes = random.between(2, 7) as usize;
        let profile = profile(n_layers);
        let limits = Limits {
            n_slots: random.between(1, 5) as u32,
            context: (MAX_PROMPT + MAX_ANSWER + 1) as u32,
            chunk: random.between(2, 40) as u32,
            n_stages: 1,
            cache: random.pick(&[PrefixCache::Off, PrefixCache::Exact, PrefixCache::Full]),
            image_tokens: random.pick(&[0, 300, 2000]),
            task: Task::Generate,
            // Drawn from numbers of its own, as below.
            can_rewind: !Random::new(seed, 3).percent(25),
        };
        let minds_way = limits.cache != PrefixCache::Full;
        let model = Model { n_layers, minds_way, can_rewind: limits.can_rewind };
        let share = random.pick(&[0, 0, 60, 100]);
        let may_lead: Vec<bool> = (0..n_nodes).map(|node| node == 0 || random.percent(share)).collect();
        let has_gateways = random.percent(60);
        let (callers, hang_ups) = callers(random, &model, limits.n_slots, if has_gateways { n_nodes } else { 1 });
        let redundancy = random.pick(&[1, 2, 2]);
        let mut nodes = nodes(random, n_nodes, u64::from(n_layers));
        // Drawn from numbers of their own, so that all else stays as it is without them.
        let paces = &mut Random::new(seed, 2);
        if paces.percent(60) {
            nodes.iter_mut().for_each(|node| node.speed = Some(speed(paces.between(1, 10))));
        }
        Self {
            nodes,
            may_lead,
            clock_rates: (0..n_nodes).map(|_| random.between(970, 1031)).collect(),
            profile,
            model,
            demand: Demand {
                context: limits.context,
                parallel: limits.n_slots,
                max_rows: limits.chunk + limits.n_slots,
                spread: random.percent(50),
                ..Demand::default()
            },
            limits,
            nodes_wanted: random.between(1, n_nodes as u64 + 1) as usize,
            redundancy,
            shadow: redundancy == 2 && random.percent(75),
            distance: Distance { least: random.pick(&[MS / 10, MS, 5 * MS]), jitter: random.between(1, 5 * MS) },
            patience: random.pick(&[3 * SECOND, 30 * SECOND]),
            faults: Faults::of(random),
            callers,
            hang_ups,
        }
    }
}

/// Bytes of a layer.
pub const LAYER_BYTES: u64 = 100 << 20;

fn profile(n_layers: u32) -> ModelProfile {
    ModelProfile {
        layer_bytes: vec![LAYER_BYTES; n_layers as usize],
        kv_bytes_per_token: vec![100; n_layers as usize],
        head_bytes: LAYER_BYTES / 2,
        cut_points: (1..n_layers).collect(),
        n_embd: N_EMBD,
        n_heads: 1,
        n_ff: 16,
        n_vocab: 500,
        ..ModelProfile::default()
    }
}

/// A node that computes a layer in so many milliseconds.
pub fn speed(layer_ms: u64) -> Speed {
    let layer_s = layer_ms as f64 / 1000.0;
    let curve = |points: &[(u32, f64)]| Curve::new(points.to_vec()).unwrap_or_else(|error| panic!("{error}"));
    Speed {
        decode: curve(&[(1, layer_s), (4, 2.0 * layer_s)]),
        chunk: curve(&[(1, layer_s), (32, 4.0 * layer_s)]),
        head: None,
        pass_s: 0.0,
        decode_context_s: 0.0,
        chunk_context_s: 0.0,
        load_bytes_per_s: 1e9,
        source: SpeedSource::Layers,
    }
}

/// Machines that together hold the model, mostly with room to spare.
fn nodes(random: &mut Random, n: usize, n_layers: u64) -> Vec<NodeProfile> {
    let mut fits: Vec<u64> = (0..n).map(|_| random.between(1, n_layers + 1)).collect();
    if random.percent(80) {
        // With one stage at least on a worker.
        fits[0] = fits[0].min(n_layers - 1).max(1);
    }
    while fits.iter().sum::<u64>() < n_layers + 1 {
        let at = random.below(n as u64) as usize;
        fits[at] += 1;
    }
    let node = |(at, n_layers): (usize, &u64)| NodeProfile {
        id: NodeId::from_bytes([at as u8 + 1; 32]),
        name: format!("node {at}"),
        memory: ByteSize((n_layers * LAYER_BYTES + LAYER_BYTES / 2 + (60 << 20)) / 15 * 16),
        speed: None,
    };
    fits.iter().enumerate().map(node).collect()
}

fn callers(random: &mut Random, model: &Model, n_slots: u32, n_entries: usize) -> (Vec<Caller>, Vec<(Nanos, usize)>) {
    let n_callers = random.between(8, 8 + 10 * u64::from(n_slots));
    let (mut callers, mut hang_ups) = (Vec::<Caller>::new(), Vec::new());
    for idx in 0..n_callers as usize {
        let at = random.below(TROUBLE);
        let mut prompt: Vec<Token> = match random.below(4) {
            // A conversation that goes on.
            0 if idx > 0 => callers[idx - 1 - random.below(idx.min(5) as u64) as usize].expected.clone(),
            // A beginning that many use.
            1 => (0..random.below(MAX_PROMPT)).map(|at| (at % 7) as Token).collect(),
            _ => Vec::new(),
        };
        let n_new = if random.percent(20) { random.below(3) } else { random.below(MAX_PROMPT / 2) };
        prompt.extend((0..n_new).map(|_| random.below(500) as Token));
        prompt.truncate(MAX_PROMPT as usize);
        if prompt.is_empty() {
            prompt.push(7);
        }
        let sampling = if random.percent(50) { 0 } else { random.between(1, 1000) };
        let n_answer = 1 + random.below(MAX_ANSWER - 1) as usize;
        if random.percent(10) {
            hang_ups.push((at + random.below(5 * SECOND), idx));
        }
        callers.push(Caller {
            entry: random.below(n_entries as u64) as NodeIdx,
            at,
            n_prompt: prompt.len(),
            expected: model.answer(&prompt, n_answer, sampling),
            sampling,
            tenant: TenantId(random.below(2)),
            priority: random.pick(&[0, 0, 0, 1]),
            is_open: false,
            n_told: 0,
            told_at: 0,
            outcome: None,
        });
    }
    (callers, hang_ups)
}
