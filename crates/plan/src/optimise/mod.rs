//! The ring with the least [`RingModel::cost_s`](crate::RingModel::cost_s): who takes part, in which order, and where
//! the model is cut.
//!
//! Flow: [`Problem`] turns profiles into lines; `exact` tries all sets of up to eleven workers, `large` finds good ones
//! among more; `cuts` cuts the best few truly, and `polish` improves them where pieces differ. What memory alone would
//! choose is tried too, so that a model that fits is always placed.
//!
//! With pieces that are alike and up to 12 nodes the result is the optimum. Otherwise it is close to it; by how much is
//! tested against trying everything.

mod cuts;
mod exact;
mod explain;
mod large;
mod least;
mod polish;
mod problem;
#[cfg(test)]
mod tests;

use brigade_base::LayerRange;

use self::cuts::{Cut, Cutter};
pub(crate) use self::explain::explain;
use self::problem::{Problem, Scenario};
use crate::{Demand, Links, ModelProfile, NodeProfile};

/// A coordinator that holds the model alone is kept unless a split is expected to be better by this share: each further
/// machine is one more that can fail, sleep or be busy with something else, and predictions are off by some percent.
pub(crate) const WORTH_A_SPLIT: f64 = 0.05;

/// Coordinators that are tried where any node may be one and there are too many to try all: those that would be the
/// fastest alone if they had the memory, and as many that have the most.
const COORDINATORS_EACH: usize = 2;

/// Members of the best ring that are tried as its coordinator then: each takes a cut of the whole ring.
const MAX_TURNS: usize = 16;

/// Nodes in ring order with their layers, the coordinator last.
pub(crate) type Ring = Vec<(usize, LayerRange)>;

/// What was found.
#[derive(Debug, Clone)]
pub(crate) struct Choice<'a> {
    problem: Problem<'a>,
    scenarios: Vec<Scenario>,
    /// The best ring of one.
    solo: Option<Cut>,
    /// The best ring of several.
    split: Option<Cut>,
}

impl<'a> Choice<'a> {
    /// The best with the last node as the coordinator; `None` if nothing fits or no speed is known. `by_memory` is a
    /// ring that is known to fit.
    pub fn new(
        model: &'a ModelProfile,
        nodes: &'a [NodeProfile],
        links: &'a Links,
        demand: &'a Demand,
        by_memory: Option<&Ring>,
    ) -> Option<Self> {
        let problem = Problem::new(model, nodes, links, demand, nodes.len().checked_sub(1)?)?;
        let choice = Self::of(problem, by_memory, f64::INFINITY);
        choice.best().is_some().then_some(choice)
    }

    /// The best with any node as the coordinator.
    pub fn anywhere(
        model: &'a ModelProfile,
        nodes: &'a [NodeProfile],
        links: &'a Links,
        demand: &'a Demand,
        by_memory: Option<&Ring>,
    ) -> Option<Self> {
        let first = Problem::new(model, nodes, links, demand, nodes.len().checked_sub(1)?)?;
        let (mut solo, mut split): (Option<Self>, Option<Self>) = (None, None);
        let attempt = |tail: usize, solo: &mut Option<Self>, split: &mut Option<Self>| {
            let known = by_memory.filter(|ring| ring.last().is_some_and(|(node, _)| *node == tail));
            let limit = split.as_ref().map_or(f64::INFINITY, |best| cost(best.split.as_ref()));
            let choice = Self::of(first.with_tail(tail), known, limit);
            if cost(choice.split.as_ref()) < limit {
                *split = Some(choice.clone());
            }
            if cost(choice.solo.as_ref()) < solo.as_ref().map_or(f64::INFINITY, |best| cost(best.solo.as_ref())) {
                *solo = Some(choice);
            }
        };
        for tail in coordinators(&first) {
            attempt(tail, &mut solo, &mut split);
        }
        // Where not all were tried: one of those that make up the best ring may do better at its end.
        if nodes.len() > exact::MAX_NODES
            && let Some(tail) = split.as_ref().and_then(better_coordinator)
        {
            attempt(tail, &mut solo, &mut split);
        }
        // The coordinator of the better of the two is the one that the plan is about.
        let alone = solo.as_ref().and_then(|best| best.solo.clone());
        let together = split.as_ref().and_then(|best| best.split.clone());
        let mut choice =
            if prefers_split(demand, alone.as_ref(), together.as_ref()) { split? } else { solo.or(split)? };
        (choice.solo, choice.split) = (alone, together);
        choice.best().is_some().then_some(choice)
    }

    fn of(problem: Problem<'a>, by_memory: Option<&Ring>, limit: f64) -> Self {
        let scenarios = Scenario::all(problem.demand, &problem.stages);
        let single = Scenario::all(problem.demand, &(1..=1));
        // Where all nodes are to be used, one alone is no answer.
        let may_be_alone = *problem.stages.start() < 2 || !problem.demand.spread;
        let solo = Cutter::new(&problem, &single).cut(&[problem.tail], f64::INFINITY).filter(|_| may_be_alone);
        let split = best_split(&problem, &scenarios, by_memory, limit);
        Self { problem, scenarios, solo, split }
    }

    fn best(&self) -> Option<&Cut> {
        let is_split = prefers_split(self.problem.demand, self.solo.as_ref(), self.split.as_ref());
        if is_split { self.split.as_ref() } else { self.solo.as_ref() }
    }

