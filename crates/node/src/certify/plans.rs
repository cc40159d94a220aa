//! Which cuts are tried.

use std::collections::BTreeSet;

/// Most stages of a cut that is chosen evenly: more show nothing that these do not.
const MAX_STAGES: usize = 4;

/// How many cuts are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cuts {
    /// Into 2, 3 and 4 stages, so that each legal place is in a cut of each kind; and into as many stages as there can
    /// be.
    All,
    /// So many of them, evenly chosen.
    Most(u32),
}

/// The cuts to try of a model that may be cut at `points`; each is the first layer of each stage but the first.
pub(super) fn plans(points: &[u32], cuts: Cuts) -> Vec<Vec<u32>> {
    let kinds: Vec<Vec<Vec<u32>>> = (1..MAX_STAGES).map(|n_cuts| each_place(points, n_cuts)).collect();
    match cuts {
        Cuts::All => {
            let finest = (points.len() >= MAX_STAGES).then(|| points.to_vec());
            kinds.into_iter().flatten().chain(finest).collect()
        }
        Cuts::Most(n) => {
            let n_kinds = kinds.iter().filter(|kind| !kind.is_empty()).count().max(1);
            let share = |idx: usize| (n as usize + n_kinds - 1 - idx) / n_kinds;
            kinds.iter().enumerate().flat_map(|(idx, kind)| evenly(kind, share(idx))).collect()
        }
    }
}

/// Cuts at `n_cuts` places, such that each place is in one: it and others as far as possible from it.
fn each_place(points: &[u32], n_cuts: usize) -> Vec<Vec<u32>> {
    if points.len() < n_cuts {
        return Vec::new();
    }
    let cut = |first: usize| {
        let indices: BTreeSet<usize> =
            (0..n_cuts).map(|k| (first + k * points.len() / n_cuts) % points.len()).collect();
        indices.into_iter().map(|idx| points[idx]).collect()
    };
    let all: BTreeSet<Vec<u32>> = (0..points.len()).map(cut).collect();
    all.into_iter().collect()
}

/// `n` of them, the middle ones of `n` equal parts.
fn evenly(all: &[Vec<u32>], n: usize) -> impl Iterator<Item = Vec<u32>> {
    let n = n.min(all.len());
    (0..n).map(move |k| all[(2 * k + 1) * all.len() / (2 * n)].clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_is_in_a_cut_of_each_kind() {
        let points = [1, 2, 4, 6, 9, 11, 12];
        let all = plans(&points, Cuts::All);
        for n_cuts in 1..MAX_STAGES {
            let places: BTreeSet<u32> = all.iter().filter(|plan| plan.len() == n_cuts).flatten().copied().collect();
            assert_eq!(places.into_iter().collect::<Vec<_>>(), points);
        }
        assert!(all.iter().all(|plan| plan.is_sorted_by(|a, b| a < b)));
        assert_eq!(all.last().map(Vec::as_slice), Some(points.as_slice()));
    }

    #[test]
    fn few_cuts_are_of_each_kind() {
        let points: Vec<u32> = (1..32).collect();
        let lens = |n| plans(&points, Cuts::Most(n)).iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(lens(3), [1, 2, 3]);
        assert_eq!(lens(5), [1, 1, 2, 2, 3]);
        assert_eq!(lens(1), [1]);
        assert_eq!(plans(&points, Cuts::Most(1)), [[16]]);
        assert!(plans(&[], Cuts::All).is_empty() && plans(&[], Cuts::Most(3)).is_empty());
        assert_eq!(plans(&[2], Cuts::All), [[2]]);
        assert_eq!(plans(&[2, 4], Cuts::Most(9)), [vec![2], vec![4], vec![2, 4]]);
    }
}
