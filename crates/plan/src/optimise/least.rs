//! The least cost over all caps on the slowest stage's time, and shares of pieces that are alike.
//!
//! With the slowest stage capped, the rest of the cost is a sum and easy: the cheapest nodes get what the cap allows.
//! The sum never rises with the cap, so an interval of caps costs at least the sum at its upper end and the peak at its
//! lower one. [`least`] halves intervals and drops those that cannot win (branch and bound, Land and Doig 1960).

use super::problem::{Part, Scenario};

/// Costs that differ by less than this share are the same: times are known to far fewer digits.
pub(super) const SAME: f64 = 1e-10;

/// Finds the cap from `low` to `high` with the least cost below `best`: the cost and the cap, `None` if there is none.
///
/// `fill(cap)` gives the least sum of all ways whose slowest stage takes no longer than `cap`, and how long it takes in
/// the way found; `None` if there is no way.
pub(super) fn least(
    scenario: &Scenario,
    (low, high): (f64, f64),
    mut best: f64,
    mut fill: impl FnMut(f64) -> Option<(f64, f64)>,
) -> Option<(f64, f64)> {
    let mut found = None;
    // A way's own time, computed in another order, must not be above it.
    let mut intervals = vec![(low, high * (1.0 + SAME))];
    while let Some((low, high)) = intervals.pop() {
        // Halving would never end there.
        if !high.is_finite() {
            continue;
        }
        // No way below this cap means none below a lower one.
        let Some((sum_s, peak_s)) = fill(high) else { continue };
        let cost = scenario.total(sum_s, peak_s);
        if cost < best {
            best = cost;
            found = Some((cost, high));
        }
        // Caps from the peak found to `high` give the same sum.
        let high = peak_s.min(high) * (1.0 - SAME);
        if high <= low || scenario.total(sum_s, low) >= best * (1.0 - SAME) {
            continue;
        }
        let half = low.midpoint(high);
        intervals.push((low, half));
        intervals.push((half, high));
    }
    found
}

/// The least that the slowest of these stages takes when they share so much work freely.
pub(super) fn least_peak(parts: impl Iterator<Item = Part> + Clone, work: f64, least_work: f64) -> f64 {
    // With a cap B stage i takes work (B - fixed_i) / slope_i, so all together need sum(..) >= work.
    let (inverse, offset) = parts.clone().fold((0.0, 0.0), |(inverse, offset), part| {
        (inverse + 1.0 / part.peak.slope_s, offset + part.peak.fixed_s / part.peak.slope_s)
    });
    let level = (work + offset) / inverse;
    let level = if level.is_finite() { level } else { 0.0 };
    parts.map(|part| part.peak.at(least_work)).fold(level, f64::max) * (1.0 - SAME)
}

/// Shares out pieces that are alike. Keeps its memory from one call to the next.
#[derive(Debug, Default)]
pub(super) struct Shares {
    /// The stages, those whose work is cheapest first.
    parts: Vec<Part>,
    most: Vec<usize>,
}

impl Shares {
    /// Takes these stages from now on.
    pub fn set(&mut self, parts: impl Iterator<Item = Part>) {
        self.parts.clear();
        self.parts.extend(parts);
        self.parts.sort_by(|a, b| a.sum.slope_s.total_cmp(&b.sum.slope_s));
    }

    /// The least cost below `best`, exactly.
    pub fn cost(&mut self, scenario: &Scenario, n_units: usize, unit_work: f64, hops_s: f64, best: f64) -> Option<f64> {
        let (sum_s, peak_s) = self.fill(n_units, unit_work, f64::INFINITY)?;
        let low = least_peak(self.parts.iter().copied(), n_units as f64 * unit_work, unit_work);
        if scenario.total(sum_s + hops_s, low) >= best {
            return None;
        }
        let high = peak_s.min(scenario.peak_for(best, sum_s + hops_s));
        let fill = |cap| self.fill(n_units, unit_work, cap).map(|(sum_s, peak_s)| (sum_s + hops_s, peak_s));
        least(scenario, (low, high), best, fill).map(|(cost, _)| cost)
    }

    /// The least sum with no stage above `cap`, and the slowest stage's time: one piece for each stage, and the others
    /// where they cost least.
    fn fill(&mut self, n_units: usize, unit_work: f64, cap: f64) -> Option<(f64, f64)> {
        self.most.clear();
        let mut room = 0;
        for part in &self.parts {
            let free = (cap - part.peak.fixed_s) / (part.peak.slope_s * unit_work);
            let allowed = if free.is_nan() { part.most } else { part.most.min(free.max(0.0) as usize) };
            if allowed == 0 {
                return None;
            }
            room += allowed;
            self.most.push(allowed);
        }
        let mut rest = n_units.checked_sub(self.parts.len()).filter(|_| room >= n_units)?;
        let (mut sum_s, mut peak_s) = (0.0, 0.0f64);
        for (part, &most) in self.parts.iter().zip(&self.most) {
            let more = rest.min(most - 1);
            rest -= more;
            let work = (more + 1) as f64 * unit_work;
            sum_s += part.sum.at(work);
            peak_s = peak_s.max(part.peak.at(work));
        }
        Some((sum_s, peak_s))
    }
}
