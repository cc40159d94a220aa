//! The best cuts for nodes whose order is given, with the true size of every layer.
//!
//! As `least` has it: with the slowest stage capped, a dynamic programme over stages and cuts finds the least sum,
//! O(stages · cuts · longest stage).

use super::least::{SAME, least, least_peak};
use super::problem::{Part, Problem, Scenario};

/// Cells that a search for cuts may look at. One takes 2 to 4 ns, so all of them are less than a twentieth of a
/// second. A ring of 12 stages over 80 pieces takes some ten thousand for a cap, so that is about a hundred rings cut
/// anew; most are dropped before by a bound.
pub(super) const MAX_CELLS: u64 = 12_000_000;

/// Cells that take as long as finding out what a stage and its hop cost in one scenario.
const CELLS_OF_A_STAGE: u64 = 32;

/// Where a ring is cut, and what it costs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cut {
    /// The cost, see [`RingModel::cost_s`](crate::RingModel::cost_s).
    pub cost: f64,
    /// Nodes in ring order, the coordinator last.
    pub ring: Vec<usize>,
    /// Pieces before the end of each stage.
    pub ends: Vec<usize>,
}

/// Cuts rings. Keeps its memory from one call to the next, and counts what it has looked at.
pub(super) struct Cutter<'a> {
    problem: &'a Problem<'a>,
    scenarios: &'a [Scenario],
    parts: Vec<Part>,
    /// Least sum of the stages so far, by the pieces that they hold.
    sums: Vec<f64>,
    next_sums: Vec<f64>,
    /// For each stage and end the piece with which the stage begins.
    starts: Vec<u32>,
    /// Cells looked at.
    pub cells: u64,
}

impl<'a> Cutter<'a> {
    /// For rings of this problem in these scenarios.
    pub fn new(problem: &'a Problem<'a>, scenarios: &'a [Scenario]) -> Self {
        let (parts, sums, next_sums, starts) = Default::default();
        Self { problem, scenarios, parts, sums, next_sums, starts, cells: 0 }
    }

    /// The best cuts for the ring if they cost less than `best`.
    pub fn cut(&mut self, ring: &[usize], mut best: f64) -> Option<Cut> {
        let mut found = None;
        let (n_units, n_stages) = (self.problem.units.len(), ring.len());
        if n_stages > n_units {
            return None;
        }
        let work = self.problem.units.work(0, n_units);
        for scenario in self.scenarios.iter().filter_map(|s| s.of(n_stages)) {
            let scenario = &scenario;
            self.cells += CELLS_OF_A_STAGE * n_stages as u64;
            self.parts.clear();
            self.parts.extend(ring.iter().map(|&node| self.problem.part(scenario, node)));
            let hops_s = self.problem.hops_s(scenario, ring);
            let cheapest = self.parts.iter().map(|part| part.sum.slope_s).fold(f64::INFINITY, f64::min);
            let fixed_s: f64 = self.parts.iter().map(|part| part.sum.fixed_s).sum();
            let least_sum = hops_s + fixed_s + work * cheapest * (1.0 - SAME);
            let low = least_peak(self.parts.iter().copied(), work, 0.0);
            if scenario.total(least_sum, low) >= best {
                continue;
            }
            let most = self.parts.iter().map(|part| part.peak.at(work)).fold(0.0, f64::max);
            let high = most.min(scenario.peak_for(best, least_sum));
            let fill = |cap| self.fill(ring, cap).map(|(sum_s, peak_s)| (sum_s + hops_s, peak_s));
            if let Some((cost, cap)) = least(scenario, (low, high), best, fill) {
                best = cost;
                self.fill(ring, cap);
                found = Some(Cut { cost, ring: ring.to_vec(), ends: self.ends(n_stages) });
            }
        }
        found
    }

    /// The least sum with no stage above `cap`, hops left out, and the slowest stage's time.
    fn fill(&mut self, ring: &[usize], cap: f64) -> Option<(f64, f64)> {
        let units = &self.problem.units;
        let (n_units, n_stages) = (units.len(), ring.len());
        self.sums.clear();
        self.sums.resize(n_units + 1, f64::INFINITY);
        self.sums[0] = 0.0;
        self.starts.clear();
        self.starts.resize(n_stages * (n_units + 1), 0);
        for (k, (part, &node)) in self.parts.iter().zip(ring).enumerate() {
            self.next_sums.clear();
            self.next_sums.resize(n_units + 1, f64::INFINITY);
            let is_last = k + 1 == n_stages;
            let last_end = n_units - (n_stages - 1 - k);
            let row = &mut self.starts[k * (n_units + 1)..(k + 1) * (n_units + 1)];
            for start in k..last_end {
                let before = self.sums[start];
                if before.is_infinite() {
                    continue;
                }
                let first_end = if is_last { n_units } else { start + 1 };
                let ends = row.iter_mut().zip(&mut self.next_sums).enumerate().take(last_end + 1).skip(first_end);
                for (end, (from, least_s)) in ends {
                    self.cells += 1;
                    let work = units.work(start, end);
                    if part.peak.at(work) > cap || !self.problem.fits(node, start, end) {
                        break;
                    }
                    let sum_s = before + part.sum.at(work);
                    if sum_s < *least_s {
                        (*least_s, *from) = (sum_s, start as u32);
                    }
                }
            }
            std::mem::swap(&mut self.sums, &mut self.next_sums);
        }
        let sum_s = self.sums[n_units];
        if sum_s.is_infinite() {
            return None;
        }
        let (mut end, mut peak_s) = (n_units, 0.0f64);
        for (k, part) in self.parts.iter().enumerate().rev() {
            let start = self.starts[k * (n_units + 1) + end] as usize;
            peak_s = peak_s.max(part.peak.at(units.work(start, end)));
            end = start;
        }
        Some((sum_s, peak_s))
    }

    /// The ends that the last call of `fill` found.
    fn ends(&self, n_stages: usize) -> Vec<usize> {
        let n_units = self.problem.units.len();
        let mut ends = vec![n_units];
        for k in (1..n_stages).rev() {
            let end = ends[ends.len() - 1];
            ends.push(self.starts[k * (n_units + 1) + end] as usize);
        }
        ends.reverse();
        ends
    }
}
