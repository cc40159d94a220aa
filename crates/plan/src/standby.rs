//! Who takes the stage of a node that is lost, and who stands by for that.
//!
//! The coordinator's own stage has no second holder: with it the sampler and all sessions are gone too. Several stages
//! on one node share its process, so that what a process needs anyway is counted once.

use std::cmp::Ordering;

use brigade_base::{ByteSize, LayerRange, NodeId};

use crate::memory::{COMPUTE_FLOOR, stage_memory, usable};
use crate::{Demand, ModelProfile, NodeProfile, PlannedStage};

/// Most stages of one worker, those that it stands by for among them: each has a context of its own, and a ring of so
/// many stages on one node is slower than any other choice.
pub const MAX_STAGES_OF_WORKER: usize = 16;

/// A worker and what it holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Worker {
    /// What it offers.
    pub node: NodeProfile,
    /// Layers of the stages that it serves.
    pub serves: Vec<LayerRange>,
    /// Layers of the stages that it stands by for.
    pub stands_by: Vec<LayerRange>,
}

/// A stage that only one node holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uncovered {
    /// Its place in the ring.
    pub stage: u32,
    /// Its layers.
    pub layers: LayerRange,
    /// The node that serves it.
    pub holder: NodeId,
}

/// A node that stands by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standby {
    /// The stage's place in the ring.
    pub stage: u32,
    /// The node.
    pub node: NodeId,
}

/// How bad a place is: whether the worker serves something, whether it must drop something, how full it is then.
type Rank = (bool, bool, f64);

impl Worker {
    /// Whether all that it holds fits.
    pub fn fits(&self, model: &ModelProfile, demand: &Demand) -> bool {
        self.fill(model, demand).is_some()
    }

    /// The share of its memory that its stages take, `None` if they take more than there is.
    fn fill(&self, model: &ModelProfile, demand: &Demand) -> Option<f64> {
        let n_stages = self.serves.len() + self.stands_by.len();
        let of = |&layers: &LayerRange| stage_memory(model, demand, layers, false).total().0 - COMPUTE_FLOOR;
        let stages = self.serves.iter().chain(&self.stands_by).map(of);
        let needed = stages.fold(COMPUTE_FLOOR, u64::saturating_add);
        let usable = usable(self.node.memory).0;
        (n_stages <= MAX_STAGES_OF_WORKER && needed <= usable).then(|| needed as f64 / usable.max(1) as f64)
    }

    /// How good a place it is for a further stage; less is better, `None` if there is no room.
    ///
    /// Those that serve nothing come first: one that serves would compute two stages for every token, and with it two
    /// would be lost. Next come those that need not drop what they stand by for, then the emptiest.
    fn rank(&self, model: &ModelProfile, demand: &Demand, layers: LayerRange, may_drop: bool) -> Option<Rank> {
        let mut with = self.clone();
        with.serves.push(layers);
        let (drops, fill) = match with.fill(model, demand) {
            Some(fill) => (false, fill),
            None if may_drop => {
                with.stands_by.clear();
                (true, with.fill(model, demand)?)
            }
            None => return None,
        };
        Some((!self.serves.is_empty(), drops, fill))
    }
}

/// Index of the best place among those that `may` name.
fn best(workers: &[Worker], may: impl Fn(&Worker) -> bool, rank: impl Fn(&Worker) -> Option<Rank>) -> Option<usize> {
    let ranked = workers.iter().enumerate().filter(|(_, w)| may(w)).filter_map(|(i, w)| Some((rank(w)?, i)));
    ranked.min_by(|(a, _), (b, _)| a.partial_cmp(b).unwrap_or(Ordering::Equal)).map(|(_, i)| i)
}

/// The worker that is to serve `layers` from now on, beside what it serves: one that serves nothing where there is
/// room, else the one that is emptiest then. It may have to drop what it stands by for: see [`Worker::fits`].
pub fn stand_in(model: &ModelProfile, demand: &Demand, layers: LayerRange, workers: &[Worker]) -> Option<NodeId> {
    best(workers, |_| true, |worker| worker.rank(model, demand, layers, true)).map(|i| workers[i].node.id)
}

/// A second holder for each stage that has none, as far as there is room; never the one that serves it.
///
/// In the order of the ring, each gets a worker that serves nothing where there is room, else the one that is emptiest
/// then: standing by costs memory, and with shadows the time to compute, which an idle node has to give.
pub fn standbys(model: &ModelProfile, demand: &Demand, stages: &[Uncovered], workers: &[Worker]) -> Vec<Standby> {
    let mut workers = workers.to_vec();
    let mut chosen = Vec::new();
    for &Uncovered { stage, layers, holder } in stages {
        let rank = |worker: &Worker| worker.rank(model, demand, layers, false);
        if let Some(i) = best(&workers, |worker| worker.node.id != holder, rank) {
            workers[i].stands_by.push(layers);
            chosen.push(Standby { stage, node: workers[i].node.id });
        }
    }
    chosen
}

/// One line for each worker's stage: who stands by for it. `names` gives the name of a node.
pub fn explain_standbys(
    stages: &[PlannedStage],
    standbys: &[Standby],
    names: impl Fn(NodeId) -> String,
) -> Vec<String> {
    let workers = stages.split_last().map_or(&[][..], |(_, workers)| workers);
    let line = |(stage, planned): (usize, &PlannedStage)| {
        let layers = format!("layers {} of {}", planned.layers, planned.name);
        match standbys.iter().find(|standby| standby.stage as usize == stage) {
            Some(standby) => format!("{} stands by for {layers}.", names(standby.node)),
            None => format!("Nobody stands by for {layers}: no other worker has {} to spare.", alone(planned)),
        }
    };
    workers.iter().enumerate().map(line).collect()
}

