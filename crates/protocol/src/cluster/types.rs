//! What the cluster is told, what it answers, and how it shows itself.

use brigade_base::{ByteSize, DeploymentId, Epoch, LayerRange, NodeId};
use brigade_plan::{Demand, LinkProfile, ModelProfile, NodeProfile, Speed};

use super::member::Private;
use crate::control::{Held, Offer};

/// What stays the same over all placements.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The deployment.
    pub deployment: DeploymentId,
    /// The coordinator's term: its first placement has the epoch [`Epoch::of`] this term and 1.
    pub term: u64,
    /// What the coordinator itself offers.
    pub coordinator: NodeProfile,
    /// What the model costs.
    pub model: ModelProfile,
    /// What is asked of the placement.
    pub demand: Demand,
    /// Nodes, the coordinator among them, that must be here before the first placement.
    pub nodes_wanted: usize,
    /// Holders of each worker's stage: 1, or 2 for one that stands by with its weights loaded.
    pub redundancy: u32,
    /// Those that stand by get the frames of the stage as well, so that their slots hold what its slots do.
    pub shadow: bool,
}

/// What happened. Stages are named by their place in the ring, from 0.
#[derive(Debug, Clone)]
pub enum Input {
    /// A worker is here, or here again: then as one without stages.
    Offer(NodeId, Offer),
    /// How fast a node is, the coordinator included, and what links do, each from one node to another. Comes before the
    /// node's offer, and again when it has changed.
    Measured(NodeId, Option<Box<Speed>>, Vec<(NodeId, NodeId, LinkProfile)>),
    /// A worker's control link is gone.
    Gone(NodeId, String),
    /// So much of a stage's weights is there, from 0 to 1.
    Progress(NodeId, Epoch, u32, f32),
    /// A stage is loaded, takes so many bytes, and holds so much of the KV cache from before; the coordinator's own
    /// stage included.
    Loaded(NodeId, Epoch, u32, ByteSize, Option<Held>),
    /// A stage has reached the next one.
    Joined(NodeId, Epoch, u32),
    /// A stage cannot be loaded; the coordinator's own included.
    StageFailed(NodeId, Epoch, u32, String),
    /// A token went around the ring.
    WentAround(Epoch),
    /// A link broke or a pass failed; the worker is the one that says so, if it is one.
    RingBroke(Option<NodeId>, Epoch, String),
    /// A pass does not come back; the worker is the one at fault, if that is known.
    Stuck(Option<NodeId>, Epoch, String),
    /// A worker wants to end.
    Leave(NodeId, String),
    /// No pass is on its way any more: the answer to [`Action::Drain`].
    Drained(Epoch),
    /// Whether a majority of the cluster's nodes is in reach. It is until said otherwise.
    Quorum(bool),
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Tell a worker all stages that it is to hold.
    Assign {
        /// The worker.
        node: NodeId,
        /// The placement's epoch.
        epoch: Epoch,
        /// Rises from 1 with each assignment of this epoch to this worker.
        revision: u32,
        /// Its stages in ring order; none to free it.
        orders: Vec<Order>,
    },
    /// Load the coordinator's own stage. A ring that still runs is to be stopped for it.
    LoadTail {
        /// The placement's epoch.
        epoch: Epoch,
        /// Its place in the ring, the last.
        stage: u32,
        /// Its layers.
        layers: LayerRange,
        /// What its slots hold is of use still.
        keep_kv: bool,
    },
    /// Tell a worker to dial the nodes behind the stages that it serves.
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
        /// The worker with the first stage, if there is one.
        first: Option<NodeId>,
        /// The worker with the last stage before the coordinator's, if there is one.
        last: Option<NodeId>,
        /// Stages, the coordinator's included.
        n_stages: u32,
        /// Who stands by for the first stage and wants the same frames.
        shadow: Option<NodeId>,
        /// What all stages hold of the KV cache; `None` if one of them starts empty.
        held: Option<Held>,
    },
    /// Requests are answered from now on.
    Ready {
        /// The placement's epoch.
        epoch: Epoch,
    },
    /// Send no further pass; say [`Input::Drained`] when all are back. The ring is placed anew then.
    Drain {
        /// The placement's epoch.
        epoch: Epoch,
    },
    /// End the ring. Its sessions wait for the next one.
    StopRing {
        /// The placement's epoch.
        epoch: Epoch,
        /// Why, for people.
        reason: String,
    },
    /// Tell a worker that wants to end that nothing depends on it any more.
    Released {
        /// The worker.
        node: NodeId,
    },
    /// The coordinator itself cannot go on.
    GiveUp {
        /// Why.
        reason: String,
    },
}

/// A stage that a node is to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Its place in the ring, from 0.
    pub stage: u32,
    /// Its layers.
    pub layers: LayerRange,
    /// What it is for.
    pub role: Role,
    /// What its slots hold is of use still: the node had a stage of these layers in the placement before.
    pub keep_kv: bool,
}

/// What a node does with a stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Computes passes and sends them on.
    Serve {
        /// Whose frames come in; may be the node itself.
        upstream: NodeId,
        /// Who gets its frames; may be the node itself.
        downstream: NodeId,
        /// Who stands by for the next stage and wants the same frames.
        shadow: Option<NodeId>,
        /// Who hands over what its slots held.
        kv_from: Option<NodeId>,
    },
    /// Holds the weights.
    Standby {
        /// Whose frames come in, if any.
        upstream: Option<NodeId>,
    },
    /// Sends what its slots hold to the node that serves the stage from now on.
    HandOver {
        /// The node.
        to: NodeId,
    },
}

/// How far a stage is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StageState {
    /// Weights are on their way; the share that is there.
    Loading(f32),
    /// All weights are there.
    Loaded,
    /// The next stage is reached.
    Joined,
}

/// How a node stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberState {
    /// It takes part.
    Here,
    /// It wants to end, and gets no stage any more.
    Leaving,
    /// It failed, and is left out until it comes anew or is needed.
    Failed(String),
}

/// A stage of a node.
#[derive(Debug, Clone)]
pub struct MemberStage {
    /// Its place in the ring, from 0.
    pub stage: u32,
    /// Its layers.
    pub layers: LayerRange,
    /// The node stands by with it; another one serves it.
    pub is_standby: bool,
    /// How far it is.
    pub state: StageState,
    /// What it takes, once loaded.
    pub memory: ByteSize,
    /// It was there in the placement before.
    pub(super) is_kept: bool,
    /// It was loaded in the placement before.
    pub(super) was_loaded: bool,
    /// What its slots hold from before, once loaded.
    pub(super) held: Option<Held>,
}

/// A node as the coordinator sees it.
#[derive(Debug, Clone)]
pub struct Member {
    /// The node.
    pub id: NodeId,
    /// What it gives.
    pub offer: Offer,
    /// Its stages in ring order: those that it serves and those that it stands by for.
    pub stages: Vec<MemberStage>,
    /// How it stands.
    pub state: MemberState,
    pub(super) private: Private,
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
    /// Passes on their way come back, then the model is placed anew; the text says why.
    Draining(String),
    /// A link broke; who is gone will be known in a moment.
    Settling(String),
}
