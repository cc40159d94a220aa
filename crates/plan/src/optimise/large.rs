//! A good ring of up to ten thousand nodes.
//!
//! Where an exact search is out of reach, four steps of which each is linear in the number of nodes, or does not depend
//! on it:
//!
//! 1. *Candidates.* For a cap on the slowest stage's time, a node's price is what it adds to the sum (hops to and from
//!    the coordinator stand for its hops) for each piece that it can compute within the cap. The cheapest nodes that
//!    hold the model together are a candidate, as in the greedy algorithm for the knapsack (Dantzig 1957). Caps are
//!    those at which the 1, 2, 3, 4, 6, 8.. fastest nodes would be busy.
//! 2. *Order.* Each candidate's nodes are put into the ring where they lengthen it least (cheapest insertion,
//!    Rosenkrantz, Stearns and Lewis 1977).
//! 3. *Local search* from the best candidates: leave a node out, add one of the pool, exchange one, put one elsewhere.
//!    The cost is the exact one for pieces that are alike, see `least`.
//! 4. The caller searches the nodes of the best ring and their closest competitors exactly, if they are few, and cuts.

use super::exact::Found;
use super::least::{SAME, Shares};
use super::problem::{Part, Problem, Scenario};

/// Scenarios that are looked at: more numbers of passes lie between these and are tried when the ring is cut.
const MAX_SCENARIOS: usize = 12;

/// Candidates from which local search starts: those behind them mostly share their workers.
const MAX_STARTS: usize = 12;

/// Nodes that local search may use beside those of the best candidate: its step is linear in them times the stages.
const POOL: usize = 48;

/// Stages, counted once for each ring and scenario, that local search looks at. One takes some 25 ns, so all of them
/// are half a second; searches for rings of a dozen stages end by themselves long before.
const MAX_STAGES_SEEN: usize = 20_000_000;

/// How many times as long as evenly busy nodes the slowest stage may take in a candidate.
const CAP_FACTORS: [f64; 4] = [0.7, 1.0, 1.4, 2.5];

/// The best rings that were found and the nodes worth a closer look, best first in both; empty if the model does not
/// fit.
pub(super) fn search(problem: &Problem, scenarios: &[Scenario]) -> (Vec<Found>, Vec<usize>) {
    let step = scenarios.len().div_ceil(MAX_SCENARIOS).max(1);
    let mut few: Vec<Scenario> = scenarios.iter().step_by(step).copied().collect();
    if let Some(last) = scenarios.last().filter(|_| !(scenarios.len() - 1).is_multiple_of(step)) {
        few.push(*last);
    }
    let candidates = candidates(problem, &few);
    let pool = pool(problem, &few, &candidates);
    let mut field = Field::new(problem, &few, &pool);
    let mut found: Vec<Found> = Vec::new();
    for set in candidates.iter().take(MAX_STARTS) {
        let ring = field.ordered(set);
        let Some(cost) = field.cost(&ring, f64::INFINITY) else { continue };
        let (cost, ring) = field.improve(ring, cost);
        let ring = ring.into_iter().map(|i| field.nodes[i]).collect();
        found.push(Found { cost, ring });
    }
    found.sort_by(|a, b| a.cost.total_cmp(&b.cost));
    found.dedup_by(|a, b| a.ring == b.ring);
    (found, pool)
}

/// Seconds of the hops that a worker adds, if its neighbours are as far away as the coordinator.
fn reach_s(problem: &Problem, scenario: &Scenario, node: usize) -> f64 {
    0.5 * (problem.hop_s(scenario, problem.tail, node) + problem.hop_s(scenario, node, problem.tail))
}

