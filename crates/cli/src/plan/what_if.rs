//! What machines, cables and files that are not there would bring.

use brigade_base::{KvType, KvTypes};
use brigade_plan::catalogue::models::Quant;
use brigade_plan::catalogue::{Catalogue, made_up_id};
use brigade_plan::{
    Coordinator, Demand, Forecast, LinkProfile, Links, ModelProfile, NodeProfile, Optimize, Plan, Study, place,
    place_anywhere,
};
use serde::Serialize;

use super::machines::Machines;
use super::model::{Model, Origin};

/// Most machines for which these questions are asked: each is a placement, and some are about every pair.
const MAX_NODES: usize = 48;

/// How much faster a link must be to be another one.
const ANOTHER_LINK: f64 = 1.2;

/// Steps in which contexts are looked for; KV caches are rounded up to it.
const CONTEXT_STEP: u32 = 256;

/// Something that could be changed, and what it would bring.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WhatIf {
    /// What is changed.
    pub change: String,
    /// How fast it would be then, where that is another question than whether it fits.
    pub forecast: Option<Forecast>,
    /// What that means.
    pub effect: String,
}

/// All that can be asked about this plan.
pub fn all(model: &Model, machines: &Machines, demand: &Demand, study: &Study) -> Vec<WhatIf> {
    if machines.nodes.len() > MAX_NODES || demand.split.is_some() {
        return Vec::new();
    }
    let mut found = Vec::new();
    if let Some(prediction) = &study.plan.prediction {
        let now = Forecast::from(prediction);
        let asked = Asked { model, machines, demand, plan: &study.plan, now };
        found.extend(asked.faster_link());
        found.extend(asked.one_more());
        found.extend(asked.smaller_file());
    }
    found.extend(longest_context(model, machines, demand));
    found
}

/// The largest quantisation of a model that is given by name that fits although the one that was asked for does not.
pub fn smaller_that_fits(model: &Model, machines: &Machines, demand: &Demand) -> Option<Quant> {
    smaller(model)
        .find(|(smaller, _)| {
            let nodes = machines.with_model(&smaller.profile);
            nodes.is_some_and(|nodes| {
                placed(&smaller.profile, &nodes, &machines.links, demand, machines.coordinator).is_some()
            })
        })
        .map(|(_, quant)| quant)
}

/// The most exact storage of keys and values with which the model fits although it does not with the one that was
/// asked for; both sides alike.
pub fn smaller_kv_that_fits(model: &Model, machines: &Machines, demand: &Demand) -> Option<KvType> {
    let bytes = |profile: &ModelProfile| profile.kv_bytes_per_token.iter().sum::<u64>();
    KvType::ALL.into_iter().find(|ty| {
        let smaller = model.with_kv(KvTypes::both(*ty)).filter(|smaller| bytes(smaller) < bytes(&model.profile));
        // Whether it fits is no question of speed.
        let demand = Demand { optimize: Optimize::Memory, spread: false, ..demand.clone() };
        let place =
            |model: ModelProfile| placed(&model, &machines.nodes, &machines.links, &demand, machines.coordinator);
        smaller.is_some_and(|smaller| place(smaller).is_some())
    })
}

/// The same model with fewer bits, the largest first; none of a model that is a file.
fn smaller(model: &Model) -> impl Iterator<Item = (Model, Quant)> {
    let now = match model.origin {
        Origin::Name(quant) => Some(quant),
        Origin::File(_) | Origin::Header(_) => None,
    };
    let quants = std::iter::successors(now, |quant| quant.smaller()).skip(1);
    quants.filter_map(|quant| Some((Model::by_name(&model.name, quant, (model.work, model.kv)).ok()?, quant)))
}

fn placed(
    model: &ModelProfile,
    nodes: &[NodeProfile],
    links: &Links,
    demand: &Demand,
    coordinator: Coordinator,
) -> Option<Plan> {
    match coordinator {
        Coordinator::Last => place(model, nodes, links, demand).ok(),
        Coordinator::Anywhere => place_anywhere(model, nodes, links, demand).ok(),
    }
}

/// A plan, and how fast it is.
struct Asked<'a> {
    model: &'a Model,
    machines: &'a Machines,
    demand: &'a Demand,
    plan: &'a Plan,
    now: Forecast,
}

