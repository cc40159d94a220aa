//! Who is here, and what is placed where.
//!
//! The coordinator's state machine: it is told what happened and answers what to do.
//!
//! ```text
//! Waiting --(enough nodes, a plan)--> Loading --(all loaded)--> Joining --(all joined)--> Probing --(a token went
//!    ^                                  |                          |                         |      around)--> Ready
//!    |                                  +------------ a stage is lost or broken -------------+-----------------+
//!    +-- no plan <---------------------------------- place again, epoch + 1 <----------------------------------+
//! ```
//!
//! Every placement has a higher epoch than the one before; news of an older epoch are ignored.

use std::time::{Duration, Instant};

use brigade_base::{ByteSize, DeploymentId, Epoch, LayerRange, NodeId};
use brigade_plan::{Demand, ModelProfile, NodeProfile, Plan, place};

use crate::control::Offer;

/// How long a broken ring waits for the news of which node is gone before it is placed again with all of them. A
/// killed process closes all its links within a millisecond; a vanished machine takes the heartbeat's time.
const SETTLE: Duration = Duration::from_millis(300);

/// A ring that breaks so often before it was ready is placed without the worker that says so: two machines that cannot
/// reach each other never will. Until then each wait is twice the one before.
const MAX_BREAKS: u32 = 3;

/// Most doublings of the wait: about 20 seconds.
const MAX_DOUBLINGS: u32 = 6;

/// While the model does not fit without the nodes that were left out, they get another chance this often: what failed
/// may have been a switch that restarted or a disk that was full.
const RETRY: Duration = Duration::from_secs(10);

/// What stays the same over all placements.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The deployment.
    pub deployment: DeploymentId,
    /// What the coordinator itself offers.
    pub coordinator: NodeProfile,
    /// What the model costs.
    pub model: ModelProfile,
    /// What is asked of the placement.
    pub demand: Demand,
    /// Nodes, the coordinator among them, that must be here before the first placement.
    pub nodes_wanted: usize,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// A worker is here, or here again.
    Offer(NodeId, Offer),
    /// A worker's control link is gone.
    Gone(NodeId, String),
    /// So much of a stage's weights is there.
    Progress(NodeId, Epoch, f32),
    /// A stage is loaded.
    Loaded(NodeId, Epoch, ByteSize),
    /// A stage has reached the next one.
    Joined(NodeId, Epoch),
    /// A stage cannot be loaded; the coordinator's own included.
    StageFailed(NodeId, Epoch, String),
    /// A token went around the ring.
    WentAround(Epoch),
    /// A link broke or a pass failed; the worker is the one that says so, if it is one.
    RingBroke(Option<NodeId>, Epoch, String),
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Tell a worker to load a stage.
    Deploy {
        /// The worker.
        node: NodeId,
        /// The placement's epoch.
        epoch: Epoch,
        /// Its layers.
        layers: LayerRange,
        /// Whose frames it gets.
        upstream: NodeId,
        /// Who gets its frames.
        downstream: NodeId,
    },
    /// Load the coordinator's own stage.
    LoadTail {
        /// The placement's epoch.
        epoch: Epoch,
        /// Its layers.
        layers: LayerRange,
    },
    /// Tell a worker to dial the next stage.
    Join {
        /// The worker.
        node: NodeId,
        /// The placement's epoch.
        epoch: Epoch,
    },
    /// Dial the first worker, take the last one's link, and send a token around; without workers just compute it.
    StartRing {
        /// The placement's epoch.
        epoch: Epoch,
        /// The first worker, if there is one.
        first: Option<NodeId>,
        /// The last worker, if there is one.
        last: Option<NodeId>,
        /// Stages, the coordinator's included.
        n_stages: u32,
    },
    /// Requests are answered from now on.
    Ready {
        /// The placement's epoch.
        epoch: Epoch,
    },
    /// End the ring and every session in it, and drop the coordinator's own stage.
    StopRing {
        /// The placement's epoch.
        epoch: Epoch,
        /// What to tell the sessions.
        reason: String,
    },
    /// Tell a worker to drop its stage.
    Undeploy {
        /// The worker.
        node: NodeId,
        /// The placement's epoch.
        epoch: Epoch,
    },
    /// The coordinator itself cannot go on.
    GiveUp {
        /// Why.
        reason: String,
    },
}

