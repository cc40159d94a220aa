//! What else could be done with the same machines: a plan, what it was chosen over, and advice in plain words.
//!
//! - [`study`] places the model, then asks the same [`place`] again under other conditions: each node alone, shares by
//!   memory, another objective, one node left out.
//! - [`replicas`] says what whole copies on several nodes would give; requests would be routed to them, which is for
//!   others to do.
//! - [`tensor`] says what splitting every layer would give; this version does not execute it.
//! - [`advice`] reads the numbers and says what follows.
//!
//! Every alternative is predicted by the same [`RingModel`](crate::RingModel) as the plan, so that all of them are
//! wrong in the same direction.

mod advice;
mod replicas;
mod tensor;

pub use replicas::Member;

use serde::Serialize;

use crate::place::alone_on;
use crate::{
    Demand, Links, ModelProfile, NodeProfile, Optimize, Plan, PlanError, PlannedStage, Prediction, place,
    place_anywhere,
};

/// Most nodes that are shown alone, the fastest first: more tell nobody anything.
const MAX_ALONE: usize = 8;

/// Most nodes for which the plan is made again without each that it uses, or with every objective. Placing takes up to
/// 2 s for ten thousand nodes and 0.1 s for a dozen; beyond a rack nobody asks about a single machine.
const MAX_NODES_TO_VARY: usize = 48;

/// The same for a deployment that runs, whose coordinator asks at each placement and has else to do.
const MAX_NODES_TO_VARY_LIVE: usize = 8;

/// Most nodes of a plan that are left out in turn.
const MAX_LEFT_OUT: usize = 8;

/// Most lines of advice on a plan that is carried out; the first say most.
const MAX_ADVICE_LIVE: usize = 3;

/// Who coordinates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Coordinator {
    /// The last of the nodes: it has the model, and runs already.
    #[default]
    Last,
    /// Whoever is best: the machines are not there yet.
    Anywhere,
}

/// A plan and what it was chosen over.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Study {
    /// The plan.
    pub plan: Plan,
    /// What else could be done, most like the plan first.
    pub alternatives: Vec<Alternative>,
    /// What to do, one thought per line.
    pub advice: Vec<String>,
}

/// Something else that could be done with the same machines.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Alternative {
    /// What it is.
    pub kind: AlternativeKind,
    /// The same for people, for example "gpu-box alone".
    pub name: String,
    /// The stages in ring order, the coordinator's last; none for replicas and tensor groups.
    pub stages: Vec<PlannedStage>,
    /// The nodes that hold the whole model each; only of replicas.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<Member>,
    /// How fast it would be, where that is known.
    pub forecast: Option<Forecast>,
    /// Whether this version can do it.
    pub is_possible: bool,
    /// Why it is not the plan.
    pub why_not: String,
}

/// What an alternative is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AlternativeKind {
    /// One node holds the whole model.
    Alone,
    /// Several nodes hold the whole model each, and requests are routed to them.
    Replicas,
    /// All nodes hold layers in proportion to their memory.
    ByMemory,
    /// The best plan for another objective.
    Objective,
    /// The best plan without one node that the plan uses.
    Without,
    /// Every layer is split over several nodes.
    TensorGroup,
}

/// How fast something is expected to be; what all alternatives have in common.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Forecast {
    /// Tokens in a second of a lone stream.
    pub tokens_per_s: f64,
    /// Sessions at once that `streams_tokens_per_s` is about.
    pub streams: u32,
    /// Tokens in a second of all of them together.
    pub streams_tokens_per_s: f64,
    /// Seconds until the first token.
    pub first_token_s: f64,
}

impl From<&Prediction> for Forecast {
    fn from(prediction: &Prediction) -> Self {
        Self {
            tokens_per_s: prediction.tokens_per_s,
            streams: prediction.streams,
            streams_tokens_per_s: prediction.streams_tokens_per_s,
            first_token_s: prediction.first_token_s,
        }
    }
}

