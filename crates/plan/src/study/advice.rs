//! What numbers mean, in words: why an alternative is not the plan, and what to do.

use brigade_base::LayerRange;

use super::{Alternative, AlternativeKind, Forecast, Question};
use crate::memory::{missing, stage_memory};
use crate::predict::{RingModel, RingStage, objective};
use crate::words::{at_least, change, figure, listed, percent, seconds};
use crate::{LinkProfile, Links, NodeProfile, Optimize, Plan};

/// Below this gain nothing is worth a machine moved or a cable bought; predictions are no finer.
const WORTH_SAYING: f64 = 1.1;

/// Below this gain not even the most that something could bring is of interest.
const WORTH_MENTIONING: f64 = 1.03;

impl Forecast {
    /// This one against another, as "one stream would be 31 % faster, 4 would be as fast".
    pub fn compared_with(&self, other: &Self) -> String {
        let one = change(self.tokens_per_s, other.tokens_per_s);
        let many = change(self.streams_tokens_per_s, other.streams_tokens_per_s);
        match other.streams {
            1 => format!("one stream would be {one}"),
            n if one == many => format!("one stream and {n} would be {one}"),
            n => format!("one stream would be {one}, {n} would be {many}"),
        }
    }
}

/// Why an alternative is not the plan.
pub(super) fn why_not(question: &Question<'_>, plan: &Plan, other: &Alternative) -> String {
    let plan_forecast = plan.prediction.as_ref().map(Forecast::from);
    let compared = match (&other.forecast, &plan_forecast) {
        (Some(other), Some(plan)) => other.compared_with(plan),
        _ => "how fast it would be is not known".to_owned(),
    };
    match other.kind {
        AlternativeKind::Alone if !other.stages.iter().any(|stage| coordinates(question, stage.node)) => {
            format!("{compared}; `brigade serve` would have to run there")
        }
        AlternativeKind::Replicas => format!("{compared}; Brigade does not route requests over copies yet"),
        AlternativeKind::TensorGroup => format!("{compared}; {}; not executed by this version", other.why_not),
        _ => compared,
    }
}

fn coordinates(question: &Question<'_>, node: brigade_base::NodeId) -> bool {
    question.nodes.iter().any(|known| known.id == node && question.may_coordinate(known))
}

/// What to do.
pub(super) fn advice(question: &Question<'_>, plan: &Plan, others: &[Alternative]) -> Vec<String> {
    let Some(prediction) = &plan.prediction else {
        return vec![unknown_speeds(question)];
    };
    let now = Forecast::from(prediction);
    let mut lines: Vec<String> = Vec::new();
    lines.extend(serve_elsewhere(question, &now, plan, others));
    lines.extend(route_instead(&now, others));
    lines.extend(ask_for_less(question, &now).or_else(|| leave_out(&now, others)));
    lines.extend(network(question, plan, &now));
    lines.extend(more_memory(question, plan, &now));
    if question.nodes.iter().any(|node| node.speed.is_none()) {
        lines.push(unknown_speeds(question));
    }
    lines
}

fn unknown_speeds(question: &Question<'_>) -> String {
    let unknown = question.nodes.iter().filter(|node| node.speed.is_none()).map(|node| node.name.as_str());
    let names: Vec<&str> = unknown.collect();
    format!(
        "How fast {} would compute is not known: name the device, as --node NAME=SIZE@DEVICE, or let it join.",
        listed(&names)
    )
}