impl Asked<'_> {
    fn then(&self, change: String, model: &ModelProfile, nodes: &[NodeProfile], links: &Links) -> Option<WhatIf> {
        let plan = placed(model, nodes, links, self.demand, self.machines.coordinator)?;
        let forecast = Forecast::from(plan.prediction.as_ref()?);
        let mut effect = forecast.compared_with(&self.now);
        if plan.stages.len() == 1 && self.plan.stages.len() > 1 {
            effect.push_str(&format!("; {} alone would hold the model", plan.stages[0].name));
        }
        Some(WhatIf { change, forecast: Some(forecast), effect })
    }

    /// The next faster Ethernet between all machines, where a link of the plan is slower.
    fn faster_link(&self) -> Option<WhatIf> {
        let stages = &self.plan.stages;
        if stages.len() < 2 {
            return None;
        }
        let links = &self.machines.links;
        let hops =
            stages.iter().enumerate().map(|(k, stage)| links.get(stage.node, stages[(k + 1) % stages.len()].node));
        let slowest = hops.map(|link| link.bytes_per_s).fold(f64::INFINITY, f64::min);
        let ethernet = Catalogue::built_in().links().iter().filter(|link| link.name.ends_with("gbe"));
        let faster = ethernet.filter(|link| link.profile.bytes_per_s > ANOTHER_LINK * slowest);
        let next = faster.min_by(|a, b| a.profile.bytes_per_s.total_cmp(&b.profile.bytes_per_s))?;
        let (nodes, mut better) = (&self.machines.nodes, links.clone());
        for (k, one) in nodes.iter().enumerate() {
            for other in &nodes[k + 1..] {
                for (from, to) in [(one.id, other.id), (other.id, one.id)] {
                    better.set(from, to, best_of(links.get(from, to), next.profile));
                }
            }
        }
        self.then(format!("{} between all", next.title), &self.model.profile, nodes, &better)
    }

    /// One more machine like the fastest that the plan uses, linked as that one is.
    fn one_more(&self) -> Option<WhatIf> {
        let row_s = |node: &NodeProfile| node.speed.as_ref().map_or(f64::INFINITY, |speed| speed.decode.at(1.0));
        let used = self.machines.nodes.iter().filter(|node| self.plan.stages.iter().any(|stage| stage.node == node.id));
        let best = used.min_by(|a, b| row_s(a).total_cmp(&row_s(b)))?;
        let another =
            NodeProfile { id: made_up_id(usize::MAX), name: format!("{} (another)", best.name), ..best.clone() };
        let mut links = self.machines.links.clone();
        let mut slowest = LinkProfile { latency_s: 0.0, bytes_per_s: f64::INFINITY };
        for other in self.machines.nodes.iter().filter(|node| node.id != best.id) {
            let (there, back) = (links.get(best.id, other.id), links.get(other.id, best.id));
            links.set(another.id, other.id, there);
            links.set(other.id, another.id, back);
            slowest.latency_s = slowest.latency_s.max(there.latency_s);
            slowest.bytes_per_s = slowest.bytes_per_s.min(there.bytes_per_s);
        }
        let between = if slowest.bytes_per_s.is_finite() { slowest } else { LinkProfile::UNKNOWN };
        links.set(another.id, best.id, between);
        links.set(best.id, another.id, between);
        // In front, so that whoever coordinates still does.
        let nodes: Vec<NodeProfile> = std::iter::once(another).chain(self.machines.nodes.iter().cloned()).collect();
        self.then(format!("one more machine like {}", best.name), &self.model.profile, &nodes, &links)
    }

    fn smaller_file(&self) -> Option<WhatIf> {
        let (smaller, quant) = smaller(self.model).next()?;
        let nodes = self.machines.with_model(&smaller.profile)?;
        self.then(
            format!("{quant} in place of {}", self.model.quantisation),
            &smaller.profile,
            &nodes,
            &self.machines.links,
        )
    }
}

fn best_of(one: LinkProfile, other: LinkProfile) -> LinkProfile {
    LinkProfile { latency_s: one.latency_s.min(other.latency_s), bytes_per_s: one.bytes_per_s.max(other.bytes_per_s) }
}

/// The longest session that fits, as long as the model takes it.
fn longest_context(model: &Model, machines: &Machines, demand: &Demand) -> Option<WhatIf> {
    let longest = model.work.longest_context(model.trained, model.profile.n_embd, demand.parallel)?;
    // Whether it fits is no question of speed.
    let fits = |context: u32| {
        let max_rows = model.work.max_rows(context, demand.parallel);
        let demand = Demand { context, max_rows, optimize: Optimize::Memory, spread: false, ..demand.clone() };
        placed(&model.profile, &machines.nodes, &machines.links, &demand, machines.coordinator).is_some()
    };
    let sessions = demand.parallel;
    let whole = |context: u32, why: &str| WhatIf {
        change: format!("--context {context}"),
        forecast: None,
        effect: format!("the longest that {why}, with {sessions} at once"),
    };
    if fits(longest) {
        return Some(whole(longest, why_longest(longest, model.trained)));
    }
    let (mut good, mut bad) = (demand.context / CONTEXT_STEP, longest.div_ceil(CONTEXT_STEP));
    while good + 1 < bad {
        let middle = good.midpoint(bad);
        if fits(middle * CONTEXT_STEP) { good = middle } else { bad = middle }
    }
    (good > 0).then(|| whole(good * CONTEXT_STEP, "fits"))
}

/// What bounds the `longest` session, where memory does not. The model was `trained` for so many tokens, 0 if it does
/// not say.
fn why_longest(longest: u32, trained: u32) -> &'static str {
    if longest == trained { "the model was trained for; it fits" } else { "travels whole; it fits" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_model_was_trained_for_what_it_does_not_say() {
        assert!(why_longest(512, 512).starts_with("the model was trained for"));
        assert!(why_longest(4028, 8192).starts_with("travels whole"));
        assert!(why_longest(4028, 0).starts_with("travels whole"));
    }
}
