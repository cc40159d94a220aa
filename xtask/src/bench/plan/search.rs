//! Whether the plan that was chosen is the best one: others are pinned with `--layers` and measured, too.
//!
//! They are all ways to use some of the workers, in every order, and to cut between them at a coarse grain, as far as
//! `brigade plan` says that they fit. What is compared is the measured cost, that of a balanced placement.

use std::path::PathBuf;

use serde::Serialize;

use super::clusters::ClusterPlan;
use super::measure::{Measurement, Speeds};

/// A way to place the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Way {
    /// Numbers of the workers in ring order, counted from 1.
    pub workers: Vec<usize>,
    /// Layers of each stage, the coordinator's last.
    pub layers: Vec<u32>,
}

impl Way {
    /// What was done in a cluster of which all nodes were started.
    pub fn of(measurement: &Measurement) -> Self {
        let number = |name: &str| (1..=measurement.nodes.len() + 8).find(|k| ClusterPlan::name_of(*k) == name);
        let workers = measurement.nodes.iter().filter_map(|node| number(&node.name)).collect();
        Self { workers, layers: measurement.split() }
    }

    /// For tables: `worker-2 5, worker-1 3, coordinator 8`.
    pub fn text(&self) -> String {
        let names = self.workers.iter().chain([&0]).map(|k| ClusterPlan::name_of(*k));
        let stages = names.zip(&self.layers).map(|(name, layers)| format!("{name} {layers}"));
        stages.collect::<Vec<_>>().join(", ")
    }
}

/// All ways of `n_workers` workers and a coordinator to hold `n_layers` layers, cut at multiples of `grain` layers.
pub fn ways(n_workers: usize, n_layers: u32, grain: u32) -> Vec<Way> {
    let mut all = Vec::new();
    for workers in orders(n_workers) {
        for layers in splits(n_layers, workers.len() + 1, grain) {
            all.push(Way { workers: workers.clone(), layers });
        }
    }
    all
}

/// All ways to pick some of `1..=n` and to put them in order, none among them.
fn orders(n: usize) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    let mut at = 0;
    while at < all.len() {
        let further: Vec<usize> = (1..=n).filter(|k| !all[at].contains(k)).collect();
        for k in further {
            let longer = all[at].iter().copied().chain([k]).collect();
            all.push(longer);
        }
        at += 1;
    }
    all
}

/// All ways to write `n_layers` as a sum of `n_stages` parts, all of them but the last multiples of `grain`.
fn splits(n_layers: u32, n_stages: usize, grain: u32) -> Vec<Vec<u32>> {
    if n_stages == 1 {
        return vec![vec![n_layers]];
    }
    let firsts = (1..).map(|k| k * grain).take_while(|first| *first < n_layers);
    let with = |first: u32| {
        let rest = splits(n_layers - first, n_stages - 1, grain);
        rest.into_iter().map(move |rest| std::iter::once(first).chain(rest).collect())
    };
    firsts.flat_map(with).collect()
}

/// The grain at which ways are cut: pairs finely, rings of more nodes so that there are no more than a dozen.
pub fn grain(n_workers: usize, n_layers: u32) -> u32 {
    if n_workers < 2 { n_layers / 8 } else { n_layers / 4 }.max(1)
}

/// A way that was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tried {
    /// What was done.
    pub way: Way,
    /// What came of it, and what was expected.
    pub measurement: Measurement,
}

/// What the planner is asked to make least, as it came out.
fn cost_s(tried: &Tried) -> f64 {
    Speeds::cost_s(&tried.measurement.measured)
}

/// All that was measured of one cluster.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Search {
    /// Its number, from 1.
    pub cluster: usize,
    /// The chosen plan.
    pub chosen: Tried,
    /// The others.
    pub others: Vec<Tried>,
    /// How many others could not be measured.
    pub failed: usize,
}

/// Up to how much more than the chosen plan another one may cost to be measured again with it, as a share: twice of
/// what two measurements of one plan differ by, as a rule.
const CLOSE: f64 = 0.10;

impl Search {
    /// The best of all.
    pub fn best(&self) -> &Tried {
        self.others.iter().chain([&self.chosen]).min_by(|a, b| cost_s(a).total_cmp(&cost_s(b))).unwrap_or(&self.chosen)
    }

    /// Has the chosen plan and its nearest rival measured a second time, and takes the means: the best of many is
    /// partly the luckiest, be it the chosen one or another. Nothing is done where no other comes close.
    pub fn look_again(&mut self, mut again: impl FnMut(&Way) -> Option<Measurement>) {
        let rival = self.others.iter().min_by(|a, b| cost_s(a).total_cmp(&cost_s(b)));
        let Some(rival) = rival.filter(|rival| cost_s(rival) <= (1.0 + CLOSE) * cost_s(&self.chosen)) else { return };
        let rival = rival.way.clone();
        let both = self.others.iter_mut().filter(|tried| tried.way == rival).chain([&mut self.chosen]);
        for tried in both {
            if let Some(second) = again(&tried.way) {
                let first = tried.measurement.measured;
                tried.measurement.measured = first.mean(&second.measured);
            }
        }
    }

    /// The share of the other plans that was measured; `None` if there are none.
    pub fn measured_share(&self) -> Option<f64> {
        let tried = self.others.len() + self.failed;
        (tried > 0).then(|| self.others.len() as f64 / tried as f64)
    }

    /// What the chosen plan costs beyond the best one, as a share of that one's cost.
    pub fn regret(&self) -> f64 {
        cost_s(&self.chosen) / cost_s(self.best()) - 1.0
    }
}