/// Another node alone is clearly better than the plan: for one stream, or for all together, whichever is asked for
/// first. The latter says, too, where the plan's links carry less than a node computes, which no objective counts.
fn serve_elsewhere(question: &Question<'_>, now: &Forecast, plan: &Plan, others: &[Alternative]) -> Option<String> {
    let rate = |is_many: bool, of: &Forecast| if is_many { of.streams_tokens_per_s } else { of.tokens_per_s };
    let measures: &[bool] = match objective(question.demand) {
        Optimize::Latency => &[false],
        Optimize::Throughput => &[true, false],
        Optimize::Balanced | Optimize::Memory => &[false, true],
    };
    let than = if plan.stages.len() > 1 { "in this split" } else { "here" };
    measures.iter().find_map(|&is_many| {
        let alone = others.iter().filter(|other| other.kind == AlternativeKind::Alone);
        let known = alone.filter_map(|other| Some((other.stages.first()?, other.forecast?)));
        let (stage, there) = known.max_by(|a, b| rate(is_many, &a.1).total_cmp(&rate(is_many, &b.1)))?;
        if rate(is_many, &there) < WORTH_SAYING * rate(is_many, now) {
            return None;
        }
        let (name, how_much) = (&stage.name, change(rate(is_many, &there), rate(is_many, now)));
        let here = coordinates(question, stage.node);
        let who = match (is_many, here) {
            (true, _) => format!(", and {} streams together are", now.streams),
            (false, true) => ", and one stream is".to_owned(),
            (false, false) => " and is".to_owned(),
        };
        // What is gained for the one must not hide what is lost for the other.
        let lost = change(rate(!is_many, &there), rate(!is_many, now));
        let loser = if is_many { "one stream".to_owned() } else { format!("{} at once", now.streams) };
        let but = if lost.ends_with("slower") { format!("; {loser} would be {lost}") } else { String::new() };
        let run = if here { String::new() } else { format!(": run `brigade serve` on {name}") };
        Some(format!("The model fits on {name} alone{who} {how_much} there than {than}{but}{run}."))
    })
}

/// Copies give more than one deployment does.
fn route_instead(now: &Forecast, others: &[Alternative]) -> Option<String> {
    let copies = others.iter().find(|other| other.kind == AlternativeKind::Replicas)?;
    let there = copies.forecast?;
    // One copy is a node alone, of which is told already.
    if copies.members.iter().filter(|m| m.streams > 0).count() < 2 {
        return None;
    }
    (there.streams_tokens_per_s >= WORTH_SAYING * now.streams_tokens_per_s).then(|| {
        let busy: Vec<&str> = copies.members.iter().filter(|m| m.streams > 0).map(|m| m.name.as_str()).collect();
        format!(
            "The model fits whole on {}: {} streams over such copies give {} tokens/s, {} than this plan. Brigade does \
             not route requests over copies yet: run `brigade serve` on each, and a load balancer before them.",
            listed(&busy),
            there.streams,
            figure(there.streams_tokens_per_s),
            change(there.streams_tokens_per_s, now.streams_tokens_per_s)
        )
    })
}

/// What was asked about the split costs speed.
fn ask_for_less(question: &Question<'_>, now: &Forecast) -> Option<String> {
    let demand = question.demand;
    let flag = match (&demand.split, demand.spread) {
        (Some(_), _) => "--layers",
        (None, true) => "--spread",
        (None, false) => return None,
    };
    if !question.can_vary() {
        return None;
    }
    let free = question.place(question.nodes, &question.free_demand()).ok()?;
    let free = Forecast::from(free.prediction.as_ref()?);
    (free.tokens_per_s >= WORTH_SAYING * now.tokens_per_s)
        .then(|| format!("Without {flag}, one stream would be {}.", change(free.tokens_per_s, now.tokens_per_s)))
}

/// A node that costs more than it brings, whatever made the plan use it.
fn leave_out(now: &Forecast, others: &[Alternative]) -> Option<String> {
    let gains = |other: &&Alternative| {
        let brings = |forecast: Forecast| {
            forecast.tokens_per_s >= WORTH_SAYING * now.tokens_per_s
                && forecast.streams_tokens_per_s >= now.streams_tokens_per_s
        };
        other.kind == AlternativeKind::Without && other.forecast.is_some_and(brings)
    };
    let best = others.iter().filter(gains).max_by(|a, b| super::rate(a).total_cmp(&super::rate(b)))?;
    Some(format!("The plan {}.", faster(&best.name, super::rate(best), now.tokens_per_s)))
}

