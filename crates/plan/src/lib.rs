//! Places a model's layers on nodes, and explains the choice.
//!
//! Flow: profiles of the model, the nodes and the links go in, a [`Plan`] with a [`Prediction`] or a reason why there
//! is none comes out. Nothing is measured, read or timed here; what a profile says is taken as true.

pub mod catalogue;
mod memory;
mod optimise;
mod place;
mod predict;
mod profile;
mod standby;
mod study;
mod units;
mod words;

pub use memory::{COMPUTE_FLOOR, HEADROOM_DIVISOR, Rehearsed, RehearsedRun, StageMemory, stage_memory};
pub use place::{check_split, place, place_anywhere, predict};
pub use predict::{ANSWER_TOKENS, Bound, PROMPT_TOKENS, Prediction, RingModel, RingStage, Round, StagePrediction};
pub use profile::{
    Curve, CurveError, Demand, LinkProfile, Links, MAX_BYTES_PER_S, MAX_CONTEXT_S, MAX_POINTS, MAX_SECONDS,
    ModelProfile, NodeProfile, Optimize, Speed, SpeedSource,
};
pub use standby::{MAX_STAGES_OF_WORKER, Standby, Uncovered, Worker, explain_standbys, stand_in, standbys};
pub use study::{Alternative, AlternativeKind, Coordinator, Forecast, Member, Study, advice, study};
pub use words::{figure, listed, seconds};

use std::fmt;

use brigade_base::{ByteSize, LayerRange, NodeId};
use serde::Serialize;

use self::words::at_least;

/// Where each layer goes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The stages in ring order; the last one is the coordinator's.
    pub stages: Vec<PlannedStage>,
    /// How fast it will be, where the speed of all its nodes is known.
    pub prediction: Option<Prediction>,
    /// Why this plan, one thought per line.
    pub explanation: Vec<String>,
}

/// One stage of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedStage {
    /// The node that holds it.
    pub node: NodeId,
    /// Name of that node.
    pub name: String,
    /// Its layers.
    pub layers: LayerRange,
    /// What it costs there.
    pub memory: StageMemory,
    /// What the node gives, headroom included.
    pub offered: ByteSize,
}