/// What a stage takes on a worker that has a process already.
fn alone(stage: &PlannedStage) -> ByteSize {
    ByteSize(stage.memory.total().0.saturating_sub(COMPUTE_FLOOR))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Eight layers of 100 MiB, with next to no KV cache.
    fn model() -> ModelProfile {
        ModelProfile {
            layer_bytes: vec![100 << 20; 8],
            kv_bytes_per_token: vec![1; 8],
            head_bytes: 0,
            cut_points: (1..8).collect(),
            n_embd: 8,
            n_heads: 2,
            n_ff: 16,
            n_vocab: 100,
            ..ModelProfile::default()
        }
    }

    fn demand() -> Demand {
        Demand { context: 256, parallel: 1, max_rows: 16, spread: true, ..Demand::default() }
    }

    fn range(start: u32, end: u32) -> LayerRange {
        LayerRange::new(start, end).unwrap()
    }

    fn id(n: u8) -> NodeId {
        NodeId::from_bytes([n; 32])
    }

    fn worker(n: u8, mib: u64, serves: &[LayerRange], stands_by: &[LayerRange]) -> Worker {
        let node = NodeProfile { id: id(n), name: format!("w{n}"), memory: ByteSize::mib(mib), speed: None };
        Worker { node, serves: serves.to_vec(), stands_by: stands_by.to_vec() }
    }

    fn check_standbys(workers: &[Worker], expected: &[(u32, u8)]) {
        let serving = workers.iter().flat_map(|w| w.serves.iter().map(move |&layers| (layers, w.node.id)));
        let stages: Vec<Uncovered> =
            (0..).zip(serving).map(|(stage, (layers, holder))| Uncovered { stage, layers, holder }).collect();
        let found = standbys(&model(), &demand(), &stages, workers);
        let expected: Vec<Standby> = expected.iter().map(|&(stage, n)| Standby { stage, node: id(n) }).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn neighbours_stand_by_for_each_other_where_there_is_room() {
        let (a, b) = (range(0, 3), range(3, 6));
        check_standbys(&[worker(1, 1000, &[a], &[]), worker(2, 1000, &[b], &[])], &[(0, 2), (1, 1)]);
        check_standbys(&[worker(1, 1000, &[a], &[]), worker(2, 500, &[b], &[])], &[(1, 1)]);
        check_standbys(&[worker(1, 1000, &[a], &[])], &[]);
    }

    #[test]
    fn idle_workers_stand_by_first_and_the_emptiest_of_them() {
        let (a, b) = (range(0, 3), range(3, 6));
        let serving = [worker(1, 9000, &[a], &[]), worker(2, 9000, &[b], &[])];
        let with = |more: &[Worker]| [&serving, more].concat();
        check_standbys(&with(&[worker(3, 1000, &[], &[])]), &[(0, 3), (1, 3)]);
        check_standbys(&with(&[worker(3, 500, &[], &[])]), &[(0, 3), (1, 1)]);
        check_standbys(&with(&[worker(3, 1000, &[], &[]), worker(4, 2000, &[], &[])]), &[(0, 4), (1, 4)]);
        check_standbys(&with(&[worker(3, 1000, &[], &[]), worker(4, 1200, &[], &[])]), &[(0, 4), (1, 3)]);
    }

    #[test]
    fn a_process_is_paid_for_once() {
        let floor = COMPUTE_FLOOR >> 20;
        // Six layers and a little; one sixteenth of it is not to be used.
        let holds = |mib| worker(1, mib, &[range(0, 3)], &[range(3, 6)]).fits(&model(), &demand());
        let enough = (600 + floor + 2) * 16 / 15;
        assert!(holds(enough));
        assert!(!holds(enough - 16));
        assert!(!worker(1, 1 << 20, &[range(0, 1); MAX_STAGES_OF_WORKER + 1], &[]).fits(&model(), &demand()));
    }

    #[test]
    fn a_lost_stage_goes_to_an_idle_worker_which_drops_what_it_stands_by_for_if_it_must() {
        let lost = range(0, 3);
        let found = |workers: &[Worker]| stand_in(&model(), &demand(), lost, workers);
        let busy = worker(1, 1000, &[range(3, 6)], &[]);
        assert_eq!(found(&[busy.clone(), worker(2, 500, &[], &[range(3, 6)])]), Some(id(2)));
        assert_eq!(found(&[busy.clone(), worker(2, 300, &[], &[])]), Some(id(1)));
        let full = worker(2, 500, &[], &[range(3, 6)]);
        assert_eq!(found(&[full, worker(3, 500, &[], &[])]), Some(id(3)));
        assert_eq!(found(&[worker(1, 500, &[range(3, 6)], &[])]), None);
        assert_eq!(found(&[]), None);
    }

    #[test]
    fn it_is_said_who_stands_by() {
        let nodes = [1, 2, 9].map(|n| worker(n, 450, &[], &[]).node);
        let plan = crate::place(&model(), &nodes, &crate::Links::default(), &demand()).unwrap();
        let lines = explain_standbys(&plan.stages, &[Standby { stage: 0, node: id(3) }], |_| "w3".into());
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0], format!("w3 stands by for layers {} of w1.", plan.stages[0].layers));
        assert!(lines[1].starts_with("Nobody stands by for layers"), "{lines:?}");
    }
}