/// Sets of workers, the most promising first.
fn candidates(problem: &Problem, scenarios: &[Scenario]) -> Vec<Vec<usize>> {
    let mut all: Vec<(f64, Vec<usize>)> = Vec::new();
    for scenario in scenarios {
        let ranking = Ranking::new(problem, scenario);
        for cap in ranking.caps() {
            if let Some((cost, mut set)) = ranking.cheapest(cap) {
                set.sort_unstable();
                all.push((cost, set));
            }
        }
        all.extend(ranking.pair());
    }
    all.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.len().cmp(&b.1.len())));
    let mut sets: Vec<Vec<usize>> = Vec::new();
    for (_, set) in all {
        if sets.len() < 2 * MAX_STARTS && !sets.contains(&set) {
            sets.push(set);
        }
    }
    sets
}

/// What workers would cost in one scenario.
struct Ranking<'a> {
    problem: &'a Problem<'a>,
    scenario: &'a Scenario,
    tail: Part,
    /// Node, its part, and its hops.
    workers: Vec<(usize, Part, f64)>,
}

impl<'a> Ranking<'a> {
    fn new(problem: &'a Problem<'a>, scenario: &'a Scenario) -> Self {
        let of = |&node: &usize| (node, problem.part(scenario, node), reach_s(problem, scenario, node));
        let workers = problem.workers.iter().map(of).collect();
        Self { problem, scenario, tail: problem.part(scenario, problem.tail), workers }
    }

    /// Caps to try.
    fn caps(&self) -> Vec<f64> {
        let units = &self.problem.units;
        let mut slopes: Vec<Part> = self.workers.iter().map(|(_, part, _)| *part).chain([self.tail]).collect();
        let most = units.len().min(slopes.len());
        slopes.select_nth_unstable_by(most - 1, |a, b| a.peak.slope_s.total_cmp(&b.peak.slope_s));
        slopes.truncate(most);
        slopes.sort_by(|a, b| a.peak.slope_s.total_cmp(&b.peak.slope_s));
        let mut caps = vec![f64::INFINITY];
        let mut count = 1;
        while count <= most {
            let work = units.work(0, units.len()) / count as f64;
            let busy_s = slopes[count - 1].peak.at(work);
            caps.extend(CAP_FACTORS.map(|factor| factor * busy_s));
            count += count.div_ceil(3);
        }
        caps
    }

    /// The best worker to share the model with the coordinator, if the two are enough.
    fn pair(&self) -> Option<(f64, Vec<usize>)> {
        let (n_units, unit_work) = (self.problem.units.len(), self.problem.units.mean_work());
        let scenario = self.scenario.of(2).filter(|_| self.problem.stages.contains(&2))?;
        let mut shares = Shares::default();
        let mut best = None;
        let mut limit = f64::INFINITY;
        for (node, part, hops_s) in &self.workers {
            shares.set([*part, self.tail].into_iter());
            if let Some(cost) = shares.cost(&scenario, n_units, unit_work, 2.0 * hops_s, limit) {
                limit = cost;
                best = Some((cost, vec![*node]));
            }
        }
        best
    }

    /// The cheapest workers that hold the model with the coordinator when no stage takes longer than `cap`, and what
    /// that costs, roughly.
    fn cheapest(&self, cap: f64) -> Option<(f64, Vec<usize>)> {
        let unit_work = self.problem.units.mean_work();
        let within = |part: &Part| {
            let free = (cap - part.peak.fixed_s) / (part.peak.slope_s * unit_work);
            if free.is_nan() { part.most } else { part.most.min(free.max(0.0) as usize) }
        };
        let mut rest = self.problem.units.len().saturating_sub(within(&self.tail).max(1));
        let price = |part: &Part, hops_s: f64, count: usize| {
            part.sum.slope_s + (part.sum.fixed_s + hops_s) / (count as f64 * unit_work)
        };
        let mut ranked: Vec<(f64, usize, usize)> = Vec::with_capacity(self.workers.len());
        ranked.extend(self.workers.iter().filter_map(|(node, part, hops_s)| {
            let count = within(part);
            (count > 0).then(|| (price(part, *hops_s, count), *node, count))
        }));
        let (least, most) = (self.problem.stages.start() - 1, self.problem.stages.end() - 1);
        if ranked.len() > most {
            ranked.select_nth_unstable_by(most, |a, b| a.0.total_cmp(&b.0));
            ranked.truncate(most);
        }
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let (mut sum_s, mut set) = (0.0, Vec::new());
        for (price, node, count) in ranked {
            if rest == 0 && set.len() >= least {
                break;
            }
            let taken = count.min(rest.max(1));
            rest = rest.saturating_sub(taken);
            sum_s += price * count.min(taken) as f64 * unit_work;
            set.push(node);
        }
        let is_enough = rest == 0 && set.len() >= least;
        let peak_s = if cap.is_finite() { cap } else { 0.0 };
        // A set that cannot run this number of passes may be worth another.
        let scenario = self.scenario.of(set.len() + 1).unwrap_or(*self.scenario);
        is_enough.then(|| (scenario.total(sum_s + self.tail.sum.fixed_s, peak_s), set))
    }
}