/// Why a model cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The nodes together, or the largest of them, hold too little.
    #[error(
        "{}{}",
        does_not_fit(*.needed, *.offered, &lack(*.missing, .on.as_deref(), *.n_nodes), *.n_nodes),
        would_fit(*.fits_context, *.fits_parallel)
    )]
    DoesNotFit {
        /// Bytes that the model needs on these nodes, with KV cache and working memory.
        needed: ByteSize,
        /// Bytes that the nodes can use, headroom taken off.
        offered: ByteSize,
        /// Bytes of further memory that would make it fit, headroom included.
        missing: ByteSize,
        /// The node that they would have to be on; `None` for so much on each.
        on: Option<String>,
        /// How many nodes are there.
        n_nodes: usize,
        /// The longest context with which it would fit, the sessions being as many as asked for; `None` if it does not
        /// fit with any.
        fits_context: Option<u32>,
        /// The most sessions with which it would fit, the context being as long as asked for.
        fits_parallel: Option<u32>,
    },
    /// The coordinator does not hold a model that cannot be cut.
    #[error(
        "this model must stay whole on one node, since {why}. It needs {needed} there, and {name}, which coordinates, \
         can use {offered}: {} are missing, headroom included. Have it give more (--memory of `serve`), or lower \
         --context or --parallel{}",
        at_least(*.missing),
        would_fit(*.fits_context, *.fits_parallel)
    )]
    WholeDoesNotFit {
        /// Why it cannot be cut.
        why: &'static str,
        /// The coordinator.
        name: String,
        /// Bytes that it needs.
        needed: ByteSize,
        /// Bytes that the coordinator can use, headroom taken off.
        offered: ByteSize,
        /// Bytes that it would have to offer beyond what it does, headroom included.
        missing: ByteSize,
        /// As in [`PlanError::DoesNotFit`].
        fits_context: Option<u32>,
        /// As in [`PlanError::DoesNotFit`].
        fits_parallel: Option<u32>,
    },
    /// The pinned split cuts a model that cannot be cut.
    #[error(
        "--layers asks for {stages} stages, but this model must stay whole on one node, since {why}; leave --layers out"
    )]
    SplitWhole {
        /// Stages asked for.
        stages: usize,
        /// Why it cannot be cut.
        why: &'static str,
    },
    /// The pinned split does not add up.
    #[error("--layers {split:?} has {} layers, but the model has {n_layers}", .split.iter().map(|&n| u64::from(n)).sum::<u64>())]
    SplitSum {
        /// What was asked for.
        split: Vec<u32>,
        /// Layers of the model.
        n_layers: u32,
    },
    /// The pinned split names a stage without layers.
    #[error("--layers {split:?} has a stage without layers; every stage needs at least one")]
    SplitEmpty {
        /// What was asked for.
        split: Vec<u32>,
    },
    /// The pinned split cuts where the model cannot be cut.
    #[error("--layers cuts before layer {at}, but this model can be cut only before {}", list(.allowed))]
    SplitCut {
        /// The cut.
        at: u32,
        /// Where it may be cut.
        allowed: Vec<u32>,
    },
    /// The pinned split has more stages than there are nodes.
    #[error("--layers names {stages} stages, but {nodes} nodes are here; {} more must join", .stages - .nodes)]
    SplitNodes {
        /// Stages asked for.
        stages: usize,
        /// Nodes present.
        nodes: usize,
    },
    /// A pinned stage is larger than its node.
    #[error("{layers} layers need {needed} on {name}, which can use {usable}: {} are missing, headroom included", at_least(*.missing))]
    SplitTooLarge {
        /// The node.
        name: String,
        /// Layers of the stage.
        layers: u32,
        /// What they need.
        needed: ByteSize,
        /// What the node can use.
        usable: ByteSize,
        /// What it would have to offer beyond what it does, headroom included.
        missing: ByteSize,
    },
}

fn lack(missing: ByteSize, on: Option<&str>, n_nodes: usize) -> String {
    let place = match on {
        _ if n_nodes < 2 => String::new(),
        Some(name) => format!(" on {name}"),
        None => " on each".to_owned(),
    };
    format!("{} are missing{place}, headroom included", at_least(missing))
}

fn does_not_fit(needed: ByteSize, offered: ByteSize, lack: &str, n_nodes: usize) -> String {
    // With keys and values, which not every model keeps.
    let (who, buffers) = match n_nodes {
        1 => ("this node".to_owned(), "its buffers"),
        n => (format!("the {n} nodes here"), "the buffers of each node"),
    };
    let needs = format!("the model needs {needed} with {buffers}, and {who} can use {offered}");
    // Cuts are between layers, and not everywhere.
    let why = if offered >= needed { ", but there is no cut with which it fits" } else { "" };
    format!(
        "{needs}{why}: {lack}. Give more memory (--memory of `serve` and `join`), let another machine join, or lower \
         --context or --parallel"
    )
}

fn would_fit(context: Option<u32>, parallel: Option<u32>) -> String {
    match (context, parallel) {
        (Some(context), Some(parallel)) => {
            format!(". It would fit with --context {context}, or with --parallel {parallel}")
        }
        (Some(context), None) => format!(". It would fit with --context {context}"),
        (None, Some(parallel)) => format!(". It would fit with --parallel {parallel}"),
        (None, None) => String::new(),
    }
}

fn list(cuts: &[u32]) -> String {
    if cuts.is_empty() {
        return "nothing (it must stay whole)".to_owned();
    }
    cuts.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<20} {:>9} {:>12} {:>12} {:>12} {:>12}", "node", "layers", "weights", "KV cache", "work", "of")?;
        for stage in &self.stages {
            let memory = &stage.memory;
            writeln!(
                f,
                "{:<20} {:>9} {:>12} {:>12} {:>12} {:>12}",
                stage.name,
                stage.layers.to_string(),
                memory.weights,
                memory.kv,
                ByteSize(memory.fixed()),
                stage.offered
            )?;
        }
        self.explanation.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}