    /// The chosen ring.
    pub fn ring(&self) -> Option<Ring> {
        let best = self.best()?;
        let starts = std::iter::once(0).chain(best.ends.iter().copied());
        let layers = starts.zip(&best.ends).map(|(start, &end)| self.problem.units.layers(start, end));
        best.ring.iter().zip(layers).map(|(&node, layers)| Some((node, layers?))).collect()
    }
}

fn cost(cut: Option<&Cut>) -> f64 {
    cut.map_or(f64::INFINITY, |cut| cut.cost)
}

/// Whether the split is the one to take.
fn prefers_split(demand: &Demand, solo: Option<&Cut>, split: Option<&Cut>) -> bool {
    let (solo, split) = (cost(solo), cost(split));
    split.is_finite() && (demand.spread || split <= solo * (1.0 - WORTH_A_SPLIT))
}

/// The best ring of several that costs less than `limit`.
fn best_split(problem: &Problem, scenarios: &[Scenario], by_memory: Option<&Ring>, limit: f64) -> Option<Cut> {
    if problem.workers.is_empty() || *problem.stages.start() < 2 {
        return None;
    }
    if !problem.units.are_alike && problem.workers.len() <= polish::MAX_TRIED_WORKERS {
        return polish::every_ring(problem, &mut Cutter::new(problem, scenarios), limit);
    }
    searched_split(problem, scenarios, by_memory, limit)
}

/// The same for rings that are too many to try each.
fn searched_split(problem: &Problem, scenarios: &[Scenario], by_memory: Option<&Ring>, limit: f64) -> Option<Cut> {
    let mut cutter = Cutter::new(problem, scenarios);
    let known: Option<Vec<usize>> = by_memory.map(|ring| ring.iter().map(|(node, _)| *node).collect());
    let known = known.filter(|ring| problem.stages.contains(&ring.len()));
    let mut best = known.and_then(|ring| cutter.cut(&ring, limit));
    let mut pool = problem.workers.clone();
    let mut rings = Vec::new();
    if problem.nodes.len() > exact::MAX_NODES {
        (rings, pool) = large::search(&problem.safe(), scenarios);
        // The core: the best ring's workers and their closest competitors.
        let mut core: Vec<usize> = rings.first().map_or(Vec::new(), |best| best.ring[..best.ring.len() - 1].to_vec());
        core.extend(pool.iter().copied().filter(|node| !core.contains(node)).collect::<Vec<_>>());
        core.truncate(exact::MAX_NODES - 1);
        pool = core;
    }
    if rings.first().is_none_or(|ring| ring.ring.len() <= exact::MAX_NODES) {
        let so_far = rings.first().map_or(f64::INFINITY, |ring| ring.cost).min(cost(best.as_ref())).min(limit);
        // Found costs are those of pieces that are alike: a bound that is too tight would hide what a true cut makes
        // of them, and one that is equal would hide the ring itself.
        let so_far = if problem.units.are_alike { so_far } else { f64::INFINITY };
        rings.extend(exact::best_rings(problem, scenarios, &pool, so_far));
        if !problem.units.are_alike {
            rings.extend(exact::best_rings(&problem.safe(), scenarios, &pool, so_far));
        }
    }
    for ring in rings {
        let so_far = cost(best.as_ref()).min(limit);
        best = cutter.cut(&ring.ring, so_far).or(best);
        if !problem.units.are_alike {
            best = polish::other_orders(&mut cutter, &ring.ring, limit, best);
        }
    }
    let best = best?;
    Some(if problem.units.are_alike { best } else { polish::polish(problem, &mut cutter, best, &pool) })
}

/// A member of the split's ring with which as the coordinator the same ring costs less.
fn better_coordinator(choice: &Choice) -> Option<usize> {
    let split = choice.split.as_ref()?;
    let mut best = split.clone();
    for turn in 1..split.ring.len().min(MAX_TURNS) {
        let mut ring = split.ring.clone();
        ring.rotate_left(turn);
        let problem = choice.problem.with_tail(ring[ring.len() - 1]);
        best = Cutter::new(&problem, &choice.scenarios).cut(&ring, best.cost).unwrap_or(best);
    }
    best.ring.last().copied().filter(|tail| *tail != choice.problem.tail)
}

/// The nodes that are tried as coordinators, the most promising first.
fn coordinators(problem: &Problem) -> Vec<usize> {
    let single = Scenario::all(problem.demand, &(1..=1));
    let work = problem.units.work(0, problem.units.len());
    let alone_s =
        |tail: usize| single.iter().map(|s| problem.part_as(s, tail, true).sum.at(work)).fold(f64::INFINITY, f64::min);
    let mut by_speed: Vec<(f64, usize)> = (0..problem.nodes.len()).map(|tail| (alone_s(tail), tail)).collect();
    by_speed.sort_by(|a, b| a.0.total_cmp(&b.0));
    let by_speed = by_speed.into_iter().map(|(_, tail)| tail);
    if problem.nodes.len() <= exact::MAX_NODES {
        return by_speed.collect();
    }
    let mut chosen: Vec<usize> = by_speed.take(COORDINATORS_EACH).collect();
    let mut by_memory: Vec<usize> = (0..problem.nodes.len()).collect();
    by_memory.sort_by_key(|&i| std::cmp::Reverse(problem.nodes[i].memory));
    chosen.extend(by_memory.into_iter().take(COORDINATORS_EACH).filter(|i| !chosen.contains(i)).collect::<Vec<_>>());
    chosen
}