/// How far a stage is.
#[derive(Debug, Clone, PartialEq)]
pub enum StageState {
    /// The node has no stage.
    Idle,
    /// Weights are on their way; the share that is there.
    Loading(f32),
    /// All weights are there.
    Loaded,
    /// The next stage is reached.
    Joined,
    /// It failed, and the node is left out until it comes anew.
    Failed(String),
}

/// A node as the coordinator sees it.
#[derive(Debug, Clone)]
pub struct Member {
    /// The node.
    pub id: NodeId,
    /// What it gives.
    pub offer: Offer,
    /// Its stage's layers.
    pub layers: Option<LayerRange>,
    /// How far its stage is.
    pub stage: StageState,
    /// What its stage takes, once loaded.
    pub stage_memory: ByteSize,
}

/// Where the deployment stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Nothing is placed; the text says what is missing.
    Waiting(String),
    /// Stages load their weights.
    Loading,
    /// Stages reach for each other.
    Joining,
    /// A first token is on its way.
    Probing,
    /// Requests are answered.
    Ready,
    /// A link broke; who is gone will be known in a moment.
    Settling(String),
}

/// The coordinator's state machine.
#[derive(Debug)]
pub struct Cluster {
    settings: Settings,
    /// Workers in the order in which they came.
    members: Vec<Member>,
    phase: Phase,
    epoch: Epoch,
    plan: Option<Plan>,
    tail_loaded: bool,
    tail_memory: ByteSize,
    settle_until: Option<Instant>,
    /// How often the ring broke since it was last ready.
    n_breaks: u32,
    placed_before: bool,
    given_up: bool,
    /// When the present input came.
    now: Option<Instant>,
}

