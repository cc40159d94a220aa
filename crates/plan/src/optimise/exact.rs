//! The best ring of a few nodes, exactly where all pieces are alike.
//!
//! For every set of workers the order with the cheapest hops is a path through the set from the coordinator and back,
//! found for all sets at once by dynamic programming (Held and Karp 1962, Bellman 1962). Which layers each gets does
//! not depend on the order then. Sets are visited in the order of a lower bound of their cost, and as soon as that
//! reaches the best cost so far the rest is left alone. Where pieces differ, they are taken to be as large as their
//! mean, and the best few rings are handed on to be cut truly.

use super::least::{SAME, Shares, least_peak};
use super::problem::{Part, Problem, Scenario};

/// Most nodes of an exact search: there are 2^11 sets of workers then, and their cheapest orders take a third of a
/// millisecond for each scenario. Each further node doubles that and more.
pub(super) const MAX_NODES: usize = 12;

/// How many rings are handed on where pieces differ.
const MAX_RINGS: usize = 12;

/// How much more than the best such a ring may cost: with unequal pieces the mean is off by less in most models.
const SLACK: f64 = 1.05;

/// A ring that was found, and its cost with pieces that are alike.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub cost: f64,
    pub ring: Vec<usize>,
}

/// The best rings of these workers and the coordinator that cost less than `best`, the best first: one where all pieces
/// are alike, and some more where they are not.
pub(super) fn best_rings(problem: &Problem, scenarios: &[Scenario], workers: &[usize], best: f64) -> Vec<Found> {
    let workers = &workers[..workers.len().min(MAX_NODES - 1)];
    let (n_units, unit_work) = (problem.units.len(), problem.units.mean_work());
    let (keep, slack) = if problem.units.are_alike { (1, 1.0) } else { (MAX_RINGS, SLACK) };
    let mut paths = Paths::default();
    let mut paths_of: Option<&Scenario> = None;
    let mut found: Vec<Found> = Vec::new();
    let mut best = best;
    for scenario in scenarios {
        if paths_of.is_none_or(|other| !other.has_hops_of(scenario)) {
            paths.compute(problem, scenario, workers);
            paths_of = Some(scenario);
        }
        let tail = problem.part(scenario, problem.tail);
        let parts: Vec<Part> = workers.iter().map(|&node| problem.part(scenario, node)).collect();
        let bounds = Bounds::new(&parts, tail, n_units, unit_work);
        let sizes = |set: usize| set.count_ones() as usize + 1;
        // As rings of 0, 1, 2.. stages run it; those that are not wanted are left out.
        let runs: Vec<Option<Scenario>> = (0..=workers.len() + 1)
            .map(|n_stages| scenario.of(n_stages).filter(|_| problem.stages.contains(&n_stages)))
            .collect();
        let bound = |set: usize| bounds.of(runs[sizes(set)].as_ref()?, set, paths.cost(set));
        let mut sets: Vec<(f64, usize)> = (1..1usize << workers.len())
            .filter_map(|set| Some((bound(set)?, set)))
            .filter(|&(bound, _)| bound < best * slack)
            .collect();
        sets.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut shares = Shares::default();
        for (bound, set) in sets {
            let full = found.get(keep - 1).map_or(f64::INFINITY, |last| last.cost);
            let limit = (best * slack).min(full);
            if bound >= limit * (1.0 - SAME) {
                break;
            }
            let members = parts.iter().enumerate().filter(|(i, _)| set & (1 << i) != 0).map(|(_, part)| *part);
            shares.set(members.chain([tail]));
            let Some(run) = &runs[sizes(set)] else { continue };
            let Some(cost) = shares.cost(run, n_units, unit_work, paths.cost(set), limit) else { continue };
            best = best.min(cost);
            let mut ring: Vec<usize> = paths.order(set).into_iter().map(|i| workers[i]).collect();
            ring.push(problem.tail);
            note(&mut found, Found { cost, ring }, keep);
        }
    }
    found.retain(|ring| ring.cost <= best * slack);
    found
}

/// Puts a ring among the best ones, once.
fn note(found: &mut Vec<Found>, new: Found, keep: usize) {
    if let Some(same) = found.iter_mut().find(|old| old.ring == new.ring) {
        same.cost = same.cost.min(new.cost);
    } else {
        found.push(new);
    }
    found.sort_by(|a, b| a.cost.total_cmp(&b.cost));
    found.truncate(keep);
}