/// The workers of the best candidates, and those nearest to the coordinator.
fn pool(problem: &Problem, scenarios: &[Scenario], candidates: &[Vec<usize>]) -> Vec<usize> {
    let mut pool: Vec<usize> = Vec::new();
    let most = candidates.first().map_or(0, Vec::len) + POOL;
    let add = |pool: &mut Vec<usize>, node: usize, most: usize| {
        if pool.len() < most && !pool.contains(&node) {
            pool.push(node);
        }
    };
    // Local search starts from the first ones, so all of their nodes must be there.
    for &node in candidates.iter().take(MAX_STARTS).flatten() {
        add(&mut pool, node, usize::MAX);
    }
    candidates.iter().skip(MAX_STARTS).flatten().for_each(|&node| add(&mut pool, node, most));
    if let Some(scenario) = scenarios.first() {
        let mut near: Vec<(f64, usize)> =
            problem.workers.iter().map(|&node| (reach_s(problem, scenario, node), node)).collect();
        near.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        near.iter().take(POOL).for_each(|&(_, node)| add(&mut pool, node, most));
    }
    pool
}

/// A few nodes with all that rings of them cost; rings are lists of places in `nodes`, the coordinator's last.
struct Field<'a> {
    problem: &'a Problem<'a>,
    scenarios: &'a [Scenario],
    /// The pool, and behind it the coordinator.
    nodes: Vec<usize>,
    /// For each scenario.
    parts: Vec<Vec<Part>>,
    /// For each scenario, rows from, columns to.
    hops: Vec<Vec<f64>>,
    shares: Shares,
    stages_seen: usize,
}

impl<'a> Field<'a> {
    fn new(problem: &'a Problem<'a>, scenarios: &'a [Scenario], pool: &[usize]) -> Self {
        let nodes: Vec<usize> = pool.iter().copied().chain([problem.tail]).collect();
        let ids = nodes.iter().map(|&node| problem.nodes[node].id);
        let pairs = ids.clone().flat_map(|from| ids.clone().map(move |to| (from, to)));
        let links: Vec<_> = pairs.map(|(from, to)| problem.links.get(from, to)).collect();
        let hops = |s: &Scenario| links.iter().map(|link| s.hop_s(problem.model, link)).collect();
        let parts = |s: &Scenario| nodes.iter().map(|&node| problem.part(s, node)).collect();
        Self {
            problem,
            scenarios,
            hops: scenarios.iter().map(hops).collect(),
            parts: scenarios.iter().map(parts).collect(),
            nodes,
            shares: Shares::default(),
            stages_seen: 0,
        }
    }

    fn tail(&self) -> usize {
        self.nodes.len() - 1
    }

