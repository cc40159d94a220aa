//! Rings whose pieces differ, each cut truly: every ring of a few nodes, and small changes of a good ring of more.
//!
//! Local search: swap two workers, put one elsewhere, exchange one for an idle one, add one, leave one out; the first
//! change that is better is taken, until there is none or enough cells were looked at.

use super::cuts::{Cut, Cutter, MAX_CELLS};
use super::least::SAME;
use super::problem::Problem;

/// Most workers of which every ring is tried: six have 1,956. Each further one makes them eight times as many.
pub(super) const MAX_TRIED_WORKERS: usize = 6;

/// The best of all rings that costs less than `limit`.
pub(super) fn every_ring(problem: &Problem, cutter: &mut Cutter, limit: f64) -> Option<Cut> {
    let mut best: Option<Cut> = None;
    let mut begun = vec![Vec::new()];
    while let Some(ring) = begun.pop() {
        let idle = problem.workers.iter().filter(|node| !ring.contains(*node));
        if ring.len() + 1 < *problem.stages.end() {
            begun.extend(idle.map(|&node| [ring.as_slice(), &[node]].concat()));
        }
        let ring = [ring.as_slice(), &[problem.tail]].concat();
        if problem.stages.contains(&ring.len()) {
            let so_far = best.as_ref().map_or(limit, |best| best.cost * (1.0 - SAME));
            best = cutter.cut(&ring, so_far).or(best);
        }
    }
    best
}

/// The best ring that small changes of `start` lead to. Workers come from `pool`.
pub(super) fn polish(problem: &Problem, cutter: &mut Cutter, start: Cut, pool: &[usize]) -> Cut {
    let mut best = start;
    'again: loop {
        let from = best.ring.clone();
        for ring in neighbours(&from, pool) {
            if cutter.cells > MAX_CELLS {
                break 'again;
            }
            if !problem.stages.contains(&ring.len()) {
                continue;
            }
            if let Some(better) = cutter.cut(&ring, best.cost * (1.0 - SAME)) {
                best = better;
                continue 'again;
            }
        }
        break;
    }
    best
}

/// Other orders of the ring, if one of them is better than `best`: pieces differ, so that what fits in one order may
/// not in another. All orders of three workers, and of more those with one put elsewhere.
pub(super) fn other_orders(cutter: &mut Cutter, ring: &[usize], limit: f64, best: Option<Cut>) -> Option<Cut> {
    let n_workers = ring.len() - 1;
    let mut best = best;
    for (a, b) in (0..n_workers).flat_map(|a| (0..n_workers).map(move |b| (a, b))).filter(|(a, b)| a != b) {
        if cutter.cells > MAX_CELLS {
            break;
        }
        let mut other = ring.to_vec();
        let node = other.remove(a);
        other.insert(b, node);
        let so_far = best.as_ref().map_or(limit, |best| best.cost.min(limit));
        best = cutter.cut(&other, so_far * (1.0 - SAME)).or(best);
    }
    best
}

/// Rings that differ from this one by one change; the coordinator stays last.
fn neighbours(ring: &[usize], pool: &[usize]) -> impl Iterator<Item = Vec<usize>> {
    let n_workers = ring.len() - 1;
    let idle: Vec<usize> = pool.iter().copied().filter(|node| !ring.contains(node)).collect();
    let without = move |k: usize| {
        let mut ring = ring.to_vec();
        ring.remove(k);
        ring
    };
    let with = |mut ring: Vec<usize>, k: usize, node: usize| {
        ring.insert(k, node);
        ring
    };
    let pairs = move || (0..n_workers).flat_map(move |a| (0..n_workers).map(move |b| (a, b)));
    let swapped = pairs().filter(|(a, b)| a < b).map(move |(a, b)| {
        let mut ring = ring.to_vec();
        ring.swap(a, b);
        ring
    });
    // Neighbours that change places were swapped already.
    let moved = pairs().filter(|(a, b)| a.abs_diff(*b) > 1).map(move |(a, b)| with(without(a), b, ring[a]));
    let exchanged = {
        let idle = idle.clone();
        (0..n_workers).flat_map(move |k| idle.clone().into_iter().map(move |node| with(without(k), k, node)))
    };
    let longer = idle.into_iter().flat_map(move |node| (0..=n_workers).map(move |k| with(ring.to_vec(), k, node)));
    let shorter = (0..n_workers).map(without);
    shorter.chain(exchanged).chain(longer).chain(swapped).chain(moved)
}
