//! What is to be solved, in numbers: nodes whose times are lines over their share of the model, pieces that the model
//! can be cut into, and the scenarios that the cost is the least of.
//!
//! [`RingModel::cost_s`](crate::RingModel::cost_s) is, for each number of passes, a sum over stages and hops joined
//! with the time of the slowest stage. A [`Scenario`] is one number of passes; in it every node is two lines (a
//! [`Part`]), one for the sum and one for the slowest. Nothing here decides; `exact`, `large` and `cuts` do.

use std::ops::RangeInclusive;

use crate::memory::usable;
use crate::predict::{
    ANSWER_TOKENS, Line, MOST_PASSES_PER_STAGE, flow_chunks, frame_bytes, objective, prompt_tokens, turns,
};
use crate::units::Units;
use crate::{Demand, LinkProfile, Links, ModelProfile, NodeProfile, Optimize, Speed};

/// What a node adds to the cost by its share, in one scenario.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    /// To the sum.
    pub sum: Line,
    /// To the slowest stage's time.
    pub peak: Line,
    /// Most pieces that it can hold.
    pub most: usize,
}

/// Which times a scenario adds up.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// A lone request: its token, and its share of the first one's time, with chunks of so many rows.
    Request,
    /// A round of all sessions with so many rows in a pass.
    Round,
    /// A lone token's time, and the slowest stage's for a round.
    Both,
}

/// One number of passes, or one length of chunks: the cost is a sum and a multiple of the slowest stage's time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scenario {
    kind: Kind,
    rows: f64,
    /// How often the slowest stage's time counts.
    weight: f64,
    /// How often the sum counts; more than once in a round of more passes than there are stages.
    sum_weight: f64,
    /// Rings with so many stages can run it.
    least_stages: usize,
    most_stages: usize,
}

impl Scenario {
    /// All that rings of so many stages can run. Of several numbers of passes with the same number of rows the fewest
    /// is never worse, so the others are there only for rings that need more passes than that.
    pub fn all(demand: &Demand, stages: &RangeInclusive<usize>) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        if objective(demand) == Optimize::Latency {
            for n_stages in stages.clone() {
                let (n_chunks, rows) = flow_chunks(prompt_tokens(demand), n_stages, demand);
                let weight = (n_chunks - 1.0) / f64::from(ANSWER_TOKENS);
                match all.last_mut() {
                    Some(last) if last.rows == rows && last.weight == weight => last.most_stages = n_stages,
                    _ => all.push(Self {
                        kind: Kind::Request,
                        rows,
                        weight,
                        sum_weight: 1.0,
                        least_stages: n_stages,
                        most_stages: n_stages,
                    }),
                }
            }
            return all;
        }
        let kind = if objective(demand) == Optimize::Throughput { Kind::Round } else { Kind::Both };
        let n = demand.parallel.max(1);
        let most = n.min(MOST_PASSES_PER_STAGE.saturating_mul(*stages.end() as u32));
        for passes in 1..=most {
            let rows = f64::from(n.div_ceil(passes));
            let is_again = all.last().is_some_and(|last| last.rows == rows);
            if is_again && (kind == Kind::Round || passes as usize > *stages.end()) {
                continue;
            }
            let least_stages = if is_again { passes } else { passes.div_ceil(MOST_PASSES_PER_STAGE) } as usize;
            let most_stages = if kind == Kind::Round || passes == n { usize::MAX } else { passes as usize };
            all.push(Self { kind, rows, weight: passes.into(), sum_weight: 1.0, least_stages, most_stages });
        }
        all
    }

    /// It as a ring of so many stages runs it; `None` if that cannot.
    pub fn of(&self, n_stages: usize) -> Option<Self> {
        let can_run = (self.least_stages..=self.most_stages).contains(&n_stages);
        let sum_weight = if self.kind == Kind::Round { turns(self.weight, n_stages) } else { 1.0 };
        can_run.then_some(Self { sum_weight, ..*self })
    }

    /// The cost, for a ring of as many stages as it was made for by [`Scenario::of`].
    pub fn total(&self, sum_s: f64, peak_s: f64) -> f64 {
        let (sum_s, peak_s) = (self.sum_weight * sum_s, self.weight * peak_s);
        if self.kind == Kind::Round { sum_s.max(peak_s) } else { sum_s + peak_s }
    }

    /// The slowest stage's time with which the cost reaches `cost`, if the sum is no less than `sum_s`.
    pub fn peak_for(&self, cost: f64, sum_s: f64) -> f64 {
        let left = if self.kind == Kind::Round { cost } else { cost - sum_s };
        if self.weight > 0.0 { left / self.weight } else { f64::INFINITY }
    }

    /// What a hop adds to the sum.
    pub fn hop_s(&self, model: &ModelProfile, link: &LinkProfile) -> f64 {
        let rows_s = |rows| link.seconds(frame_bytes(model, rows));
        match self.kind {
            Kind::Request => rows_s(1.0) + rows_s(self.rows) / f64::from(ANSWER_TOKENS),
            Kind::Round => rows_s(self.rows),
            Kind::Both => rows_s(1.0),
        }
    }

    /// Whether hops cost the same in both.
    pub fn has_hops_of(&self, other: &Self) -> bool {
        self.kind == other.kind && (self.kind == Kind::Both || self.rows == other.rows)
    }

    /// A node's lines in it.
    fn lines(&self, model: &ModelProfile, demand: &Demand, speed: &Speed, is_tail: bool) -> (Line, Line) {
        let decode = |rows: f64| {
            let head_s = if is_tail { speed.head_s(model, rows) } else { 0.0 };
            let line = Line::of_decode(demand, speed, rows);
            Line { fixed_s: line.fixed_s + head_s, ..line }
        };
        match self.kind {
            Kind::Round => (decode(self.rows), decode(self.rows)),
            Kind::Both => (decode(1.0), decode(self.rows)),
            Kind::Request => {
                let (token, answer) = (decode(1.0), f64::from(ANSWER_TOKENS));
                let chunk = Line::of_chunk(speed, self.rows, f64::from(prompt_tokens(demand)) / 2.0);
                let sum = Line {
                    fixed_s: token.fixed_s + chunk.fixed_s / answer,
                    slope_s: token.slope_s + chunk.slope_s / answer,
                };
                (sum, chunk)
            }
        }
    }
}