fn faster(name: &str, new: f64, old: f64) -> String {
    format!("{name} would be {}", change(new, old))
}

/// What the network costs, and the most that a better one could bring.
fn network(question: &Question<'_>, plan: &Plan, now: &Forecast) -> Option<String> {
    let prediction = plan.prediction.as_ref()?;
    let stages = &prediction.stages;
    if stages.len() < 2 {
        return None;
    }
    let ideal = RingAgain::of(question, plan)?.forecast(question, &no_network(question, plan))?;
    let gain = ideal.tokens_per_s / now.tokens_per_s;
    if gain < WORTH_MENTIONING {
        return None;
    }
    if gain < WORTH_SAYING {
        return Some(format!(
            "A faster network would bring {} at most: computing takes the rest.",
            percent(gain - 1.0)
        ));
    }
    let (worst, hop) = stages.iter().enumerate().max_by(|a, b| a.1.hop_s.total_cmp(&b.1.hop_s))?;
    let token_s = 1.0 / now.tokens_per_s;
    let hops_s: f64 = stages.iter().map(|stage| stage.hop_s).sum();
    let to = &plan.stages[(worst + 1) % plan.stages.len()].name;
    Some(format!(
        "Links take {} of a lone stream's time, {} of it from {} to {to} ({}): a cable or a faster switch there brings most.",
        percent(hops_s / token_s),
        percent(hop.hop_s / token_s),
        plan.stages[worst].name,
        seconds(hop.hop_s)
    ))
}

/// Links without delay or limit between all stages.
fn no_network(question: &Question<'_>, plan: &Plan) -> Links {
    let mut links = question.links.clone();
    for (k, stage) in plan.stages.iter().enumerate() {
        let to = plan.stages[(k + 1) % plan.stages.len()].node;
        links.set(stage.node, to, LinkProfile { latency_s: 0.0, bytes_per_s: 1e15 });
    }
    links
}

/// The stages of a plan, to be predicted again under other conditions.
struct RingAgain<'a>(Vec<RingStage<'a>>);

impl<'a> RingAgain<'a> {
    fn of(question: &Question<'a>, plan: &Plan) -> Option<Self> {
        let stage = |stage: &crate::PlannedStage| {
            let node = question.nodes.iter().find(|node| node.id == stage.node)?;
            Some(RingStage { node, speed: node.speed.as_ref()?, layers: stage.layers })
        };
        plan.stages.iter().map(stage).collect::<Option<_>>().map(Self)
    }

    fn forecast(&self, question: &Question<'_>, links: &Links) -> Option<Forecast> {
        Some(Forecast::from(&RingModel::new(question.model, &self.0, links, question.demand).predict()))
    }
}

/// A split is only for want of memory: what the fastest node alone would do if it had enough.
fn more_memory(question: &Question<'_>, plan: &Plan, now: &Forecast) -> Option<String> {
    if plan.stages.len() < 2 {
        return None;
    }
    let all = LayerRange::new(0, question.model.n_layers()).ok()?;
    let needed = stage_memory(question.model, question.demand, all, true).total();
    let missing = |node: &NodeProfile| missing(needed, node.memory);
    let alone = |node: &NodeProfile| -> Option<f64> {
        let stage = [RingStage { node, speed: node.speed.as_ref()?, layers: all }];
        Some(1.0 / RingModel::new(question.model, &stage, question.links, question.demand).token_s())
    };
    let lacking = question.nodes.iter().filter(|node| missing(node).0 > 0);
    let (node, rate) = lacking.filter_map(|node| Some((node, alone(node)?))).max_by(|a, b| a.1.total_cmp(&b.1))?;
    (rate >= WORTH_SAYING * now.tokens_per_s).then(|| {
        format!(
            "With {} more memory {} would hold the model alone, and one stream would be {}.",
            at_least(missing(node)),
            node.name,
            change(rate, now.tokens_per_s)
        )
    })
}