/// Lower bounds of the cost of sets of workers in one scenario.
struct Bounds {
    /// The workers' parts with their bits, those whose work is cheapest first; the coordinator has a bit beyond all.
    parts: Vec<(usize, Part)>,
    n_units: usize,
    unit_work: f64,
}

impl Bounds {
    fn new(workers: &[Part], tail: Part, n_units: usize, unit_work: f64) -> Self {
        let mut parts: Vec<(usize, Part)> =
            workers.iter().chain([&tail]).enumerate().map(|(i, part)| (1 << i, *part)).collect();
        parts.sort_by(|a, b| a.1.sum.slope_s.total_cmp(&b.1.sum.slope_s));
        Self { parts, n_units, unit_work }
    }

    /// `None` if the set and the coordinator cannot hold the model.
    fn of(&self, scenario: &Scenario, set: usize, hops_s: f64) -> Option<f64> {
        let set = set | 1 << (self.parts.len() - 1);
        let members = self.parts.iter().filter(|(bit, _)| set & bit != 0).map(|(_, part)| *part);
        let mut rest = self.n_units.checked_sub(set.count_ones() as usize)?;
        let mut sum_s = hops_s;
        for part in members.clone() {
            let more = rest.min(part.most.checked_sub(1)?);
            rest -= more;
            sum_s += part.sum.at((more + 1) as f64 * self.unit_work);
        }
        let work = self.n_units as f64 * self.unit_work;
        (rest == 0).then(|| scenario.total(sum_s, least_peak(members, work, self.unit_work)))
    }
}

/// The cheapest way from the coordinator through each set of workers and back.
#[derive(Debug, Default)]
struct Paths {
    n: usize,
    /// Seconds of each hop; from the worker (the coordinator last) in rows, to the one in columns.
    hops: Vec<f64>,
    /// The cheapest way through a set that ends at one of it: `set * n + end`.
    cheapest: Vec<f64>,
    /// The cheapest way through a set and back.
    rounds: Vec<f64>,
}

impl Paths {
    fn compute(&mut self, problem: &Problem, scenario: &Scenario, workers: &[usize]) {
        let n = workers.len();
        self.n = n;
        let nodes: Vec<usize> = workers.iter().copied().chain([problem.tail]).collect();
        let pairs = nodes.iter().flat_map(|&from| nodes.iter().map(move |&to| (from, to)));
        self.hops = pairs.map(|(from, to)| if from == to { 0.0 } else { problem.hop_s(scenario, from, to) }).collect();
        self.cheapest.clear();
        self.cheapest.resize(n << n, f64::INFINITY);
        self.rounds.clear();
        self.rounds.resize(1 << n, 0.0);
        for set in 1usize..1 << n {
            let mut round = f64::INFINITY;
            for end in bits(set) {
                let before = set & !(1 << end);
                let way = if before == 0 {
                    self.hop(n, end)
                } else {
                    bits(before)
                        .map(|at| self.cheapest[before * n + at] + self.hop(at, end))
                        .fold(f64::INFINITY, f64::min)
                };
                self.cheapest[set * n + end] = way;
                round = round.min(way + self.hop(end, n));
            }
            self.rounds[set] = round;
        }
    }

    fn hop(&self, from: usize, to: usize) -> f64 {
        self.hops[from * (self.n + 1) + to]
    }

    fn cost(&self, set: usize) -> f64 {
        self.rounds[set]
    }

    /// The cheapest order of a set.
    fn order(&self, mut set: usize) -> Vec<usize> {
        let mut order = Vec::new();
        let mut next = self.n;
        while set != 0 {
            let way = |&at: &usize| self.cheapest[set * self.n + at] + self.hop(at, next);
            let Some(end) = bits(set).min_by(|a, b| way(a).total_cmp(&way(b))) else { break };
            order.push(end);
            set &= !(1 << end);
            next = end;
        }
        order.reverse();
        order
    }
}

/// The numbers of the bits of a set, the lowest first.
fn bits(mut set: usize) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (set != 0).then(|| set.trailing_zeros() as usize)?;
        set &= set - 1;
        Some(bit)
    })
}