impl Cluster {
    /// A cluster of the coordinator alone. Call [`Cluster::handle`] with [`Input::Tick`] to begin.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            members: Vec::new(),
            phase: Phase::Waiting("the model is about to be placed".to_owned()),
            epoch: Epoch(0),
            plan: None,
            tail_loaded: false,
            tail_memory: ByteSize(0),
            settle_until: None,
            n_breaks: 0,
            placed_before: false,
            given_up: false,
            now: None,
        }
    }

    /// Where the deployment stands.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The epoch of the present placement, 0 before the first.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The present placement.
    pub fn plan(&self) -> Option<&Plan> {
        self.plan.as_ref()
    }

    /// The workers in the order in which they came.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// What the coordinator's own stage takes, once loaded.
    pub fn tail_memory(&self) -> ByteSize {
        self.tail_memory
    }

    /// The deployment.
    pub fn deployment(&self) -> DeploymentId {
        self.settings.deployment
    }

    /// When [`Input::Tick`] is due.
    pub fn next_tick(&self) -> Option<Instant> {
        self.settle_until
    }

    /// Takes note of what happened and says what to do, in this order.
    pub fn handle(&mut self, now: Instant, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        self.now = Some(now);
        if self.given_up {
            return actions;
        }
        match input {
            Input::Offer(id, offer) => self.offer(id, offer, &mut actions),
            Input::Gone(id, reason) => self.gone(id, &reason, &mut actions),
            Input::Progress(id, epoch, share) => {
                if let Some(member) = self.current(id, epoch)
                    && let StageState::Loading(done) = &mut member.stage
                {
                    *done = share.clamp(0.0, 1.0);
                }
            }
            Input::Loaded(id, epoch, memory) if id == self.settings.coordinator.id => {
                if epoch == self.epoch && self.phase == Phase::Loading {
                    self.tail_memory = memory;
                    self.tail_loaded = true;
                    self.advance(&mut actions);
                }
            }
            Input::Loaded(id, epoch, memory) => {
                if let Some(member) = self.current(id, epoch)
                    && matches!(member.stage, StageState::Loading(_))
                {
                    member.stage = StageState::Loaded;
                    member.stage_memory = memory;
                    self.advance(&mut actions);
                }
            }
            Input::Joined(id, epoch) => {
                if let Some(member) = self.current(id, epoch)
                    && member.stage == StageState::Loaded
                {
                    member.stage = StageState::Joined;
                    self.advance(&mut actions);
                }
            }
            Input::StageFailed(id, epoch, reason) => self.stage_failed(id, epoch, &reason, &mut actions),
            Input::WentAround(epoch) => {
                if epoch == self.epoch && matches!(self.phase, Phase::Joining | Phase::Probing) {
                    self.phase = Phase::Ready;
                    actions.push(Action::Ready { epoch });
                }
            }
            Input::RingBroke(by, epoch, reason) => {
                if epoch == self.epoch && matches!(self.phase, Phase::Joining | Phase::Probing | Phase::Ready) {
                    self.ring_broke(now, by, reason, &mut actions);
                }
            }
            Input::Tick => {
                let is_new = self.epoch == Epoch(0);
                if is_new || self.settle_until.is_some_and(|until| now >= until) {
                    if matches!(self.phase, Phase::Waiting(_)) {
                        self.forgive();
                    }
                    self.place(&mut actions);
                }
            }
        }
        actions
    }

    /// A worker that has a stage of the present placement.
    fn current(&mut self, id: NodeId, epoch: Epoch) -> Option<&mut Member> {
        if epoch != self.epoch {
            return None;
        }
        self.members.iter_mut().find(|m| m.id == id && m.layers.is_some())
    }

    fn offer(&mut self, id: NodeId, offer: Offer, actions: &mut Vec<Action>) {
        let had_stage = self.remove(id);
        self.n_breaks = 0;
        let member = Member { id, offer, layers: None, stage: StageState::Idle, stage_memory: ByteSize(0) };
        self.members.push(member);
        if had_stage {
            self.replace("a node that held a part of the model started anew", actions);
        } else if matches!(self.phase, Phase::Waiting(_)) {
            self.place(actions);
        }
    }

    fn gone(&mut self, id: NodeId, reason: &str, actions: &mut Vec<Action>) {
        let name = self.members.iter().find(|m| m.id == id).map(|m| m.offer.name.clone());
        self.n_breaks = 0;
        if self.remove(id) {
            self.replace(&format!("node {} is gone ({reason})", name.unwrap_or_default()), actions);
        } else if matches!(self.phase, Phase::Waiting(_)) {
            self.place(actions);
        }
    }

    /// Lets the nodes that were left out take part again.
    fn forgive(&mut self) {
        for member in &mut self.members {
            if matches!(member.stage, StageState::Failed(_)) {
                member.stage = StageState::Idle;
            }
        }
    }

    /// Forgets a member; true if it had a stage.
    fn remove(&mut self, id: NodeId) -> bool {
        let Some(at) = self.members.iter().position(|m| m.id == id) else { return false };
        self.members.remove(at).layers.is_some()
    }

    fn stage_failed(&mut self, id: NodeId, epoch: Epoch, reason: &str, actions: &mut Vec<Action>) {
        if epoch != self.epoch {
            return;
        }
        if id == self.settings.coordinator.id {
            self.given_up = true;
            self.phase = Phase::Waiting(reason.to_owned());
            actions.push(Action::StopRing { epoch, reason: reason.to_owned() });
            actions.push(Action::GiveUp { reason: reason.to_owned() });
        } else if let Some(member) = self.current(id, epoch) {
            let why = format!("node {} failed: {reason}", member.offer.name);
            member.layers = None;
            member.stage = StageState::Failed(reason.to_owned());
            self.replace(&why, actions);
        }
    }

    fn ring_broke(&mut self, now: Instant, by: Option<NodeId>, reason: String, actions: &mut Vec<Action>) {
        self.n_breaks = if self.phase == Phase::Ready { 0 } else { self.n_breaks + 1 };
        if let Some(id) = by
            && self.n_breaks > MAX_BREAKS
        {
            self.n_breaks = 0;
            return self.stage_failed(id, self.epoch, &reason, actions);
        }
        actions.push(Action::StopRing { epoch: self.epoch, reason: reason.clone() });
        self.phase = Phase::Settling(reason);
        self.settle_until = Some(now + SETTLE * 2u32.pow(self.n_breaks.min(MAX_DOUBLINGS)));
    }

    /// Drops the present placement and makes another one.
    fn replace(&mut self, reason: &str, actions: &mut Vec<Action>) {
        if self.plan.take().is_some() && !matches!(self.phase, Phase::Settling(_)) {
            actions.push(Action::StopRing { epoch: self.epoch, reason: reason.to_owned() });
        }
        self.place(actions);
    }

    fn place(&mut self, actions: &mut Vec<Action>) {
        self.settle_until = None;
        self.plan = None;
        self.tail_loaded = false;
        let held: Vec<NodeId> = self.members.iter().filter(|m| m.layers.is_some()).map(|m| m.id).collect();
        for member in &mut self.members {
            member.layers = None;
            if !matches!(member.stage, StageState::Failed(_)) {
                member.stage = StageState::Idle;
            }
        }
        let usable: Vec<&Member> = self.members.iter().filter(|m| m.stage == StageState::Idle).collect();
        let here = usable.len() + 1;
        let wanted = if self.placed_before { 1 } else { self.settings.nodes_wanted };
        let outcome = if here < wanted {
            Err(format!("{here} of {wanted} nodes are here"))
        } else {
            let profile = |m: &&Member| NodeProfile { id: m.id, name: m.offer.name.clone(), memory: m.offer.memory };
            let nodes: Vec<NodeProfile> =
                usable.iter().map(profile).chain([self.settings.coordinator.clone()]).collect();
            place(&self.settings.model, &nodes, &self.settings.demand).map_err(|error| error.to_string())
        };
        match outcome {
            Ok(plan) => self.deploy(plan, &held, actions),
            Err(reason) => {
                let epoch = self.epoch;
                actions.extend(held.into_iter().map(|node| Action::Undeploy { node, epoch }));
                let failures: Vec<String> = self
                    .members
                    .iter()
                    .filter_map(|m| match &m.stage {
                        StageState::Failed(why) => Some(format!("{} was left out: {why}", m.offer.name)),
                        _ => None,
                    })
                    .collect();
                if !failures.is_empty() {
                    self.settle_until = self.now.map(|now| now + RETRY);
                }
                let all: Vec<String> = std::iter::once(reason).chain(failures).collect();
                self.phase = Phase::Waiting(all.join("; "));
            }
        }
    }

    fn deploy(&mut self, plan: Plan, held: &[NodeId], actions: &mut Vec<Action>) {
        let old = self.epoch;
        let unused = held.iter().filter(|node| plan.stages.iter().all(|stage| stage.node != **node));
        actions.extend(unused.map(|&node| Action::Undeploy { node, epoch: old }));
        self.epoch = self.epoch.next();
        self.placed_before = true;
        self.phase = Phase::Loading;
        let n = plan.stages.len();
        for (k, stage) in plan.stages.iter().enumerate() {
            if k + 1 == n {
                actions.push(Action::LoadTail { epoch: self.epoch, layers: stage.layers });
                continue;
            }
            if let Some(member) = self.members.iter_mut().find(|m| m.id == stage.node) {
                member.layers = Some(stage.layers);
                member.stage = StageState::Loading(0.0);
            }
            actions.push(Action::Deploy {
                node: stage.node,
                epoch: self.epoch,
                layers: stage.layers,
                upstream: plan.stages[(k + n - 1) % n].node,
                downstream: plan.stages[k + 1].node,
            });
        }
        self.plan = Some(plan);
    }

    /// Goes to the next phase once every stage is far enough.
    fn advance(&mut self, actions: &mut Vec<Action>) {
        let workers: Vec<&Member> = self.members.iter().filter(|m| m.layers.is_some()).collect();
        let epoch = self.epoch;
        let all = |state: StageState| workers.iter().all(|m| m.stage == state);
        if self.phase == Phase::Loading && self.tail_loaded && all(StageState::Loaded) {
            actions.extend(workers.iter().map(|m| Action::Join { node: m.id, epoch }));
            let stages = self.plan.as_ref().map(|plan| plan.stages.as_slice()).unwrap_or_default();
            let (_, ring) = stages.split_last().unwrap_or_else(|| unreachable!("a plan has the coordinator's stage"));
            actions.push(Action::StartRing {
                epoch,
                first: ring.first().map(|s| s.node),
                last: ring.last().map(|s| s.node),
                n_stages: stages.len() as u32,
            });
            self.phase = if ring.is_empty() { Phase::Probing } else { Phase::Joining };
        } else if self.phase == Phase::Joining && all(StageState::Joined) {
            self.phase = Phase::Probing;
        }
    }
}

#[cfg(test)]
#[path = "cluster_tests.rs"]
mod tests;