    /// The ring's cost if it is below `best`.
    fn cost(&mut self, ring: &[usize], best: f64) -> Option<f64> {
        self.stages_seen += ring.len() * self.scenarios.len();
        let (n_units, unit_work, n) = (self.problem.units.len(), self.problem.units.mean_work(), self.nodes.len());
        let (mut best, mut found) = (best, None);
        if !self.problem.stages.contains(&ring.len()) {
            return None;
        }
        for (s, scenario) in self.scenarios.iter().enumerate() {
            let Some(scenario) = scenario.of(ring.len()) else { continue };
            let next = ring.iter().cycle().skip(1);
            let hops_s: f64 = ring.iter().zip(next).map(|(&a, &b)| self.hops[s][a * n + b]).sum();
            if hops_s >= best {
                continue;
            }
            self.shares.set(ring.iter().map(|&i| self.parts[s][i]));
            if let Some(cost) = self.shares.cost(&scenario, n_units, unit_work, hops_s, best) {
                best = cost * (1.0 - SAME);
                found = Some(cost);
            }
        }
        found
    }

    /// Puts a worker where it lengthens the ring least.
    fn insert(&self, ring: &mut Vec<usize>, node: usize) {
        let n = self.nodes.len();
        let hop = |a: usize, b: usize| self.hops.first().map_or(0.0, |hops| hops[a * n + b]);
        let longer = |k: usize| {
            let (before, after) = (ring[(k + ring.len() - 1) % ring.len()], ring[k]);
            hop(before, node) + hop(node, after) - if ring.len() > 1 { hop(before, after) } else { 0.0 }
        };
        let at = (0..ring.len()).min_by(|&a, &b| longer(a).total_cmp(&longer(b))).unwrap_or(0);
        ring.insert(at, node);
    }

    /// A ring of these nodes of the problem.
    fn ordered(&self, set: &[usize]) -> Vec<usize> {
        let mut ring = vec![self.tail()];
        for i in (0..self.tail()).filter(|&i| set.contains(&self.nodes[i])) {
            self.insert(&mut ring, i);
        }
        ring
    }

    /// Local search: the best change at each place is taken, until a way around the ring brings none.
    fn improve(&mut self, mut ring: Vec<usize>, mut cost: f64) -> (f64, Vec<usize>) {
        let mut unchanged = 0;
        let mut k = 0;
        while unchanged < ring.len() && self.stages_seen < MAX_STAGES_SEEN {
            k = (k + 1) % ring.len();
            unchanged += 1;
            let mut limit = cost * (1.0 - SAME);
            let mut better = None;
            for changed in self.changes(&ring, k) {
                if let Some(less) = self.cost(&changed, limit) {
                    limit = less;
                    better = Some(changed);
                }
            }
            if let Some(changed) = better {
                (ring, cost, unchanged) = (changed, limit, 0);
            }
        }
        (cost, ring)
    }

    /// Rings in which the worker at place `k` is missing, elsewhere, or another one, or in which all from there to some
    /// place go the other way; or, at the coordinator's place, there is one more.
    fn changes(&self, ring: &[usize], k: usize) -> Vec<Vec<usize>> {
        let idle = (0..self.tail()).filter(|i| !ring.contains(i));
        let mut shorter = ring.to_vec();
        if k + 1 == ring.len() {
            return idle.map(|i| self.with(&shorter, i)).collect();
        }
        let node = shorter.remove(k);
        let places = || (0..shorter.len()).filter(|&at| at != k);
        let elsewhere = places().map(|at| {
            let mut changed = shorter.clone();
            changed.insert(at, node);
            changed
        });
        let swapped = places().filter(|&at| at > k).map(|at| {
            let mut changed = ring.to_vec();
            changed.swap(k, at);
            changed
        });
        let reversed = places().filter(|&at| at > k + 1).map(|at| {
            let mut changed = ring.to_vec();
            changed[k..=at].reverse();
            changed
        });
        elsewhere
            .chain(swapped)
            .chain(reversed)
            .chain(idle.map(|i| self.with(&shorter, i)))
            .chain([shorter.clone()])
            .collect()
    }

    fn with(&self, ring: &[usize], node: usize) -> Vec<usize> {
        let mut longer = ring.to_vec();
        self.insert(&mut longer, node);
        longer
    }
}