/// All that an alternative is made from.
#[derive(Clone, Copy)]
struct Question<'a> {
    model: &'a ModelProfile,
    nodes: &'a [NodeProfile],
    links: &'a Links,
    demand: &'a Demand,
    coordinator: Coordinator,
    /// Most nodes for which the plan is made again under other conditions.
    most_to_vary: usize,
}

/// Places a model, and says what else could be done.
///
/// With [`Coordinator::Last`] the last of `nodes` coordinates, as in [`place`]; else any may.
///
/// # Errors
/// As [`place`].
pub fn study(
    model: &ModelProfile,
    nodes: &[NodeProfile],
    links: &Links,
    demand: &Demand,
    coordinator: Coordinator,
) -> Result<Study, PlanError> {
    let question = Question { model, nodes, links, demand, coordinator, most_to_vary: MAX_NODES_TO_VARY };
    let plan = question.place(nodes, demand)?;
    let mut alternatives = alone(&question);
    alternatives.extend(replicas::alternative(&question));
    alternatives.extend(by_memory(&question, &plan));
    alternatives.extend(objectives(&question, &plan));
    alternatives.extend(without_each(&question, &plan));
    alternatives.extend(tensor::alternative(&question));
    // What the plan itself is, is no alternative to it; and what two ways lead to is said once.
    let mut seen: Vec<Vec<PlannedStage>> = vec![plan.stages.clone()];
    alternatives.retain(|other| {
        let is_new = !seen.iter().any(|stages| is_same(stages, &other.stages));
        seen.push(other.stages.clone());
        is_new
    });
    for other in &mut alternatives {
        other.why_not = advice::why_not(&question, &plan, other);
    }
    let advice = advice::advice(&question, &plan, &alternatives);
    Ok(Study { plan, alternatives, advice })
}

/// What to do about a plan that is carried out, the last of `nodes` being its coordinator: nothing where a speed is not
/// known or nothing is to be gained.
pub fn advice(model: &ModelProfile, nodes: &[NodeProfile], links: &Links, demand: &Demand, plan: &Plan) -> Vec<String> {
    if plan.prediction.is_none() || nodes.iter().any(|node| node.speed.is_none()) {
        return Vec::new();
    }
    let coordinator = Coordinator::Last;
    let question = Question { model, nodes, links, demand, coordinator, most_to_vary: MAX_NODES_TO_VARY_LIVE };
    let mut others = alone(&question);
    others.extend(replicas::alternative(&question));
    others.extend(without_each(&question, plan));
    others.retain(|other| !is_same(&other.stages, &plan.stages));
    let mut lines = advice::advice(&question, plan, &others);
    lines.truncate(MAX_ADVICE_LIVE);
    lines
}

impl Question<'_> {
    fn place(&self, nodes: &[NodeProfile], demand: &Demand) -> Result<Plan, PlanError> {
        // A pinned split names its stages in the order of the nodes.
        match self.coordinator {
            Coordinator::Anywhere if demand.split.is_none() => place_anywhere(self.model, nodes, self.links, demand),
            _ => place(self.model, nodes, self.links, demand),
        }
    }

    /// The demand without what was asked about the split itself.
    fn free_demand(&self) -> Demand {
        Demand { split: None, spread: false, ..self.demand.clone() }
    }

    /// The plan for one node alone, if it can hold the model.
    fn alone(&self, node: &NodeProfile) -> Option<Plan> {
        alone_on(self.model, node, self.links, self.demand)
    }

    /// Whether this node may coordinate.
    fn may_coordinate(&self, node: &NodeProfile) -> bool {
        self.coordinator == Coordinator::Anywhere || self.nodes.last().is_some_and(|last| last.id == node.id)
    }

    fn can_vary(&self) -> bool {
        self.nodes.len() > 1 && self.nodes.len() <= self.most_to_vary
    }
}

/// Whether these stages are on the same nodes with the same layers.
fn is_same(some: &[PlannedStage], others: &[PlannedStage]) -> bool {
    let key = |stage: &PlannedStage| (stage.node, stage.layers);
    !some.is_empty() && some.iter().map(key).eq(others.iter().map(key))
}