/// A model, the nodes, and one of them as the coordinator.
#[derive(Debug, Clone)]
pub(super) struct Problem<'a> {
    pub model: &'a ModelProfile,
    pub nodes: &'a [NodeProfile],
    pub links: &'a Links,
    pub demand: &'a Demand,
    pub units: Units,
    /// Speed of each node; where it is not known, that of the slowest.
    pub speeds: Vec<&'a Speed>,
    /// The coordinator, by its place among the nodes.
    pub tail: usize,
    /// The workers that can hold something.
    pub workers: Vec<usize>,
    /// How many stages a split may have.
    pub stages: RangeInclusive<usize>,
    /// Whether a worker holds only as many pieces as it could of the largest: such shares fit in any order.
    is_safe: bool,
    /// Bytes that each node can use.
    usable: Vec<u64>,
}

impl<'a> Problem<'a> {
    /// With the node at `tail` as the coordinator. `None` if no node's speed is known, or there is no such node.
    pub fn new(
        model: &'a ModelProfile,
        nodes: &'a [NodeProfile],
        links: &'a Links,
        demand: &'a Demand,
        tail: usize,
    ) -> Option<Self> {
        let slowness = |speed: &Speed| Line::of_decode(demand, speed, 1.0).at(1.0);
        let known = nodes.iter().filter_map(|node| node.speed.as_ref());
        let slowest = known.max_by(|a, b| slowness(a).total_cmp(&slowness(b)))?;
        let speeds = nodes.iter().map(|node| node.speed.as_ref().unwrap_or(slowest)).collect();
        let usable = nodes.iter().map(|node| usable(node.memory).0).collect();
        let units = Units::new(model, demand)?;
        let problem = Self {
            model,
            nodes,
            links,
            demand,
            units,
            speeds,
            tail,
            workers: Vec::new(),
            stages: 2..=2,
            is_safe: false,
            usable,
        };
        (tail < nodes.len()).then(|| problem.with_tail(tail))
    }

    /// The same with another coordinator.
    #[must_use]
    pub fn with_tail(&self, tail: usize) -> Self {
        let can_work = |&i: &usize| i != tail && self.most(i, false) > 0;
        let workers: Vec<usize> = (0..self.nodes.len()).filter(can_work).collect();
        let cuts = self.units.len() - 1;
        let all = (self.nodes.len() - 1).min(cuts) + 1;
        let stages = if self.demand.spread { all..=all } else { 2..=workers.len().min(cuts) + 1 };
        Self { tail, workers, stages, ..self.clone() }
    }

    /// The same with shares that fit in any order.
    #[must_use]
    pub fn safe(&self) -> Self {
        Self { is_safe: true, ..self.clone() }
    }

    /// Most pieces that a node can hold.
    pub fn most(&self, node: usize, is_tail: bool) -> usize {
        self.units.most(self.usable[node], is_tail, self.is_safe)
    }

    /// Bytes that a node can use.
    pub fn usable(&self, node: usize) -> u64 {
        self.usable[node]
    }

    /// Whether these pieces fit on a node.
    pub fn fits(&self, node: usize, start: usize, end: usize) -> bool {
        self.units.needs(start, end, node == self.tail) <= self.usable[node]
    }

    /// What a node adds in a scenario.
    pub fn part(&self, scenario: &Scenario, node: usize) -> Part {
        self.part_as(scenario, node, node == self.tail)
    }

    /// What a node would add as the coordinator or as a worker.
    pub fn part_as(&self, scenario: &Scenario, node: usize, is_tail: bool) -> Part {
        let (sum, peak) = scenario.lines(self.model, self.demand, self.speeds[node], is_tail);
        Part { sum, peak, most: self.most(node, is_tail) }
    }

    /// What the hop from one node to another adds in a scenario.
    pub fn hop_s(&self, scenario: &Scenario, from: usize, to: usize) -> f64 {
        scenario.hop_s(self.model, &self.links.get(self.nodes[from].id, self.nodes[to].id))
    }

    /// What all hops of a ring add; nodes in ring order.
    pub fn hops_s(&self, scenario: &Scenario, ring: &[usize]) -> f64 {
        let next = ring.iter().cycle().skip(1);
        if ring.len() < 2 { 0.0 } else { ring.iter().zip(next).map(|(&a, &b)| self.hop_s(scenario, a, b)).sum() }
    }
}