/// Measured placement against placement by memory on one cluster.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gain {
    /// Its number, from 1.
    pub cluster: usize,
    /// Placed by what was measured.
    pub measured: Measurement,
    /// Placed by memory: nothing is predicted.
    pub memory: Measurement,
    /// What is predicted of that split.
    pub memory_predicted: Option<Speeds>,
}

impl Gain {
    /// By how much `pick` is greater than with placement by memory: as measured, and as predicted.
    pub fn factors(&self, pick: fn(&Speeds) -> f64) -> (f64, Option<f64>) {
        let came = pick(&self.measured.measured) / pick(&self.memory.measured);
        let expected = self.measured.predicted.zip(self.memory_predicted);
        (came, expected.map(|(measured, memory)| pick(&measured) / pick(&memory)))
    }
}

/// Where what the nodes of a cluster measured lies, and the number that each had there.
pub fn measured_in(dir: PathBuf, workers: &[usize]) -> (PathBuf, Vec<usize>) {
    (dir, std::iter::once(0).chain(workers.iter().copied()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plan::measure::NodeResult;

    #[test]
    fn ways_are_all_orders_and_cuts() {
        assert_eq!(orders(2), [vec![], vec![1], vec![2], vec![1, 2], vec![2, 1]]);
        assert_eq!(splits(16, 2, 4), [[4, 12], [8, 8], [12, 4]]);
        assert_eq!(splits(16, 3, 4), [[4, 4, 8], [4, 8, 4], [8, 4, 4]]);
        assert_eq!(splits(3, 2, 4), Vec::<Vec<u32>>::new());
        assert_eq!(ways(1, 16, grain(1, 16)).len(), 8);
        let three = ways(2, 16, grain(2, 16));
        assert_eq!(three.len(), 1 + 2 * 3 + 2 * 3);
        assert!(three.iter().all(|way| way.layers.iter().sum::<u32>() == 16));
    }

    fn search_chosen() -> Way {
        Way { workers: vec![2], layers: vec![5, 11] }
    }

    fn measurement(split: &[(&str, u32)], alone: f64, together: f64) -> Measurement {
        let node = |&(name, layers): &(&str, u32)| NodeResult {
            name: name.to_owned(),
            layers,
            predicted_bytes: None,
            resident_bytes: 0,
        };
        let measured = Speeds { alone, together, first_token_s: 1.0 };
        Measurement { nodes: split.iter().map(node).collect(), predicted: None, measured }
    }

    #[test]
    fn regret_is_what_the_best_would_have_saved() {
        let tried = |alone, together| {
            let measurement = measurement(&[("worker-2", 5), ("coordinator", 11)], alone, together);
            Tried { way: Way::of(&measurement), measurement }
        };
        let mut search = Search { cluster: 1, chosen: tried(10.0, 40.0), others: vec![tried(5.0, 45.0)], failed: 0 };
        assert_eq!((search.regret(), search.best()), (0.0, &search.chosen));
        search.others.push(tried(20.0, 40.0));
        assert!((search.regret() - 0.2).abs() < 1e-9);
        search.others[1].way = Way { workers: vec![1], layers: vec![4, 12] };
        let mut asked = 0;
        search.look_again(|way| {
            asked += 1;
            Some(if *way == search_chosen() { tried(20.0, 40.0) } else { tried(10.0, 40.0) }.measurement)
        });
        assert_eq!(asked, 2);
        assert!((search.chosen.measurement.measured.alone - 15.0).abs() < 1e-9 && search.regret() < 1e-9);
        assert_eq!(search.chosen.way, search_chosen());
        assert_eq!(search.chosen.way.text(), "worker-2 5, coordinator 11");
    }

    #[test]
    fn a_chosen_plan_that_was_lucky_is_measured_again() {
        let tried = |worker: usize, alone| {
            let measurement = measurement(&[("worker-2", 5), ("coordinator", 11)], alone, 40.0);
            Tried { way: Way { workers: vec![worker], layers: vec![5, 11] }, measurement }
        };
        // The others cost 4 % and twice as much.
        let mut search =
            Search { cluster: 1, chosen: tried(2, 20.0), others: vec![tried(1, 19.2), tried(3, 5.0)], failed: 1 };
        assert_eq!((search.regret(), search.measured_share()), (0.0, Some(2.0 / 3.0)));
        let mut asked = Vec::new();
        search.look_again(|way| {
            asked.push(way.workers[0]);
            Some(tried(2, if *way == search_chosen() { 10.0 } else { 19.2 }).measurement)
        });
        assert_eq!(asked, [1, 2]);
        assert!(search.regret() > 0.05, "{}", search.regret());
        // Nobody comes close.
        let mut search = Search { cluster: 1, chosen: tried(2, 20.0), others: vec![tried(3, 5.0)], failed: 0 };
        search.look_again(|_| panic!("there is no need to"));
    }

    #[test]
    fn a_gain_needs_both_predictions() {
        let (measured, memory) = (measurement(&[], 20.0, 60.0), measurement(&[], 10.0, 20.0));
        let mut gain = Gain { cluster: 1, measured, memory, memory_predicted: None };
        assert_eq!(gain.factors(|speeds| speeds.together), (3.0, None));
        gain.measured.predicted = Some(Speeds { alone: 18.0, together: 60.0, first_token_s: 1.0 });
        gain.memory_predicted = Some(Speeds { alone: 9.0, together: 24.0, first_token_s: 1.0 });
        assert_eq!(gain.factors(|speeds| speeds.alone), (2.0, Some(2.0)));
    }
}