fn of_plan(kind: AlternativeKind, name: String, plan: Plan) -> Alternative {
    let forecast = plan.prediction.as_ref().map(Forecast::from);
    Alternative {
        kind,
        name,
        stages: plan.stages,
        members: Vec::new(),
        forecast,
        is_possible: true,
        why_not: String::new(),
    }
}

/// Each node that can hold the model alone, the fastest first.
fn alone(question: &Question<'_>) -> Vec<Alternative> {
    let plans = question.nodes.iter().filter_map(|node| Some((node, question.alone(node)?)));
    let mut found: Vec<Alternative> =
        plans.map(|(node, plan)| of_plan(AlternativeKind::Alone, format!("{} alone", node.name), plan)).collect();
    found.sort_by(|a, b| rate(b).total_cmp(&rate(a)));
    found.truncate(MAX_ALONE);
    found
}

fn rate(alternative: &Alternative) -> f64 {
    alternative.forecast.map_or(0.0, |forecast| forecast.tokens_per_s)
}

/// The whole cluster with shares by memory: what is done where nothing is measured.
fn by_memory(question: &Question<'_>, plan: &Plan) -> Option<Alternative> {
    if question.nodes.len() < 2 {
        return None;
    }
    let demand = Demand { optimize: Optimize::Memory, spread: true, ..question.free_demand() };
    // The same node coordinates, so that only the shares differ.
    let tail = plan.stages.last()?.node;
    let (tail, mut nodes): (Vec<_>, Vec<_>) = question.nodes.iter().cloned().partition(|node| node.id == tail);
    nodes.extend(tail);
    let plan = place(question.model, &nodes, question.links, &demand).ok()?;
    Some(of_plan(AlternativeKind::ByMemory, "all nodes, layers in proportion to memory".to_owned(), plan))
}

/// The best plan for each other objective, where it is another plan.
fn objectives(question: &Question<'_>, plan: &Plan) -> Vec<Alternative> {
    if !question.can_vary() || plan.prediction.is_none() {
        return Vec::new();
    }
    let others = [Optimize::Latency, Optimize::Throughput, Optimize::Balanced];
    let others = others.into_iter().filter(|other| *other != question.demand.optimize);
    let mut found: Vec<Alternative> = Vec::new();
    for optimize in others {
        let demand = Demand { optimize, ..question.demand.clone() };
        let Ok(other) = question.place(question.nodes, &demand) else { continue };
        if !found.iter().any(|known| is_same(&known.stages, &other.stages)) {
            found.push(of_plan(AlternativeKind::Objective, format!("best for {}", objective(optimize)), other));
        }
    }
    found
}

/// What an objective is called on the command line.
pub(crate) fn objective(optimize: Optimize) -> &'static str {
    match optimize {
        Optimize::Latency => "latency",
        Optimize::Throughput => "throughput",
        Optimize::Balanced => "balanced",
        Optimize::Memory => "memory",
    }
}

/// The best plan without each node that the plan uses; the coordinator only where another can take its place.
fn without_each(question: &Question<'_>, plan: &Plan) -> Vec<Alternative> {
    if !question.can_vary() || plan.stages.len() < 2 || question.demand.split.is_some() {
        return Vec::new();
    }
    let used = plan.stages.iter().filter_map(|stage| question.nodes.iter().find(|node| node.id == stage.node));
    let may_leave =
        |node: &&NodeProfile| question.coordinator == Coordinator::Anywhere || !question.may_coordinate(node);
    let plans = used.filter(may_leave).take(MAX_LEFT_OUT).filter_map(|left| {
        let rest: Vec<NodeProfile> = question.nodes.iter().filter(|node| node.id != left.id).cloned().collect();
        let plan = question.place(&rest, question.demand).ok()?;
        Some(of_plan(AlternativeKind::Without, format!("without {}", left.name), plan))
    });
    plans.collect()
}

#[cfg(test)]
mod tests;
